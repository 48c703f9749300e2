"""Four known densities in the plane: excess over the floor, log-likelihood.

The floors of the loss and the entropies come from 16 million draws under a
blurred histogram, not from this code.
"""

import keras
import numpy as np
import pytest
from kit import slow_on_tensorflow

from blogkeras.denoising import (
    DenoisingDensityEstimator,
    log_partition,
    mlp_log_density,
    toy_densities,
)

# {set: {σ: (floor of ‖s + ε/σ²‖² per dimension, E log p̂ of noisy points)}}
TRUTH = {
    "eight_gaussians": {0.1: (92.91, -2.905), 0.5: (2.296, -3.737)},
    "two_spirals": {0.1: (78.23, -2.941)},
    "checkerboard": {0.1: (91.67, -3.639)},
    "rings": {0.1: (71.78, -3.085)},
}


def train(name, sigma, seed, steps, units, batch_size=512):
    """A run with annealed σ, falling rate and averaged weights."""
    keras.utils.set_random_seed(seed)
    x = getattr(toy_densities, name).sample(1000 * batch_size, seed=seed)
    model = DenoisingDensityEstimator(
        mlp_log_density((2,), units), sigma, seed=seed
    )
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    momentum = 0.999 if steps > 10_000 else 0.99
    model.compile(
        keras.optimizers.Adam(rate, use_ema=True, ema_momentum=momentum),
        steps_per_execution=50,
        jit_compile=True,
    )
    model.fit(
        x[: min(steps, 1000) * batch_size],
        batch_size=batch_size,
        epochs=max(steps // 1000, 1),
        verbose=0,
    )
    return model


def measure(model, name, sigma, points, num_points=601):
    """`(excess per dimension, its error, normalized E log p̂)`, fresh points.

    ‖s‖² + 2 s·ε/σ² + d/σ² has the mean of ‖s + ε/σ²‖² and less variance.
    """
    floor = TRUTH[name][sigma][0]
    clean = getattr(toy_densities, name).sample(points, seed=10_000)
    rng = np.random.default_rng(10_001)
    noise = rng.normal(0, sigma, clean.shape).astype("float32")
    y = clean + noise
    score = model.score(y, batch_size=16_384).astype("float64")
    loss = (score**2 + 2 * score * noise / sigma**2).mean(-1) + 1 / sigma**2
    log_z = log_partition(
        model, "quadrature", bounds=[(-6, 6)] * 2, num_points=num_points
    ).value
    likelihood = model.log_density(y, batch_size=16_384).mean() - log_z
    return loss.mean() - floor, loss.std() / points**0.5, likelihood


@slow_on_tensorflow
def test_eight_gaussians_in_short():
    """At σ = ½ the modes touch, and few steps are enough."""
    model = train("eight_gaussians", 0.5, 0, 2000, (32, 32), 256)
    excess, error, likelihood = measure(
        model, "eight_gaussians", 0.5, 50_000, 201
    )
    assert excess < 0.1 + 3 * error
    assert abs(likelihood + 3.737) < 0.03
    # Point by point, where there are noisy points.
    density = toy_densities.eight_gaussians
    y = density.sample(500, seed=1)
    y += np.random.default_rng(2).normal(0, 0.5, y.shape).astype("float32")
    # One has a constant of its own.
    assert np.std(model.log_density(y) - density.log_density(y, 0.5)) < 0.2
    score = np.stack(
        [
            density.log_density(y + step, 0.5)
            - density.log_density(y - step, 0.5)
            for step in 1e-4 * np.eye(2)
        ],
        -1,
    )
    score /= 2e-4
    assert np.std(model.score(y) - score) < 0.3 * np.std(score)


@pytest.mark.verify
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TRUTH)
def test_four_sets(name, seed):
    model = train(name, 0.1, seed, 80_000, (64, 64, 64, 64))
    excess, error, likelihood = measure(model, name, 0.1, 1_000_000)
    assert error < 0.07
    assert excess <= 0.2
    assert abs(likelihood - TRUTH[name][0.1][1]) < 0.03
