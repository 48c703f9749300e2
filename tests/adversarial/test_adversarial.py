"""FGM and gradient penalty against independent recomputations (post 7234)."""

import keras
import numpy as np
import pytest
import toy
from adversarial_reference import (
    LABELS,
    TOKENS,
    Reference,
    compiled,
    loss_of_one_step,
    small_model,
)
from keras import layers, ops
from kit import TENSORFLOW, replica_run, slow_on_jax

import blogkeras
from blogkeras import FGM, GradientPenalty, backend, training
from blogkeras.adversarial import finding, norms, sites
from blogkeras.adversarial.base import AdversarialMethod

RNG = np.random.default_rng(1)


@slow_on_jax
@pytest.mark.parametrize("trainable", [True, False])
def test_fgm_follows_the_recomputed_trajectory(trainable):
    model = small_model()
    embedding = model.get_layer("embedding")
    embedding.trainable = trainable
    blogkeras.adversarial_training(compiled(model, jit=True), epsilon=0.7)
    reference = Reference(model)
    for _ in range(20):
        before = reference.E
        expected = reference.fgm_step(epsilon=0.7, rate=0.5)
        if not trainable:
            reference.E = before
        loss = toy.batch_loss(model, TOKENS, LABELS)
        np.testing.assert_allclose(loss, expected, atol=1e-6)
    E, W = model.get_weights()
    np.testing.assert_allclose(E, reference.E, atol=1e-6)
    np.testing.assert_allclose(W, reference.W, atol=1e-6)


@slow_on_jax
@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_fgm_at_the_output_moves_positions(scope):
    model = small_model()
    reference = Reference(model)
    _, g, _ = reference.gradients(reference.E, reference.W, True)
    axis = None if scope == "batch" else (1, 2)
    delta = 0.7 * g / np.sqrt((g**2).sum(axis, keepdims=True))
    # One row of a table for each position turns positions into tokens.
    table = (reference.E[TOKENS] + delta).reshape(-1, 3)
    mask = (TOKENS != 0)[..., None]
    h = (np.tanh(table.reshape(3, 4, 3)) * mask).sum(1) / mask.sum(1)
    logits = h @ reference.W
    expected = np.mean(
        np.log(np.exp(logits).sum(1)) - logits[np.arange(3), LABELS]
    )
    method = FGM(0.7, norm_scope=scope, site="output")
    np.testing.assert_allclose(
        loss_of_one_step(model, method), expected, atol=1e-6
    )


def test_clean_weight_mixes_losses_and_gradients():
    def step(method):
        keras.utils.set_random_seed(0)
        model = small_model()
        model.set_weights([np.ones((5, 3)) * [[1], [2], [0], [3], [1]], w])
        compiled(model)
        if method:
            blogkeras.adversarial_training(model, method=method)
        loss = toy.batch_loss(model, TOKENS, LABELS)
        return [np.array(loss), *model.get_weights()]

    w = RNG.normal(size=(3, 2))
    clean, adversarial = step(None), step(FGM(0.5))
    mixed = step(FGM(0.5, clean_weight=0.25))
    for c, a, m in zip(clean, adversarial, mixed, strict=True):
        np.testing.assert_allclose(m, 0.25 * c + 0.75 * a, atol=1e-6)
        assert np.abs(c - a).max() > 1e-3


@slow_on_jax
@pytest.mark.parametrize("site", ["output", "matrix"])
@pytest.mark.parametrize("form", ["squared", "norm"])
def test_penalty_is_the_norm_of_the_gradient(site, form):
    model = small_model()
    reference = Reference(model)
    loss, g, _ = reference.gradients(
        reference.E, reference.W, per_occurrence=site == "output"
    )
    squared = (g**2).sum()
    penalty = 0.3 * (squared / 2 if form == "squared" else np.sqrt(squared))
    np.testing.assert_allclose(
        loss_of_one_step(model, GradientPenalty(0.3, form, site), jit=True),
        loss + penalty,
        atol=1e-6,
    )


