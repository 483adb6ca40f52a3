"""Inside jit, vmap and grad a run is one while_loop with the same numbers, and its minimum has derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, rule_of_a_computed_value, some_of
from jax.experimental.ode import odeint
from sklearn.datasets import load_diabetes

import gdopt
from gdopt import Status

CURVATURES = jnp.array([1.0, 4.0, 9.0])
ROWS = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
START = {"w": jnp.array([3.0, -2.0, 1.0]), "b": jnp.float32(0.5)}


def quadratic(x, center=1.0):
    return 0.5 * jnp.sum(CURVATURES * (x - center) ** 2)


def fit(params, rows, scale=1.0):
    return jnp.mean((rows @ params["w"] + params["b"] - scale * jnp.sin(3 * rows[:, 0])) ** 2)


def noisy_fit(params, rows, key):
    return fit(params, rows) + 0.1 * jax.random.normal(key) * params["b"]


CALLS = {
    "spectral": {"args": (ROWS,)},
    "gd": {"args": (ROWS,), "learning_rate": 0.1},
    "adam, schedule": {"args": (ROWS,), "optimizer": optax.adam, "learning_rate": optax.cosine_decay_schedule(0.1, 30)},
    "lbfgs": {"args": (ROWS,), "optimizer": optax.lbfgs()},
    "batches": {"data": ROWS, "batch_size": 5, "learning_rate": 0.1, "max_steps": 19},
    "batches, keys": {"loss": noisy_fit, "data": ROWS, "batch_size": 8, "learning_rate": 0.1, "with_key": True},
    "averaged": {
        "data": ROWS,
        "batch_size": 8,
        "optimizer": optax.contrib.schedule_free_sgd(0.1),
        "max_steps": 12,  # a multiple of an epoch: the average is evaluated on the next one's first batch
    },
    "no best": {"args": (ROWS,), "learning_rate": 0.1, "keep_best": False},
    "averaged, no best": {
        "data": ROWS,
        "batch_size": 8,
        "optimizer": optax.contrib.schedule_free_sgd(0.1),
        "max_steps": 12,
        "keep_best": False,
    },
    "a few params": {"args": (ROWS,), "trainable": {"w": True, "b": False}},
}


FAST = ("spectral", "batches, keys", "averaged, no best")  # of each kind; the others take seconds to compile


@pytest.mark.parametrize(
    "options", [pytest.param(CALLS[name], id=name, marks=() if name in FAST else pytest.mark.slow) for name in CALLS]
)
def test_inside_jit_the_result_is_the_same(options: dict[str, Any]) -> None:
    options = {"max_steps": 40, **options}
    loss = options.pop("loss", fit)
    outside = gdopt.minimize(loss, START, **options)
    inside = jax.jit(lambda params: gdopt.minimize(loss, params, **options))(START)
    assert (int(inside.steps), Status(int(inside.status))) == (outside.steps, outside.status)
    assert bool(inside.success) == outside.success
    assert jax.tree.map(jnp.shape, inside.params) == jax.tree.map(jnp.shape, outside.params)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)
    jax.tree.map(close, inside.params, outside.params)
    close(inside.loss, outside.loss)
    assert inside.history is None


def test_it_is_one_loop_without_host_callbacks() -> None:
    jaxpr = str(jax.make_jaxpr(lambda x: gdopt.minimize(quadratic, x).params)(jnp.zeros(3)))
    # Steps; in rounds, of which each ends by a check; points that are tried there; other sizes of idle entries; and
    # five parts of the check that are computed if any run of a vmap asks for them.
    assert jaxpr.count("while[") == 9
    assert "callback" not in jaxpr


def test_a_vmap_computes_no_part_of_the_check_that_no_run_asks_for() -> None:
    """A cond would compute both of its branches, with hundreds of evaluations, and so would XLA before a loop."""
    calls = []

    def counted(x: np.ndarray) -> np.ndarray:
        calls.append(x.shape)
        return np.zeros(x.shape[:-1], np.float32)

    def loss(x: jax.Array, target: jax.Array) -> jax.Array:
        shape, still = jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(x)
        seen = jax.pure_callback(counted, shape, still, vmap_method="expand_dims")
        return jnp.sum((x - target) ** 2 * jnp.array([1.0, 10, 100])) + seen

    run = lambda target: gdopt.minimize(loss, jnp.zeros(3), args=(target,))
    results = jax.block_until_ready(jax.vmap(run)(jnp.arange(12.0).reshape(4, 3)))
    assert results.success.all()
    assert len(calls) < 3 * results.steps.max()


def vmap(function):
    return lambda x: jax.vmap(function)(x[None])[0]


@pytest.mark.parametrize(
    ("transform", "how"),
    [
        pytest.param(transform, how, id=f"{transform.__name__}-{how}", marks=marks)
        for how in ("loss", "schedule", "optimizer", "params", "data")
        for transform in (jax.jit, jax.grad, vmap)
        # The cheapest of the three for each; and that of grad where tracers hide in closures. What jit does, both do.
        for marks in (
            [] if transform is vmap or (transform is jax.grad and how in ("loss", "optimizer")) else [pytest.mark.slow],
        )
    ],
)
def test_any_of_its_inputs_may_be_traced(transform, how: str) -> None:
    def run(a):
        loss = lambda x, *data: (x - sum(data)) ** 2
        options: dict[str, Any] = {"learning_rate": 0.25, "max_steps": 3}
        start = 1.0
        if how == "loss":
            loss = lambda x: (x - a) ** 2
        elif how == "schedule":
            options["learning_rate"] = lambda step: 0.25 * a
        elif how == "optimizer":
            options["optimizer"] = lambda rate: optax.sgd(rate * a)
        elif how == "params":
            start = a
        else:
            options["data"] = (jnp.ones(2) * a,)
            loss = lambda x, d: jnp.mean((x - d[0]) ** 2)
        return jnp.sum(gdopt.minimize(loss, start, tol=1.0, **options).params)

    got = transform(run)(jnp.float32(1.0))
    if transform is jax.grad:
        moves = 1.0 if how in ("loss", "data") else 0.0  # neither rates nor the start move a minimum
        assert got == moves
    else:
        assert 0 <= got <= 1


def test_a_vmap_equals_one_run_after_the_other() -> None:
    centers = jnp.array([0.0, 1.0, -50.0])
    many: Any = jax.vmap(lambda c: gdopt.minimize(lambda x: quadratic(x, c), jnp.zeros(3)))(centers)
    for k, center in enumerate(centers):
        one = gdopt.minimize(quadratic, jnp.zeros(3), args=(center,))
        assert (int(many.steps[k]), int(many.status[k])) == (one.steps, one.status)
        np.testing.assert_allclose(many.params[k], one.params, rtol=1e-5, atol=1e-6)


def test_a_run_that_has_ended_does_not_change_while_the_slowest_continues() -> None:
    rates = jnp.array([0.2, 0.1, 1e-3, 30.0])
    sweep = jax.jit(jax.vmap(lambda rate: gdopt.minimize(quadratic, jnp.zeros(3), learning_rate=rate, max_steps=500)))
    together = sweep(rates)
    assert [Status(int(code)).name for code in together.status] == ["CONVERGED", "CONVERGED", "MAX_STEPS", "DIVERGED"]
    alone = sweep(jnp.array([0.2, 0.1, 0.2, 0.2]))
    first_two = lambda result: jax.tree.map(lambda leaf: np.asarray(leaf[:2]).tobytes(), result)
    assert first_two(together) == first_two(alone)
    assert together.steps[0] < together.steps[2] == 500


def test_a_second_vmap_outside_of_jit_compiles_nothing() -> None:
    def sweep(scale):
        return jax.vmap(lambda c: gdopt.minimize(lambda x: quadratic(x, scale * c), jnp.zeros(3)))(centers).params

    centers = jnp.array([1.0, 2.0])
    sweep(jnp.float32(1.0))
    with count_compilations() as counter:
        sweep(jnp.float32(2.0))
    assert counter.names == []


def test_mini_batches_in_a_vmap_are_shuffled_once_an_epoch() -> None:
    run = lambda rate: gdopt.minimize(fit, START, data=ROWS, batch_size=6, learning_rate=rate, epochs=3).params
    jaxpr = str(jax.make_jaxpr(jax.vmap(run))(jnp.array([0.1, 0.2])))
    before, inner = jaxpr.split("while[", 2)[1:]
    assert before.count("sort[") + inner.split("] ", 1)[0].count("sort[") >= 1
    assert jaxpr.count("while[") >= 2
    rates = jnp.array([0.1, 0.2])
    many = jax.vmap(run)(rates)
    for k in range(2):
        one = gdopt.minimize(fit, START, data=ROWS, batch_size=6, learning_rate=float(rates[k]), epochs=3).params
        np.testing.assert_allclose(many["w"][k], one["w"], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- derivatives


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def ridge(x64):
    """Return the data, minimize's solution by penalty and data, and the closed form."""
    diabetes: Any = load_diabetes(return_X_y=True)
    X, y = diabetes
    X, y = jnp.asarray(X / X.std(0)), jnp.asarray((y - y.mean()) / y.std())

    def solved(penalty, X=X):
        loss = lambda w: jnp.mean((X @ w - y) ** 2) + penalty * jnp.sum(w**2)  # closes over both
        return gdopt.minimize(loss, jnp.zeros(10), tol=1e-16).params

    def closed(penalty, X=X):
        return jnp.linalg.solve(X.T @ X / len(y) + penalty * jnp.eye(10), X.T @ y / len(y))

    return X, solved, closed


