"""Options of residual quantizers, small codes and groups, against NumPy."""

import inspect

import keras
import numpy as np
import pytest
import toy
from keras import ops
from kit import SLOW_FILE_ON_JAX, nearest_rows, slow_on_jax, value

from blogkeras import backend
from blogkeras.quantization import (
    VQVAE,
    CodebookUsage,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
)

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
DIM, CODES, SMALL = 6, 8, 2
Z = RNG.normal(size=(5, 3, DIM)).astype("float32")
U = RNG.normal(size=Z.shape).astype("float32")


def books(*sizes, dim=DIM):
    return [
        RNG.normal(scale=0.6**i, size=(size, dim)).astype("float32")
        for i, size in enumerate(sizes)
    ]


def residual(codebooks, **kwargs):
    sizes = [len(book) for book in codebooks]
    sizes = sizes[0] if len(set(sizes)) == 1 else sizes
    layer = ResidualVectorQuantizer(len(codebooks), sizes, **kwargs)
    layer.build((None, DIM))
    for stage, book in zip(layer.stages, codebooks, strict=False):
        stage.embeddings.assign(book)
    return layer


def slope_of_z(layer):
    def output(z):
        with keras.StatelessScope():
            return ops.sum(U * layer(z)), None

    return value(backend.value_and_grad(output, Z)[1])


# Sizes by stage, directions.


@slow_on_jax
def test_each_stage_has_its_size():
    codebooks = books(3, 9, 5)
    layer = residual(codebooks)
    assert layer.num_codes == [3, 9, 5]
    assert layer.alphabets == (3, 9, 5)
    output, codes = layer(Z, training=True, return_codes=True)
    rest = Z.astype("f8")
    for index, book in enumerate(codebooks):
        k = nearest_rows(rest, book)
        np.testing.assert_array_equal(value(codes)[..., index], k)
        rest = rest - book[k]
        counts = value(layer.stacked_counts("batch_counts"))[index]
        expected = np.bincount(k.ravel(), minlength=9)
        np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(value(output), Z - rest, atol=1e-5)
    with pytest.raises(ValueError, match=r"codes.*0.*at most 2.*from 3 to 3"):
        layer.decode(np.array([[3, 0, 0]]))
    with pytest.raises(ValueError, match=r"at most 8.*from 0 to 9"):
        layer.decode(np.array([[0, 9, 0]]))


@slow_on_jax
def test_directions_are_compared_and_lengths_kept():
    def unit(x):
        x = x.astype("f8")
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    codebooks = books(CODES, CODES)
    layer = residual(codebooks, metric="cosine")
    output, codes = layer(Z, return_codes=True)
    rest = Z.astype("f8")
    for index, book in enumerate(codebooks):
        k = nearest_rows(unit(rest), unit(book))
        np.testing.assert_array_equal(value(codes)[..., index], k)
        rest = rest - book[k]
    np.testing.assert_allclose(value(output), Z - rest, atol=1e-5)
    np.testing.assert_array_equal(value(layer.encode(Z)), value(codes))
    assert np.isfinite(value(layer(0 * Z))).all()
    layer.adapt(RNG.normal(size=(200, DIM)))
    error = np.mean((Z - value(layer.decode(layer.encode(Z)))) ** 2)
    assert error < 0.8 * np.mean(Z**2)


# Small codes.


