"""MaskedLanguageModel, pairs, blocks of tokens, backbones, bad input."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import JAX, replicated, slow_on_jax, value
from scipy import special

import blogkeras
from blogkeras import (
    ElectraPretrainer,
    MaskedLanguageModel,
    TokenMasking,
    backend,
)
from blogkeras.pretraining.pairs import _next_rows, change_pairs

VOCABULARY, LENGTH = 23, 12
MASK, CLS, SEP = 4, 2, 3
PAIR = {
    "token_ids": np.array(
        [
            [CLS, 5, 6, 7, SEP, 8, 9, SEP, 0, 0, 0, 0],
            [CLS, 10, SEP, 11, 12, 13, 14, 15, 16, 17, 18, SEP],
            [CLS, 5, 6, SEP, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        "int32",
    ),
    "segment_ids": np.array(
        [
            [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [0] * 12,
        ],
        "int32",
    ),
}


def always(shape, seed):
    return ops.zeros(shape)


def never(shape, seed):
    return ops.ones(shape)


def change(task, draw):
    ids, segments = (ops.convert_to_tensor(x) for x in PAIR.values())
    found = change_pairs(task, ids, segments, ids, 0, draw, 0)
    return [value(x) for x in found]


def test_segments_change_places():
    ids, segments, words, labels, weights = change("sentence_order", always)
    np.testing.assert_array_equal(
        ids[0], [CLS, 8, 9, SEP, 5, 6, 7, SEP, 0, 0, 0, 0]
    )
    np.testing.assert_array_equal(
        ids[1], [CLS, 11, 12, 13, 14, 15, 16, 17, 18, SEP, 10, SEP]
    )
    np.testing.assert_array_equal(segments[0], [0] * 4 + [1] * 4 + [0] * 4)
    np.testing.assert_array_equal(segments[1], [0] * 10 + [1] * 2)
    np.testing.assert_array_equal(words, ids)
    np.testing.assert_array_equal(ids[2], PAIR["token_ids"][2])
    np.testing.assert_array_equal(labels, [1, 1, 0])
    np.testing.assert_array_equal(weights, [1, 1, 0])


def test_the_second_segment_of_another_sequence():
    ids, segments, _words, labels, weights = change("next_sentence", always)
    # Cut off where the block is full, but for its [SEP].
    np.testing.assert_array_equal(
        ids[0], [CLS, 5, 6, 7, SEP, 11, 12, 13, 14, 15, 16, SEP]
    )
    np.testing.assert_array_equal(segments[0], [0] * 5 + [1] * 7)
    # The next sequence has no second segment.
    np.testing.assert_array_equal(ids[1:], PAIR["token_ids"][1:])
    np.testing.assert_array_equal(labels, [1, 0, 0])
    np.testing.assert_array_equal(weights, [1, 0, 0])


@pytest.mark.parametrize("task", ["sentence_order", "next_sentence"])
def test_pairs_that_are_left(task):
    ids, segments, _, labels, _ = change(task, never)
    np.testing.assert_array_equal(ids, PAIR["token_ids"])
    np.testing.assert_array_equal(segments, PAIR["segment_ids"])
    assert not labels.any()


def with_segments():
    inputs = {
        name: keras.Input((LENGTH,), dtype="int32", name=name) for name in PAIR
    }
    h = layers.Embedding(VOCABULARY, 4, name="table")(inputs["token_ids"])
    h = h + layers.Embedding(2, 4)(inputs["segment_ids"])
    h = layers.Dense(6, "tanh", name="dense")(h)
    return keras.Model(inputs, h)


@slow_on_jax
def test_losses_equal_an_independent_computation():
    model = MaskedLanguageModel(
        with_segments(), MASK, [CLS, SEP], "sentence_order", pairs_weight=2.0
    )
    model.compile("sgd", jit_compile=JAX)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    logs = model.evaluate(PAIR, verbose=0, return_dict=True)
    inputs = {k: ops.convert_to_tensor(v) for k, v in PAIR.items()}
    out = {k: value(v) for k, v in model(inputs).items()}
    table, segment_table, kernel, bias = (
        value(w, "float64") for w in model.backbone.weights
    )
    # Segments change places where the pair is changed.
    changed = out["pair_labels"] > 0
    swapped, kept = change("sentence_order", always), PAIR["segment_ids"]
    segments = np.where(changed[:, None], swapped[1], kept)
    h = table[out["token_ids"]] + segment_table[segments]
    h = np.tanh(h @ kernel + bias)
    w, b, v, c = (value(x, "float64") for x in model.pair_head.weights)
    q = special.expit((np.tanh(h[:, 0] @ w + b) @ v + c)[:, 0])
    pair = -np.log(np.where(changed, q, 1 - q))[:2].mean()
    h = np.take_along_axis(h, out["mask_positions"][..., None], 1)
    head = model.head
    w, b = (value(x, "float64") for x in head.dense.weights)
    h = h @ w + b
    h = h * special.ndtr(h)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(
        h.var(-1, keepdims=True) + 1e-6
    )
    scale, shift = (value(x, "float64") for x in head.normalization.weights)
    p = special.log_softmax(
        (h * scale + shift) @ table.T + value(head.bias, "float64"), -1
    )
    used = out["mask_weights"] > 0
    masked = -np.take_along_axis(p, out["mask_ids"][..., None], -1)[..., 0]
    masked = masked[used].mean()
    right = (p.argmax(-1) == out["mask_ids"])[used].mean()
    assert logs["pair_loss"] == pytest.approx(pair, rel=1e-6)
    assert logs["pair_accuracy"] == ((q > 0.5) == changed)[:2].mean()
    assert logs["masked_loss"] == pytest.approx(masked, rel=1e-6)
    assert logs["masked_accuracy"] == pytest.approx(right)
    assert logs["loss"] == pytest.approx(masked + 2 * pair, rel=1e-6)


def test_next_sentences_cross_the_border_between_replicas():
    data = {name: np.tile(x[:2], (4, 1)) for name, x in PAIR.items()}
    data["token_ids"][:, 1] = 5 + np.arange(8)
    losses = []
    for replicas in (1, 2):

        def make():
            model = MaskedLanguageModel(
                with_segments(), MASK, [CLS, SEP], "next_sentence", seed=1
            )
            model.compile("sgd", jit_compile=JAX)
            return model

        toy.reset()
        model = replicated(make) if replicas == 2 else make()
        logs = model.fit(data, batch_size=8, shuffle=False, verbose=0).history
        keras.distribution.set_distribution(None)
        losses.append(logs)
    for name, one in losses[0].items():
        np.testing.assert_allclose(one, losses[1][name], rtol=1e-5)


@pytest.mark.parametrize("replica", [0, 1])
def test_the_next_row_where_replicas_have_different_numbers(
    replica, monkeypatch
):
    """Four rows on one replica, three on the other."""
    everything = np.arange(7, dtype="int32")[:, None]
    ours = everything[4:] if replica else everything[:4]
    monkeypatch.setattr(backend, "replica", lambda: replica)
    monkeypatch.setattr(
        backend,
        "all_gather",
        lambda x: ops.convert_to_tensor(
            everything if len(x.shape) == 2 else np.array([4, 3], "int32")
        ),
    )
    found = value(_next_rows(ops.convert_to_tensor(ours)))
    np.testing.assert_array_equal(found, (ours + 1) % 7)


def test_fill_mask_gives_the_best_tokens():
    model = MaskedLanguageModel(
        toy.token_encoder(6, None, VOCABULARY, 4, LENGTH), MASK, [CLS, SEP]
    )
    ids = PAIR["token_ids"].copy()
    ids[0, 2] = ids[0, 5] = ids[1, 4] = MASK
    places, tokens, probabilities = model.fill_mask(ids, 4, batch_size=1)
    np.testing.assert_array_equal(places, [[0, 2], [0, 5], [1, 4]])
    h = model.backbone(ops.convert_to_tensor(ids))
    logits = value(model.head(h, model.backbone.get_layer("table").embeddings))
    p = special.softmax(logits.astype("float64"), -1)[tuple(places.T)]
    np.testing.assert_array_equal(tokens, np.argsort(-p, 1)[:, :4])
    np.testing.assert_allclose(probabilities, -np.sort(-p, 1)[:, :4], rtol=1e-5)
    empty = model.fill_mask(PAIR["token_ids"])
    assert [x.shape for x in empty] == [(0, 2), (0, 5), (0, 5)]


# Blocks of tokens.

TEXTS = ["abcd", "ef", "", "g", "hijklmnop"]


def tokenize(text):
    return [ord(c) - ord("a") + 5 for c in text]


def rows(texts=TEXTS, length=6, batches=1, **options):
    options = {"start_token": CLS, "end_token": SEP, **options}
    blocks = blogkeras.token_blocks(texts, tokenize, length, **options)
    found = [
        keras.tree.map_structure(np.array, batch)
        for batch in blocks.take(batches)
    ]
    return found[0] if batches == 1 else found


def test_lines_one_after_another():
    # a b c d . e | f . g . h | i j k l m n o p .
    blocks = rows(batch_size=4)
    assert blocks.dtype == "int32"
    assert blocks.shape == (4, 6)
    text = {
        (2, 5, 6, 7, 8, 3),
        (2, 9, 10, 3, 11, 3),
        (2, 12, 13, 14, 15, 16),
        (2, 17, 18, 19, 20, 3),
    }
    assert {tuple(row) for row in blocks} == text


def test_each_line_by_itself():
    blocks = rows(batch_size=6, join=False)
    assert {tuple(row) for row in blocks} == {
        (2, 5, 6, 7, 8, 3),
        (2, 9, 10, 3, 0, 0),
        (2, 11, 3, 0, 0, 0),
        (2, 12, 13, 14, 15, 3),
        (2, 16, 17, 18, 19, 3),
        (2, 20, 3, 0, 0, 0),
    }


def test_words_are_numbered():
    batch = rows(
        ["abcdef"],
        9,
        words=lambda line: [line[:3], line[3:4], line[4:]],
        batch_size=1,
    )
    np.testing.assert_array_equal(
        batch["token_ids"][0], [2, 5, 6, 7, 8, 9, 10, 3, 0]
    )
    np.testing.assert_array_equal(
        batch["word_ids"][0], [0, 1, 1, 1, 2, 3, 3, 4, -1]
    )


def test_pairs_follow_each_other_within_a_document():
    batch = rows(
        ["ab", "cd", "ef", "", "gh", "i"], 12, pairs=True, batch_size=2
    )
    order = np.argsort(batch["token_ids"][:, 1])
    ids, segments = (batch[n][order] for n in ("token_ids", "segment_ids"))
    for row, segment, text in zip(
        ids, segments, ["abcdef", "ghi"], strict=True
    ):
        inside = row[(row != 0) & (row != CLS) & (row != SEP)]
        np.testing.assert_array_equal(inside, tokenize(text))
        assert row[0] == CLS
        assert (row == SEP).sum() == 2
        first = row[(segment == 0) & (row != 0)]
        second = row[segment == 1]
        assert first[-1] == second[-1] == SEP
        assert len(first) % 2 == 0 or text == "ghi"  # between two lines


def test_pairs_of_long_lines_leave_nothing_out():
    line = "".join(chr(ord("a") + i % 26) for i in range(100))
    batch = rows([line, line[:7]], 13, pairs=True, batch_size=11)
    order = np.argsort(batch["segment_ids"].sum(1), kind="stable")
    found = []
    for row, segment in zip(
        batch["token_ids"][order], batch["segment_ids"][order], strict=True
    ):
        inside = (row != 0) & (row != CLS) & (row != SEP)
        text = row[inside]
        assert 0 < segment[inside].sum() < len(text)
        # B follows A: the alphabet goes on at the border.
        np.testing.assert_array_equal(np.diff(text) % 26 % 25, 1)
        found.append(text)
    expected = np.concatenate([tokenize(line), tokenize(line[:7])])
    np.testing.assert_array_equal(
        np.sort(np.concatenate(found)), np.sort(expected)
    )


def test_every_pass_has_all_blocks_in_another_order():
    lines = [f"{chr(97 + i)}" for i in range(14)]
    batches = rows(lines, 3, batches=4, batch_size=7, join=False)
    passes = [np.concatenate(batches[:2]), np.concatenate(batches[2:])]
    for each in passes:
        assert sorted(each[:, 1]) == list(range(5, 19))
    assert (passes[0] != passes[1]).any()
    again = rows(lines, 3, batches=2, batch_size=7, join=False, position=2)
    np.testing.assert_array_equal(again[0], batches[2])
    np.testing.assert_array_equal(again[1], batches[3])


@slow_on_jax
def test_a_model_says_where_its_data_go_on(tmp_path):
    def blocks(position):
        return blogkeras.token_blocks(
            ["abcdefgh"] * 9,
            tokenize,
            LENGTH,
            batch_size=2,
            position=position,
            start_token=CLS,
        )

    def make():
        toy.reset()
        encoder = toy.token_encoder(6, None, VOCABULARY, 4, LENGTH)
        model = MaskedLanguageModel(encoder, MASK, [CLS, SEP], seed=1)
        model.compile("adam", jit_compile=JAX, run_eagerly=not JAX)
        return model

    whole = make()
    whole.fit(blocks(0), steps_per_epoch=4, verbose=0)
    half = make()
    half.fit(blocks(0), steps_per_epoch=2, verbose=0)
    half.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.fit(blocks(loaded.steps), steps_per_epoch=2, verbose=0)
    assert toy.difference(toy.weights(whole), toy.weights(loaded)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "abc"}, "one string"),
        ({"texts": [1]}, "strings"),
        ({"texts": []}, "at least one block"),
        ({"texts": ["", " "]}, "at least one block"),
        ({"length": 2}, "length"),
        ({"pairs": 1}, "pairs"),
        ({"pairs": True, "start_token": None}, "start_token"),
        ({"words": "jieba"}, "words"),
        ({"batch_size": 0}, "batch_size"),
        ({"position": -1}, "position"),
        ({"pad_token": 0.0}, "pad_token"),
        ({"pad_token": CLS}, "neither `start_token` nor `end_token`"),
        ({"pad_token": SEP}, "neither `start_token` nor `end_token`"),
        ({"pad_token": 7}, r"no `pad_token`.*pad_token=7 of 'abcd' in line 1"),
        ({"pad_token": 11, "words": list}, "pad_token=11 of 'g' in line 4"),
        ({"pairs": True, "join": False}, "join=True"),
    ],
)
def test_bad_blocks(options, message):
    with pytest.raises(ValueError, match=message):
        rows(**options)


class Encoding:
    """What `tokenizers` gives: it has a length, and is no list."""

    ids = [5, 6]

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    "tokenize",
    [
        list,
        lambda text: Encoding(),
        lambda text: ([2, 5, 3], [0, 0, 0]),  # bert4keras: tokens, segments
        lambda text: ([2, 5, 3], [0]),
        lambda text: {"input_ids": [2, 5, 3]},
        lambda text: [1.0],
        lambda text: [-1],
        lambda text: None,
    ],
)
def test_tokens_must_be_integers(tokenize):
    with pytest.raises(ValueError, match="`tokenize` to give a list"):
        blogkeras.token_blocks(["ab"], tokenize, 4)


def test_tokens_may_be_tensors():
    blocks = blogkeras.token_blocks(
        ["ab"],
        lambda text: ops.convert_to_tensor(tokenize(text)),
        4,
        batch_size=1,
    )
    np.testing.assert_array_equal(next(iter(blocks))[0], [5, 6, 0, 0])


# Encoders of all kinds.


def encoder(vocabulary=VOCABULARY, dim=4, name=None):
    return toy.token_encoder(6, name, vocabulary, dim, LENGTH)


def no_table():
    ids = keras.Input((LENGTH,), dtype="int32")
    h = layers.Dense(6)(ops.one_hot(ids, VOCABULARY))
    return keras.Model(ids, h)


def two_tables():
    ids = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(VOCABULARY, 4, name="a")(ids)
    h = h + layers.Embedding(VOCABULARY, 4, name="b")(ids)
    return keras.Model(ids, h)


def classifier():
    ids = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(VOCABULARY, 4)(ids)
    return keras.Model(ids, layers.Dense(1)(h)[..., 0])


def odd_input():
    ids = keras.Input((LENGTH,), dtype="int32", name="token_ids")
    places = keras.Input((LENGTH,), dtype="int32", name="position_ids")
    tone = keras.Input((LENGTH,), dtype="int32", name="tone")
    h = layers.Embedding(VOCABULARY, 4)(ids)
    h = h + layers.Embedding(VOCABULARY, 4)(places + tone)
    return keras.Model([ids, places, tone], h)


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("words", "more"), ["tokens", "segments"]),
        (("words", "padding_mask"), ["tokens", "mask"]),
        (("segment_ids", "text"), ["segments", "tokens"]),
        (("token_ids", "position_ids"), None),
        (("token_ids", "tone"), None),
    ],
)
def test_two_inputs_are_known_by_their_names(names, roles):
    inputs = [keras.Input((LENGTH,), dtype="int32", name=n) for n in names]
    tables = [layers.Embedding(VOCABULARY, 4, name=n) for n in "ab"]
    h = sum(table(x) for table, x in zip(tables, inputs, strict=True))
    model = keras.Model(inputs, h)
    if roles is None:
        with pytest.raises(ValueError, match="names say what they are"):
            MaskedLanguageModel(model, MASK, embedding="a")
        return
    assert MaskedLanguageModel(model, MASK, embedding="a")._encoder.roles == (
        roles
    )


def test_the_table_is_found_or_named():
    def table(model, **options):
        model = MaskedLanguageModel(model, MASK, **options)
        return model._encoder.embedding.name

    assert table(with_segments()) == "table"
    assert table(two_tables(), embedding="b") == "b"
    sequential = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(VOCABULARY, 4, name="words"),
            layers.Dense(6),
        ]
    )
    assert table(sequential) == "words"


@slow_on_jax
def test_kerashub_backbones_with_their_inputs():
    keras_hub = pytest.importorskip("keras_hub")

    def backbone(dim):
        return keras_hub.models.ElectraBackbone(
            vocab_size=VOCABULARY,
            num_layers=1,
            num_heads=1,
            hidden_dim=dim,
            embedding_dim=4,
            intermediate_dim=8,
            max_sequence_length=LENGTH,
        )

    model = ElectraPretrainer(
        backbone(4), backbone(6), MASK, [CLS, SEP], "disentangled"
    )
    inputs = {k: ops.convert_to_tensor(v) for k, v in PAIR.items()}
    out = value(model(inputs)["discriminator_logits"])
    assert out.shape == (3, LENGTH)
    assert np.isfinite(out).all()
    # What stands behind padding is of no influence.
    longer = {k: ops.pad(v, [[0, 0], [0, 0]]) for k, v in inputs.items()}
    np.testing.assert_array_equal(
        value(model(longer)["discriminator_logits"]), out
    )


ELECTRA = {"mask_token": MASK, "special_tokens": [CLS, SEP]}


@pytest.mark.parametrize(
    ("generator", "discriminator", "options", "message"),
    [
        (encoder, lambda: encoder(24), ELECTRA, "same vocabulary"),
        (encoder, lambda: encoder(dim=5), ELECTRA, "one shape to share"),
        (
            encoder,
            lambda: encoder(dim=5),
            {**ELECTRA, "sharing": "disentangled"},
            "one shape to share",
        ),
        (
            encoder,
            lambda: encoder(dim=5),
            {**ELECTRA, "sharing": "all"},
            "two equal networks",
        ),
        (encoder, encoder, {}, "mask_token"),
        (encoder, encoder, {"mask_token": 23}, "mask_token"),
        (encoder, encoder, {"mask_token": True}, "mask_token"),
        (encoder, encoder, {**ELECTRA, "special_tokens": [99]}, "special"),
        (encoder, encoder, {**ELECTRA, "mask_rate": 0}, "rate"),
        (encoder, encoder, {**ELECTRA, "mask_rate": 1.0}, "rate"),
        (encoder, encoder, {**ELECTRA, "sharing": "some"}, "sharing"),
        (encoder, encoder, {**ELECTRA, "labels": "true"}, "labels"),
        (encoder, encoder, {**ELECTRA, "temperature": 0}, "temperature"),
        (encoder, encoder, {**ELECTRA, "generator_weight": -1}, "generator_w"),
        (
            encoder,
            encoder,
            {**ELECTRA, "discriminator_weight": np.inf},
            "discriminator_weight",
        ),
        (encoder, encoder, {**ELECTRA, "allow_original": 1}, "allow_original"),
        (encoder, encoder, {**ELECTRA, "seed": 0.5}, "seed"),
        (encoder, encoder, {**ELECTRA, "masking": "span"}, "masking"),
        (
            encoder,
            encoder,
            {**ELECTRA, "masking": TokenMasking(23, 4)},
            "either `masking`",
        ),
        (encoder, encoder, {"masking": TokenMasking(22, 4)}, "vocabulary"),
        (
            encoder,
            encoder,
            {"masking": TokenMasking(23, 4, pad_token=1)},
            "pad_token",
        ),
        (encoder, no_table, ELECTRA, "Embedding"),
        (encoder, two_tables, ELECTRA, "embedding"),
        (encoder, classifier, ELECTRA, "without a head"),
        (encoder, odd_input, ELECTRA, "names say what they are"),
        (encoder, lambda: keras.Sequential(), ELECTRA, "built"),
        (encoder, lambda: "electra", ELECTRA, "discriminator"),
        (lambda: 3, encoder, ELECTRA, "generator"),
        (lambda: "gumbel", encoder, ELECTRA, "generator"),
        (
            lambda: "uniform",
            encoder,
            {**ELECTRA, "sharing": "all"},
            "network for a generator",
        ),
    ],
)
def test_bad_arguments(generator, discriminator, options, message):
    with pytest.raises(ValueError, match=message):
        ElectraPretrainer(generator(), discriminator(), **options)


def test_equal_networks_with_layers_inside_others():
    def recurrent():
        ids = keras.Input((LENGTH,), dtype="int32")
        h = layers.Embedding(VOCABULARY, 4)(ids)
        lstm = layers.LSTM(3, return_sequences=True)
        return keras.Model(ids, layers.Bidirectional(lstm)(h))

    model = ElectraPretrainer(
        recurrent(), recurrent(), sharing="all", **ELECTRA
    )
    assert model.generator is model.discriminator


def test_equal_layers_in_another_order_are_another_network():
    def network(parallel):
        ids = keras.Input((LENGTH,), dtype="int32")
        h = layers.Embedding(VOCABULARY, 6)(ids)
        one, two = layers.Dense(6), layers.Dense(6)
        if parallel:
            return keras.Model(ids, ops.tanh(one(h) + two(h)))
        return keras.Model(ids, ops.tanh(two(one(h)) + h))

    def with_operation(operation):
        ids = keras.Input((LENGTH,), dtype="int32")
        return keras.Model(ids, operation(layers.Embedding(VOCABULARY, 6)(ids)))

    for one, other in (
        (network(False), network(True)),
        (with_operation(ops.tanh), with_operation(ops.relu)),
    ):
        with pytest.raises(ValueError, match="two equal networks"):
            ElectraPretrainer(one, other, sharing="all", **ELECTRA)
    model = ElectraPretrainer(
        network(True), network(True), sharing="all", **ELECTRA
    )
    assert model.generator is model.discriminator


def test_one_network_twice_is_all_of_it():
    one = encoder()
    with pytest.raises(ValueError, match='sharing="all"'):
        ElectraPretrainer(one, one, **ELECTRA)
    model = ElectraPretrainer(one, one, sharing="all", **ELECTRA)
    assert model.generator is model.discriminator is one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "order"}, "pairs"),
        ({"pairs_weight": -1}, "pairs_weight"),
        ({"head": layers.Dense(3)}, "head"),
        ({"mask_token": None}, "mask_token"),
        ({"embedding": "nothing"}, "embedding"),
    ],
)
def test_bad_arguments_of_the_language_model(options, message):
    options = {"mask_token": MASK, **options}
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModel(encoder(), **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((4, LENGTH), 23), "tokens"),
        (np.full((4, LENGTH), -1), "tokens"),
        (np.zeros((4, LENGTH)), "integers"),
        (np.zeros(4, int), "batch, length"),
        ([np.zeros((4, LENGTH), int)] * 2, "no segments"),
        ({"tokens": np.zeros((4, LENGTH), int)}, "token_ids"),
        (
            dict.fromkeys(
                ["token_ids", "padding_mask"], np.zeros((4, LENGTH), int)
            ),
            "pad_token.*padding_mask",
        ),
        ({"token_ids": [[1, 2]]}, "array"),
    ],
)
def test_bad_tokens_before_training(x, message):
    model = MaskedLanguageModel(encoder(), **ELECTRA)
    model.compile("sgd")
    for verb in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match=message):
            verb(x)


def test_a_data_set_is_looked_at_too():
    model = MaskedLanguageModel(encoder(), **ELECTRA)
    model.compile("sgd")
    blocks = blogkeras.token_blocks(["zzz"], tokenize, LENGTH, batch_size=2)
    with pytest.raises(ValueError, match="tokens"):
        model.fit(blocks, steps_per_epoch=1)


def test_the_loss_is_the_model_s_own():
    model = MaskedLanguageModel(encoder(), **ELECTRA)
    with pytest.raises(ValueError, match="`loss`"):
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`weighted_metrics`"):
        model.compile("sgd", weighted_metrics=["accuracy"])
    model.compile("sgd", weighted_metrics=[])
    ids = PAIR["token_ids"]
    with pytest.raises(ValueError, match="`class_weight`"):
        model.fit(ids, ids, class_weight={0: 1.0, 1: 2.0})
    paired = MaskedLanguageModel(encoder(), pairs="sentence_order", **ELECTRA)
    with pytest.raises(ValueError, match="segments"):
        paired(ops.ones((2, LENGTH), "int32"))
