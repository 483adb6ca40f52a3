"""Results as tables of a notebook: well-formed, escaped, in the colors of the page, whatever they hold."""

from __future__ import annotations

import dataclasses
import re
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdopt
from gdopt import Result


def parsed(given: Any) -> ElementTree.Element:
    """The table, which has to be well-formed even as XML."""
    return ElementTree.fromstring(given._repr_html_())


def rows(given: Any) -> dict[str, str]:
    """The texts of the table, by row."""
    cells = [("".join(one.itertext()), "".join(other.itertext())) for one, other in parsed(given).iter("tr")]
    return dict(cells)


def lines(given: Any) -> list[np.ndarray]:
    """The points of the curve's lines."""
    found = [line.get("points") for line in parsed(given).iter("polyline")]
    return [np.array([pair.split(",") for pair in str(points).split()], float) for points in found]


def run(**options: Any) -> Result:
    return gdopt.minimize(lambda x: jnp.sum((x - 3) ** 2), jnp.zeros(2), **{"learning_rate": 0.3, **options})


RESULTS: dict[str, Any] = {
    "converged": run,
    "no step": lambda: run(max_steps=1, learning_rate=1e-9),
    "diverged": lambda: run(learning_rate=5.0),
    "not finite": lambda: gdopt.minimize(jnp.log, -1.0, learning_rate=1.0),
    "vmap": lambda: jax.vmap(lambda rate: run(learning_rate=rate))(jnp.array([0.1, 0.2])),
    "one of many": lambda: jax.vmap(lambda rate: run(learning_rate=rate))(jnp.array([0.1, 0.2]))[1],
    "jit": lambda: jax.jit(lambda x: gdopt.minimize(lambda x: x**2, x))(1.0),
    "through jit": lambda: jax.jit(lambda result: result)(run()),
    "other leaves": lambda: jax.tree.map(lambda leaf: "<b>", run()),
    "aux": lambda: gdopt.minimize(lambda x: (x**2, {"a": x}), 1.0, has_aux=True),
    "range test": lambda: gdopt.lr_find(lambda x: jnp.sum(x**2), jnp.ones(2)),
    "no suggestion": lambda: gdopt.lr_find(jnp.log, -1.0, num_steps=20),
    "diagnosis": lambda: gdopt.diagnose(gdopt.minimize(jnp.sqrt, 1.0, learning_rate=3.0)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_it_says_what_the_text_says_in_the_colors_of_the_page(name: str) -> None:
    given = RESULTS[name]()
    title, *texts = repr(given).splitlines()
    assert parsed(given).findtext("caption") == title
    found = rows(given)
    for line in texts:
        key, _, value = line.strip().partition(" ")
        if key in found:  # A row of text may have several lines.
            assert value.strip() in found[key]
    assert len(found) >= 4
    assert {*re.findall(r'(?:fill|stroke)="([^"]*)"', html(given))} <= {"none", "currentColor"}
    assert re.findall(r"#[0-9a-f]{3}|rgb|color:|background", html(given)) == []


def html(given: Any) -> str:
    return given._repr_html_()


@pytest.mark.parametrize("name", ["vmap", "jit", "one of many", "other leaves", "not finite", "diagnosis"])
def test_without_losses_to_draw_there_is_no_curve(name: str) -> None:
    assert "<svg" not in html(RESULTS[name]())


def test_all_text_is_escaped() -> None:
    result = dataclasses.replace(run(), message="<script>alert('1 & 2')</script>")
    assert "<script" not in html(result)
    assert rows(result)["message"] == result.message
    named = gdopt.minimize(lambda p: p["<i>"] ** 2, {"<i>": 1.0})
    assert "<i>" not in html(named)
    assert "<i>" in rows(named)["params"]


def with_losses(*losses: float) -> Result:
    result = run()
    assert result.history is not None
    return dataclasses.replace(result, history=result.history._replace(loss=np.array(losses)))


def test_the_curve_falls_as_the_losses_do() -> None:
    (line,) = lines(with_losses(4.0, 3.0, 2.0, 2.0, 1.0))
    x, y = line.T
    assert (np.diff(x) > 0).all()
    np.testing.assert_allclose(np.diff(y) / np.diff(y)[0], [1, 1, 0, 1], atol=0.05)  # Down is up on a screen.
    assert np.diff(y)[0] > 0


def test_losses_that_span_decades_are_drawn_on_a_logarithmic_scale() -> None:
    (line,) = lines(with_losses(1e4, 1e2, 1.0, 1e-2, 0.0))
    np.testing.assert_allclose(np.diff(line[:, 1])[:3], np.diff(line[:, 1])[0], atol=0.2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_cannot_be_drawn_are_gaps(bad: float) -> None:
    first, second = lines(with_losses(4.0, 3.0, bad, 2.0, 1.0))
    assert (len(first), len(second)) == (2, 2)
    assert np.isfinite([first, second]).all()


@pytest.mark.parametrize("losses", [(), (1.0,), (np.nan, np.nan, np.inf), (np.nan, 1.0)])
def test_less_than_two_losses_are_no_curve(losses: tuple[float, ...]) -> None:
    assert lines(with_losses(*losses)) == []


@pytest.mark.parametrize("losses", [(2.0, 2.0), (0.0, 0.0, 0.0), (-1e199, 1e199), (5e-324, 1.0)])
def test_any_losses_stay_in_the_picture(losses: tuple[float, ...]) -> None:
    (line,) = lines(with_losses(*losses))
    assert ((line >= 0) & (line <= [240, 40])).all()


def test_a_long_run_has_a_short_table() -> None:
    assert len(html(with_losses(*np.linspace(9, 1, 100_000)))) < 6000
