"""Identities of ready transformations: equal only for those that compute the same, and read anew at each call."""

import functools
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, shared_traces

import gdopt
from gdopt._optimizers.identity import identity_of
from gdopt._optimizers.method import Method

READY = {
    "adam": lambda: optax.adam(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "half precision": lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 30)),
    "NumPy's number": lambda: optax.adam(cast(Any, np.float32(0.1))),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
    "line search": lambda: optax.lbfgs(),
    "wrapper": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "several batches": lambda: optax.MultiSteps(optax.adam(0.1), 3),
    "average": lambda: optax.contrib.schedule_free_sgd(0.1),
    "gdopt's": lambda: gdopt.quasi_newton(memory=3),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in READY.items()])
def test_equal_transformations_have_one_identity(make: Any) -> None:
    one, other = make(), make()
    for part in ("init", "update"):
        identity = identity_of(getattr(one, part))
        assert identity is not None
        assert identity == identity_of(getattr(other, part))
        assert hash(identity) == hash(identity_of(getattr(other, part)))


def test_different_transformations_have_different_identities() -> None:
    made = [make() for make in READY.values()]
    made += [optax.adam(0.2), optax.adam(1), optax.adam(np.float64(0.1)), optax.adam(-0.0)]
    made += [optax.adam(0.0), optax.adam(optax.cosine_decay_schedule(0.1, 31)), gdopt.quasi_newton(memory=4)]
    identities = [(identity_of(optimizer.init), identity_of(optimizer.update)) for optimizer in made]
    assert not any(None in both for both in identities)
    assert len(set(identities)) == len(made)


def _decorated(function: Any) -> Any:
    @functools.wraps(function)
    def other(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return other


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(lambda step: 0.1),  # a function of the caller
        optax.adam(jnp.float32(0.1)),  # an array
        optax.GradientTransformation(_decorated(optax.adam(0.1).init), _decorated(optax.adam(0.1).update)),
        optax.chain(optax.stateless(lambda updates, params: updates), optax.sgd(0.1)),
    ],
)
def test_what_may_change_has_no_identity(optimizer: Any) -> None:
    assert None in (identity_of(optimizer.init), identity_of(optimizer.update))


def test_a_closure_that_changed_is_seen() -> None:
    mask = {"w": True, "b": False}
    optimizer = optax.chain(optax.masked(optax.set_to_zero(), mask), optax.sgd(0.1))
    start = {"w": jnp.ones(2), "b": jnp.ones(2)}
    loss = lambda params: jnp.sum((params["w"] - 3) ** 2) + jnp.sum((params["b"] - 3) ** 2)
    before = identity_of(optimizer.update)
    first = gdopt.minimize(loss, start, optimizer=optimizer).params
    mask.update(w=False, b=True)
    assert identity_of(optimizer.update) != before
    second = gdopt.minimize(loss, start, optimizer=optimizer).params
    np.testing.assert_allclose([first["w"], first["b"]], [[1, 1], [3, 3]], atol=1e-2)
    np.testing.assert_allclose([second["w"], second["b"]], [[3, 3], [1, 1]], atol=1e-2)


def test_an_equal_ready_transformation_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = lambda x: jnp.sum((x - 1.5) ** 2)
    call = lambda: gdopt.minimize(loss, jnp.zeros(3), optimizer=optax.adam(0.3))
    first, traces = call(), shared_traces(monkeypatch)
    with count_compilations() as counter:
        second = call()
    assert (len(traces), counter.count) == (0, 0)
    np.testing.assert_array_equal(first.params, second.params)


def test_a_known_optimizer_may_project_nevertheless() -> None:
    optimizer = optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())
    assert Method(optimizer).identity is not None
    assert Method(optimizer).may_project
    result = gdopt.minimize(lambda x: jnp.sum((x + 1) ** 2), jnp.ones(2), optimizer=optimizer)
    assert result.status is gdopt.Status.CONVERGED
