"""The runs of the interactive page: two losses at forty learning rates each, computed when the site is built.

The page reads them from a script, not from JSON, because browsers fetch no data for pages that are opened as files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contourpy
import jax.numpy as jnp
import numpy as np

import gdopt

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

FILE = Path(__file__).resolve().parents[1] / "_static" / "interactive" / "runs.js"
BEGIN, END = "window.gdoptRuns = ", ";\n"

RATES = [round(0.004 * k, 3) for k in range(1, 41)]
MAX_STEPS = 300
X = np.array([-4, -2, 0, 2, 4], np.float32)
Y = np.array([-7.2, -2.7, 1.3, 4.8, 8.8], np.float32)
START = (-1.0, 5.0)  # slope and offset

# The corners of the pictures: all shows are from about two distances of the start.
SLOPES, OFFSETS, LOSSES = (-3.5, 7.5), (-4.0, 6.0), (0.0, 250.0)
LEVELS = (0.5, 2, 5, 10, 20, 40, 70, 110, 160, 220)
_GRID = 121  # the points of the curve, and of the contours on each side
_OVERSHOOT = 0.01  # as in gdopt.plot.valley: the least distance from the minimum, over that of the start


def one_weight(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean((w * x + 1 - y) ** 2)


def two_weights(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean((w[0] * x + w[1] - y) ** 2)


def run(loss: Any, start: Any, rate: float) -> gdopt.Result:
    return gdopt.minimize(
        loss, start, args=(X, Y), optimizer=gdopt.gd, learning_rate=rate, max_steps=MAX_STEPS, record_params=True
    )


def overshoots(slopes: np.ndarray, found: float) -> int:
    """Count the steps that jump across the minimum, by more than a little."""
    away = slopes - found
    far = np.abs(away) > _OVERSHOOT * np.abs(away[0])
    return int(np.sum((away[1:] * away[:-1] < 0) & far[1:] & far[:-1]))


def in_words(result: gdopt.Result, jumps: int) -> str:
    """Say what a run does, by its status, its success and its jumps across the minimum."""
    if result.status in (gdopt.Status.DIVERGED, gdopt.Status.NON_FINITE):
        return "diverges"
    times = f"overshoots {jumps} time{'' if jumps == 1 else 's'}"
    if result.success:
        return f"{times}, then converges" if jumps else "converges"
    assert result.history is not None
    end = "the loss rises" if result.history.loss[-1] > result.history.loss[0] else "more steps are needed"
    return f"{times}, and {end}" if jumps else f"too slow: {end}"


def _five_digits(values: Any) -> Any:
    return np.vectorize(lambda value: float(f"{value:.5g}"))(np.asarray(values, np.float64)).tolist()


def described(result: gdopt.Result) -> dict[str, Any]:
    """Return what the page shows of a run."""
    assert result.history is not None
    points = np.asarray(result.history.params)
    slopes = points.reshape(len(points), -1)[:, 0]
    return {
        "points": _five_digits(points),
        "losses": _five_digits(result.history.loss),
        "status": result.status.name,
        "words": in_words(result, overshoots(slopes, float(np.ravel(result.params)[0]))),
        "message": result.message,
    }


def contours() -> list[list[list[list[float]]]]:
    """Return the lines of each level, as lists of points."""
    slopes, offsets = np.linspace(*SLOPES, _GRID), np.linspace(*OFFSETS, _GRID)
    heights = [[float(two_weights((w, b), X, Y)) for w in slopes] for b in offsets]
    drawn = contourpy.contour_generator(slopes, offsets, heights)
    return [[_five_digits(line) for line in drawn.lines(level)] for level in LEVELS]


def runs() -> dict[str, Any]:
    """Return all that the page draws."""
    curve = np.linspace(*SLOPES, _GRID)
    return {
        "rates": RATES,
        "slopes": SLOPES,
        "offsets": OFFSETS,
        "losses": LOSSES,
        "curve": _five_digits([(w, float(one_weight(w, X, Y))) for w in curve]),
        "levels": LEVELS,
        "contours": contours(),
        "one": [described(run(one_weight, START[0], rate)) for rate in RATES],
        "two": [described(run(two_weights, jnp.array(START), rate)) for rate in RATES],
    }


def write(app: Sphinx) -> None:
    FILE.write_text(BEGIN + json.dumps(runs(), separators=(",", ":")) + END, encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    """Return what `write` wrote."""
    return json.loads(file.read_text(encoding="utf-8").removeprefix(BEGIN).removesuffix(END))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
