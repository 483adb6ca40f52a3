"""The solvers that bounds.py compares, each as ``(form, goal, budget, seconds) -> Trace``, and their own endings.

A trace has the objective of each evaluation, infinite at params that are not feasible, until the goal. SciPy's methods
know bounds alone. For them the l1 penalty is split into two non-negative parts, and the simplex is the softmax of free
params.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax import lax
from sklearn.linear_model import Lasso

import gdopt
import natural_units
from bounded_problems import Problem
from solvers import Enough, Trace, jaxopt

NEARBY = 1e-3
CHUNK = 20  # updates of jaxopt's between two looks at the goal
NEAR = 1e-4  # of the largest weight: below this a weight may be zero
ROUNDING = 4 * float(np.finfo(float).eps)


class Form(NamedTuple):
    """A problem in the variables of SciPy's methods."""

    problem: Problem
    start: np.ndarray
    bounds: Any  # of the variables, or None
    params: Callable[[Any], Any]  # from the variables
    evaluate: Callable[[Any], Any]  # the value to minimise, its gradient, and the objective

    def objective(self, x: Any) -> float:
        """Of params."""
        return float(self.problem.objective(jnp.asarray(x, float)))


def make_form(problem: Problem) -> Form:
    """Compiled at the first evaluation, once for all of SciPy's methods."""
    size, weight = problem.start.size, problem.weight
    if problem.kind == "simplex":
        start, bounds = np.log(problem.start), None
        params = jax.nn.softmax
        value = lambda z: problem.loss(params(z))
    elif problem.kind == "l1":
        start, bounds = np.zeros(2 * size), scipy.optimize.Bounds(0, np.inf)
        params = lambda z: z[:size] - z[size:]
        value = lambda z: problem.loss(params(z)) + weight * jnp.sum(z)
    else:
        limits: Any = problem.lower, problem.upper
        start, bounds = problem.start, scipy.optimize.Bounds(*limits)
        params, value = (lambda z: z), problem.loss
    evaluate = jax.jit(lambda z: (*jax.value_and_grad(value)(z), problem.objective(params(z))))
    return Form(problem, start, bounds, params, evaluate)


Solver = Callable[[Form, float, int, float], Trace]


class End(NamedTuple):
    """How a solver ends by itself."""

    status: str
    success: bool
    params: Any = None
    left: float = math.nan  # what the result says of itself
    message: str = ""
    evaluations: int = 0


# --- gdopt.


def constraint(problem: Problem) -> dict[str, Any]:
    """The argument of minimize."""
    if problem.kind == "simplex":
        return {"project": optax.projections.projection_simplex}
    if problem.kind == "l1":
        return {"prox": gdopt.prox.l1(problem.weight)}
    return {"bounds": (problem.lower, problem.upper)}


def by_gdopt(**options: Any) -> Solver:
    """The subject. A run of N updates makes N + 1 evaluations."""

    def run(form: Form, goal: float, budget: int, _seconds: float) -> Trace:
        problem = form.problem
        limits = {"target": goal, "tol": 0, "max_steps": budget - 1}
        try:
            result = gdopt.minimize(problem.loss, problem.start, **limits, **constraint(problem), **options)
        except Exception as error:
            return Trace([], f"exception: {error!r}")
        assert result.history is not None
        feasible = math.isfinite(form.objective(result.params))
        return Trace(result.history.loss, "" if feasible else "result is not feasible")

    return run


def end_of_gdopt(**options: Any) -> Callable[[Form], End]:
    """The default call, but for the options."""

    def run(form: Form) -> End:
        problem = form.problem
        try:
            result = gdopt.minimize(problem.loss, problem.start, **constraint(problem), **options)
        except Exception as error:
            return End(f"exception: {type(error).__name__}", False, message=str(error))
        assert result.history is not None
        left = float(getattr(result, "left", math.nan))
        params = np.asarray(result.params, float)
        return End(result.status.name, result.success, params, left, result.message, len(result.history.loss))

    return run


# --- SciPy.


