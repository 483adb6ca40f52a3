"""Penalties that have kinks, by their proximal steps: each function makes a `Prox` for ``minimize(..., prox=)``.

The proximal step of a penalty P at x with a rate t is the z with the least ``P(z) + |z - x|**2 / (2 t)``. It is exact
for each penalty here, so entries, groups and singular values become zero, not merely small. Any function
``(params, rate) -> params`` that makes such a step may stand for one.

Weights are a number, an array, or a pytree of them that is a prefix of params, with 0 or None for what is not penalised
(an intercept, for example). Leaves keep their dtypes. Leaves of float16 and bfloat16 are computed in float32, and
leaves that are neither float nor complex are left alone. Weights are inputs of compiled programs, so other weights
compile nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _trees
from gdopt._checks import fault, flatten
from gdopt._errors import InputError
from gdopt._settings import in_own_promotion
from gdopt._types import PyTree, Scalar

__all__ = ["Prox", "box", "group_lasso", "l1", "nuclear"]


def __dir__() -> list[str]:
    return __all__


class Prox(NamedTuple):
    """A penalty and its proximal step.

    `minimize` adds the value to the loss, and reports the sum. Make one of two functions for a penalty of your own:
    ``Prox(step, value)``. Both are traced, so they are made of JAX operations.

    Attributes:
        step: ``(params, rate) -> params``, the point with the least ``value(z) + |z - params|**2 / (2 rate)``.
        value: ``params -> penalty``, a real scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from gdopt import prox
        >>> ridge = prox.Prox(lambda x, rate: x / (1 + rate), lambda x: jnp.sum(x**2) / 2)
        >>> float(ridge(jnp.array(3.0), 0.5)), float(ridge.value(jnp.array(3.0)))
        (2.0, 4.5)
    """

    step: Callable[[PyTree, Any], PyTree]
    value: Callable[[PyTree], jax.Array]

    def __call__(self, params: PyTree, rate: Scalar) -> PyTree:
        """Make the proximal step at a rate, 0 or above."""
        return self.step(params, rate)


def l1(weight: PyTree) -> Prox:
    """Return the penalty ``weight * sum(|x|)``, the lasso, whose step moves each entry towards 0, and stops there.

    The absolute value of a complex entry is its modulus. scikit-learn's ``Lasso(alpha)`` minimises
    ``mean((X w - y)**2) / 2 + alpha * sum(|w|)``.

    Args:
        weight: a finite number, 0 or above, an array with one for each entry of a leaf, or a prefix of params with
            them; 0 or None for leaves that are not penalised.

    Raises:
        InputError: for weights that are negative, NaN, infinite or no numbers; at the first step for those that do not
            fit params.

    Source: Donoho, "De-noising by soft-thresholding", IEEE Transactions on Information Theory 41, 1995; Tibshirani,
    "Regression shrinkage and selection via the lasso", 1996.

    Example:
        >>> import jax.numpy as jnp
        >>> from gdopt import prox
        >>> lasso = prox.l1({"w": 0.5, "b": None})
        >>> params = {"w": jnp.array([3.0, -0.1, -2.0]), "b": jnp.array(7.0)}
        >>> print(lasso(params, 2.0)["w"], lasso(params, 2.0)["b"])
        [ 2.  0. -1.] 7.0
        >>> float(lasso.value(params))
        2.55
    """
    return _made(weight, _l1_leaf, _l1_value)


def group_lasso(weight: PyTree, axis: int | tuple[int, ...] | None = -1) -> Prox:
    """Return the penalty ``weight * sum(|group|)`` with the 2-norm of each group, which makes whole groups zero.

    Args:
        weight: a finite number, 0 or above, an array with one for each group of a leaf (its shape without ``axis``), or
            a prefix of params with them; 0 or None for leaves that are not penalised. Yuan and Lin take the square root
            of the number of entries of a group, times a common number.
        axis: the axis, or axes, over which the norm is taken. The default is the last one, so that a group is a row of
            a matrix, as in scikit-learn's ``MultiTaskLasso`` for params of shape (features, tasks), and a vector is one
            group. None takes each leaf as one group. A scalar is always one.

    Raises:
        InputError: for weights that are negative, NaN, infinite or no numbers; an axis that is no whole number; at the
            first step for weights that do not fit params, and for an axis that a leaf does not have.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", Journal of the Royal
    Statistical Society B 68, 2006; the step is that of Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.4.

    Example:
        >>> import jax.numpy as jnp
        >>> from gdopt import prox
        >>> rows = jnp.array([[3.0, 4.0], [0.3, -0.4]])
        >>> groups = prox.group_lasso(1.0)
        >>> print(groups(rows, 1.0))
        [[2.4 3.2]
         [0.  0. ]]
        >>> float(groups.value(rows))
        5.5
    """
    return _made(weight, functools.partial(_group_leaf, _axes(axis)), functools.partial(_group_value, _axes(axis)))


def nuclear(weight: PyTree) -> Prox:
    """Return the penalty ``weight * sum(singular values)``, whose step lowers the rank of a matrix.

    The matrices are the last two axes of a leaf. Each step takes a singular value decomposition. Derivatives exist
    also if singular values are equal or zero.

    Args:
        weight: a finite number, 0 or above, an array with one for each matrix of a leaf (its shape without the last two
            axes), or a prefix of params with them; 0 or None for leaves that are not penalised.

    Raises:
        InputError: for weights that are negative, NaN, infinite or no numbers; at the first step for those that do not
            fit params, and for a leaf with a weight that has fewer than two axes.

    Source: Cai, Candès and Shen, "A singular value thresholding algorithm for matrix completion", SIAM Journal on
    Optimization 20, 2010; the derivative is that of Lewis and Sendov, "Nonsmooth analysis of singular values", 2005.

    Example:
        >>> import jax.numpy as jnp
        >>> from gdopt import prox
        >>> low_rank = prox.nuclear(0.5)
        >>> print(low_rank(jnp.diag(jnp.array([3.0, 0.25])), 1.0))
        [[2.5 0. ]
         [0.  0. ]]
        >>> float(low_rank.value(jnp.diag(jnp.array([3.0, 0.25]))))
        1.625
    """
    return _made(weight, _nuclear_leaf, _nuclear_value)


def box(lower: PyTree, upper: PyTree) -> Prox:
    """Return the penalty that is 0 between two bounds and infinite elsewhere: its step clips.

    For bounds alone ``minimize(bounds=(lower, upper))`` does more: it knows which entries are at their bounds.

    Args:
        lower, upper: numbers, arrays with one for each entry of a leaf, or prefixes of params with them; None and
            infinity for no bound. The bounds are a part of the box. They are rounded to the dtype of the leaf.

    Raises:
        InputError: for bounds that are NaN or no real numbers, a lower bound above the upper one; at the first step for
            bounds that do not fit params, and for those of complex leaves.

    Source: Parikh and Boyd, "Proximal Algorithms", 2014, section 6.2.4.

    Example:
        >>> import jax.numpy as jnp
        >>> from gdopt import prox
        >>> upright = prox.box(0.0, jnp.array([1.0, jnp.inf]))
        >>> print(upright(jnp.array([3.0, -2.0]), 1.0), upright.value(jnp.array([1.0, 5.0])))
        [1. 0.] 0.0
    """
    bounds = _checked("lower", lower, _bound), _checked("upper", upper, _bound)
    if jax.tree.structure(bounds[0]) == jax.tree.structure(bounds[1]):
        lows, highs = map(jax.tree_util.tree_leaves_with_path, bounds)
        for (path, low), (_, high) in zip(lows, highs, strict=True):
            if low.shape == high.shape or not (low.ndim and high.ndim):
                _refuse_crossed(_trees.path_name(path, ""), low, high)
    return Prox(functools.partial(_clipped, *bounds), functools.partial(_outside, *bounds))


# --- weights: checked when a Prox is made, and spread over the leaves of params when it is used ---


def _made(weight: PyTree, step: Callable, value: Callable) -> Prox:
    """Make a `Prox` of two functions of a leaf. The weights stand beside them, where a trace finds them as arrays."""
    weights = _checked("weight", weight, _weight)
    return Prox(functools.partial(_stepped, step, weights), functools.partial(_summed, value, weights))


def _checked(name: str, tree: PyTree, check: Callable[[str, np.ndarray], None]) -> PyTree:
    """Return the numbers of a tree as arrays; None stays, and stands for a number 0 that is a weight."""
    flatten(name, tree)
    make = lambda path, leaf: _array(_trees.path_name(path, name), leaf, check)
    return jax.tree_util.tree_map_with_path(make, tree, is_leaf=_is_none)


def _array(name: str, value: Any, check: Callable[[str, np.ndarray], None]) -> jax.Array | np.ndarray | None:
    """Return a number as an array, in float64 on the host: x64 may be switched on later."""
    if value is None:
        return None
    if why := fault(value, carried=True):
        raise InputError(f"{name} {why}.")
    if not _trees.is_array(value) or _trees.is_key(value) or jnp.result_type(value).kind in "bc":
        raise InputError(f"{name}={value!r} is no real number. Pass numbers, arrays of them, or a prefix of params.")
    if not _trees.have_values(value):
        return value
    host = _trees.on_host(value)
    check(name, host)
    if check is _weight and not host.shape and host == 0:
        return None
    return _trees.strong(value) if isinstance(value, jax.Array) else np.array(host, float)


def _weight(name: str, value: np.ndarray) -> None:
    bad = ~(np.isfinite(value) & (value >= 0))
    if bad.any():
        raise InputError(
            f"{name}={value[bad].flat[0]} is no weight. Pass finite numbers, 0 or above; 0 or None for params that are "
            "not to be penalised."
        )


def _bound(name: str, value: np.ndarray) -> None:
    empty = np.inf if name.startswith("lower") else -np.inf
    bad = np.isnan(value) | (value == empty)
    if bad.any():
        raise InputError(f"{name}={value[bad].flat[0]} is no bound. Pass a number, or None for no bound.")


def _refuse_crossed(path: str, lower: Any, upper: Any) -> None:
    if lower is None or upper is None or not _trees.have_values(lower, upper):
        return
    low, high = np.broadcast_arrays(_trees.on_host(lower), _trees.on_host(upper))
    if (low > high).any():
        at = tuple(int(i) for i in np.argwhere(low > high)[0])
        index = f"{path}[{', '.join(map(str, at))}]" if at else path
        raise InputError(f"lower{index}={low[at]} is above upper{index}={high[at]}. Swap them, or leave one out.")


def _is_none(node: Any) -> bool:
    return node is None


def _spread(name: str, prefix: PyTree, params: PyTree) -> list[Any]:
    """Return for each leaf of params the leaf of a prefix that stands for it, as an array of JAX.

    In a trace these arrays are constants, which a program that is shared takes as inputs. A number would be written
    into the trace.
    """
    try:
        spread = lambda entry, part: jax.tree.map(lambda _: entry, part)
        full = jax.tree.map(spread, prefix, params, is_leaf=_is_none)
        found = jax.tree.structure(params).flatten_up_to(full)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{name}={_trees.summary(prefix)} does not fit params. Pass a number for each leaf or subtree of params, "
            f"or an array (not a list) for a leaf. ({error})"
        ) from error
    with jax.ensure_compile_time_eval():
        return [None if leaf is None else _trees.on_device(leaf) for leaf in found]


class _Leaf(NamedTuple):
    """A leaf of params that has a weight."""

    place: int
    path: tuple
    array: jax.Array  # in float32 or a wider dtype
    weight: jax.Array  # in the real dtype of the array

    @property
    def name(self) -> str:
        return _trees.path_name(self.path)

    def expect(self, shape: tuple[int, ...], what: str) -> None:
        """Raise InputError if the weight is neither a number nor of this shape."""
        if self.weight.ndim and self.weight.shape != shape:
            raise InputError(
                f"the weight of {self.name} has shape {self.weight.shape}. Pass a number, or an array of shape "
                f"{shape}, which has a weight for each {what}."
            )


def _weighted(weights: PyTree, params: PyTree) -> Iterator[_Leaf]:
    """Yield the leaves of params that are penalised."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), _spread("weight", weights, params), strict=True)
    for place, ((path, leaf), weight) in enumerate(pairs):
        if weight is None or not _is_inexact(leaf):
            continue
        array = _wide(jnp.asarray(leaf))
        if array.size:
            yield _Leaf(place, path, array, weight.astype(jnp.finfo(array.dtype).dtype))


