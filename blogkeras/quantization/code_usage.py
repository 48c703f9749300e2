"""Measures of how codes are used, with a metric and a callback."""

import keras
from keras import ops

from blogkeras import backend
from blogkeras.arguments import as_numpy, check_finite
from blogkeras.quantization.quantizer import Quantizer


def perplexity(counts):
    """The effective number of codes in use: exp of the entropy, in [1, K].

        exp(-Σ p log(p + 1e-10)),  p = counts / Σ counts

    Args:
        counts: `(..., num_codes)`, how often each code was used. All zero gives
            1.

    Returns:
        `(...)`, float32.

    Example:

    >>> float(perplexity([3, 3, 3, 0]))
    3.0
    """
    counts = _counts(counts)
    total = ops.sum(counts, axis=-1, keepdims=True)
    p = counts / ops.where(total > 0, total, 1)
    return ops.exp(-ops.sum(p * ops.log(p + 1e-10), axis=-1))


def usage(counts, num_codes=None):
    """The share of codes that were used at all, in [0, 1].

    Args:
        counts: `(..., num_codes)`, how often each code was used.
        num_codes: How many codes there are, `(...)`, where the counts of
            several small codebooks are filled up with zeros. Defaults to the
            size of the last axis.

    Returns:
        `(...)`, float32.

    Example:

    >>> float(usage([3, 3, 3, 0]))
    0.75
    """
    counts = _counts(counts)
    used = ops.sum(ops.cast(counts > 0, "float32"), axis=-1)
    size = counts.shape[-1] if num_codes is None else num_codes
    return used / ops.convert_to_tensor(size, "float32")


def _counts(counts):
    try:
        counts = ops.convert_to_tensor(counts, "float32")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `counts` to be numbers. Received: counts={counts!r}"
        ) from error
    check_finite("counts", counts)
    if len(counts.shape) == 0 or counts.shape[-1] == 0:
        raise ValueError(
            "Expected one count for each code along the last axis. Received: "
            f"counts.shape={tuple(counts.shape)}"
        )
    if backend.is_concrete(counts) and as_numpy(counts).min(initial=0) < 0:
        raise ValueError(
            "Expected nonnegative numbers in `counts`. Received: "
            f"{as_numpy(counts).min()}"
        )
    return counts


class Usage(keras.metrics.Metric):
    """The share of codes used since the metric was reset.

    Args:
        sizes: How many codes each codebook has.
    """

    def __init__(self, sizes, **kwargs):
        super().__init__(**kwargs)
        self.sizes = tuple(sizes)
        self.counts = self.add_variable(
            (len(sizes), max(sizes)), "zeros", name="counts"
        )

    def update_state(self, counts):
        self.counts.assign(self.counts + counts)

    def result(self):
        return ops.mean(usage(self.counts, self.sizes))


class CodebookUsage(keras.callbacks.Callback):
    """Reports how the codebooks of a model's quantizers are used, by epoch.

    For quantizers inside any model that is not a `VQVAE` (which has metrics of
    its own). Adds `{layer}_perplexity` and `{layer}_usage` to the epoch's logs:
    effective number of codes, and share of codes used at all, over all training
    vectors of the epoch; of residual and of finite scalar quantizers the mean
    over stages or components. Put it before callbacks that read these logs. It
    has no arguments.

    Example:

    >>> quantizer = VectorQuantizer(4, name="codes")
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), quantizer, layers.Dense(1)]
    ... )
    >>> model.compile("adam", "mse")
    >>> x = np.random.rand(32, 2)
    >>> usage = CodebookUsage()
    >>> history = model.fit(x, x[:, 0], callbacks=[usage], verbose=0)
    >>> 0 < history.history["codes_usage"][0] <= 1
    True

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760), on codes never used
    """

    def on_epoch_begin(self, epoch, logs=None):
        for quantizer in self._quantizers():
            quantizer.reset_counts()

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        for quantizer in self._quantizers():
            counts = quantizer.stacked_counts("total_counts")
            for name, measured in (
                ("perplexity", perplexity(counts)),
                ("usage", usage(counts, quantizer.alphabets)),
            ):
                logs[f"{quantizer.name}_{name}"] = float(ops.mean(measured))

    def _quantizers(self):
        """The model's quantizers, without those that are parts of others."""
        quantizers = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, Quantizer)
        ]
        parts = {
            id(part)
            for quantizer in quantizers
            for part in quantizer._flatten_layers(include_self=False)
        }
        return [layer for layer in quantizers if id(layer) not in parts]
