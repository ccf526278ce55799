"""Parameters of the random changes of training patches, as plain numbers from seeds.

Several batches are drawn at once as one: each has a seed of its own, so its numbers do
not depend on the others'. `segmamba.data.augment` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segmamba.config import AugmentationConfig
from segmamba.errors import ConfigError, describe
from segmamba.types import Array, Size3

Seeds = int | Sequence[int]
"""Any integer for one batch, or one for each of several."""

NOISE_DEVIATION = (0.0, 0.1)
"""Standard deviation of the noise (nnU-Net's `noise_variance`, which it uses so)."""
BLUR_SIGMA = (0.5, 1.0)
"""Standard deviation of the blur in voxels."""
BRIGHTNESS_FACTOR = (0.75, 1.25)
"""Multiplier of the values."""
CONTRAST_FACTOR = (0.75, 1.25)
"""Multiplier of the distance from the mean."""
LOW_RESOLUTION_SCALE = (0.5, 1.0)
"""Share of the voxels kept along an axis."""
GAMMA_EXPONENT = (0.7, 1.5)
"""Power."""
P_CHANNEL = 0.5
"""Probability of each channel to take part in a blur or a low resolution."""
ANISOTROPY_THRESHOLD = 3
"""A patch whose longest side is more than so many times its shortest is turned and
zoomed in its plane only (nnU-Net's rule)."""


@dataclass(frozen=True)
class SpatialDraw:
    """Rotations and zooms of a batch."""

    matrices: Array
    """(B, 3, 3), from offsets in the patch to offsets in the image, in voxels."""
    active: Array
    """(B,) bool: False where the patch is only cut out."""


@dataclass(frozen=True)
class IntensityDraw:
    """Parameters of everything but rotations and zooms; NaN where nothing happens."""

    noise_deviation: Array
    """(B,), the same noise for all channels, as nnU-Net does."""
    noise_seed: Array
    """(B,) seeds of the noise fields."""
    blur_sigma: Array
    """(B, C, 3) voxels along D, H, W."""
    brightness: Array
    """(B, C) multipliers."""
    contrast: Array
    """(B, C) multipliers of the distance from the mean."""
    low_resolution: Array
    """(B, C, 3) share of voxels kept along D, H, W."""
    gamma_inverted: Array
    """(B, C) powers on the negative image."""
    gamma: Array
    """(B, C) powers."""
    mirror: Array
    """(B, 3) bool along D, H, W."""


@dataclass(frozen=True)
class AugmentationDraw:
    """All parameters for one batch."""

    spatial: SpatialDraw
    intensity: IntensityDraw


def draw(
    config: AugmentationConfig,
    batch_size: int,
    channels: int,
    patch_size: Size3,
    seed: Seeds,
) -> AugmentationDraw:
    """Draw the parameters for a batch, or for several as one.

    Args:
        config: Probabilities and ranges.
        batch_size: Samples for each seed; B is so many times the number of seeds.
        channels: Image channels, C.
        patch_size: Voxels of a patch along D, H, W.
        seed: Any integer, or several; the draw is a function of them.

    Returns:
        The parameters.
    """
    return AugmentationDraw(
        draw_spatial(config, batch_size, patch_size, seed),
        draw_intensity(config, batch_size, channels, patch_size, seed),
    )


def draw_spatial(
    config: AugmentationConfig, batch_size: int, patch_size: Size3, seed: Seeds
) -> SpatialDraw:
    """Draw rotations and zooms; arguments as for `draw`."""
    chance = _Chance(seed, 1, batch_size)
    flat = flat_axis(patch_size)
    limit = config.rotation_degrees
    if flat is not None:
        limit = config.rotation_degrees_in_plane
    angles = np.radians(chance.between((-limit, limit), 3))
    scales = chance.between(config.scaling, 1).repeat(3, 1)
    turned = chance.happens(config.enabled * config.p_rotation)
    zoomed = chance.happens(config.enabled * config.p_scaling)
    if flat is not None:
        angles[:, [axis for axis in range(3) if axis != flat]] = 0
        scales[:, flat] = 1.0
    angles[~turned], scales[~zoomed] = 0.0, 1.0
    matrices = rotation_matrix(angles) * scales[:, None, :]
    return SpatialDraw(matrices, turned | zoomed)


def draw_intensity(
    config: AugmentationConfig,
    batch_size: int,
    channels: int,
    patch_size: Size3,
    seed: Seeds,
) -> IntensityDraw:
    """Draw everything but rotations and zooms; arguments as for `draw`."""
    chance = _Chance(seed, 2, batch_size)
    on = float(config.enabled)

    def sometimes(values: Array, probability: float) -> Array:
        happens = chance.happens(on * probability)
        return np.where(happens.reshape(-1, *(1,) * (values.ndim - 1)), values, np.nan)

    def some_channels(values: Array, probability: float) -> Array:
        chosen = chance.numbers(channels, 1) < P_CHANNEL
        return sometimes(np.where(chosen, values, np.nan), probability)

    def about_one(limits: tuple[float, float], probability: float) -> Array:
        return sometimes(chance.about_one(limits, channels), probability)

    scales = chance.between(LOW_RESOLUTION_SCALE, channels, 1).repeat(3, 2)
    flat = flat_axis(patch_size)
    if flat is not None:
        scales[..., flat] = 1.0
    return IntensityDraw(
        noise_deviation=sometimes(chance.between(NOISE_DEVIATION), config.p_noise),
        noise_seed=(chance.numbers() * 2**53).astype(np.int64),
        blur_sigma=some_channels(
            chance.between(BLUR_SIGMA, channels, 3), config.p_blur
        ),
        brightness=about_one(BRIGHTNESS_FACTOR, config.p_brightness),
        contrast=about_one(CONTRAST_FACTOR, config.p_contrast),
        low_resolution=some_channels(scales, config.p_low_resolution),
        gamma_inverted=about_one(GAMMA_EXPONENT, config.p_gamma_inverted),
        gamma=about_one(GAMMA_EXPONENT, config.p_gamma),
        mirror=(chance.numbers(3) < 0.5) & _mirrored_axes(config),
    )


def flat_axis(patch_size: Size3) -> int | None:
    """Give the thin axis of a very anisotropic patch, which stays as it is, or None."""
    shortest = int(np.argmin(patch_size))
    thin = max(patch_size) > ANISOTROPY_THRESHOLD * patch_size[shortest]
    return shortest if thin else None


def rotation_matrix(angles: Array) -> Array:
    """Compose rotations about D, then H, then W.

    Args:
        angles: (..., 3) radians about D, H, W.

    Returns:
        (..., 3, 3) on voxel offsets along (D, H, W).
    """
    sines, cosines = np.sin(angles), np.cos(angles)
    turns = np.zeros((3, *angles.shape, 3))
    for axis, turn in enumerate(turns):
        first, second = [other for other in range(3) if other != axis]
        turn[..., axis, axis] = 1
        turn[..., first, first] = turn[..., second, second] = cosines[..., axis]
        turn[..., first, second] = -sines[..., axis]
        turn[..., second, first] = sines[..., axis]
    return turns[2] @ turns[1] @ turns[0]


def generator(*numbers: int) -> np.random.Generator:
    """Make a generator whose numbers depend on all the given integers only."""
    entropy = [number % 2**128 for number in numbers]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def step_seed(seed: int, step: int) -> int:
    """Give the seed of a step of a training: another for each pair of them."""
    return (seed % 2**64) * 2**64 + step


class _Chance:
    """Random numbers for samples whose batches have seeds of their own."""

    def __init__(self, seed: Seeds, purpose: int, batch_size: int) -> None:
        seeds = [seed] if isinstance(seed, int) else seed
        self._sources = [generator(seed, purpose) for seed in seeds]
        self._batch_size = batch_size

    def numbers(self, *shape: int) -> Array:
        """Give (B, *shape) numbers from 0 to below 1."""
        size = (self._batch_size, *shape)
        return np.concatenate([source.random(size) for source in self._sources])

    def between(self, limits: tuple[float, float], *shape: int) -> Array:
        """Give (B, *shape) numbers between two limits, all alike."""
        return limits[0] + (limits[1] - limits[0]) * self.numbers(*shape)

    def about_one(self, limits: tuple[float, float], *shape: int) -> Array:
        """Give (B, *shape): below and above one equally often (nnU-Net's way)."""
        side = np.where(self.numbers(*shape) < 0.5, *limits)
        return 1 + (side - 1) * self.numbers(*shape)

    def happens(self, probability: float) -> Array:
        """Give (B,) bool."""
        return self.numbers() < probability


def _mirrored_axes(config: AugmentationConfig) -> Array:
    if not set(config.mirror_axes) <= {0, 1, 2}:
        raise ConfigError(
            describe(
                "bad axes for mirroring",
                expected="axes out of 0, 1, 2",
                found=config.mirror_axes,
            )
        )
    return np.isin(range(3), config.mirror_axes) & config.enabled
