"""Row orders: in which order a scan walks the tokens of a volume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segmamba.errors import GeometryError, describe

Order = tuple[int, bool]
"""(stride S, reverse): see `scan_order`."""


def scan_order(length: int, order: Order, device: torch.device | None = None) -> Tensor:
    """List the tokens in the order in which a scan meets them.

    Args:
        length: Number of tokens L.
        order: (S, reverse). Position t holds token (t mod S) * (L / S) + t // S; with
            reverse it holds the one of position L - 1 - t. S = 1 is the plain order.
        device: Where to make the result.

    Returns:
        (L) int64: the token at each position.
    """
    stride, reverse = order
    tokens = torch.arange(length, device=device)
    tokens = tokens.view(stride, length // stride).T.reshape(-1)
    return tokens.flip(0) if reverse else tokens


def check_orders(length: int, orders: Sequence[Order]) -> None:
    """Refuse strides that don't divide the length.

    Args:
        length: Number of tokens L.
        orders: (stride, reverse) pairs.

    Raises:
        GeometryError: A stride is below 1 or does not divide L.
    """
    for stride, _ in orders:
        if stride < 1 or length % stride:
            raise GeometryError(
                describe(
                    "the stride of a scan order must divide the number of tokens",
                    expected=f"a divisor of {length}",
                    found=stride,
                )
            )
