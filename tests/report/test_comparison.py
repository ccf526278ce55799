"""The files of a comparison, read back."""

from __future__ import annotations

import html.parser
import json
import re
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segmamba.evaluation.compare import compare_scores
from segmamba.evaluation.compare_sources import Scores
from segmamba.report.comparison import write_comparison
from segmamba.report.comparison_cost import count_parameters, model_cost, step_times_ms
from segmamba.report.comparison_formats import escape_latex, to_markdown
from segmamba.report.comparison_tables import Table, comparison_tables

PAIR_KEYS = {
    "a",
    "b",
    "label",
    "metric",
    "n",
    "mean_difference",
    "ci95",
    "p_wilcoxon",
    "p_permutation",
    "p_holm",
}


def model(name, shift, *, cases=9, labels=("WT", "a_b & <c>"), far=False):
    random = np.random.default_rng(len(name))
    rows = {
        f"case_{index}": {
            label: {
                "dice": float(np.clip(0.85 + shift + random.normal(0, 0.02), 0, 1)),
                "hd95_mm": float(300.0 if far and index == 3 else 2 + random.random()),
            }
            for label in labels
        }
        for index in range(cases)
    }
    return Scores(name, (), rows, {"one_empty": "Dice 0 & HD95 100 %"})


@pytest.fixture
def models():
    return [model("light", 0.0), model("U_Net|x", -0.04, far=True), model("c", -0.1)]


@pytest.fixture
def comparison(models):
    result = compare_scores(models, resamples=200)
    numbers = {"parameters": 1_986_259, "ms_per_step": 245.02, "peak_memory_mib": None}
    numbers |= {"steps": 4900, "device": "H100"}
    nothing = dict.fromkeys([*numbers, "training_s"])
    result["cost"] = [
        {"model": "light", **numbers, "training_s": 1200.3},
        {"model": "U_Net|x", **nothing},
        {"model": "c", **nothing},
    ]
    return result


@pytest.fixture
def folder(comparison, models, tmp_path):
    write_comparison(comparison, models, tmp_path / "out")
    return tmp_path / "out"


def test_five_files_and_nothing_else(folder):
    found = sorted(path.name for path in folder.iterdir())
    assert found == [
        f"comparison.{end}" for end in ("html", "json", "md", "png", "tex")
    ]


def test_json_has_the_stated_form(folder, comparison):
    read = json.loads((folder / "comparison.json").read_text())
    assert len(read["pairs"]) == 3 * 2 * 2
    for row, expected in zip(read["pairs"], comparison["pairs"], strict=True):
        assert set(row) >= PAIR_KEYS
        assert row == expected
        low, high = row["ci95"]
        assert low <= row["mean_difference"] <= high


def test_markdown_tables_have_even_rows_and_the_numbers(folder, comparison):
    text = (folder / "comparison.md").read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 5
    for block in blocks:
        lines = block.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1
    row = comparison["pairs"][0]
    assert f"| {row['wins']}/{row['ties']}/{row['losses']} |" in text
    assert f"{row['mean_difference']:+.4f}" in text
    assert "all 12 tests" in text
    assert "![" in text
    assert "comparison.png" in text
    assert "1.99 M" in text
    assert "peak memory" not in text
    assert "percentile bootstrap" in text


def test_the_best_mean_is_bold_whichever_way_the_metric_points(comparison):
    scores = comparison_tables(comparison)[0]
    for number, row in enumerate(scores.rows):
        means = [float(cell.split()[0]) for cell in row[2:5]]
        best = np.argmax(means) if "Dice" in row[1] else np.argmin(means)
        assert {c for r, c in scores.bold if r == number} == {2 + best}


def test_latex_is_balanced_and_escaped(folder):
    text = (folder / "comparison.tex").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    for name in ("table", "tabular"):
        starts = sum(rf"\begin{{{name}}}" in line for line in lines)
        assert starts == sum(rf"\end{{{name}}}" in line for line in lines) == 5
    body = "\n".join(lines)
    assert r"a\_b \& $<$c$>$" in body
    assert not re.search(r"(?<!\\)[%#_]", body)
    columns = 0
    for line in lines:
        if line.startswith(r"\begin{tabular}"):
            columns = line.count("l", len(r"\begin{tabular}"))
        elif line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert escape_latex("50 % ± 2_x|") == r"50 \% $\pm$ 2\_x\textbar{}"


