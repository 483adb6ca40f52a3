"""The pictures show what the results hold, however a run ended, and can be saved."""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import some_of

import gdopt
from gdopt import History, Result, Status

PANELS = ["loss", "gradient norm", "learning rate"]


def square(x):
    return x**2


def rows_loss(w, rows):
    return jnp.mean((rows[0] @ w - rows[1]) ** 2)


def rows():
    random = np.random.default_rng(0)
    X = random.normal(size=(128, 3)).astype(np.float32)
    return X, (X @ [1, 2, 3] + random.normal(size=128)).astype(np.float32)


def triangles():
    schedule = gdopt.schedules.triangular2(0.001, 0.1, step_size_up=20)
    return gdopt.minimize(rows_loss, jnp.zeros(3), data=rows(), batch_size=8, epochs=10, learning_rate=schedule)


def after_a_while(rate):
    return lambda step: jnp.where(step < 3, 0.1, rate)


# What a run was, how it ended, and how many panels show it.
RUNS: dict[str, tuple[Callable[[], Result], Status, int]] = {
    "converged": (lambda: gdopt.minimize(square, 1.0, learning_rate=0.1), Status.CONVERGED, 3),
    "converged onto zero": (lambda: gdopt.minimize(square, 1.0, learning_rate=0.5), Status.CONVERGED, 3),
    "negative losses": (lambda: gdopt.minimize(lambda x: x**2 - 9, 1.0, learning_rate=0.1), Status.CONVERGED, 3),
    "diverged": (lambda: gdopt.minimize(square, 1.0, learning_rate=1.5), Status.DIVERGED, 3),
    "not finite": (lambda: gdopt.minimize(lambda x: -(x**2), 1.0, learning_rate=9), Status.NON_FINITE, 3),
    "not finite at the start": (lambda: gdopt.minimize(jnp.log, -1.0, learning_rate=1), Status.NON_FINITE, 2),
    "a rate that is NaN": (
        lambda: gdopt.minimize(square, 1.0, learning_rate=after_a_while(jnp.nan)),
        Status.NON_FINITE,
        3,
    ),
    "mini-batches": (triangles, Status.MAX_STEPS, 3),
    "diverged mini-batches": (
        lambda: gdopt.minimize(rows_loss, jnp.zeros(3), data=rows(), batch_size=8, epochs=5, learning_rate=3),
        Status.DIVERGED,
        3,
    ),
    "unknown rate": (lambda: gdopt.minimize(square, 1.0, optimizer=optax.sgd(0.1)), Status.CONVERGED, 2),
    "one evaluation": (lambda: gdopt.minimize(square, 0.0, learning_rate=0.1), Status.CONVERGED, 2),
    "one step": (lambda: gdopt.minimize(square, 1.0, learning_rate=0.1, max_steps=1), Status.MAX_STEPS, 3),
    "stopped": (
        lambda: gdopt.minimize(square, 1.0, learning_rate=1e-5, callback=lambda report: True),
        Status.STOPPED,
        3,
    ),
}
run = functools.cache(lambda name: RUNS[name][0]())


def picture(result: Result) -> bytes:
    gdopt.plot.descent(result).savefig(file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("name", RUNS)
def test_the_lines_are_the_history(name):
    result, (_, status, panels) = run(name), RUNS[name]
    assert result.status is status
    figure = gdopt.plot.descent(result)
    assert [axes.get_ylabel() for axes in figure.axes] == PANELS[:panels]
    assert result.history is not None
    for axes, values in zip(figure.axes, result.history[:3], strict=False):
        line, finite = axes.lines[0], np.isfinite(values)
        np.testing.assert_array_equal(line.get_xdata(), np.flatnonzero(finite))
        np.testing.assert_array_equal(line.get_ydata(), values[finite])
    assert figure.axes[0].get_title().startswith(f"{status.name} after {result.steps} step")


# Drawing takes a third of a second. These are what could trip it: signs, ends of the range, holes and single points.
TELLING = {
    "negative losses",
    "diverged",
    "not finite at the start",
    "a rate that is NaN",
    "mini-batches",
    "one evaluation",
}


@pytest.mark.parametrize("name", some_of(RUNS, TELLING))
def test_it_can_be_saved(name):
    assert picture(run(name)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "crosses"),
    [
        ("converged", [[], [], []]),
        ("unknown rate", [[], []]),  # not known is not the same as not finite
        ("not finite at the start", [[0], []]),
        ("a rate that is NaN", [[4], [4], [3]]),
    ],
)
def test_crosses_mark_values_that_are_not_finite(name, crosses):
    figure = gdopt.plot.descent(run(name))
    crossed = [[line for line in axes.lines if line.get_marker() == "x"] for axes in figure.axes]
    found = [[x for line in lines for x in np.asarray(line.get_xdata())] for lines in crossed]
    assert found == crosses


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("converged", ["log", "log", "linear"]),
        ("negative losses", ["linear", "log", "linear"]),
        ("diverged", ["log", "log", "linear"]),
        ("one evaluation", ["linear", "linear"]),
        ("mini-batches", ["log", "linear", "linear"]),  # triangles stay triangles, though they start near zero
    ],
)
def test_axes_are_logarithmic_if_that_shows_more(name, scales):
    assert [axes.get_yscale() for axes in gdopt.plot.descent(run(name)).axes] == scales


def test_a_ladder_of_rates_is_drawn_on_a_logarithmic_axis():
    ladder = gdopt.schedules.range_test(1e-6, 0.1, num_steps=50)
    result = gdopt.minimize(square, 1.0, learning_rate=ladder, max_steps=50)
    assert gdopt.plot.descent(result).axes[2].get_yscale() == "log"


