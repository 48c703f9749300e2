"""The autoencoder around a quantizer, and the networks of post and Sonnet."""

import math

import keras
import numpy as np
from keras import layers, ops

from blogkeras import backend
from blogkeras.quantization.quantizer import (
    Quantizer,
    check_integer,
    counted,
    perplexity,
    usage,
    weights_of,
)


class _Usage(keras.metrics.Metric):
    """The share of codes used since the metric was reset."""

    def __init__(self, codebooks, num_codes, **kwargs):
        super().__init__(**kwargs)
        self.counts = self.add_variable(
            (codebooks, num_codes), "zeros", name="counts"
        )

    def update_state(self, counts):
        self.counts.assign(self.counts + counts)

    def result(self):
        return ops.mean(usage(self.counts))


@keras.saving.register_keras_serializable(package="blogkeras")
class VQVAE(keras.Model):
    """An autoencoder whose latent vectors are codes of a codebook.

        z = encoder(x),  x̂ = decoder(quantizer(z))
        loss = reconstruction(x, x̂) + the quantizer's losses

    An autoencoder and, as the post says, not a variational one: what it needs
    to generate is a prior over codes, `CodePrior`.

    `fit(x)` reconstructs `x`; give `y` for another target. The default loss is
    the mean square; a mask that arrives at the decoder's output counts in it as
    Keras has it. `perplexity` is the mean over batches of the perplexity of a
    batch's codes, `usage` the share of codes used in the epoch (both the mean
    over the codebooks of a residual quantizer). Sample weights, one for each
    row, weigh the reconstruction; the quantizer's losses and counts see every
    row. Keras forgets sample weights where there is no `y`: then say
    `fit(x, x, sample_weight=...)`.

    Args:
        encoder: `keras.Model`, inputs to `(batch, ..., dim)`.
        quantizer: `VectorQuantizer`, `FiniteScalarQuantizer` or
            `ResidualVectorQuantizer`.
        decoder: `keras.Model`, `(batch, ..., dim)` to the shape of the inputs.

    Example:

    >>> encoder, decoder = sonnet_autoencoder((32, 32, 3))
    >>> quantizer = VectorQuantizer(512, ema_decay=0.99)
    >>> model = VQVAE(encoder, quantizer, decoder)
    >>> model.compile(keras.optimizers.Adam(3e-4))
    >>> model.fit(images)
    >>> codes = model.encode(images)  # (n, 8, 8), integers
    >>> prior = CodePrior(512, (8, 8))
    >>> prior.compile("adam")
    >>> prior.fit(codes)
    >>> new_images = model.decode(prior.sample(16))

    Reference:
        [van den Oord et al., 2017](https://arxiv.org/abs/1711.00937);
        [blog post 6760](https://kexue.fm/archives/6760)
    """

    def __init__(self, encoder, quantizer, decoder, **kwargs):
        super().__init__(**kwargs)
        for name, model in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(model, keras.Model):
                raise ValueError(
                    "Expected a keras.Model; wrap a layer into "
                    f"keras.Sequential. Received: {name}={model!r}"
                )
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                "Expected a VectorQuantizer, FiniteScalarQuantizer or "
                f"ResidualVectorQuantizer. Received: quantizer={quantizer!r}"
            )
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.perplexity = keras.metrics.Mean(name="perplexity")
        self.usage = _Usage(
            len(quantizer.codebooks()), quantizer.num_codes, name="usage"
        )

    def compile(self, optimizer="adam", loss="mse", **kwargs):
        super().compile(optimizer, loss, **kwargs)

    def compile_from_config(self, config):
        # Keras does this itself only where `compile` is not overridden.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def build(self, input_shape):
        if isinstance(input_shape, dict) or any(
            isinstance(size, (list, tuple)) for size in input_shape
        ):
            raise ValueError(
                "Expected one tensor, which the encoder takes; join several "
                f"in it. Received: input_shape={input_shape}"
            )
        # Symbolic calls: a model that is no more than a `call` has no shapes.
        shape = (None, *input_shape[1:])
        z = self.encoder(keras.KerasTensor(shape, self.compute_dtype))
        if not self.quantizer.built:
            self.quantizer.build(tuple(z.shape))
        if not self.decoder.built:
            self.decoder(
                keras.KerasTensor(z.shape, self.quantizer.compute_dtype)
            )

    def call(self, inputs, training=None):
        # Named to every part: on JAX, Keras's trainer calls `call` itself, and
        # nobody would hand it on.
        z = self.encoder(inputs, training=training)
        z = self.quantizer(z, training=training)
        return self.decoder(z, training=training)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        y = x if y is None else y
        if sample_weight is not None and self.loss is not None:
            sample_weight = self._fit_to_loss(sample_weight, y, y_pred)
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        counts = ops.stack(self._batch_counts(x, training))
        self.perplexity.update_state(perplexity(counts))
        self.usage.update_state(counts)
        return loss

    def _fit_to_loss(self, weight, y, y_pred):
        """One weight for each row, with axes of size 1 for each position.

        Keras's losses keep all axes but the last; your own may keep fewer.
        """
        if any(size != 1 for size in weight.shape[1:]):
            return weight
        loss = keras.losses.get(*keras.tree.flatten(self.loss))
        values = getattr(loss, "call", loss)(ops.cast(y, y_pred.dtype), y_pred)
        return ops.reshape(weight, [-1] + [1] * (len(values.shape) - 1))

    def _batch_counts(self, x, training):
        """How often each code was used, for each codebook."""
        codebooks = self.quantizer.codebooks()
        if training:
            return [book.batch_counts.value for book in codebooks]
        # Evaluation changes no state, so the codes are computed once more;
        # XLA merges this with the forward pass.
        z = self.encoder(x, training=False)
        kept = counted(z, weights_of(z, backend.get_keras_mask(z)))
        codes = self.quantizer.encode(z)
        if not self.quantizer.codes_per_vector:
            codes = codes[..., None]
        return [
            book.count(codes[..., i], kept) for i, book in enumerate(codebooks)
        ]

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y = x if y is None else y
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def encode(self, x, batch_size=32, verbose=0):
        """The codes of inputs.

        Args:
            x: `(n, ...)`.
            batch_size: Integer. Rows computed at once.
            verbose: 1 for a progress bar.

        Returns:
            NumPy array of integers, `(n, ...)`.
        """
        return _by_batches(
            lambda x: self.quantizer.encode(self.encoder.predict_on_batch(x)),
            [x],
            batch_size,
            verbose,
        )

    def decode(self, codes, batch_size=32, verbose=0):
        """What codes stand for: the inverse of `encode`.

        Args:
            codes: `(n, ...)`, integers, as `encode` or a prior gives them.
            batch_size, verbose: As for `encode`.

        Returns:
            NumPy array, `(n, ...)`.
        """
        return _by_batches(
            lambda codes: self.decoder.predict_on_batch(
                self.quantizer.decode(codes)
            ),
            [codes],
            batch_size,
            verbose,
        )

    def reconstruct(self, x, quantize=True, batch_size=32, verbose=0):
        """The decoder's answer to the encoder's.

        Args:
            x: `(n, ...)`.
            quantize: Boolean. Without, the decoder sees the encoder's vectors
                as they are.
            batch_size, verbose: As for `encode`.

        Returns:
            NumPy array, shaped like `x`.
        """

        def run(x):
            # By calls, which hand masks on.
            if quantize:
                return self(x, training=False)
            return self.decoder(self.encoder(x, training=False), training=False)

        return _by_batches(run, [x], batch_size, verbose)

    def interpolate(self, x1, x2, num=8, batch_size=32, verbose=0):
        """Between pairs of inputs: their vectors are mixed, then quantized.

            decoder(quantizer((1 - α) encoder(x1) + α encoder(x2)))

        Args:
            x1: `(n, ...)`.
            x2: Shaped like `x1`.
            num: Integer ≥ 2. α runs from 0 to 1 in so many equal steps.
            batch_size, verbose: As for `encode`.

        Returns:
            NumPy array, `(n, num, ...)`.
        """
        num = check_integer("num", num, 2)
        if np.shape(x1) != np.shape(x2):
            raise ValueError(
                "Expected inputs of one shape on both sides. Received: "
                f"{np.shape(x1)} and {np.shape(x2)}"
            )

        def mix(x1, x2):
            z1, z2 = map(self.encoder.predict_on_batch, (x1, x2))
            codes = (
                self.quantizer.encode((1 - a) * z1 + a * z2)
                for a in np.linspace(0, 1, num, dtype="float32")
            )
            steps = [
                self.decoder.predict_on_batch(self.quantizer.decode(c))
                for c in codes
            ]
            return np.stack(steps, axis=1)

        return _by_batches(mix, [x1, x2], batch_size, verbose)

    def adapt(self, x, iterations=10, seed=0, batch_size=32):
        """Starts the codebook from the k-means clusters of encoded inputs.

        Args:
            x: `(n, ...)`; a few thousand vectors for each code are plenty.
                Masked ones have no part.
            iterations, seed: As for `VectorQuantizer.adapt`.
            batch_size: As for `encode`.
        """

        def encode(x):
            z = self.encoder(x, training=False)
            kept = weights_of(z, backend.get_keras_mask(z))
            return z, ops.ones_like(z[..., 0]) if kept is None else kept

        vectors, kept = _by_batches(encode, [x], batch_size, 0)
        if not self.built:
            self.build(np.shape(x))
        self.quantizer.adapt(vectors[kept > 0], iterations, seed)

    def get_config(self):
        return {
            **super().get_config(),
            **{
                name: keras.saving.serialize_keras_object(getattr(self, name))
                for name in ("encoder", "quantizer", "decoder")
            },
        }

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("encoder", "quantizer", "decoder")
        }
        return cls(**{**config, **parts})


