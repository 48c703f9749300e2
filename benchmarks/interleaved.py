"""Times contenders step by step in turn, each in a process of its own.

A machine that slows down slows down all contenders of a round alike, so the
ratios within a round hold where absolute times do not. A contender is a
function that prepares everything and returns a step; it runs in

    python benchmarks/bench_<room>.py --worker NAME

which makes one step for each line on its standard input and answers with the
seconds it took.
"""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata

import numpy as np

MARK = "step-seconds"


def serve(prepare):
    """The worker's side: makes a step whenever it is asked for one."""
    step = prepare()
    print(MARK, 0.0, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(MARK, time.perf_counter() - start, flush=True)


class Worker:
    """A contender in a process of its own, of another Python if need be."""

    def __init__(
        self,
        script,
        name,
        arguments=(),
        environment=(),
        python=sys.executable,
    ):
        self.name = name
        self.process = subprocess.Popen(
            [python, script, "--worker", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TF_CPP_MIN_LOG_LEVEL": "3",
                **dict(environment),
            },
        )
        self.answer = self._answer()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                return float(line.split()[1])
        raise RuntimeError(f"The contender {self.name!r} ended early.")

    def step(self):
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(workers, rounds, warm_up=3, progress=None):
    """Seconds of each worker's steps, `{name: array of length rounds}`."""
    seconds = {worker.name: [] for worker in workers}
    for turn in range(warm_up + rounds):
        for worker in workers:
            elapsed = worker.step()
            if turn >= warm_up:
                seconds[worker.name].append(elapsed)
        if progress:
            progress(turn + 1, warm_up + rounds)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds, name, base, draws=2000, seed=0):
    """Median ratio within rounds, and its 95 % bootstrap interval."""
    ratios = seconds[name] / seconds[base]
    picks = np.random.default_rng(seed).integers(
        0, len(ratios), (draws, len(ratios))
    )
    medians = np.median(ratios[picks], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def environment(packages):
    """A line that says what was measured on what."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}"
    )
