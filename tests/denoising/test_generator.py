"""The generator: the gradient it gets, what is frozen, what it learns.

Post 7038.
"""

import operator

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, slow_on_tensorflow, value

from blogkeras import backend
from blogkeras.denoising import (
    DenoisingDensityEstimator,
    DenoisingGenerator,
    mlp_log_density,
)
from blogkeras.optimizers import SkipNonFinite
from blogkeras.state import StepSeed, draw_rows

needs_two_optimizers = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="Keras 3.15 has MultiOptimizer",
)
pytestmark = needs_two_optimizers


@keras.saving.register_keras_serializable(package="tests")
class KnownGaussian(layers.Layer):
    """log N(x; m, v) up to a constant."""

    def __init__(self, mean=0.0, variance=1.0, **kwargs):
        super().__init__(**kwargs)
        self.mean_of_it, self.variance_of_it = mean, variance

    def call(self, x):
        square = ops.sum(ops.square(x - self.mean_of_it), axis=-1)
        return -square / (2 * self.variance_of_it)

    def get_config(self):
        return {
            **super().get_config(),
            "mean": self.mean_of_it,
            "variance": self.variance_of_it,
        }


@keras.saving.register_keras_serializable(package="tests")
class Quadratic(layers.Layer):
    """bᵀx − ½ xᵀ A x: every Gaussian's log-density up to a constant."""

    def build(self, input_shape):
        dim = input_shape[-1]
        self.linear = self.add_weight((dim,), "zeros", name="linear")
        self.matrix = self.add_weight((dim, dim), "identity", name="matrix")

    def call(self, x):
        form = ops.sum(x * ops.matmul(x, self.matrix), axis=-1)
        return ops.sum(self.linear * x, axis=-1) - form / 2


def linear_generator():
    return keras.Sequential([keras.Input((2,)), layers.Dense(2)])


def small(seed=5, density=None):
    toy.reset()
    density = density or KnownGaussian(1.0, 2.0)
    return DenoisingGenerator(
        linear_generator(),
        density,
        mlp_log_density((2,), (8,)),
        0.5,
        seed=seed,
    )


def compiled(model, **kwargs):
    kwargs.setdefault("run_eagerly", TENSORFLOW)
    ratio = {
        name: kwargs.pop(name)
        for name in ("energy_steps", "generator_steps")
        if name in kwargs
    }
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.optimizers.Adam(0.02),
        **ratio,
        **kwargs,
    )
    return model


Z = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")


def test_the_gradient_of_the_generator():
    """By hand: mean over rows of zᵀ (∇log q̂ − ∇log p̂), both Gaussian."""
    toy.reset()
    model = DenoisingGenerator(
        linear_generator(),
        KnownGaussian(1.0, 2.0),
        KnownGaussian(-0.5, 0.8),
        0.5,
        seed=5,
    )
    kernel = model.generator.layers[-1].kernel
    z = ops.convert_to_tensor(Z)

    def loss(w):
        with keras.StatelessScope([(kernel, w)]):
            return model.compute_loss(z, y_pred=model(z, training=True)), ()

    w = ops.convert_to_tensor(value(kernel))
    _, gradient = backend.value_and_grad(loss, w)
    # The noise of the first step, then closed-form scores.
    seed = StepSeed(ops.convert_to_tensor(model.draws.seed.value), 0)
    unit = value(draw_rows(keras.random.normal, (64, 2), seed))
    y = Z @ value(kernel) + 0.5 * unit
    pull = -(y + 0.5) / 0.8 + (y - 1.0) / 2.0
    np.testing.assert_allclose(
        value(gradient), Z.T @ pull / len(Z), rtol=1e-5, atol=1e-5
    )


def test_the_density_of_the_data_stays_to_the_bit():
    toy.reset()
    estimator = DenoisingDensityEstimator(
        mlp_log_density((2,), (8,)), 0.5, seed=0
    )
    estimator.adapt(Z)
    before = [value(w) for w in estimator.weights]
    model = compiled(small(density=estimator))
    generator = [value(w) for w in model.generator.weights]
    model.fit(Z, batch_size=16, verbose=0)
    for old, new in zip(before, estimator.weights, strict=True):
        np.testing.assert_array_equal(old, value(new))
    assert toy.difference(generator, toy.weights(model.generator)) > 0
    assert (
        DenoisingGenerator(
            linear_generator(), estimator, mlp_log_density((2,), (8,))
        ).sigma
        == 0.5
    )