def _is_inexact(leaf: Any) -> bool:
    return _trees.is_array(leaf) and not _trees.is_key(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


@in_own_promotion
def _stepped(step: Callable, weights: PyTree, params: PyTree, rate: Any) -> PyTree:
    """Replace each leaf that is penalised by ``step(leaf, threshold)``."""
    leaves, treedef = jax.tree.flatten(params)
    for leaf in _weighted(weights, params):
        # An infinite rate would make NaN of a weight of zero.
        dtype = leaf.weight.dtype
        bounded = jnp.minimum(jnp.asarray(rate).astype(dtype), jnp.finfo(dtype).max)
        new = step(leaf, leaf.weight * bounded)
        leaves[leaf.place] = new.astype(jnp.result_type(leaves[leaf.place]))
    return treedef.unflatten(leaves)


@in_own_promotion
def _summed(value: Callable, weights: PyTree, params: PyTree) -> jax.Array:
    """Return the sum of ``value(leaf)``, in float32 or, if a leaf is wider, in its dtype."""
    floats = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params) if _is_inexact(leaf)]
    dtype = _trees.norm_dtype(floats)
    parts = [jnp.sum(leaf.weight * value(leaf)).astype(dtype) for leaf in _weighted(weights, params)]
    return sum(parts, jnp.zeros((), dtype))


