"""The golden data: the numbers of the published code, and how they were drawn.

The recipe's random numbers need no library: a hash of the seed and the name starts
SplitMix64, whose upper 24 bits are exact in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)


class Golden:
    """One golden file: its tensors and what it says about itself."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "np") as file:
            self.about: dict[str, Any] = json.loads(file.metadata()["golden"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config: dict[str, Any] = self.about["config"]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The tensors whose names start with a prefix, by the rest of their names."""
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [-1, 1), float64."""
    count = math.prod(shape)
    start = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * GAMMA
        z += np.uint64(int.from_bytes(start, "big"))
        z = (z ^ (z >> np.uint64(30))) * MIX1
        z = (z ^ (z >> np.uint64(27))) * MIX2
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)) / 2.0**23 - 1.0).reshape(shape)


def weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recipe's value of a parameter, float32."""
    u = uniform(seed, name, shape)
    last = name.split(".")[-1]
    if last in ("A_log", "A_b_log", "A_s_log"):
        value = np.log(np.arange(1.0, shape[1] + 1)) + 0.3 * u
    elif last in ("D", "D_b", "D_s"):
        value = 1 + 0.3 * u
    elif name.endswith(("dt_proj.bias", "dt_proj_b.bias", "dt_proj_s.bias")):
        value = -3 + 1.5 * u
    elif len(shape) == 1:
        value = 1 + 0.3 * u if last == "weight" else 0.2 * u
    else:
        value = math.sqrt(3 / math.prod(shape[1:])) * u
    return value.astype(np.float32)


def data(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recipe's input or output weights: unit variance, float32."""
    return (math.sqrt(3) * uniform(seed, name, shape)).astype(np.float32)


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the arrays' little-endian float32 bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return total.hexdigest()


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest wanted number."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def l2_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def gradient_error(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> float:
    """Worst parameter's largest difference over its largest entry.

    Parameters without effect have no gradient but rounding, so the divisor is at least
    a hundredth of the largest entry of all.
    """
    floor = 0.01 * max(np.abs(value).max() for value in wanted.values())
    return max(
        float(np.abs(found[name] - value).max() / max(np.abs(value).max(), floor))
        for name, value in wanted.items()
    )
