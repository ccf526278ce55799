"""One random glioma: oedema, enhancing rim and necrotic core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segmamba.demo.anatomy import Anatomy, grid_mm
from segmamba.demo.fields import distance_mm, largest_piece, ramp, smooth_field
from segmamba.types import Array, FloatArray

NECROSIS, OEDEMA, ENHANCING = 1, 2, 3
"""Label values of BraTS 2023."""


@dataclass(frozen=True)
class TumourShape:
    """What is drawn before the brain is known."""

    centre_mm: FloatArray
    """(3,) place relative to the grid's middle, RAS+ mm."""
    axes_mm: FloatArray
    """(3,) half-axes of the core."""
    rotation: FloatArray
    """(3, 3) orientation of the half-axes."""
    oedema_mm: float
    """How far oedema reaches beyond the core in white matter."""
    rim: float
    """Share of the core's radius that enhances, on average."""
    enhancement: str
    """"ring", "solid", "patchy" or "none"."""
    roughness: float
    """Standard deviation of the border's irregularity."""


def draw_shape(rng: np.random.Generator) -> TumourShape:
    """Draw place, size and kind of a tumour (cerebrum only, either side)."""
    side = rng.choice((-1.0, 1.0))
    centre = np.array(
        [side * rng.uniform(18, 44), rng.uniform(-52, 42), rng.uniform(-4, 40)]
    )
    radius = rng.uniform(12, 21)
    axes = radius * np.exp(rng.normal(0, 0.18, 3))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    kinds, shares = ("ring", "solid", "patchy", "none"), (0.62, 0.14, 0.18, 0.06)
    return TumourShape(
        centre_mm=centre,
        axes_mm=axes,
        rotation=rotation,
        oedema_mm=rng.uniform(5, 16),
        rim=rng.uniform(0.26, 0.50),
        enhancement=str(rng.choice(kinds, p=shares)),
        roughness=rng.uniform(0.10, 0.22),
    )


def push_mm(shape: TumourShape, size: tuple[int, int, int], mm: float) -> FloatArray:
    """Give the displacement of tissue by the tumour's mass: (3, I, J, K), RAS+ mm."""
    away = grid_mm(size, mm) - shape.centre_mm.astype(np.float32)[:, None, None, None]
    distance = np.linalg.norm(away, axis=0)
    radius = float(shape.axes_mm.mean())
    strength = 0.35 * radius * np.exp(-((distance / (1.8 * radius)) ** 2))
    return away * (strength / np.maximum(distance, 1.0))


def grow(
    rng: np.random.Generator, shape: TumourShape, anatomy: Anatomy
) -> tuple[Array, FloatArray]:
    """Grow the tumour in a brain.

    Args:
        rng: Source of the numbers.
        shape: What was drawn.
        anatomy: The brain.

    Returns:
        Label map (I, J, K) of uint8, and the oedema's strength (I, J, K) in 0 to 1,
        which fades into the healthy tissue.
    """
    size, mm = anatomy.brain.shape, anatomy.spacing_mm
    radius = _core_radius(shape, size, mm)
    rough = smooth_field(rng, size, mm, 7) + 0.5 * smooth_field(rng, size, mm, 3)
    radius *= np.exp(shape.roughness * rough)
    core: Array = (radius < 1) & anatomy.brain & (anatomy.depth_mm > 1.5 * mm)
    oedema, strength = _oedema(rng, shape, anatomy, radius, core)
    label = np.zeros(size, np.uint8)
    label[oedema] = OEDEMA
    label[core] = NECROSIS
    label[core & _enhancing(rng, shape, radius, size, mm)] = ENHANCING
    return label * largest_piece(label > 0), strength


def _core_radius(
    shape: TumourShape, size: tuple[int, ...], spacing_mm: float
) -> FloatArray:
    """Distance to the centre over the core's half-axes: 1 on the ellipsoid."""
    grid = grid_mm((size[0], size[1], size[2]), spacing_mm)
    away = grid - shape.centre_mm.astype(np.float32)[:, None, None, None]
    turn = (shape.rotation / shape.axes_mm[:, None]).astype(np.float32)
    return np.linalg.norm(np.tensordot(turn, away, axes=(1, 0)), axis=0)


def _oedema(
    rng: np.random.Generator,
    shape: TumourShape,
    anatomy: Anatomy,
    radius: FloatArray,
    core: Array,
) -> tuple[Array, FloatArray]:
    """Spread oedema from the core, farther in white matter, never into fluid."""
    size, mm = anatomy.brain.shape, anatomy.spacing_mm
    distance = distance_mm(~core, mm)
    white = ndimage.gaussian_filter(anatomy.wm, 1.0)
    reach = shape.oedema_mm * (0.2 + 0.95 * white)
    reach *= np.exp(0.35 * smooth_field(rng, size, mm, 9))
    spread = distance - reach
    tissue: Array = anatomy.brain & (anatomy.csf < 0.45) & (anatomy.depth_mm > mm)
    oedema = (spread < 0) & tissue & ~core
    oedema = ndimage.binary_opening(oedema | core) & tissue & ~core
    return oedema, 1 - ramp(spread, -3.0, 1.5)


def _enhancing(
    rng: np.random.Generator,
    shape: TumourShape,
    radius: FloatArray,
    size: tuple[int, ...],
    spacing_mm: float,
) -> Array:
    """Choose the part of the core that takes up contrast agent."""
    grid = (size[0], size[1], size[2])
    uneven = smooth_field(rng, grid, spacing_mm, 6)
    fine = smooth_field(rng, grid, spacing_mm, 3.5)
    if shape.enhancement == "none":
        return np.zeros(size, bool)
    if shape.enhancement == "patchy":
        return uneven + 0.5 * fine > 1.0
    if shape.enhancement == "solid":
        return uneven < 1.1
    inner = 1 - shape.rim * (1 + 0.45 * uneven)
    return (radius > inner) & (fine < 2.2)
