"""A prepared call: the same bits as `minimize`, without a trace, and an error for what does not look alike."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, count_traces, rule_of_a_computed_value, some_of

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
    "not finite": {**BOWL, "loss": lambda x, a: jnp.sum(x - jnp.log(1 + a - x)), "learning_rate": 3.0},
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


FAST = ("quasi_newton", "few steps", "adam(0.1)", "bounds and scale", "prox", "trainable", "batches and keys")


@pytest.mark.filterwarnings("ignore:.*nearest point within|.*outside of the set")
@pytest.mark.parametrize("name", some_of(CALLS, FAST))
def test_it_returns_the_result_of_minimize(name: str) -> None:
    options = CALLS[name]
    solve = called(options, gdopt.prepare)
    equal(solve(), called(options))
    if name == "curvature":  # The sizes are those of the preparation.
        return
    start = jax.tree.map(lambda x: x + 0.75, options["params"])
    if name == "trainable":
        start["b"] = options["params"]["b"]
    equal(solve(start), called(options, params=start))
    given = {"args": (jnp.array([3.0, -2.0, 1.0]),)} if "args" in options else {"data": ROWS[::-1] + 0.1}
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
        solve = called({"loss": loss, "params": jnp.zeros(3), "args": (jnp.ones(3),), **options}, gdopt.prepare)
        start, args = jnp.full(3, 0.5), (jnp.array([2.0, 0.5, 1.0]),)
        calls.clear()
        solve()
        with count_compilations() as compilations, count_traces() as traces:
            assert solve(start, args=args).success
        assert (compilations.names, traces, calls) == ([], [], [])


def test_what_changes_after_the_preparation_does_not_count() -> None:
    """Neither a rebound name, nor an array of NumPy that is changed in place: closed over, or given."""
    held, given, start = np.full((64, 3), 2.0, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32)
    power = 2
    calls = []

    def loss(x: Any, a: Any) -> Any:
        calls.append(1)
        return jnp.sum(jnp.mean(held, 0) * (x - a) ** power) + jnp.sum(jnp.log(1 + x**2))

    solve = gdopt.prepare(loss, start, args=(given,), bounds=(given - 6, given + 6))
    before = solve()
    power = 4
    held[:], given[:], start[:] = 7.0, 9.0, 3.0
    calls.clear()
    equal(solve(), before)
    assert solve(np.full(3, 5.0, np.float32)).status is Status.CONVERGED
    equal(solve(jnp.zeros(3)), before)
    jax.jit(solve)(jnp.zeros(3))
    assert not calls


def test_a_run_that_ends_in_nan_is_explained_without_the_loss() -> None:
    calls = []

    def loss(w: Any) -> Any:
        calls.append(1)
        return jnp.sum(w - jnp.log(w))

    solve = gdopt.prepare(loss, jnp.full(3, 2.0), learning_rate=5.0)
    calls.clear()
    found = gdopt.diagnose(solve())
    assert not calls
    assert found == gdopt.diagnose(gdopt.minimize(loss, jnp.full(3, 2.0), learning_rate=5.0))
    assert found.primitive == "log"
    assert "test_prepare.py" in str(found.place)


X = jnp.array([1.0, 2.0, 3.0])
UNLIKE = [
    ({"params": jnp.zeros(4)}, r"params has shape (4,), prepared with (3,)."),
    ({"params": np.zeros(3, np.int32)}, "params is an array of int32, prepared with an array of float32."),
    ({"params": [jnp.zeros(3)]}, "params is PyTreeDef([*]), prepared with PyTreeDef(*)."),
    ({"params": jnp.array([0.0, jnp.nan, 0.0])}, "params starts with nan at index (1,)."),
    ({"args": (jnp.zeros(2),)}, r"args[0] has shape (2,), prepared with (3,)."),
    ({"args": (X.astype(jnp.float16),)}, "args[0] is an array of float16, prepared with an array of float32."),
    ({"args": (X, X)}, "args is PyTreeDef((*, *)), prepared with PyTreeDef((*,))."),
    ({"args": X}, "args is a ArrayImpl. Pass a tuple"),
    ({"args": ("text",)}, "args holds a number or an array where it was prepared with another object"),
    ({"data": ROWS}, "data was given, but the call was prepared without."),
    ({"learning_rate": 0.1}, "learning_rate=0.1 was given, but the call was prepared with 'auto'."),
]


@pytest.fixture(scope="module")
def solve() -> gdopt.Prepared:
    return gdopt.prepare(bowl, jnp.zeros(3), args=(X,))


@pytest.mark.parametrize(("changes", "message"), UNLIKE)
def test_what_does_not_look_alike_is_an_error(solve: Any, changes: dict[str, Any], message: str) -> None:
    with count_compilations() as compilations, pytest.raises(InputError) as raised:
        solve(**changes)
    assert message in str(raised.value)
    assert compilations.count == 0


def test_a_python_number_stays_one() -> None:
    solve = gdopt.prepare(lambda x, c: (x - c) ** 2, 0.0, args=(1.0,))
    equal(solve(args=(2.5,)), gdopt.minimize(lambda x, c: (x - c) ** 2, 0.0, args=(2.5,)))
    with pytest.raises(InputError, match=r"args\[0\] is a Python int, prepared with a Python float"):
        solve(args=(2,))
    with pytest.raises(InputError, match=r"args\[0\] is an array of float32, prepared with a Python float"):
        solve(args=(jnp.float32(2),))
    equal(solve(1.0, args=(2.0,)), solve(np.float32(1.0), args=(2.0,)))


def test_weak_types_of_arrays_do_not_count() -> None:
    loss = lambda x, a: jnp.sum((x - a) ** 2)
    for first in (jnp.full(3, 1.0), jnp.ones(3)):
        solve = gdopt.prepare(loss, jnp.zeros(3), args=(first,))
        for other in (jnp.full(3, 2.0), jnp.ones(3) * 2, np.full(3, 2.0)):
            equal(solve(jnp.full(3, 0.5), args=(other,)), gdopt.minimize(loss, jnp.full(3, 0.5), args=(other,)))


def test_functions_in_args_and_leaves_that_are_not_optimised_stay() -> None:
    loss = lambda params, f: jnp.sum((f(params["w"]) - params["c"]) ** 2)
    start = {"w": jnp.ones(2), "c": jnp.array([2.0, 3.0])}
    solve = gdopt.prepare(loss, start, args=(jnp.exp,), trainable={"w": True, "c": False})
    equal(solve({"w": jnp.zeros(2), "c": np.array([2.0, 3.0])}, args=(jnp.exp,)), solve({**start, "w": jnp.zeros(2)}))
    with pytest.raises(InputError, match="args holds other functions"):
        solve(args=(jnp.sin,))
    with pytest.raises(InputError, match=r"params\['c'\] is not optimised, and differs"):
        solve({"w": jnp.zeros(2), "c": jnp.zeros(2)})


def test_a_schedule_and_an_owned_rate_stay() -> None:
    kinds: list[dict[str, Any]] = [{"learning_rate": lambda step: 0.01}, {"optimizer": optax.adam(0.1)}]
    for options in kinds:
        solve = gdopt.prepare(lambda x: jnp.sum(x**2), jnp.ones(2), max_steps=3, **options)
        with pytest.raises(InputError, match="was given, but the call was prepared with"):
            solve(learning_rate=0.1)
    solve = gdopt.prepare(lambda x: jnp.sum(x**2), jnp.ones(2), max_steps=3, learning_rate=0.1)
    wrongs: list[Any] = [0, -1.0, "auto", lambda step: 0.1]
    for wrong in wrongs:
        with pytest.raises(InputError, match="learning_rate="):
            solve(learning_rate=wrong)


REFUSED = [
    ({"callback": print}, "callback=<built-in function print> was given to prepare, whose runs do not support it."),
    ({"checkpoint": "run"}, "checkpoint='run' was given to prepare"),
    ({"validation": ROWS}, "was given to prepare"),
    ({"throw": True}, "throw=True was given to prepare, whose runs do not support it. Call .raise_for_status()"),
    ({"data": [ROWS, ROWS].__iter__, "loss": fit, "params": FIT["params"]}, "data is a stream"),
    ({"data": ROWS, "batch_size": 8, "loss": fit, "params": FIT["params"]}, 'learning_rate="auto" was given'),
    ({"optimizer": optax.adam}, 'learning_rate="auto" was given'),
    ({"tol": -1}, "tol=-1 is not"),
    ({"params": "text"}, "params="),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_prepared_is_an_error(changes: dict[str, Any], message: str) -> None:
    options = {"loss": lambda x: jnp.sum(x**2), "params": jnp.ones(3), **changes}
    with count_compilations() as compilations, pytest.raises(InputError) as raised:
        called(options, gdopt.prepare)
    assert message in str(raised.value)
    assert compilations.count == 0


def test_an_unknown_argument_is_an_error_as_of_any_function() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rates'"):
        gdopt.prepare(bowl, jnp.zeros(3), args=(X,), learning_rates=0.1)


def test_a_setting_that_changed_is_an_error(solve: Any) -> None:
    before = solve()
    with jax.enable_x64(True), pytest.raises(InputError, match="jax_enable_x64 changed since the call was prepared"):
        solve()
    with jax.default_matmul_precision("float32"), pytest.raises(InputError, match="jax_default_matmul_precision"):
        solve()
    equal(solve(), before)
    with jax.enable_x64(True):
        wide = gdopt.prepare(bowl, np.zeros(3), args=(np.array([1.0, 2.0, 3.0]),))
        assert wide().params.dtype == np.float64
        equal(wide(), gdopt.minimize(bowl, np.zeros(3), args=(np.array([1.0, 2.0, 3.0]),)))
        with pytest.raises(InputError, match="params is an array of float32, prepared with an array of float64"):
            wide(jnp.zeros(3, jnp.float32))


def test_inside_jit_it_is_a_call_of_minimize(solve: Any) -> None:
    start = jnp.full(3, 0.5)
    inside = jax.jit(lambda a: solve(start, args=(a,)))(X)
    assert inside == jax.jit(lambda a: gdopt.minimize(bowl, start, args=(a,)))(X)

    @jax.jit
    def prepared_inside(a: Any) -> Any:
        return gdopt.prepare(bowl, jnp.zeros(3), args=(a,))().params

    with pytest.raises(InputError, match="prepare was called inside jit"):
        prepared_inside(X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prox", "project", "bounds", "scale"])
def test_inside_jit_a_start_may_be_traced_that_is_moved(name: str) -> None:
    options = CALLS[name]
    solve = called(options, gdopt.prepare)
    start = jnp.full(3, 0.25)
    inside = jax.jit(solve)(start)
    np.testing.assert_allclose(inside.params, called(options, params=start).params, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_inside_other_transformations_it_is_one_too(solve: Any) -> None:
    others, rates = jnp.stack([X, X + 1]), jnp.array([0.001, 0.004])
    np.testing.assert_allclose(jax.vmap(lambda a: solve(args=(a,)).params)(others), others, atol=1e-3)
    slope = jax.grad(lambda a: jnp.sum(solve(args=(a,)).params))(X)
    np.testing.assert_allclose(slope, np.ones(3), rtol=1e-3)
    fixed = gdopt.prepare(bowl, jnp.zeros(3), args=(X,), learning_rate=0.01)
    swept = jax.vmap(lambda rate: fixed(learning_rate=rate))(rates)
    assert swept == jax.vmap(lambda rate: gdopt.minimize(bowl, jnp.zeros(3), args=(X,), learning_rate=rate))(rates)
    assert jax.jit(lambda: solve().params)().shape == (3,)  # Everything is traced, though nothing is given.


def test_arrays_are_not_consumed_and_results_stay(solve: Any) -> None:
    start, a = jnp.full(3, 0.5), X + 1
    first = solve(start, args=(a,))
    kept = jax.tree.map(np.array, (first.params, first.optimizer_state, list(first.history)[:3]))
    for shift in range(5):
        solve(start + shift, args=(a - shift,))
    assert not start.is_deleted()
    assert not a.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, kept, (first.params, first.optimizer_state, list(first.history)[:3]))
    equal(solve(start, args=(a,)), first)
    equal(solve(first.params, args=(a,)), gdopt.minimize(bowl, first.params, args=(a,)))


def test_arrays_that_were_deleted_since_then_are_named() -> None:
    start, a = jnp.zeros(3) + 0, X + 1
    solve = gdopt.prepare(bowl, start, args=(a,), learning_rate=0.004, max_steps=3)
    a.delete()
    assert solve(args=(X,)).steps == 3
    with pytest.raises(InputError, match=r"args\[0\] is an array of dtype float32 and shape \(3,\) that was deleted"):
        solve()


def test_leaves_that_are_not_optimised_are_not_traced() -> None:
    start = {"w": jnp.zeros(2), "c": jnp.ones(2)}
    loss = lambda params: jnp.sum((params["w"] - params["c"]) ** 2)
    solve = gdopt.prepare(loss, start, trainable={"w": True, "c": False}, learning_rate=0.1)
    fit = jax.jit(lambda w, c: solve({"w": w, "c": c}).params["w"])
    with pytest.raises(InputError, match=r"params\['c'\] is not optimised, and differs"):
        fit(start["w"], start["c"])
    np.testing.assert_allclose(jax.jit(lambda w: solve({**start, "w": w}).params["w"])(start["w"]), 1, atol=0.02)


def test_it_may_be_called_in_several_threads(solve: Any) -> None:
    shifts = [jnp.float32(k) + X for k in range(6)]
    expected = [solve(args=(a,)) for a in shifts]
    found: dict[int, gdopt.Result] = {}

    def work(number: int) -> None:
        for again in range(4):
            place = (number + again) % 6
            found[6 * number + place] = solve(args=(shifts[place],))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    for key, result in found.items():
        equal(result, expected[key % 6])


@pytest.mark.parametrize("kind", [jax.custom_jvp, pytest.param(jax.custom_vjp, marks=pytest.mark.slow)])
def test_rules_may_close_over_what_the_loss_computes(kind: Any) -> None:
    loss = rule_of_a_computed_value(kind)
    options = {"loss": loss, "params": jnp.zeros(3), "args": (jnp.array([0.25, 0.75]),), "learning_rate": 0.1}
    solve = called(options, gdopt.prepare)
    equal(solve(), called(options))
    equal(solve(args=(jnp.array([1.0, 2.0]),)), called(options, args=(jnp.array([1.0, 2.0]),)))


def test_modules_and_their_settings() -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(0))
    loss = lambda model, rows: jnp.mean((jax.vmap(model)(rows) - jnp.sin(rows[:, 0])) ** 2)
    solve = gdopt.prepare(loss, model, data=ROWS, max_steps=5)
    equal(solve(), gdopt.minimize(loss, model, data=ROWS, max_steps=5))
    other = equinox.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(1))
    equal(solve(other), gdopt.minimize(loss, other, data=ROWS, max_steps=5))
    with pytest.raises(InputError, match="prepared with"):
        solve(equinox.nn.MLP(3, "scalar", 5, 1, key=jax.random.key(1)))


def test_a_loss_that_does_not_use_the_params_is_told_once() -> None:
    with pytest.warns(UserWarning, match="does not depend on the params"):
        solve = gdopt.prepare(lambda x: jnp.float32(1.0), jnp.ones(2), learning_rate=0.1)
    solve()


def test_its_repr_shows_the_loss_and_the_start(solve: Any) -> None:
    assert repr(solve) == f"<gdopt.Prepared of {bowl!r} from [0., 0., 0.]>"
