"""The index and its files: integers, damaged files, POT's native core."""

import io
import json
import os
import stat

import numpy as np
import pytest

import blogkeras
from blogkeras import (
    TransportIndex,
    inverse_document_frequency,
    word_mover_distance,
)
from blogkeras.transport import exact, measures

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(40, 5))
VECTORS[7] = 0
DOCUMENTS = [RNG.integers(0, 40, RNG.integers(1, 9)) for _ in range(60)]
DOCUMENTS[3] = np.array([], "int64")
DOCUMENTS[4] = np.array([7, 7])
DOCUMENTS[6] = np.array([2, 2, 2, 5, 5])  # no count is 1
QUERY = [1, 2, 2, 5]


def saved(path, weights="norm", by_id=True, cost="cosine"):
    documents = DOCUMENTS if by_id else [VECTORS[d] for d in DOCUMENTS]
    vectors = VECTORS if by_id else None
    index = TransportIndex(documents, vectors, cost, weights, verbose=0)
    index.save(path)
    return index


def contents(path):
    with np.load(path) as data:
        return dict(data)


def as_version_1(arrays):
    """What `save` wrote before the format had a number."""
    config = json.loads(str(arrays["config"]))
    del config["version"], arrays["counts"]
    arrays["config"] = np.array(json.dumps(config))
    return arrays


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("cost", ["cosine", "rms"])
@pytest.mark.parametrize("weights", ["norm", "uniform", "idf"])
def test_files_of_both_versions_load(weights, cost, by_id, tmp_path):
    if weights == "idf" and not by_id:
        return
    path = tmp_path / "index.npz"
    index = saved(path, weights, by_id, cost)
    query = QUERY if by_id else VECTORS[QUERY]
    expected = index.search(query, k=60)
    for version in (2, 1):
        if version == 1:
            np.savez(path, **as_version_1(contents(path)))
        result = TransportIndex.load(path).search(query, k=60)
        np.testing.assert_array_equal(result.indices, expected.indices)
        np.testing.assert_allclose(
            result.distances, expected.distances, rtol=1e-12, atol=1e-14
        )
        assert isinstance(result, blogkeras.SearchResult)


def config(**changes):
    def change(arrays):
        settings = {**json.loads(str(arrays["config"])), **changes}
        arrays["config"] = np.array(json.dumps(settings))

    return change


def replace(name, fn):
    def change(arrays):
        arrays[name] = fn(arrays[name])

    return change


def swapped(x):
    """Two entries of the first document that has two, changed places."""
    x = x.copy()
    x[[0, 1]] = x[[1, 0]]
    return x


def nan(x):
    x = x.astype("float64")
    x.flat[3] = np.nan
    return x


CHANGES = {
    "starts reversed": replace("starts", lambda x: x[::-1]),
    "starts × 1000": replace("starts", lambda x: x * 1000),
    "starts below zero": replace("starts", lambda x: x - 1),
    "starts of floats": replace("starts", lambda x: x.astype("float64")),
    "starts cut": replace("starts", lambda x: x[:-1]),
    "starts empty": replace("starts", lambda x: x[:0]),
    "starts of two axes": replace("starts", lambda x: x[None]),
    "starts past int64": replace("starts", lambda x: x.astype("u8") + 2**63),
    "ids cut": replace("ids", lambda x: x[:5]),
    "ids too large": replace("ids", lambda x: x + 1000),
    "ids below -1": replace("ids", lambda x: x - 3),
    "ids shifted": replace("ids", lambda x: np.where(x >= 0, (x + 1) % 40, x)),
    "ids of floats": replace("ids", lambda x: x + 0.5),
    "ids in disorder": replace("ids", swapped),
    "ids of objects": replace("ids", lambda x: x.astype(object)),
    "cost bogus": config(cost="bogus"),
    "cost another": config(cost="euclidean"),
    "weights bogus": config(weights="bogus"),
    "weights another": config(weights="uniform"),
    "weights a number": config(weights=3),
    "by_id a number": config(by_id=1),
    "by_id false": config(by_id=False),
    "version to come": config(version=3),
    "version of text": config(version="2"),
    "a setting too many": config(color="red"),
    "config of bytes": replace("config", lambda x: x.astype("S")),
    "config no JSON": replace("config", lambda x: np.array("{")),
    "config a list": replace("config", lambda x: np.array("[]")),
    "masses × 10": replace("masses", lambda x: x * 10),
    "masses of two words swapped": replace("masses", swapped),
    "masses of NaN": replace("masses", nan),
    "masses negative": replace("masses", lambda x: -x),
    "masses in float32": replace("masses", lambda x: x.astype("float32")),
    "vectors of NaN": replace("vectors", nan),
    "vectors × 2 in one axis": replace(
        "vectors", lambda x: x * [2, 1, 1, 1, 1]
    ),
    "vectors cut": replace("vectors", lambda x: x[:, :3]),
    "vectors of one axis": replace("vectors", lambda x: x[0]),
    "vectors of integers": replace("vectors", lambda x: x.astype("int64")),
    "vectors complex": replace("vectors", lambda x: x + 1j),
    "vectors none": replace("vectors", lambda x: x[:0]),
    "centroids shifted": replace("centroids", lambda x: x + 0.1),
    "centroids of NaN": replace("centroids", nan),
    "centroids cut": replace("centroids", lambda x: x[:-1]),
    "an idf not asked for": replace("idf", lambda x: np.ones(40)),
    "a key missing": lambda arrays: arrays.pop("masses"),
    "a key too many": lambda arrays: arrays.update(more=np.zeros(2)),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused(change, version, tmp_path):
    path = tmp_path / "index.npz"
    saved(path)
    arrays = contents(path)
    if version == 1:
        arrays = as_version_1(arrays)
    CHANGES[change](arrays)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"that `TransportIndex.save` wrote"):
        TransportIndex.load(path)


