"""The parts of a functional model between cuts, as layers."""

import keras
from keras import tree

from blogkeras.graph.calls import (
    by_name,
    calls,
    calls_of,
    fitted,
    input_like,
)
from blogkeras.graph.freezing import freeze_inside


@keras.saving.register_keras_serializable(package="blogkeras")
class Segment(keras.layers.Layer):
    """The part of a functional model between two cuts, a layer.

    `cut_model` makes them. Called one after another they compute what the model
    computes; they share its layers and weights.

    Attributes:
        cut: The cut model.
        index: Its number in it.

    Input shape:  what crosses the cut before it, a tensor or a list of them;
        of the first segment what the model takes, a dict by name included.
    Output shape: what crosses the cut after it.

    Raises:
        ValueError: when it is called with another number of tensors.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), *[layers.Dense(4, name=n) for n in "ab"]]
    ... )
    >>> first, second = cut_model(model, ["a"])
    >>> [layer.name for layer in second.parts]
    ['b']

    Reference:
        [blog post](https://kexue.fm/archives/7575)
    """

    def __init__(self, cut, index, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.cut = cut
        self.index = index
        self.nodes = Untracked(cut.nodes[index])
        layers = [n.operation for n in cut.nodes[index]]
        self.parts = [
            x for x in dict.fromkeys(layers) if isinstance(x, keras.Layer)
        ]
        self.supports_masking = True
        self.built = True
        freeze_inside(self)

    def build(self, input_shape=None):
        pass

    def call(self, inputs, training=None):
        ours = tree.flatten(self.cut.crossing[self.index])
        if self.index == 0:
            # The model's own inputs, which Keras takes by name, too.
            inputs = by_name(self.cut.crossing[0], inputs)
        given = tree.flatten(inputs)
        if len(given) != len(ours):
            raise ValueError(
                f"Segment {self.name!r} takes {len(ours)} tensors: "
                f"{[x.name for x in ours]}. Received: {len(given)}"
            )
        if self.index == 0:
            given = map(fitted, given, ours)
        values = dict(zip(map(id, ours), given, strict=True))
        self.compute(values, training)
        return tree.map_structure(
            lambda x: values[id(x)], self.cut.crossing[self.index + 1]
        )

    def compute(self, values, training=None):
        """Adds the segment's tensors to `values`, from `id` to value."""
        for node in self.nodes.value:
            for x in node.input_tensors:
                needed(values, x, f"layer {node.operation.name!r}")
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
        return tree.map_structure(input_like, self.cut.crossing[self.index])

    def compute_mask(self, inputs, previous_mask=None):
        return None  # masks were set by the layers inside

    # The symbolic outputs are those of the whole model. Tracing `call` would
    # lose the masks of the inputs, which some layers need.
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
        segment = Cut.from_config(config["cut"]).segments[config["index"]]
        segment.name = config["name"]
        if not config["trainable"]:
            segment.trainable = False
        return segment


class Untracked:
    """Hides a value from Keras, which tracks layers in attributes."""

    def __init__(self, value):
        self.value = value


class Cut:
    """A model, where it is cut, and what crosses each cut."""

    def __init__(self, model, boundaries):
        self.model, self.boundaries = model, boundaries
        nodes = calls(model)
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
        # Leave out the masks that Keras fills in by itself. Revived as
        # arguments they would be tensors of their own, without a link to the
        # tensors that they mask.
        for layer in model["config"].get("layers", []):
            calls = calls_of(self.model, layer["name"])
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
    """Whether `tensor` depends on `on`, by a path past the nodes `before`."""
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


def _address(model, tensor):
    """Where a tensor is, as a serializable address."""
    for node in calls(model):
        if any(x is tensor for x in node.outputs):
            name = node.operation.name
            numbers = [n.number for n in calls_of(model, name)]
            outputs = [x is tensor for x in node.outputs]
            return [name, numbers.index(node.number), outputs.index(True)]
    raise ValueError(f"Not a tensor of the model. Received: {tensor}")


def _tensor(model, name, call, output):
    return calls_of(model, name)[call].outputs[output]


def needed(values, tensor, user):
    """A tensor's value, or a ValueError that names its user."""
    if id(tensor) not in values:
        raise ValueError(
            "A block that is left out makes what another one needs; keep it. "
            f"Received: {user} needs {tensor.name!r}"
        )
    return values[id(tensor)]
