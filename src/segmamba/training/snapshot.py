"""All tensors of a run under one set of names, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from segmamba.config import AnyNetworkConfig, TrainConfig, to_dict
from segmamba.training.ema import WeightAverage
from segmamba.training.optimizer import load_optimizer_tensors, optimizer_tensors
from segmamba.types import JsonDict


def run_tensors(
    network: nn.Module, optimizer: Optimizer, average: WeightAverage | None
) -> dict[str, Tensor]:
    """Name every tensor that training carries from step to step.

    Args:
        network: Gives `network.<name>`.
        optimizer: Gives `optimizer.<parameter>.<state>`.
        average: Gives `ema.<name>`.

    Returns:
        The tensors themselves, not copies.
    """
    groups = {
        "network": network.state_dict(),
        "optimizer": optimizer_tensors(optimizer, network),
        "ema": {} if average is None else average.tensors,
    }
    return {
        f"{group}.{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def restore_run_tensors(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None,
) -> None:
    """Put back what `run_tensors` gave.

    Raises:
        CheckpointError: The average or the optimiser's state does not fit.
        RuntimeError: The weights do not fit the network.
        KeyError: A name is of no known group.
    """
    groups: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}, "ema": {}}
    for full_name, tensor in tensors.items():
        group, _, name = full_name.partition(".")
        groups[group][name] = tensor
    network.load_state_dict(groups["network"])
    load_optimizer_tensors(optimizer, network, groups["optimizer"])
    if average is not None:
        average.load(groups["ema"])


def network_config(network: nn.Module) -> AnyNetworkConfig | None:
    """Give a network's configuration, if it has one."""
    config = getattr(network, "config", None)
    return config if isinstance(config, AnyNetworkConfig) else None


def run_identity(
    network: nn.Module, config: TrainConfig, plan_hash: str, split_hash: str
) -> JsonDict:
    """Tell which run this is, in the plain values that JSON gives back.

    Args:
        network: The network.
        config: How it is trained.
        plan_hash: What the data went through.
        split_hash: Which cases train and validate.

    Returns:
        `config`, `network` (None if it has no configuration), `plan_hash` and
        `split_hash`.
    """
    built = network_config(network)
    identity = {
        "config": to_dict(config),
        "network": None if built is None else dataclasses.asdict(built),
        "plan_hash": plan_hash,
        "split_hash": split_hash,
    }
    return json.loads(json.dumps(identity))
