"""HSIC, its tests and selection against peers; the bottleneck and its script.

    make bench-hsic

`--peer` is the Python of an environment with hyppo 0.5.2, dcor 0.7,
causal-learn 0.1.4.8 and pyHSICLasso 1.4.2, which nothing else needs (make
installs one); without it the contenders that need them are left out. One
thread each, set by this script; float32 for us, float64
for the others, as they are used. `--only NAME` measures one of the contests;
`--only` alone writes the page from the rows that stand in
`docs/results/hsic_benchmark.csv`. Fewer than six rounds have no interval.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

import numpy as np
import record_independence as independence
from harness import page, statistics
from harness.contest import ONE_THREAD, ask, compete, peak, serve
from harness.recording import Measurements

PAGE = page.ROOT / "docs/benchmarks/hsic.md"
ROWS = page.ROOT / "docs/results/hsic_benchmark.csv"
PEERS = ["hyppo", "dcor", "causal-learn", "pyHSICLasso"]
BANDWIDTH = 4.0
PERMUTATIONS = {("ours", 1000): 200, ("ours", 4000): 50}
PERMUTATIONS.update({("hyppo", 1000): 200, ("hyppo", 4000): 5})

# contest: (what, how many times as fast as each peer we aim to be)
CONTESTS = {
    "statistic": (
        "statistic, n = 4000, fixed bandwidth",
        {"hyppo": 20, "numpy": 3},
    ),
    "median": ("statistic, n = 4000, median bandwidths", {"hyppo": 6}),
    "gamma": ("p-value without permutations, n = 4000", {"hyppo": 8}),
    "permutations-1000": ("200 permutations, n = 1000", {"hyppo": 15}),
    "permutations-4000": ("one permutation, n = 4000", {"hyppo": 20}),
    "joint": (
        "dHSIC of 3 variables, 100 permutations, n = 500",
        {"hyppo": 10},
    ),
    "conditional": ("KCI given one variable, n = 1000", {"causal-learn": 1}),
    "selection": (
        "HSIC Lasso, 4 of 100 features, n = 400",
        {"pyHSICLasso": 2},
    ),
    "bottleneck": (
        "bottleneck step, 5 × 256 + 10 units, batch 512",
        {"script": 3},
    ),
}
# Questions of record_independence.py: (case, n, the contenders' methods)
QUESTIONS = {
    "joint": (
        *("no pair", 500),
        {
            "ours": "ours, standard form, permutations",
            "hyppo": "hyppo dHsic, permutations",
        },
    ),
    "conditional": (
        *("dependent 1", 1000),
        {"ours": "ours, gamma", "causal-learn": "causal-learn KCI, gamma"},
    ),
    "selection": (
        *("additive", 400),
        {"ours": "ours", "pyHSICLasso": "pyHSICLasso"},
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


def question(name, who):
    """Asks one of `QUESTIONS`; the facts are the answer."""
    case, n, methods = QUESTIONS[name]
    sample = independence.draw(name, case, np.random.default_rng(0), n)
    if name == "selection":
        ask_for = functools.partial(independence.selected, methods[who])
    else:
        ask_for = independence.result_of(
            name, methods[who], permutations=100, bandwidth=1.0
        )

    def step():
        return ask_for(*sample)

    answer = step()
    if name == "selection":
        answer = sorted(answer)
    return step, {"answer": [float(value) for value in answer]}


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
    if contest in QUESTIONS:
        return functools.partial(question, contest, name)
    makers = {"ours": ours, "hyppo": hyppo, "numpy": numpy}
    return functools.partial(makers[name], contest)


def contest(name, options):
    """Seconds of a statistic, a test or a step, and answers, by contender."""
    names, facts = ["ours", *CONTESTS[name][1]], {}
    seconds = compete(
        __file__,
        [who for who in names if who not in PEERS or options.peer],
        ["--contest", name],
        rounds=options.rounds,
        warm_up=1,
        facts=facts,
        environment=dict.fromkeys(names, ONE_THREAD),
        python=dict.fromkeys(PEERS, options.peer),
    )
    if name == "permutations-4000":
        # hyppo evaluates the statistic itself by the same code.
        for who, values in seconds.items():
            number = PERMUTATIONS[who, 4000]
            seconds[who] = values / (number + (who == "hyppo"))
    seconds = {who: list(values) for who, values in seconds.items()}
    answers = {who: f["answer"] for who, f in facts.items() if f}
    return seconds, answers


# Memory, and many samples


LARGE = {
    "tiles": "statistic, all pairs",
    "fourier": "test, 256 Fourier features, gamma",
    "block": "test, blocks of 100",
}


def large(name, n):
    """Prints seconds, extra memory, memory and result of one of `LARGE`."""
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
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak() - before, peak(), float(result)]))


def memory(name):
    """Prints the extra memory of one statistic at n = 4000, as `large`."""
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
    print(json.dumps([0.0, peak() - before, peak(), 0.0]))


# Agreement


def agreement(who):
    """Prints the same numbers by the peers, with their names, or by us."""
    x, y = data(200, 3)
    if who == "peers":
        import dcor
        from hyppo.independence import Hsic

        gamma = 1 / (2 * BANDWIDTH**2)
        biased = Hsic(gamma=gamma, bias=True).statistic(x, y)
        values = {
            "(hyppo, biased)²: cka": biased**2,
            "hyppo: debiased cka": Hsic(gamma=gamma).statistic(x, y),
            "dcor distance covariance²: biased": (
                dcor.distance_covariance_sqr(x, y)
            ),
            "dcor unbiased: unbiased": dcor.u_distance_covariance_sqr(x, y),
            "hyppo, p of chi²": Hsic().test(x, y)[1],
        }
        return print(json.dumps({k: float(v) for k, v in values.items()}))
    import blogkeras as b

    tests = page.ROOT / "tests"
    sys.path[:0] = [str(tests), str(tests / "hsic")]
    from test_hsic_independence import hyppos_test

    kernel = b.GaussianKernel(BANDWIDTH, form="standard")
    d_x, d_y = (np.sqrt(np.square(t[:, None] - t).sum(-1)) for t in (x, y))
    values = [
        b.cka(x, y, kernel, kernel),
        b.cka(x, y, kernel, kernel, "unbiased"),
        b.hsic_from_kernels(d_x, d_y),
        b.hsic_from_kernels(d_x, d_y, "unbiased"),
        hyppos_test(x, y),
    ]
    return print(json.dumps([float(v) for v in values]))


# Report


def measure(name, options, state):
    """Measures one of the contests, or what else stands on the page."""

    def alone(option, which, *more, python=sys.executable):
        arguments = [f"--{option}", which, *more]
        return ask(__file__, *arguments, environment=ONE_THREAD, python=python)

    if name in CONTESTS:
        seconds, answers = contest(name, options)
        state.save("seconds", name, seconds)
        if answers:
            state.save("answers", name, answers)
    elif name == "memory":
        state.save(name, "ours", alone(name, "ours"))
        if options.peer:
            state.save(name, "hyppo", alone(name, "hyppo", python=options.peer))
    elif name == "large":
        for which in LARGE:
            size = f"--samples={options.samples}"
            state.save(name, which, alone(name, which, size))
    elif options.peer:
        theirs = alone(name, "peers", python=options.peer)
        both = zip(theirs.items(), alone(name, "ours"), strict=True)
        state.save(name, "all", [(*pair, own) for pair, own in both])


def report(state):
    rows, answered = [], []
    measured, answers = state.of("seconds"), state.of("answers")
    for name, (what, targets) in CONTESTS.items():
        times = measured.get(name, {})
        for who in targets:
            if who in times:
                ratio = statistics.ratio(times, who, "ours")
                cells = [what, f"{np.median(times['ours']):.3g}", who]
                cells.append(f"{np.median(times[who]):.3g}")
                cells += page.interval_cells(*ratio, digits=1)
                cells.append(f">= {targets[who]}")
                if name not in answers:
                    rows.append(cells)
                    continue
                for values in (answers[name]["ours"], answers[name][who]):
                    cells.append(", ".join(f"{v:.5g}" for v in values))
                answered.append(cells)
    columns = ["what", "ours, s", "peer", "peer, s", "ratio"]
    columns += ["95 % interval", "target"]
    return [
        "# Benchmark: HSIC (post 6910)",
        "",
        "x and y have 10 features, y = ε + 0.05 x; one thread each; contenders "
        "take turns, each in a process of its own, after a warm-up that "
        "includes compiling. Ours is float32, the others float64.",
        "",
        *state.of("environment").values(),
        "",
        *page.table(columns, rows),
        "",
        '"script": the scheme of the paper\'s script (a forward pass, gradient '
        "and update for every layer in turn, inverses anew each time), written "
        "for the same framework.",
        "",
        "On one draw each of `benchmarks/record_independence.py`, with the "
        "answers: statistic and p of a test, numbers of the features that are "
        "selected.",
        "",
        *page.table([*columns, "ours says", "the peer says"], answered),
        "",
        *page.table(
            ["memory of one statistic, n = 4000", "extra, MB"],
            [(who, f"{v[1]:.0f}") for who, v in state.of("memory").items()],
        ),
        "",
        *page.table(
            ["memory at n = 100,000", "extra, MB", "process, MB"],
            [
                (LARGE[name], f"{extra:.0f}", f"{whole:.0f}")
                for name, (_, extra, whole, _) in state.of("large").items()
            ],
        ),
        "",
        *page.table(
            ["the same number (n = 200)", "peer", "ours"],
            [
                (name, f"{theirs:.8g}", f"{own:.8g}")
                for name, theirs, own in state.of("agreement").get("all", [])
            ],
        ),
        "",
        "Regenerate: `make bench-hsic`.",
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    alone = {
        "memory": memory,
        "large": lambda name: large(name, options.samples),
        "agreement": agreement,
    }
    add("--worker", help=argparse.SUPPRESS)
    add("--contest", choices=CONTESTS, help=argparse.SUPPRESS)
    for name in alone:
        add(f"--{name}", help=argparse.SUPPRESS)
    add("--peer", help=f"a Python with {', '.join(PEERS)}")
    add("--rounds", type=int, default=7)
    add("--samples", type=int, default=100_000, help="of large")
    names = [*CONTESTS, *alone]
    add("--only", nargs="*", default=names, choices=names)
    add("--page", type=pathlib.Path, default=PAGE)
    add("--rows", type=pathlib.Path, default=ROWS)
    options = parser.parse_args()
    if options.worker:
        return serve(contender(options.contest, options.worker))
    for name, function in alone.items():
        if which := getattr(options, name):
            return function(which)
    state = Measurements(options.rows)
    for name in options.only:
        print(name, flush=True)
        measure(name, options, state)
    if options.only:
        versions = page.environment(["keras", "tensorflow", "numpy"])
        if options.peer:
            versions += "; peers: " + page.versions(options.peer, PEERS)
        state.save("environment", "line", versions)
    lines = report(state)
    page.write(options.page, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
