"""Bad input gets an error that names it and says what to do, before anything compiles."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations

import gdopt

X = np.ones((6, 2), np.float32)
y = np.ones(6, np.float32)


def square(x, *_):
    return jnp.sum(jnp.asarray(x) ** 2)


def line(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


W = np.zeros(2, np.float32)
BATCHES = {"params": W, "loss": line, "data": (X, y)}

BAD = {
    "loss no function": ({"loss": 3}, "loss=3 is not a function"),
    "integer leaf": (
        {"params": {"layer": [1.0, np.arange(3)]}},
        r"params\['layer'\]\[1\] is of dtype int32.*trainable",
    ),
    "python int": ({"params": 3}, "params is of dtype int32"),
    "bool leaf": ({"params": {"on": np.array(True)}}, r"params\['on'\] is of dtype bool"),
    "no leaves": ({"params": {}}, "params={} has no entries"),
    "zero-size leaf": ({"params": np.zeros((0, 3), np.float32)}, "no entries to optimise"),
    "all left out": ({"trainable": False}, "trainable= does not leave out"),
    "mask of another shape": ({"params": {"a": 1.0}, "trainable": {"b": True}}, "trainable=.* does not fit params"),
    "mask of numbers": ({"trainable": 1}, "trainable has 1 where True or False"),
    "nan start": (
        {"params": {"w": np.array([0, np.nan], np.float32)}},
        r"params\['w'\] starts with nan at index \(1,\)",
    ),
    "infinite start": ({"params": np.inf}, "params starts with inf"),
    "vector loss": ({"loss": lambda x: x * jnp.ones(3)}, r"the loss returned shape \(3,\)"),
    "one-entry loss": ({"loss": lambda x: x * jnp.ones(1)}, r"the loss returned shape \(1,\)"),
    "integer loss": ({"loss": lambda x: 3}, "the loss returned dtype int32"),
    "complex loss": ({"loss": lambda x: x * 1j}, "the loss returned dtype complex64"),
    "loss without a value": ({"loss": lambda x: None}, "the loss returned a NoneType"),
    "tuple without has_aux": ({"loss": lambda x: (x, x)}, "returned a tuple of 2.*has_aux=True"),
    "has_aux without a tuple": ({"has_aux": True}, r"has_aux=True needs a loss that returns \(value, aux\)"),
    "no rate": ({"learning_rate": None}, "learning_rate=None: leave it out"),
    "negative rate": ({"learning_rate": -0.1}, "learning_rate=-0.1 is not a finite number above 0"),
    "zero rate": ({"learning_rate": 0}, "learning_rate=0 is not a finite number above 0"),
    "nan rate": ({"learning_rate": float("nan")}, "learning_rate=nan is not a finite"),
    "infinite rate": ({"learning_rate": np.inf}, "learning_rate=inf is not a finite"),
    "vector rate": ({"learning_rate": np.ones(3)}, r"learning_rate=array\(\[1., 1., 1.\]\) is not"),
    "rate of text": ({"learning_rate": "fast"}, "learning_rate='fast' is not a finite number.* nor a schedule"),
    "rate of bool": ({"learning_rate": True}, "learning_rate=True is not a finite number"),
    "schedule of vectors": ({"learning_rate": lambda step: jnp.ones(2)}, r"the schedule gave shape \(2,\)"),
    "rate for a ready optimizer": ({"optimizer": optax.adam(1e-3)}, "learning_rate=0.1 was given with an optimizer"),
    "optimizer by name": ({"optimizer": "adam"}, "optimizer='adam' is unknown.*optax.adam"),
    "optimizer of nothing": ({"optimizer": None}, "optimizer=None is unknown"),
    "factory of no optimizer": ({"optimizer": lambda rate: rate}, "returned a .* for a learning rate"),
    "unequal lengths": (BATCHES | {"data": (X, y[:4])}, r"data\[0\] has 6, data\[1\] has 4"),
    "no arrays in data": (BATCHES | {"data": ()}, "one number of rows"),
    "lists in data": (BATCHES | {"data": ([1.0], y)}, r"data\[0\]\[0\] is a float, not an array"),
    "scalar in data": (BATCHES | {"data": (X, np.float32(1))}, r"data\[1\] is a scalar"),
    "iterator and batch_size": (
        BATCHES | {"data": iter([X]), "batch_size": 2},
        "batch_size=2 was given with data that come",
    ),
    "zero rows": (BATCHES | {"data": (X[:0], y[:0])}, "data has zero rows"),
    "batch over the rows": (BATCHES | {"batch_size": 7}, "batch_size=7 is over the 6 rows"),
    "batch of zero": (BATCHES | {"batch_size": 0}, "batch_size=0 is not a whole number from 1"),
    "fractional batch": (BATCHES | {"batch_size": 2.5}, "batch_size=2.5 is not a whole number from 1"),
    "batch without data": ({"batch_size": 2}, "batch_size=2 was given without data"),
    "epochs without data": ({"epochs": 2}, "epochs=2 was given without data"),
    "fractional epochs": (BATCHES | {"epochs": 0.5}, "epochs=0.5 is not a whole number from 1"),
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
    "key of int": ({"key": 0}, r"key=0 is not one random key: pass jax.random.key\(0\)"),
    "two keys": ({"key": jax.random.split(jax.random.key(0))}, "is not one random key"),
    "a searched rate without the best": (
        {"learning_rate": "auto", "keep_best": False},
        "keep_best=False was given with a rate that is found at each step.*Pass a learning_rate, or leave keep_best",
    ),
    "args no tuple": ({"args": [1.0]}, r"args is a list: pass a tuple, such as args=\(x,\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_compiles(change, message):
    arguments = {"loss": square, "params": 1.0, "learning_rate": 0.1, "max_steps": 5} | change
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=f"(?s){message}"):
        gdopt.minimize(arguments.pop("loss"), arguments.pop("params"), **arguments)
    assert "jit(run)" not in counter.names  # what program.py compiles is called so


def test_input_errors_are_value_errors_too():
    with pytest.raises(ValueError, match="learning_rate=-1 is not"):
        gdopt.minimize(square, 1.0, learning_rate=-1)
    assert issubclass(gdopt.InputError, gdopt.GdoptError)


def test_an_uncalled_optax_optimizer_is_a_factory():
    assert gdopt.minimize(square, 1.0, optimizer=optax.adam, learning_rate=0.1).success
    factory = functools.partial(optax.sgd, momentum=0.9)
    assert gdopt.minimize(square, 1.0, optimizer=factory, learning_rate=0.01).success


def test_float64_params_without_x64_are_announced_once():
    with pytest.warns(UserWarning, match=r"params\['w'\] is float64 and is optimised in float32") as caught:
        result = gdopt.minimize(lambda p: square(p["w"]), {"w": np.ones(2)}, learning_rate=0.1)
    assert result.params["w"].dtype == jnp.float32
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_silent_about_what_is_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gdopt.minimize(lambda w, data: line(w, data), W, args=((X.astype(np.float64), y),), learning_rate=0.1)
        gdopt.minimize(square, 1.0, learning_rate=np.float64(0.1))
