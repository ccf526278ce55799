"""The trainer learns, stops for the right reasons, and says what it did."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys

import pytest
import torch
import yaml
from torch import nn

from segmamba import checkpoint
from segmamba.checkpoint import load_checkpoint, load_model_file
from segmamba.config import AugmentationConfig, TrainConfig, from_dict
from segmamba.data.labels import LabelScheme
from segmamba.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    TrainingError,
)
from segmamba.nn import create_network
from segmamba.training import read_log, trainer
from segmamba.training.losses import build_loss


def changed(tiny, **changes) -> TrainConfig:
    return dataclasses.replace(tiny.CONFIG, **changes)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", "sgd"), ("fp32", "adamw"), ("bf16", "sgd"), ("fp16", "sgd")],
)
def test_it_learns_a_blob(tiny, tmp_path, precision, optimizer):
    config = changed(
        tiny,
        precision=precision,
        optimizer=optimizer,
        learning_rate={"sgd": 0.3, "adamw": 0.03}[optimizer],
        max_epochs=2,
        iterations_per_epoch=60,
        save_every_s=1000,
    )
    run = tiny.make_trainer(tmp_path, config)
    result = run.fit()
    lines = read_log(result.log_path)
    assert lines[1]["loss"] < lines[0]["loss"]
    assert result.best_score is not None
    assert result.best_score > 0.9
    network = tiny.TinyNetwork()
    network.load_state_dict(load_model_file(result.model_path).tensors)
    assert tiny.dice(network) == pytest.approx(lines[1]["validation"]["score"])


def test_a_run_leaves_what_it_promises(tiny, tmp_path):
    seen, epochs = [], []
    run = tiny.make_trainer(
        tmp_path,
        on_progress=seen.append,
        on_epoch=lambda log: epochs.append(len(read_log(log))),
        plan_hash="abc",
        model_metadata={"labels": ["ball"]},
    )
    result = run.fit()
    assert (result.step, result.epoch, result.stopped) == (20, 4, "finished")
    assert [item.step for item in seen] == list(range(1, 21))
    assert [item.fraction for item in seen] == pytest.approx(
        [step / 20 for step in range(1, 21)]
    )
    assert seen[0].learning_rate == pytest.approx(0.05)
    assert seen[10].learning_rate == pytest.approx(0.05 * 0.5**0.9)
    assert seen[-1].remaining_s == 0
    assert epochs == [1, 2, 3, 4]
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "checkpoint-previous.safetensors",
        "checkpoint.safetensors",
        "config.yaml",
        "log.jsonl",
        "model.safetensors",
    ]
    metadata = load_model_file(result.model_path).metadata
    assert metadata["labels"] == ["ball"]
    assert metadata["plan_hash"] == "abc"
    assert metadata["weights"] == "ema"
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert from_dict(TrainConfig, written) == tiny.CONFIG


def test_the_logged_loss_is_the_mean_of_the_steps(tiny, tmp_path):
    seen = []
    result = tiny.make_trainer(tmp_path, on_progress=seen.append).fit()
    means = [
        sum(item.loss for item in seen[first : first + 5]) / 5
        for first in (0, 5, 10, 15)
    ]
    log = read_log(result.log_path)
    assert [line["loss"] for line in log] == pytest.approx(means)
    if sys.platform != "win32":
        assert all(line["peak_memory_mib"] > 10 for line in log)


def test_models_hold_the_average_or_the_last_weights(tiny, tmp_path):
    averaged = tiny.make_trainer(tmp_path / "a")
    averaged.fit()
    last = tiny.make_trainer(tmp_path / "b", changed(tiny, ema_decay=None))
    last.fit()
    stored = load_model_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(
        stored.tensors["first.weight"], averaged.average.tensors["first.weight"]
    )
    stored = load_model_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(stored.tensors["first.weight"], last.network.first.weight)
    assert torch.equal(averaged.network.first.weight, last.network.first.weight)


def test_gradients_are_clipped(tiny, tmp_path):
    limited = changed(tiny, clip_grad_norm=1e-3, momentum=0.0, weight_decay=0.0)
    run = tiny.make_trainer(tmp_path, dataclasses.replace(limited, max_epochs=1))
    before = [item.detach().clone() for item in run.network.parameters()]
    run.fit()
    pairs = zip(run.network.parameters(), before, strict=True)
    moved = math.sqrt(sum(float((a.detach() - b).square().sum()) for a, b in pairs))
    assert 0 < moved <= 5 * 0.05 * 1e-3 * 1.001


def test_outputs_of_several_resolutions_reach_the_loss_as_a_float32_list(
    tiny, tmp_path
):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 2, 1)

        def forward(self, image):
            out = self.layer(image)
            return [out, out[..., ::2, ::2, ::2]]

    def loss(outputs, label):
        assert isinstance(outputs, list)
        assert [item.dtype for item in outputs] == [torch.float32] * 2
        return tiny.loss(outputs[0], label) + tiny.loss(
            outputs[1], label[:, ::2, ::2, ::2]
        )

    config = changed(tiny, precision="bf16", max_epochs=1)
    run = tiny.make_trainer(tmp_path, config, network=Two(), loss=loss, validate=None)
    assert run.fit().step == 5


def test_patience_ends_the_run_and_keeps_the_best_model(tiny, tmp_path):
    scores = iter([0.2, 0.6, 0.5, 0.59, 0.9])
    weights = []

    def validate(network):
        weights.append(network.first.weight.detach().clone())
        return {"score": next(scores)}

    config = changed(tiny, patience=2, max_epochs=100)
    result = tiny.make_trainer(tmp_path, config, validate=validate).fit()
    assert (result.stopped, result.epoch, result.best_score) == ("patience", 4, 0.6)
    stored = load_model_file(result.model_path)
    assert torch.equal(stored.tensors["first.weight"], weights[1])
    again = tiny.make_trainer(tmp_path, config, validate=None).fit(resume=True)
    assert (again.stopped, again.step) == ("patience", 20)


def test_a_score_of_zero_again_is_no_improvement(tiny, tmp_path):
    """A network that finds nothing must lose patience too."""
    config = changed(tiny, patience=2, max_epochs=10)
    zero = {"score": 0.0}
    run = tiny.make_trainer(tmp_path, config, validate=lambda network: zero)
    result = run.fit()
    assert (result.stopped, result.epoch, result.best_score) == ("patience", 3, 0.0)
    assert run.state.best_epoch == 1


def is_finished(folder) -> bool:
    return load_model_file(folder / "model.safetensors").metadata["finished"]


@pytest.mark.parametrize("patience", [None, 2])
def test_the_model_says_that_training_is_over_only_at_its_end(tiny, tmp_path, patience):
    scores = iter([0.2, 0.6, 0.5, 0.4])
    seen = []

    def stop(progress):
        seen.append(is_finished(tmp_path) if progress.step > 5 else False)
        if progress.step == 12 and len(seen) == 12:
            raise KeyboardInterrupt

    config = changed(tiny, patience=patience, max_epochs=9 if patience else 4)
    options = {"validate": lambda _: {"score": next(scores)}, "on_progress": stop}
    with pytest.raises(KeyboardInterrupt):
        tiny.make_trainer(tmp_path, config, **options).fit()
    assert not is_finished(tmp_path)
    before = load_model_file(tmp_path / "model.safetensors")
    result = tiny.make_trainer(tmp_path, config, **options).fit(resume=True)
    assert result.stopped == ("finished" if patience is None else "patience")
    assert not any(seen)
    after = load_model_file(tmp_path / "model.safetensors")
    assert after.metadata["finished"]
    if patience is not None:  # the end marks the best weights and leaves them alone
        assert after.metadata == {**before.metadata, "finished": True}
        assert all(
            torch.equal(after.tensors[name], before.tensors[name])
            for name in before.tensors
        )
    assert not list(tmp_path.glob(".writing-*"))


def test_a_longer_run_is_unfinished_again(tiny, tmp_path):
    config = changed(tiny, max_epochs=1, patience=9)
    tiny.make_trainer(tmp_path, config).fit()
    assert is_finished(tmp_path)
    seen = []
    longer = dataclasses.replace(config, max_epochs=2)
    tiny.make_trainer(
        tmp_path, longer, on_progress=lambda _: seen.append(is_finished(tmp_path))
    ).fit(resume=True)
    assert seen == [False] * 5
    assert is_finished(tmp_path)


def test_a_kill_before_the_last_mark_is_made_good(tiny, tmp_path):
    config = changed(tiny, patience=9)
    tiny.make_trainer(tmp_path, config).fit()
    checkpoint.update_model(tmp_path / "model.safetensors", finished=False)
    assert tiny.make_trainer(tmp_path, config).fit(resume=True).step == 20
    assert is_finished(tmp_path)


@pytest.mark.parametrize("patience", [None, 9])
def test_a_lost_model_is_written_anew(tiny, tmp_path, patience):
    config = changed(tiny, patience=patience)
    tiny.make_trainer(tmp_path, config).fit()
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    tiny.make_trainer(tmp_path, config).fit(resume=True)
    assert is_finished(tmp_path)


def test_scores_without_a_total_are_averaged_and_nan_is_no_improvement(tiny, tmp_path):
    found = iter([{"a": 0.2, "b": {"c": 0.4}}, {"a": math.nan}, {"score": 0.1, "x": 9}])
    config = changed(tiny, max_epochs=3)
    result = tiny.make_trainer(tmp_path, config, validate=lambda _: next(found)).fit()
    assert result.best_score == pytest.approx(0.3)
    assert read_log(result.log_path)[1]["validation"] == {"a": None}


def test_the_clock_ends_the_run_and_drives_the_rate(tiny, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    seen = []

    def tick(progress):
        seen.append(progress)
        now[0] += 1.0

    config = changed(tiny, max_epochs=None, max_time_s=8.0, save_every_s=1e9)
    result = tiny.make_trainer(tmp_path, config, on_progress=tick).fit()
    assert result.step == 8
    assert result.epoch == 2
    rates = [0.05 * (1 - step / 8) ** 0.9 for step in range(8)]
    assert [item.learning_rate for item in seen] == pytest.approx(rates)
    assert [line["step"] for line in read_log(result.log_path)] == [5, 8]
    assert "validation" not in read_log(result.log_path)[1]
    longer = dataclasses.replace(config, max_time_s=10.0)
    again = tiny.make_trainer(tmp_path, longer, on_progress=tick).fit(resume=True)
    assert again.step == 10
    assert again.elapsed_s == pytest.approx(10.0)


def poisoned(tiny, bad_step, value=float("nan")):
    def make_batch(step):
        batch = tiny.make_batch(step)
        if step == bad_step:
            batch.image[1, 0, 3, 3, 3] = value
        return dataclasses.replace(batch, case_ids=("a", f"case_{step}"))

    return make_batch


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_voxel_stops_and_is_named(tiny, tmp_path, precision):
    run = tiny.make_trainer(
        tmp_path, changed(tiny, precision=precision), make_batch=poisoned(tiny, 7)
    )
    message = (
        r"not-a-number.*loss of nan and a gradient norm of nan at step 7; "
        r"cases a, case_7; "
        r"the image is not finite in sample 1 channel 0 "
        r"\(1 voxels\).*first bad gradient is that of first\.weight.*"
        rf"precision {precision}.*segmamba check"
    )
    with pytest.raises(TrainingError, match=message):
        run.fit()
    tensors, metadata = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert metadata["state"]["step"] == 7
    assert all(bool(torch.isfinite(item).all()) for item in tensors.values())


class _Spoil(torch.autograd.Function):
    """Gives its input, and a gradient of nan."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * math.nan


