"""The optimiser, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from segmamba.config import TrainConfig
from segmamba.errors import CheckpointError, describe


def build_optimizer(network: nn.Module, config: TrainConfig) -> Optimizer:
    """Build the optimiser of a configuration.

    Args:
        network: Its parameters that require gradients are optimised.
        config: Holds the name, the rate, the momentum and the weight decay.

    Returns:
        SGD with Nesterov momentum and decay on every parameter, as published; or
        AdamW with decay on matrices and kernels only (not on vectors, nor on what is
        marked `_no_weight_decay`, such as the scans' A). On a GPU all of a step is one
        launch.
    """
    parameters = [item for item in network.parameters() if item.requires_grad]
    fused = all(item.is_cuda for item in parameters) or None
    if config.optimizer == "sgd":
        return SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    free = [item for item in parameters if not _decays(item)]
    groups = [
        {"params": [item for item in parameters if _decays(item)]},
        {"params": free, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(optimizer: Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Name the optimiser's state after the parameters it belongs to.

    Args:
        optimizer: Of the parameters of `network`.
        network: Gives the names.

    Returns:
        `"<parameter>.<state>"` (such as `"stem.weight.momentum_buffer"`) to tensor.
    """
    tensors = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{name}.{key}"] = torch.as_tensor(value)
    return tensors


def load_optimizer_tensors(
    optimizer: Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: A tensor belongs to no parameter of the network.
    """
    parameters = dict(network.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(
                describe("the optimiser's state does not fit", found=full_name)
            )
        state = optimizer.state[parameters[name]]
        state[key] = _placed(tensor, key, parameters[name], optimizer)


def _placed(
    tensor: Tensor, key: str, parameter: Tensor, optimizer: Optimizer
) -> Tensor:
    """Copy a state to where, and with the strides that, the optimiser wants it."""
    if key == "step":  # Adam counts on the CPU, unless a step is one launch on a GPU
        fused = optimizer.defaults.get("fused")
        return tensor.to(parameter.device if fused else "cpu", copy=True)
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            describe(
                "the optimiser's state does not fit",
                expected=tuple(parameter.shape),
                found=tuple(tensor.shape),
            )
        )
    return torch.empty_like(parameter).copy_(tensor)


def _decays(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)
