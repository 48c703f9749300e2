"""What the models that are trained on tokens alone have in common."""

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import check_integers
from blogkeras.models import CompositeModel
from blogkeras.pretraining.masking import TokenMasking

INPUTS = ("token_ids", "segment_ids", "word_ids")


class TokenModel(CompositeModel):
    """A model of tokens whose loss is its own: `fit(tokens)`.

    Subclasses set `masking`, `vocabulary_size` and `takes_segments`.
    """

    def compile(self, optimizer="adam", **kwargs):
        """As Keras's, but for loss and metrics: the model has its own."""
        for name in ("loss", "metrics", "weighted_metrics", "loss_weights"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"Expected no `{name}`: the loss and the metrics are the "
                    f"model's own. Received: {name}={kwargs[name]!r}"
                )
        super().compile(optimizer, **kwargs)

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
            raise ValueError(
                "Expected tokens, [tokens, segments], or a dict with "
                "'token_ids' and, where there are any, 'segment_ids' and "
                f"'word_ids'. Received: {x if _short(x) else type(x)}"
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
        return parts

    def _prepared(self, x):
        """`_split`, as int32 tensors."""
        return [
            part if part is None else ops.cast(part, "int32")
            for part in self._split(x)
        ]

    def _masked(self, tokens, words, training):
        inputs = tokens if words is None else [tokens, words]
        return self.masking(inputs, training=training)

    # Inside a compiled step no values are known, and what is out of range gives
    # NaN, the last row of the table or an error of the device, as the case may
    # be: so what can be looked at is looked at before.

    def _check(self, x):
        if hasattr(x, "element_spec"):  # a tf.data.Dataset
            x = _inputs(next(iter(x.take(1)), None))
            # TensorFlow's tensors, on the JAX backend too.
            x = tree.map_structure(np.asarray, x)
        elif isinstance(x, keras.utils.PyDataset):
            x = _inputs(x[0])
        known = isinstance(x, (dict, list, tuple, np.ndarray))
        if known or ops.is_tensor(x):
            self._split(x)

    def fit(self, x=None, *args, **kwargs):
        self._check(x)
        validation = kwargs.get("validation_data")
        if isinstance(validation, (list, tuple)):
            validation = validation[0]
        self._check(validation)
        if hasattr(x, "element_spec"):
            # Keras warns of each data set that it does not shuffle.
            kwargs.setdefault("shuffle", False)
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        self._check(x)
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        self._check(x)
        return super().predict(x, *args, **kwargs)

    def train_on_batch(self, x, *args, **kwargs):
        self._check(x)
        return super().train_on_batch(x, *args, **kwargs)

    def test_on_batch(self, x, *args, **kwargs):
        self._check(x)
        return super().test_on_batch(x, *args, **kwargs)

    def _added_losses(self):
        """What layers gave to `add_loss`, regularizers included."""
        if not self.losses:
            return 0.0
        return super().compute_loss(None, None, None, None)

    @property
    def steps(self):
        """How many training steps the model has made; saved with it."""
        return int(ops.convert_to_numpy(self.masking.draws.iterations.value))


def weighted_mean(values, weights):
    """Σ w v / Σ w over the batch of all replicas; 0 where all weights are.

    On a replica it is that replica's share: the shares, and so the gradients,
    are summed.
    """
    total = backend.all_reduce_sum(ops.sum(weights))
    total = ops.where(total > 0, total, 1.0)
    # What has no weight may be infinite.
    values = ops.where(weights > 0, values, 0.0)
    return ops.sum(values * weights) / total


def row_weights(sample_weight):
    """Sample weights `(batch, 1)`, or 1."""
    if sample_weight is None:
        return 1.0
    if any(size not in (None, 1) for size in sample_weight.shape[1:]):
        raise ValueError(
            "Expected one weight for each sequence. Received: sample_weight of "
            f"shape {tuple(sample_weight.shape)}"
        )
    return ops.cast(ops.reshape(sample_weight, [-1, 1]), "float32")


def as_masking(masking, mask_token, special_tokens, mask_rate, size, **options):
    """The `TokenMasking` given, or one of these options."""
    if masking is None:
        if mask_token is None:
            raise ValueError(
                "Expected `mask_token`, the number of the token that hides "
                "others, or `masking`. Received: mask_token=None"
            )
        return TokenMasking(
            size, mask_token, special_tokens, mask_rate, **options
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
    return masking


def _inputs(batch):
    """The inputs in a batch, which may have targets and weights besides."""
    return batch[0] if isinstance(batch, tuple) else batch


def _short(x):
    return isinstance(x, (str, int, float, bool, type(None)))
