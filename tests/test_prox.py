"""Proximal steps: the definition, scikit-learn, derivatives, dtypes, prefixes, shared programs and bad weights."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import some_of
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, MultiTaskLasso

from gdopt import prox
from gdopt._compile import program
from gdopt._errors import InputError

# Each Prox of a weight, with the shape of a leaf that it takes; the tests that take `make` run for each.
MADE: dict[str, tuple[Callable[[Any], prox.Prox], tuple[int, ...]]] = {
    "l1": (prox.l1, (7,)),
    "group_lasso_rows": (prox.group_lasso, (3, 4)),
    "group_lasso_vector": (prox.group_lasso, (5,)),
    "group_lasso_columns": (functools.partial(prox.group_lasso, axis=0), (3, 4)),
    "group_lasso_two_axes": (functools.partial(prox.group_lasso, axis=(0, -1)), (2, 3, 2)),
    "group_lasso_whole": (functools.partial(prox.group_lasso, axis=None), (3, 4)),
    "group_lasso_scalar": (prox.group_lasso, ()),
    "nuclear": (prox.nuclear, (3, 4)),
    "nuclear_tall": (prox.nuclear, (5, 2)),
    "nuclear_many": (prox.nuclear, (2, 3, 3)),
    "box": (lambda weight: prox.box(-weight, 2 * weight), (6,)),
}
each = pytest.mark.parametrize(("make", "shape"), MADE.values(), ids=MADE.keys())
PENALTIES = {name: pair for name, pair in MADE.items() if name != "box"}
USUAL = {"l1", "group_lasso_rows", "nuclear", "box"}
each_penalty = pytest.mark.parametrize(("make", "shape"), PENALTIES.values(), ids=PENALTIES.keys())


def is_box(made: prox.Prox) -> bool:
    """Tell whether it is a box, which takes no complex params and does not depend on the rate."""
    return "_clipped" in repr(made.step)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: Any = float) -> np.ndarray:
    """Return normal numbers, complex ones for a complex dtype."""
    numbers = np.random.default_rng(seed)
    entries = numbers.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        entries = entries + 1j * numbers.normal(size=shape)
    return np.asarray(entries).astype(dtype)


# --- the definition ---

sizes = st.floats(1e-3, 10.0)


@functools.cache
def jitted(make: Callable[[Any], prox.Prox]) -> tuple[Callable, Callable]:
    """Return the step and the value as functions of the weight, too."""
    return jax.jit(lambda x, weight, rate: make(weight)(x, rate)), jax.jit(lambda x, weight: make(weight).value(x))


@pytest.mark.parametrize("name", some_of(MADE, USUAL))
@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=["real", "complex"])
@given(weight=sizes, rate=sizes, seed=st.integers(0, 1000), spread=st.sampled_from([1e-3, 1.0, 30.0]))
def test_it_is_the_least_point(name: str, dtype: Any, weight: float, rate: float, seed: int, spread: float) -> None:
    """What it minimises is strongly convex: each other z costs more, by |z - least|**2 / (2 rate) or above."""
    make, shape = MADE[name]
    if is_box(make(1.0)) and dtype is np.complex128:
        return
    with jax.enable_x64(True):
        step, value = jitted(make)
        x = spread * draw(shape, seed, dtype)
        least = np.asarray(step(x, weight, rate))
        near = least + 1e-3 * spread * draw(shape, seed + 1, dtype)
        other = np.asarray(step(x, weight, 2 * rate))
        cost = lambda z: float(value(z, weight)) + np.sum(np.abs(z - x) ** 2) / (2 * rate)
        lowest = cost(least)
        assert math.isfinite(lowest)
        for z in (x, 0 * x, near, draw(shape, seed + 2, dtype), least * 0.9, least * 1.1, other):
            gap = np.sum(np.abs(z - least) ** 2) / (2 * rate)
            assert cost(z) >= lowest + gap - 1e-12 * (1 + lowest + gap)


@pytest.mark.parametrize("make", [prox.l1, prox.group_lasso, prox.nuclear])
def test_leaves_have_weights_of_their_own(make: Callable[[Any], prox.Prox]) -> None:
    a, b = draw((3, 4), 1, np.float32), draw((2, 5), 2, np.float32)
    made = make({"a": 0.3, "b": 0.7})
    together = made({"a": a, "b": b}, 0.9)
    np.testing.assert_array_equal(together["a"], make(0.3)(a, 0.9))
    np.testing.assert_array_equal(together["b"], make(0.7)(b, 0.9))
    np.testing.assert_allclose(made.value({"a": a, "b": b}), make(0.3).value(a) + make(0.7).value(b), rtol=1e-6)


def test_a_weight_for_each_entry_group_and_matrix() -> None:
    x = draw((3, 4), 3, np.float32)
    each_entry = np.abs(draw((3, 4), 4))
    expected = np.sign(x) * np.maximum(np.abs(x) - 0.5 * each_entry, 0)
    np.testing.assert_allclose(prox.l1(each_entry)(x, 0.5), expected, rtol=1e-6)
    np.testing.assert_allclose(prox.l1(each_entry).value(x), np.sum(each_entry * np.abs(x)), rtol=1e-6)
    rows, columns = np.array([0.1, 1.0, 100.0]), np.array([0.1, 0.2, 1.0, 100.0])
    for weights, axis, of in ((rows, 1, lambda i: np.s_[i]), (columns, 0, lambda i: np.s_[:, i])):
        made = prox.group_lasso(weights, axis=axis)
        for number, weight in enumerate(weights):
            group = prox.group_lasso(weight)(x[of(number)], 0.5)
            np.testing.assert_allclose(made(x, 0.5)[of(number)], group, rtol=1e-6)
    many = draw((2, 3, 4), 5, np.float32)
    for number, weight in enumerate((0.2, 0.9)):
        matrix = prox.nuclear(weight)(many[number], 0.5)
        np.testing.assert_allclose(prox.nuclear(np.array([0.2, 0.9]))(many, 0.5)[number], matrix, atol=1e-6)


# --- scikit-learn ---


def test_lasso_of_scikit_learn() -> None:
    """Steps of proximal gradient descent stay at its solution, with an intercept that is not penalised."""
    X, y = draw((60, 10), 1), draw((60,), 2)
    y = y + X[:, :3] @ np.array([2.0, -1.0, 0.5]) + 3
    model = Lasso(alpha=0.2, tol=1e-14, max_iter=100_000).fit(X, y)
    with jax.enable_x64(True):
        penalty = prox.l1({"w": 0.2, "b": None})
        loss = lambda params: jnp.mean((X @ params["w"] + params["b"] - y) ** 2) / 2
        best = {"w": jnp.asarray(model.coef_), "b": jnp.asarray(model.intercept_)}
        step = jax.jit(
            lambda params: penalty(jax.tree.map(lambda x, g: x - 0.3 * g, params, jax.grad(loss)(params)), 0.3)
        )
        np.testing.assert_allclose(step(best)["w"], model.coef_, atol=1e-8)
        found = {"w": jnp.zeros(10), "b": jnp.zeros(())}
        for _ in range(500):
            found = step(found)
        np.testing.assert_allclose(found["w"], model.coef_, atol=1e-8)
        np.testing.assert_array_equal(found["w"] == 0, model.coef_ == 0)
        assert 0 < np.sum(model.coef_ == 0) < 10
        np.testing.assert_allclose(loss(best) + penalty.value(best), loss(found) + penalty.value(found), rtol=1e-12)


def test_multi_task_lasso_of_scikit_learn() -> None:
    X = draw((60, 8), 1)
    Y = X[:, :3] @ draw((3, 4), 3) + 0.5 * draw((60, 4), 2)
    model = MultiTaskLasso(alpha=0.4, tol=1e-14, max_iter=100_000, fit_intercept=False).fit(X, Y)
    with jax.enable_x64(True):
        penalty = prox.group_lasso(0.4)
        loss = lambda W: jnp.sum((X @ W - Y) ** 2) / (2 * len(X))
        step = jax.jit(lambda W: penalty(W - 0.3 * jax.grad(loss)(W), 0.3))
        found = jnp.zeros((8, 4))
        for _ in range(500):
            found = step(found)
        np.testing.assert_allclose(found, model.coef_.T, atol=1e-8)
        empty = np.asarray(found == 0).all(axis=1)
        np.testing.assert_array_equal(empty, (model.coef_.T == 0).all(axis=1))
        assert 0 < empty.sum() < 8


# --- derivatives ---


@pytest.mark.parametrize("name", some_of(MADE, USUAL))
@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=["real", "complex"])
def test_derivatives(name: str, dtype: Any) -> None:
    """With respect to params, weight and rate, by central differences, forward and backward."""
    make, shape = MADE[name]
    if is_box(make(1.0)) and dtype is np.complex128:
        return

    def both(x: jax.Array, weight: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The value of a box is infinite here, and has no differences.
        return make(weight)(x, rate), jnp.zeros(()) if is_box(make(weight)) else make(weight).value(x)

    def derivatives(at: tuple, along: tuple, weights: tuple) -> tuple:
        return both(*at), jax.jvp(both, at, along)[1], jax.vjp(both, *at)[1](weights)

    with jax.enable_x64(True):
        run, h = jax.jit(derivatives), 1e-6
        at, along = (draw(shape, 7, dtype), 0.4, 0.9), (draw(shape, 8, dtype), 0.3, -0.2)
        weights = draw(shape, 9, dtype), np.float64(1.5)
        _, tangents, back = run(at, along, weights)
        moved = (tuple(a + s * b for a, b in zip(at, along, strict=True)) for s in (h, -h))
        above, below = (run(point, along, weights)[0] for point in moved)
        for up, down, tangent in zip(above, below, tangents, strict=True):
            np.testing.assert_allclose(tangent, (up - down) / (2 * h), atol=2e-8)
        across = sum(np.sum(b * w) for b, w in zip(back, along, strict=True))
        expected = sum(np.sum(weight * tangent) for weight, tangent in zip(weights, tangents, strict=True))
        np.testing.assert_allclose(np.real(across), np.real(expected), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=["real", "complex"])
@pytest.mark.parametrize(
    "singular", [(3, 3, 3), (3, 2, 2), (3, 0.1, 0.1), (3, 0, 0), (3, 3, 0), (0.1, 0.1, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (6, 3)])
def test_nuclear_at_equal_singular_values(dtype: Any, singular: tuple[float, ...], shape: tuple[int, int]) -> None:
    """The step is differentiable there, although singular vectors are not."""
    u, _, vh = np.linalg.svd(draw(shape, 1, dtype), full_matrices=False)
    x, way = (u * np.array(singular)) @ vh, draw(shape, 2, dtype)
    with jax.enable_x64(True):
        step = jax.jit(lambda x, way: jax.jvp(lambda x: prox.nuclear(0.5)(x, 0.8), (x,), (way,)))
        expected = (step(x + 1e-6 * way, way)[0] - step(x - 1e-6 * way, way)[0]) / 2e-6
        np.testing.assert_allclose(step(x, way)[1], expected, atol=1e-5)


@each_penalty
@pytest.mark.parametrize("dtype", [np.float32, np.complex64], ids=["real", "complex"])
def test_no_nan_of_zeros_and_infinity(make: Callable[[Any], prox.Prox], shape: tuple[int, ...], dtype: Any) -> None:
    size = lambda x, weight, rate: (jnp.sum(jnp.abs(new := make(weight)(x, rate))), new)
    step = jax.jit(jax.grad(size, argnums=(0, 1), has_aux=True))
    slope = jax.jit(jax.grad(lambda x: make(1.0).value(x)))
    some = draw(shape, 1, dtype)
    some.flat[0] = 0
    with jax.debug_nans(True):
        for x in (np.zeros(shape, dtype), some, np.ones(shape, dtype)):
            assert np.isfinite(slope(x)).all()
            for weight, rate in itertools.product([0.0, 1.0, 1e-30, 1e30, 3e38], [0.0, 1e-30, 1.0, 1e30, math.inf]):
                grads, new = step(x, jnp.float32(weight), jnp.float32(rate))
                assert not any(np.isnan(grad).any() for grad in grads)
                # A threshold of zero changes nothing, and an infinite one leaves nothing.
                if weight == 0 or rate == 0:
                    np.testing.assert_array_equal(new, x)
                if weight * rate > 1e29:
                    np.testing.assert_array_equal(new, np.zeros_like(x))


@each_penalty
def test_a_threshold_of_zero_has_the_derivative_of_no_step(
    make: Callable[[Any], prox.Prox], shape: tuple[int, ...]
) -> None:
    zero = jnp.zeros(shape)
    for weight, rate in ((0.0, 1.0), (1.0, 0.0)):
        step = lambda x, weight=weight, rate=rate: make(jnp.asarray(weight))(x, rate)
        np.testing.assert_array_equal(jax.jvp(step, (zero,), (zero + 1,))[1], zero + 1)


def test_zero_entries_and_groups_stay_there() -> None:
    x = jnp.array([0.0, 0.5, 2.0])
    np.testing.assert_array_equal(jax.jacobian(lambda x: prox.l1(1.0)(x, 1.0))(x), np.diag([0.0, 0.0, 1.0]))
    rows = jnp.array([[0.0, 0.0], [0.3, 0.4], [3.0, 4.0]])
    jacobian = jax.jacobian(lambda x: prox.group_lasso(1.0)(x, 1.0))(rows)
    np.testing.assert_array_equal(jacobian[:2], np.zeros((2, 2, 3, 2)))
    unit = np.array([0.6, 0.8])
    np.testing.assert_allclose(jacobian[2, :, 2], np.eye(2) - (np.eye(2) - np.outer(unit, unit)) / 5, rtol=1e-6)
    clipped = jax.jacobian(lambda x: prox.box(0.0, 1.0)(x, 1.0))(x)
    np.testing.assert_array_equal(clipped, np.diag([1.0, 1.0, 0.0]))


@each
def test_nan_stays(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    x = jnp.full(shape, jnp.nan)
    assert jnp.isnan(make(0.5)(x, 1.0)).all()
    assert jnp.isnan(make(0.5)(jnp.ones(shape), jnp.nan)).all() or is_box(make(0.5))


# --- dtypes and scales ---


@each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_dtypes(make: Callable[[Any], prox.Prox], shape: tuple[int, ...], dtype: str) -> None:
    wide = jnp.promote_types(jnp.finfo(dtype).dtype, jnp.float32)
    wide_leaf = jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64("64" in dtype or "128" in dtype), jax.numpy_dtype_promotion("strict"):
        made = make(0.5)
        if is_box(made) and "complex" in dtype:
            return
        x = jnp.asarray(draw(shape, 3, complex if "complex" in dtype else float), dtype)
        for rate in (0.25, jnp.asarray(0.25, jnp.float32), np.float64(0.25)):
            new = made(x, rate)
            assert new.dtype == x.dtype
            assert new.shape == x.shape
            exact = made(x.astype(wide_leaf), rate)
            np.testing.assert_array_equal(new, exact.astype(x.dtype))
        value = made.value(x)
        assert (value.shape, value.dtype) == ((), wide)


@each_penalty
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64], ids=["real", "complex"])
def test_scales(make: Callable[[Any], prox.Prox], shape: tuple[int, ...], scale: float, dtype: Any) -> None:
    """Params and thresholds may be very small or large together."""
    x = draw(shape, 5, dtype)
    expected = make(0.5)(x, 0.5)
    np.testing.assert_allclose(make(0.5)(dtype(scale) * x, 0.5 * scale) / dtype(scale), expected, atol=2e-6)
    np.testing.assert_allclose(make(0.5 * scale)(dtype(scale) * x, 0.5) / dtype(scale), expected, atol=2e-6)
    np.testing.assert_allclose(make(0.5).value(dtype(scale) * x) / scale, make(0.5).value(x), rtol=1e-5)


def test_float16_sums_do_not_overflow() -> None:
    x = jnp.full((10_000,), 60_000.0, jnp.float16)
    assert float(prox.l1(1.0).value(x)) == pytest.approx(6e8, rel=1e-3)
    assert float(prox.group_lasso(1.0).value(x)) == pytest.approx(6e6, rel=1e-3)
    assert float(prox.l1(1e-9).value(x)) == pytest.approx(0.6, rel=1e-3)
    np.testing.assert_array_equal(prox.group_lasso(1e-3)(x, 1e-3), x)


def test_numbers_keep_their_digits_until_x64_is_on() -> None:
    made = prox.l1(0.1)
    with jax.enable_x64(True):
        assert float(made.value(jnp.ones(()))) == 0.1
        assert float(made(jnp.ones(()), 1.0)) == 0.9


# --- trees ---


def test_prefixes() -> None:
    x = {"layers": [{"w": jnp.array([3.0]), "b": jnp.array([3.0])}] * 2, "last": jnp.array([3.0])}
    new = prox.l1({"layers": [{"w": 1.0, "b": None}, 0.5], "last": 0})(x, 1.0)
    assert jax.tree.map(float, jax.tree.map(jnp.squeeze, new)) == {
        "layers": [{"w": 2.0, "b": 3.0}, {"w": 2.5, "b": 2.5}],
        "last": 3.0,
    }
    assert float(prox.l1({"layers": None, "last": 2.0}).value(x)) == 6.0
    assert float(prox.l1(None).value(x)) == 0.0
    clipped = prox.box({"layers": 4.0, "last": None}, {"layers": None, "last": 2.0})(x, 1.0)
    assert float(clipped["last"].squeeze()) == 2.0
    assert float(clipped["layers"][1]["b"].squeeze()) == 4.0


@each
def test_what_is_no_number_is_left_alone(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    x = {"w": jnp.ones(shape), "count": jnp.arange(3), "key": jax.random.key(0), "f": jnp.tanh, "none": None}
    new = make(0.5)(x, 0.5)
    assert new["f"] is jnp.tanh
    assert new["none"] is None
    np.testing.assert_array_equal(new["count"], [0, 1, 2])
    np.testing.assert_array_equal(new["w"], make(0.5)(x["w"], 0.5))
    np.testing.assert_array_equal(make(1.0).value(x), make(1.0).value(x["w"]))


@each
def test_empty_leaves_have_no_penalty(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    empty = jnp.zeros((0, *shape, 2))
    assert make(0.5)(empty, 0.5).shape == empty.shape
    assert float(make(0.5).value(empty)) == 0


@each
def test_numbers_of_python_and_numpy(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    expected = make(0.5)(jnp.asarray(x), 0.5)
    for weight in (np.float32(0.5), np.array(0.5), jnp.asarray(0.5), jnp.asarray(0.5, jnp.bfloat16)):
        np.testing.assert_array_equal(make(weight)(x, np.float32(0.5)), expected)
    np.testing.assert_array_equal(make(1)(x, 1), make(1.0)(x, 1.0))
    np.testing.assert_allclose(prox.l1(1.0)(3.0, 1.0), 2.0)


def test_weights_are_those_of_the_moment_they_were_given() -> None:
    weights = np.ones(3)
    made = prox.l1(weights)
    weights[:] = 100
    np.testing.assert_array_equal(made(jnp.full(3, 3.0), 1.0), np.full(3, 2.0))


# --- programs ---


@each
def test_equal_calls_share_a_program(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    """Weights are constants of the trace, which a shared program takes as inputs."""
    x, rate = jnp.asarray(draw(shape, 6, np.float32)), jnp.float32(0.5)
    for of in (lambda made: made, lambda made: lambda x, rate: made.value(x)):
        one, other = (program.trace(of(make(weight)), x, rate) for weight in (0.25, 0.75))
        assert one.identity is not None
        assert one.identity == other.identity
        both = [traced.replay(other.constants, x, rate) for traced in (one, other)]
        np.testing.assert_array_equal(*both)
        np.testing.assert_allclose(both[0], of(make(0.75))(x, rate), rtol=1e-6)


@each
def test_jit_and_vmap(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    many, weights = jnp.asarray(draw((3, *shape), 6, np.float32)), jnp.array([0.1, 0.5, 1.0])
    rates = jnp.array([0.3, 0.6, 2.0])
    found = jax.jit(jax.vmap(lambda x, weight, rate: make(weight)(x, rate)))(many, weights, rates)
    for x, weight, rate, new in zip(many, weights, rates, found, strict=True):
        np.testing.assert_allclose(new, make(weight)(x, rate), atol=1e-6)


@each
def test_pickles(make: Callable[[Any], prox.Prox], shape: tuple[int, ...]) -> None:
    x, made = jnp.asarray(draw(shape, 6, np.float32)), make(0.5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made))(x, 0.5), made(x, 0.5))


# --- bad weights ---

W = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "negative": (lambda: prox.l1(-1.0), r"weight=-1\.0 is no weight\. Pass finite numbers, 0 or above"),
    "negative entry": (lambda: prox.group_lasso({"w": np.array([1, -2.0])}), r"weight\['w'\]=-2\.0 is no weight"),
    "nan": (lambda: prox.nuclear(math.nan), r"weight=nan is no weight"),
    "infinite": (lambda: prox.l1({"w": jnp.inf}), r"weight\['w'\]=inf is no weight"),
    "text": (lambda: prox.l1("0.1"), r"weight='0.1' is no real number"),
    "bool": (lambda: prox.l1(True), r"weight=True is no real number"),
    "complex": (lambda: prox.l1(1j), r"weight=1j is no real number"),
    "objects": (lambda: prox.l1(np.array([None])), r"weight=array\(\[None\], dtype=object\) is no real number"),
    "axis": (lambda: prox.group_lasso(1.0, axis=1.5), r"axis=1\.5 is no axis"),  # pyright: ignore[reportArgumentType]
    "structure": (lambda: prox.l1({"w": 1.0})(W, 1.0), r"weight=\{'w': .*1\. ?\} does not fit params"),
    "list": (
        lambda: prox.l1([1.0, 2.0])(np.ones(2), 1.0),
        r"weight=\[.*\] does not fit params.*an array \(not a list\)",
    ),
    "shape": (
        lambda: prox.l1({"w": np.ones(3), "b": 1})(W, 1.0),
        r"weight of params\['w'\] has shape \(3,\)\. Pass a number, or an array of shape \(2, 3\)",
    ),
    "group": (lambda: prox.group_lasso({"w": np.ones(3), "b": 1})(W, 1.0), r"of shape \(2,\), which has a weight for"),
    "group value": (lambda: prox.group_lasso({"w": np.ones(3), "b": 1}).value(W), r"of shape \(2,\), which has"),
    "group axis": (lambda: prox.group_lasso(1.0, axis=1)(W, 1.0), r"axis=\(1,\) is more than params\['b'\] has"),
    "vector": (lambda: prox.nuclear(1.0)(W, 1.0), r"params\['b'\] has shape \(3,\), but prox\.nuclear needs matrices"),
    "matrices": (lambda: prox.nuclear(np.ones(2))(np.ones((3, 2, 2)), 1.0), r"of shape \(3,\), which has a weight for"),
    "crossed": (lambda: prox.box(1.0, 0.0), r"lower=1\.0 is above upper=0\.0\. Swap them"),
    "crossed leaf": (lambda: prox.box({"w": 1.0}, {"w": 0.0}), r"lower\['w'\]=1\.0 is above upper\['w'\]=0\.0"),
    "crossed entry": (
        lambda: prox.box({"w": 0.5, "b": None}, {"w": np.array([[1, 1, 1], [1, 0, 1]]), "b": 1.0})(W, 1.0),
        r"lower\['w'\]\[1, 1\]=0\.5 is above upper\['w'\]\[1, 1\]=0\.0",
    ),
    "crossed prefixes": (
        lambda: prox.box(1.0, {"w": 2.0, "b": 0.0})(W, 1.0),
        r"lower\['b'\]=1\.0 is above upper\['b'\]=",
    ),
    "nan bound": (lambda: prox.box({"w": math.nan}, 1.0), r"lower\['w'\]=nan is no bound"),
    "no room": (lambda: prox.box(math.inf, None), r"lower=inf is no bound"),
    "bound shape": (lambda: prox.box(None, np.ones(2))(np.ones(3), 1.0), r"the upper bound of params has shape \(2,\)"),
    "bound structure": (lambda: prox.box({"v": 0.0}, 1.0)(W, 1.0), r"lower=\{'v': .*\} does not fit params"),
    "complex box": (lambda: prox.box(0.0, 1.0)(np.ones(2, np.complex64), 1.0), r"params is complex, and complex"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD.keys())
def test_bad_weights(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bad()


def test_a_box_is_its_own_set() -> None:
    made = prox.box(jnp.array([0.1, -0.1]), jnp.array([0.1, jnp.inf]))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        new = made(jnp.array([3.0, -3.0], dtype), 1.0)
        assert float(made.value(new)) == 0
        assert float(made.value(new - 1)) == math.inf
