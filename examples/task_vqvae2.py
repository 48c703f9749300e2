"""VQ-VAE-2: two maps of codes for a picture, and a prior on a prior.

A coarse map of codes (the top, an eighth of the height and width) says what is
in the picture, a finer one (the bottom, a quarter) where the strokes run. Both
quantizers are plain layers of one functional model:

    h = encoder_bottom(x)               top = quantizer_top(encoder_top(h))
    bottom = quantizer_bottom(h with top)    x̂ = decoder(top with bottom)

One prior learns which top maps there are, for each class; the other which
bottom maps go with a top map. Written to `--output`, as `vqvae2_*.png`:

    levels    test pictures, reconstructed; and with other details: the top
              codes of the picture, bottom codes drawn for them
    samples   both levels drawn, one column for each class

Data: the 1797 handwritten digits (8×8, doubled to 16×16) inside scikit-learn,
or `--data` as in task_vqvae.py. Pictures get a border up to a multiple of 8.

Blog: VQ-VAE的简明介绍：量子化自编码器, https://kexue.fm/archives/6760
Method: https://arxiv.org/abs/1906.00446

Result (defaults, 1618 digits for training and 179 to test; Keras 3.15.1,
TensorFlow 2.21, one run): test error / variance 0.0294;

    level    codes    used    nats, uniform   nats, training   nats, test
    top      2 × 2    1.00    16.6            8.3              9.8
    bottom   4 × 4    1.00    66.5            40.5             49.8

Pictures as small as these gain nothing from a second level: one map of 4 × 4
codes has the same error (task_vqvae.py), and its prior needs 44.0 nats.
The bottom prior knows the class only by the four codes of the top, and its
samples are rarely the digit that was asked for.

Run: python examples/task_vqvae2.py
"""

import argparse
import math
import os
import time

import keras
import numpy as np
from keras import layers
from task_vqvae import load

from blogkeras import CodePrior, VectorQuantizer, backend, report
from blogkeras.extras import require

BATCH_SIZE = 64


