"""TensorFlow's half of the backend; `__init__.py` says what each name does."""

import contextlib
import functools
import os
import types
import warnings

import keras
import tensorflow as tf
from keras import ops, tree

# Both are names of this half.
from blogkeras.backend.second_order import (  # noqa: F401
    check_second_order,
    second_order,
)

# Gradients


def value_and_grad(fn, args, unconnected):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        args = tree.map_structure(tf.convert_to_tensor, args)
        tape.watch(args)
        loss, aux = fn(args)
    gradients = tape.gradient(
        loss,
        args,
        unconnected_gradients=tf.UnconnectedGradients(unconnected),
    )
    return (loss, aux), gradients


def gradients_of_variables(fn, variables):
    with tf.GradientTape() as tape:
        loss = fn()
    return tape.gradient(loss, [variable.value for variable in variables])


def dense(gradient):
    return tf.convert_to_tensor(gradient)


def weighted_sum(gradients, weights):
    if all(isinstance(g, tf.IndexedSlices) for g in gradients):
        return tf.IndexedSlices(
            tf.concat(
                [
                    g.values * ops.cast(w, g.values.dtype)
                    for g, w in zip(gradients, weights, strict=True)
                ],
                axis=0,
            ),
            tf.concat([g.indices for g in gradients], axis=0),
            gradients[0].dense_shape,
        )
    return sum(
        dense(g) * ops.cast(w, g.dtype)
        for g, w in zip(gradients, weights, strict=True)
    )


def with_gradients(value, args, gradients):
    @tf.custom_gradient
    def attach(value, *args):
        def gradient(upstream):
            return upstream, *(
                None
                if g is None
                else weighted_sum([g], [ops.cast(upstream, g.dtype)])
                for g in gradients
            )

        return tf.identity(value), gradient

    return attach(tf.convert_to_tensor(value), *args)


def read(variable):
    return tf.convert_to_tensor(variable.value)


def is_recorded():
    try:
        from tensorflow.python.eager import record

        return record.could_possibly_record()
    except (ImportError, AttributeError):
        # The function is private. Where it is missing, assume that a gradient
        # is asked for: that is slower, but never wrong.
        return True


# Operations whose result depends on a tensor's shape and not on its values.
_SHAPES = frozenset("Shape ShapeN Size Rank ZerosLike OnesLike".split())


def dependencies(fn, args):
    outputs = []

    def traced(*args):
        outputs[:] = [tf.convert_to_tensor(x) for x in fn([*args])]

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in args]
    graph = (
        tf.function(traced, autograph=False).get_concrete_function(*specs).graph
    )
    found = {
        x.ref(): {index} for index, x in enumerate(graph.inputs[: len(args)])
    }
    for op in graph.get_operations():
        if op.type not in _SHAPES:
            sources = set().union(
                *(found.get(x.ref(), set()) for x in op.inputs)
            )
            found.update(
                {x.ref(): sources for x in op.outputs if x.ref() not in found}
            )
    return [found.get(x.ref(), set()) for x in outputs]


# Layers


def batch_normalization(x, scale, offset, epsilon):
    if not has_accelerator():
        return _batch_normalization(x, scale, offset, epsilon)
    statistics = ops.moments(x, (0, 1, 2))
    outputs = ops.batch_normalization(
        x, *statistics, -1, offset, scale, epsilon
    )
    return outputs, *map(tf.stop_gradient, statistics)


