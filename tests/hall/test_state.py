"""Draws numbered from a saved count, alike on one and on two replicas."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import replicated, value

from blogkeras import state


@keras.saving.register_keras_serializable(package="blogkeras_tests")
class Noise(layers.Layer):
    """Adds noise in training, drawn twice a step."""

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.seed = seed
        self.draws = state.NumberedDraws(self, seed)

    def call(self, x, training=False):
        if not training:
            return x
        seed = self.draws.next_step()
        first, second = (
            state.draw_rows(keras.random.normal, ops.shape(x), seed)
            for _ in range(2)
        )
        return x + first * second

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def noisy():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(1)(Noise(seed=7)(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def test_steps_and_draws_differ_and_repeat():
    layer = Noise(seed=1)
    x = ops.zeros((4, 3))
    first, second = (value(layer(x, training=True)) for _ in range(2))
    assert np.abs(first - second).min() > 0
    layer.draws.iterations.assign(0)
    np.testing.assert_array_equal(value(layer(x, training=True)), first)
    seed = layer.draws.next_step()
    pairs = [value(seed.next()).tolist() for _ in range(2)]
    assert pairs == [[1, 1], [1 + 0x9E3779B9, 1]]


def test_neighbouring_seeds_share_no_draw():
    """Runs of seeds 0, 1, 2 … are to be independent of one another."""
    top = 2**31 - 1
    keys = [
        [value(seeds.next(), "int64") % 2**32 for _ in range(40)]
        for seed in (0, 1, 2, 3, top - 1, top)
        for seeds in (
            state.StepSeed(seed, 7),
            state.StepSeed(ops.convert_to_tensor(seed, "int32"), 7),
        )
    ]
    # A number and a tensor of it give the same keys.
    np.testing.assert_array_equal(keys[::2], keys[1::2])
    assert len({tuple(key) for draws in keys for key in draws}) == 6 * 40


def test_streams_of_neighbouring_seeds_share_no_draw():
    """A stream by a number and by a tensor of it is the same."""
    keys = []
    for seed in (0, 1, 2, 3, 2**31 - 1):
        seed = ops.convert_to_tensor(seed, "int32")
        for number in range(40):
            stream = state.stream_seed(seed, number)
            again = state.stream_seed(seed, ops.convert_to_tensor(number))
            assert int(stream) == int(again)
            seeds = state.StepSeed(stream, 7)
            keys += [tuple(value(seeds.next()).tolist()) for _ in range(10)]
    assert len(set(keys)) == len(keys) == 5 * 40 * 10


def test_two_owners_without_a_seed_differ():
    seeds = {int(value(Noise().draws.seed)) for _ in range(4)}
    assert len(seeds) == 4


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Four epochs, or two, saved, loaded and two more."""
    x, y = toy.DENSE[:16], toy.TARGETS[:16]
    toy.reset()
    whole = noisy()
    whole.fit(x, y, epochs=4, batch_size=8, shuffle=False, verbose=0)
    toy.reset()
    part = noisy()
    part.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
    part.save(tmp_path / "part.keras")
    toy.reset()
    part = keras.saving.load_model(tmp_path / "part.keras")
    part.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
    assert toy.difference(toy.weights(whole), toy.weights(part)) == 0


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
def test_replicas_share_the_noise_of_a_batch():
    x, y = toy.DENSE[:16], toy.TARGETS[:16]
    weights = []
    for make in (noisy, lambda: replicated(noisy)):
        toy.reset()
        model = make()
        model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
        weights.append(toy.weights(model))
    assert toy.difference(*weights) <= 1e-6
