"""VQ-VAE and priors over codes: verbs, numbers, one compiled loop.

Post 6760.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kit import (
    nearest_rows,
    slow_on_jax,
    slow_on_tensorflow,
)

from blogkeras.quantization import (
    VQVAE,
    CodePrior,
    FiniteScalarQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    blog_autoencoder,
    perplexity,
    sonnet_autoencoder,
)

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
X = RNG.normal(size=(6, 4, 4, 2)).astype("float32")
DIM, CODES = 3, 5


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def autoencoder(quantizer=None):
    """4 × 4 × 2 to 2 × 2 × 3 and back, linear."""
    encoder = keras.Sequential(
        [keras.Input(X.shape[1:]), layers.Conv2D(DIM, 2, 2)]
    )
    decoder = keras.Sequential(
        [keras.Input((2, 2, DIM)), layers.Conv2DTranspose(2, 2, 2)]
    )
    return VQVAE(encoder, quantizer or VectorQuantizer(CODES), decoder)


def fitted(quantizer=None, **kwargs):
    model = autoencoder(quantizer)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=ON_JAX, **kwargs)
    model.build(X.shape)
    return model


# VQ-VAE.


def test_the_loss_is_reconstruction_plus_codes():
    model = fitted(metrics=["mae"])
    z = numpy(model.encoder(X))
    e = numpy(model.quantizer.embeddings)
    k = nearest_rows(z, e)
    x = numpy(model.decoder(e[k]))
    logs = model.train_on_batch(X, return_dict=True)
    expected = np.mean((x - X) ** 2) + 1.25 * np.mean((z - e[k]) ** 2)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(logs["mae"], np.abs(x - X).mean(), rtol=1e-5)
    p = np.bincount(k.ravel(), minlength=CODES) / k.size
    effective = np.exp(-(p * np.log(p + 1e-10)).sum())
    np.testing.assert_allclose(logs["perplexity"], effective, rtol=1e-5)
    np.testing.assert_allclose(logs["usage"], np.mean(p > 0))


def test_evaluation_counts_codes_and_changes_nothing():
    model = fitted(ResidualVectorQuantizer(2, CODES, ema_decay=0.9))
    before = model.get_weights()
    logs = model.evaluate(X, batch_size=6, verbose=0, return_dict=True)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    codes = model.encode(X)
    counts = [np.bincount(codes[..., i].ravel(), minlength=5) for i in (0, 1)]
    expected = np.mean([float(perplexity(c)) for c in counts])
    np.testing.assert_allclose(logs["perplexity"], expected, rtol=1e-5)
    np.testing.assert_allclose(logs["usage"], np.mean(np.array(counts) > 0))


def test_targets_and_sample_weights():
    weight = np.array([1, 1, 1, 0, 0, 0], "float32")
    # Scalars add no loss of their own: what is left is the reconstruction.
    model = fitted(FiniteScalarQuantizer([3] * DIM))
    x = model.reconstruct(X)
    error = ((x - X) ** 2).mean((1, 2, 3))
    loss = model.train_on_batch(X, sample_weight=weight, return_dict=True)
    np.testing.assert_allclose(loss["loss"], error[:3].sum() / 6, rtol=1e-5)
    # Keras alone ignores the weights of arrays that have no targets.
    arguments = {"sample_weight": weight, "batch_size": 6, "verbose": 0}
    model = fitted(FiniteScalarQuantizer([3] * DIM))
    error = ((model.reconstruct(X) - X) ** 2).mean((1, 2, 3))
    loss = model.evaluate(X, return_dict=True, **arguments)["loss"]
    np.testing.assert_allclose(loss, error[:3].sum() / 6, rtol=1e-5)
    logs = model.fit(X, validation_data=(X, None, weight), **arguments).history
    np.testing.assert_allclose(logs["loss"][0], loss, rtol=1e-5)
    error = ((model.reconstruct(X) - X) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(
        logs["val_loss"][0], error[:3].sum() / 6, rtol=1e-5
    )
    model = fitted(FiniteScalarQuantizer([3] * DIM))
    x = model.reconstruct(X)
    loss = model.train_on_batch(X, X + 1, return_dict=True)
    np.testing.assert_allclose(
        loss["loss"], np.mean((x - X - 1) ** 2), rtol=1e-5
    )


def absolute_error(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


@pytest.mark.parametrize("loss", [absolute_error, ["mae", "mse"]], ids=str)
def test_sample_weights_of_targets_without_a_last_axis(loss):
    """Targets are fitted as by Keras, which takes the first of two losses."""
    pictures = X[..., :1]
    encoder = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Conv2D(DIM, 2, 2)]
    )
    decoder = keras.Sequential(
        [keras.Input((2, 2, DIM)), layers.Conv2DTranspose(1, 2, 2)]
    )
    model = VQVAE(encoder, FiniteScalarQuantizer([3] * DIM), decoder)
    model.compile("sgd", loss, jit_compile=ON_JAX)
    model.build(pictures.shape)
    error = np.abs(model.reconstruct(pictures) - pictures).mean((1, 2, 3))
    weight = np.array([1, 1, 1, 0, 0, 0], "float32")
    logs = model.test_on_batch(
        pictures, pictures[..., 0], weight, return_dict=True
    )
    np.testing.assert_allclose(logs["loss"], error[:3].sum() / 6, rtol=1e-5)


def test_a_vqvae_takes_crossentropy_by_its_short_name():
    pictures = np.eye(3, dtype="float32")[RNG.integers(0, 3, (6, 4, 4))]
    encoder = keras.Sequential(
        [keras.Input((4, 4, 3)), layers.Conv2D(DIM, 2, 2)]
    )
    upwards = layers.Conv2DTranspose(3, 2, 2, activation="softmax")
    decoder = keras.Sequential([keras.Input((2, 2, DIM)), upwards])
    model = VQVAE(encoder, FiniteScalarQuantizer([3] * DIM), decoder)
    model.compile("sgd", "crossentropy", jit_compile=ON_JAX)
    model.build(pictures.shape)
    p = model.reconstruct(pictures)[pictures == 1]
    loss = model.test_on_batch(pictures, pictures.argmax(-1), return_dict=True)[
        "loss"
    ]
    np.testing.assert_allclose(loss, -np.log(p).mean(), rtol=1e-5)


def test_verbs_are_the_parts_in_turn():
    model = fitted()
    model.adapt(X)
    z = numpy(model.encoder(X))
    codes = model.encode(X, batch_size=4)  # the last batch is not full
    expected = nearest_rows(z, model.quantizer.embeddings)
    np.testing.assert_array_equal(codes, expected)
    x = numpy(model.decoder(model.quantizer.decode(codes)))
    np.testing.assert_allclose(model.decode(codes, 4), x, atol=1e-5)
    np.testing.assert_allclose(model.reconstruct(X, batch_size=4), x, atol=1e-5)
    np.testing.assert_allclose(model.predict(X, verbose=0), x, atol=1e-5)
    np.testing.assert_allclose(
        model.reconstruct(X, quantize=False), numpy(model.decoder(z)), atol=1e-5
    )
    between = model.interpolate(X[:3], X[3:], num=3)
    assert between.shape == (3, 3, *X.shape[1:])
    np.testing.assert_allclose(between[:, 0], x[:3], atol=1e-5)
    np.testing.assert_allclose(between[:, 2], x[3:], atol=1e-5)
    middle = numpy(model.quantizer((z[:3] + z[3:]) / 2))
    np.testing.assert_allclose(
        between[:, 1], numpy(model.decoder(middle)), atol=1e-5
    )


def test_adapt_uses_every_code():
    model = fitted(VectorQuantizer(CODES, ema_decay=0.99))
    model.adapt(X)
    assert set(model.encode(X).ravel()) == set(range(CODES))


@slow_on_tensorflow
def test_a_saved_model_trains_on_as_if_never_saved(tmp_path):
    def make():
        keras.utils.set_random_seed(3)
        quantizer = VectorQuantizer(CODES, ema_decay=0.9, restart_threshold=0.1)
        model = autoencoder(quantizer)
        model.compile(
            keras.optimizers.Adam(0.01), loss_weights=[2], jit_compile=ON_JAX
        )
        return model

    whole, part = make(), make()
    whole.fit(X, batch_size=3, epochs=4, shuffle=False, verbose=0)
    part.fit(X, batch_size=3, epochs=2, shuffle=False, verbose=0)
    part.save(tmp_path / "part.keras")
    part = keras.saving.load_model(tmp_path / "part.keras")
    part.fit(X, batch_size=3, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(
        part.get_weights(), whole.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_networks_of_sonnet_and_of_the_post():
    encoder, decoder = sonnet_autoencoder((32, 32, 3))
    # Sonnet's own model has as many, besides the codebook.
    assert encoder.count_params() + decoder.count_params() == 662_723
    assert encoder.output_shape == (None, 8, 8, 64)
    assert decoder.output_shape == (None, 32, 32, 3)
    kernel = numpy(encoder.layers[-1].kernel)  # 1 × 1 × 128 × 64
    # A normal law cut at two deviations has 0.8796 of its deviation.
    np.testing.assert_allclose(kernel.std(), 0.8796 * 128**-0.5, rtol=0.03)
    dim, blocks = 8, 3
    encoder, decoder = blog_autoencoder((128, 128, 3), dim)
    block = 9 * dim**2 + dim + 4 * dim + dim**2 + dim
    assert encoder.count_params() == (
        (16 * 3 * dim + dim)
        + (16 * dim**2 + dim)
        + 2 * 4 * dim
        + blocks * block
        + (blocks - 1) * 4 * dim
    )
    assert decoder.count_params() == (
        blocks * (block + 4 * dim)
        + (16 * dim**2 + dim)
        + 4 * dim
        + (16 * 3 * dim + 3)
    )
    assert decoder.output_shape == (None, 128, 128, 3)
    assert encoder.output_shape == (None, 32, 32, dim)


# Priors.

SHAPE, CLASSES = (3, 4), 2
MAPS = RNG.integers(0, CODES, (7, *SHAPE)).astype("int32")
LABELS = RNG.integers(0, CLASSES, 7).astype("int32")


def prior(architecture, num_classes=None, **kwargs):
    """With weights large enough that everything matters."""
    model = CodePrior(
        CODES, SHAPE, architecture, num_classes, 8, 2, 2, **kwargs
    )
    model.build()
    rng = np.random.default_rng(1)
    for weight in model.weights:
        value = rng.normal(size=weight.shape)
        if len(weight.shape) == 1:
            value = 0.2 * value + ("gamma" in weight.path)
        else:
            value *= 2 * np.prod(weight.shape[:-1]) ** -0.5
        weight.assign(value)
    return model


def both(test):
    return pytest.mark.parametrize("kind", ["attention", "convolution"])(test)


@slow_on_jax
@both
def test_a_code_depends_on_codes_before_it_alone(kind):
    model = prior(kind)
    logits = numpy(model(MAPS)).reshape(7, 12, CODES)
    t = 6
    later, before = MAPS.reshape(7, 12).copy(), MAPS.reshape(7, 12).copy()
    later[:, t:] = (later[:, t:] + 1) % CODES
    before[:, t - 1] = (before[:, t - 1] + 1) % CODES
    later, before = (
        numpy(model(m.reshape(7, *SHAPE))).reshape(7, 12, CODES)
        for m in (later, before)
    )
    np.testing.assert_allclose(later[:, : t + 1], logits[:, : t + 1], atol=1e-5)
    assert np.abs(later[:, t + 1 :] - logits[:, t + 1 :]).max() > 0.1
    np.testing.assert_allclose(before[:, :t], logits[:, :t], atol=1e-5)
    assert np.abs(before[:, t] - logits[:, t]).max() > 0.1


def test_pixel_attention_is_the_posts():
    """The script's network, in NumPy."""
    model, net = prior("attention"), None
    net = model.network
    w = {v.path.split("network/", 1)[1]: numpy(v) for v in net.weights}

    def norm(h, i):
        mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        h = (h - mean) / np.sqrt(var + 1e-3)
        return h * w[f"norm_{i}/gamma"] + w[f"norm_{i}/beta"]

    tokens = np.pad(MAPS.reshape(7, 12)[:, :-1] + 1, [[0, 0], [1, 0]])
    row, column = np.divmod(np.arange(12), 4)
    h = w["tokens/embeddings"][tokens]
    h = h + w["axis_0/embeddings"][row] + w["axis_1/embeddings"][column]
    h = norm(h, 0)
    for i in range(2):
        q, k, v = (
            (h @ w[f"attention_{i}/{n}/kernel"]).reshape(7, 12, 2, 4)
            for n in ("query", "key", "value")
        )
        a = np.einsum("btnd,bsnd->bnts", q, k) / 4**0.5
        a = np.where(np.tri(12, dtype=bool), a, -np.inf)
        a = np.exp(a - a.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        o = np.einsum("bnts,bsnd->btnd", a, v).reshape(7, 12, 8)
        o = o @ w[f"attention_{i}/output/kernel"]
        o = np.maximum(o + w[f"attention_{i}/output/bias"], 0)
        h = norm(h + o, i + 1)
    logits = h @ w["head/kernel"] + w["head/bias"]
    np.testing.assert_allclose(
        numpy(model(MAPS)).reshape(7, 12, CODES), logits, atol=1e-4
    )


def test_a_causal_convolution_is_a_masked_one():
    net = prior("convolution").network
    h = RNG.normal(size=(2, *SHAPE, 4)).astype("float32")
    layer = net.convolutions[0]  # 3 × 3, sees itself
    kernel, bias = numpy(layer.kernel), numpy(layer.bias)
    full = np.pad(kernel, [[0, 1], [0, 0], [0, 0], [0, 0]])
    full[1, 2] = 0
    padded = np.pad(h, [[0, 0], [1, 1], [1, 1], [0, 0]])
    expected = np.zeros((2, *SHAPE, 4))
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + 3, j : j + 4]
            expected += part @ full[i, j]
    np.testing.assert_allclose(numpy(layer(h)), expected + bias, atol=1e-5)


