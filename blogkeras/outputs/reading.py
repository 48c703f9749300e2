"""Reads what the outputs of a model mean off its compiled loss."""

import functools

import keras
from keras import tree

from blogkeras.arguments import check_boolean, check_choice
from blogkeras.outputs.meaning import KINDS, OutputMeaning
from blogkeras.outputs.structure import (
    leaves,
    output_losses,
    output_names,
    spread,
)

# The class of a loss, its function, what the output is, and whether it is
# logits where the loss has no argument `from_logits`. `None`: the loss does not
# determine it.
_LOSSES = (
    ("CategoricalCrossentropy", "categorical_crossentropy", "softmax", False),
    (
        "SparseCategoricalCrossentropy",
        "sparse_categorical_crossentropy",
        "softmax",
        False,
    ),
    (
        "CategoricalFocalCrossentropy",
        "categorical_focal_crossentropy",
        "softmax",
        False,
    ),
    (
        "CategoricalGeneralizedCrossEntropy",
        "categorical_generalized_cross_entropy",
        "softmax",
        False,
    ),
    ("KLDivergence", "kl_divergence", "softmax", False),
    ("CTC", "ctc", "softmax", True),
    ("BinaryCrossentropy", "binary_crossentropy", "sigmoid", False),
    ("BinaryFocalCrossentropy", "binary_focal_crossentropy", "sigmoid", False),
    ("MeanSquaredError", "mean_squared_error", "numbers", None),
    ("MeanAbsoluteError", "mean_absolute_error", "numbers", None),
    (
        "MeanAbsolutePercentageError",
        "mean_absolute_percentage_error",
        "numbers",
        None,
    ),
    (
        "MeanSquaredLogarithmicError",
        "mean_squared_logarithmic_error",
        "numbers",
        None,
    ),
    ("Huber", "huber", "numbers", None),
    ("LogCosh", "log_cosh", "numbers", None),
    ("Poisson", "poisson", "numbers", None),
    ("CosineSimilarity", "cosine_similarity", "numbers", None),
    ("Hinge", "hinge", "numbers", None),
    ("SquaredHinge", "squared_hinge", "numbers", None),
    ("CategoricalHinge", "categorical_hinge", "numbers", None),
    ("Circle", "circle", "numbers", None),
)
# Losses of probabilities that may be those of classes or of labels.
_PROBABILITIES = (
    ("Dice", "dice", None, False),
    ("Tversky", "tversky", None, False),
)


class UnreadableLossError(ValueError):
    """Neither a loss nor an argument determines what an output means."""


def read_outputs(model, outputs, output_kind=None, from_logits=None, loss=None):
    """What each output of a compiled model means, read off its loss.

    The loss may be a name, a function, a `functools.partial` of one, a `Loss`
    object, or a list or dict of these for several outputs. A loss function of
    the user's own cannot be read, even where it calls one of Keras's: give both
    arguments then. `label_smoothing`, `class_weight` and the like change
    nothing in what an output means.

    Rooms name their own arguments `output_kind` and `from_logits` too, as the
    messages here do.

    Args:
        model: A compiled `keras.Model`.
        outputs: What the model returns: a tensor (symbolic ones will do) or a
            list, tuple or dict of them.
        output_kind: `"softmax"`, `"sigmoid"`, `"numbers"`, or a list or dict of
            these (by the output's name), one for each output. Overrides what
            the loss says: an output of probabilities compiled with `"mse"` may
            be `"softmax"`, and logits may be compared as `"numbers"`. `None`
            asks the loss.
        from_logits: Boolean, or a list or dict of booleans. `None` asks the
            loss.
        loss: The loss, where it is not the compiled one.

    Returns:
        A list with an `OutputMeaning` for each output, in the order of
        `keras.tree.flatten(outputs)`; `None` for an output that has no loss of
        its own beside others that have, unless `output_kind` names it.

    Raises:
        ValueError: where neither the loss nor an argument determines the
            meaning, and where an argument contradicts the loss.

    Example:

    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> [meaning] = read_outputs(model, model.output)
    >>> meaning
    OutputMeaning(kind='softmax', from_logits=False, axis=-1, ignore_class=None)
    """
    names = output_names(model, outputs)
    losses = output_losses(model, outputs, loss)
    kinds = spread(output_kind, outputs, model, "output_kind")
    logits = spread(from_logits, outputs, model, "from_logits")
    without_loss = not any(losses)
    meanings = []
    for output, name, used, kind, is_logits in zip(
        tree.flatten(outputs), names, losses, kinds, logits, strict=True
    ):
        check_output_arguments(kind, is_logits)
        if not used and kind is None and not without_loss:
            meanings.append(None)
            continue
        told = [_told(loss, output, name) for loss in used]
        meanings.append(_decide(told, used, kind, is_logits, name))
    return meanings


