"""The convolution blocks of the networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmamba.nn.folding import folded_convolution
from segmamba.ops import conv3d, instance_norm
from segmamba.ops.convolution3d import convolves_parts
from segmamba.ops.remade import norm_conv3d, norm_project, project_voxels, remakes
from segmamba.types import Size3

FOLDED_CHANNELS = 8
"""Up to how many channels of an image GPUs fold a stem's stride into channels."""


class Convolution(nn.Conv3d):
    """A convolution of 3x3x3 voxels, without stride and bias.

    Args:
        in_channels: Channels of the input, or of both.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, C, D, H, W), and perhaps (B, C', D, H, W), to (B, O, D, H, W)."""
        return conv3d(input, self.weight, other)


class Projection(nn.Conv3d):
    """A convolution of single voxels, without bias.

    Args:
        in_channels: Channels of the input, or of both.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, C, D, H, W), and perhaps (B, C', D, H, W), to (B, O, D, H, W)."""
        return project_voxels(input, self.weight, other)


class VoidBiasConvolution(nn.Conv3d):
    """A convolution in front of an instance norm, which would take the bias out again.

    The bias exists because published weights hold it. It isn't used, and it gets no
    gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, d, h, w)."""
        if self.kernel_size == (3, 3, 3):
            return conv3d(input, self.weight)
        return self._conv_forward(input, self.weight, None)


class FloatOnCpuConvolution(nn.Conv3d):
    """A convolution that stays in the weight's type on a CPU, whatever the autocast.

    Torch 2.13's bfloat16 convolutions read leftover memory there where the map is
    smaller than a kernel of 7: weight gradients that are wrong or not numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, d, h, w)."""
        if input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions around a shortcut, as MONAI's UnetrBasicBlock.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        project: Give the shortcut a 1x1x1 convolution even if the channels are equal.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, project: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = Convolution(in_channels, out_channels)
        self.conv2 = Convolution(out_channels, out_channels)
        self.conv3 = None
        if project or in_channels != out_channels:
            self.conv3 = Projection(in_channels, out_channels)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, D, H, W).

        Args:
            x: Features.
            other: Features whose channels follow x's; not where the shortcut is x.
        """
        y = _convolve_normed(self.conv2, self.conv1(x, other), "leaky_relu")
        if self.conv3 is None:
            return instance_norm(y, activation="leaky_relu", residual=x)
        weight = self.conv3.weight
        if remakes(y, weight):
            return norm_project(y, x, weight, other, activation="leaky_relu")
        shortcut, join = self.conv3(x, other), "normed"
        if not x.is_cuda:  # one map less in memory, for no more time
            shortcut, join = instance_norm(shortcut), "before"
        return instance_norm(y, activation="leaky_relu", residual=shortcut, join=join)


def _convolve_normed(convolution: nn.Conv3d, x: Tensor, activation: str) -> Tensor:
    """Norm, activate, then convolve with a kernel of 3x3x3."""
    if remakes(x, convolution.weight):
        return norm_conv3d(x, convolution.weight, activation=activation)
    return convolution(instance_norm(x, activation=activation))


class ConvolutionBlock(nn.Module):
    """A 3x3x3 convolution, instance norm and leaky ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Convolution(in_channels, out_channels)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, D, H, W).

        Args:
            x: Features.
            other: Features whose channels follow x's.
        """
        return instance_norm(self.conv(x, other), activation="leaky_relu")


class UpBlock(nn.Module):
    """Up-sample, join the skip, convolve, as MONAI's UnetrUpBlock.

    Args:
        in_channels: Channels from below.
        out_channels: Channels of the skip and of the output.
        stride: Up-sampling along (D, H, W).
        block: "residual" for a residual block, "conv" for one convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Size3 = (2, 2, 2),
        block: str = "residual",
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(
            in_channels, out_channels, stride, stride, bias=False
        )
        if block == "residual":
            self.block: ResidualBlock | ConvolutionBlock = ResidualBlock(
                2 * out_channels, out_channels
            )
        else:
            self.block = ConvolutionBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join x (B, in_channels, d, h, w) to skip (B, out_channels, D, H, W).

        Args:
            x: Features from below.
            skip: Features of the encoder, stride times as large.

        Returns:
            Features, (B, out_channels, D, H, W).
        """
        up = self.up(x)
        if convolves_parts(up, self._first_kernel(), skip):
            return self.block(up, skip)
        return self.block(torch.cat((up, skip), dim=1))

    def _first_kernel(self) -> Tensor:
        if isinstance(self.block, ResidualBlock):
            return self.block.conv1.weight
        return self.block.conv.weight


class GatedSpatialConvolution(nn.Module):
    """GSC of the published code: x + unit1(unit3(unit3(x)) + unit1(x)).

    A unit is convolution, instance norm, ReLU.

    Args:
        channels: Channels of input and output.
        product: Multiply the two branches, as the code did in March 2024.
    """

    def __init__(self, channels: int, *, product: bool = False) -> None:
        super().__init__()
        self.product = product
        self.spatial1 = VoidBiasConvolution(channels, channels, 3, padding=1)
        self.spatial2 = VoidBiasConvolution(channels, channels, 3, padding=1)
        self.gate = VoidBiasConvolution(channels, channels, 1)
        self.fuse = VoidBiasConvolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape."""
        y = _convolve_normed(self.spatial2, self.spatial1(x), "relu")
        spatial = instance_norm(y, activation="relu")
        if self.product:
            joined = spatial * _unit(self.gate, x)
        else:
            joined = _unit(self.gate, x, added=spatial)
        return _unit(self.fuse, joined, added=x)


