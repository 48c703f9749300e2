"""Frozen codes times a trained map: SimVQ (post 10519)."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import SLOW_FILE_ON_JAX, nearest_rows, value

from blogkeras import backend
from blogkeras.quantization import VectorQuantizer

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
DIM, CODES = 4, 8
Z = RNG.normal(size=(5, 3, DIM)).astype("float32")
E = RNG.normal(size=(CODES, DIM)).astype("float32")
MAPS = {
    "linear": RNG.normal(size=(DIM, DIM)).astype("float32"),
    "diagonal": RNG.uniform(0.5, 2, DIM).astype("float32"),
}
each_kind = pytest.mark.parametrize("kind", MAPS)


def quantizer(kind, **kwargs):
    layer = VectorQuantizer(CODES, codebook_transform=kind, **kwargs)
    layer.build((None, DIM))
    layer.embeddings.assign(E)
    layer.transform.assign(MAPS[kind])
    return layer


def codes_of(kind, transform=None):
    """E W in float64."""
    w = MAPS[kind] if transform is None else transform
    return E.astype("f8") @ (w if kind == "linear" else np.diag(w))


@each_kind
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_codes_are_the_product(kind, metric):
    def norm(x):
        x = x.astype("f8")
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        return x / length if metric == "cosine" else x

    layer = quantizer(kind, metric=metric)
    book = norm(codes_of(kind))
    k = nearest_rows(norm(Z), book)
    output, codes = layer(Z, return_codes=True)
    np.testing.assert_array_equal(value(codes), k)
    np.testing.assert_allclose(value(output), book[k], atol=1e-5)
    np.testing.assert_array_equal(value(layer.encode(Z)), k)
    np.testing.assert_array_equal(value(layer.decode(codes)), value(output))
    expected = 1.25 * np.mean((norm(Z) - book[k]) ** 2)
    np.testing.assert_allclose(float(layer.losses[0]), expected, rtol=1e-5)


@each_kind
@pytest.mark.parametrize("gradient", ["straight-through", "diveq-detach"])
def test_the_map_alone_learns(kind, gradient):
    layer = quantizer(kind, gradient=gradient)
    assert [w.path for w in layer.trainable_weights] == [layer.transform.path]
    z, u = Z.astype("f8"), RNG.normal(size=Z.shape)
    k = nearest_rows(z, codes_of(kind))

    def ours(w):
        mapping = [(layer.transform, w)]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            output = layer(Z)
        return ops.sum(u.astype("f4") * output) + sum(scope.losses), None

    slope = value(backend.value_and_grad(ours, MAPS[kind])[1])
    error = codes_of(kind)[k] - z
    direction = error / np.linalg.norm(error, axis=-1, keepdims=True)

    def theirs(w):  # the choice of codes and the directions stand still
        error = codes_of(kind, w)[k] - z
        if gradient == "straight-through":  # the loss of the codebook
            return np.mean(error**2)
        length = np.linalg.norm(error, axis=-1, keepdims=True)
        return np.sum(u * length * direction)

    for index in np.ndindex(slope.shape):
        step = np.zeros(slope.shape)
        step[index] = 1e-6
        w = MAPS[kind].astype("f8")
        expected = (theirs(w + step) - theirs(w - step)) / 2e-6
        np.testing.assert_allclose(slope[index], expected, atol=2e-5)


@each_kind
def test_training_moves_all_codes_and_is_resumed(kind, tmp_path):
    def make():
        model = keras.Sequential([keras.Input((3, DIM)), quantizer(kind)])
        model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=ON_JAX)
        return model

    whole, part = make(), make()
    for model in (whole, part):
        model.train_on_batch(Z, Z)
    layer = whole.layers[0]
    np.testing.assert_array_equal(value(layer.embeddings), E)
    moved = value(layer.decode(np.arange(CODES))) - codes_of(kind)
    assert np.abs(moved).max(axis=1).min() > 0.01
    part.save(tmp_path / "part.keras")
    part = keras.saving.load_model(tmp_path / "part.keras")
    for model in (whole, part):
        model.train_on_batch(Z, Z)
    for ours, theirs in zip(
        part.get_weights(), whole.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@each_kind
def test_adapt_starts_from_clusters_and_the_identity(kind):
    layer = quantizer(kind)
    plain = VectorQuantizer(CODES)
    plain.build((None, DIM))
    for quantizer_ in (layer, plain):
        quantizer_.adapt(Z)
    codes = np.arange(CODES)
    np.testing.assert_array_equal(
        value(layer.decode(codes)), value(plain.decode(codes))
    )
    layer.transform.assign(MAPS[kind])
    before = value(layer.decode(codes))
    with pytest.warns(UserWarning, match="3 of 8 codes"):
        layer.adapt(Z[0, :3])
    np.testing.assert_allclose(
        value(layer.decode(codes))[3:], before[3:], atol=1e-6
    )


def test_frozen_codes_are_normal_numbers():
    layer = VectorQuantizer(4096, codebook_transform="linear")
    layer.build((None, 16))
    codes = value(layer.embeddings)
    np.testing.assert_allclose(codes.std(), 0.25, rtol=0.02)
    assert np.abs(codes).max() > 4 * 0.25  # not truncated
    np.testing.assert_array_equal(value(layer.transform), np.eye(16))


def test_what_does_not_go_together():
    message = r"frozen codes, or moving averages.*ema_decay=0.9"
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(8, codebook_transform="linear", ema_decay=0.9)
    with pytest.raises(ValueError, match=r"'diagonal'.*transform='full'"):
        VectorQuantizer(8, codebook_transform="full")
