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
RNG = np.random.default_rng(0)
STEP = RNG.dirichlet(np.full(VOCABULARY, 0.3), VOCABULARY)
STATIONARY = np.linalg.matrix_power(STEP, 500)[0]
# p(middle | left, right), (left, right, middle)
EXACT = STEP[:, None, :] * STEP.T[None, :, :]
EXACT /= EXACT.sum(-1, keepdims=True)
COUNT = VOCABULARY + 3


def draw(p):
    return (p.cumsum(-1) > RNG.random((len(p), 1))).argmax(-1)


def chains(number):
    left = RNG.choice(VOCABULARY, number, p=STATIONARY)
    middle = draw(STEP[left])
    return np.stack([left, middle, draw(STEP[middle])], 1).astype("int32")


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
    """Sees all three tokens in their places, at the middle position."""
    ids = keras.Input((3,), dtype="int32", name="token_ids")
    h = layers.Embedding(COUNT, 32)(ids)
    h = layers.Reshape((1, 96))(h)
    for _ in range(2):
        h = layers.Dense(256, "gelu")(h)
    h = layers.LayerNormalization()(h)
    return keras.Model(ids, layers.UpSampling1D(3)(h))


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def auc(score, label):
    from scipy.stats import rankdata

    rank, n = rankdata(score), label.sum()
    return (rank[label].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


def train(labels, steps, batch):
    keras.utils.set_random_seed(0)
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
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(2e-3, steps)
        ),
        jit_compile=True,
    )
    model.fit(chains(steps * batch), batch_size=batch, verbose=0)
    # Fresh chains, changed as in training.
    ids = chains(400_000)
    p = EXACT[ids[:, 0], ids[:, 2]]
    masked = RNG.random(len(ids)) < RATE
    new = ids.copy()
    new[masked, 1] = draw(p[masked])
    label = masked if labels == "generated" else new[:, 1] != ids[:, 1]
    best = RATE * (1 - p[np.arange(len(ids)), new[:, 1]])
    found = model.detect_replaced(new, batch_size=4096)[:, 1]
    found = np.clip(found, 1e-7, 1 - 1e-7)
    loss = -np.log(np.where(label, found, 1 - found)).mean()
    return found, loss, label, np.clip(best, 1e-12, None)


@pytest.mark.verify
def test_told_what_was_generated_it_stays_at_chance():
    found, loss, label, _ = train("generated", 1500, 1024)
    assert abs(auc(found, label) - 0.5) <= 0.01
    assert abs(loss - entropy(RATE)) <= 0.002


@pytest.mark.verify
def test_told_what_was_replaced_it_reaches_the_bayes_rule():
    found, loss, label, best = train("replaced", 3000, 1024)
    bayes = -np.log(np.where(label, best, 1 - best)).mean()
    assert auc(best, label) == pytest.approx(0.64, abs=0.01)
    assert auc(found, label) > 0.62
    assert loss - bayes <= 0.005
    # Far from the best constant.
    assert entropy(label.mean()) - loss > 0.005


def test_the_bayes_rule_beats_chance_on_this_chain():
    """m (1 - p(token | context)): AUC .64 and .2963 nats against .3077."""
    ids = chains(200_000)
    p = EXACT[ids[:, 0], ids[:, 2]]
    masked = RNG.random(len(ids)) < RATE
    new = np.where(masked, draw(p), ids[:, 1])
    label = new != ids[:, 1]
    best = RATE * (1 - p[np.arange(len(ids)), new])
    assert auc(best, label) == pytest.approx(0.639, abs=0.01)
    assert auc(best, masked) == pytest.approx(0.5, abs=0.01)
    best = np.clip(best, 1e-12, None)
    bayes = -np.log(np.where(label, best, 1 - best)).mean()
    assert bayes == pytest.approx(0.2963, abs=0.004)
    assert entropy(label.mean()) == pytest.approx(0.3077, abs=0.004)
