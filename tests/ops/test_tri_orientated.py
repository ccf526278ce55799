"""The tri-orientated scan: loops, golden results, compile, export, two runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from segmamba.errors import GeometryError
from segmamba.ops import causal_conv1d, selective_scan, tri_orientated_scan
from segmamba.ops._primitives import tri_operator

BACKENDS = (
    ("reference", torch.float64, 1e-12),
    ("chunked", torch.float64, 1e-12),
    ("chunked", torch.float32, 5e-6),
    ("numba", torch.float32, 5e-6),
)
SUFFIXES = ("", "_b", "_s")


def make_inputs(length, channels=8, states=3, rank=2, taps=4, count=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (channels, 1, taps),
        (channels,),
        (rank + 2 * states, channels),
        (channels, rank),
        (channels,),
        (channels, states),
        (channels,),
    )
    xz = rng.standard_normal((2, length, 2 * channels))
    return xz, [[0.5 * rng.standard_normal(s) for _ in range(count)] for s in shapes]


def make_orders(length):
    stride = next(s for s in (13, 8, 7, 5, 3, 2, 1) if length % s == 0)
    return ((1, False), (1, True), (stride, False))


def as_tensors(xz, parameters, dtype):
    def make(x):
        return torch.tensor(x).to(dtype).requires_grad_()

    return make(xz), [[make(p) for p in kind] for kind in parameters]


def assert_close(found, expected, tolerance, name=""):
    expected = torch.as_tensor(expected)
    error = (found.detach().double() - expected).abs().max()
    scale = expected.abs().max().clamp_min(1e-12)
    assert torch.isfinite(found).all(), name
    assert error <= tolerance * scale, f"{name}: {float(error / scale):.1e}"


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 65, 257])
def test_is_the_formula(loops, poison, length, backend, dtype, tolerance):
    xz, parameters = make_inputs(length, channels=4)
    orders = (*make_orders(length), (make_orders(length)[2][0], True))
    parameters = [[*kind, kind[0]] for kind in parameters]
    x, p = as_tensors(xz, parameters, dtype)
    expected = loops.tri_scan(xz, parameters, orders)
    out = tri_orientated_scan(x, *p, orders=orders, backend=backend)
    assert out.dtype == dtype
    assert_close(out, expected, tolerance)
    with torch.no_grad():
        lean = tri_orientated_scan(x, *p, orders=orders, backend=backend)
    assert torch.equal(out, lean)


def gradients(xz, parameters, orders, dtype, backend):
    x, p = as_tensors(xz, parameters, dtype)
    tensors = [x, *(t for kind in p for t in kind)]
    out = tri_orientated_scan(x, *p, orders=orders, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(dtype)).sum(), tensors)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS[1:])
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1, (8, 3, 2, 4)),
        (2, (20, 4, 5, 2)),
        (3, (48, 16, 3, 4)),
        (7, (8, 3, 2, 4)),
        (63, (20, 4, 5, 2)),
        (64, (16, 3, 2, 4)),
        (65, (48, 16, 3, 4)),
        (260, (20, 4, 5, 2)),
    ],
)
def test_gradients(poison, length, sizes, backend, dtype, tolerance):
    xz, parameters = make_inputs(length, *sizes)
    orders = make_orders(length)
    expected = gradients(xz, parameters, orders, torch.float64, "reference")
    found = gradients(xz, parameters, orders, dtype, backend)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, b, max(tolerance, 1e-11), f"gradient {i}")


@pytest.mark.parametrize("slab", [1, 64 * 32 * 2])
def test_slabs_and_segments_give_the_same(threads, monkeypatch, slab):
    """Slabs of a tile, with a short one at the end; more threads than blocks."""
    from segmamba.ops._numba import tri_scan as module

    xz, parameters = make_inputs(1300, 32, 4, 3)
    orders = make_orders(1300)
    expected = gradients(xz, parameters, orders, torch.float64, "chunked")
    threads(23)
    if slab == 1:
        monkeypatch.setattr(module, "_SLAB_FLOATS", slab)
    found = gradients(xz, parameters, orders, torch.float32, "numba")
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_two_runs_give_the_same_bits(backend):
    xz, parameters = make_inputs(300, 48, 8, 3)
    arguments = (xz, parameters, make_orders(300), torch.float32, backend)
    for a, b in zip(gradients(*arguments), gradients(*arguments), strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    x, p = as_tensors(*make_inputs(4, 2, 1, 1, 2), torch.float64)
    tensors = [x, *(t for kind in p for t in kind)]

    def run(x, *flat):
        kinds = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        return tri_orientated_scan(x, *kinds, orders=make_orders(4), backend="chunked")

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_half_types_and_autocast_scan_in_float32(dtype, backend):
    xz, parameters = make_inputs(60, 16, 4, 2)
    orders = make_orders(60)
    x, p = as_tensors(xz, parameters, torch.float32)
    half = x.detach().to(dtype)
    exact = tri_orientated_scan(half.float(), *p, orders=orders, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        out = tri_orientated_scan(half, *p, orders=orders, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))
    out.float().sum().backward()
    assert all(torch.isfinite(t.grad).all() for kind in p for t in kind)


class Mixer(torch.nn.Module):
    """A published mixer's arithmetic around the operator."""

    def __init__(self, weights, orders, backend):
        super().__init__()
        self.names = {k.replace(".", "__"): k for k in weights}
        for name, key in self.names.items():
            self.register_parameter(name, torch.nn.Parameter(weights[key]))
        self.orders, self.backend = orders, backend

    def weight(self, name):
        return getattr(self, name.replace(".", "__"))

    def forward(self, h):
        used = SUFFIXES[: len(self.orders)]
        names = [f"conv1d{{}}.{w}" for w in ("weight", "bias")]
        names += ["x_proj{}.weight", "dt_proj{}.weight", "dt_proj{}.bias"]
        kinds = [[self.weight(n.format(s)) for s in used] for n in names]
        kinds.append([self.weight(f"A{s}_log") for s in used])
        kinds.append([self.weight(f"D{s}") for s in used])
        xz = F.linear(h, self.weight("in_proj.weight"))
        y = tri_orientated_scan(xz, *kinds, orders=self.orders, backend=self.backend)
        return F.linear(y, self.weight("out_proj.weight"))


