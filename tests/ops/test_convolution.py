"""The causal convolution against a loop over float64, on every back end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segmamba.errors import BackendUnavailableError, ConfigError, GeometryError
from segmamba.ops import causal_conv1d
from segmamba.ops._primitives import conv_operator

LENGTHS = (1, 2, 3, 7, 63, 64, 65, 257)
BACKENDS = (
    ("reference", torch.float64, 1e-13),
    ("chunked", torch.float64, 1e-13),
    ("chunked", torch.float32, 2e-6),
    ("numba", torch.float32, 2e-6),
)


def make_inputs(length, taps=4, channels=5):
    rng = np.random.default_rng(0)
    shapes = ((2, channels, length), (channels, taps), (channels,))
    return [rng.standard_normal(shape) for shape in shapes]


def assert_close(found, expected, tolerance):
    expected = torch.as_tensor(expected)
    assert torch.isfinite(found).all()
    error = (found.detach().double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_is_the_formula(loops, poison, length, backend, dtype, tolerance):
    inputs = make_inputs(length)
    tensors = [torch.tensor(x).to(dtype) for x in inputs]
    for activation in (None, "silu", "swish"):
        expected = loops.convolution(*inputs, silu=activation is not None)
        out = causal_conv1d(*tensors, activation, backend=backend)
        assert out.dtype == dtype
        assert_close(out, expected, tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_fewer_taps_and_no_bias(loops, taps, backend, dtype, tolerance):
    x, weight, _ = make_inputs(9, taps)
    out = causal_conv1d(
        torch.tensor(x).to(dtype), torch.tensor(weight).to(dtype), backend=backend
    )
    assert_close(out, loops.convolution(x, weight), tolerance)


def gradients(inputs, dtype, backend, activation):
    tensors = [torch.tensor(x).to(dtype).requires_grad_() for x in inputs]
    out = causal_conv1d(*tensors, activation, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(dtype)).sum(), tensors)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS[1:])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients(poison, length, activation, backend, dtype, tolerance):
    for taps, channels in ((4, 20), (2, 16)):
        inputs = make_inputs(length, taps, channels)
        expected = gradients(inputs, torch.float64, "reference", activation)
        found = gradients(inputs, dtype, backend, activation)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, tolerance)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    tensors = [torch.tensor(x).requires_grad_() for x in make_inputs(6, 3, 2)]
    assert torch.autograd.gradcheck(
        lambda *t: causal_conv1d(*t, "silu", backend=backend), tensors
    )


def test_five_taps_are_left_to_pytorch(loops):
    inputs = make_inputs(9, taps=5)
    tensors = [torch.tensor(x).float() for x in inputs]
    assert_close(causal_conv1d(*tensors), loops.convolution(*inputs), 2e-6)
    with pytest.raises(BackendUnavailableError, match="4 taps"):
        causal_conv1d(*tensors, backend="numba")


def test_wrong_arguments():
    x, weight, bias = (torch.tensor(v).float() for v in make_inputs(9))
    with pytest.raises(ConfigError, match="unknown activation"):
        causal_conv1d(x, weight, bias, "relu")
    with pytest.raises(GeometryError, match="weight has the wrong shape"):
        causal_conv1d(x, weight[:-1], bias)
    with pytest.raises(GeometryError, match="bias has the wrong shape"):
        causal_conv1d(x, weight, bias[:-1])
    with pytest.raises(GeometryError, match="x has the wrong shape"):
        causal_conv1d(x[0], weight, bias)


def test_opcheck():
    tensors = [torch.rand(2, 9, 5), torch.rand(5, 4), torch.rand(5)]
    tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(conv_operator, (*tensors, True))
