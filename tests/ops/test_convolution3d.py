"""The 3x3x3 convolution's kernels against float64, emulated where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segmamba.ops.convolution3d as convolution
from segmamba.ops import conv3d
from segmamba.ops._cuda import conv3d as kernels

LAST = torch.channels_last_3d
HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 2e-3, BRAIN: 8e-3}
"""Of a result, over the largest number; it is rounded once or twice."""
SUMS = 3e-6
"""The same of the weights' gradient, which is float32."""

CASES = [
    ((1, 16, 3, 9, 17), 16, BRAIN, 1),
    ((2, 16, 4, 8, 16), 32, HALF, 7),
    ((1, 48, 5, 5, 9), 48, BRAIN, 3),
    ((1, 32, 3, 5, 9), 64, HALF, 2),
    ((1, 96, 2, 3, 9), 96, BRAIN, 2),
    ((2, 24, 6, 17, 3), 16, HALF, 11),
    ((1, 8, 1, 1, 1), 16, BRAIN, 4),
]
FEW = [((1, n, 5, 10, 18), 16, BRAIN, 2) for n in (1, 3, 4, 5)]


@pytest.fixture(autouse=True)
def device(cuda_device, monkeypatch):
    """Where the tensors are; maps of any size go through the kernels."""
    if cuda_device.type == "cuda" and not convolution._is_hopper(cuda_device):
        pytest.skip("the convolution's kernels are for Hopper")
    monkeypatch.setattr(convolution, "FEWEST_VOXELS", 1)
    torch.manual_seed(0)
    return cuda_device


@pytest.fixture(params=["late copies", "early copies"])
def copies(request, monkeypatch, device):
    """When an emulated GPU copies what nobody waits for."""
    if device.type == "cuda":
        yield
        return
    emulator = request.getfixturevalue("emulator")
    if request.param == "early copies":
        options = (*emulator.OPTIONS, "-DEAGER_COPIES")
        monkeypatch.setattr(emulator, "OPTIONS", options)
    emulator.library.cache_clear()
    yield
    emulator.library.cache_clear()


@pytest.fixture
def processors(monkeypatch, device):
    """Set how many blocks an emulated GPU holds."""

    def of(count: int) -> None:
        if device.type == "cpu":
            monkeypatch.setattr(kernels, "_multiprocessors", lambda device: count)

    return of


