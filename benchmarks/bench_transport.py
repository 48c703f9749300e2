"""Transport distances against POT, ott-jax, gensim and the post's linprog.

    make bench-transport

Every contender runs on one core, in a process of its own, in turn. Part `N`
compares 256 pairs of texts of N words (dimension 300, vectors drawn around a
topic of each pair, lognormal norms), with the same masses and costs for all;
part `search` looks for the 10 nearest of 10,000 documents, and part `million`,
which is measured only where `--parts million` asks for it and takes about 5 GiB
of memory for each of two processes, of a million random ones. Parts that are
measured stay in `--state`, so that each can be run by itself; the table is
written from all of them.

Peers stand in a folder made by `pip install --target PEERS gensim ott-jax`. All
Sinkhorn solvers have ε = 0.02 (or 0.005) times the largest cost of each pair
and stop at a marginal error of 1e-3; POT's `solve_batch` looks at another
quantity, see its documentation.

`--data DIR` takes for the search the first 10,000 different sentences of STS-B
(`stsb-en-train.csv.gz`, ...) and GloVe 50d, as record_transport.py does;
without it the documents are drawn at random around 200 topics.
"""

import argparse
import csv
import gzip
import math
import os
import pathlib
import resource
import sys
import time

import numpy as np
from harness import command_line, page, statistics
from harness.contest import JAX, ONE_THREAD, TENSORFLOW, compete, serve
from harness.recording import Measurements

PAGE = page.ROOT / "docs/benchmarks/transport.md"
SIZES = (8, 32, 128)
USUAL = (*map(str, SIZES), "search")
PARTS = (*USUAL, "million")
PAIRS, DIM, DOCUMENTS = 256, 300, 10_000
MANY = 1_000_000  # documents of part "million"
TOLERANCE = 1e-3
STEP = 0.1  # seconds that a step lasts at least
# name: (label, environment, whether it is a peer in PEERS)
CONTENDERS = {
    "sinkhorn": ("Sinkhorn 0.02, TensorFlow", TENSORFLOW, False),
    "sinkhorn-jax": ("Sinkhorn 0.02, JAX", JAX, False),
    "ott": ("ott-jax vmap, 0.02", {}, True),
    "ott-exp": ("ott-jax vmap, 0.02, lse_mode=False", {}, True),
    "pot-batch": ("POT solve_batch, 0.02", {}, False),
    "fine": ("Sinkhorn 0.005, TensorFlow", TENSORFLOW, False),
    "fine-jax": ("Sinkhorn 0.005, JAX", JAX, False),
    "exact": ("exact", JAX, False),
    "emd2": ("POT emd2 in a loop", {}, False),
    "linprog": ("the post's linprog", {}, False),
    "whole": ("WMD from vectors, Sinkhorn 0.005, JAX", JAX, False),
    "whole-exact": ("WMD from vectors, exact", JAX, False),
    "gensim": ("gensim wmdistance", {}, True),
}
SEARCHERS = {
    "index": ("TransportIndex, WMD", JAX, False),
    "index-wrd": ("TransportIndex, WRD", JAX, False),
    "gensim-search": ("gensim wmdistance with every document", {}, True),
}
MILLION = {
    "faiss": ("TransportIndex, WMD, faiss-cpu", JAX, False),
    "plain": ("TransportIndex, WMD, NumPy alone", JAX, False),
}
# label, contender, base, {part: at least}
RATIOS = [
    ("ott-jax / Sinkhorn 0.02, TensorFlow", "ott", "sinkhorn", (5, 5, 4)),
    ("ott-jax / Sinkhorn 0.02, JAX", "ott", "sinkhorn-jax", (5, 5, 4)),
    ("ott-jax, lse_mode=False / same, JAX", "ott-exp", "sinkhorn-jax", None),
    ("solve_batch / Sinkhorn, TF", "pot-batch", "sinkhorn", (10, 10, 20)),
    ("solve_batch / Sinkhorn, JAX", "pot-batch", "sinkhorn-jax", (10, 10, 20)),
    ("emd2 / Sinkhorn 0.005, TensorFlow", "emd2", "fine", (4, 1.3, None)),
    ("emd2 / Sinkhorn 0.005, JAX", "emd2", "fine-jax", (4, 1.3, None)),
    ("emd2 / exact", "emd2", "exact", (4, None, None)),
    ("gensim / WMD from vectors, JAX", "gensim", "whole", (10, None, None)),
    ("gensim / WMD from vectors, exact", "gensim", "whole-exact", None),
    ("linprog / Sinkhorn 0.005, JAX", "linprog", "fine-jax", (200, 100, 50)),
    ("linprog / exact", "linprog", "exact", None),
]
LINPROG_PAIRS = {8: 32, 32: 8, 128: 2}


