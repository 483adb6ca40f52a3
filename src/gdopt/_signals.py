"""Ctrl-C and SIGTERM during a call: the first one ends it in order, the second one at once."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_SOON = 2.0  # the seconds in which a second Ctrl-C counts as one, even if a later call gets it
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupted(KeyboardInterrupt):
    """Work that ends at a safe place, because a signal came and its call ends."""


class _Call:
    """A call in the main thread, and what is left to do at its end, whatever ends it."""

    def __init__(self) -> None:
        self.pressed: int | None = None  # the first signal
        self.heard = False  # whether the call knows of it
        self.at_end: list[Callable[[], None]] = []


class _Handled:
    """The handling of signals in the main thread."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []  # the outermost first
        self.replaced: dict[int, Any] = {}  # the handlers in whose place is ours
        self.foreign: dict[int, Any] = {}  # the handlers of other code that were held back last
        self.shields = 0  # the sections around the current place that no exception may tear
        self.waiting: list[int] = []  # the signals that wait for a place where an exception is safe, and is not lost
        self.unheard: int | None = None  # the signal that came too late for the last call
        self.last = -math.inf  # the time of the last Ctrl-C that was noted
        self.noted = -math.inf  # the time of the last signal of any kind
        self.raised = -math.inf  # the time at which a signal raised an exception in the outermost call


_handled = _Handled()


