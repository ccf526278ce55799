"""The cache: right, restartable, and never out of date."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmamba.config import NetworkConfig
from segmamba.data import cache as cache_module
from segmamba.data.cache import build_cache, foreground_locations, open_cache
from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan, plan_hash
from segmamba.data.preprocess import preprocess_image, preprocess_label
from segmamba.errors import ConfigError, FormatError, SegMambaError
from segmamba.io import read_case, read_volume, write_volume

SCHEME = LabelScheme({"background": 0, "a": 1, "b": 3})
PLAN = Plan(
    orientation="SPL",
    spacing_mm=(1.5, 1.0, 1.0),
    patch_size=(32, 32, 32),
    batch_size=2,
    normalization=(ChannelNormalization("zscore"),),
    network=NetworkConfig(),
)


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    rng = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    cases = []
    for index in range(5):
        image = rng.normal(100, 9, (12, 14 + index, 10)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[3:6, 4:9, 2:5], label[7:9, 2:5, 6:9] = 1, 3
        paths = folder / f"c{index}.nii.gz", folder / f"c{index}_seg.nii.gz"
        for path, array in zip(paths, (image, label), strict=True):
            nib.save(nib.Nifti1Image(array, np.diag([1, -1, 1.5, 1])), path)
        cases.append(Case(f"c{index}", (paths[0],), paths[1]))
    return Dataset("toy", folder, "csv", ("T1",), SCHEME, tuple(cases))


def states(folder: Path) -> dict[str, int]:
    files = [*folder.glob("*.npy"), *folder.glob("*.npz")]
    return {path.name: path.stat().st_mtime_ns for path in files}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name.split(".")[0] for name in after if before.get(name) != after[name]}


def test_a_cached_case_is_the_preprocessed_one(dataset, tmp_path):
    seen = []
    cache = build_cache(
        dataset, PLAN, tmp_path / "cache", progress=lambda *news: seen.append(news)
    )
    assert cache.case_ids == ("c0", "c1", "c2", "c3", "c4")
    assert [news[:2] for news in seen] == [(n, 5) for n in range(1, 6)]
    for case in dataset.cases:
        image, geometry = preprocess_image(read_case(case.images), PLAN)
        label = read_volume(case.label).array[0]
        label = preprocess_label(label, geometry, SCHEME)
        cached = cache.load(case.id)
        assert isinstance(cached.image, np.memmap)
        assert isinstance(cached.label, np.memmap)
        assert (cached.image.dtype, cached.label.dtype) == (np.float16, np.int16)
        np.testing.assert_allclose(cached.image, image, atol=2e-3)
        np.testing.assert_array_equal(cached.label, label)
        assert cached.geometry == geometry
        assert set(cached.foreground) == {1, 3}
        for value, places in cached.foreground.items():
            np.testing.assert_array_equal(places, np.argwhere(label == value))
        with pytest.raises(ValueError, match="read-only"):
            cached.label[0] = 0
    assert open_cache(tmp_path / "cache", PLAN).case_ids == cache.case_ids
    with pytest.raises(ConfigError, match="no case 'c9'"):
        cache.load("c9")


def test_a_case_may_be_called_cache(dataset, tmp_path):
    case = dataclasses.replace(dataset.cases[0], id="cache")
    dataset = dataclasses.replace(dataset, cases=(case,))
    cached = build_cache(dataset, PLAN, tmp_path / "cache").load("cache")
    assert cached.id == "cache"
    assert open_cache(tmp_path / "cache", PLAN).case_ids == ("cache",)


def test_what_fits_is_kept(dataset, tmp_path):
    folder = tmp_path / "cache"
    build_cache(dataset, PLAN, folder)
    before = states(folder)
    build_cache(dataset, PLAN, folder)
    other_patch = dataclasses.replace(PLAN, patch_size=(48, 32, 32), batch_size=9)
    build_cache(dataset, other_patch, folder)
    assert changed(before, states(folder)) == set()


def test_a_changed_source_is_noticed(dataset, tmp_path):
    folder = tmp_path / "cache"
    build_cache(dataset, PLAN, folder)
    before = states(folder)
    os.utime(dataset.cases[1].images[0], ns=(1, 10**18))
    path = dataset.cases[3].label
    label = np.zeros((12, 17, 10), np.uint8)
    label[1:4] = 3
    nib.save(nib.Nifti1Image(label, np.diag([1, -1, 1.5, 1])), path)
    cache = build_cache(dataset, PLAN, folder)
    assert changed(before, states(folder)) == {"c1", "c3"}
    assert len(cache.load("c3").foreground[1]) == 0


def test_changed_voxels_beside_their_header_are_noticed(dataset, tmp_path):
    volume = read_volume(dataset.cases[0].images[0])
    write_volume(tmp_path / "c0.mhd", volume)
    case = dataclasses.replace(dataset.cases[0], images=(tmp_path / "c0.mhd",))
    dataset = dataclasses.replace(dataset, cases=(case,))
    before = build_cache(dataset, PLAN, tmp_path / "cache").load("c0").image[0].copy()
    header = (tmp_path / "c0.mhd").read_bytes()
    inverted = dataclasses.replace(volume, array=-volume.array)
    write_volume(tmp_path / "other" / "c0.mhd", inverted)
    (tmp_path / "other" / "c0.zraw").replace(tmp_path / "c0.zraw")
    assert (tmp_path / "c0.mhd").read_bytes() == header
    after = build_cache(dataset, PLAN, tmp_path / "cache").load("c0").image[0]
    np.testing.assert_allclose(after, -before, atol=2e-3)


def test_changed_labels_are_noticed(dataset, tmp_path):
    folder = tmp_path / "cache"
    build_cache(dataset, PLAN, folder)
    regions = LabelScheme(SCHEME.labels, {"all": (1, 3), "b": (3,)}, (1, 3))
    cache = build_cache(dataclasses.replace(dataset, labels=regions), PLAN, folder)
    foreground = cache.load("c0").foreground
    assert {key: len(places) for key, places in foreground.items()} == {1: 63, 3: 18}


def test_a_changed_plan_is_noticed(dataset, tmp_path):
    folder = tmp_path / "cache"
    build_cache(dataset, PLAN, folder)
    coarse = dataclasses.replace(PLAN, spacing_mm=(3.0, 2.0, 2.0))
    assert plan_hash(coarse) != plan_hash(PLAN)
    with pytest.raises(ConfigError, match="another plan"):
        open_cache(folder, coarse)
    cache = build_cache(dataset, coarse, folder)
    assert cache.load("c0").label.shape == (5, 7, 6)
    with pytest.raises(ConfigError, match=r"another plan.*cache\.json"):
        open_cache(folder, PLAN)


def test_there_is_no_cache_before_it_is_finished(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(ConfigError, match="no finished cache"):
        open_cache(folder, PLAN)
    real, calls = np.savez, []

    def stop_at_the_third(path, **arrays):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, **arrays)

    monkeypatch.setattr(cache_module.np, "savez", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_cache(dataset, PLAN, folder, workers=1)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no finished cache"):
        open_cache(folder, PLAN)
    assert not list(folder.glob(".writing-*"))
    before = states(folder)
    cache = build_cache(dataset, PLAN, folder, workers=1)
    redone = changed(before, states(folder))
    assert "c2" in redone
    assert not redone & {"c0", "c1"}
    assert len(cache.load("c2").foreground[1]) > 0


def test_leftovers_of_a_killed_run_go_away(dataset, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    old, young = folder / ".writing-old.npy", folder / ".writing-young.npy"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    build_cache(dataset, PLAN, folder)
    assert not old.exists()
    assert young.exists()  # another process may be writing it


def test_a_broken_case_is_named_and_the_others_are_kept(dataset, tmp_path):
    folder = tmp_path / "cache"
    path = dataset.cases[2].images[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"case c2: .*c2\.nii\.gz"):
        build_cache(dataset, PLAN, folder, workers=1)
    before = states(folder)
    path.write_bytes(whole)
    build_cache(dataset, PLAN, folder, workers=1)
    assert changed(before, states(folder)).isdisjoint({"c0", "c1"})


def test_label_problems_name_the_label_file(dataset, tmp_path):
    stranger = dataclasses.replace(dataset, labels=LabelScheme({"bg": 0, "a": 1}))
    with pytest.raises(FormatError, match=r"case c0: .*\[3\].*c0_seg\.nii\.gz"):
        build_cache(stranger, PLAN, tmp_path / "cache")


def test_a_vanished_file_and_a_full_disk_are_clear(dataset, tmp_path, monkeypatch):
    def full(path, array):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.np, "save", full)
        with pytest.raises(SegMambaError, match=r"case c0.*No space left.*Free disk"):
            build_cache(dataset, PLAN, tmp_path / "cache")
    dataset.cases[0].images[0].unlink()
    with pytest.raises(SegMambaError, match=r"case c0.*c0\.nii\.gz.*Put .* back"):
        build_cache(dataset, PLAN, tmp_path / "cache")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SegMambaError, match="can't write the cache"):
        build_cache(dataset, PLAN, tmp_path / "file")


def test_a_damaged_cache_file_is_redone_or_named(dataset, tmp_path):
    folder = tmp_path / "cache"
    cache = build_cache(dataset, PLAN, folder)
    (folder / "c1.image.npy").write_bytes(b"no array")
    with pytest.raises(FormatError, match=r"'c1' is damaged.*Delete c1\.json"):
        cache.load("c1")
    (folder / "c1.json").write_text("{")
    (folder / "c2.label.npy").unlink()
    with pytest.raises(FormatError, match=r"c2"):
        cache.load("c2")
    cache = build_cache(dataset, PLAN, folder)
    assert cache.load("c1").image.shape == cache.load("c1").image.shape
    assert cache.load("c2").label.any()


def test_raw_intensities_keep_single_precision(dataset, tmp_path):
    case = dataset.cases[0]
    image = np.full((12, 14, 10), 3.0, np.float32)
    image[0, 0, 0] = 1.7e6  # float16 ends at 65 504
    nib.save(nib.Nifti1Image(image, np.diag([1, -1, 1.5, 1])), case.images[0])
    one = dataclasses.replace(dataset, cases=(case,))
    raw = dataclasses.replace(PLAN, normalization=(ChannelNormalization("none"),))
    cached = build_cache(one, raw, tmp_path / "raw").load("c0")
    assert cached.image.dtype == np.float32
    assert cached.image.max() == np.float32(1.7e6)
    cached = build_cache(one, PLAN, tmp_path / "zscore").load("c0")
    assert cached.image.dtype == np.float16
    assert np.isfinite(cached.image).all()


def test_foreground_is_a_fair_repeatable_sample():
    label = np.zeros((40, 40, 40), np.int16)
    label[5:, :, :] = 3
    places = foreground_locations(label, SCHEME, "case")
    assert places[1].shape == (0, 3)
    assert places[3].shape == (10_000, 3)
    assert (label[tuple(places[3].T)] == 3).all()
    assert len(np.unique(places[3], axis=0)) == 10_000
    np.testing.assert_allclose(places[3].mean(axis=0), (22, 19.5, 19.5), atol=0.6)
    again = foreground_locations(label, SCHEME, "case")
    np.testing.assert_array_equal(places[3], again[3])
    other = foreground_locations(label, SCHEME, "another")
    assert not np.array_equal(places[3], other[3])


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_cache import PLAN, hippocampus
from segmamba.data.cache import build_cache
build_cache(hippocampus(Path(sys.argv[2])), PLAN, Path(sys.argv[3]), workers=2)
"""


def hippocampus(root: Path) -> Dataset:
    images = sorted((root / "imagesTr").glob("*.nii.gz"))[:60]
    cases = tuple(Case(f.name[:-7], (f,), root / "labelsTr" / f.name) for f in images)
    scheme = LabelScheme({"background": 0, "Anterior": 1, "Posterior": 2})
    return Dataset("hippocampus", root, "msd", ("MRI",), scheme, cases)


def finished(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("hippocampus*.json")}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_build_killed_at_any_moment_goes_on(shared_data, tmp_path):
    root, folder = shared_data / "Task04_Hippocampus", tmp_path / "cache"
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, here, str(root), str(folder)]
    )
    while len(finished(folder)) < 8 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = finished(folder)
    assert 8 <= len(done) < 60
    before = states(folder)
    cache = build_cache(hippocampus(root), PLAN, folder)
    assert changed(before, states(folder)).isdisjoint(done)
    assert len(cache.case_ids) == 60
    for case_id in cache.case_ids:
        path = root / "imagesTr" / f"{case_id}.nii.gz"
        image, geometry = preprocess_image(read_case([path]), PLAN)
        cached = cache.load(case_id)
        assert cached.geometry == geometry
        np.testing.assert_array_equal(cached.image, image.astype(np.float16))
