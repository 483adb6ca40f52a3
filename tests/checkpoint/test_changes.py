"""What differs between a saved run and the call that resumes it is told, with both values."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt
from gdopt.schedules import constant, triangular

ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def loss(w: Any, rows: Any) -> Any:
    return jnp.mean((rows @ w - 1) ** 2)


def run(path: Path | None, max_steps: int | None = 10, loss: Callable = loss, **options: Any) -> gdopt.Result:
    given = {"data": ROWS, "batch_size": 7, "optimizer": optax.adam, "learning_rate": 0.01, **options}
    return gdopt.minimize(loss, jnp.zeros(3), max_steps=max_steps, checkpoint=path, **given)


def told(call: Callable[[], Any]) -> list[str]:
    """Return the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------------------- limits and rates


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({}, {"max_steps": 20}, "max_steps=20 (it was 10). The"),
        (
            {},
            {"max_steps": 4},
            "max_steps=4 (it was 10). The run resumes with the new values. The point of step 4 is gone.",
        ),
        ({}, {"max_steps": None, "epochs": 2}, "max_steps=14 (it was 10). The"),
        ({}, {"target": 0.1}, "target=0.1 (it was None). The"),
        ({}, {"learning_rate": 0.02}, "learning_rate=0.02 (it was 0.01). The"),
        (
            {},
            {"learning_rate": constant(0.01)},
            "learning_rate is a schedule (it was a number), with the same rates at",
        ),
        (
            {"learning_rate": constant(0.01)},
            {"learning_rate": 0.01},
            "learning_rate is a number (it was a schedule), with",
        ),
        (
            {},
            {"learning_rate": lambda step: jnp.where((step >= 50) & (step < 52), 0.5, 0.01)},
            "learning_rate is a schedule (it was a number), with the same rates",
        ),
        (
            {},
            {"learning_rate": triangular(0.01, 0.1, step_size_up=8)},
            "learning_rate=0.0775 at step 10 (it was 0.01). The",
        ),
        (
            {"learning_rate": triangular(0.01, 0.1, step_size_up=8)},
            {"learning_rate": 0.01},
            "0.01 at step 10 (it was 0.0775)",
        ),
        (
            {"learning_rate": optax.cosine_decay_schedule(0.1, 100)},
            {"learning_rate": optax.cosine_decay_schedule(0.1, 200)},
            "learning_rate=0.09938442 at step 10 (it was 0.09755283). The",
        ),
        (
            {"learning_rate": lambda step: jnp.where(step == 12345, 1.0, 0.01)},
            {"learning_rate": lambda step: jnp.where(step == 12345, 2.0, 0.01)},
            "learning_rate is another schedule, with the same rates at the ",
        ),
        ({"learning_rate": "auto", "max_steps": 50}, {"learning_rate": "auto", "max_steps": 90}, "learning_rate="),
        (
            {"learning_rate": "auto", "max_steps": 100, "optimizer": gdopt.gd},
            {"learning_rate": 0.5, "max_steps": 140, "optimizer": gdopt.gd},
            "learning_rate=0.5 at step",
        ),
        (
            {"learning_rate": 0.5, "max_steps": 100, "optimizer": gdopt.gd},
            {"learning_rate": "auto", "max_steps": 140, "optimizer": gdopt.gd},
            "(it was 0.5)",
        ),
        (
            {"data": lambda: iter(np.split(ROWS, 5)), "batch_size": None},
            {"max_steps": 15},
            "max_steps=15 (it was 10). The",
        ),
        (
            {"data": lambda: iter(np.split(ROWS, 5)), "batch_size": None, "max_steps": None, "epochs": 1},
            {"max_steps": None, "epochs": 2},
            "epochs=2 (it was 1). The",
        ),
    ],
)
def test_a_changed_limit_or_rate_is_told(before: dict, after: dict, why: str, path: Path) -> None:
    run(path, **before)
    messages = told(lambda: run(path, **{**before, **after}))
    (message,) = messages
    assert message.startswith("this call differs from the run saved in '")
    assert why in message


def test_the_same_call_says_nothing(path: Path) -> None:
    """This holds for a run that was stopped, too."""
    stop = lambda report: True
    for rate in (0.01, triangular(0.01, 0.1, step_size_up=8), "auto"):
        place = path.with_name(f"{type(rate).__name__}")
        run(place, 60, learning_rate=rate, callback=stop)
        same = functools.partial(run, place, 60, learning_rate=rate)
        assert told(same) == []
        assert told(same) == []