@pytest.mark.parametrize("derivative", [pytest.param(jax.jacfwd, marks=pytest.mark.slow), jax.jacrev])
def test_the_ridge_solution_by_its_penalty(ridge, derivative) -> None:
    _, solved, closed = ridge
    np.testing.assert_allclose(jax.jit(derivative(solved))(0.1), jax.jacfwd(closed)(0.1), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_ridge_solution_by_every_entry_of_the_data(ridge) -> None:
    X, solved, closed = ridge
    first = lambda way: jax.jit(jax.grad(lambda X: way(0.1, X)[2]))(X)
    np.testing.assert_allclose(first(solved), first(closed), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_the_second_derivative_of_the_ridge_solution(ridge) -> None:
    _, solved, closed = ridge
    twice = lambda way: jax.jit(jax.jacfwd(jax.jacrev(way)))(0.1)
    np.testing.assert_allclose(twice(solved), twice(closed), rtol=1e-5)


def test_derivatives_against_finite_differences(x64) -> None:
    """A loss with no closed form, params in a dict, and theta in args, of which a part is an integer."""
    rows = jnp.asarray(ROWS, float)

    def loss(params, theta):
        margin = rows[:, : theta["columns"].size] @ params["w"] + params["b"]
        return jnp.mean(jnp.logaddexp(0, margin * jnp.sign(rows[:, 0] + 0.3)) + theta["penalty"] * margin**2)

    def answer(penalty):
        theta = {"penalty": penalty, "columns": jnp.arange(3)}
        start = {"w": jnp.zeros(3), "b": jnp.zeros(())}
        result = gdopt.minimize(loss, start, args=(theta,), tol=1e-16)
        return result.params["w"][0] * 2 + result.params["b"], result.loss

    forward, h, plain = jax.jit(jax.jacfwd(answer))(0.1), 1e-4, jax.jit(answer)
    differences = [(a - b) / (2 * h) for a, b in zip(plain(0.1 + h), plain(0.1 - h), strict=True)]
    np.testing.assert_allclose(forward, differences, rtol=1e-5)


def test_the_loss_and_the_aux_move_with_the_minimum(x64) -> None:
    def run(center):
        loss = lambda x: (0.5 * jnp.sum(CURVATURES * (x - center) ** 2) + center**2, {"x": x, "n": jnp.arange(2)})
        result = gdopt.minimize(loss, jnp.zeros(3), has_aux=True, tol=1e-16)
        return result.loss, result.aux["x"], result.grad_norm

    loss_dot, x_dot, norm_dot = jax.jit(jax.jacrev(run))(0.7)
    np.testing.assert_allclose(loss_dot, 1.4, rtol=1e-9)
    np.testing.assert_allclose(x_dot, np.ones(3), rtol=1e-9)
    assert np.isnan(norm_dot)


@pytest.mark.slow
def test_complex_params_have_derivatives_too(x64) -> None:
    """|z - a|^2 + (Re z - 1)^2 has its minimum at ((1 + Re a)/2, Im a): no complex-linear function of a."""

    def answer(parts):
        a = jax.lax.complex(*parts)
        loss = lambda z: jnp.abs(z - a) ** 2 + (z.real - 1) ** 2
        z = gdopt.minimize(loss, jnp.asarray(0j), tol=1e-16).params
        return z.real, z.imag

    got = jax.jit(jax.jacrev(answer))((jnp.float64(2.0), jnp.float64(3.0)))
    np.testing.assert_allclose(got, [[0.5, 0.0], [0.0, 1.0]], atol=1e-8)


@pytest.mark.slow
def test_ill_conditioned_minima(x64) -> None:
    """A condition number of 1e7, in 40 dimensions."""
    turned = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (40, 40)))[0]
    hessian = turned @ jnp.diag(jnp.logspace(-5, 2, 40)) @ turned.T
    to = turned @ (jnp.logspace(-5, 2, 40) * jnp.arange(40.0))

    def answer(theta):
        loss = lambda x: 0.5 * x @ hessian @ x - theta * to @ x
        return gdopt.minimize(loss, theta * jnp.linalg.solve(hessian, to), tol=1e-3, grad_tol=1e-3).params

    got = jax.jit(jax.jacfwd(answer))(1.0)
    np.testing.assert_allclose(got, jnp.linalg.solve(hessian, to), rtol=1e-6)


