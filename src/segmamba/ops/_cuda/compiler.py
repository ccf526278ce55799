"""Kernels by file and name: compiled once for a GPU, kept on disk, launched fast."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import re
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segmamba.atomic import atomic_path
from segmamba.ops._cuda import driver, nvrtc

FOLDER = Path(__file__).parent
"""Where the kernels' sources are."""

_HEADER = "common.cuh"
_INCLUDE = re.compile(r'#include "([\w.]+)"')
_DIGEST = hashlib.sha256().digest_size


@functools.cache
def kernel(
    file: str, name: str, device: torch.device, **constants: int | str
) -> Kernel:
    """Compile a kernel, at the first call with these arguments.

    Args:
        file: A file of this folder.
        name: An `extern "C" __global__` function of it.
        device: A GPU, with its index.
        constants: Macros that are defined for the file.

    Returns:
        What launches it.

    Raises:
        BackendUnavailableError: It can't be compiled or loaded here.
    """
    return _load(file, name, device, tuple(constants.items()))


def _load(
    file: str, name: str, device: torch.device, constants: tuple[tuple, ...]
) -> Kernel:
    return Kernel(_module(file, device.index, constants).function(name))


@functools.cache
def _module(
    file: str, index: int, constants: tuple[tuple[str, int | str], ...]
) -> driver.Module:
    major, minor = torch.cuda.get_device_capability(index)
    # Hopper's own instructions, which "a" allows, run on no other GPU; CUDA 12 has it.
    own = "a" if major == 9 and nvrtc.version() >= (12, 0) else ""
    options = (
        f"--gpu-architecture=sm_{major}{minor}{own}",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in constants),
    )
    return driver.Module(compiled(file, options), index)


class Kernel:
    """A compiled kernel, to be called with its grid, block and arguments.

    The first call settles the arguments' types: a tensor or None is a pointer, an int
    a 32-bit int, a float a 32-bit float.
    """

    def __init__(self, function: driver.Function) -> None:
        self._function = function
        self._local = threading.local()

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: Tensor | int | float | None,
        shared: int = 0,
    ) -> None:
        """Launch on PyTorch's current stream.

        Args:
            grid: Blocks along x, y and z; none are launched if one is 0.
            threads: Threads of a block.
            arguments: Of the kernel, in its order.
            shared: Bytes of dynamic shared memory.
        """
        if 0 in grid:
            return
        try:
            packed = self._local.packed
        except AttributeError:
            packed = self._local.packed = _Arguments(arguments)
        packed.write(arguments)
        self._function.launch(grid, threads, shared, packed.addresses)


class _Arguments:
    """Memory of one thread that holds a kernel's arguments, eight bytes for each."""

    def __init__(self, arguments: tuple[Tensor | int | float | None, ...]) -> None:
        self._format = struct.Struct("=" + "".join(map(_code, arguments)))
        self._buffer = ctypes.create_string_buffer(self._format.size)
        start = ctypes.addressof(self._buffer)
        count = len(arguments)
        places = range(start, start + 8 * count, 8)
        self.addresses = (ctypes.c_void_p * count)(*places)

        self._pointers = [i for i, x in enumerate(arguments) if _code(x) == "Q"]

    def write(self, arguments: tuple[Tensor | int | float | None, ...]) -> None:
        values: list[Any] = list(arguments)
        for i in self._pointers:
            values[i] = 0 if values[i] is None else values[i].data_ptr()
        self._format.pack_into(self._buffer, 0, *values)


def _code(argument: Tensor | int | float | None) -> str:
    if isinstance(argument, Tensor) or argument is None:
        return "Q"
    return "i4x" if isinstance(argument, int) else "f4x"


# --- machine code, kept on disk -------------------------------------------------------


def source(file: str) -> str:
    """Text that is compiled for a file: what it includes, put in its place.

    Args:
        file: A file of this folder. It needn't include the header that all share.
    """
    return _text(_HEADER) + _text(file)


def _text(file: str) -> str:
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    parts = [f'#line 1 "{file}"']
    for number, line in enumerate(lines, 1):
        found = _INCLUDE.fullmatch(line)
        if found:
            parts += [_text(found[1]), f'#line {number + 1} "{file}"']
        else:
            parts.append(line)
    return "\n".join(parts) + "\n"


def compiled(file: str, options: tuple[str, ...]) -> bytes:
    """Take machine code from the cache on disk, or compile it and keep it there.

    Args:
        file: A file of this folder.
        options: NVRTC's.

    Returns:
        A cubin.

    Raises:
        BackendUnavailableError: It doesn't compile.
    """
    text = source(file)
    key = hashlib.sha256(repr((nvrtc.version(), options, text)).encode()).hexdigest()
    kept = f"{key}.cubin"
    cubin = _read(kept)
    if cubin is None:
        cubin = nvrtc.compile_source(text, file, options)
        _keep(kept, cubin)
    return cubin


def _cache_folder() -> Path:
    """The user's folder for what can be made again."""
    home = Path.home()
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "segmamba" / "kernels"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "segmamba" / "kernels"
    return home / ".cache" / "segmamba" / "kernels"


def _read(name: str) -> bytes | None:
    """Machine code behind its digest; None where the file is missing or damaged."""
    try:
        data = (_cache_folder() / name).read_bytes()
    except (OSError, RuntimeError):  # the latter without a home folder
        return None
    digest, cubin = data[:_DIGEST], data[_DIGEST:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _keep(name: str, cubin: bytes) -> None:
    # Where it can't be kept it is compiled again next time.
    with (
        contextlib.suppress(OSError, RuntimeError),
        atomic_path(_cache_folder() / name) as temporary,
    ):
        temporary.write_bytes(hashlib.sha256(cubin).digest() + cubin)
