"""HSIC against hyppo, dcor and NumPy, and the bottleneck against its script.

    make bench-hsic

`--peer` is the Python of an environment with hyppo 0.5.2 and dcor 0.7, which
nothing else needs (make installs one); without it the contenders that need
them are left out. One thread each, set by this script; float32 for us, float64
for the others, as they are used. `--only NAME` measures one of the contests.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
from harness.contest import MARK, Worker, measure, serve
from harness.page import environment
from harness.statistics import ratio

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "docs/benchmarks/hsic.md"
ROWS = ROOT / "docs/results/hsic_benchmark.csv"
THREADS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
BANDWIDTH = 4.0
PERMUTATIONS = {("ours", 1000): 200, ("ours", 4000): 50}
PERMUTATIONS.update({("hyppo", 1000): 200, ("hyppo", 4000): 5})

# contest: (what, rounds, [(contender, needs hyppo)], targets)
CONTESTS = {
    "statistic": (
        "statistic, n = 4000, fixed bandwidth",
        7,
        ["ours", "hyppo", "numpy"],
        {"hyppo": 20, "numpy": 3},
    ),
    "median": (
        "statistic, n = 4000, median bandwidths",
        5,
        ["ours", "hyppo"],
        {"hyppo": 6},
    ),
    "gamma": (
        "p-value without permutations, n = 4000",
        5,
        ["ours", "hyppo"],
        {"hyppo": 8},
    ),
    "permutations-1000": (
        "200 permutations, n = 1000",
        3,
        ["ours", "hyppo"],
        {"hyppo": 15},
    ),
    "permutations-4000": (
        "one permutation, n = 4000",
        3,
        ["ours", "hyppo"],
        {"hyppo": 20},
    ),
    "bottleneck": (
        "bottleneck step, 5 × 256 + 10 units, batch 512",
        6,
        ["ours", "script"],
        {"script": 3},
    ),
}


def data(n, dim=10):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, dim))
    return x, rng.normal(size=(n, dim)) + 0.05 * x


def size(contest):
    return 1000 if contest.endswith("1000") else 4000


def ours(contest):
    import blogkeras as b

    x, y = (t.astype("float32") for t in data(size(contest)))
    kernel = b.GaussianKernel(BANDWIDTH, form="standard")
    number = PERMUTATIONS.get(("ours", size(contest)))
    step = {
        "statistic": lambda: float(b.hsic(x, y, kernel, kernel)),
        "median": lambda: float(b.hsic(x, y)),
        "gamma": lambda: b.hsic_test(x, y),
    }.get(
        contest,
        lambda: b.hsic_test(
            x, y, null="permutation", num_permutations=number, seed=0
        ),
    )
    step()
    return step


def hyppo(contest):
    import warnings

    from hyppo.independence import Hsic

    warnings.simplefilter("ignore")
    x, y = data(size(contest))
    number = PERMUTATIONS["hyppo", size(contest)]
    gamma = 1 / (2 * BANDWIDTH**2)
    return {
        "statistic": lambda: Hsic(gamma=gamma).statistic(x, y),
        "median": lambda: Hsic().statistic(x, y),
        "gamma": lambda: Hsic().test(x, y),
    }.get(
        contest,
        lambda: Hsic().test(x, y, auto=False, reps=number, workers=1),
    )


def numpy(contest):
    x, y = data(size(contest))

    def kernel(x):
        norms = (x * x).sum(1)
        d = norms[:, None] + norms - 2 * x @ x.T
        return np.exp(-d / (2 * BANDWIDTH**2))

    def step():
        k, m = kernel(x), kernel(y)
        between = np.mean(k.mean(0) * m.mean(0))
        return np.mean(k * m) + k.mean() * m.mean() - 2 * between

    return step


def network():
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.random((512, 784)).astype("float32")
    y = rng.integers(0, 10, 512)
    blocks = [
        keras.Sequential(
            [
                layers.Dense(units),
                layers.BatchNormalization(center=False, scale=False),
                layers.ReLU(),
            ]
        )
        for units in [256] * 5 + [10]
    ]
    return x, y, blocks


def our_bottleneck():
    import keras

    import blogkeras

    x, y, blocks = network()
    model = blogkeras.HSICBottleneck(blocks, 10)
    model.compile(keras.optimizers.SGD(1e-4), jit_compile=False)

    def step():
        return model.train_on_batch(x, y)

    step()
    return step


def scripts_bottleneck(sigma=5.0, label_weight=50.0, rate=1e-4):
    """The official scheme in the same framework.

    For every layer a forward pass, both nHSIC from one-sided centering and
    inverses, a gradient of that layer's weights, and their update.
    """
    import tensorflow as tf

    x, y, blocks = network()
    x, y = tf.constant(x), tf.one_hot(y, 10)
    m = x.shape[0]
    center = tf.eye(m) - 1 / m

    def resolvent(x):
        norms = tf.reduce_sum(x * x, 1)[:, None]
        product = tf.matmul(x, x, transpose_b=True)
        d = tf.abs(norms - 2 * product + tf.transpose(norms))
        k = tf.matmul(tf.exp(-d / (2 * sigma**2 * x.shape[1])), center)
        return tf.matmul(k, tf.linalg.inv(k + 1e-5 * m * tf.eye(m)))

    def nhsic(x, y):
        return tf.reduce_sum(resolvent(x) * tf.transpose(resolvent(y)))

    def forward(x):
        hidden = []
        for block in blocks:
            x = block(x, training=True)
            hidden.append(x)
        return hidden

    forward(x)

    # A program for each layer, as the script calls `backward` for each.
    def program(i):
        @tf.function
        def one_layer(x, y):
            layers = blocks[: i + 1]
            weights = [[v.value for v in b.trainable_variables] for b in layers]
            with tf.GradientTape() as tape:
                z = forward(x)[i]
                loss = nhsic(z, x) - label_weight * nhsic(z, y)
            gradients = tape.gradient(loss, weights)
            for w, g in zip(weights[i], gradients[i], strict=True):
                w.assign_sub(rate * g)
            return gradients

        return one_layer

    programs = [program(i) for i in range(len(blocks))]

    def step():
        for one_layer in programs:
            gradients = one_layer(x, y)
        return gradients[0][0].numpy()

    step()
    return step


def contender(contest, name):
    if contest == "bottleneck":
        return our_bottleneck if name == "ours" else scripts_bottleneck
    makers = {"ours": ours, "hyppo": hyppo, "numpy": numpy}
    return functools.partial(makers[name], contest)


class Peer(Worker):
    """A contender that runs in another environment."""

    def __init__(self, python, name, arguments):
        self.name = name
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **THREADS},
        )
        self._answer()


def compete(contest, peer, rounds):
    _, default, names, _ = CONTESTS[contest]
    workers = []
    for name in names:
        if name == "hyppo" and not peer:
            continue
        python = peer if name == "hyppo" else sys.executable
        workers.append(Peer(python, name, ["--contest", contest]))
    seconds = measure(workers, rounds or default, warm_up=1)
    for worker in workers:
        worker.close()
    if contest == "permutations-4000":
        # hyppo evaluates the statistic itself by the same code.
        for name, values in seconds.items():
            number = PERMUTATIONS[name, 4000]
            seconds[name] = values / (number + (name == "hyppo"))
    return seconds


# Memory, and many samples


def peak():
    """Peak memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


