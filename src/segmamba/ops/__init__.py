"""Operators on tensors: the scans, the causal convolution, the instance norm."""

from segmamba.ops.backends import available_backends
from segmamba.ops.convolution import causal_conv1d
from segmamba.ops.convolution3d import conv3d
from segmamba.ops.mixer import mamba_mixer
from segmamba.ops.norm import instance_norm
from segmamba.ops.scan import selective_scan
from segmamba.ops.token_norm import token_norm
from segmamba.ops.tri_orientated import tri_orientated_scan

__all__ = [
    "available_backends",
    "causal_conv1d",
    "conv3d",
    "instance_norm",
    "mamba_mixer",
    "selective_scan",
    "token_norm",
    "tri_orientated_scan",
]
