"""What does a step of gdopt's loop cost, compared with the loop that you would write by hand?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/loop_overhead.py              # about 7 minutes; --quick: 3; --markdown: for RESULTS.md

Every loop does the same: gradient descent at one fixed rate, in float32, without an early stop, on logistic regressions
whose steps take some 0.5, 10 and 200 us. The yardstick is a hand-written ``lax.scan`` that keeps the losses. Before
anything is timed, each loop must reach the same loss in the same number of steps. The loops run in turn, round after
round. A ratio is taken within its round, and the table gives the median over the rounds and the quartiles. Python loops
make fewer steps, and are compared by the step.

The second table has the two smaller problems in a process in which XLA makes one kernel of loops of up to 16 kB, which
only a variable of the environment can tell it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from jax import lax

import gdopt
from tables import (
    Row,
    alone,
    arguments,
    installed,
    interleaved,
    plain,
    print_heading,
    print_table,
    ratios,
    seconds,
    with_variables,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt is no longer maintained, and says so
    import jaxopt

AGREEMENT = 1e-3  # relative; optimistix counts its first evaluation as a step and so ends one update behind
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "jaxopt", "numpy", "torch")
YARDSTICK = "hand-written `lax.scan` with loss history"
STEP = "`gdopt.minimize`, loop"
SMALL_LOOPS = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=16384"
WATCHED = "the same with a progress bar and a callback"

Loss = Callable[..., jax.Array]
Run = Callable[[int], Any]  # makes so many steps; returns the final params


class Size(NamedTuple):
    """A problem, and how often it is run."""

    name: str
    rows: int
    columns: int
    rate: float  # slow enough that the last of the steps still improves the loss
    steps: int  # some 50 ms
    python_steps: int
    rounds: int
    quick_rounds: int


SIZES = (
    Size("0.5 us", 20, 4, 1e-4, steps=50_000, python_steps=1000, rounds=25, quick_rounds=7),
    Size("10 us", 800, 50, 0.02, steps=5000, python_steps=1000, rounds=35, quick_rounds=7),
    Size("200 us", 10_000, 100, 0.02, steps=400, python_steps=100, rounds=25, quick_rounds=5),
)


def logistic_data(rows: int, columns: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Standard normal features; labels 0 or 1, drawn from a logistic model."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((rows, columns))
    logits = features @ random.standard_normal(columns) * 3 / np.sqrt(columns)
    labels = random.random(rows) < 1 / (1 + np.exp(-logits))
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.float32)


def logistic_loss(params: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean negative log-likelihood."""
    logits = features @ params
    return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)


@functools.partial(jax.jit, static_argnums=(0, 3))
def scan_by_hand(loss: Loss, params: jax.Array, rate: float, steps: int, *args: Any) -> tuple[jax.Array, jax.Array]:
    """The yardstick: the final params and the loss before each step."""

    def step(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params, *args)
        return params - rate * grad, value

    return lax.scan(step, params, length=steps)


def compiled_loops(loss: Loss, params: jax.Array, data: tuple, rate: float) -> dict[str, Run]:
    """Loops that run on the device from end to end; the yardstick first."""

    def optimistix_loss(params: jax.Array, data: tuple) -> jax.Array:
        return loss(params, *data)

    def optimistix_run(solver: Any, steps: int) -> Any:
        return optimistix.minimise(optimistix_loss, solver, params, data, max_steps=steps, throw=False).value

    @functools.cache
    def jaxopt_run(steps: int) -> Any:
        # A positive stepsize means a fixed one: no line search.
        options: dict[str, Any] = {"stepsize": rate, "maxiter": steps, "tol": 0.0, "acceleration": False}
        return jax.jit(jaxopt.GradientDescent(loss, **options).run)

    def minimize(steps: int, **options: Any) -> gdopt.Result:
        return gdopt.minimize(loss, params, args=data, learning_rate=rate, max_steps=steps, tol=0, **options)

    descent = optimistix.GradientDescent(rate, rtol=0.0, atol=0.0)
    wrapped = optimistix.OptaxMinimiser(optax.sgd(rate), rtol=0.0, atol=0.0)
    return {
        YARDSTICK: lambda steps: scan_by_hand(loss, params, rate, steps, *data)[0],
        STEP: minimize,
        WATCHED: functools.partial(minimize, progress=True, callback=lambda report: None),
        "`gdopt.minimize`, whole warm call": lambda steps: minimize(steps).params,
        "optimistix `GradientDescent`": functools.partial(optimistix_run, descent),
        "optimistix `OptaxMinimiser(optax.sgd)`": functools.partial(optimistix_run, wrapped),
        "jaxopt `GradientDescent`, `jit(run)`": lambda steps: jaxopt_run(steps)(params, *data).params,
    }


