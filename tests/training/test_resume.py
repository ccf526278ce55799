"""A run stopped and gone on with ends at the very bits of an undisturbed one."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from segmamba.checkpoint import load_checkpoint, previous_path
from segmamba.errors import CheckpointError, ConfigError
from segmamba.training import read_log

TIMES = ("seconds", "elapsed_s", "waited_s", "patches_per_s", "peak_memory_mib")
KILLS = 3


def outcome(folder: Path) -> tuple[dict, dict, list]:
    """All tensors, the state and the log, without what the clock gives."""
    tensors, metadata = load_checkpoint(folder / "checkpoint.safetensors")
    state = {
        key: value for key, value in metadata["state"].items() if not key.endswith("_s")
    }
    log = [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_log(folder / "log.jsonl")
    ]
    return tensors, state, log


def assert_same(first: Path, second: Path) -> None:
    (tensors, state, log), (tensors2, state2, log2) = outcome(first), outcome(second)
    assert tensors.keys() == tensors2.keys()
    assert {name.split(".")[0] for name in tensors} == {"network", "ema", "optimizer"}
    for name in tensors:
        assert torch.equal(tensors[name], tensors2[name]), name
    assert state == state2
    assert log == log2


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "precision": "bf16"}])
def test_stopped_in_the_middle_of_an_epoch(tiny, tmp_path, changes):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    tiny.make_trainer(tmp_path / "whole", config).fit()

    def stop(progress):
        if progress.step in (3, 12):
            raise RuntimeError("power cut")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="power cut"):
            tiny.make_trainer(tmp_path / "cut", config, on_progress=stop).fit(
                resume=True
            )
    workers = dataclasses.replace(config, workers=3)
    torch.rand(5)  # the caller's random numbers must not matter
    tiny.make_trainer(tmp_path / "cut", workers).fit(resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_looking_at_a_step_during_the_next_changes_nothing(tiny, tmp_path):
    """As on a GPU, which needn't wait for the CPU to see its loss."""
    reports = {}
    for name, late in (("at once", False), ("late", True)):
        seen = reports[name] = []
        run = tiny.make_trainer(tmp_path / name, on_progress=seen.append)
        run._looks_late = late
        run.fit()
    assert_same(tmp_path / "at once", tmp_path / "late")
    at_once = [(item.step, item.loss) for item in reports["at once"]]
    late = [(item.step, item.loss) for item in reports["late"]]
    assert [step for step, _ in late] == [step for step, _ in at_once]
    assert late[0] == at_once[0]
    assert late[5][1] == at_once[4][1]


def test_killed_with_signal_9_at_random_moments(tiny, tmp_path):
    config = dataclasses.replace(tiny.CONFIG, max_epochs=12, optimizer="adamw")
    tiny.make_trainer(tmp_path / "whole", config).fit()
    steps = [kill_somewhere(tmp_path / "cut") for _ in range(KILLS)]
    assert steps[0] < 60, "it was never killed before its end"
    subprocess.run(command(tmp_path / "cut"), check=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").glob(".writing-*"))
    assert not (tmp_path / "cut" / "training.lock").exists()


def command(folder: Path) -> list[str]:
    program = Path(__file__).with_name("tiny_run.py")
    return [sys.executable, str(program), str(folder)]


def kill_somewhere(folder: Path) -> int:
    """Let it do some steps, kill it, and tell how far it came."""
    file = folder / "checkpoint.safetensors"
    before = file.stat().st_mtime_ns if file.exists() else 0
    process = subprocess.Popen(command(folder))
    while not file.exists() or file.stat().st_mtime_ns == before:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(random.random() * 0.3)
    process.kill()
    process.wait()
    readable = file if file.exists() else previous_path(file)
    return load_checkpoint(readable)[1]["state"]["step"]


def test_a_truncated_state_falls_back_and_ends_the_same(tiny, tmp_path):
    tiny.make_trainer(tmp_path / "whole").fit()

    def stop(progress):
        if progress.step == 12:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        tiny.make_trainer(tmp_path / "cut", on_progress=stop).fit()
    file = tmp_path / "cut" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = tiny.make_trainer(tmp_path / "cut").fit(resume=True)
    assert result.note is not None
    assert "before the last" in result.note
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_log_lines_behind_the_state_are_written_again_and_not_twice(tiny, tmp_path):
    tiny.make_trainer(tmp_path / "whole").fit()
    config = dataclasses.replace(tiny.CONFIG, save_every_s=1e9)
    tiny.make_trainer(tmp_path / "cut", config).fit()
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"epoch": 5, "step": 25}\n{"epoch": 6, "st')
    longer = dataclasses.replace(config, max_epochs=6)
    tiny.make_trainer(tmp_path / "cut", longer).fit(resume=True)
    epochs = [line["epoch"] for line in read_log(tmp_path / "cut" / "log.jsonl")]
    assert epochs == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_returns_at_once(tiny, tmp_path):
    tiny.make_trainer(tmp_path).fit()
    before = {item.name: item.stat().st_mtime_ns for item in tmp_path.iterdir()}

    def never(step):
        raise AssertionError(step)

    result = tiny.make_trainer(tmp_path, make_batch=never).fit(resume=True)
    assert (result.step, result.epoch, result.stopped) == (20, 4, "finished")
    assert before == {item.name: item.stat().st_mtime_ns for item in tmp_path.iterdir()}


def test_a_run_is_not_overwritten_unasked(tiny, tmp_path):
    tiny.make_trainer(tmp_path).fit()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="--resume, or choose another folder"):
        tiny.make_trainer(tmp_path).fit()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, r"learning_rate 0\.05 -> 0\.1"),
        ({"max_epochs": 3}, "max_epochs 4 -> 3"),
        ({"max_time_s": 60.0}, r"max_time_s None -> 60\.0"),
        ({"seed": 1, "optimizer": "adamw"}, "optimizer 'sgd' -> 'adamw'; seed"),
    ],
)
def test_other_settings_are_refused_by_name(tiny, tmp_path, changes, message):
    tiny.make_trainer(tmp_path).fit()
    other = dataclasses.replace(tiny.CONFIG, **changes)
    with pytest.raises(ConfigError, match=message):
        tiny.make_trainer(tmp_path, other).fit(resume=True)


def test_other_data_and_other_networks_are_refused(tiny, tmp_path):
    tiny.make_trainer(tmp_path, plan_hash="abc").fit()
    with pytest.raises(ConfigError, match="plan_hash 'abc' -> 'def'"):
        tiny.make_trainer(tmp_path, plan_hash="def").fit(resume=True)
    wider = tiny.TinyNetwork(width=9)
    with pytest.raises(CheckpointError, match=r"does not fit.*size mismatch"):
        tiny.make_trainer(tmp_path, plan_hash="abc", network=wider).fit(resume=True)


def test_other_cases_are_refused_also_at_the_end(tiny, tmp_path):
    tiny.make_trainer(tmp_path, split_hash="abc").fit()
    message = r"cases are others.*hash abc, found def, in .*Put splits\.json.*back"
    with pytest.raises(ConfigError, match=message):
        tiny.make_trainer(tmp_path, split_hash="def").fit(resume=True)


def test_a_model_in_place_of_a_state_is_refused(tiny, tmp_path):
    result = tiny.make_trainer(tmp_path).fit()
    result.checkpoint_path.write_bytes(result.model_path.read_bytes())
    with pytest.raises(CheckpointError, match="weights for prediction"):
        tiny.make_trainer(tmp_path).fit(resume=True)
