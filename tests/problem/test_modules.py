"""Modules and other containers as params: equinox, Flax's linen and nnx, dataclasses, leaves of all sorts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import count_compilations, some_of

import gdopt

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5]], np.float32)
DATA: dict[str, Any] = {"args": (X, Y), "learning_rate": 0.1, "max_steps": 8}


def error(prediction: Any, y: Any) -> jax.Array:
    return jnp.mean((prediction - y) ** 2)


class Network(nnx.Module):
    """A module with everything that is not a parameter: batch statistics, random keys and their counts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, momentum=0.0, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rngs = self.same_rngs = rngs  # in two places, as random streams often are

    def __call__(self, x: Any, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.layers[1](self.dropout(nnx.tanh(self.norm(self.layers[0](x))), rngs=rngs))


def network(*, train: bool = False) -> Network:
    model = Network(nnx.Rngs(0))
    return model if train else nnx.view(model, deterministic=True, use_running_average=True)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> jax.Array:
        hidden = nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return nn.Dense(1)(hidden)


class Dropped(eqx.Module):
    """A module with a function, a string, None and numbers beside its arrays."""

    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: Callable
    name: str
    nothing: None
    units: str = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.dropout(self.linear(x), inference=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Line:
    slope: Any
    offset: Any
    name: str = dataclasses.field(metadata={"static": True}, default="line")


class Point(NamedTuple):
    x: Any
    y: Any


def predict(model: Any, x: Any, y: Any) -> jax.Array:
    return error(model(x), y)


def predict_each(model: Any, x: Any, y: Any) -> jax.Array:
    return error(jax.vmap(model)(x), y)


def linear(key: int = 0) -> eqx.nn.Linear:
    return eqx.nn.Linear(3, 1, key=jax.random.key(key))


@functools.cache
def linen() -> Any:
    return jax.jit(LinenNetwork().init)(jax.random.key(0), X)


def predict_linen(params: Any, x: Any, y: Any) -> jax.Array:
    return error(LinenNetwork().apply(params, x), y)


def nested() -> Any:
    return {
        "point": Point(np.zeros((3, 1), np.float32), [None, (jnp.zeros((1, 1)), "name")]),
        "function": jax.nn.relu,
        "key": jax.random.key(3),
        "text": np.str_("text"),
        "module": eqx.nn.PReLU(0.5),
    }


def predict_nested(params: Any, x: Any, y: Any) -> jax.Array:
    (weight, (nothing, (offset, name))), slope = params["point"], params["module"].negative_slope
    assert (nothing, name, params["text"]) == (None, "name", "text")
    noise = 1e-3 * jax.random.normal(params["key"], (12, 1))
    return error(x @ weight + offset + noise, y) + params["function"](slope) ** 2


KINDS: dict[str, tuple[Callable[[], Any], Callable]] = {
    "equinox MLP": (lambda: eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0)), predict_each),
    "equinox module": (
        lambda: Dropped(linear(), eqx.nn.Dropout(0.3), jax.nn.softplus, "dropped", None, "m"),
        predict_each,
    ),
    "linen": (linen, predict_linen),
    "linen, frozen": (lambda: nn.FrozenDict(linen()), predict_linen),
    "nnx": (network, predict),
    "dataclass": (
        lambda: {"line": Line(jnp.zeros((3, 1)), np.zeros((1, 1), np.float32))},
        lambda params, x, y: error(x @ params["line"].slope + params["line"].offset, y),
    ),
    "nested": (nested, predict_nested),
}


# Each compiles for a second; tests of their own, further down, train the two that are slow here.
@pytest.mark.parametrize("name", some_of(KINDS, KINDS.keys() - {"equinox MLP", "linen"}))
def test_the_same_kind_of_params_is_returned(name):
    make, loss = KINDS[name]
    params = make()
    before, treedef = jax.tree.flatten(params)
    values = [np.array(leaf) if eqx.is_inexact_array_like(leaf) else leaf for leaf in before]
    result = gdopt.minimize(loss, params, **DATA)
    assert result.steps == 8
    assert result.loss < 0.95 * result.history.loss[0]
    again = gdopt.minimize(loss, result.params, **DATA)  # what came out goes in
    assert again.history.loss[0] == pytest.approx(result.loss, rel=1e-5)

    assert type(result.params) is type(params)
    after, new_treedef = jax.tree.flatten(result.params)
    assert new_treedef == treedef
    for old, new in zip(before, after, strict=True):
        if eqx.is_inexact_array(old):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
            assert new is old or isinstance(new, jax.Array)
        else:
            assert new is old

    untouched, same_treedef = jax.tree.flatten(params)
    assert same_treedef == treedef
    for old, same, value in zip(before, untouched, values, strict=True):
        assert same is old
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(same, value)


