"""On the JAX backend nothing needs TensorFlow, installed or not."""

import subprocess
import sys

import pytest
from kit import JAX

pytestmark = pytest.mark.skipif(not JAX, reason="the JAX backend's path")

CODE = """
import sys
sys.modules["tensorflow"] = None  # importing it is an error now
import keras, numpy as np
import blogkeras

model = keras.Sequential(
    [
        keras.layers.Embedding(9, 2),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2, activation="softmax"),
    ]
)
model.compile("sgd", "sparse_categorical_crossentropy")
blogkeras.adversarial_training(model)
x = np.random.randint(0, 9, (8, 4))
model.fit(x, x[:, 0] % 2, verbose=0)
model.save(sys.argv[1])
keras.saving.load_model(sys.argv[1]).predict(x, verbose=0)
v = np.random.rand(6, 3).astype("float32")
blogkeras.hsic(v, v)
blogkeras.word_mover_distance(v[:2], v[2:])
encoder = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
decoder = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
vqvae = blogkeras.VQVAE(encoder, blogkeras.VectorQuantizer(4), decoder)
vqvae.compile("sgd")
vqvae.fit(v, verbose=0)
print(sorted(m for m in sys.modules if m.split(".")[0] == "tensorflow"))
"""


def test_the_jax_path_imports_no_tensorflow(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model.keras")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['tensorflow']"  # the block itself
