"""Weights of bert4keras models in the files of other libraries."""

import json
import os
import pathlib

import keras
import tensorflow as tf

from blogkeras.extras import require


def save_checkpoint(self, filename, mapping=None, dtype=None):
    """Writes the weights of a transformer as a TensorFlow checkpoint.

    It replaces `Transformer.save_weights_as_checkpoint`, which needs the
    sessions of TensorFlow 1. Variables of one name are distinguished in the
    same way: `name`, `name_1`, ...

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

    The result can be given to bert4keras in place of a checkpoint: arrays by
    the names of the original TensorFlow checkpoints. All options of
    bert4keras's loading (`keep_tokens`, `ignore_invalid_weights`, ...) apply.
    Floating point numbers become float32; integers and booleans keep their
    dtype.

    Needs the library `safetensors`, which checks the file.

    Args:
        path: String or path. The file `model.safetensors`; or the index
            `model.safetensors.index.json` of a model in several files; or the
            folder of either.

    Returns:
        A dict from names, such as `"bert/pooler/dense/bias"`, to NumPy arrays
        of the shapes that TensorFlow's checkpoints have: for the argument
        `checkpoint_path`.

    Raises:
        ValueError: where a file is damaged, a file or a tensor that the index
            names is missing, or the numbers are of a dtype that NumPy does not
            have (such as float8).
        FileNotFoundError: where there is no such file.
        ImportError: without the library `safetensors`.

    Example:

    >>> from safetensors.numpy import save_file
    >>> tensors = {"bert.pooler.dense.bias": np.ones(2, "float32")}
    >>> save_file(tensors, "model.safetensors")  # or a file of Hugging Face
    >>> weights = read_safetensors("model.safetensors")
    >>> weights["bert/pooler/dense/bias"]
    array([1., 1.], dtype=float32)

    With a whole model:

    ```python
    build_transformer_model("config.json", read_safetensors("bert"))
    ```

    Reference:
        [safetensors](https://huggingface.co/docs/safetensors), the format
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"Expected `path` to be a file or a folder. Received: path={path!r}"
        )
    path = pathlib.Path(path)
    if path.is_dir():
        folder, path = path, path / "model.safetensors"
        if not path.exists():
            path = folder / _INDEX
    if not path.exists():
        raise FileNotFoundError(
            f"Expected model.safetensors or {_INDEX}. Received: path={path}"
        )
    if path.suffix == ".json":
        files = _read_index(path)
    else:
        files = {path: None}
    checkpoint = _Checkpoint()
    for file, expected in files.items():
        for name, array in _read_file(file, expected):
            names, transposed = _tensorflow_names(name)
            for name in names:
                checkpoint[name] = array.T if transposed else array
    return checkpoint


_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_OTHERS = ("BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def _read_index(path):
    """Returns the names of the tensors in each file of a sharded model."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = dict(index["weight_map"])
        named = [*weight_map, *weight_map.values()]
        if not weight_map or not all(isinstance(x, str) for x in named):
            raise ValueError("no names of files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"Expected an index of tensors and their files in {path}. "
            f"Received: {error!r}"
        ) from None
    files = {}
    for tensor, name in weight_map.items():
        if pathlib.PurePath(name).name != name:
            raise ValueError(
                "Expected the files of an index to lie beside it. "
                f"Received: {name!r} in {path}"
            )
        files.setdefault(path.parent / name, set()).add(tensor)
    for file in files:
        if not file.exists():
            raise ValueError(
                f"Expected the file {file.name} beside {path}. "
                "Received: no such file"
            )
    return files


def _read_file(path, expected=None):
    """Yields the names and arrays of one file, after all of it is checked."""
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            for name, kind in kinds.items():
                if kind not in (*_FLOATS, *_OTHERS):
                    raise ValueError(
                        "Expected tensors of floating point numbers, integers "
                        f"or booleans. Received: {name} of {kind} in {path}"
                    )
            missing = sorted((expected or set()) - set(names))
            if missing:
                raise ValueError(
                    f"Expected in {path} the tensors that the index names. "
                    f"Received: a file without {', '.join(missing[:3])}"
                )
            for name in sorted(expected or names):
                array = file.get_tensor(name)
                yield (
                    name,
                    (
                        array.astype("float32")
                        if kinds[name] in _FLOATS
                        else array
                    ),
                )
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"Expected a file of safetensors. Received: {path} ({error})"
        ) from None


# Replacements from Hugging Face's to TensorFlow's names, in this order.
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
        # The names of an encoder without a head do not contain the model's
        # kind.
        return [f"bert/{name}", f"electra/{name}"], transposed
    return [name], transposed
