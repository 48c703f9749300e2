"""Virtual adversarial training and the stability penalty, in closed form.

Post 7466.
"""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import slow_on_jax

import blogkeras
from blogkeras import (
    NoiseStability,
    VirtualAdversarialTraining,
    backend,
    training,
)

RNG = np.random.default_rng(3)
W = np.array([[1.5, -1.0, 0.3], [0.2, 0.9, -0.7], [-0.4, 0.1, 0.6]])
X = RNG.normal(size=(6, 3))
Y = np.array([0, 1, 2, 0, 1, 2])


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def cross_entropy(x):
    return -np.log(softmax(x @ W)[np.arange(len(x)), Y[: len(x)]]).mean()


def divergence(x, moved):
    p, q = softmax(x @ W), softmax(moved @ W)
    return (p * np.log(p / q)).sum(-1).mean()


def linear(
    activation="softmax", reduction="sum_over_batch_size", rate=0.0, jit=False
):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, use_bias=False, activation=activation),
        ]
    )
    model.compile(
        keras.optimizers.SGD(rate),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=activation is None, reduction=reduction
        ),
        jit_compile=jit,
        run_eagerly=not jit,
    )
    model.set_weights([W])
    return model


W1 = RNG.normal(size=(3, 4))
W2 = RNG.normal(size=(4, 3))
ROWS = RNG.normal(size=(64, 3))


