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
    packed = jax.jit(lambda numbers: _trees.pack(numbers, _trees.SMALL))(numbers)
    assert all(map(same_bits, numbers, map(np.asarray, packed.tree())))
    again = jax.jit(lambda packed: packed.tree())(packed)
    assert all(map(same_bits, numbers, map(np.asarray, again)))


def test_64_bits_keep_their_bits() -> None:
    with jax.enable_x64(True):
        numbers = [np.float64(-0.0), np.float64(5e-324), np.float64(np.pi)]
        packed = jax.jit(_trees.pack)(numbers)
        assert all(map(same_bits, numbers, map(np.asarray, packed.tree())))


def test_many_numbers_are_joined_by_one_kernel() -> None:
    """XLA's CPU backend makes a kernel of each number that it concatenates, and so of all that it depends on."""

    def joined(x: jax.Array) -> _trees.Packed:
        return _trees.pack([jnp.sin(x) * k for k in range(20)])

    program = jax.jit(joined).lower(jnp.float32(1)).compile().as_text() or ""
    assert "concatenate" not in program
    assert program.count(" fusion(") <= 2
