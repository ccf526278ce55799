"""What a benchmark is told: where, how precisely and how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from segmamba.devices import Precision, precision_for, resolve_device
from segmamba.errors import ConfigError, describe

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings that all benchmarks share."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    dtype: str = "auto"
    """fp32, bf16, fp16; auto: bf16 where the device computes it natively."""
    seconds: float = 1.5
    """Time for the rounds of one measurement, above 0."""
    quick: bool = False
    """Tiny shapes: shows that the benchmark works, measures nothing of interest."""
    backend: str = "auto"
    """Back end of the scans."""
    peers: bool = True
    """Measure what is compared with too, where it is installed."""
    case: Path | None = None
    """Folder with one case's four scans, for `predict`; None simulates one."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ConfigError(
                describe("bad seconds", expected="above 0", found=self.seconds)
            )

    @property
    def place(self) -> torch.device:
        """The device itself."""
        return resolve_device(self.device)

    @property
    def precision(self) -> Precision:
        """The type that matrix products and convolutions compute in."""
        return precision_for(self.place, self.dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as torch's type."""
        return _DTYPES[self.precision]
