"""The validation of a run: at the end of each epoch, its losses, the best point by them, and patience."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from gdopt import _error_notes, _trees
from gdopt._checkpoint.resume import NoSaves, Saves
from gdopt._compile import program
from gdopt._devices.current import callers_mesh
from gdopt._devices.sharding import CLOSED_OVER, explicit_mesh, on_one_mesh
from gdopt._errors import InputError
from gdopt._loop import loop
from gdopt._loop.state import Carry, Rows, State
from gdopt._optimizers.optax_state import evaluation_params
from gdopt._outcome import nan_search
from gdopt._problem import model_state
from gdopt._problem.alike import refuse_other_lengths, shapes
from gdopt._problem.problem import Problem
from gdopt._problem.validation import Judgement, Validation, metrics_in, refuse_other_axes
from gdopt._result import History
from gdopt._settings import as_own_work, own_promotion, own_work
from gdopt._types import PyTree

_KEY = 3  # folded into the key of the run; 0, 1 and 2 are those of the shuffling, the steps and the range test
_NAME = "validation"


class Best(NamedTuple):
    """The point with the lowest validation loss so far."""

    params: PyTree
    step: int
    model: PyTree  # the model's state with which it was evaluated


def check_loss(validation: Validation | None, problem: Problem) -> None:
    """Trace the validation loss, so that its errors come before anything is compiled."""
    if validation is None:
        return
    try:
        loop.traced_anywhere(validation.problem(problem), problem.key if problem.with_key else None)
    except Exception as error:
        if not isinstance(error, InputError):
            refuse_other_axes(validation, problem.batch, error)
        _error_notes.add_validation(error, shapes(validation.data))
        raise


def validator_of(validation: Validation | None, problem: Problem, *, keep_best: bool) -> Validator | NoValidation:
    """Return the validation of a problem that is ready to run."""
    return NoValidation() if validation is None else Validator(validation, problem, keep_best=keep_best)


class NoValidation:
    """A run without validation data."""

    judgement: Judgement | None = None
    best: Best | None = None
    is_over = is_given = False

    def nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    prepare = resume = note = validate = nothing

    def latest(self) -> dict[str, Any]:
        """Return nothing for a report."""
        return {}

    def history(self, rows: Rows) -> History:
        """Return the rows as a history."""
        return History(*rows[:3])


class Validator:
    """The validation of a run. Without ``keep_best`` it keeps no point."""

    is_given = True

    def __init__(self, validation: Validation, problem: Problem, *, keep_best: bool):
        self.best: Best | None = None
        self._program = _Program(validation, problem)
        self._patience, self._keep_best = validation.patience, keep_best
        self._training: list[str] = []  # the names of the metrics of the loss
        self._steps: list[int] = []
        self._records: list[np.ndarray] = []  # the loss and the metrics
        self._lowest: int | None = None  # the number of the epoch with the lowest finite loss
        self._means: list[np.ndarray] = []  # the metrics in training
        self._rows: list[np.ndarray] = []  # those of the evaluations since the last epoch

    @property
    def is_over(self) -> bool:
        """Tell whether there was no new low for as many epochs as there is patience for."""
        since = len(self._records) - (0 if self._lowest is None else self._lowest + 1)
        return self._patience is not None and since >= self._patience

    @property
    def judgement(self) -> Judgement | None:
        if self._lowest is None:
            bad = self._program.holds_nan() if self._records else ""
            return Judgement(None, math.nan, False, self._patience, bad) if self._records else None
        loss = float(self._records[self._lowest][0])
        return Judgement(self._steps[self._lowest], loss, self.best is not None, self._patience)

    def prepare(self, carry: Carry) -> None:
        """Trace the loss on these data. If it raises on them, it does so at once."""
        state = carry[0].tree()
        self._program.prepare(state.params, state.model)

    def resume(self, saves: Saves | NoSaves, state: State, records: list[Rows]) -> None:
        """Continue the validation of the checkpoint, if there is one, and let the others have this one."""
        self._training = list(metrics_in(state.kept.aux))
        saves.validated = self.saved
        if not records:
            return
        found = saves.restored_validation((state.params, state.model))
        self._steps = found["steps"].tolist()
        self._records, self._means = list(found["records"]), list(found["means"])
        self._rows = [records[0].metrics[self._steps[-1] if self._steps else 0 :]]
        for epoch in range(len(self._records)):
            self._compare(epoch)
        if self._keep_best and self._lowest is not None:
            params, model = jax.tree.map(_trees.on_device, found["best"])
            self.best = Best(params, self._steps[self._lowest], model)

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        width = len(self._records[0]) if self._records else 1
        return {
            "steps": np.asarray(self._steps, np.int32),
            "records": np.asarray(self._records, float).reshape(-1, width),
            "means": np.asarray(self._means, float).reshape(len(self._steps), len(self._training)),
            "best": None if self.best is None else (self.best.params, self.best.model),
        }

    def note(self, rows: Rows) -> None:
        """Note the evaluations of a chunk."""
        if self._training:
            self._rows.append(rows.metrics)

    @as_own_work
    def validate(self, state: State) -> None:
        """Evaluate the validation loss at the point of a state, unless that was done."""
        step = int(state.step)
        if step in self._steps[-1:]:
            return
        with own_promotion():
            params = evaluation_params(state.optimizer, state.params)
        self._records.append(self._program(params, state.model))
        self._steps.append(step)
        self._means.append(self._epoch_mean(step))
        if self._compare(len(self._records) - 1) and self._keep_best:
            params, model = _copies((params, state.model))
            self.best = Best(params, step, model)

    def _compare(self, epoch: int) -> bool:
        """Tell whether an epoch, the last one to be compared, has a new low; a loss that is not finite is none."""
        loss = self._records[epoch][0]
        is_new = math.isfinite(loss) and (self._lowest is None or loss < self._records[self._lowest][0])
        if is_new:
            self._lowest = epoch
        return is_new

    def _epoch_mean(self, step: int) -> np.ndarray:
        """Return the means of the metrics over the evaluations of an epoch, and forget these."""
        if not self._training:
            return np.zeros(0)
        rows, before = np.concatenate(self._rows), self._steps[-2] if len(self._steps) > 1 else 0
        count = step - before
        self._rows = [rows[count:]]
        with np.errstate(all="ignore"):
            return rows[:count].mean(axis=0, dtype=float)

    def latest(self) -> dict[str, Any]:
        """Return the last entries, for a report."""
        if not self._records:
            return {}
        (loss, *others), means = self._records[-1].tolist(), self._means[-1].tolist()
        named = {"validation_metrics": (self._program.names, others), "metrics": (self._training, means)}
        return {"validation_loss": loss, **{key: dict(zip(*pair, strict=True)) for key, pair in named.items()}}

    def history(self, rows: Rows) -> History:
        """Return the history with the epochs that were validated."""
        kept, dtype = self.saved(), rows.loss.dtype
        records, means = (kept[name].astype(dtype) for name in ("records", "means"))
        return History(
            *rows[:3],
            validation_loss=records[:, 0],
            metrics=dict(zip(self._training, means.T, strict=True)),
            validation_metrics=dict(zip(self._program.names, records[:, 1:].T, strict=False)),
            validation_steps=kept["steps"],
        )


_copies = jax.jit(_trees.copy)  # one program: a copy leaf by leaf takes 25 us each


class _Program:
    """The validation loss of params and its metrics, by one compiled program, or for a stream by one for each shape."""

    def __init__(self, validation: Validation, problem: Problem):
        self.names: list[str] = []  # of the metrics
        self._problem, self._rows = validation.problem(problem), validation.rows
        self._shared: dict[Any, program.Shared] = {}
        self._key: jax.Array | None = None
        self._stays = False  # whether all is where it has to be, and will be in each epoch
        if problem.with_key:
            with own_work():
                self._key = jax.random.fold_in(problem.key, _KEY)

    def __call__(self, params: PyTree, model: PyTree) -> np.ndarray:
        """Return the loss and the metrics, each a mean over all rows, with the model's state as it is."""
        stream = self._problem.stream
        if stream is None:
            return _trees.on_host(self._mean((params, model), self._problem.data, self._rows))
        means, rows = [], []
        for count, batch in enumerate(stream.one_pass()):  # It is fetched while the one before is computed.
            try:
                means.append(self._mean((params, model), batch, None))
            except Exception as error:
                refuse_other_lengths(batch, stream.example, stream.name_of(count), error)
                raise
            rows.append(_rows_of(batch))
        found = [_trees.on_host(mean).astype(float) for mean in means]
        return found[0] if len(found) == 1 else np.average(found, axis=0, weights=rows)

    @as_own_work
    def prepare(self, params: PyTree, model: PyTree) -> None:
        """Trace the loss, so that the names of its metrics are known."""
        self._ready((params, model), self._problem.data, self._rows if self._problem.stream is None else None)

    def _mean(self, point: tuple[PyTree, PyTree], data: PyTree, most: int | None) -> jax.Array:
        shared, given = self._ready(point, data, most)
        return shared.call(*given)

    def _ready(self, point: tuple[PyTree, PyTree], data: PyTree, most: int | None) -> tuple[program.Shared, tuple]:
        """Return the program for such data, and its arguments."""
        params, model = point
        given = params, data, self._problem.args, self._key, model
        if not self._stays:
            names = "params", _NAME, "args", "key", "state"
            placed, layout = on_one_mesh({str(name): tree for name, tree in zip(names, given, strict=True)})
            given, self._stays = tuple(placed.values()), layout is None and self._problem.stream is None
        kinds = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(data))
        if kinds not in self._shared:
            self._shared[kinds] = self._compiled(given, most)
        return self._shared[kinds], given

    def _compiled(self, given: tuple, most: int | None) -> program.Shared:
        """Trace the mean as on Auto axes; if that fails, on the Explicit axes of the arrays."""
        try:
            return self._traced(self._problem, given, most)
        except Exception as error:
            mesh = explicit_mesh(self._problem.objective.params, self._problem.data) or callers_mesh()
            if isinstance(error, InputError) or mesh is None:
                _error_notes.add_validation(error, shapes(given[1]))
                raise
            return self._traced(self._problem._replace(explicit=mesh), given, most)

    @as_own_work
    def holds_nan(self) -> str:
        """Return the path of the first array of the data, or of the first batch of a stream, that holds NaN."""
        leaves = _trees.named_leaves(self._problem.data, _NAME)
        return next((name for name, leaf in leaves.items() if nan_search.is_nan(leaf)), "")

    def _traced(self, problem: Problem, given: tuple, most: int | None) -> program.Shared:
        def one(params: PyTree, data: PyTree, args: PyTree, key: jax.Array | None, model: PyTree) -> jax.Array:
            value, extra = problem.value(params, data, args, key, model)
            found = metrics_in(model_state.of(extra)[1])
            self.names = list(found)
            dtype = jnp.promote_types(value.dtype, jnp.float32)
            return jnp.stack([jnp.asarray(leaf).astype(dtype) for leaf in (value, *found.values())])

        made = program.share(functools.partial(_mean_over_parts, one, most, _lanes(given[1])), *given)
        placed = on_one_mesh({"params": given[0], CLOSED_OVER: made.constants})[0]
        return made._replace(run=as_own_work(made.run), constants=placed[CLOSED_OVER])


