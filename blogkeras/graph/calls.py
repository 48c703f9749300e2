"""The calls of layers that a functional model consists of."""

import dataclasses
import inspect
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from blogkeras.backend import get_keras_mask, set_keras_mask
from blogkeras.graph.freezing import thawed


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a layer or operation in a functional model.

    A layer that the model calls several times has as many calls.

    Attributes:
        operation: The layer or operation.
        args, kwargs: What it is called with, symbolic tensors among it. Masks
            of tensors are left out: Keras fills them in again.
        outputs: List of the symbolic tensors that it returns, flat.
        number: Integer, the index of the call among all calls of the operation.
    """

    operation: Any
    args: Any
    kwargs: Any
    outputs: list
    number: int

    @property
    def input_tensors(self):
        """All symbolic tensors among the arguments, flat."""
        return symbolic((self.args, self.kwargs))

    @property
    def main_inputs(self):
        """The tensors in the argument that the call transforms.

        That is the first positional argument; where the call has keyword
        arguments alone, the first parameter of the layer's `call`. The other
        arguments are at its side.
        """
        first = symbolic(self.args[:1]) or symbolic(self.args)
        if first:
            return first
        parameters = inspect.signature(self.operation.call).parameters
        for name in (*parameters, *self.kwargs):
            tensors = symbolic(self.kwargs.get(name))
            if tensors:
                return tensors
        return []

    @property
    def main_input(self):
        """The first of `main_inputs`, or `None`."""
        return next(iter(self.main_inputs), None)


def whole_model(model):
    """The functional model in what was given, or a ValueError.

    Args:
        model: A functional `keras.Model`, a `Sequential` one that is built, or
            an object that holds such a one as its attribute `model`, as the
            transformers of bert4keras.
    """
    if not isinstance(model, keras.Model):
        model = getattr(model, "model", model)
    if isinstance(model, keras.Sequential) and model.built:
        ends = model.inputs, model.outputs
        model = keras.Model(
            *(x[0] if len(x) == 1 else x for x in ends), name=model.name
        )
    if not is_functional(model):
        raise ValueError(
            "Expected a functional model: only its graph can be cut. Give the "
            "layers of any other model as lists to `Theseus`. "
            f"Received: model={model!r}"
        )
    return model


def is_functional(model):
    """Whether the graph of a model's layers is known."""
    if isinstance(model, keras.Sequential):
        return model.built
    return isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth")


def calls(model):
    """The calls that a functional model's outputs need, in an order to compute.

    Args:
        model: A functional model.

    Returns:
        List of `Call`s.
    """
    found = []
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                found.append(
                    Call(
                        node.operation,
                        node.arguments.args,
                        _without_own_masks(node),
                        node.outputs,
                        node.operation._inbound_nodes.index(node),
                    )
                )
    needed, kept = {id(x) for x in model.outputs}, []
    for call in reversed(found):
        if any(id(x) in needed for x in call.outputs):
            needed |= {id(x) for x in call.input_tensors}
            kept.append(call)
    return kept[::-1]


def calls_of(model, name):
    """A layer's calls in the order in which they were made."""
    found = [n for n in calls(model) if n.operation.name == name]
    return sorted(found, key=lambda n: n.number)


def described(calls, inputs=(), ignored=None):
    """What calls compute, without the names and values of their weights.

    Two lists of calls with equal descriptions compute the same once their
    weights are equal.

    Args:
        calls: List of `Call`s.
        inputs: Symbolic tensors from outside that are to be told apart.
        ignored: Function of a name in a layer's configuration: whether it makes
            no difference. By default only names make none.

    Returns:
        List of tuples, to compare.
    """
    ignored = ignored or _is_name
    numbers, first = {id(x): i for i, x in enumerate(inputs)}, {}
    found = []
    for number, call in enumerate(calls):
        operation = call.operation
        # A layer that is called again is another thing than a second layer.
        known = first.setdefault(operation, number)
        arguments = tree.map_structure(
            lambda x: (
                numbers.get(id(x), "outside")
                if isinstance(x, keras.KerasTensor)
                else _constant(x)
            ),
            (call.args, call.kwargs),
        )
        found.append(
            (known, repr(arguments), described_layer(operation, ignored))
        )
        for x in call.outputs:
            numbers[id(x)] = len(numbers)
    return found


def described_layer(operation, ignored=None):
    """What a layer, a model or an operation computes: see `described`."""
    ignored = ignored or _is_name
    if isinstance(operation, keras.Layer):
        weights = [tuple(w.shape) for w in operation.weights]
    else:
        weights = None
    if isinstance(operation, keras.Model) and is_functional(operation):
        model = whole_model(operation)
        parts = described(calls(model), model.inputs, ignored)
        return type(operation), weights, parts
    try:
        config = repr(_without(operation.get_config(), ignored))
    except (NotImplementedError, TypeError, ValueError):
        config = None  # it cannot be saved; its class and parts are known
    parts = []
    if isinstance(operation, keras.Layer):
        # Some layers leave out of their configuration what they consist of.
        parts = [
            described_layer(part, ignored)
            for part in operation._flatten_layers(
                include_self=False, recursive=False
            )
        ]
    return type(operation), weights, config, parts