def test_a_deterministic_run_tells_a_changed_tol(path: Path) -> None:
    near = lambda tol: gdopt.minimize(lambda x: jnp.sum((x - 1) ** 4), jnp.zeros(2), tol=tol, checkpoint=path)
    near(1e-3)
    (message,) = told(lambda: near(1e-6))
    assert "tol=1e-06 (it was 0.001)" in message


def test_another_rate_for_a_run_that_ended_is_told(path: Path) -> None:
    """Its answer would look like one of the new rate."""
    near = lambda rate: gdopt.minimize(
        lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2), learning_rate=rate, checkpoint=path
    )
    assert near(0.1).success
    (message,) = told(lambda: near(0.3))
    assert "learning_rate=0.3 (it was 0.1). It had ended, and its result is returned. Pass another path" in message


# ------------------------------------------------------------------------------------------- numbers inside of a trace


def of_inner_jit(number: float) -> Callable:
    table = jnp.full(3, number)
    inner = jax.jit(lambda w: jnp.sum((w - table) ** 2))
    return lambda w, rows: inner(w)


def of_branch(number: float) -> Callable:
    table = np.full(3, number, np.float32)
    return lambda w, rows: jax.lax.cond(w[0] > 9, lambda w: jnp.sum(w), jax.jit(lambda w: jnp.sum((w - table) ** 2)), w)


def of_jvp_rule(number: float) -> Callable:
    table = jnp.full(3, number)
    square = jax.custom_jvp(lambda w: jnp.sum(w**2))
    square.defjvp(lambda primals, tangents: (square(*primals), jnp.sum(table * primals[0] * tangents[0])))
    return lambda w, rows: square(w - 1)


def of_vjp_rule(number: float) -> Callable:
    square = jax.custom_vjp(lambda w: jnp.sum(w**2))
    square.defvjp(lambda w: (square(w), w), lambda w, cotangent: (number * w * cotangent,))
    return lambda w, rows: square(w - 1)


def of_exported(number: float) -> Callable:
    from jax import export

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    called = export.export(jax.jit(lambda w: jnp.sum((w - number) ** 2)))(shape)
    gradient = export.export(jax.jit(lambda w: 2 * (w - number)))(shape)
    function = jax.custom_jvp(called.call)
    function.defjvp(lambda primals, tangents: (function(*primals), jnp.sum(gradient.call(*primals) * tangents[0])))
    return lambda w, rows: function(w)


def on_host(function: Callable) -> Callable:
    """Return a loss that adds a number from the host, without a gradient."""

    def read(w: Any, rows: Any) -> Any:
        number = jax.pure_callback(function, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(w))
        return jnp.sum((w - number) ** 2)

    return read


def of_closure(number: float) -> Callable:
    table = np.full((), number, np.float32)
    return on_host(lambda w: table)


def of_partial(number: float) -> Callable:
    return on_host(functools.partial(lambda number, w: np.float32(number), number))


def of_default(number: float) -> Callable:
    return on_host(lambda w, number=number: np.float32(number))


class Model:
    def __init__(self, number: float):
        self.weights = {"layers": [np.float32(number)]}

    def __call__(self, w: Any) -> Any:
        return self.weights["layers"][0]

    def read(self, w: Any) -> Any:
        return self.weights["layers"][0]


def of_method(number: float) -> Callable:
    return on_host(Model(number).read)


def of_object(number: float) -> Callable:
    return on_host(Model(number))


def of_operation(number: float) -> Callable:
    """The function on the host differs by a name alone."""
    if number == 2.0:
        return on_host(lambda w: np.float32(np.sin(w[0])))
    return on_host(lambda w: np.float32(np.cos(w[0])))


def of_shape(number: float) -> Callable:
    table = np.ones((2, 3) if number == 2.0 else (3, 2), np.float32)
    return on_host(lambda w: np.float32(len(table)))


def of_digits(number: float) -> Callable:
    """Both have the same digits one after the other."""
    numbers = (1, 12) if number == 2.0 else (11, 2)
    return on_host(lambda w: np.float32(numbers[0]))


def of_inner_function(number: float) -> Callable:
    TABLE["number"] = np.float32(number)
    return on_host(lambda w: np.float32(sum(look_up(w) for _ in range(1))))


@dataclasses.dataclass(frozen=True)
class Frozen:
    number: float


def of_dataclass(number: float) -> Callable:
    kept = Frozen(number)
    return on_host(lambda w: np.float32(kept.number))


def of_vectorized(number: float) -> Callable:
    return on_host(np.vectorize(lambda x: np.float32(number), signature="(n)->()", otypes=[np.float32]))


TABLE = {"number": np.float32(0)}


def look_up(w: Any) -> Any:
    return TABLE["number"]


