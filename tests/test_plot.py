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


@functools.cache
def recorded(rate):
    return gdopt.minimize(square, 1.0, learning_rate=rate, record_params=True)


def bowl(x):
    return jnp.sum(jnp.array([1.0, 10.0]) * (x - 1) ** 2)


@functools.cache
def in_a_bowl(rate=0.09):
    return gdopt.minimize(bowl, jnp.array([3.0, 2.0]), learning_rate=rate, record_params=True)


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


MOVED = ("steep", "minimum")  # their marks stand where the curve is steepest and lowest
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
    found = {name: rate for name, rate in test.suggestions.items() if rate is not None and name not in MOVED}
    at = {str(mark.get_label()).split(":")[0]: float(np.ravel(mark.get_xdata())[0]) for mark in marks}
    assert {name: rate for name, rate in at.items() if name not in MOVED} == found | (
        {} if test.suggestion is None else {"suggestion": test.suggestion}
    )
    figure.savefig(file := io.BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")


def test_the_blow_up_is_outside_of_the_picture():
    test = range_test("blown up")
    low, high = gdopt.plot.lr_find(test).axes[0].get_ylim()
    start, best = test.smoothed_loss[:20].max(), np.nanmin(test.smoothed_loss)
    assert low < best
    assert start < high < start + (start - best)
    assert high < np.nanmax(test.losses)


def marks_of(test):
    axes = gdopt.plot.lr_find(test).axes[0]
    return {str(line.get_label()).split(":")[0]: line for line in axes.lines if line.get_marker() == "o"}


@pytest.mark.parametrize("spike", [False, True], ids=["as it is", "a spike in the blow-up"])
def test_marks_stand_where_the_curve_is_steepest_and_lowest(spike):
    test = range_test("blown up")
    rates, smoothed = test.learning_rate, test.smoothed_loss.copy()
    if spike:  # The blow-up falls back steeply from a spike, where fastai's rule finds its steepest point.
        smoothed[-6] = smoothed[-7] * 1000
        wrong = rates[-6]
        test = dataclasses.replace(test, smoothed_loss=smoothed, suggestions={**test.suggestions, "steep": wrong})
    marks = marks_of(test)
    bottom, first = int(np.nanargmin(smoothed)), len(rates) // 10
    slopes = np.diff(smoothed[: bottom + 1]) / np.diff(np.log(rates[: bottom + 1]))
    steepest = first + int(np.argmin(slopes[first:]))
    for name, at in {"steep": steepest, "minimum": bottom}.items():
        assert np.ravel(marks[name].get_xdata())[0] == rates[at]
        assert np.ravel(marks[name].get_ydata())[0] == pytest.approx(smoothed[at])
    assert str(marks["minimum"].get_label()).endswith(f", suggests {test.suggestions['minimum']:.2g}")
    assert ("suggests" in str(marks["steep"].get_label())) == (test.suggestions["steep"] != rates[steepest])
    assert spike <= ("suggests" in str(marks["steep"].get_label()))


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
        lambda ax: gdopt.plot.descent(run("converged"), ax=ax),
        lambda ax: gdopt.plot.valley(square, recorded(0.1), ax=ax),
        lambda ax: gdopt.plot.path(bowl, in_a_bowl(), ax=ax),
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


def test_it_needs_no_pyplot(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert picture(run("converged"))
    gdopt.plot.animate(square, recorded(0.1), tmp_path / "ball.gif")


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


# ----------------------------------------------------------------------------------------------- rejected trials


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def powers(x):
    return jnp.sum(jnp.array([1.0, 100.0, 1e4]) * (x - 1) ** 2) + jnp.sum(x**4)


def steep_walls(x):
    return jnp.sum(jnp.cosh(3 * x)) - jnp.sum(jnp.log(x + 1.5))


SEARCHES = [
    (optimizer, loss, start)
    for optimizer in (gdopt.quasi_newton(), gdopt.quasi_newton(memory=0), gdopt.spectral())
    for loss, start in [(rosenbrock, [-1.2, 1.0]), (powers, [3.0, -2.0, 5.0]), (steep_walls, [-1.0, 1.0])]
]


@pytest.mark.parametrize(("optimizer", "loss", "start"), SEARCHES)
def test_rings_mark_the_trials_that_the_optimizer_took_back(optimizer, loss, start):
    result = gdopt.minimize(loss, jnp.array(start), optimizer=optimizer, max_steps=60)
    axes = gdopt.plot.descent(result).axes[0]
    rings = [line for line in axes.lines if line.get_label() == "rejected trial"]
    marked = [int(step) for line in rings for step in np.asarray(line.get_xdata())]

    x, state, truth = jnp.array(start), optimizer.init(jnp.array(start)), []
    step = jax.jit(
        lambda x, state: (lambda value, grad: (value, *optimizer.update(grad, state, x, value=value)))(
            *jax.value_and_grad(loss)(x)
        )
    )
    for k in range(result.steps):
        value, updates, state = step(x, state)
        if not np.isclose(value, result.history.loss[k], rtol=1e-3):  # Rounding has led elsewhere.
            break
        if state.rejected > 0 and np.isfinite(value):
            truth.append(k)
        x = optax.apply_updates(x, updates)
    assert k > 5
    assert truth == [step for step in marked if step < k]


def test_losses_without_the_penalty_do_not_tell_which_trials_were_rejected():
    shrink = lambda x, rate: jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 3 * rate, 0), x)
    result = gdopt.minimize(powers, jnp.array([0.0, 1.0, 1.0]), prox=shrink)
    assert result.loss > result.history.loss.min()
    assert [line for line in gdopt.plot.descent(result).axes[0].lines if line.get_marker() == "o"] == []


