"""Models, data, files and callbacks of old scripts, on Keras 3."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
from kit import close_in_ulps

import blogkeras.bert4keras  # noqa: F401
from blogkeras.bert4keras import data

# isort: split
from bert4keras import optimizers
from bert4keras.backend import K
from bert4keras.backend import keras as old

IDS = np.array([[1, 2, 0], [3, 1, 2], [2, 0, 0], [1, 1, 1]])
TARGETS = np.array([0.0, 1.0, 1.0, 0.0])


def network(**arguments):
    """Two inputs, the user's own `Lambda`, one output."""
    tokens, segments = keras.Input((None,)), keras.Input((None,))
    x = old.layers.Embedding(5, 3, mask_zero=True, name="table")(tokens)
    x = old.layers.Lambda(lambda x: x[:, 0])(x)
    model = old.models.Model([tokens, segments], old.layers.Dense(1)(x))
    arguments = {"optimizer": "sgd", "loss": "mse", **arguments}
    model.compile(**arguments, run_eagerly=True)
    return model


def batches(kind=list):
    """An endless generator of batches of different lengths, as lists."""
    while True:
        for rows in ([0, 1], [2, 3], [1]):
            x = IDS[rows, : len(rows) + 1]
            yield kind([[x, 0 * x], TARGETS[rows]])


def inputs():
    return (batch[0] for batch in batches())


def assert_same_weights(model, other):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("name", ["fit", "fit_generator"])
def test_fits_a_generator_as_train_on_batch_does(kind, name):
    keras.utils.set_random_seed(1)
    model = network()
    reference = network()
    reference.set_weights(model.get_weights())
    fit = getattr(model, name)
    fit(batches(kind), steps_per_epoch=3, epochs=2, verbose=0, workers=4)
    source = batches()
    for _ in range(6):
        reference.train_on_batch(*next(source))
    for a, b in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_arguments_of_fit_generator_in_the_order_of_keras_2():
    model = network(metrics=["mae"])
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(epoch)
    )
    history = model.fit_generator(
        batches(), 2, 3, 0, [callback], batches(), 2, 1, None, 10, 1, False
    ).history
    assert seen == [0, 1, 2]
    assert history.keys() == {"loss", "mae", "val_loss", "val_mae"}


def test_predicts_and_evaluates_generators():
    model = network(metrics=["mae"])
    predicted = model.predict_generator(inputs(), 3)
    source = inputs()
    expected = [model.predict_on_batch(next(source)) for _ in range(3)]
    np.testing.assert_allclose(predicted, np.concatenate(expected), rtol=1e-6)
    labelled = model.predict_generator(batches(tuple), steps=3)
    np.testing.assert_allclose(labelled, predicted, rtol=1e-6)
    error = predicted[:, 0] - TARGETS[[0, 1, 2, 3, 1]]
    loss, mae = model.evaluate_generator(batches(), 3)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(mae, np.mean(abs(error)), rtol=1e-5)
    assert model.metrics_names == ["loss", "mae"]


def test_lists_of_numbers_in_place_of_arrays():
    model = network()
    x, lists = [IDS, 0 * IDS], [IDS.tolist(), (0 * IDS).tolist()]
    expected = model.predict(x)
    for call in (model.predict, model.predict_on_batch):
        np.testing.assert_allclose(call(lists), expected, rtol=1e-6)
    loss = np.mean((expected[:, 0] - TARGETS) ** 2)
    for call in (model.evaluate, model.test_on_batch):
        np.testing.assert_allclose(call(lists, [0, 1, 1, 0]), loss, rtol=1e-5)
    model.fit(lists, [0, 1, 1, 0], verbose=0, validation_data=[lists, [0] * 4])
    model.train_on_batch(lists, [0, 1, 1, 0], reset_metrics=False)


def test_weights_of_classes_count_with_a_generator():
    keras.utils.set_random_seed(1)
    model, reference = network(), network()
    reference.set_weights(model.get_weights())
    weights = {0: 2.0, 1: 5.0}
    model.fit(batches(), steps_per_epoch=3, verbose=0, class_weight=weights)
    source = batches()
    for _ in range(3):
        reference.train_on_batch(*next(source), class_weight=weights)
    for a, b in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


