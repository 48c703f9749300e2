"""Every model and method: compiled, on two devices, in bfloat16, for TPUs.

Each test fills cells of the table in `docs/scaling.md`.
"""

import functools
import pathlib

import keras
import matrix
import numpy as np
import pytest
import toy
import train_steps
from kit import (
    JAX,
    TENSORFLOW,
    jax_only,
    lower_train_step,
    replicated,
    slow_on_tensorflow,
    value,
)
from matrix import STEPS

# `make verify` runs all of them and prints the table.
pytestmark = pytest.mark.matrix
PAGE = pathlib.Path(__file__).parents[2] / "docs/scaling.md"
BACKEND = "JAX" if JAX else "TensorFlow"
METHODS = [name for name in STEPS if name not in train_steps.MODELS]
# On two devices in `make test`; rooms of others have such tests of their own.
DEVICES = (
    "AnnealedScoreMatching",
    "CodePrior",
    "DenoisingDensityEstimator",
    "DenoisingGenerator",
    "freelb",
)
# HSIC is what is left when large sums are subtracted, so with a larger rate the
# order of the sums would be seen in the weights.
RATES = {"HSICBottleneck": 0.01}
# Of an array's largest number. Those of the bottleneck change by a third and
# more, and a rounding error by up to 1e-4 in these steps.
TOLERANCES = {"HSICBottleneck": 1e-3}


def every_step(*long):
    """All train steps; those named here in `make verify` only."""
    return pytest.mark.parametrize(
        "step",
        [
            pytest.param(name, marks=pytest.mark.verify)
            if name in long
            else name
            for name in STEPS
        ],
    )


def programs(function):
    """How many programs the function that `fit` calls has become."""
    counts, waiting, known = [0], [function], set()
    while waiting:
        function = waiting.pop()
        if id(function) in known:
            continue
        known.add(id(function))
        for name in ("experimental_get_tracing_count", "_cache_size"):
            if hasattr(function, name):
                counts.append(getattr(function, name)())
        waiting.append(getattr(function, "__wrapped__", None))
        for cell in getattr(function, "__closure__", None) or ():
            if callable(cell.cell_contents):
                waiting.append(cell.cell_contents)
    return max(counts)


class CountPrograms(keras.callbacks.Callback):
    """The number of programs after each epoch."""

    def on_train_begin(self, logs=None):
        self.counts = []
        # TensorFlow traces once more where the first trace makes variables, as
        # those of metrics.
        self.most = 1 if JAX else 2

    def on_epoch_end(self, epoch, logs=None):
        self.counts.append(programs(self.model.train_function))

    def check(self):
        # JAX does not count a program that it does not keep for fast calls.
        assert (0 if JAX else 1) <= self.counts[0] <= self.most
        assert self.counts[1] == self.counts[0]


def trained(step, around=lambda build: build(), callbacks=(), **options):
    """A model after two epochs of two batches, all of one shape."""
    maker, x, y = STEPS[step]
    toy.reset()
    rate = RATES.get(step, 0.1)
    model = around(
        lambda: maker(optimizer=keras.optimizers.SGD(rate), **options)
    )
    history = model.fit(
        x,
        y,
        batch_size=len(x) // 2,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks],
    ).history
    keras.distribution.set_distribution(None)
    assert int(value(model.optimizer.iterations)) >= 4
    assert np.isfinite([*history.values()]).all()
    for array in toy.weights(model):
        assert np.isfinite(array.astype("float64")).all()
    return model


@functools.cache
def compiled(step):
    """A model that was compiled with XLA, its weights, and its programs."""
    count = CountPrograms()
    # NVAE does without XLA on TensorFlow, see below.
    model = trained(step, callbacks=[count])
    return model, toy.weights(model), count


@every_step(*(name for name in METHODS if name != "fgm"))
def test_one_program_and_a_file(step, tmp_path):
    """Whole steps in one program; saved and loaded it predicts the same."""
    model, _, count = compiled(step)
    assert step in (*METHODS, type(model).__name__)
    count.check()
    x = STEPS[step][1]
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    for ours, theirs in zip(
        keras.tree.flatten(loaded.predict(x, verbose=0)),
        keras.tree.flatten(expected),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    if step != "NVAE" or JAX:
        matrix.saw(step, f"XLA, {BACKEND}")


@pytest.mark.verify
@pytest.mark.skipif(JAX, reason="done above")
def test_nvae_under_xla():
    """XLA is slow to compile its convolutions for a CPU on TensorFlow."""
    count = CountPrograms()
    trained("NVAE", callbacks=[count], jit_compile=True)
    count.check()
    matrix.saw("NVAE", f"XLA, {BACKEND}")


@slow_on_tensorflow
@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@every_step(*(name for name in STEPS if name not in DEVICES))
def test_two_devices_train_as_one(step):
    if JAX:
        _, one, _ = compiled(step)
        two = trained(step, around=replicated)
    else:
        # XLA does not compile collective operations of CPUs here, and it draws
        # other normal numbers than TensorFlow without it.
        one = toy.weights(trained(step, run_eagerly=True))
        two = trained(step, around=replicated, jit_compile=False)
    two = toy.weights(two)
    tolerance = TOLERANCES.get(step, 1e-5)
    for ours, theirs in zip(two, one, strict=True):
        # The gradients of some biases are rounding errors of 0.
        scale = np.abs(theirs).max(initial=1e-2)
        np.testing.assert_allclose(ours, theirs, 0, tolerance * scale)
    devices = "2 devices" if JAX else "2 replicas"
    matrix.saw(step, f"{devices}, {BACKEND}")


@every_step(*STEPS)
def test_bfloat16(step):
    keras.config.set_dtype_policy("mixed_bfloat16")
    trained(step, run_eagerly=TENSORFLOW)
    matrix.saw(step, f"bfloat16, {BACKEND}")


@jax_only
@every_step()
def test_lowers(step):
    """For a TPU and a GPU, without one; no step calls back into Python."""
    maker, x, y = STEPS[step]
    program = lower_train_step(maker(), x, y, "tpu", "cuda")
    assert "stablehlo" in program
    assert "callback" not in program
    matrix.saw(step, "lowers for TPU")
    matrix.saw(step, "lowers for GPU")


def test_the_page_shows_the_table():
    assert matrix.expected() in PAGE.read_text("utf-8")
