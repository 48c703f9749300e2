"""Records what the methods of post 7038 are worth, run by run.

    python benchmarks/record_denoising.py [--tasks NAME ...] [--seeds 3]
    python benchmarks/record_denoising.py --data mnist.npz --tasks pictures
    python benchmarks/record_denoising.py --report

Each run adds a row to `docs/results/denoising.csv`; runs that stand there are
not done again, so an interrupted recording goes on. A run of many minutes saves
its model now and then to `--checkpoints` and goes on from there. With
`--minutes N` no run is started that would end later, if it takes as long as the
longest before it. `--report` writes the means to `docs/results/denoising.md`.
With a CUDA card, set KERAS_BACKEND=jax.

    plane      four sets, σ = 0.1, 4 × 64, batch 512: "annealed", "one" (one
               σ), "conditional" (a network of x and σ, ten σ). Excess of the
               loss over its floor per dimension, and the normalized mean
               log-density less the truth.
    generator  four sets; steps of the density to steps of the generator 1:1,
               5:1 and 1:5, and "data", which is the data in the place of the
               generator's samples: the best that the measures can give. Modes
               and the share farthest from its due (eight Gaussians), KL(q̂‖p̂)
               with q̂ by kernels, MMD.
    published  "two_spirals" by the network of the paper's notebook (702,762
               parameters, batch 2048, five steps of the density to one of the
               generator), then "ours", the generator of 4 × 64, 1:1, for as
               many seconds. KL and MMD of the generator.
    variate    eight Gaussians and rings at σ = 0.03, annealed, with and without
               the control variate in the training loss: excess per dimension,
               with the exact score by differences of the exact log-density.
    pictures   `--data FILE.npz` (`x` of uint8, `y`), or scikit-learn's digits:
               an energy of many σ, not trained on the class 9. The loss, also
               on its way (`denoising_curve.csv`), the error of in-painting,
               and the area under the curve of the anomaly score for class 9.
               Seed 0 leaves pictures, `denoising_<data>.png`.
"""

import argparse
import functools
import pathlib
import time

import numpy as np
from harness.page import environment, interval, table, write
from harness.recording import Recording
from harness.statistics import mean_interval

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/denoising.csv"
KEY = ["task", "data", "method", "seed", "steps"]
MEASURES = [
    "excess",
    "excess_error",
    "likelihood_gap",
    "log_z",
    "modes",
    "worst_share",
    "kl",
    "mmd",
    "loss",
    "inpainting_error",
    "auc",
]
COLUMNS = [*KEY, *MEASURES, "parameters", "cpu_seconds", "seconds", "device"]
SIGMA = 0.1
# Floor of ‖s + ε/σ²‖² per dimension and mean log p̂ at σ = 0.1: 16 million
# draws under a blurred histogram.
TRUTH = {
    "eight_gaussians": (92.91, -2.905),
    "two_spirals": (78.23, -2.941),
    "checkerboard": (91.67, -3.639),
    "rings": (71.78, -3.085),
}
METHODS = {
    "plane": ["annealed", "one", "conditional"],
    "generator": ["1:1", "5:1", "1:5", "data"],
    "published": ["5:1", "ours"],
    "variate": ["with", "without"],
    "pictures": ["annealed score matching"],
}
DATA = {"published": ["two_spirals"], "variate": ["eight_gaussians", "rings"]}
# Of the density, and again of the generator.
STEPS = {"pictures": 3000, "published": 12_000}
SAVE_EVERY = 300  # seconds between two checkpoints of a run


def optimizer(steps, rate=2e-3):
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    momentum = 0.999 if steps > 10_000 else 0.99
    return keras.optimizers.Adam(schedule, use_ema=True, ema_momentum=momentum)


def fit(model, x, steps, batch_size, file, per_epoch=500, at_epoch=None):
    """Trains for `steps` steps; returns the model, which may be a loaded one.

    Args:
        x: An array; `None` where `fit` draws its own data.
        file: Path of a `.keras` file. Where it exists, training goes on from
            it; it is removed in the end.
        per_epoch: Integer. Steps in an epoch.
        at_epoch: Function `(step, logs)` called after each epoch.
    """
    import keras

    per_epoch = min(steps, per_epoch)
    start = 0
    if file.exists():
        model = keras.saving.load_model(file)
        start = int(model.draws.iterations.numpy()) // per_epoch
        print("going on from step", start * per_epoch, flush=True)
    last = time.perf_counter()

    def end_epoch(epoch, logs):
        nonlocal last
        if at_epoch is not None:
            at_epoch((epoch + 1) * per_epoch, logs)
        if time.perf_counter() - last > SAVE_EVERY:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name("new_" + file.name)
            model.save(new)
            new.replace(file)
            last = time.perf_counter()

    if x is None:
        data = {"steps_per_epoch": per_epoch}
    else:
        rows = per_epoch * batch_size
        data = {"x": np.resize(x, (rows, *x.shape[1:]))}
    model.fit(
        **data,
        batch_size=batch_size,
        epochs=max(steps // per_epoch, 1),
        initial_epoch=start,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=end_epoch)],
    )
    file.unlink(missing_ok=True)
    return model


