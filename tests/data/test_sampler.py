"""Where patches lie, how much is read for them, and that resuming needs no state."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segmamba.config import AugmentationConfig
from segmamba.data import cases as cases_module
from segmamba.data import sampler as sampler_module
from segmamba.data import transforms
from segmamba.data.augment import Batch, augment
from segmamba.data.labels import LabelScheme
from segmamba.data.sampler import PatchSampler
from segmamba.errors import ConfigError

SCHEME = LabelScheme({"background": 0, "a": 1, "b": 2})
ALWAYS = AugmentationConfig(p_rotation=1.0, p_scaling=1.0)


class CountingArray:
    """An array that counts the voxels read from it, as a memory map would be read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype
        self.read = 0

    def __getitem__(self, key: Any) -> np.ndarray:
        part = self.array[key]
        self.read += part.size
        return part


@dataclass
class Case:
    image: Any
    label: Any
    foreground: dict[int, np.ndarray] = field(default_factory=dict)


class Cases:
    """A cache in memory."""

    def __init__(self, **cases: Case) -> None:
        self.cases = cases

    def load(self, case_id: str) -> Case:
        return self.cases[case_id]


def numbered(shape: tuple[int, int, int], number: int = 0) -> Case:
    """A case whose voxels say where they are: channels hold d, h, w, from 1."""
    grid = (np.indices(shape) + 1).astype(np.float16)
    image = np.concatenate([grid, np.full((1, *shape), number + 1, np.float16)])
    label = np.zeros(shape, np.int16)
    label[2:4, 2:4, 2:4] = 1
    label[-1, -1, -1] = 2
    places = {v: np.argwhere(label == v).astype(np.int32) for v in (1, 2)}
    return Case(image, label, places)


def sampler(cases: Cases, size: tuple[int, int, int], **options: Any) -> PatchSampler:
    batch_size = options.pop("batch_size", 2)
    scheme = options.pop("scheme", SCHEME)
    return PatchSampler(cases, list(cases.cases), size, batch_size, scheme, **options)


def starts(batch: Batch) -> np.ndarray:
    """Give where each patch of numbered cases begins, or its box, one a row."""
    images = [
        *batch.image,
        *(image for part in batch.wide or () for image in part.image),
    ]
    return np.array([image[:3, 0, 0, 0].numpy() for image in images]) - 1


