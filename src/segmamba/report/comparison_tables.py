"""A comparison as tables of text, which every output format then writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from segmamba.types import JsonDict

METRIC_NAMES = {
    "dice": "Dice",
    "hd95_mm": "HD95 mm",
    "hd95_max_mm": "HD95 (max) mm",
    "surface_dice": "surface Dice",
    "lesion_dice": "lesion-wise Dice",
    "lesion_hd95_mm": "lesion-wise HD95 mm",
}


@dataclass(frozen=True)
class Table:
    """Text in rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What to know to read it."""
    bold: frozenset[tuple[int, int]] = field(default=frozenset())
    """Cells (row, column) to stress."""
    bold_means: str = ""
    """What is stressed, for formats that can do so."""

    @property
    def full_note(self) -> str:
        """Everything to know where bold cells can be seen."""
        return f"{self.note} Bold: {self.bold_means}." if self.bold else self.note


def comparison_tables(comparison: JsonDict) -> list[Table]:
    """Lay out a comparison.

    Args:
        comparison: What `compare_scores` gave, and "cost" by model.

    Returns:
        Scores, differences, rankings, and costs where any is known.
    """
    tables = [
        _scores(comparison),
        _differences(comparison),
        *_rankings(comparison),
    ]
    cost = _costs(comparison)
    return [*tables, cost] if cost is not None else tables


def metric_name(metric: str) -> str:
    """Write a metric's name for people."""
    return METRIC_NAMES.get(metric, metric)


def _scores(comparison: JsonDict) -> Table:
    models = [model["name"] for model in comparison["models"]]
    rows, bold = [], set()
    for label, metric, group in _grouped(comparison["summary"]):
        cells = [_mean(by, metric) for by in group]
        for column in _best(group, _higher(comparison, metric)):
            bold.add((len(rows), 2 + column))
        counts = "; ".join(f"{by['both_empty']}, {by['penalised']}" for by in group)
        shared = {f"{by['both_empty']}, {by['penalised']}" for by in group}
        empty = shared.pop() if len(shared) == 1 else counts
        left_out = str(group[0]["left_out"])
        rows.append((label, metric_name(metric), *cells, empty, left_out))
    return Table(
        "Scores",
        ("label", "metric", *models, "both, one empty", "left out"),
        tuple(rows),
        "Mean ± standard deviation over cases [95 % bootstrap interval of the mean]. "
        "Cases with empty masks (both; or one of them, which is "
        "penalised) count by the metrics' rules; a case left out had an undefined "
        "value in one of the models.",
        frozenset(bold),
        "the best mean",
    )


def _differences(comparison: JsonDict) -> Table:
    rows, bold = [], set()
    for pair in comparison["pairs"]:
        if pair["p_holm"] is not None and pair["p_holm"] < 0.05:
            bold.add((len(rows), 7))
        digits = _digits(pair["metric"])
        rows.append(
            (
                f"{pair['a']} - {pair['b']}",
                pair["label"],
                metric_name(pair["metric"]),
                str(pair["n"]),
                _difference(pair, digits),
                _p(pair["p_wilcoxon"]),
                _p(pair["p_permutation"]),
                _p(pair["p_holm"]),
                _number(pair["rank_biserial"], 2),
                _number(pair["cohen_dz"], 2),
                f"{pair['wins']}/{pair['ties']}/{pair['losses']}",
            )
        )
    tests = sum(pair["p_holm"] is not None for pair in comparison["pairs"])
    header = ("a - b", "label", "metric", "n", "mean difference [95 %]")
    header += ("p Wilcoxon", "p permutation", "p Holm", "rank-biserial", "d_z")
    return Table(
        "Paired differences",
        (*header, "win/tie/loss"),
        tuple(rows),
        "Differences are a - b, also where lower is better; a wins a case if it is the "
        f"better one in it. p Holm corrects p Wilcoxon over all {tests} tests of this "
        "table.",
        frozenset(bold),
        "below 0.05 after correction",
    )


