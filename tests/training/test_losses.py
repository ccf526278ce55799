"""Losses against MONAI, loops over voxels in float64, and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceCELoss, DiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segmamba.data.labels import IGNORED, LabelScheme
from segmamba.errors import ConfigError, GeometryError
from segmamba.training.losses import (
    SMOOTH,
    TVERSKY_FALSE_NEGATIVE,
    TVERSKY_FALSE_POSITIVE,
    build_loss,
    encode_targets,
    resize_labels,
)

NAMES = ["dice_ce", "dice", "ce", "dice_focal", "tversky_ce"]
CLASSES = LabelScheme({"background": 0, "a": 1, "b": 4})
CLASSES_IGNORE = LabelScheme({"background": 0, "a": 1, "b": 4}, ignore_label=9)
REGIONS = LabelScheme(
    {"background": 0, "ncr": 1, "ed": 2, "et": 4},
    {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    (2, 1, 4),
)
REGIONS_IGNORE = LabelScheme(
    REGIONS.labels, REGIONS.regions, REGIONS.regions_order, ignore_label=9
)
SCHEMES = {
    "classes": CLASSES,
    "classes-ignore": CLASSES_IGNORE,
    "regions": REGIONS,
    "regions-ignore": REGIONS_IGNORE,
}
SHAPE = (2, 5, 6, 4)


def make(scheme: LabelScheme, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    source = np.random.default_rng(0)
    labels = source.choice(np.array(scheme.known_values, np.int16), shape)
    logits = source.normal(size=(shape[0], scheme.num_outputs, *shape[1:])) * 2
    return torch.from_numpy(logits), torch.from_numpy(labels)


def one_hot(labels: Tensor, scheme: LabelScheme) -> Tensor:
    """The target (B, outputs, D, H, W) by the NumPy encoding; ignored voxels are 0."""
    encoded = np.stack([scheme.encode(sample) for sample in labels.numpy()])
    if scheme.is_region_based:
        return torch.from_numpy((encoded == 1).astype(np.float64))
    hot = [encoded == index for index in range(scheme.num_outputs)]
    return torch.from_numpy(np.stack(hot, 1).astype(np.float64))


# ---- targets ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_targets_equal_the_numpy_encoding(scheme: LabelScheme) -> None:
    _, labels = make(scheme)
    labels[0, 0, 0, 0] = 77  # unknown: background
    targets = encode_targets(labels, scheme)
    encoded = np.stack([scheme.encode(sample) for sample in labels.numpy()])
    for index, mask in enumerate(targets.masks):
        expected = (
            encoded[:, index] == 1 if scheme.is_region_based else encoded == index
        )
        np.testing.assert_array_equal(mask.numpy(), expected)
    if scheme.ignore_label is None:
        assert targets.valid is None
    else:
        known = encoded[:, 0] if scheme.is_region_based else encoded
        assert targets.valid is not None
        np.testing.assert_array_equal(targets.valid.numpy(), known != IGNORED)


def test_ignoring_zero_leaves_no_background_behind() -> None:
    scheme = LabelScheme({"background": 0, "a": 1}, ignore_label=2)
    labels = torch.tensor([[[[0, 1, 2]]]], dtype=torch.int16)
    background, a = encode_targets(labels, scheme).masks
    assert background.flatten().tolist() == [True, False, False]
    assert a.flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("size", [(4, 4, 4), (3, 5, 2), (8, 4, 1)])
def test_resized_labels_are_the_nearest(size: tuple[int, int, int]) -> None:
    labels = torch.arange(2 * 8 * 9 * 4).reshape(2, 8, 9, 4)
    expected = torch.nn.functional.interpolate(
        labels[:, None].double(), size, mode="nearest-exact"
    )[:, 0].long()
    assert torch.equal(resize_labels(labels, size), expected)


# ---- oracles ------------------------------------------------------------------------


@pytest.mark.parametrize("whole_batch", [True, False])
def test_dice_ce_of_classes_equals_monai(whole_batch: bool) -> None:
    logits, labels = make(CLASSES)
    oracle = DiceCELoss(
        include_background=False, softmax=True, batch=whole_batch,
        smooth_nr=SMOOTH, smooth_dr=SMOOTH,
    )  # fmt: skip
    loss = build_loss("dice_ce", CLASSES, batch_dice=whole_batch)
    expected = oracle(logits, one_hot(labels, CLASSES))
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("whole_batch", [True, False])
def test_dice_of_regions_equals_monai(whole_batch: bool) -> None:
    logits, labels = make(REGIONS)
    target = one_hot(labels, REGIONS)
    oracle = DiceLoss(
        sigmoid=True, batch=whole_batch, smooth_nr=SMOOTH, smooth_dr=SMOOTH
    )
    loss = build_loss("dice", REGIONS, batch_dice=whole_batch)
    torch.testing.assert_close(
        loss(logits, labels), oracle(logits, target), rtol=1e-9, atol=1e-9
    )
    both = build_loss("dice_ce", REGIONS, batch_dice=whole_batch)(logits, labels)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(both, oracle(logits, target) + bce)


def test_focal_terms_equal_monai() -> None:
    logits, labels = make(CLASSES)
    found = build_loss("dice_focal", CLASSES)(logits, labels)
    found = found - build_loss("dice", CLASSES)(logits, labels)
    oracle = FocalLoss(gamma=2.0, use_softmax=True)
    # MONAI averages over classes too, the paper sums: a factor of their number.
    expected = 3 * oracle(logits, one_hot(labels, CLASSES))
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-6)
    logits, labels = make(REGIONS)
    found = build_loss("dice_focal", REGIONS)(logits, labels)
    found = found - build_loss("dice", REGIONS)(logits, labels)
    expected = FocalLoss(gamma=2.0)(logits, one_hot(labels, REGIONS))
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-6)


def test_tversky_term_equals_monai() -> None:
    logits, labels = make(CLASSES)
    found = build_loss("tversky_ce", CLASSES)(logits, labels)
    found = found - build_loss("ce", CLASSES)(logits, labels)
    oracle = TverskyLoss(
        include_background=False, softmax=True, batch=True,
        alpha=TVERSKY_FALSE_POSITIVE, beta=TVERSKY_FALSE_NEGATIVE,
        smooth_nr=SMOOTH / 2, smooth_dr=SMOOTH / 2,
    )  # fmt: skip
    torch.testing.assert_close(
        found, oracle(logits, one_hot(labels, CLASSES)), rtol=1e-9, atol=1e-9
    )


def loop_dice_ce(logits: Tensor, labels: Tensor, scheme: LabelScheme) -> float:
    """Dice over the batch plus cross-entropy, voxel by voxel."""
    outputs = scheme.num_outputs
    shared, mass, volume = np.zeros(outputs), np.zeros(outputs), np.zeros(outputs)
    entropy, count = 0.0, 0
    for b, *voxel in np.ndindex(*labels.shape):
        value = int(labels[(b, *voxel)])
        if value == scheme.ignore_label:
            continue
        x = logits[(b, slice(None), *voxel)].numpy()
        if scheme.is_region_based:
            p = 1 / (1 + np.exp(-x))
            y = np.array([value in group for group in scheme.regions.values()])
            entropy += -np.mean(np.where(y, np.log(p), np.log(1 - p)))
        else:
            p = np.exp(x) / np.exp(x).sum()
            y = np.array([value == known for known in scheme.class_values])
            entropy += -np.log(p[y][0])
        shared, mass, volume = shared + p * y, mass + p, volume + y
        count += 1
    overlap = (2 * shared + SMOOTH) / (mass + volume + SMOOTH)
    overlap = overlap if scheme.is_region_based else overlap[1:]
    return 1 - overlap.mean() + entropy / count


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dice_ce_equals_a_loop_over_voxels(scheme: LabelScheme) -> None:
    logits, labels = make(scheme)
    found = float(build_loss("dice_ce", scheme)(logits, labels))
    assert found == pytest.approx(loop_dice_ce(logits, labels, scheme), rel=1e-10)


def test_numbers_by_hand() -> None:
    """Two voxels, two classes: probabilities of class a 1/2 and 3/4; truth: 0, a."""
    scheme = LabelScheme({"background": 0, "a": 1})
    logits = torch.zeros(1, 2, 1, 1, 2, dtype=torch.float64)
    logits[0, 1, 0, 0, 1] = math.log(3)
    labels = torch.tensor([[[[0, 1]]]], dtype=torch.int16)
    entropy = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    dice = 1 - 2 * 0.75 / (1.25 + 1)
    focal = -(math.log(1 / 2) / 4 + math.log(3 / 4) / 16) / 2
    tversky = 1 - 0.75 / (0.75 + 0.3 * 0.5 + 0.7 * 0.25)
    expected = {
        "ce": entropy,
        "dice": dice,
        "dice_ce": dice + entropy,
        "dice_focal": dice + focal,
        "tversky_ce": tversky + entropy,
    }
    for name, value in expected.items():
        found = float(build_loss(name, scheme)(logits, labels))
        assert found == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradients(name: str, scheme: LabelScheme) -> None:
    logits, labels = make(scheme, (2, 2, 3, 2))
    for whole_batch in (True, False):
        loss = build_loss(name, scheme, batch_dice=whole_batch)
        assert torch.autograd.gradcheck(
            lambda x, loss=loss: loss(x, labels),
            logits.requires_grad_(),
            fast_mode=True,
        )


# ---- deep supervision ---------------------------------------------------------------


def test_resolutions_weigh_one_half_and_a_quarter() -> None:
    full, labels = make(CLASSES, (1, 8, 8, 8))
    half, quarter = full[..., ::2, ::2, ::2], full[..., ::4, ::4, ::4]
    loss = build_loss("dice_ce", CLASSES)
    parts = [
        loss(logits, resize_labels(labels, logits.shape[2:]))
        for logits in (full, half, quarter)
    ]
    expected = (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75
    torch.testing.assert_close(loss([full, half, quarter], labels), expected)
    torch.testing.assert_close(loss([full], labels), parts[0])
    own = build_loss("dice_ce", CLASSES, [3.0, 1.0, 0.0])
    expected = parts[0] * 0.75 + parts[1] * 0.25
    torch.testing.assert_close(own([full, half, quarter], labels), expected)


def test_wrong_numbers_of_weights_are_config_errors() -> None:
    full, labels = make(CLASSES)
    with pytest.raises(ConfigError, match="weights"):
        build_loss("ce", CLASSES, [1.0, 0.5])([full], labels)


# ---- hard cases ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", [CLASSES_IGNORE, REGIONS_IGNORE])
def test_all_ignored_gives_zero_with_zero_gradient(
    name: str, scheme: LabelScheme
) -> None:
    logits, labels = make(scheme)
    logits = logits.float().requires_grad_()
    value = build_loss(name, scheme)(logits, torch.full_like(labels, 9))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("scheme", [CLASSES_IGNORE, REGIONS_IGNORE])
@pytest.mark.parametrize("name", NAMES)
def test_ignored_voxels_have_no_influence(name: str, scheme: LabelScheme) -> None:
    logits, labels = make(scheme)
    changed = torch.where((labels == 9)[:, None], 50.0, logits).requires_grad_()
    loss = build_loss(name, scheme)
    value = loss(changed, labels)
    torch.testing.assert_close(value, loss(logits, labels))
    value.backward()
    assert changed.grad is not None
    assert not changed.grad[(labels == 9)[:, None].expand_as(changed)].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", [CLASSES, REGIONS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_stay_finite(
    name: str, scheme: LabelScheme, dtype: torch.dtype
) -> None:
    logits, labels = make(scheme)
    logits = (logits.sign() * 6e4).to(dtype).requires_grad_()
    value = build_loss(name, scheme)(logits, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", [CLASSES, REGIONS])
def test_absent_classes_give_finite_losses_that_a_perfect_answer_makes_small(
    name: str, scheme: LabelScheme
) -> None:
    logits, labels = make(scheme)
    empty = torch.zeros_like(labels)
    leaf = logits.float().requires_grad_()
    value = build_loss(name, scheme)(leaf, empty)
    value.backward()
    assert torch.isfinite(value)
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    perfect = torch.full_like(logits, -60.0)
    if not scheme.is_region_based:
        perfect[:, 0] = 60.0
    assert float(build_loss(name, scheme)(perfect, empty)) < 1e-6


@pytest.mark.parametrize("scheme", [CLASSES, REGIONS])
def test_float32_is_kept_under_autocast(scheme: LabelScheme) -> None:
    logits, labels = make(scheme)
    loss = build_loss("dice_ce", scheme)
    expected = loss(logits.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits.float(), labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_perfect_answer_is_worth_nothing_and_gets_no_worse_by_confidence() -> None:
    for scheme in (CLASSES, REGIONS):
        _, labels = make(scheme)
        answer = (one_hot(labels, scheme) * 2 - 1) * 40
        for name in NAMES:
            assert float(build_loss(name, scheme)(answer, labels)) < 1e-5


def test_training_a_voxelwise_model_finds_the_labels() -> None:
    for scheme in (CLASSES_IGNORE, REGIONS_IGNORE):
        _, labels = make(scheme, (2, 2, 3, 4))
        for name in NAMES:
            logits = torch.zeros(2, scheme.num_outputs, 2, 3, 4, requires_grad=True)
            loss, step = build_loss(name, scheme), torch.optim.SGD([logits], lr=60.0)
            for _ in range(12):
                step.zero_grad()
                loss(logits, labels).backward()
                step.step()
            for sample, truth in zip(logits.detach().numpy(), labels, strict=True):
                known = (truth != 9).numpy()
                decoded = scheme.encode(scheme.decode(sample))
                expected = scheme.encode(truth.numpy())
                assert (decoded[..., known] == expected[..., known]).mean() > 0.99


def test_unknown_losses_and_wrong_shapes_are_named() -> None:
    with pytest.raises(ConfigError, match="dice_ce"):
        build_loss("lovasz", CLASSES)
    logits, labels = make(CLASSES)
    with pytest.raises(GeometryError, match="logits"):
        build_loss("ce", CLASSES)(logits[:, :2], labels)
    with pytest.raises(GeometryError, match="logits"):
        build_loss("ce", CLASSES)(logits, labels[:, 1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_number_is_looked_at_which_a_gpu_would_wait_for(name, scheme) -> None:
    """Tensors without numbers raise where one is asked for."""
    with FakeTensorMode():
        logits = torch.zeros((2, scheme.num_outputs, 4, 5, 6), requires_grad=True)
        labels = torch.zeros((2, 4, 5, 6), dtype=torch.int16)
        build_loss(name, scheme)(logits, labels).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_gpu_gives_what_the_cpu_gives(scheme: LabelScheme) -> None:
    logits, labels = make(scheme)
    for name in NAMES:
        loss = build_loss(name, scheme)
        here, there = logits.clone().requires_grad_(), logits.cuda().requires_grad_()
        loss(here, labels).backward()
        loss(there, labels.cuda()).backward()
        assert here.grad is not None
        assert there.grad is not None
        torch.testing.assert_close(there.grad.cpu(), here.grad)
