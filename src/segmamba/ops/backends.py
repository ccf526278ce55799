"""Which implementations of the operators can run here."""

from __future__ import annotations

import functools
import importlib

import torch

from segmamba.errors import BackendUnavailableError, ConfigError, describe

BACKENDS = ("reference", "chunked", "numba")


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
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU that Triton's kernels run on"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and (major, minor) < (7, 0):
        return f"the GPU's compute capability is {major}.{minor}, and Triton needs 7.0"
    return "available"


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
    }


def resolve_backend(
    name: str, *, device: torch.device, dtype: torch.dtype, numba_limit: str = ""
) -> str:
    """Turn a wished-for back end into one that can run.

    Args:
        name: "auto" or one of `BACKENDS`.
        device: Where the tensors are.
        dtype: The type in which the scan computes, float32 or float64.
        numba_limit: Why Numba can't serve this very call; empty if it can.

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
    reason = numba_limit or _why_not_numba(device, dtype)
    if name == "auto":
        return "chunked" if reason else "numba"
    if reason:
        raise BackendUnavailableError(
            describe(
                f"the numba back end can't run this: {reason}",
                remedy='Use backend="auto" or backend="chunked".',
            )
        )
    return name


def _why_not_numba(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"it needs CPU tensors, and these are on {device.type}"
    if dtype != torch.float32:
        return f"it computes in float32, and these tensors are {dtype}"
    if not _numba_is_available():
        return _numba_status()
    return ""
