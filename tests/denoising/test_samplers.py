"""Chains against closed forms: moments, reversibility, divergence."""

import keras
import ml_dtypes
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import jax_only, value

from blogkeras.denoising import (
    annealed_langevin,
    chains,
    hmc,
    langevin,
    mala,
    mlp_log_density,
)
from blogkeras.denoising.chains import Samples
from blogkeras.denoising.energy import log_density_and_score
from blogkeras.denoising.kernels import leapfrog
from blogkeras.denoising.samplers import check_mask
from blogkeras.loops import ProgramCache

CHAINS = 1000
SPREAD = np.array([1.0, 0.5], "float32")  # standard deviations


class Gaussian(layers.Layer):
    """The log-density of N(0, scale²); keeps its programs, as our models do."""

    def __init__(self, dim):
        super().__init__()
        self.scale = self.add_weight((dim,), "ones", name="scale")
        self.built = True
        self._programs = ProgramCache(16)

    def call(self, x):
        square = ops.square(x / self.scale)
        return -ops.sum(ops.reshape(square, (ops.shape(x)[0], -1)), -1) / 2


GAUSSIANS = {}


def gaussian(scale):
    """The one layer for this dimension, now with these standard deviations."""
    scale = np.atleast_1d(scale)
    if len(scale) not in GAUSSIANS:
        GAUSSIANS[len(scale)] = Gaussian(len(scale))
    GAUSSIANS[len(scale)].scale.assign(scale)
    return GAUSSIANS[len(scale)]


def banana(x):
    """x₁ ~ N(0, 1), x₂ − x₁² ~ N(0, ½²): mean (0, 1), x₂ of variance 2 + ¼."""
    bent = (x[:, 1] - ops.square(x[:, 0])) / 0.5
    return -(ops.square(x[:, 0]) + ops.square(bent)) / 2


def check_moments(x, mean, variance, fourth=3.0):
    """Mean and variance within 4 Monte-Carlo errors of independent chains.

    `fourth` is the kurtosis of the target, 3 for a Gaussian.
    """
    mean, variance = np.asarray(mean), np.asarray(variance)
    error = np.sqrt(variance / len(x))
    assert (np.abs(x.mean(0) - mean) < 4 * error).all()
    error = variance * np.sqrt((fourth - 1) / len(x))
    assert (np.abs(x.var(0) - variance) < 4 * error).all()


def start(dim, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(CHAINS, dim)).astype("float32")


def scales(dim):
    return np.linspace(0.5, 1.0, dim)


@pytest.mark.parametrize("dim", [2, 10])
def test_langevin_has_its_own_variance(dim):
    """s² / (1 − ε/4s²), not s²: the two differ by a quarter at most here."""
    s, step = scales(dim), 0.2
    result = langevin(gaussian(s), start(dim), 60, step, seed=0)
    check_moments(result.x, np.zeros(dim), s**2 / (1 - step / (4 * s**2)))
    assert result.acceptance_rate == 1
    assert result.num_non_finite == 0
    assert langevin(gaussian(s), start(dim), 0, step).acceptance_rate == 1


def test_temperature():
    """At T the variance is T times as large; MALA and HMC likewise."""
    s = scales(2)
    step = 0.1
    result = langevin(gaussian(s), start(2), 120, step, 4.0, seed=0)
    check_moments(result.x, np.zeros(2), 4 * s**2 / (1 - step / (4 * s**2)))
    result = mala(gaussian(s), start(2), 40, 1.0, 4.0, seed=0)
    check_moments(result.x, np.zeros(2), 4 * s**2)
    result = hmc(gaussian(s), start(2), 15, 0.3, 5, 4.0, seed=0)
    check_moments(result.x, np.zeros(2), 4 * s**2)


@pytest.mark.parametrize("dim", [2, 10])
def test_mala_has_the_variance_of_the_target(dim):
    s = scales(dim)
    result = mala(gaussian(s), s * start(dim), 30, 0.4, seed=1)
    check_moments(result.x, np.zeros(dim), s**2)
    assert 0.5 < result.acceptance_rate < 1