LARGE = {
    "tiles": "statistic, all pairs",
    "fourier": "test, 256 Fourier features, gamma",
    "block": "test, blocks of 100",
}


def large(name, n=100_000):
    """Seconds and extra memory of one of `LARGE`, in a process of its own."""
    import time

    import blogkeras as b

    # Libraries and their first program are not counted.
    x, y = (t.astype("float32") for t in data(3000))
    kernel = b.GaussianKernel(BANDWIDTH, form="standard")

    def run(x, y):
        if name == "tiles":
            return float(b.hsic(x, y, kernel, kernel))
        return b.hsic_test(x, y, kernel, kernel, approximation=name, seed=0)[1]

    run(x, y)
    x, y = (t.astype("float32") for t in data(n))
    before, start = peak(), time.perf_counter()
    result = run(x, y)
    print(MARK, time.perf_counter() - start, peak() - before, peak(), result)


def statistics_memory(name):
    """Extra memory of one statistic at n = 4000."""
    step = contender("statistic", name)
    # What importing, compiling and warming up take is not counted.
    small = data(3000 if name == "ours" else 300)
    if name == "ours":
        import blogkeras as b

        kernel = b.GaussianKernel(BANDWIDTH, form="standard")
        b.hsic(*(t.astype("float32") for t in small), kernel, kernel)
    if name == "hyppo":
        from hyppo.independence import Hsic

        Hsic(gamma=1.0).statistic(*small)
    before = peak()
    run = step()
    run()
    print(MARK, 0.0, peak() - before, peak(), 0)


