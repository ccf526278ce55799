"""What every network must do: the contract test that each preset inherits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segmamba.config import PeerConfig
from segmamba.errors import ConfigError
from segmamba.nn import build_network, preset_config
from segmamba.nn.blocks import VoidBiasConvolution
from segmamba.training.shallow_maps import avoid_depth_two

ODD_SIZE = (37, 50, 61)
SMALL_SIZE = (17, 18, 9)


def void_biases(network: nn.Module) -> set[str]:
    """Names of the biases that an instance norm takes out again."""
    return {
        f"{name}.bias"
        for name, module in network.named_modules()
        if isinstance(module, VoidBiasConvolution)
    }


class NetworkContract:
    """Inherit, and say how to build the network small."""

    name = ""
    options: dict = {}

    optional: frozenset[str] = frozenset({"num_slices"})
    deep_supervision = True
    checkpointing = True
    odd_options: dict = {}
    small_size = SMALL_SIZE
    exact_gradients = True

    def levels(self, network: nn.Module) -> int:
        """How many resolutions deep supervision gives."""
        decoder = network.decoder
        assert isinstance(decoder, nn.ModuleList)
        return len(decoder)

    def build(self, **options) -> nn.Module:
        torch.manual_seed(3)
        merged = {
            "in_channels": 3,
            "out_channels": 5,
            **self.options,
            **options,
        }
        return build_network(preset_config(self.name, **merged))

    def image(self, size=None, batch: int = 1, channels: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(
            batch, channels, *(size or self.small_size), generator=generator
        )

    def gradients(self, network: nn.Module, image: Tensor) -> dict[str, Tensor | None]:
        network.train()
        outputs = network(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        weights = torch.Generator().manual_seed(9)
        loss = sum(
            (item * torch.randn(item.shape, generator=weights)).mean()
            for item in outputs
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        return {name: item.grad for name, item in network.named_parameters()}

    def test_any_size_comes_back(self):
        network = self.build(in_channels=1, **self.odd_options).eval()
        with torch.no_grad():
            logits = network(self.image(ODD_SIZE, channels=1))
        assert logits.shape == (1, 5, *ODD_SIZE)
        assert logits.isfinite().all()
        assert logits.std() > 0

    @pytest.mark.parametrize("size", [(17, 17, 17), (1, 1, 1), (1, 40, 8)])
    def test_small_sizes_come_back(self, size):
        with torch.no_grad():
            logits = self.build()(self.image(size))
        assert logits.shape == (1, 5, *size)
        assert logits.isfinite().all()

    def test_weights_survive_saving(self, tmp_path):
        from safetensors.torch import load_file, save_file

        first, second = self.build(), self.build()
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(1.0)
        save_file(first.state_dict(), tmp_path / "weights.safetensors")
        second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        image = self.image()
        with torch.no_grad():
            assert torch.equal(first(image), second(image))

    def test_the_configuration_is_complete_and_rebuilds_the_network(self):
        network = self.build()
        config = network.config
        assert build_network(config).config == config
        assert all(
            getattr(config, field) is not None
            for field in config.__dataclass_fields__
            if field not in self.optional
        )

    def test_training_and_evaluation_are_the_same(self):
        network, image = self.build(), self.image()
        with torch.no_grad():
            assert torch.equal(network.train()(image), network.eval()(image))

    def test_cases_of_a_batch_do_not_mix(self):
        network = self.build().eval()
        image = self.image(batch=3)
        changed = image.clone()
        changed[0] += 5
        with torch.no_grad():
            together = network(image)
            alone = torch.cat([network(case) for case in image.split(1)])
            others = network(changed)[1:]
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(together[1:], others, atol=2e-5, rtol=2e-5)

    def test_the_gradient_reaches_every_parameter(self):
        network = self.build(deep_supervision=self.deep_supervision)
        gradients = self.gradients(network, self.image((16, 17, 18)))
        void = void_biases(network)
        dead = [
            name
            for name, gradient in gradients.items()
            if name not in void and (gradient is None or not gradient.abs().max() > 0)
        ]
        assert dead == []
        assert all(gradients[name] is None for name in void)

    def test_checkpointing_changes_no_gradient(self):
        if not self.checkpointing:
            with pytest.raises(ConfigError, match="checkpointing"):
                self.build(checkpointing=True)
            return
        image = self.image()
        plain = self.gradients(self.build(), image)
        saved = self.gradients(self.build(checkpointing=True), image)
        for name, gradient in plain.items():
            torch.testing.assert_close(gradient, saved[name], msg=name)

    def test_deep_supervision_gives_every_level_in_training(self):
        if not self.deep_supervision:
            with pytest.raises(ConfigError, match="deep_supervision"):
                self.build(deep_supervision=True)
            return
        network = self.build(deep_supervision=True)
        image = self.image((17, 12, 11))
        outputs = network.train()(image)
        sizes = [tuple(item.shape[2:]) for item in outputs]
        levels = self.levels(network)
        assert sizes == [
            tuple(-(-side // 2**level) for side in (17, 12, 11))
            for level in range(levels)
        ]
        assert {item.shape[1] for item in outputs} == {5}
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(image), outputs[0])

    def test_it_compiles_as_one_graph(self):
        torch.compiler.reset()  # else networks run out of recompilations
        network, image = self.build().eval(), self.image()
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            wanted = network(image)
        image.requires_grad_()
        found = compiled(image)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        found.mean().backward()
        assert image.grad is not None
        assert image.grad.abs().max() > 0

    def test_it_exports(self):
        network, image = self.build().eval(), self.image()
        program = torch.export.export(network, (image,))
        with torch.no_grad():
            wanted, found = network(image), program.module()(image)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    def test_channels_last_gives_the_same(self):
        network, image = self.build(), self.image(batch=2)
        wanted = self.gradients(network, image)
        with torch.no_grad():
            logits = network(image)
        last = self.build().to(memory_format=torch.channels_last_3d)
        image = image.contiguous(memory_format=torch.channels_last_3d)
        with torch.no_grad():
            torch.testing.assert_close(last(image), logits, atol=1e-3, rtol=1e-3)
        if not self.exact_gradients:  # slow in float64
            return
        found = self.gradients(last.double(), image.double())
        exact = self.gradients(self.build().double(), self.image(batch=2).double())
        void = void_biases(last)
        for name, gradient in exact.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
            assert name in void or wanted[name] is not None

    def test_precisions_run(self):
        network, image = self.build(), self.image()
        avoid_depth_two(network)  # torch's fault, which the trainer goes around too
        with torch.autocast("cpu", torch.bfloat16):
            found = self.gradients(network, image)
        gradients = {k: g for k, g in found.items() if k not in void_biases(network)}
        assert all(item.dtype == torch.float32 for item in gradients.values())
        assert all(item.isfinite().all() for item in gradients.values())


class PeerContract(NetworkContract):
    """What a peer has in the place of SegMamba's settings."""

    optional = frozenset(PeerConfig.__dataclass_fields__)
    deep_supervision = False
    checkpointing = False

    def levels(self, network: nn.Module) -> int:
        return len(network.config.strides)
