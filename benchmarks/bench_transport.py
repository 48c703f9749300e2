"""Transport distances against POT, ott-jax, gensim and the post's linprog.

    make bench-transport

Every contender runs on one core, in a process of its own, in turn. Part `N`
compares 256 pairs of texts of N words (dimension 300, vectors drawn around a
topic of each pair, lognormal norms), with the same masses and costs for all.
Part `options` has partial, unbalanced and debiased distances of the pairs of 32
words, part `collections` one query beside a batch, all pairs of some texts, and
the neighbors of queries. Part `search` looks for the 10 nearest of 10,000
documents, and part `million`, which is measured only where `--parts million`
asks for it and takes about 3 GiB of memory for each of two processes, of a
million random ones. Parts that are measured stay in `--state`, so that each can
be run by itself. The sections of the page are written from all of them; a
section of which nothing is known stays as it is.

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
import functools
import gzip
import importlib.util
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
USUAL = (*map(str, SIZES), "options", "collections", "search")
PARTS = (*USUAL, "million")
PAIRS, DIM, DOCUMENTS = 256, 300, 10_000
MANY = 1_000_000  # documents of part "million"
SOME = 100_000  # documents of part "collections" at most
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
# Of the parts `options` and `collections`: what is measured, and contenders, of
# which the first is that whose time is the unit.
GROUPS = {
    "options": {
        "`partial=0.8`, ε = 0.02; error against the optimum without ε": {
            "partial-jax": ("Sinkhorn, JAX", JAX, False),
            "partial-tensorflow": ("Sinkhorn, TensorFlow", TENSORFLOW, False),
            "partial-entropic": (
                "POT entropic_partial_wasserstein in a loop",
                {},
                False,
            ),
            "partial-exact": ("exact", JAX, False),
            "partial-pot": ("POT partial_wasserstein2 in a loop", {}, False),
        },
        "`unbalanced`, ρ the mean cost, ε = 0.02; error against the converged "
        "distance": {
            "unbalanced-jax": ("Sinkhorn, JAX", JAX, False),
            "unbalanced-tensorflow": (
                "Sinkhorn, TensorFlow",
                TENSORFLOW,
                False,
            ),
            "unbalanced-pot": (
                "POT sinkhorn_unbalanced in a loop",
                {},
                False,
            ),
            "unbalanced-invariant": (
                "the same, translation invariant",
                {},
                False,
            ),
        },
        "`debiased=True`, ε = 0.05; error against the converged divergence": {
            "debiased-jax": ("Sinkhorn, JAX", JAX, False),
            "debiased-tensorflow": ("Sinkhorn, TensorFlow", TENSORFLOW, False),
            "debiased-batch": ("POT solve_batch, three problems", {}, False),
            "debiased-pot": (
                "POT empirical_sinkhorn_divergence in a loop (without the "
                "entropies, and so its error)",
                {},
                False,
            ),
        },
    },
    "collections": {
        "One text of 32 words beside 256, WMD": {
            "query-exact": ("one call, exact", JAX, False),
            "query-exact-loop": ("a loop of calls, exact", JAX, False),
            "query-pot": ("POT dist and emd2 in a loop", {}, False),
            "query-sinkhorn": ("one call, Sinkhorn 0.005, JAX", JAX, False),
            "query-sinkhorn-loop": (
                "a loop of calls, Sinkhorn 0.005, JAX",
                JAX,
                False,
            ),
        },
        "All pairs of 64 texts of 8 to 32 words, dimension 50, WMD": {
            "pairs-exact": ("pairwise_distances, exact", JAX, False),
            "pairs-sinkhorn": (
                "pairwise_distances, Sinkhorn 0.005, JAX",
                JAX,
                False,
            ),
            "pairs-sklearn": (
                "scikit-learn's pairwise_distances, metric=word_mover_distance",
                JAX,
                False,
            ),
            "pairs-pot": ("POT dist and emd2 in a loop", {}, False),
        },
        "The 10 neighbors of 5 queries in {documents:,} random documents of 12 "
        "words, dimension 50, WMD, by `kneighbors`": {
            "neighbors-numpy": ("TransportIndex, NumPy alone", JAX, False),
            "neighbors-faiss": ("TransportIndex, faiss-cpu", JAX, False),
        },
    },
}
SHARE, EPSILON, DEBIASED_EPSILON = 0.8, 0.02, 0.05
LENGTH = 32  # words of the texts of part `options`
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


def mean_error(found, exact):
    return float(np.mean(np.abs(np.asarray(found) / exact - 1)))


def loop(distance, count=None):
    return lambda: [distance(k) for k in range(count or PAIRS)]


def prepare_option(name):
    """A step of part `options`."""
    import ot

    option, _, solver = name.partition("-")
    texts = problems(LENGTH)
    run, reference = {
        "partial": partial_problem,
        "unbalanced": unbalanced_problem,
        "debiased": debiased_problem,
    }[option](ot, solver, *texts)
    return run, {"pairs": PAIRS, "error": mean_error(run(), reference())}


def ours(p, q, D, regularization, **options):
    """A step of our solver, on tensors of float32."""
    import keras

    import blogkeras

    tensors = [keras.ops.convert_to_tensor(a, "float32") for a in (p, q, D)]

    def run():
        distance = blogkeras.wasserstein_distance(
            *tensors, "sinkhorn", regularization, TOLERANCE, **options
        )
        return np.asarray(distance)

    return run


def partial_problem(ot, solver, x, y, p, q, D):
    """The solver's step, and a function that returns the exact distances."""
    epsilon = EPSILON * D.max(axis=(1, 2))

    # POT stops on the change of the plan: at 1e-3 its rows were a few percent
    # over their mass.
    def entropic(k):
        plan = ot.partial.entropic_partial_wasserstein(
            p[k], q[k], D[k], epsilon[k], m=SHARE, stopThr=TOLERANCE / 10
        )
        return (plan * D[k]).sum()

    exact = loop(
        lambda k: ot.partial.partial_wasserstein2(p[k], q[k], D[k], m=SHARE)
    )
    if solver == "pot":
        return exact, exact
    if solver == "entropic":
        return loop(entropic), exact
    if solver == "exact":
        import blogkeras

        distance = blogkeras.wasserstein_distance
        return lambda: distance(p, q, D, partial=SHARE), exact
    return ours(p, q, D, EPSILON, partial=SHARE), exact


