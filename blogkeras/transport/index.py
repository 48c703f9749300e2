"""Finds the exact nearest documents with few exact distances."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from blogkeras.arguments import (
    as_numpy,
    check_choice,
    check_finite,
    check_integer,
    check_path,
    check_verbose,
)
from blogkeras.files import replace_file
from blogkeras.transport import exact, measures
from blogkeras.transport.first_pass import FirstPass
from blogkeras.transport.index_documents import (
    as_vectors,
    documents_of_vectors,
    numbered,
    with_empty,
)
from blogkeras.transport.index_file import (
    VERSION,
    WEIGHTS,
    counts_of,
    read,
    require,
)
from blogkeras.transport.weighting import (
    check_documents,
    inverse_document_frequency,
    word_ids,
)
from blogkeras.typing import Tensor

_BLOCK = 2**20  # numbers of vectors in float64 at a time
# Masses are divided by sums that are rounded in the order of the words. So
# between the same words a few units of the largest cost may be left.
_ROUNDING = 16 * np.finfo("float64").eps


class SearchResult(NamedTuple):
    """The result of `TransportIndex.search`.

    Attributes:
        indices: `(k,)`, the nearest documents, nearest first.
        distances: `(k,)`, float64, exact.
        num_exact: Integer. How many exact distances were computed.

    Example:

    >>> documents = [np.eye(3)[:2], np.eye(3)[1:]]
    >>> index = TransportIndex(documents, verbose=0)
    >>> result = index.search(np.eye(3)[2:], k=1)
    >>> result.indices, result.distances  # half of its mass moves to cos = 0
    (array([1]), array([0.5]))

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf)
    """

    indices: object
    distances: object
    num_exact: int


class TransportIndex:
    """Finds the k documents with the least WMD or WRD to a query.

    The result is that of comparing the query with every document. Lower bounds
    make most comparisons unnecessary. Documents are sorted by the bound from
    centroids (WCD, or the post's bound of WRD), and the distances of the first
    k are computed exactly. Documents whose bound is above these are left out.
    For the rest the relaxed distances (RWMD, the larger of both) are computed,
    all at once, and then exact distances in the order of these, until no bound
    is below the k-th distance found.

    With 10,000 documents or more the bounds from centroids are looked up with
    faiss, where it is installed (`pip install faiss-cpu`); the results are the
    same.

    Args:
        documents: Sequence of documents: arrays `(length, dim)` of word vectors
            or, with `vectors`, sequences of word ids, integers. An empty
            document counts as one zero vector.
        vectors: `(num_words, dim)`, the vectors of all words, or `None`.
        cost: `"cosine"`, `"euclidean"` or `"rms"`.
        weights: `"norm"`, `"uniform"`, or, for word ids only, `"idf"`, counted
            in the documents.
        verbose: `"auto"`, 0 or 1: whether a progress bar is shown.

    Attributes:
        idf: `(num_words,)` with `weights="idf"`, else `None`.

    Raises:
        ValueError: without documents, on word ids outside of `vectors`, on
            vectors that are not finite or of several dimensions, and on
            `weights="idf"` without word ids.

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
        self,
        documents: Sequence[Any],
        vectors: Tensor | None = None,
        cost: str = "cosine",
        weights: str = "norm",
        verbose: str | int = 1,
    ) -> None:
        self.cost = check_choice("cost", cost, measures.COSTS)
        self.weighting = check_choice("weights", weights, WEIGHTS)
        if weights == "idf" and vectors is None:
            raise ValueError(
                'Expected weights="norm" or "uniform", or "idf" with documents '
                f"of word ids and their `vectors`. Received: {weights!r}"
            )
        verbose = check_verbose(verbose)
        documents = check_documents(documents)
        self._by_id = vectors is not None
        self.idf = None
        if self._by_id:
            self.vectors = as_vectors(vectors, "vectors")
            documents = self._as_ids(documents)
            if weights == "idf":
                self.idf = inverse_document_frequency(
                    documents, len(self.vectors)
                )
        else:
            documents = documents_of_vectors(documents)
            self.vectors = np.concatenate(documents)
            documents = numbered(documents)
        self._word_weights = self._weights_of(self.vectors, self.idf)
        self._ids, self._counts, self._starts = self._count_words(
            documents, verbose
        )
        self._weigh_documents()
        # POT takes seconds to import: do it here, not at the first query.
        exact.simplex()

    def _as_ids(self, documents):
        return [
            word_ids("documents", document, len(self.vectors))
            for document in documents
        ]

    def _count_words(self, documents, verbose):
        """Each document's words with mass, each once, and how often it occurs.

        Returns:
            `(ids, counts, starts)`, of all documents one after the other. An
            empty document has the id -1, of a zero vector.
        """
        bar = keras.utils.Progbar(
            len(documents), unit_name="document", verbose=verbose
        )
        step = max(1, len(documents) // 100)
        ids, counts = [], []
        for number, document in enumerate(documents):
            words, occurrences = np.unique(document, return_counts=True)
            has_mass = self._word_weights[words] > 0
            if has_mass.any():
                ids.append(words[has_mass])
                counts.append(occurrences[has_mass])
            else:
                ids.append(np.array([-1]))
                counts.append(np.array([1]))
            if number % step == step - 1 or number + 1 == len(documents):
                bar.update(number + 1)
        starts = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
        return np.concatenate(ids), np.concatenate(counts), starts

    def _weights_of(self, x, importance=None):
        """The weight of one occurrence of each word; `(n,)`, float64."""
        # Compute in float64 without copying all vectors.
        squares = np.einsum("ij,ij->i", x, x, dtype="float64")
        if self.weighting == "norm":
            weights = np.sqrt(squares)
        elif self.weighting == "idf":
            weights = importance
        else:
            weights = np.ones(len(x))
        if not np.isfinite(squares).all():
            raise ValueError(
                "Expected vectors whose squared norm is a finite float64. "
                f"Received: numbers up to {np.abs(x).max()}"
            )
        if self.cost == "cosine":
            # A zero vector has no direction.
            weights = np.where(squares > 0, weights, 0)
        return weights

    def _weigh_documents(self):
        """Masses and centroids of all documents, from ids and counts."""
        ids, starts, lengths = self._ids, self._starts, np.diff(self._starts)
        # The last weight is that of id -1.
        masses = self._counts * np.append(self._word_weights, 1.0)[ids]
        total = np.add.reduceat(masses, starts[:-1])
        self._masses = masses / np.repeat(total, lengths)
        dim = self.vectors.shape[1]
        self._centroids = np.empty((len(self), dim))
        first = 0
        while first < len(self):
            # As many documents as fit into a block, at least one.
            end = starts[first] + max(_BLOCK // max(dim, 1), 1)
            last = np.searchsorted(starts, end, side="right") - 1
            last = max(last, first + 1)
            _words, p, x = self._words(slice(starts[first], starts[last]))
            shares = measures.centroid(np, p[:, None], x[:, None], self.cost)
            self._centroids[first:last] = np.add.reduceat(
                shares, starts[first:last] - starts[first]
            )
            first = last
        self._largest = np.abs(self._centroids).max(initial=0)
        self._first_pass = FirstPass(self._centroids, self.cost)

    def __len__(self):
        return len(self._starts) - 1

    def search(self, query, k=10):
        """The `k` nearest documents.

        Args:
            query: A document, as in the constructor.
            k: Integer ≥ 1. At most as many as there are documents are found.

        Returns:
            `(indices, distances, num_exact)`, a `SearchResult`. Of equally near
            documents those with the smaller index come first. The same words in
            any order have the distance 0. Other distances that are equal but
            for rounding, about 1e-15 of the largest cost, are in any order.

        Raises:
            ValueError: if the query is not a document of the index's kind.
        """
        k = min(check_integer("k", k, minimum=1), len(self))
        return self._nearest(*self._query(query), k)

    def kneighbors(self, queries=None, k=10, verbose=0):
        """The `k` nearest documents of many queries, as in scikit-learn.

        Args:
            queries: Sequence of documents, as in the constructor. `None`: each
                document of the index, which is then not its own neighbor.
            k: Integer ≥ 1, at most as many as there are (other) documents.
            verbose: `"auto"`, 0 or 1: whether a progress bar is shown.

        Returns:
            `(distances, indices)`: `(len(queries), k)`, float64 and integers,
            nearest first.

        Raises:
            ValueError: if the queries are not documents of the index's kind,
                and for more neighbors than there are.
        """
        k = check_integer("k", k, minimum=1)
        own = queries is None
        if k > len(self) - own:
            raise ValueError(
                f"Expected `k` to be at most {len(self) - own}, the number of "
                f"{'other ' * own}documents. Received: k={k}"
            )
        queries = range(len(self)) if own else check_documents(queries)
        bar = keras.utils.Progbar(
            len(queries), unit_name="query", verbose=check_verbose(verbose)
        )
        distances = np.empty((len(queries), k))
        indices = np.empty((len(queries), k), "int64")
        for row, query in enumerate(queries):
            if own:
                part = slice(self._starts[query], self._starts[query + 1])
                _, p, x = self._words(part)
                found = self._nearest(p, x, k, without=query)
            else:
                found = self._nearest(*self._query(query), k)
            distances[row], indices[row] = found.distances, found.indices
            bar.update(row + 1)
        return distances, indices

    def add(self, documents):
        """Adds documents behind those that there are.

        Args:
            documents: As in the constructor.

        Raises:
            ValueError: if they are not documents of the index's kind, and with
                `weights="idf"`.
        """
        self._check_weights_stay()
        documents = check_documents(documents)
        if self._by_id:
            documents = self._as_ids(documents)
        else:
            documents = documents_of_vectors(documents, self.vectors.shape[1])
            new = np.concatenate(documents)
            self._weights_of(new)  # raises for huge ones
            documents = numbered(documents, len(self.vectors))
            self.vectors = np.concatenate([self.vectors, new])
            self._word_weights = self._weights_of(self.vectors)
        ids, counts, starts = self._count_words(documents, verbose=0)
        self._starts = np.concatenate(
            [self._starts, starts[1:] + len(self._ids)]
        )
        self._ids = np.concatenate([self._ids, ids])
        self._counts = np.concatenate([self._counts, counts])
        self._weigh_documents()

    def remove(self, indices):
        """Removes documents; those behind them move up.

        Args:
            indices: Integers, the numbers of the documents, each once.

        Raises:
            ValueError: on numbers that no document has or that occur twice, if
                no document would be left, and with `weights="idf"`.
        """
        self._check_weights_stay()
        numbers = as_numpy(indices).ravel()
        if numbers.size and numbers.dtype.kind not in "iu":
            raise ValueError(
                "Expected `indices` to be integers. Received: indices="
                f"{indices!r}"
            )
        if (
            len(np.unique(numbers)) < len(numbers)
            or not (numbers.size < len(self))
            or (numbers.size and not 0 <= numbers.min())
            or (numbers.size and not numbers.max() < len(self))
        ):
            raise ValueError(
                f"Expected `indices` to be different numbers of the {len(self)}"
                " documents, and not of all. Received: indices="
                f"{indices!r}"
            )
        stays = np.ones(len(self), bool)
        stays[numbers.astype("int64")] = False
        lengths = np.diff(self._starts)
        words = np.repeat(stays, lengths)
        self._ids, self._counts = self._ids[words], self._counts[words]
        self._starts = np.concatenate([[0], np.cumsum(lengths[stays])])
        if not self._by_id:
            # Each vector belongs to one document.
            real = self._ids >= 0
            self.vectors = self.vectors[self._ids[real]]
            self._word_weights = self._word_weights[self._ids[real]]
            self._ids[real] = np.arange(real.sum())
        self._weigh_documents()

    def _check_weights_stay(self):
        if self.weighting == "idf":
            raise ValueError(
                "Expected an index whose weights do not depend on the other "
                "documents: with 'idf' each document changes those of all. "
                "Make a new index. Received: weights='idf'"
            )

    def _nearest(self, p, x, k, without=None):
        """A `SearchResult` for masses and vectors; one document may not be."""
        center = measures.centroid(np, p, x, self.cost)
        search = self._first_pass.of(center)
        near = search.nearest(k, without)
        found = {n: self._exact(p, x, n) for n in near.tolist()}
        best = sorted(found.values())
        limit = best[-1]
        # A computed bound may exceed the distance by a rounding error, which
        # is relative to the vectors: these may be far larger than the distance.
        largest = max(np.abs(x).max(initial=0), self._largest)
        if self.cost == "cosine":
            largest = 1.0  # of directions
        slack = 1e-6 * (1 + limit) + 1e-12 * largest
        candidates = search.within(limit + slack, without)
        bounds = self._relaxed(p, x, candidates)
        order = np.argsort(bounds, kind="stable")
        for number, bound in zip(
            candidates[order].tolist(), bounds[order], strict=True
        ):
            if bound > best[-1] + slack:
                break
            if number not in found:
                found[number] = self._exact(p, x, number)
                best = sorted([*best, found[number]])[:k]
        numbers = np.array(sorted(found), "int64")
        distances = np.array([found[n] for n in numbers.tolist()])
        # A stable sort: by distance, then by index.
        order = np.argsort(distances, kind="stable")[:k]
        return SearchResult(numbers[order], distances[order], len(found))

    def _query(self, query):
        """`(masses, vectors)` of a document, float64."""
        if self._by_id:
            query = word_ids("query", query, len(self.vectors))
            words, counts = np.unique(query, return_counts=True)
            mass = counts * self._word_weights[words]
            x = self.vectors[words]
        else:
            dim = self.vectors.shape[1]
            x = as_vectors(*with_empty([query], dim), "query", dim)
            mass = self._weights_of(x)
        has_mass = mass > 0
        if not has_mass.any():
            return np.ones(1), np.zeros((1, x.shape[-1]))
        mass = mass[has_mass]
        return mass / mass.sum(), x[has_mass].astype("float64")

    def _words(self, part):
        """`(ids, masses, vectors)` of a slice of all words, float64."""
        ids = self._ids[part]
        x = np.zeros((len(ids), self.vectors.shape[1]))
        x[ids >= 0] = self.vectors[ids[ids >= 0]]
        return ids, self._masses[part], x

    def _exact(self, p, x, number):
        part = slice(self._starts[number], self._starts[number + 1])
        _, q, y = self._words(part)
        d = measures.cost_matrix(np, x, y, self.cost)
        distance = exact.solve(p[None], q[None], d[None])[0][0]
        return distance if distance > _ROUNDING * d.max() else 0.0

    def _relaxed(self, p, x, numbers):
        """RWMD to some documents; each of their words is compared once."""
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
        y = np.zeros((len(words), self.vectors.shape[1]), self.vectors.dtype)
        real = words < len(self.vectors)
        y[real] = self.vectors[words[real]]
        d, scale = measures.lowered_costs(x, y, self.cost)
        d = d[:, row[ids]]  # (n, all words)
        forward = p @ np.minimum.reduceat(d, first, axis=1)
        backward = np.add.reduceat(masses * d.min(0), first)
        return np.maximum(forward, backward) / scale

    def save(self, path):
        """Writes the index to a file of NumPy's `.npz` format.

        The file appears complete or not at all.

        Args:
            path: Where to write; missing folders are made.
        """
        config = {
            "version": VERSION,
            "cost": self.cost,
            "weights": self.weighting,
            "by_id": self._by_id,
        }
        with replace_file(path) as part, open(part, "wb") as file:
            np.savez(
                file,
                config=np.array(json.dumps(config)),
                vectors=self.vectors,
                idf=np.zeros(0) if self.idf is None else self.idf,
                ids=self._ids,
                counts=self._counts,
                masses=self._masses,
                starts=self._starts,
                centroids=self._centroids,
            )

    @classmethod
    def load(cls, path):
        """Reads an index that `save` wrote.

        Everything in the file is checked: shapes, types and ranges. Masses,
        centroids and `idf` are computed again from the vectors and the words of
        the documents and compared with those of the file.

        Args:
            path: String or path-like object.

        Raises:
            ValueError: if the file is not such an index, or damaged.
            OSError: if it cannot be opened.
        """
        path = check_path("path", path)
        with open(path, "rb") as file:
            try:
                config, arrays = read(file)
                return cls._from_arrays(config, arrays)
            # Readers of NumPy and of zip files raise undocumented types of
            # errors on damaged files, at least ten.
            except Exception as error:
                raise ValueError(
                    "Expected a file that `TransportIndex.save` wrote. "
                    f"Received: path={path!r}, where {error}"
                ) from error

    @classmethod
    def _from_arrays(cls, config, arrays):
        index = cls.__new__(cls)
        index.cost, index.weighting = config["cost"], config["weights"]
        index._by_id = config["by_id"]
        index.vectors, index._ids = arrays["vectors"], arrays["ids"]
        index._starts = arrays["starts"]
        require(index.vectors.ndim == 2, "`vectors` are not (words, dim)")
        check_finite("vectors", index.vectors)
        index._check_words()
        index.idf = index._check_idf(arrays["idf"])
        index._word_weights = index._weights_of(index.vectors, index.idf)
        weights = np.append(index._word_weights, 1.0)[index._ids]
        require((weights > 0).all(), "words without mass have mass")
        masses, counts = arrays["masses"], arrays.get("counts")
        require(masses.shape == weights.shape, "`masses` do not fit the ids")
        if counts is None:
            counts = counts_of(masses / weights, index._starts)
        require(counts.shape == weights.shape, "`counts` do not fit the ids")
        require((counts >= 1).all(), "`counts` are below 1")
        require(index._by_id or (counts == 1).all(), "`counts` exceed 1")
        index._counts = counts
        index._weigh_documents()
        for name in ("masses", "centroids"):
            computed = getattr(index, f"_{name}")
            scale = np.abs(computed).max(initial=0)
            require(
                arrays[name].shape == computed.shape
                and np.allclose(arrays[name], computed, 1e-9, 1e-9 * scale),
                f"`{name}` do not follow from vectors and documents",
            )
        return index

    def _check_words(self):
        """Raises unless ids and starts are those of documents."""
        ids, starts = self._ids, self._starts
        require(ids.ndim == starts.ndim == 1, "`ids` or `starts` has two axes")
        require(
            len(starts) > 1
            and starts[0] == 0
            and starts[-1] == len(ids)
            and (np.diff(starts) > 0).all(),
            "`starts` are not those of documents of the ids",
        )
        num_words = len(self.vectors)
        require(-1 <= ids.min() and ids.max() < num_words, "`ids` too large")
        empty = np.zeros(len(ids), bool)
        empty[starts[:-1]] = np.diff(starts) == 1
        require(empty[ids < 0].all(), "the empty word stands beside others")
        if self._by_id:
            rises = np.diff(ids) > 0
            rises[starts[1:-1] - 1] = True  # from one document to the next
        else:
            # Each word vector belongs to one document.
            rises = np.diff(ids[ids >= 0]) > 0
        require(rises.all(), "`ids` do not increase within a document")

    def _check_idf(self, idf):
        if self.weighting != "idf":
            require(idf.size == 0, "there is an `idf` that is not used")
            return None
        require(idf.shape == (len(self.vectors),), "`idf` does not fit")
        occurring = np.bincount(self._ids[self._ids >= 0], minlength=len(idf))
        expected = np.log(len(self) / np.maximum(occurring, 1))
        # Words without mass are not stored, so these cannot be checked: words
        # that occur in all documents and, under "cosine", zero vectors.
        unknown = (occurring == 0) & (idf == 0)
        if self.cost == "cosine":
            unknown |= ~self.vectors.any(1) & (idf >= 0) & np.isfinite(idf)
        require(
            (np.isclose(idf, expected, 1e-9, 1e-12) | unknown).all(),
            "`idf` does not follow from the documents",
        )
        return idf
