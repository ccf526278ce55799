"""Images of any size in, logits of that size out."""

from __future__ import annotations

import pytest
import torch

from segmamba.errors import GeometryError
from segmamba.nn.framing import crop_levels, image_size, pad_to_size, padded_size


def test_padding_is_zeros_at_the_end():
    x = torch.ones(1, 1, 2, 3, 4)
    padded = pad_to_size(x, (3, 3, 6))
    assert padded.shape == (1, 1, 3, 3, 6)
    assert torch.equal(padded[:, :, :2, :3, :4], x)
    assert padded.sum() == x.sum()
    assert pad_to_size(x, (2, 3, 4)) is x


@pytest.mark.parametrize(
    ("size", "strides", "wanted"),
    [
        ((37, 50, 61), [(2, 2, 2)] * 4, (48, 64, 64)),
        ((32, 32, 32), [(2, 2, 2)] * 4, (32, 32, 32)),
        ((16, 16, 16), [(2, 2, 2)] * 4, (32, 32, 32)),
        ((16, 16, 17), [(2, 2, 2)] * 4, (16, 16, 32)),
        ((3, 8, 8), [(1, 2, 2)] * 3, (3, 8, 8)),
        ((1, 8, 8), [(1, 2, 2)] * 3, (1, 16, 16)),
        ((1, 1, 1), [(1, 1, 1)] * 2, (2, 2, 2)),
    ],
)
def test_padding_leaves_more_than_one_voxel(size, strides, wanted):
    assert padded_size(size, strides) == wanted


def test_each_resolution_keeps_what_the_image_covers():
    outputs = [torch.rand(1, 2, 8, 8, 8), torch.rand(1, 2, 4, 4, 8)]
    full, half = crop_levels(outputs, (7, 8, 5), [(2, 2, 1)])
    assert torch.equal(full, outputs[0][:, :, :7, :, :5])
    assert torch.equal(half, outputs[1][:, :, :4, :, :5])


@pytest.mark.parametrize("shape", [(3, 8, 8, 8), (1, 2, 8, 8, 8)])
def test_other_axes_or_channels_are_refused(shape):
    with pytest.raises(GeometryError, match=r"\(B, 3, D, H, W\)"):
        image_size(torch.zeros(shape), 3)