@pytest.mark.slow
def test_params_that_the_loss_ignores_do_no_harm(x64) -> None:
    run = lambda a: gdopt.minimize(lambda p: (p["x"] - a) ** 2, {"x": 0.0, "idle": jnp.ones(2)}, tol=1e-12).params
    got = jax.jit(jax.jacfwd(run))(2.0)
    np.testing.assert_allclose(got["x"], 1.0, rtol=1e-9)
    assert not np.any(got["idle"])


def test_the_minimum_moves_with_params_that_are_held(x64) -> None:
    """The loss depends on the params that ``trainable`` leaves out, as on its args."""

    def run(held):
        loss = lambda p: (p["x"] - 3 * p["held"]) ** 2
        return gdopt.minimize(loss, {"x": 0.0, "held": held}, trainable={"x": True, "held": False}, tol=1e-12).params

    got = jax.jit(jax.jacrev(run))(2.0)
    np.testing.assert_allclose([got["x"], got["held"]], [3.0, 1.0], rtol=1e-9)


def decayed(rate: Any, x: Any) -> jax.Array:
    """x e^-rate, by an integration whose derivative rule is for reverse mode alone."""
    return odeint(lambda y, _, rate: -rate * y, x, jnp.array([0.0, 1.0], x.dtype), rate, rtol=1e-7, atol=1e-7)[-1]


