"""How long does a call take that reaches the same loss, with gdopt.minimize and with optimistix's BFGS?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/calls.py                      # some minutes; --quick: under 2; --markdown: for RESULTS.md

Five problems run in float64. gdopt has to reach ``best + 1e-5 * (start - best)``, with the best of long runs of both
and of SciPy's L-BFGS-B. BFGS gets exactly the steps that it needs to come as low. The network has many minima, so there
the best of each is that of its own long run. Warm calls run in turn, round after round, and a ratio is taken within its
round. Each first call runs in a fresh process, and compiles. optimistix finds its program by the function object; gdopt
traces the loss at each call.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import scale

import gdopt
from solvers import SHORT, Loss, by_gdopt, by_scipy, first_within, optimistix_bfgs, recorded
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
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "scipy", "scikit-learn", "numpy")
PATIENCE = 60  # seconds for a long run of SciPy's
CALLS = {
    "chained Rosenbrock, 10": chained_rosenbrock,
    "extended Rosenbrock, 100": extended_rosenbrock,
    "logistic regression, 31": logistic_regression,
    "softmax regression, 650": softmax_regression,
    "tanh network, 1210": tanh_network,
}


def call(library: str, loss: Loss, start: jax.Array, aims: Aims) -> float:
    """The seconds of one whole call, until its results are there."""
    if library == "gdopt":
        return seconds(lambda: gdopt.minimize(loss, start, target=aims.target, tol=0).params)
    return seconds(lambda: optimistix_bfgs(loss, start, aims.steps))


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
    clocks = {library: functools.partial(call, library, loss, start, aims) for library in ("gdopt", "BFGS")}
    return aims, interleaved(clocks, 2 + rounds)[2:]


def first_seconds(library: str, name: str, aims: Aims) -> float:
    """The seconds of a first call, for a process in which nothing ran yet."""
    loss, start = CALLS[name]()
    jax.block_until_ready(start + 1)  # JAX itself has started before
    return call(library, loss, start, aims)


def call_table(budget: int, rounds: int, repeats: int) -> tuple[list[str], list[Row]]:
    """One row for each of CALLS, which run alone. A first call is repeated in fresh processes."""

    rows = []
    for name in CALLS:
        aims, warm = alone(warm_seconds, name, budget, rounds, x64=True)
        clocks = {who: functools.partial(alone, first_seconds, who, name, aims, x64=True) for who in ("gdopt", "BFGS")}
        first = interleaved(clocks, repeats)
        low, ratio, high = np.quantile(warm[:, 0] / warm[:, 1], (0.25, 0.5, 0.75))
        cells = [f"{ratio:.2f} ({low:.2f}-{high:.2f})", f"{np.median(first[:, 0] / first[:, 1]):.2f}"]
        cells += [" / ".join(f"{1e3 * t:.3g}" for t in np.median(times, axis=0)) for times in (warm, first)]
        rows.append(Row(name, [*cells, f"{aims.evaluations} / {aims.steps}", aims.missed.strip() or "neither"]))
        print(f"\rtimed calls: {len(rows)} of {len(CALLS)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return ["gdopt / BFGS", "warm", "first", "warm, ms", "first, ms", "evaluations", "misses the target"], rows


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__, "smaller budgets and fewer rounds")
    print_heading("calls", options.flags, PACKAGES, options.markdown)
    budget, rounds, repeats = (SHORT, 3, 1) if options.quick else (20_000, 15, 3)
    header, rows = call_table(budget, rounds, repeats)
    title = "Time of a call to 1e-5 in float64 as a ratio to that of optimistix `BFGS`: median (quartiles)"
    print_table(title, header, rows, options.markdown)


if __name__ == "__main__":
    main()
