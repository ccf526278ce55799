"""3D UX-Net: a convolutional encoder shaped like a Swin Transformer, own code."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from segmamba.config import PeerConfig
from segmamba.nn.blocks import FloatOnCpuConvolution, ResidualBlock, UpBlock
from segmamba.types import Size3

KERNEL = 7
"""Side of the stem's and the blocks' kernels, in voxels."""


class UXNet(nn.Module):
    """3D UX-Net with the residual blocks and the decoder of SwinUNETR and UNETR.

    Args:
        config: A complete configuration.

    Source:
        Lee et al., 3D UX-Net, arXiv 2209.15076.
    """

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        assert config.dims is not None
        dims, depths = config.dims, config.depths or ()
        strides = config.strides or ()
        widths = (*dims, config.hidden_size or 0)
        before = (config.in_channels, *dims)
        self.stages = nn.ModuleList(
            UXStage(before[index], dims[index], stride, depth, first=index == 0)
            for index, (stride, depth) in enumerate(zip(strides, depths, strict=True))
        )
        self.skips = nn.ModuleList(
            ResidualBlock(narrow, wide)
            for narrow, wide in zip(before, widths, strict=True)
        )
        self.decoder = nn.ModuleList(
            UpBlock(widths[level + 1], widths[level], stride)
            for level, stride in enumerate(strides)
        )
        self.final_block = ResidualBlock(dims[0], dims[0])
        self.head = nn.Conv3d(dims[0], config.out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, in_channels, D, H, W) to logits (B, out_channels, D, H, W)."""
        skips, x = [self.skips[0](image)], image
        for stage, skip in zip(self.stages, list(self.skips)[1:], strict=True):
            x, output = stage(x)
            skips.append(skip(output))
        x = skips.pop()
        for up, skip in zip(reversed(self.decoder), reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(self.final_block(x))


class UXStage(nn.Module):
    """Down-sample, then mix with large kernels.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the stage.
        stride: Down-sampling along (D, H, W).
        depth: Blocks.
        first: Whether the input is the image, which gets the large stem.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: Size3,
        depth: int,
        *,
        first: bool,
    ) -> None:
        super().__init__()
        if first:
            down: nn.Module = nn.Conv3d(
                in_channels, channels, KERNEL, stride, KERNEL // 2
            )
            self.down = nn.Sequential(down)
        else:
            down = nn.Conv3d(in_channels, channels, stride, stride)
            self.down = nn.Sequential(ChannelNorm(in_channels), down)
        self.blocks = nn.Sequential(*(UXBlock(channels) for _ in range(depth)))
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give features for the next stage and normalised ones for the skip."""
        x = self.blocks(self.down(x))
        return x, self.norm(x)


class UXBlock(nn.Module):
    """x + DWC(LN(x)), then x + DCS(LN(x)).

    DWC is a depth-wise 7x7x7 convolution, which stands for window attention. DCS
    scales each channel up to four, GELU, and down again, without mixing channels; it
    stands for the perceptron.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.spatial = FloatOnCpuConvolution(
            channels, channels, KERNEL, padding=KERNEL // 2, groups=channels
        )
        self.norm2 = ChannelNorm(channels)
        self.widen = nn.Conv3d(channels, 4 * channels, 1, groups=channels)
        self.narrow = nn.Conv3d(4 * channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape."""
        x = x + self.spatial(self.norm1(x))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each voxel.

    Args:
        channels: Channels of input and output.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