@pytest.mark.parametrize("limit", [None, 12.0])
def test_the_gradient_that_is_bad_is_named_not_the_first_of_all(tiny, tmp_path, limit):
    network = tiny.TinyNetwork()
    last = network.last.forward
    network.last.forward = lambda x: last(x) + _Spoil.apply(network.last.bias).sum()
    run = tiny.make_trainer(
        tmp_path, changed(tiny, clip_grad_norm=limit), network=network
    )
    with pytest.raises(
        TrainingError, match=r"first bad gradient is that of last\.bias"
    ):
        run.fit()


@pytest.mark.parametrize("bad_step", [0, 7, 9, 19])
def test_a_bad_voxel_is_seen_before_anything_is_saved_or_scored(
    tiny, tmp_path, bad_step
):
    """As on a GPU, where a step is looked at while the next one is on its way."""
    scored = []

    def validate(network):
        scored.append(all(item.isfinite().all() for item in network.parameters()))
        return {"score": 1.0}

    run = tiny.make_trainer(
        tmp_path, make_batch=poisoned(tiny, bad_step), validate=validate
    )
    run._looks_late = True
    message = rf"loss of nan .* at step {bad_step}; cases a, case_{bad_step};"
    with pytest.raises(TrainingError, match=message) as caught:
        run.fit()
    assert "the weight" not in str(caught.value)  # the step itself has spoilt it
    assert "sample 1 channel 0" in str(caught.value)
    assert all(scored)
    if bad_step:
        tensors, metadata = load_checkpoint(tmp_path / "checkpoint.safetensors")
        assert metadata["state"]["step"] == bad_step
        assert all(bool(torch.isfinite(item).all()) for item in tensors.values())


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    def spoil(progress):
        if progress.step == 20:  # the last: no other loss can tell
            run.network.first.bias.data[2] = math.inf

    run = tiny.make_trainer(tmp_path, on_progress=spoil, validate=None)
    with pytest.raises(TrainingError, match=r"weights are not finite.*after 20 steps"):
        run.fit()
    tensors, metadata = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert metadata["state"]["step"] == 19
    assert all(bool(torch.isfinite(item).all()) for item in tensors.values())
    header = checkpoint.load_model_metadata(tmp_path / "model.safetensors")
    assert not header["finished"]