def uncached(model, u, temperature, top_k, labels):
    """The post's loop: the whole map again for every code. In NumPy."""
    codes = np.zeros((u.shape[1], *SHAPE), "int32")
    for t in range(len(u)):
        inputs = codes if labels is None else [codes, labels]
        logits = numpy(model(inputs)).reshape(len(codes), 12, CODES)[:, t]
        for n, row in enumerate(logits.astype("f8") / temperature):
            kept = np.argsort(-row)[: top_k or CODES]
            p = np.zeros(CODES)
            p[kept] = np.exp(row[kept] - row.max())
            total = np.cumsum(p / p.sum())
            assert np.abs(total - u[t, n]).min() > 1e-5  # left to no rounding
            below = total <= u[t, n]
            codes[n].flat[t] = below.sum()
    return codes


@slow_on_tensorflow
@both
@pytest.mark.parametrize("classes", [None, CLASSES])
def test_sampling_with_a_cache_is_sampling_without(kind, classes):
    model = prior(kind, classes)
    labels = None if classes is None else np.array([0, 1, 1])
    options = (0.8, 3) if classes else (1.0, None)
    drawn = model.sample(3, *options, labels=labels, seed=4)
    u = numpy(keras.random.uniform((12, 3), seed=4))
    np.testing.assert_array_equal(drawn, uncached(model, u, *options, labels))
    assert drawn.dtype == "int32"
    assert len(np.unique(drawn)) > 1


