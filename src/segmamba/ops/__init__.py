"""Operators on tensors: selective scan, tri-orientated scan, causal convolution."""

from segmamba.ops.backends import available_backends
from segmamba.ops.convolution import causal_conv1d
from segmamba.ops.scan import selective_scan
from segmamba.ops.tri_orientated import tri_orientated_scan

__all__ = [
    "available_backends",
    "causal_conv1d",
    "selective_scan",
    "tri_orientated_scan",
]
