"""The pictures of the loss around a run: valley, path and the moving ball."""

from __future__ import annotations

import functools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import gdopt
from gdopt import InputError, Result, Status


def square(x: Any) -> Any:
    return x**2


def bowl(x: Any) -> Any:
    return jnp.sum(jnp.array([1.0, 10.0]) * (x - 1) ** 2)


def wide(params: Any) -> Any:
    return jnp.sum(jnp.arange(1.0, 9.0) * (params["w"] - 1) ** 2) + params["b"] ** 2


@functools.cache
def rolled(rate: float, start: float = 1.0) -> Result:
    return gdopt.minimize(square, start, learning_rate=rate, record_params=True)


@functools.cache
def in_a_bowl(rate: float = 0.09) -> Result:
    return gdopt.minimize(bowl, jnp.array([3.0, 2.0]), learning_rate=rate, record_params=True)


@functools.cache
def in_many() -> Result:
    start = {"w": jnp.zeros(8), "b": 2.0, "name": "line", "count": 3}
    trainable = {"w": True, "b": True, "name": False, "count": False}
    return gdopt.minimize(wide, start, learning_rate=0.1, trainable=trainable, record_params=True)


FLAT = pytest.mark.filterwarnings("ignore:the gradient is exactly zero everywhere")


def saved(figure: Figure) -> None:
    assert cast(Any, figure)._repr_png_().startswith(b"\x89PNG")


def dots(ax: Axes, number: int = 0) -> np.ndarray:
    """The points of a run, in the order of the steps."""
    lines = [line for line in ax.lines if line.get_marker() == "o" and line.get_fillstyle() != "none"]
    return np.stack([np.asarray(lines[number].get_xdata()), np.asarray(lines[number].get_ydata())], axis=1)


def arrows(ax: Axes) -> list[Any]:
    return [text for text in ax.texts if cast(Any, text).arrow_patch is not None]


def is_inside(points: np.ndarray, ax: Axes) -> np.ndarray:
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return (points[:, 0] >= left) & (points[:, 0] <= right) & (points[:, 1] >= bottom) & (points[:, 1] <= top)


# ---------------------------------------------------------------------------------------------------------- valley


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_points_of_a_run_lie_on_the_curve(rate: float) -> None:
    result = rolled(rate)
    (ax,) = gdopt.plot.valley(square, result).axes
    curve = ax.lines[0]
    x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    np.testing.assert_allclose(y, x**2, atol=1e-6)
    assert result.history is not None
    points = dots(ax)
    np.testing.assert_array_equal(points[:, 0], result.history.params)
    np.testing.assert_allclose(points[:, 1], result.history.loss, rtol=1e-6)
    assert is_inside(points, ax).all()
    assert arrows(ax) == []
    assert ax.get_title().startswith(f"CONVERGED after {result.steps} step")


