"""The HSIC bottleneck: its loss, what it trains, and how it is read out.

Post 6910.
"""

import keras
import numpy as np
import pytest
import toy
from hsic_reference import JAX, distances, value
from keras import layers, ops
from kit import slow_on_jax, tensorflow_only

from blogkeras.hsic import HSICBottleneck

RNG = np.random.default_rng(3)
LABELS = np.arange(48) % 3
CENTERS = RNG.normal(size=(3, 6))
X = (CENTERS[LABELS] + 0.3 * RNG.normal(size=(48, 6))).astype("float32")


def bottleneck(widths=(8, 3), activation="tanh", **kwargs):
    kwargs = {"bandwidth": 2.0, "label_weight": 4.0, "epsilon": 1e-3, **kwargs}
    blocks = [layers.Dense(w, activation) for w in widths]
    model = HSICBottleneck(blocks, 3, **kwargs)
    model.build((None, X.shape[1]))
    return model


def stepped(model, x=X, y=LABELS, rate=0.01, **kwargs):
    model.compile(keras.optimizers.SGD(rate), run_eagerly=True)
    logs = model.train_on_batch(x, y, return_dict=True, **kwargs)
    return float(logs["loss"])


def papers_nhsic(x, y, bandwidth=2.0, epsilon=1e-3):
    """As in the paper's script: one-sided centering and an inverse."""
    n = len(x)
    resolvents = []
    for t in (x, y):
        scale = 2 * bandwidth**2 * t.shape[1]
        k = np.exp(-(distances(t) ** 2) / scale) @ (np.eye(n) - 1 / n)
        resolvents.append(k @ np.linalg.inv(k + epsilon * n * np.eye(n)))
    return np.sum(resolvents[0] * resolvents[1].T)


@slow_on_jax
def test_loss_is_the_papers():
    model = bottleneck()
    one_hot = np.eye(3)[LABELS]
    hidden = [value(z) for z in model.hidden(X, training=True)]
    expected = sum(
        papers_nhsic(z, X.astype("f8")) - 4 * papers_nhsic(z, one_hot)
        for z in hidden
    )
    weight = np.arange(48) < 30
    few = sum(
        papers_nhsic(z[:30], X[:30].astype("f8"))
        - 4 * papers_nhsic(z[:30], one_hot[:30])
        for z in hidden
    )
    model.compile("sgd", run_eagerly=True)
    assert model.evaluate(X, LABELS, batch_size=48, verbose=0) == pytest.approx(
        expected, rel=1e-3
    )
    assert stepped(model, sample_weight=weight, rate=0.0) == pytest.approx(
        few, rel=1e-3
    )
    for y in (one_hot, LABELS[:, None]):
        assert stepped(model, y=y, rate=0.0) == pytest.approx(
            expected, rel=1e-3
        )


@slow_on_jax
def test_each_layer_is_trained_by_itself():
    """A layer moves the same with and without layers after it or before it."""
    both = bottleneck()
    first = bottleneck((8,))
    first.blocks[0].set_weights(both.blocks[0].get_weights())
    start = toy.weights(both.blocks[0])
    stepped(both)
    stepped(first)
    moved = toy.difference(toy.weights(both.blocks[0]), start)
    assert moved > 1e-3
    assert (
        toy.difference(
            toy.weights(both.blocks[0]), toy.weights(first.blocks[0])
        )
        <= 1e-3 * moved
    )
    again = bottleneck()
    frozen = bottleneck()
    frozen.set_weights(again.get_weights())
    frozen.blocks[0].trainable = False
    stepped(again)
    stepped(frozen)
    assert (
        toy.difference(
            toy.weights(again.blocks[1]), toy.weights(frozen.blocks[1])
        )
        <= 1e-6
    )


@slow_on_jax
def test_one_forward_pass_and_nothing_twice():
    class Counted(layers.Dense):
        calls = 0

        def call(self, x):
            type(self).calls += 1
            return super().call(x)

    model = HSICBottleneck([Counted(4), Counted(3)], 3)
    model.build((None, 6))
    Counted.calls = 0
    stepped(model)
    assert Counted.calls == 2


