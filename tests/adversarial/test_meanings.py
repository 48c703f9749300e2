"""Label-free methods on labels, numbers, positions, several outputs."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax

import blogkeras
from blogkeras import NoiseStability, VirtualAdversarialTraining

RNG = np.random.default_rng(8)
W = RNG.normal(size=(3, 4))
X = RNG.normal(size=(6, 3))
STEP = 0.4 * RNG.normal(size=X.shape)
CHEAPLY = {"run_eagerly": TENSORFLOW}


class Along(VirtualAdversarialTraining):
    """Along a given direction, so that the divergence is known."""

    step = STEP

    def direction(self, *args):
        return [ops.convert_to_tensor(self.step, "float32")]


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def kl_classes(z, moved):
    p, q = softmax(z), softmax(moved)
    return (p * np.log(p / q)).sum(-1)


def kl_labels(z, moved):
    p, q = sigmoid(z), sigmoid(moved)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return kl.mean(-1)


def squares(z, moved):
    return ((z - moved) ** 2).mean(-1)


def linear(activation, loss, **kwargs):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation, use_bias=False),
        ]
    )
    model.compile(keras.optimizers.SGD(0.0), loss, **{**CHEAPLY, **kwargs})
    model.set_weights([W])
    return model


def own_loss(y, z):
    return keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)


def first_class(y, p):
    return -ops.log(p[:, 0])


CLASSES, LABELS = np.arange(6) % 4, RNG.integers(0, 2, (6, 4))
KINDS = {
    "classes": ("softmax", "sparse_categorical_crossentropy", CLASSES, {}),
    "class logits": (
        None,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        CLASSES,
        {},
    ),
    "own loss": (
        None,
        own_loss,
        CLASSES,
        {"output_kind": "softmax", "from_logits": True},
    ),
    "labels": ("sigmoid", "binary_crossentropy", LABELS, {}),
    "label logits": (
        None,
        keras.losses.BinaryCrossentropy(from_logits=True),
        LABELS,
        {},
    ),
    "numbers": (None, "mse", LABELS, {}),
    "probabilities by mse": (
        "softmax",
        "mse",
        LABELS,
        {"output_kind": "softmax", "from_logits": False},
    ),
}
DIVERGENCES = {"labels": kl_labels, "label logits": kl_labels}
DIVERGENCES["numbers"] = squares


@slow_on_jax
@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_what_the_output_is(kind):
    activation, loss, y, arguments = KINDS[kind]
    model = linear(activation, loss)
    clean = toy.batch_loss(model, X, y)
    blogkeras.adversarial_training(model, method=Along(1.0, **arguments))
    divergence = DIVERGENCES.get(kind, kl_classes)
    expected = divergence(X @ W, (X + STEP) @ W).mean()
    np.testing.assert_allclose(
        toy.batch_loss(model, X, y) - clean, expected, rtol=1e-4
    )


def test_by_the_one_line_call():
    model = linear(None, own_loss)
    blogkeras.virtual_adversarial_training(
        model, output_kind="softmax", from_logits=True
    )
    assert toy.batch_loss(model, X, CLASSES) > 0


@pytest.mark.parametrize("method", ["vat", "noise_stability"])
def test_a_loss_that_does_not_tell_is_refused_before_training(method):
    model = linear(None, own_loss)
    with pytest.raises(
        ValueError, match=r"output_kind.*Received: loss=own_loss"
    ):
        blogkeras.adversarial_training(model, method=method)
    model = toy.Subclassed()
    model.compile("sgd", first_class, **CHEAPLY)
    blogkeras.adversarial_training(model, method=method)
    with pytest.raises(ValueError, match="Received: loss=first_class"):
        model.fit(toy.TOKENS[:8], toy.LABELS[:8], verbose=0)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_outputs_of_several_kinds_are_added():
    inputs = keras.Input((3,))
    outputs = {
        "classes": layers.Dense(4, use_bias=False, name="classes")(inputs),
        "labels": layers.Dense(4, "sigmoid", False, name="labels")(inputs),
        "number": layers.Dense(4, use_bias=False, name="number")(inputs),
        "free": layers.Dense(4, use_bias=False, name="free")(inputs),
    }
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(0.0),
        {
            "classes": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            "labels": "binary_crossentropy",
            "number": "mse",
        },
        **CHEAPLY,
    )
    V, U = RNG.normal(size=(2, 3, 4))
    for name, w in [("classes", W), ("labels", V), ("number", U), ("free", W)]:
        model.get_layer(name).set_weights([w])
    y = {"classes": CLASSES, "labels": LABELS, "number": LABELS}
    clean = toy.batch_loss(model, X, y)
    blogkeras.adversarial_training(model, method=Along(1.0))
    moved = X + STEP
    expected = sum(
        divergence(X @ w, moved @ w).mean()
        for divergence, w in [(kl_classes, W), (kl_labels, V), (squares, U)]
    )
    np.testing.assert_allclose(
        toy.batch_loss(model, X, y) - clean, expected, rtol=1e-4
    )


# Outputs with positions

LENGTHS = (3, 1, 2)


def tagger(length, told_by):
    """Classes of each position; padding is told in one of several ways."""
    x = np.zeros((3, length, 3))
    y = np.full((3, length), -1)
    mask = np.zeros((3, length), "int32")
    rng = np.random.default_rng(1)
    for row, n in enumerate(LENGTHS):
        x[row, :n], y[row, :n], mask[row, :n] = rng.normal(size=(n, 3)), 1, 1
    inputs = h = keras.Input((length, 3), name="features")
    if told_by == "masking":
        h = layers.Masking()(h)
    outputs = layers.Dense(4, use_bias=False)(h)
    data, loss = x, keras.losses.SparseCategoricalCrossentropy(
        from_logits=True,
        ignore_class=-1 if told_by == "ignore_class" else None,
    )  # fmt: skip
    if told_by != "ignore_class":
        y = np.maximum(y, 0)
    if told_by == "attention_mask":
        given = keras.Input((length,), dtype="int32", name="attention_mask")
        inputs = {"features": inputs, "attention_mask": given}
        data = {"features": x, "attention_mask": mask}
        outputs = outputs + 0 * ops.cast(given, "float32")[..., None]
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), loss, **CHEAPLY)
    model.set_weights([W])
    return model, data, y, mask.astype(bool)


def features(data):
    return data["features"] if isinstance(data, dict) else data


@slow_on_jax
@pytest.mark.parametrize(
    "told_by", ["masking", "ignore_class", "attention_mask"]
)
@pytest.mark.parametrize("length", [3, 7])
def test_padding_has_no_say_in_the_divergence(told_by, length):
    model, data, y, mask = tagger(length, told_by)
    clean = toy.batch_loss(model, data, y)
    method = Along(1.0)
    method.step = np.zeros((3, length, 3))
    method.step[mask] = np.random.default_rng(2).normal(size=(6, 3))
    blogkeras.adversarial_training(model, method=method)
    x = features(data)[mask]
    expected = kl_classes(x @ W, (x + method.step[mask]) @ W).mean()
    np.testing.assert_allclose(
        toy.batch_loss(model, data, y) - clean, expected, rtol=1e-4
    )


def test_rows_without_any_label_count_in_full():
    model, x, y, mask = tagger(3, "ignore_class")
    y[1] = -1
    clean = toy.batch_loss(model, x, y)
    method = Along(1.0)
    method.step = np.ones((3, 3, 3))
    blogkeras.adversarial_training(model, method=method)
    counted = mask.copy()
    counted[1] = True
    expected = kl_classes(x @ W, (x + 1) @ W)[counted].mean()
    np.testing.assert_allclose(
        toy.batch_loss(model, x, y) - clean, expected, rtol=1e-4
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_labels_by_name_are_those_of_their_outputs(swapped):
    """A dict of labels is sorted by name, a list of outputs is not."""
    inputs = keras.Input((3, 3))
    names = ["second", "first"] if swapped else ["first", "second"]
    model = keras.Model(
        inputs,
        [layers.Dense(4, use_bias=False, name=name)(inputs) for name in names],
    )
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-1
    )
    model.compile(
        keras.optimizers.SGD(0.0), {name: loss for name in names}, **CHEAPLY
    )
    V = RNG.normal(size=(3, 4))
    model.get_layer("first").set_weights([W])
    model.get_layer("second").set_weights([V])
    x = RNG.normal(size=(2, 3, 3))
    y = {
        "first": np.array([[1, -1, -1], [0, 1, -1]]),
        "second": np.array([[1, 2, 3], [0, -1, 2]]),
    }
    clean = toy.batch_loss(model, x, y)
    method = Along(1.0)
    method.step = np.ones((2, 3, 3))
    blogkeras.adversarial_training(model, method=method)
    expected = sum(
        kl_classes(x @ w, (x + 1) @ w)[y[name] >= 0].mean()
        for name, w in [("first", W), ("second", V)]
    )
    np.testing.assert_allclose(
        toy.batch_loss(model, x, y) - clean, expected, rtol=1e-4
    )


@pytest.mark.skipif(not TENSORFLOW, reason="JAX knows all shapes")
def test_a_mask_of_an_output_of_unknown_length():
    import tensorflow as tf

    class Forgets(layers.Layer):
        def call(self, x):
            shape = (None, None, 4)
            return tf.compat.v1.placeholder_with_default(x, shape)

    model, data, y, mask = tagger(3, "attention_mask")
    outputs = Forgets()(model.output)
    model = keras.Model(model.input, outputs)
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    clean = toy.batch_loss(model, data, y)
    method = Along(1.0)
    method.step = np.ones((3, 3, 3))
    blogkeras.adversarial_training(model, "features", method=method)
    x = data["features"][mask]
    expected = kl_classes(x @ W, (x + 1) @ W).mean()
    np.testing.assert_allclose(
        toy.batch_loss(model, data, y) - clean, expected, rtol=1e-4
    )


class Everywhere(VirtualAdversarialTraining):
    """One step up at every coordinate."""

    def direction(self, objective, weights, site, origin, target):
        return [ops.ones_like(x) for x in origin]


class Unmasked(layers.Layer):
    """Passes no mask on."""

    def compute_mask(self, inputs, previous_mask=None):
        return None

    def call(self, x):
        return x


@slow_on_jax
@pytest.mark.parametrize("told_by", ["mask_zero", "name", "attention"])
def test_padding_of_one_sequence_is_not_that_of_another(told_by):
    """Source and target have one length and one embedding."""
    x = {
        "source": np.array([[1, 0, 0], [2, 3, 0]], "int32"),
        "target": np.array([[3, 4, 1], [2, 0, 0]], "int32"),
    }
    inputs = {n: keras.Input((3,), dtype="int32", name=n) for n in x}
    embedding = layers.Embedding(5, 3, mask_zero=told_by == "mask_zero")
    source, target = (embedding(inputs[name]) for name in x)
    nothing = 0 * ops.sum(Unmasked()(source), axis=1, keepdims=True)
    if told_by == "name":
        name = "source_padding_mask"
        inputs[name] = keras.Input((3,), dtype="int32", name=name)
        x[name] = (x["source"] != 0).astype("int32")
        nothing += 0 * ops.cast(inputs[name], "float32")[..., None]
    if told_by == "attention":
        for name, values in (("source", source), ("target", target)):
            mask = ops.not_equal(inputs[name], 0)[:, None]
            layer = layers.MultiHeadAttention(1, 2)
            nothing += 0 * layer(values, values, attention_mask=mask)
    dense = layers.Dense(4, use_bias=False)
    model = keras.Model(inputs, dense(Unmasked()(target)) + nothing[..., :1])
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **CHEAPLY,
    )
    dense.set_weights([W])
    y = np.ones((2, 3), "int32")
    clean = toy.batch_loss(model, x, y)
    blogkeras.adversarial_training(model, method=Everywhere(1.0))
    (E,) = embedding.get_weights()
    h = E[x["target"]]
    expected = kl_classes(h @ W, (h + 1) @ W).mean()
    np.testing.assert_allclose(
        toy.batch_loss(model, x, y) - clean, expected, rtol=1e-4
    )


def stability(kind, x, w):
    """½ Σ ‖∇φ‖² of one position, the second-order term of its divergence.

    By central differences of the divergence along the axes.
    """
    divergence = DIVERGENCES.get(kind, kl_classes)
    h = 1e-3
    return sum(
        (divergence(x @ w, (x + s * h * e) @ w)) / (2 * h**2)
        for e in np.eye(3)
        for s in (1, -1)
    )


@slow_on_jax
@pytest.mark.parametrize("kind", ["labels", "numbers", "class logits"])
def test_stability_of_what_the_output_is(kind):
    """The mean of the estimates; twice, since the noise has variance ε."""
    activation, loss, y, arguments = KINDS[kind]
    model = linear(activation, loss, run_eagerly=False)
    x, y = np.tile(X, (40, 1)), np.tile(y, (40, *[1] * (y.ndim - 1)))
    clean = toy.batch_loss(model, x, y)
    method = NoiseStability(1.0, **arguments)
    blogkeras.adversarial_training(model, method=method)
    estimates = np.array(
        [toy.batch_loss(model, x, y) - clean for _ in range(40)]
    )
    expected = stability(kind, X, W).mean()
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert error < 0.03 * expected
    assert abs(estimates.mean() - expected) < 4 * error


@pytest.mark.parametrize(
    "length", [pytest.param(3, marks=pytest.mark.verify), 7]
)
def test_stability_of_positions(length):
    """The mean over the positions, however many there are."""
    model, x, y, mask = tagger(length, "masking")
    clean = toy.batch_loss(model, x, y)
    blogkeras.adversarial_training(model, method=NoiseStability(1.0))
    estimates = np.array(
        [toy.batch_loss(model, x, y) - clean for _ in range(120)]
    )
    expected = stability("classes", x[mask], W).mean()
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert error < 0.1 * expected
    assert abs(estimates.mean() - expected) < 4 * error
