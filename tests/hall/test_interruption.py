"""Nothing that was saved is lost when the process is ended from outside."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import interrupted
import keras
import numpy as np
import pytest
import toy

import blogkeras

SCRIPT = pathlib.Path(interrupted.__file__)
MOMENTS = 50


class Child:
    """The script in a process of its own, at work when this returns."""

    def __init__(self, work, folder):
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, work, folder],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.lines = iter(self.process.stdout.readline, "")
        said = next((x for x in self.lines if x.strip() == "ready"), None)
        assert said, "it ended before its work began"

    def end(self, number):
        """Sends the signal; what the script has printed since."""
        self.process.send_signal(number)
        said = [line.strip() for line in self.lines]
        self.process.stdout.close()
        self.process.wait()
        return said


def lasting(model):
    """What a file holds of a model: all but the metrics, which start anew."""
    variables = [*model.variables, *model.optimizer.variables]
    return [np.asarray(v, "float64") for v in variables]


@pytest.mark.verify
def test_training_goes_on_as_if_nothing_had_happened(tmp_path, capsys):
    """SIGKILL and SIGINT in turn, then the run is started again."""
    expected = interrupted.new_model()
    expected.fit(
        interrupted.X,
        interrupted.Y,
        batch_size=8,
        shuffle=False,
        epochs=interrupted.EPOCHS,
        verbose=0,
    )
    rng, ended, folder = random.Random(0), 0, tmp_path / "0"
    folder.mkdir()
    runs = 0
    while ended < MOMENTS:
        child = Child("train", folder)
        time.sleep(rng.uniform(0, 1))
        said = child.end([signal.SIGKILL, signal.SIGINT][ended % 2])
        ended += "done" not in said
        if (folder / f"{interrupted.EPOCHS}.keras").exists():
            epoch, model = interrupted.newest(folder)
            if epoch == interrupted.EPOCHS:
                assert toy.difference(lasting(model), lasting(expected)) == 0
                runs += 1
                folder = tmp_path / str(runs)
                folder.mkdir()
    with capsys.disabled():
        print(f"\nended {ended} times, {runs} runs came to their end")
    assert runs


@pytest.mark.verify
def test_an_index_is_the_old_one_or_the_new_one(tmp_path, capsys):
    right = [index.search([0, 1], k=3) for index in interrupted.indices()]
    rng = random.Random(0)
    for moment in range(MOMENTS):
        child = Child("index", tmp_path)
        time.sleep(rng.uniform(0, 0.5))
        child.end([signal.SIGKILL, signal.SIGINT][moment % 2])
        loaded = blogkeras.TransportIndex.load(tmp_path / "index.npz")
        found = loaded.search([0, 1], k=3)
        assert any(
            np.array_equal(found.indices, each.indices)
            and np.array_equal(found.distances, each.distances)
            for each in right
        )
    with capsys.disabled():
        print(f"\nan index that was being saved was whole {MOMENTS} times")


def test_an_interrupt_leaves_a_model_that_can_be_used():
    """Ctrl-C in the middle of an epoch of adversarial training."""
    model = toy.compiled(toy.classifier())
    blogkeras.adversarial_training(model, epsilon=0.1)

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise KeyboardInterrupt

    options = {"batch_size": 8, "verbose": 0}
    with pytest.raises(KeyboardInterrupt):
        model.fit(toy.TOKENS, toy.LABELS, callbacks=[Interrupt()], **options)
    assert np.isfinite(model.predict(toy.TOKENS, verbose=0)).all()
    model.fit(toy.TOKENS, toy.LABELS, **options)
