"""Networks for log-densities: what they must be, and builders of some."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from blogkeras import backend
from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_integer,
    check_layer,
    check_sizes,
    shapes_agree,
)

# Names of Keras's layers and operations whose first derivative jumps somewhere,
# or is zero almost everywhere.
_PIECEWISE_ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu hard_sigmoid hard_silu hard_swish hard_tanh "
    "hard_shrink soft_shrink threshold sparse_sigmoid sparsemax selu".split()
)
_PIECEWISE_OPERATIONS = frozenset(
    "ReLU LeakyReLU PReLU Relu Relu6 LeakyRelu HardSigmoid HardSilu HardTanh "
    "HardShrink SoftShrink Threshold SparseSigmoid Sparsemax Selu "
    "MaxPooling1D MaxPooling2D MaxPooling3D GlobalMaxPooling1D "
    "GlobalMaxPooling2D GlobalMaxPooling3D MaxPool AdaptiveMaxPooling1D "
    "AdaptiveMaxPooling2D AdaptiveMaxPooling3D AdaptiveMaxPool "
    "Max Min Amax Amin Nanmax Nanmin Maximum Minimum Fmax Fmin Ptp TopK Sort "
    "Median Nanmedian Percentile Nanpercentile Quantile Nanquantile "
    "Absolute Abs Fabs Clip Where Select Sign Heaviside Round Floor Ceil Trunc "
    "FloorDivide Mod Fmod".split()
)


def log_density_and_score(log_density, x, **kwargs):
    """A log-density and its gradient at each row.

    Args:
        log_density: Function of a tensor `(rows, ...)` that returns one number
            for each row, `(rows,)` or `(rows, 1)`; each from its own row alone.
        x: Floating tensor `(rows, ...)`.
        **kwargs: For `log_density`.

    Returns:
        `(values, gradient)`: float32 of shape `(rows,)`, and a tensor like `x`.
        Both can be differentiated again.
    """
    values, gradient, _ = score_and_loss(
        lambda x: (log_density(x, **kwargs), 0.0), x
    )
    return values, gradient


def score_and_loss(log_density, x):
    """As `log_density_and_score`, with what layers add to the loss.

    Args:
        log_density: Function of `x` that returns `(values, loss)`, such as a
            part of a model by `call_with_loss`.
        x: Floating tensor `(rows, ...)`.

    Returns:
        `(values, gradient, loss)`.
    """

    def total(x):
        values, loss = log_density(x)
        values = as_scalars(values, ops.shape(x)[0])
        return ops.sum(values), (values, loss)

    # Of a loss on the gradient the gradient is of second order.
    with backend.second_order():
        (_, (values, loss)), gradient = backend.value_and_grad(total, x)
    return values, gradient, loss


def call_with_loss(network, inputs, training):
    """Calls a network inside of a model's `compute_loss`.

    Returns:
        `(outputs, loss)`, where the loss is the sum of what its layers gave to
        `add_loss` (activity regularizers do so), a float32 scalar. Regularizers
        of weights are not in it.
    """
    (outputs,), loss = backend.run_branch(
        lambda: [network(inputs, training=training)], [network]
    )
    return outputs, loss


def check_scalars(values, rows=None):
    """Raises a `ValueError` unless there is one real number for each row.

    Args:
        values: Anything.
        rows: Integer or tensor. The number of rows; checked where it is known.
    """
    shape = getattr(values, "shape", None)
    rows = rows if isinstance(rows, int) else None
    if shape is None or not any(
        shapes_agree(tuple(shape), known) for known in ((rows,), (rows, 1))
    ):
        received = type(values).__name__
        if shape is not None:
            received = f"output of shape {tuple(shape)}"
        if rows is not None:
            received += f" for {rows} rows"
        raise ValueError(
            "Expected one number for each row, of shape (rows,) or (rows, 1). "
            f"Received: {received}"
        )
    dtype = keras.backend.standardize_dtype(values.dtype)
    if "float" not in dtype:
        raise ValueError(
            "Expected floating-point numbers: integers have no gradient. "
            f"Received: output of dtype {dtype}"
        )


def as_scalars(values, rows=None):
    """`(rows,)` or `(rows, 1)` as float32 of shape `(rows,)`."""
    check_scalars(values, rows)
    return ops.cast(ops.reshape(values, (-1,)), "float32")


def check_network(network, allow_piecewise=False, name="network"):
    """Raises a `ValueError` for a network whose score cannot be trained.

    Args:
        network: Keras layer or model.
        allow_piecewise: Boolean. Whether ReLU, max-pooling and the like pass.
        name: String. The argument's name, for the message.
    """
    check_layer(name, network)
    check_boolean("allow_piecewise", allow_piecewise)
    check_inputs(network, name)
    for part in _parts(network):
        if isinstance(part, layers.BatchNormalization) and part.trainable:
            raise ValueError(
                "Expected a log-density that looks at each row alone: "
                "BatchNormalization mixes the rows of a batch, and the score "
                "of one row would depend on the others. Take "
                "LayerNormalization or GroupNormalization, or freeze it. "
                f"Received: {name} with the layer {part.name!r}"
            )
        kind = _piecewise(part)
        if kind and not allow_piecewise:
            raise ValueError(
                "Expected a network that can be differentiated twice: training "
                f"differentiates its gradient. The gradient of {kind} jumps "
                "between pieces or is zero in them, and so would the score. "
                "Take 'swish', 'softplus', 'tanh' or 'elu', average pooling, "
                "or allow_piecewise=True if you mean it. "
                f"Received: {name} with {part.name!r}"
            )
    return network


def check_inputs(network, name):
    """Raises a `ValueError` for a network whose known inputs are integers."""
    for x in getattr(network, "inputs", None) or ():
        if "float" not in x.dtype:
            raise ValueError(
                "Expected a network of floating-point inputs: integers have "
                f"no gradient. Received: {name} with an input of {x.dtype}"
            )


def _parts(network):
    """The layers of a network at any depth, and operations between them."""
    seen = {}
    for layer in network._flatten_layers():
        seen[id(layer)] = layer
        # Functional models hold `keras.ops` as operations, which are no layers.
        for operation in getattr(layer, "operations", ()):
            seen[id(operation)] = operation
    return list(seen.values())


def _piecewise(part):
    """The name of what is piecewise in a layer, or an empty string."""
    kind = type(part).__name__
    if kind in _PIECEWISE_OPERATIONS:
        return kind
    activation = getattr(part, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    if name in _PIECEWISE_ACTIVATIONS or name in _PIECEWISE_OPERATIONS:
        return name
    return ""


@keras.saving.register_keras_serializable(package="blogkeras")
class QuadraticHead(layers.Layer):
    """Features to one number: a product of two, and squares.

        (w₁·h + b₁)(w₂·h + b₂) + w₃·h² + b₃

    A product of two features grows like that of a Gaussian's log-density, which
    a linear head on saturating features cannot do.

    Input shape:  `(rows, features)`.
    Output shape: `(rows, 1)`.

    Example:

    >>> tuple(QuadraticHead()(keras.ops.ones((2, 8))).shape)
    (2, 1)

    Reference:
        [Li, Chen and Sommer, 2019](https://arxiv.org/abs/1910.07762);
        [blog post 7038](https://kexue.fm/archives/7038)
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second, self.third = (
            layers.Dense(
                1,
                dtype=self.dtype_policy,
                trainable=self.trainable,
                name=name,
            )
            for name in ("first", "second", "third")
        )

    def build(self, input_shape):
        for part in (self.first, self.second, self.third):
            part.build(input_shape)

    def call(self, inputs):
        product = self.first(inputs) * self.second(inputs)
        return product + self.third(ops.square(inputs))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 1)


def _head(h, head):
    check_choice("head", head, ("linear", "quadratic"))
    # In half precision log-densities, which may be large, would be rounded to
    # whole numbers and more, and samplers compare them.
    if head == "quadratic":
        return QuadraticHead(name="head", dtype="float32")(h)
    return layers.Dense(1, name="head", dtype="float32")(h)


def mlp_log_density(
    input_shape: Sequence[int],
    units: Sequence[int] = (64, 64, 64, 64),
    activation: Any = "swish",
    head: str = "linear",
    name: str = "mlp_log_density",
    allow_piecewise: bool = False,
) -> keras.Model:
    """A fully connected network from rows of any shape to a log-density.

    Its output is log p up to a constant, whose gradient is the score: it grows
    towards the data. The energy is minus it, the post's E is σ² times it.

    Args:
        input_shape: Tuple of integers, without the axis of rows.
        units: Sequence of integers. Sizes of the hidden layers.
        activation: Name or function; twice differentiable.
        head: `"linear"` or `"quadratic"` (see `QuadraticHead`).
        name: String.
        allow_piecewise: Boolean. Whether ReLU and the like pass.

    Returns:
        `keras.Model`, `(rows, *input_shape)` to `(rows, 1)`.

    Raises:
        ValueError: if `input_shape` or `units` are not integers above 0, or the
            activation is piecewise.

    Example:

    >>> mlp_log_density((2,)).count_params()
    12737

    Reference:
        [Bigdeli et al., 2020](https://arxiv.org/abs/2001.02728), smaller
    """
    inputs = keras.Input(check_sizes("input_shape", input_shape))
    h = layers.Flatten()(inputs) if len(inputs.shape) > 2 else inputs
    for number, size in enumerate(check_sizes("units", units), start=1):
        h = layers.Dense(
            size,
            activation,
            kernel_initializer="he_normal",
            name=f"hidden_{number}",
        )(h)
    network = keras.Model(inputs, _head(h, head), name=name)
    return check_network(network, allow_piecewise)


def residual_log_density(
    input_shape: Sequence[int],
    filters: Sequence[int] = (32, 64),
    num_blocks: int = 1,
    activation: Any = "elu",
    head: str = "quadratic",
    name: str = "residual_log_density",
    allow_piecewise: bool = False,
) -> keras.Model:
    """A residual convolutional network from pictures to a log-density.

    A convolution, then for each entry of `filters` a block that halves height
    and width by averaging (all but the first) and `num_blocks` blocks that keep
    them; the head sees all positions. No normalization. The sign of the output
    is that of `mlp_log_density`: it grows towards the data.

    Args:
        input_shape: `(height, width, channels)`.
        filters: Sequence of integers. Channels at each scale.
        num_blocks: Integer ≥ 1.
        activation: Name or function; twice differentiable.
        head: `"quadratic"` (see `QuadraticHead`) or `"linear"`.
        name: String.
        allow_piecewise: Boolean. Whether ReLU and the like pass.

    Returns:
        `keras.Model`, `(rows, height, width, channels)` to `(rows, 1)`.

    Raises:
        ValueError: if `input_shape` is not (height, width, channels), sizes are
            not integers above 0, or the activation is piecewise.

    Example:

    >>> residual_log_density((8, 8, 1), filters=(4, 4)).output_shape
    (None, 1)

    Reference:
        [Li, Chen and Sommer, 2019](https://arxiv.org/abs/1910.07762), smaller
    """
    shape = check_sizes("input_shape", input_shape, length=3)
    filters = check_sizes("filters", filters)
    num_blocks = check_integer("num_blocks", num_blocks, minimum=1)
    inputs = keras.Input(shape)

    def convolution(h, size, kernel=3):
        return layers.Conv2D(
            size, kernel, padding="same", data_format="channels_last"
        )(h)

    def block(h, size, halve):
        act = layers.Activation(activation)
        inner = convolution(act(h), size)
        inner = convolution(layers.Activation(activation)(inner), size)
        if halve:
            h, inner = (
                layers.AveragePooling2D(2, data_format="channels_last")(x)
                for x in (h, inner)
            )
        if h.shape[-1] != size:
            h = convolution(h, size, kernel=1)
        return layers.Add()([h, inner])

    h = convolution(inputs, filters[0])
    for scale, size in enumerate(filters):
        if scale:
            h = block(h, size, halve=True)
        for _ in range(num_blocks):
            h = block(h, size, halve=False)
    h = layers.Activation(activation)(h)
    h = layers.Flatten(data_format="channels_last")(h)
    network = keras.Model(inputs, _head(h, head), name=name)
    return check_network(network, allow_piecewise)
