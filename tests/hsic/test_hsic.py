"""HSIC as a number: closed forms, NumPy, gradients, costs (post 6910)."""

import itertools

import keras
import numpy as np
import pytest
from hsic_reference import (
    BLOG,
    ESTIMATORS,
    LINEAR,
    MASK,
    RNG,
    X,
    Y,
    central,
    default,
    definition,
    gaussian,
    median,
    posts_function,
    quick,
    value,
)
from keras import ops
from kit import JAX, slow_on_jax

from blogkeras import backend
from blogkeras.hsic import (
    CosineKernel,
    DeltaKernel,
    GaussianKernel,
    LaplacianKernel,
    PolynomialKernel,
    PrecomputedKernel,
    block_hsic,
    cka,
    dhsic,
    fourier,
    fourier_hsic,
    hsic,
    hsic_from_kernels,
    hsic_test,
    independence_test,
    median_bandwidth,
    nhsic,
    samples,
    tiles,
)

# Closed forms


def test_the_posts_function():
    k, l = gaussian(X, 1.3), gaussian(Y, 0.7)  # noqa: E741
    expected = posts_function(k, l)
    np.testing.assert_allclose(
        value(hsic_from_kernels(k, l, estimator="blog")), expected, rtol=1e-5
    )
    both = [GaussianKernel(b, form="standard") for b in (1.3, 0.7)]
    np.testing.assert_allclose(
        value(hsic(X, Y, *both, estimator="blog")), expected, rtol=1e-5
    )


def test_the_old_name_of_the_standard_form():
    with pytest.warns(DeprecationWarning, match="form='standard'"):
        kernel = GaussianKernel(1.3, form="usual")
    assert kernel == GaussianKernel(1.3, form="standard")
    assert kernel.get_config()["form"] == "standard"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_definition(estimator):
    expected = definition(default(X), gaussian(Y, 2.0), estimator)
    found = hsic(X, Y, None, GaussianKernel(2.0, form="standard"), estimator)
    np.testing.assert_allclose(value(found), expected, rtol=1e-4)


def test_linear_kernels_are_the_covariance():
    """‖cov(x, y)‖²; with n − 1 it is the blog's form."""
    for estimator, bias in (("biased", True), ("blog", False)):
        cov = np.cov(X.T.astype("f8"), Y.T.astype("f8"), bias=bias)[:3, 3:]
        found = hsic(X, Y, LINEAR, LINEAR, estimator)
        np.testing.assert_allclose(value(found), (cov**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_linear_kernels_in_feature_space(estimator, mask):
    """The same with the matrices as with the features."""
    rows = slice(None) if mask is None else mask
    x, y = X[rows].astype("f8"), Y[rows].astype("f8")
    expected = definition(x @ x.T, y @ y.T, estimator)
    found = hsic(X, Y, LINEAR, LINEAR, estimator, mask)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)
    wide = np.tile(X, (1, 20))[:, :50]  # more features than samples
    x = wide[rows].astype("f8")
    expected = definition(x @ x.T, y @ y.T, estimator)
    found = hsic(wide, Y, LINEAR, LINEAR, estimator, mask)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)


def test_delta_kernels_are_exact():
    """Σ (p(a, b) − p(a) p(b))² of the table of counts."""
    a, b = RNG.integers(0, 3, 60), RNG.integers(0, 4, 60)
    b[a == 0] = 1
    table = np.zeros((3, 4))
    np.add.at(table, (a, b), 1 / 60)
    independent = table.sum(1, keepdims=True) * table.sum(0)
    expected = ((table - independent) ** 2).sum()
    delta = DeltaKernel()
    np.testing.assert_allclose(
        value(hsic(a, b, delta, delta)), expected, rtol=1e-5
    )
    # One-hot vectors with a linear kernel are the same kernel.
    found = hsic(np.eye(3)[a], b, LINEAR, delta)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)


