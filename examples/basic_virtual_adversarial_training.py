"""Eight labels and a thousand points: virtual adversarial training, in seconds.

Two half-moons in the plane; four points of each have a label, all others the
sample weight 0. Plain training learns from the eight. With the one line

    virtual_adversarial_training(model, ...)

the prediction must not change under the worst small step at any of the points,
so the boundary moves to where no points are. `--figure PATH` draws both.

Blog: 泛化性乱弹：从随机噪声、梯度惩罚到虚拟对抗训练,
https://kexue.fm/archives/7466
"""

import argparse

import keras
import numpy as np
from keras import layers

from blogkeras import report, virtual_adversarial_training
from blogkeras.extras import require

SIZE, LABELS = 1000, 8


def moons(rng):
    """Points `(SIZE, 2)`, and on which of the two half-moons they are."""
    label = np.arange(SIZE) % 2
    angle = np.pi * rng.random(SIZE)
    x = np.where(label, 1 - np.cos(angle), np.cos(angle))
    y = np.where(label, 0.5 - np.sin(angle), np.sin(angle))
    points = np.stack([x, y], -1) + 0.08 * rng.normal(size=(SIZE, 2))
    return points.astype("float32"), label


def train(points, labels, weights, epochs, virtual):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(2),
        ]
    )
    model.compile(
        keras.optimizers.Adam(5e-3),
        # The mean over the labelled rows, not over all.
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        jit_compile=True,
    )
    if virtual:
        # Norms are over the batch: √1000 times what each point moves by.
        scale = np.sqrt(SIZE)
        virtual_adversarial_training(
            model, epsilon=0.3 * scale, xi=0.05 * scale
        )
    model.fit(
        points,
        labels,
        sample_weight=weights,
        batch_size=SIZE,
        epochs=epochs,
        verbose=0,
    )
    return model


def draw(models, points, labels, path):
    figure = require("matplotlib.figure").Figure(
        figsize=(9, 3.6), dpi=110, layout="constrained"
    )
    axis = np.linspace(-1.6, 2.6, 120), np.linspace(-1.1, 1.6, 80)
    grid = np.stack(np.meshgrid(*axis), -1).astype("float32")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        logits = model.predict(grid.reshape(-1, 2), batch_size=960, verbose=0)
        second = (logits[:, 1] > logits[:, 0]).reshape(grid.shape[:2])
        axes.contourf(*axis, second, levels=1, cmap="Pastel2")
        axes.scatter(*points[LABELS:].T, s=2, color="gray", label="unlabelled")
        for label in (0, 1):
            own = points[:LABELS][labels[:LABELS] == label]
            axes.scatter(*own.T, s=60, marker="os"[label], label=f"{label}")
        axes.set(title=name, xlabel="first coordinate")
    panels[0].set_ylabel("second coordinate")
    panels[1].legend(fontsize=9, loc="upper right")
    return report.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", help="where to draw the two boundaries")
    parser.add_argument("--epochs", type=int, default=300)
    args = parser.parse_args()
    points, labels = moons(np.random.default_rng(0))
    weights = (np.arange(SIZE) < LABELS).astype("float32")
    models = {}
    for name, virtual in (("plain", False), ("virtual adversarial", True)):
        models[name] = train(points, labels, weights, args.epochs, virtual)
        found = models[name].predict(points, batch_size=SIZE, verbose=0)
        accuracy = np.mean(found.argmax(-1)[LABELS:] == labels[LABELS:])
        print(f"{name}: accuracy {accuracy:.3f} on the unlabelled points")
    if args.figure:
        print("Figure:", draw(models, points, labels, args.figure))


if __name__ == "__main__":
    main()
