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

    With the activation u in [0, 1], σ(z) or (tanh(z) + 1) / 2, a component of L
    levels has in stage i the digit d_i:

        v_0 = u,  d_i = round((L - 1) v_i),  v_{i+1} = (L - 1) v_i - d_i + ½
        û = Σ_i (d_i / (L - 1) - ½ [i > 0]) (L - 1)^{-i}
        output = û for the sigmoid, 2 û - 1 for tanh

    so the levels of a stage are as far apart as 1 / (L - 1) of those of the one
    before, and |û - u| ≤ (L - 1)^{-n} / 2 after n stages. There is no codebook
    and no loss; the gradient is that of the activation.

    A stage has one code, the number whose digits are the levels, as in
    `FiniteScalarQuantizer`. Usage is counted by stage and component.

    Args:
        num_quantizers: Integer ≥ 1. Number of stages, n.
        levels: Sequence of integers ≥ 3, L for each component.
        activation: `"tanh"` or `"sigmoid"`.
        quantizer_dropout: Float in [0, 1]. A row of a training batch keeps,
            with this probability, only its first stages, as in
            `ResidualVectorQuantizer`.
        seed: Integer or `None`, of the dropout. The draws are numbered by a
            count that is saved.

    Call arguments:
        inputs: `(..., len(levels))`, floating.
        training: Boolean. Whether to count codes and to drop stages.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., len(levels))`, floating.
    Output shape: `(..., len(levels))`, compute dtype; codes
        `(..., num_quantizers)`, int32. `decode` also takes the codes of the
        first stages alone.

    Raises:
        ValueError: on numbers out of range, on inputs of another dimension, and
            when codes are asked for and a stage has more than 2³¹.

    Example:

    >>> layer = ResidualFiniteScalarQuantizer(3, [5, 5, 5])
    >>> codes = layer.encode(keras.ops.zeros((2, 16, 3)))
    >>> tuple(codes.shape)
    (2, 16, 3)

    Reference:
        [Mentzer et al., 2023](https://arxiv.org/abs/2309.15505);
        [blog post 9826](https://kexue.fm/archives/9826)

    Departs from the paper, which has one stage: the levels of each stage are
    equally spaced and reach both ends, also where their number is even.
    """

    def __init__(
        self,
        num_quantizers: int,
        levels: Sequence[int],
        activation: str = "tanh",
        *,
        quantizer_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(levels, activation, seed=seed, **kwargs)
        if min(self.levels) < 3:
            raise ValueError(
                "Expected a list of integers of at least 3: of two levels the "
                f"stages would not get finer. Received: levels={levels!r}"
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

    def _activated(self, z):
        """u, in [0, 1]."""
        if self.activation == "sigmoid":
            return ops.sigmoid(z)
        return (ops.tanh(z) + 1) / 2

    def _stage_digits(self, u):
        """The digits of each stage, a list of int32 tensors."""
        digits = []
        for _ in range(self.num_quantizers):
            digit = self._in_range(ops.round(self._top * u))
            u = self._top * u - ops.cast(digit, "float32") + 0.5
            digits.append(digit)
        return digits

    def _value(self, digits, kept=None):
        """The vectors of digits, those of the first stages at least.

        Args:
            digits: List of tensors.
            kept: `None`, or for each stage which vectors have it.
        """
        u = 0.5
        for index in reversed(range(len(digits))):
            digit = ops.cast(digits[index], "float32")
            finer = (digit + u - 0.5) / self._top
            u = finer if kept is None else ops.where(kept[index], finer, u)
        return u if self.activation == "sigmoid" else 2 * u - 1

    def _quantize(self, z, weights, training):
        u = self._activated(z)
        digits = self._stage_digits(ops.stop_gradient(u))
        seed, kept = self._next_seed(training), None
        if seed is not None:
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
        bounded = u if self.activation == "sigmoid" else 2 * u - 1
        quantized = self._value(digits, kept)
        # Digits of NaN are 0, but its value stays NaN, as that of one stage.
        quantized = ops.where(ops.isnan(bounded), bounded, quantized)
        return straight_through(quantized, bounded), symbols, None

    def _symbols(self, z):
        return ops.concatenate(self._stage_digits(self._activated(z)), -1)

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
        return self._value([self._digits(codes[..., i]) for i in stages])

    def get_config(self):
        config = super().get_config()
        del config["symmetric"], config["noise_rate"]
        return {
            **config,
            "num_quantizers": self.num_quantizers,
            "quantizer_dropout": self.quantizer_dropout,
        }