def python_loops(loss: Loss, params: jax.Array, data: tuple, rate: float) -> dict[str, Run]:
    """Loops whose steps are called one by one."""

    @jax.jit
    def step(params: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params, *args)
        return params - rate * grad, value

    def jitted_step(steps: int, read: bool) -> Any:
        point, losses = params, []
        for _ in range(steps):
            point, value = step(point, *data)
            losses.append(float(value) if read else value)
        return point

    def gd_steps(steps: int) -> Any:
        point = params
        for _ in range(steps):
            point, _value = gdopt.gd_step(loss, point, rate, *data)
        return point

    loops = {
        "Python loop, jitted step, losses unread": functools.partial(jitted_step, read=False),
        "Python loop, jitted step, each loss read": functools.partial(jitted_step, read=True),
        "Python loop, `gdopt.gd_step`": gd_steps,
    }
    return loops | ({"torch, SGD loop": torch_loop(data, rate, params)} if installed(["torch"]) else {})


def torch_loop(data: tuple, rate: float, start: jax.Array) -> Run:
    """The loop of torch's tutorials."""
    import torch

    features, labels = (torch.tensor(np.asarray(array)) for array in data)

    def value(w: Any) -> Any:
        logits = features @ w
        return torch.mean(torch.nn.functional.softplus(logits) - labels * logits)

    def run(steps: int) -> Any:
        w = torch.tensor(np.asarray(start), requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            value(w).backward()
            optimizer.step()
        return w.detach().numpy()

    return run


@contextlib.contextmanager
def unseen() -> Generator[None]:
    """The progress bar is written, but not to the screen."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def clocks(size: Size) -> dict[str, Callable[[], float]]:
    """Every loop as a function that returns the seconds of a step. All agree, and all are warm."""
    params = jnp.zeros(size.columns, jnp.float32)
    loss, data = logistic_loss, logistic_data(size.rows, size.columns)

    def clock(name: str, run: Run, steps: int) -> float:
        with unseen():
            if name in (STEP, WATCHED):  # its loop alone: all is compiled and placed, the history is copied to the host
                return run(steps).run_seconds / steps
            return seconds(lambda: run(steps)) / steps

    found = {}
    for loops, steps in ((compiled_loops, size.steps), (python_loops, size.python_steps)):
        agreed = float(loss(scan_by_hand(loss, params, size.rate, steps, *data)[0], *data))
        for name, run in loops(loss, params, data, size.rate).items():
            with unseen():
                run(steps)
                final = run(steps)
            final = final.params if isinstance(final, gdopt.Result) else final
            reached = float(loss(jnp.asarray(final), *data))
            if abs(reached - agreed) > AGREEMENT * agreed:
                raise RuntimeError(f"{name} came to a loss of {reached} in {steps} steps: not to {agreed}.")
            found[name] = functools.partial(clock, name, run, steps)
    return found


def step_table(sizes: Iterable[Size], quick: bool) -> tuple[list[str], list[Row], dict[str, list[float]]]:
    """The header, the rows, and the median ratios by loop."""
    header, columns, medians = ["loop"], [], {}
    for size in sizes:
        clock = clocks(size)
        rounds = size.quick_rounds if quick else size.rounds
        times = interleaved(clock, rounds)
        low, median, high = np.quantile(times[:, 0] * 1e6, (0.25, 0.5, 0.75))
        header.append(f"{size.rows} x {size.columns}, {size.steps} steps, {rounds} rounds")
        cells = ratios(times)
        cells[0] = f"1.00 = {median:.3g} us ({low:.3g}-{high:.3g})"
        columns.append(dict(zip(clock, cells, strict=True)))
        for name, value in zip(clock, np.median(times / times[:, :1], axis=0), strict=True):
            medians.setdefault(name, []).append(float(value))
    return header, [Row(name, [column[name] for column in columns]) for name in columns[0]], medians


def draw(medians: dict[str, list[float]], path: str) -> None:
    """The ratios as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in medians if name != YARDSTICK][::-1]
    for k, size in enumerate(SIZES):
        places = np.arange(len(names)) + (1 - k) * 0.27
        axes.barh(places, [medians[name][k] for name in names], 0.25, label=f"a step of {size.name}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(np.arange(len(names)), list(map(plain, names)))
    axes.set_xlabel("time per step, over that of a hand-written lax.scan")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__, "fewer rounds", "also draw the table")
    print_heading("loop_overhead", options.flags, installed(PACKAGES), options.markdown)
    header, rows, medians = step_table(SIZES, options.quick)
    title = "Time per step, as a ratio to the hand-written loop: median (quartiles)"
    print_table(title, header, rows, options.markdown)
    with with_variables(XLA_FLAGS=SMALL_LOOPS):
        header, rows, _ = alone(step_table, SIZES[:2], options.quick)
    print_table(f"The same with XLA_FLAGS={SMALL_LOOPS}", header, rows, options.markdown)
    if options.picture:
        draw(medians, options.picture)


if __name__ == "__main__":
    main()