def test_sum_over_eigenfunctions():
    """Σ αᵢ βⱼ C[ψᵢ, φⱼ]², the post's definition, on a finite set."""
    x, y = RNG.normal(size=(4, 2)), RNG.normal(size=(5, 1))
    k, l = gaussian(x, 1.0), gaussian(y, 0.5)  # noqa: E741
    (alpha, psi), (beta, phi) = np.linalg.eigh(k), np.linalg.eigh(l)
    counts = RNG.integers(0, 4, (4, 5))
    p = counts / counts.sum()
    c = psi.T @ (p - p.sum(1, keepdims=True) * p.sum(0)) @ phi
    expected = (np.outer(alpha, beta) * c**2).sum()
    a, b = (np.repeat(i.ravel(), counts.ravel()) for i in np.indices(p.shape))
    matrices = k[np.ix_(a, a)], l[np.ix_(b, b)]
    np.testing.assert_allclose(
        value(hsic_from_kernels(*matrices)), expected, rtol=1e-4
    )
    # The same measure as weights of the 20 different pairs.
    a, b = (i.ravel() for i in np.indices(p.shape))
    matrices = k[np.ix_(a, a)], l[np.ix_(b, b)]
    found = hsic_from_kernels(*matrices, mask=counts.ravel())
    np.testing.assert_allclose(value(found), expected, rtol=1e-4)


def limit(noise):
    """HSIC of y = x + noise ε under exp(−d²): E exp(−vᵀv) = |I + 2C|^(−½)."""

    def mean(covariance):
        return np.linalg.det(np.eye(2) + 2 * np.array(covariance)) ** -0.5

    s = 1 + noise**2
    joint = mean([[2, 2], [2, 2 * s]])
    apart = mean([[2, 0], [0, 2 * s]])
    mixed = mean([[2, 1], [1, 2 * s]])
    return joint + apart - 2 * mixed


def test_the_posts_demo():
    assert round(limit(0.1), 5) == 0.09452  # the post drew 0.096
    # 300 draws of 60 pairs, in one call: three standard errors.
    x, noise = RNG.normal(size=(2, 300, 60, 1)).astype("float32")
    found = value(hsic(x, x + 0.1 * noise, BLOG, BLOG, "unbiased"))
    assert found.shape == (300,)
    error = found.std(ddof=1) / 300**0.5
    assert abs(found.mean() - limit(0.1)) < 3 * error < 0.01


def test_only_the_unbiased_form_is_unbiased():
    """Independent normals: expectation 0, or (1 − E K)²/n to first order."""
    x, y = RNG.normal(size=(2, 400, 50, 1)).astype("float32")
    error = {}
    for estimator in ESTIMATORS:
        found = value(hsic(x, y, BLOG, BLOG, estimator))
        error[estimator] = found.mean() / (found.std(ddof=1) / 400**0.5)
    assert abs(error["unbiased"]) < 3
    assert min(error["biased"], error["blog"]) > 30
    mean = value(hsic(x, y, BLOG, BLOG, "blog")).mean()
    expected = (1 - 5**-0.5) ** 2 / 50
    assert abs(mean / expected - 1) < 0.1
    # At n = 1000 that is .00031; the post drew .0002.
    assert round((1 - 5**-0.5) ** 2 / 1000, 5) == 0.00031


# Kernels


