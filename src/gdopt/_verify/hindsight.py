"""A look at the loss at the end of a run without a minimum, for the advice in its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LEAST_STEPS = 200  # the fewest steps of a run worth a look, which costs up to 34 gradients
_EXACT = 32  # the most entries along each of which the curvature is computed
_LEAVES, _PROBES = 16, 2  # with more entries, the largest leaves that are probed, and the probes each
_APART = 100.0  # the ratio of scales below which no advice is needed
_OPPOSITE = -0.5  # the cosine below which two gradients count as opposite
_POWERS = 10  # the products of the Hessian in the power method

Leaves = list[Any]  # arrays of NumPy
# (params, direction) -> the gradient, and the Hessian times the direction
Probe = Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]


class Hindsight(NamedTuple):
    """The findings of a look back."""

    overshoots: bool = False  # whether a step of gradient descent reverses the gradient
    apart: tuple[str, str] | None = None  # params whose scales differ by far, the larger scale first
    stable: float | None = None  # the largest rate at which gradient descent does not diverge


def look_back(probe: Probe, names: list[str], params: Leaves, rate: float | None) -> Hindsight:
    """Look at the loss around the point that is returned; ``rate`` is the last one of plain gradient descent."""
    overshoots, stable = False, None
    if rate is not None:
        none = [np.zeros_like(leaf) for leaf in params]
        here, _ = probe(params, none)
        there, _ = probe([(x - rate * g).astype(x.dtype) for x, g in zip(params, here, strict=True)], none)
        first, second = _flat(here), _flat(there)
        overshoots = bool(first @ second < _OPPOSITE * np.linalg.norm(first) * np.linalg.norm(second))
        stable = _stable_rate(lambda way: probe(params, way)[1], here)
    named, curvatures = _curvatures(lambda way: probe(params, way)[1], names, params)
    seen = np.flatnonzero(np.isfinite(curvatures) & (curvatures > 0))
    if seen.size < 2:
        return Hindsight(overshoots, None, stable)
    low, high = seen[np.argmin(curvatures[seen])], seen[np.argmax(curvatures[seen])]
    apart = np.sqrt(curvatures[high] / curvatures[low]) >= _APART
    return Hindsight(overshoots, (named[low], named[high]) if apart else None, stable)


def _stable_rate(times: Callable[[Leaves], Leaves], way: Leaves) -> float | None:
    """Return 2 / L with the largest curvature L, by the power method from the gradient; None if it is not found."""
    curvature = 0.0
    for _ in range(_POWERS):
        length = np.linalg.norm(_flat(way))
        if not (np.isfinite(length) and length > 0):
            return None
        way = times([(leaf / length).astype(leaf.dtype) for leaf in way])
        curvature = np.linalg.norm(_flat(way))
    return 2 / float(curvature) if np.isfinite(curvature) and curvature > 0 else None


def _flat(leaves: Leaves) -> np.ndarray:
    return np.concatenate([np.ravel(leaf).astype(float) for leaf in leaves])


def _curvatures(times: Callable[[Leaves], Leaves], names: list[str], params: Leaves) -> tuple[list[str], np.ndarray]:
    """Return the diagonal of the Hessian with names; for many params, its mean over each leaf.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.
    """
    if sum(leaf.size for leaf in params) > _EXACT:
        random, means = np.random.default_rng(0), np.zeros(len(params))
        # The leaves are probed one at a time, because a large curvature would hide a small one.
        for number in sorted(range(len(params)), key=lambda number: -params[number].size)[:_LEAVES]:
            for _ in range(_PROBES):
                way = [np.zeros_like(other) for other in params]
                way[number] = random.choice([-1, 1], way[number].shape).astype(way[number].dtype)
                means[number] += np.mean(way[number].astype(float) * times(way)[number]) if way[number].size else 0
        return names, means
    named, found = [], []
    for number, (name, leaf) in enumerate(zip(names, params, strict=True)):
        for place in np.ndindex(leaf.shape):
            way = [np.zeros_like(other) for other in params]
            way[number][place] = 1
            named.append(name + (f"[{', '.join(map(str, place))}]" if place else ""))
            found.append(times(way)[number][place])
    return named, np.array(found, float)
