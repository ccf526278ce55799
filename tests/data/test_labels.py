"""Label schemes: what goes into the network and what comes out of it."""

from __future__ import annotations

import numpy as np
import pytest

from segmamba.data.labels import IGNORED, LabelScheme
from segmamba.data.layouts.brats import brats_labels
from segmamba.errors import ConfigError

CLASSES = LabelScheme(labels={"background": 0, "liver": 2, "spleen": 7}, ignore_label=9)


def test_classes_are_numbered_in_ascending_order() -> None:
    assert CLASSES.class_values == (0, 2, 7)
    assert CLASSES.num_outputs == 3
    assert CLASSES.evaluated == {"liver": (2,), "spleen": (7,)}
    assert CLASSES.known_values == (0, 2, 7, 9)
    assert not CLASSES.is_region_based
    encoded = CLASSES.encode(np.array([0, 2, 7, 9]))
    assert encoded.dtype == np.int16
    assert encoded.tolist() == [0, 1, 2, IGNORED]


def test_classes_decode_to_the_data_sets_integers() -> None:
    logits = np.array([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    decoded = CLASSES.decode(logits)
    assert decoded.dtype == np.uint8
    assert decoded.tolist() == [0, 2, 7]


def test_brats_regions_overlap() -> None:
    scheme = brats_labels(enhancing=4)
    assert scheme.num_outputs == 3
    assert scheme.evaluated == {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    encoded = scheme.encode(np.array([0, 1, 2, 4]))
    assert encoded.tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    "scheme", [brats_labels(3), brats_labels(4), brats_labels(3, 4)]
)
def test_regions_come_back_to_labels(scheme: LabelScheme) -> None:
    labels = np.array(scheme.class_values)
    logits = scheme.encode(labels) * 2.0 - 1.0
    assert np.array_equal(scheme.decode(logits), labels)


def test_resection_cavity_lies_outside_the_whole_tumour() -> None:
    scheme = brats_labels(3, 4)
    assert scheme.regions["WT"] == (1, 2, 3)
    assert scheme.regions["RC"] == (4,)
    assert scheme.regions_order == (2, 1, 3, 4)


def test_ignored_voxels_are_so_in_every_region() -> None:
    scheme = LabelScheme(
        labels={"background": 0, "a": 1, "b": 2},
        regions={"both": (1, 2), "b": (2,)},
        regions_order=(1, 2),
        ignore_label=3,
    )
    assert scheme.encode(np.array([2, 3, 0])).tolist() == [[1, -1, 0], [1, -1, 0]]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [((0, 300), np.int16), ((0, -1), np.int16), ((0, 255), np.uint8)],
)
def test_decoded_type_holds_every_label(values, dtype) -> None:
    scheme = LabelScheme(labels={"background": values[0], "x": values[1]})
    decoded = scheme.decode(np.eye(2))
    assert decoded.dtype == dtype
    assert sorted(decoded.tolist()) == sorted(values)


def test_decoded_type_holds_the_integer_written_for_a_region() -> None:
    scheme = LabelScheme({"background": 0, "x": 1}, {"X": (1,)}, (300,))
    assert scheme.decode(np.array([[1.0, -1.0]])).tolist() == [300, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": {"a": 1}}, "background"),
        ({"labels": {"b": 0}, "regions": {"x": (1,)}}, "differ in number"),
        ({"labels": {"b": 0, "x": 1}, "ignore_label": 1}, "ignore label"),
        ({"labels": {"b": 0, "x": 40000}}, "too large"),
        (
            {"labels": {"b": 0}, "regions": {"x": (0,)}, "regions_order": (40000,)},
            "too large",
        ),
    ],
)
def test_contradictions_are_refused(arguments, says) -> None:
    with pytest.raises(ConfigError, match=says):
        LabelScheme(**arguments)
