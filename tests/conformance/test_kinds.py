"""Kernels, methods, schedules, callbacks, files and records by their kind."""

import copy
import functools
import inspect
import pickle

import catalogue
import keras
import numpy as np
import pytest
import toy
from keras import ops
from kit import close_in_ulps, slow_on_jax, value

import blogkeras
from blogkeras import backend


def identify(value):
    return getattr(value, "__name__", "")


def rows(name):
    kinds = getattr(catalogue, name)
    names = ",".join(["cls", "kwargs", "make"][: len(kinds[0])])
    if name in ("OPTIMIZERS", "FILES", "RECORDS"):
        names = "cls,make"
    return pytest.mark.parametrize(names, kinds, ids=identify)


def check_arguments(cls, kwargs):
    """Every argument is an attribute of the same name and value."""
    instance = cls(**kwargs)
    for name in inspect.signature(cls).parameters:
        if name not in ("args", "kwargs"):
            assert hasattr(instance, name), name
    for name, given in kwargs.items():
        assert getattr(instance, name) == given
    return instance


def revived(instance):
    serialized = keras.saving.serialize_keras_object(instance)
    assert serialized["registered_name"].startswith("blogkeras>")
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is type(instance)
    assert again.get_config() == instance.get_config()
    return again


@slow_on_jax
@rows("KERNELS")
def test_kernel(cls, kwargs):
    """Revived equal; symmetric, positive; alike compiled and in float16."""
    kernel = check_arguments(cls, kwargs)
    again = revived(kernel)
    assert again == kernel
    assert hash(again) == hash(kernel)
    assert str(kernel).startswith(cls.__name__)
    if cls is blogkeras.PrecomputedKernel:
        x = toy.DENSE[:6] @ toy.DENSE[:6].T
        linear = blogkeras.LinearKernel()
        expected = blogkeras.hsic(toy.DENSE[:6], x, linear, kernel)
        data = toy.DENSE[:6]
        close_in_ulps(expected, blogkeras.hsic(data, data, linear, linear), 16)
        return
    x = ops.convert_to_tensor(toy.DENSE[:6])
    gram = kernel(x, x)
    matrix = value(gram, "float64")
    assert matrix.shape == (6, 6)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-5, atol=1e-6)
    spectrum = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert spectrum.min() >= -1e-4 * spectrum.max()
    close_in_ulps(backend.jit(kernel)(x, x), gram, 16)
    assert tuple(kernel(x[:2], x).shape) == (2, 6)
    assert tuple(kernel(x[None, :2], x[None]).shape) == (1, 2, 6)
    half = kernel(ops.cast(x, "bfloat16"), ops.cast(x, "bfloat16"))
    assert np.isfinite(value(half, "float64")).all()
    assert np.isfinite(float(blogkeras.hsic(x, x, kernel_x=kernel)))


@slow_on_jax
@rows("METHODS")
def test_method(cls, kwargs):
    """Arguments, pickle and copy; one compiled step; strength 0 is `fit`."""
    method = check_arguments(cls, kwargs)
    assert str(method).startswith(cls.__name__)
    for again in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert type(again) is cls
        assert repr(again) == repr(method)

    assert toy.difference(plain(), trained(method, jit_compile=True)) > 0
    if "start_step" in inspect.signature(cls).parameters:
        # Before its first step a method changes nothing.
        waiting = cls(**{**kwargs, "start_step": 10**6})
        assert toy.difference(plain(), trained(waiting)) <= 1e-6


def trained(method, **options):
    """Weights after one step."""
    toy.reset()
    model = toy.classifier(normalization=keras.layers.LayerNormalization)
    model = toy.compiled(model, **options or {"run_eagerly": True})
    if method is not None:
        blogkeras.adversarial_training(model, method=method)
    model.train_on_batch(toy.TOKENS[:8], toy.LABELS[:8])
    return toy.weights(model)


