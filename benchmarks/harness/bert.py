"""bert4keras's BERT, which several benchmarks train, and its batches."""

import numpy as np

SIZES = {
    "layers": 6,
    "hidden": 384,
    "vocabulary": 21128,
    "batch": 32,
    "length": 64,
}


def bert(options, **arguments):
    """A BERT of the sizes in `options`, with further arguments of bert4keras.

    On whatever Keras bert4keras sees: import `blogkeras.bert4keras` before.
    """
    from bert4keras.models import build_transformer_model

    defaults = {
        "model": "bert",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(options.hidden // 32, 1),
        "intermediate_size": 4 * options.hidden,
        "hidden_act": "gelu",
        "max_position": 512,
        "segment_vocab_size": 2,
        "dropout_rate": 0.1,
    }
    return build_transformer_model(**{**defaults, **arguments})


def batch(options, length=None):
    """Tokens, a quarter of every second row is padding, and segments."""
    length = length or options.length
    shape = options.batch, length
    tokens = np.random.default_rng(0).integers(1, options.vocabulary, shape)
    tokens[::2, length * 3 // 4 :] = 0
    tokens = tokens.astype("int32")
    return [tokens, np.zeros_like(tokens)]


def labels(options):
    return np.random.default_rng(1).integers(0, 2, options.batch)
