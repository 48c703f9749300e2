"""Pictures to codes and back, and new pictures from new codes.

A VQ-VAE learns to write each picture as a map of a few integers. A prior
(PixelAtt, the post's causal self-attention) then learns which maps there are,
for each class, and draws new ones. Written to `--output`, as `vqvae_*.png`:

    reconstructions   pictures; through the autoencoder without quantization;
                      with quantization
    samples           drawn from the prior, one column for each class
    interpolations    between two pictures, mixed before quantization
    codebook          share of codes used, by epoch: as configured, and by plain
                      moving averages without k-means and restarts
    completions       with `--complete`: test pictures; what of them is known,
                      the upper half; three lower halves that the prior draws
                      for it

Data: the 1797 handwritten digits (8×8, doubled to 16×16) inside scikit-learn.
`--data mnist` or `--data cifar10` takes those of keras.datasets;
`--data FILE ...` takes .npz files with `x`, (n, height, width[, channels]) of
uint8, and `y`, classes from 0.

On all devices that there are: a CPU, one GPU or several, a TPU (not tried on
one; docs/scaling.md).

Blog: VQ-VAE的简明介绍：量子化自编码器, https://kexue.fm/archives/6760

Result (defaults, 1618 digits for training and 179 to test; Keras 3.15.1,
TensorFlow 2.21, one run each):

    codebook                test error / variance   perplexity   codes used
    plain averages          0.0376                  34.3         0.70
    k-means and restarts    0.0294                  53.2         1.00

The prior is best after 14 epochs: 38.3 nats a training picture, 44.0 nats a
test picture. (After 60 epochs it had 25.1 nats a training picture: it knew them
by heart.)

Run: python examples/task_vqvae.py
"""

import argparse
import os
import time

import keras
import numpy as np

from blogkeras import VQVAE, CodePrior, VectorQuantizer, backend, report
from blogkeras.extras import require
from blogkeras.quantization import sonnet_autoencoder

BATCH_SIZE = 64


def load(data):
    """Pictures in [-½, ½], (n, height, width, channels), and classes."""
    if not data:
        x, y = require("sklearn.datasets").load_digits(return_X_y=True)
        x = np.kron(x.reshape(-1, 8, 8) / 16, np.ones((2, 2)))
    elif data[0] in ("mnist", "cifar10"):
        x, y = getattr(keras.datasets, data[0]).load_data()[0]
        x = x / 255
    else:
        files = [np.load(path) for path in data]
        x = np.concatenate([file["x"] for file in files]) / 255
        y = np.concatenate([file["y"] for file in files])
    x = x.reshape(*x.shape[:3], -1).astype("float32") - 0.5
    return x, y.reshape(-1).astype("int32")


def make_model(x, args, prevent_collapse=True):
    keras.utils.set_random_seed(args.seed)
    quantizer = VectorQuantizer(
        args.codes,
        ema_decay=0.99,
        restart_threshold=0.1 if prevent_collapse else 0.0,
    )
    encoder, decoder = sonnet_autoencoder(
        x.shape[1:], dim=args.dim, hidden=args.hidden
    )
    model = VQVAE(encoder, quantizer, decoder)
    # The reconstruction counts in units of the variance of the data.
    model.compile(
        keras.optimizers.Adam(1e-3),
        loss_weights=[1 / x.var()],
        metrics=["mse"],
        # Convolutions: XLA is slower than TensorFlow's own on a CPU.
        jit_compile=keras.backend.backend() == "jax",
    )
    if prevent_collapse:
        model.adapt(x[:1024])
    return model


