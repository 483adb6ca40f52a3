"""How long does it take to report a mistake, to save, to stop, and to find the origin of a NaN?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/failures.py                   # some 3 minutes; --quick: one; --markdown: for RESULTS.md

gdopt refuses a network of 50 layers whose loss is not a scalar. The yardstick is JAX's own trace, `jax.eval_shape`, in
turn with it, round after round. A run with a state of 1, 10 and 100 MB (params and adam's moments) saves itself every
half second. The loop stands still for the time of `Saver.save`, which copies; a thread writes the copy beside the next
chunks. A callback reads the clock between chunks. Its longest waits, as many as there were saves, count as those with a
save. Ctrl-C is sent to the process itself during a run. The NaN arises in the tenth layer.
"""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import threading
import time
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdopt
from gdopt._checkpoint.saver import Saver
from tables import Row, arguments, interleaved, print_heading, print_table, ratios, seconds

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "numpy")
LAYERS, WIDTH = 50, 64
SIZES = (1, 10, 100)  # MB

Params = list[dict[str, jax.Array]]


def network() -> tuple[Params, jax.Array]:
    """The params and inputs of a network."""
    random = np.random.default_rng(0)
    layers = [{"w": random.standard_normal((WIDTH, WIDTH)) / 8, "b": np.zeros(WIDTH)} for _ in range(LAYERS)]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers), jnp.ones((32, WIDTH))


def outputs(params: Params, x: jax.Array, *, broken: bool = False) -> jax.Array:
    """The outputs of all layers; the tenth may be broken."""
    for number, layer in enumerate(params):
        x = jnp.tanh(x @ layer["w"] + layer["b"][None, :])
        if broken and number == 9:
            x = jnp.sqrt(x - 2)
    return x


def by_row(params: Params, x: jax.Array) -> jax.Array:
    """A loss with a common mistake: one number for each row."""
    return jnp.mean(outputs(params, x) ** 2, axis=1)


def refused(params: Params, x: jax.Array) -> None:
    """The whole call, up to the error."""
    try:
        gdopt.minimize(lambda params, x: by_row(params, x), params, data=x, learning_rate=0.1)
    except gdopt.InputError:
        return
    raise AssertionError("the loss is no scalar, and was taken")


def told(rounds: int) -> list[Row]:
    """Rows for the time to an error."""
    params, x = network()
    clocks = {
        "`jax.eval_shape` of the loss": lambda: seconds(lambda: jax.eval_shape(lambda p, x: by_row(p, x), params, x)),
        "`gdopt.minimize`, up to the error": lambda: seconds(lambda: refused(params, x)),
    }
    interleaved(clocks, 3)
    times = interleaved(clocks, rounds)
    return [
        Row(name, (f"{1e3 * median:.1f}", ratio))
        for name, median, ratio in zip(clocks, np.median(times, axis=0), ratios(times), strict=True)
    ]


def waits(megabytes: int, run_seconds: float, path: str | None) -> tuple[np.ndarray, list[float]]:
    """The seconds between the callbacks of a run, and those for which its saves stopped it."""
    times: list[float] = []
    copying: list[float] = []

    def note(report: gdopt.Report) -> bool:
        times.append(time.perf_counter())
        return times[-1] > times[0] + run_seconds

    def timed_save(*given: Any) -> bool:
        begun = time.perf_counter()
        made = save(*given)
        copying.append(time.perf_counter() - begun)
        return made

    start = jnp.ones(megabytes * 10**6 // 12)  # and two moments, of 4 bytes each
    options: dict[str, Any] = {"optimizer": optax.adam, "learning_rate": 1e-3, "tol": 0, "max_steps": 10**9}
    options["checkpoint"] = path and gdopt.Checkpoint(path, every_seconds=0.5)
    save = Saver.save
    with unittest.mock.patch.object(Saver, "save", lambda *given: timed_save(*given)):
        gdopt.minimize(lambda x: jnp.sum(jnp.cos(x)), start, callback=note, keep_best=False, **options)
    return np.diff(times), copying


def saved(run_seconds: float) -> list[Row]:
    """Rows for the time that a save takes from a run."""
    rows = []
    for megabytes in SIZES:
        waits(megabytes, 0.5, None)
        plain, _ = waits(megabytes, run_seconds / 2, None)
        with tempfile.TemporaryDirectory() as directory:
            times, copying = waits(megabytes, run_seconds, os.path.join(directory, "run"))
        usual = np.median(plain)
        longest = np.sort(times)[::-1][: max(len(copying), 1)]
        still = f"{1e3 * np.median(copying):.1f}", f"{1e3 * max(copying):.1f}"
        cells = f"{1e3 * usual:.0f}", f"{1e3 * (np.median(longest) - usual):.0f}"
        rows.append(Row(f"{megabytes} MB", (f"{len(copying)}", *still, *cells, f"{1e3 * (max(plain) - usual):.0f}")))
    return rows


def stopped(rounds: int) -> list[Row]:
    """Rows for the time from Ctrl-C to the result."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what runs in the background
    rows = []
    for name, size in (("a step of some 10 us", 100), ("a step of some 10 ms", 3 * 10**6)):
        call = functools.partial(
            gdopt.minimize, lambda x: jnp.sum(jnp.cos(x)), jnp.ones(size), learning_rate=1e-6, tol=0
        )  # a rate at which it moves on, within rounding, and has not arrived after a second
        call(max_steps=10)  # compiles
        times = []
        for _ in range(rounds):
            sent: list[float] = []

            def send(sent: list[float] = sent) -> None:
                sent.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGINT)

            threading.Timer(1.0, send).start()
            result = call(max_steps=10**9)
            times.append(time.perf_counter() - sent[0])
            assert result.status is gdopt.Status.INTERRUPTED
        rows.append(Row(name, (f"{1e3 * np.median(times):.0f}", f"{1e3 * max(times):.0f}")))
    return rows


def diagnosed(rounds: int) -> list[Row]:
    """Rows for the time that it takes to find the origin of a NaN."""
    params, x = network()
    loss = lambda params, x: jnp.mean(outputs(params, x, broken=True) ** 2)
    result = gdopt.minimize(loss, params, args=(x,), learning_rate=0.1)
    assert gdopt.diagnose(result).primitive == "sqrt"
    times = [seconds(lambda: gdopt.diagnose(result)) for _ in range(rounds)]
    return [Row("a network of 50 layers", (f"{np.median(times):.2f}",))]


def main() -> None:
    """Prints the tables."""
    options = arguments(__doc__, "fewer rounds, shorter runs")
    print_heading("failures", options.flags, PACKAGES, options.markdown)
    header = ("", "ms, median", "over the trace (quartiles)")
    print_table("Time until a wrong loss is refused", header, told(10 if options.quick else 40), options.markdown)
    header = (
        "state",
        "saves",
        "still, ms, median",
        "longest",
        "a chunk, ms, median",
        "one with a save, ms more",
        "the longest without, ms more",
    )
    print_table("What a save takes from a run", header, saved(5 if options.quick else 20), options.markdown)
    header = ("", "ms, median", "ms, longest")
    rows = stopped(3 if options.quick else 10)
    print_table("Time from Ctrl-C to the result", header, rows, options.markdown)
    rows = diagnosed(1 if options.quick else 5)
    print_table("Time of `gdopt.diagnose`, warm", ("", "s, median"), rows, options.markdown)


if __name__ == "__main__":
    main()
