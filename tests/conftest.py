"""Two devices on one machine, fixed seeds, the default policy in each test."""

import gc
import sys

import compiler_flags  # noqa: F401, before Keras
import keras
import pytest
import toy

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


def pytest_collection_finish():
    """Hides imported objects, which are never freed, from the collector."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """The table of train steps and machines, in `make verify`."""
    matrix = sys.modules.get("matrix")
    if matrix is None or "matrix" not in config.option.markexpr:
        return
    name, seen = f"matrix/{keras.backend.backend()}", set(matrix.seen)
    if hasattr(config, "cache"):
        # `make verify` runs one backend after the other.
        config.cache.set(name, sorted(seen))
        for other in ("tensorflow", "jax"):
            seen |= set(config.cache.get(f"matrix/{other}", []))
    terminalreporter.section("train steps and machines")
    terminalreporter.write_line(matrix.summary(seen))


@pytest.fixture(autouse=True)
def fresh():
    toy.reset()
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")
    keras.distribution.set_distribution(None)
