"""Which schedule should follow a range test, and what does training without a rate lose against the best rate?

python benchmarks/auto_training.py [--quick] [--markdown]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import gdopt
from gdopt import schedules
from lr_finders import GRID, SEEDS, geometric
from networks import TRAININGS, accuracy
from tables import Row, arguments, print_heading, print_table, processes

EPOCHS = (10, 30)
PACKAGES = ("gdopt", "jax", "optax", "scikit-learn")

# What could follow a range test, for so many steps: by these shapes, times the suggestion.
AFTER: dict[str, Callable[[int], Any]] = {
    "constant": lambda steps: schedules.constant(1.0),
    "constant, twice the suggestion": lambda steps: schedules.constant(2.0),
    "triangular2, 3 cycles": lambda steps: schedules.triangular2(1 / 4, 1.0, steps // 6),
    "triangular2 to twice the suggestion": lambda steps: schedules.triangular2(1 / 2, 2.0, steps // 6),
    "one-cycle": lambda steps: schedules.one_cycle(1.0, steps),
    "one-cycle to twice the suggestion": lambda steps: schedules.one_cycle(2.0, steps),
    "one-cycle to three times the suggestion": lambda steps: schedules.one_cycle(3.0, steps),
}
AUTO = '`learning_rate="auto"`'


def measure(name: str, epochs: int, seed: int) -> dict[str, tuple[float, float, int]]:
    """By schedule, and by grid rate: training loss, held-out accuracy (minus the loss for a regression), steps."""
    training = TRAININGS[name]
    rows, held = training.rows()
    began = float(training.loss(training.start(seed), rows))
    steps = len(rows[0]) // training.batch_size * epochs

    def run(learning_rate: Any) -> tuple[float, float, int]:
        result = training.run(
            gdopt.minimize, seed, learning_rate=learning_rate, epochs=epochs, key=jax.random.key(seed)
        )
        loss = float(training.loss(result.params, rows))
        test = result.range_test
        if not result.success:
            loss = max(loss, began)
        return loss, accuracy(training, result.params, held), steps + (0 if test is None else len(test.loss))

    automatic = training.run(gdopt.minimize, seed, epochs=epochs, key=jax.random.key(seed))
    suggestion = jax.numpy.asarray(automatic.range_test.suggestion)  # as an array, it compiles nothing anew

    def scaled(shape: Any) -> Callable[[Any], Any]:
        return lambda step: suggestion * shape(step)

    tried = {after: run(scaled(shape(steps))) for after, shape in AFTER.items()}
    return {AUTO: run("auto")} | tried | {f"grid {rate:.3g}": run(rate) for rate in GRID}


def tables(names: list[str], epochs: tuple[int, ...], seeds: int) -> tuple[list[Row], list[Row]]:
    """Rows of the schedules over all trainings, by epochs, and of the automatic rate on each classification."""
    jobs = [(name, many, seed) for name in names for many in epochs for seed in range(seeds)]
    with processes(os.cpu_count() or 1, x64=False) as pool:
        runs = dict(zip(jobs, pool.map(measure, *zip(*jobs, strict=True), chunksize=seeds), strict=True))
    loss: dict[str, dict[int, list[float]]] = {after: {many: [] for many in epochs} for after in (AUTO, *AFTER)}
    automatic = []
    for name in names:
        for many in epochs:
            seen = [runs[name, many, seed] for seed in range(seeds)]
            grid = [key for key in seen[0] if key.startswith("grid")]
            best = min(grid, key=lambda key: np.mean([np.log(run[key][0]) for run in seen]))
            for after in loss:
                loss[after][many] += [run[after][0] / run[best][0] for run in seen]
            if TRAININGS[name].classes:
                held = max(grid, key=lambda key: np.median([run[key][1] for run in seen]))
                lost = np.array([run[held][1] - run[AUTO][1] for run in seen])
                more = np.median([run[AUTO][2] / run[held][2] - 1 for run in seen])
                cells = [f"{np.median([run[key][1] for run in seen]):.3f}" for key in (held, AUTO)]
                cells += [f"{np.median(lost) * 100:+.1f}", f"{lost.max() * 100:+.1f}", f"{more:.0%}"]
                automatic.append(Row(f"{name}, {many} epochs", cells))
    rows = []
    for after, by_epochs in loss.items():
        every = np.concatenate([*by_epochs.values()])
        cells = [f"{geometric(np.array(ratios)):.2f}" for ratios in by_epochs.values()]
        rows.append(Row(after, [*cells, f"{every.max():.2f}"]))
    return rows, automatic


def main() -> None:
    """Prints both tables."""
    options = arguments(__doc__, "three seeds of three trainings, in about two minutes")
    print_heading("auto_training", options.flags, PACKAGES, options.markdown)
    names = [*TRAININGS][1::2] if options.quick else [*TRAININGS]
    epochs, seeds = (EPOCHS, 3) if options.quick else (EPOCHS, SEEDS)
    rows, automatic = tables(names, epochs, seeds)
    title = f"Final training loss over the best of {len(GRID)} constant rates: {len(names)} trainings by {seeds} seeds"
    print_table(
        title, ["after the range test", *(f"{many} epochs" for many in epochs), "worst"], rows, options.markdown
    )
    header = ["training", "best of the grid", "automatic", "points lost, median", "worst", "more steps"]
    print_table("Held-out accuracy without a learning rate", header, automatic, options.markdown)


if __name__ == "__main__":
    main()