# --- the penalties of one leaf ---
#
# A derivative also passes through the branch that `where` does not select, and 0 times infinity is NaN. So what such a
# branch would divide by, or multiply, is replaced by a harmless number first.


def _l1_leaf(leaf: _Leaf, threshold: jax.Array) -> jax.Array:
    leaf.expect(leaf.array.shape, "entry")
    x = leaf.array
    if jnp.iscomplexobj(x):
        return _shrunk(x, jnp.abs(x), threshold)
    is_zero = (jnp.abs(x) <= threshold) & (threshold > 0)
    return jnp.where(is_zero, 0, x - jnp.sign(x) * jnp.where(is_zero, 0, threshold))


def _l1_value(leaf: _Leaf) -> jax.Array:
    leaf.expect(leaf.array.shape, "entry")
    return jnp.abs(leaf.array)


def _shrunk(x: jax.Array, size: jax.Array, threshold: jax.Array) -> jax.Array:
    """Shorten groups of these sizes by a threshold, at most to zero. A threshold of zero changes nothing."""
    is_zero = (size <= threshold) & (threshold > 0)
    factor = 1 - jnp.where(is_zero, 0, threshold) / jnp.where(is_zero | (size == 0), 1, size)
    return jnp.where(is_zero, 0, x * factor.astype(x.dtype))


