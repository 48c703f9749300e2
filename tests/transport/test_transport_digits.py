"""Costs that lose their digits: near words, far groups, tiny and huge units.

What is right is computed in float64 by differences, and solved by SciPy.
"""

import keras
import numpy as np
import pytest
import scipy.optimize
from keras import ops
from kit import slow_on_jax, value

from blogkeras import backend
from blogkeras.transport import (
    WordMoverDistance,
    WordRotatorDistance,
    measures,
    relaxed_wasserstein_distances,
    sinkhorn,
    transport_plan,
    wasserstein_distance,
    word_centroid_distance,
    word_mover_distance,
    word_rotator_distance,
)

RNG = np.random.default_rng(0)


def linear_program(p, q, D):
    """The definition, with costs of size 1 for SciPy's tolerances."""
    n, m = D.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    scale = np.abs(D).max()
    result = scipy.optimize.linprog(
        (D / scale).ravel(),
        A_eq=np.concatenate([rows, columns]),
        b_eq=np.concatenate([p, q]),
    )
    return result.fun * scale


def distances(x, y):
    x, y = (np.asarray(a, "float64") for a in (x, y))
    return np.sqrt(np.square(x[:, None] - y).sum(-1))


def assignment(x, y):
    """Of as many words on both sides, uniform: each goes to one."""
    D = distances(x, y)
    return D[scipy.optimize.linear_sum_assignment(D)].mean()


def texts(kind, dim, words=8):
    """Two texts as float32 numbers."""
    rng = np.random.default_rng(dim)
    x = rng.normal(size=(words, dim))
    if kind == "near":
        y = x + 1e-3 * rng.normal(size=x.shape)
    elif kind == "offset":
        x = x + 1e3
        y = x + 0.1 * rng.normal(size=x.shape)
    elif kind == "groups":
        x = np.zeros_like(x)
        x[words // 2 :] = 1000
        y = x + 0.1 * rng.normal(size=x.shape)
    elif kind == "outlier":
        x[0] += 1e5
        y = x + 0.1 * rng.normal(size=x.shape)
    elif kind == "equal":
        y = x[::-1]
    return x.astype("float32"), y.astype("float32")


@slow_on_jax
@pytest.mark.parametrize("dim", [2, 300])
@pytest.mark.parametrize("kind", ["near", "offset", "groups", "equal"])
def test_near_words_and_far_groups(kind, dim):
    x, y = texts(kind, dim)
    right = assignment(x, y)
    exact = word_mover_distance(x, y)
    assert exact == pytest.approx(right, rel=1e-6, abs=1e-12)
    found = float(word_mover_distance(x, y, solver="sinkhorn"))
    assert found >= right * (1 - 1e-4)
    # Rounding leaves shares of 10⁻⁷ of the mass with far words.
    far = 1e-6 * distances(x, y).max()
    assert found <= right * 1.02 + far
    relaxed = float(word_mover_distance(x, y, solver="relaxed"))
    assert relaxed <= right * (1 + 1e-4)
    if kind in ("near", "equal"):
        assert relaxed == pytest.approx(right, rel=1e-4)
    layer = WordMoverDistance()([x[None], y[None]])
    assert float(layer[0]) == pytest.approx(found, rel=1e-3, abs=1e-6)
    assert word_centroid_distance(x, y) <= exact + 1e-9


@pytest.mark.parametrize("dim", [2, 16, 1024])
@pytest.mark.parametrize("kind", ["near", "offset", "groups", "outlier"])
def test_cost_matrices(kind, dim):
    x, y = texts(kind, dim)
    expected = distances(x, y)
    tensors = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    for d in (
        measures.cost_matrix(np, x, y, "euclidean"),
        measures.cost_matrix(ops, *tensors, "euclidean"),
        measures.cost_matrix(ops, *tensors, "rms") * dim**0.5,
    ):
        np.testing.assert_allclose(value(d), expected, rtol=1e-4)
    # Far away and near in float64, too.
    a, b = x.astype("f8") + 1e6, y.astype("f8") + 1e6
    b[0] = a[0] + 1e-3
    np.testing.assert_allclose(
        measures.cost_matrix(np, a, b, "euclidean"), distances(a, b), rtol=1e-9
    )


@slow_on_jax
@pytest.mark.parametrize("dim", [2, 300])
def test_small_angles(dim):
    """1 − cos of nearly equal directions is half the square of the angle."""
    rng = np.random.default_rng(dim)
    x = rng.normal(size=(6, dim))
    for size in (1e-1, 1e-3):
        y = (x + size * rng.normal(size=x.shape)).astype("float32")
        x = x.astype("float32")
        u, v = (
            a / np.sqrt(np.square(a).sum(-1, keepdims=True))
            for a in (x.astype("f8"), y.astype("f8"))
        )
        expected = np.square(u[:, None] - v).sum(-1) / 2
        found = measures.cost_matrix(
            ops, ops.convert_to_tensor(x), ops.convert_to_tensor(y), "cosine"
        )
        np.testing.assert_allclose(value(found), expected, rtol=1e-3)
        exact = word_rotator_distance(x, y)
        found = float(word_rotator_distance(x, y, solver="sinkhorn"))
        assert exact * (1 - 1e-3) <= found
        if dim == 300:
            assert found <= 1.02 * exact + 1e-6
    assert word_rotator_distance(x, x) == 0
    if dim == 300:
        found = float(word_rotator_distance(x, x, solver="sinkhorn"))
        assert found < 1e-5


@pytest.mark.parametrize("scale", [1e-300, 1e-15, 1e-12, 1e15, 1e300])
def test_units_of_exact_costs(scale):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 2)
    D = rng.random((6, 6))
    right = linear_program(p, q, D)
    assert wasserstein_distance(p, q, D * scale) / scale == pytest.approx(
        right, rel=1e-9
    )
    low = relaxed_wasserstein_distances(p, q, D * scale)
    np.testing.assert_allclose(
        np.divide(low, scale), relaxed_wasserstein_distances(p, q, D)
    )
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    right = word_mover_distance(x, y)
    found = word_mover_distance(x * scale, y * scale) / scale
    assert found == pytest.approx(right, rel=1e-9)
    right = word_rotator_distance(x, y)
    found = word_rotator_distance(x * scale, y * scale)
    assert found == pytest.approx(right, rel=1e-9)
    np.testing.assert_allclose(
        transport_plan(x * scale, y * scale, cost="euclidean"),
        transport_plan(x, y, cost="euclidean"),
        atol=1e-12,
    )