@pytest.mark.parametrize("dim", [2, 10])
def test_hmc_has_the_variance_of_the_target(dim):
    s = scales(dim)
    result = hmc(gaussian(s), s * start(dim), 10, 0.15, 5, seed=1)
    check_moments(result.x, np.zeros(dim), s**2)
    assert 0.5 < result.acceptance_rate < 1


COVARIANCE = np.array([[1.0, 0.6], [0.6, 0.5]])


class Correlated(layers.Layer):
    """The log-density of N(0, COVARIANCE), which keeps its programs."""

    def __init__(self):
        super().__init__()
        self.built = True
        self.precision = np.linalg.inv(COVARIANCE).astype("float32")

    def call(self, x):
        return -ops.sum(x * ops.matmul(x, self.precision), axis=-1) / 2


def check_covariance(x, covariance):
    """All entries within 4 Monte-Carlo errors of independent chains."""
    variance = np.diag(covariance)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / len(x))
    assert (np.abs(np.cov(x.T) - covariance) < 4 * error).all()


@pytest.mark.parametrize("sampler", ["langevin", "mala", "hmc"])
def test_the_correlation_of_the_target(sampler):
    """From uncorrelated starts; what Langevin dynamics should have by hand."""
    x = np.random.default_rng(0).normal(size=(8 * CHAINS, 2))
    expected = COVARIANCE
    if sampler == "langevin":
        result = langevin(Correlated(), x, 30, 0.1, seed=0)
        # x ← A x + √ε N(0, 1), A = 1 − ½ε Σ⁻¹.
        matrix = np.eye(2) - 0.05 * np.linalg.inv(COVARIANCE)
        expected = np.eye(2)
        for _ in range(30):
            expected = matrix @ expected @ matrix + 0.1 * np.eye(2)
    elif sampler == "mala":
        result = mala(Correlated(), x, 80, 0.3, seed=0)
    else:
        result = hmc(Correlated(), x, 20, 0.25, 5, seed=0)
    check_covariance(result.x, expected)


def test_trajectories_that_come_back():
    """Ten leapfrog steps of 2 sin(π/20) turn N(0, 1)'s phase by π: x → −x."""
    start_at = np.full((CHAINS, 1), 2.0, "float32")
    args = gaussian(1.0), start_at, 60, 2 * np.sin(np.pi / 20), 10
    caught = hmc(*args, step_size_jitter=0, seed=0)
    np.testing.assert_allclose(np.abs(caught.x), 2, rtol=1e-3)
    assert caught.acceptance_rate > 0.99
    check_moments(hmc(*args, seed=0).x, [0.0], [1.0])


@pytest.mark.parametrize("sampler", ["mala", "hmc"])
def test_banana(sampler):
    # Exact draws, then chains: a sampler with another target leaves them.
    rng = np.random.default_rng(3)
    x = rng.normal(size=(CHAINS, 2))
    x[:, 1] = x[:, 0] ** 2 + 0.5 * x[:, 1]
    if sampler == "mala":
        result = mala(banana, x, 60, 0.3, seed=2)
    else:
        result = hmc(banana, x, 20, 0.3, 5, seed=2)
    # Fourth central moment of x₂ = u + z/2, u = x₁²: 60 + 6·2/4 + 3/16.
    kurtosis = np.array([3.0, (60 + 3 + 3 / 16) / 2.25**2])
    check_moments(result.x, [0.0, 1.0], [1.0, 2.25], kurtosis)
    assert 0.3 < result.acceptance_rate < 1


@pytest.mark.parametrize("sampler", ["mala", "hmc"])
def test_a_rejecting_chain_forgets_a_wrong_start(sampler):
    x = np.full((CHAINS, 2), 2.0, "float32")
    if sampler == "mala":
        result = mala(gaussian(SPREAD), x, 80, 0.4, seed=2)
    else:
        result = hmc(gaussian(SPREAD), x, 20, 0.2, 5, seed=2)
    check_moments(result.x, np.zeros(2), SPREAD**2)


