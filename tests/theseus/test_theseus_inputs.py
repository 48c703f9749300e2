"""Theseus and segments take inputs as Keras's uncut models take them."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kit import close_in_ulps, slow_on_tensorflow, value

from blogkeras.theseus import Theseus, bert_of_theseus, cut_model

RNG = np.random.default_rng(0)
TOKENS, SEGMENTS = (RNG.integers(0, 20, (8, 6)).astype("int32") for _ in "ab")
# Sorted by name, the segments come before the tokens.
DATA = {"token_ids": TOKENS, "segment_ids": SEGMENTS}
LABELS = RNG.integers(0, 3, 8)
no_gradient = pytest.mark.filterwarnings("ignore:Gradients do not exist")


def two_inputs():
    return {name: keras.Input((6,), dtype="int32", name=name) for name in DATA}


def transformer(blocks, inputs):
    """Two embeddings, blocks; a dict of vectors and their mean."""
    tables = [
        layers.Embedding(
            20, 8, embeddings_initializer="random_normal", name=f"table_{name}"
        )
        for name in DATA
    ]
    flat = [inputs[name] for name in DATA]
    x = layers.Add(name="embedding")(
        [table(x) for table, x in zip(tables, flat, strict=True)]
    )
    for i in range(blocks):
        x = layers.Dense(8, "tanh", name=f"transformer_layer_{i}")(x)
    mean = layers.GlobalAveragePooling1D(name="mean")(x)
    return {"sequence_output": x, "pooled_output": mean}


def backbone(blocks, as_dict):
    inputs = two_inputs()
    outputs = transformer(blocks, inputs)
    return keras.Model(inputs if as_dict else list(inputs.values()), outputs)


def head(names):
    """A functional model whose inputs have the names of a dict's entries."""
    shapes = {"sequence_output": (6, 8), "pooled_output": (8,)}
    given = [keras.Input(shapes[name], name=name) for name in names]
    vectors = [
        layers.GlobalAveragePooling1D()(x) if len(x.shape) == 3 else x
        for x in given
    ]
    x = layers.Concatenate()(vectors) if len(vectors) > 1 else vectors[0]
    return keras.Model(given, layers.Dense(3, "softmax")(x))


@slow_on_tensorflow
@no_gradient
@pytest.mark.parametrize(
    ("names", "as_dict"),
    [
        (["sequence_output", "pooled_output"], False),
        (["sequence_output"], True),
    ],
)
def test_a_dict_is_taken_by_name(names, as_dict):
    """The model's own inputs, and those of a classifier."""
    old, new, classifier = (
        backbone(2, as_dict),
        backbone(1, as_dict),
        head(names),
    )
    large, small = (
        keras.Model(m.inputs, classifier(m(m.input))) for m in (old, new)
    )
    theseus = bert_of_theseus(old, new, classifier, replacement_rate=0.0)
    # An entry more, as another model's tokenizer may give it, is not used.
    data = {"another": SEGMENTS[:, :2], **DATA}
    expected = small.predict(DATA, verbose=0)
    close_in_ulps(theseus.predict(data, verbose=0), expected, 8)
    close_in_ulps(
        theseus.detach(copy=True).predict(DATA, verbose=0), expected, 8
    )
    # At a rate of 0 the predecessor runs.
    for model in (large, theseus):
        model.compile("sgd", "sparse_categorical_crossentropy")
    assert theseus.train_on_batch(data, LABELS) == pytest.approx(
        large.test_on_batch(DATA, LABELS), rel=1e-5
    )
    first, *rest = cut_model(large, ["embedding"])
    x = first(data)
    for segment in rest:
        x = segment(x)
    close_in_ulps(value(x), large.predict(DATA, verbose=0), 8)


def test_dicts_that_do_not_fit_are_refused():
    first = cut_model(backbone(1, False), ["embedding"])[0]
    with pytest.raises(ValueError, match=r"inputs named .*segment_ids"):
        first({"token_ids": TOKENS})
    # As Keras does: the order of a list would be that of the sorted names.
    first = cut_model(backbone(1, True), ["embedding"])[0]
    with pytest.raises(ValueError, match="a dict of inputs named"):
        first([TOKENS, SEGMENTS])


def columns(size):
    inputs = keras.Input((1,))
    x = layers.Dense(4, "tanh", name="first")(inputs)
    x = layers.Dense(size, name="second")(x)
    return keras.Model(inputs, layers.Dense(1)(x))


@no_gradient
def test_an_axis_of_size_1_may_be_left_out():
    x = RNG.normal(size=16).astype("float32")
    large, small = columns(5), columns(5)
    old, new = (cut_model(m, ["second"]) for m in (large, small))
    theseus = Theseus(old[:1], new[:1], old[1:], 0.0)
    for model in (large, theseus):
        model.compile("sgd", "mse")
    assert theseus.train_on_batch(x, x) == pytest.approx(
        large.test_on_batch(x, x), rel=1e-5
    )
    # One too many is left out: a column of tokens.
    ids = keras.Input((), dtype="int32")
    model = keras.Model(
        ids, layers.Dense(2, name="d")(layers.Embedding(5, 3)(ids))
    )
    column = np.array([[1], [4], [2]])
    close_in_ulps(
        value(cut_model(model, [])[0](column)), model.predict(column, verbose=0)
    )


def test_integers_become_the_floats_that_a_model_takes():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2, name="d")(inputs - 128))
    pixels = np.array([[0, 100, 255]], "uint8")
    kernel = value(model.get_layer("d").kernel)
    found = cut_model(model, [])[0](ops.convert_to_tensor(pixels))
    # In uint8 it would be 0 - 128 = 128.
    expected = np.array([[-128.0, -28.0, 127.0]]) @ kernel
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)


def test_a_cast_input_keeps_its_mask():
    """In half precision, and from integers to floats."""
    x = layers.Masking()(np.array([[[1.0], [2.0], [0.0]]], "float32"))
    inputs = keras.Input((3, 1), dtype="int32")
    model = keras.Model(
        inputs, layers.GlobalAveragePooling1D()(layers.Rescaling(2.0)(inputs))
    )
    assert float(value(cut_model(model, [])[0](x))[0, 0]) == 3.0
