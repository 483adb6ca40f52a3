"""Runs that begin with a state of the optimizer, and the state that a run returns."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt

W = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
SCALES = jnp.array([1.0, 30.0])


def loss(w: Any, by: Any = 1.0) -> jax.Array:
    return jnp.sum(SCALES * (w["a"] - by) ** 2) + (w["b"] * by - 2) ** 4


momentum = functools.partial(optax.sgd, momentum=0.9)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (momentum, 0.001),
        (optax.adam, 0.01),
        (optax.inject_hyperparams(optax.adam), 0.01),
        (optax.adam(optax.exponential_decay(0.1, 5, 0.5)), None),
        (optax.chain(optax.clip(1.0), optax.scale_by_rms(), optax.scale(-0.01)), None),
    ],
    ids=["momentum", "adam", "injected", "own schedule", "chain"],
)
def test_two_runs_are_one(optimizer: Any, rate: Any):
    run = functools.partial(gdopt.minimize, loss, optimizer=optimizer, tol=0, keep_best=False)
    run = run if rate is None else functools.partial(run, learning_rate=rate)
    whole = run(W, max_steps=9)
    first = run(W, max_steps=4)
    second = run(first.params, max_steps=5, optimizer_state=first.optimizer_state)
    assert_same((second.params, second.optimizer_state), (whole.params, whole.optimizer_state))
    transformation = optimizer if rate is None else optimizer(rate)
    assert_same(jax.tree.map(jnp.shape, whole.optimizer_state), jax.tree.map(jnp.shape, transformation.init(W)))
    again = run(first.params, max_steps=5, optimizer_state=jax.device_get(first.optimizer_state))
    assert_same(again.params, second.params)  # and the first state still exists


def test_the_state_is_that_after_the_last_update():
    result = gdopt.minimize(loss, W, optimizer=optax.adam, learning_rate=0.01, max_steps=3)
    state, w = optax.adam(0.01).init(W), W
    for _ in range(3):
        updates, state = optax.adam(0.01).update(jax.grad(loss)(w), state)
        w = optax.apply_updates(w, updates)
    for a, b in zip(jax.tree.leaves(result.optimizer_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("make", [gdopt.quasi_newton, gdopt.spectral])
def test_a_search_begins_anew_at_the_start(make: Any):
    """Its state holds a loss and a gradient of other args, which must not be compared with those of this call."""
    first = gdopt.minimize(loss, W, args=(1.0,), optimizer=make())
    result = gdopt.minimize(loss, first.params, args=(1.3,), optimizer=make(), optimizer_state=first.optimizer_state)
    assert result.success
    np.testing.assert_allclose(result.params["a"], 1.3, rtol=1e-3)
    same = gdopt.minimize(loss, first.params, optimizer=make(), optimizer_state=first.optimizer_state)
    assert same.success


def passing_nothing_on(search: Any) -> Any:
    """Wrap a search without the arguments that only gdopt's loop knows."""
    update: Any = lambda grad, state, params=None, *, value, **_: search.update(grad, state, params, value=value)
    return optax.GradientTransformationExtraArgs(search.init, update)


@pytest.mark.filterwarnings("ignore:this call differs from the run saved")
@pytest.mark.parametrize("size", [20, 5000])
@pytest.mark.parametrize("make", [gdopt.quasi_newton, gdopt.spectral])
def test_a_wrapped_search_is_cut_and_resumed_like_a_bare_one(make: Any, size: int, tmp_path: Any):
    """Its state at the end is that before the update that is not made, although nothing tells it of that."""
    scales, start = jnp.logspace(0, 3, size), jnp.zeros(size)
    bent = lambda x: jnp.sum(scales * (x - 1) ** 2) + jnp.sum((x[1:] - x[:-1] ** 2) ** 2)
    accepted = []
    for number, search in enumerate((make(), passing_nothing_on(make()))):
        options = {"max_steps": 25, "optimizer": search}
        path = gdopt.Checkpoint(tmp_path / f"run{number}")
        whole = gdopt.minimize(bent, start, **options)
        low = float(whole.history.loss[:8].min())
        cut = gdopt.minimize(bent, start, **options, target=low, checkpoint=path)
        resumed = gdopt.minimize(bent, start, **options, checkpoint=path)
        assert cut.steps < 8
        np.testing.assert_array_equal(whole.history.loss, resumed.history.loss)
        accepted.append([int(result.optimizer_state.trials.accepted) for result in (whole, cut, resumed)])
    assert accepted[0] == accepted[1]


