"""The paper's ablation and its mixers, as configurations that build and train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segmamba.nn import build_network, preset_config
from segmamba.workflow.folder import load_settings

FOLDER = Path(__file__).parents[2] / "configs" / "ablation"
FILES = sorted(FOLDER.glob("*.yaml"))
SMALL = {"dims": (4, 6), "hidden_size": 8, "depths": (1, 1)}


def config_of(name: str, **options):
    settings = load_settings(FOLDER / f"{name}.yaml")
    assert settings.preset is not None
    return preset_config(settings.preset, **{**settings.network, **options})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_builds_and_trains(file):
    network = build_network(config_of(file.stem, in_channels=2, **SMALL))
    outputs = network(torch.randn(1, 2, 16, 17, 16))
    assert outputs.shape == (1, 2, 16, 17, 16)
    outputs.square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(grad.isfinite().all() for grad in gradients)


def test_they_are_the_papers_rows():
    rows = ("mamba", "mamba-gsc", "tom", "tom-gsc", "tom-gsc-fue")
    mixers = ("tom", "large-kernel", "window-attention", "self-attention")
    names = {*rows, *(f"mixer-{mixer}" for mixer in mixers)}
    assert {file.stem for file in FILES} == names
    found = {name: config_of(name) for name in rows}
    parts = {
        name: (len(config.orientations), config.gsc, config.fue)
        for name, config in found.items()
    }
    assert parts == {
        "mamba": (1, "none", False),
        "mamba-gsc": (1, "paper", False),
        "tom": (3, "none", False),
        "tom-gsc": (3, "paper", False),
        "tom-gsc-fue": (3, "paper", True),
    }
    assert found["tom-gsc-fue"] == preset_config("segmamba-paper")
    assert found["mamba"].orientations == ("forward",)


def test_only_the_mixer_differs():
    configs = [config_of(file.stem) for file in FILES if "mixer" in file.stem]
    assert len({config.mixer for config in configs}) == 4
    same = [
        {k: v for k, v in vars(config).items() if k != "mixer"} for config in configs
    ]
    assert all(values == same[0] for values in same)
    assert preset_config("segmamba") in configs
