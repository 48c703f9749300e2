"""One energy for all amounts of noise: loss, temperatures, sampling.

Post 7038.
"""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, slow_on_tensorflow

from blogkeras.denoising import (
    AnnealedScoreMatching,
    QuadraticHead,
    Samples,
    annealed_langevin,
    mlp_log_density,
    residual_log_density,
)

SIGMAS = [0.1, 0.2, 0.5, 1.0]
X = np.random.default_rng(0).normal(0, 1, (64, 2)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class PointMass(layers.Layer):
    """The exact answer for data that are all 0: −‖x‖² / 2σ₀² (or 2σ²)."""

    def __init__(self, sigma0=0.1, **kwargs):
        super().__init__(**kwargs)
        self.sigma0 = sigma0

    def call(self, inputs):
        x, sigma = inputs if isinstance(inputs, list) else (inputs, None)
        square = -ops.sum(ops.square(x), axis=-1) / 2
        if sigma is None:
            return square / self.sigma0**2
        return square / ops.square(sigma[:, 0])


def conditional_network():
    x, sigma = keras.Input((2,)), keras.Input((1,))
    h = layers.Concatenate()([x, ops.log(sigma)])
    h = layers.Dense(8, "swish")(h)
    return keras.Model([x, sigma], QuadraticHead()(h))


def small(conditional=False, seed=3):
    toy.reset()
    network = (
        conditional_network()
        if conditional
        else mlp_log_density((2,), (8,), head="quadratic")
    )
    return AnnealedScoreMatching(network, SIGMAS, 0.1, conditional, seed=seed)


def compiled(model, **kwargs):
    kwargs.setdefault("run_eagerly", TENSORFLOW)
    model.compile(keras.optimizers.Adam(0.01), **kwargs)
    return model


@pytest.mark.parametrize("conditional", [False, True])
def test_the_loss_of_known_answers(conditional):
    """0 for data at a point and the exact answer; 1 for a constant."""
    zeros = np.zeros((512, 2), "float32")
    model = AnnealedScoreMatching(PointMass(), SIGMAS, 0.1, conditional, seed=0)
    model.build((None, 2))
    compiled(model)
    assert model.evaluate(zeros, batch_size=512, verbose=0)[0] < 1e-9
    model = small(conditional)
    model.network.set_weights([0 * w for w in model.network.get_weights()])
    compiled(model)
    loss = model.evaluate(zeros, batch_size=512, verbose=0)
    assert abs(loss[0] - 1) < 0.2
    assert abs(loss[1] - 1) < 1e-5


@pytest.mark.parametrize("conditional", [False, True])
def test_the_loss_of_a_wrong_answer(conditional):
    """By hand, for data at 0 and the energy a‖x‖²/2, a = 1/0.2² or 1/σ².

    The paper: ‖(x − x̃)/σ₀² + ∇E(x̃)‖²/σ² is (a − 1/σ₀²)² ‖ε/σ‖², and σ₀⁴/d
    times its mean is (aσ₀² − 1)². With σ: the mean over `sigmas` of
    (aσ² − 1)², if all are drawn equally often.
    """
    if conditional:
        x, sigma = keras.Input((2,)), keras.Input((1,))
        # The second input has no part: a = 1.
        value = -ops.sum(ops.square(x), -1, keepdims=True) / 2 + 0 * sigma
        network = keras.Model([x, sigma], value)
        expected = np.mean((np.square(SIGMAS) - 1) ** 2)
    else:
        network = PointMass(sigma0=0.2)
        expected = (25 * 0.01 - 1) ** 2
    model = AnnealedScoreMatching(network, SIGMAS, 0.1, conditional, seed=0)
    model.build((None, 2))
    compiled(model)
    zeros = np.zeros((8192, 2), "float32")
    loss = model.evaluate(zeros, batch_size=8192, verbose=0)[0]
    assert abs(loss - expected) < 0.03


@slow_on_tensorflow
def test_temperature_of_the_energy():
    """Of N(0, s²), s = 0.3, the gradient lies between those of the σ's.

    The energy −b‖x‖²/2σ₀² has the loss (1 − b)² + b² mean(s²/σ²), at best
    1 − 1/(1 + mean(s²/σ²)) = 0.745. Another energy may be a little better.
    """
    model = small()
    model.compile(keras.optimizers.Adam(0.02), jit_compile=True)
    x = np.random.default_rng(0).normal(0, 0.3, (2048, 2)).astype("float32")
    fit = model.fit(x, batch_size=256, epochs=20, verbose=0)
    assert 0.6 < np.mean(fit.history["denoising_loss"][-8:]) < 0.77
    # Uphill is towards the middle, and the anomaly score rises outwards.
    far = np.array([[0.0, 0.0], [0.6, 0.0], [1.2, 0.0]], "float32")
    assert (np.diff(model.anomaly_score(far)) > 0).all()
    assert (model.score(far[1:]) * far[1:]).sum(-1).max() < 0


@pytest.mark.parametrize("conditional", [False, True])
def test_sampling_from_known_answers(conditional):
    """All mass at 0: annealed chains, then the jump lands on it."""
    model = AnnealedScoreMatching(PointMass(), SIGMAS, 0.1, conditional, seed=0)
    model.build((None, 2))
    model.draws.iterations.assign(1)  # as if trained
    x = model.sample(50, num_steps=100, seed=0)
    assert np.abs(x).max() < 1e-5
    noisy = model.sample(200, num_steps=100, denoise=False, seed=0)
    # ε/σ² = 1/5, so the variance is 0.01 / (1 − ε/4σ²), a little more before
    # the chains have cooled down.
    expected = 0.01 / (1 - 1 / 20)
    assert abs(noisy.var() / expected - 1) < 4 * (2 / 400) ** 0.5 + 0.1


def test_temperatures_of_the_samplers(monkeypatch):
    """T = (σ/σ₀)²: a fifth of the steps at the largest, then down to 1."""
    from blogkeras.denoising import annealed

    given = []

    def annealed_langevin(density, x, step_size, **kwargs):
        given.append(kwargs)
        return Samples(x, 1.0, 0)

    monkeypatch.setattr(annealed, "annealed_langevin", annealed_langevin)
    model = small()
    model.adapt(X)
    model.draws.iterations.assign(1)
    model.sample(2, num_steps=50, denoise=False)
    temperatures = given[0]["temperatures"]
    np.testing.assert_allclose(temperatures[:11], 100)
    np.testing.assert_allclose(
        temperatures[10:], np.geomspace(100, 1, 40), rtol=1e-6
    )
    # What is known has the noise of the level.
    np.testing.assert_allclose(
        np.square(given[0]["known_sigmas"]), 0.01 * temperatures, rtol=1e-6
    )


def test_the_largest_sigma_as_sigma0():
    """`np.geomspace(0.09, 0.09, 8)` rises by the last bit."""
    model = AnnealedScoreMatching(PointMass(0.09), [0.09, 0.05], 0.09)
    model.build((None, 2))
    model.draws.iterations.assign(1)
    assert np.abs(model.sample(2, num_steps=10, seed=0)).max() < 1e-5


COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])


