"""The plan: every decision between a scan and the network, in one readable file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from segmamba.config import NetworkConfig
from segmamba.types import Size3, Spacing3


@dataclass(frozen=True)
class ChannelNormalization:
    """How one channel's intensities are brought to a common scale."""

    scheme: Literal["ct", "zscore", "zscore-nonzero", "none"]
    """ct: clip to the foreground's percentiles of the training set, then its mean and
    deviation; zscore: over the image; zscore-nonzero: over its non-zero voxels, the
    others become 0."""
    clip: tuple[float, float] | None = None
    """Lower and upper bound (ct)."""
    mean: float | None = None
    """Mean to subtract (ct)."""
    std: float | None = None
    """Standard deviation to divide by (ct)."""


@dataclass(frozen=True)
class Plan:
    """Every decision between a scan and the network. Axes are (D, H, W)."""

    orientation: str
    """Three axis codes such as "SPL": where each of D, H, W points to."""
    spacing_mm: Spacing3
    """Voxel distance of the network's input along (D, H, W)."""
    patch_size: Size3
    """Voxels of a training patch and of a prediction window along (D, H, W)."""
    batch_size: int
    """Patches in a training batch."""
    normalization: tuple[ChannelNormalization, ...]
    """One for each channel."""
    network: NetworkConfig
    """What to build."""
    resampling: Literal["linear", "cubic"] = "linear"
    """Interpolation of images; labels and logits are always linear."""
    crop_to_nonzero: bool = True
    """Crop to the bounding box of the voxels that aren't zero in every channel."""
    memory_training_mib: float | None = None
    """Estimated peak memory of a training step."""
    memory_prediction_mib: float | None = None
    """Estimated peak memory of a window's forward pass."""
