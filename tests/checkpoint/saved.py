"""Arrays to save, and their comparison."""

from __future__ import annotations

import numpy as np

ARRAYS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.zeros(0, np.int8), "z": np.array(1 + 2j)}
META = {"step": 7, "loss": 0.1, "names": ["a", None, True]}
NAME = "run.{:012d}.gdopt"


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Compare arrays bit for bit."""
    kinds = [{name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()} for arrays in (a, b)]
    return kinds[0] == kinds[1]
