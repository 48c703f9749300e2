"""Codebooks of one size beside each other: gradients, frozen codes, bits.

Handwritten digits (those of scikit-learn, 8 × 8) become four codes each, of 64.
The autoencoders are alike but for the quantizer:

- the gradient that the nearest code lacks: straight through, the rotation trick
  (VQ的旋转技巧, https://kexue.fm/archives/10489), DiVeQ-detach
  (https://kexue.fm/archives/11328), which needs no further loss;
- random codes that stay as they are, times a trained matrix: SimVQ
  (VQ的又一技巧, https://kexue.fm/archives/10519);
- averages with k-means and restarts; signs in place of codes (BSQ); and two
  stages of 8 codes.

One seed and small data: the order of the rows is no verdict.
"""

import argparse

import keras
import numpy as np
from keras import layers

from blogkeras import (
    VQVAE,
    LookupFreeQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    report,
)
from blogkeras.extras import require

CODES, DIM = 64, 6  # 2^6 codes of bits, too
# name: (function that makes the quantizer, whether it starts from k-means)
KINDS = {
    "straight through": (lambda: VectorQuantizer(CODES), False),
    "rotation": (lambda: VectorQuantizer(CODES, gradient="rotation"), False),
    "rotation, from k-means": (
        lambda: VectorQuantizer(CODES, gradient="rotation"),
        True,
    ),
    "DiVeQ-detach": (
        lambda: VectorQuantizer(CODES, gradient="diveq-detach"),
        False,
    ),
    "SimVQ": (
        lambda: VectorQuantizer(CODES, codebook_transform="linear"),
        False,
    ),
    "DiVeQ-detach, SimVQ": (
        lambda: VectorQuantizer(
            CODES, gradient="diveq-detach", codebook_transform="linear"
        ),
        False,
    ),
    "averages, k-means, restarts": (
        lambda: VectorQuantizer(CODES, ema_decay=0.99, restart_threshold=0.1),
        True,
    ),
    "signs (BSQ)": (
        lambda: LookupFreeQuantizer(DIM, spherical=True, temperature=1.0),
        False,
    ),
    "two stages of 8": (lambda: ResidualVectorQuantizer(2, 8), True),
}


def make_model(quantizer):
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="gelu"),
            layers.Dense(4 * DIM),
            layers.Reshape((4, DIM)),
        ]
    )
    decoder = keras.Sequential(
        [
            keras.Input((4, DIM)),
            layers.Flatten(),
            layers.Dense(128, activation="gelu"),
            layers.Dense(64),
        ]
    )
    model = VQVAE(encoder, quantizer, decoder)
    model.compile(
        keras.optimizers.Adam(3e-3),
        jit_compile=keras.backend.backend() == "jax",
    )
    return model


def codes_used(codes):
    """How many different codes there are, of all stages together."""
    codes = codes.reshape(-1, *codes.shape[2:])
    return len(np.unique(codes, axis=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    images = require("sklearn.datasets").load_digits().data / 16
    images = images.astype("float32")
    train, test = images[:1600], images[1600:]
    rows = []
    for name in options.kinds:
        make, k_means = KINDS[name]
        model = make_model(make())
        if k_means:
            model.adapt(train)
        model.fit(train, batch_size=64, epochs=options.epochs, verbose=0)
        error = np.mean((model.reconstruct(test) - test) ** 2)
        used = codes_used(model.encode(train))
        rows.append([name, float(error / test.var()), used])
    report.print_table(
        ["quantizer", "test error / variance", f"codes used of {CODES}"], rows
    )


if __name__ == "__main__":
    main()
