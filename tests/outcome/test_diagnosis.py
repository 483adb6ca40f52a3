"""Runs that ended in NaN or infinity: their messages, and what ``diagnose`` finds."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import gdopt
from gdopt import Status, _jax
from gdopt._compile import replays

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
DEFECT = X.copy()
DEFECT[7, 1] = np.nan


def run(loss, params, learning_rate: Any = 1.0, max_steps=50, **options):
    result = gdopt.minimize(loss, params, learning_rate=learning_rate, max_steps=max_steps, **options)
    assert result.status is Status.NON_FINITE
    return result


def steep(x):
    """A slope that leads to where something is not defined."""
    return jnp.sum(3 * x)


def is_at(place, function, text):
    """Return whether a place is a line of a function, by its number, that has this text."""
    lines, first = inspect.getsourcelines(function)
    file = inspect.getsourcefile(function)
    places = [f"{file}, line {first + k}, in " for k, line in enumerate(lines) if text in line]
    return place.startswith(tuple(places)) and text in place


# ---------------------------------------------------------------------------------------------------- what made it


def in_the_open(x):
    y = x + 1
    return steep(x) + jnp.sum(jnp.log(y))


def in_a_jit(x):
    @jax.jit
    def part(x):
        return 2 * jnp.log(x + 1)

    return steep(x) + jnp.sum(jax.jit(part)(x))


def in_a_checkpoint(x):
    return steep(x) + jnp.sum(jax.checkpoint(lambda x: jnp.log(x + 1) ** 2)(x))


def in_a_custom_rule(x):
    @jax.custom_vjp
    def part(x):
        return jnp.log(x + 1)

    part.defvjp(lambda x: (jnp.log(x + 1), x), lambda x, g: (g / (x + 1),))
    return steep(x) + jnp.sum(part(x))


def in_a_branch(x):
    good = lambda x: x * 2
    return steep(x) + jnp.sum(lax.cond(x[0] > -1, good, lambda x: jnp.log(x + 1), x))


def in_a_scan(x):
    def body(carry, row):
        return carry + jnp.log(x + 1 + row), carry

    return steep(x) + jnp.sum(lax.scan(body, jnp.zeros(2), jnp.arange(3.0))[0])


def in_the_rows_of_a_scan(x):
    def body(carry, row):
        return carry, jnp.log(row)

    return steep(x) + jnp.sum(lax.scan(body, 0.0, x + 1, reverse=True)[1])


def in_a_while(x):
    body = lambda state: (state[0] + 1, state[1] + jnp.log(x + 1))
    found = lax.while_loop(lambda state: state[0] < 3, body, (0, lax.stop_gradient(x)))[1]
    return steep(x) + jnp.sum(lax.stop_gradient(found))


def in_a_vmap(x):
    return steep(x) + jnp.sum(jax.vmap(lambda one: jnp.log(one + 1))(x))


EVERYWHERE = [
    in_the_open,
    in_a_jit,
    in_a_checkpoint,
    in_a_custom_rule,
    in_a_branch,
    in_a_scan,
    pytest.param(in_the_rows_of_a_scan, marks=pytest.mark.slow),
    in_a_while,
    pytest.param(in_a_vmap, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("loss", EVERYWHERE, ids=lambda loss: loss.__name__)
def test_the_operation_and_its_line_are_found(loss) -> None:
    if loss is in_a_while:
        x = jnp.ones(2)
        result = run(lambda x: in_a_while(lax.stop_gradient(x)) + steep(x), x)
    else:
        result = run(loss, jnp.ones(2))
    found = gdopt.diagnose(result)
    assert found.primitive == "log"
    assert is_at(found.place, loss, "jnp.log("), found.place
    assert found.step == result.steps > 0
    assert found.learning_rate == 1.0
    assert "the loss is NaN. The first NaN was made by log from " in found.message


def test_a_nan_from_infinities_is_followed_to_their_origin() -> None:
    def loss(x):
        large = jnp.exp(-40 * x)
        return steep(x) + jnp.sum(large - 2 * large)

    found = gdopt.diagnose(run(loss, jnp.ones(2)))
    assert found.primitive == "sub"
    assert "from [inf, inf] and [inf, inf]" in found.message
    assert "The infinity was made by exp from " in found.message


def test_an_infinity_from_an_earlier_round_of_a_scan() -> None:
    def loss(x):
        def body(carry, row):
            large, _ = carry
            return (large * 1e10, jnp.sin(large)), row

        (_, last), _ = lax.scan(body, (1e10 - 1e9 * x, x), jnp.arange(8.0))
        return steep(x) + jnp.sum(last)

    found = gdopt.diagnose(run(loss, jnp.ones(2)))
    assert found.primitive == "sin"
    assert "The infinity was made by mul from " in found.message
    assert "and 1e+10" in found.message


def test_the_unpicked_branch_of_a_where() -> None:
    def loss(x):
        return steep(x) + jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))

    result = run(loss, jnp.array([1.0, -1.0]))
    assert result.steps == 0
    assert np.isfinite(result.loss)
    found = gdopt.diagnose(result)
    assert (found.step, found.learning_rate, found.leaves) == (0, None, ("params",))
    assert (found.primitive, is_at(found.place, loss, "jnp.sqrt(x)")) == ("sqrt", True)
    assert "give that branch a harmless argument" in found.message
    assert gdopt.minimize(lambda x: loss(x) + x[0] ** 2, jnp.ones(2), learning_rate=0.01, max_steps=1).steps == 1


def test_the_input_with_nan_in_the_same_place_is_followed() -> None:
    def loss(x):
        picked = jnp.log(x)
        other = lax.stop_gradient(jnp.sqrt(x * jnp.array([1.0, 0.0])))
        return steep(x) + jnp.sum(jnp.where(jnp.array([True, False]), picked, other))

    found = gdopt.diagnose(run(loss, jnp.array([0.5, 0.5])))
    assert found.primitive == "log"


def test_an_infinity_without_nan() -> None:
    found = gdopt.diagnose(run(lambda x: jnp.sum(1.0 / (x - 1.0) ** 2), jnp.ones(2)))
    assert found.primitive == "div"
    assert "the loss is infinite. The first infinity was made by div from 1 and [0, 0]" in found.message


def test_a_constant_of_the_loss() -> None:
    hole = np.array([1.0, np.nan], np.float32)
    found = gdopt.diagnose(run(lambda x: jnp.sum(x * hole), jnp.ones(2)))
    assert found.primitive is None
    assert "A constant of the loss is NaN: [1, nan]." in found.message


# ------------------------------------------------------------------------------------------------------ where it is


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"data": DEFECT}, marks=pytest.mark.slow),
        {"data": DEFECT, "batch_size": 4},
        {"data": lambda: iter(np.split(DEFECT, 5))},
    ],
    ids=["full batch", "batches", "stream"],
)
def test_nan_in_the_data_is_named_instead_of_a_rate(options) -> None:
    result = run(lambda w, x: jnp.mean((x @ w - 1) ** 2), jnp.ones(3), 0.1, **options)
    assert "data holds NaN. " in result.message
    assert "Leave out what is NaN, or fill it" in result.message
    assert "learning_rate" not in result.message.replace("update with the learning rate", "")
    found = gdopt.diagnose(result)
    assert found.primitive is None
    assert "It comes from data: 1 of its" in found.message
    assert found.message.endswith(", 1].")


def test_nan_in_data_that_the_loss_skips_is_not_blamed() -> None:
    """NaN often marks missing values."""
    result = run(lambda w, x: jnp.sum(jnp.exp((jnp.nan_to_num(x) @ w) ** 2)), jnp.ones(3), data=DEFECT)
    assert "holds NaN" not in result.message
    assert "Try a learning_rate" in result.message
    failed = run(lambda w, x: jnp.sum(jnp.nan_to_num(x) @ w) + jnp.sum(jnp.log(-w)), jnp.ones(3), data=DEFECT)
    assert (failed.steps, "holds NaN" in failed.message) == (0, False)


def test_infinity_in_the_data_is_named() -> None:
    result = run(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), data=np.where(np.isnan(DEFECT), np.inf, DEFECT))
    assert "data holds infinity. Leave out what is infinite, or fill it" in result.message


def test_nan_in_held_params_is_named() -> None:
    params = {"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}
    result = run(lambda p: jnp.sum(p["a"] * p["b"]), params, trainable={"a": True, "b": False})
    assert "params['b'] holds NaN" in result.message
    assert "It comes from params['b']: 1 of its 2 entries" in gdopt.diagnose(result).message


@pytest.mark.parametrize(
    ("number", "named"), [(float("nan"), "args[0]: it is nan"), (float("inf"), "args[0]: it is inf")]
)
def test_nan_in_python_numbers(number, named) -> None:
    result = run(lambda x, s: jnp.sum(x * s), jnp.ones(2), args=(number,))
    assert named in gdopt.diagnose(result).message


def test_nan_in_python_constants() -> None:
    masked = lambda x: jnp.sum(jax.nn.softmax(jnp.where(jnp.array([True, True]), -jnp.inf, x)) * x)
    assert gdopt.diagnose(run(masked, jnp.ones(2))).primitive == "sub"
    found = gdopt.diagnose(run(lambda s: -jnp.where(s < 0, s - 1.0, -jnp.inf), 1.0))
    assert "A constant of the loss is infinite" in found.message


@pytest.mark.parametrize("together", [jnp.stack, jnp.concatenate])
def test_the_part_that_is_used_is_the_one_that_is_named(together) -> None:
    def loss(x):
        unused = jnp.sqrt(-1 - x**2)
        used = jnp.log(x - 2)
        return jnp.sum(together([unused, used]).reshape(2, 2)[1])

    found = gdopt.diagnose(run(loss, jnp.ones(2)))
    assert found.primitive == "log"
    assert is_at(found.place, loss, "used = jnp.log")


def test_loops_of_different_lengths_side_by_side() -> None:
    def loss(x):
        rounds = lambda a, n: lax.fori_loop(0, n, lambda _, c: jnp.log(c), a)
        return jnp.sum(x) + jnp.sum(jax.vmap(rounds)(lax.stop_gradient(x), jnp.array([0, 3])))

    found = gdopt.diagnose(run(loss, jnp.ones(2)))
    assert found.primitive == "log"
    assert "from [1, -inf]" in found.message  # of which the first had been over from the beginning


def test_nan_params_that_the_loss_does_not_show_are_never_returned() -> None:
    """Rows that the loss does not read have a gradient of zero, and adam without eps makes 0 / 0 of it."""
    few = lambda table: jnp.sum((table[:2] - 1) ** 2)
    options = {"optimizer": functools.partial(optax.adam, eps=0.0), "learning_rate": 0.1}
    result = run(few, jnp.zeros((4, 2)), 0.1, optimizer=options["optimizer"])
    assert np.isfinite(result.params).all()
    assert "the params became NaN or infinite at step 1, after an update with the learning rate 0.1" in result.message
    found = gdopt.diagnose(result)
    assert (found.leaves, found.primitive) == (("params",), None)
    assert "an optimizer that divides by its size needs an eps above 0" in found.message

    batches = {"data": X[:, :1], "batch_size": 5, **options}
    noisy = gdopt.minimize(lambda t, x: few(t) * jnp.mean(x**2), jnp.zeros((4, 2)), epochs=3, **batches)
    assert (noisy.status, np.isfinite(noisy.params).all()) == (Status.NON_FINITE, True)

    def inside(start):
        result = gdopt.minimize(few, start, **options)
        return result.params, result.status, result.success

    params, status, success = jax.jit(inside)(jnp.zeros((4, 2)))
    assert (np.isfinite(params).all(), int(status), bool(success)) == (True, Status.NON_FINITE, False)

    saturated = run(lambda x: 10 * jnp.sum(jax.nn.sigmoid(-10 * x)), jnp.zeros(2), 3e38)
    assert np.isfinite(saturated.params).all()


def test_finite_params_with_infinite_squares_are_finite() -> None:
    """Params may be finite although their squares are not."""
    result = gdopt.minimize(lambda x: jnp.sum(jnp.sqrt(1 + (x / 1e25) ** 2)), jnp.full(2, 1e26), learning_rate=1e37)
    assert np.isfinite(result.params).all()
    assert result.status is not Status.NON_FINITE


def test_a_schedule_that_gives_nan_is_named() -> None:
    result = run(lambda x: jnp.sum(x**2), jnp.ones(2), lambda step: jnp.where(step < 2, 0.1, jnp.nan))
    found = gdopt.diagnose(result)
    assert found.learning_rate is not None
    assert np.isnan(found.learning_rate)
    assert "the update with the learning rate nan made it" in found.message
    assert found.message.endswith("Correct the schedule.")


def test_nan_in_args_is_named() -> None:
    given = ({"x": DEFECT, "note": "text"},)
    result = run(lambda w, given: jnp.mean((given["x"] @ w - 1) ** 2), jnp.ones(3), args=given)
    assert "args[0]['x'] holds NaN" in result.message
    assert "args[0]['x']: 1 of its 60 entries is not finite, the first at [7, 1]" in gdopt.diagnose(result).message


def test_the_step_is_repeated_with_the_same_key_and_batch() -> None:
    def loss(w, x, key):
        noise = jax.random.normal(key)
        return jnp.mean(x @ w) + jnp.where(noise > 2, jnp.log(-noise), 0.0) * w[0]

    result = run(
        loss, jnp.ones(3), 0.01, 1000, data=X, batch_size=4, with_key=True, optimizer=optax.adam, key=jax.random.key(3)
    )
    assert result.steps > 3
    found = gdopt.diagnose(result)
    assert (found.step, found.primitive) == (result.steps, "log")


def test_params_that_the_update_made_infinite() -> None:
    result = run(lambda p: jnp.sum(jnp.sin(p["a"]) * 1e3) + p["b"], {"a": jnp.ones(2), "b": 1.0}, 1e37)
    assert "There params['a'] is not finite; gdopt.diagnose(result) finds" in result.message
    assert "after an update with the learning rate 1e+37" in result.message
    found = gdopt.diagnose(result)
    assert (found.step, found.primitive, found.place, found.leaves) == (1, None, None, ("params['a']",))
    assert "params['a'] is [-inf, -inf] before anything is computed: the update with the learning rate 1e+37" in (
        found.message
    )


def test_bad_leaves_of_the_gradient_are_listed_and_few_are_written_out() -> None:
    def loss(p):
        return steep(p["good"]) + sum(jnp.sum(jnp.sqrt(layer["w"])) for layer in p["layers"])

    params = {"good": jnp.ones(2), "layers": [{"w": jnp.full(3, 0.5)} for _ in range(5)], "frozen": jnp.ones(1)}
    result = run(loss, params, trainable={"good": True, "layers": True, "frozen": False})
    some = "params['layers'][0]['w'], params['layers'][1]['w'], params['layers'][2]['w'] and 2 more leaves"
    assert f"There the gradient of {some} is not finite" in result.message
    assert gdopt.diagnose(result).leaves == tuple(f"params['layers'][{k}]['w']" for k in range(5))


def test_batches_that_were_fetched_ahead_do_not_move_the_diagnosis() -> None:
    rows = [np.full((2, 1), float(n), np.float32) for n in range(12)]
    rows[5][0] = np.nan
    result = run(lambda w, x: jnp.mean((x @ w - 1) ** 2), jnp.ones(1), 1e-4, data=lambda: iter(rows))
    assert result.steps == 5
    assert "It comes from data: 1 of its 2 entries" in gdopt.diagnose(result).message


# ----------------------------------------------------------------------------------------------------- what is not


def test_results_without_anything_to_diagnose() -> None:
    good = gdopt.minimize(lambda x: x**2, 1.0, learning_rate=0.25)
    trial = gdopt.minimize(lambda x: jnp.sum(jnp.log(x)), jnp.ones(2), max_steps=300)
    assert (trial.status, np.isfinite(trial.history.loss[-1])) == (Status.MAX_STEPS, False)
    with pytest.raises(gdopt.InputError, match="result ended with MAX_STEPS, not with NON_FINITE"):
        gdopt.diagnose(trial)
    with pytest.raises(gdopt.InputError, match="result ended with CONVERGED, not with NON_FINITE"):
        gdopt.diagnose(good)
    with pytest.raises(gdopt.InputError, match=r"result=1\.0 is not a gdopt\.Result\. Pass what gdopt\.minimize"):
        gdopt.diagnose(cast(Any, 1.0))
    inside = jax.jit(lambda x: gdopt.minimize(lambda x: x**2, x, learning_rate=0.25))(1.0)
    with pytest.raises(gdopt.InputError, match=r"Call gdopt\.minimize outside"):
        gdopt.diagnose(inside)


def test_a_pickled_result_has_neither_the_loss_nor_the_data() -> None:
    secret = np.arange(10_000.0, dtype=np.float32)
    result = run(lambda x: jnp.sum(jnp.log(x - 2) * secret), jnp.float32(1.0))
    text = pickle.dumps(result)
    assert len(text) < 4000
    with pytest.raises(gdopt.InputError, match="holds no record of its last step: either it was pickled"):
        gdopt.diagnose(pickle.loads(text))
    assert gdopt.diagnose(result).primitive == "log"


@pytest.mark.parametrize(
    "made", [copy.copy, copy.deepcopy, jax.device_get, jax.device_put, lambda result: jax.tree.map(lambda x: x, result)]
)
def test_a_copied_result_can_be_diagnosed(made) -> None:
    result = run(lambda x: jnp.sum(jnp.log(x - 2)), jnp.float32(1.0))
    copied = made(made(result))
    assert copied is not result
    assert gdopt.diagnose(copied) == gdopt.diagnose(result)


def test_a_result_that_went_through_a_transformation_cannot_be_diagnosed() -> None:
    result = run(lambda x: jnp.sum(jnp.log(x - 2)), jnp.float32(1.0))
    with pytest.raises(gdopt.InputError, match=r"or it went through jit, vmap or grad.* Call gdopt\.minimize again"):
        gdopt.diagnose(jax.jit(lambda result: result)(result))
    many = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), result)
    with pytest.raises(gdopt.InputError, match=r"holds 2 runs side by side, which leave no record\. Call"):
        gdopt.diagnose(many)
    with pytest.raises(gdopt.InputError, match="holds no record of its last step"):
        gdopt.diagnose(many[1])


def test_a_loss_that_cannot_be_called_again_costs_no_result() -> None:
    called = []

    def loss(x):
        if len(called) == allowed:
            raise RuntimeError("no more")
        called.append(True)
        return steep(x) + jnp.sum(jnp.log(x))

    allowed = -1
    run(loss, jnp.ones(2))
    allowed, called = len(called) - 1, []
    result = run(loss, jnp.ones(2))
    assert "not finite;" not in result.message
    with pytest.raises(gdopt.InputError, match="could not be computed again"):
        gdopt.diagnose(result)


def test_the_parts_of_jax_that_it_uses_exist() -> None:
    """Fails if a new JAX changes what the search goes through, before the search finds nothing any more."""

    def loss(x):
        x = lax.scan(lambda c, r: (c * r, c), x, jnp.ones(3))[0]
        x = lax.while_loop(lambda c: c < 3, lambda c: c + 1, x)
        x = jax.checkpoint(jnp.sin)(x)
        return lax.cond(x > 0, jnp.sin, jnp.cos, x)

    found = {eqn.primitive.name: eqn for eqn in _jax.opened(jax.make_jaxpr(loss)(1.0)).eqns}
    assert found["scan"].params.keys() >= {"jaxpr", "length", "reverse"}
    assert replays.scan_counts(found["scan"]) == (0, 1)
    assert found["while"].params.keys() >= {"body_jaxpr", "cond_jaxpr", "body_nconsts", "cond_nconsts"}
    assert _jax.is_jaxpr(found["cond"].params["branches"][0])
    assert replays.as_it_is(found["scan"].params["jaxpr"], [1.0, 2.0])[0] == 2
    _, line, function = next(frame for frame in _jax.lines(found["scan"]) if frame[0] == __file__)
    assert (function.split(".")[-1], line > 0) == ("loss", True)
    assert _jax.is_backward(_jax.opened(jax.make_jaxpr(jax.grad(jnp.sin))(1.0)).eqns[-1])
    (call,) = _jax.opened(jax.make_jaxpr(jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))))(1.0)).eqns[-1:]
    assert call.primitive.name in ("remat2", "checkpoint")
    assert _jax.is_jaxpr(call.params["jaxpr"])
