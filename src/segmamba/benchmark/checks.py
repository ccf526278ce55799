"""How far results are from the truth, with memory poisoned beforehand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor, nn

LIMITS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative error of a layer or scan, gradients included, by precision."""

NETWORK_LIMITS = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}
"""The same for a whole network's logits: about fifty roundings in a row."""

GRADIENT_LIMITS = {"fp32": 1e-2, "bf16": 3e-1, "fp16": 3e-1}
"""The same for all gradients of a network as one vector. Its check is done on a small
volume, where instance norm over eight voxels magnifies every rounding; hence it is
always done in fp32 too."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Give ||found - expected|| / ||expected||, in float64.

    Args:
        found: Any type and device.
        expected: The truth, of the same shape.

    Returns:
        The error; infinite where `found` isn't finite or the shapes differ.
    """
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    truth = expected.detach().cpu().double()
    difference = torch.linalg.vector_norm(found.detach().cpu().double() - truth)
    return float(difference / torch.linalg.vector_norm(truth).clamp(min=1e-300))


def relative_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Give the relative error of each tensor by its name."""
    return {key: relative_error(found[key], truth) for key, truth in expected.items()}


def different_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> int:
    """Count the tensors whose bits differ between two runs; NaN counts as different.

    Args:
        first: Results of a run.
        second: Those of another.

    Returns:
        How many differ.
    """
    pairs = zip(first, second, strict=True)
    return sum(not torch.equal(a, b) for a, b in pairs)


def float64_copy(
    module: nn.Module, backend: str, device: torch.device | str = "cpu"
) -> nn.Module:
    """Copy a module in float64, its scans done by a named back end.

    Args:
        module: Any module; it stays as it is.
        backend: "reference" or "chunked", both plain PyTorch.
        device: Where the copy computes.

    Returns:
        The copy.
    """
    return set_backend(copy.deepcopy(module).to(device).double(), backend)


def set_backend(module: nn.Module, backend: str) -> nn.Module:
    """Choose the back end of every scan in a module.

    Args:
        module: Any module, changed in place.
        backend: A name that `segmamba.ops` knows.

    Returns:
        The same module.
    """
    for part in module.modules():
        if isinstance(getattr(part, "backend", None), str):
            part.__dict__["backend"] = (
                backend  # a plain attribute, whatever the types say
            )
    return module


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that torch.empty and its kin hand out with NaN.

    A kernel that leaves part of its output unwritten then can't pass a check.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # Only the filling is wanted; operations without a deterministic form warn.
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