def test_the_legend_tells_how_each_run_ended() -> None:
    runs = {"low": rolled(0.1), "high": rolled(0.9), "too high": rolled(1.1)}
    figure = gdopt.plot.valley(square, runs)
    (ax,) = figure.axes
    low, high, diverged = [text.get_text() for text in ax.get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
    assert low == f"low: CONVERGED after {runs['low'].steps} steps"
    params = runs["high"].history.params  # pyright: ignore[reportOptionalMemberAccess]
    count = int(re.findall(r"^high: CONVERGED after \d+ steps, overshoots (\d+) times$", high)[0])
    assert count == np.sum(np.abs(params[1:]) > 0.01)
    assert diverged == f"too high: DIVERGED after {runs['too high'].steps} steps"
    saved(figure)


@pytest.mark.parametrize("rate", [1.1, 3.0, 1e20])
def test_a_run_that_diverges_leaves_the_picture_by_an_arrow(rate: float) -> None:
    figure = gdopt.plot.valley(square, rolled(rate))
    (ax,) = figure.axes
    assert 1 <= len(dots(ax)) <= 7
    (arrow,) = arrows(ax)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    at_edge = np.isclose([arrow.xy[0], arrow.xy[0], arrow.xy[1], arrow.xy[1]], [left, right, bottom, top])
    assert at_edge.any()
    np.testing.assert_allclose(arrow.xyann, dots(ax)[-1])
    saved(figure)


def test_a_diverging_run_does_not_hide_the_others() -> None:
    (ax,) = gdopt.plot.valley(square, [rolled(0.1), rolled(3.0)]).axes
    left, right = ax.get_xlim()
    assert -3 < left < 0 < 1 < right < 3


@pytest.mark.parametrize(
    ("loss", "start", "options"),
    [
        (square, 0.0, {"learning_rate": 0.1}),  # no step
        (square, 1.0, {"learning_rate": 0.1, "max_steps": 1}),
        (lambda x: 0 * x + 2, 1.0, {"learning_rate": 0.1, "max_steps": 3}),  # flat
        (lambda x: -(x**2), 1.0, {"learning_rate": 9.0}),  # to infinity
        (jnp.log, 1.0, {"learning_rate": 2.0}),  # NaN
        (lambda x: -jnp.log(x) + x, 1e-3, {}),  # a wall, and trials behind it
        (lambda x: 1e10 * (x - 1e12) ** 2, 0.0, {}),
        (lambda x: (x * 1e15) ** 2, 1e-15, {"learning_rate": 1e-31}),
        (square, jnp.bfloat16(1.0), {"learning_rate": 0.1}),
        (lambda x: jnp.sum(x**2), jnp.ones((1, 1)), {"learning_rate": 0.1}),
        (square, 1.0, {"learning_rate": 1e-5, "max_steps": 100_000, "tol": 0}),
    ],
)
@FLAT
def test_any_run_of_one_weight_can_be_drawn(loss: Any, start: Any, options: Any, tmp_path: Any) -> None:
    result = gdopt.minimize(loss, start, **options, record_params=True)
    figure = gdopt.plot.valley(loss, result)
    (ax,) = figure.axes
    assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
    assert 1 <= len(dots(ax)) <= 500
    assert is_inside(dots(ax), ax).all()
    saved(figure)
    gdopt.plot.animate(loss, result, tmp_path / "ball.gif")


def test_float64_is_drawn_in_float64() -> None:
    with jax.enable_x64(True):
        loss = lambda x: (x - 1) ** 2
        result = gdopt.minimize(loss, 1.0 + 1e-9, learning_rate=0.1, max_steps=3, tol=0, record_params=True)
        (ax,) = gdopt.plot.valley(loss, result).axes
        points = dots(ax)
    np.testing.assert_allclose(points[:, 1], (1e-9 * 0.8 ** np.arange(4)) ** 2, rtol=1e-6)


def test_args_data_and_an_aux_are_taken() -> None:
    rows = jnp.arange(1.0, 9.0)
    loss = lambda w, batch, shift: (jnp.mean((w["slope"] * batch - shift) ** 2), {"sum": w["slope"]})
    options = {"data": rows, "batch_size": 2, "epochs": 3, "learning_rate": 0.01, "has_aux": True}
    result = gdopt.minimize(loss, {"slope": 0.0}, args=(2,), **options, record_params=True)
    (ax,) = gdopt.plot.valley(loss, result, args=(rows, 2)).axes
    assert ax.get_xlabel() == "params['slope']"
    points = dots(ax)
    assert result.history is not None
    np.testing.assert_array_equal(points[:, 0], result.history.params["slope"])
    np.testing.assert_allclose(points[:, 1], [np.mean((w * rows - 2) ** 2) for w in points[:, 0]], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ path


def test_the_path_of_two_weights_is_drawn_as_it_was() -> None:
    result = in_a_bowl()
    figure = gdopt.plot.path(bowl, result)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("params[0]", "params[1]")
    assert result.history is not None
    np.testing.assert_array_equal(dots(ax), result.history.params)
    ends = {str(line.get_label()): np.ravel(line.get_xydata()) for line in ax.lines}
    np.testing.assert_array_equal(ends["start"], [3.0, 2.0])
    np.testing.assert_array_equal(ends["returned params"], result.params)
    assert is_inside(dots(ax), ax).all()
    saved(figure)


def contour_levels(ax: Axes) -> np.ndarray:
    return np.asarray(next(iter(ax.collections)).levels)  # pyright: ignore[reportAttributeAccessIssue]


def test_contours_are_logarithmic_if_the_loss_spans_decades() -> None:
    levels = contour_levels(gdopt.plot.path(bowl, in_a_bowl()).axes[0])
    np.testing.assert_allclose(np.diff(np.log(levels)), np.log(levels[1] / levels[0]), rtol=1e-5)
    low = lambda x: bowl(x) - 9
    result = gdopt.minimize(low, jnp.array([3.0, 2.0]), learning_rate=0.09, record_params=True)
    levels = contour_levels(gdopt.plot.path(low, result).axes[0])
    np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0], rtol=1e-5)


