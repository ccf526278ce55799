"""How sure a prediction is: entropy, mutual information, volumes, expected Dice.

Samples are the answers of each fold, and of each snapshot of its weights, to each
mirroring. They are summed up window by window and never held together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segmamba.data.geometry import Geometry
from segmamba.data.labels import LabelScheme
from segmamba.inference.sliding_window import combinations
from segmamba.types import Array, FloatArray, JsonDict

Piece = tuple[slice, slice, Tensor]
"""Ranges along D and H of the crop, and (channels, length, rows, W)."""

MAPS = ("entropy", "mutual_information", "confidence")
"""Maps that are made, in the order of `Uncertainty`'s fields."""


@dataclass(frozen=True)
class Uncertainty:
    """How sure a prediction is, voxel by voxel, by structure and as a whole."""

    entropy: Array
    """float16 (I, J, K), nats: of the samples' mean probabilities; with regions, the
    sum of theirs."""
    mutual_information: Array
    """float16 (I, J, K), nats: entropy less the samples' mean entropy, what they
    disagree in."""
    confidence: Array
    """float16 (I, J, K): mean probability of the network's label; with regions, of the
    least sure decision."""
    samples: int
    """Folds and snapshots, times mirrorings."""
    structures: dict[str, JsonDict]
    """Label or region to "volume_ml" as the network gives it, "sample_mean_ml",
    "sample_sd_ml", "sample_min_ml" and "sample_max_ml" of the samples' volumes,
    "expected_dice" and "mean_entropy"; None where it isn't predicted at all."""
    mean_entropy: float | None
    """Over the voxels of all structures; None where there are none."""

    @property
    def expected_dice(self) -> float | None:
        """Mean of the structures' expected Dice: the case's score; None for none."""
        found = [row["expected_dice"] for row in self.structures.values()]
        found = [value for value in found if value is not None]
        return float(np.mean(found)) if found else None

    def describe(self) -> JsonDict:
        """Give all but the maps, for JSON."""
        return {
            "samples": self.samples,
            "expected_dice": self.expected_dice,
            "mean_entropy": self.mean_entropy,
            "structures": self.structures,
        }


