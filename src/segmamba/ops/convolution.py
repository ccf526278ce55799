"""The causal depth-wise convolution in front of a scan."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import ConfigError, describe
from segmamba.ops._layout import TAPS
from segmamba.ops._primitives import conv_rows as conv_primitive
from segmamba.ops._reference import conv_reference
from segmamba.ops.backends import resolve_backend
from segmamba.ops.scan import compute_dtype, shape_error


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel over its own past; takes what `causal_conv1d_fn` takes.

    y[t] = bias + sum_k weight[k] x[t - W + 1 + k], with zeros before the first step.

    Args:
        x: Input, (batch, D, L).
        weight: Taps, (D, W); the last tap meets the present step.
        bias: (D) or None.
        activation: None, "silu" or its other name "swish".
        backend: "auto", "reference", "chunked" or "numba".

    Returns:
        (batch, D, L) in x's type.

    Raises:
        GeometryError: Shapes don't fit each other.
        ConfigError: The activation or the back end is unknown.
        BackendUnavailableError: The named back end can't run this.
    """
    if activation not in (None, "silu", "swish"):
        raise ConfigError(
            describe(
                "unknown activation",
                expected='None, "silu" or "swish"',
                found=repr(activation),
            )
        )
    _check_shapes(x, weight, bias)
    work = compute_dtype(x, weight)
    y = conv_rows(
        x.to(work).transpose(1, 2),
        weight.to(work),
        None if bias is None else bias.to(work),
        activation is not None,
        backend,
    )
    return y.transpose(1, 2).to(x.dtype).contiguous()


def conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str
) -> Tensor:
    """Convolve rows (batch, L, E) with taps (E, W) by a back end.

    Args:
        x: (batch, L, E).
        weight: (E, W).
        bias: (E) or None.
        silu: Put silu on the result.
        backend: "auto" or a back end's name.

    Returns:
        (batch, L, E).
    """
    limit = conv_limit(weight.shape[1])
    method = resolve_backend(backend, device=x.device, dtype=x.dtype, numba_limit=limit)
    if method == "numba":
        offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return conv_primitive(x.contiguous(), weight.contiguous(), offset, silu)
    if method == "reference":
        y = conv_reference(x, weight, bias)
    else:
        padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
        y = F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])
        y = y.transpose(1, 2)
    return F.silu(y) if silu else y


def conv_limit(taps: int) -> str:
    """Why Numba's kernels can't convolve with so many taps.

    Args:
        taps: W.

    Returns:
        A reason, or nothing.
    """
    return f"its convolution has at most {TAPS} taps, not {taps}" if taps > TAPS else ""


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise shape_error("x", "(batch, D, L)", x)
    channels = x.shape[1]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise shape_error("weight", f"({channels}, W)", weight)
    if bias is not None and bias.shape != (channels,):
        raise shape_error("bias", f"({channels},)", bias)
