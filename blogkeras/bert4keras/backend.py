"""What bert4keras sees as `keras.backend`: Keras's own legacy functions.

Only those are replaced that do not know Keras 3's variables and symbolic
tensors, or that differ from Keras 2.
"""

import functools
import inspect
import types

import keras
import numpy as np
import tensorflow as tf
from keras._tf_keras.keras import backend as legacy

from blogkeras.bert4keras.layers import is_symbolic, layer_at_work
from blogkeras.bert4keras.names import register


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
    dot,
    update,
    update_add,
    update_sub,
    get_value,
    batch_get_value,
    set_value,
    batch_set_value,
)
_FUNCTIONS = {
    name: function
    for name, function in vars(legacy).items()
    if inspect.isfunction(function)
} | {function.__name__: function for function in _REPLACED}


class BackendFunction(keras.Operation):
    """A function of `keras.backend` as a node of a functional model."""

    def __init__(self, function, name=None):
        super().__init__(name=name)
        self.function = function

    def call(self, *args, **kwargs):
        return _FUNCTIONS[self.function](*args, **kwargs)

    def get_config(self):
        return {"function": self.function, "name": self.name}


register(BackendFunction)


def _also_symbolic(function):
    """Lets `function` take symbolic tensors, as in Keras 2."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if is_symbolic(args, kwargs):
            return BackendFunction(function.__name__)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


def make_backend():
    """Returns a new module with the functions of `keras.backend`."""
    module = types.ModuleType("keras.backend")
    for name, function in _FUNCTIONS.items():
        setattr(module, name, _also_symbolic(function))
    for function in (floatx, dtype, ndim, int_shape):
        setattr(module, function.__name__, function)
    module.eval = get_value
    return module
