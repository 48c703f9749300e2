"""ElectraPretrainer: its losses by NumPy, its gradients, what is shared.

Post 7846.
"""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import (
    JAX,
    TENSORFLOW,
    close_in_ulps,
    replicated,
    slow_on_jax,
    value,
)
from scipy import special, stats

from blogkeras import ElectraPretrainer, MaskedLanguageModel, TokenMasking
from blogkeras.pretraining.drawing import draw_tokens

VOCABULARY, LENGTH, ROWS = 23, 12, 16
MASK, CLS, SEP = 4, 2, 3
SHARING = ["embeddings", "disentangled", "none", "all"]
# A step takes long to compile, so `make test` tries one or two of them.
ONE_SHARING = [
    "disentangled",
    *(
        pytest.param(name, marks=pytest.mark.verify)
        for name in ("embeddings", "none", "all")
    ),
]
TWO_SHARING = ["embeddings", *ONE_SHARING[:1], *ONE_SHARING[2:]]


def tokens(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCABULARY, (rows, LENGTH)).astype("int32")
    ids[:, 0], ids[:, -1] = CLS, SEP
    ids[::3, 8:] = 0
    return ids


def encoder(dim, name):
    return toy.token_encoder(dim, name, VOCABULARY, 4, LENGTH)


def encoder_with_dropout(dim, name):
    one = encoder(dim, name)
    return keras.Model(one.input, layers.Dropout(0.3)(one.output), name=name)


def electra(sharing="embeddings", optimizer="sgd", **options):
    # As in a new process; within the scope of a strategy it cannot be done.
    if options.pop("reset", True):
        toy.reset()
    # TensorFlow runs a few steps in less time than it takes to trace one.
    compiling = {"jit_compile": JAX, "run_eagerly": TENSORFLOW}
    compiling = options.pop("compiling", compiling)
    network = options.pop("network", encoder)
    options.setdefault("generator", network(6, "generator"))
    options.setdefault("discriminator", network(6, "discriminator"))
    if "masking" not in options:
        options = {"mask_token": MASK, "special_tokens": [CLS, SEP], **options}
    model = ElectraPretrainer(sharing=sharing, seed=3, **options)
    # Tables with values of more weight than Keras's first ones.
    for variable in model.variables:
        if variable.name == "embeddings":
            rng = np.random.default_rng(variable.shape[0])
            variable.assign(rng.normal(size=variable.shape))
    if isinstance(optimizer, str):
        optimizer = keras.optimizers.get(
            {"class_name": optimizer, "config": {"learning_rate": 0.1}}
        )
    model.compile(optimizer, **compiling)
    return model


def outputs(model, ids, training=False):
    found = model(ops.convert_to_tensor(ids), training=training)
    return {name: value(x) for name, x in found.items()}


# The losses, by an independent computation in float64.


def vectors(model, ids, table=None):
    """What `toy.token_encoder` computes."""
    weights = [value(w, "float64") for w in model.weights]
    table = weights[0] if table is None else table
    return np.tanh(table[ids] @ weights[1] + weights[2])


def gelu(x):
    return x * special.ndtr(x)


