"""Convolutions with normalized weights, and the penalty on their norms."""

import math
import random

import keras
import numpy as np
from keras import ops

from blogkeras import backend


def fan_in_uniform(shape, dtype="float32"):
    """Uniform in ±1/√(numbers that one output sums): the published start.

    In NumPy, because JAX compiles an operation for each new shape, and a model
    has hundreds of shapes.
    """
    limit = 1 / np.sqrt(np.prod(shape[:-1]))
    return _generator().uniform(-limit, limit, shape).astype(dtype)


def _generator():
    # `keras.utils.set_random_seed` seeds Python's numbers, too.
    return np.random.default_rng(random.getrandbits(32))


class Convolution(keras.layers.Layer):
    """A convolution whose kernels have trained norms.

        kernel_c = exp(s_c) · v_c / (‖v_c‖ + 10⁻⁵)       for each output c

    With `strides=2` one row and one column of zeros are put on each side of the
    picture, so that a kernel of size 3 is centred on the even pixels.

    Args:
        filters: Integer. Channels of the output.
        kernel_size: Integer.
        strides: 1 or 2.
        depthwise: Boolean. One kernel for each channel, which is convolved
            with that channel alone.
        weight_norm: Boolean. Without it, the kernel is v.
        use_bias: Boolean.
        gain: Number > 0. Factor of the norms at the start.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height / strides, width / strides, filters)`.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        depthwise=False,
        weight_norm=True,
        use_bias=True,
        gain=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = strides
        self.depthwise = depthwise
        self.weight_norm = weight_norm
        self.use_bias = use_bias
        self.gain = gain
        self.mask = None

    def build(self, input_shape):
        size, channels = self.kernel_size, input_shape[-1]
        shape = (size, size, channels, self.filters)
        if self.depthwise:
            shape = (size, size, channels, 1)
        # In float32 under any policy, because norms are computed from it.
        self.direction = self.add_weight(
            shape, self._initial_direction, name="direction", autocast=False
        )
        if self.weight_norm:
            self.log_norm = self.add_weight(
                (self.filters,),
                self._initial_log_norm,
                name="log_norm",
                autocast=False,
            )
        if self.use_bias:
            self.bias = self.add_weight((self.filters,), "zeros", name="bias")

    def _initial_direction(self, shape, dtype):
        if not self.depthwise:
            return fan_in_uniform(shape, dtype)
        # An output sums over one channel only.
        size, _, channels, _ = shape
        return fan_in_uniform((size, size, channels), dtype)[..., None]

    def _initial_log_norm(self, shape, dtype):
        direction = ops.convert_to_numpy(self.direction.value)
        if self.mask is not None:
            direction = direction * self.mask
        axes = (0, 1) if self.depthwise else (0, 1, 2)
        norm = np.sqrt(np.sum(direction**2, axis=axes)).reshape(shape)
        return (np.log(norm + 1e-2) + np.log(self.gain)).astype(dtype)

    def kernel(self):
        """The kernel as it is used, float32."""
        direction = ops.convert_to_tensor(self.direction)
        if self.mask is not None:
            direction = direction * self.mask
        if not self.weight_norm:
            return direction
        axes = (0, 1) if self.depthwise else (0, 1, 2)
        squares = ops.sum(ops.square(direction), axis=axes, keepdims=True)
        # At a kernel of zeros the gradient of the root would be infinite.
        norm = ops.sqrt(ops.maximum(squares, 1e-24))
        scale = ops.exp(ops.convert_to_tensor(self.log_norm))
        return direction * (ops.reshape(scale, norm.shape) / (norm + 1e-5))

    def matrix(self):
        """The kernel as `(numbers of one filter, filters)`, float32."""
        return ops.reshape(self.kernel(), self.matrix_shape)

    @property
    def matrix_shape(self):
        """The shape of `matrix()`."""
        return int(np.prod(self.direction.shape)) // self.filters, self.filters

    def call(self, x):
        kernel = ops.cast(self.kernel(), x.dtype)
        if self.kernel_size == 1:
            # A product of matrices takes less time to compile and to start
            # than a convolution of the same numbers.
            rows = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), kernel[0, 0])
            x = ops.reshape(rows, (-1, *x.shape[1:3], self.filters))
        elif self.depthwise:
            x = backend.depthwise_convolution(x, kernel)
        else:
            padding = "same"
            if self.strides == 2:
                around = [(self.kernel_size - 1) // 2] * 2
                x = ops.pad(x, [[0, 0], around, around, [0, 0]])
                padding = "valid"
            x = ops.conv(
                x,
                kernel,
                strides=self.strides,
                padding=padding,
                data_format="channels_last",
            )
        return x + self.bias if self.use_bias else x

    def doubled(self, x):
        """The depthwise convolution of a picture that is doubled first.

        The picture is not actually doubled. An output at an even (odd) row
        depends on copies of three rows only, so a kernel of size 3, in which
        the weights of copies are added, gives the same at the small size. The
        same holds for columns, so there are four kernels.

        Args:
            x: `(batch, height, width, channels)`.

        Returns:
            `(batch, 4 · height, width, channels)`: the outputs at even rows
            and even columns, below them those at even rows and odd columns, and
            so on. `merge` puts them in their places.
        """
        sums = ops.convert_to_tensor(_sums_of_copies(self.kernel_size))
        kernels = ops.einsum(
            "asi,btj,ijc->abstc", sums, sums, self.kernel()[..., 0]
        )
        kernels = ops.cast(kernels, x.dtype)[..., None]
        return ops.concatenate(
            [
                backend.depthwise_convolution(x, kernels[row, column])
                for row in range(2)
                for column in range(2)
            ],
            axis=1,
        )

    def compute_output_shape(self, input_shape):
        batch, *sizes, _ = input_shape
        sizes = [size and size // self.strides for size in sizes]
        return (batch, *sizes, self.filters)


class SpectralPenalty:
    """The sum of the largest singular values of convolutions.

    Kernels of one shape are stacked and share each power iteration. The
    singular vectors are weights of the owner, so that they are saved and a
    resumed run continues with them.

    Args:
        owner: Layer or model that gets the weights, two for each shape.
        convolutions: List of `Convolution`, built.

    Reference:
        [Yoshida & Miyato, 2017](https://arxiv.org/abs/1705.10941)
    """

    def __init__(self, owner, convolutions):
        stacks = {}
        for layer in convolutions:
            stacks.setdefault(layer.matrix_shape, []).append(layer)
        self.stacks = [stacks[shape] for shape in sorted(stacks)]
        self.vectors = []
        for (rows, columns), layers in sorted(stacks.items()):
            self.vectors.append(
                tuple(
                    owner.add_weight(
                        (len(layers), size),
                        _unit_vectors,
                        "float32",
                        trainable=False,
                        autocast=False,
                        name=f"{side}_{rows}x{columns}",
                    )
                    for side, size in (("left", rows), ("right", columns))
                )
            )

    def __call__(self, num_iterations=4):
        """The sum, a float32 scalar; updates the singular vectors.

        For the gradient the vectors are constants: that of a singular value
        σ = uᵀ W v is u vᵀ.
        """
        total = ops.zeros((), "float32")
        for layers, (left, right) in zip(
            self.stacks, self.vectors, strict=True
        ):
            matrices = ops.stack([layer.matrix() for layer in layers])
            fixed = ops.stop_gradient(matrices)
            before = u = ops.convert_to_tensor(left)
            # Sums of products, which keep float32's digits on every device and
            # start faster than products of matrices this small.
            for _ in range(num_iterations):
                v = _normalize(ops.sum(fixed * u[:, :, None], axis=1))
                u = _normalize(ops.sum(fixed * v[:, None, :], axis=2))
            # For a kernel of zeros the vector is not changed: otherwise it
            # would stay zero.
            zero = ops.all(u == 0, axis=1, keepdims=True)
            left.assign(ops.where(zero, before, u))
            right.assign(v)
            total += ops.sum(matrices * (u[:, :, None] * v[:, None, :]))
        return total


def spectral_norm(layer):
    """The largest singular value of a `Convolution`, in float64."""
    matrix = ops.convert_to_numpy(layer.matrix()).astype("float64")
    if not np.isfinite(matrix).all():
        return math.nan
    # Of the smaller of both products with the transposed matrix, which takes
    # far less time than a decomposition of the matrix.
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    return math.sqrt(max(np.linalg.eigvalsh(matrix.T @ matrix)[-1], 0))


def _normalize(x):
    # The least number keeps a vector of zeros, of a kernel of zeros, at zero.
    squares = ops.sum(ops.square(x), axis=1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(squares, 1e-24))


def _sums_of_copies(size):
    """Which positions of a kernel are applied to copies of the same pixel.

    `(2, small size, size)`, for outputs at even and at odd places.
    """
    reach = (size // 2 + 1) // 2
    sums = np.zeros((2, 2 * reach + 1, size), "float32")
    for parity in range(2):
        for i in range(size):
            sums[parity, (parity + i - size // 2) // 2 + reach, i] = 1
    return sums


def merge(x):
    """The outputs of `Convolution.doubled`, each in its place.

    From `(batch, 4 · height, width, channels)` to
    `(batch, 2 · height, 2 · width, channels)`.
    """
    _, height, width, channels = x.shape
    x = ops.reshape(x, (-1, 2, 2, height // 4, width, channels))
    x = ops.transpose(x, (0, 3, 1, 4, 2, 5))
    return ops.reshape(x, (-1, height // 2, 2 * width, channels))


def _unit_vectors(shape, dtype):
    x = _generator().normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
