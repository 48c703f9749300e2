"""WMD and WRD in models: gradients, masks, XLA, training (post 7388)."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import slow_on_jax, slow_on_tensorflow

from blogkeras import WordMoverDistance, WordRotatorDistance, backend
from blogkeras.transport import (
    sinkhorn,
    word_mover_distance,
    word_rotator_distance,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 5)).astype("float32")
Y = RNG.normal(size=(3, 3, 5)).astype("float32")


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers for a test, whichever ran before."""
    global RNG
    RNG = np.random.default_rng(1)


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


@pytest.mark.parametrize(
    ("cls", "function"),
    [
        (WordMoverDistance, word_mover_distance),
        (WordRotatorDistance, word_rotator_distance),
    ],
)
def test_layers_are_the_functions(cls, function):
    mask = RNG.random((3, 4)) < 0.6, np.ones((3, 3), bool)
    mask[0][2] = False
    x = np.where(mask[0][..., None], X, np.nan)
    expected = function(x, Y, mask)
    near = cls()([x, Y], mask=list(mask))
    np.testing.assert_allclose(numpy(near), expected, rtol=0.01, atol=2e-3)
    exact = cls(solver="exact")([x, Y], mask=list(mask))
    np.testing.assert_allclose(numpy(exact), expected, rtol=1e-5)
    below = numpy(cls(solver="relaxed")([x, Y], mask=list(mask)))
    relaxed = numpy(function(x, Y, mask, solver="relaxed"))
    np.testing.assert_allclose(below, relaxed, rtol=1e-6)
    assert (below <= expected + 1e-5).all()


@slow_on_jax
@pytest.mark.parametrize(
    ("cls", "function"),
    [
        (WordMoverDistance, word_mover_distance),
        (WordRotatorDistance, word_rotator_distance),
    ],
)
def test_pairwise_is_every_pair(cls, function):
    mask = [RNG.random((3, 4)) < 0.6, None]
    layer = cls(pairwise=True, solver="exact")
    found = numpy(layer([X, Y[:2]], mask=mask))
    assert found.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        expected = function(X[i], Y[j], (mask[0][i], None))
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-5)
    near = cls(pairwise=True)([X, Y[:2]], mask=mask)
    np.testing.assert_allclose(numpy(near), found, rtol=0.01, atol=2e-3)


@slow_on_tensorflow
@pytest.mark.parametrize(
    ("cls", "function", "weighting"),
    [
        (WordMoverDistance, word_mover_distance, "importance"),
        (WordRotatorDistance, word_rotator_distance, "norm"),
    ],
)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_gradients_are_finite_differences(cls, function, weighting, solver):
    """By the vectors and by the weights, in float64.

    Of the exact distance, or of the regularized optimum that Sinkhorn's
    iteration finds, with ε as it is.
    """
    if solver == "exact" and keras.backend.backend() == "jax":
        pytest.skip("JAX traces whatever it differentiates")
    rng = np.random.default_rng(1)
    inputs = [X[:1], Y[:1]]
    if weighting == "importance":
        inputs += [rng.random((1, 4)) + 0.5, rng.random((1, 3)) + 0.5]
    inputs = [np.asarray(z, "float32") for z in inputs]
    epsilon = 0.05 * problem(inputs)[2].max()

    def optimum(values):
        if solver == "sinkhorn":
            return entropic_optimum(*problem(values), epsilon)
        x, y, *importance = values
        return function(
            x, y, None, weights=weighting, importance=importance or None
        )[0]

    layer = cls(
        weighting=weighting,
        solver=solver,
        regularization=0.05,
        tolerance=1e-6,
    )

    def value(values):
        return ops.sum(layer(list(values))), ()

    def differentiate(*tensors):
        return backend.value_and_grad(value, tensors)

    if solver == "sinkhorn":
        differentiate = backend.jit(differentiate)
    _, gradients = differentiate(*map(ops.convert_to_tensor, inputs))
    step = 1e-5
    for number, gradient in enumerate(gradients):
        expected = np.zeros(inputs[number].shape)
        for place in np.ndindex(expected.shape):
            sides = []
            for sign in (1, -1):
                moved = [z.astype("float64") for z in inputs]
                moved[number][place] += sign * step
                sides.append(optimum(moved))
            expected[place] = (sides[0] - sides[1]) / (2 * step)
        size = np.abs(expected).max()
        error = np.abs(numpy(gradient) - expected).max()
        assert error < 1e-3 * size