def test_more_weights_are_seen_in_the_plane_of_their_principal_directions() -> None:
    result = in_many()
    (ax,) = gdopt.plot.path(wide, result).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("principal direction 1", "principal direction 2")
    assert result.history is not None
    points = np.concatenate([result.history.params["w"], result.history.params["b"][:, None]], axis=1).astype(float)
    away = points - np.append(result.params["w"], result.params["b"])
    np.testing.assert_allclose(np.abs(dots(ax)), np.abs(away @ np.linalg.svd(away)[2][:2].T), atol=1e-4)


def test_chosen_directions_are_the_axes() -> None:
    result = in_many()
    others = {"name": "line", "count": 3}
    one, two = {"w": jnp.zeros(8).at[2].set(2.0), "b": 0.0, **others}, {"w": jnp.zeros(8), "b": 1.0, **others}
    (ax,) = gdopt.plot.path(wide, result, directions=(one, two)).axes
    assert result.history is not None
    w, b = result.history.params["w"], result.history.params["b"]
    expected = np.stack([(w[:, 2] - result.params["w"][2]) / 2, b - result.params["b"]], axis=1)
    np.testing.assert_allclose(dots(ax), expected, atol=1e-5)


def test_a_run_that_diverges_in_a_plane_leaves_by_an_arrow() -> None:
    result = in_a_bowl(0.13)
    assert result.status is Status.DIVERGED
    figure = gdopt.plot.path(bowl, result)
    assert len(arrows(figure.axes[0])) == 1
    saved(figure)


@pytest.mark.parametrize(
    ("loss", "start", "options"),
    [
        (bowl, [1.0, 1.0], {"learning_rate": 0.1}),  # no step
        (bowl, [1.0, 2.0], {"learning_rate": 0.01, "max_steps": 1}),
        (lambda x: jnp.sum(x**2), [1.0, 1.0, 1.0], {"learning_rate": 0.1}),  # a straight line
        (lambda x: jnp.sum(x**2), [0.0, 0.0, 0.0], {"learning_rate": 0.1}),  # a single point of three weights
        (lambda x: 0 * x[0] + 2, [1.0, 1.0], {"learning_rate": 0.1, "max_steps": 3}),  # flat
        (lambda x: -jnp.sum(jnp.log(x)) + jnp.sum(x), [1e-3, 2.0], {}),
        (lambda x: -jnp.sum(x**3), [1.0, 2.0, 3.0], {"learning_rate": 9.0}),
        (lambda x: 1e10 * jnp.sum((x - 1e12) ** 2), [0.0, 0.0], {}),
    ],
)
@FLAT
def test_any_run_of_more_weights_can_be_drawn(loss: Any, start: Any, options: Any) -> None:
    result = gdopt.minimize(loss, jnp.array(start), **options, record_params=True)
    figure = gdopt.plot.path(loss, result)
    (ax,) = figure.axes
    assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
    saved(figure)


# --------------------------------------------------------------------------------------------------------- animate


