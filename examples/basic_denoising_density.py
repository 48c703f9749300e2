"""A density learnt by denoising: eight Gaussians in the plane, in a minute.

A network learns to take Gaussian noise off points. What it has learnt is the
logarithm of their density: its gradient, the score, points towards the data,
Langevin dynamics draws new points from it, and with its normalizing constant,
by quadrature, it can be compared with the truth.

Writes `denoising_density.png` to `--output`: the density beside the truth, the
score, and samples.

Blog: 从去噪自编码器到生成模型, https://kexue.fm/archives/7038

Result (8000 steps, one seed; Keras 3.15.1, JAX): see docs/denoising.md.

Run: python examples/basic_denoising_density.py
"""

import argparse
import pathlib

import keras
import numpy as np

from blogkeras import (
    DenoisingDensityEstimator,
    log_partition,
    mlp_log_density,
    toy_densities,
)
from blogkeras.extras import require

SIGMA, BATCH_SIZE = 0.1, 512
TRUTH = toy_densities.eight_gaussians


def train(steps):
    network = mlp_log_density((2,), units=(64, 64, 64, 64))
    # σ falls from the scale of the data to SIGMA in the first half.
    model = DenoisingDensityEstimator(network, SIGMA, seed=0)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(
        keras.optimizers.Adam(rate, use_ema=True, ema_momentum=0.999),
        steps_per_execution=min(50, steps),
        jit_compile=True,
    )
    points = TRUTH.sample(100 * BATCH_SIZE, seed=0)
    epochs = max(steps // 100, 1)
    model.fit(
        points[: BATCH_SIZE * min(steps, 100)],
        batch_size=BATCH_SIZE,
        epochs=epochs,
        verbose=0,
    )
    return model


def draw(model, log_z, samples, path):
    """Density beside the truth, score, samples."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")

    line = np.linspace(-4.5, 4.5, 201)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    truth = np.exp(TRUTH.log_density(grid, SIGMA)).reshape(201, 201)
    learnt = np.exp(model.log_density(grid) - log_z).reshape(201, 201)
    coarse = np.linspace(-4.2, 4.2, 22)
    points = np.stack(np.meshgrid(coarse, coarse), -1).reshape(-1, 2)
    score = model.score(points)
    length = np.linalg.norm(score, axis=1, keepdims=True)
    arrows = score / np.maximum(length, 1e-9)
    figure, axes = pyplot.subplots(
        1, 4, figsize=(15, 4), sharey=True, layout="constrained"
    )
    for axis, values in zip(axes, (truth, learnt), strict=False):
        picture = axis.imshow(
            values,
            origin="lower",
            extent=(-4.5, 4.5, -4.5, 4.5),
            cmap="magma",
            vmin=0,
            vmax=1.2 * truth.max(),
        )
    figure.colorbar(picture, ax=axes[:2], shrink=0.8, label="density")
    axes[2].quiver(*points.T, *arrows.T, length)
    axes[3].plot(*samples.T, ".", markersize=2)
    titles = (
        "density in truth, with noise",
        "density as learnt",
        "score as learnt (color: length)",
        "samples",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_aspect("equal")
        axis.set_xlim(-4.5, 4.5)
        axis.set_ylim(-4.5, 4.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--steps", type=int, default=8000, help="hundreds, or up to 100"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results")
    )
    options = parser.parse_args()
    if options.steps > 100 and options.steps % 100:
        parser.error(
            "Expected hundreds of steps, or up to 100. Received: "
            f"--steps {options.steps}"
        )
    keras.utils.set_random_seed(0)

    model = train(options.steps)
    log_z = log_partition(
        model, "quadrature", bounds=[(-6, 6)] * 2, num_points=301
    ).value
    samples = model.sample(1000, seed=0)
    draw(model, log_z, samples, options.output / "denoising_density.png")

    # Both means are of log p̂ over points with noise.
    points = TRUTH.sample(20_000, seed=1)
    noise = np.random.default_rng(2).normal(0, SIGMA, points.shape)
    learnt = model.log_density(points + noise).mean() - log_z
    truth = TRUTH.log_density(points + noise, SIGMA).mean()
    print("mean log-density of noisy points")
    print(f"learnt {learnt:.3f}, truth {truth:.3f}")
    angle = np.arctan2(samples[:, 1], samples[:, 0])
    modes = np.round(angle / (np.pi / 4)).astype(int) % 8
    print("samples by mode:", *np.bincount(modes, minlength=8))


if __name__ == "__main__":
    main()
