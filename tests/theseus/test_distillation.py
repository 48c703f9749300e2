"""Distillation: losses by NumPy, what outputs mean, masks, replicas."""

import math

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import (
    JAX,
    close_in_ulps,
    jax_only,
    lower_train_step,
    replicated,
    slow_on_jax,
    slow_on_tensorflow,
    value,
)

from blogkeras.theseus import Distillation

X = toy.DENSE[:16]
Y = toy.LABELS[:16]
TAGS = np.random.default_rng(1).integers(0, 3, (16, 5))


def dense(units=3, activation="tanh", **kwargs):
    layer = layers.Dense(
        units, activation, kernel_initializer="random_normal", **kwargs
    )
    layer.build((None, 3))
    return layer


def pair(units=3, activation="softmax"):
    """A teacher and a student, far from each other."""
    return [
        keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(
                    units,
                    activation,
                    kernel_initializer=keras.initializers.RandomNormal(
                        stddev=2.0, seed=seed
                    ),
                ),
            ]
        )
        for seed in (1, 2)
    ]


@pytest.mark.parametrize("from_logits", [False, True])
def test_distillation_loss(from_logits):
    """(1 - α) cross-entropy + α T² KL, recomputed with NumPy.

    Padding and the sample weights count in both; the teacher has no dropout.
    """
    inputs = keras.Input((5,), dtype="int32")
    teacher, student = (
        keras.Model(
            inputs,
            layers.Dense(3, None if from_logits else "softmax")(
                layers.Dropout(0.5)(
                    layers.Embedding(
                        11,
                        4,
                        mask_zero=True,
                        # Far from uniform, where KL is not symmetric.
                        embeddings_initializer=keras.initializers.RandomNormal(
                            stddev=3.0
                        ),
                    )(inputs)
                )
            ),
        )
        for _ in "ab"
    )
    model = Distillation(
        teacher, student, temperature=3.0, weight=0.25, from_logits=from_logits
    )
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits)
    model.compile("sgd", entropy)
    tokens = toy.TOKENS[:16]
    p, q = (value(m(tokens)).astype("float64") for m in (teacher, student))
    if from_logits:
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (p, q))
    weights, mask = np.resize(toy.WEIGHTS, (16, 5)), tokens != 0

    def softened(p):
        p = p ** (1 / 3)
        return p / p.sum(-1, keepdims=True)

    a, b = softened(p), softened(q)
    divergence = (a * np.log(a / b)).sum(-1)
    hard = -np.log(np.take_along_axis(q, TAGS[..., None], -1)[..., 0])
    both = weights * (0.75 * hard + 0.25 * 9 * divergence)
    x = ops.convert_to_tensor(tokens)
    found = model.compute_loss(x, TAGS, student(x), weights)
    np.testing.assert_allclose(float(found), both[mask].mean(), rtol=1e-5)
    rows = model.compute_loss(x, TAGS, student(x), weights[:, :1])
    even = np.repeat(weights[:, :1], 5, axis=1)
    other = model.compute_loss(x, TAGS, student(x), even)
    np.testing.assert_allclose(float(rows), float(other), rtol=1e-6)
    plain = model.compute_loss(x, TAGS, student(x), training=False)
    np.testing.assert_allclose(float(plain), hard[mask].mean(), rtol=1e-5)


