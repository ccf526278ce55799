"""All folds by one command: skipped, gone on with, summed up, post-processed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from segmamba import cli, workflow
from segmamba.checkpoint import load_model_file, update_model
from segmamba.errors import ConfigError
from segmamba.inference.load import load_model
from segmamba.inference.postprocessing import PostprocessingStep, largest_component
from segmamba.io import read_volume, write_label_map
from segmamba.workflow.cross_validation import summarize_folds
from segmamba.workflow.train import fold_training

FOLDS = [["case_0", "case_3"], ["case_1", "case_4"], ["case_2", "case_5"]]
IDS = [f"case_{index}" for index in range(6)]
SETTINGS = {
    "preset": "segmamba-light",
    "network": {"dims": [4, 8], "base_channels": 4, "depths": [0, 1]},
    "plan": {"patch_size": [24, 24, 24], "batch_size": 1},  # one window a case
    "train": {
        "iterations_per_epoch": 1,
        "max_epochs": 1,
        "precision": "fp32",
        "augmentation": {"enabled": False},  # and so no mirroring when predicting
    },
}


def read(path: Path):
    return json.loads(path.read_text())


def command(folder: Path, *words: str) -> int:
    options = ["--config", str(folder / "settings.yaml"), "--device", "cpu"]
    splits = ["--splits", str(folder / "splits.json"), "--cross-validate"]
    run = [str(folder / "data"), "-o", str(folder / "run")]
    return cli.main(["train", *run, *options, *splits, *words])


@pytest.fixture(scope="module")
def folder(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, settings, splits and a cross-validated run/."""
    folder = tmp_path_factory.mktemp("cross")
    shutil.copytree(project / "data", folder / "data")
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    splits = [{"train": [i for i in IDS if i not in v], "val": v} for v in FOLDS]
    (folder / "splits.json").write_text(json.dumps(splits))
    assert command(folder) == 0
    return folder


def test_the_summary_is_over_all_cases_and_by_fold(folder: Path):
    scores = read(folder / "run" / "cross_validation.json")
    assert scores["folds"] == ["0", "1", "2"]
    assert [row["cases"] for row in scores["by_fold"].values()] == FOLDS
    by_fold = []
    for fold in range(3):
        metrics = read(folder / "run" / f"fold_{fold}" / "metrics.json")
        values = [row["ball"]["dice"] for row in metrics["cases"].values()]
        by_fold.append(values)
        found = scores["by_fold"][str(fold)]["summary"]["ball"]["dice"]
        assert found == pytest.approx(np.mean(values))
    summary = scores["summary"]["ball"]["dice"]
    assert summary["n"] == scores["cases"] == 6
    assert summary["mean"] == pytest.approx(np.mean(by_fold))
    assert scores["mean"]["dice"] == pytest.approx(np.mean(by_fold))
    assert "hd95_mm" in scores["rules"]


def test_folds_of_unequal_size_count_by_their_cases():
    def case(dice: float) -> dict:
        row = {"dice": dice, "hd95_mm": 1.0, "hd95_max_mm": 1.0, "surface_dice": 1.0}
        volumes = ("volume_ml", "reference_volume_ml", "volume_error_ml")
        row |= dict.fromkeys(volumes, 1.0)
        return {"ball": {**row, "empty_reference": False, "empty_prediction": False}}

    folds = {"0": {"a": case(0.0), "b": case(0.3)}, "3": {"a": case(0.9)}}
    scores = summarize_folds(folds)  # case a is held out twice: both count
    assert scores["summary"]["ball"]["dice"]["mean"] == pytest.approx(0.4)
    assert scores["by_fold"]["0"]["mean"]["dice"] == pytest.approx(0.15)
    assert scores["by_fold"]["3"]["mean"]["dice"] == pytest.approx(0.9)


