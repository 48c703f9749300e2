"""Unbalanced, partial and debiased transport, against POT and by hand."""

import keras
import numpy as np
import ot
import pytest
from keras import ops
from kit import SLOW_FILE_ON_JAX, TENSORFLOW, value
from scipy.special import logsumexp

from blogkeras import (
    WordMoverDistance,
    WordRotatorDistance,
    backend,
    transport_plan,
    wasserstein_distance,
    word_mover_distance,
    word_rotator_distance,
    word_rotator_similarity,
)

pytestmark = SLOW_FILE_ON_JAX
RNG = np.random.default_rng(11)
X = RNG.normal(size=(5, 3))
Y = RNG.normal(size=(4, 3)) + 0.5
P = np.array([0.1, 0.3, 0.2, 0.15, 0.25])
Q = np.array([0.4, 0.1, 0.2, 0.3])
D = np.linalg.norm(X[:, None] - Y, axis=-1)
DXX = np.linalg.norm(X[:, None] - X, axis=-1)
DYY = np.linalg.norm(Y[:, None] - Y, axis=-1)
UNIFORM = np.full(5, 1 / 5), np.full(4, 1 / 4)
SINKHORN = {"solver": "sinkhorn", "tolerance": 1e-5}


def kl(r, p):
    return np.sum(r * np.log(r / p) - r + p)


def own_value(p, q, cost, epsilon, steps=3000):
    """The optimum of ⟨γ, D⟩ + ε KL(γ ‖ p ⊗ q), in float64."""
    f, g = np.zeros(len(p)), np.zeros(len(q))
    for _ in range(steps):
        new = -epsilon * logsumexp((g - cost) / epsilon + np.log(q), axis=1)
        if cost.shape[0] == cost.shape[1]:  # symmetric
            f = g = (f + new) / 2
        else:
            f = new
            z = (f[:, None] - cost) / epsilon + np.log(p)[:, None]
            g = -epsilon * logsumexp(z, axis=0)
    plan = np.exp((f[:, None] + g - cost) / epsilon) * np.outer(p, q)
    assert np.abs(plan.sum(1) - p).sum() < 1e-9
    return np.sum(plan * cost) + epsilon * kl(plan, np.outer(p, q))


def own_divergence(p, q, costs, epsilon):
    D, first, second = costs
    return own_value(p, q, D, epsilon) - 0.5 * (
        own_value(p, p, first, epsilon) + own_value(q, q, second, epsilon)
    )


# Partial


def verified(first, *rest):
    """Parameters, the first of which is in `make test`."""
    return [first, *(pytest.param(x, marks=pytest.mark.verify) for x in rest)]


@pytest.mark.parametrize("share", verified(0.6, 0.1, 1.0))
def test_partial_is_that_of_pot(share):
    expected = ot.partial.partial_wasserstein2(P, Q, D, m=share)
    found = wasserstein_distance(P, Q, D, partial=share)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    close = wasserstein_distance(
        P, Q, D, partial=share, regularization=1e-3, **SINKHORN
    )
    assert expected - 1e-4 <= float(close) <= expected * 1.02 + 1e-3


def test_partial_with_costs_of_any_sign():
    # The mass that is moved is given, so a constant is paid for each unit.
    expected = ot.partial.partial_wasserstein2(P, Q, D, m=0.6)
    for constant in (-10.0, 3.0):
        found = wasserstein_distance(P, Q, D + constant, partial=0.6)
        np.testing.assert_allclose(found, expected + 0.6 * constant, rtol=1e-7)


@pytest.mark.parametrize("solver", verified("exact", "sinkhorn"))
def test_a_partial_plan(solver):
    plan = value(
        transport_plan(
            X, Y, None, "euclidean", (P, Q), None, solver, partial=0.6
        )
    )
    np.testing.assert_allclose(plan.sum(), 0.6, rtol=2e-3)
    assert np.all(plan.sum(1) <= P + 1e-6)
    assert np.all(plan.sum(0) <= Q + 1e-6)
    expected = ot.partial.partial_wasserstein2(P, Q, D, m=0.6)
    np.testing.assert_allclose(np.sum(plan * D), expected, rtol=0.02)


def test_the_nearest_words_are_moved():
    # Half of the mass: the two words that are there in both texts.
    x = np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0], [8.0, 9.0]])
    y = np.array([[0.0, 0.0], [1.0, 0.0], [-9.0, 9.0], [-8.0, 9.0]])
    assert word_mover_distance(x, y, partial=0.5) < 1e-12
    assert word_mover_distance(x, y) > 5


