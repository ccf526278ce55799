"""Every preset keeps the networks' contract; configurations are checked."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from network_contract import NetworkContract

from segmamba.config import PEER_NAMES, NetworkConfig
from segmamba.errors import ConfigError, GeometryError
from segmamba.nn import (
    build_network,
    count_parameters,
    create_network,
    preset_config,
    preset_names,
    published_state_dict,
)

SMALL = {
    "dims": (8, 12, 16),
    "hidden_size": 20,
    "depths": (0, 1, 1),
    "d_state": 3,
}


class TestSegmamba(NetworkContract):
    name = "segmamba"
    options = SMALL


class TestSegmambaV1(NetworkContract):
    name = "segmamba-v1"
    options = SMALL


class TestSegmambaPaper(NetworkContract):
    name = "segmamba-paper"
    options = SMALL


class TestSegmambaLight(NetworkContract):
    name = "segmamba-light"
    options = {
        "dims": (8, 12, 16),
        "depths": (0, 1, 1),
        "base_channels": 6,
        "d_state": 3,
    }


class TestSegmambaSmall(NetworkContract):
    name = "segmamba-small"
    options = TestSegmambaLight.options


class TestAnisotropic(NetworkContract):
    """Unequal strides, all scan orders, Mamba in the first stage."""

    name = "segmamba"
    options = {
        "dims": (7, 10),
        "hidden_size": 13,
        "d_state": 3,
        "depths": (1, 1),
        "strides": ((1, 2, 2), (2, 2, 1)),
        "orientations": (
            "forward",
            "reverse",
            "slice",
            "slice-reverse",
            "column",
            "column-reverse",
        ),
    }

    def test_deep_supervision_gives_every_level_in_training(self):
        network = self.build(deep_supervision=True)
        sizes = [tuple(item.shape[2:]) for item in network(self.image((7, 12, 15)))]
        assert sizes == [(7, 12, 15), (7, 6, 8)]


@pytest.mark.parametrize(
    ("name", "parameters", "reference"),
    [
        ("segmamba", 67_416_196, "params_head.json"),
        ("segmamba-v1", 58_547_956, "params_v1.json"),
    ],
)
def test_published_presets_have_the_published_parameters(
    name, parameters, reference, golden_folder
):
    with torch.device("meta"):
        network = create_network(name, in_channels=4, out_channels=4)
    assert count_parameters(network) == parameters
    shapes = json.loads((golden_folder / reference).read_text())["shapes"]
    found = {k: list(v.shape) for k, v in published_state_dict(network).items()}
    assert found == shapes


def test_light_is_light():
    with torch.device("meta"):
        network = create_network("segmamba-light", in_channels=1, out_channels=3)
    assert count_parameters(network) < 3_000_000


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", [n for n in preset_names() if n not in PEER_NAMES])
def test_any_number_of_stages(name, stages):
    network = create_network(
        name,
        in_channels=1,
        out_channels=2,
        dims=(4,) * stages,
        depths=(0,) * (stages - 1) + (1,),
        hidden_size=4,
        d_state=2,
        strides=(2, 2) + (1,) * (stages - 2),
    )
    with torch.no_grad():
        assert network(torch.randn(1, 1, 12, 9, 17)).shape == (1, 2, 12, 9, 17)


def test_per_stage_settings_follow_the_stages():
    config = preset_config("segmamba", dims=(8, 8))
    assert config.depths == (2, 2)
    assert len(config.strides) == 2
    config = preset_config("segmamba-light", dims=(8,) * 5)
    assert config.depths == (0, 1, 2, 2, 2)
    assert config.hidden_size == preset_config("segmamba-light").hidden_size


def test_none_takes_the_presets_value():
    bare = NetworkConfig(name="segmamba-v1", in_channels=2, dims=(4, 4, 4, 4))
    config = build_network(bare).config
    assert config.orientations == ("forward", "reverse")
    assert config.mlp == "layer"
    assert config.in_channels == 2
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dims": (8,)}, "2 to 6"),
        ({"dims": (8,) * 7}, "2 to 6"),
        ({"dims": (8, 0, 8, 8)}, "dims"),
        ({"dims": "wide"}, "dims"),
        ({"depths": (1, 1)}, "4 entries"),
        ({"depths": (1, 1, 1, -1)}, "depths"),
        ({"strides": ((2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))}, "strides"),
        ({"strides": (0, 2, 2, 2)}, "strides"),
        ({"num_slices": (8, 4)}, "num_slices"),
        ({"orientations": ("forward", "forward")}, "twice"),
        ({"orientations": ("sideways",)}, "orientations"),
        ({"orientations": ()}, "orientations"),
        ({"in_channels": 0}, "in_channels"),
        ({"stem_kernel": 4}, "odd"),
        ({"gsc": "divide"}, "gsc"),
        ({"widths": (8, 8)}, "unknown setting"),
        ({"depth": (1, 1, 1, 1)}, "Did you mean 'depths'"),
    ],
)
def test_bad_settings_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        preset_config("segmamba", **options)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'segmamba-light'"):
        create_network("segmamba-lite", in_channels=1, out_channels=2)


def test_forced_slices_must_divide_the_tokens():
    network = create_network(
        "segmamba",
        in_channels=1,
        out_channels=2,
        dims=(4, 4),
        hidden_size=4,
        depths=(1, 1),
        num_slices=(7, 4),
    )
    with pytest.raises(GeometryError, match=r"divisor of 512.*found 7"):
        network(torch.randn(1, 1, 16, 16, 16))


def test_a_wrong_input_is_refused():
    network = create_network("segmamba-light", in_channels=2, out_channels=2)
    with pytest.raises(GeometryError, match=r"expected \(B, 2, D, H, W\)"):
        network(torch.randn(1, 1, 32, 32, 32))
    with pytest.raises(GeometryError, match="expected"):
        network(torch.randn(2, 32, 32, 32))


def test_step_sizes_start_properly_in_every_direction():
    balanced = create_network("segmamba", in_channels=1, out_channels=2, dims=(16, 16))
    published = create_network(
        "segmamba",
        in_channels=1,
        out_channels=2,
        dims=(16, 16),
        initialization="published",
    )
    for network, proper in ((balanced, [True] * 3), (published, [True, False, False])):
        directions = network.stages[0].layers[0].mixer.directions
        steps = [torch.nn.functional.softplus(d.dt_proj_bias) for d in directions]
        inside = [bool((s > 9e-4).all() and (s < 0.101).all()) for s in steps]
        assert inside == proper
        for direction in directions:
            rates = direction.A_log.exp()
            torch.testing.assert_close(rates[0], torch.arange(1.0, 17.0))
            assert (direction.D == 1).all()


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside
def test_it_compiles_with_inductor():
    network = create_network(
        "segmamba-light",
        in_channels=1,
        out_channels=2,
        dims=(4, 8),
        depths=(0, 1),
        base_channels=4,
        d_state=2,
    ).eval()
    image = torch.randn(1, 1, 9, 8, 10)
    compiled = torch.compile(network, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(image), network(image), atol=1e-4, rtol=1e-4
        )