@functools.lru_cache(1)
def density(folder, name, method, seed, steps, sigma=SIGMA, notebook=False):
    """A trained model of log p̂ of one of the sets; checkpoints in `folder`."""
    import keras
    from keras import layers

    from blogkeras import (
        AnnealedScoreMatching,
        DenoisingDensityEstimator,
        mlp_log_density,
        toy_densities,
    )

    keras.utils.set_random_seed(seed)
    batch_size = 2048 if notebook else 512
    x = getattr(toy_densities, name).sample(512 * 1000, seed=seed)
    units = (64,) * 4
    if method == "conditional":
        rows, noise = keras.Input((2,)), keras.Input((1,))
        h = layers.Concatenate()([rows, keras.ops.log(noise)])
        for size in units:
            h = layers.Dense(size, "swish")(h)
        # The quadratic term that the estimator adds by itself.
        square = keras.ops.sum(keras.ops.square(rows), -1, keepdims=True)
        value = layers.Dense(1)(h) - square / 8
        model = AnnealedScoreMatching(
            keras.Model([rows, noise], value),
            np.geomspace(sigma, 2.0, 10),
            sigma,
            conditional=True,
            seed=seed,
        )
    else:
        model = DenoisingDensityEstimator(
            published_network() if notebook else mlp_log_density((2,), units),
            sigma,
            annealing_steps=0 if method == "one" else "auto",
            control_variate=method == "with",
            seed=seed,
        )
    model.compile(
        optimizer(steps), jit_compile=True, steps_per_execution=min(50, steps)
    )
    kind = "density_notebook" if notebook else f"density_{method}"
    file = folder / f"{kind}_{name}_{sigma}_{seed}_{steps}.keras"
    return fit(model, x, steps, batch_size, file)


def published_network():
    """The notebook's: 1024-512-256-128-64-32-10, tanh; ten outputs, summed."""
    import keras
    from keras import layers

    inputs = keras.Input((2,))
    h = inputs
    for size in (1024, 512, 256, 128, 64, 32):
        h = layers.Dense(size, "tanh")(h)
    outputs = keras.ops.sum(layers.Dense(10)(h), -1, keepdims=True)
    return keras.Model(inputs, outputs)


def noisy(name, number, seed):
    from blogkeras import toy_densities

    x = getattr(toy_densities, name).sample(number, seed=seed)
    rng = np.random.default_rng(seed + 1)
    noise = rng.normal(0, SIGMA, x.shape).astype("float32")
    return x + noise, noise


def plane(options, name, method, seed, steps):
    from blogkeras import log_partition

    model = density(options.checkpoints, name, method, seed, steps)
    y, noise = noisy(name, options.points, 10_000)
    score = model.score(y, batch_size=8192).astype("float64")
    each = (score**2 + 2 * score * noise / SIGMA**2).mean(-1) + SIGMA**-2
    floor, truth = TRUTH[name]
    log_z = log_partition(
        model, "quadrature", bounds=[(-6, 6)] * 2, num_points=601
    ).value
    likelihood = model.log_density(y, batch_size=8192).mean() - log_z
    return {
        "excess": each.mean() - floor,
        "excess_error": each.std() / len(each) ** 0.5,
        "likelihood_gap": likelihood - truth,
        "log_z": log_z,
        "parameters": model.network.count_params(),
    }


def variate(options, name, method, seed, steps):
    from blogkeras import toy_densities

    sigma = 0.03
    model = density(options.checkpoints, name, method, seed, steps, sigma)
    truth = getattr(toy_densities, name)
    number = min(options.points, 100_000)
    y = truth.sample(number, seed=10_000).astype("float64")
    y += np.random.default_rng(10_001).normal(0, sigma, y.shape)
    h = 1e-4
    exact = np.stack(
        [
            (truth.log_density(y + d, sigma) - truth.log_density(y - d, sigma))
            / (2 * h)
            for d in h * np.eye(2)
        ],
        -1,
    )
    each = np.square(model.score(y, batch_size=8192) - exact).mean(-1)
    return {
        "excess": each.mean(),
        "excess_error": each.std() / len(each) ** 0.5,
        "parameters": model.network.count_params(),
    }


