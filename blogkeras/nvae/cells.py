"""Residual cells of encoder and decoder, and their parts."""

import numpy as np
from keras import layers, ops

from blogkeras import backend
from blogkeras.nvae.convolution import Convolution, fan_in_uniform, merge


class BatchNorm(layers.BatchNormalization):
    """Batch normalization with few operations in a training step.

    Results, state and configuration are those of Keras, but a batch with
    numbers that are not finite leaves the moving averages as they are: they
    would never be finite again. On a CPU, TensorFlow needs about a third of the
    time for it and its gradient.
    """

    def call(self, x, training=None):
        if not training or not self.trainable:
            return super().call(x, training=training)
        averages = self.moving_mean, self.moving_variance
        if self.synchronized:
            old = [ops.copy(v.value) for v in averages]
            x = super().call(x, training=training)
            for variable, before in zip(averages, old, strict=True):
                variable.assign(self._kept(variable.value, before))
            return x
        gamma, beta, *old = (
            ops.convert_to_tensor(v)
            for v in (
                self.gamma,
                self.beta,
                self.moving_mean,
                self.moving_variance,
            )
        )
        x, *new = backend.batch_normalization(
            ops.cast(x, "float32"), gamma, beta, self.epsilon
        )
        for variable, before, now in zip(averages, old, new, strict=True):
            now = before * self.momentum + now * (1 - self.momentum)
            variable.assign(self._kept(now, before))
        return ops.cast(x, self.compute_dtype)

    def _kept(self, now, before):
        if not self.momentum:  # the batch's own statistics are asked for
            return now
        return ops.where(ops.isfinite(now), now, before)


