"""The manifest of a training: all that is needed to do it again, and what it left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segmamba import atomic
from segmamba.config import TrainConfig, to_dict
from segmamba.data.dataset import Case
from segmamba.data.parallel import for_each_case
from segmamba.data.plan import Plan, plan_hash
from segmamba.data.splits import Split
from segmamba.errors import FormatError
from segmamba.inference.load import MODEL_FILE, SNAPSHOTS
from segmamba.manifest import NAME, Session, combined_sum, file_record
from segmamba.training.trainer import Trainer
from segmamba.types import JsonDict
from segmamba.workflow.folder import RunFolder, staged

if TYPE_CHECKING:
    from segmamba.workflow.fold import FoldTraining

SETTINGS = "settings.yaml"
"""What `--config` takes to train the same again."""

OUTPUTS = (MODEL_FILE, "config.yaml", SETTINGS, "log.jsonl", "metrics.json")
"""Files of a fold that its manifest sums up, beside label maps and snapshots."""


@dataclass
class TrainingRecord:
    """The manifest in a fold's folder, rewritten after each epoch."""

    path: Path
    """The JSON file."""
    session: Session
    """This call."""
    facts: JsonDict
    """What was decided before training began."""
    trainer: Trainer
    """Where training is."""
    earlier: list[JsonDict] | None = None
    """The calls before this one; None before they are read."""
    first_step: int | None = None
    """The step that this call began with; None before it did any."""

    def note_step(self, step: int) -> None:
        """Remember where this call began.

        Args:
            step: Steps done, all calls together.
        """
        if self.first_step is None:
            self.first_step = step - 1

    def write(self, status: str = "running", scores: JsonDict | None = None) -> None:
        """Write the manifest as it is now.

        Args:
            status: "running" (or killed), "finished", or why it stopped.
            scores: What `metrics.json` holds.
        """
        state, folder = self.trainer.state, self.path.parent
        head = self.session.describe(self.trainer.device)
        outputs = [] if status == "running" else _outputs(folder)
        data = {
            **head,
            "status": status,
            **self.facts,
            "precision": self.trainer.precision,
            "step": state.step,
            "epoch": state.epoch,
            "best_score": state.best_score,
            "dice": None if scores is None else _mean_dice(scores),
            "sessions": [*self._earlier(), self._call(head)],
            "outputs": [file_record(path, folder) for path in outputs],
        }
        atomic.write_json(self.path, data)

    def _call(self, head: JsonDict) -> JsonDict:
        kept = ("command_line", "folder", "started", "seconds", "versions", "machine")
        steps = {"first_step": self.first_step, "last_step": self.trainer.state.step}
        return {**{key: head[key] for key in kept}, **steps}

    def _earlier(self) -> list[JsonDict]:
        """Give what the calls before this one wrote of themselves."""
        if self.earlier is None:
            old = _read(self.path) if self.trainer.state.step else {}
            self.earlier = list(old.get("sessions", ()))
        return self.earlier


def settings_again(plan: Plan, config: TrainConfig) -> JsonDict:
    """Give the settings file by which the same is trained again.

    Args:
        plan: The run's plan.
        config: How it was trained.

    Returns:
        The sections of a `--config` file, with nothing left to be decided.
    """
    values = {k: v for k, v in to_dict(plan).items() if not k.startswith("memory_")}
    network = {k: v for k, v in values.pop("network").items() if v is not None}
    preset = network.pop("name")
    sections = {"preset": preset, "network": network, "plan": values}
    return json.loads(json.dumps({**sections, "train": to_dict(config)}))


def split_hash(members: Split) -> str:
    """Tell one choice of cases from another.

    Args:
        members: The ids that train and validate. Their order counts: it decides what
            the sampler draws.

    Returns:
        12 hexadecimal digits.
    """
    plain = {"train": list(members["train"]), "val": list(members["val"])}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def training_facts(job: FoldTraining) -> JsonDict:
    """Describe a training before it begins; sums up its files.

    Args:
        job: The training.

    Returns:
        seed, options, fold, preset, network, plan, split, data and inputs, for JSON.
    """
    inputs = list(_inputs(job))
    return {
        "seed": job.config.seed,
        "options": to_dict(job.config),
        "fold": job.fold,
        "preset": job.plan.network.name,
        "network": to_dict(job.network_config),
        "plan": {"hash": plan_hash(job.plan), **file_record(job.run.plan)},
        "split": {"hash": split_hash(job.members), **job.members},
        "data": {
            "name": job.dataset.name,
            "folder": str(Path(job.dataset.root).absolute()),
            "layout": job.dataset.layout,
            "cases": len(job.members["train"]) + len(job.members["val"]),
            "sha256": combined_sum(inputs),
        },
        "inputs": inputs,
    }


def _inputs(job: FoldTraining) -> Iterator[JsonDict]:
    """Sum up each file of the fold's cases; one that is known already isn't read."""
    known = _known(job.run)
    members = {*job.members["train"], *job.members["val"]}
    cases = [case for case in job.dataset.cases if case.id in members]

    def records(case: Case) -> list[JsonDict]:
        files = [*case.images, *([case.label] if case.label else [])]
        return [_record(Path(path), known) for path in files]

    shown = staged(job.progress, "summing up files")
    for group in for_each_case(records, cases, progress=shown):
        yield from group


def _record(path: Path, known: dict[str, JsonDict]) -> JsonDict:
    old = known.get(str(path.absolute()))
    if old is not None and path.exists():
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (old["bytes"], old["modified"]):
            return old
    return file_record(path)


def _known(run: RunFolder) -> dict[str, JsonDict]:
    """Give the records of the folds that were trained before, by path."""
    found: dict[str, JsonDict] = {}
    for path in run.root.glob(f"fold_*/{NAME}"):
        rows: Sequence[JsonDict] = _read(path).get("inputs", ())
        found |= {row["path"]: row for row in rows}
    return found


def _read(path: Path) -> JsonDict:
    """Read a manifest; a broken or missing one tells nothing."""
    try:
        data = atomic.read_json(path)
    except FormatError:
        return {}
    return data if isinstance(data, dict) else {}


def _outputs(folder: Path) -> list[Path]:
    files = [folder / name for name in OUTPUTS]
    files += sorted(folder.glob(f"{SNAPSHOTS}/*/{MODEL_FILE}"))
    files += sorted(folder.glob("validation/*.nii.gz"))
    return [path for path in files if path.is_file()]


def _mean_dice(scores: JsonDict) -> dict[str, float]:
    return {name: row["dice"]["mean"] for name, row in scores["summary"].items()}
