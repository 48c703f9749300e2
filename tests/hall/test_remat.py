"""What is computed again for the gradient, with layers that have state."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import jax_only, products, value

from blogkeras import backend

X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")


def make():
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(4, "tanh")
    norm = keras.layers.BatchNormalization(momentum=0.5)
    dense.build((None, 3))
    norm.build((None, 4))
    return dense, norm


def gradients(again):
    dense, norm = make()

    def block(x):
        return norm(dense(x), training=True)

    def loss(x):
        y = backend.remat(block, [dense, norm], x) if again else block(x)
        return ops.sum(ops.power(y, 3)), y

    x = ops.convert_to_tensor(X)
    if backend.BACKEND == "tensorflow":
        # As in a step, where variables are watched, too.
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            total, y = loss(x)
        weights = [v.value for v in dense.trainable_variables]
        grads = tape.gradient(total, [x, *weights])
    else:
        (_, y), grads = backend.value_and_grad(lambda xs: loss(xs[0]), [x])
    state = [value(v) for v in norm.non_trainable_variables]
    return value(y), [value(g) for g in grads], state


def test_the_same_numbers_and_state_assigned_once():
    if backend.BACKEND == "jax":
        pytest.skip("JAX cannot assign state inside a gradient")
    for again, plain in zip(gradients(True), gradients(False), strict=True):
        for a, b in zip(again, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_in_training(again):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = make()

        def call(self, x, training=None):
            def block(x):
                return self.norm(self.dense(x), training=training)

            if again and training:
                return backend.remat(block, [self.dense, self.norm], x)
            return block(x)

    model = Model()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    model.build((None, 3))
    start = [value(w) for w in model.trainable_variables]
    h = np.tanh(X @ start[0] + start[1])
    model.train_on_batch(X, np.ones((6, 4)))
    # The moving mean has moved once: half the way from 0.
    np.testing.assert_allclose(
        value(model.norm.moving_mean), h.mean(0) / 2, rtol=1e-4, atol=1e-6
    )
    # By the chain rule, with γ = 1 and β = 0: dL/dβ = 2 mean(y − 1).
    y = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3)
    slope = 2 * (y - 1).sum(0) / y.size
    np.testing.assert_allclose(
        value(model.norm.beta), -0.1 * slope, rtol=1e-3, atol=1e-6
    )
    assert abs(value(model.dense.kernel) - start[0]).max() > 1e-5


def test_losses_inside_are_refused():
    layer = keras.layers.ActivityRegularization(l2=1.0)
    layer.build((None, 3))
    with pytest.raises(ValueError, match="add_loss"):
        backend.remat(layer, [layer], ops.convert_to_tensor(X))


@jax_only
def test_the_gradient_computes_again():
    """By the products of the program: XLA's CPU merges them again."""
    import jax

    counts = {}
    for again in (False, True):
        blocks = [keras.layers.Dense(8, "tanh") for _ in range(3)]
        for block in blocks:
            block.build((None, 8))

        def loss(x, blocks=blocks, again=again):
            for block in blocks:
                x = backend.remat(block, [block], x) if again else block(x)
            return ops.sum(ops.square(x))

        program = jax.jit(jax.grad(loss)).lower(ops.zeros((2, 8))).as_text()
        counts[again] = len(products(program))
    # One forward and one backward; one more where it is computed again.
    assert counts == {False: 6, True: 9}
