"""Converts the user's data to numbers without loss of digits.

A variable in NumPy (or a list) is centred and scaled to a size near 1 in
float64, before it is rounded to the float32 that HSIC computes in. So times of
day in Unix seconds or lengths in units of 1e-25 keep their digits. A tensor is
rounded already; it is centred as it is.
"""

import datetime
import math

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import as_numbers, as_numpy, check_finite
from blogkeras.ops import central_vector, safe_sqrt, squared_distances
from blogkeras.typing import Tensor

# Number of rows that the median bandwidth uses: in a traced step, where XLA
# sorts all pairs, and outside of one, where the time is quadratic.
TRACED_ROWS = 128
ROWS = 5000
# Samples of float32 count as equal if their distance is below 2⁻²⁰ times that
# to the centre. This is the square of it.
_COINCIDENT = 2.0**-40
# Numbers of a block of distances in NumPy.
_BLOCK = 2**17
# A gap between values, in bandwidths, over which every kernel is exactly 0.
_GAP = 1e3


def is_array(x):
    """Whether `x` is an array, list, number or pandas column, not a tensor."""
    return not (
        ops.is_tensor(x)
        or isinstance(x, (keras.Variable, keras.KerasTensor))
        or hasattr(x, "aval")
    )


def is_categorical(x):
    """Whether a variable is of names: strings, or a table's categories.

    Numerals are names as well if they are strings. A column that holds strings
    beside other things is not of names: there None may be a missing number.
    """
    dtypes = getattr(x, "dtypes", getattr(x, "dtype", None))
    several = hasattr(dtypes, "__iter__") and not isinstance(dtypes, str)
    dtypes = list(dtypes) if several else [dtypes]
    names = {str(dtype).lower().partition("(")[0] for dtype in dtypes}
    if names and names <= {"category", "categorical", "enum"}:
        return True
    if not is_array(x):
        return names == {"<dtype: 'string'>"}
    x = np.asarray(x)
    return x.dtype.kind in "US" or (
        x.dtype.kind == "O" and x.size > 0 and all(map(_is_string, x.flat))
    )


def _is_string(value):
    return isinstance(value, (str, bytes))


def as_samples(x):
    """An array; categories of numbers, some missing, as an array of objects."""
    array = np.asarray(x)
    named = array.dtype.kind == "f" and is_categorical(x)
    return array.astype(object) if named else array


def columns(x):
    """`(n,)` becomes `(n, 1)`."""
    return x[:, None] if len(x.shape) == 1 else x


def floating(x):
    """A tensor of float64 if `x` is and the backend has it, else of float32."""
    x = ops.convert_to_tensor(x)
    double = keras.backend.standardize_dtype(x.dtype) == "float64"
    return x if double else ops.cast(x, "float32")


def float_dtype(x):
    """The dtype in which a variable is computed."""
    if is_array(x):
        wide = getattr(x, "dtype", None) == np.float64
        # JAX gives float32, unless float64 is switched on.
        x = ops.convert_to_tensor(
            np.zeros((), "float64" if wide else "float32")
        )
    x = keras.backend.standardize_dtype(x.dtype)
    return "float64" if x == "float64" else "float32"


def numbers(name, x):
    """An array `(..., n, dim)` of float64, of integers or of booleans.

    Raises:
        ValueError: on what is no number.
    """
    x = np.asarray(x)
    given = x
    if x.dtype.kind in "USO" and any(map(_is_string, x.flat)):
        x = None  # numerals are labels, too
    elif x.dtype.kind == "c":
        x = None  # it would become its real part
    elif x.dtype.kind not in "biuf":
        try:
            x = x.astype("float64")
        except (TypeError, ValueError):
            x = _seconds(x)
        if given.dtype.kind in "mM":
            # A date that is missing would be a number.
            x = np.where(np.isnat(given), np.nan, x)
    if x is None or x.dtype.kind not in "biuf":
        raise ValueError(
            f"Expected numbers in `{name}`; for labels take DeltaKernel(), for "
            "which missing ones are a label, too. Received: "
            f"{name} of dtype {given.dtype}, such as {given.ravel()[:3]}"
        )
    if x.ndim == 0:
        raise ValueError(
            f"Expected `{name}` of shape (n,) or (..., n, dim). Received: "
            f"shape {x.shape}"
        )
    return columns(x.astype("float64") if x.dtype.kind == "f" else x)


