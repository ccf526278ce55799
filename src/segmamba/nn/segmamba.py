"""The whole network, to be read from the top down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segmamba.config import NetworkConfig
from segmamba.nn.blocks import (
    ChannelMlp,
    Downsampling,
    ResidualBlock,
    Stem,
    UpBlock,
    feature_uncertainty,
    gated_spatial_convolution,
)
from segmamba.nn.framing import crop_levels, image_size, pad_to_size, padded_size
from segmamba.nn.layout import (
    arrange_kernels,
    channels_last,
    wants_channels_last,
)
from segmamba.nn.mamba import MambaLayer, TriOrientatedMamba
from segmamba.nn.mixers import build_mixer
from segmamba.ops import instance_norm
from segmamba.ops.norm import SLOPE
from segmamba.types import Size3


class SegMamba(nn.Module):
    """A U-shaped network with Mamba layers in its encoder.

    Level 0 is the image's own resolution; stage i of the encoder works on level i + 1.
    The image is padded to what the strides need, and the logits are cropped back.

    Args:
        config: A complete configuration, as `preset_config` gives it.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        widths, strides = level_channels(config), level_strides(config)
        self.first_block = ResidualBlock(config.in_channels, widths[0])
        self.stages = nn.ModuleList(
            EncoderStage(config, index) for index in range(len(config.dims))
        )
        self.skips = nn.ModuleList(
            _skip_block(config, before, after)
            for before, after in zip(config.dims, widths[1:-1], strict=False)
        )
        self.bottom = _bottom(config)
        self.decoder = nn.ModuleList(
            UpBlock(below, here, stride, config.decoder_block or "residual")
            for below, here, stride in zip(
                widths[1:], widths[:-1], strides, strict=True
            )
        )
        self.final_block = (
            ResidualBlock(widths[0], widths[0]) if config.final_block else nn.Identity()
        )
        self.head = nn.Conv3d(widths[0], config.out_channels, 1)
        self.lower_heads = nn.ModuleList(
            nn.Conv3d(width, config.out_channels, 1) for width in widths[1:-1]
        )
        if not config.deep_supervision:
            self.lower_heads = nn.ModuleList()
        if config.convolution_init == "he":
            self.apply(_he_initialization)
        self._suit_device()

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Compute logits.

        Args:
            image: (B, in_channels, D, H, W), any sides.

        Returns:
            Logits, (B, out_channels, D, H, W). With deep supervision and in training,
            a list of them: full resolution first, then ever lower ones, of
            ceil(side / stride) voxels.

        Raises:
            GeometryError: The image has the wrong number of axes or channels, or a
                forced number of slices does not fit its size.
        """
        size = image_size(image, self.config.in_channels)
        x = pad_to_size(image, padded_size(size, level_strides(self.config)))
        x = channels_last(x) if wants_channels_last(x) else x
        skips, x = self._encode(x)
        features = self._decode(skips, x)
        heads = (self.head, *self.lower_heads) if self.training else (self.head,)
        logits = [head(feature) for head, feature in zip(heads, features, strict=False)]
        cropped = crop_levels(logits, size, level_strides(self.config))
        return cropped if len(cropped) > 1 else cropped[0]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move or convert, as `to` and `cuda` do; kernels get the device's layout."""
        before = wants_channels_last(self.head.weight)
        super()._apply(fn, recurse)
        self._suit_device(before)
        return self

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load as any module does; tensors that are assigned get the layout too."""
        before = wants_channels_last(self.head.weight)
        answer = super().load_state_dict(*arguments, **options)
        self._suit_device(before)
        return answer

    def _suit_device(self, before: bool = False) -> None:
        """Lay kernels out as the device wants them, unless it never did want that."""
        after = wants_channels_last(self.head.weight)
        if before or after:
            arrange_kernels(self, channels_last=after)

    def _encode(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Give the skips of levels 0, 1, ... and the deepest features."""
        skips = [self._run(self.first_block, image)]
        x = skips[0] if self.config.stem == "serial" else image
        outputs = []
        for stage in self.stages:
            x, output = self._run(stage, x)
            outputs.append(output)
        for skip, output in zip(self.skips, outputs, strict=False):
            tapped = feature_uncertainty(output) if self.config.fue else output
            skips.append(self._run(skip, tapped))
        deepest = x if self.config.bottleneck == "down" else outputs[-1]
        return skips, self._run(self.bottom, deepest)

    def _decode(self, skips: list[Tensor], x: Tensor) -> list[Tensor]:
        """Give the decoder's features of levels 0, 1, ..."""
        features: list[Tensor] = []
        for level in reversed(range(len(skips))):
            x = self._run(self.decoder[level], x, skips[level])
            features.insert(0, x)
        features[0] = self._run(self.final_block, features[0])
        return features

    def _run(self, module: nn.Module, *inputs: Tensor) -> Any:
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(
                module, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        return module(*inputs)


class EncoderStage(nn.Module):
    """Down-sample, convolve, then mix the whole volume with Mamba layers.

    Args:
        config: A complete configuration.
        index: Which stage, 0 to len(dims) - 1.
    """

    def __init__(self, config: NetworkConfig, index: int) -> None:
        super().__init__()
        channels = config.dims[index]
        gsc = config.gsc or "none"
        self.down = _stage_entry(config, index)
        per_layer = bool(config.gsc_per_layer)
        self.gsc = gated_spatial_convolution("none" if per_layer else gsc, channels)
        blocks = config.conv_blocks[index] if config.conv_blocks else 0
        self.blocks = nn.Sequential(
            *(ResidualBlock(channels, channels) for _ in range(blocks))
        )
        self.layers = nn.Sequential(
            *(
                MambaLayer(
                    channels,
                    _mixer(config, index, layer),
                    mlp=config.mlp == "layer",
                    gsc=gsc if per_layer else "none",
                )
                for layer in range(config.depths[index])
            )
        )
        self.skip_mlp = ChannelMlp(channels) if config.mlp == "skip" else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the stage.

        Args:
            x: Features of the stage before, or the image, (B, C', D', H', W').

        Returns:
            Features for the next stage, and those for the skip, both (B, C, D, H, W).
        """
        x = self.layers(self.blocks(self.gsc(self.down(x))))
        if self.skip_mlp is None:
            return x, x
        return x, self.skip_mlp(instance_norm(x))


def level_channels(config: NetworkConfig) -> list[int]:
    """Give the decoder's channels of each level, full resolution first.

    The published decoder widens the skips: its level i has the channels of stage i,
    one stage deeper. With a bottleneck behind one more down-sampling, or with none,
    each level keeps the channels of its own stage.

    Args:
        config: A complete configuration.

    Returns:
        Channels of levels 0 to the deepest, whose last is the bottleneck.
    """
    base = config.base_channels or config.dims[0]
    if config.bottleneck == "block":
        return [base, *config.dims[1:], config.hidden_size]
    if config.bottleneck == "down":
        return [base, *config.dims, config.hidden_size]
    return [base, *config.dims]


def level_strides(config: NetworkConfig) -> list[Size3]:
    """Give the stride from each level to the next; a last down-sampling included."""
    extra = [config.strides[-1]] if config.bottleneck == "down" else []
    return [*config.strides, *extra]


def _stage_entry(config: NetworkConfig, index: int) -> nn.Module:
    stride, channels = config.strides[index], config.dims[index]
    norm = bool(config.down_norm)
    if index > 0:
        return Downsampling(config.dims[index - 1], channels, stride, norm=norm)
    if config.stem == "serial":
        return Downsampling(level_channels(config)[0], channels, stride, norm=norm)
    return Stem(
        config.in_channels,
        channels,
        stride,
        kernel=config.stem_kernel or 7,
        depthwise=config.stem == "depthwise",
    )


def _mixer(config: NetworkConfig, index: int, layer: int) -> nn.Module:
    if config.mixer != "tom":
        return build_mixer(config.mixer or "", config.dims[index], layer)
    return TriOrientatedMamba(
        config.dims[index],
        config.orientations or ("forward", "reverse", "slice"),
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.expand,
        num_slices=config.num_slices[index] if config.num_slices else None,
        initialization=config.initialization,
    )


def _skip_block(config: NetworkConfig, before: int, after: int) -> nn.Module:
    if config.skip_block == "identity" and before == after:
        return nn.Identity()
    return ResidualBlock(before, after)


def _bottom(config: NetworkConfig) -> nn.Module:
    last, hidden = config.dims[-1], config.hidden_size
    if config.bottleneck == "none":
        return nn.Identity()
    if config.bottleneck == "block":
        return ResidualBlock(last, hidden)
    down = Downsampling(last, hidden, config.strides[-1], norm=bool(config.down_norm))
    return nn.Sequential(down, ResidualBlock(hidden, hidden))


def _he_initialization(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
