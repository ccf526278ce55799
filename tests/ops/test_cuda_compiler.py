"""How kernels are compiled, kept and launched, with a played NVRTC and driver."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmamba.errors import BackendUnavailableError
from segmamba.ops._cuda import compiler, driver, nvrtc

NVRTC = r"""
#include <string.h>
static char text[100000], log_text[100000];
static int failed;
extern "C" {
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 1; return 0; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 2; return 0; }
int nvrtcGetSupportedArchs(int *found) { found[0] = 75; found[1] = 90; return 0; }
int nvrtcCreateProgram(void **program, const char *source, const char *, int,
                       const char **, const char **) {
    strcpy(text, source);
    *program = text;
    return 0;
}
int nvrtcCompileProgram(void *, int count, const char **options) {
    failed = strstr(text, "wrong") != 0;
    strcpy(log_text, "line 7: ");
    for (int i = 0; i < count; i++) strcat(strcat(log_text, options[i]), " ");
    return failed ? 6 : 0;
}
int nvrtcGetProgramLogSize(void *, size_t *size) {
    *size = strlen(log_text) + 1;
    return 0;
}
int nvrtcGetProgramLog(void *, char *to) { strcpy(to, log_text); return 0; }
int nvrtcGetCUBINSize(void *, size_t *size) { *size = strlen(text); return 0; }
int nvrtcGetCUBIN(void *, char *to) { memcpy(to, text, strlen(text)); return 0; }
int nvrtcDestroyProgram(void **) { return 0; }
const char *nvrtcGetErrorString(int) { return "NVRTC_ERROR"; }
}
"""

DRIVER = r"""
#include <string.h>
extern "C" {
int fails, status, launches, contexts, allowed;
long long pointers[2], handles[2];
int numbers[8];
float real;
int cuCtxSetCurrent(void *) { contexts++; fails = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { *context = &fails; return 0; }
int cuModuleLoadData(void **module, const char *) { *module = &status; return 0; }
int cuModuleGetFunction(void **found, void *, const char *name) {
    *found = &launches;
    return strcmp(name, "there") ? 500 : 0;
}
int cuFuncSetAttribute(void *, int, int bytes) { allowed = bytes; return 0; }
int cuGetErrorString(int, const char **text) { *text = "a reason"; return 0; }
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned, unsigned, unsigned shared, void *stream, void **arguments,
                   void **) {
    if (fails) return 201;
    launches++;
    numbers[0] = x, numbers[1] = y, numbers[2] = z, numbers[3] = threads;
    numbers[4] = shared;
    handles[0] = function == &launches, handles[1] = (long long)stream;
    memcpy(pointers, arguments[0], 8);
    memcpy(pointers + 1, arguments[1], 8);
    memcpy(numbers + 5, arguments[2], 4);
    memcpy(&real, arguments[3], 4);
    return status;
}
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Make a shared library of C++."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("played libraries need g++ on Linux")

    def build(text: str, name: str) -> Path:
        folder = tmp_path_factory.mktemp("library")
        (folder / "code.cpp").write_text(text)
        command = ["g++", "-shared", "-fPIC", "-o", name, "code.cpp"]
        subprocess.run(command, cwd=folder, check=True)
        return folder / name

    return build


def forget():
    for function in (nvrtc.library, nvrtc.version, nvrtc.architectures):
        function.cache_clear()


@pytest.fixture
def played_nvrtc(build, monkeypatch):
    """NVRTC 13.1 in a folder of its own."""
    file = build(NVRTC, "libnvrtc.so.13")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "_folders", lambda major: [file.parent])
    forget()
    yield
    forget()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


# --- NVRTC ----------------------------------------------------------------------------


def test_nvrtc_says_what_it_can(played_nvrtc):
    assert nvrtc.version() == (13, 1)
    assert nvrtc.architectures() == (75, 90)


