"""The distances between all texts of one or two collections."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import as_numpy, check_verbose, renamed_value
from blogkeras.transport import measures
from blogkeras.transport.checks import check_mass, check_words, mass_error
from blogkeras.transport.distances import word_mover_distance
from blogkeras.transport.index_documents import with_empty
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
    is `word_mover_distance`. Pairs are computed in blocks, of similar lengths.
    The matrix is what scikit-learn's estimators and scipy's clustering take as
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
    shares = name == "weights"
    first = _Texts("x", x, masks[0], masses[0], shares)
    second = first
    if not is_symmetric:
        second = _Texts("y", y, masks[1], masses[1], shares)
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            "Expected x and y of vectors of one size. Received: "
            f"x.shape={first.shape}, y.shape={second.shape}"
        )
    shape = (len(first), len(second))
    matrix = np.zeros(shape)
    if is_symmetric:
        rows, columns = np.triu_indices(len(first), 1)
    else:
        rows, columns = (part.ravel() for part in np.indices(shape))
    bar = keras.utils.Progbar(len(rows), unit_name="pair", verbose=verbose)
    blocks = _blocks(
        first.lengths[rows],
        second.lengths[columns],
        first.shape[-1],
        is_compiled=solver == "sinkhorn",
    )
    done = 0
    for pairs, count, (n, m) in blocks:
        i, j = rows[pairs], columns[pairs]
        a, a_mask, a_mass = first.take(i, n)
        b, b_mask, b_mass = second.take(j, m)
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
        done += count
        bar.update(done)
    return matrix + matrix.T if is_symmetric else matrix


def _blocks(n, m, dim, is_compiled):
    """Blocks of pairs of texts, so that a long text pads few others.

    Args:
        n: `(pairs,)`, lengths of the first text of each pair.
        m: `(pairs,)`, lengths of the second.
        dim: Integer, the size of the vectors.
        is_compiled: Boolean. Whether each shape is compiled: there are few.

    Yields:
        `(pairs, count, lengths)`: numbers of pairs, of which the first `count`
        are new, and the pair of lengths that their texts are padded to.
    """
    if not len(n):
        return
    classes = [_length_classes(n), _length_classes(m)]
    if is_compiled:
        classes = [np.maximum(*classes)] * 2
    order = np.lexsort(classes)
    changes = np.diff([c[order] for c in classes]).any(axis=0)
    for group in np.split(order, np.flatnonzero(changes) + 1):
        lengths = [int(c[group[0]]) for c in classes]
        numbers = math.prod(lengths) + sum(lengths) * dim + 1
        size = max(1, _BLOCK // numbers)
        for start in range(0, len(group), size):
            pairs = group[start : start + size]
            count = len(pairs)
            if not is_compiled:
                lengths = [z[pairs].max() for z in (n, m)]
            elif start:
                # A shape of its own would be compiled anew.
                pairs = np.resize(pairs, size)
            yield pairs, count, lengths


def _length_classes(lengths):
    """The next powers of two, 8 at least."""
    return 2 ** np.ceil(np.log2(np.maximum(lengths, 8))).astype("int64")


class _Texts:
    """Texts of a collection, which gives some of them as one padded array.

    Attributes:
        lengths: `(texts,)`, how many words each has.
        shape: `(texts, length of the longest, dim)`.
    """

    def __init__(self, name, texts, mask, masses, shares):
        self.starts = None
        if isinstance(texts, (list, tuple)) and not _is_array(texts):
            if mask is not None:
                raise ValueError(
                    f"Expected no mask of `{name}`, a sequence of texts of "
                    f"their own lengths. Received: mask={mask!r}"
                )
            self._set_sequence(name, texts, masses, shares)
            return
        self.vectors = as_numpy(texts)
        self.shape = self.vectors.shape
        if len(self.shape) != 3 or not len(self.vectors):
            raise ValueError(
                f"Expected `{name}` (texts, length, dim), at least one text, "
                "or a sequence of texts (length, dim). Received: shape "
                f"{self.shape}"
            )
        self.lengths = np.full(*self.shape[:2])
        self.mask = None if mask is None else as_numpy(mask)
        self.masses = None if masses is None else as_numpy(masses)
        for what, array in (("mask", self.mask), ("weights", self.masses)):
            if array is not None and array.shape != self.shape[:2]:
                raise ValueError(
                    f"Expected the {what} of `{name}` of shape "
                    f"{self.shape[:2]}. Received: {array.shape}"
                )
        check_words(name, self.vectors, self.mask)
        if masses is not None:
            _check_masses(name, self.masses, self.mask, shares)

    def _set_sequence(self, name, texts, masses, shares):
        """Keeps the words of all texts one after the other."""
        texts = [as_numpy(text) for text in with_empty(texts)]
        dims = {text.shape[-1] for text in texts if text.ndim == 2}
        if len(dims) != 1 or any(text.ndim != 2 for text in texts):
            raise ValueError(
                f"Expected `{name}` to be texts (length, dim) with one dim, at "
                "least one. Received: shapes "
                f"{[text.shape for text in texts]}"
            )
        self.lengths = np.array([len(text) for text in texts])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.shape = (len(texts), self.lengths.max(), *dims)
        # The last word is padding.
        padding = np.zeros((1, *dims), texts[0].dtype)
        self.vectors = np.concatenate([*texts, padding])
        check_words(name, self.vectors)
        self.masses = None
        if masses is None:
            return
        masses = [as_numpy(mass) for mass in masses]
        if [mass.shape for mass in masses] != [
            text.shape[:1] for text in texts
        ]:
            raise ValueError(
                f"Expected one weight for each word of `{name}`. Received: "
                f"shapes {[mass.shape for mass in masses]} for lengths "
                f"{self.lengths.tolist()}"
            )
        for mass in masses:
            _check_masses(name, mass, None, shares)
        self.masses = np.concatenate([*masses, np.zeros(1, masses[0].dtype)])

    def __len__(self):
        return len(self.lengths)

    def take(self, numbers, length):
        """`(vectors, mask, masses)` of some texts, padded to a length."""
        if self.starts is None:
            return tuple(
                None if a is None else a[numbers]
                for a in (self.vectors, self.mask, self.masses)
            )
        places = np.arange(max(length, 1))
        mask = places < self.lengths[numbers][:, None]
        places = np.where(mask, self.starts[numbers][:, None] + places, -1)
        masses = None if self.masses is None else self.masses[places]
        return self.vectors[places], mask, masses


def _check_masses(name, masses, mask, shares):
    error = mass_error(masses)
    check_mass(f"weights of {name}", masses, mask, shares, error)


def _is_array(texts):
    """Whether a list is that of an array: texts of one length."""
    try:
        return len({np.shape(text) for text in texts}) == 1
    except ValueError:
        return False


def _pair(name, pair):
    if pair is None:
        return None, None
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(
            f"Expected `{name}` to be a pair, one for each collection. "
            f"Received: {name}={pair!r}"
        )
    return tuple(pair)
