"""Neighbors of many documents, classes, added and removed ones (post 7388)."""

import numpy as np
import ot
import pytest

from blogkeras import TransportClassifier, TransportIndex
from blogkeras.backend import BACKEND

# The index computes with NumPy, so one backend is enough.
pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="the same")
RNG = np.random.default_rng(2)
VECTORS = RNG.normal(size=(40, 5))
DOCUMENTS = [RNG.integers(0, 40, RNG.integers(1, 7)) for _ in range(30)]
DOCUMENTS[3] = np.array([], "int64")
QUERIES = [RNG.integers(0, 40, 4) for _ in range(6)]


def texts(documents):
    """Arrays of vectors; an empty document has none."""
    return [VECTORS[d] for d in documents]


def emd(a, b):
    """Word rotator's distance by POT; an empty document is a zero vector."""
    p, q = (np.linalg.norm(x, axis=1) for x in (a, b))
    if not len(a) or not len(b):
        return 1.0 if len(a) or len(b) else 0.0
    cost = 1 - (a / p[:, None]) @ (b / q[:, None]).T
    return ot.emd2(p / p.sum(), q / q.sum(), cost)


def matrix(queries, documents):
    return np.array([[emd(a, b) for b in documents] for a in queries])


def assert_neighbors(found, every):
    distances, indices = found
    k = distances.shape[1]
    rows = np.arange(len(every))[:, None]
    np.testing.assert_allclose(
        distances, np.sort(every, axis=1)[:, :k], atol=1e-9
    )
    np.testing.assert_allclose(every[rows, indices], distances, atol=1e-9)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("by_id", [True, False])
def test_neighbors_of_queries_and_of_the_documents_themselves(by_id):
    documents, queries = (
        x if by_id else texts(x) for x in (DOCUMENTS, QUERIES)
    )
    index = TransportIndex(documents, VECTORS if by_id else None, verbose=0)
    assert_neighbors(
        index.kneighbors(queries, 7), matrix(texts(QUERIES), texts(DOCUMENTS))
    )
    every = matrix(texts(DOCUMENTS), texts(DOCUMENTS))
    every[np.arange(30), np.arange(30)] = np.inf
    distances, indices = index.kneighbors(k=4)
    assert_neighbors((distances, indices), every)
    assert not (indices == np.arange(30)[:, None]).any()


@pytest.mark.parametrize("by_id", [True, False])
def test_documents_come_and_go(by_id, tmp_path):
    """As an index of those that are left, also from a file."""
    documents = DOCUMENTS if by_id else texts(DOCUMENTS)
    queries = QUERIES if by_id else texts(QUERIES)
    vectors = VECTORS if by_id else None
    index = TransportIndex(documents[:12], vectors, verbose=0)
    index.add(documents[12:25])
    index.remove([3, 24, 0])
    fewer = [*documents[1:3], *documents[4:24]]
    np.testing.assert_allclose(
        index.kneighbors(queries, 5)[0],
        TransportIndex(fewer, vectors, verbose=0).kneighbors(queries, 5)[0],
        atol=1e-12,
    )
    index.add(documents[25:])
    index.remove(np.array([], "int64"))
    left = [*documents[1:3], *documents[4:24], *documents[25:]]
    assert len(index) == len(left) == 27
    index.save(tmp_path / "index.npz")
    for changed in (index, TransportIndex.load(tmp_path / "index.npz")):
        fresh = TransportIndex(left, vectors, verbose=0)
        for a, b in zip(
            changed.kneighbors(queries, 27),
            fresh.kneighbors(queries, 27),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-12)
    if not by_id:  # what was removed takes no memory
        assert len(index.vectors) == sum(map(len, left))


def test_of_what_is_wrong_nothing_is_changed():
    index = TransportIndex(DOCUMENTS, VECTORS, verbose=0)
    before = index.kneighbors(QUERIES, 3)
    for wrong in ([30], [-1], [1, 1], [0.5], list(range(30)), ["a"], [True]):
        with pytest.raises(ValueError, match="Expected `indices`"):
            index.remove(wrong)
    for wrong in ([[40]], [[0.5]], [], "text"):
        with pytest.raises(ValueError, match="Expected"):
            index.add(wrong)
    vectors = TransportIndex(texts(DOCUMENTS), verbose=0)
    for wrong in ([np.ones((2, 4))], [np.full((2, 5), np.nan)]):
        with pytest.raises(ValueError, match="Expected"):
            vectors.add(wrong)
    assert len(vectors.vectors) == sum(map(len, DOCUMENTS))
    for k in (0, 31, 2.5):
        with pytest.raises(ValueError, match="Expected `k`"):
            index.kneighbors(QUERIES, k)
    with pytest.raises(ValueError, match="29, the number of other documents"):
        index.kneighbors(k=30)
    np.testing.assert_array_equal(index.kneighbors(QUERIES, 3), before)
    idf = TransportIndex(DOCUMENTS, VECTORS, weights="idf", verbose=0)
    for change in (lambda: idf.add(DOCUMENTS), lambda: idf.remove([0])):
        with pytest.raises(ValueError, match="weights='idf'"):
            change()


