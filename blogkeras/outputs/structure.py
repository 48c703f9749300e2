"""Values for each of several outputs: names, losses, arguments."""

import keras
from keras import tree


def known_outputs(model):
    """The symbolic outputs of a model whose graph is known, else `None`."""
    if isinstance(model, keras.Sequential):
        return model.outputs[0] if model.built and model.outputs else None
    return getattr(model, "_outputs_struct", None)


def output_names(model, outputs):
    """A name for each flat output: the model's own where it has them."""
    flat = tree.flatten(outputs)
    names = getattr(model, "output_names", None)
    if names is not None and len(names) == len(flat):
        return list(names)
    return [
        "/".join(map(str, path)) or "output"
        for path, _ in tree.flatten_with_path(outputs)
    ]


def spread(value, outputs, model=None, argument="value"):
    """A value for each flat output, from one value, a list or a dict.

    Args:
        value: One value for all outputs, or a list (one for each), or a dict by
            the outputs' names or keys; what is left out of a dict gets `None`.
        outputs: The structure of the outputs.
        model: The model, for the outputs' names.
        argument: String. The argument's name, for the message.

    Returns:
        A list in the order of `keras.tree.flatten(outputs)`.
    """
    return [
        values[0] if values else None
        for values in _spread(value, outputs, model, argument, several=False)
    ]


def output_losses(model, outputs, loss=None):
    """The losses of each flat output, a list of lists; by default compiled."""
    if loss is None:
        loss = getattr(model, "loss", None)
    # A `CompileLoss` object holds what the user gave.
    loss = getattr(loss, "_user_loss", loss)
    found = _spread(loss, outputs, model, "loss", several=True)
    return [[x for x in losses if x is not None] for losses in found]


def spread_labels(model, outputs, y):
    """The labels of each flat output, by name as the losses; else `None`."""
    flat = tree.flatten(outputs)
    if not tree.is_nested(y):
        return [y if len(flat) == 1 else None] * len(flat)
    try:
        return spread(y, outputs, model, "y")
    except ValueError:
        return [None] * len(flat)


def leaves(value):
    """The values in a list, tuple or dict; a single value as a list."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def _spread(value, outputs, model, argument, several):
    """As `spread`, but with a list of values for each output.

    Keras also takes a list of losses for one output, which it adds. `several`
    allows that.
    """
    flat = tree.flatten(outputs)
    numbers = tree.pack_sequence_as(outputs, list(range(len(flat))))
    result = [[] for _ in flat]
    names = getattr(model, "output_names", None)
    if (
        isinstance(value, dict)
        and not isinstance(outputs, dict)
        and names is not None
        and len(names) == len(flat)
    ):
        # Keras takes a dict by name for a list of outputs, too.
        numbers = dict(zip(names, range(len(flat)), strict=True))

    def fail():
        raise ValueError(
            f"Expected `{argument}` to be one value for all outputs, or a list "
            "or dict with one for each output. The outputs are "
            f"{output_names(model, outputs)}. Received: {argument}={value!r}"
        )

    def walk(value, numbers):
        inner = tree.flatten(numbers)
        if isinstance(value, dict):
            if not isinstance(numbers, dict) or not set(value) <= set(numbers):
                fail()
            for key, part in value.items():
                walk(part, numbers[key])
        elif isinstance(value, (list, tuple)):
            plain = not any(isinstance(x, (list, tuple, dict)) for x in value)
            if plain and len(value) == len(inner):
                for number, part in zip(inner, value, strict=True):
                    result[number].append(part)
            elif isinstance(numbers, (list, tuple)):
                if len(value) != len(numbers):
                    fail()
                for part, number in zip(value, numbers, strict=True):
                    walk(part, number)
            elif several and plain and len(inner) == 1:
                result[inner[0]].extend(value)
            else:
                fail()
        else:
            for number in inner:
                result[number].append(value)

    walk(value, numbers)
    return result
