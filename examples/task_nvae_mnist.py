"""NVAE on MNIST, binarized dynamically; goes on where it was interrupted.

Each epoch saves the model and adds a row to `curve.csv` in `--output`; a run
that finds them there continues, with the numbers of a run that was never
stopped. At the end: bounds of log p on the test pictures, binarized once by
`--seed`, and as `nvae_mnist_*.png`:

    curve           −ELBO in training, by epoch
    samples         new digits at temperatures 0.6, 0.8 and 1, a row each, with
                    batch statistics recalibrated for each
    interpolations  between two test pictures
    nearest         new digits, and below them the nearest training pictures

Data: keras.datasets, which downloads it; or `--data FILE ...`, .npz files with
`x`, (n, 28, 28) of uint8, of which the last file is for testing.

`--preset mnist` is the published model: 7.6 GFLOP a picture, for accelerators.
`mnist_small` (378 thousand weights) takes hours on a CPU, `--width 4` halves
the channels.

Blog: 强大的NVAE：以后再也不能说VAE生成的图像模糊了,
https://kexue.fm/archives/7574

Run: python examples/task_nvae_mnist.py --data train.npz test.npz
"""

import argparse
import csv
import json
import math
import pathlib

import keras
import numpy as np

from blogkeras import NVAE, SkipNonFinite, report
from blogkeras.extras import require


def load(paths):
    """Pictures in [0, 1], to train on and to test, `(n, 28, 28, 1)`."""
    if paths:
        parts = [np.load(path)["x"] for path in paths]
        if len(parts) < 2:
            raise SystemExit("Give at least two files: the last is for testing")
        train, test = np.concatenate(parts[:-1]), parts[-1]
    else:
        (train, _), (test, _) = keras.datasets.mnist.load_data()
    return tuple(
        (x.reshape(-1, 28, 28, 1) / 255).astype("float32")
        for x in (train, test)
    )


def make_model(args, steps):
    changes = {} if args.width is None else {"channels": args.width}
    keras.utils.set_random_seed(args.seed)
    model = NVAE.from_preset(
        args.preset,
        seed=args.seed,
        kl_warmup_steps=max(3 * steps // 10, 1),
        **changes,
    )
    warmup = max(steps // 80, 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - warmup,
        warmup_target=args.learning_rate,
        warmup_steps=warmup,
        alpha=0.01,
    )
    optimizer = keras.optimizers.Adamax(
        schedule, epsilon=1e-3, weight_decay=3e-4
    )
    model.compile(
        SkipNonFinite(optimizer),
        # XLA is slower than TensorFlow's own convolutions on a CPU.
        jit_compile="auto" if keras.backend.backend() != "jax" else True,
    )
    return model


def read_curve(path):
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def keep_settings(args, path, goes_on):
    """Writes what a run depends on; a run that goes on must have the same."""
    others = ("data", "output", "samples")
    settings = {k: v for k, v in vars(args).items() if k not in others}
    if goes_on and path.exists():
        before = json.loads(path.read_text("utf-8"))
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            raise SystemExit(
                f"The run in {path.parent} would go on, and had others for "
                f"{', '.join(changed)}. Give a new run another --output."
            )
    path.write_text(json.dumps(settings), "utf-8")


def train(args, x):
    """The trained model and the rows of its curve."""
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    saved, curve = output / "model.keras", output / "curve.csv"
    keep_settings(args, output / "settings.json", saved.exists())
    next_curve = output / "next.csv"
    # Whole batches: a compiled step sees one shape.
    x = x[: len(x) // args.batch_size * args.batch_size]
    steps = len(x) // args.batch_size
    rows = read_curve(curve)
    if saved.exists():
        model = keras.saving.load_model(saved)
        done = int(model.draws.iterations) // steps
        rows = rows[:done]
        print(f"goes on after epoch {done}")
    else:
        model, rows, done = make_model(args, steps * args.epochs), [], 0
    for epoch in range(done, args.epochs):
        order = np.random.default_rng((args.seed, epoch)).permutation(len(x))
        logs = model.fit(
            x[order], batch_size=args.batch_size, shuffle=False, verbose=2
        ).history
        rows.append(
            {
                "epoch": epoch + 1,
                **{k: f"{v[0]:.4f}" for k, v in logs.items()},
                "skipped": int(model.optimizer.skipped),
            }
        )
        # The curve first. If the run is ended before the model is there, the
        # count of steps of the one before says which rows are true.
        with next_curve.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        next_curve.replace(curve)
        model.save(output / "next.keras")
        (output / "next.keras").replace(saved)
    return model, rows


def nearest(pictures, x):
    """Of each picture the nearest in `x`, by Euclidean distance."""
    flat, others = (a.reshape(len(a), -1) for a in (pictures, x))
    squares = (others**2).sum(1) - 2 * flat @ others.T
    return x[squares.argmin(1)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="*", help=".npz files")
    parser.add_argument("--preset", default="mnist_small")
    parser.add_argument("--width", type=int, help="channels of the stem")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--samples", type=int, default=10, help="k of IWAE-k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/nvae_mnist")
    args = parser.parse_args()
    require("rich")
    require("matplotlib")
    x, test = load(args.data)
    print(f"{len(x)} pictures for training, {len(test)} to test")
    model, rows = train(args, x)

    test = (np.random.default_rng(args.seed).random(test.shape) < test) * 1.0
    found = model.evaluate_likelihood(
        test, args.samples, batch_size=args.batch_size, verbose=1
    )
    report.print_table(
        ["bound", "nats", "bits per dimension"],
        [
            ["ELBO", found["elbo"], found["elbo_bits_per_dim"]],
            [
                f"IWAE-{args.samples}",
                found["iwae"],
                found["iwae_bits_per_dim"],
            ],
        ],
    )
    print("KL of the groups:", found["kl"].round(2), "nats")

    def path(name):
        return pathlib.Path(args.output) / f"nvae_mnist_{name}.png"

    losses = [float(row["nelbo"]) for row in rows]
    if all(map(math.isfinite, losses)):
        print(
            "wrote",
            report.line_figure(
                path("curve"),
                range(1, len(rows) + 1),
                {args.preset: losses},
                "epoch",
                "−ELBO in training (nats)",
            ),
        )
    between = model.interpolate(test[:4], test[4:8], 10)
    rows = {f"pair {i}": row for i, row in enumerate(between, start=1)}
    print("wrote", report.picture_rows(path("interpolations"), rows))
    rows = {}
    for temperature in (0.6, 0.8, 1.0):
        model.recalibrate_batch_norm(50, temperature, seed=args.seed)
        drawn = model.sample(10, temperature, seed=args.seed)
        rows[f"t = {temperature}"] = drawn
    print("wrote", report.picture_rows(path("samples"), rows))
    new = rows["t = 0.8"]
    rows = {"new, t = 0.8": new, "nearest": nearest(new, x)}
    print("wrote", report.picture_rows(path("nearest"), rows))


if __name__ == "__main__":
    main()
