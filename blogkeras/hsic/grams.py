"""Kernel matrices, computed by rows from centred and scaled features."""

import itertools

import keras
from keras import ops

from blogkeras.ops import central_vector


class Gram:
    """A kernel with the features of a sample: its matrix, row by row.

    Args:
        kernel: `Kernel`.
        features: `(..., n, dim)`, what the kernel's `similarity` takes.
        dtype: Floating dtype of the matrix.
        exponent: Integer; the matrix is to be multiplied by 2**exponent.
            Features are scaled to a size near 1 where the scale of the kernel
            follows from that of the variable. CKA and p-values do not depend on
            it.
        factors: Tensors `(...)`; the matrix is to be multiplied by them too.
    """

    def __init__(self, kernel, features, dtype, exponent=0, factors=()):
        self.kernel = kernel
        self.features = features
        self.dtype = dtype
        self.exponent = exponent
        self.factors = factors

    def with_features(self, features):
        return Gram(
            self.kernel, features, self.dtype, self.exponent, self.factors
        )

    def rows(self, index):
        return self.kernel.rows(self.features, index)

    def matrix(self):
        return self.kernel.rows(self.features, None)


def rescale(value, *grams):
    """`value`, of first order in each kernel, for their true scales."""
    # Multiply by one factor of each in turn, so that large and small ones
    # cancel early.
    for factors in itertools.zip_longest(*(g.factors for g in grams)):
        for factor in factors:
            if factor is not None:
                while len(factor.shape) < len(value.shape):
                    factor = factor[..., None]
                value = value * factor
    exponent = sum(gram.exponent for gram in grams)
    while exponent:
        step = max(-120, min(120, exponent))
        value = value * 2.0**step
        exponent -= step
    return value


def about_center(x, weight, dtype):
    """`x` minus a central row; the mean would be moved by a single outlier.

    Integers are subtracted as integers: different ones may be equal in float32.
    """
    mask = None if weight is None else weight > 0
    if not keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(x.dtype)
    ):
        wide = keras.backend.standardize_dtype(x.dtype) in ("int64", "uint64")
        x = ops.cast(x, "int64" if wide else "int32")
    else:
        x = ops.cast(x, dtype)
    x = ops.cast(x - central_vector(x, mask), dtype)
    return x if mask is None else ops.where(mask[..., None], x, 0.0)


def centered(x, weight):
    """`x` minus its mean, so that a common offset costs no digits."""
    if weight is None:
        return x - ops.mean(x, axis=-2, keepdims=True)
    weight = ops.cast(weight, x.dtype)[..., None]
    total = ops.maximum(ops.sum(weight, axis=-2, keepdims=True), 1e-30)
    mean = ops.sum(x * (weight / total), axis=-2, keepdims=True)
    return ops.where(weight > 0, x - mean, 0.0)


def power_of_two(x):
    """The least power of two that is above |x|, `(...)`; 1 where x is 0."""
    largest = ops.stop_gradient(ops.max(ops.abs(x), axis=(-2, -1)))
    known = ops.where(largest > 0, largest, 1.0)
    # Beyond 2**±126 float32 has no reciprocal.
    exponent = ops.clip(ops.floor(ops.log2(known)) + 1, -120, 120)
    return ops.power(ops.cast(2.0, x.dtype), exponent)
