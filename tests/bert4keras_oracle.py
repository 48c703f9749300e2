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

# Arguments of build_transformer_model, by the name of the case, of which the
# first word is the name of the model.
MODELS = {
    "bert": {},
    "roberta": {"with_mlm": True},
    "albert": {"embedding_size": 16},
    "albert_unshared": {"embedding_size": 16},
    "electra": {"with_discriminator": True},
    "nezha": {},
    "roformer": {"with_mlm": "linear"},
    "roformer_v2": {"with_mlm": True},
    "gpt": {},
    "gpt2": {},
    "gpt2_ml": {},
}
for _version in ("t5", "t5.1.0", "t5.1.1", "mt5.1.1"):
    _act = ["gelu", "linear"] if _version.endswith("1.1") else "relu"
    for _part in ("", "_encoder", "_decoder"):
        MODELS[_version + _part] = {"hidden_act": _act}
for _name in (
    "bert",
    "roberta",
    "albert",
    "albert_unshared",
    "nezha",
    "roformer",
    "roformer_v2",
    "gpt",
):
    for _application in ("lm", "unilm")[_name == "gpt" :]:
        MODELS[f"{_name} {_application}"] = {"application": _application}
MODELS |= {
    "bert pool": {"with_pool": True},
    "bert pool linear": {"with_pool": "linear"},
    "bert nsp mlm": {"with_nsp": True, "with_mlm": True},
    "bert hierarchical": {"hierarchical_position": True, "max_position": 4},
    "bert custom positions": {"custom_position_ids": True},
    "bert keep tokens": {"keep_tokens": list(range(55))},
    "bert compound tokens": {"compound_tokens": [[1, 2], [3, 4]]},
    "bert residual": {"residual_attention_scores": True},
    "bert condition": {"condition": 8},
    "bert condition hidden": {
        "condition": 8,
        "layer_norm_cond_hidden_size": 5,
        "layer_norm_cond_hidden_act": "swish",
    },
    "bert prefix": {"prefix": "my-"},
    "bert shared segments": {"shared_segment_embeddings": True},
    "bert no segments": {"segment_vocab_size": 0},
    "bert sizes": {
        "embedding_size": 16,
        "attention_head_size": 12,
        "attention_key_size": 8,
    },
    "bert fixed length": {"sequence_length": 9},
    "bert tanh": {"hidden_act": "gelu_tanh"},
    "roformer custom positions": {"custom_position_ids": True},
    "gpt2 condition": {"condition": 8},
    "t5_encoder condition": {"condition": 8},
    "t5_decoder condition": {"condition": 8, "with_lm": "linear"},
    "t5.1.1_decoder hidden": {
        "with_lm": False,
        "cross_position_bias": False,
        "hidden_act": ["gelu", "linear"],
    },
    "t5.1.1_decoder embedding": {
        "embedding_size": 16,
        "hidden_act": ["gelu", "linear"],
    },
}
# What `make test` runs; `make verify` runs all.
QUICK = [
    "bert",
    "albert",
    "electra",
    "nezha",
    "roformer",
    "roformer_v2 unilm",
    "gpt2_ml",
    "t5.1.1",
    "bert lm",
    "bert nsp mlm",
    "bert residual",
    "bert condition hidden",
    "roformer custom positions",
]


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
        elif name == "Condition":
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
    from bert4keras.backend import keras
    from bert4keras.models import build_transformer_model

    arguments = {"model": name.split(" ")[0], **MODELS[name], **kwargs}
    if "condition" in arguments:
        shape = (arguments.pop("condition"),)
        condition = keras.layers.Input(shape=shape, name="Condition")
        arguments["layer_norm_cond"] = condition
        arguments["additional_input_layers"] = condition
    model = build_transformer_model(**{**CONFIG, **arguments})
    randomize(getattr(model, "model", model))
    return model


def run_model(name):
    return outputs_and_gradients(build(name), name)


@functools.cache
def reference(full=False):
    """Returns the results of tf_keras, computed once in another process."""
    environment = {
        **os.environ,
        "TF_KERAS": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    names = list(MODELS) if full else QUICK
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "reference.npz")
        command = [sys.executable, __file__, path, *names]
        subprocess.run(command, env=environment, check=True)
        with np.load(path) as file:
            return dict(file)


def main(path, *names):
    results = {}
    for name in names:
        results.update(run_model(name))
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
