"""What goes into a VQVAE: targets, shapes, data sets; its compiled verbs."""

import keras
import kit
import numpy as np
import pytest
from keras import layers, ops
from kit import slow_on_jax, slow_on_tensorflow

from blogkeras import loops
from blogkeras.quantization import (
    VQVAE,
    CodePrior,
    FiniteScalarQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    blog_autoencoder,
    kmeans,
    perplexity,
    sonnet_autoencoder,
    usage,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4, 4, 2)).astype("float32")
LABELS = np.arange(6)
DIM, CODES = 3, 5


def autoencoder(quantizer=None, shape=X.shape[1:], **kwargs):
    encoder = keras.Sequential([keras.Input(shape), layers.Conv2D(DIM, 2, 2)])
    decoder = keras.Sequential(
        [
            keras.Input(encoder.output_shape[1:]),
            layers.Conv2DTranspose(shape[-1], 2, 2),
        ]
    )
    model = VQVAE(encoder, quantizer or VectorQuantizer(CODES), decoder)
    model.compile("sgd", run_eagerly=not kit.JAX, **kwargs)
    return model


class Batches(keras.utils.PyDataset):
    """Batches of 4 and of 2."""

    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return tuple(a[4 * index : 4 * index + 4] for a in self.arrays)


def tf_dataset(*arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(4)


# Targets.


@slow_on_tensorflow
@pytest.mark.parametrize(
    "target",
    [
        LABELS,
        LABELS[:, None],
        LABELS[:, None, None, None].astype("float32"),  # would broadcast
        np.eye(6, dtype="float32"),
        X[..., :1],
        X[:, :2],
        X[..., None, None],
    ],
    ids=np.shape,
)
def test_targets_have_the_shape_of_the_output(target):
    model = autoencoder()
    for call in (
        lambda: model.fit(X, target, verbose=0),
        lambda: model.evaluate(X, target, verbose=0),
        lambda: model.fit(Batches(X, target), verbose=0),
        lambda: model.fit(X, verbose=0, validation_data=(X, target)),
    ):
        with pytest.raises(ValueError, match="targets of the shape of the dec"):
            call()


@slow_on_tensorflow
def test_a_dataset_of_inputs_and_labels():
    model = autoencoder()
    for data in (tf_dataset(X, LABELS), tf_dataset(X, LABELS).repeat(2)):
        with pytest.raises(ValueError, match=r"\(n, 4, 4, 2\).*shape \(n,\)"):
            model.fit(data, verbose=0, shuffle=False)
    losses = [
        model.evaluate(data, verbose=0)[0]
        for data in (X, tf_dataset(X), tf_dataset(X, X), Batches(X, X))
    ]
    # Batches of 6, and of 4 and 2: means over all rows.
    np.testing.assert_allclose(losses[1:], losses[1], rtol=1e-5)
    assert np.isfinite(losses).all()


@slow_on_tensorflow
def test_targets_that_keras_reshapes():
    gray = X[..., 0]
    encoder = keras.Sequential([keras.Input((4, 4)), layers.Dense(DIM)])
    decoder = keras.Sequential(
        [keras.Input((4, DIM)), layers.Dense(4), layers.Reshape((4, 4, 1))]
    )
    model = VQVAE(encoder, VectorQuantizer(CODES), decoder)
    model.compile("sgd")
    error = np.mean((model.reconstruct(gray)[..., 0] - gray) ** 2)
    model.quantizer.commitment_cost = model.quantizer.codebook_cost = 0
    loss = model.evaluate(gray, verbose=0)[0]
    np.testing.assert_allclose(loss, error, rtol=1e-5)


def scores(loss):
    """An autoencoder of tokens whose output is a score for each."""
    encoder = keras.Sequential(
        [keras.Input((4,), dtype="int32"), layers.Embedding(CODES, DIM)]
    )
    decoder = keras.Sequential([keras.Input((4, DIM)), layers.Dense(CODES)])
    model = VQVAE(encoder, VectorQuantizer(CODES), decoder)
    model.compile("sgd", loss, run_eagerly=not kit.JAX)
    return model


def test_tokens_are_targets_of_losses_that_take_tokens():
    tokens = RNG.integers(0, CODES, (6, 4)).astype("int32")

    def own(y, scores):
        return keras.losses.sparse_categorical_crossentropy(
            y, scores, from_logits=True
        )

    results = []
    for loss in (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        own,
    ):
        keras.utils.set_random_seed(0)
        results.append(scores(loss).evaluate(tokens, verbose=0)[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    scores("sparse_categorical_crossentropy").evaluate(tokens, verbose=0)
    for loss in ("mse", "categorical_crossentropy"):
        with pytest.raises(ValueError, match=r"\(n, 4, 5\).*\(n, 4\)"):
            scores(loss).fit(tokens, verbose=0)
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        scores(own).fit(tokens, LABELS, verbose=0)


def test_sizes_that_the_strides_do_not_divide():
    x = RNG.normal(size=(2, 6, 6, 2)).astype("float32")
    encoder = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(DIM, 4, 4, padding="same")]
    )
    decoder = keras.Sequential(
        [
            keras.Input((2, 2, DIM)),
            layers.Conv2DTranspose(2, 4, 4, padding="same"),
        ]
    )
    model = VQVAE(encoder, VectorQuantizer(CODES), decoder)
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"\(n, 8, 8, 2\).*\(n, 6, 6, 2\)"):
        model.fit(x, verbose=0)
    for function in (sonnet_autoencoder, blog_autoencoder):
        for shape in ((30, 32, 3), (32, 32), None, (32, 32, "3"), (0, 4, 1)):
            with pytest.raises(ValueError, match="input_shape="):
                function(shape)
        with pytest.raises(ValueError, match=r"dim=4.5"):
            function((32, 32, 3), dim=4.5)