def problems(size):
    rng = np.random.default_rng(0)

    def vectors():
        noise = rng.normal(size=(PAIRS, size, DIM))
        norms = np.exp(0.4 * rng.normal(size=(PAIRS, size, 1)))
        return (0.6 * topic + noise) * norms

    topic = rng.normal(size=(PAIRS, 1, DIM))
    x, y = vectors(), vectors()
    p = np.full((PAIRS, size), 1 / size)
    x2, y2 = ((z**2).sum(-1) for z in (x, y))
    d2 = x2[:, :, None] + y2[:, None] - 2 * x @ y.transpose(0, 2, 1)
    return x, y, p, p, np.sqrt(d2)


def prepare(name, part):
    """A step, the number of its pairs, and what else is to be known."""
    import ot

    size = int(part)
    x, y, p, q, D = problems(size)
    exact = np.array([ot.emd2(*a) for a in zip(p, q, D, strict=True)])

    def error(found, pairs=PAIRS):
        return float(np.mean(np.abs(np.asarray(found) / exact[:pairs] - 1)))

    def done(run, pairs=PAIRS):
        return run, {"pairs": pairs, "error": error(run(), pairs)}

    if name == "emd2":
        return done(lambda: [ot.emd2(*a) for a in zip(p, q, D, strict=True)])
    if name == "pot-batch":
        from ot.batch import loss_linear_batch, solve_batch

        epsilon = 0.02
        largest = D.max(axis=(1, 2))
        scaled = D / largest[:, None, None]

        def run():
            result = solve_batch(
                scaled, epsilon, a=p, b=q, method="sinkhorn", tol=TOLERANCE
            )
            return loss_linear_batch(scaled, result.plan) * largest

        return done(run)
    if name.startswith("ott"):
        return done(ott_solver(p, q, D, lse_mode=name == "ott"))
    if name == "linprog":
        from scipy.optimize import linprog

        pairs = LINPROG_PAIRS[size]

        def run():
            return [post(linprog, p[k], q[k], D[k]) for k in range(pairs)]

        return done(run, pairs)
    if name == "gensim":
        return done(gensim_distances(x, y))

    import blogkeras
    from blogkeras.transport import exact as solver

    if name == "exact":
        return done(lambda: solver.solve(p, q, D)[0])
    if name == "whole-exact":
        return done(lambda: blogkeras.word_mover_distance(x, y))
    x, y, p, q, D = (a.astype("float32") for a in (x, y, p, q, D))
    if name == "whole":
        return done(
            lambda: np.asarray(
                blogkeras.word_mover_distance(x, y, solver="sinkhorn")
            )
        )
    import keras

    regularization = 0.005 if "fine" in name else 0.02
    tensors = [keras.ops.convert_to_tensor(a) for a in (p, q, D)]

    def run():
        solution = blogkeras.sinkhorn(
            *tensors, regularization=regularization, tolerance=TOLERANCE
        )
        return np.asarray(solution.distance)

    step, facts = done(run)
    solution = blogkeras.sinkhorn(*tensors, regularization=regularization)
    gap = np.asarray(solution.upper) - np.asarray(solution.lower)
    return step, {**facts, "gap": float(np.mean(gap / exact))}


