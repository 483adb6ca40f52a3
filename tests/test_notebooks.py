"""Notebooks show results as tables and pictures, without any further import."""

from __future__ import annotations

import base64
from typing import Any

import pytest

pytest.importorskip("ipykernel")
nbclient: Any = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat")

SETUP = """
import gdopt, jax.numpy as jnp
loss = lambda x: x**2
result = gdopt.minimize(loss, 1.0, learning_rate=0.9, record_params=True)
plane = lambda x: jnp.sum(jnp.array([1.0, 9.0]) * x**2)
on_plane = gdopt.minimize(plane, jnp.ones(2), learning_rate=0.1, record_params=True)
"""
CELLS: dict[str, str] = {
    "setup": SETUP,
    "result": "result",
    "range test": "gdopt.lr_find(plane, jnp.ones(2))",
    "diagnosis": "gdopt.diagnose(gdopt.minimize(lambda x: jnp.sqrt(x), 1.0, learning_rate=3.0))",
    "descent": "gdopt.plot.descent(result)",
    "lr_find": "gdopt.plot.lr_find(gdopt.lr_find(plane, jnp.ones(2)))",
    "schedule": "gdopt.plot.schedule(gdopt.schedules.triangular(0.1, 0.5, 4), 20)",
    "valley": "gdopt.plot.valley(loss, result)",
    "path": "gdopt.plot.path(plane, on_plane)",
    "animate": "gdopt.plot.animate(loss, result, 'ball.gif')",
    "live": """
live = gdopt.plot.live(every=0)
live_result = gdopt.minimize(loss, 1.0, learning_rate=0.01, callback=live, callback_every=50)
""",
    "live again": """
for start in (1.0, 2.0):
    gdopt.minimize(loss, start, learning_rate=0.01, callback=live, callback_every=50)
""",
    "live seldom": """
slow = gdopt.plot.live(every=1000)
seldom = gdopt.minimize(loss, 1.0, learning_rate=0.01, callback=slow, callback_every=50)
""",
    "progress": "long = gdopt.minimize(loss, 1.0, learning_rate=0.01, max_steps=20_000, progress=True)",
    "inline": "%matplotlib inline\ngdopt.plot.valley(loss, result)",
    "with pyplot": """
import matplotlib.pyplot as plt
gdopt.plot.valley(loss, result, ax=plt.subplots()[1]);
""",
}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells of an executed notebook, by name."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    made = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    nbclient.NotebookClient(made, timeout=120, kernel_name="python3", resources=resources).execute()
    return {**dict(zip(CELLS, made.cells, strict=True)), "widgets": made.metadata.get("widgets", {})}


def shown(cell: Any, kind: str) -> list[Any]:
    """What a cell shows of one kind; text that it prints is "text"."""
    if kind == "text":
        return [output["text"] for output in cell.outputs if output.output_type == "stream"]
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.parametrize(
    "name", ["descent", "lr_find", "schedule", "valley", "path", "animate", "inline", "with pyplot"]
)
def test_a_picture_is_shown_once(notebook: dict[str, Any], name: str) -> None:
    (picture,) = shown(notebook[name], "image/png")
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert len(notebook[name].outputs) == 1


@pytest.mark.parametrize(
    ("name", "texts", "curves"),
    [
        ("result", ["gdopt.Result", "CONVERGED", "loss by step"], 1),
        ("range test", ["gdopt.RangeTest", "suggestion", "smoothed loss by rate"], 1),
        ("diagnosis", ["gdopt.Diagnosis", "sqrt"], 0),
    ],
)
def test_results_are_tables(notebook: dict[str, Any], name: str, texts: list[str], curves: int) -> None:
    (table,) = shown(notebook[name], "text/html")
    assert table.startswith("<table>")
    assert [text for text in texts if text not in table] == []
    assert table.count("<svg") == curves


@pytest.mark.parametrize(("name", "figures"), [("live", 1), ("live again", 2), ("live seldom", 1)])
def test_a_live_figure_is_drawn_anew_in_its_place(notebook: dict[str, Any], name: str, figures: int) -> None:
    pictures = shown(notebook[name], "image/png")
    assert len(pictures) == len(notebook[name].outputs) == figures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_the_last_picture_of_a_live_figure_is_the_end_of_the_run(notebook: dict[str, Any]) -> None:
    """A callback that draws seldom shows the end as well: both pictures are of the same run."""
    (often,), (seldom,) = (shown(notebook[name], "image/png") for name in ("live", "live seldom"))
    assert often == seldom


def test_the_progress_bar_is_a_widget_that_ends_full(notebook: dict[str, Any]) -> None:
    pytest.importorskip("ipywidgets")
    assert len(shown(notebook["progress"], "application/vnd.jupyter.widget-view+json")) == 1
    assert shown(notebook["progress"], "text") == []
    states = notebook["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    (bar,) = [each["state"] for each in states if each["model_name"] == "FloatProgressModel"]
    assert bar["bar_style"] == "success"
    assert bar["value"] == bar["max"] > 100
