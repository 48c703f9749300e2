"""Finite scalar quantization: no codebook, only rounding."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import (
    as_numpy,
    check_boolean,
    check_choice,
    check_integer,
    check_number,
)
from blogkeras.ops import straight_through
from blogkeras.quantization.quantizer import (
    Quantizer,
    counted,
    draw_uniform,
)


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

    With `symmetric=True`, for tanh,

        output = 2 round((L - 1) (tanh(z) + 1) / 2) / (L - 1) - 1

    has L equally spaced levels from -1 to 1 for even L, too, and for L = 2.
    Then no level is at 0 for even L.

    With `noise_rate` a component is, in training and with this probability, not
    rounded, but gets uniform noise as wide as the distance of two levels. So a
    decoder learns what lies between levels. Codes and counts are those of the
    rounded vectors. For several codes for a vector see `GroupedQuantizer`.

    A code is the number whose digits, in the mixed radix of `levels`, are the
    levels; the first component is the least significant digit. With more than
    2³¹ codes, asking for them is an error; everything else works.

    `batch_counts` and `total_counts` say how often each level of each component
    was used, `(len(levels), max(levels))`: the memory does not grow with K.
    Perplexity and usage are by component, too. `count(codes)` counts whole
    codes.

    Masked vectors are quantized (components that are not finite as 0) but not
    counted. The layer computes in float32 under any dtype policy. In a compiled
    step vectors that are not finite are not counted; a NaN component gives NaN,
    an infinite one gives the last level on its side.

    Args:
        levels: Sequence of integers ≥ 2, L_i; ≥ 3 for `"tanh"` that is not
            symmetric.
        activation: `"tanh"` (the paper) or `"sigmoid"` (the post).
        symmetric: Boolean, for `"tanh"`.
        noise_rate: Float in [0, 1].
        seed: Integer or `None`, of the noise. The draws are numbered by a count
            that is saved.

    Call arguments:
        inputs: `(..., len(levels))`, floating.
        training: Boolean. Whether to count codes.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., len(levels))`, floating.
    Output shape: `(..., len(levels))`, compute dtype; codes `(...)`, int32.

    Raises:
        ValueError: on levels out of range, on `symmetric` with the sigmoid
            (which is so without), on inputs of another dimension, and when
            codes are asked for and there are more than 2³¹.

    Example:

    >>> layer = FiniteScalarQuantizer([8, 5, 5, 5])  # 1000 codes
    >>> tuple(layer.encode(keras.ops.zeros((2, 16, 16, 4))).shape)
    (2, 16, 16)

    Reference:
        [Mentzer et al., 2023](https://arxiv.org/abs/2309.15505);
        [blog post 9826](https://kexue.fm/archives/9826)

    Departs from the post: the post recommends the sigmoid, and the default here
    is the paper's tanh. Departs from the paper: the shift is artanh, so that 0
    is mapped to 0; the paper's listing has tan.
    """

    def __init__(
        self,
        levels: Sequence[int],
        activation: str = "tanh",
        *,
        symmetric: bool = False,
        noise_rate: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = levels
        check_choice("activation", activation, ("tanh", "sigmoid"))
        self.symmetric = check_boolean("symmetric", symmetric)
        if self.symmetric and activation == "sigmoid":
            raise ValueError(
                'Expected `symmetric` with "tanh" only: the levels of the '
                "sigmoid are equally spaced anyhow. Received: symmetric=True, "
                'activation="sigmoid"'
            )
        self.noise_rate = check_number(
            "noise_rate", noise_rate, minimum=0, maximum=1
        )
        self.seed = None if seed is None else check_integer("seed", seed)
        if self.noise_rate:
            self._number_draws(self.seed)
        least = 3 if activation == "tanh" and not symmetric else 2
        try:
            levels = as_numpy(levels)
            levels = [
                check_integer("levels", level, minimum=least)
                for level in levels
            ]
        except (TypeError, ValueError):
            levels = []
        if not levels:
            raise ValueError(
                f"Expected a list of integers of at least {least}"
                + (" (symmetric, of at least 2)" if least > 2 else "")
                + f". Received: levels={given!r}"
            )
        self.levels = levels
        self.activation = activation
        self.alphabets = tuple(levels)
        self.num_codes = math.prod(levels)
        # The output is (digit - zero) / width.
        self._top = np.array(levels, "float32") - 1
        if self.symmetric:
            self._width = self._zero = self._top / 2
        elif activation == "tanh":
            self._width = self._zero = np.array(levels, "float32") // 2
        else:
            self._width, self._zero = self._top, np.zeros_like(self._top)

    def build(self, input_shape):
        if not len(input_shape) or input_shape[-1] != len(self.levels):
            raise ValueError(
                "Expected one component for each of the levels along the last "
                f"axis. Received: input_shape={input_shape}, "
                f"levels={self.levels}"
            )
        self.input_spec = keras.layers.InputSpec(axes={-1: len(self.levels)})
        self._build_counts((len(self.alphabets), max(self.levels)))

    def _bound(self, z):
        """The activation, in units of levels; its rounding is the digit."""
        if self.activation == "sigmoid":
            return self._top * ops.sigmoid(z)
        if self.symmetric:
            return self._top / 2 * (ops.tanh(z) + 1)
        half = self._top / 2 * (1 - 1e-3)
        offset = np.where(self._top % 2 == 1, 0.5, 0).astype("float32")
        shift = np.arctanh(offset / half)
        return half * ops.tanh(z + shift) - offset + self._zero

    def _quantize(self, z, weights, training):
        bounded = self._bound(z)
        digits = ops.stop_gradient(ops.round(bounded))
        symbols = self._in_range(digits)
        if training:
            self._keep_counts(self.count_symbols(symbols, counted(z, weights)))
        output = straight_through(digits, bounded)
        output = self._with_noise(output, bounded, self._next_seed(training))
        return self._as_output(output), symbols, None

    def _with_noise(self, output, bounded, seed, width=1.0):
        """The output, some components of which become noise around `bounded`.

        Args:
            output, bounded: `(..., dim)`, in units of levels.
            seed: As `_next_seed` gives it.
            width: Distance of two levels, to be broadcast.
        """
        if seed is None or not self.noise_rate:
            return output
        shape = ops.shape(bounded)
        noisy = draw_uniform(shape, seed) < self.noise_rate
        noise = draw_uniform(shape, seed) - 0.5
        return ops.where(noisy, bounded + width * noise, output)

    def _as_output(self, place):
        """What is at a place given in units of levels, from the lowest one."""
        return (place - self._zero) / self._width

    def _symbols(self, z):
        return self._in_range(ops.round(self._bound(z)))

    def _in_range(self, digits):
        digits = ops.clip(digits, 0, self._top)
        # Casting NaN to an integer is undefined: the result could be out of
        # range.
        digits = ops.where(ops.isnan(digits), 0, digits)
        return ops.cast(digits, "int32")

    def _radix(self):
        """The value of each digit, int32."""
        if self.num_codes > 2**31:
            raise ValueError(
                "Expected at most 2³¹ codes, as many as int32 can number. "
                "Quantize without asking for codes, or use fewer levels. "
                f"Received: levels={self.levels}, {self.num_codes} codes"
            )
        return np.cumprod([1, *self.levels[:-1]]).astype("int32")

    def _digits(self, codes):
        levels = np.array(self.levels, "int32")
        return codes[..., None] // self._radix() % levels

    def _codes(self, symbols):
        return ops.sum(symbols * self._radix(), axis=-1)

    def compute_output_spec(
        self, inputs, training=False, return_codes=False, mask=None
    ):
        if return_codes:
            self._radix()
        return super().compute_output_spec(inputs, training, return_codes, mask)

    def decode(self, codes):
        self._radix()
        return super().decode(codes)

    def _decode(self, codes):
        return self._as_output(ops.cast(self._digits(codes), "float32"))

    def load_own_variables(self, store):
        # Older files have counts of whole codes, `(num_codes,)`. Their sums
        # over all components but one are the counts of that component's levels.
        old = {
            key: np.asarray(store[key])
            for key in ("0", "1")
            if key in store and len(store[key].shape) == 1
        }
        if not old:
            super().load_own_variables(store)
            return
        for variable, joint in zip(
            (self.batch_counts, self.total_counts), old.values(), strict=True
        ):
            if joint.size != self.num_codes:
                raise ValueError(
                    f"Expected counts of {self.num_codes} codes. Received: "
                    f"{joint.size} counts"
                )
            # The first component is the least significant: the last axis.
            joint = joint.reshape(self.levels[::-1])
            counts = np.zeros(variable.shape, "float32")
            for place, level in enumerate(self.levels):
                axis = len(self.levels) - 1 - place
                others = tuple(set(range(joint.ndim)) - {axis})
                counts[place, :level] = joint.sum(others)
            variable.assign(counts)

    def get_config(self):
        return {
            **super().get_config(),
            "levels": self.levels,
            "activation": self.activation,
            "symmetric": self.symmetric,
            "noise_rate": self.noise_rate,
            "seed": self.seed,
        }
