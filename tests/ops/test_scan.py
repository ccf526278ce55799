"""The selective scan against loops over float64, on every back end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segmamba.errors import BackendUnavailableError, ConfigError, GeometryError
from segmamba.ops import available_backends, selective_scan
from segmamba.ops._primitives import scan_operator

LENGTHS = (1, 2, 3, 7, 63, 64, 65, 257)
BACKENDS = (
    ("reference", torch.float64, 1e-12),
    ("chunked", torch.float64, 1e-12),
    ("chunked", torch.float32, 5e-6),
    ("numba", torch.float32, 5e-6),
)
FORMS = {
    "constant": lambda b, d, n, L: (d, n),
    "position": lambda b, d, n, L: (b, n, L),
    "group": lambda b, d, n, L: (b, 2, n, L),
    "channel": lambda b, d, n, L: (b, d, n, L),
}


def make_inputs(length, b_form="position", c_form="position", channels=6, seed=0):
    rng = np.random.default_rng(seed)
    batch, states = 2, 3

    def draw(*shape):
        return rng.standard_normal(shape)

    return {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length) * 0.7,
        "A": -np.exp(draw(channels, states)),
        "B": draw(*FORMS[b_form](batch, channels, states, length)),
        "C": draw(*FORMS[c_form](batch, channels, states, length)),
        "D": draw(channels),
        "z": draw(batch, channels, length),
        "delta_bias": draw(channels),
    }


def as_tensors(inputs, dtype):
    return {k: torch.tensor(v).to(dtype).requires_grad_() for k, v in inputs.items()}


def assert_close(found, expected, tolerance, name=""):
    expected = torch.as_tensor(expected)
    error = (found.detach().double() - expected).abs().max()
    scale = expected.abs().max().clamp_min(1e-12)
    assert torch.isfinite(found).all(), name
    assert error <= tolerance * scale, f"{name}: {float(error / scale):.1e}"


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_is_the_formula(loops, poison, length, backend, dtype, tolerance):
    inputs = make_inputs(length)
    expected, last = loops.scan(**inputs, delta_softplus=True)
    with torch.no_grad():
        out, state = selective_scan(
            **as_tensors(inputs, dtype),
            delta_softplus=True,
            return_last_state=True,
            backend=backend,
        )
    assert out.dtype == dtype
    assert_close(out, expected, tolerance)
    assert_close(state, last, tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("b_form", FORMS)
@pytest.mark.parametrize("c_form", FORMS)
def test_every_form_of_b_and_c(loops, b_form, c_form, backend, dtype, tolerance):
    if backend == "numba" and "constant" in (b_form, c_form):
        pytest.skip("Numba has no constant B or C")
    inputs = make_inputs(11, b_form, c_form)
    expected, _ = loops.scan(**inputs, delta_softplus=True)
    out = selective_scan(
        **as_tensors(inputs, dtype), delta_softplus=True, backend=backend
    )
    assert_close(out, expected, tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("left_out", [(), ("D",), ("z",), ("delta_bias",), ("D", "z")])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(loops, left_out, softplus, backend, dtype, tolerance):
    inputs = {k: v for k, v in make_inputs(9).items() if k not in left_out}
    inputs["delta"] = np.abs(inputs["delta"])
    if "delta_bias" in inputs:
        inputs["delta_bias"] = np.abs(inputs["delta_bias"])
    expected, _ = loops.scan(**inputs, delta_softplus=softplus)
    out = selective_scan(
        **as_tensors(inputs, dtype), delta_softplus=softplus, backend=backend
    )
    assert_close(out, expected, tolerance)


def gradients(inputs, dtype, backend):
    """Gradients of a sum over out and last state, with weights of their own."""
    tensors = as_tensors(inputs, dtype)
    out, last = selective_scan(
        **tensors, delta_softplus=True, return_last_state=True, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for part in (out, last):
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        loss = loss + (part * weight.to(dtype)).sum()
    return dict(
        zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True)
    )


def finite_difference(loops, inputs, name, direction):
    """Directional derivative of the same sum by the loops."""

    def value(step):
        moved = {**inputs, name: inputs[name] + step * direction}
        total = 0.0
        generator = torch.Generator().manual_seed(1)
        for part in loops.scan(**moved, delta_softplus=True):
            shape = part.shape
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            total += (part * weight.numpy()).sum()
        return total

    step = 1e-5
    return (value(step) - value(-step)) / (2 * step)


@pytest.mark.parametrize("length", [1, 3, 7, 20])
def test_reference_gradients_are_the_loops(loops, length):
    inputs = make_inputs(length, "group", "position", channels=4)
    found = gradients(inputs, torch.float64, "reference")
    rng = np.random.default_rng(5)
    for name, value in inputs.items():
        direction = rng.standard_normal(value.shape)
        expected = finite_difference(loops, inputs, name, direction)
        along = float((found[name] * torch.tensor(direction)).sum())
        assert along == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS[1:])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["position", "group"])
def test_gradients(poison, length, form, backend, dtype, tolerance):
    inputs = make_inputs(length, form, "position", channels=20)
    expected = gradients(inputs, torch.float64, "reference")
    found = gradients(inputs, dtype, backend)
    tolerance = max(tolerance, 1e-11)
    for name, value in found.items():
        assert_close(value, expected[name], tolerance, name)


@pytest.mark.parametrize("forms", [("constant", "constant"), ("constant", "group")])
def test_gradients_of_constant_matrices(forms):
    inputs = make_inputs(30, *forms)
    expected = gradients(inputs, torch.float64, "reference")
    for name, value in gradients(inputs, torch.float64, "chunked").items():
        assert_close(value, expected[name], 1e-11, name)


def test_many_states_kept_in_pieces(monkeypatch):
    monkeypatch.setattr("segmamba.ops._chunked._STATE_BUDGET", 300)
    inputs = make_inputs(50, "group", "constant")
    expected = gradients(inputs, torch.float64, "reference")
    for name, value in gradients(inputs, torch.float64, "chunked").items():
        assert_close(value, expected[name], 1e-11, name)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("forms", [("group", "position"), ("constant", "position")])
def test_gradcheck(backend, forms):
    tensors = as_tensors(make_inputs(5, *forms, channels=2), torch.float64)

    def run(*values):
        arguments = dict(zip(tensors, values, strict=True))
        return selective_scan(
            **arguments, delta_softplus=True, return_last_state=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


@pytest.mark.parametrize("count", [2, 23])
def test_segments_give_the_same(threads, count):
    """With more threads than channel blocks the length is cut into segments."""
    inputs = make_inputs(700, "position", "position", channels=16)
    expected = gradients(inputs, torch.float64, "chunked")
    threads(count)
    for name, value in gradients(inputs, torch.float32, "numba").items():
        assert_close(value, expected[name], 5e-6, name)


@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_two_runs_give_the_same_bits(backend):
    inputs = make_inputs(300, "group", "position", channels=48)
    first = gradients(inputs, torch.float32, backend)
    second = gradients(inputs, torch.float32, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", ["reference", "chunked", "numba"])
def test_large_steps_and_rates_stay_finite(backend):
    """Decays of exp(-1e6) and sums of dt of 1e5 must not overflow anywhere."""
    length = {"reference": 400, "chunked": 1000, "numba": 4000}[backend]
    inputs = make_inputs(length, channels=3)
    inputs["A"] = -np.array([[1e-3, 1.0, 1e4]] * 3)
    inputs["delta"] = np.abs(inputs["delta"]) * 100
    for value in gradients(inputs, torch.float32, backend).values():
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked", "numba"])
def test_half_types_compute_in_float32(dtype, backend):
    tensors = as_tensors(make_inputs(40), dtype)
    out, last = selective_scan(
        **tensors, delta_softplus=True, return_last_state=True, backend=backend
    )
    wide = {k: v.detach().double() for k, v in tensors.items()}
    expected, state = selective_scan(
        **wide, delta_softplus=True, return_last_state=True, backend="reference"
    )
    assert (out.dtype, last.dtype) == (dtype, torch.float32)
    assert_close(last, state, 5e-6)
    assert_close(out, expected, 2 * torch.finfo(dtype).eps)
    out.sum().backward()
    assert all(x.grad.dtype == dtype for x in tensors.values())


def test_softplus_is_linear_above_20():
    one = torch.ones(1, 1, 1)
    for backend in ("reference", "chunked", "numba"):
        out = selective_scan(
            one, 30 * one, -torch.ones(1, 1), one, one, None, None, None, True,
            backend=backend,
        )  # fmt: skip
        assert float(out) == pytest.approx(30.0, rel=1e-6)


def test_empty_sequence():
    tensors = {k: v[..., :0] if v.ndim == 3 else v for k, v in make_inputs(4).items()}
    for backend in ("reference", "chunked", "numba"):
        out = selective_scan(**as_tensors(tensors, torch.float32), backend=backend)
        assert out.shape == (2, 6, 0)


def test_wrong_shapes_say_what_was_expected():
    tensors = as_tensors(make_inputs(8), torch.float32)
    wrong = {
        "delta": torch.zeros(2, 6, 7),
        "A": torch.zeros(5, 3),
        "B": torch.zeros(2, 4, 8),
        "C": torch.zeros(2, 4, 3, 8),
        "D": torch.zeros(3),
        "z": torch.zeros(1, 6, 8),
        "delta_bias": torch.zeros(6, 1),
        "u": torch.zeros(6, 8),
    }
    for name, value in wrong.items():
        with pytest.raises(GeometryError, match=f"{name} has the wrong shape"):
            selective_scan(**{**tensors, name: value})


def test_complex_matrices_are_refused():
    tensors = as_tensors(make_inputs(8), torch.float32)
    with pytest.raises(ConfigError, match="A is not"):
        selective_scan(**{**tensors, "A": tensors["A"].to(torch.complex64)})


def test_back_ends_that_cannot_run():
    tensors = as_tensors(make_inputs(8), torch.float64)
    with pytest.raises(BackendUnavailableError, match="float64"):
        selective_scan(**tensors, backend="numba")
    constant = as_tensors(make_inputs(8, "constant"), torch.float32)
    with pytest.raises(BackendUnavailableError, match="constant"):
        selective_scan(**constant, backend="numba")
    with pytest.raises(ConfigError, match="unknown back end"):
        selective_scan(**tensors, backend="fpga")
    assert set(available_backends()) >= {"reference", "chunked", "numba", "cuda"}


@pytest.mark.parametrize("backend", ["chunked", "numba"])
@pytest.mark.parametrize("constant", [False, True])
def test_opcheck(backend, constant):
    if constant and backend == "numba":
        pytest.skip("Numba has no constant B or C")
    B = torch.rand(6, 3) if constant else torch.rand(2, 9, 2, 3)
    tensors = [torch.rand(2, 9, 6), torch.rand(2, 9, 6), -torch.rand(6, 3), B]
    tensors.append(torch.rand(2, 9, 2, 3))
    tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(scan_operator, (*tensors, backend, True))