@slow_on_jax
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_units_of_tensors(scale):
    """Whose squares are beyond float32."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(6), 2)
    D = rng.random((6, 6))
    right = sinkhorn(p, q, D)
    found = sinkhorn(p, q, D * scale)
    for name in ("distance", "lower", "upper"):
        assert float(getattr(found, name)) / scale == pytest.approx(
            float(getattr(right, name)), rel=1e-3, abs=1e-5
        )
    x, y = rng.normal(size=(2, 6, 12)).astype("float32")
    for solver in ("sinkhorn", "relaxed"):
        for cost, factor in (("euclidean", scale), ("cosine", 1)):
            settings = {"cost": cost, "weights": "norm", "solver": solver}
            right = float(word_mover_distance(x, y, **settings))
            a, b = x * np.float32(scale), y * np.float32(scale)
            found = float(word_mover_distance(a, b, **settings))
            assert found / factor == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("cls", [WordMoverDistance, WordRotatorDistance])
def test_gradients_near_and_at_equal_texts(cls):
    """Each word's share, in the direction of the difference."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(1, 4, 300)).astype("float32")
    shift = rng.normal(size=y.shape)
    layer = cls(weighting="uniform")

    def loss(x):
        return ops.sum(layer([x, y])), None

    slope = backend.jit(lambda x: backend.value_and_grad(loss, x)[1])
    for size in (1e-3, 1e-2):
        x = (y + size * shift).astype("float32")
        found = value(slope(ops.convert_to_tensor(x)))[0]
        a, b = x[0].astype("f8"), y[0].astype("f8")
        if cls is WordMoverDistance:
            difference = a - b
            norm = np.sqrt(np.square(difference).sum(-1, keepdims=True))
            expected = difference / norm / 4
        else:
            norm = np.sqrt(np.square(a).sum(-1, keepdims=True))
            u = a / norm
            v = b / np.sqrt(np.square(b).sum(-1, keepdims=True))
            cosine = (u * v).sum(-1, keepdims=True)
            expected = -(v - cosine * u) / norm / 4
        np.testing.assert_allclose(
            found, expected, atol=0.02 * np.abs(expected).max()
        )
    at = value(slope(ops.convert_to_tensor(y)))
    np.testing.assert_array_equal(np.isfinite(at), True)


