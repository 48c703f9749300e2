"""How a model uses its inputs, found in one trace of it.

Which embedding looks up which input, which masks go with which input, and
whether an embedding's matrix is used for anything but look-ups: all this is
found by following the data. Sizes are not compared: they may be equal by
chance.
"""

import inspect
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from blogkeras import backend

# Names of a layer's arguments that mark padding.
MASK_ARGUMENTS = (
    "padding_mask",
    "key_mask",
    "value_mask",
    "mask",
    "attention_mask",
)


class Leaf(NamedTuple):
    """One tensor of the model's inputs.

    Attributes:
        names: Its key in a dict of inputs, and the name of the model's `Input`.
        dtype: What the model casts it to, `None` where that is not declared.
        is_float: Whether it is floating in the model.
        is_sparse: Whether it keeps its nonzeros alone.
    """

    names: tuple
    dtype: str | None
    is_float: bool
    is_sparse: bool


class MaskSource(NamedTuple):
    """Where a mask can be read while the model runs.

    Attributes:
        layer: The layer that is called.
        number: Which call of it, from 0.
        argument: The argument that is the mask; `None`: the output's mask.
        leaves: Set of the inputs that the masked tensor depends on.
        shape: The mask's shape `(batch, positions)`, as far as known.
    """

    layer: Any
    number: int
    argument: str | None
    leaves: set
    shape: tuple


class Survey:
    """The results of tracing a model.

    Attributes:
        look_ups: Pairs `(layer, leaves)`, one for each look-up in an embedding
            that depends on inputs; `leaves` is the set of their indices.
        outputs: Pairs `(layer, leaves)` likewise, one for each floating output
            of each call (of an embedding: of each look-up).
        masks: List of `MaskSource`, in the order of the calls.
        matrices_used: List of the embedding layers whose matrix reaches the
            loss in another way than by its look-ups.
    """

    def __init__(self, model, x, run, tables=()):
        """Traces the model.

        Args:
            model: The `keras.Model`.
            x: The inputs, tensors or symbols of tensors.
            run: Function `(x, perturb, values)` that runs the model and returns
                its loss, or `None`.
            tables: Pairs `(layer, variable)` of embedding layers, for
                `matrices_used`.
        """
        self._layers = [layer for _, layer in named_layers(model)]
        flat = tree.flatten(x)
        present = [i for i, t in enumerate(flat) if t is not None]
        variables = [variable for _, variable in tables]
        records = []

        def fn(args):
            values = dict(zip(present, args, strict=False))
            matrices = args[len(present) :]
            records.clear()
            loss = run(
                tree.pack_sequence_as(
                    x, [values.get(i) for i in range(len(flat))]
                ),
                self._recorders(records, [layer for layer, _ in tables]),
                [*zip(variables, matrices, strict=True)],
            )
            # Keras sets the mask of an output after the layer has returned.
            records[:] = [record for r in records for record in _finish(r)]
            results = [record.tensor for record in records]
            return results if loss is None else [*results, loss]

        found = backend.dependencies(
            fn,
            [*(flat[i] for i in present), *variables],  # for shape and dtype
        )
        leaves = [
            {present[i] for i in indices if i < len(present)}
            for indices in found
        ]
        self.look_ups, self.outputs = (
            [
                (record.layer, depends)
                for record, depends in zip(records, leaves, strict=False)
                if record.kind == kind
            ]
            for kind in ("look-up", "output")
        )
        self.look_ups = [pair for pair in self.look_ups if pair[1]]
        self.masks = [
            MaskSource(*record[2:5], depends, record.shape)
            for record, depends in zip(records, leaves, strict=False)
            if record.kind == "mask" and depends
        ]
        self.matrices_used = [
            layer
            for index, (layer, _) in enumerate(tables)
            if len(present) + index in found[-1]
        ]

    def inputs_of(self, layer):
        """For each floating output of a layer, the inputs it depends on."""
        return [leaves for other, leaves in self.outputs if other is layer]

    def _recorders(self, records, tables):
        calls = {}

        def recorder(layer):
            def fn(output, *args, **kwargs):
                number = calls[id(layer)] = calls.get(id(layer), -1) + 1
                first = first_argument(args, kwargs)
                if not is_embedding(layer):
                    flat = tree.flatten(output)
                    outputs = {id(x): x for x in flat if is_float(x)}.values()
                elif is_look_up(output, first):
                    outputs = [output]
                    records.append(
                        _Record("look-up", first, layer, number, None, ())
                    )
                    if any(layer is table for table in tables):
                        # Depends on the tokens as before, not on the matrix.
                        output = ops.zeros_like(output) + ops.cast(
                            ops.expand_dims(first, -1), output.dtype
                        )
                else:
                    outputs = []
                records.extend(
                    _Record("output", x, layer, number, None, ())
                    for x in outputs
                )
                records.append(
                    _Record("call", output, layer, number, (args, kwargs), ())
                )
                return output

            return fn

        return {layer: recorder(layer) for layer in self._layers}


class _Record(NamedTuple):
    kind: str
    tensor: Any
    layer: Any
    number: int
    argument: Any
    shape: tuple


