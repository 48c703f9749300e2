"""What the networks of denoising models see in a step (post 7038)."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, tensorflow_only, value

from blogkeras.denoising import (
    AnnealedScoreMatching,
    DenoisingAutoencoder,
    DenoisingDensityEstimator,
    DenoisingGenerator,
    hmc,
    mlp_log_density,
)
from blogkeras.state import StepSeed, draw_rows

X = np.random.default_rng(0).normal(size=(2048, 2)).astype("float32")


def network(*parts):
    return keras.Sequential([keras.Input((2,)), *parts])


def test_batch_normalization_sees_noisy_rows_once():
    """Moving averages after one step, by NumPy from the step's noise."""
    toy.reset()
    norm = layers.BatchNormalization(momentum=0.9)
    model = DenoisingAutoencoder(network(norm, layers.Dense(2)), 3.0, seed=0)
    model.compile("sgd", run_eagerly=TENSORFLOW)
    seed = StepSeed(ops.convert_to_tensor(model.draws.seed.value), 0)
    noisy = X + 3.0 * value(draw_rows(keras.random.normal, X.shape, seed))
    # `fit` without a second step.
    model.fit(X, batch_size=len(X), shuffle=False, verbose=0)
    np.testing.assert_allclose(
        value(norm.moving_mean), 0.1 * noisy.mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        value(norm.moving_variance), 0.9 + 0.1 * noisy.var(0), rtol=1e-4
    )


@slow_on_jax
@pytest.mark.parametrize(
    "name", ["estimator", "variate", "autoencoder", "annealed", "generator"]
)
def test_what_layers_add_to_the_loss_is_of_noisy_rows(name):
    """‖y‖² of y ~ N(0, s² + σ²) in the plane is 2 (s² + σ²) in the mean."""
    toy.reset()
    factor = 1e4  # beside which the rest of the loss is nothing
    net = network(
        layers.ActivityRegularization(l2=factor),
        layers.Dense(2 if name == "autoencoder" else 1, "tanh"),
    )
    if name == "annealed":
        model = AnnealedScoreMatching(net, [4.0, 3.0], 3.0, seed=0)
        expected = 2 * (1 + (4.0**2 + 3.0**2) / 2)
    elif name == "generator":
        # It gives rows of 0, and adds a loss of its own.
        generator = network(
            layers.Dense(2, kernel_initializer="zeros"), OneLoss(3 * factor)
        )
        # What a frozen density adds is a constant that is left out.
        frozen = network(
            layers.ActivityRegularization(l2=factor), layers.Dense(1)
        )
        model = DenoisingGenerator(generator, frozen, net, 4.0, seed=0)
        expected = 2 * 4.0**2 + 3
    else:
        expected = 2 * (1 + 4.0**2)
        if name == "autoencoder":
            model = DenoisingAutoencoder(net, 4.0, seed=0)
        else:
            model = DenoisingDensityEstimator(
                *(net, 4.0, 0, name == "variate"), seed=0
            )
    model.compile("sgd", run_eagerly=TENSORFLOW)
    if name != "generator":
        model.adapt(X)
    for step in (model.test_on_batch, model.train_on_batch):
        found = step(X, return_dict=True)["loss"] / factor
        assert found == pytest.approx(expected, rel=0.1)


class OneLoss(layers.Layer):
    """Hands a number to `add_loss`."""

    def __init__(self, number, **kwargs):
        super().__init__(**kwargs)
        self.number = number

    def call(self, x):
        self.add_loss(ops.convert_to_tensor(self.number, "float32"))
        return x


def test_regularizers_of_weights_count_once():
    """0.5 · 2² of a kernel of one 2; the rest is as without a regularizer."""
    losses = []
    for factor in (0.5, 0.0):
        toy.reset()
        kernel = keras.initializers.Constant([[2.0], [0.0]])
        model = DenoisingDensityEstimator(
            network(
                layers.Dense(
                    1,
                    kernel_initializer=kernel,
                    kernel_regularizer=keras.regularizers.L2(factor),
                )
            ),
            *(0.5, 0),
            seed=0,
        )
        model.compile("sgd", run_eagerly=TENSORFLOW)
        model.adapt(X)
        losses.append(model.test_on_batch(X)[0])
    assert losses[0] - losses[1] == pytest.approx(2.0, rel=1e-4)


@tensorflow_only
def test_the_methods_are_compiled_as_the_steps_are():
    """XLA on a CPU has no bicubic resizing, so it tells who compiles."""
    toy.reset()

    def pictures(width):
        return keras.Sequential(
            [
                keras.Input((2, 2, 1)),
                layers.UpSampling2D(2, interpolation="bicubic"),
                layers.Flatten(),
                layers.Dense(width),
                layers.Reshape((2, 2, 1) if width == 4 else (1,)),
            ]
        )

    x = np.ones((2, 2, 2, 1), "float32")
    denoiser = DenoisingAutoencoder(pictures(4), 1.0, seed=0)
    density = DenoisingDensityEstimator(pictures(1), 1.0, seed=0)
    energy = AnnealedScoreMatching(pictures(1), [1.0, 0.5], 0.5, seed=0)
    generator = DenoisingGenerator(
        pictures(4), mlp_log_density((2, 2, 1), (2,)), pictures(1), 1.0
    )
    calls = {
        denoiser: (lambda: denoiser.denoise(x), lambda: denoiser.score(x)),
        density: (
            lambda: density.log_density(x),
            lambda: density.sample(2, 1, seed=0),
            lambda: hmc(density, x, 1, 0.1, seed=0).x,
        ),
        energy: (lambda: energy.sample(2, 1, seed=0),),
        generator: (lambda: generator.sample(2, seed=0),),
    }
    for model, methods in calls.items():
        model.draws.iterations.assign(1)  # as if trained
        for options, before in (
            ({"jit_compile": False}, {"jit_compile": True}),
            ({"run_eagerly": True}, {}),  # "auto" is XLA
        ):
            # The program of another `compile` is not taken.
            model.compile("sgd", **before)
            with pytest.raises(tf_error(), match="Resize"):
                methods[0]()
            model.compile("sgd", **options)
            for method in methods:
                assert np.isfinite(method()).all()


def tf_error():
    import tensorflow as tf

    return tf.errors.InvalidArgumentError
