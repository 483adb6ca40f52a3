"""The mesh that `jax.set_mesh` has set: gdopt works on it with Auto axes, and the caller with those that were set."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from gdopt import _jax
from gdopt._errors import InputError
from gdopt._types import PyTree

NAME = "jax.set_mesh"  # the name of its mesh in messages

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass
class _Caller:
    """The caller of a call."""

    explicit: Mesh | None = None  # the mesh with Explicit axes that was set
    failure: Exception | None = None  # the error of the caller's own code on the host


_caller: contextvars.ContextVar[_Caller] = contextvars.ContextVar("caller")


def mesh() -> Mesh | None:
    """Return the mesh that is set; None if there is none, or within a trace."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    try:
        found = jax.sharding.get_mesh()
    except ValueError:  # Somebody is tracing.
        return None
    return None if found.empty else found


def auto(mesh: Mesh) -> Mesh:
    """Return the mesh with Auto axes, over which XLA splits by itself; Explicit ones restrict the loss's operations."""
    if all(kind is AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_auto_axes(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that the axes of a mesh that is set are Auto within it.

    If JAX cannot compute with the arrays where they are, the function raises InputError.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = mesh()
        explicit = None if given is None or auto(given) is given else given
        caller = _Caller(explicit)
        token = _caller.set(caller)
        try:
            with contextlib.nullcontext() if explicit is None else jax.set_mesh(auto(explicit)):
                return function(*args, **kwargs)
        except Exception as error:
            if isinstance(error, InputError) or error is caller.failure or not (cure := _jax.misplaced(error)):
                raise
            raise InputError(f"the arrays of this call cannot be used together where they are. {cure}") from error
        finally:
            _caller.reset(token)

    return call


def callers_mesh() -> Mesh | None:
    """Return the mesh with Explicit axes that the caller has set, if there is one."""
    caller = _caller.get(None)
    return None if caller is None else caller.explicit


@contextlib.contextmanager
def callers_code() -> Generator[None]:
    """Run code of the caller, such as a callback, on the mesh that the caller has set. Its errors stay as they are."""
    explicit = callers_mesh()
    try:
        with contextlib.nullcontext() if explicit is None else jax.set_mesh(explicit):
            yield
    except Exception as error:
        if caller := _caller.get(None):
            caller.failure = error
        raise


def for_caller(tree: PyTree) -> PyTree:
    """Place arrays on the mesh that the caller has set, who cannot use them otherwise. Nothing is copied."""
    explicit = callers_mesh()
    if explicit is None:
        return tree

    def put(leaf: Any) -> Any:
        sharding = leaf.sharding if isinstance(leaf, jax.Array) and not _jax.is_tracer(leaf) else None
        if not isinstance(sharding, NamedSharding) or sharding.mesh == explicit:
            return leaf
        return jax.device_put(leaf, NamedSharding(explicit, sharding.spec))

    return jax.tree.map(put, tree)
