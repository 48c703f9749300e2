"""Numbers that lose their digits: outliers, offsets, scales, large integers.

What is right is computed in NumPy's float64, by differences.
"""

import datetime

import keras
import numpy as np
import pytest
from hsic_reference import definition, median, value
from keras import ops
from kit import slow_on_jax

from blogkeras import backend
from blogkeras.hsic import (
    CKA,
    CosineKernel,
    DeltaKernel,
    GaussianKernel,
    HSICLoss,
    HSICRegularization,
    LaplacianKernel,
    LinearKernel,
    PrecomputedKernel,
    block_hsic,
    cka,
    compare_layers,
    fourier_hsic,
    hsic,
    hsic_from_kernels,
    hsic_test,
    median_bandwidth,
    nhsic,
)

LINEAR = LinearKernel()


def exact(x):
    """The kernel of `None` in float64, the median of all pairs by sorting."""
    x = np.asarray(x, "float64")
    x = x[:, None] if x.ndim == 1 else x
    squares = np.square(x[:, None] - x).sum(-1)
    i, j = np.triu_indices(len(x), 1)
    return np.exp(-squares / np.median(np.sqrt(squares[i, j])) ** 2)


def dependent(dim=2, n=200):
    rng = np.random.default_rng(dim)
    x = rng.normal(size=(n, dim))
    return x, x + 0.1 * rng.normal(size=x.shape)


def seconds():
    """Times of day in Unix seconds, sorted: y is x without the offset."""
    t = 1.7e9 + np.sort(np.random.default_rng(0).uniform(0, 60, 100))
    return t, t - 1.7e9


# Outliers


@pytest.mark.parametrize("place", ["first", "some", "of y"])
@pytest.mark.parametrize("dim", [2, 12])
def test_outliers_do_not_own_the_bandwidth(dim, place):
    for size in (3e4, 1e12, 1e30):
        x, y = dependent(dim)
        if place == "first":
            x[0] += size
        elif place == "some":
            x[[3, 50, 51]] += size
        else:
            y[-1] += size
        expected = definition(exact(x), exact(y), "biased")
        assert median_bandwidth(x) == pytest.approx(median(x), rel=1e-6)
        assert value(hsic(x, y)) == pytest.approx(expected, rel=1e-4)
        if size < 1e12:  # float32 numbers, eager and in a step
            x, y = (np.asarray(a, "float32") for a in (x, y))
            expected = definition(exact(x), exact(y), "biased")
            assert value(hsic(x, y)) == pytest.approx(expected, rel=1e-4)
            tensors = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
            assert value(hsic(*tensors)) == pytest.approx(expected, rel=1e-4)


def test_outliers_in_a_step():
    """Of 100 samples, so that the median of a step is that of all pairs."""
    fn = backend.jit(lambda x, y: hsic(x, y))
    for size in (1e4, 1e6):
        x, y = (a.astype("float32") for a in dependent(12, 100))
        x[[0, 70]] += np.float32(size)
        expected = definition(exact(x), exact(y), "biased")
        assert value(fn(x, y)) == pytest.approx(expected, rel=1e-3)


def test_an_outlier_beyond_the_range_of_float32():
    x, y = dependent()
    x[7] = 1e100  # whose square is one of float64
    expected = definition(exact(x), exact(y), "biased")
    x[7] = 1e300
    assert value(hsic(x, y)) == pytest.approx(expected, rel=1e-4)


# Offsets


def test_unix_seconds():
    t, y = seconds()
    right = hsic_test(y, y).p_value
    assert right < 1e-15
    for x in (t, list(t), t[:, None]):
        assert hsic_test(x, y).p_value == pytest.approx(right, rel=1e-2)
        assert hsic_test(y, x).p_value == pytest.approx(right, rel=1e-2)
    whole = np.arange(100)
    right = hsic_test(whole, whole).p_value
    for dtype in ("int64", "int32", "uint32"):
        x = (whole + 1_700_000_000).astype(dtype)
        assert hsic_test(x, whole).p_value == pytest.approx(right, rel=1e-4)
    for null in ("gamma", "permutation"):
        assert hsic_test(t, y, null=null, seed=0).p_value < 0.01
    for approximation in ("block", "fourier"):
        found = hsic_test(
            t, y, approximation=approximation, size=20, seed=0
        ).p_value
        expected = hsic_test(
            y, y, approximation=approximation, size=20, seed=0
        ).p_value
        assert found == pytest.approx(expected, rel=0.1, abs=1e-12)


