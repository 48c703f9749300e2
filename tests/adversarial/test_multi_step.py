"""FGSM, PGD, FreeLB, norms and schedules, recomputed in NumPy (post 7234)."""

import keras
import numpy as np
import pytest
import toy
from adversarial_reference import LABELS, TOKENS, compiled, small_model
from keras import layers, ops
from kit import slow_on_jax

import blogkeras
from blogkeras import FGM, FGSM, PGD, FreeLB, GradientPenalty
from blogkeras.adversarial import norms
from blogkeras.adversarial.sites import Site

MASK = (TOKENS != 0)[..., None]


def reference(P, W):
    """Loss and gradients of `small_model` at the positions P, float64."""
    count = MASK.sum(1)
    h = np.tanh(P)
    mean = (h * MASK).sum(1) / count
    logits = mean @ W
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(LABELS))
    loss = -np.log(p[rows, LABELS]).mean()
    p[rows, LABELS] -= 1
    d = p / len(LABELS)
    dP = (d @ W.T / count)[:, None] * MASK * (1 - h**2)
    return loss, dP, mean.T @ d


def by_token(dP):
    """The gradient of the matrix: occurrences summed."""
    dE = np.zeros((5, 3))
    np.add.at(dE, TOKENS, dP)
    return dE


def norm(x, axis):
    return np.sqrt((x**2).sum(axis, keepdims=True))


def unit(x, axis):
    size = norm(x, axis)
    return np.where(size > 0, x / np.where(size > 0, size, 1), 0)


def start():
    model = small_model()
    E, W = (np.asarray(w, "float64") for w in model.get_weights())
    return compiled(model), E, W


def step(model, method):
    blogkeras.adversarial_training(model, method=method)
    loss = toy.batch_loss(model, TOKENS, LABELS)
    return [loss, *model.get_weights()]


def assert_step(model, method, loss, E, W):
    """One SGD step of rate 0.5 with these gradients, and this loss."""
    before = [np.asarray(w, "float64") for w in model.get_weights()]
    found = step(model, method)
    np.testing.assert_allclose(found[0], loss, atol=1e-6)
    np.testing.assert_allclose(found[1], before[0] - 0.5 * E, atol=1e-6)
    np.testing.assert_allclose(found[2], before[1] - 0.5 * W, atol=1e-6)


@pytest.mark.parametrize("site", ["matrix", "output"])
def test_fgsm(site):
    model, E, W = start()
    _, dP, _ = reference(E[TOKENS], W)
    if site == "matrix":
        moved = (E + 0.2 * np.sign(by_token(dP)))[TOKENS]
    else:
        moved = E[TOKENS] + 0.2 * np.sign(dP)
    loss, dP, dW = reference(moved, W)
    assert_step(model, FGSM(0.2, site), loss, by_token(dP), dW)


@pytest.mark.parametrize("site", ["matrix", "output"])
def test_one_norm_for_each_token(site):
    model, E, W = start()
    _, dP, _ = reference(E[TOKENS], W)
    if site == "matrix":
        moved = (E + 0.2 * unit(by_token(dP), 1))[TOKENS]
    else:
        moved = E[TOKENS] + 0.2 * unit(dP, 2)
    loss, dP, dW = reference(moved, W)
    assert_step(model, FGM(0.2, "token", site), loss, by_token(dP), dW)


def test_pgd_on_the_matrix():
    """Three steps of 0.4 in a ball of 0.5: the projection works."""
    model, E, W = start()
    delta = np.zeros_like(E)
    for _ in range(3):
        g = by_token(reference((E + delta)[TOKENS], W)[1])
        delta = delta + 0.4 * g / np.sqrt((g**2).sum())
        size = np.sqrt((delta**2).sum())
        delta *= min(1, 0.5 / size)
    assert size > 0.5
    loss, dP, dW = reference((E + delta)[TOKENS], W)
    assert_step(model, PGD(0.5, 3, 0.8), loss, by_token(dP), dW)


@pytest.mark.parametrize(("scope", "axis"), [("sample", (1, 2)), ("token", 2)])
def test_pgd_at_the_output(scope, axis):
    model, E, W = start()
    P = E[TOKENS]
    delta = np.zeros_like(P)
    for _ in range(3):
        delta = delta + 0.4 * unit(reference(P + delta, W)[1], axis)
        size = norm(delta, axis)
        delta = delta * np.minimum(1, 0.5 / np.maximum(size, 1e-30))
    assert size.max() > 0.5
    loss, dP, dW = reference(P + delta, W)
    method = PGD(0.5, 3, 0.8, norm_scope=scope, site="output")
    assert_step(model, method, loss, by_token(dP), dW)


