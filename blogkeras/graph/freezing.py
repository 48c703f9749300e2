"""Freezes layers, and makes them trainable again as they were."""

import contextlib


def freeze(layers):
    """Freezes layers and all their variables; `thaw` undoes it."""
    for part in _parts(layers):
        if part.trainable or not hasattr(part, "_trainable_before"):
            part._trainable_before = part.trainable
    for layer in layers:
        layer.trainable = False
        # Keras leaves those trainable that a layer created in `build` while it
        # was already frozen.
        for variable in layer.variables:
            variable.trainable = False


def freeze_inside(layer):
    """Freezes what is inside of a layer, if the layer itself is frozen.

    Keras hands `trainable=False`, given to a constructor, to no layer inside.
    Copies and files are made by the constructor.
    """
    if not layer.trainable:
        # On TensorFlow it does nothing to set an attribute to what it is.
        for part in _parts([layer]):
            part.trainable = False
        for variable in layer.variables:
            variable.trainable = False


def thaw(layers):
    """Makes layers as trainable as they were before `freeze`.

    Layers that the user has frozen, and variables that were created so (a table
    of fixed positions), stay frozen.
    """
    parts = _parts(layers)
    _set_trainable(parts, _before(parts))
    for part in parts:
        vars(part).pop("_trainable_before", None)


@contextlib.contextmanager
def thawed(layers):
    """`thaw` for a while."""
    parts = _parts(layers)
    flags = [part.trainable for part in parts]
    _set_trainable(parts, _before(parts))
    try:
        yield
    finally:
        _set_trainable(parts, flags)


def _before(parts):
    return [getattr(x, "_trainable_before", x.trainable) for x in parts]


def _set_trainable(parts, flags):
    for part, flag in zip(parts, flags, strict=True):
        part.trainable = flag


def _parts(layers):
    """The layers and all layers in them, the outer before the inner."""
    return [part for layer in layers for part in layer._flatten_layers()]
