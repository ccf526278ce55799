"""From a scan to its label map: the training's preprocessing, and its inverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from segmamba.config import to_dict
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import Plan
from segmamba.data.preprocess import preprocess_image
from segmamba.devices import (
    Precision,
    describe_out_of_memory,
    is_out_of_memory,
    precision_for,
    resolve_device,
)
from segmamba.errors import BackendUnavailableError, ConfigError, describe
from segmamba.inference.open_scan import Scan, open_scan
from segmamba.inference.postprocessing import (
    PostprocessingStep,
    apply_postprocessing,
)
from segmamba.inference.prediction import Prediction
from segmamba.inference.replay import Replays
from segmamba.inference.segment import Request, segment
from segmamba.inference.sliding_window import Progress
from segmamba.ops.backends import warn_if_slow
from segmamba.types import FloatArray, JsonDict


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
        whole_volume: bool = False,
        snapshots: Sequence[Callable[..., Any]] = (),
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
            whole_volume: Show the networks the whole scan at once, not windows.
            snapshots: More networks, which only count as samples of uncertainty.
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
        self.snapshots = [self._ready(network) for network in snapshots]
        self.whole_volume = whole_volume
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
        if self.whole_volume:
            options["whole_volume"] = True
        if self.postprocessing:
            options["postprocessing"] = list(map(to_dict, self.postprocessing))
        return options

    def predict(
        self,
        scan: Scan,
        *,
        affine: FloatArray | None = None,
        probabilities: bool = False,
        uncertainty: bool = False,
        case: str | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment a scan.

        Beside the scan, its preprocessed form (float32) and the label map, memory is
        what `sliding_window.memory_bound_mib` gives and the networks' own, where the
        sums count `attempts.SUMS_BYTES` at most on a CPU; with probabilities also
        float16 for each output at full size. If memory runs out, less is tried, which
        is logged: fewer windows at once, sums on the CPU, slab by slab.

        Args:
            scan: A Volume; a file; one file per channel in the order of `channels`;
                or voxels (C, I, J, K) or (I, J, K).
            affine: For voxels: (4, 4), voxel index to RAS+ mm. Left out, axes are
                taken to run to the right, front and top at 1 mm, which is logged.
            probabilities: Give softmax or sigmoid maps too.
            uncertainty: Say how sure the prediction is, over mirrorings, folds and
                snapshots. Takes twice the memory for the sums.
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
            volume = open_scan(scan, affine, self.channels)
            case = case or (volume.path.name if volume.path else "the scan")
            image, geometry = preprocess_image(volume, self.plan)
            source, scan_affine = volume.path, np.asarray(volume.affine, np.float64)
            del volume  # its voxels are no longer needed; the windows want the memory
            wanted = Request(
                *(torch.from_numpy(image), geometry, case),
                *(probabilities, uncertainty, progress),
            )
            del image
            found = Prediction(
                **vars(segment(self, wanted)),
                affine=scan_affine,
                names=self.names,
                source=source,
            )
            return self._postprocessed(found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_little_memory(case or "the scan", error) from error

    __call__ = predict

    def launcher(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """Give what launches a network fastest on the device."""
        return self._replays.launcher(network, self.device)

    def free_memory(self) -> None:
        """Give back what is kept from scan to scan."""
        self._replays.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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


def _mirror_axes(mirror: bool | Sequence[int]) -> tuple[int, ...]:
    if isinstance(mirror, bool):
        return (0, 1, 2) if mirror else ()
    if not set(mirror) <= {0, 1, 2}:
        raise ConfigError(
            describe("bad mirror axes", expected="some of 0, 1, 2", found=mirror)
        )
    return tuple(sorted(set(mirror)))
