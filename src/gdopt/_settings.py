"""JAX's settings for gdopt's own work. The user's settings are for the user's code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")
_AS_IT_IS = contextlib.nullcontext()


def own_work() -> contextlib.AbstractContextManager[None]:
    """Compute without the checks and guards that the user has set.

    NaN and infinity are no errors here, because gdopt judges them by itself: a trial may overflow. Numbers go to the
    device and back as the work needs it.
    """
    config: Any = jax.config  # It creates its attributes on demand.
    set_by_user = (
        config.jax_debug_nans
        or config.jax_debug_infs
        or config.jax_transfer_guard_host_to_device
        or config.jax_transfer_guard_device_to_host
        or config.jax_transfer_guard_device_to_device
    )
    return _unchecked() if set_by_user else _AS_IT_IS  # Asking takes 1 µs, and entering takes 8 µs.


@contextlib.contextmanager
def _unchecked() -> Generator[None]:
    with jax.debug_nans(False), jax.debug_infs(False), jax.transfer_guard("allow"):
        yield


def as_own_work(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that it is always called in `own_work`."""
    return _always_in(own_work, function)


def in_own_promotion(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that it is always called in `own_promotion`."""
    return _always_in(own_promotion, function)


def _always_in(
    context: Callable[[], contextlib.AbstractContextManager[None]], function: Callable[P, T]
) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with context():
            return function(*args, **kwargs)

    return call


def own_transfers() -> contextlib.AbstractContextManager[None]:
    """Pass Python's numbers to a compiled program, and leave the checks for NaN and infinity to the user."""
    return jax.transfer_guard_host_to_device("allow")


def own_promotion() -> contextlib.AbstractContextManager[None]:
    """Trace with JAX's usual promotion of dtypes: few optimizers and schedules are written for the strict one."""
    return jax.numpy_dtype_promotion("standard")
