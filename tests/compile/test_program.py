"""``program``: equal programs share an executable, others never do, and no array of the caller is kept.

A wrong key would mean silently wrong answers, so the oracle is always a run that shares nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import operator
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any, cast

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, count_traces, evaluate, shared_traces, some_of
from hypothesis import given, settings
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.ode import odeint
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import gdopt
from gdopt import _jax, schedules
from gdopt._compile import program, replays
from gdopt._loop import loop

X = jnp.array([0.5, -1.0, 2.0])
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
FLAG = "jax_use_simplified_jaxpr_constants"  # arrays become literals; off by default, and may not stay for ever
ARRAYS_ARE_LITERALS = bool(getattr(jax.config, FLAG, False))


def minimize(loss: Callable, params: Any = X, *, max_steps: int = 3, **options: Any) -> tuple:
    """The numbers of a run."""
    if "optimizer" not in options:
        options.setdefault("learning_rate", 0.1)
    result = gdopt.minimize(loss, params, max_steps=max_steps, **options)
    return eqx.filter(result.params, eqx.is_array), result.loss, result.history, result.aux


def bits(tree: Any) -> list:
    """Return what is equal only for trees that are equal to the last bit: 0.0 is not -0.0, and nan is nan."""
    return [(np.asarray(leaf).dtype, np.shape(leaf), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def raw(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


# -------------------------------------------------------------------- losses made from one value each, which look alike


def square(c: Any) -> Callable:
    return lambda x: jnp.sum((x - c) ** 2)


def sign(c: Any) -> Callable:
    return lambda x: jnp.sum(x) * jnp.copysign(1 + 0 * x[0], c)


def jit_inside(c: Any) -> Callable:
    return lambda x: jax.jit(square(c))(x)


def looped(make: Callable) -> Callable:
    """Add a loop that does not see x. Otherwise derivatives would take it apart and leave little inside."""
    return lambda c: lambda x: jnp.sum(x) * lax.while_loop(lambda s: s < 50, lambda s: s + 1 + make(c)(s), 0.0)


def draw(key: Any) -> Callable:
    return lambda x: square(jax.random.normal(key))(x)


def rule_jvp(factor: Any) -> Callable:
    squares = jax.custom_jvp(lambda x: jnp.sum(x**2))
    squares.defjvp(lambda primals, tangents: (squares(*primals), jnp.sum(factor * tangents[0])))
    return lambda x: squares(x)


def rule_vjp(factor: Any) -> Callable:
    squares = jax.custom_vjp(lambda x: jnp.sum(x**2))
    squares.defvjp(lambda x: (squares(x), x), lambda x, g: (jnp.mean(factor) * g * x,))
    return lambda x: squares(x)


def rule_beside(c: Any) -> Callable:
    """Another primal under the same rule, not differentiated, so that the call stays in the program."""
    squares = jax.custom_jvp(square(c))
    squares.defjvp(lambda primals, tangents: (squares(*primals), jnp.sum(tangents[0])))
    return lambda x: jnp.sum(x * lax.stop_gradient(squares(x)))


def rule_solve(c: float) -> Callable:
    return lambda x: jnp.sum(lax.custom_linear_solve(lambda v: 2 * v, x, lambda _, b: b / 2, lambda _, b: b / c) ** 2)


def rule_root(c: float) -> Callable:
    root = lambda y: lax.custom_root(lambda r: r**2 - y, y, lambda _f, _r: jnp.sqrt(y), lambda _g, t: c * t)
    return lambda x: root(1 + x[0] ** 2) + jnp.sum(x**2)


def call_back(function: Callable) -> Callable:
    return lambda x: square(jax.pure_callback(function, SCALAR))(x)


class Counted:
    def __init__(self, number: float):
        self.number = number

    def read(self) -> np.float32:  # a new object at each look
        return np.float32(self.number)


@dataclasses.dataclass(unsafe_hash=True)
class Sign:
    """Equal by value, although 0.0 == -0.0 and ``by`` differs, and may change later."""

    of: float
    by: float = dataclasses.field(default=1.0, compare=False)

    def __call__(self) -> np.float32:
        return np.float32(np.copysign(self.by, self.of))


class Line(eqx.Module):
    weight: jax.Array
    shift: Any = eqx.field(static=True)


class Numbered(eqx.Module):
    weight: jax.Array
    number: Any


TABLE = jnp.arange(6.0).reshape(2, 3)
WEAK = jnp.asarray(1.1)
NARROW = X.astype(jnp.bfloat16)
ONES, TWOS, RAMP, BACK = jnp.ones(3), jnp.full(3, 2.0), jnp.array([1.0, 2, 3]), jnp.array([3.0, 2, 0])
RAW_RAMP, RAW_BACK = raw(1, 2, 3), raw(3, 2, 0)
NEXT = float(np.nextafter(np.float32(0.1), np.float32(1)))
KEY = jax.random.key

# name: (make, one value, another value, and where to evaluate if not at X). The answers differ.
TRAPS: dict[str, tuple] = {
    # values that are written into the program
    "float": (square, 0.1, 0.2),
    "last digit": (lambda c: lambda x: jnp.sum(c * x), 0.1, NEXT),
    "sign of zero": (sign, 0.0, -0.0),
    "sign of NumPy's zero": (sign, np.float32(0.0), np.float32(-0.0)),
    "nan": (lambda c: lambda x: jnp.sum(x) + 0 * c, 0.0, float("nan")),
    "sign of nan": (sign, float("nan"), -float("nan")),
    "infinity": (lambda c: lambda x: jnp.sum(jnp.minimum(x, c)), 1.0, float("inf")),
    "True and 1": (lambda c: lambda x: jnp.sum(x**2) * jnp.bitwise_not(c), True, 1),
    "1 and 1.0": (lambda c: lambda x: jnp.sum(x**2) * lax.div(3 * jnp.asarray(c), 2 * jnp.asarray(c)), 1, 1.0),
    "True and 1 as an index": (lambda c: lambda x: jnp.sum(x[c] ** 2), 1, True),
    "integer power": (lambda c: lambda x: jnp.sum(x**c), 2, 4),
    "NumPy's scalar": (square, np.float32(1), np.float32(2)),
    "complex": (lambda c: lambda x: jnp.sum(jnp.abs(x + c)), 1j, 2j),
    # arrays
    "array": (square, RAMP, BACK),
    "NumPy array": (square, RAW_RAMP, RAW_BACK),
    "array of another dtype": (square, RAMP / 3, (RAMP / 3).astype(jnp.float16)),
    "array of integers": (lambda c: square(lax.div(c, jnp.full_like(c, 2))), RAMP, jnp.array([1, 2, 3])),
    "array of weak type": (
        lambda c: lambda x: jnp.sum((x * c).astype(jnp.float32)),
        WEAK,
        lax.convert_element_type(WEAK, jnp.float32),
        NARROW,
    ),
    "array of another shape": (square, ONES, jnp.float32(2)),
    "one array or two": (lambda c: lambda x: jnp.sum((x - c[0]) ** 2 * c[1]), (RAMP, RAMP), (BACK, RAMP)),
    "array in an inner jit": (jit_inside, RAMP, BACK),
    "NumPy array in an inner jit": (jit_inside, RAW_RAMP, RAW_BACK),
    "array in a jit in a loop": (looped(jit_inside), RAMP, BACK),
    "NumPy array in a jit in a loop": (looped(jit_inside), RAW_RAMP, RAW_BACK),
    "jitted loss": (lambda c: jax.jit(square(c)), RAMP, BACK),
    # Python's objects
    "rule of custom_jvp": (rule_jvp, 1.0, 2.0),
    "rule of custom_vjp": (rule_vjp, 1.0, 2.0),
    "array in a rule": (rule_vjp, ONES, TWOS),
    "rule in a scan": (lambda c: lambda x: lax.scan(lambda s, y: (s + rule_jvp(c)(s + y), None), x[0], x)[0], 1.0, 2.0),
    "primal beside a rule": (rule_beside, 1.0, 2.0),
    "primal beside a rule in a loop": (looped(rule_beside), 1.0, 2.0),
    "rule of custom_root": (rule_root, 1.0, 2.0),
    "rule of custom_linear_solve": (rule_solve, 2.0, 3.0),
    "closure in a callback": (lambda c: call_back(lambda: np.float32(c)), 1.0, 2.0),
    "partial in a callback": (lambda c: call_back(functools.partial(np.float32, c)), 1.0, 2.0),
    "method in a callback": (lambda c: call_back(Counted(c).read), 1.0, 2.0),
    "callbacks of equal value": (lambda c: call_back(Sign(c)), 0.0, -0.0),
    "callbacks that compare equal": (lambda c: call_back(Sign(1.0, by=c)), 1.0, 2.0),
    "io_callback": (
        lambda c: lambda x: square(jax.experimental.io_callback(lambda: np.float32(c), SCALAR))(x),
        1.0,
        2.0,
    ),
    "function": (lambda f: lambda x: jnp.sum(f(x) ** 2), jnp.sin, jnp.cos),
    "static field": (lambda c: lambda x: (lambda line: square(line.shift)(line.weight))(Line(x, c)), 1.0, 2.0),
    # control flow
    "length of a scan": (lambda n: lambda x: lax.scan(lambda s, _: (s + s**2, None), jnp.sum(x), None, n)[0], 1, 2),
    "direction of a scan": (
        lambda r: lambda x: lax.scan(lambda s, y: (s * y + y, None), 1.0, x, reverse=r)[0],
        True,
        False,
    ),
    "body of a scan": (lambda f: lambda x: lax.scan(lambda s, y: (f(s, y), None), 0.0, x)[0], jnp.maximum, jnp.minimum),
    "condition of a while": (
        lambda n: lambda x: jnp.sum(x**2) * lax.while_loop(lambda i: i < n, lambda i: 2 * i, 1.0),
        4.0,
        5.0,
    ),
    "bound of a fori": (lambda n: lambda x: lax.fori_loop(0, n, lambda i, s: s * jnp.sum(x), 1.0), 2, 3),
    "branches": (lambda f: lambda x: lax.cond(x[0] > 0, *f, jnp.sum(x)), (jnp.sin, jnp.cos), (jnp.cos, jnp.sin)),
    "array in a branch": (lambda c: lambda x: lax.cond(x[0] > 0, square(c), lambda x: 0.0, x), RAMP, BACK),
    "checkpoint": (lambda c: lambda x: jax.checkpoint(square(c))(x), 1.0, 2.0),
    "array in a checkpoint": (lambda c: lambda x: jax.checkpoint(square(c))(x), RAMP, BACK),
    "reduction": (
        lambda f: lambda x: jnp.sum(x * lax.stop_gradient(lax.reduce(x, np.float32(1), f, (0,)))),
        lax.add,
        lax.mul,
    ),
    "results in another order": (
        lambda f: (
            lambda x: jnp.sum(jnp.stack(jax.checkpoint(f)(jnp.sin(x), jnp.cos(x))) @ RAMP * jnp.array([1.0, 2.0]))
        ),
        lambda a, b: (a, b),
        lambda a, b: (b, a),
    ),
    # parameters of primitives
    "operands in another order": (
        lambda f: lambda x: jnp.sum(f(jnp.sin(x), jnp.cos(x))),
        operator.sub,
        lambda a, b: b - a,
    ),
    "slice": (lambda s: lambda x: jnp.sum(x[s] ** 2), slice(0, 2), slice(1, 3)),
    "indices": (lambda i: lambda x: jnp.sum(x[i] ** 2), np.array([0, 1]), np.array([1, 2])),
    "mode of a gather": (
        lambda mode: lambda x: jnp.sum(x.at[jnp.array([0, 5])].get(mode=mode, fill_value=9) ** 2),
        "clip",
        "fill",
    ),
    "axis of a gather": (lambda n: lambda x: jnp.sum(jnp.take(jnp.outer(x, X), jnp.array([0, 2]), axis=n)), 0, 1),
    "scatter": (lambda name: lambda x: jnp.sum(getattr(x.at[1], name)(2.0)), "add", "multiply"),
    "keys of a sort": (lambda n: lambda x: jnp.sum(lax.sort((0 * x, x), num_keys=n)[1] * RAMP), 1, 2),
    "order of a sort": (lambda d: lambda x: jnp.sum(jnp.sort(x, descending=d) * RAMP), False, True),
    "contracted axes": (
        lambda axes: lambda x: jnp.sum(jnp.tensordot(jnp.outer(x, X + 1), TABLE, axes) ** 2),
        ([0], [1]),
        ([1], [1]),
    ),
    "reduced axis": (lambda axis: lambda x: jnp.sum(jnp.max(jnp.outer(x, RAMP - 2), axis=axis)), 0, 1),
    "axis of a vmap": (
        lambda axis: lambda x: jnp.sum(jax.vmap(lambda row: row[0] ** 2, axis)(jnp.outer(x, x + 3))),
        0,
        1,
    ),
    "stop_gradient": (lambda f: lambda x: jnp.sum(f(x) * x), lambda x: x, lax.stop_gradient),
    # random numbers
    "key": (draw, KEY(0), KEY(1)),
    "raw key": (draw, jax.random.PRNGKey(0), jax.random.PRNGKey(1)),
    "kind of key": (draw, KEY(0), KEY(0, impl="rbg")),
    "seed": (lambda seed: lambda x: draw(KEY(seed))(x), 0, 1),
}


# Parameters of primitives are all seen in the same way: some are run, the others with `make test-slow`.
LIKE_OTHERS = {"indices", "axis of a gather", "scatter", "order of a sort", "contracted axes", "reduced axis"}
LIKE_OTHERS |= {"keys of a sort", "axis of a vmap", "direction of a scan", "checkpoint"}


@pytest.mark.parametrize("name", some_of(TRAPS, TRAPS.keys() - LIKE_OTHERS))
def test_different_losses_have_different_answers(name: str) -> None:
    make, first, second, *x = TRAPS[name]
    (x,) = x or (X,)
    gdopt.clear_cache()
    other, shared = evaluate(make(first), x), evaluate(make(second), x)
    assert bits(evaluate(make(first), x)) == bits(other) != bits(shared)
    alone = jax.value_and_grad(make(second))(x)  # op by op: most of these are compiled for another loss before
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), shared, alone)

    # and what a warm call goes by tells them apart, but for the values of their arrays
    seen = [program.trace(make(value), x, rules=True) for value in (first, second)]
    if seen[0].identity is not None and seen[0].identity == seen[1].identity:
        is_key = lambda array: jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        arrays = [[jax.random.key_data(a) if is_key(a) else a for a in trace.constants] for trace in seen]
        assert bits(arrays[0]) != bits(arrays[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(jax.config, FLAG), reason="this JAX has no such flag")
@pytest.mark.skipif(ARRAYS_ARE_LITERALS, reason="this is the other process")
def test_with_arrays_as_literals() -> None:
    arrays = "different_losses and (inner or loop or key and not sort)"
    arrays += " or no_array_is_kept and jitted or changed_in_place and kept"
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", arrays],
        env={**os.environ, FLAG.upper(): "1"},
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout[-3000:]


_goal: Any = 1.0


def test_the_same_function_is_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = lambda x: _goal * jnp.sum(x)
    run = lambda: float(evaluate(loss, X)[0])
    first = run()
    monkeypatch.setitem(globals(), "_goal", 3.0)
    assert run() == pytest.approx(3 * first)


def test_a_rebound_global_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = lambda x: jnp.sum((x - _goal) ** 2)
    for goal in (1.0, 2.0, ONES, TWOS, raw(1, 1, 1), raw(2, 2, 2)):
        monkeypatch.setitem(globals(), "_goal", goal)
        np.testing.assert_array_equal(minimize(loss)[0], minimize(square(float(np.max(goal))))[0])


@pytest.mark.parametrize("make", [square, jit_inside, lambda c: jax.jit(square(c))], ids=["bare", "jit", "jitted"])
def test_an_array_changed_in_place_is_seen(make: Callable) -> None:
    array = raw(1, 1, 1)
    loss = make(array)
    for number in (1, 2):
        array[:] = number
        np.testing.assert_array_equal(minimize(loss)[0], minimize(square(number))[0])


@pytest.mark.parametrize("make", [square, jit_inside, looped(jit_inside)], ids=["bare", "jit", "loop"])
def test_an_array_changed_in_place_does_not_change_the_kept_program(make: Callable) -> None:
    """Under another setting JAX recompiles a kept program, which must not read the changed array."""
    gdopt.clear_cache()
    array = raw(1, 1, 1)
    evaluate(make(array), X)
    array[:] = 30
    with jax.default_matmul_precision("highest"):
        later = evaluate(make(raw(1, 1, 1)), X)
        gdopt.clear_cache()
        assert bits(later) == bits(evaluate(make(raw(1, 1, 1)), X))


def test_prints_belong_to_their_own_loss(capfd: pytest.CaptureFixture) -> None:
    def make(name):
        return lambda x: (jax.debug.print(name), jnp.sum(x**2))[1]

    for name in ("first", "second"):
        minimize(make(name), max_steps=1)
        jax.effects_barrier()
        assert capfd.readouterr().out == f"{name}\n" * 2


SETTINGS = {
    "64 bits": jax.enable_x64,
    "precision": lambda on: jax.default_matmul_precision("float32" if on else "default"),
    "random bits": lambda on: jax.threefry_partitionable(not on),
    "kind of key": lambda on: jax.default_prng_impl("rbg" if on else "threefry2x32"),
}


ASKS = [(evaluate, name) for name in SETTINGS] + [
    pytest.param(lambda loss, x: minimize(loss, x), name, marks=[] if name == "64 bits" else pytest.mark.slow)
    for name in SETTINGS
]


@pytest.mark.parametrize(("ask", "name"), ASKS)
def test_changed_settings_are_seen(ask: Callable, name: str) -> None:
    def at(on):
        with SETTINGS[name](on):
            return bits(ask(lambda x: jnp.sum((x @ x - jax.random.uniform(KEY(0), (3,)) / 3) ** 2), jnp.ones(3)))

    gdopt.clear_cache()
    seen = [at(False), at(True), at(False), at(True)]
    gdopt.clear_cache()
    alone = at(True)
    gdopt.clear_cache()
    assert seen == [at(False), alone] * 2


def test_64_bits_inside_a_32_bit_program() -> None:
    array = np.full(3, 1 + 1e-9)  # ones in float32

    def loss(x):
        with jax.enable_x64(True):
            return jnp.sum((array - x) * 1e9).astype(jnp.float32)

    np.testing.assert_allclose(evaluate(loss, jnp.ones(3))[0], 3, rtol=1e-6)


def test_sharded_inputs_and_constants() -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    loss = lambda x, y: jnp.sum((x - y) ** 2)
    here, there = RAMP, jax.device_put(RAMP, sharding)
    expected = bits(minimize(loss, args=(here,)))
    assert bits(minimize(loss, args=(there,))) == expected
    assert bits(minimize(loss, jax.device_put(X, sharding), args=(there,))) == expected
    assert bits(minimize(square(there))) == bits(minimize(square(here))) == expected
    assert bits(minimize(lambda x: square(here)(lax.with_sharding_constraint(x, sharding)))) == expected
    with jax.set_mesh(mesh):
        assert bits(minimize(loss, args=(there,))) == expected


def aux_of(c: float) -> Callable:
    return lambda x: (square(1)(x), {"c": jnp.asarray(c)})


def jitted_optimizer(factors: jax.Array) -> optax.GradientTransformation:
    return optax.stateless(jax.jit(lambda g, _: factors * g))


def _descend_alone(_: Any, state: Any, params: Any, *, value_fn: Callable, **others: Any) -> tuple:
    """Differentiate the loss in a separate loop, as line searches do. These take ten times as long to compile."""
    there = lax.fori_loop(0, 3, lambda _, x: x - 0.01 * jax.grad(value_fn)(x), params)
    return there - params, state


_momentum = 0.0


def _read_momentum(rate: Any) -> Any:
    return optax.sgd(rate, momentum=_momentum)


def _factory(momentum: float) -> Callable:
    global _momentum
    _momentum = momentum
    return _read_momentum


RUNS = {
    "constant of an optimizer": lambda c: minimize(
        square(1), optimizer=functools.partial(optax.adam, b1=c), learning_rate=1
    ),
    "rate of a ready optimizer": lambda c: minimize(square(1), optimizer=optax.adam(c)),
    "array in an optimizer": lambda c: minimize(
        square(1), optimizer=optax.stateless(lambda g, _: -raw(c, 0.1, 0.1) * g)
    ),
    "array in a jit in an optimizer": lambda c: minimize(square(1), optimizer=jitted_optimizer(jnp.full(3, -c))),
    "number in a schedule": lambda c: minimize(square(1), learning_rate=lambda step: c / (1 + step)),
    "table in a schedule": lambda c: minimize(
        square(1), learning_rate=lambda step: jnp.asarray([c, c, 0.1, 0.1])[step]
    ),
    "rule in a line search": lambda c: minimize(rule_vjp(1 + c), optimizer=optax.lbfgs()),
    "rule in an optimizer's loop": lambda c: minimize(
        rule_vjp(1 + c), optimizer=optax.GradientTransformationExtraArgs(lambda params: (), cast(Any, _descend_alone))
    ),
    "rule in lbfgs": lambda c: minimize(
        rule_beside(c), optimizer=functools.partial(optax.lbfgs, memory_size=3), learning_rate=1.0
    ),
    "rule in a factory that asks again": lambda c: minimize(
        rule_beside(c), optimizer=optax.contrib.sophia, learning_rate=0.1
    ),
    "number in a factory of the caller's": lambda c: minimize(
        square(1), optimizer=lambda rate: optax.sgd(rate, momentum=c), learning_rate=0.1
    ),
    "rebound global in a factory": lambda c: minimize(square(1), optimizer=_factory(c), learning_rate=0.1),
    "True and 1": lambda c: minimize(
        square(1), optimizer=functools.partial(optax.sgd, momentum=True if c < 0.5 else 0.1), learning_rate=0.1
    ),
    "number in a schedule's branch": lambda c: minimize(
        square(1), learning_rate=lambda step: lax.cond(step > 1, lambda: c, lambda: 0.1)
    ),
    "type of a schedule's number": lambda c: minimize(
        lambda x: jnp.sum((x - 1) ** 2).astype(jnp.float32),
        NARROW,
        learning_rate=lambda step: jnp.float32(c) if c < 0.5 else c,
    ),
    "function in params": lambda c: minimize(lambda p: square(1)(p[0](p[1])), (jnp.sin if c < 0.5 else jnp.cos, X)),
    "text in args": lambda c: minimize(lambda x, s: square(len(s))(x), args=("ab" if c < 0.5 else "abc",)),
    "number in a module": lambda c: minimize(lambda line: square(line.number)(line.weight), Numbered(X, c)),
    "static field": lambda c: minimize(lambda line: square(line.shift)(line.weight), Line(X, c)),
    "number that is not trained": lambda c: minimize(lambda p: square(p[1])(p[0]), (X, c), trainable=(True, False)),
    "aux": lambda c: minimize(aux_of(c), has_aux=True),
}


# Each compiles for a second or more, line searches for five. These are seen in the way of another one that is run.
SEEN_ALIKE = {
    "rule in a line search": "rule in an optimizer's loop",
    "rule in lbfgs": "rule in a factory that asks again",
    "array in an optimizer": "array in a jit in an optimizer",
    "number in a schedule": "number in a schedule's branch",
    "number in a factory of the caller's": "rebound global in a factory",
    "static field": "number in a module",
}


@pytest.mark.parametrize("name", some_of(RUNS, RUNS.keys() - SEEN_ALIKE.keys()))
def test_different_runs_have_different_answers(name: str) -> None:
    run = RUNS[name]
    gdopt.clear_cache()
    other, shared = run(0.25), run(0.75)
    gdopt.clear_cache()
    assert bits(shared) == bits(run(0.75)) != bits(other)


def test_equal_programs_of_other_trees_keep_their_trees() -> None:
    loss = lambda params: sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))
    trees = ({"a": X, "b": X + 1}, (X, X + 1), [X, (X + 1,)], {"z": {"a": X}, "zz": X + 1})
    results = [minimize(loss, tree)[0] for tree in trees]
    assert [jax.tree.structure(result) for result in results] == [jax.tree.structure(tree) for tree in trees]
    assert len({str(bits(result)) for result in results}) == 1


@pytest.mark.parametrize("fresh", [np.random.normal, lambda: raw(*np.random.normal(size=3))], ids=["number", "array"])
@pytest.mark.filterwarnings("ignore:the loss draws from numpy.random")
def test_random_numbers_of_numpy_are_drawn_at_each_call(fresh: Callable) -> None:
    runs = [minimize(lambda x: jnp.sum((x - fresh()) ** 2))[0] for _ in range(2)]
    loss = lambda x: jnp.sum((x - fresh()) ** 2)
    runs += [minimize(loss)[0] for _ in range(2)]
    assert len({str(bits(run)) for run in runs}) == 4


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [
        (lambda model: jnp.sum(model.weight[model.number] ** 2), (1, True)),
        (lambda model: jnp.sum(model.weight) * jnp.copysign(1.0, model.number), (0.0, -0.0)),
    ],
    ids=["True and 1", "sign of zero"],
)
def test_the_vanilla_step_tells_static_numbers_apart(loss: Callable, numbers: tuple) -> None:
    for number in numbers:
        assert float(gdopt.gd_step(loss, Numbered(X, number), 0.1)[1]) == float(loss(Numbered(X, number)))


# -------------------------------------------------------------------------------------- random expressions, bit for bit

VALUES = st.lists(st.sampled_from([0.0, -0.0, 1.0, 1, True, 0.5, 0.1, NEXT, float("inf"), 2]), min_size=3, max_size=3)
PLACES = st.integers(0, 2)
CONSTANTS = ["python", "scalar", "numpy", "jax", "weak"]
ONE = ["sin", "tanh", "square", "stop", "jit", "checkpoint", "scan", "loop", "vmap"]
TWO = ["add", "multiply", "maximum", "copysign", "cond", "held"]
EXPRESSIONS = st.recursive(
    st.just(("x",)) | st.tuples(st.sampled_from(CONSTANTS), PLACES),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(ONE), inner),
        st.tuples(st.sampled_from(TWO), inner, inner),
        st.tuples(st.sampled_from(["power", "rule"]), inner, PLACES),
    ),
    max_leaves=6,
)


def build(expression: tuple, values: list, held: list[np.ndarray]) -> Callable:
    """Return a function of x made of new objects; ``held`` are the values as arrays that are changed in place."""
    kind, *parts = expression
    if kind == "x":
        return lambda x: x
    if kind in CONSTANTS:
        value = values[parts[0]]
        constant = {
            "python": value,
            "scalar": np.float32(value),
            "numpy": held[parts[0]],
            "jax": jnp.full(3, value, jnp.float32),
            "weak": jnp.asarray(value),
        }[kind]
        return lambda x: jnp.zeros_like(x) + constant
    f = build(parts[0], values, held)
    if kind == "power":
        return lambda x: jnp.clip(f(x), -3, 3) ** {0: 3, 1: 2}.get(values[parts[1]], 1)
    if kind == "rule":
        rule = jax.custom_jvp(jnp.tanh)
        rule.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), tangents[0] * jnp.float32(values[parts[1]])))
        return lambda x: rule(f(x))
    g = build(parts[1], values, held) if kind in TWO else None
    return {
        "square": lambda x: f(x) ** 2,
        "stop": lambda x: lax.stop_gradient(f(x)),
        "jit": lambda x: jax.jit(lambda x: f(x))(x),
        "checkpoint": lambda x: jax.checkpoint(lambda x: f(x))(x),
        "scan": lambda x: lax.scan(lambda s, _: (s + f(x + s), None), jnp.zeros(3), None, length=2)[0],
        "loop": lambda x: x * lax.fori_loop(0, 2, lambda _, s: s + f(s), jnp.zeros(3)),
        "vmap": lambda x: jax.vmap(lambda y: jnp.sum(f(jnp.stack([y, y, x[0]]))))(x),
        "cond": lambda x: lax.cond(x[1] < 0, lambda x: f(x), lambda x: g(x), x),
        "held": lambda x: jax.jit(lambda x: f(x) * held[0])(g(x)),
    }.get(kind) or (lambda x: getattr(jnp, kind)(*([f(x)] if g is None else [f(x), g(x)])))


# Of three examples one is of minimize, which takes three times as long, but does with the loss what evaluate does.
@given(st.sampled_from([evaluate, evaluate, minimize]), EXPRESSIONS, VALUES, VALUES)
@settings(max_examples=max(1, settings().max_examples // 4))
def test_random_expressions_answer_as_if_unshared(ask: Callable, expression: tuple, first: list, second: list) -> None:
    held = [np.zeros(3, np.float32) for _ in range(3)]

    def run(values):
        for array, value in zip(held, values, strict=True):
            array[:] = value
        function = build(expression, values, held)
        return bits(ask(lambda x: jnp.sum(function(x)) + 0.5 * jnp.sum(x**2), X))

    gdopt.clear_cache()
    run(first)
    shared = run(second)
    gdopt.clear_cache()
    assert shared == run(second)


@pytest.mark.parametrize(
    "function",
    [jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.softplus, jax.nn.log_softmax, jax.nn.logsumexp, jnp.linalg.norm],
    ids=lambda function: function.__name__,
)
def test_a_gradient_by_rules_of_the_library_is_traced_once(function: Callable) -> None:
    def call() -> list[str]:
        with count_traces() as names:
            gdopt.minimize(lambda x: jnp.sum(function(x)) + jnp.sum(x**2), X, learning_rate=0.01, max_steps=3)
        return names

    gdopt.clear_cache()
    assert len(call()) > 1
    assert call() == ["<lambda>"]  # the loss itself, once


def test_another_rule_of_a_function_of_the_library_is_seen() -> None:
    """Somebody may replace it, by a function that is not JAX's, or by one that is."""
    relu, factors = cast(Any, jax.nn.relu), [3.0]
    loss, before = lambda x: jnp.sum(relu(x)) + jnp.sum(x**2), relu.jvp
    rules = [lambda g, ans, x: 2 * g, lambda g, ans, x: factors[0] * g, lambda g, ans, x: -g]
    rules[2].__module__ = relu.__module__
    try:
        found = [str(bits(evaluate(loss, X)))]
        for rule in rules:
            relu.defjvps(rule)
            found.append(str(bits(evaluate(loss, X))))
        relu.defjvps(rules[1])
        factors[0] = 7.0
        found.append(str(bits(evaluate(loss, X))))
    finally:
        relu.jvp = before
    assert len(set(found)) == len(found)
    assert str(bits(evaluate(loss, X))) == found[0]


