"""Pre-training by guessing masked tokens, with a second task on pairs."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numpy,
    check_choice,
    check_integer,
    check_number,
)
from blogkeras.loops import ProgramCache
from blogkeras.models import map_batches
from blogkeras.pretraining.backbones import Backbone
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
    as_masking,
    row_weights,
    weighted_mean,
)
from blogkeras.state import NumberedDraws

PAIRS = (None, "next_sentence", "sentence_order")


@keras.saving.register_keras_serializable(package="blogkeras")
class MaskedLanguageModel(TokenModel):
    """Pre-trains an encoder by guessing masked tokens (BERT, ALBERT).

        L = mean over masked t of -log p(x_t | x̂) + λ · BCE(changed, pair)

    The head runs on the masked positions only; masks are chosen on the device,
    in each step anew (see `TokenMasking`). With `pairs` a second loss tells
    what was done to half of the pairs `[CLS] A [SEP] B [SEP]`, from the vector
    of `[CLS]`:

    - `"next_sentence"` (BERT): B is that of another sequence of the batch;
    - `"sentence_order"` (ALBERT): A and B have changed places.

    That too is done on the device: the data hold the pairs as they are (see
    `token_blocks(..., pairs=True)`), with `"segment_ids"`.

    Args:
        backbone: Encoder, tokens → vectors: of bert4keras, KerasHub or any
            functional model.
        mask_token: Integer.
        special_tokens: Integers that are never masked: `[CLS]`, `[SEP]`.
        pairs: `None`, `"next_sentence"` or `"sentence_order"`.
        mask_rate: Float between 0 and 1.
        pairs_weight: Float ≥ 0, λ.
        masking: A `TokenMasking`, instead of `mask_token`, `special_tokens` and
            `mask_rate`. By default of the positions 80 % show the mask token,
            10 % a random one.
        embedding: Name of the layer that looks up tokens. `None` finds it.
        head: A `MaskedTokenHead` to go on with. `None` makes one.
        pad_token: Integer.
        seed: Integer or `None`.

    Metrics, each over the whole epoch: `masked_accuracy`, `masked_loss`, and
    `pair_accuracy`, `pair_loss` with `pairs`.

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
        pad_token: int | None = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pairs = check_choice("pairs", pairs, PAIRS)
        self.pairs_weight = check_number(
            "pairs_weight", pairs_weight, minimum=0
        )
        self.seed = None if seed is None else check_integer("seed", seed)
        self._encoder = Backbone("backbone", backbone, embedding, pad_token)
        self.backbone = self._encoder.model
        self.vocabulary_size = size = self._encoder.vocabulary_size
        self.mask_token = mask_token
        self.special_tokens = special_tokens
        self.mask_rate = mask_rate
        self.pad_token = pad_token
        self.embedding = getattr(embedding, "name", embedding)
        self._masking_given = masking is not None
        self.masking = as_masking(
            masking,
            mask_token,
            special_tokens,
            mask_rate,
            size,
            pad_token=pad_token,
            seed=seed,
            name="masking",
        )
        self.takes_segments = self._encoder.takes_segments or bool(pairs)
        shape = size, self._encoder.table.shape[1], self._encoder.dim
        if head is None:
            head = MaskedTokenHead(*shape, dtype=self.dtype_policy, name="head")
        elif not isinstance(head, MaskedTokenHead) or shape != (
            head.vocabulary_size,
            head.embedding_dim,
            head.dim,
        ):
            raise ValueError(
                f"Expected `head` to be a MaskedTokenHead of sizes {shape}. "
                f"Received: head={head!r}"
            )
        self.head = head
        self.pair_head = self.draws = None
        names = ["masked_accuracy", "masked_loss"]
        if pairs:
            self.pair_head = BinaryHead(
                self._encoder.dim,
                activation="tanh",
                dtype=self.dtype_policy,
                name="pair_head",
            )
            # Not the seed of the masking: these draws are others.
            self.draws = NumberedDraws(
                self, None if seed is None else seed + 2**20
            )
            names += ["pair_accuracy", "pair_loss"]
        self._means = {name: keras.metrics.Mean(name=name) for name in names}
        self._fillers = ProgramCache()
        self.built = True

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
                keras.random.uniform,
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
        rows = row_weights(sample_weight)
        weights = y_pred["mask_weights"] * rows
        losses = y_pred["masked_losses"]
        loss = weighted_mean(losses, weights)
        self._means["masked_loss"].update_state(losses, weights)
        self._means["masked_accuracy"].update_state(
            y_pred["masked_right"], weights
        )
        if self.pairs:
            weights = (y_pred["pair_weights"][:, None] * rows)[:, 0]
            labels, logits = y_pred["pair_labels"], y_pred["pair_logits"]
            losses = binary_losses(logits, labels)
            loss += self.pairs_weight * weighted_mean(losses, weights)
            self._means["pair_loss"].update_state(losses, weights)
            right = ops.cast((logits > 0) == (labels > 0), "float32")
            self._means["pair_accuracy"].update_state(right, weights)
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
        ids, segments, _ = self._split(x)
        ids = as_numpy(ids).astype("int32")
        masks = ids == self.masking.mask_token
        counts = masks.sum(axis=1)
        if not counts.any():
            shape = 0, top_k
            return (
                np.zeros((0, 2), "int64"),
                np.zeros(shape, "int32"),
                np.zeros(shape, "float32"),
            )
        segments = (
            np.zeros_like(ids)
            if segments is None
            else as_numpy(segments).astype("int32")
        )
        # Few programs: the number of masks in a row is rounded up.
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
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "backbone": serialize(self.backbone),
            "mask_token": self.mask_token,
            "special_tokens": list(self.special_tokens),
            "pairs": self.pairs,
            "mask_rate": self.mask_rate,
            "pairs_weight": self.pairs_weight,
            "masking": serialize(self.masking) if self._masking_given else None,
            "embedding": self.embedding,
            "head": None,  # its weights are saved
            "pad_token": self.pad_token,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("backbone", "masking"):
            if config[name] is not None:
                config[name] = keras.saving.deserialize_keras_object(
                    config[name]
                )
        return cls(**config)
