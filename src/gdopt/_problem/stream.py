"""Streams of batches, in their order: generators, loaders, and functions that return one."""

from __future__ import annotations

import inspect
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from gdopt import _trees
from gdopt._checks import TO_NUMBERS, fault, refuse_no_arrays
from gdopt._devices.current import callers_code
from gdopt._errors import InputError
from gdopt._problem.alike import check_like, refuse_other_lengths
from gdopt._types import PyTree

_END: Any = object()  # the end of an iterator
_PLACES = 8  # the places of batches that are kept; a run is at most four batches behind the stream


class Batch(NamedTuple):
    """One batch of a stream."""

    data: PyTree
    begins: bool  # whether a pass over the stream begins with it
    ends: bool  # whether a pass ends with it
    steps: int  # the steps of its pass so far, with this one
    passes: int  # the passes that are complete with it
    number: int = 0  # the batches before it


class Position(NamedTuple):
    """The place of a batch in a stream."""

    number: int = 0  # the batches before it
    passes: int = 0  # the passes before its own
    steps: int = 0  # the steps of its pass before it
    state: bytes | str | None = None  # the iterator's state before it was pulled: bytes as they are, or JSON


class Stream:
    """Batches from an iterable, read once per epoch, or from a function that returns one for each epoch."""

    def __init__(self, source: Any, name: str = "data"):
        self._source, self._name = source, name
        _check_call(source, name)
        iterator = self.open()
        self.once = iterator is source
        first = _pull(iterator)
        if first is _END:
            raise InputError(
                f"{name}={source!r} gave no batch. "
                + (
                    "An iterator can be read only once, and this one is at its end. Pass a function that returns a new "
                    f"one (for example {name}=lambda: batches()), or an iterable that can be read again."
                    if self.once
                    else "Pass one that gives at least one batch."
                )
            )
        refuse_no_arrays(f"a batch of {name}", first)  # `_arrays` refuses what is not an array either.
        self._opened: Iterator | None = iterator
        self.example = _arrays(first, f"a batch of {name}")
        if not jax.tree.leaves(self.example):
            raise InputError(f"a batch of {name} is {first!r}, which holds no arrays. Pass batches of arrays.")

    @property
    def length(self) -> int | None:
        """The number of batches of a pass, as the iterable reports it; None if it does not."""
        try:
            return len(self._source)
        except TypeError:  # A loader may define a length that its own source lacks.
            return None

    def checked(self, batch: Any, number: int) -> PyTree:
        """Copy a batch into new arrays, because loaders may reuse their memory, and compare it with the first."""
        name = self.name_of(number)
        data = _arrays(batch, name)
        check_like(data, self.example, name)
        return data

    def name_of(self, number: int) -> str:
        """Return the name of a batch, for errors."""
        return f"batch {number} of {self._name}"

    def one_pass(self) -> Iterator[PyTree]:
        """Yield the batches of one more pass, checked."""
        opened, self._opened = self._opened, None  # The first pass continues what was opened to look at a batch.
        iterator = self.open() if opened is None else itertools.chain([self.example], opened)
        count = 0
        while (batch := _pull(iterator)) is not _END:
            yield self.checked(batch, count)
            count += 1
        if not count:
            raise InputError(
                f"{self._name}={self._source!r} gave no batch when it was read again. An iterator can be read only "
                "once. Pass a function that returns a new one each time, or an iterable that can be read again."
            )

    def open(self) -> Iterator:
        """Open the iterator of one more pass."""
        with callers_code():
            return self._fresh()

    def _fresh(self) -> Iterator:
        source = self._source if isinstance(self._source, Iterable) else self._source()
        if not isinstance(source, Iterable):
            raise InputError(
                f"{self._name}={self._source!r} returned a {type(source).__name__}. Return an iterable of batches for "
                "an epoch."
            )
        return iter(source)

    def begin(self, at: Position) -> tuple[Position, list, Any]:
        """Begin a pass at a position: return the position, the batches pulled before, and the iterator of the others.

        The first pass continues the one that was opened to look at the first batch. If the iterators cannot be set to a
        position, the pass begins at the start, and that position is returned.
        """
        opened, self._opened = self._opened, None
        iterator: Any
        waiting, iterator = ([], self.open()) if opened is None else ([self.example], opened)
        if at.state is None or not _has_positions(iterator):
            return Position(), waiting, iterator
        for _ in range(at.passes):  # A function may return another order each time, so it is called as often.
            iterator = self.open()
        try:
            iterator.set_state(at.state if isinstance(at.state, bytes) else json.loads(at.state))
        except Exception as error:
            raise InputError(
                f"data={self._source!r} cannot resume at the position of the checkpoint, after {at.number} batches: "
                f"its set_state raised {type(error).__name__}: {error}. Pass the loader that the checkpoint was made "
                "with, or another path to begin anew."
            ) from error
        return at, [], iterator


