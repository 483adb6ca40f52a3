"""Trees in few arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdopt import _trees

NAN = np.uint32(0x7FC0BEEF).view(np.float32)  # with a payload
NUMBERS: dict[str, list[Any]] = {
    "float32": [np.float32(-0.0), NAN, np.float32(np.inf), np.float32(1e-45), np.float32(3)],
    "float16": [np.float16(-0.0), np.float16(65504), np.float16(6e-8)],
    "bfloat16": [jnp.bfloat16(-0.0), jnp.bfloat16(3e38), jnp.bfloat16(1)],
    "bool": [np.True_, np.False_, np.True_],
    "int4": [jnp.int4(-8), jnp.int4(7)],
    "float8": [jnp.float8_e4m3fn(-0.0), jnp.float8_e4m3fn(448)],
    "int8": [np.int8(-128), np.int8(127)],
    "int32": [np.int32(-1), np.int32(2**31 - 1), np.int32(0)],
    "uint32": [np.uint32(2**32 - 1), np.uint32(1)],
    "complex64": [np.complex64(1 - 2j), np.complex64(-0.0)],
    "one": [np.float32(7)],
    "mixed": [np.float32(-0.0), np.int32(5), np.float32(2), np.True_, np.int32(-7)],
    "with arrays": [np.float32(1), np.arange(3, dtype=np.float32), np.ones((1, 1), np.float32)],
}


def same_bits(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_numbers_keep_their_bits(numbers: list[Any]) -> None:
    packed = jax.jit(lambda numbers: _trees.pack(numbers, _trees.SMALL, by_bits=True))(numbers)
    assert all(map(same_bits, numbers, map(np.asarray, packed.tree())))
    again = jax.jit(lambda packed: packed.tree())(packed)
    assert all(map(same_bits, numbers, map(np.asarray, again)))


def test_64_bits_keep_their_bits() -> None:
    with jax.enable_x64(True):
        numbers = [np.float64(-0.0), np.float64(5e-324), np.float64(np.pi)]
        packed = jax.jit(lambda numbers: _trees.pack(numbers, by_bits=True))(numbers)
        assert all(map(same_bits, numbers, map(np.asarray, packed.tree())))


def test_many_numbers_are_joined_by_one_kernel() -> None:
    """XLA's CPU backend makes a kernel of each number that it concatenates, and so of all that it depends on."""

    def joined(x: jax.Array) -> _trees.Packed:
        return _trees.pack([jnp.sin(x) * k for k in range(20)], by_bits=True)

    program = jax.jit(joined).lower(jnp.float32(1)).compile().as_text() or ""
    assert "concatenate" not in program
    assert program.count(" fusion(") <= 2


@pytest.mark.parametrize("most", [1, _trees.SMALL])
def test_packed_params_have_derivatives(most: int) -> None:
    """The check of a minimum differentiates the gradient through them."""
    joined = lambda x: _trees.pack([x, 3 * x], most).vectors[0]
    np.testing.assert_array_equal(jax.jacfwd(joined)(jnp.float32(2)), [1, 3])


def trees(dtype: Any, size: int) -> list[dict[str, jax.Array]]:
    """Three trees of two leaves, as float64 has them to compare with."""
    random = np.random.default_rng(0)
    draw = lambda shape: random.standard_normal(shape) + (1j * random.standard_normal(shape) if dtype == "c8" else 0)
    numpy_dtype = jnp.bfloat16 if dtype == "bfloat16" else dtype
    return [{"a": jnp.asarray(draw((size,)), numpy_dtype), "b": jnp.asarray(draw((2, 3)), numpy_dtype)} for _ in "xyz"]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, "c16").reshape(-1) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("size", [0, 1, 33, _trees.SMALL, _trees.SMALL + 1, 20_001])
@pytest.mark.parametrize("dtype", ["f4", "bfloat16", "f2", "c8"])
def test_several_reductions_at_once(dtype: str, size: int) -> None:
    x, y, z = trees(dtype, size)
    pairs = (x, y), (y, y), (z, x)
    found = jax.jit(lambda *pairs: _trees.vdots(*pairs))(*pairs)
    for (a, b), product in zip(pairs, found, strict=True):
        bound = np.linalg.norm(flat(a)) * np.linalg.norm(flat(b))
        assert product.dtype == np.float32
        assert abs(np.vdot(flat(a), flat(b)).real - float(product)) < 1e-5 * bound
    sizes = jax.jit(lambda *trees: _trees.each_largest(*trees))(x, y, z)
    assert [float(size) for size in sizes] == pytest.approx([abs(flat(tree)).max() for tree in (x, y, z)], rel=1e-6)


def test_small_reductions_are_one_kernel() -> None:
    def products(x: jax.Array, y: jax.Array) -> list[jax.Array]:
        return _trees.vdots((x, x), (x, y), (y, y), (x - y, x))

    program = jax.jit(products).lower(jnp.ones(50), jnp.ones(50)).compile().as_text() or ""
    assert program.count(" fusion(") <= 1
    assert "reduce-window" not in program
