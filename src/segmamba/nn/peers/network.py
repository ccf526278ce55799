"""One way in and out for every peer: any size, logits, a list in training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from segmamba.config import PeerConfig
from segmamba.errors import GeometryError, describe
from segmamba.nn.blocks import pad_to_multiple
from segmamba.nn.segmamba import padded_size
from segmamba.types import Size3


class PeerNetwork(nn.Module):
    """A network that is given what it can take, and whose logits are cropped back.

    Args:
        config: A complete configuration.
        body: From (B, in_channels, D, H, W), multiples of the strides, to logits of
            the same size, or a sequence of logits with the full resolution first.
    """

    def __init__(self, config: PeerConfig, body: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.body = body

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Compute logits.

        Args:
            image: (B, in_channels, D, H, W), any sides; with a `patch_size` none
                longer than that.

        Returns:
            Logits, (B, out_channels, D, H, W). With deep supervision and in training,
            a list of them: full resolution first, then ever lower ones, of
            ceil(side / stride) voxels.

        Raises:
            GeometryError: The image has the wrong number of axes or channels, or is
                larger than the size that the network was built for.
        """
        self._check_input(image)
        size = (image.shape[2], image.shape[3], image.shape[4])
        outputs = self.body(pad_to_multiple(image, self._padded(size)))
        if isinstance(outputs, Tensor):
            return crop(outputs, size)
        if not (self.training and self.config.deep_supervision):
            return crop(outputs[0], size)
        return crop_levels(outputs, size, self.config.strides or ())

    def _padded(self, size: Size3) -> Size3:
        if self.config.patch_size is not None:
            return self.config.patch_size
        return padded_size(size, list(self.config.strides or ()))

    def _check_input(self, image: Tensor) -> None:
        channels = self.config.in_channels
        if image.dim() != 5 or image.shape[1] != channels:
            raise GeometryError(
                describe(
                    "a network takes a batch of volumes",
                    expected=f"(B, {channels}, D, H, W)",
                    found=tuple(image.shape),
                )
            )
        limit = self.config.patch_size
        sides = image.shape[2:]
        if limit and any(n > most for n, most in zip(sides, limit, strict=True)):
            raise GeometryError(
                describe(
                    f"{self.config.name} is built for images of one size",
                    expected=f"{limit} or smaller, which is padded",
                    found=tuple(sides),
                    remedy="Predict in windows of that size, as 'segmamba predict' "
                    "does, or build it with another patch_size.",
                )
            )


def crop(x: Tensor, size: Size3) -> Tensor:
    """Keep the first (D, H, W) = `size` voxels of (B, C, D', H', W')."""
    depth, height, width = size
    return x[:, :, :depth, :height, :width]


def crop_levels(
    outputs: Sequence[Tensor], size: Size3, strides: Sequence[Size3]
) -> list[Tensor]:
    """Crop logits of each resolution to what the image covers there.

    Args:
        outputs: Logits, full resolution first.
        size: (D, H, W) of the image.
        strides: From each resolution to the next.

    Returns:
        Logits of ceil(side / stride) voxels.
    """
    cropped = [crop(outputs[0], size)]
    for output, stride in zip(outputs[1:], strides, strict=False):
        depth, height, width = (
            -(-side // step) for side, step in zip(size, stride, strict=True)
        )
        size = (depth, height, width)
        cropped.append(crop(output, size))
    return cropped
