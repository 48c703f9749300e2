"""What ELECTRA's discriminator can learn from a perfect generator.

Sentences are Markov chains: each word depends on the one before it, so the
distribution of a word given its neighbours is known exactly. A generator that
knows it replaces one word in six. A discriminator that is trained to detect the
*generated* words stays at chance, as the post says: words drawn from the true
distribution cannot be told from the others. A discriminator that is trained to
detect the *replaced* words, as in ELECTRA, does better. A word that fits badly
is rarely the original, and the best prediction is m (1 - p(word | context))
with m = 1/6. The figure shows the probabilities of both discriminators over
this rule. It takes less than a minute.

Blog: 用ALBERT和ELECTRA之前，请确认你真的了解它们,
https://kexue.fm/archives/7846
"""

import argparse

import keras
import numpy as np
from keras import layers, ops

from blogkeras import ElectraPretrainer, report

WORDS, LENGTH = 8, 6
CLS, SEP, MASK, PAD = WORDS, WORDS + 1, WORDS + 2, WORDS + 3
VOCABULARY = WORDS + 4
RNG = np.random.default_rng(0)

# The chain: FOLLOWS[i, j] is the probability of word j after word i.
FOLLOWS = np.zeros((VOCABULARY, VOCABULARY))
FOLLOWS[:WORDS, :WORDS] = RNG.dirichlet(np.full(WORDS, 0.3), WORDS)
FOLLOWS[CLS, :WORDS] = 1 / WORDS  # the first word
FOLLOWS[:WORDS, SEP] = 1  # the end does not depend on the last one
# EXACT[left, right, word] = p(word | its neighbours)
EXACT = FOLLOWS[:, None, :] * FOLLOWS.T[None, :, :]
EXACT /= np.maximum(EXACT.sum(-1, keepdims=True), 1e-30)
LOGITS = np.log(np.maximum(EXACT, 1e-30)).astype("float32")


def sentences(count):
    """`[CLS] word … word [SEP]`."""
    ids = np.full((count, LENGTH + 2), CLS)
    ids[:, -1] = SEP
    for place in range(1, LENGTH + 1):
        p = FOLLOWS[ids[:, place - 1], :WORDS].cumsum(-1)
        ids[:, place] = (p > RNG.random((count, 1))).argmax(-1)
    return ids.astype("int32")


@keras.saving.register_keras_serializable(package="examples")
def perfect_generator(ids, positions):
    """The exact logits at the masked positions."""
    left, right = (
        ops.take_along_axis(ids, positions + side, axis=1) for side in (-1, 1)
    )
    table = ops.reshape(ops.convert_to_tensor(LOGITS), [-1, VOCABULARY])
    return ops.take(table, left * VOCABULARY + right, axis=0)


def encoder():
    ids = keras.Input((LENGTH + 2,), dtype="int32", name="token_ids")
    h = layers.Embedding(VOCABULARY, 16)(ids)
    h = layers.Conv1D(256, 3, padding="same", activation="gelu")(h)
    h = layers.Dense(128, activation="gelu")(h)
    return keras.Model(ids, h)


def auc(score, label):
    """The probability that a replaced word has a higher score than another."""
    order = np.sort(score)
    # Equal scores share the mean of their ranks.
    rank = np.searchsorted(order, score) + np.searchsorted(
        order, score, side="right"
    )
    n = label.sum()
    return ((rank[label] + 1).sum() / 2 - n * (n + 1) / 2) / (
        n * (len(score) - n)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--output", help="file for the figure, .png or .svg")
    options = parser.parse_args()

    # To compare with the rule: new sentences, each with one word drawn anew.
    ids = sentences(4000)
    rows, place = np.arange(len(ids)), RNG.integers(1, LENGTH + 1, len(ids))
    p = EXACT[ids[rows, place - 1], ids[rows, place + 1]]
    new = ids.copy()
    new[rows, place] = (p.cumsum(-1) > RNG.random((len(p), 1))).argmax(-1)
    generated = np.zeros(ids.shape, bool)
    generated[rows, place] = True
    fit = EXACT[new[:, :-2], new[:, 2:], new[:, 1:-1]]  # p(word | context)
    rule = ((1 - fit) / LENGTH).ravel()

    table, found = [], {}
    for labels in ("replaced", "generated"):
        keras.utils.set_random_seed(0)
        model = ElectraPretrainer(
            perfect_generator,
            encoder(),
            mask_token=MASK,
            special_tokens=[CLS, SEP],
            pad_token=PAD,
            labels=labels,
            seed=0,
        )
        rate = keras.optimizers.schedules.CosineDecay(5e-3, options.steps)
        model.compile(keras.optimizers.Adam(rate), jit_compile=True)
        model.fit(sentences(options.steps * 128), batch_size=128, verbose=0)
        truth = {"replaced": new != ids, "generated": generated}[labels]
        truth = truth[:, 1:-1].ravel()
        guess = model.detect_replaced(new, batch_size=1000)[:, 1:-1].ravel()
        found[labels] = guess
        constant = np.full(guess.shape, truth.mean())
        best = rule if labels == "replaced" else constant
        for name, q in (
            ("discriminator", guess),
            ("the best rule", best),
            ("the best constant", constant),
        ):
            q = np.clip(q, 1e-7, 1 - 1e-7)
            loss = -np.log(np.where(truth, q, 1 - q)).mean()
            table.append([labels, name, float(loss), float(auc(q, truth))])
    report.print_table(
        ["labels", "prediction", "nats per word", "AUC"],
        table,
        "What can be detected beside a perfect generator",
    )
    if options.output:
        print(draw(rule, found, options.output))


def draw(rule, found, path):
    """Mean probabilities over the Bayes rule, in bins of equally many words."""
    bins = np.array_split(np.argsort(rule), 12)
    lines = {
        f'labels="{name}"': [guess[i].mean() for i in bins]
        for name, guess in found.items()
    }
    x = [rule[i].mean() for i in bins]
    return report.line_figure(
        path,
        x,
        {**lines, "m (1 - p(word | context))": x},
        "m (1 - p(word | context)), the Bayes rule of replaced words",
        "the discriminator's probability",
        "Discriminators beside a perfect generator",
    )


if __name__ == "__main__":
    main()