@slow_on_jax
def test_training_reaches_equal_texts():
    """It stalled where the distance was taken for rounding."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(1, 4, 20)).astype("float32")
    x = ops.convert_to_tensor(y + 1e-3 * rng.normal(size=y.shape))
    x = ops.cast(x, "float32")
    layer = WordMoverDistance()
    slope = backend.jit(
        lambda x: backend.value_and_grad(
            lambda x: (ops.sum(layer([x, y])), None), x
        )[1]
    )
    start = float(layer([x, y])[0])
    for rate in np.geomspace(2e-3, 2e-4, 20):
        x = x - np.float32(rate) * slope(x)
    assert float(layer([x, y])[0]) < start / 4


def test_few_programs_for_texts_of_all_lengths(monkeypatch):
    from blogkeras.transport import entropic

    assert entropic.length_classes(5, 9) == (16, 16)
    assert entropic.length_classes(5, 100) == (16, 128)
    assert entropic.length_classes(1, 8) == (8, 8)
    classes = {
        entropic.length_classes(n, m)
        for n in range(1, 65)
        for m in range(1, 65)
    }
    assert len(classes) == 6
    made = []
    jit = backend.jit
    monkeypatch.setattr(backend, "jit", lambda fn: made.append(fn) or jit(fn))
    entropic._programs.clear()
    for n, m in ((3, 5), (4, 8), (7, 2), (1, 6)):
        x, y = RNG.normal(size=(n, 3)), RNG.normal(size=(m, 3))
        found = float(word_mover_distance(x, y, solver="sinkhorn"))
        assert found == pytest.approx(word_mover_distance(x, y), rel=0.03)
        p, q = np.full(n, 1 / n), np.full(m, 1 / m)
        solution = sinkhorn(p, q, distances(x, y))
        assert solution.plan.shape == (n, m)
        assert [a.shape for a in solution.potentials] == [(n,), (m,)]
        np.testing.assert_allclose(value(solution.plan).sum(1), p, rtol=1e-4)
        assert float(solution.lower) <= word_mover_distance(x, y)
    assert len(made) <= 2
    assert len(entropic._programs) <= entropic._programs.size


def test_settings_are_numbers():
    p, D = np.full(2, 0.5), np.eye(2)
    for bad in (np.inf, np.nan, 0, -1.0, True, "4", None):
        for name in ("regularization", "tolerance")[bad is None :]:
            with pytest.raises(ValueError, match=f"Received: {name}="):
                sinkhorn(p, p, D, **{name: bad})
            with pytest.raises(ValueError, match=f"Received: {name}="):
                wasserstein_distance(p, p, D, **{name: bad})
            with pytest.raises(ValueError, match=f"Received: {name}="):
                WordMoverDistance(**{name: bad})
    for bad in (4.5, 4.0, True, "4", None, 0):
        with pytest.raises(ValueError, match="Received: max_iterations="):
            sinkhorn(p, p, D, max_iterations=bad)
    for bad in (1, "yes", None):
        with pytest.raises(ValueError, match="Received: pairwise="):
            WordMoverDistance(pairwise=bad)
    for bad in (None, 3, ["exact"], "emd"):
        with pytest.raises(ValueError, match="Received: solver="):
            wasserstein_distance(p, p, D, solver=bad)
        with pytest.raises(ValueError, match="Received: cost="):
            WordMoverDistance(cost=bad)
        with pytest.raises(ValueError, match="Received: weights="):
            word_mover_distance(np.eye(2), np.eye(2), weights=bad)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX lowers for any device"
)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_are_of_full_precision_on_accelerators(platform):
    import jax
    from kit import assert_full_precision

    def distance(x, y):
        return ops.sum(WordMoverDistance()([x, y]))

    x = jax.ShapeDtypeStruct((2, 8, 20), "float32")
    for fn in (distance, jax.grad(distance)):
        exported = jax.export.export(jax.jit(fn), platforms=[platform])(x, x)
        assert_full_precision(exported.mlir_module())