@pytest.mark.parametrize(
    "change",
    [
        replace("counts", lambda x: x * 0),
        replace("counts", lambda x: x + 0.5),
        replace("counts", lambda x: x[1:]),
        replace("counts", lambda x: x + np.arange(len(x))),
        replace("idf", lambda x: x * 2),
        replace("idf", nan),
        replace("idf", lambda x: x[:-1]),
        replace("idf", lambda x: x[:0]),
        replace("idf", lambda x: x[:, None]),
    ],
)
def test_changed_counts_and_frequencies_are_refused(change, tmp_path):
    path = tmp_path / "index.npz"
    saved(path, "idf")
    arrays = contents(path)
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"TransportIndex.save"):
        TransportIndex.load(path)


def garbage(tmp_path):
    path = tmp_path / "index.npz"
    saved(path)
    good = path.read_bytes()
    array = io.BytesIO()
    np.save(array, np.ones(3))
    pickled = io.BytesIO()
    np.savez(pickled, config=np.array([{}], object))
    yield b""
    yield b"words and more words\n"
    yield b"PK\x03\x04"
    yield array.getvalue()
    yield pickled.getvalue()
    yield good[: len(good) // 2]
    yield good[:100] + good[200:]
    for place in range(0, len(good) - 8, max(len(good) // 40, 1)):
        # Anything at all in eight bytes: an error, or the index as it was
        # (an archive has bytes that mean nothing).
        yield good[:place] + b"\xff" * 8 + good[place + 8 :]


def test_damaged_files(tmp_path):
    path = tmp_path / "damaged"
    expected = saved(tmp_path / "good.npz").search(QUERY, k=9)
    refused = []
    for number, data in enumerate(garbage(tmp_path)):
        path.write_bytes(data)
        try:
            result = TransportIndex.load(path).search(QUERY, k=9)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert number > 6
            np.testing.assert_array_equal(result.distances, expected.distances)
    assert len(refused) > 30
    wanted = "Expected a file that `TransportIndex.save`"
    assert all(wanted in message for message in refused)
    with pytest.raises(FileNotFoundError):
        TransportIndex.load(tmp_path / "missing.npz")
    for path in (None, 3, "", b"index.npz"):
        with pytest.raises(ValueError, match="to be a path"):
            TransportIndex.load(path)


def test_a_saved_file_is_as_any_other(tmp_path):
    path = tmp_path / "new" / "folder" / "index.npz"
    before = os.umask(0o026)
    try:
        index = saved(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in path.parent.iterdir()] == ["index.npz"]
    index._ids = _Unwritable()
    with pytest.raises(KeyboardInterrupt):
        index.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["index.npz"]
    assert len(TransportIndex.load(path)) == len(DOCUMENTS)
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    saved(link, "uniform")
    assert link.is_symlink()
    assert TransportIndex.load(path).weighting == "uniform"


class _Unwritable:
    def __array__(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "query",
    [
        VECTORS[:2],
        [1.0, 2.0],
        np.array([1.9]),
        [True, False],
        np.array([1, 2]) > 1,
        ["a"],
        "abc",
        None,
        7,
        [[1, 2]],
        [[1], [2, 3]],
        [40],
        [-1],
        [2**70],
    ],
)
def test_ids_are_integers(query):
    index = TransportIndex(DOCUMENTS, VECTORS, verbose=0)
    with pytest.raises(ValueError, match=r"query|inhomogeneous"):
        index.search(query)
    with pytest.raises(ValueError, match=r"documents|inhomogeneous"):
        TransportIndex([DOCUMENTS[0], query], VECTORS, verbose=0)
    with pytest.raises(ValueError, match=r"documents|inhomogeneous"):
        inverse_document_frequency([DOCUMENTS[0], query], 40)


@pytest.mark.parametrize("k", [1.7, 1.0, True, "1", None, 0, -1, np.nan])
def test_k_is_an_integer(k):
    index = TransportIndex(DOCUMENTS, VECTORS, verbose=0)
    with pytest.raises(ValueError, match="`k` to be an integer of at least 1"):
        index.search(QUERY, k)
    assert len(index.search(QUERY, np.int64(3)).indices) == 3


@pytest.mark.parametrize(
    ("documents", "vectors"),
    [
        (5, VECTORS),
        (None, VECTORS),
        ("a text", VECTORS),
        ({}, VECTORS),
        (iter(DOCUMENTS), VECTORS),
        (DOCUMENTS, "vectors"),
        (DOCUMENTS, VECTORS[0]),
        (DOCUMENTS, VECTORS > 0),
        (DOCUMENTS, VECTORS + 1j),
        (DOCUMENTS, [[1.0], [1.0, 2.0]]),
        (DOCUMENTS, VECTORS[:, :0]),
        (DOCUMENTS, 1e200 * VECTORS),
        ([VECTORS[0]], None),
        ([["a"]], None),
        ([5], None),
    ],
)
def test_documents_and_vectors(documents, vectors):
    with pytest.raises(ValueError, match="Expected"):
        TransportIndex(documents, vectors, verbose=0)


def test_only_empty_documents():
    for documents, vectors in (
        ([[], []], VECTORS[:0]),
        ([[], []], VECTORS),
        ([VECTORS[:0], VECTORS[:0]], None),
    ):
        index = TransportIndex(documents, vectors, verbose=0)
        result = index.search([] if vectors is not None else VECTORS[:0])
        np.testing.assert_array_equal(result.distances, 0)


@pytest.mark.parametrize(
    ("p", "q", "cost"),
    [
        ([0.5, 0.5], [1.0], np.ones((2, 2))),
        ([1.0], [0.5, 0.5], np.ones((2, 2))),
        ([0.5, 0.5], [0.5, 0.5], np.ones((20, 20))),
        ([], [], np.ones((0, 0))),
        ([0.5, 0.5], [0.5, 0.5], np.full((2, 2), np.nan)),
        ([0.5, 0.5], [0.5, 0.5], np.full((2, 2), np.inf)),
        ([np.nan, 0.5], [0.5, 0.5], np.ones((2, 2))),
        ([-1.0, 2.0], [0.5, 0.5], np.ones((2, 2))),
        ([0.5, 0.5], [0.5, 0.7], np.ones((2, 2))),
        ([0.5, 0.5], [0.5, 0.5], np.ones((2, 2), "float32")),
        ([0.5, 0.5], [0.5, 0.5], np.asfortranarray([[1.0, 2], [3, 4]])),
        ([0.5, 0.5], [0.5, 0.5], [[1.0, 2], [3, 4]]),
        ([[0.5, 0.5]], [0.5, 0.5], np.ones((2, 2))),
    ],
)
def test_nothing_reaches_the_native_core_unchecked(p, q, cost):
    with pytest.raises(ValueError, match="Expected"):
        exact.simplex()(np.array(p), np.array(q), cost)


def test_huge_costs_are_finite():
    cost = 1e308 * (1 - np.eye(2))
    plan, value, _, _ = exact.simplex()(np.full(2, 0.5), np.full(2, 0.5), cost)
    np.testing.assert_array_equal(plan, np.eye(2) / 2)
    assert value == 0


def test_near_ties_beside_far_words():
    """Products of words far from the centre round by more than a tie's gap."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 2)).astype("f") * np.float32(0.02)

    def pair(radius, turn, between):
        angles = np.array([turn, turn + between])
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return (query + radius * circle).astype("f")

    near = pair(1.0, rng.uniform(0, 6.28), 2.0)
    less_near = pair(1 + 5e-7, rng.uniform(0, 6.28), 3.1)
    far = np.array([10.3, 0]) + rng.normal(size=(28, 2)) * 0.05
    far[-1] = 28 * query[0] - far[:-1].sum(0) + [14, 0]
    documents = [near, less_near, far.astype("f")]
    options = {"cost": "euclidean", "weights": "uniform"}
    index = TransportIndex(documents, **options, verbose=0)
    expected = [word_mover_distance(query, text) for text in documents]
    assert np.argmin(expected) == 0
    found = index.search(query, k=1)
    assert found.indices.tolist() == [0]
    assert found.distances[0] == pytest.approx(expected[0], rel=1e-9)


@pytest.mark.parametrize("cost", measures.COSTS)
def test_bounds_of_single_precision(cost):
    """Costs of float32 are lowered to at most those of float64."""
    rng = np.random.default_rng(0)
    for offset in (0.0, 10.0, 1e3):
        for dim in (1, 2, 30):
            x = rng.normal(size=(50, dim))
            y = rng.normal(size=(60, dim))
            y[::2] += offset  # the centre is among these
            y[1::4] = x[:15] * (1 + 1e-4 * rng.normal(size=(15, dim)))
            right = measures.cost_matrix(np, x, y, cost)
            lowered, scale = measures.lowered_costs(x, y, cost)
            assert scale == 1
            assert (lowered <= right).all()
            np.testing.assert_allclose(lowered, right, rtol=0.1, atol=0.1)
