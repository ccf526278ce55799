"""The mixer by CUDA kernels against float64: on a GPU, or emulated on CPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from segmamba.ops import mamba_mixer
from segmamba.ops._cuda import launch, mixer
from segmamba.ops._primitives import mix_operator

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="too long for the emulator"
)

TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the largest value; for half types what rounding u, the code and y costs."""

REVERSED, STRIDED = (1, True), (3, False)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _on_the_kernels_device(cuda_device):
    assert cuda_device.type == DEVICE.type


def compare(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for i, (ours, true) in enumerate(zip(found, wanted, strict=True)):
        assert ours.isfinite().all(), i
        error = (ours.detach().double() - true).abs().max()
        assert error <= tolerance * true.abs().max() + 1e-30, f"{i}: {error:.1e}"


# --- the mixer ------------------------------------------------------------------------


def mixer_inputs(length, model, channels, states, rank, count, batch=1, taps=4):
    """Tokens, both projections, and seven lists with a tensor a direction, float32."""
    random = np.random.default_rng(0)
    shapes = (
        (channels, 1, taps),
        (channels,),
        (rank + 2 * states, channels),
        (channels, rank),
        (channels,),
        (channels, states),
        (channels,),
    )

    def draw(*shape: int) -> Tensor:
        return torch.tensor(random.standard_normal(shape)).to(DEVICE, torch.float32)

    return [
        [draw(batch, length, model)],
        [draw(2 * channels, model) / model**0.5],
        [draw(model, channels) / channels**0.5],
        *([0.5 * draw(*s) for _ in range(count)] for s in shapes),
    ]


def run_mixer(inputs, orders, backend, dtype=None) -> list[Tensor]:
    """Output, and gradients of a weighted sum of it."""
    leaves = [
        [p.detach().to(dtype or p.dtype).requires_grad_() for p in kind]
        for kind in inputs
    ]
    single, lists = [kind[0] for kind in leaves[:3]], leaves[3:]
    out = mamba_mixer(*single, *lists, orders=orders, backend=backend)
    with torch.no_grad():
        lean = mamba_mixer(*single, *lists, orders=orders, backend=backend)
    assert torch.equal(out, lean), "without gradients"
    weight = torch.tensor(np.random.default_rng(1).standard_normal(out.shape))
    weight /= out.shape[1] ** 0.5  # or gradients of weights leave float16's range
    weight = weight.to(inputs[0][0].dtype)  # what the truth gets too
    flat = [p for kind in leaves for p in kind]
    found = torch.autograd.grad(out, flat, weight.to(out.device, out.dtype))
    return [out.detach(), *found]


def check_mixer(length, sizes, orders, batch=1, dtype=torch.float32) -> None:
    inputs = mixer_inputs(length, *sizes, len(orders), batch)
    for kind in inputs[:3]:
        kind[0] = kind[0].to(dtype)
    found = run_mixer(inputs, orders, "cuda")
    assert found[0].dtype == dtype
    truth = "reference" if length < 300 else "chunked"  # a loop would take minutes
    wanted = run_mixer(inputs, orders, truth, torch.float64)
    # a gradient that sums over two tokens has the rounding of each
    compare(found, wanted, TOLERANCE[dtype] * (2 if length == 1 else 1))


@pytest.mark.parametrize(
    ("length", "sizes", "orders", "batch"),
    [
        (1, (3, 8, 3, 1), ((1, False), REVERSED), 1),
        (18, (20, 64, 16, 2), (REVERSED,), 1),
        (36, (8, 16, 16, 3), ((1, False), REVERSED, STRIDED), 1),
        (18, (4, 8, 17, 2), (REVERSED,), 2),  # too many states
        (18, (4, 6, 16, 2), (REVERSED,), 2),  # no multiple of 8 channels
        (21, (48, 96, 16, 3), (STRIDED,), 2),
        (18, (12, 160, 9, 5), (REVERSED,), 1),
    ],
    ids=str,
)
def test_mixer(length, sizes, orders, batch, poison):
    check_mixer(length, sizes, orders, batch)


def test_mixer_in_half_precision(poison):
    check_mixer(6, (8, 16, 16, 3), (STRIDED,), dtype=torch.float16)


def test_mixer_is_the_formula(loops, poison):
    """Against loops that know nothing of the package."""
    inputs = mixer_inputs(6, 3, 8, 3, 2, 2, batch=2, taps=3)
    (tokens,), (before,), (after,), *lists = inputs
    orders = (REVERSED, STRIDED)
    with torch.no_grad():
        out = mamba_mixer(tokens, before, after, *lists, orders=orders, backend="cuda")
    arrays = [[p.double().cpu().numpy() for p in kind] for kind in lists]
    xz = (tokens.double() @ before.double().T).cpu().numpy()
    wanted = torch.tensor(loops.tri_scan(xz, arrays, orders)) @ after.double().T.cpu()
    compare([out.cpu()], [wanted], TOLERANCE[torch.float32])


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 37, 300, 2051, 17000])
@pytest.mark.parametrize(
    "sizes", [(20, 40, 16, 2), (48, 96, 16, 3), (24, 48, 20, 1)], ids=str
)
def test_mixer_of_any_length(length, sizes, dtype, poison):
    stride = next(s for s in (17, 7, 5, 3, 2, 1) if length % s == 0)
    check_mixer(length, sizes, ((1, False), REVERSED, (stride, False)), 2, dtype)