def test_kernel_values():
    a, b = np.array([[1.0, 2.0]]), np.array([[1.0, 2.0], [4.0, 6.0]])
    cases = [
        (GaussianKernel(5.0, form="blog"), [1, np.exp(-1)]),
        (GaussianKernel(5.0, form="standard"), [1, np.exp(-0.5)]),
        (
            GaussianKernel(5.0, form="standard", per_dimension=True),
            [1, np.exp(-0.25)],
        ),
        (LaplacianKernel(2.5), [1, np.exp(-2)]),
        (LINEAR, [5, 16]),
        (PolynomialKernel(3, 0.5, 2.0), [4.5**3, 10.0**3]),
        (CosineKernel(), [1, 16 / (5 * 52) ** 0.5]),
        (DeltaKernel(), [1, 0]),
    ]
    for kernel, expected in cases:
        np.testing.assert_allclose(
            value(kernel(a, b)), [expected], rtol=1e-5, err_msg=repr(kernel)
        )
        config = keras.saving.serialize_keras_object(kernel)
        revived = keras.saving.deserialize_keras_object(config)
        assert revived.get_config() == kernel.get_config()
        np.testing.assert_array_equal(value(revived(a, b)), value(kernel(a, b)))
    assert value(CosineKernel()(0 * a, b)).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "kernel",
    [
        GaussianKernel(2.0, form="standard"),
        GaussianKernel(form="blog"),
        LaplacianKernel(),
        PolynomialKernel(),
        CosineKernel(),
    ],
    ids=repr,
)
def test_every_kernel_in_hsic(kernel):
    """The matrix of the bare kernel, through the definition."""
    fixed = kernel
    if "bandwidth" in kernel.get_config():
        config = {**kernel.get_config(), "bandwidth": kernel.bandwidth}
        config["bandwidth"] = kernel.bandwidth or median(X)
        fixed = type(kernel)(**config)
    expected = definition(value(fixed(X, X)), gaussian(Y, 1.0), "biased")
    found = hsic(X, Y, kernel, GaussianKernel(1.0, form="standard"))
    np.testing.assert_allclose(value(found), expected, rtol=1e-4)


def test_functions_and_layers_as_kernels():
    expected = value(hsic(X, Y, LINEAR))

    def linear(a, b):
        return ops.matmul(a, ops.transpose(b))

    class Learned(keras.layers.Layer):
        def build(self, x1_shape, x2_shape):
            self.scale = self.add_weight((), initializer="ones", name="scale")

        def call(self, x1, x2):
            return ops.square(self.scale) * linear(x1, x2)

    np.testing.assert_allclose(value(hsic(X, Y, linear)), expected, rtol=1e-5)
    layer = Learned()
    layer.build((None, 3), (None, 3))
    layer.scale.assign(2.0)
    np.testing.assert_allclose(value(hsic(X, Y, layer)), 4 * expected, 1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "kernel", [None, LINEAR, LaplacianKernel(1.0)], ids=repr
)
def test_the_origin_does_not_matter(estimator, kernel):
    here = value(hsic(X, Y, kernel, kernel, estimator))
    there = value(hsic(X + 1000, Y - 1000, kernel, kernel, estimator))
    np.testing.assert_allclose(there, here, rtol=2e-3)


def test_median_bandwidth(monkeypatch):
    assert median_bandwidth(X) == pytest.approx(median(X), rel=1e-6)
    assert median_bandwidth(X[:, 0]) == pytest.approx(median(X[:, 0]), rel=1e-5)
    assert median_bandwidth(X, MASK) == pytest.approx(median(X[MASK]), rel=1e-6)
    assert median_bandwidth(1e3 * X) == pytest.approx(1e3 * median(X), rel=1e-6)
    stacked = value(median_bandwidth(np.stack([X, 2 * X])))
    np.testing.assert_allclose(stacked, [median(X), 2 * median(X)], rtol=1e-6)
    # Blocks of rows, with an odd and an even number of pairs.
    large = RNG.normal(size=(1503, 2))
    for some in (large, large[1:]):
        assert median_bandwidth(some.astype("f4")) == pytest.approx(
            median(some), rel=1e-5
        )
    # A share of 10 % ones: most pairs are equal, the others 1 apart.
    tenth = np.repeat([0.0, 1.0], [36, 4])
    assert median_bandwidth(tenth) == pytest.approx(1)
    assert median_bandwidth(np.full(5, 7.0)) == 1
    # Far from a typical pair of the sample that brackets it.
    lumps = np.repeat([0.0, 1.0, 5.0], [40, 40, 21])
    assert median_bandwidth(lumps) == pytest.approx(median(lumps))
    monkeypatch.setattr(samples, "ROWS", 10)
    assert median_bandwidth(X) == pytest.approx(median(X[::4]), rel=1e-6)


