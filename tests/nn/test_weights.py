"""Published weights in and out, and what is said when they do not fit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from segmamba.errors import CheckpointError
from segmamba.nn import create_network, load_published_weights, published_state_dict

TINY = {"dims": (4, 8, 8, 12), "hidden_size": 16, "depths": (1, 0, 2, 1)}
PRESETS = ("segmamba", "segmamba-v1")


def tiny(name: str = "segmamba", **options):
    return create_network(name, in_channels=2, out_channels=3, **{**TINY, **options})


def wrap(kind: str, state: dict) -> dict:
    return {
        "bare": state,
        "ordered": OrderedDict(state),
        "prefixed": {f"module.{key}": value for key, value in state.items()},
        "compiled": {f"module._orig_mod.{k}": value for k, value in state.items()},
        "module": {"module": state},
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state},
        "both": {"module": {f"module.{key}": value for key, value in state.items()}},
        "deep": {"state_dict": {"model": state}, "optimizer": {}},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "bare",
        "ordered",
        "prefixed",
        "compiled",
        "module",
        "state_dict",
        "model",
        "both",
        "deep",
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_weights_go_out_and_come_back(name, kind):
    source, target = tiny(name), tiny(name)
    state = {key: value.clone() for key, value in published_state_dict(source).items()}
    assert load_published_weights(target, wrap(kind, state)) is target
    for wanted, found in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_its_own_name(name):
    network = tiny(name)
    state = published_state_dict(network)
    assert len(state) == len(list(network.parameters()))


def test_arrays_and_half_precision_load():
    network = tiny()
    state = published_state_dict(network)
    load_published_weights(tiny(), {key: value.numpy() for key, value in state.items()})
    load_published_weights(tiny(), {key: value.half() for key, value in state.items()})


def test_heads_of_deep_supervision_stay_out():
    deep = tiny(deep_supervision=True)
    state = published_state_dict(deep)
    assert set(state) == set(published_state_dict(tiny()))
    load_published_weights(deep, state)


def test_wrong_keys_are_named_and_nothing_changes():
    network = tiny()
    before = {name: item.clone() for name, item in network.state_dict().items()}
    state = dict(published_state_dict(tiny()))
    state["surprise.weight"] = torch.zeros(1)
    del state["out.conv.conv.bias"]
    state["vit.gscs.0.proj.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        load_published_weights(network, state)
    text = str(caught.value)
    assert "missing keys (1): out.conv.conv.bias" in text
    assert "unexpected keys (1): surprise.weight" in text
    assert "vit.gscs.0.proj.bias (5,) instead of (4,)" in text
    assert "preset" in text
    for name, item in network.state_dict().items():
        assert torch.equal(item, before[name])


def test_long_lists_are_shortened():
    with pytest.raises(CheckpointError) as caught:
        load_published_weights(tiny(), published_state_dict(tiny("segmamba-v1")))
    text = str(caught.value)
    assert "..." in text
    assert len(text) < 1500


@pytest.mark.parametrize("wrong", [None, 3, [1, 2], {1: torch.zeros(1)}, "weights.pt"])
def test_what_is_no_state_dict_is_refused(wrong):
    with pytest.raises(CheckpointError, match="no weights"):
        load_published_weights(tiny(), wrong)


def test_values_must_be_tensors():
    state = dict.fromkeys(published_state_dict(tiny()), "text")
    with pytest.raises(CheckpointError, match="str"):
        load_published_weights(tiny(), state)


@pytest.mark.parametrize("name", ["segmamba-paper", "segmamba-light", "segmamba-small"])
def test_other_presets_have_no_published_names(name):
    network = create_network(name, in_channels=1, out_channels=2, **TINY)
    with pytest.raises(CheckpointError, match=f"published counterpart.*{name}"):
        published_state_dict(network)


def test_other_modules_have_no_published_names():
    with pytest.raises(CheckpointError, match="published counterpart"):
        load_published_weights(torch.nn.Linear(2, 2), {})
