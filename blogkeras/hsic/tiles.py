"""HSIC of prepared variables: tiles of rows, means and covariances of rows."""

import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import as_numbers, as_numpy
from blogkeras.hsic.grams import Gram
from blogkeras.hsic.kernel import require_finite
from blogkeras.hsic.kernels import (
    CustomKernel,
    LinearKernel,
    PrecomputedKernel,
    as_kernel,
    check_square,
)
from blogkeras.hsic.samples import (
    as_samples,
    check_mask_shape,
    columns,
    float_dtype,
    is_array,
    is_categorical,
    numbers,
)
from blogkeras.loops import ProgramCache
from blogkeras.ops import full_precision_matmul, map_blocks

# Elements of one tile. Compiled tiles are small enough for the processor's
# cache. In eager execution they are large, so that there are few operations.
TILE, EAGER_TILE = 2**18, 2**22
_programs = ProgramCache(size=32)


def prepare(x, y, kernel_x, kernel_y, mask, estimator, dtype=None):
    """Checks; then two `Gram`s and the weights, `(..., n)` or `None`."""
    variables = [("x", x, kernel_x), ("y", y, kernel_y)]
    return prepare_all(variables, mask, estimator, dtype)


def prepare_all(variables, mask, estimator, dtype=None):
    """`prepare` of any number of variables, `(name, values, kernel)` each.

    More than two are not centred.
    """
    if dtype is None:
        wide = "float64" in [float_dtype(x) for _, x, _ in variables]
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
    given, variables = variables, []
    for name, values, kernel in given:
        kernel = as_kernel(kernel, values)
        if len(given) > 2:
            kernel = kernel.uncentered()
        if not is_array(values):
            values = ops.convert_to_tensor(values)
            if is_categorical(values) and backend.is_concrete(values):
                # Tensors of strings can be compared, but not replaced by zeros.
                values = ops.convert_to_numpy(values)
        elif known:
            values = as_samples(values)
        else:
            values = ops.convert_to_tensor(numbers(name, values))
        if len(values.shape) == 0:
            raise ValueError(
                f"Expected `{name}` of shape (n,) or (..., n, dim). Received: "
                f"shape {tuple(values.shape)}"
            )
        values = columns(values)
        if values.shape[-1] == 0:
            raise ValueError(
                f"Expected at least one feature of `{name}`. Received: shape "
                f"{tuple(values.shape)}"
            )
        variables.append((name, values, kernel))
    first_name, first, _ = variables[0]
    n = first.shape[-2]
    if n == 0:
        raise ValueError(
            "Expected at least one sample. Received: "
            f"{first_name}.shape={tuple(first.shape)}"
        )
    for name, x, _ in variables[1:]:
        other = x.shape[-2]
        if n is not None and other is not None and n != other:
            raise ValueError(
                f"Expected as many samples of `{first_name}` as of `{name}`. "
                f"Received: {first_name}.shape={tuple(first.shape)}, "
                f"{name}.shape={tuple(x.shape)}"
            )
    if estimator == "unbiased" and n is not None and n < 4:
        raise ValueError(
            "Expected at least 4 samples for the unbiased form, which divides "
            f"by n − 3. Received: n={n}"
        )
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


