"""Counts what a step of each method costs as its sizes grow.

    python benchmarks/record_scaling.py [--only CASE ...] [--minutes 10]
    python benchmarks/record_scaling.py --report

Nothing is timed. XLA counts the floating-point operations of the whole train
step (`jax.stages.Lowered.cost_analysis`; where blocks are computed in a loop,
the products are counted by `blogkeras.compression`), and says of the compiled
program how many bytes of memory it needs at once: weights, optimizer, batch and
everything in between (`memory_analysis`; of the methods and ELECTRA, for two
values of the batch and of the length).
The models are those of `gpu.py`, on the JAX backend. One size changes at a
time; the others are those of BASE.

Each row goes to `docs/results/scaling.csv`; rows that stand there are not
counted again. `--report` draws `docs/scaling.png` and writes the tables
between the marks of `docs/scaling.md`.
"""

import os

# A count does not depend on how well the code is compiled.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["KERAS_BACKEND"] = "jax"

import functools
import math

import gpu
import jax
import keras
import numpy as np
from harness import command_line, page
from harness.recording import Recording, group

import blogkeras
from blogkeras import report, training
from blogkeras.compression.operations import count_operations

ROWS = page.ROOT / "docs/results/scaling.csv"
PAGE = page.ROOT / "docs/scaling.md"
COLUMNS = ["case", "axis", "value", "flops", "bytes"]
BASE = {
    **gpu.SMALL,
    "batch": 16,
    "length": 64,
    "width": 128,
    "blocks": 2,
    "vocabulary": 2000,
    "codes": 512,
    "image": 32,
    "words": 16,
    "rows": 1024,
    "chains": 1024,
    "nvae": "digits",
}
TEXT = {
    "batch": (8, 16, 64),
    "length": (32, 64, 256),
    "width": (64, 128, 512),
    "blocks": (1, 2, 8),
    "vocabulary": (500, 2000, 32000),
}


def step(make, size):
    """The pure train step of a model, its state and its batch."""
    model, x, y = make(size)
    data = (x,) if y is None else (x, y)
    model._symbolic_build(data_batch=data)
    model.optimizer.build(model.trainable_variables)
    hook, train_step = training.installed(model), model.train_step
    if hook is not None:
        train_step = functools.partial(training.make_step(hook), model)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    return jax.jit(train_step, donate_argnums=0), (state, data)


def function(make, size):
    """A function of `gpu.py` with its arrays."""
    fn, *arrays = make(size)
    return jax.jit(fn), arrays


def dependence(size):
    """HSIC of as many samples as there are rows."""
    x = gpu.normal((size["rows"], 10))
    return blogkeras.hsic, x, gpu.normal(x.shape, 1)


def fourier(size):
    _, x, y = dependence(size)
    return functools.partial(blogkeras.fourier_hsic, seed=0), x, y


def codebook(**options):
    return lambda codes, dim: blogkeras.VectorQuantizer(codes, **options)


def residual(codes, dim):
    return blogkeras.ResidualVectorQuantizer(4, codes)


def bits(codes, dim):
    return blogkeras.LookupFreeQuantizer(dim)


def scalars(codes, dim):
    return blogkeras.FiniteScalarQuantizer([5] * dim)


