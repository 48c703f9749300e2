"""The p-value: is this HSIC more than chance?"""

import functools
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.hsic.fourier import covariances, fourier_variables, waves
from blogkeras.hsic.kernels import CustomKernel, one_of
from blogkeras.hsic.statistic import TILE, Gram, hsic_of_blocks, prepare
from blogkeras.ops import map_blocks

NULLS = ("gamma", "permutation")
APPROXIMATIONS = (None, "block", "fourier")
SIZES = {None: None, "block": 100, "fourier": 256}
# Permutations in one call of a compiled program.
CHUNK = 50
# Below this share of its diagonal a centered kernel is rounding.
CONSTANT = 1e-6


class HSICTest(NamedTuple):
    """What `hsic_test` found.

    Attributes:
        statistic: Float.
        p_value: Float. Probability of such a statistic or a larger one if the
            variables are independent.
        null: The draws of `null="permutation"`, `(num_permutations,)`; the pair
            `(shape, scale)` of the gamma distribution of `null="gamma"`; each
            block's value, `(num_blocks,)`, of `approximation="block"`.
    """

    statistic: float
    p_value: float
    null: Any


def hsic_test(
    x,
    y,
    kernel_x=None,
    kernel_y=None,
    null="gamma",
    *,
    num_permutations=500,
    approximation=None,
    size=None,
    seed=None,
    verbose=0,
):
    """Tests two variables for independence.

    The statistic is the biased HSIC. Its distribution for independent
    variables is either drawn, by permuting one of them against the other (exact
    for every n, p ≥ 1/(num_permutations + 1)), or taken to be a gamma
    distribution with the two moments that it has to first order in 1/n: fast,
    good from about 50 samples of few features on, cautious for many features.

    Exact tests need O(n) memory with `"gamma"` and two n × n matrices of
    float32 with `"permutation"` (of Fourier features, two n × size ones). For
    large n:

        approximation="block"     mean of the unbiased HSIC of consecutive
                                  blocks of `size` samples, O(n · size);
                                  p by Student's t (`null` is not used)
        approximation="fourier"   random Fourier features, O(n · size²), with
                                  either null

    Computed in float32. The first call for a number of samples compiles, which
    takes seconds.

    Args:
        x: `(n,)` or `(n, dim_x)`.
        y: `(n,)` or `(n, dim_y)`.
        kernel_x: As in `hsic`. The default has its own median bandwidth for
            each variable, so that a change of units changes nothing.
        kernel_y: As in `hsic`.
        null: `"gamma"` or `"permutation"`.
        num_permutations: Integer ≥ 1.
        approximation: `None`, `"block"` or `"fourier"`.
        size: Integer. Samples per block (100), or number of features (256).
        seed: Integer for permutations and random features; the same seed gives
            the same p-value. `None` draws one.
        verbose: 1 shows a progress bar of the permutations.

    Returns:
        Named tuple `(statistic, p_value, null)`. A constant variable gives 0
        and p = 1.

    Raises:
        ValueError: as `hsic`; on less than 6 samples for `"gamma"`.

    Example:

    >>> x = np.random.default_rng(0).normal(size=100)
    >>> hsic_test(x, np.sin(4 * x)).p_value < 0.05
    True

    Reference:
        [Gretton et al., 2007](https://papers.nips.cc/paper/3201);
        [Zhang et al., 2018](https://arxiv.org/abs/1606.07892);
        [blog post 6910](https://kexue.fm/archives/6910)
    """
    one_of("null", null, NULLS)
    one_of("approximation", approximation, APPROXIMATIONS)
    if num_permutations < 1:
        raise ValueError(
            "Expected at least one permutation. Received: "
            f"num_permutations={num_permutations}"
        )
    size = SIZES[approximation] if size is None else size
    if seed is None:
        seed = int(np.random.default_rng().integers(2**31))
    x, y = (ops.cast(ops.convert_to_tensor(t), "float32") for t in (x, y))
    if len(x.shape) > 2 or len(y.shape) > 2:
        raise ValueError(
            "Expected one sample set, (n,) or (n, dim). Received: "
            f"x.shape={tuple(x.shape)}, y.shape={tuple(y.shape)}"
        )
    if null == "gamma" and approximation is None and x.shape[0] < 6:
        raise ValueError(
            "The gamma distribution needs at least 6 samples; use "
            f'null="permutation". Received: n={x.shape[0]}'
        )
    if approximation == "block":
        return _block_test(x, y, kernel_x, kernel_y, size)
    if approximation == "fourier":
        pair = fourier_variables(x, y, kernel_x, kernel_y, size, seed)
        program, draw = _program(_fourier_moments), _program(_fourier_draws)
    else:
        grams, _ = prepare(x, y, kernel_x, kernel_y, None, "biased")
        kernels = tuple(gram.kernel for gram in grams)
        pair = [gram.features for gram in grams]
        program = _program(_moments, kernels)
        if null == "permutation":
            pair = _program(_centered_matrices, kernels)(*pair)
            program, draw = _program(_matrix_moments), _program(_matrix_draws)
    statistic, mean, variance, constant = (
        float(value) for value in program(*pair)
    )
    if constant:
        nothing = (1.0, 0.0) if null == "gamma" else np.zeros(num_permutations)
        return HSICTest(0.0, 1.0, nothing)
    if null == "gamma":
        return _gamma_test(statistic, mean, variance)
    if approximation == "fourier":
        pair = [_program(_centered_waves)(*variable) for variable in pair]
    draws = _permute(draw, pair, num_permutations, seed, verbose)
    # Draws that are equal but for rounding count as equal.
    extreme = np.sum(draws >= statistic * (1 - 1e-5))
    p_value = (1 + extreme) / (1 + num_permutations)
    return HSICTest(statistic, float(p_value), draws)


