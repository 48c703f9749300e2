"""The only place that knows TensorFlow from JAX.

Everything else is written in `keras.ops`. This package holds what Keras has no
common name for: gradients inside a step, state inside a branch, compiled
programs, sums and gathers across replicas. The names are documented here;
`tensorflow.py` and `jax.py` implement them, and only one of the two is
imported.
"""

import threading

import keras
from keras import ops, tree

# There is no public name for the mask that a tensor carries along.
from keras.src.backend import get_keras_mask, set_keras_mask  # noqa: F401

# Nor for anything else that is kept with a tensor.
from keras.src.backend.common.tensor_attributes import (  # noqa: F401
    get_tensor_attr,
    set_tensor_attr,
)

from blogkeras.backend.scopes import RecordingScope  # noqa: F401
from blogkeras.extras import require

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    from blogkeras.backend import tensorflow as _framework
elif BACKEND == "jax":
    from blogkeras.backend import jax as _framework
else:
    raise ImportError(
        "blogkeras runs on the TensorFlow and JAX backends of Keras. Set the "
        "environment variable KERAS_BACKEND to one of them before Python "
        f"starts. Received: KERAS_BACKEND={BACKEND}"
    )

from blogkeras.backend.branches import cond, remat, run_branch  # noqa: E402, F401

# Gradients


def value_and_grad(fn, args, unconnected="zero"):
    """Evaluates `fn` and its gradient; may be nested for second order.

    Args:
        fn: `fn(args)` returns `(loss, aux)`, a scalar and anything.
        args: Nested structure of floating tensors.
        unconnected: `"zero"` or `"none"`, the gradient of an argument that
            `loss` does not depend on. JAX knows only zero.

    Returns:
        `((loss, aux), gradients)`, gradients structured like `args`. On
        TensorFlow the gradient of a gathered tensor stays `IndexedSlices` (see
        `dense`).
    """
    return _framework.value_and_grad(fn, args, unconnected)


def gradients_of_variables(fn, variables):
    """The gradients of `fn()` as Keras computes them, TensorFlow only.

    Args:
        fn: Function without arguments that reads variables, to a scalar.
        variables: List of Keras variables.

    Returns:
        List of tensors, `None` of variables that `fn` does not depend on.
    """
    return _framework.gradients_of_variables(fn, variables)


def dense(gradient):
    """The gradient as an ordinary tensor, repeated rows summed."""
    return _framework.dense(gradient)


def weighted_sum(gradients, weights):
    """Σ wᵢ gᵢ of the gradients of one tensor; sparse if all are sparse."""
    return _framework.weighted_sum(gradients, weights)


def with_gradients(value, args, gradients):
    """The value, with given gradients of it with respect to arguments.

    Args:
        value: Scalar.
        args: List of tensors.
        gradients: List of what `value_and_grad` gives: tensors of their shapes,
            sparse ones, or `None`.
    """
    return _framework.with_gradients(value, args, gradients)


def second_order():
    """A context in which layers are right to second order, in this thread.

    Where TensorFlow's own second derivative is wrong or missing, layers that
    are called inside compute the same values by another formula:

    - `tf.nn.moments` stops the gradient of the mean inside the variance, which
      is wrong to second order; the normalization layers use it.
    - `tf.image.resize` (UpSampling2D, Resizing) and `tf.nn.softsign` have first
      derivatives only.

    `tf.nn.ctc_loss` raises a `ValueError`. On JAX nothing is to be done.
    """
    return _framework.second_order()


def check_second_order(gradients):
    """Raises a `ValueError` where a second derivative is missing.

    TensorFlow silently takes some of the missing ones for zero. Only a graph
    can be checked: in eager execution this function does nothing.

    Args:
        gradients: List of tensors, first derivatives.
    """
    _framework.check_second_order(gradients)


def dependencies(fn, args):
    """Which arguments the values of a function's outputs depend on.

    The function is traced, nothing is computed. Shapes do not count: an
    `arange` as long as an argument does not depend on it.

    Args:
        fn: Function of a list of tensors; returns a list of tensors.
        args: List of tensors, at least one.

    Returns:
        For each output the set of the indices of arguments. It may hold too
        many where a step of the computation has several results.
    """
    return _framework.dependencies(fn, args)


def read(variable):
    """The value of a Keras variable as a tensor, read once.

    `keras.ops.convert_to_tensor` gives TensorFlow's variable itself, which is
    read at each use: a copy of the whole matrix for one that is updated by
    sparse gradients.
    """
    return _framework.read(variable)


