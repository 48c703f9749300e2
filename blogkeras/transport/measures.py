"""From two sequences of vectors to a transport problem: masses and costs.

Every function takes the namespace it computes in, `numpy` or `keras.ops`.
"""

from keras import ops

COSTS = ("euclidean", "cosine", "rms")
WEIGHTS = ("uniform", "norm", "idf")


def check_options(cost, weights):
    """Raises on names that are not known; arrays as weights pass."""
    if cost not in COSTS:
        raise ValueError(f"Expected `cost` one of {COSTS}. Received: {cost!r}")
    if isinstance(weights, str) and weights not in WEIGHTS:
        raise ValueError(
            f"Expected `weights` one of {WEIGHTS} or a pair of arrays. "
            f"Received: {weights!r}"
        )


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
        weights: `"uniform"`, `"norm"`, `"idf"`, or `"given"`.
        given: `(..., n)`, nonnegative, for `"idf"` and `"given"`.

    Returns:
        `(p, x)`: `(..., n)` of sum 1, and the vectors, zero under the mask.
    """
    if x.shape[-2] == 0:
        x = xp.pad(x, [[0, 0]] * (len(x.shape) - 2) + [[0, 1], [0, 0]])
        mask, weights = None, "norm"
    if mask is not None:
        # Whatever stands under the mask, NaN too, has no influence.
        x = xp.where(mask[..., None], x, xp.zeros_like(x))
    norm = _safe_sqrt(xp, xp.sum(xp.square(x), axis=-1))
    if weights == "norm":
        mass = norm
    elif weights == "uniform":
        mass = xp.ones_like(norm)
    else:
        mass = xp.maximum(given, xp.zeros_like(given))
    if cost == "cosine" and weights in ("uniform", "idf"):
        mass = xp.where(norm > 0, mass, xp.zeros_like(norm))
    if mask is not None:
        mass = xp.where(mask, mass, xp.zeros_like(mass))
    total = xp.sum(mass, axis=-1, keepdims=True)
    empty = total <= 0
    ones = xp.ones_like(mass)
    first = xp.where(xp.cumsum(ones, axis=-1) > 1, xp.zeros_like(mass), ones)
    p = xp.where(empty, first, mass / xp.where(empty, 1, total))
    return p, xp.where(empty[..., None], xp.zeros_like(x), x)


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
        x, x_zero = _direction(xp, x)
        y, y_zero = _direction(xp, y)
        cosine = xp.matmul(x, xp.swapaxes(y, -1, -2))
        both = xp.logical_and(x_zero, xp.swapaxes(y_zero, -1, -2))
        d = xp.where(both, xp.zeros_like(cosine), 1 - cosine)
        return xp.maximum(d, xp.zeros_like(d))
    # Shifted to where the words are, fewer digits cancel.
    center = xp.mean(y, axis=-2, keepdims=True)
    if xp is ops:
        center = ops.stop_gradient(center)
    x, y = x - center, y - center
    x2 = xp.sum(xp.square(x), axis=-1)[..., :, None]
    y2 = xp.sum(xp.square(y), axis=-1)[..., None, :]
    size = x2 + y2
    d2 = size - 2 * xp.matmul(x, xp.swapaxes(y, -1, -2))
    # What rounding alone makes is zero: equal words are at distance 0.
    unit = 2.0**-52 if str(x.dtype).endswith("64") else 2.0**-23
    d = _safe_sqrt(xp, xp.where(d2 > 8 * unit * size, d2, xp.zeros_like(d2)))
    return d / x.shape[-1] ** 0.5 if cost == "rms" else d


def centroid(xp, p, x, cost):
    """Mean word, of directions under `"cosine"`: `(..., dim)`."""
    if cost == "cosine":
        x, _ = _direction(xp, x)
    return xp.sum(p[..., None] * x, axis=-2)


def centroid_bound(xp, a, b, cost):
    """A lower bound of the distance, from two centroids `(..., dim)`."""
    d2 = xp.sum(xp.square(a - b), axis=-1)
    if cost == "cosine":
        return d2 / 2
    d = _safe_sqrt(xp, d2)
    return d / a.shape[-1] ** 0.5 if cost == "rms" else d


def relaxed(xp, p, q, d):
    """Both relaxations: every word moves to its nearest with mass."""
    far = xp.max(xp.abs(d), axis=(-2, -1), keepdims=True) + 1
    to_y = xp.min(xp.where(q[..., None, :] > 0, d, far), axis=-1)
    to_x = xp.min(xp.where(p[..., :, None] > 0, d, far), axis=-2)
    return xp.sum(p * to_y, axis=-1), xp.sum(q * to_x, axis=-1)


def _direction(xp, x):
    norm = _safe_sqrt(xp, xp.sum(xp.square(x), axis=-1, keepdims=True))
    zero = norm <= 0
    return x / xp.where(zero, xp.ones_like(norm), norm), zero


def _safe_sqrt(xp, x):
    """`blogkeras.ops.safe_sqrt` in either namespace."""
    positive = x > 0
    root = xp.sqrt(xp.where(positive, x, xp.ones_like(x)))
    return xp.where(positive, root, xp.zeros_like(x))
