"""Results as small tables in a notebook. Their colors are those of the page, so that they suit a dark theme."""

from __future__ import annotations

import contextlib
import html
from typing import Any

import numpy as np

_WIDTH, _HEIGHT = 240, 40  # of a curve, in pixels
_MOST = 240  # points of a curve
_CELL = 'style="text-align: left; vertical-align: top"'


def table(title: str, rows: dict[str, str], losses: Any = None, label: str = "") -> str:
    """Return a title and a row for each name, and a curve of losses if there are any."""
    cells = "".join(
        f'<tr><th {_CELL} scope="row">{html.escape(name)}</th><td {_CELL}>{html.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    curve = ""
    with contextlib.suppress(Exception):  # The history of a result that went through `jax.tree.map` may be anything.
        curve = sparkline(np.asarray(losses, float), label)
    if curve:
        cells += f'<tr><th {_CELL} scope="row">{html.escape(label)}</th><td {_CELL}>{curve}</td></tr>'
    caption = f'<caption style="text-align: left; font-weight: bold">{html.escape(title)}</caption>'
    return f"<table>{caption}<tbody>{cells}</tbody></table>"


def sparkline(values: np.ndarray, label: str) -> str:
    """Return a curve as SVG, logarithmic if it spans decades; "" for less than two points that can be drawn.

    Values that are NaN, infinite or beyond 1e200 are gaps.
    """
    if values.ndim != 1:
        return ""
    with np.errstate(all="ignore"):
        drawn = np.abs(values) < 1e200
        known = values[drawn]
        if known.size < 2:
            return ""
        above = known[known > 0]
        if known.min() >= 0 and above.size and above.max() > 100 * above.min():  # Zeros are at the lower edge.
            values, known = np.log(np.maximum(values, above.min())), np.log(np.maximum(known, above.min()))
    low, span = known.min(), known.max() - known.min()
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MOST)).round().astype(int))
    x = 2 + (_WIDTH - 4) * at / max(len(values) - 1, 1)
    y = _HEIGHT - 3 - (_HEIGHT - 6) * ((values[at] - low) / span if span > 0 else np.full(len(at), 0.5))
    lines: list[list[str]] = [[]]
    for place, across, down in zip(at, x, y, strict=True):
        if drawn[place]:
            lines[-1].append(f"{across:.1f},{down:.1f}")
        elif lines[-1]:
            lines.append([])
    shapes = "".join(f'<polyline points="{" ".join(line)}"/>' for line in lines if line)
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} '
        f'{_HEIGHT}" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linejoin="round" '
        f'stroke-linecap="round">{shapes}</svg>'
    )
