"""`backend.distribution`: all devices that there are; here two of a CPU."""

import keras
import numpy as np
import toy
from kit import TENSORFLOW, tensorflow_only

from blogkeras import backend


def test_two_devices_share_each_batch():
    devices = backend.distribution()
    assert backend.distribution() is devices
    with devices.scope():
        # On JAX arrays are global: one replica, whatever the devices.
        assert backend.num_replicas() == (2 if TENSORFLOW else 1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()])
        outputs = model.predict(toy.DENSE[:8], batch_size=8, verbose=0)
    np.testing.assert_array_equal(outputs, np.maximum(toy.DENSE[:8], 0))
    if not TENSORFLOW:
        assert devices.device_mesh.devices.size == 2
    assert keras.distribution.distribution() is None
    assert backend.num_replicas() == 1


@tensorflow_only
def test_means_that_keras_asks_of_several_processes():
    """Of a batch its part, of a metric its mean over processes."""
    import tensorflow as tf

    from blogkeras.backend.tensorflow import Workers

    strategy = Workers()
    x, y = tf.ones((3, 2)), tf.constant([1, 2, 3])
    found = strategy.reduce("MEAN", (x, {"y": y}), axis=None)
    assert found[0].shape == (3, 2)
    assert found[1]["y"].dtype == tf.int32
    assert float(strategy.reduce("MEAN", tf.constant(2.0), axis=0)) == 2
    assert float(strategy.reduce("MEAN", x[:, 0], axis=0)) == 1
