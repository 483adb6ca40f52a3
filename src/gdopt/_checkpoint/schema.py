"""The contents of a checkpoint, checked before anything is used: checksums only show that a file is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdopt._checkpoint.folder import Saved, step_of
from gdopt._errors import CheckpointError
from gdopt._loop.state import Rows
from gdopt._problem.limits import LAST_STEP
from gdopt._status import RUNNING, Status
from gdopt._stopping import NONE_SEEN, NOT_VERIFIED, OUTSIDE, UP_TO_NOISE, Limits

TEST_ARRAYS = ("learning_rate", "loss", "smoothed_loss", "losses", "smoothed_losses")
VALIDATION_ARRAYS = ("steps", "records", "means")
GIVEN = ("params", "data", "batch_size", "args", "held params", "key", "keep_best", "float")
_LONGEST = 80  # characters of a value in a message
_LARGEST = 10**300  # of whole numbers that are to be converted to floating-point ones
_HOST_ENDS = (Status.STOPPED, Status.INTERRUPTED, Status.DATA_EXHAUSTED, Status.EARLY_STOPPED)  # no state holds these
_CODES = (RUNNING, *(int(status) for status in Status if status not in _HOST_ENDS))

Field = tuple[Any, Callable[[Any], bool], str]  # a value, its test, and the wanted kind


def check(saved: Saved) -> None:
    """Raise CheckpointError, with the file and the field, if the contents of a checkpoint are not those of a run."""
    try:
        for name, (value, valid, wanted) in _fields(saved):
            if not valid(value):
                raise CheckpointError(
                    f"{saved.file!r} cannot be used: its field {name!r} is {_shown(value)}, not {wanted}."
                )
    except _Missing as missing:
        raise CheckpointError(f"{saved.file!r} cannot be used: it has no field {missing.args[0]!r}.") from None


class _Missing(Exception):
    """A field is not there."""


def _fields(saved: Saved) -> Iterator[tuple[str, Field]]:
    meta = saved.meta
    texts = lambda value: _is_dict(value) and all(type(text) is str for text in value.values())
    given = _need(meta, "given")
    yield "given", (given, texts, "a text for each name")
    yield "given", (given, lambda given: set(GIVEN) <= given.keys(), f"a text for each of {', '.join(GIVEN)}")
    optimizer = _need(meta, "optimizer")
    yield "optimizer", (optimizer, texts, "a text for each name")
    for name in ("text", "updates", "versions"):
        _need(optimizer, name, "optimizer.")
    for name in ("start", "loss"):
        yield name, (_need(meta, name), _is_text, "a text")
    for name in ("layout", "gradient", "validation_loss"):
        yield name, (meta.get(name, ""), _is_text, "a text")
    hosts = meta.get("host", [])
    yield "host", (hosts, lambda hosts: type(hosts) is list and all(map(_is_text, hosts)), "a list of texts")
    failed = meta.get("failed", [])
    yield "failed", (failed, lambda failed: type(failed) is list and all(map(_is_text, failed)), "a list of texts")
    is_peak = _optional(lambda peak: _is_number(peak) and 0 < peak < math.inf)
    yield "peak", (meta.get("peak"), is_peak, "a number above 0, or None")
    yield "limits", (_need(meta, "limits"), _are_limits, f"{len(Limits._fields) - 1} numbers or None")
    yield from _asked(meta)
    yield from _rates(meta)
    yield from _state(saved)
    yield from _validation(saved)
    yield from _range_test(saved)
    yield from _stream(saved)


def _asked(meta: dict[str, Any]) -> Iterator[tuple[str, Field]]:
    asked = meta.get("asked", {})
    yield "asked", (asked, _is_dict, "a number of steps and of epochs")
    for name in ("max_steps", "epochs", "patience"):
        yield (
            f"asked.{name}",
            (asked.get(name), _optional(_whole(1, LAST_STEP)), "a whole number of 1 or more, or None"),
        )


def _rates(meta: dict[str, Any]) -> Iterator[tuple[str, Field]]:
    if "rates" not in meta:
        return
    rates = meta["rates"]
    yield "rates", (rates, _is_dict, "a list of rates")
    for name in ("kind", "schedule"):
        yield f"rates.{name}", (_need(rates, name, "rates."), _is_text, "a text")
    steps, values = (_need(rates, name, "rates.") for name in ("steps", "rates"))
    rises = lambda steps: all(map(_whole(0, LAST_STEP), steps)) and all(map(int.__lt__, steps, steps[1:]))
    yield "rates.steps", (steps, lambda steps: type(steps) is list and rises(steps), "a rising list of steps")
    fits = lambda values: type(values) is list and len(values) == len(steps) and all(map(_is_number, values))
    yield "rates.rates", (values, fits, "a number for each step")


def _state(saved: Saved) -> Iterator[tuple[str, Field]]:
    arrays, whole = saved.arrays, "a whole number from {} to {}".format
    step = _need(arrays, "state.step")
    yield "state.step", (step, _is_count(0, LAST_STEP), whole(0, LAST_STEP))
    there = step_of(saved.file)
    yield "state.step", (step, lambda step: int(step) == there, f"the step {there} of the file's name")
    code = _need(arrays, "state.code")
    yield "state.code", (code, lambda code: _is_count(0, 99)(code) and int(code) in _CODES, "the code of a state")
    reached = lambda code: int(code) != Status.TARGET_REACHED or saved.meta["limits"][-1] != "-inf"
    yield "state.code", (code, reached, "the code of a run without a target")
    kept = _need(arrays, "state.kept.step")
    yield "state.kept.step", (kept, _is_count(0, int(step)), whole(0, int(step)))
    for name, most in (("verified", UP_TO_NOISE), ("flaw", OUTSIDE)):
        full, least = f"state.ending.{name}", NOT_VERIFIED if name == "verified" else NONE_SEEN
        yield full, (arrays.get(full, np.int32(0)), _is_count(least, most), whole(least, most))
    for name in arrays:
        if name.startswith("state.watch.") and arrays[name].dtype.kind == "i":
            yield name, (arrays[name], _is_count(0, LAST_STEP), whole(0, LAST_STEP))
    length = int(step) + (int(code) != RUNNING)
    for name in Rows._fields[:3]:
        full = f"history.{name}"
        is_row = lambda row: _is_floating(row) and row.shape == (length,)
        yield full, (_need(arrays, full), is_row, f"a list of {length} floating-point numbers")
    columns = arrays.get("history.metrics", np.zeros((length, 0)))
    is_table = lambda table: _is_floating(table) and table.ndim == 2 and len(table) == length
    yield "history.metrics", (columns, is_table, f"a table of {length} rows of floating-point numbers")
    if "state.order" in arrays:
        drawn = lambda order: _is_permutation(order) or int(step) == 0
        yield "state.order", (arrays["state.order"], drawn, "an order of the rows")


def _validation(saved: Saved) -> Iterator[tuple[str, Field]]:
    arrays, made = saved.arrays, int(saved.arrays["state.step"])
    if not any(name.startswith("validation.") for name in arrays):
        return
    steps, *tables = (_need(arrays, f"validation.{name}") for name in VALIDATION_ARRAYS)
    rises = lambda steps: steps.ndim == 1 and steps.dtype == np.int32 and (np.diff(steps, prepend=0) > 0).all()
    within = lambda steps: rises(steps) and (steps <= made).all()
    yield "validation.steps", (steps, within, f"a rising list of steps up to {made}")
    columns = arrays.get("history.metrics", np.zeros((0, 0))).shape[1]
    for name, table, fits in zip(VALIDATION_ARRAYS[1:], tables, ((1).__le__, columns.__eq__), strict=True):
        is_table = lambda rows, fits=fits: (
            _is_floating(rows) and rows.ndim == 2 and len(rows) == len(steps) and fits(rows.shape[1])
        )
        yield f"validation.{name}", (table, is_table, f"a table of {len(steps)} rows of floating-point numbers")


def _range_test(saved: Saved) -> Iterator[tuple[str, Field]]:
    test = saved.meta.get("range_test")
    if test is None:
        return
    known = {"status", "message", "suggestion", "suggestions"}
    yield "range_test", (test, lambda test: _is_dict(test) and test.keys() <= known, "a range test, or None")
    status = _need(test, "status", "range_test.")
    yield "range_test.status", (status, lambda status: type(status) is int and status in set(Status), "a status")
    yield "range_test.message", (_need(test, "message", "range_test."), _is_text, "a text")
    positive = _optional(lambda rate: _is_number(rate) and 0 < rate < math.inf)
    suggestion = _need(test, "suggestion", "range_test.")
    yield "range_test.suggestion", (suggestion, positive, "a number above 0, or None")
    rules = _need(test, "suggestions", "range_test.")
    are_rates = lambda rules: _is_dict(rules) and all(map(positive, rules.values()))
    yield "range_test.suggestions", (rules, are_rates, "a number above 0, or None, for each rule")
    shape = _need(saved.arrays, "range_test.losses").shape
    yield "range_test.losses", (saved.arrays["range_test.losses"], lambda rows: rows.ndim == 2, "a table")
    for name in TEST_ARRAYS:
        full, wanted = f"range_test.{name}", shape if name.endswith("losses") else shape[-1:]
        fits = lambda rows, wanted=wanted: _is_floating(rows) and rows.shape == wanted
        yield full, (_need(saved.arrays, full), fits, f"floating-point numbers of shape {list(wanted)}")


def _stream(saved: Saved) -> Iterator[tuple[str, Field]]:
    batches = saved.meta.get("batches", {})
    are_sums = lambda sums: _is_dict(sums) and all(name.isdecimal() and _is_text(sums[name]) for name in sums)
    yield "batches", (batches, are_sums, "a checksum for each number of a batch")
    if "stream" not in saved.meta:
        return
    stream, step = saved.meta["stream"], int(saved.arrays["state.step"])
    yield "stream", (stream, _is_dict, "the place in a stream")
    known = stream.get("steps_per_epoch")
    yield "stream.steps_per_epoch", (known, _optional(_whole(1, LAST_STEP)), "a whole number of 1 or more, or None")
    if "state" not in stream:
        return
    number = _need(stream, "number", "stream.")
    yield "stream.number", (number, _whole(step - 1, step - 1), f"{step - 1}, the last batch before step {step}")
    for name in ("passes", "steps"):
        value = _need(stream, name, "stream.")
        yield f"stream.{name}", (value, _whole(0, number), f"a whole number from 0 to {number}")
    passes, steps = stream["passes"], stream["steps"]
    fits = lambda _: steps == number if passes == 0 else passes + steps <= number
    yield "stream.steps", (steps, fits, f"the steps of pass {passes} before batch {number}")
    yield "stream.state", (stream["state"], lambda kind: kind in ("bytes", "json"), "'bytes' or 'json'")
    raw = _need(saved.arrays, "stream")
    fits = lambda raw: raw.dtype == np.uint8 and raw.ndim == 1 and (stream["state"] == "bytes" or _is_json(raw))
    yield "stream", (raw, fits, "the state of an iterator")


def _need(fields: Any, name: str, within: str = "") -> Any:
    if not hasattr(fields, "keys") or name not in fields:
        raise _Missing(f"{within}{name}")
    return fields[name]


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_count(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: value.shape == () and value.dtype == np.int32 and least <= int(value) <= most


def _optional(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_dict(value: Any) -> bool:
    return type(value) is dict


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _are_limits(value: Any) -> bool:
    def fits(limit: Any) -> bool:
        try:
            return type(limit) is str and (limit == "None" or not math.isnan(float(limit)))
        except ValueError:
            return False

    return type(value) is list and len(value) == len(Limits._fields) - 1 and all(map(fits, value))


def _is_permutation(order: np.ndarray) -> bool:
    if order.ndim != 1 or order.dtype.kind != "i":
        return False
    return bool(np.array_equal(np.sort(order), np.arange(order.size)))


def _is_json(raw: np.ndarray) -> bool:
    try:
        json.loads(raw.tobytes().decode())
    except (ValueError, RecursionError):
        return False
    return True


def _is_floating(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}" if value.ndim else f"{value.item()} ({value.dtype})"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
