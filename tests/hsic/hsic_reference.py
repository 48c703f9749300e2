"""HSIC by the formulas of the papers, in float64, as the tests' reference."""

import numpy as np
from keras import ops
from kit import JAX

from blogkeras import backend
from blogkeras.hsic import GaussianKernel, LinearKernel

ESTIMATORS = ("biased", "blog", "unbiased")
LINEAR = LinearKernel()
BLOG = GaussianKernel(1.0, form="blog")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype("float32")
Y = (X[:, :2] ** 2 + 0.5 * RNG.normal(size=(40, 2))).astype("float32")
MASK = RNG.random(40) < 0.7


def value(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def quick(fn):
    """Compiles on JAX, where eager execution would compile each operation."""
    return backend.jit(fn) if JAX else fn


def definition(k, l, estimator):  # noqa: E741
    """The matrix formulas of the papers, in float64."""
    n = len(k)
    j, one = np.eye(n) - 1 / n, np.ones(n)
    if estimator != "unbiased":
        scale = {"biased": n, "blog": n - 1}[estimator]
        return np.trace(k @ j @ l @ j) / scale**2
    k, l = (m - np.diag(np.diag(m)) for m in (k, l))  # noqa: E741
    total = np.trace(k @ l)
    total += (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    total -= 2 * (one @ k @ l @ one) / (n - 2)
    return total / (n * (n - 3))


def distances(x):
    x = np.asarray(x, "float64")
    x = x[:, None] if x.ndim == 1 else x
    return np.sqrt(np.square(x[:, None] - x).sum(-1))


def gaussian(x, bandwidth):
    return np.exp(-(distances(x) ** 2) / (2 * bandwidth**2))


def median(x):
    d = distances(x)
    return np.median(d[np.triu_indices(len(d), 1)])


def default(x):
    """The kernel of `None`: exp(−d²/σ²), with the median distance σ."""
    return np.exp(-((distances(x) / median(x)) ** 2))


def posts_function(k, l):  # noqa: E741
    """The expression of the post's `hsic`: 1/n² … times n²/(n − 1)²."""
    n, product = len(k), k @ l
    h = np.trace(product) / n**2 + k.mean() * l.mean()
    return (h - 2 * product.mean() / n) * n**2 / (n - 1) ** 2


def central(fn, x, h=1e-5):
    """Central differences in float64."""
    x = np.asarray(x, "float64")
    slope = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        slope[i] = (fn(x + step) - fn(x - step)) / (2 * h)
    return slope
