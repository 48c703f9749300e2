"""The embedding matrix, perturbed where it is looked up in."""

import collections

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, jax_only, slow_on_jax, tensorflow_only

import blogkeras
from blogkeras import (
    FGM,
    FGSM,
    PGD,
    FreeLB,
    GradientPenalty,
    adversarial_training,
    training,
)
from blogkeras.adversarial.sites import MatrixSite

RNG = np.random.default_rng(6)
A = RNG.integers(0, 9, (4, 5)).astype("int32")
B = RNG.integers(0, 9, (4, 3)).astype("int32")
Y = np.array([0, 1, 1, 0])


def two_texts(**embedding):
    a, b = keras.Input((5,), dtype="int32"), keras.Input((3,), dtype="int32")
    table = layers.Embedding(9, 4, name="embedding", **embedding)
    h = layers.Concatenate(axis=1)([table(a), table(b)])
    h = layers.GlobalAveragePooling1D()(layers.Dense(4, "tanh")(h))
    model = keras.Model([a, b], layers.Dense(2, activation="softmax")(h))
    model.compile(
        keras.optimizers.SGD(0.5),
        "sparse_categorical_crossentropy",
        run_eagerly=TENSORFLOW,
    )
    return model


def site_of(model):
    return training.installed(model)._site


def steps(method, dense):
    toy.reset()
    model = two_texts()
    model.set_weights(
        [np.random.default_rng(i).normal(size=w.shape)
         for i, w in enumerate(model.get_weights())]
    )  # fmt: skip
    adversarial_training(model, method=method)
    if dense:
        site_of(model)._only_looked_up = False
    losses = [toy.batch_loss(model, [A, B], Y) for _ in range(3)]
    assert site_of(model)._only_looked_up is not dense
    return [np.array(losses), *model.get_weights()]


@slow_on_jax
@pytest.mark.parametrize(
    "method",
    [
        FGM(0.7, clean_weight=0.3),
        PGD(0.5, 2, 0.8, norm_scope="token"),
        FreeLB(0.5, 2, initial_norm=0, norm_scope="batch", site="matrix"),
        GradientPenalty(2.0, "norm", site="matrix"),
        *(
            pytest.param(method, marks=pytest.mark.verify)
            for method in (
                FGM(0.7),
                FGM(0.3, "token"),
                FGSM(0.2),
                PGD(0.5, 3, 0.8),
                GradientPenalty(2.0, site="matrix"),
            )
        ),
    ],
    ids=lambda m: f"{type(m).__name__}-{getattr(m, 'norm_scope', m.site)}",
)
def test_equals_the_whole_matrix(method):
    """Tokens repeat within a text and across the two."""
    for ours, whole in zip(
        steps(method, False), steps(method, True), strict=True
    ):
        np.testing.assert_allclose(ours, whole, atol=1e-6)


def tied(**kwargs):
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.ReversibleEmbedding(9, 4)

        def call(self, x):
            h = ops.mean(self.embedding(x), axis=1)
            return ops.softmax(self.embedding(h, reverse=True))

    return Tied()


def by_hand():
    class ByHand(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(9, 4)

        def call(self, x):
            h = ops.mean(self.embedding(x), axis=1)
            table = ops.convert_to_tensor(self.embedding.embeddings)
            return ops.softmax(ops.matmul(h, ops.transpose(table)))

    return ByHand()


def single(**kwargs):
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(9, 4, **kwargs),
            layers.GlobalAveragePooling1D(),
            layers.Dense(9, activation="softmax"),
        ]
    )


