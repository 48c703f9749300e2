"""Weights of bridged models in files."""

import json

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
import tensorflow as tf

from blogkeras.bert4keras import read_safetensors

# isort: split
from bert4keras.backend import keras as keras_of_scripts
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


def write_safetensors(path, tensors):
    """Writes the format as its specification says."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        kind = {"f2": "F16", "f4": "F32", "i8": "I64"}[value.dtype.str[1:]]
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {
            "dtype": kind,
            "shape": value.shape,
            "data_offsets": offsets,
        }
        data += value.tobytes()
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def hugging_face_bert(prefix, dtype):
    rng = np.random.default_rng(0)
    layer = "encoder.layer.0"
    shapes = {
        "embeddings.word_embeddings.weight": (60, 32),
        "embeddings.position_embeddings.weight": (40, 32),
        "embeddings.token_type_embeddings.weight": (2, 32),
        "embeddings.LayerNorm.weight": (32,),
        "embeddings.LayerNorm.bias": (32,),
        f"{layer}.intermediate.dense.weight": (48, 32),
        f"{layer}.intermediate.dense.bias": (48,),
        f"{layer}.output.dense.weight": (32, 48),
        f"{layer}.output.dense.bias": (32,),
        f"{layer}.output.LayerNorm.weight": (32,),
        f"{layer}.output.LayerNorm.bias": (32,),
        f"{layer}.attention.output.LayerNorm.weight": (32,),
        f"{layer}.attention.output.LayerNorm.bias": (32,),
        "pooler.dense.weight": (32, 32),
        "pooler.dense.bias": (32,),
    }
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes[f"{layer}.attention.{part}.weight"] = (32, 32)
        shapes[f"{layer}.attention.{part}.bias"] = (32,)
    tensors = {
        prefix + name: rng.normal(size=shape).astype(dtype)
        for name, shape in shapes.items()
    }
    tensors["cls.seq_relationship.weight"] = rng.normal(size=(2, 32)).astype(
        dtype
    )
    tensors["cls.seq_relationship.bias"] = rng.normal(size=2).astype(dtype)
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(40)
    return tensors


def torch_like(tensors, ids, segments, prefix):
    """BERT in NumPy, as published; one layer, two heads, no padding."""
    from scipy.special import erf, softmax

    def get(name):
        return tensors[prefix + name].astype("float64")

    def linear(x, name):
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12)
        return x * get(f"{name}.weight") + get(f"{name}.bias")

    x = get("embeddings.word_embeddings.weight")[ids]
    x = x + get("embeddings.token_type_embeddings.weight")[segments]
    x = x + get("embeddings.position_embeddings.weight")[: ids.shape[1]]
    x = norm(x, "embeddings.LayerNorm")
    layer = "encoder.layer.0"
    q, k, v = (
        np.stack(np.split(linear(x, f"{layer}.attention.self.{n}"), 2, -1), 1)
        for n in ("query", "key", "value")
    )
    attention = softmax(q @ k.swapaxes(-1, -2) / 4, axis=-1) @ v
    attention = np.concatenate(list(attention.swapaxes(0, 1)), -1)
    attention = linear(attention, f"{layer}.attention.output.dense")
    x = norm(x + attention, f"{layer}.attention.output.LayerNorm")
    h = linear(x, f"{layer}.intermediate.dense")
    h = h * (1 + erf(h / np.sqrt(2))) / 2
    x = norm(
        x + linear(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm"
    )
    pooled = np.tanh(linear(x[:, 0], "pooler.dense"))
    logits = pooled @ tensors["cls.seq_relationship.weight"].T.astype("float64")
    logits = logits + tensors["cls.seq_relationship.bias"]
    return softmax(logits, axis=-1)


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("", "float32"), ("bert.", "float16")]
)
def test_reads_hugging_face_bert(tmp_path, prefix, dtype):
    tensors = hugging_face_bert(prefix, dtype)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = build_transformer_model(
        checkpoint_path=read_safetensors(tmp_path),
        with_nsp=True,
        **oracle.CONFIG,
    )
    ids = np.array([[3, 7, 12, 59], [8, 8, 1, 2]])
    segments = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    expected = torch_like(tensors, ids, segments, prefix)
    np.testing.assert_allclose(model([ids, segments]), expected, atol=1e-5)


def test_names_of_weights_files_of_old_scripts(tmp_path):
    model = oracle.build("gpt2_ml")
    before = model.get_weights()
    model.save_weights(tmp_path / "best_model.weights")
    assert (tmp_path / "best_model.weights.h5").exists()
    model.set_weights([0 * w for w in before])
    model.load_weights(str(tmp_path / "best_model.weights"))
    for new, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_names_of_model_files_of_old_scripts(tmp_path):
    model = oracle.build("gpt2_ml")
    model.save(tmp_path / "test.model")
    loaded = keras_of_scripts.models.load_model(tmp_path / "test.model")
    x = [[3, 7, 12], [4, 0, 0]]
    np.testing.assert_array_equal(
        loaded.predict([x], verbose=0), model.predict(np.array(x), verbose=0)
    )


def test_data_parallel_splits_the_batch():
    model = oracle.built("bert")
    parallel = data_parallel(model, devices=["/cpu:0", "/cpu:0"])
    batch = oracle.padded_batch(model, [7, 5, 3, 2])
    np.testing.assert_allclose(parallel(batch), model(batch), atol=1e-6)
