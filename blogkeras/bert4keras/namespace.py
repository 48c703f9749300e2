"""The module that bert4keras sees as `keras` while it is being imported."""

import types

import keras
import tensorflow as tf

from blogkeras.bert4keras import layers, names
from blogkeras.bert4keras.backend import make_backend
from blogkeras.bert4keras.models import load_model, make_model
from blogkeras.bert4keras.optimizers import Optimizer


class Door:
    """Stands for a Keras class where old scripts call, derive from or test it.

    Calling the door makes a genuine object of the Keras class, from arguments
    written for Keras 2.
    """

    def __init__(self, cls, make):
        self._cls = cls
        self._make = make

    def __call__(self, *args, **kwargs):
        return self._make(*args, **kwargs)

    def __mro_entries__(self, bases):
        return (self._cls,)

    def __instancecheck__(self, instance):
        return isinstance(instance, self._cls)

    def __subclasscheck__(self, subclass):
        return issubclass(subclass, self._cls)

    def __getattr__(self, name):
        return getattr(self._cls, name)


def _make_dense(units, activation=None, *args, **kwargs):
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


def _copy(module, name, **changes):
    """Returns a new module with the public names of `module` and `changes`."""
    copy = types.ModuleType(name)
    public = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    copy.__dict__.update(public, **changes)
    return copy


_LAYERS = {
    name: value
    for name, value in vars(layers).items()
    if isinstance(value, type) and issubclass(value, layers.Bridged)
    if not name.startswith("_") and value is not layers.Bridged
}
for _name, _layer in _LAYERS.items():
    names.register(_layer, f"keras.{_name}")


def make_keras():
    """Returns new modules to stand in `sys.modules` as Keras, by name."""
    model = Door(keras.Model, make_model)
    submodules = {
        "activations": _copy(
            keras.activations, "keras.activations", get=names.get_activation
        ),
        "backend": make_backend(),
        "initializers": _copy(
            keras.initializers,
            "keras.initializers",
            get=names.get_initializer,
        ),
        "layers": _copy(
            keras.layers,
            "keras.layers",
            Dense=Door(keras.layers.Dense, _make_dense),
            Activation=Door(keras.layers.Activation, _make_activation),
            **_LAYERS,
        ),
        "models": _copy(
            keras.models, "keras.models", Model=model, load_model=load_model
        ),
        "optimizers": _copy(
            keras.optimizers, "keras.optimizers", Optimizer=Optimizer
        ),
        "utils": _copy(
            keras.utils,
            "keras.utils",
            get_custom_objects=names.get_custom_objects,
        ),
    }
    root = _copy(keras, "keras", **submodules, Model=model)
    root.__version__ = keras.__version__
    modules = {f"keras.{name}": module for name, module in submodules.items()}
    return {"keras": root, **modules}


class _TensorFlow(types.ModuleType):
    """TensorFlow, but for its lazily loaded `keras`."""

    def __getattr__(self, name):
        return getattr(tf, name)


def make_tensorflow(root):
    """Returns a module to stand in `sys.modules` as TensorFlow."""
    module = _TensorFlow("tensorflow")
    module.keras = root
    module.__version__ = tf.__version__
    return module
