"""``lr_find`` and ``learning_rate="auto"``: the library's own loop on a ladder of rates, and its suggestions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, shared_traces, some_of
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale

import gdopt
from gdopt import Status, _jax, schedules
from gdopt._rate_finder import lr_find as lr_finder

X, Y = load_breast_cancer(return_X_y=True)
X, Y = scale(X).astype(np.float32), Y.astype(np.float32)
START = np.zeros(30, np.float32)
KEY = jax.random.key(3)


def logistic(w: Any, batch: Any) -> jax.Array:
    x, y = batch
    logits = x @ w
    return jnp.mean(jax.nn.softplus(logits) - y * logits)


STEPS = 150  # mostly the same, as another number is another program
find = functools.partial(gdopt.lr_find, logistic, START, data=(X, Y), batch_size=32, num_steps=STEPS, key=KEY)
minimize = functools.partial(gdopt.minimize, logistic, START, data=(X, Y), batch_size=32)


def bowl(x: Any) -> jax.Array:
    """The steepest curvature is 18, so gradient descent diverges from a rate of 1/9 on."""
    return jnp.sum(x**2 * jnp.array([1.0, 3.0, 9.0])) + 1


def test_the_curve_is_that_of_minimize_on_the_same_ladder() -> None:
    test = find(end_lr=0.1)
    rates = schedules.range_test(1e-5, 0.1, STEPS)
    history = minimize(learning_rate=rates, max_steps=STEPS, key=jax.random.fold_in(KEY, 2)).history
    np.testing.assert_allclose(test.losses[0, :STEPS], history.loss[:STEPS], rtol=1e-5)
    np.testing.assert_allclose(test.learning_rate[:STEPS], history.learning_rate[:STEPS], rtol=1e-6)


def test_each_repeat_is_an_independent_run() -> None:
    test = find(end_lr=0.1, repeats=2)
    assert test.losses.shape == (2, len(test.learning_rate))
    for row, key in zip(test.losses, jax.random.split(jax.random.fold_in(KEY, 2)), strict=True):
        rates = schedules.range_test(1e-5, 0.1, STEPS)
        history = minimize(learning_rate=rates, max_steps=STEPS, key=key).history
        np.testing.assert_allclose(row[:STEPS], history.loss[:STEPS], rtol=1e-5)
    np.testing.assert_allclose(test.loss, test.losses.mean(axis=0), rtol=1e-12)


def test_runs_side_by_side_shuffle_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batched condition would become a selection, and each step would sort all rows."""

    def sorts(jaxpr: Any, inside_cond: bool = False) -> list[bool]:
        found = [inside_cond for eqn in jaxpr.eqns if eqn.primitive.name == "sort"]
        for eqn in jaxpr.eqns:
            for inner in _jax.inner_jaxprs(eqn.params):
                found += sorts(inner, inside_cond or eqn.primitive.name == "cond")
        return found

    traced = shared_traces(monkeypatch)
    find(repeats=2, num_steps=20)  # of no other test, so that it is traced
    found = [flag for closed in traced for flag in sorts(closed.jaxpr)]
    assert found
    assert all(found)


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_both_ends_are_exact(mode: str) -> None:
    test = gdopt.lr_find(bowl, np.ones(3, np.float32), start_lr=3e-7, end_lr=0.07, num_steps=50, mode=mode)
    assert test.learning_rate[0] == 3e-7
    assert test.learning_rate[49] == 0.07  # the exponential one goes on
    steps = np.diff(np.log(test.learning_rate) if mode == "exponential" else test.learning_rate)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_the_arguments_stay_unchanged_and_the_answer_is_the_same_each_time() -> None:
    params = {"w": jnp.zeros(30), "frozen": 7}
    loss = lambda params, batch: logistic(params["w"], batch)
    again = functools.partial(
        gdopt.lr_find, loss, params, data=(X, Y), batch_size=32, trainable={"w": True, "frozen": False}
    )
    first, second = again(), again()
    np.testing.assert_array_equal(params["w"], 0)
    np.testing.assert_array_equal(first.losses, second.losses)
    assert first.suggestion == second.suggestion
    assert not np.array_equal(first.losses, again(key=jax.random.key(1)).losses)


