"""The progress bar, moved between two chunks of a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any

import jax

from gdopt._errors import GdoptError


@contextlib.contextmanager
def progress_bar(shown: bool, max_steps: int | None) -> Generator[Callable[[int, float], None]]:
    """Yield a function of the steps made and the last loss, which moves a tqdm bar if one is to be shown."""
    if not shown or jax.process_index():  # Only the first process has a bar.
        yield lambda step, loss: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise GdoptError('progress=True needs tqdm. Run pip install "gdopt[progress]"') from error

    bar = _Bar(tqdm, max_steps)
    try:
        yield bar.advance
        bar.fill()
    finally:
        bar.close()


class _Bar:
    """A bar of tqdm. If it cannot be written, because nobody reads it any more, the run goes on without it."""

    def __init__(self, tqdm: Any, max_steps: int | None):
        self._bar: Any = None
        if sys.stderr is not None and not getattr(sys.stderr, "closed", False):  # A program without a console has none.
            with self._while_writable():
                self._bar = tqdm(total=max_steps, unit="step")

    def advance(self, step: int, loss: float) -> None:
        with self._while_writable():
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                self._bar.update(step - self._bar.n)

    def fill(self) -> None:
        """Show the bar as complete: a run that ended early is complete, too."""
        with self._while_writable():
            if self._bar is not None:
                self._bar.total = self._bar.n
                widget = getattr(self._bar, "container", None)
                if widget is not None:  # In a notebook, the bar is a widget with a length of its own.
                    widget.children[1].max = max(self._bar.n, 1)
                self._bar.refresh()

    def close(self) -> None:
        with self._while_writable():
            if self._bar is not None:
                self._bar.close()

    @contextlib.contextmanager
    def _while_writable(self) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError, AttributeError):  # AttributeError: stderr became None.
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.disable = True  # Its end is not to be written, either.
