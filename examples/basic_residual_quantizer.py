"""One model for many bit rates: some stages of a quantizer are dropped.

Handwritten digits (those of scikit-learn, 8 × 8) become six codes of 16 each,
small and by direction, as codecs of audio have them. Each code quantizes the
rest that those before it have left, so the first ones alone are a coarser
picture. Two autoencoders are alike but for one argument: without
`quantizer_dropout` the decoder sees only sums of all six codes; with it half of
the rows of a batch keep their first 1, 2, …, or 6.

Writes `residual_stages.png` to `--output`: the error on test pictures by the
number of codes that are decoded.

Blog: VQ-VAE的简明介绍：量子化自编码器, https://kexue.fm/archives/6760
Method: SoundStream, https://arxiv.org/abs/2107.03312

Result (20 epochs, one seed): see docs/quantization.md.

Run: python examples/basic_residual_quantizer.py
"""

import argparse
import pathlib

import keras
import numpy as np
from keras import layers

from blogkeras import VQVAE, ResidualVectorQuantizer, report
from blogkeras.extras import require

STAGES, CODES, DIM = 6, 16, 16


def make_model(quantizer_dropout):
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="gelu"),
            layers.Dense(DIM),
        ]
    )
    decoder = keras.Sequential(
        [
            keras.Input((DIM,)),
            layers.Dense(128, activation="gelu"),
            layers.Dense(64),
        ]
    )
    quantizer = ResidualVectorQuantizer(
        STAGES,
        CODES,
        codebook_dim=4,
        metric="cosine",
        quantizer_dropout=quantizer_dropout,
        seed=0,
    )
    model = VQVAE(encoder, quantizer, decoder)
    model.compile(
        keras.optimizers.Adam(3e-3),
        jit_compile=keras.backend.backend() == "jax",
    )
    return model


def errors(model, images):
    """Error / variance of the first 1, 2, … codes alone."""
    codes, variance = model.encode(images), images.var()
    return [
        float(np.mean((model.decode(codes[:, :n]) - images) ** 2) / variance)
        for n in range(1, STAGES + 1)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results")
    )
    options = parser.parse_args()
    images = require("sklearn.datasets").load_digits().data / 16
    images = images.astype("float32")
    train, test = images[:1600], images[1600:]
    lines = {}
    for name, rate in (("without dropout", 0.0), ("with dropout", 0.5)):
        model = make_model(rate)
        model.fit(train, batch_size=64, epochs=options.epochs, verbose=0)
        lines[name] = errors(model, test)
    kept = range(1, STAGES + 1)
    bits = int(np.log2(CODES))
    report.print_table(
        ["codes decoded", "bits a picture", *lines],
        [
            [n, n * bits, *row]
            for n, *row in zip(kept, *lines.values(), strict=True)
        ],
        "test error / variance",
    )
    path = report.line_figure(
        options.output / "residual_stages.png",
        kept,
        lines,
        "codes decoded, of six",
        "test error / variance",
    )
    print("wrote", path)
    return lines


if __name__ == "__main__":
    main()
