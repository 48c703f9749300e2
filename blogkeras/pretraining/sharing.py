"""ALBERT ↔ BERT: layers shared and un-shared; a factorized embedding."""

import re
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from blogkeras.arguments import check_integer
from blogkeras.graph import (
    calls,
    calls_of_blocks,
    copied,
    copied_layer,
    input_like,
    kinds_of_blocks,
    rearranged,
    whole_model,
)
from blogkeras.pretraining.backbones import (
    checked_embedding,
    find_embedding,
)

SOURCES = ("first", "mean")
# Options of layers that change nothing in what a trained block computes.
_TRAINING_ONLY = re.compile(
    r"name|trainable|seed|rate|.*(dropout|initializer|regularizer|constraint).*"
)


def share_layers(
    model: keras.layers.Layer,
    source: Any = "first",
    groups: int = 1,
    inner: int = 1,
    boundaries: Any = None,
) -> keras.Model:
    """BERT → ALBERT: blocks of a transformer share their weights.

        y = f(f(… f(x)))

    The L blocks are divided into `groups` of consecutive ones; within a group
    `inner` different blocks take turns. So groups · inner different blocks
    remain. `share_layers(unshare_layers(albert))` computes the same as
    `albert`. In general the new model computes the same as the old one only if
    the blocks that become one were equal. The number of operations does not
    change: only the file gets smaller.

    Args:
        model: A functional model; for others see `cut_model`.
        source: Where the weights of a shared block come from: `"first"`, the
            first of those that become one; `"mean"`, their mean; or a list with
            one list of arrays for each different block, in the order of its
            layers and, in a layer, of `get_weights`.
        groups: Integer. How many groups.
        inner: Integer. How many different blocks a group has. L must be
            divisible by groups · inner.
        boundaries: The tensors or layers before the first block and after each,
            as for `cut_model`. `None` finds the blocks.

    Returns:
        A functional `keras.Model` with weights of its own.

    Raises:
        ValueError: if the blocks differ in layers, sizes or options (dropout
            and other things of training alone may differ), their number is not
            divisible by groups · inner, or `source` is not of their shapes.

    Example:

    >>> def transformer(blocks):
    ...     inputs = keras.Input((8,), dtype="int32")
    ...     x = layers.Embedding(20, 8, name="embedding")(inputs)
    ...     for i in range(blocks):
    ...         x = layers.Dense(8, name=f"transformer_layer_{i}")(x)
    ...     return keras.Model(inputs, x)
    >>> bert = transformer(3)
    >>> albert = share_layers(bert, source="mean")
    >>> bert.count_params(), albert.count_params()
    (376, 232)
    >>> bert = unshare_layers(albert)  # three equal layers to fine-tune

    Reference:
        [Lan et al., 2019](https://arxiv.org/abs/1909.11942);
        [blog post 7846](https://kexue.fm/archives/7846)
    """
    is_known = isinstance(source, (list, tuple)) or (
        isinstance(source, str) and source in SOURCES
    )
    if not is_known:
        raise ValueError(
            "Expected `source` to be 'first', 'mean' or a list of lists of "
            f"arrays. Received: source={source!r}"
        )
    _, blocks = calls_of_blocks(model, boundaries)
    count = len(blocks)
    groups = check_integer("groups", groups, minimum=1)
    inner = check_integer("inner", inner, minimum=1)
    if count % (groups * inner):
        raise ValueError(
            "Expected a number of blocks that groups · inner divides. "
            f"Received: {count} blocks, groups={groups}, inner={inner}"
        )
    size = count // groups
    order = [i // size * size + i % size % inner for i in range(count)]
    kinds = kinds_of_blocks(model, boundaries, _TRAINING_ONLY.fullmatch)
    _check_alike(blocks, kinds, order)
    shared = copied(rearranged(model, order, boundaries))
    shared.name = whole_model(model).name
    if isinstance(source, str) and source == "first":
        return shared
    kept = sorted(set(order))
    if not isinstance(source, str) and len(source) != len(kept):
        raise ValueError(
            "Expected one list of arrays in `source` for each different block, "
            f"{len(kept)} of them. Received: {len(source)}"
        )
    for number, first in enumerate(kept):
        if isinstance(source, str):
            values = [
                _weights(blocks[i]) for i in range(count) if order[i] == first
            ]
            values = [np.mean(v, axis=0) for v in zip(*values, strict=True)]
        else:
            values = _arrays(source[number])
        layers = [shared.get_layer(x.name) for x in _layers(blocks[first])]
        _set_weights(layers, values)
    return shared


def unshare_layers(
    model: keras.layers.Layer, boundaries: Any = None
) -> keras.Model:
    """ALBERT → BERT: each block of a transformer gets weights of its own.

    The new model computes exactly the same as the old one. In fine-tuning its
    layers may then become different: this is the "one line" of post 7187.

    Args:
        model: A functional model that applies layers several times, such as
            ALBERT of bert4keras or KerasHub.
        boundaries: As for `share_layers`.

    Returns:
        A functional `keras.Model` with weights of its own.

    Raises:
        ValueError: if the model has no blocks that can be found; give
            `boundaries` then.

    Example:

    >>> tokens = keras.Input((8,), dtype="int32")
    >>> x = layers.Embedding(20, 8)(tokens)
    >>> block = layers.Dense(8, name="transformer_layer")
    >>> albert = keras.Model(tokens, block(block(x)))
    >>> bert = unshare_layers(albert)
    >>> albert.count_params(), bert.count_params()
    (232, 304)

    Reference:
        [blog post 7187](https://kexue.fm/archives/7187)
    """
    inner_model, blocks = calls_of_blocks(model, boundaries)
    uses, block_of = {}, {}
    for i, block in enumerate(blocks):
        for call in block:
            block_of[id(call.outputs[0])] = i
            uses.setdefault(call.operation, set()).add(i)
    names = {
        call.operation.name
        for call in calls(inner_model)
        if len(uses.get(call.operation, ())) < 2
    }
    clones = {}

    def clone(call):
        layer = call.operation
        i = block_of.get(id(call.outputs[0]))
        if (
            i is None
            or not isinstance(layer, keras.Layer)
            or len(uses[layer]) == 1
        ):
            return layer
        if (layer, i) not in clones:
            name = _numbered(layer.name, i, names)
            names.add(name)
            clones[layer, i] = copied_layer(layer, name)
        return clones[layer, i]

    new = copied(_replayed(inner_model, clone))
    for (layer, _), twin in clones.items():
        if twin is not layer:
            new.get_layer(twin.name).set_weights(layer.get_weights())
    new.name = inner_model.name
    return new


def factorize_embedding(
    model: keras.layers.Layer, size: int, embedding: Any = None
) -> tuple[keras.Model, float]:
    """ALBERT's embedding: a narrow table and a projection.

        E ≈ U · P,   (V, H) ≈ (V, size) · (size, H)

    by the truncated singular value decomposition, which has the least sum of
    squared errors of all such products. The rows of P are orthonormal.

    Args:
        model: A functional model that looks tokens up in a
            `keras.layers.Embedding`, and uses its table for nothing else.
        size: Integer from 1 to H.
        embedding: Name of that layer, the layer, or its number among the
            model's embeddings; `None` finds it.

    Returns:
        `(model, error)`: a functional `keras.Model` with weights of its own,
        and ‖E - U P‖ / ‖E‖ in Frobenius norms.

    Raises:
        ValueError: if `size` is not within the embedding's, or the model uses
            its embedding for anything but looking tokens up once.

    Example:

    >>> tokens = keras.Input((8,), dtype="int32")
    >>> bert = keras.Model(tokens, layers.Embedding(100, 16)(tokens))
    >>> small, error = factorize_embedding(bert, 4)
    >>> bert.count_params(), small.count_params()
    (1600, 464)

    Reference:
        [Lan et al., 2019](https://arxiv.org/abs/1909.11942)
    """
    model = whole_model(model)
    layer = find_embedding("model", model, checked_embedding(embedding))
    if layer.quantization_mode is not None:
        raise ValueError(
            "Expected an embedding of floats; factorize first, then quantize. "
            f"Received: {layer.name!r}, quantized to "
            f"{layer.quantization_mode!r}"
        )
    table = ops.convert_to_numpy(layer.embeddings).astype("float64")
    size = check_integer("size", size, 1, min(table.shape))
    uses = [call for call in calls(model) if call.operation is layer]
    if len(uses) != 1 or len(uses[0].outputs[0].shape) != (
        len(uses[0].main_input.shape) + 1
    ):
        raise ValueError(
            "Expected a model that calls its embedding once, to look tokens "
            f"up. Received: {len(uses)} calls of {layer.name!r}, which may be "
            "inside another layer or tied to the output"
        )
    u, s, p = np.linalg.svd(table, full_matrices=False)
    values = [u[:, :size] * s[:size], p[:size]]
    config = {**layer.get_config(), "output_dim": size}
    # The table has LoRA's product in it already.
    for name in ("lora_rank", "lora_alpha"):
        config.pop(name, None)
    narrow = type(layer).from_config(config)
    name = f"{layer.name}_projection"
    while name in {x.name for x in model.layers}:
        name += "_"
    projection = keras.layers.Dense(
        table.shape[1],
        use_bias=False,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
        name=name,
    )

    def replace(call):
        if call.operation is not layer:
            return call.operation
        return lambda *args, **kwargs: projection(narrow(*args, **kwargs))

    new = copied(_replayed(model, replace))
    for part, value in zip((narrow, projection), values, strict=True):
        new.get_layer(part.name).set_weights([value.astype("float32")])
    new.name = model.name
    scale = np.sqrt(np.square(s).sum())
    error = np.sqrt(np.square(s[size:]).sum()) / scale if scale else 0.0
    return new, float(error)


def _layers(block):
    found = dict.fromkeys(call.operation for call in block)
    return [x for x in found if isinstance(x, keras.Layer)]


def _weights(block):
    return [w for layer in _layers(block) for w in layer.get_weights()]


def _arrays(values):
    try:
        return [np.asarray(value, "float32") for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            "Expected one list of arrays in `source` for each different block. "
            f"Received: {values!r} for a block"
        ) from None


def _set_weights(layers, values):
    shapes = [tuple(w.shape) for layer in layers for w in layer.weights]
    given = [np.shape(value) for value in values]
    if shapes != given:
        raise ValueError(
            f"Expected arrays of the shapes {shapes} for a block. "
            f"Received: {given}"
        )
    for layer in layers:
        count = len(layer.weights)
        layer.set_weights(values[:count])
        values = values[count:]


def _check_alike(blocks, kinds, order):
    """Blocks that become one must compute the same, but for their weights."""

    def sizes(block):
        return [
            (type(x).__name__, [tuple(w.shape) for w in x.weights])
            for x in _layers(block)
        ]

    for i, first in enumerate(order):
        same_sizes = sizes(blocks[i]) == sizes(blocks[first])
        if not same_sizes or kinds[i] != kinds[first]:
            received = f"block {first} {sizes(blocks[first])}, block {i} "
            received += (
                "of the same sizes, with other options or links"
                if same_sizes
                else f"{sizes(blocks[i])}"
            )
            raise ValueError(
                "Expected blocks of the same layers, options and sizes, to "
                "share them; blocks of several kinds in turn can be shared "
                f"with `inner`. Received: {received}"
            )


def _numbered(name, number, taken):
    """A layer's name in one block, of a form by which blocks are found."""
    if match := re.match(r"(.*Transformer)-(?:\d+-)?(.*)$", name):
        new = f"{match[1]}-{number}-{match[2]}"
    else:
        new = re.sub(r"_\d+$", "", name) + f"_{number}"
    while new in taken:
        new = f"{name}_unshared_{number}" if new != name else f"{new}_"
        name = new
    return new


def _replayed(model, layer_of):
    """A model that calls `layer_of(call)` where the old one made the call."""
    inputs = tree.map_structure(input_like, model._inputs_struct)
    values = dict(zip(map(id, model.inputs), tree.flatten(inputs), strict=True))
    for call in calls(model):
        args, kwargs = tree.map_structure(
            lambda x: values[id(x)] if isinstance(x, keras.KerasTensor) else x,
            (call.args, call.kwargs),
        )
        results = tree.flatten(layer_of(call)(*args, **kwargs))
        for x, y in zip(call.outputs, results, strict=True):
            values[id(x)] = y
    outputs = tree.pack_sequence_as(
        model._outputs_struct, [values[id(x)] for x in model.outputs]
    )
    return keras.Model(inputs, outputs)
