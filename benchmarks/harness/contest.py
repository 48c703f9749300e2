"""Times contenders step by step in turn, each in a process of its own.

A machine that slows down slows down all contenders of a round alike, so the
ratios within a round hold where absolute times do not. A contender is a
function that prepares everything and returns a step; it runs in

    python benchmarks/bench_<room>.py <the benchmark's options> --worker NAME

which makes one step for each line on its standard input and answers with the
seconds it took.
"""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

MARK = "step-seconds"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false "
    "intra_op_parallelism_threads=1",
}
JAX = {"KERAS_BACKEND": "jax"}
TENSORFLOW = {"KERAS_BACKEND": "tensorflow"}
# bert4keras on tf_keras, for which it was written.
LEGACY = {"TF_KERAS": "1", "TF_USE_LEGACY_KERAS": "1"}


def serve(prepare, clock=time.perf_counter):
    """The worker's side: makes a step whenever it is asked for one.

    Args:
        prepare: Function that returns a step, or a step and a dict of facts
            about it that JSON can hold.
        clock: Function that returns seconds; `time.process_time` for those of
            the processor.
    """
    prepared = prepare()
    step, facts = prepared if isinstance(prepared, tuple) else (prepared, {})
    print(MARK, 0.0, json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = clock()
        step()
        print(MARK, clock() - start, flush=True)


def peak():
    """The most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _environment(settings):
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **dict(settings)}


def ask(script, *arguments, environment=(), python=sys.executable):
    """What a call of the benchmark prints last, as JSON."""
    answer = subprocess.run(
        [python, script, *arguments],
        env=_environment(environment),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


class Worker:
    """A contender in a process of its own, of another Python if need be.

    It gets the options of the benchmark, and `arguments` behind them. `facts`
    is what it says of itself when it is ready.
    """

    def __init__(
        self,
        script,
        name,
        arguments=(),
        environment=(),
        python=sys.executable,
    ):
        self.name = name
        self.facts = {}
        options = [*sys.argv[1:], *arguments, "--worker", name]
        self.process = subprocess.Popen(
            [python, script, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(environment),
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                _, seconds, *facts = line.split(" ", 2)
                if facts:
                    self.facts = json.loads(facts[0])
                return float(seconds)
        raise RuntimeError(f"The contender {self.name!r} ended early.")

    def step(self):
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(workers, rounds, warm_up=3):
    """Seconds of each worker's steps, `{name: array of length rounds}`."""
    seconds = {worker.name: [] for worker in workers}
    for turn in range(warm_up + rounds):
        for worker in workers:
            elapsed = worker.step()
            if turn >= warm_up:
                seconds[worker.name].append(elapsed)
        print(f"round {turn + 1} of {warm_up + rounds}", flush=True)
    return {name: np.array(values) for name, values in seconds.items()}


def compete(
    script, names, arguments=(), rounds=30, warm_up=3, facts=None, **options
):
    """Starts the contenders, measures them in turn and ends them.

    Args:
        script: The benchmark's path, `__file__`.
        names: Names of the contenders, for `--worker`.
        arguments: Command line arguments for all of them, beside those that
            the benchmark itself was given.
        rounds: Integer. Counted rounds.
        warm_up: Integer. Rounds that are not counted, first.
        facts: Dict, into which `{name: facts}` are put, see `serve`.
        **options: Dicts `{name: ...}` for `environment` and `python` of single
            contenders, see `Worker`; names that are no contender's are left.

    Returns:
        `{name: array of length rounds}`, seconds.
    """
    workers = []
    try:
        for name in names:
            print("starting", name, flush=True)
            chosen = {k: v[name] for k, v in options.items() if name in v}
            workers.append(Worker(script, name, arguments, **chosen))
            if facts is not None:
                facts[name] = workers[-1].facts
        return measure(workers, rounds, warm_up)
    finally:
        for worker in workers:
            worker.close()
