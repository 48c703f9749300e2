"""A classifier whose features do not tell which camera took the picture.

Handwritten digits are "photographed" by two cameras: the second has a gray
background that grows brighter from left to right, and less contrast. A plain
classifier carries the camera along in its features, though no label depends on
it. The same classifier with one more line,

    features = HSICRegularization(rate, ...)([features, camera])

learns features that are nearly independent of the camera. For both the script
shows the accuracy on test pictures, how well a linear probe reads the camera
off the features of test pictures (0.5 is chance), their CKA with the camera,
the p-value of their independence, and a figure of the features in the plane of
their first two principal axes.

Data: MNIST, from Keras; `--data DIR` takes a folder with mnist_train*.npz and
mnist_test.npz (arrays x and y) instead.

Blog: HSIC简介：一个有意思的判断相关性的思路, https://kexue.fm/archives/6910
"""

import argparse
import pathlib

import keras
import numpy as np
from keras import layers

from blogkeras import (
    DeltaKernel,
    HSICRegularization,
    cka,
    hsic_test,
    report,
)
from blogkeras.extras import require


def read(folder, size):
    """Digits `(n, 784)` in [0, 1] and labels, for training and for the test."""
    if folder is None:
        train, test = keras.datasets.mnist.load_data()
    else:
        folder = pathlib.Path(folder)
        parts = [np.load(p) for p in sorted(folder.glob("mnist_train*.npz"))]
        train = [np.concatenate([p[key] for p in parts]) for key in "xy"]
        archive = np.load(folder / "mnist_test.npz")
        test = archive["x"], archive["y"]
    return [
        (x[:size].reshape(-1, 784).astype("float32") / 255, y[:size])
        for x, y in (train, test)
    ]


def photographed(x, rng):
    """Half of the pictures by either camera; and which."""
    camera = rng.integers(0, 2, len(x))
    background = np.tile(np.linspace(0, 1, 28, dtype="float32"), 28)
    other = 0.6 * x + 0.4 * background
    return np.where(camera[:, None], other, x), camera


def make_model(rate):
    picture = keras.Input((784,), name="picture")
    camera = keras.Input((1,), name="camera")
    hidden = layers.Dense(128, activation="relu")(picture)
    features = layers.Dense(16, name="features")(hidden)
    if rate:
        features = HSICRegularization(rate, kernel_y=DeltaKernel())(
            [features, camera]
        )
    outputs = layers.Dense(10, activation="softmax")(features)
    model = keras.Model([picture, camera], outputs)
    model.compile(
        keras.optimizers.Adam(1e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def probe(features, camera):
    """Accuracy of least squares, trained on one half, on the other half."""
    x = np.c_[features, np.ones(len(features))]
    half = len(x) // 2
    w, *_ = np.linalg.lstsq(x[:half], 2.0 * camera[:half] - 1, rcond=None)
    return np.mean((x[half:] @ w > 0) == camera[half:])


def draw(views, camera, path):
    figure = require("matplotlib.figure").Figure(
        figsize=(8.4, 4.0), dpi=100, layout="constrained"
    )
    for axes, (title, features) in zip(
        figure.subplots(1, 2), views.items(), strict=True
    ):
        x = features - features.mean(0)
        plane = x @ np.linalg.svd(x, full_matrices=False)[2][:2].T
        for value in (0, 1):
            some = plane[camera == value]
            axes.scatter(*some.T, s=5, linewidths=0, label=f"camera {value}")
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    axes.legend(frameon=False)
    return report.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of the digits")
    parser.add_argument("--size", type=int, default=10_000, help="pictures")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=30.0)
    parser.add_argument(
        "--figure", default="results/hsic_independent_representation.png"
    )
    args = parser.parse_args()
    require("rich")
    require("matplotlib")
    rng = np.random.default_rng(0)
    (x, y), (test_x, test_y) = read(args.data, args.size)
    (x, camera), (test_x, test_camera) = (
        photographed(t, rng) for t in (x, test_x)
    )
    some = slice(0, 2000)
    rows, views = [], {}
    for name, rate in (
        ("plain", 0.0),
        (f"HSIC, rate {args.rate:g}", args.rate),
    ):
        keras.utils.set_random_seed(0)
        model = make_model(rate)
        model.fit(
            [x, camera[:, None]],
            y,
            batch_size=256,
            epochs=args.epochs,
            verbose=2,
        )
        inputs = [test_x, test_camera[:, None]]
        accuracy = model.evaluate(
            inputs, test_y, batch_size=256, verbose=0, return_dict=True
        )["accuracy"]
        tap = keras.Model(model.inputs, model.get_layer("features").output)
        features = tap.predict(inputs, batch_size=256, verbose=0)[some]
        seen = test_camera[some]
        alignment = cka(features, seen, kernel_y=DeltaKernel())
        p_value = hsic_test(features[:500], seen[:500], None, DeltaKernel())[1]
        rows.append(
            [
                name,
                float(accuracy),
                float(probe(features, seen)),
                float(alignment),
                p_value,
            ]
        )
        views[name] = features
    report.print_table(
        ["features", "accuracy", "camera probe", "CKA", "p (n = 500)"], rows
    )
    print("Figure:", draw(views, test_camera[some], args.figure))


if __name__ == "__main__":
    main()
