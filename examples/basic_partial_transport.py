"""What partial, unbalanced and debiased transport are for, in seconds.

Two sentences say the same, but the first one brings words of the web page that
it stood on. The balanced plan must move these words, too, and they push the
others away from their partners. A partial plan moves a share of the mass, that
which has the shortest way; an unbalanced one loses what would have to go too
far. `--output FOLDER` draws the three plans side by side.

Then a sentence is compared with itself: Sinkhorn's distance is not 0 there, the
debiased divergence is. And words that stand where they should be are trained
with either as the loss: the distance draws them to their mean, the divergence
leaves them where they are.

The word vectors are points in the plane, made up by hand.

Blog: 从EMD、WMD到WRD, https://kexue.fm/archives/7388
"""

import argparse
import os

import keras
import numpy as np
from keras import ops

from blogkeras import (
    WordMoverDistance,
    report,
    transport_plan,
    word_mover_distance,
)
from blogkeras.extras import require

SENTENCE = {
    "minister": (0.0, 1.0),
    "answered": (1.2, 2.4),
    "reporters": (2.8, 1.9),
    "paris": (3.4, 0.2),
    "cookies": (6.6, 2.5),
    "subscribe": (7.0, 0.6),
}
OTHER = {
    "chancellor": (0.3, 0.5),
    "spoke": (0.8, 2.0),
    "journalists": (2.4, 1.4),
    "berlin": (3.1, -0.4),
}
PAGE = ("cookies", "subscribe")
EPSILON = 1.0  # of the loss, in units of the largest cost
PROBLEMS = {
    "balanced": {},
    "partial=2/3": {"partial": 2 / 3},  # four of six words
    # Moving mass over more than about 2ρ costs more than to lose it.
    "unbalanced=0.7": {"unbalanced": 0.7, "solver": "sinkhorn"},
}


def draw(plans, path):
    """The words at their points, and lines as wide as the mass that moves."""
    figure = require("matplotlib.figure").Figure(
        figsize=(11, 3.3), dpi=100, layout="constrained"
    )
    axes = figure.subplots(1, len(plans), sharex=True, sharey=True)
    for axis, (name, plan) in zip(axes, plans.items(), strict=True):
        for start, row in zip(SENTENCE.values(), plan, strict=True):
            for end, mass in zip(OTHER.values(), row, strict=True):
                if mass > 0.005:
                    line = np.transpose([start, end])
                    axis.plot(*line, color="0.6", linewidth=40 * mass)
        for words, color in ((SENTENCE, "C0"), (OTHER, "C1")):
            axis.plot(*np.transpose([*words.values()]), "o", color=color)
            for word, point in words.items():
                axis.annotate(
                    word,
                    point,
                    (0, 6 if words is SENTENCE else -13),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    color=color,
                )
        axis.set_title(name)
        axis.set_xlim(-1.2, 8)
        axis.set_ylim(-1.2, 3.2)
        axis.set_xticks([])
        axis.set_yticks([])
    return report.save_figure(figure, path)


def train(words, steps, **options):
    """Where words go that a loss draws to themselves."""
    embedding = keras.layers.Embedding(*words.shape, weights=[words])
    tokens = keras.Input((len(words),), dtype="int32")
    goal = keras.Input(words.shape)
    loss = WordMoverDistance(**options)([embedding(tokens), goal])
    model = keras.Model([tokens, goal], ops.expand_dims(loss, -1))
    model.compile(
        keras.optimizers.SGD(0.2),
        lambda target, loss: loss,
        jit_compile=keras.backend.backend() == "jax",
    )
    numbers = np.arange(len(words))[None].repeat(steps, axis=0)
    goals = words[None].repeat(steps, axis=0)
    model.fit([numbers, goals], np.zeros(steps), batch_size=1, verbose=0)
    return ops.convert_to_numpy(embedding.embeddings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", help="a folder for the figure")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    x, y = (np.array([*words.values()]) for words in (SENTENCE, OTHER))
    own = np.array([word not in PAGE for word in SENTENCE])

    rows, plans = [], {}
    for name, options in PROBLEMS.items():
        plan = transport_plan(x, y, None, "euclidean", "uniform", **options)
        plans[name] = plan = np.asarray(plan)
        moved = plan.sum(1)
        rows.append(
            [
                name,
                float(word_mover_distance(x, y, **options)),
                float(moved[own].sum()),
                float(moved[~own].sum()),
            ]
        )
    report.print_table(
        ["problem", "distance", "moved of its own words", "of the page's"],
        rows,
        "One sentence, and the same one with words of its page",
    )
    if args.output:
        path = os.path.join(args.output, "partial_transport.png")
        print("Figure:", draw(plans, path))

    rows = []
    for name, debiased in (("Sinkhorn", False), ("debiased", True)):
        options = {"regularization": EPSILON, "debiased": debiased}
        value = word_mover_distance(y, y, solver="sinkhorn", **options)
        trained = train(y, args.steps, **options)
        size, target = (np.linalg.norm(z - z.mean(0)) for z in (trained, y))
        rows.append([name, abs(float(value)), float(size / target)])
    report.print_table(
        ["loss", "to itself", "size after training, times the target's"], rows
    )


if __name__ == "__main__":
    main()
