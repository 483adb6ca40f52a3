"""The validation data of a run with their loss, checked, and the metrics among what a loss returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdopt import _trees
from gdopt._checks import whole_number
from gdopt._errors import InputError
from gdopt._problem.alike import shapes
from gdopt._problem.data import check_data
from gdopt._problem.problem import Problem
from gdopt._problem.stream import Stream
from gdopt._types import PyTree

_ROWS = 1024  # the most rows that are evaluated at once, unless batches are larger
_NAME = "validation"


class Validation(NamedTuple):
    """Validation data, their loss, and the number of epochs without a gain after which a run is to end."""

    data: PyTree  # for a stream, its first batch
    stream: Stream | None
    loss: Callable | None  # None: the loss that is minimised
    patience: int | None
    rows: int  # the most rows to evaluate at once

    def __repr__(self) -> str:
        return "a stream" if self.stream else _trees.summary(self.data)

    def problem(self, problem: Problem) -> Problem:
        """Return the problem whose value is the validation loss."""
        loss = problem.objective.loss if self.loss is None else self.loss
        objective = problem.objective._replace(loss=loss)
        return problem._replace(objective=objective, data=self.data, batches=None, stream=self.stream)


class Judgement(NamedTuple):
    """The facts about a validation that the message of a run tells."""

    step: int | None  # of the lowest validation loss; None if none was finite
    loss: float
    is_returned: bool
    patience: int | None
    holds_nan: str = ""  # the path of an array of the validation data, if no loss was finite


def check_validation(validation: Any, loss: Any, patience: Any, problem: Problem) -> Validation | None:
    """Check the arguments of a validation; return None if there is none."""
    if validation is None:
        for name, value in {"validation_loss": loss, "patience": patience}.items():
            if value is not None:
                raise InputError(
                    f"{name}={value!r} was given without validation. Pass validation=, data of the structure of a "
                    f"batch, or leave {name} out."
                )
        return None
    if loss is not None and not callable(loss):
        raise InputError(f"validation_loss={loss!r} is not a function. Pass one that is called as the loss is.")
    patience = None if patience is None else whole_number("patience", patience)
    _check_epochs(problem)
    if isinstance(validation, Iterator):
        raise InputError(
            f"validation={validation!r} is an iterator, which can be read only once, but each epoch reads it. Pass a "
            "function that returns a new iterator, or an iterable that can be read again."
        )
    data, _, stream = check_data(validation, None, _NAME)
    _check_structure(data, problem.batch)
    size = problem.batches.batch_size if problem.batches else 0
    return Validation(data, stream, loss, patience, max(size, _ROWS))


def _check_epochs(problem: Problem) -> None:
    if problem.data is None:
        raise InputError("validation was given without data, so there are no epochs. Pass data=, or leave it out.")
    if not problem.noisy:
        raise InputError(
            "validation was given for a full-batch loss, of which each step would be an epoch. Pass a batch_size below "
            "the number of rows; or, for steps on all rows, a stream of one batch (for example data=lambda: [(X, y)])."
        )


def _check_structure(given: PyTree, batch: PyTree) -> None:
    """Raise InputError unless validation data look like a batch, up to the lengths of their axes."""
    same = jax.tree.structure(given) == jax.tree.structure(batch)
    if same and all(
        a.ndim == len(b.shape) for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(batch), strict=True)
    ):
        return
    raise InputError(
        f"validation={shapes(given)} has another structure than a batch of data, {shapes(batch)}. Pass the same "
        "containers (a list is no tuple), and arrays with as many axes."
    )


def refuse_other_axes(validation: Validation, batch: PyTree, error: Exception) -> None:
    """Raise InputError if the validation loss raised an error on data whose axes, but for the rows, are not a batch's.

    A loss may well take others, such as longer sequences.
    """
    pairs = zip(jax.tree.leaves(validation.data), jax.tree.leaves(batch), strict=True)
    if any(a.shape[1:] != b.shape[1:] for a, b in pairs):
        raise InputError(
            f"validation={shapes(validation.data)} has other axes than a batch of data, {shapes(batch)}, and the "
            f"loss cannot take it. Pass arrays of the same shape, but for the number of rows. ({error})"
        ) from error


def metrics_in(aux: PyTree) -> dict[str, Any]:
    """Return the real scalars of an aux by name: the keys on the way to each, or "aux" if it is one scalar itself."""
    found = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(aux) if _is_metric(leaf)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "aux" for path, _ in found]
    if len(set(names)) < len(names):  # A key may contain the separator.
        names = [jax.tree_util.keystr(path) for path, _ in found]
    return dict(zip(names, (leaf for _, leaf in found), strict=True))


def _is_metric(leaf: Any) -> bool:
    if jnp.shape(leaf) != () or _trees.is_key(leaf):
        return False
    return any(jnp.issubdtype(jnp.result_type(leaf), kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
