"""bert4keras's layers, functions and snippets against tf_keras."""

import itertools
import json
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
import tensorflow as tf
from kit import close_in_ulps

import blogkeras.bert4keras  # noqa: F401

# isort: split
from bert4keras import backend, layers, snippets


def assert_layers_equal_reference(names, reference):
    for name, function in oracle.layer_cases().items():
        if name not in names:
            continue
        results = oracle.run_layer(name, function)
        assert f"{name}/output/0" in results
        for key, value in results.items():
            tolerance = 1e-4 if "/gradient/" in key else 1e-5
            np.testing.assert_allclose(
                value, reference[key], rtol=0, atol=tolerance, err_msg=key
            )


def test_layers_equal_reference():
    assert_layers_equal_reference(oracle.QUICK_LAYERS, oracle.reference())


@pytest.mark.verify
def test_all_layers_equal_reference():
    names = oracle.layer_cases().keys()
    assert names > set(oracle.QUICK_LAYERS)
    assert_layers_equal_reference(names, oracle.reference(full=True))


def test_functions_equal_reference():
    for key, value in oracle.run_functions().items():
        reference = oracle.reference()[key]
        assert value.shape == reference.shape
        np.testing.assert_allclose(
            value, reference, rtol=0, atol=1e-5, err_msg=key
        )


def test_snippets_equal_reference():
    for key, value in oracle.run_snippets().items():
        reference = oracle.reference()[key]
        if value.dtype.kind in "fc":
            np.testing.assert_allclose(value, reference, rtol=0, atol=1e-12)
        else:
            np.testing.assert_array_equal(value, reference, err_msg=key)


def test_viterbi_finds_the_best_path():
    rng = np.random.default_rng(0)
    transitions, scores = rng.normal(size=(3, 3)), rng.normal(size=(5, 3))
    paths = itertools.product(range(3), repeat=5)
    best = max(
        paths,
        key=lambda path: (
            sum(scores[range(5), path])
            + sum(transitions[i, j] for i, j in itertools.pairwise(path))
        ),
    )
    decoder = snippets.ViterbiDecoder(transitions)
    np.testing.assert_array_equal(decoder.decode(scores), best)


def test_crf_loss_is_the_negative_log_probability():
    rng = np.random.default_rng(1)
    layer = layers.ConditionalRandomField()
    scores = rng.normal(size=(1, 4, 3)).astype("float32")
    layer(scores)
    layer.set_weights([rng.normal(size=(3, 3))])
    transitions = np.array(layer.trans)
    totals = {
        path: sum(scores[0, range(4), path])
        + sum(transitions[i, j] for i, j in itertools.pairwise(path))
        for path in itertools.product(range(3), repeat=4)
    }
    path = (0, 2, 1, 1)
    expected = np.log(np.sum(np.exp(list(totals.values())))) - totals[path]
    loss = layer.sparse_loss(np.array([path]), tf.constant(scores))
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)


class Numbers(snippets.DataGenerator):
    def __iter__(self, random=False):
        rows = []
        for is_end, row in self.sample(random):
            rows.append(row)
            if len(rows) == self.batch_size or is_end:
                x = snippets.sequence_padding(rows)
                yield [x, np.zeros_like(x)], x[:, :1] % 2
                rows = []


def numbers(lengths):
    """Lengths are equal in the first two batches, and differ after them."""
    rows = [np.arange(1, n + 1) for n in lengths]
    return Numbers(rows, batch_size=2)


