"""Keras 2's interface between an optimizer and Keras, on Keras 3.

bert4keras's optimizers are written as updates of one variable, with slots and
hyper-parameters looked up by name. `Optimizer` provides these. So all of them,
with any of their extensions, run unchanged, while `compile`, `fit`, clipping,
loss scaling and saving are Keras 3's.
"""

import numbers

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
        for name, default in self._defaults.items():
            kwargs.setdefault(name, default)
        if isinstance(kwargs["learning_rate"], numbers.Real):
            kwargs["learning_rate"] = float(kwargs["learning_rate"])
        if "global_clipnorm" not in kwargs and "clipnorm" in kwargs:
            # Keras 2 compares it with the norm of all gradients together.
            kwargs["global_clipnorm"] = kwargs.pop("clipnorm")
        decay = kwargs.pop("decay", None) or 0.0
        if decay and kwargs.get("weight_decay"):
            raise ValueError(
                "Expected `decay`, of the learning rate, or `weight_decay`; "
                "with both take a schedule of keras.optimizers.schedules. "
                f"Received: decay={decay}, "
                f"weight_decay={kwargs['weight_decay']}"
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
        self.decay = decay

    def apply(self, grads, trainable_variables=None):
        if self.global_clipnorm:
            # The squares of slices of the same row are not those of its sum.
            grads = [
                tf.convert_to_tensor(g)
                if isinstance(g, tf.IndexedSlices)
                else g
                for g in grads
            ]
        super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        # Not a schedule: as in Keras 2 the rate can be set beside a decay.
        if self.decay:
            rate = tf.convert_to_tensor(learning_rate)
            steps = tf.cast(self.iterations, rate.dtype)
            learning_rate = rate / (1.0 + self.decay * steps)
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        config = super().get_config()
        return {**config, "decay": self.decay} if self.decay else config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        # In what Keras 3 has written it is the norm of one variable's gradient.
        of_keras_3 = "global_clipnorm" in config
        norm = config.pop("clipnorm", None) if of_keras_3 else None
        optimizer = super().from_config(config, custom_objects)
        if norm is not None:
            optimizer.clipnorm = norm
        return optimizer


def _of_keras_2(name, defaults, *places):
    """Returns a class of the optimizer `name` with Keras 2's arguments."""
    cls = getattr(keras.optimizers, name)
    members = {
        "__doc__": f"`keras.optimizers.{name}` that takes Keras 2's `lr`.",
        "__module__": __name__,
        "_defaults": defaults,
        "_places": ("learning_rate", *places),
    }
    return register(type(name, (LearningRate, cls), members), f"keras.{name}")


def _rate(value, **others):
    return {"learning_rate": value, **others}


# With the defaults of Keras 2.3.1.
OPTIMIZERS = {
    name: _of_keras_2(name, defaults, *places)
    for name, defaults, *places in (
        ("SGD", _rate(0.01), "momentum", "nesterov"),
        ("RMSprop", _rate(0.001), "rho"),
        ("Adagrad", _rate(0.01, initial_accumulator_value=0.0)),
        ("Adadelta", _rate(1.0), "rho"),
        ("Adam", _rate(0.001), "beta_1", "beta_2", "amsgrad"),
        ("Adamax", _rate(0.002), "beta_1", "beta_2"),
        ("Nadam", _rate(0.002), "beta_1", "beta_2"),
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