FUNCTIONS = {
    "hsic": hsic,
    "cka": cka,
    "linear cka": lambda x, y: cka(x, y, LINEAR, LINEAR),
    "cka unbiased": lambda x, y: cka(x, y, LINEAR, LINEAR, "unbiased"),
    "nhsic": nhsic,
    "block_hsic": lambda x, y: block_hsic(x, y, block_size=20),
    "fourier_hsic": lambda x, y: fourier_hsic(x, y, seed=0),
    "masked": lambda x, y: hsic(x, y, mask=np.arange(100) > 30),
    "fixed": lambda x, y: hsic(
        x, y, GaussianKernel(9.0, form="standard"), LaplacianKernel(5.0)
    ),
    "HSICLoss": lambda x, y: HSICLoss()(x, y),
}


@slow_on_jax
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_origin_does_not_matter_to(name):
    fn = FUNCTIONS[name]
    t, y = seconds()
    y = np.stack([y, np.cos(y)], axis=1)
    right = value(fn(t - 1.7e9, y))
    assert right > 1e-3
    assert value(fn(t, y + 1e9)) == pytest.approx(right, rel=1e-3)


def test_integers_of_64_bits():
    """Beyond 2**53 not even float64 has them all."""
    steps = np.arange(100)
    right = value(hsic(steps, steps))
    for offset in (2**62, -(2**62)):
        x = (steps + offset).astype("int64")
        assert value(hsic(x, steps)) == pytest.approx(right, rel=1e-5)
    x = steps.astype("uint64") + np.uint64(2**63)
    assert value(hsic(x, steps)) == pytest.approx(right, rel=1e-5)
    # Integer tensors are subtracted as integers.
    x = ops.convert_to_tensor((steps + 1_700_000_000).astype("int32"))
    assert value(hsic(x, steps)) == pytest.approx(right, rel=1e-5)
    assert value(backend.jit(hsic)(x, steps)) == pytest.approx(right, rel=1e-3)


def test_the_metric_and_the_layers():
    t, y = seconds()
    metric = CKA()
    metric.update_state(t[:, None], y[:, None])
    assert float(metric.result()) == pytest.approx(1, abs=1e-5)
    layer = HSICRegularization(1.0)
    ids = ops.convert_to_tensor((1_700_000_000 + np.arange(40)).astype("int32"))
    x = np.arange(40, dtype="float32")[:, None]
    layer([x, ids[:, None]])
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(value(hsic(x, x)), rel=1e-4)


def test_compare_layers_of_large_activations():
    """The same features with an offset, as a bias gives them."""
    inputs = keras.Input((3,))
    features = keras.layers.Dense(4, name="features")(inputs)
    shifted = keras.layers.Rescaling(1.0, 1e3, name="shifted")(features)
    model = keras.Model(inputs, shifted)
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    found = compare_layers(model, model, x)
    np.testing.assert_allclose(found.matrix, 1, atol=1e-4)


# Scales


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e300])
def test_units_do_not_matter(scale):
    x, y = dependent(2, 60)
    for kernels in ((), (LINEAR, LINEAR), (CosineKernel(), None)):
        right = hsic_test(x, y, *kernels).p_value
        found = hsic_test(x * scale, y, *kernels).p_value
        assert found == pytest.approx(right, rel=1e-2)
        found = hsic_test(x, y * scale, *kernels).p_value
        assert found == pytest.approx(right, rel=1e-2)
        right = value(cka(x, y, *kernels))
        found = value(cka(x * scale, y / scale, *kernels))
        assert found == pytest.approx(right, rel=1e-4)
    assert value(hsic(x * scale, y)) == pytest.approx(value(hsic(x, y)), 1e-4)
    assert median_bandwidth(x * scale) == pytest.approx(
        scale * median(x), rel=1e-9
    )


def test_units_of_linear_and_precomputed_kernels():
    x, y = dependent(2, 60)
    right = value(hsic(x, y, LINEAR, LINEAR))
    found = value(hsic(x * 1e25, y / 1e25, LINEAR, LINEAR))
    assert found == pytest.approx(right, rel=1e-5)
    tensors = [
        ops.convert_to_tensor(a.astype("float32")) for a in (x * 1e25, y / 1e25)
    ]
    found = value(hsic(*tensors, LINEAR, LINEAR))
    assert found == pytest.approx(right, rel=1e-5)
    assert value(cka(*tensors, LINEAR, LINEAR)) == pytest.approx(
        value(cka(x, y, LINEAR, LINEAR)), rel=1e-5
    )
    k, l = x @ x.T, y @ y.T  # noqa: E741
    found = value(hsic_from_kernels(k * 1e50, l / 1e50))
    assert found == pytest.approx(right, rel=1e-5)
    found = value(hsic_from_kernels(k + 1e7, l))
    assert found == pytest.approx(right, rel=1e-5)
    given = PrecomputedKernel()
    for null in ("gamma", "permutation"):
        settings = {"null": null, "seed": 0}
        found = hsic_test(k * 1e200, l, given, given, **settings)
        right = hsic_test(k, l, given, given, **settings)
        assert found.p_value == pytest.approx(right.p_value, rel=1e-3)
        assert found.statistic == pytest.approx(1e200 * right.statistic, 1e-3)


