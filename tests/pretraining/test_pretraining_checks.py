"""What encoders, generators and data are refused before training."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import SLOW_FILE_ON_JAX, TENSORFLOW, close_in_ulps, value

from blogkeras import (
    ElectraPretrainer,
    MaskedLanguageModel,
    TokenMasking,
    token_blocks,
)

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


def compiled_language_model(**options):
    model = MaskedLanguageModel(encoder(), 4, seed=0, **options)
    model.compile("sgd")
    return model


def test_each_batch_of_a_generator_is_looked_at():
    """A token out of range would be NaN, or the last token of the table."""

    def batches():
        yield (IDS,)
        while True:
            yield (np.full_like(IDS, VOCABULARY),)

    model = compiled_language_model()
    for verb in (model.evaluate, model.predict):
        with pytest.raises(ValueError, match="at least 0 and at most 22"):
            verb(batches(), steps=4, verbose=0)
    with pytest.raises(ValueError, match="at least 0 and at most 22"):
        model.fit(batches(), steps_per_epoch=4, verbose=0)
    with pytest.raises(ValueError, match="at least one batch"):
        model.fit(iter([]), verbose=0)
    assert all(np.isfinite(value(v)).all() for v in model.variables)
    with pytest.raises(ValueError, match="at least 0 and at most 22"):
        model.fit(iter([IDS + 99] * 3), steps_per_epoch=2, verbose=0)


def test_segments_that_would_be_targets_are_refused():
    import tensorflow as tf

    ids = keras.Input((LENGTH,), dtype="int32", name="token_ids")
    segments = keras.Input((LENGTH,), dtype="int32", name="segment_ids")
    h = layers.Embedding(VOCABULARY, 8, name="tokens")(ids)
    h += layers.Embedding(2, 8)(segments)
    model = MaskedLanguageModel(keras.Model([ids, segments], h), 4)
    model.compile("sgd", run_eagerly=True)
    zeros = np.zeros_like(IDS)

    class Lists(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return [IDS, zeros]

    for x, options in (
        ([IDS, zeros], {"validation_data": [IDS, zeros]}),
        (IDS, {"y": zeros}),
        (tf.data.Dataset.from_tensors((IDS, zeros)), {}),
        (iter([(IDS, zeros)] * 2), {"steps_per_epoch": 1}),
        # Keras takes a list for a tuple here.
        (iter([[IDS, zeros]] * 2), {"steps_per_epoch": 1}),
        (Lists(), {}),
    ):
        with pytest.raises(ValueError, match="Expected no targets"):
            model.fit(x, verbose=0, **options)
    model.fit([IDS, zeros], validation_data=([IDS, zeros],), verbose=0)


def test_numbers_of_words_are_not_ignored():
    words = np.arange(LENGTH, dtype="int32")[None].repeat(4, 0) // 2
    data = {"token_ids": IDS, "word_ids": words}
    with pytest.raises(ValueError, match="unit='word'"):
        compiled_language_model().fit(data, verbose=0)
    masking = TokenMasking(VOCABULARY, 4)
    with pytest.raises(ValueError, match="unit='word'"):
        masking([IDS, words])
    masking = TokenMasking(VOCABULARY, 4, rate=0.2, unit="word", seed=0)
    model = MaskedLanguageModel(encoder(), masking=masking)
    model.compile("sgd")
    model.fit(data, verbose=0)
    # One whole word of each sequence.
    first, second = value(model(data)["mask_positions"]).T
    assert (first // 2 == second // 2).all()
    assert (first != second).all()


@keras.saving.register_keras_serializable(package="tests")
class TokensAndPlaces(layers.Layer):
    """As in keras.io's examples: the parts have no names of their own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.places = layers.Embedding(LENGTH, 8)
        self.tokens = layers.Embedding(VOCABULARY, 8)

    def build(self, shape):
        self.places.build(shape)
        self.tokens.build(shape)

    def call(self, ids):
        return self.tokens(ids) + self.places(ops.arange(LENGTH))


@pytest.mark.parametrize("electra", [False, True])
def test_a_table_without_a_name_of_its_own_is_found_again(electra, tmp_path):
    def network(name):
        ids = keras.Input((LENGTH,), dtype="int32")
        layer = TokensAndPlaces()
        return keras.Model(ids, layer(ids), name=name), layer.tokens

    one, table = network("one")
    if electra:
        two, other = network("two")
        model = ElectraPretrainer(one, two, 4, embedding=[table, other.name])
    else:
        model = MaskedLanguageModel(one, 4, embedding=table)
    model.compile("sgd", run_eagerly=True)
    model.fit(IDS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(value(ours), value(theirs))
    assert loaded.vocabulary_size == VOCABULARY
    loaded.fit(IDS, verbose=0)
    with pytest.raises(ValueError, match="`embedding`"):
        MaskedLanguageModel(one, 4, embedding=1.5)
    with pytest.raises(ValueError, match="embedding=2"):
        MaskedLanguageModel(one, 4, embedding=2)


@pytest.mark.verify
@pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow only")
def test_a_distributed_data_set():
    import tensorflow as tf

    strategy = toy.mirrored()
    data = tf.data.Dataset.from_tensor_slices(IDS).batch(2).repeat(2)
    with strategy.scope():
        model = compiled_language_model()
        assert model.steps == 0
    model.fit(strategy.experimental_distribute_dataset(data), verbose=0)
    assert model.steps == 4


@pytest.mark.parametrize("unit", ["word", "ngram", "span"])
def test_groups_are_masked_inside_of_a_compiled_step(unit):
    masking = TokenMasking(VOCABULARY, 4, unit=unit, rate=0.3, seed=0)
    model = MaskedLanguageModel(encoder(), masking=masking)
    model.compile("sgd", jit_compile=True)
    words = np.arange(LENGTH, dtype="int32")[None].repeat(4, 0) // 2
    data = {"token_ids": IDS, "word_ids": words}
    history = model.fit(data, epochs=2, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert model.steps == 2


@pytest.mark.skipif(not TENSORFLOW, reason="bert4keras runs on TensorFlow")
@pytest.mark.parametrize("kind", ["masked", "disentangled"])
def test_networks_of_bert4keras_are_saved_and_loaded(kind, tmp_path):
    def network(name, hidden):
        return toy.bert4keras_transformer(
            name=name,
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            max_position=LENGTH,
        )

    if kind == "masked":
        model = MaskedLanguageModel(network("one", 8), 4, seed=0)
    else:
        model = ElectraPretrainer(
            network("one", 4), network("two", 8), 4, sharing=kind, seed=0
        )
    model.compile("adam", run_eagerly=True)
    data = [IDS, np.zeros_like(IDS)]
    model.fit(data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = True
    for one in (model, loaded):
        one.fit(data, verbose=0)
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(value(ours), value(theirs))
    if kind == "disentangled":
        masked = np.where(np.arange(LENGTH) == 3, 4, IDS)
        for one, other in zip(
            model.mask_filler().fill_mask([masked, data[1]]),
            loaded.mask_filler().fill_mask([masked, data[1]]),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
