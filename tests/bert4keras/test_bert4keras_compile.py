"""Losses, metrics and callbacks of old scripts, as Keras 2 understood them."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import blogkeras.bert4keras  # noqa: F401

# isort: split
from bert4keras.backend import K
from bert4keras.backend import keras as old

X = np.array([[0.1], [0.9], [0.8], [0.6]], "float32")
LABELS = np.array([0, 1, 1, 0])


def equal_rounded(y_true, y_pred):
    """The usual metric of an old script: no cast, no axis."""
    return K.mean(K.cast(K.equal(y_true, K.round(y_pred)), "float32"))


def identity_model(width=1, names=("a",)):
    """Outputs that are the inputs."""
    x = keras.Input((width,))
    outputs = [old.layers.Lambda(lambda x: x, name=name)(x) for name in names]
    return old.models.Model(x, outputs)


@pytest.mark.parametrize("dtype", ["int64", "float64", "bool"])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_metric_functions_see_columns_of_floats(dtype, shape):
    model = identity_model()
    y = LABELS.astype(dtype).reshape(shape)
    # Three of the four labels are the rounded outputs.
    for how in ("metrics", "weighted_metrics"):
        model.compile("sgd", "mse", **{how: [equal_rounded]})
        logs = model.evaluate(X, y, verbose=0, return_dict=True)
        assert logs["equal_rounded"] == pytest.approx(0.75)
    model.compile("sgd", "mse", [lambda a, b: equal_rounded(a, b)])
    assert model.evaluate(X, y, verbose=0)[1] == pytest.approx(0.75)


def test_a_number_for_a_batch_can_be_weighed():
    model = identity_model()
    model.compile("sgd", "mse", weighted_metrics=[equal_rounded])
    weights = np.array([1.0, 1.0, 0.0, 2.0])
    found = model.evaluate(
        X, LABELS, batch_size=2, sample_weight=weights, verbose=0
    )
    # Batches of accuracies 1 and 1/2, of weights 2 and 2.
    assert found[1] == pytest.approx((1.0 * 2 + 0.5 * 2) / 4)


def test_functions_see_columns_beside_several_classes():
    seen = []

    def loss(y_true, y_pred):
        seen.append((len(y_true.shape), len(y_pred.shape)))
        return K.mean(K.square(y_true - y_pred), axis=-1)

    model = identity_model(3)
    model.compile("sgd", loss, [loss])
    x = np.arange(12.0).reshape(4, 3)
    found = model.evaluate(x, LABELS, verbose=0)
    assert set(seen) == {(2, 2)}
    expected = np.mean((x - LABELS[:, None]) ** 2)
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-6)
    assert model.loss is loss


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("name", ["a.keras", "a.h5"])
def test_a_compiled_model_keeps_its_functions(name, tmp_path):
    known = {"equal_rounded": equal_rounded}
    x = keras.Input((1,))
    model = old.models.Model(x, old.layers.Dense(1)(x))
    model.compile("sgd", equal_rounded, [equal_rounded])
    for _ in range(2):
        expected = model.evaluate(X, LABELS, verbose=0, return_dict=True)
        assert expected.keys() == {"loss", "equal_rounded"}
        model.save(tmp_path / name)
        model = old.models.load_model(tmp_path / name, known)
        assert model.loss is equal_rounded
        found = model.evaluate(X, LABELS, verbose=0, return_dict=True)
        assert found == pytest.approx(expected)


def test_a_list_of_metrics_counts_for_each_output():
    model = identity_model(names=("a", "b"))
    targets = [X, X + 2]
    for metrics in (
        ["mae"],
        ["mae", "mse"],
        [keras.metrics.MeanAbsoluteError(name="mae"), "mse", equal_rounded],
    ):
        model.compile("sgd", "mse", metrics)
        found = model.evaluate(X, targets, verbose=0, return_dict=True)
        assert found["a_mae"] == 0
        assert found["b_mae"] == pytest.approx(2)
        if len(metrics) > 1:
            assert found["b_mse"] == pytest.approx(4)
    assert "a_equal_rounded" in found
    model.compile("sgd", "mse", {"b": "mae"})
    found = model.evaluate(X, targets, verbose=0, return_dict=True)
    assert "a_mae" not in found
    model.compile("sgd", "mse", [["mae"], ["mse"]])
    found = model.evaluate(X, targets, verbose=0, return_dict=True)
    assert {"a_mae", "b_mse"} < found.keys()


def worse(y_true, y_pred):
    """A metric of a function, whose direction Keras 3 does not know."""
    return K.mean(K.abs(y_true - y_pred))


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("loss", "min"),
        ("worse", "min"),
        ("val_sparse_accuracy", "max"),
        ("a_acc", "max"),
        ("fmeasure", "max"),
        ("val_crf_loss", "min"),
    ],
)
def test_mode_auto_goes_by_the_name(monitor, mode, tmp_path):
    """The rule of `ModelCheckpoint` of callbacks.py of Keras 2.3.1."""
    for callback in (
        old.callbacks.EarlyStopping(monitor),
        old.callbacks.ReduceLROnPlateau(monitor),
        old.callbacks.ModelCheckpoint(tmp_path / "best", monitor),
    ):
        assert callback.mode == mode
    opposite = {"min": "max", "max": "min"}[mode]
    assert old.callbacks.EarlyStopping(monitor, mode=opposite).mode == opposite
    plateau = old.callbacks.ReduceLROnPlateau(monitor, epsilon=0.5)
    assert plateau.min_delta == 0.5


def test_callbacks_monitor_metrics_of_functions(tmp_path):
    x = keras.Input((1,))
    model = old.models.Model(x, old.layers.Dense(1)(x))
    model.compile(keras.optimizers.SGD(0.0), "mse", [worse])
    callbacks = [
        old.callbacks.ModelCheckpoint(
            f"{tmp_path}/{{epoch}}", "worse", save_best_only=True
        ),
        old.callbacks.ReduceLROnPlateau("worse", patience=1),
        old.callbacks.EarlyStopping("worse", patience=2),
    ]
    history = model.fit(
        X, LABELS, epochs=5, verbose=0, callbacks=callbacks
    ).history
    # Nothing is learned, so that only the first epoch is an improvement.
    assert len(history["worse"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


class Seeing(old.callbacks.Callback):
    """Keeps what a callback of Keras 2 finds in `validation_data`."""

    def on_epoch_end(self, epoch, logs=None):
        self.seen = self.validation_data


def assert_seen(callback, expected):
    assert len(callback.seen) == len(expected)
    for found, array in zip(callback.seen, expected, strict=True):
        np.testing.assert_array_equal(found, array)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
def test_callbacks_see_the_validation_data():
    """`val_x + val_y + val_sample_weights` of training.py of Keras 2.3.1."""
    model = identity_model()
    model.compile("sgd", "mse")
    callback = Seeing()
    column, ones, weights = LABELS[:, None], np.ones(4), np.arange(4.0)
    fit = {"x": X, "y": LABELS, "verbose": 0, "callbacks": [callback]}
    for held_out, expected in (
        ((X, LABELS), [X, column, ones]),
        ([[X.tolist()], LABELS.tolist()], [X, column, ones]),
        ((X, LABELS, weights), [X, column, weights]),
    ):
        model.fit(**fit, validation_data=held_out)
        assert_seen(callback, expected)
    model.fit(X, LABELS, 2, 1, 0, callback, 0.0, [X, LABELS])
    assert_seen(callback, [X, column, ones])
    model.fit(**fit, validation_split=0.25)
    assert_seen(callback, [X[3:], column[3:], ones[3:]])
    model.fit_generator(
        iter([(X, LABELS)] * 2), 1, 1, 0, [callback], (X, LABELS)
    )
    assert_seen(callback, [X, column, ones])
    model.fit(**fit)
    assert callback.seen is None
    several = identity_model(names=("a", "b"))
    several.compile("sgd", "mse")
    targets = [LABELS, X]
    several.fit(
        X,
        targets,
        callbacks=[callback],
        verbose=0,
        validation_data=(X, targets),
    )
    assert_seen(callback, [X, column, X, ones, ones])
    with pytest.raises(TypeError, match="multiple values"):
        model.fit(X, LABELS, 2, batch_size=2)


def test_validation_data_of_another_model_is_an_error():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert Seeing().validation_data is None
    with pytest.raises(ValueError, match=r"`validation_data`.* Received: "):
        model.fit(X, X, verbose=0, callbacks=[Seeing()])


@pytest.mark.parametrize("eager", [True, False])
def test_a_loss_knows_the_learning_phase(eager):
    def loss(y_true, y_pred):
        number = K.in_train_phase(lambda: 3.0, 5.0)
        return K.mean(0 * y_pred) + number + 10 * K.learning_phase()

    x = keras.Input((1,))
    model = old.models.Model(x, old.layers.Dense(1)(x))
    model.compile("sgd", loss, run_eagerly=eager)
    logs = model.fit(X, X, verbose=0, validation_data=(X, X)).history
    assert logs == {"loss": [13.0], "val_loss": [5.0]}
    assert model.evaluate(X, X, verbose=0) == 5
    assert K.learning_phase() == 0


def test_a_layer_in_a_loss_knows_its_own_phase():
    class Phase(old.layers.Layer):
        def call(self, inputs, training=None):
            return K.in_train_phase(inputs + 1, inputs)

    layer = Phase()

    def loss(y_true, y_pred):
        return K.mean(layer(0 * y_pred, training=False)) + K.mean(y_pred)

    x = keras.Input((1,))
    model = old.models.Model(x, layer(x))
    model.compile("sgd", loss)
    # The output of the model in training is one more, in the loss it is not.
    assert model.evaluate(0 * X, X, verbose=0) == 0
