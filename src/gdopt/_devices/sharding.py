"""Params and data on many devices: placing them there, and keeping a run on their devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gdopt import _jax, _trees
from gdopt._compile import replays
from gdopt._devices import current
from gdopt._errors import InputError
from gdopt._types import PyTree

CLOSED_OVER = "what the loss closes over"  # the name of these arrays in messages
_LARGE = 2**14  # entries; a copy of a smaller array on each device costs less than gathering its parts


def shard(tree: PyTree, mesh: Mesh, *, rows: str | None = None, largest: str | None = None) -> PyTree:
    """Place params or data on the devices of a mesh, for `minimize` to work there.

    Args:
        tree: any pytree of arrays, JAX's or NumPy's. Other leaves are left as they are.
        mesh: the devices, such as ``jax.make_mesh((8,), ("data",))``.
        rows: for data: the axis of the mesh over which the leading axis of every array is split.
        largest: for params: the axis of the mesh over which each large array is split, along its largest axis that is
            divisible by the number of devices there. Arrays of fewer than 16,384 entries, and those without such an
            axis, are copied to each device. The optimizer's state is split in the same way, so each device holds its
            share of it.

    Returns:
        The tree with its arrays on the mesh; with neither ``rows`` nor ``largest``, a copy on each device. If there are
        several processes, each passes the same arrays and keeps the part for its own devices. If no process holds all
        data, use ``jax.make_array_from_process_local_data`` instead.

    Raises:
        InputError: for an axis that the mesh does not have, for a number of rows that is not divisible by the number of
            devices (with the numbers that are), and for both axes at once.

    Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023 (splitting params with
    their state over the axis of the data).

    Example:
        >>> import gdopt, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> X = gdopt.shard(jnp.ones((24, 3)), mesh, rows="data")
        >>> loss = lambda w, X: jnp.mean((X @ w - 1) ** 2)
        >>> result = gdopt.minimize(loss, jnp.zeros(3), args=(X,), learning_rate=0.1)
        >>> result.status.name
        'CONVERGED'
    """
    if not isinstance(mesh, Mesh):
        raise InputError(f"mesh={mesh!r} is not a mesh. Pass jax.make_mesh((jax.device_count(),), ('data',)).")
    if rows is not None and largest is not None:
        raise InputError(f"rows={rows!r} and largest={largest!r} were given. Pass rows for data, largest for params.")
    axis = rows if rows is not None else largest
    if axis is not None and axis not in mesh.axis_names:
        name = "rows" if rows is not None else "largest"
        raise InputError(f"{name}={axis!r} is no axis of the mesh. It has {', '.join(map(repr, mesh.axis_names))}.")
    mesh = current.auto(mesh)

    def put(path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        if rows is not None:
            _check_rows(_trees.path_name(path, "data"), leaf.shape, mesh.shape[rows], rows)
            return put_on(leaf, NamedSharding(mesh, PartitionSpec(rows)))
        spec: list[str | None] = [None] * np.ndim(leaf)
        even = [place for place, size in enumerate(leaf.shape) if axis is not None and size % mesh.shape[axis] == 0]
        if even and leaf.size >= _LARGE:
            spec[max(even, key=lambda place: leaf.shape[place])] = axis
        return put_on(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(put, tree)


def _check_rows(name: str, shape: tuple[int, ...], parts: int, axis: str) -> None:
    if not shape:
        raise InputError(f"{name} is a scalar and has no rows. Leave it out, and pass it in args=.")
    if shape[0] % parts:
        fewer = shape[0] // parts * parts
        sizes = f"{fewer} or {fewer + parts}" if fewer else f"{parts}"
        raise InputError(
            f"{name} has {shape[0]} rows, which is not divisible by the {parts} devices of axis {axis!r}. Pass {sizes} "
            f"rows, or another multiple of {parts}."
        )


def put_on(leaf: Any, sharding: Sharding) -> jax.Array:
    """Place an array. If each process holds all of it, each places its part, without comparing them."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put_on(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = _trees.on_host(leaf)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_like(leaf: Any, like: Any) -> Any:
    """Place an array on the devices of another one, if that has to stay there. An array of NumPy stays on the host."""
    if not isinstance(like, jax.Array):
        return leaf
    return put_on(leaf, like.sharding) if like.committed else _trees.on_device(leaf)


