"""The files of a comparison: JSON, Markdown, LaTeX, HTML and a picture."""

from __future__ import annotations

from pathlib import Path

from segmamba import atomic
from segmamba.evaluation.compare import score_arrays
from segmamba.evaluation.compare_sources import Scores
from segmamba.report.comparison_figure import comparison_figure
from segmamba.report.comparison_formats import to_html, to_latex, to_markdown
from segmamba.report.comparison_tables import comparison_tables
from segmamba.types import JsonDict

NAME = "comparison"


def write_comparison(
    comparison: JsonDict, models: list[Scores], folder: Path | str
) -> list[Path]:
    """Write comparison.json, .md, .tex, .html and .png.

    Args:
        comparison: What `compare_scores` gave, with "cost".
        models: What it was given.
        folder: Where to; made if it is missing.

    Returns:
        The files, comparison.json first.
    """
    stem = Path(folder) / NAME
    values = score_arrays(
        models, comparison["labels"], [m["name"] for m in comparison["metrics"]]
    )
    data, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    atomic.write_json(data, comparison)
    comparison_figure(comparison, values, picture)
    title = " and ".join(model["name"] for model in comparison["models"])
    title = f"Comparison of {title} on {len(comparison['cases'])} cases"
    tables, facts = comparison_tables(comparison), describe_facts(comparison)
    texts = {
        stem.with_suffix(".md"): to_markdown(title, tables, facts, picture.name),
        stem.with_suffix(".tex"): to_latex(title, tables, facts),
        stem.with_suffix(".html"): to_html(title, tables, facts, picture),
    }
    for path, text in texts.items():
        atomic.write_text(path, text)
    return [data, picture, *texts]


def describe_facts(comparison: JsonDict) -> list[str]:
    """Say in sentences what the numbers mean and where they come from.

    Args:
        comparison: What `compare_scores` gave.

    Returns:
        One sentence each: sources, methods, the metrics' rules.
    """
    sources = [
        f"{model['name']}: {model['cases']} cases from {', '.join(model['files'])}"
        for model in comparison["models"]
    ]
    methods = [f"{key}: {value}" for key, value in comparison["method"].items()]
    rules = [f"{key}: {value}" for key, value in comparison["rules"].items()]
    return [*sources, *methods, *(f"rule of the metrics, {rule}" for rule in rules)]
