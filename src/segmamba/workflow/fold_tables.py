"""Cross-validation and post-processing as tables of text."""

from __future__ import annotations

from segmamba.inference.postprocessing import Postprocessing
from segmamba.types import JsonDict

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header and rows."""


def folds_table(scores: JsonDict) -> Table:
    """Show the mean Dice of each fold, before and after post-processing.

    Args:
        scores: What cross_validation.json holds.

    Returns:
        A row a fold and one for all cases, a column a label.
    """
    labels = list(scores["summary"])
    rows = [
        (
            fold,
            str(len(row["cases"])),
            *(_dice(row, name) for name in labels),
        )
        for fold, row in scores["by_fold"].items()
    ]
    rows.append(("all", str(scores["cases"]), *_overall(scores, labels)))
    if scores["postprocessed"] is not None:
        after = _overall(scores["postprocessed"], labels)
        rows.append(("all, post-processed", str(scores["cases"]), *after))
    return "Mean Dice by fold", ("fold", "cases", *labels), rows


def postprocessing_table(postprocessing: Postprocessing) -> Table:
    """Show what was tried as post-processing and what came of it.

    Args:
        postprocessing: The steps and their decision.

    Returns:
        A row a candidate.
    """
    rows = [
        (
            row["label"],
            _operation(row),
            f"{row['gain']:+.5f}",
            "adopted" if row["adopted"] else "",
        )
        for row in postprocessing.decision.get("candidates", ())
    ]
    return "Post-processing", ("label", "operation", "gain of mean Dice", ""), rows


def _dice(fold: JsonDict, label: str) -> str:
    return f"{fold['summary'][label]['dice']:.3f}"


def _overall(scores: JsonDict, labels: list[str]) -> list[str]:
    return [f"{scores['summary'][name]['dice']['mean']:.3f}" for name in labels]


def _operation(row: JsonDict) -> str:
    volume = row["min_volume_mm3"]
    return row["operation"] if volume is None else f"{row['operation']} {volume:g} mm3"