def test_losses_with_rules_for_reverse_mode_alone_have_derivatives(x64) -> None:
    def solution(rate: Any) -> Any:
        result = gdopt.minimize(
            lambda x: (jnp.sum((decayed(rate, x) - 0.5) ** 2) + 1, {"rate": rate * x, "n": 3}),
            jnp.ones(2),
            tol=1e-10,
            has_aux=True,
        )
        return jnp.sum(result.params), result.loss, result.aux["rate"][0]

    # Both params are e^rate / 2, the loss is 1, and the aux is rate e^rate / 2.
    expected = [np.exp(2.0), 0.0, 1.5 * np.exp(2.0)]
    forward = jax.jvp(solution, (2.0,), (1.0,))[1]
    backward = jax.jit(jax.jacrev(solution))(2.0)
    np.testing.assert_allclose(forward, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(backward, expected, rtol=1e-4, atol=1e-4)


def test_constants_of_the_loss_are_not_differentiated() -> None:
    """A rule that closes over a constant would not allow that."""
    scale = jnp.array([1.0, 2.0])
    scaled = jax.custom_vjp(lambda x: scale * x)
    scaled.defvjp(lambda x: (scale * x, None), lambda _, g: (scale * g,))
    minimum = lambda c: gdopt.minimize(lambda x: jnp.sum((scaled(x) - c) ** 2), jnp.zeros(2), tol=1e-6).params
    np.testing.assert_allclose(jax.jacrev(minimum)(jnp.ones(2)), np.diag([1, 0.5]), atol=1e-3)


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp], ids=["jvp", "vjp"])
def test_rules_may_close_over_what_the_loss_computes(kind: Any) -> None:
    loss, x, data = rule_of_a_computed_value(kind), jnp.zeros(3), jnp.array([0.25, 0.75])
    expected = x
    for _ in range(4):
        expected = expected - 0.1 * jax.jit(jax.grad(loss))(expected, data)
    run = lambda x, **options: gdopt.minimize(loss, x, learning_rate=0.1, max_steps=4, **options).params
    np.testing.assert_allclose(run(x, args=(data,)), expected, rtol=1e-6)
    np.testing.assert_allclose(run(x, data=data), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: run(x, args=(data,)))(x), expected, rtol=1e-6)
    np.testing.assert_allclose(gdopt.gd_step(loss, x, 0.1, data)[0], x - 0.1 * jax.grad(loss)(x, data), rtol=1e-6)

    def minimum(goal: Any) -> Any:
        return gdopt.minimize(lambda x, goal: loss(x - goal, data), x, args=(goal,), tol=1e-6).params[0]

    np.testing.assert_allclose(jax.grad(minimum)(0.5), 1, rtol=1e-3)


