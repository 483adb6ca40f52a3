"""The vanilla step: ``x - learning_rate * g``, on any pytree, and never uphill on a smooth convex loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations
from hypothesis import given, settings

import gdopt


class Convex(NamedTuple):
    """A random convex loss of one vector, and a bound L on its curvature."""

    loss: Any
    dimension: int
    smoothness: float


def _matrix(seed: int, rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    scales = 10.0 ** random.uniform(-2, 1, columns)  # badly scaled on purpose
    return random.normal(size=(rows, columns)) * scales


def _largest(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2) ** 2)


def quadratic(seed: int, n: int) -> Convex:
    A = _matrix(seed, n + 1, n)
    b = np.random.default_rng(seed + 1).normal(size=n + 1)
    return Convex(lambda x: 0.5 * jnp.sum((A @ x - b) ** 2), n, _largest(A))


def logistic(seed: int, n: int) -> Convex:
    A = _matrix(seed, 3 * n, n)
    y = np.random.default_rng(seed + 1).integers(0, 2, 3 * n)
    return Convex(lambda x: jnp.mean(jax.nn.softplus(A @ x) - y * (A @ x)), n, _largest(A) / (4 * 3 * n))


def huber(seed: int, n: int) -> Convex:
    A = _matrix(seed, 2 * n, n)
    b = 3 * np.random.default_rng(seed + 1).normal(size=2 * n)
    return Convex(lambda x: jnp.sum(optax.losses.huber_loss(A @ x, b)), n, _largest(A))


def log_sum_exp(seed: int, n: int) -> Convex:
    A = _matrix(seed, 2 * n, n)
    return Convex(lambda x: jax.scipy.special.logsumexp(A @ x), n, _largest(A))


def softplus_sum(seed: int, n: int) -> Convex:
    A = _matrix(seed, 2 * n, n)
    return Convex(lambda x: jnp.sum(jax.nn.softplus(A @ x)) + 0.5 * jnp.sum(x**2), n, _largest(A) / 4 + 1)


families = st.sampled_from([quadratic, logistic, huber, log_sum_exp, softplus_sum])


@given(families, st.integers(0, 2**31), st.sampled_from([1, 2, 5]), st.floats(1e-3, 1.0))
@settings(max_examples=max(10, settings().max_examples // 5))  # each one compiles
def test_each_step_descends_for_every_rate_up_to_one_over_L(family, seed, n, fraction):
    with jax.enable_x64(True):
        loss, n, smoothness = family(seed, n)
        x = jnp.asarray(np.random.default_rng(seed + 2).normal(size=n))
        rate = fraction / smoothness
        evaluate = jax.jit(jax.value_and_grad(loss))
        for _ in range(3):
            before, grad = evaluate(x)
            x, value = gdopt.gd_step(loss, x, rate)
            after, _ = evaluate(x)
            assert value == pytest.approx(float(before), rel=1e-12)
            # The descent lemma for lr <= 1/L: f(x - lr g) <= f(x) - lr/2 |g|^2 (Nesterov 2004, eq. 1.2.13)
            slack = 1e-12 * (1 + abs(float(before)))
            assert float(after) <= float(before) - rate / 2 * float(grad @ grad) + slack


@pytest.mark.parametrize("family", [quadratic, huber])
def test_the_descent_property_can_fail(family):
    """Beyond 2/L it fails, so the property above is no tautology."""
    with jax.enable_x64(True):
        loss, n, smoothness = family(0, 2)
        x = jnp.asarray([30.0, -20.0]) if family is quadratic else jnp.zeros(n)
        rose = False
        for _ in range(200):
            x, before = gdopt.gd_step(loss, x, 4 / smoothness)
            rose |= bool(loss(x) > before)
        assert rose


_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=3),
    elements=st.integers(-1000, 1000).map(lambda n: n / 8),
)
_trees = st.recursive(
    _arrays,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
        | st.tuples(inner, st.none())
    ),
    max_leaves=5,
)


def _sum_of_squares(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@given(_trees, st.sampled_from([0.125, 0.25, 0.5]))
@settings(max_examples=max(10, settings().max_examples // 2))  # each one of another shape compiles
def test_any_pytree_keeps_its_structure_shapes_and_dtypes(params, rate):
    new, value = gdopt.gd_step(_sum_of_squares, params, rate)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert value == pytest.approx(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(params)), rel=1e-5)
    for leaf, old in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        assert (leaf.dtype, leaf.shape) == (old.dtype, old.shape)
        np.testing.assert_array_equal(leaf, old - np.float32(rate) * (2 * old))  # exact: the rates are powers of two


@given(_trees, st.floats(2**-13, 8.0, width=32))
@settings(max_examples=max(10, settings().max_examples // 2))
def test_gd_is_optax_sgd_bit_for_bit(params, rate):
    grads = jax.tree.map(lambda leaf: jnp.asarray(leaf) / 3, params)
    for learning_rate in (rate, lambda step: rate / (1 + step)):
        ours, theirs = gdopt.gd(learning_rate), optax.sgd(learning_rate)
        our_state, their_state = ours.init(params), theirs.init(params)
        for _ in range(2):
            our_updates, our_state = ours.update(grads, our_state, params)
            their_updates, their_state = theirs.update(grads, their_state, params)
            for a, b in zip(jax.tree.leaves(our_updates), jax.tree.leaves(their_updates), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_step_keeps_the_dtype(dtype):
    x = jnp.asarray([1.0, 2.0], dtype)
    new, _ = gdopt.gd_step(lambda x: jnp.sum(jnp.abs(x) ** 2).astype(jnp.float32), x, 0.25)
    assert new.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(new, np.complex64), [0.5, 1.0])


def test_step_descends_on_complex_params():
    """JAX's gradient of a complex leaf is conjugated; without undoing that, the imaginary part climbs."""
    loss = lambda z: jnp.abs(z - (1 + 2j)) ** 2
    z = jnp.asarray(0j)
    for _ in range(60):
        z, _ = gdopt.gd_step(loss, z, 0.2)
    assert complex(z) == pytest.approx(1 + 2j, abs=1e-5)


