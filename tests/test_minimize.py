"""``minimize``: its numbers, its arguments, and what it carries along."""

from __future__ import annotations

import functools
from typing import NamedTuple

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import gdopt
from gdopt import Status
from gdopt._run import host_loop

CURVATURES = jnp.array([1.0, 4.0, 10.0])


def quadratic(x):
    return 0.5 * jnp.sum(CURVATURES * (x - 1) ** 2)


def hand_written(loss, x, args, factory, rates):
    """The usual loop around optax: a jitted step, called from Python.

    Rates and data are its arguments: XLA folds constants into the arithmetic, which changes last bits.
    """

    @jax.jit
    def step(x, state, rate, args):
        value, grad = jax.value_and_grad(loss)(x, *args)
        updates, state = factory(rate).update(grad, state, x)
        return optax.apply_updates(x, updates), state, value

    state, points, losses = factory(rates[0]).init(x), [x], []
    for rate in [*rates, rates[-1]]:  # once more, for the loss of the last point
        x, state, value = step(x, state, rate, args)
        points.append(x)
        losses.append(value)
    return points[:-1], losses


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=5),
    st.floats(2**-10, 2**-5, width=32),
    st.integers(1, 40),
    st.sampled_from(["gd", "sgd", "cosine"]),
)
@settings(max_examples=15)
def test_the_loop_equals_a_hand_written_one_bit_for_bit(curvatures, rate, steps, kind):
    curvatures = jnp.asarray(curvatures, jnp.float32)
    loss = lambda x, curvatures: 0.5 * jnp.sum(curvatures * (x - 1) ** 2)
    factory, learning_rate = {
        "gd": (gdopt.gd, rate),
        "sgd": (optax.sgd, rate),
        "cosine": (optax.sgd, optax.cosine_decay_schedule(rate, 50)),
    }[kind]
    x = jnp.zeros(len(curvatures))
    result = gdopt.minimize(
        lambda x: loss(x, curvatures), x, optimizer=factory, learning_rate=learning_rate, max_steps=steps, tol=0
    )
    # The same rates: a schedule that is compiled alone may differ from one in a loop by a last bit.
    points, losses = hand_written(loss, x, (curvatures,), factory, result.history.learning_rate[:-1])
    np.testing.assert_array_equal(result.history.loss, np.asarray(losses))
    assert result.steps == steps or result.status in (Status.CONVERGED, Status.PRECISION_LIMIT)
    best = int(np.argmin(result.history.loss))
    np.testing.assert_array_equal(result.params, points[best])


