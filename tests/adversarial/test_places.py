"""What is perturbed: bytes of images, padding, one norm for all inputs."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, slow_on_jax, slow_on_tensorflow

import blogkeras
from blogkeras import FGM, PGD, FreeLB, evaluate_robustness
from blogkeras.adversarial import METHODS

RNG = np.random.default_rng(5)
CHEAPLY = {"run_eagerly": TENSORFLOW}
BYTES = RNG.integers(0, 256, (8, 4, 4, 1))
# Padding at the end, three tokens a sample.
TOKENS = np.array([[1, 2, 2, 0, 0], [3, 2, 0, 0, 0], [4, 1, 3, 2, 0]], "int32")
REAL = (TOKENS != 0).sum(1)


def seldom(*values):
    """A case of a kind that other cases show, too."""
    return pytest.param(*values, marks=pytest.mark.verify)


def mean_output(y, y_pred):
    return ops.mean(y_pred, axis=-1)


def one_step(model, x, y=None, **kwargs):
    y = np.zeros(len(next(iter(x.values())) if isinstance(x, dict) else x))
    return toy.batch_loss(model, x, y, **kwargs)


# Integer images


def image_model(rescaling, dtype="float32"):
    inputs = keras.Input((4, 4, 1), dtype=dtype)
    h = layers.Rescaling(1 / 255, name="rescaling")(inputs) if rescaling else (
        inputs
    )  # fmt: skip
    outputs = layers.Dense(1, use_bias=False)(layers.Flatten()(h))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    slope = np.linalg.norm(model.get_weights()[0])
    return model, slope / 255 if rescaling else slope


@pytest.mark.parametrize(
    ("dtype", "rescaling"),
    [
        ("uint8", True),
        ("int32", False),
        seldom("uint8", False),
        seldom("int32", True),
        seldom("float64", False),
    ],
)
def test_integers_are_perturbed_as_the_numbers_they_are_cast_to(
    dtype, rescaling
):
    model, slope = image_model(rescaling)
    x = BYTES.astype(dtype)
    clean = one_step(model, x)
    for method, gain in [
        (FGM(20.0), 20 * slope / np.sqrt(8)),
        (FGM(20.0, "sample"), 20 * slope),
    ]:
        blogkeras.adversarial_training(model, method=method)
        np.testing.assert_allclose(one_step(model, x), clean + gain, rtol=1e-4)
    result = evaluate_robustness(
        model, x, np.zeros(8), (0.0, 50.0), batch_size=8, verbose=0
    )
    np.testing.assert_allclose(
        result.column("loss"), [clean, clean + 50 * slope], rtol=1e-4
    )
    np.testing.assert_allclose(
        result.mean_norm,
        np.linalg.norm(BYTES.reshape(8, -1), axis=1).mean(),
        rtol=1e-5,
    )
    assert result.unmoved == 0


@slow_on_jax
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("fgm", "gradient_penalty") else seldom(n)
        for n in sorted(set(METHODS) - {"awp", "rdrop"})  # perturb no input
    ],
)
def test_every_method_sees_integers_as_floats(name):
    inputs = keras.Input((4, 4, 1))
    h = layers.Dense(3)(layers.Flatten()(inputs / 255.0))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(h))
    model.compile(
        keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy", **CHEAPLY
    )
    y = np.arange(8) % 3
    clean = toy.batch_loss(model, BYTES.astype("uint8"), y)
    is_penalty = name in ("gradient_penalty", "noise_stability")
    epsilon = 1e4 if is_penalty else 30.0
    blogkeras.adversarial_training(model, epsilon=epsilon, method=name)
    losses = []
    for dtype in ("uint8", "float32"):
        model.optimizer.iterations.assign(0)  # the same random numbers
        losses.append(toy.batch_loss(model, BYTES.astype(dtype), y))
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert losses[0] > clean + 1e-4


def test_where_nothing_is_floating_the_layer_must_be_named():
    model, slope = image_model(True, "uint8")
    with pytest.raises(ValueError, match=r"Nothing to perturb.*Rescaling"):
        blogkeras.adversarial_training(model)
    x = BYTES.astype("uint8")
    clean = one_step(model, x)
    method = FGM(1.0, "sample", site="output")
    blogkeras.adversarial_training(model, "rescaling", method=method)
    np.testing.assert_allclose(
        one_step(model, x), clean + 255 * slope, rtol=1e-4
    )


def test_a_subclassed_model_of_integers_says_so_in_fit():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(ops.reshape(ops.cast(x, "float32"), (8, 16)))

    model = Own()
    model.compile("sgd", mean_output, **CHEAPLY)
    blogkeras.adversarial_training(model)
    with pytest.raises(ValueError, match=r"Nothing to perturb.*uint8"):
        model.fit(BYTES.astype("uint8"), np.zeros(8), batch_size=8, verbose=0)


def test_a_mask_among_floating_inputs_is_not_perturbed():
    features, mask = keras.Input((3, 2)), keras.Input((3,), name="mask")
    total = ops.sum(features, axis=(1, 2)) + 100 * ops.sum(mask, axis=1)
    model = keras.Model([features, mask], total[:, None])
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    x = [np.ones((2, 3, 2)), np.array([[1, 1, 0], [1, 0, 0]])]
    losses = evaluate_robustness(
        model, x, np.zeros(2), (0.0, 1.0), verbose=0
    ).column("loss")
    roots = np.sqrt([4, 2])  # the coordinates of real positions
    np.testing.assert_allclose(losses[1] - losses[0], roots.mean(), rtol=1e-5)


# Padding


class CountSteps(layers.Layer):
    """How many steps of a sequence are not masked."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_mask(self, x, mask=None):
        return None

    def call(self, x, mask=None):
        count = ops.sum(ops.cast(mask, "float32"), axis=1, keepdims=True)
        return count + 0 * ops.sum(x, axis=(1, 2))[:, None]


