"""Pairs that keep less give the same bits as norm and convolution one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import segmamba.ops.convolution3d as convolution
from segmamba.nn import blocks
from segmamba.nn.blocks import GatedSpatialConvolution, ResidualBlock, UpBlock
from segmamba.ops import conv3d, instance_norm
from segmamba.ops._cuda import norm as norm_kernels
from segmamba.ops.remade import norm_conv3d, norm_project, project_voxels, remakes

LAST = torch.channels_last_3d
BRAIN, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def device(cuda_device, monkeypatch):
    """Where the tensors are; emulated, they pass for a GPU's."""
    if cuda_device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    torch.manual_seed(0)
    return cuda_device


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """How the norms do small and large cases."""
    if request.param == "large":
        monkeypatch.setattr(norm_kernels, "SMALL", 0)
    norm_kernels._work.cache_clear()
    yield
    norm_kernels._work.cache_clear()


@pytest.fixture(params=["torch", "kernel"])
def way(request, monkeypatch, device):
    """What convolves half precision: PyTorch, or kernels for Hopper."""
    if request.param == "kernel":
        if device.type == "cuda" and not convolution._is_hopper(device):
            pytest.skip("the convolution's kernels are for Hopper")
        monkeypatch.setattr(convolution, "FEWEST_VOXELS", 1)


@pytest.fixture
def draw(device):
    def draw(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
        return torch.randn(shape).to(device, dtype).contiguous(memory_format=LAST)

    return draw


def is_image(x: Tensor) -> bool:
    """Whether these are features that need no gradient."""
    return x.shape[1] == 3 and x.shape[2] > 1


def outcome(call, *inputs: Tensor | None, weights=()) -> list[Tensor]:
    """The result under autocast to bfloat16 where any input has it, and gradients."""
    leaves = [
        x if x is None or is_image(x) else x.detach().requires_grad_() for x in inputs
    ]
    kinds = [x.dtype for x in inputs if x is not None]
    device = next(x for x in inputs if x is not None).device.type
    with torch.autocast(device, BRAIN, enabled=BRAIN in kinds):
        y = call(*leaves)
    torch.manual_seed(1)
    grad = torch.randn(y.shape).to(y.device, y.dtype)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [*wanted, *weights], grad)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    assert len(found) == len(wanted)
    return all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [FULL, BRAIN], ids=str)
def test_norm_and_convolution(dtype, activation, size, way, draw, poison):
    x, weight = draw(2, 16, 3, 4, 5, dtype=dtype), draw(16, 16, 3, 3, 3) / 20

    def pair(x: Tensor, weight: Tensor) -> Tensor:
        normed = instance_norm(x, activation=activation, backend="cuda")
        return conv3d(normed, weight)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        assert remakes(x, weight)
        return norm_conv3d(x, weight, activation=activation)

    assert same(outcome(one, x, weight), outcome(pair, x, weight))


