"""The folder of one training: its file names, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from segmamba.atomic import write_text
from segmamba.checkpoint import previous_path
from segmamba.config import TrainConfig, to_dict
from segmamba.errors import ConfigError, describe


@dataclass(frozen=True)
class FoldFolder:
    """Where a training keeps its files."""

    path: Path
    """The folder, such as `RUN/fold_0`."""

    @property
    def checkpoint(self) -> Path:
        """State to go on from; the generation before it lies beside it."""
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """Weights for prediction."""
        return self.path / "model.safetensors"

    @property
    def log(self) -> Path:
        """One JSON line an epoch."""
        return self.path / "log.jsonl"

    def refuse_to_overwrite(self) -> None:
        """See that no training lies here.

        Raises:
            ConfigError: One does.
        """
        for file in (self.checkpoint, previous_path(self.checkpoint), self.model):
            if file.exists():
                raise ConfigError(
                    describe(
                        "this folder holds a training already",
                        found=file.name,
                        file=self.path,
                        remedy="Go on with it by --resume, or choose another folder.",
                    )
                )

    def write_config(self, config: TrainConfig) -> None:
        """Write `config.yaml`, which `--config` takes."""
        plain = json.loads(json.dumps(to_dict(config)))  # YAML knows no tuples
        text = yaml.safe_dump(plain, sort_keys=False)
        write_text(self.path / "config.yaml", text)
