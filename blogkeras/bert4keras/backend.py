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

from blogkeras.bert4keras.layers import (
    is_inferring,
    is_symbolic,
    layer_at_work,
)
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


class _Phase(keras.layers.Layer):
    """Finds out whether the model that is running now is being trained."""

    training = False

    def call(self, inputs, training=False):
        self.training = bool(training)
        return inputs


def learning_phase():
    """Returns 1 inside of a layer's `call` during training, else 0."""
    phase = _Phase(name="phase")
    phase(tf.zeros([]))
    return int(phase.training)


def in_train_phase(x, alt, training=None):
    """Returns `x` during training, else `alt`; either may be a function."""
    chosen = x if (learning_phase() if training is None else training) else alt
    return chosen() if callable(chosen) else chosen


def in_test_phase(x, alt, training=None):
    """Returns `alt` during training, else `x`; either may be a function."""
    return in_train_phase(alt, x, training)


def gradients(loss, variables):
    """Gradients of `loss` where a model is being compiled, None where 0.

    While a layer's output is being inferred, nothing depends on anything yet:
    there the gradients are zeros.
    """
    is_list = isinstance(variables, (list, tuple))
    sources = list(variables) if is_list else [variables]
    if tf.executing_eagerly():
        raise ValueError(
            "K.gradients expects tensors of a compiled model. Compile it with "
            "run_eagerly=False and use fit or predict, or take "
            f"tf.GradientTape. Received: loss={loss}"
        )
    found = tf.gradients(loss, sources)
    if is_inferring():
        pairs = zip(found, sources, strict=True)
        found = [tf.zeros_like(x) if g is None else g for g, x in pairs]
    return found


def print_tensor(x, message="", summarize=3):
    """Prints `x` each time it is computed, and returns it."""
    tf.print(message, x, summarize=summarize)
    return x


def placeholder(shape=None, ndim=None, dtype=None, sparse=False, name=None):
    """Returns a symbolic tensor."""
    shape = [None] * ndim if shape is None else shape
    return keras.Input(
        batch_shape=shape, dtype=dtype or floatx(), sparse=sparse, name=name
    )


def function(inputs, outputs, updates=None, name=None):
    """Returns a function from arrays to arrays, of symbolic tensors."""
    if updates:
        raise ValueError(
            "Keras 3 has no symbolic updates. Assign to the variables in a "
            f"train step instead. Received: updates={updates}"
        )
    compute = keras.Function(inputs, outputs)

    def call(values):
        values = keras.tree.map_structure(tf.convert_to_tensor, values)
        return keras.tree.map_structure(np.array, compute(values))

    return call


_REPLACED = (
    in_train_phase,
    in_test_phase,
    gradients,
    print_tensor,
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


class _Backend(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"`keras.backend.{name}` of Keras 2 has no counterpart on Keras 3."
        )


def make_backend():
    """Returns a new module with the functions of `keras.backend`."""
    module = _Backend("keras.backend")
    for name, f in _FUNCTIONS.items():
        setattr(module, name, _also_symbolic(f))
    for f in (floatx, dtype, ndim, int_shape, placeholder, function):
        setattr(module, f.__name__, f)
    module.learning_phase = learning_phase
    module.eval = get_value
    module.random_binomial = module.random_bernoulli
    return module
