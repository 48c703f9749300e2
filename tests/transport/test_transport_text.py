"""Weights of words, the index, the figure (post 7388)."""

import numpy as np
import pytest

from blogkeras import TransportIndex
from blogkeras.transport import (
    all_but_the_top,
    common_components,
    inverse_document_frequency,
    plot_alignment,
    remove_components,
    sif_weights,
    transport_plan,
    usif_weights,
    word_mover_distance,
)

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(60, 6)) * np.exp(RNG.normal(size=(60, 1)))
VECTORS[7] = 0
IDS = [RNG.integers(0, 60, RNG.integers(1, 9)) for _ in range(200)]
IDS[5] = np.array([], "int64")
IDS[9] = np.array([7, 7])
IDS[20] = IDS[21] = IDS[10]


def brute_force(documents, query, cost, weights, idf=None):
    """Distances by the function, which the other tests hold to POT."""
    found = []
    weights = "importance" if weights == "idf" else weights
    for d in documents:
        x, y = (VECTORS[z] if z.ndim == 1 else z for z in (query, d))
        given = None if idf is None else (idf[query], idf[d])
        found.append(word_mover_distance(x, y, None, cost, weights, given))
    return np.array(found)


@pytest.mark.parametrize("cost", ["cosine", "euclidean", "rms"])
@pytest.mark.parametrize("weights", ["norm", "uniform", "idf"])
def test_search_is_brute_force(cost, weights, tmp_path):
    index = TransportIndex(IDS, VECTORS, cost, weights, verbose=0)
    assert len(index) == 200
    index.save(tmp_path / "index.npz")
    loaded = TransportIndex.load(tmp_path / "index.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["index.npz"]
    spared = 0
    for query in (IDS[0], IDS[10], IDS[5], np.array([3, 7, 3, 11])):
        expected = brute_force(IDS, query, cost, weights, index.idf)
        for k in (1, 10, 500):
            order = np.argsort(expected.round(10), kind="stable")[:k]
            indices, distances, num_exact = index.search(query, k)
            np.testing.assert_allclose(
                distances, expected[order], rtol=1e-9, atol=1e-9
            )
            np.testing.assert_allclose(
                expected[indices], expected[order], rtol=1e-9, atol=1e-9
            )
            assert len(set(indices)) == len(indices) == min(k, 200)
            assert min(k, 200) <= num_exact <= 200
            spared += 200 - num_exact
            again = loaded.search(query, k)
            np.testing.assert_array_equal(again.indices, indices)
            np.testing.assert_array_equal(again.distances, distances)
            assert again.num_exact == num_exact
    assert spared > 200  # and not by comparing everything


def test_search_in_token_vectors():
    documents = [VECTORS[ids].astype("float32") for ids in IDS]
    index = TransportIndex(documents, verbose=0)
    expected = brute_force(documents, documents[3], "cosine", "norm")
    indices, distances, _ = index.search(documents[3], k=5)
    order = np.argsort(expected)[:5]
    np.testing.assert_allclose(distances, expected[order], atol=1e-9)
    assert indices[0] == 3
    empty = index.search(np.zeros((0, 6)), k=2)
    assert set(empty.indices) == {5, 9}
    assert empty.distances.max() == 0


def test_progress_and_errors(capsys):
    TransportIndex(IDS, VECTORS)
    assert "200/200" in capsys.readouterr().out
    TransportIndex(IDS, VECTORS, verbose=0)
    assert capsys.readouterr().out == ""
    index = TransportIndex(IDS, VECTORS, verbose=0)
    documents = [VECTORS[:2], VECTORS[:3, :2]]
    for match, call in [
        ("at least one document", lambda: TransportIndex([])),
        ("`cost`", lambda: TransportIndex(IDS, VECTORS, "manhattan")),
        ("`weights`", lambda: TransportIndex(IDS, VECTORS, "cosine", "tf")),
        ("word ids", lambda: TransportIndex(documents[:1], weights="idf")),
        ("one dimension", lambda: TransportIndex(documents)),
        ("finite", lambda: TransportIndex([VECTORS * np.nan])),
        ("from 60 to 60", lambda: TransportIndex([[60]], VECTORS)),
        ("at least 1", lambda: index.search(IDS[0], k=0)),
        ("from -1 to -1", lambda: index.search([-1])),
        (
            "`query` of shape",
            lambda: TransportIndex(documents[:1], verbose=0).search(
                VECTORS[:2, :3]
            ),
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


def test_idf_sif_and_usif_are_the_formulas():
    idf = inverse_document_frequency([[0, 1, 1], [0, 2], []], 4)
    np.testing.assert_allclose(idf, np.log([3 / 2, 3, 3, 3]))
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    np.testing.assert_allclose(sif_weights(p, 0.1), 0.1 / (0.1 + p))
    # The author's usif.py by hand: V = 5, n = 1, threshold 1/5, α = 2/5
    # (0.4 and 0.3), Z = 5/2, a = (3/5)/(2/5 · 5/2) = 3/5.
    np.testing.assert_allclose(usif_weights(p, 1), 0.6 / (0.3 + p))


def test_components():
    common = np.array([0.6, 0.8, 0.0])
    noise = RNG.normal(size=(50, 3)) * 0.01
    v = RNG.normal(size=(50, 1)) * 3 * common + noise
    components, shares = common_components(v, 2)
    _, singular, right = np.linalg.svd(v, full_matrices=False)
    np.testing.assert_allclose(np.abs(components), np.abs(right[:2]), atol=1e-9)
    np.testing.assert_allclose(
        shares, singular[:2] ** 2 / (singular[:2] ** 2).sum(), rtol=1e-9
    )
    left = remove_components(v, components[:1])
    expected = v - v @ np.outer(right[0], right[0])
    np.testing.assert_allclose(left, expected, atol=1e-9)
    # usif.py: one component after the other, each by its share.
    expected = v.copy()
    for share, c in zip(shares, components, strict=True):
        expected = expected - share * (expected @ c)[:, None] * c
    np.testing.assert_allclose(
        remove_components(v, components, shares), expected, atol=1e-12
    )
    top = all_but_the_top(v + 5, 1)
    centred = v - v.mean(0)
    main = np.linalg.svd(centred)[2][0]
    np.testing.assert_allclose(
        top, centred - np.outer(centred @ main, main), atol=1e-9
    )
    assert all_but_the_top(v.astype("float32"), 0).dtype == np.float32


def test_components_of_integers_and_of_half_precision():
    """Integers keep the digits of the components; sums stay in range."""
    v = np.array([[3, 4, 0], [6, 8, 0], [-3, -4, 1]])
    components, _ = common_components(v, 1)
    _, _, right = np.linalg.svd(v)
    np.testing.assert_allclose(np.abs(components[0]), np.abs(right[0]))
    centred = v - v.mean(0)
    np.testing.assert_allclose(all_but_the_top(v, 0), centred, atol=1e-12)
    half = np.full((2, 3), 60000, "float16")
    unit = np.full((1, 3), 3**-0.5, "float16")
    left = remove_components(half, unit)
    assert left.dtype == np.float16
    np.testing.assert_allclose(left, 0, atol=60)


def test_search_where_distances_are_far_below_the_size_of_vectors():
    """A bound may exceed the distance by a rounding error of the vectors."""
    vectors = np.array([[1e12, -0.13, 0.64], [0.1, -0.54, 0.36]], "float32")
    index = TransportIndex([[0, 1]], vectors, "euclidean", "norm", 0)
    result = index.search([0], k=1)
    expected = word_mover_distance(
        vectors[:1], vectors, cost="euclidean", weights="norm"
    )
    np.testing.assert_allclose(result.distances, expected)


def test_weighting_errors():
    X = np.eye(3)
    for match, call in [
        ("from 3 to 3", lambda: inverse_document_frequency([[3]], 3)),
        ("at least one", lambda: inverse_document_frequency([], 3)),
        ("probabilities", lambda: sif_weights([3, 1])),
        ("`a`", lambda: sif_weights([0.5], a=0)),
        ("whole vocabulary", lambda: usif_weights([0.5, 0.5])),
        ("sentence_length", lambda: usif_weights([0.9, 0.1], 0)),
        ("num_components", lambda: common_components(np.ones((3, 2)), 3)),
        ("as many shares", lambda: remove_components(X, X[:2], [1.0])),
        ("shares", lambda: remove_components(X, X[:2], [1.0, np.nan])),
        ("`components`", lambda: remove_components(X, np.full((1, 3), np.inf))),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


def test_alignment_figure(tmp_path):
    x, y = VECTORS[:3], VECTORS[2:6]
    plan = transport_plan(x, y)
    path = tmp_path / "new" / "alignment.png"
    figure = plot_alignment(plan, ["a", "b", "c"], list("defg"), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.texts] == list("abcdefg")
    # One ribbon for each entry of the plan that is large enough, and of its
    # width.
    ribbons = axes.collections
    shown = plan[plan >= 0.01]
    assert len(ribbons) == len(shown)
    for ribbon, mass in zip(ribbons, shown, strict=True):
        corners = ribbon.get_paths()[0].vertices
        bottom = corners[corners[:, 1] == 0][:, 0]
        np.testing.assert_allclose(np.ptp(bottom), mass, rtol=1e-6)
    with pytest.raises(ValueError, match="3 and 3 words"):
        plot_alignment(plan, list("abc"), list("def"))
    for wrong in (-1.0, np.nan, np.inf):
        plan[0, 0] = wrong
        with pytest.raises(ValueError, match="`plan`"):
            plot_alignment(plan, list("abc"), list("defg"))
