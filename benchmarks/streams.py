"""What does a step on a batch of a stream cost, compared with the Python loop that you would write by hand?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/streams.py                    # about 7 minutes; --quick: two; --markdown: for RESULTS.md

Networks of three sizes, whose steps take some 0.1, 1 and 10 ms, are trained at one fixed rate, in float32, on the same
batches of NumPy arrays. The yardstick is a hand-written loop over a jitted step that puts each batch on the device
while the step before is computed, and leaves the losses unread. Before anything is timed, all loops must reach the same
loss. They run in turn, round after round. A ratio is taken within its round, and the table gives the median over the
rounds and the quartiles. The second table has a loader that waits for each batch, like one that reads from a disk.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gdopt
from tables import Row, arguments, installed, interleaved, print_heading, print_table, ratios, seconds

AGREEMENT = 1e-3  # relative
PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "numpy")
RATE = 0.01
FEATURES, CLASSES = 64, 10
DISTINCT = 20  # batches, over and over again

Params = list[tuple[jax.Array, jax.Array]]
Batch = tuple[np.ndarray, np.ndarray]


class Size(NamedTuple):
    """A network, its batches, and how often it is trained."""

    name: str
    rows: int
    hidden: int
    layers: int
    wait: float  # seconds for a batch of the slow loader: some half of a step
    steps: int
    rounds: int
    quick_rounds: int


SIZES = (
    Size("0.1 ms", 64, 64, 1, wait=5e-5, steps=1500, rounds=25, quick_rounds=7),
    Size("1 ms", 256, 256, 1, wait=5e-4, steps=300, rounds=25, quick_rounds=7),
    Size("10 ms", 1024, 256, 2, wait=5e-3, steps=50, rounds=25, quick_rounds=5),
)


class Loader:
    """So many batches, and what it takes to wait for them."""

    def __init__(self, size: Size, wait: float):
        random = np.random.default_rng(0)
        self._size, self._wait, self._batches = size, wait, []
        for _ in range(DISTINCT):
            features = random.standard_normal((size.rows, FEATURES)).astype(np.float32)
            self._batches.append((features, random.integers(0, CLASSES, size.rows).astype(np.int32)))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._size.steps):
            if self._wait:
                time.sleep(self._wait)
            yield self._batches[number % DISTINCT]


def start(size: Size) -> Params:
    """Weights and offsets of a network, normally distributed."""
    random = np.random.default_rng(1)
    widths = [FEATURES, *[size.hidden] * size.layers, CLASSES]
    return [
        (jnp.asarray(random.standard_normal((n, m)) / n**0.5, jnp.float32), jnp.zeros(m))
        for n, m in itertools.pairwise(widths)
    ]


def network_loss(params: Params, batch: Any) -> jax.Array:
    """The cross-entropy of a network with tanh units."""
    features, labels = batch
    for weights, offsets in params[:-1]:
        features = jnp.tanh(features @ weights + offsets)
    weights, offsets = params[-1]
    scores = jax.nn.log_softmax(features @ weights + offsets)
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))


@jax.jit
def step(params: Params, batch: Any) -> tuple[Params, jax.Array]:
    """One update, and the loss before it."""
    value, grad = jax.value_and_grad(network_loss)(params, batch)
    return jax.tree.map(lambda x, g: x - RATE * g, params, grad), value


def ahead(params: Params, loader: Iterable[Batch]) -> Params:
    """The yardstick."""
    batches, losses = iter(loader), []
    batch = jax.device_put(next(batches, None))
    while batch is not None:
        params, value = step(params, batch)
        losses.append(value)
        batch = jax.device_put(next(batches, None))
    return params


def as_they_are(params: Params, loader: Iterable[Batch]) -> Params:
    """Batches as arguments of the step, which takes them to the device itself."""
    losses = []
    for batch in loader:
        params, value = step(params, batch)
        losses.append(value)
    return params


def each_loss_read(params: Params, loader: Iterable[Batch]) -> Params:
    """The loop of most tutorials: a batch, a step, and its loss for the log."""
    losses = []
    for batch in loader:
        params, value = step(params, jax.device_put(batch))
        losses.append(float(value))
    return params


def minimize(params: Params, loader: Iterable[Batch], **options: Any) -> gdopt.Result:
    """The same with the stops, the history and the last good point that gdopt keeps."""
    return gdopt.minimize(network_loss, params, data=loader, learning_rate=RATE, epochs=1, **options)


LOOPS: dict[str, Callable[[Params, Loader], Any]] = {
    "Python loop, jitted step, `device_put` one ahead": ahead,
    "Python loop, jitted step on NumPy's arrays": as_they_are,
    "Python loop, jitted step, each loss read": each_loss_read,
    "`gdopt.minimize`, loop": minimize,
    "the same with `keep_best=False`": functools.partial(minimize, keep_best=False),
}


def clocks(size: Size, wait: float) -> dict[str, Callable[[], float]]:
    """Every loop as a function that returns the seconds of a step. All agree, and all are warm."""
    params, loader = start(size), Loader(size, wait)

    def clock(run: Callable[[Params, Loader], Any]) -> float:
        result: list[Any] = []
        taken = seconds(lambda: result.append(run(params, loader)) or getattr(result[0], "params", result[0]))
        # Of gdopt its loop alone: all is compiled and placed, the history is copied to the host.
        return getattr(result[0], "run_seconds", taken) / size.steps

    found, batch = {}, next(iter(loader))
    agreed = float(network_loss(ahead(params, loader), batch))
    for name, run in LOOPS.items():
        run(params, loader)
        final = run(params, loader)
        reached = float(network_loss(getattr(final, "params", final), batch))
        if abs(reached - agreed) > AGREEMENT * agreed:
            raise RuntimeError(f"{name} came to a loss of {reached}, not to {agreed}.")
        found[name] = functools.partial(clock, run)
    return found


def step_table(waiting: bool, quick: bool) -> tuple[list[str], list[Row]]:
    """The header and the rows."""
    header, columns = ["loop"], []
    for size in SIZES:
        clock, rounds = clocks(size, size.wait * waiting), size.quick_rounds if quick else size.rounds
        times = interleaved(clock, rounds)
        low, median, high = np.quantile(times[:, 0] * 1e3, (0.25, 0.5, 0.75))
        header.append(f"steps of {size.name}, {size.steps} in each of {rounds} rounds")
        columns.append([f"1.00 = {median:.3g} ms ({low:.3g}-{high:.3g})", *ratios(times)[1:]])
    return header, [Row(name, cells) for name, cells in zip(LOOPS, zip(*columns, strict=True), strict=True)]


def main() -> None:
    """Prints the tables."""
    options = arguments(__doc__, "fewer rounds")
    print_heading("streams", options.flags, installed(PACKAGES), options.markdown)
    for title, waiting in (
        ("Time per step, as a ratio to the first loop: median (quartiles)", False),
        ("The same with a loader that waits for half a step", True),
    ):
        print_table(title, *step_table(waiting, options.quick), options.markdown)


if __name__ == "__main__":
    main()
