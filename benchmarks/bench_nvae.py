"""NVAE against the published code: a training step and sampling on a CPU.

    make bench-nvae OFFICIAL=<checkout of NVlabs/NVAE>

The same architecture everywhere, checked by its number of parameters: pictures
of 32 × 32 with 1 or 3 channels, 1 scale, 2 groups, 8 or 16 channels, 20 latent
channels, 1 block of 2 cells, 2 cells for each group. A step is what training
does: forward, KL terms and likelihood, spectral penalty with four power
iterations, gradients, Adamax. Steps are measured in turn, as time of the
processor and on the clock.

Each contest adds its rows to `docs/benchmarks/nvae.csv`, and those that stand
there are not held again, so `--cases`, `--verbs` and `--only` can hold them
piece by piece; the page is written from all rows. `--compile PRESET` tells how
long a program takes to trace and compile, by `--worker`; `--memory` what a
compiled step needs with and without recomputing (JAX).

The published code is under a non-commercial licence and is no part of this
project: `--official DIR` names a checkout, `--torch PYTHON` a Python that has
PyTorch. Without both that contender is left out. It needs three shims on a CPU:

    .cuda()             of tensors and modules does nothing
    SyncBatchNormSwish  is torch's BatchNorm2d, then SiLU
    tensorboardX        is an empty module
"""

import argparse
import os
import pathlib
import sys
import time

import numpy as np
from harness.contest import MARK, Worker, measure
from harness.recording import Recording

ROWS = pathlib.Path(__file__).parent.parent / "docs/benchmarks/nvae.csv"
PAGE = ROWS.with_suffix(".md")
GRAPH = {"KERAS_BACKEND": "tensorflow"}
JAX = {"KERAS_BACKEND": "jax"}
CONTENDERS = {
    "graph": ("blogkeras, TensorFlow, no XLA", GRAPH),
    "xla": ("blogkeras, TensorFlow, XLA", GRAPH),
    "jax": ("blogkeras, JAX", JAX),
    "official": ("published code, PyTorch", {}),
}
CASES = {
    f"{'grey' if depth == 1 else 'colour'}-{channels}": (depth, channels)
    for depth in (1, 3)
    for channels in (8, 16)
}


def pictures(depth, batch):
    rng = np.random.default_rng(0)
    x = rng.random((batch, 32, 32, depth))
    # The published code pads MNIST before the model and crops in the loss.
    return (x > 0.5).astype("float32") if depth == 1 else x.astype("float32")


def make_model(depth, channels, recompute=False):
    import keras

    from blogkeras import NVAE, NVAEConfig

    keras.utils.set_random_seed(0)
    config = NVAEConfig(
        (32, 32, depth),
        groups=(2,),
        channels=channels,
        likelihood="bernoulli" if depth == 1 else "logistic_mixture",
        kl_warmup_steps=1000,
    )
    return NVAE(config, recompute, seed=0)


def ours(options):
    import keras

    depth, channels = CASES[options.case]
    model = make_model(depth, channels)
    model.compile(
        keras.optimizers.Adamax(1e-3), jit_compile=options.worker != "graph"
    )
    print("parameters", model.config.count_parameters(), flush=True)
    if options.verb == "sample":
        return lambda: model.sample(
            options.batch, seed=0, batch_size=options.batch
        )
    x = pictures(depth, options.batch)
    # Converted once: what `fit` does, an iterator does beside the step.
    x = keras.ops.convert_to_tensor(x)
    return lambda: model.train_on_batch(x)