@pytest.mark.parametrize(
    ("method", "before"),
    [
        (FreeLB(5.0, 2), "nothing"),
        (PGD(5.0, 2, random_start=True, norm_scope="sample"), "rescaling"),
        seldom(FreeLB(5.0, 2, norm_scope="token"), "nothing"),
    ],
    ids=["freelb", "pgd", "token"],
)
def test_a_random_start_unmasks_no_padding(method, before):
    x = RNG.normal(size=(4, 6, 3)).astype("float32")
    x[:, 3:] = 0
    inputs = h = keras.Input((6, 3))
    if before == "rescaling":
        h = layers.Rescaling(2.0)(h)
    model = keras.Model(inputs, CountSteps()(layers.Masking()(h)))
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    blogkeras.adversarial_training(model, method=method)
    assert one_step(model, x) == 3


def linear_in_tokens(kind):
    """The sum of w · E[token] over all positions, padding too.

    Padding is told in different ways, none of them a mask of the embedding.
    """
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    x, inputs = {"tokens": TOKENS}, {"tokens": tokens}
    embedded = layers.Embedding(7, 4, name="embedding")(tokens)
    dense = layers.Dense(1, use_bias=False)
    total = ops.sum(dense(embedded), axis=1)
    is_real = ops.not_equal(tokens, 0)
    if kind in ("attention_mask", "input_mask", "keep"):
        inputs[kind] = keras.Input((5,), dtype="int32", name=kind)
        x[kind] = (TOKENS != 0).astype("int32")
        nothing = ops.cast(inputs[kind][:, :1], "float32")
    elif kind == "attention":
        nothing = layers.MultiHeadAttention(1, 2)(
            embedded, embedded, attention_mask=is_real[:, None]
        )[:, 0, :1]
    elif kind == "causal attention":
        mask = ops.logical_and(
            is_real[:, None], ops.convert_to_tensor(np.tri(5, dtype=bool))
        )
        nothing = layers.MultiHeadAttention(1, 2)(
            embedded, embedded, attention_mask=mask
        )[:, 0, :1]
    elif kind == "value mask":
        nothing = layers.Attention()(
            [embedded, embedded], mask=[is_real, is_real]
        )[:, 0, :1]
    else:
        nothing = layers.GRU(1)(embedded, mask=is_real)
    model = keras.Model(inputs, total + 0 * nothing)
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    return model, x, np.linalg.norm(dense.get_weights()[0])


@slow_on_jax
@pytest.mark.parametrize(
    "kind",
    [
        "attention_mask",
        "keep",
        "causal attention",
        "gru",
        seldom("input_mask"),
        seldom("attention"),
        seldom("value mask"),
    ],
)
def test_padding_is_found(kind):
    model, x, slope = linear_in_tokens(kind)
    given = {"padding_mask": "keep"} if kind == "keep" else {}
    result = evaluate_robustness(
        model, x, np.zeros(3), (0.0, 2.0), verbose=0, **given
    )
    losses = result.column("loss")
    gain = 2 * slope * np.sqrt(REAL).mean()
    np.testing.assert_allclose(losses[1] - losses[0], gain, rtol=1e-4)
    E = model.get_layer("embedding").get_weights()[0]
    norms = np.linalg.norm(E[TOKENS[TOKENS != 0]], axis=1)
    np.testing.assert_allclose(result.mean_norm, norms.mean(), rtol=1e-5)
    # In training: ε over the batch, all of it at real positions.
    clean = one_step(model, x)
    method = FGM(2.0, site="output")
    blogkeras.adversarial_training(model, method=method, **given)
    gain = 2 * slope * np.sqrt(REAL.sum()) / 3
    np.testing.assert_allclose(one_step(model, x) - clean, gain, rtol=1e-4)


