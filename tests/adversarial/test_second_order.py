"""Penalties of the gradient through layers without second derivatives."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, tensorflow_only

import blogkeras
from blogkeras import GradientPenalty, NoiseStability, backend, training

RNG = np.random.default_rng(7)
X = RNG.normal(size=(2, 4, 4, 1)).astype("float32")
Y = np.array([0, 1])

MIDDLES = {
    "upsampling bilinear": lambda: layers.UpSampling2D(
        2, interpolation="bilinear"
    ),
    "upsampling bicubic": lambda: layers.UpSampling2D(
        2, interpolation="bicubic"
    ),
    "upsampling lanczos3": lambda: layers.UpSampling2D(
        2, interpolation="lanczos3"
    ),
    "upsampling nearest": lambda: layers.UpSampling2D(2),
    "resizing bilinear": lambda: layers.Resizing(6, 5),
    "resizing bicubic": lambda: layers.Resizing(6, 5, interpolation="bicubic"),
    "resizing nearest": lambda: layers.Resizing(6, 5, interpolation="nearest"),
    "resizing cropped": lambda: layers.Resizing(
        6, 5, crop_to_aspect_ratio=True
    ),
    "antialias": lambda: layers.Resizing(3, 3, antialias=True),
    "softsign": lambda: layers.Activation("softsign"),
    "silu": lambda: layers.Activation("silu"),
    "max pooling": lambda: layers.MaxPooling2D(2),
    "average pooling": lambda: layers.AveragePooling2D(2),
    "layer normalization": layers.LayerNormalization,
    "group normalization": lambda: layers.GroupNormalization(1),
}
# Seconds of compiling; the others are of the same kind.
SELDOM = (
    "upsampling bicubic",
    "resizing bilinear",
    "antialias",
    "upsampling lanczos3",
    "upsampling nearest",
    "resizing cropped",
    "silu",
    "max pooling",
    "average pooling",
    "group normalization",
)


def image_model(middle, head="softmax"):
    inputs = keras.Input((4, 4, 1))
    h = layers.Conv2D(2, 2, padding="same", activation="tanh")(inputs)
    h = layers.Conv2D(2, 2, padding="same", activation="tanh")(middle(h))
    outputs = layers.Dense(2, activation=head)(layers.Flatten()(h))
    return keras.Model(inputs, outputs)


def derivatives(model, method):
    """Of the penalized loss along random directions: exact, by differences."""
    found = {}

    def hook(objective, weights):
        site = blogkeras.adversarial.finding.find_site(model, None, "output")
        _evaluation, gradients = method.gradients(objective, weights, site)
        directions = [
            RNG.normal(size=w.shape).astype("float32") for w in weights
        ]

        def loss(h):
            moved = [
                w + h * d for w, d in zip(weights, directions, strict=True)
            ]
            return method.gradients(objective, moved, site)[0].loss

        h = 3e-3
        found["numeric"] = (loss(h) - loss(-h)) / (2 * h)
        found["exact"] = sum(
            ops.sum(backend.dense(g) * d)
            for g, d in zip(gradients, directions, strict=True)
        )
        plain, _ = objective.value_and_grad(objective, weights)
        return plain._replace(
            loss=ops.stack([found["numeric"], found["exact"]])[0]
        ), [0 * w for w in weights]

    training.install(model, hook)
    model.train_on_batch(X, Y)
    return float(found["exact"]), float(found["numeric"])


@slow_on_jax
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.verify) if n in SELDOM else n
        for n in MIDDLES
    ],
)
def test_gradient_of_the_penalty_by_finite_differences(name):
    model = image_model(MIDDLES[name]())
    model.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    exact, numeric = derivatives(model, GradientPenalty(300.0))
    np.testing.assert_allclose(exact, numeric, rtol=4e-2)


def test_the_stability_penalty_too():
    model = image_model(MIDDLES["upsampling bilinear"]())
    model.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    exact, numeric = derivatives(model, NoiseStability(30.0))
    np.testing.assert_allclose(exact, numeric, rtol=4e-2)


@tensorflow_only
@pytest.mark.parametrize("eagerly", [True, False])
def test_what_is_missing_is_told(eagerly):
    """An operation of TensorFlow itself: its path was dropped in silence."""
    import tensorflow as tf

    def resize(x):
        return tf.raw_ops.ResizeBilinear(images=x, size=(8, 8))

    model = image_model(layers.Lambda(resize, name="own_resize"))
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=eagerly)
    for method in (GradientPenalty(1.0), NoiseStability(1.0)):
        blogkeras.adversarial_training(model, method=method)
        with pytest.raises(ValueError, match=r"ResizeBilinearGrad.*own_resize"):
            model.fit(X, Y, verbose=0)
    # An attack needs first derivatives only.
    blogkeras.adversarial_training(model, method="fgm")
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()


def test_batches_of_several_sizes():
    """TensorFlow then traces a step of any batch size."""
    tokens = keras.Input((3,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(layers.Embedding(5, 4)(tokens))
    model = keras.Model(tokens, layers.Dense(2, activation="softmax")(h))
    model.compile("sgd", "sparse_categorical_crossentropy")
    blogkeras.adversarial_training(model, method=GradientPenalty(1.0))
    x, y = RNG.integers(0, 5, (10, 3)), RNG.integers(0, 2, 10)
    loss = model.fit(x, y, batch_size=4, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()


@pytest.mark.parametrize("eagerly", [True, False] if TENSORFLOW else [False])
def test_the_ctc_loss(eagerly):
    inputs = keras.Input((6, 3))
    model = keras.Model(inputs, layers.Dense(4)(inputs))
    model.compile(keras.optimizers.SGD(0.0), "ctc", run_eagerly=eagerly)
    x = RNG.normal(size=(2, 6, 3)).astype("float32")
    y = np.array([[1, 2], [3, 1]])
    blogkeras.adversarial_training(model, method=GradientPenalty(1.0))
    if TENSORFLOW:
        with pytest.raises(ValueError, match=r"no second derivative.*CTC"):
            model.fit(x, y, verbose=0)
    else:
        assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()
    blogkeras.adversarial_training(model, method="fgm")
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()


@tensorflow_only
def test_tensorflow_is_as_it_was_outside():
    import tensorflow as tf

    def functions():
        return (
            tf.nn.moments,
            tf.nn.softsign,
            tf.nn.ctc_loss,
            tf.image.resize,
        )

    before = functions()
    with backend.second_order():
        assert all(a is not b for a, b in zip(before, functions(), strict=True))
    assert functions() == before
