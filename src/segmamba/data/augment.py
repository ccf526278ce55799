"""Random changes of training patches: nnU-Net's stock set, for batches of tensors.

Parameters are drawn apart from being applied: `draw` gives plain numbers from a seed,
`apply` is a pure function of a batch and those numbers. `augment` does both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from segmamba.config import AugmentationConfig
from segmamba.data import transforms
from segmamba.errors import ConfigError, describe
from segmamba.types import Array, Size3

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
    """Rotations and zooms of a batch, and where each patch lies in its tensor."""

    matrices: Array
    """(B, 3, 3), from offsets in the patch to offsets in the tensor, in voxels."""
    active: Array
    """(B,) bool: False where the patch is only cut out."""
    centers: Array | None = None
    """(B, 3) voxel position of each patch's middle; None for the tensor's middle."""


@dataclass(frozen=True)
class Batch:
    """Training patches, as the sampler gives and `augment` changes them."""

    image: Tensor
    """(B, C, D, H, W): float32, or float16 as the sampler reads it from the cache."""
    label: Tensor
    """(B, D, H, W) int16, the data set's own integers."""
    spatial: SpatialDraw | None = None
    """Rotations and zooms that were drawn while reading, still to be applied."""
    case_ids: tuple[str, ...] = ()
    """The case of each sample, for messages; may be empty."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device."""
        image = self.image.to(device, non_blocking=non_blocking)
        label = self.label.to(device, non_blocking=non_blocking)
        return Batch(image, label, self.spatial, self.case_ids)

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory, for faster copies to a GPU."""
        image, label = self.image.pin_memory(), self.label.pin_memory()
        return Batch(image, label, self.spatial, self.case_ids)


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


def augment(
    batch: Batch, patch_size: Size3, config: AugmentationConfig, generator_seed: int
) -> Batch:
    """Change a batch at random, on the batch's device.

    Args:
        batch: Patches; where the sampler has drawn rotations and zooms already
            (`Batch.spatial`), those are applied, else they are drawn here.
        patch_size: Voxels of the patches to give back along D, H, W.
        config: What to do how often; `enabled=False` only cuts the patches out.
        generator_seed: The result is a function of the batch and this.

    Returns:
        A new batch of shape (B, C, *patch_size), float32, and (B, *patch_size); the
        given one is left as it was.
    """
    count, channels = batch.image.shape[:2]
    drawn = draw(config, count, channels, patch_size, generator_seed)
    spatial = drawn.spatial if batch.spatial is None else batch.spatial
    return apply(batch, patch_size, AugmentationDraw(spatial, drawn.intensity))


def draw(
    config: AugmentationConfig,
    batch_size: int,
    channels: int,
    patch_size: Size3,
    seed: int,
) -> AugmentationDraw:
    """Draw the parameters for a batch.

    Args:
        config: Probabilities and ranges.
        batch_size: Samples, B.
        channels: Image channels, C.
        patch_size: Voxels of a patch along D, H, W.
        seed: Any integer; the draw is a function of it.

    Returns:
        The parameters.
    """
    return AugmentationDraw(
        draw_spatial(config, batch_size, patch_size, seed),
        draw_intensity(config, batch_size, channels, patch_size, seed),
    )


def draw_spatial(
    config: AugmentationConfig, batch_size: int, patch_size: Size3, seed: int
) -> SpatialDraw:
    """Draw rotations and zooms; arguments as for `draw`."""
    random = generator(seed, 1)
    flat = flat_axis(patch_size)
    limit = config.rotation_degrees
    if flat is not None:
        limit = config.rotation_degrees_in_plane
    angles = np.radians(random.uniform(-limit, limit, (batch_size, 3)))
    zooms = random.uniform(*config.scaling, batch_size)
    turned = _happens(random, config.enabled * config.p_rotation, batch_size)
    zoomed = _happens(random, config.enabled * config.p_scaling, batch_size)
    if flat is not None:
        angles[:, [axis for axis in range(3) if axis != flat]] = 0
    scales = np.where(zoomed, zooms, 1.0)[:, None].repeat(3, 1)
    if flat is not None:
        scales[:, flat] = 1.0
    rotations = [rotation_matrix(a) for a in np.where(turned[:, None], angles, 0.0)]
    matrices = np.stack(rotations) * scales[:, None, :]
    return SpatialDraw(matrices, turned | zoomed)


def draw_intensity(
    config: AugmentationConfig,
    batch_size: int,
    channels: int,
    patch_size: Size3,
    seed: int,
) -> IntensityDraw:
    """Draw everything but rotations and zooms; arguments as for `draw`."""
    random = generator(seed, 2)
    on = float(config.enabled)
    pair = (batch_size, channels)

    def sometimes(values: Array, probability: float) -> Array:
        happens = _happens(random, on * probability, batch_size)
        shape = (batch_size,) + (1,) * (values.ndim - 1)
        return np.where(happens.reshape(shape), values, np.nan)

    def some_channels(values: Array, probability: float) -> Array:
        chosen = random.random(pair) < P_CHANNEL
        return sometimes(np.where(chosen[..., None], values, np.nan), probability)

    scales = random.uniform(*LOW_RESOLUTION_SCALE, (*pair, 1)).repeat(3, 2)
    flat = flat_axis(patch_size)
    if flat is not None:
        scales[..., flat] = 1.0
    noise = random.uniform(*NOISE_DEVIATION, batch_size)
    sigma = random.uniform(*BLUR_SIGMA, (*pair, 3))
    return IntensityDraw(
        noise_deviation=sometimes(noise, config.p_noise),
        noise_seed=random.integers(0, 2**62, batch_size),
        blur_sigma=some_channels(sigma, config.p_blur),
        brightness=sometimes(
            _about_one(random, BRIGHTNESS_FACTOR, pair), config.p_brightness
        ),
        contrast=sometimes(
            _about_one(random, CONTRAST_FACTOR, pair), config.p_contrast
        ),
        low_resolution=some_channels(scales, config.p_low_resolution),
        gamma_inverted=sometimes(
            _about_one(random, GAMMA_EXPONENT, pair), config.p_gamma_inverted
        ),
        gamma=sometimes(_about_one(random, GAMMA_EXPONENT, pair), config.p_gamma),
        mirror=_draw_mirror(random, config, batch_size),
    )


@torch.no_grad()
def apply(batch: Batch, patch_size: Size3, drawn: AugmentationDraw) -> Batch:
    """Apply drawn parameters, in nnU-Net's order.

    Args:
        batch: Patches, possibly with more around them; left as they are.
        patch_size: Voxels to give back along D, H, W.
        drawn: What to do to each sample and channel.

    Returns:
        A new batch of shape (B, C, *patch_size) and (B, *patch_size).
    """
    image, label = apply_spatial(batch, patch_size, drawn.spatial)
    for index in range(len(image)):
        _change_intensities(image[index], drawn.intensity, index)
        axes = np.flatnonzero(drawn.intensity.mirror[index]).tolist()
        if axes:
            image[index] = image[index].flip([axis + 1 for axis in axes])
            label[index] = label[index].flip(axes)
    return Batch(image, label, case_ids=batch.case_ids)


def apply_spatial(
    batch: Batch, patch_size: Size3, drawn: SpatialDraw
) -> tuple[Tensor, Tensor]:
    """Rotate and zoom the samples that have it, cut the others out.

    Args:
        batch: Patches with more around them.
        patch_size: Voxels to give back along D, H, W.
        drawn: Matrices and positions.

    Returns:
        New tensors (B, C, *patch_size), float32 (or float64 as given), and
        (B, *patch_size).
    """
    size = np.asarray(patch_size)
    count, channels, *shape = batch.image.shape
    dtype = torch.promote_types(batch.image.dtype, torch.float32)
    image = batch.image.new_empty((count, channels, *patch_size), dtype=dtype)
    label = batch.label.new_empty((count, *patch_size))
    # A tensor larger than the patch by an odd number has its middle between voxels.
    middle = (size - 1) / 2 + (np.asarray(shape) - size) // 2
    for index in range(count):
        center = middle if drawn.centers is None else drawn.centers[index]
        source, target = batch.image[index], batch.label[index]
        if drawn.active[index]:
            how = (drawn.matrices[index], center, patch_size)
            image[index] = transforms.sample_affine(source.to(dtype), *how)
            label[index] = transforms.sample_affine_labels(target, *how)
        else:
            begin = np.round(center - (size - 1) / 2).astype(int)
            start = (int(begin[0]), int(begin[1]), int(begin[2]))
            image[index] = transforms.crop(source, start, patch_size)
            label[index] = transforms.crop(target, start, patch_size)
    return image, label


def flat_axis(patch_size: Size3) -> int | None:
    """Give the thin axis of a very anisotropic patch, which stays as it is, or None."""
    shortest = int(np.argmin(patch_size))
    thin = max(patch_size) > ANISOTROPY_THRESHOLD * patch_size[shortest]
    return shortest if thin else None


def rotation_matrix(angles: Array) -> Array:
    """Compose rotations about D, then H, then W.

    Args:
        angles: (3,) radians about D, H, W.

    Returns:
        (3, 3) on voxel offsets along (D, H, W).
    """
    matrix = np.eye(3)
    for axis, (sine, cosine) in enumerate(
        zip(np.sin(angles), np.cos(angles), strict=True)
    ):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[first, second], [first, second]] = cosine
        turn[first, second], turn[second, first] = -sine, sine
        matrix = turn @ matrix
    return matrix


def generator(*numbers: int) -> np.random.Generator:
    """Make a generator whose numbers depend on all the given integers only."""
    entropy = [number % 2**64 for number in numbers]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _happens(random: np.random.Generator, probability: float, count: int) -> Array:
    return random.random(count) < probability


def _about_one(
    random: np.random.Generator, limits: tuple[float, float], shape: tuple[int, ...]
) -> Array:
    """Draw below one and above one equally often (nnU-Net's BGContrast)."""
    below = random.uniform(limits[0], 1.0, shape)
    above = random.uniform(1.0, limits[1], shape)
    return np.where(random.random(shape) < 0.5, below, above)


def _draw_mirror(
    random: np.random.Generator, config: AugmentationConfig, batch_size: int
) -> Array:
    flips = random.random((batch_size, 3)) < 0.5
    if not set(config.mirror_axes) <= {0, 1, 2}:
        raise ConfigError(
            describe(
                "bad axes for mirroring",
                expected="axes out of 0, 1, 2",
                found=config.mirror_axes,
            )
        )
    allowed = [config.enabled and axis in config.mirror_axes for axis in range(3)]
    return flips & np.asarray(allowed)


def _change_intensities(image: Tensor, drawn: IntensityDraw, index: int) -> None:
    """Change one sample (C, D, H, W) in place."""
    if np.isfinite(drawn.noise_deviation[index]):
        image += _noise(image, drawn, index)
    for channel, volume in enumerate(image):
        at = (index, channel)
        if np.isfinite(drawn.blur_sigma[at]).all():
            volume.copy_(transforms.gaussian_blur(volume, drawn.blur_sigma[at]))
        if np.isfinite(drawn.brightness[at]):
            volume.mul_(float(drawn.brightness[at]))
        if np.isfinite(drawn.contrast[at]):
            volume.copy_(transforms.contrast(volume, float(drawn.contrast[at])))
        if np.isfinite(drawn.low_resolution[at]).all():
            volume.copy_(transforms.low_resolution(volume, drawn.low_resolution[at]))
        if np.isfinite(drawn.gamma_inverted[at]):
            power = float(drawn.gamma_inverted[at])
            volume.copy_(transforms.gamma(volume, power, inverted=True))
        if np.isfinite(drawn.gamma[at]):
            volume.copy_(transforms.gamma(volume, float(drawn.gamma[at])))


def _noise(image: Tensor, drawn: IntensityDraw, index: int) -> Tensor:
    source = torch.Generator(image.device).manual_seed(int(drawn.noise_seed[index]))
    shape, device = image.shape[1:], image.device
    field = torch.randn(shape, generator=source, device=device, dtype=image.dtype)
    return field.mul_(float(drawn.noise_deviation[index]))
