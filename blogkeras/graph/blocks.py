"""The blocks of a transformer."""

import collections
import dataclasses
import itertools
import re

import keras
from keras import tree

from blogkeras.graph.calls import calls, nested_models, opened, whole_model

# How a transformer's blocks are called: one layer each (KerasHub and most
# models made by hand), many layers with the block's number (bert4keras), or
# many layers that all blocks share (bert4keras's ALBERT).
_NAME = re.compile(
    r"(^|_)(transformer|encoder|decoder|f_net|rwkv)_(layer|block)(_\d+)?$"
    r"|(^|_)group_\d+_inner_layer_\d+$"
    r"|(^|_)(transformer|xlnet|f_net)_(encoder|decoder)(_\d+)?$"
)
_CLASS = re.compile(
    r"(Transformer|Encoder|Decoder|FNet)(Block|Layer)$"
    r"|(Transformer|FNet|XLNet)(Encoder|Decoder)(Block|Layer)?$"
    r"|Transformer\w*(Block|Layer)$"
)
_NUMBERED = re.compile(r"(.*Transformer-\d+)-")
_SHARED = re.compile(r".*Transformer-\D")


@dataclasses.dataclass(eq=False)
class Block:
    """One block of a transformer: one application of one or more layers.

    Attributes:
        calls: List of `Call`s, in the order of the computation.
        input: The symbolic tensor that the block transforms.
        output: The symbolic tensor that it hands to the next block.
    """

    calls: list
    input: keras.KerasTensor
    output: keras.KerasTensor

    @property
    def layers(self):
        """The layers that it calls, each once, in the order of their calls."""
        return list(
            dict.fromkeys(
                call.operation
                for call in self.calls
                if isinstance(call.operation, keras.Layer)
            )
        )


def find_blocks(model):
    """The blocks of a transformer, in the order of the computation.

    A block is found by the list `transformer_layers` that the model has (as
    KerasHub's backbones do), by the name of its layer (`transformer_layer_3`,
    `decoder_block_3`, `encoder_layer_3`, `f_net_layer_3`,
    `Transformer-3-FeedForward` and the like) or by the layer's class
    (`TransformerBlock`, `TransformerEncoder`, `EncoderBlock` and the like).
    Models that the model calls as layers are opened where they contain the
    blocks.

    A block is an application of layers: a model that applies one layer twelve
    times, as ALBERT does, has twelve blocks with the same `layers` and
    different `calls`. To see whether a model shares its blocks, compare
    `layers`; to share or unshare them, replay the calls with other layers.

    Args:
        model: As for `cut_model`.

    Returns:
        `(model, blocks)`: the functional model in which the blocks lie, which
        is the one given unless it is `Sequential`, an object with a model or a
        model of models, and the list of `Block`s. Layers are not copied.

    Raises:
        ValueError: where there are none, or one stands at the model's input.

    Example:

    >>> model, blocks = find_blocks(keras_hub.models.BertBackbone(**sizes))
    >>> [block.layers[0].name for block in blocks]
    ['transformer_layer_0', 'transformer_layer_1']
    """
    model = whole_model(model)
    listed = _listed(model)
    while not (groups := _groups(model, listed)):
        nested = [x for x in nested_models(model) if _holds_blocks(x, listed)]
        if not nested:
            names = dict.fromkeys(call.operation.name for call in calls(model))
            raise ValueError(
                "Found no blocks of a transformer in the model: neither layers "
                "named or classed as KerasHub's or bert4keras's, nor "
                "`transformer_layers`. Give `boundaries`. "
                f"Received: model {model.name!r} with the layers {list(names)}"
            )
        model, _ = opened(model, nested)
    starts = _starts(groups)
    if any(starts[0] is x for x in model.inputs):
        raise ValueError(
            "Expected an embedding or something else before the first block: "
            "nothing is there to be cut off. Give the names of the blocks as "
            f"`boundaries`. Received: block {groups[0][0].operation.name!r} at "
            "the model's input"
        )
    # Of several outputs, take the one that the next block transforms.
    number, outputs = 0, []
    for group, start in zip(groups, [*starts[1:], None], strict=True):
        given = group[-1].outputs
        taken = [i for i, x in enumerate(given) if x is start]
        number = taken[0] if taken else min(number, len(given) - 1)
        outputs.append(given[number])
    return model, [
        Block(group, start, output)
        for group, start, output in zip(groups, starts, outputs, strict=True)
    ]


def block_boundaries(blocks):
    """The tensors before the first block and after each."""
    return [blocks[0].input, *(block.output for block in blocks)]


def _starts(groups):
    """The tensor that each block transforms.

    In a dict or list of tensors it is the one that the block before returned;
    in the first block it has the same place in the structure.
    """
    places = []
    for before, group in itertools.pairwise(groups):
        made = before[-1].outputs
        places.append(
            next(
                (
                    i
                    for i, x in enumerate(group[0].main_inputs)
                    if any(x is y for y in made)
                ),
                0,
            )
        )
    return [
        group[0].main_inputs[place]
        for place, group in zip(
            [*places[:1], *places] or [0], groups, strict=True
        )
    ]


def _listed(model):
    """The `id`s of the layers that a model, or one in it, lists as blocks."""
    found = set(map(id, tree.flatten(getattr(model, "transformer_layers", []))))
    for nested in nested_models(model):
        found |= _listed(nested)
    return found


def _holds_blocks(model, listed):
    model = whole_model(model)
    return bool(_groups(model, listed)) or any(
        _holds_blocks(x, listed) for x in nested_models(model)
    )


def _groups(model, listed):
    """The calls of each block."""
    every = calls(model)
    found = [[call] for call in every if id(call.operation) in listed]
    found = found or [
        [call]
        for call in every
        if isinstance(call.operation, keras.Layer)
        and (
            _NAME.search(call.operation.name)
            or _CLASS.search(type(call.operation).__name__)
        )
    ]
    if found:
        return found
    blocks, uses = {}, collections.Counter()
    for call in every:
        if match := _NUMBERED.match(call.operation.name):
            # A second application of a numbered block is another block.
            uses[call.operation] += 1
            key = match[1], uses[call.operation]
            blocks.setdefault(key, []).append(call)
    return list(blocks.values()) or _shared_groups(every)


def _shared_groups(every):
    """The calls of each block where all blocks call the same layers."""
    shared = [c for c in every if _SHARED.match(c.operation.name)]
    blocks = [[]]
    for call in shared:
        blocks[-1].append(call)
        if call.operation is shared[-1].operation:
            blocks.append([])
    return blocks[:-1]
