"""A loss with its parameters, checked, and split into leaves that are optimised and leaves that are carried along."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdopt import _error_notes, _jax, _trees
from gdopt._checks import fault, flatten, refuse_no_arrays, refuse_result, warn
from gdopt._errors import InputError
from gdopt._problem import nnx, random_state
from gdopt._types import Loss, PyTree


class Objective(NamedTuple):
    """A loss as a function of the leaves that are optimised."""

    loss: Loss
    params: PyTree  # strong-typed arrays; None in place of leaves that are carried along
    rest: _trees.Rest
    has_aux: bool = False
    sizes: PyTree = None  # the powers of two that the params were divided by: see `scaling`

    def natural(self, params: PyTree) -> PyTree:
        """Return the params in the units in which they were given."""
        return params if self.sizes is None else jax.tree.map(times, params, self.sizes)

    def whole(self, params: PyTree) -> PyTree:
        """Return the params as the loss takes them: in their own units, with the leaves that are carried along."""
        return self.rest.combine(self.natural(params))

    def value(self, params: PyTree, *args: Any, **named: Any) -> tuple[jax.Array, Any]:
        """Return (loss, aux), or with a state (loss, (state, aux)); raise InputError if the loss returns another form.

        ``named`` holds the key and the state, if the loss takes them.
        """
        whole = self.whole(params)
        before = random_state.states(self.loss)
        try:
            out = self.loss(whole, *args, **named)
        except Exception as error:
            _error_notes.add_call(error, self.loss, (whole, *args), named)
            raise
        again = lambda: jax.eval_shape(lambda: self.loss(whole, *args, **named))
        if drawn := random_state.drawn(self.loss, before, again):
            warn(
                f"the loss draws from {drawn} only once, during tracing, so each step sees the same numbers. Draw with "
                "jax.random from the key of with_key=True, or pass the numbers in args= or data=."
            )
        nnx.refuse_writes(self.rest, whole)
        if "state" not in named:
            return _checked(out, self.has_aux)
        value, new = _with_state(out, self.has_aux)
        value, aux = _checked((value, new[1]) if self.has_aux else value, self.has_aux, has_state=True)
        return value, (new[0] if self.has_aux else new, aux)


def times(leaf: jax.Array, size: Any) -> jax.Array:
    """Return the product of a leaf with its sizes, under strict promotion, too."""
    if not jnp.iscomplexobj(leaf):
        return leaf * size
    return lax.complex(leaf.real * size, leaf.imag * size)


def make_objective(loss: Loss, params: PyTree, *, has_aux: bool = False, trainable: Any = None) -> Objective:
    """Split the params of a loss; raise InputError, before anything is traced, if they cannot be optimised.

    Float and complex leaves are optimised. Functions, strings and other leaves that are no arrays are carried along. So
    are random keys, Python's numbers inside a module (a dropout rate), and variables of Flax's nnx that are no Param,
    unless ``trainable`` names them. In dicts, lists and tuples numbers are parameters.
    """
    if not callable(loss):
        raise InputError(f"loss={loss!r} is not a function. Pass one that is called as loss(params, ...).")
    refuse_result("params", params, "params")
    leaves, treedef = flatten("params", params)
    chosen = _trainable_mask(params, treedef, trainable)
    nnx.refuse_shared(params)
    in_module = _trees.in_module(treedef)
    settings = [
        inside and isinstance(leaf, bool | int | float | complex)
        for leaf, inside in zip(leaves, in_module, strict=True)
    ]
    for place, (leaf, choice, inside) in enumerate(zip(leaves, chosen, in_module, strict=True)):
        if why := fault(leaf, carried=inside or not choice):
            path, _ = jax.tree_util.tree_leaves_with_path(params)[place]
            raise InputError(f"{_trees.path_name(path)} {why}.")
    kept = [
        choice and _trees.is_array(leaf) and not (setting or _trees.is_key(leaf))
        for leaf, choice, setting in zip(leaves, chosen, settings, strict=True)
    ]
    some, rest = _trees.partition(params, kept)
    optimised = [leaf for leaf, keep in zip(leaves, kept, strict=True) if keep]
    if not all(jnp.issubdtype(_dtype(leaf), jnp.inexact) for leaf in optimised):
        _refuse_integers(some)
    if not any(np.size(leaf) for leaf in optimised):
        raise InputError(_nothing_to_optimise(params, trainable, chosen, settings))
    _warn_of_narrowing(some)
    return Objective(loss, _trees.strong(some), rest, has_aux)


def check_start(params: PyTree, root: str = "params") -> None:
    """Raise InputError if the start has an infinite or NaN entry; a traced start is not checked."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _jax.is_tracer(leaf):
            continue
        if not leaf.is_fully_addressable:  # The other processes check the other parts.
            leaf = leaf.addressable_data(0)
        start = _trees.on_host(leaf)
        finite = np.isfinite(start)
        if not finite.all():
            at = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise InputError(
                f"{_trees.path_name(path, root)} starts with {start[at]}{f' at index {at}' if at else ''}. Pass a "
                "start with finite entries."
            )


def _dtype(leaf: Any) -> Any:
    """Return the dtype in which JAX takes the leaf; reading it from an array is ten times as fast."""
    return leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)


