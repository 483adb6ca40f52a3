"""Trees beyond ``optax.tree``: norms that neither overflow nor vanish, strong types, and trees with frozen leaves."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from gdopt import _jax
from gdopt._errors import GdoptError
from gdopt._settings import own_promotion, own_work
from gdopt._types import PyTree

_TYPES = [
    *(t for t in vars(ml_dtypes).values() if isinstance(t, type) and issubclass(t, np.generic)),
    *(np.bool_, np.float16, np.float32, np.float64, np.complex64, np.complex128),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
]
SMALL = 4096  # the most entries of an array that is packed together with others
NUMBERS = frozenset(map(np.dtype, _TYPES))  # the dtypes that JAX takes: no long ones, none in another byte order


@functools.partial(jax.jit, inline=True)
def norm(tree: PyTree) -> jax.Array:
    """Return the 2-norm over all entries of all leaves, in float32 or, if a leaf is wider, in float64.

    If the plain sum of squares leaves the dtype's range, it is computed again on another scale. In float32 the sum
    overflows once an entry passes 1.8e19. It vanishes, which would read as "converged", if all are below 1e-19. The
    result is finite unless an entry is not, or the norm itself is out of range.
    """
    return norm_from(vdot(tree, tree), tree)


def norm_from(square: jax.Array, tree: PyTree) -> jax.Array:
    """Return the 2-norm of a tree whose plain sum of squares is known: see `norm`."""
    quick = jnp.sqrt(square)
    limits = jnp.finfo(quick.dtype)
    # The squares that vanish sum up to less than size * tiny. Above this limit, that is less than rounding.
    least = (sum(leaf.size for leaf in jax.tree.leaves(tree)) * float(limits.tiny) / float(limits.eps)) ** 0.5

    def scaled() -> jax.Array:
        exact = 2.0 ** (limits.maxexp * 3 // 4)  # Squares divided or multiplied by it are in range.
        scale = jnp.where(quick > 1, exact, 1 / exact).astype(quick.dtype)
        return scale * quick_norm(jax.tree.map(lambda leaf: _wide(leaf, quick.dtype) / scale, tree))

    return lax.cond((quick > least) & (quick < jnp.inf), lambda: quick, scaled)


def unit(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """Divide a tree by the size of its largest entry, and return that size; 1 if the size is 0 or not finite."""
    return over(tree, largest(tree))


def over(tree: PyTree, size: jax.Array) -> tuple[PyTree, jax.Array]:
    """Divide a tree by the known size of its largest entry: see `unit`."""
    scale = scale_of(size)
    return jax.tree.map(lambda leaf: leaf / scale, tree), scale


def scale_of(size: jax.Array) -> jax.Array:
    """Return the size of a largest entry if one may divide by it; otherwise 1."""
    return jnp.where((size > 0) & jnp.isfinite(size), size, 1)


def largest(tree: PyTree) -> jax.Array:
    """Return the largest absolute value of all entries: see `each_largest`."""
    return each_largest(tree)[0]


def each_largest(*trees: PyTree) -> list[jax.Array]:
    """Return the largest absolute value of all entries of each of several trees of one structure.

    It does not tell whether an entry is NaN: jaxlib 0.10 leaves NaN out of the maximum of 4096 numbers on a CPU.
    """
    zero = jnp.zeros((), norm_dtype(trees[0]))
    found = [zero] * len(trees)
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        if leaves[0].size:
            sizes = _together([jnp.abs(leaf).astype(zero.dtype) for leaf in leaves], zero, lax.max, jnp.max)
            found = list(map(jnp.maximum, found, sizes))
    return found


def _together(arrays: list[jax.Array], zero: jax.Array, combine: Callable, alone: Callable) -> list[jax.Array]:
    """Reduce several small arrays of one shape by one operation.

    XLA's CPU backend makes three kernels of each sum of more than 32 numbers, but one of several sums. Long sums stay
    alone, because those are exact to more digits, and run on a library's vectors.
    """
    if arrays[0].size > SMALL:
        return list(map(alone, arrays))
    each = lambda one, other: list(map(combine, one, other))
    return list(lax.reduce(arrays, [zero] * len(arrays), each, tuple(range(arrays[0].ndim))))


@functools.partial(jax.jit, inline=True)
def quick_norm(tree: PyTree) -> jax.Array:
    """Return the 2-norm in one pass; 0 or infinity instead of a norm below 1e-19 or above 1e19."""
    return jnp.sqrt(vdot(tree, tree))


@functools.partial(jax.jit, inline=True)
def all_finite(tree: PyTree) -> jax.Array:
    """Tell whether no entry of any leaf is NaN or infinite."""
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the real part of the inner product over all entries of all leaves, in the dtype of norms."""
    return vdots((a, b))[0]


