"""The test of conditional independence by kernels (KCI)."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import check_choice, check_integer, check_number
from blogkeras.hsic.distance_kernels import GaussianKernel
from blogkeras.hsic.independence_test import (
    HSICTest,
    permutation_p_value,
    seed_of,
)
from blogkeras.hsic.kernel import known_numbers
from blogkeras.hsic.kernels import PrecomputedKernel, as_kernel
from blogkeras.hsic.samples import (
    columns,
    float_dtype,
    in_deviations,
    is_categorical,
)
from blogkeras.hsic.tiles import prepare
from blogkeras.typing import Tensor

NULLS = ("gamma", "spectral")
# Eigenvalues below this share of the largest one are left out.
SMALL = 1e-5
# Random numbers that are drawn at a time.
DRAWS = 2**22


def kci_test(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    kernel_x: Any = None,
    kernel_y: Any = None,
    kernel_z: Any = None,
    null: str = "gamma",
    *,
    epsilon: float = 1e-3,
    num_draws: int = 5000,
    seed: int | None = None,
) -> HSICTest:
    """Tests whether x and y are independent given z, x ⟂ y | z.

    What z says of x and y is taken away by kernel ridge regression, and HSIC
    computed of the rest. With centered kernel matrices K̃, and of (x, z) the
    product of that of x and a smooth one of z:

        R = ε (K̃_z + ε I)⁻¹,    A = R K̃_(x,z) R,    B = R K̃_y R
        T = tr(A B) / n

    For x ⟂ y | z, n T is distributed as Σ_k λ_k χ²₁ with the eigenvalues λ_k of
    A ∘ B, the product of elements. `null="gamma"` fits a gamma distribution to
    the mean Σ_i A_ii B_ii and the variance 2 Σ_ij (A_ij B_ij)²;
    `null="spectral"` draws the sum:

        p = (1 + number of draws ≥ n T) / (1 + num_draws)

    Both are approximations for many samples. The regression must be able to
    remove the influence of z: with ten features in z and few samples it cannot,
    and p is too small.

    O(n³) time and several n × n matrices of float64: one second at n = 1000. ε
    is small against the eigenvalues of K̃_z, up to n, so that what is left of
    x and y has few digits in float32. Hence the algebra is LAPACK's; kernels
    are computed by the backend, in float64 where it has it (on JAX with
    `jax_enable_x64`).

    Args:
        x: `(n,)` or `(n, dim_x)`.
        y: `(n,)` or `(n, dim_y)`.
        z: `(n,)` or `(n, dim_z)`, what is known.
        kernel_x: A kernel, as in `hsic`. `None` is that of the paper's program,
            for features divided by their standard deviation: the standard
            Gaussian with σ² = w² · max(dim_x, dim_z), and w = 1.2 for n < 200,
            0.7 for n < 1200, else 0.4. Of strings it is `DeltaKernel()`.
        kernel_y: Likewise.
        kernel_z: Likewise. In the kernel of (x, z) the default one has twice
            its σ; one that is given is used for both.
        null: `"gamma"` or `"spectral"`.
        epsilon: Float > 0, ε, in units of the mean of K_z's diagonal, which is
            1 for a Gaussian.
        num_draws: Integer ≥ 1, of `"spectral"`.
        seed: Integer for the draws; the same seed gives the same p-value.
            `None` draws one, which `keras.utils.set_random_seed` decides.

    Returns:
        Named tuple `(statistic, p_value, null)`, T and in `null` the pair
        `(shape, scale)` or the draws, for T. If x or y is constant, 0 and
        p = 1; if z is constant or has no features, x and y are tested for
        independence.

    Raises:
        ValueError: on different n or none, on NaN or infinity, and on less than
            6 samples.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=200)
    >>> x, y = z + 0.5 * rng.normal(size=(2, 200))
    >>> hsic_test(x, y).p_value < 1e-6  # by z
    True
    >>> kci_test(x, y, z).p_value > 0.05
    True

    Departs from the paper:
        A variable with more features than z has a σ for as many; in the
        program σ² is w² · dim_z for all.

    Reference:
        [Zhang et al., 2011](https://arxiv.org/abs/1202.3775)
    """
    check_choice("null", null, NULLS)
    epsilon = check_number("epsilon", epsilon, above=0)
    num_draws = check_integer("num_draws", num_draws, minimum=1)
    seed = seed_of(seed)
    shapes = {
        name: tuple(np.shape(t)) for name, t in (("x", x), ("y", y), ("z", z))
    }
    received = ", ".join(f"{name}.shape={s}" for name, s in shapes.items())
    if not all(len(shape) in (1, 2) for shape in shapes.values()):
        raise ValueError(
            "Expected one sample set each, (n,) or (n, dim). Received: "
            f"{received}"
        )
    n = shapes["x"][0]
    if n < 6 or any(shape[0] != n for shape in shapes.values()):
        raise ValueError(
            "Expected at least 6 samples, as many of `x` as of `y` and `z`. "
            f"Received: {received}"
        )
    if shapes["z"][1:] == (0,):
        z = np.zeros(n)  # nothing is known
    dim = shapes["z"][1] if len(shapes["z"]) > 1 else 1
    of_z, _ = _matrix("z", z, kernel_z, dim, centered=True)
    smooth, scale_z = _matrix("z", z, kernel_z, dim, factor=2.0)
    of_x, scale_x = _matrix("x", x, kernel_x, dim)
    of_y, scale_y = _matrix("y", y, kernel_y, dim)
    nothing = (1.0, 0.0) if null == "gamma" else np.zeros(num_draws)
    if any(np.ptp(matrix) == 0 for matrix in (of_x, of_y)):
        return HSICTest(0.0, 1.0, nothing)
    ridge = epsilon * np.diagonal(of_z).mean()
    residual = _residual_maker(_centered(of_z), ridge)
    a = residual @ _centered(of_x * smooth) @ residual
    b = residual @ _centered(of_y) @ residual
    product = a * b
    total, mean = product.sum(), np.trace(product)
    if mean <= 0:  # of x or y nothing is left
        return HSICTest(0.0, 1.0, nothing)
    unit = scale_x * scale_y * scale_z / n
    statistic = float(total * unit)
    if null == "gamma":
        from scipy.special import gammaincc

        variance = 2 * np.square(product).sum()
        shape, scale = mean**2 / variance, variance / mean
        p_value = float(gammaincc(shape, max(total, 0) / scale))
        fitted = float(shape), float(scale * unit)
        return HSICTest(statistic, p_value, fitted)
    draws = _spectral_draws(product, num_draws, seed)
    return HSICTest(statistic, permutation_p_value(total, draws), draws * unit)


def _matrix(name, x, kernel, dim, factor=1.0, centered=False):
    """A kernel matrix in float64, to be multiplied by a scale, and the scale.

    Args:
        name: String.
        x: `(n,)` or `(n, dim)`.
        kernel: As the user gave it.
        dim: Integer. The number of features of z.
        factor: What the bandwidth of the default kernel is multiplied by.
        centered: Whether a linear kernel is about the data's centre.
    """
    if kernel is None and not is_categorical(x):
        x = columns(np.asarray(ops.convert_to_numpy(x) if _known(x) else x))
        x = known_numbers(name, x, None).astype("float64")
        n = len(x)
        x = in_deviations(x) * math.sqrt((n - 1) / n)
        width = 1.2 if n < 200 else 0.7 if n < 1200 else 0.4
        width *= factor * math.sqrt(max(x.shape[1], dim))
        kernel = GaussianKernel(width, form="standard")
    kernel = as_kernel(kernel, x)
    if not centered or isinstance(kernel, PrecomputedKernel):
        kernel = kernel.uncentered()
    # Float64 where the backend has it: on JAX only if it is switched on.
    dtype = float_dtype(np.zeros(()))
    (gram, _), _ = prepare(x, x, kernel, kernel, None, "biased", dtype)
    matrix = ops.convert_to_numpy(gram.matrix()).astype("float64")
    scale = 2.0**gram.exponent
    for part in gram.factors:
        scale *= float(part)
    return matrix + gram.kernel.left_out, scale


def _known(x):
    return ops.is_tensor(x) or isinstance(x, keras.Variable)


def _centered(matrix):
    matrix = matrix - matrix[:1]  # exactly 0 if it is constant
    matrix = matrix - matrix.mean(axis=0)
    matrix = matrix - matrix.mean(axis=1, keepdims=True)
    return (matrix + matrix.T) / 2


def _residual_maker(matrix, ridge):
    """R = ridge (matrix + ridge I)⁻¹, by a Cholesky factorization."""
    from scipy.linalg import cho_factor, cho_solve

    n = len(matrix)
    # The rounding errors of float32 kernels may make eigenvalues negative.
    least = 8 * np.finfo("float32").eps * math.sqrt(n)
    ridge = max(ridge, least * np.abs(np.diagonal(matrix)).mean(), 1e-300)
    factor = cho_factor(matrix + ridge * np.eye(n), lower=True)
    return ridge * cho_solve(factor, np.eye(n))


def _spectral_draws(product, count, seed):
    """Draws of Σ_k λ_k χ²₁ with the eigenvalues λ_k of a matrix."""
    values = np.linalg.eigvalsh((product + product.T) / 2)
    values = values[values > SMALL * values.max()]
    rng, draws = np.random.default_rng(seed), []
    chunk = max(1, DRAWS // len(values))
    for start in range(0, count, chunk):
        shape = min(chunk, count - start), len(values)
        draws.append(rng.chisquare(1, shape) @ values)
    return np.concatenate(draws)