def numpy_losses(model, out, ids):
    """Loss and right guesses of one; loss, chances, labels of the other."""
    table = value(model.generator.get_layer("table").embeddings, "float64")
    h = vectors(model.generator, out["token_ids"], table)
    h = np.take_along_axis(h, out["mask_positions"][..., None], 1)
    w, b = (value(x, "float64") for x in model.generator_head.dense.weights)
    h = gelu(h @ w + b)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(
        h.var(-1, keepdims=True) + 1e-6
    )
    scale, shift = (
        value(x, "float64") for x in model.generator_head.normalization.weights
    )
    logits = (h * scale + shift) @ table.T
    logits += value(model.generator_head.bias, "float64")
    weight = out["mask_weights"]
    right = (logits.argmax(-1) == out["mask_ids"])[weight > 0]
    p = special.softmax(logits, -1)
    p = np.take_along_axis(p, out["mask_ids"][..., None], -1)[..., 0]
    generator = (-np.log(p) * weight).sum() / weight.sum()

    if model.sharing == "disentangled":
        table = table + value(model.delta, "float64")
    elif model.sharing != "all":
        layer = model.discriminator.get_layer("table")
        table = value(layer.embeddings, "float64")
    h = vectors(model.discriminator, out["corrupted_ids"], table)
    w, b = (value(x, "float64") for x in model.discriminator_head.dense.weights)
    h = gelu(h @ w + b)
    w, b = (value(x, "float64") for x in model.discriminator_head.logit.weights)
    q = special.expit((h @ w + b)[..., 0])
    label = out["corrupted_ids"] != ids
    cross_entropy = -np.log(np.where(label, q, 1 - q))
    return generator, right, cross_entropy[ids != 0].mean(), q, label


