"""Readers of plans, settings, descriptions of data, and checkpoints."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from target import Seed, Target

from segmamba.atomic import read_json
from segmamba.checkpoint import load_checkpoint, load_published_file, save_model
from segmamba.config import from_dict, to_dict
from segmamba.data.cache import Cache
from segmamba.data.dataset import Case, Dataset, dataset_to_dict
from segmamba.data.fingerprint import Fingerprint
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts import load_dataset, load_label_scheme
from segmamba.data.plan import (
    ChannelNormalization,
    Plan,
    load_plan,
    make_plan,
    plan_hash,
)
from segmamba.data.splits import load_splits
from segmamba.inference.load import load_model
from segmamba.inference.postprocessing import load_postprocessing
from segmamba.io.dicom_segments import load_descriptions, make_segments
from segmamba.nn import build_network, preset_config
from segmamba.workflow import steps
from segmamba.workflow.folder import load_settings
from segmamba.workflow.train import train_config

NETWORK = preset_config(
    "segmamba-light", dims=(4, 8), base_channels=4, depths=(0, 1), out_channels=3
)
PLAN = Plan(
    orientation="SPL",
    spacing_mm=(2.0, 1.0, 1.0),
    patch_size=(16, 16, 16),
    batch_size=2,
    normalization=(ChannelNormalization("ct", (-100.0, 200.0), 30.0, 50.0),),
    network=NETWORK,
)
DATASET = Dataset(
    name="Balls",
    root=Path("/nowhere"),
    layout="msd",
    channels=("CT",),
    labels=LabelScheme({"background": 0, "rim": 1, "core": 2}),
    cases=(Case("a", (Path("/nowhere/a.nii.gz"),), Path("/nowhere/b.nii.gz")),),
)
DECATHLON = {
    "name": "Balls",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "ball"},
    "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
    "test": ["imagesTs/b.nii.gz"],
}
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
    "dataset": {"a": {"images": ["a_0000.nii.gz"], "label": "a.nii.gz"}},
}
FINGERPRINT = {
    "dataset": "Balls",
    "cases": [
        {
            "id": "a",
            "shape": [9, 8, 7],
            "spacing_mm": [1.0, 1.0, 2.0],
            "orientation": "RAS",
            "cropped_shape": [9, 8, 7],
            "label_voxels": {"ball": 5},
        }
    ],
    "channels": [
        {
            "name": "CT",
            "modality": "ct",
            **dict.fromkeys(("mean", "std", "median", "min", "max"), 1.5),
            **{"percentile_00_5": 0.0, "percentile_99_5": 9.0, "zero_share": 0.1},
        }
    ],
    "median_spacing_mm": [1.0, 1.0, 2.0],
    "median_shape": [9, 8, 7],
    "label_voxels": {"ball": 5},
}
CONFIG = {
    "preset": "segmamba-light",
    "network": {"dims": [8, 16], "depths": [0, 1]},
    "plan": {"patch_size": [16, 16, 16], "batch_size": 2, "spacing_mm": [1, 1, 2.5]},
    "train": {"max_epochs": 2, "learning_rate": 1e-3, "augmentation": {"p_blur": 0.5}},
}
CLEANING = {
    "steps": [
        {"label": "core", "operation": "minimal-size", "min_volume_mm3": 9.5},
        {"label": "rim", "operation": "fill-holes"},
    ],
    "decision": {"cases": 5},
}
SPLITS = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
SEGMENTS = {
    "core": {
        "category": ["49755003", "SCT", "Morphologically Abnormal Structure"],
        "type": ["108369006", "SCT", "Neoplasm"],
        "color": [230, 60, 60],
    }
}
TABLE = (
    b"id,image_T1,image_T2,label\na,a1.nii.gz,a2.nii.gz,a.nii.gz\nb,b1.nii,b2.nii,\n"
)


def _json(*values: Any) -> tuple[Seed, ...]:
    return tuple(Seed(json.dumps(value).encode(), is_json=True) for value in values)


def _yaml_dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _yaml(text: bytes) -> bytes:
    """Turn JSON into YAML as people write it; text that is no JSON any more stays."""
    try:
        return _yaml_dump(json.loads(text)).encode()
    except (ValueError, RecursionError):
        return text


def _scheme(path: Path) -> None:
    load_label_scheme(path)
    load_dataset(path)


def _config(path: Path) -> None:
    """Go all the way from a file of settings to a plan and a training."""
    settings = load_settings(path)
    name = settings.preset or "segmamba-light"
    network = preset_config(name, **steps.network_overrides(settings, name))
    fingerprint = from_dict(Fingerprint, FINGERPRINT)
    overrides = steps.plan_overrides(settings, name)
    plan = make_plan(
        fingerprint, DATASET, network=network, memory_mib=4096, overrides=overrides
    )
    train_config(plan, settings)


def _segments(path: Path) -> None:
    make_segments(DATASET.labels.labels, load_descriptions(path))


def _fingerprint(path: Path) -> None:
    from_dict(Fingerprint, read_json(path), source=str(path))


def texts() -> list[Target]:
    descriptions = _json(DECATHLON, NNUNET, dataset_to_dict(DATASET))
    configs = tuple(Seed(seed.data, _yaml, is_json=True) for seed in _json(CONFIG))
    return [
        Target("plan", "plan.json", load_plan, _json(to_dict(PLAN))),
        Target("dataset", "dataset.json", _scheme, descriptions),
        Target("table", "cases.csv", load_dataset, (Seed(TABLE),)),
        Target("splits", "splits.json", load_splits, _json(SPLITS, SPLITS[0])),
        Target("config", "config.yaml", _config, configs, names_file=False),
        Target("fingerprint", "f.json", _fingerprint, _json(FINGERPRINT)),
        Target(
            "postprocessing",
            "postprocessing.json",
            lambda path: load_postprocessing(path, DATASET.labels),
            _json(CLEANING),
        ),
        Target(
            "segments", "segments.json", _segments, _json(SEGMENTS), names_file=False
        ),
    ]


def _safetensors(data: bytes) -> bytes:
    """Put the length in front of a header that may have changed its length."""
    header, _, body = data.partition(b"\n")
    return struct.pack("<Q", len(header)) + header + body


def checkpoints(scratch: Path) -> list[Target]:
    path = scratch / "model.safetensors"
    network = build_network(NETWORK)
    metadata = {"plan_hash": plan_hash(PLAN), "step": 9, "finished": True}
    save_model(path, network.state_dict(), network=NETWORK, metadata=metadata)
    whole = path.read_bytes()
    run = {
        "plan.json": json.dumps(to_dict(PLAN)).encode(),
        "dataset.json": json.dumps(dataset_to_dict(DATASET)).encode(),
        "fold_0/model.safetensors": whole,
    }
    model, described = _taken_apart(whole), _json(dataset_to_dict(DATASET))
    return [
        Target("checkpoint", "c.safetensors", load_checkpoint, model),
        Target("published", "w.pt", load_published_file, (Seed(_published()),)),
        _in_run("run-model", "fold_0/model.safetensors", model, run),
        _in_run("run-plan", "plan.json", _json(to_dict(PLAN)), run),
        _in_run("run-dataset", "dataset.json", described, run),
    ]


def _published() -> bytes:
    stream = io.BytesIO()
    state = {"module": {"a.weight": torch.ones(3, 2), "step": torch.tensor(4)}}
    torch.save(state, stream)
    return stream.getvalue()


def caches(scratch: Path) -> list[Target]:
    """A cached case, of which one file is damaged."""
    folder, shape = scratch / "cache", (4, 5, 6)
    folder.mkdir()
    np.save(folder / "a.image.npy", np.ones((1, *shape), np.float16))
    np.save(folder / "a.label.npy", np.ones(shape, np.int16))
    places = {"1": np.array([[1, 2, 3], [3, 4, 5]], np.int32)}
    np.savez(folder / "a.foreground.npz", **places)  # pyright: ignore
    geometry = {
        "original_shape": shape,
        "affine": np.eye(4).tolist(),
        "axis_order": [0, 1, 2],
        "axis_flips": [False, False, True],
        "crop": [[0, n] for n in shape],
        "shape": shape,
    }
    marker = json.dumps({"key": "x", "geometry": geometry}).encode()
    (folder / "a.json").write_bytes(marker)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def target(name: str, file: str) -> Target:
        others = {key: data for key, data in files.items() if key != file}
        seed = Seed(files[file], is_json=file.endswith("json"))
        return Target(f"cache-{name}", file, _cached, (seed,), others)

    return [
        target("image", "a.image.npy"),
        target("label", "a.label.npy"),
        target("foreground", "a.foreground.npz"),
        target("marker", "a.json"),
    ]


def _cached(path: Path) -> None:
    case = Cache(path.parent, ("a",)).load("a")
    for places in case.foreground.values():
        assert case.label[tuple(places.T)].size + case.image[:, 0].size > 0


def _in_run(
    name: str, file: str, seeds: tuple[Seed, ...], run: dict[str, bytes]
) -> Target:
    others = {key: data for key, data in run.items() if key != file}
    up = file.count("/")

    def read(path: Path) -> None:
        load_model(path.parents[up], device="cpu")

    return Target(name, file, read, seeds, others, names_file=False)


def _taken_apart(whole: bytes) -> tuple[Seed, ...]:
    """Lay a checkpoint's two nested headers open, so that both can be edited."""
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    tensors, body = json.loads(whole[8:size]), whole[size:]
    head = json.loads(tensors.pop("__metadata__")["segmamba"])

    def put_together(data: bytes) -> bytes:
        try:
            parts = json.loads(data)
            inner = {"segmamba": json.dumps(parts["head"])}
            text = json.dumps({"__metadata__": inner, **parts["tensors"]}).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            text = data
        return struct.pack("<Q", len(text)) + text + body

    data = json.dumps({"head": head, "tensors": tensors}).encode()
    return (Seed(data, put_together, is_json=True),)
