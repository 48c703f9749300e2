"""What layers and `keras.backend` of old scripts do, on Keras 3."""

import h5py
import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
import tensorflow as tf

import blogkeras.bert4keras  # noqa: F401

# isort: split
from bert4keras import layers
from bert4keras.backend import K
from bert4keras.backend import keras as keras_of_scripts

Model = keras_of_scripts.models.Model
OldLayer = keras_of_scripts.layers.Layer


def test_habits_equal_reference():
    """Metrics and losses of layers and models, variables, tables in place."""
    found = oracle.run_habits()
    names = {name for name in oracle.reference() if name.startswith("habit ")}
    assert found.keys() == names
    for name, value in found.items():
        np.testing.assert_allclose(
            value, oracle.reference()[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert found["habit variable loss"][-1] < found["habit variable loss"][0]


class NoMask(OldLayer):
    """Returns what it is given, and ends the mask."""

    def call(self, inputs):
        return inputs

    def compute_mask(self, inputs, mask=None):
        return None


class OtherMask(OldLayer):
    """Returns its first input with a mask made of the second."""

    def call(self, inputs, mask=None):
        return inputs[0]

    def compute_mask(self, inputs, mask=None):
        return K.greater(inputs[1], 0.5)


class Inner(OldLayer):
    """The output of a layer inside carries the mask of the input."""

    def build(self, input_shape):
        self.inner = keras.layers.Dense(2, "linear", False, "identity")
        super().build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)

    def compute_mask(self, inputs, mask=None):
        return None


@pytest.mark.parametrize("layer", [NoMask, OtherMask, Inner])
@pytest.mark.parametrize("eager", [True, False])
def test_compute_mask_is_always_asked(layer, eager):
    """As in Keras 2.3.1; tf_keras lets an unchanged input keep its mask."""
    ids, chosen = np.array([[3, 0, 5]]), np.array([[1.0, 1.0, 0.0]])
    tokens, choice = keras.Input((3,)), keras.Input((3,))
    x = layers.Embedding(6, 2, mask_zero=True, name="e")(tokens)
    masked = layers.GlobalAveragePooling1D()
    inputs = [x, choice] if layer is OtherMask else x
    model = Model([tokens, choice], masked(layer()(inputs)))
    table = model.get_layer("e").get_weights()[0]
    rows = table[[3, 0]] if layer is OtherMask else table[[3, 0, 5]]
    call = model if eager else model.predict
    np.testing.assert_allclose(
        call([ids, chosen]), rows.mean(0)[None], rtol=1e-5
    )


@pytest.mark.parametrize("make", [K.variable, tf.Variable, keras.Variable])
@pytest.mark.parametrize("named", [True, False])
def test_a_variable_made_in_build_is_trained(make, named):
    class Layer(OldLayer):
        def build(self, input_shape):
            w = make(np.ones((3, 1), "float32"))
            if named:
                self._trainable_weights = [w]
            self.w = self.again = w
            super().build(input_shape)

        def call(self, inputs):
            return K.dot(inputs, self.w)

    inputs = keras.Input((3,))
    layer = Layer()
    model = Model(inputs, layer(inputs))
    assert len(model.trainable_weights) == 1
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.eye(3, dtype="float32")
    model.train_on_batch(x, np.zeros((3, 1)))
    # The gradient of the mean of three squares.
    np.testing.assert_allclose(
        layer.get_weights()[0], np.full((3, 1), 1 - 0.1 * 2 / 3), rtol=1e-6
    )


def test_variables_that_are_not_trained():
    class Layer(OldLayer):
        def build(self, input_shape):
            self.a, self.b = K.variable(1.0), K.variable(2.0)
            self.trainable_weights = [self.a]
            self._non_trainable_weights = [self.b]

        def call(self, inputs):
            return inputs * self.a * self.b

    layer = Layer()
    layer(np.ones((1, 2)))
    assert [float(w) for w in layer.trainable_weights] == [1.0]
    assert [float(w) for w in layer.non_trainable_weights] == [2.0]
    with pytest.raises(ValueError, match="Expected variables"):
        layer._trainable_weights = [tf.zeros(3)]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("w", (3, 2)), {"initializer": "ones"}),
        (("w", (3, 2), "float32", "ones"), {}),
        (((3, 2), "ones"), {}),
        (((3, 2),), {"initializer": "ones", "name": "w"}),
        ((), {"shape": (3, 2), "initializer": "ones", "name": "a/w"}),
    ],
)
def test_add_weight_takes_arguments_of_both_kerases(args, kwargs):
    weight = OldLayer().add_weight(*args, **kwargs)
    np.testing.assert_array_equal(weight, np.ones((3, 2)))
    assert weight.trainable


