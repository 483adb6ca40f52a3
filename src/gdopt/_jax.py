"""All parts of JAX that gdopt uses and that are not public API, each with its purpose.

No other module imports one. `replays`, `fingerprints`, `lints` and `nan_search` walk through traces, and read only the
parts that are listed here. Nothing is imported from ``jax._src``.

The tests run on JAX 0.9.2, 0.10.2 and 0.12.0.1. If a part is missing or has changed on another release, `fingerprints`
detects that before the first program is shared. Then no program is shared, which is slower but never wrong.

Part: its purpose; the first JAX that has it; its replacement.

- ``ClosedJaxpr.jaxpr``, ``.consts``, ``.effects``: the arrays that a trace holds; always, and since 0.11 one class with
  ``Jaxpr``; ``getattr(x, "jaxpr", x)`` does without the first.
- ``Jaxpr.constvars``, ``.invars``, ``.outvars``, ``.eqns``, ``.replace``: to compare, replay and copy a trace; always;
  nothing.
- ``JaxprEqn.primitive``, ``.params``, ``.invars``, ``.outvars``, ``.effects``, ``.replace``: likewise.
- ``JaxprEqn.ctx.manager``: the settings that an operation was traced under (``enable_x64``, a mesh); 0.4.36; nothing.
- ``JaxprEqn.source_info``: the user's line in `diagnose`; always; no line is shown without it.
- the names that end in ``_p`` in JAX's modules: is an operation JAX's own? always; without them nothing is shared.
- ``Primitive.name``, ``.multiple_results``, ``.bind``, ``.get_bind_params``: to replay an operation; always; nothing.
- ``Literal(val, aval)``, ``Var.aval``, ``ShapedArray.weak_type``: the numbers in a trace; always; nothing.
- the cells ``fn`` and ``jvp`` of what ``custom_jvp_call`` has as its rule, ``WrappedFun.f`` and ``.f_transformed``: is
  it a rule of JAX's own? 0.9; without them such a loss is traced with its gradient at each call.
- names of operations and of their parameters (in `replays` and `fingerprints`); an unknown one is left as it is.
- ``jax.typeof(x).manual_axis_type.varying``, before 0.10 ``.vma``: what differs between devices within a `shard_map`;
  without it JAX's own errors are raised.
- ``jax.core.Tracer``: is somebody tracing? always; nothing.
- ``Tracer._trace``: is it of a trace that is over? always; without it every tracer counts as such, which is slower.
- the texts of errors on arrays that cannot be used together (in `misplaced`); without them JAX's own errors are raised.
- ``jax.config.values``: all settings distinguish programs; always; a list of names.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core


@functools.cache
def _classes() -> tuple[tuple[type, ...], type]:
    """Return the classes of traces, and that of literals, as read from a trace.

    `jax.extend.core`, which has names for them, takes 20 ms to import and changes the names.
    """
    closed: Any = jax.make_jaxpr(lambda: 1.0)()
    return (type(closed), type(opened(closed))), type(opened(closed).outvars[0])


def is_jaxpr(value: Any) -> bool:
    """Tell whether it is a trace, with its arrays or without."""
    return isinstance(value, _classes()[0])


_own_primitives: set[int] = set()  # by `id`, because a module of JAX keeps each of them


def is_own(primitive: Any) -> bool:
    """Tell whether an operation is one of JAX's own, which are attributes of its modules."""
    if id(primitive) not in _own_primitives:  # A module may have been imported since the last look.
        modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("jax", "jaxlib")]
        named = (item for module in modules for item in list(vars(module).items()) if item[0].endswith("_p"))
        _own_primitives.update(id(value) for _, value in named)
    return id(primitive) in _own_primitives


def rule_of(eqn: Any) -> tuple[Any, Any] | None:
    """Return the function that is the rule of a ``custom_jvp_call``, and the structure of its arguments.

    None if these are not found, or if the function is called with more than the arguments of the operation.
    """
    try:
        wrapped = cell(cell(eqn.params["jvp_jaxpr_fun"].f, "fn"), "jvp")
        flat = wrapped.f_transformed
        (treedef,) = (given for given in flat.args if isinstance(given, jax.tree_util.PyTreeDef))
        inner = flat.args[0]
        plain = inner.func is wrapped.f and not inner.args and not inner.keywords and not flat.keywords
        return (wrapped.f, treedef) if plain and flat.func.__name__ == "_flatten_jvp" else None
    except Exception:
        return None