def unbalanced_problem(ot, solver, x, y, p, q, D):
    """The solver's step, and a function that returns converged distances."""
    price = float(D.mean())
    epsilon = EPSILON * D.max(axis=(1, 2))

    def divergence(r, p):
        return np.sum(r * np.log(r / p) - r + p)

    def entropic(k, method="sinkhorn", tolerance=TOLERANCE):
        plan = ot.unbalanced.sinkhorn_unbalanced(
            *(p[k], q[k], D[k], epsilon[k], price),
            method=method,
            stopThr=tolerance,
        )
        moved = divergence(plan.sum(1), p[k]) + divergence(plan.sum(0), q[k])
        return (plan * D[k]).sum() + price * moved

    exact = loop(lambda k: entropic(k, "sinkhorn_translation_invariant", 1e-9))
    if solver == "pot":
        return loop(entropic), exact
    if solver == "invariant":
        method = "sinkhorn_translation_invariant"
        return loop(lambda k: entropic(k, method)), exact
    return ours(p, q, D, EPSILON, unbalanced=price), exact


def debiased_problem(ot, solver, x, y, p, q, D):
    """The solver's step, and a function that returns converged divergences."""
    from ot.batch import solve_batch
    from scipy.spatial.distance import cdist

    costs = D, *(np.array([cdist(a, a) for a in z]) for z in (x, y))
    masses = (p, q), (p, p), (q, q)
    largest = np.max([c.max(axis=(1, 2)) for c in costs], axis=0)

    def by_batches(what="value", **settings):
        values = [
            getattr(
                solve_batch(
                    cost / largest[:, None, None],
                    DEBIASED_EPSILON,
                    *pair,
                    reg_type="kl",
                    **settings,
                ),
                what,
            )
            for pair, cost in zip(masses, costs, strict=True)
        ]
        return largest * (values[0] - (values[1] + values[2]) / 2)

    def entropic(k):
        return ot.bregman.empirical_sinkhorn_divergence(
            *(x[k], y[k], DEBIASED_EPSILON * largest[k], p[k], q[k]),
            metric="euclidean",
            stopThr=TOLERANCE,
            warn=False,
        )

    converged = {"method": "sinkhorn", "tol": 1e-7, "max_iter": 10_000}
    if solver == "pot":
        return loop(entropic), lambda: by_batches("value_linear", **converged)

    def exact():
        return by_batches(**converged)

    if solver == "batch":
        settings = {"method": "sinkhorn", "tol": TOLERANCE}
        return lambda: by_batches(**settings), exact
    own = ours(p, q, D, DEBIASED_EPSILON, own_costs=costs[1:])
    return own, exact


