"""HSIC by random Fourier features."""

from typing import Any

import keras
from keras import ops

from blogkeras import backend
from blogkeras.arguments import check_integer, check_seed
from blogkeras.hsic.distance_kernels import GaussianKernel
from blogkeras.hsic.grams import rescale
from blogkeras.hsic.kernels import LinearKernel
from blogkeras.hsic.tiles import compilable, prepare
from blogkeras.loops import ProgramCache
from blogkeras.ops import full_precision_matmul
from blogkeras.typing import Tensor

# Largest number of blocks, and smallest number of rows, that random features
# are summed in.
BLOCKS, BLOCK_ROWS = 32, 1024
_programs = ProgramCache(size=8)


def fourier_hsic(
    x: Tensor,
    y: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    num_features: int = 256,
    seed: int | None = None,
) -> Tensor:
    """HSIC by random Fourier features, O(n · num_features²).

    ‖Φ(x)ᵀ J Φ(y)‖²_F / n², where Φ(x₁)·Φ(x₂) ≈ K(x₁, x₂) with an error of order
    1/√num_features. An estimate of the `"biased"` form. The features are
    computed and summed in blocks of n/32 samples.

    Args:
        x: `(n,)` or `(n, dim_x)`.
        y: `(n,)` or `(n, dim_y)`.
        kernel_x: `GaussianKernel`, `None` (Gaussian with median bandwidth) or
            `LinearKernel` (exact). For labels: one-hot with `LinearKernel`,
            which is the delta kernel.
        kernel_y: Likewise.
        num_features: Even integer.
        seed: Integer or `keras.random.SeedGenerator`.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: on kernels that have no such features, on an odd number of
            features, on different n or none, and on NaN or infinity.

    Example:

    >>> x = np.random.default_rng(0).normal(size=1000)
    >>> value, exact = fourier_hsic(x, x**2, seed=0), hsic(x, x**2)
    >>> bool(abs(value / exact - 1) < 0.2)
    True

    Reference:
        [Rahimi and Recht, 2007](https://papers.nips.cc/paper/3182);
        [Zhang et al., 2018](https://arxiv.org/abs/1606.07892)
    """
    variables, grams = fourier_variables(
        x, y, kernel_x, kernel_y, num_features, seed
    )
    tensors = keras.tree.flatten(variables)
    run = covariances
    if compilable([x for x in tensors if x is not None]):
        shapes = tuple(x if x is None else tuple(x.shape) for x in tensors)
        run = _programs.get(shapes, lambda: backend.jit(covariances))
    (covariance,) = run(variables)
    return rescale(ops.sum(ops.square(covariance)), *grams)


def fourier_variables(x, y, kernel_x, kernel_y, num_features, seed, dtype=None):
    """The arguments of `waves` for both variables, and the `Gram`s."""
    num_features = check_integer("num_features", num_features, minimum=2)
    if num_features % 2:
        raise ValueError(
            "Expected an even number of features, sines and cosines. "
            f"Received: num_features={num_features}"
        )
    grams, _ = prepare(x, y, kernel_x, kernel_y, None, "biased", dtype)
    seed = check_seed("seed", seed)
    if not isinstance(seed, keras.random.SeedGenerator):
        seed = keras.random.SeedGenerator(seed)
    variables = [_frequencies(gram, num_features // 2, seed) for gram in grams]
    return variables, grams


def _frequencies(gram, count, seed):
    x = gram.features
    if isinstance(gram.kernel, LinearKernel):
        return x, None
    if not isinstance(gram.kernel, GaussianKernel):
        raise ValueError(
            "Expected GaussianKernel, of which random Fourier features are, or "
            "LinearKernel, which needs none. For labels take their one-hot "
            f"codes with LinearKernel(). Received: {gram.kernel!r}"
        )
    # exp(−d²) is the mean of cos(w·(x₁ − x₂)) over w ~ N(0, 2I).
    shape = (x.shape[-1], count)
    return x, backend.normal(shape, stddev=2**0.5, seed=seed, dtype=x.dtype)


def waves(x, frequencies):
    """Φ(x), `(n, num_features)`; a linear variable is its own features."""
    if frequencies is None:
        return x
    phase = full_precision_matmul(x, frequencies)
    both = ops.concatenate([ops.cos(phase), ops.sin(phase)], axis=-1)
    return both / frequencies.shape[-1] ** 0.5


def covariances(variables, pairs=((0, 1),)):
    """Φ(x)ᵀ J Φ(y) / n of each pair of variables, block by block of rows."""
    x = variables[0][0]
    n = x.shape[0] or ops.shape(x)[0]
    blocks = BLOCKS if x.shape[0] is None else min(BLOCKS, -(-n // BLOCK_ROWS))
    rows = -(-n // blocks)
    index = ops.reshape(
        ops.arange(blocks * rows, dtype="int32"), [blocks, rows]
    )
    # Subtract the first row, so that a constant variable becomes exactly 0.
    first = [waves(x[:1], w) for x, w in variables]

    def sums(index):
        inside = ops.cast(index < n, x.dtype)[:, None]
        index = ops.minimum(index, n - 1)
        parts = [
            (waves(ops.take(x, index, axis=0), w) - f) * inside
            for (x, w), f in zip(variables, first, strict=True)
        ]
        products = [
            full_precision_matmul(ops.transpose(parts[i]), parts[j])
            for i, j in pairs
        ]
        return [ops.sum(part, axis=0) for part in parts] + products

    if blocks == 1:
        totals = sums(index[0])
    else:
        totals = [ops.sum(part, axis=0) for part in ops.map(sums, index)]
    totals = [total / ops.cast(n, x.dtype) for total in totals]
    means, products = totals[: len(variables)], totals[len(variables) :]
    return [
        product - means[i][:, None] * means[j]
        for (i, j), product in zip(pairs, products, strict=True)
    ]