def _finish(record):
    """The records of a call, one for each mask of an argument or output."""
    if record.kind != "call":
        return [record]
    found = []
    args, kwargs = record.argument
    for argument, mask in mask_arguments(record.layer, args, kwargs):
        tensor = _masked_tensor(argument, args, kwargs)
        if tensor is not None:
            found.append(
                _Record(
                    "mask",
                    tensor,
                    *record[2:4],
                    argument,
                    (mask.shape[0], mask.shape[-1]),
                )
            )
    for output in tree.flatten(record.tensor)[:1]:
        mask = backend.get_keras_mask(output)
        if mask is not None and len(mask.shape) >= 2:
            found.append(
                _Record("mask", output, *record[2:4], None, tuple(mask.shape))
            )
    return found


def _masked_tensor(argument, args, kwargs):
    """The tensor that a mask argument masks; of attention, the keys."""
    if argument == "mask" or ("value" not in kwargs and len(args) < 2):
        return first_tensor(first_argument(args, kwargs))
    for name in ("key", "value"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    return first_tensor(args[1] if len(args) > 1 else args[0])


def mask_arguments(layer, args, kwargs):
    """Pairs `(argument, mask)` of one call that mark padding."""
    try:
        bound = inspect.signature(type(layer).call).bind(layer, *args, **kwargs)
    except (TypeError, ValueError):
        return []
    found = []
    for name in MASK_ARGUMENTS:
        mask = bound.arguments.get(name)
        if isinstance(mask, (list, tuple)):
            # `Attention` takes the masks of the queries and of the values.
            mask = mask[-1] if mask else None
        if mask is None or not hasattr(mask, "shape"):
            continue
        if is_float(mask) and not isinstance(layer, _ATTENTION):
            continue  # it may be added to the logits, where 0 means: attend
        ranks = (3, 4) if name == "attention_mask" else (2,)
        if len(mask.shape) in ranks:
            found.append((name, mask))
    return found


def mask_of_positions(mask):
    """A mask `(batch, positions)` from one that may have axes of queries.

    A position is padding if no query attends to it.
    """
    mask = ops.not_equal(mask, ops.zeros((), mask.dtype))
    queries = tuple(range(1, len(mask.shape) - 1))
    return ops.any(mask, axis=queries) if queries else mask


_ATTENTION = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
    keras.layers.Attention,
)


def describe(model, x):
    """A `Leaf` for each tensor of `tree.flatten(x)`."""
    flat = tree.flatten_with_path(x)
    declared = _declared(model, x)
    leaves = []
    for (path, value), symbol in zip(flat, declared, strict=True):
        names = [part for part in path if isinstance(part, str)][-1:]
        if symbol is not None and symbol.name not in names:
            names.append(symbol.name)
        dtype = None if symbol is None else symbol.dtype
        leaves.append(
            Leaf(
                tuple(names),
                dtype,
                is_float(symbol if symbol is not None else value)
                and value is not None,
                backend.is_sparse(value if symbol is None else symbol),
            )
        )
    return leaves


def _declared(model, x):
    """The model's symbolic input for each tensor of `x`, or `None`."""
    paths = [path for path, _ in tree.flatten_with_path(x)]
    nothing = [None] * len(paths)
    if not isinstance(model, keras.Model) or not model.built:
        return nothing
    declared = getattr(model, "inputs", None)
    if not declared:
        return nothing  # a subclassed model
    if isinstance(x, dict):
        structure = getattr(model, "input", None)
        # As Keras does: by the keys, or else by the inputs' names.
        by_key = (
            structure
            if isinstance(structure, dict)
            else {t.name: t for t in declared}
        )
        return [
            by_key.get(path[0]) if len(path) == 1 else None for path in paths
        ]
    if len(declared) != len(paths):
        return nothing
    return list(declared)


def named_layers(parent, prefix="", seen=None):
    """Pairs `(path, layer)` of all layers inside, each once."""
    seen = set() if seen is None else seen
    children = parent._flatten_layers(include_self=False, recursive=False)
    for layer in children:
        if id(layer) not in seen:
            seen.add(id(layer))
            path = prefix + layer.name
            yield path, layer
            yield from named_layers(layer, path + "/", seen)


def is_embedding(layer):
    """Whether a layer is Keras's `Embedding` or a subclass of it."""
    return isinstance(layer, keras.layers.Embedding)


def is_look_up(output, inputs):
    """Whether a call of an embedding looks up, and is not a tied softmax."""
    return len(output.shape) > len(inputs.shape)


def first_argument(args, kwargs):
    """What a layer was called with first, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def first_tensor(value):
    """The first tensor of a nested structure that is not `None`."""
    return next((t for t in tree.flatten(value) if t is not None), None)


def is_float(x):
    """Whether `x` is a tensor of floating numbers; `None` is none."""
    return x is not None and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(x.dtype)
    )


def survey_step(objective, weights, tables=()):
    """A `Survey` of the step's model and loss.

    Errors of the trace are passed on: some models cannot be traced inside a
        trace.
    """
    x, y, sample_weight = objective.data

    def run(x, perturb, values):
        mapping = {id(variable): value for variable, value in values}
        moved = [
            mapping.pop(id(variable), weight)
            for variable, weight in zip(
                # Without weights the objective has values of its own.
                objective.model.trainable_variables,
                weights,
                strict=False,
            )
        ]
        values = [pair for pair in values if id(pair[0]) in mapping]
        loss, _ = objective(
            moved, values=values, perturb=perturb, data=(x, y, sample_weight)
        )
        return loss

    return Survey(objective.model, x, run, tables)


def try_survey_step(objective, weights, tables=()):
    """The same, `None` where it fails: then nothing is known."""
    try:
        return survey_step(objective, weights, tables)
    except Exception:
        return None
