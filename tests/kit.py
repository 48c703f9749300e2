"""Helpers of the tests: values, backends, replicas, closeness.

Models and data that tests share are in `toy.py`.
"""

import functools

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops

from blogkeras import training

TENSORFLOW = keras.backend.backend() == "tensorflow"
JAX = keras.backend.backend() == "jax"

tensorflow_only = pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow only")
jax_only = pytest.mark.skipif(not JAX, reason="JAX only")


def slow_on_jax(test):
    """On JAX it runs in `make verify` only: XLA compiles it slowly on a CPU."""
    return pytest.mark.verify(test) if JAX else test


def slow_on_tensorflow(test):
    """The same the other way round: TensorFlow traces such steps slowly."""
    return pytest.mark.verify(test) if TENSORFLOW else test


# The first for a whole file: `pytestmark = SLOW_FILE_ON_JAX`.
SLOW_FILE_ON_JAX = [pytest.mark.verify] if JAX else []


def value(x, dtype=None):
    """A NumPy array of anything."""
    return np.asarray(ops.convert_to_numpy(x), dtype)


def close_in_ulps(actual, expected, ulps=4, dtype=None):
    """Asserts equality up to units in the last place of the largest value.

    Programs that are compiled differently (eager, XLA, a branch; another
    processor) sum in another order, so their results may differ in the last
    bits.

    Args:
        actual: Tensor or array.
        expected: Tensor or array of the same shape.
        ulps: How many units.
        dtype: Whose units; defaults to the dtype of `actual`.
    """
    dtype = dtype or keras.backend.standardize_dtype(
        getattr(actual, "dtype", np.asarray(actual).dtype)
    )
    actual, expected = value(actual, "float64"), value(expected, "float64")
    assert actual.shape == expected.shape
    unit = {
        "bfloat16": 2.0**-7,
        "float16": 2.0**-10,
        "float32": 2.0**-23,
        "float64": 2.0**-52,
    }[dtype]
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=ulps * unit * max(largest, 1e-30)
    )


def nearest_rows(z, codebook, margin=1e-5):
    """The nearest row of a codebook for each vector, in float64.

    Asserts that no other row is as near within `margin`, relative to the
    distance. So a float32 program finds the same row on any processor. (Of
    equal rows the first is taken.)
    """
    z, codebook = value(z, "float64"), value(codebook, "float64")

    def distances(rows):
        return np.sum((z[..., None, :] - rows) ** 2, axis=-1)

    unequal = np.sort(distances(np.unique(codebook, axis=0)), axis=-1)
    first, second = unequal[..., 0], unequal[..., 1]
    assert np.all(second - first >= margin * second)
    return distances(codebook).argmin(-1)


def assert_nearest(codes, z, codebook, margin=1e-5):
    """Asserts that each vector got a nearest row of a codebook.

    Distances are computed in float64 from differences. Where two rows are
    equally near within `margin`, relative to their distance, both are accepted:
    a float32 program may find either, depending on the processor.

    Args:
        codes: `(...)`, integers.
        z: `(..., dim)`.
        codebook: `(num_codes, dim)`.
        margin: Float.
    """
    codes, z = value(codes), value(z, "float64")
    codebook = value(codebook, "float64")
    assert codes.shape == z.shape[:-1]
    assert codes.dtype.kind == "i"
    codes, z = codes.ravel(), z.reshape(-1, z.shape[-1])
    assert codes.min() >= 0
    assert codes.max() < len(codebook)
    distances = np.sum((z[:, None] - codebook) ** 2, axis=-1)
    taken = np.take_along_axis(distances, codes[:, None], axis=1)[:, 0]
    assert np.all(taken <= distances.min(1) * (1 + margin))


def replicated(make):
    """A compiled model that trains on two devices."""
    if TENSORFLOW:
        with toy.mirrored().scope():
            return make()
    devices = keras.distribution.list_devices("cpu")[:2]
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices)
    )
    return make()


def replica_run(make_hook, replicas):
    """Weights and history of a small classifier on one or two replicas."""
    toy.reset()

    def make():
        return toy.compiled(
            toy.classifier(
                dropout=0.0, normalization=layers.LayerNormalization
            ),
            run_eagerly=replicas == 1,
        )

    model = replicated(make) if replicas == 2 else make()
    if make_hook:
        training.install(model, make_hook(model))
    history = model.fit(
        toy.TOKENS, toy.LABELS, epochs=2, shuffle=False, verbose=0
    ).history
    keras.distribution.set_distribution(None)
    return toy.weights(model), history


def lower_train_step(model, x, y=None, *platforms):
    """Lowers the whole train step of a compiled model for devices.

    JAX lowers for a TPU or a GPU without having one. Raises where an operation
    of the step has no lowering there.

    Args:
        model: A compiled `keras.Model`, JAX backend; it need not be built.
        x: One batch of inputs.
        y: Its targets, if any.
        *platforms: `"tpu"` (the default), `"cuda"`, or both.

    Returns:
        The text of the program, StableHLO.
    """
    import jax

    data = (x,) if y is None else (x, y)
    model._symbolic_build(data_batch=data)
    model.optimizer.build(model.trainable_variables)
    hook = training.installed(model)
    step = model.train_step
    if hook is not None:
        step = functools.partial(training.make_step(hook), model)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    exported = jax.export.export(
        jax.jit(step), platforms=[*platforms] or ["tpu"]
    )(state, data)
    return exported.mlir_module()


def products(program):
    """The matrix products in the text of a lowered program."""
    return [line for line in program.split("\n") if ".dot_general" in line]


def assert_full_precision(program):
    """Asserts that there are matrix products, and all of full precision."""
    found = products(program)
    assert found
    assert [p for p in found if "[HIGHEST, HIGHEST]" not in p] == []
