"""One of the processes that train together: the child of `test_workers.py`.

    python worker.py MODEL FOLDER EPOCHS [LAST]

Prints the number of each epoch that is done. After each, the first process
saves the model; a run begins at the newest file in the folder. At the end of
the epoch LAST this process waits for ever: it is killed there. Which processes
there are is told by the variables that TensorFlow and Keras read.
"""

import argparse
import pathlib
import sys
import time

import keras
import numpy as np
import train_steps
from kit import TENSORFLOW

import blogkeras
from blogkeras.backend import distribution


def digits(**options):
    """A VQ-VAE of pictures, whose codebook averages over all processes."""
    encoder = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 2, 2)]
    )
    decoder = keras.Sequential(
        [keras.Input((4, 4, 4)), keras.layers.Conv2DTranspose(1, 2, 2)]
    )
    quantizer = blogkeras.VectorQuantizer(8, ema_decay=0.9)
    model = blogkeras.VQVAE(encoder, quantizer, decoder)
    return train_steps.compiled(model, **options)


def pictures(number=32):
    """Bright squares at random places."""
    rng = np.random.default_rng(0)
    x = 0.1 * rng.random((number, 8, 8, 1), "float32")
    for picture, (i, j) in zip(x, rng.integers(0, 5, (number, 2)), strict=True):
        picture[i : i + 3, j : j + 3] += 0.8
    return x


# {name: (maker, x, y, what is done again to a model that was loaded)}
WORK = {
    "digits": (digits, pictures(), None, lambda model: None),
    "masked": (
        *train_steps.MODELS["MaskedLanguageModel"],
        lambda model: None,
    ),
    "fgm": (
        *train_steps.METHODS["fgm"],
        lambda model: blogkeras.adversarial_training(model, method="fgm"),
    ),
}


def batches(name, devices, x, y):
    """What `fit` is given in this process, for batches of 8 rows in all.

    One data set for all processes, each of which takes its share; or, as
    "masked" on JAX, which needs no TensorFlow then, the rows of this process.
    """
    if name == "masked" and not TENSORFLOW:
        devices.auto_shard_dataset = False
        halves = x.reshape(-1, 2, 4, *x.shape[1:])
        return {
            "x": halves[:, number_of(devices)].reshape(-1, *x.shape[1:]),
            "batch_size": 4,
        }
    import tensorflow as tf

    data = x if y is None else (x, y)
    return {"x": tf.data.Dataset.from_tensor_slices(data).batch(8)}


def new_model(name):
    keras.utils.set_random_seed(0)
    # XLA does not compile collective operations of CPUs on TensorFlow.
    return WORK[name][0](
        optimizer=keras.optimizers.Adam(0.01), jit_compile=not TENSORFLOW
    )


class Save(keras.callbacks.Callback):
    """Saves the model after each epoch, complete or not at all.

    Every process saves, since all of them must take part where TensorFlow makes
    or reads distributed variables; the file of the first one is kept.
    """

    def __init__(self, folder, last, rank):
        super().__init__()
        self.folder, self.last, self.rank = folder, last, rank

    def on_epoch_end(self, epoch, logs=None):
        new = self.folder / f"new_{self.rank}.keras"
        self.model.save(new)
        if self.rank == 0:
            new.replace(self.folder / f"{epoch + 1}.keras")
        print(epoch + 1, flush=True)
        if epoch + 1 == self.last:
            time.sleep(600)


def number_of(devices):
    """The number of this process; the first one is 0."""
    if TENSORFLOW:
        resolver = devices.cluster_resolver
        return (resolver and resolver.task_id) or 0
    import jax

    return jax.process_index()


def train(name, folder, epochs, last=None):
    _, x, y, again = WORK[name]
    devices = distribution()
    with devices.scope():
        files = sorted(folder.glob("[0-9].keras"))
        if files:
            model = keras.saving.load_model(files[-1])
            again(model)
        else:
            model = new_model(name)
        return model.fit(
            **batches(name, devices, x, y),
            epochs=epochs,
            initial_epoch=int(files[-1].stem) if files else 0,
            shuffle=False,
            verbose=0,
            callbacks=[Save(folder, last, number_of(devices))],
        )


if __name__ == "__main__":
    if "masked" in sys.argv and not TENSORFLOW:
        sys.modules["tensorflow"] = None  # importing it is an error now
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=WORK)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("epochs", type=int)
    parser.add_argument("last", type=int, nargs="?")
    train(**vars(parser.parse_args()))
    print("done", flush=True)