def test_new_rates_new_data_and_a_fresh_lambda_compile_nothing() -> None:
    def run(shift: float, **options: Any) -> gdopt.RangeTest:
        rows = jnp.asarray(X) + shift, jnp.asarray(Y)
        return gdopt.lr_find(lambda w, b: logistic(w, b), START, data=rows, batch_size=32, num_steps=60, **options)

    run(0.0, refine=True)
    with count_compilations() as counter:
        longer = run(1.0, start_lr=1e-7, end_lr=1e-4, key=KEY, refine=True)
    assert counter.count == 0, counter.names
    assert longer.learning_rate[-1] > 1e-4  # the ladder has been extended, in the same program
    with count_compilations() as counter:
        run(0.0, repeats=2)
        assert counter.count > 0
        counter.names.clear()
        run(1.0, repeats=2, start_lr=1e-4)
    assert counter.count == 0, counter.names


def test_it_stops_at_the_first_loss_that_is_not_finite() -> None:
    test = gdopt.lr_find(lambda x: -jnp.log(jnp.sum(x)), np.ones(2, np.float32) / 2, num_steps=60, end_lr=1e6)
    assert test.status in (Status.NON_FINITE, Status.MAX_STEPS)
    hole = gdopt.lr_find(lambda x: jnp.where(x > 0.5, x**2, jnp.nan) + 1, 1.0, start_lr=1e-3)
    assert hole.status is Status.NON_FINITE
    assert "was not finite after the rate" in hole.message
    assert np.isfinite(hole.loss).all()


def test_it_stops_at_the_blow_up() -> None:
    test = gdopt.lr_find(bowl, np.ones(3, np.float32))
    assert test.status is Status.DIVERGED
    assert np.isfinite(test.loss).all()
    assert test.learning_rate[-1] < 2
    threshold = max(4 * test.smoothed_loss.min(), test.loss[0])
    assert test.smoothed_loss[-1] > threshold
    assert min(test.loss[-4:]) > test.loss[0] > test.loss[-5]  # the last four, not one alone
    assert "the loss blew up at the rate" in test.message
    assert 1 / 90 < (test.suggestion or 0) < 1 / 9


def test_repeats_that_end_earlier_leave_the_others_alone() -> None:
    test = find(repeats=2)
    ends = np.isfinite(test.losses).sum(axis=1)
    assert len(set(ends)) > 1
    assert ends.max() == len(test.learning_rate)
    assert np.isfinite(test.loss).sum() == np.isfinite(test.smoothed_loss).sum() == ends.min()


@pytest.mark.parametrize("factor", [1e-9, 1e7])
def test_a_ladder_without_the_end_that_matters_is_extended(factor: float) -> None:
    usual = gdopt.lr_find(bowl, np.ones(3, np.float32)).suggestion
    test = gdopt.lr_find(lambda x: factor * bowl(x), np.ones(3, np.float32))
    assert test.suggestion == pytest.approx(usual / factor, rel=0.5)
    steps = np.diff(np.log(test.learning_rate))
    np.testing.assert_allclose(steps, np.log(1e6) / 299, rtol=1e-6)  # no rate is left out where sections meet


def test_a_linear_ladder_is_not_extended() -> None:
    test = gdopt.lr_find(bowl, np.ones(3, np.float32), start_lr=1e-5, end_lr=1e-2, mode="linear")
    assert len(test.learning_rate) == 300
    assert test.suggestion is None
    assert "Raise end_lr" in test.message


@pytest.mark.parametrize(
    ("loss", "start", "says"),
    [
        (lambda x: 0 * jnp.sum(x) + 2, 1.0, "The loss is flat from 1e-05 to .*may not depend on params"),
        (lambda x: jnp.log(x), -1.0, "not finite at the start. Start from params at which both are finite"),
        (lambda x: jnp.sqrt(x), 0.0, "not finite at the start"),  # its gradient
        (lambda x: -x, 1.0, "falls, or stays low, up to the rate .* Raise end_lr"),
    ],
)
def test_a_missing_suggestion_has_a_reason(loss: Any, start: float, says: str) -> None:
    test = gdopt.lr_find(loss, start, num_steps=40)
    assert test.suggestion is None
    with pytest.raises(AssertionError, match=f"No suggestion.*{says}"):
        raise AssertionError(test.message)
    assert "none" in repr(test)