def _gamma_test(statistic, mean, variance):
    from scipy.special import gammaincc

    shape, scale = mean**2 / variance, variance / mean
    p_value = float(gammaincc(shape, max(statistic, 0) / scale))
    return HSICTest(statistic, p_value, (shape, scale))


def _block_test(x, y, kernel_x, kernel_y, size):
    from scipy.special import stdtr

    values = ops.convert_to_numpy(
        hsic_of_blocks(x, y, kernel_x, kernel_y, size, "unbiased")
    ).astype("float64")
    count = len(values)
    if count < 2:
        raise ValueError(
            "Expected at least two blocks. Received: "
            f"n={x.shape[0]}, size={size}"
        )
    deviation = values.std(ddof=1) / math.sqrt(count)
    if deviation <= CONSTANT**2:
        return HSICTest(0.0, 1.0, values)
    statistic = float(values.mean())
    p_value = float(stdtr(count - 1, -statistic / deviation))
    return HSICTest(statistic, p_value, values)


def _permute(draw, pair, num_permutations, seed, verbose):
    rng = np.random.default_rng(seed)
    n, draws = pair[0].shape[0], []
    progress = keras.utils.Progbar(
        num_permutations, verbose=verbose, unit_name="permutation"
    )
    chunk = min(CHUNK, num_permutations)
    for start in range(0, num_permutations, chunk):
        # The last chunk is drawn whole, so that one program serves all.
        orders = np.stack([rng.permutation(n) for _ in range(chunk)])
        found = draw(*pair, ops.convert_to_tensor(orders.astype("int32")))
        draws.append(ops.convert_to_numpy(found))
        progress.update(min(start + chunk, num_permutations))
    return np.concatenate(draws)[:num_permutations]


def _program(fn, kernels=None):
    """`fn`, compiled; but a user's own kernel runs as it is."""
    if kernels is None:
        return _compiled(fn)
    if any(isinstance(kernel, CustomKernel) for kernel in kernels):
        return functools.partial(fn, kernels=kernels)
    return _compiled(fn, kernels)


@functools.lru_cache(maxsize=64)
def _compiled(fn, kernels=None):
    if kernels is None:
        return backend.jit(fn)
    return backend.jit(functools.partial(fn, kernels=kernels))


