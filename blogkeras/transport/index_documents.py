"""Documents of vectors, as an index takes them."""

import numpy as np

from blogkeras.arguments import as_numpy, check_finite


def documents_of_vectors(documents, dim=None):
    """Arrays `(length, dim)`, all of one dimension."""
    documents = list(documents)
    documents = [
        as_vectors(d, "documents", dim) for d in with_empty(documents, dim)
    ]
    dims = {d.shape[1] for d in documents}
    if len(dims) > 1:
        raise ValueError(
            "Expected vectors of one dimension. Received: dimensions "
            f"{sorted(dims)}"
        )
    return documents


def with_empty(texts, dim=None):
    """The texts, where `[]`, without words, has as many columns as others.

    Args:
        texts: List of `(length, dim)`.
        dim: Integer, or `None`: that of the first text which has words.
    """
    if dim is None:
        shapes = map(_shape, texts)
        dim = next((s[1] for s in shapes if len(s) == 2 and s[1]), None)
    if dim is None:
        return texts
    return [np.zeros((0, dim)) if _is_empty(text) else text for text in texts]


def _is_empty(text):
    try:
        return len(text) == 0 and np.ndim(text) == 1
    except TypeError:  # a number
        return False


def _shape(text):
    try:
        return np.shape(text)
    except ValueError:  # rows of several lengths, which are refused later
        return ()


def numbered(documents, start=0):
    """A number for each word of documents whose words are all different."""
    ends = start + np.cumsum([len(d) for d in documents])
    return [
        np.arange(end - len(d), end)
        for d, end in zip(documents, ends, strict=True)
    ]


def as_vectors(x, name, dim=None):
    """A document's vectors, float64 if they are, else float32."""
    try:
        x = as_numpy(x)
    except ValueError as error:  # rows of several lengths
        raise ValueError(
            f"Expected `{name}` of shape (length, dim). Received: {error}"
        ) from error
    if (
        x.ndim != 2
        or (dim is not None and x.shape[1] != dim)
        or not x.shape[1]
        or (x.dtype.kind not in "fiu" and x.dtype.name != "bfloat16")
    ):
        size = "dim" if dim is None else dim
        raise ValueError(
            f"Expected `{name}` of shape (length, {size}), numbers. Received: "
            f"shape {x.shape}, dtype {x.dtype}"
        )
    check_finite(name, x)
    return x if x.dtype == "float64" else x.astype("float32")