def _sample_sets(x):
    """`(..., n, dim)` as `(sets, n, dim)`, also where there are no numbers."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def each_sample(fn, x, keep):
    """`fn(rows, keep)` of every `(n, dim)` of an array `(..., n, dim)`."""
    flat = _sample_sets(x)
    if keep is not None:
        keep = np.broadcast_to(keep, x.shape[:-1]).reshape(flat.shape[:-1])
    out = [
        fn(rows, None if keep is None else keep[k])
        for k, rows in enumerate(flat)
    ]
    one = out[0] if out else fn(np.zeros(x.shape[-2:]), None)
    return np.reshape(out, (*x.shape[:-2], *one.shape)).astype(
        one.dtype, copy=False
    )


def from_center(x, keep=None):
    """x less a median of each feature, as float64; 0 where not `keep`.

    Of a feature with values of many sizes nothing is subtracted.
    """

    def shifted(x, keep):
        rows = x if keep is None or not keep.any() else x[keep]
        if len(rows) == 0:
            return x.astype("float64")
        count = min(len(rows), 99)
        some = rows[np.arange(count) * len(rows) // count]
        some = np.sort(some, axis=0)
        center = some[len(some) // 2]
        if x.dtype.kind == "b":
            x, center = x.astype("int8"), center.astype("int8")
        if x.dtype.kind in "iu":
            # Float64 cannot represent every integer of 64 bits. The difference
            # of the larger and the smaller one fits into 64 bits.
            high, low = np.maximum(x, center), np.minimum(x, center)
            size = high.astype("uint64") - low.astype("uint64")
            difference = np.where(x >= center, 1.0, -1.0) * size
        else:
            # Values far below the centre would lose their digits: then it is no
            # common offset.
            small = np.abs(some).min(axis=0) < 2.0**-20 * np.abs(center)
            with np.errstate(over="ignore"):
                difference = x - np.where(small, 0.0, center)
        if keep is not None:
            difference = np.where(keep[:, None], difference, 0.0)
        return difference

    return each_sample(shifted, x, keep)


def in_deviations(x):
    """Float64 `(..., n, dim)` about their mean, in standard deviations.

    Constant features become 0.
    """
    size = np.abs(x).max(axis=-2, keepdims=True)
    # Equal numbers become exactly 1, so that their deviation is exactly 0.
    x = x / np.where(size > 0, size, 1)
    x = x - x.mean(axis=-2, keepdims=True)
    deviation = np.sqrt(np.square(x).mean(axis=-2, keepdims=True))
    return x / np.where(deviation > 1e-15, deviation, 1)


def exponent_of(x):
    """The exponent of the power of two of the largest of some numbers."""
    largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
    return int(np.frexp(largest)[1]) if largest > 0 else 0


def scaled_sets(x):
    """Sets of samples, each divided by a power of two of its own size.

    Otherwise the numbers of a small set would vanish beside those of a large
    one in the same batch.

    Args:
        x: `(..., n, dim)`, float64.

    Returns:
        `(x, exponent, sizes)`: `x` is to be multiplied by 2**exponent and by
        2**sizes, integers `(...)`, which are `None` for a single set.
    """
    if x.ndim == 2:
        exponent = exponent_of(x)
        return np.ldexp(x, -exponent), exponent, None
    flat = _sample_sets(x)
    exponents = np.array([exponent_of(part) for part in flat], "int32")
    # What float32 cannot hold as a factor goes into the common exponent.
    largest = int(exponents.max(initial=0))
    common = largest - min(max(largest, -100), 100)
    sizes = np.clip(exponents - common, -120, 120).reshape(x.shape[:-2])
    return np.ldexp(x, -(common + sizes)[..., None, None]), common, sizes


def as_factors(sizes, dtype):
    """2**sizes as a tensor `(...)`."""
    return ops.convert_to_tensor(np.ldexp(1.0, sizes).astype(dtype))


def close_gaps(x):
    """Shortens gaps between values that are too large to change any kernel.

    Each feature is sorted, and gaps of more than 1000 bandwidths become as
    large as that. Kernels of these distances are 0 before and after, even in
    float64. So float32 keeps the small differences among outliers, too.

    Args:
        x: `(n, dim)`, float64, in bandwidths.
    """
    if not len(x) or np.abs(x).max() < _GAP:
        return x
    order = np.argsort(x, axis=0, kind="stable")
    ordered = np.take_along_axis(x, order, axis=0)
    with np.errstate(over="ignore"):
        gaps = np.minimum(np.diff(ordered, axis=0), _GAP)
    # Values near the centre keep all their digits: 0 stays where it is.
    at = np.concatenate([np.zeros_like(x[:1]), np.cumsum(gaps, axis=0)])
    zero = np.argmin(np.abs(ordered), axis=0)[None]
    at = at - np.take_along_axis(at, zero, axis=0)
    at = at + np.take_along_axis(ordered, zero, axis=0)
    near = np.abs(at - ordered) < 1e-6
    at = np.where(near, ordered, at)
    out = np.empty_like(x)
    np.put_along_axis(out, order, at, axis=0)
    return out


def codes_of(x):
    """Values of any kind as integers: equal rows, and only these, are equal.

    Args:
        x: `(..., n)` or `(..., n, dim)` array of numbers, strings or objects.

    Returns:
        Array of int32, `(..., n)`.
    """
    flat = x.reshape(-1, x.shape[-1])
    codes = np.stack([_codes_of_column(c) for c in flat.T], axis=-1)
    _, codes = np.unique(codes, axis=0, return_inverse=True)
    return codes.reshape(x.shape[:-1]).astype("int32")


def _codes_of_column(column):
    if column.dtype.kind != "O":
        return np.unique(column, return_inverse=True)[1].ravel()
    # NaN does not equal itself, and breaks the order of the others.
    values = [None if _is_missing(v) else v for v in column.tolist()]
    try:
        distinct = list(dict.fromkeys(values))
    except TypeError as error:  # lists, which have no hash
        raise ValueError(
            "Expected labels such as strings and numbers. Received: "
            f"{column[:3]}"
        ) from error
    try:
        distinct.sort(key=lambda v: (v is None, v))
    except TypeError:  # of several types, which have no order
        pass
    numbers = {value: number for number, value in enumerate(distinct)}
    return np.array([numbers[v] for v in values])


def _is_missing(value):
    """Whether a value is None, NaN or one that pandas has for it."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA compares as neither
        return True


