"""Four MR contrasts of one brain with its tumour, and what makes them hard to read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segmamba.demo.anatomy import Anatomy
from segmamba.demo.fields import distance_mm, ramp, smooth_field
from segmamba.demo.tumour import ENHANCING, NECROSIS, OEDEMA
from segmamba.types import Array, FloatArray

CHANNELS = ("t1n", "t1c", "t2w", "t2f")
"""Contrasts by the names of BraTS 2023: T1, T1 with contrast agent, T2, FLAIR."""

_TISSUE = {
    # brightness relative to white matter in T1: fluid, grey, white
    "t1n": (0.32, 0.70, 1.00),
    "t1c": (0.34, 0.72, 1.00),
    "t2w": (1.75, 0.92, 0.68),
    "t2f": (0.30, 0.92, 0.76),
}
_LESION = {
    # necrosis, oedema, enhancing tumour
    "t1n": (0.42, 0.70, 0.72),
    "t1c": (0.46, 0.70, 1.45),
    "t2w": (1.70, 1.32, 1.22),
    "t2f": (0.85, 1.26, 1.16),
}


@dataclass(frozen=True)
class Lesions:
    """Soft shares (I, J, K) in 0 to 1 of what lies over the tissue."""

    necrosis: FloatArray
    oedema: FloatArray
    enhancing: FloatArray
    vessels: FloatArray
    """Bright after contrast agent: veins, sinuses, choroid plexus."""
    leukoaraiosis: FloatArray
    """Bright in FLAIR: caps of the ventricles and spots in white matter."""


def soft_lesions(
    rng: np.random.Generator, anatomy: Anatomy, label: Array, strength: FloatArray
) -> Lesions:
    """Blur the tumour's parts into partial volumes and draw its look-alikes.

    Args:
        rng: Source of the numbers.
        anatomy: The brain.
        label: (I, J, K) label map of the tumour.
        strength: (I, J, K) how strong the oedema is.

    Returns:
        The shares.
    """

    def soft(mask: Array, sigma: float) -> FloatArray:
        return ndimage.gaussian_filter(mask.astype(np.float32), sigma)

    infiltration = np.maximum(strength, 0.55) * (label == OEDEMA)
    infiltration += 0.45 * strength * (label == 0) * (anatomy.csf < 0.5)
    return Lesions(
        necrosis=soft(label == NECROSIS, 0.55),
        oedema=ndimage.gaussian_filter(infiltration, 0.6),
        enhancing=soft(label == ENHANCING, 0.45),
        vessels=_vessels(rng, anatomy),
        leukoaraiosis=_leukoaraiosis(rng, anatomy, label),
    )


def render(
    rng: np.random.Generator, anatomy: Anatomy, lesions: Lesions
) -> dict[str, Array]:
    """Make the four images.

    Args:
        rng: Source of the numbers.
        anatomy: The brain.
        lesions: What lies over its tissue.

    Returns:
        Contrast to (I, J, K) int16; 0 outside the brain, at least 1 inside.
    """
    take_up = np.exp(rng.normal(0, 0.14))
    necrotic_flair = rng.uniform(-0.45, 0.30)
    oedema_gain = np.exp(rng.normal(0, 0.05))
    images = {}
    for channel in CHANNELS:
        values: dict[str, float] = {}
        values["n"], values["o"], values["e"] = _LESION[channel]
        if channel == "t1c":
            values["e"] *= take_up
        if channel == "t2f":
            values["n"] += necrotic_flair
            values["o"] *= oedema_gain
        clean = _mix(rng, channel, anatomy, lesions, values)
        images[channel] = _scan(rng, clean, anatomy)
    return images


def _mix(
    rng: np.random.Generator,
    channel: str,
    anatomy: Anatomy,
    lesions: Lesions,
    values: dict[str, float],
) -> FloatArray:
    """Brightness of every voxel before the scanner spoils it."""
    size, mm = anatomy.brain.shape, anatomy.spacing_mm
    fluid, grey, white = np.array(_TISSUE[channel]) * np.exp(rng.normal(0, 0.05, 3))
    texture = smooth_field(rng, size, mm, 4)
    image = fluid * anatomy.csf + grey * anatomy.gm + white * anatomy.wm
    image += {"t1n": 0.6, "t1c": 0.6, "t2w": -0.4, "t2f": 0.2}[channel] * anatomy.detail
    if channel == "t2f":
        image *= 1 + 0.16 * anatomy.gm * ramp(smooth_field(rng, size, mm, 16), 0.2, 1.2)
        image += 0.50 * lesions.leukoaraiosis
    if channel == "t2w":
        image += 0.35 * lesions.leukoaraiosis
    if channel == "t1c":
        image += (1.55 - image) * lesions.vessels
    rough = 1 + 0.06 * texture
    for name, share in (
        ("o", lesions.oedema),
        ("n", lesions.necrosis),
        ("e", lesions.enhancing),
    ):
        image += (values[name] * rough - image) * share
    return image


def _scan(rng: np.random.Generator, clean: FloatArray, anatomy: Anatomy) -> Array:
    """Add point spread, coil shading, Rician noise and an arbitrary scale."""
    size, mm = clean.shape, anatomy.spacing_mm
    image = ndimage.gaussian_filter(clean, 0.35)
    shading = rng.uniform(0.06, 0.16) * smooth_field(rng, size, mm, 45)
    image *= np.exp(shading)
    noise = rng.uniform(0.015, 0.04)
    real, imaginary = rng.standard_normal((2, *size), dtype=np.float32) * noise
    image = np.sqrt((image + real) ** 2 + imaginary**2)
    scaled = np.rint(image * rng.uniform(500, 1500))
    return np.where(anatomy.brain, np.clip(scaled, 1, 32767), 0).astype(np.int16)


def _vessels(rng: np.random.Generator, anatomy: Anatomy) -> FloatArray:
    """Veins as curves where two random fields cross zero, and the choroid plexus."""
    size, mm = anatomy.brain.shape, anatomy.spacing_mm
    vessels = np.zeros(size, np.float32)
    for length, width in ((11.0, 0.17), (7.0, 0.13)):
        first, second = (smooth_field(rng, size, mm, length) for _ in range(2))
        distance = np.hypot(first, second)
        vessels = np.maximum(vessels, np.exp(-((distance / width) ** 2)))
    near_surface = 1 - ramp(anatomy.depth_mm, 8, 16)
    vessels *= np.maximum(near_surface * ramp(anatomy.csf + anatomy.gm, 0.3, 0.7), 0.12)
    ventricles = ramp(anatomy.depth_mm, 22, 28) * ramp(anatomy.csf, 0.5, 0.8)
    plexus = ramp(smooth_field(rng, size, mm, 4), 0.7, 1.2) * ventricles
    midline = np.abs(np.arange(size[0]) - (size[0] - 1) / 2)[:, None, None] * mm
    sinus = (1 - ramp(midline, 2, 5)) * (1 - ramp(anatomy.depth_mm, 3, 7))
    sinus = sinus * np.ones(size)
    sinus[:, : size[1] // 4] *= 0.5
    vessels = np.maximum(np.maximum(vessels, plexus), sinus * _upper(size))
    return vessels.astype(np.float32) * anatomy.brain


def _upper(size: tuple[int, ...]) -> FloatArray:
    """1 in the upper half of the grid, where the sagittal sinus runs."""
    return ramp(np.arange(size[2], dtype=np.float32), 0.45 * size[2], 0.6 * size[2])


def _leukoaraiosis(
    rng: np.random.Generator, anatomy: Anatomy, label: Array
) -> FloatArray:
    """Age's marks: bright caps around the ventricles and spots in white matter."""
    size, mm = anatomy.brain.shape, anatomy.spacing_mm
    ventricle = (anatomy.csf > 0.6) & (anatomy.depth_mm > 22)
    distance = distance_mm(~ventricle, mm)
    load = rng.uniform(0.2, 1.4)
    caps = np.exp(-distance / 4) * ramp(smooth_field(rng, size, mm, 9), 1 - load, 2)
    spots = ramp(smooth_field(rng, size, mm, 3.2), 2.6 - 0.3 * load, 3.0)
    marks = np.maximum(caps, spots) * ramp(anatomy.wm, 0.4, 0.8)
    return (marks * (label == 0)).astype(np.float32)