def _batch_normalization(x, scale, offset, epsilon):
    @tf.custom_gradient
    def normalize(x, scale, offset):
        if x.shape[-1] % 16:
            # oneDNN's operation is written for blocks of 16 channels, and slow
            # for others.
            mean, variance = tf.nn.moments(x, (0, 1, 2))
            outputs = tf.nn.batch_normalization(
                x, mean, variance, offset, scale, epsilon
            )
        else:
            nothing = tf.zeros((0,))
            # Its variance of the batch, which the gradient takes; the one
            # before it is of an infinite population.
            outputs, _, _, mean, variance, _ = tf.raw_ops.FusedBatchNormV3(
                x=x,
                scale=scale,
                offset=offset,
                mean=nothing,
                variance=nothing,
                epsilon=epsilon,
                is_training=True,
            )

        def gradient(upstream, *statistics):
            gradients = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=x,
                scale=scale,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=tf.zeros((0,)),
                epsilon=epsilon,
                is_training=True,
            )
            return gradients[:3]

        return (outputs, mean, variance), gradient

    # Of variables the gradient would have to be given in another way.
    return normalize(*map(tf.convert_to_tensor, (x, scale, offset)))


def depthwise_convolution(x, kernel):
    if has_accelerator():
        return ops.depthwise_conv(
            x, kernel, padding="same", data_format="channels_last"
        )
    return _depthwise_convolution(*map(tf.convert_to_tensor, (x, kernel)))


@tf.custom_gradient
def _depthwise_convolution(x, kernel):
    ones = [1] * 4

    def gradient(upstream):
        turned = kernel[::-1, ::-1]
        return (
            tf.nn.depthwise_conv2d(upstream, turned, ones, "SAME"),
            tf.nn.depthwise_conv2d_backprop_filter(
                x, kernel.shape, upstream, ones, "SAME"
            ),
        )

    return tf.nn.depthwise_conv2d(x, kernel, ones, "SAME"), gradient


# Random numbers

# XLA needs a hundred times as long for the generator that TensorFlow chooses
# for it on a CPU ("auto_select") as for the one of this name. The numbers are
# those of Keras; with XLA they are other ones than without, as Keras's are.
_GENERATOR = "philox"


def normal(shape, mean, stddev, dtype, seed):
    if has_accelerator() or seed is None:
        return keras.random.normal(shape, mean, stddev, dtype, seed)
    return tf.random.stateless_normal(
        shape,
        _pair(seed),
        mean,
        stddev,
        dtype,
        alg=_GENERATOR,
    )


def uniform(shape, minval, maxval, dtype, seed):
    if has_accelerator() or seed is None:
        return keras.random.uniform(shape, minval, maxval, dtype, seed)
    minval, maxval = tf.cast(minval, dtype), tf.cast(maxval, dtype)
    return tf.random.stateless_uniform(
        shape, _pair(seed), minval, maxval, dtype, alg=_GENERATOR
    )


def randint(shape, minval, maxval, dtype, seed):
    if has_accelerator() or seed is None:
        return keras.random.randint(shape, minval, maxval, dtype, seed)
    return tf.random.stateless_uniform(
        shape, _pair(seed), minval, maxval, dtype, alg=_GENERATOR
    )


def dropout(x, rate, noise_shape, seed):
    if has_accelerator() or seed is None or rate == 1:
        return keras.random.dropout(x, rate, noise_shape, seed)
    shape = tf.shape(x)
    if noise_shape is not None:
        shape = [
            shape[i] if n is None else n for i, n in enumerate(noise_shape)
        ]
    return tf.nn.experimental.stateless_dropout(
        x, rate, _pair(seed), _GENERATOR, shape
    )


def _pair(seed):
    """Two int32 for a seed, as Keras makes them."""
    if isinstance(seed, keras.random.SeedGenerator):
        seed = seed.next()
    else:
        seed = ops.convert_to_tensor([seed, 0], "uint32")
    return tf.cast(tf.math.floormod(seed, tf.int32.max - 1), "int32")


# Compiled programs


def jit(fn, xla=True):
    # TensorFlow counts traces by code object and warns after a few; a function
    # that is made anew for each use is not traced again.
    fn = functools.partial(fn)
    return tf.function(fn, jit_compile=xla, autograph=False)


