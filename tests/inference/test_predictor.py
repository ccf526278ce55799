"""Label maps lie where the anatomy lies, however the scan's axes run."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff

from segmamba.config import NetworkConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    FormatError,
    GeometryError,
    SegMambaError,
)
from segmamba.inference import predictor as predictor_module
from segmamba.inference.predictor import Predictor
from segmamba.io import Volume

CLASSES = LabelScheme({"background": 0, "low": 2, "high": 5})
SPACING_RAS = (1.0, 2.0, 3.0)
ORIENTATIONS = [
    np.array(list(zip(order, flips, strict=True)), float)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def make_plan(channels: int = 1, **changes) -> Plan:
    """D, H, W run to the top, back and left, as SPL says; voxels stay as they are."""
    defaults = {
        "orientation": "SPL",
        "spacing_mm": (3.0, 2.0, 1.0),
        "patch_size": (8, 8, 8),
        "batch_size": 2,
        "normalization": (ChannelNormalization("none"),) * channels,
        "network": NetworkConfig(in_channels=channels, out_channels=3),
    }
    return Plan(**{**defaults, **changes})


def threshold(batch: torch.Tensor) -> torch.Tensor:
    """0 below 4, class 1 from 4, class 2 from 8: certain everywhere."""
    x = batch[:, :1]
    scores = [x < 4, (x >= 4) & (x < 8), x >= 8]
    return 10 * torch.cat(scores, dim=1).float()


def make_network(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Threshold what lies one voxel before along `dim` (2 D, 3 H, 4 W)."""
    return lambda batch: threshold(torch.roll(batch, 1, dims=dim))


def thresholded(array: np.ndarray) -> np.ndarray:
    return np.select([array >= 8, array >= 4], [5, 2], 0)


def ras_array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 12, (7, 10, 13)).astype(np.float32)


def oriented(orientation: np.ndarray, oblique: bool = False) -> Volume:
    """The same anatomy with its axes in another order and direction."""
    affine = np.diag([*SPACING_RAS, 1.0])
    affine[:3, 3] = (-11.5, 7.25, 40)
    if oblique:
        affine = rotation(0.3, -0.25, 0.2) @ affine
    array = apply_orientation(ras_array(), orientation)
    return Volume(array[None], affine @ inv_ornt_aff(orientation, (7, 10, 13)))


def rotation(*radians: float) -> np.ndarray:
    matrix = np.eye(4)
    for axis, angle in enumerate(radians):
        i, j = [n for n in range(3) if n != axis]
        turn = np.eye(4)
        turn[[i, j, i, j], [i, j, j, i]] = (
            *([np.cos(angle)] * 2),
            -np.sin(angle),
            np.sin(angle),
        )
        matrix = matrix @ turn
    return matrix


def make_predictor(network=threshold, channels: int = 1, plan=None, **options):
    names = [f"channel{i}" for i in range(channels)]
    settings = {"device": "cpu", "precision": "fp32", **options}
    return Predictor(network, plan or make_plan(channels), names, CLASSES, **settings)


def test_there_are_48_orientations():
    assert len({orientation.tobytes() for orientation in ORIENTATIONS}) == 48


@pytest.mark.parametrize("oblique", [False, True])
def test_all_axis_orders_give_the_thresholded_scan(oblique):
    predictor = make_predictor()
    for orientation in ORIENTATIONS:
        volume = oriented(orientation, oblique)
        prediction = predictor(volume)
        assert prediction.label_map.dtype.kind in "iu"
        np.testing.assert_array_equal(
            prediction.label_map, thresholded(volume.array[0])
        )
        np.testing.assert_array_equal(prediction.affine, volume.affine)


@pytest.mark.parametrize(
    ("dim", "ras_axis", "step"), [(2, 2, 1), (3, 1, -1), (4, 0, -1)]
)
def test_a_shift_goes_the_same_way_in_the_patient(dim, ras_axis, step):
    """D runs up, H to the back, W to the left: against the axes A and R of RAS."""
    predictor = make_predictor(
        make_network(dim), plan=make_plan(patch_size=(13, 10, 7)), mirror=False
    )
    expected = thresholded(np.roll(ras_array(), step, axis=ras_axis))
    for orientation in ORIENTATIONS:
        label_map = predictor(oriented(orientation)).label_map
        np.testing.assert_array_equal(
            label_map, apply_orientation(expected, orientation)
        )