class Checker(html.parser.HTMLParser):
    """Sees that tags nest, and counts them."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_whole_page(folder):
    text = (folder / "comparison.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    names = [tag for tag, _ in checker.seen]
    assert names.count("table") == 5
    (image,) = [attrs for tag, attrs in checker.seen if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    assert "a_b &amp; &lt;c&gt;" in text
    assert "http" not in text


def test_the_picture_has_a_row_a_label_and_a_column_a_metric(folder):
    width, height = struct.unpack(
        ">II", (folder / "comparison.png").read_bytes()[16:24]
    )
    assert 1.0 < width / height < 2.0
    assert width > 700


def test_equal_models_and_single_cases_are_reported_without_bold(tmp_path):
    same = [model("a", 0.0, cases=1), model("a", 0.0, cases=1)]
    same[1] = Scores("b", (), same[0].cases, same[0].rules)
    result = compare_scores(same, resamples=200)
    assert all(not table.bold for table in comparison_tables(result))
    write_comparison(result, same, tmp_path)
    assert "+0.0000" not in (tmp_path / "comparison.md").read_text()


def test_undefined_values_and_many_labels_can_be_drawn(tmp_path):
    labels = [f"organ {index}" for index in range(15)]
    models = [model("a", 0.0, cases=3, labels=labels), model("b", 0.1, cases=3)]
    models[1] = Scores("b", (), models[0].cases, models[0].rules)
    for rows in models[0].cases.values():
        rows["organ 0"]["dice"] = None
    result = compare_scores(models, resamples=200)
    write_comparison(result, models, tmp_path)
    assert "| organ 14 |" in (tmp_path / "comparison.md").read_text()


def test_dollars_in_names_are_no_maths(tmp_path):
    label = r"x$\foo$y"
    models = [model("a$\\b$", 0.0, cases=3, labels=[label])]
    models.append(Scores("b", (), models[0].cases, models[0].rules))
    write_comparison(compare_scores(models, resamples=200), models, tmp_path)
    assert (tmp_path / "comparison.png").is_file()


def test_names_stay_text_in_markdown():
    table = Table("T", ("a_b", "_c_"), (("x|y", "*z*"),))
    text = to_markdown("<T>", [table], [], "f.png")
    assert r"| a_b | \_c\_ |" in text
    assert r"| x\|y | \*z\* |" in text
    assert r"# \<T>" in text


def test_cost_by_hand(tmp_path):
    weights = {"a": torch.zeros(3, 4), "b": torch.zeros(5), "c": torch.tensor(1.0)}
    files = []
    for fold, seconds in enumerate(([9.0, 2.0, 4.0], [9.0, 3.0, 5.0])):
        folder = tmp_path / f"fold_{fold}"
        folder.mkdir()
        files.append(folder / "metrics.json")
        lines, elapsed = [], 0.0
        for epoch, spent in enumerate(seconds, start=1):
            elapsed += spent
            line = {"epoch": epoch, "step": 10 * epoch, "seconds": spent}
            line |= {"elapsed_s": elapsed, "peak_memory_mib": 100 * epoch + fold}
            lines.append(json.dumps(line) + "\n")
        (folder / "log.jsonl").write_text("".join(lines))
        save_file(weights, folder / "model.safetensors", {"segmamba": "{}"})
        machine = {"processor": "Slow 1", "gpu": "Fast 2" if fold else None}
        (folder / "manifest.json").write_text(json.dumps({"machine": machine}))
    expected = {
        "parameters": 18,
        "ms_per_step": 350.0,
        "peak_memory_mib": 301,
        "steps": 60,
        "training_s": 32.0,
        "device": "Slow 1",
    }
    assert model_cost(files) == expected
    assert model_cost([tmp_path / "metrics.json"]) == expected


def test_cost_that_is_not_known_is_none(tmp_path):
    cost = model_cost([tmp_path / "metrics.json"])
    assert set(cost.values()) == {None}
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert count_parameters(tmp_path / "model.safetensors") is None
    assert step_times_ms([{"epoch": 1, "step": 4, "seconds": 2.0}]) == [500.0]
    assert step_times_ms([{"epoch": 1, "step": 4}, {"epoch": 2, "step": 4}]) == []
    (tmp_path / "manifest.json").write_text('{"machine": null}')
    assert model_cost([tmp_path / "metrics.json"])["device"] is None