def test_new_rates_compile_nothing():
    loss = lambda x: jnp.sum(x**2)
    x = jnp.ones(3)
    gdopt.gd_step(loss, x, 0.1)
    with count_compilations() as counter:
        for rate in (0.2, 0.3, np.float32(0.4), 1):
            x, _ = gdopt.gd_step(loss, x, rate)
    assert counter.names == []


def test_step_inside_jit_scan_and_vmap():
    loss = lambda x, target: jnp.sum((x - target) ** 2)

    @jax.jit
    def descend(x, rate):
        return jax.lax.scan(lambda x, _: gdopt.gd_step(loss, x, rate, 3.0), x, length=100)

    x, losses = jax.vmap(descend)(jnp.zeros((4, 2)), jnp.asarray([0.1, 0.2, 0.3, 0.4]))
    np.testing.assert_allclose(x, 3.0, atol=1e-5)
    assert losses.shape == (4, 100)


def test_step_carries_leaves_that_are_not_arrays():
    model = eqx.nn.MLP(2, "scalar", 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    new, value = gdopt.gd_step(lambda model, x: model(x) ** 2, model, 0.1, jnp.ones(2))
    assert new.activation is model.activation
    assert float(new(jnp.ones(2)) ** 2) < float(value)


def test_step_leaves_the_callers_arrays_alone():
    x = jnp.ones(3)
    gdopt.gd_step(lambda x: jnp.sum(x**2), x, 0.1)
    np.testing.assert_array_equal(x, np.ones(3))


@pytest.mark.parametrize(
    ("params", "rate", "message"),
    [
        ({"w": [1.0, 2]}, 0.1, r"params\['w'\]\[1\] is of dtype int32"),
        ({}, 0.1, "no entries to optimise"),
        (1.0, -0.1, "learning_rate=-0.1 is not a finite number above 0"),
        (1.0, lambda step: 0.1, "is a schedule"),
        (jnp.ones(2), 0.1, r"the loss returned shape \(2,\)"),
    ],
)
def test_step_refuses_bad_input(params, rate, message):
    with pytest.raises(gdopt.InputError, match=message):
        gdopt.gd_step(lambda x: jnp.asarray(x["w"][0] if isinstance(x, dict) else x), params, rate)
