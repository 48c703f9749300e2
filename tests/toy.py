"""Small models and data that several tests share."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from blogkeras import backend

VOCABULARY = 11
RNG = np.random.default_rng(0)
ROWS = 64  # full batches only: one shape to compile
TOKENS = RNG.integers(1, VOCABULARY, (ROWS, 5)).astype("int32")
TOKENS[::3, 3:] = 0  # padding
DENSE = RNG.normal(size=(ROWS, 3)).astype("float32")
LABELS = RNG.integers(0, 3, (ROWS,)).astype("int32")
TARGETS = RNG.normal(size=(ROWS, 1)).astype("float32")
WEIGHTS = RNG.random(ROWS).astype("float32")


def reset():
    """Names and seeds as in a new process."""
    # Collecting all garbage each time takes longer than most tests.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@keras.saving.register_keras_serializable(package="toy")
class ActivityLoss(layers.Layer):
    """Adds a loss of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x):
        self.add_loss(ops.cast(ops.mean(ops.square(x)), "float32"))
        return x


class OwnLoss(keras.Model):
    """A model that overrides `compute_loss` and tracks a metric in it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.size = keras.metrics.Mean(name="size")

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        size = ops.mean(ops.square(y_pred))
        self.size.update_state(size)
        return super().compute_loss(x, y, y_pred, sample_weight) + 0.1 * size


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(VOCABULARY, 4, name="embedding")
        self.dropout = layers.Dropout(0.2, seed=2)
        self.normalization = layers.BatchNormalization()
        self.head = layers.Dense(3, activation="softmax")

    def call(self, x, training=False):
        h = self.dropout(self.embedding(x), training=training)
        h = self.normalization(ops.mean(h, axis=1), training=training)
        return self.head(h)


class OldStyle(keras.Model):
    """No `training` anywhere: signatures from before Keras 3.3."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(VOCABULARY, 4, name="embedding")
        self.head = layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.head(ops.mean(self.embedding(x), axis=1))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight)


def classifier(
    cls=keras.Model,
    regularizer="l2",
    dropout=0.3,
    mask_zero=True,
    normalization=layers.BatchNormalization,
):
    """Tokens → 3 classes, with everything a training step has to handle."""
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    h = layers.Embedding(
        VOCABULARY,
        4,
        name="embedding",
        mask_zero=mask_zero,
        embeddings_regularizer=regularizer,
    )(tokens)
    h = layers.GlobalAveragePooling1D()(h)
    h = ActivityLoss()(h)
    h = layers.Dense(8, kernel_regularizer=regularizer)(h)
    h = normalization()(h)
    h = layers.Dropout(dropout, seed=3)(h)
    outputs = layers.Dense(3, activation="softmax", dtype="float32")(h)
    return cls(tokens, outputs)


def compiled(model, optimizer=None, **kwargs):
    """Compiles a model, without XLA on TensorFlow, which compiles slowest.

    With few rows, a step is cheapest when it runs eagerly, on both backends.
    """
    kwargs.setdefault(
        "jit_compile",
        keras.backend.backend() == "jax" and not kwargs.get("run_eagerly"),
    )
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **kwargs,
    )
    return model


def batch_loss(model, *args, **kwargs):
    """The loss of one training step; before Keras 3.15 it is a running mean."""
    model.reset_metrics()
    logs = model.train_on_batch(*args, return_dict=True, **kwargs)
    return float(logs["loss"])


def state(model):
    """Every number that training may change."""
    variables = [
        *model.variables,
        *model.optimizer.variables,
        *model.metrics_variables,
    ]
    return [np.asarray(ops.convert_to_numpy(v), "float64") for v in variables]


def weights(model):
    return [ops.convert_to_numpy(w) for w in model.weights]


def difference(a, b):
    assert len(a) == len(b) > 0
    return max(np.abs(x - y).max(initial=0) for x, y in zip(a, b, strict=True))


def assert_near(found, expected, rtol=1e-6):
    """Equal but for rounding, in units of the largest number of each array.

    Numbers below one are compared as such: a gradient of nearly zero may be
    rounded to anything, and Adam makes steps of full length of it.
    """
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(np.abs(theirs).max(initial=0), 1.0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * scale)


def mirrored():
    """TensorFlow's strategy of two replicas, the same one in the whole process.

    The collective operations of two strategies would have the same numbers.
    """
    return backend.distribution()


def token_encoder(
    dim=6, name=None, vocabulary=VOCABULARY, embedding_dim=4, length=5
):
    """Tokens → vectors: a table and one dense layer, no context."""
    tokens = keras.Input((length,), dtype="int32", name="token_ids")
    h = layers.Embedding(vocabulary, embedding_dim, name="table")(tokens)
    h = layers.Dense(dim, activation="tanh", name="dense")(h)
    return keras.Model(tokens, h, name=name)


def bert4keras_transformer(**changes):
    """A small transformer of bert4keras, on TensorFlow."""
    import blogkeras.bert4keras  # noqa: F401

    # isort: split
    from bert4keras.models import build_transformer_model

    sizes = {
        "model": "bert",
        "vocab_size": VOCABULARY,
        "embedding_size": 4,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "hidden_act": "gelu",
        "max_position": 8,
        "segment_vocab_size": 2,
        "dropout_rate": 0.1,
    }
    return build_transformer_model(**{**sizes, **changes})


def keras_hub_bert(**changes):
    """A BERT of KerasHub with one small block; skips where there is none."""
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {
        "vocabulary_size": 50,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 8,
        "intermediate_dim": 16,
        "max_sequence_length": 64,
        "dropout": 0.0,
    }
    return keras_hub.models.BertBackbone(**{**sizes, **changes})


def keras_hub_classifier():
    """The same with two classes on top."""
    backbone = keras_hub_bert()
    keras_hub = pytest.importorskip("keras_hub")
    return keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=2, preprocessor=None, dropout=0.0
    )
