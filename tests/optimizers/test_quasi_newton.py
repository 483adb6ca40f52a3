"""``gdopt.quasi_newton``: in a hand-written loop, and as ``minimize``'s default."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt
from gdopt import InputError


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


START = jnp.array([-1.2, 1.0])


def descend(loss: Any, params: Any, steps: int, optimizer: Any = None) -> tuple[Any, jax.Array]:
    """A hand-written loop: the optimizer's state, and the loss at each evaluation."""
    optimizer = optimizer or gdopt.quasi_newton()

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        grad = jax.tree.map(jnp.conj, grad)
        updates, state = optimizer.update(grad, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (_, state), values = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=steps))(
        params
    )
    return state, values


@pytest.mark.parametrize(("memory", "most"), [(0, 120), (1, 120), (2, 100), (5, 80), (10, 80)])
def test_rosenbrock(memory: int, most: int) -> None:
    _, values = descend(rosenbrock, START, most, gdopt.quasi_newton(memory))
    assert jnp.nanmin(values) < 1e-6


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_a_diagonal_quadratic_of_any_condition(condition: float) -> None:
    """The diagonal is learned: spectral steps take thousands for 1e6."""
    with jax.enable_x64(True):
        scales = np.geomspace(1, condition, 20)
        _, values = descend(lambda x: jnp.sum(scales * (x - 1) ** 2), jnp.zeros(20), 300)
        losses = np.asarray(values)
    assert np.nanmin(losses) < 1e-6 * losses[0]


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_losses_of_any_size(factor: float) -> None:
    loss = lambda x, factor: factor * jnp.sum(jnp.array([1.0, 10.0]) * (x - 1) ** 2)
    result = gdopt.minimize(loss, jnp.zeros(2), args=(factor,))
    assert result.success, result
    np.testing.assert_allclose(result.params, 1, rtol=0.01)


@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1e6, 1e15])
def test_params_of_any_size(unit: float) -> None:
    result = gdopt.minimize(lambda x, unit: rosenbrock(x / unit), START * unit, args=(unit,))
    assert result.success, result
    np.testing.assert_allclose(result.params / unit, 1, rtol=0.02)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.complex64])
def test_dtypes(dtype: Any) -> None:
    start = {"a": jnp.ones(3, dtype), "b": jnp.zeros((2, 2), jnp.float32)}
    loss = lambda p: jnp.sum(jnp.abs(p["a"] - 2) ** 2).astype(jnp.float32) + jnp.sum((p["b"] - 3) ** 2)
    state, _ = descend(loss, start, 40)
    assert jax.tree.map(lambda leaf: leaf.dtype, state.params) == jax.tree.map(lambda leaf: leaf.dtype, start)
    np.testing.assert_allclose(np.asarray(state.params["a"], complex), 2, atol=0.05)
    np.testing.assert_allclose(state.params["b"], 3, atol=0.05)


def test_complex_params_are_pairs_of_real_ones() -> None:
    loss = lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 2 * jnp.array([1.0, 5.0]))
    result = gdopt.minimize(loss, jnp.zeros(2, complex))
    assert result.success
    assert result.verified
    np.testing.assert_allclose(result.params, 1 + 2j, atol=1e-3)


def test_trials_out_of_the_domain_are_undone() -> None:
    loss = lambda x: jnp.sum(x - jnp.log(x) + 100 * jnp.log(x) ** 2)
    result = gdopt.minimize(loss, jnp.array([3e-4, 50.0]))
    assert result.success, result
    np.testing.assert_allclose(result.params, 1, rtol=0.01)


def test_it_runs_in_a_vmap() -> None:
    starts = jnp.stack([START, START + 0.5, START - 0.3])
    both = jax.vmap(lambda start: descend(rosenbrock, start, 80)[0].value)(starts)
    for start, value in zip(starts, both, strict=True):
        np.testing.assert_allclose(descend(rosenbrock, start, 80)[0].value, value, atol=1e-4)


def test_masked_and_chained() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    optimizer = optax.masked(gdopt.quasi_newton(), {"a": True, "b": False})
    loss = lambda p: jnp.sum((p["a"] - 2) ** 2)
    result = gdopt.minimize(loss, params, optimizer=optax.chain(optax.identity(), optimizer))
    assert result.success, result
    np.testing.assert_allclose(result.params["a"], 2, atol=1e-3)


def test_the_state_holds_two_trees_for_each_pair_and_three_more() -> None:
    for memory in (0, 2, 5):
        state = gdopt.quasi_newton(memory).init(jnp.zeros(1000))
        entries = sum(leaf.size for leaf in jax.tree.leaves(state))
        assert entries <= (2 * memory + 3) * 1000 + memory**2 + memory + 20


def test_the_message_of_the_default_names_the_optimizer() -> None:
    result = gdopt.minimize(rosenbrock, START)
    assert result.message.endswith("The optimizer was gdopt.quasi_newton.")
    same = gdopt.minimize(rosenbrock, START, optimizer=gdopt.quasi_newton())
    np.testing.assert_array_equal(result.history.loss, same.history.loss)


def test_fewer_pairs_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 80)
    result = gdopt.minimize(rosenbrock, START)  # 8 bytes, of which 40 hold five
    assert "gdopt.quasi_newton(memory=1), because more pairs would take too much memory." in result.message


def test_equal_calls_share_one_program() -> None:
    fit = lambda target, **more: gdopt.minimize(lambda x: jnp.sum((x - target) ** 4 + x**2), jnp.zeros(3), **more)
    fit(jnp.float32(2))
    with count_compilations() as compiled:
        fit(jnp.float32(3))
        fit(jnp.float32(4), optimizer=gdopt.quasi_newton(5))
    assert compiled.count == 0, compiled.names


@pytest.mark.parametrize("memory", [-1, 2.5, "five"])
def test_bad_memory(memory: Any) -> None:
    with pytest.raises(InputError, match="memory="):
        gdopt.quasi_newton(memory)


@pytest.mark.parametrize("noise", [{"with_key": True}, {"data": np.ones((8, 2), "f4"), "batch_size": 4}])
def test_noisy_losses_are_refused(noise: dict) -> None:
    loss = lambda x, *rest, key=None: jnp.sum(x**2)
    with pytest.raises(InputError, match=r"Leave the optimizer out, or pass gdopt\.gd with"):
        gdopt.minimize(loss, jnp.ones(2), optimizer=gdopt.quasi_newton(), **noise)


def test_without_params() -> None:
    optimizer = gdopt.quasi_newton()
    with pytest.raises(InputError, match="without params"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), value=1.0)
