"""What properties are tried on: contents that break careless arithmetic.

Contents come from a kind and a seed, both drawn, so that an array of any size
costs one draw. Shapes come from a few fixed ones: each new shape is a new
program for XLA.
"""

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

FLOATS = ("float32", "float64", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")
INTEGERS = ("int32", "int64", "uint8")
KINDS = (
    "normal",
    "zeros",
    "ones",
    "constant",
    "equal rows",
    "equal columns",
    "few values",
    "sparse",
    "mixed scales",
    "mixed rows",
    "far from zero",
    "huge",
    "tiny",
    "one outlier",
    "collinear",
    "alternating",
)
SEEDS = st.integers(0, 2**20)


def contents(kind, seed, shape, largest=1e30):
    """An array of float64 of a kind, with entries up to `largest`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    rows = rng.normal(size=shape[-1:])
    small = min(1e-30, 1 / largest)
    match kind:
        case "zeros":
            x = np.zeros(shape)
        case "ones":
            x = np.ones(shape)
        case "constant":
            x = np.full(shape, rng.choice([-3.7, 0.1, largest, small]))
        case "equal rows":
            x = np.broadcast_to(rows, shape).copy()
        case "equal columns":
            x = np.broadcast_to(x[..., :1], shape).copy()
        case "few values":
            x = rng.integers(-1, 2, shape).astype("float64")
        case "sparse":
            x = x * (rng.random(shape) < 0.2)
        case "mixed scales":
            exponents = rng.uniform(np.log10(small), np.log10(largest), shape)
            x = np.sign(x) * 10.0**exponents
        case "mixed rows":
            exponents = rng.uniform(
                np.log10(small), np.log10(largest), (*shape[:-1], 1)
            )
            x = np.tanh(x) * 10.0**exponents
        case "far from zero":
            x = min(1e6, largest) + x
        case "huge":
            x = np.tanh(x) * largest
        case "tiny":
            x = x * small
        case "one outlier":
            x.reshape(-1)[:1] = largest
        case "collinear":
            x = x[..., :1] * rows
        case "alternating":
            x = np.resize([1.0, -1.0], shape)
    return np.clip(x, -largest, largest)


def as_dtype(x, dtype):
    """The array in a dtype, with entries in its range."""
    if "int" in dtype:
        limits = np.iinfo(dtype)
        low, high = max(limits.min, -(2**30)), min(limits.max, 2**30)
        return np.clip(np.round(x), low, high).astype(dtype)
    limit = float(ml_dtypes.finfo(dtype).max) if dtype != "float64" else np.inf
    x = np.clip(x.astype("float64"), -limit, limit)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@st.composite
def arrays(draw, shape, largest=1e30, dtypes=("float32",), kinds=KINDS):
    """An array of a shape, which may be a strategy."""
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    kind, seed = draw(st.sampled_from(kinds)), draw(SEEDS)
    dtype = draw(st.sampled_from(dtypes))
    return as_dtype(contents(kind, seed, shape, largest), dtype)


@st.composite
def stacks(draw, count, shape, largest=1e30, dtypes=("float32",)):
    """`count` cases in one array `(count, *shape)`, each of its own kind."""
    seed, dtype = draw(SEEDS), draw(st.sampled_from(dtypes))
    order = np.random.default_rng(seed).permutation(len(KINDS))
    parts = [
        contents(KINDS[order[k % len(KINDS)]], seed + k, shape, largest)
        for k in range(count)
    ]
    return as_dtype(np.stack(parts), dtype)


def mask_of(kind, seed, shape):
    """A boolean array: all true, all false, a prefix of each row, or any."""
    rng = np.random.default_rng(seed)
    match kind:
        case "all":
            return np.ones(shape, bool)
        case "none":
            return np.zeros(shape, bool)
        case "ragged":
            lengths = rng.integers(0, shape[-1] + 1, (*shape[:-1], 1))
            return np.arange(shape[-1]) < lengths
    return rng.random(shape) < 0.5


@st.composite
def masks(draw, shape):
    """A mask of a shape."""
    kind = draw(st.sampled_from(["any", "all", "none", "ragged"]))
    return mask_of(kind, draw(SEEDS), shape)


@st.composite
def distributions(draw, shape):
    """Rows that are nonnegative and sum to 1, many of them with zeros."""
    seed = draw(SEEDS)
    kind = draw(st.sampled_from(["any", "uniform", "point", "skewed"]))
    rng = np.random.default_rng(seed)
    match kind:
        case "uniform":
            p = np.ones(shape)
        case "point":
            p = np.zeros(shape)
            p[..., rng.integers(shape[-1])] = 1
        case "skewed":
            p = 10.0 ** rng.uniform(-12, 0, shape)
        case _:
            p = rng.random(shape) * (rng.random(shape) < 0.7)
            p[..., 0] += 1e-3
    return p / p.sum(-1, keepdims=True)


def number(x, dtype="float64"):
    """A NumPy array of float64 of anything, asserted to be finite."""
    array = np.asarray(keras.ops.convert_to_numpy(x)).astype(dtype)
    assert np.isfinite(array).all(), array
    return array


def close(actual, expected, tolerance, scale=1.0):
    """Asserts that finite numbers differ by at most `tolerance · scale`."""
    actual, expected = number(actual), number(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = np.abs(actual - expected)
    assert np.all(error <= tolerance * scale), (actual, expected)


def refuses():
    """Asserts a `ValueError` with the wording of blogkeras."""
    return pytest.raises(ValueError, match=r"(?s)Expected.*Received")