def assert_same_wide(found: Batch, expected: Batch) -> None:
    assert (found.wide is None) == (expected.wide is None)
    for one, two in zip(found.wide or (), expected.wide or (), strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.label, two.label)
        for name in ("rows", "matrices", "centers"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


# ---- pure function of seed and step -------------------------------------------------


@pytest.mark.parametrize("margin", [None, AugmentationConfig(), ALWAYS])
def test_a_step_gives_the_same_batch_whatever_came_before(margin: Any) -> None:
    cases = Cases(x=numbered((30, 28, 26)), y=numbered((25, 30, 29), 1))
    first = sampler(cases, (12, 10, 14), seed=5, margin=margin)
    history = [first.batch(step) for step in range(6)]
    later = sampler(cases, (12, 10, 14), seed=5, margin=margin)
    for step in (5, 0, 3):
        again = later.batch(step)
        assert torch.equal(again.image, history[step].image)
        assert torch.equal(again.label, history[step].label)
        assert_same_wide(again, history[step])
    corners = {tuple(starts(batch).flatten().tolist()) for batch in history}
    assert len(corners) > 1


def test_seeds_and_steps_give_different_batches() -> None:
    cases = Cases(x=numbered((60, 60, 60)))
    seen = set()
    for seed in range(5):
        one = sampler(cases, (8, 8, 8), seed=seed, oversample_foreground=0)
        for step in range(10):
            corners = one.batch(step).image[:, :3, 0, 0, 0]
            seen |= {tuple(corner) for corner in corners.tolist()}
    assert len(seen) > 90


def test_threads_read_what_one_thread_reads() -> None:
    cases = Cases(x=numbered((30, 28, 26)), y=numbered((25, 30, 29), 1))
    shared = sampler(cases, (12, 10, 14), margin=ALWAYS)
    expected = [shared.batch(step) for step in range(8)]
    found: dict[int, Batch] = {}

    def work(step: int) -> None:
        found[step] = shared.batch(step)

    threads = [threading.Thread(target=work, args=(step,)) for step in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in range(8):
        assert_same_wide(found[step], expected[step])


@pytest.mark.parametrize("margin", [None, AugmentationConfig()])
def test_several_steps_at_once_read_what_each_reads_alone(margin: Any) -> None:
    cases = Cases(x=numbered((30, 28, 26)), y=numbered((9, 30, 29), 1))
    one = sampler(cases, (12, 10, 14), margin=margin, batch_size=3)
    steps = range(4, 12)
    together = one.batches(steps)
    for part, step in zip(together.split(3), steps, strict=True):
        alone = one.batch(step)
        assert torch.equal(part.image, alone.image)
        assert torch.equal(part.label, alone.label)
        assert part.case_ids == alone.case_ids
    if margin is not None:
        quiet = AugmentationConfig(
            p_noise=0, p_blur=0, p_brightness=0, p_contrast=0, p_low_resolution=0,
            p_gamma=0, p_gamma_inverted=0, mirror_axes=(),
        )  # fmt: skip
        all_steps = augment(together, one.patch_size, quiet, list(steps)).split(3)
        for part, step in zip(all_steps, steps, strict=True):
            alone = augment(one.batch(step), one.patch_size, quiet, step)
            torch.testing.assert_close(part.image, alone.image, atol=2e-3, rtol=0)
            assert (part.label == alone.label).float().mean() > 0.999


def test_boxes_are_padded_to_each_other_only_while_they_stay_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = Cases(x=numbered((40, 40, 40)))
    one = sampler(cases, (12, 10, 14), margin=ALWAYS, batch_size=6)
    wide = one.batch(0).wide
    assert wide is not None
    assert len(wide) == 1
    monkeypatch.setattr(sampler_module, "AT_ONCE", 2 * wide[0].image[0].numel())
    parts = one.batch(0).wide
    assert parts is not None
    assert len(parts) >= 3
    np.testing.assert_array_equal(np.concatenate([p.rows for p in parts]), range(6))
    assert all(p.image.numel() <= 2 * wide[0].image[0].numel() for p in parts)


# ---- where patches lie --------------------------------------------------------------


def test_patches_are_exact_copies_of_the_image_and_label() -> None:
    case = numbered((30, 28, 26))
    for step in range(10):
        batch = sampler(Cases(x=case), (12, 10, 14)).batch(step)
        assert batch.image.dtype == torch.float16  # the cache's own, read unchanged
        assert batch.label.dtype == torch.int16
        for image, label in zip(batch.image, batch.label, strict=True):
            d, h, w = (int(image[axis, 0, 0, 0]) - 1 for axis in range(3))
            part = (slice(d, d + 12), slice(h, h + 10), slice(w, w + 14))
            np.testing.assert_array_equal(image, case.image[(slice(None), *part)])
            np.testing.assert_array_equal(label, case.label[part])


def test_free_patches_reach_every_place_equally_often() -> None:
    one = sampler(Cases(x=numbered((11, 12, 13))), (8, 12, 10), oversample_foreground=0)
    starts = np.array(
        [
            [float(image[axis, 0, 0, 0]) - 1 for axis in range(3)]
            for step in range(400)
            for image in one.batch(step).image
        ]
    )
    assert set(starts[:, 0]) == {0, 1, 2, 3}
    assert set(starts[:, 1]) == {0}
    assert set(starts[:, 2]) == {0, 1, 2, 3}
    counts = np.unique(starts[:, 0], return_counts=True)[1]
    assert counts.min() > 150  # of 800, 200 expected
    assert abs(np.corrcoef(starts[:, 0], starts[:, 2])[0, 1]) < 0.15


def test_small_images_lie_inside_the_patch_with_zeros_around() -> None:
    case = numbered((6, 20, 5))
    one = sampler(Cases(x=case), (10, 12, 9))
    for step in range(20):
        batch = one.batch(step)
        for image, label in zip(batch.image, batch.label, strict=True):
            present = image[0] > 0
            assert int(present.sum()) == 6 * 12 * 5
            values = image[0][present].unique().tolist()
            assert values == [1, 2, 3, 4, 5, 6]
            assert not image[:, ~present].any()
            assert not label[~present].any()


def test_forced_patches_are_centred_on_a_voxel_of_their_class() -> None:
    shape = (40, 40, 40)
    label = np.zeros(shape, np.int16)
    label[20, 21, 22] = 1
    label[17, 25, 15] = 2
    places = {v: np.argwhere(label == v) for v in (1, 2)}
    cases = Cases(x=Case(np.zeros((1, *shape), np.float16), label, places))
    one = sampler(cases, (9, 8, 7), oversample_foreground=1.0, batch_size=4)
    values = [
        int(patch[9 // 2, 8 // 2, 7 // 2])
        for step in range(50)
        for patch in one.batch(step).label
    ]
    assert set(values) == {1, 2}
    assert 60 < values.count(1) < 140


def test_forced_patches_at_the_border_stay_inside_and_hold_the_voxel() -> None:
    case = numbered((30, 30, 30))
    case.foreground = {2: case.foreground[2]}
    one = sampler(Cases(x=case), (8, 8, 8), oversample_foreground=1.0)
    for step in range(5):
        batch = one.batch(step)
        assert (batch.image > 0).all()
        assert (batch.label == 2).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("batch_size", "share", "expected"),
    [(2, 0.33, [0, 1]), (4, 0.33, [0, 0, 0, 1]), (3, 0.6, [0, 1, 1]), (2, 0, [0, 0])],
)
def test_the_last_samples_of_a_batch_are_forced(
    batch_size: int, share: float, expected: list[int]
) -> None:
    far = numbered((60, 60, 60))
    far.foreground = {1: np.array([[30, 31, 32]])}
    one = sampler(
        Cases(x=far), (4, 4, 4), batch_size=batch_size, oversample_foreground=share
    )
    centred = [
        [bool((patch[:3, 2, 2, 2] == torch.tensor([31, 32, 33])).all()) for patch in b]
        for b in (one.batch(step).image for step in range(20))
    ]
    assert [all(column) for column in zip(*centred, strict=True)] == [
        bool(value) for value in expected
    ]


def test_a_batch_of_one_is_forced_by_probability() -> None:
    far = numbered((60, 60, 60))
    far.foreground = {1: np.array([[30, 31, 32]])}
    one = sampler(Cases(x=far), (4, 4, 4), batch_size=1, oversample_foreground=0.33)
    hits = [float(one.batch(step).image[0, 0, 2, 2, 2]) == 31 for step in range(400)]
    assert 0.26 < np.mean(hits) < 0.41


def test_cases_without_foreground_are_sampled_anywhere() -> None:
    case = numbered((20, 20, 20))
    case.foreground = {1: np.zeros((0, 3), np.int32)}
    batch = sampler(Cases(x=case), (8, 8, 8), oversample_foreground=1.0).batch(0)
    assert (batch.image > 0).all()


def test_all_cases_are_drawn_alike() -> None:
    cases = Cases(**{f"c{n}": numbered((12, 12, 12), n) for n in range(4)})
    one = sampler(cases, (8, 8, 8))
    numbers = [
        int(v) for s in range(200) for v in one.batch(s).image[:, 3, 4, 4, 4].tolist()
    ]
    counts = np.bincount(numbers, minlength=5)[1:]
    assert counts.min() > 65  # of 400, 100 expected


def test_unannotated_places_are_avoided() -> None:
    shape = (40, 12, 12)
    label = np.full(shape, 9, np.int16)
    label[18:24] = 0
    case = Case(np.zeros((1, *shape), np.float16), label)
    scheme = LabelScheme({"background": 0, "a": 1}, ignore_label=9)
    one = sampler(Cases(x=case), (8, 12, 12), scheme=scheme)
    shares = [(one.batch(step).label == 0).any() for step in range(30)]
    assert all(shares)


# ---- margins ------------------------------------------------------------------------


def test_samples_without_a_rotation_or_zoom_give_the_bare_patch() -> None:
    cases = Cases(x=numbered((40, 38, 36)), y=numbered((35, 40, 39), 1))
    quiet = AugmentationConfig(
        p_noise=0, p_blur=0, p_brightness=0, p_contrast=0, p_low_resolution=0,
        p_gamma=0, p_gamma_inverted=0, mirror_axes=(),
    )  # fmt: skip
    size = (12, 10, 14)
    bare, wide = (sampler(cases, size, margin=m) for m in (None, quiet))
    untouched = 0
    for step in range(12):
        batch, plain = wide.batch(step), bare.batch(step)
        out = augment(batch, size, quiet, step)
        assert batch.wide is not None
        turned = [row for part in batch.wide for row in part.rows]
        for index in set(range(2)) - set(turned):
            untouched += 1
            assert torch.equal(out.image[index], plain.image[index])
            assert torch.equal(out.label[index], plain.label[index])
        assert batch.image.shape[2:] == size
    assert untouched > 5


@pytest.mark.parametrize("shape", [(40, 38, 36), (9, 30, 60)])
def test_what_is_read_is_enough_for_the_rotation(shape: tuple[int, int, int]) -> None:
    """The patch equals the one resampled from the whole image."""
    random = np.random.default_rng(0)
    image = random.normal(size=(2, *shape)).astype(np.float16)
    label = random.integers(0, 3, shape).astype(np.int16)
    case = Case(image, label)
    size = (14, 12, 10)
    positions = numbered(shape)
    for step in range(6):
        options = {"margin": ALWAYS, "oversample_foreground": 0.0, "batch_size": 1}
        batch = sampler(Cases(x=case), size, **options).batch(step)
        # The same draw without a margin says where the patch lies.
        options["margin"] = None
        bare = sampler(Cases(x=positions), size, **options).batch(step).image[0, :3]
        first = np.argwhere((bare[0] > 0).numpy())[0]
        start = bare[(slice(None), *first)].numpy() - 1 - first
        assert batch.wide is not None
        matrix = batch.wide[0].matrices[0]
        center = start + (np.array(size) - 1) / 2
        grid = transforms.affine_grid(
            matrix[None], center[None], size, shape, torch.device("cpu")
        )
        expected = transforms.sample(torch.from_numpy(image)[None].float(), grid)
        calm = AugmentationConfig(
            p_noise=0, p_blur=0, p_brightness=0, p_contrast=0, p_low_resolution=0,
            p_gamma=0, p_gamma_inverted=0, mirror_axes=(),
        )  # fmt: skip
        out = augment(batch, size, calm, 0)
        torch.testing.assert_close(out.image, expected, atol=1e-4, rtol=0)
        labels = transforms.sample_labels(torch.from_numpy(label)[None], grid)
        assert (out.label == labels).float().mean() > 0.999


def test_no_more_is_read_than_needed() -> None:
    case = numbered((60, 60, 60))
    image, label = CountingArray(case.image), CountingArray(case.label)
    cases = Cases(x=Case(image, label, case.foreground))
    size = (8, 8, 8)
    never = AugmentationConfig(p_rotation=0.0, p_scaling=0.0)
    for margin, most in ((None, 8**3), (never, 8**3), (ALWAYS, 24**3)):
        image.read = label.read = 0
        sampler(cases, size, margin=margin).batch(0)
        assert 0 < image.read <= 2 * 4 * most
        assert 0 < label.read <= 2 * most


def test_memory_maps_are_read_partially_and_stay_unchanged(tmp_path: Path) -> None:
    case = numbered((20, 21, 22))
    np.save(tmp_path / "image.npy", case.image)
    np.save(tmp_path / "label.npy", case.label)
    mapped = Case(
        np.load(tmp_path / "image.npy", mmap_mode="r"),
        np.load(tmp_path / "label.npy", mmap_mode="r"),
        case.foreground,
    )
    one, two = (sampler(Cases(x=c), (8, 9, 10)).batch(4) for c in (mapped, case))
    one.image.add_(1)  # writable, and no view of the file
    assert torch.equal(one.image, two.image + 1)
    assert torch.equal(one.label, two.label)


class MappedCases:
    """Cases on disk; counts how often each is opened."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.opened = folder, 0
        self.ids = [str(number) for number in range(count)]
        for number, name in enumerate(self.ids):
            case = numbered((9, 8, 7), number)
            np.save(folder / f"{name}.image.npy", case.image)
            np.save(folder / f"{name}.label.npy", case.label)

    def load(self, case_id: str) -> Case:
        self.opened += 1
        files = (self.folder / f"{case_id}.{kind}.npy" for kind in ("image", "label"))
        return Case(*(np.load(file, mmap_mode="r") for file in files))


def read_all(cases: MappedCases) -> PatchSampler:
    one = PatchSampler(cases, cases.ids, (4, 5, 6), 8, SCHEME)
    for step in range(60):
        one.batch(step)
    return one


def test_small_cases_are_opened_once_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases_module, "OPEN_CASES", 3)
    cases = MappedCases(tmp_path, 10)
    one = read_all(cases)
    assert cases.opened == 10
    for file in tmp_path.iterdir():
        file.unlink()
    assert one.batch(99).image.any()  # from memory


@pytest.mark.parametrize("limit", ["HELD_CASE_BYTES", "HELD_BYTES"])
def test_large_cases_stay_on_disk_and_few_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(cases_module, "OPEN_CASES", 3)
    monkeypatch.setattr(cases_module, limit, 9 * 8 * 7 * 10 - 1)  # a byte too few
    cases = MappedCases(tmp_path, 10)
    one = read_all(cases)
    assert cases.opened > 200
    held = MappedCases(tmp_path, 10)
    monkeypatch.undo()
    assert torch.equal(one.batch(7).image, read_all(held).batch(7).image)


def test_threads_that_open_a_case_together_keep_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases_module, "HELD_BYTES", 2 * 9 * 8 * 7 * 10)
    cases, met = MappedCases(tmp_path, 2), threading.Barrier(2, timeout=60)
    load = cases.load

    def together(case_id: str) -> Case:
        if case_id == "0":
            met.wait()
        return load(case_id)

    monkeypatch.setattr(cases, "load", together)
    opened = cases_module.OpenCases(cases, SCHEME)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(opened, ["0", "0"])
    assert one is other
    assert opened("1").image.flags.owndata  # there is room for it in memory


# ---- wrong arguments ----------------------------------------------------------------


def test_wrong_arguments_are_config_errors() -> None:
    cases = Cases(x=numbered((8, 8, 8)))
    with pytest.raises(ConfigError, match="no case"):
        PatchSampler(cases, [], (8, 8, 8), 2, SCHEME)
    with pytest.raises(ConfigError, match="batch"):
        PatchSampler(cases, ["x"], (8, 8, 8), 0, SCHEME)
    with pytest.raises(ConfigError, match="patch"):
        PatchSampler(cases, ["x"], (8, 0, 8), 2, SCHEME)
    with pytest.raises(ConfigError, match="oversample"):
        PatchSampler(cases, ["x"], (8, 8, 8), 2, SCHEME, oversample_foreground=1.5)
