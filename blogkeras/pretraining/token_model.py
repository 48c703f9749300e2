"""The base class of models that are trained on tokens alone."""

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    as_numpy,
    check_integer,
    check_integers,
    row_weights,
)
from blogkeras.models import TargetlessModel, check_own_loss
from blogkeras.pretraining.masking import TokenMasking
from blogkeras.state import NumberedDraws

INPUTS = ("token_ids", "segment_ids", "word_ids")


class TokenModel(TargetlessModel):
    """A model of tokens whose loss is its own: `fit(tokens)`.

    Subclasses call `_set_masking` and `_set_means`, and set `takes_segments`
    and `PARTS`: the arguments that are Keras objects, for `from_config`.
    """

    PARTS: tuple[str, ...] = ()
    ROW = "sequence"

    def _set_masking(
        self,
        vocabulary_size,
        masking,
        mask_token,
        special_tokens,
        mask_rate,
        pad_token,
        seed,
        **options,
    ):
        """Keeps the arguments that all of them have, and makes the masking."""
        self.seed = None if seed is None else check_integer("seed", seed)
        self.vocabulary_size = vocabulary_size
        self._masking_given = masking is not None
        self.masking = as_masking(
            masking,
            mask_token,
            special_tokens,
            mask_rate,
            vocabulary_size,
            pad_token,
            seed=self.seed,
            name="masking",
            **options,
        )
        # NumPy's numbers cannot be written to a file.
        self.mask_token = None if mask_token is None else int(mask_token)
        self.special_tokens = [int(token) for token in special_tokens]
        self.mask_rate = float(mask_rate)
        self.pad_token = None if pad_token is None else int(pad_token)

    def _new_draws(self):
        """Numbered draws that differ from those of the masking."""
        seed = self.seed
        return NumberedDraws(self, None if seed is None else seed + 2**20)

    def _set_means(self, names):
        """Metrics that are means over the whole epoch."""
        self._means = {name: keras.metrics.Mean(name=name) for name in names}

    def _update_means(self, values):
        """`values` is a dict from names to pairs of values and weights."""
        for name, (value, weight) in values.items():
            self._means[name].update_state(ops.cast(value, "float32"), weight)

    @as_in_keras
    def compile(self, optimizer="adam", loss=None, **kwargs):
        """As Keras's, but for loss and metrics: the model has its own."""
        check_own_loss({"loss": loss, **kwargs})
        super().compile(optimizer, **kwargs)

    def _symbolic_inputs(self):
        parts = " or ".join(f"`model.{name}`" for name in self.PARTS)
        raise ValueError(
            f"Expected a network: export {parts}. A call of the whole model "
            "masks tokens and gives what the loss is made of; with "
            "`input_signature` it is exported all the same. Received: "
            f"{type(self).__name__}"
        )

    def _split(self, x):
        """`(tokens, segments or None, words or None)` of what `fit` takes."""
        if isinstance(x, dict):
            unknown = set(x) - set(INPUTS)
            parts = [x.get(name) for name in INPUTS]
        else:
            parts = list(x) if isinstance(x, (list, tuple)) else [x]
            unknown = parts[2:]
            parts = [*parts, None, None][:3]
        if unknown or parts[0] is None:
            received = type(x)
            if isinstance(x, dict):
                received = f"the keys {list(x)}"
            elif _short(x):
                received = repr(x)
            raise ValueError(
                "Expected an array of tokens, [tokens, segments], or a dict "
                "with 'token_ids' and, where there are any, 'segment_ids' and "
                "'word_ids'; what is padding is known by `pad_token`. "
                f"Received: {received}"
            )
        tokens = parts[0]
        for name, part in zip(INPUTS, parts, strict=True):
            if part is None:
                continue
            if not hasattr(part, "shape"):
                raise ValueError(
                    f"Expected {name!r} to be an array. Received: {type(part)}"
                )
            if len(part.shape) != 2 or (
                None not in (part.shape[1], tokens.shape[1])
                and part.shape[1] != tokens.shape[1]
            ):
                raise ValueError(
                    f"Expected {name!r} of shape (batch, length). Received: "
                    f"{name} of shape {tuple(part.shape)}"
                )
        if parts[1] is not None and not self.takes_segments:
            raise ValueError(
                "Expected no segments, since no network takes them. Received: "
                f"segments of shape {tuple(parts[1].shape)}"
            )
        check_integers("tokens", tokens, 0, self.vocabulary_size - 1)
        if parts[1] is not None:
            check_integers("segments", parts[1])
        if parts[2] is not None:
            check_integers("word_ids", parts[2], minimum=-(2**31))
            self.masking.check_takes_words()
        return parts

    def _prepared(self, x):
        """`_split`, as int32 tensors."""
        return [
            part if part is None else ops.cast(part, "int32")
            for part in self._split(x)
        ]

    def _arrays(self, x):
        """`[tokens, segments]` as int32 arrays, for `map_batches`."""
        ids, segments, _ = self._split(x)
        ids = as_numpy(ids).astype("int32")
        if segments is None:
            return [ids, np.zeros_like(ids)]
        return [ids, as_numpy(segments).astype("int32")]

    def _masked(self, tokens, words, training):
        inputs = tokens if words is None else [tokens, words]
        return self.masking(inputs, training=training)

    # In a compiled step no values are known, and a token out of range gives
    # NaN, the last row of the table or an error of the device. So `fit` and
    # the like look at what they are given before they begin.

    def _check_data(self, x):
        if hasattr(x, "__array__") and not ops.is_tensor(x):
            x = np.asarray(x)
        if _is_data(x):
            return x, self._check_arrays(x)
        return self._check_stream(x), None

    def _check_batch(self, batch):
        # Keras takes a list of two arrays for inputs and targets.
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        self._check_arrays(*parts[:2])

    def _check_arrays(self, x, y=None):
        """Checks arrays, and says how many rows they have."""
        self._check_no_targets(y)
        if not ops.is_tensor(x):
            # TensorFlow's tensors, on the JAX backend too.
            x = tree.map_structure(
                lambda part: (
                    np.asarray(part) if hasattr(part, "shape") else part
                ),
                x,
            )
        rows = len(self._split(x)[0])
        if not rows:
            raise ValueError("Expected at least one sequence. Received: none")
        return rows

    def _checked(self, x, y=None, sample_weight=None):
        self._check_no_targets(y)
        return super()._checked(x, y, sample_weight)

    def _check_no_targets(self, y):
        # Two arrays in a tuple are inputs and targets for Keras. Segments that
        # were meant as inputs would be ignored.
        if len(getattr(y, "shape", ())) > 1:
            raise ValueError(
                "Expected no targets, since the model makes its own. Segments "
                "are a part of the input: [tokens, segments] or a dict, and "
                "([tokens, segments],) as validation data. Received: targets "
                f"of shape {tuple(y.shape)}"
            )

    def _added_losses(self):
        """What layers gave to `add_loss`, regularizers included."""
        if not self.losses:
            return 0.0
        return super().compute_loss(None, None, None, None)

    @property
    def steps(self):
        """How many training steps the model has made; saved with it."""
        return int(ops.convert_to_numpy(self.masking.draws.iterations))

    def get_config(self):
        masking = self.masking if self._masking_given else None
        return {
            **super().get_config(),
            "mask_token": self.mask_token,
            "special_tokens": self.special_tokens,
            "mask_rate": self.mask_rate,
            "masking": keras.saving.serialize_keras_object(masking),
            "embedding": self.embedding,
            "pad_token": self.pad_token,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in (*cls.PARTS, "masking"):
            if isinstance(config[name], dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name]
                )
        return cls(**config)


