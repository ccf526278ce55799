"""NVRTC, the CUDA compiler that every CUDA build of PyTorch brings as a library."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from segmamba.errors import BackendUnavailableError, describe


@functools.cache
def library() -> ctypes.CDLL:
    """Load NVRTC.

    Raises:
        BackendUnavailableError: There is none, or it can't be loaded.
    """
    problem = "this PyTorch is built without CUDA"
    for name in _candidates():
        try:
            _load_builtins(Path(name).parent)
            return ctypes.CDLL(name)
        except OSError as error:
            problem = str(error)
    raise BackendUnavailableError(
        describe(
            "NVRTC, which compiles the GPU kernels, can't be loaded",
            found=problem,
            remedy=f"Install {_package()}.",
        )
    )


def _load_builtins(folder: Path) -> None:
    """Load what NVRTC asks for by name alone, without looking beside itself."""
    if folder.is_absolute() and sys.platform != "win32":
        for file in folder.glob(f"libnvrtc-builtins.so.{_cuda()[0]}*"):
            ctypes.CDLL(str(file))


def _cuda() -> tuple[int, int]:
    """Version of CUDA that PyTorch is built with; zeros for none."""
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return int(major), int(minor)


def _package() -> str:
    major = _cuda()[0]
    return "nvidia-cuda-nvrtc" + ("" if major >= 13 else f"-cu{major}") + " with pip"


def _candidates() -> Iterator[str]:
    """Names and files to try, those that PyTorch's own wheels bring first."""
    major = _cuda()[0]
    if not major:
        return
    if sys.platform == "win32":
        pattern, name = "nvrtc64_*_0.dll", f"nvrtc64_{major}0_0.dll"
    else:
        # Releases of CUDA 11 kept the name of 11.2.
        name = f"libnvrtc.so.{major}" + (".2" if major == 11 else "")
        pattern = name
    for folder in _folders(major):
        yield from (str(file) for file in sorted(folder.glob(pattern)))
    yield name


def _folders(major: int) -> list[Path]:
    """Where pip and conda put it."""
    torch_folder = Path(torch.__file__).parent
    nvidia = torch_folder.parent / "nvidia"
    return [
        torch_folder / "lib",
        *(nvidia / package / "lib" for package in (f"cu{major}", "cuda_nvrtc")),
        *(nvidia / package / "bin" for package in (f"cu{major}", "cuda_nvrtc")),
        Path(sys.prefix, "lib"),
        Path(sys.prefix, "Library", "bin"),
    ]


@functools.cache
def version() -> tuple[int, int]:
    """Version of NVRTC, such as (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """Architectures that it compiles for, such as 75 and 90."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(found))
    return tuple(found)


def compile_source(source: str, name: str, options: tuple[str, ...]) -> bytes:
    """Compile CUDA C++ to machine code.

    Args:
        source: The text.
        name: What messages call it.
        options: NVRTC's options, a real architecture among them.

    Returns:
        A cubin.

    Raises:
        BackendUnavailableError: It doesn't compile; the message ends with the log.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    text = source.encode(), name.encode()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), *text, 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if nvrtc.nvrtcCompileProgram(program, len(given), given):
            log = _text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise BackendUnavailableError(
                describe("GPU kernels don't compile", file=name) + "\n" + log
            )
        return _text(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, kind: str) -> bytes:
    """What NVRTC holds of a kind for a program."""
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{kind}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        get = library().nvrtcGetErrorString
        get.restype = ctypes.c_char_p
        raise BackendUnavailableError(
            describe("NVRTC fails", found=get(status).decode(errors="replace"))
        )
