"""Where a model is perturbed: names, vocabularies, refusals."""

import keras
import numpy as np
import pytest
import scipy.sparse
import toy
from adversarial_reference import (
    LABELS,
    TOKENS,
    compiled,
)
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax

import blogkeras
from blogkeras import FGM, GradientPenalty
from blogkeras.adversarial import finding

# Finding the place


def two_towers(a=7, b=7):
    first = keras.Input((4,), dtype="int32", name="first")
    second = keras.Input((4,), dtype="int32", name="second")
    pool = layers.GlobalAveragePooling1D()
    h = layers.Concatenate()(
        [
            pool(layers.Embedding(a, 3, name="left")(first)),
            pool(layers.Embedding(b, 3, name="right")(second)),
        ]
    )
    return keras.Model([first, second], layers.Dense(1)(h))


class TokenAndPosition(layers.Layer):
    """Token and position embedding, more positions than tokens."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = layers.Embedding(5, 3, name="tokens")
        self.positions = layers.Embedding(512, 3, name="positions")

    def build(self, input_shape):
        self.tokens.build()
        self.positions.build()

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(x.shape[1]))


def site_of(model, name=None, kind="matrix"):
    return finding.find_site(model, name, kind)


def test_finds_the_largest_vocabulary():
    assert site_of(two_towers(7, 8)).layer.name == "right"


def test_finds_tokens_not_positions():
    tokens = keras.Input((4,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(TokenAndPosition()(tokens))
    inner = keras.Model(tokens, h, name="encoder")
    tokens = keras.Input((4,), dtype="int32")
    model = keras.Model(tokens, layers.Dense(2)(inner(tokens)))
    assert site_of(model).layer.name == "tokens"
    assert site_of(model, "positions").layer.input_dim == 512
    path = "encoder/token_and_position/tokens"
    assert site_of(model, path).layer.input_dim == 5


def test_finds_tokens_not_positions_in_a_subclassed_model():
    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.embed = TokenAndPosition()
            self.head = layers.Dense(2, activation="softmax")

        def call(self, x):
            return self.head(ops.mean(self.embed(x), axis=1))

    model = compiled(Classifier())
    blogkeras.adversarial_training(model)
    model.fit(TOKENS, LABELS, verbose=0)
    before = model.embed.positions.get_weights()[0]
    assert np.isfinite(before).all()


@slow_on_jax
def test_finds_the_embedding_of_a_keras_hub_model():
    model = toy.keras_hub_classifier()
    if TENSORFLOW:  # JAX cannot trace its lengths ahead, and waits for `fit`
        assert site_of(model).layer is model.backbone.token_embedding
    model.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=TENSORFLOW,
    )
    blogkeras.adversarial_training(model, epsilon=0.5)
    x = {
        "token_ids": TOKENS,
        "segment_ids": np.zeros_like(TOKENS),
        "padding_mask": (TOKENS != 0).astype("int32"),
    }
    history = model.fit(x, LABELS, verbose=0, shuffle=False).history
    assert np.isfinite(history["loss"][0])


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (two_towers, {}, r"2 embedding layers .*\['left', 'right'\]"),
        (two_towers, {"embedding_name": "up"}, "no such layer.*left.*right"),
        (
            two_towers,
            {"embedding_name": "dense"},
            "Expected an embedding layer.*'dense', a Dense",
        ),
        (
            two_towers,
            {"embedding_name": "first"},
            "Expected a floating input.*int32",
        ),
        (two_towers, {"epsilon": -1.0}, "epsilon.*at least 0.*=-1.0"),
        (two_towers, {"epsilon": float("nan")}, "Received: epsilon=nan"),
        (two_towers, {"epsilon": "big"}, "Received: epsilon='big'"),
        (two_towers, {"method": "magic"}, "'fgm'.*Received: method='magic'"),
        (
            two_towers,
            {"epsilon": 0.5, "method": FGM(0.7)},
            "carries its own strength.*epsilon=0.5",
        ),
        (
            two_towers,
            {"epsilon": 1.0, "method": FGM(0.7)},
            "carries its own strength.*epsilon=1.0",
        ),
        (
            lambda: two_towers(8),
            {"method": FGM(norm_scope="sample")},
            'needs site="output"',
        ),
        (
            lambda: keras.Sequential(
                [keras.Input((3,), dtype="int32"), layers.CategoryEncoding(5)]
            ),
            {},
            "Nothing to perturb.*none",
        ),
    ],
)
def test_bad_input(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        blogkeras.adversarial_training(make(), **kwargs)


def test_a_name_that_stands_twice_needs_its_path():
    def tower(name):
        tokens = keras.Input((4,), dtype="int32")
        return keras.Model(
            tokens, layers.Embedding(5, 3, name="embedding")(tokens), name=name
        )

    tokens = keras.Input((4,), dtype="int32")
    a, b = tower("a"), tower("b")
    model = keras.Model(tokens, layers.Add()([a(tokens), b(tokens)]))
    with pytest.raises(ValueError, match=r"several layers.*a/embedding.*path"):
        site_of(model, "embedding")
    assert site_of(model, "b/embedding").layer is b.get_layer("embedding")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGM(norm_scope="word"), "norm_scope='word'"),
        (lambda: FGM(site="logits"), "site='logits'"),
        (lambda: FGM(clean_weight=1.5), "at most 1. Received: clean_weight"),
        (lambda: GradientPenalty(form="cubed"), "form='cubed'"),
    ],
)
def test_bad_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Tied(keras.Model):
    """A language model whose softmax is the embedding, transposed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.ReversibleEmbedding(5, 3, name="embedding")

    def call(self, tokens):
        return self.embedding(ops.tanh(self.embedding(tokens)), reverse=True)


