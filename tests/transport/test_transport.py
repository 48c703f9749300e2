"""EMD, WMD, WRD: exact and approximate, against POT, scipy and closed forms.

Post 7388.
"""

import itertools
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import ot
import pytest
from keras import ops
from kit import JAX, slow_on_jax
from scipy.optimize import linprog

from blogkeras import backend
from blogkeras.transport import (
    WordMoverDistance,
    distances,
    entropic,
    exact,
    measures,
    pairwise_distances,
    relaxed_wasserstein_distances,
    sinkhorn,
    transport_plan,
    wasserstein_distance,
    word_centroid_distance,
    word_mover_distance,
    word_rotator_bound,
    word_rotator_distance,
    word_rotator_similarity,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5))
Y = RNG.normal(size=(4, 5))


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers for a test, whichever ran before."""
    global RNG
    RNG = np.random.default_rng(1)


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def distribution(rng, size, zeros=0):
    p = rng.random(size)
    p[..., :zeros] = 0
    return p / p.sum(-1, keepdims=True)


def post_wasserstein(p, q, D):
    """The post's linear program, re-expressed."""
    m, n = D.shape
    rows = np.kron(np.eye(m), np.ones(n))
    columns = np.kron(np.ones(m), np.eye(n))
    A, b = np.concatenate([rows, columns]), np.concatenate([p, q])
    return linprog(D.ravel(), A_eq=A[:-1], b_eq=b[:-1]).fun


def post_word_mover(x, y):
    D = np.sqrt(np.square(x[:, None] - y[None]).mean(2))
    m, n = D.shape
    return post_wasserstein(np.full(m, 1 / m), np.full(n, 1 / n), D)


def post_word_rotator(x, y):
    a, b = (np.sqrt((z**2).sum(1)) for z in (x, y))
    D = 1 - (x / a[:, None]) @ (y / b[:, None]).T
    return post_wasserstein(a / a.sum(), b / b.sum(), D)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (6, 4), (9, 9)])
def test_exact_is_the_linear_program_and_pot(shape):
    rng = np.random.default_rng(1)
    p, q = distribution(rng, shape[0]), distribution(rng, shape[1])
    for D in (rng.random(shape), rng.normal(size=shape), np.ones(shape)):
        value = wasserstein_distance(p, q, D)
        assert value.dtype == np.float64
        assert value.shape == ()
        assert abs(value - post_wasserstein(p, q, D)) <= 1e-6
        assert abs(value - ot.emd2(p, q, D)) <= 1e-9


def test_word_distances_are_the_post_s():
    for x, y in ((X, Y), (X[:1], Y), (X, X[:2]), (3 * X, Y[:1])):
        mover = post_word_mover(x, y)
        assert abs(word_mover_distance(x, y, cost="rms") - mover) <= 1e-6
        assert abs(word_mover_distance(x, y) - mover * np.sqrt(5)) <= 1e-6
        rotator = post_word_rotator(x, y)
        assert abs(word_rotator_distance(x, y) - rotator) <= 1e-6
        assert abs(word_rotator_similarity(x, y) - 1 + rotator) <= 1e-6


def test_cost_and_weights_span_the_family():
    """Each pair of options against POT on masses and costs made by hand."""
    norms = [np.linalg.norm(z, axis=1) for z in (X, Y)]
    importance = RNG.random(6), RNG.random(4)
    masses = {
        "uniform": (np.ones(6), np.ones(4)),
        "norm": norms,
        "importance": importance,
    }
    euclidean = np.linalg.norm(X[:, None] - Y, axis=2)
    cosine = 1 - (X / norms[0][:, None]) @ (Y / norms[1][:, None]).T
    costs = {
        "euclidean": euclidean,
        "rms": euclidean / np.sqrt(5),
        "cosine": cosine,
    }
    for (weights, (a, b)), (cost, D) in itertools.product(
        masses.items(), costs.items()
    ):
        p, q = a / a.sum(), b / b.sum()
        expected = ot.emd2(p, q, D)
        given = importance if weights == "importance" else None
        found = word_mover_distance(X, Y, None, cost, weights, given)
        assert abs(found - expected) <= 1e-9
        found = word_mover_distance(X, Y, None, cost, (p, q))
        assert abs(found - expected) <= 1e-9
        plan = transport_plan(X, Y, None, cost, weights, given)
        np.testing.assert_allclose(plan, ot.emd(p, q, D), atol=1e-9)


