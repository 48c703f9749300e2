"""The few things of bert4keras that are replaced after its import, and why."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from blogkeras.bert4keras.models import as_tuples
from blogkeras.bert4keras.weights import save_checkpoint


def adapt(layers, models, optimizers, snippets):
    """Adapts the imported modules of bert4keras."""
    # Matrix products; everything else computes in float32 under mixed
    # precision: norms, positions, masks with -inf and losses.
    for cls in (
        layers.MultiHeadAttention,
        layers.GatedAttentionUnit,
        layers.FeedForward,
        layers.GlobalPointer,
        layers.EfficientGlobalPointer,
        layers.Embedding,
    ):
        cls.half_precision = True
    # It needs the sessions of TensorFlow 1.
    models.Transformer.save_weights_as_checkpoint = save_checkpoint
    # It makes a new variable at each look at its learning rate.
    optimizers.AdaFactorBase.learning_rate = _fixed_learning_rate(
        optimizers.AdaFactorBase.learning_rate
    )
    # It needs the sessions of TensorFlow 1.
    optimizers.AdaFactorV1 = optimizers.AdaFactor
    # Keras 3 takes neither lists nor Nones from a generator, and fixes the
    # lengths of all batches if the first two happen to be equally long.
    snippets.DataGenerator.forfit = _forfit
    snippets.DataGenerator.fortest = _fortest


def _fixed_learning_rate(relative):
    """Returns AdaFactor's learning rate: a number, or a relative step."""

    def get(self):
        rate = self._learning_rate
        return relative.fget(self) if rate is None else rate

    def set(self, value):
        raise ValueError(
            "The learning rate of bert4keras's AdaFactor is fixed when it is "
            "made. Use extend_with_piecewise_linear_lr(AdaFactor), or "
            "keras.optimizers.Adafactor with a schedule. "
            f"Received: learning_rate={value}"
        )

    return property(get, set)


def _forfit(self, random=True):
    """Returns an endless dataset of batches for `model.fit`."""
    return _as_dataset(self, random, lambda batch: batch)


def _fortest(self, random=False):
    """Returns an endless dataset of inputs for `model.predict`."""
    return _as_dataset(self, random, lambda batch: batch[:1])


def _as_dataset(data_generator, random, select):
    def endless():
        while True:
            for batch in data_generator.__iter__(random):
                yield as_tuples(select(batch))

    batches = endless()
    first = next(batches)
    batches = itertools.chain([first], batches)
    return tf.data.Dataset.from_generator(
        lambda: batches, output_signature=keras.tree.map_structure(_spec, first)
    ).prefetch(tf.data.AUTOTUNE)


def _spec(array):
    """Every size may vary, but an axis of size 1 stays one."""
    array = np.asarray(array)
    sizes = [1 if size == 1 else None for size in array.shape[1:]]
    dtype = "float32" if array.dtype == "float64" else array.dtype
    return tf.TensorSpec([None, *sizes], dtype)
