"""The first pass of a search: documents by the bound from their centroids."""

import warnings

import numpy as np

from blogkeras.extras import require
from blogkeras.transport import measures

_BLOCK = 2**22  # numbers of centroids at a time
_MANY = 10_000  # documents from which on faiss is used, where it is installed
_FAR = 1e6  # queries that are this much larger than all documents do without


class FirstPass:
    """Finds documents whose centroid is near, by faiss where it is installed.

    faiss compares in float32. What it finds is a little too much, by a bound of
    the rounding error, and what is at the edge is compared again in float64:
    the documents within a distance are the same with faiss and without.

    Args:
        centroids: `(documents, dim)`, float64.
        cost: One of `measures.COSTS`.
    """

    def __init__(self, centroids, cost):
        self._centroids = centroids
        self._cost = cost
        self._index = None
        self._longest = 0.0  # the largest ‖x‖² of what faiss has
        self._largest = np.abs(centroids).max(initial=0) or 1.0

    def __getstate__(self):
        return {**vars(self), "_index": None}

    def of(self, center):
        """The search from one centroid: an object that finds documents."""
        index = self._faiss(center)
        if index is None:
            return _Scan(self._bounds(center))
        return _LookUp(self, index, center)

    def _bounds(self, center, centroids=None):
        if centroids is None:
            centroids = self._centroids
        size = max(1, _BLOCK // centroids.shape[1])
        # Small blocks: differences of all would take more memory than these.
        parts = [
            measures.centroid_bound(
                np, center, centroids[start : start + size], self._cost
            )
            for start in range(0, len(centroids), size)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _faiss(self, center):
        """faiss's index of the centroids, or `None`."""
        if len(self._centroids) < _MANY:
            return None
        if not np.abs(center).max(initial=0) <= _FAR * self._largest:
            return None
        if self._index is None:
            try:
                with warnings.catch_warnings():
                    # Of SWIG, by which faiss is bound to Python.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    faiss = require("faiss")
            except ImportError:
                return None
            index = faiss.IndexFlatL2(self._centroids.shape[1])
            size = max(1, _BLOCK // self._centroids.shape[1])
            longest = 0.0
            for start in range(0, len(self._centroids), size):
                part = self._scaled(self._centroids[start : start + size])
                index.add(part)
                squares = np.einsum("ij,ij->i", part, part)
                longest = max(longest, float(squares.max()))
            self._index, self._longest = index, longest
        return self._index

    def _scaled(self, x):
        """Vectors as faiss takes them, of a size of 1."""
        return np.ascontiguousarray(x / self._largest, "float32")

    def _radii(self, center, limit):
        """Squared distances of scaled vectors, for a bound of `limit`.

        What faiss has computed is certainly within it up to the first one, and
        certainly is not from the second one on.
        """
        dim = len(center)
        limit = max(limit, 0.0)
        if self._cost == "cosine":
            squared = 2 * limit / self._largest**2
        else:
            squared = (limit / self._largest) ** 2
            squared = squared * dim if self._cost == "rms" else squared
        # A sum of dim products in float32, of vectors that were rounded.
        size = np.sum(np.square(center / self._largest)) + self._longest
        slack = squared * 1e-6 + (dim + 16) * 2.0**-21 * size
        # faiss leaves out what is exactly at the radius.
        return squared - slack, float(squared + slack + 1e-30)


class _Scan:
    """All bounds, computed with NumPy."""

    def __init__(self, bounds):
        self._bounds = bounds

    def nearest(self, k, without=None):
        """The numbers of `k` documents that are near, `(k,)`."""
        bounds = self._bounds
        if without is not None:
            bounds = bounds.copy()
            bounds[without] = np.inf
        return np.argpartition(bounds, k - 1)[:k]

    def within(self, limit, without=None):
        """The numbers of all documents of a bound of at most `limit`, sorted.

        The bound is `measures.centroid_bound`.
        """
        found = np.flatnonzero(self._bounds <= limit)
        return found if without is None else found[found != without]


class _LookUp:
    """The same by faiss."""

    def __init__(self, documents, index, center):
        self._documents, self._index = documents, index
        self._center = center
        self._scaled = documents._scaled(center)[None]

    def nearest(self, k, without=None):
        extra = without is not None
        _, found = self._index.search(self._scaled, k + extra)
        return found[0][found[0] != without][:k] if extra else found[0]

    def within(self, limit, without=None):
        inner, outer = self._documents._radii(self._center, limit)
        _, squared, found = self._index.range_search(self._scaled, outer)
        # Only those at the edge are compared again.
        edge = found[squared > inner]
        bounds = self._documents._bounds(
            self._center, self._documents._centroids[edge]
        )
        found = np.concatenate([found[squared <= inner], edge[bounds <= limit]])
        found = np.sort(found)
        return found if without is None else found[found != without]
