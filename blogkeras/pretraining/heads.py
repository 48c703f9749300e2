"""The output layers of pre-training, and their losses."""

import keras
from keras import layers, ops

from blogkeras.graph import freeze_inside


def initializer():
    """A new initializer for a kernel of the heads, as in BERT.

    Kernels need different initializers: one initializer gives equal values.
    """
    return keras.initializers.TruncatedNormal(stddev=0.02)


@keras.saving.register_keras_serializable(package="blogkeras")
class MaskedTokenHead(layers.Layer):
    """Predicts tokens from vectors, with the table of the encoder's embedding.

        logits = LayerNorm(gelu(W h + c)) · Eᵀ + b

    Args:
        vocabulary_size: Integer.
        embedding_dim: Integer. Size of the table's vectors.
        dim: Integer. Size of the vectors h.

    Call arguments:
        vectors: `(..., dim)`.
        table: E, `(vocabulary_size, embedding_dim)`.

    Returns:
        `(..., vocabulary_size)`, float32 under any policy.
    """

    def __init__(self, vocabulary_size, embedding_dim, dim, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.embedding_dim = embedding_dim
        self.dim = dim
        self.dense = layers.Dense(
            embedding_dim,
            activation="gelu",
            kernel_initializer=initializer(),
            dtype=self.dtype_policy,
            name="dense",
        )
        self.normalization = layers.LayerNormalization(
            epsilon=1e-6, dtype=self.dtype_policy, name="normalization"
        )
        # Keras would warn of a mask that arrives here and is not used.
        self.supports_masking = True
        self.dense.build((None, dim))
        self.normalization.build((None, embedding_dim))
        self.bias = self.add_weight(
            (vocabulary_size,), "zeros", autocast=False, name="bias"
        )
        self.built = True
        freeze_inside(self)

    @property
    def sizes(self):
        return self.vocabulary_size, self.embedding_dim, self.dim

    def build(self, *shapes):
        pass

    def compute_mask(self, *args, **kwargs):
        return None

    def call(self, vectors, table):
        h = self.normalization(self.dense(vectors))
        table = ops.cast(table, h.dtype)
        logits = ops.matmul(h, ops.transpose(table))
        bias = ops.cast(self.bias, "float32")
        return ops.cast(logits, "float32") + bias

    def compute_output_spec(self, vectors, table):
        shape = (*vectors.shape[:-1], self.vocabulary_size)
        return keras.KerasTensor(shape, "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "embedding_dim": self.embedding_dim,
            "dim": self.dim,
        }


@keras.saving.register_keras_serializable(package="blogkeras")
class BinaryHead(layers.Layer):
    """One logit for each vector: v · act(W h + c) + b.

    Args:
        dim: Integer. Size of the vectors.
        activation: As for `keras.layers.Dense`.

    Call arguments:
        vectors: `(..., dim)`.

    Returns:
        `(...)`, float32 under any policy.
    """

    def __init__(self, dim, activation="gelu", **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.activation = activation
        self.dense, self.logit = (
            layers.Dense(
                units,
                activation=activation,
                kernel_initializer=initializer(),
                dtype=self.dtype_policy,
                name=name,
            )
            for units, activation, name in (
                (dim, activation, "dense"),
                (1, None, "logit"),
            )
        )
        # Keras would warn of a mask that arrives here and is not used.
        self.supports_masking = True
        self.dense.build((None, dim))
        self.logit.build((None, dim))
        self.built = True
        freeze_inside(self)

    def build(self, *shapes):
        pass

    def compute_mask(self, *args, **kwargs):
        return None

    def call(self, vectors):
        return ops.cast(self.logit(self.dense(vectors))[..., 0], "float32")

    def compute_output_spec(self, vectors):
        return keras.KerasTensor(vectors.shape[:-1], "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "activation": self.activation,
        }


def gathered(vectors, positions):
    """The vectors at the positions: `(batch, K, dim)`."""
    return ops.take_along_axis(vectors, positions[..., None], axis=1)


def masked_losses(logits, targets):
    """Cross entropy in nats, and whether the best guess is right.

    Args:
        logits: `(batch, K, classes)`, float32.
        targets: `(batch, K)`, int32.

    Returns:
        Two float32 tensors `(batch, K)`.
    """
    at_target = ops.take_along_axis(logits, targets[..., None], axis=-1)
    losses = ops.logsumexp(logits, axis=-1) - at_target[..., 0]
    best = ops.cast(ops.argmax(logits, axis=-1), "int32")
    return losses, ops.cast(best == targets, "float32")


def binary_losses(logits, labels):
    """Cross entropy of one logit, in nats: log(1 + exp(x)) - label · x."""
    return ops.softplus(logits) - ops.cast(labels, logits.dtype) * logits
