"""What do the first call, later calls and the import cost, and what is recompiled?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/first_call.py                 # about 4 minutes; --quick: 1; --markdown: for RESULTS.md

The first table has whole calls, in fresh processes that take turns: 1000 steps at a fixed rate on a logistic regression
of 1000 x 50 with the data in a closure. They are the first call, the same function again, a fresh lambda with fresh
data of the same shapes, and the same at another rate. Each time has the number of programs compiled in that call. SciPy
chooses its own steps, at most 100 iterations of L-BFGS-B over a jitted value and gradient. ``gdopt.minimize`` chooses
its own steps in the row of its default.

The second table has first calls in fresh processes with JAX's compilation cache on the disk: without it, in the process
that fills it, and in a later one.

The third has the cost of a warm call with almost no work: 5 steps on three numbers, with a fresh lambda. Beside it is
JAX's own tracing of the loss. The last is the CPU time of the import, in fresh processes.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax

from loop_overhead import Loss, logistic_data, logistic_loss, scan_by_hand
from tables import (
    Row,
    alone,
    arguments,
    installed,
    interleaved,
    plain,
    print_heading,
    print_table,
    seconds,
    with_variables,
)

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "jaxopt", "scipy", "numpy", "torch")
STEPS, RATE, ROWS, COLUMNS = 1000, 0.05, 1000, 50
REPEATS = 5  # of all but the first call
YARDSTICK = "hand-written `lax.scan`"
HOW = ("first call", "same function again", "fresh lambda and data", "another rate")

Call = Callable[[Loss, jax.Array, float], Any]  # (loss, params, rate)


def by_hand(loss: Loss, params: jax.Array, rate: float) -> Any:
    return scan_by_hand(loss, params, rate, STEPS)


def by_gdopt(loss: Loss, params: jax.Array, rate: float) -> Any:
    import gdopt

    return gdopt.minimize(loss, params, learning_rate=rate, max_steps=STEPS, tol=0).params


def by_default(loss: Loss, params: jax.Array, rate: float) -> Any:
    """Choose every rate itself."""
    import gdopt

    return gdopt.minimize(loss, params, max_steps=STEPS).params


def by_python_loop(loss: Loss, params: jax.Array, rate: float) -> Any:
    step = _steps.get(loss)
    if step is None:
        step = _steps[loss] = jax.jit(lambda x, rate: (lambda v, g: (x - rate * g, v))(*jax.value_and_grad(loss)(x)))
    for _ in range(STEPS):
        params, _value = step(params, rate)
    return params


def by_optimistix(loss: Loss, params: jax.Array, rate: float) -> Any:
    import optimistix

    solver = optimistix.GradientDescent(rate, rtol=0.0, atol=0.0)
    return optimistix.minimise(loss, solver, params, max_steps=STEPS, throw=False).value


def by_jaxopt(loss: Loss, params: jax.Array, rate: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt

    run = _steps.get((loss, rate))
    if run is None:
        options: dict[str, Any] = {"stepsize": rate, "maxiter": STEPS, "tol": 0.0, "acceleration": False}
        run = _steps[loss, rate] = jax.jit(jaxopt.GradientDescent(loss, **options).run)
    return run(params).params


def by_scipy(loss: Loss, params: jax.Array, rate: float) -> Any:
    import scipy.optimize

    function = _steps.get(loss)
    if function is None:
        function = _steps[loss] = jax.jit(jax.value_and_grad(loss))
    options = {"maxiter": 100}
    return scipy.optimize.minimize(
        lambda x: tuple(map(np.asarray, function(x.astype(np.float32)))),
        np.asarray(params),
        jac=True,
        method="L-BFGS-B",
        options=options,
    ).x


_steps: dict[Any, Any] = {}  # what a user keeps from call to call
CALLS: dict[str, Call] = {
    YARDSTICK: by_hand,
    "`gdopt.minimize`, fixed rate": by_gdopt,
    "`gdopt.minimize`, the default": by_default,
    "Python loop, jitted step": by_python_loop,
    "optimistix `GradientDescent`": by_optimistix,
    "jaxopt `GradientDescent`, `jit(run)`": by_jaxopt,
    "scipy L-BFGS-B, jitted loss": by_scipy,
}


def fresh_loss(seed: int) -> Loss:
    """A new lambda over new data, which are there."""
    features, labels = logistic_data(ROWS, COLUMNS, seed)
    jax.block_until_ready((features, labels, features + 1))
    return lambda params, _args=None: logistic_loss(params, features, labels)


def call_times(name: str) -> list[tuple[float, int]]:
    """For each of HOW the seconds and what was compiled. For a process in which nothing ran yet."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **metadata: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    params, call = jnp.zeros(COLUMNS, jnp.float32), CALLS[name]
    losses = [fresh_loss(seed) for seed in range(1 + REPEATS)]

    def clocked(loss: Loss, rate: float = RATE) -> tuple[float, int]:
        compiled.clear()
        return seconds(lambda: call(loss, params, rate)), len(compiled)

    def median(times: list[tuple[float, int]]) -> tuple[float, int]:
        return statistics.median(t for t, _ in times), max(count for _, count in times)

    first = clocked(losses[0])
    again = [clocked(losses[0]) for _ in range(REPEATS)]
    fresh = [clocked(loss) for loss in losses[1:]]
    rates = [clocked(losses[0], RATE * (1 + k / 100)) for k in range(1, 1 + REPEATS)]
    return [first, median(again), median(fresh), median(rates)]


