"""Independence given a third variable: KCI."""

import numpy as np
import pytest
import scipy.stats
from hsic_reference import LINEAR, distances, gaussian
from kit import JAX

from blogkeras.hsic import (
    CosineKernel,
    DeltaKernel,
    GaussianKernel,
    LaplacianKernel,
    PrecomputedKernel,
    hsic_test,
    kci_test,
)

RNG = np.random.default_rng(3)
Z = RNG.normal(size=(80, 1))
X = np.sin(2 * Z) + 0.5 * RNG.normal(size=(80, 1))
Y = Z**2 + 0.5 * RNG.normal(size=(80, 1))
W = Y + 0.6 * X
# causal-learn 0.1.4.8 on these: KCI_CInd().compute_pvalue(x, y, z), p and n T.
# It leaves out small eigenvalues, which changes the fifth digit of p.
THEIRS = {
    "independent": (Y, 0.09908712632420413, 1.0689293374747615),
    "dependent": (W, 0.019997905303371533, 2.595031431395904),
}
THEIRS_WITH_3 = 7.08698369235039e-05, 0.04553537626364653
# Kernels of float32 against a ridge of 1e-3.
TOLERANCE = 1e-3 if JAX else 1e-7


def centered(k):
    j = np.eye(len(k)) - 1 / len(k)
    return j @ k @ j


def paper(k_xz, k_y, k_z, epsilon=1e-3):
    """n T, p and A ∘ B of Zhang et al. 2011."""
    n = len(k_z)
    r = epsilon * np.linalg.inv(centered(k_z) + epsilon * np.eye(n))
    product = (r @ centered(k_xz) @ r) * (r @ centered(k_y) @ r)
    mean, variance = np.trace(product), 2 * np.square(product).sum()
    total = product.sum()
    p_value = scipy.stats.gamma.sf(
        total, mean**2 / variance, scale=variance / mean
    )
    return total, p_value, product


def scaled(x):
    return (x - x.mean(0)) / x.std(0, ddof=1)


@pytest.mark.parametrize("case", THEIRS)
def test_formula_and_peer(case):
    y, p_value, total = THEIRS[case]
    found = kci_test(X, y, Z)
    assert found.statistic * 80 == pytest.approx(total, rel=TOLERANCE)
    assert found.p_value == pytest.approx(p_value, rel=max(TOLERANCE, 1e-4))
    wide = gaussian(scaled(X), 1.2) * gaussian(scaled(Z), 2.4)
    expected = paper(wide, gaussian(scaled(y), 1.2), gaussian(scaled(Z), 1.2))
    assert found.statistic * 80 == pytest.approx(expected[0], rel=TOLERANCE)
    assert found.p_value == pytest.approx(expected[1], rel=TOLERANCE)
    # The fitted distribution is that of T.
    shape, scale = found.null
    assert shape * scale * 80 == pytest.approx(
        np.trace(expected[2]), rel=TOLERANCE
    )
    assert found.p_value == pytest.approx(
        scipy.stats.gamma.sf(found.statistic, shape, scale=scale), rel=1e-6
    )


def test_spectral_draws():
    """Moments of Σ λ_k χ²₁; p as causal-learn's, 0.0914 and 0.0234."""
    found = kci_test(X, Y, Z, null="spectral", seed=0, num_draws=20_000)
    wide = gaussian(scaled(X), 1.2) * gaussian(scaled(Z), 2.4)
    *_, product = paper(
        wide, gaussian(scaled(Y), 1.2), gaussian(scaled(Z), 1.2)
    )
    draws = found.null * 80
    assert draws.shape == (20_000,)
    deviation = np.sqrt(2 * np.square(product).sum())
    assert draws.mean() == pytest.approx(np.trace(product), rel=0.02)
    assert draws.std() == pytest.approx(deviation, rel=0.05)
    assert found.p_value == (1 + np.sum(found.null >= found.statistic)) / 20_001
    assert found.p_value == pytest.approx(0.0914, abs=0.01)
    other = kci_test(X, W, Z, null="spectral", seed=0)
    assert other.p_value == pytest.approx(0.0234, abs=0.008)
    again = kci_test(X, W, Z, null="spectral", seed=0)
    assert again.p_value == other.p_value
    free = kci_test(X, W, Z, null="spectral")
    assert not np.array_equal(free.null, other.null)


def test_kernels():
    """Each of its own; that of (x, z) is a product."""
    narrow = GaussianKernel(0.8, form="standard")
    k, given = gaussian(Z, 0.8), PrecomputedKernel()
    shifted = Z + 1e3  # the ridge is about the centre
    for kernel, z, k_z, smooth, epsilon in (
        (narrow, Z, k, k, 1e-3),
        (given, k, k, k, 1e-2),
        (LINEAR, shifted, Z @ Z.T, shifted @ shifted.T, 1e-3 * Z.var()),
    ):
        kernels = narrow, LaplacianKernel(1.5), kernel
        expected = paper(
            gaussian(X, 0.8) * smooth,
            np.exp(-distances(Y) / 1.5),
            k_z,
            epsilon,
        )
        given = 1e-2 if epsilon == 1e-2 else 1e-3
        found = kci_test(X, Y, z, *kernels, epsilon=given)
        rel = 0.02 if JAX else 1e-6
        assert found.p_value == pytest.approx(expected[1], rel=rel)
        assert found.statistic * 80 == pytest.approx(expected[0], rel=rel)


