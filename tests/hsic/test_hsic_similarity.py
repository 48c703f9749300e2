"""`compare_layers` of models without a graph: subclassed ones."""

import keras
import numpy as np
import pytest
from hsic_reference import definition, value
from keras import layers, ops

from blogkeras.hsic import GaussianKernel, LinearKernel, compare_layers

X = np.random.default_rng(0).normal(size=(30, 3)).astype("float32")


@keras.saving.register_keras_serializable(package="blogkeras_tests")
class TwoOutputs(layers.Layer):
    def call(self, x):
        return x, -x


class Subclassed(keras.Model):
    """Layers in a list, one called twice, one of positions, one never."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [
            layers.Dense(4, activation="tanh", name=f"block_{i}")
            for i in range(2)
        ]
        self.shared = layers.Dense(4, name="shared")
        self.normalization = layers.BatchNormalization(name="normalization")
        self.positions = layers.Embedding(4, 4, name="positions")
        self.pair = TwoOutputs(name="pair")
        self.unused = layers.Dropout(0.1, name="unused")

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        x = self.shared(x) + ops.mean(self.positions(ops.arange(4)), axis=0)
        x, _ = self.pair(self.normalization(x, training=training))
        return self.shared(x)


def subclassed():
    keras.utils.set_random_seed(0)
    model = Subclassed(name="subclassed")
    model(X)
    return model


def outputs_of(model, x):
    """What the layers return, by hand."""
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    found.append(model.shared(x))
    x = found[-1] + ops.mean(model.positions(ops.arange(4)), axis=0)
    found.append(model.normalization(x, training=False))
    found.append(model.shared(found[-1]))
    return [value(x) for x in found]


NAMES = ["block_0", "block_1", "shared", "normalization", "shared (call 2)"]


def test_layers_of_a_subclassed_model():
    model = subclassed()
    found = compare_layers(model, model, X, batch_size=16)
    assert found.layers_a == found.layers_b == NAMES
    sums = np.zeros((5, 5))
    for rows in (slice(0, 16), slice(16, 30)):
        matrices = [x @ x.T for x in outputs_of(model, X[rows])]
        sums += [
            [definition(k, m, "unbiased") for m in matrices] for k in matrices
        ]
    scale = np.sqrt(np.diag(sums))
    np.testing.assert_allclose(
        found.matrix, sums / scale / scale[:, None], rtol=1e-4, atol=1e-6
    )
    # Nothing is left behind in the layers, and training goes on.
    assert not any("call" in vars(layer) for layer in model.layers)
    model.compile("sgd", "mse")
    before = model.normalization.moving_mean.numpy().copy()
    again = compare_layers(model, model, X, batch_size=16)
    np.testing.assert_array_equal(again.matrix, found.matrix)
    np.testing.assert_array_equal(model.normalization.moving_mean, before)


def test_a_subclassed_and_a_functional_model(tmp_path):
    inputs = keras.Input((3,))
    layer = layers.Dense(3, name="dense")
    functional = keras.Model(inputs, layer(inputs), name="functional")
    path = tmp_path / "map.png"
    found = compare_layers(functional, subclassed(), X, path=path)
    assert found.layers_a == ["dense"]
    assert found.layers_b == NAMES
    assert path.exists()
    turned = compare_layers(subclassed(), functional, [(X, X), (X[:2], X[:2])])
    np.testing.assert_allclose(turned.matrix, found.matrix.T, rtol=1e-5)
    # The only known output of a layer may be that in another model.
    other = keras.Input((3,))
    moved = keras.Model(other, layer(layer(other)))
    found = compare_layers(moved, functional, X)
    assert found.layers_a == ["dense", "dense (call 2)"]
    assert found.matrix[0, 0] == pytest.approx(1, rel=1e-5)


class Table:
    """As those of pandas: an array, and an iterable of names."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def __iter__(self):
        return iter("xyz")


def test_whatever_holds_the_data():
    """Tensors and tables are taken as the array; batches stay batches."""
    tf = pytest.importorskip("tensorflow")
    first, second = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    both = layers.Dense(2)(layers.Add()([first, second]))
    pair = keras.Model({"a": first, "b": second}, both)

    def matrix(model, data):
        return compare_layers(model, model, data, batch_size=16).matrix

    expected = matrix(subclassed(), X)
    for data in (
        ops.convert_to_tensor(X),
        tf.constant(X),
        Table(X),
        [(X[:16],), (X[16:],)],
        iter([(X[:16], X[:16]), (X[16:], X[16:])]),
        tf.data.Dataset.from_tensor_slices(X).batch(16),
    ):
        np.testing.assert_allclose(
            matrix(subclassed(), data), expected, rtol=1e-5, atol=1e-7
        )
    expected = matrix(pair, {"a": X, "b": -X[::-1]})
    for make in (ops.convert_to_tensor, Table):
        found = matrix(pair, {"a": make(X), "b": make(-X[::-1])})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="Received: none"):
        matrix(pair, [])


def test_one_kernel_for_each_layer(monkeypatch):
    """No other one is prepared, whose bandwidth is a median of distances."""
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    made = []
    for kernel in (LinearKernel, GaussianKernel):
        of_array = kernel.of_array

        def noted(self, *args, of_array=of_array):
            made.append(type(self))
            return of_array(self, *args)

        monkeypatch.setattr(kernel, "of_array", noted)
    compare_layers(model, model, x)
    assert set(made) == {LinearKernel}


def test_models_that_cannot_be_compared():
    for model in (Subclassed(), keras.Sequential([layers.Dense(2)])):
        with pytest.raises(ValueError, match="Expected `model_a` to be a buil"):
            compare_layers(model, model, X)
    for other in (layers.Dense(3), None):
        with pytest.raises(ValueError, match="Expected `model_b` to be a buil"):
            compare_layers(subclassed(), other, X)

    class ByBatch(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Activation("tanh", name="first")
            self.second = layers.Activation("relu", name="second")

        def call(self, x):
            return self.first(x) if x.shape[0] == 16 else self.second(x)

    model = ByBatch()
    model(X)
    with pytest.raises(ValueError, match=r"same layers in each batch\. Rec"):
        compare_layers(model, model, X, batch_size=16)
