"""Cuts functional models into modules, with all that crosses a cut."""

import dataclasses
import numbers
import re
from typing import Any

import keras
from keras import tree

from blogkeras.backend import get_keras_mask
from blogkeras.theseus.freezing import thawed
from blogkeras.theseus.replacement import as_list

# How a transformer's blocks are called: one layer each (KerasHub), many layers
# with the block's number (bert4keras), or many layers that all blocks share
# (bert4keras's ALBERT).
_WHOLE = re.compile(
    r"(transformer|group_\d+_inner|attention_encoder)_layer_\d+$"
)
_NUMBERED = re.compile(r"(.*Transformer-\d+)-")
_SHARED = re.compile(r".*Transformer-\D")


def cut_model(model, boundaries=None):
    """Cuts a functional model at tensors into layers that follow each other.

    Called one after another, the segments compute what the model computes. What
    crosses a cut beside the tensor that it is named by (masks, attention
    biases, relative positions, further inputs of the model) is handed from
    segment to segment in a list, the named tensor first. The segments share the
    model's layers and weights, and a layer may be used in several of them.

    Args:
        model: A functional `keras.Model` or a `Sequential` one, built; or an
            object with such a one as its attribute `model`, as the transformers
            of bert4keras.
        boundaries: Where to cut, in the order of the computation: names of
            layers, layers, or symbolic tensors (`model.get_layer(...).output`).
            A layer that the model calls several times stands for all of its
            outputs. `None` finds the blocks of a transformer: before the first
            and after each.

    Returns:
        A list of `Segment`s, one more than there are cuts; none for an empty
        end.

    Example:

    >>> stem, *blocks, head = cut_model(model, ["pool", "add_1", "add_2"])
    """
    model = whole_model(model)
    if boundaries is None:
        boundaries = block_boundaries(model)
    else:
        boundaries = [
            tensor
            for boundary in as_list(boundaries)
            for tensor in _tensors(model, boundary)
        ]
    return _Cut(model, boundaries).segments


def keep_blocks(model, keep, boundaries=None):
    """A smaller model: copies of some of a model's blocks, all else as it is.

    The usual start of a successor, and the usual baseline (fine-tuning of the
    first k layers).

    Args:
        model: As for `cut_model`.
        keep: The blocks' numbers, counted from 0; or an integer k, the first k.
            `spaced_blocks(12, 3)` is `[0, 4, 8]`.
        boundaries: As for `cut_model`; block i lies between the boundaries i
            and i + 1. `None` finds the blocks of a transformer.

    Returns:
        A functional `keras.Model` with layers and weights of its own.
    """
    segments = cut_model(model, boundaries)
    cut = segments[0].cut
    blocks = len(cut.boundaries) - 1
    kept = list(range(keep) if isinstance(keep, numbers.Integral) else keep)
    if not kept or not all(0 <= i < blocks for i in kept):
        raise ValueError(
            f"Expected numbers of the model's {blocks} blocks in `keep`. "
            f"Received: keep={keep}"
        )
    inputs = segments[0].fresh_inputs()
    values = dict(
        zip(map(id, cut.model.inputs), tree.flatten(inputs), strict=True)
    )
    segments[0].compute(values)
    x = values[id(cut.boundaries[0])]
    for i in kept:
        # The block takes what the last one gave in place of its own neighbour.
        values[id(cut.boundaries[i])] = x
        segments[i + 1].compute(values)
        x = values[id(cut.boundaries[i + 1])]
    values[id(cut.boundaries[-1])] = x
    for segment in segments[blocks + 1 :]:
        segment.compute(values)
    outputs = tree.map_structure(
        lambda x: _value(values, x, "the end of the model"), cut.outputs
    )
    return copied(keras.Model(inputs, outputs))


def spaced_blocks(blocks, count):
    """`count` numbers out of `range(blocks)`, evenly spaced from 0 on."""
    if not 1 <= count <= blocks:
        raise ValueError(
            f"Expected `count` to be from 1 to {blocks}. "
            f"Received: count={count}"
        )
    return [i * blocks // count for i in range(count)]


def copied(model):
    """A model of the same layers, with weights of its own.

    What learns in it is what learned in the model before `freeze`.
    """
    with thawed([model]):
        copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def whole_model(model):
    """The functional model in what was given, or a ValueError."""
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
            f"Received: model={model}"
        )
    return model