def net():
    """3 → tanh 4 → softmax 3."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, "tanh", use_bias=False),
            layers.Dense(3, "softmax", use_bias=False),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.set_weights([W1, W2])
    return model


def hessian(x):
    """∇² KL(f(x) ‖ f(x + d)) at d = 0: J (diag f − f fᵀ) Jᵀ, J = ∂z/∂x."""
    h = np.tanh(x @ W1)
    f = softmax(h @ W2)
    J = W1 @ np.diag(1 - h**2) @ W2
    return J @ (np.diag(f) - np.outer(f, f)) @ J.T


def cosines(iters, gap=0.3):
    """|d · top eigenvector| where the second curvature is less than `gap`."""
    method = VirtualAdversarialTraining(
        xi=0.01, iters=iters, norm_scope="sample"
    )
    found = []
    for x, d in zip(ROWS, directions(net(), method, ROWS), strict=True):
        np.testing.assert_allclose(np.linalg.norm(d), 1, atol=1e-5)
        values, vectors = np.linalg.eigh(hessian(x))
        if values[-2] < gap * values[-1]:
            found.append(abs(d @ vectors[:, -1]))
    assert len(found) >= 16
    return np.array(found)


def directions(model, method, x):
    """The directions that the method finds for each row."""
    found = {}

    def hook(objective, weights):
        site = blogkeras.adversarial.sites.InputSite()
        origin = site.origin(objective, weights)
        _, clean = objective(weights)
        target = method._target(objective, clean, site)
        (d,) = method.direction(objective, weights, site, origin, target)
        found["d"] = ops.convert_to_numpy(d)
        return objective.value_and_grad(objective, weights)

    model.compile(keras.optimizers.SGD(0.0), model.loss, run_eagerly=True)
    training.install(model, hook)
    model.train_on_batch(x, np.resize(Y, len(x)))
    return found["d"].astype("float64")


@slow_on_jax
def test_direction_is_the_top_eigenvector_of_the_hessian():
    """Three iterations find it where it stands out, ten for the rest, too."""
    assert np.median(cosines(1)) >= 0.8
    assert cosines(3, gap=0.1).min() >= 0.99
    assert cosines(10).min() >= 0.99


@slow_on_jax
def test_worst_direction_beats_random_ones():
    method = VirtualAdversarialTraining(xi=0.01, iters=3, norm_scope="sample")
    d = directions(linear(), method, X)
    worst = divergence(X, X + 0.5 * d)
    noise = RNG.normal(size=(200, *X.shape))
    noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
    random = np.mean([divergence(X, X + 0.5 * n) for n in noise])
    assert worst > 1.5 * random


@pytest.mark.parametrize("activation", ["softmax", None])
def test_loss_is_cross_entropy_plus_divergence(activation):
    """Along ± the direction found; logits are told from the loss."""
    model = linear(activation)
    method = VirtualAdversarialTraining(0.5, 0.01, 3, norm_scope="sample")
    d = directions(model, method, X)
    blogkeras.adversarial_training(model, method=method)
    model.optimizer.iterations.assign(0)  # the same noise
    loss = toy.batch_loss(model, X, Y)
    np.testing.assert_allclose(
        loss, cross_entropy(X) + divergence(X, X + 0.5 * d), rtol=1e-3
    )


def test_the_clean_prediction_is_a_constant():
    """∇KL(p ‖ q) is that of q alone: Xᵀ(q − p) of the moved rows."""
    d = RNG.normal(size=X.shape)

    class Along(VirtualAdversarialTraining):
        def direction(self, *args):
            return [ops.convert_to_tensor(d, "float32")]

    model = linear(rate=1.0)
    blogkeras.adversarial_training(model, method=Along(0.5))
    model.train_on_batch(X, Y)
    moved = X + 0.5 * d
    p, q = softmax(X @ W), softmax(moved @ W)
    gradient = X.T @ (p - np.eye(3)[Y]) + moved.T @ (q - p)
    (weights,) = model.get_weights()
    np.testing.assert_allclose(W - weights, gradient / len(X), atol=1e-6)


def test_zero_iterations_are_noise():
    model = linear()
    losses = set()
    for iters in (0, 1):
        blogkeras.virtual_adversarial_training(model, iters=iters)
        losses.add(toy.batch_loss(model, X, Y))
    assert len(losses) == 2
    assert min(losses) > cross_entropy(X)


@pytest.mark.parametrize(
    ("reduction", "share"),
    [("sum_over_batch_size", 1 / 3), ("mean_with_sample_weight", 1.0)],
)
def test_unlabelled_rows(reduction, share):
    """Weight 0: the label is of no consequence, the divergence is."""
    weight = np.array([1.0, 0, 0, 1, 0, 0])
    results = []
    for labels in (Y, np.where(weight, Y, (Y + 1) % 3)):
        model = linear(reduction=reduction, rate=0.1)
        blogkeras.virtual_adversarial_training(model, epsilon=0.5)
        loss = toy.batch_loss(model, X, labels, sample_weight=weight)
        results.append([np.array(loss), *model.get_weights()])
    assert toy.difference(*results) == 0
    # With labelled rows alone in the supervised part, at ε = 0.
    model = linear(reduction=reduction)
    blogkeras.virtual_adversarial_training(model, epsilon=0.0)
    loss = toy.batch_loss(model, X, Y, sample_weight=weight)
    labelled = -np.log(softmax(X @ W)[[0, 3], Y[[0, 3]]]).mean()
    np.testing.assert_allclose(loss, share * labelled, rtol=1e-5)


@slow_on_jax
@pytest.mark.parametrize("method", ["vat", "trades", "smart"])
def test_unlabelled_rows_of_a_class_that_the_loss_ignores(method):
    weight = np.array([1.0, 0, 0, 1, 0, 0])
    losses = []
    for labels, ignored in ((Y, None), (np.where(weight, Y, -1), -1)):
        model = linear(None)
        model.compile(
            keras.optimizers.SGD(0.0),
            keras.losses.SparseCategoricalCrossentropy(
                from_logits=True,
                ignore_class=ignored,
                reduction="mean_with_sample_weight",
            ),
            jit_compile=True,
        )
        blogkeras.adversarial_training(model, epsilon=0.0, method=method)
        losses.append(toy.batch_loss(model, X, labels, sample_weight=weight))
    labelled = -np.log(softmax(X @ W)[[0, 3], Y[[0, 3]]]).mean()
    np.testing.assert_allclose(losses, labelled, rtol=1e-5)


def test_strength_zero_trains_plainly():
    expected, ours = (
        toy.compiled(toy.classifier(), run_eagerly=True) for _ in range(2)
    )
    ours.set_weights(expected.get_weights())
    blogkeras.virtual_adversarial_training(ours, epsilon=0.0)
    for model in (expected, ours):
        model.fit(toy.TOKENS, toy.LABELS, shuffle=False, verbose=0)
    assert toy.difference(toy.weights(expected), toy.weights(ours)) <= 1e-6


class Last(layers.Layer):
    """The last position, padding or not."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def compute_mask(self, x, mask=None):
        return None

    def call(self, x):
        return x[:, -1]


