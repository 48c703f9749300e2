"""HSIC, CKA and normalized HSIC as functions."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import check_choice, check_integer, check_number
from blogkeras.hsic.grams import rescale
from blogkeras.hsic.kernels import CustomKernel, PrecomputedKernel
from blogkeras.hsic.tiles import TILE, measure, prepare, statistics
from blogkeras.ops import map_blocks, safe_sqrt
from blogkeras.typing import Tensor

ESTIMATORS = ("biased", "blog", "unbiased")


def hsic(
    x: Tensor,
    y: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    estimator: str = "biased",
    mask: Tensor | None = None,
) -> Tensor:
    """Hilbert-Schmidt independence criterion of two variables.

    With the kernel matrices K and L of n pairs, J = I − 1/n, K̃ and L̃ being K
    and L with zeros on the diagonal:

        "biased":    tr(K J L J) / n²
        "blog":      tr(K J L J) / (n − 1)²
        "unbiased":  [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1 / ((n − 1)(n − 2))
                      − 2 1ᵀK̃L̃1 / (n − 2)] / (n (n − 3))

    The value for independent variables is 0 in the limit. Its scale depends on
    the kernels, so compare it by `cka`, which has no scale, or by the p-value
    of `hsic_test`. The first two are never negative; their expectation for
    independent variables is of order 1/n. The third is unbiased for every n,
    and is negative about half of the time for independent variables.

    O(n²) element by element, in tiles of rows: memory is O(n), never n × n.
    Two linear kernels are computed in feature space, O(n dim²). Float64 stays
    float64, everything else is computed in float32. Inside a compiled step a
    median bandwidth comes from a subsample, see `median_bandwidth`.

    Args:
        x: `(n,)` or `(..., n, dim_x)`.
        y: `(n,)` or `(..., n, dim_y)`; may be of another kind than `x`.
        kernel_x: A kernel, a function or Keras layer `fn(x1, x2)` that returns
            the `(n, m)` matrix, or `None`: the post's Gaussian with the median
            distance of this variable as bandwidth.
        kernel_y: Likewise.
        estimator: `"biased"`, `"blog"` or `"unbiased"`.
        mask: `(..., n)`. Boolean, or weights ≥ 0: the share of each pair in
            the sample measure, with n then (Σw)²/Σw². `"unbiased"` uses every
            pair of weight > 0 alike. Values of weight 0, NaN included, have no
            influence.

    Returns:
        Tensor `(...)`. 0 if a variable is constant, if all is masked and, for
        `"unbiased"`, if fewer than 4 pairs count.

    Raises:
        ValueError: on different n or none, on fewer than 4 pairs for
            `"unbiased"`, and on NaN or infinity where the values are known
            (outside of compiled functions).

    Example:

    >>> x = keras.random.normal((1000,), seed=0)
    >>> kernel = GaussianKernel(1.0, form="blog")
    >>> value = hsic(x, x + 0.1, kernel, kernel, estimator="blog")
    >>> linear = LinearKernel()
    >>> round(float(hsic([0.0, 1.0], [0.0, 1.0], linear, linear)), 4)
    0.0625

    Departs from the post:
        The post calls the form with 1/(n − 1)² unbiased. It is not; the form
        `"unbiased"` here is. There is no product of n × n matrices.

    Reference:
        [Gretton et al., 2005](https://doi.org/10.1007/11564089_7);
        [Song et al., 2012](https://jmlr.org/papers/v13/song12a.html) (the
        unbiased form); [blog post 6910](https://kexue.fm/archives/6910)
    """
    check_choice("estimator", estimator, ESTIMATORS)
    grams, weight = prepare(x, y, kernel_x, kernel_y, mask, estimator)
    (value,) = statistics(grams, weight, [(0, 1)], estimator)
    return rescale(value, *grams)


def hsic_from_kernels(
    kernel_x: Tensor,
    kernel_y: Tensor,
    estimator: str = "biased",
    mask: Tensor | None = None,
) -> Tensor:
    """HSIC of two kernel matrices, as the function of the post takes them.

    Args:
        kernel_x: `(..., n, n)`, symmetric.
        kernel_y: `(..., n, n)`, symmetric.
        estimator: `"biased"`, tr(K J L J) / n²; `"blog"`, the post's, with
            (n − 1)²; `"unbiased"`.
        mask: `(..., n)`. Boolean, or weights ≥ 0, the share of each pair.
            Values of weight 0, NaN included, have no influence.

    Returns:
        Tensor `(...)`. 0 if a matrix is constant.

    Raises:
        ValueError: on different n or none, and on NaN or infinity where the
            values are known (outside of compiled functions), on matrices that
            are not square, and on fewer than 4 pairs for `"unbiased"`.

    Example:

    >>> x, y = np.array([0.0, 1.0]), np.array([0.0, 1.0])
    >>> value = hsic_from_kernels(np.outer(x, x), np.outer(y, y), "blog")
    >>> round(float(value), 4)  # the covariance 0.5, squared
    0.25

    Departs from the post:
        The post multiplies the matrices, O(n³); here element by element,
        O(n²), with the same result for symmetric matrices.

    Reference:
        [blog post 6910](https://kexue.fm/archives/6910)
    """
    precomputed = PrecomputedKernel()
    return hsic(kernel_x, kernel_y, precomputed, precomputed, estimator, mask)


def cka(
    x: Tensor,
    y: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    estimator: str = "biased",
    mask: Tensor | None = None,
) -> Tensor:
    """Centered kernel alignment: HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)).

    Between 0 and 1 for `"biased"` (`"blog"` is the same); the debiased form,
    `"unbiased"`, does not grow with the number of features and may be
    negative. With `LinearKernel()` twice it is computed in feature space where
    that is cheaper.

    Args:
        x: `(n,)` or `(..., n, dim_x)`.
        y: `(n,)` or `(..., n, dim_y)`; may be of another kind than `x`.
        kernel_x: A kernel, a function or Keras layer `fn(x1, x2)` that returns
            the `(n, m)` matrix, or `None`: the post's Gaussian with the median
            distance of this variable as bandwidth.
        kernel_y: Likewise.
        estimator: `"biased"` or `"blog"`, which are equal here, or
            `"unbiased"`.
        mask: `(..., n)`. Boolean, or weights ≥ 0, the share of each pair.
            Values of weight 0, NaN included, have no influence.

    Returns:
        Tensor `(...)`. 0 if a variable is constant.

    Raises:
        ValueError: on different n or none, and on NaN or infinity where the
            values are known (outside of compiled functions), and on fewer than
            4 pairs for `"unbiased"`.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> linear = LinearKernel()
    >>> round(float(cka(x, 2 * x[:, ::-1] + 1, linear, linear)), 4)
    1.0

    Reference:
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414)
    """
    check_choice("estimator", estimator, ESTIMATORS)
    grams, weight = prepare(x, y, kernel_x, kernel_y, mask, estimator)
    xy, xx, yy = statistics(grams, weight, [(0, 1), (0, 0), (1, 1)], estimator)
    return alignment(xy, xx, yy)


def alignment(xy, xx, yy):
    """xy / √(xx yy), which is 0 where the divisor is 0."""
    norm = safe_sqrt(xx) * safe_sqrt(yy)
    return ops.where(norm > 0, xy / ops.where(norm > 0, norm, 1.0), 0.0)


def nhsic(
    x: Tensor,
    y: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    epsilon: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalized HSIC of the bottleneck paper, a sum of canonical correlations.

        nHSIC = tr(R_x R_y),    R = K̄ (K̄ + ε n I)⁻¹,    K̄ = J K J

    by a Cholesky factorization, O(n³). It grows with the number of dependent
    directions, up to n − 1. Gradients are of first order only.

    Args:
        x: `(n,)` or `(..., n, dim_x)`.
        y: `(n,)` or `(..., n, dim_y)`; may be of another kind than `x`.
        kernel_x: A kernel, a function or Keras layer `fn(x1, x2)` that returns
            the `(n, m)` matrix, or `None`: the post's Gaussian with the median
            distance of this variable as bandwidth.
        kernel_y: Likewise.
        epsilon: Float > 0, ε.
        mask: `(..., n)`. Boolean, or weights ≥ 0, the share of each pair.
            Values of weight 0, NaN included, have no influence.

    Returns:
        Tensor `(...)`. 0 if a variable is constant.

    Raises:
        ValueError: on different n or none, and on NaN or infinity where the
            values are known (outside of compiled functions), and if ε is not
            positive.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(50, 2))
    >>> linear = LinearKernel()
    >>> round(float(nhsic(x, x, linear, linear)), 2)  # two directions
    2.0

    Reference:
        [Ma et al., 2020](https://arxiv.org/abs/1908.01580)
    """
    # A centered kernel matrix has no inverse.
    epsilon = check_number("epsilon", epsilon, above=0)
    grams, weight = prepare(x, y, kernel_x, kernel_y, mask, "biased")
    x, y = (
        Resolvent(rescale(gram.matrix(), gram), weight, epsilon)
        for gram in grams
    )
    value, with_x = x.trace_with(y.correlations())
    return value + with_x + y.trace_with(x.correlations())[1]


