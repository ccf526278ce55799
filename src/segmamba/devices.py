"""Which device computes, and in which precision: the same for training and use."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

import torch

from segmamba.errors import BackendUnavailableError, ConfigError, describe

Precision = Literal["fp32", "bf16", "fp16"]
"""The type that matrix products and convolutions compute in."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_KINDS = ("cpu", "cuda", "mps")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_WANTED_BYTES = re.compile(r"tried to allocate (\d+) bytes")


def available_devices() -> dict[str, str]:
    """Say what each kind of device is, or why it can't be used.

    Returns:
        "cpu", "cuda", "mps" to a text; usable ones start with "available".
    """
    threads = torch.get_num_threads()
    return {
        "cpu": f"available ({threads} thread{'s' if threads != 1 else ''})",
        "cuda": _describe_cuda(),
        "mps": "available" if _has_mps() else "no Apple GPU that PyTorch can use",
    }


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a device's name into a device that is there.

    Args:
        device: "auto" (CUDA, else CPU), "cpu", "cuda", "cuda:1", "mps", or a device.

    Returns:
        The device.

    Raises:
        ConfigError: The name is none of those.
        BackendUnavailableError: There is no such device here; says what there is.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise _unknown(device) from error
    if resolved.type not in _KINDS:
        raise _unknown(device)
    _require(resolved)
    return resolved


def wake(device: str) -> threading.Thread:
    """Begin to set up a GPU, which takes about a second, while other work goes on.

    Args:
        device: As for `resolve_device`. What can't be used here is reported where it
            is used.

    Returns:
        What sets up context and libraries; needn't be waited for.
    """
    thread = threading.Thread(target=_set_up, args=(device,), name="wake")
    thread.start()
    return thread


def _set_up(device: str) -> None:
    with contextlib.suppress(Exception):
        place = resolve_device(device)
        if place.type == "cuda":
            image = torch.zeros(1, 8, 4, 4, 4, device=place, dtype=torch.float16)
            kernel = image.new_zeros(8, 8, 3, 3, 3)
            torch.nn.functional.conv3d(image, kernel)  # loads cuDNN
            torch.mm(kernel[0, 0, 0], kernel[0, 0, 0])  # and cuBLAS


def precision_for(device: torch.device, precision: str = "auto") -> Precision:
    """Choose the type of matrix products and convolutions on a device.

    Args:
        device: Where the network runs.
        precision: "auto", "fp32", "bf16" or "fp16".

    Returns:
        What was asked for; for "auto", bf16 where the device computes it natively,
        else fp32.

    Raises:
        ConfigError: The precision is none of those.
    """
    if precision == "auto":
        return "bf16" if _computes_bf16(device) else "fp32"
    if precision not in ("fp32", *_DTYPES):
        raise ConfigError(
            describe(
                "unknown precision",
                expected="auto, fp32, bf16 or fp16",
                found=repr(precision),
            )
        )
    return cast(Precision, precision)


def autocast(
    device: torch.device, precision: str = "auto"
) -> contextlib.AbstractContextManager[object]:
    """Give the context in which a network computes at a precision.

    Args:
        device: Where the network runs.
        precision: "auto", "fp32", "bf16" or "fp16".

    Returns:
        An autocast context; one that does nothing for fp32.

    Raises:
        ConfigError: The precision is none of those.
    """
    chosen = precision_for(device, precision)
    if chosen == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[chosen])


class Arriving:
    """Numbers on their way from a GPU to the CPU, which needn't wait for them yet.

    Args:
        values: A small tensor on any device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._event = values.detach(), None
        if values.is_cuda:
            self._values = self._values.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def tolist(self) -> list[float]:
        """Wait for what was launched before, and for nothing launched since."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device's or the computer's memory ran out.

    Args:
        error: Anything caught; PyTorch has no type of its own for the CPU's memory.

    Returns:
        True for torch's and numpy's errors of a failed allocation.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _NO_MEMORY)


def describe_out_of_memory(error: BaseException) -> str:
    """Say what an error of failed allocation was about.

    Args:
        error: One that `is_out_of_memory`.

    Returns:
        Such as "a request for 3814.7 MiB that could not be met", or its first line.
    """
    wanted = _WANTED_BYTES.search(str(error))
    if wanted is not None:
        mib = int(wanted.group(1)) / 2**20
        return f"a request for {mib:.1f} MiB that could not be met"
    lines = str(error).splitlines()
    return lines[0] if lines else "no more memory"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # torch.cpu's queries are private and some are missing in older versions.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def peak_memory_mib(device: torch.device) -> float | None:
    """Tell the most memory that this process held so far.

    Args:
        device: A GPU's own memory for "cuda", else the process's resident memory.

    Returns:
        MiB; None where the system doesn't tell (Windows).
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = _own_peak_kib()
    return None if peak is None else round(peak / 2**10, 1)


def _own_peak_kib() -> float | None:
    # Linux counts in ru_maxrss what the process that started this one held then.
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return float(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform == "darwin" else float(peak)


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[torch.cuda.CUDAGraph]:
    """Record launches as a CUDA graph, to be replayed once it ends.

    Other threads may go on using the GPU meanwhile.

    Args:
        device: The GPU. After a failure it is as it was before.

    Yields:
        The graph.
    """
    with torch.cuda.device(device):
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        numbers = torch.cuda.default_generators[torch.cuda.current_device()]
        kept = numbers.clone_state()
        options = {"stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **options):
                yield graph
        except BaseException:
            # Random numbers would wait for the end of a record that has failed.
            numbers.graphsafe_set_state(kept)
            raise
        finally:
            torch.cuda.set_stream(before)  # which a failure leaves behind


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _describe_cuda() -> str:
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"this PyTorch ({torch.__version__}) is built without CUDA"
        return "no NVIDIA GPU that PyTorch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "available: " + ", ".join(names)


def _require(device: torch.device) -> None:
    if device.type == "cuda":
        found = available_devices()["cuda"]
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise _missing(device, found)
    if device.type == "mps" and not _has_mps():
        raise _missing(device, available_devices()["mps"])


def _missing(device: torch.device, found: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        describe(
            f"device '{device}' is not there",
            found=found,
            remedy="Use the device 'cpu' or 'auto'.",
        )
    )


def _unknown(device: object) -> ConfigError:
    return ConfigError(
        describe(
            "unknown device",
            expected="auto, cpu, cuda, cuda:0 or mps",
            found=repr(str(device)),
        )
    )