# What the options of a quantizer add to the step of a VQ-VAE.
QUANTIZERS = {
    "VQVAE, learned codes": codebook(),
    "VQVAE, moving averages": codebook(ema_decay=0.99),
    "VQVAE, rotation": codebook(gradient="rotation"),
    "VQVAE, DiVeQ": codebook(gradient="diveq"),
    "VQVAE, SimVQ": codebook(codebook_transform="linear"),
    "VQVAE, SimVQ diagonal": codebook(codebook_transform="diagonal"),
    "VQVAE, look-up in 8 dimensions": codebook(codebook_dim=8),
    "VQVAE, 4 residual stages": residual,
    "VQVAE, LFQ": bits,
    "VQVAE, FSQ": scalars,
}
METHODS = {"plain": None, **{n: n for n in blogkeras.adversarial.METHODS}}
# XLA counts the body of a loop once. Of these the products are counted, as
# often as they are computed.
LOOPS = ("VQVAE", *QUANTIZERS, "hsic", "fourier_hsic")
# Of these a program is compiled, which takes some seconds.
MEMORY = (*METHODS, "ELECTRA", "VQVAE", *QUANTIZERS)
# What the other methods cost beside plain training does not depend on these.
FEW = {axis: TEXT[axis] for axis in ("batch", "length")}
# {case: (what is lowered, its maker in gpu.py, {axis: values})}
CASES = {
    **{
        name: (
            step,
            gpu.trained_by(method),
            TEXT if name in ("plain", "fgm") else FEW,
        )
        for name, method in METHODS.items()
    },
    "ELECTRA": (step, gpu.electra, TEXT),
    "VQVAE": (
        step,
        gpu.vqvae,
        {
            "batch": (8, 16, 64),
            "image": (16, 32, 128),
            "codes": (128, 512, 8192),
            "dim": (16, 32, 128),
        },
    ),
    **{
        name: (
            step,
            functools.partial(gpu.vqvae, quantizer=make),
            # Bits and scalars have no codebook.
            {"codes": (512,) if make in (bits, scalars) else (512, 8192)},
        )
        for name, make in QUANTIZERS.items()
    },
    "CodePrior": (step, gpu.code_prior, {"batch": (8, 16, 64)}),
    "DenoisingDensityEstimator": (
        step,
        gpu.estimator,
        {"chains": (256, 1024, 16384)},
    ),
    "HSICBottleneck": (step, gpu.bottleneck, {"batch": (8, 16, 64)}),
    "hsic": (function, dependence, {"rows": (256, 1024, 4096)}),
    "fourier_hsic": (function, fourier, {"rows": (256, 1024, 4096)}),
    "NVAE": (step, gpu.nvae, {"batch": (8, 16, 64)}),
    "Theseus": (
        step,
        gpu.theseus,
        {"batch": (8, 16, 64)},
    ),
}