@pytest.mark.parametrize("orientation", ORIENTATIONS[5::11])
def test_saved_label_map_has_the_files_geometry(tmp_path, orientation):
    volume = oriented(orientation, oblique=True)
    image = nib.Nifti1Image(volume.array[0].astype(np.int16), volume.affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "scan.nii.gz")
    prediction = make_predictor()(tmp_path / "scan.nii.gz")
    path = prediction.save(tmp_path / "out" / "label.nii.gz")
    scan, label = nib.load(tmp_path / "scan.nii.gz"), nib.load(path)
    np.testing.assert_array_equal(label.affine, scan.affine)
    assert label.shape == scan.shape
    assert np.asarray(label.dataobj).dtype.kind in "iu"
    np.testing.assert_array_equal(
        np.asarray(label.dataobj), thresholded(volume.array[0])
    )
    assert prediction.spacing_mm == pytest.approx(scan.header.get_zooms(), rel=1e-5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["label.nii.gz"]


def test_crop_and_resampling_are_undone():
    """A block at half the spacing comes back on the scan's grid."""
    array = np.zeros((1, 20, 24, 16), np.float32)
    array[0, 4:16, 6:18, 4:12] = 5
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    plan = make_plan(spacing_mm=(1.0, 1.0, 1.0))
    label_map = make_predictor(plan=plan)(Volume(array, affine)).label_map
    np.testing.assert_array_equal(label_map, np.where(array[0] == 5, 2, 0))


def test_arrays_with_and_without_an_affine(caplog):
    predictor = make_predictor(plan=make_plan(spacing_mm=(1.0, 1.0, 1.0)))
    array = ras_array()
    with caplog.at_level(logging.WARNING):
        plain = predictor(array)
    assert "without an affine" in caplog.text
    np.testing.assert_array_equal(plain.label_map, thresholded(array))
    np.testing.assert_array_equal(plain.affine, np.eye(4))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for voxels in (array, array[None], torch.from_numpy(array)):
        given = predictor.predict(voxels, affine=affine)
        np.testing.assert_array_equal(given.label_map, thresholded(array))
        np.testing.assert_array_equal(given.affine, affine)
    with pytest.raises(GeometryError, match="scan shape"):
        predictor(array[0])
    for odd in (nib.Nifti1Image(array, affine), array.astype(complex), 3):
        with pytest.raises(ConfigError, match="not a scan"):
            predictor(odd)
    with pytest.raises(ConfigError, match="affine is for voxels"):
        predictor(Volume(array[None], affine), affine=affine)


def test_channels_are_read_in_order(tmp_path):
    array = ras_array()
    for name, data in (("a", array), ("b", np.zeros_like(array))):
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii")
    files = [tmp_path / "a.nii", tmp_path / "b.nii"]
    plan = make_plan(2, spacing_mm=(1.0, 1.0, 1.0))
    predictor = make_predictor(channels=2, plan=plan)
    np.testing.assert_array_equal(predictor(files).label_map, thresholded(array))
    assert not predictor(files[::-1]).label_map.any()
    four = np.stack([array, np.zeros_like(array)], axis=-1)
    nib.save(nib.Nifti1Image(four, np.eye(4)), tmp_path / "both.nii.gz")
    both = predictor(str(tmp_path / "both.nii.gz")).label_map
    np.testing.assert_array_equal(both, thresholded(array))


def test_wrong_number_of_channels_names_them(tmp_path):
    predictor = make_predictor(channels=2)
    text = r"2 channels \(channel0, channel1\), found 1"
    with pytest.raises(ConfigError, match=text):
        predictor(oriented(ORIENTATIONS[0]))
    with pytest.raises(ConfigError, match=r"found 3, in a\.nii"):
        predictor(["a.nii", "b.nii", "c.nii"])
    with pytest.raises(ConfigError, match="found 0"):
        predictor([])
    with pytest.raises(ConfigError, match="channels don't fit the plan"):
        Predictor(threshold, make_plan(2), ["T1"], CLASSES, device="cpu")


def test_bad_scans_are_refused(tmp_path):
    predictor = make_predictor()
    with pytest.raises(SegMambaError, match=r"gone\.nii"):
        predictor(tmp_path / "gone.nii")
    with pytest.raises(FormatError, match="folder is not a scan"):
        predictor(tmp_path)
    array = ras_array()
    array[0, 0, 0] = np.nan
    with pytest.raises(SegMambaError, match="NaN"):
        predictor(array, affine=np.eye(4))
    with pytest.raises(SegMambaError, match="not finite"):
        make_predictor(lambda b: threshold(b) * np.inf)(ras_array(), affine=np.eye(4))


def test_probabilities_of_classes_and_regions(tmp_path):
    volume = oriented(ORIENTATIONS[17])
    prediction = make_predictor().predict(volume, probabilities=True)
    assert prediction.names == ("background", "low", "high")
    maps = prediction.probabilities
    assert maps is not None
    assert maps.dtype == np.float16
    assert maps.shape == (3, *volume.shape)
    np.testing.assert_allclose(maps.sum(axis=0, dtype=np.float32), 1, atol=2e-3)
    values = np.array([0, 2, 5])[maps.argmax(axis=0)]
    np.testing.assert_array_equal(values, prediction.label_map)
    path = prediction.save_probabilities(tmp_path / "p.nii.gz")
    written = nib.load(path)
    assert written.shape == (*volume.shape, 3)
    np.testing.assert_allclose(written.get_fdata(), np.moveaxis(maps, 0, -1), atol=1e-3)
    with pytest.raises(ConfigError, match="probabilities=True"):
        make_predictor()(volume).save_probabilities(tmp_path / "no.nii.gz")


def test_regions_overwrite_in_their_order():
    scheme = LabelScheme(
        {"background": 0, "edema": 1, "core": 2}, {"WT": (1, 2), "TC": (2,)}, (1, 2)
    )

    def network(batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch - 3.5, batch - 7.5], dim=1)

    predictor = Predictor(
        network, make_plan(), ["T1"], scheme, device="cpu", precision="fp32"
    )
    volume = oriented(ORIENTATIONS[30])
    prediction = predictor(volume)
    assert prediction.names == ("WT", "TC")
    x = volume.array[0]
    expected = np.select([x >= 8, x >= 4], [2, 1], 0)
    np.testing.assert_array_equal(prediction.label_map, expected)


