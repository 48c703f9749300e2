"""Weights of bridged models in files."""

import json
import sys

import keras
import ml_dtypes
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
import tensorflow as tf

from blogkeras.bert4keras import read_safetensors

# isort: split
from bert4keras.models import build_transformer_model, data_parallel


@pytest.mark.parametrize("name", ["bert nsp mlm", "albert", "t5.1.1"])
def test_checkpoint_round_trip(name, tmp_path):
    transformer = oracle.build(name, return_keras_model=False)
    values = oracle.checkpoint_values(transformer)
    transformer.load_weights_from_checkpoint(values)
    path = str(tmp_path / "model.ckpt")
    transformer.save_weights_as_checkpoint(path)
    saved = tf.train.load_checkpoint(path)
    assert saved.get_variable_to_shape_map().keys() == values.keys()
    for key, value in values.items():
        np.testing.assert_array_equal(saved.get_tensor(key), value)


@pytest.mark.verify
@pytest.mark.parametrize("name", oracle.MODELS)
def test_every_checkpoint_round_trip(name, tmp_path):
    if "tokens" not in name and "unshared" not in name:
        test_checkpoint_round_trip(name, tmp_path)


def test_checkpoint_of_repeated_variables(tmp_path):
    transformer = oracle.build("albert_unshared", return_keras_model=False)
    path = str(tmp_path / "model.ckpt")
    transformer.save_weights_as_checkpoint(path, dtype="float16")
    saved = tf.train.load_checkpoint(path)
    name = (
        "bert/encoder/transformer/group_0/inner_group_0/attention_1/self/"
        "query/kernel"
    )
    for i, suffix in enumerate(["", "_1"]):
        layer = f"Transformer-{i}-MultiHeadSelfAttention"
        weight = transformer.layers[layer].get_weights()[0]
        np.testing.assert_array_equal(
            saved.get_tensor(name + suffix), weight.astype("float16")
        )


def test_keep_tokens_and_compound_tokens():
    table = np.random.default_rng(0).normal(size=(60, 32)).astype("float32")
    transformer = oracle.build(
        "bert",
        keep_tokens=[0, 5, 9, 2, 7],
        compound_tokens=[[1, 2], ([3, 4], [1, 3])],
        return_keras_model=False,
    )
    values = oracle.checkpoint_values(transformer)
    values["bert/embeddings/word_embeddings"] = table
    transformer.load_weights_from_checkpoint(values)
    kept = table[[0, 5, 9, 2, 7]]
    expected = [*kept, kept[1:3].mean(0), kept[3:5].T @ [0.25, 0.75]]
    np.testing.assert_allclose(
        transformer.layers["Embedding-Token"].get_weights()[0],
        expected,
        rtol=1e-6,
    )


