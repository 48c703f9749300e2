"""The whole train step of every method lowers for a TPU and for a GPU.

No such device is needed: JAX lowers for platforms that are not there. Each room
adds its models and methods to the list.
"""

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


STEPS = {
    "plain": plain,
    "fgm": adversarial("fgm"),
    "gradient_penalty": adversarial("gradient_penalty"),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", STEPS)
def test_train_step_lowers(name, platform):
    program = lower_train_step(*STEPS[name](), platform=platform)
    assert "stablehlo" in program
    # A call into Python would need the host in every step.
    assert "callback" not in program
