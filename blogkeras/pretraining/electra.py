"""ELECTRA: pre-training by telling replaced tokens."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_integer,
    check_number,
)
from blogkeras.models import map_batches
from blogkeras.ops import sample_categorical
from blogkeras.pretraining.backbones import Backbone, call_with_table
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
    as_masking,
    row_weights,
    weighted_mean,
)
from blogkeras.state import NumberedDraws, draw_rows

SHARING = ("embeddings", "disentangled", "none", "all")
FREQUENCIES = ("uniform", "unigram")


@keras.saving.register_keras_serializable(package="blogkeras")
class ElectraPretrainer(TokenModel):
    """Pre-trains an encoder by telling which tokens were replaced.

    A small generator fills masked positions with tokens that it draws, a
    discriminator says of every token whether it is the original:

        x̂ = mask(x),  x_t' ~ p_G(x_t | x̂) at the masked positions
        L = λ_G · mean over masked t of -log p_G(x_t | x̂)
          + λ_D · mean over tokens t of BCE(x_t' ≠ x_t, D(x')_t)

    All of it is one compiled step, with new masks and draws each time. The
    generator's head runs on the masked positions only, and draws by the inverse
    of the distribution function (`sample_categorical`); no gradient passes the
    draw. `fit` takes tokens, or a dict with `"token_ids"` and, if there are
    any, `"segment_ids"` and `"word_ids"`. Sample weights are one for each
    sequence; Keras forgets them where there is no `y`: then give the tokens as
    `y` too, which is not looked at.

    Afterwards `generator` and `discriminator` are plain models to fine-tune;
    `mask_filler()` is the masked-token model with its head.

    Args:
        generator: Encoder, tokens → vectors: of bert4keras, KerasHub or any
            functional model. Or what draws without learning: `"uniform"`;
            `"unigram"`, by the tokens' frequency so far; or a function
            `(masked tokens, positions) -> logits` of shape
            `(batch, K, vocabulary)` or `(vocabulary,)`.
        discriminator: Encoder, without a head.
        mask_token: Integer.
        special_tokens: Integers that are never masked: `[CLS]`, `[SEP]`.
        sharing: What the two have in common.

            - `"embeddings"`: one table of tokens (with the generator's values
              at first);
            - `"disentangled"` (DeBERTa-v3): the discriminator's table is
              stop_gradient(E) + Δ, with the generator's E, and Δ = 0 at first;
            - `"none"`;
            - `"all"`: one network, run twice. Where two are given they must be
              equal, and the discriminator is it.
        mask_rate: Float between 0 and 1.
        generator_weight: Float ≥ 0, λ_G.
        discriminator_weight: Float ≥ 0, λ_D.
        temperature: Float > 0. The generator's logits are divided by it before
            drawing.
        labels: `"replaced"`, the paper's: what differs from the original; or
            `"generated"`: every masked position, where the draw was right too.
        allow_original: Boolean. Whether the original may be drawn.
        masking: A `TokenMasking`, instead of `mask_token`, `special_tokens` and
            `mask_rate`. By default 85 % of the positions show the mask token.
        embedding: Name of the layer that looks up tokens, or a pair (the
            generator's, the discriminator's). `None` finds it.
        pad_token: Integer.
        seed: Integer or `None`.

    Metrics, each over the whole epoch: `masked_accuracy` and `masked_loss` of
    the generator's best guess, `sampled_accuracy` of its draws;
    `discriminator_loss`, `discriminator_accuracy`, `discriminator_auc`,
    `discriminator_precision`, `discriminator_recall`, without padding.

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

    Departs from the post: with the paper's labels, which are the default, a
    perfect generator does not leave the discriminator at chance. A token that
    fits well is rarely a replaced one: the best guess is
    m (1 - p(token | context)) with the mask rate m. The post's argument is that
    of `labels="generated"`. Departs from the paper's code: positions differ
    (there one position may be drawn twice, and gets the mean of two token
    numbers), and the AUC leaves out padding.

    Reference:
        [Clark et al., 2020](https://arxiv.org/abs/2003.10555);
        [He et al., 2021](https://arxiv.org/abs/2111.09543), `"disentangled"`;
        [blog post 7846](https://kexue.fm/archives/7846)
    """

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
        pad_token: int | None = 0,
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
        self.seed = None if seed is None else check_integer("seed", seed)
        self.mask_token = mask_token
        self.special_tokens = special_tokens
        self.mask_rate = mask_rate
        self.pad_token = pad_token
        self.embedding = _embedding_names(embedding)
        self._masking_given = masking is not None
        self._connect(generator, discriminator)
        self.vocabulary_size = self._discrimination.vocabulary_size
        self.masking = as_masking(
            masking,
            mask_token,
            special_tokens,
            mask_rate,
            self.vocabulary_size,
            mask_token_rate=0.85,
            random_token_rate=0.0,
            pad_token=pad_token,
            seed=seed,
            name="masking",
        )
        self.takes_segments = any(
            part is not None and part.takes_segments
            for part in (self._generation, self._discrimination)
        )
        self._add_heads()
        # Not the seed of the masking: these draws are others.
        self.draws = NumberedDraws(self, None if seed is None else seed + 2**20)
        self._add_metrics()
        self._detector = None
        self.built = True

    def _connect(self, generator, discriminator):
        """The two backbones, with what they share."""
        names = self.embedding if isinstance(self.embedding, list) else None
        names = names or [self.embedding] * 2
        self._generation = None
        self._discrimination = Backbone(
            "discriminator", discriminator, names[1], self.pad_token
        )
        drawing = isinstance(generator, str) or (
            callable(generator)
            and not isinstance(generator, keras.layers.Layer)
        )
        if isinstance(generator, str):
            check_choice("generator", generator, FREQUENCIES)
        if drawing:
            if self.sharing in ("disentangled", "all"):
                raise ValueError(
                    "Expected a network for a generator, to share with. "
                    f"Received: generator={generator!r}, "
                    f"sharing={self.sharing!r}"
                )
            self.generator = generator
        elif self.sharing == "all":
            other = getattr(generator, "model", generator)
            if not _equal(other, self._discrimination.model):
                raise ValueError(
                    'Expected two equal networks for sharing="all". Received: '
                    f"generator={generator}, discriminator={discriminator}"
                )
            self._generation = self._discrimination
            self.generator = self._discrimination.model
        else:
            self._generation = Backbone(
                "generator", generator, names[0], self.pad_token
            )
            self._check_pair()
            self.generator = self._generation.model
        self._discriminator = self._discrimination.model

    def _check_pair(self):
        generation, discrimination = self._generation, self._discrimination
        if generation.model is discrimination.model:
            raise ValueError(
                'Expected two networks, or sharing="all". Received: '
                f"sharing={self.sharing!r} and the same network twice"
            )
        sizes = generation.vocabulary_size, discrimination.vocabulary_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                "Expected the same vocabulary in both networks. Received: "
                f"{sizes[0]} tokens in the generator, {sizes[1]} in the "
                "discriminator"
            )
        if self.sharing == "embeddings":
            discrimination.share_table(generation)
        elif self.sharing == "disentangled":
            discrimination.check_shape(generation)

    def _add_heads(self):
        size = self.vocabulary_size
        self.discriminator_head = BinaryHead(
            self._discrimination.dim,
            dtype=self.dtype_policy,
            name="discriminator_head",
        )
        self.generator_head = self.delta = self.token_counts = None
        if self._generation is not None:
            self.generator_head = MaskedTokenHead(
                size,
                self._generation.table.shape[1],
                self._generation.dim,
                dtype=self.dtype_policy,
                name="generator_head",
            )
        if self.sharing == "disentangled":
            self.delta = self.add_weight(
                self._generation.table.shape,
                "zeros",
                autocast=False,
                name="delta",
            )
        if self._drawing == "unigram":
            self.token_counts = self.add_weight(
                (size,),
                "ones",
                trainable=False,
                autocast=False,
                aggregation="mean",
                name="token_counts",
            )

    def _add_metrics(self):
        mean = keras.metrics.Mean
        names = ["sampled_accuracy"]
        if self._generation is not None:
            names = ["masked_accuracy", "masked_loss", *names]
        names += ["discriminator_loss", "discriminator_accuracy"]
        self._means = {name: mean(name=name) for name in names}
        self._rates = {
            # Even steps of the logit: replaced tokens are rare, and most
            # probabilities small.
            "discriminator_auc": keras.metrics.AUC(
                thresholds=(
                    1 / (1 + np.exp(-np.arange(-9, 9.1, 0.1)))
                ).tolist(),
                name="discriminator_auc",
            ),
            "discriminator_precision": keras.metrics.Precision(
                name="discriminator_precision"
            ),
            "discriminator_recall": keras.metrics.Recall(
                name="discriminator_recall"
            ),
        }

    @property
    def _drawing(self):
        """The generator that is no network, or None."""
        return self.generator if self._generation is None else None

    @property
    def discriminator(self):
        """The encoder that is pre-trained, a plain model."""
        self._write_table()
        return self._discriminator

    def _write_table(self):
        """Writes stop_gradient(E) + Δ into the discriminator's own table."""
        if self.delta is None:
            return
        delta = ops.convert_to_tensor(self.delta)
        if backend.is_concrete(delta):
            self._discrimination.table.assign(self._table(delta))

    def _table(self, delta):
        table = self._generation.table
        return ops.stop_gradient(ops.convert_to_tensor(table)) + delta

    # The discriminator's own table is no parameter while it is E + Δ. Its flag
    # is left as it is, since the discriminator is fine-tuned later.

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
        """The generator's: `(batch, K, vocabulary)`, or `(vocabulary,)`."""
        positions = masked["mask_positions"]
        if self._generation is not None:
            vectors = self._generation(
                masked["token_ids"], segments, training=training
            )
            return self.generator_head(
                gathered(vectors, positions), self._generation.table
            )
        if callable(self.generator):
            return self.generator(masked["token_ids"], positions)
        never = np.zeros(self.vocabulary_size, "bool")
        never[self.masking.never] = True
        logits = ops.zeros((self.vocabulary_size,))
        if self.generator == "unigram":
            logits = ops.log(ops.convert_to_tensor(self.token_counts))
        return ops.where(never, -np.inf, logits)

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
        logits = ops.stop_gradient(logits) / self.temperature
        if not self.allow_original:
            classes = ops.arange(self.vocabulary_size, dtype="int32")
            original = classes == targets[..., None]
            logits = ops.where(original, -np.inf, logits)
        u = draw_rows(keras.random.uniform, ops.shape(targets), seed)
        return sample_categorical(logits, u)

    def _discriminate(self, ids, segments, training):
        """Logits that a token is not the original: `(batch, length)`."""
        if self.delta is None:
            vectors = self._discrimination(ids, segments, training=training)
        else:
            vectors, loss = call_with_table(
                self._discrimination,
                self._table(ops.convert_to_tensor(self.delta)),
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
        rows = row_weights(sample_weight)
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
        for name, (value, weight) in values.items():
            value = ops.cast(value, "float32")
            self._means[name].update_state(value, weight)
        probabilities = ops.sigmoid(logits)
        for metric in self._rates.values():
            metric.update_state(labels, probabilities, at_tokens)

    def fit(self, *args, **kwargs):
        history = super().fit(*args, **kwargs)
        self._write_table()
        return history

    def mask_filler(self):
        """The generator with its head, as a `MaskedLanguageModel`.

        ELECTRA is pre-trained for telling, not for guessing, and the post
        regrets the latter ("losing one for another"): its generator can guess.
        Network and head are this model's own, not copies.
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
            embedding=self._generation.embedding.name,
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
        ids, segments, _ = self._split(x)
        segments = (
            np.zeros(np.shape(ids), "int32") if segments is None else (segments)
        )
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
        return map_batches(self._detector, [ids, segments], batch_size, verbose)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        generator = self.generator
        if self.sharing == "all":
            generator = None  # the discriminator
        elif not isinstance(generator, str):
            generator = serialize(generator)
        return {
            **super().get_config(),
            "generator": generator,
            "discriminator": serialize(self.discriminator),
            "mask_token": self.mask_token,
            "special_tokens": list(self.special_tokens),
            "sharing": self.sharing,
            "mask_rate": self.mask_rate,
            "generator_weight": self.generator_weight,
            "discriminator_weight": self.discriminator_weight,
            "temperature": self.temperature,
            "labels": self.labels,
            "allow_original": self.allow_original,
            "masking": serialize(self.masking) if self._masking_given else None,
            "embedding": self.embedding,
            "pad_token": self.pad_token,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        deserialize = keras.saving.deserialize_keras_object
        config["discriminator"] = deserialize(config["discriminator"])
        if config["sharing"] == "all":
            config["generator"] = config["discriminator"]
        elif not isinstance(config["generator"], str):
            config["generator"] = deserialize(config["generator"])
        if config["masking"] is not None:
            config["masking"] = deserialize(config["masking"])
        return cls(**config)


def _embedding_names(embedding):
    """Names of layers: `None`, one, or a list of two."""

    def name(part):
        if part is None or isinstance(part, str):
            return part
        if isinstance(part, keras.layers.Layer):
            return part.name
        raise ValueError(
            "Expected `embedding` to be the name of a layer, or a pair of "
            f"names. Received: embedding={embedding!r}"
        )

    if isinstance(embedding, (list, tuple)) and len(embedding) == 2:
        return [name(part) for part in embedding]
    return name(embedding)


def _equal(one, other):
    """Whether two networks differ in nothing but names and values."""
    if one is other:
        return True
    if not isinstance(one, keras.layers.Layer):
        return False

    def description(model):
        layers = []
        for layer in model._flatten_layers():
            config = {"weights": [tuple(w.shape) for w in layer.weights]}
            if not isinstance(layer, keras.Model):
                config |= layer.get_config()
                config.pop("name", None)
            layers.append((type(layer), repr(config)))
        return layers

    return description(one) == description(other)
