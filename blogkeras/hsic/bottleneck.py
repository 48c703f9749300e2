"""Training without back-propagation between layers."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    as_numpy,
    check_choice,
    check_integer,
    check_integers,
    check_layer,
    check_number,
)
from blogkeras.hsic.distance_kernels import GaussianKernel
from blogkeras.hsic.layers import gather, gathered, num_features, unmasked
from blogkeras.hsic.statistic import Resolvent
from blogkeras.models import CompositeModel

READOUTS = ("unformatted", "format")
# Decay of the counts of units and classes, per step.
MEMORY = 0.99


@keras.saving.register_keras_serializable(package="blogkeras")
class HSICBottleneck(CompositeModel):
    """Trains each layer by its own objective, without gradients between layers.

    With Z_l the output of layer l on a batch X with labels Y (one-hot):

        loss_l = nHSIC(Z_l, X) − λ nHSIC(Z_l, Y)

    which makes Z_l independent of the input and dependent on the label
    (`nhsic`, with Gaussian kernels exp(−‖x₁ − x₂‖² / (2σ² dim)) everywhere).
    The loss is the sum over the layers, and the gradient is stopped at each
    layer's input. So all layers are trained in one forward pass, and the terms
    of X and Y alone are computed once.

    `fit`, `evaluate` and `predict` work as in any model; `predict` gives scores
    `(batch, num_classes)`. There are two ways to compute them from the last
    layer:

        "unformatted"   the units themselves. Each class has one unit, matched
                        greedily by how often the unit was the largest for the
                        class in training. This needs at least `num_classes`
                        units and a last layer with softmax. The objective
                        depends on distances alone and moves classes apart;
                        on a simplex the points farthest from each other are
                        the corners, where one unit is 1. After "relu",
                        "sigmoid" or "tanh" the classes are as far apart, but
                        the same unit may be the largest for several of them.
        "format"        a linear layer with softmax on the outputs of the last
                        layer, trained by cross-entropy; its gradient stops
                        there. To train it alone, after the layers, set
                        `layer.trainable = False` on them and compile again.

    Replicas are gathered as in `HSICLoss`; sample weights are the sample
    measure. Layers with no trainable weights have no objective. The objective
    is computed in float32 under every dtype policy; in training mode the model
    returns all the layers' outputs.

    Symbols: λ is `label_weight`, σ is `bandwidth`.

    Args:
        layers: List of Keras layers, `Sequential` blocks included, applied one
            after the other. Normalization inside a block (before the
            activation) is what the paper uses.
        num_classes: Integer ≥ 2.
        readout: `"unformatted"` or `"format"`.
        bandwidth: Float > 0, σ.
        label_weight: Float ≥ 0, λ.
        epsilon: Float > 0, the ridge of `nhsic`.

    Call arguments:
        x: `(batch, ...)`. Labels for `fit` are integers `(batch,)` or
            `(batch, 1)`, or one-hot `(batch, num_classes)`. The result is
            `(batch, num_classes)`.

    Raises:
        ValueError: without layers, on numbers out of range, on a last layer of
            fewer than `num_classes` units for `"unformatted"`, and on labels
            out of range.

    Example:

    >>> layers = [
    ...     keras.layers.Dense(64, "relu"), keras.layers.Dense(3, "softmax")
    ... ]
    >>> model = HSICBottleneck(layers, num_classes=3)
    >>> model.compile("adam", metrics=["accuracy"])
    >>> x, y = np.random.rand(32, 8), np.random.randint(0, 3, 32)
    >>> history = model.fit(x, y, verbose=0)
    >>> model.predict(x, verbose=0).shape
    (32, 3)

    Departs from the paper's script:
        The script repeats the forward pass for every layer, after the update of
        the one before, and inverts all matrices each time; it matches the
        units by the labels of the data that are evaluated, here by those of the
        training data.

    Reference:
        [Ma et al., 2020](https://arxiv.org/abs/1908.01580);
        [blog post 6910](https://kexue.fm/archives/6910)
    """

    def __init__(
        self,
        layers: Any,
        num_classes: int,
        readout: Any = "unformatted",
        *,
        bandwidth: float = 5.0,
        label_weight: float = 50.0,
        epsilon: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(layers, (list, tuple)) or not layers:
            raise ValueError(
                "Expected `layers` to be a list of at least one layer. "
                f"Received: layers={layers!r}"
            )
        self.blocks = [check_layer("layers", layer) for layer in layers]
        self.num_classes = check_integer("num_classes", num_classes, minimum=2)
        self.readout = check_choice("readout", readout, READOUTS)
        self.bandwidth = check_number("bandwidth", bandwidth, above=0)
        self.label_weight = check_number(
            "label_weight", label_weight, minimum=0
        )
        self.epsilon = check_number("epsilon", epsilon, above=0)
        self.head = None
        if readout == "format":
            self.head = keras.layers.Dense(
                self.num_classes,
                activation="softmax",
                dtype="float32",
                name="format",
            )

    def build(self, input_shape):
        shape = tuple(input_shape)
        for block in self.blocks:
            if not block.built:
                block.build(shape)
            shape = block.compute_output_shape(shape)
        if self.head is not None:
            self.head.build((None, num_features(shape)))
            return
        if len(shape) != 2 or shape[-1] < self.num_classes:
            raise ValueError(
                "An unformatted read-out needs a last layer of one unit for "
                'each class or more; add one, or use readout="format". '
                f"Received: last output shape {shape}, "
                f"num_classes={self.num_classes}"
            )
        self.activity = self.add_weight(
            (self.num_classes, shape[-1]),
            initializer="zeros",
            trainable=False,
            autocast=False,
            # Every replica assigns the same value.
            aggregation="only_first_replica",
            name="activity",
        )

    def hidden(self, x, training=False):
        """Every layer's output, with the gradient stopped at its input."""
        outputs = []
        for block in self.blocks:
            # The gradient stops, the mask goes on.
            stopped, mask = ops.stop_gradient(x), backend.get_keras_mask(x)
            if mask is not None:
                backend.set_keras_mask(stopped, mask)
            # Pass `training` to each block: on JAX Keras's trainer runs `call`
            # itself, and Keras passes the argument on only in `__call__`.
            x = block(stopped, training=training)
            outputs.append(x)
        return outputs

    def call(self, x, training=False):
        hidden = self.hidden(x, training)
        scores = self.scores(hidden[-1], training)
        if training:
            # Kept with the scores, which `compute_loss` is given: replicas of
            # TensorFlow trace one model in several threads.
            backend.set_tensor_attr(scores, "_blogkeras_hidden", hidden)
        return scores

    def scores(self, last, training=False):
        """The last layer's output as `(batch, num_classes)`."""
        last = ops.stop_gradient(unmasked(last))
        if self.head is not None:
            return self.head(last, training=training)
        return ops.take(last, self.units(), axis=-1)

    def units(self):
        """The unit of each class, `(num_classes,)`, frequent pairs first."""
        counts = ops.convert_to_tensor(self.activity)
        total = ops.sum(counts, axis=1, keepdims=True)
        share = counts / ops.maximum(total, 1e-30)
        num_units = share.shape[1]
        rows = ops.arange(self.num_classes, dtype="int32")
        columns = ops.arange(num_units, dtype="int32")

        def match(_, state):
            share, units = state
            best = ops.cast(ops.argmax(ops.reshape(share, [-1])), "int32")
            row, column = best // num_units, best % num_units
            units = ops.where(rows == row, column, units)
            taken = ops.logical_or((rows == row)[:, None], columns == column)
            return ops.where(taken, -1.0, share), units

        _, units = ops.fori_loop(0, self.num_classes, match, (share, rows))
        return units

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if self.loss is not None:
            raise ValueError(
                "The layers have their own objectives: compile without `loss`. "
                f"Received: loss={self.loss}"
            )
        hidden = backend.get_tensor_attr(y_pred, "_blogkeras_hidden")
        if hidden is None:
            # The scores are those of inference. It changes no state, so that a
            # second pass is harmless (and XLA merges the two).
            hidden = self.hidden(x, training)
        labels = self.one_hot(y)
        x, labels, weight = gathered(unmasked(x), labels, sample_weight)
        target = self.resolvent(x, weight).correlations()
        target -= (
            self.label_weight * self.resolvent(labels, weight).correlations()
        )
        loss = 0.0
        for block, output in zip(self.blocks, hidden, strict=True):
            if block.trainable_variables:
                output = gather(unmasked(output))
                loss += sum(self.resolvent(output, weight).trace_with(target))
        if training and self.head is None:
            self.count(gather(unmasked(hidden[-1])), labels, weight)
        replicas = backend.num_replicas()
        loss = sum((ops.sum(term) for term in self.losses), loss) / replicas
        if self.head is None:
            return loss
        entropy = keras.losses.CategoricalCrossentropy()
        entropy = entropy(self.one_hot(y), y_pred, sample_weight)
        return loss + ops.cast(entropy, "float32")

    def resolvent(self, x, weight):
        """The `Resolvent` of the kernel matrix of a batch's rows `x`."""
        kernel = GaussianKernel(
            self.bandwidth, form="standard", per_dimension=True
        )
        # Pictures and tokens may be integers.
        x = ops.cast(x, "float32")
        x = x / (self.bandwidth * kernel.scale(x.shape[-1]))
        return Resolvent(kernel.rows(x, None), weight, self.epsilon)

    # In a compiled step values are not known, so arrays are checked before.

    @as_in_keras
    def fit(self, x=None, y=None, validation_data=None, **kwargs):
        self._check_labels(y, validation_data)
        return super().fit(x, y, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        self._check_labels(y)
        return super().evaluate(x, y, *args, **kwargs)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        self._check_labels(y)
        return super().train_on_batch(x, y, *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        self._check_labels(y)
        return super().test_on_batch(x, y, *args, **kwargs)

    def _check_labels(self, *labels):
        for y in labels:
            if isinstance(y, (list, tuple)) and len(y) in (2, 3):
                y = y[1]  # of `validation_data`
            if y is None or not (hasattr(y, "shape") or isinstance(y, list)):
                continue
            if not backend.is_concrete(y):
                continue
            y = as_numpy(y)
            if y.ndim == 2 and y.shape[1] == self.num_classes:
                sums = y.sum(axis=1, dtype="float64")
                if y.min(initial=0) < 0 or not np.allclose(sums, 1, atol=1e-3):
                    raise ValueError(
                        "Expected one-hot labels, or probabilities. Received: "
                        f"rows of sums from {sums.min():g} to {sums.max():g}"
                    )
                continue
            if y.shape not in ((len(y),), (len(y), 1)):
                raise ValueError(
                    "Expected labels of shape (batch,), (batch, 1) or (batch, "
                    f"{self.num_classes}). Received: shape {y.shape}"
                )
            if y.dtype.kind == "f" and (y == np.round(y)).all():
                y = y.astype("int64")  # as in Keras's data sets
            check_integers("labels", y, 0, self.num_classes - 1)

    def one_hot(self, y):
        """Labels as `(batch, num_classes)`; NaN of a class out of range."""
        if len(y.shape) == 2 and y.shape[-1] == self.num_classes:
            return ops.cast(y, "float32")
        y = ops.reshape(y, [-1])
        labels = ops.cast(y, "int32")
        known = ops.logical_and(labels >= 0, labels < self.num_classes)
        known = ops.logical_and(known, ops.cast(labels, y.dtype) == y)
        encoded = ops.one_hot(labels, self.num_classes, dtype="float32")
        return ops.where(known[:, None], encoded, math.nan)

    def count(self, last, labels, weight):
        """Which unit is the strongest, for each class."""
        strongest = ops.one_hot(
            ops.argmax(last, axis=-1), last.shape[-1], dtype="float32"
        )
        if weight is not None:
            labels = labels * weight[:, None]
        counts = ops.matmul(ops.transpose(labels), strongest)
        counts = ops.cast(counts, self.activity.dtype)
        self.activity.assign(MEMORY * self.activity + counts)

    def get_config(self):
        return {
            **super().get_config(),
            "layers": [
                keras.saving.serialize_keras_object(b) for b in self.blocks
            ],
            "num_classes": self.num_classes,
            "readout": self.readout,
            "bandwidth": self.bandwidth,
            "label_weight": self.label_weight,
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_config(cls, config):
        layers = map(keras.saving.deserialize_keras_object, config["layers"])
        return cls(**{**config, "layers": list(layers)})
