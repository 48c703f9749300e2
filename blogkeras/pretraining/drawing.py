"""What draws the tokens that replace others."""

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import shapes_agree
from blogkeras.ops import sample_categorical
from blogkeras.state import draw_rows

FREQUENCIES = ("uniform", "unigram")


def draws_without_network(generator):
    """Whether a generator is a name or a function, and no network."""
    is_function = callable(generator) and not isinstance(
        generator, (keras.layers.Layer, type)
    )
    return isinstance(generator, str) or is_function


def checked_logits(logits, positions, size):
    """What a function gives as logits, float32.

    Args:
        logits: Anything.
        positions: `(batch, K)`, the masked positions.
        size: Integer. The number of tokens in the vocabulary.

    Raises:
        ValueError: unless it is a tensor or array of the shape `(size,)` or
            `(batch, K, size)`.
    """
    shape = tuple(getattr(logits, "shape", ()))
    expected = (*positions.shape, size)
    known = len(shape) == 3 and shapes_agree(shape, expected)
    if not (known or shape == (size,)):
        raise ValueError(
            "Expected the generator to give logits of the shape (vocabulary,) "
            f"or (batch, positions, vocabulary), ({size},) or {expected} here. "
            f"Received: {type(logits).__name__} of shape {shape}"
        )
    return ops.cast(logits, "float32")


def frequency_logits(counts, never):
    """Logits of tokens by their frequency.

    Args:
        counts: `(vocabulary,)`, float32, above 0.
        never: Integers, the tokens that are never drawn.

    Returns:
        `(vocabulary,)`, float32: log counts, and -inf for `never`.
    """
    excluded = np.zeros(counts.shape[0], "bool")
    excluded[never] = True
    return ops.where(excluded, -np.inf, ops.log(counts))


def draw_tokens(logits, targets, seed, temperature=1.0, allow_original=True):
    """Draws a token for each masked position; no gradient passes the draw.

    Args:
        logits: `(batch, K, vocabulary)`, or `(vocabulary,)` for all positions.
        targets: `(batch, K)`, int32, the original tokens.
        seed: As for `keras.random`.
        temperature: Float > 0 that the logits are divided by.
        allow_original: Boolean. Whether the original may be drawn. Where all
            other tokens have the probability 0, it is drawn all the same.

    Returns:
        `(batch, K)`, int32.
    """
    logits = ops.stop_gradient(logits) / temperature
    u = draw_rows(backend.uniform, ops.shape(targets), seed)
    if allow_original:
        return sample_categorical(logits, u)
    classes = ops.arange(logits.shape[-1], dtype="int32")
    logits = ops.where(classes == targets[..., None], -np.inf, logits)
    others = ops.any(logits > -np.inf, axis=-1)
    return ops.where(others, sample_categorical(logits, u), targets)