def test_a_kernel_that_is_nearly_constant():
    """exp(−d²/σ²) with σ = 10⁴: of a linear kernel but for a factor."""
    x, y = dependent(1, 60)
    wide = GaussianKernel(1e4, form="standard")
    linear = hsic_test(x, y, LINEAR, LINEAR)
    found = hsic_test(x, y, wide, wide)
    assert found.p_value == pytest.approx(linear.p_value, rel=1e-2)
    found = hsic_test(x, y, wide, wide, null="permutation", seed=0)
    assert found.p_value == pytest.approx(1 / 501)
    assert value(cka(x, y, wide, wide)) == pytest.approx(
        value(cka(x, y, LINEAR, LINEAR)), rel=1e-4
    )
    steep = GaussianKernel(1e-30, form="blog")
    assert value(hsic(x, y, steep, steep)) == pytest.approx(
        definition(np.eye(60), np.eye(60), "biased"), rel=1e-5
    )


def test_small_angles():
    """Directions within 10⁻⁵ of each other, and all of them equal."""
    rng = np.random.default_rng(0)
    x = 1 + 1e-5 * rng.normal(size=(60, 3))
    u = x / np.sqrt(np.square(x).sum(-1, keepdims=True))
    u -= u.mean(0)
    cosine = CosineKernel()
    found = value(cka(x, u, cosine, LINEAR))
    assert found == pytest.approx(1, rel=1e-4)
    same = rng.uniform(1, 2, (60, 1)) * np.array([0.1, 0.2, 0.3])
    for some in (same, same.astype("float32")):
        assert hsic_test(some, u, cosine).p_value == 1
        assert value(hsic(ops.convert_to_tensor(some), u, cosine)) == 0


@pytest.mark.parametrize("null", ["gamma", "permutation"])
def test_constant_columns(null):
    x, y = dependent(3, 60)
    for constant in (0.1, 1.7e9 + 0.1, 1e300):
        some = x.copy()
        some[:, 1] = constant
        right = hsic_test(x[:, [0, 2]], y, null=null, seed=0).p_value
        found = hsic_test(some, y, null=null, seed=0).p_value
        assert found == pytest.approx(right, rel=1e-3)
        alone = np.full(60, constant)
        for kernel in (None, LINEAR, CosineKernel()):
            found = hsic_test(alone, y, kernel, null=null, seed=0)
            assert found.p_value == 1
            assert found.statistic == 0
            assert value(cka(alone, y, kernel)) == 0


# Labels


def test_labels_are_compared_as_they_are():
    labels = np.random.default_rng(0).integers(0, 4, 100)
    delta = DeltaKernel()
    right = hsic_test(labels, labels, delta, delta).p_value
    assert right < 1e-25
    table = value(hsic(labels, labels, delta, delta))
    names = np.array(["ant", "bee", "cat", "dog"])[labels]
    pairs = np.stack([names, np.roll(names, 1)], axis=1)
    for x in (
        labels + 1_700_000_000,
        (labels + 2**62).astype("int64"),
        labels + 1.7e9,
        labels * 1e-40,
        names,
        list(names),
        names.astype(object),
        np.array([None, "bee", 3, (4,)], object)[labels],  # no order
        labels == 2,
    ):
        found = hsic_test(x, x, delta, delta).p_value
        if np.asarray(x).dtype != bool:
            assert found == pytest.approx(right, rel=1e-3)
            assert value(hsic(x, labels, delta, delta)) == pytest.approx(table)
        assert found < 1e-10
    assert value(hsic(pairs, names, delta, delta)) > 0
    matrix = value(delta(["a", "b"], ["b", "b", "a"]))
    np.testing.assert_array_equal(matrix, [[0, 0, 1], [1, 1, 0]])
    # As integers in a compiled step, too, and in the loss.
    ids = (labels + 1_700_000_000).astype("int32")
    found = backend.jit(lambda a, b: hsic(a, b, delta, delta))(ids, labels)
    assert value(found) == pytest.approx(table, rel=1e-5)
    loss = HSICLoss(delta, delta)
    assert value(loss(ids[:, None], labels[:, None])) == pytest.approx(table)