def test_arguments_that_only_a_rule_of_the_library_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(factor: float, primals: tuple, tangents: tuple) -> tuple:
        return 2 * primals[0], factor * tangents[0]

    rule = FunctionType(written.__code__, jax.nn.__dict__, "rule")  # as if it were written there
    monkeypatch.setattr(jax.nn, "rule", rule, raising=False)
    function = jax.custom_jvp(lambda factor, x: 2 * x, nondiff_argnums=(0,))
    function.defjvp(rule)
    found = [str(bits(evaluate(lambda x, f=f: jnp.sum(function(f, x)) + jnp.sum(x**2), X))) for f in (1.0, 2.0)]
    assert found[0] != found[1]


FACTORS = [1.0]


def test_a_rule_that_is_called_like_one_of_the_library_is_seen() -> None:
    """`functools.wraps` copies the name of the module, too."""

    @functools.wraps(jnp.cos)
    def rule(g: jax.Array, ans: jax.Array, x: jax.Array) -> jax.Array:
        return FACTORS[0] * g

    function = jax.custom_jvp(lambda x: 2 * x)
    function.defjvps(rule)
    found = []
    for factor in (1.0, -2.0):
        FACTORS[0] = factor
        found.append(str(bits(evaluate(lambda x: jnp.sum(function(x)) + jnp.sum(x**2), X))))
    assert found[0] != found[1]