# Unbalanced


@pytest.mark.parametrize("penalty", verified(1.0, 0.05, 20.0))
def test_unbalanced_is_that_of_pot(penalty):
    epsilon = 0.05 * D.max()
    plan = ot.unbalanced.sinkhorn_unbalanced(
        P, Q, D, epsilon, penalty, numItermax=50000, stopThr=1e-12
    )
    expected = np.sum(plan * D) + penalty * (
        kl(plan.sum(1), P) + kl(plan.sum(0), Q)
    )
    found = wasserstein_distance(
        P, Q, D, regularization=0.05, unbalanced=penalty, **SINKHORN
    )
    np.testing.assert_allclose(float(found), expected, rtol=2e-4)
    best = ot.unbalanced.mm_unbalanced2(
        P, Q, D, penalty, returnCost="total", numItermax=100000
    )
    close = wasserstein_distance(P, Q, D, unbalanced=penalty, **SINKHORN)
    assert best - 1e-4 <= float(close) <= best * 1.02


def test_an_unbalanced_plan():
    epsilon = 0.005 * D.max()
    expected = ot.unbalanced.sinkhorn_unbalanced(
        P, Q, D, epsilon, 0.5, numItermax=50000, stopThr=1e-12
    )
    plan = transport_plan(
        X, Y, None, "euclidean", (P, Q), None, "sinkhorn", unbalanced=0.5
    )
    np.testing.assert_allclose(value(plan), expected, atol=2e-3)


def test_what_is_far_is_not_moved():
    # All is lost and made anew, at the price ρ for each side.
    found = wasserstein_distance(
        [1.0], [1.0], [[100.0]], unbalanced=0.5, **SINKHORN
    )
    np.testing.assert_allclose(float(found), 2 * 0.5, rtol=1e-3)
    # Where it is cheap to move, nothing is lost: m D + 2 ρ (m log m − m + 1)
    # has its minimum at m = exp(−D/2ρ).
    found = wasserstein_distance(
        [1.0], [1.0], [[0.1]], unbalanced=5.0, regularization=1e-3, **SINKHORN
    )
    np.testing.assert_allclose(
        float(found), 2 * 5 * (1 - np.exp(-0.1 / 10)), rtol=1e-3
    )


@pytest.mark.parametrize("penalty", verified(1e7, 1e4, 1e6, 1e12))
def test_a_large_price_is_the_balanced_problem(penalty):
    p = np.array([0.13, 0.24, 0.22, 0.14, 0.27])  # has one pair of potentials
    exact = ot.emd2(p, Q, D)
    found = wasserstein_distance(p, Q, D, solver="sinkhorn", unbalanced=penalty)
    assert exact * (1 - 1e-3) <= float(found) <= exact * 1.01
    plan = value(
        transport_plan(
            X,
            Y,
            None,
            "euclidean",
            (p, Q),
            None,
            "sinkhorn",
            unbalanced=penalty,
        )
    )
    np.testing.assert_allclose(plan.sum(1), p, atol=2e-3)
    np.testing.assert_allclose(plan.sum(0), Q, atol=2e-3)
    # Mass that goes from one word to another, by POT's values.
    change = np.array([0.01, -0.01, 0.0, 0.0, 0.0])
    expected = ot.emd2(p + change, Q, D) - ot.emd2(p - change, Q, D)
    of_p, _, of_costs = slope(
        lambda p, q, D: wasserstein_distance(
            p, q, D, solver="sinkhorn", unbalanced=penalty
        ),
        p,
        Q,
        D,
    )
    np.testing.assert_allclose(2 * np.sum(of_p * change), expected, rtol=0.05)
    np.testing.assert_allclose(of_costs, plan, atol=1e-4)


# Debiased


@pytest.mark.parametrize("regularization", verified(None, 0.5, 0.02))
def test_the_divergence_by_hand(regularization):
    epsilon = (regularization or 0.05) * max(D.max(), DXX.max(), DYY.max())
    expected = own_divergence(P, Q, (D, DXX, DYY), epsilon)
    found = wasserstein_distance(
        P, Q, D, regularization=regularization, own_costs=(DXX, DYY), **SINKHORN
    )
    np.testing.assert_allclose(float(found), expected, atol=2e-5)


