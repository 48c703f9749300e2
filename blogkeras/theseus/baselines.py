"""What module replacement is compared with."""

import keras
from keras import ops

from blogkeras.backend import get_keras_mask, set_keras_mask
from blogkeras.graph import freeze


@keras.saving.register_keras_serializable(package="blogkeras")
class Distillation(keras.Model):
    """Trains a small model on labels and on the predictions of a large one.

    With the logits z of the teacher and s of the student, temperature T and
    weight α, the loss is, per prediction,

        (1 - α) loss(y, s) + α T² KL(softmax(z / T) ‖ softmax(s / T))

    `evaluate` gives the plain loss. Masked positions and the sample weights
    count in the divergence as in the loss.

    Args:
        teacher: Trained model with one output, classes on its last axis; an
            axis of one is the second of two classes (sigmoid). It is frozen
            (`trainable = False`), here and again by `compile`, and runs as in
            inference.
        student: Model with an output of the same shape.
        temperature: Float > 0, T.
        weight: Float in [0, 1], α.
        from_logits: Boolean. Whether the models return logits, else
            probabilities, whose logarithms are then the logits.

    Example:

    >>> distillation = Distillation(teacher, student)
    >>> distillation.compile("adam", "sparse_categorical_crossentropy")
    >>> distillation.fit(x, y)
    >>> student = distillation.detach()

    Reference:
        [Hinton et al., 2015](https://arxiv.org/abs/1503.02531)
    """

    def __init__(
        self,
        teacher,
        student,
        temperature=2.0,
        weight=0.5,
        from_logits=False,
        **kwargs,
    ):
        super().__init__(**{"autocast": False, **kwargs})
        if not temperature > 0 or not 0 <= weight <= 1:
            raise ValueError(
                "Expected `temperature` > 0 and `weight` in [0, 1]. Received: "
                f"temperature={temperature}, weight={weight}"
            )
        for name, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, keras.Layer):
                raise ValueError(
                    f"Expected `{name}` to be a Keras model. "
                    f"Received: {name}={model!r}"
                )
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
        self.temperature, self.weight = temperature, weight
        self.from_logits = from_logits
        self.supports_masking = True
        self.built = student.built

    def build(self, input_shape):
        if not self.student.built:
            self.student.build(input_shape)

    def compile(self, *args, **kwargs):
        # The teacher is others', too, who may have trained it since.
        freeze([self.teacher])
        super().compile(*args, **kwargs)

    def compile_from_config(self, config):
        # Keras does this itself only where `compile` is not overridden.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def call(self, inputs, training=False):
        return self.student(inputs, training=training)

    def compute_mask(self, inputs, previous_mask=None):
        return None  # the student's layers have set it

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        target = self.teacher(x, training=False)
        ends = [getattr(z, "shape", (type(z),))[-1] for z in (target, y_pred)]
        if not isinstance(ends[1], int) or ends[0] != ends[1]:
            raise ValueError(
                "Expected teacher and student to have one output each, with "
                "the same classes on its last axis; make models of the outputs "
                f"to be learned. Received: {ends[0]} and {ends[1]}"
            )
        found = self._logits(y_pred)
        set_keras_mask(found, get_keras_mask(y_pred))
        divergence = _Divergence(self.temperature)
        soft = divergence(
            ops.stop_gradient(self._logits(target)), found, sample_weight
        )
        return (1 - self.weight) * loss + self.weight * ops.cast(
            soft, loss.dtype
        )

    def _logits(self, outputs):
        """Logits of two classes or more, float32."""
        outputs = ops.cast(outputs, "float32")
        one = outputs.shape[-1] == 1
        if self.from_logits:
            other = [ops.zeros_like(outputs)] if one else []
            return ops.concatenate([*other, outputs], axis=-1)
        other = [1 - outputs] if one else []
        outputs = ops.concatenate([*other, outputs], axis=-1)
        return ops.log(ops.maximum(outputs, keras.config.epsilon()))

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
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("teacher", "student"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


class _Divergence(keras.losses.Loss):
    """T² KL(softmax(z / T) ‖ softmax(s / T)) for logits z and s.

    As a loss, so that Keras sees to masks, sample weights and replicas.
    """

    def __init__(self, temperature):
        super().__init__(name="divergence", dtype="float32")
        self.temperature = temperature

    def call(self, y_true, y_pred):
        target = ops.log_softmax(y_true / self.temperature)
        found = ops.log_softmax(y_pred / self.temperature)
        kl = ops.sum(ops.exp(target) * (target - found), axis=-1)
        return self.temperature**2 * kl