def is_functional(model):
    """Whether the graph of a model's layers is known."""
    if isinstance(model, keras.Sequential):
        return model.built
    return hasattr(model, "_nodes_by_depth")


def block_boundaries(model):
    """The tensors before the first and after each block of a transformer."""
    nodes = _nodes(model)
    layers = tree.flatten(getattr(model, "transformer_layers", []))
    names = [node.operation.name for node in nodes]
    blocks = {}
    for node, name in zip(nodes, names, strict=True):
        if node.operation in layers or _WHOLE.search(name):
            blocks[node] = [node]
        elif match := _NUMBERED.match(name):
            blocks.setdefault(match[1], []).append(node)
    if not blocks:
        shared = [n for n in nodes if _SHARED.match(n.operation.name)]
        last = shared[-1].operation if shared else None
        ends = [n for n in shared if n.operation is last]
        blocks = {n: [shared[0], n] if n is ends[0] else [n] for n in ends}
    if not blocks:
        raise ValueError(
            "Found no blocks of a transformer in the model: neither layers "
            "named as KerasHub's or bert4keras's, nor `transformer_layers`. "
            "Give `boundaries`; a model that calls another one as a layer is "
            "cut if it is made of its `inputs` and `outputs` instead. "
            f"Received: model {model.name!r} with the layers "
            f"{list(dict.fromkeys(names))}"
        )
    blocks = list(blocks.values())
    start = blocks[0][0].input_tensors[0]
    if any(start is x for x in model.inputs):
        raise ValueError(
            "Expected an embedding or something else before the first block: "
            "nothing is there to be cut off. Give the names of the blocks as "
            f"`boundaries`. Received: block {blocks[0][0].operation.name!r} at "
            "the model's input"
        )
    return [
        start,
        *(block[-1].outputs[0] for block in blocks),
    ]


