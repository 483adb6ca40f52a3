"""The ball that rolls: a run as a moving picture."""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdopt._errors import InputError
from gdopt._pictures.canvas import axes_of, ended, figure_of
from gdopt._pictures.landscape import track_of
from gdopt._pictures.path import draw_contours, map_of
from gdopt._pictures.valley import draw_curve, scene_of
from gdopt._result import Result
from gdopt._types import Loss, PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FRAMES = 60  # the most frames
_SECONDS = 0.12  # of each frame
_HOLD = 1.5  # seconds of the last one
_DPI = 80
_COLORS = 64  # of a file
_TRAIL, _BALL = "C1", "C3"


def animate(
    loss: Loss,
    result: Result,
    path: str | os.PathLike[str],
    *,
    args: tuple[Any, ...] = (),
    directions: tuple[PyTree, PyTree] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Write a run as a moving picture: a ball that rolls in the valley of one weight, or across the contours of more.

    Args:
        loss: the loss of the run, ``loss(params, *args)``.
        result: the result of ``gdopt.minimize`` with ``record_params=True``.
        path: the file to write. Its ending decides: ``.gif``, or ``.html`` for a page that holds all of it, with a
            slider and a button.
        args: the further arguments of the loss, as for `gdopt.plot.path`.
        directions: as for `gdopt.plot.path`; not for a single weight.
        ax: ``matplotlib.axes.Axes`` to draw into; by default a new figure. The file shows its whole figure.

    Returns:
        The ``matplotlib.figure.Figure`` of the last frame, made without pyplot; with ``ax``, its figure. The title of
        each frame names the step. Runs of more than 60 points show the first 30 of these one by one, and then some. A
        ball that leaves the picture stays at its edge.

    Raises:
        GdoptError: if matplotlib is missing, with the command that installs it.
        InputError: for another ending, and as `gdopt.plot.valley` and `gdopt.plot.path` do.

    Example:
        >>> import gdopt, pathlib, tempfile
        >>> loss = lambda x: x**2
        >>> result = gdopt.minimize(loss, 1.0, learning_rate=0.9, record_params=True)
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "ball.gif"
        >>> figure = gdopt.plot.animate(loss, result, file)
        >>> file.read_bytes()[:6]
        b'GIF89a'
    """
    file = Path(path)
    if file.suffix.lower() not in (".gif", ".html"):
        raise InputError(f"path={str(path)!r} ends with {file.suffix!r}. Pass a path that ends with .gif or .html.")
    track = track_of(result)
    if track.points.shape[1] == 1:
        if directions is not None:
            raise InputError("directions were given for a single weight, which has one. Leave them out.")
        scene = scene_of(loss, {"": result}, args)
        ax, points, corners = axes_of(ax, 4.5), scene.paths[""], (scene.low, scene.high)
        draw_curve(ax, scene)
    else:
        map_ = map_of(loss, track, args, directions)
        ax, points, corners = axes_of(ax, 5.5), map_.path, (map_.low, map_.high)
        draw_contours(ax, map_)
    frames, shown = _frames(ax, result, track.steps, points, corners)
    if file.suffix.lower() == ".gif":
        _write_gif(file, frames)
    else:
        file.write_text(_page(frames, shown, ended(result)), encoding="utf-8")
    return figure_of(ax)


def _frames(
    ax: Axes, result: Result, steps: np.ndarray, points: np.ndarray, corners: tuple[np.ndarray, np.ndarray]
) -> tuple[list[Any], list[str]]:
    """Draw the frames; return them as images of pillow, with their titles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    points = np.clip(np.where(np.isnan(points), np.inf, points), *corners)
    figure = figure_of(ax)
    # The canvas of the figure may be that of a window or a notebook, with another resolution.
    before, dpi, engine = figure.canvas, figure.dpi, figure.get_layout_engine()
    (trail,) = ax.plot([], [], ".-", color=_TRAIL, linewidth=1, markersize=4)
    (ball,) = ax.plot([], [], "o", color=_BALL, markersize=11, zorder=9)
    frames: list[Any] = []
    titles = [f"step {step}: loss {loss:.4g}" for step, loss in _losses(result, steps)]
    titles[-1] = f"{ended(result)}: loss {_losses(result, steps)[-1][1]:.4g}"
    chosen, moving = _chosen(len(points)), (trail, ball, ax.title)
    ax.set_title(titles[-1])
    try:
        figure.set_dpi(_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        figure.set_layout_engine("none")  # From here on nothing moves but these three, so the rest is drawn once.
        for artist in moving:
            artist.set_animated(True)
        canvas.draw()
        still = canvas.copy_from_bbox(figure.bbox)
        for k in chosen:
            trail.set_data(points[: k + 1, 0], points[: k + 1, 1])
            ball.set_data(points[k : k + 1, 0], points[k : k + 1, 1])
            ax.set_title(titles[k])
            canvas.restore_region(still)
            for artist in moving:
                ax.draw_artist(artist)
            frames.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
    finally:
        for artist in moving:
            artist.set_animated(False)
        figure.set_layout_engine(engine or "none")
        figure.set_dpi(dpi)
        figure.set_canvas(before)
    return frames, [titles[k] for k in chosen]


def _losses(result: Result, steps: np.ndarray) -> list[tuple[int, float]]:
    assert result.history is not None
    return [(int(step), float(result.history.loss[step])) for step in steps]


def _chosen(count: int) -> list[int]:
    if count <= _FRAMES:
        return list(range(count))
    half = _FRAMES // 2
    later = np.geomspace(half, count - 1, _FRAMES - half)
    return sorted({*range(half), *np.round(later).astype(int).tolist()})


def _write_gif(file: Path, frames: list[Any]) -> None:
    seconds = [_SECONDS] * (len(frames) - 1) + [_HOLD]
    durations = [round(1000 * each) for each in seconds]
    small = _with_few_colors(frames)
    small[0].save(file, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)


def _with_few_colors(frames: list[Any]) -> list[Any]:
    """Return the frames with one palette for all, so that nothing flickers. It has white and the colors of the ball."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    own = [round(255 * part) for name in (_TRAIL, _BALL, "white") for part in to_rgb(name)]
    last = frames[-1].quantize(_COLORS - len(own) // 3)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(last.getpalette() or []), *own])
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _page(frames: list[Any], titles: list[str], name: str) -> str:
    """Return a page with all frames in it, which needs no network."""
    images = [f"data:image/png;base64,{base64.b64encode(_png(frame)).decode()}" for frame in _with_few_colors(frames)]
    items = ",".join(f'["{image}",{_quoted(title)}]' for image, title in zip(images, titles, strict=True))
    return _PAGE.format(
        title=html.escape(name), first=images[0], alt=html.escape(titles[0]), last=len(frames) - 1, items=items,
        pause=round(1000 * _SECONDS), hold=round(1000 * _HOLD),
    )  # fmt: skip


def _png(frame: Any) -> bytes:
    frame.save(file := io.BytesIO(), format="PNG", optimize=True)
    return file.getvalue()


def _quoted(text: str) -> str:
    return '"' + html.escape(text).replace("\\", "\\\\") + '"'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ color-scheme: light dark; font-family: sans-serif; margin: 1rem auto; max-width: 40rem; }}
img {{ background: white; display: block; max-width: 100%; }}
div {{ display: flex; gap: 0.5rem; }}
input {{ flex: 1; }}
</style>
</head>
<body>
<img id="frame" src="{first}" alt="{alt}">
<div>
<button id="play" type="button">Pause</button>
<input id="slider" type="range" min="0" max="{last}" value="0" aria-label="step of the run">
</div>
<script>
const frames = [{items}];
const image = document.getElementById("frame"), slider = document.getElementById("slider");
const button = document.getElementById("play");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, timer = 0;
function show(number) {{
  slider.value = number;
  image.src = frames[number][0];
  image.alt = frames[number][1];
  slider.setAttribute("aria-valuetext", frames[number][1]);
}}
function next() {{
  show((Number(slider.value) + 1) % frames.length);
  plan();
}}
function plan() {{
  clearTimeout(timer);
  button.textContent = playing ? "Pause" : "Play";
  if (playing) timer = setTimeout(next, Number(slider.value) === frames.length - 1 ? {hold} : {pause});
}}
button.addEventListener("click", () => {{ playing = !playing; plan(); }});
slider.addEventListener("input", () => {{ playing = false; show(Number(slider.value)); plan(); }});
show(0);
plan();
</script>
</body>
</html>
"""