@pytest.fixture
def draw(device):
    """Features and a kernel."""

    def draw(shape, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = torch.randn(outputs, shape[1], 3, 3, 3) / (27 * shape[1]) ** 0.5
        x = torch.randn(shape).to(device, dtype).contiguous(memory_format=LAST)
        return x, weight.to(device)

    return draw


def gradients(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The convolution and its gradients in float64, of what the kernels see."""
    inputs = [x.double(), weight.to(x.dtype).double()]
    inputs = [t.requires_grad_() for t in inputs]
    y = F.conv3d(*inputs, padding=1)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.double())]


def error(found: Tensor, true: Tensor) -> float:
    assert found.shape == true.shape
    return ((found.double() - true).abs().max() / true.abs().max()).item()


@pytest.mark.parametrize(("shape", "outputs", "dtype", "blocks"), CASES + FEW, ids=str)
def test_results_and_gradients(
    shape, outputs, dtype, blocks, copies, processors, draw, poison
):
    processors(blocks)
    x, weight = draw(shape, outputs, dtype)
    y = kernels.convolve(x, weight, None)
    grad = torch.randn_like(y)
    of_x, rest = kernels.input_gradients(grad, weight, shape[1])
    of_weight = kernels.weight_gradient(grad, x, None)
    wanted = gradients(x, weight, grad)
    assert error(y, wanted[0]) < TOLERANCE[dtype]
    assert error(of_x, wanted[1]) < TOLERANCE[dtype]
    assert error(of_weight, wanted[2]) < SUMS
    assert rest.numel() == 0
    for found in (y, of_x, of_weight):
        assert found.is_contiguous(memory_format=LAST)


def test_two_inputs_are_as_one(processors, draw, poison):
    processors(3)
    x, weight = draw((2, 48, 3, 4, 10), 32, HALF)
    first, second = (
        part.contiguous(memory_format=LAST) for part in x.split([32, 16], 1)
    )
    y = kernels.convolve(first, weight, second)
    grad = torch.randn_like(y)
    wanted = gradients(x, weight, grad)
    assert error(y, wanted[0]) < TOLERANCE[HALF]
    of_inputs = kernels.input_gradients(grad, weight, 32)
    assert error(torch.cat(of_inputs, 1), wanted[1]) < TOLERANCE[HALF]
    assert error(kernels.weight_gradient(grad, first, second), wanted[2]) < SUMS


def test_any_layout_and_type_of_the_kernel(draw):
    x, weight = draw((1, 16, 2, 3, 4), 16, BRAIN)
    wanted = kernels.convolve(x, weight, None)
    for other in (weight.contiguous(memory_format=LAST), weight.to(BRAIN)):
        assert torch.equal(kernels.convolve(x, other, None), wanted)


def test_memory_that_is_not_aligned(draw, device):
    x, weight = draw((1, 16, 2, 3, 4), 16, BRAIN)
    memory = torch.empty(x.numel() + 1, dtype=BRAIN, device=device)
    moved = memory[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert moved.data_ptr() % 16
    wanted = kernels.convolve(x, weight, None)
    assert torch.equal(kernels.convolve(moved, weight, None), wanted)


def test_a_launch_has_few_enough_channels():
    assert kernels.pieces(48, 48) == (48, 48)
    assert kernels.pieces(4, 48) == (4, 48)
    assert kernels.pieces(32, 64) == (32, 64)
    assert kernels.pieces(48, 40) is None
    for inputs in range(1, 200):
        for outputs in range(8, 200, 8):
            count = kernels.launches(inputs, outputs)
            sizes = kernels.pieces(inputs, outputs)
            assert (count == 0) == (sizes is None) or inputs < 8
            if sizes:
                assert kernels._shared(*sizes) <= 227 * 1024
                assert kernels._shared_of_gradient(48, sizes[1]) <= 227 * 1024


# --- the public function --------------------------------------------------------------


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels' functions that are called."""
    seen = []
    for name in ("convolve", "input_gradients", "weight_gradient"):
        real = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, _n=name, _r=real: seen.append(_n) or _r(*a)
        )
    return seen


def test_autocast_chooses_the_type(draw, device, launches):
    x, weight = draw((1, 16, 3, 4, 5), 16, torch.float32)
    given = leaves(x, weight)
    with torch.autocast(device.type, BRAIN):
        y = conv3d(*given)
    y.float().square().sum().backward()
    assert launches == ["convolve", "input_gradients", "weight_gradient"]
    assert y.dtype == BRAIN
    true = leaves(x.to(BRAIN).double(), weight.to(BRAIN).double())
    F.conv3d(*true, padding=1).square().sum().backward()
    for found, wanted in zip(given, true, strict=True):
        assert found.grad.dtype == torch.float32
        assert error(found.grad, wanted.grad) < 2e-2


def test_gradients_that_nobody_wants_are_not_computed(draw, launches):
    x, weight = draw((1, 16, 2, 3, 4), 16, BRAIN)
    conv3d(x, leaves(weight)[0]).sum().backward()
    assert launches == ["convolve", "weight_gradient"]
    launches.clear()
    conv3d(leaves(x)[0], weight).sum().backward()
    assert launches == ["convolve", "input_gradients"]


def test_two_inputs_have_gradients_each(draw, launches):
    x, weight = draw((1, 32, 2, 3, 4), 16, HALF)
    first, second, kernel = leaves(*x.split(16, 1), weight)
    whole, joined = leaves(weight.double(), x.double())
    conv3d(first, kernel, second).square().sum().backward()
    F.conv3d(joined, whole, padding=1).square().sum().backward()
    parts = torch.cat((first.grad, second.grad), 1)
    assert error(parts, joined.grad) < 2e-2
    assert error(kernel.grad, whole.grad) < 2e-2
    assert len(launches) == 3


@pytest.mark.parametrize("why", ["type", "layout", "channels", "size", "cudnn"])
def test_torch_does_the_rest(why, draw, device, launches, monkeypatch):
    channels = {"channels": (18, 16), "cudnn": (64, 64)}.get(why, (16, 16))
    x, weight = draw((1, channels[0], 2, 3, 4), channels[1], BRAIN)
    if why == "type":
        x = x.float()
    if why == "layout":
        x = x.contiguous()
    if why == "size":
        monkeypatch.setattr(convolution, "FEWEST_VOXELS", 25)
    y = conv3d(x, weight.to(x.dtype))
    assert launches == []
    wanted = F.conv3d(x.double(), weight.to(x.dtype).double(), padding=1)
    assert error(y, wanted) < TOLERANCE[BRAIN]


def test_other_inputs_are_joined_for_torch(draw, launches):
    x, weight = draw((2, 10, 3, 4, 5), 6, torch.float32)
    found = conv3d(x[:, :4], weight, x[:, 4:])
    torch.testing.assert_close(found, F.conv3d(x, weight, padding=1))
    assert launches == []


def test_same_bits_every_time(processors, draw):
    processors(5)
    x, weight = draw((2, 16, 5, 9, 17), 16, BRAIN)
    runs = []
    for _ in range(2):
        given = leaves(x, weight)
        y = conv3d(*given)
        y.square().sum().backward()
        runs.append([y, *(t.grad for t in given)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_registered_well(parts, draw):
    x, weight = draw((1, 32, 2, 3, 4), 16, BRAIN)
    given = x.split(32 // parts, 1)
    given = [t.contiguous(memory_format=LAST) for t in given]
    first, kernel, *others = leaves(given[0], weight, *given[1:])
    other = others[0] if others else None
    torch.library.opcheck(convolution.fused_conv3d, (first, kernel, other))


@pytest.mark.parametrize("parts", [1, 2])
def test_it_compiles_as_one_graph(parts, draw, launches):
    x, weight = draw((1, 32, 2, 3, 4), 16, BRAIN)
    given = [t.contiguous(memory_format=LAST) for t in x.split(32 // parts, 1)]
    runs = []
    torch.compiler.reset()
    for call in (conv3d, torch.compile(conv3d, fullgraph=True, backend="aot_eager")):
        first, kernel, *others = leaves(given[0], weight, *given[1:])
        y = call(first, kernel, *others)
        y.square().sum().backward()
        runs.append([y, first.grad, kernel.grad, *(t.grad for t in others)])
    assert all(map(torch.equal, *runs))
    assert len(launches) == 6