class Unused(Tied):
    """Has a layer that it never calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.unused = layers.Dense(2, name="unused")
        self.unused.build((None, 3))


def test_a_layer_that_takes_no_part():
    model = Unused()
    model.compile("sgd", "mse")
    blogkeras.adversarial_training(
        model, "unused", method=FGM(0.5, site="output")
    )
    with pytest.raises(ValueError, match=r"takes no part.*'unused'"):
        model.fit(TOKENS, np.zeros((3, 4, 5)), verbose=0)


# Sparse inputs


def sparse_classifier():
    x = keras.Input((6,), sparse=True, name="counts")
    h = layers.Dropout(0.5)(layers.Dense(4, "relu", name="hidden")(x))
    return toy.compiled(keras.Model(x, layers.Dense(3, "softmax")(h)))


COUNTS = scipy.sparse.csr_matrix(
    np.random.default_rng(0).poisson(0.5, (8, 6)).astype("float32")
)


@pytest.mark.parametrize("name", [None, "counts"])
@pytest.mark.parametrize(
    "method", ["fgm", "pgd", "vat", "trades", "gradient_penalty"]
)
def test_sparse_inputs_are_refused(name, method):
    model = sparse_classifier()
    with pytest.raises(ValueError, match=r"dense .*sparse inputs .*counts"):
        blogkeras.adversarial_training(model, name, method=method)


def test_sparse_inputs_of_a_subclassed_model_are_refused():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3, "softmax")

        def call(self, x):
            return self.dense(x)

    model = toy.compiled(Subclassed(), run_eagerly=True)
    blogkeras.adversarial_training(model)
    with pytest.raises(ValueError, match=r"dense .*Received: sparse inputs"):
        model.fit(COUNTS, toy.LABELS[:8], verbose=0)


def test_the_robustness_on_sparse_inputs_is_refused():
    with pytest.raises(ValueError, match=r"dense .*sparse inputs .*counts"):
        blogkeras.evaluate_robustness(
            sparse_classifier(), COUNTS, toy.LABELS[:8], epsilons=(0, 0.5)
        )


@pytest.mark.parametrize(
    "method", ["rdrop", "awp", FGM(0.5, site="output")], ids=str
)
def test_what_trains_on_sparse_inputs(method):
    model = sparse_classifier()
    name = None if isinstance(method, str) else "hidden"
    blogkeras.adversarial_training(model, name, method=method)
    before = toy.weights(model)
    model.fit(COUNTS, toy.LABELS[:8], verbose=0)
    assert toy.difference(before, toy.weights(model)) > 0
