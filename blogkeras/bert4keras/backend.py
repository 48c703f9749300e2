"""`keras.backend` for bert4keras: Keras's own legacy functions.

Only those are replaced that do not know Keras 3's variables and symbolic
tensors, or that differ from Keras 2.
"""

import builtins
import functools
import inspect
import types

import keras
import numpy as np
import tensorflow as tf
from keras._tf_keras.keras import backend as legacy

from blogkeras import arguments
from blogkeras.bert4keras.layers import (
    Variable,
    as_variable,
    is_inferring,
    is_symbolic,
    layer_at_work,
)
from blogkeras.bert4keras.models import trains_at_work
from blogkeras.bert4keras.names import register


def floatx():
    """The dtype that the running layer computes in; else Keras's `floatx`."""
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


def variable(value, dtype=None, name=None, constraint=None):
    """A variable of Keras 3, which a layer trains if it is its attribute."""
    dtype = dtype or keras.config.floatx()
    if hasattr(value, "tocoo"):
        raise ValueError(
            "A variable of Keras 3 cannot be sparse: give value.toarray(). "
            f"Received: value of {type(value)}"
        )
    if isinstance(value, tf.Variable):
        result = as_variable(value)
    else:
        value = tf.cast(tf.convert_to_tensor(value), dtype)
        name = name and name.replace("/", "_")
        result = Variable(value, dtype=dtype, name=name)
    if constraint is not None:
        result.constraint = constraint
    return result


def _variable_or_tensor(tensor, dtype, name):
    """A variable where one can be made; in a layer's `call` the tensor."""
    layer = layer_at_work()
    building = layer is None or not layer.built
    # In a traced function each trace would create a new variable.
    if building and tf.executing_eagerly():
        return variable(tensor, dtype, name)
    return tensor


def ones(shape, dtype=None, name=None):
    """Ones: a variable, or a tensor in a layer's `call`."""
    dtype = dtype or floatx()
    return _variable_or_tensor(tf.ones(shape, dtype), dtype, name)


def zeros(shape, dtype=None, name=None):
    """Zeros: a variable, or a tensor in a layer's `call`."""
    dtype = dtype or floatx()
    return _variable_or_tensor(tf.zeros(shape, dtype), dtype, name)


def eye(size, dtype=None, name=None):
    """The identity matrix; `size` may be a tensor, as K.shape(x)[0]."""
    dtype = dtype or floatx()
    rows, columns = size if isinstance(size, (tuple, list)) else (size, None)
    return _variable_or_tensor(tf.eye(rows, columns, dtype=dtype), dtype, name)


def random_uniform_variable(shape, low, high, dtype=None, name=None, seed=None):
    """A variable of uniformly distributed numbers."""
    dtype = dtype or floatx()
    value = keras.random.uniform(shape, low, high, seed=seed)
    return variable(value, dtype, name)


def random_normal_variable(
    shape, mean, scale, dtype=None, name=None, seed=None
):
    """A variable of normally distributed numbers."""
    dtype = dtype or floatx()
    value = keras.random.normal(shape, mean, scale, seed=seed)
    return variable(value, dtype, name)


def identity(x, name=None):
    """A tensor of the same values."""
    return tf.identity(x, name)


def size(x, name=None):
    """The number of entries, as a tensor."""
    return tf.size(x, name=name)


def slice(x, start, size):
    """The part of `x` that begins at `start` and has the size `size`."""
    return tf.slice(x, start, size)


def logsumexp(x, axis=None, keepdims=False):
    """The logarithm of the sum of the exponentials."""
    return tf.reduce_logsumexp(x, axis, keepdims)


def in_top_k(predictions, targets, k):
    """Whether the targets are among the `k` largest predictions."""
    return tf.math.in_top_k(tf.cast(targets, "int32"), predictions, k)


def is_tensor(x):
    """Tells whether `x` is a tensor, symbolic or not."""
    return tf.is_tensor(x) or isinstance(x, keras.KerasTensor)


def is_variable(x):
    """Tells whether `x` is a variable."""
    return isinstance(x, (keras.Variable, tf.Variable))


def is_keras_tensor(x):
    """Tells whether `x` is a symbolic tensor of a layer."""
    if not is_tensor(x) and not is_variable(x):
        raise ValueError(
            f"Expected `x` to be a tensor. Received: x={x!r} of {type(x)}"
        )
    return isinstance(x, keras.KerasTensor)


def is_placeholder(x):
    """Tells whether `x` is an input of a model."""
    if not isinstance(x, keras.KerasTensor):
        return False
    return isinstance(x._keras_history.operation, keras.layers.InputLayer)


def normalize_data_format(value):
    """`channels_last` or `channels_first`; None stands for Keras's own."""
    value = (value or keras.config.image_data_format()).lower()
    return arguments.check_choice(
        "data_format", value, ("channels_first", "channels_last")
    )


