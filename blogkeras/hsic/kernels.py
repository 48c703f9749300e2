"""Kernels, the similarity of two samples: small objects, or any callable."""

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import (
    check_integer,
    check_number,
)
from blogkeras.hsic.distance_kernels import GaussianKernel
from blogkeras.hsic.grams import Gram, about_center, centered, power_of_two
from blogkeras.hsic.kernel import Kernel, known_numbers, require_finite
from blogkeras.hsic.samples import (
    as_factors,
    as_samples,
    check_features,
    codes_of,
    columns,
    each_sample,
    float_dtype,
    from_center,
    is_array,
    is_categorical,
    numbers,
    scaled_sets,
)
from blogkeras.ops import (
    full_precision_matmul,
    normalize,
)


@keras.saving.register_keras_serializable(package="blogkeras")
class LinearKernel(Kernel):
    """Linear kernel `x₁ · x₂`: HSIC is ‖cov(x, y)‖², of linear dependence.

    It has no arguments.

    Input shape:  `x1`, `(..., n, dim)`, and `x2`, `(..., m, dim)`.
    Output shape: `(..., n, m)`.

    Example:

    >>> x1, x2 = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    >>> float(LinearKernel()(x1, x2)[0, 0])
    11.0

    Reference:
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414)
    """

    def of_array(self, name, x, weight, dtype):
        keep = None if weight is None else weight > 0
        x = from_center(known_numbers(name, x, weight), keep)
        return self.of_centered(x, weight, dtype)

    def of_centered(self, x, weight, dtype):
        """The `Gram` of float64 numbers around 0."""
        x, exponent, sizes = scaled_sets(x)
        x = ops.convert_to_tensor(x.astype(dtype))
        if weight is not None:
            weight = ops.convert_to_tensor(weight, dtype)
        factors = () if sizes is None else (as_factors(sizes, dtype),) * 2
        return Gram(self, centered(x, weight), dtype, 2 * exponent, factors)

    def of_tensor(self, x, weight, dtype):
        x = about_center(x, weight, dtype)
        size = power_of_two(x)
        x = centered(x / size[..., None, None], weight)
        return Gram(self, x, dtype, factors=(size, size))

    def uncentered(self):
        return _UncenteredLinear()

    def similarity(self, x1, x2):
        return full_precision_matmul(x1, ops.swapaxes(x2, -1, -2))


class _UncenteredLinear(LinearKernel):
    def of_array(self, name, x, weight, dtype):
        x = known_numbers(name, x, weight).astype("float64")
        x, exponent, sizes = scaled_sets(x)
        factors = () if sizes is None else (as_factors(sizes, dtype),) * 2
        x = ops.convert_to_tensor(x.astype(dtype))
        return Gram(self, x, dtype, 2 * exponent, factors)

    def of_tensor(self, x, weight, dtype):
        x = ops.cast(x, dtype)
        size = power_of_two(x)
        x = x / size[..., None, None]
        return Gram(self, x, dtype, factors=(size, size))