class Rows(old.utils.Sequence):
    """A `Sequence` that, as is usual, calls nothing of its base class."""

    def __init__(self):
        self.epochs = 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        x = IDS[2 * index : 2 * index + 2, : index + 2]
        return [x, 0 * x], TARGETS[2 * index : 2 * index + 2]

    def on_epoch_end(self):
        self.epochs += 1


def test_a_sequence_knows_its_steps():
    model, rows = network(), Rows()
    model.fit_generator(rows, epochs=3, verbose=0, validation_data=Rows())
    assert rows.epochs >= 2  # the last batch may not have been asked past
    predicted = model.predict_generator(Rows())
    expected = [model.predict_on_batch(x) for x, _ in Rows()]
    np.testing.assert_allclose(predicted, np.concatenate(expected), rtol=1e-6)
    assert np.isfinite(model.evaluate_generator(Rows()))


def test_errors_of_generators():
    model = network()
    with pytest.raises(ValueError, match="at least one batch"):
        model.fit(iter(()), steps_per_epoch=1)
    with pytest.raises(ValueError, match="to yield the targets"):
        model.fit(batches(), TARGETS, steps_per_epoch=1)
    with pytest.raises(ValueError, match="4 entries"):
        data.as_batch((1, 2, 3, 4))


def test_errors_of_compile():
    with pytest.raises(ValueError, match="give `y` to fit"):
        network(target_tensors=[keras.Input((1,))])
    with pytest.raises(ValueError, match="sample_weight_mode='other'"):
        network(sample_weight_mode="other")


def test_compile_takes_metrics_third():
    model = network()
    model.compile("sgd", "mse", ["mae"])
    model.evaluate([IDS, IDS], TARGETS, verbose=0)
    assert model.metrics_names == ["loss", "mae"]


def test_model_takes_arguments_of_keras_1_and_2():
    a = keras.Input((2,))
    model = old.models.Model(input=a, output=old.layers.Dense(1)(a))
    assert model.input is a
    assert isinstance(model, keras.Model)

    class Own(old.models.Model):
        def __init__(self):
            super().__init__()
            self.dense = old.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    model.compile("sgd", "mse", run_eagerly=True)
    rows = ([np.eye(2), np.zeros(2)] for _ in range(9))
    model.fit_generator(rows, 2, verbose=0)


def test_sequential_of_keras_2():
    model = old.models.Sequential()
    model.add(keras.Input((3,)))
    model.add(old.layers.Dense(1, activation="sigmoid"))
    model.compile("adam", "binary_crossentropy", ["accuracy"])
    x = np.eye(3)
    rows = ([x, [0, 1, 1]] for _ in range(9))
    model.fit_generator(rows, steps_per_epoch=2, verbose=0)
    probabilities = model.predict_proba(x)
    np.testing.assert_array_equal(model.predict_classes(x), probabilities > 0.5)
    several = old.models.Sequential([keras.Input((3,)), old.layers.Softmax()])
    np.testing.assert_array_equal(several.predict_classes(x), [0, 1, 2])


NAMES = ["best.h5", "best.hdf5", "best", "model.ckpt", "best.weights"]


@pytest.mark.parametrize("name", [*NAMES, "best.weights.h5"])
def test_weights_in_a_file_of_any_name(name, tmp_path):
    model, other = network(), network()
    model.save_weights(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    other.load_weights(str(tmp_path / name))
    assert_same_weights(model, other)


def test_weights_of_keras_2_are_read(tmp_path):
    """The file is written by tf_keras, from the same weights."""
    path = tmp_path / "best_model.h5"
    path.write_bytes(oracle.reference()["weights file"].tobytes())
    model = oracle.build("albert")
    expected = model.get_weights()
    for arguments in ({}, {"by_name": True}):
        model.set_weights([0 * w for w in expected])
        model.load_weights(path, **arguments)
        for value, weight in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(value, weight)


def test_weights_are_written_in_the_format_of_keras_2(tmp_path):
    model = network()
    model.save_weights(tmp_path / "best")
    with h5py.File(tmp_path / "best") as file:
        assert "table" in list(file.attrs["layer_names"])
        kernel = file["table"][file["table"].attrs["weight_names"][0]][:]
    np.testing.assert_array_equal(kernel, model.get_layer("table").embeddings)


def test_errors_of_weights_files(tmp_path):
    model = network()
    (tmp_path / "damaged").write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match="Expected an HDF5 file"):
        model.load_weights(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError, match="none"):
        model.load_weights(tmp_path / "none")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.filterwarnings("ignore:The state of the optimizer")