@slow_on_tensorflow
def test_a_gaussian_is_learnt_by_a_linear_generator():
    """Mean and covariance of the data within 5 %; p̂ given in closed form."""
    toy.reset()
    mean, covariance = np.array([2.0, -1.0]), np.array([[1.0, 0.6], [0.6, 0.8]])
    precision = np.linalg.inv(covariance + 0.25 * np.eye(2))  # noise 0.5
    target = Quadratic()
    target.build((None, 2))
    target.set_weights([precision @ mean, precision])
    model = DenoisingGenerator(
        linear_generator(), target, Quadratic(), 0.5, seed=1
    )
    steps = 1500
    rate = keras.optimizers.schedules.CosineDecay
    model.compile(
        keras.optimizers.Adam(rate(0.05, steps)),
        keras.optimizers.Adam(rate(0.01, steps), beta_1=0.5),
        jit_compile=True,
        steps_per_execution=50,
    )
    model.fit(batch_size=512, steps_per_epoch=steps, verbose=0)
    x = model.sample(20_000, seed=0)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.05)


@pytest.mark.parametrize(
    ("ratio", "moves"),
    [
        ({"energy_steps": 3}, ([0, 0, 1, 0, 0, 1], [1] * 6)),
        ({"generator_steps": 3}, ([1] * 6, [0, 0, 1, 0, 0, 1])),
    ],
)
def test_ratio_of_steps(ratio, moves):
    model = compiled(small(), **ratio)
    seen = [], []
    for _ in range(6):
        before = toy.weights(model.generator), toy.weights(model.model_density)
        model.train_on_batch(Z[:16])
        after = toy.weights(model.generator), toy.weights(model.model_density)
        for part in range(2):
            moved = toy.difference(before[part], after[part]) > 0
            seen[part].append(int(moved))
    assert seen == moves


def test_the_given_optimizers_are_used():
    """What their owner changes in them counts, at any ratio of steps."""
    model = small()
    sgd = keras.optimizers.SGD(1.0), keras.optimizers.SGD(0.5)
    options = {"energy_steps": 2, "run_eagerly": TENSORFLOW}
    # Twice: they may be given again, before and after training.
    model.compile(*sgd, **options)
    model.compile(*sgd, **options)
    assert sgd[1].gradient_accumulation_steps == 2
    config = model.get_compile_config()
    for name in ("optimizer", "generator_optimizer"):
        saved = config[name]["config"]["gradient_accumulation_steps"]
        assert saved is None
    sgd[1].learning_rate.assign(0.0)
    before = toy.weights(model.generator)
    for _ in range(2):
        model.train_on_batch(Z[:16])
    assert toy.difference(before, toy.weights(model.generator)) == 0
    model.compile(*sgd, **options)
    sgd[1].learning_rate.assign(0.5)
    for _ in range(2):
        model.train_on_batch(Z[:16])
    assert toy.difference(before, toy.weights(model.generator)) > 0
    with pytest.raises(ValueError, match="Expected a new optimizer"):
        model.compile(*sgd, generator_steps=2)


def test_guarded_optimizers_have_a_ratio_too():
    guards = [SkipNonFinite(keras.optimizers.SGD(0.1)) for _ in range(2)]
    model = small()
    model.compile(*guards, energy_steps=2, run_eagerly=TENSORFLOW)
    moved = []
    for _ in range(4):
        before = toy.weights(model.generator)
        model.train_on_batch(Z[:16])
        after = toy.weights(model.generator)
        moved.append(toy.difference(before, after) > 0)
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("guarded", [False, True])
def test_the_second_optimizer_decays_the_same_weights(guarded):
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model = small()
    model.compile(
        SkipNonFinite(optimizer) if guarded else optimizer,
        run_eagerly=TENSORFLOW,
    )
    kernel, bias = model.generator.trainable_variables
    bias.assign([1.0, 2.0])
    before = value(kernel)
    # Without a loss there is the decay alone.
    weight = np.zeros(64, "float32")
    model.fit(Z, Z, sample_weight=weight, batch_size=64, verbose=0)
    np.testing.assert_allclose(value(kernel), 0.95 * before, rtol=1e-6)
    np.testing.assert_array_equal(value(bias), [1.0, 2.0])


