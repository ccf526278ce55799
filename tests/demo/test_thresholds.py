"""The threshold baseline solves what thresholds can solve, and reports honestly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.demo.thresholds import Thresholds, segment, threshold_baseline
from segmamba.errors import ConfigError
from segmamba.io import Volume, write_label_map, write_volume

LABELS = LabelScheme(
    {"background": 0, "NCR": 1, "ED": 2, "ET": 3},
    regions={"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
    regions_order=(2, 1, 3),
)


def onion(size=28):
    """A tumour of three cubic shells in a brain that fills the image but a rim."""
    label = np.zeros((size, size, size), np.uint8)
    label[6:20, 6:20, 6:20] = 2
    label[9:17, 9:17, 9:17] = 3
    label[11:15, 11:15, 11:15] = 1
    return label


def write_case(root: Path, name: str, scale: float, flair_lesion=1.8) -> Case:
    """Write a case; thresholds suffice unless the lesion is as dark as the brain."""
    rng = np.random.default_rng(len(name))
    label = onion()
    brain = np.zeros(label.shape, bool)
    brain[2:-2, 2:-2, 2:-2] = True
    values = {
        "t1n": (1.0, 0.9, 0.9, 0.9),
        "t1c": (1.0, 0.4, 0.9, 2.5),
        "t2w": (1.0, 1.4, 1.4, 1.4),
        "t2f": (1.0, flair_lesion, flair_lesion, flair_lesion),
    }
    images = []
    for channel, levels in values.items():
        image = np.array(levels)[label] + rng.normal(0, 0.01, label.shape)
        array = (image * scale * brain).astype(np.float32)
        path = root / name / f"{name}-{channel}.nii.gz"
        write_volume(path, Volume(array[None], np.eye(4)))
        images.append(path)
    write_label_map(root / name / f"{name}-seg.nii.gz", label, np.eye(4))
    return Case(name, tuple(images), root / name / f"{name}-seg.nii.gz")


def make_dataset(root: Path, cases, channels=("t1n", "t1c", "t2w", "t2f")) -> Dataset:
    return Dataset("onions", root, "brats", channels, LABELS, tuple(cases))


def test_it_solves_a_case_that_thresholds_can_solve(tmp_path):
    """Z-scores make it blind to each case's own scale."""
    scales = {"a": 100.0, "b": 700.0, "c": 1500.0}
    cases = [write_case(tmp_path, name, scale) for name, scale in scales.items()]
    result = threshold_baseline(make_dataset(tmp_path, cases), ["a", "b"], ["c"])
    assert set(result.cases) == {"c"}
    assert result.mean["ET"] > 0.98
    assert result.mean["TC"] > 0.98
    assert result.mean["WT"] > 0.95
    assert result.mean_dice == pytest.approx(np.mean(list(result.mean.values())))


def test_it_fails_where_flair_shows_nothing(tmp_path):
    cases = [write_case(tmp_path, name, 100.0, flair_lesion=1.0) for name in "ab"]
    result = threshold_baseline(make_dataset(tmp_path, cases), ["a"], ["b"])
    assert result.mean["WT"] < 0.5


def test_the_held_out_case_does_not_choose(tmp_path):
    cases = [
        write_case(tmp_path, "a", 100.0),
        write_case(tmp_path, "b", 100.0),
        write_case(tmp_path, "cc", 100.0, flair_lesion=0.2),
    ]
    data = make_dataset(tmp_path, cases)
    with_b = threshold_baseline(data, ["a"], ["b"])
    with_c = threshold_baseline(data, ["a"], ["cc"])
    assert with_b.thresholds == with_c.thresholds


def test_segment_keeps_the_largest_piece_and_fills_it():
    flair = np.zeros((20, 20, 20), np.float32)
    flair[2:10, 2:10, 2:10] = 3
    flair[4:6, 4:6, 4:6] = 0
    flair[15:17, 15:17, 15:17] = 3
    t1c = np.zeros_like(flair)
    t1c[4:9, 4:9, 4:9] = 2
    t1c[6, 6, 6] = 0
    t1c[16, 16, 16] = 9
    numbers = Thresholds(flair=1, flair_smoothing=0, t1c=1, closing=0, dark=None)
    found = segment(flair, t1c, numbers)
    assert found["WT"].sum() == 8**3
    assert found["ET"].sum() == 5**3 - 1
    assert found["TC"].sum() == 5**3


def test_wrong_data_is_refused(tmp_path):
    case = write_case(tmp_path, "a", 100.0)
    data = make_dataset(tmp_path, [case], channels=("T1", "T1c", "T2", "PD"))
    with pytest.raises(ConfigError, match=r"t2f or flair, found T1, T1c, T2, PD"):
        threshold_baseline(data, ["a"], ["a"])
    with pytest.raises(ConfigError, match="zz"):
        threshold_baseline(make_dataset(tmp_path, [case]), ["zz"], ["a"])
    plain = LabelScheme({"background": 0, "a": 1, "b": 2})
    data = Dataset("x", tmp_path, "brats", ("t1c", "t2f", "x", "y"), plain, (case,))
    with pytest.raises(ConfigError, match="nested regions"):
        threshold_baseline(data, ["a"], ["a"])
