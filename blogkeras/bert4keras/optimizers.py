"""Keras 2's interface between an optimizer and Keras, on Keras 3.

bert4keras's optimizers are written as updates of one variable, with slots and
hyper-parameters looked up by name. `Optimizer` provides these. So all of them,
with any of their extensions, run unchanged, while `compile`, `fit`, clipping,
loss scaling and saving are Keras 3's.
"""

import inspect

import keras
import numpy as np
import tensorflow as tf

from blogkeras.arguments import check_boolean
from blogkeras.bert4keras.names import register


class ShortName:
    """Mixin of an optimizer with Keras 2's attribute `lr`."""

    @property
    def lr(self):
        """Keras 2's short name of `learning_rate`; may be set."""
        return self.learning_rate

    @lr.setter
    def lr(self, value):
        self.learning_rate = value


class LearningRate(ShortName):
    """Mixin that takes the arguments of Keras 2.3.1, `lr=` and `decay=` too.

    Positional arguments mean what they meant there: Keras 3 has `epsilon` in
    the fourth place of `Adam`, where `amsgrad` was.

    Raises:
        ValueError: on more positional arguments than Keras 2.3.1 has, on an
            argument that is given twice, and on what Keras 3 does not know.
    """

    def __init__(self, *args, **kwargs):
        if len(args) > len(self._places):
            raise ValueError(
                f"Expected at most {len(self._places)} positional arguments, "
                f"those of Keras 2.3.1: {', '.join(self._places)}. "
                f"Received: {args!r}"
            )
        named = dict(zip(self._places, args, strict=False))
        twice = sorted(set(named) & set(kwargs))
        if twice:
            raise ValueError(
                f"Expected `{twice[0]}` once. Received: {args!r} and "
                f"{twice[0]}={kwargs[twice[0]]!r}"
            )
        for name in {"nesterov", "amsgrad"} & set(named):
            # Before Keras 2.3, and in tf.keras, a number has their places.
            check_boolean(name, named[name])
        kwargs.update(named)
        if "lr" in kwargs:
            # It counts beside a `learning_rate`, as in Keras 2.3.1.
            kwargs["learning_rate"] = kwargs.pop("lr")
        decay = kwargs.pop("decay", None)
        if decay:
            # Keras 2: rate / (1 + decay * iterations)
            kwargs["learning_rate"] = (
                keras.optimizers.schedules.InverseTimeDecay(
                    kwargs.get("learning_rate", self._default_rate), 1, decay
                )
            )
        if kwargs.get("epsilon", 0) is None:
            del kwargs["epsilon"]
        for name, default in (("schedule_decay", 0.004), ("initial_decay", 0)):
            value = kwargs.pop(name, default)
            if value != default:
                raise ValueError(
                    f"Keras 3 knows no `{name}` but {default}. "
                    f"Received: {name}={value!r}"
                )
        super().__init__(**kwargs)


def _of_keras_2(name, *places):
    """Returns a class of the optimizer `name` with Keras 2's arguments."""
    cls = getattr(keras.optimizers, name)
    rate = inspect.signature(cls).parameters["learning_rate"].default
    members = {
        "__doc__": f"`keras.optimizers.{name}` that takes Keras 2's `lr`.",
        "__module__": __name__,
        "_default_rate": rate,
        "_places": ("learning_rate", *places),
    }
    return register(type(name, (LearningRate, cls), members), f"keras.{name}")


OPTIMIZERS = {
    name: _of_keras_2(name, *places)
    for name, *places in (
        ("SGD", "momentum", "nesterov"),
        ("RMSprop", "rho"),
        ("Adagrad",),
        ("Adadelta", "rho"),
        ("Adam", "beta_1", "beta_2", "amsgrad"),
        ("Adamax", "beta_1", "beta_2"),
        ("Nadam", "beta_1", "beta_2"),
    )
}


def get_optimizer(identifier):
    """`keras.optimizers.get` that makes optimizers with Keras 2's names."""
    if isinstance(identifier, str):
        for name, cls in OPTIMIZERS.items():
            if identifier.lower() == name.lower():
                return cls()
    return keras.optimizers.get(identifier)


class Optimizer(ShortName, keras.optimizers.Optimizer):
    """`keras.optimizers.Optimizer` for bert4keras.

    Takes the arguments of any Keras 3 optimizer, as `clipnorm`.
    """

    _lock = False  # bert4keras sets attributes before `super().__init__`

    def __init__(self, name=None, **kwargs):
        # An attribute of that name may have been set by bert4keras's EMA.
        kwargs.setdefault("ema_momentum", vars(self).get("ema_momentum", 0.99))
        kwargs.setdefault("learning_rate", 1e-3)
        super().__init__(name=name, **kwargs)
        self._hyper = {}
        self._slots = {}

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._create_slots([v.value for v in variables])

    def update_step(self, gradient, variable, learning_rate):
        if isinstance(gradient, tf.IndexedSlices):
            self._resource_apply_sparse(
                gradient.values, variable, gradient.indices
            )
        else:
            self._resource_apply_dense(gradient, variable)

    def _set_hyper(self, name, value):
        if name == "learning_rate":
            self.learning_rate = value
        else:
            self._hyper[name] = value

    def _get_hyper(self, name, dtype=None):
        value = self._hyper[name]
        return value if dtype is None else tf.cast(value, dtype)

    def _serialize_hyperparameter(self, name):
        if name == "learning_rate":
            return keras.optimizers.Optimizer.get_config(self)[name]
        return self._hyper[name]

    def _decayed_lr(self, dtype):
        return tf.cast(self.learning_rate, dtype)

    def _slot_key(self, variable, name):
        return f"{self._get_variable_index(variable)}/{name}"

    def add_slot(self, variable, name, initializer="zeros"):
        """Adds a variable that belongs to `variable`; returns it."""
        if isinstance(initializer, np.ndarray):
            shape, initializer = initializer.shape, "zeros"
        else:
            shape = variable.shape
        if name == "slow_var":
            # Lookahead's slow weights start at the values of the fast ones.
            # bert4keras starts from zero and halves all weights in the first
            # step.
            with tf.init_scope():
                initializer = keras.initializers.Constant(variable.numpy())
        # Names of TensorFlow's variables may repeat, which an HDF5 file does
        # not allow.
        path = variable.name.partition(":")[0].replace("/", "_")
        path = f"{self._get_variable_index(variable)}_{path}"
        slot = self.add_variable(
            tuple(shape),
            initializer=initializer,
            dtype=variable.dtype.base_dtype.name,
            name=f"{path}_{name}",
        )
        self._slots[self._slot_key(variable, name)] = slot
        return slot.value

    def get_slot(self, variable, name):
        """Returns the variable `name` that belongs to `variable`."""
        return self._slots[self._slot_key(variable, name)].value
