"""All pairs of one or two collections of texts."""

import numpy as np
import pytest
from keras import ops
from kit import slow_on_jax

from blogkeras import (
    TransportIndex,
    pairwise_distances,
    word_mover_distance,
    word_rotator_distance,
)
from blogkeras.transport import exact, pairwise

RNG = np.random.default_rng(2)
TEXTS = [RNG.normal(size=(n, 3)) for n in (4, 1, 3, 2, 5)]
OTHERS = [RNG.normal(size=(n, 3)) for n in (2, 6)]


def by_one(x, y, distance=word_rotator_distance, **options):
    return np.array([[float(distance(a, b, **options)) for b in y] for a in x])


@slow_on_jax
@pytest.mark.parametrize("solver", ["exact", "relaxed"])
def test_each_pair_of_two_collections(solver):
    found = pairwise_distances(TEXTS, OTHERS, solver=solver)
    assert found.shape == (5, 2)
    assert found.dtype == "float64"
    expected = by_one(TEXTS, OTHERS, solver=solver)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_options_are_passed_on():
    options = {"cost": "euclidean", "weights": "uniform"}
    np.testing.assert_allclose(
        pairwise_distances(TEXTS, OTHERS, **options),
        by_one(TEXTS, OTHERS, word_mover_distance),
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        pairwise_distances(TEXTS, OTHERS, partial=0.5),
        by_one(TEXTS, OTHERS, partial=0.5),
        rtol=1e-9,
    )


def test_a_collection_with_itself(monkeypatch):
    expected = by_one(TEXTS, TEXTS)
    solved, solve = [], exact.solve

    def counting(p, *rest, **options):
        solved.append(len(p))
        return solve(p, *rest, **options)

    monkeypatch.setattr(exact, "solve", counting)
    # A few pairs in each block.
    monkeypatch.setattr(pairwise, "_BLOCK", 200)
    found = pairwise_distances(TEXTS)
    assert sum(solved) == 5 * 4 / 2
    assert len(solved) > 2
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(np.diag(found), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.verify
def test_blocks_of_sinkhorn(monkeypatch):
    expected = by_one(TEXTS, TEXTS)
    monkeypatch.setattr(pairwise, "_BLOCK", 300)  # four pairs
    found = pairwise_distances(TEXTS, solver="sinkhorn")
    np.testing.assert_allclose(found, expected, atol=0.02)


@slow_on_jax
@pytest.mark.parametrize(
    "solver",
    ["exact", "relaxed", pytest.param("sinkhorn", marks=pytest.mark.verify)],
)
def test_a_long_text_pads_its_own_pairs_only(solver, monkeypatch):
    texts = [RNG.normal(size=(n, 3)) for n in (3, 40, 2, 9, 12)]
    others = [RNG.normal(size=(n, 3)) for n in (7, 1, 70)]
    shapes, distance = [], pairwise.word_mover_distance

    def noted(x, y, *args, **options):
        shapes.append((x.shape, y.shape))
        return distance(x, y, *args, **options)

    monkeypatch.setattr(pairwise, "word_mover_distance", noted)
    found = pairwise_distances(texts, others, solver=solver)
    expected = by_one(texts, others, solver=solver)
    tolerance = {"atol": 0.02} if solver == "sinkhorn" else {"rtol": 1e-5}
    np.testing.assert_allclose(found, expected, **tolerance)
    # Only the 7 pairs with a text of 40 or 70 words have long padding.
    assert sum(x[0] for x, y in shapes if max(x[1], y[1]) <= 16) == 8
    assert sum(x[0] for x, _ in shapes) == 15
    if solver == "sinkhorn":
        assert len({x[1:] + y[1:] for x, y in shapes}) <= 4
    found = pairwise_distances(texts, solver=solver)
    expected = by_one(texts, texts, solver=solver)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found, expected, **tolerance)