def test_data_generator_feeds_fit_and_predict():
    batches = numbers([4, 3, 2, 4, 7, 1, 2])
    bert = oracle.build("bert")
    output = keras.layers.Dense(2, "softmax")(bert.output[:, 0])
    model = keras.Model(bert.inputs, output)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(
        batches.forfit(),
        steps_per_epoch=len(batches),
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    predicted = model.predict(batches.fortest(), steps=len(batches), verbose=0)
    expected = [model.predict_on_batch(x) for x, _ in batches]
    np.testing.assert_allclose(predicted, np.concatenate(expected), atol=1e-6)


def test_data_generator_goes_through_all_data_in_each_epoch():
    batches = numbers([4, 3, 2, 4, 7])
    data = batches.forfit(random=False)
    for _ in range(2):
        lengths = [next(data)[0][0].shape for _ in range(len(batches))]
        assert lengths == [(2, 4), (2, 4), (1, 7)]


def test_data_generator_gives_arrays_that_may_be_changed():
    for method in ("forfit", "fortest"):
        item = next(getattr(numbers([3, 4]), method)())
        x = item[0][0] if method == "forfit" else item[0]
        assert type(x) is np.ndarray
        x += 1


def test_data_generator_feeds_a_model_of_plain_keras():
    """With the added line alone `keras.Model` is Keras's own."""
    batches = numbers([4, 3, 2, 4, 7, 1, 2])
    tokens, segments = keras.Input((None,)), keras.Input((None,))
    x = keras.layers.Embedding(9, 2)(tokens)
    x = keras.layers.GlobalMaxPooling1D()(x)
    model = keras.Model([tokens, segments], keras.layers.Dense(1)(x))
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(batches.forfit(), steps_per_epoch=4, epochs=2, verbose=0)
    predicted = model.predict(batches.fortest(), steps=4, verbose=0)
    expected = [model.predict_on_batch(x) for x, _ in batches]
    np.testing.assert_allclose(predicted, np.concatenate(expected), atol=1e-6)


def test_data_generator_to_dataset_pads_batches():
    class Samples(snippets.DataGenerator):
        def __iter__(self, random=False):
            for _, n in self.sample(random):
                yield [list(range(n)), [1] * n], [[n]]

    dataset = Samples([2, 3, 1], batch_size=3).to_dataset(
        types=[("float32", "float32"), ("float32",)],
        shapes=[([None], [None]), ([1],)],
        names=[("token", "segment"), ("label",)],
        padded_batch=True,
    )
    x, y = next(iter(dataset))
    assert x["token"].shape == (3, 3)
    assert y.shape == (3, 1)
    n = np.array(y).astype(int)
    expected = np.where(np.arange(3) < n, np.arange(3), 0)
    np.testing.assert_array_equal(x["token"], expected)


def test_loss_layer_trains_without_targets():
    class Square(layers.Loss):
        def compute_loss(self, inputs, mask=None):
            x, y = inputs
            return tf.reduce_mean(tf.square(x - y))

    class WithoutTargets(snippets.DataGenerator):
        def __iter__(self, random=False):
            for _, x in self.sample(random):
                yield [x, 2 * x], None

    inputs = [keras.Input((3,)), keras.Input((3,))]
    y = keras.layers.Dense(3, use_bias=False)(inputs[0])
    model = keras.Model(inputs, Square(0)([y, inputs[1]]))
    model.compile(keras.optimizers.Adam(0.1), jit_compile=True)
    data = WithoutTargets(list(np.eye(3)[:, None]) * 20)
    model.fit(data.forfit(), steps_per_epoch=120, shuffle=False, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], 2 * np.eye(3), atol=0.1)


