"""The progress bar, moved between two chunks of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from gdopt.errors import GdoptError
from gdopt.result import History


@contextlib.contextmanager
def progress_bar(shown: bool, max_steps: int) -> Iterator[Callable[[History], None]]:
    """A function that takes each chunk's records; with ``shown`` it moves a tqdm bar, of one unit per evaluation."""
    if not shown:
        yield lambda records: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise GdoptError('progress=True needs tqdm: pip install "gdopt[progress]"') from error

    with tqdm(total=max_steps + 1, unit="step") as bar:

        def advance(records: History) -> None:
            if len(records.loss):
                bar.set_postfix(loss=f"{records.loss[-1]:.4g}", refresh=False)
                bar.update(len(records.loss))

        yield advance