def test_operations_of_other_code_may_change_their_rules() -> None:
    factors = [2.0]
    square = Primitive("square")
    square.def_impl(lambda x: x**2)
    square.def_abstract_eval(lambda x: x)
    mlir.register_lowering(square, mlir.lower_fun(lambda x: x**2, multiple_results=False))
    ad.primitive_jvps[square] = lambda xs, ways: (square.bind(xs[0]), factors[0] * ways[0] * xs[0])
    found = []
    for factor in (2.0, 5.0):
        factors[0] = factor
        found.append(str(bits(evaluate(lambda x: jnp.sum(square.bind(x)), X))))
    assert found[0] != found[1]


def test_partial_functions_of_the_library_are_seen_with_their_arguments() -> None:
    """Compiled code holds these arguments, and the class of JAX that inherits from it looks empty."""

    def fit(bound: float) -> jax.Array:
        clip = custom_vmap(lambda x: jnp.clip(x, -1, 1))
        clip.def_vmap(jax.tree_util.Partial(lambda most, size, batched, x: (jnp.clip(x, -most, most), True), bound))
        return jax.vmap(lambda x: minimize_to(10.0, x, clip))(jnp.zeros((2, 3)))

    def minimize_to(target: float, x: jax.Array, project: Callable) -> jax.Array:
        options: Any = {"optimizer": gdopt.gd(0.05), "max_steps": 30, "project": project}
        return gdopt.minimize(lambda x: jnp.sum((x - target) ** 2), x, **options).params

    np.testing.assert_allclose(fit(1.0), 1.0)
    np.testing.assert_allclose(fit(3.0), 3.0)