def test_units_do_not_matter():
    right = kci_test(X, Y, Z).p_value
    found = kci_test(X * 1e-30, Y * 1e30 + 1e32, Z * 1e200).p_value
    assert found == pytest.approx(right, rel=max(TOLERANCE, 1e-4))
    linear = kci_test(X, Y, Z, LINEAR, LINEAR, LINEAR)
    found = kci_test(X * 1e3, Y, Z * 1e-3, LINEAR, LINEAR, LINEAR)
    rel = 0.02 if JAX else 1e-6
    assert found.p_value == pytest.approx(linear.p_value, rel=rel)


def test_bandwidth_by_number_of_features():
    """Those of z for all; of x alone if x has more."""
    x = np.concatenate([X, RNG.normal(size=(80, 3))], axis=1)
    wide = gaussian(scaled(x), 2 * 1.2) * gaussian(scaled(Z), 2.4)
    expected = paper(wide, gaussian(scaled(Y), 1.2), gaussian(scaled(Z), 1.2))
    found = kci_test(x, Y, Z)
    assert found.p_value == pytest.approx(expected[1], rel=TOLERANCE)
    # causal-learn, as above.
    z = np.concatenate([Z, X + Y, X * Y], axis=1)
    found = kci_test(X, W, z)
    assert found.p_value == pytest.approx(THEIRS_WITH_3[0], rel=0.01)
    assert found.statistic * 80 == pytest.approx(
        THEIRS_WITH_3[1], rel=TOLERANCE
    )


def test_labels():
    """Given the group nothing is left of the groups' means."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 150)
    names = np.array(["ant", "bee", "cat"])[group]
    x, y = group + 0.5 * rng.normal(size=(2, 150))
    assert hsic_test(x, y).p_value < 1e-6
    found = kci_test(x, y, names)
    assert found.p_value > 0.05
    same = kci_test(x, y, group, kernel_z=DeltaKernel())
    assert same.p_value == found.p_value
    assert kci_test(x, y + 0.5 * x, names).p_value < 0.01
    assert kci_test(names, x, y).p_value < 0.01


def test_degenerate():
    """Finite: constants, copies of z, and z that says nothing."""
    constant = np.full(80, 1.7e9 + 0.1)
    for null in ("gamma", "spectral"):
        settings = {"null": null, "num_draws": 9, "seed": 0}
        assert kci_test(constant, Y, Z, **settings)[:2] == (0, 1)
        assert kci_test(X, constant, Z, **settings)[:2] == (0, 1)
        for triple in ((Z, Y, Z), (X, Z, Z), (Z, Z, Z)):
            found = kci_test(*triple, **settings)
            assert 0 <= found.p_value <= 1
            assert np.isfinite(found.statistic)
            assert np.isfinite(np.sum(found.null))
    # Without anything known it is a test of independence, of moments of its
    # own.
    n = 80
    k, m = (centered(gaussian(scaled(a), 1.2)) for a in (X, Y))
    found = kci_test(X, Y, constant)
    assert found.statistic == pytest.approx(np.sum(k * m) / n, rel=TOLERANCE)
    for kernel in (LINEAR, CosineKernel()):
        assert kci_test(X, Y, constant, kernel_z=kernel).p_value <= 1
    tiny = kci_test(X, Y, Z, epsilon=1e-12)
    assert 0 <= tiny.p_value <= 1


def test_level_and_power_small():
    """At most 6 of 40 by chance (with p = .003 more); half of the others."""
    rng, found = np.random.default_rng(0), []
    for _ in range(40):
        z = rng.normal(size=60)
        x, y = np.tanh(z) + 0.5 * rng.normal(size=(2, 60))
        found.append([kci_test(x, y, z), kci_test(x, y + x, z)])
    p_values = np.array([[a.p_value, b.p_value] for a, b in found])
    level, power = (p_values < 0.05).mean(axis=0)
    assert level <= 6 / 40
    assert power >= 0.5


def test_errors():
    for settings, message in (
        ({"null": "permutation"}, "null='permutation'"),
        ({"epsilon": 0}, "epsilon=0"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"kernel_z": "rbf"}, "kernel='rbf'"),
    ):
        with pytest.raises(ValueError, match=f"Received: {message}"):
            kci_test(X, Y, Z, **settings)
    with pytest.raises(ValueError, match=r"at least 6 .* z.shape=\(79, 1\)"):
        kci_test(X, Y, Z[1:])
    with pytest.raises(ValueError, match=r"at least 6 samples.*x.shape=\(5, 1"):
        kci_test(X[:5], Y[:5], Z[:5])
    with pytest.raises(ValueError, match=r"one sample set each.*\(1, 80, 1\)"):
        kci_test(X, Y, Z[None])
    with pytest.raises(ValueError, match="finite numbers in `z`"):
        kci_test(X, Y, np.where(Z > 1, np.nan, Z))


def test_no_condition():
    nothing = np.zeros((len(X), 0))
    assert kci_test(X, Y, nothing) == kci_test(X, Y, np.zeros(len(X)))
    for given in ((nothing, Y, Z), (X, nothing, Z)):
        with pytest.raises(ValueError, match=r"one feature of `[xy]`"):
            kci_test(*given)
