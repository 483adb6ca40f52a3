"""The changes that a run may make when it resumes, of limits and of the learning rate, each with both values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt._compile import digests
from gdopt._optimizers.method import Method
from gdopt._problem.limits import LAST_STEP
from gdopt._settings import own_promotion, own_work
from gdopt._stopping import Limits

# The kinds of rates, as a checkpoint names them.
OWNED, NUMBER, SCHEDULE, TESTED = "the optimizer's own", "a number", "a schedule", "that of a range test"
_DENSE, _FACTOR = 10, 1.2  # the first steps at which rates are listed, and the distance of the later ones
_BEYOND = 10  # the last listed step over the steps that were asked for: another call may ask for more


def rates_of(method: Method, most: int, *, by_test: bool) -> dict[str, Any]:
    """Describe the learning rate of a run: its rates at some steps, and the checksum of a schedule."""
    if method.rate is None:
        return {"kind": OWNED, "steps": [], "rates": [], "schedule": ""}
    if method.schedule is None:
        return {"kind": NUMBER, "steps": [0], "rates": rates_at(method, [0]), "schedule": ""}
    last, steps = min(most * _BEYOND, LAST_STEP), list(range(_DENSE))
    while steps[-1] < last:
        steps.append(min(int(steps[-1] * _FACTOR), last))
    with own_promotion():
        schedule = digests.digest(method.rate_at, np.int32(0))
    rates = rates_at(method, steps)
    return {
        "kind": TESTED if by_test else SCHEDULE,
        "steps": steps if rates else [],
        "rates": rates,
        "schedule": schedule,
    }


def rates_at(method: Method, steps: Sequence[int]) -> list[float]:
    """Return the rates at some steps; none if the optimizer owns its rate, or a schedule takes one step at a time."""
    if method.rate is None:
        return []
    if method.schedule is None:
        return [shortest(np.asarray(method.rate, jax.dtypes.canonicalize_dtype(float)))] * len(steps)
    with own_work(), own_promotion(), contextlib.suppress(Exception):
        at = np.asarray(steps, np.int32)
        return list(map(shortest, np.asarray(jax.vmap(lambda step: jnp.asarray(method.rate_at(step), float))(at))))
    return []


def changed_limits(theirs: dict[str, Any], mine: dict[str, Any]) -> Iterator[str]:
    """Name the limits that differ."""
    # Version 0.1.0 did not save what was asked for.
    limits = [(name, new, theirs.get("asked", {}).get(name, new)) for name, new in mine["asked"].items()]
    limits += zip(Limits._fields[1:], mine["limits"], theirs["limits"], strict=True)
    for name, new, old in limits:
        if old != new:
            yield f"{name}={_limit(new)} (it was {_limit(old)})"


def changed_rates(theirs: dict[str, Any] | None, mine: dict[str, Any], there: list[float], made: int) -> Iterator[str]:
    """Name the first of the next steps whose rate differs; ``there`` are the new rates at the steps that are listed."""
    if theirs is None or mine["kind"] == OWNED:  # The optimizer was compared.
        return
    steps, old = theirs["steps"], theirs["rates"]
    if theirs["kind"] == NUMBER:
        steps, old, there = mine["steps"], old * len(mine["steps"]), mine["rates"]
    if len(there) != len(old) or not old:
        if theirs["kind"] != mine["kind"]:
            yield f"learning_rate is {mine['kind']} (it was {theirs['kind']})"
        return
    for at, step in enumerate(steps):
        if (step >= made or at == len(steps) - 1) and not np.array_equal(old[at], there[at], equal_nan=True):
            when = "" if theirs["kind"] == mine["kind"] == NUMBER else f" at step {step}"
            yield f"learning_rate={there[at]!r}{when} (it was {old[at]!r})"
            return
    if theirs["schedule"] not in ("", mine["schedule"]) or (theirs["kind"] == NUMBER != mine["kind"]):
        kinds = "" if theirs["kind"] == mine["kind"] else f" is {mine['kind']} (it was {theirs['kind']})"
        yield f"learning_rate{kinds or ' is another schedule'}, with the same rates at the {len(steps)} steps compared"


def shortest(rate: np.ndarray) -> float:
    """Return a rate as Python's float, with the fewest digits that tell it apart in its own precision."""
    return float(str(rate))


def _limit(value: Any) -> Any:
    return None if value == "-inf" else value