@keras.saving.register_keras_serializable(package="tests")
class NoisyGaussian(layers.Layer):
    """log N(x; 0, COVARIANCE + σ²), of rows and their σ."""

    def call(self, inputs):
        x, sigma = inputs
        # The eigenvectors are (1, 1)/√2 and (1, −1)/√2.
        noise = ops.square(sigma[:, 0])
        total, difference = x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]
        return (
            -(
                ops.square(total) / (1.8 + noise)
                + ops.square(difference) / (0.2 + noise)
            )
            / 4
        )


def test_inpainting_draws_from_the_conditional_distribution():
    """Of a Gaussian, given x₁ = 1.5: each step's mean and variance by hand."""
    sigmas, known, rows = np.array([1.0, 0.6, 0.4]), 1.5, 2000
    model = AnnealedScoreMatching(NoisyGaussian(), sigmas, 0.4, True)
    model.build((None, 2))
    model.draws.iterations.assign(1)
    x = np.full((rows, 2), known, "float32")
    mask = np.array([True, False])
    filled = model.inpaint(x, mask, num_steps=90, seed=0)[:, 1]
    mean, variance = 0.0, 1.0  # the moments that an untrained model starts with
    for sigma in np.repeat(sigmas, 30):
        step = sigma**2 / 5
        # x₂ ← x₂ − ½ε (P₂₁ (x₁ + σ N(0, 1)) + P₂₂ x₂) + √ε N(0, 1).
        _, (p21, p22) = np.linalg.inv(COVARIANCE + sigma**2 * np.eye(2))
        mean = mean - step / 2 * (p21 * known + p22 * mean)
        variance = (1 - step / 2 * p22) ** 2 * variance
        variance += (step / 2 * p21 * sigma) ** 2 + step
    # The jump of the denoiser, where x₁ is what it is.
    mean = mean - sigma**2 * (p21 * known + p22 * mean)
    variance = (1 - sigma**2 * p22) ** 2 * variance
    error = 4 / np.sqrt(rows)
    assert abs(filled.mean() - mean) < error * np.sqrt(variance)
    assert abs(filled.var() / variance - 1) < error * np.sqrt(2)
    # Near the mean of x₂ given x₁ under the last noise, which chains approach.
    assert abs(mean - 0.8 * known / (1 + sigma**2)) < 0.1