class Resolvent:
    """R = K̄ (K̄ + ε n I)⁻¹ of one kernel matrix.

    The gradient of tr(R M) with respect to K̄ is λ A⁻¹ M A⁻¹, with
    A = K̄ + λ I: two more solves with the same factor, in place of a gradient
    through the factorization.
    """

    def __init__(self, matrix, weight, epsilon):
        n, p = measure(weight, matrix, matrix.dtype)
        mean = ops.sum(matrix * p[..., None, :], axis=-1, keepdims=True)
        matrix = matrix - mean
        matrix = matrix - ops.sum(
            matrix * p[..., :, None], axis=-2, keepdims=True
        )
        if weight is not None:
            # With uniform p this factor is 1.
            root = safe_sqrt(p * n[..., None])
            matrix = matrix * root[..., :, None] * root[..., None, :]
        self.matrix = matrix
        fixed = ops.stop_gradient(matrix)
        # A ridge below the rounding error of the matrix would leave it
        # singular.
        unit = 4 * float(
            np.finfo(keras.backend.standardize_dtype(matrix.dtype)).eps
        )
        ridge = ops.maximum(epsilon * n, unit * _trace(ops.abs(fixed)))
        # Without a sample the matrix is 0, and any ridge gives R = 0.
        ridge = ops.where(ridge > 0, ridge, ops.ones_like(ridge))
        self.ridge = ridge = ridge[..., None, None]
        size = matrix.shape[-1] or ops.shape(matrix)[-1]
        self.identity = ops.eye(size, dtype=matrix.dtype)
        self.factor = ops.cholesky(fixed + ridge * self.identity)

    def solve(self, m):
        """A⁻¹ m."""
        m = ops.broadcast_to(m, ops.shape(self.factor))
        half = ops.solve_triangular(self.factor, m, lower=True)
        upper = ops.swapaxes(self.factor, -1, -2)
        return ops.solve_triangular(upper, half, lower=False)

    def correlations(self):
        """R, without its gradient, `(..., n, n)`."""
        return self.identity - self.ridge * self.solve(self.identity)

    def trace_with(self, m):
        """tr(R m) for a constant symmetric m; and a zero with its gradient."""
        solved = self.solve(m)
        value = _trace(m) - self.ridge[..., 0, 0] * _trace(solved)
        slope = self.ridge * self.solve(ops.swapaxes(solved, -1, -2))
        linear = ops.sum(ops.stop_gradient(slope) * self.matrix, axis=(-2, -1))
        return ops.stop_gradient(value), linear - ops.stop_gradient(linear)