@pytest.mark.parametrize("make", [K.variable, OldLayer().add_weight])
def test_arrays_of_float64_take_the_dtype_of_a_weight(make):
    if make is K.variable:
        w = make([2.0, 4.0])
    else:
        w = make("w", (2,), initializer="ones")
        w.assign([2.0, 4.0])
    x = np.array([3.0, 5.0])
    for found, expected in (
        (w * x, [6, 20]),
        (x * w, [6, 20]),
        (x - w, [1, 1]),
        (w - x, [-1, -1]),
        (w + np.float64(1), [3, 5]),
        (w / x, [2 / 3, 4 / 5]),
        (1 - w, [-1, -3]),
        (w @ x, 26),
        (w**2, [4, 16]),
    ):
        assert found.dtype == tf.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert K.stop_gradient(w).dtype == tf.float32


def test_errors_of_symbolic_updates_and_metrics():
    layer = OldLayer()
    layer.add_update([])
    with pytest.raises(ValueError, match=r"K.update"):
        layer.add_update([tf.zeros(1)])
    with pytest.raises(ValueError, match="aggregation='sum'"):
        layer.add_metric(tf.zeros(1), name="m", aggregation="sum")
    with pytest.raises(ValueError, match="name=None"):
        layer.add_metric(tf.zeros(1))


def test_shapes_of_a_layer():
    inputs = keras.Input((5, 4))
    layer = NoMask()
    outputs = layer(inputs)
    assert layer.input_shape == layer.output_shape == (None, 5, 4)
    assert layer.get_output_shape_at(0) == layer.get_input_shape_at(0)
    assert layer.get_output_at(0) is outputs


def test_ones_zeros_and_eye_inside_of_call():
    class Layer(OldLayer):
        def call(self, inputs):
            rows = K.shape(inputs)[0]
            total = K.ones((rows, 2)) + K.zeros((2,)) + inputs
            return K.dot(K.eye(rows), total)

    inputs = keras.Input((2,))
    model = Model(inputs, Layer()(inputs))
    x = np.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(model.predict(x), x + 1)
    for variable in (K.ones((2,)), K.zeros(2), K.eye(2)):
        assert K.is_variable(variable)


def test_function_of_the_learning_phase():
    inputs = keras.Input((50,))
    outputs = keras.layers.Dropout(0.5)(inputs)
    function = K.function([inputs, K.learning_phase()], [outputs])
    x = np.ones((2, 50))
    (infers,), (trains,) = function([x, 0]), function([x, 1])
    np.testing.assert_array_equal(infers, x)
    assert set(np.unique(trains)) == {0.0, 2.0}
    K.set_learning_phase(0)
    with pytest.raises(ValueError, match="training=True"):
        K.set_learning_phase(1)


def test_kinds_of_tensors():
    symbolic = keras.Input((2,))
    assert K.is_keras_tensor(symbolic)
    assert K.is_placeholder(symbolic)
    assert not K.is_keras_tensor(tf.zeros(2))
    assert K.is_tensor(tf.zeros(2))
    assert not K.is_tensor([0.0])
    with pytest.raises(ValueError, match="to be a tensor"):
        K.is_keras_tensor([0.0])
    with pytest.raises(ValueError, match="data_format='rows'"):
        K.normalize_data_format("rows")


