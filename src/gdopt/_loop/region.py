"""The constraint of a run in its traces: the nearest point, the projected gradient and the penalty."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdopt import _trees
from gdopt._compile import program
from gdopt._loop.implicit import Confined
from gdopt._optimizers import boxed, trials
from gdopt._optimizers.trials import Within
from gdopt._problem.constraint import Constraint
from gdopt._types import PyTree
from gdopt._verify.composite import long_rate


class Given(NamedTuple):
    """The arrays of a constraint, which are inputs of the program."""

    bounds: tuple[PyTree, PyTree] | None = None
    step: list[Any] | None = None  # what project or prox closes over
    penalty: list[Any] | None = None
    smooth: list[Any] | None = None  # what the trace of the step for derivatives closes over


class Region(NamedTuple):
    """A constraint as the programs use it; the arrays that it depends on are `Given`."""

    step: program.Traced | None  # (params) -> params, or (params, rate) -> params; None for bounds
    penalty: program.Traced | None
    is_prox: bool
    smooth: program.Traced | None = None  # the step with the rules for its derivatives

    @property
    def identities(self) -> tuple[Hashable, ...]:
        """The identities of its traces; None among them if one is not known."""
        traces = [trace for trace in (self.step, self.penalty) if trace is not None]
        return (self.is_prox, *(trace.identity for trace in traces))

    @property
    def is_box(self) -> bool:
        return self.step is None

    @property
    def known_value(self) -> bool:
        """Tell whether the loss that is compared is all that is minimised."""
        return not self.is_prox or self.penalty is not None

    def nearest(self, given: Given, params: PyTree, rate: Any) -> PyTree:
        """Return the projection of params; for a prox the proximal point at a rate."""
        if self.step is None:
            return jax.tree.map(jnp.clip, params, *_bounds(given))
        if not self.is_prox:
            return self.step.replay(given.step, params)
        return self.step.replay(given.step, params, jnp.asarray(rate).astype(_trees.norm_dtype(params)))

    def total(self, given: Given, params: PyTree, loss: jax.Array) -> jax.Array:
        """Return the loss with the penalty of the prox, if that is known."""
        if self.penalty is None:
            return loss
        return loss + self.penalty.replay(given.penalty, params).astype(loss.dtype)

    def residual(self, given: Given, params: PyTree, grad: PyTree) -> PyTree:
        """Return the projected gradient x - P(x - g).

        For a projection it is (x - P(x - t g)) / t, with a t that makes the step as long as the params, whatever their
        scale: x - g may round to x. For a prox it is (x - prox(x - t g, t)) / t.
        """
        if self.step is None:
            lower, upper = _bounds(given)
            reach = lambda g, x, low, high: jnp.clip(g, x - high, x - low)  # This loses no digit of a small g.
            return jax.tree.map(reach, grad, params, lower, upper)
        rate = long_rate(jnp, _trees.largest(params), _trees.largest(grad))
        there = self.nearest(given, trials.descended(params, grad, rate), rate)
        return jax.tree.map(lambda x, new: (x - new) / rate.astype(jnp.finfo(x.dtype).dtype), params, there)

    def within(self, given: Given, params: PyTree) -> Within:
        """Return the constraint as the update of a search takes it."""
        nearest = functools.partial(self.nearest, given)
        if self.step is not None:
            return Within(nearest, None, self.known_value)
        wide = lambda bound: trials.pack(jax.tree.map(lambda x, b: jnp.broadcast_to(b, x.shape), params, bound))
        return Within(nearest, boxed.Box(*map(wide, _bounds(given))), True)

    @property
    def confined(self) -> Confined:
        """The functions for derivatives of a minimum; the last argument is what the loss depends on."""
        if self.step is None:
            at_lower = lambda x, low, high: jnp.where(x <= low, low, high)
            return Confined(pinned=lambda params, known: jax.tree.map(at_lower, params, *_bounds(known[-1])))
        smooth = self._replace(step=self.smooth)
        step = lambda params, rate, known: smooth.nearest(known[-1]._replace(step=known[-1].smooth), params, rate)
        total = lambda params, loss, known: self.total(known[-1], params, loss)
        return Confined(step=step, total=None if self.penalty is None else total)

    def at_bounds(self, given: Given, params: PyTree) -> PyTree:
        """Tell which entries are at a bound, if there is room between their bounds."""
        at = lambda x, low, high: ((x <= low) | (x >= high)) & (low < high)
        return jax.tree.map(at, params, *_bounds(given))

    def held(self, given: Given, params: PyTree, grad: PyTree) -> PyTree:
        """Tell which entries are at a bound that the descent would leave."""

        def leaf(x: jax.Array, g: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
            return boxed.leads_out(x, g, low, high) | (low >= high)

        return jax.tree.map(leaf, params, grad, *_bounds(given))


def _bounds(given: Given) -> tuple[PyTree, PyTree]:
    if given.bounds is None:
        raise TypeError("a box has bounds")
    return given.bounds


def region_of(constraint: Constraint | None, start: PyTree) -> tuple[Region | None, Given | None]:
    """Trace a constraint; return its arrays, too."""
    if constraint is None:
        return None, None
    if constraint.bounds is not None:
        return Region(None, None, False), Given(bounds=constraint.bounds)
    is_prox = constraint.project is None
    function: Any = constraint.prox if is_prox else constraint.project
    arguments = (start, _trees.on_device(np.ones((), _trees.norm_dtype(start)))) if is_prox else (start,)
    step, smooth = (program.trace(function, *arguments, lift=not rules, rules=rules) for rules in (False, True))
    given = Given(step=step.constants, smooth=smooth.constants)
    if constraint.penalty is None:
        return Region(step, None, is_prox, smooth), given
    penalty = program.trace(constraint.penalty, start, lift=True)
    return Region(step, penalty, is_prox, smooth), given._replace(penalty=penalty.constants)
