"""Where a figure comes from: device, versions, commit."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from segmamba.manifest import package_version as package_version
from segmamba.manifest import processor_name, versions
from segmamba.ops import available_backends
from segmamba.types import JsonDict


def environment(device: torch.device) -> JsonDict:
    """Describe what a benchmark runs on.

    Args:
        device: Where it runs.

    Returns:
        device, threads, versions, commit and back ends, for JSON.
    """
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "backends": available_backends(),
    }


def device_name(device: torch.device) -> str:
    """Give the GPU's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def why_not_importable(*modules: str) -> str:
    """Say why a module can't be imported; empty if one of them can.

    Args:
        modules: Names, any of which would do.

    Returns:
        An empty text, or one line about each failure.
    """
    reasons = []
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken extension raises anything
            reasons.append(f"{name}: {first_line(error)}")
        else:
            return ""
    return "; ".join(reasons)


def first_line(error: BaseException) -> str:
    """Give an error's type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def commit() -> str | None:
    """Describe the commit of the checkout that this code lies in, if it does."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=root, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


@contextmanager
def fixed_arithmetic(*, search: bool = True) -> Iterator[None]:
    """Switch TF32 off and cuDNN's search for the fastest algorithm on, then back.

    float32 then means float32, and everything compared runs under one rule.

    Args:
        search: False switches the search off.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, search
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
