"""Whatever is given as a scan, as a volume with the model's channels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from segmamba.errors import ConfigError, FormatError, GeometryError, describe
from segmamba.io import Volume, read_case
from segmamba.types import Array, FloatArray

Scan: TypeAlias = "Volume | str | Path | Sequence[str | Path] | Array | torch.Tensor"
"""A volume; a file; one file per channel; or voxels (C, I, J, K) or (I, J, K)."""

_log = logging.getLogger(__name__)


def open_scan(scan: Scan, affine: FloatArray | None, channels: Sequence[str]) -> Volume:
    """Read a scan, and see that it has a model's channels.

    Args:
        scan: A Volume; a file; one file per channel in the order of `channels`; or
            voxels (C, I, J, K) or (I, J, K).
        affine: For voxels: (4, 4), voxel index to RAS+ mm. Left out, axes are taken to
            run to the right, front and top at 1 mm, which is logged.
        channels: The model's.

    Returns:
        The volume.

    Raises:
        ConfigError: The number of channels isn't the model's.
        FormatError: A file is unreadable.
        GeometryError: Channels lie on different grids.
    """
    if not isinstance(scan, (Volume, str, Path, Sequence)):
        volume = _volume_of_voxels(scan, affine)
    elif affine is not None:
        raise ConfigError(
            describe("an affine is for voxels; a file or volume has its own")
        )
    else:
        volume = scan if isinstance(scan, Volume) else _read(scan, channels)
    if len(volume.array) != len(channels):
        raise ConfigError(_wrong_channels(channels, len(volume.array), volume.path))
    return volume


def _read(scan: str | Path | Sequence[str | Path], channels: Sequence[str]) -> Volume:
    files = [scan] if isinstance(scan, (str, Path)) else list(scan)
    paths = [Path(file) for file in files]
    if len(paths) not in (1, len(channels)):
        first = paths[0] if paths else None
        raise ConfigError(_wrong_channels(channels, len(paths), first))
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise FormatError(
            describe(
                "a folder is not a scan",
                expected="a file, or one file per channel",
                file=folder,
                remedy="Use find_cases and predict_cases for folders.",
            )
        )
    return read_case(paths)


def _wrong_channels(channels: Sequence[str], found: int, file: Path | None) -> str:
    names = ", ".join(channels)
    count = len(channels)
    return describe(
        "the scan's channels don't fit the model",
        expected=f"{count} channel{'s' if count > 1 else ''} ({names})",
        found=found,
        file=file,
        remedy="Give one file per channel in this order.",
    )


def _volume_of_voxels(voxels: Any, affine: FloatArray | None) -> Volume:
    array = voxels
    if isinstance(voxels, torch.Tensor):
        tensor = voxels.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ConfigError(
            describe(
                "not a scan",
                expected="a path, paths, a Volume, or an array of real numbers",
                found=getattr(array, "dtype", type(array).__name__),
            )
        )
    if array.ndim not in (3, 4):
        raise GeometryError(
            describe(
                "bad scan shape",
                expected="(C, I, J, K), or (I, J, K) for one channel",
                found=array.shape,
            )
        )
    if affine is None:
        _log.warning(
            "voxels without an affine: axes are taken to run to the right, front and "
            "top, 1 mm a voxel"
        )
        affine = np.eye(4)
    return Volume(array if array.ndim == 4 else array[None], np.asarray(affine))
