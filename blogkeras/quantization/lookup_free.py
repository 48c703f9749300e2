"""Look-up-free quantization: the signs of the components are the code."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    check_boolean,
    check_integer,
    check_number,
)
from blogkeras.ops import normalize, straight_through
from blogkeras.quantization.quantizer import Quantizer, counted, shape_of

# Codes of more bits are not numbers of int32.
MOST_BITS = 31


@keras.saving.register_keras_serializable(package="blogkeras")
class LookupFreeQuantizer(Quantizer):
    """Replaces each component of a vector by its sign: d bits, 2^d codes.

    There is no codebook (LFQ of MAGVIT-v2). The gradient is straight through:

        output = sg[sign(z)] + z - sg[z],  sign(0) = -1

    With `spherical=True` (BSQ) vectors are first divided by their norms, and
    the codes are unit vectors, too:

        u = z / ‖z‖,  output = sg[sign(u) / √d] + u - sg[u]

    **Loss.** With entropies in nats, E the mean over the vectors that count,
    and s = 1, or 1 / √d for BSQ:

        loss = a (E[H(p(·|z))] - b H(E[p(·|z)])) + γ mean((z - sg[code])²)
        p(c|z) ∝ exp(-‖z - c‖² / τ) = Π_i p_i,  p_i(±s) = sigmoid(±4 s z_i / τ)

    a is `entropy_cost`, b `diversity`, γ `commitment_cost`, τ `temperature`;
    for BSQ z is u. The first term makes each vector decided, the second makes
    all codes used. The distribution of a vector over the 2^d codes is a product
    over its bits, so its entropy is the sum of theirs, exactly. The mean over
    vectors is no such product: in place of its entropy stands Σ_i H(E[p_i]) of
    the single bits. That is an upper bound, and equal to it where the bits are
    independent over the batch; two bits that are always alike look balanced to
    it. Nothing grows with 2^d. Means are taken over all
    replicas.

    A code is the number whose binary digits are the bits, the first component
    the least significant one. With more than 31 bits int32 cannot number codes:
    then a code is its d bits, `(..., d)`. Usage is counted by bit.

    Masked vectors are quantized (components that are not finite as 0), but do
    not enter loss and counts. The layer computes in float32 under any dtype
    policy. In a compiled step vectors that are not finite are not counted.

    Args:
        num_bits: Integer ≥ 1. Number of components d.
        entropy_cost: Float ≥ 0. Weight a.
        diversity: Float ≥ 0. Weight b.
        commitment_cost: Float ≥ 0. Weight γ. It keeps components near ±1; where
            it is large against the other losses, bits stop changing and few
            codes are used.
        temperature: Float > 0. τ.
        spherical: Boolean. Binary spherical quantization.

    Call arguments:
        inputs: `(..., num_bits)`, floating.
        training: Boolean. Whether to count codes.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., num_bits)`, floating.
    Output shape: `(..., num_bits)`, compute dtype; codes, int32, `(...)`, or
        `(..., num_bits)` for more than 31 bits.

    Raises:
        ValueError: on numbers out of range, and on inputs of another dimension.

    Example:

    >>> layer = LookupFreeQuantizer(18)  # 262,144 codes
    >>> quantized, codes = layer(
    ...     keras.random.normal((2, 8, 8, 18)), return_codes=True
    ... )
    >>> tuple(quantized.shape), tuple(codes.shape)
    ((2, 8, 8, 18), (2, 8, 8))

    Reference:
        [Yu et al., 2023](https://arxiv.org/abs/2310.05737), LFQ;
        [Zhao et al., 2024](https://arxiv.org/abs/2406.07548), BSQ;
        [blog post 9826](https://kexue.fm/archives/9826), on rounding in place
        of a codebook
    """

    def __init__(
        self,
        num_bits: int,
        entropy_cost: float = 0.1,
        diversity: float = 1.0,
        commitment_cost: float = 0.0,
        *,
        temperature: float = 0.01,
        spherical: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_bits = check_integer("num_bits", num_bits, minimum=1)
        self.entropy_cost = check_number(
            "entropy_cost", entropy_cost, minimum=0
        )
        self.diversity = check_number("diversity", diversity, minimum=0)
        self.commitment_cost = check_number(
            "commitment_cost", commitment_cost, minimum=0
        )
        self.temperature = check_number("temperature", temperature, above=0)
        self.spherical = check_boolean("spherical", spherical)
        self.size = self.num_bits**-0.5 if self.spherical else 1.0
        self.alphabets = (2,) * self.num_bits
        self.num_codes = 2**self.num_bits
        self._as_bits = self.num_bits > MOST_BITS
        if self._as_bits:
            self.codes_per_vector = (self.num_bits,)

    def build(self, input_shape):
        if not len(input_shape) or input_shape[-1] != self.num_bits:
            raise ValueError(
                "Expected one component for each bit along the last axis. "
                f"Received: input_shape={input_shape}, num_bits={self.num_bits}"
            )
        self.input_spec = keras.layers.InputSpec(axes={-1: self.num_bits})
        self._build_counts((self.num_bits, 2))

    def _sizes(self):
        return 2 if self._as_bits else self.num_codes

    def check_codes(self, codes):
        """Raises a `ValueError` unless all codes are integers within range.

        Args:
            codes: `(...)`, or `(..., num_bits)` for more than 31 bits.
        """
        super().check_codes(codes)
        shape = shape_of(codes)
        if self._as_bits and shape[-1:] != (self.num_bits,):
            raise ValueError(
                f"Expected codes of {self.num_bits} bits along the last axis: "
                "int32 cannot number so many codes. Received: codes.shape="
                f"{shape}"
            )

    def _placed(self, z):
        """The vectors as they are compared with the codes."""
        return normalize(z) if self.spherical else z

    def _quantize(self, z, weights, training):
        z = self._placed(z)
        bits = ops.cast(z > 0, "int32")
        quantized = self._vectors_of(bits)
        weights = counted(z, weights)
        loss = self._loss(z, quantized, weights)
        if training:
            self._keep_counts(self.count_symbols(bits, weights))
        return straight_through(quantized, z), bits, loss

    def _loss(self, z, quantized, weights):
        """The loss, a scalar; 0 where no vector counts."""
        total = ops.maximum(backend.all_reduce_sum(ops.sum(weights)), 1)
        counts = weights[..., None] > 0
        z = ops.where(counts, z, 0)
        # Beyond the bounds a bit is certain in float32.
        logits = ops.clip(4 * self.size / self.temperature * z, -1e3, 1e3)

        def mean(x):  # over all vectors of all replicas; by component
            x = ops.reshape(ops.where(counts, x, 0), [-1, self.num_bits])
            return backend.all_reduce_sum(ops.sum(x, axis=0)) / total

        error = ops.where(counts, ops.square(z - quantized), 0)
        here = ops.maximum(ops.sum(weights), 1) * self.num_bits
        loss = self.commitment_cost * ops.sum(error) / here
        batch = -sum(
            _x_log_x(mean(ops.sigmoid(sign * logits))) for sign in (1, -1)
        )
        return loss + self.entropy_cost * ops.sum(
            mean(_entropy(logits)) - self.diversity * batch
        )

    def _symbols(self, z):
        return ops.cast(self._placed(z) > 0, "int32")

    def _codes(self, symbols):
        if self._as_bits:
            return symbols
        return ops.sum(symbols * self._places(), axis=-1)

    def _places(self):
        """The value of each bit."""
        return 2 ** np.arange(self.num_bits, dtype="int32")

    def _vectors_of(self, bits):
        return self.size * (2 * ops.cast(bits, "float32") - 1)

    def _decode(self, codes):
        if not self._as_bits:
            codes = codes[..., None] // self._places() % 2
        return self._vectors_of(codes)

    def get_config(self):
        return {
            **super().get_config(),
            "num_bits": self.num_bits,
            "entropy_cost": self.entropy_cost,
            "diversity": self.diversity,
            "commitment_cost": self.commitment_cost,
            "temperature": self.temperature,
            "spherical": self.spherical,
        }


def _entropy(x):
    """The entropy of a bit that is 1 with probability sigmoid(x), in nats."""
    x = ops.abs(x)
    return ops.softplus(-x) + x * ops.sigmoid(-x)


def _x_log_x(x):
    """x log x, and 0 at 0, where the gradient is finite."""
    return x * ops.log(ops.maximum(x, 1e-37))
