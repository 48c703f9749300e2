"""Masked-language modelling, with a second task on pairs of sentences."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import check_choice, check_integer, check_number
from blogkeras.graph import freeze_inside
from blogkeras.loops import ProgramCache
from blogkeras.models import map_batches
from blogkeras.pretraining.backbones import Backbone, checked_embedding
from blogkeras.pretraining.heads import (
    BinaryHead,
    MaskedTokenHead,
    binary_losses,
    gathered,
    masked_losses,
)
from blogkeras.pretraining.pairs import change_pairs
from blogkeras.pretraining.token_model import (
    TokenModel,
    sequence_weights,
    weighted_mean,
)

PAIRS = (None, "next_sentence", "sentence_order")


@keras.saving.register_keras_serializable(package="blogkeras")
class MaskedLanguageModel(TokenModel):
    """Pre-trains an encoder by predicting masked tokens (BERT, ALBERT).

        L = mean over masked t of -log p(x_t | x̂) + λ · BCE(changed, pair)

    The head runs on the masked positions only. Masks are chosen on the device,
    anew in each step (see `TokenMasking`). With `pairs`, half of the pairs
    `[CLS] A [SEP] B [SEP]` are changed, and a second loss predicts from the
    vector of `[CLS]` which ones:

    - `"next_sentence"` (BERT): B is that of another sequence of the batch;
    - `"sentence_order"` (ALBERT): A and B have changed places.

    The pairs are changed on the device, too: the data hold unchanged pairs with
    their `"segment_ids"` (see `token_blocks(..., pairs=True)`).

    Args:
        backbone: Encoder, tokens → vectors: of bert4keras, KerasHub or any
            functional model.
        mask_token: Integer.
        special_tokens: Integers that are never masked: `[CLS]`, `[SEP]`.
        pairs: `None`, `"next_sentence"` or `"sentence_order"`.
        mask_rate: Float between 0 and 1.
        pairs_weight: Float ≥ 0, λ.
        masking: A `TokenMasking`, instead of `mask_token`, `special_tokens` and
            `mask_rate`. By default 80 % of the positions show the mask token
            and 10 % a random token.
        embedding: Name of the layer that looks up tokens, the layer, or its
            number among the backbone's embeddings. `None` finds it.
        head: A `MaskedTokenHead` to go on with. `None` makes one.
        pad_token: Integer.
        seed: Integer or `None`.

    Metrics, each over the whole epoch: `masked_accuracy`, `masked_loss`, and
    `pair_accuracy`, `pair_loss` with `pairs`.

    Raises:
        ValueError: if the backbone is not built, does not map tokens to vectors
            or has no embedding; if there is no mask token; on arguments out of
            range; and in `fit`, on tokens outside of the vocabulary: in arrays,
            all batches of a generator, the first batch of a data set.

    Example:

    >>> tokens = keras.Input((16,), dtype="int32")
    >>> h = keras.layers.Embedding(100, 32)(tokens)
    >>> h = keras.layers.Dense(64, activation="relu")(h)
    >>> model = MaskedLanguageModel(
    ...     keras.Model(tokens, h), mask_token=4, special_tokens=[2, 3]
    ... )
    >>> model.compile("adam")
    >>> # model.fit(tokens); model.backbone.save("encoder.keras")

    Reference:
        [Devlin et al., 2018](https://arxiv.org/abs/1810.04805);
        [Lan et al., 2019](https://arxiv.org/abs/1909.11942);
        [blog post 7846](https://kexue.fm/archives/7846)
    """

    PARTS = ("backbone",)

    def __init__(
        self,
        backbone: keras.layers.Layer,
        mask_token: int | None = None,
        special_tokens: Sequence[int] = (),
        pairs: str | None = None,
        *,
        mask_rate: float = 0.15,
        pairs_weight: float = 1.0,
        masking: Any = None,
        embedding: Any = None,
        head: Any = None,
        pad_token: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pairs = check_choice("pairs", pairs, PAIRS)
        self.pairs_weight = check_number(
            "pairs_weight", pairs_weight, minimum=0
        )
        self._encoder = Backbone(
            "backbone", backbone, checked_embedding(embedding), pad_token
        )
        self.backbone = self._encoder.model
        self.embedding = self._encoder.address
        self._set_masking(
            self._encoder.vocabulary_size,
            masking,
            mask_token,
            special_tokens,
            mask_rate,
            pad_token,
            seed,
        )
        self.takes_segments = self._encoder.takes_segments or bool(pairs)
        self.head = self._checked_head(head)
        self.pair_head = self.draws = None
        names = ["masked_accuracy", "masked_loss"]
        if pairs:
            self.pair_head = BinaryHead(
                self._encoder.dim,
                activation="tanh",
                dtype=self.dtype_policy,
                name="pair_head",
            )
            self.draws = self._new_draws()
            names += ["pair_accuracy", "pair_loss"]
        self._set_means(names)
        self._fillers = ProgramCache()
        self.built = True
        freeze_inside(self)

    def _checked_head(self, head):
        """The head given, or a new one."""
        sizes = self._encoder.head_sizes
        if head is None:
            return MaskedTokenHead(*sizes, dtype=self.dtype_policy, name="head")
        if not isinstance(head, MaskedTokenHead) or head.sizes != sizes:
            raise ValueError(
                f"Expected `head` to be a MaskedTokenHead of sizes {sizes}. "
                f"Received: head={head!r}"
            )
        return head

    def call(self, inputs, training=None):
        ids, segments, words = self._prepared(inputs)
        outputs = {}
        if self.pairs:
            if segments is None:
                raise ValueError(
                    "Expected segments, 0 and 1, of pairs. Received: none, "
                    f"pairs={self.pairs!r}"
                )
            ids, segments, words, labels, weights = change_pairs(
                self.pairs,
                ids,
                segments,
                words,
                self.pad_token,
                backend.uniform,
                self.draws.next_step()
                if training
                else self.draws.evaluation(ids),
            )
            outputs = {"pair_labels": labels, "pair_weights": weights}
        masked = self._masked(ids, words, training)
        vectors = self._encoder(
            masked["token_ids"], segments, training=training
        )
        if self.pairs:
            outputs["pair_logits"] = self.pair_head(vectors[:, 0])
        logits = self.head(
            gathered(vectors, masked["mask_positions"]), self._encoder.table
        )
        losses, right = masked_losses(logits, masked["mask_ids"])
        return {
            **masked,
            **outputs,
            "masked_losses": losses,
            "masked_right": right,
        }

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        rows = sequence_weights(sample_weight)
        weights = y_pred["mask_weights"] * rows
        losses = y_pred["masked_losses"]
        loss = weighted_mean(losses, weights)
        means = {
            "masked_loss": (losses, weights),
            "masked_accuracy": (y_pred["masked_right"], weights),
        }
        if self.pairs:
            weights = (y_pred["pair_weights"][:, None] * rows)[:, 0]
            labels, logits = y_pred["pair_labels"], y_pred["pair_logits"]
            losses = binary_losses(logits, labels)
            loss += self.pairs_weight * weighted_mean(losses, weights)
            right = (logits > 0) == (labels > 0)
            means["pair_loss"] = losses, weights
            means["pair_accuracy"] = right, weights
        self._update_means(means)
        return loss + self._added_losses()

    def fill_mask(self, x, top_k=5, batch_size=32, verbose=0):
        """The most probable tokens at each mask.

        Args:
            x: Tokens as for `fit`, some of them `mask_token`.
            top_k: Integer. How many.
            batch_size: Integer. Sequences computed at once.
            verbose: `"auto"`, 0, 1 or 2.

        Returns:
            `(places, tokens, probabilities)`, NumPy arrays with one row for
            each mask, in reading order: `(row, column)` in `x`; the `top_k`
            tokens, the most probable first; and their probabilities.
        """
        top_k = check_integer("top_k", top_k, 1, self.vocabulary_size)
        ids, segments = self._arrays(x)
        masks = ids == self.masking.mask_token
        counts = masks.sum(axis=1)
        if not counts.any():
            shape = 0, top_k
            return (
                np.zeros((0, 2), "int64"),
                np.zeros(shape, "int32"),
                np.zeros(shape, "float32"),
            )
        # The number of masks in a row is rounded up to a power of two, so that
        # few programs are compiled.
        most = min(2 ** int(counts.max() - 1).bit_length(), ids.shape[1])
        # The columns of the masks, in order, before all others.
        columns = np.argsort(~masks, axis=1, kind="stable")[:, :most]
        rows = np.flatnonzero(counts)
        program = self._fillers.get((most, top_k), lambda: self._filler(top_k))
        tokens, probabilities = map_batches(
            program,
            [ids[rows], segments[rows], columns[rows].astype("int32")],
            batch_size,
            verbose,
        )
        used = np.arange(most) < counts[rows][:, None]
        return np.argwhere(masks), tokens[used], probabilities[used]

    def _filler(self, top_k):
        def fill(ids, segments, columns):
            vectors = self._encoder(ids, segments, training=False)
            logits = self.head(gathered(vectors, columns), self._encoder.table)
            probabilities, tokens = ops.top_k(ops.softmax(logits), top_k)
            return ops.cast(tokens, "int32"), probabilities

        return backend.jit_layer(fill, self)

    def get_config(self):
        return {
            **super().get_config(),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "pairs": self.pairs,
            "pairs_weight": self.pairs_weight,
            "head": None,  # a new one gets the weights that are saved
        }
