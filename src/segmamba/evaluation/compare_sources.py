"""Scores of models from their files, and whether they may be paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segmamba import atomic
from segmamba.errors import ConfigError, FormatError, describe
from segmamba.types import JsonDict

METRICS_FILE = "metrics.json"
_SHOWN = 20
_RULES_OF_THE_SUMMARY = ("ci95",)
"""Rules that don't touch the numbers of a case."""


@dataclass(frozen=True)
class Scores:
    """What `evaluate` gave for one model."""

    name: str
    files: tuple[Path, ...]
    """The `metrics.json`, or one for each fold."""
    cases: dict[str, dict[str, JsonDict]]
    """Case id to label to numbers."""
    rules: JsonDict
    """How the numbers were computed."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the first case; `load_scores` sees that all have the same."""
        return tuple(next(iter(self.cases.values())))


def load_scores(path: Path | str, name: str) -> Scores:
    """Read a model's scores.

    Args:
        path: A `metrics.json`, a folder that holds one (such as a fold), or a run,
            whose folds are put together.
        name: What to call the model.

    Returns:
        The scores.

    Raises:
        FormatError: There are none, or they are not in `evaluate`'s form.
        ConfigError: Folds share cases, or were scored by different rules.
    """
    files = metrics_files(Path(path))
    parts = [_read(file, name) for file in files]
    cases: dict[str, dict[str, JsonDict]] = {}
    for part in parts:
        _require_same_rules(parts[0], part)
        _require_new_cases(cases, part)
        cases.update(part.cases)
    scores = Scores(name, files, cases, parts[0].rules)
    for case, rows in cases.items():
        if set(rows) != set(scores.labels):
            raise ConfigError(
                _labels_differ(scores.labels, tuple(rows), f"case {case} of {name}")
            )
    return scores


def metrics_files(path: Path) -> tuple[Path, ...]:
    """Find the files with a model's scores.

    Args:
        path: A file, a folder with a `metrics.json`, or a run.

    Returns:
        One file, or those of the numbered folds; `fold_all` only if it is alone.

    Raises:
        FormatError: There is none.
    """
    if path.is_file():
        return (path,)
    if (path / METRICS_FILE).is_file():
        return (path / METRICS_FILE,)
    folds = sorted(path.glob(f"fold_*/{METRICS_FILE}"))
    numbered = [file for file in folds if file.parent.name != "fold_all"]
    if not folds:
        raise FormatError(
            describe(
                "there are no scores to compare",
                expected="a metrics.json, a folder with one, or a run with fold_0/...",
                found="nothing of that name" if not path.exists() else "none",
                file=path,
                remedy="'segmamba train' and 'segmamba evaluate' write them.",
            )
        )
    return tuple(numbered or folds)


def check_comparable(models: Sequence[Scores]) -> None:
    """See that all models were scored on the same cases and labels by the same rules.

    Args:
        models: Two or more.

    Raises:
        ConfigError: Something differs; the text says what, and of which model.
    """
    first = models[0]
    for other in models[1:]:
        _require_same_cases(first, other)
        if set(first.labels) != set(other.labels):
            raise ConfigError(
                _labels_differ(first.labels, other.labels, other.name, first.name)
            )
        _require_same_rules(first, other)
        _require_same_references(first, other)


def _read(file: Path, name: str) -> Scores:
    data = atomic.read_json(file)
    cases = data.get("cases") if isinstance(data, dict) else None
    problem = _problem_of(cases)
    if problem is not None or cases is None:
        raise FormatError(
            describe(
                "these are no scores",
                expected='{"cases": {case: {label: {metric: number}}}}',
                found=problem,
                file=file,
                remedy="Write them by 'segmamba evaluate'.",
            )
        )
    rules = data.get("rules")
    return Scores(name, (file,), cases, rules if isinstance(rules, dict) else {})


def _problem_of(cases: Any) -> str | None:
    if not isinstance(cases, dict) or not cases:
        return "no cases"
    for case, rows in cases.items():
        if not isinstance(rows, dict) or not rows:
            return f"no labels in case {case}"
        for label, row in rows.items():
            if not isinstance(row, dict):
                return f"no numbers for {label} in case {case}"
    return None


def _require_new_cases(known: JsonDict, part: Scores) -> None:
    twice = sorted(set(known) & set(part.cases))
    if twice:
        raise ConfigError(
            describe(
                f"folds of {part.name} share cases",
                expected="each case held out in one fold",
                found=f"again {some(twice)}",
                file=part.files[0],
                remedy="Compare single folds, such as RUN/fold_0.",
            )
        )


def _require_same_cases(first: Scores, other: Scores) -> None:
    alone = sorted(set(first.cases) - set(other.cases))
    also = sorted(set(other.cases) - set(first.cases))
    if not alone and not also:
        return
    found = [
        f"{len(ids)} only in {model.name} ({some(ids)})"
        for model, ids in ((first, alone), (other, also))
        if ids
    ]
    raise ConfigError(
        describe(
            "different cases can't be paired",
            expected=f"the same cases in {first.name} and {other.name}",
            found="; ".join(found),
            file=other.files[0],
            remedy="Evaluate both models on the same cases.",
        )
    )


def _require_same_rules(first: Scores, other: Scores) -> None:
    keys = {*first.rules, *other.rules} - {*_RULES_OF_THE_SUMMARY, "lesion_wise"}
    if first.rules.get("lesion_wise") and other.rules.get("lesion_wise"):
        keys.add("lesion_wise")
    different = sorted(k for k in keys if first.rules.get(k) != other.rules.get(k))
    if different:
        key = different[0]
        raise ConfigError(
            describe(
                f"scores by different rules can't be paired ({', '.join(different)})",
                expected=f"{key}: {first.rules.get(key, 'not stated')} ({first.name})",
                found=f"{other.rules.get(key, 'not stated')} ({other.name})",
                file=other.files[0],
                remedy="Evaluate both with the same options.",
            )
        )


def _require_same_references(first: Scores, other: Scores) -> None:
    """Compare the references' volumes: the same case id may name another label map."""
    for case, rows in first.cases.items():
        for label, row in rows.items():
            one, two = (
                r.get("reference_volume_ml") for r in (row, other.cases[case][label])
            )
            if not isinstance(one, (int, float)) or not isinstance(two, (int, float)):
                continue
            if not math.isclose(one, two, rel_tol=1e-6):
                raise ConfigError(
                    describe(
                        f"the references of case {case} differ in {label}",
                        expected=f"{one:g} ml as for {first.name}",
                        found=f"{two:g} ml",
                        file=other.files[0],
                        remedy="Evaluate both models against the same references.",
                    )
                )


def _labels_differ(
    expected: Sequence[str], found: Sequence[str], whose: str, than: str = ""
) -> str:
    return describe(
        f"{whose} has other labels" + (f" than {than}" if than else ""),
        expected=", ".join(expected),
        found=", ".join(found),
        remedy="Evaluate all with the same --labels.",
    )


def some(names: Sequence[str]) -> str:
    """Join names, at most twenty."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