def test_small_functions_of_the_backend():
    x = np.array([[1.0, 2.0, 4.0], [0.0, 3.0, 1.0]], "float32")
    np.testing.assert_array_equal(K.identity(x), x)
    np.testing.assert_array_equal(K.slice(x, [0, 1], [2, 2]), x[:, 1:])
    assert K.size(x) == 6
    assert K.get_variable_shape(K.variable(x)) == (2, 3)
    np.testing.assert_allclose(
        K.logsumexp(x, axis=1), np.log(np.exp(x).sum(1)), rtol=1e-6
    )
    np.testing.assert_array_equal(
        K.in_top_k(tf.constant(x), [1, 1], 1), [False, True]
    )
    low = K.get_value(K.random_uniform_variable((50,), 2.0, 3.0))
    assert 2 <= low.min() < low.max() <= 3
    normal = K.get_value(K.random_normal_variable((500,), 7.0, 0.1, seed=1))
    assert abs(normal.mean() - 7) < 0.03
    with pytest.raises(ValueError, match="toarray"):
        K.variable(type("Sparse", (), {"tocoo": None})())


MERGES = ["Add", "Subtract", "Average", "Multiply", "Maximum", "Minimum"]


def merged_mask(merge, left=True, right=True):
    """The mask of two merged sequences; a side without a mask has numbers."""
    ids = np.array([[3, 0, 5], [1, 2, 0]]), np.array([[3, 1, 0], [0, 2, 1]])
    inputs = [keras.Input((3,)) for _ in ids]
    embed = keras_of_scripts.layers.Embedding
    tables = [
        embed(6, 2, mask_zero=mask)(x)
        for mask, x in zip((left, right), inputs, strict=True)
    ]

    class Mask(OldLayer):
        def call(self, inputs, mask=None):
            shape = K.shape(inputs)
            return K.cast(mask, "float32") if mask is not None else -shape

        def compute_mask(self, inputs, mask=None):
            return None

    return Model(inputs, Mask()(merge(tables))).predict(ids) > 0


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("as_function", [False, True])
def test_merged_masks_are_those_of_all_inputs(name, as_function):
    """As `_Merge.compute_mask` of merge.py of Keras 2.3.1."""
    if as_function:
        merge = getattr(keras_of_scripts.layers, name.lower())
    else:
        merge = getattr(keras_of_scripts.layers, name)()
    left = np.array([[1, 0, 1], [1, 1, 0]], bool)
    right = np.array([[1, 1, 0], [0, 1, 1]], bool)
    np.testing.assert_array_equal(merged_mask(merge), left & right)
    if as_function:
        np.testing.assert_array_equal(merged_mask(merge, right=False), left)
        np.testing.assert_array_equal(merged_mask(merge, left=False), right)


def test_masks_of_concatenated_sequences():
    layers_of_scripts = keras_of_scripts.layers
    left = np.array([[1, 0, 1], [1, 1, 0]], bool)
    right = np.array([[1, 1, 0], [0, 1, 1]], bool)
    full = np.ones_like(left)
    for merge in (
        layers_of_scripts.concatenate,
        lambda x: layers_of_scripts.Concatenate()(x),
    ):
        np.testing.assert_array_equal(merged_mask(merge), left & right)
        np.testing.assert_array_equal(merged_mask(merge, right=False), left)

    def after(x):
        return layers_of_scripts.concatenate(x, axis=1)

    for sides, expected in (
        ((True, True), [left, right]),
        ((True, False), [left, full]),
    ):
        np.testing.assert_array_equal(
            merged_mask(after, *sides), np.concatenate(expected, axis=1)
        )


def old_hard_sigmoid(x):
    return np.clip(0.2 * x + 0.5, 0, 1)


