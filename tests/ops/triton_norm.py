"""The instance norm's Triton kernels against float64.

`test_norm.py` runs this file in a process of its own, in Triton's interpreter. On a
machine with a GPU, `pytest tests/ops/triton_norm.py` runs it there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segmamba.errors import BackendUnavailableError
from segmamba.ops import instance_norm
from segmamba.ops._triton import norm as kernels
from segmamba.ops.backends import triton_is_interpreted
from segmamba.ops.norm import fused_norm

DEVICE = "cpu" if triton_is_interpreted() else "cuda"
LAST = torch.channels_last_3d
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(2, 5, 3, 7, 9), (1, 48, 3, 3, 11), (2, 17, 1, 5, 3), (1, 1, 2, 3, 2)]
WIDE = [(1, 33, 3, 3, 3), (2, 96, 2, 2, 2), (1, 768, 1, 3, 2)]


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape) * 2 + 0.5
    return x.to(DEVICE, dtype).contiguous(memory_format=LAST)


def run(x: Tensor, residual: Tensor | None, weight: Tensor, **options) -> list[Tensor]:
    """The result, and the gradients of x and of the residual."""
    tensors = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    given = tensors[1] if residual is not None else None
    y = instance_norm(tensors[0], residual=given, **options)
    return [y.detach(), *torch.autograd.grad(y, tensors, weight.to(y.dtype))]


def compare(x: Tensor, residual: Tensor | None, tolerance: float, **options) -> None:
    """Hold what the kernels give against the formula in float64."""
    weight = torch.randn(x.shape, device=x.device)
    weight = weight.to(x.dtype)  # what both see
    found = run(x, residual, weight, backend="triton", **options)
    r64 = None if residual is None else residual.double()
    wanted = run(x.double(), r64, weight, backend="reference", **options)
    for ours, true in zip(found, wanted, strict=True):
        assert ours.is_contiguous(memory_format=LAST)
        error = (ours.double() - true).abs().max()
        assert error <= tolerance * true.abs().max() + 1e-30


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("join", [None, "before", "normed", "after"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_results_and_gradients(shape, join, activation, poison):
    residual = None if join is None else features(*shape)
    options = {"join": join or "before", "activation": activation}
    compare(features(*shape), residual, 3e-6, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("join", ["normed", "after"])
def test_half_precision(dtype, join, poison):
    x, residual = (features(*SHAPES[0], dtype=dtype) for _ in range(2))
    options = {"activation": "leaky_relu", "join": join, "slope": 0.2}
    compare(x, residual, TOLERANCE[dtype], **options)


@pytest.mark.parametrize("shape", [*SHAPES[2:], *WIDE], ids=str)
def test_any_number_of_channels(shape, poison):
    compare(features(*shape), None, 5e-6)


@pytest.mark.parametrize("channels", [1, 5, 12, 17, 33, 48, 96, 192, 384, 768, 4096])
def test_rows_hold_whole_channels_and_fill_their_columns(channels):
    width, columns = kernels.row_width(channels)
    assert width % channels == 0
    assert width % 8 == 0
    assert columns * 7 / 8 <= width <= columns <= kernels.TILE
    assert columns == 2 ** (columns.bit_length() - 1)


@pytest.mark.parametrize(("most", "chunks"), [(1024, 15), (6, 5)])
def test_many_chunks_and_long_merges(most, chunks, monkeypatch, poison):
    monkeypatch.setattr(kernels, "TILE", 512)
    monkeypatch.setattr(kernels, "CHUNKS", most)
    x = features(1, 48, 5, 5, 6)
    plan = kernels._Plan(x)
    assert plan.chunks == chunks
    entries = plan.chunks * plan.width // plan.channels
    assert most == 6 or entries > plan.merge_shape["ENTRIES"]
    compare(x, features(1, 48, 5, 5, 6), 3e-6, activation="relu", join="normed")


def test_far_from_zero():
    """Squares of plain values would leave nothing of a deviation of 1 at 1000."""
    x = features(1, 5, 6, 7, 8) / 2 + 1000
    compare(x, None, 1e-4)
    y = instance_norm(x, backend="triton")
    assert y.var(dim=(2, 3, 4), correction=0).sub(1).abs().max() < 1e-4


def test_first_voxel_far_from_the_others():
    x = features(1, 48, 4, 5, 6)
    x[:, :, 0, 0, :5] -= 3000.0
    compare(x, None, 1e-4)


def test_constant_channels_become_zero():
    x = features(2, 5, 3, 3, 3)
    x[:, 2] = 7.0
    leaf = x.clone().requires_grad_()
    y = instance_norm(leaf, activation="relu", backend="triton")
    assert not y[:, 2].any()
    y.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_residual_of_a_wider_type():
    x, residual = features(*SHAPES[0], dtype=torch.float16), features(*SHAPES[0])
    y = instance_norm(x, residual=residual, backend="triton")
    assert y.dtype == torch.float32
    x, residual = (t.detach().requires_grad_() for t in (x, residual))
    for join in ("before", "after"):
        y = instance_norm(x, residual=residual, join=join, backend="triton")
        found = torch.autograd.grad(y.sum(), (x, residual))
        assert [g.dtype for g in found] == [torch.float16, torch.float32]


def test_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 512)
    x, residual, weight = (features(1, 48, 3, 4, 5) for _ in range(3))
    options = {"backend": "triton", "activation": "relu", "join": "normed"}
    first = run(x, residual, weight, **options)
    second = run(x, residual, weight, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("join", [0, 2, 3])
def test_it_is_registered_well(join):
    x = features(2, 5, 3, 2, 4).requires_grad_()
    residual = features(2, 5, 3, 2, 4).requires_grad_() if join else None
    torch.library.opcheck(fused_norm, (x, residual, join, 0.01, 1e-5))


def test_it_compiles_as_one_graph():
    def block(x: Tensor) -> Tensor:
        return instance_norm(x, activation="relu", residual=x, backend="triton") * 2

    x = features(1, 5, 3, 3, 3).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(found, wanted)


def test_it_says_what_it_cannot_take():
    x = features(1, 5, 3, 3, 3)
    with pytest.raises(BackendUnavailableError, match="float32"):
        instance_norm(x.double(), backend="triton")
    with pytest.raises(BackendUnavailableError, match="channels_last"):
        instance_norm(x.contiguous(), backend="triton")
    with pytest.raises(BackendUnavailableError, match="4096 channels"):
        instance_norm(features(1, 4097, 1, 1, 2), backend="triton")
