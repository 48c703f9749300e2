"""The autoencoder around a quantizer."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    as_numpy,
    check_boolean,
    check_integer,
)
from blogkeras.loops import ProgramCache
from blogkeras.models import CompositeModel, map_batches, symbolic_inputs
from blogkeras.outputs import as_loss
from blogkeras.quantization.code_usage import Usage, perplexity
from blogkeras.quantization.quantizer import Quantizer, counted, weights_of


@keras.saving.register_keras_serializable(package="blogkeras")
class VQVAE(CompositeModel):
    """An autoencoder whose latent vectors are codes of a codebook.

        z = encoder(x),  x̂ = decoder(quantizer(z))
        loss = reconstruction(x, x̂) + the quantizer's losses

    As the post says, it is an autoencoder and not a variational one: to
    generate, it needs a prior over codes, `CodePrior`.

    `fit(x)` reconstructs `x`; give `y` for another target, of the shape of the
    decoder's output. (A data set of pictures and labels is an error: map it to
    the pictures alone.) The default loss is the mean squared error; a Keras
    mask of the decoder's output counts in it. `perplexity` is the mean over
    batches of the perplexity of a batch's codes, `usage` the share of codes
    used in the epoch; of residual and of finite scalar quantizers both are
    means over stages or components. Sample weights, one for each row, weigh the
    reconstruction; the quantizer's losses and counts include every row.

    The first step compiles; on JAX, and with `jit_compile=True`, that may take
    half a minute before the first progress is shown. So may the first batch of
    `encode`, `decode`, `reconstruct` and `interpolate`, which are compiled for
    the shape of a batch and then as fast as `predict`.

    Args:
        encoder: `keras.Model`, inputs to `(batch, ..., dim)`.
        quantizer: `VectorQuantizer`, `ResidualVectorQuantizer`,
            `FiniteScalarQuantizer` or any other quantizer of this package.
        decoder: `keras.Model`, `(batch, ..., dim)` to the shape of the inputs.

    Input shape:  that of the encoder's inputs.
    Output shape: that of the decoder's outputs.

    Raises:
        ValueError: if a part is no model or no quantizer; in `fit`, if targets
            have not the shape of the decoder's output.

    Example:

    >>> encoder = keras.Sequential(
    ...     [keras.Input((8, 8, 1)), layers.Conv2D(4, 4, strides=4)]
    ... )
    >>> decoder = keras.Sequential(
    ...     [keras.Input((2, 2, 4)), layers.Conv2DTranspose(1, 4, strides=4)]
    ... )
    >>> quantizer = VectorQuantizer(16, ema_decay=0.99)
    >>> model = VQVAE(encoder, quantizer, decoder)
    >>> model.compile(keras.optimizers.Adam(3e-4))
    >>> images = np.random.rand(32, 8, 8, 1).astype("float32")
    >>> history = model.fit(images, verbose=0)
    >>> codes = model.encode(images)  # integers, to train a `CodePrior` on
    >>> codes.shape, model.decode(codes).shape
    ((32, 2, 2), (32, 8, 8, 1))

    Reference:
        [van den Oord et al., 2017](https://arxiv.org/abs/1711.00937);
        [blog post 6760](https://kexue.fm/archives/6760)
    """

    ROW = "row"

    def __init__(
        self,
        encoder: keras.layers.Layer,
        quantizer: keras.layers.Layer,
        decoder: keras.layers.Layer,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, model in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(model, keras.Model):
                raise ValueError(
                    "Expected a keras.Model; wrap a layer into "
                    f"keras.Sequential. Received: {name}={model!r}"
                )
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                "Expected a quantizer, such as VectorQuantizer. Received: "
                f"quantizer={quantizer!r}"
            )
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.perplexity = keras.metrics.Mean(name="perplexity")
        self.usage = Usage(quantizer.alphabets, name="usage")
        self._programs = ProgramCache(16)

    @as_in_keras
    def fit(self, x=None, y=None, sample_weight=None, **kwargs):
        """As in Keras; without `y`, `x` is the target."""
        known = kwargs.get("validation_data")
        if isinstance(known, (tuple, list)) and len(known) <= 3:
            kwargs["validation_data"] = _weighted(*known)
        x, y, sample_weight = _weighted(x, y, sample_weight)
        return super().fit(x, y, sample_weight=sample_weight, **kwargs)

    @as_in_keras
    def evaluate(self, x=None, y=None, sample_weight=None, **kwargs):
        """As in Keras; without `y`, `x` is the target."""
        x, y, sample_weight = _weighted(x, y, sample_weight)
        return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    @as_in_keras
    def compile(self, optimizer="adam", loss="mse", **kwargs):
        super().compile(optimizer, loss, **kwargs)

    def build(self, input_shape):
        if isinstance(input_shape, dict) or any(
            isinstance(size, (list, tuple)) for size in input_shape
        ):
            raise ValueError(
                "Expected one tensor, which the encoder takes; join several "
                f"in it. Received: input_shape={input_shape}"
            )
        # Call the parts on symbolic inputs: a subclassed model does not know
        # its shapes.
        shape = (None, *input_shape[1:])
        z = self.encoder(keras.KerasTensor(shape, self.compute_dtype))
        if not self.quantizer.built:
            self.quantizer.build(tuple(z.shape))
        if not self.decoder.built:
            self.decoder(
                keras.KerasTensor(z.shape, self.quantizer.compute_dtype)
            )

    def _symbolic_inputs(self):
        return symbolic_inputs(self.encoder)

    def call(self, inputs, training=None):
        self._check_shape("inputs", inputs.shape)
        # Pass `training` to each part: on JAX Keras's trainer runs `call`
        # itself, and Keras passes the argument on only in `__call__`.
        z = self.encoder(inputs, training=training)
        z = self.quantizer(z, training=training)
        return self.decoder(z, training=training)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        y = x if y is None else y
        self._check_target(y, y_pred)
        if sample_weight is not None and self.loss is not None:
            sample_weight = self._fit_to_loss(sample_weight, y, y_pred)
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        counts = self._batch_counts(x, training)
        self.perplexity.update_state(perplexity(counts))
        self.usage.update_state(counts)
        return loss

    def _check_target(self, y, y_pred):
        """Raises where a loss would broadcast its target over the output."""
        shape, output = (getattr(a, "shape", ()) for a in (y, y_pred))
        if self.loss is None or _unknown(shape):
            return
        shape, output = tuple(shape), tuple(output)
        # Keras's losses add or drop a last axis of size 1.
        allowed = [output, (*output, 1)]
        if output[-1:] == (1,):
            allowed.append(output[:-1])
        if any(map(_takes_integers, keras.tree.flatten(self.loss))):
            allowed += [output[:-1], (*output[:-1], 1)]
        if not any(_fits(shape, expected) for expected in allowed):
            raise ValueError(
                "Expected targets of the shape of the decoder's output, "
                f"{_batched(output)}: inputs of that shape, or `y`. (Of a data "
                "set of inputs and labels give the inputs alone.) Received: "
                f"targets of shape {_batched(shape)}"
            )

    def _fit_to_loss(self, weight, y, y_pred):
        """One weight for each row, with axes of size 1 for each position.

        Keras's losses keep all axes but the last; your own may keep fewer.
        """
        if any(size != 1 for size in weight.shape[1:]):
            return weight
        # Of several losses of one output Keras takes the first.
        loss = as_loss(keras.tree.flatten(self.loss)[0])
        values = loss.call(ops.cast(y, y_pred.dtype), y_pred)
        return ops.reshape(weight, [-1] + [1] * (len(values.shape) - 1))

    def _batch_counts(self, x, training):
        """How often each code was used, a row for each codebook."""
        if training:
            return self.quantizer.stacked_counts("batch_counts")
        # Evaluation changes no state, so the codes are computed once more;
        # XLA merges this with the forward pass.
        symbols, weights = self.quantizer.symbols(
            self.encoder(x, training=False)
        )
        return self.quantizer.count_symbols(symbols, weights)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y = x if y is None else y
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def encode(self, x, batch_size=32, verbose=0):
        """The codes of inputs.

        Args:
            x: `(n, ...)`, of the encoder's input shape: an array, or a
                `tf.data.Dataset` or `keras.utils.PyDataset` of batches, which
                is read into memory.
            batch_size: Integer. Rows computed at once.
            verbose: `"auto"`, 0, 1 or 2: the progress bar.

        Returns:
            NumPy array of integers, `(n, ...)`.

        Raises:
            ValueError: if the inputs have another shape, or vectors come out
                that are not finite.
        """

        def encode(x):
            z = self.encoder(x, training=False)
            return self.quantizer.encode(z), _is_finite(z)

        return self._map(
            encode, [self._checked_inputs("x", x)], batch_size, verbose
        )

    def decode(self, codes, batch_size=32, verbose=0):
        """The decoder's outputs for codes: the inverse of `encode`.

        Args:
            codes: `(n, ...)`, integers, as `encode` or a prior gives them.
            batch_size: As for `encode`.
            verbose: As for `encode`.

        Returns:
            NumPy array, `(n, ...)`.
        """

        def decode(codes):
            z = self.quantizer.decode(codes)
            return self.decoder(z, training=False), _is_finite(z)

        return self._map(decode, [self._codes(codes)], batch_size, verbose)

    def reconstruct(self, x, quantize=True, batch_size=32, verbose=0):
        """The decoder's outputs for encoded and quantized inputs.

        Args:
            x: `(n, ...)`, as for `encode`.
            quantize: Boolean. If false, the decoder gets the encoder's vectors,
                not quantized.
            batch_size: As for `encode`.
            verbose: As for `encode`.

        Returns:
            NumPy array, shaped like `x`.
        """

        # Call the layers, so that masks are passed on.
        def reconstruct(x):
            z = self.encoder(x, training=False)
            q = self.quantizer(z, training=False)
            return self.decoder(q, training=False), _is_finite(z)

        def pass_on(x):
            z = self.encoder(x, training=False)
            return self.decoder(z, training=False), _is_finite(z)

        quantize = check_boolean("quantize", quantize)
        return self._map(
            reconstruct if quantize else pass_on,
            [self._checked_inputs("x", x)],
            batch_size,
            verbose,
        )

    def interpolate(self, x1, x2, num=8, batch_size=32, verbose=0):
        """Interpolates between pairs of inputs: mixed vectors, quantized.

            decoder(quantizer((1 - α) encoder(x1) + α encoder(x2)))

        Args:
            x1: `(n, ...)`, as for `encode`.
            x2: Shaped like `x1`.
            num: Integer ≥ 2. Number of equally spaced α from 0 to 1.
            batch_size: As for `encode`.
            verbose: As for `encode`.

        Returns:
            NumPy array, `(n, num, ...)`.
        """
        num = check_integer("num", num, minimum=2)
        x1, x2 = self._checked_inputs("x1", x1), self._checked_inputs("x2", x2)
        if x1.shape != x2.shape:
            raise ValueError(
                "Expected inputs of one shape on both sides. Received: "
                f"{x1.shape} and {x2.shape}"
            )
        (z1, _), (z2, _) = (
            self._vectors(x, batch_size, verbose) for x in (x1, x2)
        )

        def mix(z1, z2, part):
            part = ops.reshape(part, [-1] + [1] * (len(z1.shape) - 1))
            part = ops.cast(part, z1.dtype)
            z = (1 - part) * z1 + part * z2
            q = self.quantizer(z, training=False)
            return self.decoder(q, training=False), _is_finite(z)

        parts = np.linspace(0, 1, num, dtype="float32")
        mixed = [
            self._map(
                mix, [z1, z2, np.full(len(z1), part)], batch_size, verbose
            )
            for part in parts
        ]
        return np.stack(mixed, axis=1)

    def adapt(self, x, iterations=10, seed=0, batch_size=32, verbose=0):
        """Starts the codebook from the k-means clusters of encoded inputs.

        Args:
            x: `(n, ...)`, as for `encode`; a few thousand vectors for each code
                are plenty. Masked vectors are ignored.
            iterations: As for `VectorQuantizer.adapt`.
            seed: As for `VectorQuantizer.adapt`.
            batch_size: As for `encode`.
            verbose: As for `encode`; one progress bar for encoding, one for
                k-means.
        """
        x = self._checked_inputs("x", x)
        z, weights = self._vectors(x, batch_size, verbose)
        self.quantizer.adapt(z[weights > 0], iterations, seed, verbose)

    def _vectors(self, x, batch_size, verbose):
        """The encoder's vectors, `(n, ..., dim)`, and which of them count."""

        def vectors(x):
            z = self.encoder(x, training=False)
            weights = weights_of(z, backend.get_keras_mask(z))
            if weights is None:
                weights = ops.ones_like(z[..., 0])
            return (z, weights), _is_finite(z)

        return self._map(vectors, [x], batch_size, verbose)

    def _map(self, fn, arrays, batch_size, verbose):
        """The outputs of `fn` for rows in compiled batches, if all are finite.

        Args:
            fn: Function of tensors; returns `(outputs, finite)`, of which the
                second is, for each row, whether its vectors can be quantized.
            arrays: List of arrays with equally many rows.
            batch_size: Integer.
            verbose: As for `map_batches`.
        """
        if self.run_eagerly:
            program = fn
        else:
            parts = (self.encoder, self.quantizer, self.decoder)
            key = (fn.__name__, self.jit_compile, *map(id, parts))
            program = self._programs.get(
                key, lambda: backend.jit_layer(fn, self, self.jit_compile)
            )
        outputs, finite = map_batches(program, arrays, batch_size, verbose)
        if not finite.all():
            raise ValueError(
                "Expected inputs whose encoded vectors are finite. Received: "
                f"NaN or infinities in the vectors of row {finite.argmin()}"
            )
        return outputs

    def _checked_inputs(self, name, x):
        """The rows of `x` as an array, if they have the encoder's shape."""
        x = _rows(name, x)
        if x.dtype.kind not in "fiub" and x.dtype.name != "bfloat16":
            raise ValueError(
                f"Expected numbers in `{name}`. Received: {name} of dtype "
                f"{x.dtype}"
            )
        self._check_shape(name, x.shape)
        if not self.built:
            self.build(x.shape)
        return x

    def _check_shape(self, name, shape):
        expected = getattr(self.encoder, "input_shape", None)
        if not isinstance(expected, tuple) or _unknown(shape):
            return
        # Keras itself adds a last axis of size 1.
        shape = tuple(shape)
        if not _fits(shape, expected) and not _fits((*shape, 1), expected):
            raise ValueError(
                f"Expected `{name}` of the encoder's input shape, "
                f"{_batched(expected)}. Received: {name}.shape={shape}"
            )

    def _codes(self, codes):
        """The rows of `codes` as an array, if they have the decoder's shape."""
        codes = _rows("codes", codes)
        self.quantizer.check_codes(codes)
        vectors = getattr(self.decoder, "input_shape", None)
        if not isinstance(vectors, tuple):
            return codes
        # A residual quantizer also decodes the codes of its first stages alone.
        stages = (None,) * len(self.quantizer.codes_per_vector)
        expected = (*vectors[:-1], *stages)
        if not _fits(codes.shape, expected):
            raise ValueError(
                "Expected `codes` of the decoder's input shape, "
                f"{_batched(expected)}. Received: codes.shape={codes.shape}"
            )
        return codes

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


def _weighted(x, y=None, sample_weight=None):
    """What Keras is given. It would ignore the weights of rows without `y`."""
    if y is None and sample_weight is not None and hasattr(x, "shape"):
        y = x
    return x, y, sample_weight


def _rows(name, x):
    """An array of rows, from an array, a tensor, a list or a data set."""
    if isinstance(x, keras.utils.PyDataset):
        x = _joined(x[index] for index in range(x.num_batches or 0))
    elif hasattr(x, "element_spec"):  # a tf.data.Dataset
        x = _joined(x)
    try:
        x = as_numpy(x)
    except ValueError:
        x = np.asarray(None)
    if x.ndim == 0 or x.dtype == object:
        raise ValueError(
            f"Expected `{name}` to be an array of rows, a tf.data.Dataset or a "
            f"keras.utils.PyDataset of batches. Received: {name}={x}"
        )
    if len(x) == 0:
        raise ValueError(
            f"Expected at least one row in `{name}`. Received: {name}.shape="
            f"{x.shape}"
        )
    return x


def _joined(batches):
    """The inputs of all batches, which may also have targets and weights."""
    inputs = [keras.utils.unpack_x_y_sample_weight(b)[0] for b in batches]
    if not inputs:
        raise ValueError("Expected at least one batch. Received: none")
    return np.concatenate([as_numpy(x) for x in inputs])


def _is_finite(z):
    """Whether all vectors of each row that are not masked are finite."""
    weights = weights_of(z, backend.get_keras_mask(z))
    finite = counted(z, None)
    if weights is not None:
        finite = ops.where(weights > 0, finite, 1)
    return ops.all(ops.reshape(finite, [ops.shape(z)[0], -1]) > 0, axis=1)


def _unknown(shape):
    """Whether not even the rank is known, as in some of TensorFlow's graphs."""
    return getattr(shape, "rank", 0) is None


def _fits(shape, expected):
    """Whether two shapes agree, but for the batch and for unknown sizes."""
    return len(shape) == len(expected) and all(
        None in sizes or sizes[0] == sizes[1]
        for sizes in zip(shape[1:], expected[1:], strict=True)
    )


def _batched(shape):
    sizes = ", ".join(map(str, ("n", *shape[1:])))
    return f"({sizes}{',' if len(shape) == 1 else ''})"


def _takes_integers(loss):
    """Whether a loss takes the index of a class for a last axis of scores.

    A loss that is not Keras's own may do so.
    """
    loss = as_loss(loss)
    function = getattr(loss, "fn", loss)
    module = getattr(function, "__module__", type(function).__module__)
    if not module.startswith("keras."):
        return True
    name = getattr(function, "__name__", type(function).__name__)
    return name in (
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
    )
