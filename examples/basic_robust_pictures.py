"""Digits under attack: networks whose pictures change by up to a tenth.

Handwritten digits (those of scikit-learn, 8 × 8) with numbers from 0 to 1, and
a small convolutional network. The attack changes every number by at most ε, the
maximum norm, and keeps it between 0 and 1. The network is trained plainly, by
PGD (at attacked pictures) and by TRADES (at the pictures themselves, with
predictions that are to stay the same under the attack). Each is then attacked
with several strengths. `--output PATH` draws the accuracy over the strength.

Blog: 对抗训练浅谈：意义、方法和思考, https://kexue.fm/archives/7234
"""

import argparse

import keras
from keras import layers

from blogkeras import (
    PGD,
    TRADES,
    adversarial_training,
    describe_training,
    evaluate_robustness,
    report,
)
from blogkeras.extras import require

STRENGTHS = (0, 0.05, 0.1, 0.15, 0.2)


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, 2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # XLA is slower than TensorFlow's own convolutions on a CPU.
        jit_compile=keras.backend.backend() == "jax",
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--epsilon", type=float, default=0.1, help="in training"
    )
    parser.add_argument("--output", help="where to draw the accuracies")
    args = parser.parse_args()
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    train, test = (images[:1280], labels[:1280]), (images[1280:], labels[1280:])
    maximum_norm = {"norm_scope": "coordinate", "bounds": (0, 1)}
    methods = {
        "plain": None,
        "PGD": PGD(args.epsilon, steps=3, random_start=True, **maximum_norm),
        "TRADES": TRADES(args.epsilon, steps=3, **maximum_norm),
    }
    accuracies = {}
    for name, method in methods.items():
        model = make_model()
        if method is not None:
            adversarial_training(model, method=method)  # the one line
        print(f"{name}: {describe_training(model)}")
        model.fit(*train, batch_size=64, epochs=args.epochs, verbose=0)
        result = evaluate_robustness(
            model,
            *test,
            STRENGTHS,
            attack="pgd",
            steps=10,
            norm="linf",
            bounds=(0, 1),
            batch_size=47,
            verbose=0,
        )
        accuracies[name] = result.column("accuracy")
    report.print_table(
        ["accuracy under attack", *map(str, STRENGTHS)],
        [[name, *values] for name, values in accuracies.items()],
    )
    if args.output:
        path = report.line_figure(
            args.output,
            STRENGTHS,
            accuracies,
            "epsilon: how far each number of a picture may move",
            "accuracy",
            title=f"Digits, trained at epsilon = {args.epsilon:g}",
        )
        print("Figure:", path)


if __name__ == "__main__":
    main()
