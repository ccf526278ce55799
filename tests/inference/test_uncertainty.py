"""Uncertainty against all samples held at once, which the code never does."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from segmamba.config import NetworkConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.errors import ConfigError
from segmamba.inference import attempts as attempts_module
from segmamba.inference.predictor import Predictor
from segmamba.io import Volume

CLASSES = LabelScheme({"background": 0, "low": 2, "high": 5})
REGIONS = LabelScheme(
    {"background": 0, "edema": 1, "core": 2}, {"WT": (1, 2), "TC": (2,)}, (1, 2)
)
AFFINE = np.diag([-0.5, 2.0, 1.5, 1.0])
SIZE = (9, 12, 11)


class Noisy(torch.nn.Module):
    """Convolutions that are no mirror images of themselves: samples differ."""

    def __init__(self, outputs: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Conv3d(1, outputs, 3, padding=1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(batch)


def make_predictor(scheme: LabelScheme, networks: int = 2, **options) -> Predictor:
    plan = Plan(
        orientation="RAS",
        spacing_mm=options.pop("spacing_mm", (0.5, 2.0, 1.5)),
        patch_size=options.pop("patch_size", SIZE),
        batch_size=1,
        normalization=(ChannelNormalization("none"),),
        network=NetworkConfig(),
        crop_to_nonzero=options.pop("crop", False),
    )
    group = [Noisy(scheme.num_outputs, seed) for seed in range(networks)]
    settings = {"device": "cpu", "precision": "fp32", **options}
    return Predictor(group, plan, ["MRI"], scheme, **settings)


def scan(seed: int = 3) -> Volume:
    values = np.random.default_rng(seed).normal(size=(1, *SIZE)).astype(np.float32)
    return Volume(values, AFFINE)


def logits_of(predictor: Predictor, volume: Volume) -> np.ndarray:
    """All samples' logits (M, K, I, J, K) of an image of one window."""
    flipped = np.flip(volume.array, 1).copy()  # the affine runs to the left
    image = torch.from_numpy(flipped)[None]
    found = []
    axes = [axis + 2 for axis in predictor.mirror_axes]
    for count in range(len(axes) + 1):
        for flip in itertools.combinations(axes, count):
            for network in (*predictor.networks, *predictor.snapshots):
                with torch.no_grad():
                    logits = network(image.flip(flip)).flip(flip)[0]
                found.append(logits.double().flip(1).numpy())
    return np.stack(found)


def samples(predictor: Predictor, volume: Volume) -> np.ndarray:
    """All samples' probabilities (M, K, I, J, K) of an image of one window."""
    logits = logits_of(predictor, volume)
    if predictor.scheme.is_region_based:
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def mean_logits(predictor: Predictor, volume: Volume) -> np.ndarray:
    """What decides the label map: the mean of the folds, snapshots left out."""
    logits, folds = logits_of(predictor, volume), len(predictor.networks)
    every = folds + len(predictor.snapshots)
    return logits[[i for i in range(len(logits)) if i % every < folds]].mean(0)


def plain_entropy(share: np.ndarray, regions: bool) -> np.ndarray:
    """Along the axis of outputs, the fourth from behind."""
    doubt = -share * np.log(share)
    if regions:
        doubt = doubt - (1 - share) * np.log(1 - share)
    return doubt.sum(-4)