def vdots(*pairs: tuple[PyTree, PyTree]) -> list[jax.Array]:
    """Return the real parts of several inner products of trees of one structure: see `vdot`."""
    zero = jnp.zeros((), norm_dtype(pairs[0][0]))
    found = [zero] * len(pairs)
    trees = [tree for pair in pairs for tree in pair]
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        wide = [_wide(leaf, zero.dtype) for leaf in leaves]
        each = list(zip(wide[::2], wide[1::2], strict=True))
        if leaves[0].size > SMALL:
            products = [jnp.vdot(x, y, precision="highest").real for x, y in each]
        else:
            products = _together([_real_product(x, y) for x, y in each], zero, lax.add, jnp.sum)
        found = list(map(lax.add, found, products))
    return found


def _real_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


def _wide(leaf: jax.Array, dtype: Any) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, dtype))


def norm_dtype(tree: PyTree) -> Any:
    """Return the real dtype in which norms of this tree are computed."""
    return _norm_dtype(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


@functools.lru_cache(maxsize=1024)
def _norm_dtype(*dtypes: Any) -> Any:
    with own_promotion():
        return jnp.result_type(jnp.float32, *(jnp.finfo(dtype).dtype for dtype in dtypes))


def select(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Select one of two trees; typed PRNG keys are allowed."""
    return jax.tree.map(lambda a, b: lax.select(condition, a, b), if_true, if_false)


def on_device(leaf: Any) -> jax.Array:
    """Return the leaf as an array of JAX, in spite of any transfer guard.

    For a number `jax.device_put` takes twice the time of `jnp.asarray`, which for an array compiles a program.
    """
    if isinstance(leaf, jax.Array):
        return leaf
    with own_work():
        return jax.device_put(leaf) if type(leaf) is np.ndarray else jnp.asarray(leaf)


def owned(leaf: Any) -> Any:
    """Return the leaf; a copy if it is an array of NumPy, with which an array of JAX may share its memory."""
    return np.array(leaf, copy=True, subok=True) if isinstance(leaf, np.ndarray) else leaf


def to_device(tree: PyTree, convert: Callable[[list[Any]], Sequence[jax.Array]] = jax.device_put) -> PyTree:
    """Return the tree with arrays of JAX in place of NumPy's, such as those that `Packed.tree` made; copy no other."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)]
    if not places:
        return tree
    with own_work():
        for place, array in zip(places, convert([leaves[place] for place in places]), strict=True):
            leaves[place] = array
    return treedef.unflatten(leaves)


def on_host(leaf: Any) -> np.ndarray:
    """Return the leaf as an array of NumPy, in spite of any guard: `jax.device_get` takes three times the time."""
    with own_work():
        return np.asarray(leaf)


def all_on_host(tree: PyTree) -> PyTree:
    """Return the tree with arrays of NumPy; those that are on the host already take no time."""
    return jax.device_get(tree) if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)) else tree


