"""Two processes that train together: as one, and as if none had been killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import toy
import worker
from kit import TENSORFLOW, jax_only

SCRIPT = pathlib.Path(worker.__file__)
EPOCHS = 3


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment(rank, ports):
    """The variables that tell a process who takes part."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        # One device in each process.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    addresses = [f"127.0.0.1:{port}" for port in ports]
    if TENSORFLOW:
        variables["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": rank},
            }
        )
    else:
        variables |= {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": addresses[0],
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(len(ports)),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
        }
    return variables


class Workers:
    """The script in several processes at once."""

    def __init__(self, processes, folder, *arguments):
        ports = free_ports(processes)
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, SCRIPT, *map(str, arguments)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment(rank, ports),
                )
                for rank in range(processes)
            ]

    def lines(self, rank):
        return iter(self.processes[rank].stdout.readline, "")

    def wait(self):
        """All of them end by themselves, with their work done."""
        try:
            for rank, process in enumerate(self.processes):
                said = [line.strip() for line in self.lines(rank)]
                assert process.wait() == 0, self.log.read_text()
                assert said[-1] == "done", said
        finally:
            self.kill()

    def kill(self):
        """The last process is killed; without it the others cannot go on."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL)
            process.stdout.close()
            process.wait()


def run(name, folder, epochs=EPOCHS):
    """The model of two processes."""
    Workers(2, folder, name, folder, epochs).wait()
    return keras.saving.load_model(folder / f"{epochs}.keras")


def state(model):
    """All numbers that a file has: weights, seeds, the optimizer's."""
    return [
        np.asarray(keras.ops.convert_to_numpy(v), "float64")
        for v in (*model.variables, *model.optimizer.variables)
    ]


def assert_as_one(name, two, epochs=EPOCHS):
    """The state is that of one process with one device."""
    one = worker.new_model(name)
    _, x, y, _ = worker.WORK[name]
    one.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    for a, b in zip(state(one), state(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@jax_only
def test_two_processes_are_one(tmp_path):
    """The short form: of two processes that import no TensorFlow."""
    assert_as_one("masked", run("masked", tmp_path, 1), 1)


@pytest.mark.verify
@pytest.mark.parametrize("name", worker.WORK)
def test_one_is_killed_and_all_go_on(name, tmp_path):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    two = run(name, tmp_path / "whole")
    assert_as_one(name, two)
    folder = tmp_path / "killed"
    workers = Workers(2, folder, name, folder, EPOCHS, 2)
    for rank in (0, 1):
        assert any(line.strip() == "2" for line in workers.lines(rank))
    workers.kill()
    assert not (folder / f"{EPOCHS}.keras").exists()
    # The same programs have run, so the numbers are the same.
    assert toy.difference(state(run(name, folder)), state(two)) == 0
