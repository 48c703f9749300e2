"""The distances between all texts of one or two collections."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import as_numpy, check_verbose, renamed_value
from blogkeras.transport import measures
from blogkeras.transport.distances import word_mover_distance
from blogkeras.transport.problem import Solver
from blogkeras.typing import Tensor

_BLOCK = 2**20  # numbers in the vectors and costs of a block of pairs


def pairwise_distances(
    x: Any,
    y: Any = None,
    mask: Any = None,
    cost: str = "cosine",
    weights: Any = "norm",
    importance: Any = None,
    solver: str = "exact",
    regularization: float | None = None,
    tolerance: float = 1e-3,
    *,
    unbalanced: float | None = None,
    partial: float | None = None,
    debiased: bool = False,
    verbose: str | int = 0,
) -> Tensor:
    """The distance of each text of `x` to each of `y`, or of `x` to each other.

        Aᵢⱼ = word_rotator_distance(xᵢ, yⱼ)

    Without `y` the matrix is symmetric: each pair is computed once, and the
    diagonal is 0. With `cost="euclidean"` and `weights="uniform"` the distance
    is `word_mover_distance`. Pairs are computed in blocks. The matrix is what
    scikit-learn's estimators and scipy's clustering take as
    `metric="precomputed"`. For a gradient use a layer with `pairwise=True`; for
    the nearest of many texts `TransportIndex`, which leaves out most pairs.

    Args:
        x: `(a, n, dim)`, word vectors, finite; or a sequence of a texts
            `(length, dim)` of any lengths.
        y: `(b, m, dim)`, likewise; or `None`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(a, n)`
            and `(b, m)`, true for words that count. Not with sequences.
        cost: `"cosine"`, `"euclidean"` or `"rms"`, Euclidean divided by √dim.
        weights: `"norm"`, ‖wᵢ‖/Z; `"uniform"`; `"importance"`, the `importance`
            of the words, divided by its sum; or a pair of arrays `(a, n)`,
            `(b, m)`, nonnegative, each of sum 1. Without `y` the second of a
            pair is `None`.
        importance: Pair `(a, n)`, `(b, m)` for `weights="importance"`, or of
            sequences of such.
        solver: `"exact"`, `"sinkhorn"` or `"relaxed"`.
        regularization: Float > 0 of `"sinkhorn"`, relative to the largest cost,
            or `None` for what `sinkhorn` chooses.
        tolerance: Float > 0. Marginal error of `"sinkhorn"`.
        unbalanced: Float ρ > 0, or `None`, see `word_mover_distance`.
        partial: Float within (0, 1], or `None`.
        debiased: Boolean.
        verbose: `"auto"`, 0 or 1: whether a progress bar is shown.

    Returns:
        `(a, b)`, or `(a, a)` without `y`; NumPy float64.

    Raises:
        ValueError: as `word_mover_distance`, and where there is no text.

    Example:

    >>> texts = [np.eye(2), np.eye(2)[:1], np.eye(2)[1:]]
    >>> pairwise_distances(texts)
    array([[0. , 0.5, 0.5],
           [0.5, 0. , 1. ],
           [0.5, 1. , 0. ]])

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    verbose = check_verbose(verbose)
    # A single text has no pair, whose distance would check them.
    Solver(solver, regularization, tolerance, unbalanced, partial, debiased)
    weights = renamed_value("weights", weights, measures.OLD_WEIGHTS)
    measures.check_options(cost, weights)
    is_symmetric = y is None
    name, masses = measures.given_masses(weights, importance, is_symmetric)
    masks = _pair("mask", mask)
    if is_symmetric and masks[1] is not None:
        raise ValueError(
            "Expected None as the second of `mask` without `y`. Received: "
            f"y=None, mask={mask!r}"
        )
    first = _Texts("x", x, masks[0], masses[0])
    second = first if is_symmetric else _Texts("y", y, masks[1], masses[1])
    if first.vectors.shape[-1] != second.vectors.shape[-1]:
        raise ValueError(
            "Expected x and y of vectors of one size. Received: "
            f"x.shape={first.vectors.shape}, y.shape={second.vectors.shape}"
        )
    shape = (len(first), len(second))
    matrix = np.zeros(shape)
    if is_symmetric:
        rows, columns = np.triu_indices(len(first), 1)
    else:
        rows, columns = (part.ravel() for part in np.indices(shape))
    (n, dim), m = first.vectors.shape[1:], second.vectors.shape[1]
    size = max(1, _BLOCK // (n * m + (n + m) * dim + 1))
    bar = keras.utils.Progbar(len(rows), unit_name="pair", verbose=verbose)
    for start in range(0, len(rows), size):
        i, j = rows[start : start + size], columns[start : start + size]
        count = len(i)
        if solver == "sinkhorn" and start and count < size:
            # A shape of its own would be compiled anew.
            i, j = (np.resize(part, size) for part in (i, j))
        (a, a_mask, a_mass), (b, b_mask, b_mass) = first.take(i), second.take(j)
        given = {"weights": weights}
        if a_mass is not None:
            given[name] = a_mass, b_mass
        distances = word_mover_distance(
            a,
            b,
            (a_mask, b_mask),
            cost,
            **given,
            solver=solver,
            regularization=regularization,
            tolerance=tolerance,
            unbalanced=unbalanced,
            partial=partial,
            debiased=debiased,
        )
        distances = np.asarray(
            distances
            if isinstance(distances, np.ndarray)
            else ops.convert_to_numpy(distances),
            "float64",
        )[:count]
        matrix[i[:count], j[:count]] = distances
        bar.update(start + count)
    return matrix + matrix.T if is_symmetric else matrix


class _Texts:
    """Texts of a collection as one array, with the masks of what is padding."""

    def __init__(self, name, texts, mask, masses):
        if isinstance(texts, (list, tuple)) and not _is_array(texts):
            if mask is not None:
                raise ValueError(
                    f"Expected no mask of `{name}`, a sequence of texts of "
                    f"their own lengths. Received: mask={mask!r}"
                )
            texts, mask, masses = _padded(name, texts, masses)
        self.vectors = as_numpy(texts)
        if self.vectors.ndim != 3 or not len(self.vectors):
            raise ValueError(
                f"Expected `{name}` (texts, length, dim), at least one text, "
                "or a sequence of texts (length, dim). Received: shape "
                f"{self.vectors.shape}"
            )
        self.mask = None if mask is None else as_numpy(mask)
        self.masses = None if masses is None else as_numpy(masses)
        for what, array in (("mask", self.mask), ("weights", self.masses)):
            if array is not None and array.shape != self.vectors.shape[:2]:
                raise ValueError(
                    f"Expected the {what} of `{name}` of shape "
                    f"{self.vectors.shape[:2]}. Received: {array.shape}"
                )

    def __len__(self):
        return len(self.vectors)

    def take(self, numbers):
        """`(vectors, mask, masses)` of some texts."""
        return tuple(
            None if a is None else a[numbers]
            for a in (self.vectors, self.mask, self.masses)
        )


def _is_array(texts):
    """Whether a list is that of an array: texts of one length."""
    try:
        return len({np.shape(text) for text in texts}) == 1
    except ValueError:
        return False


def _padded(name, texts, masses):
    texts = [as_numpy(text) for text in texts]
    dims = {text.shape[-1] for text in texts if text.ndim == 2}
    if len(dims) != 1 or any(text.ndim != 2 for text in texts):
        raise ValueError(
            f"Expected `{name}` to be texts (length, dim) with one dim, at "
            f"least one. Received: shapes {[text.shape for text in texts]}"
        )
    longest = max(len(text) for text in texts)
    (dim,) = dims
    vectors = np.zeros((len(texts), max(longest, 1), dim))
    mask = np.zeros(vectors.shape[:2], bool)
    for k, text in enumerate(texts):
        vectors[k, : len(text)] = text
        mask[k, : len(text)] = True
    if masses is None:
        return vectors, mask, None
    masses = [as_numpy(mass) for mass in masses]
    if [mass.shape for mass in masses] != [text.shape[:1] for text in texts]:
        raise ValueError(
            f"Expected one weight for each word of `{name}`. Received: shapes "
            f"{[mass.shape for mass in masses]} for lengths "
            f"{[len(text) for text in texts]}"
        )
    padded = np.zeros(mask.shape)
    padded[mask] = np.concatenate(masses)
    return vectors, mask, padded


def _pair(name, pair):
    if pair is None:
        return None, None
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(
            f"Expected `{name}` to be a pair, one for each collection. "
            f"Received: {name}={pair!r}"
        )
    return tuple(pair)
