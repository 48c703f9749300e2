"""A network of four layers gives way, part by part, to one of two.

Handwritten digits (those of scikit-learn, 8 × 8). The large network is trained
and frozen. Then, in every batch, each of its two halves is replaced at random
by a single new layer, and the new layers learn in the company of the old ones.
What has been learnt is detached and trained a little longer. For comparison the
same small network is trained directly, for as many epochs.

Blog: BERT-of-Theseus：基于模块替换的模型压缩方法,
https://kexue.fm/archives/7575
"""

import time

import keras
import numpy as np
from keras import layers

from blogkeras import LinearReplacement, Theseus, compression_report
from blogkeras.extras import require

WIDTH = 64


def compiled(model):
    model.compile(
        keras.optimizers.Adam(2e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=True,
    )
    return model


def main():
    keras.utils.set_random_seed(0)
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    train, test = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
    seconds = {}

    def fit(name, model, epochs):
        start = time.perf_counter()
        compiled(model).fit(*train, batch_size=40, epochs=epochs, verbose=0)
        seconds[name] = time.perf_counter() - start
        return model

    def relu(count):
        return [layers.Dense(WIDTH, "relu") for _ in range(count)]

    # 1. The predecessor: two modules of two layers each, and a head.
    modules = [relu(2), relu(2)]
    head = layers.Dense(10, "softmax")
    predecessor = keras.Sequential(
        [keras.Input((64,)), *modules[0], *modules[1], head]
    )
    fit("predecessor", predecessor, 15)

    # 2. Each module is replaced at random, more and more often.
    theseus = Theseus(modules, relu(2), head, LinearReplacement(0.002, 0.3))
    fit("replacing", theseus, 15)

    # 3. The successor alone: a copy, since the head is the predecessor's, too.
    successor = fit("successor", theseus.detach(copy=True), 5)
    seconds["successor"] = sum(seconds.values())

    direct = keras.Sequential(
        [keras.Input((64,)), *relu(2), layers.Dense(10, "softmax")]
    )
    fit("direct", direct, 20)

    report = compression_report(
        {"predecessor": predecessor, "successor": successor, "direct": direct},
        *test,
        training_seconds={k: v for k, v in seconds.items() if k != "replacing"},
        verbose=0,
    )
    report.table("Digits: four layers, and two")
    same = np.mean(
        predecessor.predict(test[0], verbose=0).argmax(1)
        == successor.predict(test[0], verbose=0).argmax(1)
    )
    print(f"Predecessor and successor agree on {same:.3f} of the test digits.")


if __name__ == "__main__":
    main()
