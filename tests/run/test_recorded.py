"""``record_params=True`` keeps the params of every step, and changes nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt import InputError, Status
from gdopt._loop import while_loops

SIZES = jnp.array([1.0, 10.0, 100.0])
ROWS = jax.random.normal(jax.random.key(1), (40, 3))
START = {"w": jnp.zeros(3), "b": 0.5}


def bowl(x: Any) -> Any:
    return jnp.sum(SIZES * (x - 1) ** 2)


def wave(z: Any) -> Any:
    return jnp.abs(z[0] - (3 - 2j)) ** 2 + jnp.abs(z[1]) ** 4


def fit(params: Any, rows: Any) -> Any:
    return jnp.mean((rows @ params["w"] + params["b"] - jnp.sin(rows[:, 0])) ** 2)


def with_key(params: Any, rows: Any, key: Any) -> Any:
    return fit(params, rows) + 0.01 * jax.random.normal(key) * params["b"]


def with_aux(params: Any, rows: Any) -> Any:
    return fit(params, rows), {"sum": jnp.sum(params["w"])}


def stream() -> Any:
    return iter(np.asarray(ROWS).reshape(5, 8, 3))


BOWL = {"loss": bowl, "params": jnp.zeros(3)}
NOISY = {"loss": fit, "params": START, "data": ROWS, "batch_size": 8, "epochs": 4}
CALLS: dict[str, dict[str, Any]] = {
    "quasi_newton": BOWL,
    "spectral": {**BOWL, "optimizer": gdopt.gd},
    "gd": {**BOWL, "learning_rate": 0.004, "max_steps": 50},
    "no step": {**BOWL, "params": jnp.ones(3), "learning_rate": 0.004},
    "average": {**BOWL, "optimizer": optax.contrib.schedule_free_sgd(0.001), "max_steps": 50},
    "diverges": {**BOWL, "learning_rate": 1.0},
    "not finite": {**BOWL, "loss": lambda x: -jnp.sum(x**3), "params": jnp.ones(3), "learning_rate": 9.0},
    "bounds": {**BOWL, "bounds": (-1.0, jnp.array([0.5, 5.0, 5.0]))},
    "scale": {**BOWL, "scale": jnp.array([1.0, 0.25, 1e-3]), "learning_rate": 0.004},
    "complex": {"loss": wave, "params": jnp.zeros(2, complex), "learning_rate": 0.1},
    "complex and scale": {"loss": wave, "params": jnp.ones(2, complex), "scale": 8.0, "learning_rate": 0.001},
    "bfloat16": {**BOWL, "params": jnp.zeros(3, jnp.bfloat16), "learning_rate": 0.004, "max_steps": 20},
    "batches": {**NOISY, "learning_rate": 0.05},
    "cycle": NOISY,
    "stream": {**NOISY, "data": stream, "batch_size": None, "max_steps": 20, "learning_rate": 0.05},
    "key": {**NOISY, "loss": with_key, "with_key": True, "learning_rate": 0.05},
    "frozen": {**NOISY, "trainable": {"w": True, "b": False}, "learning_rate": 0.05},
    "validation": {**NOISY, "loss": with_aux, "has_aux": True, "validation": ROWS[:9], "learning_rate": 0.05},
    "no entries in a leaf": {**BOWL, "loss": lambda p: bowl(p[0]), "params": [jnp.zeros(3), jnp.zeros((0, 2))]},
}


def same_bits(one: Any, other: Any) -> bool:
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)]
    return all(a.tobytes() == b.tobytes() and a.dtype == b.dtype for a, b in pairs)


def leaves_of(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


@pytest.mark.parametrize("name", CALLS)
def test_the_run_is_the_same_and_each_point_is_recorded(name: str) -> None:
    call = CALLS[name]
    plain, result = gdopt.minimize(**call), gdopt.minimize(**call, record_params=True)
    assert plain.history.params is None
    assert same_bits(result.history._replace(params=None), plain.history)
    assert same_bits(result.params, plain.params)
    assert (result.status, result.steps, result.message) == (plain.status, plain.steps, plain.message)
    for points, start in zip(leaves_of(result.history.params), jax.tree.leaves(call["params"]), strict=True):
        if points is not None:
            assert type(points) is np.ndarray
            assert points.dtype == jnp.result_type(start)
            assert points.shape == (result.steps + 1, *np.shape(start))
            np.testing.assert_array_equal(points[0], np.asarray(start))


@pytest.mark.parametrize("name", ["gd", "scale", "complex and scale", "bfloat16", "batches"])
def test_an_entry_is_the_point_that_a_callback_gets_at_that_step(name: str) -> None:
    seen: dict[int, Any] = {}
    result = gdopt.minimize(
        **CALLS[name], record_params=True, callback=lambda at: seen.update({at.step: at.params}), callback_every=1
    )
    assert len(seen) > 3
    for step, params in seen.items():
        leaves = [points[step] for points in jax.tree.leaves(result.history.params)]
        assert same_bits(leaves, params)


@pytest.mark.parametrize("name", ["quasi_newton", "spectral", "scale", "complex"])
def test_the_loss_beside_a_point_is_its_loss(name: str) -> None:
    result = gdopt.minimize(**CALLS[name], record_params=True)
    points = jnp.asarray(result.history.params)
    np.testing.assert_allclose(jax.vmap(CALLS[name]["loss"])(points), result.history.loss, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(points[np.argmin(result.history.loss)], result.params)


def test_leaves_that_are_not_optimised_are_none() -> None:
    params = {"w": jnp.zeros(3), "b": 0.5, "count": 3, "name": "line"}
    loss = lambda p: bowl(p["w"]) + p["b"] * p["count"]
    result = gdopt.minimize(loss, params, trainable={**dict.fromkeys(params, False), "w": True}, record_params=True)
    assert {name: leaf is None for name, leaf in result.history.params.items()} == {
        "w": False,
        "b": True,
        "count": True,
        "name": True,
    }


def test_float64_keeps_its_digits() -> None:
    with jax.enable_x64(True):
        start = {"wide": jnp.full(2, 0.1), "narrow": jnp.ones(2, jnp.float32)}
        loss = lambda p: jnp.sum(p["wide"] ** 2) + jnp.sum(p["narrow"].astype(float) ** 2)
        result = gdopt.minimize(loss, start, learning_rate=0.1, max_steps=5, tol=0, record_params=True)
    assert result.history.params["narrow"].dtype == np.float32
    x = np.full(2, 0.1)
    for wide in result.history.params["wide"]:
        np.testing.assert_allclose(wide, x, rtol=1e-15)
        x = x - 0.1 * (2 * x)


def test_many_numbers_and_many_steps_cross_the_borders_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A carry has room for fewer rows if these are long; the last row of a full one is kept as well."""
    monkeypatch.setattr(while_loops, "_MOST", 7 * 503)
    x = jnp.ones(500)
    result = gdopt.minimize(lambda x: jnp.sum(x**2), x, learning_rate=0.01, max_steps=200, tol=0, record_params=True)
    np.testing.assert_allclose(result.history.params[:, 3], 0.98 ** np.arange(201), rtol=1e-4)


