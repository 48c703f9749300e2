"""Lower bounds of log p(x), by importance weights."""

import math

import numpy as np
from keras import ops


def importance_bound(log_weight, num_samples, rows):
    """log (1/k) Σ w_i, one after another and without overflow.

    With w = p(x, z) / q(z | x) and z from q, its expectation is at most
    log p(x) and does not decrease with k.

    Args:
        log_weight: Function `index -> (log w, value)`, both `(rows,)`, float32;
            `value` is anything to be averaged besides, of any shape.
        num_samples: Integer k.
        rows: Integer.

    Returns:
        `(bound, mean of the values)`.

    Reference:
        [Burda et al., 2016](https://arxiv.org/abs/1509.00519)
    """

    def add(index, state):
        total, mean = state
        log_w, value = log_weight(index)
        share = 1 / (ops.cast(index, "float32") + 1)
        return ops.logaddexp(total, log_w), mean + (value - mean) * share

    log_w, value = log_weight(ops.zeros((), "int32"))
    total, mean = ops.fori_loop(1, num_samples, add, (log_w, value))
    return total - math.log(num_samples), mean


def bits_per_dim(nats, num_dimensions):
    """−nats / (log 2 · dimensions)."""
    return -np.asarray(nats) / (math.log(2) * num_dimensions)
