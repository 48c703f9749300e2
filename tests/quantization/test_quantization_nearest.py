"""The nearest code: outliers, offsets, scales, ties, memory, bad shapes."""

import keras
import kit
import numpy as np
import pytest
from keras import ops
from kit import slow_on_jax

from blogkeras import backend
from blogkeras.quantization import (
    ResidualVectorQuantizer,
    VectorQuantizer,
    nearest,
    nearest_codes,
)

RNG = np.random.default_rng(0)
DIM, CODES = 16, 64
Z = RNG.normal(size=(1000, DIM))
E = RNG.normal(size=(CODES, DIM))


def far(rows, to):
    """The codebook with some of its codes moved away."""
    e = E.copy()
    e[rows] = to
    return e


compiled = backend.jit(nearest_codes)  # once for all tests of one shape


def check(z, e, function=compiled):
    z, e = z.astype("float32"), e.astype("float32")
    codes = kit.value(function(*map(ops.convert_to_tensor, (z, e))))
    kit.assert_nearest(codes, z, e)
    return codes


@pytest.mark.parametrize("size", [1e4, 1e5, 1e6, 1e12])
@pytest.mark.parametrize(
    "rows",
    [[5], [0], [63], [3, 10, 17, 24, 32, 39, 46, 53, 60], list(range(20))],
    ids=len,
)
def test_codes_far_from_the_others(size, rows):
    assert len(set(check(Z, far(rows, size)))) > 30
    directions = RNG.normal(size=(len(rows), DIM))
    check(Z, far(rows, size * directions))
    check(1e3 + Z, 1e3 + far(rows, size))


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_vectors_far_from_the_others(size):
    z = Z.copy()
    z[::10] += size * RNG.normal(size=(100, DIM))
    z[5::10] += size
    check(z, E)
    codes = check(z, far([7], size))
    np.testing.assert_array_equal(codes[5::10], 7)


@pytest.mark.parametrize("offset", [0, 1000, -1e4])
def test_a_common_offset(offset):
    check(Z + offset, E + offset)


