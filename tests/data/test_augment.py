"""Augmentation against known answers, scipy and nnU-Net's stated distributions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segmamba.config import AugmentationConfig
from segmamba.data import augment as module
from segmamba.data import transforms
from segmamba.data.augment import Batch, Wide, apply, augment
from segmamba.data.draws import (
    AugmentationDraw,
    draw,
    draw_intensity,
    draw_spatial,
    flat_axis,
    rotation_matrix,
)
from segmamba.errors import ConfigError

OFF = AugmentationConfig(enabled=False)
CUBE = (16, 16, 16)


def forced(**changes: object) -> AugmentationConfig:
    """Everything certain, apart from what is changed."""
    names = [f.name for f in dataclasses.fields(AugmentationConfig)]
    certain: dict = {name: 1.0 for name in names if name.startswith("p_")}
    return AugmentationConfig(**{**certain, **changes})  # type: ignore[arg-type]


def only_spatial(**changes: object) -> AugmentationConfig:
    """Nothing but rotations, zooms and mirrors, unless told otherwise."""
    return forced(
        p_noise=0.0, p_blur=0.0, p_brightness=0.0, p_contrast=0.0, p_gamma=0.0,
        p_low_resolution=0.0, p_gamma_inverted=0.0, **changes,
    )  # fmt: skip


def random_batch(size: tuple[int, ...], count: int = 2, channels: int = 3) -> Batch:
    source = torch.Generator().manual_seed(3)
    image = torch.randn((count, channels, *size), generator=source)
    label = torch.randint(0, 4, (count, *size), generator=source, dtype=torch.int16)
    return Batch(image, label)


def turned(
    image: torch.Tensor, matrix: np.ndarray, center: np.ndarray, size: tuple
) -> torch.Tensor:
    """Resample one image (C, D, H, W) or label map (D, H, W)."""
    depth, height, width = image.shape[-3:]
    places = (matrix[None], center[None], size, (depth, height, width))
    grid = transforms.affine_grid(*places, torch.device("cpu"))
    if image.ndim == 3:
        return transforms.sample_labels(image[None], grid)[0]
    return transforms.sample(image[None], grid)[0]


# ---- distributions ------------------------------------------------------------------

DRAWS = 20_000


@pytest.fixture(scope="module")
def stock() -> AugmentationDraw:
    return draw(AugmentationConfig(), DRAWS, 2, (128, 128, 128), 7)


def close_to(share: float, probability: float) -> bool:
    """Within five standard errors."""
    error = np.sqrt(probability * (1 - probability) / DRAWS)
    return bool(abs(share - probability) < 5 * error)


def test_rotation_and_zoom_happen_as_often_as_in_nnunet(
    stock: AugmentationDraw,
) -> None:
    matrices, active = stock.spatial.matrices, stock.spatial.active
    zoom = np.cbrt(np.linalg.det(matrices))
    zoomed = ~np.isclose(zoom, 1)
    turned = ~np.isclose(matrices / zoom[:, None, None], np.eye(3)).all((1, 2))
    assert close_to(zoomed.mean(), 0.2)
    assert close_to(turned.mean(), 0.2)
    assert close_to((zoomed & turned).mean(), 0.04)
    assert close_to(active.mean(), 0.36)
    np.testing.assert_array_equal(active, zoomed | turned)


def test_zoom_is_uniform_between_its_limits(stock: AugmentationDraw) -> None:
    zoom = np.cbrt(np.linalg.det(stock.spatial.matrices))
    zoom = zoom[~np.isclose(zoom, 1)]
    assert 0.7 <= zoom.min() < 0.71
    assert 1.39 < zoom.max() <= 1.4
    assert abs(zoom.mean() - 1.05) < 0.02
    assert abs(zoom.var() - 0.7**2 / 12) < 0.004


def test_angles_are_uniform_and_within_their_limit() -> None:
    config = forced(p_scaling=0.0)
    matrices = draw_spatial(config, 4000, (64, 64, 64), 1).matrices
    # The middle angle of the composition stands alone in one entry: sin about H.
    middle = np.degrees(np.arcsin(matrices[:, 2, 0]))
    assert -30 <= middle.min() < -29.5
    assert 29.5 < middle.max() <= 30
    assert abs(middle.std() - 60 / np.sqrt(12)) < 0.6
    np.testing.assert_allclose(
        matrices @ matrices.transpose(0, 2, 1),
        np.broadcast_to(np.eye(3), (4000, 3, 3)),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("name", "probability"),
    [
        ("noise_deviation", 0.1),
        ("brightness", 0.15),
        ("contrast", 0.15),
        ("gamma_inverted", 0.1),
        ("gamma", 0.3),
    ],
)
def test_intensity_changes_happen_as_often_as_in_nnunet(
    stock: AugmentationDraw, name: str, probability: float
) -> None:
    happens = np.isfinite(getattr(stock.intensity, name)).reshape(DRAWS, -1)
    assert (happens.all(1) == happens.any(1)).all()  # all channels together
    assert close_to(happens.any(1).mean(), probability)


@pytest.mark.parametrize(
    ("name", "probability"), [("blur_sigma", 0.2), ("low_resolution", 0.25)]
)
def test_half_of_the_channels_are_blurred_and_coarsened(
    stock: AugmentationDraw, name: str, probability: float
) -> None:
    happens = np.isfinite(getattr(stock.intensity, name)).all(2)
    assert close_to(happens[:, 0].mean(), probability / 2)
    assert close_to(happens.all(1).mean(), probability / 4)


def test_ranges_of_the_parameters(stock: AugmentationDraw) -> None:
    drawn = stock.intensity

    def limits(values: np.ndarray) -> tuple[float, float]:
        return float(np.nanmin(values)), float(np.nanmax(values))

    assert limits(drawn.noise_deviation) == pytest.approx((0, 0.1), abs=1e-3)
    assert limits(drawn.blur_sigma) == pytest.approx((0.5, 1), abs=1e-3)
    assert limits(drawn.brightness) == pytest.approx((0.75, 1.25), abs=1e-3)
    assert limits(drawn.contrast) == pytest.approx((0.75, 1.25), abs=1e-3)
    assert limits(drawn.low_resolution) == pytest.approx((0.5, 1), abs=1e-3)
    assert limits(drawn.gamma) == pytest.approx((0.7, 1.5), abs=1e-3)
    assert limits(drawn.gamma_inverted) == pytest.approx((0.7, 1.5), abs=3e-3)
    # Below and above one equally often, though the range isn't symmetric.
    below = (drawn.gamma[np.isfinite(drawn.gamma)] < 1).mean()
    assert abs(below - 0.5) < 0.025


def test_low_resolution_is_the_same_along_all_axes_and_blur_is_not(
    stock: AugmentationDraw,
) -> None:
    scales = stock.intensity.low_resolution
    scales = scales[np.isfinite(scales).all(2)]
    assert (scales == scales[:, :1]).all()
    sigma = stock.intensity.blur_sigma
    sigma = sigma[np.isfinite(sigma).all(2)]
    assert abs(np.corrcoef(sigma[:, 0], sigma[:, 1])[0, 1]) < 0.1


def test_mirrors_are_fair_and_only_along_allowed_axes() -> None:
    config = AugmentationConfig(mirror_axes=(0, 2))
    mirror = draw_intensity(config, DRAWS, 1, CUBE, 5).mirror
    assert close_to(mirror[:, 0].mean(), 0.5)
    assert close_to(mirror[:, 2].mean(), 0.5)
    assert close_to((mirror[:, 0] & mirror[:, 2]).mean(), 0.25)
    assert not mirror[:, 1].any()


def test_a_wrong_mirror_axis_is_a_config_error() -> None:
    config = AugmentationConfig(mirror_axes=(0, 3))
    with pytest.raises(ConfigError, match="mirror"):
        augment(random_batch(CUBE), CUBE, config, 0)


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_very_anisotropic_patches_turn_in_their_plane_only(thin: int) -> None:
    size = [128, 128, 128]
    size[thin] = 40
    drawn = draw_spatial(forced(), 500, (size[0], size[1], size[2]), 0)
    unit = np.zeros(3)
    unit[thin] = 1
    np.testing.assert_array_equal(drawn.matrices[:, thin], np.tile(unit, (500, 1)))
    np.testing.assert_array_equal(drawn.matrices[:, :, thin], np.tile(unit, (500, 1)))
    rest = [axis for axis in range(3) if axis != thin]
    inner = drawn.matrices[:, rest][:, :, rest]
    cosines = inner[:, 0, 0] / np.sqrt(np.linalg.det(inner))
    assert cosines.min() < -0.99  # all the way round, as in nnU-Net
    scales = draw_intensity(forced(), 50, 2, (size[0], size[1], size[2]), 0)
    assert np.nanmax(scales.low_resolution[..., thin]) == 1
    assert np.nanmin(scales.low_resolution[..., thin]) == 1
    assert np.nanmin(scales.low_resolution[..., rest]) < 0.6


def test_one_to_three_is_not_yet_anisotropic() -> None:
    assert flat_axis((40, 120, 120)) is None
    assert flat_axis((40, 121, 120)) == 0


# ---- geometry -----------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_equal_rot90(axis: int, quarters: int) -> None:
    batch = random_batch(CUBE, 1)
    angles = np.zeros(3)
    angles[axis] = quarters * np.pi / 2
    center = np.full(3, 7.5)
    matrix = rotation_matrix(angles)
    image = turned(batch.image[0], matrix, center, CUBE)
    label = turned(batch.label[0], matrix, center, CUBE)
    plane = [other for other in range(3) if other != axis]
    # out[a, b] = in[-b, a] for one quarter about the middle: rot90 the other way.
    expected = torch.rot90(batch.image[0], -quarters, [p + 1 for p in plane])
    torch.testing.assert_close(image, expected, atol=2e-5, rtol=0)
    assert torch.equal(label, torch.rot90(batch.label[0], -quarters, plane))


def scipy_oracle(
    volume: np.ndarray, matrix: np.ndarray, center: np.ndarray, size: tuple[int, ...]
) -> np.ndarray:
    offset = center - matrix @ ((np.asarray(size) - 1) / 2)
    return scipy.ndimage.affine_transform(
        volume, matrix, offset, size, order=1, mode="grid-constant", cval=0.0
    )


@pytest.mark.parametrize("size", [(9, 12, 7), (20, 22, 30)])
def test_resampling_equals_scipy(size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(0)
    volume = random.normal(size=(18, 15, 21))
    matrix = rotation_matrix(np.array([0.3, -0.4, 0.5])) * 1.3
    center = np.array([8.2, 7.1, 11.9])
    expected = scipy_oracle(volume, matrix, center, size)
    found = turned(torch.tensor(volume[None]), matrix, center, size)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-5)


def test_in_plane_resampling_equals_scipy_at_a_shifted_place() -> None:
    random = np.random.default_rng(1)
    volume = random.normal(size=(6, 25, 21))
    matrix = rotation_matrix(np.array([0.7, 0, 0])) @ np.diag([1, 0.8, 0.8])
    center, size = np.array([4.5, 11.3, 9.0]), (4, 16, 17)
    found = turned(torch.tensor(volume[None]), matrix, center, size)
    expected = scipy_oracle(volume, matrix, center, size)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-5)


def blocky_labels(shape: tuple[int, ...], values: list[int]) -> np.ndarray:
    random = np.random.default_rng(2)
    smooth = [
        scipy.ndimage.gaussian_filter(random.normal(size=shape), 1.5) for _ in values
    ]
    return np.asarray(values, np.int16)[np.argmax(smooth, axis=0)]


@pytest.mark.parametrize("values", [[0, 2], [0, 1, 4, 255], [0, *range(3, 15)], [5, 9]])
def test_labels_equal_the_vote_of_all_one_hot_maps(values: list[int]) -> None:
    label = blocky_labels((20, 18, 22), values)
    matrix = rotation_matrix(np.array([-0.4, 0.2, 0.3])) * 1.2
    center, size = np.array([9.0, 8.7, 10.1]), (19, 24, 16)
    found = turned(torch.from_numpy(label), matrix, center, size).numpy()
    present = sorted({0, *values})
    inside = np.ones(label.shape)
    scores = np.stack(
        [
            scipy_oracle((label == v).astype(float), matrix, center, size)
            for v in present
        ]
    )
    scores[0] += 1 - scipy_oracle(inside, matrix, center, size)  # outside: background
    top = np.sort(scores, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.99
    expected = np.asarray(present)[np.argmax(scores, axis=0)]
    np.testing.assert_array_equal(found[clear], expected[clear])
    assert found.dtype == np.int16
    assert set(np.unique(found)) <= set(present)


def test_a_map_without_foreground_and_one_out_of_sight_stay_background() -> None:
    empty = torch.zeros(CUBE, dtype=torch.int16)
    matrix, center = rotation_matrix(np.array([0.3, 0, 0.1])), np.full(3, 7.5)
    assert not turned(empty, matrix, center, CUBE).any()
    far = torch.zeros((60, 16, 16), dtype=torch.int16)
    far[55:] = 3
    assert not turned(far, matrix, center, CUBE).any()


@pytest.mark.parametrize("seed", range(6))
def test_image_and_label_move_together(seed: int) -> None:
    """A bright ball stays where its label is, through every spatial change."""
    grid = np.indices((40, 36, 44))
    inside = (
        ((grid - np.array([22, 15, 25])[:, None, None, None]) ** 2).sum(0) < 30
    ).astype(np.float32)
    image = torch.from_numpy(inside)[None, None].repeat(1, 2, 1, 1, 1)
    batch = Batch(image, torch.from_numpy(inside * 7).short()[None])
    out = augment(batch, (32, 30, 28), only_spatial(), seed)
    assert set(out.label.unique().tolist()) == {0, 7}
    torch.testing.assert_close(out.image[0, 0], out.image[0, 1])
    # A voxel of two labels belongs to the one with the larger share.
    assert (out.label[0][out.image[0, 0] > 0.50001] == 7).all()
    assert (out.label[0][out.image[0, 0] < 0.49999] == 0).all()


def test_a_larger_zoom_shows_more() -> None:
    grid = np.indices((64, 64, 64)) - 31.5
    ball = torch.from_numpy((grid**2).sum(0) < 12**2).short()
    matrix, center = np.eye(3) * 1.4, np.full(3, 31.5)
    out = turned(ball, matrix, center, (48, 48, 48))
    ratio = float(ball.sum()) / float(out.sum())
    assert ratio == pytest.approx(1.4**3, rel=0.05)


@pytest.mark.parametrize("start", [(-3, 2, 5), (0, 0, 0), (30, 0, 0), (8, -20, 3)])
def test_crop_equals_padding_then_slicing(start: tuple[int, int, int]) -> None:
    volume = torch.arange(2 * 12 * 10 * 9).reshape(2, 12, 10, 9)
    padded = torch.nn.functional.pad(volume, (40,) * 6)
    size = (7, 11, 6)
    box = tuple(slice(s + 40, s + 40 + n) for s, n in zip(start, size, strict=True))
    expected = padded[(slice(None), *box)]
    assert torch.equal(transforms.crop(volume, start, size), expected)


def test_bare_patches_are_cut_from_the_middle() -> None:
    batch = random_batch((10, 12, 14))
    out = augment(batch, (6, 12, 9), OFF, 0)
    assert torch.equal(out.image, batch.image[:, :, 2:8, :, 2:11])
    assert torch.equal(out.label, batch.label[:, 2:8, :, 2:11])


def test_mirroring_flips_image_and_label_alike() -> None:
    batch = random_batch(CUBE)
    drawn = draw(OFF, 2, 3, CUBE, 0)
    mirror = np.array([[True, False, True], [False, True, False]])
    drawn = AugmentationDraw(
        drawn.spatial, dataclasses.replace(drawn.intensity, mirror=mirror)
    )
    out = apply(batch, CUBE, drawn)
    assert torch.equal(out.image[0], batch.image[0].flip((1, 3)))
    assert torch.equal(out.label[0], batch.label[0].flip((0, 2)))
    assert torch.equal(out.image[1], batch.image[1].flip((2,)))
    assert torch.equal(out.label[1], batch.label[1].flip((1,)))


def test_draws_of_the_sampler_take_precedence() -> None:
    batch, quiet = random_batch(CUBE), only_spatial(mirror_axes=())
    still = augment(dataclasses.replace(batch, wide=()), CUBE, quiet, 0)
    assert still.wide is None
    assert torch.equal(still.image, batch.image)
    big = random_batch((20, 20, 20), 1)
    place = (np.eye(3)[None], np.full((1, 3), 8.5))
    wide = (Wide(np.array([1]), big.image, big.label, *place),)
    out = augment(dataclasses.replace(batch, wide=wide), CUBE, quiet, 0)
    assert torch.equal(out.image[0], batch.image[0])
    torch.testing.assert_close(out.image[1], big.image[0, :, 1:17, 1:17, 1:17])
    assert torch.equal(out.label[1], big.label[0, 1:17, 1:17, 1:17])


def test_slabs_give_what_a_whole_image_gives() -> None:
    """The CPU's way to share work, beside the GPU's single call."""
    images = random_batch((14, 15, 16)).image
    matrices = draw_spatial(forced(), 2, CUBE, 1).matrices
    places = (matrices, np.array([[6.5, 7, 7.5], [5, 6, 7]]))
    shape, device = (14, 15, 16), torch.device("cpu")
    grid = transforms.affine_grid(*places, (9, 8, 11), shape, device)
    whole = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    assert whole.abs().max() > 0.5
    torch.testing.assert_close(transforms.sample(images, grid), whole)


# ---- intensities --------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [(0.5, 0.75, 1.0), (1.0, 0.0, 2.5)])
def test_blur_equals_scipy(sigma: tuple[float, float, float]) -> None:
    volumes = np.random.default_rng(0).normal(size=(2, 14, 17, 12))
    sigmas = np.array([sigma, (0.6, 1.9, 0.1)])  # radii differ within a batch
    found = transforms.gaussian_blur(torch.from_numpy(volumes), sigmas)
    for volume, own, blurred in zip(volumes, sigmas, found, strict=True):
        expected = scipy.ndimage.gaussian_filter(
            volume, own, mode="mirror", truncate=transforms.BLUR_TRUNCATE
        )
        np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-12)


def test_blur_of_a_thin_volume_keeps_its_mean_of_ones() -> None:
    ones = torch.ones((1, 2, 1, 3), dtype=torch.float64)
    found = transforms.gaussian_blur(ones, np.array([[1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found, ones)


def test_contrast_formula() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    found = transforms.contrast(values.repeat(2, 1, 1, 1), np.array([1.25, 0.5]))
    # mean 3; 0 -> -0.75, clamped to the range's end; 9 -> 10.5, clamped to 9.
    expected = torch.tensor([0.0, 0.5, 1.75, 9.0], dtype=torch.float64)
    torch.testing.assert_close(found[0, 0, 0], expected)
    expected = torch.tensor([1.5, 2.0, 2.5, 6.0], dtype=torch.float64)
    torch.testing.assert_close(found[1, 0, 0], expected)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("exponent", [0.7, 1.5])
def test_gamma_formula(exponent: float, inverted: bool) -> None:
    values = np.random.default_rng(0).normal(2, 3, size=(6, 7, 8))
    work = -values if inverted else values
    extent = work.max() - work.min()
    curved = ((work - work.min()) / extent) ** exponent * extent + work.min()
    curved = (curved - curved.mean()) / curved.std() * work.std() + work.mean()
    expected = -curved if inverted else curved
    both = torch.from_numpy(np.stack([values + 5, values]))
    exponents = np.array([1.0, exponent])
    found = transforms.gamma(both, exponents, inverted=inverted)
    np.testing.assert_allclose(found[0].numpy(), values + 5, atol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), expected, atol=1e-12)


def test_constant_images_survive_every_change() -> None:
    batch = Batch(
        torch.full((1, 2, 12, 12, 12), 3.0), torch.zeros(1, 12, 12, 12).short()
    )
    out = augment(batch, (12, 12, 12), forced(p_rotation=0, p_scaling=0, p_noise=0), 3)
    assert torch.isfinite(out.image).all()
    for volume in out.image[0]:
        torch.testing.assert_close(volume, volume[0, 0, 0].expand_as(volume))


def test_low_resolution_takes_nearest_voxels_and_interpolates() -> None:
    ramp = torch.arange(8.0)[None, :, None, None].expand(1, 8, 4, 4)
    found = transforms.low_resolution(ramp, np.array([[0.5, 1.0, 1.0]]))[0]
    # Kept: 1, 3, 5, 7, then read at -0.25, 0.25, 0.75 ... of them, clamped.
    expected = torch.tensor([1.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.0])
    torch.testing.assert_close(found[:, 0, 0], expected)
    assert torch.equal(transforms.low_resolution(ramp, np.ones((1, 3))), ramp)


def test_low_resolution_equals_resizing_there_and_back() -> None:
    volumes = random_batch((13, 10, 21), 1, 3).image[0].double()
    scales = np.array([[0.5, 0.62, 0.93], [0.71, 1.0, 0.5], [1.0, 0.01, 0.8]])
    sizes = [(6, 6, 20), (9, 10, 10), (13, 1, 17)]
    found = transforms.low_resolution(volumes, scales)
    for volume, size, coarse in zip(volumes, sizes, found, strict=True):
        small = torch.nn.functional.interpolate(
            volume[None, None], size=size, mode="nearest-exact"
        )
        back = torch.nn.functional.interpolate(
            small, size=(13, 10, 21), mode="trilinear"
        )
        torch.testing.assert_close(coarse, back[0, 0], atol=1e-6, rtol=0)


def test_noise_has_the_drawn_deviation_and_is_shared_by_the_channels() -> None:
    batch = Batch(torch.zeros(1, 2, 32, 32, 32), torch.zeros(1, 32, 32, 32).short())
    config = AugmentationConfig(
        p_noise=1.0, p_blur=0, p_brightness=0, p_contrast=0, p_low_resolution=0,
        p_gamma=0, p_gamma_inverted=0, p_rotation=0, p_scaling=0,
    )  # fmt: skip
    size = (32, 32, 32)
    deviation = draw(config, 1, 2, size, 11).intensity.noise_deviation[0]
    out = augment(batch, size, config, 11).image[0]
    assert float(out.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(out.mean())) < 4 * deviation / 32**1.5
    assert torch.equal(out[0], out[1])


def test_brightness_multiplies_each_channel_by_its_own_factor() -> None:
    batch = random_batch(CUBE, 1)
    drawn = draw(OFF, 1, 3, CUBE, 0)
    factors = np.array([[0.8, np.nan, 1.2]])
    intensity = dataclasses.replace(drawn.intensity, brightness=factors)
    out = apply(batch, CUBE, AugmentationDraw(drawn.spatial, intensity))
    torch.testing.assert_close(out.image[0, 0], batch.image[0, 0] * 0.8)
    assert torch.equal(out.image[0, 1], batch.image[0, 1])
    torch.testing.assert_close(out.image[0, 2], batch.image[0, 2] * 1.2)


# ---- the whole ----------------------------------------------------------------------


def test_a_seed_gives_the_same_bits_and_another_seed_others() -> None:
    batch = random_batch((24, 24, 24))
    first, second = (augment(batch, CUBE, forced(), 42) for _ in range(2))
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)
    assert not torch.equal(first.image, augment(batch, CUBE, forced(), 43).image)


def test_the_given_batch_is_left_alone_and_nothing_is_shared() -> None:
    batch = random_batch(CUBE)
    image, label = batch.image.clone(), batch.label.clone()
    out = augment(batch, CUBE, forced(), 1)
    assert torch.equal(batch.image, image)
    assert torch.equal(batch.label, label)
    plain = augment(batch, CUBE, OFF, 1)
    plain.image.zero_()
    plain.label.zero_()
    assert torch.equal(batch.image, image)
    assert torch.equal(batch.label, label)
    assert out.image.dtype == torch.float32
    assert out.label.dtype == torch.int16


@pytest.mark.parametrize("size", [(7, 24, 30), (17, 16, 15), (1, 20, 20), (40, 9, 33)])
def test_any_patch_shape_stays_finite(size: tuple[int, int, int]) -> None:
    batch = random_batch((33, 34, 35))
    for seed in range(3):
        out = augment(batch, size, forced(), seed)
        assert out.image.shape == (2, 3, *size)
        assert out.label.shape == (2, *size)
        assert torch.isfinite(out.image).all()
        assert set(out.label.unique().tolist()) <= {0, 1, 2, 3}


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    batch = random_batch((24, 24, 24))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = augment(batch, CUBE, forced(), 5)
        torch.set_num_threads(2)
        two = augment(batch, CUBE, forced(), 5)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one.image, two.image, atol=1e-5, rtol=1e-5)
    assert torch.equal(one.label, two.label)


@pytest.mark.parametrize("at_once", [1, 2**23])
def test_several_batches_at_once_are_what_each_is_alone(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)  # one volume at a time, or all
    config = forced(p_rotation=0.5, p_scaling=0.5, p_gamma=0.5, p_noise=0.5)
    batch = random_batch((20, 21, 22), 6)
    names = tuple("abcdef")
    batch = dataclasses.replace(batch, case_ids=names)
    seeds = [4, 2**90, -7]
    together = augment(batch, CUBE, config, seeds).split(2)
    assert [part.case_ids for part in together] == [
        ("a", "b"), ("c", "d"), ("e", "f")
    ]  # fmt: skip
    for part, alone, seed in zip(together, batch.split(2), seeds, strict=True):
        expected = augment(alone, CUBE, config, seed)
        torch.testing.assert_close(part.image, expected.image, atol=1e-5, rtol=1e-5)
        assert torch.equal(part.label, expected.label)


class Launches(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_many_samples_are_launched_like_few() -> None:
    """A GPU's CPU would be busier with the launches than the GPU with their work."""
    config = forced(p_rotation=0.0, p_scaling=0.0, p_noise=0.0, mirror_axes=())
    counts = []
    for samples in (2, 32):
        with Launches() as launches:
            augment(random_batch((6, 7, 8), samples), (6, 7, 8), config, 3)
        counts.append(launches.count)
    assert 20 < counts[0] < 300
    assert counts[1] < 1.1 * counts[0]  # a kernel may be a voxel wider