class Feed:
    """So many passes of a stream, and at most so many batches; one ahead, so that it can tell the last of a pass."""

    def __init__(self, stream: Stream, passes: int | None, most: int):
        self.steps_per_epoch: int | None = None  # the steps of the first pass, once they are known
        self.why = ""  # the reason why it ended too early
        self.first = 0  # the number of the batch that is given first
        self._stream, self._passes, self._most = stream, passes, most
        self._cut = False  # whether it stopped at the most batches, so that the rest of the pass is not known
        self._walk, self._ahead = self._batches(), _END  # No batch is pulled yet.
        self._steps = self._begun = 0  # the steps of the pass, and the passes begun
        self._given = 0  # the batches that were given
        self._made, self._at = 0, Position()
        self._keeps, self._places = False, deque[Position](maxlen=_PLACES)

    def go_on(self, made: int, at: Position | None, steps_per_epoch: int | None, *, keeps: bool) -> None:
        """Resume before the first batch: ``made`` batches were used before, and those before a position are skipped.

        It gives all used ones, even if fewer are asked for now. It ``keeps`` its own positions for checkpoints.
        """
        self._made, self._at, self._keeps = made, at or Position(), keeps
        if steps_per_epoch is not None and steps_per_epoch <= made:  # Otherwise it was known only by looking ahead.
            self.steps_per_epoch = steps_per_epoch

    def refuse(self, batch: Batch, error: Exception) -> None:
        """Raise InputError for an error of the loss on a batch that is unlike the first."""
        refuse_other_lengths(batch.data, self._stream.example, self._stream.name_of(batch.number), error)

    @property
    def pulled(self) -> bool:
        """Tell whether any batch was pulled."""
        return self._ahead is not _END

    def position(self, made: int) -> Position | None:
        """Return the place of the last of so many batches; None if it is not known."""
        return next((place for place in self._places if place.number == made - 1), None)

    def next(self) -> Batch | None:
        """Return the next batch; None at the end."""
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
        self._given += 1
        return Batch(data, begins, ends, steps, self._begun - (not ends), self.first + self._given - 1)

    def _batches(self) -> Iterator[tuple[PyTree, bool]]:
        """Yield each batch, and whether a pass begins with it."""
        at, waiting, iterator = self._stream.begin(self._at)
        self.first, self._begun, self._steps = at.number, at.passes + (at.steps > 0), at.steps
        count, steps, most = at.number, at.steps, max(self._most, self._made)
        for passes in itertools.count(at.passes):
            # Beyond the requested passes it gives only the batches that were used before.
            limit = self._made if self._passes is not None and passes >= self._passes else most
            while count != limit:
                state = _state(iterator) if self._keeps and not waiting else None
                batch = waiting.pop() if waiting else _pull(iterator)
                if batch is _END:
                    break
                if state is not None:
                    self._places.append(Position(count, passes, steps, state))
                elif count > 0:  # An iterator that reports no position is not asked again.
                    self._keeps = False
                yield self._stream.checked(batch, count), steps == 0
                steps, count = steps + 1, count + 1
            if count == limit:
                self._cut = True
                return
            if steps == 0:
                self.why = (
                    "An iterator can be read only once. For more passes, pass data as a function that returns a new "
                    "one each time, or as an iterable that can be read again."
                )
            if steps == 0 or (passes + 1 == self._passes and count >= self._made):
                return
            iterator, steps = self._stream.open(), 0


def _check_call(source: Any, name: str) -> None:
    """Raise InputError for a function that cannot be called without arguments."""
    if isinstance(source, Iterable):
        return
    try:
        inspect.signature(source).bind()
    except TypeError as error:
        raise InputError(
            f"{name}={source!r} is called without arguments, once for each epoch: {error}. Pass a function that needs "
            f"none (for example {name}=lambda: batches(...))."
        ) from error
    except ValueError:  # Some functions that are written in C do not show their arguments.
        return