def statistics(grams, weight, groups, estimator):
    """HSIC of each group of `grams`, as a list of tensors `(...)`.

    A group is a pair of indices, or more than two for `"biased"`.

    A row of K is centered by its own mean, which is known in a tile of whole
    rows. With k_i the mean of row i and c_i the covariance of row i of K and
    row i of L:

        biased:    mean_i c_i − cov(k, l)
        unbiased:  [(n − 1) Σ c_i − n(n − 1)/(n − 2) Σ (k_i − k̄)(l_i − l̄)]
                   / (n(n − 3)),   means over all other columns

    which equals the definition and does not subtract large, nearly equal
    numbers. For more than two see `product_less_means`: then c_i is that of row
    i of all matrices, and the covariance of k and l becomes that of all means.
    """
    unbiased = estimator == "unbiased"
    pairs_only = all(len(group) == 2 for group in groups)
    if pairs_only and all(isinstance(g.kernel, LinearKernel) for g in grams):
        n = grams[0].features.shape[-2]
        dims = [g.features.shape[-1] for g in grams]
        if n and max(dims) <= n:
            return _linear(grams, weight, groups, estimator)
    like, dtype = grams[0].features, grams[0].dtype
    if unbiased and weight is not None:
        weight = ops.cast(weight > 0, dtype)
    known = not any(isinstance(g.kernel, CustomKernel) for g in grams)
    features = [g.features for g in grams]
    if known and compilable(features) and _tile_rows(like) < like.shape[-2]:
        kernels = tuple(g.kernel for g in grams)
        shapes = tuple(tuple(f.shape) for f in features)
        program = _programs.get(
            (kernels, tuple(groups), estimator, dtype, weight is None, shapes),
            lambda: _compiled_statistics(kernels, groups, estimator, dtype),
        )
        return program(features, weight)
    n, p = measure(weight, like, dtype)
    size = like.shape[-2] or ops.shape(like)[-2]
    everyone = ops.arange(size, dtype="int32")

    def complete(means):
        return [
            m + gram.kernel.left_out
            for m, gram in zip(means, grams, strict=True)
        ]

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
        # (..., b) each; the tile's rows go first for `map_blocks`.
        means = [f[..., 0] + m for f, m in zip(first, means, strict=True)]
        covariances = [
            product_less_means(rows, complete(means), group, mean)
            for group in groups
        ]
        return [ops.moveaxis(t, -1, 0) for t in [*means, *covariances]]

    found = map_blocks(tile, everyone, _tile_rows(like))
    found = [ops.moveaxis(t, 0, -1) for t in found]  # (..., n)
    means, covariances = found[: len(grams)], found[len(grams) :]
    first = [m[..., :1] for m in means]
    means = [m - f for m, f in zip(means, first, strict=True)]
    centers = [ops.sum(m * p, axis=-1, keepdims=True) for m in means]
    means = [m - c for m, c in zip(means, centers, strict=True)]
    totals = [(f + c)[..., 0] for f, c in zip(first, centers, strict=True)]

    def mean_of_rows(values):
        return ops.sum(p * values, axis=-1)

    values = []
    for group, covariance in zip(groups, covariances, strict=True):
        within = ops.sum(p * covariance, axis=-1)
        between = product_less_means(
            means, complete(totals), group, mean_of_rows
        )
        values.append(_combine(within, between, n, estimator))
    return values


def product_less_means(deviations, means, group, mean):
    """E[Π_k v_k] − Π_k E[v_k], without the difference of the two.

    Of two variables it is their covariance E[δ₁ δ₂]. With the product P of some
    variables, p = E[P], D = P − p, and one variable more, v = m + δ:

        E[P v] = p m + E[D δ],    P v − E[P v] = p δ + m D + D δ − E[D δ]

    so the difference of E[P v] and the product of the means is m times that of
    P, plus E[D δ].

    Args:
        deviations: List of tensors `(..., n)`, v_k − E[v_k].
        means: List of tensors `(...)`, E[v_k].
        group: Indices k.
        mean: Function of `(..., n)` that returns `(...)`.
    """
    first, *others, last = group
    product, deviation, difference = means[first], deviations[first], 0.0
    for index in others:
        m, delta = means[index], deviations[index]
        both = deviation * delta
        covariance = mean(both)
        difference = difference * m + covariance
        deviation = (product[..., None] * delta + m[..., None] * deviation) + (
            both - covariance[..., None]
        )
        product = product * m + covariance
    covariance = mean(deviation * deviations[last])
    return difference * means[last] + covariance if others else covariance


def compilable(tensors):
    """Whether `backend.jit` may be used here: no trace around, no gradient."""
    return not backend.is_recorded() and all(
        backend.is_concrete(x) for x in tensors
    )


def _compiled_statistics(kernels, groups, estimator, dtype):
    """`statistics` compiled by XLA, for many samples."""

    def fn(features, weight):
        grams = [
            Gram(kernel, x, dtype)
            for kernel, x in zip(kernels, features, strict=True)
        ]
        return statistics(grams, weight, groups, estimator)

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

    Of features with mean zero, Σ_j K_ij = 0 and the sums over all other
    columns are those of the diagonal.
    """
    like, dtype = grams[0].features, grams[0].dtype
    if estimator == "unbiased" and weight is not None:
        weight = ops.cast(weight > 0, dtype)
    n, p = measure(weight, like, dtype)
    # They were centered over all samples and by the weights. Here they may be a
    # block of these samples, and the weights may count as 0 and 1.
    features = [
        g.features - ops.sum(g.features * p[..., None], axis=-2, keepdims=True)
        for g in grams
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
