"""Masses and costs of the transport problem of two sequences of vectors.

Every function takes the namespace it computes in, `numpy` or `keras.ops`; but
`lowered_costs` is for arrays.
"""

import numpy as np
from keras import ops

from blogkeras.arguments import check_choice
from blogkeras.ops import (
    CANCELLATION,
    centered_arrays,
    squared_distances,
    squared_distances_of_arrays,
)

COSTS = ("euclidean", "cosine", "rms")
WEIGHTS = ("uniform", "norm", "importance")
# The old name of weights by importance.
OLD_WEIGHTS = {"idf": "importance"}


def check_options(cost, weights):
    """Raises on names that are not known; a pair of arrays as weights passes.

    Raises:
        ValueError: on anything else.
    """
    check_choice("cost", cost, COSTS)
    if isinstance(weights, (list, tuple)) and len(weights) == 2:
        return
    if not isinstance(weights, str) or weights not in WEIGHTS:
        raise ValueError(
            f"Expected `weights` to be one of {', '.join(map(repr, WEIGHTS))} "
            f"or a pair of arrays. Received: weights={weights!r}"
        )


def given_masses(weights, importance, is_symmetric=False):
    """The pair of arrays that masses are made of, of the argument it came in.

    Args:
        weights: One of `WEIGHTS`, or a pair of arrays.
        importance: Pair of arrays for `"importance"`, else `None`.
        is_symmetric: Whether the second of the pair is to be `None`.

    Returns:
        `(name, pair)`; the pair is `(None, None)` where nothing is given.

    Raises:
        ValueError: where one is given without the other, or half a pair.
    """
    if weights == "importance" and importance is None:
        raise ValueError(
            'Expected `importance` with weights="importance": a pair of '
            "arrays, one number for each word, such as those of "
            "`inverse_document_frequency`. Received: importance=None"
        )
    if importance is not None and weights != "importance":
        raise ValueError(
            'Expected `importance` with weights="importance" only, since other '
            f"weights do not use it. Received: weights={weights!r}, "
            f"importance={importance!r}"
        )
    if isinstance(weights, str) and importance is None:
        return "weights", (None, None)
    name = "weights" if importance is None else "importance"
    pair = weights if importance is None else importance
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(
            f"Expected `{name}` to be a pair, one for each side. "
            f"Received: {name}={pair!r}"
        )
    first, second = pair
    if is_symmetric and second is not None:
        raise ValueError(
            f"Expected None as the second of `{name}` without `y`. "
            f"Received: y=None, {name}={pair!r}"
        )
    if first is None or (second is None and not is_symmetric):
        raise ValueError(
            f"Expected `{name}` to have numbers for the words of each side. "
            f"Received: {name}={pair!r}"
        )
    return name, (first, second)


def mass_and_vectors(xp, x, mask, cost, weights, given=None):
    """The distribution of a sequence over its words.

    An empty sequence (no words, all masked, all without mass) becomes one zero
    vector of mass 1.

    Args:
        xp: `numpy` or `keras.ops`.
        x: `(..., n, dim)`.
        mask: `(..., n)`, boolean, or `None`.
        cost: One of `COSTS`. A zero vector has no direction: under "cosine" it
            has no mass unless that is given as an array.
        weights: `"uniform"`, `"norm"`, `"importance"` or `"given"`.
        given: `(..., n)`, nonnegative, for `"importance"` and `"given"`.

    Returns:
        `(p, x)`: `(..., n)` of sum 1, and the vectors, zero under the mask.
    """
    if x.shape[-2] == 0:
        x = xp.pad(x, [[0, 0]] * (len(x.shape) - 2) + [[0, 1], [0, 0]])
        mask, weights = None, "norm"
    if mask is not None:
        # Masked values, NaN included, have no influence.
        x = xp.where(mask[..., None], x, xp.zeros_like(x))
    if weights == "norm":
        mass = _norms(xp, x)[..., 0]
    elif weights == "uniform":
        # A sum, since vectors may have no first number.
        mass = xp.ones_like(xp.sum(x[..., :1], axis=-1))
    else:
        mass = xp.maximum(given, xp.zeros_like(given))
    if cost == "cosine" and weights in ("uniform", "importance"):
        has_direction = _norms(xp, x)[..., 0] > 0
        mass = xp.where(has_direction, mass, xp.zeros_like(mass))
    if mask is not None:
        mass = xp.where(mask, mass, xp.zeros_like(mass))
    total = xp.sum(mass, axis=-1, keepdims=True)
    empty = total <= 0
    ones = xp.ones_like(mass)
    first = xp.where(xp.cumsum(ones, axis=-1) > 1, xp.zeros_like(mass), ones)
    p = xp.where(empty, first, mass / xp.where(empty, 1, total))
    if xp is ops or empty.any():
        x = xp.where(empty[..., None], xp.zeros_like(x), x)
    return p, x


