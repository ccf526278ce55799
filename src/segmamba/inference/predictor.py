"""From a scan to its label map: the training's preprocessing, and its inverse."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from segmamba.config import to_dict
from segmamba.data.geometry import Geometry
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import Plan
from segmamba.data.preprocess import preprocess_image, restore_label_map
from segmamba.devices import (
    Precision,
    describe_out_of_memory,
    is_out_of_memory,
    precision_for,
    resolve_device,
)
from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    FormatError,
    GeometryError,
    describe,
)
from segmamba.inference.postprocessing import (
    PostprocessingStep,
    apply_postprocessing,
)
from segmamba.inference.prediction import Prediction
from segmamba.inference.replay import Replays
from segmamba.inference.sliding_window import Progress, sliding_window_logits
from segmamba.io import Volume, read_case
from segmamba.ops.backends import warn_if_slow
from segmamba.types import Array, FloatArray, JsonDict

Scan: TypeAlias = "Volume | str | Path | Sequence[str | Path] | Array | torch.Tensor"
"""A volume; a file; one file per channel; or voxels (C, I, J, K) or (I, J, K)."""

GPU_SHARE = 0.5
"""Share of a GPU's free memory that image and sums of the logits may take."""

_log = logging.getLogger(__name__)


class Predictor:
    """Networks, and all that is needed to lead a scan through them and back."""

    def __init__(
        self,
        networks: Callable[..., Any] | Sequence[Callable[..., Any]],
        plan: Plan,
        channels: Sequence[str],
        scheme: LabelScheme,
        *,
        device: str | torch.device = "auto",
        overlap: float = 0.5,
        mirror: bool | Sequence[int] = True,
        precision: str = "auto",
        batch_size: int = 1,
        accumulate_device: str | torch.device | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
        postprocessing: Sequence[PostprocessingStep] = (),
        identity: JsonDict | None = None,
    ) -> None:
        """Put the networks on the device, ready to predict.

        Args:
            networks: One or several (folds) of (B, C, D, H, W) to logits
                (B, K, D, H, W); their logits are averaged. Modules are moved to the
                device, and are in evaluation mode while they predict only.
            plan: The plan that they were trained by.
            channels: Names of the image channels in their order.
            scheme: What the logits' K channels stand for.
            device: "auto", "cpu", "cuda", "mps" or a device.
            overlap: Share of a window's side that neighbours have in common, 0 to
                below 1.
            mirror: Average over all mirrorings (8 times the work); or the axes of
                (D, H, W) to mirror.
            precision: "auto" (bf16 where native), "fp32", "bf16" or "fp16".
            batch_size: Windows in a forward pass.
            accumulate_device: Where logits are summed; None takes the device, or the
                CPU where a GPU's memory is short.
            accumulate_dtype: Type of the sums: float32, or float16 to save memory.
            postprocessing: What is done to every label map; probabilities stay.
            identity: What tells this model from others, for the record of a folder
                of predictions.

        Raises:
            ConfigError: An option is out of range, or channels don't fit the plan.
            BackendUnavailableError: The device isn't there.
        """
        _check(plan, channels, overlap, batch_size)
        self.device = resolve_device(device)
        warn_if_slow(self.device)
        self.precision: Precision = precision_for(self.device, precision)
        group = [networks] if callable(networks) else list(networks)
        self.networks = [self._ready(network) for network in group]
        self._replays = Replays()
        self.plan, self.channels, self.scheme = plan, tuple(channels), scheme
        self.overlap, self.batch_size = overlap, batch_size
        self.mirror_axes = _mirror_axes(mirror)
        self.accumulate_device = accumulate_device
        self.accumulate_dtype = accumulate_dtype
        self.postprocessing = tuple(postprocessing)
        self.identity = dict(identity or {})

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs' names: regions, or classes in the order of their integers."""
        if self.scheme.is_region_based:
            return tuple(self.scheme.regions)
        by_value = {value: name for name, value in self.scheme.labels.items()}
        return tuple(by_value[value] for value in self.scheme.class_values)

    @property
    def options(self) -> JsonDict:
        """What changes the label maps, apart from the model itself."""
        options: JsonDict = {
            "overlap": self.overlap,
            "mirror_axes": list(self.mirror_axes),
        }
        if self.postprocessing:
            options["postprocessing"] = list(map(to_dict, self.postprocessing))
        return options

    def predict(
        self,
        scan: Scan,
        *,
        affine: FloatArray | None = None,
        probabilities: bool = False,
        case: str | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment a scan.

        Beside the scan, its preprocessed form (float32) and the label map, memory is
        what `sliding_window.memory_bound_mib` gives and the networks' own; with
        probabilities also float16 for each output at full size.

        Args:
            scan: A Volume; a file; one file per channel in the order of `channels`;
                or voxels (C, I, J, K) or (I, J, K).
            affine: For voxels: (4, 4), voxel index to RAS+ mm. Left out, axes are
                taken to run to the right, front and top at 1 mm, which is logged.
            probabilities: Give softmax or sigmoid maps too.
            case: What errors and progress call the scan; None takes its file's name.
            progress: Called with windows done, their number, and the case.

        Returns:
            The label map on the scan's grid.

        Raises:
            ConfigError: The number of channels isn't the model's.
            FormatError: A file is unreadable, or voxels are NaN or infinite.
            GeometryError: Channels lie on different grids.
            SegMambaError: Logits aren't finite.
            BackendUnavailableError: The device's memory is too small.
        """
        try:
            volume = self._open(scan, affine)
            case = case or (volume.path.name if volume.path else "the scan")
            image, geometry = preprocess_image(volume, self.plan)
            source, scan_affine = volume.path, np.asarray(volume.affine, np.float64)
            del volume  # its voxels are no longer needed; the windows want the memory
            logits = self._logits(torch.from_numpy(image), case, progress)
            label_map, maps = self._restore(logits, geometry, probabilities)
            del logits
            found = Prediction(label_map, scan_affine, maps, self.names, source)
            return self._postprocessed(found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_little_memory(case or "the scan", error) from error

    __call__ = predict

    def _open(self, scan: Scan, affine: FloatArray | None) -> Volume:
        if not isinstance(scan, (Volume, str, Path, Sequence)):
            volume = _volume_of_voxels(scan, affine)
        elif affine is not None:
            raise ConfigError(
                describe("an affine is for voxels; a file or volume has its own")
            )
        else:
            volume = scan if isinstance(scan, Volume) else self._read(scan)
        if len(volume.array) != len(self.channels):
            raise ConfigError(self._wrong_channels(len(volume.array), volume.path))
        return volume

    def _read(self, scan: str | Path | Sequence[str | Path]) -> Volume:
        files = [scan] if isinstance(scan, (str, Path)) else list(scan)
        paths = [Path(file) for file in files]
        if len(paths) not in (1, len(self.channels)):
            raise ConfigError(
                self._wrong_channels(len(paths), paths[0] if paths else None)
            )
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

    def _wrong_channels(self, found: int, file: Path | None) -> str:
        names = ", ".join(self.channels)
        count = len(self.channels)
        return describe(
            "the scan's channels don't fit the model",
            expected=f"{count} channel{'s' if count > 1 else ''} ({names})",
            found=found,
            file=file,
            remedy="Give one file per channel in this order.",
        )

    def _logits(
        self, image: torch.Tensor, case: str, progress: Progress | None
    ) -> torch.Tensor:
        target = self._accumulate_on(image)
        try:
            # An image beside the sums spares a copy for each window.
            return self._windows(image.to(target), target, case, progress)
        except torch.OutOfMemoryError:
            if target.type == "cpu":
                raise
            self._replays.forget()
            torch.cuda.empty_cache()
            return self._windows(image, torch.device("cpu"), case, progress)

    def _too_little_memory(
        self, case: str, error: BaseException
    ) -> BackendUnavailableError:
        patch, need = self.plan.patch_size, self.plan.memory_prediction_mib
        window = f"a window of {' x '.join(map(str, patch))} voxels"
        remedies = ["lower patch_size in plan.json", "leave out probabilities"]
        if self.batch_size > 1:
            remedies.append("take batch_size 1")
        if self.device.type != "cpu":
            remedies.append("use the device cpu")
        remedies.append("close other programs")
        return BackendUnavailableError(
            describe(
                f"{self.device} has too little memory for {case}",
                expected=f"room for {window}" + (f", {need:.0f} MiB" if need else ""),
                found=describe_out_of_memory(error),
                remedy=f"{', '.join(remedies)}.".capitalize(),
            )
        )

    def _windows(
        self,
        image: torch.Tensor,
        target: torch.device,
        case: str,
        progress: Progress | None,
    ) -> torch.Tensor:
        with _evaluating(self.networks):
            return sliding_window_logits(
                [self._replays.launcher(item, self.device) for item in self.networks],
                image,
                self.plan.patch_size,
                overlap=self.overlap,
                mirror_axes=self.mirror_axes,
                batch_size=self.batch_size,
                device=self.device,
                accumulate_device=target,
                accumulate_dtype=self.accumulate_dtype,
                precision=self.precision,
                case=case,
                progress=progress,
            )

    def _accumulate_on(self, image: torch.Tensor) -> torch.device:
        if self.accumulate_device is not None:
            return resolve_device(self.accumulate_device)
        if self.device.type != "cuda":
            return self.device
        voxels = math.prod(image.shape[1:])
        wanted = self.scheme.num_outputs * voxels * self.accumulate_dtype.itemsize
        wanted += image.nbytes
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.device if wanted < GPU_SHARE * free else torch.device("cpu")

    def _restore(
        self, logits: torch.Tensor, geometry: Geometry, probabilities: bool
    ) -> tuple[Array, Array | None]:
        if probabilities:
            return restore_label_map(
                logits, geometry, self.scheme, return_probabilities=True
            )
        return restore_label_map(logits, geometry, self.scheme), None

    def _postprocessed(self, found: Prediction) -> Prediction:
        if not self.postprocessing:
            return found
        label_map = apply_postprocessing(
            found.label_map, found.spacing_mm, self.postprocessing, self.scheme
        )
        return dataclasses.replace(found, label_map=label_map)

    def _ready(self, network: Callable[..., Any]) -> Callable[..., Any]:
        return network.to(self.device) if isinstance(network, nn.Module) else network


def _check(
    plan: Plan, channels: Sequence[str], overlap: float, batch_size: int
) -> None:
    if len(channels) != len(plan.normalization):
        raise ConfigError(
            describe(
                "channels don't fit the plan",
                expected=f"{len(plan.normalization)} names",
                found=", ".join(channels) or "none",
            )
        )
    if not 0 <= overlap < 1:
        raise ConfigError(
            describe("bad overlap", expected="0 to below 1", found=overlap)
        )
    if batch_size < 1:
        raise ConfigError(
            describe("bad batch size", expected="1 or more", found=batch_size)
        )


@contextlib.contextmanager
def _evaluating(networks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Switch to evaluation and back: a network may be in the middle of training."""
    modules = [
        module
        for network in networks
        if isinstance(network, nn.Module)
        for module in network.modules()
    ]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _mirror_axes(mirror: bool | Sequence[int]) -> tuple[int, ...]:
    if isinstance(mirror, bool):
        return (0, 1, 2) if mirror else ()
    if not set(mirror) <= {0, 1, 2}:
        raise ConfigError(
            describe("bad mirror axes", expected="some of 0, 1, 2", found=mirror)
        )
    return tuple(sorted(set(mirror)))


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