@pytest.mark.parametrize("place", [0, 3])
def test_masked_labels_have_no_influence(place):
    labels = np.random.default_rng(0).integers(0, 3, (20, 2)).astype("f8")
    mask = np.arange(20) != place
    delta = DeltaKernel()
    expected = value(hsic(labels[mask], labels[mask], delta, delta))
    labels[place] = np.nan
    found = hsic(labels, labels, delta, delta, mask=mask)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)
    assert value(hsic(labels, labels, delta, delta, mask=0 * mask)) == 0
    with pytest.raises(ValueError, match="finite numbers in `x`"):
        hsic(labels, labels, delta, delta, mask=mask | True)


def test_what_is_no_number_is_refused():
    x = np.arange(10.0)
    with pytest.raises(ValueError, match="Expected numbers in `x`; for labels"):
        hsic(np.array(list("abcdefghij")), x, LINEAR)
    with pytest.raises(ValueError, match="Expected numbers in `y`"):
        hsic(x, x + 1j)
    with pytest.raises(ValueError, match="Received: shape \\(\\)"):
        hsic(3.0, x)
    with pytest.raises(ValueError, match="Expected finite numbers in `y`"):
        hsic(x, np.where(x > 3, np.nan, x), None, DeltaKernel())


def test_missing_dates_are_no_numbers():
    """NumPy gives NaT the number −2⁶³."""
    dates = np.datetime64("2020-01-01") + np.arange(20) * np.arange(20)
    for times in (dates.astype("M8[ns]"), dates - dates[0]):
        numbers = times.astype("int64").astype("float64")
        assert float(hsic(times, numbers)) == float(hsic(numbers, numbers))
        times[3] = "NaT"
        with pytest.raises(ValueError, match="Expected finite numbers in `x`"):
            hsic(times, numbers)


def test_dates_with_a_time_zone():
    """They are objects in an array: Python's, and those of pandas."""
    zone = datetime.timezone(datetime.timedelta(hours=8))
    start = datetime.datetime(2020, 1, 1, tzinfo=zone)
    days = np.arange(20) * np.arange(20)
    dates = [start + datetime.timedelta(days=int(k)) for k in days]
    plain = [date.replace(tzinfo=None) for date in dates]
    expected = float(hsic(days, days))
    for times in (dates, plain):
        found = float(hsic(np.array(times, object), days))
        assert found == pytest.approx(expected, rel=1e-5)


# Memory


def test_wide_features():
    """64 × 100,352, as from convolutions: no pair is sampled twice."""
    import tracemalloc

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 100_352)).astype("float32")
    tracemalloc.start()
    found = median_bandwidth(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * x.nbytes
    gram = x.astype("float64") @ x.T.astype("float64")
    squares = np.diag(gram)[:, None] + np.diag(gram) - 2 * gram
    i, j = np.triu_indices(64, 1)
    assert found == pytest.approx(np.median(np.sqrt(squares[i, j])), rel=1e-6)
    assert value(cka(x, x)) == pytest.approx(1, rel=1e-5)


# Arguments

NUMBERS = np.arange(9.0)
REFUSED = {
    "bandwidth": lambda v: GaussianKernel(v, form="blog"),
    "epsilon": lambda v: nhsic(NUMBERS, NUMBERS, epsilon=v),
    "rate": HSICRegularization,
    "block_size": lambda v: block_hsic(NUMBERS, NUMBERS, block_size=v),
    "num_features": lambda v: fourier_hsic(NUMBERS, NUMBERS, num_features=v),
    "num_permutations": lambda v: hsic_test(
        NUMBERS, NUMBERS, num_permutations=v
    ),
    "size": lambda v: hsic_test(
        NUMBERS, NUMBERS, approximation="block", size=v
    ),
    "maximize": lambda v: HSICLoss(maximize=v),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments(name):
    for bad in (np.inf, np.nan, "4", [4]):
        with pytest.raises(ValueError, match=f"Received: {name}="):
            REFUSED[name](bad)
    if name != "maximize":
        with pytest.raises(ValueError, match=f"Received: {name}=True"):
            REFUSED[name](True)
    if "num" in name or "size" in name:
        with pytest.raises(ValueError, match=f"Received: {name}=4.5"):
            REFUSED[name](4.5)
    with pytest.raises(ValueError, match="weights of at least 0"):
        hsic(NUMBERS, NUMBERS, mask=-NUMBERS)
