"""The parts of a method's loss, in the logs of `fit`."""

import contextlib

import keras
from keras import ops

from blogkeras import backend


class LossParts(keras.metrics.Metric):
    """The means of the parts of a loss over an epoch, weighted by batch size.

    It is one of the model's metrics, so that Keras resets it and carries its
    state. Its result is empty where no step of training came before: the logs
    of `evaluate` do not show it.

    Args:
        names: The names of all parts that a step may have.
    """

    def __init__(self, names):
        super().__init__(name="loss_parts")
        self.names = tuple(names)
        self.shown = False
        # The key in the logs of each part that the step has.
        self.keys = {}
        size = len(self.names)
        self.total = self.add_variable((size,), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, parts, sample_weight=None):
        weight = ops.cast(sample_weight, "float32")
        values = [ops.cast(parts.get(n, 0.0), "float32") for n in self.names]
        self.total.assign_add(weight * ops.stack(values))
        self.count.assign_add(weight)

    def add_to(self, logs, parts):
        """The logs with the parts; a name that is taken gets a prefix."""
        self.keys = {name: _free(name, logs) for name in parts}
        return {**logs, **self._means()}

    def result(self):
        return self._means() if self.shown else {}

    def reset_state(self):
        self.shown = False
        super().reset_state()

    def _means(self):
        means = ops.divide_no_nan(self.total, self.count)
        return {
            self.keys[name]: means[index]
            for index, name in enumerate(self.names)
            if name in self.keys
        }


def _free(name, logs):
    while name in logs:
        name = f"training_{name}"
    return name


def find_parts(model):
    """The `LossParts` of a model, or `None`."""
    # A model may have a `metrics` property of its own, without them.
    return next((m for m in model.metrics if isinstance(m, LossParts)), None)


def replace_parts(model, names):
    """Gives a model a `LossParts` of these names, and takes it the old one."""
    model._metrics[:] = [
        m for m in model._metrics if not isinstance(m, LossParts)
    ]
    if names:
        with contextlib.ExitStack() as stack:
            if backend.BACKEND == "tensorflow":
                stack.enter_context(model.distribute_strategy.scope())
            model._metrics.append(LossParts(names))


def show_parts(model, train_function):
    """The compiled step, after which the parts are part of the metrics."""
    parts = find_parts(model)
    if parts is None:
        return train_function

    def showing(*args):
        parts.shown = False
        result = train_function(*args)
        parts.shown = True
        return result

    return showing


def drop_parts(model, logs):
    """Logs without the parts."""
    parts = find_parts(model)
    hidden = set() if parts is None else set(parts.keys.values())
    return {k: v for k, v in logs.items() if k not in hidden}
