"""NVAE against the published code: a training step and sampling on a CPU.

    make bench-nvae OFFICIAL=<checkout of NVlabs/NVAE>

The same architecture everywhere, checked by its number of parameters: pictures
of 32 × 32 with 1 or 3 channels, 1 scale, 2 groups, 8 or 16 channels, 20 latent
channels, 1 block of 2 cells, 2 cells for each group. A step is what training
does: forward, KL terms and likelihood, spectral penalty with four power
iterations, gradients, Adamax. Steps are measured in turn, on the clock and as
time of the processor. Besides: how long a program takes to trace and compile
(`--compile mnist` builds the published preset), and the memory that a compiled
step needs with and without recomputing (JAX).

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
from harness.contest import MARK, compete, serve

PAGE = pathlib.Path(__file__).parent.parent / "docs/benchmarks/nvae.md"
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


def serve_cpu(options):
    """As `contest.serve`, with the time of the processor."""
    step = prepare(options)
    print(MARK, 0.0, flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print(MARK, time.process_time() - start, flush=True)


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
    for case, (depth, channels) in CASES.items():
        sizes = []
        for recompute in (False, True):
            model = make_model(depth, channels, recompute)
            model.compile("adamax", jit_compile=True)
            x = pictures(depth, options.batch)
            sizes.append(training.step_memory(model, x, None) / 2**20)
        lines.append([case, *(f"{size:.1f}" for size in sizes)])
    return lines


def contest(case, verb, clock, options):
    """Seconds of all contenders, in turn."""
    names = [
        name
        for name in options.only
        if name != "official" or (options.official and options.torch)
    ]
    arguments = [
        *("--case", case, "--verb", verb, "--clock", clock),
        *("--batch", str(options.batch)),
        *(["--official", options.official] if options.official else []),
    ]
    return compete(
        __file__,
        names,
        arguments,
        rounds=options.rounds,
        warm_up=2,
        environment={name: CONTENDERS[name][1] for name in names},
        python={"official": options.torch} if options.torch else {},
    )


def report(options):
    from harness import page
    from harness.statistics import ratio

    lines = [
        "# NVAE: steps and samples on a CPU (post 7574)",
        "",
        " ".join(__doc__.split("\n\n")[2].split()),
        "",
        page.environment(["keras", "tensorflow", "jax"])
        + f"; batches of {options.batch}, {options.rounds} rounds, medians.",
        "",
    ]
    for clock, name in (("cpu", "of the processor"), ("wall", "on the clock")):
        rows = []
        for case in options.cases:
            for verb in ("step", "sample"):
                seconds = contest(case, verb, clock, options)
                for contender, values in seconds.items():
                    cell = ""
                    if "official" in seconds and contender != "official":
                        cell = page.interval(
                            *ratio(seconds, "official", contender)
                        )
                    rows.append(
                        [
                            case,
                            verb,
                            CONTENDERS[contender][0],
                            f"{np.median(values):.3f}",
                            cell,
                        ]
                    )
        lines += [
            f"## Seconds {name}",
            "",
            *page.table(
                ["case", "what", "who", "seconds", "published / this"], rows
            ),
            "",
        ]
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
    parser.add_argument("--clock", choices=["cpu", "wall"], default="wall")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
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
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    options = parser.parse_args()
    if options.compile:
        return compile_times(options)
    if options.memory:
        for row in memory(options):
            print("MiB kept and recomputed:", *row)
        return None
    if options.worker:
        if options.clock == "cpu":
            return serve_cpu(options)
        return serve(lambda: prepare(options))
    return report(options)


if __name__ == "__main__":
    main()
