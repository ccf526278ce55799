"""The whole job on a tiny data set, step by step and through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import segmamba
from segmamba import cli, workflow
from segmamba.cli.words import parse_duration
from segmamba.errors import ConfigError, FormatError
from segmamba.io import read_volume
from segmamba.nn import preset_config
from segmamba.training.results import Progress
from segmamba.workflow import steps
from segmamba.workflow.fold import _display
from segmamba.workflow.folder import RunFolder
from segmamba.workflow.train import fold_training

SHAPE = {"dims": [8, 16], "depths": [0, 1]}


def test_a_run_holds_what_the_docs_say(project: Path) -> None:
    fold = project / "run" / "fold_0"
    for name in ("dataset.json", "fingerprint.json", "plan.json", "splits.json"):
        assert json.loads((project / "run" / name).read_text())
    for name in ("config.yaml", "checkpoint.safetensors", "model.safetensors"):
        assert (fold / name).stat().st_size > 0
    assert (fold / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = (fold / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_held_out_cases_are_scored(project: Path) -> None:
    splits = json.loads((project / "run" / "splits.json").read_text())
    metrics = json.loads((project / "run" / "fold_0" / "metrics.json").read_text())
    assert sorted(metrics["cases"]) == sorted(splits[0]["val"])
    assert metrics["summary"]["ball"]["dice"]["n"] == len(splits[0]["val"])
    assert not set(splits[0]["train"]) & set(splits[0]["val"])


def test_label_maps_lie_where_the_scans_do(project: Path) -> None:
    scan = read_volume(project / "data" / "imagesTr" / "case_0.nii.gz")
    found = read_volume(project / "predictions" / "case_0.nii.gz")
    assert found.shape == scan.shape
    np.testing.assert_allclose(found.affine, scan.affine)
    assert set(np.unique(found.array)) <= {0, 1}


def test_a_loaded_model_gives_what_predict_wrote(project: Path) -> None:
    model = segmamba.load_model(project / "run", device="cpu", mirror=False)
    result = model(project / "data" / "imagesTr" / "case_0.nii.gz")
    written = read_volume(project / "predictions" / "case_0.nii.gz")
    np.testing.assert_array_equal(result.label_map, written.array[0])


def test_a_finished_run_is_resumed_to_the_same_weights(project: Path) -> None:
    model = project / "run" / "fold_0" / "model.safetensors"
    before = segmamba.load_checkpoint(model)[0]
    workflow.train(
        project / "data",
        project / "run",
        config=project / "settings.yaml",
        device="cpu",
        resume=True,
    )
    after = segmamba.load_checkpoint(model)[0]
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_run_is_not_overwritten(project: Path) -> None:
    shown: list[object] = []
    with pytest.raises(ConfigError, match="resume"):
        workflow.train(
            project / "data",
            project / "run",
            config=project / "settings.yaml",
            device="cpu",
            progress=lambda *step: shown.append(step),
            say=shown.append,
        )
    assert shown == []  # it is refused before any work


def test_fold_all_trains_on_every_case(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(project / "run", run)
    result = workflow.train(
        project / "data",
        run,
        fold="all",
        config=project / "settings.yaml",
        device="cpu",
        max_epochs=1,
    )
    assert result.metrics is None
    assert (run / "fold_all" / "model.safetensors").exists()


def test_another_preset_needs_another_run(project: Path) -> None:
    with pytest.raises(ConfigError, match="another network"):
        workflow.train(project / "data", project / "run", preset="segmamba-v1")


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"plan": {"patch_size": [8, 16, 16]}}, "patch_size (16, 16, 16)"),
        ({"network": {"d_state": 4}}, "network.d_state 16; the settings' 4"),
        (
            {"network": {**SHAPE, "strides": [[1, 2, 2], [2, 2, 2]]}},
            "the settings' ((1, 2, 2), (2, 2, 2)) is left unused",
        ),
    ],
)
def test_settings_that_the_plan_overrules_are_told(
    project: Path, sections: dict, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = workflow.RunSettings(**sections)
    fold_training(project / "data", project / "run", config=settings, device="cpu")
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{project / 'run' / 'plan.json'} counts, with " in message
    assert text in message


def test_misspelt_settings_of_a_planned_run_are_refused(project: Path) -> None:
    settings = workflow.RunSettings(plan={"patch_sizes": [8, 8, 8]})
    with pytest.raises(ConfigError, match="Did you mean 'patch_size'"):
        workflow.train(project / "data", project / "run", config=settings)


def test_another_kind_of_split_needs_another_run(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(project / "run", run, ignore=shutil.ignore_patterns("fold_*"))
    with pytest.raises(ConfigError, match="other splits already"):
        fold_training(project / "data", run, split="70-10-20", device="cpu")
    (run / "splits.json").unlink()
    job = fold_training(project / "data", run, split="70-10-20", device="cpu")
    again = fold_training(project / "data", run, device="cpu")
    assert again.members == job.members
    assert len(job.members["test"]) == 1


def test_strides_of_the_settings_are_planned(project: Path, tmp_path: Path) -> None:
    network = {**SHAPE, "strides": [[1, 2, 2], [2, 2, 1]]}
    settings = workflow.RunSettings(preset="segmamba-light", network=network)
    decided = workflow.plan(
        project / "data", tmp_path, config=settings, device="cpu", memory_mib=4000
    )
    assert decided.network.strides == ((1, 2, 2), (2, 2, 1))
    assert decided.network.dims == (8, 16)


def test_broken_data_are_refused_before_planning(project: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(project / "data", data)
    (data / "labelsTr" / "case_2.nii.gz").unlink()
    with pytest.raises(FormatError, match="case_2"):
        workflow.plan(data, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "plan.json").exists()


def test_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = project / "out.json"
    assert cli.main(["check", str(project / "data")]) == 0
    assert cli.main(["info"]) == 0
    assert cli.main(["info", str(project / "run")]) == 0
    words = [str(project / "predictions"), str(project / "data"), "-o", str(metrics)]
    assert cli.main(["evaluate", *words]) == 0
    shown = capsys.readouterr().out
    assert "ball" in shown
    assert "not scored" not in shown
    assert set(json.loads(metrics.read_text())) >= {"cases", "summary", "rules"}


def test_evaluate_says_what_it_did_not_score(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "predictions", tmp_path / "predictions")
    one = min((tmp_path / "predictions").glob("*.nii.gz"))
    one.rename(one.with_name("other.nii.gz"))
    words = [tmp_path / "predictions", project / "data", "-o", tmp_path / "out.json"]
    assert cli.main(["evaluate", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "not scored: 1 of references." in shown
    assert "not scored: 1 of predictions." in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["check", "nowhere"], "nowhere"),
        (["train", "nowhere", "-o", "run"], "nowhere"),
        (["train", "data", "-o", "run", "--fold", "9"], "fold"),
        (["train", "data", "-o", "run", "--fold", "x"], "fold"),
        (["train", "data", "-o", "run", "--max-time", "soon"], "10m"),
        (["train", "data", "-o", "run", "--config", "none.yaml"], "none.yaml"),
        (["train", "data", "-o", "new", "--preset", "segmamber"], "segmamba"),
        (["train", "data", "-o", "new", "--device", "cuda:7"], "CUDA"),
        (["predict", "data", "data", "-o", "out"], "run"),
        (["predict", "run", "nothing.nii.gz", "-o", "out"], "nothing.nii.gz"),
        (["evaluate", "predictions", "nowhere", "-o", "m.json"], "nowhere"),
        (["info", "data"], "run"),
    ],
)
def test_mistakes_get_one_text_and_no_traceback(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(project)
    assert cli.main(words) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error:")
    assert text in shown
    assert "Traceback" not in shown
    assert "unforeseen" not in shown


def test_data_are_measured_once_whatever_their_path_is_called(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    run = RunFolder(tmp_path)
    _, measured = steps.measure("data", run, None)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(steps, "make_fingerprint", refuse)
    for name in ("data", project / "data", "data/../data"):
        _, kept = steps.measure(name, run, None)
        assert kept.to_dict() == measured.to_dict()


def test_a_file_in_place_of_the_run_folder_is_noticed_before_any_work(
    project: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "run"
    taken.touch()
    shown: list[object] = []
    with pytest.raises(FileExistsError):
        steps.plan(project / "data", taken, progress=lambda *step: shown.append(step))
    assert shown == []


def test_errors_of_the_data_are_told_by_file(project: Path, tmp_path: Path) -> None:
    data = shutil.copytree(project / "data", tmp_path / "data")
    image = next((data / "imagesTr").iterdir())
    twin = shutil.copy(image, image.with_name("alone.nii.gz"))
    with pytest.raises(FormatError) as caught:
        steps.plan(data, tmp_path / "run")
    first, line, *_ = str(caught.value).splitlines()
    assert first.endswith("has 1 error:")
    assert line.startswith(f"  imagesTr/{Path(twin).name}: ")


def test_durations() -> None:
    assert parse_duration("1h30m") == 5400
    assert parse_duration("90s") == 90
    assert parse_duration("45") == 45
    assert parse_duration(None) is None


def test_the_curve_is_drawn_now_and_then_and_at_the_end(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes longer than a short epoch on a GPU."""
    lines: list[int] = []

    def draw(log: Path, output: Path) -> None:
        assert output == log.with_name("curve.png")
        lines.append(len(log.read_text().splitlines()))

    monkeypatch.setattr("segmamba.workflow.fold.training_curve", draw)
    settings = project / "settings.yaml"
    workflow.train(
        project / "data",
        tmp_path / "run",
        config=settings,
        max_epochs=5,
        fold="all",
        device="cpu",
    )
    assert lines[0] == 1
    assert lines[-1] == 5
    assert len(lines) < 5


@pytest.mark.parametrize(
    ("device", "shape", "name"),
    [
        ("cpu", (35, 50, 36), "segmamba-light"),
        ("cuda", (35, 50, 36), "segmamba-small"),
        ("cuda", (64, 64, 64), "segmamba-small"),
        ("cuda", (64, 64, 65), "segmamba"),
        ("cuda", None, "segmamba"),
    ],
)
def test_the_network_suits_device_and_data(device, shape, name):
    assert steps.default_preset(torch.device(device), shape) == name
    preset_config(name)


@pytest.mark.parametrize("name", ["00", "01", "²", "-1", "all "])
def test_a_fold_has_one_name(name: str) -> None:
    with pytest.raises(ConfigError, match="bad fold"):
        workflow.RunFolder(Path("run")).fold(name)


def test_a_training_is_shown_as_over_at_its_end_alone() -> None:
    shown: list[int] = []
    show = _display(lambda done, total, stage, note: shown.append(done))
    for fraction in (0.0, 0.5, 0.9996, 1.0):
        show(Progress(1, 1, fraction, 0.1, 0.1, 1.0, 1.0))
    assert shown == [0, 500, 999, 1000]
