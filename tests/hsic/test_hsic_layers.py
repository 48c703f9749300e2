"""HSIC in Keras: loss, regularization, metric, comparison of layers.

Post 6910.
"""

import keras
import numpy as np
import pytest
import toy
from hsic_reference import (
    JAX,
    LINEAR,
    MASK,
    central,
    definition,
    gaussian,
    value,
)
from keras import layers, ops
from kit import replicated, slow_on_jax, slow_on_tensorflow, tensorflow_only

from blogkeras import backend
from blogkeras.hsic import (
    CKA,
    DeltaKernel,
    GaussianKernel,
    HSICBottleneck,
    HSICLoss,
    HSICRegularization,
    PrecomputedKernel,
    compare_layers,
    hsic,
)

RNG = np.random.default_rng(2)
X = RNG.normal(size=(32, 3)).astype("float32")
Y = (X[:, :2] ** 2 + RNG.normal(size=(32, 2))).astype("float32")
STANDARD = GaussianKernel(1.0, form="standard")
WEIGHTS = np.arange(32) % 3


def linear_model(units=2):
    return keras.Sequential([keras.Input((3,)), layers.Dense(units)])


def stepped(model, *args, **kwargs):
    """The weights after one step of SGD, eagerly."""
    model.train_on_batch(*args, **kwargs)
    return [np.asarray(w, "float64") for w in model.get_weights()]


# Loss


@pytest.mark.parametrize("estimator", ["biased", "blog", "unbiased"])
def test_loss_is_hsic(estimator):
    expected = definition(gaussian(X, 1.0), gaussian(Y, 1.0), estimator)
    loss = HSICLoss(STANDARD, STANDARD, estimator)
    assert float(loss(Y, X)) == pytest.approx(expected, rel=1e-3)
    loss = HSICLoss(STANDARD, STANDARD, estimator, maximize=True)
    assert float(loss(Y, X)) == pytest.approx(-expected, rel=1e-3)
    flat = X[:30].reshape(5, 3, 2, 3)
    found = HSICLoss(STANDARD, LINEAR)(Y[:5], flat)
    same = hsic(Y[:5], flat.reshape(5, -1), STANDARD, LINEAR)
    assert float(found) == pytest.approx(float(value(same)), rel=1e-6)


@slow_on_jax
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_unbiased_of_few_rows(rows):
    """0, as for pairs of weight 0, and a gradient of 0; no error in `fit`."""

    class Scaled(layers.Layer):
        def build(self, x1_shape, x2_shape):
            self.scale = self.add_weight((), initializer="ones", name="scale")

        def call(self, x1, x2):
            return self.scale * ops.matmul(x1, ops.swapaxes(x2, -1, -2))

    x, y = X[:rows], Y[:rows]
    square = X[:rows, :1] @ X[:rows, :1].T
    for loss, target in (
        (HSICLoss(estimator="unbiased"), y),
        (HSICLoss(DeltaKernel(), estimator="unbiased"), np.arange(rows)),
        (HSICLoss(PrecomputedKernel(), estimator="unbiased"), square),
    ):
        for weight in (None, np.ones(rows)):
            assert float(loss(target, x, weight)) == 0
    with pytest.raises(ValueError, match="as many samples"):
        loss(Y[:rows], X[:4])
    image, other = keras.Input((3,)), keras.Input((2,))
    features = HSICRegularization(1.0, Scaled(), estimator="unbiased")(
        [layers.Dense(3)(image), other]
    )
    model = keras.Model([image, other], features)
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    before = toy.weights(model)
    assert model.train_on_batch([x, y]) == 0
    assert toy.difference(before, toy.weights(model)) == 0
    assert model.predict([x, y], verbose=0).shape == (rows, 3)


