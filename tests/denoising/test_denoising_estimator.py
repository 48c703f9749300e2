"""Densities and denoisers at one amount of noise (post 7038)."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, value

from blogkeras import backend
from blogkeras.denoising import (
    DenoisingAutoencoder,
    DenoisingDensityEstimator,
    QuadraticHead,
    mlp_log_density,
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


def test_the_autoencoder_learns_the_closed_form_denoiser():
    """r(y) = y v / (v + σ²) for N(0, v): one weight, found by Adam."""
    toy.reset()
    x = RNG.normal(0, 1.5, (4096, 1)).astype("float32")
    network = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model = DenoisingAutoencoder(network, 0.8, seed=0)
    rate = keras.optimizers.schedules.CosineDecay(0.1, 80)
    model.compile(keras.optimizers.Adam(rate), jit_compile=True)
    model.fit(x, batch_size=512, epochs=10, verbose=0)
    slope = float(value(network.layers[-1].kernel)[0, 0])
    v = x.var()
    assert abs(slope - v / (v + 0.64)) < 0.03
    y = np.array([[2.0]], "float32")
    np.testing.assert_allclose(
        model.score(y), (model.denoise(y) - y) / 0.64, rtol=1e-5, atol=1e-6
    )


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


def test_operations_between_layers_are_looked_at():
    inputs = keras.Input((2,))
    network = keras.Model(inputs, layers.Dense(1)(ops.relu(inputs)))
    with pytest.raises(ValueError, match="twice"):
        DenoisingDensityEstimator(network, 0.1)
