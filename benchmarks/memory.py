"""What does a run need in memory, beyond the params and the data that the caller holds?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/memory.py                     # about 5 minutes; --quick: under 1, smaller

The first table compares 190 MB of data in a closure with the same data as an argument: the peak memory of a fresh
process for each row, after 10 steps of a logistic regression. ``jax.jit`` bakes the closure's arrays into the program,
and the compiler copies them at will.

The second has 5 steps of a linear layer whose weights take 270 MB: the peak less what was in use before the call, in
sizes of the params. The caller's own params count as the first of them. The device counts on a GPU, the process on a
CPU.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tables import Row, alone, arguments, draw_bars, installed, print_heading, print_table

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "optimistix", "numpy")
STEPS, RATE = 10, 0.1


def megabytes_in_use() -> float:
    """The memory in use by the device if it counts that, else by the process."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_in_use"] / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_megabytes() -> float:
    """The most that was ever in use."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def logistic_loss(params: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    logits = data[0] @ params
    return jnp.mean(jnp.logaddexp(0.0, logits) - data[1] * logits)


# The loss and the loop of loop_overhead.py once more: importing that imports its peers, whose memory would count here.


def scan(loss: Callable[..., jax.Array], params: jax.Array, *args: Any) -> jax.Array:
    def step(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params, *args)
        return params - RATE * grad, value

    return lax.scan(step, params, length=STEPS)[0]


def data_peak(library: str, closed_over: bool, rows: int) -> float:
    """The peak of a process that fits a logistic regression, in MB."""
    params = jnp.zeros(95)
    make = jax.jit(lambda: jnp.sin(jnp.arange(rows * 95, dtype=jnp.float32) ** 2).reshape(rows, 95))  # without a copy
    features = make()
    data = features, (features[:, 0] > 0).astype(jnp.float32)
    closed = lambda params, _args=None: logistic_loss(params, data)
    match library:
        case "`gdopt.minimize`":
            import gdopt

            run = gdopt.minimize(
                closed if closed_over else logistic_loss,
                params,
                args=() if closed_over else (data,),
                learning_rate=RATE,
                max_steps=STEPS,
            ).params
        case "hand-written `lax.scan`":
            run = (
                jax.jit(lambda p: scan(closed, p))(params)
                if closed_over
                else jax.jit(scan, static_argnums=0)(logistic_loss, params, data)
            )
        case _:
            import optimistix

            solver = optimistix.GradientDescent(RATE, rtol=0.0, atol=0.0)
            loss, args = (closed, None) if closed_over else (logistic_loss, data)
            run = optimistix.minimise(loss, solver, params, args, max_steps=STEPS, throw=False).value
    jax.block_until_ready(run)
    return peak_megabytes()


def layer_loss(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean((x @ weights - 1) ** 2)


def layer_peak(name: str, width: int) -> float:
    """The peak of a run on a linear layer, in sizes of its weights, the caller's own included."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, width), np.float32)) / width**0.5
    weights = jnp.zeros((width, width))
    jax.block_until_ready((x, weights + 0))
    before, size = megabytes_in_use(), weights.nbytes / 2**20
    if name == "hand-written `lax.scan`":
        jax.block_until_ready(jax.jit(scan, static_argnums=0)(layer_loss, weights, x))
    else:
        import gdopt

        options = {**LAYERS[name]}
        if "search" in options:
            options["optimizer"] = getattr(gdopt, options.pop("search"))()
        jax.block_until_ready(gdopt.minimize(layer_loss, weights, args=(x,), max_steps=5, **options).params)
    return 1 + (peak_megabytes() - before) / size


LAYERS: dict[str, dict[str, Any]] = {
    "hand-written `lax.scan`": {},
    "`gd`, `keep_best=False`": {"learning_rate": RATE, "keep_best": False},
    "`gd`": {"learning_rate": RATE},
    "`optax.adam`, `keep_best=False`": {"learning_rate": 1e-3, "optimizer": optax.adam, "keep_best": False},
    "`spectral`": {"search": "spectral"},
    "`quasi_newton`, 5 pairs": {"search": "quasi_newton"},
}
LIBRARIES = ("hand-written `lax.scan`", "`gdopt.minimize`", "optimistix `GradientDescent`")


def main() -> None:
    """Prints both tables."""
    options = arguments(__doc__, "smaller sizes, once each", "also draw the second table")
    print_heading("memory", options.flags, installed(PACKAGES), options.markdown)
    repeats, rows, width = (1, 125_000, 4096) if options.quick else (3, 500_000, 8192)

    table = []
    for library in LIBRARIES:
        closed, passed = (
            statistics.median(alone(data_peak, library, closed_over, rows) for _ in range(repeats))
            for closed_over in (True, False)
        )
        table.append(Row(library, [f"{closed:.0f}", f"{passed:.0f}", f"{closed / passed:.2f}"]))
    title = f"Peak memory of the process with {rows * 95 * 4 / 1e6:.0f} MB of data"
    print_table(title, ["MB", "closed over", "as an argument", "ratio"], table, options.markdown)

    peaks = {name: statistics.median(alone(layer_peak, name, width) for _ in range(repeats)) for name in LAYERS}
    table = [Row(name, [f"{peak:.2f}"]) for name, peak in peaks.items()]
    title = f"Peak memory with {width**2 * 4 / 1e9:.2f} GB of params, in sizes of them"
    print_table(title, ["run", "params"], table, options.markdown)
    if options.picture:
        draw_bars(peaks, "peak memory, in sizes of the params", options.picture)


if __name__ == "__main__":
    main()
