"""The verification of a claim, on the host or in a trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdopt import _signals, _stopping, _trees
from gdopt._compile import program
from gdopt._loop.region import Region
from gdopt._loop.state import Carry, Inputs, Programs, Settings, State, returned_params
from gdopt._loop.step import rate_of
from gdopt._optimizers.method import Method
from gdopt._optimizers.optax_state import restarted, trials_in
from gdopt._problem.problem import Problem
from gdopt._settings import as_own_work
from gdopt._status import Status
from gdopt._types import PyTree
from gdopt._verify.claim import Claim, known, settle
from gdopt._verify.composite import Advance, Move, Walk, advanced
from gdopt._verify.counterexamples import Point
from gdopt._verify.hindsight import Hindsight, look_back
from gdopt._verify.places import InTrace, OnHost, Probe

_WALK, _AT_ONCE = "walk", 64  # the name of its program, and the steps of one call of it


class Verifier(NamedTuple):
    """The verification of a claim to be at a minimum: see `claim.settle`."""

    problem: Problem
    method: Method
    loss: program.Traced | None  # with its gradient; None if it is traced only for a claim
    schedule: program.Traced | None
    settings: Settings
    eps: float
    value: Any = None  # the loss alone, as traced by this call
    known: Any = None  # a chain of the programs of this call and of those that equal calls share
    region: Region | None = None

    def in_trace(self, state: State, inputs: Inputs) -> State:
        """Verify the claim of a state, or withdraw it: then the run continues."""

        def verify(state: State) -> State:
            params = returned_params(state)
            tree, exact = self._tree(params), True
            probe = self._probe_of(tree, inputs)
            differences = lambda xs, ways: self._probe_by_differences(tree(xs), tree(ways), inputs)[2]
            try:
                jax.eval_shape(self._probe, *(_trees.as_real(params)[0],) * 2, inputs)
            except Exception:  # JAX raises various ones if a loss has no second derivatives.
                probe, exact = probe._replace(times=differences), False
            free = self.free(state, inputs) if self.holds else None
            moved = (lambda xs, rate: self._moved(tree(xs), rate, inputs)) if self.moves else None
            return self._settled(InTrace, probe, differences, free, state, inputs, exact=exact, move=moved)

        return lax.cond(claims(state), verify, lambda state: state, state)

    @as_own_work
    def on_host(self, carry: Carry, inputs: Inputs) -> Carry:
        """Do the same for a run that is not traced, and compile its programs now, if they were not compiled yet.

        Raise `Interrupted` at Ctrl-C, because there may be many evaluations of the loss.
        """
        state = carry[0].tree()
        if not claims(state):
            return carry
        compiled = self.programs(state, inputs)
        if self.settings.layout is not None:
            return compiled.probe.call(carry[0], inputs), carry[1]
        free = compiled.free and jax.tree.map(_trees.on_host, compiled.free.call(state, inputs))
        params = returned_params(state)
        tree, exact = self._tree(params), compiled.probe is not None
        first = self._probing(state, inputs)
        at = self._evaluation(first, params, inputs)

        def times(xs: list, ways: list) -> list:
            _signals.check()
            return list(map(_trees.on_host, first.probe.call(tree(xs), tree(ways), inputs)[2]))

        def differences(xs: list, ways: list) -> list:
            _signals.check()
            second = self.programs(state, inputs, exact=False)
            return list(map(_trees.on_host, second.probe.call(tree(xs), tree(ways), inputs)[2]))

        def moved(xs: list, rate: Any) -> tuple[list, Any]:
            program: Any = compiled.move
            there, penalty = program.call(tree(xs), np.asarray(rate), inputs)
            return list(map(_trees.on_host, there)), _trees.on_host(penalty)[()]

        with np.errstate(all="ignore"):
            confined: dict[str, Any] = {"move": moved, "advance": self._walker(inputs)} if self.moves else {}
            state = self._settled(OnHost, Probe(at, times), differences, free, state, inputs, exact=exact, **confined)
        return _trees.pack(state), carry[1]

    def _walker(self, inputs: Inputs) -> Advance:
        """Return a walk of compiled steps, between which Ctrl-C is seen."""

        def advance(walk: Walk, here: Point) -> Walk:
            made = lambda: program.share(self._traced(inputs)._walk, walk, here, walk.most, inputs)
            compiled, number, ends = self._remembered(_WALK, made), 0, False
            while not ends:
                _signals.check()
                number += _AT_ONCE
                walk = compiled.call(walk, here, np.int32(number), inputs)
                walk = jax.tree.map(lambda leaf: _trees.on_host(leaf)[()], walk)
                ends = walk.number < number
            return walk

        return advance

    def _walk(self, walk: Walk, here: Point, limit: Any, inputs: Inputs) -> Walk:
        tree = self._tree(inputs.start)
        move = lambda xs, rate: self._moved(tree(xs), rate, inputs)
        return advanced(InTrace, self._probe_of(tree, inputs), move, here, walk, limit)

    def _probe_of(self, tree: Callable[[list], PyTree], inputs: Inputs) -> Probe:
        """Return the probe in a trace; ``tree`` makes trees of blocks."""

        def at(xs: list) -> tuple[Any, list]:
            grad, loss = self._gradient(inputs, tree(xs))
            return loss, grad

        return Probe(at, lambda xs, ways: self._probe(tree(xs), tree(ways), inputs)[2])

    @as_own_work
    def look_back(self, state: State, inputs: Inputs, rate: float | None) -> Hindsight:
        """Look at the loss at the end of a run that did not reach a minimum: see `hindsight`. Ctrl-C ends that, too."""
        params = returned_params(state)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        unfit = self.region is not None or any(jnp.iscomplexobj(leaf) for _, leaf in paths)
        if self.settings.layout is not None or unfit:
            return Hindsight()
        compiled = self._probing(state, inputs)
        real = lambda leaves: _trees.as_real(treedef.unflatten(leaves))[0]
        tree = self._tree(params)

        def probe(xs: list, ways: list) -> Any:
            _signals.check()
            _, grad, product = compiled.probe.call(real(xs), real(ways), inputs)
            grad, product = (list(map(_trees.on_host, blocks)) for blocks in (grad, product))
            return jax.tree.leaves(tree(grad)), jax.tree.leaves(tree(product))

        names = [_trees.path_name(path) for path, _ in paths]
        with np.errstate(all="ignore"), contextlib.suppress(_signals.Interrupted):
            return look_back(probe, names, [_trees.on_host(leaf) for _, leaf in paths], rate)
        return Hindsight()

    def _evaluation(self, compiled: Programs, params: PyTree, inputs: Inputs) -> Callable[[list], tuple[Any, list]]:
        """Return a function that evaluates the loss and its gradient at blocks like those of the params."""
        tree = self._tree(params)
        still = tree([np.zeros_like(block) for block in self._blocks(params)])

        def at(xs: list) -> tuple[Any, list]:
            _signals.check()
            loss, grad, _ = compiled.probe.call(tree(xs), still, inputs)
            return _trees.on_host(loss)[()], list(map(_trees.on_host, grad))

        return at

    @as_own_work
    def noise(self, state: State, inputs: Inputs) -> float:
        """Return the noise of the loss at the end of a run, if most of what the run gained is noise; otherwise 0."""
        if self.settings.layout is not None or self.region is not None:
            return 0.0
        at = self._evaluation(self._probing(state, inputs), returned_params(state), inputs)
        claim = self._claim(np, state, inputs, None)
        with np.errstate(all="ignore"), contextlib.suppress(_signals.Interrupted):
            noise, drowned = known(OnHost, Probe(at, lambda xs, ways: []), claim, at(claim.params)[1])
            return float(noise) if drowned else 0.0
        return 0.0

    @as_own_work
    def make_ready(self, carry: Carry, inputs: Inputs) -> None:
        """Compile the programs, by a call of each at the point of a carry."""
        state = carry[0].tree()
        compiled = self.programs(state, inputs)
        if self.settings.layout is not None:
            compiled.probe.call(carry[0], inputs)
            return
        params = returned_params(state)
        tree, blocks = self._tree(params), self._blocks(params)
        self._probing(state, inputs).probe.call(tree(blocks), tree(blocks), inputs)
        if compiled.free is not None:
            compiled.free.call(state, inputs)
        if compiled.move is not None:
            compiled.move.call(tree(blocks), np.ones((), _trees.norm_dtype(blocks)), inputs)

    def programs(self, state: State, inputs: Inputs, *, exact: bool = True) -> Programs:
        """Return the programs of earlier calls or of this one, which are made on demand.

        Products of the Hessian are ``exact``, or differences of gradients.
        """
        return self._remembered(exact, lambda: self._programs(state, inputs, exact=exact))

    def _probing(self, state: State, inputs: Inputs) -> Programs:
        """Return the programs that can evaluate: by differences, if the loss has no second derivatives."""
        exact = self.programs(state, inputs)
        return exact if exact.probe is not None else self.programs(state, inputs, exact=False)

    def _remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under this key, in an earlier call if it depends on nothing of that; made on demand."""
        own, shared = self.known.maps
        if key not in self.known:
            made = make()
            (shared if made.closed else own)[key] = made
        return self.known[key]

    def _programs(self, state: State, inputs: Inputs, *, exact: bool) -> Programs:
        traced = self._traced(inputs)
        if self.settings.layout is not None:
            whole = lambda packed, inputs: _trees.pack(traced.in_trace(packed.tree(), inputs))
            made = program.share(whole, _trees.pack(state), inputs)
            return Programs(made, None, None, made.closed)
        real, _ = _trees.as_real(returned_params(state))
        try:
            made = program.share(traced._probe if exact else traced._probe_by_differences, real, real, inputs)
        except Exception:
            if not exact:
                raise
            made = None  # JAX raises various ones if a loss has no second derivatives.
        free = program.share(traced.free, state, inputs) if exact and self.holds else None
        rate = np.ones((), _trees.norm_dtype(real))
        move = program.share(traced._moved, real, rate, inputs) if exact and self.moves else None
        parts = [part for part in (made, free, move) if part]
        return Programs(made, free, move, all(part.closed for part in parts))

    def _traced(self, inputs: Inputs) -> Verifier:
        """Return the verification with the trace of the loss and its gradient."""
        batch = self.problem._replace(data=inputs.data).batch
        given = inputs.start, batch, inputs.args, None, None
        return self._replace(loss=program.with_gradient(self.value, self.problem.value, *given)[0])

    def _moved(self, xs: PyTree, rate: Any, inputs: Inputs) -> tuple[list, jax.Array]:
        """Return the step of the projection or the prox from real leaves, and the penalty at its end."""
        region: Any = self.region
        there = region.nearest(inputs.constraint, _trees.as_real(inputs.start)[1](xs), rate)
        begin = 0.0 if region.known_value else jnp.nan
        penalty = region.total(inputs.constraint, there, jnp.full((), begin, _trees.norm_dtype(xs)))
        return self._blocks(there), penalty

    def _probe(self, xs: PyTree, ways: PyTree, inputs: Inputs) -> tuple[jax.Array, list, list]:
        """Return the loss, its gradient, and the Hessian times a direction.

        It takes trees of real leaves: leaves of one shape are compiled once, but each slice of a vector by itself.
        """
        gradient = functools.partial(self._gradient, inputs)
        grad, product, loss = jax.jvp(gradient, (xs,), (ways,), has_aux=True)
        return loss, grad, product

    def _probe_by_differences(self, xs: PyTree, ways: PyTree, inputs: Inputs) -> tuple[jax.Array, list, list]:
        """Do the same for a loss without second derivatives: an entry moves by a share of its direction."""
        grad, loss = self._gradient(inputs, xs)
        share = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(xs)) ** (1 / 3)
        beside = lambda share: jax.tree.map(lambda x, way: x + share * way, xs, ways)
        (above, _), (below, _) = (self._gradient(inputs, beside(sign * share)) for sign in (1, -1))
        return loss, grad, [(a - b) / (2 * share) for a, b in zip(above, below, strict=True)]

    def _gradient(self, inputs: Inputs, xs: PyTree) -> tuple[list, jax.Array]:
        _, back = _trees.as_real(inputs.start)
        loss, grad = self._value_and_grad(inputs, back(xs))
        return self._blocks(grad), loss

    def _value_and_grad(self, inputs: Inputs, params: PyTree) -> tuple[jax.Array, PyTree]:
        traced: Any = self.loss
        given = inputs.constants, inputs.data, inputs.args, None, None
        region, confines = self.region, inputs.constraint
        if region is not None and region.is_box:
            # The loss may not be defined outside. The step to the bounds has a derivative of 1, also just at them.
            inside = region.nearest(confines, params, None)
            params = jax.tree.map(lambda x, new: x + lax.stop_gradient(new - x), params, inside)
        (loss, _), grad = traced.replay(traced.constants, params, *given)
        if region is None:
            return loss, grad
        if region.is_box:
            held = region.held(confines, params, grad)
            return loss, jax.tree.map(lambda held, g: jnp.where(held, 0, g), held, grad)
        return region.total(confines, params, loss), grad

    def _blocks(self, tree: PyTree) -> list:
        """Return a tree like the params as a few real arrays."""
        return jax.tree.leaves(self.settings.compact(_trees.as_real(tree)[0]))

    def _tree(self, params: PyTree) -> Callable[[list], PyTree]:
        """Return the way back from `_blocks` to the tree of real leaves."""
        treedef = jax.tree.structure(self.settings.compact(_trees.as_real(params)[0]))
        return lambda blocks: treedef.unflatten(blocks).tree()

    def held(self, state: State, inputs: Inputs) -> PyTree:
        """Return the same as `free`, as a tree of real leaves; None if the optimizer holds no entry."""
        if self.settings.noisy or not self.holds:
            return None
        if self.is_boxed:
            return self._held_by_bounds(state, inputs)
        return self._tree(returned_params(state))(self.free(state, inputs))

    def _held_by_bounds(self, state: State, inputs: Inputs) -> PyTree:
        """Return NaN for entries at a bound towards which the loss does not fall: their derivative has two sides."""
        params, region = returned_params(state), self.region
        assert region is not None
        loss, grad = self._replace(region=None)._value_and_grad(inputs, params)
        little = _stopping.resolution(loss, self.eps)

        def leaf(x: jax.Array, start: jax.Array, g: jax.Array, held: jax.Array, at: jax.Array) -> jax.Array:
            size = jnp.maximum(jnp.abs(x), jnp.abs(x - start))
            weak = ~held | ((size > 0) & (jnp.abs(g) * size <= little.astype(x.dtype)))
            return jnp.where(at & weak, jnp.nan, jnp.where(held, 0, 1)).astype(x.dtype)

        held, at = region.held(inputs.constraint, params, grad), region.at_bounds(inputs.constraint, params)
        return _trees.as_real(jax.tree.map(leaf, params, inputs.start, grad, held, at))[0]

    @property
    def holds(self) -> bool:
        """Tell whether entries may be held in their places, by bounds or by the optimizer."""
        return self.is_boxed or (self.region is None and self.method.may_project)

    @property
    def moves(self) -> bool:
        """Tell whether a projection or a prox confines the params."""
        return self.region is not None and not self.region.is_box

    @property
    def is_boxed(self) -> bool:
        return self.region is not None and self.region.is_box

    def free(self, state: State, inputs: Inputs) -> list:
        """Return 0 for entries that the optimizer holds at a bound: it moves them only against the gradient."""
        params, method = returned_params(state), self.method
        if self.is_boxed:
            return self._free_of_bounds(params, inputs)
        loss, grad = self._value_and_grad(inputs, params)
        given = inputs.data, inputs.args, None
        rate = rate_of(method, self.schedule, inputs, state.step)

        def moved(number: jax.Array) -> PyTree:
            turned = jax.tree.map(lambda g: (1 - 2 * number).astype(g.real.dtype) * g, grad)
            asked = lambda params: self.problem.value(params, *given)[0]
            updates, _ = method.update(rate, turned, state.optimizer, params, asked, loss)
            new, _ = _trees.as_real(optax.apply_updates(params, updates))
            return jax.tree.map(jnp.not_equal, new, real)

        real, _ = _trees.as_real(params)
        both = lax.map(moved, lax.iota(jnp.int32, 2))
        free = jax.tree.map(lambda m, x: jnp.where(~m[0] & m[1], 0, 1).astype(x.dtype), both, real)
        return jax.tree.leaves(self.settings.compact(free))

    def _free_of_bounds(self, params: PyTree, inputs: Inputs) -> list:
        region: Any = self.region
        _, grad = self._replace(region=None)._value_and_grad(inputs, params)
        held = region.held(inputs.constraint, params, grad)
        free = jax.tree.map(lambda held, x: jnp.where(held, 0, 1).astype(x.dtype), held, params)
        free = _trees.as_real(free)[0]
        return jax.tree.leaves(self.settings.compact(free))

    def _settled(
        self,
        place: Any,
        probe: Probe,
        differences: Callable,
        free: list | None,
        state: State,
        inputs: Inputs,
        *,
        exact: bool,
        move: Move | None = None,
        advance: Advance | None = None,
    ) -> State:
        np, params = place.np, jax.tree.map(place.np.asarray, returned_params(state))
        searches = trials_in(state.optimizer) is not None
        claim = self._claim(np, state, inputs, free)
        options: Any = {"exact": exact, "searches": searches, "move": move, "advance": advance}
        new = settle(place, probe, differences, claim, inputs.limits, self.eps, **options)
        state = state._replace(code=new.code, watch=new.watch, ending=new.ending)
        if not searches:
            return state
        there = _trees.as_real(params)[1](self._tree(params)(new.point))
        there = jax.tree.map(lambda x, old: np.asarray(x, old.dtype), there, params)
        if self.is_boxed:
            there = jax.tree.map(np.clip, there, *place.own(inputs.constraint.bounds))
        optimizer = place.select(new.restarts, restarted(state.optimizer), state.optimizer)
        params = place.select(new.moves, there, state.params)
        return state._replace(step=(state.step + new.moves).astype(np.int32), params=params, optimizer=optimizer)

    def _claim(self, np: Any, state: State, inputs: Inputs, free: list | None) -> Claim:
        kept, params = state.kept, jax.tree.map(np.asarray, returned_params(state))
        arrays = lambda tree: list(map(np.asarray, self._blocks(tree)))
        point = state.code, state.step, arrays(params), arrays(inputs.start), kept.loss, kept.grad_norm
        return Claim(*point, state.watch, free)


def claims(state: State) -> Any:
    return (state.code == Status.CONVERGED) | (state.code == Status.PRECISION_LIMIT)
