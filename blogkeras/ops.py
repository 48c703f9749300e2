"""Small mathematics shared by the rooms, in `keras.ops`."""

from keras import ops, tree

from blogkeras import backend


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


def masked_mean(x, mask=None, axis=None, keepdims=False):
    """Mean over the positions where `mask` is true.

    Values under the mask, NaN included, have no influence; where nothing is
    left the mean is 0.

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


def squared_distances(x, y):
    """All squared Euclidean distances between two sets of vectors.

    ‖x‖² + ‖y‖² − 2 x·y, after both sets are shifted by the mean of `y`: the
    cancellation then costs digits of the spread, not of the position. Never
    negative. Products are of the inputs' own precision on accelerators, too
    (see `backend.full_precision`). Combine with `map_blocks` where the matrix
    would be too large.

    Args:
        x: `(..., n, dim)`, floating.
        y: `(..., m, dim)`, floating.

    Returns:
        `(..., n, m)`.
    """
    center = ops.stop_gradient(ops.mean(y, axis=-2, keepdims=True))
    x, y = x - center, y - center
    x2 = ops.sum(ops.square(x), axis=-1)[..., :, None]
    y2 = ops.sum(ops.square(y), axis=-1)[..., None, :]
    with backend.full_precision():
        xy = ops.matmul(x, ops.swapaxes(y, -1, -2))
    return ops.maximum(x2 + y2 - 2 * xy, 0)


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
    padding = [[0, -rows % block_size], *([0, 0] for _ in rest)]
    blocks = ops.reshape(ops.pad(x, padding), [-1, block_size, *rest])
    return tree.map_structure(
        lambda out: ops.reshape(out, [-1, *out.shape[2:]])[:rows],
        ops.map(fn, blocks),
    )


def straight_through(forward, backward):
    """The value of `forward` with the gradient of `backward`.

    `stop_gradient(forward) + (backward - stop_gradient(backward))`: any step
    that has no useful derivative (rounding, nearest neighbour) gets one of your
    own design.

    Args:
        forward: Floating tensor.
        backward: Floating tensor of the same shape, finite.

    Departs from the post: `backward + stop_gradient(forward - backward)`, as
    the post has it, is `forward` up to rounding; here it is to the bit.

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760)
    """
    nothing = backward - ops.stop_gradient(backward)
    return ops.stop_gradient(forward) + nothing
