"""The shared mathematics against NumPy and finite differences."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import (
    assert_full_precision,
    jax_only,
    slow_on_jax,
    tensorflow_only,
    value,
)

from blogkeras import backend
from blogkeras import ops as shared

RNG = np.random.default_rng(0)


def gradient(fn, x):
    x = ops.convert_to_tensor(x, "float32")
    return value(backend.value_and_grad(lambda x: (fn(x), None), x)[1])


def test_safe_norm():
    x = RNG.normal(size=(4, 3)).astype("float32")
    for axis, keepdims in ((None, False), (-1, False), (0, True)):
        np.testing.assert_allclose(
            value(shared.safe_norm(x, axis, keepdims)),
            np.linalg.norm(x, axis=axis, keepdims=keepdims),
            rtol=1e-6,
        )
    np.testing.assert_allclose(
        gradient(lambda x: ops.sum(shared.safe_norm(x, -1)), x),
        x / np.linalg.norm(x, axis=-1, keepdims=True),
        rtol=1e-5,
    )


def test_safe_norm_at_zero():
    x = np.array([[0.0, 0.0], [3.0, 4.0]], "float32")
    np.testing.assert_array_equal(value(shared.safe_norm(x, -1)), [0, 5])
    np.testing.assert_allclose(
        gradient(lambda x: ops.sum(shared.safe_norm(x, -1)), x),
        [[0, 0], [0.6, 0.8]],
        rtol=1e-6,
    )


def test_masked_mean():
    x = np.array(
        [[1.0, 3.0, np.nan], [5.0, np.nan, np.nan], [np.nan] * 3], "float32"
    )
    mask = ~np.isnan(x)
    np.testing.assert_array_equal(
        value(shared.masked_mean(x, mask, axis=1)), [2, 5, 0]
    )
    assert float(shared.masked_mean(x, mask)) == 3
    assert float(shared.masked_mean(np.ones((2, 3), "float32"))) == 1
    # A mask of positions, aligned with the first axes.
    x = RNG.normal(size=(2, 3, 4)).astype("float32")
    mask = np.array([[True, False, True], [False, True, False]])
    np.testing.assert_allclose(
        value(shared.masked_mean(x, mask, axis=1)),
        [x[0, [0, 2]].mean(0), x[1, 1]],
        rtol=1e-6,
    )
    assert np.isfinite(
        gradient(lambda x: ops.sum(shared.masked_mean(x, mask, 1)), x)
    ).all()


def exact_distances(x, y):
    """In float64, by differences, of the float32 numbers."""
    x, y = (np.asarray(a, "float32").astype("float64") for a in (x, y))
    return np.square(x[..., :, None, :] - y[..., None, :, :]).sum(-1)


def cancelling(kind, dim, size=1e3):
    """Two sets of vectors whose distances lose digits in some formula."""
    rng = np.random.default_rng(dim)
    x, y = rng.normal(size=(2, 20, dim)), rng.normal(size=(2, 30, dim))
    if kind == "offset":
        x, y = x + size, y + size
    elif kind == "outlier":
        y[:, 3] = size
    elif kind == "outliers in both":
        y[:, [3, 17]], x[:, 11] = size, size + 1
    elif kind == "equal":
        y[:, :20] = x
    elif kind == "near":
        y[:, :20] = x + 1e-3 * rng.normal(size=x.shape)
    elif kind == "two groups":
        x[:, 10:] += size
        y[:, :20] = x + 0.1 * rng.normal(size=x.shape)
    return x.astype("float32"), y.astype("float32")


KINDS = [
    "plain",
    "offset",
    "outlier",
    "outliers in both",
    "equal",
    "near",
    "two groups",
]


@pytest.mark.parametrize("dim", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_squared_distances(kind, dim):
    """Of few features by differences; else where products cancel."""
    fn = backend.jit(shared.squared_distances)
    for size in (1e2, 1e5, 1e7):
        x, y = cancelling(kind, dim, size)
        np.testing.assert_allclose(
            value(fn(x, y)), exact_distances(x, y), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("dim", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_squared_distances(kind, dim):
    """d/dxᵢ Σ gᵢⱼ ‖xᵢ − yⱼ‖² = Σⱼ 2 gᵢⱼ (xᵢ − yⱼ), with g = 1/distance."""
    x, y = cancelling(kind, dim)
    d2 = exact_distances(x, y)
    g = np.where(d2 > 0, 1 / np.sqrt(np.where(d2 > 0, d2, 1)), 1)
    terms = 2 * g[..., None] * (x.astype("f8")[:, :, None] - y[:, None])
    weights = ops.convert_to_tensor(g, "float32")

    def slopes(x, y):
        def loss(args):
            return ops.sum(weights * shared.squared_distances(*args)), None

        return backend.value_and_grad(loss, (x, y))[1]

    arguments = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    to_x, to_y = backend.jit(slopes)(*arguments)
    for slope, expected in (to_x, terms.sum(2)), (to_y, -terms.sum(1)):
        np.testing.assert_allclose(value(slope), expected, rtol=1e-4, atol=1e-4)


def test_second_gradient_of_squared_distances():
    """d²/dx² Σ (d²)² along v is 2 Σ (2 v·(x − y))² + 2 d² · 2 ‖v‖²."""
    x, y = cancelling("two groups", 12)
    rng = np.random.default_rng(0)
    v = rng.normal(size=x.shape).astype("float32")

    def along(t):
        def loss(x):
            return ops.sum(shared.squared_distances(x, y) ** 2), None

        slope = backend.value_and_grad(loss, x + t * v)[1]
        return ops.sum(slope * v), None

    zero = ops.zeros((), "float32")
    fn = backend.jit(lambda t: backend.value_and_grad(along, t)[1])
    found = value(fn(zero))
    difference = x.astype("f8")[:, :, None] - y[:, None]
    inner = (difference * v[:, :, None]).sum(-1)
    squares = np.square(v.astype("f8")).sum(-1)[..., None]
    expected = 8 * inner**2 + 4 * exact_distances(x, y) * squares
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-4)


@slow_on_jax
def test_squared_distances_broadcast_leading_axes():
    x, y = RNG.normal(size=(1, 5, 12)), RNG.normal(size=(3, 4, 12))
    for some in (x, x[0]):
        d2 = value(shared.squared_distances(some.astype("f4"), y.astype("f4")))
        assert d2.shape == (3, 5, 4)
        np.testing.assert_allclose(d2, exact_distances(x, y), rtol=1e-5)
        slope = gradient(
            lambda z: ops.sum(shared.squared_distances(z, y.astype("f4"))), some
        )
        expected = 2 * (x[:, :, None] - y[:, None]).sum((0, 2))
        np.testing.assert_allclose(
            np.reshape(slope, (5, 12)), expected, atol=1e-4
        )


def test_squared_distances_of_unknown_sizes():
    """As in a model with free batch size and length."""
    x, y = cancelling("two groups", 40)
    inputs = [keras.Input((None, 40)) for _ in range(2)]
    outputs = keras.layers.Lambda(
        lambda xy: shared.squared_distances(*xy),
        output_shape=lambda shapes: (None, None, None),
    )(inputs)
    model = keras.Model(inputs, outputs)
    np.testing.assert_allclose(
        model.predict([x, y], verbose=0), exact_distances(x, y), rtol=1e-5
    )


def test_a_tolerance_keeps_the_products():
    """Of vectors to themselves, where rounding is below the tolerance."""
    x = RNG.normal(size=(50, 20)).astype("float32")
    exact = exact_distances(x, x)
    by_differences = value(shared.squared_distances(x, x))
    np.testing.assert_array_equal(np.diag(by_differences), 0)
    by_products = value(shared.squared_distances(x, x, tolerance=1e-3))
    assert np.diag(by_products).max() > 0
    np.testing.assert_allclose(by_products, exact, atol=1e-3, rtol=1e-5)
    # Rounding above the tolerance: differences again.
    far = x + np.float32(1e4) * (np.arange(50) < 25)[:, None]
    far = far.astype("float32")
    np.testing.assert_allclose(
        value(shared.squared_distances(far, far, tolerance=1e-3)),
        exact_distances(far, far),
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_code(kind):
    """One code of 64 far away, or all of them: as in float64."""
    rng = np.random.default_rng(7)
    fn = backend.jit(shared.squared_distances)
    for size in (1e4, 1e5, 1e6):
        codes = rng.normal(size=(64, 16))
        z = rng.normal(size=(1000, 16))
        if kind == "offset":
            codes, z = codes + size, z + size
        elif "outlier" in kind:
            codes[5] = size
        elif kind == "two groups":
            codes[32:] += size
            z[500:] += size
        exact = exact_distances(z, codes)
        d2 = fn(z.astype("float32"), codes.astype("float32"))
        found = np.argmin(value(d2), axis=1)
        two = np.sort(exact, axis=1)[:, :2]
        sure = two[:, 1] > two[:, 0] * (1 + 1e-4)
        np.testing.assert_array_equal(
            found[sure], np.argmin(exact, axis=1)[sure]
        )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@jax_only
def test_products_are_of_full_precision_on_accelerators(platform):
    """In the program that XLA is given for them, the gradient's too."""
    import jax

    def slope(x, y):
        return jax.grad(lambda x: ops.sum(shared.squared_distances(x, y)))(x)

    def product(x, y):
        return shared.full_precision_matmul(x, ops.transpose(y))

    x = jax.ShapeDtypeStruct((9, 16), "float32")
    for fn in (product, shared.squared_distances, slope):
        exported = jax.export.export(jax.jit(fn), platforms=[platform])(x, x)
        assert_full_precision(exported.mlir_module())