def test_inpainting_before_fitting_warns():
    model = AnnealedScoreMatching(PointMass(), SIGMAS, 0.1)
    model.build((None, 2))
    with pytest.warns(UserWarning, match="not been trained"):
        model.inpaint(X[:2], np.array([True, False]), num_steps=1)


@pytest.mark.parametrize("conditional", [False, True])
def test_inpainting_keeps_what_is_known(conditional):
    model = small(conditional)
    model.adapt(X)
    model.draws.iterations.assign(1)
    x = X[:6].copy()
    x[:, 1] = np.nan
    mask = np.array([True, False])
    filled = model.inpaint(x, mask, num_steps=20, step_size=1e-4, seed=0)
    np.testing.assert_array_equal(filled[:, 0], X[:6, 0])
    assert np.isfinite(filled).all()
    bad = X[:6].copy()
    bad[:, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        model.inpaint(bad, mask, num_steps=2)


@slow_on_jax
def test_pictures():
    toy.reset()
    model = AnnealedScoreMatching(
        residual_log_density((4, 4, 1), (2, 2)), SIGMAS, seed=0
    )
    compiled(model)
    x = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 1)).astype("uint8")
    model.fit(x, batch_size=4, verbose=0)
    assert model.sample(4, num_steps=5).shape == x.shape
    mask = np.zeros((4, 4), "bool")
    mask[:2] = True
    filled = model.inpaint(x, mask, num_steps=5)
    np.testing.assert_array_equal(filled[:, :2], x[:, :2])
    assert model.denoise(x).shape == x.shape
    assert model.anomaly_score(x).shape == (4,)


@slow_on_tensorflow
@pytest.mark.parametrize("conditional", [False, True])
def test_resumed_is_uninterrupted(conditional, tmp_path):
    def fit(model, **kwargs):
        model.fit(X, batch_size=16, shuffle=False, verbose=0, **kwargs)
        return model

    whole = fit(compiled(small(conditional)), epochs=2)
    half = fit(compiled(small(conditional)))
    half.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = TENSORFLOW
    fit(loaded, epochs=2, initial_epoch=1)
    assert toy.difference(toy.weights(whole), toy.weights(loaded)) == 0


def test_bad_arguments():
    network = mlp_log_density((2,), (4,))
    for sigmas in ([0.1, 0.5, 0.2], [], [0.0, 1.0], "0.1", 0.1, None, [np.nan]):
        with pytest.raises(ValueError, match="sigmas"):
            AnnealedScoreMatching(network, sigmas)
    for sigma0 in (0.05, 2.0, 0, "1", None):
        with pytest.raises(ValueError, match="sigma0"):
            AnnealedScoreMatching(network, SIGMAS, sigma0)
    with pytest.raises(ValueError, match="conditional"):
        AnnealedScoreMatching(network, SIGMAS, conditional=1)
    rising = AnnealedScoreMatching(network, np.geomspace(0.1, 1, 10))
    assert rising.sigmas[0] == 1
    assert len(rising.sigmas) == 10
    model = small()
    with pytest.raises(ValueError, match="sigma"):
        model.score(X, sigma=0.5)
    with pytest.raises(ValueError, match="num_steps"):
        model.inpaint(X, np.array([True, False]), num_steps=0)
    with pytest.warns(UserWarning, match="not been trained"):
        model.sample(2, num_steps=1)


