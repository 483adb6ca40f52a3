"""What the benchmarks share: fresh processes to run in, and how their tables are printed."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import jax


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
    """Without Markdown's backticks."""
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
    """Fresh ones, in which JAX's default dtype is float64 or float32."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _set_x64, (x64,))


def _set_x64(x64: bool) -> None:
    jax.config.update("jax_enable_x64", x64)