def ott_solver(p, q, D, lse_mode):
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    solver = sinkhorn.Sinkhorn(threshold=TOLERANCE, lse_mode=lse_mode)

    def one(p, q, D):
        cost = geometry.Geometry(cost_matrix=D, epsilon=0.02 * D.max())
        out = solver(linear_problem.LinearProblem(cost, a=p, b=q))
        return (out.matrix * D).sum()

    run = jax.jit(jax.vmap(one))
    p, q, D = (jax.numpy.asarray(a, "float32") for a in (p, q, D))
    return lambda: np.asarray(run(p, q, D))


def post(linprog, p, q, D):
    """The post's `wasserstein_distance`, re-expressed."""
    m, n = D.shape
    rows = np.repeat(np.eye(m), n, axis=1)
    columns = np.tile(np.eye(n), m)
    sums, masses = np.concatenate([rows, columns]), np.concatenate([p, q])
    return linprog(D.reshape(-1), A_eq=sums[:-1], b_eq=masses[:-1]).fun


def gensim_distances(x, y):
    from gensim.models import KeyedVectors

    tables = []
    for a, b in zip(x, y, strict=True):
        words = [f"x{i}" for i in range(len(a))]
        others = [f"y{i}" for i in range(len(b))]
        vectors = KeyedVectors(a.shape[1])
        vectors.add_vectors(words + others, np.concatenate([a, b]))
        tables.append((vectors, words, others))
    return lambda: [v.wmdistance(a, b, norm=False) for v, a, b in tables]


def documents(folder):
    """Lists of word ids, the vectors, and the query numbers."""
    rng = np.random.default_rng(0)
    if not folder:
        topics = rng.normal(size=(200, 50))
        words = 5000
        table = topics[rng.integers(0, 200, words)]
        table = (table + 0.7 * rng.normal(size=(words, 50))) * np.exp(
            0.4 * rng.normal(size=(words, 1))
        )
        near = np.argsort(topics @ table.T, axis=1)[:, -100:]
        texts = [
            np.concatenate(
                [
                    rng.choice(near[rng.integers(200)], 6),
                    rng.choice(near[rng.integers(200)], 4),
                    rng.integers(0, words, 2),
                ]
            )
            for _ in range(DOCUMENTS)
        ]
        return texts, table.astype("float32")
    sys.path.append(str(page.ROOT / "examples"))
    import task_sts_wrd

    table, rows = task_sts_wrd.read_glove()
    unique = {}
    for split in ("train", "dev", "test"):
        path = pathlib.Path(folder) / f"stsb-en-{split}.csv.gz"
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for a, b, _ in csv.reader(file):
                unique.update({a: 0, b: 0})
    texts = [task_sts_wrd.ids_of(text, rows) for text in unique]
    return [t for t in texts if len(t)][:DOCUMENTS], table


def many_documents(count):
    """As `documents` at random, drawn all at once."""
    rng = np.random.default_rng(0)
    topics, words = rng.normal(size=(200, 50)), 5000
    table = topics[rng.integers(0, 200, words)]
    table = (table + 0.7 * rng.normal(size=(words, 50))) * np.exp(
        0.4 * rng.normal(size=(words, 1))
    )
    near = np.argsort(topics @ table.T, axis=1)[:, -100:]
    parts = [
        near[
            rng.integers(200, size=(count, 1)),
            rng.integers(100, size=(count, n)),
        ]
        for n in (6, 4)
    ]
    parts.append(rng.integers(0, words, (count, 2)))
    return np.concatenate(parts, axis=1), table.astype("float32")


def prepare_million(name, count):
    from blogkeras import TransportIndex
    from blogkeras.transport import first_pass

    if name == "plain":
        first_pass._MANY = math.inf
    texts, table = many_documents(count)
    start = time.perf_counter()
    index = TransportIndex(
        list(texts), table, "euclidean", "uniform", verbose=0
    )
    built = time.perf_counter() - start
    queries = np.random.default_rng(1).choice(count, 5, replace=False)
    turn = iter(np.tile(queries, 1000))
    found = [index.search(texts[i], 10) for i in queries]
    share = [result.num_exact / count for result in found]
    facts = {
        "pairs": 1,
        "exact": float(np.mean(share)),
        "most": max(share),
        "built": built,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "documents": count,
        # The same with faiss and without.
        "sum": float(sum(result.distances.sum() for result in found)),
    }
    return lambda: index.search(texts[next(turn)], 10), facts


