"""Small losses with known minima, as data.

Starts are float32 (or complex64), so that ``minimize`` takes them directly; ``problem.at(dtype)`` has another dtype.
The losses are computed in the dtype of their params. Minima and values are float64, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """A loss, its start and its minimum."""

    name: str
    loss: Callable[[Any], jax.Array]  # of the params alone
    start: Any
    minimum: Any  # params; where there are several, one of the global minima
    value: float  # of the loss at the minimum
    smoothness: float | None = None  # L, an upper bound of the Hessian's largest eigenvalue everywhere
    convex: bool = False

    def at(self, dtype: Any) -> Problem:
        """The same problem with the start in another dtype (complex leaves: in the complex dtype of that precision)."""

        def cast(leaf: np.ndarray) -> jax.Array:
            return jnp.asarray(leaf, jnp.result_type(dtype, jnp.complex64) if np.iscomplexobj(leaf) else dtype)

        return self._replace(start=jax.tree.map(cast, self.start))

    def gap(self, params: Any) -> float:
        """The gain that is left at these params, as a share of the whole: 1 at the start, 0 at the minimum."""
        with jax.enable_x64(True):
            loss = jax.jit(self.loss)
            there, start = (float(loss(jax.tree.map(_wide, tree))) for tree in (params, self.start))
        return (there - self.value) / (start - self.value)


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, complex if np.iscomplexobj(leaf) else float)


def _like(x: jax.Array, constant: Any) -> jax.Array:
    return jnp.asarray(constant, x.dtype)


def _rotation(n: int) -> np.ndarray:
    """A dense orthogonal matrix: the reflection at 1, 2, ..., n."""
    v = np.arange(1.0, n + 1)
    return np.eye(n) - 2 * np.outer(v, v) / (v @ v)


# --- convex ---


def quadratic(name: str, eigenvalues: Any, value: float = 0.0) -> Problem:
    """``(x - c) A (x - c) / 2 + value`` with A dense, of these eigenvalues, and c = (1, -1, 1, ...)."""
    eigenvalues = np.asarray(eigenvalues, float)
    n = len(eigenvalues)
    A = _rotation(n) @ np.diag(eigenvalues) @ _rotation(n)
    center = (-1.0) ** np.arange(n)

    def loss(x: jax.Array) -> jax.Array:
        away = x - _like(x, center)
        return away @ (_like(x, A) @ away) / 2 + value

    return Problem(name, loss, np.zeros(n, np.float32), center, value, float(eigenvalues.max()), convex=True)


def _regression(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    X = random.normal(size=(rows, columns))
    return X, X @ np.arange(1.0, columns + 1) + 0.5 * random.normal(size=rows)


def _least_squares() -> Problem:
    X, y = _regression(20, 3)
    minimum = np.linalg.lstsq(X, y)[0]
    half_mean = lambda r: r @ r / (2 * len(y))

    def loss(w: jax.Array) -> jax.Array:
        return half_mean(_like(w, X) @ w - _like(w, y))

    smoothness = float(np.linalg.norm(X, 2) ** 2 / len(y))
    value = float(half_mean(X @ minimum - y))
    return Problem("least_squares", loss, np.zeros(3, np.float32), minimum, value, smoothness, convex=True)


def _logistic() -> Problem:
    """Logistic regression with a ridge; the minimum by Newton's method in float64."""
    X, y = _regression(30, 3)
    labels, ridge, n = np.sign(y), 0.1, len(y)

    def loss(w: jax.Array) -> jax.Array:
        margins = _like(w, labels) * (_like(w, X) @ w)
        return jnp.mean(jax.nn.softplus(-margins)) + ridge / 2 * (w @ w)

    w = np.zeros(3)
    for _ in range(20):
        p = 1 / (1 + np.exp(labels * (X @ w)))  # of the wrong label
        gradient = -X.T @ (labels * p) / n + ridge * w
        hessian = X.T @ (X * (p * (1 - p))[:, None]) / n + ridge * np.eye(3)
        w = w - np.linalg.solve(hessian, gradient)
    value = float(np.mean(np.logaddexp(0, -labels * (X @ w))) + ridge / 2 * (w @ w))
    smoothness = float(np.linalg.norm(X, 2) ** 2 / (4 * n) + ridge)
    return Problem("logistic", loss, np.zeros(3, np.float32), w, value, smoothness, convex=True)