def _seconds(x):
    """Dates, with a time zone or without, as numbers; `None` for others."""
    if not all(isinstance(value, datetime.datetime) for value in x.flat):
        return None
    dates = (d.replace(tzinfo=d.tzinfo or datetime.UTC) for d in x.flat)
    return np.reshape([date.timestamp() for date in dates], x.shape)


def check_features(x1, x2):
    """Raises a `ValueError` unless both have the same number of features."""
    if x1.shape[-1] != x2.shape[-1]:
        raise ValueError(
            "Expected samples of as many features, (..., n, dim) and "
            f"(..., m, dim). Received: shapes {tuple(x1.shape)} and "
            f"{tuple(x2.shape)}"
        )


def check_mask_shape(weight, shape):
    """The weights of the samples, broadcast to `shape`.

    Sets of samples may share a mask; one number for all samples is a mistake.
    """
    try:
        if weight.shape[-1:] == tuple(shape)[-1:]:
            return np.broadcast_to(weight, shape)
    except ValueError:
        pass
    raise ValueError(
        f"Expected a mask for samples of shape {tuple(shape)}. Received: "
        f"mask.shape={weight.shape}"
    )


def median_bandwidth(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The median distance between two different samples of a variable.

    If most pairs are equal, as in discrete data, it is the median over the
    others; for a constant variable it is 1. With concrete values all pairs
    are used up to 5000 samples, and 5000 evenly spread samples beyond, in
    NumPy's float64. In a traced step (a compiled function, `fit`) it is that of
    at most 128 evenly spread samples, since sorting all pairs would cost more
    than the rest of the step. No gradient flows through it.

    Args:
        x: `(n,)` or `(..., n, dim)`, numbers.
        mask: `(..., n)`. Samples where it is 0 or false do not count.

    Returns:
        A Python float for one sample set with concrete values, else a tensor
        `(...)`.

    Raises:
        ValueError: on NaN or infinity where the values are known.

    Example:

    >>> median_bandwidth([0.0, 1.0, 5.0])  # of the distances 1, 4, 5
    4.0

    Reference:
        [Gretton et al., 2007](https://papers.nips.cc/paper/3201)
    """
    known = is_array(x) or backend.is_concrete(x)
    if not known or not (
        mask is None or is_array(mask) or backend.is_concrete(mask)
    ):
        x = columns(floating(x))
        if mask is not None:
            mask = ops.cast(mask, "bool")
            mask = ops.broadcast_to(mask, ops.shape(x)[:-1])
            x = ops.where(mask[..., None], x, 0.0)
        return traced_median(x - central_vector(x, mask), mask)
    dtype = float_dtype(x)
    if not is_array(x):
        x = as_numpy(ops.cast(x, dtype) if "int" not in str(x.dtype) else x)
    coincident = coincidence(x)
    x = numbers("x", x)
    keep = None
    if mask is not None:
        keep = as_numpy(as_numbers(mask, "mask")).astype(bool)
        keep = check_mask_shape(keep, x.shape[:-1])
    check_finite("x", x if keep is None else x[keep])
    medians = each_sample(
        lambda x, keep: np.asarray(median_distance(x, keep, coincident)),
        from_center(x, keep),
        keep,
    )
    if x.ndim == 2:
        return float(medians)
    return ops.convert_to_tensor(medians.astype(dtype))


def coincidence(x):
    """The relative rounding error of a squared distance, by the dtype."""
    dtype = np.asarray(x).dtype
    exact = dtype.kind in "biu" or dtype == np.float64
    return 0.0 if exact else _COINCIDENT


def traced_median(x, mask):
    """The median of a centred variable, `(...)`, in a compiled step."""
    x = ops.stop_gradient(x)
    n = x.shape[-2] or ops.shape(x)[-2]
    count = min(x.shape[-2] or TRACED_ROWS, TRACED_ROWS)
    index = ops.cast(ops.arange(count), "int32") * n // count
    x = ops.take(x, index, axis=-2)
    weight = None if mask is None else ops.take(mask, index, axis=-1)
    d = squared_distances(x)
    # Where n < count some samples occur twice.
    valid = ops.broadcast_to(index[:, None] != index, ops.shape(d))
    if weight is not None:
        both = ops.logical_and(weight[..., :, None], weight[..., None, :])
        valid = ops.logical_and(valid, both)
    norms = ops.sum(ops.square(x), axis=-1)
    tiny = _COINCIDENT * (norms[..., :, None] + norms[..., None, :])
    d = ops.where(d <= tiny, 0.0, d)
    flat = [*ops.shape(d)[:-2], count * count]
    d, valid = ops.reshape(d, flat), ops.reshape(valid, flat)
    pairs = ops.sum(ops.cast(valid, "int32"), axis=-1, keepdims=True)
    equal = ops.logical_and(valid, d <= 0)
    equal = ops.sum(ops.cast(equal, "int32"), axis=-1, keepdims=True)
    d = ops.sort(ops.where(valid, d, math.inf), axis=-1)

    def middle(skip):
        """Each pair occurs twice, so M and M − 1 are the middle."""
        half = skip + (pairs - skip) // 2
        low = ops.take_along_axis(d, ops.maximum(half - 1, 0), axis=-1)
        high = ops.take_along_axis(
            d, ops.minimum(half, count * count - 1), axis=-1
        )
        return (safe_sqrt(low) + safe_sqrt(high)) / 2

    median = ops.where(2 * equal < pairs, middle(0), middle(equal))
    return ops.where(equal < pairs, median, ops.ones_like(median))[..., 0]


def median_distance(x, keep=None, coincident=0.0):
    """The same in NumPy, exact and without all pairs in memory.

    Args:
        x: `(n, dim)`, float64, as `from_center` gives it.
        keep: `(n,)`, boolean, or `None`.
        coincident: The result of `coincidence` for the numbers as they were
            given.
    """
    x = x if keep is None else x[keep]
    if len(x) > ROWS:
        x = x[np.arange(ROWS) * len(x) // ROWS]
    n, pairs = len(x), len(x) * (len(x) - 1) // 2
    size = np.abs(x).max(axis=1, initial=0.0)
    if n < 2 or not size.any():
        return 1.0
    # A typical size of samples, independent of outliers.
    unit = np.median(size[size > 0])
    with np.errstate(over="ignore"):
        x = x / unit

    if n <= 512:
        inside = _all_distances(x, coincident)
        median = _middle(inside, pairs)
        if median == 0:
            inside = inside[inside > 0]
            median = _middle(inside, len(inside)) if len(inside) else 1 / unit
        return float(median * unit)
    # A bracket from the pairs of some samples leaves few values to sort: the
    # rank of their median is off by about 0.02 of all pairs. A second bracket
    # is wider, and a last one holds everything.
    some = x[np.arange(512) * n // 512]
    sample = np.sort(_all_distances(some, coincident))
    quantiles = [0.46, 0.54, 0.38, 0.62]
    bounds = [sample[int(q * len(sample))] for q in quantiles]
    for low, high in (bounds[:2], bounds[2:], (-math.inf, math.inf)):
        median = _bracketed_middle(x, coincident, low, high, pairs)
        if median is not None:
            break
    if median == 0:
        equal = sum(
            np.count_nonzero(d <= 0) for d in _distance_blocks(x, coincident)
        )
        if equal == pairs:
            return 1.0
        median = _bracketed_middle(
            x, coincident, 0.0, math.inf, pairs - equal, equal
        )
    return float(median * unit)


_NONE = np.zeros((2, 0), int)


def _distance_blocks(x, coincident):
    """Squared distances of all pairs i < j, in arrays of one or two axes."""
    n, dim = x.shape
    step = max(1, _BLOCK // n)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.square(x).sum(axis=1)
    share, largest = 2.0**-16, norms.max()
    part = max(1, _BLOCK // dim)
    for start in range(0, n, step):
        some, others = x[start : start + step], x[start:]
        width = len(some)
        with np.errstate(over="ignore", invalid="ignore"):
            d = some @ others.T
            d *= -2
            d += norms[start : start + step, None]
            d += norms[start:]
            # Where products cancel or overflow, compute by differences. First
            # look with a limit for all pairs, which is seldom passed.
            limit = share * (norms[start : start + step] + largest)[:, None]
            near = ~(d > limit)
            near[:, :width] &= ~np.tri(width, dtype=bool)  # pairs i < j
            rows, places = np.nonzero(near) if near.any() else _NONE
            size = norms[start + rows] + norms[start + places]
            true = ~(d[rows, places] > share * size)
            rows, places, size = rows[true], places[true], size[true]
            for first in range(0, len(rows), part):
                i, j = rows[first : first + part], places[first : first + part]
                again = np.square(some[i] - others[j]).sum(axis=1)
                again[again <= coincident * size[first : first + part]] = 0
                d[i, j] = again
        # Of the square block on the diagonal, take the part above the diagonal.
        yield d[:, :width][np.triu_indices(width, 1)]
        yield d[:, width:]


def _all_distances(x, coincident):
    return np.concatenate([d.ravel() for d in _distance_blocks(x, coincident)])


def _middle(d, pairs):
    ranks = [(pairs - 1) // 2, pairs // 2]
    return np.sqrt(np.partition(d, ranks)[ranks]).mean()


def _bracketed_middle(x, coincident, low, high, pairs, skip=0):
    """The median of all pairs but the `skip` smallest, if in (low, high]."""
    below, inside = 0, []
    for d in _distance_blocks(x, coincident):
        is_below, chosen = d <= low, d <= high
        below += np.count_nonzero(is_below)
        chosen ^= is_below
        inside.append(d[chosen])
    inside = np.concatenate(inside)
    ranks = np.array([(pairs - 1) // 2, pairs // 2]) + (skip - below)
    if ranks[0] < 0 or ranks[1] >= len(inside):
        return None
    return np.sqrt(np.partition(inside, ranks)[ranks]).mean()
