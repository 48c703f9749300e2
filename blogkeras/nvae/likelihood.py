"""Lower bounds of log p(x), by importance weights."""

import math

import numpy as np
from keras import ops

from blogkeras.nvae import verbs
from blogkeras.nvae.distributions import noise, picture_sum, pixels
from blogkeras.state import StepSeed, stream_seed


def evaluate_likelihood(
    model, x, num_samples, per_image, seed, batch_size, verbose
):
    """As `NVAE.evaluate_likelihood`, of arguments that were checked."""
    config = model.config
    x, seed = verbs.pictures(x, config, seed)

    def program(x, index, seed):
        x = model._prepare(x)
        # The encoder runs once for all samples.
        features = model._encode(x)

        def log_weight(i):
            draws = StepSeed(stream_seed(seed, i + 1), index[0])
            outputs = model.decoder.draw(
                x.shape[0], noise(draws), features=features, training=False
            )
            distribution = pixels(config, outputs["parameters"])
            log_x = picture_sum(distribution.log_prob(x))
            log_z = outputs["log_prior"] - outputs["log_posterior"]
            values = ops.concatenate([log_x[:, None], outputs["kl"]], -1)
            return log_x + ops.sum(log_z, axis=-1), values

        return importance_bound(log_weight, num_samples, x.shape[0])

    bound, values = verbs.run(
        model,
        ("likelihood", num_samples),
        program,
        [x],
        (),
        seed,
        batch_size,
        verbose,
    )
    kl = values[:, 1:]
    elbo = values[:, 0] - kl.sum(-1)
    if not per_image:
        bound, elbo, kl = bound.mean(), elbo.mean(), kl.mean(0)
    dimensions = config.num_dimensions
    results = {
        "elbo": elbo,
        "iwae": bound,
        "elbo_bits_per_dim": bits_per_dim(elbo, dimensions),
        "iwae_bits_per_dim": bits_per_dim(bound, dimensions),
    }
    if not per_image:
        results = {name: float(x) for name, x in results.items()}
    return {**results, "kl": kl}


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