@pytest.mark.parametrize("rows", [3, 8, 10])
def test_map_blocks(rows):
    x = RNG.normal(size=(rows, 3)).astype("float32")
    seen = []

    def fn(block):
        seen.append(block.shape[0])
        return {"sum": ops.sum(block, -1), "max": ops.max(block, -1)}

    out = shared.map_blocks(fn, ops.convert_to_tensor(x), 4)
    np.testing.assert_allclose(value(out["sum"]), x.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(value(out["max"]), x.max(-1))
    assert max(seen) <= 4


@tensorflow_only
def test_a_few_rows_do_not_fill_a_block():
    """Where their number is unknown, as in exported models."""
    import tensorflow as tf

    def sizes(x):
        return shared.map_blocks(
            lambda block: ops.full_like(block, ops.shape(block)[0]), x, 4
        )

    spec = [tf.TensorSpec((None,), "float32")]
    for compiled in (False, True):
        program = tf.function(sizes, spec, jit_compile=compiled)
        for rows in (0, 1, 3, 4, 6):
            expected = [min(rows, 4)] * rows
            found = program(np.zeros(rows, "float32"))
            assert found.numpy().tolist() == expected


def test_map_blocks_under_jit_with_a_gradient():
    x = RNG.normal(size=(10, 3)).astype("float32")

    def loss(x):
        return ops.sum(shared.map_blocks(lambda b: b**2, x, 4)), None

    fn = backend.jit(lambda x: backend.value_and_grad(loss, x)[1])
    np.testing.assert_allclose(
        value(fn(ops.convert_to_tensor(x))), 2 * x, rtol=1e-6
    )


def test_map_blocks_never_holds_the_whole_matrix():
    if backend.BACKEND != "jax":
        pytest.skip("JAX tells the memory of a compiled program")
    import jax

    x, y = (np.ones((4096, 8), "float32") for _ in range(2))

    def nearest(x, y):
        return shared.map_blocks(
            lambda b: ops.argmin(shared.squared_distances(b, y), -1), x, 64
        )

    memory = jax.jit(nearest).lower(x, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 * 4 / 8


def test_straight_through():
    x = np.array([0.2, 1.7, -0.6], "float32")

    def fn(x):
        return shared.straight_through(ops.round(x), x)

    np.testing.assert_array_equal(value(fn(x)), [0, 2, -1])
    far = value(shared.straight_through(x, np.float32(1e5) * x))
    np.testing.assert_array_equal(far, x)
    far = value(backend.jit(shared.straight_through)(x, np.float32(1e5) * x))
    np.testing.assert_array_equal(far, x)
    weights = np.array([1.0, 2.0, 3.0], "float32")
    np.testing.assert_array_equal(
        gradient(lambda x: ops.sum(fn(x) * weights), x), weights
    )
    for shape in ((3,), (1, 3), (3, 2)):
        with pytest.raises(ValueError, match="one shape"):
            shared.straight_through(np.ones(shape, "f4"), np.ones((2, 3), "f4"))


def test_straight_through_is_public():
    import blogkeras

    assert blogkeras.straight_through is shared.straight_through
    assert keras.backend.backend() == backend.BACKEND
