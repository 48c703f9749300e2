"""The p-value: null distributions, invariances, level and power (post 6910)."""

import keras
import numpy as np
import pytest
import scipy.stats
from hsic_reference import (
    LINEAR,
    default,
    definition,
    distances,
    gaussian,
    median,
    value,
)
from keras import ops

from blogkeras.hsic import (
    CosineKernel,
    DeltaKernel,
    GaussianKernel,
    HSICLasso,
    LinearKernel,
    PolynomialKernel,
    PrecomputedKernel,
    block_hsic,
    dhsic_test,
    fourier_hsic,
    hsic_test,
    kci_test,
)
from blogkeras.hsic.fourier import covariances

RNG = np.random.default_rng(1)
X = RNG.normal(size=(60, 2))
Y = np.sin(2 * X[:, 0]) + 1.3 * RNG.normal(size=60)


def centered(k):
    j = np.eye(len(k)) - 1 / len(k)
    return j @ k @ j


def grettons_test(k, l):  # noqa: E741
    """HSIC and p of Gretton et al. 2007, for kernels with K(x, x) = 1."""
    n = len(k)
    statistic = np.sum(centered(k) * centered(l)) / n
    v = (centered(k) * centered(l) / 6) ** 2
    v = (v.sum() - np.trace(v)) / n / (n - 1)
    v *= 72 * (n - 4) * (n - 5) / n / (n - 1) / (n - 2) / (n - 3)
    mu_x, mu_y = ((m.sum() - n) / n / (n - 1) for m in (k, l))
    m = (1 + mu_x * mu_y - mu_x - mu_y) / n
    shape, scale = m**2 / v, v * n / m
    return statistic / n, scipy.stats.gamma.sf(statistic, shape, scale=scale)


def test_gamma():
    k, l = default(X), default(Y)  # noqa: E741
    statistic, p_value = grettons_test(k, l)
    found = hsic_test(X, Y)
    assert found.statistic == pytest.approx(statistic, rel=1e-4)
    assert found.p_value == pytest.approx(p_value, rel=1e-3)
    assert 1e-4 < p_value < 0.05
    shape, scale = found.null
    # The mean over all permutations is that of the gamma distribution.
    draws = [
        np.mean(centered(k) * l[order][:, order])
        for order in (RNG.permutation(60) for _ in range(2000))
    ]
    assert shape * scale == pytest.approx(np.mean(draws), rel=0.05)
    assert shape**0.5 * scale == pytest.approx(np.std(draws), rel=0.15)
    # Kernels that are functions run uncompiled.
    both = [GaussianKernel(median(t), form="blog") for t in (X, Y)]
    own = hsic_test(X, Y, lambda a, b: both[0](a, b), both[1])
    assert own.p_value == pytest.approx(p_value, rel=1e-3)
    square = PrecomputedKernel()
    own = hsic_test(k, l, square, square)
    assert own.p_value == pytest.approx(p_value, rel=1e-3)


def gamma_test(k, l):  # noqa: E741
    """Statistic, p and null of matrices in float64, whatever their size."""
    n = len(k)
    off = ~np.eye(n, dtype=bool)
    unit = np.prod([np.diag(m).mean() - m[off].mean() for m in (k, l)])
    product = centered(k) * centered(l) / unit
    variance = 2 * (n - 4) * (n - 5) / n / (n - 1) / (n - 2) / (n - 3)
    variance *= np.mean(product[off] ** 2)
    shape, scale = 1 / n**2 / variance, variance * n
    p_value = scipy.stats.gamma.sf(product.mean(), shape, scale=scale)
    return product.mean() * unit, p_value, (shape, scale * unit)


