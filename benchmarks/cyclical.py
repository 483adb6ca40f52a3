"""Do cyclical rates reach the accuracy of the best fixed rate in fewer steps?

python benchmarks/cyclical.py [--quick] [--markdown] [--cifar10 DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import cifar10
import gdopt
from gdopt import schedules
from networks import TRAININGS, accuracy
from tables import Row, print_heading, print_table, processes

PACKAGES = ("gdopt", "jax", "optax", "scikit-learn")
GRID = np.geomspace(1e-3, 1e2, 15)
EPOCHS = 60
SHORTER = (6, 10, 15, 20, 25, 30, 40, 60)
NAMES = ("digits, linear", "digits, MLP")
SEEDS = 10

# Shapes by the number of steps, to be multiplied by the highest rate. Smith: base_lr a quarter of max_lr, at least
# three cycles, to the end of one; gamma such that the height of the cycles has fallen to a tenth in the end.
POLICIES: dict[str, Callable[[int], Any]] = {
    "fixed": lambda steps: schedules.constant(1.0),
    "triangular": lambda steps: schedules.triangular(1 / 4, 1.0, steps // 6),
    "triangular2": lambda steps: schedules.triangular2(1 / 4, 1.0, steps // 6),
    "exp_range": lambda steps: schedules.exp_range(1 / 4, 1.0, steps // 6, gamma=0.1 ** (1 / steps)),
    "one-cycle": lambda steps: schedules.one_cycle(1.0, steps),
}


def trained(name: str, policy: str, top: float, epochs: int, seed: int) -> float:
    """The held-out accuracy at the end."""
    training = TRAININGS[name]
    rows, held = training.rows()
    shape = POLICIES[policy](len(rows[0]) // training.batch_size * epochs)
    highest = jax.numpy.asarray(top)  # closed over as an array, it compiles nothing anew
    rates = lambda step: highest * shape(step)
    result = training.run(gdopt.minimize, seed, learning_rate=rates, epochs=epochs, key=jax.random.key(seed))
    return accuracy(training, result.params, held) if result.success else 0.0


def table(names: tuple[str, ...], seeds: int) -> list[Row]:
    """For each training and policy, the shortest training whose mean accuracy is that of the best fixed rate."""
    rows = []
    with processes(os.cpu_count() or 1, x64=False) as pool:

        def mean_accuracies(name: str, policy: str, tops: list[float], epochs: list[int]) -> np.ndarray:
            jobs = [
                (name, policy, top, many, seed) for top, many in zip(tops, epochs, strict=True) for seed in range(seeds)
            ]
            each = pool.map(trained, *zip(*jobs, strict=True), chunksize=seeds)
            return np.array(list(each)).reshape(-1, seeds).mean(axis=1)

        for name in names:
            grid = mean_accuracies(name, "fixed", [*GRID], [EPOCHS] * len(GRID))
            best, goal = GRID[grid.argmax()], grid.max()
            suggestion = TRAININGS[name].run(gdopt.lr_find, 0, repeats=5).suggestion
            tops = {"best fixed rate": best, "twice the suggestion": 2 * suggestion}
            for where, top in tops.items():
                for policy in POLICIES:
                    reached = mean_accuracies(name, policy, [top] * len(SHORTER), [*SHORTER])
                    there = np.flatnonzero(reached >= goal)
                    cells = [f"{top:.3g}", f"{goal:.4f}", f"{reached.max():.4f}"]
                    cells += [f"{SHORTER[there[0]]}", f"{EPOCHS / SHORTER[there[0]]:.1f}"] if there.size else ["-", "-"]
                    rows.append(Row(f"{name}, {policy}, {where}", cells))
    return rows


def smith(directory: str, scale: float) -> list[Row]:
    """The paper's Table 1, first rows: the policies with the paper's rates and numbers of steps, times the scale."""
    rows, test = cifar10.load(directory)
    up = max(int(2000 * scale), 1)
    runs = {
        "fixed, 0.001 with two drops": (70_000, optax.piecewise_constant_schedule(1e-3, {60_000: 0.1, 65_000: 0.1})),
        "triangular2": (25_000, schedules.triangular2(1e-3, 6e-3, up)),
        "exp_range": (42_000, schedules.exp_range(1e-3, 6e-3, up, gamma=0.99994)),
        "one-cycle": (25_000, schedules.one_cycle(6e-3, int(25_000 * scale))),
    }
    table = []
    for name, (steps, rate) in runs.items():
        result = gdopt.minimize(
            cifar10.loss,
            cifar10.start(0),
            data=rows,
            batch_size=min(100, len(rows[1])),
            optimizer=cifar10.optimizer,
            learning_rate=rate,
            max_steps=max(int(steps * scale), 1),
            progress=scale == 1,
        )
        table.append(Row(name, [f"{result.steps}", f"{cifar10.accuracy(result.params, test):.3f}"]))
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three seeds of one training, in about two minutes")
    parser.add_argument("--markdown", action="store_true", help="print what RESULTS.md has for this script")
    parser.add_argument("--cifar10", metavar="DIRECTORY", help="the paper's own setting, on CIFAR-10's binary files")
    parser.add_argument("--scale", type=float, default=1.0, help="with --cifar10: times the paper's numbers of steps")
    options = parser.parse_args()

    flags = " --quick" * options.quick + " --markdown" * options.markdown
    if options.cifar10:
        print_heading(
            "cyclical", f"{flags} --cifar10 {options.cifar10} --scale {options.scale}", PACKAGES, options.markdown
        )
        rows = smith(options.cifar10, options.scale)
        print_table("CIFAR-10", ["policy", "steps", "test accuracy"], rows, options.markdown)
        return
    print_heading("cyclical", flags, PACKAGES, options.markdown)
    rows = table(NAMES[1:], 3) if options.quick else table(NAMES, SEEDS)
    title = f"Epochs to the mean held-out accuracy that the best fixed rate ends {EPOCHS} epochs with"
    header = ["training and policy", "highest rate", "goal", "best", "epochs", "times fewer than fixed"]
    print_table(title, header, rows, options.markdown)


if __name__ == "__main__":
    main()