@slow_on_jax
@pytest.mark.parametrize("sharing", TWO_SHARING)
def test_losses_equal_an_independent_computation(sharing):
    ids = tokens()
    model = electra(sharing, generator_weight=2.0, discriminator_weight=7.0)
    if sharing == "disentangled":
        model.delta.assign(np.random.default_rng(1).normal(size=(23, 4)))
    # So that logits differ by more than a step of the AUC, and some tokens are
    # told to be replaced, some are guessed.
    kernel = model.discriminator_head.logit.kernel
    kernel.assign(5000 * kernel)
    out = outputs(model, ids)
    frequent = np.bincount(out["mask_ids"][out["mask_weights"] > 0]).argmax()
    model.generator_head.bias.assign(5.0 * (np.arange(VOCABULARY) == frequent))
    out = outputs(model, ids)
    # Between two of the replaced ones, so that one half of them is told.
    logits = np.unique(out["discriminator_logits"][out["labels"] > 0])
    middle = logits[len(logits) // 2 - 1 :][:2].mean()
    model.discriminator_head.logit.bias.assign([-middle])
    out = outputs(model, ids)
    generator, right, discriminator, q, label = numpy_losses(model, out, ids)
    logs = model.evaluate(ids, verbose=0, batch_size=ROWS, return_dict=True)
    assert logs["masked_loss"] == pytest.approx(generator, rel=1e-6)
    assert logs["discriminator_loss"] == pytest.approx(discriminator, rel=1e-6)
    assert logs["loss"] == pytest.approx(
        2 * generator + 7 * discriminator, rel=1e-6
    )
    # Metrics of tokens, not of padding.
    real = ids != 0
    q, label = q[real], label[real]
    assert logs["discriminator_accuracy"] == pytest.approx(
        np.mean((q > 0.5) == label)
    )
    rank = stats.rankdata(q)
    n = label.sum()
    auc = (rank[label].sum() - n * (n + 1) / 2) / (n * (len(q) - n))
    assert logs["discriminator_auc"] == pytest.approx(auc, abs=0.005)
    told = q > 0.5
    assert 0 < (told & label).sum() < min(told.sum(), label.sum())
    assert logs["discriminator_precision"] == pytest.approx(label[told].mean())
    assert logs["discriminator_recall"] == pytest.approx(told[label].mean())
    assert 0 < right.mean() < 1
    assert logs["masked_accuracy"] == pytest.approx(right.mean())
    weight = out["mask_weights"] > 0
    same = (out["sampled_ids"] == out["mask_ids"])[weight]
    assert logs["sampled_accuracy"] == pytest.approx(same.mean())


@slow_on_jax
def test_what_a_step_sees():
    ids = tokens(200)
    model = electra()
    out = outputs(model, ids, training=True)
    masked = np.zeros(ids.shape, bool)
    rows, places = np.nonzero(out["mask_weights"])
    masked[rows, out["mask_positions"][rows, places]] = True
    assert (
        masked.sum(1) == np.maximum(1, (out["mask_weights"] > 0).sum(1))
    ).all()
    np.testing.assert_array_equal(out["corrupted_ids"][~masked], ids[~masked])
    np.testing.assert_array_equal(out["labels"], out["corrupted_ids"] != ids)
    shown = out["token_ids"][masked]
    # 85 % show the mask, the others their token.
    assert (
        stats.binomtest(int((shown == MASK).sum()), len(shown), 0.85).pvalue
        > 1e-3
    )
    np.testing.assert_array_equal(
        out["token_ids"][masked][shown != MASK], ids[masked][shown != MASK]
    )


@slow_on_jax
def test_labels_and_originals():
    ids = tokens(100)
    model = electra(labels="generated")
    out = outputs(model, ids)
    assert out["labels"].sum() == out["mask_weights"].sum()
    assert (out["corrupted_ids"] != ids).sum() < out["labels"].sum()
    # The loss is that of all masked tokens.
    *_, q, _ = numpy_losses(model, out, ids)
    loss = -np.log(np.where(out["labels"] > 0, q, 1 - q))[ids != 0].mean()
    logs = model.evaluate(ids, verbose=0, batch_size=100, return_dict=True)
    assert logs["discriminator_loss"] == pytest.approx(loss, rel=1e-6)
    model = electra(allow_original=False)
    out = outputs(model, ids)
    assert out["labels"].sum() == out["mask_weights"].sum()


def test_the_temperature_leaves_the_generator_s_loss():
    ids = tokens()
    losses = []
    for temperature in (1.0, 3.0):
        model = electra(temperature=temperature)
        out = outputs(model, ids)
        logs = model.evaluate(ids, batch_size=ROWS, verbose=0, return_dict=True)
        expected, *_ = numpy_losses(model, out, ids)
        assert logs["masked_loss"] == pytest.approx(expected, rel=1e-6)
        losses.append(logs["masked_loss"])
    assert losses[0] == losses[1]


def test_padding_is_not_drawn_by_a_network():
    """A discriminator would take it for padding, and the loss for a token."""
    model = electra()
    model.generator_head.bias.assign(50.0 * (np.arange(VOCABULARY) == 0))
    out = outputs(model, tokens(), training=True)
    assert not (out["sampled_ids"] == 0).any()
    np.testing.assert_array_equal(out["corrupted_ids"] == 0, tokens() == 0)


@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_the_auc_of_close_logits(spread):
    """At the beginning of training all logits are nearly the same."""
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 100)) < 0.12).astype("float32")
    noise = rng.normal(size=labels.shape)
    logits = (-2 + spread * (noise + labels)).astype("float32")
    model = electra("none")
    ids = np.ones((200, 1), "int32")
    y_pred = {
        "discriminator_logits": ops.convert_to_tensor(logits),
        "labels": ops.convert_to_tensor(labels),
        **dict.fromkeys(
            ("sampled_ids", "mask_ids", "masked_right", "masked_losses"),
            ops.convert_to_tensor(ids),
        ),
    }
    ones = ops.ones(labels.shape)
    model._update_metrics(y_pred, ones, ops.ones(ids.shape), ones)
    found = stats.mannwhitneyu(logits[labels > 0], logits[labels == 0])
    pairs = labels.sum() * (labels == 0).sum()
    auc = float(model._auc.result())
    assert auc == pytest.approx(found.statistic / pairs, abs=2e-3)


def test_the_original_is_drawn_where_nothing_else_can_be():
    logits = np.full((1, 2, 5), -np.inf, "float32")
    logits[0, :, 3] = 0
    logits[0, 1, 2] = -200
    drawn = draw_tokens(
        ops.convert_to_tensor(logits),
        ops.convert_to_tensor([[3, 3]]),
        seed=0,
        allow_original=False,
    )
    np.testing.assert_array_equal(value(drawn), [[3, 2]])