def load_golden(path, dtype):
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["golden"])["config"]
    weights = {k[2:]: v.to(dtype) for k, v in tensors.items() if k.startswith("w/")}
    return tensors, weights, config


@pytest.mark.parametrize(
    ("backend", "dtype", "block", "parameter"),
    [
        ("reference", torch.float64, 1e-9, 1e-9),
        ("chunked", torch.float64, 1e-9, 1e-9),
        ("chunked", torch.float32, 5e-6, 2e-4),
        ("numba", torch.float32, 5e-6, 2e-4),
    ],
)
@pytest.mark.parametrize(
    "name", ["mamba_v2", "mamba_v3_cube", "mamba_v3_noncube", "mamba_v3_rank2"]
)
def test_golden(golden_folder, name, backend, dtype, block, parameter):
    path = golden_folder / f"{name}.safetensors"
    tensors, weights, config = load_golden(path, dtype)
    orders = [(1, False), (1, True)]
    if "A_s_log" in weights:
        orders.append((config["nslices"], False))
    mixer = Mixer(weights, tuple(orders), backend)
    h = tensors["input"].to(dtype).requires_grad_()
    out = mixer(h)
    out.backward(tensors["grad_out"].to(dtype))
    assert_close(out, tensors["output"], block)
    assert_close(h.grad, tensors["grad_input"], block)
    expected = {k[3:]: v for k, v in tensors.items() if k.startswith("gw/")}
    floor = 0.01 * max(v.abs().max() for v in expected.values())
    assert set(expected) == set(mixer.names.values())
    for key, value in expected.items():
        error = (mixer.weight(key).grad.double() - value).abs().max()
        assert error <= parameter * max(value.abs().max(), floor), key