@slow_on_jax
def test_padding_takes_no_noise():
    """Masked positions: the divergence is that of the rest."""
    tokens = keras.Input((4,), dtype="int32")
    h = layers.Embedding(5, 3, mask_zero=True, name="embedding")(tokens)
    h = Last()(h)
    model = keras.Model(
        tokens, layers.Dense(2, activation="softmax", use_bias=False)(h)
    )
    model.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    padded = np.array([[1, 2, 3, 0]])
    losses = []
    for epsilon in (0.0, 5.0):
        blogkeras.virtual_adversarial_training(model, epsilon=epsilon, iters=0)
        losses.append(toy.batch_loss(model, padded, np.array([1])))
    assert losses[0] == losses[1]


def stability(x):
    """Σᵢ fᵢ ‖∇ log fᵢ‖² with ∇ log fᵢ = W (eᵢ − f)."""
    f = softmax(x @ W)
    slopes = W @ (np.eye(3) - f[:, None])
    return (f * (slopes**2).sum(0)).sum()


@pytest.mark.parametrize("activation", ["softmax", None])
def test_stability_estimator_is_unbiased(activation):
    model = linear(activation, jit=True)
    blogkeras.adversarial_training(model, method=NoiseStability(1.0))
    x, y = np.tile(X, (50, 1)), np.tile(Y, 50)
    draws = np.array([toy.batch_loss(model, x, y) for _ in range(60)])
    estimates = 2 * (draws - cross_entropy(X))
    expected = np.mean([stability(x) for x in X])
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert error < 0.02 * expected
    assert abs(estimates.mean() - expected) < 3 * error


def test_stability_is_the_divergence_under_noise():
    """mean KL(f(x) ‖ f(x + σ n)) ≈ ½ σ² stability, by sampling."""
    sigma = 0.05
    noise = sigma * RNG.normal(size=(20_000, 1, 3))
    sampled = np.mean([divergence(X, X + n) for n in noise])
    expected = 0.5 * sigma**2 * np.mean([stability(x) for x in X])
    np.testing.assert_allclose(sampled, expected, rtol=0.05)


@slow_on_jax
def test_gradient_of_the_stability_penalty():
    """Central differences of the mean over draws with the same signs."""
    found = {}
    method = NoiseStability(1.0)
    model = linear()
    model.compile(keras.optimizers.SGD(0.0), model.loss, run_eagerly=True)
    direction = RNG.normal(size=W.shape).astype("float32")

    def hook(objective, weights):
        site = blogkeras.adversarial.sites.InputSite()
        evaluation, (g,) = method.gradients(objective, weights, site)

        def value(h):
            moved = [weights[0] + h * direction]
            return float(method.gradients(objective, moved, site)[0].loss)

        h = 1e-2
        found["numeric"] = (value(h) - value(-h)) / (2 * h)
        found["exact"] = float(ops.sum(backend.dense(g) * direction))
        return evaluation, [g]

    training.install(model, hook)
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(found["exact"], found["numeric"], rtol=2e-3)


@slow_on_jax
def test_one_sigmoid_unit():
    """A single unit is the second of two classes: the same divergence."""
    w = np.array([1.0, -0.5, 0.3])

    def loss(units, activation):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(units, use_bias=False, activation=activation),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.0),
            "sparse_categorical_crossentropy"
            if units == 2
            else "binary_crossentropy",
            run_eagerly=True,
        )
        columns = [0 * w, w] if units == 2 else [w]
        model.set_weights([np.stack(columns, axis=1)])
        method = VirtualAdversarialTraining(0.5, 0.1, norm_scope="sample")
        blogkeras.adversarial_training(model, method=method)
        y = (Y > 0).astype("float32")
        y = y if units == 2 else y[:, None]
        return toy.batch_loss(model, X, y)

    np.testing.assert_allclose(
        loss(1, "sigmoid"), loss(2, "softmax"), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VirtualAdversarialTraining(xi=0), "xi=0"),
        (lambda: VirtualAdversarialTraining(iters=-1), "iters=-1"),
        (lambda: VirtualAdversarialTraining(norm_scope="x"), "norm_scope='x'"),
        (lambda: NoiseStability(-1.0), "epsilon=-1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
