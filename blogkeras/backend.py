"""The only module that knows TensorFlow from JAX.

Everything else is written in `keras.ops`. What Keras has no common name for
stands here, under one name for both backends: gradients inside a step, state
inside a branch, the XLA switch, sums and gathers across replicas.
"""

import contextlib
import functools
import threading

import keras
from keras import ops, tree

# Inside a layer, a variable's value and even its dtype are those of the layer's
# compute dtype. State that travels through a branch must be exact; there is no
# public name for that, nor for the mask that a tensor carries along.
from keras.src.backend import get_keras_mask, set_keras_mask  # noqa: F401
from keras.src.backend.common import global_state

BACKEND = keras.backend.backend()


class RecordingScope(keras.StatelessScope):
    """A `keras.StatelessScope` that remembers what was assigned in it.

    Args:
        state_mapping: Pairs `(variable, value)` to be read inside.

    Attributes:
        assigned: Dict `{id(variable): (variable, value)}`.
        losses: What `add_loss` was given inside.
    """

    def __init__(self, state_mapping):
        super().__init__(state_mapping, collect_losses=True)
        self.assigned = {}

    def add_update(self, update):
        super().add_update(update)
        self.assigned[id(update[0])] = update


if BACKEND == "tensorflow":
    import tensorflow as tf
    from tensorflow.python.ops import cond_v2

    def value_and_grad(fn, args, unconnected="zero"):
        """Evaluates `fn` and its gradient; may be nested for second order.

        Args:
            fn: `fn(args)` returns `(loss, aux)`, a scalar and anything.
            args: Nested structure of floating tensors.
            unconnected: `"zero"` or `"none"`, the gradient of an argument that
                `loss` does not depend on. JAX knows only zero.

        Returns:
            `((loss, aux), gradients)`, gradients structured like `args`. On
            TensorFlow the gradient of a gathered tensor stays `IndexedSlices`
            (see `dense`).
        """
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

    def dense(gradient):
        """The gradient as an ordinary tensor, repeated rows summed."""
        return tf.convert_to_tensor(gradient)

    def weighted_sum(gradients, weights):
        """Σ wᵢ gᵢ of the gradients of one tensor; sparse if all are sparse."""
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

    def jit(fn):
        """Compiles a function of tensors with XLA."""
        # TensorFlow counts traces by code object and warns after a few; a
        # function that is made anew for each use is not traced again.
        fn = functools.partial(fn)
        return tf.function(fn, jit_compile=True, autograph=False)

    def jit_layer(fn, layer):
        """`jit(fn)`, reading the variables of `layer` as they are at each call.

        Args:
            fn: Function of tensors that calls `layer` or its parts and assigns
                nothing.
            layer: A built Keras layer or model.
        """
        return jit(fn)

    def hlo_text(fn, *args):
        """What XLA is given to compile for `fn(*args)`, as text."""
        fn = tf.function(fn, jit_compile=True, autograph=False)
        return fn.experimental_get_compiler_ir(*args)(stage="hlo")

    def _trace(fn):
        tf.function(fn, autograph=False).get_concrete_function()

    def _cond(predicate, true_fn, false_fn):
        def run():
            return tf.cond(
                predicate, lambda: _marked(true_fn), lambda: _marked(false_fn)
            )

        if tf.executing_eagerly():
            # As in a graph, what did not run has a gradient: zero.
            return tf.function(functools.partial(run), autograph=False)()
        return run()

    @tf.custom_gradient
    def _inside_branch(x):
        # XLA wants gradients of one shape from both branches, where those of a
        # lookup would have as many rows as there were looked up.
        return tf.identity(x), tf.convert_to_tensor

    def _marked(branch):
        tf.compat.v1.get_default_graph()._computes_shapes_again = True
        return branch()

    # The gradient of a branch is a function of its own, to which the branch
    # hands what it has computed. XLA must know shapes and the order of axes
    # when it compiles, and what was handed over it does not know: a branch with
    # `tensordot` or `broadcast_to` would not compile for an unknown batch size.
    # So the gradient of our branches computes such numbers again.
    _PURE = frozenset(
        "Add AddV2 BroadcastArgs Cast ConcatV2 Const Equal ExpandDims Fill "
        "FloorDiv FloorMod GatherV2 Greater GreaterEqual Identity "
        "InvertPermutation Less LessEqual Maximum Minimum Mul Neg NotEqual "
        "Pack Prod Range Rank Reshape Select SelectV2 Shape ShapeN Size Slice "
        "Squeeze StridedSlice Sub Sum".split()
    )
    # This is not public: where TensorFlow has it no more, all else still works.
    _branch_gradient = getattr(cond_v2, "_CondGradFuncGraph", None)
    _capture = getattr(_branch_gradient, "_capture_helper", None)

    def _capture_or_compute_again(self, tensor, name):
        forward = self._forward_graph
        if (
            tensor.graph is not forward
            or not getattr(forward, "_computes_shapes_again", False)
            or not (tensor.dtype.is_integer or tensor.dtype.is_bool)
            or tensor.shape.rank not in (0, 1)
            or tensor.op.type not in _PURE
        ):
            return _capture(self, tensor, name)
        again = self._captured_constants
        if id(tensor) not in again:
            op = tensor.op
            copy = self._create_op_internal(
                op.type,
                [self.capture(x) for x in op.inputs],
                [x.dtype for x in op.outputs],
                attrs=dict(op.node_def.attr),
            )
            again[id(tensor)] = copy.outputs[tensor.value_index]
        return again[id(tensor)]

    if _capture is not None:
        _branch_gradient._capture_helper = _capture_or_compute_again

    def full_precision():
        """Products of float32 matrices inside are of float32 numbers.

        Not of bfloat16 (TPU) or TF32 (GPU), to which accelerators round them.
        TensorFlow cannot say so of a part of a program: there this does
        nothing, and TF32 is switched off for all, by
        `tf.config.experimental.enable_tensor_float_32_execution(False)`.
        """
        return contextlib.nullcontext()

    def is_concrete(x):
        """Whether `x` has its values now, outside of a traced function."""
        return tf.executing_eagerly()

    def is_recorded():
        """Whether a gradient may be asked for of what runs now.

        A loop that `jit` has compiled has none outside of its program. (On JAX
        what a gradient is asked for is not concrete.)
        """
        try:
            from tensorflow.python.eager import record

            return record.could_possibly_record()
        except (ImportError, AttributeError):
            return True  # TensorFlow's private function: assume the worst

    def num_replicas():
        """How many replicas share the step: `tf.distribute`'s, else 1."""
        return tf.distribute.get_strategy().num_replicas_in_sync

    def _replicas():
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return None
        return context

    def replica():
        """The number of this replica among them, from 0 on."""
        context = _replicas()
        return context.replica_id_in_sync_group if context else 0

    def all_reduce_sum(x):
        """The sum of `x` over the replicas. On JAX arrays are global: `x`."""
        context = _replicas()
        return context.all_reduce("SUM", x) if context else x

    def all_gather(x):
        """Concatenates `x` of all replicas along axis 0 (on JAX: `x`).

        The gradient is summed over the replicas.
        """
        context = _replicas()
        return context.all_gather(x, axis=0) if context else x

    _keras_moments = tf.nn.moments
    _exact = threading.local()
    _exact_users = []

    def _moments(x, axes, shift=None, keepdims=False, name=None):
        if not getattr(_exact, "on", False):
            return _keras_moments(
                x, axes, shift=shift, keepdims=keepdims, name=name
            )
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(
            tf.math.squared_difference(x, mean), axes, keepdims=True
        )
        if not keepdims:
            mean, variance = tf.squeeze(mean, axes), tf.squeeze(variance, axes)
        return mean, variance

    @contextlib.contextmanager
    def second_order():
        """Makes normalization layers traced inside right to second order.

        `tf.nn.moments` stops the gradient of the mean inside the variance:
        exact to first order, wrong to second, and so are the LayerNormalization
        and BatchNormalization built on it. Within this context, in this thread,
        it is the plain formula.
        """
        before = getattr(_exact, "on", False)
        _exact.on = True
        _exact_users.append(None)
        tf.nn.moments = _moments
        try:
            yield
        finally:
            _exact.on = before
            _exact_users.pop()
            if not _exact_users:
                tf.nn.moments = _keras_moments

