"""What lies inside of two models, compared: hidden states and attention."""

import keras
from keras import ops, tree

from blogkeras.graph import find_blocks, lasting_name
from blogkeras.training import perturbed

KINDS = ("mse", "cosine", "relation", "attention")


def even_pairs(teacher, student):
    """The layers that end the blocks, evenly mapped.

    The student's blocks learn from as many of the teacher's, the last from the
    last: of 12 and 4, from the third, sixth, ninth and twelfth.
    """
    ends = []
    for model in (teacher, student):
        _, blocks = find_blocks(model)
        ends.append([block.calls[-1].operation for block in blocks])
    old, new = ends
    if len(new) > len(old):
        raise ValueError(
            "Expected a student of no more blocks than the teacher, or pairs "
            f"of layers as `hidden`. Received: {len(new)} and {len(old)} blocks"
        )
    return [
        (old[(i + 1) * len(old) // len(new) - 1], layer)
        for i, layer in enumerate(new)
    ]


def read_pairs(hidden, kind, teacher, student):
    """`[teacher's layer, student's layer, kind]` of each pair, by address.

    Raises:
        ValueError: where a pair is none, or a layer is not found.
    """
    if hidden == "blocks":
        hidden = even_pairs(teacher, student)
    if not isinstance(hidden, (list, tuple)):
        hidden = [hidden]
    pairs = []
    for pair in hidden:
        entries = list(pair) if isinstance(pair, (list, tuple)) else []
        if len(entries) == 2:
            entries.append(kind)
        if len(entries) != 3 or entries[2] not in KINDS:
            raise ValueError(
                'Expected `hidden` to be "blocks" or a list of pairs, a layer '
                "of the teacher and one of the student, and their kind if it "
                f"is not that of all: {KINDS}. Received: {pair!r}"
            )
        addresses = [
            _address(model, sublayer(model, layer))
            for model, layer in zip((teacher, student), entries, strict=False)
        ]
        pairs.append([*addresses, entries[2]])
    return pairs


def _address(model, layer):
    """What `sublayer` finds a layer by, in a loaded model, too."""
    name = lasting_name(model, layer)
    return _inside(model).index(layer) if name is None else name


def _inside(model):
    return model._flatten_layers(include_self=False)


def sublayer(model, layer):
    """One layer inside a model.

    Args:
        model: Model, functional or not.
        layer: The layer; its name, where the model's own layers come before
            those inside of them; or its number among all of them.

    Raises:
        ValueError: if the model has no such layer, or several of this name.
    """
    inside = _inside(model)
    if isinstance(layer, int) and not isinstance(layer, bool):
        found = inside[layer : layer + 1] if layer >= 0 else []
    elif isinstance(layer, keras.Layer):
        found = [x for x in inside if x is layer]
    else:
        found = [x for x in inside if x.name == layer]
        found = [x for x in found if lasting_name(model, x)] or found
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"Expected the name of one layer of the model {model.name!r}. "
        f"Received: {getattr(layer, 'name', layer)!r}, of which it has "
        f"{len(found)}; its layers are "
        f"{sorted({x.name for x in inside})}"
    )


def call_with_hidden(model, layers, x, training=False):
    """A model's outputs, and a list of those of some of its layers.

    Raises:
        ValueError: unless each of these layers is called once.
    """
    found = {layer: [] for layer in layers}

    def recorder(layer):
        def record(output, *args, **kwargs):
            # Of several outputs, the first.
            found[layer].append(tree.flatten(output)[0])
            return output

        return record

    with perturbed({layer: recorder(layer) for layer in found}):
        outputs = model(x, training=training)
    for layer, calls in found.items():
        if len(calls) != 1:
            raise ValueError(
                "Expected layers in `hidden` that a call of the model "
                f"{model.name!r} calls once. Received: {layer.name!r}, which "
                f"was called {len(calls)} times"
            )
    return outputs, [found[layer][0] for layer in layers]


def hidden_shapes(model, layers):
    """The shapes of what layers of a functional model return."""

    class Probe(keras.layers.Layer):
        def call(self, x):
            return call_with_hidden(model, layers, x)[1]

    hidden = Probe().compute_output_spec(inputs_of(model))
    return [tuple(x.shape) for x in hidden]


def inputs_of(model):
    """The symbolic inputs of a model, in the structure that it takes."""
    struct = getattr(model, "_inputs_struct", None)
    return model.inputs[0] if struct is None else struct


def check_pair(layers, kind, z, s, heads, sizes):
    """Raises unless hidden states of the shapes z and s can be compared.

    Args:
        layers: The two layers, for the message.
        kind: One of `KINDS`.
        z, s: Shapes.
        heads: Integer, of `"relation"`.
        sizes: Boolean. Whether the last axes must be equal.
    """
    names = [layer.name for layer in layers]
    ranks = {"relation": (3,), "attention": (4,)}.get(kind, range(2, 9))
    compared = slice(1, None if sizes else -1)
    fits = len(z) == len(s) and len(z) in ranks
    fits = fits and all(
        a == b or a is None or b is None
        for a, b in zip(z[compared], s[compared], strict=True)
    )
    if not fits:
        raise ValueError(
            "Expected hidden states of the same positions, and of the same "
            'size but for "relation" (and for "mse", where both models are '
            'functional); "relation" takes (batch, positions, dim), '
            '"attention" (batch, heads, positions, positions). Received: '
            f"{names} of shapes {z} and {s} for {kind!r}"
        )
    if kind == "relation" and (z[-1] % heads or s[-1] % heads):
        raise ValueError(
            "Expected `hidden_heads` to divide the sizes of hidden states. "
            f"Received: hidden_heads={heads}, {names} of sizes {z[-1]} and "
            f"{s[-1]}"
        )


class HiddenLoss(keras.losses.Loss):
    """The distance of two hidden states, for each position.

    It is a loss, so that Keras handles masks, sample weights and replicas.

    Args:
        kind: One of `KINDS`.
        heads: Integer, of `"relation"`.
        reduction: As in Keras.
        mask: Boolean tensor `(batch, positions)` or `None`, of `"relation"`:
            the student's positions that others are compared with.
    """

    def __init__(self, kind, heads, reduction, mask=None):
        super().__init__("hidden", reduction, dtype="float32")
        self.kind, self.heads, self.mask = kind, heads, mask

    def call(self, y_true, y_pred):
        z, s = (ops.cast(x, "float32") for x in (y_true, y_pred))
        if self.kind == "mse":
            return ops.mean(ops.square(z - s), axis=-1)
        if self.kind == "cosine":
            return 1 - ops.sum(_unit(z) * _unit(s), axis=-1)
        if self.kind == "attention":
            # (batch, heads, positions, positions): the mean over the heads.
            z, s = (ops.clip(x, 1e-7, 1.0) for x in (z, s))
            divergence = ops.sum(z * (ops.log(z) - ops.log(s)), axis=-1)
            return ops.mean(divergence, axis=1)
        z, s = (self._relations(x) for x in (z, s))
        divergence = ops.sum(ops.exp(z) * (z - s), axis=-1)
        return ops.mean(divergence, axis=1)

    def _relations(self, x):
        """log softmax of the products of all positions, for each head."""
        length, dim = x.shape[1:]
        length = ops.shape(x)[1] if length is None else length
        size = dim // self.heads
        x = ops.reshape(x, [-1, length, self.heads, size])
        scores = ops.einsum("bthd,bshd->bhts", x, x) * size**-0.5
        if self.mask is not None:
            scores = ops.where(self.mask[:, None, None], scores, -1e9)
        return ops.log_softmax(scores)


def _unit(x):
    """Vectors of length 1; 0 stays 0."""
    square = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(square, 1e-24))