def test_disabled_augmentation_ignores_every_probability() -> None:
    batch = random_batch(CUBE)
    config = dataclasses.replace(forced(), enabled=False)
    out = augment(batch, CUBE, config, 0)
    assert torch.equal(out.image, batch.image)
    assert torch.equal(out.label, batch.label)


def test_half_precision_is_widened_before_anything_is_computed() -> None:
    batch = random_batch((33, 34, 35))
    half = dataclasses.replace(batch, image=batch.image.half())
    wide = dataclasses.replace(batch, image=half.image.float())
    for config in (forced(), OFF):
        found, expected = (augment(item, CUBE, config, 4) for item in (half, wide))
        assert found.image.dtype == torch.float32
        assert torch.equal(found.image, expected.image)


def test_intensities_change_without_a_look_at_a_number() -> None:
    """A GPU would wait for it; tensors without numbers raise where one is asked for."""
    config = forced(p_rotation=0.0, p_scaling=0.0)
    drawn = draw(config, 2, 3, CUBE, 1)
    with FakeTensorMode():
        image = torch.zeros((2, 3, *CUBE), dtype=torch.float16)
        label = torch.zeros((2, *CUBE), dtype=torch.int16)
        out = apply(Batch(image, label), CUBE, drawn)
    assert out.image.shape == image.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    batch = random_batch((40, 38, 36))
    config = forced(p_noise=0.0)  # noise fields are the device's own
    for size in ((24, 24, 24), (7, 24, 30)):
        here = augment(batch, size, config, 3)
        there = augment(batch.to("cuda"), size, config, 3)
        again = augment(batch.to("cuda"), size, config, 3)
        assert there.image.device.type == "cuda"
        assert torch.equal(there.image, again.image)
        torch.testing.assert_close(there.image.cpu(), here.image, atol=1e-3, rtol=1e-3)
        assert (there.label.cpu() == here.label).float().mean() > 0.999