# Generators that are no networks.


@keras.saving.register_keras_serializable(package="tests")
def favourite(ids, positions):
    """Token 7 with probability 3/4, 9 with 1/4."""
    logits = np.full(VOCABULARY, -np.inf, "float32")
    logits[[7, 9]] = np.log([0.75, 0.25])
    return ops.convert_to_tensor(logits)


@keras.saving.register_keras_serializable(package="tests")
def successor(ids, positions):
    """The token after the one on the left, at each position."""
    left = ops.take_along_axis(ids, positions - 1, axis=1)
    return 1e4 * ops.one_hot((left + 1) % VOCABULARY, VOCABULARY)


def drawn(model, ids):
    out = outputs(model, ids, training=True)
    return out["sampled_ids"][out["mask_weights"] > 0]


@slow_on_jax
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_logits(temperature):
    model = electra(generator=favourite, temperature=temperature)
    sampled = drawn(model, tokens(1000))
    assert set(sampled) == {7, 9}
    p = 0.75 if temperature == 1 else 3**0.5 / (1 + 3**0.5)
    count = int((sampled == 7).sum())
    assert stats.binomtest(count, len(sampled), p).pvalue > 1e-3
    with pytest.raises(ValueError, match="network for a generator"):
        model.mask_filler()


def test_a_function_sees_tokens_and_positions():
    out = outputs(electra(generator=successor), tokens())
    left = np.take_along_axis(out["token_ids"], out["mask_positions"] - 1, 1)
    used = out["mask_weights"] > 0
    np.testing.assert_array_equal(
        out["sampled_ids"][used], (left[used] + 1) % VOCABULARY
    )


def test_uniform_and_unigram():
    ids = tokens(1000)
    ids[:, 1:6] = 8  # the most frequent
    special_tokens = [0, CLS, SEP, MASK]
    ordinary = np.setdiff1d(np.arange(23), special_tokens)
    count = np.bincount(drawn(electra(generator="uniform"), ids), minlength=23)
    assert not count[special_tokens].any()
    assert stats.chisquare(count[ordinary]).pvalue > 1e-3
    model = electra(generator="unigram")
    count = np.bincount(drawn(model, ids), minlength=23)  # counts the batch
    seen = np.bincount(ids[ids > 0], minlength=23)
    np.testing.assert_array_equal(value(model.token_counts), 1 + seen)
    count = np.bincount(drawn(model, ids), minlength=23)
    expected = 1.0 + 2 * seen[ordinary]
    expected *= count.sum() / expected.sum()
    assert not count[special_tokens].any()
    assert stats.chisquare(count[ordinary], expected).pvalue > 1e-3


# Gradients.


def moved(model, ids, steps=1):
    """The weights that training changes, by id."""
    before = [value(w) for w in model.trainable_variables]
    model.fit(ids, batch_size=ROWS, epochs=steps, verbose=0, shuffle=False)
    return {
        id(w)
        for w, old in zip(model.trainable_variables, before, strict=True)
        if (old != value(w)).any()
    }


def ids_of(*layers):
    return {id(w) for layer in layers for w in layer.trainable_variables}


def test_no_gradient_passes_the_draw():
    model = electra("none", generator_weight=0.0, discriminator_weight=1.0)
    changed = moved(model, tokens())
    assert changed == ids_of(model.discriminator, model.discriminator_head)


def test_the_table_learns_from_both_if_shared():
    model = electra("embeddings", generator_weight=0.0)
    table = model.generator.get_layer("table").embeddings
    assert model.discriminator.get_layer("table").embeddings is table
    assert id(table) in moved(model, tokens())


