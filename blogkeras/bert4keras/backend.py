"""What bert4keras sees as `keras.backend`: Keras's own legacy functions.

Only those are replaced that do not know Keras 3's variables and symbolic
tensors, or that differ from Keras 2.
"""

import types

import keras
import numpy as np
import tensorflow as tf
from keras._tf_keras.keras import backend as legacy

from blogkeras.bert4keras.layers import layer_at_work


def floatx():
    """The dtype that the layer at work computes in; else Keras's `floatx`."""
    layer = layer_at_work()
    if layer is None:
        return keras.config.floatx()
    return layer.compute_dtype if layer.half_precision else layer.variable_dtype


def dtype(x):
    """The dtype of `x` as a string."""
    return keras.backend.standardize_dtype(x.dtype)


def ndim(x):
    """The number of axes of `x`."""
    return len(x.shape)


def int_shape(x):
    """The static shape of `x` as a tuple; None where it is not known."""
    return tuple(x.shape)


def dot(x, y):
    """Keras 2's `dot`; under mixed precision in the dtype of `x`."""
    return legacy.dot(x, tf.cast(y, x.dtype))


def update(x, new_x):
    """Assigns `new_x` to the variable `x` and returns the new value."""
    x.assign(new_x)
    return tf.convert_to_tensor(x)


def update_add(x, increment):
    """Adds `increment` to the variable `x` and returns the new value."""
    return update(x, x + increment)


def update_sub(x, decrement):
    """Subtracts `decrement` from the variable `x`; returns the new value."""
    return update(x, x - decrement)


def get_value(x):
    """The value of a variable or tensor as a NumPy array."""
    return np.asarray(keras.ops.convert_to_numpy(x))


def batch_get_value(variables):
    """The values of several variables as NumPy arrays."""
    return [get_value(x) for x in variables]


def set_value(x, value):
    """Assigns a NumPy array to the variable `x`."""
    x.assign(np.asarray(value, dtype=dtype(x)))


def batch_set_value(pairs):
    """Assigns NumPy arrays to several variables."""
    for x, value in pairs:
        set_value(x, value)


_REPLACED = (
    floatx,
    dtype,
    ndim,
    int_shape,
    dot,
    update,
    update_add,
    update_sub,
    get_value,
    batch_get_value,
    set_value,
    batch_set_value,
)


def make_backend():
    """Returns a new module with the functions of `keras.backend`."""
    module = types.ModuleType("keras.backend")
    module.__dict__.update(
        {k: v for k, v in vars(legacy).items() if not k.startswith("_")}
    )
    module.__dict__.update({f.__name__: f for f in _REPLACED})
    module.eval = get_value
    return module
