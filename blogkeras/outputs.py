"""What a model's outputs mean, and how far two predictions are apart.

A model does not say whether its output is the probabilities of classes that
exclude each other, the probabilities of independent labels, or plain numbers,
nor whether these are logits. The loss that it is compiled with does.
`read_outputs` reads it off the loss, for every method that compares
predictions.
"""

import dataclasses
import functools

import keras
from keras import ops, tree

from blogkeras.arguments import check_boolean, check_choice
from blogkeras.backend import get_keras_mask

KINDS = ("softmax", "sigmoid", "numbers")

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


@dataclasses.dataclass(frozen=True)
class OutputMeaning:
    """What one output of a model means.

    The divergence D of two predictions f and g of one position is

    - `"softmax"` (classes that exclude each other): KL(f ‖ g) = Σᵢ fᵢ log fᵢ/gᵢ
      over the classes;
    - `"sigmoid"` (independent labels): the mean over the labels of
      p log p/q + (1 - p) log (1 - p)/(1 - q);
    - `"numbers"`: the mean over the numbers of (f - g)².

    The means over labels and numbers are those that Keras's own losses take.

    Attributes:
        kind: `"softmax"`, `"sigmoid"` or `"numbers"`.
        from_logits: Boolean. Whether the output is logits, whose softmax or
            sigmoid are the probabilities. `False` for numbers.
        axis: Integer. The axis of the classes, labels or numbers.
        ignore_class: Integer or `None`. The label of positions that the loss
            leaves out (`SparseCategoricalCrossentropy(ignore_class=…)`).

    Example:

    >>> meaning = OutputMeaning("sigmoid", from_logits=False)
    >>> f, g = keras.ops.array([[0.9]]), keras.ops.array([[0.1]])
    >>> meaning.divergence(f, g)  # .9 log 9 - .1 log 9 = [1.7578]
    """

    kind: str
    from_logits: bool = False
    axis: int = -1
    ignore_class: int | None = None

    def divergence(self, target, output, temperature=1.0, target_meaning=None):
        """T² D(f, g), where f and g are softened by the temperature T.

        The logits of both are divided by T (of probabilities, their logarithms
        are the logits). For numbers T cancels.

        Args:
            target: Tensor, the prediction f. No gradient is stopped here.
            output: Tensor of the same shape, the prediction g.
            temperature: Float > 0, T.
            target_meaning: `OutputMeaning` of the target where it is another
                one: of the same kind, but logits where this is probabilities,
                or the other way round. `None`: the same.

        Returns:
            float32 tensor, one number for each position: the output's shape
            without its axis of classes. `masked_mean` of `blogkeras.ops` with
            the mask of `positions` makes means of samples or of the batch.
        """
        target_meaning = target_meaning or self
        if target_meaning.kind != self.kind:
            raise ValueError(
                "Expected two outputs of one kind. Received: "
                f"{target_meaning.kind!r} and {self.kind!r}"
            )
        target, output = target_meaning._last(target), self._last(output)
        if self.kind == "numbers":
            return ops.mean(ops.square(target - output), axis=-1)
        f = target_meaning._log_probabilities(target, temperature)
        g = self._log_probabilities(output, temperature)
        kl = sum(
            ops.exp(p) * (p - q) for p, q in zip(f, g, strict=True)
        )  # of each class, or of each label
        total = ops.sum if self.kind == "softmax" else ops.mean
        return temperature**2 * total(kl, axis=-1)

    def features(self, output):
        """Coordinates φ in which D is, for small steps, half a squared length.

            D(f, f + δ) = ½ ‖φ(f + δ) - φ(f)‖² + O(δ³)

        so that ½ Σᵢ ‖∇φᵢ‖² is how much D grows with noise at the input. φ is 2
        √fᵢ for classes; 2 √(pᵢ / n), 2 √((1 - pᵢ) / n) for n labels; √(2 / n)
        fᵢ for n numbers.

        Returns:
            float32 tensor `(positions..., features)`.
        """
        output = self._last(output)
        size = ops.cast(ops.shape(output)[-1], "float32")
        if self.kind == "numbers":
            return ops.sqrt(2.0 / size) * output
        log_f = self._log_probabilities(output, 1.0)
        if self.kind == "softmax":
            return 2 * ops.exp(0.5 * log_f[0])
        halves = [ops.exp(0.5 * x) for x in log_f]
        return 2 / ops.sqrt(size) * ops.concatenate(halves, axis=-1)

    def log_probabilities(self, output):
        """Logarithms of the probabilities, float32.

        Returns:
            For classes `(positions..., classes)`; for labels
            `(positions..., labels, 2)`, first that the label is 0.
        """
        if self.kind == "numbers":
            raise ValueError(
                "Expected an output of probabilities: those of numbers are "
                "not known. Received: an output of kind 'numbers'"
            )
        log_f = self._log_probabilities(self._last(output), 1.0)
        if self.kind == "softmax":
            return log_f[0]
        return ops.stack(log_f[::-1], axis=-1)

    def positions(self, output, y=None):
        """Which positions count in the loss, a boolean tensor or `None`: all.

        Those that are not masked in the output and, where labels are given,
        whose label is not `ignore_class`.

        Args:
            output: Tensor as the model returned it, with its mask.
            y: Tensor, the labels, if any.

        Returns:
            Boolean tensor of the shape of `divergence`, or of its first axes.
        """
        mask = get_keras_mask(output)
        rank = max(len(output.shape) - 1, 1)
        if mask is not None and len(mask.shape) > rank:
            raise ValueError(
                "Expected a mask with at most the axes of the output without "
                "its classes; a layer passes on the mask of other axes. "
                f"Received: mask of shape {tuple(mask.shape)} at an output of "
                f"shape {tuple(output.shape)}"
            )
        if self.ignore_class is None or y is None:
            return None if mask is None else ops.cast(mask, "bool")
        y = ops.convert_to_tensor(y)
        if len(y.shape) == rank + 1 and y.shape[-1] == 1:
            y = ops.squeeze(y, -1)
        known = ops.not_equal(y, ops.cast(self.ignore_class, y.dtype))
        if mask is None:
            return known
        mask = ops.cast(mask, "bool")
        for _ in range(rank - len(mask.shape)):
            mask = ops.expand_dims(mask, -1)
        return ops.logical_and(mask, known)

    def _last(self, output):
        """The output in float32, its classes on the last axis."""
        output = ops.cast(output, "float32")
        if len(output.shape) < 2 and self.kind != "softmax":
            # One label or number a sample.
            return ops.expand_dims(output, -1)
        if self.axis not in (-1, len(output.shape) - 1):
            output = ops.moveaxis(output, self.axis, -1)
        if self.kind == "softmax" and (
            len(output.shape) < 2 or output.shape[-1] == 1
        ):
            raise ValueError(
                "Expected probabilities or logits of at least two classes. One "
                "unit is the probability of a label: compile with "
                "'binary_crossentropy', or give output_kind='sigmoid'. "
                f"Received: output of shape {tuple(output.shape)}"
            )
        return output

    def _log_probabilities(self, output, temperature):
        """Of the classes, a list of one; or that a label is 1, that it is 0."""
        floor = keras.config.epsilon()
        if self.kind == "softmax":
            if not self.from_logits:
                output = ops.log(ops.maximum(output, floor))
            return [ops.log_softmax(output / temperature, axis=-1)]
        if not self.from_logits:
            # 1 - floor is a float32 below 1.
            output = ops.clip(output, floor, 1 - floor)
            output = ops.log(output) - ops.log1p(-output)
        output = output / temperature
        return [ops.log_sigmoid(output), ops.log_sigmoid(-output)]