def test_a_long_run_records_every_step() -> None:
    result = gdopt.minimize(lambda x: x**2, 1.0, learning_rate=1e-5, max_steps=100_000, tol=0, record_params=True)
    assert result.history.params.shape == result.history.loss.shape == (100_001,)
    np.testing.assert_allclose(result.history.params**2, result.history.loss, rtol=1e-6)


def test_a_prepared_call_records_as_well() -> None:
    solve = gdopt.prepare(**BOWL, learning_rate=0.004, record_params=True)
    start = jnp.array([3.0, 2.0, 1.0])
    again = gdopt.minimize(bowl, start, learning_rate=0.004, record_params=True)
    assert same_bits(solve(start).history, again.history)


def test_a_recorded_result_is_a_pytree_and_can_be_compared() -> None:
    result = gdopt.minimize(**CALLS["gd"], record_params=True)
    other = dataclasses.replace(result, history=result.history._replace(params=result.history.params + 1))
    assert result == jax.tree.map(lambda leaf: leaf, result)
    assert result != other


def test_inside_a_transformation_it_is_an_error() -> None:
    with pytest.raises(InputError, match="record_params=True was given to minimize inside jit"):
        jax.jit(lambda x: gdopt.minimize(bowl, x, record_params=True))(jnp.zeros(3))


def test_a_run_that_is_repeated_at_lower_rates_holds_the_params_of_the_last_try() -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(64, 3)).astype(np.float32)
    loss = lambda w, batch: jnp.mean((batch @ w - 1) ** 2)
    result = gdopt.minimize(loss, jnp.zeros(3), data=X, batch_size=8, epochs=10, optimizer=gdopt.gd, record_params=True)
    assert result.status is Status.MAX_STEPS
    assert len(result.history.params) == result.steps + 1