def projections(stage):
    """`(in, its bias, out, its bias)`, set to numbers, in float64."""
    shapes = (DIM, SMALL), (SMALL,), (SMALL, DIM), (DIM,)
    values = [0.5 * RNG.normal(size=s).astype("f4") for s in shapes]
    weights = [*stage.project_in.weights, *stage.project_out.weights]
    for weight, new in zip(weights, values, strict=True):
        weight.assign(new)
    return [v.astype("f8") for v in values]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_small_codes_of_one_codebook(metric):
    (book,) = books(CODES, dim=SMALL)
    layer = VectorQuantizer(CODES, codebook_dim=SMALL, metric=metric)
    layer.build((None, DIM))
    layer.embeddings.assign(book)
    w, b, w_out, b_out = projections(layer)
    small, book = Z.astype("f8") @ w + b, book.astype("f8")
    if metric == "cosine":
        small, book = (
            x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (small, book)
        )
    k = nearest_rows(small, book)
    output, codes = layer(Z, return_codes=True)
    np.testing.assert_array_equal(value(codes), k)
    expected = book[k] @ w_out + b_out
    np.testing.assert_allclose(value(output), expected, atol=1e-5)
    loss = 1.25 * np.mean((small - book[k]) ** 2)
    np.testing.assert_allclose(float(layer.losses[0]), loss, rtol=1e-4)
    np.testing.assert_array_equal(value(layer.encode(Z)), k)
    np.testing.assert_allclose(value(layer.decode(k)), expected, atol=1e-5)
    if metric == "euclidean":
        expected = U @ (w @ w_out).T
        np.testing.assert_allclose(slope_of_z(layer), expected, atol=1e-5)


@pytest.mark.parametrize("gradient", ["straight-through", "diveq"])
def test_small_codes_of_stages(gradient):
    codebooks = books(CODES, CODES, CODES, dim=SMALL)
    layer = residual(codebooks, codebook_dim=SMALL, gradient=gradient)
    maps = [projections(stage) for stage in layer.stages]
    rest, codes, left = Z.astype("f8"), [], np.eye(DIM)
    for book, (w, b, w_out, b_out) in zip(codebooks, maps, strict=True):
        codes.append(nearest_rows(rest @ w + b, book))
        rest = rest - (book[codes[-1]] @ w_out + b_out)
        left = left @ (np.eye(DIM) - w @ w_out)
    output, found = layer(Z, return_codes=True)
    np.testing.assert_array_equal(value(found), np.stack(codes, -1))
    np.testing.assert_allclose(value(output), Z - rest, atol=1e-5)
    np.testing.assert_allclose(value(layer.decode(found)), Z - rest, atol=1e-5)
    if gradient == "straight-through":
        # What one stage has passed on, the next one does not count again.
        expected = U @ (np.eye(DIM) - left).T
        np.testing.assert_allclose(slope_of_z(layer), expected, atol=1e-5)
    else:  # the noise of a stage does not change the codes of the next
        noisy, found = layer(Z, training=True, return_codes=True)
        np.testing.assert_array_equal(value(found), np.stack(codes, -1))
        assert np.abs(value(noisy) - value(output)).max() > 1e-3


