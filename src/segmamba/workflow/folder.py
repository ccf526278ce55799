"""The run folder, and the settings that a user may give for a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from segmamba.config import from_dict, load_yaml
from segmamba.errors import ConfigError, describe

Progress: TypeAlias = Callable[[int, int, str, str], None]
"""Called with the steps done, all steps, the stage, and what is at work or a note."""


def staged(
    progress: Progress | None, stage: str
) -> Callable[[int, int, str], None] | None:
    """Name the stage for a callback that only hears which item is at work.

    Args:
        progress: The caller's callback.
        stage: Such as "checking".

    Returns:
        A callback of steps done, all steps and the item; None if there is none.
    """
    if progress is None:
        return None
    return lambda done, total, item: progress(done, total, stage, item)


@dataclass(frozen=True)
class RunSettings:
    """What a `--config` file may hold; the command line's options come on top."""

    preset: str | None = None
    """Network preset."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of NetworkConfig that replace the preset's."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Fields of Plan that replace the planned ones."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig that replace the defaults."""


def load_settings(path: Path | str | RunSettings | None) -> RunSettings:
    """Read a `--config` file.

    Args:
        path: A YAML file, settings that are returned as they are, or None for none.

    Returns:
        The settings.

    Raises:
        ConfigError: The file is unreadable or has an unknown section.
    """
    if path is None or isinstance(path, RunSettings):
        return path or RunSettings()
    return from_dict(RunSettings, load_yaml(path), source=str(path))


@dataclass(frozen=True)
class RunFolder:
    """Where things lie in a run."""

    root: Path

    @property
    def dataset(self) -> Path:
        """Channels, labels and cases."""
        return self.root / "dataset.json"

    @property
    def fingerprint(self) -> Path:
        """What was measured on the data."""
        return self.root / "fingerprint.json"

    @property
    def plan(self) -> Path:
        """What was decided from it."""
        return self.root / "plan.json"

    @property
    def splits(self) -> Path:
        """Which cases train and which validate, fold by fold."""
        return self.root / "splits.json"

    @property
    def cache(self) -> Path:
        """Preprocessed cases."""
        return self.root / "cache"

    @property
    def cross_validation(self) -> Path:
        """Scores over all folds."""
        return self.root / "cross_validation.json"

    @property
    def postprocessing(self) -> Path:
        """What is done to predicted label maps, and how it was decided."""
        return self.root / "postprocessing.json"

    def fold(self, name: str) -> Path:
        """The folder of a fold.

        Args:
            name: A number, or "all".

        Returns:
            Such as fold_0 in the run.

        Raises:
            ConfigError: It is neither.
        """
        if not re.fullmatch("all|0|[1-9][0-9]*", name):  # one name for each number
            raise ConfigError(
                describe("bad fold", expected="a number, or all", found=name)
            )
        return self.root / f"fold_{name}"
