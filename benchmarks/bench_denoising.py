"""Langevin dynamics and the estimator's train step against PyTorch.

    make bench-denoising

`--torch` is the Python of an environment with torch and torchebm, which nothing
else needs (make installs one); without it the contenders that need them are
left out. All have an energy of four layers of 64 and one core. Every step is
measured by the clock and in seconds of the processor. Compiling is not counted;
its seconds stand in a column of their own.

    langevin-64, langevin-1024   1000 steps of that many chains in the plane.
        torchebm: its LangevinDynamics sampler, gradients by autograd.
    train     a step of the estimator, 512 points: ours in `fit` with
        steps_per_execution=50 (the time of a step is a fiftieth), PyTorch with
        double backward and Adam.
    pictures  a step of an energy of 28 × 28 pictures, batch 64, by backend,
        with and without XLA. No peer.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from harness.contest import MARK, Worker, measure
from harness.page import environment, interval, table, write
from harness.statistics import ratio

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs/benchmarks/denoising.md"
THREADS = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false "
    "intra_op_parallelism_threads=1",
}
JAX = {**THREADS, "KERAS_BACKEND": "jax"}
TENSORFLOW = {**THREADS, "KERAS_BACKEND": "tensorflow"}
CONTENDERS = {
    "jax": ("blogkeras, JAX", JAX),
    "xla": ("blogkeras, TensorFlow, XLA", TENSORFLOW),
    "graph": ("blogkeras, TensorFlow, no XLA", TENSORFLOW),
    "torch": ("PyTorch", THREADS),
}
# Which contenders take part where, and the base that others are compared with.
SECTIONS = {
    "langevin-64": (("jax", "xla", "torch"), "torch"),
    "langevin-1024": (("jax", "xla", "torch"), "torch"),
    "train": (("jax", "xla", "graph", "torch"), "torch"),
    "pictures": (("jax", "xla", "graph"), "graph"),
}
CALLS = 50  # train steps in one execution, and in one round


def chains(options):
    return int(options.section.rpartition("-")[2])


def langevin(options):
    import keras

    from blogkeras import langevin, mlp_log_density
    from blogkeras.denoising import DenoisingDensityEstimator

    keras.utils.set_random_seed(0)
    model = DenoisingDensityEstimator(mlp_log_density((2,)), 0.1, seed=0)
    x = np.random.default_rng(0).normal(size=(chains(options), 2))
    return lambda: langevin(model, x, options.steps, 0.005, seed=0)


def estimator(options):
    import keras

    from blogkeras import DenoisingDensityEstimator, mlp_log_density

    keras.utils.set_random_seed(0)
    model = DenoisingDensityEstimator(
        mlp_log_density((2,)), 0.1, annealing_steps=0, seed=0
    )
    model.compile(
        keras.optimizers.Adam(1e-3),
        jit_compile=options.worker != "graph",
        steps_per_execution=CALLS,
    )
    x = np.random.default_rng(0).normal(size=(512 * CALLS, 2))
    x = x.astype("float32")
    model.adapt(x)
    return lambda: model.fit(x, batch_size=512, verbose=0)


def pictures(options):
    import keras

    from blogkeras import AnnealedScoreMatching, residual_log_density

    keras.utils.set_random_seed(0)
    model = AnnealedScoreMatching(
        residual_log_density((28, 28, 1), (16, 32)),
        np.geomspace(0.1, 1, 10),
        seed=0,
    )
    model.compile(
        keras.optimizers.Adam(1e-3), jit_compile=options.worker != "graph"
    )
    x = np.random.default_rng(0).uniform(size=(64, 28, 28, 1))
    x = x.astype("float32")
    model.adapt(x)
    return lambda: model.train_on_batch(x)


def torch_network():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = [2, 64, 64, 64, 64]
    parts = []
    for size, units in itertools.pairwise(sizes):
        parts += [torch.nn.Linear(size, units), torch.nn.SiLU()]
    return torch.nn.Sequential(*parts, torch.nn.Linear(64, 1))


def torch_langevin(options):
    import torch
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    network = torch_network()

    class Energy(BaseModel):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return -self.network(x)[:, 0] + x.square().sum(-1) / 8

    sampler = LangevinDynamics(Energy(), step_size=0.0025, noise_scale=1.0)
    x = torch.randn(chains(options), 2)
    return lambda: sampler.sample(x=x.clone(), n_steps=options.steps)


def torch_estimator(options):
    import torch

    network = torch_network()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    data = torch.randn(512 * CALLS, 2)
    sigma = 0.1

    def step():
        for x in data[torch.randperm(len(data))].split(512):
            unit = torch.randn_like(x)
            y = (x + sigma * unit).requires_grad_()
            values = network(y)[:, 0] - y.square().sum(-1) / 8
            (score,) = torch.autograd.grad(values.sum(), y, create_graph=True)
            loss = (sigma * score + unit).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def prepare(options):
    """A step that is warmed up; its first call, with compiling, is printed."""
    is_torch = options.worker == "torch"
    if options.section.startswith("langevin"):
        make = torch_langevin if is_torch else langevin
    elif options.section == "train":
        make = torch_estimator if is_torch else estimator
    else:
        make = pictures
    step = make(options)
    start = time.perf_counter()
    step()
    print("first-seconds", time.perf_counter() - start, flush=True)
    return step


def serve(prepare):
    """As `harness.contest.serve`, with seconds of the processor, too."""
    step = prepare()
    print(MARK, 0.0, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        step()
        wall = time.perf_counter() - start[0]
        print("processor-seconds", time.process_time() - start[1])
        print(MARK, wall, flush=True)


class Contender(Worker):
    """A worker that also tells its first step, and seconds of the processor."""

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("first-seconds"):
                self.first = float(line.split()[1])
                self.processor = []
            elif line.startswith("processor-seconds"):
                self.processor.append(float(line.split()[1]))
            elif line.startswith(MARK):
                return float(line.split()[1])
        raise RuntimeError(f"The contender {self.name!r} ended early.")


def contest(section, options):
    """`{clock: seconds}` and the seconds of the first steps, by name."""
    names = [
        name
        for name in SECTIONS[section][0]
        if name in options.only and (name != "torch" or options.torch)
    ]
    workers = []
    try:
        for name in names:
            print("starting", section, name, flush=True)
            workers.append(
                Contender(
                    __file__,
                    name,
                    ["--section", section, "--steps", str(options.steps)],
                    CONTENDERS[name][1],
                    options.torch if name == "torch" else sys.executable,
                )
            )
        wall = measure(workers, options.rounds, warm_up=1)
    finally:
        for worker in workers:
            worker.close()
    processor = {
        worker.name: np.array(worker.processor[-options.rounds :])
        for worker in workers
    }
    first = {worker.name: worker.first for worker in workers}
    return {"cpu": processor, "wall": wall}, first


def peers(python):
    """`torch 2.13.0, torchebm 0.8.9` of another Python."""
    code = (
        "from importlib.metadata import version as v;"
        "print(*(f'{n} {v(n)}' for n in ('torch', 'torchebm')), sep=', ')"
    )
    answer = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def lines(section, options):
    results, first = contest(section, options)
    base = SECTIONS[section][1]
    count = CALLS if section == "train" else 1
    rows = []
    for name in first:
        cells = [CONTENDERS[name][0]]
        for clock in ("cpu", "wall"):
            seconds = results[clock]
            cells.append(f"{np.median(seconds[name]) / count:.4f}")
            if name == base or base not in seconds:
                cells.append("")
            else:
                middle, low, high = ratio(seconds, base, name)
                cells.append(interval(middle, low, high))
        rows.append([*cells, f"{first[name]:.1f}"])
    other = CONTENDERS[base][0]
    return table(
        [
            "contender",
            "seconds of the processor",
            f"times as fast as {other} (95 %)",
            "seconds by the clock",
            "times as fast (95 %)",
            "first call, with compiling, s",
        ],
        rows,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", choices=CONTENDERS)
    parser.add_argument("--section", choices=SECTIONS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--torch", help="a Python with torch and torchebm")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    parser.add_argument(
        "--state",
        type=pathlib.Path,
        default=pathlib.Path("results/bench_denoising.json"),
        help="of sections that were measured; the page shows them all",
    )
    options = parser.parse_args()
    if options.worker:
        # JAX takes several threads whatever the variables say.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return serve(lambda: prepare(options))
    state = {}
    if options.state.exists():
        state = json.loads(options.state.read_text("utf-8"))
    for section in options.sections:
        state[section] = lines(section, options)
        if options.torch:
            state["peers"] = peers(options.torch)
        options.state.parent.mkdir(parents=True, exist_ok=True)
        options.state.write_text(json.dumps(state), encoding="utf-8")
    titles = {
        "langevin-64": f"Langevin dynamics, {options.steps} steps, 64 chains",
        "langevin-1024": f"Langevin dynamics, {options.steps} steps, 1024 "
        "chains",
        "train": "A train step of the estimator, 512 points",
        "pictures": "A train step of an energy of 28 × 28 pictures, 64 rows",
    }
    text = [
        "# Benchmark: denoising (post 7038)",
        "",
        environment(["keras", "tensorflow", "jax", "numpy"])
        + f"; peers: {state.get('peers', 'none')}. One core each.",
        "",
        "Interleaved rounds. The peer of Langevin dynamics is torchebm's "
        "sampler, that of training a loop of plain PyTorch with double "
        "backward.",
        "",
    ]
    for section, title in titles.items():
        if section in state:
            text += [f"## {title}", "", *state[section], ""]
    write(options.page, [*text, "Regenerate: `make bench-denoising`."])
    print("\n".join(text))


if __name__ == "__main__":
    main()
