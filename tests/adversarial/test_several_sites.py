"""Several places perturbed at once, by hand."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import SLOW_FILE_ON_JAX

from blogkeras import (
    FGM,
    FGSM,
    PGD,
    SMART,
    TRADES,
    AdversarialWeightPerturbation,
    FreeLB,
    GradientPenalty,
    NoiseStability,
    RDrop,
    VirtualAdversarialTraining,
    adversarial_training,
    describe_training,
)

pytestmark = SLOW_FILE_ON_JAX
RNG = np.random.default_rng(3)
A = RNG.normal(size=(4, 2)).astype("float32")
B = RNG.normal(size=(4, 3)).astype("float32")
U = np.array([[3.0], [4.0]], "float32")  # of norm 5
V = np.array([[1.0], [2.0], [2.0]], "float32")  # of norm 3
Y = np.zeros((4, 1), "float32")


def output(y_true, y_pred):
    return y_pred[:, 0]


def two_inputs(loss=output, **kwargs):
    """A model f = u · a + v · b, whose loss is the mean of f."""
    inputs = [keras.Input((2,), name="a"), keras.Input((3,), name="b")]
    outputs = layers.Add()([layers.Dense(1, use_bias=False)(x) for x in inputs])
    model = keras.Model(inputs, outputs)
    kwargs.setdefault("run_eagerly", True)
    model.compile(keras.optimizers.SGD(0.0), loss, **kwargs)
    model.set_weights([U, V])
    return model


def rise(model, method, names, data=(A, B), y=Y, **kwargs):
    """How much larger the loss is than the clean one."""
    adversarial_training(model, names, method=method, **kwargs)
    x = [*data] if len(data) > 1 else data[0]
    logs = model.train_on_batch(x, y, return_dict=True)
    clean = model.evaluate(x, y, verbose=0)
    return logs["loss"] - clean


@pytest.mark.parametrize(
    ("method", "separate", "joint"),
    [
        # The gradient is u / 4 and v / 4 in each of four rows.
        (FGM(0.5), 0.5 * (5 + 3) / 2, 0.5 * 34**0.5 / 2),
        (FGM(0.5, "sample", "output"), 0.5 * (5 + 3), 0.5 * 34**0.5),
        (FGM(0.5, "token", "output"), 0.5 * (5 + 3), 0.5 * (5 + 3)),
        (FGM(0.5, clean_weight=0.5), 0.25 * (5 + 3) / 2, 0.25 * 34**0.5 / 2),
        (FGSM(0.5), 0.5 * (7 + 5), 0.5 * (7 + 5)),
        (PGD(0.5, steps=3), 0.5 * (5 + 3) / 2, 0.5 * 34**0.5 / 2),
        (
            FreeLB(0.5, steps=2, initial_norm=0, step_size=1.0),
            0.25 * (5 + 3),
            0.25 * 34**0.5,
        ),
        (GradientPenalty(0.5, form="norm"), 2.0, 0.5 * 34**0.5 / 2),
        (GradientPenalty(0.5), 0.25 * 34 / 4, 0.25 * 34 / 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_two_inputs_by_hand(method, separate, joint):
    model = two_inputs()
    np.testing.assert_allclose(
        rise(model, method, ["a", "b"]), separate, rtol=1e-4
    )
    np.testing.assert_allclose(
        rise(model, method, ["b", "a"], joint_norm=True), joint, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("method", "rtol"),
    [
        # A little of the random start is left after three steps.
        (TRADES(0.5, weight=1.0, norm_scope="sample"), 0.03),
        (SMART(0.5, steps=3, norm_scope="sample"), 0.03),
        (VirtualAdversarialTraining(0.5, norm_scope="sample"), 1e-4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_divergence_of_numbers_by_hand(method, rtol):
    # The largest (u · d + v · e)² where both or together are of norm 0.5.
    model = two_inputs("mse")
    np.testing.assert_allclose(
        rise(model, method, ["a", "b"]), (0.5 * (5 + 3)) ** 2, rtol=rtol
    )
    np.testing.assert_allclose(
        rise(model, method, ["a", "b"], joint_norm=True), 0.25 * 34, rtol=rtol
    )


@pytest.mark.verify
def test_noise_at_two_inputs():
    # ½ ε ‖∇f‖² per row, of the features that have a squared difference: √2 f.
    model = two_inputs("mse")
    one = rise(model, NoiseStability(0.5), ["a"])
    other = rise(model, NoiseStability(0.5), ["b"])
    both = rise(model, NoiseStability(0.5), ["a", "b"])
    np.testing.assert_allclose(both, one + other, rtol=1e-4)
    np.testing.assert_allclose(one / other, 25 / 9, rtol=1e-4)


@pytest.mark.verify
def test_compiled():
    model = two_inputs(run_eagerly=False, jit_compile=True)
    expected = 0.5 * 34**0.5 / 2
    found = rise(model, FGM(0.5), ["a", "b"], joint_norm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# Embeddings

TOKENS = np.array([[1, 2, 2], [3, 1, 1]], "int32")
DIRECTION = np.array([1.0, -2.0, 2.0], "float32")  # of norm 3


class Positions(layers.Layer):
    def call(self, tokens):
        return ops.broadcast_to(ops.arange(tokens.shape[1]), ops.shape(tokens))


def words_and_positions(rate=0.0, regularizer=None, extra=False):
    """The mean over rows of Σₜ d · (word + position), and of an input."""
    tokens = keras.Input((3,), dtype="int32")
    words = layers.Embedding(
        5, 3, name="words", embeddings_regularizer=regularizer
    )(tokens)
    places = layers.Embedding(
        3, 3, name="places", embeddings_regularizer=regularizer
    )(Positions()(tokens))
    h = layers.Add()([words, places])
    outputs = ops.sum(h * DIRECTION, axis=(1, 2))[:, None]
    inputs = tokens
    if extra:
        pixels = keras.Input((2,), name="pixels")
        inputs = [tokens, pixels]
        outputs = layers.Add()([outputs, ops.sum(pixels, -1, keepdims=True)])
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(rate), output, run_eagerly=True)
    return model


# The gradient at a word's row is its count / 2 times the direction (1: three
# times, 2: twice, 3: once), at a position's row the direction.
WORDS, PLACES = 3 * 14**0.5 / 2, 3 * 3**0.5


@pytest.mark.parametrize("regularizer", [None, "l2"])
def test_embeddings_of_words_and_of_positions(regularizer):
    # With a regularizer the values are the whole matrices.
    toy.reset()
    model = words_and_positions(regularizer=regularizer)
    for layer in ("words", "places"):
        weight = model.get_layer(layer).embeddings
        weight.assign(0 * weight)  # so the regularizer has no gradient
    names, y = ["words", "places"], Y[:2]
    penalty = 0.01 * 2 * 0.25 if regularizer else 0.0
    found = rise(model, FGM(0.5), names, data=(TOKENS,), y=y)
    np.testing.assert_allclose(
        found, 0.5 * (WORDS + PLACES) + penalty, rtol=1e-4
    )
    found = rise(model, FGM(0.5), names, (TOKENS,), y, joint_norm=True)
    expected = 0.5 * np.hypot(WORDS, PLACES) + penalty / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_outputs_of_two_embeddings():
    model = words_and_positions()
    method = FGM(0.5, "token", "output")
    found = rise(model, method, ["words", "places"], (TOKENS,), Y[:2])
    np.testing.assert_allclose(found, 0.5 * 3 * (3 + 3), rtol=1e-4)


def test_an_embedding_and_an_input():
    model = words_and_positions(extra=True)
    pixels = RNG.normal(size=(2, 2)).astype("float32")
    data = (TOKENS, pixels)
    for names in (["words", "pixels"], ["pixels", "words"]):
        found = rise(model, FGM(0.5), names, data, Y[:2])
        # At the input the gradient is ½ at each of four numbers.
        np.testing.assert_allclose(found, 0.5 * (WORDS + 1), rtol=1e-4)
    adversarial_training(model, ["words", "pixels"])
    line = describe_training(model)
    assert "'words', 5 x 3 and the input 'pixels'" in line


@pytest.mark.parametrize("regularizer", ["l2"])
def test_each_place_gets_its_own_gradient(regularizer):
    """FreeLB at the origin is plain training."""
    method = FreeLB(
        0.5, steps=1, initial_norm=0, norm_scope="batch", site="matrix"
    )
    results = []
    for names in (None, ["words", "places"], ["places", "words"]):
        toy.reset()
        model = words_and_positions(0.1, regularizer)
        if names:
            adversarial_training(model, names, method=method)
        model.train_on_batch(TOKENS, Y[:2])
        results.append(model.get_weights())
    for weights in results[1:]:
        for found, expected in zip(weights, results[0], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_are_perturbed_with_both():
    model = two_inputs()
    attack = FGM(0.5)
    method = AdversarialWeightPerturbation(0.1, attack=attack)
    moved = [x + 0.5 * w[:, 0] / n / 2 for x, w, n in ((A, U, 5), (B, V, 3))]
    expected = sum(
        # g is the mean row of the perturbed input.
        x.mean(0) @ w[:, 0] + 0.1 * n * np.linalg.norm(x.mean(0))
        for x, w, n in zip(moved, (U, V), (5, 3), strict=True)
    )
    adversarial_training(model, ["a", "b"], method=method)
    logs = model.train_on_batch([A, B], Y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-4)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.words = layers.Embedding(5, 3, name="words")
        self.places = layers.Embedding(3, 3, name="places")

    def call(self, tokens):
        places = self.places(ops.arange(3))
        h = (self.words(tokens) + places) * DIRECTION
        return ops.sum(h, axis=(1, 2))[:, None]


def test_found_in_the_first_step():
    model = Subclassed()
    model.compile(keras.optimizers.SGD(0.0), output, run_eagerly=True)
    found = rise(model, FGM(0.5), ["words", "places"], TOKENS[None], Y[:2])
    np.testing.assert_allclose(found, 0.5 * (WORDS + PLACES), rtol=1e-4)


# Errors


def test_names_that_do_not_fit():
    model = two_inputs()
    for names in ([], ["a", "a"], ["a", None], ["a", ""], ["a", 3]):
        with pytest.raises(ValueError, match="Received: embedding_name"):
            adversarial_training(model, names)
    with pytest.raises(ValueError, match="no such layer"):
        adversarial_training(model, ["a", "c"])
    with pytest.raises(ValueError, match="Received: padding_mask"):
        adversarial_training(model, ["a", "b"], padding_mask=["a"])
    with pytest.raises(ValueError, match="Received: padding_mask"):
        adversarial_training(model, "a", padding_mask=["a"])
    with pytest.raises(ValueError, match="Received: joint_norm"):
        adversarial_training(model, ["a", "b"], joint_norm="yes")
    with pytest.raises(ValueError, match="R-Drop perturbs no layer"):
        adversarial_training(
            model, ["a", "b"], method=RDrop(output_kind="numbers")
        )


def test_one_place_by_two_names():
    inner = words_and_positions()
    tokens = keras.Input((3,), dtype="int32")
    model = keras.Model(tokens, inner(tokens))
    model.compile("sgd", output, run_eagerly=True)
    with pytest.raises(ValueError, match="the same layer"):
        adversarial_training(model, ["words", f"{inner.name}/words"])


def test_a_norm_per_sample_needs_positions_at_all_places():
    model = words_and_positions(extra=True)
    with pytest.raises(ValueError, match='needs site="output"'):
        adversarial_training(
            model, ["words", "pixels"], method=FGM(0.5, "sample")
        )
    with pytest.raises(ValueError, match="Expected no `bounds`"):
        adversarial_training(
            model, ["words", "pixels"], method=FGM(0.5, bounds=(0, 1))
        )


def test_bounds_of_two_inputs():
    model = two_inputs()
    method = FGM(100.0, bounds=(-1.0, 2.0))
    adversarial_training(model, ["a", "b"], method=method)
    logs = model.train_on_batch([A, B], Y, return_dict=True)
    expected = sum((np.maximum(x, 2.0) @ w).mean() for x, w in ((A, U), (B, V)))
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def test_a_list_of_one_name():
    model = two_inputs()
    np.testing.assert_allclose(
        rise(model, FGM(0.5), ["b"]), 0.5 * 3 / 2, rtol=1e-4
    )
    assert describe_training(model).endswith("perturbs the input 'b'")
