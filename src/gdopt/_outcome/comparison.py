"""A noisy loss at two points, compared on the same batches and random keys."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._compile import program
from gdopt._loop.state import Inputs, State
from gdopt._loop.step import loss_arguments
from gdopt._problem.problem import Problem
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_BATCHES = 100  # the most batches or keys that are compared


def is_at_most(problem: Problem, inputs: Inputs, state: State, params: PyTree) -> bool:
    """Tell whether the mean loss at some params is at most that of the start.

    Both are evaluated on the same batches, evenly drawn from all rows, and each with its own model state. A stream has
    but its last batch in memory.
    """
    batches = problem.batches
    count = 1 if problem.stream is not None else min(batches.per_epoch if batches else _BATCHES, _BATCHES)
    with own_work():
        order = None
        if batches:
            order = _trees.on_device(np.random.default_rng(0).permutation(batches.rows).astype(np.int32))

        def mean(k: jax.Array, params: PyTree, model: PyTree, inputs: Inputs, order: Any) -> jax.Array:
            some = state._replace(step=k, order=order, model=model)
            with own_promotion():
                given = loss_arguments(inputs, some, batches, with_key=problem.with_key)
            penalty = problem.constraint and problem.constraint.penalty
            value = problem.value(params, *given)[0]
            return (value + penalty(params) if penalty else value).astype(jnp.float32)

        ends = [(inputs.start, problem.state), (params, state.model)]
        shared = program.share(mean, np.int32(0), *ends[0], inputs, order)
        values = [[float(shared.call(np.int32(k), *end, inputs, order)) for k in range(count)] for end in ends]
        gains = [before - after for before, after in zip(*values, strict=True)]
    return math.isfinite(sum(gains)) and sum(gains) >= 0
