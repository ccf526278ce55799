"""`selective_scan` by CUDA kernels against float64: on a GPU, or emulated on CPUs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from segmamba.errors import ConfigError
from segmamba.ops import selective_scan
from segmamba.ops._cuda import selective
from segmamba.ops._cuda.selective_plan import plan_for
from segmamba.ops._primitives import selective_operator

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="too long for the emulator"
)

TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the largest value; for half types what rounding results costs."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CUTS = {
    "whole": {},
    "pairs": {"per": 2},
    "single": {"per": 1},
    "whole forward": {"back_steps": 32},
    "segments": {"steps": 64, "back_steps": 32},
    "single segments": {"per": 1, "steps": 64, "back_steps": 96},
    "two warps": {"per": 1, "warps": 2, "back_steps": 64},
}
"""Ways to cut a scan up."""


@pytest.fixture(autouse=True)
def _on_the_kernels_device(cuda_device):
    assert cuda_device.type == DEVICE.type
    selective._work_for.cache_clear()
    yield
    selective._work_for.cache_clear()


@pytest.fixture
def cut(monkeypatch):
    """Have scans cut up in a way of one's own."""
    real = selective.plan_for

    def cut(per=4, steps=1 << 20, back_steps=1 << 20, warps=4):
        def plan_for(sizes, processors, _):
            groups, per_group, length = sizes[1:]
            return dataclasses.replace(
                real(sizes, processors, warps),
                per=per,
                blocks=groups * -(-per_group // (8 * per)),
                steps=steps,
                segments=-(-length // steps),
                back_steps=back_steps,
                back_segments=-(-length // back_steps),
            )

        monkeypatch.setattr(selective, "plan_for", plan_for)

    return cut


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance) -> None:
    assert found.keys() == wanted.keys()
    for name, ours in found.items():
        assert ours.isfinite().all(), name
        error = (ours.double() - wanted[name]).abs().max()
        limit = tolerance * wanted[name].abs().max() + 1e-30
        assert error <= limit, f"{name}: {error / limit:.1e} of the limit"


def draw_inputs(length, channels=6, states=3, batch=2, groups=(1, 2), left_out=()):
    """Arguments of `selective_scan`, float32; 0 groups: a matrix without that axis."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Tensor:
        return torch.tensor(random.standard_normal(shape)).to(DEVICE, torch.float32)

    def matrix(count: int) -> Tensor:
        return draw(batch, *([count] if count else []), states, length)

    inputs = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length).abs() * 0.7,
        "A": -torch.exp(draw(channels, states)),
        "B": matrix(groups[0]),
        "C": matrix(groups[1]),
        "D": draw(channels),
        "z": draw(batch, channels, length),
        "delta_bias": draw(channels).abs(),
    }
    return {name: x for name, x in inputs.items() if name not in left_out}


def run(inputs, backend="cuda", dtype=None, weights=(1, 1), **options):
    """Output, last state, and gradients of a weighted sum over both."""
    leaves = {
        k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()
    }
    options = {"delta_softplus": True, **options}
    results = selective_scan(
        **leaves, return_last_state=True, backend=backend, **options
    )
    random = np.random.default_rng(1)
    loss = torch.zeros((), device=DEVICE, dtype=torch.float64)
    given = inputs["u"].dtype  # the truth too gets what half types can hold
    for result, weight in zip(results, weights, strict=True):
        values = torch.tensor(random.standard_normal(result.shape)).to(given)
        if weight:
            loss = loss + (result * values.to(result)).sum()
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    found = {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return {"output": results[0].detach(), "last": results[1].detach(), **found}


def check(
    inputs, tolerance=TOLERANCE[torch.float32], truth="reference", **options
) -> dict[str, Tensor]:
    found = run(inputs, **options)
    compare(found, run(inputs, truth, torch.float64, **options), tolerance)
    return found


# --- against the reference ------------------------------------------------------------


@pytest.mark.parametrize("way", CUTS)
@pytest.mark.parametrize("length", [101, 128])
def test_however_it_is_cut(cut, way, length, poison):
    cut(**CUTS[way])
    check(draw_inputs(length, channels=22, states=5))


@pytest.mark.parametrize("length", [1, 3, 4, 33])
def test_short_ones(length, poison):
    check(draw_inputs(length, states=16))


def test_many_channels_share_matrices(cut, poison):
    """Blocks of a group each give a part of B's and C's gradients."""
    cut(per=1, back_steps=32)
    check(draw_inputs(37, channels=70, groups=(1, 0), left_out=("z",)))


@pytest.mark.parametrize("groups", [(0, 0), (1, 0), (2, 3), (6, 0)], ids=str)
def test_every_form_of_b_and_c(groups, poison):
    check(draw_inputs(8, groups=groups))


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "D z delta_bias"])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(left_out, softplus, poison):
    inputs = draw_inputs(9, left_out=left_out.split())
    check(inputs, delta_softplus=softplus)


@pytest.mark.parametrize("weights", [(0, 1), (1, 0)], ids=["last state", "output"])
def test_gradients_of_one_result(cut, weights, poison):
    for way in ("whole forward", "segments"):
        cut(**CUTS[way])
        check(draw_inputs(70, left_out=("z",)), weights=weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [70, 72])
def test_half_types(cut, dtype, length, poison):
    cut(**CUTS["segments"])
    inputs = {k: v.to(dtype) for k, v in draw_inputs(length).items()}
    found = check(inputs, TOLERANCE[dtype])
    assert found.pop("last").dtype == torch.float32
    assert all(x.dtype == dtype for x in found.values())


def test_half_types_lose_no_more_than_their_rounding(poison):
    """In float32 inside: the output's only error is that of its last bit."""
    inputs = {k: v.bfloat16() for k, v in draw_inputs(70).items()}
    found = run(inputs)["output"].double()
    wanted = run(inputs, "reference", torch.float64)["output"]
    error = (found - wanted).abs() / (wanted.abs() + 1e-4 * wanted.abs().max())
    assert error.max() < 2**-8


def test_mixed_types(poison):
    inputs = draw_inputs(12)
    inputs["u"], inputs["z"] = inputs["u"].bfloat16(), inputs["z"].bfloat16()
    found = check(inputs, TOLERANCE[torch.bfloat16])
    assert found["output"].dtype == found["gradient of z"].dtype == torch.bfloat16
    assert found["gradient of delta"].dtype == torch.float32


def test_more_states_than_16(poison):
    check(draw_inputs(9, states=19, groups=(0, 2)))


def test_views(cut, poison):
    """Rows that don't begin on 16 bytes, and tensors that aren't contiguous."""
    cut(**CUTS["segments"])
    inputs = draw_inputs(72)
    wanted = run(inputs)
    apart = {k: torch.cat([v.new_zeros(1), v.flatten()]) for k, v in inputs.items()}
    apart = {k: apart[k][1:].view(v.shape) for k, v in inputs.items()}
    turned = {k: v.mT.contiguous().mT for k, v in inputs.items() if v.ndim > 1}
    assert apart["u"].data_ptr() % 16
    assert not turned["u"].is_contiguous()
    compare(run(apart), wanted, 0)
    compare(run({**inputs, **turned}), wanted, 0)


def test_steps_behind_the_end_do_not_matter(cut, poison):
    """Nor do channels of other groups: where nothing is, not-a-numbers are near."""
    cut(**CUTS["segments"])
    inputs = draw_inputs(68, groups=(2, 2))
    wanted = run(inputs)
    spoiled = {k: v.clone() for k, v in inputs.items()}
    for name in ("u", "delta", "z"):
        spoiled[name][:, 3:] = torch.nan
    for name in ("B", "C"):
        spoiled[name][:, 1] = torch.nan
    found = run(spoiled)
    for name in ("output", "last", "gradient of u", "gradient of delta"):
        assert torch.equal(found[name][:, :3], wanted[name][:, :3]), name
    for name in ("gradient of B", "gradient of C"):
        assert torch.equal(found[name][:, 0], wanted[name][:, 0]), name


def test_large_steps_and_rates_stay_finite(cut):
    """Decays of exp(-1e6) and sums of step sizes of 1e4 must not overflow anywhere."""
    cut(**CUTS["segments"])
    inputs = draw_inputs(200, channels=3, groups=(0, 0))
    inputs["A"] = -torch.tensor([[1e-3, 1.0, 1e4]] * 3, device=DEVICE)
    inputs["delta"] *= 100
    assert all(x.isfinite().all() for x in run(inputs).values())


def test_the_slope_of_small_steps_is_exact():
    """1 - exp(-dt) would cancel there."""
    inputs = draw_inputs(5, left_out=("delta_bias",))
    inputs["delta"] = inputs["delta"] - 12
    found = run(inputs)["gradient of delta"].double()
    wanted = run(inputs, "reference", torch.float64)["gradient of delta"]
    assert ((found - wanted).abs() <= 1e-4 * wanted.abs() + 1e-12).all()


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 15, 64, 300, 2049, 20000])
@pytest.mark.parametrize(
    "form", [(40, 16, 2), (256, 16, 2), (1024, 16, 2), (4096, 9, 1)], ids=str
)
def test_sizes_that_fill_a_gpu(form, length, dtype, poison):
    """The truth is PyTorch's in pieces: the loop over steps would take minutes."""
    channels, states, batch = form
    inputs = draw_inputs(length, channels, states, batch, (0, 1))
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    check(inputs, TOLERANCE[dtype], truth="chunked")