def test_distillation_learns_the_student_only(tmp_path):
    teacher, student = (
        keras.Sequential([keras.Input((3,)), dense(), layers.Softmax()])
        for _ in "ab"
    )
    model = Distillation(teacher, student)
    assert [w.path for w in model.trainable_weights] == [
        w.path for w in student.trainable_weights
    ]
    before = toy.weights(teacher), toy.weights(student)
    toy.compiled(model).fit(X, Y, batch_size=8, verbose=0)
    assert toy.difference(before[0], toy.weights(teacher)) == 0
    assert toy.difference(before[1], toy.weights(student)) > 0
    model.save(tmp_path / "distillation.keras")
    loaded = keras.saving.load_model(tmp_path / "distillation.keras")
    close_in_ulps(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert model.detach() is student


@pytest.mark.parametrize("from_logits", [False, True])
def test_one_output_is_the_sigmoid_of_two_classes(from_logits):
    """KL of Bernoulli variables at temperature T, by NumPy."""
    teacher, student = pair(1, None if from_logits else "sigmoid")
    model = Distillation(teacher, student, 3.0, 1.0, from_logits)
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits))
    z, s = (value(m(X)).astype("float64")[:, 0] for m in (teacher, student))
    if not from_logits:
        z, s = (np.log(p / (1 - p)) for p in (z, s))
    p, q = (1 / (1 + np.exp(-z / 3)) for z in (z, s))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    y = (Y > 0).astype("float32")[:, None]
    found = model.compute_loss(ops.convert_to_tensor(X), y, student(X))
    np.testing.assert_allclose(float(found), 9 * kl.mean(), rtol=1e-4)


def test_weights_of_samples_may_be_a_column():
    model = Distillation(*pair(), weight=0.5)
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, w = ops.convert_to_tensor(X), toy.WEIGHTS[:16]
    found = [
        float(model.compute_loss(x, Y, model(x), weights))
        for weights in (w, w[:, None])
    ]
    assert found[0] == found[1]


def test_the_teacher_is_frozen_again():
    teacher, student = pair()
    model = Distillation(teacher, student)
    teacher.trainable = True
    toy.compiled(teacher).fit(X, Y, verbose=0)
    before = toy.weights(teacher)
    toy.compiled(model).fit(X, Y, verbose=0)
    assert toy.difference(before, toy.weights(teacher)) == 0


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
def test_two_replicas_distil_as_one():
    found = []
    for replicas in (1, 2):
        toy.reset()

        def make():
            return toy.compiled(
                Distillation(*pair(), weight=1.0), keras.optimizers.SGD(0.1)
            )

        model = replicated(make) if replicas == 2 else make()
        history = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        keras.distribution.set_distribution(None)
        found.append((toy.weights(model), history.history["loss"]))
    assert toy.difference(found[0][0], found[1][0]) <= 1e-6
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)


def test_bad_distillation():
    teacher, student = pair()
    with pytest.raises(ValueError, match=r"`student` to be a Keras.*None"):
        Distillation(teacher, None)
    with pytest.raises(ValueError, match=r"weights of its own.*kernel.*both"):
        Distillation(teacher, keras.Sequential([teacher, student]))
    inputs = keras.Input((3,))
    two = keras.Model(inputs, {"a": student(inputs), "b": student(inputs)})
    for other in (pair(4)[1], two):
        model = Distillation(teacher, other)
        with pytest.raises(ValueError, match="of the same names and shapes"):
            model.compile("sgd", "sparse_categorical_crossentropy")
    for name, wrong in {
        "teacher": [None, "bert", keras.layers.Dense],
        "student": [None, "bert", keras.layers.Dense],
        "temperature": [0, -1, None, "2", True, math.inf, math.nan, [2.0]],
        "weight": [-0.1, 1.1, None, "1", True, math.nan],
        "from_logits": [0, "yes", [1, True]],
        "output_kind": ["logits", True, 1, ["softmax", "x"], {"a": "x"}],
    }.items():
        for x in wrong:
            arguments = {"teacher": teacher, "student": student, name: x}
            with pytest.raises(ValueError, match=r"Expected .*Received: "):
                Distillation(**arguments)


# What the outputs mean


def constant(*outputs):
    """A model whose outputs are these numbers, whatever it is given."""
    x = keras.Input((3,))
    heads = [
        layers.Dense(
            len(numbers),
            kernel_initializer="zeros",
            name=f"out_{i}",
        )(x)
        for i, numbers in enumerate(outputs)
    ]
    model = keras.Model(x, heads[0] if len(heads) == 1 else heads)
    for i, numbers in enumerate(outputs):
        model.get_layer(f"out_{i}").bias.assign(numbers)
    return model


