"""Blocks against the published code: forward and gradients, float32 and float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden import Golden, gradient_error, largest_error
from segmamba.nn.blocks import (
    ChannelMlp,
    GatedSpatialConvolution,
    ResidualBlock,
    UpBlock,
)
from segmamba.nn.mamba import MambaLayer, TriOrientatedMamba
from segmamba.nn.weights import mixer_name

TRI = ("forward", "reverse", "slice")
BLOCK_FILES = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "data" / "golden").glob("*.safetensors")
)
GSC_NAMES = {"spatial1": "proj", "spatial2": "proj2", "gate": "proj3", "fuse": "proj4"}


class Tokens(nn.Module):
    """A mixer that remembers the size of the map."""

    def __init__(self, mixer: TriOrientatedMamba, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.mixer, self.size = mixer, size

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mixer(tokens, self.size)


def build(kind: str, config: dict) -> nn.Module:
    if kind.startswith("mamba_"):
        orientations = TRI if kind == "mamba_v3" else TRI[:2]
        mixer = TriOrientatedMamba(
            config["d_model"], orientations, num_slices=config.get("nslices")
        )
        return Tokens(mixer, tuple(config["dhw"]))
    channels = config["channels"]
    if kind.startswith("layer_"):
        orientations = TRI if kind == "layer_head" else TRI[:2]
        mixer = TriOrientatedMamba(
            channels, orientations, num_slices=config.get("nslices")
        )
        return MambaLayer(channels, mixer, mlp=kind == "layer_v1")
    if kind.startswith("gsc_"):
        return GatedSpatialConvolution(channels, product=kind == "gsc_mul")
    if kind == "mlp":
        return ChannelMlp(channels)
    if kind == "res_block":
        return ResidualBlock(channels, config["out_channels"])
    return UpBlock(channels, config["out_channels"])


def published(kind: str, name: str) -> str:
    """The published name of a block's parameter."""
    if kind == "mlp":
        return name
    if kind == "res_block":
        return "layer." + name.replace(".", ".conv.")
    if kind == "up_block":
        if name == "up.weight":
            return "transp_conv.conv.weight"
        return "conv_block." + name.removeprefix("block.").replace(".", ".conv.")
    if kind.startswith("gsc_"):
        convolution, _, rest = name.partition(".")
        return f"{GSC_NAMES[convolution]}.{rest}"
    prefix, _, rest = name.partition(".")
    if prefix == "mixer":
        layer = kind.startswith("layer_")
        return ("mamba." if layer else "") + mixer_name(rest, TRI)
    if kind == "layer_v1" and prefix != "mlp":
        prefix = {"norm": "norm1", "mlp_norm": "norm2"}[prefix]
    return f"{prefix}.{rest}"


def is_void(kind: str, name: str) -> bool:
    return kind.startswith("gsc_") and name.endswith(".bias")


def run(golden: Golden, dtype: torch.dtype, backend: str) -> dict[str, np.ndarray]:
    kind = golden.about["kind"]
    block = build(kind, golden.config).to(dtype)
    for module in block.modules():
        if isinstance(module, TriOrientatedMamba):
            module.backend = backend
    weights, names = golden.group("w/"), {}
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            names[name] = published(kind, name)
            parameter.copy_(torch.from_numpy(weights.pop(names[name])))
    assert not weights
    inputs = [
        torch.from_numpy(golden.tensors[name]).to(dtype).requires_grad_()
        for name in ("input", "skip")
        if name in golden.tensors
    ]
    output = block(*inputs)
    output.backward(torch.from_numpy(golden.tensors["grad_out"]).to(dtype))
    found = {"output": output.detach().numpy(), "grad_input": inputs[0].grad.numpy()}
    if len(inputs) > 1:
        found["grad_skip"] = inputs[1].grad.numpy()
    for name, parameter in block.named_parameters():
        # A bias that a norm takes out has no gradient; the published one is rounding.
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert parameter.grad is not None or is_void(kind, name)
        found[f"gw/{names[name]}"] = gradient.expand_as(parameter).numpy()
    return found


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance", "tolerance_weights"),
    [
        (torch.float32, "auto", 5e-6, 2e-4),
        (torch.float64, "chunked", 1e-9, 1e-9),
        (torch.float64, "reference", 1e-9, 1e-9),
    ],
    ids=["float32", "float64", "float64-reference"],
)
@pytest.mark.parametrize("name", BLOCK_FILES)
def test_block_equals_the_published_one(
    name, dtype, backend, tolerance, tolerance_weights, golden_folder
):
    golden = Golden(golden_folder / f"{name}.safetensors")
    found = run(golden, dtype, backend)
    for key in ("output", "grad_input", "grad_skip"):
        if key in golden.tensors:
            assert largest_error(found[key], golden.tensors[key]) < tolerance, key
    wanted = golden.group("gw/")
    gradients = {key: found[f"gw/{key}"] for key in wanted}
    assert gradient_error(gradients, wanted) < tolerance_weights


def test_there_are_golden_blocks():
    assert len(BLOCK_FILES) == 12
