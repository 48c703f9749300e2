"""What all kernels have in common."""

import numpy as np
from keras import ops

from blogkeras.arguments import (
    check_finite,
)
from blogkeras.hsic.grams import Gram
from blogkeras.hsic.samples import (
    check_features,
    columns,
    floating,
    numbers,
)


class Kernel:
    """The base class of kernels, which `hsic` uses in two steps.

    A variable is converted to features once; `similarity` then computes every
    tile of their matrix. Kernels are equal if their `similarity` is, so that
    compiled programs can be reused: a bandwidth is contained in the features.

    HSIC does not change when a constant is added to a kernel, so the features
    of most kernels are centred. HSIC of more than two variables does change:
    `uncentered` is the kernel for it.
    """

    left_out = 0.0  # the number that `rows` lacks in each element

    def of_array(self, name, x, weight, dtype):
        """The `Gram` of a NumPy array, whose features are made in float64.

        Args:
            name: String, for error messages.
            x: What `numpy.asarray` makes an array `(..., n, dim)` of.
            weight: `(..., n)` array ≥ 0, or `None`.
            dtype: Floating dtype to compute in.
        """
        x = known_numbers(name, x, weight).astype(dtype)
        return self.of_tensor(ops.convert_to_tensor(x), weight, dtype)

    def of_tensor(self, x, weight, dtype):
        """The `Gram` of a tensor.

        Args:
            x: `(..., n, dim)` of any dtype, zero where there is no weight.
            weight: `(..., n)`, floating, or `None`.
            dtype: Floating dtype to compute in.
        """
        return Gram(self, ops.cast(x, dtype), dtype)

    def similarity(self, x1, x2):
        """The matrix `(..., n, m)` of two tensors of rows."""
        raise NotImplementedError

    def rows(self, features, index):
        """Rows `index` of the matrix; all of them if it is `None`."""
        some = features
        if index is not None:
            some = ops.take(features, index, axis=-2)
        return self.similarity(some, features)

    def uncentered(self):
        """The same kernel, with features that are not centred."""
        return self

    @property
    def key(self):
        return (type(self),)

    def __eq__(self, other):
        return isinstance(other, Kernel) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def __call__(self, x1, x2):
        """The matrix `(..., n, m)` of `(..., n, dim)` and `(..., m, dim)`."""
        x1, x2 = columns(floating(x1)), columns(floating(x2))
        check_features(x1, x2)
        return self.similarity(x1, x2)

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


def known_numbers(name, x, weight):
    """`numbers`, zero where there is no weight, finite elsewhere."""
    x = numbers(name, x)
    if weight is not None:
        x = np.where(weight[..., None] > 0, x, np.zeros((), x.dtype))
    require_finite(name, x)
    return x


def require_finite(name, values):
    """`check_finite`, with advice in the message."""
    try:
        check_finite(name, values)
    except ValueError as error:
        raise ValueError(
            f"{error}. Leave these samples out, or mask them."
        ) from None