def write_safetensors(path, tensors, kinds=None):
    """Writes the format as its specification says."""
    known = {"f2": "F16", "f4": "F32", "f8": "F64", "i8": "I64", "b1": "BOOL"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        kind = (kinds or {}).get(name) or known[value.dtype.str[1:]]
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {
            "dtype": kind,
            "shape": value.shape,
            "data_offsets": offsets,
        }
        data += value.tobytes()
    write_file(path, header, data)


def write_file(path, header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)


def random_tensors(shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return {
        name: (0.3 * rng.normal(size=shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def encoder_shapes(prefix, embedding=32):
    """The names that Hugging Face gives to the weights of one layer."""
    layer = "encoder.layer.0"
    shapes = {
        "embeddings.word_embeddings.weight": (60, embedding),
        "embeddings.position_embeddings.weight": (40, embedding),
        "embeddings.token_type_embeddings.weight": (2, embedding),
        "embeddings.LayerNorm.weight": (embedding,),
        "embeddings.LayerNorm.bias": (embedding,),
        f"{layer}.intermediate.dense.weight": (48, 32),
        f"{layer}.intermediate.dense.bias": (48,),
        f"{layer}.output.dense.weight": (32, 48),
        f"{layer}.output.dense.bias": (32,),
        f"{layer}.output.LayerNorm.weight": (32,),
        f"{layer}.output.LayerNorm.bias": (32,),
        f"{layer}.attention.output.LayerNorm.weight": (32,),
        f"{layer}.attention.output.LayerNorm.bias": (32,),
    }
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes[f"{layer}.attention.{part}.weight"] = (32, 32)
        shapes[f"{layer}.attention.{part}.bias"] = (32,)
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(x, tensors, name):
    weight = tensors[f"{name}.weight"].astype("float64")
    return x @ weight.T + tensors[f"{name}.bias"]


def gelu(x):
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def encode(tensors, ids, segments, prefix):
    """BERT in NumPy, as published; one layer, two heads, no padding."""
    from scipy.special import softmax

    tensors = {
        name.removeprefix(prefix): value.astype("float64")
        for name, value in tensors.items()
        if name.startswith(prefix)
    }

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.token_type_embeddings.weight"][segments]
    x = x + tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, "embeddings.LayerNorm")
    if "embeddings_project.weight" in tensors:
        x = linear(x, tensors, "embeddings_project")
    layer = "encoder.layer.0"
    q, k, v = (
        np.stack(
            np.split(linear(x, tensors, f"{layer}.attention.self.{n}"), 2, -1),
            1,
        )
        for n in ("query", "key", "value")
    )
    attention = softmax(q @ k.swapaxes(-1, -2) / 4, axis=-1) @ v
    attention = np.concatenate(list(attention.swapaxes(0, 1)), -1)
    attention = linear(attention, tensors, f"{layer}.attention.output.dense")
    x = norm(x + attention, f"{layer}.attention.output.LayerNorm")
    h = gelu(linear(x, tensors, f"{layer}.intermediate.dense"))
    h = linear(h, tensors, f"{layer}.output.dense")
    return norm(x + h, f"{layer}.output.LayerNorm")


IDS = np.array([[3, 7, 12, 59], [8, 8, 1, 2]])
SEGMENTS = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("", "float32"), ("bert.", "float16")]
)
def test_reads_hugging_face_bert(tmp_path, prefix, dtype):
    from scipy.special import softmax

    shapes = encoder_shapes(prefix)
    shapes[f"{prefix}pooler.dense.weight"] = (32, 32)
    shapes[f"{prefix}pooler.dense.bias"] = (32,)
    shapes["cls.seq_relationship.weight"] = (2, 32)
    shapes["cls.seq_relationship.bias"] = (2,)
    tensors = random_tensors(shapes, dtype)
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(40)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = build_transformer_model(
        checkpoint_path=read_safetensors(tmp_path),
        with_nsp=True,
        **oracle.CONFIG,
    )
    x = encode(tensors, IDS, SEGMENTS, prefix)
    pooled = np.tanh(linear(x[:, 0], tensors, f"{prefix}pooler.dense"))
    logits = linear(pooled, tensors, "cls.seq_relationship")
    expected = softmax(logits, axis=-1)
    np.testing.assert_allclose(model([IDS, SEGMENTS]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "embedding"), [("electra.", 16), ("electra.", 32), ("", 16)]
)
def test_reads_hugging_face_electra(tmp_path, prefix, embedding):
    """A small, a base, and an encoder that was saved without its head."""
    shapes = encoder_shapes(prefix, embedding)
    if embedding != 32:
        shapes[f"{prefix}embeddings_project.weight"] = (32, embedding)
        shapes[f"{prefix}embeddings_project.bias"] = (32,)
    if prefix:
        head = "discriminator_predictions"
        shapes[f"{head}.dense.weight"] = (32, 32)
        shapes[f"{head}.dense.bias"] = (32,)
        shapes[f"{head}.dense_prediction.weight"] = (1, 32)
        shapes[f"{head}.dense_prediction.bias"] = (1,)
    tensors = random_tensors(shapes)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = build_transformer_model(
        checkpoint_path=read_safetensors(tmp_path),
        model="electra",
        embedding_size=embedding,
        with_discriminator=bool(prefix),
        **oracle.CONFIG,
    )
    expected = encode(tensors, IDS, SEGMENTS, prefix)
    if prefix:
        h = gelu(linear(expected, tensors, f"{head}.dense"))
        logits = linear(h, tensors, f"{head}.dense_prediction")
        expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(model([IDS, SEGMENTS]), expected, atol=1e-5)


def test_reads_a_model_in_several_files(tmp_path):
    tensors = random_tensors(encoder_shapes("bert."))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    expected = read_safetensors(tmp_path)
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[i::2]}
        write_safetensors(tmp_path / file, part)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (tmp_path, str(index)):
        found = read_safetensors(path)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)