@keras.saving.register_keras_serializable(package="blogkeras")
class Segment(keras.layers.Layer):
    """The part of a functional model between two cuts; see `cut_model`.

    Attributes:
        cut: The cut model.
        index: Its number in it.
    """

    def __init__(self, cut, index, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.cut = cut
        self.index = index
        self.nodes = _Untracked(cut.nodes[index])
        layers = [n.operation for n in cut.nodes[index]]
        self.parts = [
            x for x in dict.fromkeys(layers) if isinstance(x, keras.Layer)
        ]
        self.supports_masking = True
        self.built = True

    def build(self, input_shape=None):
        pass

    def call(self, inputs, training=None):
        ours = tree.flatten(self.cut.crossing[self.index])
        given = tree.flatten(inputs)
        if len(given) != len(ours):
            raise ValueError(
                f"Segment {self.name!r} takes {len(ours)} tensors: "
                f"{[x.name for x in ours]}. Received: {len(given)}"
            )
        values = dict(zip(map(id, ours), given, strict=True))
        self.compute(values, training)
        return tree.map_structure(
            lambda x: values[id(x)], self.cut.crossing[self.index + 1]
        )

    def compute(self, values, training=None):
        """Adds the segment's tensors to `values`, from `id` to value."""
        for node in self.nodes.value:
            for x in node.input_tensors:
                _value(values, x, f"layer {node.operation.name!r}")
            args, kwargs = tree.map_structure(
                lambda x: (
                    values[id(x)] if isinstance(x, keras.KerasTensor) else x
                ),
                (node.args, node.kwargs),
            )
            if training is not None and isinstance(node.operation, keras.Layer):
                kwargs = {**kwargs, "training": training}
            outputs = node.operation(*args, **kwargs)
            for x, y in zip(node.outputs, tree.flatten(outputs), strict=True):
                values[id(x)] = y

    def fresh_inputs(self):
        """New `keras.Input`s like the tensors that the segment takes."""
        return tree.map_structure(
            lambda x: keras.Input(
                batch_shape=x.shape, dtype=x.dtype, name=x.name
            ),
            self.cut.crossing[self.index],
        )

    def compute_mask(self, inputs, previous_mask=None):
        return None  # the layers have set the masks that there are

    # Known from the whole model. Tracing would miss the masks of the inputs,
    # which some layers cannot do without.
    def compute_output_spec(self, *args, **kwargs):
        return tree.map_structure(
            lambda x: keras.KerasTensor(x.shape, x.dtype),
            self.cut.crossing[self.index + 1],
        )

    def compute_output_shape(self, input_shape):
        return tree.map_structure(
            lambda x: tuple(x.shape), self.cut.crossing[self.index + 1]
        )

    def get_config(self):
        return {
            **super().get_config(),
            "cut": self.cut.get_config(),
            "index": self.index,
        }

    @classmethod
    def from_config(cls, config):
        segment = _Cut.from_config(config["cut"]).segments[config["index"]]
        segment.name = config["name"]
        if not config["trainable"]:
            segment.trainable = False
        return segment


class _Untracked:
    """Hides layers from Keras, which else takes what it finds for its own."""

    def __init__(self, value):
        self.value = value


class _Cut:
    """A model, where it is cut, and what crosses each cut."""

    def __init__(self, model, boundaries):
        self.model, self.boundaries = model, boundaries
        nodes = _nodes(model)
        makers = {id(x): node for node in nodes for x in node.outputs}
        part = _parts(nodes, makers, boundaries)
        count = len(boundaries) + 1
        self.nodes = [
            [node for node in nodes if part[node] == i] for i in range(count)
        ]
        self.outputs = tree.pack_sequence_as(
            model._outputs_struct, model.outputs
        )
        order = [*model.inputs, *(x for node in nodes for x in node.outputs)]
        made = {
            id(x): part[makers[id(x)]] if id(x) in makers else -1 for x in order
        }
        used = {id(x): count for x in model.outputs}
        for node in nodes:
            for x in node.input_tensors:
                used[id(x)] = max(used.get(id(x), -1), part[node])
        self.crossing = [model._inputs_struct]
        for i, boundary in enumerate(boundaries):
            rest = [
                x
                for x in order
                if x is not boundary and made[id(x)] <= i < used.get(id(x), -1)
            ]
            self.crossing.append([boundary, *rest] if rest else boundary)
        self.crossing.append(self.outputs)
        if not self.nodes[-1]:
            # Nothing comes after the last cut.
            del self.nodes[-1], self.crossing[-2]
        self.segments = [
            Segment(self, i, name=f"segment_{i}")
            for i in range(len(self.nodes))
        ]

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        # Without the masks that Keras will fill in again: revived as arguments
        # they would be strangers to the tensors that they belong to.
        for layer in model["config"].get("layers", []):
            calls = _calls(self.model, layer["name"])
            nodes = layer["inbound_nodes"]
            for node, call in zip(nodes, calls, strict=False):
                for name in set(node["kwargs"]) - set(call.kwargs):
                    node["kwargs"][name] = None
        return {
            "model": model,
            "boundaries": [_address(self.model, x) for x in self.boundaries],
        }

    @classmethod
    def from_config(cls, config):
        model = keras.saving.deserialize_keras_object(config["model"])
        found = [_tensor(model, *a) for a in config["boundaries"]]
        return cls(model, found)


@dataclasses.dataclass(eq=False)
class _Call:
    """One call of a layer or operation in a functional model."""

    operation: Any
    args: Any
    kwargs: Any
    outputs: list
    number: int  # of the call among all of the operation's

    @property
    def input_tensors(self):
        return _symbolic((self.args, self.kwargs))


def _nodes(model):
    """The calls that a model's outputs need, in an order to compute them."""
    calls = []
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                calls.append(
                    _Call(
                        node.operation,
                        node.arguments.args,
                        _without_own_masks(node),
                        node.outputs,
                        node.operation._inbound_nodes.index(node),
                    )
                )
    needed, kept = {id(x) for x in model.outputs}, []
    for call in reversed(calls):
        if any(id(x) in needed for x in call.outputs):
            needed |= {id(x) for x in call.input_tensors}
            kept.append(call)
    return kept[::-1]


def _without_own_masks(node):
    """A call's keyword arguments, but the masks that Keras has filled in.

    A mask that tensors carry along, Keras fills in again at each call; some
    graphs have it as an argument, too.
    """
    args, kwargs = node.arguments.args, node.arguments.kwargs
    own = {
        id(get_keras_mask(x))
        for x in _symbolic((args, kwargs))
        if get_keras_mask(x) is not None
    }
    names = getattr(node.operation, "call_signature_parameters", ())

    def filled_in(name, value):
        if name != "mask" and name.removesuffix("_mask") not in names:
            return False
        masks = _symbolic(value)
        return bool(masks) and all(id(x) in own for x in masks)

    return {
        name: value
        for name, value in kwargs.items()
        if not (name.endswith("mask") and filled_in(name, value))
    }


def _symbolic(structure):
    return [
        x for x in tree.flatten(structure) if isinstance(x, keras.KerasTensor)
    ]


def _parts(nodes, makers, boundaries):
    """The number of the part that each node belongs to.

    It is the first whose end depends on it.
    """
    part = {}
    for i, boundary in enumerate(boundaries):
        waiting = [makers.get(id(boundary))]
        if waiting[0] is None or waiting[0] in part:
            raise ValueError(
                "Expected boundaries in the order of the computation, each "
                "made by a layer of the model after the one before. "
                f"Received: boundary {i}, {boundary.name!r}"
            )
        before = dict(part)
        while waiting:
            node = waiting.pop()
            if node not in part:
                part[node] = i
                inputs = (makers.get(id(x)) for x in node.input_tensors)
                waiting += [n for n in inputs if n is not None]
        if i and not _depends(makers, boundary, boundaries[i - 1], before):
            raise ValueError(
                f"Expected boundary {i} to depend on the one before it. "
                f"Received: {boundary.name!r} after {boundaries[i - 1].name!r}"
            )
    return {node: part.get(node, len(boundaries)) for node in nodes}


def _depends(makers, tensor, on, before):
    """Whether `tensor` needs `on` without looking into what lies before it."""
    waiting, seen = [tensor], set()
    while waiting:
        x = waiting.pop()
        if x is on:
            return True
        node = makers.get(id(x))
        if node is not None and node not in seen and node not in before:
            seen.add(node)
            waiting += node.input_tensors
    return False


def _tensors(model, boundary):
    """The tensors that a boundary stands for."""
    nodes = _nodes(model)
    if isinstance(boundary, keras.KerasTensor):
        found = [x for n in nodes for x in n.outputs if x is boundary]
    else:
        name = getattr(boundary, "name", boundary)
        found = [n.outputs[0] for n in nodes if n.operation.name == name]
    if not found:
        names = list(dict.fromkeys(n.operation.name for n in nodes))
        raise ValueError(
            f"Expected a layer of the model {model.name!r} or one of its "
            f"tensors as a boundary, one of {names}. Received: {boundary}"
        )
    return found


def _address(model, tensor):
    """Where a tensor is, in words that outlive saving."""
    for node in _nodes(model):
        if any(x is tensor for x in node.outputs):
            name = node.operation.name
            numbers = [n.number for n in _calls(model, name)]
            outputs = [x is tensor for x in node.outputs]
            return [name, numbers.index(node.number), outputs.index(True)]
    raise ValueError(f"Not a tensor of the model. Received: {tensor}")


def _tensor(model, name, call, output):
    return _calls(model, name)[call].outputs[output]


def _calls(model, name):
    """A layer's calls in the order in which they were made."""
    calls = [n for n in _nodes(model) if n.operation.name == name]
    return sorted(calls, key=lambda n: n.number)


def _value(values, tensor, user):
    if id(tensor) not in values:
        raise ValueError(
            "A block that is left out makes what another one needs; keep it. "
            f"Received: {user} needs {tensor.name!r}"
        )
    return values[id(tensor)]
