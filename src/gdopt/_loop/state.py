"""The state of a run, its inputs, and the parts of a compiled problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gdopt import _trees
from gdopt._compile import program
from gdopt._devices.sharding import Layout
from gdopt._problem.data import Batches
from gdopt._status import RUNNING, Status
from gdopt._stopping import BY_NEIGHBOURS, Ending, Epoch, Limits, Watch
from gdopt._trees import Packed
from gdopt._types import PyTree
from gdopt._verify.hindsight import Hindsight

Carry = tuple[Packed, jax.Array]  # the state, and the rows of the history that the host has not read yet


class Inputs(NamedTuple):
    """The arguments of the compiled program that stay the same over a run; new values recompile nothing.

    Arrays are on the device, and Python's numbers are left as they are. Runs side by side each have their own ``key``
    and ``rate``, by a leading axis.
    """

    start: PyTree
    data: PyTree
    args: PyTree
    key: Any  # None for a single run that draws nothing
    rate: Any  # a number, or the rates of the steps one by one; None if a schedule or the optimizer has it
    limits: Limits
    constants: list[Any]  # the arrays that the loss closes over
    numbers: list[Any] | None  # the numbers of the schedule
    state: PyTree = None  # the model's state before the first step, if the loss has one
    optimizer_state: PyTree = None  # the optimizer's state before the first step; None for a fresh one
    constraint: Any = None  # the arrays of the constraint: see `region.Given`
    epoch: Epoch | None = None  # for a stream, whose batches are the data in turn


class Rows(NamedTuple):
    """The records of the loop, on the host: one entry per evaluation, as in a `History`."""

    loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    metrics: np.ndarray  # a column for each scalar of the aux, if they are recorded; otherwise none
    params: np.ndarray = np.zeros(0)  # a column for each number of the params, if they are recorded


class Kept(NamedTuple):
    """The point that is returned if the run ends badly: the best so far, or with a noisy loss the last good one.

    If no params are kept, it is the last point evaluated, whose params are in the state: see `returned_params`.
    """

    params: Packed | None
    step: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    aux: PyTree
    model: PyTree = None  # the model's state with which the point is to be evaluated, if params are kept


class State(NamedTuple):
    """The state of a run. For runs side by side, all but their common ``step`` has a leading axis."""

    step: jax.Array  # the updates made, which is the number of the point in ``params``
    code: jax.Array  # RUNNING, or the Status that the last evaluation led to
    params: PyTree
    optimizer: PyTree
    order: PyTree  # the epoch's shuffled row numbers
    watch: Watch
    kept: Kept
    ending: Ending
    model: PyTree = None  # the model's state that the loss returned at the step before; None if it has none


class Outcome(NamedTuple):
    """The result of ``whole``."""

    params: PyTree
    loss: jax.Array
    grad_norm: jax.Array
    aux: PyTree
    steps: jax.Array
    code: jax.Array
    success: jax.Array
    ending: Ending
    # 0 for real entries of params that the optimizer holds at a bound, 1 for others; None if it holds none
    free: PyTree
    model: PyTree = None
    optimizer: PyTree = None

    @property
    def is_smooth_minimum(self) -> jax.Array:
        """Tell whether a minimum was found, and no kink: a target may be reached anywhere."""
        claimed = (self.code == Status.CONVERGED) | (self.code == Status.PRECISION_LIMIT)
        return claimed & (self.ending.verified != BY_NEIGHBOURS)


class Compiled(NamedTuple):
    """A problem that is ready to run."""

    start: Callable[[Inputs], Carry]
    # (carry, step of the first row, limit, inputs) -> (carry, code)
    chunk: Callable[[Carry, Any, Any, Inputs], tuple[Carry, jax.Array]]
    carry: PyTree  # the shapes of the carry
    eps: float  # of the dtype in which the loss is computed
    width: int  # the numbers of the params in each row of the history; 0 if they are not recorded
    pace: list[float]  # the seconds of a step in the last run, if there was one
    probes: dict[bool, Programs]  # the programs that verify a claim, once there was one: see `Verifier.programs`
    # The check of a claim at the end of a run; None for a noisy loss.
    verify: Callable[[Carry, Inputs], Carry] | None = None
    # The examination of the loss there; its last argument is the rate of plain gradient descent.
    look_back: Callable[[State, Inputs, float | None], Hindsight] | None = None
    # The noise of the loss there, if it is most of what the run gained; otherwise 0.
    noise: Callable[[State, Inputs], float] | None = None
    # The compilation of both, which otherwise comes with the first claim.
    ready: Callable[[Carry, Inputs], None] | None = None


class Whole(NamedTuple):
    """A problem that is ready to run inside a transformation, all steps at once."""

    solve: Callable[[list, Inputs], Outcome]
    constants: list[Any]  # the arrays that the optimizer closes over


class Settings(NamedTuple):
    """The hashable settings on which a program depends, besides traces and the shapes of its inputs."""

    noisy: bool  # whether the loss is another function at each step
    batches: Batches | None
    with_key: bool
    keep_best: bool
    tests_gradient: bool  # whether the largest entry of the gradient is tested
    metrics: bool  # whether the scalars of the aux are recorded
    params: bool  # whether the params of each step are recorded
    inside: bool  # whether the run is inside jit, vmap or grad
    layout: Layout | None = None  # the placement on many devices

    def compact(self, params: PyTree) -> Packed:
        """Pack the params into few arrays, which costs much less per step if there are many small ones.

        Leave those on many devices: gathering them costs more than it saves.
        """
        return _trees.pack(params, _trees.SMALL if self.layout is None else 1)

    def in_place(self, state: State) -> State:
        """Place the arrays of the state on the devices of the params."""
        layout = self.layout
        if layout is None:
            return state
        kept = state.kept
        if kept.params is not None:
            kept = kept._replace(params=layout.packed(kept.params))
        params, optimizer = layout.like_params(state.params), layout.like_params(state.optimizer)
        kept, model = kept._replace(model=layout.like_state(kept.model)), layout.like_state(state.model)
        return state._replace(params=params, optimizer=optimizer, kept=kept, model=model)


class Programs(NamedTuple):
    """The compiled parts of a verification."""

    probe: Any  # a `program.Shared` (on many devices, of all of it); None if the loss has no second derivatives
    free: program.Shared | None  # the program that tells which entries the optimizer holds, if it may hold any
    move: program.Shared | None  # the step of a projection or a prox, if there is one
    closed: bool  # whether they depend on nothing but the traces and their inputs


def joined_rows(records: Sequence[Rows]) -> Rows:
    """Join the rows of successive chunks into one."""
    return Rows(*(np.concatenate(entries) for entries in zip(*records, strict=True)))


def is_running(state: State) -> bool:
    """Tell whether any of the runs side by side continues."""
    return bool((_trees.on_host(state.code) == RUNNING).any())


def returned_params(state: State) -> PyTree:
    """Return the params whose loss is in ``state.kept``."""
    return state.params if state.kept.params is None else state.kept.params.tree()


def returned_model(state: State) -> PyTree:
    """Return the model's state that belongs to `returned_params`: the loss there was computed with it."""
    return state.model if state.kept.params is None else state.kept.model


def params_to_return(state: State, arrays: PyTree = None) -> PyTree:
    """Return the params whose loss is in ``state.kept``, on the devices of the params; ``arrays`` are these of JAX."""
    params = returned_params(state)
    arrays = _trees.to_device(params) if arrays is None else arrays

    def put(leaf: Any, array: jax.Array, like: Any) -> jax.Array:
        shared = leaf is not array and isinstance(like, jax.Array) and array.sharding != like.sharding
        return jax.device_put(leaf, like.sharding) if shared else array

    return jax.tree.map(put, params, arrays, state.params)
