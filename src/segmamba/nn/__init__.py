"""Networks: modules only, built by name or from a configuration."""

from segmamba.nn.counting import multiply_adds
from segmamba.nn.peers import PeerNetwork
from segmamba.nn.presets import (
    build_network,
    complete_config,
    count_parameters,
    create_network,
    preset_config,
    preset_names,
)
from segmamba.nn.segmamba import SegMamba
from segmamba.nn.weights import load_published_weights, published_state_dict

__all__ = [
    "PeerNetwork",
    "SegMamba",
    "build_network",
    "complete_config",
    "count_parameters",
    "create_network",
    "load_published_weights",
    "multiply_adds",
    "preset_config",
    "preset_names",
    "published_state_dict",
]
