"""The model class that bert4keras builds: Keras 3's, with Keras 2's habits."""

import contextvars

import keras
import numpy as np

from blogkeras.bert4keras.names import register

# The model whose loss is being computed, if any.
_at_work = contextvars.ContextVar("model at work", default=None)


def model_at_work():
    """Returns the bridged model whose loss is being computed."""
    return _at_work.get()


def _unwrapped(tensors):
    """Keras 2 says `x` where Keras 3 says `[x]`."""
    if isinstance(tensors, (list, tuple)) and len(tensors) == 1:
        return tensors[0]
    return tensors


def as_tuples(data):
    """Makes tuples of arrays: Keras 3 takes a list of numbers for a structure.

    Nones are left out, as the targets of models whose loss is a layer.
    """
    if not isinstance(data, (list, tuple)):
        return data
    if data and all(np.isscalar(x) for x in data):
        return np.array(data)
    return tuple(as_tuples(x) for x in data if x is not None)


def _weights_path(filepath):
    """Keras 3 insists on the ending `.weights.h5`."""
    path = str(filepath)
    return f"{path}.h5" if path.endswith(".weights") else filepath


def _model_path(filepath):
    """Keras 3 insists on the ending `.keras` or `.h5`."""
    path = str(filepath)
    known = path.endswith((".keras", ".h5", ".hdf5"))
    return filepath if known else f"{path}.keras"


class Model(keras.Model):
    """A functional model that takes what old scripts give to it.

    With one input, `model.input` is a tensor, and data may be given as `x` or
    as `[x]`; `predict` takes lists of numbers. A file may be called
    `best_model.weights` or `my.model`, and gets the ending that Keras 3 wants:
    `best_model.weights.h5`, `my.model.keras`.
    """

    @property
    def input(self):
        return _unwrapped(super().input)

    @property
    def total_loss(self):
        """What Keras 2's train function minimizes: there is no such tensor."""
        raise NotImplementedError(
            "Keras 3 has no train function of symbolic tensors to build upon. "
            "For adversarial training, take out the script's own function: "
            "from blogkeras import adversarial_training (or "
            "virtual_adversarial_training), then "
            "adversarial_training(model, 'Embedding-Token', 0.5). "
            f"Received: model={self.name!r}"
        )

    def _make_train_function(self):
        return self.total_loss

    def compute_loss(self, *args, **kwargs):
        # For a loss that looks for layers behind its argument.
        token = _at_work.set(self)
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            _at_work.reset(token)

    def predict(self, x, *args, **kwargs):
        if isinstance(x, (list, tuple)):
            x = [np.array(a) if isinstance(a, list) else a for a in x]
        return super().predict(x, *args, **kwargs)

    def save(self, filepath, *args, **kwargs):
        super().save(_model_path(filepath), *args, **kwargs)

    def save_weights(self, filepath, *args, **kwargs):
        super().save_weights(_weights_path(filepath), *args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        super().load_weights(_weights_path(filepath), *args, **kwargs)


register(Model)


def make_model(*args, **kwargs):
    """Makes a functional `Model`; any other one is as Keras makes it."""
    kwargs.update(zip(("inputs", "outputs"), args, strict=False))
    if kwargs.get("inputs") is None:
        return keras.Model(*args, **kwargs)
    inputs, outputs = kwargs.pop("inputs"), kwargs.pop("outputs")
    if isinstance(inputs, keras.KerasTensor):
        inputs = [inputs]
    return Model(inputs, _unwrapped(outputs), *args[2:], **kwargs)


def load_model(filepath, *args, **kwargs):
    """`keras.models.load_model` that finds what `Model.save` has written."""
    return keras.models.load_model(_model_path(filepath), *args, **kwargs)
