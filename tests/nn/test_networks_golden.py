"""Whole networks against the published code: forward and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from network_contract import void_biases
from torch import nn

from golden import Golden, data, digest, l2_error, largest_error, uniform, weight
from segmamba.nn import create_network, load_published_weights, published_state_dict
from segmamba.nn.mamba import TriOrientatedMamba
from segmamba.nn.weights import published_names

SMALL = ("net_head_small", "net_head_small_official_slices", "net_v1_small")
LARGE = "net_head_default_64"


@pytest.fixture(scope="module")
def networks_folder(shared_data) -> Path:
    folder = shared_data / "golden"
    if not folder.is_dir():
        pytest.skip("needs the golden networks in ../shared/data/golden")
    return folder


def build(golden: Golden, dtype: torch.dtype, backend: str = "auto") -> nn.Module:
    config = golden.config
    head = golden.about["kind"] == "net_head"
    network = create_network(
        "segmamba" if head else "segmamba-v1",
        in_channels=config["in_chans"],
        out_channels=config["out_chans"],
        dims=config["feat_size"],
        depths=config["depths"],
        hidden_size=config["hidden_size"],
        num_slices=config.get("num_slices"),
    )
    state = {
        name: weight(config["seed"], name, tuple(value.shape))
        for name, value in published_state_dict(network).items()
    }
    assert digest(state) == golden.about["weights_sha256"]
    load_published_weights(
        network, {name: torch.from_numpy(value) for name, value in state.items()}
    )
    for module in network.modules():
        if isinstance(module, TriOrientatedMamba):
            module.backend = backend
    return network.to(dtype)


def recipe(golden: Golden, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return data(golden.config["seed"], name, shape)


def run(golden: Golden, dtype: torch.dtype, backend: str = "auto"):
    """Logits, gradient of the image, and probes of the parameters' gradients."""
    config, network = golden.config, build(golden, dtype, backend)
    size = (config["batch"], config["in_chans"], *config["dhw"])
    image = torch.from_numpy(recipe(golden, "input", size)).to(dtype).requires_grad_()
    logits = network(image)
    grad_out = recipe(golden, "grad_out", tuple(golden.about["output_shape"]))
    logits.backward(torch.from_numpy(grad_out).to(dtype))
    assert image.grad is not None
    return logits.detach().numpy(), image.grad.numpy(), probe(golden, network)


def probe(golden: Golden, network: nn.Module) -> np.ndarray:
    """Norm of each parameter's gradient, and its product with the recipe's numbers."""
    names = {public: own for own, public in published_names(network).items()}
    parameters, rows = dict(network.named_parameters()), []
    void = void_biases(network)
    for name in golden.about["param_names"]:
        parameter = parameters[names[name]]
        gradient = np.zeros(parameter.shape)  # true of biases that a norm takes out
        if parameter.grad is not None or names[name] not in void:
            gradient = parameter.grad.numpy().astype(np.float64)
        numbers = uniform(golden.config["seed"], f"{name}#probe", gradient.shape)
        rows.append([np.linalg.norm(gradient), (gradient * numbers).sum()])
    return np.array(rows)


def probe_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Worst difference over the norm, or over a hundredth of the largest norm."""
    norms = np.maximum(wanted[:, 0], 0.01 * wanted[:, 0].max())
    return float((np.abs(found - wanted) / norms[:, None]).max())


def statistics(array: np.ndarray) -> np.ndarray:
    axes = (0, 2, 3, 4)
    rows = (array.mean(axes), array.std(axes), array.min(axes), array.max(axes))
    return np.stack(rows, axis=1)


def thinned(golden: Golden, array: np.ndarray) -> np.ndarray:
    _, depth, height, width = golden.config.get("subsample", (1, 1, 1, 1))
    return array[:, :, ::depth, ::height, ::width]


def check(golden: Golden, found, output: float, grad_input: float, grad_probe: float):
    logits, gradient, probes = found
    assert list(logits.shape) == golden.about["output_shape"]
    assert largest_error(thinned(golden, logits), golden.tensors["output"]) < output
    wanted = golden.tensors["output_stats"]
    assert largest_error(statistics(logits.astype(np.float64)), wanted) < output
    flips = np.bincount(logits.argmax(1).ravel(), minlength=logits.shape[1])
    assert np.abs(flips - golden.tensors["argmax_hist"]).max() <= 2
    assert l2_error(thinned(golden, gradient), golden.tensors["grad_input"]) < (
        grad_input
    )
    assert probe_error(probes, golden.tensors["grad_probe"]) < grad_probe


@pytest.mark.parametrize("name", SMALL)
def test_float64_network_equals_the_published_one(name, networks_folder):
    golden = Golden(networks_folder / f"{name}.safetensors")
    check(golden, run(golden, torch.float64), 1e-6, 1e-6, 1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_float32_network_equals_the_published_one(name, networks_folder):
    golden = Golden(networks_folder / f"{name}.safetensors")
    check(golden, run(golden, torch.float32), 5e-5, 5e-2, 1e-1)


@pytest.mark.slow
def test_full_network_equals_the_published_one(networks_folder):
    golden = Golden(networks_folder / f"{LARGE}.safetensors")
    check(golden, run(golden, torch.float32), 5e-5, 5e-2, 1e-1)


@pytest.mark.slow
def test_full_float64_network_gives_the_published_logits(networks_folder):
    """Forward only: float64 convolutions are slow, and the small networks do both."""
    golden = Golden(networks_folder / f"{LARGE}.safetensors")
    network = build(golden, torch.float64)
    with torch.no_grad():
        image = torch.from_numpy(recipe(golden, "input", (1, 4, 64, 64, 64)))
        logits = network(image.double()).numpy()
    wanted = golden.tensors["output"]
    assert largest_error(thinned(golden, logits), wanted) < 1e-6


@pytest.mark.parametrize("name", SMALL[:1])
def test_channels_last_and_bf16_stay_close(name, networks_folder):
    golden = Golden(networks_folder / f"{name}.safetensors")
    network = build(golden, torch.float32).to(memory_format=torch.channels_last_3d)
    config = golden.config
    size = (config["batch"], config["in_chans"], *config["dhw"])
    image = torch.from_numpy(recipe(golden, "input", size))
    image = image.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        logits = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(image)
    assert largest_error(logits.numpy(), golden.tensors["output"]) < 5e-5
    assert l2_error(rough.float().numpy(), golden.tensors["output"]) < 5e-2
