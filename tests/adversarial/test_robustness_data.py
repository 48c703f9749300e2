"""`evaluate_robustness` takes what `evaluate` takes, and runs as it does."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, tensorflow_only

import blogkeras
from blogkeras import backend, evaluate_robustness

CHEAPLY = {"run_eagerly": TENSORFLOW}
X, Y = toy.DENSE[:10], toy.TARGETS[:10]


def mean_output(y, y_pred):
    return ops.mean(y_pred, axis=-1)


def linear(**kwargs):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.compile("sgd", mean_output, metrics=["mae"], **kwargs)
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return X[rows], Y[rows]


def generator():
    yield from (Batches()[index] for index in range(3))


def tensorflow_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def endless():
    while True:
        yield X[:4], Y[:4]


@slow_on_jax
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras's
@pytest.mark.parametrize(
    "data",
    [
        Batches,
        generator,
        pytest.param(tensorflow_data, marks=tensorflow_only),
    ],
    ids=["PyDataset", "generator", "tf.data"],
)
@pytest.mark.parametrize("relative", [False, True])
def test_datasets(data, relative):
    model = linear(**CHEAPLY)
    arguments = {"epsilons": (0.0, 0.5), "relative": relative, "verbose": 0}
    expected = evaluate_robustness(model, X, Y, batch_size=4, **arguments)
    if relative and data is generator:
        with pytest.raises(ValueError, match="read twice"):
            evaluate_robustness(model, data(), **arguments)
        return
    result = evaluate_robustness(model, data(), **arguments)
    for ours, theirs in zip(result.rows, expected.rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert result.mean_norm == pytest.approx(expected.mean_norm)


def test_a_dataset_without_end():
    model = linear(**CHEAPLY)
    ours = evaluate_robustness(
        model, endless(), epsilons=(0.5,), max_batches=2, verbose=0
    )
    theirs = evaluate_robustness(model, X[:4], Y[:4], (0.5,), verbose=0)
    assert ours.rows[0] == pytest.approx(theirs.rows[0], rel=1e-5)


def test_several_batches_in_one_call_and_callbacks():
    seen = []

    class See(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            seen.append((batch, logs))

    model = linear(steps_per_execution=2, **CHEAPLY)
    result = evaluate_robustness(
        model, X, Y, (0.0, 1.0), batch_size=4, verbose=0, callbacks=[See()]
    )
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert result.rows[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert [batch for batch, _ in seen] == [1, 3] or len(seen) == 2
    assert set(seen[-1][1]) == {"loss at 0", "loss at 1"}


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"jit_compile": True}, {True}),
        ({"jit_compile": False}, {False}),
        ({"run_eagerly": True}, set()),
    ],
)
def test_runs_as_it_was_compiled(monkeypatch, kwargs, expected):
    used = set()

    def jit(fn, xla):
        used.add(xla)
        return fn

    monkeypatch.setattr(backend, "jit", jit)
    evaluate_robustness(linear(**kwargs), X, Y, (0.1,), verbose=0)
    assert used == expected


class Preprocessed(keras.Model):
    """Turns texts into tokens in `fit` and `evaluate`, as KerasHub's tasks."""

    WORDS = ("", "good", "bad", "film")

    def tokens(self, texts):
        rows = [[self.WORDS.index(w) for w in t.split()] for t in texts]
        return np.array([row + [0] * (3 - len(row)) for row in rows], "int32")

    def evaluate(self, x=None, y=None, **kwargs):
        return super().evaluate(self.tokens(x), y, **kwargs)


def test_texts_of_a_model_that_preprocesses_them():
    tokens = keras.Input((3,), dtype="int32")
    h = layers.Embedding(4, 3, mask_zero=True, name="words")(tokens)
    outputs = layers.Dense(1)(layers.GlobalAveragePooling1D()(h))
    model = Preprocessed(tokens, outputs)
    model.compile("sgd", mean_output, **CHEAPLY)
    texts, y = ["good film", "bad film", "film"], np.zeros(3)
    result = evaluate_robustness(model, texts, y, (0.0, 1.0), verbose=0)
    expected = model.evaluate(texts, y, verbose=0)
    losses = result.column("loss")
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    w = np.linalg.norm(model.layers[-1].get_weights()[0])
    gain = w * np.mean(1 / np.sqrt([2, 2, 1]))
    np.testing.assert_allclose(losses[1] - losses[0], gain, rtol=1e-4)


