"""Residual quantization by rounding: each stage rounds the rest, finer."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from blogkeras.arguments import check_integer, check_number
from blogkeras.ops import straight_through
from blogkeras.quantization.quantizer import (
    check_stages,
    counted,
    drawn_depths,
)
from blogkeras.quantization.scalar import FiniteScalarQuantizer


@keras.saving.register_keras_serializable(package="blogkeras")
class ResidualFiniteScalarQuantizer(FiniteScalarQuantizer):
    """Rounds each component of a vector to levels, and the rest to finer ones.

    The first stage is a `FiniteScalarQuantizer` with the same options. Let u be
    a component after the activation, in units of levels: the lowest level is at
    0, the highest at L - 1. What rounding leaves is within ±½, whatever the
    activation is, also at both ends. Each further stage divides that interval
    into L equal cells and takes the middle of one:

        v_0 = u,  d_i = round(v_i),  v_{i+1} = L (v_i - d_i) + (L - 1) / 2
        û = d_0 + Σ_{i>0} (d_i - (L - 1) / 2) L^{-i}

    So the scale of stage i is L^{-i} for every activation, û is on a grid with
    the distance L^{-(n-1)} after n stages, and |û - u| ≤ L^{-(n-1)} / 2. The
    output in terms of û is

        sigmoid:          û / (L - 1)
        tanh:             (û - ⌊L/2⌋) / ⌊L/2⌋
        tanh, symmetric:  2 û / (L - 1) - 1

    There is no codebook and no loss; the gradient is that of the activation.

    The cells at both ends of the range are half outside of it. So with several
    stages one of L combinations of digits is not in use. Of two levels that is
    half of them: the second digit follows from the first, only from the third
    stage on each halves the error, and n > 1 stages have 2^{n-1} values.

    With `noise_rate` a component is, in training and with this probability, not
    rounded, but gets uniform noise as wide as the distance of two levels of the
    last stage: L^{-(n-1)}, where a row keeps n stages. Codes and counts are
    those of the rounded vectors.

    A stage has one code, the number whose digits are the levels, as in
    `FiniteScalarQuantizer`. Usage is counted by stage and component.

    Args:
        num_quantizers: Integer ≥ 1. Number of stages, n.
        levels: Sequence of integers ≥ 2, L for each component; ≥ 3 for `"tanh"`
            that is not symmetric.
        activation: `"tanh"` or `"sigmoid"`.
        symmetric: Boolean, for `"tanh"`.
        noise_rate: Float in [0, 1].
        quantizer_dropout: Float in [0, 1]. A row of a training batch keeps,
            with this probability, only its first stages, as in
            `ResidualVectorQuantizer`.
        seed: Integer or `None`, of noise and dropout. The draws are numbered by
            a count that is saved.

    Call arguments:
        inputs: `(..., len(levels))`, floating.
        training: Boolean. Whether to count codes, to drop stages and to add
            noise.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., len(levels))`, floating.
    Output shape: `(..., len(levels))`, compute dtype; codes
        `(..., num_quantizers)`, int32. `decode` also takes the codes of the
        first stages alone.

    Raises:
        ValueError: on numbers out of range, on `symmetric` with the sigmoid, on
            inputs of another dimension, and when codes are asked for and a
            stage has more than 2³¹.

    Example:

    >>> layer = ResidualFiniteScalarQuantizer(3, [5, 5, 5])
    >>> codes = layer.encode(keras.ops.zeros((2, 16, 3)))
    >>> tuple(codes.shape)
    (2, 16, 3)

    Reference:
        [Mentzer et al., 2023](https://arxiv.org/abs/2309.15505), one stage;
        [Parker et al., 2024](https://arxiv.org/abs/2411.19842), symmetric
        levels and noise;
        [blog post 9826](https://kexue.fm/archives/9826)
    """

    def __init__(
        self,
        num_quantizers: int,
        levels: Sequence[int],
        activation: str = "tanh",
        *,
        symmetric: bool = False,
        noise_rate: float = 0.0,
        quantizer_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            levels,
            activation,
            symmetric=symmetric,
            noise_rate=noise_rate,
            seed=seed,
            **kwargs,
        )
        self.num_quantizers = check_integer(
            "num_quantizers", num_quantizers, minimum=1
        )
        self.quantizer_dropout = check_number(
            "quantizer_dropout", quantizer_dropout, minimum=0, maximum=1
        )
        if self.quantizer_dropout:
            self._number_draws(self.seed)
        self.alphabets = tuple(self.levels) * self.num_quantizers
        self.codes_per_vector = (self.num_quantizers,)

    def _stage_digits(self, bounded):
        """The digits of each stage, a list of int32 tensors."""
        digits = [self._in_range(ops.round(bounded))]
        for _ in range(1, self.num_quantizers):
            rest = bounded - ops.cast(digits[-1], "float32")
            bounded = (self._top + 1) * rest + self._top / 2
            digits.append(self._in_range(ops.round(bounded)))
        return digits

    def _place(self, digits, kept=None):
        """û, where the digits of the first stages lead.

        Args:
            digits: List of tensors.
            kept: `None`, or for each stage which vectors have it.
        """
        first, *others = [ops.cast(digit, "float32") for digit in digits]
        rest = 0.0
        for index in reversed(range(len(others))):
            rest = (others[index] - self._top / 2 + rest) / (self._top + 1)
            if kept is not None:
                rest = ops.where(kept[index + 1], rest, 0)
        return first + rest

    def _quantize(self, z, weights, training):
        bounded = self._bound(z)
        digits = self._stage_digits(ops.stop_gradient(bounded))
        seed, kept, depths = self._next_seed(training), None, None
        if seed is not None and self.quantizer_dropout:
            depths = drawn_depths(
                z, self.num_quantizers, self.quantizer_dropout, seed
            )[..., None]
            kept = [index < depths for index in range(self.num_quantizers)]
        symbols = ops.concatenate(digits, -1)
        if training:
            counting = ops.broadcast_to(
                counted(z, weights)[..., None], ops.shape(z)
            )
            by_stage = [counting] * self.num_quantizers
            if kept is not None:
                by_stage = [counting * ops.cast(k, "float32") for k in kept]
            self._keep_counts(
                self.count_symbols(symbols, ops.concatenate(by_stage, -1))
            )
        place = self._place(digits, kept)
        # Digits of NaN are 0, but its value stays NaN, as that of one stage.
        place = ops.where(ops.isnan(bounded), bounded, place)
        output = straight_through(place, bounded)
        if depths is None:
            depths = self.num_quantizers
        width = ops.power(self._top + 1, 1.0 - depths)
        output = self._with_noise(output, bounded, seed, width)
        return self._as_output(output), symbols, None

    def _symbols(self, z):
        return ops.concatenate(self._stage_digits(self._bound(z)), -1)

    def _codes(self, symbols):
        code = super()._codes
        stages = ops.split(symbols, self.num_quantizers, axis=-1)
        return ops.stack([code(digits) for digits in stages], -1)

    def check_codes(self, codes):
        """Raises a `ValueError` unless all codes are integers within range.

        Args:
            codes: `(..., stages)`, at most `num_quantizers`.
        """
        super().check_codes(codes)
        check_stages(codes, self.num_quantizers)

    def _decode(self, codes):
        stages = range(codes.shape[-1])
        place = self._place([self._digits(codes[..., i]) for i in stages])
        return self._as_output(place)

    def get_config(self):
        return {
            **super().get_config(),
            "num_quantizers": self.num_quantizers,
            "quantizer_dropout": self.quantizer_dropout,
        }
