"""The whole train step of every method lowers for a TPU and for a GPU.

No such device is needed: JAX lowers for platforms that are not there. Each room
adds its models and methods to the list.
"""

import keras
import pytest
import toy
from kit import JAX, lower_train_step

import blogkeras

pytestmark = pytest.mark.skipif(not JAX, reason="JAX lowers for any device")


def adversarial(method):
    def make():
        model = toy.compiled(toy.classifier())
        blogkeras.adversarial_training(model, method=method)
        return model, toy.TOKENS[:8], toy.LABELS[:8]

    return make


def plain():
    return toy.compiled(toy.classifier()), toy.TOKENS[:8], toy.LABELS[:8]


def electra(sharing):
    def make():
        def encoder(name):
            tokens = keras.Input((5,), dtype="int32", name="tokens")
            h = keras.layers.Embedding(toy.VOCABULARY, 4)(tokens)
            return keras.Model(tokens, keras.layers.Dense(4)(h), name=name)

        model = blogkeras.ElectraPretrainer(
            encoder("generator"), encoder("discriminator"), 1, (), sharing
        )
        model.compile("adam", jit_compile=True)
        return model, toy.TOKENS[:8]

    return make


STEPS = {
    "plain": plain,
    "fgm": adversarial("fgm"),
    "gradient_penalty": adversarial("gradient_penalty"),
    "electra": electra("embeddings"),
    "electra, disentangled": electra("disentangled"),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", STEPS)
def test_train_step_lowers(name, platform):
    program = lower_train_step(*STEPS[name](), platform=platform)
    assert "stablehlo" in program
    # A call into Python would need the host in every step.
    assert "callback" not in program