@pytest.mark.parametrize("rate", ["lr", "learning_rate"])
def test_a_compiled_model_that_keras_2_has_saved(rate, tmp_path):
    """The compilation as Keras 2.2 and 2.3.1 wrote it, with the state."""
    model = network(optimizer="adam")
    model.fit([IDS, IDS], TARGETS, verbose=0)
    model.save(tmp_path / "a.h5")
    config = {rate: 0.25, "beta_1": 0.5, "beta_2": 0.75}
    config |= {"decay": 0.125, "epsilon": 1e-7, "amsgrad": False}
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["keras_version"] = b"2.3.1"
        file.attrs["training_config"] = json.dumps(
            {
                "optimizer_config": {"class_name": "Adam", "config": config},
                "loss": "mean_squared_error",
                "metrics": ["accuracy"],
                "sample_weight_mode": None,
                "loss_weights": None,
            }
        ).encode()
        del file["optimizer_weights"]
        state = file.create_group("optimizer_weights")
        state["iterations"] = np.int64(3)
        state.attrs["weight_names"] = [b"iterations"]
    optimizer = old.models.load_model(tmp_path / "a.h5").optimizer
    assert type(optimizer) is old.optimizers.Adam
    assert (float(optimizer.lr), optimizer.decay) == (0.25, 0.125)
    assert (optimizer.beta_1, optimizer.beta_2) == (0.5, 0.75)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("name", ["a.keras", "a.h5", "a.hdf5", "a.model", "a"])
