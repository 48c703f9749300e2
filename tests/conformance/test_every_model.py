"""What users do with any Keras model or layer, done with each of ours."""

import copy
import inspect

import catalogue
import keras
import numpy as np
import pytest
import toy
import train_steps
from keras import tree
from kit import JAX, lower_train_step, slow_on_jax, value

import blogkeras
from blogkeras.denoising.base import DenoisingModel
from blogkeras.nvae import cells

TOKEN_MODELS = ("ElectraPretrainer", "MaskedLanguageModel")
# They are built by their first call.
BUILT_LATER = ("CodePrior", "HSICBottleneck", "Theseus", "VQVAE")

every_model = pytest.mark.parametrize("name", train_steps.MODELS)


def model_of(name):
    toy.reset()
    make, x, _ = train_steps.MODELS[name]
    return make(), x[:3]


VERBS = ("compile", "fit", "evaluate", "train_on_batch", "test_on_batch")


@pytest.mark.parametrize("verb", VERBS)
@every_model
def test_takes_what_keras_takes_in_its_place(name, verb):
    """Old scripts write `fit(x, y, 32, 10)`, and Keras's own may go on."""
    model, _ = model_of(name)
    method, theirs = getattr(model, verb), getattr(keras.Model(), verb)
    parameters = inspect.signature(theirs).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = inspect.signature(method).parameters.values()
    kinds = {p.kind for p in own}
    passed_on = (
        inspect.Parameter.VAR_POSITIONAL in kinds
        and inspect.Parameter.KEYWORD_ONLY not in kinds
    )
    first = [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert (
        passed_on
        or first[: len(names)] == names
        or (name, verb) == ("DenoisingGenerator", "compile")
    )


@slow_on_jax
@every_model
def test_summary(name):
    """It names the layers and counts the numbers that they hold."""
    model, x = model_of(name)
    model(x)
    lines = []
    model.summary(line_length=250, print_fn=lines.append, expand_nested=True)
    text = "".join(lines)
    for layer in model.layers:
        assert layer.name in text
    size = sum(np.prod(v.shape, dtype=int) for v in model.trainable_weights)
    assert f"Trainable params: {size:,}" in text


@slow_on_jax
@every_model
def test_frozen_stays_frozen(name, tmp_path):
    """A part of another model, it has nothing to train when it is loaded."""
    model, x = model_of(name)
    model(x)
    model.trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.variables if v.trainable] == []


@slow_on_jax
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter")
@every_model
def test_export(name, tmp_path):
    """A SavedModel answers as the model does."""
    tf = pytest.importorskip("tensorflow")
    model, x = model_of(name)
    if name in TOKEN_MODELS:
        with pytest.raises(ValueError, match="Expected a network"):
            model.export(tmp_path, verbose=False)
        return
    if name in BUILT_LATER:
        model(x)
    model.export(tmp_path, verbose=False)
    saved = tf.saved_model.load(tmp_path)
    actual, expected = map(tree.flatten, (saved.serve(x), model(x)))
    for pair in zip(actual, expected, strict=True):
        # KL terms are what is left of numbers of about 1.
        np.testing.assert_allclose(*map(value, pair), rtol=2e-6, atol=2e-6)


@slow_on_jax
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter")
@pytest.mark.parametrize(("cls", "kwargs", "inputs"), catalogue.LAYERS)
def test_layer_in_a_model(cls, kwargs, inputs, tmp_path):
    """Copied, in an old HDF5 file and in a SavedModel it answers as before."""
    tf = pytest.importorskip("tensorflow")
    toy.reset()
    structure = list(inputs) if isinstance(inputs, list) else inputs
    symbols = tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype), structure
    )
    model = keras.Model(symbols, cls(**kwargs)(symbols))
    model.save(tmp_path / "model.h5")
    model.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(tmp_path / "saved")
    expected = tree.flatten(model(structure))
    for other in (
        copy.deepcopy(model),
        keras.saving.load_model(tmp_path / "model.h5", compile=False),
        saved.serve,
    ):
        for pair in zip(tree.flatten(other(structure)), expected, strict=True):
            # Sinkhorn's loop may end a round earlier.
            np.testing.assert_allclose(*map(value, pair), rtol=1e-3, atol=1e-6)


# Parts that run as in inference while others are trained.
FROZEN_PARTS = ("teacher", "data_density", "predecessor_modules")
TOLD = []  # `(layer, training)` of each call of a `Probe` or `ProbeNorm`


class Probe(keras.layers.Dense):
    """Notes what its calls are told of `training`."""

    def call(self, x, training=None):
        TOLD.append((self, training))
        return super().call(x)


class ProbeNorm(cells.BatchNorm):
    def call(self, x, training=None):
        TOLD.append((self, training))
        return super().call(x, training=training)


def probe(units=3, inputs=3, activation="tanh", name=None):
    layer = Probe(units, activation, name=name)
    layer.build((None, inputs))
    return layer


def probed_log_density(input_shape, units, head=None):
    inputs = keras.Input(input_shape)
    return keras.Model(inputs, probe(1, *input_shape)(inputs))


# A `CodePrior` has no layer that differs in training.
@slow_on_jax
@pytest.mark.parametrize("name", sorted({*train_steps.MODELS} - {"CodePrior"}))
def test_parts_are_told_whether_they_train(name, monkeypatch):
    """On JAX Keras's trainer runs `call` itself, and so tells nobody else."""
    monkeypatch.setattr(train_steps, "dense", probe)
    monkeypatch.setattr(blogkeras, "mlp_log_density", probed_log_density)
    monkeypatch.setattr(cells, "BatchNorm", ProbeNorm)
    toy.reset()
    make, x, y = train_steps.MODELS[name]
    model = make(run_eagerly=not JAX)
    TOLD.clear()
    model.evaluate(x, y, verbose=0)
    assert TOLD
    assert not any(training for _, training in TOLD)
    TOLD.clear()
    if JAX:  # traced, and not compiled
        lower_train_step(model, x, y)
    else:
        model.fit(x, y, verbose=0)
    frozen = {
        id(layer)
        for part in FROZEN_PARTS
        for outer in tree.flatten(getattr(model, part, []))
        for layer in outer._flatten_layers()
    }
    if isinstance(model, DenoisingModel):
        # The prediction in a step is inference, of rows without noise; the
        # loss calls the layers again.
        layers = {id(layer) for layer, _ in TOLD}
        TOLD[:] = [call for call in TOLD if call[1]]
        assert layers == {id(layer) for layer, _ in TOLD}
    assert TOLD
    for layer, training in TOLD:
        assert training is (id(layer) not in frozen), layer.path
