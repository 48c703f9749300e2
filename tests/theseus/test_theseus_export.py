"""A detached model leaves Keras: SavedModel, LiteRT and ONNX (post 7575)."""

import keras
import numpy as np
import pytest
from keras import layers
from kit import value

from blogkeras.theseus import bert_of_theseus

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="formats of TensorFlow"
    ),
    # The converters of TensorFlow and Keras warn of themselves.
    pytest.mark.filterwarnings("ignore"),
]
IDS = np.random.default_rng(0).integers(1, 11, (4, 5)).astype("int32")
LENGTH = 8  # to which texts are padded where the length is fixed
TEXTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2], [3, 1]]


def transformer(blocks):
    inputs = keras.Input((5,), dtype="int32", name="ids")
    x = layers.Embedding(11, 4, name="embedding")(inputs)
    for i in range(blocks):
        attended = layers.MultiHeadAttention(
            2, 2, name=f"encoder_attention_{i}"
        )(x, x)
        x = layers.LayerNormalization(name=f"norm_{i}")(x + attended)
        x = layers.Dense(4, "tanh", name=f"transformer_layer_{i}")(x)
    return keras.Model(inputs, x)


@pytest.fixture(scope="module")
def detached():
    head = [layers.GlobalAveragePooling1D(), layers.Dense(3, "softmax")]
    theseus = bert_of_theseus(transformer(4), transformer(2), head)
    theseus.compile("adam", "sparse_categorical_crossentropy")
    theseus.fit(IDS, np.arange(4) % 3, verbose=0)
    small = theseus.detach()
    return small, value(small(IDS))


def test_saved_model(detached, tmp_path):
    tf = pytest.importorskip("tensorflow")
    small, expected = detached
    small.export(str(tmp_path / "saved"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(IDS), expected, atol=1e-6)


def test_litert(detached, tmp_path):
    tf = pytest.importorskip("tensorflow")
    small, expected = detached
    small.export(str(tmp_path / "saved"), verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(tmp_path / "saved")
    )
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, IDS.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, IDS)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_onnx(detached, tmp_path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    small, expected = detached
    path = str(tmp_path / "small.onnx")
    small.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    name = session.get_inputs()[0].name
    found = session.run(None, {name: IDS})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def bert():
    """A detached BERT of free length, and its outputs, text by text.

    The texts stand alone here, without padding: what is exported sees them
    padded, so it must have the masks.
    """
    import blogkeras.bert4keras  # noqa: F401

    # isort: split
    from bert4keras.layers import GlobalAveragePooling1D
    from bert4keras.models import build_transformer_model

    predecessor, successor = (
        build_transformer_model(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=blocks,
            num_attention_heads=2,
            intermediate_size=12,
            hidden_act="gelu",
            max_position=LENGTH,
            prefix=prefix,
            return_keras_model=False,
        )
        for blocks, prefix in ((2, "Predecessor-"), (1, ""))
    )
    head = [GlobalAveragePooling1D(), layers.Dense(3, "softmax")]
    small = bert_of_theseus(predecessor, successor, head).detach()
    # Initial weights are so small that masks would change next to nothing.
    rng = np.random.default_rng(0)
    small.set_weights(
        [w + rng.normal(0, 0.3, w.shape) for w in small.get_weights()]
    )
    expected = [value(small(padded(text, len(text)))) for text in TEXTS]
    return small, np.concatenate(expected)


def padded(text, length=LENGTH):
    """`[token ids, segment ids]`, each `(1, length)`; 0 is padding."""
    ids = np.zeros((1, length), "float32")
    ids[0, : len(text)] = text
    return [ids, np.zeros_like(ids)]


def one_text(model):
    """A signature of one text of `LENGTH` tokens, as in docs/theseus.md."""
    return [
        [
            keras.InputSpec(shape=(1, LENGTH), dtype=x.dtype, name=x.name)
            for x in model.inputs
        ]
    ]


def test_saved_model_of_bert(bert, tmp_path):
    """Of free length: a batch of padded texts, and a text alone."""
    tf = pytest.importorskip("tensorflow")
    small, expected = bert
    small.export(str(tmp_path / "saved"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    batch = [np.concatenate(x) for x in zip(*map(padded, TEXTS), strict=True)]
    np.testing.assert_allclose(loaded.serve(batch), expected, atol=1e-6)
    alone = loaded.serve(padded(TEXTS[0], 3))
    np.testing.assert_allclose(alone, expected[:1], atol=1e-6)


def test_litert_of_bert(bert, tmp_path):
    tf = pytest.importorskip("tensorflow")
    small, expected = bert
    path = str(tmp_path / "fixed")
    small.export(path, input_signature=one_text(small), verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(path)
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    run = interpreter.get_signature_runner()
    names = [x.name for x in small.inputs]
    found = [
        run(**dict(zip(names, padded(text), strict=True)))["output_0"]
        for text in TEXTS
    ]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


def test_onnx_of_bert(bert, tmp_path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    small, expected = bert
    path = str(tmp_path / "small.onnx")
    small.export(
        path, format="onnx", input_signature=one_text(small), verbose=False
    )
    session = runtime.InferenceSession(path)
    names = [x.name for x in small.inputs]
    found = [
        session.run(None, dict(zip(names, padded(text), strict=True)))[0]
        for text in TEXTS
    ]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)
