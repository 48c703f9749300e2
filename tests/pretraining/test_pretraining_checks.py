"""What encoders, generators and data are refused before training."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from blogkeras import ElectraPretrainer, MaskedLanguageModel

VOCABULARY, LENGTH = 23, 12
IDS = np.arange(5, 5 + LENGTH, dtype="int32")[None].repeat(4, 0)


def encoder(*behind, length=LENGTH):
    tokens = keras.Input((length,), dtype="int32")
    h = layers.Embedding(VOCABULARY, 8)(tokens)
    for layer in behind:
        h = layer(h)
    return keras.Model(tokens, h)


def compiled(model):
    model.compile("sgd", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    "layer",
    [layers.Conv1D(8, 3), layers.Conv1D(8, 3, strides=2, padding="same")],
)
def test_one_vector_for_each_token(layer):
    with pytest.raises(ValueError, match="one vector for each token"):
        MaskedLanguageModel(encoder(layer), mask_token=4)
    with pytest.raises(ValueError, match="one vector for each token"):
        ElectraPretrainer("uniform", encoder(layer), mask_token=4)
    model = compiled(
        MaskedLanguageModel(encoder(layer, length=None), mask_token=4)
    )
    with pytest.raises(ValueError, match="one vector for each token"):
        model.fit(IDS, verbose=0)


@pytest.mark.parametrize(
    "logits",
    [
        lambda ids, positions: None,
        lambda ids, positions: ops.zeros((3,)),
        lambda ids, positions: ops.zeros((ops.shape(ids)[0], VOCABULARY)),
        lambda ids, positions: ops.zeros((4, LENGTH, VOCABULARY)),
    ],
)
def test_logits_of_a_function(logits):
    model = compiled(ElectraPretrainer(logits, encoder(), mask_token=4))
    with pytest.raises(ValueError, match=r"logits of the shape .*\(23,\)"):
        model.fit(IDS, verbose=0)


def test_a_function_may_give_integers():
    def always_7(ids, positions):
        return 1000 * ops.one_hot(7, VOCABULARY, dtype="int32")

    model = compiled(ElectraPretrainer(always_7, encoder(), mask_token=4))
    assert set(np.ravel(model(IDS)["sampled_ids"])) == {7}


def test_a_class_is_no_generator():
    with pytest.raises(ValueError, match=r"`generator`.*Keras layer or model"):
        ElectraPretrainer(keras.Model, encoder(), mask_token=4)


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_no_sequences(verb):
    model = compiled(MaskedLanguageModel(encoder(), mask_token=4))
    with pytest.raises(ValueError, match="at least one sequence"):
        getattr(model, verb)(IDS[:0])
