"""Finds the nearest documents exactly, with few exact distances."""

import json
import os
import tempfile
from typing import NamedTuple

import keras
import numpy as np

from blogkeras.transport import exact, measures
from blogkeras.transport.weighting import inverse_document_frequency


class SearchResult(NamedTuple):
    """What `TransportIndex.search` returns.

    Attributes:
        indices: `(k,)`, the nearest documents, nearest first.
        distances: `(k,)`, float64, exact.
        num_exact: Integer. How many exact distances it took.
    """

    indices: object
    distances: object
    num_exact: int


class TransportIndex:
    """Finds the k documents with the least WMD or WRD to a query.

    The answer is that of comparing the query with every document. Lower bounds
    spare most comparisons: by their centroids (WCD, or the post's bound of WRD)
    documents are sorted, the first k are solved exactly, and whatever cannot be
    nearer than these is left; of the rest the relaxed distances (RWMD, the
    larger of both) are computed, for all at once, and the exact distance in
    that order, until no bound is below the k-th distance found.

    Args:
        documents: Sequence of documents: arrays `(length, dim)` of word vectors
            or, with `vectors`, sequences of word ids. An empty document counts
            as one zero vector.
        vectors: `(num_words, dim)`, the vectors of all words, or `None`.
        cost: `"cosine"`, `"euclidean"` or `"rms"`.
        weights: `"norm"`, `"uniform"`, or, for word ids only, `"idf"`, counted
            in the documents.
        verbose: 0 for no progress bar, 1 for one.

    Attributes:
        idf: `(num_words,)` with `weights="idf"`, else `None`.

    Example:

    >>> vectors = np.random.default_rng(0).normal(size=(100, 8))
    >>> index = TransportIndex([[1, 2], [3, 4, 4], [5]], vectors, verbose=0)
    >>> indices, distances, num_exact = index.search([3, 4, 4], k=1)
    >>> int(indices[0])
    1

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf),
        prefetch and prune; [blog post](https://kexue.fm/archives/7388)
    """

    def __init__(
        self, documents, vectors=None, cost="cosine", weights="norm", verbose=1
    ):
        measures.check_options(cost, weights)
        if len(documents) == 0:
            raise ValueError("Expected at least one document. Received: none")
        self.cost = cost
        self.weighting = weights
        self.idf = None
        if not isinstance(weights, str) or (
            weights == "idf" and vectors is None
        ):
            raise ValueError(
                'Expected weights="norm" or "uniform", or "idf" with documents '
                f"of word ids and their `vectors`. Received: {weights!r}"
            )
        if vectors is None:
            documents = [_vectors(d, "every document") for d in documents]
            dims = {d.shape[1] for d in documents}
            if len(dims) > 1:
                raise ValueError(
                    "Expected vectors of one dimension. Received: dimensions "
                    f"{sorted(dims)}"
                )
            self.vectors = np.concatenate(documents)
            ends = np.cumsum([len(d) for d in documents])
            documents = [
                np.arange(end - len(d), end)
                for d, end in zip(documents, ends, strict=True)
            ]
            self._by_id = False
        else:
            self.vectors = _vectors(vectors, "`vectors`")
            self._by_id = True
            if weights == "idf":
                self.idf = inverse_document_frequency(
                    documents, len(self.vectors)
                )
        self._build(documents, verbose)

    def _build(self, documents, verbose):
        progress = keras.utils.Progbar(
            len(documents), unit_name="document", verbose=verbose
        )
        step = max(1, len(documents) // 100)
        ids, masses, lengths = [], [], []
        dim = self.vectors.shape[1]
        self._centroids = np.empty((len(documents), dim))
        for number, document in enumerate(documents):
            words, p, x = self._compact(document)
            ids.append(words)
            masses.append(p)
            lengths.append(len(words))
            self._centroids[number] = measures.centroid(np, p, x, self.cost)
            if number % step == step - 1 or number + 1 == len(documents):
                progress.update(number + 1)
        self._ids = np.concatenate(ids)
        self._masses = np.concatenate(masses)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        # POT takes seconds to import: now, not at the first query.
        exact.simplex()

    def _compact(self, document):
        """`(ids, masses, vectors)`: each word once, only words with mass.

        The zero vector that an empty document is has the id -1.
        """
        words, counts = np.unique(
            np.asarray(document, "int64"), return_counts=True
        )
        if words.size and not 0 <= words[0] <= words[-1] < len(self.vectors):
            raise ValueError(
                "Expected word ids from 0 to "
                f"{len(self.vectors) - 1}. Received: ids from {words[0]} to "
                f"{words[-1]}"
            )
        importance = None if self.idf is None else self.idf[words]
        return self._weigh(words, counts, self.vectors[words], importance)

    def _weigh(self, words, counts, x, importance):
        x = x.astype("float64")
        if self.weighting == "norm":
            mass = counts * np.sqrt(np.square(x).sum(-1))
        elif self.weighting == "idf":
            mass = counts * importance
        else:
            mass = counts.astype("float64")
        if self.cost == "cosine":
            mass = np.where(np.any(x != 0, axis=-1), mass, 0)
        kept = mass > 0
        if not kept.any():
            return np.array([-1]), np.ones(1), np.zeros((1, x.shape[-1]))
        return words[kept], mass[kept] / mass[kept].sum(), x[kept]

    def __len__(self):
        return len(self._starts) - 1

    def search(self, query, k=10):
        """The `k` nearest documents.

        Args:
            query: A document, as in the constructor.
            k: Integer ≥ 1. At most as many as there are documents are found.

        Returns:
            `(indices, distances, num_exact)`, a `SearchResult`. Of equally near
            documents those with the smaller index come first.
        """
        if not k >= 1:
            raise ValueError(f"Expected `k` of at least 1. Received: k={k}")
        k = min(int(k), len(self))
        if self._by_id:
            _, p, x = self._compact(query)
        else:
            x = _vectors(query, "the query", self.vectors.shape[1])
            number = np.arange(len(x))
            _, p, x = self._weigh(number, np.ones(len(x)), x, None)
        distances = np.full(len(self), np.inf)

        def solve(numbers):
            for number in numbers:
                distances[number] = self._exact(p, x, number)

        center = measures.centroid(np, p, x, self.cost)
        bounds = measures.centroid_bound(np, center, self._centroids, self.cost)
        near = np.argpartition(bounds, k - 1)[:k]
        solve(near)
        limit = distances[near].max()
        # A bound may be above the distance by what rounding makes.
        slack = 1e-6 * (1 + limit)
        candidates = np.flatnonzero(bounds <= limit + slack)
        bounds = self._relaxed(p, x, candidates)
        order = np.argsort(bounds, kind="stable")
        found = np.sort(distances[near])
        num_exact = k
        for number, bound in zip(candidates[order], bounds[order], strict=True):
            if bound > found[-1] + slack:
                break
            if distances[number] == np.inf:
                solve([number])
                num_exact += 1
                found = np.sort([*found, distances[number]])[:k]
        # Stable: by distance, then by index.
        indices = np.argsort(distances, kind="stable")[:k]
        return SearchResult(indices, distances[indices], num_exact)

    def _document(self, number):
        """`(ids, masses, vectors)`, float64."""
        part = slice(self._starts[number], self._starts[number + 1])
        words = self._ids[part]
        x = self.vectors[words].astype("float64")
        return words, self._masses[part], np.where(words[:, None] < 0, 0, x)

    def _exact(self, p, x, number):
        _, q, y = self._document(number)
        d = measures.cost_matrix(np, x, y, self.cost)
        return exact.solve(p[None], q[None], d[None])[0][0]

    def _relaxed(self, p, x, numbers):
        """RWMD to some documents, each word of theirs compared once."""
        starts, lengths = self._starts[numbers], np.diff(self._starts)[numbers]
        first = np.cumsum(lengths) - lengths
        positions = np.repeat(starts - first, lengths) + np.arange(
            lengths.sum()
        )
        ids, masses = self._ids[positions], self._masses[positions]
        used = np.zeros(len(self.vectors) + 1, bool)
        used[ids] = True  # the last one is id -1
        words = np.flatnonzero(used)
        row = np.cumsum(used) - 1
        y = self.vectors[np.minimum(words, len(self.vectors) - 1)]
        y = np.where((words == len(self.vectors))[:, None], 0, y)
        # float32 for speed; what it may be too large by is taken off.
        d = measures.cost_matrix(
            np, x.astype("float32"), y.astype("float32"), self.cost
        )
        d = _below(d, x, y, self.cost)[:, row[ids]]  # (n, all words)
        forward = p @ np.minimum.reduceat(d, first, axis=1)
        backward = np.add.reduceat(masses * d.min(0), first)
        return np.maximum(forward, backward)

    def save(self, path):
        """Writes the index to a file of NumPy's `.npz` format."""
        path = os.fspath(path)
        config = {"cost": self.cost, "weights": self.weighting}
        config["by_id"] = self._by_id
        folder = os.path.dirname(os.path.abspath(path))
        handle, part = tempfile.mkstemp(suffix=".npz", dir=folder)
        # A file appears complete or not at all.
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    config=np.array(json.dumps(config)),
                    vectors=self.vectors,
                    idf=np.zeros(0) if self.idf is None else self.idf,
                    ids=self._ids,
                    masses=self._masses,
                    starts=self._starts,
                    centroids=self._centroids,
                )
            os.replace(part, path)
        except BaseException:
            os.remove(part)
            raise

    @classmethod
    def load(cls, path):
        """Reads an index that `save` wrote; nothing is computed anew."""
        index = cls.__new__(cls)
        with np.load(path, allow_pickle=False) as data:
            config = json.loads(str(data["config"]))
            index.cost = config["cost"]
            index.weighting = config["weights"]
            index._by_id = config["by_id"]
            index.vectors = data["vectors"]
            index.idf = data["idf"] if data["idf"].size else None
            index._ids = data["ids"]
            index._masses = data["masses"]
            index._starts = data["starts"]
            index._centroids = data["centroids"]
        return index


def _vectors(x, name, dim=None):
    x = np.asarray(keras.ops.convert_to_numpy(x))
    if x.size == 0 and x.ndim < 2 and dim:
        x = np.zeros((0, dim))
    wrong = x.ndim != 2 or (dim is not None and x.shape[1] != dim)
    if wrong or not np.isfinite(x).all():
        raise ValueError(
            f"Expected {name} of shape (length, dim), finite. Received: "
            f"shape={x.shape}"
        )
    return x if x.dtype == "float64" else x.astype("float32")


def _below(d, x, y, cost):
    """Float32 costs lowered by what rounding may have added."""
    # A product of two vectors is a sum of dim terms.
    unit = np.float32((x.shape[-1] + 8) * 2.0**-23)
    if cost == "cosine":
        return np.maximum(d - unit, 0)
    x2, y2 = np.square(x).sum(-1), np.square(y).sum(-1)
    size = (x2[:, None] + y2).astype("float32") * unit
    if cost == "rms":
        size /= x.shape[-1]
    return np.sqrt(np.maximum(np.square(d) - size, 0))