def completions(model, prior, images, labels, seed):
    """Rows of pictures: the given ones, what is known, three completions."""
    known = np.array(model.encode(images))
    half = known.shape[1] // 2
    # Codes beside the border have seen some rows of pixels beyond it.
    known[:, half:] = -1
    upper = images.copy()
    upper[:, images.shape[1] * half // known.shape[1] :] = 0
    rows = {"test pictures": images, "known": upper}
    for i in range(3):
        codes = prior.sample(
            len(images), labels=labels, seed=seed + i, known=known
        )
        rows[f"completion {i + 1}"] = model.decode(codes)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="*", help="a name, or .npz files")
    parser.add_argument("--output", default="results/vqvae")
    parser.add_argument("--codes", type=int, default=64)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--prior-epochs", type=int, default=60)
    parser.add_argument(
        "--complete", action="store_true", help="draw lower halves of pictures"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require("rich")
    require("matplotlib")
    with backend.distribution().scope():
        run(args)


def run(args):
    x, y = load(args.data)
    order = np.random.default_rng(0).permutation(len(x))
    size = len(x) // 10
    test, y_test = x[order[:size]], y[order[:size]]
    x, y = x[order[size:]], y[order[size:]]
    print(f"{len(x)} pictures for training, {size} to test: {x.shape[1:]}")

    start = time.perf_counter()
    usage, rows = {}, []
    for name in ("plain averages", "k-means and restarts"):
        model = make_model(x, args, name != "plain averages")
        history = model.fit(
            x, batch_size=BATCH_SIZE, epochs=args.epochs, verbose=2
        ).history
        usage[name] = history["usage"]
        logs = model.evaluate(
            test, batch_size=BATCH_SIZE, verbose=0, return_dict=True
        )
        rows.append(
            [name, logs["mse"] / x.var(), logs["perplexity"], usage[name][-1]]
        )
    seconds = time.perf_counter() - start

    codes = model.encode(x, verbose=1)
    prior = CodePrior(
        args.codes,
        codes.shape[1:],
        num_classes=int(y.max()) + 1,
        dim=64,
        num_layers=3,
        num_heads=4,
    )
    # On several devices TensorFlow trains without XLA.
    xla = backend.num_replicas() == 1 or "auto"
    prior.compile(keras.optimizers.Adam(1e-3), jit_compile=xla)
    # Whole batches only: a compiled step sees one shape.
    whole = len(x) // BATCH_SIZE * BATCH_SIZE
    nats = prior.fit(
        [codes[:whole], y[:whole]],
        validation_data=([model.encode(test), y_test],),
        batch_size=BATCH_SIZE,
        epochs=args.prior_epochs,
        # A prior soon knows a small training set by heart. What it draws then
        # are maps that it has seen.
        callbacks=[
            keras.callbacks.EarlyStopping(
                "val_nats", mode="min", patience=5, restore_best_weights=True
            )
        ],
        verbose=2,
    ).history

    report.print_table(
        ["codebook", "test error / variance", "perplexity", "codes used"],
        rows,
        f"{args.codes} codes, {seconds / 2:.0f} s each",
    )
    best = int(np.argmin(nats["val_nats"]))
    print(
        f"prior: after {best + 1} epochs {nats['nats'][best]:.1f} nats a "
        f"training picture, {nats['val_nats'][best]:.1f} nats a test picture"
    )

    def path(name):
        return os.path.join(args.output, f"vqvae_{name}.png")

    def draw(name, rows):
        rows = {key: x + 0.5 for key, x in rows.items()}
        print("wrote", report.picture_rows(path(name), rows))

    some = test[:10]
    draw(
        "reconstructions",
        {
            "test pictures": some,
            "without quantization": model.reconstruct(some, False),
            "with quantization": model.reconstruct(some),
        },
    )
    classes = int(y.max()) + 1
    labels = np.tile(np.arange(classes), 5)
    drawn = prior.sample(len(labels), labels=labels, seed=args.seed)
    new = model.decode(drawn).reshape(5, classes, *x.shape[1:])
    draw("samples", {f"sample {i + 1}": row for i, row in enumerate(new)})
    if args.complete:
        draw(
            "completions",
            completions(model, prior, some, y_test[:10], args.seed),
        )
    mixed = model.interpolate(test[:5], test[5:10], 10)
    draw(
        "interpolations", {f"pair {i + 1}": row for i, row in enumerate(mixed)}
    )
    epochs = range(1, args.epochs + 1)
    print(
        "wrote",
        report.line_figure(
            path("codebook"), epochs, usage, "epoch", "share of codes used"
        ),
    )


if __name__ == "__main__":
    main()