FACTORIES = {
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "lion": optax.lion,
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd),
}


@pytest.mark.parametrize("name", some_of(FACTORIES, ["inject_hyperparams"]))
def test_the_suggestion_trains(name: str) -> None:
    """It leads from 0.69 to well below half of it, better than a distant rate, for every kind of factory."""
    found = find(optimizer=FACTORIES[name]).suggestion
    assert found is not None
    final = []
    for rate in (found, 30 * found, 1e-3 * found):
        result = minimize(optimizer=FACTORIES[name], learning_rate=rate, epochs=6)
        final.append(float(logistic(result.params, (X, Y))))
    assert final[0] < 0.3
    assert final[0] == min(final)


def test_an_injected_rate_follows_the_schedule() -> None:
    """optax.inject_hyperparams keeps the rate of its first step in its state."""
    rates = schedules.triangular(0.01, 0.1, 3)
    plain, injected = (
        minimize(optimizer=optimizer, learning_rate=rates, max_steps=8)
        for optimizer in (optax.sgd, optax.inject_hyperparams(optax.sgd))
    )
    np.testing.assert_allclose(injected.params, plain.params, rtol=1e-5)


def test_refine_suggests_what_trained_best() -> None:
    test = find(refine=True, repeats=2)
    assert test.refinement is not None
    rates, losses = test.refinement
    assert rates[2] == test.suggestions["basin"]
    assert test.suggestion == rates[losses.argmin()]
    again = minimize(
        learning_rate=float(rates[0]), max_steps=100, key=jax.random.split(jax.random.fold_in(KEY, 2), 2)[0]
    )
    other = minimize(
        learning_rate=float(rates[0]), max_steps=100, key=jax.random.split(jax.random.fold_in(KEY, 2), 2)[1]
    )
    expected = np.mean([run.history.loss[50:100] for run in (again, other)])
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_refine_leaves_a_diverged_neighbour_out() -> None:
    cliff = lambda x: jnp.sum(x**2) + jnp.where(jnp.sum(x**2) > 4.1, jnp.nan, 1.0)
    test = gdopt.lr_find(cliff, np.ones(4, np.float32), refine=True)
    assert test.suggestion is not None
    assert np.isfinite(test.refinement.loss).any()


ACCUMULATING = {
    "number": lambda rate: optax.MultiSteps(optax.sgd(rate), 3),
    "schedule": lambda rate: optax.MultiSteps(optax.sgd(rate), lambda step: 3 + 0 * step),
    "part of a chain": lambda rate: optax.chain(
        optax.MultiSteps(optax.identity(), 3).gradient_transformation(), optax.scale_by_learning_rate(rate)
    ),
}


@pytest.mark.parametrize("name", ACCUMULATING)
def test_accumulated_gradients_climb_once_an_update(name: str) -> None:
    """On a full batch, the accumulated gradient is that of each step."""
    start = np.ones(3, np.float32)
    plain = gdopt.lr_find(bowl, start, optimizer=optax.sgd, num_steps=60, refine=True)
    test = gdopt.lr_find(bowl, start, optimizer=ACCUMULATING[name], num_steps=60, refine=True)
    np.testing.assert_array_equal(test.learning_rate, plain.learning_rate)
    np.testing.assert_allclose(test.loss, plain.loss, rtol=1e-4)
    assert test.suggestion == pytest.approx(plain.suggestion, rel=1e-6)
    assert test.refinement.loss == pytest.approx(plain.refinement.loss, rel=1e-4)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_loss_of_an_update_is_the_mean_of_its_steps(repeats: int) -> None:
    test = find(optimizer=ACCUMULATING["number"], num_steps=20, batch_size=8, repeats=repeats, end_lr=1e-2)
    keys = jax.random.fold_in(KEY, 2)
    keys = [keys] if repeats == 1 else jax.random.split(keys, repeats)
    for row, key in zip(test.losses, keys, strict=True):
        run = gdopt.minimize(
            logistic, START, data=(X, Y), batch_size=8, learning_rate=1e-5, optimizer=optax.sgd, max_steps=3, key=key
        )
        first = functools.partial(gdopt.minimize, logistic, START, data=(X, Y), batch_size=8, max_steps=2, key=key)
        still = first(optimizer=optax.MultiSteps(optax.sgd(1e-5), 9).gradient_transformation()).history.loss[:3]
        assert row[0] == pytest.approx(np.mean(still), rel=1e-5)
        assert row[0] == pytest.approx(np.mean(run.history.loss[:3]), rel=1e-2)


