"""Any sequence of calls, changed arrays and forgotten programs against the answers of a plain loop."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import walk, walk_on
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule
from test_stale import CARRIERS, NESTS, X, change, nested

import gdopt

SECONDS = 600
STEPS, RATE = 3, 0.25
NUMBERS = (1.0, 2.0, 3.0)


class Cache(RuleBasedStateMachine):
    """Losses |x - c|^2 whose number c is somewhere in their traces: after k steps of 1/4, x - c has halved k times."""

    losses = Bundle("losses")
    context: Callable[[], Any] = contextlib.nullcontext

    @rule(
        target=losses,
        names=st.lists(st.sampled_from(NESTS), max_size=2),
        carrier=st.sampled_from(sorted(CARRIERS)),
        numbers=st.permutations(NUMBERS),
    )
    def make(self, names: list[str], carrier: str, numbers: list[float]) -> Any:
        """Make two losses that differ in their numbers alone, each with what carries its number, and the number."""
        made = []
        for number in numbers[:2]:
            value = CARRIERS[carrier](number)
            function = nested(names, value)
            made.append((lambda x, function=function: jnp.sum(function(x) ** 2), value, number))
        return multiple(*made)

    def expected(self, loss: Any, steps: int = STEPS) -> np.ndarray:
        number = loss[2]
        return number + (X - number) * (1 - 2 * RATE) ** steps

    def check(self, found: Any, loss: Any, steps: int = STEPS) -> None:
        np.testing.assert_allclose(found, self.expected(loss, steps), rtol=1e-3, atol=1e-3)

    @rule(loss=losses, optimizer=st.sampled_from([gdopt.gd, optax.sgd]))
    def minimize(self, loss: Any, optimizer: Any) -> None:
        with self.context():
            options: dict[str, Any] = {"learning_rate": RATE, "max_steps": STEPS, "tol": 0, "optimizer": optimizer}
            self.check(gdopt.minimize(loss[0], X, **options).params, loss)

    @rule(loss=losses)
    def minimize_inside(self, loss: Any) -> None:
        run = lambda x: gdopt.minimize(loss[0], x, learning_rate=RATE, max_steps=STEPS, tol=0).params
        with self.context():
            self.check(jax.jit(run)(jnp.asarray(X)), loss)

    @rule(loss=losses)
    def step(self, loss: Any) -> None:
        with self.context():
            self.check(gdopt.gd_step(loss[0], jnp.asarray(X), RATE)[0], loss, 1)

    @rule(loss=losses)
    def in_a_thread(self, loss: Any) -> None:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(gdopt.minimize(loss[0], X, learning_rate=RATE, max_steps=STEPS, tol=0).params)
        )
        thread.start()
        thread.join()
        self.check(found[0], loss)

    @rule(loss=consumes(losses))
    def change_in_place(self, loss: Any) -> None:
        """An array that changes after the last call with its loss changes no other answer."""
        change(loss[1])

    @rule(kind=st.sampled_from(["jax", "gdopt", "garbage"]))
    def forget(self, kind: str) -> None:
        {"jax": jax.clear_caches, "gdopt": gdopt.clear_cache, "garbage": gc.collect}[kind]()

    @rule(kind=st.sampled_from(["nothing", "precision", "x64"]))
    def set_up(self, kind: str) -> None:
        self.context = {
            "nothing": contextlib.nullcontext,
            "precision": lambda: jax.default_matmul_precision("highest"),
            "x64": lambda: jax.enable_x64(True),
        }[kind]


def test_fifty_steps() -> None:
    walk(Cache, 25, 2)


@pytest.mark.slow
def test_ten_minutes() -> None:
    walk_on(Cache, SECONDS)
