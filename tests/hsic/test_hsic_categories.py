"""Strings and categories are labels by themselves: they are equal or not."""

import numpy as np
import pytest
from hsic_reference import LINEAR, value
from kit import slow_on_jax, tensorflow_only

from blogkeras.hsic import (
    DeltaKernel,
    GaussianKernel,
    HSICLoss,
    block_hsic,
    cka,
    dhsic,
    fourier_hsic,
    hsic,
    hsic_test,
    median_bandwidth,
    nhsic,
)

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 4, 60)
NAMES = np.array(["ant", "bee", "cat", "dog"])[CODES]
X = CODES % 2 + 0.5 * RNG.normal(size=60)
DELTA = DeltaKernel()


class Column:
    """A column of a table, as far as blogkeras looks at it."""

    def __init__(self, values, dtype):
        self.values, self.dtype = np.asarray(values), dtype

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)


STRINGS = {
    "array": NAMES,
    "list": NAMES.tolist(),
    "objects": NAMES.astype(object),
    "bytes": NAMES.astype("S"),
    "numerals": CODES.astype(str),
    "numerals as objects": CODES.astype(str).astype(object),
    "table": np.stack([NAMES, NAMES], axis=1),
    "categories": Column(NAMES.astype(object), "category"),
    # The numbers of categories are names, too.
    "numbered categories": Column(CODES * 7, "category"),
    "polars": Column(NAMES.astype(object), "Categorical(ordering='physical')"),
}


@pytest.mark.parametrize("name", STRINGS)
def test_strings_have_the_delta_kernel(name):
    expected = value(hsic(CODES, X, DELTA))
    assert expected > 0.01
    assert value(hsic(STRINGS[name], X)) == pytest.approx(expected, rel=1e-6)
    assert value(hsic(X, STRINGS[name])) == pytest.approx(expected, rel=1e-6)


@slow_on_jax
def test_measures_and_tests_take_strings():
    for function, options in (
        (cka, {}),
        (nhsic, {}),
        (block_hsic, {"block_size": 20}),
        (hsic, {"mask": CODES > 0}),
    ):
        found = value(function(NAMES, X, **options))
        expected = value(function(CODES, X, DELTA, **options))
        assert found == pytest.approx(expected, rel=1e-5), function
    for null in ("gamma", "permutation"):
        options = {"null": null, "num_permutations": 39, "seed": 0}
        found = hsic_test(NAMES, X, **options)
        expected = hsic_test(CODES, X, DELTA, **options)
        assert found[:2] == expected[:2]
        assert found.p_value < 0.05
    found = value(dhsic([NAMES, X, NAMES]))
    expected = value(dhsic([CODES, X, CODES], [DELTA, None, DELTA]))
    assert found == pytest.approx(expected, rel=1e-6)
    found = value(HSICLoss()(NAMES[:, None], X[:, None].astype("f4")))
    assert found == pytest.approx(value(hsic(CODES, X, DELTA)), rel=1e-4)


def test_integers_are_numbers_unless_a_kernel_says_labels():
    numbers = value(hsic(CODES, X))
    assert numbers == pytest.approx(value(hsic(CODES.astype("f8"), X)), 1e-6)
    assert numbers != pytest.approx(value(hsic(NAMES, X)), rel=0.05)


def test_what_is_neither_numbers_nor_strings():
    """A missing value is a label only if the kernel says so."""
    missing = NAMES.astype(object)
    missing[3] = None
    with pytest.raises(ValueError, match=r"missing ones .* Received: x of"):
        hsic(missing, X)
    other = NAMES.copy()
    other[3] = "eel"
    expected = value(hsic(other, X))
    assert value(hsic(missing, X, DELTA)) == pytest.approx(expected, rel=1e-6)
    mixed = np.array([*NAMES[:30], *X[30:]], object)
    with pytest.raises(ValueError, match=r"Expected numbers in `y`"):
        hsic(X, mixed)


def test_lists_are_no_labels():
    lists = np.empty(len(X), object)
    lists[:] = [[code] for code in CODES]
    with pytest.raises(ValueError, match=r"Expected labels such as strings"):
        hsic(lists, X, DELTA)


def test_strings_are_no_numbers():
    """Numerals are not, either: they are not read silently."""
    gaussian = GaussianKernel(form="blog")
    for strings in (NAMES, CODES.astype(str), CODES.astype(str).astype(object)):
        for kernel in (gaussian, LINEAR, lambda a, b: a @ b.T):
            with pytest.raises(ValueError, match="Expected numbers in `x`"):
                hsic(strings, X, kernel)
        with pytest.raises(ValueError, match="Expected numbers in `x`"):
            median_bandwidth(strings)
    with pytest.raises(ValueError, match="one-hot"):
        fourier_hsic(NAMES, X)
    # What holds numbers as objects is numbers.
    objects = X.astype(object)
    assert value(hsic(objects, X)) == pytest.approx(value(hsic(X, X)), rel=1e-6)


@tensorflow_only
def test_tensors_of_strings():
    import tensorflow as tf

    expected = value(hsic(CODES, X, DELTA))
    for kernel in (None, DELTA):
        found = value(hsic(tf.constant(NAMES), X, kernel))
        assert found == pytest.approx(expected, rel=1e-6)
    found = value(hsic(tf.constant(NAMES), X, mask=CODES > 0))
    assert found == pytest.approx(value(hsic(NAMES, X, mask=CODES > 0)), 1e-6)


@tensorflow_only
@pytest.mark.verify
def test_tensors_of_strings_in_a_compiled_function():
    import tensorflow as tf

    found = tf.function(hsic)(tf.constant(NAMES), tf.constant(X, "float32"))
    expected = value(hsic(CODES, X, DELTA))
    assert value(found) == pytest.approx(expected, rel=1e-4)


def test_missing_values_are_one_label():
    """NaN is no object's equal, and breaks the order of the others."""
    nan = float("nan")
    for values in (
        [3, nan, 1, 3, 2, 1],
        ["b", nan, "a", "b", None, "a"],
        [True, nan, "a", True, 2, "a"],
    ):
        # Each NaN is an object of its own, as after a file was read.
        values = [float("nan") if v != v else v for v in values * 10]
        names = [
            "missing" if v is None or v != v else f"is {v}" for v in values
        ]
        found = value(hsic(np.array(values, object), X, DELTA))
        assert found == pytest.approx(value(hsic(names, X)), rel=1e-6)


class Column:
    """As a column of pandas: categories of numbers, of which some miss."""

    dtype = "category"

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


def test_categories_of_numbers_may_miss():
    values = np.where(CODES == 1, np.nan, CODES)
    for kernel in (None, DELTA):
        found = value(hsic(Column(values), X, kernel))
        assert found == pytest.approx(value(hsic(CODES, X, DELTA)), rel=1e-6)
