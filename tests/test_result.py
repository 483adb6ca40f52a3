"""A ``Result`` as a pytree: mapped, compiled, batched and printed. Its message stays with its own numbers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations

import gdopt
from gdopt import Status

LOST = "lost in jit, vmap, grad or tree.map"


def bowl(x: Any, scale: Any = 1.0) -> jax.Array:
    return scale * jnp.sum((x - 1) ** 2)


def run(scale: Any = 1.0, **options: Any) -> gdopt.Result:
    options = {"learning_rate": 0.1, "max_steps": 9, "tol": 0, **options}
    return gdopt.minimize(bowl, jnp.zeros(3), args=(scale,), **options)


def stacked(*results: gdopt.Result) -> gdopt.Result:
    """Stack the results of several runs, whose histories may differ in length."""
    short = [dataclasses.replace(result, history=None) for result in results]
    return jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *short)


def deleted(result: gdopt.Result) -> gdopt.Result:
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), result)
    for leaf in jax.tree.leaves(copied):
        leaf.delete()
    return copied


# What may become of a result, and what its repr then says of the status.
PLACES: dict[str, tuple[Callable[[gdopt.Result], Any], str]] = {
    "as it is": (lambda result: result, "MAX_STEPS"),
    "tree.map": (lambda result: jax.tree.map(lambda leaf: leaf, result), "MAX_STEPS"),
    "device_get": (jax.device_get, "MAX_STEPS"),
    "device_put": (jax.device_put, "MAX_STEPS"),
    "jit": (jax.jit(lambda result: result), "MAX_STEPS"),
    "copy": (copy.deepcopy, "MAX_STEPS"),
    "pickle": (lambda result: pickle.loads(pickle.dumps(result)), "MAX_STEPS"),
    "stack": (lambda result: stacked(result, run(target=1.0)), "TARGET_REACHED (1), MAX_STEPS (1)"),
    "vmap": (lambda result: jax.vmap(lambda result: result)(stacked(result, result)), "MAX_STEPS (2)"),
    "vmap of runs": (lambda _: jax.vmap(run)(jnp.array([1.0, 2.0, 3.0])), "MAX_STEPS (3)"),
    "jit of a run": (lambda _: jax.jit(run)(1.0), "MAX_STEPS"),
    "eval_shape": (lambda _: jax.eval_shape(run, 1.0), "int32[]"),
    "sum of two": (lambda result: jax.tree.map(lambda a, b: a + b, result, result), "NON_FINITE"),  # 3 + 3
    "no status": (lambda result: jax.tree.map(lambda leaf: leaf * 100, result), "300"),
    "texts": (lambda result: jax.tree.map(str, result), "'MAX_STEPS'"),
    "objects": (lambda result: jax.tree.map(lambda _: object(), result), "<object"),
    "nothing": (lambda result: jax.tree.map(lambda _: None, result), "None"),
    "deleted": (deleted, "int32[]"),
}
KEEPS_ITS_MESSAGE = {"as it is", "tree.map", "device_get", "device_put", "copy", "pickle", "deleted"}


@pytest.mark.parametrize("place", PLACES)
def test_it_can_always_be_printed(place: str) -> None:
    result = run()
    changed, status = PLACES[place][0](result), PLACES[place][1]
    lines = repr(changed).splitlines()
    assert lines[0] == "gdopt.Result"
    assert lines[1].startswith(f"  status    {status}")
    assert changed.message == result.message if place in KEEPS_ITS_MESSAGE else changed.message.startswith(LOST)


def test_two_results_have_one_structure() -> None:
    one, other = run(), run(2.0)
    assert one.message != other.message
    assert jax.tree.structure(one) == jax.tree.structure(other)
    apart = jax.tree.map(lambda a, b: a - b, one, other)
    np.testing.assert_array_equal(apart.params, one.params - other.params)
    assert jax.tree.map(lambda a, b: b, one, other).message.startswith(LOST)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    assert names[:2] == [".params", ".loss"]


def test_another_result_compiles_nothing_and_keeps_no_message() -> None:
    gap = jax.jit(lambda result: (result, result.loss + jnp.sum(result.params)))
    results = run(), run(2.0)
    gap(results[0])
    with count_compilations() as counter:
        back, _ = gap(results[1])
    assert counter.names == []
    assert back.loss == results[1].loss
    assert back.message.startswith(LOST)


def test_a_result_that_a_jit_closes_over_keeps_its_message() -> None:
    result = run()
    assert jax.jit(lambda: result)().message == result.message


def test_the_numbers_of_a_failed_run_may_be_nan() -> None:
    result = gdopt.minimize(lambda x: x - jnp.log(x), 0.1, learning_rate=9.0, keep_best=False)
    assert np.isnan(result.loss)
    assert jax.device_get(result).message == result.message


def test_a_result_from_a_jit_can_be_raised_and_diagnosed() -> None:
    moved = jax.jit(lambda result: result)(run())
    with pytest.raises(gdopt.NotConvergedError, match=f"^MAX_STEPS: {LOST}"):
        moved.raise_for_status()
    with pytest.raises(gdopt.NotConvergedError, match=r"^1 of 2 runs ended without success: MAX_STEPS \(1\)\.$"):
        stacked(run(), run(target=1.0)).raise_for_status()
    with pytest.raises(gdopt.InputError, match="result ended with MAX_STEPS, not with NON_FINITE"):
        gdopt.diagnose(moved)


def test_a_range_test_is_a_pytree_as_well() -> None:
    test = gdopt.lr_find(bowl, jnp.zeros(3))
    assert jax.device_get(test).message == test.message
    for changed in (jax.jit(lambda test: test)(test), jax.tree.map(lambda leaf: leaf * 2, test)):
        assert changed.message.startswith(LOST)
        assert repr(changed).startswith("gdopt.RangeTest")
    assert jax.tree.structure(gdopt.lr_find(bowl, jnp.ones(3) * 3)) == jax.tree.structure(test)


def test_a_status_prints_as_its_name_and_is_an_int() -> None:
    status = Status.DIVERGED
    assert (str(status), f"{status}", f"{status:s}") == ("DIVERGED", "DIVERGED", "DIVERGED")
    assert (f"{status:>10}", f"{status!r}") == ("  DIVERGED", "<Status.DIVERGED: 5>")
    assert (f"{status:d}", f"{status:03d}", f"{status:.1f}") == ("5", "005", "5.0")
    assert status == 5
    assert status > Status.CONVERGED
    assert pickle.loads(pickle.dumps(status)) is status
    np.testing.assert_array_equal(np.array([status, Status.CONVERGED]) == np.array([5, 1]), [True, True])
    assert jnp.asarray(status).dtype == jnp.int32
