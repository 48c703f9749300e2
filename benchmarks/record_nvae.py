"""Records what NVAE is worth on MNIST, seed by seed, beside plain VAEs.

    python benchmarks/record_nvae.py --data TRAIN.npz ... TEST.npz

A run trains an NVAE for about `--seconds` of the processor (of the clock on an
accelerator): its speed is measured first, and tells the number of steps, over
which the learning rate falls with a cosine; the KL terms are warmed up in the
first three tenths. After `small`, `wide`, `wider` and `mnist` two plain VAEs
follow, with one layer of latent variables and as many weights: one makes as
many steps, the other takes as many seconds. Training pictures are binarized
dynamically, test pictures once with a fixed seed. A row of
`docs/results/nvae.csv` holds the bounds of log p in nats: IWAE-k with the two
`--samples`, on the two numbers of test pictures of `--images`, and the KL term
of each group; `nvae_curve.csv` holds the training loss. The first seed leaves a
figure.

A run can be killed at any time, or ended by `--minutes`: called again, it goes
on from what stands in `--cache`, with the numbers of a run that was never
stopped. Runs with a row are not done again. `--report` writes the means over
seeds to `docs/results/nvae.md`.

Data: files with `x`, uint8 of shape (n, 28, 28), of which the last is for
testing; or one file with `x_train` and `x_test`, as Keras's `mnist.npz`.

    small, wide, wider   `mnist_small`, with twice and four times its channels
    no-residual          posteriors that are not relative to the prior
    no-spectral          λ = 0
    no-norm              no batch normalization
    rate-1e-2, rate-1e-3 learning rates
    mnist                the published preset, for an accelerator
    cifar10              12 groups and 32 channels, for an accelerator and the
                         pictures of CIFAR-10
"""

import argparse
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
        *("run", "model", "seed", "seconds", "parameters", "steps", "spent"),
        *("skipped", *BOUNDS, "samples", "images", "samples_many"),
        *("images_many", "kl", "backend"),
    ],
    key=["run", "model", "seed", "seconds"],
)
CURVE = Recording(
    ROWS.with_name("nvae_curve.csv"),
    ["run", "model", "seed", "seconds", "step", "nelbo"],
    key=["run", "model", "seed", "seconds", "step"],
)
MODELS = ["NVAE", "VAE, equal steps", "VAE, equal seconds"]
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
    "cifar10": {"groups": (12,), "channels": 32, "num_flows": 0},
}
WITH_PLAIN = ("small", "wide", "wider", "mnist")
RATES = {"rate-1e-2": 1e-2, "rate-1e-3": 1e-3}
# Steps between two saves, and pictures between two saves of an evaluation.
PIECE, ROWS_OF_PIECE = 200, 500
POINTS = 60  # of a curve in the file


class Clock:
    """Seconds spent, and whether this call has to end."""

    def __init__(self, minutes):
        from blogkeras import backend

        self.now = (
            time.perf_counter
            if backend.has_accelerator()
            else time.process_time
        )
        self.end = None if minutes is None else time.time() + 60 * minutes

    def check(self):
        if self.end is not None and time.time() > self.end:
            raise SystemExit("Time is up; call again to go on.")


def read(paths):
    """Pictures in [0, 1], `(n, height, width, channels)`."""
    files = [np.load(path) for path in paths]
    if len(files) == 1:
        parts = [files[0]["x_train"], files[0]["x_test"]]
    else:
        parts = [file["x"] for file in files]
    parts = [x.reshape(*x.shape[:3], -1).astype("float32") / 255 for x in parts]
    return np.concatenate(parts[:-1]), parts[-1]


def binarized(x):
    return (np.random.default_rng(0).random(x.shape) < x).astype("float32")


