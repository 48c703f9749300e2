"""Quantizers inside models: masks, replicas, frozen layers, odd inputs."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import (
    assert_nearest,
    slow_on_jax,
    slow_on_tensorflow,
    tensorflow_only,
)

from blogkeras import backend
from blogkeras.quantization import (
    VQVAE,
    CodebookUsage,
    CodePrior,
    FiniteScalarQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    codebook,
    nearest,
    perplexity,
)
from blogkeras.quantization import prior as priors

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
DIM, CODES = 3, 5
X = RNG.normal(size=(4, 4, 2)).astype("float32")
X[0, 2:] = X[1, 1:] = 0
SEEN = X.any(-1)
MAPS = RNG.integers(0, CODES, (7, 3, 4)).astype("int32")
QUANTIZERS = {
    "codebook": lambda: VectorQuantizer(CODES),
    "average": lambda: VectorQuantizer(
        CODES, ema_decay=0.9, restart_threshold=0.2
    ),
    "scalar": lambda: FiniteScalarQuantizer([3] * DIM),
    "residual": lambda: ResidualVectorQuantizer(2, CODES, ema_decay=0.9),
}


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def every(*names):
    names = names or QUANTIZERS
    return pytest.mark.parametrize("kind", names)


# Masks and weights.

# Keras says so of a `Sequential`; what is in it sees the mask all the same.
masked = pytest.mark.filterwarnings("ignore:.*not support masking")


def sequences(quantizer, **kwargs):
    """An autoencoder of sequences, where rows of zeros are padding."""
    encoder = keras.Sequential(
        [keras.Input((4, 2)), layers.Masking(), layers.Dense(DIM)]
    )
    decoder = keras.Sequential([keras.Input((4, DIM)), layers.Dense(2)])
    model = VQVAE(encoder, quantizer, decoder)
    model.compile(keras.optimizers.SGD(0.0), jit_compile=ON_JAX, **kwargs)
    model.build(X.shape)
    return model


@masked
@pytest.mark.parametrize("batch_size", [2, 4])  # of 4: as long as a sequence
def test_masks_and_weights_in_the_loss(batch_size):
    # Scalars add no loss of their own: what is left is the reconstruction.
    model = sequences(QUANTIZERS["scalar"](), loss_weights=[2])
    options = {"batch_size": batch_size, "verbose": 0, "return_dict": True}
    error = np.mean((numpy(model(X)) - X) ** 2, -1)
    weight = np.array([1, 2, 3, 0], "float32")

    def mean(weight):  # over what the mask lets through, batch by batch
        parts = np.split(np.arange(4), 4 // batch_size)
        each = weight[:, None] * error * SEEN
        return 2 * np.mean([each[p].sum() / SEEN[p].sum() for p in parts])

    for logs, expected in (
        (model.evaluate(X, **options), mean(np.ones(4))),
        (model.evaluate(X, X, sample_weight=weight, **options), mean(weight)),
    ):
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    options.pop("return_dict")
    for inputs, expected in (
        ({"x": X}, mean(np.ones(4))),
        ({"x": X, "y": X, "sample_weight": weight}, mean(weight)),
    ):
        history = model.fit(
            **inputs,
            shuffle=False,
            validation_data=(X, X, weight),
            validation_batch_size=batch_size,
            **options,
        ).history
        np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)
        np.testing.assert_allclose(
            history["val_loss"], [mean(weight)], rtol=1e-5
        )


def test_weights_fit_a_loss_of_your_own():
    def by_row(y, prediction):
        return ops.mean(ops.square(y - prediction), axis=(1, 2))

    weight = np.array([1, 2, 3, 0], "float32")
    losses = []
    for loss in ("mse", keras.losses.MeanSquaredError(), by_row):
        keras.utils.set_random_seed(0)
        encoder = keras.Sequential([keras.Input((4, 2)), layers.Dense(DIM)])
        decoder = keras.Sequential([keras.Input((4, DIM)), layers.Dense(2)])
        model = VQVAE(encoder, QUANTIZERS["scalar"](), decoder)
        model.compile("sgd", loss)
        losses.append(model.evaluate(X, X, sample_weight=weight, verbose=0)[0])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@slow_on_tensorflow
@masked
@every()
def test_evaluation_counts_what_training_counts(kind):
    x = X.copy()
    x[3, 3] = np.nan
    model = sequences(QUANTIZERS[kind]())
    z = numpy(model.encoder(np.nan_to_num(x)))
    clean = SEEN & np.isfinite(x).all(-1)
    codes = numpy(model.quantizer.encode(z))[clean].reshape(clean.sum(), -1)
    if kind == "scalar":  # counted component by component
        codes = codes // [1, 3, 9] % 3
    size = 3 if kind == "scalar" else CODES
    expected = np.mean(
        [perplexity(np.bincount(c, minlength=size)) for c in codes.T]
    )
    logs = model.evaluate(x, batch_size=4, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["perplexity"], expected, rtol=1e-5)
    counts = numpy(model.usage.counts).sum(-1)
    np.testing.assert_array_equal(counts, clean.sum())
    history = model.fit(x, batch_size=4, verbose=0).history
    np.testing.assert_allclose(history["perplexity"], expected, rtol=1e-5)


@masked
def test_k_means_of_what_is_not_masked():
    model = sequences(VectorQuantizer(CODES, ema_decay=0.9))
    model.adapt(X)
    # The clusters are the first step of an average whose new share is 0.1.
    counts = 10 * numpy(model.quantizer.ema_counts)
    np.testing.assert_allclose(counts.sum(), SEEN.sum(), rtol=1e-3)


@masked
def test_reconstructions_see_the_mask():
    encoder = sequences(QUANTIZERS["average"]()).encoder
    decoder = keras.Sequential(
        [
            keras.Input((4, DIM)),
            layers.GlobalAveragePooling1D(),
            layers.RepeatVector(4),
        ]
    )
    model = VQVAE(encoder, QUANTIZERS["average"](), decoder)
    z = numpy(model.encoder(X))
    for quantize in (False, True):
        z = numpy(model.quantizer(z)) if quantize else z
        mean = (z * SEEN[..., None]).sum(1) / SEEN.sum(1, keepdims=True)
        np.testing.assert_allclose(
            model.reconstruct(X, quantize, batch_size=3),
            np.repeat(mean[:, None], 4, axis=1),
            atol=1e-6,
        )


@slow_on_jax
@every()
def test_codes_carry_the_mask(kind):
    def mask_of(x):
        return numpy(backend.get_keras_mask(x))

    quantized, codes = QUANTIZERS[kind]()(
        layers.Masking()(
            np.ones((2, 4, DIM), "float32") * [[[1], [1], [0], [0]]]
        ),
        return_codes=True,
    )
    np.testing.assert_array_equal(mask_of(quantized), [[1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(mask_of(codes), [[1, 1, 0, 0]] * 2)


# Frozen, empty, many replicas.


@every("average", "residual")
def test_a_frozen_codebook_counts_but_stays(kind):
    layer = QUANTIZERS[kind]()
    model = keras.Sequential([keras.Input((DIM,)), layers.Dense(DIM), layer])
    layer.trainable = False
    model.compile("sgd", "mse", jit_compile=ON_JAX)
    z = RNG.normal(size=(8, DIM)).astype("float32")
    before = {w.path: numpy(w) for w in layer.weights}
    model.fit(z, z, verbose=0)
    for weight in layer.weights:
        same = np.array_equal(numpy(weight), before[weight.path])
        assert same == ("_counts" not in weight.path or "ema" in weight.path)
    layer.trainable = True
    model.compile("sgd", "mse", jit_compile=ON_JAX)
    model.fit(z, z, verbose=0)
    for book in layer.codebooks():
        path = book.embeddings.path
        assert not np.array_equal(numpy(book.embeddings), before[path])


def test_frozen_stages_stay_frozen_when_revived():
    layer = ResidualVectorQuantizer(2, CODES, ema_decay=0.9, trainable=False)
    for frozen in (layer, keras.models.clone_model(keras.Sequential([layer]))):
        if frozen is not layer:
            frozen = frozen.layers[-1]
            assert frozen is not layer
        z = RNG.normal(size=(8, DIM)).astype("float32")
        frozen.build(z.shape)
        before = [numpy(stage.embeddings) for stage in frozen.stages]
        frozen(z, training=True)
        for stage, old in zip(frozen.stages, before, strict=True):
            np.testing.assert_array_equal(numpy(stage.embeddings), old)


@every()
@slow_on_jax
def test_an_empty_batch(kind):
    layer = QUANTIZERS[kind]()
    layer(RNG.normal(size=(9, DIM)).astype("float32"), training=True)
    before = [numpy(b.total_counts) for b in layer.codebooks()]
    averages = [numpy(w) for w in layer.weights if "ema" in w.path]
    quantized, codes = layer(
        np.zeros((0, DIM), "float32"), training=True, return_codes=True
    )
    assert quantized.shape == (0, DIM)
    assert codes.shape[0] == 0
    assert [float(loss) for loss in layer.losses] == [0] * len(layer.losses)
    after = [numpy(b.total_counts) for b in layer.codebooks()]
    np.testing.assert_array_equal(after, before)
    for new, old in zip(
        [w for w in layer.weights if "ema" in w.path], averages, strict=True
    ):
        np.testing.assert_array_equal(numpy(new), old)
    if layer.trainable_weights:

        def loss(values):
            mapping = zip(layer.trainable_weights, values, strict=True)
            with keras.StatelessScope([*mapping], collect_losses=True) as scope:
                layer(np.zeros((0, DIM), "float32"), training=True)
            return sum(scope.losses), None

        values = [w.value for w in layer.trainable_weights]
        for slope in backend.value_and_grad(loss, values)[1]:
            np.testing.assert_array_equal(numpy(slope), 0)


def test_the_callback_of_a_model_that_fit_builds():
    model = keras.Sequential([layers.Dense(DIM), VectorQuantizer(CODES)])
    model.compile("sgd", "mse", jit_compile=ON_JAX)
    history = model.fit(
        X[0], np.zeros((4, DIM)), verbose=0, callbacks=[CodebookUsage()]
    ).history
    (name,) = (key for key in history if key.endswith("_perplexity"))
    assert 1 <= history[name][0] <= CODES


@pytest.mark.skipif(ON_JAX, reason="JAX knows every shape")
def test_weights_of_a_shape_not_known_before():
    import tensorflow as tf

    weight = np.array([[1], [2], [3], [0]], "float32")
    encoder = keras.Sequential([keras.Input((4, 2)), layers.Dense(DIM)])
    decoder = keras.Sequential([keras.Input((4, DIM)), layers.Dense(2)])
    model = VQVAE(encoder, QUANTIZERS["scalar"](), decoder)
    for fitted, x in ((model, X), (prior(), MAPS[:4])):
        fitted.compile("sgd")
        data = tf.data.Dataset.from_tensor_slices((x, x, weight)).batch(4)
        unknown = data.map(
            lambda x, y, w: (
                x,
                y,
                tf.reshape(w, tf.shape(w) * tf.size(x[0, 0, :1])),
            )
        )
        assert unknown.element_spec[2].shape.as_list() == [None, None]
        np.testing.assert_allclose(
            fitted.evaluate(unknown, verbose=0)[0],
            fitted.evaluate(data, verbose=0)[0],
            rtol=1e-6,
        )


@slow_on_tensorflow
@pytest.mark.parametrize(
    "kind",
    [
        "average",
        *(
            pytest.param(kind, marks=pytest.mark.verify)
            for kind in ("autoencoder", "codebook", "residual")
        ),
    ],
)
def test_two_replicas_tell_and_do_what_one_does(kind):
    x = RNG.normal(size=(8, DIM)).astype("float32")

    def make():
        if kind == "autoencoder":
            ends = [
                keras.Sequential([keras.Input((DIM,)), layers.Dense(DIM)])
                for _ in "ab"
            ]
            return VQVAE(ends[0], QUANTIZERS["average"](), ends[1])
        return keras.Sequential(
            [
                keras.Input((DIM,)),
                layers.Dense(DIM),
                QUANTIZERS[kind](),
                layers.Dense(DIM),
                QUANTIZERS[kind](),
            ]
        )

    def fit():
        keras.utils.set_random_seed(5)
        model = make()
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=ON_JAX)
        history = model.fit(
            x, x, epochs=3, batch_size=8, verbose=0, validation_data=(x, x)
        ).history
        return model.get_weights(), history

    weights, history = fit()
    if ON_JAX:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        ours, found = fit()
    else:
        with toy.mirrored().scope():
            ours, found = fit()
    for key in history:
        np.testing.assert_allclose(found[key], history[key], rtol=1e-4)
    assert len(history) == (6 if kind == "autoencoder" else 2)
    for a, b in zip(ours, weights, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_restarts_begin_elsewhere_at_every_step():
    dead, z = np.array([False, True]), np.arange(4096.0, dtype="f4")[:, None]
    for first in (1, 10**7):
        steps = np.arange(first, first + 100, dtype="float32")
        rows = [
            float(codebook._spread(z, np.ones(4096, "f4"), dead, step)[1, 0])
            for step in map(ops.convert_to_tensor, steps)
        ]
        assert len(set(rows)) == 100, first


# Building, shapes, export.


class Dense(keras.Model):
    """A model that is no more than its `call`."""

    def __init__(self, units):
        super().__init__()
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)


@slow_on_tensorflow
@pytest.mark.parametrize("called", [False, True])
def test_encoders_that_only_have_a_call(called):
    model = VQVAE(Dense(DIM), VectorQuantizer(CODES), Dense(2))
    if called:
        model.encoder(X)
    model.compile("sgd", jit_compile=ON_JAX)
    history = model.fit(X, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert len(model.weights) > 5
    assert model.encode(X).shape == X.shape[:-1]


@slow_on_tensorflow
def test_encoders_of_tokens():
    encoder = keras.Sequential(
        [keras.Input((4,), dtype="int32"), layers.Embedding(CODES, DIM)]
    )
    model = VQVAE(encoder, VectorQuantizer(CODES), Dense(CODES))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=ON_JAX)
    history = model.fit(MAPS[:, 0], verbose=0).history
    assert np.isfinite(history["loss"]).all()


@every()
@slow_on_jax
def test_in_every_step_of_time(kind):
    layer = layers.TimeDistributed(QUANTIZERS[kind]())
    z = RNG.normal(size=(4, 3, 2, DIM)).astype("float32")
    assert layer(keras.Input(z.shape[1:])).shape == (None, *z.shape[1:])
    np.testing.assert_allclose(
        numpy(layer(z)), numpy(layer.layer(z)), atol=1e-6
    )
    assert layer.layer.compute_output_shape(z.shape) == z.shape


@pytest.mark.skipif(not ON_JAX, reason="TensorFlow exports without symbols")
def test_a_free_number_of_vectors_can_be_exported():
    import jax

    rows = jax.export.symbolic_shape("4*b")
    codes = RNG.normal(size=(CODES, DIM)).astype("float32")
    z = RNG.normal(size=(12, DIM)).astype("float32")
    exported = jax.export.export(jax.jit(nearest.nearest_codes))(
        jax.ShapeDtypeStruct((*rows, DIM), "float32"), codes
    )
    assert_nearest(exported.call(z, codes), z, codes)


@pytest.mark.skipif(not ON_JAX, reason="TensorFlow has one switch for all")
def test_distances_are_of_full_precision():
    import jax

    z, codes = np.ones((9, DIM), "f4"), np.ones((CODES, DIM), "f4")
    text = jax.jit(nearest.nearest_codes).lower(z, codes).as_text()
    assert "dot_general" in text
    assert "precision = [HIGHEST, HIGHEST]" in text


def test_initializers_of_residual_stages():
    def ones(shape, dtype=None):
        return ops.ones(shape, dtype)

    layer = ResidualVectorQuantizer(2, CODES, embeddings_initializer=ones)
    layer.build((None, DIM))
    for stage in layer.stages:
        np.testing.assert_array_equal(numpy(stage.embeddings), 1)


# Priors.


def prior(num_classes=None, architecture="attention", **kwargs):
    return CodePrior(
        CODES, (3, 4), architecture, num_classes, 8, 1, 2, **kwargs
    )


@pytest.mark.parametrize("architecture", ["attention", "convolution"])
def test_the_most_probable_code_is_one_code(architecture):
    # In bfloat16 many of 512 logits are equal.
    model = CodePrior(
        512, (3, 4), architecture, None, 8, 1, 2, dtype="mixed_bfloat16"
    )
    first = model.sample(8, top_k=1, seed=0)
    for seed in (1, 2):
        np.testing.assert_array_equal(
            model.sample(8, top_k=1, seed=seed), first
        )


def test_of_equal_codes_only_k_are_drawn():
    logits = ops.convert_to_tensor([[0.0, 2, 1, 2, 2, 1]] * 50)
    u = np.linspace(0, 0.999, 50, dtype="float32")
    for k, expected in ((1, {1}), (2, {1, 3}), (4, {1, 2, 3, 4})):
        assert set(numpy(priors._draw(logits, u, 1.0, k))) == expected


def test_hardly_any_temperature_is_none():
    model = prior()
    np.testing.assert_array_equal(
        model.sample(3, temperature=1e-300, seed=0),
        model.sample(3, top_k=1, seed=0),
    )


@pytest.mark.parametrize("architecture", ["attention", "convolution"])
@slow_on_jax
def test_labels_may_be_a_column(architecture):
    model = prior(2, architecture)
    labels = np.array([0, 1, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(
        numpy(model([MAPS, labels[:, None]])), numpy(model([MAPS, labels]))
    )
    model.compile("sgd", jit_compile=ON_JAX)
    model.fit([MAPS, labels[:, None]], verbose=0)


@slow_on_tensorflow
def test_the_target_is_the_codes():
    model = prior()
    model.compile(
        keras.optimizers.SGD(0.0),
        metrics=["sparse_categorical_accuracy"],
        jit_compile=ON_JAX,
    )
    logs = [model.evaluate(MAPS, y, verbose=0) for y in (None, MAPS, 0 * MAPS)]
    np.testing.assert_allclose(logs, [logs[0]] * 3, rtol=1e-6)


# Odd inputs.


def test_codes_and_labels_out_of_range():
    for model, x, message in (
        (prior(), MAPS + 3, "`codes`.*at most 4.*from 3 to 7"),
        (prior(), MAPS - 1, "`codes`.*at most 4.*from -1 to 3"),
        (prior(2), [MAPS, np.full(7, 2)], "`labels`.*at most 1.*from 2 to 2"),
        (prior(), MAPS / 5, "integers in `codes`.*float"),
        (prior(), MAPS > 1, "integers in `codes`.*bool"),
        (prior(2), [MAPS, MAPS[:, 0, 0] / 5], "integers in `labels`"),
    ):
        model.compile("sgd")
        for function in (
            model,
            model.fit,
            model.evaluate,
            model.predict,
            model.train_on_batch,
            model.test_on_batch,
            model.predict_on_batch,
        ):
            with pytest.raises(ValueError, match=message):
                function(x)


@slow_on_tensorflow
def test_numpy_integers_and_lists():
    layer = VectorQuantizer(np.int64(CODES))
    assert layer.encode([[0.0] * DIM]).shape == (1,)
    assert type(layer.get_config()["num_codes"]) is int
    layer = FiniteScalarQuantizer(np.array([8, 5, 5]))
    assert layer.get_config()["levels"] == [8, 5, 5]
    layer = ResidualVectorQuantizer(np.int64(2), np.int64(CODES))
    layer.adapt(RNG.normal(size=(9, DIM)), iterations=np.int64(1))
    model = CodePrior(np.int64(CODES), np.array([3, 4]), dim=8)
    assert model.get_config()["code_shape"] == (3, 4)
    assert model.sample(np.int64(2), labels=None, seed=0).shape == (2, 3, 4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"list of integers.*levels=8"):
        FiniteScalarQuantizer(8)
    with pytest.raises(ValueError, match="list of integers"):
        FiniteScalarQuantizer([])
    with pytest.raises(ValueError, match="code_shape=4"):
        CodePrior(4, 4)
    with pytest.raises(ValueError, match=r"at least 2.*num_codes=0"):
        CodePrior(0, (2, 2))
    for arguments, message in (
        ({"code_shape": ()}, r"code_shape=\(\)"),
        ({"dim": 0}, "dim=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_classes": 0}, "num_classes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            CodePrior(4, **{"code_shape": (2, 2), **arguments})
    layer = VectorQuantizer(CODES)
    with pytest.raises(ValueError, match="iterations=0"):
        layer.adapt(X, iterations=0)
    with pytest.raises(ValueError, match=r"return_codes=True.*KerasTensor"):
        layer.encode(keras.Input((DIM,)))
    with pytest.raises(ValueError, match=r"layer of your own.*KerasTensor"):
        layer.decode(keras.Input((DIM,), dtype="int32"))
    model = sequences(FiniteScalarQuantizer([3] * DIM))
    with pytest.raises(ValueError, match=r"k-means.*FiniteScalarQuantizer"):
        model.adapt(X)
    with pytest.raises(ValueError, match="batch_size=0"):
        model.encode(X, batch_size=0)
    with pytest.raises(ValueError, match=r"array of rows.*object"):
        model.encode(object())
    with pytest.raises(ValueError, match=r"one tensor.*input_shape="):
        model.build([(None, 4, 2), (None, 4, 2)])
    with pytest.raises(ValueError, match=r"one tensor.*input_shape="):
        model.build({"x": (None, 4, 2)})
    with pytest.raises(ValueError, match="num=1"):
        model.interpolate(X, X, num=1)
    with pytest.raises(ValueError, match=r"`x2` of.*\(4, 3, 2\)"):
        model.interpolate(X, X[:, :3])
    model = prior(2)
    with pytest.raises(ValueError, match=r"3 labels.*Received.*0 1"):
        model.sample(3, labels=[0, 1])
    with pytest.raises(ValueError, match=r"integers in `labels`.*float64"):
        model.sample(2, labels=[0.7, 1])
    model = prior()
    for arguments, message in (
        ((2.0,), "num=2.0"),
        ((-1,), "num=-1"),
        ((1, 1.0, 2.0), "top_k=2.0"),
        ((1, 1.0, 0), "top_k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(*arguments)
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"weight.shape=.*3, 4"):
        model.fit(MAPS, MAPS, sample_weight=np.ones(MAPS.shape))


@tensorflow_only
@every()
def test_where_keras_computes_in_float64(kind, request):
    """Keras sums the losses of layers with its own, which are float64."""
    request.addfinalizer(lambda: keras.config.set_floatx("float32"))
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    dense = layers.Dense(DIM)
    model = keras.Sequential([keras.Input((DIM,)), dense, QUANTIZERS[kind]()])
    model.compile("sgd", "mse", run_eagerly=True)
    x = np.random.default_rng(0).normal(size=(6, DIM))
    before = numpy(dense.kernel)
    assert np.isfinite(model.train_on_batch(x, x))
    assert not np.array_equal(numpy(dense.kernel), before)
