"""TRADES, SMART, R-Drop, perturbed weights; the maximum norm and bounds.

All recomputed in NumPy for a linear model of three features (post 7234, 8496).
"""

import itertools

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import SLOW_FILE_ON_JAX

import blogkeras
from blogkeras import (
    FGM,
    FGSM,
    PGD,
    SMART,
    TRADES,
    AdversarialWeightPerturbation,
    FreeLB,
    RDrop,
    evaluate_robustness,
)
from blogkeras.adversarial import norms
from blogkeras.adversarial.sites import InputSite

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(5)
X = RNG.uniform(size=(6, 3))
Y = np.array([0, 2, 1, 1, 0, 2], "int32")
W, B = RNG.normal(size=(3, 3)), RNG.normal(size=3)
LABELS = np.eye(3)[Y]


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def predicted(x, w=W, b=B):
    return softmax(x @ w + b)


def entropy(f):
    return -np.log(f[np.arange(len(Y)), Y]).mean()


def kl(f, g):
    return (f * np.log(f / g)).sum(-1).mean()


def slope(fn, w, size=1e-6):
    """The gradient of fn by central differences."""
    found = np.zeros_like(w)
    for index in np.ndindex(w.shape):
        moved = [w.copy(), w.copy()]
        moved[0][index] += size
        moved[1][index] -= size
        found[index] = (fn(moved[0]) - fn(moved[1])) / (2 * size)
    return found