def test_a_second_call_skips_what_is_finished_and_goes_on_with_the_rest(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    folds = [folder / "run" / f"fold_{fold}" for fold in range(3)]
    models = [fold / "model.safetensors" for fold in folds]
    update_model(models[1], finished=False)  # as an interruption leaves it
    (folds[2] / "metrics.json").unlink()  # as one during validation does
    times = [model.stat().st_mtime_ns for model in models]
    first = (folds[0] / "metrics.json").stat().st_mtime_ns
    assert command(folder) == 0
    text = capsys.readouterr().out
    assert "Fold 0 of 3 is finished already" in text
    assert "Fold 1 of 3 (" in text
    assert "Fold 2 of 3 (" in text
    assert models[0].stat().st_mtime_ns == times[0]
    assert models[1].stat().st_mtime_ns > times[1]
    assert (folds[0] / "metrics.json").stat().st_mtime_ns == first
    assert (folds[2] / "metrics.json").is_file()
    lines = (folds[1] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]  # not trained again


def test_other_settings_are_not_taken_for_finished(folder: Path):
    options = {"config": folder / "settings.yaml", "device": "cpu"}
    where = (folder / "data", folder / "run")
    assert fold_training(*where, fold=1, **options).is_finished()
    assert not fold_training(*where, fold=1, max_epochs=2, **options).is_finished()
    assert not fold_training(*where, fold=1, seed=1, **options).is_finished()
    with pytest.raises(ConfigError, match="seed"):
        workflow.cross_validate(*where, seed=1, **options)


def test_scores_of_earlier_weights_do_not_outlive_a_longer_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    options = {"config": folder / "settings.yaml", "device": "cpu", "max_epochs": 2}
    job = fold_training(folder / "data", run, fold=0, **options)
    monkeypatch.setattr("segmamba.workflow.fold.final_validation", killed)
    with pytest.raises(KeyboardInterrupt):
        job.train(resume=True, say=lambda text: None)
    assert load_model_file(run / "fold_0" / "model.safetensors").metadata["finished"]
    assert not job.is_finished()


def test_folds_are_averaged_by_predict(folder: Path):
    scan = folder / "data" / "imagesTr" / "case_0.nii.gz"
    options = {"mirror": False, "precision": "fp32"}
    predictor = load_model(folder / "run", "cpu", **options)
    assert predictor.identity["folds"] == ["0", "1", "2"]
    together = predictor.predict(scan, probabilities=True).probabilities
    logits = np.zeros(())
    for fold in range(3):
        alone = load_model(folder / "run", "cpu", fold, **options)
        probabilities = alone.predict(scan, probabilities=True).probabilities
        assert probabilities is not None
        logits = logits + np.log(np.maximum(probabilities, 1e-7).astype(float)) / 3
    wanted = np.exp(logits) / np.exp(logits).sum(axis=0)
    assert together is not None
    np.testing.assert_allclose(together, wanted, atol=4e-3)


def spoil(folder: Path) -> None:
    """Let the held-out predictions be the truth, and an island beside it."""
    for fold, cases in enumerate(FOLDS):
        for case in cases:
            truth = read_volume(folder / "data" / "labelsTr" / f"{case}.nii.gz")
            found = truth.array[0].astype(np.uint8)
            found[0:2, 0, 0] = 1
            path = folder / "run" / f"fold_{fold}" / "validation" / f"{case}.nii.gz"
            write_label_map(path, found, truth.affine)


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copy(folder / "settings.yaml", tmp_path)
    shutil.copy(folder / "splits.json", tmp_path)
    text = (tmp_path / "run" / "dataset.json").read_text()
    text = text.replace(str(folder), str(tmp_path))
    (tmp_path / "run" / "dataset.json").write_text(text)
    spoil(tmp_path)
    return tmp_path


def test_postprocessing_is_decided_from_the_held_out_cases(
    spoilt: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["postprocess", str(spoilt / "run")]) == 0
    text = capsys.readouterr().out
    assert "adopted" in text
    stored = read(spoilt / "run" / "postprocessing.json")
    assert stored["steps"] == [
        {"label": "ball", "operation": "largest-component", "min_volume_mm3": None}
    ]
    assert stored["decision"]["folds"] == ["0", "1", "2"]
    assert stored["decision"]["cases"] == 6
    assert stored["decision"]["dice_after"]["ball"] == 1
    assert len(stored["decision"]["candidates"]) == 8


def test_its_scores_are_told_beside_the_plain_ones(
    spoilt: Path, capsys: pytest.CaptureFixture[str]
):
    assert command(spoilt) == 0  # all folds are skipped
    assert "all, post-processed" in capsys.readouterr().out
    after = read(spoilt / "run" / "cross_validation.json")["postprocessed"]
    assert after["summary"]["ball"]["dice"]["mean"] == 1
    assert after["summary"]["ball"]["hd95_mm"]["mean"] == 0
    assert set(after["by_fold"]) == {"0", "1", "2"}


def test_predict_does_it_unless_told_not_to(spoilt: Path):
    run, scan = spoilt / "run", spoilt / "data" / "imagesTr" / "case_1.nii.gz"
    rule = {"label": "ball", "operation": "minimal-size", "min_volume_mm3": 1e6}
    (run / "postprocessing.json").write_text(json.dumps({"steps": [rule]}))
    predictor = load_model(run, "cpu", mirror=False)
    assert predictor.postprocessing == (PostprocessingStep(**rule),)
    plain = load_model(run, "cpu", mirror=False, postprocessing=False)
    network = plain.networks[0]
    bias = [p for p in network.parameters() if p.shape == (2,)][-1]
    bias.data[1] += 100  # let it find something
    predictor.networks[0] = network
    assert plain.predict(scan).label_map.any()
    assert not predictor.predict(scan).label_map.any()
    words = [str(run), str(scan), "--no-mirror"]
    for name, option in (("with", []), ("without", ["--no-postprocessing"])):
        out = ["-o", str(spoilt / name)]
        assert cli.main(["predict", *words, *out, *option]) == 0
    record = read(spoilt / "with" / "manifest.json")
    assert record["options"]["postprocessing"] == [rule]
    record = read(spoilt / "without" / "manifest.json")
    assert "postprocessing" not in record["options"]


def test_validation_sees_no_postprocessing(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch
):
    rule = {"label": "ball", "operation": "largest-component"}
    (spoilt / "run" / "postprocessing.json").write_text(json.dumps({"steps": [rule]}))
    monkeypatch.setattr(
        "segmamba.inference.predictor.apply_postprocessing",
        lambda *_: pytest.fail("held-out predictions were post-processed"),
    )
    metrics = spoilt / "run" / "fold_0" / "metrics.json"
    metrics.unlink()
    result = workflow.train(
        spoilt / "data",
        spoilt / "run",
        config=spoilt / "settings.yaml",
        device="cpu",
        resume=True,
    )
    assert result.metrics is not None
    assert metrics.is_file()


def test_a_kept_component_of_the_network_is_its_largest(spoilt: Path):
    rule = {"label": "ball", "operation": "largest-component"}
    (spoilt / "run" / "postprocessing.json").write_text(json.dumps({"steps": [rule]}))
    scan = spoilt / "data" / "imagesTr" / "case_2.nii.gz"
    plain = load_model(spoilt / "run", "cpu", 0, mirror=False, postprocessing=False)
    cleaned = load_model(spoilt / "run", "cpu", 0, mirror=False)
    wanted = largest_component(plain(scan).label_map == 1)
    np.testing.assert_array_equal(cleaned(scan).label_map == 1, wanted)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cross-validate", "--fold", "all"], "no --fold beside it"),
        (["--cross-validate", "--split", "70-10-20"], "one fold"),
    ],
)
def test_what_gives_no_cross_validation_is_refused(
    project: Path,
    tmp_path: Path,
    words: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
):
    run = [str(project / "data"), "-o", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(["train", *run, *words]) == 1
    assert text in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("run/fold_*"))


def test_a_run_without_held_out_cases_is_refused(tmp_path: Path, folder: Path):
    with pytest.raises(ConfigError, match="no run"):
        workflow.postprocess(tmp_path)
    shutil.copy(folder / "run" / "dataset.json", tmp_path)
    with pytest.raises(ConfigError, match="no held-out predictions"):
        workflow.postprocess(tmp_path)
