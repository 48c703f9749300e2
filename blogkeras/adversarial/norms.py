"""Lengths and directions of the tensors of a site."""

import functools

import keras
from keras import ops

from blogkeras import backend
from blogkeras.state import draw_rows


def site_gradients(gradients, origin, site):
    """Gradients at a site as float32 tensors: dense, masked, over replicas."""
    gradients = [
        ops.zeros_like(x) if g is None else backend.dense(g)
        for g, x in zip(gradients, origin, strict=True)
    ]
    gradients = site.mask([at_least_float32(g) for g in gradients])
    return [
        backend.all_reduce_sum(g) if part.shared else g
        for group in site.groups(gradients)
        for part, tensors in group
        for g in tensors
    ]


def at_least_float32(x):
    """x in float32, or in float64 if it is."""
    return ops.cast(x, float_dtype(x))


def float_dtype(x):
    """The dtype in which lengths of x are computed."""
    return keras.backend.result_type(x.dtype, "float32")


def shifted(origin, delta):
    """origin + delta, in the dtype of the origin."""
    return [
        x + ops.cast(d, x.dtype) for x, d in zip(origin, delta, strict=True)
    ]


def bounded(point, origin, bounds):
    """A point whose coordinates are within bounds.

    A coordinate of the origin that is itself outside may stay where it is.

    Args:
        point: List of tensors.
        origin: List of tensors of the same shapes and dtypes.
        bounds: `(low, high)`, or `None` for no bounds.
    """
    if bounds is None:
        return point
    low, high = bounds
    return [
        ops.maximum(
            ops.minimum(p, ops.maximum(x, ops.cast(high, x.dtype))),
            ops.minimum(x, ops.cast(low, x.dtype)),
        )
        for p, x in zip(point, origin, strict=True)
    ]


def offsets(origin, delta, bounds):
    """`delta`, shortened where `origin + delta` leaves the bounds."""
    if bounds is None:
        return delta
    point = bounded(shifted(origin, delta), origin, bounds)
    return [
        ops.cast(p, d.dtype) - ops.cast(x, d.dtype)
        for p, x, d in zip(point, origin, delta, strict=True)
    ]


def scaled(factor, tensors):
    """factor · x of each tensor, in its dtype."""
    return [ops.cast(factor, x.dtype) * x for x in tensors]


def norms(tensors, scope, site):
    """Euclidean norms over `scope`, broadcastable to the tensors."""
    if scope == "coordinate":
        return [ops.abs(x) for x in tensors]
    if scope == "token":
        return [_length_of_rows(x) for x in tensors]
    found = []
    for group in site.groups(tensors):
        if scope == "sample":
            together = [x for _, part in group for x in part]
            norm = sample_norms(together)
            found += [per_sample(norm, x) for x in together]
        else:
            norm = _length_of_group(group)
            found += [norm for _, part in group for _ in part]
    return found


def squared_length(group):
    """The sum of the squares of a group of tensors, over the replicas."""
    total = 0.0
    for site, tensors in group:
        part = sum(ops.sum(ops.square(x)) for x in tensors)
        # Of what the replicas share each has the same values.
        total += part if site.shared else backend.all_reduce_sum(part)
    return total


def sample_norms(tensors):
    """One norm for each sample, over all the tensors: `(batch,)`."""
    sizes = [x.shape[0] if len(x.shape) else 1 for x in tensors]
    if any(not len(x.shape) for x in tensors) or len({*sizes} - {None}) > 1:
        raise ValueError(
            "A norm per sample needs the batch as the first axis of all that "
            "is perturbed. Name another layer as `embedding_name`, or use "
            'norm_scope="token". Received: tensors of shapes '
            f"{[tuple(x.shape) for x in tensors]}"
        )
    axes = [tuple(range(1, len(x.shape))) for x in tensors]
    largest = _largest(
        _largest_value(x, axis) for x, axis in zip(tensors, axes, strict=True)
    )
    return largest * ops.sqrt(
        sum(
            ops.sum(ops.square(x / per_sample(largest, x)), axis)
            for x, axis in zip(tensors, axes, strict=True)
        )
    )


def length(x):
    """The Euclidean norm of a tensor, scalar."""
    largest = _largest([_largest_value(x)])
    return largest * ops.sqrt(ops.sum(ops.square(x / largest)))


def _length_of_rows(x):
    largest = _largest([_largest_value(x, -1, keepdims=True)])
    squares = ops.sum(ops.square(x / largest), -1, keepdims=True)
    return largest * ops.sqrt(squares)


def _length_of_group(group):
    """The square root of `squared_length`."""
    values = []
    for site, tensors in group:
        value = functools.reduce(ops.maximum, map(_largest_value, tensors))
        # The sum over the replicas is as good: it is at most their number
        # times the largest.
        values.append(value if site.shared else backend.all_reduce_sum(value))
    largest = _largest(values)
    parts = [(site, [x / largest for x in tensors]) for site, tensors in group]
    return largest * ops.sqrt(squared_length(parts))


def _largest_value(x, axis=None, keepdims=False):
    return ops.max(ops.abs(x), axis, keepdims, initial=0.0)


def _largest(values):
    """The largest of several tensors of absolute values; 1 where it is 0.

    A norm is computed of tensors divided by it. In float32 the squares of
    numbers below 1e-22 would be zero, such as the gradients of a sample that is
    predicted with certainty, and those of numbers above 1e19 infinite.
    """
    largest = functools.reduce(ops.maximum, values)
    return ops.where(largest > 0, largest, ops.ones_like(largest))


def per_sample(values, x):
    """One value for each sample, broadcastable to `x`."""
    return ops.reshape(values, (-1,) + (1,) * (len(x.shape) - 1))


def units(tensors, scope, site):
    """x / ‖x‖, and zero where the norm is zero or not finite."""
    directions = []
    for x, norm in zip(tensors, norms(tensors, scope, site), strict=True):
        usable = ops.logical_and(norm > 0, ops.isfinite(norm))
        norm = ops.where(usable, norm, ops.ones_like(norm))
        directions.append(ops.where(usable, x / norm, ops.zeros_like(x)))
    return directions


def random_units(objective, site, origin, method):
    """Random directions: of norm 1 over `norm_scope`, zero at padding.

    Those of single coordinates are uniform in [-1, 1].
    """
    seed, scope = objective.seed(method.seed), method.norm_scope
    noise = []
    for x in origin:
        draw = functools.partial(backend.normal, dtype=float_dtype(x))
        if scope == "coordinate":
            draw = functools.partial(
                backend.uniform, minval=-1, maxval=1, dtype=float_dtype(x)
            )
        noise.append(draw_rows(draw, ops.shape(x), seed))
    noise = site.mask(noise)
    return noise if scope == "coordinate" else units(noise, scope, site)


def zero_if_not_finite(x):
    """x, and zero where it is not finite."""
    return ops.where(ops.isfinite(x), x, ops.zeros_like(x))
