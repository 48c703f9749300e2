"""Rounding in place of a codebook (FSQ), beside VQ-VAE, in seconds.

Handwritten digits (those of scikit-learn, 8 × 8) become one code each. Two
autoencoders are alike but for the quantizer: one rounds each of four numbers
to 8, 5, 5 and 5 levels, the other looks for the nearest of as many codes, 1000.
The first has no codebook, no further loss and nothing to configure.

Blog: 简单得令人尴尬的FSQ：“四舍五入”超越了VQ-VAE,
https://kexue.fm/archives/9826
"""

import argparse

import keras
import numpy as np
from keras import layers

from blogkeras import VQVAE, FiniteScalarQuantizer, VectorQuantizer, report
from blogkeras.extras import require

LEVELS = [8, 5, 5, 5]
NUM_CODES = 1000


def make_model(quantizer):
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="gelu"),
            layers.Dense(len(LEVELS)),
        ]
    )
    decoder = keras.Sequential(
        [
            keras.Input((len(LEVELS),)),
            layers.Dense(128, activation="gelu"),
            layers.Dense(64),
        ]
    )
    model = VQVAE(encoder, quantizer, decoder)
    model.compile(keras.optimizers.Adam(3e-3), jit_compile=True)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args().epochs
    images = require("sklearn.datasets").load_digits().data / 16
    images = images.astype("float32")
    train, test = images[:1600], images[1600:]
    rows = []
    for name, quantizer in (
        ("rounding (FSQ)", FiniteScalarQuantizer(LEVELS)),
        ("codebook (VQ)", VectorQuantizer(NUM_CODES)),
    ):
        model = make_model(quantizer)
        model.fit(train, batch_size=64, epochs=epochs, verbose=0)
        error = np.mean((model.reconstruct(test) - test) ** 2)
        codes = np.unique(np.asarray(model.encode(train)))
        rows.append([name, float(error / test.var()), len(codes)])
    report.print_table(
        ["quantizer", "test error / variance", "codes used of 1000"], rows
    )


if __name__ == "__main__":
    main()