def transformer(dtype, head="softmax"):
    """Attention and both normalizations: all that second order may upset."""
    tokens = keras.Input((4,), dtype="int32")
    h = layers.Embedding(5, 8, mask_zero=True, dtype=dtype)(tokens)
    a = layers.MultiHeadAttention(2, 4, dtype=dtype)(h, h)
    h = layers.LayerNormalization(dtype=dtype)(layers.Add(dtype=dtype)([h, a]))
    h = layers.Dense(8, "gelu", dtype=dtype)(h)
    h = layers.GlobalAveragePooling1D(dtype=dtype)(h)
    h = layers.BatchNormalization(dtype=dtype)(h)
    outputs = layers.Dense(2, activation=head, dtype=dtype)(h)
    return keras.Model(tokens, outputs)


@pytest.mark.skipif(not TENSORFLOW, reason="Keras on JAX does not keep float64")
@pytest.mark.parametrize(
    ("site", "form", "head"),
    [
        ("output", "squared", "softmax"),
        ("matrix", "squared", None),
        ("output", "norm", None),
    ],
)
def test_gradient_of_the_penalty_by_finite_differences(site, form, head):
    """The directional derivative of L + penalty, in float64."""
    keras.backend.set_floatx("float64")
    try:
        model = transformer("float64", head)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=head is None, dtype="float64"
        )
        model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
        found = {}
        method = GradientPenalty(2.0, form, site)
        place = finding.find_site(model, None, site)

        def hook(objective, weights):
            evaluation, gradients = method.gradients(objective, weights, place)
            directions = [RNG.normal(size=w.shape) for w in weights]

            def value(h):
                moved = [
                    w + h * d for w, d in zip(weights, directions, strict=True)
                ]
                at, _ = method.gradients(objective, moved, place)
                return float(at.loss)

            h = 1e-6
            found["numeric"] = (value(h) - value(-h)) / (2 * h)
            found["exact"] = sum(
                float(ops.sum(backend.dense(g) * d))
                for g, d in zip(gradients, directions, strict=True)
            )
            return evaluation, gradients

        training.install(model, hook)
        model.train_on_batch(TOKENS, LABELS)
    finally:
        keras.backend.set_floatx("float32")
    np.testing.assert_allclose(found["exact"], found["numeric"], rtol=1e-5)


@slow_on_jax
@pytest.mark.parametrize("form", ["squared", "norm"])
def test_penalty_is_finite_where_the_gradient_is_zero(form):
    model = small_model()
    model.set_weights([np.ones((5, 3)), np.zeros((3, 2))])
    blogkeras.adversarial_training(
        compiled(model), method=GradientPenalty(1.0, form)
    )
    loss = toy.batch_loss(model, TOKENS, LABELS)
    np.testing.assert_allclose(loss, np.log(2), atol=1e-6)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_fgm_is_plain_where_the_gradient_is_zero():
    model = small_model()
    model.set_weights([np.ones((5, 3)), np.zeros((3, 2))])
    np.testing.assert_allclose(
        loss_of_one_step(model, FGM(1.0)), np.log(2), atol=1e-6
    )


@slow_on_jax
@pytest.mark.parametrize(
    "method",
    [FGM(0.0), FGM(0.0, site="output"), GradientPenalty(0.0)],
    ids=repr,
)
def test_strength_zero_is_plain_fit(method):
    def run(method):
        toy.reset()
        model = toy.compiled(toy.classifier(regularizer=None), run_eagerly=True)
        if method:
            blogkeras.adversarial_training(model, method=method)
        model.fit(toy.TOKENS, toy.LABELS, verbose=0, shuffle=False)
        # The parts of the loss are one metric more.
        return blogkeras.plain_training(model)

    plain, ours = run(None), run(method)
    # A penalty is a second path to the weights: it rounds in another way.
    # The sums of metrics are large, so the measure is relative to each number.
    toy.assert_near(toy.state(ours), toy.state(plain))