def test_median_bandwidth_in_a_step(monkeypatch):
    few = np.repeat([0.0, 1.0], [36, 4])[:, None] * np.ones(3)
    lumps = np.repeat([0.0, 1.0, 5.0], [16, 16, 8])[:, None] * np.ones(3)
    stack = np.stack([X, few, 0 * few, X + 100, lumps]).astype("f4")
    found = value(backend.jit(median_bandwidth)(stack))
    expected = [median(X), 3**0.5, 1, median(X), median(lumps)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    stack = np.where(MASK[:, None], np.stack([X, X + 100]), 0)
    found = value(backend.jit(median_bandwidth)(stack, np.stack([MASK] * 2)))
    np.testing.assert_allclose(found, median(X[MASK]), rtol=1e-3)
    monkeypatch.setattr(samples, "TRACED_ROWS", 10)
    found = backend.jit(lambda x: median_bandwidth(x))(X)
    assert value(found) == pytest.approx(median(X[::4]), rel=1e-5)


# Masks, shapes, tiles


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", [None, CosineKernel()], ids=repr)
def test_mask_leaves_samples_out(estimator, kernel):
    x, y = np.where(MASK[:, None], X, np.nan), np.where(MASK[:, None], Y, 1e9)
    expected = value(hsic(X[MASK], Y[MASK], kernel, None, estimator))
    found = hsic(x, y, kernel, None, estimator, MASK)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)
    matrix = gaussian(X, 1.0)
    matrix[~MASK], matrix[:, ~MASK] = np.nan, np.nan
    k, l = (m[np.ix_(MASK, MASK)] for m in (matrix, gaussian(Y, 1.0)))  # noqa: E741
    found = hsic_from_kernels(matrix, gaussian(Y, 1.0), estimator, MASK)
    np.testing.assert_allclose(
        value(found), definition(k, l, estimator), rtol=1e-4
    )


@slow_on_jax
def test_weights_are_a_measure():
    """Weight 2 is two copies; a common factor does not matter."""
    weights = RNG.integers(0, 4, 40)
    copies = np.repeat(np.arange(40), weights)
    expected = value(hsic(X[copies], Y[copies], BLOG, BLOG))
    for mask in (weights, 0.1 * weights):
        found = hsic(X, Y, BLOG, BLOG, mask=mask)
        np.testing.assert_allclose(value(found), expected, rtol=1e-5)
        found = hsic(X, Y, LINEAR, LINEAR, mask=mask)
        np.testing.assert_allclose(
            value(found),
            value(hsic(X[copies], Y[copies], LINEAR, LINEAR)),
            1e-4,
        )
    inside = weights > 0
    for kernel in (BLOG, LINEAR):
        pair = kernel, kernel, "unbiased"
        np.testing.assert_allclose(
            value(hsic(X, Y, *pair, weights)),
            value(hsic(X[inside], Y[inside], *pair)),
            rtol=1e-4,
        )


def test_nothing_left_is_zero():
    for estimator in ESTIMATORS:
        for kernel in (BLOG, LINEAR, None):
            empty = hsic(X, Y, kernel, kernel, estimator, np.zeros(40))
            assert value(empty) == 0
    three = np.arange(40) < 3
    assert value(hsic(X, Y, estimator="unbiased", mask=three)) == 0
    assert abs(value(nhsic(X[:6], Y[:6], mask=np.zeros(6)))) < 1e-6


def test_constant_variable_is_zero():
    for constant in (np.zeros(40), np.full((40, 2), 1e4, "f4")):
        for kernel in (None, LINEAR, DeltaKernel()):
            for estimator in ESTIMATORS:
                found = value(hsic(X, constant, None, kernel, estimator))
                assert abs(found) < 1e-8
        assert value(cka(X, constant)) == 0
        assert abs(value(nhsic(X, constant))) < 1e-6