def call_table(processes: int) -> tuple[list[str], list[Row], dict[str, np.ndarray]]:
    """Medians over so many fresh processes for each library, and the median ratios to the hand-written scan's."""
    runs: dict[str, list] = {name: [] for name in CALLS}
    for _ in range(processes):
        for name, found in runs.items():
            found.append(alone(call_times, name))
    times = {name: np.array([[t for t, _ in run] for run in found]) for name, found in runs.items()}
    rows = []
    for name, found in runs.items():
        milliseconds = np.median(times[name], axis=0) * 1e3
        counts = np.max([[count for _, count in run] for run in found], axis=0)
        first = np.median(times[name][:, 0] / times[YARDSTICK][:, 0])
        fresh = np.median(times[name][:, 2] / times[name][:, 1])
        cells = [f"{ms:.3g} ({count})" for ms, count in zip(milliseconds, counts, strict=True)]
        rows.append(Row(name, [*cells, f"{first:.2f}", f"{fresh:.2f}"]))
    header = ["ms (programs compiled)", *HOW, "first / scan's first", "fresh / same again"]
    return header, rows, times


def first_seconds(name: str) -> float:
    """The seconds of the first call in a process in which nothing ran yet."""
    return seconds(lambda: CALLS[name](fresh_loss(0), jnp.zeros(COLUMNS, jnp.float32), RATE))


def disk_table(rounds: int) -> tuple[list[str], list[Row]]:
    """First calls without a cache on the disk, with an empty one, and with a filled one."""
    rows = []
    for name in (YARDSTICK, "`gdopt.minimize`, fixed rate", "`gdopt.minimize`, the default"):
        times = []
        for _ in range(rounds):
            without = alone(first_seconds, name)
            with tempfile.TemporaryDirectory() as folder, with_variables(JAX_COMPILATION_CACHE_DIR=folder, **CACHE):
                times.append((without, alone(first_seconds, name), alone(first_seconds, name)))
        median = np.median(times, axis=0) * 1e3
        ratio = np.median([later / without for without, _, later in times])
        rows.append(Row(name, [*(f"{ms:.3g}" for ms in median), f"{ratio:.2f}"]))
    return ["ms of a first call", "no cache", "first process", "later process", "later / no cache"], rows