def problem(inputs):
    """Masses and costs: WMD with weights, WRD without."""
    x, y, *weights = (np.asarray(z[0], "float64") for z in inputs)
    norms = [np.linalg.norm(z, axis=1) for z in (x, y)]
    if weights:
        D = np.linalg.norm(x[:, None] - y, axis=2)
    else:
        D = 1 - (x / norms[0][:, None]) @ (y / norms[1][:, None]).T
    p, q = weights or norms
    return p / p.sum(), q / q.sum(), D


def entropic_optimum(p, q, D, epsilon):
    """min ⟨γ, D⟩ + ε KL(γ ‖ p ⊗ q), by its dual."""
    kernel = np.exp(-D / epsilon)
    b = np.ones(len(q))
    for _ in range(300):
        a = 1 / (kernel @ (q * b))
        b = 1 / ((p * a) @ kernel)
    return epsilon * (p @ np.log(a) + q @ np.log(b))


@slow_on_tensorflow
@pytest.mark.parametrize("cls", [WordMoverDistance, WordRotatorDistance])
def test_gradients_are_finite_at_equal_words_and_zeros(cls):
    x = np.stack([X[0], X[0], 0 * X[0], X[1]])
    y = np.stack([X[0], X[0][::-1], 0 * X[0], 0 * X[0]])
    x[1, 2] = 0
    mask = np.ones((4, 4), bool)
    mask[3] = False
    layer = cls()

    def value(tensors):
        distance = layer(list(tensors), mask=[mask, mask])
        return ops.sum(distance), distance

    run = backend.jit(lambda x, y: backend.value_and_grad(value, (x, y)))
    (_, distance), gradients = run(
        ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    )
    assert np.isfinite(numpy(distance)).all()
    for gradient in gradients:
        assert np.isfinite(numpy(gradient)).all()
    # Fully masked on both sides: no word has a say.
    assert np.abs(numpy(gradients[0])[3]).max() == 0


def siamese(**options):
    tokens = [keras.Input((5,), dtype="int32") for _ in range(2)]
    embedding = layers.Embedding(toy.VOCABULARY, 8, mask_zero=True)
    dense = layers.Dense(8)
    vectors = [dense(embedding(t)) for t in tokens]
    distance = WordRotatorDistance(**options)(vectors)
    return keras.Model(tokens, distance)


def pairs():
    """Equal texts with their words in another order, and different ones."""
    order = RNG.permutation(5)
    x = np.concatenate([toy.TOKENS[:32]] * 2)
    y = np.concatenate([toy.TOKENS[:32][:, order], toy.TOKENS[32:64]])
    return [x, y], np.repeat([0.0, 1.0], 32).astype("float32")


@slow_on_jax
def test_a_siamese_model_trains_end_to_end_under_xla():
    model = siamese(regularization=0.02)
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=True)
    x, y = pairs()
    weight = np.ones(64, "float32")
    losses = model.fit(
        x, y, sample_weight=weight, batch_size=64, epochs=30, verbose=0
    ).history["loss"]
    assert losses[-1] < 0.6 * losses[0]
    distance = numpy(model(x))
    # Masks passed through: the order of words, and padding, do not matter.
    assert distance[:32].max() < 0.01 < distance[32:].mean()


@pytest.mark.verify
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="of TensorFlow"
)
def test_two_replicas_predict_what_one_does():
    x, y = pairs()
    expected = siamese(regularization=0.02)
    with toy.mirrored().scope():
        model = siamese(regularization=0.02)
        model.compile("adam", "mse", jit_compile=False)
    model.set_weights(expected.get_weights())
    # Both stop within the tolerance, a replica by the pairs that it has.
    np.testing.assert_allclose(
        model.predict(x, batch_size=64, verbose=0),
        numpy(expected(x)),
        atol=1e-3,
    )
    loss = model.train_on_batch(x, y)
    assert np.isfinite(loss)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX")
def test_the_gradient_lowers_for_tpu():
    import jax

    def loss(x):
        return ops.sum(WordRotatorDistance()([x, Y]))

    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(X)
    assert exported.platforms == ("tpu",)


