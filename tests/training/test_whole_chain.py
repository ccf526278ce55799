"""The real network, loss, sampler and augmentation resume at the same bits too."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segmamba.checkpoint import load_checkpoint, load_model_file
from segmamba.config import AugmentationConfig, TrainConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.sampler import PatchSampler
from segmamba.nn import build_network, preset_config
from segmamba.training import Trainer, batch_maker
from segmamba.training.losses import build_loss

SCHEME = LabelScheme({"background": 0, "edge": 1, "core": 2})
CONFIG = TrainConfig(
    max_epochs=2,
    iterations_per_epoch=4,
    save_every_s=0,
    precision="fp32",
    augmentation=AugmentationConfig(p_rotation=0.5, p_noise=0.5, p_blur=0.5),
    workers=2,
)


class OneCase:
    """A case in memory in place of a cache."""

    def load(self, case_id: str) -> SimpleNamespace:
        image = np.random.default_rng(4).normal(size=(1, 40, 36, 44))
        label = np.digitize(image[0], [0.5, 1.5]).astype(np.int16)
        places = {value: np.argwhere(label == value) for value in (1, 2)}
        return SimpleNamespace(
            image=image.astype(np.float16), label=label, foreground=places
        )


def make_trainer(folder, on_progress=None) -> Trainer:
    torch.manual_seed(5)
    network = build_network(
        preset_config(
            "segmamba",
            in_channels=1,
            out_channels=3,
            dims=(8, 16, 24, 32),
            hidden_size=32,
            depths=(1, 1, 1, 1),
            deep_supervision=True,
        )
    )
    sampler = PatchSampler(
        OneCase(), ["a"], (32, 32, 32), 1, SCHEME, margin=CONFIG.augmentation
    )
    return Trainer(
        network,
        batch_maker(sampler, CONFIG.augmentation, seed=CONFIG.seed),
        build_loss("dice_ce", SCHEME),
        CONFIG,
        folder,
        on_progress=on_progress,
        tensorboard=False,
    )


@pytest.mark.slow
def test_stopped_and_gone_on_with(tmp_path):
    make_trainer(tmp_path / "whole").fit()

    def stop(progress):
        if progress.step == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(tmp_path / "cut", stop).fit()
    result = make_trainer(tmp_path / "cut").fit(resume=True)
    whole, _ = load_checkpoint(tmp_path / "whole" / "checkpoint.safetensors")
    cut, _ = load_checkpoint(tmp_path / "cut" / "checkpoint.safetensors")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    model = load_model_file(result.model_path)
    assert model.network is not None
    build_network(model.network).load_state_dict(model.tensors)
