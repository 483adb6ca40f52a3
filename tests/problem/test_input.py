"""Bad input gets an error that names it and says what to do, before anything compiles."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import decimal
import enum
import functools
import inspect
import math
import random
import threading
import time
import warnings
from random import gauss
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from helpers import count_compilations

import gdopt
from gdopt import Status, _jax
from gdopt._compile.self_check import is_reliable
from gdopt._optimizers.factory import check_optimizer
from gdopt._optimizers.optax_state import apply, extra_arguments

X = np.ones((6, 2), np.float32)
y = np.ones(6, np.float32)


def square(x, *_):
    return jnp.sum(jnp.asarray(x) ** 2)


def line(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


transformation: Any = optax.GradientTransformation  # also of what its types forbid
W = np.zeros(2, np.float32)
BATCHES = {"params": W, "loss": line, "data": (X, y)}

DELETED = jnp.ones((3, 2))
DELETED.delete()
MASKED = np.ma.array(y, mask=y > 0)


class Table:
    """Columns of numbers, as in a DataFrame of pandas: it has a shape, becomes an array, and has no single dtype."""

    def __init__(self, **columns: np.ndarray):
        self.columns = columns

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {name: column.dtype for name, column in self.columns.items()}

    @property
    def shape(self) -> tuple[int, int]:
        return len(next(iter(self.columns.values()))), len(self.columns)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        numeric = all(column.dtype.kind == "f" for column in self.columns.values())
        return np.stack([column.astype(column.dtype if numeric else object) for column in self.columns.values()], 1)


class Once:
    """An iterator that JAX, which warns of those of Python, does not know."""

    def __init__(self, items: list):
        self._items = items

    def __iter__(self) -> Once:
        return self

    def __next__(self) -> Any:
        if not self._items:
            raise StopIteration
        return self._items.pop()


BAD = {
    "record_params no bool": ({"record_params": "yes"}, "record_params='yes' is not a bool"),
    "record too large": (
        {"params": np.zeros(100_000, np.float32), "max_steps": None, "record_params": True},
        r"record_params=True would take 3.73 GiB for 10000 steps of 100000 numbers.*Lower max_steps",
    ),
    "record with a checkpoint": (
        {"record_params": True, "checkpoint": "run"},
        "checkpoint='run' was given with record_params=True.*Leave one of them out",
    ),
    "record of unknown length": (
        {**BATCHES, "data": lambda: iter([(X, y)]), "max_steps": None, "epochs": 2, "record_params": True},
        "record_params=True was given for a stream of unknown length.*Pass max_steps=",
    ),
    "loss no function": ({"loss": 3}, "loss=3 is not a function"),
    "no loss": ({"loss": None}, "loss=None is not a function. Pass one that is called as loss"),
    "integer leaf": (
        {"params": {"layer": [1.0, np.arange(3)]}},
        r"params\['layer'\]\[1\] is of dtype int32.*trainable",
    ),
    "python int": ({"params": [3]}, r"params\[0\] is of dtype int32.* Write 3.0 for 3, or leave it out"),
    "python bool": ({"params": {"on": True}}, r"params\['on'\] is of dtype bool.* Write 1.0 for True"),
    "bool leaf": ({"params": {"on": np.array(True)}}, r"params\['on'\] is of dtype bool"),
    "array of texts": ({"params": [1.0, np.array(["a"])]}, r"params\[1\] is an array of dtype <U1.*astype\(float\)"),
    "array of objects": (
        {"params": {"w": np.array([1.0, None])}},
        r"params\['w'\] is an array of dtype object, not of numbers: convert it with .astype\(float\)",
    ),
    "array of dates": (
        {"params": [1.0, np.array(["2001-01-01"], "M8[D]")]},
        r"params\[1\] is an array of dtype datetime",
    ),
    "masked array": ({"params": {"w": MASKED}}, r"params\['w'\] is a masked array.* Pass its .filled\(value\)"),
    "keys of two types": (
        {"params": {"w": [{1: 1.0, "a": 2.0}]}},
        r"params\['w'\]\[0\] is a dict whose keys are of the types int and str, .* Use keys of one type",
    ),
    "deleted leaf": (
        {"params": {"w": [DELETED]}},
        r"params\['w'\]\[0\] is an array of dtype float32 and shape \(3, 2\) that was .* donated.* Pass an array",
    ),
    "no float leaf": ({"params": ["a", None, jnp.tanh]}, "has no entries to optimise. Pass at least one float"),
    "no leaves": ({"params": {}}, "params={} has no entries"),
    "zero-size leaf": ({"params": np.zeros((0, 3), np.float32)}, "no entries to optimise"),
    "all left out": ({"trainable": False}, "trainable= does not leave out"),
    "mask of another shape": (
        {"params": {"a": 1.0, "b": 2.0}, "trainable": {"b": True, "c": True}},
        "trainable=.* does not fit params: it lacks 'a', and params has no 'c'. Pass True or False for each leaf",
    ),
    "names for a mask": (
        {"params": {"a": 1.0}, "trainable": ["a"]},
        r"trainable=\['a'\] does not fit params: it is a list, and params is a dict. Pass True or False",
    ),
    "mask of another shape below": (
        {"params": {"a": {"b": 1.0}}, "trainable": {"a": [True]}},
        r"trainable=.* does not fit params \(pytree structure error: [^\n]*\). Pass True or False",
    ),
    "texts for labels": (
        {"loss": line, "data": (X, np.array(list("abcdef")))},
        r"data\[1\] is an array of dtype <U1, not of numbers: .* names of classes with numpy.unique\(names",
    ),
    "a fraction for data": ({"loss": line, "data": 0.2}, "data=0.2 is a float, not an array. Pass a pytree of arrays"),
    "mask of numbers": ({"trainable": 1}, "trainable holds 1. Pass only True or False"),
    "nan start": (
        {"params": {"w": np.array([0, np.nan], np.float32)}},
        r"params\['w'\] starts with nan at index \(1,\)",
    ),
    "infinite start": ({"params": np.inf}, "params starts with inf"),
    "vector loss": ({"loss": lambda x: x * jnp.ones(3)}, r"the loss returned shape \(3,\)"),
    "one-entry loss": ({"loss": lambda x: x * jnp.ones(1)}, r"the loss returned shape \(1,\)"),
    "integer loss": ({"loss": lambda x: 3}, "the loss returned dtype int32"),
    "complex loss": ({"loss": lambda x: x * 1j}, "the loss returned dtype complex64"),
    "loss without a value": ({"loss": lambda x: None}, "the loss returned a NoneType. Return a scalar array"),
    "list of a loss": ({"loss": lambda x: [x]}, "the loss returned a list of 1. Return a scalar array"),
    "dict of a loss": ({"loss": lambda x: {"loss": x}}, "the loss returned a dict. Return a scalar array"),
    "bool loss": ({"loss": lambda x: x > 0}, "the loss returned dtype bool. Return a real floating-point scalar"),
    "tuple without has_aux": ({"loss": lambda x: (x, x)}, "returned a tuple of 2.*has_aux=True"),
    "has_aux without a tuple": (
        {"has_aux": True},
        r"needs a loss that returns \(value, aux\), but it returned an array of",
    ),
    "has_aux of three": (
        {"loss": lambda x: (x, x, x), "has_aux": True},
        "it returned a tuple of 3. Return both, or leave",
    ),
    "aux of text": (
        {"loss": lambda x: (x**2, {"a": [x, "b"]}), "has_aux": True},
        r"aux\['a'\]\[1\], which the loss returned, is a str\. .* Leave the rest out",
    ),
    "no rate": ({"learning_rate": None}, "learning_rate=None is no rate. Pass .* leave it out"),
    "negative rate": ({"learning_rate": -0.1}, "learning_rate=-0.1 is not a finite number above 0"),
    "zero rate": ({"learning_rate": 0}, "learning_rate=0 is not a finite number above 0"),
    "nan rate": ({"learning_rate": float("nan")}, "learning_rate=nan is not a finite"),
    "infinite rate": ({"learning_rate": np.inf}, "learning_rate=inf is not a finite"),
    "vector rate": ({"learning_rate": np.ones(3)}, r"learning_rate=array\(\[1., 1., 1.\]\) is not"),
    "rate of text": ({"learning_rate": "fast"}, "learning_rate='fast' is not a finite number.* nor a schedule"),
    "rate of bool": ({"learning_rate": True}, "learning_rate=True is not a finite number"),
    "schedule of vectors": ({"learning_rate": lambda step: jnp.ones(2)}, r"the schedule returned shape \(2,\)"),
    "schedule of nothing": (
        {"learning_rate": lambda step: None},
        "the schedule returned a NoneType for a step. Return one",
    ),
    "complex schedule": ({"learning_rate": lambda step: 1j}, "schedule returned dtype complex64 .* Return one real"),
    "schedule with an if": (
        {"learning_rate": lambda step: 0.1 if step < 3 else 0.2},
        "does not work as a schedule, .*choose with jnp.where or jax.lax.cond instead of if",
    ),
    "schedule of no step": ({"learning_rate": lambda: 0.1}, "work as a schedule, which is called with the step"),
    "complex rate": ({"learning_rate": 1j}, "learning_rate=1j is not a finite number above 0"),
    "rate for a ready optimizer": ({"optimizer": optax.adam(1e-3)}, "learning_rate=0.1 was given with an optimizer"),
    "optimizer by name": ({"optimizer": "adam"}, "optimizer='adam' is unknown.*optax.adam"),
    "optimizer of a number": ({"optimizer": 0.1}, "optimizer=0.1 is unknown.*optax.adam"),
    "a class of optimizers": ({"optimizer": optax.MultiSteps}, "optimizer=<class .*MultiSteps.* is unknown"),
    "a combination of optimizers": (
        {"optimizer": optax.chain},
        r"optimizer=optax.chain takes no learning rate, .*: optimizer=optax.chain\(\.\.\.\)\.",
    ),
    "optimizer of another": ({"optimizer": optax.apply_if_finite}, "optimizer=optax.apply_if_finite takes no learning"),
    "optimizer that is used wrongly": (
        {"optimizer": lambda rate: optax.chain(rate)},
        "optimizer=<function .* does not work as an optimizer. Pass .*AttributeError: .* no attribute init",
    ),
    "optimizer that chooses its steps": (
        {"optimizer": optax.lbfgs, "learning_rate": "auto"},
        r"optimizer=optax.lbfgs needs no learning rate. Pass optimizer=optax.lbfgs\(\)\.",
    ),
    "optimizer with a rate": ({"optimizer": functools.partial(optax.adam, 0.1)}, "takes no learning rate"),
    "optimizer of nothing at all": (
        {"optimizer": lambda: optax.sgd(0.1)},
        "takes no learning rate. Pass the optimizer",
    ),
    "optimizer of a rate by name": ({"optimizer": lambda *, rate: optax.sgd(rate)}, "takes no learning rate as"),
    "optimizer of more": (
        {"optimizer": lambda rate, momentum: optax.sgd(rate, momentum)},
        "needs more than a learning rate. Pass functools.partial of it, with momentum=...",
    ),
    "optimizer of other params": (
        {"optimizer": optax.lookahead(optax.sgd(0.1), 2, 0.5), "learning_rate": "auto"},
        "does not work as an optimizer. .*check which params it takes",
    ),
    "factory of no optimizer": ({"optimizer": lambda rate: rate}, "returned a .* for a learning rate"),
    "unequal lengths": (BATCHES | {"data": (X, y[:4])}, r"data\[0\] has 6, data\[1\] has 4"),
    "no arrays in data": (BATCHES | {"data": ()}, "the same number of rows"),
    "lists in data": (BATCHES | {"data": ([1.0], y)}, r"data\[0\]\[0\] is a float, not an array"),
    "scalar in data": (BATCHES | {"data": (X, np.float32(1))}, r"data\[1\] is a scalar"),
    "text as data": (BATCHES | {"data": "digits"}, "data is a str, not an array"),
    "texts in data": (BATCHES | {"data": (X, np.array(list("abcdef")))}, r"data\[1\] is an array of dtype <U1, not of"),
    "masked data": (BATCHES | {"data": (X, MASKED)}, r"data\[1\] is a masked array"),
    "deleted data": (
        BATCHES | {"data": (DELETED, y[:3])},
        r"data\[0\] is an array of dtype float32 .* that was deleted",
    ),
    "keys of two types in data": (BATCHES | {"data": {0: X, "y": y}}, "data is a dict whose keys are of the types int"),
    "masked batch": (BATCHES | {"data": lambda: [(X, MASKED)]}, r"a batch of data\[1\] is a masked array"),
    "masked args": ({"args": (MASKED,)}, r"args\[0\] is a masked array"),
    "deleted args": ({"args": ({"x": DELETED},)}, r"args\[0\]\['x'\] is an array of .* that was deleted"),
    "keys of two types in args": (
        {"args": ({1: 1.0, "a": 2.0},)},
        r"args\[0\] is a dict whose keys are of the types int",
    ),
    "iterator and batch_size": (
        BATCHES | {"data": iter([X]), "batch_size": 2},
        "batch_size=2 was given with data that come",
    ),
    "zero rows": (BATCHES | {"data": (X[:0], y[:0])}, "data has zero rows"),
    "batch over the rows": (BATCHES | {"batch_size": 7}, "batch_size=7 is over the 6 rows"),
    "batch of zero": (BATCHES | {"batch_size": 0}, "batch_size=0 is not a whole number from 1 to 6, the rows of data"),
    "negative batch": (
        BATCHES | {"batch_size": -1},
        "batch_size=-1 is not a whole number from 1 to 6, the rows of data",
    ),
    "batch of bool": (BATCHES | {"batch_size": True}, "batch_size=True is not a whole number from 1 to 6, the rows of"),
    "fractional batch": (BATCHES | {"batch_size": 2.5}, "batch_size=2.5 is not a whole number from 1"),
    "batch without data": ({"batch_size": 2}, "batch_size=2 was given without data"),
    "epochs without data": ({"epochs": 2}, "epochs=2 was given without data"),
    "fractional epochs": (BATCHES | {"epochs": 0.5}, "epochs=0.5 is not a whole number from 1"),
    "zero epochs": (BATCHES | {"epochs": 0}, "epochs=0 is not a whole number from 1"),
    "negative epochs": (BATCHES | {"epochs": -1}, "epochs=-1 is not a whole number from 1"),
    "epochs of bool": (BATCHES | {"epochs": True}, "epochs=True is not a whole number from 1"),
    "negative steps": ({"max_steps": -1}, "max_steps=-1 is not a whole number from 1"),
    "steps of bool": ({"max_steps": True}, "max_steps=True is not a whole number from 1"),
    "zero steps": ({"max_steps": 0}, "max_steps=0 is not a whole number from 1"),
    "fractional steps": ({"max_steps": 10.5}, "max_steps=10.5 is not a whole number from 1"),
    "steps of text": ({"max_steps": "10"}, "max_steps='10' is not a whole number from 1"),
    "infinite steps": ({"max_steps": float("inf")}, "max_steps=inf is not a whole number from 1"),
    "steps past the counter": ({"max_steps": 2**31}, r"max_steps=2147483648 is not a whole number from 1 to 10\*\*9"),
    "epochs past the counter": (
        BATCHES | {"epochs": 10**9, "batch_size": 1, "max_steps": None},
        "epochs times the steps of one=6000000000 is not a whole number",
    ),
    "negative tol": ({"tol": -1e-3}, "tol=-0.001 is not a finite number, 0 or above"),
    "nan tol": ({"tol": float("nan")}, "tol=nan"),
    "tol for batches": (BATCHES | {"tol": 1e-3, "batch_size": 2}, "tol=0.001 was given for a noisy loss"),
    "tol with keys": ({"tol": 1e-3, "with_key": True}, "tol=0.001 was given for a noisy loss"),
    "nan target": ({"target": float("nan")}, "target=nan is not a finite number"),
    "key of int": ({"key": 0}, r"key=0 is not one random key. Pass one .*jax.random.key\(0\)"),
    "two keys": ({"key": jax.random.split(jax.random.key(0))}, "is not one random key"),
    "a searched rate without the best": (
        {"learning_rate": "auto", "keep_best": False},
        "keep_best=False was given with a rate that is found at each step.*Pass a learning_rate, or leave keep_best",
    ),
    "callback no function": ({"callback": 3}, "callback=3 is not a function. Pass one that is called with a gdopt.Rep"),
    "flag of text": ({"has_aux": "no"}, "has_aux='no' is not a bool. Pass True or False"),
    "another byte order": (
        {"params": {"w": np.ones(2, ">f4")}},
        r"params\['w'\] is of dtype >f4, which JAX does not support: convert it with .astype\('float32'\)",
    ),
    "a long number": (
        {"params": np.clongdouble(1)},
        r"is of dtype complex256, .* convert it with .astype\('complex128'\)",
    ),
    "records": ({"params": np.zeros(2, [("a", "f4")])}, "which JAX does not support: pass its fields as sep"),
    "another byte order in data": (BATCHES | {"data": (X, y.astype(">f4"))}, r"data\[1\] is of dtype >f4, which JAX"),
    "another byte order in a batch": (
        BATCHES | {"data": lambda: [(X, y.astype(">f4"))]},
        r"a batch of data\[1\] is of dtype >f4, which JAX does not support",
    ),
    "another byte order in args": (
        {"args": (y.astype(">f4"),)},
        r"args\[0\] is of dtype >f4, which JAX does not support",
    ),
    "another byte order in aux": (
        {"loss": lambda x: (x**2, [y.astype(">f4")]), "has_aux": True},
        r"aux\[0\] is of dtype >f4, which JAX does not support",
    ),
    "keys of two types in aux": (
        {"loss": lambda x: (x**2, {1: x, "a": x}), "has_aux": True},
        "aux is a dict whose keys",
    ),
    "keys of two types in a subclass": (
        {"params": collections.defaultdict(float, {1: 1.0, "a": 2.0})},
        "params is a dict whose keys are of the types int and str",
    ),
    "shape among params": (
        {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "b": 1.0}},
        r"params\['w'\] is a jax.ShapeDtypeStruct, not an array",
    ),
    "decimal among params": ({"params": [decimal.Decimal(1), 1.0]}, r"params\[0\] is a Decimal: pass float"),
    "integers that would wrap": (
        BATCHES | {"data": (X, np.full(6, 1_700_000_000_000))},
        r"data\[1\] holds integers up to 1700000000000, beyond the range of int32: convert it with .astype\(float\)",
    ),
    "a large integer": (
        {"args": (2**40,)},
        r"args\[0\] is an int of 41 bits, beyond the range of int32. Pass it as a float",
    ),
    "sparse data": (BATCHES | {"data": scipy.sparse.eye(6).tocsr()}, "data is a csr_matrix, not an array of numbers"),
    "batch without rows": (BATCHES | {"data": lambda: [X[:0]]}, "a batch of data has zero rows. Leave it out"),
    "batch of nothing": (BATCHES | {"data": lambda: [None] * 3}, "a batch of data is None, which holds no arrays"),
    "huge rate": (
        {"learning_rate": 1e39},
        r"learning_rate=1e\+39 is out of the range of float32. Pass a number from 1.2e-38 to 3.4e",
    ),
    "tiny rate": ({"learning_rate": 1e-300}, "learning_rate=1e-300 is out of the range of float32"),
    "optimizer for a rate": ({"learning_rate": optax.adam}, "Pass an optimizer as optimizer=."),
    "schedule of numpy": (
        {"learning_rate": lambda step: np.exp(-step)},
        "does not work as a schedule, .*compute with jax.numpy instead of numpy",
    ),
    "update of nothing": (
        {"optimizer": lambda rate: transformation(lambda p: (), lambda g, s, p: None)},
        "has an update that returned a NoneType. Return",
    ),
    "update of another shape": (
        {"optimizer": lambda rate: transformation(lambda p: (), lambda g, s, p: (jnp.ones(3), s))},
        r"returned updates with another structure or other shapes than it received: float32\[3\] instead of float32",
    ),
    "key of three words": ({"key": np.zeros(3, np.uint32)}, "is not one random key. Pass"),
    "iterator in args": (
        {"args": ({"x": iter([1.0])},)},
        r"args\[0\]\['x'\] is a list_iterator, which can be read only once, .* pass a tuple of its items",
    ),
    "iterator among params": (
        {"params": {"w": 1.0, "x": Once([1.0])}},
        r"params\['x'\] is a Once, which can be read only once, .* pass a tuple of its items",
    ),
    "generator in args": ({"args": (y * 2 for y in X)}, "args is a generator. Pass a tuple"),
    "generator among args": ({"args": ((y * 2 for y in X),)}, r"args\[0\] is a generator, which can be read only once"),
    "set of numbers in args": (
        {"args": ({1.0, 2.0},)},
        r"args\[0\] is a set, which holds numbers .* pass a tuple of its",
    ),
    "view of a dict in args": (
        {"args": ({"x": X}.values(),)},
        r"args\[0\] is a dict_values, which holds numbers but is",
    ),
    "array of objects in args": (
        {"args": (np.array([1.0, 2.0], object),)},
        r"args\[0\] is an array of dtype object, not of numbers. convert it with .astype\(float\), or pass a list",
    ),
    "table of texts in args": (
        {"args": (Table(a=y, b=np.array(list("abcdef"))),)},
        r"args\[0\] is a Table whose columns 'b' do not hold numbers. Leave them out, or",
    ),
    "table of texts in data": (
        BATCHES | {"data": (Table(a=y, b=np.array(list("abcdef")), c=y.astype(object)), y)},
        r"data\[0\] is a Table whose columns 'b', 'c' do not hold numbers. Leave them out, or convert them",
    ),
    "table among params": (
        {"params": {"w": Table(a=y)}},
        r"params\['w'\] is a test_input.Table, not an array of NumPy",
    ),
    "view of a dict as data": (
        BATCHES | {"data": {"X": X, "y": y}.values()},
        "data is a dict_values, which is neither a pytree of arrays nor a stream of batches. Pass a tuple of its items",
    ),
    "set as data": (BATCHES | {"data": {1.0, 2.0}}, "data is a set, which is neither a pytree of arrays nor a stream"),
    "stream of an argument": (
        BATCHES | {"data": lambda epoch: [(X, y)]},
        "data=<function .* is called without arguments, once for each epoch: .*'epoch'. Pass a function that needs",
    ),
    "tuple of a noisy loss": (
        {"loss": lambda x, key: (x, x), "with_key": True},
        "the loss returned a tuple of 2. Return only the value, or pass has_aux=True",
    ),
    "weak start": ({"params": jnp.asarray(1.0), "tol": -1}, "tol=-1 is not a finite number"),
    "negative rate and a scale": (
        {"scale": "curvature", "learning_rate": -1},
        "learning_rate=-1 is not a finite number",
    ),
    "ready optimizer and a scale": (
        {"scale": "curvature", "optimizer": optax.adam(1e-3)},
        "learning_rate=0.1 was given with an optimizer that owns its rate",
    ),
    "negative scale": ({"scale": -1.0}, "scale holds -1. Pass sizes from 1.2e-38"),
    "huge scale": ({"scale": 1e300}, r"scale holds 1e\+300. Pass sizes from 1.2e-38"),
    "args no tuple": ({"args": [1.0]}, r"args is a list. Pass a tuple \(for example args=\(x,\)\)"),
}


BAD_TENSORS = {
    "among params": (
        lambda torch: {"params": {"w": torch.ones(3), "b": 1.0}},
        r"params\['w'\] is a torch.Tensor, not an array of NumPy or JAX: convert it with numpy.asarray",
    ),
    "with a gradient": (
        lambda torch: BATCHES | {"data": (X, torch.ones(6, requires_grad=True))},
        r"data\[1\] is a Tensor that NumPy cannot read: .*detach",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_cannot_be_used_are_refused(change, message):
    check_refused(change(pytest.importorskip("torch")), message)


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_compiles(change, message):
    check_refused(change, message)


def check_refused(change, message):
    arguments = {"loss": square, "params": 1.0, "learning_rate": 0.1, "max_steps": 5} | change
    is_reliable()  # It compiles programs of its own, once.
    jax.clear_caches()  # Otherwise those of another test would hide what this one compiles.
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=f"(?s){message}"):
        gdopt.minimize(arguments.pop("loss"), arguments.pop("params"), **arguments)
    assert counter.names == []


def test_input_errors_are_value_errors_too():
    with pytest.raises(ValueError, match="learning_rate=-1 is not"):
        gdopt.minimize(square, 1.0, learning_rate=-1)
    assert issubclass(gdopt.InputError, gdopt.GdoptError)


def test_an_uncalled_optax_optimizer_is_a_factory():
    assert gdopt.minimize(square, 1.0, optimizer=optax.adam, learning_rate=0.1).success
    factory = functools.partial(optax.sgd, momentum=0.9)
    assert gdopt.minimize(square, 1.0, optimizer=factory, learning_rate=0.01).success


def functions_of_optax():
    for module in (optax, optax.contrib):
        for name, value in sorted(vars(module).items()):
            is_function = inspect.isfunction(value) or isinstance(value, functools.partial)
            if is_function and not name.startswith("_"):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


def takes(function, *args):
    """Return whether these arguments make an optimizer that goes down a slope."""
    slope, grad = lambda params: jnp.sum(jnp.exp(params)), jnp.ones(2)  # at W
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are deprecated
            optimizer = function(*args)
        state = optimizer.init(W)
        for _ in range(3):  # the first update of some is zero
            updates, state = apply(optimizer, grad, state, W, **extra_arguments(slope, slope(W), grad))
    except Exception:  # of many kinds: the arguments are for something else
        return False
    return bool(np.all(np.asarray(updates) < 0))


# The signature does not tell. These leave the sign to what follows in a chain; need one of two further arguments; go
# down whatever number they are given.
SPECIAL = {"scale_by_rprop", "scale_by_madgrad", "noisy_sgd", "scale_by_cocob"}


@pytest.mark.parametrize("function", list(functions_of_optax()))
def test_only_factories_of_optax_count_as_factories(function):
    """The signature of a function predicts the result of a call."""
    accepted = [not raises(check_optimizer, function, searched=searched) for searched in (False, True)]
    name = getattr(function, "__name__", "")
    if name not in SPECIAL:
        assert accepted[0] == takes(function, 0.1)
    assert accepted[1] == (accepted[0] and raises(function))  # without a rate it is no optimizer


def raises(function, *args, **options):
    try:
        function(*args, **options)
    except Exception:
        return True
    return False


class Factory:
    def __call__(self, step_size):
        return optax.sgd(step_size)

    def method(self, step_size=0.1):
        return optax.sgd(step_size)


@pytest.mark.parametrize(
    "factory",
    [
        gdopt.gd,
        lambda rate: optax.sgd(rate),
        lambda rate=None: optax.sgd(cast(Any, rate)),
        lambda *rates: optax.sgd(*rates),
        functools.partial(optax.adamw, weight_decay=1e-2),
        functools.partial(optax.contrib.schedule_free, optax.sgd(0.1)),
        jax.tree_util.Partial(optax.adam, b1=0.8),
        optax.inject_hyperparams(optax.adam),
        Factory(),
        Factory().method,
    ],
)
def test_factories_of_all_kinds_may_be_searched_for_a_rate(factory):
    check_optimizer(factory, searched=True)


def test_float64_params_without_x64_are_announced_once():
    with pytest.warns(UserWarning, match=r"params\['w'\] is float64 and is optimised in float32") as caught:
        result = gdopt.minimize(lambda p: square(p["w"]), {"w": np.ones(2)}, learning_rate=0.1)
    assert result.params["w"].dtype == jnp.float32
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_harmless_input_gets_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gdopt.minimize(lambda w, data: line(w, data), W, args=((X.astype(np.float64), y),), learning_rate=0.1)
        gdopt.minimize(square, 1.0, learning_rate=np.float64(0.1))


# What works


class Foreign:
    """An array of another library."""

    def __init__(self, array: Any):
        self._array = np.asarray(array)
        self.dtype, self.shape = self._array.dtype, self._array.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array


def make_torch_tensor(array: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(np.array(array))


FOREIGN = [Foreign, make_torch_tensor, lambda array: Table(**{f"c{k}": array[:, k] for k in range(array.shape[1])})]


@pytest.mark.parametrize("foreign", FOREIGN, ids=["array", "torch", "table"])
def test_arrays_of_other_libraries_are_taken_as_numbers(foreign):
    table = np.arange(12, dtype=np.float32).reshape(6, 2) / 6
    run = functools.partial(gdopt.minimize, learning_rate=0.05, max_steps=9)
    of_args = lambda w, table: line(w, (table, y)) + square(table * w[None])
    of_data = lambda w, batch: of_args(w, batch["table"])
    expected = run(of_args, W, args=(table,))
    assert run(of_args, W, args=(foreign(table),)) == expected
    assert run(of_data, W, data={"table": foreign(table)}) == expected
    streamed = run(of_data, W, data=lambda: [{"table": foreign(table)}] * 9)
    np.testing.assert_allclose(streamed.params, expected.params, rtol=1e-3)
    new, _ = gdopt.gd_step(of_args, W, 0.05, foreign(table))
    np.testing.assert_allclose(new, W - 0.05 * np.asarray(jax.grad(of_args)(jnp.asarray(W), table)), rtol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Walk:
    """A pytree that is an iterator, too."""

    step: Any

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> Any:
        return self.step


class Kind(enum.Enum):
    SQUARE = 2


STATIC = {
    "function": (jnp.square, lambda w, f: jnp.sum(f(w - 1))),
    "text": ("square", lambda w, name: jnp.sum(getattr(jnp, name)(w - 1))),
    "texts": (np.array(["square"]), lambda w, names: jnp.sum(getattr(jnp, names[0])(w - 1))),
    "None": (None, lambda w, none: square(w - 1) if none is None else w[0]),
    "module": (math, lambda w, module: square(w - module.cos(0.0))),
    "enum": (Kind.SQUARE, lambda w, kind: jnp.sum((w - 1) ** kind.value)),
    "class": (Foreign, lambda w, kind: square(w - 1) if kind is Foreign else w[0]),
    "range": (range(2), lambda w, places: sum(jnp.square(w[k] - 1) for k in places)),
    "set of texts": ({"square"}, lambda w, names: square(w - 1) if "square" in names else w[0]),
    "set of integers": ({0, 1}, lambda w, places: sum(jnp.square(w[k] - 1) for k in places)),
    "keys": ({"square": 1.0}.keys(), lambda w, names: square(w - 1) if "square" in names else w[0]),
    "decimal": (decimal.Decimal(1), lambda w, one: square(w - float(one))),
    "list of functions": ([jnp.square], lambda w, functions: jnp.sum(functions[0](w - 1))),
    "a pytree that is an iterator": (Walk(1.0), lambda w, walk: square(w - next(walk))),
    "bool": (True, lambda w, one: square(w - one)),
    "int": (1, lambda w, one: square(w - one)),
}


@pytest.mark.parametrize(("value", "loss"), STATIC.values(), ids=STATIC.keys())
def test_args_that_are_no_arrays_reach_the_loss_as_they_are(value, loss):
    expected = gdopt.minimize(lambda w: square(w - 1), W, learning_rate=0.25, max_steps=4)
    result = gdopt.minimize(loss, W, args=(value,), learning_rate=0.25, max_steps=4)
    np.testing.assert_allclose(result.params, expected.params, rtol=1e-6)
    new, _ = gdopt.gd_step(loss, W, 0.25, value)
    np.testing.assert_allclose(new, [0.5, 0.5], rtol=1e-6)


BAD_STEPS = {
    "nan": ((square, np.array([0.0, np.nan], np.float32), 0.1), r"params starts with nan at index \(1,\)"),
    "infinity on the device": ((square, {"w": jnp.array([jnp.inf])}, 0.1), r"params\['w'\] starts with inf"),
    "generator": ((square, W, 0.1, (x for x in y)), r"args\[0\] is a generator"),
    "integers that would wrap": (
        (square, W, 0.1, 2, np.array([2**40])),
        r"args\[1\] holds integers up to 1099511627776",
    ),
    "masked array": ((square, W, 0.1, {"y": MASKED}), r"args\[0\]\['y'\] is a masked array"),
    "integer params": ((square, 3, 0.1), "params is of dtype int32"),
    "negative rate": ((square, W, -0.1), "learning_rate=-0.1 is not"),
    "vector loss": ((lambda w: w, W, 0.1), r"the loss returned shape \(2,\)"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_a_step_with_bad_input_is_refused_before_anything_compiles(arguments, message):
    is_reliable()
    jax.clear_caches()
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=message):
        gdopt.gd_step(*arguments)
    assert counter.names == []


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_the_default_key_is_the_key_of_zero(implementation):
    noisy = lambda w, key: square(w - jax.random.normal(key, w.shape))
    run = functools.partial(gdopt.minimize, noisy, W, with_key=True, learning_rate=0.1, max_steps=3)
    with jax.default_prng_impl(implementation):
        assert run() == run(key=jax.random.key(0))


def test_a_traced_step_may_have_nan_params():
    new, _ = jax.jit(lambda w: gdopt.gd_step(square, w, 0.1))(jnp.array([jnp.nan, 1.0]))
    np.testing.assert_array_equal(np.isnan(new), [True, False])


def test_leaves_of_all_kinds_are_accepted():
    array = jnp.ones(2)
    params = {"both": [array, array], "none": None, "function": jnp.tanh, "text": "text", "number": 1.0}
    params["empty"] = np.zeros((0, 3), np.float32)
    loss = lambda p: square(p["both"][0]) + 2 * square(p["both"][1]) + square(p["number"]) + square(p["empty"])
    result = gdopt.minimize(loss, params, learning_rate=0.1, max_steps=1)
    np.testing.assert_allclose(result.params["both"], [[0.8, 0.8], [0.6, 0.6]], rtol=1e-6)  # two leaves go two ways
    assert float(result.params["number"]) == pytest.approx(0.8)
    assert result.params["empty"].shape == (0, 3)
    assert [result.params[name] for name in ("none", "function", "text")] == [None, jnp.tanh, "text"]
    assert not array.is_deleted()


@pytest.mark.parametrize("optimizer", [optax.lbfgs, optax.polyak_sgd, optax.MultiSteps(optax.sgd(0.1), 2)])
def test_optimizers_of_all_kinds_are_accepted(optimizer):
    given: dict[str, Any] = {} if isinstance(optimizer, optax.MultiSteps) else {"learning_rate": 0.5}
    result = gdopt.minimize(square, 1.0, optimizer=cast(Any, optimizer), max_steps=8, **given)
    assert result.loss < 0.5


def test_the_message_names_a_negative_rate():
    message = gdopt.minimize(square, 1.0, learning_rate=lambda step: -0.1, max_steps=3).message
    assert message.endswith("The schedule gave a negative rate, -0.1. With a rate above 0 the loss can fall.")


# Errors of the caller's own functions


def branch(x):
    if x > 0:  # here
        return x
    return -x


WRONG = {
    "if": (branch, jax.errors.TracerBoolConversionError, "jnp.where or jax.lax.cond instead of if"),
    "if in a jit": (jax.jit(branch), jax.errors.TracerBoolConversionError, "jnp.where or jax.lax.cond"),
    "float": (lambda x: jnp.sin(float(x)), jax.errors.ConcretizationTypeError, r"leave out float\(\)"),
    "math": (lambda x: math.sin(x), jax.errors.ConcretizationTypeError, "use jnp.sin instead of math.sin"),
    "numpy": (
        lambda x: np.asarray(x),
        jax.errors.TracerArrayConversionError,
        "compute with jax.numpy instead of numpy",
    ),
    "list": (lambda x: [1.0, 2.0][x.astype(int)], jax.errors.TracerIntegerConversionError, r"jnp.asarray\(...\)"),
    "mask": (lambda x: jnp.ones(3)[x > 0].sum(), jax.errors.NonConcreteBooleanIndexError, "use jnp.where"),
}


@pytest.mark.parametrize("call", [gdopt.minimize, gdopt.lr_find, lambda loss, x: gdopt.gd_step(loss, x, 0.1)])
@pytest.mark.parametrize(("loss", "kind", "hint"), WRONG.values(), ids=WRONG.keys())
def test_tracing_errors_of_jax_get_the_line_and_a_hint(call, loss, kind, hint):
    with pytest.raises(kind, match=hint) as caught:  # pytest matches the notes, too
        call(loss, 1.0)
    (note,) = [note for note in caught.value.__notes__ if note.startswith("gdopt")]
    first, _, last = note.splitlines()
    line = inspect.unwrap(loss).__code__.co_firstlineno + (inspect.unwrap(loss) is branch)
    assert first.startswith(f"gdopt: raised at {__file__}, line {line}, in {inspect.unwrap(loss).__name__}: ")
    assert first.endswith("# here") is (inspect.unwrap(loss) is branch)
    assert last == "The loss was called with (float32[])."


def test_exceptions_from_the_loss_propagate_unchanged():
    error = KeyError("mine")

    def broken(params, batch, scale, key):
        raise error

    with pytest.raises(KeyError) as caught:
        gdopt.minimize(broken, {"w": W, "name": "n"}, data=(X, y), args=(2.0,), with_key=True, max_steps=3)
    assert caught.value is error
    assert error.args == ("mine",)
    where, what = error.__notes__[0].splitlines()
    assert where.endswith("in broken: raise error")
    assert what == (
        "The loss was called with ({'name': 'n', 'w': float32[2]}, (float32[6, 2], float32[6]), float32[], "
        "key=key<fry>[])."
    )


@pytest.mark.parametrize("loss", [lambda x, scale: x * scale, functools.partial(lambda scale, x, y: x, 2.0)])
def test_a_loss_with_other_arguments_is_named(loss):
    with pytest.raises(
        TypeError, match=rf"raised at the call of <lambda> of {__file__}, line \d+\n.*with \(float32\[\]\)"
    ):
        gdopt.minimize(loss, 1.0)


def test_what_a_loss_is_called_with_is_told_if_it_takes_other_arguments():
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "x and y": (lambda w, x, y: jnp.sum(w), {"data": (X, y)}),
        "no state passed": (lambda w, batch, state: (jnp.sum(w), state), {"data": (X, y)}),
        "no state taken": (lambda w, batch: jnp.sum(w), {"data": (X, y), "state": 1.0}),
    }
    for loss, options in calls.values():
        with pytest.raises(
            TypeError, match=r"A batch is one argument: write x, y = batch in the loss\. .* and state= "
        ):
            gdopt.minimize(loss, W, batch_size=2, learning_rate=0.1, max_steps=1, **options)

    def wrong(w, batch):
        raise TypeError("of its own")

    with pytest.raises(TypeError) as caught:
        gdopt.minimize(wrong, W, data=(X, y), batch_size=2, learning_rate=0.1, max_steps=1)
    assert not any("A batch is one argument" in note for note in caught.value.__notes__)


def test_a_result_in_place_of_one_of_its_fields_is_refused(tmp_path):
    result = gdopt.minimize(square, 1.0, max_steps=1, checkpoint=tmp_path / "run")
    calls = {
        "params": lambda: gdopt.minimize(square, result),
        "optimizer_state": lambda: gdopt.minimize(square, 1.0, optimizer_state=result),
        "state": lambda: gdopt.minimize(lambda x, *, state: (x**2, state), 1.0, state=result, max_steps=1),
    }
    for name, call in calls.items():
        with pytest.raises(gdopt.InputError, match=rf"{name} is a gdopt.Result. .*: {name}=result.{name}\."):
            call()
    for call in (lambda: gdopt.lr_find(square, result), lambda: gdopt.gd_step(square, result, 0.1)):
        with pytest.raises(gdopt.InputError, match=r"params is a gdopt\.Result"):
            call()
    with pytest.raises(gdopt.InputError, match=r"like is a gdopt.Result. .*: like=result.params\."):
        gdopt.load(tmp_path / "run", like=result)


def test_a_long_argument_is_cut_and_a_broken_repr_does_no_harm():
    class Odd:
        def __repr__(self):
            raise ValueError

    for params, shown in (
        ({f"w{k}": 1.0 for k in range(99)}, r"'w11': flo.*\.\.\.\)\."),
        ([1.0, Odd()], r"with \(<list>\)"),
    ):
        with pytest.raises(ZeroDivisionError, match=shown):
            gdopt.minimize(lambda params: 1 / 0, params)


@pytest.mark.parametrize("name", ["learning_rate", "optimizer"])
def test_exceptions_from_a_schedule_or_a_factory_propagate_unchanged(name):
    def broken(_):
        raise OSError("mine")

    with pytest.raises(OSError, match=rf"(?s)mine.*gdopt: raised by {name}=<function .*broken"):
        gdopt.minimize(square, 1.0, **{"learning_rate": 0.1, name: broken})


# Callbacks


@pytest.mark.parametrize("data", [None, (X, y), lambda: [(X, y)] * 9], ids=["one batch", "batches", "a stream"])
@pytest.mark.parametrize("keep_best", [True, False])
def test_exceptions_from_a_callback_carry_the_result_so_far(data, keep_best):
    error = OSError("the disk is full")

    def callback(report):
        if report.step >= 6:
            raise error

    loss = line if data else lambda w: line(w, (X, y))
    more = {"batch_size": 2} if isinstance(data, tuple) else {}
    options = {"learning_rate": 0.01, "max_steps": 10**6, "keep_best": keep_best, **more}
    with pytest.raises(OSError, match=r"(?s)full.*gdopt: raised by callback=<.* this error's .result") as caught:
        gdopt.minimize(loss, W, data=data, callback=callback, throw=True, **options)
    assert caught.value is error
    result = cast(Any, caught.value).result
    assert (result.status, result.success) == (Status.STOPPED, False)
    assert len(result.history.loss) == result.steps + 1 >= 7
    assert result.loss < result.history.loss[0]
    assert result.loss == pytest.approx(float(line(result.params, (X, y))), rel=1e-4)


def test_an_exception_from_the_last_callback_carries_the_final_status():
    last = gdopt.minimize(square, 1.0, learning_rate=0.4).steps

    def callback(report):
        if report.step == last:
            raise OSError

    with pytest.raises(OSError, match="gdopt") as caught:
        gdopt.minimize(square, 1.0, learning_rate=0.4, callback=callback)
    assert cast(Any, caught.value).result.status is Status.CONVERGED


def test_an_exception_keeps_the_result_that_it_has():
    inner = []

    def callback(report):
        try:
            gdopt.minimize(square, 1.0, learning_rate=1e-9, max_steps=1, throw=True)
        except gdopt.NotConvergedError as error:
            inner.append(error.result)
            raise

    with pytest.raises(
        gdopt.NotConvergedError, match=r"(?s)gdopt: raised by callback=.* after \d+ steps?\.$"
    ) as caught:
        gdopt.minimize(square, 1.0, learning_rate=0.1, callback=callback)
    assert caught.value.result is inner[0]


@pytest.mark.parametrize("answer", ["go on", np.ones(3), 17, 0, {}])
def test_invalid_return_values_of_a_callback(answer):
    with pytest.raises(gdopt.InputError, match=r"callback returned .* Return True to stop the run, and None") as caught:
        gdopt.minimize(square, 1.0, learning_rate=0.1, callback=lambda report: answer)
    assert cast(Any, caught.value).result.steps > 0


@pytest.mark.parametrize("stop", [True, np.True_, jnp.asarray(True)])
def test_return_values_of_a_callback(stop):
    run = functools.partial(gdopt.minimize, square, 1.0, learning_rate=1e-4, tol=0)
    assert run(callback=lambda report: stop, max_steps=10**6).status is Status.STOPPED
    assert run(callback=lambda report: ~np.asarray(stop), max_steps=100).steps == 100


# Memory


def test_out_of_memory_errors_list_the_sizes():
    def large(w, batch):
        rows = jnp.sin(jnp.arange(2.0**20)[:, None] * w[0])
        return jnp.sum(jnp.cumsum(jnp.broadcast_to(rows, (2**20, 2**24)), axis=1) ** 2) + line(w, batch)

    sizes = r"params 8 bytes, .*data 72 bytes, args 0 bytes; the rest is .*Try a smaller batch_size.*gdopt.shard"
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"(?s)RESOURCE_EXHAUSTED.*gdopt: out of memory.*{sizes}"):
        gdopt.minimize(large, W, data=(X, y), learning_rate=0.1, max_steps=2)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"(?s)RESOURCE_EXHAUSTED.*{sizes}"):
        gdopt.lr_find(large, W, data=(X, y), num_steps=20)


# Warnings


IGNORES = {
    "a number": lambda w: 3.0,
    "an array": lambda w: jnp.float32(3),
    "stop_gradient": lambda w: square(jax.lax.stop_gradient(w)),
    "argmax": lambda w: jnp.mean(jnp.argmax(X * w[None], axis=1) != 1),
    "round": jax.jit(lambda w: jnp.sum(jnp.round(w))),
}


@pytest.mark.parametrize("loss", IGNORES.values(), ids=IGNORES.keys())
def test_a_loss_that_ignores_its_params_gets_a_warning(loss):
    with pytest.warns(UserWarning, match="exactly zero everywhere, and nothing was optimised") as caught:
        result = gdopt.minimize(loss, W, learning_rate=0.1)
    assert [warning.filename for warning in caught] == [__file__]
    flat = loss not in (IGNORES["argmax"], IGNORES["round"])  # a neighbour of the start is lower
    assert result.message.startswith("converged after 0 steps: the gradient is" if flat else "stalled after 0 steps: ")


def test_a_mini_batch_loss_that_ignores_its_params_gets_a_warning():
    with pytest.warns(UserWarning, match="gradient is exactly zero everywhere"):
        gdopt.minimize(lambda w, batch: jnp.mean(batch[1]), W, data=(X, y), batch_size=2, epochs=1, learning_rate=0.1)


def test_a_start_at_a_minimum_or_a_saddle_gets_no_warning():
    for loss in (square, lambda w: w[0] * w[1], lambda w: jnp.sum(jax.nn.relu(w - 1))):
        assert gdopt.minimize(loss, W, learning_rate=0.1).steps == 0


OLD, normal = np.random.RandomState(0), np.random.default_rng(4).normal
GENERATOR, PYTHON = np.random.default_rng(0), random.Random(0)


def drawn():
    return GENERATOR.normal()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    w: Any
    held: Any


@pytest.mark.parametrize("held", [2**40, decimal.Decimal("1.5"), jax.ShapeDtypeStruct((2,), jnp.float32)], ids=repr)
def test_held_leaves_may_be_anything(held):
    assert gdopt.minimize(lambda m: square(m.w - 1), Module(W, held), learning_rate=0.25).success
    mask = {"w": True, "held": False}
    result = gdopt.minimize(lambda m: square(m["w"] - 1), {"w": W, "held": held}, trainable=mask, learning_rate=0.25)
    assert result.params["held"] is held


def test_objects_whose_attributes_raise_are_harmless():
    class Late:
        scale = 2.0

        def __getattr__(self, name):
            raise ImportError(name)

    late = Late()
    assert gdopt.minimize(lambda w: late.scale * square(w - 1), W, learning_rate=0.1).success


def test_updates_may_be_a_list_and_broadcast():
    mean = transformation(lambda p: (), lambda g, s, p: [-0.1 * jnp.mean(g), s])
    assert gdopt.minimize(lambda w: square(w - 1), W, optimizer=mean).success


class Noisy:
    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, w):
        return square(w - self.generator.normal())


def generators():
    inner = np.random.default_rng(1)
    return {
        "numpy.random": lambda w: square(w - np.random.normal(size=2).astype(np.float32)),
        "random": lambda w: square(w - random.random()),
        "GENERATOR": lambda w: square(w - GENERATOR.normal(size=2).astype(np.float32)),
        "PYTHON": functools.partial(lambda scale, w: square(w - scale * PYTHON.random()), 2.0),
        "gauss": lambda w: square(w - gauss(0, 1)),
        "self.generator": Noisy(),
        "OLD": lambda w: square(w - OLD.normal()),
        "normal": lambda w: square(w - normal()),
        "functools.partial": functools.partial(lambda own, w: square(w - own.normal()), np.random.default_rng(2)),
        "own": lambda w, own=GENERATOR: square(w - own.normal()),
        "GENERATOR.*": lambda w: square(w - drawn()),
        "inner": lambda w: square(w - inner.random()),
        "numpy.random and random": lambda w: square(w - np.random.random() - random.random()),
    }


@pytest.mark.parametrize("name", generators())
def test_random_numbers_that_are_drawn_once_get_a_warning(name):
    with pytest.warns(UserWarning, match=f"the loss draws from {name} only once, during tracing") as caught:
        gdopt.minimize(generators()[name], W, learning_rate=0.1, max_steps=2)
    assert [warning.filename for warning in caught] == [__file__]


@contextlib.contextmanager
def another_thread(work):
    """Call a function over and over in another thread."""
    ends = threading.Event()

    def go_on():
        while not ends.is_set():
            work()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def draw_now_and_then():
    np.random.random()
    time.sleep(0.02)


@pytest.mark.parametrize("draw", [np.random.random, draw_now_and_then], ids=["always", "now and then"])
def test_random_numbers_that_another_thread_draws_get_no_warning(draw):
    def loss(w):
        time.sleep(0.03)  # while it is traced
        return square(w)

    with another_thread(draw):
        gdopt.minimize(loss, W, learning_rate=0.1, max_steps=2)


@pytest.mark.parametrize("name", ["numpy.random", "random", "inner"])
def test_random_numbers_get_a_warning_beside_another_thread(name):
    with another_thread(lambda: time.sleep(0.001)), pytest.warns(UserWarning, match=f"draws from {name} only once"):
        gdopt.minimize(generators()[name], W, learning_rate=0.1, max_steps=2)


COLUMN = X[:, :1]
ALL_PAIRS = {
    "mean of squares": lambda w: jnp.mean((X @ w[:, None] - y) ** 2),
    "the other way round": lambda w: jnp.mean((y - X @ w[:, None]) ** 2),
    "sum of squares": lambda w: jnp.sum(jnp.square(X @ w[:, None] - y)),
    "in a jit": jax.jit(lambda w: jnp.mean((X @ w[:, None] - y) ** 2)),
    "of a column in the data": lambda w: jnp.mean((X @ w - COLUMN) ** 2),
    "halved": lambda w: jnp.mean(0.5 * (X @ w[:, None] - y) ** 2),
    "as a product": lambda w: (lambda r: jnp.sum(r * r))(X @ w[:, None] - y),
}
NOT_ALL_PAIRS = {
    "columns": lambda w: jnp.mean((X @ w[:, None] - y[:, None]) ** 2),
    "vectors": lambda w: jnp.mean((X @ w - y) ** 2),
    "distances on purpose": lambda w: jnp.sum((lambda x: (x[:, None] - x[None, :]) ** 2)(X @ w)),
    "distances, half on purpose": lambda w: jnp.sum((lambda x: (x[:, None] - x) ** 2)(X @ w)),
    "to others on purpose": lambda w: jnp.sum(((X @ w)[:, None] - y[None, :]) ** 2),
    "of a column and itself": lambda w: (lambda x: jnp.sum((x - x.ravel()) ** 2) + jnp.sum((x - x[:, 0]) ** 2))(
        X @ w[:, None]
    ),
    "a kernel": lambda w: jnp.sum(jnp.exp(-((X @ w[:, None] - y) ** 2))),
    "an energy distance": lambda w: jnp.mean(jnp.abs(X @ w[:, None] - y)),
    "the Gram matrix": lambda w: jnp.sum((X @ jnp.diag(w) @ X.T - 1) ** 2),
    "attention": lambda w: jnp.sum((jax.nn.softmax(X * w[None] @ X.T, axis=1) @ X) ** 2),
    "double centering": lambda w: jnp.sum(
        (lambda a: (a.mean(axis=1, keepdims=True) - a.mean(axis=0)) ** 2)(X @ jnp.diag(w) @ X.T)
    ),
    "one row": lambda w: jnp.sum((X[:1] @ w[:, None] - y[:1]) ** 2),
}


@pytest.mark.parametrize("loss", ALL_PAIRS.values(), ids=ALL_PAIRS.keys())
def test_unintended_broadcasting_to_all_pairs_gets_a_warning(loss):
    with jax.numpy_rank_promotion("allow"), pytest.warns(UserWarning, match=r"shapes \(6, 1\) and \(6,\).*36|6 \* 6"):
        gdopt.minimize(loss, W, learning_rate=0.01, max_steps=1)


@pytest.mark.parametrize("loss", NOT_ALL_PAIRS.values(), ids=NOT_ALL_PAIRS.keys())
def test_intended_broadcasting_to_all_pairs_gets_no_warning(loss):
    with jax.numpy_rank_promotion("allow"):
        gdopt.minimize(loss, np.ones(2, np.float32), learning_rate=0.001, max_steps=1)


def test_the_text_of_a_program_in_an_error_is_no_matter_of_meshes() -> None:
    """JAX shows the operation that traced the value, and some have a parameter ``out_sharding``."""
    inner = jax.jit(lambda x: jnp.sum(x**2))
    with pytest.raises(jax.errors.TracerArrayConversionError, match="out_sharding") as caught:
        jax.jit(lambda: np.asarray(inner(np.ones(2, np.float32))))()
    assert _jax.misplaced(caught.value) == ""