def test_pgd_of_one_full_step_is_fgm():
    model, _, _ = start()
    weights = model.get_weights()
    one = step(model, FGM(0.5))
    model.set_weights(weights)
    other = step(model, PGD(0.5, steps=1, step_size=1.0))
    assert toy.difference(one, other) <= 1e-6


def test_random_start_stays_in_the_ball():
    """A linear model of slope w: with no step the loss moves by ≤ ε‖w‖."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(1, use_bias=False)]
    )
    model.compile(keras.optimizers.SGD(0.0), loss=lambda y, p: p[:, 0])
    w = np.array([3.0, 0.0, 4.0])[:, None]
    model.set_weights([w])
    x, y = toy.DENSE[:1], toy.TARGETS[:1]
    clean = (x @ w).item()
    method = PGD(2.0, 1, 0.0, random_start=True, norm_scope="sample")
    blogkeras.adversarial_training(model, method=method)
    moves = [toy.batch_loss(model, x, y) - clean for _ in range(40)]
    assert np.abs(moves).max() <= 2.0 * 5.0 + 1e-4
    assert min(moves) < 0 < max(moves)
    assert len(set(moves)) == 40  # every step draws anew


@pytest.mark.parametrize("steps", [1, 3])
def test_freelb_accumulates_the_gradients(steps):
    model, E, W = start()
    P = E[TOKENS]
    delta = np.zeros_like(P)
    losses, of_E, of_W = [], [], []
    for _ in range(steps):
        loss, dP, dW = reference(P + delta, W)
        losses.append(loss)
        of_E.append(by_token(dP))
        of_W.append(dW)
        delta = delta + 0.4 * unit(dP, (1, 2))
        size = norm(delta, (1, 2))
        delta *= np.minimum(1, 0.5 / size)
    method = FreeLB(0.5, steps, step_size=0.8, initial_norm=0.0)
    assert_step(
        model, method, np.mean(losses), np.mean(of_E, 0), np.mean(of_W, 0)
    )


def test_freelb_on_the_matrix():
    model, E, W = start()
    loss, dP, dW = reference(E[TOKENS], W)
    g = by_token(dP)
    moved = E + 0.4 * g / np.sqrt((g**2).sum())
    loss_2, dP_2, dW_2 = reference(moved[TOKENS], W)
    method = FreeLB(
        0.5, 2, 0.8, initial_norm=0.0, norm_scope="batch", site="matrix"
    )
    assert_step(
        model,
        method,
        (loss + loss_2) / 2,
        (g + by_token(dP_2)) / 2,
        (dW + dW_2) / 2,
    )


def test_freelb_on_a_frozen_matrix():
    model = toy.classifier(regularizer=None, dropout=0.0)
    embedding = model.get_layer("embedding")
    embedding.trainable = False
    toy.compiled(model, run_eagerly=True)
    before = embedding.get_weights()[0]
    method = FreeLB(0.5, 2, initial_norm=0.0, norm_scope="batch", site="matrix")
    blogkeras.adversarial_training(model, method=method)
    rows = toy.TOKENS[:32], toy.LABELS[:32]
    assert np.isfinite(model.train_on_batch(*rows)).all()
    np.testing.assert_array_equal(embedding.get_weights()[0], before)


def test_schedule_and_start_step():
    """Strength 0 for two updates, then 0.5: plain, plain, FGM."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1], [0.0, 0.5]
    )

    def losses(method):
        model, _E, _W = start()
        model.set_weights([np.arange(15).reshape(5, 3) / 10, np.eye(3)[:, :2]])
        return [step(model, method(i))[0] for i in range(3)]

    expected = losses(lambda i: FGM(0.0 if i < 2 else 0.5))
    np.testing.assert_allclose(
        losses(lambda i: FGM(schedule)), expected, atol=1e-6
    )
    np.testing.assert_allclose(
        losses(lambda i: FGM(0.5, start_step=2)), expected, atol=1e-6
    )
    assert abs(losses(lambda i: FGM(0.0))[2] - expected[2]) > 1e-3


ALL = sorted(blogkeras.adversarial.METHODS)
# FGM and the penalty stand in test_adversarial, FreeLB climbs as PGD does,
# SMART and TRADES as VAT and it do.
SELDOM = ("fgm", "fgsm", "gradient_penalty", "pgd", "smart", "trades")