def anywhere(leaf: Any) -> Any:
    """Return shape and dtype of an array, without its place."""
    if not isinstance(leaf, jax.Array) or _jax.is_tracer(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def explicit_mesh(*trees: PyTree) -> Mesh | None:
    """Return the mesh with Explicit axes that some arrays are on."""
    meshes = [mesh for leaf in jax.tree.leaves(trees) if (mesh := _mesh(leaf)) is not None]
    return next((mesh for mesh in meshes if current.auto(mesh) is not mesh), None)


def mapped_mesh(function: Callable, *args: PyTree) -> Mesh | None:
    """Return the mesh with Explicit axes that a function maps over by `shard_map`, or that it closes over arrays on."""
    closed, _ = replays.trace(function, *args)
    if mesh := explicit_mesh(_jax.consts(closed)):
        return mesh
    meshes = [eqn.params.get("mesh") for eqn in _jax.calls(closed, "shard_map")]
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and current.auto(mesh) is not mesh), None)


def explicitly(function: Callable, mesh: Mesh, given: tuple) -> Callable:
    """Wrap a function so that its arrays are on Explicit axes, split over the mesh as those ``given`` are.

    The loop around it works on Auto axes. The arguments must have the structure of ``given``.
    """

    def spec(leaf: Any) -> PartitionSpec:
        sharding = getattr(leaf, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()

    def call(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        wanted = tuple(map(spec, jax.tree.leaves(given)))
        wanted += (PartitionSpec(),) * (len(leaves) - len(wanted))  # A key is drawn, not given.
        with jax.sharding.use_abstract_mesh(current.auto(mesh).abstract_mesh):
            inside = jax.sharding.explicit_axes(
                lambda *leaves: function(*treedef.unflatten(leaves)), axes=mesh.axis_names, in_sharding=wanted
            )
            return inside(*leaves)

    return call


class Layout(NamedTuple):
    """The placement of a run's arrays, a part of the identity of its program."""

    mesh: Mesh
    params: tuple[tuple[tuple, tuple[int, ...], NamedSharding], ...]  # paths, shapes and places
    data: tuple[NamedSharding, ...]
    state: tuple[NamedSharding, ...] = ()

    def like_params(self, tree: PyTree) -> PyTree:
        """Place every array of a tree that looks like one of the params in the same way as that one.

        For each of the params an optimizer keeps arrays of the same shape, whose paths end alike. Without this, arrays
        that a program makes would be on each device as a whole.
        """

        def constrained(path: tuple, leaf: jax.Array) -> jax.Array:
            for end, shape, sharding in self.params:
                if leaf.shape == shape and path[len(path) - len(end) :] == end:
                    return lax.with_sharding_constraint(leaf, sharding)
            return leaf

        return jax.tree_util.tree_map_with_path(constrained, tree)

    def like_state(self, tree: PyTree) -> PyTree:
        """Place the model's state as it was given."""
        if not self.state or not jax.tree.leaves(tree):
            return tree
        return lax.with_sharding_constraint(tree, jax.tree.structure(tree).unflatten(self.state))

    def packed(self, packed: _trees.Packed) -> _trees.Packed:
        """Place packed params on the devices of the params."""
        places = [sharding for _, _, sharding in self.params]
        pairs = zip(packed.others, places, strict=True)
        others = [leaf if leaf is None else lax.with_sharding_constraint(leaf, place) for leaf, place in pairs]
        return _trees.Packed(self.everywhere(packed.vectors), others, packed.treedef, packed.places)

    def batch(self, batch: PyTree) -> PyTree:
        """Place a batch with its rows over the same devices as the data."""
        return lax.with_sharding_constraint(batch, jax.tree.structure(batch).unflatten(self.data))

    def everywhere(self, tree: PyTree) -> PyTree:
        """Copy a tree to each device, so that the host of each process can read it."""
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))


def on_one_mesh(trees: dict[str, PyTree], kept: Container[str] = ()) -> tuple[dict[str, PyTree], Layout | None]:
    """Place all trees on the mesh that some arrays are on, or that `jax.set_mesh` has set.

    Arrays on no mesh are copied to each device. The trees named in ``kept`` stay on Explicit axes, if they are. Without
    a mesh nothing is moved. Raise InputError, with the names, if the arrays are on two meshes, or without a mesh
    committed to two devices.
    """
    set_by_user = current.mesh()
    around = {} if set_by_user is None else {current.NAME: set_by_user}
    if (set_by_user is None or set_by_user.size == 1) and not any(map(_mesh, jax.tree.leaves(trees))):
        _check_one_device(trees, around)
        return trees, None
    found = {name: mesh for name, leaf in _named(trees) if (mesh := _mesh(leaf)) is not None}
    auto_mesh = current.auto(_one_mesh(found, around))

    def put(leaf: Any, stays: bool) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            return leaf
        given: Any = _mesh(leaf)
        if given is not None and stays:
            return leaf
        if given is not None:
            auto = current.auto(given)
            return leaf if auto is given else jax.device_put(leaf, NamedSharding(auto, cast(Any, leaf).sharding.spec))
        return put_on(leaf, NamedSharding(auto_mesh, PartitionSpec()))

    trees = {root: jax.tree.map(functools.partial(put, stays=root in kept), tree) for root, tree in trees.items()}
    if "params" not in trees or any(
        map(_jax.is_tracer, jax.tree.leaves([trees.get(name) for name in ("params", "data", "state")]))
    ):
        return trees, None  # Within a trace the caller's program decides.
    params = tuple((path, x.shape, x.sharding) for path, x in jax.tree_util.tree_leaves_with_path(trees["params"]))
    data, state = (tuple(leaf.sharding for leaf in jax.tree.leaves(trees.get(name))) for name in ("data", "state"))
    return trees, Layout(auto_mesh, params, data, state)