def trace(fn):
    """Runs a function for its side effects on Python, computing nothing."""
    _framework.trace(fn)


def is_recorded():
    """Whether a gradient may be asked for of what runs now.

    A loop that `jit` has compiled has no gradient outside of its program. On
    JAX the answer is always no: a function whose gradient is asked for runs on
    tracers there, not on concrete values.
    """
    return _framework.is_recorded()


# Layers


def batch_normalization(x, scale, offset, epsilon):
    """scale · (x − mean) / √(variance + ε) + offset, statistics of the batch.

    On a CPU, TensorFlow takes one operation for the gradient, and one for the
    values where it is the fastest, in place of about a dozen.

    Args:
        x: `(batch, height, width, channels)`, float32.
        scale: `(channels,)`, float32.
        offset: `(channels,)`, float32.
        epsilon: Number.

    Returns:
        `(outputs, mean, variance)`. The statistics, `(channels,)`, are
        constants to the gradient.
    """
    return _framework.batch_normalization(x, scale, offset, epsilon)


def depthwise_convolution(x, kernel):
    """`keras.ops.depthwise_conv` with stride 1 and "same" padding.

    On a CPU, TensorFlow's gradients of it are slow; there they are written as
    convolutions.

    Args:
        x: `(batch, height, width, channels)`.
        kernel: `(size, size, channels, 1)` with an odd size.
    """
    return _framework.depthwise_convolution(x, kernel)


# Random numbers: those of `keras.random`, fast under XLA on a CPU as well.


def normal(shape, mean=0.0, stddev=1.0, dtype="float32", seed=None):
    """`keras.random.normal`; on TensorFlow's CPU by the generator Philox.

    In float32, whatever Keras's `floatx`: what is drawn meets numbers of that
    dtype, and other draws would be other numbers.
    """
    return _framework.normal(shape, mean, stddev, dtype, seed)


def uniform(shape, minval=0.0, maxval=1.0, dtype="float32", seed=None):
    """`keras.random.uniform`; as `normal`."""
    return _framework.uniform(shape, minval, maxval, dtype, seed)


def randint(shape, minval, maxval, dtype="int32", seed=None):
    """`keras.random.randint`; on TensorFlow's CPU by the generator Philox."""
    return _framework.randint(shape, minval, maxval, dtype, seed)


def dropout(x, rate, noise_shape=None, seed=None):
    """`keras.random.dropout`; on TensorFlow's CPU by the generator Philox.

    Args:
        x: Floating tensor.
        rate: Number within (0, 1].
        noise_shape: Tuple that broadcasts to the shape of x, with `None` for
            sizes that are those of x; or `None`.
        seed: Integer or `keras.random.SeedGenerator`.
    """
    return _framework.dropout(x, rate, noise_shape, seed)


# Compiled programs


def jit(fn, xla=True):
    """Compiles a function of tensors, with XLA.

    Args:
        fn: Function of tensors.
        xla: Boolean, as Keras's `jit_compile`. Without XLA, TensorFlow makes a
            graph, and JAX runs one operation after the other.
    """
    return _framework.jit(fn, xla)


def jit_layer(fn, layer, xla=True):
    """`jit(fn)`, reading the variables of `layer` as they are at each call.

    Args:
        fn: Function of tensors that calls `layer` or its parts and assigns
            nothing.
        layer: A built Keras layer or model.
        xla: As for `jit`.
    """
    return _framework.jit_layer(fn, layer, xla)


def as_written(fn):
    """A decorator: a user's `tf.function` does not rewrite this function.

    TensorFlow would translate its Python conditions and loops, and those of all
    that it calls, into operations of the graph.
    """
    return _framework.as_written(fn)


def is_compiled(fn):
    """Whether a function is a `tf.function`."""
    return _framework.is_compiled(fn)


def traced_anew(fn):
    """A `tf.function` without the programs that it has; others as they are."""
    return _framework.traced_anew(fn)


def has_accelerator():
    """Whether there is a device other than CPUs."""
    return _framework.has_accelerator()


def hlo_text(fn, *args):
    """What XLA is given to compile for `fn(*args)`, as text."""
    return _framework.hlo_text(fn, *args)


def step_memory(model, step, x, y):
    """As `training.step_memory`, of the pure train step on JAX."""
    return _framework.step_memory(model, step, x, y)


def full_precision():
    """A context in which products of float32 matrices keep float32's digits.

    Accelerators round the factors to bfloat16 (TPU) or TF32 (GPU) otherwise.
    TensorFlow has no such setting for a part of a program: there this context
    does nothing, and TF32 is switched off for the whole process by
    `tf.config.experimental.enable_tensor_float_32_execution(False)`.
    """
    return _framework.full_precision()