class RisesFarAway(layers.Layer):
    """−50 x² near 0; from 2.6 on it rises, and chains run away."""

    def call(self, inputs):
        x = inputs[:, 0]
        return -50 * x**2 + 120 * ops.square(ops.softplus(9 * x - 13.5) / 9)


def test_chains_that_run_away_are_drawn_anew():
    model = AnnealedScoreMatching(RisesFarAway(), SIGMAS, seed=0)
    model.build((None, 1))
    model.draws.iterations.assign(1)
    start = model._start(128, 1)
    # The same chains without another draw.
    way = np.r_[np.full(60, 1.0), np.geomspace(1.0, 0.1, 240)]
    alone = annealed_langevin(
        *(model, start, 2e-3, (way / 0.1) ** 2),
        seed=1,
        allow_non_finite=True,
    )
    lost = np.abs(alone.x[:, 0]) > 100
    assert 0 < lost.sum() == alone.num_non_finite < 64
    with pytest.warns(UserWarning, match=f"^{lost.sum()} of 128 chains"):
        x = model.sample(128, 300, denoise=False, seed=1)
    assert np.abs(x).max() < 2.6
    np.testing.assert_allclose(x[~lost], alone.x[~lost], rtol=1e-4, atol=1e-4)
    # Where they all run away there is nothing to draw.
    with pytest.raises(FloatingPointError, match="diverged at step"):
        model.sample(16, 300, step_size=1.0, seed=1)


class RisesInALine(layers.Layer):
    """−50 x², from 2.6 on a line uphill: chains go far, but never explode."""

    def call(self, inputs):
        x = inputs[:, 0]
        return ops.where(x < 2.6, -50 * x**2, 4e3 * (x - 2.6) - 338)


def test_chains_that_run_away_slowly_are_drawn_anew_too():
    model = AnnealedScoreMatching(RisesInALine(), SIGMAS, seed=0)
    model.build((None, 1))
    model.draws.iterations.assign(1)
    way = np.r_[np.full(60, 1.0), np.geomspace(1.0, 0.1, 240)]
    alone = annealed_langevin(
        *(model, model._start(128, 1), 2e-3, (way / 0.1) ** 2), seed=1
    )
    # 100 standard deviations of data of variance 1 with noise of variance 1.
    lost = np.abs(alone.x[:, 0]) > 141.4
    assert 0 < lost.sum() < 64
    with pytest.warns(UserWarning, match=f"^{lost.sum()} of 128 chains"):
        x = model.sample(128, 300, denoise=False, seed=1)
    assert np.abs(x).max() < 2.6
    np.testing.assert_allclose(x[~lost], alone.x[~lost], rtol=1e-4, atol=1e-4)


def test_a_line_uphill_is_an_error():
    """Each step of ε = σ₀²/5 = 0.002 goes 100 up a slope of 10⁵."""
    line = layers.Dense(1, kernel_initializer=keras.initializers.Constant(1e5))
    model = AnnealedScoreMatching(line, SIGMAS, seed=0)
    model.build((None, 2))
    model.draws.iterations.assign(1)
    with pytest.raises(FloatingPointError, match="4 of 4 chains ended more"):
        model.sample(4, 100, seed=0)


def test_what_is_known_stays_where_chains_run_away():
    model = AnnealedScoreMatching(RisesFarAway(), SIGMAS, seed=0)
    model.build((None, 2))
    model.draws.iterations.assign(1)
    x = np.tile([[0.0, 300.0]], (128, 1)).astype("float32")
    with pytest.warns(UserWarning, match="drawn anew"):
        filled = model.inpaint(x, np.array([False, True]), 300, seed=1)
    assert (filled[:, 1] == 300).all()
    assert np.abs(filled[:, 0]).max() < 2.6
