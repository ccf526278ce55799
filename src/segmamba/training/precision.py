"""The number type of a training step, chosen by what the device computes natively."""

from __future__ import annotations

from typing import Any, Literal

import torch

from segmamba.errors import BackendUnavailableError, describe

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Autocast type by name."""

_AMPERE = 8  # the first CUDA generation with bfloat16 units


def usable_device(device: torch.device | str) -> torch.device:
    """Turn "auto" or a name into a device that is there.

    Raises:
        BackendUnavailableError: This machine or this torch has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendUnavailableError(
            describe(
                f"device '{device}' can't be used",
                expected="cpu" + (", cuda" if torch.cuda.is_available() else ""),
                found=str(error).splitlines()[0],
                remedy="Use --device cpu, or install a torch built for your GPU.",
            )
        ) from error
    return device


def precision_for(
    device: torch.device | str,
    wanted: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
) -> Precision:
    """Choose the autocast type.

    Args:
        device: Where the network computes.
        wanted: A type, or "auto": bf16 where the device has units for it (CUDA from
            compute capability 8, CPUs with AVX512-BF16 or AMX); fp16 on older CUDA;
            else fp32.

    Returns:
        "fp32", "bf16" or "fp16".
    """
    if wanted != "auto":
        return wanted
    kind = torch.device(device).type
    if kind == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= _AMPERE else "fp16"
    if kind == "cpu" and cpu_has_bf16_units():
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Give the context in which the network computes; "fp32" changes nothing."""
    return torch.autocast(
        device.type, dtype=DTYPES[precision], enabled=precision != "fp32"
    )


def cpu_has_bf16_units() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware.

    Torch has no public question for it; where the private one is missing, no.
    """
    cpu: Any = torch.cpu
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    asked = [getattr(cpu, name, None) for name in questions]
    return any(bool(question()) for question in asked if question is not None)
