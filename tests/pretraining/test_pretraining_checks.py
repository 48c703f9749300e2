"""What encoders, generators and data are refused before training."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kit import SLOW_FILE_ON_JAX, TENSORFLOW, close_in_ulps, value

from blogkeras import ElectraPretrainer, MaskedLanguageModel, token_blocks

pytestmark = SLOW_FILE_ON_JAX

VOCABULARY, LENGTH = 23, 12
# JAX has float64 only where it is asked for.
DOUBLE = ["float64"] * TENSORFLOW
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


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", *DOUBLE])
@pytest.mark.parametrize("own", [False, True])
def test_a_disentangled_table_under_all_policies(policy, own):
    def network():
        tokens = keras.Input((LENGTH,), dtype="int32")
        h = layers.Embedding(VOCABULARY, 8, dtype=policy)(tokens)
        return keras.Model(tokens, layers.Dense(8, dtype=policy)(h))

    model = compiled(
        ElectraPretrainer(
            network(),
            network(),
            mask_token=4,
            sharing="disentangled",
            dtype=policy if own else "float32",
        )
    )
    logs = model.fit(IDS, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    tables = [
        value(x.layers[1].embeddings, "float32")
        for x in (model.generator, model.discriminator)
    ]
    delta = value(model.delta, "float32")
    assert delta.any()
    close_in_ulps(tables[1], tables[0] + delta, 1, "bfloat16")


@pytest.mark.parametrize("policy", ["float16", *DOUBLE])
def test_masks_and_pairs_under_all_policies(policy):
    tokens = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(VOCABULARY, 8, dtype=policy)(tokens)
    model = compiled(
        MaskedLanguageModel(
            keras.Model(tokens, h),
            mask_token=4,
            pairs="sentence_order",
            dtype=policy,
        )
    )
    segments = (np.arange(LENGTH) > LENGTH // 2).astype("int32") + 0 * IDS
    data = {"token_ids": IDS, "segment_ids": segments}
    logs = model.fit(data, verbose=0).history
    # No better than chance before training.
    assert abs(logs["masked_loss"][0] - np.log(VOCABULARY)) < 0.3
    assert abs(logs["pair_loss"][0] - np.log(2)) < 0.1
    assert model.fill_mask({**data, "token_ids": 4 + 0 * IDS})[2].shape[1] == 5


def test_frequencies_are_counted_in_float32():
    model = ElectraPretrainer(
        "unigram", encoder(), mask_token=4, dtype="bfloat16"
    )
    model.token_counts.assign(301 + 0 * model.token_counts)
    compiled(model).train_on_batch(IDS)
    # In bfloat16 there is no odd number above 256.
    assert value(model.token_counts)[5] == 305
    assert value(model.token_counts)[0] == 301


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        ([2**31], {}, "`tokenize`"),
        ([5], {"start_token": 2**31}, "`start_token`"),
        ([5], {"pad_token": 2**31}, "`pad_token`"),
        ([5], {"words": lambda line: None}, "`words` to give"),
        ([5], {"words": lambda line: [1, 2]}, "`words` to give"),
    ],
)
def test_what_makes_no_blocks(tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        token_blocks(["a b"], lambda text: tokens, 4, **arguments)
