"""Small mathematics shared by the rooms, in `keras.ops`."""

import math

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import shapes_agree


def safe_norm(x, axis=None, keepdims=False):
    """Euclidean norm whose gradient at zero is zero instead of NaN.

    Args:
        x: Floating tensor.
        axis: Axis or axes to reduce. Defaults to all.
        keepdims: Boolean. Whether reduced axes stay with size 1.

    Returns:
        `sqrt(sum(x²))`, of the dtype of `x`.
    """
    return safe_sqrt(ops.sum(ops.square(x), axis=axis, keepdims=keepdims))


def safe_sqrt(x):
    """Square root with value and gradient zero at zero (and below)."""
    positive = x > 0
    # The inner `where` keeps the infinite slope at zero out of the gradient.
    root = ops.sqrt(ops.where(positive, x, ops.ones_like(x)))
    return ops.where(positive, root, ops.zeros_like(x))


def normalize(x, axis=-1):
    """x / ‖x‖, and 0 where x is 0; the gradient at 0 is finite.

    The vector is first divided by its largest entry, so that squares of very
    large or very small vectors neither overflow nor vanish.

    Args:
        x: Floating tensor.
        axis: Axis or axes of a vector.

    Returns:
        Tensor of the shape of `x`.
    """
    # `initial` is for empty batches, of which TensorFlow takes no maximum.
    size = ops.max(ops.abs(x), axis=axis, keepdims=True, initial=0)
    size = ops.stop_gradient(size)
    x = x / ops.where(size > 0, size, ops.ones_like(size))
    norm = safe_norm(x, axis=axis, keepdims=True)
    return x / ops.where(norm > 0, norm, ops.ones_like(norm))


