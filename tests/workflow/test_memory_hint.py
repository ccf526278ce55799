"""The hint for a full memory names numbers that would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from segmamba.data.memory import training_memory_mib
from segmamba.nn import preset_config
from segmamba.workflow.memory_hint import (
    Step,
    memory_hint,
    smaller_batch,
    smaller_patch,
)

PLAN = Path("run/plan.json")
NETWORK = preset_config("segmamba", in_channels=4, out_channels=4)


def step(batch_size: int = 4, patch_size=(128, 128, 128), **changes) -> Step:
    network = preset_config("segmamba", in_channels=4, out_channels=4, **changes)
    return Step(network, patch_size, batch_size, "cuda")


def test_a_smaller_batch_comes_first_and_is_the_largest_that_fits() -> None:
    tried = step()
    room = 0.9 * 12_000
    found = smaller_batch(tried, room)
    assert found is not None
    assert found.mib <= room
    assert step(found.batch_size + 1).mib > room
    text = memory_hint(tried, 12_000, PLAN)
    assert f"should take {tried.mib:.0f} MiB. Lower batch_size from 4 to " in text
    assert f"to {found.batch_size} in run/plan.json (then {found.mib:.0f} MiB)" in text
    assert "patch_size from" not in text
    assert text.endswith(", or close other programs.")


def test_a_smaller_patch_follows_where_one_patch_is_too_much() -> None:
    tried = step(1)
    text = memory_hint(tried, 3000, PLAN)
    assert "batch_size from" not in text
    match = re.search(r"patch_size from 128 x 128 x 128 to (.+?) in (.+?) \(then", text)
    assert match is not None
    assert match[2] == "run/plan.json"
    sides = tuple(int(n) for n in match[1].split(" x "))
    assert all(n % 16 == 0 for n in sides)
    assert training_memory_mib(NETWORK, sides, 1, "cuda") <= 0.9 * 3000
    assert re.search(r"checkpointing to true in .* \(then \d+ MiB\)", text)


def test_what_did_not_fit_counts_even_if_the_device_should_have_room() -> None:
    tried = step(2)
    found = smaller_batch(tried, 0.9 * tried.mib)
    assert found is not None
    assert f"from 2 to {found.batch_size}" in memory_hint(tried, 1e9, PLAN)


def test_a_patch_that_cannot_shrink_is_not_named() -> None:
    tried = step(1, (16, 16, 32))
    assert smaller_patch(tried, 1.0) is None
    assert "patch_size from" not in memory_hint(tried, 100, PLAN)


def test_checkpointing_that_is_on_is_not_advised() -> None:
    assert "checkpointing" not in memory_hint(step(checkpointing=True), 3000, PLAN)


@pytest.mark.parametrize("name", ["unet", "swinunetr", "unetr"])
def test_other_networks_get_a_hint_too(name: str) -> None:
    network = preset_config(name, in_channels=1, out_channels=2)
    tried = Step(network, (96, 96, 96), 2, "cuda")
    assert "Lower batch_size from 2 to 1" in memory_hint(tried, 100, PLAN)
    assert "lower patch_size from 96 x 96 x 96 to" in memory_hint(tried, 100, PLAN)
    knows = "checkpointing" in memory_hint(tried, 100, PLAN)
    assert knows == (name == "swinunetr")


def test_a_batch_that_the_settings_choose_is_lowered_there() -> None:
    text = memory_hint(step(), 12_000, PLAN, "the settings' section train")
    assert re.search(r"from 4 to \d in the settings' section train", text)