@pytest.mark.parametrize("voting", ["uniform", "distance"])
def test_the_neighbors_vote(voting):
    labels = np.array(["b", "a", "c"])[np.arange(30) % 3]
    classifier = TransportClassifier(4, VECTORS, voting=voting)
    assert classifier.fit(DOCUMENTS, labels) is classifier
    assert classifier.classes_.tolist() == ["a", "b", "c"]
    queries = [*QUERIES, DOCUMENTS[5]]  # the last one at distance 0
    every = matrix(texts(queries), texts(DOCUMENTS))
    expected = []
    for row in every:
        near = np.argsort(row, kind="stable")[:4]
        votes = np.ones(4)
        if voting == "distance":
            zero = row[near] < 1e-12
            votes = zero if zero.any() else 1 / row[near]
        share = [votes[labels[near] == c].sum() for c in "abc"]
        expected.append(np.array(share) / np.sum(share))
    np.testing.assert_allclose(
        classifier.predict_proba(queries), expected, atol=1e-9
    )
    predicted = np.array(["a", "b", "c"])[np.argmax(expected, axis=1)]
    assert classifier.predict(queries).tolist() == predicted.tolist()
    right = np.array(predicted)
    right[:2] = "d"
    assert classifier.score(queries, right) == pytest.approx(5 / 7)


def test_a_classifier_in_scikit_learns_search():
    base = pytest.importorskip("sklearn.base")
    classifier = TransportClassifier(2, VECTORS, weights="uniform")
    again = base.clone(classifier)
    assert again is not classifier
    assert again.get_params()["weights"] == "uniform"
    assert again.set_params(k=3) is again
    assert again.k == 3
    with pytest.raises(ValueError, match="Expected names of"):
        again.set_params(neighbors=3)


def test_a_classifier_is_selected_as_scikit_learns_own():
    """Shares of right answers against its neighbors on POT's distances."""
    selection = pytest.importorskip("sklearn.model_selection")
    neighbors = pytest.importorskip("sklearn.neighbors")
    pipeline = pytest.importorskip("sklearn.pipeline")
    # To an empty document all others are equally near.
    documents = [d for d in DOCUMENTS if len(d)]
    labels = np.array(["b", "a", "c"])[np.arange(29) % 3]
    every = matrix(texts(documents), texts(documents))
    every[every < 1e-12] = 0  # rounding; a distance is not negative
    precomputed = neighbors.KNeighborsClassifier(metric="precomputed")
    classifier = TransportClassifier(vectors=VECTORS)
    grid = {"n_neighbors": [1, 3, 5], "weights": ["uniform", "distance"]}
    expected = selection.GridSearchCV(precomputed, grid, cv=3)
    expected.fit(every, labels)
    grid = {"k": [1, 3, 5], "voting": ["uniform", "distance"]}
    found = selection.GridSearchCV(classifier, grid, cv=3)
    found.fit(documents, labels)
    for fold in range(3):
        name = f"split{fold}_test_score"
        np.testing.assert_allclose(
            found.cv_results_[name], expected.cv_results_[name]
        )
    assert found.best_params_["k"] == expected.best_params_["n_neighbors"]
    assert found.predict(documents[:1]) == expected.predict(every[:1])
    for scoring in ("accuracy", "neg_log_loss"):
        np.testing.assert_allclose(
            selection.cross_val_score(
                classifier, documents, labels, cv=3, scoring=scoring
            ),
            selection.cross_val_score(
                precomputed, every, labels, cv=3, scoring=scoring
            ),
        )
    steps = pipeline.make_pipeline(classifier).fit(documents, labels)
    assert steps.score(documents, labels) == pytest.approx(
        precomputed.fit(every, labels).score(every, labels)
    )