def test_models_in_a_file_of_any_name(name, tmp_path):
    decay = optimizers.extend_with_weight_decay(optimizers.Adam)
    model = network(
        optimizer=decay(0.01, weight_decay_rate=0.1), metrics=["mse"]
    )
    model.fit([IDS, IDS], TARGETS, verbose=0)
    for _ in range(2):  # Keras forgets the optimizer at the first time
        model.save(str(tmp_path / name))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    loaded = old.models.load_model(tmp_path / name)
    assert isinstance(loaded, old.models.Model)
    assert_same_weights(loaded, model)
    lists = [IDS.tolist(), IDS.tolist()]
    close_in_ulps(loaded.predict(lists), model.predict([IDS, IDS]))
    assert type(loaded.optimizer) is decay
    state = loaded.optimizer.variables, model.optimizer.variables
    for a, b in zip(*state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_code_of_a_lambda_is_run_unless_it_is_refused(tmp_path):
    network().save(tmp_path / "a.model")
    with pytest.raises(ValueError, match="lambda"):
        old.models.load_model(tmp_path / "a.model", safe_mode=True)
    # Under the same name in a `.keras` file Keras itself refuses, too.
    (tmp_path / "a.model").rename(tmp_path / "a.keras")
    with pytest.raises(ValueError, match="lambda"):
        keras.saving.load_model(tmp_path / "a.keras")


def test_asks_before_it_overwrites(tmp_path, monkeypatch):
    model = network()
    path = tmp_path / "best"
    path.write_text("old")
    monkeypatch.setattr("builtins.input", lambda text: "n")
    model.save_weights(path, overwrite=False)
    model.save(path, overwrite=False)
    assert path.read_text() == "old"
    monkeypatch.setattr("builtins.input", lambda text: "y")
    model.save(path, overwrite=False)
    assert zipfile.is_zipfile(path)


def test_checkpoints_of_any_name_and_period(tmp_path):
    checkpoint = old.callbacks.ModelCheckpoint
    model = network()
    folder = str(tmp_path)
    callbacks = [
        checkpoint(f"{folder}/best.h5", "loss", 0, True, True, "min"),
        checkpoint(f"{folder}/best.weights", save_weights_only=True),
        checkpoint(
            f"{folder}/{{epoch}}.hdf5", save_weights_only=True, period=2
        ),
        checkpoint(f"{folder}/whole.model", period=3),
    ]
    model.fit([IDS, IDS], TARGETS, epochs=5, verbose=0, callbacks=callbacks)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [
        "2.hdf5",
        "4.hdf5",
        "best.h5",
        "best.weights",
        "whole.model",
    ]
    other = network()
    other.load_weights(tmp_path / "best.weights")
    assert_same_weights(model, other)
    with pytest.raises(ValueError, match="period"):
        checkpoint("best.h5", period=0)


def test_a_callback_that_sets_its_model(tmp_path):
    class Evaluator(old.callbacks.Callback):
        def __init__(self, model):
            self.model = model

        def on_epoch_end(self, epoch, logs=None):
            self.model.save_weights(tmp_path / "best")

    model = network()
    model.fit([IDS, IDS], TARGETS, verbose=0, callbacks=[Evaluator(model)])
    assert (tmp_path / "best").exists()


def test_added_losses_and_metrics_train_without_targets():
    a = keras.Input((2,))
    h = old.layers.Dense(1, use_bias=False, name="h")(a)
    model = old.models.Model(a, h)
    model.add_loss([K.mean(K.square(h)), K.mean(h)])
    model.add_metric(K.mean(h), name="level")
    model.compile(keras.optimizers.SGD(0.0))
    x = np.eye(2)
    kernel = model.get_weights()[0]
    history = model.fit(x, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["level"], [kernel.mean()] * 2, rtol=1e-5)
    expected = np.mean(kernel**2) + kernel.mean()
    np.testing.assert_allclose(history["loss"], [expected] * 2, rtol=1e-5)
    np.testing.assert_allclose(model.predict(x), kernel, rtol=1e-6)
    assert len(model.weights) == 1
    with pytest.raises(ValueError, match="symbolic tensor"):
        model.add_metric(np.zeros(3), name="x")


def test_optimizers_know_the_old_names_of_the_learning_rate():
    model = network(optimizer="adam")
    assert K.get_value(model.optimizer.lr) == np.float32(1e-3)
    K.set_value(model.optimizer.lr, 0.5)
    assert float(model.optimizer.learning_rate) == 0.5
    for name in ("SGD", "RMSprop", "Adagrad", "Adadelta", "Adam", "Nadam"):
        optimizer = getattr(old.optimizers, name)(lr=0.25)
        assert float(optimizer.lr) == 0.25
        assert isinstance(optimizer, getattr(keras.optimizers, name))
        optimizer.lr = 0.125
        copy = type(optimizer).from_config(optimizer.get_config())
        assert float(copy.learning_rate) == 0.125
    with pytest.raises(ValueError, match=r"schedule_decay=0.1"):
        old.optimizers.Nadam(schedule_decay=0.1)


def test_decay_of_the_learning_rate_is_that_of_keras_2():
    optimizer = old.optimizers.SGD(lr=0.5, decay=0.1)
    w = keras.Variable(np.float32(0.0))
    for _ in range(3):
        optimizer.apply_gradients([(np.float32(1.0), w)])
    # Keras 2: rate / (1 + decay * iterations)
    np.testing.assert_allclose(w, -0.5 * (1 + 1 / 1.1 + 1 / 1.2), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("SGD", (0.5, 0.75, True), {"momentum": 0.75, "nesterov": True}),
        ("RMSprop", (0.5, 0.75), {"rho": 0.75, "momentum": 0.0}),
        ("Adagrad", (0.5,), {}),
        ("Adadelta", (0.5, 0.75), {"rho": 0.75}),
        (
            "Adam",
            (0.5, 0.25, 0.75, True),
            {"beta_1": 0.25, "beta_2": 0.75, "amsgrad": True, "epsilon": 1e-7},
        ),
        ("Adamax", (0.5, 0.25, 0.75), {"beta_1": 0.25, "beta_2": 0.75}),
        ("Nadam", (0.5, 0.25, 0.75), {"beta_1": 0.25, "beta_2": 0.75}),
    ],
)
def test_arguments_of_optimizers_by_their_places(name, args, expected):
    """Those of the signatures in optimizers.py of Keras 2.3.1."""
    cls = getattr(old.optimizers, name)
    config = cls(*args).get_config()
    assert config["learning_rate"] == 0.5
    assert {key: config[key] for key in expected} == expected
    # A decay leaves them where they are.
    config = cls(*args, decay=0.1).get_config()
    assert {key: config[key] for key in expected} == expected
    assert (config["learning_rate"], config["decay"]) == (0.5, 0.1)
    for more in (1e-7, True):
        with pytest.raises(ValueError, match=r"at most .*learning_rate.* Rec"):
            cls(*args, more)
    for place in list(expected)[: len(args) - 1]:
        with pytest.raises(ValueError, match=f"Expected `{place}` once.* Rec"):
            cls(*args, **{place: 0.5})