def test_sampling_compiles_once_and_follows_the_weights():
    model, traces = prior("attention"), []
    step = model.network.step
    model.network.step = lambda *args: (traces.append(1), step(*args))[1]
    first = model.sample(2, 1.0, 1, seed=0)
    count = len(traces)
    for temperature, seed in ((0.5, 1), (2.0, 2)):  # top_k=1: no chance left
        again = model.sample(2, temperature, 1, seed=seed)
        np.testing.assert_array_equal(first, again)
    bias = model.network.head.bias
    bias.assign(1e3 * np.eye(CODES)[3])
    np.testing.assert_array_equal(model.sample(2, 1.0, 1, seed=0), 3)
    assert len(traces) == count > 0


@slow_on_jax
def test_samples_have_the_models_probabilities():
    model = prior("attention")
    num = 4000
    drawn = model.sample(num, seed=9)[:, 0, 0]
    logits = numpy(model(MAPS[:1]))[0, 0, 0].astype("f8")
    p = np.exp(logits) / np.exp(logits).sum()
    expected = num * p
    counts = np.bincount(drawn, minlength=CODES)
    # χ² of 4 degrees of freedom exceeds 18.5 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 18.5


@both
def test_the_loss_is_in_nats(kind):
    model = prior(kind, CLASSES)
    model.compile(keras.optimizers.SGD(0.0), jit_compile=ON_JAX)
    logits = numpy(model([MAPS, LABELS])).astype("f8")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, MAPS[..., None], -1))
    nats = nats.sum((1, 2, 3))
    logs = model.train_on_batch([MAPS, LABELS], return_dict=True)
    np.testing.assert_allclose(logs["nats"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], nats.mean() / 12, rtol=1e-5)
    weight = np.arange(7, dtype="float32")
    logs = model.evaluate(
        [MAPS, LABELS],
        MAPS,  # without a target Keras forgets the weights
        sample_weight=weight,
        batch_size=7,
        verbose=0,
        return_dict=True,
    )
    mean = (weight * nats).sum() / weight.sum()
    np.testing.assert_allclose(logs["nats"], mean, rtol=1e-5)