@tensorflow_only
def test_text_vectorization_in_front():
    import tensorflow as tf

    texts = tf.constant([["good film"], ["bad film"], ["film"]])
    vectorize = layers.TextVectorization(output_sequence_length=3)
    vectorize.adapt(texts)
    inputs = keras.Input((1,), dtype="string")
    h = layers.Embedding(6, 3, mask_zero=True)(vectorize(inputs))
    outputs = layers.Dense(1)(layers.GlobalAveragePooling1D()(h))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), mean_output)
    y = np.zeros(3)
    result = evaluate_robustness(model, texts, y, (0.0, 1.0), verbose=0)
    losses = result.column("loss")
    clean = model.evaluate(texts, y, verbose=0)
    np.testing.assert_allclose(losses[0], clean, rtol=1e-5)
    w = np.linalg.norm(model.layers[-1].get_weights()[0])
    gain = w * np.mean(1 / np.sqrt([2, 2, 1]))
    np.testing.assert_allclose(losses[1] - losses[0], gain, rtol=1e-4)
    blogkeras.adversarial_training(
        model, method=blogkeras.FGM(1.0, "sample", site="output")
    )
    data = tf.data.Dataset.from_tensor_slices((texts, y)).batch(3)
    loss = model.fit(data, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(loss, clean + gain, rtol=1e-4)


class Norm(layers.Layer):
    """Adds the mean of w · x as a loss."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), name="w")

    def call(self, x):
        products = ops.sum(x * self.w, axis=-1)
        self.add_loss(ops.mean(products))
        return products


def test_a_loss_that_layers_add():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Norm()(inputs))
    model.compile("sgd", **CHEAPLY)
    result = evaluate_robustness(model, X, epsilons=(0.0, 2.0), verbose=0)
    (w,) = model.get_weights()
    expected = (X @ w).mean() + np.array([0, 2]) * np.linalg.norm(w)
    np.testing.assert_allclose(result.column("loss"), expected, rtol=1e-4)


@slow_on_jax
def test_a_policy_of_float64():
    try:
        keras.backend.set_floatx("float64" if TENSORFLOW else "float32")
        keras.config.set_dtype_policy("float64" if TENSORFLOW else "float32")
        model = linear(**CHEAPLY)
        w = np.linalg.norm(model.get_weights()[0])
        x, y = X.astype("float64"), Y.astype("float64")
        for attack in ("fgm", "pgd"):
            losses = evaluate_robustness(
                model, x, y, (0.0, 1.0), attack=attack, verbose=0
            ).column("loss")
            np.testing.assert_allclose(losses[1] - losses[0], w, rtol=1e-6)
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dropout(1e-9), layers.Dense(1)]
        )
        for name in blogkeras.adversarial.METHODS:
            model.compile("sgd", "mse", **CHEAPLY)
            for epsilon in (
                0.1,
                keras.optimizers.schedules.PolynomialDecay(0.1, 5),
            ):
                blogkeras.adversarial_training(
                    model, epsilon=epsilon, method=name
                )
                loss = model.fit(x, y, verbose=0).history["loss"]
                assert np.isfinite(loss).all()
    finally:
        keras.backend.set_floatx("float32")


def test_a_test_step_of_its_own_is_refused():
    class Own(keras.Model):
        def test_step(self, *args):
            return super().test_step(*args)

    inputs = keras.Input((3,))
    model = Own(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Own has a `test_step` of its own"):
        evaluate_robustness(model, X, Y, verbose=0)


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@tensorflow_only
def test_a_model_of_two_replicas():
    with toy.mirrored().scope():
        model = linear()
    one = linear(**CHEAPLY)
    one.set_weights(model.get_weights())
    results = [
        evaluate_robustness(m, X, Y, (0.0, 1.0), batch_size=4, verbose=0)
        for m in (one, model)
    ]
    for ours, theirs in zip(results[1].rows, results[0].rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