def steps_of(optimizer, gradients):
    w = keras.Variable(np.zeros_like(gradients[0]))
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, w)])
    return np.array(w)


def test_the_rate_can_be_set_beside_a_decay():
    optimizer = old.optimizers.SGD(lr=0.5, decay=0.1)
    w = keras.Variable(np.float32(0.0))
    expected = 0.0
    for step, rate in enumerate((0.5, 0.25, 0.125)):
        if step == 1:
            K.set_value(optimizer.lr, rate)
        if step == 2:
            optimizer.lr = rate
        assert K.get_value(optimizer.lr) == rate
        optimizer.apply_gradients([(np.float32(1.0), w)])
        expected -= rate / (1 + 0.1 * step)
        np.testing.assert_allclose(w, expected, rtol=1e-6)
    copy = old.optimizers.SGD.from_config(optimizer.get_config())
    assert (float(copy.lr), copy.decay) == (0.125, 0.1)


def test_callbacks_change_the_rate_beside_a_decay(tmp_path):
    """After a reload, too, the number of steps counts for the decay."""
    x = np.ones((1, 1), "float32")
    inputs = keras.Input((1,))
    dense = old.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = old.models.Model(inputs, dense(inputs))
    # The gradient of this loss is 1.
    model.compile(old.optimizers.SGD(0.5, decay=0.5), "mae")
    rates = [0.25, 0.125]
    callbacks = [
        old.callbacks.LearningRateScheduler(lambda epoch: rates[epoch]),
        old.callbacks.ReduceLROnPlateau("loss"),
    ]
    fit = {"epochs": 2, "verbose": 0, "callbacks": callbacks}
    model.fit(x, x - 9, **fit)
    expected = -(0.25 + 0.125 / 1.5)
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = old.models.load_model(tmp_path / "model.keras")
    loaded.fit(x, x - 9, **fit)
    expected -= 0.25 / 2 + 0.125 / 2.5
    np.testing.assert_allclose(loaded.get_weights()[0], expected, rtol=1e-6)


def test_schedules_in_old_files_are_read():
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.5, 1, 0.1)
    config = old.optimizers.SGD(schedule).get_config()
    optimizer = old.optimizers.SGD.from_config(config)
    gradients = [np.float32(1.0)] * 2
    np.testing.assert_allclose(
        steps_of(optimizer, gradients), -0.5 * (1 + 1 / 1.1), rtol=1e-6
    )


def test_clipnorm_is_of_all_gradients():
    """`get_gradients` of optimizers.py of Keras 2.3.1."""
    a, b = (keras.Variable(np.zeros(2, "float32")) for _ in range(2))
    gradients = [np.array([3.0, 0.0]), np.array([0.0, 4.0])]
    optimizer = old.optimizers.SGD(1.0, clipnorm=1.0)
    for _ in range(2):
        optimizer.apply_gradients(zip(gradients, (a, b), strict=True))
        np.testing.assert_allclose(a, [-0.6, 0.0], rtol=1e-6)
        np.testing.assert_allclose(b, [0.0, -0.8], rtol=1e-6)
        a.assign([0, 0]), b.assign([0, 0])
        optimizer = type(optimizer).from_config(optimizer.get_config())
    # A file of Keras 3 says what Keras 3 does, one of Keras 2 what Keras 2 did.
    config = keras.optimizers.SGD(1.0, clipnorm=1.0).get_config()
    optimizer = old.optimizers.SGD.from_config(config)
    optimizer.apply_gradients(zip(gradients, (a, b), strict=True))
    np.testing.assert_allclose([a, b], [[-1, 0], [0, -1]], rtol=1e-6)
    config = {"learning_rate": 0.5, "decay": 0.0, "clipnorm": 1.0}
    optimizer = old.optimizers.SGD.from_config(config)
    assert (optimizer.clipnorm, optimizer.global_clipnorm) == (None, 1.0)