# equinox


def test_equinox_equals_the_hand_written_loop():
    make, loss = KINDS["equinox MLP"]
    result = gdopt.minimize(loss, make(), **DATA)
    assert result.loss == result.history.loss[-1]  # the best point is the last

    optimizer = optax.sgd(DATA["learning_rate"])
    arrays, static = eqx.partition(make(), eqx.is_inexact_array)
    state = optimizer.init(arrays)

    @jax.jit
    def step(arrays: Any, state: Any) -> Any:
        grad = jax.grad(lambda arrays: loss(eqx.combine(arrays, static), X, Y))(arrays)
        updates, state = optimizer.update(grad, state)
        return eqx.apply_updates(arrays, updates), state

    for _ in range(DATA["max_steps"]):
        arrays, state = step(arrays, state)
    found = eqx.filter(result.params, eqx.is_inexact_array)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_equinox_integer_buffers_are_refused_unless_a_mask_leaves_them_out():
    class Picks(eqx.Module):
        linear: eqx.nn.Linear
        columns: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(x[self.columns])

    model = Picks(linear(), jnp.array([0, 1, 2]))
    with pytest.raises(gdopt.InputError, match=r"params.columns is of dtype int32.*leave it out with trainable="):
        gdopt.minimize(predict_each, model, **DATA)
    for mask in (jax.tree.map(eqx.is_inexact_array, model), lambda model: jax.tree.map(eqx.is_inexact_array, model)):
        result = gdopt.minimize(predict_each, model, trainable=mask, **DATA)  # the mask is callable, as the model is
        assert result.loss < 0.95 * result.history.loss[0]
        assert result.params.columns is model.columns


def test_equinox_state_is_an_argument():
    class Normalised(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self) -> None:
            self.linear = linear()
            self.norm = eqx.nn.BatchNorm(1, "batch", mode="batch")

        def __call__(self, x: jax.Array, state: eqx.nn.State) -> Any:
            return self.norm(self.linear(x), state)

    def loss(model: Any, state: Any, x: Any, y: Any) -> Any:
        prediction, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return error(prediction, y), state

    model, state = eqx.nn.make_with_state(Normalised)()
    result = gdopt.minimize(loss, model, **DATA | {"args": (state, X, Y), "has_aux": True})
    assert result.loss < 0.95 * result.history.loss[0]
    assert jax.tree.structure(result.params) == jax.tree.structure(model)
    assert jax.tree.structure(result.aux) == jax.tree.structure(state)  # and the new state is the aux


# linen


