"""Batches whose loss or gradient is not finite: wrappers of the optimizer that skip them decide when a run ends."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import shared_traces

import gdopt

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 3)).astype(np.float32)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32)
W = jnp.zeros(3)


def loss(w: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def batches(*bad: int, count: int = 10) -> list[Any]:
    """Return batches of 8 rows; those that are bad hold a NaN."""
    made = [(X[i : i + 8].copy(), Y[i : i + 8]) for i in range(0, 8 * count, 8)]
    for k in bad:
        made[k][0][3, 1] = np.nan
    return made


def run(some: list[Any], optimizer: Any, **more: Any) -> gdopt.Result:
    return gdopt.minimize(loss, W, data=lambda: iter(some), optimizer=optimizer, max_steps=len(some), **more)


steps_of: Any = functools.partial(optax.MultiSteps, should_skip_update_fn=optax.skip_not_finite)
WRAPPERS: dict[str, Any] = {
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "in a chain": optax.chain(optax.clip(10.0), optax.apply_if_finite(optax.adam(0.1), 3)),
    "MultiSteps": steps_of(optax.adam(0.1), 1),
    "MultiSteps as a transformation": steps_of(optax.adam(0.1), 1).gradient_transformation(),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_skipped_batches_leave_no_trace(kind: str):
    """A run with bad batches is that of the good ones alone."""
    optimizer = WRAPPERS[kind]
    bad = (0, 4, 5)
    result = run(batches(*bad), optimizer)
    good = run([batch for k, batch in enumerate(batches()) if k not in bad], optimizer)
    np.testing.assert_array_equal(result.params, good.params)
    assert result.loss == good.loss
    assert result.success
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(result.history.loss)), bad)
    assert "skipped 3 of 11 evaluations" in result.message
    assert "nan" not in result.message.lower().replace("finite", "")


def test_a_factory_skips_too():
    factory = lambda rate: optax.apply_if_finite(optax.adam(rate), 3)
    np.testing.assert_array_equal(
        run(batches(2), factory, learning_rate=0.1).params, run(batches(2), WRAPPERS["apply_if_finite"]).params
    )


def test_the_run_ends_when_a_wrapper_gives_up():
    result = run(batches(3, 4, 5, 6), WRAPPERS["apply_if_finite"])
    assert result.status is gdopt.Status.NON_FINITE
    assert result.steps == 6
    assert np.isfinite(result.params).all()
    assert np.isfinite(result.loss)
    assert "data" in result.message
    assert gdopt.diagnose(result).step == 6


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.MultiSteps(optax.adam(0.1), 2)])
def test_without_a_wrapper_the_first_nan_ends_the_run(optimizer: Any):
    result = run(batches(3), optimizer)
    assert result.status is gdopt.Status.NON_FINITE
    assert result.steps == 3


def test_a_wrapper_of_other_params_does_not_help():
    part = optax.partition({"a": WRAPPERS["apply_if_finite"], "b": optax.adam(0.1)}, {"a": "a", "b": "b"})
    two = lambda w, batch: loss(w["a"] + w["b"], batch)
    start = {"a": W, "b": W}
    result = gdopt.minimize(two, start, data=lambda: iter(batches(3)), optimizer=part, max_steps=10)
    assert result.status is gdopt.Status.NON_FINITE
    assert result.steps == 3


def test_means_and_the_target_leave_bad_batches_out():
    x = np.nan_to_num(X)
    x[[5, 30]] = np.nan
    options: dict[str, Any] = {"data": (x, Y), "batch_size": 8, "epochs": 30, "optimizer": steps_of(optax.adam(0.1), 1)}
    result = gdopt.minimize(loss, W, target=1e-3, **options)
    assert result.status is gdopt.Status.TARGET_REACHED
    last = result.history.loss[result.steps - 9 : result.steps + 1]
    assert np.isnan(last).any()
    assert np.nanmean(last) <= 1e-3 < np.nansum(last)
    inside = jax.jit(lambda w: gdopt.minimize(loss, w, target=1e-3, **options))(W)
    assert inside.steps == result.steps


def test_the_last_evaluation_may_be_bad():
    result = run(batches(9), WRAPPERS["MultiSteps"])
    assert np.isnan(result.history.loss[-2:]).all()
    assert np.isfinite(result.loss)
    kept = int(np.flatnonzero(result.history.loss == result.loss)[-1])
    assert f"the point of step {kept} is returned" in result.message


def test_the_model_keeps_its_state():
    """A bad batch does not reach the running statistics."""

    def normalised(w: Any, batch: Any, *, state: Any) -> Any:
        return loss(w, batch), 0.5 * state + 0.5 * batch[0].mean(axis=0)

    go = lambda some: gdopt.minimize(
        normalised,
        W,
        state=jnp.zeros(3),
        data=lambda: iter(some),
        optimizer=WRAPPERS["MultiSteps"],
        max_steps=len(some),
    )
    result, good = go(batches(0, 4)), go([batch for k, batch in enumerate(batches()) if k not in (0, 4)])
    np.testing.assert_array_equal(result.state, good.state)
    assert np.isfinite(result.state).all()


def test_resumes_bit_for_bit(tmp_path: Any):
    x = X.copy()
    x[[5, 30]] = np.nan
    go = functools.partial(
        gdopt.minimize, loss, W, data=(x, Y), batch_size=8, optimizer=steps_of(optax.adam(0.1), 1), target=1e-9
    )
    path = tmp_path / "run"
    go(max_steps=13, checkpoint=path)
    with pytest.warns(UserWarning, match="max_steps"):
        resumed = go(max_steps=40, checkpoint=path)
    whole = go(max_steps=40)
    np.testing.assert_array_equal(resumed.params, whole.params)
    np.testing.assert_array_equal(resumed.history.loss, whole.history.loss)


def test_a_plain_run_has_no_operation_for_it(monkeypatch: pytest.MonkeyPatch):
    traces = shared_traces(monkeypatch)
    lengths = {}
    for name, optimizer in (("plain", optax.adam(0.1)), ("steps", optax.MultiSteps(optax.adam(0.1), 1))):
        traces.clear()
        gdopt.clear_cache()
        gdopt.minimize(loss, W, data=(X, Y), batch_size=8, optimizer=optimizer, max_steps=2)  # pyright: ignore[reportArgumentType]
        lengths[name] = [str(trace).count("is_finite") for trace in traces]
    traces.clear()
    gdopt.minimize(loss, W, data=(X, Y), batch_size=8, optimizer=WRAPPERS["MultiSteps"], max_steps=2)
    skips = [str(trace).count("is_finite") for trace in traces]
    assert lengths["plain"] == lengths["steps"]
    assert max(skips) > max(lengths["plain"])


def test_a_deterministic_loss_ends_at_once():
    """A gradient that was skipped would be skipped again for ever."""
    falls_off = lambda w: jnp.sum(jnp.sqrt(w))
    result = gdopt.minimize(falls_off, jnp.ones(2), optimizer=steps_of(optax.sgd(1.5), 1), max_steps=100)
    assert result.status is gdopt.Status.NON_FINITE
    assert result.steps < 10


@pytest.mark.parametrize("more", [{}, {"repeats": 2}, {"refine": True}])
def test_a_range_test_goes_on_after_a_bad_batch(more: Any):
    x, y = X.copy(), Y + RNG.normal(size=80).astype(np.float32)
    x[30] = np.nan
    factory = lambda rate: optax.apply_if_finite(optax.sgd(rate), 3)
    test = gdopt.lr_find(loss, W, data=(x, y), batch_size=8, optimizer=factory, **more)
    good = gdopt.lr_find(loss, W, data=(X, y), batch_size=8, optimizer=optax.sgd, **more)
    assert test.status is gdopt.Status.DIVERGED
    assert test.suggestion is not None
    assert good.suggestion is not None
    assert 0.3 < test.suggestion / good.suggestion < 3
    result = gdopt.minimize(loss, W, data=(x, y), batch_size=8, optimizer=factory, max_steps=100)
    assert result.success
