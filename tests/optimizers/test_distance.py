"""AdamW at the rate of a growing distance, the default of mini-batches, and further tries at lower rates."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdopt
from gdopt._optimizers.distance import distance_gd, following
from gdopt._optimizers.response import response


def rows(count: int, columns: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A linear regression with normal inputs."""
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(count, columns))
    y = x @ draws.normal(size=columns) + noise * draws.normal(size=count)
    return x.astype(np.float32), y.astype(np.float32)


def squared(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def zeros(columns: int) -> dict[str, jax.Array]:
    return {"w": jnp.zeros(columns), "b": jnp.zeros(())}


def least(x: np.ndarray, y: np.ndarray) -> float:
    """The lowest loss of a linear regression."""
    columns = np.column_stack([x, np.ones(len(x))]).astype(float)
    return float(np.mean((columns @ np.linalg.lstsq(columns, y.astype(float), rcond=None)[0] - y) ** 2))


# --- the optimizer ---


def test_it_is_prodigys_estimate_around_nesterovs_adam() -> None:
    """Compare with the formulas of both papers in NumPy, float64."""
    with jax.enable_x64(True):
        hessian, shape = np.array([1.0, 10.0, 3.0]), gdopt.schedules.one_cycle(1.0, 60)
        x = start = np.array([5.0, -3.0, 40.0])
        m, v, s = np.zeros(3), np.zeros(3), np.zeros(3)
        r, d = 0.0, 0.03
        path, unit = [x], np.abs(hessian * x).max()
        for k in range(60):
            g, f = hessian * x / unit, float(shape(k))
            memory = 1 - 1 / (10 + 0.1 * (k + 1))
            weight = (1 - memory) * f * d**2
            r, s = memory * r + weight * g @ (start - x), memory * s + weight * g
            d = max(d, r / np.abs(s).sum())
            m, v = 0.85 * m + 0.15 * g, 0.98 * v + 0.02 * g**2
            hat = 0.85 * m / (1 - 0.85 ** (k + 2)) + 0.15 * g / (1 - 0.85 ** (k + 1))
            x = x - f * d * hat / (np.sqrt(v / (1 - 0.98 ** (k + 1))) + 1e-8) - 0.001 * f * x
            path.append(x)
        optimizer: Any = gdopt.distance_adamw(shape)
        params: Any = jnp.asarray(start)
        state = optimizer.init(params)
        for expected in path[1:]:
            updates, state = optimizer.update(hessian * params, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, expected, rtol=1e-9)
        assert float(state.distance[0]) == pytest.approx(d)
        assert d > 1


def test_the_history_has_the_rates_that_were_used() -> None:
    seen = gdopt.minimize(
        squared, zeros(3), data=rows(64, 3, 0.1, 0), batch_size=8, epochs=10, optimizer=gdopt.distance_adamw
    ).history.learning_rate[:-1]
    shape = np.array([gdopt.schedules.one_cycle(1.0, 80)(k) for k in range(80)])
    distances = seen / shape
    assert distances[0] == pytest.approx(0.03)
    assert (np.diff(distances) >= -1e-6 * distances[:-1]).all()
    assert distances[-1] > 0.1


@pytest.mark.parametrize("loss_unit", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_units_of_the_loss_change_nothing(loss_unit: float) -> None:
    data = rows(128, 4, 0.1, 1)
    run = lambda loss: gdopt.minimize(loss, zeros(4), data=data, batch_size=16, epochs=10).params["w"]
    scaled = run(lambda p, b: jnp.float32(loss_unit) * squared(p, b))
    np.testing.assert_allclose(scaled, run(squared), rtol=2e-3)


@pytest.mark.parametrize("of_inputs", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("of_targets", [1e-3, 1.0, 1e6])
def test_it_trains_in_natural_units(of_inputs: float, of_targets: float) -> None:
    x, y = rows(512, 8, 0.1, 2)
    data = np.float32(of_inputs) * x, np.float32(of_targets) * y
    result = gdopt.minimize(squared, zeros(8), data=data, batch_size=32, epochs=20)
    assert result.success
    assert squared(result.params, data) < 1.1 * least(*data)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64, jnp.complex64])
def test_it_works_in_any_dtype(dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        target = jnp.asarray([1.0, -2.0, 3.0]).astype(dtype)

        def loss(z: jax.Array, batch: jax.Array) -> jax.Array:
            return jnp.sum(jnp.abs(z - target) ** 2).real * (1 + 0 * jnp.sum(batch)).astype(jnp.finfo(z.dtype).dtype)

        data = np.zeros((64, 1), np.float32)
        result = gdopt.minimize(loss, jnp.zeros(3, dtype), data=data, batch_size=8, epochs=40)
        assert result.params.dtype == dtype
        np.testing.assert_allclose(np.asarray(result.params - target, complex), 0, atol=0.05)


@pytest.mark.parametrize("factor", [0.0, 1e-3])
def test_float16_with_a_feature_that_says_little(factor: float) -> None:
    """Adam's eps of 1e-8 is 0 in float16, as the square of a small gradient is, so its update would be 0 / 0."""
    x, y = rows(256, 4, 0.1, 5)
    x[:, 3] *= factor
    loss = lambda w, batch: jnp.mean((batch[0] @ w.astype(jnp.float32) - batch[1]) ** 2)
    result = gdopt.minimize(loss, jnp.zeros(4, jnp.float16), data=(x, y), batch_size=32, epochs=50)
    assert result.success, result.message
    assert result.params.dtype == jnp.float16
    best = np.linalg.lstsq(x[:, :3], y, rcond=None)[0]
    assert loss(result.params, (x, y)) <= 1.1 * np.mean((x[:, :3] @ best - y) ** 2)


def test_it_runs_inside_jit_and_vmap() -> None:
    data = rows(64, 3, 0.1, 3)

    def fit(start: jax.Array) -> jax.Array:
        result = gdopt.minimize(squared, {"w": start, "b": 0.0}, data=data, batch_size=8, epochs=10)
        return result.params["w"]

    starts = jnp.stack([jnp.zeros(3), jnp.ones(3)])
    many = jax.jit(jax.vmap(fit))(starts)
    for start, ended in zip(starts, many, strict=True):
        np.testing.assert_allclose(ended, fit(start), rtol=1e-3)


def test_each_leaf_has_its_own_distance() -> None:
    """Weights of a million beside an offset of one: inputs in micrometres, say."""
    x, y = rows(512, 8, 0.1, 2)
    data = 1e-6 * x, y + 1
    params, optimizer = zeros(8), gdopt.distance_adamw
    shape = gdopt.schedules.one_cycle(1.0, 320)
    result = gdopt.minimize(
        squared, params, data=data, batch_size=32, epochs=20, optimizer=optimizer, learning_rate=shape
    )
    assert squared(result.params, data) < 1.1 * least(*data)
    assert float(jnp.abs(result.params["w"]).max()) > 1e5
    assert float(result.params["b"]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_one_rate_for_all_entries_at_every_scale(size: float) -> None:
    """The update is along the gradient, as long as its shape and distance say, whatever the gradient's units."""
    grad: Any = {"a": np.float32(size) * jnp.array([3.0, -4.0]), "b": jnp.zeros(())}
    params = jax.tree.map(jnp.zeros_like, grad)
    optimizer: Any = distance_gd(0.5)
    updates, state = optimizer.update(grad, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"][1] / updates["a"][0], -4 / 3, rtol=1e-6)
    assert updates["b"] == 0
    # After one gradient its averages, without their bias, are that gradient: the step is 0.5 * 0.03 for each entry.
    first = 0.5 * 0.03
    np.testing.assert_allclose(jnp.linalg.norm(updates["a"]), first * np.sqrt(3), rtol=1e-5)
    assert np.isfinite(state.inner.size)


def test_bad_arguments() -> None:
    with pytest.raises(gdopt.InputError, match="weight_decay=-1"):
        gdopt.distance_adamw(1.0, weight_decay=-1)
    with pytest.raises(gdopt.InputError, match="learning_rate=0"):
        gdopt.distance_adamw(0.0)
    optimizer = gdopt.distance_adamw(1.0)
    with pytest.raises(gdopt.InputError, match="Pass the params"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


# --- plain regressions ---

REGRESSIONS = [  # rows, columns, batch size, noise, epochs
    (64, 3, 8, 1.0, 20),
    (64, 1, 1, 1.0, 20),
    (256, 10, 1, 1.0, 10),
    (256, 10, 64, 1.0, 20),
    (1000, 50, 64, 0.1, 20),
    (1000, 3, 8, 0.1, 5),
]


@pytest.mark.parametrize("regression", REGRESSIONS, ids=str)
def test_each_linear_regression_is_solved(regression: tuple[int, int, int, float, int]) -> None:
    count, columns, batch_size, noise, epochs = regression
    for seed in range(30):
        data = rows(count, columns, noise, seed)
        key = jax.random.key(seed)
        result = gdopt.minimize(squared, zeros(columns), data=data, batch_size=batch_size, epochs=epochs, key=key)
        assert result.success, result.message
        assert squared(result.params, data) < 1.1 * least(*data), seed


@pytest.mark.parametrize(("columns", "batch_size"), [(1, 16), (3, 8), (10, 8)])
def test_each_regression_without_noise_is_solved(columns: int, batch_size: int) -> None:
    for seed in range(30):
        data = rows(64, columns, 0.0, seed)
        result = gdopt.minimize(squared, zeros(columns), data=data, batch_size=batch_size, epochs=30)
        assert result.success, result.message
        assert squared(result.params, data) < 1e-4 * squared(zeros(columns), data)


def test_a_batch_of_one_row_is_not_taken_for_a_failure() -> None:
    """A lucky first row has a tiny loss, so the run seems to end far above its start."""
    x, y = rows(256, 3, 1.0, 0)
    for seed in range(5):
        result = gdopt.minimize(squared, zeros(3), data=(x, y), batch_size=1, epochs=5, key=jax.random.key(seed))
        assert result.success
        assert "tried again" not in result.message


# --- other optimizers ---


def test_updates_tell_the_family() -> None:
    params = {"w": jnp.ones((20, 7)), "b": jnp.zeros(7)}
    kind = functools.partial(response, params=params)
    scale_free = [optax.adam, optax.lion, optax.rmsprop, optax.lamb, optax.contrib.muon, optax.adabelief]
    clipped = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    for factory in (*scale_free, clipped):
        found = kind(factory)
        assert found is not None
        assert found.is_scale_free, factory
    slow = [gdopt.gd, optax.sgd, functools.partial(optax.sgd, momentum=0.9)]
    for factory in (*slow, lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))):
        found = kind(factory)
        assert found is not None
        assert not found.is_scale_free, factory
    momentum, plain = kind(slow[2]), kind(slow[0])
    assert momentum is not None
    assert momentum.of_constant > 5
    assert plain is not None
    assert plain.of_constant == pytest.approx(1)


@pytest.mark.parametrize("factory", [optax.adam, optax.nadamw, optax.lion, optax.rmsprop, optax.contrib.muon])
def test_scale_free_optimizers_train_without_a_rate(factory: Any) -> None:
    data = rows(512, 8, 0.1, 4)
    result = gdopt.minimize(squared, zeros(8), data=data, batch_size=32, epochs=20, optimizer=factory)
    assert result.range_test is None
    assert squared(result.params, data) < 1.2 * least(*data)


def test_a_rate_that_follows_a_distance_takes_any_schedule() -> None:
    plain = lambda rate: following(optax.scale_by_learning_rate, rate, first=1.0)
    x = jnp.array([3.0, 4.0])
    optimizer: Any = plain(optax.linear_schedule(0.1, 0.0, 4))
    reference: Any = optax.sgd(optax.linear_schedule(0.1, 0.0, 4))
    state, other = optimizer.init(x), reference.init(x)
    for _ in range(5):
        updates, state = optimizer.update(x, state, x)
        expected, other = reference.update(x, other, x)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


# --- further tries ---


@pytest.mark.parametrize("skipping", [
    lambda rate: optax.apply_if_finite(optax.adam(rate), 100),
    lambda rate: optax.MultiSteps(optax.adam(rate), 1, should_skip_update_fn=optax.skip_not_finite),
])  # fmt: skip
def test_a_skipped_batch_does_not_stop_the_growth(skipping: Any) -> None:
    x, y = rows(160, 3, 0.1, 0)
    x[5] = np.nan
    result = gdopt.minimize(squared, zeros(3), data=(x, y), batch_size=16, epochs=20, optimizer=skipping)
    assert result.success
    rest = np.delete(x, 5, 0), np.delete(y, 5)
    assert squared(result.params, rest) < 1.2 * least(*rest)


def cliff(width: float) -> Any:
    """A regression that is not finite beyond a distance from the start."""
    return lambda p, b: squared(p, b) + jnp.where(jnp.max(jnp.abs(p["w"])) > width, jnp.nan, 0.0)


def test_a_run_that_fails_tries_again_at_lower_rates() -> None:
    result = gdopt.minimize(cliff(0.05), zeros(3), data=rows(64, 3, 0.1, 0), batch_size=8, epochs=5)
    assert result.success
    assert "the loss became infinite or NaN at step" in result.message
    assert "so gdopt tried again at lower ones." in result.message
    assert np.nanmax(result.history.learning_rate) <= 0.003


def counts(seed: int) -> tuple[np.ndarray, ...]:
    """Events, each with its exposure of 20 to 60000, whose rate depends on inputs of unequal scales."""
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(1500, 4)) * np.array([1, 0.1, 10, 1])
    exposure = np.exp(draws.uniform(3, 11, 1500))
    events = draws.poisson(exposure * np.exp(-6 + x @ np.array([0.5, 3, -0.03, 0.2])))
    return tuple(array.astype(np.float32) for array in (x, exposure, events))


def poisson(params: Any, batch: Any) -> jax.Array:
    x, exposure, events = batch
    log_rate = x @ params["w"] + params["b"]
    return jnp.mean(exposure * jnp.exp(log_rate) - events * (log_rate + jnp.log(exposure)))


def test_a_loss_that_rises_again_is_tried_again() -> None:
    """The rate overshoots on an exponential, whose gradient then vanishes. A tenth of it suffices."""
    data = counts(4)
    result = gdopt.minimize(poisson, zeros(4), data=data, batch_size=50, epochs=30)
    truth = {"w": np.array([0.5, 3, -0.03, 0.2], np.float32), "b": np.float32(-6)}
    start, best = float(poisson(zeros(4), data)), float(poisson(truth, data))
    assert result.success
    assert poisson(result.params, data) - best < 0.02 * (start - best)
    assert "the loss had risen again at step 900" in result.message


def test_a_noisy_loss_at_its_minimum_is_not_tried_again() -> None:
    x, y = rows(64, 3, 1.0, 0)
    for seed in range(5):
        key = jax.random.key(seed)
        best = gdopt.minimize(squared, zeros(3), data=(x, y), batch_size=8, epochs=10, key=key)
        more = gdopt.minimize(
            squared, best.params, data=(x, y), batch_size=8, epochs=10, key=key, optimizer_state=best.optimizer_state
        )
        assert "risen again" not in best.message + more.message


def test_there_are_three_tries() -> None:
    result = gdopt.minimize(cliff(1e-5), zeros(3), data=rows(64, 3, 0.1, 0), batch_size=8, epochs=5)
    assert result.status is gdopt.Status.NON_FINITE
    assert result.message.count("tried again") == 2


def test_a_loss_without_a_lower_bound_is_not_tried_again() -> None:
    """Lower rates would only hide it."""
    falls = lambda p, b: -squared(p, b)
    result = gdopt.minimize(falls, zeros(3), data=rows(64, 3, 0.1, 0), batch_size=8, epochs=40)
    assert not result.success
    assert "no lower bound" in result.message
    assert "tried again" not in result.message


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5])
def test_a_few_steps_are_made_at_useful_rates(max_steps: int) -> None:
    result = gdopt.minimize(squared, zeros(3), data=rows(64, 3, 0.1, 0), batch_size=8, max_steps=max_steps)
    assert np.nanmax(result.history.learning_rate) > 0.01