def _by_batches(fn, arrays, batch_size, verbose):
    """`fn(*arrays)` in NumPy, in batches of one size: the last is filled up."""
    arrays = [np.asarray(ops.convert_to_numpy(a)) for a in arrays]
    batch_size = check_integer("batch_size", batch_size, 1)
    if arrays[0].ndim == 0:
        raise ValueError(
            "Expected an array of rows; of a dataset give its arrays, batch by "
            f"batch. Received: {arrays[0]}"
        )
    n = len(arrays[0])
    if n == 0:
        raise ValueError("Expected at least one row. Received: none")
    starts = range(0, n, batch_size)
    progress = keras.utils.Progbar(len(starts), verbose=verbose)
    parts = []
    for start in starts:
        rows = np.arange(start, start + batch_size) % n
        part = keras.tree.map_structure(
            lambda x, count=n - start: ops.convert_to_numpy(x)[:count],
            fn(*(a[rows] for a in arrays)),
        )
        parts.append(part)
        if verbose:
            progress.add(1)
    return keras.tree.map_structure(lambda *x: np.concatenate(x), *parts)


class CodebookUsage(keras.callbacks.Callback):
    """Reports how the codebooks of a model's quantizers are used, by epoch.

    For quantizers inside any model that is not a `VQVAE` (which has metrics of
    its own). Adds `{layer}_perplexity` and `{layer}_usage` to the epoch's logs:
    effective number of codes, and share of codes used at all, over all training
    vectors of the epoch. Put it before callbacks that read these logs.

    Example:

    >>> model.fit(x, y, callbacks=[CodebookUsage()])
    """

    def on_epoch_begin(self, epoch, logs=None):
        for quantizer in self._quantizers():
            quantizer.reset_counts()

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        for quantizer in self._quantizers():
            counts = ops.stack(
                [book.total_counts.value for book in quantizer.codebooks()]
            )
            for name, measure in (("perplexity", perplexity), ("usage", usage)):
                logs[f"{quantizer.name}_{name}"] = float(
                    ops.mean(measure(counts))
                )

    def _quantizers(self):
        """The model's quantizers; a residual one without its stages."""
        found = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, Quantizer)
        ]
        stages = {
            id(book)
            for quantizer in found
            for book in quantizer.codebooks()
            if book is not quantizer
        }
        return [layer for layer in found if id(layer) not in stages]