def test_unbiased_of_a_small_last_batch():
    """`fit` and `evaluate` count it as 0, with its number of rows."""
    model = linear_model()
    loss = HSICLoss(STANDARD, STANDARD, "unbiased")
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=JAX)
    matrices = gaussian(Y[:4], 1.0), gaussian(value(model(X[:4])), 1.0)
    expected = definition(*matrices, "unbiased") * 4 / 7
    kwargs = {"batch_size": 4, "verbose": 0}
    assert model.evaluate(X[:7], Y[:7], **kwargs) == pytest.approx(
        expected, rel=1e-3
    )
    history = model.fit(X[:7], Y[:7], shuffle=False, **kwargs).history
    assert history["loss"] == pytest.approx([expected], rel=1e-3)


def test_sample_weights_are_the_measure():
    """Weights 0, 1, 2: a row less, a row, two copies of it."""
    copies = np.repeat(np.arange(32), WEIGHTS)
    start = linear_model().get_weights()
    after = []
    for x, y, weight in ((X, Y, WEIGHTS), (X[copies], Y[copies], None)):
        model = linear_model()
        model.set_weights(start)
        loss = HSICLoss(STANDARD, STANDARD)
        model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=not JAX)
        after.append(stepped(model, x, y, sample_weight=weight))
    assert toy.difference(*after) <= 1e-6
    assert toy.difference(after[0], [np.asarray(w) for w in start]) > 1e-3


def test_training_step_follows_the_slope():
    """One step of SGD against central differences of the definition."""
    x, y = X[:12], Y[:12]
    model = linear_model(1)
    loss = HSICLoss(STANDARD, STANDARD, maximize=True)
    model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=not JAX)
    kernel, bias = model.get_weights()
    slope = central(
        lambda w: (
            -definition(gaussian(x @ w + bias, 1.0), gaussian(y, 1.0), "biased")
        ),
        kernel,
    )
    after, _ = stepped(model, x, y)
    np.testing.assert_allclose(kernel - after, slope, rtol=5e-3, atol=1e-5)


def test_masked_time_steps_count_as_zeros():
    inputs = keras.Input((4, 3))
    outputs = layers.Dense(2, use_bias=False)(layers.Masking()(inputs))
    model = keras.Model(inputs, outputs)
    x = RNG.normal(size=(8, 4, 3)).astype("float32")
    x[:, 2:] = 0
    y = RNG.normal(size=(8, 1))
    prediction = model(x)
    mask = backend.get_keras_mask(prediction)
    assert mask is not None
    loss = HSICLoss(STANDARD, STANDARD)
    expected = float(loss(y, np.asarray(prediction)[:, :2]))
    noise = RNG.normal(size=(8, 4, 2)) * [[[0], [0], [9], [5]]]
    junk = ops.convert_to_tensor(np.asarray(prediction) + noise, "float32")
    backend.set_keras_mask(junk, mask)
    assert float(loss(y, junk)) == pytest.approx(expected, rel=1e-5)
    # A target for each time step is masked as well.
    targets = X.reshape(8, 4, 3)[..., :1]
    others = targets + np.float32([[[0], [0], [7], [8]]])
    expected = float(loss(targets[:, :2], np.asarray(prediction)[:, :2]))
    for y in (targets, others):
        assert float(loss(y, junk)) == pytest.approx(expected, rel=1e-5)
        metric = CKA(STANDARD, STANDARD)
        metric.update_state(ops.convert_to_tensor(y), junk)
        cka = float(metric.result())
        metric.reset_state()
        metric.update_state(targets[:, :2], np.asarray(prediction)[:, :2])
        assert cka == pytest.approx(float(metric.result()), rel=1e-4)


# Regularization


def independent(rate=2.0, **kwargs):
    inputs = [keras.Input((3,), name="x"), keras.Input((2,), name="y")]
    features = layers.Dense(4, name="features", **kwargs)(inputs[0])
    features = HSICRegularization(rate, STANDARD, LINEAR)([features, inputs[1]])
    return keras.Model(inputs, layers.Dense(1)(features))


