"""Several variables at once: dHSIC and its test; the post has two variables."""

import itertools

import numpy as np
import pytest
from hsic_reference import LINEAR, central, default, gaussian, value
from keras import ops
from kit import JAX, close_in_ulps, slow_on_jax

from blogkeras import backend
from blogkeras.hsic import (
    CosineKernel,
    DeltaKernel,
    GaussianKernel,
    LaplacianKernel,
    PolynomialKernel,
    PrecomputedKernel,
    dhsic,
    dhsic_test,
    hsic,
    tiles,
)

RNG = np.random.default_rng(2)
X = RNG.normal(size=(40, 3))
Y = X[:, :1] ** 2 + RNG.normal(size=(40, 1))
Z = X[:, 1] * Y[:, 0] + RNG.normal(size=40)
LABELS = RNG.integers(0, 3, 40)
DELTA = DeltaKernel()
# Three coins, of which the third says whether the others agree.
COINS = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]])


def joint(matrices, p=None):
    """Pfister et al. 2018, definition of the estimator, with weights p."""
    matrices = np.asarray(matrices, "float64")
    p = np.full(matrices.shape[-1], 1 / matrices.shape[-1]) if p is None else p
    together = p @ matrices.prod(0) @ p
    apart = np.prod([p @ k @ p for k in matrices])
    return together + apart - 2 * p @ np.prod(matrices @ p, axis=0)


def equal(x):
    return (x[:, None] == x).astype("float64")


def cosine(x):
    unit = x / np.sqrt(np.square(x).sum(-1, keepdims=True))
    return unit @ unit.T


def test_three_coins():
    """1/4 + 1/8 − 2/8, of four equally likely triples."""
    found = dhsic(list(COINS), [DELTA] * 3)
    assert value(found) == pytest.approx(1 / 8, rel=1e-6)
    for pair in itertools.combinations(COINS, 2):
        assert abs(value(dhsic(pair, [DELTA] * 2))) < 1e-8
        assert abs(value(hsic(*pair, DELTA, DELTA))) < 1e-8


def test_definition():
    four = [X, Y, Z, LABELS]
    kernels = [None, None, None, DELTA]
    matrices = [default(X), default(Y), default(Z), equal(LABELS)]
    for number in (2, 3, 4):
        found = dhsic(four[:number], kernels[:number])
        expected = joint(matrices[:number])
        assert value(found) == pytest.approx(expected, rel=1e-5)
    single = [x.astype("float32") for x in four[:3]]
    assert value(dhsic(single)) == pytest.approx(joint(matrices[:3]), rel=1e-4)
    found = backend.jit(lambda *x: dhsic(x))(*single)
    assert value(found) == pytest.approx(joint(matrices[:3]), rel=1e-4)


def test_peer():
    """hyppo 0.5.2: dHsic(gamma=1 / (2 · 1.5²)).statistic(X, Y[, Z])."""
    fixed = [GaussianKernel(1.5, form="standard")] * 3
    for variables, theirs in (
        ([X, Y], 0.011406164447279044),
        ([X, Y, Z], 0.02033324246600149),
    ):
        found = dhsic(variables, fixed[: len(variables)])
        assert value(found) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("tensors", [False] if JAX else [False, True])
def test_kernels_are_about_the_origin(tensors):
    """Beside two others: a kernel plus a number is another kernel."""
    offset = X + 2.0
    matrix = np.cov(X) + 3.0
    for kernel, x, k in (
        (LINEAR, offset, offset @ offset.T),
        (CosineKernel(), offset, cosine(offset)),
        (PolynomialKernel(1), offset, offset @ offset.T + 1),
        (PrecomputedKernel(), matrix, matrix),
        (GaussianKernel(1.5, form="standard"), X, gaussian(X, 1.5)),
        (LaplacianKernel(2.0), Z, np.exp(-np.abs(Z[:, None] - Z) / 2)),
        (lambda a, b: ops.matmul(a, ops.transpose(b)), offset, None),
    ):
        k = offset @ offset.T if k is None else k
        expected = joint([k, default(Y), equal(LABELS)])
        given = ops.convert_to_tensor(x.astype("float32")) if tensors else x
        found = dhsic([given, Y, LABELS], [kernel, None, DELTA])
        assert value(found) == pytest.approx(expected, rel=2e-4), kernel


def test_two_variables_are_those_of_hsic():
    for x, y, kernels in (
        (X, Y, [None, None]),
        (X + 5, Y, [LINEAR, LINEAR]),
        (X + 5, LABELS, [CosineKernel(), DELTA]),
        (X @ X.T, Z, [PrecomputedKernel(), GaussianKernel(9.0, form="blog")]),
    ):
        for mask in (None, LABELS > 0, LABELS * 0.5):
            found = dhsic([x, y], kernels, mask)
            close_in_ulps(found, hsic(x, y, *kernels, mask=mask), 4)


def test_wide_kernels():
    """K − 1 of order 1e-8: nothing of it is lost beside the 1 in float32."""
    wide = GaussianKernel(1e4, form="standard")
    variables = [x.astype("float32") for x in (X, Y, Z)]
    squares = [
        np.square(np.asarray(x, "f8")[:, None] - np.asarray(x, "f8"))
        for x in (variables[0], variables[1], variables[2][:, None])
    ]
    small = [np.expm1(-s.sum(-1) / 2e8) for s in squares]
    # Π (1 + E_k) to second order: pairs; the third order is 1e-8 of it.
    expected = sum(joint(pair) for pair in itertools.combinations(small, 2))
    found = dhsic(variables, [wide] * 3)
    assert value(found) == pytest.approx(expected, rel=1e-4)