def test_blocks_train():
    """The statistics of batch normalization move, and dropout drops."""
    keras.utils.set_random_seed(0)
    blocks = [
        keras.Sequential(
            [layers.Dense(6), layers.BatchNormalization(momentum=0.75)]
        ),
        layers.Dropout(0.5, seed=0),
        layers.Dense(3, "softmax"),
    ]
    model = HSICBottleneck(blocks, 3)
    model.build((None, X.shape[1]))
    dense, normalization = blocks[0].layers
    h = X @ value(dense.kernel)
    draws = value(blocks[1].seed_generator.state).tolist()
    model.compile(keras.optimizers.SGD(0.0), jit_compile=JAX)
    model.train_on_batch(X, LABELS)
    np.testing.assert_allclose(
        value(normalization.moving_mean), 0.25 * h.mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        value(normalization.moving_variance), 0.75 + 0.25 * h.var(0), rtol=1e-4
    )
    assert value(blocks[1].seed_generator.state).tolist() != draws


def test_counts_of_units_and_classes():
    model = bottleneck()
    hidden = value(model.hidden(X, training=True)[-1])
    weights = 1.0 + np.arange(48) % 2
    expected = np.zeros((3, 3))
    np.add.at(expected, (LABELS, hidden.argmax(1)), weights)
    stepped(model, sample_weight=weights, rate=0.0)
    np.testing.assert_allclose(value(model.activity), expected, rtol=1e-6)
    stepped(model, rate=0.0)
    np.add.at(plain := np.zeros((3, 3)), (LABELS, hidden.argmax(1)), 1)
    np.testing.assert_allclose(
        value(model.activity), 0.99 * expected + plain, rtol=1e-6
    )


def test_units_are_matched_to_classes():
    """The surest pair first: class 2 takes unit 0, class 1 unit 1."""
    model = bottleneck((4,))
    assert value(model.units()).tolist() == [0, 1, 2]
    counts = [[5, 1, 0, 4.0], [6, 4, 0, 0], [9, 0, 1, 0]]
    model.activity.assign(counts)
    assert value(model.units()).tolist() == [3, 1, 0]
    last = value(model.blocks[0](X))
    np.testing.assert_allclose(
        model.predict(X, verbose=0), last[:, [3, 1, 0]], rtol=1e-6
    )


@slow_on_jax
@pytest.mark.parametrize("readout", ["unformatted", "format"])
def test_learns(readout):
    normalized = [
        keras.Sequential(
            [
                layers.Dense(units),
                # Keras's 0.99 has forgotten half of its start in 80 steps.
                layers.BatchNormalization(
                    momentum=0.9, center=False, scale=False
                ),
                layers.ReLU(),
            ]
        )
        for units in (16, 6)
    ]
    model = HSICBottleneck(normalized, 3, readout)
    # XLA is tried in the conformance suite.
    model.compile(
        keras.optimizers.Adam(0.03), metrics=["accuracy"], jit_compile=JAX
    )
    # 80 steps with the whole sample.
    x, y = np.tile(X, (20, 1)), np.tile(LABELS, 20)
    history = model.fit(
        x, y, batch_size=48, epochs=4, verbose=0, shuffle=False
    ).history
    assert history["loss"][-1] < history["loss"][0]
    logs = model.evaluate(X, LABELS, verbose=0, batch_size=48, return_dict=True)
    assert logs["accuracy"] >= 0.95
    scores = model.predict(X, verbose=0)
    assert scores.shape == (48, 3)
    assert np.mean(scores.argmax(1) == LABELS) == pytest.approx(
        logs["accuracy"]
    )


def test_the_format_layer_does_not_touch_the_layers():
    plain, formatted = bottleneck(), bottleneck(readout="format")
    for a, b in zip(plain.blocks, formatted.blocks, strict=True):
        b.set_weights(a.get_weights())
    stepped(plain)
    stepped(formatted)
    for a, b in zip(plain.blocks, formatted.blocks, strict=True):
        assert toy.difference(toy.weights(a), toy.weights(b)) <= 1e-6


def test_format_layer_alone():
    """Frozen layers have no objective; the loss is the cross-entropy."""
    model = bottleneck(readout="format")
    for block in model.blocks:
        block.trainable = False
    start = toy.weights(model)
    p = value(model(X))[np.arange(48), LABELS]
    assert stepped(model, rate=0.5) == pytest.approx(-np.log(p).mean(), 1e-4)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(start, toy.weights(model), strict=True)
    ]
    assert changed == [False] * 4 + [True] * 2