def test_backend_takes_symbolic_tensors(tmp_path):
    K = backend.K
    x = keras.Input((None, 4))
    assert K.int_shape(x) == (None, None, 4)
    assert K.ndim(x) == 3
    assert K.dtype(x) == "float32"
    model = keras.Model(x, K.sum(K.square(x), axis=1, keepdims=True))
    value = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    expected = np.square(value).sum(1, keepdims=True)
    np.testing.assert_allclose(model(value), expected, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    close_in_ulps(loaded(value), model(value))
    function = K.function([x], [K.mean(x)])
    np.testing.assert_allclose(function([value])[0], value.mean(), rtol=1e-5)


class Cubed(layers.Layer):
    """Returns the gradient of the sum of the cubes."""

    def call(self, inputs):
        x, y = inputs
        return backend.K.gradients(y, [x])[0]


def test_gradients_inside_of_a_layer():
    x = keras.Input((3,))
    y = keras.layers.Lambda(lambda x: x**3)(x)
    model = keras.Model(x, Cubed()([x, y]))
    value = np.array([[1.0, 2.0, -3.0]], "float32")
    np.testing.assert_allclose(
        model.predict(value, verbose=0), 3 * value**2, rtol=1e-6
    )
    with pytest.raises(ValueError, match="run_eagerly=False"):
        model(value)


def test_gradient_penalty_in_a_loss():
    K = backend.K
    ids = np.array([[1, 2, 1], [3, 3, 0]])
    target = np.array([[1.0], [-1.0]], "float32")

    def loss(y_true, y_pred):
        loss = K.mean(K.square(y_true - y_pred))
        table = backend.search_layer(y_pred, "Embedding-Token").embeddings
        penalty = K.sum(K.gradients(loss, [table])[0].values ** 2)
        return loss + 0.5 * penalty

    tokens = keras.Input((3,))
    x = layers.Embedding(4, 5, name="Embedding-Token")(tokens)
    x = keras.layers.Dense(1, "tanh")(keras.layers.Flatten()(x))
    model = backend.keras.models.Model(tokens, x)
    model.compile(keras.optimizers.SGD(0.1), loss)
    oracle.randomize(model)
    table, kernel, bias = model.get_weights()

    def expected(kernel):
        """By hand: each place of a token is counted for itself."""
        x = table[ids].reshape(2, 15).astype("float64")
        y = np.tanh(x @ kernel + bias)
        slope = 2 * (y - target) / 2 * (1 - y**2)
        return np.mean((y - target) ** 2) + 0.5 * np.sum(
            np.square(slope) * np.sum(kernel**2)
        )

    np.testing.assert_allclose(
        model.train_on_batch(ids, target), expected(kernel), rtol=1e-5
    )
    step = np.zeros_like(kernel, "float64")
    for i in range(15):
        e = np.eye(15)[:, i : i + 1] * 1e-5
        step[i] = (expected(kernel + e) - expected(kernel - e)) / 2e-5
    np.testing.assert_allclose(
        model.get_weights()[1], kernel - 0.1 * step, atol=1e-5
    )


def test_error_of_keras_2_train_function():
    model = oracle.built("bert")
    for use in (model._make_train_function, lambda: model.total_loss):
        with pytest.raises(NotImplementedError, match="adversarial_training"):
            use()


def test_web_serving(monkeypatch):
    routes = {}

    class Bottle:
        class request:
            class GET:
                getunicode = {"n": "3"}.get

        @staticmethod
        def route(path, method):
            return lambda function: routes.update({path: function})

    monkeypatch.setitem(sys.modules, "bottle", Bottle)
    web = snippets.WebServing(port=8864)
    web.route("/twice", lambda n: 2 * n, {"n": (int, True)})
    web.route("/fails", lambda n: 1 / (n - 3), {"n": (int, True)})
    answers = {path: json.loads(call()) for path, call in routes.items()}
    assert answers["/twice"] == {"code": 0, "desc": "succeeded", "data": 6}
    assert answers["/fails"]["code"] == 2


def test_learning_phase_is_that_of_the_model():
    K = backend.K

    class Choice(layers.Layer):
        def call(self, inputs):
            return K.in_train_phase(inputs + 1, lambda: inputs)

    layer = Choice()
    model = keras.Sequential([keras.Input((2,)), layer])
    x = np.ones((1, 2), "float32")
    np.testing.assert_array_equal(model(x), x)
    np.testing.assert_array_equal(model(x, training=True), x + 1)
    assert K.learning_phase() == 0


def test_error_of_a_missing_backend_function():
    with pytest.raises(AttributeError, match="no counterpart on Keras 3"):
        _ = backend.K.get_session


def test_search_layer_finds_layers_behind_tensors_and_models():
    model = oracle.built("albert")
    output = keras.layers.Dense(2)(model.output)
    for name in ("Embedding-Token", "Transformer-FeedForward"):
        assert backend.search_layer(output, name) is model.get_layer(name)
    assert backend.search_layer(output, "None-Such") is None
    outer = keras.layers.Dense(2)(model([keras.Input((None,))] * 2))
    found = backend.search_layer(outer, "Embedding-Token")
    assert found is model.get_layer("Embedding-Token")


def test_calls_of_a_shared_layer_by_their_number():
    model = oracle.built("albert")
    layer = model.get_layer("Transformer-FeedForward-Norm")
    first, last = layer.get_output_at(0), layer.get_output_at(-1)
    assert last is model.output
    assert first is not last
    inputs = layer.get_input_at(1)
    both = keras.Model(model.inputs, [first, inputs])
    assert [y.shape for y in both(oracle.padded_batch(model))] == [
        (3, 9, 32)
    ] * 2


def test_plain_keras_layers_see_the_mask():
    model = oracle.built("bert")
    plain = keras.layers.GlobalAveragePooling1D()(model.output)
    ours = layers.GlobalAveragePooling1D()(model.output)
    both = keras.Model(model.inputs, [plain, ours])
    outputs = both(oracle.padded_batch(model))
    np.testing.assert_allclose(*outputs, atol=1e-6)