def test_regularization_adds_hsic():
    model = independent()
    features = value(model.get_layer("features")(X))
    expected = 2 * definition(
        gaussian(features, 1.0), Y.astype("f8") @ Y.T, "biased"
    )
    layer = HSICRegularization(2.0, STANDARD, LINEAR)
    out = layer([ops.convert_to_tensor(features), Y])
    np.testing.assert_array_equal(value(out), features)
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="Received: rate=nan"):
        HSICRegularization(float("nan"))


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_regularization_in_mixed_precision(dtype):
    """Half precision has no number between 3000 and 3002, and not 100,000."""
    ids = (3000 + np.arange(len(X)) % 2).astype("float32")[:, None]
    equal = (ids == ids.T).astype("float64")
    large = X + np.float32(1e5)
    for y, kernel, gram in (
        (ids, DeltaKernel(), equal),
        (large, STANDARD, gaussian(large.astype("float64"), 1.0)),
    ):
        layer = HSICRegularization(1.0, STANDARD, kernel, dtype=dtype)
        out = layer([ops.convert_to_tensor(X), ops.convert_to_tensor(y)])
        assert keras.backend.standardize_dtype(out.dtype) == dtype[6:]
        expected = definition(gaussian(X, 1.0), gram, "biased")
        assert float(layer.losses[0]) == pytest.approx(expected, rel=1e-4)
    codes = ops.convert_to_tensor(np.arange(len(X), dtype="int32")[:, None])
    layer = HSICRegularization(1.0, DeltaKernel(), LINEAR, dtype=dtype)
    out = layer([codes, ops.convert_to_tensor(X)])
    assert keras.backend.standardize_dtype(out.dtype) == "int32"


@slow_on_tensorflow
def test_regularization_makes_independent():
    """y is part of the target: without the term the features show it."""
    target, nuisance = X[:, :1] + X[:, 2:], X[:, 2:]
    found = {}
    for rate in (0.0, 30.0):
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((3,)), keras.Input((1,))]
        features = layers.Dense(2)(inputs[0])
        regularization = HSICRegularization(rate)
        features = regularization([features, inputs[1]])
        model = keras.Model(inputs, layers.Dense(1)(features))
        optimizer = keras.optimizers.Adam(0.05)
        model.compile(optimizer, "mse", jit_compile=JAX)
        # 60 steps with the whole sample.
        x, y = (
            [np.tile(t, (20, 1)) for t in (X, nuisance)],
            np.tile(target, (20, 1)),
        )
        model.fit(
            x,
            y,
            batch_size=32,
            epochs=3,
            verbose=0,
            shuffle=False,
        )
        tap = keras.Model(inputs, features)
        found[rate] = float(
            value(hsic(tap([X, nuisance]), nuisance, estimator="unbiased"))
        )
    assert found[30.0] < 0.2 * found[0.0]


def test_regularization_trains_its_kernel():
    @keras.saving.register_keras_serializable(package="blogkeras")
    class Scaled(layers.Layer):
        def build(self, x1_shape, x2_shape):
            self.scale = self.add_weight((), initializer="ones", name="scale")

        def call(self, x1, x2):
            return self.scale * ops.matmul(x1, ops.transpose(x2))

    layer = HSICRegularization(1.0, Scaled(), LINEAR)
    inputs = [keras.Input((3,)), keras.Input((2,))]
    model = keras.Model(inputs, layer(inputs))
    assert [w.path.split("/")[-1] for w in layer.trainable_weights] == ["scale"]
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    (after,) = stepped(model, [X, Y], X)
    # d/ds s HSIC = HSIC
    assert 1 - after == pytest.approx(float(value(hsic(X, Y, LINEAR, LINEAR))))
    revived = keras.Model.from_config(model.get_config())
    assert len(revived.trainable_weights) == 1
    frozen = HSICRegularization(1.0, Scaled(), LINEAR, trainable=False)
    frozen.build([(None, 3), (None, 2)])
    assert [v.path for v in frozen.variables if v.trainable] == []