@pytest.mark.parametrize("dtype", [FULL, BRAIN], ids=str)
@pytest.mark.parametrize("inputs", ["features", "two", "image"])
def test_norm_and_projection(inputs, dtype, size, draw, poison):
    first = draw(2, {"image": 3}.get(inputs, 5), 3, 4, 5)
    other = draw(2, 6, 3, 4, 5, dtype=dtype) if inputs == "two" else None
    if inputs != "image":  # which stays in float32
        first = first.to(dtype)
    channels = first.shape[1] + (6 if other is not None else 0)
    y, weight = draw(2, 8, 3, 4, 5, dtype=dtype), draw(8, channels, 1, 1, 1)

    def pair(y: Tensor, x: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
        shortcut = project_voxels(x, weight, other)
        return instance_norm(y, activation="relu", residual=shortcut, join="normed")

    def one(y: Tensor, x: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
        assert remakes(y, weight)
        return norm_project(y, x, weight, other, activation="relu")

    given = y, first, weight, other
    assert same(outcome(one, *given), outcome(pair, *given))


def test_a_projection_is_a_convolution(draw):
    x, other, weight = draw(2, 3, 2, 3, 4), draw(2, 5, 2, 3, 4), draw(6, 8, 1, 1, 1)
    whole = torch.cat((x, other), 1)
    with torch.backends.cudnn.flags(allow_tf32=False):
        wanted = torch.nn.functional.conv3d(whole, weight)
        torch.testing.assert_close(project_voxels(x, weight, other), wanted)
        assert torch.equal(project_voxels(whole, weight), wanted)


MODULES = {
    "first": (ResidualBlock(3, 16), [(2, 3, 3, 4, 5)]),
    "plain": (ResidualBlock(16, 16), [(2, 16, 3, 4, 5)]),
    "up": (UpBlock(8, 16), [(1, 8, 2, 3, 2), (1, 16, 4, 6, 4)]),
    "gated": (GatedSpatialConvolution(16), [(2, 16, 3, 4, 5)]),
}


@pytest.fixture(params=list(MODULES))
def module(request, device, draw):
    """A block, and features for it."""
    block, shapes = MODULES[request.param]
    return block.to(device), [draw(*shape, dtype=BRAIN) for shape in shapes]


def weights_of(block: torch.nn.Module) -> list[Tensor]:
    return [p for name, p in block.named_parameters() if not name.endswith("bias")]


def test_blocks_give_the_same_bits(module, way, monkeypatch):
    block, inputs = module
    runs, asked = [], []
    for pairs in (False, True):
        monkeypatch.setattr(
            blocks,
            "remakes",
            lambda *a, p=pairs: asked.append(p) or (p and remakes(*a)),
        )
        runs.append(outcome(block, *inputs, weights=weights_of(block)))
    assert same(*runs)
    assert asked.count(True) == asked.count(False) > 0


def test_checkpointing_gives_the_same_bits(module):
    block, inputs = module

    def saving(*inputs: Tensor) -> Tensor:
        return checkpoint(block, *inputs, use_reentrant=False)

    wanted = outcome(block, *inputs, weights=weights_of(block))
    assert same(outcome(saving, *inputs, weights=weights_of(block)), wanted)


def kept_numbers(block: torch.nn.Module, *inputs: Tensor) -> int:
    """Numbers in the maps that autograd keeps, each counted once."""
    found = {}

    def note(x: Tensor) -> Tensor:
        if x.dim() == 5 and x.shape[2:] == inputs[-1].shape[2:]:
            found[x.data_ptr()] = x
        return x

    with saved_tensors_hooks(note, lambda x: x):
        outcome(block, *inputs, weights=weights_of(block))
    return sum(x.numel() for x in found.values())


def test_blocks_keep_less(module, monkeypatch):
    block, inputs = module
    less = kept_numbers(block, *inputs)
    monkeypatch.setattr(blocks, "remakes", lambda *_: False)
    more = kept_numbers(block, *inputs)
    projected = getattr(getattr(block, "block", block), "conv3", None) is not None
    a_map = 16 * inputs[-1].numel() // inputs[-1].shape[1]
    saved = (2 if projected else 1) * a_map
    assert more - less == saved


def test_when_pairs_are_taken(draw, device):
    x, weight = draw(1, 8, 2, 2, 2), draw(8, 8, 3, 3, 3).requires_grad_()
    assert remakes(x, weight)
    assert not remakes(x, weight.detach())
    assert not remakes(x.contiguous(), weight)
    assert not remakes(x.to(BRAIN), weight)
    with torch.no_grad():
        assert not remakes(x, weight)
    with torch.autocast(device.type, BRAIN):
        assert not remakes(x, weight)
        assert remakes(x.to(BRAIN), weight)


def test_a_compiler_gets_the_pairs(device):
    torch.compiler.reset()
    block = ResidualBlock(4, 8).to(device)
    x = torch.randn(1, 4, 2, 3, 4, device=device).contiguous(memory_format=LAST)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_second_derivatives_are_refused(draw):
    x, weight = draw(1, 8, 2, 2, 2), draw(8, 8, 3, 3, 3).requires_grad_()
    y = norm_conv3d(x, weight, activation="relu").square().sum()
    (grad,) = torch.autograd.grad(y, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
