"""What does gdopt's loop cost per step, against the loop that you would write by hand?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/loop_overhead.py              # under 4 minutes; --quick: under 1; --markdown: for RESULTS.md

The first table gives the time per step as a ratio to a hand-written ``lax.scan`` that keeps the losses. Every loop does
the same: 1000 steps of gradient descent at one fixed rate, in float32, on the same logistic regression, with no early
stop; before anything is timed, all must have made 1000 steps and agree on the final loss. The loops run in turn, round
after round; a ratio is taken within its round, and the table gives the median over the rounds and the quartiles.

The second table gives the milliseconds of a whole call, in a fresh process for each library: the first call, the same
call again, and a call with a fresh lambda that closes over fresh data of the same shapes.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from jax import lax

import gdopt
from tables import Row, print_heading, print_table

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt is no longer maintained, and says so
    import jaxopt

STEPS = 1000
RATE = 0.05  # slow enough that the last of the steps still improves the loss
AGREEMENT = 1e-4  # relative; optimistix counts its first evaluation as a step and so ends one update behind
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "jaxopt", "numpy")

Loss = Callable[..., jax.Array]
Run = Callable[[], tuple[Any, Any]]  # -> (final params, steps made)
Clock = Callable[[], float]  # makes one run and returns its seconds


class Size(NamedTuple):
    """A logistic regression's shape, and the rounds to time it for: all, and with ``--quick``."""

    rows: int
    columns: int
    rounds: int
    quick_rounds: int


SIZES = (Size(1000, 50, rounds=35, quick_rounds=11), Size(10_000, 100, rounds=15, quick_rounds=3))


def logistic_data(size: Size, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Standard normal features; labels 0 or 1, drawn from a logistic model."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((size.rows, size.columns))
    logits = features @ random.standard_normal(size.columns) * 3 / np.sqrt(size.columns)
    labels = random.random(size.rows) < 1 / (1 + np.exp(-logits))
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.float32)


