"""Kernels of the distance of two samples: Gaussian and Laplacian."""

import math

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_number,
    renamed_value,
)
from blogkeras.hsic.grams import Gram, about_center
from blogkeras.hsic.kernel import Kernel, known_numbers
from blogkeras.hsic.samples import (
    check_features,
    close_gaps,
    coincidence,
    columns,
    each_sample,
    float_dtype,
    floating,
    from_center,
    is_array,
    median_bandwidth,
    median_distance,
    numbers,
)
from blogkeras.ops import (
    full_precision_matmul,
    safe_sqrt,
    squared_distances,
)

FORMS = ("blog", "standard")
# The accepted error of the exponent of a Gaussian.
ROUNDING = 1e-4


class DistanceKernel(Kernel):
    """A function of ‖x₁ − x₂‖ in units of a bandwidth."""

    def __init__(self, bandwidth: float | None = None) -> None:
        if bandwidth is not None:
            bandwidth = check_number("bandwidth", bandwidth, above=0)
        self.bandwidth = bandwidth

    def scale(self, dim):
        """How many of the kernel's units one bandwidth is."""
        return 1.0

    @property
    def key(self):
        # With a given bandwidth the kernel may be nearly constant. Then K − 1
        # is computed in its place, which has more digits.
        return type(self), self.bandwidth is None

    def of_array(self, name, x, weight, dtype):
        keep = None if weight is None else weight > 0
        coincident = coincidence(x)
        x = from_center(known_numbers(name, x, weight), keep)

        def in_bandwidths(x, keep):
            bandwidth = self.bandwidth
            if bandwidth is None:
                bandwidth = median_distance(x, keep, coincident)
            with np.errstate(over="ignore"):
                return close_gaps(x / bandwidth / self.scale(x.shape[-1]))

        x = each_sample(in_bandwidths, x, keep)
        kernel = self.for_known(x, dtype)
        return Gram(kernel, ops.convert_to_tensor(x.astype(dtype)), dtype)

    def for_known(self, x, dtype):
        """A kernel with the same values for known features, maybe faster."""
        return self

    def of_tensor(self, x, weight, dtype):
        x = about_center(x, weight, dtype)
        bandwidth = self.bandwidth
        if bandwidth is None:
            mask = None if weight is None else weight > 0
            bandwidth = median_bandwidth(x, mask)
            bandwidth = ops.cast(bandwidth, dtype)[..., None, None]
        return Gram(self, x / bandwidth / self.scale(x.shape[-1]), dtype)

    @property
    def left_out(self):
        return 0.0 if self.bandwidth is None else 1.0

    def exponent(self, x1, x2, equal=None):
        """log K of features; `x2=None` is `x1`; see `squared_distances`."""
        raise NotImplementedError

    def similarity(self, x1, x2):
        return ops.exp(self.exponent(x1, x2))

    def rows(self, features, index):
        if index is None:
            exponent = self.exponent(features, None)
        else:
            everyone = ops.arange(ops.shape(features)[-2], dtype="int32")
            exponent = self.exponent(
                ops.take(features, index, axis=-2),
                features,
                equal=index[:, None] == everyone,
            )
        return ops.expm1(exponent) if self.left_out else ops.exp(exponent)

    def __call__(self, x1, x2):
        if self.bandwidth is None:
            raise ValueError(
                "A median bandwidth is that of one sample. Pass `bandwidth=` "
                "to call the kernel by itself (`median_bandwidth` gives one). "
                f"Received: {self!r}"
            )
        if is_array(x1) and is_array(x2):
            dtype = float_dtype(x1)
            x1, x2 = numbers("x1", x1), numbers("x2", x2)
            check_features(x1, x2)
            unit = self.bandwidth * self.scale(x1.shape[-1])
            both = np.concatenate([x1, x2], axis=-2)
            both = from_center(both) / unit
            x1, x2 = np.split(both.astype(dtype), [x1.shape[-2]], axis=-2)
            return self.similarity(*map(ops.convert_to_tensor, (x1, x2)))
        x1, x2 = columns(floating(x1)), columns(floating(x2))
        check_features(x1, x2)
        unit = self.bandwidth * self.scale(x1.shape[-1])
        return self.similarity(x1 / unit, x2 / unit)

    def get_config(self):
        return {"bandwidth": self.bandwidth}


