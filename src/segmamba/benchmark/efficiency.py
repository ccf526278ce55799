"""The paper's efficiency table: what mixes the tokens of one and the same encoder."""

from __future__ import annotations

from dataclasses import dataclass

from segmamba.benchmark.model import (
    build,
    check_network,
    draw_target,
    draw_volume,
    inference_run,
    training_run,
)
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.timing import Run
from segmamba.nn import count_parameters, multiply_adds
from segmamba.types import JsonDict

HOW_COUNTED = (
    "of one forward pass: convolutions, matrix products and attention by torch's "
    "FlopCounterMode, halved; for each direction, token and inner channel of a ToM the "
    "taps of its convolution, the projections to and of step size, B and C, and four a "
    "state and two more for the scan. Norms, activations and sums are left out"
)
"""What the record says of multiply-adds; `segmamba.nn.counting` does it."""

SIDES = {"cuda": 128}
OTHER_SIDE, QUICK_SIDE = 64, 16
"""Side of the volume: the paper's on a GPU, half of it elsewhere."""

FIRST_STRIDE = 2
"""Down-sampling in front of the first stage, whose sequence is the longest."""


@dataclass(frozen=True)
class Mixer:
    """A row of the table."""

    title: str
    """As in the paper."""
    reach: int | None
    """Side of the cube of tokens that a token sees in one layer; None for all."""


MIXERS = {
    "large-kernel": Mixer("large-kernel convolution", 7),
    "window-attention": Mixer("shifted-window attention", 7),
    "self-attention": Mixer("full self-attention", None),
    "tom": Mixer("tri-orientated Mamba", None),
}
"""By the name that NetworkConfig.mixer knows."""


def benchmark_efficiency(record: Record) -> None:
    """Time preset segmamba with each mixer, training step and inference of one volume.

    Args:
        record: Where the rows go. Each has the sequence of the first stage, how many
            of its tokens a token sees in one layer and whether these are all,
            parameters, and multiply-adds of the forward pass.
    """
    record.data["multiply_adds"] = HOW_COUNTED
    for name, mixer in MIXERS.items():
        if check_network(record, training=True, name=mixer.title, mixer=name):
            _time(record, name, mixer)


TABLE_HEADER = ("mixer", "tokens", "a token sees", "parameters", "multiply-adds")
TABLE_HEADER += ("training ms", "MiB", "inference ms", "MiB")
"""Columns of `efficiency_table`."""


def efficiency_table(data: JsonDict) -> list[tuple[str, ...]]:
    """Lay out a record as the paper's table, a row for each mixer.

    Args:
        data: What `benchmark_efficiency` recorded.

    Returns:
        Text under `TABLE_HEADER`; a step that has no figures says why.
    """
    by_mixer: dict[str, list[JsonDict]] = {}
    for row in data["measurements"]:
        by_mixer.setdefault(row["mixer"], []).append(row)
    return [
        (
            MIXERS[name].title,
            str(rows[0]["sequence"]),
            "all (global)" if rows[0]["global"] else str(rows[0]["tokens_seen"]),
            f"{rows[0]['parameters'] / 1e6:.2f} M",
            f"{rows[0]['multiply_adds'] / 1e9:,.0f} G",
            *(cell for row in rows for cell in _cost(row)),
        )
        for name, rows in by_mixer.items()
    ]


def _cost(row: JsonDict) -> tuple[str, str]:
    if "median_ms" not in row:
        return row["status"], "-"
    return f"{row['median_ms']:.1f}", f"{row['peak_mib']:.0f}"


def _time(record: Record, name: str, mixer: Mixer) -> None:
    settings = record.settings
    side = SIDES.get(record.device.type, OTHER_SIDE)
    side = QUICK_SIDE if settings.quick else side
    size = (side, side, side)

    def train() -> Run:
        volume, target = draw_volume(settings, 1, size), draw_target(settings, 1, size)
        return training_run(build(settings, mixer=name), settings, volume, target)

    def infer() -> Run:
        volume = draw_volume(settings, 1, size)
        return inference_run(build(settings, mixer=name), settings, volume)

    facts = _facts(record, name, mixer, side)
    for mode, make in (("training step", train), ("inference", infer)):
        record.time(OURS, f"{mixer.title}, 4x{side}^3", mode, make, **facts)


def _facts(record: Record, name: str, mixer: Mixer, side: int) -> JsonDict:
    network = build(record.settings, mixer=name)
    sequence = (side // FIRST_STRIDE) ** 3
    shape = [1, 4, side, side, side]
    return {
        "shape": shape,
        "mixer": name,
        "sequence": sequence,
        "tokens_seen": min(mixer.reach**3, sequence) if mixer.reach else sequence,
        "global": mixer.reach is None,
        "parameters": count_parameters(network),
        "multiply_adds": multiply_adds(network, shape),
    }