def anchor(trees: dict[str, PyTree]) -> dict[str, jax.Array]:
    """Return the first array, with its name, that has to stay on its devices; nothing if there is none."""
    return next(({name: leaf} for name, leaf in _named(trees) if _is_committed(leaf)), {})


def _named(trees: dict[str, PyTree]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of all trees with their names; what is closed over has none of its own."""
    for root, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield root if root.endswith("closes over") else _trees.path_name(path, root), leaf


def _one_mesh(found: dict[str, Mesh], around: dict[str, Mesh]) -> Mesh:
    """Return the mesh of all arrays; raise InputError if there are several."""
    (first, mesh), *others = (around | found).items()
    for name, other in others:
        differ = list(other.devices.flat) != list(mesh.devices.flat)
        if differ or (first in around and dict(other.shape) != dict(mesh.shape)):
            raise InputError(
                f"{first} {_verb(first, around)} {_mesh_text(mesh)}, and {name} is on {_mesh_text(other)}. Place both "
                "on one mesh (for example with gdopt.shard)."
            )
    return mesh


def _verb(name: str, around: dict[str, Mesh]) -> str:
    return "has set" if name in around else "is on"


def _check_one_device(trees: dict[str, PyTree], around: dict[str, Mesh]) -> None:
    """Raise InputError if arrays on no mesh are committed to different devices."""
    around_here = [set(mesh.devices.flat) for mesh in around.values()]
    places = [*around_here, *(leaf.sharding.device_set for leaf in filter(_is_committed, jax.tree.leaves(trees)))]
    if all(place == places[0] for place in places):
        return
    named = [(name, leaf.sharding.device_set) for name, leaf in _named(trees) if _is_committed(leaf)]
    (first, here), *others = [*zip(around, around_here, strict=True), *named]
    name, there = next((name, place) for name, place in others if place != here)
    raise InputError(
        f"{first} {_verb(first, around)} {_devices_text(here)}, and {name} is on {_devices_text(there)}. Place both on "
        "one device (for example with jax.device_put(x, jax.devices()[0])), or on one mesh with gdopt.shard."
    )


def _is_committed(leaf: Any) -> bool:
    """Tell whether an array has to stay on its devices. Others follow these."""
    return isinstance(leaf, jax.Array) and not _jax.is_tracer(leaf) and leaf.committed


def _mesh(leaf: Any) -> Mesh | None:
    """Return the mesh that an array is on; None for an Auto mesh of a single device."""
    if not isinstance(leaf, jax.Array) or _jax.is_tracer(leaf):
        return None
    sharding = leaf.sharding
    mesh = cast(Mesh, sharding.mesh) if isinstance(sharding, NamedSharding) else None
    return mesh if mesh is not None and (mesh.size > 1 or current.auto(mesh) is not mesh) else None


def check_batch_size(data: PyTree, batch_size: int) -> None:
    """Raise InputError if a batch is not divisible by the number of devices that the data is split over."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
            continue
        axes = sharding.spec[0] if isinstance(sharding.spec[0], tuple) else (sharding.spec[0],)
        parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
        if batch_size % parts:
            fewer = batch_size // parts * parts
            raise InputError(
                f"batch_size={batch_size} is not divisible by the {parts} devices that "
                f"{_trees.path_name(path, 'data')} is split over. Pass {f'{fewer} or ' if fewer else ''}"
                f"{fewer + parts}, or another multiple of {parts}."
            )


def _devices_text(devices: Iterable[Any]) -> str:
    names = sorted(map(str, devices))
    return names[0] if len(names) == 1 else f"the devices {', '.join(names)}"


def _mesh_text(mesh: Mesh) -> str:
    shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"a mesh of ({shape}) with devices {[device.id for device in mesh.devices.flat]}"
