"""Settings as frozen dataclasses: the same for Python, YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from segmamba.strict import from_dict, load_yaml, to_dict
from segmamba.types import Size3

__all__ = [
    "PEER_NAMES",
    "PRESET_TRAINING",
    "AnyNetworkConfig",
    "AugmentationConfig",
    "NetworkConfig",
    "Orientation",
    "PeerConfig",
    "TrainConfig",
    "from_dict",
    "load_yaml",
    "network_class",
    "network_from_dict",
    "to_dict",
    "training_defaults",
]

Orientation = Literal[
    "forward", "reverse", "slice", "slice-reverse", "column", "column-reverse"
]
"""The order in which a scan visits the tokens of a feature map (D, H, W):
row-major; the same backwards; slice index fastest (row-major over (H, W, D)); the
same backwards; W slowest (row-major over (W, D, H)); the same backwards."""


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that defines a network, weights aside."""

    name: str = "segmamba"
    """Preset: segmamba, segmamba-v1, segmamba-paper, segmamba-light or
    segmamba-small."""
    in_channels: int = 1
    """Image channels."""
    out_channels: int = 2
    """Channels of the logits: classes, or regions."""
    dims: tuple[int, ...] = (48, 96, 192, 384)
    """Channels of each encoder stage."""
    hidden_size: int = 768
    """Channels of the deepest block."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Mamba layers of each stage."""
    strides: tuple[Size3, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    """Down-sampling in front of each stage, along (D, H, W)."""
    num_slices: tuple[int, ...] | None = None
    """Slices of each stage for the inter-slice scan; None reads them off the map."""
    orientations: tuple[Orientation, ...] | None = None
    """Scan orders; None takes the preset's."""
    d_state: int = 16
    """States of each channel in the scan."""
    d_conv: int = 4
    """Width of the causal convolution in front of the scan."""
    expand: int = 2
    """Inner channels of a Mamba layer over its outer ones."""
    initialization: Literal["balanced", "published"] = "balanced"
    """Step-size biases: "balanced" starts all directions alike; "published" leaves
    all but the forward one at torch's default, as the published code does."""
    deep_supervision: bool = False
    """Give logits at lower resolutions too while training."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    stem: Literal["full", "depthwise", "serial"] | None = None
    """First convolution of the encoder: full or depth-wise on the image, or one that
    reads the full-resolution block instead; None takes the preset's (also below)."""
    stem_kernel: int | None = None
    """Odd kernel size of a full or depth-wise stem."""
    down_norm: bool | None = None
    """Instance norm in front of each down-sampling."""
    gsc: Literal["add", "mul", "paper", "none"] | None = None
    """Gated spatial convolution: branches added or multiplied, as published, or the
    product of the paper's text."""
    gsc_per_layer: bool | None = None
    """A gated spatial convolution in each Mamba layer, not one in each stage."""
    conv_blocks: tuple[int, ...] | None = None
    """Residual convolution blocks of each stage, in front of its Mamba layers."""
    mlp: Literal["skip", "layer", "none"] | None = None
    """Perceptron on the skips, or with a residual in each Mamba layer."""
    fue: bool | None = None
    """Scale the skips by the paper's feature-level uncertainty."""
    bottleneck: Literal["block", "down", "none"] | None = None
    """Deepest block: at the last stage's resolution, behind one more down-sampling,
    or left out."""
    skip_block: Literal["residual", "identity"] | None = None
    """What a skip passes through; identity only where its channels stay."""
    decoder_block: Literal["residual", "conv"] | None = None
    """Convolutions of a decoder step: a residual block, or one convolution."""
    final_block: bool | None = None
    """One more residual block at full resolution in front of the logits."""
    base_channels: int | None = None
    """Channels at full resolution; 0 takes those of the first stage."""
    convolution_init: Literal["torch", "he"] | None = None
    """Start of convolutions: torch's default as published, or He's."""
    mixer: (
        Literal["tom", "large-kernel", "window-attention", "self-attention"] | None
    ) = None
    """What mixes the tokens of a layer: the tri-orientated Mamba, a depth-wise 7x7x7
    convolution, attention in shifted windows of 7x7x7, or among all tokens."""


PEER_NAMES = (
    "unet",
    "resenc",
    "uxnet",
    "segresnet",
    "unetr",
    "swinunetr",
    "swinunetr-v2",
    "mednext",
)
"""Presets that a PeerConfig describes; all others are a NetworkConfig's."""


@dataclass(frozen=True)
class PeerConfig:
    """Everything that defines a network of another paper, weights aside.

    None means that the network has no such setting, or "the preset's".
    """

    NAMES: ClassVar[tuple[str, ...]] = PEER_NAMES
    """The presets that this describes."""

    name: str = "unet"
    """Preset: unet, resenc, uxnet, segresnet, unetr, swinunetr, swinunetr-v2 or
    mednext."""
    in_channels: int = 1
    """Image channels."""
    out_channels: int = 2
    """Channels of the logits: classes, or regions."""
    base_channels: int | None = None
    """Channels of the first stage; each later one has twice as many (segresnet, unetr,
    swinunetr, swinunetr-v2, mednext)."""
    dims: tuple[int, ...] | None = None
    """Channels of each stage (unet, resenc, uxnet)."""
    depths: tuple[int, ...] | None = None
    """Blocks of each stage of the encoder (all but unetr)."""
    strides: tuple[Size3, ...] | None = None
    """Down-sampling along (D, H, W): in front of each stage of uxnet, of each but the
    first of unet and resenc; the others' are fixed."""
    hidden_size: int | None = None
    """Channels of the deepest block (uxnet) or of the tokens (unetr)."""
    patch_size: Size3 | None = None
    """Size of the images, for which unetr learns positions; the plan's."""
    deep_supervision: bool = False
    """Give logits at lower resolutions too while training (unet, resenc, mednext)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass (swinunetr, swinunetr-v2)."""


AnyNetworkConfig = NetworkConfig | PeerConfig
"""A configuration of any network."""


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training patches (nnU-Net's stock set)."""

    enabled: bool = True
    """Turn all of it off with false."""
    rotation_degrees: float = 30.0
    """Rotation about each axis is drawn from plus or minus this."""
    rotation_degrees_in_plane: float = 180.0
    """The same for patches with one side over three times another, which are turned
    in their plane only."""
    p_rotation: float = 0.2
    """Probability of a rotation."""
    scaling: tuple[float, float] = (0.7, 1.4)
    """Range of the zoom: how many times as much of the image a patch shows."""
    p_scaling: float = 0.2
    """Probability of a zoom."""
    p_noise: float = 0.1
    """Probability of Gaussian noise (deviation 0 to 0.1)."""
    p_blur: float = 0.2
    """Probability of a Gaussian blur (sigma 0.5 to 1 voxel), half of the channels."""
    p_brightness: float = 0.15
    """Probability of a multiplication by 0.75 to 1.25."""
    p_contrast: float = 0.15
    """Probability of a contrast change by 0.75 to 1.25."""
    p_low_resolution: float = 0.25
    """Probability of a zoom-out to 0.5 to 1 and back, half of the channels."""
    p_gamma_inverted: float = 0.1
    """Probability of gamma 0.7 to 1.5 on the inverted image."""
    p_gamma: float = 0.3
    """Probability of gamma 0.7 to 1.5."""
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    """Axes (of D, H, W) that may be mirrored, each with probability 0.5."""


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained."""

    max_epochs: int | None = None
    """Stop after this many epochs; 1000 if neither this nor a time is given."""
    max_time_s: float | None = None
    """Stop after this many seconds of training; the schedule follows the clock."""
    iterations_per_epoch: int = 250
    """Batches in an epoch."""
    batch_size: int | None = None
    """Patches in a batch; None takes the plan's."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum as published, or AdamW."""
    learning_rate: float = 1e-2
    """Highest learning rate."""
    momentum: float = 0.99
    """Momentum of SGD."""
    weight_decay: float = 3e-5
    """Weight decay."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """Decay of the learning rate: (1 - progress)^0.9, half a cosine, or none."""
    warmup: float = 0.0
    """Share of the run in which the learning rate rises linearly."""
    loss: Literal["dice_ce", "dice", "ce", "dice_focal", "tversky_ce"] = "dice_ce"
    """Loss; with regions, cross-entropy means the binary one per region."""
    deep_supervision: bool = False
    """Weigh losses at lower resolutions by 1, 1/2, 1/4, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto is bf16 where the device computes it natively."""
    clip_grad_norm: float | None = 12.0
    """Largest norm of the gradient; None for no clipping."""
    ema_decay: float | None = 0.999
    """Decay of the moving average of the weights that predict; None for none."""
    oversample_foreground: float = 0.33
    """Share of the patches that are sure to hold foreground."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random changes of the patches."""
    seed: int = 12345
    """Seed of weights, patches and augmentation."""
    validate_every: int = 50
    """Epochs between whole-volume validations of a few cases; the end has them all."""
    save_every_s: float = 180.0
    """Seconds between saves of the state to resume from."""
    patience: int | None = None
    """Stop after so many validations without a better score; None never does."""
    workers: int | None = None
    """Threads that prepare batches ahead; None takes 4 beside a GPU, 1 otherwise."""
    snapshots: int = 0
    """Weights to keep from the second half of the training, as samples for
    `segmamba predict --uncertainty --snapshots`."""


PRESET_TRAINING: dict[str, dict[str, Any]] = {
    "segmamba-light": {
        "optimizer": "adamw",
        "learning_rate": 3e-3,
        "weight_decay": 1e-2,
        "warmup": 0.05,
        "ema_decay": 0.99,
        "iterations_per_epoch": 25,
    },
    "segmamba-small": {
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "weight_decay": 1e-2,
        "warmup": 0.03,
        "deep_supervision": True,
    },
}
"""Settings of TrainConfig that suit a preset better than the general defaults."""


def training_defaults(preset: str) -> dict[str, Any]:
    """Give the settings of TrainConfig that suit a network preset.

    Args:
        preset: Its name.

    Returns:
        Fields of TrainConfig; those left out keep their general default.
    """
    return dict(PRESET_TRAINING.get(preset, {}))


def network_class(name: object) -> type[NetworkConfig] | type[PeerConfig]:
    """Give the dataclass that describes a network.

    Args:
        name: Its preset; one that is unknown counts as SegMamba's.

    Returns:
        NetworkConfig or PeerConfig.
    """
    return PeerConfig if name in PEER_NAMES else NetworkConfig


def network_from_dict(
    data: Any, *, source: str = "the configuration"
) -> AnyNetworkConfig:
    """Build a network's configuration from plain values, strictly.

    Args:
        data: A mapping of fields; its `name` says of which dataclass.
        source: What the error names, such as a file.

    Returns:
        The configuration.

    Raises:
        ConfigError: As `from_dict`; a setting of another kind of network is unknown.
    """
    name = data.get("name") if isinstance(data, dict) else None
    return from_dict(network_class(name), data, source=source)