def _refuse_integers(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(_dtype(leaf), jnp.inexact):
            python = isinstance(leaf, bool | int)
            cure = f"Write {float(leaf)} for {leaf}" if python else "Convert it with .astype(float)"
            raise InputError(
                f"{_trees.path_name(path)} is of dtype {_dtype(leaf)}, but only float and complex leaves have "
                f"gradients. {cure}, or leave it out with trainable=."
            )


def _nothing_to_optimise(params: PyTree, trainable: Any, chosen: list[bool], settings: list[bool]) -> str:
    text = repr(params)
    if len(text) > 80 or "\n" in text:  # A long module is shown by its type.
        text = f"<{type(params).__name__} of {len(chosen)} leaves>"
    message = f"params={text} has no entries to optimise. Pass at least one float or complex array with an entry"
    message += "." if trainable is None else ", and one that trainable= does not leave out."
    if any(settings):
        message += " Numbers inside a module count as settings. Make arrays of those that are to be optimised."
    if trainable is None and not all(chosen):
        message += " Only Params are optimised among nnx's variables. Name others with trainable=."
    return message


def _trainable_mask(params: PyTree, treedef: Any, trainable: Any) -> list[bool]:
    """Return one bool per leaf, from None (all but state), a mask (prefix tree of bools), or a function of params."""
    if trainable is None:
        return [not state for state in nnx.in_state(treedef)]
    # A mask that jax.tree.map made from a module is a module, too, and may be callable.
    is_function = callable(trainable) and not isinstance(trainable, type(params))
    mask = trainable(params) if is_function else trainable
    try:
        choices = _trees.spread(mask, params)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"trainable={trainable!r} does not fit params{_misfit(mask, params, error)}. Pass True or False for each "
            "leaf or subtree of params, or a function of params that returns such a mask."
        ) from error
    if wrong := [choice for choice in choices if not isinstance(choice, bool | np.bool_)]:
        raise InputError(f"trainable holds {wrong[0]!r}. Pass only True or False.")
    return [bool(choice) for choice in choices]


def _misfit(mask: Any, params: PyTree, error: Exception) -> str:
    """Say in which way a mask does not fit."""
    if isinstance(mask, dict) and isinstance(params, dict) and mask.keys() != params.keys():
        lacking, unknown = [key for key in params if key not in mask], [key for key in mask if key not in params]
        said = [f"it lacks {', '.join(map(repr, lacking))}"] if lacking else []
        said += [f"params has no {', '.join(map(repr, unknown))}"] if unknown else []
        return f": {', and '.join(said)}"
    if type(mask) is not type(params):
        return f": it is a {type(mask).__name__}, and params is a {type(params).__name__}"
    return f" ({' '.join(str(error).split())})"


def _warn_of_narrowing(params: PyTree) -> None:
    """Warn if JAX turns NumPy's float64 params into float32, which it does silently."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != _dtype(leaf):
            warn(
                f"{_trees.path_name(path)} is {leaf.dtype} and is optimised in {_dtype(leaf)}. For 64 bits call "
                "jax.config.update('jax_enable_x64', True) first. To silence this, pass 32-bit params."
            )
            return


def _checked(out: Any, has_aux: bool, *, has_state: bool = False) -> tuple[jax.Array, Any]:
    """Return (value, aux) from the output of the loss."""
    value, aux = out, None
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise InputError(
                f"has_aux=True needs a loss that returns (value, aux), but it returned {_what(out)}. Return both, or "
                "leave has_aux out."
            )
        value, aux = out
        _check_aux(aux)
    elif isinstance(out, tuple):
        raise InputError(f"the loss returned a tuple of {len(out)}. Return only the value, or pass has_aux=True.")
    if not _may_be_array(value):
        beside = " as its value" if value is not out or has_state else ""
        raise InputError(
            f"the loss returned {_what(value)}{beside}. Return a scalar array{' first' if beside else ''}."
        )
    value = value if isinstance(value, jax.Array) else jnp.asarray(value)
    if value.shape != ():
        raise InputError(f"the loss returned shape {value.shape}. Reduce it to a scalar with jnp.mean or jnp.sum.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"the loss returned dtype {value.dtype}. Return a real floating-point scalar.")
    return value, aux


def _with_state(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """Return the value, and what a loss with a state returned beside it."""
    form = "(value, (state, aux))" if has_aux else "(value, state)"
    is_pair = lambda given: isinstance(given, tuple) and len(given) == 2
    if not is_pair(out) or (has_aux and not is_pair(out[1])):
        inner = f", with {_what(out[1])} beside the value" if is_pair(out) else ""
        named = "state= and has_aux=True need" if has_aux else "state= needs"
        raise InputError(f"{named} a loss that returns {form}, but it returned {_what(out)}{inner}. Return {form}.")
    return out


def _check_aux(aux: Any) -> None:
    refuse_no_arrays("aux", aux)
    for leaf in jax.tree.leaves(aux):
        if not _may_be_array(leaf):
            path = next(path for path, other in jax.tree_util.tree_leaves_with_path(aux) if other is leaf)
            raise InputError(
                f"{_trees.path_name(path, 'aux')}, which the loss returned, is {_what(leaf)}. A compiled program can "
                "return only arrays and numbers. Leave the rest out."
            )


def _may_be_array(value: Any) -> bool:
    return _trees.is_array(value) or hasattr(value, "__jax_array__")


def _what(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
