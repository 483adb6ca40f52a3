"""What does a validation at the end of each epoch cost, over its own evaluations?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/validation.py                 # about 3 minutes; --quick: one; --markdown: for RESULTS.md

Networks whose epochs take some 1, 20 and 200 ms are trained on arrays at one fixed rate, in float32, with 512 held-out
rows and without. The cost is the difference of the two runs, divided by the epochs. The yardstick is the evaluation in
a hand-written loop of two compiled programs, an epoch of updates and the loss of the held-out rows. All three take
turns, round after round. The table gives medians over the rounds and quartiles.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gdopt
from tables import Row, arguments, installed, print_heading, print_table

PACKAGES = ("jax", "jaxlib", "optax", "gdopt", "numpy")
FEATURES, CLASSES, HELD_OUT = 64, 10, 512
RATE = 1e-3


class Size(NamedTuple):
    """A network, its data, and how often it is trained."""

    name: str
    hidden: int
    rows: int
    batch: int
    epochs: int


SIZES = (
    Size("1 ms", 32, 640, 64, epochs=500),
    Size("20 ms", 128, 6400, 64, epochs=30),
    Size("200 ms", 256, 25600, 64, epochs=5),
)
ROUNDS, QUICK_ROUNDS = 21, 7


def loss(params: Any, batch: Any) -> jax.Array:
    """The cross-entropy of a network with one hidden layer."""
    features, labels = batch
    (first, offsets), (second, last) = params
    scores = jax.nn.log_softmax(jnp.tanh(features @ first + offsets) @ second + last)
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))


class Trial:
    """The runs of one size, and the evaluation alone. All is compiled and warm."""

    def __init__(self, size: Size):
        random = np.random.default_rng(0)
        normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
        self._size, self._data = size, (normal(size.rows, FEATURES), random.integers(0, CLASSES, size.rows))
        self._held_out = jax.device_put((normal(HELD_OUT, FEATURES), random.integers(0, CLASSES, HELD_OUT)))
        hidden = size.hidden
        self._start = [(normal(FEATURES, hidden) / 8, np.zeros(hidden, np.float32))]
        self._start += [(normal(hidden, CLASSES) / hidden**0.5, np.zeros(CLASSES, np.float32))]
        self._evaluation, self._epoch = jax.jit(loss), jax.jit(self._updates)
        self._epoch(self._start, self._data)
        *_, plain, validated = [self.run(given) for given in (False, True, False, True)]
        assert plain.history is not None
        assert validated.history is not None
        if plain.history.loss.tobytes() != validated.history.loss.tobytes():
            raise RuntimeError("The validation changed the run.")
        expected = float(self._evaluation(validated.params, self._held_out))
        np.testing.assert_allclose(validated.history.validation_loss.min(), expected, rtol=1e-5)

    def run(self, validated: bool) -> gdopt.Result:
        """Train, with the validation or without."""
        options = {"validation": self._held_out} if validated else {}
        given = {"batch_size": self._size.batch, "epochs": self._size.epochs, "learning_rate": RATE}
        return gdopt.minimize(loss, self._start, data=self._data, **given, **options)

    def seconds(self) -> list[float]:
        """Time an epoch without validation, one with it, and the evaluation alone."""
        epochs, params, spent = self._size.epochs, self._start, 0.0
        plain, validated = (self.run(given).run_seconds / epochs for given in (False, True))
        for _ in range(epochs):  # After an epoch an evaluation takes up to twice the time of one in a row of many.
            params = jax.block_until_ready(self._epoch(params, self._data))
            began = time.perf_counter()
            float(self._evaluation(params, self._held_out))
            spent += time.perf_counter() - began
        return [plain, validated, spent / epochs]

    def _updates(self, params: Any, data: Any) -> Any:
        """Make the updates of an epoch, without a shuffle."""
        size = self._size.batch

        def update(number: int, params: Any) -> Any:
            batch = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, number * size, size), data)
            return jax.tree.map(lambda x, g: x - RATE * g, params, jax.grad(loss)(params, batch))

        return jax.lax.fori_loop(0, self._size.rows // size, update, params)


def cells(times: np.ndarray) -> list[str]:
    """Return the cells of a size, from (round, what)."""
    plain, validated, alone = times.T
    extra = validated - plain
    seconds = [_quartiles(1e3 * some, " ms") for some in (plain, extra, alone)]
    return [*seconds, _quartiles(extra / alone), _quartiles(100 * (extra - alone) / plain, " %")]


def _quartiles(values: np.ndarray, unit: str = "") -> str:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{median:.3g}{unit} ({low:.2g} to {high:.2g})"


def main() -> None:
    """Print the table."""
    options = arguments(__doc__, "fewer rounds")
    print_heading("validation", options.flags, installed(PACKAGES), options.markdown)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    header = [
        "epochs of",
        "an epoch",
        "its validation",
        "evaluation by hand",
        "ratio of these",
        "the rest, of an epoch",
    ]
    rows = []
    for size in SIZES:
        trial = Trial(size)
        rows.append(Row(size.name, cells(np.array([trial.seconds() for _ in range(rounds)]))))
    print_table(
        f"The cost of a validation per epoch, median (quartiles) of {rounds} rounds", header, rows, options.markdown
    )


if __name__ == "__main__":
    main()