@pytest.mark.parametrize("batch_size", [None, 7])
def test_chunk_sizes_change_no_bit(monkeypatch, batch_size):
    random = np.random.default_rng(0)
    X = random.normal(size=(50, 3)).astype(np.float32)

    def results():
        result = gdopt.minimize(
            lambda w, x: jnp.mean((x @ w - 1) ** 2),
            np.zeros(3, np.float32),
            data=X,
            batch_size=batch_size,
            optimizer=optax.adam,
            learning_rate=0.01,
            max_steps=97,
        )
        return *result.history, result.params, result.loss

    usual = results()
    for first, seconds in ((1, 0.0), (2, 0.0), (13, 1e-4), (97, 1.0)):
        monkeypatch.setattr(host_loop, "_FIRST_CHUNK", first)
        monkeypatch.setattr(host_loop, "_CHUNK_SECONDS", seconds)  # 0 makes every further chunk one step long
        for one, other in zip(usual, results(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_n_updates_make_n_plus_one_evaluations_each_of_one_point():
    seen = []

    def loss(x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x)
        return quadratic(x)

    result = gdopt.minimize(loss, jnp.zeros(3), learning_rate=0.05, max_steps=20, tol=0)
    jax.effects_barrier()
    assert result.steps == 20
    assert len(seen) == len(result.history.loss) == 21
    order = np.argsort([-quadratic(x) for x in seen], kind="stable")  # debug callbacks may come out of order
    for k, x in enumerate(np.array(seen)[order]):
        value, grad = jax.value_and_grad(quadratic)(x)
        np.testing.assert_allclose(result.history.loss[k], value, rtol=1e-6)
        np.testing.assert_allclose(result.history.grad_norm[k], jnp.linalg.norm(grad), rtol=1e-6)
    np.testing.assert_array_equal(result.history.learning_rate, np.array([0.05] * 20 + [np.nan], np.float32))


def test_loss_and_gradient_norm_belong_to_the_returned_params():
    result = gdopt.minimize(
        quadratic, jnp.zeros(3), optimizer=functools.partial(optax.sgd, momentum=0.99), learning_rate=0.1, max_steps=37
    )
    assert result.history.loss[-1] > result.loss == result.history.loss.min()  # it swings; the best point comes back
    value, grad = jax.value_and_grad(quadratic)(result.params)
    assert result.loss == pytest.approx(float(value), rel=1e-6)
    assert result.grad_norm == pytest.approx(float(jnp.linalg.norm(grad)), rel=1e-6)


def test_params_keep_structure_dtypes_and_leaves_that_are_not_arrays():
    class Point(NamedTuple):
        x: jax.Array
        y: jax.Array

    params = {
        "point": Point(jnp.ones((2, 1)), jnp.ones(3, jnp.bfloat16)),
        "list": [2.0, (jnp.asarray(1j), None)],
        "activation": jnp.tanh,
        "name": "layer",
    }

    def loss(params):
        assert params["name"] == "layer"
        assert params["activation"] is jnp.tanh
        point, (number, (imaginary, _)) = params["point"], params["list"]
        rest = jnp.abs(imaginary - (2 - 1j)) ** 2 + (number - 3) ** 2
        return jnp.sum(point.x**2) + jnp.sum(point.y.astype(jnp.float32) ** 2) + rest

    result = gdopt.minimize(loss, params, learning_rate=0.25, tol=1e-6)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    assert result.params["activation"] is jnp.tanh
    assert result.params["point"].y.dtype == jnp.bfloat16
    assert complex(result.params["list"][1][0]) == pytest.approx(2 - 1j, abs=1e-3)
    assert float(result.params["list"][0]) == pytest.approx(3, abs=1e-3)
    assert result.success


def test_scalars_are_returned_as_arrays():
    result = gdopt.minimize(lambda p: (p["a"] ** 2 + p["b"] ** 2, {"n": p["a"]}), {"a": 1.0, "b": 2.0}, has_aux=True)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((result.params, result.aux)))


def test_float64_digits_are_kept():
    with jax.enable_x64(True):
        result = gdopt.minimize(lambda x: (x - 1 / 3) ** 2, np.float64(0), learning_rate=0.3, tol=1e-14)
        assert result.params.dtype == jnp.float64
        assert float(result.params) == pytest.approx(1 / 3, rel=1e-12)
        assert result.history.loss.dtype == np.float64
    single = gdopt.minimize(lambda x: (x - 1 / 3) ** 2, np.float32(0), learning_rate=0.3, tol=1e-14)
    assert single.params.dtype == jnp.float32


def test_modules_with_dropout_keep_their_dropout_rate():
    class Net(eqx.Module):
        linear: eqx.nn.Linear
        dropout: eqx.nn.Dropout

    net = Net(eqx.nn.Linear(2, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.1))

    def loss(net, key):
        return jnp.mean((net.dropout(net.linear(jnp.ones(2)), key=key) - 1) ** 2)

    result = gdopt.minimize(loss, net, with_key=True, learning_rate=0.05, max_steps=50)
    assert result.params.dropout.p == 0.1
    assert result.history.loss[-10:].mean() < result.history.loss[:10].mean()


def test_trainable_leaves_the_rest_alone():
    params = {"w": jnp.zeros(2), "frozen": jnp.ones(2), "count": jnp.arange(2)}
    loss = lambda p: jnp.sum((p["w"] - p["frozen"] - p["count"]) ** 2)
    mask = {"w": True, "frozen": False, "count": False}
    for trainable in (mask, lambda params: {name: name == "w" for name in params}):
        result = gdopt.minimize(loss, params, learning_rate=0.25, trainable=trainable, tol=1e-10)
        np.testing.assert_allclose(result.params["w"], [1.0, 2.0], atol=1e-3)
        assert result.params["frozen"] is params["frozen"]
        assert result.params["count"] is params["count"]
    # grad_norm is of what is optimised
    assert result.grad_norm == pytest.approx(2 * float(jnp.linalg.norm(result.params["w"] - jnp.array([1.0, 2.0]))))


def test_args_may_hold_functions_numbers_and_numpy_arrays():
    loss = lambda x, f, settings: jnp.sum((f(x) - settings["target"]) ** 2) * settings["weight"]
    settings_ = {"target": np.ones(2), "weight": 2, "name": "unused"}
    result = gdopt.minimize(loss, jnp.zeros(2), args=(jnp.tanh, settings_), learning_rate=0.1, max_steps=10)
    assert result.history.loss[0] == 4.0
    assert result.history.loss[-1] < 1


def test_aux_is_of_the_returned_params():
    loss = lambda x: (quadratic(x), {"x": x, "name": 3})
    momentum = functools.partial(optax.sgd, momentum=0.99)
    result = gdopt.minimize(loss, jnp.zeros(3), has_aux=True, optimizer=momentum, learning_rate=0.1, max_steps=37)
    np.testing.assert_array_equal(result.aux["x"], result.params)
    assert gdopt.minimize(quadratic, jnp.zeros(3), learning_rate=0.1).aux is None


def test_with_key_gives_a_fresh_key_at_each_step_and_the_same_run_for_the_same_key():
    loss = lambda x, key: (x - jax.random.normal(key)) ** 2
    run = lambda **more: gdopt.minimize(loss, 0.0, with_key=True, learning_rate=0.01, max_steps=200, **more)
    once, again, other = run(), run(), run(key=jax.random.key(1))
    np.testing.assert_array_equal(once.history.loss, again.history.loss)
    assert len(np.unique(once.history.loss)) > 190
    assert (once.history.loss != other.history.loss).any()
    legacy = run(key=np.asarray(jax.random.key_data(jax.random.key(1))))
    np.testing.assert_array_equal(other.history.loss, legacy.history.loss)


# Mini-batches: the gradient of sum(w[rows]) is one for each row of the batch, so the params count the visits.


def count_visits(rows, batch_size, **limits):
    loss = lambda visits, row: -jnp.sum(visits[row])
    data = np.arange(rows)
    visits = gdopt.minimize(
        loss, np.zeros(rows, np.float32), data=data, batch_size=batch_size, learning_rate=1.0, **limits
    )
    return visits, np.asarray(visits.params, int)


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (12, 1), pytest.param(100, 25, marks=pytest.mark.slow)])
def test_every_row_is_used_once_in_every_epoch(rows, batch_size):
    for epochs in (1, 3):
        result, visits = count_visits(rows, batch_size, epochs=epochs)
        assert result.steps == epochs * rows // batch_size
        np.testing.assert_array_equal(visits, epochs)


