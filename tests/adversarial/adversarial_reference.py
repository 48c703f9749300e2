"""A small model of texts, and the same in float64 by NumPy."""

import keras
import numpy as np
import toy
from keras import layers

import blogkeras

RNG = np.random.default_rng(1)
# Tokens repeat within and across samples; 0 is padding.
TOKENS = np.array([[1, 2, 2, 0], [3, 2, 1, 4], [1, 1, 0, 0]], "int32")
LABELS = np.array([0, 1, 1], "int32")


class Reference:
    """softmax(W · masked mean of tanh(E[tokens])), by hand in float64."""

    def __init__(self, model):
        self.E, self.W = (np.asarray(w, "float64") for w in model.get_weights())

    def gradients(self, E, W, per_occurrence=False):
        mask = (TOKENS != 0)[..., None]
        count = mask.sum(1)
        h = np.tanh(E[TOKENS])
        mean = (h * mask).sum(1) / count
        logits = mean @ W
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(LABELS))
        loss = -np.log(p[rows, LABELS]).mean()
        p[rows, LABELS] -= 1
        dlogits = p / len(LABELS)
        dW = mean.T @ dlogits
        dh = (dlogits @ W.T / count)[:, None] * mask * (1 - h**2)
        if per_occurrence:
            return loss, dh, dW
        dE = np.zeros_like(E)
        np.add.at(dE, TOKENS, dh)
        return loss, dE, dW

    def fgm_step(self, epsilon, rate):
        _, g, _ = self.gradients(self.E, self.W)
        moved = self.E + epsilon * g / np.sqrt((g**2).sum())
        loss, dE, dW = self.gradients(moved, self.W)
        self.E, self.W = self.E - rate * dE, self.W - rate * dW
        return loss


def small_model(dtype="float32", head="softmax"):
    tokens = keras.Input((None,), dtype="int32")
    h = layers.Embedding(5, 3, name="embedding", mask_zero=True, dtype=dtype)(
        tokens
    )
    h = layers.Activation("tanh", dtype=dtype)(h)
    h = layers.GlobalAveragePooling1D(dtype=dtype)(h)
    outputs = layers.Dense(2, use_bias=False, activation=head, dtype=dtype)(h)
    model = keras.Model(tokens, outputs)
    model.set_weights([RNG.normal(size=w.shape) for w in model.get_weights()])
    return model


def compiled(model, rate=0.5, jit=False):
    model.compile(
        keras.optimizers.SGD(rate),
        "sparse_categorical_crossentropy",
        jit_compile=jit,
        run_eagerly=not jit,
    )
    return model


def loss_of_one_step(model, method, jit=False):
    compiled(model, rate=0.0, jit=jit)
    blogkeras.adversarial_training(model, method=method)
    return toy.batch_loss(model, TOKENS, LABELS)