def test_failed_runs_and_infinite_derivatives_give_nan() -> None:
    unfinished = lambda a: gdopt.minimize(quadratic, jnp.zeros(3), args=(a,), learning_rate=1e-3, max_steps=3)
    assert not jax.jit(unfinished)(1.0).success
    assert np.isnan(jax.jit(jax.jacrev(lambda a: unfinished(a).params))(1.0)).all()
    flat = lambda a: (
        gdopt.minimize(lambda x: x**4 - a * x, 0.0, learning_rate=0.1).params
    )  # the minimum moves infinitely fast at a = 0
    assert np.isnan(jax.jit(jax.jacfwd(flat))(0.0))


def moving_bowl(x: Any, a: Any) -> Any:
    """A loss of two params, whose minimum (a / 2, a / 3) and whose lowest value a^2 move with a."""
    return jnp.sum((jnp.array([2.0, 3.0]) * x - a) ** 2) + a**2


MOVING = {
    "an arg": lambda a: gdopt.minimize(moving_bowl, jnp.zeros(2), args=(a,), tol=1e-6),
    "a constant": lambda a: gdopt.minimize(lambda x: moving_bowl(x, a), jnp.zeros(2), tol=1e-6),
    "data": lambda a: gdopt.minimize(lambda x, d: moving_bowl(x, d[0]), jnp.zeros(2), data=a[None], tol=1e-6),
}