def test_clipnorm_of_rows_that_are_looked_up_twice():
    model = old.models.Sequential(
        [keras.Input((2,)), old.layers.Embedding(3, 1), old.layers.Flatten()]
    )
    model.set_weights([np.zeros((3, 1))])
    model.compile(old.optimizers.SGD(1.0, clipnorm=1.0), "mse")
    # The gradients are 2 x -20 / 2 for row 1 twice.
    model.train_on_batch(np.array([[1, 1]]), np.array([[20.0, 20.0]]))
    np.testing.assert_allclose(
        model.get_weights()[0], [[0], [1], [0]], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("SGD", 0.01),
        ("RMSprop", 0.001),
        ("Adagrad", 0.01),
        ("Adadelta", 1.0),
        ("Adam", 0.001),
        ("Adamax", 0.002),
        ("Nadam", 0.002),
    ],
)
def test_rates_by_default(name, rate):
    """Those of the signatures in optimizers.py of Keras 2.3.1."""
    cls = getattr(old.optimizers, name)
    for optimizer in (cls(), cls(decay=0.1), old.optimizers.get(name.lower())):
        assert float(optimizer.lr) == pytest.approx(rate)
    config = getattr(keras.optimizers, name)().get_config()
    assert cls.from_config(config).get_config() == config


def test_adagrad_sums_from_zero():
    found = steps_of(old.optimizers.Adagrad(), [np.float32([0.2, 0.0])] * 2)
    expected = -0.01 * (1 + 1 / np.sqrt(2))
    np.testing.assert_allclose(found, [expected, 0], rtol=1e-5)


def test_a_momentum_by_its_place_beside_a_decay():
    optimizer = old.optimizers.SGD(0.5, 0.9, decay=0.1)
    w = keras.Variable(np.float32(0.0))
    for _ in range(3):
        optimizer.apply_gradients([(np.float32(1.0), w)])
    # Keras 2.3.1: v = 0.9 v - rate * g; w += v
    expected = velocity = 0.0
    for step in range(3):
        velocity = 0.9 * velocity - 0.5 / (1 + 0.1 * step)
        expected += velocity
    np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_rates_and_flags_of_optimizers():
    sgd = old.optimizers.SGD
    assert float(sgd(0.5, lr=0.25).lr) == 0.25
    assert float(sgd(learning_rate=0.5, lr=0.25).lr) == 0.25
    assert float(sgd(0.0, decay=0.1).lr) == 0.0
    assert float(sgd(1).lr) == 1.0
    with pytest.raises(ValueError, match=r"`decay`.* Received: decay=0.1"):
        sgd(0.5, decay=0.1, weight_decay=0.1)
    # The decay of Keras 2.2 and the epsilon of tf.keras stood there.
    with pytest.raises(ValueError, match=r"`nesterov` .*Received"):
        sgd(0.5, 0.9, 1e-6)
    with pytest.raises(ValueError, match=r"`amsgrad` .*Received"):
        old.optimizers.Adam(0.5, 0.9, 0.99, 1e-7)


ROWS = np.ones((4, 3))


@pytest.mark.parametrize("form", [tuple, list])
def test_the_entries_of_a_batch(form):
    for item, expected in (
        ((ROWS,), (ROWS,)),
        ((ROWS, None), (ROWS,)),
        ((ROWS, None, None), (ROWS,)),
        ((ROWS, TARGETS), (ROWS, TARGETS)),
        (([ROWS, ROWS],), ((ROWS, ROWS),)),
    ):
        batch = data.as_batch(form(item))
        assert len(batch) == len(expected)
        for found, array in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(found, array)
    for item in ((), (None,), (None, None), ([None, None], None), ([], None)):
        with pytest.raises(ValueError, match=r"yield inputs.* Received: "):
            data.as_batch(form(item))
    with pytest.raises(ValueError, match=r"Received: 4 entries"):
        data.as_batch(form((ROWS, TARGETS, None, None)))


