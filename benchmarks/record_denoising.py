"""Records what the methods of post 7038 are worth, run by run.

    python benchmarks/record_denoising.py [--tasks NAME ...] [--seeds 3]
    python benchmarks/record_denoising.py --data mnist.npz --tasks pictures
    python benchmarks/record_denoising.py --report

Each run adds a row to `docs/results/denoising.csv`; runs that stand there are
not done again, so an interrupted recording goes on. `--minutes N` starts no
run later than that. `--report` writes the means to
`docs/results/denoising.md`. With a CUDA card, set KERAS_BACKEND=jax.

    plane      four sets, σ = 0.1, 4 × 64, batch 512: "one" (one σ),
               "annealed", "conditional" (a network of x and σ, ten σ), and
               "control variate" (one σ). Excess over the floor per
               dimension, and the normalized mean log-density less the truth.
    generator  four sets; steps of the density to steps of the generator 1:1,
               5:1 and 1:5. Modes and the share farthest from its due (eight
               Gaussians), KL(q̂‖p̂) with q̂ by kernels, MMD.
    published  "two_spirals" by the network of the paper's notebook (702,762
               parameters, batch 2048), KL and MMD of the generator.
    pictures   `--data FILE.npz` (`x` of uint8, `y`), or scikit-learn's digits:
               the loss of an energy of many σ, and the area under the curve
               of its anomaly score for the class 9, which it has not seen.
"""

import argparse
import pathlib
import time

import numpy as np
from harness.page import interval, table, write
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
    "plane": ["annealed", "one", "conditional", "control variate"],
    "generator": ["1:1", "5:1", "1:5"],
    "published": ["1:1"],
    "pictures": ["annealed score matching"],
}


def optimizer(steps, rate=2e-3):
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    momentum = 0.999 if steps > 10_000 else 0.99
    return keras.optimizers.Adam(schedule, use_ema=True, ema_momentum=momentum)