def alone(arguments, python=sys.executable):
    out = subprocess.run(
        [python, __file__, *arguments],
        env={**os.environ, **THREADS},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    line = next(t for t in out.splitlines() if t.startswith(MARK))
    return [float(t) for t in line.split()[1:]]


# Agreement


def agreement_of_peers():
    """The peers' numbers, as JSON."""
    import dcor
    from hyppo.independence import Hsic

    x, y = data(200, 3)
    gamma = 1 / (2 * BANDWIDTH**2)
    values = {
        "(hyppo, biased)²: cka": Hsic(gamma=gamma, bias=True).statistic(x, y)
        ** 2,
        "hyppo: debiased cka": Hsic(gamma=gamma).statistic(x, y),
        "dcor distance covariance²: biased": dcor.distance_covariance_sqr(x, y),
        "dcor unbiased: unbiased": dcor.u_distance_covariance_sqr(x, y),
        "hyppo, p of chi²": Hsic().test(x, y)[1],
    }
    print(json.dumps({k: float(v) for k, v in values.items()}))


def agreement_of_ours():
    import blogkeras as b

    x, y = data(200, 3)
    kernel = b.GaussianKernel(BANDWIDTH, form="standard")
    d_x, d_y = (np.sqrt(np.square(t[:, None] - t).sum(-1)) for t in (x, y))
    sys.path.insert(0, str(ROOT / "tests"))
    from test_hsic_independence import hyppos_test

    values = [
        b.cka(x, y, kernel, kernel),
        b.cka(x, y, kernel, kernel, "unbiased"),
        b.hsic_from_kernels(d_x, d_y),
        b.hsic_from_kernels(d_x, d_y, "unbiased"),
        hyppos_test(x, y),
    ]
    print(json.dumps([float(v) for v in values]))


def agreement(peer):
    def lines(python, name):
        out = subprocess.run(
            [python, __file__, "--agreement", name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return json.loads(out.splitlines()[-1])

    theirs, own = lines(peer, "peers"), lines(sys.executable, "ours")
    return [
        (name, value, mine)
        for (name, value), mine in zip(theirs.items(), own, strict=True)
    ]


# Report


def save(kind, key, values):
    """Replaces one line of the recorded measurements."""
    rows = {}
    if ROWS.exists():
        for line in ROWS.read_text("utf-8").splitlines():
            old_kind, old_key, *rest = line.split(";")
            rows[old_kind, old_key] = rest
    rows[kind, key] = [json.dumps(values)]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{';'.join([*k, *v])}\n" for k, v in rows.items())
    ROWS.write_text(text, encoding="utf-8")


def recorded(kind):
    found = {}
    for line in ROWS.read_text("utf-8").splitlines():
        old_kind, key, values = line.split(";", 2)
        if old_kind == kind:
            found[key] = json.loads(values)
    return found


def table():
    lines = [
        "# Benchmark: HSIC",
        "",
        "x and y have 10 features, y = ε + 0.05 x; one thread each; contenders "
        "take turns, each in a process of its own, after a warm-up that "
        "includes compiling. Ours is float32, the others float64.",
        "",
        *recorded("environment").values(),
        "",
        "| what | ours, s | peer | peer, s | ratio | 95 % interval | target |",
        "|---|---|---|---|---|---|---|",
    ]
    times = recorded("seconds")
    for contest, (what, _, names, targets) in CONTESTS.items():
        if contest not in times:
            continue
        seconds = {k: np.array(v) for k, v in times[contest].items()}
        for name in names[1:]:
            if name not in seconds:
                continue
            middle, low, high = ratio(seconds, name, "ours")
            cells = [
                what,
                f"{np.median(seconds['ours']):.3g}",
                name,
                f"{np.median(seconds[name]):.3g}",
                f"{middle:.1f}",
                f"{low:.1f} to {high:.1f}",
                f">= {targets[name]}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        '"script": the scheme of the paper\'s script (a forward pass, gradient '
        "and update for every layer in turn, inverses anew each time), written "
        "for the same framework.",
        "",
        "| memory of one statistic, n = 4000 | extra, MB |",
        "|---|---|",
    ]
    for name, values in recorded("memory").items():
        lines.append(f"| {name} | {values[1]:.0f} |")
    lines += [
        "",
        "| memory at n = 100,000 | extra, MB | process, MB |",
        "|---|---|---|",
    ]
    for name, (_, extra, whole, _) in recorded("large").items():
        lines.append(f"| {LARGE[name]} | {extra:.0f} | {whole:.0f} |")
    lines += [
        "",
        "| the same number (n = 200) | peer | ours |",
        "|---|---|---|",
    ]
    for name, theirs, own in recorded("agreement").get("all", []):
        lines.append(f"| {name} | {theirs:.8g} | {own:.8g} |")
    lines += ["", "Regenerate: `make bench-hsic`.", ""]
    text = "\n".join(lines)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(text, encoding="utf-8")
    print(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker")
    parser.add_argument("--contest", choices=CONTESTS)
    parser.add_argument("--large", choices=LARGE)
    parser.add_argument("--memory", choices=["ours", "hyppo"])
    parser.add_argument("--agreement", choices=["ours", "peers"])
    parser.add_argument("--peer", help="Python with hyppo and dcor")
    parser.add_argument("--rounds", type=int)
    names = [*CONTESTS, "memory", "large", "agreement"]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    options = parser.parse_args()
    if options.worker:
        return serve(contender(options.contest, options.worker))
    if options.large:
        return large(options.large)
    if options.memory:
        return statistics_memory(options.memory)
    if options.agreement:
        ours = options.agreement == "ours"
        return (agreement_of_ours if ours else agreement_of_peers)()
    for name in options.only:
        print(name, flush=True)
        if name in CONTESTS:
            seconds = compete(name, options.peer, options.rounds)
            save("seconds", name, {k: list(v) for k, v in seconds.items()})
        elif name == "memory":
            for who, python in (
                ("ours", sys.executable),
                ("hyppo", options.peer),
            ):
                if python:
                    save(name, who, alone(["--memory", who], python))
        elif name == "large":
            for which in LARGE:
                save(name, which, alone(["--large", which]))
        elif options.peer:
            save(name, "all", agreement(options.peer))
    versions = environment(["keras", "tensorflow", "numpy"])
    if options.peer:
        versions += "; peers: hyppo 0.5.2, dcor 0.7"
    save("environment", "line", versions)
    table()


if __name__ == "__main__":
    main()