def _is_name(key):
    return key == "name"


# A model in the configuration of a layer: which names are connected.
_LINKS = ("inbound_nodes", "input_layers", "output_layers")


def _without(config, ignored):
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return config  # its name says what it is
        return {
            key: _without(value, ignored)
            for key, value in config.items()
            if not ignored(key) and key not in _LINKS
        }
    if isinstance(config, (list, tuple)):
        return [_without(x, ignored) for x in config]
    return _constant(config)


def _constant(x):
    """What tells a constant from others: of arrays not all is printed."""
    if hasattr(x, "__array__") and not isinstance(x, keras.Variable):
        x = np.asarray(x)
        return x.shape, str(x.dtype), x.tobytes()
    return x


def lasting_name(model, layer):
    """A layer's name, if a loaded model will have it, too, else `None`.

    Those of a functional model's own layers stay. Keras gives layers inside of
    other layers new names when it loads them.
    """
    own = model.layers if is_functional(model) else []
    named = [x for x in own if x.name == layer.name]
    return layer.name if named == [layer] else None


def as_list(layers):
    """A list of one thing, or of a list or tuple of several."""
    several = isinstance(layers, (list, tuple, np.ndarray))
    return list(layers) if several else [layers]


def symbolic(structure):
    """The symbolic tensors in a structure, flat."""
    return [
        x for x in tree.flatten(structure) if isinstance(x, keras.KerasTensor)
    ]


def nested_models(model):
    """The models in a functional model that can be opened.

    It calls them as layers, their graphs are known, and their `call` does
    nothing but run the graph.
    """
    found = dict.fromkeys(call.operation for call in calls(whole_model(model)))
    return [x for x in found if is_functional(x) and _runs_its_graph(x)]


def opened(model, nested):
    """A model that calls the layers of nested models where it called these.

    It computes the same with the same layers, and it has the model's inputs.
    The names of all its layers must differ; Keras says so where they do not.

    Args:
        model: A functional model.
        nested: List of some of its `nested_models`.

    Returns:
        `(model, moved)`: the new model, and a dict from the `id` of a tensor
        of the old model, or of a nested one, to the tensors that take its
        place. Tensors that are not in it are what they were.
    """
    nested, moved = set(map(id, nested)), {}
    values = {id(x): x for x in model.inputs}
    _replay(model, values, nested, moved)
    outputs = tree.pack_sequence_as(
        model._outputs_struct, [values[id(x)] for x in model.outputs]
    )
    return keras.Model(model._inputs_struct, outputs, name=model.name), moved


def copied(model):
    """A copy of a model, with weights of its own.

    Its layers are as trainable as the model's were before `freeze`. Layers of
    `Lambda` are the same in both: they have no weights, and a function that is
    made anew from its code would not find what it refers to.
    """
    clone = copied_layer if is_functional(model) else None
    with thawed([model]):
        copy = _cloned(model, clone)
    copy.set_weights(model.get_weights())
    return copy


def copied_layer(layer, name=None):
    """A layer of the same configuration; of `Lambda` the layer itself."""
    if isinstance(layer, keras.layers.Lambda):
        return layer
    name = layer.name if name is None else name
    if is_functional(layer) and _runs_its_graph(layer):
        parts = layer._flatten_layers()
        if any(isinstance(part, keras.layers.Lambda) for part in parts):
            copy = _cloned(layer, copied_layer)
            copy.name = name
            return copy
    return type(layer).from_config({**layer.get_config(), "name": name})


def _cloned(model, clone_function):
    inputs = None
    if clone_function and any(map(_is_optional, model.inputs)):
        # Those that Keras would make are not optional.
        inputs = tree.map_structure(input_like, model._inputs_struct)
    return keras.models.clone_model(
        model, input_tensors=inputs, clone_function=clone_function
    )


def _is_optional(x):
    return getattr(x._keras_history.operation, "optional", False)


def input_like(x):
    """A new `keras.Input` like a tensor, optional where it is an input so."""
    return keras.Input(
        batch_shape=x.shape,
        dtype=x.dtype,
        sparse=x.sparse,
        name=x.name,
        optional=_is_optional(x),
    )


def _runs_its_graph(model):
    """Whether `call` is Keras's own."""
    definer = next(c for c in type(model).__mro__ if "call" in vars(c))
    return definer.__module__.startswith("keras.")