def test_arrays_with_masks_and_weights():
    x = RNG.normal(size=(3, 4, 2))
    y = RNG.normal(size=(2, 5, 2))
    mask = np.arange(4) < np.array([[4], [2], [0]])
    found = pairwise_distances(x, y, (mask, None))
    texts = [text[m] for text, m in zip(x, mask, strict=True)]
    np.testing.assert_allclose(found, by_one(texts, y), rtol=1e-9)
    np.testing.assert_allclose(
        pairwise_distances(ops.convert_to_tensor(x), mask=(mask, None)),
        pairwise_distances(texts),
        atol=1e-6,
    )
    rarity = (RNG.uniform(size=(3, 4)), RNG.uniform(size=(2, 5)))
    found = pairwise_distances(x, y, weights="importance", importance=rarity)
    expected = [
        [
            word_rotator_distance(
                x[i],
                y[j],
                weights="importance",
                importance=(rarity[0][i], rarity[1][j]),
            )
            for j in range(2)
        ]
        for i in range(3)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    shares = tuple(r / r.sum(1, keepdims=True) for r in rarity)
    found = pairwise_distances(x, y, weights=shares)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_importance_of_texts_of_any_length():
    rarity = [RNG.uniform(size=len(text)) for text in TEXTS]
    found = pairwise_distances(
        TEXTS, weights="importance", importance=(rarity, None)
    )
    expected = word_rotator_distance(
        TEXTS[0],
        TEXTS[4],
        weights="importance",
        importance=(rarity[0], rarity[4]),
    )
    np.testing.assert_allclose(found[0, 4], expected, rtol=1e-9)


def test_finds_the_neighbors_of_an_index():
    matrix = pairwise_distances(TEXTS)
    np.fill_diagonal(matrix, np.inf)
    distances, indices = TransportIndex(TEXTS, verbose=0).kneighbors(k=2)
    np.testing.assert_array_equal(np.argsort(matrix, 1)[:, :2], indices)
    np.testing.assert_allclose(np.sort(matrix, 1)[:, :2], distances, rtol=1e-6)


def test_an_empty_text_and_a_single_one():
    np.testing.assert_array_equal(pairwise_distances(TEXTS[:1]), [[0.0]])
    found = pairwise_distances([np.zeros((0, 3)), TEXTS[0]])
    np.testing.assert_allclose(found, [[0, 1], [1, 0]])


def test_the_progress_bar(capsys):
    pairwise_distances(TEXTS, verbose=1)
    assert "10/10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((TEXTS[0],), {}, "Expected `x`"),
        (([],), {}, "Expected `x`"),
        (([TEXTS[0], OTHERS[0][:, :2]],), {}, "with one dim"),
        ((TEXTS, [OTHERS[0][:, :2]]), {}, "vectors of one size"),
        ((TEXTS,), {"mask": (np.ones((5, 5), bool), None)}, "Expected no mask"),
        ((TEXTS,), {"mask": True}, "to be a pair"),
        (
            (TEXTS,),
            {"weights": "importance", "importance": ([[1.0]] * 5, [1])},
            "Expected None as the second of `importance`",
        ),
        ((TEXTS,), {"importance": (None, None)}, "importance=.None, None"),
        ((TEXTS,), {"weights": (None, None)}, "weights=.None, None"),
        ((TEXTS[:1],), {"weights": "importance"}, "Expected `importance`"),
        (
            (TEXTS,),
            {"weights": ([[1.0]] * 5, None)},
            "one weight for each word",
        ),
        ((TEXTS,), {"weights": "rare"}, "Received: weights='rare'"),
        ((TEXTS,), {"weights": "importance"}, "Expected `importance`"),
        ((TEXTS[:1],), {"solver": "simplex"}, "Received: solver="),
        ((TEXTS[:1],), {"cost": "manhattan"}, "Received: cost="),
        ((np.ones((2, 3, 4)) * np.nan,), {}, "finite"),
        (
            (np.ones((2, 3, 4)), None, (np.ones((2, 4)), None)),
            {},
            "mask of `x`",
        ),
    ],
    ids=range(17),
)
def test_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        pairwise_distances(*args, **options)


def test_a_text_without_words_has_the_dimension_of_the_others():
    texts = [[], *TEXTS, []]
    expected = pairwise_distances([np.zeros((0, 3)), *TEXTS, np.zeros((0, 3))])
    np.testing.assert_array_equal(pairwise_distances(texts), expected)
    index = TransportIndex(texts, verbose=0)
    assert index.search([], 2).indices.tolist() == [0, 6]
    with pytest.raises(ValueError, match=r"Expected .*length, dim"):
        pairwise_distances([[], []])
    with pytest.raises(ValueError, match=r"Expected .*length, dim"):
        TransportIndex([[], []], verbose=0)


def test_what_is_wrong_is_said_of_the_collection_that_has_it():
    bad = [TEXTS[0], np.full((1, 3), np.nan)]
    shares = [np.array([0.5, 0.5]), np.array([1.0])]
    texts = [TEXTS[0][:2], TEXTS[1]]
    for x, y, options, message in (
        (bad, None, {}, "numbers in `x`"),
        (bad[1:], None, {}, "numbers in `x`"),
        (TEXTS, bad, {}, "numbers in `y`"),
        (np.full((2, 2, 3), np.inf), None, {}, "numbers in `x`"),
        (texts, None, {"weights": (shares[::-1], None)}, "weight .* of `x`"),
        (
            texts,
            None,
            {"weights": ([shares[0], 2 * shares[1]], None)},
            "`weights of x` of sum 1",
        ),
        (
            texts,
            None,
            {
                "weights": "importance",
                "importance": ([shares[0], -shares[1]], None),
            },
            "nonnegative numbers in `weights of x`",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pairwise_distances(x, y, **options)