def prepare_search(name, folder):
    texts, table = documents(folder)
    queries = np.random.default_rng(1).choice(len(texts), 30, replace=False)
    turn = iter(np.tile(queries, 1000))
    if name == "gensim-search":
        from gensim.models import KeyedVectors

        used = np.unique(np.concatenate(texts))
        vectors = KeyedVectors(table.shape[1])
        vectors.add_vectors([str(i) for i in used], table[used])
        words = [[str(i) for i in text] for text in texts]

        def run():
            query = words[next(turn)]
            found = [vectors.wmdistance(query, w, norm=False) for w in words]
            return np.sort(found)[:10]

        return run, {"pairs": 1}
    from blogkeras import TransportIndex

    index = (
        TransportIndex(texts, table, verbose=0)
        if name == "index-wrd"
        else TransportIndex(texts, table, "euclidean", "uniform", verbose=0)
    )
    share = [index.search(texts[i], 10).num_exact / len(texts) for i in queries]
    facts = {"pairs": 1, "exact": float(np.mean(share)), "most": max(share)}
    return lambda: index.search(texts[next(turn)], 10), facts


def long_enough(run, facts):
    """A step of as many calls as last `STEP` seconds, with its facts.

    Contenders take turns. A single call of a millisecond would measure how
    fast caches fill again after the others.
    """
    run()
    start = time.perf_counter()
    run()
    calls = max(1, math.ceil(STEP / (time.perf_counter() - start)))

    def step():
        for _ in range(calls):
            run()

    return step, {**facts, "pairs": calls * facts["pairs"]}


def contenders_of(part):
    return {"search": SEARCHERS, "million": MILLION}.get(part, CONTENDERS)