@slow_on_jax
@pytest.mark.parametrize("name", ["sonnet", "blog", "prior"])
def test_channels_are_last_whatever_keras_is_told(name):
    def outputs():
        keras.utils.set_random_seed(0)
        if name == "prior":
            model = CodePrior(CODES, (2, 3), "convolution", dim=4, num_layers=1)
            return kit.value(model(LABELS.reshape(1, 2, 3) % CODES))
        if name == "sonnet":
            encoder, decoder = sonnet_autoencoder((4, 8, 2), 3, 4, 2, 1)
        else:
            encoder, decoder = blog_autoencoder((4, 8, 2), 3)
        return kit.value(decoder(encoder(np.ones((1, 4, 8, 2), "float32"))))

    expected = outputs()
    keras.config.set_image_data_format("channels_first")
    try:
        np.testing.assert_array_equal(outputs(), expected)
    finally:
        keras.config.set_image_data_format("channels_last")


# Shapes of inputs.


@slow_on_tensorflow
@pytest.mark.parametrize(
    "x",
    [X[0], X[:, :2], X[..., :1], X[0, 0, 0], X[None], X[..., 0]],
    ids=np.shape,
)
def test_inputs_have_the_encoders_shape(x):
    model = autoencoder()
    for call in (
        model.encode,
        model.reconstruct,
        lambda x: model.reconstruct(x, quantize=False),
        lambda x: model.interpolate(x, x),
        lambda x: model.interpolate(X, x),
        model.adapt,
        lambda x: model.encode(Batches(x)),
    ):
        with pytest.raises(ValueError, match=r"input shape, \(n, 4, 4, 2\)"):
            call(x)
    for call in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match="4, 4, 2"):
            call(x, verbose=0)


@pytest.mark.parametrize(
    "x", [None, "x", [["a"]], [[1], [2, 3]], object(), {}, X > 9j, iter([X])]
)
def test_inputs_are_numbers(x):
    model = autoencoder()
    if isinstance(x, np.ndarray):
        x = x.astype("complex64")
    for call in (model.encode, model.reconstruct, model.adapt):
        with pytest.raises(ValueError, match="Expected"):
            call(x)


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((2, 2), "int32"),
        np.zeros((1, 3, 2), "int32"),
        np.zeros((1, 2, 2, 1), "int32"),
        np.zeros((1, 2, 2)),
        np.zeros((1, 2, 2), bool),
        np.full((1, 2, 2), CODES),
        np.full((1, 2, 2), 2**32),  # JAX would make 0 of it
        [[["a", "b"], ["c", "d"]]],
        None,
    ],
)
def test_codes_have_the_decoders_shape(codes):
    model = autoencoder()
    model.build(X.shape)
    with pytest.raises(ValueError, match=r"Expected.*codes"):
        model.decode(codes)