def test_a_bad_loss_names_the_rate_and_what_to_do(tiny, tmp_path):
    def loss(logits, label):
        return tiny.loss(logits, label) * float("inf")

    run = tiny.make_trainer(tmp_path, loss=loss)
    with pytest.raises(TrainingError, match=r"the image is finite.*rate 0\.05.*Lower"):
        run.fit()
    assert all(bool(torch.isfinite(item).all()) for item in run.network.parameters())


def test_fp16_skips_what_overflows_and_goes_on(tiny, tmp_path):
    class Overflowing(nn.Module):
        def forward(self, logits, label):
            # Half precision ends at 65504: scales of 2^16 and 2^15 overflow.
            return tiny.loss(logits, label) + 2 * logits.half().mean().float()

    config = changed(tiny, precision="fp16", max_epochs=1, iterations_per_epoch=8)
    seen = []
    run = tiny.make_trainer(
        tmp_path,
        config,
        loss=Overflowing(),
        on_progress=lambda _: seen.append(run.scaler.get_scale()),
    )
    result = run.fit()
    line = read_log(result.log_path)[0]
    assert 2 <= line["skipped_steps"] < 8
    assert seen[:2] == [2.0**15, 2.0**14]
    assert seen[-1] == 2.0 ** (16 - line["skipped_steps"])
    stored = load_checkpoint(result.checkpoint_path)[1]
    assert stored["scaler"]["scale"] == run.scaler.get_scale()


