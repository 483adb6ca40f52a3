"""The solvers that cutest.py compares, each as ``(loss, start, budget, seconds) -> Trace``."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import scipy.optimize
from jax import lax

import gdopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt is no longer maintained, and says so
    import jaxopt

SHORT = 2000  # the most evaluations of the solvers that are not in LONG

Loss = Callable[..., jax.Array]


class Trace(NamedTuple):
    """A run, cut at its budget."""

    losses: Any  # one for each evaluation, in their order
    remark: str = ""  # what went wrong, if something did


Solver = Callable[[Loss, jax.Array, int, float], Trace]


def by_gdopt(**options: Any) -> Solver:
    """The subject. A run of N updates makes N + 1 evaluations."""

    def run(loss: Loss, start: jax.Array, budget: int, _seconds: float) -> Trace:
        try:
            result = gdopt.minimize(loss, start, tol=0, max_steps=budget - 1, **options)
        except Exception as error:
            return Trace([], f"exception: {error!r}")
        assert result.history is not None
        return Trace(result.history.loss, "" if is_finite(result) else "NaN result")

    return run


def is_finite(result: gdopt.Result) -> bool:
    """Return whether loss and params of a result are finite."""
    return math.isfinite(result.loss) and bool(np.isfinite(np.asarray(result.params)).all())


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(loss: Loss, x: Any) -> tuple[jax.Array, jax.Array]:
    """Compiled once for all solvers of SciPy's, which ask for both at once."""
    return jax.value_and_grad(loss)(x)


class Enough(Exception):
    """The budget or the time is spent."""


def by_scipy(method: str, **options: float) -> Solver:
    """One of SciPy's methods at its defaults, but for the options."""

    def solve(loss: Loss, start: jax.Array, budget: int, seconds: float) -> Trace:
        losses: list[float] = []
        deadline = time.monotonic() + seconds

        def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
            if len(losses) == budget:
                raise Enough
            if time.monotonic() > deadline:
                raise Enough(f"out of time after {len(losses)} evaluations")
            value, grad = value_and_grad(loss, x)
            losses.append(float(value))
            return losses[-1], np.asarray(grad)

        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of overflows in its line searches
            try:
                scipy.optimize.minimize(evaluate, np.asarray(start), jac=True, method=method, options=options)
            except Enough as enough:
                return Trace(losses, str(enough))
            except Exception as error:
                return Trace(losses, f"exception: {error!r}")
        return Trace(losses)

    return solve


def recorded(run: Callable[[Loss, jax.Array, int], Any]) -> Solver:
    """A solver out of a compiled run, by a callback that sees each evaluation of the loss, inner ones as well."""

    def solve(loss: Loss, start: jax.Array, budget: int, _seconds: float) -> Trace:
        losses: list[Any] = []

        def recording(x: jax.Array, _args: None = None) -> jax.Array:
            value = loss(x)
            jax.debug.callback(losses.append, value, ordered=True)
            return value

        try:
            jax.block_until_ready(run(recording, start, budget))
            remark = ""
        except Exception as error:
            remark = f"exception: {error!r}"
        jax.effects_barrier()
        return Trace(np.array(losses[:budget], float), remark)

    return solve


BFGS = optimistix.BFGS(rtol=1e-12, atol=1e-12)


def optimistix_bfgs(loss: Loss, start: jax.Array, steps: int) -> jax.Array:
    """A step of it is one evaluation, of a trial point that is accepted or not."""
    return optimistix.minimise(loss, BFGS, start, max_steps=steps, throw=False).value


@functools.partial(jax.jit, static_argnums=0)
def optax_lbfgs(loss: Loss, start: jax.Array, budget: Any) -> jax.Array:
    """The loop of optax's documentation, until its line searches have spent the budget."""
    solver = optax.lbfgs()
    both = optax.value_and_grad_from_state(loss)

    def step(carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        x, state, spent = carry
        value, grad = both(x, state=state)
        updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        trials: Any = optax.tree.get(state, "num_linesearch_steps")
        spent += jnp.maximum(trials, 1)  # at least 1, so that it ends in any case
        return x + jnp.asarray(updates), state, spent

    return lax.while_loop(lambda carry: carry[2] < budget, step, (start, solver.init(start), 0))[0]


def jaxopt_descent(loss: Loss, start: jax.Array, budget: int) -> Any:
    """With its default line search and acceleration. An iteration makes two evaluations at least."""
    solver: Any = jaxopt.GradientDescent(loss, maxiter=budget // 2, tol=0.0)
    return solver.run(start).params


def by_adam(loss: Loss, start: jax.Array, budget: int, _seconds: float) -> Trace:
    """Adam at 0.1, one evaluation in a step."""
    solver = optax.adam(0.1)

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], jax.Array]:
        x, state = carry
        value, grad = jax.value_and_grad(loss)(x)
        updates, state = solver.update(grad, state)
        return (x + jnp.asarray(updates), state), value

    run = jax.jit(lambda x: lax.scan(step, (x, solver.init(x)), length=budget)[1])
    return Trace(np.asarray(run(start)))


GDOPT, YARDSTICK = "`gdopt.minimize`", "scipy L-BFGS-B"
OURS: dict[str, Solver] = {
    GDOPT: by_gdopt(),
    "`gdopt.quasi_newton(memory=0)`": by_gdopt(optimizer=gdopt.quasi_newton(memory=0)),
    "`optimizer=gdopt.gd`": by_gdopt(optimizer=gdopt.gd),
}
LONG: dict[str, Solver] = OURS | {
    YARDSTICK: by_scipy("L-BFGS-B"),
    "scipy L-BFGS-B, `ftol=gtol=0`": by_scipy("L-BFGS-B", ftol=0, gtol=0),
    "scipy BFGS": by_scipy("BFGS"),
    "scipy CG": by_scipy("CG"),
}
SOLVERS: dict[str, Solver] = LONG | {
    "optimistix `BFGS`": recorded(optimistix_bfgs),
    "optax `lbfgs`": recorded(optax_lbfgs),
    "jaxopt `GradientDescent`": recorded(jaxopt_descent),
    "optax `adam`, 0.1": by_adam,
}


def first_within(losses: Any, target: float) -> float:
    """The evaluations until the loss is at or below the target."""
    hits = np.flatnonzero(np.asarray(losses, float) <= target)
    return float(hits[0] + 1) if len(hits) else math.inf