def with_border(x):
    """Pictures whose sizes are multiples of 8; the border is empty."""
    pads = [-size % 8 for size in x.shape[1:3]]
    pads = [(0, 0), *((n // 2, n - n // 2) for n in pads), (0, 0)]
    return np.pad(x, pads, constant_values=-0.5)


class TwoLevels:
    """The parts of VQ-VAE-2, each a Keras model or layer.

    `model` is what is trained: pictures to pictures.
    """

    def __init__(self, shape, codes, dim, hidden):
        def conv(filters, size, strides=1, activation=None):
            return layers.Conv2D(
                filters, size, strides, "same", activation=activation
            )

        def larger(filters, activation=None):
            return layers.Conv2DTranspose(
                filters, 4, 2, "same", activation=activation
            )

        def stack(h, filters):
            """Two residual blocks."""
            h = conv(filters, 3)(h)
            for _ in range(2):
                inner = conv(filters // 2, 3, 1, "relu")(layers.ReLU()(h))
                h = layers.Add()([h, conv(filters, 1)(inner)])
            return layers.ReLU()(h)

        def quantizer(name):
            return VectorQuantizer(
                codes, ema_decay=0.99, restart_threshold=0.1, name=name
            )

        self.quantizer_top = quantizer("top")
        self.quantizer_bottom = quantizer("bottom")

        x = keras.Input(shape)
        h = conv(hidden // 2, 4, 2, "relu")(x)
        h = stack(conv(hidden, 4, 2, "relu")(h), hidden)
        self.encoder_bottom = keras.Model(x, h, name="encoder_bottom")

        h = keras.Input(h.shape[1:])
        z_top = conv(dim, 1)(stack(conv(hidden, 4, 2, "relu")(h), hidden))
        self.encoder_top = keras.Model(h, z_top, name="encoder_top")

        # The bottom's vectors know what the top has said already.
        top = keras.Input(z_top.shape[1:])
        both = layers.Concatenate()([h, larger(hidden, "relu")(top)])
        z_bottom = conv(dim, 1)(both)
        self.given_top = keras.Model([h, top], z_bottom, name="given_top")

        bottom = keras.Input(z_bottom.shape[1:])
        both = layers.Concatenate()([larger(dim)(top), bottom])
        y = larger(hidden // 2, "relu")(stack(both, hidden))
        y = larger(shape[-1])(y)
        self.decoder = keras.Model([top, bottom], y, name="decoder")

        h = self.encoder_bottom(x)
        top = self.quantizer_top(self.encoder_top(h))
        bottom = self.quantizer_bottom(self.given_top([h, top]))
        self.model = keras.Model(x, self.decoder([top, bottom]))

    def adapt(self, x):
        """Starts both codebooks from k-means clusters, the top first."""
        h = self.encoder_bottom.predict(x, verbose=0)
        self.quantizer_top.adapt(self.encoder_top.predict(h, verbose=0))
        top = self.quantizer_top.decode(self.encode_top(h))
        z = self.given_top.predict([h, np.asarray(top)], verbose=0)
        self.quantizer_bottom.adapt(z)

    def encode_top(self, h):
        z = self.encoder_top.predict(h, verbose=0)
        return np.asarray(self.quantizer_top.encode(z))

    def encode(self, x):
        """The codes of pictures: top and bottom."""
        h = self.encoder_bottom.predict(x, verbose=0)
        top = self.encode_top(h)
        vectors = np.asarray(self.quantizer_top.decode(top))
        z = self.given_top.predict([h, vectors], verbose=0)
        return top, np.asarray(self.quantizer_bottom.encode(z))

    def decode(self, top, bottom):
        """The pictures of codes."""
        vectors = [
            np.asarray(quantizer.decode(codes))
            for quantizer, codes in (
                (self.quantizer_top, top),
                (self.quantizer_bottom, bottom),
            )
        ]
        return self.decoder.predict(vectors, verbose=0)


def fit_prior(prior, x, x_test, epochs):
    """Trains until held-out maps are predicted best; returns their nats."""
    # On several devices TensorFlow trains without XLA.
    xla = True if backend.num_replicas() == 1 else "auto"
    prior.compile(keras.optimizers.Adam(1e-3), jit_compile=xla)
    # Whole batches only: a compiled step sees one shape.
    whole = len(x[0]) // BATCH_SIZE * BATCH_SIZE
    stop = keras.callbacks.EarlyStopping(
        "val_nats", mode="min", patience=5, restore_best_weights=True
    )
    nats = prior.fit(
        [part[:whole] for part in x],
        validation_data=(x_test,),
        batch_size=BATCH_SIZE,
        epochs=epochs,
        callbacks=[stop],
        verbose=2,
    ).history
    best = int(np.argmin(nats["val_nats"]))
    return nats["nats"][best], nats["val_nats"][best]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="*", help="a name, or .npz files")
    parser.add_argument("--output", default="results/vqvae2")
    parser.add_argument("--codes", type=int, default=64)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--prior-epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require("rich")
    require("matplotlib")
    with backend.distribution().scope():
        run(args)


def run(args):
    x, y = load(args.data)
    x = with_border(x)
    order = np.random.default_rng(0).permutation(len(x))
    size = len(x) // 10
    test, y_test = x[order[:size]], y[order[:size]]
    x, y = x[order[size:]], y[order[size:]]
    print(f"{len(x)} pictures for training, {size} to test: {x.shape[1:]}")

    start = time.perf_counter()
    keras.utils.set_random_seed(args.seed)
    levels = TwoLevels(x.shape[1:], args.codes, args.dim, args.hidden)
    levels.adapt(x[:1024])
    levels.model.compile(
        keras.optimizers.Adam(1e-3),
        loss="mse",
        # The reconstruction counts in units of the variance of the data.
        loss_weights=[1 / x.var()],
        metrics=["mse"],
        # Convolutions: XLA is slower than TensorFlow's own on a CPU.
        jit_compile=keras.backend.backend() == "jax",
    )
    levels.model.fit(x, x, batch_size=BATCH_SIZE, epochs=args.epochs, verbose=2)
    codes, test_codes = levels.encode(x), levels.encode(test)
    error = np.mean((levels.decode(*test_codes) - test) ** 2) / x.var()

    classes = int(y.max()) + 1
    size = {"dim": 64, "num_layers": 3, "num_heads": 4}
    shapes = [c.shape[1:] for c in codes]
    top_prior = CodePrior(
        args.codes, shapes[0], num_classes=classes, dropout=0.1, **size
    )
    # The labels of a bottom map are the codes of its top map.
    bottom_prior = CodePrior(
        args.codes,
        shapes[1],
        num_classes=args.codes,
        label_shape=shapes[0],
        dropout=0.1,
        **size,
    )
    top_nats = fit_prior(
        top_prior,
        [codes[0], y],
        [test_codes[0], y_test],
        args.prior_epochs,
    )
    bottom_nats = fit_prior(
        bottom_prior, codes[::-1], test_codes[::-1], args.prior_epochs
    )
    seconds = time.perf_counter() - start

    rows = [
        [
            name,
            "{} × {}".format(*shape),
            len(np.unique(c)) / args.codes,
            math.prod(shape) * math.log(args.codes),
            *nats,
        ]
        for name, shape, c, nats in zip(
            ("top", "bottom"),
            shapes,
            codes,
            (top_nats, bottom_nats),
            strict=True,
        )
    ]
    report.print_table(
        [
            "level",
            "codes a picture",
            "codes used",
            "nats, uniform",
            "nats, training",
            "nats, test",
        ],
        rows,
        f"test error / variance {error:.4f}; {seconds:.0f} s",
    )

    def draw(name, rows):
        path = os.path.join(args.output, f"vqvae2_{name}.png")
        rows = {key: x + 0.5 for key, x in rows.items()}
        print("wrote", report.picture_rows(path, rows))

    some = [c[:10] for c in test_codes]
    rows = {"test pictures": test[:10], "both levels": levels.decode(*some)}
    for i in range(3):
        details = bottom_prior.sample(10, labels=some[0], seed=args.seed + i)
        rows[f"details {i + 1}"] = levels.decode(some[0], details)
    draw("levels", rows)

    labels = np.tile(np.arange(classes), 5)
    top = top_prior.sample(len(labels), labels=labels, seed=args.seed)
    bottom = bottom_prior.sample(len(top), labels=top, seed=args.seed)
    new = levels.decode(top, bottom).reshape(5, classes, *x.shape[1:])
    draw("samples", {f"sample {i + 1}": row for i, row in enumerate(new)})


if __name__ == "__main__":
    main()
