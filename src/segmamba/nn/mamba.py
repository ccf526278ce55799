"""The tri-orientated Mamba (ToM) layer: a volume's tokens scanned in several orders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segmamba.errors import GeometryError, describe
from segmamba.nn.blocks import TokenMlp, gated_spatial_convolution
from segmamba.nn.layout import tokens_to_volume, volume_to_tokens
from segmamba.ops import mamba_mixer, token_norm
from segmamba.types import Size3

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 0.1, 1e-4
"""Range of the step size at the start, and its lowest value."""


class ScanDirection(nn.Module):
    """The parameters of one scan direction.

    Args:
        d_inner: Channels E of the scan.
        d_state: States N of each channel.
        d_conv: Width W of the causal convolution.
        dt_rank: Rank r of the step-size projection.
        proper_steps: Start the step-size bias so that steps lie in 0.001 to 0.1;
            otherwise leave torch's default, as the published code does for all
            directions but the first.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        *,
        proper_steps: bool,
    ) -> None:
        super().__init__()
        self.proper_steps = proper_steps
        self.conv_weight = nn.Parameter(torch.empty(d_inner, 1, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj_weight = nn.Parameter(torch.empty(dt_rank + 2 * d_state, d_inner))
        self.dt_proj_weight = nn.Parameter(torch.empty(d_inner, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew.

        Source: Mamba (arXiv 2312.00752) for A, D and the step sizes; torch's defaults
        for the rest.
        """
        for parameter, fan_in in (
            (self.conv_weight, self.conv_weight.shape[-1]),
            (self.conv_bias, self.conv_weight.shape[-1]),
            (self.x_proj_weight, self.x_proj_weight.shape[1]),
            (self.dt_proj_weight, self.dt_proj_weight.shape[1]),
            (self.dt_proj_bias, self.dt_proj_weight.shape[1]),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        with torch.no_grad():
            d_state = self.A_log.shape[1]
            self.A_log.copy_(torch.arange(1, d_state + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)
            if self.proper_steps:
                self.dt_proj_bias.copy_(_step_bias(self.dt_proj_bias))


def _step_bias(like: Tensor) -> Tensor:
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    step = torch.exp(torch.rand_like(like) * (high - low) + low).clamp(min=STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))  # inverse of softplus


class TriOrientatedMamba(nn.Module):
    """ToM: one in and out projection around scans in several orders, summed.

    Args:
        d_model: Channels C of the tokens.
        orientations: Scan orders; see `segmamba.config.Orientation`.
        d_state: States of each channel.
        d_conv: Width of the causal convolution.
        expand: Inner channels over outer ones.
        num_slices: Slices of the inter-slice scan; None takes the map's depth.
        initialization: "balanced" or "published", as in NetworkConfig.
    """

    def __init__(
        self,
        d_model: int,
        orientations: Sequence[str] = ("forward", "reverse", "slice"),
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        num_slices: int | None = None,
        initialization: str = "balanced",
    ) -> None:
        super().__init__()
        self.orientations = tuple(orientations)
        self.num_slices = num_slices
        self.backend = "auto"
        d_inner, dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.directions = nn.ModuleList(
            ScanDirection(
                d_inner,
                d_state,
                d_conv,
                dt_rank,
                proper_steps=initialization == "balanced" or name == "forward",
            )
            for name in self.orientations
        )

    def forward(self, tokens: Tensor, size: Size3) -> Tensor:
        """Mix the tokens of a feature map.

        Args:
            tokens: (B, L, C), the row-major flattening of the map.
            size: (D, H, W) of the map, with D H W = L.

        Returns:
            Tokens, (B, L, C).

        Raises:
            GeometryError: A forced number of slices does not divide L.
        """
        orders = scan_orders(self.orientations, size, self.num_slices)
        return mamba_mixer(
            tokens,
            self.in_proj.weight,
            self.out_proj.weight,
            *self._parameters_by_kind(),
            orders=orders,
            backend=self.backend,
        )

    def _parameters_by_kind(self) -> list[list[Tensor]]:
        kinds = (
            "conv_weight",
            "conv_bias",
            "x_proj_weight",
            "dt_proj_weight",
            "dt_proj_bias",
            "A_log",
            "D",
        )
        return [
            [getattr(direction, kind) for direction in self.directions]
            for kind in kinds
        ]


def scan_orders(
    orientations: Sequence[str], size: Size3, num_slices: int | None = None
) -> list[tuple[int, bool]]:
    """Turn the names of scan orders into strides for a map of a given size.

    Position t of a scan with stride S over L tokens holds token
    (t mod S) (L / S) + floor(t / S).

    Args:
        orientations: Names; see `segmamba.config.Orientation`.
        size: (D, H, W) of the map.
        num_slices: Stride of the inter-slice scan; None takes D.

    Returns:
        One (stride, reverse) for each orientation.

    Raises:
        GeometryError: A stride does not divide L.
    """
    depth, height, width = size
    strides = {
        "forward": 1,
        "slice": depth if num_slices is None else num_slices,
        "column": depth * height,
    }
    orders = []
    for name in orientations:
        reverse = name.endswith("reverse")
        axis = name.removesuffix("reverse").rstrip("-") or "forward"
        orders.append((strides[axis], reverse))
    length = depth * height * width
    if any(length % stride for stride, _ in orders):
        raise GeometryError(
            describe(
                f"a number of slices must divide the {length} tokens of its stage",
                expected=f"a divisor of {length}, such as {depth}",
                found=num_slices,
                remedy="Leave num_slices out to read it off the feature map.",
            )
        )
    return orders


class MambaLayer(nn.Module):
    """A Mamba layer on a feature map: x + ToM(LN(x)), then perhaps x + MLP(LN(x)).

    Args:
        channels: Channels of the map.
        mixer: The ToM, or what takes its place: from tokens and size to tokens.
        mlp: Whether the perceptron, with four times the channels inside, is there.
        gsc: Gated spatial convolution in front: "add", "mul", "paper" or "none".
    """

    def __init__(
        self,
        channels: int,
        mixer: nn.Module,
        *,
        mlp: bool = False,
        gsc: str = "none",
    ) -> None:
        super().__init__()
        self.gsc = gated_spatial_convolution(gsc, channels)
        self.norm = nn.LayerNorm(channels)
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(channels) if mlp else None
        self.mlp = TokenMlp(channels) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape."""
        x = self.gsc(x)
        size = (x.shape[2], x.shape[3], x.shape[4])
        tokens = volume_to_tokens(x)
        tokens = tokens + self.mixer(_norm(self.norm, tokens), size)
        if self.mlp is not None and self.mlp_norm is not None:
            tokens = tokens + self.mlp(_norm(self.mlp_norm, tokens))
        return tokens_to_volume(tokens, size)


def _norm(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    return token_norm(tokens, norm.weight, norm.bias, norm.eps)
