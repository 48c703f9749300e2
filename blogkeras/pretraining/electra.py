"""ELECTRA: pre-training by detecting replaced tokens."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import check_boolean, check_choice, check_number
from blogkeras.backend.scopes import no_autocast
from blogkeras.graph import freeze_inside
from blogkeras.models import map_batches
from blogkeras.pretraining.drawing import (
    checked_logits,
    draw_tokens,
    frequency_logits,
)
from blogkeras.pretraining.heads import (
    BinaryHead,
    MaskedTokenHead,
    binary_losses,
    gathered,
    masked_losses,
)
from blogkeras.pretraining.language_model import MaskedLanguageModel
from blogkeras.pretraining.masking import TokenMasking, put
from blogkeras.pretraining.token_model import (
    TokenModel,
    sequence_weights,
    weighted_mean,
)
from blogkeras.pretraining.tying import (
    SHARING,
    call_with_table,
    checked_embeddings,
    connect,
)


@keras.saving.register_keras_serializable(package="blogkeras")
class ElectraPretrainer(TokenModel):
    """Pre-trains an encoder by detecting which tokens were replaced.

    A small generator fills masked positions with tokens that it draws. A
    discriminator predicts for each token whether it was replaced:

        x̂ = mask(x),  x_t' ~ p_G(x_t | x̂) at the masked positions
        L = λ_G · mean over masked t of -log p_G(x_t | x̂)
          + λ_D · mean over tokens t of BCE(x_t' ≠ x_t, D(x')_t)

    All of this is one compiled step, with new masks and new draws each time.
    The generator's head runs on the masked positions only. Tokens are drawn by
    inverting the distribution function (`sample_categorical`), and no gradient
    passes the draw; a network never draws padding. `fit` takes tokens,
    `[tokens, segments]`, or a dict with `"token_ids"` and, if there are any,
    `"segment_ids"` and `"word_ids"`. Targets are not needed. Sample weights are
    one number for each sequence.

    Afterwards `generator` and `discriminator` are plain models to fine-tune;
    `mask_filler()` is the masked-token model with its head.

    Args:
        generator: Encoder, tokens → vectors: of bert4keras, KerasHub or any
            functional model. Or something that draws without learning:
            `"uniform"`; `"unigram"`, by the frequencies of the tokens seen so
            far; or a function `(masked tokens, positions) -> logits` whose
            result has the shape `(batch, K, vocabulary)` or `(vocabulary,)`.
        discriminator: Encoder, without a head.
        mask_token: Integer.
        special_tokens: Integers that are never masked: `[CLS]`, `[SEP]`.
        sharing: What the two networks have in common.

            - `"embeddings"`: one table of tokens, which begins with the
              generator's values;
            - `"disentangled"` (DeBERTa-v3): the discriminator's table is
              stop_gradient(E) + Δ, where E is the generator's table and Δ
              begins at 0;
            - `"none"`: nothing;
            - `"all"`: one network, run twice. Both arguments must be equal
              networks, and the discriminator is the one that is trained.
        mask_rate: Float between 0 and 1.
        generator_weight: Float ≥ 0, λ_G.
        discriminator_weight: Float ≥ 0, λ_D.
        temperature: Float > 0. The generator's logits are divided by it before
            drawing.
        labels: `"replaced"`, the paper's: tokens that differ from the
            original; or `"generated"`: all masked positions, also those where
            the original was drawn.
        allow_original: Boolean. Whether the original may be drawn. Where it is
            the only token with a probability above 0, it is drawn in any case.
        masking: A `TokenMasking`, instead of `mask_token`, `special_tokens` and
            `mask_rate`. By default 85 % of the positions show the mask token.
        embedding: Name of the layer that looks up tokens, the layer, or its
            number among the network's embeddings; or a pair of such (the
            generator's, the discriminator's). `None` finds it.
        pad_token: Integer.
        seed: Integer or `None`.

    Metrics, each over the whole epoch: `masked_accuracy` and `masked_loss` of
    the generator's best guess, `sampled_accuracy` of its draws;
    `discriminator_loss`, `discriminator_accuracy`, `discriminator_auc`,
    `discriminator_precision`, `discriminator_recall`, without padding.

    Raises:
        ValueError: if the networks have different vocabularies, no embedding to
            share, or different sizes where `sharing` needs equal ones; if there
            is no mask token, or one that is the padding; on arguments out of
            range; and in `fit`, on tokens outside of the vocabulary: in arrays,
            all batches of a generator, the first batch of a data set.

    Example:

    >>> def encoder(name, dim):
    ...     tokens = keras.Input((16,), dtype="int32")
    ...     h = keras.layers.Embedding(100, 32)(tokens)
    ...     h = keras.layers.Dense(dim, activation="relu")(h)
    ...     return keras.Model(tokens, h, name=name)
    >>> model = ElectraPretrainer(
    ...     encoder("generator", 16),
    ...     encoder("discriminator", 64),
    ...     mask_token=4,
    ...     special_tokens=[2, 3],
    ... )
    >>> model.compile("adam")
    >>> # model.fit(tokens); model.discriminator.save("encoder.keras")

    Departs from the post: the post says that a perfect generator leaves the
    discriminator at chance. This holds for `labels="generated"`. With the
    paper's labels, which are the default, the discriminator can do better: a
    token that fits well is rarely a replaced one, and the best prediction is
    m (1 - p(token | context)) with the mask rate m.

    Departs from the paper's code: the masked positions of a sequence are
    different ones (there a position can be chosen twice, and then gets the mean
    of two token numbers), and the AUC leaves out padding.

    Reference:
        [Clark et al., 2020](https://arxiv.org/abs/2003.10555);
        [He et al., 2021](https://arxiv.org/abs/2111.09543), `"disentangled"`;
        [blog post 7846](https://kexue.fm/archives/7846)
    """

    PARTS = ("generator", "discriminator")

    def __init__(
        self,
        generator: Any,
        discriminator: keras.layers.Layer,
        mask_token: int | None = None,
        special_tokens: Sequence[int] = (),
        sharing: str = "embeddings",
        *,
        mask_rate: float = 0.15,
        generator_weight: float = 1.0,
        discriminator_weight: float = 50.0,
        temperature: float = 1.0,
        labels: str = "replaced",
        allow_original: bool = True,
        masking: Any = None,
        embedding: Any = None,
        pad_token: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sharing = check_choice("sharing", sharing, SHARING)
        self.generator_weight = check_number(
            "generator_weight", generator_weight, minimum=0
        )
        self.discriminator_weight = check_number(
            "discriminator_weight", discriminator_weight, minimum=0
        )
        self.temperature = check_number("temperature", temperature, above=0)
        self.labels = check_choice("labels", labels, ("replaced", "generated"))
        self.allow_original = check_boolean("allow_original", allow_original)
        self._generation, self._discrimination = connect(
            generator,
            discriminator,
            sharing,
            checked_embeddings(embedding),
            pad_token,
        )
        self.embedding = [
            part and part.address
            for part in (self._generation, self._discrimination)
        ]
        # Keras tracks all networks that an attribute has ever had: set it once.
        self.generator = (
            generator if self._generation is None else self._generation.model
        )
        self._discriminator = self._discrimination.model
        self._set_masking(
            self._discrimination.vocabulary_size,
            masking,
            mask_token,
            special_tokens,
            mask_rate,
            pad_token,
            seed,
            mask_token_rate=0.85,
            random_token_rate=0.0,
        )
        self.takes_segments = any(
            part is not None and part.takes_segments
            for part in (self._generation, self._discrimination)
        )
        self._add_heads()
        self.draws = self._new_draws()
        self._add_metrics()
        self._detector = None
        self.built = True
        freeze_inside(self)

    def _add_heads(self):
        self.discriminator_head = BinaryHead(
            self._discrimination.dim,
            dtype=self.dtype_policy,
            name="discriminator_head",
        )
        self.generator_head = self.delta = self.token_counts = None
        if self._generation is not None:
            self.generator_head = MaskedTokenHead(
                *self._generation.head_sizes,
                dtype=self.dtype_policy,
                name="generator_head",
            )
        if self.sharing == "disentangled":
            self.delta = self.add_weight(
                self._generation.table.shape,
                "zeros",
                keras.backend.result_type(
                    self._generation.table.dtype, "float32"
                ),
                autocast=False,
                name="delta",
            )
        if self._generation is None and self.generator == "unigram":
            self.token_counts = self.add_weight(
                (self.vocabulary_size,),
                "ones",
                "float32",
                trainable=False,
                autocast=False,
                aggregation="mean",
                name="token_counts",
            )

    def _add_metrics(self):
        names = ["sampled_accuracy"]
        if self._generation is not None:
            names = ["masked_accuracy", "masked_loss", *names]
        names += ["discriminator_loss", "discriminator_accuracy"]
        self._set_means(names)
        # Steps of 0.01 from the logit -10 to 10.
        self._auc = keras.metrics.AUC(2001, name="discriminator_auc")
        self._rates = [
            keras.metrics.Precision(name="discriminator_precision"),
            keras.metrics.Recall(name="discriminator_recall"),
        ]

    @property
    def discriminator(self):
        """The encoder that is pre-trained, a plain model."""
        self._write_table()
        return self._discriminator

    def _write_table(self):
        """Writes stop_gradient(E) + Δ into the discriminator's own table."""
        if self.delta is None:
            return
        table = self._table()
        if backend.is_concrete(table):
            self._discrimination.table.assign(table)

    def _table(self):
        # Of half precision, too, Δ is float32, and the sum is rounded once.
        with no_autocast():
            table = ops.convert_to_tensor(self._generation.table)
            delta = ops.convert_to_tensor(self.delta)
        table = ops.stop_gradient(ops.cast(table, delta.dtype)) + delta
        return ops.cast(table, self._discrimination.table.dtype)

    # While the discriminator's table is E + Δ, it is computed and not trained.
    # `trainable` of the layer stays as it is, because the discriminator is to
    # be fine-tuned later; the table is left out of the lists here instead.

    @property
    def trainable_variables(self):
        return self._without_table(super().trainable_variables)

    @property
    def trainable_weights(self):
        return self._without_table(super().trainable_weights)

    @property
    def non_trainable_variables(self):
        learning = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in learning]

    @property
    def non_trainable_weights(self):
        learning = {id(v) for v in self.trainable_weights}
        return [v for v in self.weights if id(v) not in learning]

    def _without_table(self, variables):
        if getattr(self, "delta", None) is None:
            return variables
        table = self._discrimination.table
        return [v for v in variables if v is not table]

    def call(self, inputs, training=None):
        ids, segments, words = self._prepared(inputs)
        masked = self._masked(ids, words, training)
        positions = masked["mask_positions"]
        targets, weights = masked["mask_ids"], masked["mask_weights"]
        logits = self._logits(masked, segments, training)
        sampled = self._sample(ids, logits, targets, training)
        corrupted = put(ids, positions, sampled, weights)
        if self.labels == "replaced":
            labels = corrupted != ids
        else:
            ones = ops.ones_like(positions)
            labels = put(ops.zeros_like(ids), positions, ones, weights) > 0
        outputs = {
            **masked,
            "corrupted_ids": corrupted,
            "sampled_ids": sampled,
            "labels": ops.cast(labels, "float32"),
            "discriminator_logits": self._discriminate(
                corrupted, segments, training
            ),
        }
        if self._generation is not None:
            losses, right = masked_losses(logits, targets)
            outputs |= {"masked_losses": losses, "masked_right": right}
        return outputs

    def _logits(self, masked, segments, training):
        """`(batch, K, vocabulary)`, or `(vocabulary,)` for all positions."""
        positions = masked["mask_positions"]
        if self._generation is not None:
            vectors = self._generation(
                masked["token_ids"], segments, training=training
            )
            return self.generator_head(
                gathered(vectors, positions), self._generation.table
            )
        if callable(self.generator):
            return checked_logits(
                self.generator(masked["token_ids"], positions),
                positions,
                self.vocabulary_size,
            )
        counts = ops.ones((self.vocabulary_size,))
        if self.token_counts is not None:
            counts = ops.convert_to_tensor(self.token_counts)
        return frequency_logits(counts, self.masking.never)

    def _count(self, ids):
        """Counts the tokens of a batch, for `"unigram"`."""
        real = ops.cast(ops.reshape(ids != self.pad_token, [-1]), "float32")
        counts = ops.segment_sum(
            real, ops.reshape(ids, [-1]), num_segments=self.vocabulary_size
        )
        self.token_counts.assign_add(backend.all_reduce_sum(counts))

    def _sample(self, ids, logits, targets, training):
        """Drawn tokens, `(batch, K)`."""
        seed = (
            self.draws.next_step() if training else self.draws.evaluation(ids)
        )
        if self.token_counts is not None and training:
            self._count(ids)
        if self._generation is not None:
            logits = self._without_padding(logits)
        return draw_tokens(
            logits, targets, seed, self.temperature, self.allow_original
        )

    def _without_padding(self, logits):
        # A discriminator that knows padding by its token would take a drawn one
        # for padding, while the loss counts it as a token.
        classes = ops.arange(self.vocabulary_size, dtype="int32")
        return ops.where(classes == self.pad_token, -np.inf, logits)

    def _discriminate(self, ids, segments, training):
        """Logits that a token is not the original: `(batch, length)`."""
        if self.delta is None:
            vectors = self._discrimination(ids, segments, training=training)
        else:
            vectors, loss = call_with_table(
                self._discrimination,
                self._table(),
                ids,
                segments,
                training=training,
            )
            self.add_loss(loss)
        return self.discriminator_head(vectors)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        ids = self._prepared(x)[0]
        rows = sequence_weights(sample_weight)
        at_masks = y_pred["mask_weights"] * rows
        at_tokens = ops.cast(ids != self.pad_token, "float32") * rows
        logits, labels = y_pred["discriminator_logits"], y_pred["labels"]
        losses = binary_losses(logits, labels)
        loss = self.discriminator_weight * weighted_mean(losses, at_tokens)
        if self._generation is not None:
            loss += self.generator_weight * weighted_mean(
                y_pred["masked_losses"], at_masks
            )
        self._update_metrics(y_pred, losses, at_masks, at_tokens)
        return loss + self._added_losses()

    def _update_metrics(self, y_pred, losses, at_masks, at_tokens):
        logits, labels = y_pred["discriminator_logits"], y_pred["labels"]
        values = {
            "sampled_accuracy": (
                y_pred["sampled_ids"] == y_pred["mask_ids"],
                at_masks,
            ),
            "discriminator_loss": (losses, at_tokens),
            "discriminator_accuracy": ((logits > 0) == (labels > 0), at_tokens),
        }
        if self._generation is not None:
            values["masked_accuracy"] = y_pred["masked_right"], at_masks
            values["masked_loss"] = y_pred["masked_losses"], at_masks
        self._update_means(values)
        probabilities = ops.sigmoid(logits)
        for metric in self._rates:
            metric.update_state(labels, probabilities, at_tokens)
        # Replaced tokens are rare, so most probabilities are small, and equal
        # steps of the logit tell small ones apart. The AUC is the same for
        # both. With evenly spaced thresholds Keras counts each token once, and
        # not for each threshold, so many of them cost little.
        self._auc.update_state(
            labels, ops.clip((logits + 10) / 20, 0, 1), at_tokens
        )

    def fit(self, *args, **kwargs):
        history = super().fit(*args, **kwargs)
        self._write_table()
        return history

    def mask_filler(self):
        """The generator with its head, as a `MaskedLanguageModel`.

        ELECTRA's discriminator cannot fill in masked tokens, which the post
        regrets ("losing one for another"). Its generator can. The result uses
        the same network and the same head, not copies of them.
        """
        if self._generation is None:
            raise ValueError(
                "Expected a network for a generator. Received: "
                f"generator={self.generator!r}"
            )
        masking = TokenMasking.from_config(
            {**self.masking.get_config(), "name": None}
        )
        return MaskedLanguageModel(
            self.generator,
            masking=masking,
            embedding=self._generation.embedding,
            head=self.generator_head,
            pad_token=self.pad_token,
            dtype=self.dtype_policy,
        )

    def detect_replaced(self, x, batch_size=32, verbose=0):
        """The probability of each token that it is not the original one.

        Args:
            x: Tokens as for `fit`, taken as they are: nothing is masked.
            batch_size: Integer.
            verbose: `"auto"`, 0, 1 or 2.

        Returns:
            NumPy array `(n, length)`.
        """
        arrays = self._arrays(x)
        self._write_table()
        if self._detector is None:
            self._detector = backend.jit_layer(
                lambda ids, segments: ops.sigmoid(
                    self.discriminator_head(
                        self._discrimination(ids, segments, training=False)
                    )
                ),
                self,
            )
        return map_batches(self._detector, arrays, batch_size, verbose)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        generator = self.generator
        if self.sharing == "all":
            generator = None  # it is the discriminator
        return {
            **super().get_config(),
            "generator": serialize(generator),
            "discriminator": serialize(self.discriminator),
            "sharing": self.sharing,
            "generator_weight": self.generator_weight,
            "discriminator_weight": self.discriminator_weight,
            "temperature": self.temperature,
            "labels": self.labels,
            "allow_original": self.allow_original,
        }

    @classmethod
    def from_config(cls, config):
        if config["sharing"] == "all":
            network = keras.saving.deserialize_keras_object(
                config["discriminator"]
            )
            config = {**config, "generator": network, "discriminator": network}
        return super().from_config(config)