def jit_layer(fn, layer, xla=True):
    def pure(*args):
        # What is assigned inside, or given to `add_loss`, is dropped: tensors
        # of a graph must not be left behind in a layer.
        with keras.StatelessScope():
            return fn(*args)

    return jit(pure, xla)


as_written = tf.autograph.experimental.do_not_convert


def has_accelerator():
    return any(d.device_type != "CPU" for d in tf.config.list_logical_devices())


def hlo_text(fn, *args):
    fn = tf.function(fn, jit_compile=True, autograph=False)
    return fn.experimental_get_compiler_ir(*args)(stage="hlo")


def step_memory(model, step, x, y):
    if not tf.config.list_physical_devices("GPU"):
        return float("nan")
    model.train_on_batch(x, y)  # compiles
    tf.config.experimental.reset_memory_stats("GPU:0")
    model.train_on_batch(x, y)
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def full_precision():
    return contextlib.nullcontext()


def with_shape(x, shape):
    return tf.ensure_shape(x, shape)


def is_concrete(x):
    return tf.executing_eagerly()


def is_sparse(x):
    return isinstance(x, tf.SparseTensor)


# Devices


@functools.cache
def distribution():
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    cluster = resolver.cluster_spec().as_dict()
    if sum(len(cluster.get(kind, ())) for kind in ("chief", "worker")) > 1:
        return Workers()
    local = tf.config.list_physical_devices("TPU")
    # Without one the resolver would wait for a server that does not answer.
    if local or "TPU_NAME" in os.environ:
        return _tpu("local" if local else "")
    devices = tf.config.list_logical_devices("GPU")
    devices = devices or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        return tf.distribute.get_strategy()
    # The collective operations of two strategies would have the same numbers,
    # so there is one for the whole process.
    return tf.distribute.MirroredStrategy([d.name for d in devices])


def _tpu(name):
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    if not name:
        tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


class Workers(tf.distribute.MultiWorkerMirroredStrategy):
    """TensorFlow's strategy for several processes, as Keras 3 needs it.

    With TensorFlow's own, `fit` of Keras 3 fails in two places
    (https://github.com/keras-team/keras/issues/20585), both of which ask the
    strategy for a mean that it does not have.
    """

    def reduce(self, reduce_op, value, axis):
        if tf.nest.is_nested(value):
            # Keras builds a model from the mean of a batch, of which only the
            # shapes count. The part that is in this process has them.
            return tf.nest.map_structure(
                lambda x: self.experimental_local_results(x)[0], value
            )
        local = self.experimental_local_results(value)[0]
        if axis == 0 and local.shape.rank == 0:
            # Keras takes the mean of a metric along its first axis, although a
            # metric is a scalar.
            axis = None
        return super().reduce(reduce_op, value, axis)


# Replicas


def num_replicas():
    return tf.distribute.get_strategy().num_replicas_in_sync


def _replicas():
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context


def replica():
    context = _replicas()
    return context.replica_id_in_sync_group if context else 0


def all_reduce_sum(x):
    context = _replicas()
    return context.all_reduce("SUM", x) if context else x


def all_gather(x):
    context = _replicas()
    return context.all_gather(x, axis=0) if context else x


def whole_batch(data):
    def whole(x):
        parts = getattr(x, "values", None)
        if isinstance(x, tf.distribute.DistributedValues) and parts:
            return tf.concat(parts, axis=0)
        return x

    return tree.map_structure(whole, data)


def is_compiled(fn):
    return isinstance(fn, tf.types.experimental.GenericFunction)


def traced_anew(fn):
    return tf.function(fn.python_function) if is_compiled(fn) else fn


# For `branches.py`.


def trace(fn):
    """Runs a function for its side effects on Python, computing nothing."""
    tf.function(fn, autograph=False).get_concrete_function()


def recomputed(fn):
    """A pure function whose gradient computes it once more."""
    again = tf.recompute_grad(fn)
    # Values, not variables, which would be read where no gradient is recorded.
    return lambda *args: again(*map(tf.identity, args))


