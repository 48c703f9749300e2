"""The quantizer with a codebook: each vector becomes the nearest code."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    check_choice,
    check_integer,
    check_number,
)
from blogkeras.ops import full_precision_matmul, masked_mean, normalize
from blogkeras.quantization import kmeans
from blogkeras.quantization.gradients import EstimatedGradient
from blogkeras.quantization.nearest import nearest_codes
from blogkeras.quantization.quantizer import Quantizer, counted, floats


def _mean_square(x, weights):
    """The mean over the vectors that count; 0 where there are none."""
    if weights is not None:
        return masked_mean(ops.square(x), weights)
    size = ops.cast(ops.size(x), "float32")
    return ops.sum(ops.square(x)) / ops.maximum(size, 1)


@keras.saving.register_keras_serializable(package="blogkeras")
class VectorQuantizer(EstimatedGradient, Quantizer):
    """Replaces each vector by its nearest code, with a gradient of choice.

    With encoder output z and codebook e_1 … e_K:

        k = argmin_j ||z - e_j||²
        output = sg[e_k] + z - sg[z]
        loss = β ||sg[z] - e_k||² + γ ||z - sg[e_k]||²

    Symbols: K is `num_codes`, β `codebook_cost`, γ `commitment_cost`; squares
    are averaged over all elements. The loss is given to `add_loss`. Take γ < β,
    so that mainly the codes follow the vectors and not the other way round.

    **Codebook.** By default it is a weight like any other, trained by the loss.
    With `ema_decay` it is instead the moving average of the vectors assigned to
    each code, and the loss has only the term of γ:

        n_k, s_k = averages of the count and the sum of the vectors of code k,
                   divided by 1 - decay^t
        ñ_k = (n_k + ε) / (Σn + K ε) · Σn
        e_k = s_k / ñ_k

    The output of a step uses the codes from before its update. Counts and sums
    are reduced over replicas before they are averaged.

    **Collapse.** If the codebook starts far from the data, most codes are never
    used. `adapt(vectors)` starts from k-means. `restart_threshold` moves codes
    that are used less than this fraction of an equal share to vectors of the
    batch. This happens inside the compiled step, for `ema_decay` only.
    `batch_counts` and `total_counts` say how often each code was used in the
    last training batch and since `reset_counts`. With `trainable = False` codes
    are counted but not changed.

    **Cosine.** With `metric="cosine"` vectors and codes are first divided by
    their norms; the output is a unit vector, and the losses compare unit
    vectors.

    **Frozen codes.** With `codebook_transform` (SimVQ) the codebook is E W with
    random codes E that are never trained, and a trained matrix W of shape
    `(dim, dim)`, or its diagonal. Each step moves all codes, so that few stay
    unused. W starts as the identity. `adapt` sets E to the clusters and W to
    the identity.

    **Small codes.** With `codebook_dim` the vectors are projected to that many
    components, quantized there, and the codes are projected back; losses and
    distances are those of the small vectors. Many codes are used more evenly in
    a space of few dimensions.

    **Gradient.** What reaches z from the output is chosen by `gradient`:

        straight-through:  output = sg[e_k] + z - sg[z]
        rotation:          output = sg[(‖e_k‖ / ‖z‖) R] z
        diveq-detach:      output = z + ‖e_k - z‖ sg[(e_k - z) / ‖e_k - z‖]
        diveq:             output = z + ‖e_k - z‖ sg[v / ‖v‖],
                           v = e_k - z + ε,  ε ~ N(0, σ² I)

    where R is the rotation that turns z to e_k within their plane. The value is
    e_k, but for `"diveq"` in training. The DiVeQ gradients reach the code too:
    with them β and γ are 0 unless given. The post found the rotation worse than
    the straight-through gradient where the codebook starts far from the data,
    and asks for `adapt` and another γ.

    Distances, losses and state are float32 under any dtype policy. Masked
    vectors are quantized (components that are not finite as 0), but do not
    enter losses, counts and codebook; the codes have the Keras mask too. In a
    compiled step another vector that is not finite is left out of counts and
    moving averages, and in the output its components that are not finite are
    NaN.

    A subclass may override three methods: `assign` (which code),
    `update_codebook` (how codes change in training), `estimate_gradient` (the
    gradient of the output; not asked in training with `"diveq"`).

    Args:
        num_codes: Integer ≥ 2. Number of codes K.
        codebook_cost: Float ≥ 0. Weight β; without effect under `ema_decay`.
            Defaults to 1, for the DiVeQ gradients to 0.
        commitment_cost: Float ≥ 0. Weight γ. Defaults to 0.25, for the DiVeQ
            gradients to 0.
        ema_decay: Float in [0, 1), say 0.99, or `None` for a trained codebook.
        metric: `"euclidean"` or `"cosine"`.
        restart_threshold: Float in [0, 1), say 0.1. A code used less than this
            fraction of an equal share (vectors / K) is restarted.
        embeddings_initializer: Initializer of the codebook, shape
            `(num_codes, dim or codebook_dim)`. Defaults to `"uniform"`; with
            `codebook_transform` to normal numbers of variance 1 / dim.
        codebook_transform: `None`, `"linear"` (W a matrix) or `"diagonal"`; not
            together with `ema_decay`.
        codebook_dim: Integer ≥ 1, or `None` for codes of the vectors' size.
        gradient: `"straight-through"`, `"rotation"`, `"diveq"` or
            `"diveq-detach"`.
        noise_variance: Float ≥ 0. σ² of `"diveq"`.
        seed: Integer or `None`, of the noise of `"diveq"`. The draws are
            numbered by a count that is saved, so training goes on after
            `load_model` as if it had not stopped.

    Call arguments:
        inputs: `(..., dim)`, floating.
        training: Boolean. Whether to count codes, and to update an averaged
            codebook.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., dim)`.
    Output shape: `(..., dim)`, compute dtype; codes `(...)`, int32.

    Raises:
        ValueError: on numbers out of range, on `restart_threshold` without
            `ema_decay`, on `codebook_transform` with `ema_decay`, and on inputs
            of another dimension.

    Example:

    >>> layer = VectorQuantizer(num_codes=512)
    >>> z = keras.random.normal((2, 8, 8, 64))
    >>> quantized, codes = layer(z, return_codes=True)
    >>> tuple(quantized.shape), tuple(codes.shape)
    ((2, 8, 8, 64), (2, 8, 8))

    Departs from the post: means over unmasked elements; the moving average,
    which the post only mentions, follows Sonnet's `VectorQuantizerEMA`.

    Reference:
        [van den Oord et al., 2017](https://arxiv.org/abs/1711.00937);
        [blog post 6760](https://kexue.fm/archives/6760);
        [Fifty et al., 2024](https://arxiv.org/abs/2410.06424), the rotation,
        [post 10489](https://kexue.fm/archives/10489);
        [Zhu et al., 2024](https://arxiv.org/abs/2411.02038), SimVQ,
        [post 10519](https://kexue.fm/archives/10519);
        [Vali et al., 2025](https://arxiv.org/abs/2509.26469), DiVeQ,
        [post 11328](https://kexue.fm/archives/11328)
    """

    def __init__(
        self,
        num_codes: int,
        codebook_cost: float | None = None,
        commitment_cost: float | None = None,
        *,
        ema_decay: float | None = None,
        metric: str = "euclidean",
        restart_threshold: float = 0.0,
        embeddings_initializer: Any = None,
        codebook_transform: str | None = None,
        codebook_dim: int | None = None,
        gradient: str = "straight-through",
        noise_variance: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_codes = check_integer("num_codes", num_codes, minimum=2)
        self._choose_gradient(
            gradient, noise_variance, seed, codebook_cost, commitment_cost
        )
        if ema_decay is not None:
            ema_decay = check_number("ema_decay", ema_decay, minimum=0, below=1)
        self.ema_decay = ema_decay
        self.metric = check_choice("metric", metric, ("euclidean", "cosine"))
        restart_threshold = check_number(
            "restart_threshold", restart_threshold, minimum=0, below=1
        )
        if restart_threshold and ema_decay is None:
            raise ValueError(
                "Codes can be restarted only where the layer itself moves "
                "them: set `ema_decay`, such as 0.99. Received: "
                f"restart_threshold={restart_threshold}, ema_decay=None"
            )
        self.restart_threshold = restart_threshold
        self.codebook_transform = check_choice(
            "codebook_transform",
            codebook_transform,
            (None, "linear", "diagonal"),
        )
        if codebook_transform is not None and ema_decay is not None:
            raise ValueError(
                "Expected one way in which the codes move: a trained "
                "`codebook_transform` of frozen codes, or moving averages. "
                f"Received: codebook_transform={codebook_transform!r}, "
                f"ema_decay={ema_decay}"
            )
        if codebook_dim is not None:
            codebook_dim = check_integer(
                "codebook_dim", codebook_dim, minimum=1
            )
            self.project_in = keras.layers.Dense(
                codebook_dim,
                dtype="float32",
                trainable=self.trainable,
                name="project_in",
            )
        self.codebook_dim = codebook_dim
        if embeddings_initializer is None:
            embeddings_initializer = "uniform"
            if codebook_transform is not None:
                embeddings_initializer = keras.initializers.VarianceScaling(
                    1.0, "fan_out", "untruncated_normal"
                )
        self.embeddings_initializer = keras.initializers.get(
            embeddings_initializer
        )
        self.alphabets = (self.num_codes,)

    def build(self, input_shape):
        dim = input_shape[-1] if len(input_shape) else None
        if dim is None:
            raise ValueError(
                "Expected vectors with a known size of the last axis. "
                f"Received: input_shape={input_shape}"
            )
        self.input_spec = keras.layers.InputSpec(axes={-1: dim})
        if self.codebook_dim is not None:
            self.project_in.build((None, dim))
            self.project_out = keras.layers.Dense(
                dim,
                dtype="float32",
                trainable=self.trainable,
                name="project_out",
            )
            self.project_out.build((None, self.codebook_dim))
            dim = self.codebook_dim
        averaged = self.ema_decay is not None
        trained = not averaged and self.codebook_transform is None
        self.embeddings = self.add_weight(
            shape=(self.num_codes, dim),
            initializer=self.embeddings_initializer,
            trainable=trained,
            dtype="float32",
            autocast=False,
            aggregation="mean" if trained else "only_first_replica",
            name="embeddings",
        )
        if self.codebook_transform is not None:
            diagonal = self.codebook_transform == "diagonal"
            self.transform = self.add_weight(
                shape=(dim,) if diagonal else (dim, dim),
                initializer="ones" if diagonal else "identity",
                dtype="float32",
                autocast=False,
                name="transform",
            )
        self._build_counts((self.num_codes,))
        if averaged:
            self.ema_steps = self._add_state((), "ema_steps")
            self.ema_counts = self._add_state((self.num_codes,), "ema_counts")
            self.ema_sums = self._add_state((self.num_codes, dim), "ema_sums")

    # The methods that a subclass may override; the third of them,
    # `estimate_gradient`, is in the base class.

    def assign(self, z, codebook):
        """The code of each vector: `(n, dim)`, `(num_codes, dim)` → `(n,)`.

        With `codebook_dim` the vectors are the small ones.
        """
        return nearest_codes(z, codebook)

    def update_codebook(self, z, codes, counts, weights):
        """Updates the codes in training, where no optimizer does.

        Args:
            z: `(n, dim)`, the vectors.
            codes: `(n,)`, their codes.
            counts: `(num_codes,)`, over all replicas.
            weights: `(n,)`, 1 for each vector that counts, else 0.
        """
        if self.ema_decay is None:
            return
        sums = backend.all_reduce_sum(
            ops.segment_sum(
                ops.where(weights[:, None] > 0, z, 0),
                codes,
                num_segments=self.num_codes,
            )
        )
        steps = self.ema_steps + 1
        new = 1 - self.ema_decay
        ema_counts = self.ema_counts - new * (self.ema_counts - counts)
        ema_sums = self.ema_sums - new * (self.ema_sums - sums)
        debias = 1 - ops.power(
            ops.convert_to_tensor(self.ema_decay, "float32"), steps
        )
        embeddings = self._average(ema_counts / debias, ema_sums / debias)
        if self.restart_threshold:
            total = ops.sum(ema_counts)
            share = self.restart_threshold * total / self.num_codes
            dead = ema_counts < share
            chosen = _spread(z, weights, dead, steps)
            embeddings = ops.where(dead[:, None], chosen, embeddings)
            ema_counts = ops.where(dead, share, ema_counts)
            ema_sums = ops.where(dead[:, None], share * chosen, ema_sums)
        any_vectors = ops.sum(counts) > 0
        for variable, value in (
            (self.embeddings, embeddings),
            (self.ema_steps, steps),
            (self.ema_counts, ema_counts),
            (self.ema_sums, ema_sums),
        ):
            old = ops.convert_to_tensor(variable)
            variable.assign(ops.where(any_vectors, value, old))

    def _average(self, counts, sums):
        """The codes, from moving averages of counts and sums."""
        if self.metric == "cosine":
            empty = ops.all(sums == 0, axis=-1, keepdims=True)
            return ops.where(empty, self._codebook(), normalize(sums))
        total, epsilon = ops.sum(counts), 1e-5
        counts = (counts + epsilon) / (total + self.num_codes * epsilon) * total
        return sums / ops.maximum(counts, 1e-30)[:, None]

    def _codes_as_stored(self):
        """The codes, not normalized."""
        codes = ops.convert_to_tensor(self.embeddings)
        if self.codebook_transform == "linear":
            codes = full_precision_matmul(codes, self.transform)
        elif self.codebook_transform == "diagonal":
            codes = codes * self.transform
        # The product makes the gradient of the gathered rows dense. Adam would
        # square TensorFlow's sparse gradient slice by slice, which is wrong for
        # codes that occur twice.
        return codes * ops.ones((), "float32")

    def _codebook(self):
        codes = self._codes_as_stored()
        return normalize(codes) if self.metric == "cosine" else codes

    def _small(self, z):
        """The vectors as they are compared with the codes."""
        if self.codebook_dim is not None:
            z = self.project_in(z)
        return normalize(z) if self.metric == "cosine" else z

    def _large(self, quantized):
        """The vectors that codes stand for."""
        if self.codebook_dim is None:
            return quantized
        return self.project_out(quantized)

    def _quantize(self, z, weights, training):
        z = self._small(z)
        quantized, codes, loss = self._look_up(z, weights)
        if training:
            self._count_and_update(z, codes, weights)
        output = self._estimated(quantized, z, self._next_seed(training))
        return self._large(output), codes[..., None], loss

    def _look_up(self, z, weights, kept=None):
        """`(e_k, k, loss)` of vectors that `_small` has made.

        Args:
            z: `(..., dim)`.
            weights: As for `_quantize`.
            kept: Boolean, to be broadcast to `(...)`, or `None` for all. The
                other vectors count in the mean, with a loss of 0.
        """
        flat = ops.reshape(ops.stop_gradient(z), [-1, z.shape[-1]])
        codebook = self._codebook()
        codes = self.assign(flat, ops.stop_gradient(codebook))
        codes = ops.reshape(codes, ops.shape(z)[:-1])
        quantized = ops.take(codebook, codes, axis=0)

        def mean_square(error):
            if kept is not None:
                error = ops.where(kept[..., None], error, 0)
            return _mean_square(error, weights)

        commitment = mean_square(z - ops.stop_gradient(quantized))
        loss = self.commitment_cost * commitment
        if self.ema_decay is None:
            error = ops.stop_gradient(z) - quantized
            loss += self.codebook_cost * mean_square(error)
        return quantized, codes, loss

    def _count_and_update(self, z, codes, weights):
        """The step of counts and codebook in training.

        Args:
            z: `(..., dim)`, vectors that `_small` has made.
            codes: `(...)`, their codes.
            weights: `(...)` or None, as for `_quantize`.
        """
        flat = ops.reshape(ops.stop_gradient(z), [-1, z.shape[-1]])
        codes = ops.reshape(codes, [-1])
        weights = ops.reshape(counted(z, weights), [-1])
        counts = self.count(codes, weights)
        self._keep_counts(counts)
        if self.trainable:
            self.update_codebook(flat, codes, counts, weights)

    def _symbols(self, z):
        z = self._small(z)
        flat = ops.reshape(z, [-1, z.shape[-1]])
        codes = self.assign(flat, self._codebook())
        return ops.reshape(codes, [*ops.shape(z)[:-1], 1])

    def _codes(self, symbols):
        return symbols[..., 0]

    def _decode(self, codes):
        return self._large(ops.take(self._codebook(), codes, axis=0))

    def adapt(self, vectors, iterations=10, seed=0, verbose=0):
        """Sets the codebook to the k-means clusters of vectors.

        Lloyd's iterations, compiled, from vectors drawn at random; a cluster
        that is left empty goes to the vector farthest from its code. With
        `ema_decay` the clusters count as the first step of the moving average.

        Args:
            vectors: `(..., dim)`, concrete: encoder outputs, say. Fewer vectors
                than codes leave the other codes as they were, with a warning.
            iterations: Integer ≥ 1.
            seed: Integer ≥ 0, of the draw.
            verbose: `"auto"`, 0, 1 or 2: the progress bar.
        """
        iterations, seed, verbose = kmeans.check(iterations, seed, verbose)
        vectors = floats("vectors", vectors)
        if not self.built:
            self.build(tuple(vectors.shape))
        z = self._small(self._vectors(vectors))
        z = ops.reshape(z, [-1, z.shape[-1]])
        if z.shape[0] == 0:
            raise ValueError(
                "Expected at least one vector. Received: "
                f"vectors.shape={tuple(vectors.shape)}"
            )
        clusters = self._clusters(z, self.num_codes, iterations, seed, verbose)
        self._start_from(clusters, z)

    def _clusters(self, z, number, iterations, seed, verbose):
        """At most `number` clusters of `(n, dim)` vectors."""
        chosen = np.random.default_rng(seed).permutation(z.shape[0])[:number]
        return kmeans.k_means(
            z,
            ops.take(z, chosen.astype("int32"), axis=0),
            iterations,
            normalize if self.metric == "cosine" else _unchanged,
            verbose,
        )

    def _start_from(self, clusters, z):
        """Sets the codes to clusters of the vectors z, with all their state."""
        filled = clusters.shape[0]
        if filled < self.num_codes:
            warnings.warn(
                f"k-means of {z.shape[0]} vectors fills {filled} of "
                f"{self.num_codes} codes; the others stay as they were. Give "
                "more vectors.",
                stacklevel=3,
            )
        others = self._codes_as_stored()[filled:]
        embeddings = ops.concatenate([clusters, others])
        self.embeddings.assign(embeddings)
        if self.codebook_transform is not None:
            identity = np.eye(self.embeddings.shape[1], dtype="float32")
            if self.codebook_transform == "diagonal":
                identity = identity.diagonal()
            self.transform.assign(identity)
        if self.ema_decay is None:
            return
        counts = kmeans.cluster_sizes(z, clusters)
        counts = ops.pad(counts, [[0, self.num_codes - filled]])
        # A sum divided by a count of 0 would put a code at the origin. So a
        # code without vectors counts as a small part of one vector, at its
        # present place.
        counts = ops.maximum(counts, 1e-3) * (1 - self.ema_decay)
        self.ema_steps.assign(1.0)
        self.ema_counts.assign(counts)
        self.ema_sums.assign(counts[:, None] * embeddings)

    def get_config(self):
        return {
            **super().get_config(),
            "num_codes": self.num_codes,
            "ema_decay": self.ema_decay,
            "metric": self.metric,
            "restart_threshold": self.restart_threshold,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
            "codebook_transform": self.codebook_transform,
            "codebook_dim": self.codebook_dim,
            **self._gradient_config(),
        }


def _unchanged(x):
    return x


def _spread(z, weights, dead, steps):
    """For each dead code a vector of the batch, spread evenly over it.

    Nothing is random, so a resumed training makes the same choices. The first
    vector changes from step to step: its place in the batch, as a fraction,
    advances by the golden ratio.
    """
    z, weights = backend.all_gather(z), backend.all_gather(weights)
    if z.shape[0] == 0:
        return ops.zeros((dead.shape[0], z.shape[1]))
    filled = ops.cumsum(weights)
    rank = ops.cumsum(ops.cast(dead, "float32")) - 1
    count = ops.maximum(ops.sum(ops.cast(dead, "float32")), 1)
    # Only the fractional part of `steps` · 0.618… is used. In float32 a large
    # product has few digits after the point, so the steps are counted modulo
    # 4181. For this Fibonacci number the product is nearly an integer, so the
    # sequence starts again without a jump.
    turn = ops.mod(steps, 4181.0) * 0.6180339887
    place = (rank + turn - ops.floor(turn)) / count * filled[-1]
    # `filled` does not increase at vectors of weight 0, so these are never
    # taken.
    rows = ops.cast(ops.searchsorted(filled, place, side="right"), "int32")
    rows = ops.clip(rows, 0, ops.shape(z)[0] - 1)
    return ops.take(z, rows, axis=0)