def test_learning_rate_zero_leaves_the_embedding_as_it_is():
    model = toy.compiled(
        toy.classifier(), keras.optimizers.SGD(0.0), jit_compile=True
    )
    embedding = model.get_layer("embedding")
    before = embedding.get_weights()[0]
    blogkeras.adversarial_training(model, epsilon=1.0)
    x, y = np.tile(toy.TOKENS, (16, 1)), np.tile(toy.LABELS, 16)
    model.fit(x, y, batch_size=1, epochs=1, verbose=0)  # 1024 steps
    assert int(model.optimizer.iterations) == 1024
    np.testing.assert_array_equal(embedding.get_weights()[0], before)


def test_frozen_embedding_is_attacked_but_not_changed():
    model = toy.classifier(regularizer=None, dropout=0.0)
    embedding = model.get_layer("embedding")
    embedding.trainable = False
    toy.compiled(model, keras.optimizers.SGD(0.0), run_eagerly=True)
    before = embedding.get_weights()[0]
    rows = toy.TOKENS[:32], toy.LABELS[:32]
    clean = model.train_on_batch(*rows)[0]
    blogkeras.adversarial_training(model, epsilon=0.5)
    model.reset_metrics()
    assert model.train_on_batch(*rows)[0] > clean + 1e-3
    np.testing.assert_array_equal(embedding.get_weights()[0], before)


def test_low_rank_adapters():
    """With LoRA the base matrix is frozen and still the thing to move."""
    model = toy.classifier(regularizer=None, dropout=0.0)
    embedding = model.get_layer("embedding")
    embedding.enable_lora(2)
    toy.compiled(model, keras.optimizers.SGD(0.0), run_eagerly=True)
    rows = toy.TOKENS[:32], toy.LABELS[:32]
    clean = model.train_on_batch(*rows)[0]
    before = toy.weights(model)
    for site in ("matrix", "output"):
        model.reset_metrics()
        blogkeras.adversarial_training(model, method=FGM(0.5, site=site))
        assert model.train_on_batch(*rows)[0] > clean + 1e-3
    normalization = 4  # BatchNormalization's moving statistics change
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(before, toy.weights(model), strict=True)
    ]
    assert sum(changed) <= normalization


class Tied(keras.Model):
    """A language model whose softmax is the embedding, transposed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.ReversibleEmbedding(5, 3, name="embedding")

    def call(self, tokens):
        return self.embedding(ops.tanh(self.embedding(tokens)), reverse=True)


@pytest.mark.parametrize("site", ["matrix", "output"])
def test_tied_softmax(site):
    """`matrix` moves the softmax with the embedding, `output` does not."""
    model = Tied()
    model(TOKENS)
    E = RNG.normal(size=(5, 3))
    model.set_weights([E])
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    targets = np.roll(TOKENS, -1, axis=1)

    def loss_and_gradients(lookup, table):
        h = np.tanh(lookup)
        logits = h @ table.T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        one_hot = np.eye(5)[targets]
        loss = -np.log((p * one_hot).sum(-1)).mean()
        d = (p - one_hot) / targets.size
        return loss, (d @ table) * (1 - h**2), np.einsum("blv,bld->vd", d, h)

    _, g, g_table = loss_and_gradients(E[TOKENS], E)
    if site == "output":
        moved = E[TOKENS] + 0.5 * g / np.sqrt((g**2).sum())
        expected, _, _ = loss_and_gradients(moved, E)
    else:
        np.add.at(g_table, TOKENS, g)
        moved = E + 0.5 * g_table / np.sqrt((g_table**2).sum())
        expected, _, _ = loss_and_gradients(moved[TOKENS], moved)
    blogkeras.adversarial_training(model, method=FGM(0.5, site=site))
    loss = toy.batch_loss(model, TOKENS, targets)
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_float_inputs_are_perturbed_where_they_enter():
    """A linear model: the loss rises by ε‖w‖ exactly."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(1, use_bias=False)]
    )
    model.compile(keras.optimizers.SGD(0.0), loss=lambda y, p: p[:, 0])
    w = np.array([3.0, 0.0, 4.0])[:, None]
    model.set_weights([w])
    clean = (toy.DENSE @ w).mean()
    blogkeras.adversarial_training(model, method=FGM(2.0, "sample"))
    loss = toy.batch_loss(model, toy.DENSE, toy.TARGETS)
    np.testing.assert_allclose(loss, clean + 2.0 * 5.0, rtol=1e-5)
    # One norm over the batch: the mean gains ε‖w‖ / √batch.
    blogkeras.adversarial_training(model, epsilon=2.0)
    loss = toy.batch_loss(model, toy.DENSE, toy.TARGETS)
    gain = 2.0 * 5.0 / np.sqrt(toy.ROWS)
    np.testing.assert_allclose(loss, clean + gain, rtol=1e-5)