def divergence_of(teacher, student, loss, temperature=1.0, **kwargs):
    """What `fit(x)` at weight 1 reports: T² D."""
    model = Distillation(teacher, student, temperature, 1.0, **kwargs)
    model.compile("sgd", loss, run_eagerly=True)
    return float(model.evaluate(X[:4], verbose=0))


BERNOULLI = 0.9 * np.log(9) + 0.1 * np.log(1 / 9)


def test_labels_that_do_not_exclude_each_other():
    """Three labels, .9 and .1: the KL of a Bernoulli variable, 1.7578."""
    found = divergence_of(
        constant([0.9] * 3), constant([0.1] * 3), "binary_crossentropy"
    )
    np.testing.assert_allclose(found, BERNOULLI, rtol=1e-5)
    z = np.log(9)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    found = divergence_of(constant([z] * 3), constant([-z] * 3), loss)
    np.testing.assert_allclose(found, BERNOULLI, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_numbers(temperature):
    found = divergence_of(constant([5.0]), constant([1.5]), "mse", temperature)
    np.testing.assert_allclose(found, 12.25, rtol=1e-6)


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def test_logits_are_read_off_the_loss():
    """T² KL of logits of which many are negative, by NumPy."""
    z, s = np.array([3.0, -2.0, -1.0]), np.array([-1.0, 0.5, -3.0])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = divergence_of(constant(z), constant(s), loss, 2.0)
    p, q = softmax(z / 2), softmax(s / 2)
    np.testing.assert_allclose(found, 4 * np.sum(p * np.log(p / q)), rtol=1e-5)


def test_a_teacher_of_logits_and_a_student_of_probabilities():
    z, q = np.array([3.0, -2.0, -1.0]), np.array([0.2, 0.5, 0.3])
    teacher = constant(z)
    teacher.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    loss = "sparse_categorical_crossentropy"
    expected = np.sum(softmax(z) * np.log(softmax(z) / q))
    found = divergence_of(teacher, constant(q), loss)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A loss that does not tell leaves the student's word for both.
    p = np.array([0.1, 0.1, 0.8])
    teacher = constant(p)
    teacher.compile(loss=lambda y, f: ops.mean(f - y))
    found = divergence_of(teacher, constant(q), loss)
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q)), rtol=1e-5)
    teacher.compile(loss="mse")
    with pytest.raises(ValueError, match="'numbers' and 'softmax'"):
        divergence_of(teacher, constant(q), loss)


def test_the_students_own_loss_is_not_contradicted():
    """A classifier of KerasHub comes compiled, with logits."""
    teacher, student = constant([3.0, -2.0]), constant([-1.0, 0.5])
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    student.compile(loss=logits)
    model = Distillation(teacher, student)
    with pytest.raises(ValueError, match="whether the student returns logits"):
        model.compile("sgd", "sparse_categorical_crossentropy")
    model.compile("sgd", logits)
    student.compile(loss="mse")
    model.compile("sgd", logits)
    student.compile(loss="sparse_categorical_crossentropy")
    Distillation(teacher, student, from_logits=True).compile("sgd", logits)


def test_contradictions_and_losses_that_do_not_tell():
    def own(y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    teacher, student = constant([3.0, -2.0]), constant([-1.0, 0.5])
    compile = {"optimizer": "sgd", "run_eagerly": True}
    for arguments, loss, message in (
        ({"from_logits": True}, "kld", "as the compiled loss has it"),
        ({"output_kind": "sigmoid"}, own, "`from_logits` to be given"),
        ({}, own, "loss=own for output 'out_0'"),
        ({}, None, "a loss that tells"),
    ):
        model = Distillation(teacher, student, **arguments)
        with pytest.raises(ValueError, match=message):
            model.compile(loss=loss, **compile)
    arguments = {"output_kind": "softmax", "from_logits": True}
    found = divergence_of(teacher, student, own, **arguments)
    p, q = softmax(np.array([3.0, -2.0])), softmax(np.array([-1.0, 0.5]))
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q)), rtol=1e-5)


