"""log Z of given energies: no learning, the truth in closed form."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from kit import slow_on_tensorflow

from blogkeras.denoising import (
    DenoisingDensityEstimator,
    log_partition,
    mlp_log_density,
    toy_densities,
)

SCALE = 0.3
SETS = {
    "eight_gaussians": (-2.905, -2.834),
    "two_spirals": (-2.941, -2.719),
    "checkerboard": (-3.639, -3.559),
    "rings": (-3.085, -2.789),
}


def gaussian(dim):
    """N(μ, 0.3²): `(log_density, log Z, exact draws)`."""
    rng = np.random.default_rng(dim)
    mean = rng.normal(0, 0.5, dim).astype("float32")

    def log_density(x):
        return -ops.sum(ops.square((x - mean) / SCALE), axis=-1) / 2

    def draw(n):
        return mean + SCALE * rng.normal(size=(n, dim))

    return log_density, dim / 2 * math.log(2 * math.pi * SCALE**2), draw


def two_modes(dim):
    """Of weights ¼ and ¾, six standard deviations apart."""
    rng = np.random.default_rng(dim)
    centers = np.zeros((2, dim), "float32")
    centers[:, 0] = -0.9, 0.9
    weights = np.log(np.array([0.25, 0.75], "float32"))

    def log_density(x):
        squares = ops.sum(ops.square(x[:, None] - centers), axis=-1)
        return ops.logsumexp(weights - squares / (2 * SCALE**2), axis=-1)

    def draw(n):
        mode = (rng.uniform(size=n) < 0.75).astype(int)
        return centers[mode] + SCALE * rng.normal(size=(n, dim))

    return log_density, dim / 2 * math.log(2 * math.pi * SCALE**2), draw


def check_annealed(case, dim, chains, steps, tolerance=0.05):
    log_density, truth, draw = case(dim)
    result = log_partition(
        log_density,
        mean=np.zeros(dim),
        scale=1.0,
        num_samples=chains,
        num_steps=steps,
        samples=draw(chains),
        seed=0,
    )
    error = result.value - truth
    assert abs(error) < 3 * result.standard_error
    assert abs(error) < tolerance
    # They are bounds in expectation; the chains are finitely many.
    slack = 3 * result.standard_error
    assert result.lower - slack < truth < result.upper + slack
    assert result.lower < min(result.value, result.upper)
    backward = result.diagnostics["backward_value"]
    assert abs(backward - truth) < 2 * tolerance
    assert result.effective_sample_size > 0.1 * chains
    return result


@slow_on_tensorflow
def test_annealed_on_a_gaussian():
    check_annealed(gaussian, 2, 256, 100, 0.1)


@pytest.mark.verify
@pytest.mark.parametrize(
    ("case", "dim"),
    [*((gaussian, d) for d in (2, 6, 8, 21, 43)), (two_modes, 2)],
)
def test_annealed_on_given_energies(case, dim):
    check_annealed(case, dim, 1024, 3000)


@slow_on_tensorflow
def test_few_steps_backwards_are_unbiased():
    """The mean of 1 / weight is 1 / Z for any number of steps, if in order.

    With three steps the chains are far from every density on their way, and
    only the weights that belong to their moves have this mean.
    """
    rng = np.random.default_rng(0)
    center, scale, number = np.array([0.6, -0.4], "float32"), 0.7, 20_000
    samples = center + scale * rng.normal(size=(number, 2))

    def log_density(x):
        return -ops.sum(ops.square((x - center) / scale), axis=-1) / 2

    result = log_partition(
        log_density,
        mean=np.zeros(2),
        scale=1.0,
        num_samples=number,
        num_steps=3,
        samples=samples,
        seed=0,
    )
    truth = math.log(2 * math.pi * scale**2)
    assert abs(result.value - truth) < 0.02
    assert abs(result.diagnostics["backward_value"] - truth) < 0.02
    assert result.upper - truth > 0.02


def test_importance_in_few_dimensions():
    log_density, truth, _ = gaussian(2)
    result = log_partition(
        log_density, "importance", mean=np.zeros(2), scale=1.0, seed=0
    )
    assert abs(result.value - truth) < 3 * result.standard_error < 0.05
    # A reference that is the density itself has weights that are all equal.
    scale = np.array([0.5, 3], "float32")
    result = log_partition(
        lambda x: -ops.sum(ops.square(x / scale), axis=-1) / 2,
        "importance",
        mean=np.zeros(2),
        scale=scale,
        num_samples=100,
        seed=0,
    )
    assert abs(result.value - math.log(2 * math.pi * 0.5 * 3)) < 1e-5
    assert abs(result.effective_sample_size - 100) < 1e-2


def test_importance_in_many_dimensions_warns():
    log_density, truth, _ = gaussian(43)
    with pytest.warns(UserWarning, match="effective sample size"):
        result = log_partition(
            log_density, "importance", mean=np.zeros(43), scale=1.0, seed=0
        )
    assert result.value < truth - 10


def test_quadrature():
    def log_density(x):
        return -ops.sum(ops.square(x), axis=-1) / 2

    for dim in (1, 2):
        result = log_partition(
            log_density, "quadrature", bounds=[(-8, 8)] * dim, num_points=201
        )
        assert abs(result.value - dim / 2 * math.log(2 * math.pi)) < 1e-5
        assert result.standard_error < 1e-5
    with pytest.warns(UserWarning, match="edge"):
        log_partition(log_density, "quadrature", bounds=[(-1, 1)])
    # A box that is too coarse says so by its error.
    rough = log_partition(
        log_density, "quadrature", bounds=[(-30, 30)], num_points=11
    )
    assert rough.standard_error > 0.1


def test_the_mean_and_the_scale_of_a_model():
    model = DenoisingDensityEstimator(mlp_log_density((2,), (4,)), 0.5, seed=0)
    model.adapt(np.random.default_rng(0).normal(1, 2, (100, 2)))
    model.network.set_weights([0 * w for w in model.network.get_weights()])
    # Then the log-density is −‖x − μ‖² / 2(s² + σ²).
    assert model.noisy_scale**2 == pytest.approx(
        float(model.variance.numpy()) + 0.25
    )
    truth = math.log(2 * math.pi * (float(model.variance.numpy()) + 0.25))
    seed = keras.random.SeedGenerator(0)
    result = log_partition(model, num_samples=256, num_steps=50, seed=seed)
    assert abs(result.value - truth) < max(4 * result.standard_error, 1e-3)
    grid = log_partition(
        model, "quadrature", bounds=[(-15, 17)] * 2, num_points=201
    )
    assert abs(grid.value - truth) < 1e-3
    assert math.isnan(result.upper)
    assert result.lower < result.value
    # The program of the first call is used again, with another reference.
    wider = log_partition(
        model,
        scale=2 * model.noisy_scale,
        num_samples=256,
        num_steps=50,
        seed=seed,
    )
    assert abs(wider.value - truth) < 4 * wider.standard_error


def test_bad_arguments():
    log_density, _, _draw = gaussian(2)
    good = {"mean": np.zeros(2), "scale": 1.0}
    with pytest.raises(ValueError, match="method"):
        log_partition(log_density, "exact")
    with pytest.raises(ValueError, match="bounds"):
        log_partition(log_density, "importance", bounds=[(0, 1)], **good)
    with pytest.raises(ValueError, match="mean"):
        log_partition(log_density)
    for scale in (0, -1.0, np.nan, [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="scale"):
            log_partition(log_density, mean=np.zeros(2), scale=scale)
    for bounds in (None, 3, [(0, 1)] * 3, [(1, 0)], [(0, np.inf)]):
        with pytest.raises(ValueError, match=r"bounds|low"):
            log_partition(log_density, "quadrature", bounds=bounds)
    with pytest.raises(ValueError, match="odd"):
        log_partition(
            log_density, "quadrature", bounds=[(0, 1)] * 2, num_points=10
        )
    with pytest.raises(ValueError, match="num_samples"):
        log_partition(log_density, num_samples=1, **good)
    with pytest.raises(ValueError, match="samples of shape"):
        log_partition(log_density, samples=np.zeros((5, 3)), **good)
    with pytest.raises(ValueError, match="log_density"):
        log_partition("density", **good)
    with pytest.raises(ValueError, match="finite"):
        log_partition(lambda x: ops.log(x[:, 0] - 100), num_steps=2, **good)
    with pytest.raises(ValueError, match=r"3 of 3.* samples must be"):
        log_partition(
            lambda x: ops.where(x[:, 0] < 50, log_density(x), -np.inf),
            num_steps=2,
            samples=np.full((3, 2), 100.0),
            **good,
        )
    model = DenoisingDensityEstimator(mlp_log_density((2,), (4,)), 0.5)
    box = {"method": "quadrature", "bounds": [(0, 1)] * 2, "num_points": 3}
    for options in ({"num_steps": 2, **good}, box):
        with pytest.raises(ValueError, match="give the model itself"):
            log_partition(model.log_density, **options)
        with pytest.raises(ValueError, match=r"`keras\.ops`"):
            log_partition(lambda x: np.sum(np.asarray(x), -1), **options)


def test_a_density_between_the_points_of_the_coarser_grid():
    result = log_partition(
        lambda x: ops.where(ops.abs(x[:, 0] - 0.5) < 0.1, 0.0, -np.inf),
        "quadrature",
        bounds=[(-1, 1)],
        num_points=5,
    )
    assert result.value == pytest.approx(math.log(0.5))
    assert result.standard_error == math.inf


@pytest.mark.parametrize("name", SETS)
def test_toy_densities(name):
    """Normalized; the entropies of 16 million draws under a blurred grid."""
    density = getattr(toy_densities, name)
    x = density.sample(1000, seed=0)
    assert x.shape == (1000, 2)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, density.sample(1000, seed=0))
    noise = np.random.default_rng(1).normal(size=x.shape)
    for points, expected in zip((x + 0.1 * noise, x), SETS[name], strict=True):
        values = density.log_density(points, 0.1)
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - expected) < 4 * error + 0.001
    axis = np.arange(-5.9, 6, 0.2)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    total = np.exp(density.log_density(grid, 0.2)).sum() * 0.2**2
    assert abs(total - 1) < 1e-4


def plain_density(name, x, sigma):
    """The densities of the four sets at a point by slow sums and integrals."""

    def box(at, low, high):
        ends = ((end - at) / (sigma * math.sqrt(2)) for end in (low, high))
        below, above = map(math.erf, ends)
        return (above - below) / (2 * (high - low))

    if name == "eight_gaussians":
        variance = 1 / 8 + sigma**2
        angles = np.arange(8) * math.pi / 4
        centers = math.sqrt(8) * np.exp(1j * angles)
    elif name == "rings":
        variance = 0.08**2 + sigma**2
        # 5000 points on each circle stand for it.
        circle = np.exp(2j * math.pi * np.arange(5000) / 5000)
        centers = np.outer([0.75, 1.5, 2.25, 3.0], circle)
    elif name == "two_spirals":
        # As the points are drawn: w, u and v at equal distances.
        variance = 0.1**2 + sigma**2
        t = 3 * math.pi * np.sqrt((np.arange(2000) + 0.5) / 2000)
        side = (np.arange(20) + 0.5) / 40
        u, v = side[:, None, None], side[:, None]
        arm = (u - t * np.cos(t) + 1j * (v + t * np.sin(t))) / 3
        centers = np.stack([arm, -arm])
    else:
        squares = [
            (column, row)
            for column in range(4)
            for row in range(4)
            if (column + row) % 2 == 0
        ]
        return np.mean(
            [
                box(x[0], 2 * i - 4, 2 * i - 2)
                * box(x[1], 2 * j - 4, 2 * j - 2)
                for i, j in squares
            ]
        )
    distances = np.abs(complex(*x) - centers) ** 2
    bells = np.exp(-distances / (2 * variance)) / (2 * math.pi * variance)
    return bells.mean()


@pytest.mark.parametrize("name", SETS)
def test_toy_densities_point_by_point(name):
    x = np.random.default_rng(4).uniform(-3, 3, (6, 2))
    np.testing.assert_allclose(
        getattr(toy_densities, name).log_density(x, 0.3),
        np.log([plain_density(name, point, 0.3) for point in x]),
        atol=2e-3 if name == "two_spirals" else 1e-9,
    )


@pytest.mark.parametrize("name", SETS)
def test_toy_densities_far_away_and_under_much_noise(name):
    density = getattr(toy_densities, name)
    # Under noise of 1e17 each is one point.
    noisy = density.log_density([[0.0, 1.0]], 1e17)
    truth = -math.log(2 * math.pi) - 2 * math.log(1e17)
    np.testing.assert_allclose(noisy, truth, rtol=1e-9)
    assert density.log_density([[1e160, 0.0]], 0.1) == -math.inf
    far = density.log_density([[1e50, 0.0]], 0.1)
    assert -1e103 < far < -1e99


def test_toy_densities_without_noise():
    values = toy_densities.checkerboard.log_density([[1.0, 0.5], [1.0, -1.0]])
    inside, outside = sorted(values)[::-1]
    assert abs(inside + math.log(32)) < 1e-12
    assert outside == -math.inf
    with pytest.raises(ValueError, match="sigma"):
        toy_densities.rings.log_density([[0.0, 0.0]], -1)
    with pytest.raises(ValueError, match="n, 2"):
        toy_densities.rings.log_density([0.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        toy_densities.rings.log_density([[0.0, np.nan]])
    for n in (0, 1.0, None):
        with pytest.raises(ValueError, match="n"):
            toy_densities.rings.sample(n)
    assert "rings" in repr(toy_densities.rings)
