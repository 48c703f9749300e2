"""Branches, and parts computed again, whose layers have state and losses."""

import keras
from keras import ops

from blogkeras.backend.scopes import RecordingScope, no_autocast

if keras.backend.backend() == "tensorflow":
    from blogkeras.backend import tensorflow as framework
else:
    from blogkeras.backend import jax as framework


def cond(predicate, true_fn, false_fn, layers):
    """Runs one of two functions that may contain Keras layers with state.

    `keras.ops.cond` cannot run Dropout, BatchNormalization or `add_loss` in a
    branch. Here each branch reads the values that the variables have at the
    call. What it assigns is collected, and assigned after the condition. Only
    the chosen branch is computed, forward and backward; variables that are not
    trainable are constants to the gradient.

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
    run = _runner(layers)
    assigned = {}

    # A first trace tells which variables the branches assign: handing all of
    # them out of the branch would copy every weight.
    for fn in (true_fn, false_fn):

        def record(fn=fn):
            _outputs, loss, scope = run(fn)
            assigned.update(scope.assigned)
            return loss

        framework.trace(record)
    changing = [variable for variable, _ in assigned.values()]
    run = _runner(layers, changing)

    def branch(fn):
        outputs, loss, scope = run(fn)
        with no_autocast():
            state = [
                ops.cast(scope.get_current_value(v), v.dtype) for v in changing
            ]
        return outputs, loss, state

    outputs, loss, state = framework.branch(
        predicate, lambda: branch(true_fn), lambda: branch(false_fn)
    )
    with no_autocast():
        for variable, value in zip(changing, state, strict=True):
            variable.assign(value)
    _forget_losses(layers)
    return outputs, loss


def run_branch(fn, layers, unused=()):
    """Runs a function as `cond` runs the branch that it chooses.

    For a choice that is known now, as in eager execution: no graph is built;
    and for what a model's loss calls, whose `add_loss` Keras's trainer for JAX
    would not see.

    Args:
        fn: Function without arguments that returns a list of tensors.
        layers: The Keras layers that it calls.
        unused: The Keras layers of the other branch. As with `cond`, their
            trainable variables have a gradient: zero.

    Returns:
        `(outputs, loss)` as `cond`.
    """
    outputs, loss, scope = _runner([*layers, *unused])(fn)
    with no_autocast():
        for variable, value in scope.assigned.values():
            variable.assign(ops.cast(value, variable.dtype))
        idle = [v for layer in unused for v in layer.trainable_variables]
        for i, x in enumerate(outputs):
            if idle and keras.backend.is_float_dtype(x.dtype):
                outputs[i] = framework.with_zero_gradients(x, idle)
                break
    _forget_losses([*layers, *unused])
    return outputs, loss


def _runner(layers, others=()):
    """A function that runs a branch with the values that variables have now.

    It returns the branch's outputs, the sum of its losses and the scope, which
    knows what was assigned.
    """
    variables = {id(v): v for layer in layers for v in layer.variables}
    variables |= {id(v): v for v in others}
    with no_autocast():
        mapping = [(v, ops.convert_to_tensor(v)) for v in variables.values()]

    def inside(variable, value):
        if not keras.backend.is_float_dtype(variable.dtype):
            return value
        if not variable.trainable:
            return ops.stop_gradient(value)
        return framework.inside_branch(value)

    def run(fn):
        with no_autocast():
            scope = RecordingScope([(v, inside(v, x)) for v, x in mapping])
        with scope:
            outputs = fn()
        loss = sum(
            (ops.cast(loss, "float32") for loss in scope.losses),
            start=ops.zeros((), "float32"),
        )
        return outputs, loss, scope

    return run


def _forget_losses(layers):
    # Keras recognizes a layer's `add_loss` tensors by `id`. Those of the
    # branches are deleted, so a later tensor may get the same `id`. Forget
    # them: otherwise that tensor would count twice.
    for layer in layers:
        layer._clear_losses()


def remat(fn, layers, *inputs):
    """Runs a function without keeping its intermediate results.

    The gradient computes them again, which needs less memory and more time, as
    with `keras.remat`. Here the layers may have state: inside `keras.remat` a
    BatchNormalization raises UnexpectedTracerError on JAX. All variables go in
    as values, the new state comes out as values and is assigned once,
    afterwards.

    Args:
        fn: Function of the inputs that returns a tensor or a structure of
            tensors.
        layers: The Keras layers that `fn` calls.
        *inputs: Tensors.

    Returns:
        What `fn` returns.

    Raises:
        ValueError: where a layer calls `add_loss` inside.

    Example:

    >>> dense = keras.layers.Dense(3)
    >>> x = keras.ops.ones((2, 3)); dense.build(x.shape)
    >>> y = remat(dense, [dense], x)
    """
    variables = {id(v): v for layer in layers for v in layer.variables}
    variables = list(variables.values())
    changing = [v for v in variables if not v.trainable]
    with no_autocast():
        values = [ops.convert_to_tensor(v) for v in variables]

    def pure(*args):
        values, inputs = args[: len(variables)], args[len(variables) :]
        with no_autocast():
            scope = RecordingScope(list(zip(variables, values, strict=True)))
        with scope:
            outputs = fn(*inputs)
        if scope.losses:
            raise ValueError(
                "Expected layers without `add_loss` in what is computed again. "
                f"Received: layers={layers}"
            )
        with no_autocast():
            state = [
                ops.cast(scope.get_current_value(v), v.dtype) for v in changing
            ]
        return outputs, state

    outputs, state = framework.recomputed(pure)(*values, *inputs)
    with no_autocast():
        for variable, value in zip(changing, state, strict=True):
            variable.assign(value)
    return outputs
