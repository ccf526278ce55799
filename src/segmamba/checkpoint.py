"""Weights and training states in one safetensors file: atomic, checked, no pickle.

The file is an ordinary safetensors file. Its header holds one entry, `segmamba`: a
JSON text with the metadata, the format's version and a checksum of the tensors.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segmamba.atomic import atomic_path, flush_file
from segmamba.config import AnyNetworkConfig, network_from_dict, to_dict
from segmamba.devices import is_out_of_memory
from segmamba.errors import CheckpointError, ConfigError, describe
from segmamba.types import JsonDict

try:
    from isal.isal_zlib import crc32  # several times as fast
except ImportError:  # where networks are trained without reading scans
    from zlib import crc32

FORMAT_VERSION = 1
"""Raised when older readers could misread a file."""

_HEADER = "segmamba"
_NOT_METADATA = ("kind", "network", "format_version", "crc32")
_MIB = 2**20


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What was read, and from which of the two generations."""

    tensors: dict[str, Tensor]
    """By name, on the CPU."""
    metadata: JsonDict
    """What was given to `save_checkpoint`."""
    path: Path
    """The file that was read."""
    note: str | None = None
    """Why the newest file could not be used, if so."""


@dataclass(frozen=True)
class ModelFile:
    """The contents of a `model.safetensors`: weights for prediction."""

    tensors: dict[str, Tensor]
    """The network's state dict, on the CPU."""
    network: AnyNetworkConfig | None
    """What to build; None if the network had no configuration."""
    metadata: JsonDict
    """`plan_hash`, `step`, `weights` ("ema" or "last"), `finished`, `versions`, ..."""


