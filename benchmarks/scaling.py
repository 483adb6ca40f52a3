"""How does the time of a step grow with the params and with the rows, and how close is it to the memory bandwidth?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/scaling.py                    # about 5 minutes; --quick: 1, up to 1e7 params

The first table has gradient descent on a parabola with its own curvature for each of n params, 1e2 to 1e8 of them,
which is all memory traffic. ``gdopt.minimize`` runs at a fixed rate, with and without the best point, and with the two
optimizers that find their rates. The yardstick is a hand-written ``lax.scan`` that keeps the losses.

The second has the update alone, ``optax.apply_updates`` of ``gdopt.gd``'s, jitted, with the params donated, up to 1e8
params, and 1e9 on a GPU. It must read the params and the gradient and write the params. The yardstick is the time of
that at the bandwidth of a copy. The copy writes into an existing buffer, and the faster of two ways to write it counts.
A CPU reads what it overwrites. That costs the copy a third pass, but not the update, which reads it anyway, so there
the ideal is 0.67.

The third has a logistic regression with 50 columns as its rows grow.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt
from loop_overhead import logistic_data, logistic_loss, scan_by_hand
from tables import Row, arguments, interleaved, plain, print_heading, print_table, ratios, seconds

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "numpy")
RATE = 0.01
BUDGET = 2e8  # params times steps of a run
LARGE = 10**7  # from here on, three rounds will do
SEARCHED = 300  # the most steps of a run that finds its rates
ON_GPU = jax.default_backend() != "cpu"


def parabola(params: jax.Array, curvature: jax.Array) -> jax.Array:
    """A curvature of its own for each number, so that the gradient has to be made."""
    return jnp.mean(curvature * (params - 1) ** 2)


def loops(loss: Callable, params: jax.Array, data: tuple, steps: int, rate: float) -> dict[str, Callable[[], float]]:
    """The seconds of a step, by loop."""

    def by_hand() -> float:
        return seconds(lambda: scan_by_hand(loss, params, rate, steps, *data)) / steps

    def minimize(**options: Any) -> float:
        # A search of more steps would be at the minimum, and verify it.
        most = steps if "learning_rate" in options else min(steps, SEARCHED)
        result = gdopt.minimize(loss, params, args=data, max_steps=most, tol=0, **options)
        return result.run_seconds / (result.steps + 1)  # by the evaluation, as it makes one more than steps

    return {
        "hand-written `lax.scan`": by_hand,
        "`gd`, `keep_best=False`": functools.partial(minimize, learning_rate=rate, keep_best=False),
        "`gd`": functools.partial(minimize, learning_rate=rate),
        "`spectral`": functools.partial(minimize, optimizer=gdopt.spectral()),
        "`quasi_newton`, the default": minimize,
    }


def grown(name: str, sizes: list[int], make: Callable[[int], tuple], rounds: int) -> tuple[list[str], list[Row], dict]:
    """A row for each size: the yardstick's time of a step, the ratios to it, and the medians in microseconds."""
    rows, medians = [], {}
    for size in sizes:
        loss, params, data, steps, rate = make(size)
        clocks = loops(loss, params, data, steps, rate)
        for clock in clocks.values():
            clock()
        times = interleaved(clocks, rounds if size < LARGE else min(rounds, 3))
        medians[size] = np.median(times, axis=0) * 1e6
        rows.append(Row(short(size), [f"{medians[size][0]:.3g} us", *ratios(times)[1:]]))
        del params, data, clocks
        gc.collect()
    return [name, *loops(parabola, jnp.zeros(1), (), 1, RATE)], rows, medians


def short(size: int) -> str:
    """1e4 and the like."""
    return f"{size:.0e}".replace("+0", "")


def make_parabola(size: int) -> tuple:
    steps = int(np.clip(BUDGET / size, 10, 20_000))
    rate = RATE * size  # of a mean
    return parabola, jnp.zeros(size), (jnp.geomspace(1e-4, 1.0, size),), steps, rate


def make_regression(rows: int) -> tuple:
    return logistic_loss, jnp.zeros(50), logistic_data(rows, 50), int(np.clip(BUDGET / rows / 500, 5, 5000)), 0.02


def update_table(sizes: list[int], rounds: int) -> tuple[list[str], list[Row]]:
    """The update's time over that of its reads and writes at the bandwidth of a copy."""
    optimizer = gdopt.gd(0.1)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(params: Any, grad: Any) -> Any:
        return optax.apply_updates(params, optimizer.update(grad, optimizer.init(params))[0])

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def negate(into: jax.Array, source: jax.Array) -> jax.Array:
        return -source  # a copy by the same kind of kernel

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def copy(into: jax.Array, source: jax.Array) -> jax.Array:
        return jnp.copy(source)

    rows = []
    for size in sizes:
        arrays = {"params": jnp.zeros(size), "into": jnp.zeros(size)}
        source = jnp.full(size, 1e-3)

        def clock(function: Callable, name: str, arrays: dict = arrays, source: jax.Array = source) -> float:
            def run() -> jax.Array:
                arrays[name] = function(arrays[name], source)
                return arrays[name]

            return seconds(run)

        clocks = {
            "negate": functools.partial(clock, negate, "into"),
            "copy": functools.partial(clock, copy, "into"),
            "update": functools.partial(clock, update, "params"),
        }
        interleaved(clocks, 3)
        times = interleaved(clocks, rounds)
        copying = np.median(times[:, :2], axis=0).min()
        took = np.median(times[:, 2])
        gigabytes = 4 * size / 1e9
        cells = [f"{2 * gigabytes / copying:.3g}", f"{3 * gigabytes / took:.3g}", f"{took / (1.5 * copying):.2f}"]
        rows.append(Row(short(size), cells))
        del arrays, source, clocks
        gc.collect()
    return ["params", "copy, GB/s", "update, GB/s", "update / ideal"], rows


def draw(medians: dict[int, np.ndarray], path: str) -> None:
    """The time of a step over the number of params."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(loops(parabola, jnp.zeros(1), (), 1, RATE)):
        axes.loglog(list(medians), [of[k] for of in medians.values()], marker="o", label=plain(name))
    axes.set_xlabel("params")
    axes.set_ylabel("time per step, us")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the tables."""
    options = arguments(__doc__, "fewer rounds, up to 1e7 params", "also draw the first table")
    print_heading("scaling", options.flags, PACKAGES, options.markdown)
    largest = 7 if options.quick else 9 if ON_GPU else 8
    rounds = 3 if options.quick else 7
    header, rows, medians = grown("params", [10**k for k in range(2, min(largest, 8) + 1)], make_parabola, rounds)
    print_table("Time of a step as the params grow, over a hand-written loop's", header, rows, options.markdown)
    header, rows = update_table([10**k for k in range(6, largest + 1)], 5 if options.quick else 15)
    print_table("The update against the bandwidth of a copy", header, rows, options.markdown)
    sizes = [10**k for k in range(2, (5 if options.quick else 6) + 1)]
    header, rows, _ = grown("rows", sizes, make_regression, rounds)
    print_table("Time of a step as the rows grow, over a hand-written loop's", header, rows, options.markdown)
    if options.picture:
        draw(medians, options.picture)


if __name__ == "__main__":
    main()
