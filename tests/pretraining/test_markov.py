"""The post's argument on a chain whose best discriminator is known.

Post 7846.

Three tokens of a Markov chain; the middle one is drawn anew, with probability
m = 0.15, from its exact distribution given its neighbours.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

from blogkeras import ElectraPretrainer, TokenMasking

VOCABULARY, RATE, MASK = 20, 0.15, 22  # padding is 20, and 21 not used
STEP = np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.3), VOCABULARY)
STATIONARY = np.linalg.matrix_power(STEP, 500)[0]
# p(middle | left, right), (left, right, middle)
EXACT = STEP[:, None, :] * STEP.T[None, :, :]
EXACT /= EXACT.sum(-1, keepdims=True)
COUNT = VOCABULARY + 3


def draw(rng, p):
    return (p.cumsum(-1) > rng.random((len(p), 1))).argmax(-1)


def chains(rng, number):
    left = rng.choice(VOCABULARY, number, p=STATIONARY)
    middle = draw(rng, STEP[left])
    chain = np.stack([left, middle, draw(rng, STEP[middle])], 1)
    return chain.astype("int32")


def redrawn(rng, number):
    """Chains, whether their middle is drawn anew, and what the rule says.

    Returns:
        `(original, new, masked, best)`; `best` is m (1 - p(middle | ends)).
    """
    ids = chains(rng, number)
    p = EXACT[ids[:, 0], ids[:, 2]]
    masked = rng.random(number) < RATE
    new = ids.copy()
    new[:, 1] = np.where(masked, draw(rng, p), ids[:, 1])
    best = RATE * (1 - p[np.arange(number), new[:, 1]])
    return ids, new, masked, np.clip(best, 1e-12, None)


@keras.saving.register_keras_serializable(package="tests")
def perfect(ids, positions):
    """The exact logits; the ends are never masked."""
    table = np.full((VOCABULARY, VOCABULARY, COUNT), -np.inf, "float32")
    table[..., :VOCABULARY] = np.log(np.maximum(EXACT, 1e-30))
    table = ops.convert_to_tensor(table.reshape(-1, COUNT))
    return ops.take(table, ids[:, 0] * VOCABULARY + ids[:, 2], axis=0)[:, None]


class MiddleMasking(TokenMasking):
    """Chooses the middle, in a share `RATE` of the sequences."""

    def _choose(self, ids, words, seed):
        rows = ops.shape(ids)[0]
        u = keras.random.uniform((rows, 1), seed=seed)
        positions = ops.ones((rows, 1), "int32")
        return positions, ops.cast(u < RATE, "float32")


def discriminator():
    """Sees all three tokens at the middle position, and nothing at the ends.

    The ends are never drawn anew. If all three positions had the vector of the
    middle, they would get one probability, though only the middle is replaced.
    """
    ids = keras.Input((3,), dtype="int32", name="token_ids")
    h = layers.Embedding(COUNT, 32)(ids)
    h = layers.Reshape((1, 96))(h)
    for _ in range(2):
        h = layers.Dense(128, "gelu")(h)
    return keras.Model(ids, layers.ZeroPadding1D(1)(h))


def auc(score, label):
    from scipy.stats import rankdata

    rank, n = rankdata(score), label.sum()
    return (rank[label].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


def entropy(p):
    p = np.maximum(p, 1e-300)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def cross_entropy(p, label):
    p = np.clip(np.float64(p), 1e-7, 1 - 1e-7)
    return -np.log(np.where(label, p, 1 - p)).mean()


def train(labels, steps, batch=1024, rate=3e-3):
    """The discriminator's probabilities on new chains, the labels, the rule."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(1)
    model = ElectraPretrainer(
        perfect,
        discriminator(),
        masking=MiddleMasking(
            COUNT, MASK, mask_token_rate=1, random_token_rate=0, pad_token=20
        ),
        discriminator_weight=3.0,
        labels=labels,
        pad_token=20,
        seed=0,
    )
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), jit_compile=True)
    model.fit(chains(rng, steps * batch), batch_size=batch, verbose=0)
    ids, new, masked, best = redrawn(rng, 400_000)
    label = masked if labels == "generated" else new[:, 1] != ids[:, 1]
    found = model.detect_replaced(new, batch_size=4096)[:, 1]
    return found, label, best


# The losses are compared on the same chains. Their own deviation over 400,000
# chains is .001, half of what the first test allows.


@pytest.mark.verify
def test_told_what_was_generated_it_stays_at_chance():
    found, label, _ = train("generated", 1000)
    assert abs(auc(found, label) - 0.5) <= 0.01
    loss, constant = (cross_entropy(p, label) for p in (found, RATE))
    assert abs(loss - constant) <= 0.002


@pytest.mark.verify
def test_told_what_was_replaced_it_reaches_the_bayes_rule():
    found, label, best = train("replaced", 3000)
    loss, bayes, constant = (
        cross_entropy(p, label) for p in (found, best, label.mean())
    )
    assert auc(best, label) == pytest.approx(0.64, abs=0.01)
    assert auc(found, label) > 0.6
    assert loss - bayes <= 0.005
    assert constant - loss > 0.005


def test_the_bayes_rule_beats_chance_on_this_chain():
    """Its AUC and losses, exactly: by sums over all chains."""
    # P(left, right, middle), and P(replaced | left, right, middle): a middle
    # that is drawn anew has the distribution of the original one.
    p = STATIONARY[:, None, None] * STEP[:, None, :] * STEP.T[None, :, :]
    best = RATE * (1 - EXACT)
    order = np.argsort(best, axis=None)
    replaced, original = (
        (p * share).ravel()[order] for share in (best, 1 - best)
    )
    below = np.cumsum(original) - original / 2
    exact = (replaced * below).sum() / (replaced.sum() * original.sum())
    assert exact == pytest.approx(0.6394, abs=1e-4)
    assert (p * entropy(best)).sum() == pytest.approx(0.29656, abs=1e-5)
    assert entropy(replaced.sum()) == pytest.approx(0.30807, abs=1e-5)
    # Who was masked cannot be told from the rule: P(masked | chain) = m.
    _, _, masked, score = redrawn(np.random.default_rng(2), 200_000)
    assert auc(score, masked) == pytest.approx(0.5, abs=0.01)
