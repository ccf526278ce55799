"""How volumes, tokens and kernels lie in memory.

Torch knows the layout of a tensor by its strides, also by those of axes of length one:
views of a single case easily end up with strides that its convolutions don't take for
channels-last. What comes out of here has the strides that a fresh tensor would have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segmamba.types import Size3


def wants_channels_last(tensor: Tensor) -> bool:
    """Say whether convolutions are fastest in channels-last where a tensor is."""
    return tensor.is_cuda


def channels_last(x: Tensor) -> Tensor:
    """Lay a batch of volumes out as (B, D, H, W, C); copied only if it isn't so yet.

    Args:
        x: (B, C, D, H, W).

    Returns:
        The same values and shape.
    """
    batch, channels, *size = x.shape
    flat = x.permute(0, 2, 3, 4, 1).contiguous().view(-1)
    return flat.view(batch, *size, channels).permute(0, 4, 1, 2, 3)


def volume_to_tokens(x: Tensor) -> Tensor:
    """Flatten (B, C, D, H, W) to contiguous tokens, (B, D H W, C)."""
    batch, channels = x.shape[:2]
    return x.permute(0, 2, 3, 4, 1).contiguous().view(batch, -1, channels)


def tokens_to_volume(tokens: Tensor, size: Size3) -> Tensor:
    """View contiguous tokens, (B, D H W, C), as a channels-last (B, C, D, H, W)."""
    batch, _, channels = tokens.shape
    return tokens.reshape(batch, *size, channels).permute(0, 4, 1, 2, 3)


def arrange_kernels(network: nn.Module, *, channels_last: bool) -> None:
    """Lay the convolutions' kernels out anew; their values stay, and so do names.

    Args:
        network: Any module.
        channels_last: Channels-last, or torch's default.
    """
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    for parameter in network.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
