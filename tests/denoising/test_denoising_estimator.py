"""Densities and denoisers at one amount of noise (post 7038)."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, slow_on_tensorflow, value

from blogkeras import backend
from blogkeras.denoising import (
    DenoisingAutoencoder,
    DenoisingDensityEstimator,
    QuadraticHead,
    hmc,
    langevin,
    log_partition,
    mala,
    mlp_log_density,
    residual_log_density,
)
from blogkeras.denoising.energy import log_density_and_score

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (64, 2)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Gaussian(layers.Layer):
    """The log-density of N(0, v) up to a constant; v is trained."""

    def __init__(self, variance=1.0, **kwargs):
        super().__init__(**kwargs)
        self.variance = variance

    def build(self, input_shape):
        self.precision = self.add_weight(
            (),
            keras.initializers.Constant(1 / self.variance),
            name="precision",
        )

    def call(self, x):
        return -self.precision * ops.sum(ops.square(x), axis=-1) / 2

    def get_config(self):
        return {**super().get_config(), "variance": self.variance}


def without_base(model):
    """Takes the constant term away: the network is the log-density."""
    model.variance.assign(1e30)
    model.num_adapted.assign(1)
    return model


def small(sigma=0.5, seed=3, **kwargs):
    toy.reset()
    return DenoisingDensityEstimator(
        mlp_log_density((2,), (8, 8)), sigma, seed=seed, **kwargs
    )


def compiled(model, **kwargs):
    kwargs.setdefault("run_eagerly", TENSORFLOW)
    model.compile(keras.optimizers.Adam(0.01), **kwargs)
    return model


def test_signs_on_a_gaussian():
    """x ~ N(0, v), noise σ²: p̂ = N(0, v + σ²), all in closed form."""
    v, sigma = 2.0, 0.5
    model = DenoisingDensityEstimator(Gaussian(v + sigma**2), sigma)
    model.build((None, 2))
    without_base(model)
    x = np.array([[3.0, -1.0], [0.5, 0.25]], "float32")
    np.testing.assert_allclose(
        model.log_density(x), -(x**2).sum(-1) / (2 * 2.25), rtol=1e-6
    )
    np.testing.assert_allclose(model.score(x), -x / 2.25, rtol=1e-6)
    # The posterior mean of x given a noisy y is y v / (v + σ²).
    np.testing.assert_allclose(model.denoise(x), x * 2.0 / 2.25, rtol=1e-6)
    # Uphill in log-density is towards the data.
    assert (model.log_density(x / 2) > model.log_density(x)).all()


@keras.saving.register_keras_serializable(package="tests")
class Mixture(layers.Layer):
    """log ¼N(x; −c, v) + ¾N(x; c, v) in the plane, c = (1, ½)."""

    CENTER = np.array([1.0, 0.5], "float32")

    def __init__(self, variance, **kwargs):
        super().__init__(**kwargs)
        self.variance = variance

    def call(self, x):
        squares = [
            ops.sum(ops.square(x - sign * self.CENTER), axis=-1)
            for sign in (-1, 1)
        ]
        logits = -ops.stack(squares, -1) / (2 * self.variance)
        weights = np.log(np.array([0.25, 0.75], "float32"))
        return ops.logsumexp(logits + weights, axis=-1)


def test_a_mixture_point_by_point():
    """Log-density, score and posterior mean of two Gaussians, in NumPy."""
    v, sigma = 0.3, 0.7
    noisy = v + sigma**2
    model = DenoisingDensityEstimator(Mixture(noisy), sigma)
    model.build((None, 2))
    without_base(model)
    x = RNG.normal(size=(20, 2)).astype("float32")
    centers = np.stack([-Mixture.CENTER, Mixture.CENTER])
    distances = np.square(x[:, None] - centers).sum(-1)
    terms = np.array([0.25, 0.75]) * np.exp(-distances / (2 * noisy))
    density = terms.sum(-1)
    np.testing.assert_allclose(
        model.log_density(x), np.log(density), rtol=1e-5, atol=1e-6
    )
    share = terms / density[:, None]
    score = (share[..., None] * (centers - x[:, None])).sum(1) / noisy
    np.testing.assert_allclose(model.score(x), score, rtol=1e-5, atol=1e-5)
    # Of each part the posterior mean lies between its center and x.
    means = (sigma**2 * centers + v * x[:, None]) / noisy
    posterior = (share[..., None] * means).sum(1)
    np.testing.assert_allclose(
        model.denoise(x), posterior, rtol=1e-5, atol=1e-5
    )


def zeros(sigma, x):
    """A model whose density is N(μ, s² + σ²), with the moments of x."""
    model = small(sigma)
    model.network.set_weights([0 * w for w in model.network.get_weights()])
    model.adapt(x)
    return model


def test_the_distribution_of_samples():
    """From N(μ, s²), then ε = σ²/2: the variance of each step by hand."""
    model = zeros(0.5, X / 4 + np.array([3.0, -2.0], "float32"))
    model.draws.iterations.assign(1)  # as if trained
    mean, start = value(model.mean), float(value(model.variance))
    noisy, step, number = start + 0.25, 0.125, 4000
    for num_steps in (0, 3):
        variance = start
        for _ in range(num_steps):
            variance = (1 - step / (2 * noisy)) ** 2 * variance + step
        x = model.sample(number, num_steps, seed=num_steps)
        error = 4 * np.sqrt(variance / number)
        np.testing.assert_allclose(x.mean(0), mean, atol=error)
        np.testing.assert_allclose(
            np.cov(x.T),
            variance * np.eye(2),
            atol=4 * variance * np.sqrt(2 / number),
        )


def test_the_loss_is_one_for_a_constant_and_the_floor_for_the_truth():
    v, sigma, n = 2.0, 0.5, 40_000
    x = RNG.normal(0, v**0.5, (n, 2)).astype("float32")
    for variance, expected in ((1e30, 1.0), (v + sigma**2, v / (v + sigma**2))):
        model = DenoisingDensityEstimator(Gaussian(variance), sigma, seed=0)
        model.build((None, 2))
        compiled(without_base(model))
        logs = model.evaluate(x, batch_size=n, verbose=0, return_dict=True)
        # E‖σs + ε/σ‖²/d of the optimal score is its denoising error / σ².
        assert abs(logs["loss"] - expected) < 0.02
        # Without the noise of ‖ε‖², none of it is left for a constant.
        tolerance = 1e-5 if expected == 1 else 0.01
        assert abs(logs["denoising_loss"] - expected) < tolerance


def test_the_control_variate_makes_the_loss_less_noisy():
    """Exact score of N(0, 1), σ = 0.05: the noise left is of the order of σ."""
    x = RNG.normal(0, 1, (256, 2)).astype("float32")
    noise = []
    for control_variate in (False, True):
        model = DenoisingDensityEstimator(
            Gaussian(1 + 0.05**2), 0.05, 0, control_variate
        )
        model.build((None, 2))
        compiled(without_base(model))
        losses = []
        for seed in range(8):
            model.draws.seed.assign(seed)
            logs = model.evaluate(x, batch_size=256, verbose=0)
            losses.append(logs[1])
        noise.append(np.std(losses))
        assert abs(np.mean(losses) - 1 / 1.0025) < 0.005
    assert noise[1] < 0.2 * noise[0]


@slow_on_tensorflow
@pytest.mark.parametrize("control_variate", [False, True])
def test_a_gaussian_is_learnt(control_variate):
    x = RNG.normal(0, 1.5, (4096, 2)).astype("float32")
    model = DenoisingDensityEstimator(
        Gaussian(1.0), 0.5, 0, control_variate, seed=0
    )
    model.build((None, 2))
    rate = keras.optimizers.schedules.CosineDecay(0.04, 80)
    model.compile(keras.optimizers.Adam(rate), jit_compile=True)
    without_base(model)
    model.fit(x, batch_size=512, epochs=10, verbose=0)
    precision = float(value(model.network.precision))
    assert abs(precision * (x.var() + 0.25) - 1) < 0.05


@slow_on_tensorflow
def test_the_autoencoder_learns_the_closed_form_denoiser():
    """r(y) = C (C + σ²)⁻¹ y for N(0, C), found by Adam; the score likewise."""
    toy.reset()
    covariance = np.array([[2.0, 1.2], [1.2, 1.0]])
    x = RNG.multivariate_normal([0, 0], covariance, 4096).astype("float32")
    network = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    model = DenoisingAutoencoder(network, 0.8, seed=0)
    rate = keras.optimizers.schedules.CosineDecay(0.1, 240)
    model.compile(
        keras.optimizers.Adam(rate), jit_compile=True, steps_per_execution=8
    )
    model.fit(x, batch_size=512, epochs=30, verbose=0)
    precision = np.linalg.inv(np.cov(x.T) + 0.64 * np.eye(2))
    best = np.eye(2) - 0.64 * precision
    np.testing.assert_allclose(
        value(network.layers[-1].kernel), best, atol=0.03
    )
    y = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, -1.0]], "float32")
    np.testing.assert_allclose(model.denoise(y), y @ best, atol=0.1)
    np.testing.assert_allclose(model.score(y), -y @ precision, atol=0.15)


def test_gradients_of_second_order():
    """The loss's gradient against central differences of the loss."""
    toy.reset()
    dtype = "float64" if TENSORFLOW else "float32"
    keras.config.set_floatx(dtype)
    try:
        network = keras.Sequential(
            [
                keras.Input((2,)),
                layers.Dense(4, "tanh"),
                layers.LayerNormalization(),
                layers.Dense(1, use_bias=False),
            ]
        )
        x = ops.convert_to_tensor(X[:8], dtype)
        weight = network.layers[0].kernel

        def loss(w):
            with keras.StatelessScope([(weight, w)]):

                def total(x):
                    values = network(x)
                    return ops.sum(values), values

                _, score = backend.value_and_grad(total, x)
            return ops.mean(ops.square(score + x))

        w = ops.convert_to_tensor(value(weight), dtype)
        with backend.second_order():
            _, gradient = backend.value_and_grad(lambda w: (loss(w), ()), w)
            step = 1e-5 if TENSORFLOW else 1e-2
            for i, j in ((0, 0), (1, 3)):
                delta = np.zeros(w.shape, dtype)
                delta[i, j] = step
                slope = (loss(w + delta) - loss(w - delta)) / (2 * step)
                np.testing.assert_allclose(
                    value(gradient)[i, j],
                    value(slope),
                    rtol=1e-6 if TENSORFLOW else 1e-2,
                    atol=1e-8 if TENSORFLOW else 1e-4,
                )
    finally:
        keras.config.set_floatx("float32")


