"""One conformance suite over every public class."""

import inspect
import warnings

import catalogue
import keras
import numpy as np
import pytest
import toy
import train_steps
from catalogue import LAYERS, LOSSES, METRICS
from keras import ops
from kit import close_in_ulps, slow_on_tensorflow

import blogkeras
from blogkeras import backend


def numpy(x):
    return keras.tree.map_structure(ops.convert_to_numpy, x)


def check_config(instance, kwargs):
    """The config has every argument, can be revived, and use leaves it."""
    config = instance.get_config()
    for name in inspect.signature(type(instance).__init__).parameters:
        # Keras's own losses keep their dtype out of the config.
        if name not in ("self", "kwargs", "args", "dtype"):
            assert name in config, f"{name} is missing in get_config()"
    for name in kwargs:
        assert hasattr(instance, name)
    serialized = keras.saving.serialize_keras_object(instance)
    revived = keras.saving.deserialize_keras_object(serialized)
    assert revived.get_config() == config
    revived.remark = "an attribute may be set"
    assert revived.remark
    assert keras.saving.get_registered_name(type(instance)).startswith(
        "blogkeras>"
    )
    return config


def check_counts(layer):
    """As many weights, losses and seeds as the catalogue says."""
    counts = (
        len(layer.trainable_weights),
        len(layer.non_trainable_weights),
        len(layer.losses),
        len(
            [
                v
                for v in layer.non_trainable_variables
                if "seed_generator" in v.path
            ]
        ),
    )
    expected = catalogue.COUNTS.get(type(layer).__name__)
    assert expected is None or counts == expected, counts


def check_compiled(layer, x):
    """Compiled by XLA the outputs are those of the eager call."""
    flat = keras.tree.flatten(x)
    compiled = backend.jit_layer(
        lambda *x: layer(keras.tree.pack_sequence_as(inputs, x)), layer
    )
    inputs = x
    results = keras.tree.flatten(compiled(*flat))
    draws = any(w.name == "draw_seed" for w in layer.weights)
    for ours, eager in zip(results, keras.tree.flatten(layer(x)), strict=True):
        assert ours.shape == eager.shape
        assert ours.dtype == eager.dtype
        # A layer with random draws gives other results in its next call.
        if not draws:
            # An iteration ends within its tolerance, not at the same bits.
            close_in_ulps(ours, eager, 64)


def check_mask(layer, x):
    """A layer that supports masks passes one through its call."""
    if not layer.supports_masking or isinstance(x, list) or x.ndim < 3:
        return
    mask = np.ones(x.shape[:-1], bool)
    mask[:, -1] = False
    masked = ops.copy(x)
    backend.set_keras_mask(masked, ops.convert_to_tensor(mask))
    outputs = layer(masked)
    expected = layer.compute_mask(masked, ops.convert_to_tensor(mask))
    found = backend.get_keras_mask(keras.tree.flatten(outputs)[0])
    if expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(
            numpy(found), numpy(keras.tree.flatten(expected)[0])
        )
    assert np.isfinite(numpy(keras.tree.flatten(outputs)[0])).all()