def test_old_names_of_importance():
    importance = RNG.random(6), RNG.random(4)
    expected = word_mover_distance(X, Y, None, "rms", "importance", importance)
    with pytest.warns(DeprecationWarning, match="importance") as record:
        found = word_mover_distance(
            X, Y, cost="rms", weights="idf", idf=importance
        )
    assert found == expected
    assert [w.filename for w in record] == [__file__] * 2
    with pytest.warns(DeprecationWarning, match="weighting='importance'"):
        layer = WordMoverDistance(weighting="idf")
    assert layer.get_config()["weighting"] == "importance"


def test_closed_forms():
    x, y = X[:1], Y[:1]
    cosine = x[0] @ y[0] / np.linalg.norm(x) / np.linalg.norm(y)
    assert abs(word_rotator_distance(x, y) - (1 - cosine)) < 1e-12
    assert abs(word_mover_distance(x, y) - np.linalg.norm(x - y)) < 1e-12
    # A shift moves every word by the same vector.
    shift = np.arange(5.0)
    assert abs(word_mover_distance(X, X + shift) - 30**0.5) < 1e-12
    # On a line the distance is that of the distribution functions.
    a, b = RNG.random((7, 1)), RNG.random((7, 1))
    line = np.abs(np.sort(a, 0) - np.sort(b, 0)).mean()
    assert abs(word_mover_distance(a, b) - line) < 1e-12


def test_metric_properties():
    Z = RNG.normal(size=(3, 5))
    for distance in (word_mover_distance, word_rotator_distance):
        xy, yx = distance(X, Y), distance(Y, X)
        assert abs(xy - yx) < 1e-12
        assert xy > 0
        order = RNG.permutation(6)
        assert abs(distance(X[order], Y) - xy) < 1e-12
        assert distance(X, X[order]) < 1e-12
        # A word that is said twice has twice the mass.
        twice = np.repeat(X, 2, axis=0)
        assert abs(distance(twice, Y) - xy) < 1e-12
    sides = [word_mover_distance(*p) for p in ((X, Y), (Y, Z), (X, Z))]
    assert sides[2] <= sides[0] + sides[1]
    scaled = word_rotator_distance(3 * X, Y / 7)
    assert abs(scaled - word_rotator_distance(X, Y)) < 1e-12
    assert abs(word_rotator_distance(X, -X) - 2) > 1e-3  # not all at once
    assert abs(word_rotator_distance(X[:1], -X[:1]) - 2) < 1e-12


@slow_on_jax
def test_equal_words_are_at_distance_zero_far_from_the_origin():
    words = RNG.normal(size=(20, 300)) + 3
    assert word_mover_distance(words, words[::-1]) == 0
    single = words.astype("float32")
    relaxed = word_mover_distance(single, single[::-1], solver="relaxed")
    assert float(relaxed) == 0


@slow_on_jax
@pytest.mark.parametrize("cost", ["euclidean", "cosine", "rms"])
@pytest.mark.parametrize("weights", ["uniform", "norm"])
def test_bounds_are_below(cost, weights):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(20, 6, 3)), rng.normal(size=(20, 4, 3))
    x[3, 2] = y[4, 0] = 0
    y[5, :] = x[5, :4]
    options = {"cost": cost, "weights": weights}
    distance = word_mover_distance(x, y, **options)
    relaxed = word_mover_distance(x, y, solver="relaxed", **options)
    assert (word_centroid_distance(x, y, **options) <= distance + 1e-12).all()
    assert (numpy(relaxed) <= distance + 1e-6).all()
    # Both bounds are tight for one word each.
    one = word_mover_distance(x[:, :1], y[:, :1], **options)
    tight = word_mover_distance(x[:, :1], y[:, :1], solver="relaxed", **options)
    np.testing.assert_allclose(numpy(tight), one, atol=1e-6)


