"""Modules: layers, or lists of layers that are called one after another."""

import keras
from keras import ops, tree

from blogkeras.backend import get_keras_mask, set_keras_mask
from blogkeras.graph import as_list


def check_modules(
    predecessor_modules, successor_modules, stem=None, head=None, shared=False
):
    """Raises a ValueError that names the module where something is wrong.

    Args:
        stem, head: Layers before and after the modules, or `None`.
        shared: Boolean. Whether these are trained, too.
    """
    both = predecessor_modules, successor_modules
    old, new = (len(m) if isinstance(m, (list, tuple)) else m for m in both)
    if old != new or not isinstance(old, int) or not old:
        raise ValueError(
            "Expected a list of predecessor modules and one of as many "
            "successor modules, at least one; a list inside of the list is one "
            f"module. Received: {old} and {new}"
        )
    roles = [
        *((f"Module {i} of the predecessor", m) for i, m in enumerate(both[0])),
        ("The stem", [] if stem is None else stem),
        ("The head", [] if head is None else head),
        *((f"Module {i} of the successor", m) for i, m in enumerate(both[1])),
    ]
    places, frozen = {}, {}
    for role, module in roles:
        if not as_list(module) and role.startswith("Module"):
            raise ValueError(
                f"{role}: expected at least one layer. To leave a module of "
                "the predecessor without a successor, make it one with its "
                "neighbour. Received: []"
            )
        for layer in as_list(module):
            if not isinstance(layer, keras.Layer):
                raise ValueError(
                    f"{role}: expected a Keras layer, a model or a list of "
                    f"them. Received: {layer!r}"
                )
            if isinstance(layer, keras.layers.InputLayer):
                raise ValueError(
                    f"{role}: expected layers that compute; leave the input "
                    "layer out, or make modules by `cut_model`. Received: "
                    f"{layer.name!r}"
                )
            if places.setdefault(id(layer), role) != role:
                raise ValueError(
                    f"{role}: expected each module to stand in one place only; "
                    f"make a copy. Received: {layer.name!r}, also in: "
                    f"{places[id(layer)]}"
                )
            for variable in layer.variables:
                if not role.endswith("successor"):
                    if role.endswith("predecessor") or not shared:
                        frozen.setdefault(id(variable), role)
                elif id(variable) in frozen:
                    raise ValueError(
                        f"{role}: expected weights of its own, as those of the "
                        "others are frozen; make a copy. Received: "
                        f"{variable.path!r}, also in: {frozen[id(variable)]}"
                    )


def chain(layers, x, training):
    """Calls layers one after another."""
    # `training` is passed explicitly: Keras would pass a value that one layer
    # was called with on to the layers after it.
    for layer in layers:
        x = layer(x, training=training)
    return x


def output_shape(layer, shape):
    """The layer's output shape, by tracing where it has no method for it."""
    try:
        return layer.compute_output_shape(shape)
    except NotImplementedError:
        inputs = tree.map_shape_structure(keras.KerasTensor, shape)
        outputs = layer.compute_output_spec(inputs)
        return tree.map_structure(lambda x: tuple(x.shape), outputs)


def flat_shapes(shapes):
    """A shape or a structure of shapes as a list of shapes."""
    found = []
    tree.map_shape_structure(found.append, shapes)
    return found


def serialized(layers):
    """The configs of nested layers, nested likewise."""
    return tree.map_structure(keras.saving.serialize_keras_object, layers)


def deserialized(config):
    """The nested layers of what `serialized` gave."""
    if isinstance(config, (list, tuple)):
        return [*map(deserialized, config)]
    if isinstance(config, dict):
        return keras.saving.deserialize_keras_object(config)
    return config


def with_masks(inputs, masks):
    """The inputs with the masks that were passed as an argument.

    Masks are set on copies of the tensors, since the caller may use the tensors
    again without masks.
    """
    flat = tree.flatten(inputs)
    given = [None] if masks is None else tree.flatten(masks)
    for i, mask in enumerate(given):
        if mask is not None and get_keras_mask(flat[i]) is not mask:
            flat[i] = ops.copy(flat[i])
            set_keras_mask(flat[i], mask)
    return tree.pack_sequence_as(inputs, flat)
