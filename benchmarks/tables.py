"""Shared parts of the benchmarks: clocks, fresh processes, and the printing of tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np


class Row(NamedTuple):
    """One row of a table: a label and its cells."""

    label: str
    cells: Sequence[str]


def render(header: Sequence[str], rows: Sequence[Row], markdown: bool) -> str:
    """An aligned table, plain or Markdown."""
    lines = [list(header), *([row.label, *row.cells] for row in rows)]
    if not markdown:
        lines = [[plain(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in padded)


def plain(text: str) -> str:
    """The text without Markdown's backticks."""
    return text.replace("`", "")


def environment(packages: Iterable[str]) -> str:
    """Versions and cores, in one line."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    device = jax.devices()[0]
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, running on {device.device_kind}"


def print_heading(script: str, flags: str, packages: Iterable[str], markdown: bool) -> None:
    """The command that repeats the run, and what it ran on."""
    command = f"python benchmarks/{script}.py{flags}"
    if markdown:
        print(f"## {script}\n\n```\n{command}\n```\n\n{environment(packages)}.", flush=True)
    else:
        print(f"{command}\n{environment(packages)}", flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Row], markdown: bool) -> None:
    """A title and its table."""
    title = f"{title}." if markdown else plain(title)
    print(f"\n{title}\n\n{render(header, rows, markdown)}", flush=True)


def processes(count: int, x64: bool) -> ProcessPoolExecutor:
    """Fresh processes, in which JAX's default dtype is float64 or float32."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _set_x64, (x64,))


def _set_x64(x64: bool) -> None:
    jax.config.update("jax_enable_x64", x64)


def arguments(
    doc: str | None,
    quick: str,
    picture: str | None = None,
    only: Sequence[str] = (),
    reference: str | None = None,
) -> argparse.Namespace:
    """The options of a script with their help, and as ``flags`` those that repeat its run."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--markdown", action="store_true", help="print what RESULTS.md has for this script")
    if picture:
        parser.add_argument("--picture", metavar="PATH", help=picture)
    if only:
        parser.add_argument("--only", nargs="+", choices=only, help="run these groups of problems alone")
    if reference:
        parser.add_argument("--reference", action="store_true", help=reference)
    options = parser.parse_args()
    options.flags = " --quick" * options.quick + " --markdown" * options.markdown
    if only and options.only:
        options.flags += f" --only {' '.join(options.only)}"
    if picture and options.picture:
        options.flags += f" --picture {options.picture}"
    return options


def installed(packages: Iterable[str]) -> list[str]:
    """The packages that are installed; not all peers are dependencies of the benchmarks."""
    return [package for package in packages if importlib.util.find_spec(package.replace("-", "_"))]


def seconds(run: Callable[[], Any]) -> float:
    """The seconds until all results of a run are there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def interleaved(clocks: Mapping[str, Callable[[], float]], rounds: int) -> np.ndarray:
    """Run every clock once in each round, in turn: (round, clock)."""
    return np.array([[clock() for clock in clocks.values()] for _ in range(rounds)])


def ratios(times: np.ndarray) -> list[str]:
    """Each clock's median ratio to the first one of the same round, with the quartiles."""
    quantiles = np.quantile(times / times[:, :1], (0.25, 0.5, 0.75), axis=0).T
    return [f"{median:.2f} ({low:.2f}-{high:.2f})" for low, median, high in quantiles]


def alone(function: Callable[..., Any], *arguments: Any, x64: bool = False) -> Any:
    """Return what the function returns in a fresh process in which nothing ran yet."""
    with processes(1, x64) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def with_variables(**values: str) -> Generator[None]:
    """Set variables of the environment for the processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def draw_bars(values: Mapping[str, float], label: str, path: str, *, log: bool = False) -> None:
    """One bar for each value, from the top down."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + len(values) / 3), layout="constrained")
    axes = figure.subplots()
    names = list(values)[::-1]
    axes.barh(list(map(plain, names)), [values[name] for name in names], log=log)
    axes.set_xlabel(label)
    figure.savefig(path, dpi=120)
