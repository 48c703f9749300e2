"""Work that somebody ends from outside: the child of `test_interruption.py`.

    python interrupted.py train FOLDER     three epochs, a checkpoint after each
    python interrupted.py index FOLDER     saves two indices in turn, for ever

Prints "ready" when the work begins. `train` goes on from the newest checkpoint
that can be loaded; an interrupt (Ctrl-C) leaves a model that can be used.
"""

import pathlib
import signal
import sys

import keras
import numpy as np
from keras import layers

import blogkeras

EPOCHS = 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(640, 4)).astype("float32")
Y = RNG.integers(0, 3, 640)
VECTORS = RNG.normal(size=(2000, 16))


def new_model():
    """It draws at random in each step, so that a wrong place would show."""
    keras.utils.set_random_seed(0)

    def dense(inputs):
        layer = layers.Dense(4, "tanh")
        layer.build((None, inputs))
        return layer

    head = layers.Dense(3, activation="softmax")
    head.build((None, 4))
    blocks = [[dense(4), dense(4)], [dense(4), dense(4)]]
    model = blogkeras.Theseus(blocks, [dense(4), dense(4)], head, seed=0)
    model.compile(
        keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy"
    )
    return model


def newest(folder):
    """`(number of epochs done, model)` of the newest file that is whole."""
    for path in sorted(folder.glob("*.keras"), reverse=True):
        try:
            return int(path.stem), keras.saving.load_model(path)
        except Exception:  # cut off by the kill
            path.unlink()
    return 0, new_model()


def train(folder):
    epoch, model = newest(folder)
    save = keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.keras"))
    print("ready", flush=True)
    try:
        model.fit(
            X,
            Y,
            batch_size=8,
            shuffle=False,
            epochs=EPOCHS,
            initial_epoch=epoch,
            callbacks=[save],
            verbose=0,
        )
    except KeyboardInterrupt:
        assert np.isfinite(model.predict(X[:8], verbose=0)).all()
        print("interrupted", flush=True)
        return
    print("done", flush=True)


def indices():
    """Two indices of equal form and other numbers."""
    return [
        blogkeras.TransportIndex(
            [[i, i + 1, i + 2] for i in range(0, 900, 3)],
            sign * VECTORS,
            verbose=0,
        )
        for sign in (1, -1)
    ]


def index(folder):
    pair = indices()
    pair[0].save(folder / "index.npz")
    print("ready", flush=True)
    try:
        while True:
            for each in pair:
                each.save(folder / "index.npz")
    except KeyboardInterrupt:
        print("interrupted", flush=True)


if __name__ == "__main__":
    # A process that a shell started in the background inherits that Ctrl-C is
    # ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = {"train": train, "index": index}[sys.argv[1]]
    work(pathlib.Path(sys.argv[2]))
