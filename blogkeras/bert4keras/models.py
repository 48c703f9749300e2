"""The model class that bert4keras builds: Keras 3's, with Keras 2's habits."""

import keras

from blogkeras.bert4keras.names import register


def _unwrapped(tensors):
    """Keras 2 says `x` where Keras 3 says `[x]`."""
    if isinstance(tensors, (list, tuple)) and len(tensors) == 1:
        return tensors[0]
    return tensors


def _weights_path(filepath):
    """Keras 3 insists on the ending `.weights.h5`."""
    path = str(filepath)
    return f"{path}.h5" if path.endswith(".weights") else filepath


class Model(keras.Model):
    """A functional model.

    With one input, `model.input` is a tensor, and data may be given as `x` or
    as `[x]`. Weights may be called `best_model.weights`, as in old scripts; the
    file is `best_model.weights.h5`.
    """

    @property
    def input(self):
        return _unwrapped(super().input)

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
