"""HSIC, CKA and normalized HSIC as functions."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_choice,
    check_integer,
    check_number,
)
from blogkeras.hsic.grams import Gram, rescale
from blogkeras.hsic.kernels import (
    CustomKernel,
    LinearKernel,
    PrecomputedKernel,
    as_kernel,
    check_square,
    require_finite,
)
from blogkeras.hsic.samples import (
    check_mask_shape,
    columns,
    float_dtype,
    is_array,
    numbers,
)
from blogkeras.loops import ProgramCache
from blogkeras.ops import full_precision_matmul, map_blocks, safe_sqrt
from blogkeras.typing import Tensor

ESTIMATORS = ("biased", "blog", "unbiased")
# Elements of one tile. Compiled tiles are small enough for the processor's
# cache. In eager execution they are large, so that there are few operations.
TILE, EAGER_TILE = 2**18, 2**22
_programs = ProgramCache(size=32)


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
        ValueError: on different n, on fewer than 4 pairs for `"unbiased"`, and
            on NaN or infinity where the values are known (outside of compiled
            functions).

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
        ValueError: on different n, and on NaN or infinity where the values are
            known (outside of compiled functions),
            on matrices that are not square, and on fewer than 4 pairs for
            `"unbiased"`.

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
        ValueError: on different n, and on NaN or infinity where the values are
            known (outside of compiled functions), and on
            fewer than 4 pairs for `"unbiased"`.

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
        ValueError: on different n, and on NaN or infinity where the values are
            known (outside of compiled functions), and if ε is
            not positive.

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
        ValueError: on different n, and on NaN or infinity where the values are
            known (outside of compiled functions), on
            precomputed kernels, and on fewer samples than `block_size`.

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

    def values(index):
        some = [
            gram.with_features(ops.take(gram.features, index, axis=0))
            for gram in grams
        ]
        return statistics(some, None, [(0, 1)], estimator)[0]

    numbers_of_blocks = ops.arange(count, dtype="int32")
    values = map_blocks(values, numbers_of_blocks, together)
    return values, grams


def prepare(x, y, kernel_x, kernel_y, mask, estimator, dtype=None):
    """Checks; then two `Gram`s and the weights, `(..., n)` or `None`."""
    if dtype is None:
        wide = "float64" in (float_dtype(x), float_dtype(y))
        dtype = "float64" if wide else "float32"
    known = mask is None or is_array(mask) or backend.is_concrete(mask)
    weight = None
    if mask is not None and known:
        weight = as_numpy(as_numbers(mask, "mask")).astype("float64")
        require_finite("mask", weight)
        if weight.size and weight.min() < 0:
            raise ValueError(
                "Expected `mask` to be boolean or weights of at least 0. "
                f"Received: mask with {weight.min():g}"
            )
    variables, shapes = [], []
    for name, values, kernel in (("x", x, kernel_x), ("y", y, kernel_y)):
        if not is_array(values):
            values = ops.convert_to_tensor(values)
        elif known:
            values = np.asarray(values)
        else:
            values = ops.convert_to_tensor(numbers(name, values))
        if len(values.shape) == 0:
            raise ValueError(
                f"Expected `{name}` of shape (n,) or (..., n, dim). Received: "
                f"shape {tuple(values.shape)}"
            )
        values = columns(values)
        variables.append((name, values, as_kernel(kernel)))
        shapes.append(tuple(values.shape))
    n, other = (shape[-2] for shape in shapes)
    if n is not None and other is not None and n != other:
        raise ValueError(
            "Expected as many samples of `x` as of `y`. Received: "
            f"x.shape={shapes[0]}, y.shape={shapes[1]}"
        )
    if estimator == "unbiased" and n is not None and n < 4:
        raise ValueError(
            "The unbiased form divides by n − 3: it needs at least 4 samples. "
            f"Received: n={n}"
        )
    first = variables[0][1]
    # TensorFlow has no tensor of objects such as None.
    shape = (first.shape if is_array(first) else ops.shape(first))[:-1]
    if weight is not None:
        weight = check_mask_shape(weight, shape)
    tensor = None
    if mask is not None:
        tensor = mask if weight is None else weight.astype(dtype)
        tensor = ops.broadcast_to(ops.cast(tensor, dtype), shape)
    grams = []
    for name, x, kernel in variables:
        if isinstance(x, np.ndarray):
            grams.append(kernel.of_array(name, x, weight, dtype))
            continue
        if tensor is not None:
            x = ops.where(tensor[..., :, None] > 0, x, ops.zeros_like(x))
            if isinstance(kernel, PrecomputedKernel):
                check_square(name, x)
                x = ops.where(tensor[..., None, :] > 0, x, ops.zeros_like(x))
        require_finite(name, x)
        grams.append(kernel.of_tensor(x, tensor, dtype))
    return grams, tensor


def measure(weight, like, dtype):
    """Number of samples `(...)` and their shares `(..., n)`, of sum 1."""
    if weight is None:
        n = like.shape[-2] or ops.shape(like)[-2]
        n = ops.cast(n, dtype)
        return n, ops.ones(ops.shape(like)[-2:-1], dtype) / n
    total = ops.sum(weight, axis=-1)
    squares = ops.sum(ops.square(weight), axis=-1)
    p = weight / ops.maximum(total, 1e-30)[..., None]
    return ops.square(total) / ops.maximum(squares, 1e-30), p


def statistics(grams, weight, pairs, estimator):
    """HSIC of each pair of `grams`, as a list of tensors `(...)`.

    A row of K is centered by its own mean, which is known in a tile of whole
    rows. With k_i the mean of row i and c_i the covariance of row i of K and
    row i of L:

        biased:    mean_i c_i − cov(k, l)
        unbiased:  [(n − 1) Σ c_i − n(n − 1)/(n − 2) Σ (k_i − k̄)(l_i − l̄)]
                   / (n(n − 3)),   means over all other columns

    which equals the definition and does not subtract large, nearly equal
    numbers.
    """
    unbiased = estimator == "unbiased"
    if all(isinstance(g.kernel, LinearKernel) for g in grams):
        n = grams[0].features.shape[-2]
        dims = [g.features.shape[-1] for g in grams]
        if n and max(dims) <= n:
            return _linear(grams, weight, pairs, estimator)
    like, dtype = grams[0].features, grams[0].dtype
    if unbiased and weight is not None:
        weight = ops.cast(weight > 0, dtype)
    known = not any(isinstance(g.kernel, CustomKernel) for g in grams)
    features = [g.features for g in grams]
    if known and compilable(features) and _tile_rows(like) < like.shape[-2]:
        kernels = tuple(g.kernel for g in grams)
        shapes = tuple(tuple(f.shape) for f in features)
        program = _programs.get(
            (kernels, tuple(pairs), estimator, dtype, weight is None, shapes),
            lambda: _compiled_statistics(kernels, pairs, estimator, dtype),
        )
        return program(features, weight)
    n, p = measure(weight, like, dtype)
    size = like.shape[-2] or ops.shape(like)[-2]
    everyone = ops.arange(size, dtype="int32")

    def tile(index):
        rows = [gram.rows(index) for gram in grams]  # (..., b, n)
        if unbiased:
            others = ops.cast(index[:, None] != everyone, dtype)
            share = p[..., None, :] * others
            share = share / ops.maximum(
                ops.sum(share, axis=-1, keepdims=True), 1e-30
            )

            def mean(values):
                return ops.sum(values * share, axis=-1)
        else:

            def mean(values):
                return full_precision_matmul(values, p[..., None])[..., 0]

        # Subtract the first entry, so that a constant row becomes exactly 0.
        first = [row[..., :1] for row in rows]
        rows = [r - f for r, f in zip(rows, first, strict=True)]
        means = [mean(row) for row in rows]
        rows = [r - m[..., None] for r, m in zip(rows, means, strict=True)]
        covariances = [mean(rows[i] * rows[j]) for i, j in pairs]
        # (..., b) each; the tile's rows go first for `map_blocks`.
        means = [f[..., 0] + m for f, m in zip(first, means, strict=True)]
        return [ops.moveaxis(t, -1, 0) for t in [*means, *covariances]]

    found = map_blocks(tile, everyone, _tile_rows(like))
    found = [ops.moveaxis(t, 0, -1) for t in found]  # (..., n)
    means, covariances = found[: len(grams)], found[len(grams) :]
    means = [m - m[..., :1] for m in means]
    centers = [ops.sum(m * p, axis=-1, keepdims=True) for m in means]
    means = [m - c for m, c in zip(means, centers, strict=True)]
    values = []
    for (i, j), covariance in zip(pairs, covariances, strict=True):
        within = ops.sum(p * covariance, axis=-1)
        between = ops.sum(p * means[i] * means[j], axis=-1)
        values.append(_combine(within, between, n, estimator))
    return values


def compilable(tensors):
    """Whether `backend.jit` may be used here: no trace around, no gradient."""
    return not backend.is_recorded() and all(
        backend.is_concrete(x) for x in tensors
    )


def _compiled_statistics(kernels, pairs, estimator, dtype):
    """`statistics` compiled by XLA, for many samples."""

    def fn(features, weight):
        grams = [
            Gram(kernel, x, dtype)
            for kernel, x in zip(kernels, features, strict=True)
        ]
        return statistics(grams, weight, pairs, estimator)

    return backend.jit(fn)


def _combine(within, between, n, estimator):
    if estimator == "biased":
        return within - between
    if estimator == "blog":
        factor = ops.square(n / ops.maximum(n - 1, 1e-30))
        return ops.where(n > 1, factor * (within - between), 0.0)
    value = (n - 1) * (within - n / ops.maximum(n - 2, 1) * between)
    return ops.where(n > 3, value / ops.maximum(n - 3, 1), 0.0)


def _linear(grams, weight, pairs, estimator):
    """`statistics` of linear kernels, without n × n numbers.

    Features have mean zero, so Σ_j K_ij = 0 and the sums over all other
    columns are those of the diagonal.
    """
    like, dtype = grams[0].features, grams[0].dtype
    if estimator == "unbiased" and weight is not None:
        weight = ops.cast(weight > 0, dtype)
    n, p = measure(weight, like, dtype)
    features = [g.features for g in grams]
    if weight is not None and estimator == "unbiased":
        # They were centered by the weights, which count as 0 and 1 here.
        features = [
            f - ops.sum(f * p[..., None], axis=-2, keepdims=True)
            for f in features
        ]
    values = []
    for i, j in pairs:
        x, y = features[i], features[j]
        covariance = full_precision_matmul(
            ops.swapaxes(x * p[..., None], -1, -2), y
        )
        full = ops.sum(ops.square(covariance), axis=(-2, -1))
        if estimator != "unbiased":
            values.append(_combine(full, 0.0, n, estimator))
            continue
        # Row i: sum over the others is −d_i, with d_i = K_ii.
        d, e = ops.sum(x * x, axis=-1), ops.sum(y * y, axis=-1)
        d_mean = ops.sum(p * d, axis=-1, keepdims=True)
        e_mean = ops.sum(p * e, axis=-1, keepdims=True)
        others = ops.maximum(n - 1, 1)
        product = ops.sum(p * d * e, axis=-1)
        # Σ_{j≠i} K_ij L_ij − (n−1) k̃_i l̃_i, over (n − 1), averaged over i.
        within = (n * full - product) / others - product / others**2
        between = ops.sum(p * (d - d_mean) * (e - e_mean), axis=-1) / others**2
        values.append(_combine(within, between, n, estimator))
    return values


def _tile_rows(like):
    leading = 1
    for size in like.shape[:-2]:
        leading *= size or 1
    n = like.shape[-2]
    if n is None:
        return 64
    tile = EAGER_TILE if backend.is_concrete(like) else TILE
    return min(n, max(8, tile // (n * leading)))
