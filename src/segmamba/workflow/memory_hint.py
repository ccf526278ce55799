"""What to lower, and by how much, where memory is too small for a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from segmamba.config import AnyNetworkConfig, NetworkConfig
from segmamba.data.memory import USABLE_SHARE, training_memory_mib
from segmamba.data.networks import patch_problems
from segmamba.data.planning import total_strides
from segmamba.types import Size3


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of training, as far as it decides what memory is needed."""

    network: AnyNetworkConfig
    patch_size: Size3
    batch_size: int
    device: str
    """cpu or cuda."""

    @property
    def mib(self) -> float:
        """What it should take, by the plan's estimate."""
        return training_memory_mib(
            self.network, self.patch_size, self.batch_size, self.device
        )


def memory_hint(
    step: Step, available_mib: float, plan: Path, batch_place: str = ""
) -> str:
    """Say what a step should take, and which number to change to which.

    Args:
        step: The one that didn't fit.
        available_mib: What the device has; by what didn't fit it may be less.
        plan: The file in which the numbers are.
        batch_place: Where else the batch size is set, if so.

    Returns:
        Sentences for an error.
    """
    patch = _sides(step.patch_size)
    took = (
        f"A step with patches of {patch} voxels and a batch of {step.batch_size} "
        f"should take {step.mib:.0f} MiB."
    )
    room = USABLE_SHARE * min(available_mib, step.mib)
    ways = list(_ways(step, room, plan, batch_place))
    ways.append("close other programs")
    text = ", or ".join(ways)
    return f"{took} {text[0].upper()}{text[1:]}."


def _ways(step: Step, room_mib: float, plan: Path, batch_place: str) -> Iterator[str]:
    smaller = smaller_batch(step, room_mib)
    if smaller is not None:
        place = batch_place or str(plan)
        change = f"lower batch_size from {step.batch_size} to {smaller.batch_size}"
        yield f"{change} in {place} (then {smaller.mib:.0f} MiB)"
    if smaller is None or smaller.mib > room_mib:
        lower = smaller_patch(smaller or step, room_mib)
        if lower is not None:
            change = f"{_sides(step.patch_size)} to {_sides(lower.patch_size)}"
            yield f"lower patch_size from {change} in {plan} (then {lower.mib:.0f} MiB)"
    if _can_recompute(step.network) and not step.network.checkpointing:
        network = dataclasses.replace(step.network, checkpointing=True)
        less = dataclasses.replace(step, network=network)
        if less.mib < step.mib:
            change = "set network.checkpointing to true"
            yield f"{change} in {plan} (then {less.mib:.0f} MiB)"


def smaller_batch(step: Step, room_mib: float) -> Step | None:
    """Give the largest smaller batch that fits, else a batch of one; None for none."""
    smaller = None
    for batch_size in range(step.batch_size - 1, 0, -1):
        smaller = dataclasses.replace(step, batch_size=batch_size)
        if smaller.mib <= room_mib:
            break
    return smaller


def smaller_patch(step: Step, room_mib: float) -> Step | None:
    """Shorten the longest sides until a step fits.

    Args:
        step: One that doesn't fit.
        room_mib: What it may take.

    Returns:
        The largest step that fits, or the smallest that the network can see; None if
        its patch can't be smaller.
    """
    strides = step.network.strides or ()
    unit = total_strides(strides) if strides else (32, 32, 32)
    found = None
    sides = list(step.patch_size)
    while True:
        axis = max(range(3), key=lambda axis: sides[axis] - unit[axis])
        sides[axis] = (sides[axis] - 1) // unit[axis] * unit[axis]
        patch = (sides[0], sides[1], sides[2])
        if any(patch_problems(step.network, strides, patch)) or min(patch) < 1:
            return found
        found = dataclasses.replace(step, patch_size=patch)
        if found.mib <= room_mib:
            return found


def _can_recompute(network: AnyNetworkConfig) -> bool:
    """Tell whether a network knows the setting `checkpointing`."""
    return isinstance(network, NetworkConfig) or network.name.startswith("swinunetr")


def _sides(size: Size3) -> str:
    return " x ".join(map(str, size))