@keras.saving.register_keras_serializable(package="blogkeras")
class PolynomialKernel(Kernel):
    """Polynomial kernel `(scale · x₁ · x₂ + offset)^degree`.

    Args:
        degree: Integer ≥ 1.
        scale: Float > 0.
        offset: Float ≥ 0.

    Input shape:  `x1`, `(..., n, dim)`, and `x2`, `(..., m, dim)`.
    Output shape: `(..., n, m)`.

    Raises:
        ValueError: on numbers out of range.

    Example:

    >>> kernel = PolynomialKernel(degree=2)
    >>> float(kernel(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))[0, 0])
    144.0

    Reference:
        [Gretton et al., 2005](https://doi.org/10.1007/11564089_7)
    """

    def __init__(
        self, degree: int = 2, scale: float = 1.0, offset: float = 1.0
    ) -> None:
        self.degree = check_integer("degree", degree, minimum=1)
        self.scale = check_number("scale", scale, above=0)
        # With a negative offset the kernel is not positive.
        self.offset = check_number("offset", offset, minimum=0)

    def similarity(self, x1, x2):
        product = full_precision_matmul(x1, ops.swapaxes(x2, -1, -2))
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
    """Cosine kernel `x₁ · x₂ / (‖x₁‖ ‖x₂‖)`; 0 where a vector is zero.

    It has no arguments.

    Input shape:  `x1`, `(..., n, dim)`, and `x2`, `(..., m, dim)`.
    Output shape: `(..., n, m)`.

    Example:

    >>> x1, x2 = np.array([[2.0, 0.0]]), np.array([[5.0, 0.0]])
    >>> float(CosineKernel()(x1, x2)[0, 0])
    1.0

    Reference:
        [Gretton et al., 2005](https://doi.org/10.1007/11564089_7)
    """

    # HSIC is that of the linear kernel on the directions. They are centred, so
    # that small angles keep their digits.

    def of_array(self, name, x, weight, dtype):
        unit = np.finfo(x.dtype).eps if x.dtype.kind == "f" else 2.0**-52
        x = known_numbers(name, x, weight).astype("float64")
        size = np.abs(x).max(axis=-1, keepdims=True, initial=0.0)
        x = x / np.where(size > 0, size, 1)
        norm = np.sqrt(np.square(x).sum(axis=-1, keepdims=True))
        keep = None if weight is None else weight > 0
        x = from_center(x / np.where(norm > 0, norm, 1), keep)
        # If all directions are equal, their differences are rounding errors.
        size = np.abs(x).max(axis=(-2, -1), keepdims=True, initial=0.0)
        x = x * (size > 8 * unit)
        return LinearKernel().of_centered(x, weight, dtype)

    def of_tensor(self, x, weight, dtype):
        double = keras.backend.standardize_dtype(x.dtype) == "float64"
        unit = 8 * float(np.finfo("float64" if double else "float32").eps)
        x = about_center(normalize(ops.cast(x, dtype)), weight, dtype)
        size = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
        x = ops.where(size > unit, x, 0.0)
        return LinearKernel().of_tensor(x, weight, dtype)

    def uncentered(self):
        return _UncenteredCosine()

    def similarity(self, x1, x2):
        return full_precision_matmul(
            normalize(x1), ops.swapaxes(normalize(x2), -1, -2)
        )


class _UncenteredCosine(CosineKernel):
    def of_array(self, name, x, weight, dtype):
        x = known_numbers(name, x, weight).astype("float64")
        # Directions have no size, so that float32 can hold them.
        size = np.abs(x).max(axis=-1, keepdims=True, initial=0.0)
        x = (x / np.where(size > 0, size, 1)).astype(dtype)
        return Gram(self, ops.convert_to_tensor(x), dtype)

    of_tensor = Kernel.of_tensor


@keras.saving.register_keras_serializable(package="blogkeras")
class DeltaKernel(Kernel):
    """Delta kernel: 1 where all features are equal, else 0. For labels.

    Values are compared as they are: large integers, and outside of compiled
    functions also strings and other objects that have an order. It has no
    arguments.

    Input shape:  `x1`, `(..., n, dim)`, and `x2`, `(..., m, dim)`.
    Output shape: `(..., n, m)`.

    Raises:
        ValueError: when it is called with NaN or infinity.

    Example:

    >>> kernel = DeltaKernel()
    >>> matrix = kernel(np.array(["a", "b"]), np.array(["b", "c", "b"]))
    >>> ops.convert_to_numpy(matrix).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]

    Reference:
        [Song et al., 2012](https://jmlr.org/papers/v13/song12a.html)
    """

    def of_array(self, name, x, weight, dtype):
        codes = codes_of(known_labels(name, x, weight))[..., None]
        return Gram(self, ops.convert_to_tensor(codes.astype(dtype)), dtype)

    def of_tensor(self, x, weight, dtype):
        return Gram(self, x, dtype)

    def similarity(self, x1, x2):
        equal = x1[..., :, None, :] == x2[..., None, :, :]
        return ops.cast(ops.all(equal, axis=-1), float_dtype(x1))

    def __call__(self, x1, x2):
        if is_array(x1) and is_array(x2):
            x1, x2 = known_labels("x1", x1), known_labels("x2", x2)
            check_features(x1, x2)
            x1, x2 = np.broadcast_arrays(
                x1[..., :, None, :], x2[..., None, :, :]
            )
            return ops.cast((x1 == x2).all(axis=-1), "float32")
        x1, x2 = (columns(ops.convert_to_tensor(x)) for x in (x1, x2))
        check_features(x1, x2)
        return self.similarity(x1, x2)