def of_global(number: float) -> Callable:
    TABLE["number"] = np.float32(number)
    return on_host(lambda w: look_up(w))


@pytest.mark.parametrize(
    "kind",
    [
        *(of_inner_jit, of_branch, of_jvp_rule, of_vjp_rule),
        *(of_closure, of_partial, of_default, of_method, of_object, of_global, of_operation, of_shape, of_digits),
        *(of_inner_function, of_dataclass, of_vectorized, of_exported),
    ],
)
def test_a_changed_number_anywhere_in_the_loss_is_told(kind: Callable, path: Path) -> None:
    run(path, loss=kind(2.0))
    assert told(lambda: run(path, loss=kind(2.0))) == []
    (message,) = told(lambda: run(path, loss=kind(3.0)))
    assert message.startswith("the loss is not that of the checkpoint")


class Recorder:
    """A function on the host that remembers its calls in every way."""

    calls = 0

    def __init__(self) -> None:
        self.points: list[np.ndarray] = []
        self.memo: dict[int, float] = {}

    def __call__(self, w: Any) -> Any:
        global CALLS
        CALLS += 1
        self.calls += 1
        self.last = np.array(w)
        self.points.append(np.array(w))
        self.memo[self.calls] = float(w[0])
        return np.float32(1)


CALLS = 0


def test_records_of_calls_are_no_change(path: Path) -> None:
    """The same functions are called again in the same process, or made anew in another one."""
    recorder = Recorder()
    run(path, 5, loss=on_host(recorder))
    assert recorder.points
    for steps in (5, 10, 15):
        messages = told(functools.partial(run, path, steps, loss=on_host(recorder)))
        assert all("max_steps" in message for message in messages)
    global CALLS
    CALLS = 0  # as in a new process
    messages = told(lambda: run(path, 15, loss=on_host(Recorder())))
    assert messages == []


def ignore(function: Any, w: Any) -> None:
    """Read a function, and do nothing."""


@pytest.mark.parametrize("function", [print, math.sqrt, np.sin, [].append, functools.lru_cache(lambda w: 1)])
def test_any_function_may_be_a_callback(function: Any, path: Path) -> None:
    def logged(w: Any, rows: Any) -> Any:
        jax.debug.callback(functools.partial(ignore, function), w)
        return loss(w, rows)

    run(path, loss=logged)
    assert told(lambda: run(path, loss=logged)) == []


def test_a_changed_number_in_an_inner_jit_of_the_optimizer_is_an_error(path: Path) -> None:
    def sgd(number: float) -> Callable:
        table = jnp.full(3, number)
        scaled = jax.jit(lambda update: update * table)
        return lambda rate: optax.stateless(lambda updates, _: scaled(-rate * updates))

    run(path, optimizer=sgd(1.0))
    with pytest.raises(gdopt.InputError, match="of another run: its optimizer is"):
        run(path, optimizer=sgd(2.0))


# ------------------------------------------------------------------------------------------------- batches of a stream


def shuffled(seed: int) -> Callable[[], Iterator]:
    return lambda: iter(np.split(np.random.default_rng(seed).permutation(ROWS), 5))


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_other_batches_of_a_stream_are_told(steps: int, path: Path) -> None:
    given: dict[str, Any] = {"batch_size": None, "callback": lambda report: report.step >= steps}
    one = lambda seed, **more: run(path, 40, **{**given, "data": shuffled(seed), **more})
    one(1)
    assert told(lambda: one(1)) == []
    (message,) = told(lambda: one(2, callback=None))
    assert "data gives other batches than to the run saved in" in message
    assert "Pass a stream that gives the same batches" in message


# ------------------------------------------------------------------------------------------------------- compilations


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": None, "learning_rate": "auto", "data": None, "batch_size": None},
        {"data": lambda: iter(np.split(ROWS, 5)), "batch_size": None},
    ],
    ids=["batches", "searched", "stream"],
)
@pytest.mark.filterwarnings("ignore:this call differs")
def test_a_resume_compiles_the_step_once(options: dict[str, Any], path: Path) -> None:
    own = (lambda w: jnp.sum((w - 1) ** 4)) if options.get("data", ROWS) is None else loss
    run(path, loss=own, **options)
    gdopt.clear_cache()
    jax.clear_caches()
    with count_compilations() as fresh:
        run(None, 20, loss=own, **options)
    gdopt.clear_cache()
    jax.clear_caches()
    with count_compilations() as resumed:
        run(path, 20, loss=own, **options)
    programs = lambda counter: counter.names.count("jit(run)")
    assert programs(resumed) == programs(fresh) > 0
