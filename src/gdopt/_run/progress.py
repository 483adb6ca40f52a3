"""The progress bar, moved between two chunks of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

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

    with tqdm(total=max_steps, unit="step") as bar:

        def advance(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update(step - bar.n)

        yield advance
        bar.total = bar.n  # A run that ended early is complete, too.
        bar.refresh()
