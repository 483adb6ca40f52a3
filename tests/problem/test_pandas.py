"""Tables of pandas as data and as arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdopt

pd = pytest.importorskip("pandas")

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame({"length": RNG.normal(size=64), "count": RNG.integers(0, 5, 64)}, index=range(100, 164))
TARGET = 2 * TABLE["length"] + TABLE["count"]


def loss(w: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def test_numbers_are_taken_in_data_and_args() -> None:
    batches = gdopt.minimize(loss, jnp.zeros(2), data=(TABLE, TARGET), batch_size=8, epochs=20)
    np.testing.assert_allclose(batches.params, [2, 1], atol=0.02)
    whole = gdopt.minimize(loss, jnp.zeros(2), args=((TABLE, TARGET),))
    np.testing.assert_allclose(whole.params, [2, 1], atol=1e-3)
    arrays = np.float32(TABLE.to_numpy()), np.float32(TARGET.to_numpy())
    same = gdopt.minimize(loss, jnp.zeros(2), data=arrays, batch_size=8, epochs=20)
    np.testing.assert_array_equal(batches.params, same.params)


@pytest.mark.parametrize(
    "column",
    [True, pd.array([1, 2] * 32, dtype="Int64"), pd.array([1.5, 2.0] * 32, dtype="Float64")],
    ids=["bool", "Int64", "Float64"],
)
def test_columns_of_pandas_own_dtypes_are_numbers(column: Any) -> None:
    table = TABLE.assign(more=column)
    result = gdopt.minimize(loss, jnp.zeros(3), args=((table, TARGET),))
    assert result.success


@pytest.mark.parametrize(
    "column",
    ["text", pd.Categorical(["a", "b"] * 32), pd.Timestamp("2020-01-01")],
    ids=["text", "category", "date"],
)
@pytest.mark.parametrize("place", ["data", "args"])
def test_another_column_is_named(column: Any, place: str) -> None:
    given = TABLE.assign(kind=column), TARGET
    options: dict[str, Any] = {"data": given, "batch_size": 8} if place == "data" else {"args": (given,)}
    with pytest.raises(gdopt.InputError, match=r"DataFrame whose columns 'kind' do not hold numbers"):
        gdopt.minimize(loss, jnp.zeros(3), **options)


def test_a_column_with_holes_is_named() -> None:
    table = TABLE.assign(age=pd.array([1, None] * 32, dtype="Int64"))
    with pytest.raises(gdopt.InputError, match=r"whose columns 'age' lack values \(NA\)"):
        gdopt.minimize(loss, jnp.zeros(3), data=(table, TARGET), batch_size=8)


@pytest.mark.parametrize(
    "column",
    [["1", "2"] * 32, pd.Categorical(["a", "b"] * 32), pd.Timestamp("2020-01-01")],
    ids=["text", "category", "date"],
)
@pytest.mark.parametrize("place", ["data", "args"])
def test_a_single_column_is_no_numbers_either(column: Any, place: str) -> None:
    given = TABLE, TABLE.assign(kind=column)["kind"]
    options: dict[str, Any] = {"data": given, "batch_size": 8} if place == "data" else {"args": (given,)}
    with pytest.raises(gdopt.InputError, match=r"\[1\] is a Series of dtype .*, not an array of numbers.*numpy.unique"):
        gdopt.minimize(loss, jnp.zeros(2), **options)
