"""Records what NVAE is worth on MNIST, seed by seed, beside a plain VAE.

    python benchmarks/record_nvae.py --data TRAIN.npz ... TEST.npz

Pictures of uint8, `x` of shape (n, 28, 28), binarized dynamically in training,
the test pictures once with a fixed seed. A run trains one model for
`--seconds` of the processor (of the clock on an accelerator), saves it with its
curve in `--cache` and appends a row to `docs/results/nvae.csv`: bounds in nats
on the test pictures, IWAE-100 on all of them and IWAE-1000 on the first 1000
(`--samples`). An interrupted training goes on from its last epoch; runs that
stand there are not done again. `--report` writes the means over seeds to
`docs/results/nvae.md`. Each NVAE is followed by a plain VAE with one layer of
latent variables, of equal weights and equal seconds.

    small, wide, wider   `mnist_small`, with twice and four times its channels
    no-residual          posteriors that are not relative to the prior
    no-spectral          λ = 0
    no-norm              no batch normalization
    rate-1e-2, rate-1e-3 learning rates
    mnist                the published preset, for an accelerator

The warm-up of the KL terms takes three tenths of the steps that `--steps`
promises; the rate falls with a cosine over them.
"""

import argparse
import csv
import json
import pathlib
import time

import numpy as np
from harness.recording import Recording
from harness.statistics import mean_interval

ROWS = pathlib.Path(__file__).parent.parent / "docs/results/nvae.csv"
PAGE = ROWS.with_suffix(".md")
BOUNDS = ["elbo", "iwae", "iwae_many"]
RECORD = Recording(
    ROWS,
    [
        *("run", "model", "seed", "seconds", "parameters", "epochs", "steps"),
        *("skipped", *BOUNDS, "samples", "samples_many"),
    ],
    key=["run", "model", "seed", "seconds"],
)
RUNS = {
    "small": {},
    "wide": {"channels": 16},
    "wider": {"channels": 32},
    "no-residual": {"residual_posterior": False},
    "no-spectral": {"spectral_weight": 0.0},
    "no-norm": {"batch_norm": False},
    "rate-1e-2": {},
    "rate-1e-3": {},
    "mnist": {},
}
RATES = {"rate-1e-2": 1e-2, "rate-1e-3": 1e-3}


def read(paths):
    parts = [np.load(path)["x"] for path in paths]
    x = [p.reshape(-1, 28, 28, 1).astype("float32") / 255 for p in parts]
    train, test = np.concatenate(x[:-1]), x[-1]
    return train, (np.random.default_rng(0).random(test.shape) < test) * 1.0


def make_plain(parameters, seed):
    """A VAE of dense layers with one layer of 64 latent variables."""
    import keras
    from keras import layers, ops

    latent = 64
    # 2 · 784 w for the pixels, 3 · 64 w for the latent variables, 2 w².
    half = (2 * 784 + 3 * latent) / 4
    width = int(np.sqrt(parameters / 2 + half**2) - half)

    class PlainVAE(keras.Model):
        def __init__(self):
            super().__init__()
            self.noise = keras.random.SeedGenerator(seed)
            self.encoder, self.decoder = (
                keras.Sequential(
                    [
                        keras.Input((inputs,)),
                        layers.Dense(width, "swish"),
                        layers.Dense(width, "swish"),
                        layers.Dense(outputs),
                    ]
                )
                for inputs, outputs in ((784, 2 * latent), (latent, 784))
            )
            self.nelbo = keras.metrics.Mean(name="nelbo")

        def bounds(self, x):
            mean, log_scale = ops.split(self.encoder(2 * x - 1), 2, axis=-1)
            noise = keras.random.normal(ops.shape(mean), seed=self.noise)
            z = mean + ops.exp(log_scale) * noise
            logits = self.decoder(z)
            log_x = ops.sum(x * logits - ops.softplus(logits), axis=-1)
            log_z = ops.sum((noise**2 - z**2) / 2 + log_scale, axis=-1)
            kl = (mean**2 + ops.exp(2 * log_scale) - 1) / 2 - log_scale
            return log_x + log_z, log_x - ops.sum(kl, axis=-1)

        def call(self, x):
            x = ops.reshape(x, (ops.shape(x)[0], 784))
            u = keras.random.uniform(ops.shape(x), seed=self.noise)
            return self.bounds(ops.cast(u < x, "float32"))[1]

        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            self.nelbo.update_state(-y_pred)
            return -ops.mean(y_pred)

        def evaluate_likelihood(self, x, num_samples, batch_size, **kwargs):
            totals = []
            for start in range(0, len(x), batch_size):
                rows = x[start : start + batch_size].reshape(-1, 784)
                rows = ops.convert_to_tensor(rows, "float32")
                bound, elbo = None, 0.0
                for _ in range(num_samples):
                    log_w, one = map(ops.convert_to_numpy, self.bounds(rows))
                    bound = (
                        log_w if bound is None else np.logaddexp(bound, log_w)
                    )
                    elbo = elbo + one / num_samples
                totals.append([elbo, bound - np.log(num_samples)])
            elbo, iwae = np.concatenate(totals, axis=1).mean(1)
            return {"elbo": float(elbo), "iwae": float(iwae)}

    model = PlainVAE()
    model.build((None, 28, 28, 1))
    return model


