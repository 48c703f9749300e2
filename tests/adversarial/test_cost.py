"""Operations of a step, counted by XLA."""

import keras
import numpy as np
import pytest
from keras import layers
from kit import TENSORFLOW

from blogkeras import FGM, training


def flops(hook):
    """XLA's count for a step of 2 layers of the benchmark's transformer.

    Of the program as it is handed to the compiler: 0.2 % less than after it.
    """
    import jax

    keras.utils.set_random_seed(0)
    tokens = keras.Input((64,), dtype="int32")
    h = layers.Embedding(21128, 384)(tokens)
    for _ in range(2):
        a = layers.MultiHeadAttention(12, 32)(h, h)
        h = layers.LayerNormalization()(layers.Add()([h, a]))
        f = layers.Dense(384)(layers.Dense(1536, "gelu")(h))
        h = layers.LayerNormalization()(layers.Add()([h, f]))
    h = layers.GlobalAveragePooling1D()(h)
    model = keras.Model(tokens, layers.Dense(2, activation="softmax")(h))
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy")
    x, y = np.zeros((32, 64), "int32"), np.zeros((32,), "int32")
    model.optimizer.build(model.trainable_variables)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    step = model.train_step
    if hook:
        hook = hook(model)

        def step(state, data):
            return training.make_step(hook)(model, state, data)

    return jax.jit(step).lower(state, (x, y)).cost_analysis()["flops"]


def test_cost_in_operations():
    """Forward, dX and dW are alike: 3 units, and 2 for the attack: 5/3."""
    if TENSORFLOW:
        pytest.skip("JAX tells the cost of a compiled program")
    plain = flops(None)
    assert flops(lambda model: lambda o, w: o.value_and_grad(o, w)) == plain
    ratio = flops(lambda model: FGM(0.5).hook(model, None)) / plain
    assert 1.5 < ratio <= 1.70
    output = FGM(0.5, site="output").hook
    assert flops(lambda model: output(model, None)) / plain <= 1.70
