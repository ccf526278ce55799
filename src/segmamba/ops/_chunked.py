"""The scan in plain PyTorch without a Python loop over all L steps.

The length is cut into chunks of about sqrt(L) steps. One loop walks the steps inside
all chunks at once, a second one walks the chunks. Decays are multiplied, never divided
by, so nothing overflows. `docs/concepts/selective-scan.md` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of all states that the backward pass keeps at a time (64 MiB in float32).
_STATE_BUDGET = 1 << 24


@dataclass(frozen=True)
class _Chunks:
    """The scan's inputs cut into chunks, steps first.

    u and dt are (T, batch, chunks, G, E/G, 1); A is (G, E/G, N); B and C are
    (T, batch, chunks, G, 1, N), or (G, E/G, N) where constant.
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def b(self, t: int) -> Tensor:
        return self.B if self.B.ndim == 3 else self.B[t]

    def c(self, t: int) -> Tensor:
        return self.C if self.C.ndim == 3 else self.C[t]

    def decay(self, t: int) -> Tensor:
        return torch.exp(self.dt[t] * self.A)

    def step(self, t: int, state: Tensor) -> Tensor:
        return self.decay(t) * state + (self.dt[t] * self.u[t]) * self.b(t)

    def part(self, which: slice) -> _Chunks:
        def cut(x: Tensor) -> Tensor:
            return x if x.ndim == 3 else x[:, :, which]

        return _Chunks(cut(self.u), cut(self.dt), self.A, cut(self.B), cut(self.C))

    def zero_state(self) -> Tensor:
        batch, count = self.u.shape[1:3]
        return self.u.new_zeros(batch, count, *self.A.shape)


def chunk_length(length: int) -> int:
    """Steps in a chunk for a sequence of `length` steps: about its square root."""
    return max(1, math.isqrt(max(length - 1, 0)) + 1)


