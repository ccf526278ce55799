"""The selective scan, with the interface that the field knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import ConfigError, GeometryError, describe
from segmamba.ops._primitives import scan_rows
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
    rows = u.to(work).transpose(1, 2)
    dt = _step_sizes(delta.to(work), delta_bias, delta_softplus).transpose(1, 2)
    inputs, outputs = _match_groups(_to_rows(B.to(work)), _to_rows(C.to(work)))
    y, last = scan(rows, dt, A.to(work), inputs, outputs, backend)
    if D is not None:
        y = y + rows * D.to(work)
    y = y.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(u.dtype).contiguous()
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
    limit = "B or C is constant over positions" if 2 in (B.ndim, C.ndim) else ""
    method = resolve_backend(backend, device=u.device, dtype=u.dtype, limit=limit)
    if method == "reference":
        return scan_reference(u, dt, A, B, C)
    tensors = tuple(x.contiguous() for x in (u, dt, A, B, C))
    y, last, _ = scan_rows(*tensors, method, needs_gradient(*tensors))
    return y, last


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
    if 2 in (B.ndim, C.ndim) or B.shape[2] == C.shape[2]:
        return B, C
    groups = math.lcm(B.shape[2], C.shape[2])
    return (
        B.repeat_interleave(groups // B.shape[2], dim=2),
        C.repeat_interleave(groups // C.shape[2], dim=2),
    )


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