def _unit(convolution: nn.Conv3d, x: Tensor, added: Tensor | None = None) -> Tensor:
    """Convolve, norm, ReLU, then add."""
    y = convolution(x)
    return instance_norm(y, activation="relu", residual=added, join="after")


class PaperGatedSpatialConvolution(nn.Module):
    """GSC of the paper's text: x + C3(C3(x) * C1(x)).

    C is instance norm, convolution, ReLU; 3 and 1 are kernel sizes.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(channels, channels, 3, padding=1)
        self.gate = nn.Conv3d(channels, channels, 1)
        self.fuse = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape."""
        normed = instance_norm(x)
        product = F.relu(self.spatial(normed)) * F.relu(self.gate(normed))
        return F.relu(self.fuse(instance_norm(product))) + x


def gated_spatial_convolution(kind: str, channels: int) -> nn.Module:
    """Build the gated spatial convolution that a configuration names.

    Args:
        kind: "add", "mul", "paper" or "none".
        channels: Channels of input and output.

    Returns:
        A module from (B, C, D, H, W) to the same shape.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "paper":
        return PaperGatedSpatialConvolution(channels)
    return GatedSpatialConvolution(channels, product=kind == "mul")


class ChannelMlp(nn.Module):
    """Two 1x1x1 convolutions around a GELU.

    Args:
        channels: Channels of input and output.
        ratio: Inner channels over outer ones.
    """

    def __init__(self, channels: int, ratio: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(channels, ratio * channels, 1)
        self.fc2 = nn.Conv3d(ratio * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class TokenMlp(nn.Module):
    """Two linear layers around a GELU.

    Args:
        channels: Channels of input and output.
        ratio: Inner channels over outer ones.
    """

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, C) to the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Downsampling(nn.Module):
    """A convolution whose kernel is its stride, with an instance norm before it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Down-sampling along (D, H, W).
        norm: Whether the instance norm is there.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: Size3, *, norm: bool
    ) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv3d(in_channels, out_channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, d, h, w)."""
        return self.conv(instance_norm(x) if self.norm else x)


class Stem(nn.Module):
    """The large convolution that the encoder starts with.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the first stage.
        stride: Down-sampling along (D, H, W).
        kernel: Odd kernel size.
        depthwise: Split the channels into as many groups as both counts allow: one
            group a channel where out_channels is a multiple of in_channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Size3,
        *,
        kernel: int = 7,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        groups = math.gcd(in_channels, out_channels) if depthwise else 1
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups
        )
        few = in_channels <= FOLDED_CHANNELS and groups == 1
        self.folds = few and max(stride) > 1

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to (B, out_channels, d, h, w)."""
        if not (self.folds and x.is_cuda):
            return self.conv(x)
        weight, bias, stride = self.conv.weight, self.conv.bias, self.conv.stride
        return folded_convolution(x, weight, bias, stride)


def feature_uncertainty(z: Tensor) -> Tensor:
    """Scale features by their certainty: z + z (1 - u), u = -m log m.

    m is the sigmoid of the mean over channels. Source: FUE of arXiv 2401.13560 v4.

    Args:
        z: Features, (B, C, D, H, W).

    Returns:
        Features of the same shape, scaled by 1.63 to 2.
    """
    mean = z.mean(dim=1, keepdim=True)
    entropy = -torch.sigmoid(mean) * F.logsigmoid(mean)
    return z * (2 - entropy)