@pytest.mark.parametrize("cost", verified("cosine", "euclidean"))
def test_the_divergence_of_equal_texts_is_zero(cost):
    options = {"cost": cost, "debiased": True, **SINKHORN}
    turned = X[::-1].copy()
    found = float(word_mover_distance(X, turned, regularization=0.3, **options))
    assert abs(found) < 1e-5
    biased = word_mover_distance(
        X, turned, None, cost, regularization=0.3, **SINKHORN
    )
    assert float(biased) > 0.01
    assert float(word_mover_distance(X, Y, **options)) > 0.01


@pytest.mark.verify
def test_the_divergence_tends_to_the_distance():
    exact = float(wasserstein_distance(P, Q, D))
    found = wasserstein_distance(
        P, Q, D, regularization=0.002, own_costs=(DXX, DYY), **SINKHORN
    )
    np.testing.assert_allclose(float(found), exact, rtol=0.01)


# Gradients


def slope(fn, *args):
    args = [ops.convert_to_tensor(a, "float32") for a in args]
    _, gradients = backend.value_and_grad(
        lambda args: (ops.sum(fn(*args)), None), args
    )
    return [value(g, "float64") for g in gradients]


def test_gradient_of_the_divergence():
    epsilon = 0.3 * max(D.max(), DXX.max(), DYY.max())
    layer = WordMoverDistance(debiased=True, regularization=0.3, tolerance=1e-6)
    (of_x,) = slope(lambda x: layer([x, Y[None].astype("float32")]), X[None])
    direction = RNG.normal(size=X.shape)

    def at(step):
        x = X + step * direction
        costs = (
            np.linalg.norm(x[:, None] - Y, axis=-1),
            np.linalg.norm(x[:, None] - x, axis=-1),
            DYY,
        )
        return own_divergence(*UNIFORM, costs, epsilon)

    # ε follows the largest cost and counts as a constant, as the plan does.
    expected = (at(1e-4) - at(-1e-4)) / 2e-4
    np.testing.assert_allclose(np.sum(of_x[0] * direction), expected, rtol=1e-3)


def test_gradients_of_costs_are_plans():
    for options in ({"partial": 0.6}, {"unbalanced": 0.5}):
        (of_costs,) = slope(
            lambda D, options=options: wasserstein_distance(
                ops.convert_to_tensor(P, "float32"),
                ops.convert_to_tensor(Q, "float32"),
                D,
                "sinkhorn",
                **options,
            ),
            D,
        )
        plan = transport_plan(
            X, Y, None, "euclidean", (P, Q), None, "sinkhorn", **options
        )
        np.testing.assert_allclose(of_costs, value(plan), atol=1e-4)


@pytest.mark.verify
def test_gradient_of_masses():
    """Mass that is moved from one word to another, by POT's values."""
    change = np.array([0.01, -0.01, 0.0, 0.0, 0.0])

    def by_pot(step, options):
        p = P + step * change
        if "partial" in options:
            return ot.partial.partial_wasserstein2(p, Q, D, m=0.6)
        return ot.unbalanced.mm_unbalanced2(
            p, Q, D, 0.5, returnCost="total", numItermax=100000
        )

    for options in ({"partial": 0.6}, {"unbalanced": 0.5}):
        expected = by_pot(1, options) - by_pot(-1, options)
        of_p, _ = slope(
            lambda p, D, options=options: wasserstein_distance(
                p,
                ops.convert_to_tensor(Q, "float32"),
                D,
                "sinkhorn",
                regularization=1e-3,
                **options,
            ),
            P,
            D,
        )
        np.testing.assert_allclose(
            2 * np.sum(of_p * change), expected, rtol=0.1, atol=3e-4
        )


# Masks, batches, layers

OPTIONS = [{"partial": 0.6}, {"unbalanced": 0.5}, {"debiased": True}]
A = RNG.normal(size=(3, 5, 2)).astype("float32")
B = RNG.normal(size=(3, 4, 2)).astype("float32")
LENGTHS = [5, 2, 3]
MASK = np.arange(5) < np.array(LENGTHS)[:, None]


VERIFIED = verified(*OPTIONS[::-1])


