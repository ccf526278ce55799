"""The instance norm's CUDA kernels against float64, emulated where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segmamba.errors import BackendUnavailableError
from segmamba.ops import instance_norm
from segmamba.ops._cuda import norm as kernels
from segmamba.ops.norm import fused_norm

LAST = torch.channels_last_3d
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(2, 5, 3, 7, 9), (1, 48, 3, 3, 11), (2, 17, 1, 5, 3), (1, 1, 2, 3, 2)]
WIDE = [(1, 36, 3, 3, 3), (2, 96, 2, 2, 2), (1, 768, 1, 3, 2), (1, 4095, 1, 3, 3)]


@pytest.fixture(autouse=True)
def device(cuda_device):
    """Where the tensors are."""
    torch.manual_seed(0)
    return cuda_device


@pytest.fixture(params=["one launch", "three launches"])
def way(request, monkeypatch):
    """How small and how large cases are done."""
    if request.param == "three launches":
        monkeypatch.setattr(kernels, "SMALL", 0)
        monkeypatch.setattr(kernels, "RESIDENT", 5)
    kernels._work.cache_clear()
    yield
    kernels._work.cache_clear()


@pytest.fixture
def features(device):
    def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape) * 2 + 0.5
        return x.to(device, dtype).contiguous(memory_format=LAST)

    return features


def run(x: Tensor, residual: Tensor | None, weight: Tensor, **options) -> list[Tensor]:
    """The result, and the gradients of x and of the residual."""
    tensors = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    given = tensors[1] if residual is not None else None
    y = instance_norm(tensors[0], residual=given, **options)
    return [y.detach(), *torch.autograd.grad(y, tensors, weight.to(y.dtype))]


def compare(x: Tensor, residual: Tensor | None, tolerance: float, **options) -> None:
    """Hold what the kernels give against the formula in float64."""
    weight = torch.randn(x.shape, device=x.device)
    weight = weight.to(x.dtype)  # what both see
    found = run(x, residual, weight, backend="cuda", **options)
    r64 = None if residual is None else residual.double()
    wanted = run(x.double(), r64, weight, backend="reference", **options)
    for ours, true in zip(found, wanted, strict=True):
        assert ours.is_contiguous(memory_format=LAST)
        error = (ours.double() - true).abs().max()
        assert error <= tolerance * true.abs().max() + 1e-30


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("join", [None, "before", "normed", "after"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_results_and_gradients(shape, join, activation, way, features, poison):
    residual = None if join is None else features(*shape)
    options = {"join": join or "before", "activation": activation}
    compare(features(*shape), residual, 3e-6, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("join", ["normed", "after"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_half_precision(shape, dtype, join, way, features, poison):
    x, residual = (features(*shape, dtype=dtype) for _ in range(2))
    options = {"activation": "leaky_relu", "join": join, "slope": 0.2}
    compare(x, residual, TOLERANCE[dtype], **options)


@pytest.mark.parametrize("shape", [*SHAPES[2:], *WIDE], ids=str)
def test_any_number_of_channels(shape, way, features, poison):
    compare(features(*shape), None, 5e-6)


def test_many_voxels(way, features, poison):
    """Threads take several rows at a time, and some that are left."""
    for shape in ((1, 48, 9, 10, 11), (2, 8, 13, 13, 13)):
        x, residual = features(*shape), features(*shape)
        compare(x, residual, 3e-6, activation="relu", join="normed")


SIZES = [(128, 48), (64, 96), (32, 192), (16, 384), (8, 768), (40, 5), (20, 4096)]


@pytest.mark.parametrize(("side", "channels"), SIZES)
@pytest.mark.parametrize("batch", [1, 2, 300])
def test_plans_cover_all_and_fill_a_gpu(side, channels, batch):
    voxels = side**3
    vector = 8 if channels % 8 == 0 else 1
    plan = kernels.plan_for(batch, voxels, channels, vector, 2, 132)
    rows = plan.threads // plan.columns
    assert rows * plan.columns == plan.threads <= 512
    assert plan.slices * plan.columns * vector >= channels
    assert plan.writers * plan.sweeps * rows >= voxels
    assert (plan.writers - 1) * plan.sweeps * rows < voxels
    assert (plan.chunks - 1) * rows < voxels
    if channels % 48 == 0:
        assert plan.threads % 32 == 0
        assert plan.threads >= 448
    if side in (32, 64, 128):
        assert 200 <= plan.chunks * plan.slices * batch <= max(300, batch)
    assert plan.small == (side <= 16)


def test_memory_that_is_not_aligned(device, way):
    memory = torch.randn(2 * 27 * 8 + 1, device=device)
    x = memory[1:].view(2, 3, 3, 3, 8).permute(0, 4, 1, 2, 3)
    assert x.is_contiguous(memory_format=LAST)
    compare(x, None, 3e-6)
    compare(x.bfloat16(), x, 1e-2)
    compare(x.clone()[1:], None, 3e-6)


def test_far_from_zero(way, features):
    """Squares of plain values would leave nothing of a deviation of 1 at 1000."""
    x = features(1, 5, 6, 7, 8) / 2 + 1000
    compare(x, None, 1e-4)
    y = instance_norm(x, backend="cuda")
    assert y.var(dim=(2, 3, 4), correction=0).sub(1).abs().max() < 1e-4


def test_first_voxel_far_from_the_others(way, features):
    x = features(1, 48, 4, 5, 6)
    x[:, :, 0, 0, :5] -= 3000.0
    compare(x, None, 1e-4)


def test_constant_channels_become_zero(way, features):
    x = features(2, 5, 3, 3, 3)
    x[:, 2] = 7.0
    leaf = x.clone().requires_grad_()
    y = instance_norm(leaf, activation="relu", backend="cuda")
    assert not y[:, 2].any()
    y.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_residual_of_a_wider_type(way, features):
    x, residual = features(*SHAPES[0], dtype=torch.float16), features(*SHAPES[0])
    y = instance_norm(x, residual=residual, backend="cuda")
    assert y.dtype == torch.float32
    x, residual = (t.detach().requires_grad_() for t in (x, residual))
    for join in ("before", "after"):
        y = instance_norm(x, residual=residual, join=join, backend="cuda")
        found = torch.autograd.grad(y.sum(), (x, residual))
        assert [g.dtype for g in found] == [torch.float16, torch.float32]


def test_layouts_of_the_residual_and_of_the_gradient(features):
    x, residual, weight = (features(1, 5, 3, 3, 4) for _ in range(3))
    options = {"backend": "cuda", "join": "before"}
    wanted = run(x, residual, weight, **options)
    found = run(x, residual.contiguous(), weight.contiguous(), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_same_bits_every_time(way, features):
    x, residual, weight = (features(1, 48, 3, 4, 5) for _ in range(3))
    options = {"backend": "cuda", "activation": "relu", "join": "normed"}
    first = run(x, residual, weight, **options)
    second = run(x, residual, weight, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("join", [0, 2, 3])
def test_it_is_registered_well(join, features):
    x = features(2, 5, 3, 2, 4).requires_grad_()
    residual = features(2, 5, 3, 2, 4).requires_grad_() if join else None
    torch.library.opcheck(fused_norm, (x, residual, join, 0.01, 1e-5))


@pytest.mark.parametrize("join", ["before", "normed", "after"])
def test_it_compiles_as_one_graph(join, features):
    def block(x: Tensor) -> Tensor:
        options = {"activation": "relu", "residual": x, "join": join}
        return instance_norm(x, backend="cuda", **options) * 2

    x = features(1, 5, 3, 3, 3).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(found, wanted)


def test_second_derivatives_are_refused(features):
    x = features(1, 5, 3, 3, 3).requires_grad_()
    y = instance_norm(x, backend="cuda").square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_it_says_what_it_cannot_take(features):
    x = features(1, 5, 3, 3, 3)
    with pytest.raises(BackendUnavailableError, match="float32"):
        instance_norm(x.double(), backend="cuda")
    with pytest.raises(BackendUnavailableError, match="channels_last"):
        instance_norm(x.contiguous(), backend="cuda")
    with pytest.raises(BackendUnavailableError, match="4096 channels"):
        instance_norm(features(1, 4097, 1, 1, 2), backend="cuda")
