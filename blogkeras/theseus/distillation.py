"""Distillation, a baseline of module replacement."""

import inspect
from typing import Any

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import check_layer, check_number
from blogkeras.graph import freeze
from blogkeras.models import CompositeModel
from blogkeras.outputs import (
    UnreadableLossError,
    check_output_arguments,
    known_outputs,
    output_losses,
    output_names,
    read_outputs,
    spread,
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

    Without labels (`fit(x)`) the divergence alone is learned: α T² D.
    `evaluate` gives the plain loss; without labels, the divergence.

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

    Raises:
        ValueError: by `compile`, or at the latest in the first step, where
            neither the loss nor an argument determines what an output means,
            and where they contradict each other.

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
        [Hinton et al., 2015](https://arxiv.org/abs/1503.02531)
    """

    def __init__(
        self,
        teacher: keras.layers.Layer,
        student: keras.layers.Layer,
        temperature: float = 2.0,
        weight: float = 0.5,
        from_logits: Any = None,
        output_kind: str | None = None,
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
        self.supports_masking = True
        self.built = student.built

    @property
    def output_names(self):
        """The student's names, by which Keras finds losses in a dict."""
        return self.student.output_names

    def build(self, input_shape):
        if not self.student.built:
            self.student.build(input_shape)

    def compile(self, *args, **kwargs):
        # Freeze again: other models may share the teacher and have trained it.
        freeze([self.teacher])
        super().compile(*args, **kwargs)
        given = inspect.signature(keras.Model.compile).bind(
            self, *args, **kwargs
        )
        self._loss_weights = given.arguments.get("loss_weights")
        # Check now, if the outputs are known already.
        outputs, target = map(known_outputs, (self.student, self.teacher))
        if outputs is not None and target is not None:
            self._meanings(target, outputs)

    def call(self, inputs, training=False):
        return self.student(inputs, training=training)

    def compute_mask(self, inputs, previous_mask=None):
        return None  # set by the student's layers

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        # Each is a mean over the replica's part of the batch.
        others = sum(ops.sum(loss) for loss in self.losses)
        others = others / backend.num_replicas()
        if y is None:
            return others + self.weight * self._divergence(
                x, None, y_pred, sample_weight
            )
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        soft = self._divergence(x, y, y_pred, sample_weight)
        return (
            (1 - self.weight) * loss
            + self.weight * others
            + self.weight * ops.cast(soft, loss.dtype)
        )

    def _divergence(self, x, y, y_pred, sample_weight):
        """T² D of teacher and student, summed over the outputs, a scalar."""
        target = self.teacher(x, training=False)
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
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("teacher", "student"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


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