def _axes(axis: Any) -> tuple[int, ...] | None:
    """Return the axes as a tuple, None for all."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    if axis is not None and not all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in axes):
        raise InputError(f"axis={axis!r} is no axis. Pass a whole number, a tuple of them, or None for whole leaves.")
    return None if axis is None else tuple(map(int, axes))


def _group_sizes(axes: tuple[int, ...] | None, leaf: _Leaf) -> tuple[jax.Array, tuple[int, ...]]:
    """Return the 2-norms of the groups of a leaf, which keep their axes, and the axes."""
    shape = leaf.array.shape
    if axes is None or not shape:
        over = tuple(range(len(shape)))
    elif not all(-len(shape) <= axis < len(shape) for axis in axes):
        raise InputError(f"axis={axes} is more than {leaf.name} has, whose shape is {shape}. Pass axes that it has.")
    else:
        over = tuple(sorted({axis % len(shape) for axis in axes}))
    leaf.expect(tuple(size for axis, size in enumerate(shape) if axis not in over), "group")
    return _norm(leaf.array, over), over


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return 2-norms that neither overflow nor vanish, whose derivative at zero is zero."""
    sizes = jnp.abs(x)
    largest = lax.stop_gradient(sizes.max(axis=axes, keepdims=True))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.sum((sizes / scale) ** 2, axis=axes, keepdims=True)
    some = squares > 0
    return jnp.where(some, scale * jnp.sqrt(jnp.where(some, squares, 1)), squares)


def _group_leaf(axes: tuple[int, ...] | None, leaf: _Leaf, threshold: jax.Array) -> jax.Array:
    sizes, over = _group_sizes(axes, leaf)
    return _shrunk(leaf.array, sizes, jnp.expand_dims(threshold, over) if threshold.ndim else threshold)


def _group_value(axes: tuple[int, ...] | None, leaf: _Leaf) -> jax.Array:
    sizes, over = _group_sizes(axes, leaf)
    return sizes.squeeze(over)


def _check_matrices(leaf: _Leaf) -> None:
    if leaf.array.ndim < 2:
        raise InputError(
            f"{leaf.name} has shape {leaf.array.shape}, but prox.nuclear needs matrices. Pass a weight of None for it."
        )
    leaf.expect(leaf.array.shape[:-2], "matrix")


def _nuclear_leaf(leaf: _Leaf, threshold: jax.Array) -> jax.Array:
    _check_matrices(leaf)
    return _lower_rank(leaf.array, jnp.broadcast_to(threshold, leaf.array.shape[:-2]))


def _nuclear_value(leaf: _Leaf) -> jax.Array:
    _check_matrices(leaf)
    return jnp.linalg.svd(leaf.array, compute_uv=False).sum(axis=-1)