def run_scipy(
    form: Form,
    method: str,
    options: dict[str, Any],
    seconds: float,
    budget: float = math.inf,
    goal: float = -math.inf,
    start: Any = None,
) -> tuple[Any, list[float], str]:
    """A run of a method with bounds: its result (None if it was cut), the objectives, and a remark."""
    objectives: list[float] = []
    deadline = time.monotonic() + seconds

    def evaluate(z: np.ndarray) -> tuple[float, np.ndarray]:
        if len(objectives) >= budget:
            raise Enough
        if time.monotonic() > deadline:
            raise Enough(f"out of time after {len(objectives)} evaluations")
        value, grad, objective = form.evaluate(z)
        objectives.append(float(objective))
        if objectives[-1] <= goal:
            raise Enough
        return float(value), np.asarray(grad)

    start = form.start if start is None else start
    settings = {"jac": True, "method": method, "bounds": form.bounds, "options": options}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of overflows in its line searches
        try:
            return scipy.optimize.minimize(evaluate, start, **settings), objectives, ""
        except Enough as enough:
            return None, objectives, str(enough)
        except Exception as error:
            return None, objectives, f"exception: {error!r}"


def by_scipy(method: str, **options: Any) -> Solver:
    """One of SciPy's methods at its defaults, but for the options."""

    def run(form: Form, goal: float, budget: int, seconds: float) -> Trace:
        _, objectives, remark = run_scipy(form, method, options, seconds, budget, goal)
        return Trace(objectives, remark)

    return run


def end_of_scipy(method: str) -> Callable[[Form], End]:
    """The call at its defaults."""

    def run(form: Form) -> End:
        found, objectives, remark = run_scipy(form, method, {}, 60)
        if found is None:
            return End(remark, False, evaluations=len(objectives))
        params = np.asarray(form.params(jnp.asarray(found.x)))
        return End(f"{found.status}", bool(found.success), params, message=str(found.message), evaluations=found.nfev)

    return run


# --- jaxopt. Its solvers see the loss alone.