@pytest.mark.parametrize(
    "kernel", [LINEAR, CosineKernel(), PrecomputedKernel()]
)
def test_sets_of_a_batch_keep_their_digits(kernel):
    """A tiny set beside a huge one, and equal directions beside others."""
    # A matrix of products has the squares of these sizes.
    size = 1e15 if isinstance(kernel, PrecomputedKernel) else 1e30
    x = np.stack([X[:6] * size, X[:6] / size, np.outer(range(1, 7), [3, 7, 1])])
    y = np.stack([Y[:6]] * 3)
    if isinstance(kernel, PrecomputedKernel):
        x = x @ x.swapaxes(1, 2)
    found = value(cka(x, y, kernel))
    alone = [value(cka(x[k], y[k], kernel)) for k in range(3)]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert alone[1] > 0.01


def test_values_of_many_sizes_stay_different():
    """Also those far below the median."""
    y = np.array([1e7, -12.0, 1e24, 4e-26, 1.4e24, 1.5e26])
    kernel = GaussianKernel(1.0, form="blog")
    k, l = gaussian(X[:6], 0.5**0.5), np.eye(6)  # noqa: E741
    expected = definition(k, l, "biased")
    found = value(hsic(X[:6], y, kernel, kernel))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@slow_on_jax
def test_any_batch_shape():
    x = RNG.normal(size=(2, 3, 9, 2)).astype("f4")
    y = (x**2)[..., :1]
    mask = RNG.random((2, 3, 9)) < 0.8
    for fn in (
        quick(lambda x, y, m: hsic(x, y, None, LINEAR, "unbiased", m)),
        quick(lambda x, y, m: hsic(x, y, LINEAR, LINEAR, "unbiased", m)),
        quick(lambda x, y, m: cka(x, y, mask=m)),
        quick(lambda x, y, m: nhsic(x, y, mask=m)),
    ):
        found = value(fn(x, y, mask))
        expected = [
            [value(fn(x[i, j], y[i, j], mask[i, j])) for j in range(3)]
            for i in range(2)
        ]
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-7)


def test_float64_and_half_precision():
    expected = definition(gaussian(X, 1.0), gaussian(Y, 1.0), "biased")
    kernel = GaussianKernel(1.0, form="standard")
    found = hsic(X.astype("f2"), Y.astype("f2"), kernel, kernel)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(value(found), expected, rtol=5e-3)
    if not JAX:
        found = hsic(X.astype("f8"), Y.astype("f8"), kernel, kernel)
        assert keras.backend.standardize_dtype(found.dtype) == "float64"
        np.testing.assert_allclose(value(found), expected, rtol=1e-12)


def test_tiles(monkeypatch):
    """Tiles of 8 rows, the last one short; then as a program of its own."""
    kernel = GaussianKernel(1.0, form="standard")
    monkeypatch.setattr(tiles, "TILE", 1)
    monkeypatch.setattr(tiles, "EAGER_TILE", 1)
    tiles._programs.clear()
    k, l = gaussian(X, 1.0), gaussian(Y, 1.0)  # noqa: E741
    found = value(hsic(X[:39], Y[:39], kernel, kernel, "unbiased"))
    expected = definition(k[:39, :39], l[:39, :39], "unbiased")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    k, l = (m[np.ix_(MASK, MASK)] for m in (k, l))  # noqa: E741
    found = value(hsic(X, Y, kernel, kernel, mask=MASK))
    np.testing.assert_allclose(found, definition(k, l, "biased"), rtol=1e-4)
    # Of a compiled loop TensorFlow has no gradient.
    slope = gradient(lambda x: hsic(x, Y, kernel, kernel), X)
    expected = central(
        lambda x: definition(gaussian(x, 1.0), gaussian(Y, 1.0), "biased"), X
    )
    np.testing.assert_allclose(slope, expected, rtol=5e-3, atol=1e-6)
    # Another bandwidth is the same program; a function is never compiled.
    other = GaussianKernel(2.0, form="standard")
    hsic(X, Y, other, other, mask=MASK)
    hsic(X[:9], Y[:9], lambda a, b: other(a, b), other)
    assert len(tiles._programs) == 2
    tiles._programs.clear()


