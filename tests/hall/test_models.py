"""Models of models: saved as compiled; verbs in batches."""

import keras
import numpy as np
import pytest
import toy
import train_steps
from keras import layers, ops
from kit import jax_only, slow_on_tensorflow

from blogkeras import backend, models


@keras.saving.register_keras_serializable(package="blogkeras_tests")
class Linear(models.CompositeModel):
    def __init__(self, head=None, **kwargs):
        super().__init__(**kwargs)
        self.head = head or layers.Dense(1)

    def build(self, input_shape):
        if not self.head.built:
            self.head.build(input_shape)

    def call(self, x):
        return self.head(x)

    def compile(self, optimizer="sgd", loss="mse", **kwargs):
        super().compile(optimizer, loss, **kwargs)


def test_a_loaded_model_is_compiled_and_goes_on(tmp_path):
    model = Linear()
    model.compile(keras.optimizers.Adam(0.01))
    model.fit(toy.DENSE, toy.TARGETS, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(toy.DENSE, toy.TARGETS, verbose=0, shuffle=False)
    assert toy.difference(toy.state(model), toy.state(loaded)) == 0


def test_no_data():
    model = Linear()
    model.compile()
    with pytest.raises(ValueError, match="Expected data"):
        model.fit(verbose=0)
    with pytest.raises(ValueError, match="at least one row"):
        model.fit(toy.DENSE[:0], toy.TARGETS[:0], verbose=0)
    tf = pytest.importorskip("tensorflow")
    rows = tf.data.Dataset.from_tensor_slices((toy.DENSE, toy.TARGETS))
    with pytest.raises(ValueError, match="at least one row"):
        model.fit(rows.batch(len(toy.DENSE) + 1, drop_remainder=True))


@jax_only
@pytest.mark.parametrize("name", train_steps.MODELS)
def test_fit_twice_with_averages_of_weights(name, tmp_path):
    """Keras 3.15 alone fails: a weight and its average have one array."""
    maker, x, y = train_steps.MODELS[name]
    model = maker(optimizer=keras.optimizers.SGD(0.01, use_ema=True))
    for _ in range(2):
        model.fit(x, y, verbose=0)
        model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")


@slow_on_tensorflow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_part_that_was_trained_with_averages_of_weights(frozen, tmp_path):
    x, y = toy.DENSE, toy.TARGETS
    head = keras.Sequential([keras.Input(x.shape[1:]), layers.Dense(1)])
    head.compile(keras.optimizers.Adam(use_ema=True), "mse")
    head.fit(x, y, verbose=0)
    average = head.optimizer._model_variables_moving_average[0].numpy()
    head.trainable = not frozen
    model = Linear(keras.Sequential([head, layers.Dense(1)]))
    model.compile()
    model.fit(x, y, verbose=0)
    # What was given away with a step would be missed here.
    model.save(tmp_path / "model.keras")
    head.save(tmp_path / "head.keras")
    kept = head.optimizer._model_variables_moving_average[0].numpy()
    np.testing.assert_array_equal(kept, average)
    head.trainable = True
    head.fit(x, y, verbose=0)


def test_batches_of_one_shape(capsys):
    shapes = []

    def fn(x, y):
        shapes.append(tuple(x.shape))
        return {"sum": x + y, "first": x[:, 0]}

    x = np.arange(14, dtype="float32").reshape(7, 2)
    y = np.ones((7, 1), "float32")
    result = models.map_batches(backend.jit(fn), [x, y], 3, verbose=1)
    np.testing.assert_array_equal(result["sum"], x + y)
    np.testing.assert_array_equal(result["first"], x[:, 0])
    assert set(shapes) == {(3, 2)}
    assert "3/3" in capsys.readouterr().out
    # Fewer rows than a batch: nothing is filled up.
    models.map_batches(backend.jit(fn), [ops.ones((2, 2)), y[:2]], 100)
    assert shapes[-1] == (2, 2)


@pytest.mark.parametrize(
    ("arrays", "size"),
    [([np.ones(3), np.ones(2)], 2), ([np.ones(0)], 2), ([np.ones(3)], 0)],
)
def test_bad_batches(arrays, size):
    with pytest.raises(ValueError, match="Received"):
        models.map_batches(lambda *x: x, arrays, size)
