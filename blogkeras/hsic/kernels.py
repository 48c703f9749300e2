"""Kernels: what counts as similar. Small objects, or any callable."""

import math

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.ops import safe_sqrt, squared_distances

FORMS = ("blog", "usual")
# Rows that the median bandwidth is taken from: in a traced step, where XLA
# would sort all pairs, and outside, where their number is quadratic.
TRACED_ROWS = 128
ROWS = 5000
# Squared distances below this share of their mean count as zero: in float32
# they are rounding.
COINCIDENT = 1e-6


class Kernel:
    """What `hsic` needs of a kernel, in two steps.

    `features(x, weight)` is computed once for all samples, `similarity` for
    every tile. Kernels are equal if their `similarity` is, so that compiled
    programs are found again: a bandwidth is in the features already.
    """

    def features(self, x, weight):
        return x

    def similarity(self, x1, x2):
        raise NotImplementedError

    def rows(self, features, index):
        """Rows `index` of the matrix; all of them if it is `None`."""
        some = features
        if index is not None:
            some = ops.take(features, index, axis=-2)
        return self.similarity(some, features)

    @property
    def key(self):
        return (type(self),)

    def __eq__(self, other):
        return isinstance(other, Kernel) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def __call__(self, x1, x2):
        """The matrix `(..., n, m)` of `(..., n, dim)` and `(..., m, dim)`."""
        return self.similarity(floating(x1), floating(x2))

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        arguments = ", ".join(
            f"{k}={v!r}" for k, v in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"


class DistanceKernel(Kernel):
    """A function of ‖x₁ − x₂‖ in units of a bandwidth."""

    def __init__(self, bandwidth=None):
        if bandwidth is not None and not (0 < float(bandwidth) < math.inf):
            raise ValueError(
                "Expected a positive bandwidth, or None for the median "
                f"distance. Received: bandwidth={bandwidth}"
            )
        self.bandwidth = None if bandwidth is None else float(bandwidth)

    def scale(self, dim):
        """How many of the kernel's units one bandwidth is."""
        return 1.0

    def features(self, x, weight):
        x = centered(x, weight)
        bandwidth = self.bandwidth
        if bandwidth is None:
            bandwidth = median_bandwidth(x, weight)
            bandwidth = ops.cast(bandwidth, x.dtype)[..., None, None]
        return x / (bandwidth * self.scale(x.shape[-1]))

    def __call__(self, x1, x2):
        if self.bandwidth is None:
            raise ValueError(
                "A median bandwidth is that of one sample. Pass `bandwidth=` "
                "to call the kernel by itself (`median_bandwidth` gives one). "
                f"Received: {self!r}"
            )
        x1, x2 = floating(x1), floating(x2)
        unit = self.bandwidth * self.scale(x1.shape[-1])
        return self.similarity(x1 / unit, x2 / unit)

    def get_config(self):
        return {"bandwidth": self.bandwidth}


@keras.saving.register_keras_serializable(package="blogkeras")
class GaussianKernel(DistanceKernel):
    """Gaussian kernel, in the post's or in the usual form.

        form="blog":    K(x₁, x₂) = exp(−‖x₁ − x₂‖² / σ²)
        form="usual":   K(x₁, x₂) = exp(−‖x₁ − x₂‖² / (2σ²))

    The same σ means two different kernels, so the form has no default.

    Args:
        bandwidth: Float > 0, σ. `None` is the median distance of the variable
            at hand, see `median_bandwidth`.
        form: `"blog"` or `"usual"`.
        per_dimension: Boolean. Divides ‖x₁ − x₂‖² by the number of features,
            so that one σ serves layers of any width (HSIC bottleneck).

    Reference:
        [blog post 6910](https://kexue.fm/archives/6910)
    """

    def __init__(self, bandwidth=None, *, form, per_dimension=False):
        super().__init__(bandwidth)
        self.form = one_of("form", form, FORMS)
        self.per_dimension = bool(per_dimension)

    def scale(self, dim):
        scale = 1.0 if self.form == "blog" else math.sqrt(2.0)
        return scale * (math.sqrt(dim) if self.per_dimension else 1.0)

    def features(self, x, weight):
        x = super().features(x, weight)
        if self.bandwidth is None and self.per_dimension:
            # The median distance already grows with the dimension.
            x = x * math.sqrt(x.shape[-1])
        return x

    def similarity(self, x1, x2):
        return ops.exp(-squared_distances(x1, x2))

    def get_config(self):
        return {
            "bandwidth": self.bandwidth,
            "form": self.form,
            "per_dimension": self.per_dimension,
        }


@keras.saving.register_keras_serializable(package="blogkeras")
class LaplacianKernel(DistanceKernel):
    """Laplacian kernel `exp(−‖x₁ − x₂‖ / σ)`, of the Euclidean distance.

    (scikit-learn's takes the sum of absolute differences; in one dimension
    they are the same.)

    Args:
        bandwidth: Float > 0, σ. `None` is the median distance.
    """

    def similarity(self, x1, x2):
        return ops.exp(-safe_sqrt(squared_distances(x1, x2)))


@keras.saving.register_keras_serializable(package="blogkeras")
class LinearKernel(Kernel):
    """Linear kernel `x₁ · x₂`: HSIC is ‖cov(x, y)‖², blind to the rest."""

    def features(self, x, weight):
        return centered(x, weight)

    def similarity(self, x1, x2):
        return ops.matmul(x1, ops.swapaxes(x2, -1, -2))


@keras.saving.register_keras_serializable(package="blogkeras")
class PolynomialKernel(Kernel):
    """Polynomial kernel `(scale · x₁ · x₂ + offset)^degree`.

    Args:
        degree: Integer ≥ 1.
        scale: Float > 0.
        offset: Float ≥ 0.
    """

    def __init__(self, degree=2, scale=1.0, offset=1.0):
        if int(degree) != degree or degree < 1 or scale <= 0 or offset < 0:
            raise ValueError(
                "Expected an integer degree >= 1, scale > 0 and offset >= 0, "
                "or the kernel is not positive. Received: "
                f"degree={degree}, scale={scale}, offset={offset}"
            )
        self.degree = int(degree)
        self.scale = float(scale)
        self.offset = float(offset)

    def similarity(self, x1, x2):
        product = ops.matmul(x1, ops.swapaxes(x2, -1, -2))
        return ops.power(self.scale * product + self.offset, self.degree)

    @property
    def key(self):
        return type(self), self.degree, self.scale, self.offset

    def get_config(self):
        return {
            "degree": self.degree,
            "scale": self.scale,
            "offset": self.offset,
        }


@keras.saving.register_keras_serializable(package="blogkeras")
class CosineKernel(Kernel):
    """Cosine kernel `x₁ · x₂ / (‖x₁‖ ‖x₂‖)`; 0 where a vector is zero."""

    def similarity(self, x1, x2):
        return ops.matmul(unit(x1), ops.swapaxes(unit(x2), -1, -2))


@keras.saving.register_keras_serializable(package="blogkeras")
class DeltaKernel(Kernel):
    """Delta kernel: 1 where all features are equal, else 0. For labels."""

    def similarity(self, x1, x2):
        equal = x1[..., :, None, :] == x2[..., None, :, :]
        return ops.cast(ops.all(equal, axis=-1), x1.dtype)


@keras.saving.register_keras_serializable(package="blogkeras")
class PrecomputedKernel(Kernel):
    """Says that the variable given *is* its kernel matrix, `(..., n, n)`.

    The matrix is taken to be symmetric.
    """

    def rows(self, features, index):
        return features if index is None else ops.take(features, index, axis=-2)

    def __call__(self, x1, x2):
        raise ValueError(
            "A precomputed matrix stands in the place of the variable: "
            "hsic(matrix, y, kernel_x=PrecomputedKernel()). Received: a call "
            "of the kernel"
        )


class CustomKernel(Kernel):
    """A function or Keras layer of the user's, `fn(x1, x2)`."""

    def __init__(self, fn):
        self.fn = fn

    def similarity(self, x1, x2):
        matrix = self.fn(x1, x2)
        return ops.cast(matrix, x1.dtype)

    @property
    def key(self):
        return CustomKernel, id(self.fn)


def as_kernel(kernel):
    """A `Kernel` for what the user passed; `None` is the default.

    The post's form is narrower by √2 than the usual one. With the median
    distance as bandwidth it also sees dependence that has no large scale
    (rotated uniforms), at some cost on smooth ones; see docs/hsic.md.
    """
    if kernel is None:
        return GaussianKernel(form="blog")
    if isinstance(kernel, Kernel):
        return kernel
    if callable(kernel) and not isinstance(kernel, type):
        return CustomKernel(kernel)
    raise ValueError(
        "Expected a kernel such as GaussianKernel(form='blog'), a function "
        "or layer fn(x1, x2) that returns their (n, m) matrix, or None for a "
        f"Gaussian of median bandwidth. Received: kernel={kernel!r}"
    )


def serialize(kernel):
    return keras.saving.serialize_keras_object(kernel)


def deserialize(kernel):
    """The kernel of a config; what is no config passes."""
    if isinstance(kernel, dict):
        return keras.saving.deserialize_keras_object(kernel)
    return kernel


def median_bandwidth(x, mask=None):
    """The median distance between two different samples of a variable.

    If most pairs are equal, as in discrete data, it is the median over the
    others; for a constant variable it is 1. With concrete values all pairs
    are used up to 5000 samples, and 5000 evenly spread samples beyond, in
    NumPy. In a traced step (a compiled function, `fit`) it is that of at most
    128 evenly spread samples, since sorting all pairs would cost more than the
    rest of the step. No gradient flows through it.

    Args:
        x: `(n,)` or `(..., n, dim)`, floating.
        mask: `(..., n)`. Samples where it is 0 or false do not count.

    Returns:
        A Python float for one sample set with concrete values, else a tensor
        `(...)`.
    """
    x = ops.stop_gradient(columns(floating(x)))
    if mask is not None:
        mask = ops.broadcast_to(ops.cast(mask, "bool"), ops.shape(x)[:-1])
    if not all(backend.is_concrete(t) for t in (x, mask) if t is not None):
        return _traced_median(x, mask)
    values = ops.convert_to_numpy(x)
    flat = values.reshape(-1, *values.shape[-2:])
    keep = np.ones(flat.shape[:-1], bool)
    if mask is not None:
        keep = ops.convert_to_numpy(mask).reshape(keep.shape)
    medians = [_median(v[k]) for v, k in zip(flat, keep, strict=True)]
    if values.ndim == 2:
        return medians[0]
    medians = np.reshape(medians, values.shape[:-2]).astype(values.dtype)
    return ops.convert_to_tensor(medians)


def _traced_median(x, mask):
    n = x.shape[-2] or ops.shape(x)[-2]
    count = min(x.shape[-2] or TRACED_ROWS, TRACED_ROWS)
    index = ops.cast(ops.arange(count), "int32") * n // count
    x = ops.take(x, index, axis=-2)
    weight = None if mask is None else ops.take(mask, index, axis=-1)
    x = centered(x, weight)
    d = squared_distances(x, x)
    # Where n < count some samples come twice.
    valid = ops.broadcast_to(index[:, None] != index, ops.shape(d))
    if weight is not None:
        both = ops.logical_and(weight[..., :, None], weight[..., None, :])
        valid = ops.logical_and(valid, both)
    flat = [*ops.shape(d)[:-2], count * count]
    d, valid = ops.reshape(d, flat), ops.reshape(valid, flat)
    pairs = ops.sum(ops.cast(valid, "int32"), axis=-1, keepdims=True)
    total = ops.sum(ops.where(valid, d, 0.0), axis=-1, keepdims=True)
    tiny = COINCIDENT * total / ops.cast(ops.maximum(pairs, 1), d.dtype)
    equal = ops.logical_and(valid, d <= tiny)
    equal = ops.sum(ops.cast(equal, "int32"), axis=-1, keepdims=True)
    d = ops.sort(ops.where(valid, d, math.inf), axis=-1)

    def middle(skip):
        """Each pair stands there twice, so that M and M − 1 are the middle."""
        half = skip + (pairs - skip) // 2
        low = ops.take_along_axis(d, ops.maximum(half - 1, 0), axis=-1)
        high = ops.take_along_axis(
            d, ops.minimum(half, count * count - 1), axis=-1
        )
        return (safe_sqrt(low) + safe_sqrt(high)) / 2

    median = ops.where(2 * equal < pairs, middle(0), middle(equal))
    return ops.where(equal < pairs, median, ops.ones_like(median))[..., 0]


def _median(x):
    """The same in NumPy, exact and without all pairs in memory."""
    if len(x) > ROWS:
        x = x[np.arange(ROWS) * len(x) // ROWS]
    n = len(x)
    if n < 2:
        return 1.0
    x = x - x.mean(axis=0, dtype="float64").astype(x.dtype)
    norms = np.square(x).sum(axis=1)
    step = max(1, 2**17 // n)

    def blocks():
        for start in range(0, n, step):
            some = x[start : start + step]
            d = (-2 * some) @ x[start:].T
            d += norms[start : start + step, None]
            d += norms[start:]
            # Of the square on the diagonal, the part above it.
            d[np.tril_indices(len(some))] = math.inf
            yield d

    def middle(low, high, pairs, skip=0):
        """Of all pairs but the `skip` smallest, if it is in (low, high]."""
        below, inside = 0, []
        for d in blocks():
            below += np.count_nonzero(d <= low)
            inside.append(d[(d > low) & (d <= high)])
        inside = np.concatenate(inside)
        ranks = np.array([(pairs - 1) // 2, pairs // 2]) + (skip - below)
        if ranks[0] < 0 or ranks[1] >= len(inside):
            return None
        found = np.partition(inside, ranks)[ranks].astype("float64")
        return np.sqrt(np.maximum(found, 0)).mean()

    # A bracket from a sample of pairs: few values are left to be sorted.
    i, j = np.random.default_rng(0).integers(0, n, (2, 2**15))
    i, j = i[i != j], j[i != j]
    sample = np.sort(np.square(x[i] - x[j]).sum(axis=1))
    center, width = len(sample) // 2, int(3 * math.sqrt(len(sample)))
    pairs, largest = n * (n - 1) // 2, np.finfo(x.dtype).max
    median = middle(sample[center - width], sample[center + width], pairs)
    if median is None:
        median = middle(-math.inf, largest, pairs)
    # The mean over all n² pairs is twice the variance.
    tiny = COINCIDENT * 2 * norms.mean(dtype="float64")
    if median**2 > tiny:
        return float(median)
    equal = sum(np.count_nonzero(d <= tiny) for d in blocks())
    pairs -= equal
    return float(middle(tiny, largest, pairs, equal)) if pairs else 1.0


def floating(x):
    """Float64 stays; everything else becomes float32."""
    x = ops.convert_to_tensor(x)
    double = keras.backend.standardize_dtype(x.dtype) == "float64"
    return x if double else ops.cast(x, "float32")


def columns(x):
    """`(n,)` becomes `(n, 1)`."""
    return x[:, None] if len(x.shape) == 1 else x


def centered(x, weight):
    """`x` minus its mean: a change of origin then costs no digits."""
    if weight is None:
        # Of a constant variable exactly nothing is left.
        x = x - x[..., :1, :]
        return x - ops.mean(x, axis=-2, keepdims=True)
    weight = ops.cast(weight, x.dtype)[..., None]
    total = ops.maximum(ops.sum(weight, axis=-2, keepdims=True), 1e-30)
    mean = ops.sum(x * (weight / total), axis=-2, keepdims=True)
    return ops.where(weight > 0, x - mean, 0.0)


def unit(x):
    norm = safe_sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
    return x / ops.where(norm > 0, norm, ops.ones_like(norm))


def one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(
            f"Expected `{name}` to be one of {allowed}. "
            f"Received: {name}={value!r}"
        )
    return value
