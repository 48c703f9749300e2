"""Second derivatives on TensorFlow; `__init__.py` says what each name does."""

import contextlib
import threading

import tensorflow as tf

# Functions that TensorFlow, and with it Keras, calls by these names, and what
# stands in their place within `second_order`.
_originals = {
    (tf.nn, "moments"): tf.nn.moments,
    (tf.nn, "softsign"): tf.nn.softsign,
    (tf.nn, "ctc_loss"): tf.nn.ctc_loss,
    (tf.image, "resize"): tf.image.resize,
}
_exact = threading.local()
_exact_users = []


def _moments(x, axes, shift=None, keepdims=False, name=None):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(
        tf.math.squared_difference(x, mean), axes, keepdims=True
    )
    if not keepdims:
        mean, variance = tf.squeeze(mean, axes), tf.squeeze(variance, axes)
    return mean, variance


def _softsign(features, name=None):
    features = tf.convert_to_tensor(features)
    return features / (1 + tf.abs(features))


def _ctc_loss(*args, **kwargs):
    raise ValueError(
        "TensorFlow has no second derivative of the CTC loss (it would take it "
        "for zero). Use an attack such as FGM, or the JAX backend. Received: "
        "tf.nn.ctc_loss under a penalty of the gradient"
    )


def _resize(images, *args, **kwargs):
    images = tf.convert_to_tensor(images)
    if not images.dtype.is_floating:
        return _originals[tf.image, "resize"](images, *args, **kwargs)

    def resize(x):
        return _originals[tf.image, "resize"](x, *args, **kwargs)

    return _linear(resize, images)


# The operations of `_linear` have it in their names.
_LINEAR = "differentiable_transpose"


def _linear(fn, x):
    """A linear function of a tensor, differentiable any number of times.

    Its derivative is its transpose, and the transpose of that is the function.
    """
    zero = tf.zeros_like(x)

    @tf.custom_gradient
    def forward(x):
        return fn(x), backward

    @tf.custom_gradient
    def backward(dy):
        with tf.name_scope(_LINEAR), tf.GradientTape() as tape:
            tape.watch(zero)
            y = fn(zero)
        return tape.gradient(y, zero, dy), forward

    return forward(x)


def _exactly(place, exact):
    def fn(*args, **kwargs):
        on = getattr(_exact, "on", False)
        return (exact if on else _originals[place])(*args, **kwargs)

    return fn


_replacements = {
    place: _exactly(place, exact)
    for place, exact in zip(
        _originals, (_moments, _softsign, _ctc_loss, _resize), strict=True
    )
}


@contextlib.contextmanager
def second_order():
    before = getattr(_exact, "on", False)
    _exact.on = True
    _exact_users.append(None)
    for (module, name), fn in _replacements.items():
        setattr(module, name, fn)
    try:
        yield
    finally:
        _exact.on = before
        _exact_users.pop()
        if not _exact_users:
            for (module, name), fn in _originals.items():
                setattr(module, name, fn)


def check_second_order(gradients):
    for gradient in gradients:
        graph = getattr(gradient, "graph", None)
        if graph is not None:
            _check_graph(graph, _ancestors(gradient))


def _ancestors(tensor):
    """The operations that a tensor is computed by."""
    if isinstance(tensor, tf.IndexedSlices):
        tensor = tensor.values
    waiting, found = [tensor.op], {}
    while waiting:
        op = waiting.pop()
        if op.name not in found:
            found[op.name] = op
            waiting += [x.op for x in op.inputs]
    return found.values()


def _check_graph(graph, operations):
    for op in operations:
        is_float = any(x.dtype.is_floating for x in op.outputs)
        if is_float and _LINEAR not in op.name and _lacks_gradient(op.type):
            raise ValueError(
                "TensorFlow has no second derivative of an operation in the "
                "model, and a loss that contains its gradient needs one. Use "
                "another layer, the JAX backend, or in adversarial training an "
                "attack such as FGM. Received: "
                f"{op.type}, the first derivative at {op.name!r}"
            )
        for attribute in op.node_def.attr.values():
            # The body of a loop, the branches of a condition.
            for function in (attribute.func, *attribute.list.func):
                if graph._is_function(function.name):
                    _check_function(graph, function.name, op)


def _check_function(graph, name, op):
    definition = graph._get_function(name)
    inner = getattr(definition, "graph", None)
    if inner is not None:
        _check_graph(inner, inner.get_operations())


def _lacks_gradient(kind):
    """Whether it is a derivative that has no derivative itself."""
    if kind == "StopGradient" or not ("Grad" in kind or "Backprop" in kind):
        return False
    try:
        return _gradients().lookup(kind) is None
    except LookupError:
        return True


def _gradients():
    from tensorflow.python.framework import ops as framework_ops

    return framework_ops.gradient_registry