def test_layers_keep_their_regularizers_and_precision():
    policy = keras.config.dtype_policy()
    losses = []
    for name, regularizer in (("mixed_bfloat16", "l2"), (policy, None)):
        keras.config.set_dtype_policy(name)
        keras.utils.set_random_seed(0)
        block = layers.Dense(4, "tanh", kernel_regularizer=regularizer)
        model = HSICBottleneck([block], 3, "format", bandwidth=2.0, epsilon=0.1)
        losses.append(stepped(model))
        assert all(w.dtype == "float32" for w in model.weights)
        assert np.isfinite(value(model(X))).all()
        if regularizer:
            keras.utils.set_random_seed(0)
            block = layers.Dense(4, "tanh")
            block.build((None, 6))
            penalty = 0.01 * np.sum(value(block.kernel) ** 2)
    assert losses[0] - losses[1] == pytest.approx(penalty, abs=0.2 * penalty)


@slow_on_jax
def test_masks_reach_all_layers():
    """Tokens are integers; 0 is padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (48, 4))
    tokens[:, 2:] *= rng.integers(0, 2, (48, 1))
    blocks = [
        layers.Embedding(9, 5, mask_zero=True),
        layers.Dense(4, "tanh"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(3),
    ]
    model = HSICBottleneck(
        blocks, 3, bandwidth=2.0, label_weight=4.0, epsilon=1e-3
    )
    model.build(tokens.shape)
    kept = (tokens > 0)[..., None]
    z = value(blocks[0](tokens)).astype("f8") * kept
    dense = np.tanh(z @ value(blocks[1].kernel)) * kept  # biases are zero
    pooled = dense.sum(axis=1) / kept.sum(axis=1)
    last = pooled @ value(blocks[3].kernel)
    hidden = model.hidden(ops.convert_to_tensor(tokens))
    np.testing.assert_allclose(value(hidden[2]), pooled, rtol=1e-4, atol=1e-6)
    one_hot = np.eye(3)[LABELS]
    expected = sum(
        papers_nhsic(z.reshape(48, -1), tokens.astype("f8"))
        - 4 * papers_nhsic(z.reshape(48, -1), one_hot)
        for z in (z, dense, last)
    )
    found = stepped(model, tokens, LABELS)
    assert found == pytest.approx(expected, rel=1e-3)


def test_errors():
    dense = layers.Dense(3)
    for arguments, message in [
        (([], 3), "layers=.."),
        (([dense], 1), "num_classes=1"),
        (([dense], 3, "softmax"), "readout='softmax'"),
    ]:
        with pytest.raises(ValueError, match=f"Received: {message}"):
            HSICBottleneck(*arguments)
    for name in ("bandwidth", "epsilon"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            HSICBottleneck([dense], 3, **{name: 0})
    with pytest.raises(ValueError, match="label_weight=-1"):
        HSICBottleneck([dense], 3, label_weight=-1)
    with pytest.raises(ValueError, match=r"last output shape .None, 2."):
        bottleneck((8, 2))
    model = bottleneck()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="Received: loss=mse"):
        model.train_on_batch(X, LABELS)
    assert ops.shape(model(X)) == (48, 3)


@pytest.mark.parametrize("readout", ["unformatted", "format"])
def test_it_gives_scores_inside_of_another_model(readout):
    model = bottleneck((5, 3), readout=readout)
    model.compile("sgd", run_eagerly=True)
    model.train_on_batch(X, LABELS)
    inputs = keras.Input(X.shape[1:])
    outer = keras.Model(inputs, model(inputs))
    expected = value(model(X))
    assert expected.shape == (48, 3)
    for training in (False, True):
        found = value(outer(X, training=training))
        np.testing.assert_array_equal(found, expected)


@tensorflow_only
@pytest.mark.parametrize("readout", ["unformatted", "format"])
def test_where_keras_computes_in_float64(readout, request):
    request.addfinalizer(lambda: keras.config.set_floatx("float32"))
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    model = bottleneck((5, 3), readout=readout)
    model.compile("sgd", metrics=["accuracy"], run_eagerly=True)
    logs = model.train_on_batch(X[:16], LABELS[:16], return_dict=True)
    assert np.isfinite(logs["loss"])
