"""Documents of vectors, as an index takes them."""

import numpy as np

from blogkeras.arguments import as_numpy, check_finite


def documents_of_vectors(documents, dim=None):
    """Arrays `(length, dim)`, all of one dimension."""
    documents = [as_vectors(d, "documents", dim) for d in documents]
    dims = {d.shape[1] for d in documents}
    if len(dims) > 1:
        raise ValueError(
            "Expected vectors of one dimension. Received: dimensions "
            f"{sorted(dims)}"
        )
    return documents


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
    if x.size == 0 and x.ndim < 2 and dim:
        x = np.zeros((0, dim))
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