def contest(part, options):
    """What is known of a part: `{seconds per pair, facts, data}`."""
    contenders = contenders_of(part)
    settings = {}
    for name, (_, own, peer) in contenders.items():
        settings[name] = {**ONE_THREAD, "JAX_PLATFORMS": "cpu", **own}
        if peer and options.peers:
            path = [str(options.peers), os.environ.get("PYTHONPATH", "")]
            settings[name]["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    facts = {}
    seconds = compete(
        __file__,
        [
            name
            for name, (_, _, peer) in contenders.items()
            if name in options.only and (options.peers or not peer)
        ],
        ["--part", part, "--documents", str(options.documents)],
        rounds=options.rounds,
        warm_up=1,
        facts=facts,
        environment=settings,
    )
    return {
        "seconds": {n: list(v / facts[n]["pairs"]) for n, v in seconds.items()},
        "facts": facts,
        "data": bool(options.data),
    }


def ratio_cell(seconds, name, base, target):
    if name not in seconds or base not in seconds:
        return ""
    value, low, high = statistics.ratio(seconds, name, base)
    aim = f" [>= {target:g}]" if target else ""
    return f"{value:.3g} ({low:.3g} to {high:.3g}){aim}"


def report(parts):
    """The page of the parts measured so far, `{part: contest(part)}`."""
    rounds = min(len(v) for p in parts.values() for v in p["seconds"].values())
    sizes = [part for part in map(str, SIZES) if part in parts]
    headings = [f"N = {part}" for part in sizes]
    times = []
    for name, (label, _, _) in CONTENDERS.items():
        cells = []
        for part in sizes:
            facts = parts[part]["facts"].get(name)
            if facts is None:
                cells.append("")
                continue
            median = 1e6 * np.median(parts[part]["seconds"][name])
            cells.append(f"{median:.3g} ({100 * facts['error']:.2g} %)")
            if "gap" in facts:
                cells[-1] += f", gap {100 * facts['gap']:.2g} %"
        if any(cells):
            times.append([label, *cells])
    ratios = []
    for label, name, base, targets in RATIOS:
        aims = dict(zip(map(str, SIZES), targets or [None] * 3, strict=True))
        cells = [
            ratio_cell(parts[part]["seconds"], name, base, aims[part])
            for part in sizes
        ]
        if any(cells):
            ratios.append([label, *cells])
    lines = [
        "# Benchmark: transport (post 7388)",
        "",
        f"{PAIRS} pairs of N words against N words, dimension {DIM}, Euclidean "
        "costs, equal masses; one core; contenders in turn, each for at least "
        f"{STEP} s, {rounds} rounds or more after warm-up. Sinkhorn solvers: ε "
        "relative to the largest cost of each pair, marginal error 1e-3, "
        "float32 (POT: float64).",
        "",
        page.environment(
            ["keras", "tensorflow", "jax", "pot", "scipy", "numpy"]
        )
        + ", gensim 4.4.0, ott-jax 0.6.0",
        "",
        "Microseconds per pair (median), and mean error of the distance:",
        "",
        *page.table(["contender", *headings], times),
        "",
        "Ratios of times, median and 95 % interval, and what was aimed at:",
        "",
        *page.table(["ratio", *headings], ratios),
        "",
    ]
    if "search" in parts:
        lines += search_lines(parts["search"])
    if "million" in parts:
        lines += million_lines(parts["million"])
    return [*lines, "Regenerate: `make bench-transport`."]


def search_lines(part):
    texts = "random documents"
    if part["data"]:
        texts = "different sentences of STS-B (English), GloVe 50d"
    rows = [
        [
            SEARCHERS[name][0],
            f"{1e3 * np.median(part['seconds'][name]):.3g}",
            *(f"{100 * facts.get(k, 1):.2f} %" for k in ("exact", "most")),
        ]
        for name, facts in part["facts"].items()
    ]
    speed = ratio_cell(part["seconds"], "gensim-search", "index", 20)
    return [
        f"The 10 nearest of {DOCUMENTS} {texts}; 30 queries:",
        "",
        *page.table(
            ["contender", "ms per query", "exact distances, mean", "most"], rows
        ),
        "",
        *([f"gensim / TransportIndex, WMD: {speed}.", ""] if speed else []),
    ]


def million_lines(part):
    rows = [
        [
            MILLION[name][0],
            f"{1e3 * np.median(part['seconds'][name]):.3g}",
            f"{100 * facts['exact']:.4f} %",
            f"{facts['built']:.0f}",
            f"{facts['memory']:.1f}",
        ]
        for name, facts in part["facts"].items()
    ]
    count = next(iter(part["facts"].values()))["documents"]
    speed = ratio_cell(part["seconds"], "plain", "faiss", None)
    return [
        f"The 10 nearest of {count:,} random documents of 12 words, dimension "
        "50; 5 queries:",
        "",
        *page.table(
            [
                "contender",
                "ms per query",
                "exact distances",
                "s to build",
                "GiB at most",
            ],
            rows,
        ),
        "",
        *([f"NumPy / faiss: {speed}.", ""] if speed else []),
    ]


def main():
    parser = command_line.benchmark(
        __doc__, CONTENDERS | SEARCHERS | MILLION, PAGE
    )
    add = parser.add_argument
    add("--parts", nargs="*", choices=PARTS, default=USUAL)
    add("--documents", type=int, default=MANY, help="of part `million`")
    add("--peers", type=pathlib.Path, help="folder with gensim and ott-jax")
    add("--data", help="folder of STS-B, for the search")
    add("--state", type=pathlib.Path, default="results/bench_transport.csv")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if options.part == "search":
            make, what = prepare_search, options.data
        elif options.part == "million":
            make, what = prepare_million, options.documents
        else:
            make, what = prepare, options.part
        return serve(lambda: long_enough(*make(options.worker, what)))
    state = Measurements(options.state)
    for part in options.parts:
        state.save("part", part, contest(part, options))
    lines = report(state.of("part"))
    page.write(options.page, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
