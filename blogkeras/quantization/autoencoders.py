"""The encoders and decoders of the post's script and of Sonnet's example."""

import math

import keras
from keras import layers

from blogkeras.arguments import check_integer

# Shapes here end in the channels, whatever Keras is configured to.
_SAME = {"padding": "same", "data_format": "channels_last"}


def sonnet_autoencoder(
    input_shape=(32, 32, 3),
    dim=64,
    hidden=128,
    residual_hidden=32,
    num_residual=2,
):
    """Encoder and decoder of Sonnet's VQ-VAE example, with its initializers.

    The code map has a quarter of the height and width: convolutions 4×4/2,
    4×4/2, 3×3, residual blocks (3×3, 1×1), 1×1 to `dim`; the decoder mirrors
    this. The example divides the
    reconstruction loss by the variance of the data: `compile(optimizer,
    loss_weights=[1 / variance])`, with Adam(3e-4), batches of 32, images in
    [-½, ½], and a codebook `VectorQuantizer(512, ema_decay=0.99,
    embeddings_initializer=keras.initializers.VarianceScaling(1, "fan_out",
    "uniform"))`.

    Args:
        input_shape: `(height, width, channels)`, height and width divisible
            by 4.
        dim: Integer. Size of the latent vectors.
        hidden: Integer. Channels of the convolutions.
        residual_hidden: Integer. Channels inside a residual block.
        num_residual: Integer. Residual blocks on each side.

    Returns:
        `(encoder, decoder)`, two `keras.Model`.

    Reference:
        [Sonnet's example](https://github.com/google-deepmind/sonnet)
    """
    input_shape = _divisible_by_4(input_shape)
    dim = check_integer("dim", dim, minimum=1)
    hidden = check_integer("hidden", hidden, minimum=2)
    residual_hidden = check_integer(
        "residual_hidden", residual_hidden, minimum=1
    )
    num_residual = check_integer("num_residual", num_residual, minimum=0)

    def conv(filters, size, x, strides=1, transposed=False, **kwargs):
        cls = layers.Conv2DTranspose if transposed else layers.Conv2D
        stddev = (size * size * x.shape[-1]) ** -0.5
        return cls(
            filters,
            size,
            strides,
            **_SAME,
            kernel_initializer=keras.initializers.TruncatedNormal(
                stddev=stddev
            ),
            **kwargs,
        )(x)

    def residual_stack(h):
        for _ in range(num_residual):
            inner = conv(
                residual_hidden, 3, layers.ReLU()(h), activation="relu"
            )
            h = layers.Add()([h, conv(hidden, 1, inner)])
        return layers.ReLU()(h)

    x = keras.Input(input_shape)
    h = conv(hidden // 2, 4, x, 2, activation="relu")
    h = conv(hidden, 4, h, 2, activation="relu")
    h = conv(hidden, 3, h, activation="relu")
    encoder = keras.Model(x, conv(dim, 1, residual_stack(h)), name="encoder")

    z = keras.Input(encoder.output_shape[1:])
    h = residual_stack(conv(hidden, 3, z))
    h = conv(hidden // 2, 4, h, 2, transposed=True, activation="relu")
    h = conv(input_shape[-1], 4, h, 2, transposed=True)
    return encoder, keras.Model(z, h, name="decoder")


def blog_autoencoder(input_shape=(128, 128, 3), dim=128, num_blocks=None):
    """Encoder and decoder of the post's script.

    The code map has a quarter of the height and width: two 4×4/2 convolutions
    and residual blocks (3×3, 1×1), all with BatchNormalization. The decoder
    mirrors this and ends in tanh: images are in [-1, 1]. The script uses
    Adam(1e-3), batches of 64 and `VectorQuantizer(64)`.

    Args:
        input_shape: `(height, width, channels)`, height and width divisible
            by 4.
        dim: Integer. Channels, and size of the latent vectors.
        num_blocks: Integer. Residual blocks on each side. Defaults to the
            script's `log2(height) - 4`, and at least one.

    Returns:
        `(encoder, decoder)`, two `keras.Model`.

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760)
    """
    input_shape = _divisible_by_4(input_shape)
    dim = check_integer("dim", dim, minimum=1)
    if num_blocks is None:
        num_blocks = max(int(math.log2(input_shape[0])) - 4, 1)
    num_blocks = check_integer("num_blocks", num_blocks, minimum=0)

    def block(x):
        h = layers.Conv2D(dim, 3, **_SAME)(layers.ReLU()(x))
        h = layers.ReLU()(layers.BatchNormalization()(h))
        return layers.Add()([x, layers.Conv2D(dim, 1, **_SAME)(h)])

    x = keras.Input(input_shape)
    h = layers.Conv2D(dim, 4, 2, **_SAME)(x)
    h = layers.ReLU()(layers.BatchNormalization()(h))
    h = layers.Conv2D(dim, 4, 2, **_SAME)(h)
    h = layers.BatchNormalization()(h)
    for index in range(num_blocks):
        h = block(h)
        if index < num_blocks - 1:
            h = layers.BatchNormalization()(h)
    encoder = keras.Model(x, h, name="encoder")

    z = h = keras.Input(encoder.output_shape[1:])
    for _ in range(num_blocks):
        h = block(layers.BatchNormalization()(h))
    h = layers.Conv2DTranspose(dim, 4, 2, **_SAME)(h)
    h = layers.ReLU()(layers.BatchNormalization()(h))
    h = layers.Conv2DTranspose(
        input_shape[-1], 4, 2, activation="tanh", **_SAME
    )(h)
    return encoder, keras.Model(z, h, name="decoder")


def _divisible_by_4(input_shape):
    """Raises unless two strides of 2 divide height and width exactly."""
    sizes = ()
    if isinstance(input_shape, (tuple, list)) and len(input_shape) == 3:
        sizes = tuple(
            check_integer("input_shape", size, minimum=1)
            for size in input_shape
        )
    if not sizes or sizes[0] % 4 or sizes[1] % 4:
        raise ValueError(
            "Expected (height, width, channels) with height and width "
            "divisible by 4: pad or crop the pictures. Received: "
            f"input_shape={input_shape}"
        )
    return sizes