# Without this JAX writes only programs that took a second to compile.
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def warm_table(rounds: int) -> tuple[list[str], list[Row]]:
    """The cost of a warm call with almost no work."""
    import gdopt

    center = jnp.arange(3.0)

    def loss() -> Loss:
        return lambda x: jnp.sum((x - center) ** 2)

    def minimize(**options: Any) -> Any:
        return gdopt.minimize(loss(), jnp.zeros(3), max_steps=5, **options).params

    clocks = {
        "tracing the loss: `jax.make_jaxpr(jax.value_and_grad(loss))`": lambda: jax.make_jaxpr(
            jax.value_and_grad(loss())
        )(center),
        "`gdopt.minimize(loss, params)`": minimize,
        "`learning_rate=0.1`": lambda: minimize(learning_rate=0.1),
        "`learning_rate=triangular2(...)`": lambda: minimize(
            learning_rate=gdopt.schedules.triangular2(0.1, 0.2, step_size_up=3)
        ),
        "`optimizer=optax.adam, learning_rate=0.1`": lambda: minimize(optimizer=optax.adam, learning_rate=0.1),
        "`optimizer=optax.adam(0.1)`": lambda: minimize(optimizer=optax.adam(0.1)),
    }
    for run in clocks.values():
        run()
        run()
    times = interleaved({name: functools.partial(seconds, run) for name, run in clocks.items()}, rounds)
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=0) * 1e3
    more = np.median(times / times[:, :1], axis=0)
    rows = [
        Row(name, [f"{median[k]:.2f} ({low[k]:.2f}-{high[k]:.2f})", f"{more[k]:.1f}"]) for k, name in enumerate(clocks)
    ]
    return ["a warm call", "ms", "times the tracing"], rows


IMPORTS = ("jax, optax", "jax, optax, gdopt", "jax, optax, optimistix", "jax, optax, jaxopt", "torch")


def import_table(rounds: int) -> tuple[list[str], list[Row]]:
    """CPU seconds of fresh processes, less those of an empty one, which take turns."""

    def cpu_seconds(modules: str) -> float:
        code = f"{'import ' + modules if modules else ''}\nimport time\nprint(time.process_time())"
        run = [sys.executable, "-W", "ignore", "-c", code]
        compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return float(subprocess.run(run, check=True, capture_output=True, text=True, env=compiled).stdout)

    imports = [names for names in IMPORTS if installed([names.rpartition(" ")[2]])]
    # The first round compiles what is to be, and reads the files into memory.
    times = np.array([[cpu_seconds(names) for names in ("", *imports)] for _ in range(1 + rounds)])[1:]
    times = times[:, 1:] - times[:, :1]
    ratio, took = np.median(times / times[:, :1], axis=0), np.median(times, axis=0)
    rows = [Row(f"`import {n}`", [f"{took[k]:.2f}", f"{ratio[k]:.2f}"]) for k, n in enumerate(imports)]
    return ["import", "CPU seconds", "ratio"], rows


def draw(times: dict[str, np.ndarray], path: str) -> None:
    """The milliseconds of each kind of call as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, (name, of) in enumerate(times.items()):
        places = np.arange(len(HOW)) + (k - len(times) / 2) * 0.13
        axes.bar(places, np.median(of, axis=0) * 1e3, 0.12, label=plain(name))
    axes.set_yscale("log")
    axes.set_xticks(np.arange(len(HOW)), HOW)
    axes.set_ylabel("whole call, ms")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the tables."""
    options = arguments(__doc__, "fewer rounds", "also draw the first table")
    print_heading("first_call", options.flags, installed(PACKAGES), options.markdown)
    header, rows, times = call_table(2 if options.quick else 7)
    print_table(f"{STEPS} steps on {ROWS} x {COLUMNS}, the data closed over", header, rows, options.markdown)
    header, rows = disk_table(2 if options.quick else 5)
    print_table("With JAX's compilation cache on the disk", header, rows, options.markdown)
    title = "A warm call on three numbers: median (quartiles)"
    header, rows = alone(warm_table, 20 if options.quick else 100)
    print_table(title, header, rows, options.markdown)
    header, rows = import_table(3 if options.quick else 11)
    print_table("Import", header, rows, options.markdown)
    if options.picture:
        draw(times, options.picture)


if __name__ == "__main__":
    main()