def test_codes_of_the_first_stages_and_of_larger_maps():
    model = autoencoder(ResidualVectorQuantizer(3, CODES))
    codes = model.encode(X)
    z = kit.value(model.quantizer.decode(codes[..., :2]))
    np.testing.assert_allclose(
        model.decode(codes[..., :2]), kit.value(model.decoder(z)), atol=1e-5
    )
    encoder = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(3, 2, 2)])
    decoder = keras.Sequential(
        [keras.Input((None, None, 3)), layers.Conv2DTranspose(2, 2, 2)]
    )
    model = VQVAE(encoder, VectorQuantizer(CODES), decoder)
    model.build(X.shape)
    codes = np.zeros((1, 5, 3), "int32")
    assert model.decode(codes).shape == (1, 10, 6, 2)


def test_what_is_not_finite_is_named():
    model = autoencoder()
    model.compile("sgd")
    x = X.copy()
    x[3, 0, 0, 0] = np.nan
    for call in (
        model.encode,
        model.reconstruct,
        model.adapt,
        lambda x: model.interpolate(X, x),
    ):
        with pytest.raises(ValueError, match=r"finite.*row 3"):
            call(x)


# Data sets, and compiled verbs.


def test_verbs_take_data_sets():
    model = autoencoder()
    codes = model.encode(X)
    x = model.reconstruct(X)
    for data in (Batches(X), Batches(X, LABELS), tf_dataset(X, LABELS)):
        np.testing.assert_array_equal(model.encode(data), codes)
        np.testing.assert_array_equal(model.reconstruct(data), x)
    model.adapt(tf_dataset(X))
    assert len(set(model.encode(X).ravel())) == CODES
    with pytest.raises(ValueError, match="at least one batch"):
        model.encode(tf_dataset(X).take(0))


def test_integer_pictures():
    pictures = RNG.integers(0, 255, (6, 4, 4, 2)).astype("uint8")
    model = autoencoder()
    expected = model.encode(pictures.astype("float32"))
    np.testing.assert_array_equal(model.encode(pictures), expected)
    model.fit(pictures, verbose=0)


def test_verbs_are_compiled_once_and_follow_the_weights(monkeypatch):
    model = autoencoder()
    model.compile("sgd", jit_compile=kit.JAX)
    calls, call = [], model.encoder.call
    monkeypatch.setattr(
        model.encoder,
        "call",
        lambda *args, **kwargs: (calls.append(1), call(*args, **kwargs))[1],
    )
    model.encode(X, batch_size=4)
    count = len(calls)
    for size in (4, 4):
        model.encode(X, batch_size=size)
    assert len(calls) == count > 0
    # New weights, no new program.
    z = kit.value(call(ops.convert_to_tensor(X)))
    model.quantizer.embeddings.assign(z.reshape(-1, DIM)[:CODES])
    expected = kit.nearest_rows(z, model.quantizer.embeddings, margin=0)
    np.testing.assert_array_equal(model.encode(X, 4), expected)
    assert len(calls) == count
    for _ in range(3):
        model.reconstruct(X)
    assert isinstance(model._programs, loops.ProgramCache)
    assert model.losses == [] or all(
        np.isfinite(kit.value(loss)) for loss in model.losses
    )


def test_progress_is_shown(capsys):
    model = autoencoder()
    model.encode(X, batch_size=2, verbose=0)
    model.adapt(X)
    assert capsys.readouterr().out == ""
    model.encode(X, batch_size=2, verbose=1)
    assert "3/3" in capsys.readouterr().out
    model.adapt(X, iterations=7, batch_size=6, verbose=1)
    out = capsys.readouterr().out
    assert "1/1" in out
    assert "7/7" in out
    for verbose in (3, "yes", None):
        with pytest.raises(ValueError, match="verbose="):
            model.adapt(X, verbose=verbose)


def test_programs_of_k_means_are_bounded():
    layer = VectorQuantizer(2)
    for n in range(4, 4 + 2 * kmeans._PROGRAMS.size):
        if len(kmeans._PROGRAMS) < kmeans._PROGRAMS.size:
            kmeans._PROGRAMS.get(n, object)
    layer.adapt(np.eye(3, dtype="float32"), iterations=1)
    assert len(kmeans._PROGRAMS) == kmeans._PROGRAMS.size


