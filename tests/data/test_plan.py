"""Plans for data sets of every kind, and plans edited by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmamba.config import NetworkConfig
from segmamba.data.dataset import Dataset
from segmamba.data.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import (
    ChannelNormalization,
    Plan,
    choose_normalization,
    load_plan,
    make_plan,
    plan_hash,
    save_plan,
)
from segmamba.data.planning import (
    choose_batch,
    choose_orientation,
    choose_spacing,
    choose_strides,
    total_strides,
)
from segmamba.errors import ConfigError, FormatError
from segmamba.nn import build_network, preset_config

SCHEME = LabelScheme({"background": 0, "a": 1, "b": 2})
MR = ChannelFingerprint("T1", "other", 400, 80, 390, 0, 900, 50, 800, 0.0)
LIGHT = preset_config("segmamba-light")
FULL = preset_config("segmamba")


def case_of(shape, spacing, orientation="RAS", name="c") -> CaseFingerprint:
    return CaseFingerprint(name, shape, spacing, orientation, shape, {"a": 5, "b": 5})


def fingerprint_of(*cases: CaseFingerprint, channels=(MR,)) -> Fingerprint:
    return Fingerprint("toy", cases, channels, (1, 1, 1), (1, 1, 1), {"a": 5, "b": 5})


def dataset_of(channels=("T1",), scheme=SCHEME) -> Dataset:
    return Dataset("toy", Path("toy"), "csv", channels, scheme, ())


def plan_of(*cases, network=LIGHT, count=1, **options) -> Plan:
    fingerprint = fingerprint_of(*(cases * count))
    return make_plan(fingerprint, dataset_of(), network=network, **options)


def test_the_hippocampus():
    plan = plan_of(case_of((35, 50, 36), (1, 1, 1)), count=208)
    assert plan.orientation == "SPL"
    assert plan.spacing_mm == (1, 1, 1)
    assert plan.patch_size == (40, 56, 40)
    assert plan.batch_size == 2
    assert plan.network.strides == ((2, 2, 2),) * 3
    assert (plan.network.in_channels, plan.network.out_channels) == (1, 3)
    assert plan.normalization == (ChannelNormalization("zscore"),)


def test_the_published_network_at_its_published_patch():
    # BraTS after its crop, on a GPU with enough memory: what the paper trained.
    case = case_of((139, 170, 138), (1, 1, 1), "LPS")
    plan = plan_of(case, network=FULL, device="cuda", memory_mib=40_000, count=1000)
    assert plan.patch_size == (128, 128, 128)
    assert plan.orientation == "SPL"
    assert plan.network.dims == (48, 96, 192, 384)
    assert plan.network.hidden_size == 768
    assert plan.network.strides == ((2, 2, 2),) * 4
    assert plan.batch_size >= 2
    assert plan.memory_training_mib is not None
    assert plan.memory_training_mib <= 40_000


def test_a_cpu_gets_patches_that_it_can_train():
    plan = plan_of(case_of((139, 170, 138), (1, 1, 1)), count=1000)
    assert plan.patch_size == (64, 64, 64)
    assert plan.batch_size == 2


def test_less_memory_gives_smaller_patches():
    case = case_of((139, 170, 138), (1, 1, 1))
    sizes = [
        math.prod(plan_of(case, network=FULL, device="cuda", memory_mib=m).patch_size)
        for m in (2_500, 4_000, 8_000, 40_000)
    ]
    assert sizes == sorted(set(sizes))
    plan = plan_of(case, network=FULL, device="cuda", memory_mib=5_000)
    assert plan.memory_training_mib is not None
    assert plan.memory_training_mib <= 5_000


def test_thick_slices_come_first_and_are_halved_last():
    # 22 slices of 6.5 mm, as in the DICOM study of the shared data.
    case = case_of((280, 320, 22), (0.6875, 0.6875, 6.5), "LPS")
    plan = plan_of(case, device="cuda", memory_mib=20_000, count=50)
    assert plan.orientation == "SPL"
    assert plan.spacing_mm == (6.5, 0.6875, 0.6875)
    assert plan.network.strides == ((1, 2, 2), (1, 2, 2), (1, 2, 2))
    assert plan.patch_size[0] == 22
    assert plan.patch_size[1] > 150
    sagittal = case_of((22, 280, 320), (6.5, 0.7, 0.7), "RAS")
    assert plan_of(sagittal).orientation == "LSP"
    coronal = case_of((280, 22, 320), (0.7, 6.5, 0.7), "RAS")
    assert plan_of(coronal).orientation == "PSL"


def test_thick_slices_are_halved_once_the_plane_is_as_coarse():
    strides = choose_strides((40, 320, 320), (3.0, 0.75, 0.75), 4)
    assert strides == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert choose_strides((64, 64, 64), (1, 1, 1), 4) == ((2, 2, 2),) * 4
    assert choose_strides((60, 30, 15), (1, 1, 1), 4) == (
        (2, 2, 2),
        (2, 2, 2),
        (2, 2, 1),
        (2, 1, 1),
    )


def test_mixed_orientations_are_compared_axis_by_axis():
    # The same scan stored in three orders: the median is the scan's.
    cases = [
        case_of((200, 180, 40), (1.0, 1.1, 4.0), "RAS"),
        case_of((40, 200, 180), (4.0, 1.0, 1.1), "IRP"),
        case_of((180, 40, 200), (1.1, 4.0, 1.0), "ASL"),
    ]
    assert choose_spacing(cases) == (1.0, 1.1, 4.0)
    plan = plan_of(*cases)
    assert plan.spacing_mm == (4.0, 1.1, 1.0)
    assert plan.orientation == "SPL"


def test_thin_slices_of_some_are_not_lost_to_thick_ones_of_most():
    thick = [case_of((300, 300, 30), (0.8, 0.8, 5.0)) for _ in range(8)]
    thin = [case_of((300, 300, 150), (0.8, 0.8, 1.0)) for _ in range(2)]
    left, front, up = choose_spacing(thick + thin)
    assert (left, front) == (0.8, 0.8)
    assert up == pytest.approx(np.percentile([5.0] * 8 + [1.0] * 2, 10), abs=1e-6)
    # Not where the axis is short in voxels only because the body part is.
    cube = [case_of((30, 30, 30), (0.8, 0.8, 5.0)) for _ in range(8)]
    assert choose_spacing([*cube, *thin])[2] == 5.0


def test_orientation_of_nearly_equal_spacings():
    assert choose_orientation((1.0, 1.0, 1.0)) == "SPL"
    assert choose_orientation((1.1, 1.0, 1.0)) == "SPL"
    assert choose_orientation((1.0, 1.3, 1.0)) == "PSL"
    assert choose_orientation((2.0, 1.0, 2.0)) == "SPL"


@given(
    st.tuples(*[st.integers(12, 400)] * 3),
    st.tuples(*[st.floats(0.3, 6.0)] * 3),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["segmamba", "segmamba-light", "segmamba-paper"]),
)
@settings(max_examples=60, deadline=None)
def test_any_grid_gets_a_plan_that_holds_together(shape, spacing, device, name):
    plan = plan_of(case_of(shape, spacing), network=preset_config(name), device=device)
    totals = total_strides(plan.network.strides)
    assert all(n % t == 0 for n, t in zip(plan.patch_size, totals, strict=True))
    median = (
        [
            n * mm / new
            for n, mm, new in zip(
                shape[::-1], spacing[::-1], plan.spacing_mm, strict=True
            )
        ]
        if plan.orientation == "SPL"
        else None
    )
    if median:  # never longer than the median case, rounded up
        pairs = zip(plan.patch_size, median, totals, strict=True)
        assert all(n <= math.ceil(round(m) / t) * t for n, m, t in pairs)
    assert len(plan.network.dims) == len(plan.network.depths)
    assert len(plan.network.dims) == len(plan.network.strides) >= 2
    assert math.prod(plan.patch_size) <= {"cpu": 64**3, "cuda": 128**3}[device] * 1.3


def test_the_adapted_network_runs_on_its_patch():
    plan = plan_of(case_of((30, 19, 24), (1, 1, 1)))
    network = build_network(plan.network)
    assert network(torch.zeros(1, 1, *plan.patch_size)).shape[2:] == plan.patch_size


def test_regions_set_the_outputs():
    scheme = LabelScheme(SCHEME.labels, {"all": (1, 2)}, (1,))
    fingerprint = fingerprint_of(case_of((64, 64, 64), (1, 1, 1)))
    plan = make_plan(fingerprint, dataset_of(scheme=scheme), network=LIGHT)
    assert plan.network.out_channels == 1


def test_normalizations():
    ct = dataclasses.replace(MR, name="CT", modality="ct")
    rule = choose_normalization(ct)
    assert rule == ChannelNormalization("ct", (50, 800), 400, 80)
    stripped = dataclasses.replace(MR, zero_share=0.6)
    assert choose_normalization(stripped).scheme == "zscore-nonzero"
    assert choose_normalization(MR).scheme == "zscore"
    raw = dataclasses.replace(MR, modality="none")
    assert choose_normalization(raw).scheme == "none"
    flat = dataclasses.replace(ct, percentile_99_5=50, std=0)
    rule = choose_normalization(flat)
    assert rule.clip is not None
    assert rule.clip[0] < rule.clip[1]
    assert rule.std is not None
    assert rule.std > 0


def test_batches_fill_the_memory_or_a_twentieth_of_the_data():
    memory = {n: 100 + 50 * n for n in range(1, 99)}.__getitem__
    assert choose_batch((10, 10, 10), 1e9, memory, 1000) == 18
    assert choose_batch((10, 10, 10), 100_000, memory, 1000) == 5
    assert choose_batch((10, 10, 10), 1e9, memory, 10) == 2
    assert choose_batch((10, 10, 10), 10, memory, 1000) == 2


def test_overrides_are_followed():
    case = case_of((139, 170, 138), (1, 1, 1))
    plan = plan_of(
        case,
        overrides={
            "spacing_mm": [2, 2, 2],
            "orientation": "RAS",
            "batch_size": 3,
            "network": {"d_state": 8},
            "resampling": "cubic",
        },
    )
    assert plan.spacing_mm == (2, 2, 2)
    assert plan.orientation == "RAS"
    assert plan.batch_size == 3
    assert plan.network.d_state == 8
    assert plan.network.dims == LIGHT.dims
    assert plan.resampling == "cubic"
    assert plan.patch_size == (64, 64, 64)  # of the median (70, 85, 69) at 2 mm
    plan = plan_of(case, overrides={"patch_size": [48, 40, 32]})
    assert plan.patch_size == (48, 40, 32)
    plan = plan_of(case, overrides={"network": {"strides": [[1, 2, 2]] * 3}})
    assert plan.network.strides == ((1, 2, 2),) * 3
    assert all(n % 8 == 0 for n in plan.patch_size[1:])
    rules = [{"scheme": "none"}]
    assert plan_of(case, overrides={"normalization": rules}).normalization == (
        ChannelNormalization("none"),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patchsize": [64] * 3}, "Did you mean 'patch_size'"),
        ({"patch_size": [64, 64]}, "list of 3"),
        ({"patch_size": [1, 1, 1]}, "too small.*overrides"),
        ({"patch_size": [64, 64, 0]}, "patch_size.*1 or more"),
        ({"network": {"d_stat": 8}}, "Did you mean 'd_state'"),
        ({"orientation": "RLS"}, "one each.*'RLS'"),
        ({"normalization": []}, "wrong number of normalizations"),
        ({"spacing_mm": [0, 1, 1]}, "spacing_mm"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(case_of((64, 64, 64), (1, 1, 1)), overrides=overrides)


def test_a_fingerprint_of_other_channels():
    with pytest.raises(ConfigError, match="Make the fingerprint again"):
        make_plan(
            fingerprint_of(case_of((64, 64, 64), (1, 1, 1))),
            dataset_of(("T2",)),
            network=LIGHT,
        )


def test_plans_go_through_json(tmp_path):
    plan = plan_of(case_of((64, 64, 64), (1, 1, 1)))
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json") == plan


def edit(plan: Plan, path: Path, change) -> Path:
    save_plan(path, plan)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(patch_size=[64, 64, 7]), r"too small.*\(8, 8, 8\)"),
        (lambda d: d.update(patch_size=[8, 8, 8]), "one voxel"),
        (lambda d: d.update(orientation="SLL"), "such as SPL.*'SLL'"),
        (lambda d: d["normalization"].append({"scheme": "none"}), "1, one for each"),
        (lambda d: d.update(normalization=[{"scheme": "ct"}]), "clip, mean and std"),
        (
            lambda d: d.update(
                normalization=[{"scheme": "ct", "clip": [5, 1], "mean": 0, "std": 1}]
            ),
            "lower bound first",
        ),
        (lambda d: d.update(spacing_mm=[1, 1, -1]), "above 0"),
        (lambda d: d.update(batch_size=0), "1 or more"),
        (lambda d: d.update(batch_size="2"), "batch_size"),
        (lambda d: d.update(spacing=[1, 1, 1]), "Did you mean 'spacing_mm'"),
        (lambda d: d.pop("network"), "missing: expected network"),
        (lambda d: d["network"].update(depths=[1]), r"network\.depths.*3 entries"),
        (lambda d: d["network"].update(strides=[[2, 2, 0]] * 3), r"network\.strides"),
        (lambda d: d.update(resampling="nearest"), "linear, cubic"),
    ],
)
def test_a_plan_edited_wrongly_is_named(tmp_path, change, message):
    plan = plan_of(case_of((64, 64, 64), (1, 1, 1)))
    path = edit(plan, tmp_path / "plan.json", change)
    with pytest.raises(ConfigError, match=rf"(?s){message}") as error:
        load_plan(path)
    assert "plan.json" in str(error.value)


def test_a_plan_edited_rightly(tmp_path):
    plan = plan_of(case_of((64, 64, 64), (1, 1, 1)))
    path = edit(plan, tmp_path / "plan.json", lambda d: d.update(batch_size=7))
    assert load_plan(path) == dataclasses.replace(plan, batch_size=7)
    with pytest.raises(FormatError, match=r"none\.json"):
        load_plan(tmp_path / "none.json")


def test_the_hash_follows_what_changes_the_cache():
    plan = plan_of(case_of((64, 64, 64), (1, 1, 1)))
    rule = ChannelNormalization("zscore-nonzero")
    for change in (
        {"orientation": "RAS"},
        {"spacing_mm": (1.0, 1.0, 1.5)},
        {"normalization": (rule,)},
        {"resampling": "cubic"},
        {"crop_to_nonzero": False},
    ):
        assert plan_hash(dataclasses.replace(plan, **change)) != plan_hash(plan)
    for change in (
        {"patch_size": (32, 32, 32)},
        {"batch_size": 8},
        {"network": NetworkConfig()},
        {"memory_training_mib": 1.0},
    ):
        assert plan_hash(dataclasses.replace(plan, **change)) == plan_hash(plan)
