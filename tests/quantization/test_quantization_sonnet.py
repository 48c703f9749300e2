"""The codebook against the modules it follows, those of dm-sonnet 2.

Sonnet is not among the tests' requirements: `make verify` has it in a folder of
its own.
"""

import keras
import numpy as np
import pytest

from blogkeras.quantization import VectorQuantizer, perplexity

DIM, CODES, STEPS = 16, 64, 100


@pytest.mark.verify
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="Sonnet is TensorFlow's"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("decay", [None, 0.99])
def test_codebooks_are_sonnets(decay):
    sonnet = pytest.importorskip("sonnet")
    import tensorflow as tf

    tf.random.set_seed(0)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, DIM))
    if decay is None:
        theirs = sonnet.nets.VectorQuantizer(DIM, CODES, 0.25)
    else:
        theirs = sonnet.nets.VectorQuantizerEMA(DIM, CODES, 0.25, decay)
    ours = VectorQuantizer(CODES, ema_decay=decay)
    ours.build((None, DIM))
    ours.embeddings.assign(tf.transpose(theirs.embeddings))

    for _ in range(STEPS):
        z = centers[rng.integers(0, 40, (4, 16, 16))]
        z = tf.constant(z + 0.3 * rng.normal(size=z.shape), "float32")
        before = ours.embeddings.numpy()
        # The gradient of the output is weighed, so that it is not all ones.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(z)
            out = theirs(z, is_training=True)
            value = out["loss"] + tf.reduce_sum(out["quantize"] * tf.cos(z))
            quantized, codes = ours(z, training=True, return_codes=True)
            loss = sum(ours.losses)
            our_value = loss + tf.reduce_sum(quantized * tf.cos(z))
        # Where two codes are equally near, either is right.
        vectors = z.numpy().astype("float64")[..., None, :]
        distances = np.sum((vectors - before) ** 2, axis=-1)
        first, second = np.moveaxis(np.sort(distances, -1)[..., :2], -1, 0)
        clear = second - first > 1e-5 * second
        assert clear.mean() > 0.999
        np.testing.assert_array_equal(
            codes.numpy()[clear], out["encoding_indices"].numpy()[clear]
        )
        np.testing.assert_allclose(loss, out["loss"], rtol=1e-6)
        np.testing.assert_allclose(
            perplexity(ours.batch_counts), out["perplexity"], rtol=1e-6
        )
        # The vectors are of size 1: a float32 next to 4 is 5e-7 away.
        np.testing.assert_allclose(
            tape.gradient(our_value, z), tape.gradient(value, z), atol=2e-6
        )
        if decay is None:
            slope = tape.gradient(out["loss"], theirs.embeddings)
            our_slope = tape.gradient(loss, ours.embeddings.value)
            np.testing.assert_allclose(
                our_slope, tf.transpose(slope), rtol=1e-6, atol=1e-9
            )
            theirs.embeddings.assign_sub(slope)
            ours.embeddings.assign(ours.embeddings - our_slope)
    np.testing.assert_allclose(
        ours.embeddings.numpy(), tf.transpose(theirs.embeddings), atol=1e-5
    )