def test_the_range_test_of_auto_counts_updates() -> None:
    steps = len(X) // 8 * 10
    result = gdopt.minimize(
        logistic, START, data=(X, Y), batch_size=8, epochs=10, optimizer=ACCUMULATING["number"], key=KEY
    )
    assert result.success
    assert len(result.range_test.learning_rate) <= steps / 3 / 4


@pytest.mark.parametrize(("noise", "batch_size"), [(0.0, 8), (1.0, 1)])
def test_a_short_run_of_gradient_descent_trains_without_a_rate(noise: float, batch_size: int) -> None:
    """Its range test has a dozen rungs, each twice the rate before or more."""
    for seed in range(4):
        draw = np.random.default_rng(seed)
        x, w = draw.normal(size=(64, 3)).astype(np.float32), np.array([1.0, -2.0, 3.0], np.float32)
        rows = x, (x @ w + noise * draw.normal(size=64)).astype(np.float32)
        squares = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
        options = {"data": rows, "batch_size": batch_size, "max_steps": 80, "key": jax.random.key(seed)}
        result = gdopt.minimize(squares, np.zeros(3, np.float32), optimizer=gdopt.gd, **options)
        assert result.success
        assert result.range_test.suggestion is not None
        assert float(squares(result.params, rows)) < 0.1 * float(squares(np.zeros(3), rows)) + 2 * noise**2