def check_layer(cls, kwargs, inputs, path):
    """Checks a layer for what Keras users expect.

    Config round trip, attributes after revival; eager, symbolic, compiled and
    build-only agree; counts of weights, losses and seeds; masks; half
    precision; one step of `fit`; saving.
    """
    layer = cls(**kwargs)
    config = check_config(layer, kwargs)
    x = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    symbolic = keras.tree.map_structure(
        lambda t: keras.KerasTensor((None, *t.shape[1:]), t.dtype), inputs
    )
    outputs = layer(x)
    spec = cls(**kwargs)(symbolic)
    for output, expected in zip(
        keras.tree.flatten(outputs), keras.tree.flatten(spec), strict=True
    ):
        assert len(output.shape) == len(expected.shape)
        assert keras.backend.standardize_dtype(output.dtype) == expected.dtype
        for size, known in zip(output.shape, expected.shape, strict=True):
            assert known in (None, size)
    check_counts(layer)
    check_compiled(layer, x)
    check_mask(layer, x)
    built = cls(**kwargs)
    built.build(keras.tree.map_structure(lambda t: tuple(t.shape), inputs))
    assert [w.shape for w in built.weights] == [w.shape for w in layer.weights]
    assert layer.get_config() == config, "use changed the config"

    for policy in ("mixed_float16", "mixed_bfloat16"):
        half = cls(**kwargs, dtype=policy)
        for loss in (half(x), half.losses)[1]:
            assert keras.backend.standardize_dtype(loss.dtype) == "float32"
        assert all(
            w.dtype == "float32" for w in half.weights if "float" in w.dtype
        )
        for output in keras.tree.flatten(half(x)):
            assert np.isfinite(np.asarray(numpy(output), "float64")).all()

    model_inputs = keras.tree.map_structure(
        lambda t: keras.Input(t.shape[1:], dtype=t.dtype), inputs
    )
    first = keras.tree.flatten(cls(**kwargs)(model_inputs))[0]
    model = keras.Model(model_inputs, first)
    target = np.zeros(numpy(keras.tree.flatten(outputs)[0]).shape, "float32")
    model.compile("sgd", "mse", jit_compile=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model does not have any train")
        model.fit(inputs, target, verbose=0, batch_size=len(target))
    assert all(np.isfinite(w).all() for w in model.get_weights())
    model.save(path / "model.keras")
    loaded = keras.saving.load_model(path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(inputs, verbose=0),
        model.predict(inputs, verbose=0),
        rtol=1e-6,
        atol=1e-6,
    )


def check_loss(cls, kwargs, y_true, y_pred):
    """Config, finiteness in every precision, a finite gradient."""
    loss = cls(**kwargs)
    check_config(loss, kwargs)
    assert np.isfinite(numpy(loss(y_true, y_pred))).all()
    for dtype in ("float16", "bfloat16"):
        half = ops.cast(y_pred, dtype)
        assert np.isfinite(np.asarray(numpy(loss(y_true, half)), "f8")).all()
    model = keras.Sequential(
        [keras.Input(y_pred.shape[1:]), keras.layers.Dense(y_pred.shape[-1])]
    )
    model.compile("sgd", loss, jit_compile=True)
    model.fit(y_pred, y_true, batch_size=len(y_pred), verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def check_metric(cls, kwargs, y_true, y_pred):
    """Config, accumulation and reset."""
    metric = cls(**kwargs)
    check_config(metric, kwargs)
    metric.update_state(y_true, y_pred)
    first = numpy(metric.result())
    assert np.isfinite(first).all()
    metric.reset_state()
    metric.update_state(y_true, y_pred)
    np.testing.assert_array_equal(numpy(metric.result()), first)


def identify(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("cls", "kwargs", "inputs"), LAYERS, ids=identify)
def test_layer(cls, kwargs, inputs, tmp_path):
    check_layer(cls, kwargs, inputs, tmp_path)


@slow_on_tensorflow
@pytest.mark.parametrize(("cls", "kwargs", "inputs"), LAYERS, ids=identify)
def test_frozen_stays_frozen(cls, kwargs, inputs, tmp_path):
    """By its constructor, as a copy and as a file is made, and afterwards."""
    symbolic = keras.tree.map_structure(
        lambda t: keras.Input(t.shape[1:], dtype=t.dtype), inputs
    )
    for trainable in (False, True):
        serialized = keras.saving.serialize_keras_object(cls(**kwargs))
        serialized["config"]["trainable"] = trainable
        layer = keras.saving.deserialize_keras_object(serialized)
        model = keras.Model(symbolic, layer(symbolic))
        if trainable:
            layer.trainable = False
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        for instance in (layer, loaded):
            assert [v.path for v in instance.variables if v.trainable] == []


@pytest.mark.parametrize(("cls", "kwargs", "inputs"), LAYERS, ids=identify)
def test_frozen_before_it_is_built(cls, kwargs, inputs):
    """A layer that was frozen first has nothing to train afterwards."""
    layer = cls(**kwargs)
    layer.trainable = False
    layer(keras.tree.map_structure(ops.convert_to_tensor, inputs))
    assert [v.path for v in layer.variables if v.trainable] == []


@pytest.mark.parametrize(
    ("cls", "kwargs", "y_true", "y_pred"), LOSSES, ids=identify
)
def test_loss(cls, kwargs, y_true, y_pred):
    check_loss(cls, kwargs, y_true, y_pred)


@pytest.mark.parametrize(
    ("cls", "kwargs", "y_true", "y_pred"), METRICS, ids=identify
)
def test_metric(cls, kwargs, y_true, y_pred):
    check_metric(cls, kwargs, y_true, y_pred)


def test_every_public_class_is_checked():
    listed = {row[0].__name__ for row in [*LAYERS, *LOSSES, *METRICS]}
    # Models: in `test_matrix.py`.
    listed |= set(train_steps.MODELS)
    listed |= {cls.__name__ for cls in catalogue.BY_KIND}
    # Two optimizers, which it trains with, need Keras 3.15.
    listed.add("DenoisingGenerator")
    public = {
        name
        for name in blogkeras.__all__
        if inspect.isclass(getattr(blogkeras, name))
    }
    assert public == listed


def test_public_names_exist_and_are_documented():
    for name in blogkeras.__all__:
        assert inspect.getdoc(getattr(blogkeras, name)), name


# Tests of the suite: it must accept a good layer and refuse bad ones.


@keras.saving.register_keras_serializable(package="blogkeras")
class Good(keras.layers.Layer):
    def __init__(self, factor=2.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape):
        self.offset = self.add_weight((input_shape[-1],), name="offset")

    def call(self, x):
        return x * self.factor + self.offset

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


@keras.saving.register_keras_serializable(package="blogkeras")
class Forgetful(Good):
    def get_config(self):
        return keras.layers.Layer.get_config(self)


@keras.saving.register_keras_serializable(package="blogkeras")
class Restless(Good):
    def call(self, x):
        self.factor += 1
        return super().call(x)


@keras.saving.register_keras_serializable(package="blogkeras")
class Late(keras.layers.Layer):
    def call(self, x):
        if not hasattr(self, "offset"):
            self.offset = self.add_weight((3,), name="offset")
        return x + self.offset


def test_check_layer_accepts_a_good_layer(tmp_path):
    check_layer(Good, {"factor": 3.0}, toy.DENSE[:4], tmp_path)


@pytest.mark.parametrize("cls", [Forgetful, Restless, Late])
def test_check_layer_refuses_a_bad_layer(cls, tmp_path):
    with pytest.raises((AssertionError, AttributeError, ValueError)):
        check_layer(cls, {}, toy.DENSE[:4], tmp_path)


@keras.saving.register_keras_serializable(package="blogkeras")
class GoodLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.mean(ops.square(ops.cast(y_true, y_pred.dtype) - y_pred), -1)


@keras.saving.register_keras_serializable(package="blogkeras")
class GoodMetric(keras.metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_pred, sample_weight)


def test_check_loss_and_metric():
    check_loss(GoodLoss, {}, toy.DENSE[:8], toy.DENSE[8:16])
    check_metric(GoodMetric, {}, toy.DENSE[:8], toy.DENSE[8:16])
    with pytest.raises(AssertionError):
        check_loss(keras.losses.MeanSquaredError, {}, toy.DENSE, toy.DENSE)