def test_layer_normalization_inside_a_model_is_right_to_second_order():
    """`log_density_and_score` enters `backend.second_order` by itself."""
    toy.reset()
    network = keras.Sequential(
        [
            keras.Input((3,)),
            layers.LayerNormalization(),
            layers.Dense(1, use_bias=False),
        ]
    )
    x = ops.convert_to_tensor(toy.DENSE[:4])

    def loss(x):
        _, score = log_density_and_score(network, x)
        return ops.sum(ops.square(score)), ()

    _, gradient = backend.value_and_grad(loss, x)
    step = 1e-2
    for i in range(3):
        delta = np.zeros((4, 3), "float32")
        delta[0, i] = step
        slope = (loss(x + delta)[0] - loss(x - delta)[0]) / (2 * step)
        np.testing.assert_allclose(
            value(gradient)[0, i], value(slope), rtol=2e-2, atol=1e-2
        )


def test_the_score_is_a_gradient():
    """Its Jacobian is symmetric: central differences of the score."""
    model = small()
    x = X[:5]
    step = 1e-2

    def slope(i):
        delta = np.eye(2, dtype="float32")[i] * step
        return (model.score(x + delta) - model.score(x - delta)) / (2 * step)

    np.testing.assert_allclose(slope(0)[:, 1], slope(1)[:, 0], atol=1e-3)


