"""Comparisons of hand-made scores, and what may not be compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from segmamba.errors import ConfigError, FormatError
from segmamba.evaluation.compare import compare_scores
from segmamba.evaluation.compare_ranking import case_ranks, rank_models
from segmamba.evaluation.compare_sources import Scores, load_scores, metrics_files

RULES = {"hd95_mm": "pooled", "tolerance_mm": 1.0, "ci95": "percentile"}


def scores(name, dice, *, hd95=None, label="tumour", **more):
    """One label, cases c0, c1, ..."""
    hd95 = hd95 or [1.0] * len(dice)
    cases = {
        f"c{index}": {
            label: {
                "dice": d,
                "hd95_mm": h,
                "reference_volume_ml": 1.0 + index,
                "empty_reference": False,
                "empty_prediction": False,
            }
        }
        for index, (d, h) in enumerate(zip(dice, hd95, strict=True))
    }
    return Scores(name, (Path(f"{name}.json"),), cases, {**RULES, **more})


A = scores("A", [0.9, 0.8, 0.7, 0.6], hd95=[1.0, 2.0, 3.0, 4.0])
B = scores("B", [0.8, 0.8, 0.5, 0.7], hd95=[2.0, 2.0, 1.0, 9.0])


def write(path, model):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cases": model.cases, "rules": model.rules}))
    return path


def pair(result, metric="dice"):
    (row,) = [row for row in result["pairs"] if row["metric"] == metric]
    return row


def test_a_pair_by_hand():
    result = compare_scores([A, B])
    row = pair(result)
    assert (row["a"], row["b"], row["label"], row["n"]) == ("A", "B", "tumour", 4)
    assert row["mean_difference"] == pytest.approx((0.1 + 0 + 0.2 - 0.1) / 4)
    assert (row["wins"], row["ties"], row["losses"]) == (2, 1, 1)
    # Signs of 0.1, 0.2, 0.1: |sum| >= 0.2 in 6 of 8 (0.4 twice, 0.2 four times).
    assert row["p_permutation"] == 6 / 8
    # Ranks 1.5, 3, 1.5: W+ = 4.5, W- = 1.5; |W+ - W-| >= 3 in 6 of 8.
    assert row["p_wilcoxon"] == 6 / 8
    assert row["rank_biserial"] == pytest.approx(3 / 6)
    assert row["p_holm"] == 1.0
    values = np.array([0.1, 0, 0.2, -0.1])
    assert row["cohen_dz"] == pytest.approx(values.mean() / values.std(ddof=1))
    low, high = row["ci95"]
    assert -0.1 <= low < 0.05 < high <= 0.2


def test_lower_is_better_for_distances_but_differences_stay_a_minus_b():
    row = pair(compare_scores([A, B]), "hd95_mm")
    assert row["mean_difference"] == pytest.approx((-1 + 0 + 2 - 5) / 4)
    assert (row["wins"], row["ties"], row["losses"]) == (2, 1, 1)


def test_exchanging_the_models_turns_every_sign():
    forth, back = pair(compare_scores([A, B])), pair(compare_scores([B, A]))
    for key in ("mean_difference", "rank_biserial", "cohen_dz"):
        assert back[key] == pytest.approx(-forth[key])
    for key in ("p_wilcoxon", "p_permutation", "p_holm", "n", "ties"):
        assert back[key] == forth[key]
    assert (back["wins"], back["losses"]) == (forth["losses"], forth["wins"])
    assert back["ci95"] == pytest.approx(
        [-forth["ci95"][1], -forth["ci95"][0]], abs=0.02
    )


def test_holm_corrects_over_all_pairs_labels_and_metrics():
    random = np.random.default_rng(0)
    models = [
        scores(
            name,
            list(0.8 + shift + 0.02 * random.normal(size=9)),
            hd95=list(2 - 10 * shift + random.normal(size=9)),
        )
        for name, shift in (("A", 0.03), ("B", 0.0), ("C", -0.03))
    ]
    rows = compare_scores(models)["pairs"]
    assert len(rows) == 3 * 2
    p = [row["p_wilcoxon"] for row in rows]
    order = np.argsort(p)
    expected = np.maximum.accumulate(np.array(p)[order] * np.arange(6, 0, -1))
    found = [rows[index]["p_holm"] for index in order]
    assert found == pytest.approx(np.minimum(expected, 1))
    assert all(row["p_permutation_holm"] >= row["p_permutation"] for row in rows)
    for row, (a, b) in zip(rows, ((0, 1), (0, 2), (1, 2)), strict=False):
        values = [
            [c["tumour"]["dice"] for c in models[i].cases.values()] for i in (a, b)
        ]
        assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(*values).pvalue)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_identical_models_are_ties_all_over(n):
    values = list(np.linspace(0.5, 0.9, n))
    result = compare_scores([scores("A", values), scores("B", values)])
    for row in result["pairs"]:
        assert row["mean_difference"] == 0.0
        assert row["ci95"] == [0.0, 0.0]
        assert row["p_wilcoxon"] == row["p_permutation"] == row["p_holm"] == 1.0
        assert row["rank_biserial"] == row["cohen_dz"] == 0.0
        assert (row["wins"], row["ties"], row["losses"]) == (0, n, 0)
    overall = result["ranking"]["overall"]
    assert [row["position"] for row in overall["models"]] == [1, 1]
    assert overall["kendall_tau"] == 1.0


def test_a_single_case_has_no_spread():
    row = pair(compare_scores([scores("A", [0.9]), scores("B", [0.8])]))
    assert row["n"] == 1
    assert row["mean_difference"] == pytest.approx(0.1)
    assert row["ci95"] == pytest.approx([0.1, 0.1])
    assert row["p_wilcoxon"] == row["p_permutation"] == 1.0
    assert row["cohen_dz"] is None


def test_an_undefined_value_leaves_its_case_out_for_all_models():
    c = scores("C", [0.7, None, 0.6, 0.5], hd95=[1.0, 1.0, 1.0, 1.0])
    result = compare_scores([A, B, c])
    for row in result["pairs"]:
        missing = row["metric"] == "dice"
        assert (row["n"], row["left_out"]) == ((3, 1) if missing else (4, 0))
    dice = [row for row in result["summary"] if row["metric"] == "dice"]
    assert [row["n"] for row in dice] == [3, 3, 3]
    assert dice[0]["mean"] == pytest.approx((0.9 + 0.7 + 0.6) / 3)
    assert [row["left_out"] for row in dice] == [1, 1, 1]


def test_no_defined_case_gives_nulls():
    nothing = scores("C", [None, None, None, None])
    row = pair(compare_scores([A, nothing]))
    assert (row["n"], row["left_out"], row["wins"], row["ties"]) == (0, 4, 0, 0)
    for key in ("mean_difference", "ci95", "p_wilcoxon", "p_permutation", "p_holm"):
        assert row[key] is None
    assert pair(compare_scores([A, nothing]), "hd95_mm")["p_holm"] is not None


def test_empty_masks_are_counted():
    model = copy.deepcopy(A)
    model.cases["c0"]["tumour"]["empty_prediction"] = True
    model.cases["c1"]["tumour"].update(empty_prediction=True, empty_reference=True)
    rows = compare_scores([model, B])["summary"]
    assert [(r["penalised"], r["both_empty"]) for r in rows[:2]] == [(1, 1), (0, 0)]


def test_different_cases_are_named_both_ways():
    other = scores("B", [0.8, 0.8, 0.5, 0.7, 0.6])
    del other.cases["c1"]
    with pytest.raises(ConfigError) as error:
        compare_scores([A, other])
    assert "1 only in A (c1)" in str(error.value)
    assert "1 only in B (c4)" in str(error.value)


def test_different_labels_rules_and_references_are_refused():
    with pytest.raises(ConfigError, match=r"other labels than A.*tumour.*lesion"):
        compare_scores([A, scores("B", [0.1] * 4, label="lesion")])
    with pytest.raises(ConfigError, match=r"tolerance_mm: 1.0 \(A\), found 2.0 \(B\)"):
        compare_scores([A, scores("B", [0.1] * 4, tolerance_mm=2.0)])
    with pytest.raises(ConfigError, match="not stated"):
        compare_scores([A, Scores("B", B.files, A.cases, {})])
    moved = copy.deepcopy(B)
    moved.cases["c2"]["tumour"]["reference_volume_ml"] = 7.0
    with pytest.raises(ConfigError, match="references of case c2 differ in tumour"):
        compare_scores([A, moved])
    assert compare_scores([A, scores("B", [0.1] * 4, ci95="another")])["pairs"]


def test_lesion_rules_matter_only_where_both_have_them():
    one, other = copy.deepcopy(A), copy.deepcopy(B)
    for model, rule in ((one, "GLI"), (other, "MET")):
        model.rules["lesion_wise"] = rule
    assert compare_scores([one, B])["pairs"]
    with pytest.raises(ConfigError, match="lesion_wise: GLI"):
        compare_scores([one, other])


def test_metrics_and_labels_can_be_chosen():
    result = compare_scores([A, B], metrics=["hd95_mm"], labels=["tumour"])
    assert [row["metric"] for row in result["pairs"]] == ["hd95_mm"]
    with pytest.raises(ConfigError, match=r"dice, hd95_mm.*lesion_dice"):
        compare_scores([A, B], metrics=["lesion_dice"])
    with pytest.raises(ConfigError, match=r"tumour.*core"):
        compare_scores([A, B], labels=["core"])
    with pytest.raises(ConfigError, match="two or more"):
        compare_scores([A, A])


def test_a_score_that_is_no_number_is_refused():
    wrong = copy.deepcopy(B)
    wrong.cases["c3"]["tumour"]["dice"] = "high"
    with pytest.raises(ConfigError, match="case c3 is no number"):
        compare_scores([A, wrong])


def test_ranking_by_hand():
    """The first is best in three of four cases, the third always worst."""
    values = np.array(
        [[0.9, 0.8, 0.1], [0.9, 0.7, 0.2], [0.6, 0.8, 0.3], [0.9, 0.9, 0]]
    )
    ranks = case_ranks(values, higher_is_better=True)
    assert ranks.tolist() == [[1, 2, 3], [1, 2, 3], [2, 1, 3], [1.5, 1.5, 3]]
    result = rank_models(ranks, ["x", "y", "z"], resamples=4000, seed=0)
    assert [row["model"] for row in result["models"]] == ["x", "y", "z"]
    assert [row["mean"] for row in result["models"]] == [1.375, 1.625, 3.0]
    last = result["models"][2]
    assert (last["position"], last["position_ci95"]) == (3, [3, 3])
    assert last["share_of_positions"] == [0.0, 0.0, 1.0]


def test_a_mean_of_zero_has_no_sign():
    result = compare_scores([scores("a", [0.0, 0.0]), scores("b", [0.5, 0.4])])
    dice = result["ranking"]["by_metric"][0]
    assert [str(row["mean"]) for row in dice["models"]] == ["0.45", "0.0"]


def test_shares_of_positions_are_the_bootstraps_true_ones():
    """Two cases of opposite winners: each wins a quarter of draws, half are equal."""
    costs = np.array([[1.0, 2.0], [2.0, 1.0]])
    result = rank_models(costs, ["x", "y"], resamples=20_000, seed=0)
    for row in result["models"]:
        assert row["position"] == 1
        assert row["share_of_positions"] == pytest.approx([0.75, 0.25], abs=0.015)
    assert result["kendall_tau"] == pytest.approx(0.5, abs=0.015)


def test_kendalls_tau_is_scipys_where_nothing_is_equal():
    costs = np.random.default_rng(5).normal([0, 0.3, 0.5, 0.9], 1.0, (12, 4))
    result = rank_models(costs, list("wxyz"), resamples=300, seed=7)
    weights = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), 300)
    taus = [stats.kendalltau(costs.mean(0), w @ costs / 12).statistic for w in weights]
    assert 0.3 < np.mean(taus) < 0.95
    assert result["kendall_tau"] == pytest.approx(np.mean(taus))


def test_a_clear_ranking_is_stable_and_a_close_one_is_not():
    random = np.random.default_rng(1)
    base = random.uniform(0.6, 0.9, 40)
    clear = scores("A", list(base)), scores("B", list(base - 0.1))
    overall = compare_scores(clear)["ranking"]["overall"]
    assert overall["models"][0]["share_of_positions"] == [1.0, 0.0]
    noise = list(base + random.normal(0, 0.05, 40))
    close = compare_scores([scores("A", list(base)), scores("B", noise)])
    (dice, _) = close["ranking"]["by_metric"]
    assert dice["models"][0]["share_of_positions"][0] < 0.99


def test_the_same_seed_gives_the_same_comparison():
    assert compare_scores([A, B], seed=1) == compare_scores([A, B], seed=1)


def test_a_run_puts_its_folds_together(tmp_path):
    for fold, names in (("0", ("c0", "c1")), ("1", ("c2", "c3"))):
        part = {name: A.cases[name] for name in names}
        write(tmp_path / f"fold_{fold}" / "metrics.json", Scores("", (), part, A.rules))
    write(tmp_path / "fold_all" / "metrics.json", B)
    loaded = load_scores(tmp_path, "A")
    assert loaded.cases == A.cases
    assert [file.parent.name for file in loaded.files] == ["fold_0", "fold_1"]
    single = load_scores(tmp_path / "fold_1", "A")
    assert list(single.cases) == ["c2", "c3"]
    write(tmp_path / "fold_2" / "metrics.json", Scores("", (), part, A.rules))
    with pytest.raises(ConfigError, match=r"folds of A share cases.*c2, c3"):
        load_scores(tmp_path, "A")


def test_files_without_scores_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"no scores.*nothing of that name"):
        metrics_files(tmp_path / "missing")
    with pytest.raises(FormatError, match="no scores to compare"):
        metrics_files(tmp_path)
    file = tmp_path / "metrics.json"
    for content, found in (
        ([], "no cases"),
        ({"cases": {}}, "no cases"),
        ({"cases": {"c0": {}}}, "no labels in case c0"),
        ({"cases": {"c0": {"a": 0.5}}}, "no numbers for a in case c0"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(FormatError, match=found):
            load_scores(file, "A")
    uneven = {"c0": {"a": {"dice": 1}}, "c1": {"b": {"dice": 1}}}
    file.write_text(json.dumps({"cases": uneven}))
    with pytest.raises(ConfigError, match="case c1 of A has other labels"):
        load_scores(file, "A")