@pytest.mark.parametrize("scheme", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("mirror", [True, (0,), False])
@pytest.mark.parametrize("snapshots", [0, 2])
def test_equals_what_all_samples_say(scheme, mirror, snapshots):
    more = [Noisy(scheme.num_outputs, 10 + seed) for seed in range(snapshots)]
    predictor = make_predictor(scheme, mirror=mirror, snapshots=more)
    found = predictor.predict(scan(), uncertainty=True, probabilities=True)
    plain = predictor.predict(scan(), probabilities=True)
    np.testing.assert_array_equal(found.label_map, plain.label_map)
    np.testing.assert_array_equal(found.probabilities, plain.probabilities)
    assert plain.uncertainty is None
    doubt = found.uncertainty
    assert doubt is not None
    all_shares = samples(predictor, scan())
    assert doubt.samples == len(all_shares)
    mean, regions = all_shares.mean(0), scheme.is_region_based
    entropy = plain_entropy(mean, regions)
    shared = entropy - plain_entropy(all_shares, regions).mean(0)
    np.testing.assert_allclose(doubt.entropy, entropy, atol=2e-3)
    np.testing.assert_allclose(doubt.mutual_information, shared, atol=2e-3)
    assert (doubt.mutual_information >= 0).all()
    logits = mean_logits(predictor, scan())
    if regions:
        sure = np.where(logits > 0, mean, 1 - mean).min(0)
    else:
        sure = np.take_along_axis(mean, logits.argmax(0)[None], 0)[0]
    np.testing.assert_allclose(doubt.confidence, sure, atol=2e-3)


@pytest.mark.parametrize("scheme", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_structures_are_measured_in_each_sample(scheme):
    predictor = make_predictor(scheme)
    found = predictor.predict(scan(), uncertainty=True)
    doubt = found.uncertainty
    assert doubt is not None
    all_shares = samples(predictor, scan())
    logits, inside = mean_logits(predictor, scan()), np.zeros(SIZE, bool)
    doubts = plain_entropy(all_shares.mean(0), scheme.is_region_based)
    for index, (name, group) in enumerate(scheme.evaluated.items()):
        if scheme.is_region_based:
            masks, output = all_shares[:, index] > 0.5, index
            mask = logits[index] > 0
        else:
            output = index + 1
            masks = all_shares.argmax(1) == output
            mask = np.isin(found.label_map, group)
        row, ml = doubt.structures[name], 1.5e-3
        volumes = masks.sum((1, 2, 3)) * ml
        assert row["sample_mean_ml"] == pytest.approx(volumes.mean(), rel=1e-6)
        assert row["sample_sd_ml"] == pytest.approx(volumes.std(ddof=1), rel=1e-5)
        assert row["sample_min_ml"] == pytest.approx(volumes.min(), rel=1e-6)
        assert row["sample_max_ml"] == pytest.approx(volumes.max(), rel=1e-6)
        inside |= mask
        share = all_shares.mean(0)[output]
        dice = 2 * share[mask].sum() / (mask.sum() + share.sum())
        assert row["volume_ml"] == pytest.approx(mask.sum() * ml)
        assert row["expected_dice"] == pytest.approx(dice, rel=1e-4)
        assert row["mean_entropy"] == pytest.approx(doubts[mask].mean(), rel=1e-3)
    assert doubt.mean_entropy == pytest.approx(doubts[inside].mean(), rel=1e-3)
    rows = doubt.structures.values()
    assert doubt.expected_dice == np.mean([row["expected_dice"] for row in rows])


@pytest.mark.parametrize("patch", [(4, 5, 6), (16, 16, 16), (9, 4, 20)])
@pytest.mark.parametrize("spacing", [(0.5, 2.0, 1.5), (0.7, 1.3, 4.0)])
def test_volumes_of_windows_add_up_to_the_scan(patch, spacing):
    """Each sample's labels fill the image; pads and overlaps count nothing more.

    Nor does it matter that the plan's spacing doesn't divide the scan.
    """
    scheme = LabelScheme({"background": 0, "low": 1})
    options = {"networks": 1, "patch_size": patch, "spacing_mm": spacing}
    predictor = make_predictor(scheme, **options)
    predictor.networks[0].layer.weight.data.zero_()
    predictor.networks[0].layer.bias.data[1] += 9
    doubt = predictor.predict(scan(), uncertainty=True).uncertainty
    assert doubt is not None
    row = doubt.structures["low"]
    assert row["sample_mean_ml"] == pytest.approx(np.prod(SIZE) * 1.5e-3, rel=1e-6)
    assert row["volume_ml"] == pytest.approx(np.prod(SIZE) * 1.5e-3)
    assert row["sample_sd_ml"] == pytest.approx(0, abs=1e-9)


def test_one_sample_has_nothing_to_disagree_with():
    predictor = make_predictor(CLASSES, networks=1, mirror=False)
    doubt = predictor.predict(scan(), uncertainty=True).uncertainty
    assert doubt is not None
    assert doubt.samples == 1
    assert doubt.entropy.max() > 0.5
    assert doubt.mutual_information.max() < 2e-3
    assert doubt.structures["low"]["sample_sd_ml"] is None


def test_what_is_cropped_away_is_certain():
    volume = scan()
    volume.array[:, :3] = 0
    predictor = make_predictor(CLASSES, crop=True)
    doubt = predictor.predict(volume, uncertainty=True).uncertainty
    assert doubt is not None
    assert not doubt.entropy[:3].any()
    assert not doubt.mutual_information[:3].any()
    assert (doubt.confidence[:3] == 1).all()
    assert doubt.entropy[3:].all()


def test_a_structure_that_is_nowhere_has_no_dice():
    predictor = make_predictor(CLASSES, networks=1)
    with torch.no_grad():
        predictor.networks[0].layer.bias[2] = -50
    doubt = predictor.predict(scan(), uncertainty=True).uncertainty
    assert doubt is not None
    assert doubt.structures["high"]["expected_dice"] is None
    assert doubt.structures["high"]["sample_max_ml"] == 0
    assert doubt.expected_dice == doubt.structures["low"]["expected_dice"]


@pytest.mark.parametrize("spacing", [(0.5, 2.0, 1.5), (0.8, 1.4, 1.0), (0.5, 0.4, 1.5)])
def test_slabs_change_nothing(spacing, monkeypatch):
    options = {"patch_size": (4, 5, 6), "spacing_mm": spacing, "overlap": 0.25}
    whole = make_predictor(CLASSES, **options).predict(scan(), uncertainty=True)
    assert whole.uncertainty is not None
    for limit in (16_000, 4_000):
        monkeypatch.setattr(attempts_module, "SUMS_BYTES", limit)
        found = make_predictor(CLASSES, **options).predict(scan(), uncertainty=True)
        doubt = found.uncertainty
        assert doubt is not None
        np.testing.assert_array_equal(found.label_map, whole.label_map)
        for kind in ("entropy", "mutual_information", "confidence"):
            np.testing.assert_allclose(
                getattr(doubt, kind), getattr(whole.uncertainty, kind), atol=1e-3
            )
        for name, row in whole.uncertainty.structures.items():
            assert doubt.structures[name] == pytest.approx(row, rel=1e-5)


def test_maps_are_saved_in_the_scans_geometry(tmp_path):
    found = make_predictor(CLASSES).predict(scan(), uncertainty=True)
    for kind in ("entropy", "mutual_information", "confidence"):
        path = found.save_uncertainty(tmp_path / f"{kind}.nii.gz", kind)
        image = nib.load(path)
        np.testing.assert_array_equal(image.affine, AFFINE)
        expected = getattr(found.uncertainty, kind)
        np.testing.assert_array_equal(image.get_fdata(), expected)
    with pytest.raises(ConfigError, match="uncertainty=True"):
        make_predictor(CLASSES)(scan()).save_uncertainty(tmp_path / "a.nii", "entropy")
    with pytest.raises(ConfigError, match="found variance"):
        found.save_uncertainty(tmp_path / "a.nii", "variance")
