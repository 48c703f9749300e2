"""Handwritten digits without back-propagation between layers.

A dense network of six layers learns MNIST by the HSIC bottleneck: each layer
has its own objective, and no gradient passes from one to another. It is read
out in both ways of the paper: by the units of its last layer themselves (each
matched to a class), and by a softmax layer on top. Back-propagation trains the
same network for comparison. The script prints the test accuracy after every
epoch and draws it. The settings are those that were best on pictures held out
from the training (`benchmarks/record_hsic.py`).

Data: MNIST, from Keras; `--data DIR` takes a folder with mnist_train*.npz and
mnist_test.npz (arrays x and y) instead.

Blog: HSIC简介：一个有意思的判断相关性的思路, https://kexue.fm/archives/6910
Paper: The HSIC Bottleneck, https://arxiv.org/abs/1908.01580

Measured results: docs/hsic.md
"""

import argparse
import pathlib

import keras
import numpy as np
from keras import layers

from blogkeras import HSICBottleneck, report
from blogkeras.extras import require

BATCH_SIZE = 512  # HSIC compares the samples of a batch: not a small one


def read(folder):
    """Digits `(n, 784)` in [0, 1] and labels, for training and for the test."""
    if folder is None:
        train, test = keras.datasets.mnist.load_data()
    else:
        folder = pathlib.Path(folder)
        parts = [np.load(p) for p in sorted(folder.glob("mnist_train*.npz"))]
        train = [np.concatenate([p[key] for p in parts]) for key in "xy"]
        archive = np.load(folder / "mnist_test.npz")
        test = archive["x"], archive["y"]
    whole = len(train[0]) // BATCH_SIZE * BATCH_SIZE
    return [
        (x[:size].reshape(-1, 784).astype("float32") / 255, y[:size])
        for (x, y), size in ((train, whole), (test, None))
    ]


def block(units):
    """Dense, normalization without parameters, ReLU: the paper's block."""
    return keras.Sequential(
        [
            layers.Dense(units),
            layers.BatchNormalization(center=False, scale=False),
            layers.ReLU(),
        ]
    )


def make_model(kind, steps):
    blocks = [block(256) for _ in range(5)]
    if kind == "back-propagation":
        head = layers.Dense(10, activation="softmax")
        model = keras.Sequential([*blocks, head])
        loss = "sparse_categorical_crossentropy"
    else:
        readout = kind.removeprefix("HSIC, ")
        last = [block(10)] if readout == "unformatted" else []
        model = HSICBottleneck(
            [*blocks, *last], 10, readout, bandwidth=6.0, label_weight=200.0
        )
        loss = None
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    model.compile(
        keras.optimizers.Adam(rate),
        loss,
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() == "jax",
    )
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of the digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--figure", default="results/hsic_bottleneck.png")
    args = parser.parse_args()
    require("rich")
    require("matplotlib")
    train, test = read(args.data)
    steps = args.epochs * len(train[0]) // BATCH_SIZE
    curves = {}
    for kind in ("HSIC, unformatted", "HSIC, format", "back-propagation"):
        keras.utils.set_random_seed(0)
        print(kind)
        history = (
            make_model(kind, steps)
            .fit(
                *train,
                batch_size=BATCH_SIZE,
                epochs=args.epochs,
                validation_data=test,
                verbose=2,
            )
            .history
        )
        curves[kind] = [100 * value for value in history["val_accuracy"]]
    epochs = list(range(1, args.epochs + 1))
    report.print_table(
        ["test accuracy after epoch", *map(str, epochs)],
        [[kind, *values] for kind, values in curves.items()],
    )
    figure = report.line_figure(
        args.figure, epochs, curves, "epoch", "test accuracy, %"
    )
    print("Figure:", figure)


if __name__ == "__main__":
    main()