def _mean_over_parts(
    one: Callable, most: int | None, lanes: int, params: PyTree, data: PyTree, *given: Any
) -> jax.Array:
    """Return the mean of the values of parts of at most so many rows, each weighted by its rows.

    Parts differ by one row at most, so that none is small. If the rows are split over devices, each part has as many
    of every device.
    """
    rows = _rows_of(data)
    each = rows // lanes
    count = min(-(-rows // (most or rows)), each)
    if count <= 1:
        return one(params, data, *given)
    size, larger = divmod(each, count)

    def weighted(begin: jax.Array, size: int) -> jax.Array:
        def of(array: jax.Array) -> jax.Array:
            table = array.reshape(lanes, each, *array.shape[1:])
            return lax.dynamic_slice_in_dim(table, begin, size, 1).reshape(lanes * size, *array.shape[1:])

        return (lanes * size / rows) * one(params, jax.tree.map(of, data), *given)

    found = []
    for begin, length, parts in ((0, size + 1, larger), (larger * (size + 1), size, count - larger)):
        if parts:
            begins = begin + length * jnp.arange(parts)
            found.append(lax.map(functools.partial(weighted, size=length), begins))
    return jnp.concatenate(found).sum(axis=0)


def _rows_of(data: PyTree) -> int:
    """Return the rows of data; 1 if they have none."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(data) if len(leaf.shape)), 1)


def _lanes(data: PyTree) -> int:
    """Return over how many devices the rows are split; 1 if the arrays differ in that."""
    found = {1 if not leaf.shape else leaf.shape[0] // _shard_rows(leaf) for leaf in jax.tree.leaves(data)}
    return found.pop() if len(found) == 1 else 1


def _shard_rows(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    return sharding.shard_shape(leaf.shape)[0] if isinstance(sharding, NamedSharding) else leaf.shape[0]