def test_moments_of_the_data():
    model = small()
    model.adapt(X)
    np.testing.assert_allclose(value(model.mean), X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        value(model.variance), X.var(0).mean(), rtol=1e-5
    )


@slow_on_tensorflow
def test_annealing():
    """From the data's scale to σ, geometrically, in half of the steps."""
    model = compiled(small(0.1, annealing_steps=10))
    model.adapt(X)
    scale = X.var(0).mean() ** 0.5
    sigmas = [float(model._sigma_at(np.int32(i), True)) for i in (0, 5, 10, 99)]
    np.testing.assert_allclose(
        sigmas, [scale, (scale * 0.1) ** 0.5, 0.1, 0.1], rtol=1e-5
    )
    assert abs(float(model._sigma_at(np.int32(0), False)) - 0.1) < 1e-7
    auto = compiled(small(0.1))
    auto.fit(X, batch_size=16, epochs=5, verbose=0)
    assert int(value(auto._annealing)) == 10
    auto.fit(X, batch_size=16, epochs=50, initial_epoch=49, verbose=0)
    assert int(value(auto._annealing)) == 10


def test_a_keras_schedule():
    decay = keras.optimizers.schedules.ExponentialDecay(1.0, 4, 0.5)
    model = compiled(small(decay))
    assert model.last_sigma == 1.0
    model.fit(X, batch_size=16, verbose=0)
    assert abs(model.last_sigma - 0.5) < 1e-6
    with pytest.raises(ValueError, match="schedule"):
        small(decay, annealing_steps=3)