def prepare_collection(name, count):
    """A step of part `collections`, with `count` documents for `kneighbors`."""
    task, _, solver = name.partition("-")
    if task == "neighbors":
        return prepare_neighbors(solver, count)
    import ot

    if task == "query":
        x, y, *_ = problems(LENGTH)
        texts = [x[0], *y]
        rows, columns = np.zeros(PAIRS, int), np.arange(1, PAIRS + 1)
    else:
        rng = np.random.default_rng(0)
        lengths = rng.integers(8, 33, 64)
        texts = [rng.normal(size=(n, 50)) for n in lengths]
        rows, columns = np.triu_indices(len(texts), 1)

    def emd(k):
        cost = ot.dist(texts[rows[k]], texts[columns[k]], "euclidean")
        return ot.emd2([], [], cost)

    by_pot = loop(emd, len(rows))
    exact = by_pot()
    if solver == "pot":
        return by_pot, {"pairs": len(rows), "error": 0.0}
    import blogkeras

    distance = blogkeras.word_mover_distance
    options = {"solver": "sinkhorn"} if "sinkhorn" in solver else {}
    if task == "query":
        batch = np.stack(texts[1:])

        def run():
            if "loop" in solver:
                return [float(distance(texts[0], z, **options)) for z in batch]
            return np.asarray(distance(texts[0], batch, **options))
    elif solver == "sklearn":
        from sklearn.metrics import pairwise_distances

        def run():
            numbers = np.arange(len(texts))[:, None]
            return pairwise_distances(
                numbers,
                metric=lambda i, j: distance(
                    texts[int(i[0])], texts[int(j[0])]
                ),
            )[rows, columns]
    else:

        def run():
            return blogkeras.pairwise_distances(
                texts, cost="euclidean", weights="uniform", **options
            )[rows, columns]

    return run, {"pairs": len(rows), "error": mean_error(run(), exact)}


def prepare_neighbors(first, count):
    from blogkeras import TransportIndex
    from blogkeras.transport import first_pass

    first_pass._MANY = 1 if first == "faiss" else math.inf
    texts, table = many_documents(count)
    index = TransportIndex(
        list(texts), table, "euclidean", "uniform", verbose=0
    )
    numbers = np.random.default_rng(1).choice(count, 5, replace=False)
    queries = texts[numbers]
    facts = {
        "pairs": len(queries),
        "documents": count,
        # The same with faiss and without.
        "sum": float(index.kneighbors(queries, 10)[0].sum()),
    }
    return lambda: index.kneighbors(queries, 10), facts


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
    if part in GROUPS:
        return {
            k: v for group in GROUPS[part].values() for k, v in group.items()
        }
    return {"search": SEARCHERS, "million": MILLION}.get(part, CONTENDERS)


def is_there(name):
    """Whether the library is installed that a contender is about."""
    return "faiss" not in name or importlib.util.find_spec("faiss") is not None


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
            if name in options.only
            and (options.peers or not peer)
            and is_there(name)
        ],
        ["--part", part, "--documents", str(options.documents)],
        rounds=options.rounds,
        warm_up=1,
        facts=facts,
        environment=settings,
    )
    machine = page.environment(
        ["keras", "tensorflow", "jax", "pot", "scipy", "numpy"]
    )
    return {
        "seconds": {n: list(v / facts[n]["pairs"]) for n, v in seconds.items()},
        "facts": facts,
        "data": bool(options.data),
        "machine": machine + ", gensim 4.4.0, ott-jax 0.6.0"
        if options.peers
        else machine,
    }


