"""Adversarial training in one line, on a tiny Keras model, in seconds.

A sentence of made-up words praises if it has more good than bad ones. The model
is trained plainly and adversarially, and both are attacked.

`--methods` takes other methods by name: "pgd", "trades", "awp", or "rdrop",
which attacks nothing but compares two passes with different dropout.

Blog: 对抗训练浅谈：意义、方法和思考, https://kexue.fm/archives/7234;
又是Dropout两次！这次它做到了有监督任务的SOTA, https://kexue.fm/archives/8496
"""

import argparse

import keras
import numpy as np
from keras import layers

from blogkeras import adversarial_training, evaluate_robustness
from blogkeras.adversarial import METHODS

VOCABULARY, LENGTH = 100, 12


def make_data(size, rng):
    """Returns sentences of words 1 to 99 (10 good, 10 bad) and labels."""
    x = rng.integers(1, VOCABULARY, (size, LENGTH)).astype("int32")
    score = (x <= 10).sum(1) - ((x > 10) & (x <= 20)).sum(1)
    return x[score != 0], (score[score != 0] > 0).astype("int32")


def make_model():
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(VOCABULARY, 16, name="embedding", mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.Dropout(0.1),
            layers.Dense(32, activation="relu"),
            layers.Dense(2),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["fgm"]
    )
    methods = parser.parse_args().methods
    rng = np.random.default_rng(0)
    x, y = make_data(360, rng)
    x, y = x[:256], y[:256]
    test_x, test_y = make_data(720, rng)
    test_x, test_y = test_x[:512], test_y[:512]
    strengths = (0, 0.25, 0.5, 1)  # in units of the mean norm of a word
    print("Attack", *strengths, sep="\t")
    accuracies = {}
    for name in ("plain", *methods):
        keras.utils.set_random_seed(0)
        model = make_model()
        if name != "plain":
            adversarial_training(model, method=name)  # the one line
        model.fit(x, y, batch_size=64, epochs=40, verbose=0)
        accuracies[name] = evaluate_robustness(
            model,
            test_x,
            test_y,
            strengths,
            relative=True,
            batch_size=64,
            verbose=0,
        ).column("accuracy")
        print(name, *(f"{a:.3f}" for a in accuracies[name]), sep="\t")
    return accuracies


if __name__ == "__main__":
    main()
