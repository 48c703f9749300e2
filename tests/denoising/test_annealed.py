"""One energy for all amounts of noise: loss, temperatures, sampling."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, lower_train_step, replicated, value

from blogkeras.denoising import (
    AnnealedScoreMatching,
    QuadraticHead,
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


def test_the_papers_loss():
    """Σ‖(x − x̃)/σ₀² + ∇E(x̃)‖²/σ² with E = −log-density, times σ₀⁴/d."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(5, 2)) * 0.4
    gradient_of_energy = rng.normal(size=(5, 2))
    paper = np.square(-noise / 0.01 + gradient_of_energy).sum(-1) / 0.4**2
    score, unit = -gradient_of_energy, noise / 0.4
    ours = np.square(0.01 / 0.4 * score + unit).mean(-1)
    np.testing.assert_allclose(ours, paper * 0.1**4 / 2)


def test_temperature_of_the_energy():
    """Of N(0, 1) data the best gradient lies between those of the σ's."""
    model = small()
    model.compile(keras.optimizers.Adam(0.02), jit_compile=True)
    x = np.random.default_rng(0).normal(size=(2048, 2)).astype("float32")
    before = model.evaluate(x, batch_size=2048, verbose=0)[1]
    model.fit(x, batch_size=256, epochs=20, verbose=0)
    assert model.evaluate(x, batch_size=2048, verbose=0)[1] < before
    # Uphill is towards the middle, and the anomaly score rises outwards.
    far = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]], "float32")
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


def test_pictures():
    toy.reset()
    model = AnnealedScoreMatching(
        residual_log_density((4, 4, 1), (4, 4)), SIGMAS, seed=0
    )
    model.compile("adam", jit_compile=True)
    x = np.random.default_rng(0).integers(0, 2, (16, 4, 4, 1)).astype("uint8")
    model.fit(x, batch_size=8, verbose=0)
    assert model.sample(2, num_steps=5).shape == (2, 4, 4, 1)
    mask = np.zeros((4, 4), "bool")
    mask[:2] = True
    filled = model.inpaint(x[:3], mask, num_steps=5)
    np.testing.assert_array_equal(filled[:, :2], x[:3, :2])
    assert model.denoise(x).shape == x.shape
    assert model.anomaly_score(x).shape == (16,)


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


def test_one_and_two_replicas():
    weights = small().get_weights()

    def run(make):
        model = make()
        model.fit(X, batch_size=32, epochs=2, shuffle=False, verbose=0)
        keras.distribution.set_distribution(None)
        return [value(w) for w in model.trainable_variables]

    def make(**kwargs):
        model = AnnealedScoreMatching(
            mlp_log_density((2,), (8,), head="quadratic"), SIGMAS, seed=3
        )
        model.set_weights(weights)
        return compiled(model, **kwargs)

    one = run(make)
    two = run(
        lambda: replicated(
            lambda: make(run_eagerly=False, jit_compile=not TENSORFLOW)
        )
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(TENSORFLOW, reason="JAX exports for a TPU")
def test_the_train_step_lowers_for_a_tpu():
    lower_train_step(compiled(small()), X[:16])


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
    with pytest.warns(UserWarning, match="before `fit`"):
        model.sample(2, num_steps=1)
