"""What the generator and the discriminator of ELECTRA have in common."""

import keras
from keras import ops

from blogkeras.arguments import check_choice
from blogkeras.backend.scopes import RecordingScope, no_autocast
from blogkeras.graph import described_layer
from blogkeras.pretraining.backbones import Backbone, checked_embedding
from blogkeras.pretraining.drawing import FREQUENCIES, draws_without_network

SHARING = ("embeddings", "disentangled", "none", "all")


def connect(generator, discriminator, sharing, names, pad_token):
    """Both networks as backbones, with what they share.

    Args:
        generator: Encoder, or what draws without a network.
        discriminator: Encoder.
        sharing: One of `SHARING`.
        names: What names the layer that looks up tokens (see `Backbone`), or a
            list of two such, the generator's and the discriminator's.
        pad_token: Integer.

    Returns:
        `(generation, discrimination)`, two `Backbone`s. The first is `None`
        where the generator is no network, and it is the second one where they
        share all.
    """
    names = names if isinstance(names, list) else [names, names]
    discrimination = Backbone(
        "discriminator", discriminator, names[1], pad_token
    )
    if draws_without_network(generator):
        if isinstance(generator, str):
            check_choice("generator", generator, FREQUENCIES)
        if sharing in ("disentangled", "all"):
            raise ValueError(
                "Expected a network for a generator, to share with. "
                f"Received: generator={generator!r}, sharing={sharing!r}"
            )
        return None, discrimination
    if sharing == "all":
        other = getattr(generator, "model", generator)
        if not _equal(other, discrimination.model):
            raise ValueError(
                'Expected two equal networks for sharing="all". Received: '
                f"generator={generator}, discriminator={discriminator}"
            )
        return discrimination, discrimination
    generation = Backbone("generator", generator, names[0], pad_token)
    _check_pair(generation, discrimination, sharing)
    if sharing == "embeddings":
        share_table(generation, discrimination)
    return generation, discrimination


def share_table(source, target):
    """Puts the table of one backbone in the place of another one's.

    Both then look tokens up in the same *variable*: Keras can load two layers
    that share a variable, and cannot load a layer that two models share.
    """
    ours, theirs = target.table, source.table
    if ours is theirs:
        return
    _check_shapes(source, target)
    layer = target.embedding
    if layer.lora_enabled or source.embedding.lora_enabled:
        raise ValueError(
            "Expected token embeddings without LoRA to share. Received: "
            f"layer {layer.name!r}"
        )
    layer._tracker.unlock()
    layer._untrack_variable(ours)
    layer._track_variable(theirs)
    layer._embeddings = theirs
    layer._tracker.lock()


def call_with_table(backbone, table, *args, **kwargs):
    """Calls a backbone with another tensor in the place of its table.

    The variables that its layers assign in the call are assigned as usual.

    Returns:
        `(outputs, loss)`, where the loss is the sum of what the layers gave to
        `add_loss`, a float32 scalar. Hand it to `add_loss` of the caller.
    """
    variables = backbone.model.variables
    with no_autocast():
        mapping = [
            (v, ops.convert_to_tensor(v))
            for v in variables
            if v is not backbone.table
        ]
    # A scope inside another one does not see the values of the outer one.
    with RecordingScope([*mapping, (backbone.table, table)]) as scope:
        outputs = backbone(*args, **kwargs)
    with no_autocast():
        for variable, value in scope.assigned.values():
            variable.assign(value)
    loss = sum(
        (ops.cast(loss, "float32") for loss in scope.losses),
        start=ops.zeros((), "float32"),
    )
    # Keras recognizes the tensors of `add_loss` by their Python ids, which may
    # be used again for other tensors once the scope is gone.
    backbone.model._clear_losses()
    return outputs, loss


def checked_embeddings(embedding):
    """What names layers that look up tokens: one, or a list of two."""
    if isinstance(embedding, (list, tuple)) and len(embedding) == 2:
        return [checked_embedding(part) for part in embedding]
    return checked_embedding(embedding)


def _check_pair(generation, discrimination, sharing):
    """Raises a `ValueError` where two networks cannot be trained together."""
    if generation.model is discrimination.model:
        raise ValueError(
            'Expected two networks, or sharing="all". Received: '
            f"sharing={sharing!r} and the same network twice"
        )
    sizes = generation.vocabulary_size, discrimination.vocabulary_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Expected the same vocabulary in both networks. Received: "
            f"{sizes[0]} tokens in the generator, {sizes[1]} in the "
            "discriminator"
        )
    if sharing == "disentangled":
        _check_shapes(generation, discrimination)


def _check_shapes(one, other):
    """Raises a `ValueError` where two tables cannot be one."""
    shapes = [tuple(part.table.shape) for part in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Expected token embeddings of one shape to share. Give the "
            "networks one size of embedding (`embedding_size` in bert4keras, "
            "`embedding_dim` in KerasHub) with a projection behind it, or "
            f'sharing="none". Received: {one.name}\'s {shapes[0]}, '
            f"{other.name}'s {shapes[1]}"
        )


def _equal(one, other):
    """Whether two networks differ in nothing but names and values."""
    if one is other:
        return True
    if not isinstance(one, keras.layers.Layer):
        return False
    return described_layer(one) == described_layer(other)