@keras.saving.register_keras_serializable(package="blogkeras")
class GaussianKernel(DistanceKernel):
    """Gaussian kernel, in the post's or in the standard form.

        form="blog":       K(x₁, x₂) = exp(−‖x₁ − x₂‖² / σ²)
        form="standard":   K(x₁, x₂) = exp(−‖x₁ − x₂‖² / (2σ²))

    The same σ means two different kernels, so the form has no default.

    Args:
        bandwidth: Float > 0, σ. `None` is the median distance of the variable
            at hand, see `median_bandwidth`.
        form: `"blog"` or `"standard"`.
        per_dimension: Boolean. Divides ‖x₁ − x₂‖² by the number of features,
            so that one σ serves layers of any width (HSIC bottleneck).

    Input shape:  `x1`, `(..., n, dim)`, and `x2`, `(..., m, dim)`.
    Output shape: `(..., n, m)`.

    Raises:
        ValueError: on a bandwidth that is not positive and an unknown form.

    Example:

    >>> kernel = GaussianKernel(1.0, form="standard")
    >>> x = np.array([[0.0], [1.0]])
    >>> round(float(kernel(x, x)[0, 1]), 3)  # exp(-1/2)
    0.607

    Reference:
        [blog post 6910](https://kexue.fm/archives/6910)
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        *,
        form: str,
        per_dimension: bool = False,
    ) -> None:
        super().__init__(bandwidth)
        form = renamed_value("form", form, {"usual": "standard"})
        self.form = check_choice("form", form, FORMS)
        self.per_dimension = check_boolean("per_dimension", per_dimension)

    def scale(self, dim):
        scale = 1.0 if self.form == "blog" else math.sqrt(2.0)
        # The median distance already includes the dimension.
        wide = self.per_dimension and self.bandwidth is not None
        return scale * (math.sqrt(dim) if wide else 1.0)

    def exponent(self, x1, x2, equal=None):
        # The error counts relative to the size of K − 1.
        norms = ops.sum(ops.square(x1 if x2 is None else x2), axis=-1)
        size = ops.mean(ops.stop_gradient(norms), axis=-1)
        tolerance = ROUNDING * ops.minimum(size, 1.0)[..., None, None]
        return -squared_distances(x1, x2, tolerance, equal)

    def for_known(self, x, dtype):
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.square(x).sum(axis=-1)
            size = norms.mean(axis=-1)
            error = 8 * np.finfo(dtype).eps * norms.max(axis=-1, initial=0.0)
            enough = error <= ROUNDING * np.minimum(size, 1.0)
        if self.bandwidth is not None:
            enough &= size >= _PLAIN_SIZE
        if not np.all(enough):
            return self
        return _PlainGaussian(
            self.bandwidth, form=self.form, per_dimension=self.per_dimension
        )

    def get_config(self):
        return {
            "bandwidth": self.bandwidth,
            "form": self.form,
            "per_dimension": self.per_dimension,
        }


# Where the mean square of features is at least this, K is not nearly constant,
# and has as many digits as K − 1.
_PLAIN_SIZE = 0.1


class _PlainGaussian(GaussianKernel):
    """The same for features that no careful computing is needed for.

    All their products have enough digits, so XLA can fuse product, exponential
    and what follows. It cannot where it has to ask whether distances must be
    computed by differences.
    """

    left_out = 0.0

    def similarity(self, x1, x2):
        if x1.shape[-1] == 1:  # by differences
            return super().similarity(x1, x2)
        size = (
            ops.sum(ops.square(x1), axis=-1)[..., :, None]
            + ops.sum(ops.square(x2), axis=-1)[..., None, :]
        )
        product = full_precision_matmul(x1, ops.swapaxes(x2, -1, -2))
        return ops.exp(ops.minimum(2 * product - size, 0))

    def rows(self, features, index):
        return Kernel.rows(self, features, index)


@keras.saving.register_keras_serializable(package="blogkeras")
class LaplacianKernel(DistanceKernel):
    """Laplacian kernel `exp(−‖x₁ − x₂‖ / σ)`, of the Euclidean distance.

    (scikit-learn's takes the sum of absolute differences; in one dimension
    they are the same.)

    Args:
        bandwidth: Float > 0, σ. `None` is the median distance.

    Input shape:  `x1`, `(..., n, dim)`, and `x2`, `(..., m, dim)`.
    Output shape: `(..., n, m)`.

    Raises:
        ValueError: on a bandwidth that is not positive.

    Example:

    >>> kernel = LaplacianKernel(2.0)
    >>> float(kernel(np.zeros((1, 2)), np.zeros((1, 2)))[0, 0])
    1.0

    Reference:
        [Gretton et al., 2005](https://doi.org/10.1007/11564089_7)
    """

    def exponent(self, x1, x2, equal=None):
        return -safe_sqrt(squared_distances(x1, x2, equal=equal))