def test_siamese_calls_are_perturbed_separately():
    """One layer looked up twice: two perturbations."""
    a, b = (keras.Input((4,), dtype="int32") for _ in range(2))
    embedding = layers.Embedding(5, 3, name="embedding")
    pool = layers.GlobalAveragePooling1D()
    product = layers.Dot(1)([pool(embedding(a)), pool(embedding(b))])
    model = keras.Model([a, b], product)
    model.compile(keras.optimizers.SGD(0.0), loss=lambda y, p: p[:, 0])
    E = RNG.normal(size=(5, 3))
    model.set_weights([E])
    x = [TOKENS, TOKENS[::-1].copy()]
    u, v = (E[t].mean(1) for t in x)
    # d(u·v)/dA = v / 4 at each of 4 positions, and likewise u for the other.
    du = np.repeat(v[:, None] / 4 / 3, 4, 1)
    dv = np.repeat(u[:, None] / 4 / 3, 4, 1)
    norm = np.sqrt((du**2).sum() + (dv**2).sum())
    u, v = u + 0.5 * du.mean(1) / norm, v + 0.5 * dv.mean(1) / norm
    blogkeras.adversarial_training(model, method=FGM(0.5, site="output"))
    loss = toy.batch_loss(model, x, LABELS)
    np.testing.assert_allclose(loss, (u * v).sum(1).mean(), rtol=1e-5)


HALF = {
    "fgm": FGM(0.5),
    "fgm-output": FGM(0.5, "sample", "output", 0.3),
    "penalty": GradientPenalty(1.0),
}


@slow_on_jax
@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("mixed_float16", "fgm-output"),
        ("mixed_float16", "penalty"),
        pytest.param("mixed_float16", "fgm", marks=pytest.mark.verify),
        pytest.param("mixed_bfloat16", "fgm", marks=pytest.mark.verify),
        pytest.param("mixed_bfloat16", "fgm-output", marks=pytest.mark.verify),
        pytest.param("mixed_bfloat16", "penalty", marks=pytest.mark.verify),
    ],
)
def test_half_precision_with_jit_and_accumulation_stays_finite(policy, name):
    keras.config.set_dtype_policy(policy)
    model = toy.compiled(
        toy.classifier(),
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
        jit_compile=True,
    )
    blogkeras.adversarial_training(model, method=HALF[name])
    history = model.fit(
        toy.TOKENS, toy.LABELS, batch_size=16, epochs=10, verbose=0
    ).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.isfinite(s).all() for s in toy.state(model))


@slow_on_jax
@pytest.mark.parametrize("site", ["matrix", "output"])
def test_penalty_is_the_same_under_loss_scaling(site):
    """The inner gradient is the true one, not the scaled one."""
    losses = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        model = small_model(dtype=policy)
        weights = np.arange(15).reshape(5, 3) / 10, np.eye(3)[:, :2]
        model.set_weights(weights)
        losses.append(loss_of_one_step(model, GradientPenalty(30.0, site=site)))
        model.set_weights(weights)
        clean = loss_of_one_step(model, GradientPenalty(0.0))
    np.testing.assert_allclose(*losses, rtol=5e-3)
    assert losses[0] > 1.1 * clean