def test_bounds_are_the_formulas():
    expected = np.linalg.norm(X.mean(0) - Y.mean(0))
    assert abs(word_centroid_distance(X, Y) - expected) < 1e-12
    a, b = (z.sum(0) / np.linalg.norm(z, axis=1).sum() for z in (X, Y))
    expected = 0.5 * np.square(a - b).sum()
    assert abs(word_rotator_bound(X, Y) - expected) < 1e-12
    p, q = np.array([0.5, 0.5, 0]), np.array([0.25, 0.75, 0])
    D = np.array([[1.0, 2.0, 0.0], [5.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    # Nothing to or from the third: 1/2·1 + 1/2·3 and 1/4·1 + 3/4·2.
    both = relaxed_wasserstein_distances(p, q, D)
    np.testing.assert_allclose(both, (2.0, 1.75))
    relaxed = wasserstein_distance(p, q, D, solver="relaxed")
    np.testing.assert_allclose(numpy(relaxed), 2.0)


def test_batches_and_masks():
    x, y = RNG.normal(size=(2, 3, 6, 5)), RNG.normal(size=(2, 3, 4, 5))
    x_mask = RNG.random((2, 3, 6)) < 0.7
    y_mask = RNG.random((2, 3, 4)) < 0.7
    x_mask[..., 0] = y_mask[..., 1] = True
    dirty = np.where(x_mask[..., None], x, np.nan)
    for distance, post in (
        (word_mover_distance, post_word_mover),
        (word_rotator_distance, post_word_rotator),
    ):
        found = distance(dirty, y, (x_mask, y_mask))
        assert found.shape == (2, 3)
        factor = 5**0.5 if distance is word_mover_distance else 1
        for i, j in np.ndindex(2, 3):
            expected = post(x[i, j][x_mask[i, j]], y[i, j][y_mask[i, j]])
            assert abs(found[i, j] - factor * expected) < 1e-6
        near = distance(
            dirty, y, (x_mask, y_mask), solver="sinkhorn", regularization=2e-3
        )
        np.testing.assert_allclose(numpy(near), found, rtol=0.01, atol=1e-3)


def test_exact_blocks_are_the_batch(monkeypatch):
    x, y = RNG.normal(size=(7, 6, 5)), RNG.normal(size=(7, 4, 5))
    mask = RNG.random((7, 6)) < 0.7, None
    weights = distribution(RNG, (7, 6)), distribution(RNG, (7, 4))
    mask[0][:, 0] = True
    plain = word_mover_distance(x, y, mask)
    given = word_rotator_distance(x, y, None, weights=weights)
    monkeypatch.setattr(distances, "_BLOCK", 3 * 50)  # 3, 3 and 1 pairs
    np.testing.assert_array_equal(word_mover_distance(x, y, mask), plain)
    again = word_rotator_distance(x, y, None, weights=weights)
    np.testing.assert_array_equal(again, given)
    assert word_mover_distance(x[:0], y[:0]).shape == (0,)


@slow_on_jax
def test_empty_sequences_count_as_one_zero_vector():
    none, masked = np.zeros((0, 5)), (np.zeros(6, bool), None)
    padded = np.concatenate([X, np.zeros((2, 5))])
    mean_norm = np.linalg.norm(X, axis=1).mean()
    for distance, x, y, mask, expected in (
        (word_mover_distance, X, none, None, mean_norm),
        (word_mover_distance, X, X, masked, mean_norm),
        (word_mover_distance, none, none, None, 0),
        (word_rotator_distance, none, none, None, 0),
        (word_rotator_distance, X, none, None, 1),
        (word_rotator_distance, X, np.zeros((2, 5)), None, 1),
        (word_rotator_distance, X, X, masked, 1),
        # Beside other words a zero vector has no mass in WRD.
        (word_rotator_distance, padded, X, None, 0),
    ):
        assert abs(distance(x, y, mask) - expected) < 1e-12
    no_weight = {
        "weights": "importance",
        "importance": (np.zeros(4), np.ones(6)),
    }
    found = word_mover_distance(Y, X, **no_weight)
    assert abs(found - mean_norm) < 1e-12
    relaxed = word_mover_distance(X, none, solver="relaxed")
    assert abs(float(relaxed) - mean_norm) < 1e-5
    # The other solvers, on a batch in the shape that another test compiles.
    x = np.stack([X, X, padded[2:], X, 0 * X, 0 * X]).reshape(2, 3, 6, 5)
    y = np.stack([Y, 0 * Y, Y, Y, 0 * Y, Y]).reshape(2, 3, 4, 5)
    mask = np.ones((2, 3, 6), bool), np.ones((2, 3, 4), bool)
    mask[0][0, 0] = mask[1][0, 2] = mask[0][1, 0] = mask[1][1, 0] = False
    for distance in (word_mover_distance, word_rotator_distance):
        expected = distance(x, y, mask)
        relaxed = distance(x, y, mask, solver="relaxed")
        np.testing.assert_allclose(numpy(relaxed), expected, atol=1e-5)
        found = distance(x, y, mask, solver="sinkhorn", regularization=2e-3)
        np.testing.assert_allclose(numpy(found), expected, rtol=0.01, atol=1e-3)


def wrong_answer(p, q, cost, *rest):
    return np.zeros_like(cost), 0.0, 0 * p, 0 * q, 1


@pytest.mark.parametrize("broken", [lambda: None, wrong_answer])
def test_the_public_solver_is_used_where_the_private_one_is_gone(
    monkeypatch, broken
):
    args = [distribution(RNG, (3, 5)), distribution(RNG, (3, 4))]
    args.append(RNG.random((3, 5, 4)))
    expected = exact.solve(*args, duals=True)
    name = exact.simplex().__name__
    monkeypatch.setattr(ot.lp.emd_wrap, "emd_c", broken)
    exact.simplex.cache_clear()
    try:
        assert exact.simplex().__name__ == "public" != name
        value, plan, f, g = exact.solve(*args, duals=True)
        np.testing.assert_allclose(value, expected[0], atol=1e-12)
        np.testing.assert_allclose(plan, expected[1], atol=1e-12)
        # A constant may go from one potential to the other.
        np.testing.assert_allclose(
            f[:, :, None] + g[:, None],
            expected[2][:, :, None] + expected[3][:, None],
            atol=1e-12,
        )
    finally:
        monkeypatch.undo()
        exact.simplex.cache_clear()
    assert exact.simplex().__name__ == name


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (6, 4)])
def test_exact_potentials_are_feasible_and_reach_the_value(shape):
    p = distribution(RNG, (10, shape[0]), zeros=shape[0] // 4)
    q = distribution(RNG, (10, shape[1]), zeros=shape[1] // 4)
    D = RNG.random((10, *shape))
    # What has no mass must not count, however near it is.
    D[:, : shape[0] // 4] -= 5
    D[:, :, : shape[1] // 4] -= 5
    value, plan, f, g = exact.solve(p, q, D, duals=True)
    np.testing.assert_allclose((p * f).sum(1) + (q * g).sum(1), value)
    slack = D - f[:, :, None] - g[:, None]
    assert (slack >= -1e-12)[:, shape[0] // 4 :, shape[1] // 4 :].all()
    np.testing.assert_allclose(plan.sum(2), p, atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), q, atol=1e-12)


def random_problems(rng, count, n, m, dim=6):
    """Vectors with repeats and zeros, masses with zeros, float32."""
    x = rng.normal(size=(count, n, dim)) * np.exp(
        rng.normal(size=(count, n, 1))
    )
    y = rng.normal(size=(count, m, dim)) * np.exp(
        rng.normal(size=(count, m, 1))
    )
    common = min(n, m) // 2
    y[::3, :common] = x[::3, :common]
    if n > 2:
        x[::4, 1] = 0
        x[1::4, 2] = x[1::4, 0]
    problems = []
    for cost, weights in (("euclidean", "uniform"), ("cosine", "norm")):
        p, a = measures.mass_and_vectors(np, x, None, cost, weights)
        q, b = measures.mass_and_vectors(np, y, None, cost, weights)
        if n > 3:
            p[::5, n // 2] = 0
            p /= p.sum(-1, keepdims=True)
        problems.append((p, q, measures.cost_matrix(np, a, b, cost)))
    return [
        np.concatenate(parts).astype("float32")
        for parts in zip(*problems, strict=True)
    ]


def check_certificate(rng, count, n, m, **options):
    p, q, D = random_problems(rng, count, n, m)
    solution = sinkhorn(p, q, D, **options)
    value, _ = exact.solve(p, q, D)
    lower, upper = numpy(solution.lower), numpy(solution.upper)
    assert (lower <= value).all()
    assert (value <= upper).all()
    assert (numpy(solution.distance) <= upper).all()
    plan = numpy(solution.plan)
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(2), p, atol=1e-6)
    np.testing.assert_allclose(plan.sum(1), q, atol=1e-6)
    return upper - lower, D.max(axis=(1, 2)), len(p)


@pytest.mark.parametrize("shape", [(1, 3), (8, 8), (16, 5)])
def test_sinkhorn_is_certified(shape):
    gap, scale, _ = check_certificate(np.random.default_rng(3), 20, *shape)
    # ε = 0.005 costs at most ε log(nm) and what the tolerance leaves.
    assert (gap <= 0.04 * scale).all()
    assert gap.max() > 0


def test_the_certificate_holds_however_early_it_stops():
    rng = np.random.default_rng(3)
    short, _, _ = check_certificate(rng, 20, 8, 8, max_iterations=1)
    rng = np.random.default_rng(3)
    whole, _, _ = check_certificate(rng, 20, 8, 8)
    assert short.mean() > 2 * whole.mean()


@pytest.mark.verify
def test_the_certificate_holds_on_ten_thousand_pairs():
    rng = np.random.default_rng(4)
    total, gaps = 0, []
    shapes = [(1, 1), (1, 2), (2, 3), (5, 8), (8, 8), (16, 13), (32, 32)]
    shapes += [(1, 128), (64, 47), (128, 100), (128, 128)]
    for n, m in shapes:
        count = 1000 if n * m <= 1024 else 64
        gap, scale, number = check_certificate(rng, count, n, m)
        total += number
        gaps.append((gap / scale).max())
        print(f"{n:4d} x {m:4d}: {number} pairs, largest gap {gaps[-1]:.4f}")
    assert total >= 10_000


def test_the_log_domain_takes_over_where_floats_end():
    """Two words of mass 1e-20 that belong together.

    At the first ε they do not: f + g is 2 there. One step further, exp(2 / ε)
    is more than a float32 holds.
    """
    small = np.array([1e-20, 1.0], "float32")
    p = np.stack([small, *[np.array([0.25, 0.75], "float32")] * 2])
    D = np.stack([1 - np.eye(2, dtype="float32")] * 3)
    solution = sinkhorn(p, p[:, ::-1], D[:, :, ::-1])
    for number in solution[:3]:
        np.testing.assert_allclose(numpy(number), 0, atol=1e-3)
    np.testing.assert_allclose(numpy(solution.plan)[0].sum(1), small, rtol=0.01)
    # The pairs beside it are what they are without it.
    alone = sinkhorn(p[[1, 1, 1]], p[[1, 1, 1], ::-1], D[:, :, ::-1])
    np.testing.assert_allclose(
        numpy(solution.plan)[1:], numpy(alone.plan)[1:], atol=1e-6
    )


def test_the_log_domain_takes_over_where_a_potential_overflows():
    """The marginal error is finite there, and the plan was NaN."""
    p = np.array([5.07457428e-04, 8.38058920e-08, 0.999492459], "float32")
    q = np.array([0.349740929, 7.4e-05, 2.2e-03, 1.3e-05, 0.64796], "float32")
    D = np.array(
        [
            [3.3, 6.8, 3.2, -8.6, 7.2],
            [4.2, -4.9, 5.2, 3.5, 2.9],
            [0.28, 5.0, -6.3, -1.6, -4.5],
        ],
        "float32",
    )
    q = q / q.sum()
    solution = sinkhorn(*(np.stack([a] * 3) for a in (p, q, D)))
    expected = ot.emd2(*(np.float64(a) / a.sum() for a in (p, q)), D)
    np.testing.assert_allclose(numpy(solution.distance), expected, atol=0.05)
    np.testing.assert_allclose(numpy(solution.plan)[0].sum(1), p, atol=1e-6)


def plain_iterations(p, q, D, epsilon, tolerance):
    """How many Sinkhorn's own iteration takes, in NumPy float64."""
    kernel = np.exp(-D / epsilon)
    b = np.ones(q.shape)
    for count in range(1, 5000):
        a = 1 / np.einsum("knm,km->kn", kernel, q * b)
        arrived = np.einsum("knm,kn->km", kernel, p * a)
        if np.abs(q * (arrived * b - 1)).sum(1).max() <= tolerance:
            return count
        b = 1 / arrived


@pytest.mark.parametrize("domain", ["_scale", "_log_scale"])
def test_it_stops_at_the_marginal_error_in_few_iterations(monkeypatch, domain):
    if domain == "_log_scale":
        monkeypatch.setattr(entropic, "_scale", entropic._log_scale)
    entropic._programs.clear()
    p, q, D = random_problems(np.random.default_rng(3), 20, 8, 8)
    tolerance, used = 1e-4, (p[:, :, None] > 0) & (q[:, None] > 0)
    epsilon = 0.02 * (D * used).max(axis=(1, 2), keepdims=True)
    solution = sinkhorn(p, q, D, 0.02, tolerance)
    f, g = (numpy(a).astype("float64") for a in solution.potentials)
    plan = (
        p[:, :, None]
        * q[:, None]
        * np.exp((f[:, :, None] + g[:, None] - D) / epsilon)
    )
    off = [np.abs(plan.sum(axis) - m).sum(1) for axis, m in ((1, q), (2, p))]
    # The columns were repaired last; float32 has 1e-7 / 0.02 for them.
    assert off[0].max() < 2e-5 < off[1].max() <= 1.2 * tolerance
    count = plain_iterations(p, q, D, epsilon, tolerance)
    assert 3 * int(solution.iterations) < count
    entropic._programs.clear()


def test_over_relaxation_is_given_up_where_it_leads_away():
    """s = -0.9 t, t = 0.9 s come to rest at 0, but not if carried on beyond."""
    one = ops.ones((1, 1, 1))
    *_, error, iterations = entropic._iterate(
        (lambda t: -0.9 * t, lambda s: 0.9 * s),
        lambda beyond, new: beyond,
        lambda new, old: new - old,
        one,
        one,
        SimpleNamespace(q=one),
        1e-3,
        5000,
    )
    assert float(error[0, 0, 0]) <= 1e-3
    assert int(iterations) < 5000


def test_blocks_are_the_batch(monkeypatch):
    p, q, D = random_problems(np.random.default_rng(3), 20, 8, 8)
    whole = sinkhorn(p, q, D, 0.02, 1e-4)
    # Blocks of 15, 15 and, of 40 problems, the last 15.
    monkeypatch.setattr(entropic, "_BLOCK", 15 * 64 + 1)
    solve_block, sizes = entropic._solve_block, set()

    def spy(p, *args):
        sizes.add(int(p.shape[0]))
        return solve_block(p, *args)

    monkeypatch.setattr(entropic, "_solve_block", spy)
    # Not compiled: XLA would move a block that sticks out.
    tensors = [ops.convert_to_tensor(a) for a in (p, q, D)]
    blocks = entropic.solve(*tensors, 0.02, 1e-4, 5000)
    assert sizes == {15}
    # Compiled, and padded to another length, the loop ends a little elsewhere.
    # Potentials are not compared: many have the same dual value, `lower`.
    for name in ("distance", "lower", "upper", "plan"):
        a, b = (numpy(getattr(x, name)) for x in (blocks, whole))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-3)


def test_any_plan_is_made_feasible():
    """Against algorithm 2 of Altschuler et al. in NumPy."""
    rng = np.random.default_rng(3)
    p, q = distribution(rng, (20, 6)), distribution(rng, (20, 5), zeros=1)
    kernel = rng.random((20, 6, 5))
    s, t = np.exp(rng.normal(size=(20, 6))), np.exp(rng.normal(size=(20, 5)))
    plan = (p / s)[:, :, None] * kernel * (q / t)[:, None]
    plan *= np.minimum(p / plan.sum(2), 1)[:, :, None]
    arrived = plan.sum(1)
    less = arrived > q
    assert less.any()
    assert not less.all()
    plan *= np.where(less, q / np.where(less, arrived, 1), 1)[:, None]
    missing_p, missing_q = p - plan.sum(2), q - plan.sum(1)
    assert missing_p.sum(1).min() > 0
    spread = missing_p[:, :, None] * missing_q[:, None]
    plan += spread / missing_p.sum(1)[:, None, None]
    found = entropic._round(
        SimpleNamespace(
            p=ops.convert_to_tensor(p[:, :, None], "float32"),
            q=ops.convert_to_tensor(q[:, None], "float32"),
        ),
        *(
            ops.convert_to_tensor(a, "float32")
            for a in (kernel, s[:, :, None], t[:, None])
        ),
    )
    np.testing.assert_allclose(numpy(found), plan, atol=1e-6)


@slow_on_jax
def test_sinkhorn_distance_is_near_and_its_gradient_is_the_plan():
    rng, tolerance = np.random.default_rng(5), 2e-4
    p, q = distribution(rng, (4, 6)), distribution(rng, (4, 5))
    D = rng.random((4, 6, 5))
    plan = np.stack([ot.emd(*a) for a in zip(p, q, D, strict=True)])

    def total(D):
        return ops.sum(
            wasserstein_distance(
                ops.cast(p, "float32"),
                ops.cast(q, "float32"),
                D,
                solver="sinkhorn",
                regularization=2e-4,
                tolerance=tolerance,
            )
        ), ()

    (value, _), gradient = backend.value_and_grad(
        total, ops.convert_to_tensor(D, "float32")
    )
    expected = wasserstein_distance(p, q, D).sum()
    assert abs(float(value) - expected) < 5e-3 * expected
    error = np.abs(numpy(gradient) - plan).sum((1, 2))
    # One problem in four has two plans of nearly the same cost, between which
    # float32 cannot tell.
    assert np.median(error) <= 10 * tolerance


def pairwise(x, y, **options):
    """The distance of two collections of one text each."""
    for name in {"weights", "importance"} & set(options):
        pair = options[name]
        if isinstance(pair, (list, tuple)):
            options[name] = [None if a is None else [a] for a in pair]
    return pairwise_distances([x], [y], **options)


@pytest.mark.parametrize(
    "function",
    [
        word_mover_distance,
        word_rotator_distance,
        word_rotator_similarity,
        word_centroid_distance,
        transport_plan,
        pairwise,
    ],
)
def test_weights_and_importance_go_together(function):
    """Half a pair, and what would have no effect, are errors."""
    p, q = np.full(6, 1 / 6), np.full(4, 1 / 4)
    for weights in ({}, {"weights": "norm"}, {"weights": (p, q)}):
        with pytest.raises(ValueError, match=r"only.*\sReceived: weights="):
            function(X, Y, **weights, importance=(p, q))
    for half in ((p, None), (None, q), (None, None)):
        with pytest.raises(ValueError, match=r"`weights` .*\sReceived: "):
            function(X, Y, weights=half)
        with pytest.raises(ValueError, match=r"`importance` .*\sReceived: "):
            function(X, Y, weights="importance", importance=half)
    for wrong in (p, (p,), (p, q, q)):
        with pytest.raises(ValueError, match=r"`importance` to be a pair"):
            function(X, Y, weights="importance", importance=wrong)
    np.testing.assert_allclose(
        function(X, Y, weights=(p, q)),
        function(X, Y, weights="importance", importance=(3 * p, q)),
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_weights_in_half_precision(dtype, as_tensor):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1000, 2)), rng.normal(size=(3, 2))
    given, double = [], []
    for mass in (np.full(1000, 1 / 1000), np.array([0.4, 0.35, 0.25])):
        half = ops.convert_to_tensor(mass, dtype)
        double.append(np.asarray(ops.cast(half, "float32"), "float64"))
        given.append(half if as_tensor else ops.convert_to_numpy(half))
    assert abs(double[0].sum() - 1) > 1e-4
    p, q = (z / z.sum() for z in double)
    D = np.linalg.norm(x[:, None] - y, axis=-1)
    expected = ot.emd2(p, q, D)
    found = word_mover_distance(x, y, weights=tuple(given))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    mask = np.ones(1000, bool), np.ones(3, bool)
    found = word_mover_distance(x, y, mask, weights=tuple(given))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(
        wasserstein_distance(*given, D), expected, rtol=1e-6
    )
    lower = np.maximum(*relaxed_wasserstein_distances(*given, D))
    assert 0 < lower <= expected * (1 + 1e-6)
    for masses in ([given[0]], ops.convert_to_numpy(given[0])[None]):
        found = pairwise_distances(
            [x], [y], None, "euclidean", (masses, [given[1]]), verbose=0
        )
        np.testing.assert_allclose(found, [[expected]], rtol=1e-6)
    few = given[0][:40], given[1]  # their sum is 0.04
    with pytest.raises(ValueError, match="sum 1"):
        wasserstein_distance(*few, D[:40])
    solution = sinkhorn(given[1], given[1], D[:3] * 0 + 1)
    plan = ops.convert_to_numpy(solution.plan)
    np.testing.assert_allclose(plan.sum(0), q, atol=1e-6)


def test_errors():
    p, q, D = np.full(2, 0.5), np.full(3, 1 / 3), np.ones((2, 3))
    cases = [
        ("sum 1", wasserstein_distance, (2 * p, q, D)),
        ("sum 1", wasserstein_distance, (2 * p, 2 * q, D)),
        ("nonnegative", wasserstein_distance, (p - [1, -1], q, D)),
        ("finite", wasserstein_distance, (p, q, D * np.nan)),
        ("finite", wasserstein_distance, (p * np.nan, q, D)),
        ("leading axes", wasserstein_distance, (q, p, D)),
        ("at least one place", wasserstein_distance, (p[:0], q, D[:0])),
        ("`solver`", wasserstein_distance, (p, q, D, "simplex")),
        ("above 0", wasserstein_distance, (p, q, D, "sinkhorn", 0.0)),
        ("leading axes", word_mover_distance, (X, Y[:, :4])),
        ("leading axes", word_mover_distance, (X[None], Y[None, None])),
        ("finite", word_mover_distance, (X * np.inf, Y)),
        ("mask of x", word_mover_distance, (X, Y, (np.ones(4, bool), None))),
        ("`cost`", word_mover_distance, (X, Y, None, "manhattan")),
        ("`weights`", word_mover_distance, (X, Y, None, "cosine", "tf")),
        (
            "`importance` with",
            word_mover_distance,
            (X, Y, None, "rms", "importance"),
        ),
        (
            "weights of y of shape",
            word_mover_distance,
            (X, Y, None, "rms", (np.full(6, 1 / 6), np.full(3, 1 / 3))),
        ),
        (
            "`weights of x` of sum 1",
            word_mover_distance,
            (X, Y, None, "rms", (np.ones(6), np.full(4, 1 / 4))),
        ),
        (
            "no plan",
            transport_plan,
            (X, Y, None, "rms", "norm", None, "relaxed"),
        ),
    ]
    for match, function, args in cases:
        with pytest.raises(ValueError, match=match):
            function(*args)
    for match, args in [
        ("max_iterations=0", (p, q, D, 0.1, 0.1, 0)),
        ("sum 1", (2 * p, q, D)),
        ("finite", (p, q, D * np.nan)),
        ("leading axes", (q, p, D)),
    ]:
        with pytest.raises(ValueError, match=match):
            sinkhorn(*args)


def test_exact_inside_a_compiled_function_is_a_clear_error():
    x, y = (ops.convert_to_tensor(z, "float32") for z in (X, Y))
    with pytest.raises(ValueError, match='solver="sinkhorn"'):
        backend.jit(word_mover_distance)(x, y)
    with pytest.raises(ValueError, match='solver="sinkhorn"'):
        word_mover_distance(keras.Input((4, 5)), keras.Input((3, 5)))
    # Tensors outside of one are welcome.
    found = word_mover_distance(x, y)
    assert abs(found - word_mover_distance(X, Y)) < 1e-6


def test_no_warnings_on_degenerate_costs():
    p = np.full((3, 2), 0.5)
    D = np.stack([np.zeros((2, 2)), np.full((2, 2), 3.0), -np.eye(2)])
    expected = [ot.emd2(*a) for a in zip(p, p, D, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in ("exact", "sinkhorn", "relaxed"):
            found = wasserstein_distance(p, p, D, solver=solver)
            np.testing.assert_allclose(numpy(found), expected, atol=1e-4)


OF_DOUBLES = [
    {"solver": "sinkhorn"},
    {"solver": "relaxed"},
    {"solver": "sinkhorn", "unbalanced": 0.5},
    {"solver": "sinkhorn", "partial": 0.5},
    {"solver": "sinkhorn", "debiased": True},
]


@pytest.mark.skipif(JAX, reason="needs float64, which JAX has switched off")
@pytest.mark.parametrize("options", OF_DOUBLES, ids=str)
def test_tensors_of_float64_beside_arrays(options):
    """All are computed in the widest dtype of a tensor, wherever it stands."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    masses = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(4))
    debiased = options.get("debiased")
    costs, *own = (
        np.linalg.norm(a[:, None] - b, axis=-1)
        for a, b in ((x, y), (x, x), (y, y))
    )
    given = {k: v for k, v in options.items() if k != "debiased"}
    if debiased:
        given["own_costs"] = own

    def by_costs(p, q, d):
        return wasserstein_distance(p, q, d, **given)

    def by_words(x, y, p, q):
        return word_mover_distance(x, y, weights=(p, q), **options)

    for fn, arrays in (
        (by_costs, (*masses, costs)),
        (by_words, (x, y, *masses)),
    ):
        expected = float(fn(*arrays))
        for k in range(len(arrays)):
            some = list(arrays)
            some[k] = ops.convert_to_tensor(arrays[k], "float64")
            found = fn(*some)
            assert "float64" in str(found.dtype)
            assert float(found) == pytest.approx(expected, rel=1e-5)
