"""HSIC of more than two variables: are they independent of each other?"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from blogkeras.arguments import check_integer, check_verbose
from blogkeras.hsic.grams import Gram, rescale
from blogkeras.hsic.independence_test import (
    HSICTest,
    permutation_p_value,
    permuted,
    program_of,
    rescaled,
    seed_of,
)
from blogkeras.hsic.tiles import prepare_all, product_less_means, statistics
from blogkeras.typing import Tensor


def dhsic(
    variables: Sequence[Tensor],
    kernels: Sequence[Any] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """HSIC of any number of variables: 0 if all are independent of each other.

    With the kernel matrices K¹ … Kᵈ of n samples:

        dHSIC = 1/n² Σ_ij Π_k Kᵏ_ij + Π_k (1/n² Σ_ij Kᵏ_ij)
                − 2/n Σ_i Π_k (1/n Σ_j Kᵏ_ij)

    Variables may be independent in pairs and still not be so together: of two
    coins and whether they agree, any two are independent. For two variables it
    is `hsic` with `estimator="biased"`. Never negative; its expectation for
    independent variables is of order 1/n.

    O(n² d) element by element, in tiles of rows: memory is O(n), never n × n.
    For more than two variables a constant that is added to a kernel changes
    the value. So all kernels are then computed about the origin, also the
    linear, the cosine and the precomputed one. Without a constant (a linear
    kernel of variables with mean zero) they do not see pairs that depend on
    each other; `PolynomialKernel(1)` does.

    Args:
        variables: List of d ≥ 2 variables, `(n,)` or `(..., n, dim)` each.
        kernels: List of d kernels, each as `kernel_x` of `hsic`; `None` is
            `None` for each: the post's Gaussian of median bandwidth, and
            `DeltaKernel()` for strings.
        mask: `(..., n)`. Boolean, or weights ≥ 0, the share of each sample.
            Values of weight 0, NaN included, have no influence.

    Returns:
        Tensor `(...)`. 0 if all variables but one are constant, or all is
        masked.

    Raises:
        ValueError: on fewer than two variables, another number of kernels,
            different n or none, and on NaN or infinity where the values are
            known (outside of compiled functions).

    Example:

    >>> coins = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    >>> agree = coins[0] == coins[1]
    >>> delta = DeltaKernel()
    >>> round(float(hsic(coins[0], agree, delta, delta)), 6)
    0.0
    >>> round(float(dhsic([*coins, agree], [delta] * 3)), 6)
    0.125

    Reference:
        [Pfister et al., 2018](https://arxiv.org/abs/1603.00285)
    """
    grams, weight = prepare_all(_named(variables, kernels), mask, "biased")
    everyone = tuple(range(len(grams)))
    (value,) = statistics(grams, weight, [everyone], "biased")
    return rescale(value, *grams)


def dhsic_test(
    variables: Sequence[Tensor],
    kernels: Sequence[Any] | None = None,
    *,
    num_permutations: int = 500,
    seed: int | None = None,
    verbose: str | int = 0,
) -> HSICTest:
    """Tests whether variables are all independent of each other.

    The statistic is `dhsic`. Its distribution for independent variables is
    drawn by permuting each variable by itself, which is exact for every n:

        p = (1 + number of draws ≥ statistic) / (1 + num_permutations)

    (One variable may stay as it is: only the order of the others against it
    counts.) O(n² d) per permutation, with d n × n matrices of float32 in
    memory. Computed in float32. The first call for a number of samples
    compiles, which takes seconds.

    A small p does not say which variables depend on each other; `hsic_test`
    of the pairs may, unless they do so only together.

    Args:
        variables: List of d ≥ 2 variables, `(n,)` or `(n, dim)` each.
        kernels: List of d kernels, each as `kernel_x` of `hsic`; `None` is
            `None` for each: the post's Gaussian of median bandwidth, and
            `DeltaKernel()` for strings.
        num_permutations: Integer ≥ 1.
        seed: Integer for the permutations; the same seed gives the same
            p-value. `None` draws one, which `keras.utils.set_random_seed`
            decides.
        verbose: 1 shows a progress bar of the permutations.

    Returns:
        Named tuple `(statistic, p_value, null)`, the draws in `null`. If all
        variables but one are constant, the statistic is 0 and p = 1.

    Raises:
        ValueError: on fewer than two variables, another number of kernels,
            different n or none, and on NaN or infinity.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(2, 100))
    >>> z = np.sign(x * y) * np.abs(rng.normal(size=100))
    >>> dhsic_test([x, y, z], num_permutations=99, seed=0).p_value
    0.01

    Reference:
        [Pfister et al., 2018](https://arxiv.org/abs/1603.00285)
    """
    num_permutations = check_integer(
        "num_permutations", num_permutations, minimum=1
    )
    verbose = check_verbose(verbose)
    seed = seed_of(seed)
    named = _named(variables, kernels)
    for name, values, _ in named:
        if len(np.shape(values)) not in (1, 2):
            raise ValueError(
                "Expected one sample set, (n,) or (n, dim). Received: "
                f"{name}.shape={tuple(np.shape(values))}"
            )
    grams, _ = prepare_all(named, None, "biased", "float32")
    rows = program_of(_centered_rows, tuple(gram.kernel for gram in grams))
    centered = rows(*(gram.features for gram in grams))
    n, rng = grams[0].features.shape[0], np.random.default_rng(seed)

    def order(make):
        return np.stack([make(n) for _ in grams[1:]])

    # The first one is the order of the data, whose value is the statistic.
    orders = itertools.chain(
        [order(np.arange)],
        (order(rng.permutation) for _ in itertools.count()),
    )
    draws = permuted(
        program_of(_joint_draws),
        centered,
        orders,
        num_permutations + 1,
        verbose,
    )
    statistic, draws = draws[0], draws[1:]
    return HSICTest(
        rescaled(statistic, grams),
        permutation_p_value(statistic, draws),
        rescaled(draws, grams),
    )


def _named(variables, kernels):
    """`(name, values, kernel)` of each variable."""
    if not isinstance(variables, (list, tuple)) or len(variables) < 2:
        raise ValueError(
            "Expected a list of at least two variables, such as the columns "
            "list(table.T) of an array (n, d). Received: "
            f"variables of type {type(variables).__name__}"
            + (f" and length {len(variables)}" if np.shape(variables) else "")
        )
    if kernels is None:
        kernels = [None] * len(variables)
    if not isinstance(kernels, (list, tuple)) or len(kernels) != len(variables):
        raise ValueError(
            f"Expected a list of {len(variables)} kernels, one for each "
            f"variable. Received: kernels={kernels!r}"
        )
    names = [f"variables[{index}]" for index in range(len(variables))]
    return list(zip(names, variables, kernels, strict=True))


def _centered_rows(*features, kernels):
    """Of each kernel matrix its rows less their means, and these means."""
    pairs = []
    for kernel, x in zip(kernels, features, strict=True):
        matrix = Gram(kernel, x, "float32").matrix()
        first = matrix[:, :1]
        matrix = matrix - first
        mean = ops.mean(matrix, axis=1, keepdims=True)
        pairs.append((matrix - mean, (first + mean)[:, 0] + kernel.left_out))
    deviations, means = zip(*pairs, strict=True)
    return [*deviations, *means]


def _joint_draws(*arguments):
    """dHSIC of the variables in each of some orders, `(draws, d − 1, n)`."""
    *centered, orders = arguments
    d = len(centered) // 2
    deviations, means = centered[:d], centered[d:]
    totals = [ops.mean(m) for m in means]

    def mean(values):
        return ops.mean(values, axis=-1)

    def draw(order):
        rows, of_rows = [deviations[0]], [means[0]]
        for k in range(1, d):
            turned = ops.take(deviations[k], order[k - 1], axis=0)
            rows.append(ops.take(turned, order[k - 1], axis=1))
            of_rows.append(ops.take(means[k], order[k - 1]))
        group = range(d)
        within = mean(product_less_means(rows, of_rows, group, mean))
        around = [m - total for m, total in zip(of_rows, totals, strict=True)]
        return within - product_less_means(around, totals, group, mean)

    return ops.map(draw, orders)
