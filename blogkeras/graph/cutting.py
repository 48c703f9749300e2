"""Cuts models into segments, and makes models of some of their blocks."""

from typing import Any

import keras
import numpy as np
from keras import tree

from blogkeras.arguments import check_integer
from blogkeras.graph.blocks import block_boundaries, find_blocks
from blogkeras.graph.calls import (
    as_list,
    calls,
    copied,
    described,
    nested_models,
    opened,
    whole_model,
)
from blogkeras.graph.segments import Cut, needed


def cut_model(model: keras.layers.Layer, boundaries: Any = None) -> Any:
    """Cuts a functional model at tensors into layers that follow each other.

    Called one after another, the segments compute what the model computes.
    Other tensors that cross a cut (masks, attention biases, relative positions,
    further inputs of the model) are passed from segment to segment in a list,
    after the tensor that the cut is named by. The segments share the model's
    layers and weights, and a layer may be used in several of them.

    Models that the model calls as layers (a classifier's backbone, the parts of
    a `Sequential`) are opened where a cut goes through them.

    Args:
        model: A functional `keras.Model` or a `Sequential` one, built; or an
            object with such a one as its attribute `model`, as the transformers
            of bert4keras.
        boundaries: Where to cut, in the order of the computation: names of
            layers, layers, or symbolic tensors (`model.get_layer(...).output`),
            of the model or of models in it. A layer that the model calls
            several times stands for all of its calls, and one that returns
            several tensors for the first of them (of a dict, by its keys).
            `None` finds the blocks of a transformer (see
            `blogkeras.graph.find_blocks`): before the first and after each.

    Returns:
        A list of `Segment`s, one more than there are cuts; an empty last
        segment is left out.

    Raises:
        ValueError: for a model that is not functional, a boundary that is not
            in it, and boundaries out of the order of the computation; for
            `None`, where no blocks are found.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), *[layers.Dense(4, name=n) for n in "abcd"]]
    ... )
    >>> stem, *blocks, head = cut_model(model, ["a", "b", "c"])
    >>> len(blocks)
    2
    >>> x = np.ones((1, 4))
    >>> whole = model(x)
    >>> for segment in (stem, *blocks, head):
    ...     x = segment(x)
    >>> np.allclose(x, whole)
    True

    Reference:
        [blog post](https://kexue.fm/archives/7575)
    """
    return _cut(model, boundaries).segments


def rearranged(model, order, boundaries=None):
    """A model that applies some of a model's blocks in some order, not copied.

    Args:
        model: As for `cut_model`.
        order: List of the blocks' numbers, counted from 0, at least one. A
            number may stand in it several times: that block is then shared.
        boundaries: As for `cut_model`; block i lies between the boundaries i
            and i + 1. `None` finds the blocks of a transformer.

    Returns:
        A functional `keras.Model` of the model's own layers.

    Raises:
        ValueError: for numbers of blocks that do not exist, and where a block
            that is left out computes something that another one needs.
    """
    cut = _cut(model, boundaries)
    segments, blocks, order = cut.segments, len(cut.boundaries) - 1, list(order)
    order = [i.item() if isinstance(i, np.integer) else i for i in order]
    if not order or not all(type(i) is int and 0 <= i < blocks for i in order):
        raise ValueError(
            f"Expected numbers of the model's {max(blocks, 0)} blocks (one "
            "less than there are boundaries), at least one. "
            f"Received: {order}"
        )
    inputs = segments[0].fresh_inputs()
    values = dict(
        zip(map(id, cut.model.inputs), tree.flatten(inputs), strict=True)
    )
    segments[0].compute(values)
    x = values[id(cut.boundaries[0])]
    for i in order:
        # The block gets the output of the last applied block instead of that of
        # its own predecessor.
        values[id(cut.boundaries[i])] = x
        segments[i + 1].compute(values)
        x = values[id(cut.boundaries[i + 1])]
    values[id(cut.boundaries[-1])] = x
    for segment in segments[blocks + 1 :]:
        segment.compute(values)
    outputs = tree.map_structure(
        lambda x: needed(values, x, "the end of the model"), cut.outputs
    )
    return keras.Model(inputs, outputs)


def keep_blocks(
    model: keras.layers.Layer, keep: Any, boundaries: Any = None
) -> keras.Model:
    """A smaller model: copies of some of a model's blocks, all else as it is.

    The standard start of a successor, and the standard baseline (fine-tuning of
    the first k layers).

    Args:
        model: A functional `keras.Model` or a `Sequential` one, built; or an
            object with such a one as its attribute `model`.
        keep: The blocks' numbers, counted from 0; or an integer k, the first k.
            `spaced_blocks(12, 3)` is `[0, 4, 8]`.
        boundaries: Where the blocks begin and end: names of layers, layers or
            symbolic tensors; block i lies between the boundaries i and i + 1.
            `None` finds the blocks of a transformer.

    Returns:
        A functional `keras.Model` with layers and weights of its own.

    Raises:
        ValueError: for numbers of blocks that do not exist, where a block that
            is left out computes something that another one needs, and where
            `cut_model` raises it.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), *[layers.Dense(4, name=n) for n in "abcd"]]
    ... )
    >>> smaller = keep_blocks(model, [0, 2], boundaries=list("abcd"))
    >>> [layer.name for layer in smaller.layers[1:]]
    ['a', 'b', 'd']

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925), whose successor
        begins with the first three layers
    """
    if not isinstance(keep, (list, tuple, range, np.ndarray)):
        keep = range(check_integer("keep", keep, minimum=1))
    return copied(rearranged(model, keep, boundaries))