def test_a_given_rate_is_not_lowered() -> None:
    result = gdopt.minimize(cliff(1e-5), zeros(3), data=rows(64, 3, 0.1, 0), batch_size=8, epochs=5, learning_rate=0.1)
    assert result.status is gdopt.Status.NON_FINITE
    assert "tried again" not in result.message


def test_a_try_resumes_from_its_checkpoint(tmp_path: pathlib.Path) -> None:
    data, fit = rows(64, 3, 0.1, 0), functools.partial(gdopt.minimize, cliff(0.05), zeros(3), batch_size=8)
    whole = fit(data=data, epochs=5)
    seen: list[int] = []

    def stop(report: gdopt.Report) -> bool:
        seen.append(report.step)
        return report.epoch >= 2 and report.learning_rate < 0.003

    path = tmp_path / "run"
    stopped = fit(data=data, epochs=5, checkpoint=path, callback=stop)
    assert stopped.status is gdopt.Status.STOPPED
    assert stopped.steps < 40
    resumed = fit(data=data, epochs=5, checkpoint=path)
    np.testing.assert_array_equal(resumed.history.loss, whole.history.loss)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert "tried again" in resumed.message


def test_one_time_streams_train_without_a_rate() -> None:
    x, y = rows(640, 3, 0.1, 5)
    batches = ((x[k : k + 8], y[k : k + 8]) for k in range(0, 640, 8))
    result = gdopt.minimize(squared, zeros(3), data=batches, max_steps=79)
    assert result.success
    assert squared(result.params, (x, y)) < 1.5 * least(x, y)