def test_a_classifier_refuses():
    classifier = TransportClassifier(2, VECTORS)
    with pytest.raises(ValueError, match="call `fit` first"):
        classifier.predict(QUERIES)
    for labels in ([0] * 29, np.zeros((30, 1), int), [0.5] * 30):
        with pytest.raises(ValueError, match="Expected"):
            classifier.fit(DOCUMENTS, labels)
    for options in ({"k": 0}, {"voting": "x"}, {"cost": "x"}):
        with pytest.raises(ValueError, match="Expected"):
            TransportClassifier(vectors=VECTORS, **options).fit(
                DOCUMENTS, [0] * 30
            )
    few = TransportClassifier(9, VECTORS).fit(DOCUMENTS[:2], [0, 1])
    assert few.predict_proba(QUERIES).tolist() == [[0.5, 0.5]] * 6
    with pytest.raises(ValueError, match="one label for each"):
        few.score(QUERIES, [0])


# The same words in another order


@pytest.mark.parametrize("cost", ["cosine", "euclidean", "rms"])
@pytest.mark.parametrize("weights", ["norm", "uniform"])
def test_the_same_words_are_at_distance_zero(cost, weights):
    rng = np.random.default_rng(0)
    first = [rng.normal(size=(n, 4)) for n in range(2, 42)]
    second = [a[rng.permutation(len(a))] for a in first]
    index = TransportIndex([*first, *second], None, cost, weights, verbose=0)
    for number, text in enumerate([*second, *first]):
        found = index.search(text, k=2)
        np.testing.assert_array_equal(found.distances, 0)
        number %= len(first)
        assert found.indices.tolist() == [number, number + len(first)]


def test_ids_of_the_same_words_are_at_distance_zero():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, n) for n in range(2, 62)]
    index = TransportIndex(documents, VECTORS, verbose=0)
    for number, document in enumerate(documents):
        found = index.search(rng.permutation(document), k=1)
        assert found.distances == [0]
        assert found.indices == [number]


def test_a_small_distance_is_not_zero():
    # 1 - cos of the angle 1e-7, by its series.
    a, b = np.array([[1.0, 0.0]]), np.array([[1.0, 1e-7]])
    index = TransportIndex([a, [[0.0, 1.0]]], verbose=0)
    found = index.search(b, k=1).distances
    np.testing.assert_allclose(found, 0.5e-14, rtol=1e-3)
    far = np.array([[0.0, 0.0], [1e6, 0.0]])
    near = far + np.array([[1e-6, 0.0], [0.0, 0.0]])
    index = TransportIndex([far], None, "euclidean", "uniform", verbose=0)
    found = index.search(near, k=1).distances
    np.testing.assert_allclose(found, 0.5e-6, rtol=1e-3)


def test_the_same_words_vote_equally():
    a = np.random.default_rng(0).normal(size=(40, 6, 4))
    for number, text in enumerate(a):
        turned = text[np.random.default_rng(number).permutation(6)]
        classifier = TransportClassifier(k=2, voting="distance")
        classifier.fit([text, turned], ["a", "b"])
        np.testing.assert_array_equal(
            classifier.predict_proba([turned]), [[0.5, 0.5]]
        )


# Vectors beyond the range of float32's squares


@pytest.mark.parametrize("cost", ["cosine", "euclidean", "rms"])
@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e25), ("float64", 1e60)]
)
def test_huge_vectors(cost, dtype, size):
    """As the same problem in other units, with as few exact distances."""
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(60, 5, 3)) + 4 * rng.normal(size=(60, 1, 3))
    query = rng.normal(size=(5, 3))
    unit = 2.0 ** np.round(np.log2(size))

    def search(unit):
        texts = (unit * documents).astype(dtype)
        index = TransportIndex(list(texts), None, cost, "uniform", verbose=0)
        return index.search((unit * query).astype(dtype), k=3)

    expected, found = search(1.0), search(unit)
    assert found.indices.tolist() == expected.indices.tolist()
    scale = 1 if cost == "cosine" else unit
    np.testing.assert_allclose(
        found.distances / scale, expected.distances, rtol=1e-9
    )
    assert found.num_exact <= expected.num_exact < 60


def test_labels_that_cannot_be_compared_and_weights_of_a_score():
    classifier = TransportClassifier(1, VECTORS)
    for missing in (None, float("nan"), 3):
        labels = np.array(["a", "b", missing], object)
        with pytest.raises(ValueError, match="Expected `labels` of one type"):
            classifier.fit(DOCUMENTS[:3], labels)
    classifier.fit(DOCUMENTS[:3], ["a", "b", "c"])
    labels, weights = ["a", "a", "c"], [1.0, 2.0, 4.0]
    found = classifier.score(DOCUMENTS[:3], labels, sample_weight=weights)
    assert found == pytest.approx(5 / 7)
    for wrong in ([1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]):
        with pytest.raises(ValueError, match="`sample_weight`"):
            classifier.score(DOCUMENTS[:3], labels, wrong)