def spaced_blocks(blocks: int, count: int) -> list[int]:
    """`count` numbers out of `range(blocks)`, evenly spaced from 0 on.

    Args:
        blocks: Integer ≥ 1.
        count: Integer from 1 to `blocks`.

    Returns:
        List of `count` integers, the blocks for `keep_blocks`.

    Raises:
        ValueError: on integers out of range.

    Example:

    >>> spaced_blocks(12, 3)
    [0, 4, 8]

    Reference:
        [Sanh et al., 2019](https://arxiv.org/abs/1910.01108), who begin with
        every second layer
    """
    blocks = check_integer("blocks", blocks, minimum=1)
    count = check_integer("count", count, 1, blocks)
    return [i * blocks // count for i in range(count)]


def calls_of_blocks(model, boundaries=None):
    """The model in which the blocks lie, and a list of calls for each block.

    Args:
        model: As for `cut_model`.
        boundaries: As for `cut_model`; block i lies between the boundaries i
            and i + 1.

    Raises:
        ValueError: as `cut_model`, and for a single boundary.
    """
    model, blocks = _calls_and_starts(model, boundaries)
    return model, [every for every, _ in blocks]


def kinds_of_blocks(model, boundaries=None, ignored=None):
    """What each block makes of the tensor that it transforms, to compare.

    Args:
        model, boundaries: As for `calls_of_blocks`.
        ignored: As for `described`.

    Returns:
        List of what `described` returns, one for each block. A block computes
        other things, too, such as the mask that all blocks use, which the first
        one does: these are left out.
    """
    kinds = []
    for every, start in _calls_and_starts(model, boundaries)[1]:
        reached, through = {id(start)}, []
        for call in every:
            if any(id(x) in reached for x in call.input_tensors):
                through.append(call)
                reached |= {id(x) for x in call.outputs}
        kinds.append(described(through, [start], ignored))
    return kinds


def _calls_and_starts(model, boundaries):
    """`calls_of_blocks`, with the tensor that each block transforms."""
    if boundaries is None:
        model, blocks = find_blocks(model)
        return model, [(block.calls, block.input) for block in blocks]
    cut = _cut(model, boundaries)
    inside = cut.segments[1 : len(cut.boundaries)]
    if not inside:
        raise ValueError(
            "Expected at least two boundaries, before the first block and "
            f"after each. Received: boundaries={boundaries}"
        )
    return cut.model, [
        (segment.nodes.value, start)
        for segment, start in zip(inside, cut.boundaries, strict=False)
    ]


def _cut(model, boundaries):
    if boundaries is None:
        model, blocks = find_blocks(model)
        return Cut(model, block_boundaries(blocks))
    model, boundaries = whole_model(model), as_list(boundaries)
    moved = {}
    while True:
        every = calls(model)
        found = [_tensors(every, boundary, moved) for boundary in boundaries]
        if all(found):
            return Cut(model, [x for tensors in found for x in tensors])
        missing = [
            boundary
            for boundary, tensors in zip(boundaries, found, strict=True)
            if not tensors
        ]
        nested = [
            x
            for x in nested_models(model)
            if any(_contains(x, boundary) for boundary in missing)
        ]
        if not nested:
            names = list(dict.fromkeys(c.operation.name for c in every))
            raise ValueError(
                f"Expected a layer of the model {model.name!r} or one of its "
                f"tensors as a boundary, one of {names} or in a model among "
                f"these. Received: {missing[0]!r}"
            )
        model, now = opened(model, nested)
        moved = {
            old: [y for x in new for y in now.get(id(x), [x])]
            for old, new in moved.items()
        } | now


def _tensors(every, boundary, moved):
    """The output tensors of some calls that a boundary stands for."""
    if isinstance(boundary, keras.KerasTensor):
        wanted = [id(x) for x in moved.get(id(boundary), [boundary])]
        return [x for c in every for x in c.outputs if id(x) in wanted]
    name = getattr(boundary, "name", boundary)
    return [c.outputs[0] for c in every if c.operation.name == name]


def _contains(model, boundary):
    """Whether a boundary lies in a model or in one that it calls."""
    model = whole_model(model)
    return bool(_tensors(calls(model), boundary, {})) or any(
        _contains(x, boundary) for x in nested_models(model)
    )