elif BACKEND == "jax":
    import jax

    def value_and_grad(fn, args, unconnected="zero"):
        return jax.value_and_grad(fn, has_aux=True)(args)

    def dense(gradient):
        return gradient

    def weighted_sum(gradients, weights):
        return sum(
            g * ops.cast(w, g.dtype)
            for g, w in zip(gradients, weights, strict=True)
        )

    def jit(fn):
        return jax.jit(fn)

    def jit_layer(fn, layer):
        def pure(values, *args):
            mapping = zip(layer.variables, values, strict=True)
            with keras.StatelessScope([*mapping]):
                return fn(*args)

        compiled = jax.jit(pure)
        return lambda *args: compiled([v.value for v in layer.variables], *args)

    def hlo_text(fn, *args):
        return jax.jit(fn).lower(*args).compiler_ir("hlo").as_hlo_text()

    def _trace(fn):
        jax.eval_shape(fn)

    def _cond(predicate, true_fn, false_fn):
        return jax.lax.cond(predicate, true_fn, false_fn)

    def _inside_branch(x):
        return x

    def full_precision():
        return jax.default_matmul_precision("highest")

    def is_concrete(x):
        return not isinstance(x, jax.core.Tracer)

    def is_recorded():
        return False

    def num_replicas():
        return 1

    def replica():
        return 0

    def all_reduce_sum(x):
        return x

    def all_gather(x):
        return x

    second_order = contextlib.nullcontext

