"""The trials of a search that were rejected, found in the losses of its history."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gdopt._result import Result

_ROUNDING = 10  # the difference of losses that count as equal, in eps; as the search has it
_MOST = 60  # rejected trials in a row, after which the search starts anew
_SHARE = 0.5001  # the longest step after a rejected one, over that, with its rounding


def rejected(result: Result) -> np.ndarray:
    """Return the steps whose points the optimizer took back; none for optimizers that accept every point.

    A search accepts a point if its loss is not above the average of the accepted ones (Zhang & Hager, 2004). The losses
    alone decide, up to a ten-thousandth of the fall that the slope promises. If rates are known, one that is rejected
    is followed by at most half of it. The losses of a run with ``prox=`` that has no value cannot tell.
    """
    average = _average(result.optimizer_state)
    if average is None or result.history is None:
        return np.zeros(0, int)
    loss, grad_norm, rate = (np.asarray(entries) for entries in result.history[:3])
    with np.errstate(invalid="ignore"):
        if (loss < result.loss).any():  # A penalty that the losses leave out decides as well, so they cannot tell.
            return np.zeros(0, int)
    eps = float(np.finfo(loss.dtype).eps) if loss.dtype.kind == "f" else 0.0
    finite = np.isfinite(loss) & np.isfinite(grad_norm)
    shortened = np.append(True, ~(rate[1:] > _SHARE * rate[:-1]))  # NaN: not known
    found: list[int] = []
    reference, weight, in_row = float(loss[0]), 1.0, 0
    for step in range(1, len(loss)):
        value = float(loss[step])
        if finite[step] and value <= reference + _ROUNDING * eps * abs(reference):
            weight = average * weight + 1
            reference, in_row = reference + (value - reference) / weight, 0
        elif in_row >= _MOST:  # The search starts anew at this point.
            reference, weight, in_row = value, 1.0, 0
        else:
            found.append(step)
            in_row += 1
    return np.array([step for step in found if shortened[step]], int)


def _average(state: Any) -> float | None:
    """Return the weight of the past in the average of an optimizer that searches; None if it does not."""
    is_search = lambda node: hasattr(node, "average") and hasattr(node, "rejected")
    searches = [node for node in jax.tree.leaves(state, is_leaf=is_search) if is_search(node)]
    return float(searches[0].average) if searches else None
