"""Autoregressive flows that keep volumes, behind each posterior."""

import numpy as np
from keras import layers, ops

from blogkeras.nvae.convolution import Convolution


class MaskedConvolution(Convolution):
    """A convolution whose outputs depend on the variables before each one only.

    Variables are ordered by rows, columns and then channels; with `backward`
    the rows and columns run the other way. Outputs are ordered like the inputs
    that they belong to.

    Args:
        strict: Boolean. Whether an output is independent of the input at its
            own place.
        backward: Boolean.
        **kwargs: As for `Convolution`.
    """

    def __init__(self, *args, strict=False, backward=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.strict = strict
        self.backward = backward

    def build(self, input_shape):
        self.mask = self._mask(input_shape[-1])
        super().build(input_shape)

    def _mask(self, channels):
        size = self.kernel_size
        before = np.arange(size**2) < size**2 // 2
        if self.backward:
            before = before[::-1]
        # Channels in equal parts; a part depends on the parts before it and
        # itself.
        parts = min(channels, self.filters)
        outputs = np.arange(self.filters) * parts // self.filters
        if self.depthwise:
            here = np.full((channels, 1), not self.strict)
        else:
            inputs = np.arange(channels) * parts // channels
            here = inputs[:, None] < outputs + (not self.strict)
        mask = np.zeros((size**2, *here.shape), "float32")
        mask[before] = 1
        mask[size**2 // 2] = here
        return mask.reshape(size, size, *here.shape)


class ShiftFlow(layers.Layer):
    """z − μ(z), where the μ of a variable depends on the variables before it.

    The Jacobian is triangular with ones on its diagonal, so volumes are kept:
    the logarithm of the determinant is 0.

    Args:
        backward: Boolean. The order of rows and columns, see
            `MaskedConvolution`.

    Input and output shape: `(batch, height, width, channels)`.
    """

    def __init__(self, backward=False, **kwargs):
        super().__init__(**kwargs)
        self.backward = backward

    def build(self, input_shape):
        channels = input_shape[-1]
        wide = 6 * channels
        self.convolutions = [
            MaskedConvolution(
                *args,
                **kwargs,
                backward=self.backward,
                dtype=self.dtype_policy,
            )
            for args, kwargs in (
                (
                    (wide, 3),
                    {"strict": True, "use_bias": False, "name": "look"},
                ),
                (
                    (wide, 5),
                    {"depthwise": True, "use_bias": False, "name": "depthwise"},
                ),
                # A small μ at the start.
                ((channels, 1), {"gain": 0.1, "name": "shift"}),
            )
        ]
        shape = tuple(input_shape)
        for convolution in self.convolutions:
            convolution.build(shape)
            shape = (*shape[:3], convolution.filters)

    def shift(self, z):
        """μ(z), float32."""
        h = ops.cast(z, self.compute_dtype)
        for i, convolution in enumerate(self.convolutions):
            h = convolution(ops.elu(h) if i else h)
        return ops.cast(h, "float32")

    def call(self, z):
        return z - self.shift(z)


class PairedFlow(layers.Layer):
    """A `ShiftFlow` in each of the two orders.

    Input and output shape: `(batch, height, width, channels)`.
    """

    def build(self, input_shape):
        self.flows = [
            ShiftFlow(backward, dtype=self.dtype_policy, name=name)
            for backward, name in ((False, "forward"), (True, "backward"))
        ]
        for flow in self.flows:
            flow.build(input_shape)

    def call(self, z):
        for flow in self.flows:
            z = flow(z)
        return z