@functools.cache
def count(case, changes, with_memory):
    """`(operations, bytes)` of a case with some sizes changed."""
    lower, make, _ = CASES[case]
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    program, arguments = lower(make, {**BASE, **dict(changes)})
    lowered = program.lower(*arguments)
    flops = lowered.cost_analysis()["flops"]
    if case in LOOPS:
        text = lowered.compiler_ir("hlo").as_hlo_text()
        flops = count_operations(text).count
    if not with_memory:
        return flops, ""
    memory = lowered.compile().memory_analysis()
    return flops, (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def record(options):
    rows = Recording(options.rows, COLUMNS, key=COLUMNS[:3])
    runs = [
        (case, axis, value)
        for case, (*_, axes) in CASES.items()
        for axis, values in axes.items()
        for value in values
        if not options.only or case in options.only
    ]
    for case, axis, value in rows.todo(runs, options):
        changes = () if value == BASE[axis] else ((axis, value),)
        small = value != max(CASES[case][-1][axis])
        memory = case in MEMORY and (
            not changes
            or (small and axis in ("batch", "length"))
            or case in QUANTIZERS
        )
        rows.append(case, axis, value, *count(case, changes, memory))


# The page


def growth(points):
    """The exponent of the growth from the middle to the largest value."""
    if len(points) < 3:
        return math.nan
    (_, _), (x, y), (x2, y2) = sorted(points.items())
    return math.log(y2 / y) / math.log(x2 / x)


def counted(rows):
    """`{case: {axis: {value: operations}}}`."""
    return {
        case: {
            axis: {float(r["value"]): float(r["flops"]) for r in some}
            for axis, some in group(of_case, "axis").items()
        }
        for case, of_case in group(rows, "case").items()
    }


def memory(rows, axis="batch"):
    """`{case: {value of this axis: bytes}}`."""
    found = {}
    for row in rows:
        if row["axis"] == axis and row["bytes"]:
            values = found.setdefault(row["case"], {})
            values[float(row["value"])] = float(row["bytes"])
    return found


# Passes of a step in units of a forward pass: forward 1, dX 1, dW 1.
PASSES = {
    "plain": "3",
    "fgm": "5",
    "fgsm": "5",
    "pgd": "2K + 3",
    "freelb": "3K",
    "gradient_penalty": "6",
    "noise_stability": "9",
    "vat": "7 + 2 iters",
    "trades": "7 + 2K",
    "smart": "7 + 2K",
    "rdrop": "6",
    "awp": "6",
}


def transformer(size, tokens_out=0):
    """Operations of a forward pass of the encoder: products only."""
    b, t, d = size["batch"], size["length"], size["width"]
    block = 24 * b * t * d**2 + 4 * b * t**2 * d
    return size["blocks"] * block


def tables(rows):
    """The lines that stand between the marks of the page."""
    found, bytes_of = counted(rows), memory(rows)
    base = {
        c: axes["batch"][BASE["batch"]]
        for c, axes in found.items()
        if "batch" in axes
    }
    yield from page.table(
        [
            "method",
            "passes",
            "GFLOP",
            "of plain",
            "MB at batch 8",
            "16",
            "MB a row",
        ],
        [
            [
                name,
                PASSES[name],
                f"{base[name] / 1e9:.2f}",
                f"{base[name] / base['plain']:.2f}",
                *(f"{v / 1e6:.1f}" for v in bytes_of[name].values()),
                f"{np.diff([*bytes_of[name].values()])[0] / 8e6:.2f}",
            ]
            for name in METHODS
        ],
    )
    yield ""
    yield from page.table(
        ["VQ-VAE with", "GFLOP, K = 512", "8192", "MB, K = 512", "8192"],
        [
            [
                name.removeprefix("VQVAE, "),
                *(
                    f"{found[name]['codes'][k] / 1e9:.3f}"
                    if k in found[name]["codes"]
                    else ""
                    for k in (512, 8192)
                ),
                *(
                    f"{bytes_by_codes[k] / 1e6:.1f}"
                    if k in bytes_by_codes
                    else ""
                    for k in (512, 8192)
                ),
            ]
            for name in QUANTIZERS
            for bytes_by_codes in [memory(rows, "codes")[name]]
        ],
    )
    yield ""
    cells = []
    for case, axes in found.items():
        if case in QUANTIZERS:
            continue
        for axis, points in axes.items():
            numbers = [
                f"{x:g}: {y / 1e9:.3g}" for x, y in sorted(points.items())
            ]
            cells.append(
                [case, axis, ", ".join(numbers), f"{growth(points):.2f}"]
            )
    yield from page.table(
        ["case", "axis", "GFLOP by value", "growth exponent"], cells
    )


def figure(rows, path):
    """Operations by each size: counted, and by the formula beyond."""
    found = counted(rows)
    drawing = report.require("matplotlib.figure").Figure(figsize=(9, 6.5))
    panels = drawing.subplots(2, 2)
    for axes, axis in zip(
        panels.flat, ("batch", "length", "width", "vocabulary"), strict=True
    ):
        for number, case in enumerate(("plain", "fgm", "ELECTRA")):
            points = sorted(found[case][axis].items())
            x, y = zip(*points, strict=True)
            color = f"C{number}"
            axes.loglog(x, np.array(y) / 1e9, "o-", color=color, label=case)
            # In each size a cost is a polynomial of second degree: beyond the
            # last point, the one through the three.
            far = np.geomspace(x[-1], 4 * x[-1], 9)
            ahead = np.polynomial.Polynomial.fit(x, y, 2)(far)
            axes.loglog(far, ahead / 1e9, ":", color=color)
        axes.set_xlabel(axis)
        axes.set_ylabel("GFLOP a step")
    panels[0, 0].legend(title="dotted: extrapolated")
    drawing.tight_layout()
    return report.save_figure(drawing, path)


def write(options):
    rows = Recording(options.rows, COLUMNS, key=COLUMNS[:3]).rows()
    text = PAGE.read_text("utf-8")
    new = "\n".join(tables(rows))
    start, end = "<!-- counted -->\n", "<!-- /counted -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{start}\n{new}\n\n{end}{after}", "utf-8")
    print(figure(rows, PAGE.with_name("scaling.png")), PAGE)


def main():
    parser = command_line.recording(__doc__, ROWS, only=CASES, seeds=None)
    options = parser.parse_args()
    write(options) if options.report else record(options)


if __name__ == "__main__":
    main()
