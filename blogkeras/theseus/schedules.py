"""Replacement rates that grow in training."""

import math

import keras
from keras import ops

from blogkeras.arguments import check_integer, check_number


@keras.saving.register_keras_serializable(package="blogkeras")
class LinearReplacement(keras.optimizers.schedules.LearningRateSchedule):
    """A replacement rate that grows in a straight line up to 1.

        rate(t) = min(1, slope · t + start)

    Args:
        slope: Float ≥ 0, the growth per training step.
        start: Float in [0, 1], the rate of the first step.

    Raises:
        ValueError: on numbers out of range.

    Example:

    >>> round(float(LinearReplacement(slope=0.0006, start=0.3)(500)), 3)
    0.6

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925), curriculum
        replacement
    """

    def __init__(self, slope: float, start: float = 0.0) -> None:
        super().__init__()
        self.slope = check_number("slope", slope, minimum=0)
        self.start = check_number("start", start, 0, 1)

    def __call__(self, step):
        step = ops.cast(step, "float32")
        return ops.minimum(1.0, self.slope * step + self.start)

    def get_config(self):
        return {"slope": self.slope, "start": self.start}


@keras.saving.register_keras_serializable(package="blogkeras")
class CosineReplacement(keras.optimizers.schedules.LearningRateSchedule):
    """A replacement rate that grows along half a cosine wave up to 1.

        rate(t) = 1 - (1 - start) (1 + cos(π min(1, t / steps))) / 2

    Args:
        steps: Integer ≥ 1, the training steps until the rate is 1.
        start: Float in [0, 1], the rate of the first step.

    Raises:
        ValueError: on numbers out of range.

    Example:

    >>> round(float(CosineReplacement(steps=1000, start=0.5)(500)), 3)
    0.75

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925), whose curriculum is
        linear; the wave is that of
        [Loshchilov and Hutter, 2017](https://arxiv.org/abs/1608.03983)
    """

    def __init__(self, steps: int, start: float = 0.0) -> None:
        super().__init__()
        self.steps = check_integer("steps", steps, minimum=1)
        self.start = check_number("start", start, 0, 1)

    def __call__(self, step):
        part = ops.minimum(1.0, ops.cast(step, "float32") / float(self.steps))
        return 1 - (1 - self.start) * (1 + ops.cos(math.pi * part)) / 2

    def get_config(self):
        return {"steps": self.steps, "start": self.start}


def check_rate(name, rate):
    """A replacement rate: a number in [0, 1], or a function of the step."""
    return rate if callable(rate) else check_number(name, rate, 0, 1)


def serialized_rate(rate):
    """The config of a schedule; a number as it is."""
    return keras.saving.serialize_keras_object(rate) if callable(rate) else rate
