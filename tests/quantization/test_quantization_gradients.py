"""Gradients of quantized vectors: rotation and DiVeQ (posts 10489, 11328)."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import SLOW_FILE_ON_JAX, nearest_rows, value

from blogkeras import backend
from blogkeras.quantization import (
    VQVAE,
    ResidualVectorQuantizer,
    VectorQuantizer,
    gradients,
)

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
DIM, CODES = 4, 8
Z = RNG.normal(size=(5, 3, DIM)).astype("float32")
E = RNG.normal(size=(CODES, DIM)).astype("float32")
U = RNG.normal(size=Z.shape).astype("float32")
EXACT = ("straight-through", "rotation", "diveq-detach")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def single(**kwargs):
    layer = VectorQuantizer(CODES, **kwargs)
    layer.build((None, DIM))
    layer.embeddings.assign(E)
    return layer, [layer.embeddings]


def residual(**kwargs):
    layer = ResidualVectorQuantizer(2, CODES, **kwargs)
    layer.build((None, DIM))
    for stage, scale in zip(layer.stages, (1, 0.4), strict=True):
        stage.embeddings.assign(scale * E)
    return layer, [stage.embeddings for stage in layer.stages]


def codes_of(make, z):
    """`(q, [codes of each stage])` in float64."""
    z, total, codes = z.astype("f8"), 0, []
    for scale in (1,) if make is single else (1, 0.4):
        book = np.float32(scale) * E
        codes.append(nearest_rows(z - total, book))
        total = total + book[codes[-1]]
    return total, codes


def slopes(layer, books, z=Z, **call):
    """The gradient of Σ U output for the vectors and each codebook."""

    def output(args):
        z, *values = args
        with keras.StatelessScope([*zip(books, values, strict=True)]):
            return ops.sum(U * layer(z, **call)), None

    args = (z, *(book.value for book in books))
    return [value(g) for g in backend.value_and_grad(output, args)[1]]


def rotation(q, z):
    """sg[(‖q‖ / ‖z‖) R], written out as a matrix, in float64."""
    q0, z0 = unit(q), unit(z)
    w = unit(q0 + z0)
    matrix = np.eye(len(z)) + 2 * np.outer(q0, z0) - 2 * np.outer(w, w)
    return np.linalg.norm(q) / np.linalg.norm(z) * matrix


@pytest.mark.parametrize("make", [single, residual])
@pytest.mark.parametrize("gradient", EXACT)
def test_the_output_is_the_code_to_the_bit(make, gradient):
    layer, _ = make(gradient=gradient)
    z = np.concatenate([Z, 0 * Z, 1e5 * Z, -E[None, :3]])
    output, codes = layer(z, return_codes=True)
    np.testing.assert_array_equal(value(output), value(layer.decode(codes)))


@pytest.mark.parametrize("make", [single, residual])
def test_the_rotation_is_the_matrix(make):
    layer, books = make(gradient="rotation")
    q, _ = codes_of(make, Z)
    slope, *of_codes = slopes(layer, books)
    for z, code, u, found in zip(
        *(a.reshape(-1, DIM) for a in (Z, q, U, slope)), strict=True
    ):
        matrix = rotation(code, z.astype("f8"))
        np.testing.assert_allclose(matrix @ z, code, atol=1e-6)
        np.testing.assert_allclose(found, matrix.T @ u, atol=2e-5, rtol=2e-5)
    for book in of_codes:  # by the losses alone
        np.testing.assert_array_equal(book, 0)


def test_the_rotation_of_a_cosine_codebook():
    layer, books = single(gradient="rotation", metric="cosine")
    z, e = Z.reshape(-1, DIM).astype("f8"), unit(E.astype("f8"))
    q = e[nearest_rows(unit(z), e)]

    def output(x, row):  # the matrix stands still, the normalization does not
        return rotation(q[row], unit(z[row])) @ unit(x)

    slope = slopes(layer, books)[0].reshape(-1, DIM)
    for row, u in enumerate(U.reshape(-1, DIM)):
        for axis in range(DIM):
            step = 1e-6 * np.eye(DIM)[axis]
            ends = [output(z[row] + s, row) for s in (step, -step)]
            expected = u @ (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(slope[row, axis], expected, atol=2e-5)


@pytest.mark.parametrize("make", [single, residual])
def test_the_gradient_of_diveq_by_finite_differences(make):
    layer, books = make(gradient="diveq-detach")
    q, codes = codes_of(make, Z)
    z, u = Z.astype("f8"), U.astype("f8")
    direction = unit(q - z)

    def output(z, books):  # codes and directions stand still
        q = sum(book[k] for book, k in zip(books, codes, strict=True))
        length = np.linalg.norm(q - z, axis=-1, keepdims=True)
        return np.sum(u * (z + length * direction))

    point = [z, *(value(book, "f8") for book in books)]
    for which, slope in enumerate(slopes(layer, books)):
        for index in np.ndindex(slope.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in point]
                moved[which][index] += step
                ends.append(output(moved[0], moved[1:]))
            expected = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(slope[index], expected, atol=2e-5)


@pytest.mark.parametrize("gradient", EXACT)
def test_degenerate_vectors_have_finite_gradients(gradient):
    e, v = np.eye(3, dtype="f4")[:2]
    u = np.array([0.3, -2.0, 0.7], "f4")
    q = np.stack([e, e, e, 0 * e, 0 * e, e, 1e30 * e, 1e-30 * e, e])
    q = q.astype("f4")
    z = [0 * e, -e, e, e, 0 * e, 1e-38 * v, 1e29 * v, v, -e + 1e-7 * v]
    z = np.stack(z).astype("f4")

    def output(z):
        made = {
            "straight-through": gradients.straight_through,
            "rotation": gradients.rotated,
            "diveq-detach": gradients.directed,
        }[gradient](ops.convert_to_tensor(q), z)
        return ops.sum(made * u), made

    (_, made), slope = backend.value_and_grad(output, z)
    np.testing.assert_array_equal(value(made), q)
    slope = value(slope)
    assert np.isfinite(slope).all()
    if gradient == "rotation":
        expected = [u, u * [-1, 1, 1], u, 0 * u, u, u]
        np.testing.assert_allclose(slope[:6], expected, rtol=1e-6)
        # v is turned to e, and e to -v; the length is that of the code.
        quarter = np.array([-u[1], u[0], u[2]])
        np.testing.assert_allclose(slope[6], 10 * quarter, rtol=1e-6)
        np.testing.assert_allclose(slope[7], 1e-30 * quarter, rtol=1e-6)
    if gradient == "diveq-detach":
        np.testing.assert_array_equal(slope[2], u)  # z is the code


@pytest.mark.parametrize("gradient", [*EXACT, "diveq"])
def test_an_empty_batch(gradient):
    layer, books = single(gradient=gradient, metric="cosine")
    none = np.zeros((0, DIM), "f4")

    def output(args):
        mapping = [*zip(books, args, strict=True)]
        with keras.StatelessScope(mapping):
            return ops.sum(layer(none, training=True)), None

    (slope,) = backend.value_and_grad(output, [b.value for b in books])[1]
    np.testing.assert_array_equal(value(slope), 0)


def test_diveq_in_training_keeps_the_distance_and_moves_the_direction():
    z = np.zeros((4096, DIM), "f4")
    e = np.stack([np.array([1, 0, 0, 0]), np.full(DIM, 9)]).astype("f4")
    layer = VectorQuantizer(2, gradient="diveq", noise_variance=4e-4, seed=3)
    layer.build(z.shape)
    layer.embeddings.assign(e)
    np.testing.assert_array_equal(value(layer(z)), np.tile(e[:1], (4096, 1)))
    first, second = (value(layer(z, training=True), "f8") for _ in "ab")
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), 1, rtol=1e-5)
    # To first order, ε is seen at right angles to the code: N(0, σ²).
    across = first[:, 1:]
    np.testing.assert_allclose(across.std(), 0.02, rtol=0.03)
    np.testing.assert_allclose(across.mean(), 0, atol=4e-4)
    np.testing.assert_allclose(first[:, 0], 1 - 0.0002 * 3, atol=4e-3)
    again = VectorQuantizer(2, gradient="diveq", noise_variance=4e-4, seed=3)
    again.build(z.shape)
    again.embeddings.assign(e)
    np.testing.assert_array_equal(value(again(z, training=True)), first)
    # Without noise it is DiVeQ-detach.
    none, books = single(gradient="diveq", noise_variance=0.0)
    expected = slopes(*single(gradient="diveq-detach"))
    for ours, theirs in zip(
        slopes(none, books, training=True), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("make", [single, residual])
def test_diveq_needs_no_losses(make):
    for gradient, expected in (
        ("straight-through", (1.0, 0.25)),
        ("rotation", (1.0, 0.25)),
        ("diveq", (0.0, 0.0)),
        ("diveq-detach", (0.0, 0.0)),
    ):
        layer, _ = make(gradient=gradient)
        assert (layer.codebook_cost, layer.commitment_cost) == expected
        layer, _ = make(codebook_cost=0.5, gradient=gradient)
        assert layer.get_config()["codebook_cost"] == 0.5
    layer, books = make(gradient="diveq-detach")
    before = [value(book).copy() for book in books]
    layer(Z)
    assert [float(loss) for loss in layer.losses] == [0]
    model = keras.Sequential([keras.Input((3, DIM)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=ON_JAX)
    model.train_on_batch(Z, U)
    for book, old in zip(books, before, strict=True):
        assert np.abs(value(book) - old).max() > 1e-3


def autoencoder():
    keras.utils.set_random_seed(0)
    ends = [
        keras.Sequential([keras.Input((3, DIM)), keras.layers.Dense(DIM)])
        for _ in "ab"
    ]
    layer = ResidualVectorQuantizer(2, CODES, gradient="diveq", seed=1)
    model = VQVAE(ends[0], layer, ends[1])
    model.compile(keras.optimizers.Adam(0.05), jit_compile=ON_JAX)
    return model


def test_a_resumed_training_draws_on(tmp_path):
    whole, part = autoencoder(), autoencoder()
    for _ in range(4):
        whole.train_on_batch(Z, Z)
    for _ in range(2):
        part.train_on_batch(Z, Z)
    part.save(tmp_path / "part.keras")
    part = keras.saving.load_model(tmp_path / "part.keras")
    for _ in range(2):
        part.train_on_batch(Z, Z)
    for ours, theirs in zip(
        part.get_weights(), whole.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("cls", [VectorQuantizer, ResidualVectorQuantizer])
def test_bad_arguments(cls):
    args = [8] if cls is VectorQuantizer else [2, 8]
    for kwargs, message in (
        ({"gradient": "reinmax"}, "'rotation', 'diveq'.*gradient='reinmax'"),
        ({"noise_variance": -1.0}, "noise_variance=-1"),
        ({"seed": 1.5}, "seed=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(*args, **kwargs)