def _pull(iterator: Iterator) -> Any:
    """Return the next batch, or `_END`."""
    with callers_code():
        return next(iterator, _END)


def _has_positions(iterator: Any) -> bool:
    """Tell whether an iterator reports its position and can be set to it, by the methods of grain's iterators."""
    return all(callable(getattr(iterator, name, None)) for name in ("get_state", "set_state"))


def _state(iterator: Any) -> bytes | str | None:
    """Serialize the position of an iterator at once, because it may change the object; None if that is impossible."""
    if not _has_positions(iterator):
        return None
    try:
        state = iterator.get_state()
        if isinstance(state, bytes):
            return state
        text = json.dumps(state)
        return text if json.loads(text) == state else None  # JSON changes tuples, and keys that are numbers.
    except Exception:  # Neither JSON nor the iterator may end a run only because of its checkpoints.
        return None


def _arrays(batch: Any, name: str) -> PyTree:
    """Copy a batch into new arrays, because loaders may reuse their memory. The step moves NumPy's to the device."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    arrays = [
        leaf if isinstance(leaf, jax.Array) else np.array(numbers_of(_trees.path_name(path, name), leaf))
        for path, leaf in leaves
    ]
    rows = [array.shape[0] for array in arrays if array.ndim]
    if rows and not any(rows):
        raise InputError(f"{name} has zero rows. Leave it out.")
    return treedef.unflatten(arrays)


def numbers_of(name: str, leaf: Any) -> np.ndarray:
    """Convert a leaf that is not an array of JAX to one of NumPy."""
    try:
        array = np.asarray(leaf)
    except Exception as error:  # torch raises various ones, for example for bfloat16 or a tensor with a gradient.
        raise InputError(f"{name} is a {type(leaf).__name__} that NumPy cannot read: {error}") from error
    if why := fault(leaf if isinstance(leaf, np.ndarray | np.generic) else array, carried=True):
        raise InputError(f"{name} {why}.")
    if array.dtype not in _trees.NUMBERS and (table := _table(name, leaf)) is not None:
        return table
    if array.dtype not in _trees.NUMBERS:
        if columns := _no_numbers(leaf):
            raise InputError(
                f"{name} is a {type(leaf).__name__} whose columns {columns} do not hold numbers. Leave them out, or "
                "convert them with .astype(float)."
            )
        kind, cure = "", "Pass pytrees of NumPy or JAX arrays, or of torch tensors"
        if _is_of_pandas(leaf):
            kind, cure = f" of dtype {leaf.dtype}", TO_NUMBERS[0].upper() + TO_NUMBERS[1:]
        raise InputError(f"{name} is a {type(leaf).__name__}{kind}, not an array of numbers. {cure}.")
    return array


def _table(name: str, leaf: Any) -> np.ndarray | None:
    """Convert a table, or a column, of numbers with pandas' own dtypes or with bools; None for others."""
    if not _is_of_pandas(leaf):
        return None
    is_table = hasattr(leaf, "columns")
    table = leaf.to_frame() if hasattr(leaf, "to_frame") else leaf
    if _no_numbers(table, "iufcb"):
        return None
    holes = [str(column) for column in table if table[column].isna().any()] if hasattr(table, "columns") else []
    if holes:
        which = f" whose columns {', '.join(map(repr, holes))} lack" if is_table else ", and lacks"
        raise InputError(f"{name} is a {type(leaf).__name__}{which} values (NA). Fill them, or drop these rows.")
    try:
        return leaf.to_numpy(dtype=np.dtype(float))
    except (TypeError, ValueError):
        return None


def _is_of_pandas(leaf: Any) -> bool:
    return type(leaf).__module__.split(".")[0] == "pandas"


def _no_numbers(table: Any, kinds: str = "iufc") -> str:
    """Return the names of the columns of a table, such as a pandas DataFrame, that do not hold numbers."""
    try:
        return ", ".join(repr(name) for name, dtype in table.dtypes.items() if dtype.kind not in kinds)
    except Exception:  # Other objects have no dtypes, or keep them in another way.
        return ""


def is_stream(data: Any) -> bool:
    """Tell whether an object gives batches and is no array: a generator, a loader, a function that returns one."""
    leaf = jax.tree_util.all_leaves([data]) and not hasattr(data, "shape")
    return leaf and not isinstance(data, str | bytes) and (isinstance(data, Iterable) or callable(data))