# ----------------------------------------------------------------------------------------------- equal losses share one


def _one() -> np.float32:
    return np.float32(1)


# name: (make, one value, another value). The programs are equal.
TWINS: dict[str, tuple] = {
    "nothing": (lambda _: square(1), 1, 1),
    "array": (square, RAMP, BACK),
    "NumPy array": (square, RAW_RAMP, RAW_BACK),
    "NumPy array of 64 bits": (square, np.arange(3.0), np.ones(3)),
    "scalar array": (square, jnp.float32(1), jnp.float32(2)),
    "key": (draw, KEY(0), KEY(1)),
    "array in an inner jit": (jit_inside, RAMP, BACK),
    "jitted loss": (lambda c: jax.jit(square(c)), RAMP, BACK),
    "jitted loss over NumPy": (lambda c: jax.jit(square(c)), RAW_RAMP, RAW_BACK),
    "scope": (lambda c: jax.named_scope(c)(square(1)), "one", "two"),
    "rule of custom_jvp": (rule_jvp, 1.5, 1.5),
    "rule of custom_vjp": (rule_vjp, RAMP, RAMP + 1),
    "rules that nothing uses": (looped(rule_jvp), 1.0, 2.0),
    "rules of the library": (lambda c: lambda x: jnp.sum(jax.nn.silu(jax.nn.relu(x) - c)), RAMP, BACK),
    "checkpoint": (lambda c: lambda x: jax.checkpoint(square(c))(x), RAMP, BACK),
    "control flow": (
        lambda c: (
            lambda x: lax.scan(lambda s, y: (lax.cond(y > s, operator.add, operator.sub, s, y), None), 0.0, x + c)[0]
        ),
        RAMP,
        BACK,
    ),
    "jit in a loop": (looped(lambda c: lambda x: jax.jit(lambda x, c: square(c)(x))(x, c)), RAMP, BACK),
    "small array in a jit in a loop": (looped(jit_inside), RAMP, RAMP + 0),
    "callback without a state": (lambda _: call_back(_one), 1, 1),
}


