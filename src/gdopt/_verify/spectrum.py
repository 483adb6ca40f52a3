"""The Hessian at a point: all of it, or between Lanczos' directions; its eigenvalues, and Newton's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gdopt._verify.places import Blocks, Place, Probe, chance, combined, count_of, normal, products

_SWEEPS, _SIGNS = 5, 2  # the sweeps that even the scales of the entries, and the directions of random signs in each
_KRYLOV, _MANY_KRYLOV = 24, 96  # the most directions for many entries, and the most if these are cheap
_LATE, _FADES = 0.02, 0.75  # the share of the whole gain that the last directions have to add, and their fading
_ENTRIES, _CHEAP, _FEWEST = 2**24, 2**21, 6  # the entries of all directions together, and the fewest directions
_NOISE = 10  # the rounding of a curvature, in eps times the number of directions


class Spectrum(NamedTuple):
    """The Hessian between directions, and its eigenvalues."""

    scale: Blocks  # the unit of each entry
    basis: Blocks  # with a leading axis of directions, in units of the scale
    right: Any  # the gradient along each direction
    matrix: Any
    even: Any  # about the root of each direction's curvature, by which the matrix is divided from both sides
    values: Any  # the eigenvalues of that matrix, ascending
    vectors: Any
    weak: Any  # the gradient along each of them whose curvature is lost in rounding, 0 along others
    lowest: Any  # the weights of another direction of negative curvature, if there is one
    noise: Any  # the noise of the values
    known: Any
    whole: bool  # whether it is the whole Hessian

    @property
    def highest(self) -> Any:
        """The largest entry of the matrix."""
        return abs(self.matrix).max()

    def way(self, place: Place, weights: Any) -> Blocks:
        """Return the direction with these weights, in the units of the params."""
        return scaled(self.scale, combined(place, weights, self.basis))

    def along(self, place: Place, grad: Blocks) -> Any:
        """Return the gradient along each direction."""
        return products(place, self.basis, scaled(self.scale, grad), self.right.dtype)


def newton_step(place: Place, found: Spectrum, right: Any) -> tuple[Any, Any]:
    """Return weights of the directions, for Newton's step away from the minimum, and what it gains: g'H^-1 g / 2.

    With the absolute values of curvatures.
    """
    np = place.np
    parts = found.vectors.T @ (right / found.even)
    sizes = np.abs(found.values)
    firm = np.maximum(sizes, found.noise)
    weights = np.where(parts == 0, 0, parts / np.where(firm > 0, firm, 1))
    # A curvature that is lost in rounding may be smaller than that, so more may be left.
    least = np.maximum(sizes, found.noise / (_NOISE * len(sizes)))
    gains = np.where(parts == 0, 0, parts * (parts / np.where(least > 0, least, 1))) / 2
    left = np.where((firm > 0).all(), np.sum(gains), np.where((parts != 0).any(), np.inf, 0))
    return found.vectors @ weights / found.even, left


def scaled(scale: Blocks, blocks: Blocks) -> Blocks:
    return [g.astype(s.dtype) * s for g, s in zip(blocks, scale, strict=True)]


def scaled_product(probe: Probe, params: Blocks, scale: Blocks, way: Blocks) -> Blocks:
    """Multiply a direction by S H S, with the scale S."""
    along = [(w * s).astype(x.dtype) for w, s, x in zip(way, scale, params, strict=True)]
    return scaled(scale, probe.times(params, along))


def spectrum(
    place: Place, probe: Probe, params: Blocks, grad: Blocks, scale: Blocks, accuracy: Any, dtype: Any, *, whole: bool
) -> Spectrum:
    """Return the eigenvalues of the Hessian at a point: of all of it, or of its part between Lanczos' directions.

    Products of the Hessian are known up to ``accuracy``.
    """
    np, slope = place.np, scaled(scale, grad)
    count = count_of(slope)
    times = lambda way: scaled_product(probe, params, scale, way)
    basis, matrix = (_whole if whole else _krylov)(place, times, slope, count, dtype)
    right = products(place, basis, slope, dtype)
    known = np.isfinite(matrix).all() & np.isfinite(right).all()
    matrix, right = np.where(known, matrix, 0), np.where(np.isfinite(right), right, 0)
    even = _even(np, matrix) if whole else np.ones_like(right)
    values, vectors = np.linalg.eigh(matrix / even[:, None] / even[None, :])
    # Rounding between entries of very different scales can spoil the lowest. Then that of the plain matrix is better.
    lowest = np.linalg.eigh(matrix)[1][:, 0] if whole else vectors[:, 1]
    noise = _NOISE * matrix.shape[0] * accuracy * np.max(np.abs(values))
    weak = np.where(np.abs(values) <= noise, vectors.T @ (right / even), 0)
    return Spectrum(scale, basis, right, matrix, even, values, vectors, weak, lowest, noise, known, whole)


def evened(place: Place, probe: Probe, params: Blocks, scale: Blocks) -> Blocks:
    """Return the scale S that gives all rows of S H S a norm of about 1, from products with H alone.

    Source: Bradley, "Algorithms for the equilibration of matrices and their application to limited-memory quasi-Newton
    methods", 2010, section 2.3 (a few directions of random signs estimate the norms of all rows).
    """
    np = place.np

    def sweep(number: Any, scale: Blocks) -> Blocks:
        norms = [np.zeros_like(s) for s in scale]
        for probes in range(_SIGNS):
            signs = [np.where(x < 0, -1, 1) for x in chance(place, scale, _SIGNS * number + probes)]
            image = scaled_product(probe, params, scale, signs)
            norms = [np.hypot(a, h) for a, h in zip(norms, image, strict=True)]
        rows = [a / _SIGNS**0.5 for a in norms]
        return [
            np.where((r > 0) & np.isfinite(r), s / np.sqrt(np.where(r > 0, r, 1)), s).astype(s.dtype)
            for r, s in zip(rows, scale, strict=True)
        ]

    return place.fold(_SWEEPS, sweep, scale)


def _even(np: Any, matrix: Any) -> Any:
    """Return divisors of rows and columns of a symmetric matrix that make the largest entry of each about 1.

    Roots of the diagonal do not serve, because it is zero for units of a network that have no output yet.
    Source: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", 2001.
    """
    even = np.ones_like(matrix[0])
    for _ in range(_SWEEPS):
        rows = np.max(np.abs(matrix / even[:, None] / even[None, :]), axis=1)
        even = even * np.where(rows > 0, np.sqrt(rows), 1)
    return even


def _whole(place: Place, times: Callable, like: Blocks, count: int, dtype: Any) -> tuple[Blocks, Any]:
    """Return each entry as a direction, and the matrix between them."""
    np = place.np
    begins = [count_of(like[:number]) for number in range(len(like))]
    basis = [
        np.eye(count, block.size, -begin, block.dtype).reshape(count, *block.shape)
        for block, begin in zip(like, begins, strict=True)
    ]
    images = place.rows(lambda number: times([rows[number] for rows in basis]), count)
    matrix = np.concatenate([block.reshape(count, -1).astype(dtype) for block in images], axis=1)
    return basis, (matrix + matrix.T) / 2


def _krylov(place: Place, times: Callable, slope: Blocks, count: int, dtype: Any) -> tuple[Blocks, Any]:
    """Return directions that start from the gradient plus a little chance, and the matrix between them.

    Source: Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950; orthogonalised in full.
    """
    np, size = place.np, max(_FEWEST, min(_KRYLOV, _ENTRIES // count), min(_MANY_KRYLOV, _CHEAP // count))
    random = normal(place, chance(place, slope, 0), dtype)
    first = normal(place, [a + 0.1 * b for a, b in zip(normal(place, slope, dtype), random, strict=True)], dtype)
    rows = [place.put(np.zeros((size, *block.shape), block.dtype), 0, block) for block in first]
    one = np.ones((), dtype)

    def goes_on(carry: tuple) -> Any:
        number, *_, total, late = carry
        return (number < size) & ~((number >= _KRYLOV) & (late < _LATE * total))

    def follow(carry: tuple) -> tuple:
        number, rows, matrix, pivot, weight, total, late = carry
        image = times([block[number] for block in rows])
        along = products(place, rows, image, dtype)
        matrix = place.put(matrix, number, along)
        for _ in range(2):  # A single pass leaves rounding.
            taken = combined(place, products(place, rows, image, dtype), rows)
            image = [a - b for a, b in zip(image, taken, strict=True)]
        following = normal(place, image, dtype)
        rows = [place.put(block, number + 1, x) for block, x in zip(rows, following, strict=True)]
        # The pivots of the matrix give what this direction adds to the gain of Newton's step.
        across = np.where(number > 0, along[np.maximum(number - 1, 0)], 0) / pivot
        pivot, weight = along[number] - across**2 * pivot, np.where(number > 0, -weight * across, 1)
        gain = weight**2 / abs(pivot)
        return number + 1, rows, matrix, pivot, weight, total + gain, _FADES * late + gain

    begin = np.zeros((), np.int32), rows, np.zeros((size, size), dtype), one, one, 0 * one, 0 * one
    number, rows, matrix, *_ = place.loop(goes_on, follow, begin)
    used = np.arange(size) < number  # There is one more direction already.
    rows = [np.where(used.reshape(-1, *(1,) * (block.ndim - 1)), block, 0) for block in rows]
    lower = np.tril(matrix)  # Each direction was computed before the later ones.
    return rows, lower + np.tril(matrix, -1).T