@slow_on_jax
def test_batches_masks_and_weights():
    x = np.stack([X, X[::-1]])
    y = np.stack([Y, Y])
    z = np.stack([Z, Z])[..., None]
    found = value(dhsic([x, y, z]))
    assert found.shape == (2,)
    for index in range(2):
        own = dhsic([x[index], y[index], z[index]])
        assert found[index] == pytest.approx(value(own), rel=1e-5)
    mask = RNG.random(40) < 0.7
    hidden = [np.where(mask[:, None], a, np.nan) for a in (X, Y, Z[:, None])]
    own = dhsic([a[mask] for a in (X, Y, Z)])
    assert value(dhsic(hidden, mask=mask)) == pytest.approx(value(own), 1e-5)
    # Weights are shares: as if samples stood there as often.
    fixed = [GaussianKernel(1.5, form="standard")] * 3
    counts = np.arange(40) % 3
    weighted = value(dhsic([X, Y, Z], fixed, counts))
    repeated = [np.repeat(a, counts, axis=0) for a in (X, Y, Z)]
    assert weighted == pytest.approx(value(dhsic(repeated, fixed)), 1e-5)
    assert value(dhsic([X, Y, Z], mask=np.zeros(40))) == 0


def test_tiles_of_a_compiled_program(monkeypatch):
    """Tiles of 8 rows, the last one short."""
    monkeypatch.setattr(tiles, "TILE", 1)
    monkeypatch.setattr(tiles, "EAGER_TILE", 1)
    tiles._programs.clear()
    found = value(dhsic([a[:39].astype("f4") for a in (X, Y, Z)]))
    expected = joint([default(a[:39]) for a in (X, Y, Z)])
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(tiles._programs) == 1
    tiles._programs.clear()


@slow_on_jax
def test_gradient():
    fixed = [GaussianKernel(1.5, form="standard")] * 3
    x, y, z = X[:7], Y[:7], Z[:7]
    expected = central(
        lambda a: joint([gaussian(a, 1.5), gaussian(y, 1.5), gaussian(z, 1.5)]),
        x,
    )
    gradient = backend.value_and_grad(
        lambda a: (dhsic([a, y, z], fixed), None),
        ops.convert_to_tensor(x.astype("float32")),
    )[1]
    np.testing.assert_allclose(value(gradient), expected, atol=1e-6)


# The test


def test_draws():
    matrices = [default(X), default(Y), equal(LABELS)]
    rng = np.random.default_rng(3)
    expected = []
    for _ in range(60):
        turned = [matrices[0]]
        for k in matrices[1:]:
            order = rng.permutation(40)
            turned.append(k[order][:, order])
        expected.append(joint(turned))
    variables, kernels = [X, Y, LABELS], [None, None, DELTA]
    found = dhsic_test(variables, kernels, num_permutations=60, seed=3)
    np.testing.assert_allclose(found.null, expected, rtol=1e-3, atol=1e-7)
    assert found.statistic == pytest.approx(joint(matrices), rel=1e-4)
    extreme = np.sum(np.array(expected) >= found.statistic)
    assert found.p_value == (1 + extreme) / 61
    again = dhsic_test(variables, kernels, num_permutations=60, seed=3)
    np.testing.assert_array_equal(again.null, found.null)
    free = dhsic_test(variables, kernels, num_permutations=60)
    assert not np.array_equal(free.null, found.null)


def test_dependence_of_three_that_no_pair_shows():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 80))
    z = np.sign(x * y) * np.abs(rng.normal(size=80))
    settings = {"num_permutations": 99, "seed": 0}
    assert dhsic_test([x, y, z], **settings).p_value == 0.01
    for pair in itertools.combinations((x, y, z), 2):
        assert dhsic_test(list(pair), **settings).p_value > 0.05


def test_level_of_three_variables():
    """At most 6 of 40 by chance (with p = .003 more)."""
    rng = np.random.default_rng(1)
    small = [
        dhsic_test(list(rng.normal(size=(3, 40))), num_permutations=49, seed=0)
        for _ in range(40)
    ]
    assert np.mean([t.p_value <= 0.05 for t in small]) <= 6 / 40


def test_constants():
    constant = np.full(40, 1.7e9 + 0.1)
    found = dhsic_test([X, constant, np.ones((40, 2))], num_permutations=9)
    assert found[:2] == (0, 1)
    assert value(dhsic([X, constant, np.ones((40, 2))])) == 0
    assert value(dhsic([constant, constant, constant])) == 0
    # It leaves those that do vary as they are.
    found = value(dhsic([X, constant, Y]))
    assert found == pytest.approx(value(hsic(X, Y)), rel=1e-5)


def test_errors(capsys):
    for variables in ([X], X, None):
        with pytest.raises(ValueError, match=r"at least two .* Received: var"):
            dhsic(variables)
    with pytest.raises(ValueError, match=r"one for each variable\. Received"):
        dhsic([X, Y], [None])
    with pytest.raises(ValueError, match=r"as of `variables\[2\]`. Received"):
        dhsic([X, Y, Z[:30]])
    with pytest.raises(ValueError, match=r"finite numbers in `variables\[1\]`"):
        dhsic([X, np.where(Y > 1, np.nan, Y), Z])
    with pytest.raises(ValueError, match=r"Received: variables\[0\].shape=.1,"):
        dhsic_test([X[None], Y, Z])
    dhsic_test([X, Y, Z], num_permutations=9, verbose=1)
    assert "10/10" in capsys.readouterr().out