@both
@slow_on_jax
def test_a_prior_learns_and_reloads(kind, tmp_path):
    model = CodePrior(CODES, SHAPE, kind, CLASSES, 16, 1, 2)
    model.compile(keras.optimizers.Adam(0.01), jit_compile=ON_JAX)
    # Each class is one fixed map: nothing is left to chance.
    maps = MAPS[:2][LABELS]
    many = [np.tile(maps, (100, 1, 1)), np.tile(LABELS, 100)]
    model.fit(many, epochs=3, batch_size=14, verbose=0)
    drawn = model.sample(4, top_k=1, labels=[0, 1, 0, 1], seed=0)
    np.testing.assert_array_equal(drawn, MAPS[[0, 1, 0, 1]])
    model.save(tmp_path / "prior.keras")
    loaded = keras.saving.load_model(tmp_path / "prior.keras")
    for old, new in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(numpy(new), numpy(old), old.path)
    np.testing.assert_array_equal(
        loaded.sample(2, top_k=1, labels=1, seed=0), MAPS[[1, 1]]
    )


def test_attention_takes_codes_of_any_rank():
    model = CodePrior(CODES, (2, 2, 3), dim=8, num_layers=1, num_heads=2)
    assert model(np.zeros((1, 2, 2, 3), "int32")).shape == (1, 2, 2, 3, CODES)
    assert model.sample(2, seed=0).shape == (2, 2, 2, 3)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(policy):
    for kind in ("attention", "convolution"):
        model = CodePrior(CODES, SHAPE, kind, None, 8, 1, 2, dtype=policy)
        logits = model(MAPS)
        assert keras.backend.standardize_dtype(logits.dtype) == "float32"
        assert np.isfinite(numpy(logits)).all()
        assert model.sample(2, seed=0).max() < CODES


