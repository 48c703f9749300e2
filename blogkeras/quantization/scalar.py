"""Finite scalar quantization: no codebook, only rounding."""

import math
import numbers

import keras
import numpy as np
from keras import ops

from blogkeras.ops import straight_through
from blogkeras.quantization.quantizer import Quantizer, counted


@keras.saving.register_keras_serializable(package="blogkeras")
class FiniteScalarQuantizer(Quantizer):
    """Rounds each component of a vector to one of a few levels.

    Component i has L_i levels, so a vector is one of K = Π L_i codes; there is
    no codebook, and no loss is added. The gradient is that of the activation:

        sigmoid:  output = round((L - 1) σ(z)) / (L - 1)             in [0, 1]
        tanh:     output = round(h tanh(z + s) - o) / ⌊L/2⌋          in [-1, 1]

    with h = (L - 1)/2 · (1 − 10⁻³), o = ½ for even L and 0 for odd, and the
    shift s = artanh(o / h) that maps z = 0 to 0. (L even: one more level below
    zero than above.)

    A code is the number whose digits, in the mixed radix of `levels`, are the
    levels, the first component least significant. Masked vectors are quantized
    (what is not finite in them as 0) but not counted. Computed in float32 under
    any dtype policy. In a compiled step no vector that is not finite is
    counted; a component that is NaN comes out as NaN, an infinite one as the
    last level on its side.

    Args:
        levels: Sequence of integers ≥ 2, L_i; ≥ 3 for `"tanh"`.
        activation: `"tanh"` (the paper) or `"sigmoid"` (the post).

    Call arguments: as of `VectorQuantizer`.

    Input shape:  `(..., len(levels))`, floating.
    Output shape: `(..., len(levels))`, compute dtype; codes `(...)`, int32.

    Example:

    >>> layer = FiniteScalarQuantizer([8, 5, 5, 5])  # 1000 codes
    >>> layer.encode(keras.ops.zeros((2, 16, 16, 4))).shape
    (2, 16, 16)

    Reference:
        [Mentzer et al., 2023](https://arxiv.org/abs/2309.15505);
        [blog post 9826](https://kexue.fm/archives/9826)

    Departs from the post: the post recommends the sigmoid, and the default here
    is the paper's tanh. Departs from the paper: the shift is artanh, where the
    paper's listing has tan, so that 0 is mapped to 0.
    """

    def __init__(self, levels, activation="tanh", **kwargs):
        super().__init__(**kwargs)
        if activation not in ("tanh", "sigmoid"):
            raise ValueError(
                'Expected "tanh" or "sigmoid". Received: '
                f"activation={activation!r}"
            )
        least = 3 if activation == "tanh" else 2
        if np.shape(levels) in ((), (0,)) or not all(
            isinstance(level, numbers.Integral) and level >= least
            for level in levels
        ):
            raise ValueError(
                f"Expected a list of integers of at least {least}"
                + (' (with "sigmoid", of at least 2)' if least > 2 else "")
                + f". Received: levels={levels}"
            )
        levels = [int(level) for level in levels]
        if math.prod(levels) >= 2**31:
            raise ValueError(
                "Expected fewer than 2³¹ codes, the range of int32. Received: "
                f"levels={levels}, {math.prod(levels)} codes"
            )
        self.levels = levels
        self.activation = activation
        self.num_codes = math.prod(levels)
        self._radix = np.cumprod([1, *levels[:-1]]).astype("int32")
        # The output is (digit - zero) / width.
        self._top = np.array(levels, "float32") - 1
        if activation == "tanh":
            self._width = self._zero = np.array(levels, "float32") // 2
        else:
            self._width, self._zero = self._top, np.zeros_like(self._top)

    def build(self, input_shape):
        if input_shape[-1] != len(self.levels):
            raise ValueError(
                "Expected one component for each of the levels along the last "
                f"axis. Received: input_shape={input_shape}, "
                f"levels={self.levels}"
            )
        self.input_spec = keras.layers.InputSpec(axes={-1: len(self.levels)})
        self._build_counts()

    def _bound(self, z):
        """The activation, in units of levels; its rounding is the digit."""
        if self.activation == "sigmoid":
            return self._top * ops.sigmoid(z)
        half = self._top / 2 * (1 - 1e-3)
        offset = np.where(self._top % 2 == 1, 0.5, 0).astype("float32")
        shift = np.arctanh(offset / half)
        return half * ops.tanh(z + shift) - offset + self._zero

    def _quantize(self, z, weights, training):
        bounded = self._bound(z)
        digits = ops.stop_gradient(ops.round(bounded))
        output = straight_through(digits, bounded)
        codes = self._codes(digits)
        if training:
            self._keep_counts(self.count(codes, counted(z, weights)))
        return (output - self._zero) / self._width, codes, None

    def _codes(self, digits):
        digits = ops.clip(digits, 0, self._top)
        # A cast of NaN is undefined: it could leave the range.
        digits = ops.where(ops.isnan(digits), 0, digits)
        return ops.sum(ops.cast(digits, "int32") * self._radix, axis=-1)

    def _encode(self, z):
        return self._codes(ops.round(self._bound(z)))

    def _decode(self, codes):
        digits = codes[..., None] // self._radix % np.array(self.levels)
        return (ops.cast(digits, "float32") - self._zero) / self._width

    def get_config(self):
        return {
            **super().get_config(),
            "levels": self.levels,
            "activation": self.activation,
        }
