"""How far training is, and the learning rate that belongs there."""

from __future__ import annotations

import math

from segmamba.config import TrainConfig

DEFAULT_EPOCHS = 1000
"""Epochs where neither a number of epochs nor a time is given, as published."""

POLY_POWER = 0.9
"""Exponent of the polynomial decay. Source: nnU-Net, as the published code."""

WARMUP_START = 0.01
"""Share of the highest learning rate at which the warm-up starts."""


def total_steps(config: TrainConfig) -> float:
    """Count the steps of the whole run; infinity where only the clock ends it."""
    epochs = config.max_epochs
    if epochs is None and config.max_time_s is None:
        epochs = DEFAULT_EPOCHS
    return math.inf if epochs is None else epochs * config.iterations_per_epoch


def progress_at(step: int, elapsed_s: float, config: TrainConfig) -> float:
    """Tell how much of the run is over, by steps or by the clock.

    Args:
        step: Steps done.
        elapsed_s: Seconds of training so far, all resumed parts together.
        config: Holds the limits; the one that is closer to its end counts.

    Returns:
        0 at the start, 1 at the end, never more.
    """
    by_steps = step / total_steps(config)
    by_clock = 0.0 if config.max_time_s is None else elapsed_s / config.max_time_s
    return min(1.0, max(by_steps, by_clock))


def learning_rate_at(progress: float, config: TrainConfig) -> float:
    """Give the learning rate at a point of the run.

    Args:
        progress: 0 (start) to 1 (end).
        config: Holds the highest rate, the warm-up's share and the decay.

    Returns:
        `warmup` > 0: a line from 1% to 100% over that share; then the decay over the
        rest: (1 - r)^0.9 (poly), (1 + cos(pi r)) / 2 (cosine) or 1 (constant).
    """
    if progress < config.warmup:
        share = progress / config.warmup
        return config.learning_rate * (WARMUP_START + (1 - WARMUP_START) * share)
    rest = (progress - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1
    if config.schedule == "poly":
        return config.learning_rate * (1 - rest) ** POLY_POWER
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * rest)) / 2
    return config.learning_rate