def _replay(model, values, nested, moved, training=None):
    """Adds the model's tensors to `values`, calling the layers of nested ones.

    A call whose inputs are what they were is not made again. `training` is what
    the model itself was told when it was called as a layer.
    """
    for call in calls(model):
        op = call.operation
        same = all(values[id(x)] is x for x in call.input_tensors)
        if same and id(op) not in nested and training is None:
            values.update((id(x), x) for x in call.outputs)
            continue
        args, kwargs = tree.map_structure(
            lambda x: values[id(x)] if isinstance(x, keras.KerasTensor) else x,
            (call.args, call.kwargs),
        )
        if training is not None and isinstance(op, keras.Layer):
            kwargs["training"] = training
        if id(op) in nested:
            inner = whole_model(op)
            given = _inputs(inner, args, kwargs)
            inside = dict(zip(map(id, inner.inputs), given, strict=True))
            _replay(inner, inside, set(), moved, kwargs.get("training"))
            for x in inner.inputs:
                moved.setdefault(id(x), []).append(inside[id(x)])
            results = [inside[id(x)] for x in inner.outputs]
        else:
            results = tree.flatten(op(*args, **kwargs))
        for x, y in zip(call.outputs, results, strict=True):
            values[id(x)] = y
            if x is not y:
                moved.setdefault(id(x), []).append(y)


def by_name(struct, given):
    """Of a dict of inputs those that a model takes, in the structure it has.

    Args:
        struct: The model's symbolic inputs.
        given: What the model is called with. It is returned as it is, unless it
            is a dict.

    Raises:
        ValueError: where an entry is missing, or where no dict is given and the
            order of the model's own dict is not the one in which Keras would
            read others, that of its sorted keys.
    """
    if isinstance(struct, dict):
        names = {name: name for name in struct}
    else:
        names = tree.map_structure(lambda x: x.name, struct)
    wanted = tree.flatten(names)
    if isinstance(given, dict):
        fits = set(wanted) <= set(given)
    else:
        fits = not isinstance(struct, dict) or list(struct) == sorted(struct)
    if not fits:
        received = sorted(given) if isinstance(given, dict) else type(given)
        raise ValueError(
            f"Expected a dict of inputs named {wanted}. Received: {received}"
        )
    if not isinstance(given, dict):
        return given
    return tree.map_structure(lambda name: given[name], names)


def fitted(x, wanted):
    """An input as Keras hands it to the layers of a functional model.

    It gets the rank of the symbolic one, by an axis of size 1 at the end, and
    its dtype, unless both are floating: each layer casts its own floats. The
    mask is kept.
    """
    if x is None:  # an optional input
        return x
    y, mask = x, get_keras_mask(x)
    dtypes = [keras.backend.standardize_dtype(a.dtype) for a in (x, wanted)]
    if len(set(dtypes)) > 1 and not all(
        map(keras.backend.is_float_dtype, dtypes)
    ):
        y = ops.cast(y, wanted.dtype)
    more = len(y.shape) - len(wanted.shape)
    if more == 1 and y.shape[-1] == 1:
        y = ops.squeeze(y, axis=-1)
    elif more == -1 and wanted.shape[-1] == 1:
        y = ops.expand_dims(y, axis=-1)
    if y is not x and mask is not None:
        set_keras_mask(y, mask)
    return y


def _inputs(model, args, kwargs):
    """What a nested model is called with, in the order of its inputs."""
    given = args[0] if args else kwargs.get("inputs")
    given = by_name(model._inputs_struct, given)
    flat = tree.flatten(given)
    fits = len(flat) == len(model.inputs) and all(
        isinstance(x, keras.KerasTensor) and len(x.shape) == len(y.shape)
        for x, y in zip(flat, model.inputs, strict=False)
    )
    if not fits or len(args) > 1 or symbolic(kwargs.get("mask")):
        raise ValueError(
            f"Expected the model {model.name!r}, called as a layer, to "
            "be called with tensors of the shapes of its inputs "
            f"{[tuple(x.shape) for x in model.inputs]} alone, without a mask "
            f"as an argument. Received: args={args}, kwargs={kwargs}"
        )
    return flat


def _without_own_masks(node):
    """A call's keyword arguments, but the masks that Keras has filled in.

    A mask that tensors carry along, Keras fills in again at each call; some
    graphs have it as an argument, too.
    """
    args, kwargs = node.arguments.args, node.arguments.kwargs
    own = {
        id(get_keras_mask(x))
        for x in symbolic((args, kwargs))
        if get_keras_mask(x) is not None
    }
    names = getattr(node.operation, "call_signature_parameters", ())

    def filled_in(name, value):
        if name != "mask" and name.removesuffix("_mask") not in names:
            return False
        masks = symbolic(value)
        return bool(masks) and all(id(x) in own for x in masks)

    return {
        name: value
        for name, value in kwargs.items()
        if not (name.endswith("mask") and filled_in(name, value))
    }
