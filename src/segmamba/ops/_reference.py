"""The operators as plain loops: the truth that every back end is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scan_reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one step at a time.

    Args:
        u: Input, (batch, L, E).
        dt: Step sizes after softplus, (batch, L, E).
        A: Decay rates, (E, N).
        B: Input matrix, (batch, L, G, N), or constant (E, N).
        C: Output matrix, (batch, L, G, N), or constant (E, N).

    Returns:
        y (batch, L, E) without skip or gate, and the last state (batch, E, N).

    Source:
        Gu and Dao, arXiv 2312.00752, with B discretised by Euler's rule.
    """
    state = u.new_zeros(u.shape[0], *A.shape)
    rows = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        drive = (dt[:, t] * u[:, t])[..., None]
        state = decay * state + drive * _per_channel(B, t, A.shape[0])
        rows.append((state * _per_channel(C, t, A.shape[0])).sum(-1))
    y = torch.stack(rows, 1) if rows else torch.zeros_like(u)
    return y, state


def _per_channel(matrix: Tensor, t: int, channels: int) -> Tensor:
    if matrix.ndim == 2:
        return matrix
    return matrix[:, t].repeat_interleave(channels // matrix.shape[2], dim=1)


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve each channel causally, as a sum of shifted copies.

    Args:
        x: Input, (batch, L, E).
        weight: Taps, (E, W); the last tap meets the present row.
        bias: (E) or None.

    Returns:
        (batch, L, E), rows before the first counted as zeros.
    """
    length, width = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    total = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(width):
        total = total + padded[:, k : k + length] * weight[:, k]
    return total
