"""The names that bert4keras gives to its functions and classes.

bert4keras puts names such as `gelu` and even `LayerNormalization` into Keras's
one dictionary of custom objects. When a model is loaded, Keras 3 looks into
that dictionary before its own classes. So bert4keras's names are kept in a
dictionary of their own, and Keras has them as `bert4keras>name`.
"""

import collections
import types

import keras


class CustomObjects(collections.ChainMap):
    """The result of `keras.utils.get_custom_objects()` in bert4keras.

    The first dictionary holds bert4keras's own names; a name that is new after
    the import is the user's, and goes to Keras's dictionary.
    """

    def __init__(self):
        super().__init__({}, keras.saving.get_custom_objects())
        self.importing = True

    def __setitem__(self, name, value):
        own = self.importing or name in self.maps[0]
        self.maps[0 if own else 1][name] = value


custom_objects = CustomObjects()


def get_custom_objects():
    """Returns the dictionary of names that bert4keras understands."""
    return custom_objects


def register(item, name=None):
    """Registers `item` with Keras, for loading, as `bert4keras>name`."""
    return keras.saving.register_keras_serializable("bert4keras", name)(item)


def register_all(modules):
    """Registers bert4keras's custom objects and the classes of `modules`."""
    items = [x for module in modules for x in vars(module).values()]
    classes = [x for x in items if hasattr(x, "get_config")]
    for item in [*custom_objects.maps[0].values(), *classes]:
        if item.__module__.startswith("bert4keras."):
            register(item)
    custom_objects.importing = False


class MethodInitializer(keras.initializers.Initializer):
    """A method used as an initializer; glorot uniform once it is reloaded."""

    def __init__(self, method=None):
        self.method = method or keras.initializers.GlorotUniform()

    def __call__(self, shape, dtype=None):
        return self.method(shape, dtype=dtype)

    def get_config(self):
        return {}


register(MethodInitializer)


def old_hard_sigmoid(x):
    """Keras 2's `hard_sigmoid`: 0.2 x + 0.5 between 0 and 1.

    Keras 3 has x / 6 + 0.5, and would find its own function by that name in a
    file.
    """
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


register(old_hard_sigmoid)


def _own(identifier):
    if isinstance(identifier, str):
        return custom_objects.get(identifier, identifier)
    return identifier


def get_activation(identifier):
    """`keras.activations.get` that looks up bert4keras's names first."""
    found = _own(identifier)
    if isinstance(found, str) and found == "hard_sigmoid":
        return old_hard_sigmoid
    return keras.activations.get(found)


def set_old_activations(model):
    """Gives a model from a file of Keras 2 the `hard_sigmoid` of Keras 2."""
    for layer in model._flatten_layers():
        for name in ("activation", "recurrent_activation"):
            # A recurrent layer shows those of its cell.
            if vars(layer).get(name) is keras.activations.hard_sigmoid:
                setattr(layer, name, old_hard_sigmoid)


def get_initializer(identifier):
    """`keras.initializers.get` that looks up bert4keras's names first.

    Returns a new object: an initializer of Keras 3 gives the same numbers each
    time it is called, so that layers sharing one would start out equal.
    """
    initializer = keras.initializers.get(_own(identifier))
    if isinstance(initializer, MethodInitializer):
        return initializer
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    if isinstance(initializer, types.MethodType):
        return MethodInitializer(initializer)
    return initializer
