"""Runs CUDA kernels on CPU tensors: `cuda.h` makes C++ of them, g++ a library.

Each tensor's memory is copied between two walls of not-a-number for a launch: a kernel
that writes outside is told of, and one that reads outside computes nonsense.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from segmamba.ops import backends
from segmamba.ops._cuda import compiler

HEADER = Path(__file__).with_name("cuda.h")
WALL = 4096
OPTIONS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-DEMULATED",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fsanitize=alignment,bounds",
    "-U_FORTIFY_SOURCE",
    "-w",
)

_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+'
    r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\]\s*;"
)

_ENTRIES = """
static void call_{name}(void **arguments) {{
    emulated::unpack_call({name}, arguments);
}}
extern "C" const char *types_{name}() {{
    return emulated::types({name});
}}
extern "C" const char *launch_{name}(void **arguments, const int *grid, int threads,
                                     int shared) {{
    return emulated::launch(call_{name}, arguments, grid, threads, shared);
}}
"""

_NAMES = """
namespace emulated {
EMULATED_NAME(bfloat16, "bfloat16")
EMULATED_NAME(float16, "float16")
}
"""


class EmulatorError(Exception):
    """A kernel does what no kernel may."""


def why_not() -> str:
    """Why kernels can't be emulated here; empty if they can."""
    if sys.platform != "linux":
        return "the emulator of CUDA kernels needs Linux"
    return "" if shutil.which("g++") else "the emulator of CUDA kernels needs g++"


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Let the back end "cuda" run on CPU tensors, and on them only."""
    kept = compiler._load, backends.cuda_status, backends.cuda_is_emulated
    compiler._load = _load
    backends.cuda_status = lambda: "available"
    backends.cuda_is_emulated = True
    compiler.kernel.cache_clear()
    try:
        yield
    finally:
        compiler._load, backends.cuda_status, backends.cuda_is_emulated = kept
        compiler.kernel.cache_clear()


def _load(file: str, name: str, device: torch.device, constants: tuple) -> Kernel:
    assert device.type == "cpu"
    return Kernel(library(compiler.source(file), constants), name)


class Kernel:
    """As `compiler.Kernel`, and stricter about arguments."""

    def __init__(self, code: ctypes.CDLL, name: str) -> None:
        types = getattr(code, f"types_{name}")
        types.restype = ctypes.c_char_p
        self.name = name
        self.types = types().decode().split()
        self._launch = getattr(code, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: Tensor | int | float | None,
        shared: int = 0,
    ) -> None:
        self._check(grid, threads, arguments, shared)
        if 0 in grid:
            return
        copies = _Copies([a for a in arguments if isinstance(a, Tensor)])
        values = [
            ctypes.c_void_p(copies.address(a) if isinstance(a, Tensor) else None)
            if kind.startswith("*")
            else (ctypes.c_float if kind == "float32" else ctypes.c_int32)(a)
            for a, kind in zip(arguments, self.types, strict=True)
        ]
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        problem = self._launch(places, (ctypes.c_int * 3)(*grid), threads, shared)
        if problem:
            raise EmulatorError(f"{self.name}: {problem.decode()}")
        copies.take_back(self.name)

    def _check(self, grid, threads: int, arguments: tuple, shared: int) -> None:
        if len(arguments) != len(self.types):
            raise EmulatorError(
                f"{self.name} takes {len(self.types)} arguments, not {len(arguments)}"
            )
        for place, (value, kind) in enumerate(zip(arguments, self.types, strict=True)):
            if not _fits(value, kind):
                found = value.dtype if isinstance(value, Tensor) else repr(value)
                raise EmulatorError(
                    f"{self.name}, argument {place}: a {kind} gets {found}"
                )
        if not (0 < threads <= 1024 and shared <= 227 * 1024):
            raise EmulatorError(f"{self.name}: too many threads or bytes for a block")
        if not (grid[0] < 2**31 and max(grid[1:]) < 2**16 and min(grid) >= 0):
            raise EmulatorError(f"{self.name}: no GPU takes a grid of {grid}")


def _fits(value: object, kind: str) -> bool:
    if isinstance(value, Tensor):
        return kind in ("*other", "*" + str(value.dtype).removeprefix("torch."))
    if value is None:
        return kind.startswith("*")
    if isinstance(value, float):
        return kind == "float32"
    return isinstance(value, int) and kind == "int32" and -(2**31) <= value < 2**31


class _Copies:
    """Copies of tensors' memory between walls; tensors that share memory go on to."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._copies: dict[int, tuple[int, Tensor]] = {}
        for tensor in tensors:
            memory = tensor.untyped_storage()
            start, size = memory.data_ptr(), memory.nbytes()
            if start in self._copies:
                continue
            # On 256 bytes, as PyTorch aligns memory on a GPU.
            walled = torch.full((size + 2 * WALL + 256,), 255, dtype=torch.uint8)
            walled = walled[-walled.data_ptr() % 256 :][: size + 2 * WALL]
            self._copies[start] = size, walled
            ctypes.memmove(walled.data_ptr() + WALL, start, size)

    def address(self, tensor: Tensor) -> int:
        start = tensor.untyped_storage().data_ptr()
        _, walled = self._copies[start]
        return walled.data_ptr() + WALL + tensor.data_ptr() - start

    def take_back(self, name: str) -> None:
        for start, (size, walled) in self._copies.items():
            if not (
                walled[:WALL].eq(255).all() and walled[WALL + size :].eq(255).all()
            ):
                raise EmulatorError(f"{name} writes outside a tensor")
            ctypes.memmove(start, walled.data_ptr() + WALL, size)


# --- libraries ------------------------------------------------------------------------


@functools.cache
def library(source: str, constants: tuple = ()) -> ctypes.CDLL:
    """Build a library of a source's kernels, or take it from an earlier run.

    Args:
        source: CUDA C++, as `compiler.source` gives it.
        constants: Macros and their values.
    """
    macros = "".join(f"#define {macro} {value}\n" for macro, value in constants)
    names = _names(macros + source)
    body = _DYNAMIC.sub(r"\1 *const \2 = (\1 *)emulated::dynamic;", source)
    entries = "".join(_ENTRIES.format(name=name) for name in names)
    types = _NAMES if "struct bfloat16" in source else ""
    text = f"{HEADER.read_text()}\n{macros}namespace {{\n{body}\n}}\n{types}{entries}"
    key = hashlib.sha256(repr((text, OPTIONS)).encode()).hexdigest()
    file = _folder() / f"{key}.so"
    if not file.exists():
        _build(text, file)
    return ctypes.CDLL(str(file))


def _names(source: str) -> list[str]:
    """The kernels of a source, without those that its conditions leave out."""
    command = ["g++", "-E", "-P", "-DEMULATED", "-D__launch_bounds__(...)="]
    command += ["-x", "c++", "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True).stdout
    return sorted(_KERNEL.findall(text))


def _folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"segmamba-emulator-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise EmulatorError(f"{folder} belongs to somebody else")
    return folder


def _build(text: str, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        code, made = Path(folder, "kernels.cpp"), Path(folder, "kernels.o")
        code.write_text(text)
        shared = Path(tempfile.mkdtemp(dir=file.parent), file.name)
        _run("g++", *OPTIONS, "-c", str(code), "-o", str(made))
        # Linked without the option for checks: their handlers are in the header.
        _run("g++", "-shared", str(made), "-o", str(shared), "-lm")
        shared.replace(file)
        shared.parent.rmdir()


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EmulatorError(result.stderr[-4000:])