def weighted_mean(values, weights):
    """Σ w v / Σ w over the batch of all replicas; 0 where all weights are 0.

    On a replica the first sum is over its own rows only: Keras adds up the
    gradients of the replicas.
    """
    total = backend.all_reduce_sum(ops.sum(weights))
    total = ops.where(total > 0, total, 1.0)
    # Values without weight may be infinite, and 0 · inf is NaN.
    values = ops.where(weights > 0, values, 0.0)
    return ops.sum(values * weights) / total


def sequence_weights(sample_weight):
    """Sample weights `(batch, 1)`, or 1."""
    if sample_weight is None:
        return 1.0
    return row_weights(sample_weight, "sequence")[:, None]


def as_masking(
    masking, mask_token, special_tokens, mask_rate, size, pad_token, **options
):
    """The `TokenMasking` given, or one of these options."""
    if masking is None:
        if mask_token is None:
            raise ValueError(
                "Expected `mask_token`, the number of the token that hides "
                "others, or `masking`. Received: mask_token=None"
            )
        return TokenMasking(
            size,
            mask_token,
            special_tokens,
            mask_rate,
            pad_token=pad_token,
            **options,
        )
    if not isinstance(masking, TokenMasking):
        raise ValueError(
            "Expected `masking` to be a `TokenMasking`. Received: "
            f"masking={masking!r}"
        )
    if mask_token is not None or len(special_tokens) or mask_rate != 0.15:
        raise ValueError(
            "Expected either `masking`, or `mask_token`, `special_tokens` and "
            f"`mask_rate`. Received: mask_token={mask_token}, "
            f"special_tokens={special_tokens}, mask_rate={mask_rate} and "
            "a masking"
        )
    if masking.vocabulary_size != size:
        raise ValueError(
            "Expected a masking with the vocabulary of the networks. Received: "
            f"vocabulary_size={masking.vocabulary_size} and {size}"
        )
    if masking.pad_token != pad_token:
        raise ValueError(
            "Expected `pad_token` to be that of the masking. Received: "
            f"pad_token={pad_token} and {masking.pad_token}"
        )
    return masking


def _is_data(x):
    """Whether `x` holds arrays, and is not something that yields them."""
    known = isinstance(x, (dict, list, tuple, np.ndarray))
    return known or ops.is_tensor(x)


def _short(x):
    return isinstance(x, (str, int, float, bool, type(None)))