def test_it_compiles(played_nvrtc):
    assert nvrtc.compile_source("text", "a.cu", ("-DX=1",)) == b"text"


def test_errors_show_the_log(played_nvrtc):
    with pytest.raises(BackendUnavailableError, match=r"a.cu.*\nline 7: -DX=1 --std"):
        nvrtc.compile_source("wrong", "a.cu", ("-DX=1", "--std=c++17"))


@pytest.mark.parametrize(
    ("cuda", "package"),
    [("11.8", "nvidia-cuda-nvrtc-cu11"), ("12.4", "-cu12"), ("13.0", "nvrtc with pip")],
)
def test_a_missing_nvrtc_is_named(monkeypatch, cuda, package):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc, "_folders", lambda major: [])
    forget()
    with pytest.raises(BackendUnavailableError, match=package):
        nvrtc.library()
    forget()


def test_it_is_looked_for_where_pip_and_conda_put_it(monkeypatch, tmp_path):
    places = [
        ("linux", "13.0", "nvidia/cu13/lib/libnvrtc.so.13"),
        ("linux", "12.8", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
        ("linux", "11.8", "nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2"),
        ("win32", "12.8", "torch/lib/nvrtc64_120_0.dll"),
        ("win32", "13.0", "nvidia/cu13/bin/nvrtc64_130_0.dll"),
    ]
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    for platform, cuda, place in places:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.with_name(file.name.replace(".so", ".alt.so")).touch()
        candidates = list(nvrtc._candidates())
        assert candidates[0] == str(file)
        assert candidates[-1] == file.name
        file.unlink()


# --- machine code on disk -------------------------------------------------------------


@pytest.fixture
def compilations(played_nvrtc, monkeypatch):
    """What NVRTC was asked for."""
    found = []
    compile_source = nvrtc.compile_source

    def spy(text, name, options):
        found.append((name, options))
        return compile_source(text, name, options)

    monkeypatch.setattr(nvrtc, "compile_source", spy)
    return found


def test_machine_code_is_kept(home, compilations):
    first = compiler.compiled("norm.cu", ("-DA=1",))
    assert compiler.compiled("norm.cu", ("-DA=1",)) == first
    assert len(compilations) == 1
    compiler.compiled("norm.cu", ("-DA=2",))
    compiler.compiled("scan.cu", ("-DA=1",))
    assert len(compilations) == 3
    assert len(list(home.rglob("*.cubin"))) == 3


def test_damaged_and_unwritable_caches_do_no_harm(home, compilations, monkeypatch):
    first = compiler.compiled("norm.cu", ())
    (file,) = home.rglob("*.cubin")
    for damage in (b"", file.read_bytes()[:-1], b"x" + file.read_bytes()[1:]):
        file.write_bytes(damage)
        assert compiler.compiled("norm.cu", ()) == first
    assert len(compilations) == 4
    monkeypatch.setattr(Path, "home", lambda: file)  # no folder
    assert compiler.compiled("norm.cu", ()) == first

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert compiler.compiled("norm.cu", ()) == first


def test_files_include_each_other(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    (tmp_path / "common.cuh").write_text("int a;\n")
    (tmp_path / "more.cuh").write_text("int b;\n")
    (tmp_path / "kernels.cu").write_text('int c;\n#include "more.cuh"\nint d;\n')
    assert compiler.source("kernels.cu").splitlines() == [
        '#line 1 "common.cuh"',
        "int a;",
        '#line 1 "kernels.cu"',
        "int c;",
        '#line 1 "more.cuh"',
        "int b;",
        "",
        '#line 3 "kernels.cu"',
        "int d;",
    ]


# --- launches -------------------------------------------------------------------------


@pytest.fixture
def played(build, monkeypatch):
    """The played driver, with a GPU whose stream is number 77."""
    library = ctypes.CDLL(str(build(DRIVER, "libdriver.so")))
    monkeypatch.setattr(driver, "_driver", lambda: library)
    monkeypatch.setattr(driver, "_current_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    driver._context.cache_clear()
    yield library
    driver._context.cache_clear()


def value(library, name, kind=ctypes.c_int):
    return kind.in_dll(library, name).value


def numbers(library):
    return list((ctypes.c_int * 8).in_dll(library, "numbers"))


@pytest.fixture
def kernel(played):
    return compiler.Kernel(driver.Module(b"code", 0).function("there"))


def test_arguments_arrive(kernel, played):
    x = torch.zeros(3)
    kernel((5, 6, 7), 128, x, None, -3, 0.5, shared=1000)
    pointers = list((ctypes.c_longlong * 2).in_dll(played, "pointers"))
    handles = list((ctypes.c_longlong * 2).in_dll(played, "handles"))
    assert numbers(played)[:6] == [5, 6, 7, 128, 1000, -3]
    assert pointers == [x.data_ptr(), 0]
    assert handles == [1, 77]
    assert value(played, "real", ctypes.c_float) == 0.5


def test_the_first_launch_settles_the_types(kernel, played):
    x = torch.zeros(3)
    kernel((1, 1, 1), 32, x, None, 2, 0.5)
    kernel((1, 1, 1), 32, None, x, 3, 4)
    assert value(played, "real", ctypes.c_float) == 4.0
    for wrong in ((x, x, 2.5, 0.5), (x, x, 2), (x, x, 2**31, 0.5)):
        with pytest.raises(struct.error):
            kernel((1, 1, 1), 32, *wrong)
    assert value(played, "launches") == 2


def test_no_blocks_are_no_launch(kernel, played):
    kernel((1, 0, 1), 32, None, None, 1, 1.0)
    assert value(played, "launches") == 0


def test_much_shared_memory_is_asked_for_once(kernel, played):
    contexts = value(played, "contexts")
    for shared in (48 * 1024, 100_000, 90_000):
        kernel((1, 1, 1), 32, None, None, 1, 1.0, shared=shared)
    assert value(played, "allowed") == 100_000
    assert value(played, "contexts") == contexts + 1


def test_a_thread_that_never_used_the_gpu_can_launch(kernel, played):
    ctypes.c_int.in_dll(played, "fails").value = 1
    kernel((1, 1, 1), 32, None, None, 1, 1.0)
    assert value(played, "launches") == 1


def test_another_device_is_switched_to(played, monkeypatch):
    now = [1]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])

    @contextlib.contextmanager
    def device(index):
        before, now[0] = now[0], index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    streams = []
    monkeypatch.setattr(driver, "_current_stream", lambda i: streams.append(i) or 0)
    kernel = compiler.Kernel(driver.Module(b"code", 0).function("there"))
    kernel((1, 1, 1), 32, None, None, 1, 1.0)
    assert value(played, "launches") == 1
    assert streams == [0]
    assert now == [1]


def test_what_the_driver_refuses_is_said(kernel, played):
    ctypes.c_int.in_dll(played, "status").value = 700
    with pytest.raises(BackendUnavailableError, match=r"a reason \(700\)"):
        kernel((1, 1, 1), 32, None, None, 1, 1.0)
    with pytest.raises(BackendUnavailableError, match="500"):
        driver.Module(b"code", 0).function("not there")


def test_kernels_are_compiled_once(home, compilations, played, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    compiler.kernel.cache_clear()
    compiler._module.cache_clear()
    device = torch.device("cuda", 0)
    first = compiler.kernel("norm.cu", "there", device, KIND=1, X="float")
    assert compiler.kernel("norm.cu", "there", device, KIND=1, X="float") is first
    ((name, options),) = compilations
    assert name == "norm.cu"
    assert options[0].startswith("--gpu-architecture=sm_90")
    assert options[-2:] == ("-DKIND=1", "-DX=float")
    compiler.kernel.cache_clear()
    compiler._module.cache_clear()