def test_hard_sigmoid_is_that_of_keras_2(tmp_path):
    x = np.linspace(-4, 4, 9)[:, None].astype("float32")
    expected = old_hard_sigmoid(x)
    inputs = keras.Input((1,))
    old = keras_of_scripts.layers
    dense = old.Dense(1, "hard_sigmoid", kernel_initializer="ones")
    conv = old.Conv1D(
        1, 1, activation="hard_sigmoid", kernel_initializer="ones"
    )
    model = Model(
        inputs,
        [
            old.Activation("hard_sigmoid")(inputs),
            dense(inputs),
            old.Flatten()(conv(old.Reshape((1, 1))(inputs))),
        ],
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for found in (*model.predict(x), *loaded.predict(x)):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    for activations in (keras_of_scripts.activations, K):
        np.testing.assert_allclose(
            activations.hard_sigmoid(tf.constant(x)), expected, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("version", [b"2.3.1", "2.3.1", "3.0.0"])
def test_hard_sigmoid_in_a_file(version, tmp_path):
    inputs = keras.Input((1, 1))
    lstm = keras.layers.LSTM(1, recurrent_activation="hard_sigmoid")
    y = keras.layers.Activation("hard_sigmoid")(inputs)
    model = keras.Model(inputs, [lstm(inputs), y])
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "a") as file:
        # Keras 2.3.1 writes bytes, tf_keras a string.
        file.attrs["keras_version"] = version
    model = keras_of_scripts.models.load_model(tmp_path / "model.h5")
    lstm = next(x for x in model.layers if isinstance(x, keras.layers.LSTM))
    kernel, _, _ = [np.zeros_like(w) for w in lstm.get_weights()]
    lstm.set_weights([kernel + 1.0, lstm.get_weights()[1], np.zeros(4)])
    gate = 2 / 6 + 0.5 if version == "3.0.0" else old_hard_sigmoid(2.0)
    state, activated = model.predict(np.full((1, 1, 1), 2.0))
    np.testing.assert_allclose(
        state, [[gate * np.tanh(gate * np.tanh(2.0))]], rtol=1e-5
    )
    np.testing.assert_allclose(activated, [[[gate]]], rtol=1e-5)


def test_activations_inside_of_recurrent_layers_by_default():
    """Those of recurrent.py and convolutional_recurrent.py of Keras 2.3.1."""
    old, sigmoid = keras_of_scripts.layers, keras.activations.sigmoid
    assert old.LSTM(2).recurrent_activation is sigmoid
    layer = old.ConvLSTM2D(2, 1)
    assert layer.cell.recurrent_activation(tf.constant(1.0)) == np.float32(0.7)
    layer = old.ConvLSTM2D(2, 1, recurrent_activation="sigmoid")
    assert layer.cell.recurrent_activation is sigmoid


def test_gru_resets_before_the_product():
    """The default of recurrent.py of Keras 2.3.1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 2)).astype("float32")
    inputs = keras.Input((3, 2))
    gru = keras_of_scripts.layers.GRU(4)
    model = Model(inputs, gru(inputs))
    weights = [rng.normal(size=w.shape) for w in gru.get_weights()]
    assert [w.shape for w in weights] == [(2, 12), (4, 12), (12,)]
    gru.set_weights(weights)
    kernel, recurrent, bias = weights
    h = np.zeros((2, 4))
    for step in range(3):
        part = x[:, step] @ kernel + bias
        both = 1 / (1 + np.exp(-part[:, :8] - h @ recurrent[:, :8]))
        update, reset = both[:, :4], both[:, 4:]
        new = np.tanh(part[:, 8:] + (reset * h) @ recurrent[:, 8:])
        h = update * h + (1 - update) * new
    np.testing.assert_allclose(model.predict(x), h, rtol=1e-4, atol=1e-6)
    for make, after in (
        (keras_of_scripts.layers.GRU, False),
        (keras_of_scripts.layers.GRUCell, False),
        (keras_of_scripts.layers.CuDNNGRU, True),
    ):
        assert make(4).reset_after is after
    assert keras_of_scripts.layers.GRU(4, reset_after=True).reset_after
    assert isinstance(gru, keras_of_scripts.layers.GRU)
    copy = keras.layers.GRU.from_config(gru.get_config())
    assert not copy.reset_after