def test_each_text_has_its_own_padding_mask():
    names = ("encoder", "decoder")
    tokens, masks = (
        {
            f"{n}_{what}": keras.Input((5,), dtype="int32", name=f"{n}_{what}")
            for n in names
        }
        for what in ("token_ids", "padding_mask")
    )
    embedding = layers.Embedding(7, 4)
    dense = layers.Dense(1, use_bias=False)
    total = sum(ops.sum(dense(embedding(t)), axis=1) for t in tokens.values())
    model = keras.Model({**tokens, **masks}, total)
    model.compile("sgd", mean_output, **CHEAPLY)
    other = TOKENS[::-1].copy()
    x = {
        "encoder_token_ids": TOKENS,
        "decoder_token_ids": other,
        "encoder_padding_mask": TOKENS != 0,
        "decoder_padding_mask": other != 0,
    }
    losses = evaluate_robustness(
        model, x, np.zeros(3), (0.0, 1.0), verbose=0
    ).column("loss")
    slope = np.linalg.norm(dense.get_weights()[0])
    gain = slope * np.sqrt(REAL + REAL[::-1]).mean()
    np.testing.assert_allclose(losses[1] - losses[0], gain, rtol=1e-4)


def test_a_mask_of_one_of_two_texts_is_not_that_of_the_other():
    inputs = {
        name: keras.Input((5,), dtype="int32", name=name)
        for name in ("src_ids", "tgt_ids", "src_padding_mask")
    }
    dense, embedding = layers.Dense(1, use_bias=False), layers.Embedding(7, 4)
    texts = (inputs["src_ids"], inputs["tgt_ids"])
    total = sum(ops.sum(dense(embedding(text)), axis=1) for text in texts)
    model = keras.Model(inputs, total)
    model.compile("sgd", mean_output, **CHEAPLY)
    x = {
        "src_ids": TOKENS,
        "tgt_ids": TOKENS,
        "src_padding_mask": (TOKENS != 0).astype("int32"),
    }
    losses = evaluate_robustness(
        model, x, np.zeros(3), (0.0, 1.0), verbose=0
    ).column("loss")
    slope = np.linalg.norm(dense.get_weights()[0])
    gain = slope * np.sqrt(REAL + 5).mean()
    np.testing.assert_allclose(losses[1] - losses[0], gain, rtol=1e-4)


class OptionalMask(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(7, 4)
        self.dense = layers.Dense(1, use_bias=False)

    def call(self, x):
        h = self.dense(self.embedding(x["tokens"]))
        mask = x["padding_mask"]
        if mask is not None:
            h = h * ops.cast(mask, h.dtype)[..., None]
        return ops.sum(h, axis=1)


def test_a_mask_that_is_left_out():
    """It may be given in one batch and left out in the next."""
    model = OptionalMask()
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    x = {"tokens": TOKENS, "padding_mask": None}
    clean = one_step(model, x)
    slope = np.linalg.norm(model.dense.get_weights()[0])
    method = FGM(2.0, site="output")
    blogkeras.adversarial_training(model, method=method)
    gain = 2 * slope * np.sqrt(TOKENS.size) / 3
    np.testing.assert_allclose(one_step(model, x) - clean, gain, rtol=1e-4)
    x["padding_mask"] = (TOKENS != 0).astype("int32")
    clean = one_step(blogkeras.plain_training(model), x)
    blogkeras.adversarial_training(model, method=method)
    gain = 2 * slope * np.sqrt(REAL.sum()) / 3
    for mask in (x["padding_mask"], None, x["padding_mask"]):
        found = one_step(model, {**x, "padding_mask": mask})
    np.testing.assert_allclose(found - clean, gain, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding_mask": "nowhere"}, "padding_mask='nowhere'; inputs"),
        ({"padding_mask": 3}, "to be a name or None. Received: padding_mask=3"),
    ],
)
def test_a_padding_mask_that_is_none(arguments, message):
    model, x, _ = linear_in_tokens("keep")
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(model, x, np.zeros(3), verbose=0, **arguments)
    with pytest.raises(ValueError, match="no positions to mask"):
        blogkeras.adversarial_training(model, padding_mask="keep")