@pytest.mark.parametrize("case", ["large", "small", "larger", "smaller"])
def test_kernels_of_any_size(case):
    """Squares of K L are beyond float32, or K L is already."""
    x, y = X.astype("f4"), Y.astype("f4")[:, None]
    if "large" in case:
        factor = np.float32(200 if case == "large" else 2e5)
        x, y = factor * x, factor * y
        kernel, wide = PolynomialKernel(2), np.float64
        k, l = ((wide(t) @ wide(t).T + 1) ** 2 for t in (x, y))  # noqa: E741
    else:
        factor = 1e8 if case == "small" else 1e12
        kernel = GaussianKernel(factor, form="standard")
        # Less 1, which in float64 would be all that is left of it.
        k, l = (  # noqa: E741
            np.expm1(-(distances(np.float64(t)) ** 2) / 2 / factor**2)
            for t in (x, y)
        )
    statistic, p_value, null = gamma_test(k, l)
    found = hsic_test(x, y, kernel, kernel)
    assert found.statistic == pytest.approx(statistic, rel=1e-3)
    assert found.p_value == pytest.approx(p_value, rel=1e-2)
    np.testing.assert_allclose(found.null, null, rtol=1e-3)
    settings = {"null": "permutation", "num_permutations": 20, "seed": 0}
    found = hsic_test(x, y, kernel, kernel, **settings)
    assert found.statistic == pytest.approx(statistic, rel=1e-3)
    orders = np.random.default_rng(0)
    expected = [
        np.mean(centered(k) * l[order][:, order])
        for order in (orders.permutation(60) for _ in range(20))
    ]
    np.testing.assert_allclose(found.null, expected, rtol=1e-2)


def test_wide_kernels_of_fourier_features():
    """The smaller it is, the more a centered Gaussian is a linear kernel."""
    kernel = GaussianKernel(1e8, form="blog")
    settings = {"approximation": "fourier", "size": 2048, "seed": 0}
    found = hsic_test(X, Y, kernel, kernel, **settings)
    linear = hsic_test(X, Y, LINEAR, LINEAR)
    assert np.log(found.p_value) == pytest.approx(
        np.log(linear.p_value), rel=0.2
    )


def test_permutations():
    k, l = default(X), default(Y)  # noqa: E741
    orders = np.random.default_rng(3)
    expected = [
        np.mean(centered(k) * l[order][:, order])
        for order in (orders.permutation(60) for _ in range(70))
    ]
    found = hsic_test(X, Y, null="permutation", num_permutations=70, seed=3)
    np.testing.assert_allclose(found.null, expected, rtol=1e-3, atol=1e-6)
    assert found.statistic == pytest.approx(
        definition(k, l, "biased"), rel=1e-4
    )
    extreme = np.sum(np.array(expected) >= found.statistic)
    assert found.p_value == (1 + extreme) / 71
    again = hsic_test(X, Y, null="permutation", num_permutations=70, seed=3)
    assert again.p_value == found.p_value
    np.testing.assert_array_equal(again.null, found.null)
    other = hsic_test(X, Y, null="permutation", num_permutations=70, seed=4)
    assert not np.array_equal(other.null, found.null)
    free = hsic_test(X, Y, null="permutation", num_permutations=70)
    assert not np.array_equal(free.null, found.null)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: hsic_test(X, Y, null="permutation", num_permutations=5).null,
        lambda: dhsic_test([X, Y], num_permutations=5).null,
        lambda: kci_test(X, Y, X[:, 1], null="spectral", num_draws=5).null,
        lambda: (
            HSICLasso(1, block_size=10, num_shuffles=1).fit(X, Y).relevance_
        ),
    ],
    ids=["hsic_test", "dhsic_test", "kci_test", "HSICLasso"],
)
def test_keras_seeds_what_has_no_seed(draw):
    found = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        found.append([draw(), draw()])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(*found[0])


def test_equal_draws_count():
    """Two labels, all pairs: of the 6 tables of 4 samples, 2 are as extreme."""
    a = np.array([0, 0, 1, 1])
    delta = DeltaKernel()
    found = hsic_test(
        *(a, a, delta, delta, "permutation"), num_permutations=300, seed=0
    )
    assert found.statistic == pytest.approx(0.25)
    assert found.p_value == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize("null", ["gamma", "permutation"])
def test_units_do_not_matter(null):
    settings = {"null": null, "num_permutations": 70, "seed": 0}
    p_value = hsic_test(X, Y, **settings).p_value
    for factor in (1e3, 1e-3):
        scaled = hsic_test(X, factor * Y, **settings).p_value
        assert abs(scaled - p_value) <= 1e-3
        moved = hsic_test(X * factor + 1, Y - 10, **settings).p_value
        assert abs(moved - p_value) <= 1e-3