else:
    raise ImportError(
        "blogkeras runs on the TensorFlow and JAX backends of Keras. Set the "
        "environment variable KERAS_BACKEND to one of them before Python "
        f"starts. Received: KERAS_BACKEND={BACKEND}"
    )


class ReplicaLosses:
    """For layers that exchange something with other replicas before `add_loss`.

    Keras keeps the losses of all replicas in one list. TensorFlow runs each
    replica in a thread of its own; they take turns where they exchange, and one
    that comes later would count the losses of those before it as its own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_threads = {}

    def add_loss(self, loss):
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


@contextlib.contextmanager
def _no_autocast():
    """Variables inside are of the dtype that they are kept in."""
    # Under Keras's `AutocastScope(None)` the dtype of each would be float32.
    before = global_state.get_global_attribute("autocast_scope")
    global_state.set_global_attribute("autocast_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", before)


def cond(predicate, true_fn, false_fn, layers):
    """Runs one of two functions that may contain Keras layers with state.

    `keras.ops.cond` cannot run Dropout, BatchNormalization or `add_loss` in a
    branch. Here each branch sees the variables' values of the moment, and what
    it assigns is assigned after the branches have met. Only the chosen branch
    is computed, forward and backward; variables that are not trainable are
    constants to the gradient.

    Args:
        predicate: Scalar boolean tensor.
        true_fn: Function without arguments that returns tensors.
        false_fn: Likewise, with the same structure, shapes and dtypes.
        layers: The Keras layers that the branches call.

    Returns:
        `(outputs, loss)`: the outputs of the chosen branch and the sum of what
        its layers gave to `add_loss`, float32; hand that on to `add_loss`.

    Example:

    >>> dense, dropout = keras.layers.Dense(3), keras.layers.Dropout(0.5)
    >>> x = keras.ops.ones((2, 3)); dense.build(x.shape)
    >>> outputs, loss = cond(
    ...     keras.ops.mean(x) > 0,
    ...     lambda: dense(dropout(x, training=True)),
    ...     lambda: x,
    ...     [dense, dropout],
    ... )
    """
    variables = {id(v): v for layer in layers for v in layer.variables}
    assigned = {}
    with _no_autocast():
        mapping = [(v, ops.convert_to_tensor(v)) for v in variables.values()]

    def inside(variable, value):
        if not keras.backend.is_float_dtype(variable.dtype):
            return value
        if not variable.trainable:
            return ops.stop_gradient(value)
        return _inside_branch(value)

    def run(fn):
        with _no_autocast():
            scope = RecordingScope([(v, inside(v, x)) for v, x in mapping])
        with scope:
            outputs = fn()
        loss = sum(
            (ops.cast(loss, "float32") for loss in scope.losses),
            start=ops.zeros((), "float32"),
        )
        return outputs, loss, scope

    # A first trace tells which variables the branches assign: handing all of
    # them out of the branch would copy every weight.
    for fn in (true_fn, false_fn):

        def record(fn=fn):
            outputs, loss, scope = run(fn)
            assigned.update(scope.assigned)
            return loss

        _trace(record)
    changing = [variable for variable, _ in assigned.values()]
    with _no_autocast():
        mapping += [
            (v, ops.convert_to_tensor(v))
            for v in changing
            if id(v) not in variables
        ]

    def branch(fn):
        outputs, loss, scope = run(fn)
        with _no_autocast():
            state = [
                ops.cast(scope.get_current_value(v), v.dtype) for v in changing
            ]
        return outputs, loss, state

    outputs, loss, state = _cond(
        predicate, lambda: branch(true_fn), lambda: branch(false_fn)
    )
    with _no_autocast():
        for variable, value in zip(changing, state, strict=True):
            variable.assign(value)
    # Keras recognizes a layer's `add_loss` tensors by id. Those of the branches
    # are gone; without this, a later tensor with a like id would count twice.
    for layer in layers:
        layer._clear_losses()
    return outputs, loss