def test_bad_input():
    encoder, decoder = autoencoder().encoder, autoencoder().decoder
    with pytest.raises(ValueError, match=r"keras.Sequential.*encoder="):
        VQVAE(layers.Dense(3), VectorQuantizer(4), decoder)
    with pytest.raises(ValueError, match="Expected a quantizer"):
        VQVAE(encoder, layers.Dense(3), decoder)
    model = fitted()
    with pytest.raises(ValueError, match=r"at most 4.*from 5 to 5"):
        model.decode(np.full((1, 2, 2), 5))
    with pytest.raises(ValueError, match="at least one row"):
        model.encode(X[:0])
    with pytest.raises(ValueError, match=r"\(2, 4.* and \(3, 4"):
        model.interpolate(X[:2], X[:3])
    with pytest.raises(ValueError, match="architecture='rnn'"):
        CodePrior(4, (2, 2), "rnn")
    with pytest.raises(ValueError, match=r"code_shape=\(2, 2, 2\)"):
        CodePrior(4, (2, 2, 2), "convolution")
    with pytest.raises(ValueError, match="dim=9, num_heads=2"):
        CodePrior(4, (2, 2), dim=9, num_heads=2)
    model = prior("attention")
    with pytest.raises(ValueError, match="temperature=0"):
        model.sample(1, 0)
    with pytest.raises(ValueError, match="top_k=6"):
        model.sample(1, top_k=6)
    with pytest.raises(ValueError, match="labels=0, num_classes=None"):
        model.sample(1, labels=0)
    with pytest.raises(ValueError, match="2 inputs"):
        model([MAPS, LABELS])
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        model(MAPS[:, :2])
    with pytest.raises(ValueError, match=r"`labels`.*at most 1"):
        prior("attention", 2).sample(1, labels=2)


def test_training_and_evaluation_compile_whole():
    model = autoencoder(
        VectorQuantizer(CODES, ema_decay=0.9, restart_threshold=0.1)
    )
    model.compile("sgd", jit_compile=True)
    history = model.fit(
        X, batch_size=6, epochs=2, validation_data=(X,), verbose=0
    ).history
    assert np.isfinite(history["loss"] + history["val_loss"]).all()
