"""The first pass of `TransportIndex`: the same with faiss as without."""

import copy
import pickle

import numpy as np
import pytest
from kit import JAX

from blogkeras import TransportIndex
from blogkeras.transport import first_pass
from blogkeras.transport.first_pass import FirstPass

pytestmark = pytest.mark.skipif(JAX, reason="NumPy and faiss: once is enough")
RNG = np.random.default_rng(6)
VECTORS = RNG.normal(size=(60, 5))
DOCUMENTS = [RNG.integers(0, 60, RNG.integers(1, 6)) for _ in range(200)]


@pytest.fixture
def use_faiss(monkeypatch):
    faiss = pytest.importorskip("faiss")
    used = []

    class Spy(faiss.IndexFlatL2):
        def __init__(self, dim):
            super().__init__(dim)
            used.append(dim)

    monkeypatch.setattr(faiss, "IndexFlatL2", Spy)
    monkeypatch.setattr(first_pass, "_MANY", 1)
    return used


def scan(centroids, center, cost):
    difference = centroids - center
    if cost == "cosine":
        return np.sum(difference**2, 1) / 2
    distance = np.linalg.norm(difference, axis=1)
    return distance / center.size**0.5 if cost == "rms" else distance


@pytest.mark.parametrize("cost", ["cosine", "euclidean", "rms"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_all_within_a_distance_and_no_other(use_faiss, cost, size):
    centroids = size * RNG.normal(size=(300, 7))
    center = size * RNG.normal(size=7)
    bounds = scan(centroids, center, cost)
    search = FirstPass(centroids, cost).of(center)
    # Limits that are bounds themselves, to the last bit.
    for limit in np.sort(bounds)[[0, 3, 80, 299]]:
        found = search.within(limit)
        inside = np.flatnonzero(bounds <= limit * (1 - 1e-12))
        outside = np.flatnonzero(bounds > limit * (1 + 1e-12))
        assert set(inside) <= set(found.tolist())
        assert not set(outside) & set(found.tolist())
        np.testing.assert_array_equal(found, np.sort(found))
    assert use_faiss == [7]
    near = search.nearest(4)
    np.testing.assert_allclose(
        np.sort(bounds[near]), np.sort(bounds)[:4], rtol=1e-4
    )


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 3e-4])
def test_documents_that_are_nearly_equal(use_faiss, noise):
    """Differences at and below the last digit of float32 of the vectors."""
    centroids = 1000 + noise * RNG.normal(size=(50, 4))
    center = centroids[7]
    bounds = scan(centroids, center, "euclidean")
    limit = np.median(bounds)
    found = FirstPass(centroids, "euclidean").of(center).within(limit)
    np.testing.assert_array_equal(found, np.flatnonzero(bounds <= limit))


@pytest.mark.parametrize("options", [("cosine", "norm"), ("euclidean", "idf")])
def test_searches_find_the_same(use_faiss, monkeypatch, options):
    queries = [RNG.integers(0, 60, 4) for _ in range(8)]
    index = TransportIndex(DOCUMENTS, VECTORS, *options, verbose=0)
    with_faiss = index.kneighbors(queries, k=5), index.kneighbors(k=3)
    assert use_faiss
    monkeypatch.setattr(first_pass, "_MANY", 10**9)
    index = TransportIndex(DOCUMENTS, VECTORS, *options, verbose=0)
    without = index.kneighbors(queries, k=5), index.kneighbors(k=3)
    for ours, theirs in zip(with_faiss, without, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_added_and_removed_documents(use_faiss):
    index = TransportIndex(DOCUMENTS[:50], VECTORS, verbose=0)
    index.search(DOCUMENTS[60], k=1)
    index.add(DOCUMENTS[50:])
    result = index.search(DOCUMENTS[60], k=1)
    assert result.distances[0] < 1e-9
    index.remove(result.indices)
    assert index.search(DOCUMENTS[60], k=1).indices[0] < 199
    assert len(use_faiss) == 3


def test_copies_and_files(use_faiss, tmp_path):
    index = TransportIndex(DOCUMENTS, VECTORS, verbose=0)
    expected = index.search([1, 2], k=3)
    index.save(tmp_path / "index.npz")
    for other in (
        copy.deepcopy(index),
        pickle.loads(pickle.dumps(index)),
        TransportIndex.load(tmp_path / "index.npz"),
    ):
        found = other.search([1, 2], k=3)
        np.testing.assert_array_equal(found.indices, expected.indices)


def test_a_query_beyond_the_range_of_float32(use_faiss):
    search = FirstPass(RNG.normal(size=(20, 3)), "euclidean")
    center = np.array([1e60, 0.0, 0.0])
    assert len(search.of(center).within(2e60)) == 20
    assert use_faiss == []
    # Documents of zero vectors alone.
    search = FirstPass(np.zeros((20, 3)), "cosine")
    assert len(search.of(np.zeros(3)).within(0.0)) == 20


def test_without_faiss(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(first_pass, "_MANY", 1)
    monkeypatch.setattr(first_pass, "require", missing)
    index = TransportIndex(DOCUMENTS, VECTORS, verbose=0)
    result = index.search(DOCUMENTS[11], k=2)
    assert result.distances[0] < 1e-9


def test_few_documents_do_without_it(monkeypatch):
    monkeypatch.setattr(
        first_pass, "require", lambda name: pytest.fail("imported")
    )
    index = TransportIndex(DOCUMENTS, VECTORS, verbose=0)
    assert index.search(DOCUMENTS[11], k=2).distances[0] < 1e-9


def test_centroids_are_compared_in_blocks(monkeypatch):
    monkeypatch.setattr(first_pass, "_BLOCK", 21)
    centroids, center = RNG.normal(size=(50, 7)), RNG.normal(size=7)
    bounds = scan(centroids, center, "cosine")
    found = FirstPass(centroids, "cosine").of(center).within(np.median(bounds))
    assert len(found) == 25
