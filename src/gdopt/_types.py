"""The types of arguments: trees, losses, schedules and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

PyTree = Any
# loss(params, *args), or loss(params, batch, *args); a scalar, or (scalar, aux).
Loss = Callable[..., Any]
# step -> learning rate, step 0 first. optax's schedules are of this kind, and gdopt's are optax schedules.
Schedule = Callable[[Any], Any]
# An optax transformation, or a factory learning_rate -> transformation.
Optimizer = optax.GradientTransformation | Callable[..., optax.GradientTransformation]
Scalar = float | np.floating[Any] | jax.Array
