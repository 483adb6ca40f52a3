"""The single vanilla step."""

from __future__ import annotations

import functools
from typing import Any

import jax

from gdopt import _jax
from gdopt._compile import program
from gdopt._devices.current import for_caller, on_auto_axes
from gdopt._devices.sharding import CLOSED_OVER, on_one_mesh
from gdopt._errors import InputError
from gdopt._optimizers.spectral import check_learning_rate
from gdopt._problem.objective import Objective, check_start, make_objective
from gdopt._problem.problem import split_args
from gdopt._settings import own_promotion, own_transfers
from gdopt._types import Loss, PyTree, Scalar


@on_auto_axes
def gd_step(loss: Loss, params: PyTree, learning_rate: Scalar, *args: Any) -> tuple[PyTree, jax.Array]:
    """Make the vanilla step ``x - learning_rate * grad f(x)``, jit-compiled.

    Args:
        loss: ``loss(params, *args)``, a real scalar. It is traced at each call, so changes of the variables it reads
            are seen. Losses with equal traces are compiled once. The trace takes about 0.8 ms. For a fast loop of your
            own, call `gd_step` inside ``jax.jit``, where it costs nothing.
        params: any pytree; float and complex leaves are updated in their own dtype, the rest is carried along.
        learning_rate: a positive number. A new value recompiles nothing.
        *args: further arguments of the loss, any pytrees, as in ``args`` of `minimize`.

    Returns:
        The new params, and the loss of the *old* ones.

    Raises:
        InputError: for params that are integers, empty, or not finite, a loss that is not a scalar, a rate that is not
            positive and finite. Params on a GPU or TPU are not checked for NaN, because each step would wait for them.

    Example:
        >>> import gdopt
        >>> params = 1.0
        >>> for _ in range(3):
        ...     params, value = gdopt.gd_step(lambda x: x**2, params, 0.25)
        >>> float(params), float(value)
        (0.125, 0.0625)
    """
    if callable(learning_rate):
        raise InputError(f"learning_rate={learning_rate!r} is a schedule. Pass its value for this step.")
    rate = check_learning_rate(learning_rate)
    objective = make_objective(loss, params)
    if jax.default_backend() == "cpu":
        check_start(objective.params)
    try:
        new, loss_before = _step(objective, rate, args)
    except Exception as error:
        if not _jax.misplaced(error):
            raise
        new, loss_before = _step(objective, rate, args, on_mesh=True)
    return for_caller(objective.rest.combine(new)), for_caller(loss_before)


def _step(objective: Objective, rate: Any, args: tuple, *, on_mesh: bool = False) -> tuple[PyTree, jax.Array]:
    """Make the step where the arrays are or, if JAX cannot, ``on_mesh``: with all of them on the mesh of some."""
    some, rest = split_args(args)

    def evaluated(params: PyTree, some: PyTree) -> tuple:
        return objective.value(params, *rest.combine(some))

    def vanilla(traced: program.Traced, constants: list, params: PyTree, rate: Any, some: PyTree) -> tuple:
        (value, _), grad = traced.replay(traced.constants, params, constants, some)
        with own_promotion():
            return jax.tree.map(lambda x, g: (x - rate * g).astype(x.dtype), params, grad), value

    params = objective.params
    if on_mesh:
        trees, _ = on_one_mesh({"params": params, "args": some})
        params, some = trees["params"], trees["args"]
    value = program.trace(evaluated, params, some, rules=True)
    constants = value.constants
    if on_mesh:
        trees, _ = on_one_mesh({"params": params, "args": some, CLOSED_OVER: constants})
        params, some, constants = trees.values()
    given = constants, params, rate, some
    traced = lambda: program.with_gradient(value, evaluated, params, some)[0]
    if program.is_traced(given):  # The step becomes a part of the caller's program.
        return vanilla(traced(), *given)
    make = lambda: program.share(functools.partial(vanilla, traced()), *given)
    shared = program.shared_for(gd_step, value, given, make)
    with own_transfers():
        return shared.call(*given)
