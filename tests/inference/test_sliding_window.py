"""Windows, weights, mirrorings and memory, on networks with known answers."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.inferers.utils import sliding_window_inference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segmamba.errors import ConfigError, GeometryError, SegMambaError
from segmamba.inference.sliding_window import (
    gaussian_weights,
    memory_bound_mib,
    num_windows,
    sliding_window_logits,
    window_starts,
)


def voxelwise(batch: torch.Tensor) -> torch.Tensor:
    x = batch[:, :1]
    return torch.cat([x, 2 * x + 1, -x], dim=1)


def shifted(batch: torch.Tensor) -> torch.Tensor:
    """No mirror image of itself: each voxel takes its neighbour below along D."""
    return torch.roll(batch, 1, dims=2)


def image(*size: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(1))


def test_starts_known():
    assert window_starts(10, 4, 0.5) == (0, 2, 4, 6)
    assert window_starts(128, 128, 0.5) == (0,)
    assert window_starts(5, 8, 0.5) == (0,)
    assert window_starts(155, 128, 0.5) == (0, 27)
    assert window_starts(240, 128, 0.5) == (0, 56, 112)
    assert num_windows((155, 240, 240), (128, 128, 128), 0.5) == 2 * 3 * 3


def test_starts_cover_the_axis():
    for size, patch, overlap in itertools.product(
        range(1, 41), range(1, 13), (0, 0.1, 0.5, 0.75, 0.99)
    ):
        starts = window_starts(size, patch, overlap)
        assert starts[0] == 0
        steps = np.diff(starts)
        assert (steps >= 1).all()
        assert (steps <= math.ceil(max(patch * (1 - overlap), 1))).all()
        if size > patch:
            assert starts[-1] + patch == size


def test_gaussian_known():
    expected = [math.exp(-0.5 * (i - 3.5) ** 2) for i in range(8)]  # sigma 8/8 = 1
    torch.testing.assert_close(gaussian_weights(8), torch.tensor(expected))
    for patch in (1, 2, 7, 128, 333):
        weights = gaussian_weights(patch)
        assert weights.min() >= 3e-4
        assert torch.equal(weights, weights.flip(0))


@pytest.mark.parametrize("size", [(9, 14, 23), (8, 8, 8), (3, 17, 8), (1, 2, 5)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("gaussian", [True, False])
def test_voxelwise_network_is_unchanged(size, overlap, gaussian):
    x = image(*size)
    logits = sliding_window_logits(
        voxelwise, x, (8, 8, 8), overlap=overlap, gaussian=gaussian, precision="fp32"
    )
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, voxelwise(x[None])[0], atol=1e-5, rtol=1e-5)


def test_small_image_lies_in_the_middle_of_zeros():
    seen = []

    def network(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.clone())
        return batch

    x = image(3, 9, 4) + 10
    sliding_window_logits(network, x, (8, 9, 7), mirror_axes=(), precision="fp32")
    assert len(seen) == 1
    expected = np.zeros((1, 1, 8, 9, 7), np.float32)
    expected[0, 0, 2:5, :, 1:5] = x[0].numpy()
    np.testing.assert_array_equal(seen[0].numpy(), expected)


@pytest.mark.parametrize("size", [(16, 12, 20), (8, 24, 8)])
def test_equals_monai_with_constant_weights(size):
    """MONAI's windows lie on ours where the step divides the way."""
    torch.manual_seed(3)
    network = torch.nn.Conv3d(2, 3, 3, padding=1)
    x = image(*size, channels=2)
    ours = sliding_window_logits(
        network, x, (8, 8, 8), mirror_axes=(), gaussian=False, precision="fp32"
    )
    with torch.inference_mode():
        theirs = sliding_window_inference(
            x[None], (8, 8, 8), 1, network, overlap=0.5, mode="constant"
        )
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


def test_equals_a_float64_loop_with_gaussian_weights():
    torch.manual_seed(3)
    network = torch.nn.Conv3d(1, 2, 3, padding=1).double()
    x, patch = image(11, 9, 14).double(), (8, 6, 8)
    total, weight = np.zeros((2, 11, 9, 14)), np.zeros((11, 9, 14))
    bells = [
        [math.exp(-0.5 * ((i - (p - 1) / 2) / (p / 8)) ** 2) for i in range(p)]
        for p in patch
    ]
    bell = np.einsum("i,j,k->ijk", *bells)
    starts = itertools.product((0, 3), (0, 3), (0, 3, 6))
    for d, h, w in starts:
        where = (slice(d, d + 8), slice(h, h + 6), slice(w, w + 8))
        with torch.no_grad():
            total[(slice(None), *where)] += (
                network(x[(slice(None), *where)][None])[0].numpy() * bell
            )
        weight[where] += bell
    ours = sliding_window_logits(
        network.float(), x.float(), patch, mirror_axes=(), precision="fp32"
    )
    np.testing.assert_allclose(ours.numpy(), total / weight, atol=1e-5)


def test_mirrorings_are_averaged():
    x = image(6, 7, 5)
    expected = np.zeros((1, 6, 7, 5))
    for flip in itertools.product((False, True), repeat=3):
        axes = [i + 1 for i in range(3) if flip[i]]
        turned = np.flip(x.numpy(), axes)
        expected += np.flip(np.roll(turned, 1, axis=1), axes) / 8
    ours = sliding_window_logits(shifted, x, (6, 7, 5), precision="fp32")
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)
    along_h = sliding_window_logits(
        shifted, x, (6, 7, 5), mirror_axes=(1,), precision="fp32"
    )
    np.testing.assert_allclose(along_h.numpy(), np.roll(x, 1, axis=1), atol=1e-6)