@slow_on_jax
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_several_outputs(tmp_path):
    """Σ w ((1 - α) loss + α T² D), by NumPy; saved and loaded."""
    old = [0.7, 0.3], [2.0], [0.9, 0.9]
    new = [0.4, 0.6], [1.0], [0.1, 0.1]
    teacher, student = constant(*old), constant(*new)
    model = Distillation(teacher, student, 1.0, 0.25)
    losses = {
        "out_0": "sparse_categorical_crossentropy",
        "out_1": "mse",
        "out_2": "binary_crossentropy",
    }
    scale = {"out_0": 1.0, "out_1": 0.5, "out_2": 2.0}
    model.compile(
        "sgd", losses, loss_weights=scale, run_eagerly=True, jit_compile=False
    )
    rows = len(X)
    y = [np.zeros(rows), np.full((rows, 1), 3.0), np.ones((rows, 2))]
    hard = -np.log(0.4), (3.0 - 1.0) ** 2, -np.log(0.1)
    p, q = np.array(old[0]), np.array(new[0])
    soft = np.sum(p * np.log(p / q)), (2.0 - 1.0) ** 2, BERNOULLI
    weights = [1.0, 0.5, 2.0]
    expected = 0.75 * np.dot(weights, hard) + 0.25 * np.dot(weights, soft)
    x = ops.convert_to_tensor(X)
    tensors = [ops.convert_to_tensor(a, "float32") for a in y]
    loss = model.compute_loss(x, tensors, model(x))
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    # A weight for each sample and output.
    given = [np.full(rows, w, "float32") for w in (2.0, 1.0, 0.0)]
    loss = model.compute_loss(x, tensors, model(x), given)
    doubled = np.multiply(weights, [2.0, 1.0, 0.0])
    expected = 0.75 * np.dot(doubled, hard) + 0.25 * np.dot(doubled, soft)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    model.fit(X, y, verbose=0)
    model.save(tmp_path / "several.keras")
    loaded = keras.saving.load_model(tmp_path / "several.keras")
    for a, b in zip(
        loaded.predict(X, verbose=0), model.predict(X, verbose=0), strict=True
    ):
        close_in_ulps(a, b)
    assert loaded.loss == losses


@slow_on_tensorflow
def test_without_labels():
    """`fit(x)` learns the teacher, regularizers added whole."""
    teacher, student = pair()
    model = Distillation(teacher, student, 1.0, 0.5)
    model.compile(keras.optimizers.SGD(1.0), "kld", run_eagerly=True)
    history = model.fit(X, epochs=4, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    p, q = (value(m(X)).astype("float64") for m in (teacher, student))
    expected = 0.5 * np.mean(np.sum(p * np.log(p / q), -1))
    found = model.evaluate(X, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # Nor is a loss needed, where the teacher's tells what it returns.
    teacher.compile(loss="kld")
    model = Distillation(teacher, student, 1.0, 0.5)
    model.compile("sgd", run_eagerly=True)
    np.testing.assert_allclose(model.evaluate(X, verbose=0), expected, 1e-4)


def test_weights_without_labels():
    """Keras would ignore those of arrays; those of a batch count."""
    teacher, student = pair()
    model = Distillation(teacher, student, 1.0, 1.0)
    model.compile(keras.optimizers.SGD(0.0), "kld", run_eagerly=True)
    weights = np.linspace(0, 2, len(X)).astype("float32")
    for call in (
        lambda: model.fit(X, sample_weight=weights, verbose=0),
        lambda: model.evaluate(X, sample_weight=weights, verbose=0),
        lambda: model.fit(X, validation_data=(X, None, weights), verbose=0),
    ):
        with pytest.raises(ValueError, match="`y` beside `sample_weight`"):
            call()
    p, q = (value(m(X)).astype("float64") for m in (teacher, student))
    expected = np.mean(weights * np.sum(p * np.log(p / q), -1))
    found = model.train_on_batch(X, None, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # With a weight of 1 it makes no difference which labels there are.
    history = model.fit(
        X, np.ones_like(p), sample_weight=weights, batch_size=len(X), verbose=0
    )
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-4)


def test_losses_of_layers_are_added_whole():
    def student(strength):
        return keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(
                    3,
                    "softmax",
                    kernel_initializer="ones",
                    kernel_regularizer=keras.regularizers.L2(strength),
                ),
            ]
        )

    losses = []
    for strength in (0.0, 0.1):
        model = Distillation(pair()[0], student(strength), weight=0.75)
        model.compile("sgd", "sparse_categorical_crossentropy")
        x = ops.convert_to_tensor(X)
        losses.append(float(model.compute_loss(x, Y, model(x))))
    np.testing.assert_allclose(losses[1] - losses[0], 0.1 * 9, rtol=1e-4)


