"""Bounds, projections and proximal steps: where they end, what they claim, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from helpers import count_compilations, shared_traces

import gdopt
from gdopt import Status

P = optax.projections
ROWS = np.random.default_rng(3).normal(size=(40, 8)).astype(np.float32)
RIGHT = np.random.default_rng(4).normal(size=40).astype(np.float32)


def least_squares(x: jax.Array, right: Any = RIGHT) -> jax.Array:
    return jnp.mean((ROWS @ x - right) ** 2)


class Soft(NamedTuple):
    """The proximal step of an l1 penalty."""

    weight: Any = 0.2

    def __call__(self, x: jax.Array, rate: jax.Array) -> jax.Array:
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - rate * self.weight, 0)

    def value(self, x: jax.Array) -> jax.Array:
        return self.weight * jnp.abs(x).sum()


def plain_soft(x: jax.Array, rate: jax.Array) -> jax.Array:
    return Soft()(x, rate)


PROJECTIONS: dict[str, Any] = {
    "simplex": P.projection_simplex,
    "l1_ball": lambda x: P.projection_l1_ball(x, 0.2),
    "l2_ball": lambda x: P.projection_l2_ball(x, 0.2),
    "non_negative": P.projection_non_negative,
    "box": lambda x: P.projection_box(x, -0.05, 0.1),
    "hypercube": P.projection_hypercube,
    "plane": lambda x: x - jnp.mean(x) + 0.1,
}
STEPS: dict[str, Any] = {name: {"project": function} for name, function in PROJECTIONS.items()}
STEPS |= {"prox": {"prox": Soft()}, "prox without value": {"prox": plain_soft}, "bounds": {"bounds": (-0.05, 0.1)}}


def reference(given: dict[str, Any]) -> np.ndarray:
    """Return the minimum by many plain projected or proximal steps in float64."""
    step = given.get("project") or given.get("prox") or (lambda x: jnp.clip(x, *given["bounds"]))
    rows, right = ROWS.astype(np.float64), RIGHT.astype(np.float64)
    rate = 0.4 / np.linalg.eigvalsh(rows.T @ rows / len(rows)).max()
    with jax.enable_x64(True):
        x = jnp.full(8, 0.125)
        extra = (rate,) if "prox" in given else ()
        body = lambda _, x: step(x - rate * 2 * (rows.T @ (rows @ x - right)) / len(rows), *extra)
        return np.asarray(jax.jit(lambda x: jax.lax.fori_loop(0, 3000, body, x))(x))


# --- where it ends ---


@pytest.mark.parametrize("name", STEPS)
def test_ends_at_the_minimum_with_success(name: str) -> None:
    wanted = reference(STEPS[name])
    result = gdopt.minimize(least_squares, jnp.full(8, 0.125), tol=1e-7, **quiet(STEPS[name]))
    assert result.success, result.message
    np.testing.assert_allclose(result.params, wanted, atol=2e-3)
    inside = jax.jit(lambda: gdopt.minimize(least_squares, jnp.full(8, 0.125), tol=1e-7, **STEPS[name]))()
    assert inside.success
    np.testing.assert_allclose(inside.params, wanted, atol=2e-3)


def quiet(options: dict[str, Any]) -> dict[str, Any]:
    warnings.filterwarnings("ignore", ".* starts .*outside")
    return options


@pytest.mark.parametrize("optimizer", [gdopt.gd, optax.sgd, gdopt.spectral(), optax.sgd(0.1)])
@pytest.mark.parametrize("name", ["simplex", "bounds", "l2_ball"])
def test_optimizers_with_their_own_steps(name: str, optimizer: Any) -> None:
    rate = {} if isinstance(optimizer, optax.GradientTransformation) else {"learning_rate": 0.2}
    result = gdopt.minimize(
        least_squares, jnp.full(8, 0.125), optimizer=optimizer, tol=1e-7, **rate, **quiet(STEPS[name])
    )
    assert result.success, result.message
    np.testing.assert_allclose(result.params, reference(STEPS[name]), atol=3e-3)


UNITS = np.array([1e-6, 1e-3, 1.0, 1e3, 1e6])


def test_bounds_in_natural_units_end_where_scipy_does() -> None:
    """The entries differ by twelve orders of magnitude, and three of five end at a bound."""
    at = np.array([2.0, -1.0, 0.5, 3.0, -2.0]) * UNITS
    bend = np.array([[4, 1, 0, 0, 0], [1, 3, 1, 0, 0], [0, 1, 2, 1, 0], [0, 0, 1, 3, 1], [0, 0, 0, 1, 4.0]])
    lower, upper = -0.5 * UNITS, np.array([1.0, np.inf, 1, 2, np.inf]) * UNITS

    def loss(x: Any, np: Any = jnp) -> Any:
        z = (x - at) / UNITS
        return z @ bend @ z / 2 + np.sum(np.cosh(0.3 * z))

    with jax.enable_x64(True):
        result = gdopt.minimize(loss, jnp.asarray(0.1 * UNITS), bounds=(lower, upper), tol=1e-9)
    z = scipy.optimize.minimize(
        lambda z: loss(z * UNITS, np),
        np.full(5, 0.1),
        bounds=list(zip(lower / UNITS, upper / UNITS, strict=True)),
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    assert result.success
    assert float(result.loss) <= z.fun * (1 + 1e-8)
    np.testing.assert_array_equal(result.at_bounds, (z.x <= lower / UNITS) | (z.x >= upper / UNITS))
    assert f"{int(result.at_bounds.sum())} of 5 entries of the params are at their bounds" in result.message


def test_a_vertex_is_a_success_and_named() -> None:
    result = gdopt.minimize(lambda x: jnp.sum(x), jnp.array([0.5, 3.0, 8.0]), bounds=(jnp.array([0.0, 1.0, 2.0]), None))
    assert result.status is Status.CONVERGED
    np.testing.assert_array_equal(result.params, [0, 1, 2])
    assert result.grad_norm == 0
    assert "3 of 3 entries of the params are at their bounds" in result.message
    inner = gdopt.minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2), bounds=(-5.0, 5.0))
    assert "No entry of the params is at a bound" in inner.message
    assert not inner.at_bounds.any()


def test_a_saddle_within_a_set_is_no_minimum() -> None:
    """From the saddle the loss falls to the walls on both sides."""
    loss = lambda x: (x[0] - 0.2) ** 2 - x[1] ** 2
    walls = gdopt.minimize(loss, jnp.array([0.5, 0.0]), bounds=(-1.0, 2.0))
    assert (walls.success and abs(float(walls.params[1])) >= 1) or not walls.success
    ball = gdopt.minimize(loss, jnp.array([0.5, 0.0]), project=P.projection_l2_ball)
    assert not ball.success or float(ball.loss) < -0.5


def test_the_loss_is_never_evaluated_outside() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return -jnp.log(x[0]) + x[0] / 3 + jnp.sqrt(x[1]) * 2 + (x[2] - 0.5) ** 2  # NaN below zero

    seen: list[float] = []
    noted = lambda x: jax.debug.callback(lambda x: seen.append(float(x.min())), x) or loss(x)
    result = gdopt.minimize(noted, jnp.array([0.1, 2.0, 0.0]), bounds=(0.0, None))
    jax.effects_barrier()
    assert result.success, result.message
    np.testing.assert_allclose(result.params, [3, 0, 0.5], atol=2e-2)
    assert min(seen) >= 0


def test_keeps_within_on_batches() -> None:
    seen: list[Any] = []
    options = {"data": (ROWS, RIGHT), "batch_size": 8, "epochs": 100, "callback_every": 50}
    loss = lambda x, batch: jnp.mean((batch[0] @ x - batch[1]) ** 2)
    for given in (STEPS["bounds"], STEPS["simplex"], STEPS["prox"]):
        result = gdopt.minimize(
            loss, jnp.full(8, 0.125), callback=lambda r: seen.append(r.params), **options, **quiet(given)
        )
        assert result.success, result.message
        start = float(least_squares(jnp.full(8, 0.125)))
        assert float(least_squares(result.params)) < start
        if "bounds" in given:
            assert all((x >= np.float32(-0.05)).all() and (x <= np.float32(0.1)).all() for x in seen)
        if "project" in given:
            assert all(abs(float(x.sum()) - 1) < 1e-5 and (x >= 0).all() for x in seen)
        seen.clear()


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", ["simplex", "l1_ball", "l2_ball", "prox"])
def test_batches_end_near_the_minimum_without_a_rate(name: str, unit: float) -> None:
    """Five epochs of ten steps, with inputs in natural units: a range test of 15 % of them finds nothing."""
    rows = unit * np.random.default_rng(8).normal(size=(200, 6)).astype(np.float32)
    at = np.array([0.5, 0.3, 0, 0.2, 0, 0], np.float32)
    data = rows, rows @ at + 0.1 * unit * np.random.default_rng(9).normal(size=200).astype(np.float32)
    given: dict[str, Any] = {"prox": gdopt.prox.l1(0.05 * unit**2)} if name == "prox" else STEPS[name]
    loss = lambda x, batch: jnp.mean((batch[0] @ x - batch[1]) ** 2)
    start = jnp.full(6, 1 / 6 if name == "simplex" else 0.0)
    total = lambda x: float(loss(x, data)) + (float(given["prox"].value(x)) if name == "prox" else 0)
    result = gdopt.minimize(loss, start, data=data, batch_size=20, epochs=5, **quiet(given))
    exact = gdopt.minimize(loss, start, args=(data,), tol=1e-7, **given)
    assert result.success, result.message
    assert total(result.params) - total(exact.params) <= 0.01 * (total(start) - total(exact.params))


def test_optax_projections_on_a_masked_tree() -> None:
    """A leaf on the simplex, and another one free."""
    start = {"weights": jnp.full(4, 0.25), "offset": jnp.zeros(())}
    target = jnp.array([0.9, 0.4, -0.3, 0.1])
    project = lambda params: {**params, "weights": P.projection_simplex(params["weights"])}
    loss = lambda params: jnp.sum((params["weights"] - target) ** 2) + (params["offset"] - 7) ** 2
    result = gdopt.minimize(loss, start, project=project, tol=1e-7)
    assert result.success
    np.testing.assert_allclose(result.params["weights"], [0.75, 0.25, 0, 0], atol=1e-3)
    np.testing.assert_allclose(result.params["offset"], 7, atol=1e-2)


# --- the forms of bounds ---


@pytest.mark.parametrize(
    "bounds",
    [
        (0.0, 1.0),
        (np.zeros(2), np.ones(2)),
        (jnp.zeros(2), 1),
        [(0, 1), (0.0, 1.0)],
        ((0, 1), (0, 1)),
        scipy.optimize.Bounds(cast(Any, [0, 0]), cast(Any, [1, 1])),
    ],
)
def test_forms_for_a_flat_array(bounds: Any) -> None:
    result = gdopt.minimize(lambda x: jnp.sum((x - jnp.array([-1.0, 3.0])) ** 2), jnp.full(2, 0.5), bounds=bounds)
    np.testing.assert_array_equal(result.params, [0, 1])


def test_prefixes_and_none() -> None:
    start = {"a": {"x": jnp.zeros(2), "y": 0.0}, "b": 1.0, "name": "held"}
    loss = lambda p: jnp.sum((p["a"]["x"] - 3) ** 2) + (p["a"]["y"] + 3) ** 2 + (p["b"] - 9) ** 2
    result = gdopt.minimize(
        loss,
        start,
        bounds=({"a": -1.0, "b": None, "name": None}, {"a": {"x": 2.0, "y": None}, "b": None, "name": None}),
    )
    np.testing.assert_allclose(result.params["a"]["x"], 2)
    np.testing.assert_allclose([result.params["a"]["y"], result.params["b"]], [-1, 9], rtol=1e-3)
    assert jax.tree.structure(result.at_bounds) == jax.tree.structure(result.params)
    assert result.at_bounds["a"]["x"].all()
    assert not result.at_bounds["b"]


def test_pairs_with_none_are_no_bounds() -> None:
    result = gdopt.minimize(lambda x: jnp.sum((x - 5) ** 2), jnp.zeros(3), bounds=[(None, 1), (0, None), (None, None)])
    np.testing.assert_allclose(result.params, [1, 5, 5], rtol=1e-2)


def test_a_start_outside_is_moved_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"params\['x'\] starts with 7.0 at index \(1,\), which is outside"):
        result = gdopt.minimize(
            lambda p: jnp.sum(p["x"] ** 2), {"x": jnp.array([1.0, 7.0])}, bounds=(0.5, 2.0), max_steps=1
        )
    assert float(result.history.loss[0]) == 5.0
    with pytest.warns(UserWarning, match="outside of the set of project="):
        gdopt.minimize(least_squares, jnp.ones(8), project=P.projection_simplex, max_steps=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_start_that_is_moved_keeps_its_dtype(dtype: str) -> None:
    start = {"a": jnp.full(3, 0.1, dtype), "b": jnp.ones(2, dtype)}
    loss = lambda p: jnp.sum((p["a"].astype("float32") - 1.7) ** 2) + jnp.sum(p["b"].astype("float32") ** 2)
    with pytest.warns(UserWarning, match="outside of its bounds"):
        result = gdopt.minimize(loss, start, bounds=(0.5, 2.0), max_steps=20)
    assert {leaf.dtype.name for leaf in result.params.values()} == {dtype}
    np.testing.assert_allclose(result.params["a"].astype("float32"), 1.7, rtol=0.02)


def test_equal_bounds_fix_an_entry() -> None:
    bounds = np.array([1.0, 0.0]), np.array([1.0, 9.0])
    result = gdopt.minimize(lambda x: jnp.sum((x - 3) ** 2), jnp.ones(2), bounds=bounds)
    assert result.success
    np.testing.assert_allclose(result.params, [1, 3], rtol=1e-3)


def test_scale_keeps_the_bounds_in_units_of_the_params() -> None:
    loss = lambda x: jnp.sum((x * jnp.array([1e6, 1.0]) - 5) ** 2)
    options: Any = {"scale": np.array([1e-6, 1.0]), "bounds": (0.0, np.array([3e-6, 9.0]))}
    result = gdopt.minimize(loss, jnp.array([1e-6, 1.0]), **options)
    np.testing.assert_allclose(result.params, [3e-6, 5], rtol=1e-3)
    assert result.at_bounds.tolist() == [True, False]


# --- bad input, before anything compiles ---

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "order": (
        {"bounds": (1.0, np.array([2.0, 0.0]))},
        r"params\[?.*lower one above the upper one at index \(1,\): 1.0 > 0.0",
    ),
    "nan": ({"bounds": (np.nan, None)}, r"bounds\[0\] holds nan"),
    "no room": ({"bounds": (None, -np.inf)}, r"bounds\[1\] holds -inf"),
    "structure": ({"bounds": ({"a": 0.0}, None)}, r"bounds\[0\]=.* does not fit params"),
    "lists": ({"bounds": ([0.0, 1.0], None)}, r"For an array, pass np.array\(\[...\]\) instead of a list"),
    "shape": ({"bounds": (np.zeros(3), None)}, r"bounds\[0\] has shape \(3,\), but params has \(2,\)"),
    "no pair": ({"bounds": 3.0}, "bounds=.* is not a pair"),
    "text": ({"bounds": ("0", None)}, r"bounds\[0\] is '0'"),
    "bool": ({"bounds": (True, None)}, r"bounds\[0\] is True"),
    "both": ({"bounds": (0.0, 1.0), "project": P.projection_simplex}, "bounds and project were both given"),
    "both steps": ({"prox": plain_soft, "project": P.projection_simplex}, "project and prox were both given"),
    "no function": ({"project": 3}, "project=3 is not a function"),
    "other shape": ({"project": lambda x: x[:1]}, r"project returned float32\[1\] for params, which is float32\[2\]"),
    "other dtype": ({"project": lambda x: x.astype(jnp.float16)}, r"project returned float16\[2\] for params"),
    "other structure": (
        {"project": lambda x: (x, x)},
        "project returned a tuple for params. Return the same structure",
    ),
    "not idempotent": ({"project": lambda x: x / 2}, "project moves its own result"),
    "prox shape": ({"prox": lambda x, rate: x[:1]}, r"prox returned float32\[1\] for params"),
    "scaled": ({"project": P.projection_simplex, "scale": 2.0}, r"project= was given with scale="),
    "owns its rate": ({"prox": plain_soft, "optimizer": optax.adam(0.1)}, "owns its rate, which prox"),
    "average": (
        {"bounds": (0.0, 1.0), "optimizer": optax.contrib.schedule_free_sgd(0.1)},
        "returns an average of its points",
    ),
    "pairs": ({"project": P.projection_simplex, "optimizer": gdopt.quasi_newton()}, "takes bounds=, but no project="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(gdopt.InputError, match=message):
        gdopt.minimize(lambda x: jnp.sum(x**2), jnp.array([0.4, 0.6]), **options)


def test_bounds_of_complex_and_of_held_leaves_are_refused() -> None:
    with pytest.raises(gdopt.InputError, match=r"params\['z'\] is complex"):
        gdopt.minimize(lambda p: jnp.abs(p["z"]) ** 2, {"z": jnp.ones((), complex)}, bounds=(0.0, 1.0))
    start = {"x": 1.0, "n": np.int32(3)}
    options: Any = {"trainable": {"x": True, "n": False}, "bounds": ({"x": 0.0, "n": 0}, None)}
    with pytest.raises(gdopt.InputError, match=r"bounds\[0\]\['n'\] is a bound for params\['n'\], which is not"):
        gdopt.minimize(lambda p: p["x"] ** 2, start, **options)


# --- programs, checkpoints, transformations ---


def test_new_bounds_and_weights_compile_nothing() -> None:
    loss = lambda x: jnp.sum((x - 4) ** 2)
    run = lambda high: gdopt.minimize(loss, jnp.zeros(3), bounds=(-1.0, high))
    soft = lambda weight: gdopt.minimize(loss, jnp.zeros(3), prox=Soft(weight))
    run(2.0)
    soft(jnp.float32(0.5))
    with count_compilations() as compiled:
        np.testing.assert_array_equal(run(3.0).params, 3)
        np.testing.assert_allclose(soft(jnp.float32(1.0)).params, 3.5, rtol=1e-3)
    assert compiled.names == []


def test_a_run_without_constraints_has_no_more_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = shared_traces(monkeypatch)
    loss = lambda x: jnp.sum(jnp.cosh(x - 0.3))
    gdopt.minimize(loss, jnp.zeros(5))
    texts = [str(trace) for trace in shared]
    assert texts
    assert not any("clamp" in text for text in texts)


def test_resumes_bit_for_bit_and_refuses_other_bounds(tmp_path: Path) -> None:
    loss = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    options: Any = {"bounds": (-2.0, 0.7)}
    whole = gdopt.minimize(loss, jnp.array([-1.2, 0.5]), max_steps=30, **options)
    gdopt.minimize(loss, jnp.array([-1.2, 0.5]), max_steps=12, checkpoint=tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="max_steps"):
        resumed = gdopt.minimize(loss, jnp.array([-1.2, 0.5]), max_steps=30, checkpoint=tmp_path / "run", **options)
    np.testing.assert_array_equal(whole.history.loss, resumed.history.loss)
    np.testing.assert_array_equal(whole.params, resumed.params)
    with pytest.raises(gdopt.InputError, match="its constraint is bounds"):
        gdopt.minimize(loss, jnp.array([-1.2, 0.5]), max_steps=30, checkpoint=tmp_path / "run", bounds=(-2.0, 0.6))
    with pytest.raises(gdopt.InputError, match=r"its constraint is bounds .* but here it is nothing"):
        gdopt.minimize(loss, jnp.array([-1.2, 0.5]), max_steps=30, checkpoint=tmp_path / "run")


def test_vmap_over_starts_and_bounds() -> None:
    loss = lambda x: jnp.sum((x - 2) ** 2)
    one = lambda high: gdopt.minimize(loss, jnp.zeros(2), bounds=(-1.0, high))
    many = jax.vmap(one)(jnp.array([0.5, 1.0, 5.0]))
    np.testing.assert_allclose(many.params, np.array([[0.5, 0.5], [1, 1], [2, 2]]), atol=1e-2)
    assert np.all(many.success)
    assert many.at_bounds.tolist() == [[True, True], [True, True], [False, False]]


# --- derivatives ---


def differences(function: Any, x: np.ndarray, step: float = 1e-4) -> np.ndarray:
    columns = [(function(x + step * e) - function(x - step * e)) / (2 * step) for e in np.eye(len(x))]
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("name", ["bounds", "simplex", "l1_ball", "l2_ball", "prox"])
def test_derivatives_are_those_of_differences(name: str) -> None:
    with jax.enable_x64(True):
        start, right = jnp.full(8, 0.05), RIGHT.astype(np.float64)
        options = {"tol": 1e-13, **STEPS[name]}
        run = jax.jit(lambda right: gdopt.minimize(least_squares, start, args=(right,), **options))
        assert run(right).success
        wanted = differences(lambda right: np.asarray(run(right).params), right)
        for differentiate in (jax.jacrev, jax.jacfwd):
            found = differentiate(lambda right: run(right).params)(right)
            np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max() + 1e-9)
        of_loss = differences(lambda right: np.asarray(run(right).loss)[None], right)[0]
        np.testing.assert_allclose(jax.grad(lambda right: run(right).loss)(right), of_loss, atol=1e-6)


def test_derivatives_by_the_bounds_themselves() -> None:
    with jax.enable_x64(True):
        right = RIGHT.astype(np.float64)
        run = jax.jit(
            lambda high: (
                gdopt.minimize(least_squares, jnp.zeros(8), args=(right,), tol=1e-13, bounds=(-0.02, high)).params
            )
        )
        high = np.linspace(0.02, 0.05, 8)
        wanted = differences(lambda high: np.asarray(run(high)), high)
        np.testing.assert_allclose(jax.jacobian(run)(high), wanted, atol=1e-3)
        assert 0 < np.trace(wanted) < 8


def test_a_degenerate_bound_has_no_derivative() -> None:
    """The minimum without the bound lies at the bound, so the derivative differs on both sides."""
    run = lambda c: gdopt.minimize(lambda x: jnp.sum((x - c) ** 2), jnp.ones(2), bounds=(0.0, None)).params
    assert np.isnan(jax.jacobian(run)(jnp.array([0.0, 1.0]))).any()
    np.testing.assert_allclose(jax.jacobian(run)(jnp.array([-1.0, 1.0])), [[0, 0], [0, 1]], atol=1e-4)


# --- what cannot be checked before a run ---


def test_traced_bounds_that_cross_are_no_success() -> None:
    run = jax.jit(lambda high: gdopt.minimize(lambda x: jnp.sum((x - 3) ** 2), jnp.zeros(2), bounds=(1.0, high)))
    crossed = run(0.0)
    assert not crossed.success
    assert np.isnan(crossed.params).all()
    assert run(2.0).success
    np.testing.assert_array_equal(run(2.0).params, [2, 2])


@pytest.mark.parametrize("name", ["simplex", "l2_ball", "prox"])
def test_a_start_with_values_inside_jit(name: str) -> None:
    start = jnp.full(8, 0.125)
    inside = jax.jit(lambda right: gdopt.minimize(least_squares, start, args=(right,), **STEPS[name]))(RIGHT)
    assert inside.success
    np.testing.assert_allclose(inside.params, reference(STEPS[name]), atol=2e-2)


def test_a_set_that_is_not_convex_is_no_success() -> None:
    loss = lambda x: jnp.sum((x - jnp.array([3.0, -2.0, 0.5])) ** 2)
    start = jnp.full(3, 0.4)
    result = gdopt.minimize(loss, start, **quiet({"project": jnp.round}))
    assert result.status is Status.STALLED
    assert "project moves this point" in result.message
    assert not jax.jit(lambda: gdopt.minimize(loss, start, project=jnp.round))().success


def test_a_projection_may_not_mix_params_with_leaves_that_are_held() -> None:
    target = jnp.array([3.0, -2.0, 0.5])
    loss = lambda p: jnp.sum((p["k"] - target) ** 2) + p["m"]
    start = {"k": jnp.full(3, 1 / 3), "m": jnp.float32(2)}
    options: Any = {"trainable": {"k": True, "m": False}}
    with pytest.raises(gdopt.InputError, match=r"project moves params\['m'\] together with the params"):
        gdopt.minimize(loss, start, project=P.projection_simplex, **options)
    # At a start within the set nothing moves yet.
    inside = {"k": jnp.full(3, 0.1), "m": jnp.float32(0.1)}
    for name, disc in (("project", P.projection_l2_ball), ("prox", lambda p, rate: P.projection_l2_ball(p))):
        with pytest.raises(gdopt.InputError, match=rf"{name} moves params\['m'\] together with the params"):
            gdopt.minimize(loss, inside, **{name: disc}, **options)
    # What treats each leaf by itself may move them, because the run drops that part.
    start["m"] = jnp.float32(-2)
    alone = gdopt.minimize(loss, start, project=P.projection_non_negative, **options)
    np.testing.assert_allclose(alone.params["k"], [3, 0, 0.5], atol=1e-2)
    assert alone.params["m"] == -2
    assert gdopt.minimize(loss, start, prox=gdopt.prox.l1(0.5), **options).success


@pytest.mark.parametrize("name", ["small", "among large ones", "from afar"])
def test_a_projection_may_round_by_the_largest_entry(name: str) -> None:
    size = 1e3 if name == "among large ones" else 1e-6
    units = np.array([1e3, 1e-3, 1e-3] if name == "among large ones" else [1e-6] * 3, np.float32)
    start = (
        jnp.asarray(np.float32(1e3) * units)
        if name == "from afar"
        else jnp.asarray(units * np.array([0.6, 0.1, 0.2], np.float32))
    )
    parts: Any = lambda x: {"a": x[:1], "b": x[1:]}
    loss = lambda p: sum(jnp.sum((p[k] / u - 1) ** 2) for k, u in parts(units).items())
    options: Any = quiet({"project": lambda p: P.projection_l1_ball(p, size)})
    result = gdopt.minimize(loss, parts(start), max_steps=100, **options)
    total = float(np.abs(np.concatenate(jax.tree.leaves(result.params))).sum())
    assert result.loss < loss(parts(start))
    assert total <= size * (1 + 1e-3)
    assert result.success or name == "among large ones"


# --- kinks ---

LABELS = np.sign(ROWS[:, :3] @ np.array([3.0, -2.0, 0.1], np.float32))
KINKS: dict[str, tuple[Any, dict[str, Any], float]] = {
    # The last number is the least loss with the penalty, by linear programs.
    "distance, l1": (lambda x: jnp.abs(x - jnp.array([3.0, -2.0, 0.5])).sum(), {"prox": gdopt.prox.l1(0.5)}, 2.75),
    "largest, ball": (
        lambda x: jnp.abs(x - jnp.array([3.0, -2.0, 0.5])).max(),
        {"project": P.projection_l2_ball},
        2.0,
    ),
    "hinge, box": (
        lambda x: jnp.mean(jax.nn.relu(1 - LABELS * (ROWS[:, :3] @ x))),
        {"prox": gdopt.prox.box(-0.5, 0.5)},
        np.nan,
    ),
    "hinge, simplex": (
        lambda x: jnp.mean(jax.nn.relu(1 - LABELS * (ROWS[:, :3] @ x))),
        {"project": P.projection_simplex},
        np.nan,
    ),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_minimum_at_a_kink_within_a_set_is_a_success(name: str) -> None:
    loss, given, least = KINKS[name]
    start = jnp.full(3, 1 / 3) if "simplex" in name else jnp.zeros(3)
    result = gdopt.minimize(loss, start, **given)
    assert result.success, result.message
    least = least if np.isfinite(least) else least_hinge(0.5 if "box" in name else None)
    assert float(result.loss) - least <= max(float(result.left), 1e-5)
    assert float(result.left) <= 1e-2 * (float(loss(start)) - least)


def least_hinge(size: float | None) -> float:
    """Return the least mean hinge loss in a box, or on the simplex, by a linear program."""
    count = len(LABELS)
    rows = np.hstack([-LABELS[:, None] * ROWS[:, :3], -np.eye(count)])
    slack = [(0, None)] * count
    bounds = [(0, None)] * 3 if size is None else [(-size, size)] * 3
    equal = {} if size else {"A_eq": np.r_[np.ones(3), np.zeros(count)][None], "b_eq": [1.0]}
    cost = np.r_[np.zeros(3), np.full(count, 1 / count)]
    return scipy.optimize.linprog(cost, rows, -np.ones(count), bounds=[*bounds, *slack], **equal).fun


# --- what is told to be left ---


def test_what_is_left_is_told_on_ill_conditioned_rows() -> None:
    """The columns are correlated, so the steps gain ever less long before the minimum."""
    random = np.random.default_rng(11)
    common = random.normal(size=(60, 1))
    rows = (common + 0.03 * random.normal(size=(60, 25))) * 10.0 ** random.uniform(-1, 1, 25)
    right = rows @ random.normal(size=25) + 0.1 * random.normal(size=60)
    weight = 1e-3 * np.abs(rows.T @ right).max() / 60
    loss = lambda x: jnp.mean((rows @ x - right) ** 2) / 2
    with jax.enable_x64(True):
        options: Any = {"prox": gdopt.prox.l1(weight)}
        result = gdopt.minimize(loss, jnp.zeros(25), **options)
        exact = gdopt.minimize(loss, result.params, tol=1e-13, max_steps=100_000, **options)
    assert result.success, result.message
    assert float(result.loss) - float(exact.loss) <= 10 * float(result.left)