def test_mirror_equivariant_network_is_unchanged():
    calls = []

    def box(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return F.avg_pool3d(batch, 3, 1, 1)

    x = image(9, 8, 7)
    once = sliding_window_logits(box, x, (9, 8, 7), mirror_axes=(), precision="fp32")
    assert calls == [1]
    eight = sliding_window_logits(box, x, (9, 8, 7), precision="fp32")
    assert len(calls) == 9
    torch.testing.assert_close(once, eight)


def test_networks_are_averaged():
    networks: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda b: b,
        lambda b: 3 * b,
        lambda b: b - 1,
    ]
    x = image(9, 8, 11)
    ours = sliding_window_logits(networks, x, (8, 8, 8), precision="fp32")
    torch.testing.assert_close(ours, (5 * x - 1) / 3, atol=1e-5, rtol=1e-5)


def test_the_first_of_deep_supervisions_logits_is_taken():
    x = image(9, 8, 11)
    ours = sliding_window_logits(
        lambda b: [2 * b, b[..., ::2]], x, (8, 8, 8), precision="fp32"
    )
    torch.testing.assert_close(ours, 2 * x)


def test_batches_change_nothing():
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    x = image(20, 9, 13)
    sizes: list[int] = []

    def counted(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return network(batch)

    one, four = (
        sliding_window_logits(
            counted, x, (8, 8, 8), batch_size=n, mirror_axes=(), precision="fp32"
        )
        for n in (1, 4)
    )
    assert max(sizes) == 4
    torch.testing.assert_close(one, four, atol=1e-6, rtol=1e-5)


def test_half_sums_stay_close_and_small():
    x = image(20, 12, 20)
    logits = sliding_window_logits(
        voxelwise, x, (8, 8, 8), accumulate_dtype=torch.float16, precision="fp32"
    )
    assert logits.dtype == torch.float16
    torch.testing.assert_close(
        logits.float(), voxelwise(x[None])[0], atol=1e-2, rtol=1e-2
    )


def test_precision_reaches_the_network():
    seen = set()
    conv = torch.nn.Conv3d(1, 1, 1)

    def network(batch: torch.Tensor) -> torch.Tensor:
        answer = conv(batch)
        seen.add(answer.dtype)
        return answer

    logits = sliding_window_logits(network, image(8, 8, 8), (8, 8, 8), precision="bf16")
    assert seen == {torch.bfloat16}
    assert logits.dtype == torch.float32


def test_the_input_of_an_identity_network_is_not_changed():
    x = image(8, 8, 8)
    before = x.clone()
    sliding_window_logits(lambda b: b, x, (8, 8, 8), precision="fp32")
    assert torch.equal(x, before)


def test_progress_counts_windows():
    seen = []
    sliding_window_logits(
        voxelwise,
        image(12, 8, 12),
        (8, 8, 8),
        case="brain",
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(n, 4, "brain") for n in (1, 2, 3, 4)]


def test_not_finite_names_case_and_cause():
    broken = image(8, 8, 8)
    broken[0, 1, 1, 1] = torch.nan
    with pytest.raises(SegMambaError, match=r"case 7.*image holds NaN"):
        sliding_window_logits(voxelwise, broken, (8, 8, 8), case="case 7")
    with pytest.raises(SegMambaError, match=r"weights make them.*Train"):
        sliding_window_logits(
            lambda b: b * torch.inf, image(8, 8, 8), (8, 8, 8), precision="fp32"
        )
    with pytest.raises(SegMambaError, match="outgrew fp16"):
        sliding_window_logits(
            lambda b: b * torch.inf, image(8, 8, 8), (8, 8, 8), precision="fp16"
        )


def test_wrong_options_are_named():
    x = image(8, 8, 8)
    with pytest.raises(ConfigError, match="overlap"):
        sliding_window_logits(voxelwise, x, (8, 8, 8), overlap=1.0)
    with pytest.raises(ConfigError, match="mirror axes"):
        sliding_window_logits(voxelwise, x, (8, 8, 8), mirror_axes=(3,))
    with pytest.raises(ConfigError, match="batch size"):
        sliding_window_logits(voxelwise, x, (8, 8, 8), batch_size=0)
    with pytest.raises(ConfigError, match="no network"):
        sliding_window_logits([], x, (8, 8, 8))
    with pytest.raises(ConfigError, match="precision"):
        sliding_window_logits(voxelwise, x, (8, 8, 8), precision="fp8")
    with pytest.raises(GeometryError, match="image shape"):
        sliding_window_logits(voxelwise, x[0], (8, 8, 8))
    with pytest.raises(GeometryError, match="answer"):
        sliding_window_logits(lambda b: b[..., :4], x, (8, 8, 8))


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, and what lives at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.live += len(storage)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, len(storage))

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(24, 36, 20), (16, 40, 9), (16, 20, 16)])
def test_memory_keeps_its_bound(batch_size, dtype, size):
    """Measured on a network that makes nothing but its logits."""
    outputs, channels, patch = 5, 2, (16, 20, 16)
    x = image(*size, channels=channels)

    def network(batch: torch.Tensor) -> torch.Tensor:
        return batch[:, :1].repeat(1, outputs, 1, 1, 1)

    with LiveBytes() as memory:
        sliding_window_logits(
            network,
            x,
            patch,
            batch_size=batch_size,
            accumulate_dtype=dtype,
            precision="fp32",
        )
    bound = memory_bound_mib(
        size,
        patch,
        in_channels=channels,
        outputs=outputs,
        batch_size=batch_size,
        accumulate_dtype=dtype,
    )
    sums = outputs * math.prod(size) * dtype.itemsize / 2**20
    measured = memory.peak / 2**20
    assert sums <= measured <= bound
