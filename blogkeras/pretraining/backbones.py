"""What a pre-trainer must know of an encoder: its inputs, output and table."""

import numbers

import keras
from keras import ops, tree

from blogkeras.arguments import check_layer
from blogkeras.graph import lasting_name


class Backbone:
    """Calls any encoder of tokens, and knows the table it looks them up in.

    Encoders of bert4keras, KerasHub's backbones and other functional models
    are called with what their inputs are named for: tokens, segments ("segment"
    or "type" in the name) and where tokens are not padding ("mask"). Other
    models are called with the tokens alone.

    Args:
        name: String. The argument's name, for messages.
        model: The encoder, built.
        embedding: The layer that looks tokens up, its name or its number among
            the model's `keras.layers.Embedding`s; `None` finds it.
        pad_token: Integer.

    Attributes:
        model: The encoder.
        embedding: Its `keras.layers.Embedding`.
        address: The argument `embedding` by which a loaded encoder finds it.
        dim: Integer. The size of its output vectors.
    """

    def __init__(self, name, model, embedding=None, pad_token=0):
        self.name = name
        # A transformer of bert4keras is an object that holds its Keras model.
        if not isinstance(model, keras.layers.Layer):
            model = getattr(model, "model", model)
        self.model = check_layer(name, model)
        if not model.built:
            raise ValueError(
                f"Expected `{name}` to be built: call it once, or give its "
                f"inputs their shapes. Received: {name}={model.name!r}"
            )
        self.pad_token = pad_token
        self.roles = _roles(name, model)
        self.embedding = find_embedding(name, model, embedding)
        self.address = None
        if embedding is not None:
            self.address = embedding_address(model, self.embedding)
        self.dim = self._dim()

    @property
    def vocabulary_size(self):
        return self.table.shape[0]

    @property
    def table(self):
        """The variable that holds the vectors of the tokens."""
        return self.embedding._embeddings

    @property
    def head_sizes(self):
        """The three sizes of a `MaskedTokenHead` on this encoder."""
        return self.vocabulary_size, self.table.shape[1], self.dim

    @property
    def takes_segments(self):
        return "segments" in tree.flatten(self.roles)

    def __call__(self, ids, segments=None, training=None):
        """`(batch, length)` tokens to `(batch, length, dim)` vectors."""
        vectors = self._sequence(
            self.model(self._inputs(ids, segments), training=training)
        )
        self._check_length(vectors.shape[1], ids.shape[1])
        return vectors

    def _inputs(self, ids, segments):
        def value(role):
            if role == "tokens":
                return ids
            if role == "mask":
                return ids != self.pad_token
            return ops.zeros_like(ids) if segments is None else segments

        return tree.map_structure(value, self.roles)

    def _sequence(self, outputs):
        if isinstance(outputs, dict) and "sequence_output" in outputs:
            outputs = outputs["sequence_output"]
        sequences = [x for x in tree.flatten(outputs) if len(x.shape) == 3]
        if not sequences or (sequences[0].shape[-1] or 0) < 2:
            shapes = [tuple(x.shape) for x in tree.flatten(outputs)]
            raise ValueError(
                f"Expected `{self.name}` to map tokens (batch, length) to "
                "vectors (batch, length, dim), without a head. Received: "
                f"{self.name}={self.model.name!r} with outputs of shapes "
                f"{shapes}"
            )
        return sequences[0]

    def _check_length(self, length, tokens):
        if None not in (length, tokens) and length != tokens:
            raise ValueError(
                f"Expected `{self.name}` to give one vector for each token. "
                f"Received: {self.name}={self.model.name!r} with {length} "
                f"vectors for {tokens} tokens"
            )

    def _dim(self):
        if isinstance(self.model, keras.Sequential):
            inputs, outputs = self.model.inputs, self.model.outputs
        else:
            try:
                inputs, outputs = self.model.input, self.model.output
            except (AttributeError, ValueError):
                inputs = keras.KerasTensor((None, 8), "int32")
                outputs = self.model.compute_output_spec(inputs)
        tokens = tree.flatten(inputs)[0].shape[1]
        vectors = self._sequence(outputs)
        self._check_length(vectors.shape[1], tokens)
        return vectors.shape[-1]


def _roles(name, model):
    """What each input is for, in the structure of the inputs."""
    try:
        inputs = model.input
    except (AttributeError, ValueError):
        return "tokens"
    if not isinstance(inputs, (list, tuple, dict)):
        return "tokens"
    if isinstance(inputs, dict):
        names = dict(inputs)
        names = {key: key for key in names}
    else:
        names = [x.name for x in inputs]
    known = tree.map_structure(_role, names)
    flat = tree.flatten(known)
    if isinstance(known, list) and "tokens" not in flat:
        # Names that say nothing: the tokens, or tokens and segments.
        if flat in ([None], [None, None]):
            known = flat = ["tokens", "segments"][: len(flat)]
        elif flat.count(None) == 1:
            known = flat = [role or "tokens" for role in flat]
    if {None, "positions"} & set(flat) or flat.count("tokens") != 1:
        raise ValueError(
            f"Expected inputs of `{name}` whose names say what they are: "
            "tokens, segments, padding mask. Received: "
            f"{tree.flatten(names)}"
        )
    return known


def _role(name):
    name = name.lower()
    for word, role in (
        ("seg", "segments"),
        ("type", "segments"),
        ("mask", "mask"),
        ("position", "positions"),
        ("token", "tokens"),
        ("ids", "tokens"),
    ):
        if word in name:
            return role
    return None


def checked_embedding(embedding):
    """What names the layer that looks up tokens, or a ValueError."""
    known = (type(None), str, numbers.Integral, keras.layers.Layer)
    if not isinstance(embedding, known) or isinstance(embedding, bool):
        raise ValueError(
            "Expected `embedding` to be a layer, its name or its number among "
            f"the embeddings. Received: embedding={embedding!r}"
        )
    return embedding


def embedding_address(model, layer):
    """By which a loaded model finds the layer that looks the tokens up.

    Its name, if a loaded model has that, too; else its number.
    """
    name = lasting_name(model, layer)
    return _embeddings(model).index(layer) if name is None else name


def _embeddings(model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Embedding)
    ]


def find_embedding(name, model, given):
    """The layer that looks the tokens up."""
    layers = _embeddings(model)
    if isinstance(given, numbers.Integral):
        chosen = layers[given : given + 1] if given >= 0 else []
    elif given is not None:
        chosen = [x for x in layers if given is x]
        chosen = chosen or [x for x in layers if given == x.name]
        chosen = [x for x in chosen if lasting_name(model, x)] or chosen
    elif getattr(model, "token_embedding", None) in layers:
        chosen = [model.token_embedding]
    else:
        chosen = [x for x in layers if _takes_tokens(model, x)]
        if len(chosen) != 1:
            chosen = layers
    if len(chosen) != 1:
        raise ValueError(
            f"Expected `{name}` to have a `keras.layers.Embedding` of tokens, "
            "named by `embedding` where there are several. Received: "
            f"embedding={given!r}, {name}={model.name!r} with the embeddings "
            f"{[x.name for x in layers]}"
        )
    return chosen[0]


def _takes_tokens(model, layer):
    try:
        inputs = tree.flatten(model.input)
    except (AttributeError, ValueError):
        return False
    tokens = [x for x in inputs if _role(x.name) in (None, "tokens")]
    return any(
        x is y
        for node in layer._inbound_nodes
        for x in node.input_tensors
        for y in tokens
    )
