"""Theseus on the transformers of bert4keras and KerasHub (post 7575)."""

import re

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import close_in_ulps, slow_on_jax, value

from blogkeras.theseus import (
    Distillation,
    Theseus,
    bert_of_theseus,
    cut_model,
    keep_blocks,
)

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
needs_bert4keras = pytest.mark.skipif(
    not ON_TENSORFLOW, reason="bert4keras runs on TensorFlow"
)
no_gradient = pytest.mark.filterwarnings("ignore:Gradients do not exist")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 30, (6, 7))
TOKENS[::2, 4:] = 0  # padding
LABELS = RNG.integers(0, 3, 6)
SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_act": "gelu",
    "max_position": 7,
    "dropout_rate": 0.1,
}
# The name of the model, options, and what a cut between blocks carries beside
# the vectors.
ARCHITECTURES = [
    pytest.param("bert", {}, 0, marks=pytest.mark.verify),
    pytest.param("roberta", {}, 0, marks=pytest.mark.verify),
    ("albert", {"embedding_size": 4}, 0),
    # Relative positions.
    pytest.param("nezha", {}, 1, marks=pytest.mark.verify),
    ("roformer", {}, 1),  # rotary positions
    pytest.param("roformer_v2", {}, 1, marks=pytest.mark.verify),
    ("bert", {"residual_attention_scores": True}, 1),
    ("nezha", {"application": "unilm"}, 2),  # and an attention bias
    ("bert", {"with_pool": True}, 0),
]


def transformer(name, blocks, prefix, **options):
    import blogkeras.bert4keras  # noqa: F401

    # isort: split
    from bert4keras.models import build_transformer_model

    return build_transformer_model(
        model=name,
        num_hidden_layers=blocks,
        prefix=prefix,
        return_keras_model=False,
        **SIZES,
        **options,
    )


def classifier(transformer):
    """As in the post; for each token if the transformer has no pooler."""
    x = keras.Input(transformer.output.shape[1:])
    return keras.Model(x, layers.Dense(3, activation="softmax")(x))


def inputs(transformer):
    count = len(transformer.model.inputs)
    x = [TOKENS, (np.arange(7) > 2) * np.ones_like(TOKENS)][:count]
    return x if count > 1 else x[0]


def close(found, expected):
    """Equal where there is no padding, to 1e-6."""
    mask = np.ones(len(TOKENS), bool) if found.ndim == 2 else TOKENS > 0
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-6)


@needs_bert4keras
@pytest.mark.parametrize(("name", "options", "sides"), ARCHITECTURES)
def test_every_architecture_equals_the_uncut_models(name, options, sides):
    """The chain of segments, Theseus at rate 0 and 1, and predict."""
    old = transformer(name, 2, "Predecessor-", **options)
    new = transformer(name, 1, "Successor-", **options)
    x = inputs(old)
    y = [ops.convert_to_tensor(a) for a in x] if isinstance(x, list) else x
    segments = cut_model(old)
    carried = [len(keras.tree.flatten(s.cut.crossing[2])) for s in segments]
    assert set(carried) == {1 + sides}
    for segment in segments:
        y = segment(y)
    expected = value(old.model(x))
    close(value(y), expected)

    head = classifier(old)
    theseus = bert_of_theseus(old, new, head)
    assert isinstance(theseus, Theseus)
    assert len(theseus.replacements) == 2  # the embedding and a module
    # What is not replaced, pooler or language model, is the predecessor's.
    shared = [w for part in theseus.head[:-1] for w in part.weights]
    assert bool(shared) == bool({"with_pool", "application"} & {*options})
    assert {id(w) for w in shared} <= {id(w) for w in old.model.weights}
    for layer in new.model.layers:
        name = layer.name.removeprefix("Successor-")
        if "Transformer" not in name and layer.weights:
            source = old.model.get_layer(f"Predecessor-{name}")
            layer.set_weights(source.get_weights())
    dense = head.layers[-1]
    old_y, new_y = value(dense(old.model(x))), value(dense(new.model(x)))
    close(value(theseus(x)), new_y)
    assert np.abs(old_y - new_y).max() > 1e-5
    for layer in new.model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    for rate, expected in ((0.0, old_y), (1.0, new_y)):
        for module in theseus.replacements:
            module.replacement_rate = rate
        close(value(theseus(x, training=True)), expected)


