"""The operators' formulas as float64 loops, written apart from the package."""

from __future__ import annotations

import numpy as np


def softplus(x):
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def matrix_at(matrix, b, d, t, channels):
    """Row of N numbers for case b, channel d, step t, whatever form the matrix has."""
    if matrix.ndim == 2:
        return matrix[d]
    if matrix.ndim == 3:
        return matrix[b, :, t]
    return matrix[b, d // (channels // matrix.shape[1]), :, t]


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """(out, last state), both float64."""
    batch, channels, length = u.shape
    out = np.full(u.shape, np.nan)
    last = np.full((batch, *A.shape), np.nan)
    for b in range(batch):
        for d in range(channels):
            state = np.zeros(A.shape[1])
            for t in range(length):
                dt = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
                dt = softplus(dt) if delta_softplus else dt
                drive = dt * u[b, d, t] * matrix_at(B, b, d, t, channels)
                state = np.exp(dt * A[d]) * state + drive
                y = state @ matrix_at(C, b, d, t, channels)
                y += 0 if D is None else D[d] * u[b, d, t]
                gate = 1 if z is None else z[b, d, t] * sigmoid(z[b, d, t])
                out[b, d, t] = y * gate
            last[b, d] = state
    return out, last


def convolution(x, weight, bias=None, silu=False):
    """Causal depth-wise convolution of x (batch, D, L)."""
    out = np.full(x.shape, np.nan)
    batch, channels, length = x.shape
    taps = weight.shape[1]
    for b in range(batch):
        for d in range(channels):
            for t in range(length):
                y = 0.0 if bias is None else bias[d]
                for k in range(taps):
                    source = t - taps + 1 + k
                    y += weight[d, k] * x[b, d, source] if source >= 0 else 0.0
                out[b, d, t] = y * sigmoid(y) if silu else y
    return out


def token(t, length, order):
    """The token that position t of a scan holds."""
    stride, reverse = order
    t = length - 1 - t if reverse else t
    return (t % stride) * (length // stride) + t // stride


def tri_scan(xz, parameters, orders):
    """The tri-orientated scan; parameters are seven lists with a tensor a direction."""
    _, length, width = xz.shape
    x, z = xz[..., : width // 2], xz[..., width // 2 :]
    total = np.zeros(x.shape)
    for order, direction in zip(orders, zip(*parameters, strict=True), strict=True):
        weight, bias, x_proj, dt_proj, dt_bias, A_log, D = direction
        rank, states = dt_proj.shape[1], A_log.shape[1]
        tokens = [token(t, length, order) for t in range(length)]
        rows = x[:, tokens].transpose(0, 2, 1)
        u = convolution(rows, weight[:, 0], bias, silu=True)
        code = np.einsum("rd,bdt->brt", x_proj, u)
        delta = np.einsum("dr,brt->bdt", dt_proj, code[:, :rank])
        B, C = code[:, rank : rank + states], code[:, rank + states :]
        A = -np.exp(A_log)
        y, _ = scan(u, delta, A, B, C, D, None, dt_bias, True)
        total[:, tokens] += y.transpose(0, 2, 1)
    return total * z * sigmoid(z)