def small_mixer(backend):
    """A mixer of 8 channels for 24 tokens, with random weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {"in_proj.weight": draw(32, 8), "out_proj.weight": draw(8, 16)}
    for s in SUFFIXES:
        weights[f"conv1d{s}.weight"] = draw(16, 1, 4)
        weights[f"conv1d{s}.bias"] = draw(16)
        weights[f"x_proj{s}.weight"] = draw(10, 16)
        weights[f"dt_proj{s}.weight"] = draw(16, 2)
        weights[f"dt_proj{s}.bias"] = draw(16)
        weights[f"A{s}_log"] = draw(16, 4)
        weights[f"D{s}"] = draw(16)
    return Mixer(weights, ((1, False), (1, True), (4, False)), backend)


def compile_and_compare(backend, compiler):
    mixer, h = small_mixer(backend), torch.randn(1, 24, 8)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=compiler)
    results = []
    for run in (mixer, compiled):
        mixer.zero_grad()
        out = run(h)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in mixer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(h), mixer(h), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_compiles_without_graph_breaks(backend):
    compile_and_compare(backend, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    compile_and_compare("auto", "inductor")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_public_functions_compile(backend):
    def run(u, weight, delta, A, B):
        u = causal_conv1d(u, weight, None, "silu", backend=backend)
        return selective_scan(u, delta, A, B, B, backend=backend)

    arguments = [torch.rand(1, 16, 12), torch.rand(16, 4), torch.rand(1, 16, 12)]
    arguments += [-torch.rand(16, 4), torch.rand(1, 4, 12)]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["chunked", "numba"])
def test_exports(backend):
    mixer, h = small_mixer(backend).eval(), torch.randn(1, 24, 8)
    with torch.no_grad():
        program = torch.export.export(mixer, (h,))
        torch.testing.assert_close(program.module()(h), mixer(h))


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep):
    _, parameters = make_inputs(12, 16, 4, 2)
    _, p = as_tensors(np.zeros(1), parameters, torch.float32)
    flat = []
    for taps, bias, x_proj, dt_proj, *rest in zip(*p, strict=True):
        flat += [taps.squeeze(1).T, bias, x_proj, dt_proj.T, *rest]
    flat = [t.detach().contiguous().requires_grad_(keep) for t in flat]
    xz = torch.rand(2, 12, 32, requires_grad=keep)
    torch.library.opcheck(tri_operator, (xz, flat, [1, 1, 4], [0, 1, 0], keep))


def test_wrong_arguments():
    xz, parameters = make_inputs(12)
    x, p = as_tensors(xz, parameters, torch.float32)
    orders = make_orders(12)
    with pytest.raises(GeometryError, match="divide the number of tokens"):
        tri_orientated_scan(x, *p, orders=((1, False), (1, True), (5, False)))
    with pytest.raises(GeometryError, match="every direction"):
        tri_orientated_scan(x, *p, orders=orders[:2])
    names = "conv_weight conv_bias x_proj_weight dt_proj_weight dt_proj_bias A_log D"
    for i, name in enumerate(names.split()):
        wrong = [list(kind) for kind in p]
        wrong[i][1] = torch.zeros(3)
        with pytest.raises(GeometryError, match=f"{name} has the wrong shape"):
            tri_orientated_scan(x, *wrong, orders=orders)
    with pytest.raises(GeometryError, match="xz has the wrong shape"):
        tri_orientated_scan(x[..., :-1], *p, orders=orders)


def test_works_where_numba_is_missing():
    """In a fresh interpreter in which numba can't be imported."""
    code = """
import sys
sys.modules["numba"] = None
import torch
from segmamba import ops
from segmamba.errors import BackendUnavailableError
assert "can't be imported" in ops.available_backends()["numba"]
x = [torch.rand(1, 2, 5), torch.rand(1, 2, 5), -torch.rand(2, 3)]
x += [torch.rand(1, 3, 5), torch.rand(1, 3, 5)]
assert ops.selective_scan(*x).shape == (1, 2, 5)
assert ops.causal_conv1d(x[0], torch.rand(2, 4)).shape == (1, 2, 5)
try:
    ops.selective_scan(*x, backend="numba")
except BackendUnavailableError:
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "refused", done.stderr


def test_import_compiles_nothing_and_needs_no_numba():
    code = "import sys, segmamba.ops; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


def test_several_python_threads_may_call_at_once():
    """Numba's own threading layer would crash or mix results up."""
    xz, parameters = make_inputs(600, 32, 4, 3)
    arguments = (xz, parameters, make_orders(600), torch.float32, "numba")
    expected = gradients(*arguments)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: gradients(*arguments), range(8)))
    for result in results:
        for a, b in zip(result, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


BITS = """
import hashlib, torch
from segmamba.nn import create_network
torch.manual_seed(0)
network = create_network("segmamba-light", in_channels=1, out_channels=2, dims=(8, 16))
answer = network(torch.randn(1, 1, 16, 16, 16))
(answer if torch.is_tensor(answer) else answer[0]).square().mean().backward()
digest = hashlib.sha256()
for parameter in network.parameters():
    if parameter.grad is not None:
        digest.update(parameter.grad.numpy().tobytes())
print(digest.hexdigest())
"""


def test_compiled_and_cached_kernels_give_the_same_bits(tmp_path):
    """What was compiled in this process runs its callees' code, the cache its own."""
    command = [sys.executable, "-c", BITS]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert any(tmp_path.rglob("*.nbc"))
    assert len(first) == 65
    assert first == second
