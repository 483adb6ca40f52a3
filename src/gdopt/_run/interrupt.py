"""Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def ctrl_c() -> Generator[list[bool]]:
    """Yield a list that gets an entry at Ctrl-C or SIGTERM, so that the run can end with its state intact.

    An exception could come between any two bytecodes, for example after the old state was donated and before the new
    one is bound. Schedulers end a process by SIGTERM, so it is treated in the same way. The first signal restores the
    usual handlers, so a second Ctrl-C raises KeyboardInterrupt. Handlers of other code, and other threads, are left
    alone.
    """
    pressed: list[bool] = []
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    taken = [number for number, handler in usual.items() if signal.getsignal(number) is handler]

    def give_back() -> None:
        for number in taken:
            if signal.getsignal(number) is handler:  # A callback may have replaced it.
                signal.signal(number, usual[number])

    def handler(signum: int, frame: Any) -> None:
        pressed.append(True)
        give_back()

    for number in taken:
        signal.signal(number, handler)
    _taken.append(give_back)
    try:
        yield pressed
    finally:
        _taken.remove(give_back)
        give_back()


_taken: list[Callable[[], None]] = []


def _after_fork() -> None:
    """Restore the handlers in a loader's workers, which are forked from a run: a pool ends its workers by SIGTERM."""
    for give_back in reversed(_taken):
        give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