def _rankings(comparison: JsonDict) -> list[Table]:
    ranking, count = comparison["ranking"], len(comparison["models"])
    tables = []
    if ranking["overall"] is not None:
        rows = [_ranked(row, 2) for row in ranking["overall"]["models"]]
        tables.append(
            Table(
                "Ranking over all labels and metrics",
                _ranking_header("mean rank", count),
                tuple(rows),
                "By the mean rank over cases, labels and metrics. The last columns say "
                "in what share of bootstrap draws of the cases a model took each "
                f"position. {_tau(ranking['overall'])}",
            )
        )
    rows = []
    for part in ranking["by_metric"]:
        names = (part["label"], metric_name(part["metric"]))
        digits = _digits(part["metric"])
        for row in part["models"]:
            rows.append((*names, *_ranked(row, digits), f"{part['kendall_tau']:.2f}"))
    header = ("label", "metric", *_ranking_header("mean", count), "Kendall's tau")
    note = "By the mean over cases, with the same draws."
    tables.append(Table("Ranking by label and metric", header, tuple(rows), note))
    return tables


def _ranking_header(value: str, count: int) -> tuple[str, ...]:
    places = (f"#{place}" for place in range(1, count + 1))
    return ("position", "model", value, "95 % of draws", *places)


def _ranked(row: JsonDict, digits: int) -> tuple[str, ...]:
    low, high = row["position_ci95"]
    shares = (f"{100 * share:.0f} %" for share in row["share_of_positions"])
    span = str(low) if low == high else f"{low} to {high}"
    mean = _number(row["mean"], digits)
    return (str(row["position"]), row["model"], mean, span, *shares)


def _tau(ranking: JsonDict) -> str:
    return (
        "Kendall's tau between the draws' order and that of all cases is "
        f"{ranking['kendall_tau']:.2f} on average (1: it never changes)."
    )


def _costs(comparison: JsonDict) -> Table | None:
    cost = comparison.get("cost") or []
    columns = {
        "parameters": ("parameters", lambda v: f"{v / 1e6:.2f} M"),
        "ms_per_step": ("ms a step", lambda v: f"{v:.0f}" if v >= 10 else f"{v:.2g}"),
        "peak_memory_mib": ("peak memory MiB", lambda v: f"{v:.0f}"),
        "steps": ("steps", str),
        "training_s": ("training min", lambda v: f"{v / 60:.1f}"),
        "device": ("device", str),
    }
    known = [key for key in columns if any(row.get(key) is not None for row in cost)]
    if not known:
        return None
    rows = [
        (
            row["model"],
            *(
                "-" if row.get(key) is None else columns[key][1](row[key])
                for key in known
            ),
        )
        for row in cost
    ]
    return Table(
        "Cost",
        ("model", *(columns[key][0] for key in known)),
        tuple(rows),
        "From the run folders: weights, and log.jsonl (median over epochs; as fast as "
        "the machine was at that time; memory is the GPU's in training, or the whole "
        "process's on a CPU).",
    )


def _grouped(summary: list[JsonDict]) -> list[tuple[str, str, list[JsonDict]]]:
    groups: dict[tuple[str, str], list[JsonDict]] = {}
    for row in summary:
        groups.setdefault((row["label"], row["metric"]), []).append(row)
    return [(label, metric, rows) for (label, metric), rows in groups.items()]


def _higher(comparison: JsonDict, metric: str) -> bool:
    ways = {m["name"]: m["higher_is_better"] for m in comparison["metrics"]}
    return ways[metric]


def _best(group: list[JsonDict], higher: bool) -> list[int]:
    means = [row["mean"] for row in group]
    if None in means or len(set(means)) == 1:
        return []
    best = max(means) if higher else min(means)
    return [index for index, mean in enumerate(means) if mean == best]


def _mean(row: JsonDict, metric: str) -> str:
    if row["mean"] is None:
        return "-"
    digits = _digits(metric)
    low, high = row["ci95"]
    spread = "" if row["sd"] is None else f" ± {row['sd']:.{digits}f}"
    interval = f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{row['mean']:.{digits}f}{spread} {interval}"


def _difference(pair: JsonDict, digits: int) -> str:
    if pair["mean_difference"] is None:
        return "-"
    low, high = pair["ci95"]
    interval = f"[{_signed(low, digits)}, {_signed(high, digits)}]"
    return f"{_signed(pair['mean_difference'], digits)} {interval}"


def _signed(value: float, digits: int) -> str:
    """Write with its sign, but no sign before zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def _digits(metric: str) -> int:
    return 2 if metric.endswith("_mm") else 4


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
