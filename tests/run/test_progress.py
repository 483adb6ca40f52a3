"""``progress=True``: a real bar, which counts updates and is closed however the run ends."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import tqdm.auto

import gdopt
from gdopt import Status


def square(x):
    return x**2


@pytest.fixture
def bars(monkeypatch):
    """All bars that are made; they are real."""
    made = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def close(self):
            self.was_closed = True
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    return made


def shown(capsys) -> str:
    """Return the final bar, with the newline that closing it writes."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.rpartition("\r")[2]


def test_a_bar_is_full_when_all_steps_are_made(bars, capsys):
    result = gdopt.minimize(square, 1.0, learning_rate=1e-4, max_steps=300, progress=True)
    assert result.status is Status.MAX_STEPS
    (bar,) = bars
    assert bar.n == bar.total == result.steps == 300
    assert bar.was_closed
    line = shown(capsys)
    assert line.startswith("100%|")
    assert f"| {bar.total}/{bar.total} [" in line
    assert f"loss={result.history.loss[-1]:.4g}]" in line
    assert line.endswith("\n")


def test_a_bar_of_epochs(bars, capsys):
    rows = np.arange(40.0, dtype=np.float32)
    loss = lambda w, batch: jnp.mean((w - batch) ** 2)
    result = gdopt.minimize(loss, 0.0, data=rows, batch_size=8, epochs=6, learning_rate=0.1, progress=True)
    assert result.steps == 6 * 5
    assert bars[0].n == bars[0].total == result.steps
    assert "100%" in shown(capsys)


def test_a_bar_of_a_run_that_converges_early_is_closed_where_it_stands(bars, capsys):
    result = gdopt.minimize(square, 1.0, learning_rate=0.1, max_steps=1000, progress=True)
    assert result.status is Status.CONVERGED
    (bar,) = bars
    assert bar.n == bar.total == result.steps < 1000
    assert bar.was_closed
    line = shown(capsys)
    assert f"| {bar.n}/{bar.total} [" in line
    assert line.endswith("\n")


@pytest.mark.parametrize("rate", [1.5, 1e30])
def test_a_bar_of_a_run_that_fails(rate, bars, capsys):
    result = gdopt.minimize(square, 1.0, learning_rate=rate, max_steps=1000, progress=True)
    assert not result.success
    assert bars[0].n == result.steps
    assert bars[0].was_closed


def test_a_bar_of_a_run_that_the_callback_stops(bars, capsys):
    result = gdopt.minimize(square, 1.0, learning_rate=1e-6, progress=True, callback=lambda report: True)
    assert result.status is Status.STOPPED
    assert bars[0].n == result.steps  # what the callback has seen: the last point is evaluated after it
    assert bars[0].was_closed


def test_a_bar_is_closed_when_the_callback_raises(bars, capsys):
    def callback(report):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        gdopt.minimize(square, 1.0, learning_rate=0.1, progress=True, callback=callback)
    assert bars[0].was_closed
    assert shown(capsys).endswith("\n")


def test_a_bar_changes_nothing(bars):
    with_bar, without = (
        gdopt.minimize(square, 1.0, learning_rate=0.1, progress=progress) for progress in (True, False)
    )
    assert with_bar.history is not None
    assert without.history is not None
    for ours, theirs in zip(with_bar.history, without.history, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(bars) == 1


def test_no_bar_unless_asked(capsys):
    gdopt.minimize(square, 1.0, learning_rate=0.1)
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_the_error_says_how_to_install_it(monkeypatch):
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(gdopt.GdoptError, match=r'pip install "gdopt\[progress\]"') as caught:
        gdopt.minimize(square, 1.0, learning_rate=0.1, progress=True)
    assert isinstance(caught.value.__cause__, ImportError)
    assert gdopt.minimize(square, 1.0, learning_rate=0.1).success  # without a bar it runs


def closed() -> io.TextIOBase:
    stream = io.StringIO()
    stream.close()
    return stream


def unread() -> io.TextIOBase:
    """Return a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)


@pytest.mark.parametrize("midway", [False, True], ids=["from the start", "midway"])
@pytest.mark.parametrize("stream", [lambda: None, closed, unread], ids=["None", "closed", "unread"])
def test_a_run_whose_bar_cannot_be_written_goes_on(stream, midway, monkeypatch):
    there = stream()

    def lose(report):
        if midway:
            monkeypatch.setattr(sys, "stderr", there)
            for bar in list(cast(Any, tqdm.auto.tqdm)._instances):
                bar.fp = there

    if not midway:
        monkeypatch.setattr(sys, "stderr", there)
    result = gdopt.minimize(square, 1.0, learning_rate=1e-4, max_steps=300, progress=True, callback=lose)
    assert (result.status, result.steps) == (Status.MAX_STEPS, 300)
    if there is not None:
        there.close()


def test_a_run_without_stdout_has_its_bar(bars, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    result = gdopt.minimize(square, 1.0, learning_rate=1e-4, max_steps=300, progress=True)
    assert bars[0].n == result.steps == 300
    monkeypatch.undo()
