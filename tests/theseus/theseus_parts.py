"""Modules and models that the tests of Theseus share."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import value

from blogkeras import backend
from blogkeras.theseus import ModuleReplacement, Theseus

ON_TENSORFLOW = backend.BACKEND == "tensorflow"
MODES = ("batch", "sample", "mixing", "annealing")
X = toy.DENSE[:16]
Y = toy.LABELS[:16]
# TensorFlow warns of weights without a gradient, such as those of a branch that
# does not run.
no_gradient = pytest.mark.filterwarnings("ignore:Gradients do not exist")


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


def dense(units=3, **kwargs):
    kwargs.setdefault("kernel_initializer", "random_normal")
    return built(layers.Dense(units, "tanh", **kwargs), 3)


def exact():
    """A layer with small multiples of 1/8, whose sums are exact in float32."""
    layer = built(layers.Dense(3, "relu"), 3)
    layer.set_weights([np.round(8 * w) / 8 for w in layer.get_weights()])
    return layer


def constants(rate, mode="batch", seed=0):
    """A module that returns 0 for the predecessor, 1 for the successor."""
    zero, one = (
        built(layers.Dense(1, kernel_initializer=k), 1)
        for k in ("zeros", "ones")
    )
    return built(ModuleReplacement(zero, one, rate, mode, seed=seed), 1)


def several_modules(rate, count, seed):
    """Modules of one Theseus that return 0 or 1, as `constants`."""
    zeros, ones = (
        [built(layers.Dense(1, kernel_initializer=k), 1) for _ in range(count)]
        for k in ("zeros", "ones")
    )
    theseus = Theseus(zeros, ones, replacement_rate=rate, seed=seed)
    theseus.build((None, 1))
    return theseus.replacements


def draws(module, count, size=1):
    """Outputs for inputs of 1 in `count` successive training steps."""
    fixed = [v.value for v in module.trainable_variables]
    state = [v.value for v in module.non_trainable_variables]

    def step(state):
        outputs, state = module.stateless_call(
            fixed, state, ops.ones((size, 1)), training=True
        )
        return outputs[:, 0], state

    step = backend.jit(step)
    found = []
    for _ in range(count):
        outputs, state = step(state)
        found.append(value(outputs))
    return np.array(found)


def stack(name, **kwargs):
    """Layers with dropout, moving averages and a loss of their own."""
    return built(
        keras.Sequential(
            [
                layers.Dense(3, name=f"{name}_dense"),
                layers.BatchNormalization(name=f"{name}_normalization"),
                layers.Dropout(0.4, seed=5, name=f"{name}_dropout"),
                toy.ActivityLoss(name=f"{name}_loss"),
            ],
            name=name,
        ),
        3,
    )


def two_modules(rate=0.5, mode="batch", seed=1, **kwargs):
    """A predecessor of two modules, a successor, and Theseus of both."""
    old = [[stack("old_a"), dense(name="old_b")], dense(name="old_c")]
    new = [stack("new_a"), dense(name="new_b")]
    head = built(layers.Dense(3, "softmax", name="head"), 3)
    return Theseus(old, new, head, rate, mode=mode, seed=seed, **kwargs)