def interruptible(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that in the main thread the first Ctrl-C or SIGTERM is only noted: see `pressed`.

    An exception could come between any two bytecodes, for example after the old state was donated and before the new
    one is bound, or while a lock is taken. Schedulers end a process by SIGTERM, so it is treated in the same way. A
    second signal does what it would have done without gdopt. A Ctrl-C within two seconds of one that ended an earlier
    call counts as the second, so that two presses leave a loop of short calls. A signal that comes too late for a call
    ends the next one, if that begins within two seconds. Handlers of other code, and other threads, are left alone.
    Only the handler of asyncio is replaced, and called as well: it cancels the task.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        here = _Call()
        try:
            try:
                _begin(here)
                return function(*args, **kwargs)
            except Interrupted:
                _end(here)
                if not _handled.calls:
                    _leave(here)
                raise
            finally:
                _end(here)
        except KeyboardInterrupt:
            _end(here)  # A second Ctrl-C raises only once, so if it cuts the first `_end` short, this one is complete.
            _handled.unheard = None  # It may have come when the usual handler was back.
            raise
        finally:
            _end(here)

    return call


def pressed() -> bool:
    """Tell whether a signal asked the current call to end."""
    calls = _handled.calls
    if not calls or calls[-1].pressed is None or not _is_main():
        return False
    if _handled.waiting and not _handled.shields:
        _act(max(_handled.waiting))
    calls[-1].heard = True
    return True


def check() -> None:
    """Raise Interrupted if a signal asked the current call to end."""
    if pressed():
        raise Interrupted


def at_end(release: Callable[[], None]) -> None:
    """Call a function at the end of the current call, whatever a second signal has left out before."""
    if _handled.calls and _is_main():
        _handled.calls[-1].at_end.append(release)


@contextlib.contextmanager
def shielded() -> Generator[None]:
    """Let no signal raise within a short section. One that would have raises at its end.

    A handler of other code may raise, too, so it is called after the section.
    """
    with _counted():
        if _is_main() and _handled.shields == 1:
            for number in _USUAL:
                handler = signal.getsignal(number)
                ours = _on_signal, _on_foreign, signal.default_int_handler
                if callable(handler) and not any(handler is known for known in ours):
                    _handled.foreign[number] = handler
                    signal.signal(number, _on_foreign)
        yield


@contextlib.contextmanager
def _counted() -> Generator[None]:
    if not _is_main():
        yield
        return
    _handled.shields += 1  # From here on, nothing raises until it is taken back.
    try:
        yield
    finally:
        _handled.shields -= 1
        if not _handled.shields:
            _put_back()
            if _handled.waiting:
                _act(max(_handled.waiting))


def _put_back() -> None:
    """Put the handlers of other code back. If one raises here, the others are called from `_on_foreign`."""
    for number, handler in _handled.foreign.items():
        if signal.getsignal(number) is _on_foreign:
            signal.signal(number, handler)


def _on_foreign(number: int, frame: Any) -> None:
    if _handled.shields:
        _handled.waiting.append(number)
    else:
        _handled.foreign[number](number, frame)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _begin(call: _Call) -> None:
    if not _is_main():
        return
    with _counted():
        calls = _handled.calls
        soon = time.monotonic() - _handled.noted < _SOON
        call.pressed = calls[-1].pressed if calls else _handled.unheard if soon else None
        calls.append(call)
        if len(calls) > 1:
            return
        _put_back()
        _handled.raised = -math.inf
        _handled.waiting.clear()
        _handled.replaced.clear()
        for number, usual in _USUAL.items():
            handler = signal.getsignal(number)
            if handler is _on_signal:  # Other code has put it back after an earlier call.
                handler = usual
            if handler is usual or _is_asyncio(handler):
                _handled.replaced[number] = handler
                signal.signal(number, _on_signal)


def _end(call: _Call) -> None:
    """Do what is left to do, and restore the handlers at the end of the outermost call. Once is enough."""
    if call not in _handled.calls:
        return
    with shielded():
        try:
            for release in reversed(call.at_end):
                release()
        finally:
            del _handled.calls[_handled.calls.index(call) :]
            if not _handled.calls:
                _handled.unheard = None if call.heard else call.pressed
                _restore()


def _restore() -> None:
    for number, handler in _handled.replaced.items():
        if signal.getsignal(number) is _on_signal:  # A callback may have replaced it.
            signal.signal(number, handler)


def _leave(call: _Call) -> NoReturn:
    """End a call that has no result to return: let its signal do what it usually does."""
    if call.pressed == signal.SIGTERM:
        _act(signal.SIGTERM)
    raise KeyboardInterrupt from None


def _on_signal(number: int, frame: Any) -> None:
    now, handled = time.monotonic(), _handled
    again = not handled.calls or handled.calls[-1].pressed is not None
    handled.noted = now
    if number == signal.SIGINT:
        again, handled.last = again or now - handled.last < _SOON, now
    for call in handled.calls:
        call.pressed = call.pressed or number
    if not again and signal.getsignal(signal.SIGTERM) is _on_signal:
        # A second one ends the process even while it waits for compiled code, where no handler of Python runs.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not again and not _is_asyncio(handled.replaced.get(number)):
        return
    if handled.calls and now - handled.raised < _SOON:
        return  # The exception is on its way, and must not be replaced in the middle of what it undoes.
    if handled.shields or _would_swallow(frame):
        handled.waiting.append(number)
    else:
        _act(number)


def _would_swallow(frame: Any) -> bool:
    """Tell whether Python would print an exception that is raised here, and go on.

    It does so in callbacks of the garbage collector and of weak references, and in `__del__`. JAX has such callbacks,
    and a signal that comes during a collection is handled in them.
    """
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        is_weak = frame.f_globals.get("__name__") in ("weakref", "_weakrefset")
        if is_weak or frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _act(number: int) -> None:
    """Do what a signal would have done without gdopt."""
    handled = _handled
    handled.waiting.clear()
    usual = {**_USUAL, **handled.foreign, **handled.replaced}[number]
    if usual == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    try:
        usual(number, None)
    except BaseException:
        for call in handled.calls:
            call.heard = True
        handled.raised, handled.last = time.monotonic(), -math.inf  # The next signal is a first one again.
        handled.unheard = None
        raise


def _is_asyncio(handler: Any) -> bool:
    """Tell whether it is the handler of `asyncio.Runner`, which cancels the task, and raises at a second Ctrl-C."""
    asyncio: Any = sys.modules.get("asyncio")
    function = getattr(handler, "func", None)
    return asyncio is not None and getattr(function, "__func__", None) is getattr(asyncio.Runner, "_on_sigint", asyncio)


def _after_fork() -> None:
    """Restore the handlers in a loader's workers, which are forked from a run: a pool ends its workers by SIGTERM."""
    global _handled
    _restore()
    _handled = _Handled()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
