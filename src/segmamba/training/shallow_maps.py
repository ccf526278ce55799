"""A way around a fault in torch's bfloat16 convolutions on CPUs.

Measured with torch 2.13 on a CPU with AVX512-BF16: the weight gradient of a Conv3d with
kernel 3 and padding 1 holds leftover memory if the map is exactly 2 voxels deep,
whatever its height and width; depths 1, 3, 4, 5 and 8 are right. A patch 33 to 64
voxels deep has such a map at the bottom of the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_FAULTY_DEPTH = 2


def avoid_depth_two(network: nn.Module) -> None:
    """Let convolutions with kernel 3 see a map of depth 2 as one of depth 3.

    A slice of zeros behind the map is what the padding adds anyway, so the first two
    slices of the result stay the same; the third is dropped.

    Args:
        network: Its convolutions are changed; parameters and results stay the same.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and _is_concerned(module):
            # On the instance, so that names in the state dict stay as they are.
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _is_concerned(module: nn.Conv3d) -> bool:
    shape = (module.kernel_size[0], module.stride[0], module.dilation[0])
    padded = module.padding[0] in (1, "s")  # the "s" of "same"
    return shape == (3, 1, 1) and padded and module.padding_mode == "zeros"


def _forward(module: nn.Conv3d, *images: Any) -> Tensor:
    own: Any = type(module).forward  # some kinds have their own, of one or two inputs
    if all(x is None or x.shape[2] != _FAULTY_DEPTH for x in images):
        return own(module, *images)
    deeper = [None if x is None else F.pad(x, (0, 0, 0, 0, 0, 1)) for x in images]
    return own(module, *deeper)[:, :, :_FAULTY_DEPTH]
