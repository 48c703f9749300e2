"""Passes the outputs of layers through functions while a model runs."""

import contextlib
import threading

from keras import tree

from blogkeras import backend

# `tf.distribute` runs each replica in a thread of its own and may switch
# between threads where replicas exchange values, as in a synchronized
# BatchNormalization.
_local = threading.local()


class _StandIn:
    """Stands in for `layer.call` while the objective is evaluated."""

    def __init__(self, layer, method):
        self.layer = layer
        self.method = method
        self.call = getattr(layer, method)
        self.__wrapped__ = self.call  # for its signature
        # What the user may have set on this very layer.
        self.own = layer.__dict__.get(method)
        self.users = 0

    def leave(self):
        """Gives the layer back what it had under the name."""
        if self.own is None:
            object.__delattr__(self.layer, self.method)
        else:
            object.__setattr__(self.layer, self.method, self.own)

    def __call__(self, *args, **kwargs):
        output = backend.traced_anew(self.call)(*args, **kwargs)
        fn = getattr(_local, "perturb", {}).get(id(self.layer))
        if fn is None:
            return output
        new = fn(output, *args, **kwargs)
        # Some layers set the mask of their output in `call`.
        for before, after in zip(
            tree.flatten(output), tree.flatten(new), strict=True
        ):
            mask = backend.get_keras_mask(before)
            if mask is not None and after is not before:
                backend.set_keras_mask(after, mask)
        return new


@contextlib.contextmanager
def perturbed(perturb, model=None):
    """Within, and in this thread, layers' outputs pass through functions.

    Args:
        perturb: Dict `{layer: fn}`, as in `Objective.__call__`. Functions of a
            `perturbed` around this one stay, and come first.
        model: A model that reads other values of its variables within: where
            the `call` of one of its layers is a `tf.function`, each call is
            traced anew. A program that it has would go on with the values of
            the pass that it was traced in.
    """
    before = getattr(_local, "perturb", {})
    _local.perturb = dict(before)
    for layer, fn in perturb.items():
        _local.perturb[id(layer)] = _after(before.get(id(layer)), fn)
    methods = {
        layer: _called_method(layer)
        for layer in [*perturb, *_compiled_layers(model)]
    }
    for layer, method in methods.items():
        stand_in = layer.__dict__.get(method)
        if not isinstance(stand_in, _StandIn):
            stand_in = _StandIn(layer, method)
            object.__setattr__(layer, method, stand_in)
        stand_in.users += 1
    try:
        yield
    finally:
        _local.perturb = before
        for layer, method in methods.items():
            stand_in = layer.__dict__[method]
            stand_in.users -= 1
            if not stand_in.users:
                stand_in.leave()


def _after(first, second):
    """One function of both, where there is a first."""
    if first is None:
        return second

    def both(output, *args, **kwargs):
        return second(first(output, *args, **kwargs), *args, **kwargs)

    return both


def _compiled_layers(model):
    """The layers of a model, itself included, that are a `tf.function`."""
    if model is None or backend.BACKEND == "jax":
        return []
    return [
        layer
        for layer in model._flatten_layers()
        if backend.is_compiled(getattr(layer, _called_method(layer)))
    ]


def _called_method(layer):
    """The name of the method that Keras calls; quantized, it is another."""
    is_quantized = getattr(layer, "quantization_mode", None) is not None
    return "quantized_call" if is_quantized else "call"
