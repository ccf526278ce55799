"""One way in and out for every peer: any size, logits, a list in training."""

from __future__ import annotations

from torch import Tensor, nn

from segmamba.config import PeerConfig
from segmamba.errors import GeometryError, describe
from segmamba.nn.framing import (
    crop,
    crop_levels,
    image_size,
    pad_to_size,
    padded_size,
)
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
        size = image_size(image, self.config.in_channels)
        self._check_size(size)
        outputs = self.body(pad_to_size(image, self._padded(size)))
        if isinstance(outputs, Tensor):
            return crop(outputs, size)
        if not (self.training and self.config.deep_supervision):
            return crop(outputs[0], size)
        return crop_levels(outputs, size, self.config.strides or ())

    def _padded(self, size: Size3) -> Size3:
        if self.config.patch_size is not None:
            return self.config.patch_size
        return padded_size(size, list(self.config.strides or ()))

    def _check_size(self, size: Size3) -> None:
        limit = self.config.patch_size
        if limit and any(n > most for n, most in zip(size, limit, strict=True)):
            raise GeometryError(
                describe(
                    f"{self.config.name} is built for images of one size",
                    expected=f"{limit} or smaller, which is padded",
                    found=size,
                    remedy="Predict in windows of that size, as 'segmamba predict' "
                    "does, or build it with another patch_size.",
                )
            )