def test_the_leapfrog_runs_backwards():
    x = start(3)[:50]

    def init(x):
        return (x, *log_density_and_score(gaussian(scales(3)), x))

    momentum = ops.convert_to_tensor(start(3, seed=9)[:50])
    state = init(ops.convert_to_tensor(x))
    there, pushed = leapfrog(init, state, momentum, 0.1, 20)
    assert np.abs(value(there[0]) - x).max() > 0.5
    back, returned = leapfrog(init, there, -pushed, 0.1, 20)
    assert np.abs(value(back[0]) - x).max() <= 1e-4
    assert np.abs(value(returned) + value(momentum)).max() <= 1e-4

    # What the dynamics keep, −log p + ‖r‖²/2, changes by the order of ε².
    def error(step_size, steps):
        new, r = leapfrog(init, state, momentum, step_size, steps)
        energy = value(new[1]) - (value(r) ** 2).sum(-1) / 2
        before = value(state[1]) - (value(momentum) ** 2).sum(-1) / 2
        return np.abs(energy - before).max()

    assert error(0.05, 40) < error(0.1, 20) / 3 < 0.1


def test_seeds_and_chunks():
    args = gaussian(SPREAD), start(2), 20, 0.1
    first = langevin(*args, seed=7).x
    np.testing.assert_array_equal(first, langevin(*args, seed=7).x)
    assert (first != langevin(*args, seed=8).x).any()
    generator = keras.random.SeedGenerator(1)
    one, two = (langevin(*args, seed=generator).x for _ in range(2))
    assert (one != two).any()
    assert (langevin(*args).x != langevin(*args).x).any()


def test_progress_does_not_change_a_bit(capsys):
    density, x = gaussian(SPREAD), start(2)
    quiet = mala(density, x, 45, 0.1, seed=7)
    assert not capsys.readouterr().out
    shown = mala(density, x, 45, 0.1, seed=7, verbose=1)
    assert "45/45" in capsys.readouterr().out
    np.testing.assert_array_equal(quiet.x, shown.x)


def test_a_model_is_read_at_each_call():
    """A layer with a cache of programs, and one without."""
    network = mlp_log_density((2,), (4,))
    for density in (network, gaussian(SPREAD)):
        before = langevin(density, start(2), 5, 0.1, seed=0).x
        density.set_weights([10 * w for w in density.get_weights()])
        after = langevin(density, start(2), 5, 0.1, seed=0).x
        assert (before != after).any()


def test_methods_of_a_layer_have_programs_of_their_own():
    class Tempered(Gaussian):
        def cold(self, x):
            return 100 * self(x)

    density = Tempered(2)
    for log_density, scale in [(density, 1), (density.cold, 0.1)] * 2:
        x = mala(log_density, start(2), 200, 0.01 * scale, seed=0).x
        assert (x.std() < 0.5) == (scale < 1)


def test_a_model_that_was_never_called():
    network = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(1)])
    x = hmc(network, start(2)[:8], 3, 0.1, seed=0).x
    assert np.isfinite(x).all()


def test_a_density_as_wide_as_floats():
    """MALA and HMC have no distance that is too far."""

    def wide(x):
        return -ops.sum(ops.square(x / 1e10), axis=-1) / 2

    result = hmc(wide, np.zeros((500, 1)), 50, 5e9, seed=0)
    assert result.num_non_finite == 0
    assert result.x.std() == pytest.approx(1e10, rel=0.15)


def test_no_steps():
    x = start(2)
    result = langevin(gaussian(SPREAD), x, 0, 0.1)
    np.testing.assert_array_equal(result.x, x)


def test_a_step_size_that_diverges_is_an_error():
    x = start(2)
    # Stable up to 4 times the least variance, which is 1 here.
    with pytest.raises(FloatingPointError, match="langevin diverged at step"):
        langevin(gaussian(SPREAD), x, 60, 2.0, seed=0)
    langevin(gaussian(SPREAD), x, 60, 0.9, seed=0)
    result = langevin(
        gaussian(SPREAD), x, 60, 2.0, seed=0, allow_non_finite=True
    )
    assert np.isfinite(result.x).all()
    assert result.num_non_finite == CHAINS
    with pytest.raises(FloatingPointError, match="largest"):
        annealed_langevin(
            gaussian(SPREAD), x, 2.0, np.ones(40), steps_per_level=4, seed=0
        )
    # The sign of an energy.
    with pytest.raises(FloatingPointError, match="energy"):
        langevin(lambda x: ops.sum(ops.square(x), -1), x[:9], 99, 0.5, seed=0)