def test_rows_that_fill_no_batch_sit_out_and_differ_by_epoch():
    _, once = count_visits(10, 4, epochs=1)
    assert sorted(once) == [0, 0] + [1] * 8
    _, often = count_visits(10, 4, epochs=50)
    assert often.sum() == 400
    assert often.min() > 20


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero everywhere")
def test_epochs_are_shuffled_differently_and_by_the_key():
    def order(**more):
        loss = lambda x, row: x * 0 + row[0]
        result = gdopt.minimize(
            loss, 0.0, data=np.arange(8.0, dtype=np.float32), batch_size=1, learning_rate=1.0, epochs=2, **more
        )
        return result.history.loss[:16]

    first, second = order()[:8], order()[8:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert (first != second).any()
    assert (order() == order()).all()
    assert (order() != order(key=jax.random.key(1))).any()


def test_all_rows_at_once_are_not_shuffled_and_can_converge():
    X = np.arange(6.0, dtype=np.float32)
    loss = lambda m, x: jnp.mean((x - m) ** 2)
    whole = gdopt.minimize(loss, 0.0, data=X, learning_rate=0.3)
    same = gdopt.minimize(loss, 0.0, data=X, batch_size=6, learning_rate=0.3)
    assert whole.status == same.status == Status.CONVERGED
    np.testing.assert_array_equal(whole.history.loss, same.history.loss)
    assert float(whole.params) == pytest.approx(2.5, abs=0.01)


def test_steps_or_epochs_end_a_run_whichever_comes_first():
    assert count_visits(12, 4, epochs=2, max_steps=5)[0].steps == 5
    assert count_visits(12, 4, epochs=1, max_steps=5)[0].steps == 3
    assert gdopt.minimize(lambda x: -x, 0.0, learning_rate=0.1).steps == 10_000


def test_callback_gets_matching_loss_and_params_and_may_keep_them():
    reports = []
    result = gdopt.minimize(quadratic, jnp.zeros(3), learning_rate=1e-5, max_steps=9000, tol=0, callback=reports.append)
    assert result.status == Status.MAX_STEPS
    assert len(reports) >= 2
    for report in reports:
        assert report.loss == pytest.approx(float(quadratic(report.params)), rel=1e-5)
        assert report.step <= 9000
    assert [report.loss for report in reports] == sorted((report.loss for report in reports), reverse=True)


def test_callback_comes_at_the_end_of_each_epoch_and_can_stop():
    reports = []

    def callback(report):
        reports.append(report)
        return report.epoch == 3

    result, visits = count_visits(12, 4, epochs=10, callback=callback)
    assert [report.step for report in reports if report.epoch_ended] == [3, 6, 9]
    assert (result.status, result.steps, result.success) == (Status.STOPPED, 9, True)
    assert result.message.startswith("stopped by the callback after 9 steps")
    assert len(result.history.loss) == 10  # the point where it stopped is evaluated as well
    np.testing.assert_array_equal(visits, 3)


@pytest.mark.slow
def test_schedule_free_returns_its_average():
    """For mini-batches the average is the aim of the method. Its loss is that of the returned point."""
    random = np.random.default_rng(0)
    X = random.normal(size=(64, 4)).astype(np.float32)
    Y = (X @ np.ones(4) + random.normal(size=64)).astype(np.float32)
    loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    optimizer = optax.contrib.schedule_free_sgd(0.05)
    result = gdopt.minimize(
        loss, np.zeros(4, np.float32), data=(X, Y), batch_size=8, optimizer=optimizer, max_steps=300
    )

    best = np.linalg.lstsq(X, Y, rcond=None)[0]
    assert float(loss(result.params, (X, Y))) < 1.05 * float(loss(best, (X, Y)))
    full = gdopt.minimize(lambda w: loss(w, (X, Y)), np.zeros(4, np.float32), optimizer=optimizer, max_steps=20)
    assert full.loss == pytest.approx(float(loss(full.params, (X, Y))), rel=1e-5)


def test_two_leaves_may_share_one_array_which_stays_intact():
    x = jnp.ones(3)
    result = gdopt.minimize(lambda p: quadratic(p[0]) + quadratic(p[1]), (x, x), args=(), learning_rate=0.05)
    assert result.success
    np.testing.assert_array_equal(x, np.ones(3))
    first = result.params[0] + 0
    gdopt.minimize(lambda p: quadratic(p[0]) + quadratic(p[1]), result.params, learning_rate=0.05)
    np.testing.assert_array_equal(result.params[0], first)


def test_seconds_are_split_into_compiling_and_running():
    loss = lambda x: jnp.sum(jnp.cosh(x - 0.123))
    first = gdopt.minimize(loss, jnp.ones(7), learning_rate=1e-3)
    second = gdopt.minimize(loss, jnp.ones(7), learning_rate=1e-3)
    assert first.compile_seconds > 0
    assert second.compile_seconds > 0  # it is traced, if not compiled
    assert first.run_seconds > 0


def test_repr_is_readable():
    result = gdopt.minimize(lambda p: quadratic(p["x"]), {"x": jnp.zeros(3)}, learning_rate=0.1, target=1.0)
    lines = repr(result).splitlines()
    assert lines[0] == "gdopt.Result"
    assert lines[1].split() == ["status", "TARGET_REACHED"]
    assert lines[-1].startswith("  params    {'x': [")
    big = gdopt.minimize(lambda x: jnp.sum(x**2), jnp.ones((40, 30)), learning_rate=0.1)
    assert repr(big).endswith("params    float32[40, 30]")


ZIGZAG = {"learning_rate": 0.3, "max_steps": 12, "tol": 0}  # on |x|: the last point is not the best


@pytest.mark.parametrize("last", [False, True], ids=["best", "last"])
def test_without_keep_best_the_last_point_is_returned(last):
    seen = []
    loss = lambda x: (jnp.abs(x - 0.1), {"x": x})
    callback = lambda report: seen.append((report.loss, report.params))
    result = gdopt.minimize(loss, 1.0, has_aux=True, keep_best=not last, callback=callback, **ZIGZAG)
    losses = result.history.loss
    assert losses[-1] > losses.min()
    assert result.loss == (losses[-1] if last else losses.min())
    assert float(loss(result.params)[0]) == result.loss
    assert float(result.aux["x"]) == float(result.params)
    assert seen[-1] == (result.loss, result.params)


def test_without_keep_best_a_failed_point_is_returned():
    run = functools.partial(gdopt.minimize, lambda x: x - jnp.log(x), 0.1, learning_rate=9.0)
    result = run(keep_best=False)
    assert result.status is Status.NON_FINITE
    assert np.isnan(result.loss)
    assert "is returned" not in result.message
    assert np.isfinite(run().loss)


def test_without_keep_best_an_average_is_still_returned():
    optimizer = optax.contrib.schedule_free_sgd(0.05)
    result = gdopt.minimize(quadratic, jnp.full(3, 3.0), optimizer=optimizer, max_steps=30, tol=0, keep_best=False)
    assert result.loss != result.history.loss[-1]
    assert result.loss == pytest.approx(float(quadratic(result.params)), rel=1e-6)
