"""The nearest code of each vector, block by block."""

import numpy as np
from keras import ops

from blogkeras.ops import full_precision_matmul, map_blocks

# Number of distances in a block, which fits into the cache.
BLOCK = 2**20
GROUP = 64  # codes of a group, see `nearest_codes`
_ROUNDS = 6
_EPSILON = 2.0**-23
_HUGE = 1e30


def nearest_codes(z, codebook):
    """The index of the nearest row of `codebook`, for each vector.

        k = argmin_j ||z - e_j||²

    Of equal codes the first is taken. Vectors are taken relative to a center of
    most codes, in units of the codebook's size. So a common offset, a tiny or
    huge scale or a few codes far from the others do not cost digits. If the
    codes form groups far apart, products may still lose the digits that decide;
    then the block is computed again from differences, which is exact and slow.
    The code of a vector that is not finite is arbitrary.

    Distances are computed block by block: the whole matrix of distances is
    never in memory, except in a model that JAX exports with a free batch size.
    On JAX they are float32 on every accelerator. TensorFlow may round to TF32,
    which can be switched off for the whole program only:
    `tf.config.experimental.enable_tensor_float_32_execution(False)`.

    Args:
        z: `(..., dim)`, float32.
        codebook: `(num_codes, dim)`, float32.

    Returns:
        `(...)`, int32.

    Raises:
        ValueError: if the shapes do not fit.

    Example:

    >>> codebook = np.array([[0.0, 0.0], [1.0, 1.0]], "float32")
    >>> nearest_codes(np.array([[0.9, 0.8]], "float32"), codebook)
    [1]
    """
    z, codebook = (
        ops.stop_gradient(ops.convert_to_tensor(x, "float32"))
        for x in (z, codebook)
    )
    if (
        len(codebook.shape) != 2
        or not codebook.shape[0]
        or len(z.shape) == 0
        or z.shape[-1] != codebook.shape[1]
    ):
        raise ValueError(
            "Expected vectors (..., dim) and a codebook (num_codes, dim). "
            f"Received: z.shape={tuple(z.shape)}, "
            f"codebook.shape={tuple(codebook.shape)}"
        )
    if len(z.shape) != 2:
        shape = ops.shape(z)[:-1]
        flat = ops.reshape(z, [-1, z.shape[-1]])
        return ops.reshape(nearest_codes(flat, codebook), shape)
    if z.shape[0] == 0:  # Keras refuses the maximum of nothing
        return ops.zeros((0,), "int32")
    center = central_point(codebook)
    num_codes = codebook.shape[0]
    # ||z - e||² = ||z||² - 2 (z·e - ||e||²/2), where ||z||² is the same for all
    # codes. A large e would leave the difference of the two terms few digits.
    e = codebook - center
    size = _positive(ops.max(ops.abs(e)))
    e = e / size
    half = ops.sum(ops.square(e), axis=1) / 2
    members = min(GROUP, num_codes)
    groups = -(-num_codes // members)
    missing = groups * members - num_codes
    e = ops.transpose(ops.pad(e, [[0, missing], [0, 0]]))
    half = ops.pad(half, [[0, missing]], constant_values=np.inf)
    half = ops.reshape(half, [groups, members])

    norms = ops.sqrt(ops.sum(ops.square(e), axis=0))
    dim = codebook.shape[1]

    def assign(raw):
        # Components of a huge vector are clipped, so that products stay finite.
        rows = ops.clip((raw - center) / size, -_HUGE, _HUGE)
        score = full_precision_matmul(rows, e)
        # Find the group with the best code, then the best code of the group. So
        # only a maximum runs over all scores, and XLA fuses that with the
        # product.
        best = ops.max(
            ops.reshape(score, [-1, groups, members]) - half, axis=-1
        )
        group = _first_largest(best)
        score = ops.reshape(score, [-1, members])
        at = ops.arange(ops.shape(rows)[0], dtype="int32") * groups + group
        score = ops.take(score, at, axis=0) - ops.take(half, group, axis=0)
        member = _first_largest(score)
        code = ops.minimum(group * members + member, num_codes - 1)

        # Where groups of codes are far apart, no center is near all of them.
        # The products then have too few digits if the second best score is
        # within the rounding error of the best, and that error is not small
        # compared with the distance.
        first = ops.max(score, axis=-1)
        second = ops.maximum(
            _largest_without(score, member), _largest_without(best, group)
        )
        norm = ops.take(norms, code)
        error = 4 * _EPSILON * dim**0.5 * norm
        error = error * (norm + ops.sqrt(ops.sum(ops.square(rows), axis=-1)))
        left = (raw - ops.take(codebook, code, axis=0)) / size
        distance = ops.sum(ops.square(left), axis=-1)
        doubtful = (first - second <= 2 * error) & (error > 0.02 * distance)
        return ops.cond(
            ops.any(doubtful),
            lambda: by_differences(raw),
            lambda: code,
        )

    def by_differences(raw):
        """As `assign`, exact and slow: feature by feature."""

        def add(feature, total):
            x = ops.take(raw, feature, axis=1)[:, None]
            y = ops.take(codebook, feature, axis=1)
            return total + ops.square((x - y) / size)

        start = ops.zeros((ops.shape(raw)[0], num_codes), "float32")
        return _first_largest(-ops.fori_loop(0, dim, add, start))

    return map_blocks(assign, z, max(BLOCK // num_codes, 8))


def central_point(points):
    """A center of most points; `(n, dim)` to `(dim,)`.

        c ← Σ w_i x_i / Σ w_i,  w_i = 1 / ||x_i - c||²

    a few times, starting from the mean. A point far from most others gets a
    small weight, where it would move the mean away from all of them.
    """
    center = ops.mean(points, axis=0)
    for _ in range(_ROUNDS):
        away = points - center
        unit = away / _positive(ops.max(ops.abs(away)))
        # The added number keeps the weight of a point at the center finite.
        weights = 1 / (ops.sum(ops.square(unit), axis=1) + 1e-20)
        weights = weights / ops.sum(weights)
        center = center + ops.sum(weights[:, None] * away, axis=0)
    return center


def _largest_without(score, index):
    """The maximum over the last axis without one entry."""
    places = ops.arange(score.shape[-1], dtype="int32")
    rest = ops.where(places == index[:, None], -np.inf, score)
    return ops.max(rest, axis=-1)


def _positive(x):
    return ops.where(x > 0, x, ops.ones_like(x))


def _first_largest(score):
    """As `argmax` of the last axis, which XLA is much slower at."""
    size = score.shape[-1]
    best = ops.max(score, axis=-1, keepdims=True)
    index = ops.where(score >= best, ops.arange(size, dtype="int32"), size - 1)
    return ops.min(index, axis=-1)
