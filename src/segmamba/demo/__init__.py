"""A simulated BraTS for trying things out: made in seconds, without a network."""

from segmamba.demo.simulate import make_demo_dataset, simulate_case

__all__ = ["make_demo_dataset", "simulate_case"]
