"""Times contenders step by step in turn, each in a process of its own.

A machine that slows down slows down all contenders of a round alike, so the
ratios within a round hold where absolute times do not. A contender is a
function that prepares everything and returns a step; it runs in

    python benchmarks/bench_<room>.py --worker NAME

which makes one step for each line on its standard input and answers with the
seconds it took.
"""

import os
import subprocess
import sys
import time

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


def compete(script, names, arguments=(), rounds=30, warm_up=3, **options):
    """Starts the contenders, measures them in turn and ends them.

    Args:
        script: The benchmark's path, `__file__`.
        names: Names of the contenders, for `--worker`.
        arguments: Further command line arguments, for all of them.
        rounds: Integer. Counted rounds.
        warm_up: Integer. Rounds that are not counted, first.
        **options: Dicts `{name: ...}` for `environment` and `python` of single
            contenders, see `Worker`.

    Returns:
        `{name: array of length rounds}`, seconds.
    """
    workers = []
    try:
        for name in names:
            print("starting", name, flush=True)
            chosen = {k: v[name] for k, v in options.items() if name in v}
            workers.append(Worker(script, name, arguments, **chosen))
        return measure(
            workers,
            rounds,
            warm_up,
            progress=lambda i, n: print(f"round {i} of {n}", flush=True),
        )
    finally:
        for worker in workers:
            worker.close()