@pytest.mark.skipif(not JAX, reason="XLA's analyses are at hand in JAX")
def test_costs():
    """n = 4000: no n × n matrix (64 MB). From kernels: no n³ product.

    The test of n = 100,000 in O(n); 256 Fourier features never stand in memory
    for all of one variable (102 MB).
    """
    import jax

    def compiled(fn, *shapes):
        shapes = [jax.ShapeDtypeStruct(s, "float32") for s in shapes]
        return jax.jit(fn).lower(*shapes).compile()

    for estimator in ("biased", "unbiased"):
        program = compiled(
            lambda x, y, e=estimator: hsic(x, y, BLOG, BLOG, e),
            (4000, 10),
            (4000, 10),
        )
        extra = program.memory_analysis().temp_size_in_bytes
        assert extra <= 16e6
    program = compiled(hsic_from_kernels, (300, 300), (300, 300))
    costs = program.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs  # JAX < 0.5
    assert costs["flops"] < 30 * 300**2
    large = (100_000, 10)
    exact = compiled(
        lambda x, y: independence_test._moments(x, y, (BLOG, BLOG)),
        large,
        large,
    )
    fourier = compiled(
        lambda x, w, y, v: independence_test._fourier_moments((x, w), (y, v)),
        *(large, (10, 128)) * 2,
    )
    for program in (exact, fourier):
        assert program.memory_analysis().temp_size_in_bytes <= 60e6


# Gradients


def gradient(fn, x):
    slope = quick(
        lambda x: backend.value_and_grad(lambda x: (fn(x), None), x)[1]
    )
    return value(slope(ops.convert_to_tensor(x, "float32")))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient(estimator):
    x, y = X[:9], Y[:9]
    kernel = GaussianKernel(1.5, form="standard")
    found = gradient(lambda x: hsic(x, y, kernel, kernel, estimator), x)
    expected = central(
        lambda x: definition(gaussian(x, 1.5), gaussian(y, 1.5), estimator), x
    )
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


@slow_on_jax
def test_gradients_of_equal_samples_are_finite():
    x = np.repeat(X[:4], 3, axis=0)
    for kernel in (None, LaplacianKernel(), CosineKernel(), LINEAR):
        slope = gradient(lambda x, k=kernel: hsic(x, Y[:12], k), x)
        assert np.isfinite(slope).all()
        assert np.abs(slope).max() > 0
    assert np.isfinite(gradient(lambda x: cka(x, 0 * x), x)).all()


def one_sided(x, y, bandwidth=1.5, epsilon=1e-2):
    """The paper's script: R = KJ (KJ + ε n I)⁻¹, Σ R_x ∘ R_yᵀ."""
    n = len(x)
    j, ridge = np.eye(n) - 1 / n, epsilon * n * np.eye(n)
    r_x, r_y = (
        k @ np.linalg.inv(k + ridge)
        for k in (gaussian(x, bandwidth) @ j, gaussian(y, bandwidth) @ j)
    )
    return np.sum(r_x * r_y.T)


def test_nhsic():
    kernel = GaussianKernel(1.5, form="standard")
    found = nhsic(X, Y, kernel, kernel, epsilon=1e-2)
    np.testing.assert_allclose(value(found), one_sided(X, Y), rtol=1e-4)
    found = nhsic(X, Y, kernel, kernel, epsilon=1e-2, mask=MASK)
    np.testing.assert_allclose(
        value(found), one_sided(X[MASK], Y[MASK]), rtol=1e-4
    )
    x, y = X[:9], Y[:9]
    slope = gradient(lambda x: nhsic(x, y, kernel, kernel, 1e-2), x)
    expected = central(lambda x: one_sided(x, y), x)
    np.testing.assert_allclose(slope, expected, rtol=2e-3, atol=1e-4)
    slope = gradient(lambda x: nhsic(y, x, kernel, kernel, 1e-2), x)
    np.testing.assert_allclose(slope, expected, rtol=2e-3, atol=1e-4)