def make_plain(parameters, seed):
    """A VAE of dense layers with one layer of 64 latent variables."""
    import keras
    from keras import layers, ops

    from blogkeras.state import NumberedDraws

    latent = 64
    # 2 · 784 w for the pixels, 3 · 64 w for the latent variables, 2 w².
    half = (2 * 784 + 3 * latent) / 4
    width = int(np.sqrt(parameters / 2 + half**2) - half)

    class PlainVAE(keras.Model):
        def __init__(self):
            super().__init__()
            self.draws = NumberedDraws(self, seed)
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

        def bounds(self, x, seed):
            mean, log_scale = ops.split(self.encoder(2 * x - 1), 2, axis=-1)
            noise = keras.random.normal(ops.shape(mean), seed=seed)
            z = mean + ops.exp(log_scale) * noise
            logits = self.decoder(z)
            log_x = ops.sum(x * logits - ops.softplus(logits), axis=-1)
            log_z = ops.sum((noise**2 - z**2) / 2 + log_scale, axis=-1)
            kl = (mean**2 + ops.exp(2 * log_scale) - 1) / 2 - log_scale
            return log_x + log_z, log_x - ops.sum(kl, axis=-1)

        def call(self, x):
            x = ops.reshape(x, (ops.shape(x)[0], 784))
            seed = self.draws.next_step()
            u = keras.random.uniform(ops.shape(x), seed=seed)
            return self.bounds(ops.cast(u < x, "float32"), seed)[1]

        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            self.nelbo.update_state(-y_pred)
            return -ops.mean(y_pred)

        def evaluate_likelihood(self, x, num_samples, seed, **kwargs):
            noise = keras.random.SeedGenerator(seed)
            x = ops.convert_to_tensor(x.reshape(-1, 784), "float32")
            bound, elbo = None, 0.0
            for _ in range(num_samples):
                log_w, one = map(ops.convert_to_numpy, self.bounds(x, noise))
                bound = log_w if bound is None else np.logaddexp(bound, log_w)
                elbo = elbo + one / num_samples
            return {"elbo": elbo, "iwae": bound - np.log(num_samples)}

    model = PlainVAE()
    model.build((None, 28, 28, 1))
    return model