def test_blocks():
    found = hsic_test(X, Y, approximation="block", size=10)
    blocks = [
        definition(
            default(X)[i : i + 10, i : i + 10],
            default(Y)[i : i + 10, i : i + 10],
            "unbiased",
        )
        for i in range(0, 60, 10)
    ]
    np.testing.assert_allclose(found.null, blocks, rtol=1e-3, atol=1e-6)
    expected = scipy.stats.ttest_1samp(blocks, 0, alternative="greater")
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-3)
    assert found.statistic == pytest.approx(np.mean(blocks), rel=1e-3)
    kernel = GaussianKernel(median(X), form="blog")
    own = hsic_test(
        *(X, Y, lambda a, b: ops.reshape(kernel(a, b), [10, 10])),
        approximation="block",
        size=10,
    )
    np.testing.assert_allclose(own.null, blocks, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("cosine", [False, True])
def test_blocks_of_kernels_with_features(cosine, estimator):
    """A mean that drifts differs from block to block."""
    drift = np.repeat(np.arange(3.0), 20)[:, None]
    x, y = X + 3 * drift, Y[:, None] + 3 * drift
    x, y = np.c_[x, np.ones(60)], np.c_[y, np.ones(60)]
    kernel = CosineKernel() if cosine else LinearKernel()

    def gram(x):
        x = x / np.linalg.norm(x, axis=1, keepdims=True) if cosine else x
        return x @ x.T

    blocks = [
        definition(gram(x[i : i + 20]), gram(y[i : i + 20]), estimator)
        for i in range(0, 60, 20)
    ]
    found = block_hsic(x, y, kernel, kernel, 20, estimator)
    assert float(found) == pytest.approx(np.mean(blocks), rel=1e-4)


def test_fourier_features():
    settings = {"approximation": "fourier", "size": 1024, "seed": 0}
    found = hsic_test(X, Y, **settings)
    exact = hsic_test(X, Y)
    assert found.statistic == pytest.approx(exact.statistic, rel=0.2)
    assert np.log(found.p_value) == pytest.approx(
        np.log(exact.p_value), rel=0.2
    )
    x, y = X.astype("f4"), Y.astype("f4")
    same = fourier_hsic(x, y, num_features=1024, seed=0)
    assert found.statistic == pytest.approx(float(value(same)), rel=1e-3)
    # The draws have the mean of the gamma distribution.
    settings = {"approximation": "fourier", "size": 64, "seed": 0}
    shape, scale = hsic_test(X, Y, **settings).null
    found = hsic_test(X, Y, null="permutation", num_permutations=60, **settings)
    assert np.mean(found.null) == pytest.approx(shape * scale, rel=0.1)
    # Linear features are exact: the permutations are those of the matrices.
    settings = {"null": "permutation", "num_permutations": 40, "seed": 5}
    exact = hsic_test(X, Y, LINEAR, LINEAR, **settings)
    found = hsic_test(X, Y, LINEAR, LINEAR, approximation="fourier", **settings)
    np.testing.assert_allclose(found.null, exact.null, rtol=1e-3, atol=1e-6)
    assert found.p_value == exact.p_value


def test_a_constant_variable_depends_on_nothing():
    for constant in (np.zeros(60), np.full((60, 2), 1e6)):
        for settings in (
            {},
            {"null": "permutation", "num_permutations": 5},
            {"approximation": "block", "size": 10},
            {"approximation": "fourier"},
        ):
            for pair in ((X, constant), (constant, Y)):
                found = hsic_test(*pair, **settings)
                assert found[:2] == (0, 1), settings
    assert hsic_test(X, np.zeros(60), LINEAR, LINEAR)[:2] == (0, 1)
    # Exactly nothing is left of its random features.
    constant = ops.convert_to_tensor(np.full((60, 2), 0.3, "f4"))
    frequencies = ops.convert_to_tensor(RNG.normal(size=(2, 8)).astype("f4"))
    (found,) = covariances([(constant, frequencies)], [(0, 0)])
    assert not value(found).any()


def test_errors(capsys):
    for settings, message in [
        ({"null": "chi2"}, "null='chi2'"),
        ({"approximation": "nystrom"}, "approximation='nystrom'"),
        ({"num_permutations": 0}, "num_permutations=0"),
        ({"approximation": "block", "size": 40}, "n=60, size=40"),
    ]:
        with pytest.raises(ValueError, match=f"Received: .*{message}"):
            hsic_test(X, Y, **settings)
    with pytest.raises(ValueError, match="Received: n=5"):
        hsic_test(X[:5], Y[:5])
    with pytest.raises(ValueError, match=r"Received: x.shape=.1, 60, 2"):
        hsic_test(X[None], Y[None])
    with pytest.raises(ValueError, match="finite numbers in `y`"):
        hsic_test(X, np.where(Y > 1, np.nan, Y))
    settings = {"null": "permutation", "num_permutations": 70, "seed": 0}
    hsic_test(X, Y, **settings)
    assert capsys.readouterr().out == ""
    hsic_test(X, Y, **settings, verbose=1)
    assert "70/70" in capsys.readouterr().out


# Level and power


def draw(case, rng, n=100):
    """The cases of the calibration: `(x, y)`."""
    if case.startswith("null"):
        dim = int(case[4:])
        return rng.normal(size=(n, dim)), rng.normal(size=(n, dim))
    if case == "rotated":  # uniforms, turned by π/8
        u, v = rng.uniform(-1, 1, (2, n))
        c, s = np.cos(np.pi / 8), np.sin(np.pi / 8)
        return c * u - s * v, s * u + c * v
    x = rng.uniform(-1, 1, n) if case == "sine" else rng.normal(size=n)
    noise = rng.normal(size=n)
    if case == "sine":
        return x, np.sin(4 * np.pi * x) + 0.8 * noise
    return x, 0.4 * x**2 + noise


def hyppos_test(x, y):
    """p of hyppo 0.5.2's default test: one bandwidth, that of x, for both.

    `benchmarks/bench_hsic.py` compares it with hyppo's own.
    """
    x, y = (t.reshape(len(t), -1) for t in (x, y))
    n, bandwidth = len(x), median(x)
    k, l = gaussian(x, bandwidth), gaussian(y, bandwidth)  # noqa: E741
    xy, xx, yy = (
        definition(a, b, "unbiased") for a, b in ((k, l), (k, k), (l, l))
    )
    statistic = xy / np.sqrt(xx * yy)
    return scipy.stats.chi2.sf(n * statistic + 1, 1)


def rejections(test, case, trials, seed=0):
    rng = np.random.default_rng(seed)
    return np.mean([test(*draw(case, rng)) < 0.05 for _ in range(trials)])


def by_gamma(x, y):
    return hsic_test(x, y).p_value


def by_permutation(x, y):
    return hsic_test(
        x, y, null="permutation", num_permutations=100, seed=0
    ).p_value


def test_level_and_power_small():
    """At most 6 of 40 by chance (with p = .003 more); half of the others."""
    assert rejections(by_gamma, "null1", 40) <= 6 / 40
    assert rejections(by_permutation, "null1", 40) <= 6 / 40
    assert rejections(by_gamma, "quadratic", 20) >= 10 / 20
    # The standard, wider form of the kernel finds 8 of 20.
    assert rejections(by_gamma, "rotated", 20) >= 10 / 20


@pytest.mark.verify
@pytest.mark.parametrize("case", ["null1", "null10"])
def test_level(case):
    assert 0.03 <= rejections(by_permutation, case, 300) <= 0.075
    assert 0.03 <= rejections(by_gamma, case, 300) <= 0.075


@pytest.mark.verify
@pytest.mark.parametrize("test", [by_gamma, by_permutation])
def test_power(test):
    for case in ("sine", "quadratic"):
        hyppo = rejections(hyppos_test, case, 300)
        assert rejections(test, case, 300) >= hyppo - 0.06
    hyppo = rejections(hyppos_test, "rotated", 300)
    assert 0.1 < 1.5 * hyppo <= rejections(test, "rotated", 300)
