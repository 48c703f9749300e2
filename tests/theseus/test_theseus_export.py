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