def test_axes_of_unknown_size():
    message = (
        r"(?s)Expected axes of known size.*Received: shape \(None, None, 3\)"
    )

    class Linear(layers.Layer):
        def call(self, x1, x2):
            return ops.matmul(x1, ops.transpose(x2))

    with pytest.raises(ValueError, match=message):
        HSICRegularization(1.0, Linear()).build([(None, None, 3), (None, 2)])
    padded = layers.Conv1D(3, 1)
    padded.build((None, None, 2))
    with pytest.raises(ValueError, match=message):
        HSICBottleneck([padded], 2, readout="format").build((None, None, 2))
    if JAX:  # there a program is compiled for each size
        return
    import tensorflow as tf

    sizes = tf.TensorSpec((None, None, 3)), tf.TensorSpec((None, 2))
    for fn in (
        HSICLoss(),
        lambda x, y: HSICLoss()(y, x),
        CKA().update_state,
        lambda x, y: HSICRegularization(1.0)([x, y]),
    ):
        with pytest.raises(ValueError, match=message):
            tf.function(fn, autograph=False).get_concrete_function(*sizes)


# Replicas


def compiled_models():
    """(make, x, y) of everything that couples a batch."""

    def loss():
        model = linear_model()
        model.compile(
            keras.optimizers.SGD(1.0),
            HSICLoss(STANDARD, STANDARD),
            metrics=[CKA()],
            jit_compile=JAX,
        )
        return model

    def regularization():
        model = independent()
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=JAX)
        return model

    def bottleneck():
        blocks = [layers.Dense(5, "tanh"), layers.Dense(3, "tanh")]
        model = HSICBottleneck(blocks, 3, epsilon=0.1)
        model.build((None, 3))
        model.compile(
            keras.optimizers.SGD(0.01), metrics=["accuracy"], jit_compile=JAX
        )
        return model

    labels = np.arange(32) % 3
    return {
        "loss": (loss, X, Y),
        "regularization": (regularization, [X, Y], X[:, :1]),
        "bottleneck": (bottleneck, X, labels),
    }


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@pytest.mark.parametrize("name", ["loss", "regularization", "bottleneck"])
def test_two_replicas_are_one_large_batch(name):
    make, x, y = compiled_models()[name]
    weights, logs = {}, {}
    for replicas in (1, 2):
        keras.utils.set_random_seed(0)
        model = replicated(make) if replicas == 2 else make()
        start = toy.weights(model)
        fitted = model.fit(
            x,
            y,
            sample_weight=1.0 + np.arange(32) % 2,
            batch_size=16,
            epochs=1,
            shuffle=False,
            verbose=0,
        )
        weights[replicas], logs[replicas] = toy.weights(model), fitted.history
        keras.distribution.set_distribution(None)
    assert toy.difference(weights[1], start) > 1e-4
    assert toy.difference(weights[1], weights[2]) <= 2e-6
    # The bottleneck's loss is a difference of terms of order 1.
    assert logs[1]["loss"] == pytest.approx(logs[2]["loss"], abs=5e-5)


# Metric


def test_cka_metric():
    """The ratio of the batches' sums of the unbiased form."""
    metric, sums = CKA(LINEAR, STANDARD), np.zeros(3)
    assert value(metric.result()) == 0
    for rows in (slice(0, 12), slice(12, 20), slice(30, 32)):
        metric.update_state(X[rows], Y[rows])
        if rows.start == 30:
            continue  # two samples: nothing
        k = X[rows].astype("f8") @ X[rows].T
        l = gaussian(Y[rows], 1.0)  # noqa: E741
        sums += [
            definition(a, b, "unbiased") for a, b in ((k, l), (k, k), (l, l))
        ]
    expected = sums[0] / np.sqrt(sums[1] * sums[2])
    assert value(metric.result()) == pytest.approx(expected, rel=1e-4)
    metric.reset_state()
    metric.update_state(X, Y, sample_weight=MASK[:32, None])
    other = CKA(LINEAR, STANDARD)
    other.update_state(X[MASK[:32]], Y[MASK[:32]])
    assert value(metric.result()) == pytest.approx(
        float(value(other.result())), rel=1e-4
    )
    with pytest.raises(ValueError, match="as many rows"):
        metric.update_state(X, Y[:1])


# Layers of models