@slow_on_tensorflow
def test_mixed_precision_trains_and_exact_refuses_a_compiled_step():
    keras.config.set_dtype_policy("mixed_float16")
    model = siamese(regularization=0.02)
    assert model.output.dtype == "float16"
    x, y = pairs()
    # TensorFlow without XLA once; JAX would compile each operation by itself.
    compiled = keras.backend.backend() == "jax"
    model.compile("adam", "mse", jit_compile=compiled)
    loss = model.train_on_batch(x, y)
    assert np.isfinite(loss)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    keras.config.set_dtype_policy("float32")
    model = siamese(solver="exact")
    model.compile("adam", "mse", jit_compile=True)
    # Older versions of Keras wrap it.
    with pytest.raises((ValueError, RuntimeError), match='solver="sinkhorn"'):
        model.train_on_batch(x, y)


def test_layer_errors():
    with pytest.raises(ValueError, match="x_importance"):
        WordMoverDistance(weighting=(X, Y))
    with pytest.raises(ValueError, match="`solver`"):
        WordMoverDistance(solver="simplex")
    with pytest.raises(ValueError, match="above 0"):
        WordRotatorDistance(tolerance=0)
    with pytest.raises(ValueError, match="x_importance"):
        WordMoverDistance(weighting="importance")([X, Y])
    importance = ops.ones(X.shape[:2])
    for inputs in ([X, Y, importance, None], [X, None, importance, importance]):
        with pytest.raises(ValueError, match="x_importance"):
            WordMoverDistance(weighting="importance")(inputs)
    for inputs in ([X[0], Y[0]], [X, None], X):
        with pytest.raises(ValueError, match="batch, length, dim"):
            WordMoverDistance()(inputs)
    # Shapes that would broadcast, also after the layer was built.
    layer = WordMoverDistance(solver="relaxed")
    layer([X, Y])
    for inputs in ([X, Y[:1]], [X, Y[..., :1]], [X, Y[:, 0]]):
        with pytest.raises(ValueError, match="batch, length, dim"):
            layer(inputs)
    layer = WordMoverDistance(weighting="importance")
    layer([X, Y, importance, ops.ones(Y.shape[:2])])
    with pytest.raises(ValueError, match="x_importance"):
        layer([X, Y, importance, None])
    layer = WordMoverDistance(weighting="importance")
    with pytest.raises(ValueError, match="x_importance"):
        layer([X, Y, ops.ones(X.shape[:2]), ops.ones((len(Y), 1))])


def test_functions_compile_once_where_they_are_traced():
    count = []

    def run(x, y):
        count.append(1)
        return word_rotator_distance(x, y, solver="sinkhorn")

    compiled = backend.jit(run)
    for scale in (1.0, 3.0, 1e-3):
        x, y = scale * X, Y[:, ::-1]
        found = compiled(ops.convert_to_tensor(x), ops.convert_to_tensor(y))
        expected = word_rotator_distance(x, y)
        np.testing.assert_allclose(numpy(found), expected, rtol=0.01)
    assert len(count) == 1
    p, q = np.full((3, 4), 0.25, "float32"), np.full((3, 3), 1 / 3, "float32")
    D = np.abs(RNG.normal(size=(3, 4, 3))).astype("float32")
    inside = backend.jit(lambda p, q, D: tuple(sinkhorn(p, q, D)[:3]))(
        *map(ops.convert_to_tensor, (p, q, D))
    )
    # Two programs, one of them of padded texts, end at the marginal error.
    for a, b in zip(inside, sinkhorn(p, q, D)[:3], strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-3)


def check_transformer(outputs, inputs, values, mask):
    """WRD of a model's token outputs is that of the words it does not mask."""
    model = keras.Model(inputs, [WordRotatorDistance()(outputs), *outputs])
    distance, x, y = model.predict(values, verbose=0)
    expected = word_rotator_distance(x, y, mask)
    np.testing.assert_allclose(distance, expected, rtol=0.01)
    unmasked = word_rotator_distance(x, y)
    assert np.abs(distance - unmasked).max() > 0.03 * expected.max()