@slow_on_jax
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.verify) if name in SELDOM else name
        for name in ALL
    ],
)
def test_every_method_in_half_precision_under_jit(name):
    keras.config.set_dtype_policy("mixed_float16")
    model = toy.compiled(toy.classifier(), jit_compile=True)
    blogkeras.adversarial_training(model, epsilon=0.3, method=name)
    loss = model.fit(
        toy.TOKENS, toy.LABELS, batch_size=16, epochs=2, verbose=0
    ).history["loss"]
    assert np.isfinite(loss).all()
    assert all(np.isfinite(s).all() for s in toy.state(model))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_at_any_moment(name, call):
    """The embedding is called several times a step: stop at each call."""
    model = toy.compiled(toy.classifier(), run_eagerly=True)
    embedding = model.get_layer("embedding")
    blogkeras.adversarial_training(model, epsilon=0.3, method=name)
    before = toy.weights(model)
    calls, original = [], type(embedding).call

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) >= call:
            raise KeyboardInterrupt
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(embedding), "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    assert "call" not in vars(embedding)
    assert toy.difference(before, toy.weights(model)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(steps=0), "steps.*at least 1. Received: steps=0"),
        (lambda: PGD(steps=1.5), "steps=1.5"),
        (lambda: PGD(step_size=-1), "step_size=-1"),
        (lambda: FGM(start_step=-1), "start_step=-1"),
        (lambda: FreeLB(initial_norm=2), "initial_norm=2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PGD(random_start=True), "random_start=True"),
        (FreeLB(site="matrix", norm_scope="batch"), "initial_norm=0.5"),
        (FreeLB(clean_weight=0.5), "no clean pass"),
        (FreeLB(site="matrix", initial_norm=0), 'needs site="output"'),
    ],
)
def test_methods_that_do_not_fit_the_site(method, message):
    with pytest.raises(ValueError, match=message):
        blogkeras.adversarial_training(toy.classifier(), method=method)


@pytest.mark.parametrize("scope", ["batch", "sample", "token"])
def test_tiny_gradients_have_a_direction(scope):
    """Their squares are zero in float32, those of huge ones infinite."""
    axis = {"batch": None, "sample": (1, 2), "token": -1}[scope]
    g = np.random.default_rng(0).normal(size=(3, 4, 2)).astype("float32")
    expected = unit(g, axis)
    for size in (1.0, 1e-27, 1e27):
        tensors = [ops.convert_to_tensor(g * np.float32(size))]
        [found] = norms.units(tensors, scope, Site())
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for bad in (0.0, np.nan, np.inf, -np.inf):
        [found] = norms.units([ops.full((3, 4, 2), bad)], scope, Site())
        np.testing.assert_array_equal(found, np.zeros((3, 4, 2)))


@slow_on_jax
@pytest.mark.parametrize("scope", ["batch", "token"])
def test_tiny_gradients_of_looked_up_rows_and_of_the_matrix(scope):
    """A model that is sure of its labels, with gradients below 1e-22."""
    found = []
    for regularizer in (None, keras.regularizers.L2(0.0)):
        tokens = keras.Input((4,), dtype="int32")
        h = layers.Embedding(9, 3, embeddings_regularizer=regularizer)(tokens)
        model = keras.Model(tokens, layers.Dense(1, use_bias=False)(h))
        model.compile(keras.optimizers.SGD(0.0), tiny, run_eagerly=True)
        rng = np.random.default_rng(0)
        model.set_weights(
            [rng.normal(size=(9, 3)), np.array([[1.0], [2.0], [2.0]])]
        )
        blogkeras.adversarial_training(model, method=FGM(1.0, scope))
        loss = toy.batch_loss(model, TOKENS, LABELS)
        blogkeras.plain_training(model)
        found.append(loss - toy.batch_loss(model, TOKENS, LABELS))
    assert found[0] > 1e-25
    np.testing.assert_allclose(*found, rtol=1e-4)


def tiny(y, y_pred):
    return 1e-25 * ops.mean(y_pred, axis=(1, 2))


@slow_on_jax
def test_strings_are_shorthands():
    for name, cls in blogkeras.adversarial.METHODS.items():
        if name == "rdrop":  # wants dropout: test_smoothness.py
            continue
        model = compiled(small_model())
        blogkeras.adversarial_training(model, epsilon=0.1, method=name)
        weights = model.get_weights()
        by_name = step_loss(model)
        model.set_weights(weights)
        model.optimizer.iterations.assign(0)
        blogkeras.adversarial_training(model, method=cls(0.1))
        np.testing.assert_allclose(step_loss(model), by_name, rtol=1e-6)
    assert isinstance(blogkeras.adversarial.METHODS["fgm"](), FGM)
    assert GradientPenalty().epsilon == 1


def step_loss(model):
    return toy.batch_loss(model, TOKENS, LABELS)