def test_folds_vote_by_their_logits():
    """Two weak against one strong: the mean of logits decides, not the majority."""

    def says(index: int, strength: float):
        scores = torch.zeros(3)
        scores[index] = strength
        return lambda b: scores.view(1, 3, 1, 1, 1).expand(len(b), 3, *b.shape[2:])

    networks = [says(0, 1), says(0, 1), says(2, 3)]
    label_map = make_predictor(networks)(ras_array(), affine=np.eye(4)).label_map
    assert (label_map == 5).all()


def test_options_reach_the_windows():
    calls = []

    def network(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return threshold(batch)

    volume = oriented(ORIENTATIONS[0])  # 13 x 10 x 7 along D, H, W
    make_predictor(network, mirror=False, overlap=0.0)(volume)
    assert calls == [1] * 4
    calls.clear()
    make_predictor(network, mirror=(0, 2), batch_size=3)(volume)
    assert calls == [3] * 8  # 4 mirrorings of 6 windows
    for option in ({"overlap": 1}, {"batch_size": 0}, {"mirror": (0, 5)}):
        with pytest.raises(ConfigError, match="bad"):
            make_predictor(**option)


def test_networks_evaluate_and_go_on_training():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 1), torch.nn.Dropout(0.5))
    network.train()
    network[0].eval()
    predictor = make_predictor(network)
    first, second = (
        predictor.predict(oriented(ORIENTATIONS[0]), probabilities=True).probabilities
        for _ in "ab"
    )
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first, second)
    assert [module.training for module in network.modules()] == [True, False, True]
    assert all(parameter.requires_grad for parameter in network.parameters())


def greedy(batch: torch.Tensor) -> torch.Tensor:
    return torch.empty(10**14)  # 400 TB: the system refuses at once


@pytest.mark.parametrize("problem", ["torch", "numpy"])
def test_too_little_memory_says_what_helps(monkeypatch, problem):
    if problem == "numpy":
        monkeypatch.setattr(
            predictor_module, "preprocess_image", lambda *_: np.empty(10**15)
        )
    message = r"cpu has too little memory for the scan: expected room for a window of "
    found = {"torch": r"381469726\.6 MiB", "numpy": r"7\.11 PiB"}[problem]
    with pytest.raises(
        BackendUnavailableError, match=rf"{message}.*{found}.*Lower patch_size"
    ):
        make_predictor(greedy)(oriented(ORIENTATIONS[0]))


def test_other_errors_of_a_network_stay_what_they_are():
    def broken(batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match=r"^sizes differ$"):
        make_predictor(broken)(oriented(ORIENTATIONS[0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_says_what_is_there():
    with pytest.raises(BackendUnavailableError, match=r"'cuda' is not there.*'cpu'"):
        make_predictor(device="cuda")
    with pytest.raises(ConfigError, match="unknown device"):
        make_predictor(device="tpu")


def test_progress_names_the_file(tmp_path):
    path = Path(tmp_path / "brain.nii")
    nib.save(nib.Nifti1Image(ras_array(), np.eye(4)), path)
    steps = []
    make_predictor(plan=make_plan(patch_size=(32, 32, 32))).predict(
        path, progress=lambda *step: steps.append(step)
    )
    assert steps == [(1, 1, "brain.nii")]