def cost_matrix(xp, x, y, cost):
    """Costs between all words of two sequences.

    Args:
        xp: `numpy` or `keras.ops`.
        x: `(..., n, dim)`.
        y: `(..., m, dim)`.
        cost: `"euclidean"`: ‖x − y‖; `"rms"`: ‖x − y‖/√dim;
            `"cosine"`: 1 − cos, 1 to a zero vector, 0 between two.

    Returns:
        `(..., n, m)`.
    """
    if cost == "cosine":
        # 1 − cos(x, y) = ‖u − v‖²/2 of the directions, which keeps the digits
        # of small angles.
        x, x_zero = _direction(xp, x)
        y, y_zero = _direction(xp, y)
        y_zero = xp.swapaxes(y_zero, -1, -2)
        d = _squared_distances(xp, x, y) / 2
        d = xp.where(xp.logical_or(x_zero, y_zero), xp.ones_like(d), d)
        return xp.where(xp.logical_and(x_zero, y_zero), xp.zeros_like(d), d)
    scale = _moderate(xp, x, y)
    if xp is ops or (scale != 1).any():
        x, y = x * scale, y * scale
    d = _safe_sqrt(xp, _squared_distances(xp, x, y)) / scale
    return d / x.shape[-1] ** 0.5 if cost == "rms" else d


def _squared_distances(xp, x, y):
    if xp is ops:
        return squared_distances(x, y)
    return squared_distances_of_arrays(x, y)


def _moderate(xp, x, y):
    """A power of two that scales vectors so that their squares stay finite.

    It is 1 unless they are larger than 2⁴⁰ or smaller than 2⁻⁴⁰. Scaling by a
    power of two keeps differences of nearly equal vectors exact.
    """

    def size(x):
        axes = {"axis": (-2, -1), "keepdims": True, "initial": 0}
        # Absolute values of all would be a copy of all.
        return xp.maximum(xp.max(x, **axes), -xp.min(x, **axes))

    largest = xp.maximum(size(x), size(y))
    if xp is ops:
        largest = ops.stop_gradient(largest)
    scale = xp.ones_like(largest)
    steps = range(40, 1000, 40) if "64" in str(x.dtype) else (40, 80)
    for step in steps:
        small = xp.logical_and(largest > 0, largest < 2.0**-step)
        scale = xp.where(small, 2.0 ** (step + 10), scale)
        scale = xp.where(largest > 2.0**step, 2.0 ** -(step + 10), scale)
    return scale if xp is not ops else ops.cast(scale, x.dtype)


def lowered_costs(x, y, cost):
    """Costs in float32 for speed, lowered by a bound of the rounding error.

    Args:
        x: `(n, dim)`, NumPy array of any floating dtype.
        y: `(m, dim)`, likewise.
        cost: As for `cost_matrix`.

    Returns:
        `(costs, scale)`: `(n, m)`, at most the exact costs times the number
        `scale`, a power of two.
    """
    # Float32 may not have the numbers that float64 has.
    if cost == "cosine":
        scale, (x, y) = 1.0, (_direction(np, z)[0] for z in (x, y))
    else:
        scale = _moderate(np, x, y).item()
        x, y = x * scale, y * scale
    d = cost_matrix(np, x.astype("float32"), y.astype("float32"), cost)
    # A product of two vectors is a sum of dim terms.
    unit = np.float32((x.shape[-1] + 8) * 2.0**-23)
    if cost == "cosine":
        # Of directions less their medians ‖u − c‖² + ‖v − c‖² is below 12.
        return np.maximum(d - 3 * unit, 0), scale
    x2, y2 = np.square(x).sum(-1), np.square(y).sum(-1)
    size = x2[:, None] + y2
    d2 = np.square(d)
    if cost == "rms":
        d2 *= x.shape[-1]
    # Vectors are rounded where they are, and multiplied about a centre. Pairs
    # that are near for their distance to it are not multiplied.
    around = centered_arrays(x, y)[2]
    size += np.where(d2 > CANCELLATION / 2 * around, around, 0)
    below = np.sqrt(np.maximum(d2 - size.astype("float32") * unit, 0))
    return below / x.shape[-1] ** 0.5 if cost == "rms" else below, scale


def centroid(xp, p, x, cost):
    """Mean word, of directions under `"cosine"`: `(..., dim)`."""
    if cost == "cosine":
        x, _ = _direction(xp, x)
    return xp.sum(p[..., None] * x, axis=-2)


def centroid_bound(xp, a, b, cost):
    """A lower bound of the distance, from two centroids `(..., dim)`."""
    if cost == "cosine":
        return xp.sum(xp.square(a - b), axis=-1) / 2
    d = _norms(xp, a - b)[..., 0]
    return d / a.shape[-1] ** 0.5 if cost == "rms" else d


def relaxed(xp, p, q, d):
    """Both relaxations: every word moves to the nearest word with mass."""
    far = xp.max(xp.abs(d), axis=(-2, -1), keepdims=True) + 1
    to_y = xp.min(xp.where(q[..., None, :] > 0, d, far), axis=-1)
    to_x = xp.min(xp.where(p[..., :, None] > 0, d, far), axis=-2)
    return xp.sum(p * to_y, axis=-1), xp.sum(q * to_x, axis=-1)


def _norms(xp, x):
    """‖x‖ with the last axis of size 1, of vectors of any size."""
    size = xp.max(xp.abs(x), axis=-1, keepdims=True, initial=0)
    if xp is ops:
        size = ops.stop_gradient(size)
    size = xp.where(size > 0, size, xp.ones_like(size))
    squares = xp.sum(xp.square(x / size), axis=-1, keepdims=True)
    return size * _safe_sqrt(xp, squares)


def _direction(xp, x):
    norm = _norms(xp, x)
    zero = norm <= 0
    return x / xp.where(zero, xp.ones_like(norm), norm), zero


def _safe_sqrt(xp, x):
    """`blogkeras.ops.safe_sqrt` in either namespace."""
    positive = x > 0
    root = xp.sqrt(xp.where(positive, x, xp.ones_like(x)))
    return xp.where(positive, root, xp.zeros_like(x))