@pytest.mark.parametrize("derivative", [pytest.param(jax.jacfwd, marks=pytest.mark.slow), jax.jacrev])
@pytest.mark.parametrize("how", [pytest.param("an arg", marks=pytest.mark.slow), "a constant", "data"])
def test_each_number_of_a_result_has_its_derivative_or_nan(derivative: Any, how: str) -> None:
    """What one number lacks does not spill to the others: in reverse mode each has a cotangent, most of them zero."""

    def numbers(a: Any) -> dict[str, Any]:
        result = MOVING[how](a)
        names = ("params", "loss", "grad_norm", "left", "compile_seconds", "run_seconds")
        return {name: getattr(result, name) for name in names}

    moves = jax.jit(derivative(numbers))(jnp.float32(1.5))
    np.testing.assert_allclose(moves.pop("params"), [1 / 2, 1 / 3], rtol=1e-3)
    np.testing.assert_allclose(moves.pop("loss"), 3.0, rtol=1e-3)
    assert {name: float(move) for name, move in moves.items()} == {
        "grad_norm": pytest.approx(np.nan, nan_ok=True),
        "left": pytest.approx(np.nan, nan_ok=True),
        "compile_seconds": 0,
        "run_seconds": 0,
    }


@pytest.mark.parametrize("dtype", some_of(["bfloat16", "float16"], ["bfloat16"]))
def test_params_of_half_precision_have_derivatives(dtype: str) -> None:
    run = lambda a: gdopt.minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(2, dtype)).params
    moves = jax.jit(jax.jacrev(run))(jnp.asarray(1.5, dtype))
    assert moves.dtype == dtype
    assert [*moves] == [1, 1]


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_the_start_moves_no_minimum_but_the_numbers_of_its_run(derivative: Any) -> None:
    result = lambda start: gdopt.minimize(moving_bowl, start * jnp.ones(2), args=(1.5,))
    loss = jax.jit(derivative(lambda start: result(start).loss))(2.0)
    norm = jax.jit(derivative(lambda start: result(start).grad_norm))(2.0)
    assert loss == 0
    assert np.isnan(norm)


def test_failed_runs_that_are_masked_out_leave_the_others_their_derivatives() -> None:
    def total(a: Any, rates: Any) -> Any:
        results = jax.vmap(
            lambda rate: gdopt.minimize(moving_bowl, jnp.zeros(2), args=(a,), learning_rate=rate, max_steps=200)
        )(rates)
        return jnp.sum(jnp.where(results.success, results.params[:, 0], 0)), results.success

    move, success = jax.jit(jax.grad(total, has_aux=True))(1.5, jnp.array([0.05, 1e-9, 3.0, 0.06]))
    assert [*success] == [True, False, False, True]
    assert move == pytest.approx(2 * 0.5, rel=1e-3)


# Runs whose end is no smooth minimum, though it is a success.
NO_SMOOTH_MINIMUM = {
    "a target": lambda a: gdopt.minimize(lambda x: (x - a) ** 2 + 0.1 * x**4, 3.0, target=3.0, learning_rate=0.01),
    "a kink": lambda a: gdopt.minimize(lambda x: jnp.abs(x - a) + 0.1 * x**2, 3.0),
    "a kink that stays": lambda a: gdopt.minimize(lambda x: (x - a) ** 2 + 3 * jnp.abs(x), 3.0),
}


@pytest.mark.parametrize("end", some_of(NO_SMOOTH_MINIMUM, ("a target", "a kink")))
def test_an_end_that_is_no_smooth_minimum_has_no_derivative(end: str) -> None:

    def numbers(a: Any) -> Any:
        result = NO_SMOOTH_MINIMUM[end](a)
        return (result.params, result.loss), result.success

    moves, success = jax.jit(jax.jacrev(numbers, has_aux=True))(1.0)
    assert success
    assert np.isnan(moves).all()


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_params_that_the_optimizer_holds_at_a_bound_do_not_move(derivative: Any) -> None:
    inside = optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())
    ways = jnp.array([1.0, -1.0, 0.5])

    def solution(a: Any) -> Any:
        loss = lambda x: jnp.sum((x - a * ways) ** 2) + 0.5 * jnp.sum(x) ** 2
        result = gdopt.minimize(loss, jnp.ones(3), optimizer=inside, tol=1e-8)
        return (result.params, result.loss), result.success

    (params_dot, loss_dot), success = jax.jit(derivative(solution, has_aux=True))(1.0)
    assert success
    # Without the second param: (2 + 1) x + y = 2 a, x + (2 + 1) y = a.
    free = np.linalg.solve([[3.0, 1.0], [1.0, 3.0]], [2.0, 1.0])
    np.testing.assert_allclose(params_dot, [free[0], 0, free[1]], atol=1e-4)
    lowest = np.sum((free - [1, 0.5]) ** 2) + 1 + 0.5 * free.sum() ** 2  # at a = 1; it grows with a^2
    np.testing.assert_allclose(loss_dot, 2 * lowest, rtol=1e-4)


