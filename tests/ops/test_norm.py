"""The instance norm: the reference against formulas, the kernels in an interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import BackendUnavailableError, ConfigError, GeometryError
from segmamba.ops import instance_norm

LAST = torch.channels_last_3d


def layouts(x: Tensor):
    """The same tensor in every order of its axes in memory."""
    for order in itertools.permutations(range(x.dim())):
        back = [order.index(axis) for axis in range(x.dim())]
        yield x.permute(order).contiguous().permute(back)


def formula(x: Tensor) -> Tensor:
    mean = x.mean((2, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean((2, 3, 4), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 3, 4), (2, 3, 2, 2, 3), (1, 1, 2, 2, 2), (2, 2, 2, 1, 1)]
)
def test_it_is_right_in_every_memory_layout(shape):
    """Also in those where torch's batch norm over volumes gives a wrong gradient."""
    x, weights = torch.randn(2, *shape, dtype=torch.float64)
    exact = x.clone().requires_grad_()
    wanted = formula(exact)
    (gradient,) = torch.autograd.grad(wanted, exact, weights)
    for layout in layouts(x):
        for outer in list(layouts(weights))[::7]:
            leaf = layout.detach().requires_grad_()
            found = instance_norm(leaf)
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
            (back,) = torch.autograd.grad(found, leaf, outer)
            torch.testing.assert_close(back, gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("join", ["before", "normed", "after"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_a_residual_joins_as_named(join, activation, layout):
    x, r, weights = torch.randn(3, 2, 3, 2, 3, 4, dtype=torch.float64)
    act = {
        None: lambda y: y,
        "relu": torch.relu,
        "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    }[activation]

    def wanted(x: Tensor, r: Tensor) -> Tensor:
        if join == "after":
            return act(formula(x)) + r
        return act(formula(x) + (formula(r) if join == "normed" else r))

    def found(x: Tensor, r: Tensor) -> Tensor:
        x, r = (t.contiguous(memory_format=layout) for t in (x, r))
        given = {"residual": r, "join": join, "activation": activation}
        return instance_norm(x, slope=0.2, **given)

    results = []
    for function in (wanted, found):
        leaves = [t.clone().requires_grad_() for t in (x, r)]
        y = function(*leaves)
        with torch.no_grad():
            torch.testing.assert_close(function(*leaves), y)
        results.append([y, *torch.autograd.grad(y, leaves, weights)])
    for true, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, true, atol=1e-9, rtol=1e-9)


def test_it_leaves_its_arguments_alone():
    x, r = torch.randn(2, 1, 3, 2, 3, 4)
    before = x.clone(), r.clone()
    with torch.no_grad():
        for join in ("before", "normed", "after"):
            instance_norm(x, activation="relu", residual=r, join=join)
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])


def test_it_keeps_channels_last():
    x = torch.randn(2, 4, 5, 6, 7).contiguous(memory_format=LAST)
    assert instance_norm(x).is_contiguous(memory_format=LAST)


def test_a_wider_residual_widens_the_result():
    x, r = torch.randn(1, 2, 3, 3, 3).bfloat16(), torch.randn(1, 2, 3, 3, 3)
    with torch.no_grad():
        for join in ("before", "after"):
            y = instance_norm(x, residual=r, join=join)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, formula(x.float()) + r, atol=0.02, rtol=0.02)


def test_wrong_arguments_are_named():
    x = torch.randn(1, 2, 3, 3, 3)
    for options in ({"activation": "gelu"}, {"join": "over"}, {"backend": "numba"}):
        with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
            instance_norm(x, **options)  # pyright: ignore
    with pytest.raises(GeometryError, match=r"\(B, C, D, H, W\)"):
        instance_norm(x[0])
    with pytest.raises(GeometryError, match=r"\(1, 2, 3, 3, 3\)"):
        instance_norm(x, residual=x[:, :1])


def test_cuda_is_refused_where_it_cannot_run():
    x = torch.randn(1, 2, 3, 3, 3).contiguous(memory_format=LAST)
    with pytest.raises(BackendUnavailableError, match="on cpu"):
        instance_norm(x, backend="cuda")
