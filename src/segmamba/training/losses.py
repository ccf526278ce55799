"""Losses between logits and label maps, for exclusive classes and for regions.

Labels come in as the data set's own integers and are compared on the device, output by
output, so no one-hot tensor is ever made. Everything is computed in float32 (float64
stays float64) whatever the autocast type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class _Sums(NamedTuple):
    """What overlaps and cross-entropy need of a batch, differentiable."""

    shared: Tensor
    """(B, outputs): probabilities summed over each output's voxels."""
    mass: Tensor
    """(B, outputs): probabilities summed over the annotated voxels."""
    entropy: Tensor
    """(B,): cross-entropy summed over the annotated voxels (and regions)."""


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
            regions = self.scheme.is_region_based
            sums = _Sums(*_SumOverVoxels.apply(wide, regions, *targets))
            terms = [
                self._term(term, wide, sums, targets) for term in _TERMS[self.name]
            ]
            return torch.stack(terms).sum()

    def _term(self, term: str, logits: Tensor, sums: _Sums, targets: Targets) -> Tensor:
        regions = self.scheme.is_region_based
        if term in ("ce", "focal"):
            total = sums.entropy.sum()
            if term == "focal":
                total = _focal(logits, targets, regions)
            return total / (_count(targets) * (len(targets.masks) if regions else 1))
        weights = (0.5, 0.5)
        if term == "tversky":
            weights = (TVERSKY_FALSE_POSITIVE, TVERSKY_FALSE_NEGATIVE)
        first = 0 if regions else 1
        return 1 - _overlap(sums, targets, weights, first, self.batch_dice)


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
        masks = [_is_in(labels, values) for values in scheme.regions.values()]
        kept = masks if valid is None else [mask & valid for mask in masks]
        return Targets(kept, valid)
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


class _SumOverVoxels(torch.autograd.Function):
    """Give `_Sums`, with a gradient in closed form.

    Recording every step instead would keep several copies of the logits and pass
    over each of them twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        regions: bool,
        masks: list[Tensor],
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum; logits (B, outputs, D, H, W), masks and valid as in `Targets`."""
        if regions:
            probability = logits.sigmoid()
            entropy = _kept(F.softplus(logits), valid).flatten(1).sum(1)
            signed = logits
        else:
            signed = F.log_softmax(logits, 1)
            probability = signed.exp()
            entropy = logits.new_zeros(len(logits))
        shared = torch.empty_like(logits[:, :, 0, 0, 0])
        for k, mask in enumerate(masks):
            # A product with numbers: on CPUs torch.where is several times slower.
            weight = mask.to(logits.dtype)
            shared[:, k] = (probability[:, k] * weight).flatten(1).sum(1)
            entropy -= weight.mul_(signed[:, k]).flatten(1).sum(1)
        mass = _kept(probability, valid).flatten(2).sum(2)
        ctx.regions, ctx.masks, ctx.valid = regions, masks, valid
        ctx.save_for_backward(probability)
        return shared, mass, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Chain the gradients of the three sums to the logits."""
        (probability,) = ctx.saved_tensors
        shared, mass, entropy = (g[..., None, None, None] for g in grads)
        out = torch.empty_like(probability)
        for k, mask in enumerate(ctx.masks):
            slope = mask.to(out.dtype).mul_(shared[:, k]).add_(mass[:, k])
            torch.mul(slope, probability[:, k], out=out[:, k])
        # d p_k / d x_j: p_k (1 - p_k) by output for regions, softmax's for classes.
        common = None if ctx.regions else out.sum(1).sub_(entropy)
        for k, mask in enumerate(ctx.masks):
            p, grad = probability[:, k], out[:, k]
            if common is None:
                grad.addcmul_(grad, p, value=-1).addcmul_(p, entropy)
            else:
                grad.addcmul_(p, common, value=-1)
            grad.sub_(mask.to(out.dtype).mul_(entropy))
        return _kept(out, ctx.valid), None, None, None


def _kept(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero (B, outputs, D, H, W) where nothing is annotated."""
    return values if valid is None else values * valid[:, None].to(values.dtype)


def _overlap(
    sums: _Sums,
    targets: Targets,
    weights: tuple[float, float],
    first: int,
    whole_batch: bool,
) -> Tensor:
    """Average the Tversky index over outputs; weights of a half give Dice."""
    volume = torch.stack([mask.flatten(1).sum(1) for mask in targets.masks], 1)
    shared, mass = sums.shared[:, first:], sums.mass[:, first:]
    volume = volume[:, first:].to(mass.dtype)
    if whole_batch:
        shared, mass, volume = shared.sum(0), mass.sum(0), volume.sum(0)
    missed = weights[0] * (mass - shared) + weights[1] * (volume - shared)
    # Written for twice the index, so that SMOOTH means what it does in Dice.
    return ((2 * shared + SMOOTH) / (2 * (shared + missed) + SMOOTH)).mean()


def _count(targets: Targets) -> Tensor | int:
    """Count the annotated voxels, at least one."""
    if targets.valid is None:
        return targets.masks[0].numel()
    return targets.valid.sum().clamp(min=1)


def _focal(logits: Tensor, targets: Targets, regions: bool) -> Tensor:
    """Sum the focal loss over the annotated voxels (and regions)."""
    logs = F.logsigmoid(logits) if regions else F.log_softmax(logits, 1)
    others = F.logsigmoid(-logits) if regions else torch.zeros_like(logs)
    total = logits.new_zeros(())
    # unbind, not indexing: the backward of an index fills a whole tensor with zeros.
    parts = zip(logs.unbind(1), others.unbind(1), targets.masks, strict=True)
    for log, other, mask in parts:
        true = torch.where(mask, log, other)  # a log of 0, a certain truth, costs 0
        values = -true * (1 - true.exp()) ** FOCAL_POWER
        if targets.valid is not None:
            values = values * targets.valid
        total = total + values.sum()
    return total