def test_compare_layers(tmp_path):
    a = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)], name="a"
    )
    inputs = keras.Input((3,))
    outputs = layers.Reshape((1, 5))(layers.Dense(5, name="only")(inputs))
    b = keras.Model(inputs, outputs, name="b")
    path = tmp_path / "map.png"
    found = compare_layers(a, b, X[:30], batch_size=16, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert found.layers_a == [layer.name for layer in a.layers]
    assert found.layers_b[0] == "only"
    assert len(found.layers_b) == 2
    expected = np.zeros((2, 2))
    for i, p in enumerate(a.layers):
        for j, q in enumerate(b.layers[1:]):
            sums = np.zeros(3)
            for rows in (slice(0, 16), slice(16, 30)):
                first = value(keras.Model(a.inputs[0], p.output)(X[rows]))
                second = value(keras.Model(inputs, q.output)(X[rows]))
                second = second.reshape(len(second), -1)
                k, l = first @ first.T, second @ second.T  # noqa: E741
                sums += [
                    definition(s, t, "unbiased")
                    for s, t in ((k, l), (k, k), (l, l))
                ]
            expected[i, j] = sums[0] / np.sqrt(sums[1] * sums[2])
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-4, atol=1e-6)
    # Batches that are given, with labels; a model with itself.
    given = [(X[:16], Y[:16]), (X[16:], Y[16:]), (X[:2], Y[:2])]
    own = compare_layers(a, a, given, kernel=STANDARD)
    np.testing.assert_allclose(np.diag(own.matrix), 1, rtol=1e-9)
    np.testing.assert_allclose(own.matrix, own.matrix.T, rtol=1e-9)
    assert 0 < own.matrix[0, 1] < 1


def test_compare_layers_errors(capsys):
    model = linear_model()
    with pytest.raises(ValueError, match="Received: batch_size=3"):
        compare_layers(model, model, X, batch_size=3)
    with pytest.raises(ValueError, match="Received: none"):
        compare_layers(model, model, X[:3])
    with pytest.raises(ValueError, match="Expected `model_b` to be a built"):
        compare_layers(model, toy.Subclassed(), X)
    capsys.readouterr()
    compare_layers(model, model, X, batch_size=16, verbose=1)
    assert "2/2" in capsys.readouterr().out


def test_labels_as_target():
    """Features of the same class become alike, others unlike."""
    labels = np.arange(32) % 2
    x = X + 1.5 * np.eye(3, dtype="f4")[labels]
    model = linear_model()
    loss = HSICLoss(DeltaKernel(), maximize=True)
    model.compile(keras.optimizers.Adam(0.05), loss, jit_compile=JAX)
    before = float(
        value(hsic(labels, model.predict_on_batch(x), DeltaKernel()))
    )
    model.fit(x, labels, batch_size=32, epochs=30, verbose=0)
    after = float(value(hsic(labels, model.predict_on_batch(x), DeltaKernel())))
    assert after > 1.2 * before


@tensorflow_only
def test_regularization_where_keras_computes_in_float64(request):
    request.addfinalizer(lambda: keras.config.set_floatx("float32"))
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    inputs = [keras.Input((3,)), keras.Input((1,))]
    dense = layers.Dense(2)
    model = keras.Model(
        inputs, HSICRegularization(1.0)([dense(inputs[0]), inputs[1]])
    )
    model.compile("sgd", "mse", run_eagerly=True)
    before = value(dense.kernel)
    assert np.isfinite(model.train_on_batch([X, X[:, :1]], X[:, :2]))
    assert not np.array_equal(value(dense.kernel), before)


def test_masks_that_are_no_pair_or_do_not_fit():
    layer = HSICRegularization(1.0)
    x, y = np.ones((2, 3, 1), "float32"), np.ones((2, 1), "float32")
    for mask, message in (
        (np.ones((2, 3), bool), "a pair"),
        ([np.ones((2, 1), bool), None], "first axes"),
        ([None, np.ones((2, 1, 1), bool)], "first axes"),
    ):
        with pytest.raises(ValueError, match=message):
            layer([x, y], mask=mask)