def official(options):
    import types

    import torch
    from torch import nn

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    # As TensorFlow does. Without it, steps with many tiny numbers take up to
    # twelve times as long.
    torch.set_flush_denormal(True)
    # The three shims.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    nn.Module.cuda = lambda self, *args, **kwargs: self
    board = types.ModuleType("tensorboardX")
    board.SummaryWriter = None
    sys.modules["tensorboardX"] = board
    sys.path.insert(0, options.official)
    norms = types.ModuleType("thirdparty.inplaced_sync_batchnorm")

    class SyncBatchNormSwish(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.silu(super().forward(x))

    norms.SyncBatchNormSwish = SyncBatchNormSwish
    sys.modules["thirdparty.inplaced_sync_batchnorm"] = norms
    import model as published
    import neural_operations
    import utils

    neural_operations.SYNC_BN = False
    depth, channels = CASES[options.case]
    arguments = argparse.Namespace(
        dataset="mnist" if depth == 1 else "cifar10",
        use_se=True,
        res_dist=True,
        num_x_bits=8,
        num_latent_scales=1,
        num_groups_per_scale=2,
        num_latent_per_group=20,
        ada_groups=False,
        min_groups_per_scale=1,
        num_channels_enc=channels,
        num_channels_dec=channels,
        num_preprocess_blocks=1,
        num_preprocess_cells=2,
        num_cell_per_cond_enc=2,
        num_postprocess_blocks=1,
        num_postprocess_cells=2,
        num_cell_per_cond_dec=2,
        num_mixture_dec=10,
        num_nf=0,
    )
    cells = utils.get_arch_cells("res_mbconv")
    model = published.AutoEncoder(arguments, None, cells)
    model.crop_output = False
    parameters = sum(p.numel() for p in model.parameters())
    print("parameters", parameters, flush=True)
    if options.verb == "sample":

        def sample():
            with torch.no_grad():
                output = model.decoder_output(model.sample(options.batch, 1.0))
                return output.mean if depth == 1 else output.sample(1.0)

        model.eval()
        return sample
    optimizer = torch.optim.Adamax(model.parameters(), 1e-3)
    alpha = utils.kl_balancer_coeff(1, model.groups_per_scale, "square")
    x = pictures(depth, options.batch).transpose(0, 3, 1, 2)
    x = torch.from_numpy(np.ascontiguousarray(x))

    def step():
        optimizer.zero_grad()
        logits, _, _, kl_all, _ = model(x)
        output = model.decoder_output(logits)
        loss = utils.reconstruction_loss(output, x)
        kl, _, _ = utils.kl_balancer(kl_all, 0.5, True, alpha)
        loss = torch.mean(loss + kl)
        loss = loss + 1e-2 * (
            model.spectral_norm_parallel() + model.batchnorm_loss()
        )
        loss.backward()
        optimizer.step()

    return step


def prepare(options):
    step = (official if options.worker == "official" else ours)(options)
    cpu, clock = time.process_time(), time.perf_counter()
    step()
    print(
        "first",
        f"{time.process_time() - cpu:.1f}",
        f"{time.perf_counter() - clock:.1f}",
        flush=True,
    )
    return step


def serve(options):
    """Makes a step whenever it is asked for one, and tells both times."""
    step = prepare(options)
    print(MARK, 0.0, 0.0, flush=True)
    for _ in sys.stdin:
        cpu, clock = time.process_time(), time.perf_counter()
        step()
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        print(MARK, cpu, clock, flush=True)


class Contender(Worker):
    """A worker that says how large its model is, and answers with two times."""

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                return [float(x) for x in line.split()[1:]]
            if line.startswith("parameters"):
                self.parameters = int(line.split()[1])
            print(self.name, line, end="", flush=True)
        raise RuntimeError(f"The contender {self.name!r} ended early.")


def compile_times(options):
    """Trace and compile of a preset, for one backend in this process."""
    import keras

    from blogkeras import NVAE

    start = time.process_time()
    model = NVAE.from_preset(options.compile, seed=0)
    model.compile("adamax", jit_compile=options.worker != "graph")
    built = time.process_time() - start
    x = keras.ops.zeros((2, *model.config.input_shape))
    start = time.process_time()
    model.train_on_batch(x)
    first = time.process_time() - start
    print(
        f"{options.compile}, {CONTENDERS[options.worker][0]}: built in "
        f"{built:.0f} s of CPU, traced and compiled in {first:.0f} s"
    )


def memory(options):
    """The most MiB that a compiled step holds, by JAX's analysis."""
    from blogkeras import training

    lines = []
    for case in options.cases:
        depth, channels = CASES[case]
        sizes = []
        for recompute in (False, True):
            model = make_model(depth, channels, recompute)
            model.compile("adamax", jit_compile=True)
            x = pictures(depth, options.batch)
            sizes.append(training.step_memory(model, x, None) / 2**20)
        lines.append([case, *(f"{size:.1f}" for size in sizes)])
    return lines


def contest(case, verb, names, options):
    """`{name: (rounds, 2)}`: times of the processor and on the clock."""
    arguments = [
        *("--case", case, "--verb", verb, "--batch", str(options.batch)),
        *(["--official", options.official] if options.official else []),
    ]
    workers = []
    try:
        for name in names:
            python = options.torch if name == "official" else sys.executable
            environment = CONTENDERS[name][1]
            workers.append(
                Contender(__file__, name, arguments, environment, python)
            )
        parameters = {worker.name: worker.parameters for worker in workers}
        if len(set(parameters.values())) > 1:
            raise RuntimeError(
                "Expected equally many parameters everywhere. Received: "
                f"{parameters}"
            )
        return measure(workers, options.rounds, warm_up=2)
    finally:
        for worker in workers:
            worker.close()


def record(options):
    from harness.statistics import ratio

    record = Recording(
        options.rows,
        [
            *("case", "verb", "contender", "batch", "cpu", "clock"),
            *("cpu_ratio", "cpu_low", "cpu_high"),
            *("clock_ratio", "clock_low", "clock_high"),
        ],
        key=["case", "verb", "contender"],
    )
    names = options.only
    if not (options.official and options.torch):
        names = [name for name in names if name != "official"]
    for case in [] if options.report else options.cases:
        for verb in options.verbs:
            todo = record.missing([(case, verb, name) for name in names])
            todo = [name for *_, name in todo]
            if not todo:
                continue
            if "official" in names and "official" not in todo:
                todo.append("official")
            print(case, verb, *todo, flush=True)
            seconds = contest(case, verb, todo, options)
            rows = []
            for name, values in seconds.items():
                if not record.missing([(case, verb, name)]):
                    continue
                row = [case, verb, name, options.batch]
                row += [f"{x:.4f}" for x in np.median(values, axis=0)]
                for i in range(2):
                    one = {k: v[:, i] for k, v in seconds.items()}
                    if name == "official" or "official" not in seconds:
                        row += [""] * 3
                    else:
                        found = ratio(one, "official", name)
                        row += [f"{x:.3f}" for x in found]
                rows.append(row)
            record.extend(rows)
    write_page(record.rows(), options)


def write_page(rows, options):
    from harness import page

    def cell(row, clock):
        if not row[f"{clock}_ratio"]:
            return ""
        names = ("ratio", "low", "high")
        return page.interval(*(float(row[f"{clock}_{n}"]) for n in names))

    texts = __doc__.split("\n\n")
    lines = [
        "# NVAE: steps and samples on a CPU (post 7574)",
        "",
        *(" ".join(texts[i].split()) + "\n" for i in (2, 4)),
        # The shims, indented: code.
        texts[5].rstrip() + "\n",
        page.environment(["keras", "tensorflow", "jax"])
        + f"; batches of {rows[0]['batch']}, medians of {options.rounds} "
        "rounds. Ratios are above 1 where the published code takes longer.",
        "",
    ]
    lines += page.table(
        [
            *("case", "what", "who", "CPU, s", "clock, s"),
            *("published / this, CPU", "published / this, clock"),
        ],
        [
            [
                *(row["case"], row["verb"], CONTENDERS[row["contender"]][0]),
                *(f"{float(row[name]):.3f}" for name in ("cpu", "clock")),
                *(cell(row, name) for name in ("cpu", "clock")),
            ]
            for row in sorted(rows, key=lambda row: row["verb"] != "step")
        ],
    )
    page.write(options.page, lines)
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", choices=CONTENDERS)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--verb", choices=["step", "sample"], default="step")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--verbs", nargs="*", default=["step", "sample"])
    parser.add_argument(
        "--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS)
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--official", help="a checkout of the published code")
    parser.add_argument("--torch", help="a Python that has PyTorch")
    parser.add_argument(
        "--compile", help="a preset: only its compile time, by --worker"
    )
    parser.add_argument(
        "--memory", action="store_true", help="only that, on JAX"
    )
    parser.add_argument("--report", action="store_true", help="only the page")
    parser.add_argument("--rows", type=pathlib.Path, default=ROWS)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    options = parser.parse_args()
    if options.compile:
        return compile_times(options)
    if options.memory:
        for row in memory(options):
            print("MiB kept and recomputed:", *row)
        return None
    if options.worker:
        return serve(options)
    return record(options)


if __name__ == "__main__":
    main()
