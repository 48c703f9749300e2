"""The terms of the loss: their weights in training, the mean over rows."""

import math

import keras
import numpy as np
from keras import ops

from blogkeras import backend


class RowLoss(keras.losses.Loss):
    """The mean of values that were computed before, one for each row.

    A Keras loss, because its reduction applies sample weights and divides by
    the number of replicas.
    """

    def call(self, y_true, y_pred):
        return y_pred


def kl_weight(config, step):
    """The weight β of the KL term at a step, a float32 scalar.

    β = clip((step − constant) / warmup, minimum, 1)
    """
    if not config.kl_warmup_steps + config.kl_constant_steps:
        return ops.ones((), "float32")
    step = ops.cast(step, "float32") - config.kl_constant_steps
    weight = step / max(config.kl_warmup_steps, 1)
    if not config.kl_warmup_steps:
        weight = ops.cast(step >= 0, "float32")
    return ops.clip(weight, config.kl_minimum, 1.0)


def spectral_weight(config, kl_weight):
    """The weight λ of the spectral and batch norm terms."""
    if config.spectral_start is None:
        return config.spectral_weight
    start, end = map(math.log, (config.spectral_start, config.spectral_weight))
    return ops.exp((1 - kl_weight) * start + kl_weight * end)


def balance(config, kl, kl_weight):
    """Weights γ of the KL terms of the groups, with mean 1.

    A group with a large KL term, or at a coarse scale, weighs more, so that
    all groups stay in use during the warm-up:

        γ_l ∝ (mean |KL_l| + 0.01) / α_l,   α_l = 4^i / (groups of its scale)

    for the i-th scale from the coarsest ("square"); 2^i ("linear"), √2^i
    ("sqrt") or 1 ("equal") in place of α. Constants for the gradient; 1 as
    soon as β is 1, and always where there are no steps of warm-up.

    Args:
        config: `NVAEConfig`.
        kl: `(batch, groups)`.
        kl_weight: Scalar β.

    Returns:
        `(groups,)`.
    """
    if config.kl_balance is None or not config.kl_warmup_steps:
        return ops.ones((kl.shape[-1],), "float32")
    alpha = []
    for i, count in enumerate(reversed(config.groups)):
        each = {
            "equal": 1,
            "linear": 2**i,
            "sqrt": 2 ** (i / 2),
            "square": 4**i / count,
        }[config.kl_balance]
        alpha += [each] * count
    # The whole batch, where replicas share it.
    size = ops.stop_gradient(ops.mean(ops.abs(kl), axis=0))
    size = backend.all_reduce_sum(size) / backend.num_replicas()
    gamma = (size + 0.01) / np.asarray(alpha, "float32")
    return ops.where(kl_weight < 1, gamma / ops.mean(gamma), 1.0)
