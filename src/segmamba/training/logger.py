"""The log of a run: one JSON line an epoch, and TensorBoard if it is there."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

from segmamba.atomic import write_text
from segmamba.errors import TrainingError, describe
from segmamba.types import JsonDict


class RunLogger:
    """Writes what each epoch gave.

    Args:
        folder: Gets `log.jsonl` and, if asked, `tensorboard/`.
        first_epoch: Epochs already done; lines after them are cut from the log, since
            they will be written again.
        tensorboard: Write for TensorBoard too, if it is installed.
    """

    def __init__(
        self, folder: Path, *, first_epoch: int = 0, tensorboard: bool = True
    ) -> None:
        self.path = folder / "log.jsonl"
        self._cut(first_epoch)
        self._writer = _tensorboard_writer(folder / "tensorboard", tensorboard)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, line: JsonDict) -> None:
        """Append one line and flush it.

        Args:
            line: JSON values with `epoch` and `step`; NaN becomes null.

        Raises:
            TrainingError: The file can't be written.
        """
        text = json.dumps(_without_nan(line), allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise TrainingError(
                describe("can't write the log", found=error, file=self.path)
            ) from error
        self._write_tensorboard(line)

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()

    def _cut(self, first_epoch: int) -> None:
        if not self.path.exists():
            return
        lines = [line for line in read_log(self.path) if line["epoch"] <= first_epoch]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def _write_tensorboard(self, line: JsonDict) -> None:
        if self._writer is None:
            return
        for name, value in _flat(line).items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()


def read_log(path: Path | str) -> list[JsonDict]:
    """Read a `log.jsonl`, leaving out a last line that was cut off.

    Args:
        path: The file; a missing one counts as empty.

    Returns:
        One dictionary an epoch.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "epoch" in line:
            lines.append(line)
    return lines


def overall_score(scores: JsonDict) -> float:
    """Give the one number of a validation that training should raise.

    Args:
        scores: Numbers by name, groups of them too.

    Returns:
        "score" if there is one, else the mean of all numbers; NaN if there is none.
    """
    flat = _flat(scores)
    return float(
        flat.get("score", sum(flat.values()) / len(flat) if flat else math.nan)
    )


def _tensorboard_writer(folder: Path, wanted: bool) -> Any:
    """Open a writer; None if it is not wanted or TensorBoard is not installed."""
    if not wanted:
        return None
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    return module.SummaryWriter(str(folder))


def _flat(values: JsonDict, prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)):
            flat[prefix + key] = value
    return flat


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
