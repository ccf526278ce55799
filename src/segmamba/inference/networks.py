"""Networks from model files, which may come from anywhere: checked, then built."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from segmamba.allocation import AtMost, TooLargeError, Undrawn
from segmamba.checkpoint import ModelFile
from segmamba.config import AnyNetworkConfig
from segmamba.data.dataset import Dataset
from segmamba.data.plan import Plan, plan_hash
from segmamba.errors import CheckpointError, ConfigError, describe
from segmamba.nn import build_network

_SPARE = 1 << 12
_CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)


def build_networks(
    models: dict[Path, ModelFile], plan: Plan, dataset: Dataset, *, channels_last: bool
) -> list[nn.Module]:
    """Build the networks of model files, with the files' weights.

    Args:
        models: What was read, by file. The networks take its tensors over.
        plan: The run's.
        dataset: The run's.
        channels_last: Lay out weights with the channels last.

    Returns:
        A network for each file, on the CPU.

    Raises:
        CheckpointError: A file doesn't fit the plan, the data set or its own network.
    """
    for path, model in models.items():
        _check(path, model, plan, dataset)
    networks = [_build(path, model, plan) for path, model in models.items()]
    if channels_last:  # bf16 on a CPU: a third faster (measured); no difference in fp32
        for network in networks:
            _lay_out(network)
    return networks


def _lay_out(network: nn.Module) -> None:
    """Lay weights out with the channels last, but for those of a single channel.

    With these, torch 2.13's bfloat16 convolution on a CPU reads memory that isn't its
    own where a map is one slice deep (a 2D image): results are wrong, or NaN.
    """
    for module in network.modules():
        if isinstance(module, _CONVOLUTIONS) and module.in_channels > 1:
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore


def _check(path: Path, model: ModelFile, plan: Plan, dataset: Dataset) -> None:
    trained, now = model.metadata.get("plan_hash"), plan_hash(plan)
    if trained and trained != now:
        raise CheckpointError(
            describe(
                "the plan was changed since this model was trained",
                expected=f"plan {trained}",
                found=f"plan {now}",
                file=path,
                remedy="Put the old plan.json back, or train again.",
            )
        )
    config = model.network or plan.network
    expected = (len(dataset.channels), dataset.labels.num_outputs)
    found = (config.in_channels, config.out_channels)
    if expected != found:
        raise CheckpointError(
            describe(
                "the model doesn't fit the data set's channels and labels",
                expected=f"{expected[0]} channels in, {expected[1]} out",
                found=f"{found[0]} in, {found[1]} out",
                file=path,
            )
        )


def _build(path: Path, model: ModelFile, plan: Plan) -> nn.Module:
    network = _bare(path, model, plan)
    bare = network.state_dict()
    known, given = set(bare), set(model.tensors)
    if known != given:
        raise CheckpointError(
            describe(
                "weights don't fit the network",
                expected=f"also {_some(known - given)}" if known - given else None,
                found=f"unknown {_some(given - known)}" if given - known else None,
                file=path,
            )
        )
    try:
        network.load_state_dict(
            {
                name: tensor.to(bare[name].dtype)
                for name, tensor in model.tensors.items()
            },
            assign=True,  # spares a copy
        )
    except RuntimeError as error:  # shapes, a line each
        first, *more = [line.strip() for line in str(error).splitlines()[1:]] or [error]
        found = f"{first} {len(more)} more like this." if more else first
        raise CheckpointError(
            describe("weights don't fit the network", found=found, file=path)
        ) from error
    return network


def _bare(path: Path, model: ModelFile, plan: Plan) -> nn.Module:
    """Build the network that the files describe, if its weights are of that size.

    Files come from anywhere, and a few digits describe a network of any size.
    """
    config, count = model.network or plan.network, len(model.tensors)
    elements = sum(tensor.numel() for tensor in model.tensors.values())
    try:
        if _blocks(config) > count:
            raise TooLargeError
        bound = AtMost(elements=4 * elements + _SPARE, tensors=16 * count + _SPARE)
        with bound, Undrawn():
            return build_network(config)
    except ConfigError as error:
        raise CheckpointError(
            describe("can't build the model's network", found=error, file=path)
        ) from error
    except (TooLargeError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            describe(
                "weights don't fit the network",
                expected=f"a network of {elements} weights in {count} tensors",
                found="settings of a larger one",
                file=path,
            )
        ) from error


def _blocks(config: AnyNetworkConfig) -> int:
    """Count the blocks that a configuration repeats; each has a weight at least."""
    convolutions = getattr(config, "conv_blocks", None)
    return sum(config.depths or ()) + sum(convolutions or ())


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