@pytest.mark.verify
@needs_bert4keras
@no_gradient
@pytest.mark.parametrize("name", ["nezha", "albert"])
def test_the_posts_phases(name, tmp_path):
    options = {"embedding_size": 4} if name == "albert" else {}
    old = transformer(name, 2, "Predecessor-", **options)
    new = transformer(name, 1, "Successor-", **options)
    x, tags = inputs(old), RNG.integers(0, 3, TOKENS.shape)
    theseus = bert_of_theseus(old, new, classifier(old), seed=0)
    theseus.compile(
        keras.optimizers.Adam(1e-3),
        "sparse_categorical_crossentropy",
        jit_compile=False,
        run_eagerly=name == "nezha",  # a graph takes long to trace
    )
    frozen = old.model.get_weights()
    theseus.fit(x, tags, epochs=2, verbose=0)
    assert toy.difference(frozen, old.model.get_weights()) == 0
    expected = value(theseus(x))
    theseus.save(tmp_path / "theseus.keras")
    loaded = keras.saving.load_model(tmp_path / "theseus.keras")
    close_in_ulps(value(loaded(x)), expected)
    model = theseus.detach()
    close_in_ulps(value(model(x)), expected)
    names = [layer.name for layer in model.layers]
    assert not any(n.startswith("Predecessor") for n in names)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(x, tags, verbose=0)
    assert np.abs(value(model(x)) - expected).max() > 0


@needs_bert4keras
@pytest.mark.filterwarnings("ignore:Layer .sequential")  # has no mask
def test_mapping_and_baselines():
    old = transformer("bert", 5, "Predecessor-")
    head = layers.Dense(3, activation="softmax", name="head")
    new = keep_blocks(old, [0, 2])
    ours = [w for w in new.weights if "Transformer-2" in w.path]
    theirs = [w for w in old.model.weights if "Transformer-2" in w.path]
    assert toy.difference(map_values(ours), map_values(theirs)) == 0

    def blocks(theseus):
        attention = re.compile(r"-\d+-MultiHeadSelfAttention$")
        return [
            sum(bool(attention.search(p.name)) for p in module.parts)
            for module in theseus.predecessor_modules
        ]

    assert blocks(bert_of_theseus(old, new, head)) == [0, 2, 3]
    mapping = [np.int64(4), 1]
    found = blocks(bert_of_theseus(old, new, head, mapping=mapping))
    assert found == [0, 4, 1]
    pairs = bert_of_theseus(old, new, head, mapping=[(5, 2)])
    assert blocks(pairs) == [0, 5]
    shared = bert_of_theseus(old, new, head, replace_embedding=False)
    assert blocks(shared) == [2, 3]
    assert shared.stem.parts[0].name == "Predecessor-Embedding-Token"
    ours = {id(w) for w in old.model.weights}
    assert {id(w) for w in shared.stem.weights} < ours
    for mapping in ([2, 2], [5], [5, 0]):
        with pytest.raises(ValueError, match="predecessor's 5 blocks"):
            bert_of_theseus(old, new, head, mapping=mapping)
    with pytest.raises(ValueError, match="cannot be the deeper one"):
        bert_of_theseus(new, old, head)
    with pytest.raises(ValueError, match="Received: method='prune'"):
        bert_of_theseus(old, new, head, method="prune")

    x = inputs(old)
    distilled = bert_of_theseus(
        old, new, head, method="distillation", temperature=4.0
    )
    # The predecessor is frozen by now, and copies are not.
    kept = keep_blocks(old, [0, 2])
    assert len(kept.trainable_weights) == len(new.trainable_weights) > 0
    direct = bert_of_theseus(old, kept, head, method="direct")
    assert len(direct.trainable_weights) == len(kept.trainable_weights) + 2
    with pytest.raises(ValueError, match=r"Received: \['mode'\]"):
        bert_of_theseus(old, new, head, method="direct", mode="batch")
    unbuilt = keras.Sequential([layers.Dense(3, name="top")])
    named = bert_of_theseus(old, new, unbuilt).detach()
    assert named(x).shape == direct(x).shape
    close(value(direct(x)), value(head(new(x))))
    assert not {id(w) for w in direct.weights} & {
        id(w) for w in [*new.weights, *head.weights]
    }
    assert isinstance(distilled, Distillation)
    assert distilled.temperature == 4
    close(value(distilled(x)), value(head(new(x))))
    close(value(distilled.teacher(x)), value(head(old.model(x))))


