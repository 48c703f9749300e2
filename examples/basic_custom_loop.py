"""Adversarial training in a training loop of your own, on both backends.

`adversarial_loss` is the method as a function of a batch: differentiated by
`tf.GradientTape` or by `jax.grad` it gives the gradients of `fit`. A sentence
of made-up words praises if it has more good than bad ones.

`--method` takes another method by name: "pgd", "trades", "gradient_penalty".

Blog: 对抗训练浅谈：意义、方法和思考, https://kexue.fm/archives/7234
"""

import argparse

import keras
import numpy as np
from keras import layers

from blogkeras import adversarial_loss
from blogkeras.adversarial import METHODS

VOCABULARY, LENGTH, BATCH = 100, 12, 64


def make_data(size, rng):
    """Returns sentences of words 1 to 99 (10 good, 10 bad) and labels."""
    x = rng.integers(1, VOCABULARY, (2 * size, LENGTH)).astype("int32")
    score = (x <= 10).sum(1) - ((x > 10) & (x <= 20)).sum(1)
    x, score = x[score != 0], score[score != 0]
    return x[:size], (score[:size] > 0).astype("int32")


def make_model():
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(VOCABULARY, 16, name="embedding"),
            layers.GlobalAveragePooling1D(),
            layers.Dropout(0.1),
            layers.Dense(32, activation="relu"),
            layers.Dense(2),
        ]
    )


def batches(x, y, epochs):
    for _ in range(epochs):
        for start in range(0, len(x), BATCH):
            yield x[start : start + BATCH], y[start : start + BATCH]


def train_with_tensorflow(model, loss, optimizer, data):
    """The step as a `tf.function`; returns the parts of the last loss."""
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            result = loss(x, y, step=optimizer.iterations)
        variables = model.trainable_variables
        gradients = tape.gradient(result.loss, variables)
        optimizer.apply(gradients, variables)
        return result.parts

    for x, y in data:
        parts = step(tf.constant(x), tf.constant(y))
    return parts


def train_with_jax(model, loss, optimizer, data):
    """The step as a pure function; returns the parts of the last loss."""
    import jax

    def loss_of(trainable, state, x, y, number):
        result, state = loss.stateless(trainable, state, x, y, step=number)
        return result.loss, (result.parts, state)

    @jax.jit
    def step(trainable, state, slots, x, y, number):
        (_, (parts, state)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(trainable, state, x, y, number)
        trainable, slots = optimizer.stateless_apply(
            slots, gradients, trainable
        )
        return trainable, state, slots, parts

    optimizer.build(model.trainable_variables)
    values = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]
    for number, (x, y) in enumerate(data):
        *values, parts = step(*values, x, y, number)
    for variable, value in zip(
        model.trainable_variables, values[0], strict=True
    ):
        variable.assign(value)
    return parts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=METHODS, default="fgm")
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = make_data(256, rng)
    test_x, test_y = make_data(512, rng)

    model = make_model()
    loss = adversarial_loss(
        model,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        arguments.method,
    )
    train = {"tensorflow": train_with_tensorflow, "jax": train_with_jax}
    parts = train[keras.backend.backend()](
        model,
        loss,
        keras.optimizers.Adam(1e-2),
        batches(x, y, arguments.epochs),
    )
    for name, value in parts.items():
        print(f"{name}: {float(value):.3f}")
    predicted = model.predict(test_x, verbose=0).argmax(-1)
    accuracy = float(np.mean(predicted == test_y))
    print(f"Accuracy on new sentences: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
