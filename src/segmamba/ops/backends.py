"""Which implementations of the operators can run here."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from segmamba.errors import BackendUnavailableError, ConfigError, describe
from segmamba.ops._cuda import nvrtc

BACKENDS = ("reference", "chunked", "numba", "cuda", "triton")

_OLDEST = (3, 3)
"""Oldest Triton that compiles the kernels."""

_FASTEST = {"cpu": "numba", "cuda": "cuda"}
"""The fastest back end of a kind of device, in float32."""

cuda_is_emulated = False
"""Whether the tests' emulator runs the CUDA kernels, on CPU tensors."""

_log = logging.getLogger(__name__)


@functools.cache
def _numba_status() -> str:
    try:
        importlib.import_module("numba")
    except Exception as error:
        return f"numba can't be imported ({type(error).__name__}: {error})"
    return "available"


@torch.compiler.assume_constant_result
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


@functools.cache
def triton_status() -> str:
    """Say whether Triton's kernels can run here.

    Returns:
        "available", or the reason why not. Triton's interpreter, which runs them on
        CPU tensors for tests, counts as available.
    """
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton can't be imported ({type(error).__name__}: {error})"
    if triton_is_interpreted():
        return "available"
    return (
        _why_not_this_triton()
        or _why_not_this_gpu()
        or _why_no_launcher()
        or "available"
    )


def _why_not_this_triton() -> str:
    """Why this version is no good: kernels with tuples came with 3.3."""
    version = str(importlib.import_module("triton").__version__)
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return "" if found >= _OLDEST else f"triton is {version}, and the kernels need 3.3"


def _why_not_this_gpu() -> str:
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU that Triton's kernels run on"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:  # their assembler packs two halves at once, as GPUs do from 8.0 on
        return f"the GPU's compute capability is {major}.{minor}, the kernels need 8.0"
    return ""


def _why_no_launcher() -> str:
    """Why Triton can't build the C code that launches kernels, at the first launch."""
    if sys.platform == "win32":
        return ""  # builds of Triton for Windows bring a compiler
    compilers = (_build_knob("cc"), shutil.which("gcc"), shutil.which("clang"))
    if _build_knob("impl"):
        return ""  # somebody has set another way to build it
    if not any(compilers):
        return (
            "Triton needs a C compiler at its first launch (gcc or clang), none is on "
            "the PATH: install one, e.g. apt install gcc, to make GPUs fast"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not headers.exists():
        return (
            f"Triton needs Python's C headers at its first launch, and {headers} is "
            "missing: install them, e.g. apt install python3-dev, to make GPUs fast"
        )
    return ""


def _build_knob(name: str) -> Any:
    """A setting of Triton's own build (it reads the compiler from CC)."""
    try:
        knobs = importlib.import_module("triton.knobs")
    except ImportError:
        return None  # before 3.4
    return getattr(knobs.build, name, None)


@functools.cache
def triton_is_interpreted() -> bool:
    """Say whether Triton's interpreter is on (Triton reads TRITON_INTERPRET=1)."""
    try:
        knobs = importlib.import_module("triton.knobs")
    except Exception:
        return False  # no Triton, or one before 3.4
    return bool(knobs.runtime.interpret)


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
        "triton": triton_status(),
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
        "triton": _why_not_triton(device, dtype) or limit,
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
    """The fastest back end with no reason against it; never an interpreted one."""
    for name, reason in reasons.items():
        slow = name == "triton" and _triton_interprets()
        if not reason and not slow and not (name == "cuda" and cuda_is_emulated):
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


@torch.compiler.assume_constant_result
def _constant_cuda_status() -> str:
    return cuda_status()


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return f"it computes in float32, and these tensors are {dtype}"
    if _constant_triton_status() != "available":
        return _constant_triton_status()
    if device.type != "cuda" and not _triton_interprets():
        return f"it needs tensors on a GPU, and these are on {device.type}"
    return ""


@torch.compiler.assume_constant_result
def _constant_triton_status() -> str:
    return triton_status()


@torch.compiler.assume_constant_result
def _triton_interprets() -> bool:
    return triton_is_interpreted()


def _why_not_numba(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"it needs CPU tensors, and these are on {device.type}"
    if dtype != torch.float32:
        return f"it computes in float32, and these tensors are {dtype}"
    if not _numba_is_available():
        return _numba_status()
    return ""