def linear(sigma):
    """The smallest model, whose steps cost least."""
    toy.reset()
    network = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    return compiled(DenoisingAutoencoder(network, sigma, seed=0))


def test_a_schedule_that_comes_to_zero():
    decay = keras.optimizers.schedules.CosineDecay
    with pytest.raises(ValueError, match=r"above 0.*CosineDecay.* step 4"):
        linear(decay(1.0, 4)).fit(X, batch_size=16, verbose=0)
    line = keras.optimizers.schedules.PolynomialDecay
    with pytest.raises(ValueError, match=r"-0.125 at step 3"):
        small(line(1.0, 4, -0.5)).fit(X, batch_size=16, verbose=0)
    with pytest.raises(ValueError, match="step 0"):
        small(line(0.0, 4, 1.0))
    # Nobody knows how many steps a loop of one's own will make.
    model = linear(decay(1.0, 1))
    model.adapt(X)
    model.train_on_batch(X)
    for call in (model.train_on_batch, model.denoise, model.score):
        with pytest.raises(ValueError, match="step 1"):
            call(X)
    # It may stop above 0.
    model = linear(decay(1.0, 1, alpha=0.1))
    model.fit(X, batch_size=64, verbose=0)
    assert model.last_sigma == pytest.approx(0.1)


def test_sigma_is_in_the_logs_and_must_come_down():
    model = compiled(small(0.1, annealing_steps=4))
    model.adapt(X)
    with pytest.warns(UserWarning, match=r"after 2 of the 4 steps.*EarlySt"):
        fit = model.fit(X, batch_size=32, verbose=0)
    scale = X.var(0).mean() ** 0.5
    sigmas = scale * (0.1 / scale) ** (np.arange(2) / 4)
    np.testing.assert_allclose(fit.history["sigma"], sigmas.mean(), rtol=1e-4)
    # The second half, without a warning.
    model.fit(X, batch_size=32, verbose=0)
    logs = model.evaluate(X[:32], verbose=0, return_dict=True)
    assert logs["sigma"] == pytest.approx(0.1)


