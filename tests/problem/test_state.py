"""The state of a model beside its params: carried along, returned, saved, and refused if it does not fit."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import count_compilations

import gdopt

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5]], np.float32)
DATA: dict[str, Any] = {"data": (X, Y), "batch_size": 8, "learning_rate": 0.05, "max_steps": 13}
W = np.zeros((3, 1), np.float32)
START = {"mean": np.zeros(3, np.float32), "count": 0, "key": jax.random.key(7), "name": "running", "none": None}


def loss(w: Any, batch: Any, *, state: Any) -> Any:
    """A least-squares loss with a running mean of its rows, a count, and noise from a key that it splits."""
    x, y = batch
    key, own = jax.random.split(state["key"])
    value = jnp.mean((x @ w - y) ** 2) + 0.01 * jnp.sum(w * jax.random.normal(own, w.shape))
    new = {"mean": 0.9 * state["mean"] + 0.1 * x.mean(axis=0), "count": state["count"] + 1, "key": key}
    return value, state | new


def by_hand(steps: int, batches: list[Any], state: Any, rate: float = 0.05) -> tuple[Any, Any]:
    w = jnp.asarray(W)
    step = jax.jit(jax.value_and_grad(lambda w, batch, state: loss(w, batch, state=state), has_aux=True))
    state = {name: state[name] for name in ("mean", "count", "key")}
    for k in range(steps):
        (_, state), grad = step(w, batches[k], state)
        w = w - rate * grad
    return w, state


def numbers(tree: Any) -> list[np.ndarray]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, str)]
    data = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return list(map(np.asarray, data))


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep_best", [True, False])
def test_each_step_passes_the_state_on(keep_best: bool):
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 48, 8)]
    stream = {"data": lambda: iter(batches), "learning_rate": 0.05, "max_steps": 6, "keep_best": keep_best}
    result = gdopt.minimize(loss, W, state=START, **stream)
    w, state = by_hand(6, batches, START)
    np.testing.assert_allclose(result.params, w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.state["mean"], state["mean"], rtol=1e-5, atol=1e-7)
    assert result.state["count"] == 6
    assert result.state["name"] == "running"
    assert result.state["none"] is None
    assert_same(result.state["key"], state["key"])


def test_the_state_belongs_to_the_returned_params():
    """A run that fails returns an older point, with the state that the loss had there."""

    def blows_up(w: Any, *, state: Any) -> Any:
        return jnp.sqrt(3.5 - state) * jnp.sum(w**2), state + 1

    result = gdopt.minimize(blows_up, jnp.ones(2), state=0, learning_rate=0.1, max_steps=10)
    assert result.status is gdopt.Status.NON_FINITE
    assert result.steps == 4
    assert result.state == 3
    assert result.loss == blows_up(result.params, state=3)[0]
    assert gdopt.diagnose(result).primitive == "sqrt"


def test_a_run_goes_on_from_params_and_state():
    """Two runs of three steps are one of six."""
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 48, 8)]
    run = functools.partial(gdopt.minimize, loss, optimizer=functools.partial(optax.sgd, momentum=0.9))
    stream = lambda some: {"data": lambda: iter(some), "learning_rate": 0.05, "max_steps": len(some)}
    whole = run(W, state=START, **stream(batches))
    first = run(W, state=START, **stream(batches[:3]))
    both = {"state": first.state, "optimizer_state": first.optimizer_state}
    second = run(first.params, **both, **stream(batches[3:]))
    assert_same(
        (whole.params, whole.state, whole.optimizer_state), (second.params, second.state, second.optimizer_state)
    )


def test_aux_comes_beside_the_state():
    def both(w: Any, batch: Any, *, state: Any) -> Any:
        value, new = loss(w, batch, state=state)
        return value, (new, {"size": jnp.sum(w**2)})

    result = gdopt.minimize(both, W, state=START, has_aux=True, **DATA)
    np.testing.assert_allclose(result.aux["size"], np.sum(np.square(result.params)), rtol=1e-6)
    assert result.state["count"] == 13


def test_with_a_key_and_an_empty_state():
    def keyed(w: Any, batch: Any, *, key: Any, state: Any) -> Any:
        assert state == {}
        return loss(w, batch, state=START | {"key": key})[0], state

    assert gdopt.minimize(keyed, W, state={}, with_key=True, **DATA).state == {}
    assert gdopt.minimize(lambda w: jnp.sum(w**2), W, max_steps=2).state is None


def test_a_loss_with_state_is_noisy():
    drifts = lambda w, *, state: (jnp.sum((w - state) ** 2), 0.5 * state + 1)
    result = gdopt.minimize(drifts, jnp.zeros(2), state=0.0, learning_rate=0.1, max_steps=100)
    assert result.status is gdopt.Status.MAX_STEPS
    assert result.steps_per_epoch == 1
    np.testing.assert_allclose(result.params, 2, atol=0.05)
    with pytest.raises(gdopt.InputError, match=r"tol=0.1 was given for a noisy loss.*a state"):
        gdopt.minimize(drifts, jnp.zeros(2), state=0.0, tol=0.1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_each_try_of_a_range_test_begins_with_the_state(repeats: int):
    options = {"data": (X, Y), "batch_size": 8, "repeats": repeats}
    with_state = gdopt.lr_find(loss, W, state=START, **options)
    assert with_state.suggestion is not None
    assert with_state.suggestion == gdopt.lr_find(loss, W, state=START, **options).suggestion


def test_auto_begins_its_test_and_its_run_with_the_state():
    result = gdopt.minimize(loss, W, state=START, data=(X, Y), batch_size=8, max_steps=200, optimizer=gdopt.gd)
    assert result.range_test is not None
    assert result.state["count"] == 200


def test_inside_jit_and_vmap():
    state = {name: START[name] for name in ("mean", "count", "key")}
    run = lambda mean: gdopt.minimize(loss, W, state=state | {"mean": mean}, **DATA)
    outside, inside = run(state["mean"]), jax.jit(run)(state["mean"])
    assert_same((inside.params, inside.state), (outside.params, outside.state))
    many = jax.vmap(run)(jnp.stack([jnp.zeros(3), jnp.ones(3)]))
    assert_close(many[0].state["mean"], outside.state["mean"])
    assert_close(many[1].state["mean"], run(jnp.ones(3)).state["mean"])


def test_equal_calls_compile_once():
    run = lambda scale: gdopt.minimize(loss, W, state=START | {"mean": scale * START["mean"] + scale}, **DATA)
    run(1.0)
    with count_compilations() as counter:
        run(2.0)
    assert counter.count == 0, counter.names


def test_checkpoints_resume_bit_for_bit(tmp_path: Any):
    run = lambda steps, **more: gdopt.minimize(loss, W, state=START, **DATA | {"max_steps": steps}, **more)
    path = tmp_path / "run"
    run(5, checkpoint=path)
    with pytest.warns(UserWarning, match="max_steps"):
        resumed = run(13, checkpoint=path)
    assert "resumed from step 5" in resumed.message
    assert_same((resumed.params, resumed.state), (run(13).params, run(13).state))
    more = lambda w, batch, *, state: (lambda value, new: (value, new | {"more": state["more"]}))(
        *loss(w, batch, state=state)
    )
    with pytest.raises(gdopt.InputError, match=r"is of another run: its state is .*, but here it is .*'more'"):
        gdopt.minimize(more, W, state=START | {"more": jnp.zeros(2)}, checkpoint=path, **DATA)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_keep_their_dtype(dtype: str):
    narrow = lambda w, *, state: (jnp.sum(w**2), (0.9 * state + w.mean().astype(state.dtype)).astype(state.dtype))
    result = gdopt.minimize(narrow, jnp.ones(2), state=jnp.zeros((), dtype), learning_rate=0.1, max_steps=3)
    assert result.state.dtype == dtype
    weak = lambda w, *, state: (jnp.sum(w**2), 0.5)  # a number of Python takes the dtype that the state had
    assert gdopt.minimize(weak, jnp.ones(2), state=jnp.zeros((), dtype), learning_rate=0.1, max_steps=3).state == 0.5


BAD = {
    "another structure": (
        lambda s: {"mean": s["mean"]},
        r"another structure than it was given: \{'mean': .*\} instead",
    ),
    "an aux without has_aux": (lambda s: (s, {}), r"another structure .* with has_aux=True, \(value, \(state, aux\)\)"),
    "another shape": (lambda s: s | {"mean": s["mean"][:2]}, r"state\['mean'\] is float32\[3\], .* float32\[2\]"),
    "another dtype": (lambda s: s | {"mean": s["mean"].astype("float16")}, r"float32\[3\], .* float16\[3\].*astype"),
    "a float for a count": (
        lambda s: s | {"count": s["count"] + 0.5},
        r"state\['count'\] is int32\[\], .* float32\[\]",
    ),
    "another text": (lambda s: s | {"name": "other"}, r"state\['name'\] is 'running', but .* 'other'"),
    "a text for an array": (lambda s: s | {"mean": "no"}, r"state\['mean'\] is float32\[3\], but .* a str"),
    "no key": (lambda s: s | {"key": jax.random.key_data(s["key"])}, r"state\['key'\] is key<fry>\[\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_that_does_not_fit_is_an_error_before_anything_compiles(kind: str):
    change, message = BAD[kind]
    jax.block_until_ready(jnp.zeros(3) @ jnp.zeros(3))
    with count_compilations() as counter, pytest.raises(gdopt.InputError, match=message):
        gdopt.minimize(lambda w, batch, state: (jnp.sum(w**2), change(state)), W, state=START, **DATA)
    assert counter.count == 0, counter.names


@pytest.mark.parametrize(("returned", "has_aux"), [(lambda v, s: v, False), (lambda v, s: (v, s), True)])
def test_a_loss_that_returns_no_state_is_an_error(returned: Any, has_aux: bool):
    form = r"\(value, \(state, aux\)\)" if has_aux else r"\(value, state\)"
    with pytest.raises(gdopt.InputError, match=rf"a loss that returns {form}, but it returned"):
        gdopt.minimize(lambda w, batch, state: returned(jnp.sum(w**2), {}), W, state={}, has_aux=has_aux, **DATA)


def test_the_value_comes_first():
    with pytest.raises(gdopt.InputError, match=r"the loss returned a dict as its value. Return a scalar array first"):
        gdopt.minimize(lambda w, batch, state: (state, jnp.sum(w**2)), W, state=START, **DATA)


# Real libraries: the running statistics are those of a loop by hand.


def trained(make_loss: Any, params: Any, state: Any, optimizer: Any) -> gdopt.Result:
    options: dict[str, Any] = {"data": lambda: iter([(X[:24], Y[:24]), (X[24:], Y[24:])] * 3), "max_steps": 6}
    return gdopt.minimize(make_loss, params, state=state, optimizer=optimizer, learning_rate=0.1, **options)


def loop(step: Any, params: Any, state: Any, optimizer: Any) -> tuple[Any, Any]:
    transformation = optimizer(0.1)
    floats = eqx.filter(params, eqx.is_inexact_array)
    moments = transformation.init(floats)
    grad_of = eqx.filter_value_and_grad(
        lambda p, batch, state: step(p, batch, state=jax.tree.map(lambda x: x, state)), has_aux=True
    )
    for k in range(6):
        rows = slice(24 * (k % 2), 24 * (k % 2) + 24)
        (_, state), grad = grad_of(params, (X[rows], Y[rows]), state)
        updates, moments = transformation.update(grad, moments)
        params = eqx.apply_updates(params, updates)
    return params, state


def assert_close(one: Any, other: Any) -> None:
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


SGD = functools.partial(optax.sgd, momentum=0.9)


def test_equinox():
    class Network(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self, key: Any) -> None:
            self.linear = eqx.nn.Linear(3, 1, key=key)
            self.norm = eqx.nn.BatchNorm(1, "batch", mode="batch")

        def __call__(self, x: jax.Array, state: eqx.nn.State) -> Any:
            return self.norm(self.linear(x), state)

    def loss(model: Any, batch: Any, *, state: Any) -> Any:
        x, y = batch
        out, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return jnp.mean((out - y) ** 2), state

    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    copied = jax.tree.map(lambda x: x, state)
    result = trained(loss, model, state, SGD)
    params, new = loop(loss, model, copied, SGD)
    assert isinstance(result.state, eqx.nn.State)
    assert_close(result.state, new)
    assert_close(eqx.filter(result.params.linear, eqx.is_array), eqx.filter(params.linear, eqx.is_array))
    out, _ = jax.vmap(eqx.nn.inference_mode(result.params), in_axes=(0, None), out_axes=(0, None))(X, result.state)
    assert np.mean(np.square(out - Y)) < np.mean(np.square(Y))


def test_linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool = False) -> jax.Array:
            return nn.Dense(1)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x)))

    def loss(params: Any, batch: Any, *, state: Any) -> Any:
        x, y = batch
        out, new = Network().apply({"params": params, **state}, x, train=True, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), new

    state = dict(Network().init(jax.random.key(0), X))
    params = state.pop("params")
    result = trained(loss, params, state, SGD)
    _, new = loop(loss, params, state, SGD)
    assert_close(result.state, new)
    out: Any = Network().apply({"params": result.params, **result.state}, X)
    assert np.mean(np.square(out - Y)) < np.mean(np.square(Y))


def test_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x: Any) -> jax.Array:
            return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))

    graphdef, params, state = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, batch: Any, *, state: Any) -> Any:
        model = nnx.merge(graphdef, params, state)
        value = jnp.mean((model(batch[0]) - batch[1]) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    result = trained(loss, params, state, SGD)
    _, new = loop(loss, params, state, SGD)
    assert_close(result.state, new)  # with the counts of the dropout, so each step has its own masks
    model = nnx.merge(graphdef, result.params, result.state)
    out = nnx.view(model, deterministic=True, use_running_average=True)(X)
    assert np.mean(np.square(out - Y)) < np.mean(np.square(Y))
