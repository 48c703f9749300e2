"""Residual quantization: each codebook quantizes the rest of the one before."""

from typing import Any

import keras
from keras import ops

from blogkeras.arguments import check_integer
from blogkeras.quantization import kmeans
from blogkeras.quantization.codebook import VectorQuantizer
from blogkeras.quantization.gradients import EstimatedGradient
from blogkeras.quantization.quantizer import Quantizer, floats


@keras.saving.register_keras_serializable(package="blogkeras")
class ResidualVectorQuantizer(EstimatedGradient, Quantizer):
    """Quantizes vectors by a sum of codes, one from each of several codebooks.

        r_0 = z,  r_i = r_{i-1} - sg[e_i],  e_i = nearest code to r_{i-1}
        output = sg[Σ e_i] + z - sg[z]

    Each stage is a `VectorQuantizer`, in `stages`, with its own losses, state
    and usage. The gradient is estimated once, for the sum of the codes: by
    default it is exactly the identity for any number of stages. The other
    gradients are those of `VectorQuantizer`, with Σ e_i for the code.

    Args:
        num_quantizers: Integer ≥ 1. Number of stages.
        num_codes: Integer ≥ 2. Number of codes of every stage.
        codebook_cost: Float ≥ 0. Weight of ||sg[r] - e||²; without effect under
            `ema_decay`. Defaults to 1, for the DiVeQ gradients to 0.
        commitment_cost: Float ≥ 0. Weight of ||r - sg[e]||². Defaults to 0.25,
            for the DiVeQ gradients to 0.
        ema_decay: Float in [0, 1), say 0.99, for codebooks that are moving
            averages, or `None` for trained ones.
        restart_threshold: Float in [0, 1), say 0.1. A code used less than this
            fraction of an equal share is restarted; for `ema_decay` only.
        embeddings_initializer: Initializer of the codebooks. (One with a seed
            starts every stage alike.)
        gradient: `"straight-through"`, `"rotation"`, `"diveq"` or
            `"diveq-detach"`.
        noise_variance: Float ≥ 0, of the noise of `"diveq"`.
        seed: Integer or `None`, of that noise.

    Call arguments:
        inputs: `(..., dim)`, floating.
        training: Boolean. Whether to count codes, and to update
            averaged codebooks.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., dim)`, floating.
    Output shape: `(..., dim)`; codes `(..., num_quantizers)`, int32. `decode`
        also takes the codes of the first stages alone, which give a coarser
        vector.

    Raises:
        ValueError: on numbers out of range.

    Example:

    >>> layer = ResidualVectorQuantizer(4, 256, ema_decay=0.99)
    >>> tuple(layer.encode(keras.ops.ones((2, 50, 16))).shape)
    (2, 50, 4)

    Reference:
        [Zeghidour et al., 2021](https://arxiv.org/abs/2107.03312), residual
        vector quantizer
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        codebook_cost: float | None = None,
        commitment_cost: float | None = None,
        *,
        ema_decay: float | None = None,
        restart_threshold: float = 0.0,
        embeddings_initializer: Any = "uniform",
        gradient: str = "straight-through",
        noise_variance: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        num_quantizers = check_integer(
            "num_quantizers", num_quantizers, minimum=1
        )
        self.num_quantizers = num_quantizers
        self.embeddings_initializer = keras.initializers.get(
            embeddings_initializer
        )
        self.codes_per_vector = (num_quantizers,)
        self._choose_gradient(
            gradient, noise_variance, seed, codebook_cost, commitment_cost
        )
        self.stages = [
            VectorQuantizer(
                num_codes,
                self.codebook_cost,
                self.commitment_cost,
                ema_decay=ema_decay,
                restart_threshold=restart_threshold,
                embeddings_initializer=_copy(self.embeddings_initializer),
                trainable=self.trainable,
                dtype=self.dtype_policy,
                name=f"stage_{index}",
            )
            for index in range(num_quantizers)
        ]
        # The stages have checked and converted the arguments.
        first = self.stages[0]
        self.num_codes = first.num_codes
        self.ema_decay = first.ema_decay
        self.restart_threshold = first.restart_threshold
        self.alphabets = (self.num_codes,) * num_quantizers

    def codebooks(self):
        return self.stages

    def build(self, input_shape):
        for stage in self.stages:
            stage.build(input_shape)
        self.input_spec = self.stages[0].input_spec

    def _quantize(self, z, weights, training):
        residual, total, codes, losses = z, 0, [], []
        for stage in self.stages:
            quantized, code, loss = stage._quantize_raw(
                residual, weights, training
            )
            residual = residual - ops.stop_gradient(quantized)
            total = total + quantized
            codes.append(code)
            losses.append(loss)
        output = self._estimated(total, z, self._next_seed(training))
        return output, ops.stack(codes, -1), sum(losses)

    def _symbols(self, z):
        codes = []
        for stage in self.stages:
            code = stage._symbols(z)
            z = z - stage._decode(code[..., 0])
            codes.append(code)
        return ops.concatenate(codes, -1)

    def _codes(self, symbols):
        return symbols

    def _decode(self, codes):
        if codes.shape[-1] not in range(1, self.num_quantizers + 1):
            raise ValueError(
                "Expected the codes of the stages along the last axis, at most "
                f"{self.num_quantizers}. Received: codes.shape={codes.shape}"
            )
        return sum(
            stage._decode(codes[..., index])
            for index, stage in enumerate(self.stages[: codes.shape[-1]])
        )

    def adapt(self, vectors, iterations=10, seed=0, verbose=0):
        """Sets each codebook to the k-means clusters of its stage's inputs.

        Args:
            vectors, iterations, seed, verbose: As for `VectorQuantizer.adapt`.
        """
        vectors = floats("vectors", vectors)
        if not self.built:
            self.build(tuple(vectors.shape))
        rest = self._vectors(vectors)
        rest = ops.reshape(rest, [-1, rest.shape[-1]])
        for stage in self.stages:
            stage.adapt(rest, iterations, seed, verbose)
            rest = kmeans.remainder(rest, stage.embeddings.value)

    def get_config(self):
        return {
            **super().get_config(),
            "num_quantizers": self.num_quantizers,
            "num_codes": self.num_codes,
            "ema_decay": self.ema_decay,
            "restart_threshold": self.restart_threshold,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
            **self._gradient_config(),
        }


def _copy(initializer):
    """An initializer with the same config that draws other numbers.

    A shared initializer would give every stage the same numbers.
    """
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer  # a function
