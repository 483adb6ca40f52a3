"""The sizes of chunks, between which the host looks at a run."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import gdopt
from gdopt._run import host_loop
from gdopt._run.host_loop import _Sizes

CAPACITY = 4096


def sizes_of(step_seconds: float, *, large: bool) -> list[int]:
    """The sizes of the first chunks of a run whose steps all take so long."""
    sizes, found = _Sizes([], CAPACITY, large=large), []
    for _ in range(12):
        found.append(sizes.next())
        sizes.measure(found[-1], found[-1] * step_seconds)
    return found


@pytest.mark.parametrize(("seconds", "small", "large"), [(1e-4, 500, 500), (0.03, 1, 8), (0.5, 1, 4), (5.0, 1, 1)])
def test_slow_steps_of_large_params_share_a_chunk(seconds: float, small: int, large: int) -> None:
    """A chunk gets its memory anew, which takes longer than a step if it is much."""
    assert sizes_of(seconds, large=False)[-1] == pytest.approx(small, rel=0.1)
    assert sizes_of(seconds, large=True)[-1] == pytest.approx(large, rel=0.1)
    assert sizes_of(seconds, large=True)[0] == 1  # before the time of a step is known


def test_the_sizes_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = lambda: gdopt.minimize(lambda x: jnp.sum(jnp.cos(x) + x**2), jnp.ones(9), learning_rate=0.1, max_steps=40)
    before = fit()
    monkeypatch.setattr(host_loop, "_CHUNK_SECONDS", 0.0)  # every step is slow
    monkeypatch.setattr(host_loop, "_LARGE", 0)
    after = fit()
    assert before.steps == after.steps == 40
    assert (before.history.loss == after.history.loss).all()
    np.testing.assert_array_equal(before.params, after.params)