@pytest.mark.parametrize("sampler", [mala, hmc])
def test_chains_that_hardly_move_give_a_warning(sampler):
    x = np.full((50, 2), 3.0, "float32")
    step = 500.0 if sampler is mala else 2.5
    with pytest.warns(UserWarning, match=f"hardly any.*step_size={step:g}"):
        result = sampler(gaussian(SPREAD), x, 20, step, seed=0)
    np.testing.assert_array_equal(result.x, x)
    assert result.acceptance_rate < 1e-6
    assert sampler(gaussian(SPREAD), x, 0, step).acceptance_rate == 0


@jax_only
@pytest.mark.filterwarnings("ignore:.*hardly any proposal")
def test_samplers_never_call_the_host(monkeypatch):
    """Their programs are lowered; those with a loop need not run."""
    import jax

    programs = []

    def compiler(_):
        def compile(fn):
            def run(*args):
                programs.append(jax.jit(fn).lower(*args).as_text())
                return fn(*args) if len(args) == 1 else args[2]

            return run

        return compile

    def calling(x):
        jax.debug.callback(lambda: None)
        return banana(x)

    monkeypatch.setattr(chains, "compiler", compiler)
    x = start(2)[:4]
    langevin(banana, x, 1, 0.1)
    mala(banana, x, 1, 0.1)
    hmc(banana, x, 1, 0.1, 2)
    annealed_langevin(banana, x, 0.1, [1.0])
    langevin(calling, x, 1, 0.1)
    # For each sampler a start and a loop.
    assert ["callback" in text for text in programs] == [False] * 8 + [True] * 2
    assert ["while" in text for text in programs] == [False, True] * 5


def test_some_chains_only():
    """A density with an edge: beyond it the logarithm is NaN."""

    def log_density(x):
        return ops.sum(ops.log(1 - x) + ops.log(1 + x), axis=-1)

    x = np.array([[0.0], [0.99]], "float32")
    result = mala(log_density, x, 50, 0.3, seed=0)
    assert 0 < result.num_non_finite <= 2
    assert (np.abs(result.x) < 1).all()


def test_annealing_by_temperature_ends_at_the_last_one():
    s = scales(2)
    temperatures, step = np.geomspace(100, 1, 40), 0.05
    result = annealed_langevin(
        gaussian(s), start(2), step, temperatures, steps_per_level=4, seed=0
    )
    # x ← (1 − ε/2s²) x + √(εT) N(0, 1), so the variance follows by hand.
    variance = np.ones(2)
    for t in np.repeat(temperatures, 4):
        variance = (1 - step / (2 * s**2)) ** 2 * variance + step * t
    check_moments(result.x, np.zeros(2), variance)
    cold = [1.0] + [0.0] * 39
    result = annealed_langevin(
        gaussian(s), start(2), 0.2, cold, steps_per_level=4, seed=0
    )
    assert np.abs(result.x).max() < 1e-3


def test_annealing_by_noise():
    """Point masses at 0 under noise σ: N(0, σ²), the exact score."""

    def log_density(x, sigma):
        return -ops.sum(ops.square(x), axis=-1) / (2 * ops.square(sigma))

    sigmas = np.geomspace(2.0, 0.1, 10)
    result = annealed_langevin(
        log_density,
        2 * start(2),
        0.5 * 0.1**2,
        sigmas=sigmas,
        steps_per_level=20,
        seed=0,
    )
    # ε/σ² is ½ at each level, so the variance there is σ² / (1 − ⅛).
    check_moments(result.x, np.zeros(2), np.full(2, 0.01 / (1 - 0.125)))


def test_what_is_known_stays():
    def log_density(x):
        return -ops.square(x[:, 0] - x[:, 1]) / 0.02

    x = np.zeros((64, 2), "float32")
    x[:, 0] = np.linspace(-1, 1, 64)
    mask = np.array([True, False])
    result = annealed_langevin(
        log_density, x, 0.005, np.geomspace(10, 1, 200), mask=mask, seed=0
    )
    np.testing.assert_array_equal(result.x[:, 0], x[:, 0])
    assert np.abs(result.x[:, 1] - x[:, 0]).max() < 0.6
    assert np.corrcoef(result.x.T)[0, 1] > 0.9


