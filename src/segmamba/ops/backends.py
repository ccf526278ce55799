"""Which implementations of the operators can run here."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from segmamba.errors import BackendUnavailableError, ConfigError, describe
from segmamba.ops._cuda import nvrtc

BACKENDS = ("reference", "chunked", "numba", "cuda")

_FASTEST = {"cpu": "numba", "cuda": "cuda"}
"""The fastest back end of a kind of device, in float32."""

cuda_is_emulated = False
"""Whether the tests' emulator runs the CUDA kernels, on CPU tensors."""

_log = logging.getLogger(__name__)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_for_compilers(function: Function) -> Function:
    """Say that a function answers the same while a program runs.

    Does what `torch.compiler.assume_constant_result` does, which imports all of the
    compiler, seconds of it, for this one mark.

    Args:
        function: Not to be traced.

    Returns:
        The same function.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@functools.cache
def _numba_status() -> str:
    try:
        importlib.import_module("numba")
    except Exception as error:
        return f"numba can't be imported ({type(error).__name__}: {error})"
    return "available"


@constant_for_compilers
def _numba_is_available() -> bool:
    return _numba_status() == "available"


@functools.cache
def cuda_status() -> str:
    """Say whether the CUDA kernels can run here.

    Returns:
        "available", or the reason why not.
    """
    return _why_not_nvidia() or _why_no_compiler() or "available"


def _why_not_nvidia() -> str:
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    return ""


def _why_no_compiler() -> str:
    """Why NVRTC can't compile the kernels for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    if major < 7:
        return f"the GPU's compute capability is {major}.{minor}, the kernels need 7.0"
    try:
        known = nvrtc.architectures()
    except BackendUnavailableError as error:
        return str(error).rstrip(".")
    if 10 * major + minor in known:
        return ""
    version = ".".join(map(str, nvrtc.version()))
    return (
        f"the GPU's compute capability is {major}.{minor}, which NVRTC {version} of "
        "this PyTorch doesn't compile for"
    )


def available_backends() -> dict[str, str]:
    """Say which back ends can run on this machine.

    Returns:
        One entry a back end: its name, and "available" or the reason why not.
    """
    return {
        "reference": "available",
        "chunked": "available",
        "numba": _numba_status(),
        "cuda": cuda_status(),
    }


def automatic_backend(device: torch.device) -> tuple[str, str]:
    """Say what "auto" takes on a device for float32 and half types.

    Args:
        device: Where the tensors are.

    Returns:
        The back end, and why it isn't the fastest one that there is for such a device;
        empty if it is.
    """
    taken = resolve_backend("auto", device=device, dtype=torch.float32)
    fastest = _FASTEST.get(device.type, taken)
    return taken, "" if taken == fastest else available_backends()[fastest]


def warn_if_slow(device: torch.device) -> None:
    """Log one warning in a process if a GPU's scans and norms take the slow path.

    Args:
        device: Where a network is about to run.
    """
    taken, reason = automatic_backend(device)
    if device.type == "cuda" and reason:
        _warn_once(
            f"this GPU works slower than it could: its scans take the "
            f"back end {taken!r}, since {reason}"
        )


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def resolve_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    limit: str = "",
    numba_limit: str = "",
) -> str:
    """Turn a wished-for back end into one that can run.

    Args:
        name: "auto" or one of `BACKENDS`.
        device: Where the tensors are.
        dtype: The type in which the scan computes, float32 or float64.
        limit: Why only "reference" and "chunked" serve this call; empty if all do.
        numba_limit: Why Numba in particular doesn't; empty if it does.

    Returns:
        The name of a back end that can run this call.

    Raises:
        ConfigError: The name is unknown.
        BackendUnavailableError: The named back end can't run here.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(
            describe(
                "unknown back end",
                expected="one of " + ", ".join(("auto", *BACKENDS)),
                found=repr(name),
            )
        )
    if name in ("reference", "chunked"):
        return name
    reasons = {
        "cuda": _why_not_cuda(device, dtype) or limit,
        "numba": _why_not_numba(device, dtype) or limit or numba_limit,
    }
    if name == "auto":
        return _automatic(reasons)
    if reasons[name]:
        raise BackendUnavailableError(
            describe(
                f"the {name} back end can't run this: {reasons[name]}",
                remedy='Use backend="auto" or backend="chunked".',
            )
        )
    return name


def _automatic(reasons: dict[str, str]) -> str:
    """The fastest back end with no reason against it; never the emulated one."""
    for name, reason in reasons.items():
        if not reason and not (name == "cuda" and cuda_is_emulated):
            return name
    return "chunked"


def _why_not_cuda(device: torch.device, dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return f"it computes in float32, and these tensors are {dtype}"
    return why_not_on(device)


def why_not_on(device: torch.device) -> str:
    """Say why the CUDA kernels can't run on a device's tensors; empty if they can."""
    if device.type != "cuda" and not cuda_is_emulated:
        return f"it needs tensors on a GPU, and these are on {device.type}"
    status = _constant_cuda_status()
    return "" if status == "available" else status


@constant_for_compilers
def _constant_cuda_status() -> str:
    return cuda_status()


def _why_not_numba(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"it needs CPU tensors, and these are on {device.type}"
    if dtype != torch.float32:
        return f"it computes in float32, and these tensors are {dtype}"
    if not _numba_is_available():
        return _numba_status()
    return ""