def classifier(*before):
    model = keras.Sequential(
        [keras.Input((3,)), *before, layers.Dense(3, "softmax", name="head")]
    )
    model.get_layer("head").set_weights([W, B])
    model.compile(
        keras.optimizers.SGD(1.0),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    return model


def one_step(model, method):
    """The loss of a step, and the gradient of each weight of the head."""
    blogkeras.adversarial_training(model, method=method)
    loss = toy.batch_loss(model, X.astype("float32"), Y)
    w, b = model.get_layer("head").get_weights()
    return loss, W - w, B - b


def regression(loss="mse"):
    """x · w with one output; and w."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(1, use_bias=False)]
    )
    model.set_weights([W[:, :1]])
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    return model, W[:, 0]


@pytest.mark.parametrize(
    ("method", "apart"),
    [
        (TRADES(weight=3.0), kl),
        (SMART(weight=3.0), lambda f, g: kl(f, g) + kl(g, f)),
    ],
    ids=["TRADES", "SMART"],
)
def test_the_loss_and_its_gradient_through_both_predictions(method, apart):
    point = X + RNG.normal(size=X.shape)
    method._worst = lambda *_: [ops.convert_to_tensor(point, "float32")]

    def total(w, b=B):
        f, g = predicted(X, w, b), predicted(point, w, b)
        return entropy(f) + 3.0 * apart(f, g)

    loss, of_w, of_b = one_step(classifier(), method)
    np.testing.assert_allclose(loss, total(W), rtol=1e-5)
    np.testing.assert_allclose(of_w, slope(total, W), atol=1e-5)
    np.testing.assert_allclose(of_b, slope(lambda b: total(W, b), B), atol=1e-5)


@pytest.mark.parametrize("cls", [TRADES, SMART])
def test_of_numbers_the_worst_point_is_known(cls):
    """max (w · δ)² is ε² ‖w‖² in the Euclidean ball, ε² ‖w‖₁² in the cube."""
    y = RNG.normal(size=(6, 1))
    clean = ((X @ W[:, :1] - y) ** 2).mean()
    for scope, order, rtol in (("sample", 2, 5e-3), ("coordinate", 1, 1e-5)):
        model, w = regression()
        method = cls(0.3, 2.0, steps=3, norm_scope=scope)
        blogkeras.adversarial_training(model, method=method)
        expected = clean + 2.0 * (0.3 * np.linalg.norm(w, order)) ** 2
        np.testing.assert_allclose(
            toy.batch_loss(model, X, y), expected, rtol=rtol
        )


def worst(method):
    """The point that the method finds for each row."""
    found = {}
    inner = method._worst

    def record(*args):
        found["point"] = inner(*args)
        return found["point"]

    method._worst = record
    one_step(classifier(), method)
    return np.asarray(ops.convert_to_numpy(found["point"][0]), "float64")


def test_the_worst_point_of_the_cube_is_a_bad_corner():
    point = worst(TRADES(0.4, steps=8, norm_scope="coordinate"))
    np.testing.assert_allclose(np.abs(point - X), 0.4, atol=1e-6)

    def each(moved):
        f, g = predicted(X), predicted(moved)
        return (f * np.log(f / g)).sum(-1)

    corners = [
        each(X + np.array(c)) for c in itertools.product([-0.4, 0.4], repeat=3)
    ]
    # The ascent ends in the corner on the side of its random start: of some
    # rows the worst one, and of all of them a bad one.
    share = each(point) / np.max(corners, axis=0)
    assert share.max() == pytest.approx(1, abs=1e-4)
    assert share.mean() > 1.2 * (corners / np.max(corners, axis=0)).mean()
    inside = worst(TRADES(0.4, norm_scope="coordinate", bounds=(0.0, 1.0)))
    assert inside.min() >= 0
    assert inside.max() <= 1


def mean_output(y, y_pred):
    return ops.mean(y_pred, axis=-1)


BOUNDED = [
    FGSM(0.4, bounds=(0, 1)),
    FGM(0.4, norm_scope="coordinate", bounds=(0, 1)),
    PGD(0.4, 4, norm_scope="coordinate", bounds=(0, 1)),
    PGD(0.4, 4, random_start=True, norm_scope="coordinate", bounds=(0, 1)),
    FreeLB(0.4, 1, initial_norm=0.0, norm_scope="coordinate", bounds=(0, 1)),
]


@pytest.mark.parametrize("method", BOUNDED, ids=repr)
def test_within_a_cube_and_within_bounds(method):
    """x moves by ε sign(w), and not out of [0, 1]."""
    model, w = regression(mean_output)
    # A pixel that is outside by itself may stay there, and is no error.
    x = np.concatenate([X, [[1.5, -0.5, 0.5]]])
    moved = x + 0.4 * np.sign(w)
    low, high = np.minimum(x, 0), np.maximum(x, 1)
    expected = (np.clip(moved, low, high) @ w).mean()
    if isinstance(method, FreeLB):
        expected = (x @ w).mean()  # its only step is at the start
    blogkeras.adversarial_training(model, method=method)
    loss = toy.batch_loss(model, x, np.zeros((7, 1)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_random_start_in_the_cube_is_uniform():
    class Objective:
        @staticmethod
        def seed(_):
            return 3

    method = PGD(norm_scope="coordinate")
    x = ops.zeros((200, 5))
    site = InputSite()
    site._step.masks = [None]
    (u,) = norms.random_units(Objective, site, [x], method)
    u = ops.convert_to_numpy(u)
    assert 0.98 < np.abs(u).max() <= 1
    # The variance of a uniform number in [-1, 1] is 1/3; 1000 of them.
    assert abs((u**2).mean() - 1 / 3) < 4 * 0.3 / 1000**0.5


def test_bounds_are_those_of_an_input():
    texts = toy.compiled(toy.classifier())
    for method in (FGM(bounds=(0, 1)), TRADES(bounds=(0, 1))):
        with pytest.raises(ValueError, match="Expected no `bounds`"):
            blogkeras.adversarial_training(texts, method=method)

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(9, 2)
            self.head = layers.Dense(1)

        def call(self, tokens):
            return self.head(ops.mean(self.embedding(tokens), axis=1))

    model = Subclassed()  # what it perturbs is found in the first step
    model.compile("sgd", "mse", run_eagerly=True)
    blogkeras.adversarial_training(model, method=FGM(bounds=(0, 1)))
    with pytest.raises(ValueError, match="Expected no `bounds`"):
        model.train_on_batch(np.ones((2, 4), "int32"), np.ones((2, 1)))


@pytest.mark.parametrize("attack", ["fgm", "pgd"])
def test_evaluated_in_the_maximum_norm(attack):
    model, w = regression(mean_output)
    y, epsilons = np.zeros((6, 1)), (0.0, 0.2, 0.7)
    kwargs = {"epsilons": epsilons, "attack": attack, "verbose": 0}
    result = evaluate_robustness(model, X, y, norm="linf", **kwargs)
    expected = (X @ w).mean() + np.array(epsilons) * np.abs(w).sum()
    np.testing.assert_allclose(result.column("loss"), expected, rtol=1e-5)
    assert result.norm == "linf"

    result = evaluate_robustness(
        model, X, y, norm="linf", bounds=(0, 1), **kwargs
    )
    expected = [
        (np.clip(X + epsilon * np.sign(w), 0, 1) @ w).mean()
        for epsilon in epsilons
    ]
    np.testing.assert_allclose(result.column("loss"), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="relative=True"):
        evaluate_robustness(model, X, y, norm="linf", relative=True)


def dropped(times):
    """The inputs after dropout in each pass, from the start of its seed."""
    layer = layers.Dropout(0.5, seed=11)
    x = ops.convert_to_tensor(X, "float32")
    return [
        np.asarray(ops.convert_to_numpy(layer(x, training=True)), "float64")
        for _ in range(times)
    ]


def test_r_drop_compares_two_passes():
    first, second, third, fourth = dropped(4)
    assert np.abs(first - second).max() > 0.1

    def total(w, b=B, x=first, other=second):
        f, g = predicted(x, w, b), predicted(other, w, b)
        return (entropy(f) + entropy(g)) / 2 + 0.5 * (kl(f, g) + kl(g, f))

    model = classifier(layers.Dropout(0.5, seed=11))
    loss, of_w, of_b = one_step(model, RDrop(2.0))
    np.testing.assert_allclose(loss, total(W), rtol=1e-5)
    np.testing.assert_allclose(of_w, slope(total, W), atol=1e-5)
    np.testing.assert_allclose(of_b, slope(lambda b: total(W, b), B), atol=1e-5)
    # The next step goes on with the masks of a third and a fourth pass.
    model.get_layer("head").set_weights([W, B])
    np.testing.assert_allclose(
        toy.batch_loss(model, X.astype("float32"), Y),
        total(W, x=third, other=fourth),
        rtol=1e-5,
    )


def test_r_drop_without_a_divergence_is_plain_training():
    model = classifier(layers.Dropout(0.5, seed=11))
    loss, of_w, _ = one_step(model, RDrop(2.0, start_step=1))
    (x,) = dropped(1)
    np.testing.assert_allclose(loss, entropy(predicted(x)), rtol=1e-5)
    np.testing.assert_allclose(
        of_w, x.T @ (predicted(x) - LABELS) / 6, atol=1e-6
    )


def test_r_drop_wants_dropout_and_no_place():
    with pytest.raises(ValueError, match="Expected a model with dropout"):
        blogkeras.adversarial_training(classifier(), method="rdrop")
    model = classifier(layers.Dropout(0.5))
    with pytest.raises(ValueError, match="R-Drop perturbs no layer"):
        blogkeras.adversarial_training(model, "head", method="rdrop")


def gradient(x, w=W, b=B):
    """The loss and its gradients of w, b and x."""
    f = predicted(x, w, b)
    d = (f - LABELS) / len(Y)
    return entropy(f), x.T @ d, d.sum(0), d @ w.T


@pytest.mark.parametrize("attack", [None, FGM(0.5)], ids=["alone", "FGM"])
def test_weights_move_uphill_by_a_share_of_their_norm(attack):
    x = X
    if attack is not None:
        g = gradient(X)[3]
        x = X + 0.5 * g / np.linalg.norm(g)
    g = gradient(x)[1]
    moved = W + 0.1 * np.linalg.norm(W) * g / np.linalg.norm(g)
    expected = gradient(x, moved)
    assert expected[0] > gradient(x)[0]
    method = AdversarialWeightPerturbation(0.1, attack)
    # The biases are not moved before the gradient, only by it.
    found = one_step(classifier(), method)
    for a, b in zip(found, expected[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_biases_and_gains_of_two_axes_are_not_moved():
    x = keras.Input((3, 2))
    h = layers.LayerNormalization(axis=[1, 2])(x)
    h = layers.MultiHeadAttention(2, 2)(h, h)
    model = keras.Model(x, layers.GRU(3)(h))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    for variable in model.trainable_variables:
        variable.assign(RNG.uniform(0.5, 1, variable.shape))
        variable.trainable = "kernel" not in variable.name
    sizes = {v.name: len(v.shape) for v in model.trainable_variables}
    assert {"gamma": 2, "beta": 2, "bias": 2} == sizes
    inputs, y = RNG.normal(size=(4, 3, 2)).astype("float32"), np.ones((4, 3))
    expected = model.evaluate(inputs, y, verbose=0)
    method = AdversarialWeightPerturbation(0.5)
    blogkeras.adversarial_training(model, method=method)
    loss = toy.batch_loss(model, inputs, y)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert "but biases and gains" in blogkeras.describe_training(model)


def test_a_changed_attack_is_used_in_the_next_compiled_step():
    attack = FGM(0.0)
    method = AdversarialWeightPerturbation(0.0, attack)
    model = classifier()
    model.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        jit_compile=True,
    )
    blogkeras.adversarial_training(model, method=method)
    x = X.astype("float32")
    np.testing.assert_allclose(
        toy.batch_loss(model, x, Y), entropy(predicted(X)), rtol=1e-5
    )
    attack.epsilon = 0.5
    g = gradient(X)[3]
    moved = X + 0.5 * g / np.linalg.norm(g)
    np.testing.assert_allclose(
        toy.batch_loss(model, x, Y), entropy(predicted(moved)), rtol=1e-5
    )
    with pytest.raises(ValueError, match="The site is that of the attack"):
        method.site = "output"
    attack.site = "output"
    assert method.site == "output"


def test_the_default_strength_is_that_of_the_method():
    model = classifier()
    blogkeras.adversarial_training(model, method="awp")
    loss = toy.batch_loss(model, X.astype("float32"), Y)
    g = gradient(X)[1]
    moved = W + 0.005 * np.linalg.norm(W) * g / np.linalg.norm(g)
    np.testing.assert_allclose(loss, entropy(predicted(X, moved)), rtol=1e-5)
    with pytest.raises(ValueError, match="leave out"):
        blogkeras.adversarial_training(model, "head", method="awp")