def ratio_cell(seconds, name, base, target):
    if name not in seconds or base not in seconds:
        return ""
    value, low, high = statistics.ratio(seconds, name, base)
    aim = f" [>= {target:g}]" if target else ""
    return f"{value:.3g} ({low:.3g} to {high:.3g}){aim}"


def head():
    return [
        "# Benchmark: transport (post 7388)",
        "",
        "One core; contenders in turn, each for at least "
        f"{STEP} s, after warm-up. Sinkhorn solvers: ε relative to the largest "
        "cost of each pair, marginal error 1e-3, float32 (POT: float64).",
        "",
        "Regenerate: `make bench-transport`.",
    ]


def sections(parts):
    """`{title: lines}` of the parts so far, `{part: contest(part)}`."""
    found = {}
    sizes = [str(size) for size in SIZES if str(size) in parts]
    if sizes:
        machine = parts[sizes[0]]["machine"]
        found["Pairs of texts"] = [machine, "", *pair_lines(parts)]
    others = {
        "options": (
            "Partial, unbalanced and debiased distances",
            functools.partial(group_lines, "options"),
        ),
        "collections": (
            "Batches, all pairs, neighbors",
            functools.partial(group_lines, "collections"),
        ),
        "search": ("Search", search_lines),
        "million": ("A million documents", million_lines),
    }
    for name, (title, lines) in others.items():
        if name in parts:
            part = parts[name]
            found[title] = [part["machine"], "", *lines(part)]
    return found


def rounds_of(parts):
    return min(len(v) for p in parts for v in p["seconds"].values())


def pair_lines(parts):
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
    return [
        f"{PAIRS} pairs of N words against N words, dimension {DIM}, Euclidean "
        "costs, equal masses; "
        f"{rounds_of([parts[size] for size in sizes])} rounds or more.",
        "",
        "Microseconds per pair (median), and mean error of the distance:",
        "",
        *page.table(["contender", *headings], times),
        "",
        "Ratios of times, median and 95 % interval, and what was aimed at:",
        "",
        *page.table(["ratio", *headings], ratios),
    ]


def group_lines(name, part):
    """The tables of part `options` or `collections`."""
    seconds, facts = part["seconds"], part["facts"]
    lines = [
        f"{PAIRS} pairs of {LENGTH} words, dimension {DIM}, Euclidean costs, "
        "equal masses. "
    ] * (name == "options")
    lines = ["".join(lines) + f"{rounds_of([part])} rounds.", ""]
    for title, group in GROUPS[name].items():
        rows, first = [], next(iter(group))
        for contender, (label, _, _) in group.items():
            if contender in seconds:
                known = facts[contender]
                error = known.get("error")
                rows.append(
                    [
                        label,
                        f"{1e6 * np.median(seconds[contender]):.3g}",
                        "" if error is None else f"{100 * error:.2g} %",
                        ratio_cell(seconds, contender, first, None)
                        if contender != first
                        else "",
                    ]
                )
            elif not is_there(contender):
                rows.append([label, "faiss-cpu not installed", "", ""])
        if not rows:
            continue
        counts = [facts[c].get("documents", 0) for c in group if c in facts]
        unit = "µs per query" if any(counts) else "µs per pair"
        lines += [
            title.format(documents=max(counts, default=0)) + ":",
            "",
            *page.table(
                [
                    "contender",
                    unit,
                    "mean error",
                    "times the first row's (95 %)",
                ],
                rows,
            ),
            "",
        ]
    return lines[:-1]


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
    names = dict.fromkeys(n for part in PARTS for n in contenders_of(part))
    parser = command_line.benchmark(__doc__, names, PAGE)
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
        name, count = options.worker, options.documents
        prepared = {
            "options": lambda: prepare_option(name),
            "collections": lambda: prepare_collection(name, min(count, SOME)),
            "search": lambda: prepare_search(name, options.data),
            "million": lambda: prepare_million(name, count),
        }.get(options.part, lambda: prepare(name, options.part))
        return serve(lambda: long_enough(*prepared()))
    state = Measurements(options.state)
    for part in options.parts:
        state.save("part", part, contest(part, options))
        page.update(options.page, head(), sections(state.of("part")))


if __name__ == "__main__":
    main()
