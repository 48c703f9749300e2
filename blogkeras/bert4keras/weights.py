"""Weights of bert4keras models in the files of other libraries."""

import json
import pathlib

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf


def save_checkpoint(self, filename, mapping=None, dtype=None):
    """Writes the weights of a transformer as a TensorFlow checkpoint.

    It stands for `Transformer.save_weights_as_checkpoint`, which needs the
    sessions of TensorFlow 1. Variables of one name are told apart as there:
    `name`, `name_1`, ...

    Args:
        filename: String. The prefix of the files to write.
        mapping: Dictionary from layer names to lists of variable names.
            Defaults to that of the original checkpoints.
        dtype: String. Defaults to Keras's `floatx`.
    """
    values = {}
    for layer, names in (mapping or self.variable_mapping()).items():
        layer = self.layers.get(self.prefixed(layer))
        weights = getattr(layer, "trainable_weights", [])
        for name, weight in zip(names, weights, strict=False):
            value = keras.ops.convert_to_numpy(weight)
            _, value = self.create_variable(name, value, dtype)
            unique, count = name, 0
            while unique in values:
                count += 1
                unique = f"{name}_{count}"
            values[unique] = value.astype(dtype or keras.config.floatx())
    tf.raw_ops.SaveV2(
        prefix=str(filename),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )


class _Checkpoint(dict):
    """Arrays by their names in a TensorFlow checkpoint."""

    def __missing__(self, name):
        error = KeyError(f"The file has no {name}")
        error.message = error.args[0]  # printed by bert4keras
        raise error


def read_safetensors(path):
    """Reads a Hugging Face BERT or ELECTRA for `build_transformer_model`.

    Returns what bert4keras takes for a checkpoint: the arrays by the names of
    the original TensorFlow checkpoints. All options of bert4keras's loading
    (`keep_tokens`, `ignore_invalid_weights`, ...) apply.

    Args:
        path: String or path. The file `model.safetensors`, or its folder.

    Example:

    >>> from blogkeras.bert4keras import read_safetensors
    >>> from bert4keras.models import build_transformer_model
    >>> model = build_transformer_model(
    ...     "bert/config.json", read_safetensors("bert/model.safetensors")
    ... )
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", start)
    checkpoint = _Checkpoint()
    for name, item in header.items():
        if item["dtype"] in _DTYPES:
            begin, end = item["data_offsets"]
            array = data[begin:end].view(_DTYPES[item["dtype"]])
            array = array.reshape(item["shape"]).astype("float32")
            names, transposed = _tensorflow_names(name)
            for name in names:
                checkpoint[name] = array.T if transposed else array
    return checkpoint


_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}

# From Hugging Face to TensorFlow, in this order.
_RENAMED = (
    ("encoder.layer.", "encoder.layer_"),
    ("_embeddings.weight", "_embeddings"),
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
    ("cls.seq_relationship.weight", "cls.seq_relationship.output_weights"),
    ("cls.seq_relationship.bias", "cls.seq_relationship.output_bias"),
    ("cls.predictions.bias", "cls.predictions.output_bias"),
    ("predictions.dense_prediction.", "predictions.dense_1."),
)


def _tensorflow_names(name):
    """Returns the TensorFlow names, and whether the matrix is transposed."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    transposed = name.endswith(".weight")
    if transposed:
        name = name.removesuffix("weight") + "kernel"
    name = name.replace(".", "/")
    if name.startswith(("embeddings", "encoder/", "pooler/")):
        # An encoder without a head does not say of which model it is.
        return [f"bert/{name}", f"electra/{name}"], transposed
    return [name], transposed
