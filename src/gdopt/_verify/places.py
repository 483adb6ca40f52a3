"""Arrays and loops for code that runs in two places: with NumPy on the host, or with JAX in a trace.

A verification takes a second to compile, so a run outside jit computes it on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _jax, _trees

Blocks = list[Any]  # real arrays, the entries of the params


class Probe(NamedTuple):
    """The functions of a loss: its value, gradient and Hessian products."""

    at: Callable[[Blocks], tuple[Any, Blocks]]  # the loss and its gradient
    times: Callable[[Blocks, Blocks], Blocks]  # (point, direction) -> the Hessian times the direction


class OnHost:
    """Arrays of NumPy, and loops of Python."""

    np = np
    tensordot = staticmethod(np.tensordot)

    @staticmethod
    def own(tree: Any) -> Any:
        """Return the tree with arrays of this place."""
        return jax.tree.map(_trees.on_host, tree)

    @staticmethod
    def rows(function: Callable[[Any], Blocks], count: int) -> Blocks:
        """Stack what a function gives for each number."""
        return [np.stack(blocks) for blocks in zip(*map(function, range(count)), strict=True)]

    @staticmethod
    def fold(count: int, body: Callable, carry: Any) -> Any:
        """Call ``carry = body(number, carry)`` for each number."""
        for number in range(count):
            carry = body(number, carry)
        return carry

    @staticmethod
    def loop(goes_on: Callable, body: Callable, carry: Any) -> Any:
        """Call ``carry = body(carry)`` as long as it goes on."""
        while goes_on(carry):
            carry = body(carry)
        return carry

    @staticmethod
    def select(condition: Any, if_true: Any, if_false: Any) -> Any:
        """One of two trees."""
        return if_true if condition else if_false

    @staticmethod
    def when(condition: Any, function: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """Call one of two functions."""
        return function() if condition else otherwise()

    if_any = when  # the same, where ``otherwise`` is cheap and the function is not

    @staticmethod
    def put(rows: Any, number: Any, row: Any) -> Any:
        """Write a row, if there is room for it."""
        if number < len(rows):
            rows[number] = row
        return rows


class InTrace:
    """Arrays and loops of JAX, in a trace."""

    np = jnp
    tensordot = staticmethod(functools.partial(jnp.tensordot, precision="highest"))
    own = staticmethod(lambda tree: tree)
    loop = staticmethod(lax.while_loop)
    select = staticmethod(_trees.select)
    when = staticmethod(lax.cond)

    @staticmethod
    def if_any(condition: Any, function: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        # A vmap calls both functions of a `cond` for all runs, but the body of a loop only if one of them asks for it.
        # XLA would compute before the loop what does not depend on it. So the arrays that the function reads do.
        traced, arrays = jax.closure_convert(function)
        # Within a `shard_map`, a barrier would let all of them differ between devices.
        if len(set(map(_jax.varying, (condition, *arrays)))) > 1:
            return lax.cond(condition, function, otherwise)

        def once(search: tuple) -> tuple:
            asked, *tied = lax.optimization_barrier((search[0], *arrays))
            return asked & False, traced(*tied)

        return lax.while_loop(lambda search: search[0], once, (condition, otherwise()))[1]

    @staticmethod
    def rows(function: Callable[[Any], Blocks], count: int) -> Blocks:
        return lax.map(function, lax.iota(int, count))

    @staticmethod
    def fold(count: int, body: Callable, carry: Any) -> Any:
        return lax.fori_loop(0, count, body, carry)

    @staticmethod
    def put(rows: Any, number: Any, row: Any) -> Any:
        return rows.at[number].set(row, mode="drop")


Place = type[OnHost] | type[InTrace]


def loss_at(place: Place, probe: Probe, params: Blocks) -> Any:
    """Return the loss; NaN if the params, which it may not read, or its gradient are not finite."""
    np = place.np
    loss, grad = probe.at(params)
    finite = np.stack([np.isfinite(x).all() for x in (*params, *grad)]).all()
    return np.where(finite, loss, np.nan)


def count_of(blocks: Blocks) -> int:
    """Count all entries."""
    return sum(block.size for block in blocks)


def coarsest(blocks: Blocks) -> float:
    """Return the largest eps of their dtypes."""
    return max(float(jnp.finfo(block.dtype).eps) for block in blocks)


def largest(np: Any, blocks: Blocks) -> Any:
    """Return the largest absolute value of all entries."""
    return np.max(np.stack([np.max(abs(block), initial=0).astype(_trees.norm_dtype(blocks)) for block in blocks]))


def shifted(params: Blocks, ways: Blocks) -> Blocks:
    return [x + way.astype(x.dtype) for x, way in zip(params, ways, strict=True)]


def products(place: Place, rows: Blocks, blocks: Blocks, dtype: Any) -> Any:
    """Return the inner product with each row."""

    def flat(rows: Any, block: Any) -> Any:
        axes = tuple(range(1, rows.ndim)), tuple(range(block.ndim))
        return place.tensordot(rows.astype(dtype), block.astype(dtype), axes)

    return sum(flat(*each) for each in zip(rows, blocks, strict=True))


def combined(place: Place, weights: Any, rows: Blocks) -> Blocks:
    """Return the sum of the rows, each times its weight."""
    return [place.tensordot(weights.astype(block.dtype), block, 1) for block in rows]


def dot(place: Place, a: Blocks, b: Blocks, dtype: Any) -> Any:
    return sum(place.np.sum(x.astype(dtype) * y.astype(dtype)) for x, y in zip(a, b, strict=True))


def normal(place: Place, blocks: Blocks, dtype: Any) -> Blocks:
    """Scale the blocks to norm 1; return 0 if they are zero."""
    np = place.np
    size = sum(np.max(np.abs(block), initial=0).astype(dtype) for block in blocks)
    unit = [block / np.where(size > 0, size, 1).astype(block.dtype) for block in blocks]
    norm = np.sqrt(dot(place, unit, unit, dtype))
    return [block / np.where(norm > 0, norm, 1).astype(block.dtype) for block in unit]


def chance(place: Place, like: Blocks, number: Any) -> Blocks:
    """Return entries from -1 to 1 that look random, others for each number: JAX's own take long to compile.

    Source: Weyl's equidistributed sequences, with the irrational numbers of Roberts, "The unreasonable effectiveness of
    quasirandom sequences", 2018, and a hash of their values.
    """
    np, begin, out = place.np, 1, []
    for block in like:
        entries = np.arange(begin, begin + block.size, dtype=np.float32).reshape(block.shape)
        begin += block.size
        mixed = np.sin(entries * np.float32(0.75487767) + number * np.float32(0.56984029)) * np.float32(1e4)
        share = 2 * (mixed - np.floor(mixed)) - 1
        out.append(np.where(share == 0, 0.5, share).astype(block.dtype))  # Every entry has to move.
    return out


def neighbour(place: Place, number: Any, typical: Blocks, eps: float) -> Blocks:
    """Return a step of random length, along all entries or along a single one."""
    np, begin, out = place.np, 0, []
    share = number * np.float32(0.61803399)
    length = eps ** (0.1 + 0.65 * (share - np.floor(share)))
    chosen = number // 4 % count_of(typical)
    for block, random in zip(typical, chance(place, typical, number), strict=True):
        here = (np.arange(begin, begin + block.size) == chosen).reshape(block.shape) | (number % 2 == 0)
        begin += block.size
        out.append(np.where(here, length.astype(block.dtype) * block * random, 0))
    return out