def with_shape(x, shape):
    """`x`, with the sizes that TensorFlow does not know where it traces.

    A tensor of a data set may come without them. Of another shape it is an
    error when the step runs. On JAX all sizes are known: `x`.

    Args:
        x: Tensor.
        shape: Tuple, with `None` for a size that may be any.
    """
    return _framework.with_shape(x, shape)


def is_concrete(x):
    """Whether `x` has its values now, outside of a traced function."""
    return not isinstance(x, keras.KerasTensor) and _framework.is_concrete(x)


def is_sparse(x):
    """Whether `x`, a tensor or a symbol of one, keeps its nonzeros alone."""
    if isinstance(x, keras.KerasTensor):
        return bool(x.sparse)
    return _framework.is_sparse(x)


# Devices


def distribution():
    """All devices that there are, to train on: one script for any machine.

        with backend.distribution().scope():
            model = ...
            model.compile(...)
            model.fit(...)

    Each batch is shared out to the devices, and their gradients are summed.
    What there is:

    - several processes: on TensorFlow where the variable `TF_CONFIG` lists more
      than one worker (`MultiWorkerMirroredStrategy`), on JAX where variables
      `KERAS_DISTRIBUTION_*` are set (`keras.distribution.initialize`). Call
      this function before anything is computed. `fit` takes a
      `tf.data.Dataset` of whole batches, alike in all processes, and each
      process takes its share of each batch;
    - a TPU: `TPUStrategy`, where TensorFlow finds a local one or the variable
      `TPU_NAME` is set; on JAX its cores are devices as others are;
    - several GPUs, or, without any, several logical CPU devices:
      `MirroredStrategy`; on JAX `keras.distribution.DataParallel`;
    - one device: nothing changes.

    The model's variables must be made within the scope. On TensorFlow leave
    `jit_compile` to Keras there, or set it to `False`: XLA does not compile the
    collective operations of CPU devices.

    Returns:
        An object with a method `scope()`, the same at each call.
    """
    return _framework.distribution()


# Replicas


def num_replicas():
    """How many replicas share the step: `tf.distribute`'s, else 1."""
    return _framework.num_replicas()


def replica():
    """The number of this replica among them, from 0 on."""
    return _framework.replica()


def all_reduce_sum(x):
    """The sum of `x` over the replicas. On JAX arrays are global: `x`."""
    return _framework.all_reduce_sum(x)


def all_gather(x):
    """Concatenates `x` of all replicas along axis 0 (on JAX: `x`).

    The gradient is summed over the replicas.
    """
    return _framework.all_gather(x)


def whole_batch(data):
    """A batch that `tf.distribute` has split, put together (on JAX: `data`)."""
    return _framework.whole_batch(data)


class ReplicaLosses:
    """For layers that exchange something with other replicas before `add_loss`.

    Keras keeps the losses of all replicas in one list. TensorFlow runs each
    replica in a thread of its own and changes threads at each exchange, so a
    later replica would count the losses of those before it as its own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_threads = {}

    def add_loss(self, loss):
        # Keras stacks all losses, its own are of this dtype.
        dtype = keras.config.floatx()
        loss = tree.map_structure(lambda x: ops.cast(x, dtype), loss)
        super().add_loss(loss)
        for x in tree.flatten(loss):
            self._loss_threads[id(x)] = threading.get_ident()

    def _get_own_losses(self):
        here = threading.get_ident()
        losses = super()._get_own_losses()
        return [x for x in losses if self._loss_threads.get(id(x)) == here]

    def _clear_losses(self):
        super()._clear_losses()
        self._loss_threads.clear()


# Data


def endless_dataset(batch, start=0):
    """A `tf.data.Dataset` of `batch(start)`, `batch(start + 1)` and so on.

    It is TensorFlow's data set on the JAX backend too: Keras trains on it with
    both backends.

    Args:
        batch: Function from an integer to a NumPy array, or a dict of them, of
            the same shapes and dtypes each time.
        start: Integer.

    Raises:
        ImportError: without TensorFlow.
    """
    tf = require("tensorflow")

    def batches():
        number = start
        while True:
            yield batch(number)
            number += 1

    signature = tree.map_structure(
        lambda x: tf.TensorSpec(x.shape, x.dtype), batch(start)
    )
    return tf.data.Dataset.from_generator(batches, output_signature=signature)