@pytest.mark.parametrize(("loss", "result"), [(square, lambda: rolled(0.9)), (bowl, in_a_bowl)], ids=["valley", "path"])
def test_a_gif_has_a_frame_for_each_step(loss: Any, result: Any, tmp_path: Any) -> None:
    file = tmp_path / "ball.gif"
    figure = gdopt.plot.animate(loss, result(), file)
    with Image.open(file) as image:
        assert cast(Any, image).n_frames == min(result().steps + 1, 60)
        assert image.info["loop"] == 0
    assert file.stat().st_size < 2e6
    (ax,) = figure.axes
    assert ax.get_title().startswith(f"CONVERGED after {result().steps} steps")


def test_the_ball_of_a_frame_is_where_the_run_was(tmp_path: Any) -> None:
    file = tmp_path / "ball.gif"
    result = gdopt.minimize(square, 1.0, learning_rate=0.9, max_steps=3, tol=0, record_params=True)
    ax = Figure(figsize=(5, 4)).subplots()
    gdopt.plot.animate(square, result, file, ax=ax)
    assert result.history is not None
    with Image.open(file) as image:
        for number, (x, y) in enumerate(zip(result.history.params, result.history.loss, strict=True)):
            image.seek(number)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
            rows, columns = np.nonzero(red)
            across, up = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
            box = ax.get_position()
            expected = (box.x0 + across * box.width) * image.width, (1 - box.y0 - up * box.height) * image.height
            np.testing.assert_allclose([np.median(columns), np.median(rows)], expected, atol=3)


def test_a_page_holds_all_frames_and_needs_no_network(tmp_path: Any) -> None:
    file = tmp_path / "ball.html"
    result = rolled(0.9)
    gdopt.plot.animate(square, result, file)
    page = file.read_text(encoding="utf-8")
    assert page.count('["data:image/png;base64,') == min(result.steps + 1, 60)
    assert re.findall(r"https?:", page) == []
    assert "step 0: loss 1" in page
    assert 'type="range"' in page


def test_an_animation_leaves_the_figure_as_it_was(tmp_path: Any) -> None:
    ax = Figure(dpi=123).subplots()
    figure = cast(Figure, ax.figure)
    canvas = figure.canvas
    assert gdopt.plot.animate(square, rolled(0.1), tmp_path / "ball.gif", ax=ax) is figure
    assert figure.canvas is canvas
    assert figure.dpi == 123


# -------------------------------------------------------------------------------------------------------- settings

SETTINGS: dict[str, Any] = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "no NaN": lambda: jax.debug_nans(True),
    "no jit": lambda: jax.disable_jit(True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_pictures_are_the_same_under_strict_settings(setting: str, tmp_path: Any) -> None:
    wall = lambda x: jnp.sum(x - jnp.log(x))  # NaN on a part of the grid
    result = gdopt.minimize(wall, jnp.array([2.0, 0.01]), learning_rate=0.001, max_steps=20, record_params=True)
    one = gdopt.minimize(square, 1.0, learning_rate=0.1, max_steps=5, record_params=True)

    def drawn() -> list[Any]:
        (over,) = gdopt.plot.path(wall, result).axes
        (curve,) = gdopt.plot.valley(square, one).axes
        gdopt.plot.animate(square, one, tmp_path / "ball.gif")
        gdopt.plot.descent(one)
        return [dots(over), contour_levels(over), dots(curve)]

    expected = drawn()
    with SETTINGS[setting]():
        found = drawn()
    for one_, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one_, other)


# ---------------------------------------------------------------------------------------------------------- errors