def _moments(x, y, kernels):
    """Statistic, mean and variance for independent variables; constant?

    Two passes over the tiles: the means of the rows, then the rest.
    """
    grams = [Gram(k, t) for k, t in zip(kernels, (x, y), strict=True)]
    n = x.shape[0]
    everyone = ops.arange(n, dtype="int32")
    rows = max(8, TILE // n)

    def first(index):
        own = ops.cast(index[:, None] == everyone, "float32")
        out = []
        for gram in grams:
            matrix = gram.rows(index)
            out += [ops.mean(matrix, -1), ops.sum(matrix * own, -1)]
        return out

    mean_x, diagonal_x, mean_y, diagonal_y = map_blocks(first, everyone, rows)

    def second(index):
        others = ops.cast(index[:, None] != everyone, "float32")
        product = 1.0
        for gram, mean in zip(grams, (mean_x, mean_y), strict=True):
            own = ops.take(mean, index)[:, None]
            product *= gram.rows(index) - own - (mean - ops.mean(mean))
        return ops.mean(product, -1), ops.sum(ops.square(product) * others, -1)

    statistic, squares = map_blocks(second, everyone, rows)
    return _distribution(
        ops.mean(statistic),
        # As a float: n² is too large for an int32 tensor.
        ops.sum(squares) / float(n * (n - 1)),
        [(mean_x, diagonal_x), (mean_y, diagonal_y)],
        n,
    )


def _distribution(statistic, mean_square, variables, n):
    mean, constant = 1.0 / n, False
    for row_means, diagonal in variables:
        diagonal = ops.mean(diagonal)
        others = (n * ops.mean(row_means) - diagonal) / (n - 1)
        spread = diagonal - others
        constant = ops.logical_or(constant, spread <= CONSTANT * diagonal)
        mean *= spread
    factor = 2.0 * (n - 4) * (n - 5) / n / (n - 1) / (n - 2) / max(n - 3, 1)
    return statistic, mean, factor * mean_square, ops.cast(constant, "int32")


def _centered_matrices(x, y, kernels):
    """J K J of both; the rows of the first are scaled by 1/n²."""
    matrices = []
    for kernel, features in zip(kernels, (x, y), strict=True):
        matrix = Gram(kernel, features).matrix()
        scale = ops.mean(ops.diagonal(matrix))
        matrix = matrix - ops.mean(matrix, axis=1, keepdims=True)
        matrix = matrix - ops.mean(matrix, axis=0, keepdims=True)
        # Of a constant variable only rounding is left.
        constant = ops.mean(ops.diagonal(matrix)) <= CONSTANT * scale
        matrices.append(ops.where(constant, 0.0, matrix))
    return matrices


def _matrix_moments(k, l):  # noqa: E741
    constant = ops.logical_or(ops.all(k == 0), ops.all(l == 0))
    statistic = ops.mean(ops.mean(k * l, axis=-1))
    return statistic, 0.0, 0.0, ops.cast(constant, "int32")


def _matrix_draws(k, l, orders):  # noqa: E741
    def draw(order):
        permuted = ops.take(ops.take(l, order, axis=0), order, axis=1)
        return ops.mean(ops.mean(k * permuted, axis=-1))

    return ops.map(draw, orders)


def _fourier_moments(x, y):
    n = x[0].shape[0]
    xy, xx, yy = covariances([x, y], [(0, 1), (0, 0), (1, 1)])
    traces = ops.sum(ops.diagonal(xx)), ops.sum(ops.diagonal(yy))
    squares = ops.sum(ops.square(xx)) * ops.sum(ops.square(yy))
    constant = ops.minimum(*traces) <= 0
    return (
        ops.sum(ops.square(xy)),
        traces[0] * traces[1] / n,
        2 * squares / float(n) ** 2,
        ops.cast(constant, "int32"),
    )


def _centered_waves(x, frequencies):
    features = waves(x, frequencies)
    return features - ops.mean(features, axis=0, keepdims=True)


def _fourier_draws(x, y, orders):
    n = x.shape[0]

    def draw(order):
        covariance = ops.matmul(ops.transpose(x), ops.take(y, order, axis=0))
        return ops.sum(ops.square(covariance / n))

    return ops.map(draw, orders)