def make(run, name, seed, steps, args):
    """A compiled model of a run that will make so many steps."""
    import keras

    from blogkeras import NVAE, SkipNonFinite

    keras.utils.set_random_seed(seed)
    preset = run if run in ("mnist", "cifar10") else "mnist_small"
    model = NVAE.from_preset(
        preset,
        seed=seed,
        kl_warmup_steps=max(3 * steps // 10, 1),
        **RUNS[run],
    )
    if name != "NVAE":
        model = make_plain(model.config.count_parameters(), seed)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps,
        warmup_target=RATES.get(run, args.learning_rate),
        warmup_steps=max(steps // 80, 1),
        alpha=0.01,
    )
    optimizer = keras.optimizers.Adamax(
        schedule, epsilon=1e-3, weight_decay=3e-4
    )
    # XLA is slower than TensorFlow's own convolutions on a CPU.
    xla = True if keras.backend.backend() == "jax" else "auto"
    model.compile(SkipNonFinite(optimizer), jit_compile=xla)
    model.optimizer.build(model.trainable_variables)
    return model


def save_json(path, content):
    """Complete or not at all."""
    path.with_suffix(".next").write_text(json.dumps(content), "utf-8")
    path.with_suffix(".next").replace(path)


def rows_of_step(step, seed, count, batch_size):
    """Which pictures a step sees: each of them once in an epoch."""
    epoch, step = divmod(step, count // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[step * batch_size : (step + 1) * batch_size]


def planned_steps(run, name, seed, x, clock, args):
    """How many steps `--seconds` are, by the speed of a few."""
    model = make(run, name, seed, 1000, args)
    index = rows_of_step(0, seed, len(x), args.batch_size)
    # The first step is traced and compiled, which does not count. Of the plain
    # VAE's short steps there are as many as in a piece of training, since `fit`
    # itself takes time.
    measured = args.measured if name == "NVAE" else PIECE
    for count in (1, measured):
        start = clock.now()
        model.fit(
            np.tile(x[index], (count, 1, 1, 1)),
            batch_size=args.batch_size,
            verbose=0,
        )
        seconds = clock.now() - start
    return max(int(args.seconds * measured / seconds), 1)


def train(run, name, seed, x, steps, folder, clock, args):
    """The trained model, and the seconds that training took.

    `state.json` tells how far the run has come and which file has the weights
    of then; both are replaced after each piece.
    """
    path = folder / "state.json"
    if not path.exists():
        if steps is None:
            steps = planned_steps(run, name, seed, x, clock, args)
        save_json(path, {"steps": steps, "done": 0, "spent": 0, "curve": []})
    state = json.loads(path.read_text("utf-8"))
    steps, done = state["steps"], state["done"]
    model = make(run, name, seed, steps, args)
    if done:
        model.load_weights(folder / f"step-{done}.weights.h5")
    while done < steps:
        clock.check()
        stop = min(done + PIECE, steps)
        index = np.concatenate(
            [
                rows_of_step(i, seed, len(x), args.batch_size)
                for i in range(done, stop)
            ]
        )
        start = clock.now()
        logs = model.fit(
            x[index], batch_size=args.batch_size, shuffle=False, verbose=0
        ).history
        state["spent"] += clock.now() - start
        state["curve"].append([stop, round(logs["nelbo"][0], 3)])
        print(
            f"step {stop} of {steps}, {state['spent']:.0f} s, "
            f"-ELBO {logs['nelbo'][0]:.2f}",
            flush=True,
        )
        model.save_weights(folder / f"step-{stop}.weights.h5")
        state["done"] = stop
        save_json(path, state)
        (folder / f"step-{done}.weights.h5").unlink(missing_ok=True)
        done = stop
    return model, state


def bounds(model, x, num_samples, path, clock, args):
    """ELBO and IWAE-k of each picture and the KL terms, in saved pieces."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else []
    for start in range(len(found) * ROWS_OF_PIECE, len(x), ROWS_OF_PIECE):
        clock.check()
        part = x[start : start + ROWS_OF_PIECE]
        result = model.evaluate_likelihood(
            part,
            num_samples=num_samples,
            seed=start,
            per_image=True,
            batch_size=min(args.batch_size, len(part)),
        )
        found.append({k: np.asarray(v).tolist() for k, v in result.items()})
        save_json(path, found)
        print("bounds of", start + len(part), "pictures", flush=True)
    return {
        name: np.concatenate([part[name] for part in found]).mean(0)
        for name in found[0]
    }


def pictures(model, x, test, folder, seed):
    """What the page shows, as arrays: samples, interpolations, neighbours."""
    arrays = {}
    statistics = [norm.get_weights() for norm in model.norms]
    for calibrated in (False, True):
        for t in (0.6, 0.7, 0.8, 0.9, 1.0):
            if calibrated:
                model.recalibrate_batch_norm(50, t, seed=seed)
            name = f"samples_{t}{'_recalibrated' if calibrated else ''}"
            arrays[name] = model.sample(16, t, seed=seed)
    # What follows needs the statistics of the training data again.
    for norm, values in zip(model.norms, statistics, strict=True):
        norm.set_weights(values)
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


def draw(path, run):
    """A figure of `pictures`: rows of samples, then what they are like."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arrays = np.load(path)
    names = [name for name in arrays if name.startswith("samples")]
    names += ["samples_0.8_recalibrated", "nearest"]
    rows = [np.concatenate(arrays[name], axis=1) for name in names]
    columns = rows[0].shape[1] // arrays["nearest"].shape[2]
    for row in arrays["interpolations"][:4]:
        row = np.concatenate(row, axis=1)
        missing = rows[0].shape[1] - row.shape[1]
        rows.append(np.pad(row, ((0, 0), (0, missing), (0, 0))))
    picture = np.concatenate(rows)
    figure, axes = pyplot.subplots(figsize=(columns / 2, len(rows) / 2))
    axes.imshow(picture.squeeze(), cmap="gray")
    height = arrays["nearest"].shape[1]
    labels = [
        name.replace("samples_", "").replace("_", " ") for name in names[:-2]
    ]
    labels += ["0.8 recalibrated", "nearest", *["between"] * 4]
    axes.set_yticks((np.arange(len(rows)) + 0.5) * height, labels)
    axes.set_xticks([])
    figure.savefig(
        ROWS.with_name(f"nvae_{run}.png"), dpi=80, bbox_inches="tight"
    )
    pyplot.close(figure)


def thinned(curve):
    """At most `POINTS` pairs of a curve, the last one among them, as a dict."""
    every = -(-len(curve) // POINTS)
    return dict(curve[::-1][::every][::-1])


def record(args):
    import keras

    x, test = read(args.data)
    if x.shape[-1] == 1:
        test = binarized(test)
    clock = Clock(args.minutes)
    todo = RECORD.missing(
        [
            (run, name, seed, args.seconds)
            for seed in args.seeds
            for run in args.only
            for name in (MODELS if run in WITH_PLAIN else MODELS[:1])
        ]
    )
    for run, name, seed, seconds in todo:
        print(run, name, "seed", seed, flush=True)
        folder = args.cache / f"{run}-{seed}-{seconds}"
        nvae = folder / "NVAE" / "state.json"
        folder = folder / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        steps = None
        if name == "VAE, equal steps":
            steps = json.loads(nvae.read_text("utf-8"))["steps"]
        model, state = train(run, name, seed, x, steps, folder, clock, args)
        found = []
        for k, n in zip(args.samples, args.images, strict=True):
            path = folder / f"iwae-{k}-{n}.json"
            found.append(bounds(model, test[:n], k, path, clock, args))
        if name == "NVAE":
            if model.norms:
                pictures(model, x, test, folder, seed)
                if seed == 0:
                    draw(folder / "pictures.npz", run)
        values = thinned(state["curve"])
        points = [(run, name, seed, seconds, step) for step in values]
        for point in CURVE.missing(points):
            CURVE.append(*point, values[point[-1]])
        parameters = sum(
            int(np.prod(v.shape)) for v in model.trainable_variables
        )
        best = found[0]["elbo"], found[0]["iwae"], found[1]["iwae"]
        RECORD.append(
            *(run, name, seed, seconds, parameters, state["steps"]),
            f"{state['spent']:.0f}",
            int(model.optimizer.skipped),
            *(f"{value:.3f}" for value in best),
            *(args.samples[0], args.images[0]),
            *(args.samples[1], args.images[1]),
            " ".join(f"{kl:.2f}" for kl in found[0].get("kl", ())),
            keras.backend.backend(),
        )


def report():
    """Writes the page: means over seeds, and the differences to the VAEs."""
    from harness import page

    groups = {}
    for row in RECORD.rows():
        key = row["run"], row["seconds"]
        groups.setdefault(key, {}).setdefault(row["model"], {})[row["seed"]] = (
            row
        )
    lines = ["# What NVAE is worth on MNIST (post 7574)", ""]
    lines += [" ".join(__doc__.split("\n\n")[2].split()), ""]
    lines += [
        page.environment(["keras", "tensorflow", "jax"])
        + ". Intervals of 95 % over seeds, where there are several.",
        "",
    ]
    rows = []
    for (run, seconds), models in groups.items():
        for name in MODELS:
            runs = dict(sorted(models.get(name, {}).items()))
            if not runs:
                continue
            one = next(iter(runs.values()))
            cells = [run, name, seconds]
            spent = np.mean([int(row["spent"]) for row in runs.values()])
            cells += [f"{spent:.0f}", ", ".join(runs), one["parameters"]]
            cells.append(", ".join(row["steps"] for row in runs.values()))
            cells.append(sum(int(row["skipped"]) for row in runs.values()))
            cells.append(f"{one['images']} and {one['images_many']}")
            for bound in BOUNDS:
                values = [float(row[bound]) for row in runs.values()]
                cells.append(page.interval(*mean_interval(values), digits=1))
            nvae = models.get("NVAE", {})
            pairs = [
                float(nvae[seed]["iwae"]) - float(runs[seed]["iwae"])
                for seed in runs.keys() & nvae.keys()
                if name != "NVAE"
            ]
            cells.append(
                page.interval(*mean_interval(pairs), digits=1, sign=True)
                if pairs
                else ""
            )
            rows.append(cells)
    samples = {(row["samples"], row["samples_many"]) for row in RECORD.rows()}
    for few, many in sorted(samples):
        lines += [
            f"ELBO and IWAE-{few} are of the first number of test pictures, "
            f"IWAE-{many} of the second.",
            "",
        ]
    lines += page.table(
        [
            *("run", "model", "seconds planned", "spent", "seeds"),
            *("parameters", "steps"),
            *("steps skipped", "pictures"),
            *("ELBO", "IWAE", "IWAE, more samples"),
            "NVAE's IWAE less this",
        ],
        rows,
    )
    for path in sorted(ROWS.parent.glob("nvae_*.png")):
        run = path.stem.removeprefix("nvae_")
        lines += [
            "",
            f"`{run}`, seed 0: samples at five temperatures, from the same "
            "noise, before and after recalibration; samples and the nearest "
            "training pictures; interpolations between pairs of test pictures.",
            "",
            f"![samples, nearest pictures, interpolations]({path.name})",
        ]
    page.write(PAGE, lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", help=".npz files")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=["small"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=int, default=7200)
    parser.add_argument("--minutes", type=float, help="of this call, at most")
    parser.add_argument(
        "--measured", type=int, default=30, help="steps that tell the speed"
    )
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--samples", type=int, nargs=2, default=[100, 1000])
    parser.add_argument("--images", type=int, nargs=2, default=[10000, 1000])
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("results/nvae")
    )
    parser.add_argument("--report", action="store_true", help="write the page")
    args = parser.parse_args()
    if args.report:
        return report()
    if not args.data:
        raise SystemExit("Give the pictures with --data")
    return record(args)


if __name__ == "__main__":
    main()