def test_some_trials_are_rejected_and_marked():
    result = gdopt.minimize(rosenbrock, jnp.array([-1.2, 1.0]))
    axes = gdopt.plot.descent(result).axes[0]
    (ring,) = [line for line in axes.lines if line.get_label() == "rejected trial"]
    steps = np.asarray(ring.get_xdata())
    assert len(steps) > 3
    np.testing.assert_array_equal(ring.get_ydata(), result.history.loss[steps])


def test_optimizers_that_accept_every_point_have_no_rings():
    figure = gdopt.plot.descent({"high": recorded(0.9), "diverged": recorded(1.1)})
    assert [line for line in figure.axes[0].lines if line.get_marker() == "o"] == []


def test_a_run_whose_rates_are_not_known_has_no_crosses_beside_one_with_rates():
    figure = gdopt.plot.descent([run("unknown rate"), run("converged")])
    assert len(figure.axes) == 3
    assert [line for axes in figure.axes for line in axes.lines if line.get_marker() == "x"] == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_descent_draws_into_as_many_panels_as_there_are_axes(count):
    from matplotlib.figure import Figure

    figure = Figure()
    rows: Any = figure.subplots(1, count, squeeze=False)[0]
    assert gdopt.plot.descent(run("converged"), ax=rows if count > 1 else rows[0]) is figure
    assert [axes.get_ylabel() for axes in rows] == PANELS[:count]
    assert [axes.get_xlabel() for axes in rows][-1] == "step"


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        (
            "converged",
            4,
            "ax holds 4 axes, but the picture has 3 panels: loss, gradient norm, learning rate. Pass 1",
        ),
        ("unknown rate", 3, r"has 2 panels: loss, gradient norm \(the learning rate is not known\). Pass 1 to 2 axes"),
        ("converged", 0, "ax holds 0 axes"),
    ],
)
def test_too_many_axes_are_an_error(name, count, message):
    from matplotlib.figure import Figure

    axes = [Figure().subplots() for _ in range(count)]
    with pytest.raises(gdopt.InputError, match=message):
        gdopt.plot.descent(run(name), ax=axes)


@pytest.mark.parametrize("ax", ["axes", [1.0]])
def test_what_is_no_axes_is_an_error(ax):
    with pytest.raises(gdopt.InputError, match="is no Axes of matplotlib"):
        gdopt.plot.descent(run("converged"), ax=cast(Any, ax))
    if isinstance(ax, str):
        with pytest.raises(gdopt.InputError, match="ax='axes' is no Axes"):
            gdopt.plot.schedule(lambda k: 0.1, 3, ax=cast(Any, ax))


# ------------------------------------------------------------------------------------------------------- notebooks


def test_a_figure_can_be_pickled_with_its_picture():
    import pickle

    figure = gdopt.plot.schedule(lambda k: 0.1, 9)
    again = pickle.loads(pickle.dumps(figure))
    assert again._repr_png_().startswith(b"\x89PNG")