def branch(predicate, true_fn, false_fn):
    """Runs one of two functions of the same structure."""

    def run():
        return tf.cond(
            predicate, lambda: _marked(true_fn), lambda: _marked(false_fn)
        )

    if tf.executing_eagerly():
        # As in a graph, what did not run has a gradient: zero.
        return tf.function(functools.partial(run), autograph=False)()
    return run()


def with_zero_gradients(x, variables):
    """`x`, in a graph in which variables that did not run have a gradient."""

    @tf.custom_gradient
    def joined(x, *values):
        def gradient(upstream):
            return upstream, *map(tf.zeros_like, values)

        return tf.identity(x), gradient

    return joined(x, *[tf.identity(v.value) for v in variables])


def inside_branch(x):
    """A weight, as the layers of a branch read it."""
    # Eagerly it may be the variable itself, which has to be read before.
    return _with_dense_gradient(tf.identity(x))


@tf.custom_gradient
def _with_dense_gradient(x):
    # XLA needs gradients of one shape from both branches. The gradient of an
    # embedding would be sparse, with one row for each token looked up.
    return tf.identity(x), tf.convert_to_tensor


def _marked(fn):
    """The outputs of a branch, whose gradient computes shapes again."""
    return tree.map_structure(
        lambda x: _mark(x) if x.dtype.is_floating else x,
        tree.map_structure(tf.convert_to_tensor, fn()),
    )


@tf.custom_gradient
def _mark(x):
    def gradient(dy):
        # The first thing that runs when the gradient of a branch is traced.
        _compute_shapes_again(tf.compat.v1.get_default_graph())
        return dy

    return tf.identity(x), gradient


# TensorFlow makes the gradient of a branch a function of its own, and passes to
# it what the branch has computed. XLA must know shapes and the order of axes
# when it compiles, but it does not know a number that is passed in: a branch
# with `tensordot` or `broadcast_to` would not compile where the batch size is
# unknown. So the gradient of our own branches computes such numbers again, from
# these operations:
_PURE = frozenset(
    "Add AddV2 BroadcastArgs Cast ConcatV2 Const Equal ExpandDims Fill "
    "FloorDiv FloorMod GatherV2 Greater GreaterEqual Identity "
    "InvertPermutation Less LessEqual Maximum Minimum Mul Neg NotEqual "
    "Pack Prod Range Rank Reshape Select SelectV2 Shape ShapeN Size Slice "
    "Squeeze StridedSlice Sub Sum".split()
)


def _compute_shapes_again(graph):
    """Changes how this one gradient graph takes tensors from its branch."""
    if getattr(graph, "_forward_graph", None) is None:
        return  # not the gradient of a branch
    needed = ("_capture_helper", "_captured_constants", "_create_op_internal")
    if not all(hasattr(graph, name) for name in needed):
        warnings.warn(
            "This version of TensorFlow traces gradients of branches in "
            "another way than 2.21. Compiled with XLA, a step with modules in "
            "a branch may fail where the batch size is not fixed: use a "
            f"TensorFlow that has {', '.join(needed)}.",
            stacklevel=2,
        )
        return
    graph._capture_helper = types.MethodType(_capture_or_compute, graph)


def _capture_or_compute(graph, tensor, name):
    if (
        tensor.graph is not graph._forward_graph
        or not (tensor.dtype.is_integer or tensor.dtype.is_bool)
        or tensor.shape.rank not in (0, 1)
        or tensor.op.type not in _PURE
    ):
        return type(graph)._capture_helper(graph, tensor, name)
    again = graph._captured_constants
    if id(tensor) not in again:
        op = tensor.op
        copy = graph._create_op_internal(
            op.type,
            [graph.capture(x) for x in op.inputs],
            [x.dtype for x in op.outputs],
            attrs=dict(op.node_def.attr),
        )
        again[id(tensor)] = copy.outputs[tensor.value_index]
    return again[id(tensor)]
