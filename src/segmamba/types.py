"""Aliases that say what a tuple or array means."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Size3: TypeAlias = tuple[int, int, int]
"""Voxels along three axes."""

Spacing3: TypeAlias = tuple[float, float, float]
"""Millimetres along three axes."""

Array: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
JsonDict: TypeAlias = dict[str, Any]
