"""What one output of a model means, and how far two predictions are apart."""

import dataclasses
import math

import keras
from keras import ops

from blogkeras.backend import get_keras_mask

KINDS = ("softmax", "sigmoid", "numbers")


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
        # Of each class, or of each label.
        kl = sum(_share(p, q) for p, q in zip(f, g, strict=True))
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


def _share(log_p, log_q):
    """p log p/q from logarithms, and 0 where p is 0."""
    # Of p = 0 the difference may be that of two infinities. It is replaced
    # before it is formed, so that its gradient is no NaN either.
    possible = log_p > -math.inf
    log_p = ops.where(possible, log_p, 0.0)
    log_q = ops.where(possible, log_q, 0.0)
    return ops.exp(log_p) * (log_p - log_q)