def make_jaxopt(name: str, loss: Any, problem: Problem, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A solver and the arguments of its run."""
    if name == "ProximalGradient":
        solver = jaxopt.ProximalGradient(loss, jaxopt.prox.prox_lasso, **options)
        return solver, {"hyperparams_prox": problem.weight}
    bounds = jnp.asarray(problem.lower), jnp.asarray(problem.upper)
    if name == "LBFGSB":
        return jaxopt.LBFGSB(loss, **options), {"bounds": bounds}
    if problem.on_simplex:
        projection = lambda x, _: jaxopt.projection.projection_simplex(x)
        return jaxopt.ProjectedGradient(loss, projection, **options), {"hyperparams_proj": None}
    return jaxopt.ProjectedGradient(loss, jaxopt.projection.projection_box, **options), {"hyperparams_proj": bounds}


def by_jaxopt(name: str) -> Solver:
    """With its default line search and acceleration; a callback sees each evaluation."""

    def run(form: Form, goal: float, budget: int, seconds: float) -> Trace:
        problem = form.problem
        objectives: list[float] = []

        def recording(x: jax.Array) -> jax.Array:
            jax.debug.callback(lambda value: objectives.append(float(value)), problem.objective(x), ordered=True)
            return problem.loss(x)

        solver, arguments = make_jaxopt(name, recording, problem)
        update = lambda _, carry: tuple(solver.update(*carry, **arguments))
        some = jax.jit(lambda carry: lax.fori_loop(0, CHUNK, update, carry))
        deadline = time.monotonic() + seconds
        try:
            start = jnp.asarray(problem.start)
            carry = start, solver.init_state(start, **arguments)
            while len(objectives) < budget and min(objectives, default=math.inf) > goal:
                if time.monotonic() > deadline:
                    return Trace(objectives, f"out of time after {len(objectives)} evaluations")
                carry = jax.block_until_ready(some(carry))
                jax.effects_barrier()
        except Exception as error:
            return Trace(objectives[:budget], f"exception: {error!r}")
        return Trace(objectives[:budget])

    return run


def until_target(name: str, problem: Problem, target: float, most: int) -> Callable[[], jax.Array]:
    """A compiled loop over a solver's updates that ends at a target."""
    solver, arguments = make_jaxopt(name, problem.loss, problem)

    def run(start: jax.Array) -> jax.Array:
        def going(carry: Any) -> jax.Array:
            params, _, k = carry
            return (problem.objective(params) > target) & (k < most)

        def step(carry: Any) -> Any:
            params, state = solver.update(carry[0], carry[1], **arguments)
            return params, state, carry[2] + 1

        return lax.while_loop(going, step, (start, solver.init_state(start, **arguments), 0))[0]

    compiled, start = jax.jit(run), jnp.asarray(problem.start)
    return lambda: compiled(start)


# --- The exact methods for tables.


def by_nnls(problem: Problem) -> np.ndarray:
    """Lawson and Hanson's active set."""
    assert problem.table is not None
    return scipy.optimize.nnls(*problem.table)[0]


def by_lasso(problem: Problem, tol: float = 1e-10) -> np.ndarray:
    """Coordinate descent, with a duality gap far below its default."""
    assert problem.table is not None
    a, b = problem.table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a gap that rounding keeps above the tolerance
        return Lasso(problem.weight, fit_intercept=False, tol=tol, max_iter=200_000).fit(a, b).coef_


# --- The minimum near a point.


def polish(form: Form, x: np.ndarray, seconds: float) -> tuple[float, np.ndarray]:
    """The lowest objective found from params: L-BFGS-B in scaled variables, and Newton's method on the free params."""
    best = form.objective(x), np.asarray(x, float)
    deadline = time.monotonic() + seconds
    for _ in range(4):
        before = best[0]
        for method in (scaled_lbfgsb, free_newton):
            if time.monotonic() > deadline:
                return best
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                found = np.asarray(method(form, best[1], deadline), float)
            value = form.objective(found)
            best = (value, found) if value < best[0] else best
        if not before - best[0] > ROUNDING * abs(before):
            break
    return best


def polish_nearby(form: Form, x: np.ndarray, seconds: float) -> tuple[float, np.ndarray]:
    """The same within a thousandth of each param's size, which does not leave the basin of a point that is close."""
    problem, reach = form.problem, NEARBY * np.where(x != 0, np.abs(x), np.abs(x).mean() or 1.0)
    near = problem._replace(lower=np.maximum(problem.lower, x - reach), upper=np.minimum(problem.upper, x + reach))
    return polish(make_form(near), x, seconds)


def free_newton(form: Form, x: np.ndarray, _deadline: float) -> np.ndarray:
    """Polish the params that are not at a bound or at zero. Those at a bound stay there."""
    problem = form.problem
    largest = int(np.argmax(x))  # on the simplex it is what the others leave
    if problem.on_simplex:
        grad = np.asarray(jax.grad(problem.loss)(jnp.asarray(x)))
        at_bound = (x <= NEAR * x[largest]) & (grad > grad[largest])
        at_bound[largest] = True
        x = np.where(at_bound, 0, x)
        x[largest] = 1 - x.sum()
    else:
        at_bound = (x == 0) if problem.weight else (x <= problem.lower) | (x >= problem.upper)
    free = np.flatnonzero(~at_bound)
    if not 0 < len(free) <= 200:
        return x
    fixed, signs = jnp.asarray(x), np.sign(x)

    def full(part: jax.Array) -> jax.Array:
        y = fixed.at[free].set(part)
        return y.at[largest].set(1 - (jnp.sum(y) - y[largest])) if problem.on_simplex else y

    def loss(part: jax.Array) -> jax.Array:
        y = full(part)
        if problem.weight:
            inside = jnp.all(y * signs >= 0)
            return jnp.where(inside, problem.loss(y) + problem.weight * jnp.sum(y * signs), jnp.inf)
        inside = jnp.all((y >= problem.lower) & (y <= problem.upper))
        return jnp.where(inside, problem.loss(y), jnp.inf)

    return np.asarray(full(jnp.asarray(natural_units.polish(loss, x[free], rounds=3)[1])))


def scaled_lbfgsb(form: Form, x: np.ndarray, deadline: float) -> np.ndarray:
    """With the variables in units of the curvature, as far as the bounds allow to know it."""
    problem = form.problem
    if problem.kind == "simplex":
        return x
    z = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)]) if problem.weight else x
    value = form.evaluate(z)[0]
    units = units_of(form, z)
    size = max(float(np.abs(np.asarray(form.evaluate(z)[1]) * units).max()), 1e-300)

    def function(w: np.ndarray) -> tuple[float, np.ndarray]:
        if time.monotonic() > deadline:
            raise Enough
        f, g, _ = form.evaluate(z + units * w)
        f, g = float(f), np.asarray(g)
        if not (np.isfinite(f) and np.isfinite(g).all()):
            return np.inf, np.zeros_like(w)
        keep(f, w)
        return (f - float(value)) / size, g * units / size

    best = [float(value), np.zeros_like(z)]

    def keep(f: float, w: np.ndarray) -> None:
        if f < best[0]:
            best[:] = f, w.copy()

    bounds = scipy.optimize.Bounds((form.bounds.lb - z) / units, (form.bounds.ub - z) / units)
    options = {"ftol": 0.0, "gtol": 0.0, "maxcor": 30, "maxiter": 2000, "maxfun": 4000}
    with contextlib.suppress(Enough):
        scipy.optimize.minimize(function, np.zeros_like(z), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    end = z + units * best[1]
    return np.asarray(form.params(np.clip(end, form.bounds.lb, form.bounds.ub)))


def units_of(form: Form, z: np.ndarray) -> np.ndarray:
    """The size of a step that changes the gradient of each variable by the loss's own size, by differences."""
    typical = np.where(z != 0, np.abs(z), 1.0)
    if z.size > 100:
        return np.ones_like(z)
    grad = np.asarray(form.evaluate(z)[1])
    curvature = np.zeros_like(z)
    low, high = np.broadcast_to(form.bounds.lb, z.shape), np.broadcast_to(form.bounds.ub, z.shape)
    for i in range(z.size):
        step = 1e-6 * typical[i]
        if z[i] + step > high[i]:
            step = -step
        if z[i] + step < low[i]:
            continue
        moved = z.copy()
        moved[i] += step
        curvature[i] = (np.asarray(form.evaluate(moved)[1])[i] - grad[i]) / step
    usable = np.isfinite(curvature) & (curvature > 0)
    return np.where(usable, 1 / np.sqrt(np.where(usable, curvature, 1)), typical)


# --- The names.

GDOPT, YARDSTICK = "`gdopt.minimize`", "scipy L-BFGS-B"
TIGHT = "`gdopt.minimize`, `tol=1e-10`"
ALL = ("bounds", "l1", "simplex")
SOLVERS: dict[str, tuple[Solver, tuple[str, ...]]] = {
    GDOPT: (by_gdopt(), ALL),
    YARDSTICK: (by_scipy("L-BFGS-B"), ALL),
    "scipy L-BFGS-B, `ftol=gtol=0`": (by_scipy("L-BFGS-B", ftol=0, gtol=0), ALL),
    "scipy TNC": (by_scipy("TNC", maxfun=2000), ALL),
    "jaxopt `LBFGSB`": (by_jaxopt("LBFGSB"), ("bounds",)),
    "jaxopt `ProjectedGradient`": (by_jaxopt("ProjectedGradient"), ("bounds", "simplex")),
    "jaxopt `ProximalGradient`": (by_jaxopt("ProximalGradient"), ("l1",)),
}
ENDS: dict[str, Callable[[Form], End]] = {
    GDOPT: end_of_gdopt(),
    TIGHT: end_of_gdopt(tol=1e-10),
    YARDSTICK: end_of_scipy("L-BFGS-B"),
    "scipy TNC": end_of_scipy("TNC"),
}