# Kin


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka(estimator):
    k, l = gaussian(X, 1.0), gaussian(Y, 2.0)  # noqa: E741
    expected = definition(k, l, estimator) / np.sqrt(
        definition(k, k, estimator) * definition(l, l, estimator)
    )
    both = [GaussianKernel(b, form="standard") for b in (1.0, 2.0)]
    found = value(cka(X, Y, *both, estimator))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    rotation, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    turned = 7 * X @ rotation + 3
    for kernel in (LINEAR, None):
        same = cka(X, turned, kernel, kernel, estimator)
        assert value(same) == pytest.approx(1, abs=1e-4)
    x, y = (t - t.mean(0) for t in (X.astype("f8"), Y.astype("f8")))
    norm = np.linalg.norm
    expected = norm(x.T @ y) ** 2 / norm(x.T @ x) / norm(y.T @ y)
    found = value(cka(X, Y, LINEAR, LINEAR))
    assert found == pytest.approx(expected, rel=1e-5)


def test_block_hsic():
    """The mean over blocks of 12; the last 4 of 40 are left out."""
    expected = np.mean(
        [
            definition(
                gaussian(X[i : i + 12], 1.0),
                gaussian(Y[i : i + 12], 1.0),
                "unbiased",
            )
            for i in (0, 12, 24)
        ]
    )
    kernel = GaussianKernel(1.0, form="standard")
    found = value(block_hsic(X, Y, kernel, kernel, block_size=12))
    np.testing.assert_allclose(found, expected, rtol=1e-4)

    def function(a, b):
        """Of `(n, dim)` and `(m, dim)`, as a function of the user's is."""
        assert a.shape[1:] == b.shape[1:] == (3,)
        d2 = ops.sum(ops.square(a[:, None] - b[None]), axis=2)
        return ops.exp(-d2 / 2)

    found = value(block_hsic(X, Y, function, kernel, block_size=12))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    traced = backend.jit(
        lambda x: block_hsic(x, Y, function, kernel, block_size=12)
    )
    found = value(traced(ops.convert_to_tensor(X)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="Received: block_size=41, n=40"):
        block_hsic(X, Y, block_size=41)
    with pytest.raises(ValueError, match="Received: block_size=3"):
        block_hsic(X, Y, block_size=3)
    square = PrecomputedKernel()
    with pytest.raises(ValueError, match="Received: PrecomputedKernel"):
        block_hsic(np.eye(40), Y, square, block_size=10)


@slow_on_jax
def test_fourier_hsic(monkeypatch):
    """Both forms of the Gaussian; the error falls as 1/√features."""
    for form in ("blog", "standard"):
        kernel = GaussianKernel(1.5, form=form)
        exact = definition(value(kernel(X, X)), value(kernel(Y, Y)), "biased")
        found = [
            value(fourier_hsic(X, Y, kernel, kernel, 4096, seed))
            for seed in range(4)
        ]
        assert np.mean(found) == pytest.approx(exact, rel=0.1)
        assert len({float(f) for f in found}) == 4
    again = fourier_hsic(X, Y, num_features=16, seed=0)
    assert value(again) == value(fourier_hsic(X, Y, num_features=16, seed=0))
    exact = value(hsic(X, Y, LINEAR, LINEAR))
    assert value(fourier_hsic(X, Y, LINEAR, LINEAR)) == pytest.approx(exact)
    # In blocks of 7 rows, the last one short.
    if not JAX:
        slope = gradient(lambda x: fourier_hsic(x, Y, seed=0), X)
    fourier._programs.clear()
    monkeypatch.setattr(fourier, "BLOCK_ROWS", 7)
    if not JAX:  # there a random state cannot be made inside of a program
        np.testing.assert_allclose(
            gradient(lambda x: fourier_hsic(x, Y, seed=0), X), slope, rtol=1e-3
        )
    assert value(fourier_hsic(X, Y, LINEAR, LINEAR)) == pytest.approx(exact)
    blocks = fourier_hsic(X, Y, num_features=16, seed=0)
    assert value(blocks) == pytest.approx(float(value(again)), rel=1e-4)
    fourier._programs.clear()
    with pytest.raises(ValueError, match="Received: num_features=7"):
        fourier_hsic(X, Y, num_features=7)
    with pytest.raises(ValueError, match="Received: DeltaKernel"):
        fourier_hsic(X, Y, DeltaKernel())


def test_concrete_values_are_told_from_traced_ones():
    seen = []
    x = ops.convert_to_tensor(X)
    backend.jit(lambda x: (seen.append(backend.is_concrete(x)), x)[1])(x)
    assert (backend.is_concrete(x), seen) == (True, [False])


# Errors


def test_at_least_one_sample():
    """No sample, also in each of several sets; of no set there is no HSIC."""
    pairs = (hsic, nhsic, cka, block_hsic, fourier_hsic, hsic_test)
    for n, function in itertools.product(((0, 2), (3, 0, 2)), pairs):
        with pytest.raises(ValueError, match=r"Expected .* Received"):
            function(np.zeros(n), np.zeros(n))
    with pytest.raises(ValueError, match="at least one sample"):
        dhsic([np.zeros((0, 2))] * 3)
    none = np.zeros((0, 5, 2))
    assert value(hsic(none, none)).shape == (0,)
    # The median of no distance, like that of masked samples.
    assert median_bandwidth(none[:, 0]) == 1
    assert value(median_bandwidth(none)).shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="Received: n=3"):
        hsic(X[:3], Y[:3], estimator="unbiased")
    with pytest.raises(ValueError, match=r"Received: x.shape=.40, 3., y.sh"):
        hsic(X, Y[:30])
    with pytest.raises(ValueError, match=r"Received: mask.shape=.1,."):
        hsic(X, Y, mask=np.ones(1))
    for kernel in (BLOG, LINEAR, DeltaKernel(), CosineKernel()):
        for convert in (np.asarray, ops.convert_to_tensor):
            with pytest.raises(ValueError, match="as many features"):
                kernel(convert(X[:4]), convert(X[:5, :1]))
    bad = np.where(np.arange(40)[:, None] == 3, np.nan, Y)
    with pytest.raises(ValueError, match="finite numbers in `y`"):
        hsic(X, bad)
    with pytest.raises(ValueError, match="finite numbers in `x`"):
        cka(np.full(40, np.inf), Y)
    for kernel in (LaplacianKernel, lambda b: GaussianKernel(b, form="blog")):
        for bandwidth in (0, -1.0, np.nan, np.inf):
            with pytest.raises(ValueError, match="Received: bandwidth="):
                kernel(bandwidth)
    with pytest.raises(TypeError, match="form"):
        GaussianKernel(1.0)
    with pytest.raises(ValueError, match="Received: form='rbf'"):
        GaussianKernel(1.0, form="rbf")
    with pytest.raises(ValueError, match="Received: GaussianKernel"):
        GaussianKernel(form="blog")(X, X)
    with pytest.raises(ValueError, match="Received: degree=0"):
        PolynomialKernel(0)
    with pytest.raises(ValueError, match="Received: kernel='gaussian'"):
        hsic(X, Y, "gaussian")
    with pytest.raises(ValueError, match="Received: estimator='best'"):
        hsic(X, Y, estimator="best")
    with pytest.raises(ValueError, match=r"Received: shape .40, 3."):
        hsic(X, Y, PrecomputedKernel())
    with pytest.raises(ValueError, match="Received: a call"):
        PrecomputedKernel()(X, X)
    with pytest.raises(ValueError, match="Received: epsilon=0"):
        nhsic(X, Y, epsilon=0)