@functools.cache
def plain():
    return trained(None)


@rows("SCHEDULES")
def test_schedule(cls, kwargs):
    """Within [0, 1], from `start` to 1, the same compiled."""
    schedule = check_arguments(cls, kwargs)
    revived(schedule)
    steps = ops.arange(0, 100, dtype="float32")
    rates = value(ops.clip(ops.stack([schedule(s) for s in steps]), 0, 1))
    assert rates[0] == pytest.approx(kwargs["start"], abs=0.02)
    assert rates[-1] == pytest.approx(1)
    assert (np.diff(rates) >= -1e-6).all()
    close_in_ulps(backend.jit(schedule)(steps[7]), schedule(steps[7]))


@rows("CALLBACKS")
def test_callback(cls, kwargs, make):
    """Its values are in the history, by name, finite, in each epoch."""
    callback = check_arguments(cls, kwargs)
    model = make()
    history = model.fit(
        toy.DENSE[:16],
        toy.DENSE[:16],
        batch_size=8,
        epochs=2,
        verbose=0,
        callbacks=[callback],
    ).history
    added = {k: v for k, v in history.items() if k != "loss"}
    assert added
    assert all(len(v) == 2 and np.isfinite(v).all() for v in added.values())


@rows("OPTIMIZERS")
def test_optimizer(cls, make, tmp_path):
    """Equal to the one inside; saved with the model, and continues alike."""
    revived(make(keras.optimizers.Adam(0.01)))
    models = []
    for wrap in (lambda x: x, make):
        toy.reset()
        model = catalogue.compiled(keras.layers.Dense(3))
        model.compile(wrap(keras.optimizers.Adam(0.01)), "mse")
        model.fit(toy.DENSE[:16], toy.DENSE[:16], verbose=0, shuffle=False)
        models.append(model)
    assert toy.difference(*map(toy.weights, models)) <= 1e-6
    models[1].save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for model in (models[1], loaded):
        model.fit(toy.DENSE[:16], toy.DENSE[:16], verbose=0, shuffle=False)
    assert toy.difference(toy.state(models[1]), toy.state(loaded)) == 0


@rows("FILES")
def test_file(cls, make, tmp_path):
    """Saved, loaded, pickled and copied, it answers the same."""
    index = make()
    index.save(tmp_path / "folder/index.npz")
    query = np.array([0, 2])
    expected = index.search(query, k=2)
    for again in (
        cls.load(tmp_path / "folder/index.npz"),
        pickle.loads(pickle.dumps(index)),
        copy.deepcopy(index),
    ):
        found = again.search(query, k=2)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.distances, expected.distances)


@rows("ESTIMATORS")
def test_estimator(cls, kwargs, make):
    """Arguments; the same from its parameters, and after pickling."""
    data = make()
    estimator = check_arguments(cls, kwargs)
    again = cls(**estimator.get_params())
    verb = "predict" if hasattr(estimator, "predict") else "transform"

    def apply(fitted):
        return getattr(fitted, verb)(data[0])

    result = apply(estimator.fit(*data))
    assert len(result) == len(data[0])
    for other in (again.fit(*data), pickle.loads(pickle.dumps(estimator))):
        assert type(other) is type(estimator)
        assert apply(other).tolist() == result.tolist()


@rows("RECORDS")
def test_record(cls, make):
    """Made by its function, shown by name, pickled."""
    record = make()
    assert type(record) is cls
    assert str(record).strip()
    again = pickle.loads(pickle.dumps(record))
    assert repr(again) == repr(record)


@pytest.mark.parametrize("cls", catalogue.ABSTRACT, ids=identify)
def test_abstract(cls):
    """A base class raises for methods that are missing."""
    model = toy.compiled(toy.classifier())
    blogkeras.adversarial_training(model, method=cls())
    with pytest.raises(NotImplementedError):
        model.train_on_batch(toy.TOKENS[:4], toy.LABELS[:4])