def generator(options, name, method, seed, steps):
    from blogkeras import mlp_log_density, toy_densities

    if method == "data":
        data = getattr(toy_densities, name).sample(4000, seed=seed)
        return {**closeness(name, data), "parameters": 0}
    p = density(options.checkpoints, name, "annealed", seed, steps)
    q = mlp_log_density((2,), (64,) * 4)
    ratio = tuple(map(int, method.split(":")))
    return train_generator(
        options, name, p, q, (64, 64, 64), ratio, seed, steps, 512
    )


def published(options, name, method, seed, steps):
    from blogkeras import mlp_log_density

    if method == "5:1":
        p = density(
            options.checkpoints, name, "annealed", seed, steps, notebook=True
        )
        q, sizes = published_network(), (32, 64, 128, 256)
        return train_generator(
            options, name, p, q, sizes, (5, 1), seed, steps, 2048
        )
    # As many seconds as the notebook's took, half of them for the density.
    rows = Recording(options.results, COLUMNS, KEY).rows()
    (row,) = (
        row
        for row in rows
        if row["task"] == "published"
        and row["method"] == "5:1"
        and (row["seed"], row["steps"]) == (str(seed), str(steps))
    )
    column = "seconds" if options.on_card else "cpu_seconds"
    clock = time.perf_counter if options.on_card else time.process_time
    spent = []
    # The first one also compiles what the later ones use again.
    for steps_tried in (200, 200, 4200):
        start = clock()
        density(options.checkpoints, name, "annealed", seed + 1, steps_tried)
        spent.append(clock() - start)
    # A step of the generator takes two of these, about.
    own_steps = int(float(row[column]) / (spent[2] - spent[1]) * 4000 / 3)
    own_steps = max(own_steps // 500 * 500, 200)
    print("as many seconds:", own_steps, "steps", flush=True)
    p = density(options.checkpoints, name, "annealed", seed, own_steps)
    q = mlp_log_density((2,), (64,) * 4)
    return train_generator(
        options, name, p, q, (64, 64, 64), (1, 1), seed, own_steps, 512
    )


def train_generator(options, name, p, q, sizes, ratio, seed, steps, batch_size):
    import keras
    from keras import layers

    from blogkeras import DenoisingGenerator

    keras.utils.set_random_seed(seed)
    network = keras.Sequential(
        [
            keras.Input((2,)),
            *(layers.Dense(size, "relu") for size in sizes),
            layers.Dense(2),
        ]
    )
    model = DenoisingGenerator(network, p, q, seed=seed)
    model.compile(
        optimizer(steps, 1e-3),
        optimizer(steps, 3e-4),
        energy_steps=ratio[0],
        generator_steps=ratio[1],
        jit_compile=True,
        steps_per_execution=min(50, steps),
    )
    kind = f"generator_{name}_{ratio[0]}_{ratio[1]}_{batch_size}"
    file = options.checkpoints / f"{kind}_{seed}_{steps}.keras"
    model = fit(model, None, steps, batch_size, file)
    samples = model.sample(4000, seed=0)
    return {
        **closeness(name, samples),
        "parameters": model.generator.count_params(),
    }


def closeness(name, samples):
    """How far samples are from a set: KL with noise, MMD, modes."""
    from scipy.spatial.distance import cdist
    from scipy.special import logsumexp

    from blogkeras import toy_densities

    truth = getattr(toy_densities, name)
    rng = np.random.default_rng(0)
    centers, others = samples[::2], samples[1::2]
    y = others + rng.normal(0, SIGMA, others.shape)
    squares = cdist(y, centers, "sqeuclidean")
    log_q = logsumexp(-squares / (2 * SIGMA**2), axis=1) - np.log(
        len(centers) * 2 * np.pi * SIGMA**2
    )
    data = truth.sample(len(others), seed=20_000)
    pairs = cdist(others, data), cdist(others, others), cdist(data, data)
    width = np.median(pairs[0])
    cross, first, second = (np.exp(-((d / width) ** 2) / 2) for d in pairs)
    results = {
        "kl": np.mean(log_q - truth.log_density(y, SIGMA)),
        "mmd": max(first.mean() + second.mean() - 2 * cross.mean(), 0) ** 0.5,
    }
    if name == "eight_gaussians":
        nearest = cdist(samples, truth.centers).argmin(1)
        shares = np.bincount(nearest, minlength=8) / len(samples)
        results["modes"] = int((shares > 0.02).sum())
        results["worst_share"] = shares[np.abs(shares - 1 / 8).argmax()]
    return results


def load_pictures(options, seed):
    """Shuffled pictures in [0, 1], `(n, height, width, 1)`, and labels."""
    if options.data:
        file = np.load(options.data)
        x, y = file["x"] / np.float32(255), file["y"]
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 8, 8) / 16
    x = x.reshape(*x.shape[:3], -1).astype("float32")
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order], y[order]