def strong(tree: PyTree) -> PyTree:
    """Remove weak types: a weak leaf would become strong after one update, and everything would be recompiled."""
    return jax.tree.map(_strong_leaf, tree)


def _strong_leaf(leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array):  # `jnp.asarray` would compile programs for a number, before all is checked.
        return on_device(np.asarray(leaf, jnp.result_type(leaf)))
    if not getattr(leaf, "weak_type", False):  # Keys have no such type.
        return leaf
    if _jax.is_tracer(leaf) or leaf.committed or leaf.size > SMALL:
        return lax.convert_element_type(leaf, leaf.dtype)
    return on_device(on_host(leaf))


def same(one: PyTree, other: PyTree) -> bool:
    """Tell whether two trees have one structure and equal leaves. NaN equals NaN; dtypes do not count."""
    try:
        (leaves, treedef), (others, other_treedef) = jax.tree.flatten(one), jax.tree.flatten(other)
        return treedef == other_treedef and all(map(_same_leaf, leaves, others))
    except GdoptError:
        raise
    except Exception:  # A leaf was deleted, or is an object that cannot be compared.
        return False


def _same_leaf(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if _jax.is_tracer(one) or _jax.is_tracer(other):
        raise GdoptError("Results were compared inside jit, vmap or grad, where their numbers have no values yet.")
    if is_key(one) and is_key(other):
        return one.dtype == other.dtype and _same_leaf(jax.random.key_data(one), jax.random.key_data(other))
    if not (is_array(one) and is_array(other)):
        return bool(one == other)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in (one, other)):
        parts = [[shard.data for shard in leaf.addressable_shards] for leaf in (one, other)]
        return one.sharding == other.sharding and all(map(_same_leaf, *parts))
    a, b = on_host(one), on_host(other)
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree with its small leaves in one vector for each dtype.

    Each array that a compiled loop carries or computes is a small program of its own for XLA. It takes 10 ms to
    compile, and on a CPU 50 ns of each step.
    """

    vectors: list[Any]
    others: list[Any]  # None in place of the small leaves
    treedef: Any = dataclasses.field(metadata={"static": True})
    # For each vector, the places of its leaves in the tree, and their shapes.
    places: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...] = dataclasses.field(metadata={"static": True})

    def tree(self) -> PyTree:
        """Unpack the tree; outside a trace, its small leaves become arrays of NumPy."""
        known = self.__dict__.get("_on_host")  # The host reads it several times.
        if known is not None:
            return known
        tree = self._unpacked()
        if not any(map(_jax.is_tracer, (*self.vectors, *self.others))):
            self.__dict__["_on_host"] = tree
        return tree

    def _unpacked(self) -> PyTree:
        leaves = list(self.others)
        for vector, places in zip(self.vectors, self.places, strict=True):
            traced, begin = _jax.is_tracer(vector), 0
            numbers = vector if traced else on_host(vector)
            for place, shape in places:
                if not (shape or traced):  # Most leaves are single numbers, and read at each chunk.
                    leaves[place], begin = numbers[begin], begin + 1
                    continue
                end = begin + math.prod(shape)
                part = lax.slice_in_dim(numbers, begin, end) if traced else numbers[begin:end]
                leaves[place] = part.reshape(shape)
                begin = end
        return self.treedef.unflatten(leaves)


def pack(tree: PyTree, most: int = 1, *, by_bits: bool = False) -> Packed:
    """Pack the leaves of at most so many entries into vectors; `Packed.tree` unpacks them.

    With ``by_bits`` single numbers are joined in a way that compiles and runs faster, but has no derivatives.
    """
    leaves, treedef = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if leaf.size <= most and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            groups.setdefault(leaf.dtype, []).append(place)
    parts = [[leaves[place].reshape(-1) for place in group] for group in groups.values()]
    vectors = [_joined(part, by_bits=by_bits) for part in parts]
    places = tuple(tuple((place, leaves[place].shape) for place in group) for group in groups.values())
    for place in itertools.chain(*groups.values()):
        leaves[place] = None
    return Packed(vectors, leaves, treedef, places)


def _joined(parts: list[Any], *, by_bits: bool) -> Any:
    """Join vectors of one dtype.

    By their bits, single numbers are put into their places by one kernel of XLA's CPU backend. It makes one for each
    number that it concatenates.
    """
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    dtype, last = parts[0].dtype, len(parts) - 1
    single = by_bits and last and all(part.size == 1 for part in parts)
    is_bool = dtype == np.dtype(bool)
    if not single or not (is_bool or _fills_bytes(dtype)):
        return jnp.concatenate(parts)
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    to_bits = lambda part: part.astype(bits) if is_bool else lax.bitcast_convert_type(part, bits)
    lanes = [lax.pad(to_bits(part), bits.type(0), [(k, last - k, 0)]) for k, part in enumerate(parts)]
    vector = functools.reduce(lax.bitwise_or, lanes)
    return vector.astype(bool) if is_bool else lax.bitcast_convert_type(vector, dtype)


def _fills_bytes(dtype: Any) -> bool:
    """Tell whether the bits of a number are those of an integer: not for pairs of numbers, nor for 4 bits and less."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return int(info.bits) == 8 * dtype.itemsize


