"""Each example of the gallery runs to its end, checks its answer, and draws a picture with labelled axes."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"
EXAMPLES = sorted(GALLERY.glob("plot_*.py"))


@pytest.fixture(autouse=True)
def as_for_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run with the settings of a reader, in an empty folder, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    x64 = jax.config.read("jax_enable_x64")
    with jax.numpy_rank_promotion("allow"):
        yield
    plt.close("all")
    assert jax.config.read("jax_enable_x64") == x64, "the next example of the site would run in float64, too"


def figures(names: dict[str, object]) -> list[Figure]:
    drawn = [plt.figure(number) for number in plt.get_fignums()]
    return drawn + [value for value in names.values() if isinstance(value, Figure) and value not in drawn]


# In one process: importing the libraries takes each example longer than most fits.
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("example", [pytest.param(example, id=example.stem) for example in EXAMPLES])
def test_example(example: Path, tmp_path: Path) -> None:
    names = runpy.run_path(str(example), run_name="__main__")
    drawn = figures(names)
    assert drawn, "it draws no picture"
    for number, figure in enumerate(drawn):
        figure.savefig(tmp_path / f"{number}.png")  # what warns here would warn in the build of the site
        labelled = [axes for axes in figure.axes if axes.get_xlabel() and (axes.get_ylabel() or axes.get_title())]
        assert labelled, "no axis has a label"


@pytest.mark.parametrize("example", [pytest.param(example, id=example.stem) for example in EXAMPLES])
def test_text(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    title, underline = text.splitlines()[1:3]
    assert underline == "=" * len(title)
    for part in ("# %%\n", "\nassert ", "status"):
        assert part in text, f"it lacks {part!r}"