@jax.custom_jvp
def _lower_rank(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """Lower the singular values by a threshold, at most to zero. A threshold of zero changes nothing.

    JAX's derivative of singular vectors is NaN if two singular values are equal. That of the product is not.
    """
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    lower = jnp.maximum(s - threshold[..., None], 0)
    return jnp.where(threshold[..., None, None] == 0, x, _times(u * lower[..., None, :].astype(u.dtype), vh))


@_lower_rank.defjvp
def _lower_rank_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Move each pair of singular directions by the difference quotient of the shrinkage, as an odd function.

    In the basis of the singular vectors the hermitian part of the tangent has the quotients of the singular values i
    and j, the other part those of i and -j, and the directions that the thin decomposition leaves out those of i and 0.
    """
    (x, threshold), (x_dot, threshold_dot) = primals, tangents
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    uh, v = _adjoint(u), _adjoint(vh)
    t = threshold[..., None]
    lower = jnp.maximum(s - t, 0)
    quotient = lambda above, below: jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
    own = quotient(lower, s)
    high, low = jnp.maximum(s[..., :, None], s[..., None, :]), jnp.minimum(s[..., :, None], s[..., None, :])
    same = jnp.where(low > t[..., None], 1, quotient(jnp.maximum(high - t[..., None], 0), high - low))
    opposite = quotient(lower[..., :, None] + lower[..., None, :], high + low)
    inside = _times(_times(uh, x_dot), v)
    hermitian, other = (inside + _adjoint(inside)) / 2, (inside - _adjoint(inside)) / 2
    core = same.astype(u.dtype) * hermitian + opposite.astype(u.dtype) * other
    columns = (_times(x_dot, v) - _times(u, inside)) * own[..., None, :].astype(u.dtype)
    rows = own[..., :, None].astype(u.dtype) * (_times(uh, x_dot) - _times(inside, vh))
    moved = _times(_times(u, core) + columns, vh) + _times(u, rows)
    moved = jnp.where(t[..., None] == 0, x_dot, moved)
    kept = jnp.where(s > t, threshold_dot[..., None], 0)[..., None, :].astype(u.dtype)
    return _lower_rank(x, threshold), moved - _times(u * kept, vh)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


# --- bounds ---


def _bounded(lower: PyTree, upper: PyTree, params: PyTree) -> Iterator[tuple[int, jax.Array, Any, Any]]:
    """Yield the leaves of params that have bounds, with their places and their bounds."""
    pairs = zip(_spread("lower", lower, params), _spread("upper", upper, params), strict=True)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for place, ((path, leaf), (low, high)) in enumerate(zip(leaves, pairs, strict=True)):
        if (low is None and high is None) or not _is_inexact(leaf):
            continue
        x, name = jnp.asarray(leaf), _trees.path_name(path)
        if jnp.iscomplexobj(x):
            raise InputError(f"{name} is complex, and complex numbers have no order. Pass None as its bounds.")
        for which, bound in (("lower", low), ("upper", high)):
            if bound is not None and bound.ndim and bound.shape != x.shape:
                raise InputError(
                    f"the {which} bound of {name} has shape {bound.shape}, but the leaf has {x.shape}. Pass a number, "
                    "or an array of that shape."
                )
        _refuse_crossed(_trees.path_name(path, ""), low, high)
        low, high = (None if bound is None else bound.astype(x.dtype) for bound in (low, high))
        yield place, x, low, high


@in_own_promotion
def _clipped(lower: PyTree, upper: PyTree, params: PyTree, rate: Any) -> PyTree:
    """Clip params, at any rate. The derivative of an entry on its bound is that of a free one."""
    leaves, treedef = jax.tree.flatten(params)
    for place, x, low, high in _bounded(lower, upper, params):
        if low is not None:
            x = jnp.where(x < low, low, x)
        if high is not None:
            x = jnp.where(x > high, high, x)
        leaves[place] = x
    return treedef.unflatten(leaves)


@in_own_promotion
def _outside(lower: PyTree, upper: PyTree, params: PyTree) -> jax.Array:
    """Return 0 if all entries are within their bounds, infinity if one is not."""
    dtype = _trees.norm_dtype([jnp.asarray(leaf) for leaf in jax.tree.leaves(params) if _is_inexact(leaf)])
    value = jnp.zeros((), dtype)
    for _, x, low, high in _bounded(lower, upper, params):
        over = jnp.zeros((), bool) if low is None else jnp.any(x < low)
        over = over if high is None else over | jnp.any(x > high)
        value = jnp.where(over, jnp.inf, value)
    return value
