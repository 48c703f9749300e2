"""The shared mathematics against NumPy and finite differences."""

import keras
import numpy as np
import pytest
from keras import ops

from blogkeras import backend
from blogkeras import ops as shared

RNG = np.random.default_rng(0)


def value(x):
    return np.asarray(ops.convert_to_numpy(x))


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


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_squared_distances(shift):
    x, y = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(2, 4, 3))
    expected = ((x[:, :, None] - y[:, None]) ** 2).sum(-1)
    x = (x + shift).astype("float32")
    y = (y + shift).astype("float32")
    exact = ((x.astype("f8")[:, :, None] - y[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(expected, exact, atol=1e-2)
    # Without the shift to the mean the error at 1e3 is about 1.
    np.testing.assert_allclose(
        value(shared.squared_distances(x, y)), exact, atol=1e-5
    )


def test_squared_distances_are_never_negative():
    x = np.full((3, 2), 0.1, "float32")
    x = np.concatenate([x, -x])
    d = value(shared.squared_distances(x, x))
    assert (d >= 0).all()
    np.testing.assert_allclose(np.diag(d), 0, atol=1e-7)


@pytest.mark.skipif(
    backend.BACKEND != "jax", reason="TensorFlow has one switch for all"
)
def test_squared_distances_are_of_full_precision():
    import jax

    def slope(x, y):
        return jax.grad(lambda x: ops.sum(shared.squared_distances(x, y)))(x)

    for fn in (shared.squared_distances, slope):
        text = jax.jit(fn).lower(np.ones((9, 3), "f4"), np.eye(3)).as_text()
        products = [row for row in text.split("\n") if "dot_general" in row]
        assert products
        assert all("[HIGHEST, HIGHEST]" in row for row in products)


def test_gradient_of_squared_distances():
    """d/dx Σ ‖x − y‖² = Σ 2 (x − y)."""
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 3)).astype("float32")
    np.testing.assert_allclose(
        gradient(lambda x: ops.sum(shared.squared_distances(x, y)), x),
        2 * (x[:, None] - y).sum(1),
        atol=1e-5,
    )


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


def test_straight_through_is_public():
    import blogkeras

    assert blogkeras.straight_through is shared.straight_through
    assert keras.backend.backend() == backend.BACKEND
