"""Axis codes, boxes and the record of what preprocessing did."""

from __future__ import annotations

import itertools
import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy.spatial.transform import Rotation

from segmamba.data.geometry import (
    Geometry,
    axis_codes,
    axis_transform,
    nonzero_box,
    orient_array,
    world_axes,
)
from segmamba.errors import ConfigError, GeometryError

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*order)
]


def affine_of(codes: str, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, mm) in enumerate(zip(codes, spacing, strict=True)):
        world = "RAS".find(code) if code in "RAS" else "LPI".find(code)
        affine[world, axis] = mm if code in "RAS" else -mm
    return affine


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_codes_agree_with_nibabel(codes):
    rng = np.random.default_rng(ORIENTATIONS.index(codes))
    for _ in range(5):
        turn = Rotation.from_rotvec(rng.uniform(-0.3, 0.3, 3)).as_matrix()
        affine = affine_of(codes, rng.uniform(0.3, 7, 3))
        affine[:3, :3] = turn @ affine[:3, :3]
        affine[:3, 3] = rng.normal(size=3) * 100
        assert axis_codes(affine) == codes
        assert axis_codes(affine) == "".join(nib.aff2axcodes(affine))


def test_codes_of_a_sheared_affine():
    affine = affine_of("LPS", (1, 1, 5))
    affine[0, 2] = 2.0
    assert axis_codes(affine) == "LPS"


def test_codes_are_three_different_ones_even_at_45_degrees():
    turn = Rotation.from_euler("z", 45, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn
    assert sorted(world_axes(axis_codes(affine))) == [0, 1, 2]


@pytest.mark.parametrize("broken", [np.zeros((4, 4)), np.diag([1, 1, 0, 1.0])])
def test_flat_affine_is_an_error(broken):
    with pytest.raises(GeometryError, match="three dimensions"):
        axis_codes(broken)


@pytest.mark.parametrize("codes", ["SP", "SPLL", "spl", "SPR1", "RLS", "", "XPL"])
def test_bad_codes_are_an_error(codes):
    with pytest.raises(ConfigError, match="such as SPL"):
        world_axes(codes)


@pytest.mark.parametrize("target", ["SPL", "RAS", "PSL"])
def test_orienting_agrees_with_nibabel(target):
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    for codes in ORIENTATIONS:
        image = nib.Nifti1Image(array, affine_of(codes))
        moved = image.as_reoriented(
            ornt_transform(axcodes2ornt(codes), axcodes2ornt(target))
        )
        oriented = orient_array(array[None], *axis_transform(codes, target))[0]
        np.testing.assert_array_equal(oriented, np.asarray(moved.dataobj))


def geometry_of(source="LPS", target="SPL", shape=(5, 6, 7)) -> Geometry:
    order, flips = axis_transform(source, target)
    affine = tuple(map(tuple, affine_of(source, (1.0, 2.0, 3.0)).tolist()))
    return Geometry(shape, affine, order, flips, ((1, 6), (0, 4), (2, 5)), (15, 4, 6))


def test_geometry_goes_through_json():
    geometry = geometry_of()
    data = json.loads(json.dumps(geometry.to_dict()))
    assert Geometry.from_dict(data) == geometry
    data["crops"] = data.pop("crop")
    with pytest.raises(ConfigError, match="Did you mean 'crop'"):
        Geometry.from_dict(data, source="case.json")


def test_geometry_knows_its_shapes_and_spacing():
    geometry = geometry_of("LPS", "SPL")
    assert geometry.cropped_shape == (5, 4, 3)
    assert geometry.spacing_mm == pytest.approx((3.0 * 5 / 15, 2.0, 1.0 * 3 / 6))


@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.lists(st.integers(0, 10_000), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_nonzero_box_against_argwhere(shape, places):
    array = np.zeros((2, *shape), np.float32)
    for place in places:
        array.reshape(-1)[place % array.size] = -1.5
    found = np.argwhere(array)[:, 1:]
    expected = (
        tuple(
            (int(a), int(b) + 1)
            for a, b in zip(found.min(0), found.max(0), strict=True)
        )
        if len(found)
        else tuple((0, n) for n in shape)
    )
    assert nonzero_box(array) == expected