def test_fp16_that_never_recovers_stops(tiny, tmp_path):
    def loss(logits, label):
        return tiny.loss(logits, label) * float("inf")

    config = changed(tiny, precision="fp16", iterations_per_epoch=50)
    run = tiny.make_trainer(tmp_path, config, loss=loss)
    with pytest.raises(TrainingError, match=r"at step 20;.*fp16.*bf16 or fp32"):
        run.fit()


def test_an_error_while_reading_comes_through_in_words(tiny, tmp_path):
    def make_batch(step):
        if step == 6:
            raise FileNotFoundError(2, "No such file or directory", "case_3.npy")
        return tiny.make_batch(step)

    with pytest.raises(TrainingError, match=r"could not be read.*case_3\.npy"):
        tiny.make_trainer(tmp_path, make_batch=make_batch).fit()
    assert not (tmp_path / "training.lock").exists()


def test_a_full_disk_stops_and_keeps_the_last_state(tiny, tmp_path, monkeypatch):
    saved = []

    def save(*arguments):
        saved.append(arguments)
        if len(saved) > 6:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save)
    with pytest.raises(CheckpointError, match=r"No space left.*--resume"):
        tiny.make_trainer(tmp_path).fit()
    monkeypatch.undo()
    assert tiny.make_trainer(tmp_path).fit(resume=True).step == 20


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tiny, tmp_path, number):
    def stop(progress):
        if progress.step == 7:
            os.kill(os.getpid(), number)

    config = changed(tiny, save_every_s=1e9)
    before = signal.getsignal(number)
    message = r"SIG(INT|TERM).*step 7.*--resume"
    with pytest.raises(TrainingError, match=message) as caught:
        tiny.make_trainer(tmp_path, config, on_progress=stop).fit()
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)  # exit code 130
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["state"]["step"] == 7


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_a_signal_ends_a_validation_at_once_and_it_is_done_again(tiny, tmp_path):
    def validate(network):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have come first")

    with pytest.raises(TrainingError, match="SIGTERM"):
        tiny.make_trainer(tmp_path, validate=validate).fit()
    assert read_log(tmp_path / "log.jsonl") == []
    tiny.make_trainer(tmp_path).fit(resume=True)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all("validation" in line for line in lines)
    tiny.make_trainer(tmp_path / "whole").fit()
    whole = read_log(tmp_path / "whole" / "log.jsonl")
    for name in ("learning_rate", "loss"):
        assert [line[name] for line in lines] == [line[name] for line in whole]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("max_time_s", -1.0),
        ("warmup", 1.0),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("augmentation", AugmentationConfig(p_rotation=30.0)),
        ("augmentation", AugmentationConfig(scaling=(0.0, 1.4))),
        ("augmentation", AugmentationConfig(scaling=(1.4, 0.7))),
    ],
)
def test_senseless_settings_are_named(tiny, tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"{name}(\.\w+)? = "):
        tiny.make_trainer(tmp_path, changed(tiny, **{name: value}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_clear_error(tiny, tmp_path):
    with pytest.raises(BackendUnavailableError, match="'cpu' or 'auto'"):
        tiny.make_trainer(tmp_path, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_it_learns_on_a_gpu_and_goes_on_there(tiny, tmp_path, precision):
    def score(network):
        batch = tiny.make_batch(10_000)
        with torch.no_grad():
            found = network(batch.image.cuda()).argmax(1).bool().cpu()
        truth = batch.label.bool()
        return {"dice": float(2 * (found & truth).sum() / (found.sum() + truth.sum()))}

    config = changed(
        tiny,
        precision=precision,
        learning_rate=0.3,
        max_epochs=1,
        iterations_per_epoch=60,
    )
    tiny.make_trainer(tmp_path, config, device="cuda", validate=score).fit()
    longer = dataclasses.replace(config, max_epochs=2)
    run = tiny.make_trainer(tmp_path, longer, device="cuda", validate=score)
    result = run.fit(resume=True)
    assert result.best_score is not None
    assert result.best_score > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_step_makes_the_cpu_wait_for_a_gpu(tiny, tmp_path, optimizer):
    """The real network and loss; PyTorch raises where something waits."""
    scheme = LabelScheme({"background": 0, "ball": 1})
    network = create_network(
        "segmamba", in_channels=1, out_channels=2, dims=(8, 16), depths=(1, 1)
    )
    batch = tiny.make_batch(0).to("cuda")
    losses = []

    def watch(progress):
        losses.append(progress.loss)
        torch.cuda.set_sync_debug_mode("error" if 5 <= progress.step < 9 else "default")

    run = tiny.make_trainer(
        tmp_path,
        changed(
            tiny,
            precision="bf16",
            optimizer=optimizer,
            workers=0,
            iterations_per_epoch=10,
            max_epochs=1,
            save_every_s=1e9,
        ),
        network=network,
        loss=build_loss("dice_ce", scheme),
        make_batch=lambda _: batch,
        validate=None,
        on_progress=watch,
        device="cuda",
    )
    try:
        run.fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 10
    assert losses[-1] < losses[0]
