"""The base class of quantizers."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import as_numpy, check_integers, shapes_agree
from blogkeras.state import NumberedDraws, draw_rows


class Quantizer(backend.ReplicaLosses, keras.layers.Layer):
    """The abstract base class of quantizers.

    A vector is described by symbols, each from an alphabet of its own: one code
    of a codebook; one code from each stage of a residual quantizer; one level
    of each component of a finite scalar quantizer. In training the symbols of
    each alphabet are counted.

    Subclasses set `num_codes` and `alphabets`, the sizes of the alphabets, and
    define `_quantize`, `_symbols`, `_codes` and `_decode`.
    """

    codes_per_vector: tuple[int, ...] = ()  # trailing axes of the codes
    num_codes: Any
    alphabets: tuple[int, ...]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Keras would cast the inputs to the compute dtype. The layer computes
        # in float32, so it takes them as they are.
        self.autocast = False
        self.supports_masking = True
        self._draws = None

    def codebooks(self):
        """The layers that count codes: the quantizer itself, or its stages."""
        return [self]

    def _number_draws(self, seed):
        """Makes the two weights that number random draws, once."""
        if self._draws is None:
            self._draws = NumberedDraws(self, seed)

    def _next_seed(self, training):
        """The seed of a training step, or None where nothing is drawn."""
        if self._draws is None or not training:
            return None
        return self._draws.next_step()

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

    def _build_counts(self, shape):
        self.batch_counts = self._add_state(shape, "batch_counts")
        self.total_counts = self._add_state(shape, "total_counts")

    def _sizes(self):
        """How many codes there are: an integer for all, or for each place."""
        return self.num_codes

    def check_codes(self, codes):
        """Raises a `ValueError` unless all codes are integers within range.

        Args:
            codes: Array or tensor, shaped as `encode` gives them.
        """
        check_integers("codes", codes, 0, self._sizes() - 1)

    def count(self, codes, weights=None):
        """How often each code occurs, over all replicas; `(num_codes,)`.

        Args:
            codes: Integers of any shape.
            weights: Floats of the shape of `codes`: how much each counts.
        """
        size = self._sizes()
        check_integers("codes", codes, 0, size - 1)
        codes = ops.cast(ops.reshape(codes, [-1]), "int32")
        if weights is None:
            weights = ops.ones_like(codes, dtype="float32")
        counts = ops.segment_sum(
            ops.reshape(weights, [-1]), codes, num_segments=size
        )
        return backend.all_reduce_sum(counts)

    def count_symbols(self, symbols, weights):
        """How often each symbol occurs, over all replicas.

        Args:
            symbols: `(..., number of alphabets)`, integers.
            weights: How much each vector counts, `(...)`; or each symbol, of
                the shape of `symbols`.

        Returns:
            `(number of alphabets, size of the largest)`, float32.
        """
        number, size = len(self.alphabets), max(self.alphabets)
        first = size * ops.arange(number, dtype="int32")
        if len(weights.shape) < len(symbols.shape):
            weights = ops.broadcast_to(weights[..., None], ops.shape(symbols))
        counts = ops.segment_sum(
            ops.reshape(weights, [-1]),
            ops.reshape(symbols + first, [-1]),
            num_segments=number * size,
        )
        return ops.reshape(backend.all_reduce_sum(counts), [number, size])

    def stacked_counts(self, name):
        """`"batch_counts"` or `"total_counts"`, a row for each alphabet."""
        size = max(self.alphabets)
        rows = []
        for book in self.codebooks():
            counts = getattr(book, name).value
            counts = ops.reshape(counts, [-1, counts.shape[-1]])
            filled = [[0, 0], [0, size - counts.shape[-1]]]
            rows.append(ops.pad(counts, filled))
        return ops.concatenate(rows)

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
        z, weights = self._without_masked(inputs, mask)
        quantized, symbols, loss = self._quantize(z, weights, bool(training))
        if loss is not None:
            self.add_loss(loss)
        quantized = ops.cast(quantized, self.compute_dtype)
        if not return_codes:
            return quantized
        codes = self._codes(symbols)
        if mask is not None:
            # Keras gives the mask to the first output only.
            backend.set_keras_mask(codes, mask)
        return quantized, codes

    def encode(self, inputs):
        """The codes of vectors.

        Args:
            inputs: `(..., dim)`, floating.

        Returns:
            Integers, `(...)`; `(..., num_quantizers)` for residual codes.
        """
        return self._codes(self.symbols(inputs)[0])

    def symbols(self, inputs):
        """The symbols of vectors, and which vectors count.

        Args:
            inputs: `(..., dim)`, floating; a mask that the tensor carries is
                respected.

        Returns:
            `(symbols, weights)`: int32, `(..., number of alphabets)`; and
            float32, `(...)`, which is 1 for each finite vector that is not
            masked.
        """
        _refuse_symbolic(inputs, "call the layer with `return_codes=True`")
        mask = backend.get_keras_mask(inputs)
        inputs = floats("inputs", inputs)
        if not self.built:
            self.build(tuple(inputs.shape))
        z, weights = self._without_masked(inputs, mask)
        return self._symbols(z), counted(z, weights)

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
        _refuse_symbolic(codes, "decode in the `call` of a layer of your own")
        # Check before JAX converts them to int32.
        self.check_codes(codes)
        if not self.built:
            raise ValueError(
                f"The layer {self.name!r} has no codebook yet. Call it once, "
                "or `build` it. Received: `decode` before `build`"
            )
        vectors = self._decode(ops.convert_to_tensor(codes, "int32"))
        return ops.cast(vectors, self.compute_dtype)

    def _without_masked(self, inputs, mask):
        """Finite float32 vectors, and their weights, None for all."""
        z = ops.cast(inputs, "float32")
        weights = weights_of(z, mask)
        if weights is not None:
            # Otherwise the gradient would contain 0 · NaN, which is NaN.
            masked = weights[..., None] == 0
            z = ops.where(ops.isfinite(z) | ~masked, z, 0)
        return self._vectors(z), weights

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

    def adapt(self, vectors, iterations=10, seed=0, verbose=0):
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
    if len(mask.shape) >= len(z.shape) or not shapes_agree(
        mask.shape, z.shape[: len(mask.shape)]
    ):
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


def shape_of(x):
    """The shape of an array, a tensor or a list, as a tuple."""
    return tuple(x.shape if hasattr(x, "shape") else np.shape(x))


def check_stages(codes, number):
    """Raises a `ValueError` where codes are of more than `number` stages."""
    shape = shape_of(codes)
    if not shape or shape[-1] not in range(1, number + 1):
        raise ValueError(
            "Expected the codes of the stages along the last axis, at most "
            f"{number}. Received: codes.shape={shape}"
        )


def drawn_depths(z, number, rate, seed):
    """How many of its stages each row keeps, where stages are dropped.

    Args:
        z: `(..., dim)`, vectors.
        number: Integer, all stages.
        rate: Float. With this probability a row keeps n stages, n uniform from
            1 to `number`.
        seed: A `StepSeed`.

    Returns:
        Floats, to be broadcast to `(...)`.
    """
    axes = len(z.shape) - 1
    rows = ops.shape(z)[0] if axes else 1
    u = draw_uniform((rows, 2), seed)
    depths = ops.minimum(1 + ops.floor(u[:, 1] * number), number)
    depths = ops.where(u[:, 0] < rate, depths, number)
    return ops.reshape(depths, [rows] + [1] * (axes - 1) if axes else [])


def draw_uniform(shape, seed):
    """Numbers from [0, 1) for the rows of a batch that replicas may share."""

    def draw(shape, seed):
        return backend.uniform(shape, dtype="float32", seed=seed)

    return draw_rows(draw, shape, seed)


def floats(name, x):
    """A float32 tensor of finite numbers, from an array, a tensor or a list.

    Raises:
        ValueError: for everything else.
    """
    if not ops.is_tensor(x):
        try:
            x = as_numpy(x).astype("float32")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected `{name}` to be an array of numbers. Received: "
                f"{name}={x!r}"
            ) from error
    return ops.cast(x, "float32")


def _refuse_symbolic(x, instead):
    """Raises for symbolic tensors, which Keras tracks in `call` only."""
    if isinstance(x, keras.KerasTensor):
        raise ValueError(
            "Expected a tensor with values. In a functional model "
            f"{instead}. Received: {x}"
        )
