"""Checks of what the user gives: pixels and latent variables."""

import warnings

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_finite,
    check_integer,
)


def check_data(x, config):
    """`x`, after arrays or the first batch of a data set were checked."""
    is_array = isinstance(x, list) or hasattr(x, "__array__")
    if is_array or ops.is_tensor(x):
        return check_pixels(x, config)
    is_set = hasattr(x, "__iter__") or isinstance(x, keras.utils.PyDataset)
    if not is_set or isinstance(x, (dict, str, bytes)):
        raise ValueError(
            "Expected pictures: an array, a tensor or a data set of them. "
            f"Received: x of type {type(x).__name__}"
        )
    if isinstance(x, tuple):
        raise ValueError("Expected pictures as one tensor. Received: a tuple")
    batches = [x[0]] if isinstance(x, keras.utils.PyDataset) else iter(x)
    for batch in batches:
        # A distributed data set gives one piece for each replica; these are
        # not checked.
        first = _pictures(batch)
        if not hasattr(first, "values") or isinstance(first, dict):
            check_batch(batch, config)
        return x
    raise ValueError("Expected at least one batch of pictures. Received: none")


def check_batch(batch, config):
    """Checks the pictures of a batch, which may have targets and weights."""
    check_pixels(_pictures(batch), config)


def check_pixels(x, config):
    """Pictures as a NumPy array, after they were checked.

    Args:
        x: Array or tensor; a `tf.data.Dataset` or `keras.utils.PyDataset` of
            batches, of which pictures are taken if they are tuples.
        config: `NVAEConfig`.
    """
    x = _gathered(x)
    check_shape(x.shape, config)
    if not len(x):
        raise ValueError(
            f"Expected at least one picture. Received: shape {x.shape}"
        )
    low, high = x.min(), x.max()
    check_finite("x", x)
    if low < 0 or high > 1:
        raise ValueError(
            "Expected pixels in [0, 1]; divide by 255 where they are "
            f"integers up to 255. Received: x of dtype {x.dtype} from "
            f"{low} to {high}"
        )
    binary = config.likelihood == "bernoulli"
    if binary and not config.binarize:
        if not ((x == 0) | (x == 1)).all():
            other = x[(x != 0) & (x != 1)].ravel()[0]
            raise ValueError(
                "Expected pixels 0 and 1 for likelihood='bernoulli'; "
                "with binarize='dynamic' they are drawn from grey values. "
                f"Received: a pixel of {other}"
            )
    return x


def check_shape(shape, config):
    """Raises a ValueError if pictures have another shape than the model's.

    Sizes that TensorFlow does not know where it traces pass.
    """
    if getattr(shape, "rank", 4) is None:
        return
    expected = config.input_shape
    names = ", ".join(map(str, expected))
    if len(shape) != 4 or any(
        size not in (None, known)
        for size, known in zip(shape[1:], expected, strict=True)
    ):
        raise ValueError(
            f"Expected pictures of shape (n, {names}). "
            f"Received: shape {tuple(shape)}"
        )


def warn_if_not_annealed(config):
    """Warns where `spectral_start` has no effect."""
    steps = config.kl_warmup_steps + config.kl_constant_steps
    if config.spectral_start is not None and not steps:
        warnings.warn(
            f"spectral_start={config.spectral_start} has no effect with "
            "kl_warmup_steps=0: the spectral penalty goes from it to "
            "spectral_weight as the weight of the KL term goes to 1, which it "
            "is from the first step on. Published are warm-ups of 0.3 of all "
            "steps.",
            stacklevel=4,
        )


def check_latents(z, num, config):
    """Latent variables, checked, and the number of pictures they are of.

    Returns:
        `(z, num)`, z a list with an array or `None` for each group.
    """
    shapes = config.latent_shapes
    if not isinstance(z, (list, tuple)) or len(z) > len(shapes):
        raise ValueError(
            f"Expected a list of at most {len(shapes)} groups, as `encode` "
            f"gives under 'z'. Received: z of type {type(z).__name__}"
            + (f" and length {len(z)}" if hasattr(z, "__len__") else "")
        )
    z = [
        x if x is None else _numbers(x, f"z[{i}]").astype("float32", copy=False)
        for i, x in enumerate([*z, *[None] * (len(shapes) - len(z))])
    ]
    rows = {len(x) for x in z if x is not None and x.ndim}
    for i, (x, shape) in enumerate(zip(z, shapes, strict=True)):
        if x is not None and (x.shape[1:] != shape or len(rows) != 1):
            raise ValueError(
                f"Expected z[{i}] of shape (n, "
                f"{', '.join(map(str, shape))}), with one n for all "
                f"groups. Received: shape {x.shape}"
            )
        if x is not None:
            check_finite(f"z[{i}]", x)
    if rows:
        if num is not None and check_integer("num", num, 1) not in rows:
            raise ValueError(
                "Expected `num` to be the number of pictures given. "
                f"Received: num={num} and {rows.pop()} pictures"
            )
        return z, rows.pop()
    return z, check_integer("num", 1 if num is None else num, 1)


def _gathered(x):
    if isinstance(x, keras.utils.PyDataset):
        batches = (x[i] for i in range(len(x)))
    elif hasattr(x, "element_spec"):
        if int(x.cardinality()) == -1:
            raise ValueError(
                "Expected a data set that ends; take(n) gives its first "
                f"batches. Received: {x}"
            )
        batches = x
    else:
        return _numbers(x, "x")
    parts = [_numbers(_pictures(batch), "x") for batch in batches]
    if not parts:
        raise ValueError(
            f"Expected at least one batch of pictures. Received: {x}"
        )
    return np.concatenate(parts)


def _numbers(x, name):
    return as_numpy(as_numbers(x, name))


def _pictures(batch):
    return batch[0] if isinstance(batch, (list, tuple)) else batch
