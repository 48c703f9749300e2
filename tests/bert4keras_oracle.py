"""Computes with bert4keras what the tests compare between two Kerases.

The same functions run in two processes: in the tests on Keras 3, through the
bridge, and here as a script on tf_keras, for which bert4keras was written.
They use only names that bert4keras and both Kerases have.
"""

import functools
import os
import subprocess
import sys
import tempfile
import zlib

import numpy as np

CONFIG = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "max_position": 40,
}

# Arguments of build_transformer_model, by the name of the case.
MODELS = {
    "bert": {},
    "roberta": {"with_mlm": True},
    "albert": {"embedding_size": 16},
    "electra": {"with_discriminator": True},
    "nezha": {},
    "roformer": {"with_mlm": "linear"},
}


def generator(name):
    """Returns random numbers that depend on the name only."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def randomize(model):
    """Gives every weight a value that depends on its layer's name only."""
    for layer in model.layers:
        rng = generator(layer.name)
        layer.set_weights(
            [
                rng.normal(0.02, 0.2, w.shape).astype("float32")
                for w in layer.get_weights()
            ]
        )


def padded_batch(model, lengths=(9, 6, 3)):
    """Returns inputs of several lengths, padded with zeros."""
    rows, columns = len(lengths), max(lengths)
    steps = np.arange(columns)[None]
    valid = steps < np.array(lengths)[:, None]
    batch = []
    for tensor in model.inputs:
        name = tensor.name.split(":")[0]
        rng = generator(name)
        if len(tensor.shape) == 3:
            x = rng.normal(size=(rows, columns, tensor.shape[-1]))
        elif tensor.shape[-1] is not None:
            x = rng.normal(size=(rows, tensor.shape[-1]))
        elif "Segment" in name:
            x = valid * (steps >= np.array(lengths)[:, None] // 2)
        elif "Position" in name:
            x = valid * (steps[:, ::-1] * 2)
        else:
            x = valid * rng.integers(1, 50, (rows, columns))
        batch.append(x.astype("float32"))
    return batch


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def outputs_and_gradients(model, name):
    """Returns the outputs and the gradient of each weight on a padded batch."""
    import tensorflow as tf

    result = {}
    inputs = [tf.constant(x) for x in padded_batch(model)]
    inputs = inputs if len(inputs) > 1 else inputs[0]
    with tf.GradientTape(persistent=True) as tape:
        outputs = as_list(model(inputs, training=False))
        loss = 0.0
        for i, y in enumerate(outputs):
            weights = generator(f"output {i}").normal(size=y.shape)
            loss += tf.reduce_sum(y * tf.constant(weights, y.dtype))
            result[f"{name}/output/{i}"] = y.numpy()
    for layer in model.layers:
        gradients = tape.gradient(loss, layer.trainable_weights)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                key = f"{name}/gradient/{layer.name}/{i}"
                result[key] = tf.convert_to_tensor(gradient).numpy()
    return result


def build(name, **kwargs):
    """Builds the model of a case, with its weights set."""
    from bert4keras.models import build_transformer_model

    arguments = {"model": name.split(" ")[0], **MODELS[name], **kwargs}
    model = build_transformer_model(**{**CONFIG, **arguments})
    randomize(getattr(model, "model", model))
    return model


def run_model(name):
    return outputs_and_gradients(build(name), name)


@functools.cache
def reference():
    """Returns all results of tf_keras, computed once in another process."""
    environment = {
        **os.environ,
        "TF_KERAS": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "reference.npz")
        subprocess.run(
            [sys.executable, __file__, path], env=environment, check=True
        )
        with np.load(path) as file:
            return dict(file)


def main(path):
    results = {}
    for name in MODELS:
        results.update(run_model(name))
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
