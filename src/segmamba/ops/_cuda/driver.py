"""The part of NVIDIA's driver that loads and launches kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

import torch

from segmamba.errors import BackendUnavailableError, describe

_INVALID_CONTEXT = 201
_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


@functools.cache
def _driver() -> ctypes.CDLL:
    """Load the driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BackendUnavailableError(
            describe("NVIDIA's driver can't be loaded", found=error)
        ) from error


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown").decode(errors="replace")
        raise BackendUnavailableError(
            describe("NVIDIA's driver refuses a kernel", found=f"{reason} ({status})")
        )


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """The context that PyTorch works in on a device; it stays for good."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(device), index))
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context


@contextlib.contextmanager
def _on(index: int) -> Iterator[None]:
    """Make a device's context the current one."""
    with torch.cuda.device(index):
        _check(_driver().cuCtxSetCurrent(_context(index)))
        yield


class Module:
    """Machine code on a device.

    Args:
        cubin: What NVRTC made.
        index: The device's number.
    """

    def __init__(self, cubin: bytes, index: int) -> None:
        self.index = index
        self._module = ctypes.c_void_p()
        with _on(index):
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin))

    def function(self, name: str) -> Function:
        """Find a kernel by its name."""
        found, text = ctypes.c_void_p(), name.encode()
        get = _driver().cuModuleGetFunction
        with _on(self.index):
            _check(get(ctypes.byref(found), self._module, text))
        return Function(found, self.index)


class Function:
    """A kernel on a device.

    Args:
        handle: The driver's.
        index: The device's number.
    """

    def __init__(self, handle: ctypes.c_void_p, index: int) -> None:
        self._handle = handle
        self._index = index
        self._shared = 48 * 1024
        self._launch = _driver().cuLaunchKernel

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        addresses: ctypes.Array,
    ) -> None:
        """Launch it on PyTorch's current stream.

        Args:
            grid: Blocks along x, y and z.
            threads: Threads of a block.
            shared: Bytes of dynamic shared memory.
            addresses: Where the arguments are.
        """
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self.launch(grid, threads, shared, addresses)
            return
        if shared > self._shared:
            self._allow(shared)
        # Types declared once for the function would double the time of a call.
        stream = ctypes.c_void_p(_current_stream(self._index))
        sizes = (*grid, threads, 1, 1, shared)
        status = self._launch(self._handle, *sizes, stream, addresses, None)
        if status == _INVALID_CONTEXT:  # a thread that hasn't used the GPU so far
            _check(_driver().cuCtxSetCurrent(_context(self._index)))
            status = self._launch(self._handle, *sizes, stream, addresses, None)
        if status:
            _check(status)

    def _allow(self, shared: int) -> None:
        allow = _driver().cuFuncSetAttribute
        with _on(self._index):
            _check(allow(self._handle, _DYNAMIC_SHARED, shared))
        self._shared = shared


def _slow_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _slow_stream)
