"""The whole job in minutes, on a simulated BraTS or on data of one's own."""

from segmamba.demo.run import DemoResult, run_demo
from segmamba.demo.simulate import make_demo_dataset, simulate_case

__all__ = ["DemoResult", "make_demo_dataset", "run_demo", "simulate_case"]
