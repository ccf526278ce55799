"""The record of a benchmark: its JSON, kept on disk row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from segmamba.atomic import write_json
from segmamba.benchmark.environment import environment, first_line
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.timing import Run, allocated, measure
from segmamba.devices import is_out_of_memory
from segmamba.types import JsonDict

OURS = "segmamba"
"""Subject of our own rows; a peer's rows carry the peer's name."""

Say = Callable[[str], None]


class Record:
    """Collects checks and measurements; writes the file after each."""

    def __init__(
        self,
        what: str,
        settings: BenchmarkSettings,
        out: Path | None = None,
        say: Say | None = None,
    ) -> None:
        """Begin a record.

        Args:
            what: One line on what is measured.
            settings: How.
            out: JSON file to keep; None keeps none.
            say: Gets a line for each row.
        """
        self.settings = settings
        self.device = settings.place
        self._out, self._say = out, say
        self.data: JsonDict = {
            "what": what,
            **environment(self.device),
            "dtype": settings.precision,
            "backend": settings.backend,
            "quick": settings.quick,
            "seconds_per_measurement": settings.seconds,
            "memory": "peak_mib with parameters and inputs, peak_above_mib without",
            "complete": False,
            "checks": {},
            "peers": {},
            "measurements": [],
        }

    @property
    def failures(self) -> list[str]:
        """What failed its check, or of our own rows broke while it was timed."""
        checks = self.data["checks"].items()
        rows = self.data["measurements"]
        return [
            *(
                f"check of {name}: {item['errors']}"
                for name, item in checks
                if not item["passed"] and not item["peer"]
            ),
            *(
                f"{row['case']}, {row['mode']}: {row['note']}"
                for row in rows
                if row["status"] == "failed" and row["subject"] == OURS
            ),
        ]

    def check(
        self,
        name: str,
        find: Callable[[], Mapping[str, float]],
        limits: float | Mapping[str, float],
        *,
        peer: bool = False,
    ) -> bool:
        """Compare with the truth before anything is timed.

        Args:
            name: What is checked.
            find: Computes relative errors by name.
            limits: The largest error allowed, for all or by name.
            peer: Whether this is somebody else's code, whose failure isn't ours.

        Returns:
            Whether every error is within its limit; errors that are not a number are
            not.
        """
        try:
            errors: dict[str, Any] = dict(find())
        except Exception as error:  # a kernel that doesn't compile raises anything
            errors = {"broke": first_line(error)}
        passed = "broke" not in errors and all(
            value <= _limit_of(key, limits) for key, value in errors.items()
        )
        self.data["checks"][name] = {
            "errors": errors,
            "limits": limits,
            "passed": passed,
            "peer": peer,
        }
        self._keep(f"check of {name}: {'passed' if passed else f'FAILED {errors}'}")
        return passed

    def peer(self, name: str, state: str) -> None:
        """Note whether a peer is here.

        Args:
            name: The peer.
            state: Its version, or why it isn't measured.
        """
        self.data["peers"][name] = state
        self._keep(f"{name}: {state}")

    def time(
        self,
        subject: str,
        case: str,
        mode: str,
        make: Callable[[], Run],
        **facts: Any,
    ) -> JsonDict:
        """Time one call and keep the row.

        Args:
            subject: `OURS` or a peer's name.
            case: Which size.
            mode: What is timed, such as "inference".
            make: Builds what is needed and gives the call; its memory counts.
            **facts: More for the row, such as shape.

        Returns:
            The row; "status" is "ok", "out of memory" or "failed", the latter two
            with a "note" instead of figures.
        """
        try:
            baseline = allocated(self.device)
            seconds = self.settings.seconds
            figures = measure(make, self.device, seconds, baseline)
        except Exception as error:  # the other rows must not suffer from it
            lacks = is_out_of_memory(error)
            status = "out of memory" if lacks else "failed"
            figures = {"status": status, "note": first_line(error)}
        return self.add(subject, case, mode, **facts, **figures)

    def add(self, subject: str, case: str, mode: str, **figures: Any) -> JsonDict:
        """Keep a row that was measured elsewhere, or that says why there is none."""
        row = {"subject": subject, "case": case, "mode": mode, "status": "ok"}
        row = {**row, **figures}
        self.data["measurements"].append(row)
        self._keep(", ".join(cell for cell in table_row(row) if cell))
        return row

    def finish(self) -> JsonDict:
        """Mark the record as complete and give it."""
        self.data["complete"] = True
        self._keep(None)
        return self.data

    def _keep(self, line: str | None) -> None:
        if self._out is not None:
            write_json(self._out, self.data)
        if self._say is not None and line:
            self._say(line)


def _limit_of(name: str, limits: float | Mapping[str, float]) -> float:
    return limits[name] if isinstance(limits, Mapping) else limits


HEADER = ("subject", "case", "what", "median ms", "quartiles", "rounds", "peak MiB")
"""Columns of `table_row`."""


def table_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Give a row's figures as text under `HEADER`.

    Args:
        row: An entry of "measurements".

    Returns:
        Seven cells; without figures, the status stands in the fourth.
    """
    head = (row["subject"], row["case"], row["mode"])
    if "median_ms" not in row:
        return (*head, f"{row['status']}: {row.get('note', '')}"[:70], "", "", "")
    low, high = row["quartiles_ms"]
    peak = row.get("peak_mib")
    return (
        *head,
        f"{row['median_ms']:.3f}",
        f"{low:.3f} to {high:.3f}",
        str(row["rounds"]),
        "" if peak is None else f"{peak:.0f}",
    )


def describe_pace(row: Mapping[str, Any]) -> str:
    """Say in a line how fast a training went and what it waited for.

    Args:
        row: An entry of "measurements" with `patches_per_s`.
    """
    busy = row.get("gpu_busy_share")
    return (
        f"{row['mode']}: {row['patches_per_s']:.2f} patches/s, "
        f"{100 * row['waiting_share']:.1f} % of the time waiting for batches"
        + ("" if busy is None else f", GPU busy {100 * busy:.1f} %")
    )