def _cut(x: Tensor, steps: int) -> Tensor:
    """Reorder (batch, L, ...) to (steps, batch, chunks, ...), padded with zeros."""
    batch, length = x.shape[:2]
    count = -(-length // steps)
    if count * steps != length:
        x = torch.cat([x, x.new_zeros(batch, count * steps - length, *x.shape[2:])], 1)
    x = x.reshape(batch, count, steps, *x.shape[2:])
    return x.movedim(2, 0).contiguous()


def _join(x: Tensor, length: int) -> Tensor:
    """Undo `_cut`: (steps, batch, chunks, ...) to (batch, L, ...)."""
    return x.movedim(0, 2).flatten(1, 2)[:, :length].contiguous()


def _cut_rows(x: Tensor, A: Tensor, steps: int) -> Tensor:
    """(batch, L, E) to (steps, batch, chunks, G, E/G, 1), A being (G, E/G, N)."""
    return _cut(x, steps).unflatten(-1, A.shape[:2]).unsqueeze(-1)


def _make_chunks(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> _Chunks:
    groups = next((m.shape[2] for m in (B, C) if m.ndim == 4), 1)
    steps = chunk_length(u.shape[1])
    A = A.unflatten(0, (groups, -1))

    def matrix(m: Tensor) -> Tensor:
        return m.view_as(A) if m.ndim == 2 else _cut(m, steps).unsqueeze(-2)

    return _Chunks(
        _cut_rows(u, A, steps), _cut_rows(dt, A, steps), A, matrix(B), matrix(C)
    )


def _chunk_starts(chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """States before each chunk (batch, chunks, G, E/G, N) and after the last."""
    local = chunks.zero_state()
    for t in range(chunks.u.shape[0]):
        local = chunks.step(t, local)
    decay = torch.exp(chunks.dt.sum(0) * chunks.A)
    starts = torch.empty_like(local)
    state = torch.zeros_like(local[:, 0])
    for c in range(local.shape[1]):
        starts[:, c] = state
        state = decay[:, c] * state + local[:, c]
    return starts, state


def scan_chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence chunk-parallel; arguments and results as `scan_reference`."""
    if u.numel() == 0:
        return torch.zeros_like(u), u.new_zeros(u.shape[0], *A.shape)
    chunks = _make_chunks(u, dt, A, B, C)
    state, last = _chunk_starts(chunks)
    y = torch.empty_like(chunks.u)
    for t in range(chunks.u.shape[0]):
        state = chunks.step(t, state)
        torch.sum(state * chunks.c(t), -1, keepdim=True, out=y[t])
    return _join(y.flatten(3), u.shape[1]), last.flatten(1, 2)


def _chunk_ends(chunks: _Chunks, grad_y: Tensor, grad_last: Tensor) -> Tensor:
    """Adjoint states that enter each chunk from behind."""
    local = chunks.zero_state()
    for t in range(grad_y.shape[0] - 1, -1, -1):
        local = (local + grad_y[t] * chunks.c(t)) * chunks.decay(t)
    decay = torch.exp(chunks.dt.sum(0) * chunks.A)
    ends = torch.empty_like(local)
    adjoint = grad_last
    for c in range(local.shape[1] - 1, -1, -1):
        ends[:, c] = adjoint
        adjoint = decay[:, c] * adjoint + local[:, c]
    return ends


def scan_chunked_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `scan_chunked`, recomputing the states chunk group by group.

    Args:
        grad_y: Gradient of y, (batch, L, E).
        grad_last: Gradient of the last state, (batch, E, N).
        u: As given to `scan_chunked`; so are dt, A, B and C.
        dt: See u.
        A: See u.
        B: See u.
        C: See u.

    Returns:
        Gradients of u, dt, A, B and C, in their shapes.
    """
    if u.numel() == 0:
        empty = [torch.zeros_like(x) for x in (u, dt, A, B, C)]
        return empty[0], empty[1], empty[2], empty[3], empty[4]
    chunks = _make_chunks(u, dt, A, B, C)
    steps, count = chunks.u.shape[0], chunks.u.shape[2]
    grad = _cut_rows(grad_y, chunks.A, steps)
    starts, _ = _chunk_starts(chunks)
    ends = _chunk_ends(chunks, grad, grad_last.reshape(starts[:, 0].shape))
    size = max(1, _STATE_BUDGET // max(1, steps * starts[:, 0].numel()))
    pieces = []
    for first in range(0, count, size):
        part = slice(first, first + size)
        pieces.append(
            _part_gradients(
                chunks.part(part), grad[:, :, part], starts[:, part], ends[:, part]
            )
        )
    u_part, dt_part, a_part, b_part, c_part = zip(*pieces, strict=True)
    length = u.shape[1]
    return (
        _join(torch.cat(u_part, 2).flatten(3), length),
        _join(torch.cat(dt_part, 2).flatten(3), length),
        torch.stack(a_part).sum(0).reshape(A.shape),
        _merge_matrix(b_part, B),
        _merge_matrix(c_part, C),
    )


def _part_gradients(
    chunks: _Chunks, grad: Tensor, state: Tensor, adjoint: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of some chunks, in the layout of `_Chunks`."""
    steps = grad.shape[0]
    history = state.new_empty(steps + 1, *state.shape)
    history[0] = state
    for t in range(steps):
        history[t + 1] = chunks.step(t, history[t])
    grad_u, grad_dt = torch.empty_like(chunks.u), torch.empty_like(chunks.u)
    grad_a = torch.zeros_like(state)
    grad_b, grad_c = torch.zeros_like(chunks.B), torch.zeros_like(chunks.C)
    for t in range(steps - 1, -1, -1):
        adjoint = adjoint + grad[t] * chunks.c(t)
        _add_matrix(grad_b, t, adjoint * (chunks.dt[t] * chunks.u[t]))
        _add_matrix(grad_c, t, history[t + 1] * grad[t])
        grad_drive = (adjoint * chunks.b(t)).sum(-1, keepdim=True)
        adjoint = adjoint * chunks.decay(t)
        exponent = adjoint * history[t]
        grad_a += exponent * chunks.dt[t]
        grad_u[t] = grad_drive * chunks.dt[t]
        grad_dt[t] = grad_drive * chunks.u[t]
        grad_dt[t] += (exponent * chunks.A).sum(-1, keepdim=True)
    return grad_u, grad_dt, grad_a.sum((0, 1)), grad_b, grad_c


def _add_matrix(total: Tensor, t: int, term: Tensor) -> None:
    """Add a step's gradient (batch, chunks, G, E/G, N) where its matrix came from."""
    if total.ndim == 3:
        total += term.sum((0, 1))
    else:
        total[t] = term.sum(-2, keepdim=True)


def _merge_matrix(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    if like.ndim == 2:
        return torch.stack(parts).sum(0).reshape(like.shape)
    return _join(torch.cat(parts, 2).squeeze(-2), like.shape[1])
