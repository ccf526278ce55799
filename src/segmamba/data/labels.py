"""What the integers of a label map mean, and what the network's outputs stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from segmamba.errors import ConfigError, describe
from segmamba.types import Array

IGNORED = -1
"""Value of ignored voxels in an encoded target."""


@dataclass(frozen=True)
class LabelScheme:
    """Labels of a data set: exclusive classes, or overlapping regions."""

    labels: dict[str, int]
    """Name to integer; has a background of 0; without the ignore label."""
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name to the integers it unites; empty where labels are exclusive classes."""
    regions_order: tuple[int, ...] = ()
    """The integer written for each region, in the order in which later ones overwrite
    earlier ones (nnU-Net's `regions_class_order`)."""
    ignore_label: int | None = None
    """Integer of voxels without annotation."""

    def __post_init__(self) -> None:
        if 0 not in self.labels.values():
            raise ConfigError(
                describe(
                    "labels have no background",
                    expected="a label of value 0",
                    found=self.labels,
                )
            )
        limits = np.iinfo(np.int16)
        named = self._named
        if named[0] < limits.min or named[-1] > limits.max:
            raise ConfigError(
                describe(
                    "a label is too large",
                    expected=f"integers from {limits.min} to {limits.max}",
                    found=named,
                )
            )
        if self.ignore_label is not None and self.ignore_label in self.labels.values():
            raise ConfigError(
                describe(
                    "the ignore label is also a class",
                    expected="an integer of its own",
                    found=self.ignore_label,
                )
            )
        if len(self.regions) != len(self.regions_order):
            raise ConfigError(
                describe(
                    "regions and their order differ in number",
                    expected=f"{len(self.regions)} integers",
                    found=self.regions_order,
                    remedy="Give regions_class_order one integer a region.",
                )
            )

    @property
    def is_region_based(self) -> bool:
        """Whether outputs are overlapping regions (sigmoid), not classes (softmax)."""
        return bool(self.regions)

    @property
    def class_values(self) -> tuple[int, ...]:
        """Integers of the exclusive classes in ascending order, background first."""
        return tuple(sorted(set(self.labels.values())))

    @property
    def num_outputs(self) -> int:
        """Channels of the logits: regions, or classes with the background."""
        return len(self.regions) if self.regions else len(self.class_values)

    @property
    def evaluated(self) -> dict[str, tuple[int, ...]]:
        """Foreground labels and regions by name, as the integers that they unite."""
        if self.regions:
            return dict(self.regions)
        return {name: (value,) for name, value in self.labels.items() if value != 0}

    @property
    def known_values(self) -> tuple[int, ...]:
        """Every integer that a label map may hold."""
        ignored = () if self.ignore_label is None else (self.ignore_label,)
        united = {value for group in self.regions.values() for value in group}
        return tuple(sorted({*self.labels.values(), *united, *ignored}))

    @property
    def _named(self) -> tuple[int, ...]:
        """Those and the integers written for regions, which may be others."""
        return tuple(sorted({*self.known_values, *self.regions_order}))

    def encode(self, label_map: Array) -> Array:
        """Turn a label map into the network's target.

        Args:
            label_map: Integers, any shape.

        Returns:
            Classes: int16 class indices of the same shape. Regions: int8 of shape
            (regions, ...), 0 or 1. Ignored voxels are `IGNORED` in both.
        """
        ignored = None if self.ignore_label is None else label_map == self.ignore_label
        if self.regions:
            groups = [np.isin(label_map, group) for group in self.regions.values()]
            target = np.stack(groups).astype(np.int8)
            if ignored is not None:
                target[:, ignored] = IGNORED
            return target
        target = np.zeros(label_map.shape, np.int16)
        for index, value in enumerate(self.class_values):
            target[label_map == value] = index
        if ignored is not None:
            target[ignored] = IGNORED
        return target

    def decode(self, logits: Array) -> Array:
        """Turn logits into a label map.

        Args:
            logits: (outputs, ...), before softmax or sigmoid.

        Returns:
            Integers of the data set, of shape (...): uint8, or int16 if need be.
        """
        low, high = self._named[0], self._named[-1]
        dtype = np.uint8 if low >= 0 and high < 256 else np.int16
        if not self.regions:
            values = np.asarray(self.class_values, dtype)
            return values[np.argmax(logits, axis=0)]
        label_map = np.zeros(logits.shape[1:], dtype)
        for channel, value in zip(logits, self.regions_order, strict=True):
            label_map[channel > 0] = value
        return label_map
