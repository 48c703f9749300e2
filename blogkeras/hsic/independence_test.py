"""The test of independence by HSIC."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import check_choice, check_integer, check_verbose
from blogkeras.hsic.fourier import covariances, fourier_variables, waves
from blogkeras.hsic.grams import Gram
from blogkeras.hsic.kernels import CustomKernel
from blogkeras.hsic.statistic import hsic_of_blocks
from blogkeras.hsic.tiles import TILE, prepare
from blogkeras.loops import ProgramCache
from blogkeras.ops import full_precision_matmul, map_blocks
from blogkeras.state import base_seed
from blogkeras.typing import Tensor

NULLS = ("gamma", "permutation")
APPROXIMATIONS = (None, "block", "fourier")
SIZES = {None: None, "block": 100, "fourier": 256}
# Permutations in one call of a compiled program.
CHUNK = 50
# A centered kernel below this share of its diagonal is a rounding error.
CONSTANT = 1e-6
_programs = ProgramCache(size=32)


class HSICTest(NamedTuple):
    """The result of `hsic_test` and `dhsic_test`.

    Attributes:
        statistic: Float.
        p_value: Float. Probability of such a statistic or a larger one if the
            variables are independent.
        null: The draws of `null="permutation"`, `(num_permutations,)`; the pair
            `(shape, scale)` of the gamma distribution of `null="gamma"`; each
            block's value, `(num_blocks,)`, of `approximation="block"`.

    Example:

    >>> x = np.random.default_rng(0).normal(size=100)
    >>> result = hsic_test(x, x**2)
    >>> result.p_value < 0.05
    True

    Reference:
        [Gretton et al., 2007](https://papers.nips.cc/paper/3201)
    """

    statistic: float
    p_value: float
    null: Any


def hsic_test(
    x: Tensor,
    y: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    null: str = "gamma",
    *,
    num_permutations: int = 500,
    approximation: str | None = None,
    size: int | None = None,
    seed: int | None = None,
    verbose: str | int = 0,
) -> HSICTest:
    """Tests two variables for independence.

    The statistic is the biased HSIC. Its distribution for independent
    variables is either drawn, by permuting one of them against the other (exact
    for every n, p ≥ 1/(num_permutations + 1)), or taken to be a gamma
    distribution with the two moments that it has to first order in 1/n: fast,
    accurate from about 50 samples of few features on, conservative for many
    features.

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
        kernel_x: A kernel, a function or Keras layer `fn(x1, x2)` that returns
            the `(n, m)` matrix, or `None`: the post's Gaussian with the median
            distance of this variable as bandwidth, so that a change of units
            changes nothing.
        kernel_y: Likewise.
        null: `"gamma"` or `"permutation"`.
        num_permutations: Integer ≥ 1.
        approximation: `None`, `"block"` or `"fourier"`.
        size: Integer. Samples per block (100), or number of features (256).
        seed: Integer for permutations and random features; the same seed gives
            the same p-value. `None` draws one, which
            `keras.utils.set_random_seed` decides.
        verbose: 1 shows a progress bar of the permutations.

    Returns:
        Named tuple `(statistic, p_value, null)`. A constant variable gives 0
        and p = 1.

    Raises:
        ValueError: on different n or none, on NaN or infinity, and on less than
            6 samples for `"gamma"`.

    Example:

    >>> x = np.random.default_rng(0).normal(size=100)
    >>> hsic_test(x, np.sin(4 * x)).p_value < 0.05
    True

    Reference:
        [Gretton et al., 2007](https://papers.nips.cc/paper/3201);
        [Zhang et al., 2018](https://arxiv.org/abs/1606.07892);
        [blog post 6910](https://kexue.fm/archives/6910)
    """
    check_choice("null", null, NULLS)
    check_choice("approximation", approximation, APPROXIMATIONS)
    num_permutations = check_integer(
        "num_permutations", num_permutations, minimum=1
    )
    verbose = check_verbose(verbose)
    size = SIZES[approximation] if size is None else size
    if size is not None:
        size = check_integer("size", size, minimum=2)
    seed = seed_of(seed)
    shapes = [tuple(np.shape(t)) for t in (x, y)]
    if not all(len(shape) in (1, 2) for shape in shapes):
        raise ValueError(
            "Expected one sample set, (n,) or (n, dim). Received: "
            f"x.shape={shapes[0]}, y.shape={shapes[1]}"
        )
    if null == "gamma" and approximation is None and shapes[0][0] < 6:
        raise ValueError(
            "Expected at least 6 samples for the gamma distribution; else use "
            f'null="permutation". Received: n={shapes[0][0]}'
        )
    if approximation == "block":
        return _block_test(x, y, kernel_x, kernel_y, size)
    if approximation == "fourier":
        pair, grams = fourier_variables(
            x, y, kernel_x, kernel_y, size, seed, "float32"
        )
        program, draw = program_of(_fourier_moments), program_of(_fourier_draws)
    else:
        grams, _ = prepare(x, y, kernel_x, kernel_y, None, "biased", "float32")
        kernels = tuple(gram.kernel for gram in grams)
        pair = [gram.features for gram in grams]
        program = program_of(_moments, kernels)
        if null == "permutation":
            pair = program_of(_centered_matrices, kernels)(*pair)
            program, draw = (
                program_of(_matrix_moments),
                program_of(_matrix_draws),
            )
    *moments, spread_x, spread_y = program(*pair)
    statistic, mean, variance, constant = map(float, moments)
    if constant:
        nothing = (1.0, 0.0) if null == "gamma" else np.zeros(num_permutations)
        return HSICTest(0.0, 1.0, nothing)
    unit = float(spread_x) * float(spread_y)
    if null == "gamma":
        return _gamma_test(statistic, mean, variance, unit, grams)
    if approximation == "fourier":
        pair = [
            program_of(_centered_waves)(*variable, spread)
            for variable, spread in zip(pair, (spread_x, spread_y), strict=True)
        ]
    else:
        pair = [matrix for matrix, _ in pair]
    n, rng = pair[0].shape[0], np.random.default_rng(seed)
    orders = (rng.permutation(n) for _ in itertools.count())
    draws = permuted(draw, pair, orders, num_permutations, verbose)
    return HSICTest(
        rescaled(statistic, grams, unit),
        permutation_p_value(statistic, draws),
        rescaled(draws, grams, unit),
    )


def seed_of(seed):
    """A seed for NumPy: the one given, or a new one of Keras's."""
    if seed is None:
        seed = int(base_seed(None))
    return check_integer("seed", seed, minimum=0)


def permutation_p_value(statistic, draws):
    """The share of draws that are as large, with the statistic among them."""
    # Draws that differ by rounding errors only count as equal.
    extreme = np.sum(draws >= statistic * (1 - 1e-5))
    return float((1 + extreme) / (1 + len(draws)))


def rescaled(values, grams, unit=1.0):
    """`rescale` of values in some unit, in float64."""
    exponent = sum(gram.exponent for gram in grams)
    for gram in grams:
        exponent += sum(round(math.log2(float(f))) for f in gram.factors)
    with np.errstate(over="ignore"):
        values = np.ldexp(np.asarray(values, "float64") * unit, exponent)
    return values if values.ndim else float(values)


def _gamma_test(statistic, mean, variance, unit, grams):
    from scipy.special import gammaincc

    shape, scale = mean**2 / variance, variance / mean
    p_value = float(gammaincc(shape, max(statistic, 0) / scale))
    statistic, scale = (rescaled(v, grams, unit) for v in (statistic, scale))
    return HSICTest(statistic, p_value, (shape, scale))


def _block_test(x, y, kernel_x, kernel_y, size):
    from scipy.special import stdtr

    values, grams = hsic_of_blocks(x, y, kernel_x, kernel_y, size, "unbiased")
    values = rescaled(ops.convert_to_numpy(values), grams)
    count = len(values)
    if count < 2:
        raise ValueError(
            "Expected at least two blocks. Received: "
            f"n={np.shape(x)[0]}, size={size}"
        )
    statistic = float(values.mean())
    deviation = values.std(ddof=1) / math.sqrt(count)
    if deviation == 0:
        return HSICTest(statistic, 0.0 if statistic > 0 else 1.0, values)
    p_value = float(stdtr(count - 1, -statistic / deviation))
    return HSICTest(statistic, p_value, values)


def permuted(draw, arrays, orders, count, verbose):
    """The statistic in `count` orders of the samples, `(count,)`.

    Args:
        draw: Function of `*arrays` and of a chunk of orders.
        arrays: List of tensors.
        orders: Iterator of integer arrays of one shape, without end.
        count: Integer.
        verbose: As in `hsic_test`.
    """
    draws = []
    progress = keras.utils.Progbar(
        count, verbose=verbose, unit_name="permutation"
    )
    chunk = min(CHUNK, count)
    for start in range(0, count, chunk):
        # The last chunk has full size too, so that one program is enough.
        some = np.stack(list(itertools.islice(orders, chunk)))
        values = draw(*arrays, ops.convert_to_tensor(some.astype("int32")))
        draws.append(ops.convert_to_numpy(values))
        progress.update(min(start + chunk, count))
    return np.concatenate(draws)[:count]


def program_of(fn, kernels=None):
    """`fn`, compiled, unless a kernel is a function of the user's."""
    if kernels is not None:
        if any(isinstance(kernel, CustomKernel) for kernel in kernels):
            return functools.partial(fn, kernels=kernels)
        return _programs.get(
            (fn, kernels),
            lambda: _program_of_shapes(functools.partial(fn, kernels=kernels)),
        )
    return _programs.get(fn, lambda: _program_of_shapes(fn))


def _program_of_shapes(fn):
    """`fn`, compiled for each of the last few shapes."""
    programs = ProgramCache(size=16)

    def run(*args):
        shapes = tuple(
            None if x is None else tuple(x.shape) for x in tree.flatten(args)
        )
        return programs.get(shapes, lambda: backend.jit(fn))(*args)

    return run


def _moments(x, y, kernels):
    """Statistic, mean and variance if independent, whether constant; spreads.

    A kernel's spread is the mean of its diagonal less that of the rest. The
    moments are those of kernels divided by it: squares of products of kernels
    that are large or small would be beyond float32.

    Two passes over the tiles: the means of the rows, then the rest.
    """
    grams = [
        Gram(kernel, features, "float32")
        for kernel, features in zip(kernels, (x, y), strict=True)
    ]
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
    means, spreads, constant = (mean_x, mean_y), [], False
    for mean, diagonal in zip(means, (diagonal_x, diagonal_y), strict=True):
        diagonal = ops.mean(diagonal)
        spread = diagonal - (n * ops.mean(mean) - diagonal) / (n - 1)
        constant = ops.logical_or(constant, spread <= CONSTANT * diagonal)
        spreads.append(spread)

    def second(index):
        others = ops.cast(index[:, None] != everyone, "float32")
        product = 1.0
        for gram, mean, spread in zip(grams, means, spreads, strict=True):
            own = ops.take(mean, index)[:, None]
            matrix = gram.rows(index) - own - (mean - ops.mean(mean))
            product *= matrix / spread
        return ops.mean(product, -1), ops.sum(ops.square(product) * others, -1)

    statistic, squares = map_blocks(second, everyone, rows)
    # As a float: n² is too large for an int32 tensor.
    mean_square = ops.sum(squares) / float(n * (n - 1))
    factor = 2.0 * (n - 4) * (n - 5) / n / (n - 1) / (n - 2) / max(n - 3, 1)
    return (
        ops.mean(statistic),
        1.0 / n,
        factor * mean_square,
        ops.cast(constant, "int32"),
        *spreads,
    )


def _centered_matrices(x, y, kernels):
    """J K J of both, divided by the mean of its diagonal; and this mean."""
    pairs = []
    for kernel, features in zip(kernels, (x, y), strict=True):
        matrix = Gram(kernel, features, "float32").matrix()
        scale = ops.mean(ops.abs(matrix))
        matrix = matrix - ops.mean(matrix, axis=1, keepdims=True)
        matrix = matrix - ops.mean(matrix, axis=0, keepdims=True)
        # The centered kernel of a constant variable is a rounding error.
        spread = ops.mean(ops.diagonal(matrix))
        constant = spread <= CONSTANT * scale
        unit = ops.where(constant, 1.0, spread)
        pairs.append((ops.where(constant, 0.0, matrix / unit), unit))
    return pairs


def _matrix_moments(k, l):  # noqa: E741
    (k, spread_k), (l, spread_l) = k, l  # noqa: E741
    constant = ops.logical_or(ops.all(k == 0), ops.all(l == 0))
    statistic = ops.mean(ops.mean(k * l, axis=-1))
    constant = ops.cast(constant, "int32")
    return statistic, 0.0, 0.0, constant, spread_k, spread_l


def _matrix_draws(k, l, orders):  # noqa: E741
    def draw(order):
        permuted = ops.take(ops.take(l, order, axis=0), order, axis=1)
        return ops.mean(ops.mean(k * permuted, axis=-1))

    return ops.map(draw, orders)


def _fourier_moments(x, y):
    n = x[0].shape[0]
    xy, xx, yy = covariances([x, y], [(0, 1), (0, 0), (1, 1)])
    traces = ops.sum(ops.diagonal(xx)), ops.sum(ops.diagonal(yy))
    constant = ops.minimum(*traces) <= 0
    squares = 1.0
    for covariance, trace in zip((xx, yy), traces, strict=True):
        squares *= ops.sum(ops.square(covariance / trace))
        xy = xy / ops.sqrt(trace)
    return (
        ops.sum(ops.square(xy)),
        1.0 / n,
        2 * squares / float(n) ** 2,
        ops.cast(constant, "int32"),
        *traces,
    )


def _centered_waves(x, frequencies, spread):
    features = waves(x, frequencies)
    features = features - ops.mean(features, axis=0, keepdims=True)
    return features / ops.sqrt(spread)


def _fourier_draws(x, y, orders):
    n = x.shape[0]

    def draw(order):
        covariance = full_precision_matmul(
            ops.transpose(x), ops.take(y, order, axis=0)
        )
        return ops.sum(ops.square(covariance / n))

    return ops.map(draw, orders)
