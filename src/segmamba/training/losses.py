"""Losses between logits and label maps, for exclusive classes and for regions.

Labels come in as the data set's own integers and are compared on the device, output by
output, so no one-hot tensor is ever made. Everything is computed in float32 (float64
stays float64) whatever the autocast type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, GeometryError, describe

SMOOTH = 1e-5
"""Added above and below the fraction line of overlaps (nnU-Net's default)."""
FOCAL_POWER = 2.0
"""Focusing power of the focal loss (Lin et al. 2017, arXiv 1708.02002)."""
TVERSKY_FALSE_POSITIVE = 0.3
"""Weight of false positives in the Tversky index (Salehi et al. 2017)."""
TVERSKY_FALSE_NEGATIVE = 0.7
"""Weight of false negatives in the Tversky index (Salehi et al. 2017)."""

_TERMS: dict[str, tuple[str, ...]] = {
    "dice_ce": ("dice", "ce"),
    "dice": ("dice",),
    "ce": ("ce",),
    "dice_focal": ("dice", "focal"),
    "tversky_ce": ("tversky", "ce"),
}


class Targets(NamedTuple):
    """A batch's labels, seen from the network's outputs."""

    masks: list[Tensor]
    """For each output the voxels (B, D, H, W) that belong to it, bool."""
    valid: Tensor | None
    """Annotated voxels (B, D, H, W), bool; None where all are."""


class _Scores(NamedTuple):
    """One output's logits in the forms that the terms need; all (B, D, H, W)."""

    probability: Tensor
    log_true: Tensor
    """Log-probability of belonging."""
    log_false: Tensor | None
    """Log-probability of not belonging; None for exclusive classes."""


@dataclass(frozen=True)
class SegmentationLoss:
    """A loss that is called with logits and labels; see `build_loss`."""

    name: str
    """Name, as `build_loss` takes it."""
    scheme: LabelScheme
    """Meaning of the labels."""
    weights: tuple[float, ...] | None = None
    """Weight of each resolution; None for 1, 1/2, 1/4, ..."""
    batch_dice: bool = True
    """Overlap over the whole batch (True) or averaged over its samples."""

    def __call__(self, outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            outputs: Logits (B, outputs, D, H, W), or a list of them with the full
                resolution first (deep supervision).
            labels: The data set's integers (B, D, H, W), at full resolution.

        Returns:
            A scalar of dtype float32, or float64 for such logits.

        Raises:
            GeometryError: Shapes don't fit the labels or the scheme.
        """
        if isinstance(outputs, Tensor):
            return self._single(outputs, labels)
        weights = self._weights(len(outputs))
        losses = [
            weight * self._single(logits, resize_labels(labels, logits.shape[2:]))
            for weight, logits in zip(weights, outputs, strict=True)
            if weight
        ]
        return torch.stack(losses).sum()

    def _weights(self, count: int) -> list[float]:
        raw = self.weights or tuple(0.5**level for level in range(count))
        if len(raw) != count or sum(raw) <= 0:
            raise ConfigError(
                describe(
                    "deep supervision weights don't fit the network",
                    expected=f"{count} weights with a positive sum",
                    found=raw,
                )
            )
        return [weight / sum(raw) for weight in raw]

    def _single(self, logits: Tensor, labels: Tensor) -> Tensor:
        _check_shapes(logits, labels, self.scheme)
        with torch.autocast(logits.device.type, enabled=False):
            wide = logits if logits.dtype == torch.float64 else logits.float()
            targets = encode_targets(labels, self.scheme)
            scores = _scores(wide, self.scheme.is_region_based)
            terms = [self._term(term, scores, targets) for term in _TERMS[self.name]]
            return torch.stack(terms).sum()

    def _term(self, term: str, scores: list[_Scores], targets: Targets) -> Tensor:
        if term == "ce":
            return _voxel_mean(scores, targets, _cross_entropy)
        if term == "focal":
            return _voxel_mean(scores, targets, _focal)
        skipped = 0 if self.scheme.is_region_based else 1
        halves = (0.5, 0.5)
        if term == "tversky":
            halves = (TVERSKY_FALSE_POSITIVE, TVERSKY_FALSE_NEGATIVE)
        chosen = Targets(targets.masks[skipped:], targets.valid)
        return 1 - _overlap(scores[skipped:], chosen, halves, self.batch_dice)


def build_loss(
    name: str,
    scheme: LabelScheme,
    deep_supervision: bool | Sequence[float] = True,
    *,
    batch_dice: bool = True,
) -> SegmentationLoss:
    """Build a loss by name.

    Args:
        name: "dice_ce" (soft Dice plus cross-entropy, nnU-Net's), "ce" (the paper's),
            "dice", "dice_focal" or "tversky_ce". Classes: softmax, overlaps without
            the background. Regions: sigmoid, and cross-entropy means the binary one,
            averaged over regions.
        scheme: Meaning of the labels; its ignore label takes no part.
        deep_supervision: Weights of the resolutions, full first; they are scaled to a
            sum of one. True or False takes 1, 1/2, 1/4, ... wherever the network gives
            a list.
        batch_dice: Overlaps over the whole batch, or averaged over its samples.

    Returns:
        A callable of (outputs, labels).

    Raises:
        ConfigError: No such loss.
    """
    if name not in _TERMS:
        raise ConfigError(
            describe("unknown loss", expected="one of " + ", ".join(_TERMS), found=name)
        )
    weights = None
    if not isinstance(deep_supervision, bool):
        weights = tuple(float(weight) for weight in deep_supervision)
    return SegmentationLoss(name, scheme, weights, batch_dice)


def encode_targets(labels: Tensor, scheme: LabelScheme) -> Targets:
    """Say for each output which voxels belong to it (`LabelScheme.encode` on a device).

    Args:
        labels: The data set's integers, any shape.
        scheme: Their meaning; integers it doesn't know count as background.

    Returns:
        A mask of the labels' shape for each output, and the annotated voxels.
    """
    ignored = None if scheme.ignore_label is None else labels == scheme.ignore_label
    valid = None if ignored is None else ~ignored
    if scheme.is_region_based:
        return Targets([_is_in(labels, v) for v in scheme.regions.values()], valid)
    # Background is what no other class claims; it need not be the smallest integer.
    values = scheme.class_values
    masks = [labels == value for value in values]
    claimed = torch.zeros_like(labels, dtype=torch.bool)
    for value, mask in zip(values, masks, strict=True):
        if value != 0:
            claimed |= mask
    if ignored is not None:
        claimed |= ignored
    masks[0 if 0 not in values else values.index(0)] = ~claimed
    return Targets(masks, valid)


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Take the nearest label at each voxel of a coarser grid over the same box.

    Args:
        labels: (B, D, H, W).
        size: Voxels of the new grid along D, H, W.

    Returns:
        (B, *size), the input itself where the size is its own.
    """
    for axis, length in enumerate(size, start=1):
        old = labels.shape[axis]
        if old != length:
            steps = torch.arange(length, device=labels.device)
            index = (2 * steps + 1) * old // (2 * length)
            labels = labels.index_select(axis, index)
    return labels


def _check_shapes(logits: Tensor, labels: Tensor, scheme: LabelScheme) -> None:
    expected = (labels.shape[0], scheme.num_outputs, *labels.shape[1:])
    if tuple(logits.shape) != expected:
        raise GeometryError(
            describe(
                "logits don't fit the labels",
                expected=expected,
                found=tuple(logits.shape),
            )
        )


def _is_in(labels: Tensor, values: Sequence[int]) -> Tensor:
    mask = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def _scores(logits: Tensor, regions: bool) -> list[_Scores]:
    if regions:
        return [
            _Scores(x.sigmoid(), F.logsigmoid(x), F.logsigmoid(-x))
            for x in logits.unbind(1)
        ]
    logs = F.log_softmax(logits, 1)
    # unbind, not indexing: the backward of an index fills a whole tensor with zeros.
    pairs = zip(logs.exp().unbind(1), logs.unbind(1), strict=True)
    return [_Scores(probability, log, None) for probability, log in pairs]


def _overlap(
    scores: list[_Scores],
    targets: Targets,
    weights: tuple[float, float],
    whole_batch: bool,
) -> Tensor:
    """Average the Tversky index over outputs; weights of a half give Dice."""
    axes = (0, 1, 2, 3) if whole_batch else (1, 2, 3)
    values = []
    for score, mask in zip(scores, targets.masks, strict=True):
        probability = score.probability
        if targets.valid is not None:
            probability = probability * targets.valid
            mask = mask & targets.valid
        shared = (probability * mask).sum(axes)
        false_positive = probability.sum(axes) - shared
        false_negative = mask.sum(axes) - shared
        missed = weights[0] * false_positive + weights[1] * false_negative
        # Written for twice the index, so that SMOOTH means what it does in Dice.
        values.append((2 * shared + SMOOTH) / (2 * (shared + missed) + SMOOTH))
    return torch.stack(values).mean()


def _voxel_mean(
    scores: list[_Scores],
    targets: Targets,
    loss: Callable[[_Scores, Tensor], Tensor],
) -> Tensor:
    """Average over annotated voxels; over regions too, but summed over classes."""
    total = scores[0].probability.new_zeros(())
    for score, mask in zip(scores, targets.masks, strict=True):
        values = loss(score, mask)
        if targets.valid is not None:
            values = values * targets.valid
        total = total + values.sum()
    count = targets.masks[0].numel()
    voxels = count if targets.valid is None else targets.valid.sum().clamp(min=1)
    outputs = 1 if scores[0].log_false is None else len(scores)
    return total / (voxels * outputs)


def _cross_entropy(score: _Scores, mask: Tensor) -> Tensor:
    if score.log_false is None:
        return -score.log_true * mask
    return -torch.where(mask, score.log_true, score.log_false)


def _focal(score: _Scores, mask: Tensor) -> Tensor:
    missing = 1 - score.probability
    positive = -score.log_true * missing**FOCAL_POWER
    if score.log_false is None:
        return positive * mask
    negative = -score.log_false * score.probability**FOCAL_POWER
    return torch.where(mask, positive, negative)