def unpack(packed: Packed) -> PyTree:
    """Unpack a tree into arrays of JAX."""
    return jax.tree.map(on_device, packed.tree())


def as_real(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Split complex leaves into (real, imaginary), and return the way back, too.

    A real loss is not a complex-linear function of complex leaves.
    """
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    split = lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
    join = lambda dtype, parts: (lax.complex(*parts) if len(parts) == 2 else parts[0]).astype(dtype)
    return jax.tree.map(split, params), lambda real: jax.tree.map(join, dtypes, real)


def copy(tree: PyTree) -> PyTree:
    """Copy a tree into new buffers, which may be donated."""
    return jax.tree.map(jnp.copy, tree)


def is_array(leaf: Any) -> bool:
    """Tell whether jit takes the leaf as a value: an array, or a number of NumPy or Python."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype in NUMBERS
    return isinstance(leaf, jax.Array | bool | int | float | complex)


def have_values(*leaves: Any) -> bool:
    """Tell whether this process can read all entries of arrays or numbers: none is traced, or held by another one."""
    return not any(_jax.is_tracer(leaf) or not getattr(leaf, "is_fully_addressable", True) for leaf in leaves)


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf holds typed PRNG keys, which have no arithmetic."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rest:
    """The leaves that ``partition`` took out of a tree: a pytree of arrays, hashable if all others are."""

    arrays: tuple  # None in place of the leaves that stayed and of the others
    others: tuple = dataclasses.field(metadata={"static": True})
    treedef: Any = dataclasses.field(metadata={"static": True})
    kept: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    # The representations distinguish values that == does not: 1 and True, 0.0 and -0.0.
    numbers: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def leaves(self) -> list[Any]:
        """Return the leaves that were taken out, and None in place of those that stayed."""
        pairs = zip(self.arrays, self.others, strict=True)
        return [other if array is None else array for array, other in pairs]

    def only(self, leaves: Sequence[Any], other: Any = None) -> PyTree:
        """Return the tree of these leaves, with ``other`` in place of those that were taken out."""
        return self.treedef.unflatten(leaf if keep else other for leaf, keep in zip(leaves, self.kept, strict=True))

    def combine(self, some: PyTree) -> PyTree:
        """Rebuild the whole tree, with ``some`` in the places that stayed."""
        found = self.treedef.flatten_up_to(some)
        places = zip(found, self.leaves(), self.kept, strict=True)
        return self.treedef.unflatten(new if keep else old for new, old, keep in places)


def partition(tree: PyTree, kept: Sequence[bool]) -> tuple[PyTree, Rest]:
    """Split a tree: return it with None in place of each leaf that is not kept, and those leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    some = treedef.unflatten(leaf if keep else None for leaf, keep in zip(leaves, kept, strict=True))
    rest = [None if keep else leaf for leaf, keep in zip(leaves, kept, strict=True)]
    numbers = tuple(repr(leaf) for leaf in rest if isinstance(leaf, bool | int | float | complex))
    traced = [isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray) and is_array(leaf)) for leaf in rest]
    arrays = tuple(leaf if array else None for leaf, array in zip(rest, traced, strict=True))
    others = tuple(None if array else leaf for leaf, array in zip(rest, traced, strict=True))
    return some, Rest(arrays, others, treedef, tuple(kept), numbers)


def spread(prefix: PyTree, tree: PyTree) -> list[Any]:
    """Return for each leaf of a tree the leaf of its prefix that stands for it; raise JAX's error if there is none."""
    full = jax.tree.map(lambda entry, part: jax.tree.map(lambda _: entry, part), prefix, tree)
    return jax.tree.structure(tree).flatten_up_to(full)


def in_module(treedef: Any, _module: bool = False) -> list[bool]:
    """Tell for each leaf whether its parent is a registered class rather than a dict, list or (named) tuple."""
    if jax.tree_util.treedef_is_leaf(treedef):
        return [_module] * treedef.num_leaves
    kind = treedef.node_data()[0]
    inside = not issubclass(kind, dict | list | tuple)
    return [flag for child in treedef.children() for flag in in_module(child, inside)]


def path_name(path: tuple, root: str = "params") -> str:
    """Write the path of a leaf as in Python: ``params['layers'][0].weight``."""
    return root + jax.tree_util.keystr(path)


def named_leaves(tree: PyTree, root: str) -> dict[str, Any]:
    """Return the leaves of a tree by their paths; nodes may give the same path to several leaves, which are marked."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path, root)
        while name in named:
            name += "'"
        named[name] = leaf
    return named


def is_plain(treedef: Any) -> bool:
    """Tell whether a tree is made of tuples, lists and dicts with strings as keys, so that equal ones are the same.

    Equal nodes of other kinds (for example modules with static fields) may differ: 1 == True, and 0.0 == -0.0.
    """
    if jax.tree_util.treedef_is_leaf(treedef):
        return True
    data = treedef.node_data()
    if data is None:
        return True
    kind, keys = data
    named = issubclass(kind, dict) and all(type(key) is str for key in keys)
    return (named or issubclass(kind, tuple | list)) and all(map(is_plain, treedef.children()))


def summary(tree: PyTree) -> str:
    """A few numbers as they are; more of them by dtype and shape; of what has a repr that raises, the type."""

    def leaf_summary(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        if _is_readable(leaf) and leaf.size <= 6:
            text = np.array2string(on_host(leaf), separator=", ", precision=6, formatter={"float_kind": _digits})
            return _Bare(text.replace("\n", ""))
        return _Bare(f"{getattr(leaf.dtype, 'name', leaf.dtype)}[{', '.join(map(str, leaf.shape))}]")

    try:
        return repr(jax.tree.map(leaf_summary, tree))
    except Exception:  # raised by somebody's repr
        return f"<{type(tree).__name__}>"


def _digits(number: Any) -> str:
    """Return six significant digits. NumPy would round a small number to so many decimals."""
    text = f"{float(number):.6g}"
    return f"{text}." if text.removeprefix("-").isdigit() else text


def _is_readable(leaf: Any) -> bool:
    """Tell whether it is an array of numbers that this process holds."""
    if not isinstance(leaf, jax.Array):
        return isinstance(leaf, np.ndarray | np.generic)
    return not (_jax.is_tracer(leaf) or is_key(leaf) or leaf.is_deleted()) and leaf.is_fully_addressable


class _Bare(str):
    """A text that prints without quotes inside a container."""

    def __repr__(self) -> str:
        return str(self)