@slow_on_jax
def test_disentangled():
    model = electra("disentangled", generator_weight=0.0)
    table = model.generator.get_layer("table").embeddings
    ours = model.discriminator.get_layer("table").embeddings
    assert ours is not table
    assert ours.trainable
    np.testing.assert_array_equal(value(ours), value(table))  # Δ = 0
    changed = moved(model, tokens())
    # The discriminator's loss moves Δ, and nothing of the generator.
    assert id(model.delta) in changed
    assert not changed & ids_of(model.generator, model.generator_head)
    np.testing.assert_array_equal(
        value(ours), value(table) + value(model.delta)
    )
    assert all(ours is not w for w in model.trainable_variables)
    # And the generator's moves the discriminator's table with its own.
    model = electra("disentangled", discriminator_weight=0.0)
    table = model.generator.get_layer("table").embeddings
    assert id(table) in moved(model, tokens())
    ours = model.discriminator.get_layer("table").embeddings
    np.testing.assert_array_equal(value(ours), value(table))


class Stateful(layers.Layer):
    """Dropout, a statistic of the batch and a loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.normalization = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.5, seed=1)

    def build(self, shape):
        self.normalization.build(shape)

    def call(self, x, training=False):
        self.add_loss(ops.cast(ops.mean(ops.square(x)), "float32"))
        h = self.normalization(x, training=training)
        return self.dropout(h, training=training)


@slow_on_jax
def test_state_and_losses_inside_the_discriminator_count():
    def stateful(name):
        ids = keras.Input((LENGTH,), dtype="int32", name="token_ids")
        h = layers.Embedding(VOCABULARY, 4, name="table")(ids)
        return keras.Model(ids, Stateful()(h), name=name)

    runs = []
    for sharing in ("none", "disentangled"):
        toy.reset()
        model = electra(
            sharing,
            generator=encoder(6, "generator"),
            discriminator=stateful("discriminator"),
        )
        tables = [
            m.get_layer("table").embeddings
            for m in (model.generator, model._discriminator)
        ]
        tables[1].assign(value(tables[0]))
        loss = model.train_on_batch(tokens(), return_dict=True)["loss"]
        state = [
            value(v)
            for v in model.discriminator.non_trainable_variables
            if "moving" in v.path or "seed" in v.path
        ]
        assert any(x.any() for x in state)
        runs.append((loss, state))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


# Saving and resuming.


@slow_on_jax
@pytest.mark.parametrize("sharing", ONE_SHARING)
def test_saved_and_resumed_to_the_bit(sharing, tmp_path):
    ids = tokens(2 * ROWS)
    kwargs = {"batch_size": ROWS, "verbose": 0, "shuffle": False}
    # Keras saves no seeds of dropout; the model does.
    whole, half = (
        electra(sharing, "adam", network=encoder_with_dropout) for _ in range(2)
    )
    whole.fit(ids, epochs=2, **kwargs)
    half.fit(ids, epochs=1, **kwargs)
    half.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.steps == 2
    loaded.fit(ids, epochs=1, **kwargs)
    for one, other in zip(loaded.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(value(one), value(other))
    for one, other in zip(
        loaded.optimizer.variables, whole.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(value(one), value(other))
    tables = [
        m.get_layer("table").embeddings
        for m in (loaded.generator, loaded.discriminator)
    ]
    shared = sharing in ("embeddings", "all")
    assert (tables[0] is tables[1]) == shared
    assert len(loaded.trainable_variables) == len(whole.trainable_variables)


def test_the_networks_are_plain_models(tmp_path):
    ids = tokens()
    model = electra("disentangled", "adam")
    model.fit(ids, verbose=0)
    for network in (model.generator, model.discriminator):
        network.save(tmp_path / "network.keras")
        loaded = keras.saving.load_model(tmp_path / "network.keras")
        np.testing.assert_array_equal(
            value(loaded(ids)), value(network(ops.convert_to_tensor(ids)))
        )
    p = model.detect_replaced(ids, batch_size=10)
    h = model.discriminator_head(model.discriminator(ids))
    np.testing.assert_allclose(p, special.expit(value(h)), rtol=1e-5)


@slow_on_jax
@pytest.mark.parametrize(
    "generator",
    [
        "unigram",
        pytest.param("uniform", marks=pytest.mark.verify),
        pytest.param(favourite, marks=pytest.mark.verify),
    ],
)
def test_generators_that_draw_are_saved(generator, tmp_path):
    model = electra(generator=generator)
    model.fit(tokens(), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.generator == generator
    logs = [
        m.evaluate(tokens(), verbose=0, return_dict=True)
        for m in (model, loaded)
    ]
    assert logs[0] == logs[1]
    assert "masked_loss" not in logs[0]


@slow_on_jax
def test_mask_filler_is_the_generator(tmp_path):
    ids = tokens()
    model = electra("embeddings", "adam")
    model.fit(ids, verbose=0)
    filler = model.mask_filler()
    assert isinstance(filler, MaskedLanguageModel)
    assert filler.backbone is model.generator
    ids[2, 3] = MASK
    h = model.generator(ops.convert_to_tensor(ids))[2:3, 3:4]
    table = model.generator.get_layer("table").embeddings
    p = special.softmax(value(model.generator_head(h, table)))[0, 0]
    places, best, probabilities = filler.fill_mask(ids, top_k=3)
    np.testing.assert_array_equal(places, [[2, 3]])
    np.testing.assert_array_equal(best[0], np.argsort(-p)[:3])
    np.testing.assert_allclose(probabilities[0], p[best[0]], rtol=1e-5)
    filler.save(tmp_path / "filler.keras")
    loaded = keras.saving.load_model(tmp_path / "filler.keras")
    np.testing.assert_allclose(
        loaded.fill_mask(ids, top_k=3)[2], probabilities, rtol=1e-6
    )


# Degenerate batches, weights, precision, replicas.


def test_nothing_to_mask_has_no_weight():
    empty = np.zeros((ROWS, LENGTH), "int32")
    empty[:, 0] = CLS
    model = electra()
    logs = model.train_on_batch(empty, return_dict=True)
    assert np.isfinite(list(logs.values())).all()
    assert logs["masked_loss"] == logs["sampled_accuracy"] == 0
    empty[:] = 0
    before = toy.weights(model)
    logs = model.train_on_batch(empty, return_dict=True)
    assert np.isfinite(list(logs.values())).all()
    assert toy.difference(before, toy.weights(model)) <= 2  # the counts


def test_rows_of_weight_zero_do_not_count():
    ids = tokens()
    weight = (np.arange(ROWS) % 2).astype("float32")
    model = electra(generator_weight=3.0)
    out = outputs(model, ids)
    out["mask_weights"] = out["mask_weights"] * weight[:, None]
    generator, *_, q, label = numpy_losses(model, out, ids)
    logs = model.evaluate(
        ids,
        sample_weight=weight,
        batch_size=ROWS,
        verbose=0,
        return_dict=True,
    )
    real = (ids != 0) & (weight > 0)[:, None]
    losses = -np.log(np.where(label, q, 1 - q))
    assert logs["masked_loss"] == pytest.approx(generator, rel=1e-6)
    assert logs["discriminator_loss"] == pytest.approx(
        losses[real].mean(), rel=1e-6
    )


@pytest.mark.parametrize(
    "policy",
    [
        "mixed_bfloat16",
        pytest.param("mixed_float16", marks=pytest.mark.verify),
    ],
)
def test_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = electra("disentangled", "adam")
    logs = model.fit(tokens(), epochs=3, verbose=0).history
    assert all(np.isfinite(x).all() for x in logs.values())
    assert all(np.isfinite(w).all() for w in toy.weights(model))
    assert model.delta.dtype == "float32"


@pytest.mark.verify
@pytest.mark.parametrize("sharing", SHARING)
def test_bfloat16_stays_finite(sharing):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = electra(sharing, "adam", compiling={"jit_compile": True})
    logs = model.fit(tokens(), epochs=200, verbose=0).history
    assert all(np.isfinite(x).all() for x in logs.values())
    assert logs["loss"][-1] < logs["loss"][0]


@pytest.mark.parametrize("sharing", ONE_SHARING[:2])
def test_two_replicas_train_as_one(sharing):
    ids = tokens()  # half of the rows are padded otherwise
    runs = []
    for replicas in (1, 2):

        def make():
            return electra(sharing, reset=False, compiling={"jit_compile": JAX})

        toy.reset()
        model = replicated(make) if replicas == 2 else make()
        logs = model.fit(
            ids, batch_size=ROWS, epochs=2, shuffle=False, verbose=0
        ).history
        keras.distribution.set_distribution(None)
        runs.append((toy.weights(model), logs))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        if one.dtype == "int32":
            np.testing.assert_array_equal(one, other)
        else:
            close_in_ulps(one, other, 64)
    for name, one in runs[0][1].items():
        np.testing.assert_allclose(one, runs[1][1][name], rtol=1e-5)


def test_accumulated_gradients_and_several_steps_at_once():
    model = electra(
        optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        compiling={"steps_per_execution": 2, "jit_compile": JAX},
    )
    model.fit(tokens(4 * ROWS), batch_size=ROWS, verbose=0)
    assert model.steps == 4
    assert np.isfinite(
        np.concatenate([w.ravel() for w in toy.weights(model)])
    ).all()


# Costs, by counting.


@pytest.mark.skipif(not JAX, reason="JAX counts operations")
def test_the_masked_head_costs_its_positions_only():
    """4 × 256 and 4 × 64 transformers, V 21128, 32 × 64 tokens."""
    import jax

    def transformer(dim, heads, name):
        ids = keras.Input((64,), dtype="int32", name="token_ids")
        h = layers.Embedding(21128, 128)(ids)
        h = layers.Dense(dim)(h)
        for _ in range(4):
            a = layers.MultiHeadAttention(heads, dim // heads)(h, h)
            h = layers.LayerNormalization()(h + a)
            f = layers.Dense(dim)(layers.Dense(4 * dim, "gelu")(h))
            h = layers.LayerNormalization()(h + f)
        return keras.Model(ids, h, name=name)

    flops = []
    for places in (None, 64):
        model = ElectraPretrainer(
            transformer(64, 1, "generator"),
            transformer(256, 4, "discriminator"),
            masking=TokenMasking(
                21128,
                103,
                [101, 102],
                mask_token_rate=0.85,
                random_token_rate=0,
                num_positions=places,
            ),
        )
        model.compile("adam", jit_compile=True)
        model.optimizer.build(model.trainable_variables)
        state = model._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        ids = np.full((32, 64), 200, "int32")
        lowered = jax.jit(model.train_step).lower(state, (ids,))
        flops.append(lowered.cost_analysis()["flops"])
    assert flops[0] / flops[1] <= 0.70


if TENSORFLOW:

    def test_bert4keras_with_segments():
        def transformer(dim, prefix):
            return toy.bert4keras_transformer(
                model="electra",
                vocab_size=VOCABULARY,
                hidden_size=dim,
                num_attention_heads=1,
                max_position=LENGTH,
                prefix=prefix,
            )

        model = electra(
            "embeddings",
            generator=transformer(4, "G-"),
            discriminator=transformer(8, "D-"),
        )
        ids = tokens()
        logs = model.fit([ids, np.zeros_like(ids)], verbose=0).history
        assert np.isfinite(logs["loss"][0])
        # Without segments they are zero.
        assert np.isfinite(model.train_on_batch(ids)[0])
        assert (
            len(model.trainable_variables)
            == 6
            + len(
                {
                    id(v)
                    for m in (model.generator, model.discriminator)
                    for v in m.trainable_variables
                }
            )
            + 3
        )