def test_the_entries_of_a_batch_of_predict():
    [x] = data.as_batch((ROWS, TARGETS), inputs_only=True)
    np.testing.assert_array_equal(x, ROWS)
    [(x, other)] = data.as_batch([ROWS, TARGETS], inputs_only=True)
    np.testing.assert_array_equal(other, TARGETS)
    for item in (None, (), (None,), [None], []):
        with pytest.raises(ValueError, match=r"yield inputs.* Received: "):
            data.as_batch(item, inputs_only=True)


def test_a_generator_of_inputs_alone():
    x = keras.Input((3,))
    y = old.layers.Dense(1, use_bias=False, kernel_initializer="ones")(x)
    model = old.models.Model(x, y)
    model.add_loss(K.mean(y))
    model.compile(keras.optimizers.SGD(0.1))
    model.fit_generator(iter([(ROWS,)]), steps_per_epoch=1, verbose=0)
    # The mean of the sums of rows of ones has the gradient 1.
    np.testing.assert_allclose(model.get_weights()[0], 0.9, rtol=1e-6)
    with pytest.raises(ValueError, match=r"yield inputs.* Received: "):
        model.fit_generator(iter([(None,)]), steps_per_epoch=1, verbose=0)


def fit_sizes(model, batches, loss="mse"):
    """Trains, evaluates and predicts on a generator of these batches."""
    model.compile("sgd", loss, ["acc"])
    steps = len(batches)
    model.fit(iter(batches), steps_per_epoch=steps, verbose=0)
    losses = model.evaluate_generator(iter(batches), steps)
    assert np.isfinite(losses).all()
    for batch in batches:
        assert len(model.predict_generator(iter([batch]), 1)) == len(batch[0])


@pytest.mark.parametrize("first", [1, 2])
def test_lengths_may_begin_with_one(first):
    """Tokens and labels of tokens: the first batch has sentences of one."""
    tokens = keras.Input((None,))
    x = old.layers.Embedding(5, 3)(tokens)
    labels = old.layers.Dense(4, activation="softmax")(x)
    batches = [
        (np.ones((2, n), "int32"), np.ones((2, n, 1), "int32"))
        for n in (first, 3, 1)
    ]
    model = old.models.Model(tokens, labels)
    fit_sizes(model, batches, "sparse_categorical_crossentropy")
    flat = [(x, y[..., 0]) for x, y in batches]
    fit_sizes(model, flat, "sparse_categorical_crossentropy")
    weighted = [(x, y, np.ones(y.shape)) for x, y in flat]
    fit_sizes(model, weighted, "sparse_categorical_crossentropy")
    scores = old.layers.Lambda(lambda x: x[..., 0])(x)
    fit_sizes(old.models.Model(tokens, scores), [(x, 0.5 * x) for x, _ in flat])


def test_sizes_that_the_model_has_are_known():
    images = keras.Input((None, None, 3))
    x = old.layers.Conv2D(2, 1)(images)
    x = old.layers.GlobalAveragePooling2D()(x)
    model = old.models.Model(images, old.layers.Dense(1)(x))
    batches = [(np.ones((2, n, n, 3)), np.ones((2, 1))) for n in (1, 4)]
    fit_sizes(model, batches)
    several = old.models.Model(images, old.layers.Dense(4)(x))
    fit_sizes(several, batches, "sparse_categorical_crossentropy")
    [spec] = (
        data.Batches(iter([(np.ones((2, 1)),)])).get_tf_dataset().element_spec
    )
    assert spec.shape.as_list() == [None, None]
    batch = (np.ones((2, 1)), np.ones((2, 1)), np.ones(2))
    specs = data.Batches(iter([batch])).get_tf_dataset().element_spec
    assert [s.shape.as_list() for s in specs] == [
        [None, None],
        [None, 1],
        [None],
    ]
