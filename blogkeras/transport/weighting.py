"""Weights of words, and common components of word vectors, in NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_finite,
    check_integer,
    check_integers,
    check_number,
)
from blogkeras.typing import Tensor


def inverse_document_frequency(
    documents: Sequence[Any], num_words: int
) -> Tensor:
    """log(N / number of the documents with the word).

    Args:
        documents: Sequence of N sequences of word ids.
        num_words: Integer. Size of the vocabulary.

    Returns:
        `(num_words,)`, float64, at least 0. A word that is in no document has
        the value of a word in one document.

    Raises:
        ValueError: without documents, and on ids that are not integers from 0
            to `num_words - 1`.

    Example:

    >>> inverse_document_frequency([[0, 1, 1], [0, 2]], 3).round(3)
    array([0.   , 0.693, 0.693])

    Reference:
        [Sato et al., 2022](https://arxiv.org/abs/2105.14403), who find WMD
        far better with these weights
    """
    num_words = check_integer("num_words", num_words, minimum=1)
    documents = [
        np.unique(word_ids("documents", document, num_words))
        for document in check_documents(documents)
    ]
    count = np.bincount(np.concatenate(documents), minlength=num_words)
    return np.log(len(documents) / np.maximum(count, 1))


def check_documents(documents):
    """A list of documents, from any sequence of at least one.

    Raises:
        ValueError: for everything else.
    """
    sized = hasattr(documents, "__len__") and hasattr(documents, "__getitem__")
    if not sized or isinstance(documents, (str, bytes, dict)):
        raise ValueError(
            "Expected `documents` to be a sequence of documents. Received: "
            f"documents={documents!r}"
        )
    if len(documents) == 0:
        raise ValueError("Expected at least one document. Received: none")
    return list(documents)


def word_ids(name, ids, num_words):
    """The ids of a document's words, `(length,)`, int64.

    Raises:
        ValueError: unless they are integers from 0 to `num_words - 1`. An empty
            list is a document without words, whatever its dtype.
    """
    ids = as_numpy(ids)
    if ids.shape == (0,):
        return ids.astype("int64")
    check_integers(name, ids, 0, num_words - 1)
    if ids.ndim != 1:
        raise ValueError(
            f"Expected the word ids of `{name}` along one axis. Received: "
            f"shape {ids.shape}"
        )
    return ids.astype("int64")


def sif_weights(probabilities: Tensor, a: float = 1e-3) -> Tensor:
    """Smooth inverse frequency: a / (a + p(w)).

    Args:
        probabilities: Array, the share of each word in a corpus.
        a: Float > 0.

    Returns:
        Array of the same shape. Multiply the word vectors with it, or pass it
        as `importance`.

    Raises:
        ValueError: if `probabilities` are not numbers in [0, 1], or `a` is not
            positive.

    Example:

    >>> sif_weights(np.array([0.0, 0.001])).round(3)
    array([1. , 0.5])

    Reference:
        [Arora et al., 2017](https://openreview.net/forum?id=SyK00v5xx)
    """
    p = _probabilities(probabilities)
    a = check_number("a", a, above=0)
    return a / (a + p)


def usif_weights(probabilities: Tensor, sentence_length: float = 11) -> Tensor:
    """Unsupervised smooth inverse frequency: a / (a/2 + p(w)).

        α = share of the words with p(w) > 1 − (1 − 1/V)ⁿ
        a = (1 − α) / (α V/2)

    for V words and sentences of n words on average. There is no
    parameter to tune.

    Args:
        probabilities: `(V,)`, the share of each word in a corpus.
        sentence_length: Number ≥ 1, n.

    Returns:
        `(V,)`.

    Raises:
        ValueError: if `probabilities` are not numbers in [0, 1], and where all
            words or none are frequent, as of a part of a vocabulary.

    Example:

    >>> probabilities = np.array([0.5, 0.3, 0.1, 0.1, 0.0, 0.0])
    >>> usif_weights(probabilities, sentence_length=2).round(2)
    array([1.25, 1.47, 1.79, 1.79, 2.  , 2.  ])

    Reference:
        [Ethayarajh, 2018](https://aclanthology.org/W18-3012), and the
        author's code
    """
    p = _probabilities(probabilities)
    size = p.size
    sentence_length = check_number(
        "sentence_length", sentence_length, minimum=1
    )
    alpha = np.mean(p > 1 - (1 - 1 / size) ** sentence_length)
    if not 0 < alpha < 1:
        raise ValueError(
            "Expected some words, and not all, to be more frequent than "
            "1 - (1 - 1/V)^n: give the probabilities of a whole vocabulary. "
            f"Received: {size} words, of which {alpha:.0%} are"
        )
    a = (1 - alpha) / (alpha * size / 2)
    return a / (a / 2 + p)


def all_but_the_top(vectors: Tensor, num_components: int = 3) -> Tensor:
    """Removes from word vectors their mean and their main directions.

    Args:
        vectors: `(num_words, dim)`.
        num_components: Integer ≥ 0. The paper's rule is dim / 100.

    Returns:
        `(num_words, dim)`.

    Raises:
        ValueError: on vectors of another shape or that are not finite, and on
            more components than dimensions.

    Example:

    >>> vectors = np.array([[9.0, 1.0], [5.0, -1.0], [1.0, 0.0]])
    >>> vectors = all_but_the_top(vectors, num_components=1)
    >>> int(np.linalg.matrix_rank(vectors, tol=1e-6))
    1

    Reference:
        [Mu and Viswanath, 2018](https://arxiv.org/abs/1702.01417)
    """
    vectors = _vectors(vectors)
    mean = vectors.mean(0, dtype="float64")
    vectors = (vectors - mean).astype(vectors.dtype)
    components, _ = common_components(vectors, num_components)
    return remove_components(vectors, components)


def common_components(
    vectors: Tensor, num_components: int = 1
) -> tuple[Tensor, Tensor]:
    """The directions that vectors (of sentences, say) have in common.

    The first right singular vectors, without centring.

    Args:
        vectors: `(num_vectors, dim)`.
        num_components: Integer ≥ 0, at most dim.

    Returns:
        `(components, shares)`: `(num_components, dim)`, orthonormal, and
        `(num_components,)`, the share of each in the squared singular values
        of these components.

    Raises:
        ValueError: on vectors of another shape or that are not finite, and on
            more components than dimensions.

    Example:

    >>> components, shares = common_components(np.array([[0, 2.0], [0, -1.0]]))
    >>> np.abs(components)
    array([[0., 1.]])

    Reference:
        [Arora et al., 2017](https://openreview.net/forum?id=SyK00v5xx)
    """
    vectors = _vectors(vectors)
    dim = vectors.shape[-1]
    num_components = check_integer("num_components", num_components, 0, dim)
    # Eigenvectors of (dim, dim): a vocabulary has far more words than that.
    wide = vectors.astype("float64")
    values, directions = np.linalg.eigh(wide.T @ wide)
    order = np.argsort(-values, kind="stable")[:num_components]
    values = np.maximum(values[order], 0)
    shares = values / max(values.sum(), np.finfo("float64").tiny)
    return directions[:, order].T.astype(vectors.dtype), shares


def remove_components(
    vectors: Tensor, components: Tensor, shares: Tensor | None = None
) -> Tensor:
    """Removes directions from vectors: v − Σₖ λₖ (v · cₖ) cₖ.

    Args:
        vectors: `(..., dim)`, of words or of sentences.
        components: `(num_components, dim)`, orthonormal.
        shares: `(num_components,)`, λ. `None` is 1, all of each component
            (SIF); uSIF removes the shares of `common_components`.

    Returns:
        `(..., dim)`.

    Raises:
        ValueError: on shapes that do not fit and on values that are not finite.

    Example:

    >>> remove_components(np.array([3.0, 4.0]), np.array([[0.0, 1.0]]))
    array([3., 0.])

    Reference:
        [Arora et al., 2017](https://openreview.net/forum?id=SyK00v5xx);
        [Ethayarajh, 2018](https://aclanthology.org/W18-3012), with shares
    """
    vectors = as_numpy(as_numbers(vectors, "vectors"))
    check_finite("vectors", vectors)
    components = as_numpy(as_numbers(components, "components"))
    if components.ndim != 2 or components.shape[-1:] != vectors.shape[-1:]:
        raise ValueError(
            "Expected vectors (..., dim) and components (num_components, dim). "
            f"Received: vectors.shape={vectors.shape}, "
            f"components.shape={components.shape}"
        )
    check_finite("components", components)
    dtype = np.result_type(vectors, components)
    if dtype.itemsize < 4:
        # Sums of products may leave the range of half precision.
        vectors, components = (
            a.astype("float32") for a in (vectors, components)
        )
    along = vectors @ components.T
    if shares is not None:
        shares = as_numpy(as_numbers(shares, "shares"))
        if shares.shape != components.shape[:1]:
            raise ValueError(
                "Expected as many shares as components. Received: "
                f"shares.shape={shares.shape}, "
                f"components.shape={components.shape}"
            )
        check_finite("shares", shares)
        along = along * shares.astype(along.dtype)
    return (vectors - along @ components).astype(dtype)


def _vectors(vectors):
    vectors = as_numpy(as_numbers(vectors, "vectors"))
    check_finite("vectors", vectors)
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(
            "Expected vectors of shape (num_vectors, dim), at least one. "
            f"Received: vectors.shape={vectors.shape}"
        )
    # Integers would cut off the digits of what is computed from them.
    return vectors.astype("float64") if vectors.dtype.kind in "biu" else vectors


def _probabilities(p):
    p = as_numpy(as_numbers(p, "probabilities")).astype("float64")
    if p.size == 0 or not np.isfinite(p).all() or p.min() < 0 or p.max() > 1:
        raise ValueError(
            "Expected probabilities, counts divided by their sum. Received: "
            f"{p.size} values"
            + (f" from {p.min()} to {p.max()}" if p.size else "")
        )
    return p