def test_the_noise_on_what_is_known():
    """Each step takes x₂ to x₁, which is 3 with noise of the last level."""

    def log_density(x):
        return -ops.square(x[:, 0] - x[:, 1]) / 2

    x = np.full((CHAINS, 2), 3.0, "float32")
    result = annealed_langevin(
        log_density,
        x,
        2.0,
        [0.0] * 5,
        mask=np.array([True, False]),
        known_sigmas=[1.0, 1.0, 1.0, 1.0, 0.5],
        seed=0,
    )
    np.testing.assert_array_equal(result.x[:, 0], 3)
    check_moments(result.x[:, 1:], [3.0], [0.25])


def test_masks():
    x = np.zeros((5, 4, 3, 2))
    for shape in ((5, 4, 3, 2), (4, 3, 2), (4, 3), (5, 4, 3)):
        mask = check_mask(np.ones(shape, "bool"), x)
        assert (np.zeros(x.shape, "bool") | mask).shape == x.shape
    for bad in (np.ones((4, 3)), np.ones(5, "bool"), None):
        with pytest.raises(ValueError, match="mask"):
            check_mask(bad, x)


def test_pictures_and_dtypes():
    for dtype in ("uint8", "float64", "int32", "float16", "bfloat16"):
        x = np.ones((3, 4, 4, 1), "float32").astype(
            ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        )
        result = langevin(gaussian(1.0), x, 2, 0.1)
        assert isinstance(result, Samples)
        assert result.x.shape == (3, 4, 4, 1)
        assert result.x.dtype == np.float32


def test_bad_arguments():
    x = start(2)[:4]
    f = gaussian(SPREAD)
    for step in (0, -1, np.nan, "1", None, True, np.inf):
        for sampler in (langevin, mala, hmc):
            with pytest.raises(ValueError, match="step_size"):
                sampler(f, x, 5, step)
    for steps in (-1, 2.0, "5", None, True):
        with pytest.raises(ValueError, match="num_steps"):
            langevin(f, x, steps, 0.1)
    with pytest.raises(ValueError, match="num_leapfrog"):
        hmc(f, x, 5, 0.1, 0)
    with pytest.raises(ValueError, match="temperature"):
        mala(f, x, 5, 0.1, 0)
    for bad in (x[0], x[:0], np.array([["a"]]), x * np.nan):
        with pytest.raises(ValueError, match="x"):
            langevin(f, bad, 5, 0.1)
    with pytest.raises(ValueError, match="log_density"):
        langevin("density", x, 5, 0.1)
    with pytest.raises(ValueError, match="one number"):
        langevin(lambda x: x, x, 5, 0.1)
    with pytest.raises(ValueError, match="starting points"):
        langevin(lambda x: ops.log(x[:, 0] - 100), x, 5, 0.1)
    with pytest.raises(ValueError, match="one of them"):
        annealed_langevin(f, x, 0.1)
    with pytest.raises(ValueError, match="largest to the smallest"):
        annealed_langevin(f, x, 0.1, [1.0, 2.0])
    with pytest.raises(ValueError, match="known_sigmas"):
        annealed_langevin(f, x, 0.1, [2.0, 1.0], known_sigmas=[1.0])
    for step_size, sigmas in ((1.0, [1e25, 1e-15]), (1e-40, [1.0])):
        with pytest.raises(ValueError, match="that float32 can hold"):
            annealed_langevin(lambda x, s: f(x), x, step_size, sigmas=sigmas)
    with pytest.raises(ValueError, match="seed"):
        langevin(f, x, 5, 0.1, seed=1.5)
    with pytest.raises(ValueError, match="allow_non_finite"):
        langevin(f, x, 5, 0.1, allow_non_finite=1)


def test_one_program_for_all_lengths_and_step_sizes():
    """A model of the room keeps its program; only shapes make a new one."""
    from blogkeras.denoising import DenoisingDensityEstimator

    toy.reset()
    model = DenoisingDensityEstimator(mlp_log_density((2,), (4,)), 0.5)
    x = start(2)[:4]
    for steps, size in ((2, 0.1), (3, 0.2)):
        langevin(model, x, steps, size, temperature=size)
    assert len(model._programs) == 1
    langevin(model, x[:2], 2, 0.1)
    assert len(model._programs) == 2
