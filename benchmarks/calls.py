"""How long does a call take that reaches the same loss, with gdopt and with optimistix's BFGS?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/calls.py                      # some minutes; --quick: under 2; --markdown: for RESULTS.md

Five problems run in float64. gdopt has to reach ``best + 1e-5 * (start - best)``, with the best of long runs of both
and of SciPy's L-BFGS-B. BFGS gets exactly the steps that it needs to come as low. The network has many minima, so there
the best of each is that of its own long run. Warm calls run in turn, round after round, and a ratio is taken within its
round. Each first call runs in a fresh process, and compiles. optimistix finds its program by the function object;
gdopt.minimize traces the loss at each call, and a call that gdopt.prepare made does not.

A second table has calls with almost no work: a quadratic of 3, 30 and 300 numbers, of which each call gets another
minimum. optimistix and jaxopt stop by their own tests. gdopt stops by its default test, which it verifies, or at a
target, which needs no verification. There the loss is 1e-6 of that at the start.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import scale

import gdopt
from solvers import SHORT, Loss, by_gdopt, by_scipy, first_within, jaxopt, optimistix_bfgs, recorded
from tables import Row, alone, arguments, interleaved, print_heading, print_table, seconds


class Aims(NamedTuple):
    """The targets of both on one problem, and what each needs to reach its own."""

    target: float  # gdopt's
    steps: int  # that BFGS is given: the fewest to come to its own target
    evaluations: int  # that gdopt makes
    missed: str  # who does not come to its target at all


def chained_rosenbrock() -> tuple[Loss, jax.Array]:
    def loss(x: jax.Array, _args: None = None) -> jax.Array:
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    return loss, jnp.tile(jnp.array([-1.2, 1.0]), 5)


def extended_rosenbrock() -> tuple[Loss, jax.Array]:
    def loss(x: jax.Array, _args: None = None) -> jax.Array:
        return jnp.sum(100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2)

    return loss, jnp.tile(jnp.array([-1.2, 1.0]), 50)


def logistic_regression() -> tuple[Loss, jax.Array]:
    features, labels = load_breast_cancer(return_X_y=True)
    features, labels = jnp.asarray(scale(features)), jnp.asarray(labels)

    def loss(x: jax.Array, _args: None = None) -> jax.Array:
        logits = features @ x[:-1] + x[-1]
        return jnp.mean(jax.nn.softplus(logits) - labels * logits) + 1e-4 * jnp.sum(x**2)

    return loss, jnp.zeros(31)


def softmax_regression() -> tuple[Loss, jax.Array]:
    pixels, digits = load_digits(return_X_y=True)
    pixels, digits = jnp.asarray(pixels / 16), jnp.asarray(digits)

    def loss(x: jax.Array, _args: None = None) -> jax.Array:
        logits = pixels @ x[:640].reshape(64, 10) + x[640:]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, digits)) + 1e-4 * jnp.sum(x**2)

    return loss, jnp.zeros(650)


def tanh_network() -> tuple[Loss, jax.Array]:
    pixels, digits = load_digits(return_X_y=True)
    pixels, digits = jnp.asarray(pixels / 16), jnp.asarray(digits)

    def loss(x: jax.Array, _args: None = None) -> jax.Array:
        w1, b1, w2, b2 = jnp.split(x, (1024, 1040, 1200))
        logits = jnp.tanh(pixels @ w1.reshape(64, 16) + b1) @ w2.reshape(16, 10) + b2
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, digits))

    return loss, 0.1 * jax.random.normal(jax.random.key(0), (1210,))


TAU = 1e-5
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "jaxopt", "scipy", "scikit-learn", "numpy")
PATIENCE = 60  # seconds for a long run of SciPy's
CALLS = {
    "chained Rosenbrock, 10": chained_rosenbrock,
    "extended Rosenbrock, 100": extended_rosenbrock,
    "logistic regression, 31": logistic_regression,
    "softmax regression, 650": softmax_regression,
    "tanh network, 1210": tanh_network,
}


def calls_of(loss: Loss, start: jax.Array, aims: Aims) -> dict[str, Callable[[], float]]:
    """The seconds of one whole call with each, until its results are there."""
    ends: Any = {"target": aims.target, "tol": 0}
    solve = functools.cache(lambda: gdopt.prepare(loss, start, **ends))
    return {
        "gdopt": lambda: seconds(lambda: gdopt.minimize(loss, start, **ends).params),
        "prepared": lambda: seconds(lambda: solve()(start).params),
        "BFGS": lambda: seconds(lambda: optimistix_bfgs(loss, start, aims.steps)),
    }


def find_aims(name: str, budget: int) -> Aims:
    """The targets from long runs, and what it takes to reach them."""
    loss, start = CALLS[name]()
    ours = by_gdopt()(loss, start, budget, PATIENCE).losses
    theirs = recorded(optimistix_bfgs)(loss, start, SHORT, PATIENCE).losses
    scipys = by_scipy("L-BFGS-B", ftol=0, gtol=0)(loss, start, budget, PATIENCE).losses
    bests = [np.nanmin(ours), np.nanmin(theirs)]
    if CALLS[name] is not tanh_network:
        bests = [np.nanmin([*bests, *scipys])] * 2
    target, their_target = (float(best + TAU * (ours[0] - best)) for best in bests)

    steps = first_within(theirs, their_target)
    while steps < len(theirs) and loss(optimistix_bfgs(loss, start, int(steps))) > their_target:
        steps += 1  # what was low enough at this step is returned after the next, or was not accepted
    result = gdopt.minimize(loss, start, target=target, tol=0)
    missed = "gdopt" * (result.status is not gdopt.Status.TARGET_REACHED) + " BFGS" * (steps >= len(theirs))
    return Aims(target, int(min(steps, len(theirs))), result.steps + 1, missed)


def warm_seconds(name: str, budget: int, rounds: int) -> tuple[Aims, np.ndarray]:
    """The targets, and the seconds of each round of warm calls: (round, library)."""
    aims = find_aims(name, budget)
    loss, start = CALLS[name]()
    return aims, interleaved(calls_of(loss, start, aims), 2 + rounds)[2:]


def first_seconds(library: str, name: str, aims: Aims) -> float:
    """The seconds of a first call, for a process in which nothing ran yet."""
    loss, start = CALLS[name]()
    jax.block_until_ready(start + 1)  # JAX itself has started before
    return calls_of(loss, start, aims)[library]()


def call_table(budget: int, rounds: int, repeats: int) -> tuple[list[str], list[Row]]:
    """One row for each of CALLS, which run alone. A first call is repeated in fresh processes."""

    rows = []
    for name in CALLS:
        aims, warm = alone(warm_seconds, name, budget, rounds, x64=True)
        clocks = {who: functools.partial(alone, first_seconds, who, name, aims, x64=True) for who in ("gdopt", "BFGS")}
        first = interleaved(clocks, repeats)
        cells = []
        for column in (0, 1):
            low, ratio, high = np.quantile(warm[:, column] / warm[:, 2], (0.25, 0.5, 0.75))
            cells.append(f"{ratio:.2f} ({low:.2f}-{high:.2f})")
        cells.append(f"{np.median(first[:, 0] / first[:, 1]):.2f}")
        cells += [" / ".join(f"{1e3 * t:.3g}" for t in np.median(times, axis=0)) for times in (warm, first)]
        rows.append(Row(name, [*cells, f"{aims.evaluations} / {aims.steps}", aims.missed.strip() or "neither"]))
        print(f"\rtimed calls: {len(rows)} of {len(CALLS)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    header = ["ratio to BFGS", "minimize", "prepared", "first minimize", "warm, ms", "first, ms", "evaluations"]
    return [*header, "misses the target"], rows


SIZES = (3, 30, 300)
GAIN = 1e-6  # the loss at the target, over that at the start


def quadratic(x: jax.Array, middle: jax.Array) -> jax.Array:
    return jnp.sum(jnp.linspace(1.0, 10.0, x.size) * (x - middle) ** 2)


def small_table(rounds: int) -> tuple[list[str], list[Row]]:
    """One row for each way of a call, with its time at each of SIZES."""
    ways = {}
    for size in SIZES:
        for name, run in small_calls(size).items():
            ways[name, size] = run
    times = 1e3 * np.median(interleaved({f"{key}": run for key, run in ways.items()}, 3 + rounds)[3:], axis=0)
    found = dict(zip(ways, times, strict=True))
    names = dict.fromkeys(name for name, _ in ways)
    rows = [Row(name, [f"{found[name, size]:.3g}" for size in SIZES]) for name in names]
    return ["ms a call", *(f"{size} numbers" for size in SIZES)], rows


def small_calls(size: int) -> dict[str, Callable[[], float]]:
    """The seconds of ten calls over ten, by each way, with other minima in turn."""
    start = jnp.zeros(size)
    middles = [jnp.linspace(1.0, 2.0, size) + shift for shift in np.arange(10) / 10]
    target: Any = {"target": GAIN * float(quadratic(start, middles[0])), "tol": 0}
    rate: Any = {"learning_rate": 0.05, "max_steps": 100}
    prepared = {"default": {}, "target": target, "rate": rate}
    solves = {name: gdopt.prepare(quadratic, start, args=(middles[0],), **ends) for name, ends in prepared.items()}
    bfgs = optimistix.BFGS(rtol=1e-4, atol=1e-4)
    jitted = jax.jit(jaxopt.LBFGS(quadratic, tol=1e-3).run)  # Without it, each call compiles.
    ways: dict[str, Callable[[Any], Any]] = {
        "`minimize`": lambda a: gdopt.minimize(quadratic, start, args=(a,)).params,
        "`minimize`, to the target": lambda a: gdopt.minimize(quadratic, start, args=(a,), **target).params,
        "`minimize`, fixed rate": lambda a: gdopt.minimize(quadratic, start, args=(a,), **rate).params,
        "`minimize`, `optax.adam(0.1)`, 100 steps": lambda a: (
            gdopt.minimize(quadratic, start, args=(a,), optimizer=optax.adam(0.1), max_steps=100, tol=0).params
        ),
        "prepared": lambda a: solves["default"](args=(a,)).params,
        "prepared, to the target": lambda a: solves["target"](args=(a,)).params,
        "prepared, fixed rate": lambda a: solves["rate"](args=(a,)).params,
        "optimistix `BFGS`": lambda a: optimistix.minimise(quadratic, bfgs, start, a, throw=False).value,
        "jaxopt `LBFGS`, `run` in a `jax.jit`": lambda a: jitted(start, a).params,
    }
    return {name: lambda way=way: seconds(lambda: [way(a) for a in middles][-1]) / 10 for name, way in ways.items()}


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__, "smaller budgets and fewer rounds")
    print_heading("calls", options.flags, PACKAGES, options.markdown)
    budget, rounds, repeats = (SHORT, 3, 1) if options.quick else (20_000, 15, 3)
    header, rows = call_table(budget, rounds, repeats)
    title = "Time of a call to 1e-5 in float64 as a ratio to that of optimistix `BFGS`: median (quartiles)"
    print_table(title, header, rows, options.markdown)
    title = "Warm calls with almost no work, in float32: medians of rounds in turn"
    print_table(title, *small_table(5 if options.quick else 15), options.markdown)


if __name__ == "__main__":
    main()