@pytest.mark.parametrize("control_variate", [False, True])
def test_the_gradient_of_the_loss(control_variate):
    """`compute_loss` against central differences of itself."""
    toy.reset()
    model = DenoisingDensityEstimator(
        mlp_log_density((2,), (3,), "tanh"), 0.5, 0, control_variate, seed=0
    )
    model.adapt(X)
    x = ops.convert_to_tensor(X[:8])
    kernel = model.network.layers[1].kernel

    def loss(w):
        # The scope keeps the metrics, by which the noise is numbered.
        with keras.StatelessScope([(kernel, w)]):
            return model.compute_loss(x, training=False), ()

    w = value(kernel)
    _, gradient = backend.value_and_grad(loss, ops.convert_to_tensor(w))
    step = 1e-2
    for i, j in ((0, 0), (1, 2)):
        delta = np.zeros(w.shape, "float32")
        delta[i, j] = step
        up, down = (
            float(loss(ops.convert_to_tensor(w + d))[0])
            for d in (delta, -delta)
        )
        np.testing.assert_allclose(
            value(gradient)[i, j], (up - down) / (2 * step), rtol=0.01
        )


def test_a_run_that_was_stopped_while_sigma_fell(tmp_path):
    """`annealing_steps="auto"` counts the steps of the `fit` that began."""

    def make():
        toy.reset()
        network = keras.Sequential(
            [keras.Input((2,)), layers.Dense(3, "relu"), layers.Dense(2)]
        )
        return compiled(DenoisingAutoencoder(network, 0.1, "auto", seed=3))

    path = str(tmp_path / "model.keras")
    checkpoint = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch or whole.save(path)
    )
    options = {"batch_size": 32, "shuffle": False, "verbose": 0}
    whole = make()
    whole.fit(X, epochs=4, callbacks=[checkpoint], **options)
    loaded = keras.saving.load_model(path)
    assert int(value(loaded._annealing)) == 4
    loaded.run_eagerly = TENSORFLOW
    for first, epochs in ((1, 2), (2, 4)):
        loaded.fit(X, initial_epoch=first, epochs=epochs, **options)
    assert toy.difference(toy.weights(whole), toy.weights(loaded)) == 0


@slow_on_jax
def test_resumed_is_uninterrupted(tmp_path):
    whole = compiled(small(0.1, annealing_steps=8))
    whole.fit(X, batch_size=16, epochs=4, shuffle=False, verbose=0)
    half = compiled(small(0.1, annealing_steps=8))
    half.fit(X, batch_size=16, epochs=2, shuffle=False, verbose=0)
    half.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(value(loaded.draws.iterations)) == 8
    loaded.run_eagerly = True
    loaded.fit(
        X, batch_size=16, epochs=4, initial_epoch=2, shuffle=False, verbose=0
    )
    assert toy.difference(toy.weights(whole), toy.weights(loaded)) == 0


def test_evaluation_sees_the_same_noise_each_time():
    model = compiled(small())
    model.fit(X, batch_size=16, verbose=0)
    first = model.evaluate(X, batch_size=16, verbose=0)
    assert model.evaluate(X, batch_size=16, verbose=0) == first
    assert int(value(model.draws.iterations)) == 4


def test_each_batch_and_each_seed_evaluates_with_other_noise():
    equal = np.repeat(X[:1], 32, 0)
    model, other = compiled(small(seed=3)), compiled(small(seed=4))
    model.adapt(X)
    other.adapt(X)
    other.network.set_weights(model.network.get_weights())

    def loss(model, x):
        return model.evaluate(x, batch_size=16, verbose=0, return_dict=True)[
            "denoising_loss"
        ]

    first = loss(model, equal[:16])
    assert abs(loss(model, equal) / first - 1) > 1e-3
    assert abs(loss(other, equal[:16]) / first - 1) > 1e-3


def test_a_last_batch_that_is_small_counts_by_its_rows():
    """The metric is a mean over rows, as Keras's own loss is."""
    model = compiled(small(annealing_steps=0))
    model.network.set_weights([0 * w for w in model.network.get_weights()])
    model.adapt(X[:1])  # of variance 0: the score is −(x − μ) / σ²
    x = X[:1] + np.r_[np.zeros((48, 2)), np.full((1, 2), 50.0)]
    logs = model.evaluate(x, batch_size=48, verbose=0, return_dict=True)
    assert abs(logs["denoising_loss"] / logs["loss"] - 1) < 0.01