@slow_on_tensorflow
def test_keras_hub_models_tell_padding():
    """However far a text is padded: the same norm, the same losses."""
    model = toy.keras_hub_classifier()
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=TENSORFLOW)
    results = []
    for length in (5, 9):
        tokens = np.zeros((4, length), "int32")
        tokens[:, :5] = np.arange(1, 21).reshape(4, 5)
        x = {
            "token_ids": tokens,
            "segment_ids": np.zeros_like(tokens),
            "padding_mask": (tokens != 0).astype("int32"),
        }
        results.append(
            evaluate_robustness(model, x, np.arange(4) % 2, (1.0,), verbose=0)
        )
    E = model.backbone.token_embedding.get_weights()[0]
    norm = np.linalg.norm(E[1:21], axis=1).mean()
    for result in results:
        np.testing.assert_allclose(result.mean_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(*(r.column("loss") for r in results), rtol=1e-5)


# Several inputs, several outputs


def test_one_norm_per_sample_over_all_that_it_embeds():
    a, b = keras.Input((2,), dtype="int32"), keras.Input((3,), dtype="int32")
    embedding = layers.Embedding(9, 4)
    dense = layers.Dense(1, use_bias=False)
    total = [ops.sum(dense(embedding(t)), axis=1) for t in (a, b)]
    model = keras.Model([a, b], total[0] + total[1])
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    x = [RNG.integers(0, 9, (4, n)).astype("int32") for n in (2, 3)]
    y = np.zeros(4)
    clean = toy.batch_loss(model, x, y)
    slope = np.linalg.norm(dense.get_weights()[0])
    for scope, gain in [("sample", np.sqrt(5)), ("token", 5)]:
        method = FGM(2.0, scope, site="output")
        blogkeras.adversarial_training(model, method=method)
        np.testing.assert_allclose(
            toy.batch_loss(model, x, y) - clean, 2 * gain * slope, rtol=1e-4
        )


@slow_on_jax
def test_all_floating_outputs_of_a_layer_are_perturbed():
    """An LSTM that returns its outputs, of which one is its state."""
    inputs = keras.Input((3, 2))
    outputs, _, cell = layers.LSTM(4, return_state=True, name="lstm")(inputs)
    dense = layers.Dense(1, use_bias=False)
    total = dense(outputs) + 2 * dense(cell)
    model = keras.Model(inputs, total)
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    x = RNG.normal(size=(4, 3, 2)).astype("float32")
    w = np.linalg.norm(dense.get_weights()[0])
    clean = one_step(model, x)
    method = FGM(0.5, "sample", site="output")
    blogkeras.adversarial_training(model, "lstm", method=method)
    gain = 0.5 * np.sqrt(5) * w
    np.testing.assert_allclose(one_step(model, x) - clean, gain, rtol=1e-4)
    losses = evaluate_robustness(
        model, x, np.zeros(4), (0.0, 0.5), embedding_name="lstm", verbose=0
    ).column("loss")
    np.testing.assert_allclose(losses[1] - losses[0], gain, rtol=1e-4)


class TwoTables(keras.Model):
    """Tokens and positions; positions are counted off, made of anything."""

    def __init__(self, positions):
        super().__init__()
        self.tokens = layers.Embedding(7, 3, name="tokens")
        self.places = layers.Embedding(64, 3, name="places")
        self.dense = layers.Dense(1, use_bias=False)
        self.positions = positions

    def call(self, x):
        h = self.tokens(x) + self.places(self.positions(x))
        return self.dense(ops.mean(h, axis=1))


@pytest.mark.parametrize(
    "positions",
    [
        lambda x: ops.arange(ops.shape(x)[1]),
        lambda x: ops.broadcast_to(ops.arange(ops.shape(x)[1]), ops.shape(x)),
        lambda x: ops.cumsum(ops.ones_like(x), axis=1) - 1,
    ],
    ids=["arange", "broadcast", "cumsum"],
)
@pytest.mark.parametrize("length", [seldom(12), 16])
def test_positions_are_no_tokens_whatever_the_sizes(positions, length):
    model = TwoTables(positions)
    model.compile(keras.optimizers.SGD(0.0), mean_output, **CHEAPLY)
    x = np.full((16, length), 3, "int32")
    clean = one_step(model, x)
    blogkeras.adversarial_training(model, epsilon=2.0)
    # One token: its row moves by 2 along w. Positions would share the norm.
    slope = np.linalg.norm(model.dense.get_weights()[0])
    np.testing.assert_allclose(one_step(model, x) - clean, 2 * slope, rtol=1e-4)
