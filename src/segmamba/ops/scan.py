"""The selective scan, with the interface that the field knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import ConfigError, GeometryError, describe
from segmamba.ops._layout import GPU_STATES, ScanInputs
from segmamba.ops._primitives import scan_rows, selective
from segmamba.ops._reference import scan_reference
from segmamba.ops.backends import resolve_backend


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a selective state-space scan; takes what `selective_scan_fn` takes.

    With dt = softplus(delta + delta_bias), or without softplus, the state s (D x N) of
    each case follows s_t = exp(dt_t A) s_{t-1} + dt_t u_t B_t, and the output is
    (s_t C_t + D u_t) silu(z_t). State and sums are float32 for half types.

    Args:
        u: Input, (batch, D, L).
        delta: Step sizes before bias and softplus, (batch, D, L).
        A: Decay rates, real, (D, N); negative for a stable scan.
        B: Input matrix: constant (D, N), a position (batch, N, L), or by groups of
            channels (batch, G, N, L), G a divisor of D.
        C: Output matrix, in any of B's forms, independently.
        D: Weight of the skip connection, (D); None leaves it out.
        z: Gate, (batch, D, L); None leaves it out.
        delta_bias: Added to delta, (D).
        delta_softplus: Put softplus on delta + delta_bias (linear above 20).
        return_last_state: Also return the state after the last step.
        backend: "auto", "reference", "chunked", "numba" or "cuda".

    Returns:
        (batch, D, L) in u's type; with `return_last_state` also (batch, D, N).

    Raises:
        GeometryError: Shapes don't fit each other.
        ConfigError: A, B or C is complex, or the back end is unknown.
        BackendUnavailableError: The named back end can't run this.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State
        Spaces", arXiv 2312.00752.
    """
    _check_types(u, delta, A, B, C)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    work = compute_dtype(u, delta, A, B, C)
    B, C = _match_groups(B, C)
    if _find_backend(backend, u, B, C, work) == "cuda":
        inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
        y, last = _scan_on_gpu(inputs, delta_softplus, return_last_state)
        return (y, last) if return_last_state else y
    rows = u.to(work).transpose(1, 2)
    dt = _step_sizes(delta.to(work), delta_bias, delta_softplus).transpose(1, 2)
    matrices = (_to_rows(B.to(work)), _to_rows(C.to(work)))
    y, last = scan(rows, dt, A.to(work), *matrices, backend)
    y = _skip_and_gate(y.transpose(1, 2), u.to(work), D, z).to(u.dtype).contiguous()
    return (y, last) if return_last_state else y


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Scan rows with a back end, or the one that "auto" stands for.

    Args:
        u: (batch, L, E), float32 or float64, as all others.
        dt: Step sizes after softplus, (batch, L, E).
        A: (E, N).
        B: (batch, L, G, N) or constant (E, N).
        C: (batch, L, G, N) or constant (E, N).
        backend: "auto" or a back end's name.

    Returns:
        y (batch, L, E) and the last state (batch, E, N).
    """
    method = _find_backend(backend, u, B, C, u.dtype)
    if method == "reference":
        return scan_reference(u, dt, A, B, C)
    if method == "cuda":
        matrices = (B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1))
        inputs = ScanInputs(u.mT, dt.mT, A, *matrices, None, None, None)
        y, last = _scan_on_gpu(inputs, softplus=False, last=True)
        return y.mT, last
    tensors = tuple(x.contiguous() for x in (u, dt, A, B, C))
    y, last, _ = scan_rows(*tensors, method, needs_gradient(*tensors))
    return y, last


def _find_backend(name: str, u: Tensor, B: Tensor, C: Tensor, work: torch.dtype) -> str:
    limit = "B or C is constant over positions" if 2 in (B.ndim, C.ndim) else ""
    method = resolve_backend(name, device=u.device, dtype=work, limit=limit)
    return "chunked" if method == "cuda" and not u.numel() else method


def _scan_on_gpu(
    inputs: ScanInputs, softplus: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """Scan by one operator, or one for every 16 states; B and C vary over positions."""
    if inputs.A.shape[1] > GPU_STATES:
        return _scan_slices(inputs, softplus, last)
    ready = inputs if _are_ready(inputs) else _make_ready(inputs)
    keep = needs_gradient(*(x for x in ready if x is not None))
    y, state, _ = selective(*ready, softplus, last, keep)
    return (y if y.dtype == inputs.u.dtype else y.to(inputs.u.dtype)), state


def _are_ready(inputs: ScanInputs) -> bool:
    """Whether tensors are as the operator wants them, by the fewest questions."""
    u, delta, A, B, C, D, z, bias = inputs
    kind, device = u.dtype, u.device
    for x in (u, delta, B, C, z):
        if x is not None and not (
            x.dtype is kind and x.is_contiguous() and x.device == device
        ):
            return False
    for x in (A, D, bias):
        if x is not None and not (
            x.dtype is torch.float32 and x.is_contiguous() and x.device == device
        ):
            return False
    return True


_PARAMETERS = ("A", "D", "bias")


def _make_ready(inputs: ScanInputs) -> ScanInputs:
    """Give tensors of steps one type, float32 if theirs differ, and the others that."""
    pairs = list(zip(inputs._fields, inputs, strict=True))
    kinds = {x.dtype for n, x in pairs if x is not None and n not in _PARAMETERS}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32

    def ready(name: str, x: Tensor | None) -> Any:
        if x is None:
            return None
        if x.device != inputs.u.device:
            raise _device_error(name, x, inputs.u)
        return x.to(torch.float32 if name in _PARAMETERS else kind).contiguous()

    return ScanInputs(*(ready(name, x) for name, x in pairs))


def _device_error(name: str, x: Tensor, u: Tensor) -> ConfigError:
    return ConfigError(
        describe(
            f"selective_scan's {name} isn't on the device of u",
            expected=u.device,
            found=x.device,
        )
    )


def _scan_slices(
    inputs: ScanInputs, softplus: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """Scan 16 states at a time in float32; their outputs add up."""
    u, delta, A, B, C, D, z, bias = inputs
    wide = u.float()
    slices = (A.split(GPU_STATES, 1), *(m.split(GPU_STATES, -2) for m in (B, C)))
    parts = [
        _scan_on_gpu(ScanInputs(wide, delta, *part, None, None, bias), softplus, last)
        for part in zip(*slices, strict=True)
    ]
    outputs, states = zip(*parts, strict=True)
    y = _skip_and_gate(torch.stack(outputs).sum(0), wide, D, z)
    return y.to(u.dtype), torch.cat(states, -1)


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) silu(z) in y's type."""
    if D is not None:
        y = y + u * D.to(y.dtype)[:, None]
    return y if z is None else y * F.silu(z.to(y.dtype))


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a backward may follow, so that a forward should keep what it needs.

    Args:
        tensors: What goes into an operator.

    Returns:
        True where autograd records any of them.
    """
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is float64, else float32.

    Args:
        tensors: What goes into an operator.

    Returns:
        The type for state and sums.
    """
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        delta = delta + bias.to(delta.dtype)[:, None]
    return F.softplus(delta) if softplus else delta