def pictures(options, name, method, seed, steps):
    import keras
    from scipy.stats import mannwhitneyu

    from blogkeras import AnnealedScoreMatching, residual_log_density

    keras.utils.set_random_seed(seed)
    x, y = load_pictures(options, seed)
    held_out = len(x) // 10
    train = x[held_out:][y[held_out:] != 9]
    test, labels = x[:held_out], y[:held_out]
    model = AnnealedScoreMatching(
        residual_log_density(x.shape[1:], options.filters),
        np.geomspace(0.1, 1.0, 20),
        seed=seed,
    )
    # On a CPU TensorFlow's own convolutions are faster than XLA's.
    model.compile(optimizer(steps, 1e-3))
    curve = Recording(
        options.results.with_name(options.results.stem + "_curve.csv"),
        ["data", "seed", "steps", "step", "loss"],
        ["data", "seed", "steps", "step"],
    )

    def note(step, logs):
        run = name, seed, steps, step
        if curve.missing([run]):
            curve.append(*run, f"{logs['denoising_loss']:.5g}")

    file = options.checkpoints / f"pictures_{name}_{seed}_{steps}.keras"
    model = fit(model, train, steps, 128, file, 100, note)
    known = test[labels != 9]
    loss = model.evaluate(known, batch_size=128, verbose=0, return_dict=True)
    scores = model.anomaly_score(test)
    odd = labels == 9
    wins = mannwhitneyu(scores[odd], scores[~odd]).statistic
    mask = np.zeros(x.shape[1:3], "bool")
    mask[: x.shape[1] // 2] = True
    shown = known[:64]
    filled = model.inpaint(shown, mask, options.sampling_steps, seed=seed)
    error = np.square((filled - shown)[:, ~mask]).mean() ** 0.5
    if seed == 0:
        samples = model.sample(32, options.sampling_steps, seed=seed)
        draw(name, shown, mask, filled, samples, options)
    return {
        "loss": loss["denoising_loss"],
        "inpainting_error": error,
        "auc": wins / (odd.sum() * (~odd).sum()),
        "parameters": model.network.count_params(),
    }


def draw(name, shown, mask, filled, samples, options):
    """Samples, and halves that were filled in, one row below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hidden = np.where(mask[..., None], shown, 0.5)
    rows = [*samples.reshape(2, -1, *samples.shape[1:]), shown, hidden, filled]
    width = len(rows[0])
    rows = [np.concatenate(row[:width, ..., 0], axis=1) for row in rows]
    # Pictures of 8 × 8 are to be seen as well.
    zoom = max(1, 32 // samples.shape[1])
    rows = [np.kron(row, np.ones((zoom, zoom))) for row in rows]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    pyplot.imsave(
        options.results.with_name(f"{options.results.stem}_{name}.png"),
        np.clip(np.concatenate(rows), 0, 1),
        cmap="gray",
    )


TASKS = {
    "plane": plane,
    "generator": generator,
    "published": published,
    "variate": variate,
    "pictures": pictures,
}


def runs(options):
    """All that is to be recorded: task, data, method, seed, steps."""
    for task in options.tasks:
        data = DATA.get(task, list(TRUTH))
        if task == "pictures":
            data = [options.data.stem if options.data else "digits"]
        elif options.sets:
            data = [name for name in data if name in options.sets]
        steps = options.steps or STEPS.get(task, 40_000)
        for seed in range(options.seeds):
            for name in data:
                for method in METHODS[task]:
                    if not options.methods or method in options.methods:
                        yield task, name, method, seed, steps


def device():
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return f"jax {jax.devices()[0].device_kind}"
    return "tensorflow"


def record(options, rows):
    options.on_card = device() not in ("tensorflow", "jax cpu")
    began, longest = time.perf_counter(), 0
    for run in rows.missing(list(runs(options))):
        elapsed = time.perf_counter() - began
        if elapsed + longest > 60 * options.minutes:
            print("out of time")
            return
        print(*run, flush=True)
        start = time.perf_counter(), time.process_time()
        task, name, method, seed, steps = run
        if task == "generator" and method != "data":
            # Several methods share it: it is no part of their seconds.
            density(options.checkpoints, name, "annealed", seed, steps)
            longest = max(longest, time.perf_counter() - start[0])
            start = time.perf_counter(), time.process_time()
        result = TASKS[task](options, name, method, seed, steps)
        wall, processor = (
            time.perf_counter() - start[0],
            time.process_time() - start[1],
        )
        longest = max(longest, wall)
        measured = [
            f"{result[name]:.5g}" if name in result else "" for name in MEASURES
        ]
        rows.append(
            *run,
            *measured,
            result["parameters"],
            f"{processor:.0f}",
            f"{wall:.0f}",
            device(),
        )
        named = zip(MEASURES, measured, strict=True)
        print(
            *(f"{name} {value}" for name, value in named if value),
            f"{processor:.0f} s",
            flush=True,
        )


TITLES = {
    "plane": "Densities of the four sets at σ = 0.1",
    "generator": "Generators, by steps of density to steps of generator",
    "published": "The notebook's networks, and ours in as many seconds",
    "variate": "The control variate in the training loss, σ = 0.03",
    "pictures": "Energies of pictures, not trained on the class 9",
}
NOTES = {
    "plane": "Excess: of ‖∇log p̂ + ε/σ²‖² per dimension over its floor. "
    "Likelihood gap: the normalized mean log-density less the truth, nats.",
    "generator": "KL(q̂‖p̂) with q̂ by kernels, nats; MMD. The row `data` has "
    "other draws of the data in the place of samples.",
    "published": "The notebook's networks of log-densities and generator, "
    "batches of 2048, five steps of log q̂ to one; ours makes as many steps of "
    "512, one to one, as the same seconds allow. KL and MMD as above.",
    "variate": "Excess: mean square error of the score per dimension.",
    "pictures": "Loss: 1 for a constant energy. In-painting error: root mean "
    "square of the lower half of pictures in [0, 1]. AUC: of the anomaly score "
    "for the class 9.",
}


def report(rows, page):
    """Means over seeds with Student's intervals, a table for each task."""
    text = [
        "# Recorded: denoising (post 7038)",
        "",
        "Means over seeds with 95 % intervals (Student); a value without one "
        f"is a single run. {environment(['keras', 'jax', 'numpy'])}; one "
        "thread.",
        "",
    ]
    groups = {}
    for row in rows.rows():
        key = tuple(row[k] for k in ("task", "data", "method", "steps"))
        groups.setdefault(key, []).append(row)
    for task, title in TITLES.items():
        mine = {k: v for k, v in groups.items() if k[0] == task}
        shown = [
            name
            for name in (*MEASURES, "cpu_seconds")
            if any(row[name] for group in mine.values() for row in group)
        ]
        if not mine:
            continue
        lines = []
        for key, group in mine.items():
            cells = []
            for name in shown:
                values = [float(row[name]) for row in group if row[name]]
                if not values:
                    cells.append("")
                elif name in ("excess_error", "cpu_seconds"):
                    cells.append(f"{np.mean(values):.3g}")
                else:
                    middle = mean_interval(values)
                    cells.append(interval(*middle, digits=3))
            data, method, steps = key[1:]
            # The steps of "ours" are as many as the seconds allowed.
            steps = "" if method == "ours" else steps
            lines.append([data, method, steps, len(group), *cells])
        names = [name.replace("_", " ") for name in shown]
        columns = ["data", "method", "steps", "seeds", *names]
        text += [f"## {title}", ""]
        if task in NOTES:
            text += [NOTES[task], ""]
        text += [*table(columns, lines), ""]
    text.append("Regenerate: `python benchmarks/record_denoising.py --report`.")
    write(page, text)
    print("\n".join(text))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="*", default=["plane", "generator"])
    parser.add_argument("--sets", nargs="*", choices=TRUTH)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--filters", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--sampling-steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument(
        "--checkpoints",
        type=pathlib.Path,
        default=pathlib.Path("results/denoising"),
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"unknown tasks {sorted(unknown)}; known: {list(TASKS)}")
    rows = Recording(options.results, COLUMNS, KEY)
    if options.report:
        return report(rows, options.results.with_suffix(".md"))
    record(options, rows)


if __name__ == "__main__":
    main()
