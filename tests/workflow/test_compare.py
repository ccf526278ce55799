"""The command and function that compare models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import segmamba
from segmamba import cli
from segmamba.errors import ConfigError
from segmamba.workflow.compare import default_names


@pytest.fixture
def scores(tmp_path: Path) -> tuple[Path, Path]:
    """Metrics of two models on six cases; the first is better by 0.01 to 0.06."""
    for name, step in (("good", 0.0), ("poor", 0.01)):
        cases = {
            f"c{i}": {"ball": {"dice": 0.9 - step * (i + 1), "hd95_mm": 1 + step * i}}
            for i in range(6)
        }
        path = tmp_path / name / "metrics.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"cases": cases, "rules": {}}))
    return tmp_path / "good", tmp_path / "poor"


def test_the_command_writes_the_report(scores, tmp_path, capsys):
    arguments = ["compare", *map(str, scores), "-o", str(tmp_path / "out")]
    assert cli.main([*arguments, "--names", "Good", "Poor"]) == 0
    shown = capsys.readouterr().out
    assert "Good - Poor" in shown
    assert "Ranking" in shown
    read = json.loads((tmp_path / "out" / "comparison.json").read_text())
    dice = read["pairs"][0]
    assert (dice["a"], dice["b"], dice["label"]) == ("Good", "Poor", "ball")
    assert (dice["metric"], dice["n"]) == ("dice", 6)
    assert dice["mean_difference"] == pytest.approx(0.035)
    assert dice["p_wilcoxon"] == dice["p_permutation"] == 2 / 64
    assert dice["p_holm"] == 4 / 64  # two tests: Dice and HD95
    hd95 = read["pairs"][1]
    assert hd95["mean_difference"] == pytest.approx(-0.025)
    assert (hd95["wins"], hd95["ties"], hd95["losses"]) == (5, 1, 0)


def test_without_a_folder_nothing_is_written(scores, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["compare", *map(str, scores), "--metrics", "dice"]) == 0
    assert "good - poor" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_function_is_public_and_takes_files(scores):
    result = segmamba.compare([path / "metrics.json" for path in scores])
    assert [model["name"] for model in result["models"]] == ["good", "poor"]
    assert result["ranking"]["overall"]["models"][0]["model"] == "good"
    assert result["cost"][0]["parameters"] is None


def test_different_cases_end_the_command_with_both_lists(scores, capsys):
    file = scores[1] / "metrics.json"
    data = json.loads(file.read_text())
    data["cases"]["other"] = data["cases"].pop("c2")
    file.write_text(json.dumps(data))
    assert cli.main(["compare", *map(str, scores)]) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "only in good (c2)" in shown
    assert "only in poor (other)" in shown


def test_bad_options_are_refused(scores):
    with pytest.raises(ConfigError, match="bad seed"):
        segmamba.compare(scores, seed=-1)
    with pytest.raises(ConfigError, match="expected two"):
        segmamba.compare([scores[0]])
    with pytest.raises(ConfigError, match="expected 2 names"):
        segmamba.compare(scores, names=["one"])
    with pytest.raises(ConfigError, match="name of its own"):
        segmamba.compare(scores, names=["one", "one"])
    with pytest.raises(ConfigError, match="100 or more"):
        segmamba.compare(scores, resamples=10)


def test_names_are_as_short_as_tells_models_apart():
    names = default_names([Path("/x/light"), Path("/x/unet/metrics.json")])
    assert names == ["light", "unet"]
    assert default_names([Path("/x/a/fold_0"), Path("/x/b")]) == ["a/fold_0", "b"]
    assert default_names([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]
    assert default_names([Path("/a/one.json"), Path("/a/two.json")]) == ["one", "two"]
    assert default_names([Path("/a/run")] * 2) == ["run (1)", "run (2)"]


def test_a_run_is_compared_with_its_own_scores_at_its_cost(project, tmp_path):
    again = tmp_path / "again" / "metrics.json"
    again.parent.mkdir()
    shutil.copy(project / "run" / "fold_0" / "metrics.json", again)
    result = segmamba.compare([project / "run", again], tmp_path / "out")
    assert all(row["p_holm"] == 1.0 for row in result["pairs"])
    cost = result["cost"][0]
    network = segmamba.load_model(project / "run", "cpu").networks[0]
    assert cost["parameters"] == sum(p.numel() for p in network.parameters())
    assert cost["ms_per_step"] > 0
    assert "ms a step" in (tmp_path / "out" / "comparison.md").read_text()


def test_lesions_can_be_evaluated_and_compared(project, tmp_path):
    for task in ("GLI", "MET"):
        file = tmp_path / task / "metrics.json"
        words = ["evaluate", str(project / "predictions"), str(project / "data")]
        words += ["-o", str(file), "--lesion-wise", "--lesion-task", task]
        assert cli.main(words) == 0
        row = json.loads(file.read_text())["summary"]["ball"]
        assert row["lesion_dice"]["n"] == 6
    with pytest.raises(ConfigError, match="lesion_wise"):
        segmamba.compare([tmp_path / "GLI", tmp_path / "MET"])
    result = segmamba.compare([tmp_path / "GLI"] * 2, metrics=["lesion_hd95_mm"])
    assert [row["metric"] for row in result["pairs"]] == ["lesion_hd95_mm"]
