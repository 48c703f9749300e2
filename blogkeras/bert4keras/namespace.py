"""The modules that are `keras` for bert4keras and old scripts."""

import inspect
import types

import keras
import tensorflow as tf
from keras._tf_keras import keras as tf_keras

from blogkeras.bert4keras import (
    callbacks,
    data,
    layers,
    merging,
    names,
    old_names,
    saving,
)
from blogkeras.bert4keras.backend import make_backend
from blogkeras.bert4keras.models import Habits, Sequential, make_model
from blogkeras.bert4keras.optimizers import (
    OPTIMIZERS,
    Optimizer,
    get_optimizer,
)


class Door:
    """Replaces a Keras class that old scripts call, derive from or test for.

    Calling it makes an object from arguments written for Keras 2.

    Args:
        cls: The class of Keras that objects are tested for.
        make: Function that makes an object.
        bases: The classes to derive from; `cls` if none are given.
    """

    def __init__(self, cls, make, bases=None):
        self._cls = cls
        self._make = make
        self._bases = bases or (cls,)

    def __call__(self, *args, **kwargs):
        return self._make(*args, **kwargs)

    def __mro_entries__(self, bases):
        return self._bases

    def __instancecheck__(self, instance):
        return isinstance(instance, self._cls)

    def __subclasscheck__(self, subclass):
        return issubclass(subclass, self._cls)

    def __getattr__(self, name):
        for base in self._bases:
            if hasattr(base, name):
                return getattr(base, name)
        return getattr(self._cls, name)


def _make_dense(units=None, activation=None, *args, **kwargs):
    if units is None:
        units = kwargs.pop("output_dim", None)
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = layers.inner_dtype(layers.layer_at_work())
    if "kernel_initializer" in kwargs:
        kwargs["kernel_initializer"] = names.get_initializer(
            kwargs["kernel_initializer"]
        )
    return keras.layers.Dense(
        units, names.get_activation(activation), *args, **kwargs
    )


def _make_activation(activation, **kwargs):
    return keras.layers.Activation(names.get_activation(activation), **kwargs)


_ACTIVATIONS = ("activation", "recurrent_activation")


def _with_activations(cls, **defaults):
    """Replaces a layer that may have Keras 2's `hard_sigmoid`.

    Args:
        cls: The layer of Keras, which is what is made.
        defaults: Arguments of which Keras 2 had other defaults.
    """
    places = list(inspect.signature(cls).parameters)

    def make(*args, **kwargs):
        args = list(args)
        for place, name in enumerate(places[: len(args)]):
            if name in _ACTIVATIONS:
                args[place] = names.get_activation(args[place])
        for name in _ACTIVATIONS:
            if name in kwargs:
                kwargs[name] = names.get_activation(kwargs[name])
        given = places[: len(args)]
        others = {k: v for k, v in defaults.items() if k not in given}
        return cls(*args, **{**others, **kwargs})

    return Door(cls, make)


_ACTIVATED = {
    name: _with_activations(cls)
    for name, cls in vars(keras.layers).items()
    if isinstance(cls, type)
    and any(name in inspect.signature(cls).parameters for name in _ACTIVATIONS)
}


def _public(module):
    return {k: v for k, v in vars(module).items() if not k.startswith("_")}


def _copy(module, name, **changes):
    """Returns a new module with the public names of `module` and `changes`."""
    copy = old_names.Module(name)
    # `keras._tf_keras` has names of Keras 2 beside most of Keras 3's.
    plain = keras
    for part in name.split(".")[1:]:
        plain = getattr(plain, part, None)
    copy.__dict__.update(_public(plain) if plain else {})
    copy.__dict__.update(_public(module), **changes)
    return copy


_LAYERS = {
    name: value
    for name, value in (vars(layers) | vars(merging)).items()
    if isinstance(value, type) and issubclass(value, layers.Bridged)
    if not name.startswith("_") and value is not layers.Bridged
}
for _name, _layer in _LAYERS.items():
    names.register(_layer, f"keras.{_name}")


def make_keras():
    """Returns new modules to stand in `sys.modules` as Keras, by name."""
    model = Door(keras.Model, make_model, (Habits, keras.Model))
    changes = {
        "activations": {
            "get": names.get_activation,
            "hard_sigmoid": names.old_hard_sigmoid,
        },
        "callbacks": {
            "Callback": callbacks.Callback,
            "EarlyStopping": callbacks.EarlyStopping,
            "ModelCheckpoint": callbacks.ModelCheckpoint,
            "ReduceLROnPlateau": callbacks.ReduceLROnPlateau,
            "TensorBoard": callbacks.TensorBoard,
        },
        "initializers": {"get": names.get_initializer},
        "layers": {
            **_ACTIVATED,
            "Dense": Door(keras.layers.Dense, _make_dense),
            "Activation": Door(keras.layers.Activation, _make_activation),
            "GRU": _with_activations(keras.layers.GRU, reset_after=False),
            "GRUCell": _with_activations(
                keras.layers.GRUCell, reset_after=False
            ),
            "CuDNNGRU": _with_activations(keras.layers.GRU),
            "ConvLSTM2D": _with_activations(
                keras.layers.ConvLSTM2D,
                recurrent_activation=names.old_hard_sigmoid,
            ),
            **_LAYERS,
            **merging.MERGES,
        },
        "models": {
            "Model": model,
            "Sequential": Sequential,
            "load_model": saving.load_model,
            "save_model": saving.save_model,
        },
        "optimizers": {
            "Optimizer": Optimizer,
            "get": get_optimizer,
            **OPTIMIZERS,
        },
        "utils": {
            "get_custom_objects": names.get_custom_objects,
            "Sequence": data.Sequence,
        },
    }
    submodules = {
        name: _copy(module, f"keras.{name}", **changes.get(name, {}))
        for name, module in _public(tf_keras).items()
        if isinstance(module, types.ModuleType)
    }
    submodules["backend"] = make_backend()
    root = _copy(tf_keras, "keras", **submodules)
    root.Model, root.Sequential = model, Sequential
    root.__version__ = keras.__version__
    modules = {f"keras.{name}": module for name, module in submodules.items()}
    return {"keras": root, **modules, **old_names.add(root)}


class _TensorFlow(types.ModuleType):
    """TensorFlow, but for its lazily loaded `keras`.

    Under `compatible`, names of TensorFlow 1 are found in `tf.compat.v1`.
    """

    compatible = False

    def __getattr__(self, name):
        try:
            return getattr(tf, name)
        except AttributeError:
            if self.compatible and not name.startswith("_"):
                return getattr(tf.compat.v1, name)
            raise


def make_tensorflow(root, compatible=False):
    """Returns a module to stand in `sys.modules` as TensorFlow."""
    module = _TensorFlow("tensorflow")
    module.keras = root
    module.compatible = compatible
    module.__version__ = tf.__version__
    return module