@pytest.mark.parametrize("options", VERIFIED, ids=str)
def test_masks_and_batches(options):
    garbage = np.where(MASK[..., None], A, 1e9)
    found = word_rotator_distance(
        garbage, B, (MASK, None), **SINKHORN, **options
    )
    expected = [
        float(word_rotator_distance(a[:n], b, **SINKHORN, **options))
        for a, b, n in zip(A, B, LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(value(found), expected, rtol=1e-3, atol=1e-5)
    layer = WordRotatorDistance(tolerance=1e-5, **options)
    by_layer = layer(
        [ops.convert_to_tensor(np.where(MASK[..., None], A, 7)), B],
        mask=[ops.convert_to_tensor(MASK), None],
    )
    np.testing.assert_allclose(value(by_layer), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", VERIFIED, ids=str)
def test_layers_keep_their_options(options):
    layer = WordMoverDistance(pairwise=True, **options)
    config = layer.get_config()
    assert {**config, **options} == config
    layer = WordMoverDistance.from_config(config)
    all_pairs = value(layer([A, B[:2]]))
    assert all_pairs.shape == (3, 2)
    aligned = WordMoverDistance(**options)
    for j in range(2):
        expected = value(aligned([A, np.stack([B[j]] * 3)]))
        np.testing.assert_allclose(
            # Pairs that are solved together stop together.
            all_pairs[:, j],
            expected,
            rtol=5e-3,
        )


@pytest.mark.verify
def test_trained_with_the_divergence():
    """Two words move onto two others; the biased distance would shrink them."""
    target = np.array([[[0.0, 0.0], [2.0, 0.0]]], "float32")
    words = keras.layers.Embedding(2, 2, embeddings_initializer="uniform")
    tokens = keras.Input((2,), dtype="int32")
    goal = keras.Input((2, 2))
    distance = WordMoverDistance(debiased=True, regularization=0.5)(
        [words(tokens), goal]
    )
    model = keras.Model([tokens, goal], distance)
    model.compile(
        keras.optimizers.Adam(0.1),
        lambda y, d: ops.mean(d),
        jit_compile=not TENSORFLOW,
    )
    data = [np.tile([[0, 1]], (20, 1)), np.tile(target, (20, 1, 1))]
    model.fit(data, np.zeros(20), batch_size=1, epochs=3, verbose=0)
    found = value(words.embeddings)
    found = found[np.argsort(found[:, 0])]
    np.testing.assert_allclose(found, target[0], atol=0.1)


# One text beside many


@pytest.mark.parametrize("solver", verified("exact", "sinkhorn", "relaxed"))
def test_one_query_and_a_batch(solver):
    expected = [float(word_rotator_distance(A[0], b, solver=solver)) for b in B]
    for x, y in ((A[0], B), (B, A[0])):
        found = value(word_rotator_distance(x, y, solver=solver))
        np.testing.assert_allclose(found, expected, rtol=3e-3)
    np.testing.assert_allclose(
        value(word_rotator_similarity(A[0], B, solver=solver)),
        1 - np.array(expected),
        atol=3e-3,
    )


def test_the_mask_and_the_weights_of_one_query():
    weights = (np.array([0.5, 0.25, 0.25]), np.full((3, 4), 0.25))
    expected = [
        word_mover_distance(A[1][:3], b, weights=(weights[0], np.full(4, 0.25)))
        for b in B
    ]
    found = word_mover_distance(A[1][:3], B, weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    mask = np.array([True, False, True, True, False])
    expected = [word_mover_distance(A[1][mask], b) for b in B]
    found = word_mover_distance(A[1], B, (mask, None))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unbalanced": 0.5}, "Received: solver=.exact., unbalanced=0.5"),
        ({"debiased": True}, "Received: solver=.exact., debiased=True"),
        ({"partial": 0.5, "solver": "relaxed"}, "Received: solver=.relaxed."),
        ({"partial": 0.0}, "Received: partial=0"),
        ({"partial": 1.5}, "Received: partial=1.5"),
        ({"unbalanced": 0, "solver": "sinkhorn"}, "Received: unbalanced=0"),
        ({"debiased": 1, "solver": "sinkhorn"}, "Received: debiased=1"),
        (
            {"partial": 0.5, "unbalanced": 1.0, "solver": "sinkhorn"},
            "Received: unbalanced and partial",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        word_mover_distance(X, Y, **options)
    options = {"solver": "exact", **options}
    with pytest.raises(ValueError, match=message):
        WordMoverDistance(**options)


@pytest.mark.parametrize(
    "own_costs",
    [DXX, (DXX,), (DYY, DXX), (DXX + np.triu(DXX), DYY), (DXX * np.nan, DYY)],
    ids=range(5),
)
def test_own_costs_that_do_not_fit(own_costs):
    with pytest.raises(ValueError, match="own_costs"):
        wasserstein_distance(P, Q, D, "sinkhorn", own_costs=own_costs)