def test_kinds_of_numbers(tmp_path):
    path = tmp_path / "a.safetensors"
    values = np.array([1.5, -2.0, 3e-5])
    half = values.astype(ml_dtypes.bfloat16)
    tensors = {
        "double": values,
        "half": half.view("u2"),
        "ids": np.array([2**40, 3]),
        "flags": np.array([True, False]),
    }
    write_safetensors(path, tensors, {"half": "BF16"})
    found = read_safetensors(path)
    np.testing.assert_array_equal(found["double"], values.astype("float32"))
    np.testing.assert_array_equal(found["half"], half.astype("float32"))
    assert found["ids"].tolist() == [2**40, 3]
    assert found["flags"].tolist() == [True, False]
    floats = {"eight": np.zeros(4, "u1"), "other": np.zeros(2)}
    write_safetensors(path, floats, {"eight": "F8_E4M3"})
    with pytest.raises(ValueError, match="eight of F8_E4M3"):
        read_safetensors(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", b"", 0),
    "no header": ({}, b"", 2**40),
    "text": (b"hello, this is a text", b"", None),
    "deep": (b"[" * 5000, b"", None),
    "trailing bytes": ({"a": ENTRY}, bytes(9), None),
    "too short": ({"a": ENTRY}, bytes(7), None),
    "negative": ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8), None),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), None),
    "overlapping": ({"a": ENTRY, "b": ENTRY}, bytes(8), None),
    "shape": ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None),
    "unknown": ({"a": {**ENTRY, "dtype": "F99"}}, bytes(8), None),
    "not text": (b"\xff\xfe\xfd", b"", None),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_error_of_a_damaged_file(tmp_path, case):
    header, data, length = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    write_file(path, header, data, length)
    with pytest.raises(ValueError, match="Expected a file of safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "Expected an index"),
        ("[1]", "Expected an index"),
        ('{"weight_map": {}}', "Expected an index"),
        ('{"weight_map": {"a": 3}}', "Expected an index"),
        ('{"weight_map": {"a": "../b"}}', "to lie beside it"),
        ('{"weight_map": {"a": "none"}}', "Expected the file none"),
        ('{"weight_map": {"x": "b"}}', "a file without x"),
        ("[" * 100000, "Expected an index"),
    ],
)
def test_error_of_an_index(tmp_path, index, message):
    write_safetensors(tmp_path / "b", {"a": np.zeros(2)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        read_safetensors(tmp_path)


def test_errors_of_paths_and_of_the_library(tmp_path, monkeypatch):
    for path in (None, 3, [tmp_path]):
        with pytest.raises(ValueError, match="a file or a folder"):
            read_safetensors(path)
    with pytest.raises(FileNotFoundError, match=r"index.json"):
        read_safetensors(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_safetensors(tmp_path)


def test_a_file_without_some_weights(tmp_path, capsys):
    tensors = random_tensors(encoder_shapes("bert."))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    arguments = {
        "checkpoint_path": read_safetensors(tmp_path),
        "with_pool": True,
        **oracle.CONFIG,
    }
    with pytest.raises(KeyError, match="has no bert/pooler/dense/kernel"):
        build_transformer_model(**arguments)
    build_transformer_model(**arguments, ignore_invalid_weights=True)
    assert "bert/pooler/dense/bias, but ignored" in capsys.readouterr().out


def test_autoresize_weights_widens_a_model():
    narrow = oracle.build("bert", return_keras_model=False)
    values = oracle.checkpoint_values(narrow)
    wide = oracle.build(
        "bert",
        hidden_size=64,
        intermediate_size=96,
        autoresize_weights=True,
        return_keras_model=False,
    )
    wide.load_weights_from_checkpoint(values)
    # Pairs of columns are repeated and the norm is kept.
    old = values["bert/embeddings/word_embeddings"]
    new = wide.layers["Embedding-Token"].get_weights()[0]
    for column, source in ((0, 0), (1, 1), (2, 0), (3, 1), (4, 2), (63, 31)):
        np.testing.assert_allclose(
            new[:, column], old[:, source] / np.sqrt(2), rtol=1e-5
        )
    # But for what goes into scores, and through the feed-forward layer.
    layer = "bert/encoder/layer_0"
    for name, index, part, factor in (
        ("MultiHeadSelfAttention", 0, "attention/self/query", 2**0.25),
        ("MultiHeadSelfAttention", 2, "attention/self/key", 2**0.25),
        ("MultiHeadSelfAttention", 4, "attention/self/value", 1),
        ("FeedForward", 0, "intermediate/dense", 2**0.5),
        ("FeedForward", 2, "output/dense", 2**-0.5),
    ):
        new = wide.layers[f"Transformer-0-{name}"].get_weights()[index]
        old = values[f"{layer}/{part}/kernel"]
        assert new.shape == (2 * old.shape[0], 2 * old.shape[1])
        ratio = np.linalg.norm(new) / np.linalg.norm(old)
        np.testing.assert_allclose(ratio, factor, rtol=1e-5)
    batch = oracle.padded_batch(wide.model)
    assert np.isfinite(wide.model(batch)).all()


@pytest.mark.verify
def test_autoresize_weights_equals_reference():
    for key, value in oracle.run_autoresize().items():
        reference = oracle.reference(full=True)[key]
        np.testing.assert_allclose(value, reference, rtol=0, atol=1e-6)


def test_data_parallel_splits_the_batch():
    model = oracle.built("bert")
    parallel = data_parallel(model, devices=["/cpu:0", "/cpu:0"])
    batch = oracle.padded_batch(model, [7, 5, 3, 2])
    np.testing.assert_allclose(parallel(batch), model(batch), atol=1e-6)
