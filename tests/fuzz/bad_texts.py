"""Data sets, settings, plans and checkpoints that can't be used."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import documents
import torch
from bad_input import BadInput, write
from documents import DECATHLON, NETWORK, NNUNET, PLAN
from safetensors.torch import save_file

from segmamba.checkpoint import (
    load_checkpoint,
    load_model_file,
    load_published_file,
    save_checkpoint,
    save_model,
)
from segmamba.config import to_dict
from segmamba.data.dataset import dataset_to_dict
from segmamba.data.layouts import load_dataset
from segmamba.data.plan import load_plan
from segmamba.data.splits import load_splits
from segmamba.inference.load import load_model
from segmamba.nn import build_network
from segmamba.strict import LARGEST_YAML
from segmamba.workflow.folder import load_settings

Make = Callable[[Path], Path]


def description(base: dict[str, Any], **changes: Any) -> Make:
    """A dataset.json; None takes a key away."""
    data = {
        key: value for key, value in {**base, **changes}.items() if value is not None
    }
    return write("data/dataset.json", json.dumps(data))


def plan(**changes: Any) -> Make:
    data = {
        key: value for key, value in {**to_dict(PLAN), **changes}.items() if value != ""
    }
    return write("plan.json", json.dumps(data))


def table(text: str) -> Make:
    return write("cases.csv", text)


SPLITS = '[{"train": ["a", "b"], "val": %s}]'
EMPTY: Make = lambda folder: folder  # noqa: E731

DATA = tuple(
    BadInput(f"data set: {what}", made, load_dataset)
    for what, made in (
        ("it is missing", lambda folder: folder / "data"),
        ("an empty folder", EMPTY),
        ("a file of another kind", write("data.txt", "x")),
        ("a dataset.json that is no mapping", write("data/dataset.json", "[1]")),
        ("a key twice", write("data/dataset.json", '{"labels": {}, "labels": {}}')),
        ("no labels", description(DECATHLON, labels=None)),
        ("a label that is no number", description(DECATHLON, labels={"x": "ball"})),
        ("no cases", description(DECATHLON, training=[], test=[])),
        (
            "a case without a label map",
            description(DECATHLON, training=[{"image": "a.nii"}]),
        ),
        (
            "a case that can't be a file's name",
            description(DECATHLON, training=[{"image": "a.nii", "label": "..nii"}]),
        ),
        ("channels without numbers", description(DECATHLON, modality={"x": "CT"})),
        ("regions without an order", description(NNUNET, regions_class_order=None)),
        (
            "regions and order differ in number",
            description(NNUNET, regions_class_order=[1]),
        ),
        ("a file ending of no scan", description(NNUNET, file_ending=".png")),
        ("a table without images", table("id,label\na,a.nii\n")),
        ("a table without rows", table("image,label\n")),
        ("a table with too many cells", table("image,label\na.nii,b.nii,c.nii\n")),
        ("a row without an image", table("image,label\n,b.nii\n")),
    )
) + tuple(
    BadInput(f"splits: {what}", write("splits.json", text), load_splits)
    for what, text in (
        ("no list", "3"),
        ("a fold without val", '[{"train": ["a"]}]'),
        ("a case on both sides", SPLITS % '["a"]'),
        ("a case twice", SPLITS % '["c", "c"]'),
        ("ids that are no text", SPLITS % "[7]"),
        ("nothing to train on", '[{"train": [], "val": ["a"]}]'),
    )
)

SETTINGS = (
    *tuple(
        BadInput(
            f"settings: {what}", write("settings.yaml", text), load_settings, foreign
        )
        for what, text, foreign in (
            ("an unknown section", "trian:\n  max_epochs: 3\n", False),
            ("no mapping", "- 1\n- 2\n", False),
            ("a section of the wrong type", "train: 5\n", False),
            (
                "a tag that would run code",
                "preset: !!python/object/apply:os.system [id]\n",
                True,
            ),
            ("an alias", "train: &a {max_epochs: 3}\nplan: *a\n", False),
            ("a key twice", "preset: unet\npreset: segmamba\n", False),
            (
                "an endless number",
                f"plan: {{batch_size: {':'.join(['9'] * 99)}}}\n",
                False,
            ),
            ("nested too deeply", "plan: " + "[" * 9000, False),
            ("too large", "#" * (LARGEST_YAML + 1), False),
            ("no UTF-8", b"preset: \xff\n", False),
        )
    ),
    BadInput(
        "settings: no such file", lambda folder: folder / "settings.yaml", load_settings
    ),
)

network = to_dict(NETWORK)
PLANS = tuple(
    BadInput(f"plan: {what}", made, load_plan)
    for what, made in (
        ("no JSON", write("plan.json", "{")),
        ("it is missing", lambda folder: folder / "plan.json"),
        ("an unknown key", plan(patchsize=[16, 16, 16])),
        ("a key that is missing", plan(patch_size="")),
        ("a key twice", write("plan.json", '{"batch_size": 2, "batch_size": 4}')),
        ("not a number", write("plan.json", '{"batch_size": NaN}')),
        ("a value of the wrong type", plan(batch_size="two")),
        ("a list of the wrong length", plan(patch_size=[16, 16])),
        ("a word that is none of those known", plan(resampling="nearest")),
        ("a bad orientation", plan(orientation="RAL")),
        ("a spacing of zero", plan(spacing_mm=[0, 1, 1])),
        ("an infinite spacing", plan(spacing_mm=["inf", 1, 1])),
        ("no patch at all", plan(patch_size=[0, 16, 16])),
        ("a patch that is too small", plan(patch_size=[1, 1, 1])),
        ("a batch of none", plan(batch_size=0)),
        ("a number beyond 64 bits", plan(batch_size=10**30)),
        ("too few normalizations", plan(normalization=[])),
        ("a CT without its bounds", plan(normalization=[{"scheme": "ct"}])),
        (
            "bounds that are swapped",
            plan(normalization=[{"scheme": "ct", "clip": [9, 1], "mean": 1, "std": 1}]),
        ),
        ("a network without stages", plan(network={**network, "dims": []})),
    )
)

WEIGHTS = {"a": torch.arange(6.0)}


def checkpoint(change: Callable[[bytes], bytes] = bytes, **metadata: Any) -> Make:
    """A checkpoint, changed after it was written."""

    def made(folder: Path) -> Path:
        path = folder / "checkpoint.safetensors"
        save_checkpoint(path, WEIGHTS, {"kind": "training state", **metadata})
        path.write_bytes(change(path.read_bytes()))
        return path

    return made


def foreign(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "other.safetensors")
    return folder / "other.safetensors"


def newer(folder: Path) -> Path:
    return checkpoint(
        lambda data: data.replace(b'format_version\\": 1', b'format_version\\": 9')
    )(folder)


def run(config: Any = NETWORK, hashed: str | None = None, **files: bytes) -> Make:
    """A trained run of one fold, in which a file is another."""

    def made(folder: Path) -> Path:
        root = folder / "run"
        write("run/plan.json", json.dumps(to_dict(PLAN)))(folder)
        write("run/dataset.json", json.dumps(dataset_to_dict(documents.DATASET)))(
            folder
        )
        weights = build_network(NETWORK).state_dict()
        path = root / "fold_0" / "model.safetensors"
        save_model(path, weights, network=config, metadata={"plan_hash": hashed})
        return root

    return made


def without(name: str) -> Make:
    def made(folder: Path) -> Path:
        root = run()(folder)
        (root / name).unlink()
        return root

    return made


class Evil:
    """What a pickle may hold: a call."""

    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


def pickled(folder: Path) -> Path:
    torch.save({"a": Evil()}, folder / "weights.pt")
    return folder / "weights.pt"


def listed(folder: Path) -> Path:
    torch.save([torch.ones(2)], folder / "weights.pt")
    return folder / "weights.pt"


def larger(**changes: Any) -> Make:
    return run(replace(NETWORK, **changes))


TERABYTES = struct.pack("<Q", 1 << 42) + b"{}"

CHECKPOINTS = tuple(
    BadInput(f"checkpoint: {what}", made, read, foreign)
    for what, made, read, foreign in (
        (
            "it is missing",
            lambda folder: folder / "model.safetensors",
            load_checkpoint,
            False,
        ),
        ("it is cut off", checkpoint(lambda data: data[:100]), load_checkpoint, True),
        (
            "a flipped bit",
            checkpoint(lambda data: data[:-3] + b"\1" + data[-2:]),
            load_checkpoint,
            False,
        ),
        (
            "a pickle",
            write("model.safetensors", pickle.dumps({"a": 1})),
            load_checkpoint,
            True,
        ),
        (
            "a header that claims terabytes",
            write("model.safetensors", TERABYTES),
            load_checkpoint,
            True,
        ),
        ("of another program", foreign, load_checkpoint, False),
        ("of a later version", newer, load_checkpoint, False),
        ("a training state, not a model", checkpoint(), load_model_file, False),
        ("settings of a huge network", larger(dims=(9000, 9000)), load_model, False),
        ("settings of a deep network", larger(depths=(0, 10**9)), load_model, False),
        ("settings that are none", larger(dims=(0, 8)), load_model, False),
        ("weights of another network", larger(dims=(4, 6)), load_model, True),
        (
            "the plan was changed since",
            run(hashed="0123456789abcdef"),
            load_model,
            False,
        ),
        ("the run has no plan", without("plan.json"), load_model, False),
        ("nothing is trained", without("fold_0/model.safetensors"), load_model, False),
        ("published weights that would run code", pickled, load_published_file, False),
        (
            "published weights that are cut off",
            write("w.pt", b"PK\3\4abc"),
            load_published_file,
            True,
        ),
        ("a .pt without weights", listed, load_published_file, False),
    )
)