def test_positions_that_the_loss_ignores():
    """Label -1 counts neither in the loss nor in the divergence."""
    x = keras.Input((5, 3))
    teacher, student = (
        keras.Model(
            x, layers.Dense(4, "softmax", kernel_initializer="random_normal")(x)
        )
        for _ in "ab"
    )
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    model = Distillation(teacher, student, 1.0, 1.0)
    model.compile("sgd", loss)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 3)).astype("float32")
    y = rng.integers(-1, 4, (4, 5))
    p, q = (value(m(x)).astype("float64") for m in (teacher, student))
    kl = np.sum(p * np.log(p / q), -1)
    found = model.compute_loss(ops.convert_to_tensor(x), y, student(x))
    np.testing.assert_allclose(float(found), kl[y >= 0].mean(), rtol=1e-4)


def test_the_divergence_sums_up_as_the_loss():
    loss = keras.losses.MeanSquaredError(reduction="sum")
    model = Distillation(constant([5.0]), constant([1.5]), 1.0, 1.0)
    model.compile("sgd", loss, run_eagerly=True)
    x = ops.convert_to_tensor(X[:4])
    found = model.compute_loss(x, ops.zeros((4, 1)), model(x))
    np.testing.assert_allclose(float(found), 4 * 12.25, rtol=1e-6)


@jax_only
def test_the_train_step_lowers_for_a_tpu():
    model = toy.compiled(Distillation(*pair()), jit_compile=True)
    program = lower_train_step(model, X[:8], Y[:8])
    # The teacher's product, the student's, and that of its weights' gradient.
    assert program.count("stablehlo.dot_general") == 3


def test_metrics_need_labels():
    """Unlabelled texts, with labelled ones to validate on."""
    model = Distillation(*pair(), 1.0, 0.5)
    model.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
        jit_compile=JAX,
    )
    assert list(model.fit(X, verbose=0).history) == ["loss"]
    history = model.fit(X, validation_data=(X, Y), verbose=0).history
    right = value(model.student(X)).argmax(-1) == Y
    assert history["val_accuracy"][0] == pytest.approx(right.mean())
    assert "accuracy" not in history
    # After labels were seen, too.
    model.fit(X, Y, verbose=0)
    for logs in (
        model.evaluate(X, verbose=0, return_dict=True),
        model.train_on_batch(X, return_dict=True),
        model.fit(X, verbose=0).history,
    ):
        assert list(logs) == ["loss"]


def test_weights_by_their_place():
    model = Distillation(*pair(), 1.0, 0.5)
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    weights = np.linspace(0, 2, len(X)).astype("float32")
    expected = model.evaluate(X, Y, sample_weight=weights, verbose=0)
    assert model.evaluate(X, Y, 16, 0, weights) == pytest.approx(expected)
    before = 16, 1, 0, None, 0.0, None, True, None
    model.fit(X, Y, *before, weights)
    with pytest.raises(ValueError, match="`y` beside `sample_weight`"):
        model.fit(X, None, *before, weights)
    with pytest.raises(ValueError, match="`y` beside `sample_weight`"):
        model.fit(X, None, *before[:5], (X, None, weights))
