"""Helpers of the gallery: the pictures of gdopt.plot, and a fresh start for each example."""

from __future__ import annotations

from typing import Any

import jax
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def figures(block: tuple, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figures that a cell makes without pyplot, as gdopt.plot does: its variables, and its last expression."""
    seen: list[Figure] = block_vars.setdefault("seen_figures", [])
    new: list[Figure] = []
    for value in block_vars["example_globals"].values():
        if isinstance(value, Figure) and not any(value is other for other in seen):
            seen.append(value)
            if value.canvas.manager is None:  # pyplot has no part in it; the scraper of matplotlib saves the others
                new.append(value)
    paths = []
    for figure, path in zip(new, block_vars["image_path_iterator"], strict=False):
        figure.savefig(path, dpi=100)
        paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"], "; ".join(map(described, new)))


def described(figure: Figure) -> str:
    """Return the alternative text of a figure: the titles of its panels and what they show."""
    panels = [(axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) for axes in figure.axes]
    return ", ".join(title or f"{y or 'values'} over {x or 'steps'}" for title, y, x in panels)


def reset(gallery_conf: dict[str, Any], fname: str) -> None:
    """Undo what an example may have set."""
    jax.config.update("jax_enable_x64", False)
