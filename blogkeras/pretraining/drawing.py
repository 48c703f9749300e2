"""What draws the tokens that replace others."""

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.ops import sample_categorical
from blogkeras.state import draw_rows

FREQUENCIES = ("uniform", "unigram")


def draws_without_network(generator):
    """Whether a generator is a name or a function, and no network."""
    return isinstance(generator, str) or (
        callable(generator) and not isinstance(generator, keras.layers.Layer)
    )


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