def logistic_loss(params: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean negative log-likelihood."""
    logits = features @ params
    return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)


@functools.partial(jax.jit, static_argnums=0)
def scan_by_hand(loss: Loss, params: jax.Array, rate: float, *args: Any) -> tuple[jax.Array, jax.Array]:
    """The yardstick: the final params and the loss before each step."""

    def step(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params, *args)
        return params - rate * grad, value

    return lax.scan(step, params, length=STEPS)


def runs(params: jax.Array, data: tuple[jax.Array, jax.Array]) -> dict[str, Run]:
    """Every loop but gdopt's, as a function that runs it to its end and leaves the waiting to the clock."""

    @jax.jit
    def step(params: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(logistic_loss)(params, *args)
        return params - RATE * grad, value

    def hand_written() -> tuple[Any, Any]:
        final, losses = scan_by_hand(logistic_loss, params, RATE, *data)
        return final, len(losses)

    def python_loop() -> tuple[Any, Any]:
        point = params
        for _ in range(STEPS):
            point, _value = step(point, *data)
        return point, STEPS

    def reading_python_loop() -> tuple[Any, Any]:
        point, losses = params, []
        for _ in range(STEPS):
            point, value = step(point, *data)
            losses.append(float(value))
        return point, len(losses)

    def gd_steps() -> tuple[Any, Any]:
        point = params
        for _ in range(STEPS):
            point, _value = gdopt.gd_step(logistic_loss, point, RATE, *data)
        return point, STEPS

    def optimistix_loss(params: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        return logistic_loss(params, *data)

    def optimistix_run(solver: Any) -> tuple[Any, Any]:
        solution = optimistix.minimise(optimistix_loss, solver, params, data, max_steps=STEPS, throw=False)
        return solution.value, solution.stats["num_steps"]

    # A positive stepsize means a fixed one: no line search.
    solver: Any = jaxopt.GradientDescent(logistic_loss, stepsize=RATE, maxiter=STEPS, tol=0.0, acceleration=False)
    jitted = jax.jit(solver.run)

    def jaxopt_run(run: Callable[..., Any]) -> tuple[Any, Any]:
        final, state = run(params, *data)
        return final, state.iter_num

    descent = optimistix.GradientDescent(RATE, rtol=0.0, atol=0.0)
    wrapped = optimistix.OptaxMinimiser(optax.sgd(RATE), rtol=0.0, atol=0.0)
    return {
        "hand-written `lax.scan` with loss history": hand_written,
        "Python loop, jitted step, losses unread": python_loop,
        "Python loop, jitted step, each loss read": reading_python_loop,
        "Python loop, `gdopt.gd_step`": gd_steps,
        "optimistix `GradientDescent`": functools.partial(optimistix_run, descent),
        "optimistix `OptaxMinimiser(optax.sgd)`": functools.partial(optimistix_run, wrapped),
        "jaxopt `GradientDescent`, `jit(run)`": functools.partial(jaxopt_run, jitted),
        "jaxopt `GradientDescent`, `run`": functools.partial(jaxopt_run, solver.run),
    }


def clocks(size: Size) -> dict[str, Clock]:
    """Every loop as a function that returns a run's seconds; the yardstick first. All agree, and all are warm."""
    data, params = logistic_data(size), jnp.zeros(size.columns, jnp.float32)

    def minimize() -> gdopt.Result:
        return gdopt.minimize(logistic_loss, params, args=data, learning_rate=RATE, max_steps=STEPS, tol=0)

    def whole_minimize() -> tuple[Any, Any]:
        result = minimize()
        return result.params, result.steps

    yardstick, *others = runs(params, data).items()
    contenders = dict([yardstick, ("`gdopt.minimize`, whole warm call", whole_minimize), *others])
    agreed = float(logistic_loss(yardstick[1]()[0], *data))
    for name, run in contenders.items():
        run()
        final, steps = run()
        loss = float(logistic_loss(final, *data))
        if int(steps) != STEPS or abs(loss - agreed) > AGREEMENT * agreed:
            raise RuntimeError(f"{name} made {steps} steps, to a loss of {loss}: not {STEPS}, to {agreed}.")

    first, *rest = ((name, functools.partial(seconds, run)) for name, run in contenders.items())
    return dict([first, ("`gdopt.minimize`, loop (`run_seconds`)", lambda: minimize().run_seconds), *rest])


def seconds(run: Callable[[], Any]) -> float:
    """The seconds until all results of a run are there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def step_table(sizes: Iterable[Size], quick: bool) -> tuple[list[str], list[Row]]:
    """The header and the rows of the first table."""
    header, columns = ["loop"], []
    for size in sizes:
        clock = clocks(size)
        rounds = range(size.quick_rounds if quick else size.rounds)
        times = np.array([[run() for run in clock.values()] for _ in rounds])  # (round, loop)
        low, median, high = np.quantile(times[:, 0] / STEPS * 1e6, (0.25, 0.5, 0.75))
        header.append(f"{size.rows} x {size.columns}, {len(rounds)} rounds")
        ratios = np.quantile(times / times[:, :1], (0.25, 0.5, 0.75), axis=0).T
        cells = [f"{r[1]:.2f} ({r[0]:.2f}-{r[2]:.2f})" for r in ratios]
        cells[0] = f"1.00 = {median:.3g} us ({low:.3g}-{high:.3g})"
        columns.append(dict(zip(clock, cells, strict=True)))
    return header, [Row(name, [column[name] for column in columns]) for name in columns[0]]


def call_seconds(library: str) -> tuple[float, float, float]:
    """A first call, a repeated one, one with a fresh lambda and fresh data. For a process in which nothing ran yet."""
    size, repeats = SIZES[0], 5
    params = jnp.zeros(size.columns, jnp.float32)
    descent = optimistix.GradientDescent(RATE, rtol=0.0, atol=0.0)

    def fresh_loss(seed: int) -> Loss:
        features, labels = logistic_data(size, seed)
        jax.block_until_ready((features, labels, features + 1))  # JAX itself has started before the first call
        return lambda params, _args=None: logistic_loss(params, features, labels)

    def call(loss: Loss) -> Any:
        match library:
            case "hand-written `lax.scan`":
                return scan_by_hand(loss, params, RATE)
            case "`gdopt.minimize`":
                return gdopt.minimize(loss, params, learning_rate=RATE, max_steps=STEPS, tol=0).params
            case _:
                return optimistix.minimise(loss, descent, params, max_steps=STEPS, throw=False).value

    def clocked(loss: Loss) -> float:
        return seconds(lambda: call(loss))

    loss = fresh_loss(0)
    first = clocked(loss)
    again = [clocked(loss) for _ in range(repeats)]
    fresh = [clocked(fresh_loss(1 + seed)) for seed in range(repeats)]
    return first, float(np.median(again)), float(np.median(fresh))


def call_table(processes: int) -> tuple[list[str], list[Row]]:
    """The header and the rows of the second table: medians over so many fresh processes for each library."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for library in ("hand-written `lax.scan`", "`gdopt.minimize`", "optimistix `GradientDescent`"):
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            times = np.median(list(pool.map(call_seconds, [library] * processes)), axis=0)
        rows.append(Row(library, [f"{milliseconds:.0f}" for milliseconds in times * 1e3]))
    return ["whole call, ms", "first", "same function again", "fresh lambda, fresh data"], rows


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, in under a minute")
    parser.add_argument("--markdown", action="store_true", help="print what RESULTS.md has for this script")
    options = parser.parse_args()

    flags = " --quick" * options.quick + " --markdown" * options.markdown
    print_heading("loop_overhead", flags, PACKAGES, options.markdown)
    titles = (
        f"Time per step over {STEPS} steps, as a ratio to the hand-written loop: median (quartiles)",
        f"Compile sharing: {STEPS} steps on {SIZES[0].rows} x {SIZES[0].columns}, the data closed over",
    )
    tables = (
        lambda: step_table(SIZES, options.quick),
        lambda: call_table(processes=1 if options.quick else 3),
    )
    for title, table in zip(titles, tables, strict=True):
        print_table(title, *table(), options.markdown)


if __name__ == "__main__":
    main()