def sonnet_autoencoder(
    input_shape=(32, 32, 3),
    dim=64,
    hidden=128,
    residual_hidden=32,
    num_residual=2,
):
    """Encoder and decoder of Sonnet's VQ-VAE example, with its init law.

    A quarter of the size: convolutions 4×4/2, 4×4/2, 3×3, residual blocks
    (3×3, 1×1), 1×1 to `dim`; mirrored in the decoder. The example divides the
    reconstruction loss by the variance of the data: `compile(optimizer,
    loss_weights=[1 / variance])`, with Adam(3e-4), batches of 32, images in
    [-½, ½], and a codebook `VectorQuantizer(512, ema_decay=0.99,
    embeddings_initializer=keras.initializers.VarianceScaling(1, "fan_out",
    "uniform"))`.

    Args:
        input_shape: `(height, width, channels)`, sizes divisible by 4.
        dim: Integer. Size of the latent vectors.
        hidden: Integer. Channels of the convolutions.
        residual_hidden: Integer. Channels inside a residual block.
        num_residual: Integer. Residual blocks on each side.

    Returns:
        `(encoder, decoder)`, two `keras.Model`.

    Reference:
        [Sonnet's example](https://github.com/google-deepmind/sonnet)
    """

    def conv(filters, size, x, strides=1, transposed=False, **kwargs):
        cls = layers.Conv2DTranspose if transposed else layers.Conv2D
        stddev = (size * size * x.shape[-1]) ** -0.5
        return cls(
            filters,
            size,
            strides,
            padding="same",
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

    A quarter of the size: two 4×4/2 convolutions and residual blocks (3×3,
    1×1), all with BatchNormalization; mirrored in the decoder, which ends in
    tanh: images in [-1, 1]. The script uses Adam(1e-3), batches of 64 and
    `VectorQuantizer(64)`.

    Args:
        input_shape: `(height, width, channels)`, sizes divisible by 4.
        dim: Integer. Channels, and size of the latent vectors.
        num_blocks: Integer. Residual blocks on each side. Defaults to the
            script's `log2(height) - 4`, and at least one.

    Returns:
        `(encoder, decoder)`, two `keras.Model`.

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760)
    """
    if num_blocks is None:
        num_blocks = max(int(math.log2(input_shape[0])) - 4, 1)

    def block(x):
        h = layers.Conv2D(dim, 3, padding="same")(layers.ReLU()(x))
        h = layers.ReLU()(layers.BatchNormalization()(h))
        return layers.Add()([x, layers.Conv2D(dim, 1, padding="same")(h)])

    x = keras.Input(input_shape)
    h = layers.Conv2D(dim, 4, 2, padding="same")(x)
    h = layers.ReLU()(layers.BatchNormalization()(h))
    h = layers.Conv2D(dim, 4, 2, padding="same")(h)
    h = layers.BatchNormalization()(h)
    for index in range(num_blocks):
        h = block(h)
        if index < num_blocks - 1:
            h = layers.BatchNormalization()(h)
    encoder = keras.Model(x, h, name="encoder")

    z = h = keras.Input(encoder.output_shape[1:])
    for _ in range(num_blocks):
        h = block(layers.BatchNormalization()(h))
    h = layers.Conv2DTranspose(dim, 4, 2, padding="same")(h)
    h = layers.ReLU()(layers.BatchNormalization()(h))
    h = layers.Conv2DTranspose(
        input_shape[-1], 4, 2, padding="same", activation="tanh"
    )(h)
    return encoder, keras.Model(z, h, name="decoder")