def test_complex_params_of_a_composed_optimizer_move_in_both_parts() -> None:
    def parts(a: Any) -> Any:
        loss = lambda z: jnp.sum(jnp.abs(z - a * jnp.array([1 + 3j, 2j])) ** 2)
        optimizer = optax.chain(optax.sgd(0.1), optax.identity())
        result = gdopt.minimize(loss, jnp.zeros(2, jnp.complex64), optimizer=optimizer)
        return result.params.real, result.params.imag

    real, imaginary = jax.jit(jax.jacrev(parts))(1.0)
    np.testing.assert_allclose([real, imaginary], [[1, 0], [3, 2]], atol=1e-5)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_with_more_params_than_rows_the_derivative_has_least_norm(derivative, x64: bool) -> None:
    """By the results of (5, 12) rows it is the pseudo-inverse; by the rows, the least dw with A dw = -dA w."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(x64):
        rows, results, way = (jnp.asarray(rng.normal(size=shape), float) for shape in ((5, 12), 5, (5, 12)))
        solved = lambda rows, y: gdopt.minimize(lambda w: jnp.mean((rows @ w - y) ** 2), jnp.zeros(rows.shape[1]))
        inverse = np.linalg.pinv(rows)
        atol = 1e-12 if x64 else 1e-5
        of_results = jax.jit(derivative(lambda y: solved(rows, y).params))(results)
        np.testing.assert_allclose(of_results, inverse, atol=atol)
        of_rows = jax.jit(derivative(lambda t: solved(rows + t * way, results).params))(0.0)
        right = -inverse @ way @ np.asarray(solved(rows, results).params)
        np.testing.assert_allclose(of_rows, right, atol=1e-6 if x64 else 1e-3)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_a_minimum_that_jumps_has_no_derivative(derivative) -> None:
    """Either of two equal columns may get all of the weight once they differ. The results move none of this."""
    rng = np.random.default_rng(0)
    column, results = rng.normal(size=5).astype("f4"), rng.normal(size=5).astype("f4")
    rows, way = np.stack([column, column], 1), np.stack([results, np.ones(5, "f4")], 1)
    solved = lambda rows, y: gdopt.minimize(lambda w: jnp.mean((rows @ w - y) ** 2), jnp.zeros(2)).params
    assert np.isnan(jax.jit(derivative(lambda t: solved(rows + t * way, results)))(0.0)).all()
    of_results = jax.jit(derivative(lambda y: solved(rows, y)))(results)
    np.testing.assert_allclose(of_results, np.linalg.pinv(rows), atol=1e-5)


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("options", ["batches", pytest.param("batches, keys", marks=pytest.mark.slow)])
def test_mini_batch_runs_have_no_derivative(derivative, options: str) -> None:
    call = {"max_steps": 3, **CALLS[options]}
    loss = call.pop("loss", fit)
    run = lambda b: gdopt.minimize(loss, {**START, "b": b}, **call).params["b"]
    with pytest.raises(gdopt.InputError, match="differentiated through a run of mini-batches, random keys or a state"):
        derivative(run)(jnp.float32(0.5))
    if derivative is jax.jacfwd:
        assert derivative(lambda b: run(jax.lax.stop_gradient(b)))(jnp.float32(0.5)) == 0


# ------------------------------------------------------------------------------------------------------- the result


def test_a_jit_may_return_a_result() -> None:
    result = jax.jit(lambda x: gdopt.minimize(quadratic, x))(jnp.zeros(3))
    assert result.raise_for_status() is result
    assert repr(result).startswith("gdopt.Result")
    with pytest.raises(gdopt.InputError, match="result is of a run inside jit"):
        gdopt.plot.descent(result)
    assert result.message.startswith("lost in jit, vmap, grad or tree.map")
    outside = gdopt.minimize(quadratic, jnp.zeros(3))
    assert jax.tree.map(lambda leaf: leaf, outside).message == outside.message


def test_many_results_are_raised_as_one() -> None:
    rates = jnp.array([0.1, 1e-5, 100.0, 1e-6])
    results = jax.vmap(lambda rate: gdopt.minimize(quadratic, jnp.zeros(3), learning_rate=rate, max_steps=99))(rates)
    with pytest.raises(gdopt.NotConvergedError, match=r"3 of 4 runs ended without success: MAX_STEPS \(2\), DIV"):
        results.raise_for_status()
    assert "float32[4, 3]" in repr(results)


def test_a_traced_result_can_be_printed_but_not_raised() -> None:
    def run(x):
        result = gdopt.minimize(quadratic, x)
        assert "float32[3]" in repr(result)
        return result.raise_for_status().params

    with pytest.raises(gdopt.GdoptError, match="raise_for_status was called inside jit"):
        jax.jit(run)(jnp.zeros(3))


REFUSED = {
    "callback": ({"callback": print}, r"callback=<built-in function print> was given to minimize inside jit"),
    "progress": ({"progress": True}, "progress=True was given to minimize inside jit"),
    "throw": ({"throw": True}, "throw=True was given to minimize inside jit"),
    "a stream": ({"data": lambda: iter([ROWS]), "learning_rate": 0.1}, "data=.* was given to minimize inside jit"),
    "a range test": ({"args": (ROWS,), "optimizer": optax.adam}, "lr_find was called inside jit"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_need_the_host_are_refused(options: dict[str, Any], message: str) -> None:
    options = {"args": (ROWS,)} | options if "data" not in options else options
    with pytest.raises(gdopt.InputError, match=message):
        jax.jit(lambda b: gdopt.minimize(fit, {**START, "b": b}, **options).params)(0.5)


@pytest.mark.parametrize("how", [jax.grad, jax.jacfwd])
def test_derivatives_by_a_value_that_moves_the_gradient_of_one_leaf(how: Any) -> None:
    def solution(target: Any) -> jax.Array:
        loss = lambda p: (p["a"] - target) ** 2 + 2 * (p["b"] - p["a"]) ** 2 + jnp.sum(p["c"] ** 2)
        return gdopt.minimize(loss, {"a": 0.0, "b": 0.0, "c": jnp.ones(2)}, tol=1e-8).params["b"]

    assert float(how(solution)(3.0)) == pytest.approx(1)
    assert float(how(how(solution))(3.0)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("how", [jax.vmap, jax.grad])
def test_a_checkpoint_is_refused_in_every_transformation(how: Any, tmp_path: Any) -> None:
    solve = lambda a: gdopt.minimize(lambda w: a * (w - 1) ** 2, 0.0, checkpoint=tmp_path / "run").params
    with pytest.raises(gdopt.InputError, match=r"checkpoint=.* inside jit, vmap or grad"):
        how(solve)(jnp.ones(2) if how is jax.vmap else 1.0)


def test_a_hessian_of_zeros_is_no_smooth_minimum() -> None:
    """JAX takes the second derivative of |z| at 0 as 0, so the derivative of the minimum is not known."""
    loss = lambda w, c: jnp.sum(jnp.abs(w - c) ** 2)
    fit = lambda c: gdopt.minimize(loss, jnp.zeros(2, jnp.complex64), args=(c,)).params
    c = jnp.array([1 + 2j, 3])
    params, moved = jax.jvp(fit, (c,), (jnp.array([1, 1j]),))
    np.testing.assert_allclose(params, c, rtol=1e-4)
    assert np.isnan(moved).all()
