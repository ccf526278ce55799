"""How many multiply-adds a forward pass takes, the scan included."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segmamba.nn.mamba import ScanDirection, TriOrientatedMamba
from segmamba.types import Size3


def multiply_adds(network: nn.Module, shape: Sequence[int]) -> int:
    """Count the multiply-adds of a network's forward pass, without doing it.

    Convolutions, matrix products and attention are counted by torch's FlopCounterMode
    (halved, for it counts two operations a multiply-add), the scan by
    `scan_multiply_adds`. Norms, activations, exponentials and sums are left out, as
    is usual.

    Args:
        network: Any module; it stays as it is.
        shape: (B, C, D, H, W) of the image. What a network pads is counted.

    Returns:
        Multiply-adds, in evaluation mode.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    twin = _without_contents(network).eval()
    scans = [_replace_scan(twin, name) for name in _scan_names(twin)]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() // 2 + sum(scan.count for scan in scans)


def scan_multiply_adds(mixer: TriOrientatedMamba, tokens: int) -> int:
    """Count what lies between the input and the output projection of a ToM.

    For each direction, token and inner channel: W for the causal convolution, r + 2N
    and r for the projections to and of the step size, B and C; in the scan, for each
    of the N states, one each for dt A, for dt u B, for the decay of the state and for
    the output C s; and two for dt u and D u. At the end one to gate the sum.

    Args:
        mixer: The layer.
        tokens: Tokens of all images together.

    Returns:
        Multiply-adds.
    """
    channel = 1
    for direction in mixer.directions:
        assert isinstance(direction, ScanDirection)
        states, taps = direction.A_log.shape[1], direction.conv_weight.shape[-1]
        rank = direction.dt_proj_weight.shape[1]
        channel += taps + (rank + 2 * states) + rank + 4 * states + 2
    return tokens * mixer.out_proj.in_features * channel


class _CountedScan(nn.Module):
    """Stands for a ToM: its projections, and a number in the place of the scan."""

    def __init__(self, mixer: TriOrientatedMamba) -> None:
        super().__init__()
        self.mixer = mixer
        self.count = 0

    def forward(self, tokens: Tensor, size: Size3) -> Tensor:
        """Count, and give tokens of the right shape."""
        batch, length, _ = tokens.shape
        self.count += scan_multiply_adds(self.mixer, batch * length)
        scanned, _ = self.mixer.in_proj(tokens).chunk(2, dim=-1)
        return self.mixer.out_proj(scanned)


def _scan_names(network: nn.Module) -> list[str]:
    modules = network.named_modules()
    return [name for name, item in modules if isinstance(item, TriOrientatedMamba)]


def _replace_scan(network: nn.Module, name: str) -> _CountedScan:
    parent, _, child = name.rpartition(".")
    mixer = network.get_submodule(name)
    assert isinstance(mixer, TriOrientatedMamba)
    counted = _CountedScan(mixer)
    setattr(network.get_submodule(parent), child, counted)
    return counted


def _without_contents(network: nn.Module) -> nn.Module:
    """Copy a network onto the meta device without copying its weights."""
    twins: dict[int, object] = {}
    for parameter in network.parameters():
        empty = torch.empty_like(parameter, device="meta")
        twins[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in network.buffers():
        twins[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, twins)