def save_checkpoint(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: JsonDict,
    *,
    keep_previous: bool = False,
) -> None:
    """Write tensors and metadata to one file, whole or not at all.

    Args:
        path: The file to write, such as `checkpoint.safetensors`.
        tensors: By name; any shape, type and device.
        metadata: Values that JSON can hold.
        keep_previous: Keep the file that was there as `previous_path(path)`.

    Raises:
        CheckpointError: The file can't be written, such as on a full disk. What was
            there before stays.
    """
    path = Path(path)
    ready = _storable(tensors)
    head = {**metadata, "format_version": FORMAT_VERSION, "crc32": _checksum(ready)}
    text = json.dumps(head, allow_nan=False)
    try:
        with atomic_path(path) as temporary:
            save_file(ready, temporary, {_HEADER: text})
            if keep_previous and path.exists():
                flush_file(temporary)  # the new one is safe before the old one moves
                path.replace(previous_path(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_cannot_write(path, ready, error)) from error


def load_checkpoint(
    path: Path | str, *, copy: bool = True
) -> tuple[dict[str, Tensor], JsonDict]:
    """Read a file that `save_checkpoint` wrote.

    Args:
        path: The file.
        copy: False leaves the tensors in the file, mapped into memory: for a caller
            that drops them soon, such as after moving them to a GPU.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or not of ours.
    """
    path = Path(path)
    with _opened(path) as file:
        head = _parse_header(file.metadata(), path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if copy:  # Windows can't replace a file that is still mapped
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if head.pop("crc32", None) != _checksum(tensors):
        raise CheckpointError(_broken(path, "a checksum that does not match"))
    head.pop("format_version", None)
    return tensors, head


def load_latest_checkpoint(path: Path | str) -> LoadedCheckpoint | None:
    """Read a checkpoint, or the generation before it if the newest is broken.

    Args:
        path: The newest file.

    Returns:
        What was read, with a note if it is the older one; None if neither exists.

    Raises:
        CheckpointError: Files are there, but none can be read.
    """
    path = Path(path)
    previous = previous_path(path)
    if not path.exists() and not previous.exists():
        return None
    try:
        return LoadedCheckpoint(*load_checkpoint(path), path)
    except CheckpointError as error:
        if not previous.exists():
            raise
        note = f"Going on from the checkpoint before the last, {previous}: {error}"
        return LoadedCheckpoint(*load_checkpoint(previous), previous, note)


def previous_path(path: Path | str) -> Path:
    """Give the name of the generation before `path`: `checkpoint-previous.*`."""
    path = Path(path)
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def save_model(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    *,
    network: AnyNetworkConfig | None,
    metadata: JsonDict | None = None,
) -> None:
    """Write weights for prediction with all that is needed to build the network.

    Args:
        path: The file to write, usually `model.safetensors`.
        tensors: The network's state dict.
        network: What to build.
        metadata: Further JSON values, such as `plan_hash` and `step`.

    Raises:
        CheckpointError: The file can't be written; what was there before stays.
    """
    config = None if network is None else to_dict(network)
    head = {"versions": versions(), **(metadata or {}), "network": config}
    save_checkpoint(path, tensors, {**head, "kind": "model"})


def load_model_file(path: Path | str, *, copy: bool = True) -> ModelFile:
    """Read a `model.safetensors`.

    Args:
        path: The file.
        copy: As in `load_checkpoint`.

    Returns:
        Weights, network configuration and metadata.

    Raises:
        CheckpointError: The file is broken, or is a training state and no model.
    """
    tensors, head = load_checkpoint(path, copy=copy)
    _require_model(head, Path(path))
    config = head.get("network")
    try:
        known = config is not None
        network = network_from_dict(config, source=str(path)) if known else None
    except ConfigError as error:
        raise CheckpointError(_newer(Path(path), str(error))) from error
    metadata = {key: head[key] for key in head if key not in _NOT_METADATA}
    return ModelFile(tensors, network, metadata)


def load_model_metadata(path: Path | str) -> JsonDict:
    """Read what a `model.safetensors` says of itself, without its weights.

    Args:
        path: The file.

    Returns:
        As `ModelFile.metadata`.

    Raises:
        CheckpointError: The file is broken, or is a training state and no model.
    """
    path = Path(path)
    with _opened(path) as file:
        head = _parse_header(file.metadata(), path)
    _require_model(head, path)
    return {key: head[key] for key in head if key not in _NOT_METADATA}


def load_published_file(path: Path | str) -> dict[str, Any]:
    """Read a `.pt` file, such as the published code writes, as data only.

    Args:
        path: The file.

    Returns:
        What it holds, such as tensors by name: what
        `segmamba.load_published_weights` takes.

    Raises:
        CheckpointError: It is missing or damaged, holds something else, or would run
            code: such a file is never opened any other way.
    """
    path = Path(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every type there is
        reason = "it would run code" if "WeightsUnpickler" in str(error) else error
        raise CheckpointError(
            describe(
                "can't read a weight file",
                expected="tensors by name, written by torch.save",
                found=_first_line(reason),
                file=path,
                remedy="Save the state dict alone, or take another copy.",
            )
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            describe(
                "a weight file holds no weights",
                expected="tensors by name",
                found=type(found).__name__,
                file=path,
            )
        )
    return found


def _first_line(reason: object) -> str:
    text = getattr(reason, "strerror", None) or str(reason)
    return (text.strip().splitlines() or [type(reason).__name__])[0].split(". ")[0]


def update_model(path: Path | str, **changes: Any) -> None:
    """Change the metadata of a `model.safetensors`; the weights stay as they are.

    Args:
        path: The file; replaced whole or not at all.
        **changes: Values that JSON can hold, by name.

    Raises:
        CheckpointError: The file is broken, is no model, or can't be written.
    """
    tensors, head = load_checkpoint(path)
    _require_model(head, Path(path))
    save_checkpoint(path, tensors, {**head, **changes})


def versions() -> dict[str, str]:
    """Name the versions of Python, torch, numpy and segmamba."""
    from segmamba._version import __version__

    return {
        "segmamba": __version__,
        "torch": torch.__version__,
        "numpy": packages.version("numpy"),
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; what is wrong with it becomes an error of ours."""
    if not path.is_file():
        raise CheckpointError(describe("there is no such checkpoint", file=path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(_broken(path, str(error))) from error


def _require_model(head: JsonDict, path: Path) -> None:
    if head.get("kind") != "model":
        raise CheckpointError(
            describe(
                "not a model file",
                expected="weights for prediction",
                found="a training state",
                file=path,
                remedy="Give the model.safetensors beside it.",
            )
        )


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, dense, each with memory of its own."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen or tensor.numel() * tensor.element_size() != len(
            tensor.untyped_storage()
        ):
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = crc32(name.encode(), value)
        flat = tensors[name].reshape(-1).view(torch.uint8)
        value = crc32(flat.numpy().data, value)
    return value


def _parse_header(header: Mapping[str, str] | None, path: Path) -> JsonDict:
    text = (header or {}).get(_HEADER)
    try:
        head: Any = json.loads(text) if text else None
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise CheckpointError(_broken(path, "a safetensors file of another program"))
    version = head.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(_newer(path, f"format {version}"))
    return head


def _broken(path: Path, found: str) -> str:
    return describe(
        "can't read a checkpoint",
        expected="a whole safetensors file written by segmamba",
        found=found,
        file=path,
        remedy="It may be cut off or damaged; use another copy or train again.",
    )


def _newer(path: Path, found: str) -> str:
    return describe(
        "a checkpoint of another version of segmamba",
        expected=f"format {FORMAT_VERSION} and its known settings",
        found=found,
        file=path,
        remedy="Install the version that wrote it.",
    )


def _cannot_write(path: Path, tensors: Mapping[str, Tensor], error: Exception) -> str:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return describe(
        "can't write a checkpoint",
        expected=f"{size / _MIB:.1f} MiB of free space and the right to write",
        found=error,
        file=path,
        remedy="What was saved before is intact. Make room, then go on with --resume.",
    )