def known_labels(name, x, weight=None):
    """An array `(..., n, dim)` of any dtype; finite, if it is of numbers."""
    x = as_samples(x)
    if x.ndim == 0:
        raise ValueError(
            f"Expected `{name}` of shape (n,) or (..., n, dim). Received: "
            f"shape {x.shape}"
        )
    x = columns(x)
    if weight is not None:
        # All samples without weight get the label of one that counts.
        keep = np.broadcast_to(weight > 0, x.shape[:-1])
        nothing = np.zeros((1, x.shape[-1]), x.dtype)
        x = np.where(keep[..., None], x, x[keep][:1] if keep.any() else nothing)
    if x.dtype.kind == "f":
        require_finite(name, x)
    return x


@keras.saving.register_keras_serializable(package="blogkeras")
class PrecomputedKernel(Kernel):
    """Says that the variable given *is* its kernel matrix, `(..., n, n)`.

    The matrix is taken to be symmetric. The kernel has no arguments, and
    cannot be called.

    Raises:
        ValueError: when it is called, and on matrices that are not square.

    Example:

    >>> x = np.random.default_rng(0).normal(size=20)
    >>> value = hsic(np.outer(x, x), x, PrecomputedKernel(), LinearKernel())
    >>> np.allclose(value, hsic(x, x, LinearKernel(), LinearKernel()))
    True

    Reference:
        [blog post 6910](https://kexue.fm/archives/6910), whose function takes
        such matrices
    """

    def of_array(self, name, x, weight, dtype):
        x = numbers(name, x).astype("float64")
        check_square(name, x)
        keep = None if weight is None else weight > 0
        if keep is not None:
            x = np.where(keep[..., None] & keep[..., None, :], x, 0.0)
        require_finite(name, x)

        x, exponent, sizes = scaled_sets(self.centred(x, keep))
        x = ops.convert_to_tensor(x.astype(dtype))
        factors = () if sizes is None else (as_factors(sizes, dtype),)
        return Gram(self, x, dtype, exponent, factors)

    def centred(self, x, keep):
        """A number added to the whole matrix does not change HSIC."""

        def less_median(x, keep):
            used = x if keep is None else x[keep][:, keep]
            with np.errstate(over="ignore"):
                return x - (np.median(used) if used.size else 0.0)

        return each_sample(less_median, x, keep)

    def uncentered(self):
        return _UncenteredMatrix()

    def of_tensor(self, x, weight, dtype):
        check_square("the kernel matrix", x)
        x = ops.cast(x, dtype)
        if weight is not None:
            x = ops.where(weight[..., None, :] > 0, x, 0.0)
        size = power_of_two(x)
        return Gram(self, x / size[..., None, None], dtype, factors=(size,))

    def rows(self, features, index):
        return features if index is None else ops.take(features, index, axis=-2)

    def __call__(self, x1, x2):
        raise ValueError(
            "A precomputed matrix stands in the place of the variable. "
            "Expected hsic(matrix, y, kernel_x=PrecomputedKernel()). Received: "
            "a call of the kernel"
        )


class _UncenteredMatrix(PrecomputedKernel):
    def centred(self, x, keep):
        return x


def check_square(name, x):
    """Raises a ValueError if `x` is no square matrix."""
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"Expected `{name}` to be an n × n kernel matrix. Received: "
            f"shape {tuple(x.shape)}"
        )


class CustomKernel(Kernel):
    """A kernel that is a function or Keras layer of the user, `fn(x1, x2)`."""

    def __init__(self, fn):
        self.fn = fn

    def similarity(self, x1, x2):
        matrix = self.fn(x1, x2)
        return ops.cast(matrix, x1.dtype)

    @property
    def key(self):
        return CustomKernel, id(self.fn)


def as_kernel(kernel, values=None):
    """A `Kernel` for what the user passed; `None` is the default for `values`.

    Strings and categories have no distance: they are equal or not. For numbers,
    the post's form is narrower by √2 than the standard one. With the median
    distance as bandwidth it also finds dependence on a small scale (rotated
    uniforms), and finds smooth dependence less often; see docs/hsic.md.
    """
    if kernel is None:
        if values is not None and is_categorical(values):
            return DeltaKernel()
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
    """The config of a kernel."""
    return keras.saving.serialize_keras_object(kernel)


def deserialize(kernel):
    """The kernel of a config; everything else is returned as it is."""
    if isinstance(kernel, dict):
        return keras.saving.deserialize_keras_object(kernel)
    return kernel
