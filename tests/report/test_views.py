"""Planes lie on the page as radiologists expect, whatever the storage order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from segmamba.report.views import PLANES, section_indices, turn

AXIAL, CORONAL, SAGITTAL = PLANES
SHAPE = (7, 9, 11)  # along R, A and S
SPACING = (1.0, 2.0, 4.0)
MARK = {"L": (0, 4, 5), "P": (3, 0, 5), "I": (3, 4, 0)}  # index of a voxel at that end


def stored(order, signs, tilt=0.0):
    """Store a brain with marks at its left, back and bottom in another axis order."""
    world = np.zeros(SHAPE, np.int16)
    for value, index in enumerate(MARK.values(), start=1):
        world[index] = value
    array = np.transpose(world, order)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(SPACING)[:, list(order)]
    for axis, sign in enumerate(signs):
        if sign < 0:
            array = np.flip(array, axis)
            affine[:3, axis] *= -1
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    return array, turned @ affine


ORDERS = list(
    itertools.product(
        itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)
    )
)


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_all_48_storage_orders_look_alike(order, signs):
    array, affine = stored(order, signs, tilt=0.3)
    turned = turn(array, affine)
    assert turned.array.shape == SHAPE
    assert turned.spacing_mm == pytest.approx(SPACING)
    axial = turned.cut(AXIAL, 5)
    assert axial.shape == (9, 7)
    assert axial[4, 6] == 1  # the left is at the right edge
    assert axial[8, 3] == 2  # the back is at the bottom
    coronal = turned.cut(CORONAL, 4)
    assert coronal.shape == (11, 7)
    assert coronal[5, 6] == 1
    assert coronal[10, 3] == 3  # the feet are at the bottom
    sagittal = turned.cut(SAGITTAL, 3)
    assert sagittal.shape == (11, 9)
    assert sagittal[5, 8] == 2  # the back is at the right edge
    assert sagittal[10, 4] == 3


def test_pixels_keep_their_proportions():
    turned = turn(*stored((0, 1, 2), (1, 1, 1)))
    assert turned.aspect(AXIAL) == pytest.approx(2.0)
    assert turned.aspect(CORONAL) == pytest.approx(4.0)
    assert turned.aspect(SAGITTAL) == pytest.approx(2.0)
    assert turned.shape_on_page(AXIAL) == pytest.approx(18 / 7)


def test_edges_are_labelled_in_radiological_convention():
    assert AXIAL.edges == ("R", "L", "A", "P")
    assert CORONAL.edges == ("R", "L", "S", "I")
    assert SAGITTAL.edges == ("A", "P", "S", "I")


def test_section_of_one_label_is_its_largest():
    label = np.zeros((5, 6, 7), int)
    label[1, :3, :3] = 1
    label[3, 0, 0] = 1
    assert section_indices(label) == (1, 0, 0)


def test_small_labels_draw_the_section_to_them():
    label = np.zeros((9, 9, 9), int)
    label[:, :, 2] = 1
    label[0, :, 6] = 1
    label[4, 4, 6] = 2
    assert section_indices(label)[2] == 6


def test_no_label_gives_the_middle():
    assert section_indices(np.zeros((5, 6, 7), int)) == (2, 3, 3)
