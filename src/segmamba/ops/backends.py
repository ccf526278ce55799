"""Which implementations of the operators can run here."""

from __future__ import annotations

import functools
import importlib

import torch

from segmamba.errors import BackendUnavailableError, ConfigError, describe

BACKENDS = ("reference", "chunked", "numba", "triton")


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
        "triton": triton_status(),
    }


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
        if not reason and not (name == "triton" and _triton_interprets()):
            return name
    return "chunked"


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