def masked_mean(x, mask=None, axis=None, keepdims=False):
    """Mean over the positions where `mask` is true.

    Masked values, NaN included, have no influence; where everything is masked
    the mean is 0.

    Args:
        x: Floating tensor.
        mask: Boolean tensor of `x`'s rank, broadcastable to `x`, or of lower
            rank, aligned with the first axes. `None` counts everything.
        axis: Axis or axes to reduce. Defaults to all.
        keepdims: Boolean.
    """
    if mask is None:
        return ops.mean(x, axis=axis, keepdims=keepdims)
    mask = ops.cast(mask, "bool")
    for _ in range(len(x.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    mask = ops.broadcast_to(mask, ops.shape(x))
    total = ops.sum(
        ops.where(mask, x, ops.zeros_like(x)), axis=axis, keepdims=keepdims
    )
    count = ops.sum(ops.cast(mask, x.dtype), axis=axis, keepdims=keepdims)
    return total / ops.maximum(count, 1)


def full_precision_matmul(x, y):
    """`keras.ops.matmul`, with products of the inputs' own precision.

    By default accelerators round the factors of a product of float32 matrices
    to bfloat16 (TPU) or TF32 (GPU), which keeps three to four digits. Use this
    wherever the digits of a result are promised. The products of its gradient
    are of full precision too.

    On JAX the precision is part of the program. TensorFlow has only a switch
    for the whole process, which this function leaves alone:
    `tf.config.experimental.enable_tensor_float_32_execution(False)`.

    Args:
        x: `(..., n, k)`, floating.
        y: `(..., k, m)`, floating.

    Returns:
        `(..., n, m)`.
    """
    with backend.full_precision():
        return ops.matmul(x, y)


# The distance from 1 to the next number.
_EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
# The number of features up to which differences are as cheap as products.
_FEW_FEATURES = 8
# ‖x − y‖² below this share of ‖x‖² + ‖y‖² is computed by differences.
CANCELLATION = 2.0**-8
# The largest number of differences in memory at a time.
_DIFFERENCES = 2**20
# The number of features at a time where the number of rows is not known.
_FEATURES = 16


def squared_distances(x, y=None, tolerance=0.0, equal=None):
    """All squared Euclidean distances between two sets of vectors.

        d²ᵢⱼ = ‖xᵢ − c‖² + ‖yⱼ − c‖² − 2 (xᵢ − c)·(yⱼ − c)

    with full-precision products, around a central vector c of `y` that neither
    a common offset nor a few outliers move away from the data. Where a
    distance is small against ‖xᵢ − c‖ and ‖yⱼ − c‖, the digits of that
    difference are lost; if there is such a pair, all distances are computed
    from the differences xᵢ − yⱼ instead, which are exact for near vectors. The
    same holds for the gradient. Vectors of up to 8 features always take the
    differences.

    Error: at most (dim + 4) ε d² by differences and 2⁸ (dim + 4) ε d² by
    products, plus `tolerance`, with ε the dtype's unit in the last place (sums
    of random rounding errors are nearer to √dim than to dim). Equal vectors
    have distance exactly 0 where `tolerance` is 0. Never negative.

    Memory: the matrix and, for differences, 2²⁰ numbers at a time. Combine with
    `map_blocks` where the matrix would be too large: then each block chooses
    between products and differences by itself.

    Args:
        x: `(..., n, dim)`, floating.
        y: `(..., m, dim)`, floating. `None` is `x`; the diagonal is then
            `equal`.
        tolerance: Number ≥ 0, or tensor `(..., 1, 1)`. An error of d² that is
            accepted: products are used as long as their rounding error stays
            below it.
        equal: `(n, m)`, boolean. Pairs that are known to be the same vector:
            their distance is 0, and they are ignored in that choice.

    Returns:
        `(..., n, m)`.
    """
    x = ops.convert_to_tensor(x)
    if y is None:
        y = x
        index = ops.arange(ops.shape(x)[-2], dtype="int32")
        equal = ops.expand_dims(index, -1) == index
    y = ops.convert_to_tensor(y)
    if tuple(x.shape[:-2]) != tuple(y.shape[:-2]):
        # Broadcast here, so that the gradient is summed over repeated vectors.
        x, y = (
            x + ops.zeros_like(y[..., :1, :1]),
            y + ops.zeros_like(x[..., :1, :1]),
        )
    dtype = keras.backend.standardize_dtype(x.dtype)
    unit = 4 * _EPSILON[dtype]
    # Every traced tensor goes in as an argument: in the body of a loop JAX
    # cannot differentiate a function that closes over a tensor of the loop.
    constants = [ops.cast(ops.stop_gradient(tolerance), dtype)]
    if equal is not None:
        constants.append(ops.cast(equal, dtype))

    @ops.custom_gradient
    def distances(x, y, tolerance, equal=None):
        if equal is not None:
            equal = equal > 0
        if x.shape[-1] <= _FEW_FEATURES:
            x0, y0, near = x, y, True
            d2 = _squares_of_differences(x, y)
        else:
            c = central_vector(y)
            x0, y0 = x - c, y - c
            d2, near = _squares_by_products(x0, y0, unit, tolerance, equal)
            d2 = _either(
                near, lambda: _squares_of_differences(x, y), lambda: d2
            )

        def gradient(*args, upstream=None):
            g = args[0] if upstream is None else upstream
            if equal is not None:
                g = ops.where(equal, ops.zeros_like(g), g)
            slopes = _either(
                near,
                lambda: _slopes_of_differences(g, x, y),
                lambda: _slopes_by_products(g, x0, y0),
            )
            return *slopes, *map(ops.zeros_like, constants)

        return d2, gradient

    return distances(x, y, *constants)


def squared_distances_of_arrays(x, y):
    """`squared_distances` in NumPy, in the precision of the arrays.

    Where products cancel, or leave the range of floats, single pairs are
    computed from their differences.

    Args:
        x: `(..., n, dim)` array.
        y: `(..., m, dim)` array, with the same leading axes.

    Returns:
        `(..., n, m)` array.
    """
    share = 2.0**-20 if x.dtype == np.float64 else CANCELLATION
    with np.errstate(over="ignore", invalid="ignore"):
        x0, y0, sizes = centered_arrays(x, y)
        d2 = sizes - 2 * (x0 @ np.swapaxes(y0, -1, -2))
        # `not (d2 > ...)` and not `d2 <= ...`: it is true of NaN, too.
        near = np.nonzero(~(d2 > share * sizes))
        step = max(1, _DIFFERENCES // max(1, x.shape[-1]))
        for first in range(0, len(near[0]), step):
            *lead, i, j = (a[first : first + step] for a in near)
            difference = x[(*lead, i)] - y[(*lead, j)]
            d2[(*lead, i, j)] = np.square(difference).sum(-1)
    return d2


def centered_arrays(x, y):
    """What `squared_distances_of_arrays` multiplies, and the sizes of it.

    Args:
        x: `(..., n, dim)` array.
        y: `(..., m, dim)` array, with the same leading axes.

    Returns:
        `(x − c, y − c, sizes)`, c a central vector of `y`, and
        ‖xᵢ − c‖² + ‖yⱼ − c‖², `(..., n, m)`.
    """
    size = y.shape[-2]
    center = y[..., np.arange(1, 19, 2) * size // 18, :]
    for _ in range(2):  # as in `central_vector`; a median takes much longer
        thirds = (center[..., k::3, :] for k in range(3))
        center = _median_of_three(*thirds, np)
    x, y = x - center, y - center
    sizes = np.square(x).sum(-1)[..., :, None]
    return x, y, sizes + np.square(y).sum(-1)[..., None, :]


def _either(predicate, true_fn, false_fn):
    """`cond`; where the predicate has a value, no graph is built."""
    if isinstance(predicate, bool) or backend.is_concrete(predicate):
        return true_fn() if bool(predicate) else false_fn()
    return ops.cond(predicate, true_fn, false_fn)


def central_vector(y, mask=None):
    """A vector in the middle of the rows of `y`; outliers hardly move it.

    Tukey's ninther of nine evenly spread rows: medians of three, and the median
    of these, for each feature. Up to three outliers among the nine have no
    influence. Subtract it where digits matter more than a mean of exactly zero.
    Of equal rows it is that row, to the bit.

    Args:
        y: `(..., m, dim)`, numbers of any dtype, m ≥ 1.
        mask: `(..., m)`, boolean. Rows that count; all by default.

    Returns:
        `(..., 1, dim)`, without a gradient.
    """
    odd = ops.arange(1, 19, 2, dtype="int32")
    y = ops.stop_gradient(y)
    if mask is None:
        size = y.shape[-2] or ops.cast(ops.shape(y)[-2], "int32")
        rows = ops.take(y, odd * size // 18, axis=-2)
    else:
        # The number of rows up to each one that count.
        rank = ops.cumsum(ops.cast(mask, "int32"), axis=-1)
        wanted = odd * rank[..., -1:] // 18
        index = ops.sum(
            ops.cast(rank[..., None, :] <= wanted[..., None], "int32"), axis=-1
        )
        index = ops.minimum(index, ops.shape(y)[-2] - 1)
        rows = ops.take_along_axis(y, index[..., None], axis=-2)
    rows = [row[..., None, :] for row in ops.unstack(rows, 9, axis=-2)]
    medians = [_median_of_three(*rows[k::3]) for k in range(3)]
    return _median_of_three(*medians)


def _median_of_three(a, b, c, xp=ops):
    low, high = xp.minimum(a, b), xp.maximum(a, b)
    return xp.maximum(low, xp.minimum(high, c))


def _squares_by_products(x, y, unit, tolerance, equal):
    """The distances, and whether they have too few digits."""
    size = (
        ops.sum(ops.square(x), axis=-1)[..., :, None]
        + ops.sum(ops.square(y), axis=-1)[..., None, :]
    )
    d2 = size - 2 * full_precision_matmul(x, ops.swapaxes(y, -1, -2))
    near = ops.logical_and(d2 < CANCELLATION * size, unit * size > tolerance)
    # Where squares overflow, their difference is NaN.
    near = ops.logical_or(near, ops.logical_not(ops.isfinite(size)))
    if equal is not None:
        d2 = ops.where(equal, ops.zeros_like(d2), d2)
        near = ops.logical_and(near, ops.logical_not(equal))
    return ops.maximum(d2, 0), ops.any(near)


def _slopes_by_products(g, x, y):
    """`(Σⱼ 2 gᵢⱼ (xᵢ − yⱼ), Σᵢ 2 gᵢⱼ (yⱼ − xᵢ))`."""
    to_x = ops.sum(g, axis=-1)[..., None] * x - full_precision_matmul(g, y)
    to_y = ops.sum(g, axis=-2)[..., None] * y - full_precision_matmul(
        ops.swapaxes(g, -1, -2), x
    )
    return 2 * to_x, 2 * to_y


def _squares_of_differences(x, y):
    def squares(x, y):
        # The features stand in the middle: sums over the last axis are slow.
        difference = (
            x[..., :, :, None] - ops.swapaxes(y, -1, -2)[..., None, :, :]
        )
        return ops.sum(ops.square(difference), axis=-2)

    count, size = _pieces(x, y)
    if count == 1:
        return squares(x, y)
    x, y = _split_features(x, count, size), _split_features(y, count, size)

    def add(k, total):
        return total + squares(ops.take(x, k, axis=0), ops.take(y, k, axis=0))

    total = add(0, 0.0)
    if backend.is_concrete(total):
        for k in range(1, count):
            total = add(k, total)
        return total
    return ops.fori_loop(1, count, add, total)


def _slopes_of_differences(g, x, y):
    def slopes(pieces):
        x, y = pieces
        difference = x[..., :, None, :] - y[..., None, :, :]
        product = 2 * g[..., None] * difference
        return ops.sum(product, axis=-2), -ops.sum(product, axis=-3)

    count, size = _pieces(x, y)
    if count == 1:
        return slopes((x, y))
    pieces = _split_features(x, count, size), _split_features(y, count, size)
    if backend.is_concrete(g):
        found = [slopes((pieces[0][k], pieces[1][k])) for k in range(count)]
        found = [ops.stack(parts) for parts in zip(*found, strict=True)]
    else:
        found = ops.map(slopes, pieces)
    return tuple(
        _join_features(part, z) for part, z in zip(found, (x, y), strict=True)
    )


def _pieces(x, y):
    """How many pieces the features are cut into, and the size of each."""
    rows = (*x.shape[:-1], y.shape[-2])
    size = _FEATURES
    if all(isinstance(n, int) for n in rows):
        size = max(1, _DIFFERENCES // max(1, math.prod(rows)))
    dim = x.shape[-1]
    count = max(1, -(-dim // size))
    return count, -(-dim // count)


def _split_features(x, count, size):
    """`(..., n, dim)` to `(count, ..., n, size)`, filled up with zeros."""
    padding = [[0, 0]] * (len(x.shape) - 1) + [[0, count * size - x.shape[-1]]]
    x = ops.pad(x, padding)
    x = ops.reshape(x, [*ops.shape(x)[:-1], count, size])
    return ops.moveaxis(x, -2, 0)


def _join_features(pieces, like):
    pieces = ops.moveaxis(pieces, 0, -2)
    flat = ops.reshape(pieces, [*ops.shape(pieces)[:-2], -1])
    return flat[..., : like.shape[-1]]


def map_blocks(fn, x, block_size):
    """`fn(x)` computed in blocks of rows, so that only one block is in memory.

    Args:
        fn: Maps `(block_size, ...)` to a tensor or structure of tensors with
            `block_size` rows, each row from its own row alone.
        x: `(n, ...)` with known rank; `n` may be unknown. Where it is a symbol,
            as in JAX's export of a model with a free batch size, all rows are
            one block.
        block_size: Integer. Rows per block.

    Returns:
        `fn(x)`, with `n` rows.

    Example:

    >>> x, codes = keras.ops.ones((10_000, 8)), keras.ops.ones((5_000, 8))
    >>> nearest = map_blocks(
    ...     lambda rows: keras.ops.argmin(squared_distances(rows, codes), -1),
    ...     x,
    ...     block_size=256,
    ... )
    """
    size = x.shape[0]
    if size is not None and (not isinstance(size, int) or size <= block_size):
        return fn(x)
    rows, rest = ops.shape(x)[0], list(x.shape[1:])
    if size is None:
        # A few rows need not fill a whole block. None are one block, so that
        # TensorFlow knows the shape of a result.
        block_size = ops.clip(rows, 1, block_size)
        missing = -rows % block_size + ops.cast(rows == 0, "int32")
    else:
        missing = -rows % block_size
    padding = [[0, missing], *([0, 0] for _ in rest)]
    blocks = ops.reshape(ops.pad(x, padding), [-1, block_size, *rest])
    return tree.map_structure(
        lambda out: ops.reshape(out, [-1, *out.shape[2:]])[:rows],
        ops.map(fn, blocks),
    )


def straight_through(forward, backward):
    """The value of `forward` with the gradient of `backward`.

    `stop_gradient(forward) + (backward - stop_gradient(backward))`: a step
    without a useful derivative (rounding, nearest neighbour) gets the one of
    `backward`.

    Args:
        forward: Floating tensor.
        backward: Floating tensor of the same shape, finite.

    Returns:
        Tensor of the same shape, equal to `forward` to the bit.

    Raises:
        ValueError: if the shapes differ.

    Example:

    >>> x = ops.convert_to_tensor([0.4, 1.6])
    >>> rounded = straight_through(ops.round(x), x)  # with the gradient of x
    >>> ops.convert_to_numpy(rounded).tolist()
    [0.0, 2.0]

    Departs from the post: `backward + stop_gradient(forward - backward)`, as
    the post has it, is `forward` up to rounding; here it is to the bit.

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760)
    """
    forward, backward = map(ops.convert_to_tensor, (forward, backward))
    # Otherwise they would be broadcast.
    if not shapes_agree(forward.shape, backward.shape):
        raise ValueError(
            "Expected two tensors of one shape. Received: forward of shape "
            f"{tuple(forward.shape)}, backward of shape "
            f"{tuple(backward.shape)}"
        )
    nothing = backward - ops.stop_gradient(backward)
    return ops.stop_gradient(forward) + nothing


def sample_categorical(logits, u, block_size=128):
    """Draws classes from softmax(logits), given uniform numbers.

    It inverts the distribution function at `u`, in two short searches: among
    the sums of blocks of `block_size` probabilities, then inside one block.
    That needs one uniform number for a draw. The standard Gumbel-max trick
    needs one for each class: on a CPU, drawing these takes longer than the
    matrix product that computes the logits.

    Args:
        logits: `(..., classes)`, floating, computed in float32. Classes of
            -inf are never drawn. No gradient passes.
        u: Uniform numbers in [0, 1): of shape `(...)`, or of any shape where
            `logits` is `(classes,)`, one distribution for all draws.
        block_size: Integer. Classes in a block.

    Returns:
        Tensor of int32, shaped like `u`.

    Example:

    >>> logits = keras.ops.log(keras.ops.array([0.25, 0.5, 0.25]))
    >>> sample_categorical(logits, keras.ops.array([0.1, 0.3, 0.7, 0.8]))
    Array([0, 1, 1, 2], dtype=int32)
    """
    logits = ops.cast(ops.stop_gradient(logits), "float32")
    *batch, classes = logits.shape
    p = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    p = ops.pad(p, [[0, 0]] * len(batch) + [[0, -classes % block_size]])
    blocks = -(-classes // block_size)
    p = ops.reshape(p, [*ops.shape(p)[:-1], blocks, block_size])
    sums = ops.sum(p, axis=-1)  # (..., blocks)
    total = ops.cumsum(sums, axis=-1)
    # (..., 1), in units of p, which does not sum to 1
    u = ops.cast(ops.stop_gradient(u), "float32")[..., None] * total[..., -1:]
    block = _first_above(total, u, sums)
    before = ops.pad(total, [[0, 0]] * len(batch) + [[1, 0]])
    if batch:
        p = ops.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :]
        before = ops.take_along_axis(before, block[..., None], axis=-1)
    else:
        p = ops.take(p, block, axis=0)
        before = ops.take(before, block, axis=0)[..., None]
    inside = _first_above(ops.cumsum(p, axis=-1), u - before, p)
    return block * block_size + inside


def _first_above(total, u, p):
    """The first place where the running total of p exceeds u.

    Rounding may make u at least as large as every total: then it is the last
    place where p is not zero.
    """
    size = p.shape[-1]
    first = ops.sum(ops.cast(total <= u, "int32"), axis=-1)
    last = ops.max(ops.where(p > 0, ops.arange(size, dtype="int32"), 0), -1)
    return ops.minimum(first, last)
