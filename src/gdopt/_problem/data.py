"""Batches: of data that live on the device, shuffled anew in every epoch; and of streams, as they come."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _trees
from gdopt._checks import fault, flatten, refuse_no_arrays, whole_number
from gdopt._errors import InputError
from gdopt._types import PyTree

_END: Any = object()  # of an iterator
_PLACES = 8  # of batches: a run is at most four behind the one that was pulled last


class Batches(NamedTuple):
    """The cut of ``rows`` rows into batches; rows that fill no batch sit an epoch out, other ones each time."""

    rows: int
    batch_size: int

    @property
    def per_epoch(self) -> int:
        return self.rows // self.batch_size

    def shapes(self, data: PyTree) -> PyTree:
        """Return the shapes and dtypes of a batch."""

        def batch(rows: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *rows.shape[1:]), rows.dtype, weak_type=rows.weak_type)

        return jax.tree.map(batch, data)

    def order(self, key: jax.Array, step: jax.Array) -> jax.Array:
        """The shuffled order of the epoch that a step is in, drawn from the key and the epoch's number alone."""
        shuffled = jax.random.permutation(jax.random.fold_in(key, step // self.per_epoch), self.rows)
        return shuffled.astype(jnp.int32)

    def take(self, data: PyTree, order: jax.Array, step: jax.Array) -> PyTree:
        """The batch of a step."""
        begin = step % self.per_epoch * self.batch_size
        index = lax.dynamic_slice(order, (begin,), (self.batch_size,))
        return jax.tree.map(lambda array: array[index], data)


class Batch(NamedTuple):
    """One batch of a stream."""

    data: PyTree
    begins: bool  # a pass over the stream
    ends: bool
    steps: int  # of its pass so far, with this one
    passes: int  # that are complete with it


class Position(NamedTuple):
    """The place of a batch in a stream."""

    number: int = 0  # batches before it
    passes: int = 0  # before its own
    steps: int = 0  # of its pass before it
    state: bytes | str | None = None  # of the iterator before it was pulled: bytes as they are, or JSON


class Stream:
    """Batches from an iterable, gone through once per epoch, or from a function that returns one for each epoch."""

    def __init__(self, source: Any):
        self._source = source
        iterator = self.open()
        self.once = iterator is source
        first = next(iterator, _END)
        if first is _END:
            raise InputError(
                f"data={source!r} gave no batch. "
                + (
                    "An iterator can be gone through once, and this one is at its end: pass a function that returns a "
                    "new one, as in data=lambda: batches(), or an iterable that can be gone through again."
                    if self.once
                    else "Pass one that gives at least one batch."
                )
            )
        refuse_no_arrays("a batch of data", first)  # what else is no array, `_arrays` tells
        self._opened: Iterator | None = iterator
        self.example = _arrays(first)
        if not jax.tree.leaves(self.example):
            raise InputError(f"a batch of data is {first!r}, which holds no arrays: give batches that do.")

    @property
    def length(self) -> int | None:
        """The batches of a pass, by what the iterable says."""
        try:
            return len(self._source)
        except TypeError:  # also of a loader that has a length but for what it loads
            return None

    def open(self) -> Iterator:
        """The batches of one more pass."""
        source = self._source if isinstance(self._source, Iterable) else self._source()
        if not isinstance(source, Iterable):
            raise InputError(
                f"data={self._source!r} returned a {type(source).__name__}: return an iterable of batches for an epoch."
            )
        return iter(source)

    def begin(self, at: Position) -> tuple[Position, list, Any]:
        """A pass from a position on: batches that were pulled before, and the iterator of those that follow.

        The first pass is the one that was begun to look at its first batch, where nobody has it. The position comes
        back; the beginning in its place, where the iterators cannot be set to one.
        """
        opened, self._opened = self._opened, None
        iterator: Any
        waiting, iterator = ([], self.open()) if opened is None else ([self.example], opened)
        if at.state is None or not _has_positions(iterator):
            return Position(), waiting, iterator
        for _ in range(at.passes):  # opened as often as it was: a function may return another order each time
            iterator = self.open()
        try:
            iterator.set_state(at.state if isinstance(at.state, bytes) else json.loads(at.state))
        except Exception as error:
            raise InputError(
                f"data={self._source!r} does not go on where the checkpoint left it, after {at.number} batches: its "
                f"set_state raised {type(error).__name__}: {error}. Pass the loader that the checkpoint was made with, "
                "or another path to begin anew."
            ) from error
        return at, [], iterator


class Feed:
    """So many passes of a stream, and at most so many batches; one ahead, so that it can tell the last of a pass."""

    def __init__(self, stream: Stream, passes: int | None, most: int):
        self.steps_per_epoch: int | None = None  # of the first pass, once that is known
        self.why = ""  # it ended before it should have
        self.first = 0  # the number of the batch that is given first
        self._stream, self._passes, self._most = stream, passes, most
        self._cut = False  # at the most batches that were asked for: what would have come is not known
        self._walk, self._ahead = self._batches(), _END  # nothing is pulled yet
        self._steps = self._begun = 0  # steps of the pass, and passes
        self._made, self._at = 0, Position()
        self._keeps, self._places = False, deque[Position](maxlen=_PLACES)

    def go_on(self, made: int, at: Position | None, steps_per_epoch: int | None, *, keeps: bool) -> None:
        """Before the first batch: so many were used before, of which it need not go through those before a position.

        However few are asked for now, it gives the used ones. It ``keeps`` positions of its own, to be saved.
        """
        self._made, self._at, self._keeps = made, at or Position(), keeps
        if steps_per_epoch is not None and steps_per_epoch <= made:  # else it was only known by looking ahead
            self.steps_per_epoch = steps_per_epoch

    @property
    def pulled(self) -> bool:
        """Tell whether any batch was taken."""
        return self._ahead is not _END

    def position(self, made: int) -> Position | None:
        """Return the place of the last of so many batches; None if it is not known."""
        return next((place for place in self._places if place.number == made - 1), None)

    def next(self) -> Batch | None:
        """The next batch; None at the end."""
        if not self.pulled:
            self._ahead = next(self._walk, None)
        if self._ahead is None:
            return None
        (data, begins), self._ahead = self._ahead, next(self._walk, None)
        self._begun += begins
        self._steps = steps = 1 if begins else self._steps + 1
        if self._ahead is not None:
            ends = self._ahead[1]
        else:
            ends = not self._cut or steps == (self.steps_per_epoch or self._stream.length)
        if ends and self.steps_per_epoch is None:
            self.steps_per_epoch = steps
        return Batch(data, begins, ends, steps, self._begun - (not ends))

    def _batches(self) -> Iterator[tuple[PyTree, bool]]:
        """Each batch, with whether a pass begins with it."""
        structure = jax.tree.structure(self._stream.example)
        at, waiting, iterator = self._stream.begin(self._at)
        self.first, self._begun, self._steps = at.number, at.passes + (at.steps > 0), at.steps
        count, steps, most = at.number, at.steps, max(self._most, self._made)
        for passes in itertools.count(at.passes):
            # Beyond the passes asked for, it gives what was used before, and no more.
            limit = self._made if self._passes is not None and passes >= self._passes else most
            while count != limit:
                state = _state(iterator) if self._keeps and not waiting else None
                batch = waiting.pop() if waiting else next(iterator, _END)
                if batch is _END:
                    break
                if state is not None:
                    self._places.append(Position(count, passes, steps, state))
                elif count > 0:  # one that cannot tell is not asked again
                    self._keeps = False
                data = _arrays(batch)
                if jax.tree.structure(data) != structure:
                    raise InputError(
                        f"batch {count} of data has the structure {jax.tree.structure(data)}, where the first had "
                        f"{structure}: give all batches the same."
                    )
                yield data, steps == 0
                steps, count = steps + 1, count + 1
            if count == limit:
                self._cut = True
                return
            if steps == 0:
                self.why = (
                    "An iterator can be gone through once: for more passes, give data as a function that returns a new "
                    "one each time, or as an iterable that can be gone through again."
                )
            if steps == 0 or (passes + 1 == self._passes and count >= self._made):
                return
            iterator, steps = self._stream.open(), 0


def _has_positions(iterator: Any) -> bool:
    """Tell whether an iterator tells its place and can be set to it, by the methods that grain's iterators have."""
    return all(callable(getattr(iterator, name, None)) for name in ("get_state", "set_state"))


def _state(iterator: Any) -> bytes | str | None:
    """Write down the place of an iterator at once, as it may change what it gave; None if that cannot be done."""
    if not _has_positions(iterator):
        return None
    try:
        state = iterator.get_state()
        if isinstance(state, bytes):
            return state
        text = json.dumps(state)
        return text if json.loads(text) == state else None  # tuples, and keys that are numbers, become others
    except Exception:  # of what JSON does not know, or of the iterator's: no run ends for the sake of its saves
        return None


def _arrays(batch: Any) -> PyTree:
    """A batch as arrays of its own memory: loaders may use theirs again. The step moves NumPy's to the device."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    arrays = [
        leaf if isinstance(leaf, jax.Array) else np.array(_numbers(_trees.path_name(path, "a batch of data"), leaf))
        for path, leaf in leaves
    ]
    rows = [array.shape[0] for array in arrays if array.ndim]
    if rows and not any(rows):
        raise InputError("a batch of data has zero rows: leave it out.")
    return treedef.unflatten(arrays)


def _numbers(name: str, leaf: Any) -> np.ndarray:
    """Convert a leaf that is no array of JAX's to one of NumPy's."""
    try:
        array = np.asarray(leaf)
    except Exception as error:  # torch's, of a tensor in bfloat16 or with a gradient
        raise InputError(f"{name} is a {type(leaf).__name__} that NumPy cannot read: {error}") from error
    if why := fault(leaf if isinstance(leaf, np.ndarray | np.generic) else array, carried=True):
        raise InputError(f"{name} {why}.")
    if array.dtype not in _trees.NUMBERS:
        raise InputError(
            f"{name} is a {type(leaf).__name__}, not an array of numbers: give pytrees of NumPy or JAX arrays, or of "
            "torch tensors."
        )
    return array


def check_data(data: PyTree, batch_size: Any) -> tuple[PyTree, Batches | None, Stream | None]:
    """The data as device arrays, and how to batch them; None where each step sees all of them.

    Of a stream, the data are its first batch.
    """
    if is_stream(data):
        if batch_size is not None:
            raise InputError(
                f"batch_size={batch_size!r} was given with data that come in batches: leave batch_size out, or pass "
                "arrays."
            )
        stream = Stream(data)
        return stream.example, None, stream
    if data is None:
        if batch_size is not None:
            raise InputError(f"batch_size={batch_size!r} was given without data: pass data=, or leave batch_size out.")
        return None, None, None
    _, treedef = flatten("data", data)
    lengths, arrays = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        name, known = _trees.path_name(path, "data"), isinstance(leaf, jax.Array | np.ndarray)
        if why := known and fault(leaf, carried=False):
            raise InputError(f"{name} {why}.")
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise InputError(
                f"{name} is a {type(leaf).__name__}, not an array: data is a pytree of arrays with a shared leading "
                "axis, such as (X, y); convert lists with numpy.asarray."
            )
        if not leaf.shape:
            raise InputError(f"{name} is a scalar and has no rows: pass constants in args=, not in data=.")
        arrays.append(leaf if known else _numbers(name, leaf))
        lengths[name] = arrays[-1].shape[0]
    if len(set(lengths.values())) != 1:
        what = ", ".join(f"{name} has {length}" for name, length in lengths.items()) or "it has no arrays"
        raise InputError(f"data needs one number of rows (leading axis) in all its arrays: {what}.")
    rows = next(iter(lengths.values()))
    if rows == 0:
        raise InputError("data has zero rows: pass at least one.")
    if batch_size is not None:
        batch_size = whole_number("batch_size", batch_size, upto=f"{rows}, the rows of data")
        if batch_size > rows:
            raise InputError(
                f"batch_size={batch_size} is over the {rows} rows of data: pass at most {rows}, or None for all rows."
            )
    batches = None if batch_size in (None, rows) else Batches(rows, batch_size)
    return treedef.unflatten(map(_trees.on_device, arrays)), batches, None


def is_stream(data: Any) -> bool:
    """Tell whether an object gives batches and holds no arrays: a generator, a loader, a function that returns one."""
    leaf = jax.tree_util.all_leaves([data]) and not hasattr(data, "shape")
    return leaf and not isinstance(data, str | bytes) and (isinstance(data, Iterable) or callable(data))
