"""The token norm against float64; its kernels emulated where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import BackendUnavailableError, ConfigError, GeometryError
from segmamba.ops import token_norm
from segmamba.ops._cuda import token_norm as kernels
from segmamba.ops.token_norm import fused_token_norm

BRAIN, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {FULL: 3e-6, HALF: 2e-3, BRAIN: 1e-2}
CHANNELS = [48, 96, 384, 1536, 2, 5, 12, 17, 40, 257, 1535, 2048]


@pytest.fixture
def device(cuda_device):
    """Where the kernels run."""
    torch.manual_seed(0)
    return cuda_device


@pytest.fixture
def draw(device):
    """Tokens, weight, bias, and the gradient of what comes out."""

    def draw(*shape: int, dtype: torch.dtype = FULL) -> list[Tensor]:
        x, grad = torch.randn(shape) * 2 + 0.5, torch.randn(shape)
        weight, bias = torch.randn(2, shape[-1]).unbind()
        found = [x.to(dtype), weight + 1, bias, grad.to(dtype)]
        return [t.to(device) for t in found]

    return draw


def run(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, **options):
    """The result, and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = token_norm(leaves[0], leaves[1], leaves[2], **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def compare(tensors: list[Tensor], tolerance: float, **options) -> None:
    """Hold what the kernels give against PyTorch in float64."""
    found = run(*tensors, backend="cuda", **options)
    wanted = run(*(t.double() for t in tensors), backend="reference", **options)
    for ours, true in zip(found, wanted, strict=True):
        error = (ours.double() - true).abs().max()
        assert error <= tolerance * true.abs().max() + 1e-30


@pytest.mark.parametrize("channels", CHANNELS)
def test_any_number_of_channels(channels, draw, poison):
    compare(draw(2, 67, channels), 5e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("channels", [48, 40, 7])
def test_types(channels, dtype, draw, poison):
    compare(draw(2, 150, channels, dtype=dtype), TOLERANCE[dtype])


def test_weights_of_half_precision(draw):
    tensors = [t.to(HALF) for t in draw(1, 9, 48)]
    compare(tensors, TOLERANCE[HALF])
    assert all(t.dtype == HALF for t in run(*tensors, backend="cuda"))


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_autocast_gives_the_result_its_type(dtype, draw, device):
    tensors = draw(2, 33, 48, dtype=dtype)
    with torch.autocast(device.type, BRAIN):
        found = run(*tensors, backend="cuda")
    tensors[3] = tensors[3].to(BRAIN)
    wanted = run(*(t.float() for t in tensors), backend="reference")
    types = [BRAIN, dtype, FULL, FULL]
    for ours, true, kind in zip(found, wanted, types, strict=True):
        assert ours.dtype == kind
        error = (ours.float() - true.float()).abs().max()
        assert error < 1e-2 * true.float().abs().max()


def test_far_from_zero(draw):
    """Squares of plain values would leave nothing of a deviation of 1 at 1000."""
    x, *others = draw(1, 20, 48)
    compare([x / 2 + 1000, *others], 2e-4)


def test_a_constant_token_becomes_the_bias(draw):
    x, weight, bias, grad = draw(1, 4, 16)
    x[:, 1] = 3.0
    y, *gradients = run(x, weight, bias, grad, backend="cuda")
    assert torch.equal(y[0, 1], bias)
    assert all(t.isfinite().all() for t in gradients)


def test_memory_that_is_not_aligned(draw):
    x, weight, bias, grad = draw(1, 11, 16)
    moved = torch.empty(x.numel() + 1, device=x.device)[1:].view_as(x).copy_(x)
    compare([moved, weight, bias, grad], 3e-6)
    compare([x, weight, torch.cat([bias[:1], bias])[1:], grad], 3e-6)


def test_layout_of_the_tokens_and_of_the_gradient(draw):
    x, weight, bias, grad = draw(2, 6, 8)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, grad)]
    wanted = run(x, weight, bias, grad, backend="cuda")
    found = run(turned[0], weight, bias, turned[1], backend="cuda")
    assert all(map(torch.equal, found, wanted))


def test_no_tokens(draw):
    y, of_x, of_weight, of_bias = run(*draw(2, 0, 8), backend="cuda")
    assert y.shape == of_x.shape == (2, 0, 8)
    assert not of_weight.any()
    assert not of_bias.any()


def test_same_bits_every_time(draw, monkeypatch):
    monkeypatch.setattr(kernels, "RESIDENT", 3)
    kernels._blocks.cache_clear()
    tensors = draw(2, 700, 48, dtype=BRAIN)
    runs = [run(*tensors, backend="cuda") for _ in range(2)]
    assert all(map(torch.equal, *runs))
    compare(tensors, TOLERANCE[BRAIN])
    kernels._blocks.cache_clear()


def test_threads_share_a_token_evenly():
    wanted = {6: 2, 12: 4, 24: 8, 48: 16, 96: 32, 192: 32, 1: 1, 5: 1, 257: 32, 9: 16}
    assert {n: kernels.lanes_for(n) for n in wanted} == wanted
    for vectors in range(1, 2049):
        lanes = kernels.lanes_for(vectors)
        assert -(-vectors // lanes) <= max(8, -(-vectors // 32))


def test_the_reference_is_torchs(draw):
    x, weight, bias, _ = draw(2, 5, 7)
    wanted = F.layer_norm(x, (7,), weight, bias, 0.1)
    assert torch.equal(token_norm(x, weight, bias, 0.1, backend="reference"), wanted)


def test_it_is_registered_well(draw):
    x, weight, bias, _ = draw(2, 3, 8, dtype=HALF)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(fused_token_norm, (*leaves, 1e-5, BRAIN))


def test_it_compiles_as_one_graph(draw):
    *tensors, _ = draw(2, 3, 8)
    runs = []
    torch.compiler.reset()
    compiled = torch.compile(token_norm, fullgraph=True, backend="aot_eager")
    for call in (token_norm, compiled):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = call(*leaves, backend="cuda")
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(map(torch.equal, *runs))


def test_it_says_what_it_cannot_take(draw):
    x, weight, bias, _ = draw(1, 2, 8)
    with pytest.raises(ConfigError, match="token norm"):
        token_norm(x, weight, bias, backend="metal")
    with pytest.raises(GeometryError, match="weight and bias"):
        token_norm(x, weight[:7], bias)
    with pytest.raises(BackendUnavailableError, match="float32"):
        token_norm(x.double(), weight.double(), bias.double(), backend="cuda")
    wide = torch.ones(2049, device=x.device)
    with pytest.raises(BackendUnavailableError, match="2048 channels"):
        token_norm(wide.view(1, 1, -1), wide, wide, backend="cuda")