def test_blocks_take_several_chunks(monkeypatch, poison):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    check_mixer(51, (20, 40, 16, 2), ((3, True),))


@pytest.mark.parametrize("kib", [227, 99, 64])
def test_blocks_fit_the_shared_memory(kib, monkeypatch, poison):
    """Of data centres' GPUs, of gamers', and of old ones."""
    asked = []
    bytes_of = launch._shared_bytes
    monkeypatch.setattr(launch, "block_memory", lambda device: kib * 1024)
    monkeypatch.setattr(launch, "chunk_steps", lambda length: 64)
    monkeypatch.setattr(
        launch,
        "_shared_bytes",
        lambda *a: asked.append(bytes_of(*a)) or asked[-1],
    )
    check_mixer(70, (48, 96, 16, 3), (REVERSED,))
    assert asked[-1] <= kib * 1024
    assert (asked[-1] > 64 * 1024) == (kib > 64)


@pytest.mark.parametrize("steps", [32, 64, 128])
@pytest.mark.parametrize("length", [64, 101])
def test_long_chunks(steps, length, monkeypatch, poison):
    """Of several parts, and ending within the first or the second."""
    monkeypatch.setattr(launch, "chunk_steps", lambda length: steps)
    check_mixer(length, (4, 16, 16, 1), (REVERSED,))


@pytest.mark.parametrize("long", [12, 6])
def test_long_sequences_are_done_in_pieces(long, monkeypatch, poison):
    """Case by case, or direction by direction too."""
    monkeypatch.setattr(mixer, "_LONG", long)
    check_mixer(6, (4, 8, 16, 1), (REVERSED, STRIDED), 2)


# --- what every operator owes ---------------------------------------------------------


def test_same_bits_every_time():
    arguments = (mixer_inputs(6, 4, 8, 3, 1, 1), (STRIDED,), "cuda")
    first, second = run_mixer(*arguments), run_mixer(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_same_bits_every_time_when_long(dtype):
    inputs = mixer_inputs(17000, 48, 96, 16, 3, 3, batch=2)
    for kind in inputs[:3]:
        kind[0] = kind[0].to(dtype)
    orders = ((1, False), REVERSED, (17, False))
    first, second = (run_mixer(inputs, orders, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_mixer_is_registered_well():
    inputs = mixer_inputs(2, 4, 16, 16, 1, 1)
    flat = torch.cat([p.reshape(-1) for kind in inputs[3:] for p in kind])
    tensors = [x.requires_grad_() for x in (*(kind[0] for kind in inputs[:3]), flat)]
    torch.library.opcheck(mix_operator, (*tensors, [1], [1], 16, 1, 4, True))


def test_it_compiles_as_one_graph():
    inputs = mixer_inputs(2, 4, 8, 3, 1, 1)
    (tokens,), (before,), (after,), *lists = inputs

    def run(tokens: Tensor) -> Tensor:
        options = {"orders": (REVERSED,), "backend": "cuda"}
        return mamba_mixer(tokens, before, after, *lists, **options) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaf = tokens.requires_grad_()
    (found,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    (wanted,) = torch.autograd.grad(run(leaf).sum(), leaf)
    assert torch.equal(found, wanted)