def fit(model, x, steps, batch_size):
    per_epoch = min(steps, 500)
    rows = np.resize(x, (per_epoch * batch_size, *x.shape[1:]))
    model.fit(
        rows,
        batch_size=batch_size,
        epochs=max(steps // per_epoch, 1),
        verbose=0,
    )


def density(name, method, seed, steps, units=(64,) * 4, outputs=1):
    """A trained model of log p̂ of one of the sets."""
    import keras
    from keras import layers

    from blogkeras import (
        AnnealedScoreMatching,
        DenoisingDensityEstimator,
        mlp_log_density,
        toy_densities,
    )

    keras.utils.set_random_seed(seed)
    x = getattr(toy_densities, name).sample(512 * 1000, seed=seed)
    if method == "conditional":
        rows, sigma = keras.Input((2,)), keras.Input((1,))
        h = layers.Concatenate()([rows, keras.ops.log(sigma)])
        for size in units:
            h = layers.Dense(size, "swish")(h)
        # The growth that the estimator's constant term has.
        square = keras.ops.sum(keras.ops.square(rows), -1, keepdims=True)
        value = layers.Dense(1)(h) - square / 8
        model = AnnealedScoreMatching(
            keras.Model([rows, sigma], value),
            np.geomspace(SIGMA, 2.0, 10),
            SIGMA,
            conditional=True,
            seed=seed,
        )
    else:
        network = mlp_log_density((2,), units)
        if outputs > 1:  # several outputs, summed
            network = published_network()
        model = DenoisingDensityEstimator(
            network,
            SIGMA,
            annealing_steps="auto" if method == "annealed" else 0,
            control_variate=method == "control variate",
            seed=seed,
        )
    model.compile(
        optimizer(steps), jit_compile=True, steps_per_execution=min(50, steps)
    )
    fit(model, x, steps, 2048 if outputs > 1 else 512)
    return model


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

    model = density(name, method, seed, steps)
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


def generator(options, name, method, seed, steps, published=False):
    import keras
    from keras import layers

    from blogkeras import DenoisingGenerator, mlp_log_density

    p = density(name, "annealed", seed, steps, outputs=10 if published else 1)
    sizes = (32, 64, 128, 256) if published else (64, 64, 64)
    network = keras.Sequential(
        [
            keras.Input((2,)),
            *(layers.Dense(size, "relu") for size in sizes),
            layers.Dense(2),
        ]
    )
    q = published_network() if published else mlp_log_density((2,), (64,) * 4)
    model = DenoisingGenerator(network, p, q, seed=seed)
    of_density, of_generator = map(int, method.split(":"))
    model.compile(
        optimizer(steps, 1e-3),
        optimizer(steps, 3e-4),
        energy_steps=of_density,
        generator_steps=of_generator,
        jit_compile=True,
        steps_per_execution=min(50, steps),
    )
    model.fit(
        batch_size=2048 if published else 512, steps_per_epoch=steps, verbose=0
    )
    samples = model.sample(4000, seed=0)
    return {**closeness(name, samples), "parameters": network.count_params()}


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


def pictures(options, name, method, seed, steps):
    import keras
    from scipy.stats import mannwhitneyu

    from blogkeras import AnnealedScoreMatching, residual_log_density

    keras.utils.set_random_seed(seed)
    if options.data:
        file = np.load(options.data)
        x, y = file["x"] / np.float32(255), file["y"]
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 8, 8) / 16
    x = x.reshape(*x.shape[:3], -1).astype("float32")
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    test, x = slice(0, len(x) // 10), x
    train = x[test.stop :][y[test.stop :] != 9]
    model = AnnealedScoreMatching(
        residual_log_density(x.shape[1:], options.filters),
        np.geomspace(0.1, 1.0, 20),
        seed=seed,
    )
    model.compile(optimizer(steps, 1e-3), jit_compile=True)
    fit(model, train, steps, 128)
    known = x[test][y[test] != 9]
    loss = model.evaluate(known, batch_size=128, verbose=0, return_dict=True)
    scores = model.anomaly_score(x[test])
    odd = y[test] == 9
    wins = mannwhitneyu(scores[odd], scores[~odd]).statistic
    return {
        "loss": loss["denoising_loss"],
        "auc": wins / (odd.sum() * (~odd).sum()),
        "parameters": model.network.count_params(),
    }


def published(options, name, method, seed, steps):
    return generator(options, name, method, seed, steps, published=True)


TASKS = {
    "plane": plane,
    "generator": generator,
    "published": published,
    "pictures": pictures,
}


def runs(options):
    """All that is to be recorded: task, data, method, seed, steps."""
    for task in options.tasks:
        data = list(TRUTH)
        if task == "published":
            data = ["two_spirals"]
        if task == "pictures":
            data = [options.data.stem if options.data else "digits"]
        steps = options.steps or (3000 if task == "pictures" else 40_000)
        for seed in range(options.seeds):
            for name in data:
                if options.sets and task != "pictures":
                    if name not in options.sets:
                        continue
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
    began = time.perf_counter()
    for run in rows.missing(list(runs(options))):
        if time.perf_counter() - began > 60 * options.minutes:
            print("out of time")
            return
        print(*run, flush=True)
        start = time.perf_counter(), time.process_time()
        result = TASKS[run[0]](options, *run[1:])
        wall, processor = (
            time.perf_counter() - start[0],
            time.process_time() - start[1],
        )
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
        print(*(f"{name} {value}" for name, value in named if value))


def report(rows, page):
    """Means over seeds with Student's intervals, a table for each task."""
    text = [
        "# Recorded: denoising",
        "",
        "Means over seeds with 95 % intervals; a value without one is a single "
        "run. Excess is that of ‖∇log p̂ + ε/σ²‖² per dimension over its floor; "
        "the likelihood gap is that of the normalized mean log-density to the "
        "truth, in nats.",
        "",
    ]
    groups = {}
    for row in rows.rows():
        key = tuple(row[k] for k in ("task", "data", "method", "steps"))
        groups.setdefault(key, []).append(row)
    for task in TASKS:
        mine = {k: v for k, v in groups.items() if k[0] == task}
        shown = [
            name
            for name in MEASURES
            if any(row[name] for group in mine.values() for row in group)
        ]
        if not mine:
            continue
        lines = []
        for key, group in mine.items():
            cells = []
            for name in [*shown, "cpu_seconds"]:
                values = [float(row[name]) for row in group if row[name]]
                cells.append(
                    interval(*mean_interval(values), digits=3) if values else ""
                )
            lines.append([*key[1:], len(group), *cells])
        columns = ["data", "method", "steps", "seeds", *shown, "seconds of CPU"]
        text += [f"## {task}", "", *table(columns, lines), ""]
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
    parser.add_argument("--minutes", type=float, default=float("inf"))
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