@pytest.mark.verify
@pytest.mark.parametrize("decay", [None, 0.9])
def test_small_codes_are_adapted_and_learn(decay):
    layer = ResidualVectorQuantizer(2, CODES, codebook_dim=3, ema_decay=decay)
    layer.adapt(Z)
    for stage in layer.stages:
        assert value(stage.embeddings).shape == (CODES, 3)
    first = layer.stages[0]
    small = value(first.project_in(Z)).reshape(-1, 3)
    distance = ((small[:, None] - value(first.embeddings)) ** 2).sum(-1)
    assert distance.min(1).mean() < 0.5 * small.var(0).sum()
    model = keras.Sequential([keras.Input((3, DIM)), layer])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=ON_JAX)
    before = model.get_weights()
    history = model.fit(Z, Z, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    for weight, old in zip(model.get_weights(), before, strict=True):
        assert np.isfinite(weight).all()
        assert np.any(weight != old)
    assert len(layer.trainable_weights) == 2 * (4 + (decay is None))


# One codebook for all stages.


def test_a_shared_codebook_moves_once():
    (book,) = books(CODES)
    layer = ResidualVectorQuantizer(
        3, CODES, ema_decay=0.9, shared_codebook=True
    )
    layer.build((None, DIM))
    (stage,) = layer.stages
    stage.embeddings.assign(book)
    mask = np.ones(Z.shape[:-1], bool)
    mask[0, 1] = False
    output, codes = layer(Z, training=True, return_codes=True, mask=mask)
    rest, counts, sums, rows = Z.astype("f8"), 0, 0, []
    for index in range(3):
        k = nearest_rows(rest, book)
        np.testing.assert_array_equal(value(codes)[..., index], k)
        hot = np.eye(CODES)[k[mask]]
        rows.append(hot.sum(0))
        counts, sums = counts + hot.sum(0), sums + hot.T @ rest[mask]
        rest = rest - book[k]
    np.testing.assert_allclose(value(output), Z - rest, atol=1e-5)
    np.testing.assert_array_equal(
        value(layer.stacked_counts("batch_counts")), rows
    )
    total = counts.sum()
    smooth = (counts + 1e-5) / (total + CODES * 1e-5) * total
    np.testing.assert_allclose(
        value(stage.embeddings), sums / smooth[:, None], atol=1e-4
    )
    assert value(stage.ema_steps) == 1
    assert layer.alphabets == (CODES,) * 3


@slow_on_jax
def test_a_shared_codebook_is_adapted_in_shares():
    x = RNG.normal(size=(300, DIM)).astype("float32")
    layer = ResidualVectorQuantizer(2, 16, shared_codebook=True)
    layer.adapt(x)
    coarse, fine = (
        np.mean((x - value(layer.decode(layer.encode(x)[:, :n]))) ** 2)
        for n in (1, 2)
    )
    assert fine < 0.8 * coarse < 0.8 * x.var()
    few = ResidualVectorQuantizer(3, 2, shared_codebook=True, ema_decay=0.9)
    few.adapt(x)  # fewer codes than stages
    assert np.isfinite(value(few.stages[0].ema_sums)).all()
    with pytest.raises(ValueError, match="at least one vector"):
        layer.adapt(x[:0])


@slow_on_jax
def test_usage_of_a_shared_codebook_is_reported_once():
    layer = ResidualVectorQuantizer(2, CODES, shared_codebook=True, name="rq")
    model = keras.Sequential([keras.Input((3, DIM)), layer])
    model.compile("sgd", "mse", jit_compile=ON_JAX)
    logs = model.fit(Z, Z, verbose=0, callbacks=[CodebookUsage()]).history
    assert set(logs) == {"loss", "rq_perplexity", "rq_usage"}
    layer.reset_counts()
    assert value(layer.total_counts).sum() == 0


# Every option of a codebook holds in the composites.

OPTIONS = {
    "rotation": {"gradient": "rotation"},
    "diveq": {"gradient": "diveq", "noise_variance": 0.1, "seed": 3},
    "diveq-detach": {"gradient": "diveq-detach", "codebook_cost": 0.5},
    "linear": {"codebook_transform": "linear", "commitment_cost": 2.0},
    "diagonal": {"codebook_transform": "diagonal", "gradient": "rotation"},
    "averages": {"ema_decay": 0.9, "restart_threshold": 0.5},
    "small": {"codebook_dim": SMALL, "codebook_transform": "linear"},
    "small averages": {"codebook_dim": SMALL, "ema_decay": 0.9},
    "cosine": {"metric": "cosine", "codebook_dim": SMALL},
}


def test_options_of_a_codebook_are_options_of_stages():
    ours, theirs = (
        set(inspect.signature(cls).parameters)
        for cls in (VectorQuantizer, ResidualVectorQuantizer)
    )
    assert ours <= theirs


def without_draws(part):
    """The weights but for those that number draws: a composite numbers."""
    drawn = ("draw_seed", "iterations")
    return [v for v in part.weights if v.name not in drawn]


def step_of(layer, part):
    """Output, loss, gradients and the state after a step in training."""
    trained = part.trainable_weights

    def objective(arguments):
        z, weights = arguments
        with keras.StatelessScope(
            zip(trained, weights, strict=True), collect_losses=True
        ) as scope:
            output = layer(z, training=True)
            loss = sum(scope.losses)
            state = [v.value for v in without_draws(part)]
        return ops.sum(U * output) + loss, (output, loss, state)

    (_, (output, loss, state)), (slope, slopes) = backend.value_and_grad(
        objective, [Z, [v.value for v in trained]]
    )
    return [value(x) for x in (output, loss, slope, *slopes, *state)]


@pytest.mark.parametrize(
    ("composite", "name"),
    [
        (composite, name)
        for composite in ("stage", "group")
        for name in OPTIONS
        # The directions of stages keep their lengths.
        if (composite, name) != ("stage", "cosine")
    ],
)
@slow_on_jax
def test_one_stage_or_group_is_the_codebook_alone(composite, name):
    options = OPTIONS[name]
    alone = VectorQuantizer(CODES, **options)
    if composite == "group":
        layer = GroupedQuantizer(VectorQuantizer(CODES, **options), 1)
    else:
        layer = ResidualVectorQuantizer(1, CODES, **options)
    for quantizer in (alone, layer):
        quantizer.build(Z.shape)
    (part,) = layer.parts if composite == "group" else layer.stages
    rng = np.random.default_rng(1)
    for variable in alone.weights:
        if variable.name in ("embeddings", "transform", "kernel"):
            variable.assign(rng.normal(size=variable.shape))
    pairs = zip(without_draws(part), without_draws(alone), strict=True)
    for variable, other in pairs:
        assert variable.name == other.name
        variable.assign(other.value)
    for ours, theirs in zip(
        step_of(layer, part), step_of(alone, alone), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# Dropout of stages.


def test_rows_keep_their_first_stages():
    codebooks = books(CODES, CODES, CODES)
    layer = residual(codebooks, quantizer_dropout=1.0, seed=0, ema_decay=0.9)
    z = np.repeat(Z, 400, axis=0)
    expected = value(layer.encode(z))
    output, codes = layer(z, training=True, return_codes=True)
    output, parts = value(output), []
    np.testing.assert_array_equal(value(codes), expected)
    for stages in (1, 2, 3):
        layer_ = residual(codebooks)
        decoded = value(layer_.decode(value(codes)[..., :stages]))
        parts.append(np.abs(output - decoded).max((1, 2)) < 1e-5)
    kept = np.argmax(parts, axis=0) + 1
    assert np.any(parts, axis=0).all()  # a row is the same in all its vectors
    shares = np.bincount(kept, minlength=4)[1:] / len(z)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)  # 3 standard errors
    for stage, least in zip(layer.stages, (1, 2, 3), strict=True):
        counted = value(stage.batch_counts).sum()
        assert counted == 3 * np.sum(kept >= least)
    # A row that a stage does not see has the loss 0 there.
    rest, loss = z.astype("f8"), 0
    for index, book in enumerate(codebooks):
        rest = rest - book[nearest_rows(rest, book)]
        loss += 0.25 * np.mean(rest**2 * (kept > index)[:, None, None])
    np.testing.assert_allclose(float(layer.losses[0]), loss, rtol=1e-4)
    again = value(layer(z, training=True))
    assert np.abs(again - output).max() > 0.1
    exact = residual(codebooks)
    np.testing.assert_array_equal(value(exact(z)), value(exact.decode(codes)))


@slow_on_jax
def test_the_rate_of_dropout():
    layer = residual(books(CODES, CODES), quantizer_dropout=0.4, seed=1)
    z = np.repeat(Z, 1000, axis=0)
    full = layer(z)
    changed = np.abs(value(layer(z, training=True)) - value(full)).max((1, 2))
    # Of 40 % half keep one stage of two.
    np.testing.assert_allclose(np.mean(changed > 1e-6), 0.2, atol=0.017)
    one = residual(books(CODES), quantizer_dropout=1.0)  # vectors alone
    vector = Z[0, 0]
    np.testing.assert_array_equal(
        value(one(vector, training=True)), value(one(vector))
    )


@pytest.mark.verify
@pytest.mark.parametrize(
    "options",
    [
        {"codebook_dim": 2, "metric": "cosine", "gradient": "rotation"},
        {"shared_codebook": True, "ema_decay": 0.9, "restart_threshold": 0.1},
    ],
    ids=["small", "shared"],
)
def test_training_is_resumed_with_all_options(options, tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        encoder = keras.Sequential(
            [keras.Input((3, DIM)), keras.layers.Dense(DIM)]
        )
        decoder = keras.Sequential(
            [keras.Input((3, DIM)), keras.layers.Dense(DIM)]
        )
        layer = ResidualVectorQuantizer(
            2, CODES, quantizer_dropout=0.5, seed=2, **options
        )
        model = VQVAE(encoder, layer, decoder)
        model.compile(keras.optimizers.Adam(0.01), jit_compile=ON_JAX)
        model.build(Z.shape)
        return model

    whole, part = make(), make()
    for model in (whole, part):
        model.train_on_batch(Z, Z)
    part.save(tmp_path / "part.keras")
    part = keras.saving.load_model(tmp_path / "part.keras")
    for model in (whole, part):
        model.train_on_batch(Z, Z)
    for ours, theirs in zip(
        part.get_weights(), whole.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.verify
@pytest.mark.parametrize(
    "quantizer",
    [
        lambda: VectorQuantizer(6, gradient="diveq", seed=1),
        lambda: ResidualVectorQuantizer(
            2,
            6,
            ema_decay=0.9,
            quantizer_dropout=0.5,
            shared_codebook=True,
            seed=1,
        ),
        lambda: ResidualFiniteScalarQuantizer(
            2, [3] * DIM, quantizer_dropout=0.5, seed=1
        ),
        lambda: FiniteScalarQuantizer([3] * DIM, noise_rate=0.5, seed=1),
    ],
    ids=["diveq", "residual", "residual scalar", "scalar"],
)
def test_two_replicas_draw_what_one_draws(quantizer):
    x = RNG.normal(size=(8, 3, DIM)).astype("float32")

    def fit():
        keras.utils.set_random_seed(5)
        model = keras.Sequential(
            [
                keras.Input((3, DIM)),
                keras.layers.Dense(DIM),
                quantizer(),
                keras.layers.Dense(DIM),
            ]
        )
        model.compile(keras.optimizers.SGD(0.3), "mse", jit_compile=ON_JAX)
        model.fit(x, x, epochs=2, batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    expected = fit()
    if ON_JAX:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        found = fit()
    else:
        with toy.mirrored().scope():
            found = fit()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


# Groups.

PARTS = {
    "codebook": lambda: VectorQuantizer(CODES, ema_decay=0.9),
    "residual": lambda: ResidualVectorQuantizer(2, [4, 7]),
    "scalar": lambda: FiniteScalarQuantizer([3, 4]),
}


@pytest.mark.parametrize("kind", PARTS)
@slow_on_jax
def test_each_group_is_quantized_on_its_own(kind):
    layer = GroupedQuantizer(PARTS[kind](), 3)
    output, codes = (value(x) for x in layer(Z, return_codes=True))
    loss = [float(x) for x in layer.losses]
    losses = []
    for index, part in enumerate(layer.parts):
        own = slice(2 * index, 2 * index + 2)
        alone = PARTS[kind]()
        alone.build((None, 2))
        alone.set_weights(part.get_weights())
        expected, k = (value(x) for x in alone(Z[..., own], return_codes=True))
        np.testing.assert_array_equal(output[..., own], expected)
        np.testing.assert_array_equal(codes[:, :, index], k)
        losses += [float(x) for x in alone.losses]
    if losses:
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)
        first, second = (p.codebooks()[0].embeddings for p in layer.parts[:2])
        assert np.abs(value(first) - value(second)).max() > 1e-3
    else:
        assert loss == []
    np.testing.assert_array_equal(value(layer.encode(Z)), codes)
    np.testing.assert_allclose(value(layer.decode(codes)), output, atol=1e-6)
    layer(Z, training=True)
    counts = value(layer.stacked_counts("batch_counts"))
    assert counts.shape == (len(layer.alphabets), max(layer.alphabets))
    np.testing.assert_array_equal(counts.sum(1), Z.size / DIM)
    again = layer.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert not again.built


def test_groups_of_groups_have_seeds_of_their_own():
    part = VectorQuantizer(4, gradient="diveq", seed=5)
    layer = GroupedQuantizer(GroupedQuantizer(GroupedQuantizer(part, 2), 2), 2)
    seeds = [p.seed for a in layer.parts for b in a.parts for p in b.parts]
    assert seeds == [*range(5, 13)]


@slow_on_jax
def test_groups_are_adapted_and_trained_in_a_model():
    encoder = keras.Sequential([keras.Input((3, DIM)), keras.layers.Dense(DIM)])
    decoder = keras.Sequential([keras.Input((3, DIM)), keras.layers.Dense(DIM)])
    part = ResidualVectorQuantizer(2, 3, gradient="diveq", seed=5)
    model = VQVAE(encoder, GroupedQuantizer(part, 2), decoder)
    model.compile("adam", jit_compile=ON_JAX)
    model.adapt(Z)
    history = model.fit(Z, verbose=0).history
    assert np.isfinite([v for values in history.values() for v in values]).all()
    assert [p.seed for p in model.quantizer.parts] == [5, 6]
    codes = model.encode(Z)
    assert codes.shape == (5, 3, 2, 2)
    assert model.decode(codes[..., :1]).shape == Z.shape
    logs = CodebookUsage()
    logs.set_model(model)
    assert logs._quantizers() == [model.quantizer]


def test_a_frozen_group_stays():
    layer = GroupedQuantizer(PARTS["codebook"](), 3, trainable=False)
    layer.build(Z.shape)
    before = [value(p.embeddings).copy() for p in layer.parts]
    layer(Z, training=True)
    for part, old in zip(layer.parts, before, strict=True):
        np.testing.assert_array_equal(value(part.embeddings), old)


# Bad input.


def test_what_does_not_fit():
    for kwargs, message in (
        ({"num_codes": [4]}, r"one for each of the stages.*num_codes=\[4\]"),
        ({"num_codes": [4, 1]}, "at least 2.*num_codes=1"),
        ({"num_codes": "48"}, "num_codes="),
        ({"num_codes": [4, 5], "shared_codebook": True}, "one number of codes"),
        ({"shared_codebook": 1}, "shared_codebook=1"),
        ({"quantizer_dropout": 1.5}, "quantizer_dropout=1.5"),
        ({"codebook_dim": 0}, "codebook_dim=0"),
        ({"metric": "dot"}, "metric='dot'"),
    ):
        with pytest.raises(ValueError, match=message):
            ResidualVectorQuantizer(2, **{"num_codes": 4, **kwargs})
    built = VectorQuantizer(4)
    built.build((None, 2))
    for quantizer, message in (
        (built, "not built"),
        (keras.layers.Dense(2), "such as VectorQuantizer"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupedQuantizer(quantizer, 2)
    layer = GroupedQuantizer(VectorQuantizer(4), 4)
    with pytest.raises(ValueError, match=r"groups divide.*groups=4"):
        layer(Z)
    layer.build((None, 8))
    with pytest.raises(ValueError, match=r"4 groups along axis -1.*\(1, 3\)"):
        layer.decode([[0, 1, 2]])
    large = GroupedQuantizer(FiniteScalarQuantizer([8] * 11), 2)
    with pytest.raises(ValueError, match="at most 2³¹ codes"):
        large(keras.Input((22,)), return_codes=True)
    with pytest.raises(ValueError, match="k-means"):
        large.adapt(np.ones((3, 22)))