def _tree() -> Problem:
    """A separable quadratic over dicts, lists and a scalar, of curvatures 1, 2, 3, ... in the order of its leaves."""
    minimum = {
        "bias": np.float64(-0.5),
        "layers": [{"b": np.array([1.0, 2.0]), "w": np.array([[1.0, -2.0], [0.5, 3.0]])}, (np.ones(3),)],
    }
    leaves = jax.tree.leaves(minimum)

    def loss(params: Any) -> Any:
        pairs = zip(jax.tree.leaves(params), leaves, strict=True)
        return sum(k / 2 * jnp.sum((x - _like(x, c)) ** 2) for k, (x, c) in enumerate(pairs, 1))

    start = jax.tree.map(lambda leaf: np.zeros_like(leaf, np.float32), minimum)
    return Problem("tree", loss, start, minimum, 0.0, float(len(leaves)), convex=True)


def _complex() -> Problem:
    """``|A z - b|**2 / 2`` over complex z."""
    A = np.array([[2, 1j], [1 - 1j, 1]])
    b = np.array([1 + 1j, -2j])

    def loss(z: jax.Array) -> jax.Array:
        residual = _like(z, A) @ z - _like(z, b)
        return jnp.vdot(residual, residual).real / 2

    smoothness = float(np.linalg.norm(A, 2) ** 2)
    return Problem("complex", loss, np.zeros(2, np.complex64), np.linalg.solve(A, b), 0.0, smoothness, convex=True)


def _pseudo_huber() -> Problem:
    """``sum sqrt(1 + (x - c)**2) - 1``: a quadratic near c, linear far away, where it starts.

    Source: Hartley and Zisserman, "Multiple View Geometry in Computer Vision", 2003, appendix 6.8.
    """
    center = np.array([1.0, -2.0, 3.0])

    def loss(x: jax.Array) -> jax.Array:
        square = (x - _like(x, center)) ** 2
        return jnp.sum(square / (jnp.sqrt(1 + square) + 1))  # the same without cancellation

    return Problem("pseudo_huber", loss, np.full(3, 30, np.float32), center, 0.0, 1.0, convex=True)


# --- not convex; where not said otherwise from More, Garbow and Hillstrom, "Testing Unconstrained Optimization
# Software", 1981, with their numbers and starts ---


def _rosenbrock(x: jax.Array) -> jax.Array:  # 1
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def _beale(x: jax.Array) -> Any:  # 5
    return sum((y - x[0] * (1 - x[1] ** i)) ** 2 for i, y in enumerate((1.5, 2.25, 2.625), 1))


def _powell_singular(x: jax.Array) -> jax.Array:  # 13; the Hessian at the minimum has rank 2
    a, b, c, d = x
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def _wood(x: jax.Array) -> jax.Array:  # 14
    a, b, c, d = x
    return (
        (100 * (b - a**2) ** 2 + (1 - a) ** 2)
        + (90 * (d - c**2) ** 2 + (1 - c) ** 2)
        + (10 * (b + d - 2) ** 2 + (b - d) ** 2 / 10)
    )


def _himmelblau(x: jax.Array) -> jax.Array:
    """With four minima, all of value 0; the way down from its start ends at this one.

    Source: Himmelblau, "Applied Nonlinear Programming", 1972.
    """
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def _curved(name: str, loss: Callable[[jax.Array], jax.Array], start: list[float], minimum: list[float]) -> Problem:
    return Problem(name, loss, np.array(start, np.float32), np.array(minimum), 0.0)


_ALL = (
    quadratic("bowl", [1, 2, 4], value=-2.0),
    quadratic("valley", np.geomspace(1e-3, 1, 5)),
    _least_squares(),
    _logistic(),
    _tree(),
    _complex(),
    _pseudo_huber(),
    _curved("rosenbrock", _rosenbrock, [-1.2, 1], [1, 1]),
    _curved("beale", _beale, [1, 1], [3, 0.5]),
    _curved("powell_singular", _powell_singular, [3, -1, 0, 1], [0, 0, 0, 0]),
    _curved("wood", _wood, [-3, -1, -3, -1], [1, 1, 1, 1]),
    _curved("himmelblau", _himmelblau, [0, 0], [3, 2]),
)
PROBLEMS = {problem.name: problem for problem in _ALL}
CONVEX = {name: problem for name, problem in PROBLEMS.items() if problem.convex}