def token_pairs():
    x, y = (RNG.integers(1, 20, (4, 6)) for _ in range(2))
    x[:, 4:] = y[1:, 3:] = 0
    return x, y


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="bert4keras runs on TensorFlow",
)
def test_bert4keras_outputs_bring_their_masks():
    import blogkeras.bert4keras  # noqa: F401

    # isort: split
    from bert4keras.models import build_transformer_model

    bert = build_transformer_model(
        model="bert",
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_act="gelu",
        dropout_rate=0.0,
        max_position=8,
        segment_vocab_size=2,
    )
    inputs = [keras.Input((6,), dtype="int32") for _ in range(4)]
    x, y = token_pairs()
    check_transformer(
        [bert(inputs[:2]), bert(inputs[2:])],
        inputs,
        [x, 0 * x, y, 0 * y],
        (x != 0, y != 0),
    )


@slow_on_jax
def test_keras_hub_outputs_with_their_padding_mask():
    backbone = toy.keras_hub_bert(
        vocabulary_size=20, hidden_dim=16, max_sequence_length=8
    )
    x, y = token_pairs()
    vectors = [
        backbone.predict(
            {
                "token_ids": tokens,
                "segment_ids": 0 * tokens,
                "padding_mask": tokens != 0,
            },
            verbose=0,
        )["sequence_output"]
        for tokens in (x, y)
    ]
    mask = [x != 0, y != 0]
    found = numpy(WordRotatorDistance()(vectors, mask=mask))
    for k in range(4):
        kept = [v[k][m[k]] for v, m in zip(vectors, mask, strict=True)]
        expected = word_rotator_distance(*kept)
        np.testing.assert_allclose(found[k], expected, rtol=0.01)


@pytest.mark.parametrize("cls", [WordMoverDistance, WordRotatorDistance])
@pytest.mark.parametrize("pairwise", [False, True])
def test_masks_that_are_no_pair_of_the_words(cls, pairwise):
    mask = np.ones(X.shape[:2], bool)
    layer = cls(pairwise=pairwise, solver="relaxed")
    for wrong in (
        mask,  # of which rows would be taken for masks
        [mask, mask, mask],
        [mask[:, :1], None],
        [None, np.ones(Y.shape[1], bool)],
        [mask[..., None], None],
    ):
        with pytest.raises(ValueError, match="Expected `mask` to be a pair"):
            layer([X, Y], mask=wrong)
    np.testing.assert_array_equal(
        numpy(layer([X, Y], mask=(mask, None))), numpy(layer([X, Y]))
    )


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        *((solver, {}) for solver in ("exact", "sinkhorn", "relaxed")),
        *((solver, {"partial": 0.5}) for solver in ("exact", "sinkhorn")),
        ("sinkhorn", {"debiased": True}),
        ("sinkhorn", {"unbalanced": 1.0}),
    ],
)
def test_no_pairs(solver, options):
    """Such as after a batch was filtered."""
    function = word_mover_distance
    assert numpy(function(X[:0], Y[:0], solver=solver, **options)).shape == (0,)
    for pairwise, shape in ((False, (0,)), (True, (0, 0))):
        layer = WordMoverDistance(pairwise=pairwise, solver=solver, **options)
        assert numpy(layer([X[:0], Y[:0]])).shape == shape


@pytest.mark.parametrize("cls", [WordMoverDistance, WordRotatorDistance])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "relaxed"])
def test_vectors_without_numbers(cls, solver):
    """They are all equal."""
    distances = cls(solver=solver)([X[..., :0], Y[..., :0]])
    np.testing.assert_array_equal(numpy(distances), [0, 0, 0])


@pytest.mark.parametrize(
    "options",
    [{}, {"pairwise": True}, {"partial": 0.5}, {"debiased": True}],
    ids=lambda options: "".join(options) or "default",
)
def test_batches_of_texts_of_other_lengths(options):
    """Each batch is padded to its own longest text."""
    a, b = keras.Input((None, 5)), keras.Input((None, 5))
    layer = WordMoverDistance(**options)
    model = keras.Model([a, b], layer([a, b]))
    model.compile(jit_compile=keras.backend.backend() == "jax")
    for n, m in ((4, 3), (3, 3), (2, 2), (4, 2)):
        x, y = X[:, :n], Y[:, :m]
        distances = model.predict([x, y], verbose=0)
        np.testing.assert_allclose(distances, numpy(layer([x, y])), atol=2e-3)