def _trace(matrix):
    return ops.sum(ops.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)


def block_hsic(
    x: Tensor,
    y: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    block_size: int = 100,
    estimator: str = "unbiased",
) -> Tensor:
    """Mean HSIC of consecutive blocks, O(n · block_size).

    Shuffle data whose order has a meaning first. Samples that do not fill a
    block are left out. The kernels, with their median bandwidths, are the same
    for all blocks.

    Args:
        x: `(n,)` or `(n, dim_x)`.
        y: `(n,)` or `(n, dim_y)`.
        kernel_x: A kernel, a function or Keras layer `fn(x1, x2)` that returns
            the `(n, m)` matrix, not precomputed, or `None`: the post's Gaussian
            with the median distance of this variable as bandwidth.
        kernel_y: Likewise.
        block_size: Integer ≥ 4.
        estimator: `"biased"`, 1/n²; `"blog"`, 1/(n − 1)²; `"unbiased"`, which
            is negative half of the time for independent variables.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: on different n or none, and on NaN or infinity where the
            values are known (outside of compiled functions), on precomputed
            kernels, and on fewer samples than `block_size`.

    Example:

    >>> x = np.random.default_rng(0).normal(size=1000)
    >>> bool(block_hsic(x, x**2) > 0.01)
    True

    Reference:
        [Zhang et al., 2018](https://arxiv.org/abs/1606.07892)
    """
    values, grams = hsic_of_blocks(
        x, y, kernel_x, kernel_y, block_size, estimator
    )
    return rescale(ops.mean(values), *grams)


def hsic_of_blocks(x, y, kernel_x, kernel_y, block_size, estimator):
    """Each block's HSIC, `(num_blocks,)`, before `rescale`; and the `Gram`s."""
    check_choice("estimator", estimator, ESTIMATORS)
    block_size = check_integer("block_size", block_size, minimum=4)
    grams, _ = prepare(x, y, kernel_x, kernel_y, None, estimator)
    n = ops.shape(grams[0].features)[0]
    known = grams[0].features.shape[0] or block_size
    if known < block_size:
        raise ValueError(
            "Expected block_size <= n. Received: "
            f"block_size={block_size}, n={n}"
        )
    if any(isinstance(gram.kernel, PrecomputedKernel) for gram in grams):
        raise ValueError(
            "Blocks and random features save the kernel matrix; with a "
            "precomputed one use the exact form. Received: PrecomputedKernel()"
        )
    count = n // block_size

    def blocks(gram):
        features = gram.features[: count * block_size]
        shape = [count, block_size, *features.shape[1:]]
        return gram.with_features(ops.reshape(features, shape))

    # Blocks are small, so several of them make a tile.
    grams = [blocks(gram) for gram in grams]
    together = max(1, TILE // block_size**2)
    # A function of the user's takes the rows of one block, `(n, dim)`.
    alone = any(isinstance(gram.kernel, CustomKernel) for gram in grams)
    if alone:
        together = 1

    def values(index):
        some = [
            gram.with_features(
                ops.take(gram.features, index[0] if alone else index, axis=0)
            )
            for gram in grams
        ]
        (value,) = statistics(some, None, [(0, 1)], estimator)
        return value[None] if alone else value

    numbers_of_blocks = ops.arange(count, dtype="int32")
    values = map_blocks(values, numbers_of_blocks, together)
    return values, grams