inside = lambda: jax.jit(lambda x: gdopt.minimize(square, x))(1.0)
plain = lambda: gdopt.minimize(square, 1.0, learning_rate=0.1)
complex_ = lambda: gdopt.minimize(lambda z: jnp.abs(z - 1j) ** 2, 0j, learning_rate=0.1, record_params=True)
BAD: dict[str, tuple[Any, str]] = {
    "not recorded": (lambda file: gdopt.plot.valley(square, plain()), "Pass record_params=True to gdopt.minimize"),
    "one not recorded": (
        lambda file: gdopt.plot.valley(square, {"a": rolled(0.1), "b": plain()}),
        "'b' of result does not hold the params of its steps. Pass record_params=True",
    ),
    "path not recorded": (lambda file: gdopt.plot.path(square, plain()), "record_params=True"),
    "animation not recorded": (lambda file: gdopt.plot.animate(square, plain(), file), "record_params=True"),
    "inside": (lambda file: gdopt.plot.valley(square, inside()), "result is of a run inside jit"),
    "path inside": (lambda file: gdopt.plot.path(square, inside()), "result is of a run inside jit"),
    "complex": (lambda file: gdopt.plot.valley(square, complex_()), "result has complex params"),
    "path complex": (lambda file: gdopt.plot.path(square, complex_()), "result has complex params"),
    "several for a path": (lambda file: gdopt.plot.path(square, cast(Any, [rolled(0.1)])), "result is a list"),
    "two weights": (lambda file: gdopt.plot.valley(bowl, in_a_bowl()), "hold 2 numbers.*Use gdopt.plot.path"),
    "one weight": (lambda file: gdopt.plot.path(square, rolled(0.1)), "hold one number.*Use gdopt.plot.valley"),
    "none": (lambda file: gdopt.plot.valley(square, []), "holds no runs to compare"),
    "number": (lambda file: gdopt.plot.valley(square, cast(Any, 3)), "result is a int"),
    "no loss": (lambda file: gdopt.plot.valley(cast(Any, 3), rolled(0.1)), "loss=3 is not a function"),
    "args": (lambda file: gdopt.plot.valley(square, rolled(0.1), args=cast(Any, [3])), r"args=\[3\] is not a tuple"),
    "shape": (lambda file: gdopt.plot.valley(lambda x: jnp.ones(2), rolled(0.1)), r"the loss returned shape \(2,\)"),
    "ending": (lambda file: gdopt.plot.animate(square, rolled(0.1), "a.mp4"), "'a.mp4' ends with '.mp4'.*gif or .html"),
    "one direction": (
        lambda file: gdopt.plot.path(bowl, in_a_bowl(), directions=cast(Any, jnp.ones(2))),
        "are not two trees like params",
    ),
    "parallel": (
        lambda file: gdopt.plot.path(bowl, in_a_bowl(), directions=(jnp.ones(2), 2 * jnp.ones(2))),
        "parallel",
    ),
    "zero": (lambda file: gdopt.plot.path(bowl, in_a_bowl(), directions=(jnp.ones(2), jnp.zeros(2))), "or zero"),
    "NaN": (
        lambda file: gdopt.plot.path(bowl, in_a_bowl(), directions=(jnp.ones(2), jnp.array([jnp.nan, 1]))),
        "not finite",
    ),
    "other shape": (
        lambda file: gdopt.plot.path(bowl, in_a_bowl(), directions=(jnp.ones(2), jnp.ones(3))),
        r"directions\[1\] has leaves of the shapes \[\(3,\)\]",
    ),
    "other tree": (
        lambda file: gdopt.plot.path(wide, in_many(), directions=({"w": 1.0}, {"w": 2.0})),
        r"directions\[0\] is not a tree like params",
    ),
    "directions of one": (
        lambda file: gdopt.plot.animate(square, rolled(0.1), file, directions=(1.0, 2.0)),
        "directions were given for a single weight",
    ),
    "every": (lambda file: gdopt.plot.live(every=-1), "every=-1 is not a number of seconds"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_drawn_is_an_error(call: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        call(tmp_path / "ball.gif")
    assert [*tmp_path.iterdir()] == []


# ------------------------------------------------------------------------------------------------------------ live


def test_outside_of_a_notebook_a_live_picture_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    result = gdopt.minimize(square, 1.0, learning_rate=0.01, callback=gdopt.plot.live(every=0), callback_every=10)
    assert result.status is Status.CONVERGED
    assert capsys.readouterr() == ("", "")


def test_without_ipython_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "IPython"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", None)
    with pytest.raises(gdopt.GdoptError, match=r"live needs IPython. Run pip install ipython"):
        gdopt.plot.live()
