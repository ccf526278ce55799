"""The mixer of a Mamba layer: a tri-orientated scan between two projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.ops._layout import GPU_STATES
from segmamba.ops._primitives import mix
from segmamba.ops.backends import resolve_backend
from segmamba.ops.orders import Order, check_orders
from segmamba.ops.scan import compute_dtype, needs_gradient
from segmamba.ops.tri_orientated import check_parameters, tri_orientated_scan

_CHANNELS = 8
"""Multiple of channels E that the kernels take."""


def mamba_mixer(
    tokens: Tensor,
    in_proj_weight: Tensor,
    out_proj_weight: Tensor,
    *parameters: Sequence[Tensor],
    orders: Sequence[Order],
    backend: str = "auto",
) -> Tensor:
    """Project tokens, scan them in K orders, gate the sum, and project it back.

    Args:
        tokens: (batch, L, C).
        in_proj_weight: (2E, C); rows give x first, then the gate z.
        out_proj_weight: (C, E).
        *parameters: The seven lists that `tri_orientated_scan` takes, conv_weight to D.
        orders: K pairs (stride, reverse); see `tri_orientated_scan`.
        backend: "auto", "reference", "chunked", "numba" or "cuda". With the last, all
            of it is one operator, which keeps little for its backward.

    Returns:
        (batch, L, C); in autocast's type within autocast.

    Raises:
        GeometryError: Shapes don't fit each other, or a stride doesn't divide L.
        ConfigError: The back end is unknown.
        BackendUnavailableError: The named back end can't run this.
    """
    work = compute_dtype(tokens, *parameters[5])
    method = resolve_backend(backend, device=tokens.device, dtype=work)
    states, channels = parameters[5][0].shape[1], out_proj_weight.shape[1]
    if method != "cuda" or states > GPU_STATES or channels % _CHANNELS:
        xz = F.linear(tokens, in_proj_weight)
        scanned = tri_orientated_scan(xz, *parameters, orders=orders, backend=backend)
        return F.linear(scanned, out_proj_weight)
    check_orders(tokens.shape[1], orders)
    check_parameters(channels, parameters, orders)
    kind = _autocast_type(tokens)
    flat = torch.cat([p.reshape(-1) for one in parameters for p in one])
    inputs = [x.to(kind) for x in (tokens, in_proj_weight, out_proj_weight)]
    inputs[0] = inputs[0].contiguous()
    out, _, _ = mix(
        *inputs,
        flat.float(),
        [stride for stride, _ in orders],
        [int(reverse) for _, reverse in orders],
        states,
        parameters[3][0].shape[1],
        parameters[0][0].shape[-1],
        needs_gradient(*inputs, flat),
    )
    return out


def _autocast_type(tokens: Tensor) -> torch.dtype:
    kind = tokens.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tokens.dtype
