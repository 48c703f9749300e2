"""Batch statistics of a decoder, from pictures that it draws itself."""

import keras
from keras import ops

from blogkeras.loops import loop_program, run_steps
from blogkeras.nvae import verbs
from blogkeras.nvae.distributions import noise
from blogkeras.state import StepSeed, base_seed


def recalibrate(model, num_batches, temperature, batch_size, seed, verbose):
    """As `NVAE.recalibrate_batch_norm`, of arguments that were checked."""
    model.build()
    norms = [
        layer
        for layer in model.decoder._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if not norms:
        raise ValueError(
            "Expected a model with batch normalization. Received: "
            "batch_norm=False"
        )
    step = averaging_step(model, norms, batch_size)
    zeros = [ops.zeros(norm.moving_mean.shape) for norm in norms]
    program = model._programs.get(
        ("recalibrate", batch_size),
        lambda: loop_program(step, lambda fn: verbs.compiled(model, fn)),
    )
    count, means, variances = run_steps(
        program,
        (ops.zeros(()), zeros, zeros),
        num_batches,
        base_seed(seed),
        ops.convert_to_tensor(temperature, "float32"),
        verbose=verbose,
    )
    if not float(count):
        raise ValueError(
            "Expected the decoder to give finite numbers. Received: none "
            f"in {num_batches} batches; are the weights finite?"
        )
    for norm, mean, variance in zip(norms, means, variances, strict=True):
        norm.moving_mean.assign(mean)
        norm.moving_variance.assign(ops.maximum(variance, 0))


def averaging_step(model, norms, rows):
    """A step of the loop that averages over batches, see `run_steps`."""

    def step(index, state, seed, temperature):
        count, means, spreads = state
        statistics = batch_statistics(
            model, norms, rows, StepSeed(seed, index), temperature
        )
        finite = ops.all(
            ops.stack([ops.all(ops.isfinite(x)) for x in statistics])
        )
        count += ops.cast(finite, "float32")
        share = 1 / ops.maximum(count, 1)
        new_means, new_spreads = [], []
        for mean, spread, batch_mean, batch_variance in zip(
            means, spreads, statistics[::2], statistics[1::2], strict=True
        ):
            # Variance within batches, and of their means.
            shift = batch_mean - mean
            new_mean = mean + share * shift
            rise = batch_variance + shift * (batch_mean - new_mean)
            new_spread = spread + share * (rise - spread)
            new_means.append(ops.where(finite, new_mean, mean))
            new_spreads.append(ops.where(finite, new_spread, spread))
        return count, new_means, new_spreads

    return step


def batch_statistics(model, norms, rows, seed, temperature):
    """Mean and variance of each norm for one batch of samples."""
    momenta = [norm.momentum for norm in norms]
    frozen = [norm for norm in norms if not norm.trainable]
    mapping = {id(v): (v, ops.convert_to_tensor(v)) for v in model.variables}
    for norm in norms:
        # The old value may be NaN, and 0 · NaN is NaN.
        for v in (norm.moving_mean, norm.moving_variance):
            mapping[id(v)] = v, ops.zeros(v.shape, v.dtype)
    try:
        for norm in norms:
            # The moving average is then the batch's.
            norm.momentum = 0.0
        for norm in frozen:  # which would keep its statistics
            norm.trainable = True
        with keras.StatelessScope([*mapping.values()]) as scope:
            model.decoder.draw(
                rows,
                noise(seed),
                temperature=temperature,
                training=True,
            )
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for norm in frozen:
            norm.trainable = False
    return [
        ops.cast(scope.get_current_value(v), "float32")
        for norm in norms
        for v in (norm.moving_mean, norm.moving_variance)
    ]
