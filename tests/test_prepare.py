"""A prepared call: the same bits as `minimize`, without a trace, and an error for what does not look alike."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, count_traces

import gdopt
from gdopt import InputError, Status

SIZES = jnp.array([1.0, 10.0, 100.0])
ROWS = jax.random.normal(jax.random.key(1), (40, 3))


def bowl(x: Any, a: Any) -> Any:
    return jnp.sum(SIZES * (x - a) ** 2) + 0.1 * jnp.sum((x - a) ** 4)


def fit(params: Any, rows: Any) -> Any:
    return jnp.mean((rows @ params["w"] + params["b"] - jnp.sin(rows[:, 0])) ** 2)


def with_aux(x: Any, a: Any) -> Any:
    return bowl(x, a), {"sum": jnp.sum(x)}


def with_key(params: Any, rows: Any, key: Any) -> Any:
    return fit(params, rows) + 0.01 * jax.random.normal(key) * params["b"]


def with_state(params: Any, rows: Any, state: Any) -> Any:
    return fit(params, rows) + 0 * state, state + 1


BOWL = {"loss": bowl, "params": jnp.zeros(3), "args": (jnp.array([1.0, 2.0, 3.0]),)}
FIT = {"loss": fit, "params": {"w": jnp.zeros(3), "b": 0.5}, "data": ROWS}
NOISY = {**FIT, "batch_size": 8, "max_steps": 17}
CALLS: dict[str, dict[str, Any]] = {
    "quasi_newton": BOWL,
    "spectral": {**BOWL, "optimizer": gdopt.gd},
    "gd": {**BOWL, "learning_rate": 0.004},
    "few steps": {**BOWL, "learning_rate": 0.004, "max_steps": 20},
    "schedule": {**BOWL, "optimizer": optax.adam, "learning_rate": optax.cosine_decay_schedule(0.3, 200)},
    "adam(0.1)": {**BOWL, "optimizer": optax.adam(0.1)},
    "lbfgs": {**BOWL, "optimizer": optax.lbfgs()},
    "average": {**BOWL, "optimizer": optax.contrib.schedule_free_sgd(0.001), "max_steps": 50},
    "target": {**BOWL, "target": 1e-2, "tol": 0},
    "grad_tol": {**BOWL, "grad_tol": 1e-2, "tol": 0},
    "last point": {**BOWL, "learning_rate": 0.004, "keep_best": False},
    "diverges": {**BOWL, "learning_rate": 1.0},
    "bounds": {**BOWL, "bounds": (-1.0, jnp.array([0.5, 5.0, 5.0]))},
    "bounds and scale": {**BOWL, "bounds": (-1.0, jnp.array([0.5, 5.0, 5.0])), "scale": jnp.array([1.0, 0.5, 0.1])},
    "prox": {**BOWL, "prox": gdopt.prox.l1(0.5)},
    "project": {**BOWL, "project": lambda x: optax.projections.projection_l2_ball(x, 2.0)},
    "scale": {**BOWL, "scale": jnp.array([1.0, 0.5, 0.1])},
    "curvature": {**BOWL, "scale": "curvature"},
    "aux": {**BOWL, "loss": with_aux, "has_aux": True},
    "a tree": {**FIT},
    "trainable": {**FIT, "trainable": {"w": True, "b": False}},
    "batches": {**NOISY, "learning_rate": 0.1},
    "batches and keys": {**NOISY, "loss": with_key, "with_key": True, "optimizer": optax.adam(0.1)},
    "state": {**NOISY, "loss": with_state, "state": jnp.float32(0), "learning_rate": 0.1},
}


def equal(one: gdopt.Result, other: gdopt.Result) -> None:
    """Two results agree in all numbers, and in their sentence."""
    assert (one.status, one.message, one.success) == (other.status, other.message, other.success)
    assert one == other  # all numbers but the seconds
    assert one.history is not None
    assert other.history is not None
    for a, b in zip(one.history[:3], other.history[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def called(options: dict[str, Any], function: Any = gdopt.minimize, **changes: Any) -> Any:
    options = {**options, **changes}
    return function(options.pop("loss"), options.pop("params"), **options)


@pytest.mark.filterwarnings("ignore:.*moved|.*nearest point within|.*outside of the set")
@pytest.mark.parametrize("name", CALLS)
def test_it_returns_the_result_of_minimize(name: str) -> None:
    options = CALLS[name]
    solve = called(options, gdopt.prepare)
    equal(solve(), called(options))
    start = jax.tree.map(lambda x: x + 0.75, options["params"])
    if name == "trainable":
        start["b"] = options["params"]["b"]
    if name != "curvature":  # whose sizes are those of the preparation
        equal(solve(start), called(options, params=start))
    given = {"args": (jnp.array([3.0, -2.0, 1.0]),)} if "args" in options else {"data": ROWS[::-1] + 0.1}
    if name != "curvature":
        equal(solve(**given), called(options, **given))
    if isinstance(options.get("learning_rate"), float):
        equal(solve(learning_rate=0.003), called(options, learning_rate=0.003))
    equal(solve(), called(options))  # Nothing is left of the runs in between.


def test_a_second_call_traces_and_compiles_nothing() -> None:
    calls = []

    def loss(x: Any, a: Any) -> Any:
        calls.append(1)
        return bowl(x, a)

    for options in ({}, {"optimizer": optax.adam(0.1)}, {"bounds": (-1.0, 2.5)}, {"prox": gdopt.prox.l1(0.5)}):
        solve = gdopt.prepare(loss, jnp.zeros(3), args=(jnp.ones(3),), **options)
        start, args = jnp.full(3, 0.5), (jnp.array([2.0, 0.5, 1.0]),)
        calls.clear()
        solve()
        with count_compilations() as compilations, count_traces() as traces:
            solve(start, args=args)
        assert (compilations.names, traces, calls) == ([], [], [])