@slow_on_jax
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = autoencoder(VectorQuantizer(CODES, ema_decay=0.9))
    model.fit(X, verbose=0)
    model.adapt(X)
    codes = model.encode(X)
    kit.assert_nearest(
        codes,
        np.asarray(kit.value(model.encoder(X)), "float32"),
        model.quantizer.embeddings,
        margin=0.1,
    )
    assert np.isfinite(np.asarray(model.reconstruct(X), "float32")).all()
    assert model.interpolate(X, X, 2).shape == (6, 2, 4, 4, 2)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 1.0}, "iterations=1.0"),
        ({"iterations": True}, "iterations=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_arguments_of_adapt(arguments, message):
    model = autoencoder()
    for call in (
        model.adapt,
        lambda x, **kwargs: VectorQuantizer(3).adapt(x, **kwargs),
        lambda x, **kwargs: ResidualVectorQuantizer(2, 3).adapt(x, **kwargs),
    ):
        with pytest.raises(ValueError, match=message):
            call(X, **arguments)


@pytest.mark.parametrize("vectors", ["x", None, [["a"]], [[1], [1, 2]]])
def test_vectors_are_numbers(vectors):
    for layer in (
        VectorQuantizer(3),
        ResidualVectorQuantizer(2, 3),
        FiniteScalarQuantizer([3, 3]),
    ):
        with pytest.raises(ValueError, match="Expected"):
            layer.encode(vectors)
        with pytest.raises(ValueError, match="Expected"):
            layer.adapt(vectors)


@pytest.mark.parametrize(
    "codes", [[1.0], [1.5], [True], ["a"], None, [None], 2**32, [-1], [CODES]]
)
def test_codes_are_integers(codes):
    layer = VectorQuantizer(CODES)
    layer.build((None, DIM))
    with pytest.raises(ValueError, match=r"Expected.*codes"):
        layer.decode(codes)
    with pytest.raises(ValueError, match=r"Expected.*codes"):
        layer.count(codes)


@pytest.mark.parametrize(
    "counts", ["x", None, [-1.0, 2], [np.nan, 1], [np.inf, 1], 3, [[1], [1, 2]]]
)
def test_counts_are_counts(counts):
    for measure in (perplexity, usage):
        with pytest.raises(ValueError, match="Expected"):
            measure(counts)


def test_arguments_of_sampling():
    model = CodePrior(CODES, (2, 2), num_classes=2, dim=4, num_heads=1)
    for arguments, message in (
        ({"temperature": np.inf}, "temperature=inf"),
        ({"temperature": np.nan}, "temperature=nan"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": True}, "temperature=True"),
        ({"num": True}, "num=True"),
        ({"num": "4"}, "num='4'"),
        ({"top_k": True}, "top_k=True"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"seed": "0"}, "seed='0'"),
        ({"labels": [True]}, "`labels`.*bool"),
        ({"labels": ["a"]}, "`labels`"),
        ({"labels": 0.0}, "`labels`.*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(**{"num": 1, "labels": 0, **arguments})
    for arguments, message in (
        ({"num_classes": 1.5}, "num_classes=1.5"),
        ({"dim": "4"}, "dim='4'"),
        ({"architecture": ["attention"]}, "architecture="),
        ({"code_shape": "22"}, "code_shape='22'"),
        ({"code_shape": (2.0, 2)}, "code_shape=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            CodePrior(**{"num_codes": 4, "code_shape": (2, 2), **arguments})


def test_a_mask_of_another_shape_is_refused():
    layer = VectorQuantizer(2)
    z = np.zeros((4, 3, 2), "float32")
    layer.build(z.shape)
    z = ops.convert_to_tensor(z)
    for shape in ((4, 3), (4,)):  # of vectors, and of rows of vectors
        layer._without_masked(z, np.ones(shape))
    for shape in ((4, 1), (1, 3), (3,)):
        with pytest.raises(ValueError, match="Expected a mask"):
            layer._without_masked(z, np.ones(shape))


@slow_on_jax
def test_cosine_takes_vectors_of_any_length():
    """The squares of these leave the range of float32."""
    layer = VectorQuantizer(2, metric="cosine")
    layer.build((None, 2))
    layer.embeddings.assign([[1e25, 0.0], [0.0, 1e-25]])
    z = np.array([[3e20, 1e20], [1e-25, 3e-25]], "float32")
    np.testing.assert_allclose(layer(z), np.eye(2), atol=1e-6)
