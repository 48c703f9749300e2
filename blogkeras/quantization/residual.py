"""Residual quantization: each codebook quantizes the rest of the one before."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numpy,
    check_boolean,
    check_choice,
    check_integer,
    check_integers,
    check_number,
    check_sizes,
)
from blogkeras.ops import normalize, straight_through
from blogkeras.quantization import kmeans
from blogkeras.quantization.codebook import VectorQuantizer
from blogkeras.quantization.gradients import EstimatedGradient
from blogkeras.quantization.nearest import nearest_codes
from blogkeras.quantization.quantizer import (
    Quantizer,
    check_stages,
    drawn_depths,
    floats,
)


@keras.saving.register_keras_serializable(package="blogkeras")
class ResidualVectorQuantizer(EstimatedGradient, Quantizer):
    """Quantizes vectors by a sum of codes, one from each of several codebooks.

        r_0 = z,  r_i = r_{i-1} - sg[e_i],  e_i = nearest code to r_{i-1}
        output = sg[Σ e_i] + z - sg[z]

    Each stage is a `VectorQuantizer`, in `stages`, with its own losses, state
    and usage. The gradient is estimated once, for the sum of the codes: by
    default it is exactly the identity for any number of stages. The other
    gradients are those of `VectorQuantizer`, with Σ e_i for the code.

    **Cosine.** With `metric="cosine"` the code of the nearest direction is
    taken. Unlike in `VectorQuantizer`, codes keep their lengths: only so the
    rest gets smaller from stage to stage.

    **Small codes.** With `codebook_dim` each stage has projections in and out,
    as the codecs of audio have. Then the gradient is estimated in each stage,
    on the small vectors, and the rest keeps its gradient:

        r_i = r_{i-1} - out_i(ê_i),  ê_i = estimate(e_i, in_i(r_{i-1})),
        output = Σ out_i(ê_i)

    **One codebook for all stages.** With `shared_codebook` all stages look up
    the codes of one quantizer, `stages[0]`, and move them in one step, in which
    every stage still uses the codes from before. Usage is counted by stage.

    **Dropout.** With `quantizer_dropout` a row of a training batch keeps, with
    this probability, only its first n stages, n being uniform from 1 to
    `num_quantizers`. The other stages see none of that row: it does not enter
    their counts and codebooks, and its part of their losses is 0. So the codes
    of the first stages alone decode well. The codes that are returned are
    always those of all stages.

    Args:
        num_quantizers: Integer ≥ 1. Number of stages.
        num_codes: Integer ≥ 2. Number of codes of every stage; or a sequence of
            such integers, one for each stage.
        codebook_cost: Float ≥ 0. Weight of ||sg[r] - e||²; without effect under
            `ema_decay`. Defaults to 1, for the DiVeQ gradients to 0.
        commitment_cost: Float ≥ 0. Weight of ||r - sg[e]||². Defaults to 0.25,
            for the DiVeQ gradients to 0.
        ema_decay: Float in [0, 1), say 0.99, for codebooks that are moving
            averages, or `None` for trained ones.
        restart_threshold: Float in [0, 1), say 0.1. A code used less than this
            fraction of an equal share is restarted; for `ema_decay` only.
        embeddings_initializer: Initializer of the codebooks, as for
            `VectorQuantizer`. (One with a seed starts every stage alike.)
        metric: `"euclidean"` or `"cosine"`.
        codebook_transform: `None`, `"linear"` or `"diagonal"`, as for
            `VectorQuantizer`; each stage has its own.
        codebook_dim: Integer ≥ 1, or `None` for codes of the vectors' size.
        shared_codebook: Boolean.
        quantizer_dropout: Float in [0, 1].
        gradient: `"straight-through"`, `"rotation"`, `"diveq"` or
            `"diveq-detach"`.
        noise_variance: Float ≥ 0, of the noise of `"diveq"`.
        seed: Integer or `None`, of that noise and of the dropout. The draws are
            numbered by a count that is saved, so training goes on after
            `load_model` as if it had not stopped.

    Call arguments:
        inputs: `(..., dim)`, floating.
        training: Boolean. Whether to count codes, to drop stages, and to update
            averaged codebooks.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., dim)`, floating.
    Output shape: `(..., dim)`; codes `(..., num_quantizers)`, int32. `decode`
        also takes the codes of the first stages alone, which give a coarser
        vector.

    Raises:
        ValueError: on numbers out of range, on another number of sizes than of
            stages, and on several sizes with `shared_codebook`.

    Example:

    >>> layer = ResidualVectorQuantizer(
    ...     4, 256, ema_decay=0.99, quantizer_dropout=0.5
    ... )
    >>> codes = layer.encode(keras.ops.ones((2, 50, 16)))
    >>> tuple(codes.shape)
    (2, 50, 4)
    >>> tuple(layer.decode(codes[..., :2]).shape)  # of the first two stages
    (2, 50, 16)

    Reference:
        [Zeghidour et al., 2021](https://arxiv.org/abs/2107.03312), residual
        vector quantizer, quantizer dropout;
        [Kumar et al., 2023](https://arxiv.org/abs/2306.06546), small codes
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int | Sequence[int],
        codebook_cost: float | None = None,
        commitment_cost: float | None = None,
        *,
        ema_decay: float | None = None,
        restart_threshold: float = 0.0,
        embeddings_initializer: Any = None,
        metric: str = "euclidean",
        codebook_transform: str | None = None,
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantizer_dropout: float = 0.0,
        gradient: str = "straight-through",
        noise_variance: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_quantizers = check_integer(
            "num_quantizers", num_quantizers, minimum=1
        )
        self.num_codes = _sizes_of_stages(num_codes, self.num_quantizers)
        self.metric = check_choice("metric", metric, ("euclidean", "cosine"))
        self.shared_codebook = check_boolean("shared_codebook", shared_codebook)
        if self.shared_codebook and isinstance(self.num_codes, list):
            raise ValueError(
                "Expected one number of codes where all stages share one "
                f"codebook. Received: num_codes={num_codes}, "
                "shared_codebook=True"
            )
        self.quantizer_dropout = check_number(
            "quantizer_dropout", quantizer_dropout, minimum=0, maximum=1
        )
        self._choose_gradient(
            gradient, noise_variance, seed, codebook_cost, commitment_cost
        )
        if self.quantizer_dropout:
            self._number_draws(self.seed)
        sizes = self._sizes_by_stage()
        stage_class = (
            VectorQuantizer if metric == "euclidean" else DirectionQuantizer
        )
        self.stages = [
            stage_class(
                size,
                self.codebook_cost,
                self.commitment_cost,
                ema_decay=ema_decay,
                restart_threshold=restart_threshold,
                embeddings_initializer=_copy(
                    keras.initializers.get(embeddings_initializer)
                ),
                codebook_transform=codebook_transform,
                codebook_dim=codebook_dim,
                trainable=self.trainable,
                dtype=self.dtype_policy,
                name=f"stage_{index}",
            )
            for index, size in enumerate(
                sizes[:1] if self.shared_codebook else sizes
            )
        ]
        # The stages have checked and converted the arguments.
        first = self.stages[0]
        self.ema_decay = first.ema_decay
        self.restart_threshold = first.restart_threshold
        self.codebook_transform = first.codebook_transform
        self.codebook_dim = first.codebook_dim
        self.embeddings_initializer = (
            first.embeddings_initializer
            if embeddings_initializer is None
            else keras.initializers.get(embeddings_initializer)
        )
        self.alphabets = tuple(sizes)
        self.codes_per_vector = (self.num_quantizers,)

    def _sizes_by_stage(self):
        if isinstance(self.num_codes, list):
            return self.num_codes
        return [self.num_codes] * self.num_quantizers

    def _sizes(self):
        return max(self._sizes_by_stage())

    def check_codes(self, codes):
        """Raises a `ValueError` unless all codes are integers within range.

        Args:
            codes: `(..., stages)`, at most `num_quantizers`.
        """
        super().check_codes(codes)
        check_stages(codes, self.num_quantizers)
        if isinstance(self.num_codes, list) and backend.is_concrete(codes):
            codes = as_numpy(codes)
            for index in range(codes.shape[-1]):
                check_integers(
                    f"codes[..., {index}]",
                    codes[..., index],
                    0,
                    self.num_codes[index] - 1,
                )

    def codebooks(self):
        """The layers that count codes: the stages, or the quantizer itself."""
        return [self] if self.shared_codebook else self.stages

    def _turns(self):
        """The stage of each turn: one of them in all, if it is shared."""
        if self.shared_codebook:
            return self.stages * self.num_quantizers
        return self.stages

    def build(self, input_shape):
        for stage in self.stages:
            stage.build(input_shape)
        self.input_spec = self.stages[0].input_spec
        if self.shared_codebook:
            self._build_counts((self.num_quantizers, self.num_codes))

    def _quantize(self, z, weights, training):
        seed = self._next_seed(training)
        depths = None
        if seed is not None and self.quantizer_dropout:
            depths = drawn_depths(
                z, self.num_quantizers, self.quantizer_dropout, seed
            )
        residual, total, codes, losses, looked_up = z, 0, [], [], []
        for index, stage in enumerate(self._turns()):
            kept = None if depths is None else index < depths
            small = stage._small(residual)
            quantized, code, loss = stage._look_up(small, weights, kept)
            if self.codebook_dim is None:
                part = quantized
                residual = residual - ops.stop_gradient(quantized)
            else:
                output = self._estimated(quantized, small, seed)
                part = rest = stage._large(output)
                if seed is not None and self.gradient == "diveq":
                    # The noise is not passed on to the next stage.
                    exact = stage._large(ops.stop_gradient(quantized))
                    rest = straight_through(exact, part)
                residual = residual - rest
            if kept is not None:
                part = ops.where(kept[..., None], part, 0)
            total = total + part
            codes.append(code)
            losses.append(loss)
            looked_up.append((small, code, _both(weights, kept, z)))
        if training:
            self._update(looked_up)
        if self.codebook_dim is None:
            total = self._estimated(total, z, seed)
        return total, ops.stack(codes, -1), sum(losses)

    def _update(self, looked_up):
        """The step of counts and codebooks in training."""
        if not self.shared_codebook:
            for stage, step in zip(self.stages, looked_up, strict=True):
                stage._count_and_update(*step)
            return
        (stage,) = self.stages
        vectors, codes, weights = zip(
            *(_flat(*step) for step in looked_up), strict=True
        )
        counts = [stage.count(*x) for x in zip(codes, weights, strict=True)]
        self._keep_counts(ops.stack(counts))
        stage._count_and_update(
            *(ops.concatenate(x) for x in (vectors, codes, weights))
        )

    def _symbols(self, z):
        codes = []
        for stage in self._turns():
            code = stage._symbols(z)
            z = z - stage._decode(code[..., 0])
            codes.append(code)
        return ops.concatenate(codes, -1)

    def _codes(self, symbols):
        return symbols

    def _decode(self, codes):
        stages = self._turns()[: codes.shape[-1]]
        return sum(
            stage._decode(codes[..., index])
            for index, stage in enumerate(stages)
        )

    def adapt(self, vectors, iterations=10, seed=0, verbose=0):
        """Sets each codebook to the k-means clusters of its stage's inputs.

        A shared codebook is divided: each stage fills an equal share of it.

        Args:
            vectors, iterations, seed, verbose: As for `VectorQuantizer.adapt`.
        """
        vectors = floats("vectors", vectors)
        if not self.built:
            self.build(tuple(vectors.shape))
        rest = self._vectors(vectors)
        rest = ops.reshape(rest, [-1, rest.shape[-1]])
        if self.shared_codebook:
            self._adapt_shared(rest, iterations, seed, verbose)
            return
        for stage in self.stages:
            stage.adapt(rest, iterations, seed, verbose)
            codes = _nearest(stage, stage._small(rest), stage._codebook())
            rest = rest - stage._large(codes)

    def _adapt_shared(self, rest, iterations, seed, verbose):
        options = kmeans.check(iterations, seed, verbose)
        (stage,) = self.stages
        shares = np.array_split(np.arange(self.num_codes), self.num_quantizers)
        seen, clusters = [], []
        for share in shares:
            small = stage._small(rest)
            if not len(share) or not len(small):
                continue
            seen.append(small)
            found = stage._clusters(small, len(share), *options)
            clusters.append(found)
            rest = rest - stage._large(_nearest(stage, small, found))
        if not seen:
            raise ValueError(
                "Expected at least one vector. Received: "
                f"vectors.shape={tuple(rest.shape)}"
            )
        stage._start_from(ops.concatenate(clusters), ops.concatenate(seen))

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
            "metric": self.metric,
            "codebook_transform": self.codebook_transform,
            "codebook_dim": self.codebook_dim,
            "shared_codebook": self.shared_codebook,
            "quantizer_dropout": self.quantizer_dropout,
            **self._gradient_config(),
        }


@keras.saving.register_keras_serializable(package="blogkeras")
class DirectionQuantizer(VectorQuantizer):
    """A stage that takes the code of the nearest direction, at its length."""

    def assign(self, z, codebook):
        """The code of each vector: `(n, dim)`, `(num_codes, dim)` → `(n,)`."""
        return nearest_codes(normalize(z), normalize(codebook))


def _sizes_of_stages(num_codes, stages):
    """`num_codes` as an integer, or a list of one for each stage."""
    if not isinstance(num_codes, (list, tuple, np.ndarray)):
        return check_integer("num_codes", num_codes, minimum=2)
    sizes = check_sizes("num_codes", num_codes, minimum=2)
    if len(sizes) != stages:
        raise ValueError(
            "Expected one number of codes, or one for each of the stages. "
            f"Received: num_codes={num_codes!r}, num_quantizers={stages}"
        )
    return list(sizes)


def _both(weights, kept, z):
    """Weights of the vectors that count and are kept; None for all."""
    if kept is None:
        return weights
    kept = ops.broadcast_to(ops.cast(kept, "float32"), ops.shape(z)[:-1])
    return kept if weights is None else kept * weights


def _flat(z, codes, weights):
    """Vectors, codes and weights in rows."""
    if weights is None:
        weights = ops.ones_like(z[..., 0])
    finite = ops.cast(ops.all(ops.isfinite(z), axis=-1), "float32")
    return (
        ops.reshape(z, [-1, z.shape[-1]]),
        ops.reshape(codes, [-1]),
        ops.reshape(weights * finite, [-1]),
    )


def _nearest(stage, z, codebook):
    """The code of each vector, `(n, dim)`."""
    directions = isinstance(stage, DirectionQuantizer)
    return kmeans.nearest_means(z, codebook, normalize if directions else None)


def _copy(initializer):
    """An initializer with the same config that draws other numbers.

    A shared initializer would give every stage the same numbers.
    """
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer  # a function
