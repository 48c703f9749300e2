"""Distillation, a baseline of module replacement."""

import itertools
from typing import Any

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    check_choice,
    check_integer,
    check_layer,
    check_number,
)
from blogkeras.graph import by_name, freeze
from blogkeras.models import CompositeModel, symbolic_inputs
from blogkeras.outputs import (
    UnreadableLossError,
    check_output_arguments,
    known_outputs,
    output_losses,
    output_names,
    read_outputs,
    spread,
)
from blogkeras.theseus.hidden import (
    KINDS,
    HiddenLoss,
    call_with_hidden,
    check_pair,
    hidden_shapes,
    inputs_of,
    read_pairs,
    sublayer,
)


@keras.saving.register_keras_serializable(package="blogkeras")
class Distillation(CompositeModel):
    """Trains a small model on labels and on the predictions of a large one.

    With the teacher's prediction z and the student's s of one position,
    temperature T and weight α, the loss is

        (1 - α) loss(y, s) + α T² D(z, s)

    where D, at temperature T, depends on what the output means, which is read
    off the compiled loss (see `blogkeras.outputs.read_outputs`):

    - classes: KL(softmax(z / T) ‖ softmax(s / T)) of the logits z and s;
    - labels, by a binary cross-entropy: the mean over the labels of the
      divergence of sigmoid(z / T) and sigmoid(s / T);
    - numbers, by `"mse"` and the like: the mean of (z - s)²; T cancels.

    The logits of probabilities are their logarithms. Masked positions,
    positions that the loss ignores, sample weights and `loss_weights` count in
    the divergence as in the loss. Several outputs are learned together; one
    without a loss is left out. Losses of the layers (regularizers, `add_loss`)
    are added without a factor.

    Without labels (`fit(x)`) the divergence alone is learned: α T² D. Keras
    ignores sample weights of arrays without labels, so they are refused there;
    with α = 1 labels of any value will do. The metrics given to `compile`
    compare with labels, and are in the logs of labelled data alone.
    `evaluate` gives the plain loss; without labels, all that `fit(x)` learns,
    hidden states included.

    With `hidden`, the student also learns what lies inside of the teacher: the
    mean over pairs of layers, times `hidden_weight`, of the distance of the
    teacher's hidden state z and the student's s, by its kind:

    - `"mse"`: the mean of (z - W s)²; W, a Dense layer of the distillation, is
      there only where the sizes differ (FitNets, TinyBERT);
    - `"cosine"`: 1 - cos(z, s) (DistilBERT; half of the patient loss);
    - `"relation"`: KL(softmax(Z Zᵀ/√d) ‖ softmax(S Sᵀ/√d)) over all positions,
      for vectors that are cut into `hidden_heads` (MiniLM); for any sizes;
    - `"attention"`: the same divergence of layers whose output is attention
      itself, probabilities `(batch, heads, positions, positions)`.

    It is a mean over positions; masked positions and sample weights count as in
    the loss. With `weight=0` the outputs are not compared, and may differ: two
    backbones without heads, say, trained by `fit(x)`.

    Where `x` is a dict, teacher and student each take their own inputs out of
    it, by name. So they may have different tokenizers.

    Args:
        teacher: Trained model. It is frozen (`trainable = False`), here and
            again by `compile`, and runs as in inference. Whether it returns
            logits is read off its own loss if it is compiled, else off the loss
            of the distillation.
        student: Model with outputs of the same shapes.
        temperature: Float > 0, T.
        weight: Float in [0, 1], α.
        from_logits: Boolean. Whether the models return logits. `None` reads it
            off the loss. A list or dict of booleans for several outputs.
        output_kind: `"softmax"`, `"sigmoid"` or `"numbers"`, or a list or dict
            of these for several outputs: what the outputs are, where that
            cannot be read off the loss (a function of your own) or is to be
            different.
        hidden: `"blocks"`: the ends of the blocks of two transformers, evenly
            mapped; or a list of pairs, a layer of the teacher and one of the
            student, by name or the layers themselves, anywhere inside of the
            models. (Keras gives layers inside of others new names when it loads
            them, so the attribute `hidden` has numbers for these.) A third
            entry is the pair's own kind. Of a layer with several outputs the
            first one counts.
        hidden_loss: `"mse"`, `"cosine"`, `"relation"` or `"attention"`.
        hidden_weight: Float ≥ 0.
        hidden_heads: Integer that divides the sizes; of `"relation"`.

    Raises:
        ValueError: by `compile`, or at the latest in the first step, where
            neither the loss nor an argument determines what an output means,
            and where they contradict each other; where a layer of `hidden` is
            not found or is called several times, or the shapes of a pair do not
            fit.

    Example:

    >>> x, y = np.random.rand(32, 8), np.random.randint(0, 3, 32)
    >>> inputs = keras.Input((8,))
    >>> teacher = keras.Model(inputs, layers.Dense(3, "softmax")(inputs))
    >>> student = keras.Model(inputs, layers.Dense(3, "softmax")(inputs))
    >>> distillation = Distillation(teacher, student, temperature=2)
    >>> distillation.compile("adam", "sparse_categorical_crossentropy")
    >>> history = distillation.fit(x, y, verbose=0)
    >>> student = distillation.detach()

    Reference:
        [Hinton et al., 2015](https://arxiv.org/abs/1503.02531);
        [Sun et al., 2019](https://arxiv.org/abs/1908.09355), patient;
        [Wang et al., 2020](https://arxiv.org/abs/2002.10957), MiniLM
    """

    def __init__(
        self,
        teacher: keras.layers.Layer,
        student: keras.layers.Layer,
        temperature: float = 2.0,
        weight: float = 0.5,
        from_logits: Any = None,
        output_kind: str | None = None,
        *,
        hidden: Any = None,
        hidden_loss: str = "mse",
        hidden_weight: float = 1.0,
        hidden_heads: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        check_layer("teacher", teacher)
        check_layer("student", student)
        self.temperature = check_number("temperature", temperature, above=0)
        self.weight = check_number("weight", weight, 0, 1)
        check_output_arguments(output_kind, from_logits)
        frozen = {id(v) for v in teacher.variables}
        for variable in student.variables:
            if id(variable) in frozen:
                raise ValueError(
                    "Expected a student with weights of its own, as the "
                    "teacher's are frozen; make a copy. Received: "
                    f"{variable.path!r} in both"
                )
        freeze([teacher])
        self.teacher, self.student = teacher, student
        self.from_logits, self.output_kind = from_logits, output_kind
        self._loss_weights = None
        self.hidden_loss = check_choice("hidden_loss", hidden_loss, KINDS)
        self.hidden_weight = check_number("hidden_weight", hidden_weight, 0)
        self.hidden_heads = check_integer("hidden_heads", hidden_heads, 1)
        self.hidden = None
        if hidden is not None:
            self.hidden = read_pairs(hidden, hidden_loss, teacher, student)
            self._make_hidden_maps()
        self.supports_masking = True
        self.built = student.built

    def _hidden_layers(self, side):
        """The teacher's layers, side 0, or the student's, side 1."""
        model = self.student if side else self.teacher
        return [sublayer(model, pair[side]) for pair in self.hidden]

    def _make_hidden_maps(self):
        """A Dense layer for each pair whose sizes differ."""
        self.hidden_maps = [None] * len(self.hidden)
        models = self.teacher, self.student
        if not all(getattr(model, "inputs", None) for model in models):
            return  # sizes are not known yet
        layers = [self._hidden_layers(side) for side in (0, 1)]
        shapes = map(hidden_shapes, models, layers)
        rows = zip(*layers, *shapes, strict=True)
        for index, (*pair, z, s) in enumerate(rows):
            kind = self.hidden[index][-1]
            sizes = kind in ("cosine", "attention")
            check_pair(pair, kind, z, s, self.hidden_heads, sizes)
            if kind == "mse" and z[-1] != s[-1]:
                self.hidden_maps[index] = keras.layers.Dense(
                    z[-1], dtype="float32", name=f"hidden_map_{index}"
                )
                self.hidden_maps[index].build(s)

    @property
    def output_names(self):
        """The student's names, by which Keras finds losses in a dict."""
        return self.student.output_names

    def build(self, input_shape):
        if not self.student.built:
            self.student.build(input_shape)

    @as_in_keras
    def compile(self, loss_weights=None, **kwargs):
        # Freeze again: other models may share the teacher and have trained it.
        freeze([self.teacher])
        super().compile(loss_weights=loss_weights, **kwargs)
        self._loss_weights = loss_weights
        if not self._compares_outputs:
            return
        # Check now, if the outputs are known already.
        outputs, target = map(known_outputs, (self.student, self.teacher))
        if outputs is not None and target is not None:
            self._meanings(target, outputs)

    @property
    def _compares_outputs(self):
        return self.hidden is None or self.weight > 0

    @as_in_keras
    def fit(self, x=None, y=None, sample_weight=None, **kwargs):
        """As in Keras; without `y` the divergence alone is learned."""
        _check_weights_have_labels(y, sample_weight)
        known = kwargs.get("validation_data")
        if isinstance(known, (tuple, list)):
            parts = keras.utils.unpack_x_y_sample_weight(tuple(known))
            _check_weights_have_labels(*parts[1:])
        return super().fit(x, y, sample_weight=sample_weight, **kwargs)

    @as_in_keras
    def evaluate(self, x=None, y=None, sample_weight=None, **kwargs):
        _check_weights_have_labels(y, sample_weight)
        return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        # The metrics given to `compile` compare with labels.
        if y is None:
            return self._results_without_labels()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_metrics_result(self):
        metrics = self._compile_metrics
        if metrics is not None and not metrics.built:  # no labels yet
            return self._results_without_labels()
        return super().get_metrics_result()

    def _results_without_labels(self):
        return {
            metric.name: metric.result()
            for metric in self.metrics
            if metric is not self._compile_metrics
        }

    def call(self, inputs, training=False):
        inputs = _own_inputs(self.student, inputs)
        if self.hidden is None or not training:
            return self.student(inputs, training=training)
        outputs, hidden = call_with_hidden(
            self.student, self._hidden_layers(1), inputs, training
        )
        # Kept with the prediction, which `compute_loss` is given: replicas of
        # TensorFlow trace one model in several threads.
        backend.set_tensor_attr(
            tree.flatten(outputs)[0], "_blogkeras_hidden", hidden
        )
        return outputs

    def _symbolic_inputs(self):
        return symbolic_inputs(self.student)

    def compute_mask(self, inputs, previous_mask=None):
        return None  # set by the student's layers

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        # Each is a mean over the replica's part of the batch.
        others = sum(ops.sum(loss) for loss in self.losses)
        others = others / backend.num_replicas()
        # Before the teacher runs: what its layers give to `add_loss` would
        # count as this model's.
        loss = None
        if y is not None:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        # The teacher runs once, for its hidden states and its predictions.
        target, inside = None, 0.0
        if self.hidden is not None and (training or y is None):
            target, states = call_with_hidden(
                self.teacher,
                self._hidden_layers(0),
                _own_inputs(self.teacher, x),
            )
            inside = self.hidden_weight * self._hidden_distance(
                states, x, y_pred, sample_weight, training
            )
        if y is None:
            loss = others + inside
            if self._compares_outputs:
                loss += self.weight * self._divergence(
                    x, None, y_pred, sample_weight, target
                )
            return loss
        if not training:
            return loss
        if not self._compares_outputs:
            return loss + ops.cast(inside, loss.dtype)
        soft = self._divergence(x, y, y_pred, sample_weight, target)
        return (
            (1 - self.weight) * loss
            + self.weight * others
            + self.weight * ops.cast(soft, loss.dtype)
            + ops.cast(inside, loss.dtype)
        )

    def _hidden_distance(self, states, x, y_pred, sample_weight, training):
        """The mean over the pairs of layers, a scalar.

        Args:
            states: The teacher's hidden states, one for each pair.
            x, y_pred, sample_weight, training: As for `compute_loss`.
        """
        hidden = backend.get_tensor_attr(
            tree.flatten(y_pred)[0], "_blogkeras_hidden"
        )
        if hidden is None:
            # The prediction is not that of `call` in training. Evaluation
            # changes no state, so that a second pass is harmless (and XLA
            # merges the two).
            own = _own_inputs(self.student, x)
            _, hidden = call_with_hidden(
                self.student, self._hidden_layers(1), own, training
            )
        reduction = self._reductions(y_pred)[0]
        total = 0.0
        for (*pair, kind), z, s, mapped in zip(
            self.hidden, states, hidden, self.hidden_maps, strict=True
        ):
            sizes = kind != "relation" and mapped is None
            shapes = tuple(z.shape), tuple(s.shape)
            layers = map(sublayer, (self.teacher, self.student), pair)
            check_pair(layers, kind, *shapes, self.hidden_heads, sizes)
            if mapped is not None:
                s = mapped(s)
            # Keras's losses cast a tensor of another dtype, and the copy has no
            # mask.
            mask = backend.get_keras_mask(s)
            distance = HiddenLoss(kind, self.hidden_heads, reduction, mask)
            weights = _row_weights(sample_weight, s, kind)
            total += distance(ops.stop_gradient(z), s, weights)
        return total / len(self.hidden)

    def _divergence(self, x, y, y_pred, sample_weight, target=None):
        """T² D of teacher and student, summed over the outputs, a scalar.

        `target` is the teacher's prediction, where it is known already.
        """
        if target is None:
            target = self.teacher(_own_inputs(self.teacher, x), training=False)
        meanings = self._meanings(target, y_pred)
        parts = zip(
            tree.flatten(target),
            tree.flatten(y_pred),
            meanings,
            self._reductions(y_pred),
            spread(self._loss_weights, y_pred, self, "loss_weights"),
            spread(sample_weight, y_pred, self, "sample_weight"),
            self._labels(y, y_pred, meanings),
            strict=True,
        )
        total = 0.0
        for z, s, (of_z, of_s), reduction, scale, weights, labels in parts:
            if of_s is None:
                continue
            divergence = _Divergence(
                self.temperature, of_z, of_s, labels, reduction
            )
            found = divergence(ops.stop_gradient(z), s, weights)
            total += found if scale is None else scale * found
        return total

    def _meanings(self, target, y_pred):
        """Pairs of each output's meanings, the teacher's and the student's."""
        theirs, ours = tree.flatten(target), tree.flatten(y_pred)
        shapes = [[tuple(x.shape) for x in side] for side in (theirs, ours)]
        fits = len(theirs) == len(ours) and all(
            len(a) == len(b)
            and all(
                m == n or not isinstance(m, int) or not isinstance(n, int)
                for m, n in zip(a, b, strict=True)
            )
            for a, b in zip(*shapes, strict=True)
        )
        if not fits or (
            isinstance(target, dict)
            and isinstance(y_pred, dict)
            and set(target) != set(y_pred)
        ):
            raise ValueError(
                "Expected teacher and student to have outputs of the same "
                "names and shapes; make models of the outputs to be learned. "
                f"Received: {output_names(self.teacher, target)} of shapes "
                f"{shapes[0]} and {output_names(self.student, y_pred)} of "
                f"shapes {shapes[1]}"
            )
        arguments = self.output_kind, self.from_logits
        ours = read_outputs(self._judge(), y_pred, *arguments)
        if self.from_logits is None:
            self._check_student(y_pred, ours)
        theirs = _read_if_told(self.teacher, target, *arguments)
        pairs = [
            (a if a is not None else b, b)
            for a, b in zip(theirs, ours, strict=True)
        ]
        for name, (a, b) in zip(output_names(self, y_pred), pairs, strict=True):
            if b is not None and a.kind != b.kind:
                raise ValueError(
                    "Expected teacher and student to be compiled with losses "
                    "that mean the same, or `output_kind`. Received: "
                    f"{a.kind!r} and {b.kind!r} for output {name!r}"
                )
        return pairs

    def _check_student(self, y_pred, meanings):
        """Raises if the student is compiled with a loss of another meaning."""
        own = _read_if_told(self.student, y_pred, self.output_kind, None)
        names = output_names(self, y_pred)
        for name, a, b in zip(names, own, meanings, strict=True):
            if a and b and a.kind == b.kind and a.from_logits != b.from_logits:
                raise ValueError(
                    "Expected the loss of the distillation and that of the "
                    "student to agree in whether the student returns logits; "
                    f"give `from_logits` otherwise. Received: {b.from_logits} "
                    f"and {a.from_logits} for output {name!r}"
                )

    def _judge(self):
        """The model whose loss is read: this one if it has a loss."""
        models = (self, self.student, self.teacher)
        return next(
            (m for m in models if getattr(m, "loss", None) is not None), self
        )

    def _reductions(self, y_pred):
        """The reduction of each output's loss, used for the divergence, too."""
        found = [
            getattr(losses[0], "reduction", None) if losses else None
            for losses in output_losses(self._judge(), y_pred)
        ]
        return [
            x if x not in (None, "none") else "sum_over_batch_size"
            for x in found
        ]

    def _labels(self, y, y_pred, meanings):
        """The labels of each output where the loss ignores some, else None."""
        ignoring = any(
            b is not None and b.ignore_class is not None for _, b in meanings
        )
        if y is None or not ignoring:
            return [None] * len(meanings)
        return spread(y, y_pred, self, "y")

    def detach(self):
        """The student."""
        return self.student

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "teacher": serialize(self.teacher),
            "student": serialize(self.student),
            "temperature": self.temperature,
            "weight": self.weight,
            "from_logits": self.from_logits,
            "output_kind": self.output_kind,
            "hidden": self.hidden,
            "hidden_loss": self.hidden_loss,
            "hidden_weight": self.hidden_weight,
            "hidden_heads": self.hidden_heads,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("teacher", "student"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


def _own_inputs(model, x):
    """What a model takes of a dict of inputs, by name; all else as it is.

    Raises:
        ValueError: where one is missing.
    """
    known = isinstance(x, dict) and getattr(model, "inputs", None)
    return by_name(inputs_of(model), x) if known else x


def _check_weights_have_labels(y, sample_weight):
    if y is None and sample_weight is not None:
        raise ValueError(
            "Expected `y` beside `sample_weight`: without labels Keras ignores "
            "the weights of arrays. With `weight=1` labels of any value will "
            f"do. Received: y=None, sample_weight={type(sample_weight)}"
        )


def _row_weights(weights, s, kind):
    """Sample weights for a hidden state: one for each row, or each position.

    Args:
        weights: What `compute_loss` was given.
        s: The hidden state.
        kind: Its kind, one of `KINDS`.
    """
    if weights is None:
        return None
    flat = tree.flatten(weights)
    if len(flat) != 1:
        raise ValueError(
            "Expected one weight for each row with `hidden`. Received: sample "
            "weights of several outputs"
        )
    weights = flat[0]
    # The distance of attention is a mean over the heads.
    positions = s.shape[2:3] if kind == "attention" else s.shape[1:-1]
    while len(weights.shape) > 1 and weights.shape[-1] == 1:
        weights = weights[..., 0]
    if len(weights.shape) == 1:
        ones = [1] * len(positions)
        return ops.reshape(weights, [-1, *ones]) if ones else weights
    if all(
        a == b or None in (a, b)
        for a, b in itertools.zip_longest(
            weights.shape[1:], positions, fillvalue=-1
        )
    ):
        return weights
    raise ValueError(
        "Expected one sample weight for each row, or for each position of the "
        f"hidden states, with `hidden`. Received: {tuple(weights.shape)}"
    )


def _read_if_told(model, outputs, *arguments):
    """The meanings of outputs by a model's own loss; `None` where unknown."""
    if getattr(model, "loss", None) is not None:
        try:
            return read_outputs(model, outputs, *arguments)
        except UnreadableLossError:
            pass
    return [None] * len(tree.flatten(outputs))


class _Divergence(keras.losses.Loss):
    """T² D(z, s) of one output.

    It is a loss, so that Keras handles masks, sample weights and replicas.
    """

    def __init__(self, temperature, of_target, of_output, labels, reduction):
        super().__init__("divergence", reduction, dtype="float32")
        self.temperature = temperature
        self.of_target, self.of_output = of_target, of_output
        self.labels = labels

    def call(self, y_true, y_pred):
        divergence = self.of_output.divergence(
            y_true, y_pred, self.temperature, self.of_target
        )
        if self.labels is not None:
            counted = self.of_output.positions(y_pred, self.labels)
            backend.set_keras_mask(divergence, counted)
        return divergence