def test_a_direction_that_is_not_finite_is_none():
    """An overflow in one coordinate leaves no usable direction."""
    for broken in (np.inf, np.nan):
        g = np.array([[broken, 1.0], [3.0, 4.0]], "float32")
        batch, token = (
            np.asarray(norms.units([ops.convert_to_tensor(g)], scope, place)[0])
            for scope, place in [
                ("batch", sites.InputSite()),
                ("token", sites.InputSite()),
            ]
        )
        np.testing.assert_array_equal(batch, np.zeros((2, 2)))
        np.testing.assert_allclose(token, [[0, 0], [0.6, 0.8]], rtol=1e-6)


@slow_on_jax
def test_an_overflow_means_no_attack():
    """A loss scale beyond float16: skipped update, finite report."""
    keras.config.set_dtype_policy("mixed_float16")
    model = toy.classifier()
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**40
    )
    model.compile(
        optimizer, "sparse_categorical_crossentropy", run_eagerly=TENSORFLOW
    )
    for method in (FGM(0.5), GradientPenalty(0.5)):
        blogkeras.adversarial_training(model, method=method)
        loss = toy.batch_loss(model, toy.TOKENS[:32], toy.LABELS[:32])
        assert np.isfinite(loss)
        assert all(np.isfinite(w).all() for w in toy.weights(model))


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@pytest.mark.parametrize(
    "method",
    [FGM(0.5, site="output"), GradientPenalty(0.1, site="matrix")],
    ids=["output", "penalty"],
)
def test_two_replicas_equal_one(method):

    def make_hook(model):
        return method.hook(model, None)

    one, history = replica_run(make_hook, 1)
    two, other = replica_run(make_hook, 2)
    assert toy.difference(one, two) <= 1e-6
    np.testing.assert_allclose(history["loss"], other["loss"], atol=1e-5)


def test_one_line_before_or_after_compile():
    def run(before):
        toy.reset()
        model = toy.classifier()
        if before:
            assert blogkeras.adversarial_training(model, epsilon=0.5) is model
        toy.compiled(model, run_eagerly=True)
        if not before:
            blogkeras.adversarial_training(model, "embedding", 0.5)
        model.fit(toy.TOKENS, toy.LABELS, verbose=0, shuffle=False)
        return toy.state(model)

    assert toy.difference(run(True), run(False)) == 0


def test_the_last_call_wins_and_plain_training_undoes():
    model = small_model()
    compiled(model, rate=0.0)
    clean = toy.batch_loss(model, TOKENS, LABELS)
    once = loss_of_one_step(model, FGM(0.5))
    blogkeras.adversarial_training(model, epsilon=3.0)
    blogkeras.adversarial_training(model, epsilon=0.5)
    assert toy.batch_loss(model, TOKENS, LABELS) == once
    assert blogkeras.plain_training(model) is model
    assert toy.batch_loss(model, TOKENS, LABELS) == clean < once
    blogkeras.plain_training(model)


class RandomNoise(AdversarialMethod):
    """The example of the docs."""

    def gradients(self, objective, weights, site):
        seed = objective.seed(1)
        point = [
            x + self.epsilon * keras.random.normal(ops.shape(x), seed=seed)
            for x in site.origin(objective, weights)
        ]
        moved, kwargs = site.at(objective, weights, point)
        return objective.value_and_grad(
            lambda weights: objective(weights, **kwargs), moved
        )


@pytest.mark.parametrize("site", ["matrix", "output"])
def test_a_method_of_your_own(site):
    model = compiled(small_model())
    blogkeras.adversarial_training(model, method=RandomNoise(0.1, site))
    losses = {toy.batch_loss(model, TOKENS, LABELS) for _ in range(3)}
    assert len(losses) == 3
    assert np.isfinite(list(losses)).all()
