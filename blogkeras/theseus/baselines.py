"""What module replacement is compared with."""

import keras
from keras import ops

from blogkeras.backend import get_keras_mask
from blogkeras.ops import masked_mean


@keras.saving.register_keras_serializable(package="blogkeras")
class Distillation(keras.Model):
    """Trains a small model on labels and on the predictions of a large one.

    With the logits z of the teacher and s of the student, temperature T and
    weight α, the loss is, per prediction,

        (1 - α) loss(y, s) + α T² KL(softmax(z / T) ‖ softmax(s / T))

    `evaluate` gives the plain loss. Masked positions and the sample weights
    count in the divergence as in the loss.

    Args:
        teacher: Trained model. It is frozen (`trainable = False`) and runs as
            in inference.
        student: Model with outputs of the same shape.
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
        teacher.trainable = False
        self.teacher, self.student = teacher, student
        self.temperature, self.weight = temperature, weight
        self.from_logits = from_logits
        self.supports_masking = True
        self.built = student.built

    def build(self, input_shape):
        if not self.student.built:
            self.student.build(input_shape)

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
        mask = get_keras_mask(y_pred)
        target = self._logits(self.teacher(x, training=False))
        target = ops.log_softmax(target / self.temperature)
        found = ops.log_softmax(self._logits(y_pred) / self.temperature)
        divergence = ops.sum(ops.exp(target) * (target - found), axis=-1)
        if sample_weight is not None:
            weights = ops.cast(sample_weight, divergence.dtype)
            for _ in range(len(divergence.shape) - len(weights.shape)):
                weights = ops.expand_dims(weights, -1)
            divergence = divergence * weights
        soft = masked_mean(divergence, mask) * self.temperature**2
        return (1 - self.weight) * loss + self.weight * ops.cast(
            soft, loss.dtype
        )

    def _logits(self, outputs):
        outputs = ops.cast(outputs, "float32")
        if self.from_logits:
            return outputs
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