def make(run, kind, seed, args):
    """A compiled model of a run."""
    import keras

    from blogkeras import NVAE, SkipNonFinite

    keras.utils.set_random_seed(seed)
    preset = "mnist" if run == "mnist" else "mnist_small"
    model = NVAE.from_preset(
        preset,
        seed=seed,
        kl_warmup_steps=max(3 * args.steps // 10, 1),
        **RUNS[run],
    )
    if kind == "plain VAE":
        model = make_plain(model.config.count_parameters(), seed)
    rate = RATES.get(run, args.learning_rate)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        args.steps,
        warmup_target=rate,
        warmup_steps=max(args.steps // 80, 1),
        alpha=0.01,
    )
    optimizer = keras.optimizers.Adamax(
        schedule, epsilon=1e-3, weight_decay=3e-4
    )
    # XLA is slower than TensorFlow's own convolutions on a CPU.
    xla = True if keras.backend.backend() == "jax" else "auto"
    model.compile(SkipNonFinite(optimizer), jit_compile=xla)
    return model


def train(run, kind, seed, x, args):
    """The trained model, epochs, and its folder."""
    from blogkeras import backend

    now = time.perf_counter if backend.has_accelerator() else time.process_time
    folder = args.cache / f"{run}-{kind.replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    model = make(run, kind, seed, args)
    model.optimizer.build(model.trainable_variables)
    weights, state = folder / "model.weights.h5", folder / "state.json"
    spent, epoch = 0.0, 0
    if weights.exists() and state.exists():
        model.load_weights(weights)
        spent, epoch = json.loads(state.read_text("utf-8"))
    steps = len(x) // args.batch_size
    while spent < args.seconds and epoch * steps < args.steps:
        order = np.random.default_rng((seed, epoch)).permutation(len(x))
        order = order[: steps * args.batch_size]
        start = now()
        logs = model.fit(
            x[order], batch_size=args.batch_size, shuffle=False, verbose=2
        ).history
        spent, epoch = spent + now() - start, epoch + 1
        with (folder / "curve.csv").open("a", newline="") as file:
            csv.writer(file).writerow(
                [epoch, f"{spent:.0f}", f"{logs['nelbo'][0]:.3f}"]
            )
        model.save_weights(folder / "next.weights.h5")
        (folder / "next.weights.h5").replace(weights)
        state.write_text(json.dumps([spent, epoch]), "utf-8")
    return model, epoch, folder


def pictures(model, x, test, folder, seed):
    """What the page shows, as arrays: samples, interpolations, neighbours."""
    arrays = {}
    for calibrated in (False, True):
        for t in (0.6, 0.7, 0.8, 0.9, 1.0):
            if calibrated:
                model.recalibrate_batch_norm(50, t, seed=seed)
            name = f"samples_{t}{'_recalibrated' if calibrated else ''}"
            arrays[name] = model.sample(16, t, seed=seed)
    arrays["interpolations"] = model.interpolate(test[:8], test[8:16], 10)
    new = arrays["samples_0.8_recalibrated"]
    distances = (x.reshape(len(x), -1) ** 2).sum(1) - 2 * (
        new.reshape(len(new), -1) @ x.reshape(len(x), -1).T
    )
    arrays["nearest"] = x[distances.argmin(1)]
    np.savez_compressed(
        folder / "pictures.npz",
        **{k: np.uint8(255 * v) for k, v in arrays.items()},
    )


def record(args):
    x, test = read(args.data)
    kinds = ["NVAE", "plain VAE"]
    todo = RECORD.missing(
        [
            (run, kind, seed, args.seconds)
            for seed in range(args.seeds)
            for run in args.only
            for kind in kinds
        ]
    )
    many = test[: args.many]
    for run, kind, seed, seconds in todo:
        print(run, kind, "seed", seed, flush=True)
        model, epochs, folder = train(run, kind, seed, x, args)
        few, much = args.samples
        options = {"batch_size": args.batch_size, "verbose": 2}
        found = model.evaluate_likelihood(test, few, **options)
        best = model.evaluate_likelihood(many, much, **options)["iwae"]
        if kind == "NVAE":
            kl = [round(float(value), 3) for value in found["kl"]]
            (folder / "kl.json").write_text(json.dumps(kl), "utf-8")
            norms = RUNS[run].get("batch_norm", True)
            if norms:
                pictures(model, x, test, folder, seed)
        parameters = sum(
            int(np.prod(v.shape)) for v in model.trainable_variables
        )
        RECORD.append(
            *(run, kind, seed, seconds, parameters, epochs),
            epochs * (len(x) // args.batch_size),
            int(model.optimizer.skipped),
            *(f"{v:.3f}" for v in (found["elbo"], found["iwae"], best)),
            *args.samples,
        )


def report():
    """Writes the page: means over seeds, and the difference to the VAE."""
    from harness import page

    groups = {}
    for row in RECORD.rows():
        key = row["run"], row["seconds"]
        groups.setdefault(key, {}).setdefault(row["model"], {})[row["seed"]] = (
            row
        )
    lines = ["# What NVAE is worth on MNIST (post 7574)", ""]
    lines += [" ".join(__doc__.split("\n\n")[2].split()), ""]
    rows = []
    for (run, seconds), models in groups.items():
        for name, runs in models.items():
            cells = [run, name, seconds, len(runs)]
            cells.append(next(iter(runs.values()))["parameters"])
            for bound in BOUNDS:
                values = [float(row[bound]) for row in runs.values()]
                cells.append(page.interval(*mean_interval(values), digits=1))
            plain = models.get("plain VAE", {})
            pairs = [
                float(runs[seed]["iwae"]) - float(plain[seed]["iwae"])
                for seed in runs.keys() & plain.keys()
                if name != "plain VAE"
            ]
            cells.append(
                page.interval(*mean_interval(pairs), digits=1, sign=True)
                if pairs
                else ""
            )
            rows.append(cells)
    lines += page.table(
        [
            *("run", "model", "seconds", "seeds", "parameters", "ELBO"),
            *("IWAE", "IWAE, more samples", "IWAE less the VAE's"),
        ],
        rows,
    )
    page.write(PAGE, lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", help="the last file: for testing")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=["small"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=7200)
    parser.add_argument("--steps", type=int, default=16_000, help="at most")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--samples", type=int, nargs=2, default=[100, 1000])
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("results/nvae")
    )
    parser.add_argument("--report", action="store_true", help="write the page")
    args = parser.parse_args()
    if args.report:
        return report()
    if not args.data or len(args.data) < 2:
        raise SystemExit("Give at least two files with --data")
    return record(args)


if __name__ == "__main__":
    main()