def test_sigma_is_that_of_the_density():
    def make(density, sigma):
        return DenoisingGenerator(
            linear_generator(), density, mlp_log_density((2,), (8,)), sigma
        )

    density = DenoisingDensityEstimator(mlp_log_density((2,), (8,)), 0.1)
    with pytest.raises(ValueError, match=r"data_density, 0.1 .*sigma=0.5"):
        make(density, 0.5)
    for sigma in (0.1, None):
        assert make(density, sigma).sigma == pytest.approx(0.1)
    # The last σ of a schedule is that of the steps made, which a config lacks.
    decay = keras.optimizers.schedules.ExponentialDecay(1.0, 4, 0.5)
    density = DenoisingDensityEstimator(mlp_log_density((2,), (8,)), decay)
    density.draws.iterations.assign(4)
    model = make(density, None)
    assert model.sigma == 0.5
    with pytest.raises(ValueError, match=r"sigma=1.0"):
        make(density, 1.0)
    assert DenoisingGenerator.from_config(model.get_config()).sigma == 0.5


@slow_on_tensorflow
@pytest.mark.parametrize("given", [True, False])
def test_resumed_is_uninterrupted(given, tmp_path):
    def fit(model, **kwargs):
        if given:
            model.fit(Z, batch_size=32, shuffle=False, verbose=0, **kwargs)
        else:
            model.fit(batch_size=32, steps_per_epoch=2, verbose=0, **kwargs)

    whole = compiled(small(), energy_steps=2)
    fit(whole, epochs=4)
    half = compiled(small(), energy_steps=2)
    fit(half, epochs=2)
    half.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = TENSORFLOW
    fit(loaded, epochs=4, initial_epoch=2)
    assert toy.difference(toy.weights(whole), toy.weights(loaded)) == 0
    assert not loaded.data_density.trainable


@slow_on_jax
def test_the_optimizer_of_the_frozen_density_is_saved(tmp_path):
    """Without Keras's warning, which would be an error here."""
    toy.reset()
    density = DenoisingDensityEstimator(
        mlp_log_density((2,), (4,)), 0.5, 0, seed=0
    )
    density.compile("adam", run_eagerly=True)
    density.fit(Z, batch_size=16, verbose=0)
    model = compiled(small(density=density))
    model.fit(Z, batch_size=32, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.data_density.trainable
    assert not loaded.data_density.trainable_variables
    assert int(value(loaded.data_density.optimizer.iterations)) == 4
    for name in ("optimizer", "data_density.optimizer"):
        ours, theirs = (
            operator.attrgetter(name)(part).variables
            for part in (loaded, model)
        )
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(value(a), value(b))


def test_samples_and_weights():
    model = compiled(small())
    with pytest.warns(UserWarning, match="not been trained"):
        model.sample(5, seed=0)
    before = [value(w) for w in model.trainable_variables]
    weight = np.zeros(64, "float32")
    model.fit(Z, Z, sample_weight=weight, batch_size=64, verbose=0)
    after = [value(w) for w in model.trainable_variables]
    assert toy.difference(before, after) == 0
    x = model.sample(5, seed=0)
    assert x.shape == (5, 2)
    np.testing.assert_array_equal(x, model.sample(5, seed=0))


def test_bad_arguments():
    make = linear_generator
    p, q = KnownGaussian(), mlp_log_density((2,), (4,))
    for bad in (None, "g", 3):
        with pytest.raises(ValueError, match="generator"):
            DenoisingGenerator(bad, p, q, 0.1)
        with pytest.raises(ValueError, match="data_density"):
            DenoisingGenerator(make(), bad, q, 0.1)
        with pytest.raises(ValueError, match="model_density"):
            DenoisingGenerator(make(), p, bad, 0.1)
    for sigma in (0, -1, "1", np.nan, None):
        with pytest.raises(ValueError, match="sigma"):
            DenoisingGenerator(make(), p, q, sigma)
    with pytest.raises(ValueError, match="shape of its input"):
        DenoisingGenerator(layers.Dense(2), p, q, 0.1)
    with pytest.raises(ValueError, match="share no weights"):
        DenoisingGenerator(make(), q, q, 0.1)
    model = small()
    for steps in (0, 1.0, "2", None, True):
        with pytest.raises(ValueError, match="energy_steps"):
            model.compile("adam", energy_steps=steps)
    with pytest.raises(ValueError, match="to be 1"):
        model.compile("adam", energy_steps=2, generator_steps=2)
    with pytest.raises(ValueError, match="loss"):
        model.compile("adam", loss="mse")
    adam = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="two optimizers"):
        model.compile(adam, adam)
    with pytest.raises(ValueError, match="accumulation"):
        model.compile(
            keras.optimizers.Adam(gradient_accumulation_steps=2),
            generator_steps=2,
        )
    with pytest.raises(ValueError, match="num"):
        model.sample(0)


def test_an_old_keras_is_told_so(monkeypatch):
    model = small()
    monkeypatch.delattr(keras.optimizers, "MultiOptimizer")
    with pytest.raises(ValueError, match=r"3.15"):
        model.compile("adam")
