"""Layers and functions that merge tensors, with Keras 2's rule for masks."""

import functools

import keras

from blogkeras.bert4keras.layers import Bridged


class _Merge(Bridged):
    """Keras 2's rule for masks: the logical AND of those that are not `None`.

    Keras 3 drops the mask if one input has none, such as a segment embedding.
    """

    def compute_mask(self, inputs, mask=None):
        masks = [m for m in mask or [] if m is not None]
        return functools.reduce(keras.ops.logical_and, masks) if masks else None

    def call(self, inputs):
        kinds = {keras.backend.standardize_dtype(x.dtype) for x in inputs}
        if "bool" in kinds and len(kinds) > 1:
            raise ValueError(
                f"{type(self).__name__} expects tensors of one kind; Keras 3 "
                "would take True for 1. (bert4keras's "
                "`residual_attention_scores` does not go with the masks of "
                f"application='lm' and 'unilm'.) Received: dtypes={kinds}"
            )
        return super().call(inputs)


class Add(_Merge, keras.layers.Add):
    """`Add` with Keras 2's mask rule."""


class Subtract(_Merge, keras.layers.Subtract):
    """`Subtract` with Keras 2's mask rule."""


class Average(_Merge, keras.layers.Average):
    """`Average` with Keras 2's mask rule."""


class Multiply(_Merge, keras.layers.Multiply):
    """`Multiply` with Keras 2's mask rule."""


class Maximum(_Merge, keras.layers.Maximum):
    """`Maximum` with Keras 2's mask rule."""


class Minimum(_Merge, keras.layers.Minimum):
    """`Minimum` with Keras 2's mask rule."""


class Concatenate(_Merge, keras.layers.Concatenate):
    """`Concatenate` with Keras 2's mask rule.

    Tokens side by side are masked unless all of them are there; those one after
    the other keep their masks.
    """

    def compute_mask(self, inputs, mask=None):
        if mask is None or all(m is None for m in mask):
            return None
        masks = []
        for x, m in zip(inputs, mask, strict=True):
            there = keras.ops.ones_like(x, dtype="bool")
            if m is not None:
                m = m if len(m.shape) == len(x.shape) else m[..., None]
                there = keras.ops.logical_and(there, m)
            masks.append(there)
        return keras.ops.all(keras.ops.concatenate(masks, self.axis), axis=-1)


def _as_function(cls):
    """Keras 2's function that merges tensors by the layer `cls`."""

    def merge(inputs, **kwargs):
        return cls(**kwargs)(inputs)

    merge.__doc__ = f"`{cls.__name__}` as a function of a list of tensors."
    merge.__name__ = merge.__qualname__ = cls.__name__.lower()
    return merge


def _concatenate(inputs, axis=-1, **kwargs):
    """`Concatenate` as a function of a list of tensors."""
    return Concatenate(axis, **kwargs)(inputs)


MERGES = {"concatenate": _concatenate} | {
    cls.__name__.lower(): _as_function(cls)
    for cls in (Add, Subtract, Average, Multiply, Maximum, Minimum)
}