def cell(function: Any, name: str) -> Any:
    """Return what a function closes over by a name."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def is_literal(atom: Any) -> bool:
    """Tell whether an operand is a value that is written into the trace."""
    return isinstance(atom, _classes()[1])


def is_tracer(value: Any) -> bool:
    """Tell whether JAX is tracing the value, so that it has no number yet."""
    return isinstance(value, jax.core.Tracer)


def is_tracing() -> bool:
    """Tell whether jit, vmap or grad traces the code that runs now. It may do so without tracing each new array."""
    try:
        jax.sharding.get_mesh()
    except ValueError:  # It has no answer within a trace.
        return True
    return False


def level(tracer: Any) -> int:
    """Return a number that the tracers of one trace share, and that no other trace has while one of them is alive."""
    return id(getattr(tracer, "_trace", None))


def opened(closed: Any) -> Any:
    """Return the trace itself, whose ``constvars`` stand for the arrays of `consts`."""
    return getattr(closed, "jaxpr", closed)


def consts(closed: Any) -> list[Any]:
    """Return the arrays that a trace holds; none if its arrays are passed to it."""
    return list(getattr(closed, "consts", ()))


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the traces among the parameters of an operation, such as the body of a loop."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if is_jaxpr(item):
                yield item


def calls(closed: Any, name: str) -> Iterator[Any]:
    """Yield the operations of this name in a trace, however deep."""
    for eqn in opened(closed).eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in inner_jaxprs(eqn.params):
            yield from calls(inner, name)


def varying(value: Any) -> frozenset[str]:
    """Return the axes of a `shard_map` around the trace over which a value differs, as far as JAX tracks them."""
    kind: Any = jax.typeof(value)
    return getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", frozenset())


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of an operation of a trace for these inputs."""
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def attributes(value: Any) -> dict[str, Any]:
    """Return everything that an object of JAX's own holds, as far as Python shows it."""
    slots = itertools.chain(*(getattr(kind, "__slots__", ()) for kind in type(value).__mro__))
    names = [name for name in slots if name != "__weakref__" and hasattr(value, name)]
    return {name: getattr(value, name) for name in names} | getattr(value, "__dict__", {})


def lines(eqn: Any) -> list[tuple[str, int, str]]:
    """Return file, line and function that an operation was traced from, innermost first; nothing if not known."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    return [(frame.file_name, frame.line_num, frame.function_name) for frame in getattr(traceback, "frames", ())]


def is_backward(eqn: Any) -> bool:
    """Tell whether reverse-mode differentiation added the operation."""
    return "transpose" in str(getattr(getattr(eqn, "source_info", None), "name_stack", ""))


_MISPLACED = {
    "memory_space of all inputs": (
        "Some are in the memory of the host. Move them to the device first (for example with jax.device_put(x, "
        "x.sharding.with_memory_kind('device')))."
    ),
    "incompatible devices|change the size of the mesh": (
        "They are on different devices. Place params, data, args and what the loss closes over on one device with "
        "jax.device_put, or on one mesh with gdopt.shard."
    ),
    "manual ax": (
        "The call is inside jax.shard_map, which tracks the devices over which values differ. Pass check_vma=False to "
        "jax.shard_map."
    ),
    "ShardingTypeError|context mesh .* should match|[Mm]esh for all inputs|not found in mesh|out.sharding"
    "|in_specs passed to shard_map": (
        "Some are on a mesh with Explicit axes, where each operation has to say how its result is split. Use a mesh "
        "with Auto axes, as gdopt.shard does; or pass such arrays in params, data or args, and outside of jit, vmap, "
        "grad and shard_map, where gdopt reads their axes as Auto ones."
    ),
}


def misplaced(error: Exception) -> str:
    """Say what to do about JAX's error that arrays cannot be used together where they are; "" for any other error.

    JAX has no class for these errors, but for one that is not public. Those that it has a class for show programs, in
    which any of the words may stand.
    """
    is_sharding = type(error).__name__ == "ShardingTypeError"
    if not is_sharding and (
        not isinstance(error, TypeError | ValueError) or isinstance(error, jax.errors.JAXTypeError)
    ):
        return ""
    text = f"{type(error).__name__}: {error}"
    return next((cure for pattern, cure in _MISPLACED.items() if re.search(pattern, text)), "")


@functools.cache
def _setting_names() -> tuple[str, ...]:
    return tuple(name for name in jax.config.values if hasattr(jax.config, name))


@functools.cache
def _read_settings() -> Callable[[Any], tuple[Any, ...]]:
    return operator.attrgetter(*_setting_names())  # This takes half of the time of reading one after the other.


def settings() -> tuple[Any, ...]:
    """Return all settings as this thread sees them, because only JAX knows on which of them a trace depends."""
    return *_read_settings()(jax.config), jax.sharding.get_abstract_mesh()


def changed(before: tuple[Any, ...]) -> list[str]:
    """Return the names of the settings that differ from what `settings` returned before."""
    names = *_setting_names(), "the mesh of jax.set_mesh"
    now = settings()
    return [] if now == before else [name for name, a, b in zip(names, before, now, strict=True) if a != b]
