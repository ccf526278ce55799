"""What the emulator of CUDA kernels runs, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from segmamba.errors import BackendUnavailableError
from segmamba.ops import backends
from segmamba.ops._cuda import compiler

SUMS = """
extern "C" __global__ void __launch_bounds__(96)
sums(const element *__restrict__ x, float *__restrict__ sums, int count, float factor) {
    __shared__ float part[3];
    extern __shared__ float shown[];
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    shown[threadIdx.x] = at < count ? to_float(x[at]) : 0.0f;
    __syncthreads();
    float value = shown[blockDim.x - 1 - threadIdx.x];
#pragma unroll
    for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(ALL, value, by);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = factor * (part[0] + part[1] + part[2]);
}
"""

WRONG = """
extern "C" __global__ void wrong(float *y, int how) {
    __shared__ float memory[64];
    int thread = threadIdx.x;
    if (how == 0 && thread < 5) __syncthreads();
    if (how == 1) {
        if (thread < 5)
            __syncthreads();
        else
            __syncthreads();
    }
    if (how == 2 && thread < 5) __syncwarp();
    if (how == 3) *(float2 *)(y + 1) = make_float2(1, 2);
    if (how == 4) memory[thread + 40] = 1;
    if (how == 5) y[-1] = 1;
    if (how == 6 && thread < 5) y[0] = __shfl_xor_sync(0x1f, 1.0f, 8);
    if (how == 7) { // a barrier is missing here
        memory[thread] = thread;
        y[thread + 64 * blockIdx.x] = memory[63 - thread];
    }
    if (how == 8) y[thread] = memory[thread];
}
"""

SHUFFLES = """
extern "C" __global__ void shuffles(int *y) {
    int lane = threadIdx.x, all = 0xffffffff;
    y[lane] = __shfl_sync(all, lane, 37);
    y[32 + lane] = __shfl_sync(all, lane, 3, 8);
    y[64 + lane] = __shfl_up_sync(all, lane, 2);
    y[96 + lane] = __shfl_down_sync(all, lane, 1, 4);
    y[128 + lane] = __shfl_xor_sync(all, lane, 5, 16);
    y[160 + lane] = __ballot_sync(all, lane < 3);
    if (lane < 2) y[192 + lane] = __shfl_sync(3, lane, 1 - lane);
    y[194] = __any_sync(all, lane == 7) + 2 * __all_sync(all, lane < 31);
}
"""


@pytest.fixture
def load(emulator):
    """Make a kernel of a text."""

    def load(text: str, name: str, **constants):
        header = compiler.source("common.cuh").rpartition("#line 1")[0]
        text = f'{header}#line 1 "test.cu"\n{text}'
        library = emulator.library(text, tuple(constants.items()))
        return emulator.Kernel(library, name)

    return load


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_it_computes(load, kind):
    dtype = [torch.float32, torch.bfloat16, torch.float16][kind]
    kernel = load(SUMS, "sums", KIND=kind, ALL="0xffffffffu")
    x, found = torch.randn(500).to(dtype), torch.full((6,), torch.nan)
    kernel((6, 1, 1), 96, x, found, 500, 0.5, shared=4 * 96)
    padded = torch.nn.functional.pad(x.float(), (0, 76)).view(6, 96)
    torch.testing.assert_close(found, padded.sum(1) / 2)


def test_shuffles(load):
    y, lane = torch.zeros(195, dtype=torch.int32), torch.arange(32)
    load(SHUFFLES, "shuffles")((1, 1, 1), 32, y)
    down = torch.where(lane % 4 == 3, lane, lane + 1)
    wanted = [
        torch.full((32,), 5),
        lane // 8 * 8 + 3,
        torch.where(lane < 2, lane, lane - 2),
        down,
        lane ^ 5,
        torch.full((32,), 7),
        torch.tensor([1, 0, 1]),
    ]
    assert torch.equal(y, torch.cat(wanted).int())


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (0, "divergent barrier: 5 of 64 threads wait"),
        (1, "divergent barrier: threads wait in lines 8 and 10"),
        (2, "that never come"),
        (3, "test.cu:13: an access isn't aligned"),
        (4, "test.cu:14: an index is outside"),
        (5, "writes outside a tensor"),
        (6, "lane 12 isn't in the mask"),
    ],
)
def test_it_refuses_what_no_kernel_may_do(emulator, load, how, text):
    kernel = load(WRONG, "wrong")
    with pytest.raises(emulator.EmulatorError, match=text):
        kernel((1, 1, 2), 64, torch.zeros(64), how)
    kernel((1, 1, 2), 64, torch.zeros(64), 9)  # it works on after an error


def test_missing_barriers_and_unwritten_memory_show(load):
    kernel, y = load(WRONG, "wrong"), torch.zeros(2, 64)
    kernel((2, 1, 1), 64, y, 7)
    assert not torch.equal(y, torch.arange(63.0, -1, -1).expand(2, 64))
    kernel((1, 1, 1), 64, y, 8)
    assert y[0].isnan().all()


def test_it_knows_the_arguments(emulator, load):
    kernel, y = load(WRONG, "wrong"), torch.zeros(64)
    for arguments in [(y.half(), 0), (y, 0.0), (y,), (y, 2**31), (y, None), (1, 1)]:
        with pytest.raises(emulator.EmulatorError, match="argument"):
            kernel((1, 1, 1), 32, *arguments)
    kernel((1, 1, 1), 32, None, 9)
    kernel((1, 0, 1), 32, y, 5)  # no block


def test_element_types_round_as_pytorch_does(load):
    text = """
    extern "C" __global__ void narrow(const float *x, float16 *half, bfloat16 *bfloat,
                                      float *back, int count) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i >= count) return;
        half[i] = convert<float16>(x[i]);
        bfloat[i] = convert<bfloat16>(x[i]);
        back[i] = to_float(half[i]);
    }"""
    bits = torch.randint(-(2**31), 2**31, (50000,)).int().view(torch.float32)
    halves = torch.arange(65536).short().view(torch.float16).float()
    x = torch.cat([bits, halves, torch.randn(20000) * 1e-6, torch.randn(20000) * 6e4])
    half, bfloat = torch.empty_like(x).half(), torch.empty_like(x).bfloat16()
    back = torch.empty_like(x)
    grid = (-(-len(x) // 256), 1, 1)
    load(text, "narrow")(grid, 256, x, half, bfloat, back, len(x))
    torch.testing.assert_close(half, x.half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.half().float(), rtol=0, atol=0, equal_nan=True)


def test_auto_never_takes_it(emulator):
    given = {"device": torch.device("cpu"), "dtype": torch.float32}
    with emulator.emulated_cuda():
        assert backends.resolve_backend("cuda", **given) == "cuda"
        assert backends.resolve_backend("auto", **given) != "cuda"
    with pytest.raises(BackendUnavailableError, match="on cpu"):
        backends.resolve_backend("cuda", **given)