def test_blocks_and_groups_that_divide_nothing(monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", CODES * 8)
    monkeypatch.setattr(nearest, "GROUP", 3)
    function = backend.jit(lambda *args: nearest_codes(*args))
    codes = check(Z, E, function)
    shaped = function(
        *map(ops.convert_to_tensor, (Z.reshape(10, 4, 25, DIM), E))
    )
    np.testing.assert_array_equal(kit.value(shaped).ravel(), codes)
    assert codes.dtype == "int32"


@pytest.mark.parametrize("distance", [1e3, 1e4, 1e5])
def test_groups_of_codes_far_apart(distance):
    z, e = Z.copy(), E.copy()
    z[::2] += distance
    e[::2] += distance
    codes = check(z, e)
    assert len(set(codes)) > 30
    z[1::4, 0] -= distance  # a third group, of vectors alone
    check(z, e)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_any_scale(scale):
    assert len(set(check(scale * Z, scale * E))) > 30
    # Codes with a component of their own are told apart by it, however far
    # the vectors are away.
    axes = np.eye(DIM, dtype="float32")
    codes = compiled(*map(ops.convert_to_tensor, (1e37 * axes, scale * axes)))
    np.testing.assert_array_equal(kit.value(codes), np.arange(DIM))


@slow_on_jax
def test_vectors_that_are_not_finite_get_a_code():
    z = Z[:9].astype("float32")
    z[0, 0], z[3, 2], z[5] = np.nan, np.inf, -np.inf
    codes = kit.value(nearest_codes(z, E.astype("float32")))
    assert codes.min() >= 0
    assert codes.max() < CODES
    fine = np.isfinite(z).all(-1)
    kit.assert_nearest(codes[fine], z[fine], E)


@pytest.mark.parametrize("group", [3, 64])
def test_of_equal_codes_the_first_is_taken(group, monkeypatch):
    monkeypatch.setattr(nearest, "GROUP", group)
    e = E[:8].astype("float32")
    function = backend.jit(lambda *args: nearest_codes(*args))
    for codebook, expected in (
        (np.concatenate([e, e]), np.arange(8)),
        (np.ones((5, DIM), "float32"), np.zeros(8)),
        (e[:1], np.zeros(8)),
    ):
        codes = function(*map(ops.convert_to_tensor, (e, codebook)))
        np.testing.assert_array_equal(kit.value(codes), expected)


def test_the_distances_of_all_vectors_are_never_in_memory():
    n, k, dim = 16384, 2048, 8
    z, e = np.zeros((n, dim), "float32"), np.zeros((k, dim), "float32")
    if kit.JAX:
        import jax

        program = jax.jit(nearest_codes).lower(z, e).compile()
        size = program.memory_analysis().temp_size_in_bytes
        assert size < n * k * 4 / 8
    else:
        function = backend.jit(nearest_codes)
        z, e = map(ops.convert_to_tensor, (z, e))
        hlo = function.experimental_get_compiler_ir(z, e)("optimized_hlo")
        assert f"[{n},{k}]" not in hlo
        assert f"[512,{k}]" in hlo


@pytest.mark.parametrize(
    ("z", "codebook"),
    [
        (np.ones((2, 3)), np.ones((4, 2))),
        (np.ones((2, 3)), np.ones(3)),
        (np.ones((2, 3)), np.ones((1, 4, 3))),
        (np.ones((2, 3)), np.ones((0, 3))),
        (np.float32(1), np.ones((4, 3))),
    ],
)
def test_shapes_that_do_not_fit(z, codebook):
    with pytest.raises(ValueError, match=r"Expected vectors .*z.shape="):
        nearest_codes(z, codebook)


# A batch with one spike in it: the codebook of a moving average gives one code
# to it, and goes on as the same algorithm does in float64.


def ema_in_float64(e, batches, decay):
    e, counts, sums = e.astype("float64"), 0, 0
    for step, z in enumerate(batches, start=1):
        z = z.astype("float64")
        k = np.argmin(np.sum((z[:, None] - e) ** 2, axis=-1), axis=1)
        hot = np.eye(len(e))[k]
        counts = decay * counts + (1 - decay) * hot.sum(0)
        sums = decay * sums + (1 - decay) * hot.T @ z
        n, s = (x / (1 - decay**step) for x in (counts, sums))
        n = (n + 1e-5) / (n.sum() + len(e) * 1e-5) * n.sum()
        e = s / n[:, None]
    return e


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
@pytest.mark.parametrize(("size", "stages"), [(1e5, 0), (1e7, 0), (1e5, 2)])
def test_a_spike_costs_one_code(size, stages):
    decay = 0.9
    # Clusters far enough apart that rounding changes no assignment.
    centers = 10 * RNG.normal(size=(CODES, DIM))
    batches = []
    for _ in range(30):
        z = centers[RNG.permutation(np.arange(256) % CODES)]
        batches.append((z + 0.1 * RNG.normal(size=z.shape)).astype("float32"))
    batches[4][17] = size
    start = (centers + 0.1).astype("float32")
    if stages:
        layer = ResidualVectorQuantizer(stages, CODES, ema_decay=decay)
        book = layer.stages[0]
    else:
        layer = book = VectorQuantizer(CODES, ema_decay=decay)
    layer.build((None, DIM))
    book.embeddings.assign(start)
    model = keras.Sequential([keras.Input((DIM,)), layer])
    model.compile("sgd", "mse", jit_compile=True)
    for z in batches:
        model.train_on_batch(z, z)
    expected = ema_in_float64(start, batches, decay)
    actual = kit.value(book.embeddings)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
    # Its vectors are left to the nearest other code, which moves between both.
    lost = np.abs(actual - centers).max(1) > 1
    assert lost.sum() == 2
    error = np.sum((batches[-1][:, None] - actual) ** 2, -1).min(1)
    assert np.mean(error < 1) == 1 - 2 / CODES