def test_noise_gets_a_line_of_means():
    result = run("mini-batches")
    epoch = result.steps_per_epoch
    assert epoch is not None
    assert result.history is not None
    for axes, values in zip(gdopt.plot.descent(result).axes[:2], result.history[:2], strict=True):
        means = np.asarray(axes.lines[1].get_ydata())
        assert means[0] == pytest.approx(values[:epoch].mean(), rel=1e-5)
        assert len(means) == len(values) // epoch
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"mean of {epoch} steps"]


@pytest.mark.parametrize("name", ["converged", "diverged", "one evaluation"])
def test_a_line_without_noise_gets_no_line_of_means(name):
    assert all(len(axes.lines) == 1 for axes in gdopt.plot.descent(run(name)).axes)


BETWEEN = [pytest.param(end, marks=pytest.mark.slow) for end in (1e-300, 1e300, -np.inf)]


@pytest.mark.parametrize("end", [1e-320, *BETWEEN, 1.7e308, -1.7e308, np.inf, np.nan])
def test_the_ends_of_float64_can_be_drawn(end):
    values = np.array([1.0, 2.0, end, 3.0])
    history = History(values, np.abs(values), np.abs(values))
    assert picture(dataclasses.replace(run("converged"), steps=3, history=history))


def test_float64_keeps_its_digits():
    with jax.enable_x64(True):
        result = gdopt.minimize(square, 1.0, learning_rate=0.1, max_steps=9)
    (line,) = gdopt.plot.descent(result).axes[0].lines
    assert np.asarray(line.get_ydata()).dtype == np.float64
    np.testing.assert_array_equal(line.get_ydata(), result.history.loss)


def test_steps_are_whole_numbers():
    for name in ("one evaluation", "one step"):
        figure = gdopt.plot.descent(run(name))
        figure.draw_without_rendering()
        ticks = figure.axes[-1].get_xticks()
        assert (ticks == np.round(ticks)).all()


TESTS: dict[str, Callable[[], gdopt.RangeTest]] = {
    "blown up": lambda: gdopt.lr_find(rows_loss, jnp.zeros(3), data=rows(), batch_size=8, repeats=3),
    "no suggestion": lambda: gdopt.lr_find(lambda x: 0 * x + 2, 1.0, num_steps=20),
    "not finite at the start": lambda: gdopt.lr_find(jnp.log, -1.0, num_steps=20),
}
range_test = functools.cache(lambda name: TESTS[name]())


@pytest.mark.parametrize("name", TESTS)
def test_a_range_test_is_drawn(name):
    test = range_test(name)
    figure = gdopt.plot.lr_find(test)
    loss, rate = figure.axes
    assert loss.get_xscale() == "log"
    raw, (smoothed, *marks) = loss.lines[: len(test.losses)], loss.lines[len(test.losses) :]
    for line, values in zip([*raw, smoothed], [*test.losses, test.smoothed_loss], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
        np.testing.assert_array_equal(line.get_xdata(), test.learning_rate)
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), test.learning_rate)
    found = [rate for rate in [*test.suggestions.values(), test.suggestion] if rate is not None]
    assert [float(np.ravel(mark.get_xdata())[0]) for mark in marks] == found
    figure.savefig(file := io.BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")


def test_the_blow_up_is_outside_of_the_picture():
    test = range_test("blown up")
    low, high = gdopt.plot.lr_find(test).axes[0].get_ylim()
    start, best = test.smoothed_loss[:20].max(), np.nanmin(test.smoothed_loss)
    assert low < best
    assert start < high < start + (start - best)
    assert high < np.nanmax(test.losses)


def test_a_schedule_is_drawn_step_by_step():
    cycle = gdopt.schedules.triangular(0.1, 0.5, 4)
    (axes,) = gdopt.plot.schedule(cycle, 20).axes
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), [cycle(k) for k in range(20)])
    assert axes.get_yscale() == "linear"
    (axes,) = gdopt.plot.schedule(gdopt.schedules.range_test(1e-6, 1.0, 30), 30).axes
    assert axes.get_yscale() == "log"
    with pytest.raises(gdopt.InputError, match="is not a function"):
        gdopt.plot.schedule(cast(Any, 0.1), 20)
    with pytest.raises(gdopt.InputError, match="steps=0"):
        gdopt.plot.schedule(cycle, 0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: gdopt.plot.lr_find(range_test("no suggestion"), ax=ax),
        lambda ax: gdopt.plot.schedule(lambda k: 0.1, 9, ax=ax),
    ],
)
def test_it_draws_into_given_axes(draw):
    from matplotlib.figure import Figure

    figure = Figure()
    part: Any = figure.subfigures()
    axes = part.subplots(1, 2)
    assert draw(axes[0]) is figure
    assert axes[0].lines
    assert not axes[1].lines


def test_it_needs_no_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert picture(run("converged"))


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    result = run("converged")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(gdopt.GdoptError, match=r'pip install "gdopt\[plot\]"') as caught:
        gdopt.plot.descent(result)
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_result_that_went_through_a_jit_is_drawn_as_before() -> None:
    result = gdopt.minimize(square, 1.0, learning_rate=0.1)
    figures = [gdopt.plot.descent(one) for one in (result, jax.jit(lambda result: result)(result))]
    titles = [figure.axes[0].get_title() for figure in figures]
    assert titles[0] == titles[1]
    assert titles[0].startswith("CONVERGED after ")
