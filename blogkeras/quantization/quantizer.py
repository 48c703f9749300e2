"""What all quantizers share, and measures of how codes are used."""

import numbers

import keras
from keras import ops

from blogkeras import backend


def perplexity(counts):
    """How many codes are in use, effectively: exp of the entropy, in [1, K].

        exp(-Σ p log(p + 1e-10)),  p = counts / Σ counts

    Args:
        counts: `(..., num_codes)`, how often each code was used. All zero gives
            1.

    Returns:
        `(...)`, float32.
    """
    counts = ops.convert_to_tensor(counts, "float32")
    total = ops.sum(counts, axis=-1, keepdims=True)
    p = counts / ops.where(total > 0, total, 1)
    return ops.exp(-ops.sum(p * ops.log(p + 1e-10), axis=-1))


def usage(counts):
    """The share of codes that were used at all, in [0, 1].

    Args:
        counts: `(..., num_codes)`, how often each code was used.

    Returns:
        `(...)`, float32.
    """
    counts = ops.convert_to_tensor(counts, "float32")
    return ops.mean(ops.cast(counts > 0, "float32"), axis=-1)


class Quantizer(backend.ReplicaLosses, keras.layers.Layer):
    """What all quantizers share. Abstract: subclasses say `_quantize`,
    `_decode`, `num_codes`, and the number of codes for one vector.
    """

    codes_per_vector = ()  # trailing axes of the codes

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Inputs are wanted as they are; the arithmetic is in float32.
        self.autocast = False
        self.supports_masking = True

    def codebooks(self):
        """The layers that count codes: the quantizer itself, or its stages."""
        return [self]

    def _add_state(self, shape, name):
        return self.add_weight(
            shape=shape,
            initializer="zeros",
            trainable=False,
            dtype="float32",
            autocast=False,
            # Every replica assigns the same, reduced value.
            aggregation="only_first_replica",
            name=name,
        )

    def _build_counts(self):
        self.batch_counts = self._add_state((self.num_codes,), "batch_counts")
        self.total_counts = self._add_state((self.num_codes,), "total_counts")

    def count(self, codes, weights=None):
        """How often each code occurs, over all replicas; `(num_codes,)`.

        Args:
            codes: Integers of any shape.
            weights: Floats of the shape of `codes`: how much each counts.
        """
        codes = ops.reshape(codes, [-1])
        if weights is None:
            weights = ops.ones_like(codes, dtype="float32")
        counts = ops.segment_sum(
            ops.reshape(weights, [-1]), codes, num_segments=self.num_codes
        )
        return backend.all_reduce_sum(counts)

    def _keep_counts(self, counts):
        self.batch_counts.assign(counts)
        self.total_counts.assign(self.total_counts + counts)

    def reset_counts(self):
        """Starts `total_counts` again from zero."""
        if not self.built:
            return
        for codebook in self.codebooks():
            counts = codebook.total_counts
            counts.assign(ops.zeros(counts.shape))

    def call(self, inputs, training=False, return_codes=False, mask=None):
        z = ops.cast(inputs, "float32")
        weights = weights_of(z, mask)
        if weights is not None:
            # Zero times NaN would be in the gradients else.
            ignored = ops.logical_not(ops.isfinite(z)) & (
                weights[..., None] == 0
            )
            z = ops.where(ignored, 0, z)
        z = self._vectors(z)
        quantized, codes, loss = self._quantize(z, weights, bool(training))
        if loss is not None:
            self.add_loss(loss)
        if mask is not None:
            backend.set_keras_mask(codes, mask)  # Keras: the first output only
        quantized = ops.cast(quantized, self.compute_dtype)
        return (quantized, codes) if return_codes else quantized

    def encode(self, inputs):
        """The codes of vectors.

        Args:
            inputs: `(..., dim)`, floating.

        Returns:
            Integers, `(...)`; `(..., num_quantizers)` for residual codes.
        """
        inputs = _values(inputs, "call the layer with `return_codes=True`")
        if not self.built:
            self.build(tuple(inputs.shape))
        return self._encode(self._vectors(inputs))

    def decode(self, codes):
        """The vectors that codes stand for.

        Args:
            codes: Integers shaped as `encode` gives them.

        Returns:
            `(..., dim)`, of the layer's compute dtype.

        Raises:
            ValueError: If the codes are not integers, or out of range. (In a
                compiled function values are not known: there they are not
                checked.)
        """
        codes = _values(codes, "decode in the `call` of a layer of your own")
        if "int" not in keras.backend.standardize_dtype(codes.dtype):
            raise ValueError(
                "Expected integer codes, as `encode` returns them. Received: "
                f"codes of dtype {keras.backend.standardize_dtype(codes.dtype)}"
            )
        check_range("codes", codes, self.num_codes)
        if not self.built:
            raise ValueError(
                f"The layer {self.name!r} has no codebook yet. Call it once, "
                "or `build` it. Received: `decode` before `build`"
            )
        vectors = self._decode(ops.cast(codes, "int32"))
        return ops.cast(vectors, self.compute_dtype)

    def _vectors(self, inputs):
        dim = self.input_spec.axes[-1]
        z = ops.cast(inputs, "float32")
        if len(z.shape) == 0 or z.shape[-1] != dim:
            raise ValueError(
                f"Expected vectors of size {dim} along the last axis. "
                f"Received: inputs.shape={tuple(z.shape)}"
            )
        if backend.is_concrete(z) and not bool(ops.all(ops.isfinite(z))):
            raise ValueError(
                "Expected finite vectors: a NaN or an infinity has no nearest "
                "code. Look for what made them: too high a learning rate, or "
                "float16 overflow. Received: inputs with non-finite values"
            )
        return z

    def adapt(self, vectors, iterations=10, seed=0):
        raise ValueError(
            "Expected a quantizer with a codebook that k-means can set, such "
            f"as VectorQuantizer. Received: {self.__class__.__name__}"
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(
        self, inputs, training=False, return_codes=False, mask=None
    ):
        quantized = keras.KerasTensor(inputs.shape, self.compute_dtype)
        if not return_codes:
            return quantized
        shape = (*inputs.shape[:-1], *self.codes_per_vector)
        return quantized, keras.KerasTensor(shape, "int32")


def weights_of(z, mask):
    """1 for each vector that counts, else 0; `(...)`, or None for all."""
    if mask is None:
        return None
    mask = ops.cast(mask, "float32")
    if len(mask.shape) >= len(z.shape):
        raise ValueError(
            "Expected a mask that says of each vector whether it counts, "
            f"without the axis of its components. Received: mask.shape="
            f"{tuple(mask.shape)} for vectors {tuple(z.shape)}"
        )
    for _ in range(len(z.shape) - 1 - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return ops.broadcast_to(mask, ops.shape(z)[:-1])


def counted(z, weights):
    """1 for each finite vector that counts, else 0; `(...)`."""
    finite = ops.cast(ops.all(ops.isfinite(z), axis=-1), "float32")
    return finite if weights is None else finite * weights


def check_integer(name, value, least):
    """`value` as an `int`."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"Expected an integer of at least {least}. Received: "
            f"{name}={value!r}"
        )
    return int(value)


def check_range(name, values, size):
    """That integers whose values are known now are from 0 to size - 1."""
    if not backend.is_concrete(values):
        return
    values = ops.convert_to_numpy(values)
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(
            f"Expected {name} from 0 to {size - 1}. Received: {name} from "
            f"{values.min()} to {values.max()}"
        )


def _values(x, instead):
    """A tensor. Outside of `call` Keras cannot keep a symbolic one's layer."""
    if isinstance(x, keras.KerasTensor):
        raise ValueError(
            "Expected a tensor with values. In a functional model "
            f"{instead}. Received: {x}"
        )
    return ops.convert_to_tensor(x)