def test_linen_collections_are_left_out_by_a_mask():
    variables = linen()
    loss = lambda variables, x, y: error(LinenNetwork().apply(variables, x), y)
    run = lambda **more: gdopt.minimize(loss, variables, **DATA, **more).params
    every, masked = run(), run(trainable={"params": True, "batch_stats": False})
    # A dict says nothing of what its arrays are for, so without a mask all of them are optimised.
    for name in ("mean", "var"):
        old = variables["batch_stats"]["BatchNorm_0"][name]
        assert (every["batch_stats"]["BatchNorm_0"][name] != old).any()
        assert masked["batch_stats"]["BatchNorm_0"][name] is old
    alone = lambda params, x, y: loss({"params": params, "batch_stats": variables["batch_stats"]}, x, y)
    same = gdopt.minimize(alone, variables["params"], **DATA).params
    for one, other in zip(jax.tree.leaves(masked["params"]), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_linen_statistics_come_back_as_aux():
    def loss(params: Any, statistics: Any, x: Any, y: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        prediction, new = LinenNetwork().apply(variables, x, train=True, mutable=["batch_stats"])
        return error(prediction, y), new["batch_stats"]

    variables = linen()
    given: dict[str, Any] = DATA | {"args": (variables["batch_stats"], X, Y)}
    result = gdopt.minimize(loss, variables["params"], has_aux=True, **given)
    assert result.loss < 0.95 * result.history.loss[0]
    assert jax.tree.structure(result.aux) == jax.tree.structure(variables["batch_stats"])
    assert (result.aux["BatchNorm_0"]["mean"] != 0).any()


# nnx


def test_nnx_equals_its_own_optimizer():
    """Training writes to the batch statistics, which have no part in the loss."""
    optimizer = functools.partial(optax.sgd, momentum=0.9)  # no Adam: biases in front of a BatchNorm have no gradient
    make = lambda: nnx.view(network(train=True), deterministic=True)
    of_copy = lambda model, x, y: predict(nnx.clone(model), x, y)
    found = gdopt.minimize(of_copy, make(), optimizer=optimizer, keep_best=False, **DATA).params

    model = make()
    state = nnx.Optimizer(model, optimizer(DATA["learning_rate"]), wrt=nnx.Param)
    step = nnx.jit(lambda model, state: state.update(model, nnx.grad(predict)(model, X, Y)))
    for _ in range(DATA["max_steps"]):
        step(model, state)
    for one, other in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (found, model)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

    assert (found.norm.mean[...] == 0).all()  # as it was passed; one more pass takes the statistics of what was found
    nnx.jit(lambda model: model(X))(found)
    first = found.layers[0]
    hidden = X @ np.asarray(first.kernel[...]) + np.asarray(first.bias[...])
    np.testing.assert_allclose(found.norm.mean[...], hidden.mean(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch statistics", "random counts"])
def test_nnx_state_that_the_loss_writes_to_is_an_error(kind):
    model = network(train=True)
    view = {"use_running_average": True} if kind == "random counts" else {"deterministic": True}
    name = "dropout.rngs.count" if kind == "random counts" else "norm.mean"
    with pytest.raises(gdopt.InputError, match=rf"the loss writes to params.{name}.*Rngs\(key\).*nnx.clone\(model\)"):
        gdopt.minimize(predict, nnx.view(model, **view), **DATA)


def test_nnx_dropout_with_a_fresh_key_at_each_step():
    loss = lambda model, x, y, key: error(model(x, rngs=nnx.Rngs(key)), y)
    model = nnx.view(network(), deterministic=False)
    result = gdopt.minimize(loss, model, with_key=True, **{**DATA, "learning_rate": 1e-30})
    assert len(np.unique(result.history.loss)) == 9  # nothing moved, and each loss is of another mask


def test_nnx_masks_and_splits():
    is_param = lambda model: jax.tree.map(
        lambda node: isinstance(node, nnx.Param), model, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    direct = gdopt.minimize(predict, network(), **DATA)
    masked = gdopt.minimize(predict, network(), trainable=is_param, **DATA)
    graphdef, params, rest = nnx.split(network(), nnx.Param, ...)
    split = gdopt.minimize(lambda params, x, y: predict(nnx.merge(graphdef, params, rest), x, y), params, **DATA)
    for other in (masked, split):
        np.testing.assert_allclose(other.history.loss, direct.history.loss, rtol=1e-5)

    bias = jax.tree_util.tree_map_with_path(lambda path, _: "bias" in str(path), network())
    tuned = gdopt.minimize(predict, network(), trainable=bias, **DATA).params
    assert (tuned.layers[0].kernel[...] == network().layers[0].kernel[...]).all()
    assert (tuned.layers[0].bias[...] != 0).all()


def test_shared_nnx_variables_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(3, 3, rngs=rngs)
            self.second = nnx.List([self.first])

        def __call__(self, x: Any) -> jax.Array:
            return self.second[0](nnx.tanh(self.first(x)))

    with pytest.raises(
        gdopt.InputError, match=r"params.first.bias and params.second.*\.bias are one variable.*nnx.split"
    ):
        gdopt.minimize(predict, Tied(nnx.Rngs(0)), **DATA)
    graphdef, state = nnx.split(Tied(nnx.Rngs(0)))
    result = gdopt.minimize(lambda state, x, y: predict(nnx.merge(graphdef, state), x, y), state, **DATA)
    assert result.loss < 0.95 * result.history.loss[0]
    tied = nnx.merge(graphdef, result.params)
    assert tied.first is tied.second[0]


def test_fresh_carried_arrays_compile_nothing_and_are_used():
    first = gdopt.minimize(predict, network(), **DATA)
    other = network()
    other.norm.mean[...] = jnp.full(4, 0.5, jnp.float32)
    with count_compilations() as counter:
        second = gdopt.minimize(predict, other, **DATA)
    assert "jit(run)" not in counter.names
    assert first.history.loss[0] != second.history.loss[0]
    assert second.history.loss[0] == pytest.approx(float(predict(other, X, Y)), rel=1e-5)


# leaves


def test_complex_leaves_follow_their_real_and_imaginary_parts():
    random = np.random.default_rng(1)
    A = (random.normal(size=(6, 3)) + 1j * random.normal(size=(6, 3))).astype(np.complex64)
    b = A @ np.array([1j, 2 - 1j, 0.5], np.complex64)
    loss = lambda z: jnp.mean(jnp.abs(A @ z - b) ** 2) + jnp.mean(jnp.abs(z) ** 4) + jnp.sum(z * z).real
    parts = lambda xy: loss(xy["x"] + 1j * xy["y"])
    start = np.full(3, 1 + 1j, np.complex64)
    result = gdopt.minimize(loss, start, learning_rate=0.05, max_steps=20, tol=0)
    assert result.params.dtype == jnp.complex64
    assert result.loss < 0.5 * result.history.loss[0]

    both = jax.jit(jax.value_and_grad(parts))
    xy = {"x": start.real, "y": start.imag}
    for k in range(21):
        point, (value, grad) = xy, both(xy)
        assert result.history.loss[k] == pytest.approx(float(value), rel=1e-5)
        norm = np.hypot(np.linalg.norm(grad["x"]), np.linalg.norm(grad["y"]))
        assert result.history.grad_norm[k] == pytest.approx(norm, rel=1e-3)
        xy = {name: point[name] - np.float32(0.05) * np.asarray(grad[name]) for name in point}
    np.testing.assert_allclose(result.params, point["x"] + 1j * point["y"], rtol=1e-4)


def test_each_leaf_keeps_its_dtype():
    with jax.enable_x64(True):
        names = ["bfloat16", "float16", "float32", "float64", "complex64"]
        params = {name: jnp.full(3, 2, name) for name in names}
        loss = lambda params: sum(jnp.sum(jnp.abs(leaf - 1).astype(float) ** 2) for leaf in params.values())
        result = gdopt.minimize(loss, params, learning_rate=0.1, max_steps=8)
        assert result.loss < 0.5 * result.history.loss[0]
        assert [result.params[name].dtype.name for name in names] == names
        assert all((np.asarray(leaf) != 2).all() for leaf in result.params.values())


def test_keys_of_both_kinds():
    params = {"x": jnp.ones(2), "key": jax.random.key(0), "keys": jax.random.split(jax.random.key(1))}
    loss = lambda p: jnp.sum((p["x"] - jax.random.normal(p["key"], (2,))) ** 2) + 0 * jax.random.normal(p["keys"][1])
    for trainable in (None, True, {"x": True, "key": False, "keys": True}):
        result = gdopt.minimize(loss, params, trainable=trainable, learning_rate=0.25)
        np.testing.assert_allclose(result.params["x"], jax.random.normal(params["key"], (2,)), atol=0.05)
        assert result.params["key"] is params["key"]
    legacy = params | {"key": jax.random.key_data(params["key"])}
    with pytest.raises(gdopt.InputError, match=r"params\['key'\] is of dtype uint32.*trainable="):
        gdopt.minimize(loss, legacy)


@pytest.mark.parametrize("kind", ["equinox MLP", "nnx", "nested"])
def test_a_step_of_a_module(kind):
    make, loss = KINDS[kind]
    new, value = gdopt.gd_step(loss, make(), 0.05, X, Y)
    assert jax.tree.structure(new) == jax.tree.structure(make())
    assert float(loss(new, X, Y)) < float(value) == pytest.approx(float(loss(make(), X, Y)), rel=1e-5)


# bad input


class Weight(nnx.Variable):
    pass


NOTHING = {
    "equinox": (eqx.nn.Dropout(0.5), {}, r"params=Dropout\(p=0.5, inference=False\) has no entries.*Make arrays of"),
    "a mask of False": (
        linear(),
        {"trainable": False},
        "params=<Linear of 2 leaves> .*one that trainable= does not leave out",
    ),
    "nnx": (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), {}, "params=<Dropout of 2 leaves> has no.*Only Params .*trainable="),
    "nnx variable": ({"w": Weight(jnp.ones(2))}, {}, "Only Params are optimised .* Name others"),
    "dataclass of numbers": (Line(1.0, 2.0), {}, r"params=Line\(slope=1.0, .*settings. Make arrays of those"),
    "a function": (jnp.tanh, {}, "params=.* has no entries to optimise. Pass at least one float or complex array"),
    "None": (None, {}, "params=None has no entries to optimise"),
    "a key": ({"key": jax.random.key(0)}, {}, "has no entries to optimise"),
}


@pytest.mark.parametrize(("params", "more", "message"), NOTHING.values(), ids=NOTHING.keys())
def test_nothing_to_optimise_is_an_error(params, more, message):
    with pytest.raises(gdopt.InputError, match=f"(?s){message}"):
        gdopt.minimize(lambda params: 0.0, params, **more)


def test_variables_that_a_mask_names_are_optimised():
    result = gdopt.minimize(
        lambda p: jnp.sum(p["w"][...] ** 2), {"w": Weight(jnp.ones(2))}, trainable=True, learning_rate=0.25
    )
    assert isinstance(result.params["w"], Weight)
    assert result.success
