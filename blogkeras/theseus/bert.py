"""The post's one call, for the transformers of bert4keras and KerasHub."""

import numbers

import keras

from blogkeras.arguments import check_boolean, check_choice
from blogkeras.graph import (
    Segment,
    as_list,
    block_boundaries,
    copied,
    cut_model,
    find_blocks,
    is_functional,
    whole_model,
)
from blogkeras.theseus.distillation import Distillation
from blogkeras.theseus.model import Theseus

METHODS = ("theseus", "distillation", "direct")


def bert_of_theseus(
    predecessor,
    successor,
    classifier,
    replacement_rate=0.5,
    *,
    method="theseus",
    mapping=None,
    replace_embedding=True,
    boundaries=None,
    **kwargs,
):
    """A model that compresses a transformer into one of fewer blocks.

    The predecessor's blocks are divided among the successor's. The embedding
    and the blocks are replaced at random, each by its successor; the classifier
    comes after them. Other inputs of the blocks (relative positions, attention
    biases, masks) are passed along. It works for BERT, RoBERTa, ALBERT, NEZHA,
    RoFormer and others of bert4keras, and for backbones of KerasHub that are
    one stack of blocks.

    Args:
        predecessor: The large transformer, trained: an object of bert4keras
            (`build_transformer_model(..., return_keras_model=False)`), or a
            functional model, such as a KerasHub backbone. It will be frozen.
        successor: The small transformer, likewise. `keep_blocks(predecessor,
            3)` makes one of the predecessor's first blocks.
        classifier: Model or layer, or a list of them, from the transformer's
            output to the prediction, trained with the predecessor. `None` where
            the transformers include their heads: then the predecessor's head is
            shared.
        replacement_rate: Float or schedule, the probability of the successor.
        method: `"theseus"`, or a baseline of the same parts, which trains
            copies of successor and classifier: `"direct"`, a plain model for
            direct fine-tuning, or `"distillation"`, which learns the
            predecessor's predictions (and freezes predecessor and classifier,
            as `"theseus"` does). They ignore `replacement_rate`, `mapping` and
            `replace_embedding`.
        mapping: How many of the predecessor's blocks each module has, in order:
            integers, or pairs (predecessor's blocks, successor's blocks).
            Defaults to one block of the successor in each module and an even
            division of the predecessor's; 12 onto 5 is 2, 2, 3, 2, 3.
        replace_embedding: Boolean. Whether the embedding is a module to be
            replaced, too; else the predecessor's is shared.
        boundaries: Pair of lists: where the blocks of the predecessor and of
            the successor begin and end, for models whose blocks are not found;
            each as for `cut_model`, before the first block and after each.
        **kwargs: For `Theseus` (`mode`, `train_shared`, ...) or `Distillation`.

    Returns:
        A model to compile and fit: a `Theseus`, a `Distillation` (both with
        `detach()`), or a plain `keras.Model`.

    Raises:
        ValueError: where no blocks are found and `boundaries` does not name
            them, where `mapping` does not add up, and on an unknown `method`.

    Example:

    >>> def transformer(blocks):
    ...     inputs = keras.Input((8,))
    ...     x = layers.Dense(8, name="embedding")(inputs)
    ...     for i in range(blocks):
    ...         x = layers.Dense(8, "relu", name=f"transformer_layer_{i}")(x)
    ...     return keras.Model(inputs, x)
    >>> classifier = layers.Dense(3, activation="softmax")
    >>> theseus = bert_of_theseus(transformer(4), transformer(2), classifier)
    >>> theseus.compile("adam", "sparse_categorical_crossentropy")
    >>> x, y = np.random.rand(32, 8), np.random.randint(0, 3, 32)
    >>> history = theseus.fit(x, y, verbose=0)
    >>> model = theseus.detach()

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925);
        [blog post](https://kexue.fm/archives/7575)

    Departs from the post: the model is not compiled; the successor's depth need
    not divide the predecessor's; NEZHA and other blocks with several inputs
    work.
    """
    check_choice("method", method, METHODS)
    replace_embedding = check_boolean("replace_embedding", replace_embedding)
    boundaries = (None, None) if boundaries is None else boundaries
    if not isinstance(boundaries, (list, tuple)) or len(boundaries) != 2:
        raise ValueError(
            "Expected `boundaries` to be a pair of lists, the predecessor's "
            f"and the successor's. Received: boundaries={boundaries!r}"
        )
    old, new = whole_model(predecessor), whole_model(successor)
    classifier = [] if classifier is None else as_list(classifier)
    classifier = [
        cut_model(x, [])[0] if is_functional(x) else x for x in classifier
    ]
    if method != "theseus":
        student = copied(_with_head(new, classifier))
        if method == "direct":
            if kwargs:
                raise ValueError(
                    "Expected no further arguments for method='direct', a "
                    f"plain model. Received: {sorted(kwargs)}"
                )
            return student
        return Distillation(_with_head(old, classifier), student, **kwargs)

    cuts = [
        _boundaries(model, places)
        for model, places in zip((old, new), boundaries, strict=True)
    ]
    steps = _steps(mapping, *(len(tensors) - 1 for _, tensors in cuts))
    segments = []
    for (model, tensors), counts in zip(
        cuts, zip(*steps, strict=True), strict=True
    ):
        places = [tensors[sum(counts[:i])] for i in range(len(counts) + 1)]
        segments.append(cut_model(model, places))
    size = len(steps) + 1
    # The part after the blocks (a pooler, for example) is the predecessor's.
    head = segments[0][size:] + classifier
    old, new = (s[:size] for s in segments)
    stem = None
    if not replace_embedding:
        stem, old, new = old[0], old[1:], new[1:]
    return Theseus(
        old, new, head or None, replacement_rate, stem=stem, **kwargs
    )


def _boundaries(model, places):
    """The model that is cut, and the tensors around its blocks."""
    if places is None:
        model, blocks = find_blocks(model)
        return model, block_boundaries(blocks)
    cut = cut_model(model, places)[0].cut
    if len(cut.boundaries) < 2:
        raise ValueError(
            "Expected at least two `boundaries` of either model: before the "
            "first block and after each. "
            f"Received: {[x.name for x in cut.boundaries]}"
        )
    return cut.model, cut.boundaries


def _with_head(model, head):
    x = model._outputs_struct
    for layer in head:
        # Call the layers of a segment, not the segment itself.
        x = layer.call(x) if isinstance(layer, Segment) else layer(x)
    return keras.Model(model._inputs_struct, x)


def _steps(mapping, old, new):
    """Pairs of the numbers of blocks that a module has in each model."""
    if mapping is None:
        mapping = [(i + 1) * old // new - i * old // new for i in range(new)]
    steps = mapping if isinstance(mapping, (list, tuple)) else []
    steps = [
        tuple(m) if isinstance(m, (list, tuple)) else (m, 1) for m in steps
    ]
    counts = [n for step in steps for n in step]
    fits = all(len(step) == 2 for step in steps) and all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 1
        for n in counts
    )
    if not fits or (sum(counts[::2]), sum(counts[1::2])) != (old, new):
        raise ValueError(
            f"Expected `mapping` to divide the predecessor's {old} blocks and "
            f"the successor's {new} into modules of at least one block each; "
            "the successor cannot be the deeper one. "
            f"Received: mapping={mapping}"
        )
    return steps
