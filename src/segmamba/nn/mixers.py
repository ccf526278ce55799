"""What may stand in the place of the tri-orientated Mamba, to be compared with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmamba.nn.blocks import FloatOnCpuConvolution
from segmamba.nn.layout import tokens_to_volume, volume_to_tokens
from segmamba.types import Size3

WINDOW = 7
"""Side of an attention window and of the large kernel, in voxels of the map."""
HEAD_CHANNELS = 16
"""Channels of an attention head, as SwinUNETR has."""


def build_mixer(kind: str, channels: int, layer: int) -> nn.Module:
    """Build a mixer by name.

    Args:
        kind: "large-kernel", "window-attention" or "self-attention".
        channels: Channels C of the tokens.
        layer: Number of the layer in its stage; odd ones shift their windows.

    Returns:
        A module from tokens (B, L, C) and the map's size to tokens (B, L, C).
    """
    if kind == "large-kernel":
        return LargeKernelConvolution(channels)
    if kind == "window-attention":
        return WindowAttention(channels, shift=WINDOW // 2 if layer % 2 else 0)
    return SelfAttention(channels)


class LargeKernelConvolution(nn.Module):
    """A depth-wise convolution, then a linear layer that mixes the channels.

    Args:
        channels: Channels C of the tokens.
        kernel: Odd kernel size.

    Source:
        The depth-wise 7x7x7 convolution of 3D UX-Net, arXiv 2209.15076.
    """

    def __init__(self, channels: int, kernel: int = WINDOW) -> None:
        super().__init__()
        self.conv = FloatOnCpuConvolution(
            channels, channels, kernel, padding=kernel // 2, groups=channels
        )
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, size: Size3) -> Tensor:
        """Mix tokens (B, L, C) of a map of (D, H, W) = `size`."""
        x = self.conv(tokens_to_volume(tokens, size))
        return self.out_proj(volume_to_tokens(x))


class SelfAttention(nn.Module):
    """Attention among all tokens of the map.

    The weights are never stored where torch has a fused kernel; time grows with the
    square of the number of tokens in any case.

    Args:
        channels: Channels C of the tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = attention_heads(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, size: Size3) -> Tensor:
        """Mix tokens (B, L, C); their places in the map don't count."""
        query, key, value = _split_heads(self.qkv(tokens), self.heads)
        return self.out_proj(_join_heads(_attend(query, key, value)))


class WindowAttention(nn.Module):
    """Attention inside windows, with a learnt bias for each relative position.

    Args:
        channels: Channels C of the tokens.
        shift: Voxels by which the windows are shifted along each axis; 0 for an axis
            that one window covers.
        window: Side of a window in voxels.

    Source:
        Swin Transformer, arXiv 2103.14030, in three dimensions as in SwinUNETR.
    """

    def __init__(self, channels: int, *, shift: int = 0, window: int = WINDOW) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.heads = attention_heads(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        self.position_bias = nn.Parameter(
            torch.empty(self.heads, *3 * (2 * window - 1,))
        )
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def forward(self, tokens: Tensor, size: Size3) -> Tensor:
        """Mix tokens (B, L, C) of a map of (D, H, W) = `size`."""
        sides, shifts = self._windows(size)
        padded = tuple(
            -(-n // side) * side for n, side in zip(size, sides, strict=True)
        )
        x = self.qkv(tokens).unflatten(1, size)
        extra = [p - n for p, n in zip(padded, size, strict=True)]
        x = F.pad(x, (0, 0, 0, extra[2], 0, extra[1], 0, extra[0]))
        x = torch.roll(x, [-step for step in shifts], (1, 2, 3))
        query, key, value = _split_heads(_partition(x, sides), self.heads)
        bias = self._bias(sides).to(query.dtype)
        if any(shifts) or any(extra):
            regions = _regions(size, padded, sides, shifts, tokens.device)
            apart = regions.unsqueeze(1) != regions.unsqueeze(2)  # (windows, N, N)
            bias = bias.masked_fill(apart.unsqueeze(1), float("-inf"))
        mixed = _join_heads(_attend(query, key, value, bias))
        x = torch.roll(_unpartition(mixed, padded, sides), shifts, (1, 2, 3))
        x = x[:, : size[0], : size[1], : size[2]].flatten(1, 3)
        return self.out_proj(x)

    def _windows(self, size: Size3) -> tuple[list[int], list[int]]:
        """Give the window's sides and shifts; small maps are one unshifted window."""
        sides = [min(n, self.window) for n in size]
        shifts = [self.shift if n > self.window else 0 for n in size]
        return sides, shifts

    def _bias(self, sides: list[int]) -> Tensor:
        """Look up the bias (heads, N, N) of each pair of places in a window."""
        offsets = [
            torch.arange(side, device=self.position_bias.device) for side in sides
        ]
        places = torch.cartesian_prod(*offsets)
        apart = places.unsqueeze(1) - places.unsqueeze(0) + self.window - 1
        depth, height, width = apart.unbind(-1)
        return self.position_bias[:, depth, height, width]


def attention_heads(channels: int) -> int:
    """Give the number of heads: 16 channels each, or the next more that divide evenly.

    Args:
        channels: Channels of the tokens.

    Returns:
        A divisor of `channels`.
    """
    heads = max(1, channels // HEAD_CHANNELS)
    while channels % heads:
        heads -= 1
    return heads


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(..., N, 3C) to three of (..., heads, N, C / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-2, -3).unbind()


def _join_heads(x: Tensor) -> Tensor:
    """(..., heads, N, C / heads) to (..., N, C)."""
    return x.transpose(-2, -3).flatten(-2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _partition(x: Tensor, sides: list[int]) -> Tensor:
    """(B, D, H, W, C) to (B, windows, N, C)."""
    for axis, side in zip((1, 3, 5), sides, strict=True):
        x = x.unflatten(axis, (-1, side))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def _unpartition(x: Tensor, padded: tuple[int, ...], sides: list[int]) -> Tensor:
    """(B, windows, N, C) to (B, D, H, W, C)."""
    counts = [n // side for n, side in zip(padded, sides, strict=True)]
    x = x.unflatten(2, sides).unflatten(1, counts)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _regions(
    size: Size3,
    padded: tuple[int, ...],
    sides: list[int],
    shifts: list[int],
    device: torch.device,
) -> Tensor:
    """Number the regions (windows, N) inside which tokens may look at each other.

    A shifted window at the border holds voxels of opposite ends of the map, and the
    last windows hold padding: none of these belong together.
    """
    labels = []
    for real, side, shift in zip(size, padded, shifts, strict=True):
        place = torch.arange(side, device=device)
        label = (place < shift).long() + 2 * (place >= real)
        labels.append(torch.roll(label, -shift))
    depth, height, width = labels
    number = (4 * depth.view(-1, 1, 1) + height.view(-1, 1)) * 4 + width
    return _partition(number[None, ..., None], sides)[0, ..., 0]