def shared_by_two():
    class Shared(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = layers.Embedding(9, 4, name="one")
            self.two = layers.Embedding(9, 4, name="two")
            self.one.build()
            self.two.build()
            object.__setattr__(self.two, "_embeddings", self.one._embeddings)
            self.head = layers.Dense(9, activation="softmax")

        def call(self, x):
            return self.head(ops.mean(self.one(x) + self.two(x), axis=1))

    return Shared()


@slow_on_jax
@pytest.mark.parametrize(
    ("make", "only_looked_up", "name"),
    [
        (single, True, None),
        (tied, False, None),
        (by_hand, False, None),
        (lambda: single(embeddings_regularizer="l2"), False, None),
        (lambda: single(embeddings_constraint="unit_norm"), True, None),
        (lambda: single(mask_zero=True), True, None),
    ],
    ids=["single", "tied", "by hand", "regularizer", "constraint", "mask"],
)
def test_where_the_matrix_has_another_use(make, only_looked_up, name):
    model = make()
    model.compile(
        "sgd", "sparse_categorical_crossentropy", run_eagerly=TENSORFLOW
    )
    hook = FGM(0.5).hook(model, name)
    training.install(model, hook)
    model.fit(A, Y, verbose=0)
    site = getattr(hook._site, "_site", hook._site)
    assert site._only_looked_up is only_looked_up


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_matrix_of_two_layers_moves_in_both():
    """Of the sum of two look-ups: the row moves once and counts twice."""
    model = shared_by_two()
    model.compile(
        keras.optimizers.SGD(0.0),
        lambda y, p: -ops.log(p[:, 0]),
        run_eagerly=TENSORFLOW,
    )
    x = np.full((2, 5), 3)
    model(x)
    table = model.one.get_weights()[0].astype("float64")
    W, b = (w.astype("float64") for w in model.head.get_weights())

    def loss(row):
        z = 2 * row @ W + b
        return np.log(np.exp(z).sum()) - z[0], 2 * W @ (
            np.exp(z) / np.exp(z).sum() - np.eye(9)[0]
        )

    _, slope = loss(table[3])
    expected, _ = loss(table[3] + 0.5 * slope / np.linalg.norm(slope))
    adversarial_training(model, "one", 0.5)
    np.testing.assert_allclose(
        toy.batch_loss(model, x, np.zeros(2)), expected, rtol=1e-5
    )


@slow_on_jax
def test_a_frozen_matrix_and_low_rank_adapters():
    for lora in (False, True):
        model = single()
        embedding = model.layers[0]
        if lora:
            embedding.enable_lora(2)
        else:
            embedding.trainable = False
        model.compile(
            keras.optimizers.SGD(0.0),
            "sparse_categorical_crossentropy",
            run_eagerly=TENSORFLOW,
        )
        clean = toy.batch_loss(model, A, Y)
        adversarial_training(model, epsilon=0.5)
        assert toy.batch_loss(model, A, Y) > clean + 1e-3
        assert site_of(model)._only_looked_up


@slow_on_jax
@pytest.mark.filterwarnings("ignore:Layer .* does not have a .quantize")
def test_a_quantized_matrix_is_perturbed_at_its_output():
    model = single()
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    model.quantize("int8")
    model.compile(
        keras.optimizers.SGD(0.0),
        "sparse_categorical_crossentropy",
        run_eagerly=TENSORFLOW,
    )
    with pytest.raises(ValueError, match='site="output" for a quantized'):
        adversarial_training(model)
    result = blogkeras.evaluate_robustness(model, A, Y, (0.0, 0.5), verbose=0)
    clean, attacked = result.column("loss")
    np.testing.assert_allclose(
        clean, model.evaluate(A, Y, verbose=0), rtol=1e-5
    )
    assert attacked > clean + 1e-3
    assert "quantized_call" not in vars(model.layers[0])


# Cost


def text_model(vocabulary):
    model = keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            layers.Embedding(vocabulary, 16),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.SGD(), "sparse_categorical_crossentropy")
    return model


@jax_only
@pytest.mark.parametrize("method", [FGM(0.5), PGD(0.5, 2), FGSM(0.5)], ids=repr)
def test_operations_beyond_a_plain_step_do_not_grow_with_the_vocabulary(
    method,
):
    """XLA's count of operations and of bytes."""
    import jax

    def cost(vocabulary, method):
        model = text_model(vocabulary)
        x, y = np.zeros((4, 8), "int32"), np.zeros(4, "int32")
        model.optimizer.build(model.trainable_variables)
        state = model._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        step = model.train_step
        if method:
            hook = method.hook(model)

            def step(state, data):
                return training.make_step(hook)(model, state, data)

        found = jax.jit(step).lower(state, (x, y)).compile().cost_analysis()
        return np.array([found["flops"], found["bytes accessed"]])

    small, large = (cost(v, method) - cost(v, None) for v in (1_000, 4_000))
    np.testing.assert_allclose(large, small, atol=64)


@tensorflow_only
def test_no_tensor_of_the_size_of_the_matrix_is_computed():
    """Of TensorFlow's graph: it is read, looked up in and assigned to.

    Read once: each time costs a copy, since its updates are sparse.
    """
    import tensorflow as tf

    model = text_model(1_003)
    x, y = np.zeros((4, 8), "int32"), np.zeros(4, "int32")

    def sizes(hook):
        step = training.make_step(hook)
        graph = (
            tf.function(lambda x, y: step(model, (x, y)), autograph=False)
            .get_concrete_function(x, y)
            .graph
        )
        return collections.Counter(
            op.type
            for op in graph.get_operations()
            for tensor in op.outputs
            if tensor.shape.rank and tensor.shape[0] == 1_003
        )

    plain = sizes(lambda o, w: o.value_and_grad(o, w))
    for method in (FGM(0.5), PGD(0.5, 2)):
        assert sizes(method.hook(model)) == plain
    whole = FGM(0.5).hook(model)
    whole._site = MatrixSite(model.layers[0])
    whole._site._only_looked_up = False
    assert sizes(whole) > plain
