"""Resampling against SciPy and torch, on grids of every size."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional

from segmamba.data.resample import (
    resample_image,
    resample_label_map,
    resample_slabs,
    resample_stream,
    resampled_shape,
    split_rows,
)

SHAPES = st.tuples(*[st.integers(1, 9)] * 3)


def linear_oracle(array: np.ndarray, shape) -> np.ndarray:
    """Float64 linear interpolation at the voxel centres, edges held."""
    axes = [
        np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        for new, old in zip(shape, array.shape, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return ndimage.map_coordinates(array.astype(np.float64), grid, order=1)


def test_resampled_shape_keeps_the_extent():
    assert resampled_shape((240, 240, 155), (1, 1, 1), (2, 0.5, 1)) == (120, 480, 155)
    assert resampled_shape((10, 3, 1), (1, 1, 1), (3, 3, 30)) == (3, 1, 1)


@given(SHAPES, SHAPES, st.integers(0, 99))
@example((6, 8, 7), (2, 7, 7), 55)
@settings(max_examples=60, deadline=None)
def test_linear_images_against_scipy(before, after, seed):
    image = np.random.default_rng(seed).normal(size=(2, *before)).astype(np.float32)
    resampled = resample_image(image, after)
    assert resampled.dtype == np.float32
    for channel, source in zip(resampled, image, strict=True):
        # float32 places a voxel to within its precision of the longest side.
        atol = np.finfo(np.float32).eps * (max(before) + 4) * np.abs(source).max()
        np.testing.assert_allclose(channel, linear_oracle(source, after), atol=atol)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_a_ramp_stays_where_it_is_in_space(method):
    # Position in mm at 2 mm spacing, to be seen at 1.25 mm: no shift by half a voxel.
    centres = (np.arange(20) + 0.5) * 2.0
    image = np.broadcast_to(centres[:, None, None], (20, 4, 4))[None].astype(np.float32)
    resampled = resample_image(image, (32, 4, 4), method)
    wanted = (np.arange(32) + 0.5) * 1.25
    np.testing.assert_allclose(resampled[0, 8:-8, 1, 1], wanted[8:-8], atol=0.01)


def test_cubic_follows_a_smooth_signal_better_than_linear():
    def signal(n):
        return np.sin(2 * np.pi * 3 * (np.arange(n) + 0.5) / n)

    image = np.broadcast_to(signal(24)[:, None, None], (24, 3, 3))[None]
    image = image.astype(np.float32)
    errors = [
        np.abs(resample_image(image, (60, 3, 3), m)[0, 6:-6, 1, 1] - signal(60)[6:-6])
        for m in ("linear", "cubic")
    ]
    assert errors[1].max() < 0.2 * errors[0].max()


def test_an_unchanged_shape_costs_nothing():
    image = np.ones((1, 3, 4, 5), np.float32)
    assert resample_image(image, (3, 4, 5)) is image
    label = np.ones((3, 4, 5), np.int16)
    assert resample_label_map(label, (3, 4, 5)) is label


def heaviest_oracle(label: np.ndarray, shape) -> tuple[np.ndarray, np.ndarray]:
    values = np.unique(label)
    shares = np.stack([linear_oracle(label == value, shape) for value in values])
    ordered = np.sort(shares, axis=0)
    margin = ordered[-1] - ordered[-2] if len(values) > 1 else np.ones(shape)
    return values[shares.argmax(axis=0)], margin


@given(SHAPES, SHAPES, st.integers(0, 99), st.sampled_from([0.05, 0.4, 1.0]))
@settings(max_examples=80, deadline=None)
def test_labels_against_one_hot_and_argmax(before, after, seed, density):
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array([1, 2, 4, -1], np.int16), before)
    label[rng.random(before) > density] = 0
    resampled = resample_label_map(label, after)
    expected, margin = heaviest_oracle(label, after)
    assert resampled.dtype == np.int16
    assert resampled.shape == after
    clear = margin > 1e-5  # ties may fall either way in float32
    np.testing.assert_array_equal(resampled[clear], expected[clear])


def test_a_tie_goes_to_the_lower_label():
    label = np.array([0, 0, 3, 3], np.int16).reshape(4, 1, 1)
    resampled = resample_label_map(label, (5, 1, 1))
    assert resampled[2, 0, 0] == 0


def test_a_ball_keeps_its_volume_and_place():
    grid = np.stack(np.meshgrid(*[np.arange(40) + 0.5] * 3, indexing="ij"))
    ball = (np.linalg.norm(grid - 20, axis=0) < 11).astype(np.int16)
    resampled = resample_label_map(ball, (40, 27, 60))
    volume = resampled.sum() * (40 / 27) * (40 / 60)
    assert volume == pytest.approx(ball.sum(), rel=0.02)
    centre = np.argwhere(resampled).mean(axis=0) + 0.5
    np.testing.assert_allclose(centre / resampled.shape, 0.5, atol=0.005)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(9, 5, 13), (4, 11, 6), (7, 8, 9)])
def test_slabs_together_are_torch_s_trilinear(dtype, shape):
    logits = torch.randn(3, 7, 8, 9).to(dtype)
    whole = functional.interpolate(
        logits[None].float(), size=shape, mode="trilinear", align_corners=False
    )[0]
    limit = 2 * 4 * 3 * shape[1] * shape[2]  # two slices
    parts = list(resample_slabs(logits, shape, slab_bytes=limit))
    assert len(parts) > 1
    assert all(piece.numel() * 4 <= limit for _, piece in parts)
    joined = torch.cat([piece for _, piece in parts], dim=1)
    torch.testing.assert_close(joined, whole, atol=2e-6, rtol=1e-5)
    assert [part.start for part, _ in parts] == list(range(0, shape[0], 2))


@given(SHAPES, SHAPES, st.integers(1, 4), st.sets(st.integers(1, 8)), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_a_stream_of_slabs_is_the_whole_in_pieces(before, after, parts, cuts, seed):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(2, *before)).astype(np.float32))
    whole = torch.cat([piece for _, piece in resample_slabs(logits, after)], dim=1)
    ends = [0, *sorted(cut for cut in cuts if cut < before[0]), before[0]]
    found = torch.full_like(whole, torch.nan)
    for rows in split_rows(before[1], after[1], parts):
        slabs = [
            (slice(a, b), logits[:, a:b, rows.inner])
            for a, b in itertools.pairwise(ends)
        ]
        limit = int(random.integers(1, 2000))
        size = (before[0], before[1])
        for part, piece in resample_stream(slabs, size, after, rows, limit):
            assert torch.isnan(found[:, part, rows.outer]).all()
            found[:, part, rows.outer] = piece
    if before[1:] == after[1:]:  # torch's interpolation depends on the piece's size
        assert torch.equal(found, whole)
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-6)


def test_label_maps_take_few_bytes_a_labelled_voxel():
    label = np.ones((40, 80, 80), np.int16)
    tracemalloc.start()
    try:
        resample_label_map(label, (40, 76, 76))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * label.size  # their places alone took 48