def check_output_arguments(output_kind, from_logits):
    """Raises a `ValueError` for values that `read_outputs` does not take.

    For constructors, which do not know the outputs yet.
    """
    for kind in leaves(output_kind):
        check_choice("output_kind", kind, (*KINDS, None))
    for value in leaves(from_logits):
        if value is not None:
            check_boolean("from_logits", value)


def _told(loss, output, name):
    """What a loss determines: `(kind, from_logits, axis, ignore_class)`.

    `None` where it determines nothing.
    """
    if isinstance(loss, str):
        if loss.lower() in ("crossentropy", "ce"):
            one = len(output.shape) < 2 or output.shape[-1] == 1
            loss = ("binary" if one else "categorical") + "_crossentropy"
        try:
            loss = keras.losses.get(loss)
        except ValueError as error:
            raise ValueError(
                f"Expected the name of a loss for output {name!r}. "
                f"Received: loss={loss!r}"
            ) from error
    settings = {}
    while isinstance(loss, functools.partial):
        settings = {**loss.keywords, **settings}
        loss = loss.func
    # Keras's wrapper of a function keeps the function and its arguments.
    settings = {**getattr(loss, "_fn_kwargs", {}), **settings}
    function = getattr(loss, "fn", loss)
    for class_name, function_name, kind, logits in (*_LOSSES, *_PROBABILITIES):
        if isinstance(
            loss, getattr(keras.losses, class_name, ())
        ) or function is getattr(keras.losses, function_name, settings):
            axis = settings.get("axis", -1) if kind else -1
            return (
                kind,
                settings.get("from_logits", logits),
                -1 if axis is None else axis,
                settings.get("ignore_class"),
            )
    return None, None, -1, None


def _decide(told, losses, kind, from_logits, name):
    """One `OutputMeaning` from what the losses and the arguments determine."""
    received = (
        f"Received: loss={_shown(losses)} for output {name!r}, "
        f"output_kind={kind!r}, from_logits={from_logits!r}"
    )
    kinds = {t[0] for t in told if t[0] is not None}
    logits = {t[1] for t in told if t[1] is not None}
    if kind is None and (len(kinds) > 1 or len(logits) > 1):
        raise ValueError(
            "Expected losses of one output that agree in what it means; give "
            f"`output_kind` and `from_logits`. {received}"
        )
    if kind is None and not kinds:
        raise UnreadableLossError(
            "Expected a loss that tells what the output means: one of "
            f"{', '.join(x[1] for x in _LOSSES)} (as name, function or "
            "object). For any other give `output_kind` ('softmax', 'sigmoid' "
            "or 'numbers') and, unless it is 'numbers', `from_logits`. "
            f"{received}"
        )
    read = next(iter(kinds)) if len(kinds) == 1 else None
    axis, ignore_class = -1, None
    for told_kind, _, told_axis, told_ignored in told:
        axis = told_axis if told_kind is not None else axis
        ignore_class = (
            told_ignored if told_ignored is not None else ignore_class
        )
    chosen = kind or read
    if chosen == "numbers":
        if from_logits:
            raise ValueError(
                "Expected `from_logits` for probabilities only: numbers have "
                f"no logits. {received}"
            )
        return OutputMeaning("numbers", False, axis, ignore_class)
    if from_logits is not None and logits and from_logits not in logits:
        raise ValueError(
            "Expected `from_logits` as the compiled loss has it; it is the "
            f"same output. {received}"
        )
    if from_logits is None:
        if len(logits) != 1:
            raise UnreadableLossError(
                f"Expected `from_logits` to be given with {chosen!r}: the loss "
                f"does not tell. {received}"
            )
        from_logits = next(iter(logits))
    if kind and read in KINDS[:2] and kind != read and from_logits:
        raise ValueError(
            "Expected `output_kind` as the compiled loss has it, which takes "
            f"the {read} of the logits. {received}"
        )
    return OutputMeaning(chosen, bool(from_logits), axis, ignore_class)


def _shown(losses):
    shown = [
        x if isinstance(x, str) else getattr(x, "__name__", type(x).__name__)
        for x in losses
    ]
    return ", ".join(shown) or None
