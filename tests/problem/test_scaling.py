"""``minimize(scale=)``: the run in scaled variables, with params that keep their own units outside of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt
from gdopt import InputError

X = jnp.linspace(0, 1e-4, 100)
Y = 1 + 5 * X / 1e-4
START = {"a": 0.0, "b": 0.0}
SIZES = {"a": jnp.float32(1.0), "b": jnp.float32(2.0**14)}
CALLS: dict[str, dict[str, Any]] = {
    "default": {},
    "spectral": {"optimizer": gdopt.gd},
    "gd": {"learning_rate": 0.5},
    "cyclical": {"learning_rate": gdopt.schedules.triangular2(0.1, 0.5, step_size_up=5)},
    "adam": {"optimizer": optax.adam, "learning_rate": 0.1},
    "range test": {"optimizer": optax.adam, "max_steps": 300},
    "lbfgs": {"optimizer": optax.lbfgs()},
    "momentum": {"optimizer": functools.partial(optax.sgd, momentum=0.9), "learning_rate": 0.1},
}


def line(params: Any) -> jax.Array:
    """A fit to x up to 1e-4: its minimum is at a = 1, b = 50,000."""
    return jnp.mean((params["a"] + params["b"] * X - Y) ** 2)


def times(params: Any, sizes: Any = SIZES) -> Any:
    return jax.tree.map(lambda x, size: x * size, params, sizes)


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_run_in_scaled_variables(name: str) -> None:
    result = gdopt.minimize(line, START, scale=SIZES, **CALLS[name])
    by_hand = gdopt.minimize(lambda z: line(times(z)), START, **CALLS[name])
    assert result.history is not None
    assert by_hand.history is not None
    for ours, theirs in zip(result.history, by_hand.history, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert result.params == times(by_hand.params)
    assert (result.status, result.message) == (by_hand.status, by_hand.message)
    assert (result.grad_norm, result.left) == (by_hand.grad_norm, by_hand.left)


@pytest.mark.parametrize("name", ["spectral", "gd", "adam", "momentum"])
def test_curvature_solves_what_these_optimizers_do_not(name: str) -> None:
    unscaled = gdopt.minimize(line, START, **CALLS[name])
    result = gdopt.minimize(line, START, scale="curvature", **CALLS[name])
    assert result.success
    assert float(result.params["b"]) == pytest.approx(50_000, rel=1e-3)
    assert not unscaled.success or unscaled.steps > 50 * result.steps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_no_digit_of_the_start_is_lost(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        limits = jnp.finfo(dtype)
        start = jnp.asarray(np.random.default_rng(0).uniform(1, 10, 50), dtype)
        far = [float(limits.tiny) ** 0.5, 0.7, 3, 1000]
        wall = lambda x: jnp.where((x == start).all(), 1.0, jnp.inf) + jnp.sum(x.astype(float))
        for size in far:  # no point is better than the start, and so it comes back
            result = gdopt.minimize(wall, start, scale=size, learning_rate=1.0, max_steps=1)
            assert result.params.dtype == dtype
            assert (result.params == start).all()


def test_curvature_is_exact_for_up_to_64_entries() -> None:
    """Random signs would see the coupling of a and b, which is a hundred thousand times the curvature of a."""
    x = jnp.linspace(1e5, 1.001e5, 50)
    loss = lambda p: jnp.mean((p["a"] + p["b"] * x - 3.0) ** 2) * 0.4
    options: dict[str, Any] = {"learning_rate": 0.1, "max_steps": 20}
    result = gdopt.minimize(loss, START, scale="curvature", **options)
    sizes = {"a": jnp.float32(2.0**0), "b": jnp.float32(2.0**-16)}  # 1 / sqrt(0.8), and that over x
    np.testing.assert_array_equal(result.history.loss, gdopt.minimize(loss, START, scale=sizes, **options).history.loss)


def test_curvature_of_many_entries() -> None:
    """For a diagonal Hessian, signs are exact as well. Entries without curvature get the usual size."""
    scales = np.geomspace(1e-8, 1e8, 100).astype(np.float32)
    curved = lambda p: jnp.sum((scales * p["x"] - 1) ** 2) + jnp.sum(jnp.exp(-jnp.abs(p["flat"])))
    start = {"x": jnp.zeros(100), "flat": jnp.ones(3)}
    sizes = {"x": 2.0 ** np.round(np.log2(1 / (np.sqrt(2) * scales))), "flat": 1.0}
    ours = gdopt.minimize(curved, start, scale="curvature", learning_rate=0.25, max_steps=5)
    theirs = gdopt.minimize(curved, start, scale=sizes, learning_rate=0.25, max_steps=5)
    np.testing.assert_array_equal(ours.params["x"], theirs.params["x"])
    assert ours.loss < 0.2 * ours.history.loss[0]


def test_losses_and_params_of_any_size() -> None:
    for factor in (1e-15, 1e-5, 1e5, 1e15):
        result = gdopt.minimize(
            lambda p, factor=factor: factor * (p["a"] * 1e-10 - 1) ** 2 + factor * (p["b"] * 1e10 - 1) ** 2,
            START,
            scale="curvature",
            learning_rate=0.5,
        )
        assert result.success
        assert float(result.params["a"]) == pytest.approx(1e10, rel=1e-2)
        assert float(result.params["b"]) == pytest.approx(1e-10, rel=1e-2)


def test_the_callback_and_the_aux_see_params_in_their_own_units() -> None:
    seen = []
    result = gdopt.minimize(
        lambda p: (line(p), p["b"]),
        START,
        scale=SIZES,
        has_aux=True,
        callback=lambda report: seen.append(report.params),
        max_steps=10,
        learning_rate=0.5,
    )
    assert seen[-1] == result.params
    assert result.aux == result.params["b"]
    assert line(result.params) == pytest.approx(result.loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore:this call differs from the run saved in .*max_steps=")
def test_a_checkpoint_resumes_a_scaled_run_and_no_other(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": optax.adam, "learning_rate": 0.1, "scale": "curvature"}
    whole = gdopt.minimize(line, START, max_steps=100, **options)
    gdopt.minimize(line, START, max_steps=40, checkpoint=tmp_path / "run", **options)
    resumed = gdopt.minimize(line, START, max_steps=100, checkpoint=tmp_path / "run", **options)
    assert "resumed from step 40" in resumed.message
    assert resumed.params == whole.params
    np.testing.assert_array_equal(resumed.history.loss, whole.history.loss)
    for other in (None, {"a": 1.0, "b": 2.0}):
        with pytest.raises(InputError, match="of another run: its scale is"):
            gdopt.minimize(line, START, max_steps=100, checkpoint=tmp_path / "run", **{**options, "scale": other})


def test_scales_of_subtrees_arrays_and_held_leaves() -> None:
    start = {"layer": {"w": jnp.ones(3), "b": jnp.ones(())}, "held": jnp.ones(2), "name": "a string"}
    loss = lambda p: jnp.sum(p["layer"]["w"] ** 2) + p["layer"]["b"] ** 2 + jnp.sum(p["held"])
    trainable = {"layer": True, "held": False, "name": False}
    subtree = {"layer": 4.0, "held": 1.0, "name": 1.0}
    each = {**subtree, "layer": {"w": np.full(3, 4), "b": 4}}
    results = [
        gdopt.minimize(loss, start, trainable=trainable, scale=scale, learning_rate=0.01)
        for scale in (4, subtree, each)
    ]
    for result in results:
        np.testing.assert_array_equal(result.history.loss, results[0].history.loss)
        assert result.params["name"] == "a string"
        assert (result.params["held"] == 1).all()


def test_complex_params() -> None:
    loss = lambda z: jnp.abs(1e-3 * z[0] - 1) ** 2 + jnp.abs(1e3 * z[1] - 1j) ** 2
    start = jnp.zeros(2, jnp.complex64)
    for scale in ("curvature", jnp.array([1e3, 1e-3])):
        result = gdopt.minimize(loss, start, scale=scale, learning_rate=0.3)
        assert result.success
        np.testing.assert_allclose(result.params, [1e3, 1e-3j], rtol=0.02)


@pytest.mark.parametrize("scale", ["curvature", SIZES])
def test_inside_of_transformations(scale: Any) -> None:
    def solution(target: Any) -> Any:
        loss = lambda p: line(p) + 1e-3 * (p["a"] - target) ** 2
        return gdopt.minimize(loss, START, scale=scale, tol=1e-8).params

    outside, inside = solution(jnp.float32(3.0)), jax.jit(solution)(3.0)
    many = jax.vmap(solution)(jnp.array([3.0, 4.0]))
    slope = jax.grad(lambda target: solution(target)["b"])(3.0)
    exact = jax.grad(lambda target: _exact(target)[1])(3.0)
    for name in START:
        assert float(inside[name]) == pytest.approx(float(outside[name]), rel=1e-4)
        assert float(many[name][0]) == pytest.approx(float(outside[name]), rel=1e-4)
    assert float(slope) == pytest.approx(float(exact), rel=1e-2)


def _exact(target: Any) -> jax.Array:
    """The minimum of the quadratic, with b in units of 1e4."""
    rows = jnp.stack([jnp.ones_like(X), 1e4 * X], axis=1) / 10
    left = rows.T @ rows + jnp.diag(jnp.array([1e-3, 0.0]))
    right = rows.T @ Y / 10 + jnp.stack([1e-3 * target, jnp.float32(0)])
    return jnp.linalg.solve(left, right) * jnp.array([1, 1e4])


def test_a_traced_scale() -> None:
    solve = lambda size: gdopt.minimize(line, START, scale={"a": 1.0, "b": size}).params["b"]
    assert float(jax.jit(solve)(1e4)) == pytest.approx(50_000, rel=1e-3)
    assert float(jax.grad(solve)(1e4)) == 0


def test_other_sizes_compile_nothing() -> None:
    solve = lambda size: gdopt.minimize(line, START, scale={"a": 1.0, "b": jnp.float32(size)})
    solve(1e4)
    gdopt.minimize(line, START, scale="curvature")
    with count_compilations() as counter:
        assert solve(3e3).success
        gdopt.minimize(line, START, scale="curvature")
    assert counter.count == 0, counter.names


def test_mini_batches() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([np.ones(256), rng.uniform(0, 1e-4, 256)], 1).astype(np.float32)
    targets = rows @ np.array([1, 5e4], np.float32)
    loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    options: dict[str, Any] = {"data": (rows, targets), "batch_size": 32, "epochs": 60, "learning_rate": 0.5}
    result = gdopt.minimize(loss, jnp.zeros(2), scale=jnp.array([1, 1e4]), **options)
    np.testing.assert_allclose(result.params, [1, 5e4], rtol=1e-2)


def test_a_diagnosis_is_in_the_units_of_the_params() -> None:
    loss = lambda p: jnp.sqrt(p["a"]) + p["b"] ** 2
    result = gdopt.minimize(loss, {"a": -3.0, "b": 1.0}, scale=SIZES | {"a": 2.0**10}, learning_rate=0.1)
    assert "sqrt from -3" in gdopt.diagnose(result).message


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("largest", "scale='largest' is unknown. Pass 'curvature'"),
        ({"a": 1.0}, "does not fit params. Pass a positive number for each leaf"),
        ({"a": 1.0, "b": 0.0}, r"scale\['b'\] holds 0. Pass sizes from 1.2e-38 to 3.4e\+38, the range of float32"),
        ({"a": 1.0, "b": -2}, r"scale\['b'\] holds -2. Pass sizes from"),
        ({"a": 1.0, "b": float("nan")}, r"scale\['b'\] holds nan"),
        ({"a": 1.0, "b": 1e-60}, r"scale\['b'\] holds 1e-60. Pass sizes from"),
        ({"a": 1.0, "b": 1e-45}, r"scale\['b'\] holds 1e-45. Pass sizes from"),
        ({"a": 1.0, "b": 10**400}, r"scale\['b'\] holds inf. Pass sizes from"),
        ({"a": 1.0, "b": 1j}, r"scale\['b'\] is 1j. Pass a positive number"),
        ({"a": 1.0, "b": True}, r"scale\['b'\] is True. Pass a positive number"),
        ({"a": 1.0, "b": jax.random.key(0)}, r"scale\['b'\] is Array.*key.*"),
        ({"a": 1.0, "b": np.ma.array(2.0)}, r"scale\['b'\] is a masked array"),
        ({"a": 1.0, 1: 2.0}, "does not fit params"),
        ({"a": 1.0, "b": "large"}, r"scale\['b'\] is 'large'. Pass a positive number"),
        ({"a": 1.0, "b": np.ones(2)}, r"scale\['b'\] has shape \(2,\), but params\['b'\] has \(\)"),
    ],
)
def test_bad_scales(scale: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gdopt.minimize(line, START, scale=scale)


def test_a_start_that_the_scale_makes_infinite() -> None:
    with pytest.raises(InputError, match="params / scale starts with inf"):
        gdopt.minimize(lambda x: x**2, 1e20, scale=1e-30)


@pytest.mark.parametrize(("start", "scale"), [(1.1e-9, 1e30), (1e-10, 1e30), (np.float16(0.003), 1000.0)])
def test_a_scale_that_takes_digits_from_the_start(start: Any, scale: float) -> None:
    with pytest.raises(InputError, match=r"divided by it is too small for float.*Pass a smaller size"):
        gdopt.minimize(lambda x: (x - 1) ** 2, start, scale=scale)


def test_curvature_takes_no_digits_from_the_start() -> None:
    flat = lambda p: jnp.sum(1e-30 * (p - 1) ** 2)
    result = gdopt.minimize(flat, jnp.full(2, 1e-30), scale="curvature", learning_rate=0.25, max_steps=0 + 1)
    assert result.history is not None
    assert result.history.loss[0] == flat(jnp.full(2, 1e-30))


def test_traced_sizes_that_are_none_are_no_success() -> None:
    solve = jax.jit(lambda size: gdopt.minimize(lambda x: (x - 1) ** 2, 0.0, scale=size).success)
    assert solve(2.0)
    assert not any(solve(size) for size in (-1.0, 0.0, jnp.nan))


def test_params_that_only_the_scale_makes_large() -> None:
    rosenbrock = lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
    result = gdopt.minimize(rosenbrock, jnp.array([-1.2, 1.0]), scale=1e-16, max_steps=8)
    assert "lower bound" not in result.message


def test_a_gradient_that_only_the_scale_makes_infinite() -> None:
    result = gdopt.minimize(lambda p: (1e10 * p - 1.0) ** 2, 1.0, scale=1e30, learning_rate=0.1)
    assert "gradient times scale is inf at the start" in result.message


def test_no_advice_to_pass_the_scale_that_was_passed() -> None:
    loss = lambda p: 0.5 * (p["a"] - 1) ** 2 + 0.5 * (p["b"] - 1) ** 2
    sizes = {"a": 1.0, "b": 1e-3}
    result = gdopt.minimize(
        loss, {"a": 3.0, "b": 0.0}, scale=sizes, optimizer=gdopt.gd, learning_rate=0.5, max_steps=250
    )
    assert "Divided by scale, params['b'] and params['a'] differ in scale" in result.message
    assert "Pass other sizes" in result.message


def test_curvatures_beyond_float32() -> None:
    with jax.enable_x64(True):
        loss = lambda p: jnp.sum((p["a"] * 1e20 - 1) ** 2) + jnp.sum(jnp.cos(p["b"]) * 0)
        start = {"a": jnp.zeros(2), "b": jnp.ones(1)}
        sizes = {"a": 2.0**-67, "b": 2.0**-67}
        runs = [
            gdopt.minimize(loss, start, scale=scale, learning_rate=0.1, max_steps=3) for scale in ("curvature", sizes)
        ]
        assert jax.tree.map(float, runs[0].params["a"][0]) == float(runs[1].params["a"][0])
        assert runs[0].grad_norm == runs[1].grad_norm


def test_probes_of_float16() -> None:
    k = jnp.asarray(np.r_[np.full(40, 8000.0), np.ones(40)], jnp.float16)
    loss, start = lambda p: jnp.sum(k * p * p / 2), jnp.full(80, 0.01, jnp.float16)
    result = gdopt.minimize(loss, start, scale="curvature", learning_rate=0.5, max_steps=20)
    assert result.loss < 1e-6


def test_bad_options_are_refused_before_the_curvature_is_computed() -> None:
    start = jnp.ones(5)
    with count_compilations() as counter, pytest.raises(InputError, match="tol=-1"):
        gdopt.minimize(lambda p: jnp.sum(jnp.cos(p)), start, scale="curvature", tol=-1)
    assert counter.count == 0, counter.names


def test_curvature_is_not_for_noisy_losses() -> None:
    with pytest.raises(InputError, match="scale='curvature' was given for a noisy loss"):
        gdopt.minimize(lambda x, key: x**2, 1.0, with_key=True, scale="curvature")


def test_curvature_needs_second_derivatives() -> None:
    @jax.custom_vjp
    def square(x: Any) -> Any:
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (jax.pure_callback(lambda x: 2 * x, x, x) * g,))
    with pytest.raises(InputError, match="scale='curvature' needs second derivatives"):
        gdopt.minimize(square, 1.0, scale="curvature")