def map_values(weights):
    return [value(w) for w in weights]


def hub_backbone(kind, blocks):
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {
        "vocabulary_size": 30,
        "num_layers": blocks,
        "num_heads": 2,
        "hidden_dim": 8,
        "intermediate_dim": 12,
        "max_sequence_length": 7,
    }
    if kind == "Albert":
        sizes["embedding_dim"] = 4
    return getattr(keras_hub.models, f"{kind}Backbone")(**sizes)


@no_gradient
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "jit"),
    [
        ("Bert", None),
        pytest.param("Bert", True, marks=pytest.mark.verify),
        ("Albert", None),
        pytest.param("Roberta", None, marks=pytest.mark.verify),
        pytest.param("DebertaV3", None, marks=pytest.mark.verify),
    ],
)
@slow_on_jax
def test_backbones_of_keras_hub(kind, jit, tmp_path):
    old, new = hub_backbone(kind, 3), hub_backbone(kind, 2)
    x = {"token_ids": TOKENS, "padding_mask": (TOKENS > 0).astype("int32")}
    if "segment_ids" in old.input:
        x["segment_ids"] = np.zeros_like(TOKENS)
    tensors = {k: ops.convert_to_tensor(v) for k, v in x.items()}

    def whole(backbone, head):
        outputs = backbone.output
        if isinstance(outputs, dict):
            outputs = outputs["sequence_output"]
        return keras.Model(backbone.input, head(outputs))

    head = layers.Dense(3, activation="softmax", name="head")
    old_model, new_model = whole(old, head), whole(new, head)
    expected = value(old_model(tensors))
    y = tensors
    for segment in cut_model(old_model):
        y = segment(y)
    close(value(y), expected)
    theseus = bert_of_theseus(old_model, new_model, None)
    close(value(theseus(tensors)), value(new_model(tensors)))
    for module in theseus.replacements:
        module.replacement_rate = 0.0
    close(value(theseus(tensors, training=True)), expected)
    if jit is not None:
        theseus = bert_of_theseus(
            old_model, new_model, None, mapping=[(3, 2)], seed=0
        )
        theseus.compile(
            "adam", "sparse_categorical_crossentropy", jit_compile=jit
        )
        tags = np.where(TOKENS > 0, TOKENS % 3, 0)
        theseus.fit(x, tags, verbose=0)
        theseus.save(tmp_path / "theseus.keras")
        loaded = keras.saving.load_model(tmp_path / "theseus.keras")
        np.testing.assert_allclose(
            value(loaded(tensors)), value(theseus(tensors)), atol=1e-6
        )


CLASSIFIERS = ["Bert", pytest.param("Roberta", marks=pytest.mark.verify)]


@no_gradient
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_of_keras_hub(kind):
    """The cut goes through the backbone that the classifier calls."""
    keras_hub = pytest.importorskip("keras_hub")
    old, new = (
        getattr(keras_hub.models, f"{kind}TextClassifier")(
            backbone=hub_backbone(kind, blocks), num_classes=3, dropout=0.0
        )
        for blocks in (2, 1)
    )
    x = {"token_ids": TOKENS, "padding_mask": (TOKENS > 0).astype("int32")}
    if "segment_ids" in old.input:
        x["segment_ids"] = np.zeros_like(TOKENS)
    theseus = bert_of_theseus(old, new, None, 0.0)
    close_in_ulps(value(theseus(x, training=True)), value(old(x)), 16)
    assert len(theseus.predecessor_modules) == 2
    # The head is the predecessor's.
    for layer in theseus.head[0].parts:
        if layer.weights:
            name = layer.name
            inside = {x.name for x in new.layers}
            owner = new if name in inside else new.backbone
            owner.get_layer(name).set_weights(layer.get_weights())
    close_in_ulps(value(theseus(x)), value(new(x)), 16)
    small = keep_blocks(old, 1)
    assert small(x).shape == (6, 3)