@pytest.mark.skipif(ARRAYS_ARE_LITERALS, reason="new literals compile anew")
@pytest.mark.parametrize(("make", "first", "second"), TWINS.values(), ids=TWINS)
def test_equal_losses_of_fresh_objects_compile_nothing(make: Callable, first: Any, second: Any) -> None:
    gdopt.clear_cache()
    evaluate(make(first), X)
    with count_compilations() as counter:
        shared = evaluate(make(second), X)
    assert counter.names == []
    gdopt.clear_cache()
    assert bits(shared) == bits(evaluate(make(second), X))


@pytest.mark.skipif(ARRAYS_ARE_LITERALS, reason="new literals compile anew")
@pytest.mark.parametrize("how", ["data", "batches", "closed over", "jitted"])
def test_new_numbers_and_new_data_compile_nothing(how: str) -> None:
    def count(seed=0, rows=20, **options):
        noise = np.random.default_rng(seed)
        data = noise.normal(size=(rows, 3)).astype(np.float32), noise.normal(size=rows).astype(np.float32)
        loss = lambda w, data, decay: jnp.mean((data[0] @ w - data[1]) ** 2) + decay * jnp.sum(w**2)
        if how in ("closed over", "jitted"):
            value = lambda w, decay: loss(w, data, decay)
            call = functools.partial(gdopt.minimize, jax.jit(value) if how == "jitted" else value)
        else:
            call = functools.partial(gdopt.minimize, loss, data=data, batch_size=5 if how == "batches" else None)
        with count_compilations() as counter:
            call(np.zeros(3, np.float32), **{"learning_rate": 0.01, "max_steps": 4, "args": (0.1,), **options})
        return counter.count

    gdopt.clear_cache()
    assert count() > 0
    assert count(seed=1) == 0
    assert count(learning_rate=0.02, max_steps=5, target=-1.0, key=KEY(5), args=(0.2,)) == 0
    if how in ("data", "closed over"):
        assert count(rows=25) > 0
        assert count(rows=25, seed=1) == 0
    if how == "data":
        assert count(tol=1e-3) == 0
        assert count(args=(np.float32(0.1),)) > 0  # strong, where Python's float is weak
        assert count(optimizer=optax.adam) > 0
        assert count(optimizer=optax.adam, learning_rate=0.1) == 0
        assert count(learning_rate=optax.cosine_decay_schedule(0.1, 10)) > 0
        assert count(learning_rate=optax.cosine_decay_schedule(0.1, 10)) == 0