class SqueezeExcite(layers.Layer):
    """A number in [0, 1] for each channel, which depends on the picture.

        sigmoid(W₂ relu(W₁ mean(x)))             mean over the positions

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, 1, 1, channels)`: what the channels are scaled by.
    """

    def build(self, input_shape):
        channels = input_shape[-1]
        hidden = max(channels // 16, 4)
        self.squeeze, self.excite = (
            layers.Dense(
                units,
                activation,
                kernel_initializer=fan_in_uniform,
                dtype=self.dtype_policy,
                name=name,
            )
            for units, activation, name in (
                (hidden, "relu", "squeeze"),
                (channels, "sigmoid", "excite"),
            )
        )
        self.squeeze.build((None, channels))
        self.excite.build((None, hidden))

    def call(self, x):
        return self.excite(self.squeeze(ops.mean(x, axis=(1, 2))))[
            :, None, None
        ]


class Reduction(layers.Layer):
    """The shortcut around a cell: half the sides, twice the channels.

    Four convolutions of size 1 take the even and odd rows and columns; each
    gives a quarter of the output's channels.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height / 2, width / 2, 2 · channels)`.
    """

    # The corners in the published order.
    corners = (0, 0), (1, 1), (0, 1), (1, 0)

    def build(self, input_shape):
        channels = input_shape[-1]
        quarter = 2 * channels // 4
        filters = [quarter] * 3 + [2 * channels - 3 * quarter]
        self.parts = [
            Convolution(count, 1, dtype=self.dtype_policy, name=f"part_{i}")
            for i, count in enumerate(filters)
        ]
        for part in self.parts:
            part.build(input_shape)

    def call(self, x):
        _, height, width, channels = x.shape
        # Splits have cheaper gradients than slices with a step have.
        x = ops.reshape(ops.silu(x), (-1, height // 2, 2, width, channels))
        corners = []
        for rows in ops.split(x, 2, axis=2):
            rows = ops.reshape(rows, (-1, height // 2, width // 2, 2, channels))
            corners.append([ops.squeeze(y, 3) for y in ops.split(rows, 2, 3)])
        return ops.concatenate(
            [
                part(corners[row][column])
                for part, (row, column) in zip(
                    self.parts, self.corners, strict=True
                )
            ],
            axis=-1,
        )

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        return batch, height // 2, width // 2, 2 * channels


class Enlargement(layers.Layer):
    """The shortcut around a cell: twice the sides, half the channels.

    Bilinear, corners on corners. The convolution of size 1 comes first, which
    gives the same numbers at a quarter of the cost.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, 2 · height, 2 · width, channels / 2)`.
    """

    def build(self, input_shape):
        self.convolution = Convolution(
            input_shape[-1] // 2,
            1,
            use_bias=False,
            dtype=self.dtype_policy,
            name="convolution",
        )
        self.convolution.build(input_shape)

    def call(self, x):
        x = self.convolution(x)
        _, height, width, channels = x.shape
        rows, columns = (
            ops.convert_to_tensor(_interpolation(size), x.dtype)
            for size in (height, width)
        )
        x = ops.matmul(rows, ops.reshape(x, (-1, height, width * channels)))
        x = ops.matmul(columns, ops.reshape(x, (-1, width, channels)))
        return ops.reshape(x, (-1, 2 * height, 2 * width, channels))

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        return batch, 2 * height, 2 * width, channels // 2


def _interpolation(size):
    """`(2 size, size)`: linear, with the first and the last points fixed."""
    positions = np.linspace(0, size - 1, 2 * size)
    distances = np.abs(positions[:, None] - np.arange(size))
    return np.maximum(1 - distances, 0).astype("float32")


class Cell(layers.Layer):
    """x + 0.1 · residual(x): the base class of the cells.

    Args:
        squeeze_excite: Boolean.
        batch_norm: Boolean.
    """

    def __init__(self, squeeze_excite=True, batch_norm=True, **kwargs):
        super().__init__(**kwargs)
        self.squeeze_excite = squeeze_excite
        self.batch_norm = batch_norm

    def _add(self, layer, input_shape):
        """Builds a part of the cell."""
        layer.build(input_shape)
        return layer

    def _norm(self, name, channels):
        if not self.batch_norm:
            return self._add(layers.Identity(name=name), (channels,))
        norm = BatchNorm(
            momentum=0.95,
            epsilon=1e-5,
            # On JAX arrays are global, so batches are whole anyway.
            synchronized=backend.num_replicas() > 1,
            dtype=self.dtype_policy,
            name=name,
        )
        return self._add(norm, (None, None, None, channels))

    def _convolution(self, name, channels, *args, **kwargs):
        return self._add(
            Convolution(*args, **kwargs, dtype=self.dtype_policy, name=name),
            (None, None, None, channels),
        )

    def _scaled(self, h):
        """0.1 · h, by channel where cells scale their channels."""
        return h * (0.1 * self.scale(h)) if self.squeeze_excite else 0.1 * h

    def _part(self, cls, name, input_shape):
        return self._add(cls(dtype=self.dtype_policy, name=name), input_shape)


class ResidualCell(Cell):
    """The encoder's cell: twice batch norm, swish, convolution 3 × 3.

    Args:
        down: Boolean. Whether sides are halved and channels doubled.

    Input shape: `(batch, height, width, channels)`.
    """

    def __init__(self, down=False, **kwargs):
        super().__init__(**kwargs)
        self.down = down

    def build(self, input_shape):
        inputs = input_shape[-1]
        outputs = 2 * inputs if self.down else inputs
        self.norm_1 = self._norm("norm_1", inputs)
        self.conv_1 = self._convolution(
            "conv_1", inputs, outputs, 3, strides=2 if self.down else 1
        )
        self.norm_2 = self._norm("norm_2", outputs)
        self.conv_2 = self._convolution("conv_2", outputs, outputs, 3)
        if self.squeeze_excite:
            self.scale = self._part(
                SqueezeExcite, "scale", (None, None, None, outputs)
            )
        if self.down:
            self.skip = self._part(Reduction, "skip", input_shape)

    def call(self, x, training=None):
        h = self.conv_1(ops.silu(self.norm_1(x, training=training)))
        h = self.conv_2(ops.silu(self.norm_2(h, training=training)))
        return (self.skip(x) if self.down else x) + self._scaled(h)

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        if self.down:
            return batch, height // 2, width // 2, 2 * channels
        return input_shape


class InvertedCell(Cell):
    """The decoder's cell: many channels, with depthwise convolutions.

    Batch norm; 1 × 1 to `expansion` times as many channels, batch norm, swish;
    5 × 5 of each channel, batch norm, swish; 1 × 1 back, batch norm. These
    convolutions have no trained norms.

    Args:
        expansion: Integer.
        up: Boolean. Whether sides are doubled and channels halved.

    Input shape: `(batch, height, width, channels)`.
    """

    def __init__(self, expansion=6, up=False, **kwargs):
        super().__init__(**kwargs)
        self.expansion = expansion
        self.up = up

    def build(self, input_shape):
        inputs = input_shape[-1]
        outputs = inputs // 2 if self.up else inputs
        wide = self.expansion * inputs
        plain = {"weight_norm": False, "use_bias": False}
        self.norm_1 = self._norm("norm_1", inputs)
        self.widen = self._convolution("widen", inputs, wide, 1, **plain)
        self.norm_2 = self._norm("norm_2", wide)
        self.depthwise = self._convolution(
            "depthwise", wide, wide, 5, depthwise=True, **plain
        )
        self.norm_3 = self._norm("norm_3", wide)
        self.narrow = self._convolution("narrow", wide, outputs, 1, **plain)
        self.norm_4 = self._norm("norm_4", outputs)
        if self.squeeze_excite:
            self.scale = self._part(
                SqueezeExcite, "scale", (None, None, None, outputs)
            )
        if self.up:
            self.skip = self._part(Enlargement, "skip", input_shape)

    def call(self, x, training=None):
        h = self.widen(self.norm_1(x, training=training))
        h = ops.silu(self.norm_2(h, training=training))
        # Published: rows and columns are repeated first of all. Operations on
        # single positions, and the statistics of a batch, do not depend on
        # where the positions are. So only the outputs, which have the fewest
        # channels, are put in their places.
        h = self.depthwise.doubled(h) if self.up else self.depthwise(h)
        h = ops.silu(self.norm_3(h, training=training))
        h = self.norm_4(self.narrow(h), training=training)
        if self.up:
            return self.skip(x) + self._scaled(merge(h))
        return x + self._scaled(h)

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        if self.up:
            return batch, 2 * height, 2 * width, channels // 2
        return input_shape