@no_gradient
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["Gemma", "FNet"])
@slow_on_jax
def test_copies_are_cut_again(kind):
    """What `keep_blocks` has copied has blocks like any other model."""
    keras_hub = pytest.importorskip("keras_hub")
    if kind == "Gemma":
        old = keras_hub.models.GemmaBackbone(
            vocabulary_size=30,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            hidden_dim=8,
            intermediate_dim=12,
        )
        head = layers.Dense(3, name="head")
    else:
        old = keras_hub.models.FNetBackbone(
            vocabulary_size=30,
            num_layers=2,
            hidden_dim=8,
            intermediate_dim=12,
            max_sequence_length=7,
        )
        ends = {
            k: keras.Input(x.shape[1:], name=k) for k, x in old.output.items()
        }
        dense = layers.Dense(3, name="head")
        head = keras.Model(ends, dense(ends["sequence_output"]))
    theseus = bert_of_theseus(old, keep_blocks(old, 1), head)
    assert [len(m.parts) for m in theseus.predecessor_modules[1:]] == [2]
    x = {"token_ids": TOKENS}
    x |= {k: np.ones_like(TOKENS) for k in old.input if k != "token_ids"}
    assert theseus(x).shape == (6, 7, 3)


def test_boundaries_of_models_in_which_no_blocks_are_found():
    def model(widths, name):
        x = inputs = keras.Input((3,))
        for i, width in enumerate(widths):
            x = layers.Dense(width, "relu", name=f"{name}{i}")(x)
        return keras.Model(inputs, layers.Dense(2, name=f"{name}_top")(x))

    old, new = model([4, 5, 5, 4, 4], "a"), model([4, 4], "b")
    places = [["a0", "a3", "a4"], ["b0", "b1"]]
    theseus = bert_of_theseus(old, new, None, boundaries=places)
    names = [[p.name for p in m.parts] for m in theseus.predecessor_modules]
    assert names == [["a0"], ["a1", "a2", "a3", "a4"]]
    x = np.ones((2, 3), "float32")
    expected = old.get_layer("a_top")(new.get_layer("b1").output)
    expected = keras.Model(new.input, expected)
    close_in_ulps(value(theseus(x)), value(expected(x)))
    with pytest.raises(ValueError, match=r"Found no blocks.*`boundaries`"):
        bert_of_theseus(old, new, None)
    for wrong in (["a0"], "a", 3, [["a0"], ["b0", "b1"]], [["x"], ["b0"]]):
        with pytest.raises(ValueError, match=r"(?s)Expected .*Received: "):
            bert_of_theseus(old, new, None, boundaries=wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, value)
        for name, values in {
            "predecessor": [None, "bert", 3, []],
            "successor": [None, "bert", 3, []],
            "classifier": ["dense", 3, [None], layers.Dense],
            "method": ["prune", None, True],
            "mapping": [[1.0], "1", 1, [True], [(1,)], [("a", 1)], [[]], []],
            "replace_embedding": [0, "no", None],
            "replacement_rate": [None, "0.5", 2.0],
        }.items()
        for value in values
    ],
    ids=str,
)
def test_bad_arguments_of_bert_of_theseus(name, wrong):
    def model(prefix):
        x = inputs = keras.Input((3,))
        for layer in ("embedding", "transformer_layer_0"):
            x = layers.Dense(3, name=prefix + layer)(x)
        return keras.Model(inputs, x)

    arguments = {
        "predecessor": model("old_"),
        "successor": model("new_"),
        "classifier": layers.Dense(2),
    }
    with pytest.raises(ValueError, match=r"(?s)xpected .*Received: "):
        bert_of_theseus(**{**arguments, name: wrong})