def set_session(session):
    """Applies a TensorFlow 1 session's setting of the growth of GPU memory."""
    options = getattr(getattr(session, "_config", None), "gpu_options", None)
    if options is not None and options.allow_growth:
        for device in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(device, True)


def set_learning_phase(value):
    """Accepts 0; `predict` and `evaluate` need no such setting."""
    if value not in (0, False):
        raise ValueError(
            "Keras 3 has no learning phase of its own: write "
            f"model(x, training=True). Received: value={value!r}"
        )


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

    training = None

    def call(self, inputs, training=None):
        self.training = training
        return inputs


class _LearningPhase(int):
    """0 or 1, of a type that `function` recognizes among its inputs."""


def learning_phase():
    """Returns 1 in a layer's `call` and a loss during training, else 0."""
    phase = _Phase(name="phase")
    phase(tf.zeros([]))
    if phase.training is None:  # not inside of a layer
        return _LearningPhase(trains_at_work())
    return _LearningPhase(bool(phase.training))


def in_train_phase(x, alt, training=None):
    """Returns `x` during training, else `alt`; either may be a function."""
    chosen = x if (learning_phase() if training is None else training) else alt
    return chosen() if callable(chosen) else chosen


def in_test_phase(x, alt, training=None):
    """Returns `alt` during training, else `x`; either may be a function."""
    return in_train_phase(alt, x, training)


def gradients(loss, variables):
    """Gradients of `loss` while a model's loss is computed; None for zero.

    While the shape of a layer's output is inferred, the gradients are zeros.
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


def function(inputs, outputs, updates=None, name=None, **kwargs):
    """Returns a function from arrays to arrays, of symbolic tensors.

    `K.learning_phase()` among the inputs stands for a number, 0 or 1, that the
    function is given.
    """
    if updates:
        raise ValueError(
            "Keras 3 has no symbolic updates. Assign to the variables in a "
            f"train step instead. Received: updates={updates}"
        )
    inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    tensors = [x for x in inputs if not isinstance(x, _LearningPhase)]
    model = keras.Model(tensors, outputs)

    def call(values):
        if not isinstance(values, (list, tuple)):
            values = [values]
        pairs = list(zip(inputs, values, strict=True))
        phases = [v for x, v in pairs if isinstance(x, _LearningPhase)]
        arrays = [
            tf.convert_to_tensor(v, dtype=x.dtype)
            for x, v in pairs
            if not isinstance(x, _LearningPhase)
        ]
        values = model(arrays, training=bool(phases and phases[0]))
        values = keras.tree.map_structure(np.array, values)
        is_list = isinstance(outputs, (list, tuple))
        return [values] if is_list and len(outputs) == 1 else values

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
    variable,
    ones,
    zeros,
    eye,
    random_uniform_variable,
    random_normal_variable,
    identity,
    size,
    slice,
    logsumexp,
    in_top_k,
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
    """A version of `function` that takes symbolic tensors, as in Keras 2."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if is_symbolic(args, kwargs):
            return BackendFunction(function.__name__)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


# Names of Keras 2's backend that are refused, and why.
REFUSED = {
    name: reason
    for names, reason in {
        "get_session get_graph manual_variable_initialization "
        "v1_variable_initialization": "Keras 3 has no sessions and graphs",
        "control_dependencies eager is_symbolic": (
            "Keras 3 runs in the order of the program"
        ),
        "local_conv1d local_conv2d": "use keras.layers.Conv1D or Conv2D",
        "separable_conv1d": "use keras.ops.separable_conv",
        "conv3d_transpose": "use keras.ops.conv_transpose",
        "normalize_batch_in_training": "use keras.layers.BatchNormalization",
    }.items()
    for name in names.split()
}


class _Backend(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        reason = REFUSED.get(name)
        raise AttributeError(
            f"`keras.backend.{name}` of Keras 2 has no counterpart on Keras 3"
            f"{f': {reason}' if reason else ''}."
        )


def make_backend():
    """Returns a new module with the functions of `keras.backend`."""
    module = _Backend("keras.backend")
    for name, f in _FUNCTIONS.items():
        setattr(module, name, _also_symbolic(f))
    for f in (
        floatx,
        dtype,
        ndim,
        int_shape,
        placeholder,
        function,
        is_tensor,
        is_variable,
        is_keras_tensor,
        is_placeholder,
        normalize_data_format,
        set_session,
        set_learning_phase,
    ):
        setattr(module, f.__name__, f)
    module.learning_phase = learning_phase
    module.eval = get_value
    module.random_binomial = module.random_bernoulli
    module.get_variable_shape = int_shape
    module.reset_uids = keras.backend.clear_session
    module.py_all, module.py_any, module.py_sum = all, any, sum
    module.py_slice = builtins.slice
    module.tf = tf
    module.np = np
    return module