def _to_rows(matrix: Tensor) -> Tensor:
    """(batch, N, L) or (batch, G, N, L) to (batch, L, G, N); constants stay."""
    if matrix.ndim == 3:
        matrix = matrix.unsqueeze(1)
    return matrix.permute(0, 3, 1, 2) if matrix.ndim == 4 else matrix


def _match_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Give B and C the same number of groups, where both vary."""
    if 2 in (B.ndim, C.ndim) or _groups(B) == _groups(C):
        return B, C
    groups = math.lcm(_groups(B), _groups(C))
    B, C = (m if m.ndim == 4 else m.unsqueeze(1) for m in (B, C))
    return (
        B.repeat_interleave(groups // B.shape[1], dim=1),
        C.repeat_interleave(groups // C.shape[1], dim=1),
    )


def _groups(matrix: Tensor) -> int:
    return matrix.shape[1] if matrix.ndim == 4 else 1


def _check_types(*tensors: Tensor) -> None:
    for name, tensor in zip(("u", "delta", "A", "B", "C"), tensors, strict=True):
        if not tensor.is_floating_point():
            raise ConfigError(
                describe(
                    f"selective_scan needs real floating-point tensors, {name} is not",
                    expected="float16, bfloat16, float32 or float64",
                    found=tensor.dtype,
                    remedy="Complex state matrices are not supported.",
                )
            )


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 3:
        raise shape_error("u", "(batch, D, L)", u)
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise shape_error("A", f"({channels}, N)", A)
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise shape_error(name, str(tuple(u.shape)), tensor)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise shape_error(name, f"({channels},)", tensor)
    _check_matrix("B", B, batch, channels, A.shape[1], length)
    _check_matrix("C", C, batch, channels, A.shape[1], length)


def _check_matrix(
    name: str, matrix: Tensor, batch: int, channels: int, states: int, length: int
) -> None:
    wanted = {
        2: (channels, states),
        3: (batch, states, length),
        4: (batch, matrix.shape[1] if matrix.ndim == 4 else 1, states, length),
    }.get(matrix.ndim)
    groups = matrix.shape[1] if matrix.ndim == 4 else 1
    if wanted is None or matrix.shape != wanted or groups < 1 or channels % groups:
        forms = (
            f"({channels}, {states}), ({batch}, {states}, {length}) or "
            f"({batch}, G, {states}, {length}) with G a divisor of {channels}"
        )
        raise shape_error(name, forms, matrix)


def shape_error(name: str, expected: str, found: Tensor) -> GeometryError:
    """Compose the error for a tensor of a wrong shape.

    Args:
        name: The argument's name.
        expected: The shape it should have.
        found: The tensor given.

    Returns:
        The error, to be raised.
    """
    return GeometryError(
        describe(
            f"{name} has the wrong shape", expected=expected, found=tuple(found.shape)
        )
    )
