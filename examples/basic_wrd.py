"""How far apart are two sentences, and which word went where, in seconds.

A question is compared with three sentences by the word mover's distance (WMD)
and the word rotator's distance (WRD), with their lower bounds; then the plan
between the question and its nearest sentence is printed and drawn. At the end
the sentences are a collection: all distances between them, the neighbors of the
question, and its class by those of its neighbors. The word vectors are made up
by hand: each number says how much a word has of a topic, and words that carry
little meaning are short. For real ones see task_sts_wrd.py.

Blog: 从EMD、WMD到WRD, https://kexue.fm/archives/7388
"""

import argparse

import numpy as np

from blogkeras import (
    TransportClassifier,
    TransportIndex,
    pairwise_distances,
    plot_alignment,
    sinkhorn,
    transport_plan,
    word_centroid_distance,
    word_mover_distance,
    word_rotator_bound,
    word_rotator_distance,
    word_rotator_similarity,
)

# politics, speech, press, city, music, grammar
VECTORS = {
    "minister": [3.0, 0.2, 0.2, 0.0, 0.0, 0.1],
    "chancellor": [3.1, 0.1, 0.0, 0.2, 0.0, 0.1],
    "singer": [0.0, 0.6, 0.2, 0.0, 2.8, 0.1],
    "band": [0.0, 0.0, 0.1, 0.1, 3.0, 0.1],
    "answered": [0.2, 2.0, 0.5, 0.0, 0.0, 0.3],
    "spoke": [0.3, 2.2, 0.1, 0.0, 0.1, 0.3],
    "played": [0.0, 0.3, 0.0, 0.0, 2.0, 0.4],
    "reporters": [0.4, 0.4, 2.6, 0.0, 0.0, 0.1],
    "journalists": [0.3, 0.5, 2.5, 0.1, 0.1, 0.1],
    "songs": [0.0, 0.3, 0.0, 0.0, 2.4, 0.1],
    "paris": [0.3, 0.0, 0.0, 2.7, 0.2, 0.0],
    "berlin": [0.4, 0.0, 0.0, 2.6, 0.3, 0.0],
    "the": [0.0, 0.0, 0.0, 0.0, 0.0, 0.4],
    "a": [0.0, 0.0, 0.0, 0.0, 0.0, 0.3],
    "in": [0.0, 0.0, 0.0, 0.3, 0.0, 0.4],
    "to": [0.0, 0.1, 0.0, 0.1, 0.0, 0.4],
}
QUERY = "the minister answered reporters in paris"
SENTENCES = [
    "a chancellor spoke to journalists in berlin",
    "the singer answered reporters in paris",
    "a band played songs in berlin",
]
TOPICS = ["politics", "music", "music"]


def vectors(sentence):
    return np.array([VECTORS[word] for word in sentence.split()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", help="where to write the alignment")
    args = parser.parse_args()
    x = vectors(QUERY)
    print(f"{QUERY!r} and\nWMD    bound  WRD    bound  1 - WRD")
    for sentence in SENTENCES:
        y = vectors(sentence)
        numbers = (
            word_mover_distance(x, y),
            word_centroid_distance(x, y),
            word_rotator_distance(x, y),
            word_rotator_bound(x, y),
            word_rotator_similarity(x, y),
        )
        print(*(f"{number:.3f}" for number in numbers), sentence, sep="  ")

    nearest = min(SENTENCES, key=lambda s: word_rotator_distance(x, vectors(s)))
    plan = transport_plan(x, vectors(nearest))
    print("\nmass of a word, and where it goes")
    for word, row in zip(QUERY.split(), plan, strict=True):
        targets = zip(row, nearest.split(), strict=True)
        parts = [f"{m:.2f} {to}" for m, to in targets if m > 0.005]
        print(f"{row.sum():.2f} {word:10s}->", ", ".join(parts))
    if args.figure:
        plot_alignment(plan, QUERY.split(), nearest.split(), args.figure)

    # The same in a compiled function, with a certificate.
    y = vectors(nearest)
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    solution = sinkhorn(plan.sum(1), plan.sum(0), 1 - u @ v.T)
    print(
        f"\nSinkhorn: between {float(solution.lower):.4f} and "
        f"{float(solution.upper):.4f}"
    )

    # Collections of texts: see task_similar_reviews.py for a large one.
    texts = [vectors(sentence) for sentence in SENTENCES]
    print("\nWRD between all sentences:")
    print(pairwise_distances(texts).round(3))
    index = TransportIndex(texts[:2], verbose=0)
    index.add(texts[2:])
    index.remove([1])  # those behind it move up: the band has number 1 now
    distances, indices = index.kneighbors([x], k=2)
    print("neighbors without the singer:", indices[0], distances[0].round(3))
    classifier = TransportClassifier(k=1).fit(texts, TOPICS)
    print("the question is about", *classifier.predict([x]))


if __name__ == "__main__":
    main()
