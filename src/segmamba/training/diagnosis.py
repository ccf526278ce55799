"""Why training stopped, in words: not-a-number, memory, files, interruption."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmamba.devices import describe_out_of_memory, is_out_of_memory
from segmamba.errors import TrainingError, describe

MEMORY_HINT = "Use a smaller patch or batch, or activation checkpointing."
"""What to do about a full memory if the caller knows nothing better."""


def explain_not_finite(
    network: nn.Module,
    batch: Any,
    *,
    step: int,
    loss: float,
    norm: float,
    learning_rate: float,
    precision: str,
    updated: bool = False,
) -> str:
    """Say what was not finite, where it came first, and what can be done.

    Args:
        network: With the gradients of the failed step.
        batch: The failed batch: `image`, `label`, and `case_ids` if it has them.
        step: The step that failed, counted from 0.
        loss: Its loss.
        norm: The norm of its gradient; infinite too where finite numbers are too large.
        learning_rate: Its learning rate.
        precision: Its autocast type.
        updated: Whether the step has changed the weights, which then tell nothing.

    Returns:
        One text in the house's order.
    """
    bad_image = _bad_channels(batch.image)
    weight = None if updated else _first_bad(network, gradients=False)
    gradient = _first_bad(network, gradients=True)
    cases = ", ".join(map(str, getattr(batch, "case_ids", ()) or ()))
    found = [f"a loss of {loss:g} and a gradient norm of {norm:g} at step {step}"]
    found += [f"cases {cases}"] if cases else []
    found += [f"the image is {bad_image or 'finite'}"]
    found += [f"the weight {weight} is not finite"] if weight else []
    found += [f"the first bad gradient is that of {gradient}"] if gradient else []
    found += [f"learning rate {learning_rate:.3g}", f"precision {precision}"]
    return describe(
        "training met a not-a-number",
        expected="a finite loss and finite gradients",
        found="; ".join(found),
        remedy=_remedy(bool(bad_image), precision)
        + " The last saved checkpoint is intact.",
    )


def require_finite(tensors: Iterable[Tensor], step: int) -> None:
    """Refuse weights that are not finite, before they are saved.

    Args:
        tensors: All of them, and their averages.
        step: Steps done.

    Raises:
        TrainingError: One is not finite.
    """
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not math.isfinite(float(nn.utils.get_total_norm(numbers))):
        raise TrainingError(
            describe(
                "weights are not finite",
                found=f"not-a-number or infinity after {step} steps",
                remedy="Lower the learning rate. The last saved checkpoint is intact.",
            )
        )


def is_finite(batch: Any) -> bool:
    """Tell whether a batch's image holds finite numbers only."""
    return not _bad_channels(batch.image)


def explain_interruption(signal: object, step: int, file: Path) -> str:
    """Say that training was stopped from outside and how to go on."""
    return describe(
        f"training was interrupted ({signal})",
        found=f"step {step}, which is saved",
        file=file,
        remedy="Go on with --resume.",
    )


@contextlib.contextmanager
def explained(folder: Path, memory_hint: str = "") -> Iterator[None]:
    """Turn a full memory or a file's error inside into a `TrainingError` of ours.

    Args:
        folder: Named where the error names no file.
        memory_hint: What training should take and what to lower if that is too much.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            describe(
                "memory is too small for this training",
                found=describe_out_of_memory(error),
                remedy=memory_hint or MEMORY_HINT,
            )
        ) from error
    except OSError as error:
        raise TrainingError(
            describe(
                "a file could not be read or written while training",
                found=error,
                file=error.filename or folder,
                remedy="What was saved before is intact: mend it, then use --resume.",
            )
        ) from error


def explain_misfit(file: Path, found: str) -> str:
    """Say that a readable checkpoint is none of this training's."""
    return describe(
        "a checkpoint does not fit this training",
        expected="the state of a run with this network and optimiser",
        found=" ".join(found.split()),
        file=file,
        remedy="Train into another folder.",
    )


def _remedy(bad_image: bool, precision: str) -> str:
    if bad_image:
        return "Look at these cases: `segmamba check` finds such voxels."
    if precision == "fp16":
        return "Train with precision bf16 or fp32, or a lower learning rate."
    return "Lower the learning rate, lengthen the warm-up or clip gradients more."


def _bad_channels(image: Tensor) -> str:
    bad = ~torch.isfinite(image)
    if not bool(bad.any()):
        return ""
    places = bad.flatten(2).any(2).nonzero().tolist()
    named = ", ".join(f"sample {b} channel {c}" for b, c in places[:4])
    return f"not finite in {named} ({int(bad.sum())} voxels)"


def _first_bad(network: nn.Module, *, gradients: bool) -> str | None:
    for name, parameter in network.named_parameters():
        tensor = parameter.grad if gradients else parameter
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return name
    return None