class SampledNetwork:
    """Networks and mirrorings as one network, which also tells how its samples differ.

    From (B, C, D, H, W) it gives (B, 2·K + 1, D, H, W): the mean logits of the folds,
    as without it, the mean probabilities of all samples, and their mean entropy.

    Args:
        networks: The folds: (B, C, D, H, W) to logits (B, K, D, H, W), or to a list
            that starts with them.
        snapshots: Networks that are samples, but don't count for the label map.
        mirror_axes: Axes of (D, H, W) to mirror, in all combinations.
        scheme: What the logits stand for.
    """

    def __init__(
        self,
        networks: Sequence[Callable[[Tensor], Any]],
        snapshots: Sequence[Callable[[Tensor], Any]],
        mirror_axes: Sequence[int],
        scheme: LabelScheme,
    ) -> None:
        self._networks, self._snapshots = list(networks), list(snapshots)
        self._flips = combinations(mirror_axes)
        self._regions = scheme.is_region_based
        self.samples = len(self._flips) * (len(self._networks) + len(self._snapshots))
        self._voxels = torch.zeros(self.samples, scheme.num_outputs)
        self._weights: Tensor | None = None

    @property
    def voxels(self) -> FloatArray:
        """(samples, K): voxels of each output in each sample's own label map."""
        return self._voxels.cpu().numpy()

    def expect(self, weights: Tensor) -> None:
        """Hear the weights (B, D, H, W) of the windows that come next."""
        self._weights = weights
        self._voxels = self._voxels.to(weights.device, _widest(weights.device))

    def __call__(self, batch: Tensor) -> Tensor:
        """Give mean logits, mean probabilities and mean entropy of a batch."""
        logits = shares = doubt = None
        for number, (answer, is_fold) in enumerate(self._answers(batch)):
            share = probabilities(answer, self._regions, 1)
            inner = entropy(share, self._regions, 1)
            if is_fold:
                logits = answer.clone() if logits is None else logits.add_(answer)
            shares = share if shares is None else shares.add_(share)
            doubt = inner if doubt is None else doubt.add_(inner)
            self._count(number, answer)
        assert logits is not None
        assert shares is not None
        assert doubt is not None
        folds = len(self._flips) * len(self._networks)
        parts = (logits / folds, shares / self.samples, doubt / self.samples)
        return torch.cat(parts, dim=1)

    def _answers(self, batch: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Give each sample's logits in float32, and whether it is a fold's."""
        for flip in self._flips:
            mirrored = batch.flip(flip) if flip else batch
            for index, network in enumerate([*self._networks, *self._snapshots]):
                answer = network(mirrored)
                logits = answer[0] if isinstance(answer, (list, tuple)) else answer
                logits = logits.flip(flip) if flip else logits
                yield logits.float(), index < len(self._networks)

    def _count(self, sample: int, logits: Tensor) -> None:
        if self._weights is None:
            return
        if self._regions:
            on = (logits > 0) * self._weights[:, None]
            self._voxels[sample] += on.sum(dim=(0, 2, 3, 4), dtype=self._voxels.dtype)
            return
        chosen = logits.argmax(dim=1)
        for output in range(logits.shape[1]):
            mask = (chosen == output) * self._weights
            self._voxels[sample, output] += mask.sum(dtype=self._voxels.dtype)


class Doubt:
    """Gathers uncertainty while a label map is restored, a piece at a time.

    Args:
        geometry: What `preprocess_image` gave for the image.
        scheme: What the outputs stand for.
        sampled: What gave the pieces; its windows are all seen by then.
        voxel_ml: Volumes of a voxel of the scan, and of the network's grid.
    """

    def __init__(
        self,
        geometry: Geometry,
        scheme: LabelScheme,
        sampled: SampledNetwork,
        voxel_ml: tuple[float, float],
    ) -> None:
        self._scheme, self._sampled, self._voxel_ml = scheme, sampled, voxel_ml
        shape = geometry.original_shape
        self._maps = [np.zeros(shape, np.float16), np.zeros(shape, np.float16)]
        self._maps.append(np.ones(shape, np.float16))  # sure of what was cropped away
        self._inner = [geometry.orient(a)[geometry.crop_slices] for a in self._maps]
        # Voxels, and sums of probability inside and everywhere, and of entropy.
        self._sums = np.zeros((4, scheme.num_outputs))
        self._whole = np.zeros(2)  # voxels of any structure, and their entropy

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Take in pieces of a `SampledNetwork`, and let their logits pass."""
        for part, rows, piece in pieces:
            self._add(part, rows, piece)
            yield part, rows, piece[: self._scheme.num_outputs]

    def result(self) -> Uncertainty:
        """Give the uncertainty, once all pieces have passed."""
        voxels, doubt = self._whole
        names = self._outputs()
        return Uncertainty(
            *self._maps,
            samples=self._sampled.samples,
            structures={n: self._structure(index) for n, index in names.items()},
            mean_entropy=float(doubt / voxels) if voxels else None,
        )

    def _outputs(self) -> dict[str, int]:
        """Name the outputs that aren't background."""
        if self._scheme.is_region_based:
            return {name: index for index, name in enumerate(self._scheme.regions)}
        values = self._scheme.class_values
        evaluated = self._scheme.evaluated.items()
        return {name: values.index(group[0]) for name, group in evaluated}

    def _add(self, part: slice, rows: slice, piece: Tensor) -> None:
        outputs, regions = self._scheme.num_outputs, self._scheme.is_region_based
        logits, share = piece[:outputs], piece[outputs : 2 * outputs].clamp(0, 1)
        doubt = entropy(share, regions, 0)[0]
        shared = (doubt - piece[2 * outputs]).clamp_min(0)
        on = logits > 0 if regions else _one_hot(logits)
        if regions:
            sure = torch.where(on, share, 1 - share).amin(0)
        else:
            sure = (share * on).sum(0)
        for target, values in zip(self._inner, (doubt, shared, sure), strict=True):
            target[part, rows] = values.half().cpu().numpy()
        self._sum_up(on, share, doubt)

    def _sum_up(self, on: Tensor, share: Tensor, doubt: Tensor) -> None:
        rows = (on, share * on, share, doubt * on)
        wide = _widest(on.device)
        totals = [row.sum(dim=(1, 2, 3), dtype=wide) for row in rows]
        self._sums += torch.stack(totals).cpu().numpy()
        named = list(self._outputs().values())
        anything = on[named].any(0)
        whole = (anything.sum(), (doubt * anything).sum(dtype=wide))
        self._whole += [float(value) for value in whole]

    def _structure(self, index: int) -> JsonDict:
        voxels, inside, everywhere, doubt = self._sums[:, index]
        volumes = self._sampled.voxels[:, index] * self._voxel_ml[1]
        return {
            "volume_ml": float(voxels * self._voxel_ml[0]),
            "sample_mean_ml": float(volumes.mean()),
            "sample_sd_ml": float(volumes.std(ddof=1)) if len(volumes) > 1 else None,
            "sample_min_ml": float(volumes.min()),
            "sample_max_ml": float(volumes.max()),
            "expected_dice": float(2 * inside / (voxels + everywhere))
            if voxels
            else None,
            "mean_entropy": float(doubt / voxels) if voxels else None,
        }


def probabilities(logits: Tensor, regions: bool, dim: int) -> Tensor:
    """Give softmax (classes) or sigmoid (regions) along an axis."""
    return logits.sigmoid() if regions else logits.softmax(dim)


def entropy(share: Tensor, regions: bool, dim: int) -> Tensor:
    """Give the entropy of probabilities in nats.

    Args:
        share: Probabilities; classes or regions along `dim`.
        regions: Whether they are independent regions, whose entropies add up.
        dim: The axis of classes or regions.

    Returns:
        The same shape with one channel: 0 to log(classes), or regions·log(2).
    """
    plain = torch.special.entr(share)
    if regions:
        plain = plain + torch.special.entr(1 - share)
    return plain.sum(dim, keepdim=True)


def _widest(device: torch.device) -> torch.dtype:
    """Give the type to add up many numbers in; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _one_hot(logits: Tensor) -> Tensor:
    """Mark the output that wins at each voxel."""
    chosen = logits.argmax(dim=0, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(0, chosen, True)
