"""What does a validation at the end of each epoch cost, over its own evaluations?

    python -m pip install -e '.[benchmarks]'
    python benchmarks/validation.py                 # about 3 minutes; --quick: one; --markdown: for RESULTS.md

Networks whose epochs take some 1, 20 and 200 ms are trained on arrays at one fixed rate, in float32, with 512 held-out
rows and without. Runs of both kinds and the compiled evaluation alone take turns, round after round. The cost is the
difference of the two runs of a round, divided by the epochs. The table gives medians over the rounds and quartiles.
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
EVALUATIONS = 200  # in a row, of which one is the evaluation alone
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
        self._evaluation = jax.jit(loss)
        for _ in range(2):
            plain, validated = self.run(False), self.run(True)
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
        epochs = self._size.epochs
        plain, validated = (self.run(given).run_seconds / epochs for given in (False, True))
        began = time.perf_counter()
        for _ in range(EVALUATIONS):
            jax.block_until_ready(self._evaluation(self._start, self._held_out))
        return [plain, validated, (time.perf_counter() - began) / EVALUATIONS]


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
    header = ["epochs of", "an epoch", "its validation", "evaluation alone", "ratio of these", "the rest, of an epoch"]
    rows = []
    for size in SIZES:
        trial = Trial(size)
        rows.append(Row(size.name, cells(np.array([trial.seconds() for _ in range(rounds)]))))
    print_table(
        f"The cost of a validation per epoch, median (quartiles) of {rounds} rounds", header, rows, options.markdown
    )


if __name__ == "__main__":
    main()
