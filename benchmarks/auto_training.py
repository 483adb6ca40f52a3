"""Training without a rate, against the recipes that people use and the best of 20 constant rates.

python benchmarks/auto_training.py [--quick] [--markdown]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import gdopt
from gdopt import schedules
from tables import Row, arguments, print_heading, print_table, processes
from training_tasks import TASKS, Task

EPOCHS, SEEDS = (10, 30), (100, 101, 102)  # seeds on which nothing was tuned
GRID = np.geomspace(1e-5, 3, 20)
PACKAGES = ("gdopt", "jax", "optax", "scikit-learn")
FAILED = 20.0  # the points below the best constant rate from which on a run counts as failed
OURS, OUR_ADAM = "gdopt, nothing given", "gdopt, optimizer=optax.adam"


def fastai(steps: int) -> Any:
    """fastai's one-cycle at its default rate: the momentum falls while the rate rises."""
    rise = schedules.one_cycle(1e-3, steps, pct_start=0.25)
    momentum = lambda step: 0.95 - 0.1 * (rise(step) - 4e-5) / 9.6e-4
    return optax.inject_hyperparams(optax.adamw)(rise, b1=momentum, b2=0.99, eps=1e-5, weight_decay=0.01)


# By name, an optimizer for so many steps.
RECIPES: dict[str, Callable[[int], Any]] = {
    "Adam, 1e-3": lambda steps: optax.adam(1e-3),
    "AdamW, 1e-3, cosine": lambda steps: optax.adamw(optax.cosine_decay_schedule(1e-3, steps)),
    "AdamW, 1e-3, one-cycle": lambda steps: optax.adamw(schedules.one_cycle(1e-3, steps)),
    "Adam, 1e-2, one-cycle": lambda steps: optax.adam(schedules.one_cycle(1e-2, steps)),
    "prodigy": lambda steps: optax.contrib.prodigy(),
    "prodigy, cosine": lambda steps: optax.contrib.prodigy(optax.cosine_decay_schedule(1.0, steps)),
    "muon, 0.02, cosine": lambda steps: optax.contrib.muon(optax.cosine_decay_schedule(0.02, steps)),
    "schedule-free AdamW": lambda steps: optax.contrib.schedule_free_adamw(),
    "DoG": lambda steps: optax.contrib.dog(1.0),
    "fastai's one-cycle": fastai,
}


def measure(name: str, epochs: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return the score on held-out rows, and the steps over those asked for, by recipe and by constant rate."""
    task = TASKS[name]()
    steps = len(task.train[0]) // task.batch_size * epochs
    runs: dict[str, dict[str, Any]] = {OURS: {}, OUR_ADAM: {"optimizer": optax.adam}}
    runs |= {recipe: {"optimizer": make(steps)} for recipe, make in RECIPES.items()}
    runs |= {f"grid {rate:.3g}": {"optimizer": optax.adam, "learning_rate": rate} for rate in GRID}
    return {run: score(task, epochs, seed, options) for run, options in runs.items()}


def score(task: Task, epochs: int, seed: int, options: dict[str, Any]) -> tuple[float, float]:
    """Train, and return the points on held-out rows, and the steps made over those asked for."""
    result = gdopt.minimize(
        task.loss,
        task.start(seed),
        data=task.train,
        batch_size=task.batch_size,
        epochs=epochs,
        key=jax.random.key(seed),
        **options,
    )
    test = result.range_test
    more = (0 if test is None else len(test.loss)) + result.steps * result.message.count("tried again")
    points = float(task.score(result.params, task.test))
    return (points if np.isfinite(points) else -1e3), 1 + more / max(result.steps, 1)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Return the ranks of each row's entries, the highest first; equal ones share theirs."""
    higher = (scores[:, None, :] > scores[:, :, None]).sum(-1)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    return 1 + higher + (equal - 1) / 2


def rows_of(runs: dict[tuple[str, int], dict[str, np.ndarray]], names: list[str]) -> list[Row]:
    """Return a row for each recipe: its mean rank, what it loses to the best constant rate, failures and cost."""
    means = np.array([[run[name][:, 0].mean() for name in names] for run in runs.values()])
    grids = np.array(
        [max(of[:, 0].mean() for key, of in run.items() if key.startswith("grid")) for run in runs.values()]
    )
    ranked, lost = ranks(means.round(2)), grids[:, None] - means
    works = (lost[:, 1:] < FAILED).any(axis=1)
    rows = []
    for column, name in enumerate(names):
        failed = int(((lost[:, column] >= FAILED) & works).sum())
        cost = np.mean([run[name][:, 1].mean() for run in runs.values()])
        each = lost[:, column]
        cells = [f"{ranked[:, column].mean():.2f}", f"{np.median(each):+.1f}", f"{min(each.max(), 999):+.1f}"]
        rows.append(Row(name, [*cells, f"{(each <= 2).sum()} of {len(each)}", f"{failed}", f"{cost:.2f}"]))
    return rows


def main() -> None:
    """Print the table over all trainings, and one row for each training."""
    options = arguments(__doc__, "one seed of each training for 10 epochs, in about ten minutes")
    print_heading("auto_training", options.flags, PACKAGES, options.markdown)
    epochs, seeds = (EPOCHS[:1], SEEDS[:1]) if options.quick else (EPOCHS, SEEDS)
    jobs = [(name, many, seed) for name in TASKS for many in epochs for seed in seeds]
    with processes(os.cpu_count() or 1, x64=False) as pool:
        found = dict(zip(jobs, pool.map(measure, *zip(*jobs, strict=True), chunksize=len(seeds)), strict=True))
    runs = {
        (name, many): {run: np.array([found[name, many, seed][run] for seed in seeds]) for run in found[jobs[0]]}
        for name in TASKS
        for many in epochs
    }
    names = [OURS, *RECIPES]
    header = ["recipe", "mean rank", "points lost, median", "worst", "within 2 points", "failed", "steps"]
    title = f"{len(runs)} trainings by {len(seeds)} seeds, against the best of {len(GRID)} constant rates of Adam"
    print_table(title, header, rows_of(runs, names), options.markdown)
    print_table(
        "`optimizer=optax.adam` without a rate", header, rows_of(runs, [OUR_ADAM, *RECIPES])[:1], options.markdown
    )
    each = [
        Row(f"{name}, {many} epochs", [f"{run[recipe][:, 0].mean():.1f}" for recipe in names])
        for (name, many), run in runs.items()
    ]
    print_table("Points on held-out rows", ["training", *names], each, options.markdown)


if __name__ == "__main__":
    main()