def test_few_programs_for_any_number_of_rows():
    model = small()
    whole = model.score(X[:8])
    for rows in range(1, 8):
        np.testing.assert_allclose(
            model.score(X[:rows]), whole[:rows], rtol=1e-5, atol=1e-6
        )
    assert len(model._programs) == 4  # of 1, 2, 4 and 8 rows


def test_sample_weights_and_regularizers():
    """Rows of weight 0 have no part; the gradient is that of the others."""
    weights = np.r_[np.ones(32), np.zeros(32)].astype("float32")
    model = compiled(small(annealing_steps=0))
    model.adapt(X)
    x = X.copy()
    x[32:] = 50.0
    model.fit(x, x, sample_weight=weights, batch_size=64, verbose=0)
    other = compiled(small(annealing_steps=0))
    other.adapt(X)
    x[32:] = -7.0
    other.fit(x, x, sample_weight=weights, batch_size=64, verbose=0)
    for a, b in zip(
        toy.weights(model.network), toy.weights(other.network), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sampling_before_fitting_warns():
    with pytest.warns(UserWarning, match="not been trained"):
        samples = small().sample(3, num_steps=2, seed=0)
    assert samples.shape == (3, 2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = compiled(small())
    model.fit(X, batch_size=16, verbose=0)
    assert all(np.isfinite(w).all() for w in toy.weights(model))
    assert model.predict(X, verbose=0).dtype == np.float32


def test_rows_are_not_rounded_in_mixed_precision():
    """257 has nine binary digits, bfloat16 eight. The parts are of float32."""
    x = np.array([[257.0, 1.0]], "float32")
    flat = zeros(0.1, X)
    identity = keras.Sequential([keras.Input((2,)), layers.Identity()])
    # The network rounds nothing, so the model may not either.
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = DenoisingDensityEstimator(flat.network, 0.1)
    model.adapt(X)
    autoencoder = DenoisingAutoencoder(identity, 0.1)
    distance = x - X.mean(0)
    variance = X.var(0).mean() + 0.01
    np.testing.assert_allclose(
        model.log_density(x),
        -np.square(distance).sum(-1) / (2 * variance),
        rtol=1e-5,
    )
    np.testing.assert_allclose(model.score(x), -distance / variance, rtol=1e-5)
    np.testing.assert_array_equal(autoencoder.denoise(x), x)
    assert model(x).dtype == "float32"


@pytest.mark.parametrize("dtype", ["uint8", "float64", "int32"])
def test_any_numbers(dtype):
    x = (np.abs(X) * 10).astype(dtype)
    model = compiled(small(0.5))
    model.fit(x, batch_size=16, verbose=0)
    assert model.log_density(x).shape == (64,)
    assert model.denoise(x).shape == x.shape


def test_data_sets_and_unknown_lengths():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices(X).batch(16)
    model = compiled(small())
    model.fit(data, epochs=2, shuffle=False, verbose=0)
    assert int(value(model._annealing)) == 4
    np.testing.assert_allclose(value(model.mean), X.mean(0), rtol=1e-5)
    endless = (X[:16] for _ in range(8))
    model = compiled(small(annealing_steps=0))
    with pytest.raises(ValueError, match="adapt"):
        model.fit(endless, verbose=0)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        compiled(small()).fit(endless, verbose=0)


def test_bad_arguments():
    network = mlp_log_density((2,), (4,))
    for sigma in (0, -1, np.nan, np.inf, "1", True, None):
        with pytest.raises(ValueError, match="sigma"):
            DenoisingDensityEstimator(network, sigma)
        with pytest.raises(ValueError, match="sigma"):
            DenoisingAutoencoder(network, sigma)
    for steps in (-1, 2.0, "all", True):
        with pytest.raises(ValueError, match="annealing_steps"):
            DenoisingDensityEstimator(network, 0.1, steps)
    with pytest.raises(ValueError, match="network"):
        DenoisingDensityEstimator("mlp", 0.1)
    two = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="one number"):
        DenoisingDensityEstimator(two, 0.1).log_density(X)
    model = small()
    for name in ("loss", "metrics", "weighted_metrics", "loss_weights"):
        with pytest.raises(ValueError, match=f"no loss.*{name}="):
            model.compile("adam", **{name: ["mse"]})
    bad = X.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        compiled(model).fit(bad)
    with pytest.raises(ValueError, match="finite"):
        model.log_density(bad)
    with pytest.raises(ValueError, match="shape"):
        model.log_density(X[:, :1])
    with pytest.raises(ValueError, match="rows"):
        model.log_density(X[:0])


def test_the_quadratic_head():
    """(w₁·h + b₁)(w₂·h + b₂) + w₃·h² + b₃ in NumPy."""
    head = QuadraticHead()
    h = RNG.normal(size=(5, 3)).astype("float32")
    head.build(h.shape)
    head.set_weights([RNG.normal(size=w.shape) for w in head.get_weights()])
    first, second, third = (
        (value(part.kernel)[:, 0], value(part.bias)[0])
        for part in (head.first, head.second, head.third)
    )
    product = (h @ first[0] + first[1]) * (h @ second[0] + second[1])
    expected = product + h**2 @ third[0] + third[1]
    np.testing.assert_allclose(value(head(h))[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        layers.Dense(4, "relu"),
        layers.Activation("leaky_relu"),
        layers.ReLU(),
        layers.Dense(4, activation=layers.ReLU()),
        layers.Dense(4, "selu"),
        layers.Activation("selu"),
        layers.BatchNormalization(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_cannot_be_differentiated_twice_is_refused(part):
    network = keras.Sequential(
        [keras.Input((2,)), keras.Sequential([part]), layers.Dense(1)]
    )
    batch = isinstance(part, layers.BatchNormalization)
    with pytest.raises(ValueError, match="each row" if batch else "twice"):
        DenoisingDensityEstimator(network, 0.1)
    if batch:
        part.trainable = False
    DenoisingDensityEstimator(network, 0.1, allow_piecewise=not batch)


@pytest.mark.parametrize(
    "pool",
    [
        layers.MaxPooling2D(2),
        layers.GlobalMaxPooling2D(),
        layers.TimeDistributed(layers.MaxPooling1D(2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_max_pooling_is_refused(pool):
    network = keras.Sequential(
        [keras.Input((4, 4, 1)), pool, layers.Flatten(), layers.Dense(1)]
    )
    with pytest.raises(ValueError, match=r"MaxPooling.*average pooling"):
        DenoisingDensityEstimator(network, 0.1)
    DenoisingDensityEstimator(network, 0.1, allow_piecewise=True)


@slow_on_tensorflow
@pytest.mark.parametrize(
    "piecewise",
    [
        ops.relu,
        ops.abs,
        ops.sign,
        ops.round,
        ops.floor,
        ops.ceil,
        lambda x: ops.clip(x, -1.0, 1.0),
        lambda x: ops.maximum(x, 0.0),
        lambda x: ops.where(x > 0, x, 0 * x),
        lambda x: ops.min(x, axis=-1, keepdims=True),
    ],
    ids="relu abs sign round floor ceil clip maximum where min".split(),
)
def test_operations_between_layers_are_looked_at(piecewise):
    inputs = keras.Input((2,))
    network = keras.Model(inputs, layers.Dense(1)(piecewise(inputs)))
    with pytest.raises(ValueError, match="twice"):
        DenoisingDensityEstimator(network, 0.1)
    DenoisingDensityEstimator(network, 0.1, allow_piecewise=True)


def test_builders_let_piecewise_activations_pass_where_they_are_meant():
    for build, shape, sizes in (
        (mlp_log_density, (2,), (3,)),
        (residual_log_density, (4, 4, 1), (2,)),
    ):
        with pytest.raises(ValueError, match="allow_piecewise=True"):
            build(shape, sizes, activation="relu")
        build(shape, sizes, activation="relu", allow_piecewise=True)


def test_networks_that_are_built_by_their_first_rows():
    """What was asked before `fit` is asked of the trained weights after it."""
    network = keras.Sequential([layers.Dense(8, "swish"), layers.Dense(1)])
    model = compiled(DenoisingDensityEstimator(network, 0.5, 0, seed=0))
    before, score = model.log_density(X), model.score(X)
    assert model.row_shape == (2,)
    model.fit(X, epochs=2, verbose=0)
    after = model.log_density(X)
    np.testing.assert_allclose(after, value(model(X)), rtol=1e-5)
    assert np.abs(after - before).max() > 1e-2
    assert np.abs(model.score(X) - score).max() > 1e-2


def test_training_by_hand_asks_for_the_moments():
    model = compiled(small())
    with pytest.warns(UserWarning, match="Call `adapt`"):
        model.train_on_batch(X)
    model.adapt(X)
    model.train_on_batch(X)


def test_annealing_takes_half_of_the_epochs_that_are_run():
    model = compiled(small(0.5))
    model.fit(X, batch_size=16, epochs=6, initial_epoch=4, verbose=0)
    assert int(value(model._annealing)) == 2 * 4 // 2


def test_the_steady_loss_of_an_autoencoder():
    """Of the identity ‖ε‖² is all there is of the loss, and has the mean 1."""
    identity = keras.Sequential([keras.Input((2,)), layers.Identity()])
    model = compiled(DenoisingAutoencoder(identity, 0.1, seed=0))
    model.adapt(X)
    logs = model.evaluate(X, batch_size=16, verbose=0, return_dict=True)
    assert logs["denoising_loss"] == pytest.approx(1, abs=1e-4)
    assert abs(logs["loss"] - 1) > 1e-3


@pytest.mark.parametrize("head", ["linear", "quadratic"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_heads_are_not_rounded_in_mixed_precision(head, policy):
    """Log-densities beyond the range of float16, to six digits."""
    keras.config.set_dtype_policy(policy)
    network = mlp_log_density((2,), (8,), head=head)
    network.set_weights([1e3 * w for w in network.get_weights()])
    hidden = keras.Model(network.input, network.layers[-1].input)
    h = value(hidden(X), "float64")
    weights = [w.astype("float64") for w in network.get_weights()[2:]]
    products = [
        (h**2 if number == 2 else h) @ kernel + bias
        for number, (kernel, bias) in enumerate(
            zip(weights[::2], weights[1::2], strict=True)
        )
    ]
    expected = products[0]
    if head == "quadratic":
        expected = products[0] * products[1] + products[2]
    assert np.abs(expected).max() > 7e4
    found = value(network(X))
    assert found.dtype == "float32"
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_channels_are_last_whatever_keras_is_told():
    networks = []
    for data_format in ("channels_last", "channels_first"):
        keras.config.set_image_data_format(data_format)
        try:
            networks.append(residual_log_density((8, 4, 3), (2, 3)))
        finally:
            keras.config.set_image_data_format("channels_last")
    one, other = networks
    other.set_weights(one.get_weights())
    x = RNG.normal(size=(2, 8, 4, 3)).astype("float32")
    np.testing.assert_array_equal(value(one(x)), value(other(x)))


@slow_on_tensorflow
def test_whatever_the_float_type_of_keras(request):
    """Rows and noise are float32; NumPy's and JAX's other types do not meet."""
    request.addfinalizer(lambda: keras.config.set_floatx("float32"))
    keras.config.set_floatx("float64" if TENSORFLOW else "bfloat16")
    keras.config.set_dtype_policy("float32")
    model = compiled(small(0.5))
    model.fit(X, batch_size=32, verbose=0)
    assert model.sample(3, num_steps=4, seed=0).dtype == "float32"
    for sampler in (langevin, mala, hmc):
        x = sampler(lambda x: -ops.sum(x**2, -1), X, 2, 0.1, seed=0).x
        # Eight binary digits would repeat some of 128 numbers.
        assert len(np.unique(x)) == x.size
    found = log_partition(model, num_samples=99, num_steps=20)
    assert np.isfinite(found.value)