def read_outputs(model, outputs, output_kind=None, from_logits=None):
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
    losses = output_losses(model, outputs)
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


def known_outputs(model):
    """The symbolic outputs of a model whose graph is known, else `None`."""
    if isinstance(model, keras.Sequential):
        return model.outputs[0] if model.built and model.outputs else None
    return getattr(model, "_outputs_struct", None)


def output_names(model, outputs):
    """A name for each flat output: the model's own where it has them."""
    flat = tree.flatten(outputs)
    names = getattr(model, "output_names", None)
    if names is not None and len(names) == len(flat):
        return list(names)
    return [
        "/".join(map(str, path)) or "output"
        for path, _ in tree.flatten_with_path(outputs)
    ]


def spread(value, outputs, model=None, argument="value"):
    """A value for each flat output, from one value, a list or a dict.

    Args:
        value: One value for all outputs, or a list (one for each), or a dict by
            the outputs' names or keys; what is left out of a dict gets `None`.
        outputs: The structure of the outputs.
        model: The model, for the outputs' names.
        argument: String. The argument's name, for the message.

    Returns:
        A list in the order of `keras.tree.flatten(outputs)`.
    """
    return [
        values[0] if values else None
        for values in _spread(value, outputs, model, argument, several=False)
    ]


def output_losses(model, outputs):
    """The compiled losses of each flat output, a list of lists."""
    loss = getattr(model, "loss", None)
    # A `CompileLoss` object holds what the user gave.
    loss = getattr(loss, "_user_loss", loss)
    found = _spread(loss, outputs, model, "loss", several=True)
    return [[x for x in losses if x is not None] for losses in found]


def check_output_arguments(output_kind, from_logits):
    """Raises a `ValueError` for values that `read_outputs` does not take.

    For constructors, which do not know the outputs yet.
    """
    for kind in _leaves(output_kind):
        check_choice("output_kind", kind, (*KINDS, None))
    for value in _leaves(from_logits):
        if value is not None:
            check_boolean("from_logits", value)


def _leaves(value):
    """The values in a list, tuple or dict; a single value as a list."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _spread(value, outputs, model, argument, several):
    """As `spread`, but with a list of values for each output.

    Keras also takes a list of losses for one output, which it adds. `several`
    allows that.
    """
    flat = tree.flatten(outputs)
    numbers = tree.pack_sequence_as(outputs, list(range(len(flat))))
    result = [[] for _ in flat]
    names = getattr(model, "output_names", None)
    if (
        isinstance(value, dict)
        and not isinstance(outputs, dict)
        and names is not None
        and len(names) == len(flat)
    ):
        # Keras takes a dict by name for a list of outputs, too.
        numbers = dict(zip(names, range(len(flat)), strict=True))

    def fail():
        raise ValueError(
            f"Expected `{argument}` to be one value for all outputs, or a list "
            "or dict with one for each output. The outputs are "
            f"{output_names(model, outputs)}. Received: {argument}={value!r}"
        )

    def walk(value, numbers):
        inner = tree.flatten(numbers)
        if isinstance(value, dict):
            if not isinstance(numbers, dict) or not set(value) <= set(numbers):
                fail()
            for key, part in value.items():
                walk(part, numbers[key])
        elif isinstance(value, (list, tuple)):
            plain = not any(isinstance(x, (list, tuple, dict)) for x in value)
            if plain and len(value) == len(inner):
                for number, part in zip(inner, value, strict=True):
                    result[number].append(part)
            elif isinstance(numbers, (list, tuple)):
                if len(value) != len(numbers):
                    fail()
                for part, number in zip(value, numbers, strict=True):
                    walk(part, number)
            elif several and plain and len(inner) == 1:
                result[inner[0]].extend(value)
            else:
                fail()
        else:
            for number in inner:
                result[number].append(value)

    walk(value, numbers)
    return result


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