@pytest.mark.parametrize("max_steps", [67, 80, 160, 300, 1000])
@pytest.mark.parametrize("unit", [1.0, 1e3, 1e5])
def test_the_range_test_of_auto_keeps_to_its_share(
    max_steps: int, unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs in natural units want rates far from the usual ones, which sections beyond these would look for."""
    spent, climb = [], lr_finder._Climb.__call__

    def counted(self: Any, step: int, carry: Any, state: Any, rows: Any, look: Any) -> Any:
        spent.append(len(rows.loss))
        return climb(self, step, carry, state, rows, look)

    monkeypatch.setattr(lr_finder._Climb, "__call__", counted)
    squares = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    for seed in range(3):
        draw = np.random.default_rng(seed)
        x = draw.normal(size=(64, 3))
        rows = (unit * x).astype(np.float32), (x @ draw.normal(size=3)).astype(np.float32)
        options = {"data": rows, "batch_size": 8, "max_steps": max_steps, "key": jax.random.key(seed)}
        spent.clear()
        result = gdopt.minimize(squares, np.zeros(3, np.float32), optimizer=gdopt.gd, **options)
        assert result.success, result.message
        assert 0 < sum(spent) <= 0.15 * max_steps
        if unit == 1:
            assert float(squares(result.params, rows)) < 0.05 * float(squares(np.zeros(3), rows))


def test_another_try_makes_no_other_range_test(monkeypatch: pytest.MonkeyPatch) -> None:
    made, test = [], lr_finder.range_test

    def too_high(*args: Any, **options: Any) -> gdopt.RangeTest:
        made.append(dataclasses.replace(test(*args, **options), suggestion=1e3))
        return made[-1]

    monkeypatch.setattr(lr_finder, "range_test", too_high)
    squares = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    result = gdopt.minimize(squares, START, data=(X, Y), batch_size=32, max_steps=80, optimizer=gdopt.gd, key=KEY)
    assert result.message.count("tried again") == 2
    assert made == [result.range_test]


def test_random_keys_and_aux() -> None:
    def noisy(x: Any, *, key: Any) -> tuple[jax.Array, int]:
        return bowl(x + 0.1 * jax.random.normal(key, x.shape)), 1

    test = gdopt.lr_find(noisy, np.ones(3, np.float32), with_key=True, has_aux=True, repeats=2)
    assert not np.array_equal(*test.losses)
    assert 1 / 90 < (test.suggestion or 0) < 1 / 9


def test_float64_and_complex() -> None:
    with jax.enable_x64(True):
        test = gdopt.lr_find(lambda z: jnp.sum(jnp.abs(z - 1j) ** 2) + 1, np.zeros(2, np.complex128))
        assert 0.01 < (test.suggestion or 0) < 1


BAD = {
    "ready optimizer": ({"optimizer": optax.adam(1e-3)}, "transformation that owns its rate.*Pass the factory"),
    "no optimizer": ({"optimizer": 3}, "optimizer=3 is unknown"),
    "ladder that falls": ({"start_lr": 1.0, "end_lr": 0.1}, "start_lr=1.0 is not below end_lr=0.1"),
    "negative rate": ({"start_lr": -1.0}, "start_lr=-1.0"),
    "one step": ({"num_steps": 1}, "num_steps=1"),
    "no repeats": ({"repeats": 0}, "repeats=0"),
    "mode": ({"mode": "log"}, "mode='log' is unknown"),
    "batch size": ({"batch_size": 10**6}, "batch_size=1000000"),
    "start": ({"params": np.full(30, np.nan, np.float32)}, "starts with nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_compiles(name: str) -> None:
    options, says = BAD[name]
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=says):
        gdopt.lr_find(**{"loss": logistic, "params": START, "data": (X, Y), "batch_size": 32} | options)
    assert counter.count == 0


@pytest.mark.parametrize("repeats", [1, 2])
def test_inside_jit_it_is_refused(repeats: int) -> None:
    with pytest.raises(gdopt.InputError, match="lr_find was called inside jit"):
        jax.jit(lambda x: gdopt.lr_find(bowl, x, repeats=repeats).suggestion)(np.ones(3))


def test_it_shares_arguments_with_minimize() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (gdopt.lr_find, gdopt.minimize))
    shared = {"loss", "params", "args", "data", "batch_size", "optimizer", "has_aux", "with_key", "key", "trainable"}
    shared |= {"scale", "state"}
    assert shared == {*ours} & {*theirs}
    assert all(ours[name] == theirs[name] for name in shared - {"optimizer"})  # of which the defaults differ


# --- learning_rate="auto" ---


def test_mini_batches_train_without_a_rate() -> None:
    result = minimize(epochs=20)
    assert result.success
    assert result.range_test is None
    assert float(jnp.mean((X @ result.params > 0) == Y)) > 0.975
    rates = result.history.learning_rate[:-1]
    assert np.isfinite(rates).all()
    assert f"one cycle up to {rates.max():.2g}" in result.message


def test_gd_trains_mini_batches_by_a_range_test() -> None:
    result = minimize(epochs=20, optimizer=gdopt.gd)
    assert result.success
    assert float(jnp.mean((X @ result.params > 0) == Y)) > 0.975
    test = result.range_test
    assert test.suggestion is not None
    assert f"{test.suggestion:.3g}" in result.message
    steps = len(X) // 32 * 20
    assert len(test.learning_rate) <= 0.15 * steps  # a ladder that is too short is prolonged
    rates = result.history.learning_rate[:steps]
    assert np.isfinite(rates).all()
    assert repr(test.suggestion)


@pytest.mark.parametrize("optimizer", [None, gdopt.gd, optax.adam])
def test_another_automatic_run_compiles_nothing(optimizer: Any) -> None:
    def run(factor: float, max_steps: int) -> gdopt.Result:
        rows, options = (factor * jnp.asarray(X), jnp.asarray(Y)), {"optimizer": optimizer, "max_steps": max_steps}
        return gdopt.minimize(lambda w, b: logistic(w, b), START, data=rows, batch_size=32, **options)

    run(1.0, 340)
    with count_compilations() as counter:
        run(2.0, 340 if optimizer is gdopt.gd else 350)  # A range test has another length then.
    assert counter.count == 0, counter.names


def test_auto_is_lr_find_with_the_same_key() -> None:
    test = minimize(epochs=20, key=KEY, optimizer=gdopt.gd).range_test
    again = find(num_steps=int(len(X) // 32 * 20 * 0.15 * 0.45))
    np.testing.assert_array_equal(test.losses, again.losses)
    assert test.suggestion == again.suggestion


def test_another_optimizer_trains_without_a_rate() -> None:
    result = gdopt.minimize(bowl, np.ones(3, np.float32), optimizer=optax.adam, max_steps=500)
    assert result.loss < 1.001
    assert result.range_test is None


def test_a_full_batch_of_gd_and_a_given_rate_need_no_range_test() -> None:
    assert gdopt.minimize(bowl, np.ones(3, np.float32)).range_test is None
    assert minimize(learning_rate=0.1, epochs=1).range_test is None


def test_a_warning_says_why_the_range_test_found_no_rate() -> None:
    flat = lambda x, batch: jnp.mean(batch) + 1e-9 * jnp.sin(x)
    with pytest.warns(
        UserWarning, match=r"'auto' found no rate, so it takes 0\.01: .* flat .* leave the optimizer out"
    ):
        result = gdopt.minimize(flat, 1.0, data=np.ones(600, np.float32), batch_size=2, epochs=1, optimizer=gdopt.gd)
    assert np.nanmax(result.history.learning_rate) <= 0.01


HOT: dict[str, tuple[Callable, float]] = {
    "inputs": (lambda w, x: jnp.mean((x @ w - 1) ** 2), 1e15),
    "an exponential": (lambda w, x: jnp.mean(jnp.exp(x @ w)), 10.0),
}


@pytest.mark.parametrize("optimizer", [gdopt.gd, functools.partial(optax.sgd, momentum=0.9)], ids=["gd", "momentum"])
@pytest.mark.parametrize(("hot", "size"), HOT.values(), ids=HOT)
def test_a_loss_that_is_finite_only_at_the_start_gets_a_warning_and_a_result(
    hot: Callable, size: float, optimizer: Any
) -> None:
    rows = size * np.random.default_rng(0).normal(size=(640, 3)).astype(np.float32)
    cause = (
        r"takes 0\.01: tried 1 rate, .*not finite after .* The inputs or the targets may have large or very different"
    )
    with pytest.warns(UserWarning, match=cause):
        result = gdopt.minimize(hot, np.ones(3, np.float32), data=rows, batch_size=32, epochs=4, optimizer=optimizer)
    assert result.status is gdopt.Status.NON_FINITE
    assert np.isfinite(result.history.loss[0])
    assert result.loss == result.history.loss[0]
    assert (result.params == 1).all()


def test_a_batch_after_the_first_that_holds_nan_gets_a_warning_that_names_it() -> None:
    rows = np.ones((100, 8, 2), np.float32)
    rows[1] = np.nan
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    with pytest.warns(UserWarning, match=r"takes 0\.01: tried 1 rate, .*not finite after"):
        result = gdopt.minimize(loss, np.ones(2, np.float32), data=lambda: rows, max_steps=100, optimizer=gdopt.gd)
    assert (result.status, result.steps) == (gdopt.Status.NON_FINITE, 1)
    assert "data holds NaN" in result.message


def test_a_start_that_is_not_finite_is_named() -> None:
    """No rate helps, so the message asks for none, and no other is tried."""
    rows = np.ones((8, 2), np.float32)
    rows[7, 0] = np.nan
    fit = functools.partial(gdopt.minimize, lambda w, x: jnp.mean((x @ w) ** 2), np.ones(2, np.float32), batch_size=4)
    found = fit(data=rows, max_steps=20)
    assert found.status is gdopt.Status.NON_FINITE
    assert "data holds NaN." in found.message
    assert "tried again" not in found.message
    with pytest.raises(gdopt.InputError, match=r"not finite .* data holds NaN\. Leave it out, or fill it\. With"):
        fit(data=rows, optimizer=gdopt.gd)