# name: makes the options of a call from a number. Other numbers, and objects made anew, are the same program.
class Listener:
    """Reads on the host."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def note(self, value: Any) -> None:
        self.seen.append(float(value))

    def answer(self, value: Any) -> np.float32:
        self.note(value)
        return np.float32(1)


LISTENER = Listener()
LARGE = jnp.arange(600.0)
_of_large = jax.jit(lambda x: jnp.sum(x) * jnp.mean(LARGE) / 300)
STEADY: dict[str, Callable] = {
    "ode": lambda x: jnp.sum((odeint(lambda y, t, k: -k * y, x, jnp.linspace(0, 1, 3), 2.0)[-1] - 0.5) ** 2),
    "debug.callback": lambda x: (jax.debug.callback(LISTENER.note, x[0]), jnp.sum(x**2))[1],
    "ordered debug.callback": lambda x: (jax.debug.callback(LISTENER.note, x[0], ordered=True), jnp.sum(x**2))[1],
    "debug.callback of a fresh lambda": lambda x: (jax.debug.callback(lambda v: LISTENER.note(v), x[0]), x @ x)[1],
    "debug.print": lambda x: (jax.debug.print("{}", x[0]), jnp.sum(x**2))[1],
    "pure_callback of a method": lambda x: jnp.sum(
        (x - jax.pure_callback(LISTENER.answer, SCALAR, lax.stop_gradient(x[0]))) ** 2
    ),
    "io_callback": lambda x: jnp.sum(
        (x - jax.experimental.io_callback(LISTENER.answer, SCALAR, lax.stop_gradient(x[0]))) ** 2
    ),
    "callback in a branch": lambda x: jnp.sum(
        x**2 * lax.cond(x[0] > 0, lambda: jax.pure_callback(LISTENER.answer, SCALAR, 1.0), lambda: jnp.float32(2))
    ),
    "large array in a checkpoint": lambda x: jax.checkpoint(lambda x: _of_large(jnp.sin(x)) ** 2)(x),
    "large array in a scan": lambda x: lax.scan(lambda s, y: (s + _of_large(x) * y, None), 0.0, x)[0] ** 2,
    "local custom_vjp": lambda x: rule_vjp(1.0)(x),
    "interpolation": lambda x: jnp.sum(jnp.interp(x, RAMP, BACK) ** 2),
}


@pytest.mark.skipif(ARRAYS_ARE_LITERALS, reason="new literals compile anew")
@pytest.mark.parametrize("name", some_of(STEADY, STEADY.keys() - {"ode", "io_callback", "interpolation"}))
def test_a_loss_that_stays_compiles_once(name: str, capfd: pytest.CaptureFixture) -> None:
    gdopt.clear_cache()
    ends, calls = [], []
    for first in (True, False):
        LISTENER.seen.clear()
        with count_compilations() as counter:
            ends.append(bits(minimize(STEADY[name], max_steps=4)))
        assert bool(counter.names) is first
        calls.append(list(LISTENER.seen))
    assert ends[0] == ends[1]
    assert calls[0] == calls[1]
    assert ("callback" in name) == bool(calls[0])
    assert ("print" in name) == bool(capfd.readouterr().out)


def test_each_run_calls_its_own_functions() -> None:
    """Side by side, one within the other, and inside jit, where the program outlives the call."""

    def run(number: float, within: Callable = lambda: None) -> tuple[float, list]:
        seen: list[float] = []

        def answer(x: Any) -> np.float32:
            seen.append(number)
            within()
            return np.float32(number)

        loss = lambda x: jnp.sum((x - jax.pure_callback(answer, SCALAR, lax.stop_gradient(x[0]))) ** 2)
        return float(minimize(loss, max_steps=200)[0][0]), seen

    gdopt.clear_cache()
    inner: list = []
    end, seen = run(1.0, lambda: inner or inner.append(run(2.0)))
    assert (end, set(seen)) == (pytest.approx(1, abs=1e-3), {1.0})
    assert (inner[0][0], set(inner[0][1])) == (pytest.approx(2, abs=1e-3), {2.0})
    with ThreadPoolExecutor(4) as pool:
        numbers = [1.0, 2.0, 3.0, 4.0] * 2
        found = list(pool.map(run, numbers))
    assert [end for end, _ in found] == pytest.approx(numbers, abs=1e-3)
    assert [set(seen) for _, seen in found] == [{number} for number in numbers]

    listener = Listener()
    jitted = jax.jit(
        lambda x: (
            gdopt.minimize(
                lambda x: jnp.sum((x - jax.pure_callback(listener.answer, SCALAR, lax.stop_gradient(x[0]))) ** 2), x
            ).params
        )
    )
    for _ in range(2):
        gc.collect()
        np.testing.assert_allclose(jitted(X), jnp.ones(3), atol=1e-3)


SCHEDULES = {
    "constant": schedules.constant,
    "triangular": lambda c: schedules.triangular(c / 4, c, step_size_up=2 + int(20 * c)),
    "triangular2": lambda c: schedules.triangular2(c / 4, c, step_size_up=2 + int(20 * c), step_size_down=3),
    "exp_range": lambda c: schedules.exp_range(c / 4, c, 4, gamma=1 - c),
    "one_cycle": lambda c: schedules.one_cycle(c, total_steps=20 + int(10 * c)),
    "range_test": lambda c: schedules.range_test(c / 10, c, 20),
    "silver": lambda c: schedules.silver(1 / c),
    "optax's cosine": lambda c: optax.cosine_decay_schedule(c, 10 + int(10 * c)),
    "optax's warm-up": lambda c: optax.warmup_cosine_decay_schedule(c / 10, c, 5 + int(10 * c), 20),
    "optax's pieces": lambda c: optax.piecewise_constant_schedule(c, {3: c, 4 + int(10 * c): 0.5}),
    "optax's join": lambda c: optax.join_schedules([optax.constant_schedule(c), optax.linear_schedule(c, 0, 9)], [4]),
    "the caller's": lambda c: lambda step: c / (1 + step * c),
}


@pytest.mark.parametrize("name", some_of(SCHEDULES, SCHEDULES.keys() - {"triangular", "optax's cosine"}))
def test_another_schedule_of_a_kind_compiles_nothing(name: str) -> None:
    make = SCHEDULES[name]

    def rates(c):
        return gdopt.minimize(square(1), X, learning_rate=make(c), max_steps=12, tol=0).history.learning_rate[:-1]

    gdopt.clear_cache()
    rates(0.11)
    schedule = make(0.23)
    expected = [float(schedule(step)) for step in range(12)]
    with count_compilations() as counter:
        got = rates(0.23)
    assert counter.names == []
    np.testing.assert_allclose(got, expected[: len(got)], rtol=3e-7)


@pytest.mark.parametrize("make", [rule_jvp, rule_vjp, rule_beside], ids=["jvp", "vjp", "beside"])
def test_a_trace_with_rules_that_is_differentiated_has_no_identity(make: Callable) -> None:
    def identity(loss):
        return program.trace(loss, X, rules=True).identity

    for loss in (make(1.0), looped(make)(1.0)):
        assert identity(loss) is None
    kept = jax.jit(make(1.0))  # whose rule is one function, and may read what changes
    assert identity(kept) is identity(looped(lambda _: kept)(1)) is None
    assert identity(square(1)) == identity(square(1)) is not None


WARM = {
    "spectral": lambda c: {"learning_rate": "auto", "tol": c},
    "gd": lambda c: {"learning_rate": c},
    "adam": lambda c: {"optimizer": optax.adam, "learning_rate": c},
    "partial": lambda c: {"optimizer": functools.partial(optax.sgd, momentum=0.9, nesterov=True), "learning_rate": c},
    "schedule": lambda c: {"learning_rate": schedules.triangular2(c / 4, c, 5)},
    "a rule": lambda c: {"learning_rate": c, "args": (jax.nn.relu,)},
    "a rule in a jit": lambda c: {"learning_rate": c, "args": (jax.nn.softplus,)},
    "args, batches, keys": lambda c: {
        "learning_rate": c,
        "data": (np.full((8, 3), c, np.float32),),
        "batch_size": 4,
        "with_key": True,
        "key": KEY(int(100 * c)),
        "max_steps": 3 + int(10 * c),
    },
}


@pytest.mark.parametrize("make", WARM.values(), ids=WARM)
def test_a_warm_call_traces_only_its_loss(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], loop._make
    monkeypatch.setattr(loop, "_make", lambda *args: made.append(1) or original(*args))

    def run(c):
        evaluations, center = [], jnp.float32(c) * RAMP  # closed over

        def loss(params, batch=None, key=None):
            evaluations.append(1)
            given = jnp.mean(batch[0]) + jax.random.normal(key) if key is not None else 0
            bent = batch(params["x"]) if callable(batch) else params["x"]
            return jnp.sum((bent - center - given) ** 2)

        options = {"max_steps": 5, "tol": None, **make(c)}
        result = gdopt.minimize(loss, {"x": X}, **options)
        assert len(evaluations) == 1
        return bits((result.params, result.history))

    gdopt.clear_cache()
    run(0.1)
    with count_compilations() as counter:
        warm = run(0.2)
    assert (len(made), counter.names) == (1, [])
    if make in (WARM["spectral"], WARM["a rule in a jit"], WARM["args, batches, keys"]):  # one takes a second
        gdopt.clear_cache()
        assert warm == run(0.2)


def test_other_settings_have_other_places() -> None:
    place = lambda: program.place_for("loss", X)
    here = place()
    with jax.enable_x64(True):
        assert place() is not here
    with jax.default_matmul_precision("highest"):
        assert place() is not here
    assert place() is here


@pytest.mark.parametrize("options", [{"learning_rate": 0.1}, {"learning_rate": "auto"}], ids=["gd", "spectral"])
def test_the_loss_is_compiled_once(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = shared_traces(monkeypatch)
    gdopt.clear_cache()
    minimize(lambda x: jnp.sum(lax.erf_inv(x / 9)) ** 2, **options)
    assert sum(str(closed).count("erf_inv") for closed in programs) == 1


def test_equal_trees_are_not_always_the_same() -> None:
    """As keys of a dict 1 == True, but the containers of an answer are those of the question."""

    def keys(params):
        result = minimize(lambda p: sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(p)), params)[0]
        return [type(key) for key in result]

    gdopt.clear_cache()
    assert [keys({1: X}), keys({True: X}), keys({1: X})] == [[int], [bool], [int]]


def test_a_cleared_cache_recompiles() -> None:
    minimize(square(1))
    for clear, compiles in ((lambda: None, False), (gdopt.clear_cache, True)):
        clear()
        with count_compilations() as counter:
            minimize(square(1))
        assert bool(counter.count) is compiles


# ------------------------------------------------------------------------------ what is the caller's stays the caller's

FREE = optax.contrib.schedule_free_sgd(0.1)  # the last chunk starts from its average


@pytest.mark.parametrize(
    "options", [{"learning_rate": 0.01}, {"optimizer": FREE, "batch_size": 4}], ids=["gd", "schedule free, batches"]
)
def test_no_array_of_the_caller_is_deleted_or_changed(options: dict) -> None:
    twice, closed, key = X + 1, X + 2, KEY(3)
    params = {"a": twice, "b": twice, "n": raw(1, 2, 3)}
    data = (jnp.ones((8, 3)), np.ones((8, 3), np.float32))
    mine = (params, closed, data, jax.random.key_data(key))
    before, reports = bits(mine), []

    def loss(p, batch, again, other, key):
        value = jnp.mean((p["a"] + again["b"] - jnp.mean(batch[0] * batch[1], 0)) ** 2) + jnp.sum(p["b"] ** 2)
        return value + jnp.sum((p["n"] - other * closed) ** 2) + 0 * jax.random.normal(key), {"twice": twice, "p": p}

    def run():
        return gdopt.minimize(
            loss,
            params,
            args=(params, twice),
            data=data,
            max_steps=40,
            has_aux=True,
            with_key=True,
            key=key,
            callback=lambda report: reports.append((report, bits(report.params))),
            **options,
        )

    results = [(result, bits((result.params, result.aux))) for result in (run(), run())]
    assert results[0][1] == results[1][1]
    assert all(bits((result.params, result.aux)) == were for result, were in results)
    assert len(reports) > 2
    assert all(bits(report.params) == were for report, were in reports)
    assert bits(mine) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((mine, key)) if isinstance(leaf, jax.Array))


def test_an_array_that_the_optimizer_holds_is_not_donated() -> None:
    held = jnp.ones(3)
    update: Any = lambda g, state, params=None: (jax.tree.map(lambda g: -0.1 * g * state["held"], g), state)
    optimizer = optax.GradientTransformation(lambda params: {"held": held, "params": params}, update)
    assert bits(minimize(square(1), optimizer=optimizer)) == bits(minimize(square(1), optimizer=optimizer))
    assert not held.is_deleted()


def test_share_donates_the_first_argument_only_if_asked() -> None:
    function = lambda a, b: (a + b, a * b)
    a, b = ONES + 0, TWOS + 0
    kept = program.share(function, a, b).call
    donating = program.share(function, a, b, donate_first=True).call
    assert bits(kept(a, b)) == bits(donating(a + 0, b)) == bits((a + b, a * b))
    assert not a.is_deleted()
    donating(a, b)
    assert a.is_deleted()
    assert not b.is_deleted()


# -------------------------------------------------------------------------------------------------- nothing big is kept

ROWS = 3000


def distance(array: Any) -> Callable:
    return lambda x: jnp.mean((x - array) ** 2)


def rule_of_distance(array: Any) -> Callable:
    rule = jax.custom_vjp(distance(array))
    rule.defvjp(lambda x: (rule(x), x), lambda x, g: (g * jnp.mean(2 * (x - array)),))
    return lambda x: rule(x)


def _run(loss: Callable, **options: Any) -> None:
    minimize(loss, jnp.float32(0), **options)


KEEPERS = {
    "closed over": lambda a: _run(distance(a)),
    "closed over by a jitted loss": lambda a: _run(jax.jit(distance(a))),
    "closed over by a jit in a loop": lambda a: _run(looped(lambda a: jax.jit(distance(a)))(a)),
    "rule": lambda a: _run(rule_of_distance(a)),
    "callback": lambda a: _run(call_back(lambda: np.float32(a[0]))),
    "callback with effects": lambda a: _run(lambda x: (jax.debug.callback(cast(Any, lambda: float(a[0]))), x**2)[1]),
    "args": lambda a: _run(lambda x, a: distance(a)(x), args=(a,)),
    "data": lambda a: _run(lambda x, a: distance(a)(x), data=a),
    "batches": lambda a: _run(lambda x, a: distance(a)(x), data=a, batch_size=100),
}


@pytest.mark.parametrize("name", some_of(KEEPERS, KEEPERS.keys() - {"data"}))  # which batches are cut from
def test_no_array_is_kept(name: str) -> None:
    def big() -> int:
        gc.collect()
        return sum(array.nbytes >= 4 * ROWS for array in jax.live_arrays())

    gdopt.clear_cache()
    before, alive = big(), []
    for convert in (np.asarray, jnp.asarray):
        array = convert(np.random.default_rng(0).normal(size=ROWS).astype(np.float32))
        KEEPERS[name](array)
        alive.append(weakref.ref(array))
        del array
    assert big() == before
    assert [ref() is None for ref in alive] == [True, True]


def test_the_number_of_programs_is_bounded() -> None:
    gdopt.clear_cache()
    make = lambda i: program.share(lambda x: x * i, X).call
    runs = [make(i) for i in range(program._PROGRAMS + 10)]
    info = program._executable.cache_info()
    assert info.currsize == program._PROGRAMS < info.misses
    for i in (0, 50, program._PROGRAMS + 9):  # pushed out or not, made now or before
        assert bits(runs[i](X)) == bits(make(i)(X)) == bits(X * i)


def test_the_number_of_places_is_bounded() -> None:
    gdopt.clear_cache()
    for passing in (False, True):
        places = [program.place_for(i, X, passing=passing) for i in range(program._PROGRAMS + 10)]
        assert program.place_for(program._PROGRAMS + 9, X, passing=passing) is places[-1]
        assert program.place_for(0, X, passing=passing) is not places[0]
        assert program.place_for(program._PROGRAMS + 9, X, passing=not passing) is not places[-1]
    assert program.place_for(None, X) is not program.place_for(None, X)


def test_no_array_is_written_into_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = shared_traces(monkeypatch)
    gdopt.clear_cache()
    data = jnp.asarray(np.random.default_rng(0).normal(size=ROWS).astype(np.float32))
    _run(lambda x: jnp.mean((x - data) ** 2) + jax.jit(lambda x: jnp.sum(x * data))(x))
    start, chunk = programs
    assert not any(np.size(constant) >= ROWS for constant in start.consts)
    # One that the loss closes over, and one that its inner jit does.
    assert sum(var.aval.shape == (ROWS,) for var in chunk.jaxpr.invars) == 2
    assert not chunk.consts


def test_threads_get_their_own_answers() -> None:
    def answer(goal, array):
        return minimize(lambda x: (1 + goal) * jnp.sum((x - array) ** 2), max_steps=30)[:2]

    def answers(goal):
        return bits([answer(goal, raw(shift, 0, 0)) for shift in range(4)])

    gdopt.clear_cache()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answers, [0.0, 1.0, 2.0, 3.0] * 2))
    gdopt.clear_cache()
    assert together == [answers(goal) for goal in (0.0, 1.0, 2.0, 3.0)] * 2
    assert len({str(answer) for answer in together}) == 4


# --------------------------------------------------------------------------------------------------- JAX as it is today


def test_the_private_parts_of_jax_are_unchanged() -> None:
    """Fails if a new JAX changes what `_jax` and `replays` build on, before the self-check turns sharing off."""
    held = jnp.arange(3.0)

    def function(x, y):
        return {"a": jax.jit(lambda x: jnp.sum(x * held))(x) + 1.5, "b": lax.sort((x, y))[1]}

    closed, out = jax.make_jaxpr(function, return_shape=True)(X, X)
    jaxpr = _jax.opened(closed)
    assert {name: (part.shape, part.dtype) for name, part in out.items()} == {"a": ((), X.dtype), "b": ((3,), X.dtype)}
    assert _jax.is_jaxpr(closed)
    assert _jax.is_jaxpr(jaxpr)
    assert len(jaxpr.constvars) == len(_jax.consts(closed))
    assert len(jaxpr.invars) == len(jaxpr.outvars) == 2
    assert not closed.effects
    got = replays.as_it_is(closed, [X, X + 1])
    assert bits(got) == bits(jax.jit(function)(X, X + 1))

    literals = [atom for eqn in jaxpr.eqns for atom in eqn.invars if _jax.is_literal(atom)]
    assert [(float(atom.val), atom.aval.dtype) for atom in literals] == [(1.5, X.dtype)]
    (call,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "jit")
    assert _jax.is_jaxpr(call.params["jaxpr"])
    if not ARRAYS_ARE_LITERALS:
        assert any(constant is held for constant in _jax.consts(call.params["jaxpr"])), "where does a jit keep them?"

    weak, strong, same = (_jax.opened(jax.make_jaxpr(lambda x: x**2)(x)) for x in (1.0, jnp.float32(1), jnp.float32(2)))
    assert weak.invars[0].aval != strong.invars[0].aval == same.invars[0].aval
    assert strong.eqns[0].ctx == same.eqns[0].ctx
    assert strong.eqns[0].primitive == same.eqns[0].primitive

    for rule, others in {
        rule_jvp: {"jvp_jaxpr_fun", "num_consts", "symbolic_zeros"},
        rule_vjp: {"fwd_jaxpr_thunk", "bwd", "num_consts", "out_trees", "symbolic_zeros"},
    }.items():
        (eqn,) = _jax.opened(jax.make_jaxpr(rule(1.0))(X)).eqns
        assert eqn.primitive.name == rule.__name__.replace("rule", "custom") + "_call"
        assert _jax.is_jaxpr(eqn.params["call_jaxpr"])
        assert set(eqn.params) - {"call_jaxpr"} == others, "all but the function itself is passed over: is it right?"

    (eqn,) = _jax.opened(jax.make_jaxpr(lambda: jax.pure_callback(_one, SCALAR))()).eqns
    assert callable(eqn.params["callback"])
    assert jax.make_jaxpr(lambda x: jax.debug.print("{}", x))(1.0).effects


# Loops, branches and checkpoints that a replay makes anew: what it knows of their parameters is all that there is.
OPERATIONS = {
    "scan": lambda x: lax.scan(lambda s, y: (s + jnp.sum(x) * y, s), 0.0, x)[0],
    "while": lambda x: lax.while_loop(lambda s: s < x[0], lambda s: s + x[1], 0.0),
    "cond": lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "checkpoint": lambda x: jax.checkpoint(jnp.sin)(x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_replay_knows_the_operations_that_it_rebuilds(name: str) -> None:
    found = {eqn.primitive.name: eqn for eqn in _jax.opened(jax.make_jaxpr(OPERATIONS[name])(X)).eqns}
    (eqn,) = (eqn for known, eqn in found.items() if known in replays._BUILDERS)
    builder = replays._BUILDERS[eqn.primitive.name]
    assert builder.knows(eqn)
    assert not builder.knows(eqn.replace(params={**eqn.params, "new": 1}))
    if name == "scan":
        assert replays.scan_counts(eqn) == (1, 1)