def test_alternating_optimisation_compiles_once():
    """Two groups of params in turn, each with its own moments."""
    state = {"a": None, "b": None}
    w = W

    def turn(w: Any, name: str) -> Any:
        others = {other: value for other, value in w.items() if other != name}
        alone = lambda x, others: loss({name: x, **others})
        result = gdopt.minimize(
            alone, w[name], args=(others,), optimizer=optax.adam, learning_rate=0.2, max_steps=5,
            optimizer_state=state[name],
        )  # fmt: skip
        state[name] = result.optimizer_state
        return w | {name: result.params}

    for name in ("a", "b", "a", "b"):
        w = turn(w, name)
    with count_compilations() as counter:
        for name in ("a", "b") * 3:
            w = turn(w, name)
    assert counter.count == 0, counter.names
    assert state["a"][0].count == 25
    assert loss(w) < 0.1 * loss(W)


def regression(targets: float) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(0)
    x = draws.normal(size=(256, 4)).astype(np.float32)
    return x, np.float32(targets) * (x @ np.array([1, -2, 3, 0.5], np.float32) + 0.1 * draws.normal(size=256)).astype(
        "f"
    )


def squared(w: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


@pytest.mark.parametrize("optimizer", [None, optax.adam])
@pytest.mark.parametrize("targets", [1.0, 1e5])
def test_a_trained_point_is_not_left(optimizer: Any, targets: float):
    """A cycle as high as that of the first run would multiply the loss by hundreds."""
    run = functools.partial(gdopt.minimize, squared, batch_size=16, epochs=10, optimizer=optimizer)
    data = regression(targets)
    first = run(jnp.zeros(4), data=data)
    second = run(first.params, data=data, optimizer_state=first.optimizer_state)
    assert second.success, second.message
    assert second.history.loss.reshape(-1)[:-1].reshape(10, -1).mean(1).max() < 2 * squared(first.params, data)
    highest = np.nanmax(second.history.learning_rate) / np.nanmax(first.history.learning_rate)
    assert 0.05 < highest < 0.3
    moved = regression(1.2 * targets)
    third = run(first.params, data=moved, optimizer_state=first.optimizer_state)
    assert squared(third.params, moved) < 0.05 * squared(first.params, moved)


def test_an_epoch_at_a_time_still_arrives():
    """A few steps have not gone the distance yet, so the next cycles must not be much lower."""
    data, w, state = regression(1.0), jnp.zeros(4), None
    start = squared(w, data)
    for _ in range(8):
        result = gdopt.minimize(squared, w, data=data, batch_size=16, epochs=1, optimizer_state=state)
        w, state = result.params, result.optimizer_state
    assert squared(w, data) < 0.01 * start


def test_a_fresh_state_changes_no_rate():
    run = functools.partial(gdopt.minimize, squared, jnp.zeros(4), data=regression(1.0), batch_size=16, epochs=5)
    fresh: Any = gdopt.distance_adamw(1.0).init(jnp.zeros(4))
    np.testing.assert_array_equal(run(optimizer_state=fresh).history.learning_rate, run().history.learning_rate)


def test_a_warm_start_that_fails_is_tried_again_at_lower_rates():
    data = regression(1.0)
    run = functools.partial(gdopt.minimize, data=data, batch_size=16, epochs=5)
    first = run(squared, jnp.zeros(4))
    near = lambda w, batch: squared(w, batch) + jnp.where(jnp.abs(w - first.params).max() > 2e-3, jnp.nan, 0.0)
    result = run(near, first.params, optimizer_state=first.optimizer_state)
    assert "tried again" in result.message
    assert np.nanmax(result.history.learning_rate) < 0.02
    assert result.success, result.message


def test_a_warm_start_inside_jit_is_the_one_outside():
    run = functools.partial(gdopt.minimize, squared, data=regression(1.0), batch_size=16, epochs=5)
    first = run(jnp.zeros(4))
    again = lambda w, state: run(w, optimizer_state=state).params
    outside = again(first.params, first.optimizer_state)
    np.testing.assert_allclose(jax.jit(again)(first.params, first.optimizer_state), outside, rtol=1e-4)


def test_inside_jit_and_vmap():
    run = lambda w, **more: gdopt.minimize(loss, w, optimizer=optax.adam, learning_rate=0.01, max_steps=4, **more)
    first = run(W)
    again = lambda w, state: run(w, optimizer_state=state)
    outside = again(first.params, first.optimizer_state)
    inside = jax.jit(again)(first.params, first.optimizer_state)
    for a, b in zip(jax.tree.leaves(inside.optimizer_state), jax.tree.leaves(outside.optimizer_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    many = jax.vmap(again)(twice(first.params), twice(first.optimizer_state))
    assert many[1].optimizer_state[0].count == 8


def test_no_derivative_flows_through_it():
    loss = lambda w, y: jnp.sum((w - y) ** 2)
    first = gdopt.minimize(loss, jnp.ones(2), args=(2.0,), optimizer=optax.adam, learning_rate=0.1, max_steps=3)

    def run(scale: Any, y: Any) -> Any:
        state = jax.tree.map(lambda x: x * scale if x.dtype == jnp.float32 else x, first.optimizer_state)
        result = gdopt.minimize(loss, first.params, args=(y,), learning_rate=0.1, optimizer=optax.adam, max_steps=2000,
                                optimizer_state=state)  # fmt: skip
        return result.params.sum()

    by_state, by_arg = jax.jit(jax.grad(run, argnums=(0, 1)))(1.0, 2.0)
    assert by_state == 0
    np.testing.assert_allclose(by_arg, 2, rtol=1e-3)


ADAM: Any = optax.adam(0.1)
BAD: dict[str, Any] = {
    "of another optimizer": (
        optax.sgd(0.1, momentum=0.9).init(W),
        r"optimizer_state\[0\].count is nothing, but .* int32",
    ),
    "of other params": (
        ADAM.init({"a": jnp.zeros(3), "b": W["b"]}),
        r"\.mu\['a'\] is float32\[3\], but .* float32\[2\]",
    ),
    "of another dtype": (jax.tree.map(lambda x: x.astype("float16"), ADAM.init(W)), r"float16\[\], but .* int32\[\]"),
    "of more leaves": ((*ADAM.init(W), jnp.zeros(2)), r"optimizer_state\[2\] is float32\[2\], but .* nothing"),
    "in a list": (
        list(ADAM.init(W)),
        "optimizer_state is a list of ScaleByAdamState, EmptyState, but the optimizer has a tuple of Scale",
    ),
    "of a longer chain": (optax.adamw(0.1).init(W), "a tuple of ScaleByAdamState, EmptyState, EmptyState, but the opt"),
    "of a chain with other parts in it": (
        (ADAM.init(W)[0], [optax.EmptyState()]),
        r"optimizer_state is PyTreeDef\(\(.* but the optimizer has PyTreeDef\(\(",
    ),
    "no arrays": ("fresh", r"optimizer_state is a str, not an array"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_that_does_not_fit_is_an_error_before_anything_compiles(kind: str):
    state, message = BAD[kind]
    jax.block_until_ready(jnp.zeros(3) @ jnp.zeros(3))
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=message):
        gdopt.minimize(loss, W, optimizer=optax.adam, learning_rate=0.1, optimizer_state=state)
    assert counter.count == 0, counter.names
    noisy = lambda w, key: loss(w)
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=message):
        gdopt.minimize(noisy, W, with_key=True, optimizer=optax.adam, learning_rate=0.1, optimizer_state=state)
    assert not any("loop" in name or "run" in name for name in counter.names), counter.names


@pytest.mark.parametrize("state", [ADAM.init(W), gdopt.distance_adamw(1.0).init({"a": W["b"], "b": W["a"]})])
def test_it_comes_before_the_updates_are_measured(state: Any):
    """To choose how a rate is found, gdopt runs an unknown optimizer on a few gradients."""
    options: dict[str, Any] = {"data": SCALES, "batch_size": 1, "epochs": 50, "optimizer": lambda rate: optax.sgd(rate)}
    jax.block_until_ready(jnp.zeros(3) @ jnp.zeros(3))
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=r"optimizer_state.* but the optimizer"):
        gdopt.minimize(lambda w, batch: loss(w, batch[0]), W, optimizer_state=state, **options)
    assert counter.names == []


def test_a_loss_that_cannot_be_traced_comes_before_the_updates_are_measured():
    unknown = lambda rate: optax.sgd(rate)
    options: dict[str, Any] = {"data": SCALES, "batch_size": 1, "optimizer": unknown}
    for call in (gdopt.minimize, gdopt.lr_find):
        with count_compilations() as counter, pytest.raises(gdopt.InputError, match=r"the loss returned shape \(1,\)"):
            call(lambda w, batch: w["b"] * batch, W, **options)
        assert counter.names == []


def test_another_start_of_a_checkpoint_is_a_warning(tmp_path: Any):
    run = functools.partial(gdopt.minimize, loss, W, optimizer=optax.adam, learning_rate=0.01, tol=0)
    first, path = run(max_steps=3), tmp_path / "run"
    run(max_steps=4, optimizer_state=first.optimizer_state, checkpoint=path)
    same = run(max_steps=4, optimizer_state=first.optimizer_state, checkpoint=path)
    assert same.optimizer_state[0].count == 7
    with pytest.warns(UserWarning, match="params, state or optimizer_state differ from the start|params differ"):
        run(max_steps=4, checkpoint=path)