# --- what every operator owes ---------------------------------------------------------


@pytest.mark.parametrize("length", [70, pytest.param(40000, marks=needs_gpu)])
def test_same_bits_every_time(cut, length):
    if length == 70:
        cut(**CUTS["segments"])
    inputs = draw_inputs(length, channels=40)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_without_gradients_the_same_bits():
    inputs = draw_inputs(40)
    with torch.no_grad():
        lean = selective_scan(**inputs, delta_softplus=True, backend="cuda")
    assert torch.equal(lean, run(inputs)["output"])


@pytest.mark.parametrize("left_out", [(), ("D", "z", "delta_bias")])
def test_it_is_registered_well(left_out):
    inputs = draw_inputs(8, left_out=left_out)
    inputs["C"] = inputs["C"][:, :1].contiguous()
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    tensors = [inputs.get(name) for name in names]
    tensors = [x if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(selective_operator, (*tensors, True, not left_out, True))


@pytest.mark.parametrize("states", [3, 17])
def test_it_compiles_as_one_graph(states):
    inputs = draw_inputs(8, states=states, groups=(0, 2))

    def loss(u: Tensor) -> Tensor:
        given = {**inputs, "u": u}
        options = {"return_last_state": True, "backend": "cuda"}
        out, last = selective_scan(**given, delta_softplus=True, **options)
        return out.sum() + last.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = inputs["u"].clone().requires_grad_()
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(found, wanted)


def test_tensors_elsewhere_are_refused():
    inputs = draw_inputs(4)
    inputs["B"] = inputs["B"].to("meta")
    with pytest.raises(ConfigError, match="B isn't on the device of u"):
        selective_scan(**inputs, backend="cuda")


# --- how scans are cut up -------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "per", "segments", "back_segments"),
    [
        ((1, 1, 64, 512), 1, 1, 16),  # short
        ((1, 1, 64, 262144), 4, 256, 391),
        ((1, 1, 256, 4096), 4, 64, 64),
        ((1, 1, 1024, 32768), 4, 16, 24),
        ((2, 1, 2048, 4096), 2, 1, 6),  # channels alone fill the GPU
        ((64, 1, 2048, 4096), 4, 1, 1),
    ],
    ids=str,
)
def test_plans_for_an_h100(sizes, per, segments, back_segments):
    plan = plan_for(sizes, 132, 4)
    found = plan.per, plan.segments, plan.back_segments
    assert found == (per, segments, back_segments)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 2049, 100003])
@pytest.mark.parametrize("processors", [1, 2, 100])
def test_segments_cover_all_steps(length, processors):
    plan = plan_for((2, 3, 5, length), processors, 4)
    for steps, segments, unit in (
        (plan.steps, plan.segments, 64),
        (plan.back_steps, plan.back_segments, 32),
    ):
        assert steps * (segments - 1) < length <= steps * segments
        assert segments == 1 or steps % unit == 0


@pytest.mark.parametrize(
    ("way", "launches"), [("whole forward", (1, 3)), ("segments", (3, 4))]
)
def test_launches_are_few(cut, emulator, monkeypatch, way, launches):
    if DEVICE.type == "cuda":
        pytest.skip("counted with emulated kernels")
    cut(**CUTS[way])
    names, real = [], emulator.Kernel.__call__

    def call(self, *arguments, **options):
        names.append(self.name)
        real(self, *arguments, **options)

    monkeypatch.setattr(emulator.Kernel, "__call__", call)
    inputs = {k: v.requires_grad_() for k, v in draw_inputs(70).items()}
    out = selective_scan(**inputs, backend="cuda")
    forward = len(names)
    out.sum().backward()
    assert (forward, len(names) - forward) == launches
