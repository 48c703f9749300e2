"""Quantise-and-update against its peers, and sampling against the post's loop.

    make bench-quantization

One step finds the nearest codes, moves an averaged codebook and takes the
gradient of loss and output with respect to the vectors. Peers are Sonnet's
`VectorQuantizerEMA` (TensorFlow), from the folder `--sonnet DIR`, and
vector-quantize-pytorch, run by a Python of its own, `--torch PYTHON`; a peer
that is not given is left out. Vectors, codes and decay are the same for all.
The bound is the time of the N × K × dim product alone, in blocks that stay in
the cache: 2 N K dim operations at the rate that this machine reaches. Peak
memory is that of the process less what it had before the first step.

Sampling: a 32×32 code map by `CodePrior.sample`, against the whole network
again for every code. Priors: training step and sampling of both networks.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time

import numpy as np
from harness.contest import MARK, Worker, measure, serve
from harness.page import environment
from harness.statistics import ratio

TABLE = pathlib.Path(__file__).parent.parent / "docs/benchmarks/quantization.md"
SIZES = {"small": (65_536, 64, 1024), "large": (16_384, 256, 8192)}
SECTIONS = (*SIZES, "sampling", "priors")
JAX = {"KERAS_BACKEND": "jax"}
# name: (label, environment)
CONTENDERS = {
    "bound": ("bound: blocks of the product alone, JAX", JAX),
    "jax": ("blogkeras, JAX", JAX),
    "xla": ("blogkeras, TensorFlow, XLA", {}),
    "graph": ("blogkeras, TensorFlow, no XLA", {}),
    "sonnet": ("Sonnet 2, tf.function", {}),
    "sonnet-xla": ("Sonnet 2, XLA", {}),
    "torch": ("vector-quantize-pytorch", {}),
}


def data(options):
    n, dim, k = SIZES[options.size]
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, dim)).astype("float32")
    e = rng.normal(size=(k, dim)).astype("float32")
    return z, e


def bound(options):
    import jax
    from jax import numpy as jnp

    z, e = data(options)
    rows = max(2**19 // len(e), 8)
    z, e = jnp.reshape(z, (-1, rows, z.shape[-1])), jnp.asarray(e.T)

    @jax.jit
    def product(z):
        # One number of each block, so that no product is left out.
        return jax.lax.map(lambda block: (block @ e)[0, 0], z)

    return lambda: product(z).block_until_ready()


def ours(options):
    import keras
    from keras import ops

    from blogkeras import VectorQuantizer, backend

    z, e = data(options)
    layer = VectorQuantizer(len(e), ema_decay=0.99)
    layer.build(z.shape)
    layer.embeddings.assign(e)
    z = ops.convert_to_tensor(z)

    def objective(z):
        quantized, codes = layer(z, training=True, return_codes=True)
        loss = layer.losses[0] + ops.sum(ops.square(quantized))
        return loss, codes

    if keras.backend.backend() == "jax":
        import jax

        state = [v.value for v in layer.variables]

        @jax.jit
        def step(state, z):
            mapping = list(zip(layer.variables, state, strict=True))
            with keras.StatelessScope(mapping, collect_losses=True) as scope:

                def loss(z):
                    quantized = layer(z, training=True)
                    return scope.losses[-1] + ops.sum(ops.square(quantized))

                value, slope = jax.value_and_grad(loss)(z)
            return (
                value,
                slope,
                [scope.get_current_value(v) for v in layer.variables],
            )

        def run():
            nonlocal state
            value, slope, state = step(state, z)
            jax.block_until_ready((value, slope, state))

        return run
    import tensorflow as tf

    @tf.function(jit_compile=options.worker == "xla", autograph=False)
    def step(z):
        (loss, _), slope = backend.value_and_grad(objective, z)
        return loss, slope

    return lambda: step(z)[0].numpy()


def sonnet(options):
    import sonnet as snt
    import tensorflow as tf

    z, e = data(options)
    layer = snt.nets.VectorQuantizerEMA(e.shape[1], len(e), 0.25, 0.99)
    layer.embeddings.assign(e.T)
    z = tf.constant(z)

    @tf.function(jit_compile=options.worker == "sonnet-xla", autograph=False)
    def step(z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            out = layer(z, is_training=True)
            loss = out["loss"] + tf.reduce_sum(out["quantize"] ** 2)
        return loss, tape.gradient(loss, z)

    return lambda: step(z)[0].numpy()


def torch(options):
    import torch
    from vector_quantize_pytorch import VectorQuantize

    z, e = data(options)
    layer = VectorQuantize(
        dim=e.shape[1],
        codebook_size=len(e),
        decay=0.99,
        commitment_weight=0.25,
        rotation_trick=False,
    )
    layer.codebook = torch.tensor(e)
    z = torch.tensor(z[None], requires_grad=True)

    def step():
        z.grad = None
        quantized, _, loss = layer(z)
        (loss.sum() + quantized.square().sum()).backward()

    return step


def prepare(options):
    """A step, warmed up; then the memory that it took is known."""
    kind = options.worker.split("-")[0]
    make = {"bound": bound, "sonnet": sonnet, "torch": torch}.get(kind, ours)
    step = make(options)
    before = peak()
    step()
    step()
    if options.memory:
        print(MARK, peak() - before, flush=True)
        sys.exit()
    return step


def peak():
    """Most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def contest(size, options):
    """`(seconds, MiB)` of the contenders, by name."""
    peers = {"sonnet": options.sonnet, "torch": options.torch}
    workers, memory = [], {}
    for name in options.only:
        kind = name.split("-")[0]
        if not peers.get(kind, True):
            continue
        python = options.torch if kind == "torch" else sys.executable
        arguments = ["--size", size]
        environment_ = dict(CONTENDERS[name][1])
        if kind == "sonnet":
            environment_["PYTHONPATH"] = options.sonnet
        print("starting", size, name, flush=True)
        start = __file__, name
        once = Worker(*start, [*arguments, "--memory"], environment_, python)
        memory[name] = once.answer
        once.close()
        workers.append(Worker(*start, arguments, environment_, python))
    seconds = measure(workers, options.rounds, warm_up=1)
    for worker in workers:
        worker.close()
    return seconds, memory


def sampling(num, size, codes):
    """Seconds for code maps with a cache, and by the post's loop."""
    import keras
    from keras import ops

    from blogkeras import CodePrior

    prior = CodePrior(codes, (size, size))
    prior.build()
    prior.sample(num, seed=0)
    start = time.perf_counter()
    prior.sample(num, seed=1)
    cached = time.perf_counter() - start
    # The post calls `predict` on the codes so far; here with one shape, and
    # compiled: a few steps, since all cost the same.
    prior.compile(jit_compile=True)
    maps = np.zeros((num, size, size), "int32")
    prior.predict_on_batch(maps)
    steps = 5
    start = time.perf_counter()
    for _ in range(steps):
        ops.convert_to_numpy(prior.predict_on_batch(maps))
    uncached = (time.perf_counter() - start) / steps * size * size
    print(keras.backend.backend(), cached, uncached, flush=True)
    return cached, uncached


def priors():
    """Rows: training step and sampling of PixelAtt and PixelCNN."""
    from blogkeras import CodePrior

    rows = []
    for size, batch in ((8, 32), (32, 2)):
        for architecture in ("attention", "convolution"):
            prior = CodePrior(512, (size, size), architecture, dim=128)
            prior.compile(jit_compile=True)
            maps = np.zeros((batch, size, size), "int32")
            steps = {
                "train": lambda p=prior, m=maps: p.train_on_batch(m),
                "sample": lambda p=prior, b=batch: p.sample(b, seed=0),
            }
            cells = [architecture, f"{size} × {size}", str(batch)]
            prior.build()
            cells.append(str(prior.count_params()))
            for step in steps.values():
                step()
                seconds = []
                for _ in range(5):
                    start = time.perf_counter()
                    step()
                    seconds.append(time.perf_counter() - start)
                cells.append(f"{np.median(seconds):.3f}")
            print(*cells, flush=True)
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def contest_lines(size, options):
    seconds, memory = contest(size, options)
    n, dim, k = SIZES[size]
    lines = [
        f"## {n} vectors of {dim}, {k} codes",
        "",
        f"{options.rounds} rounds of interleaved steps; threads: "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')}.",
        "",
        "| contender | seconds, median | minimum | peak memory, MiB | "
        "times the bound (95 %) |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        cells = [
            CONTENDERS[name][0],
            f"{np.median(values):.3f}",
            f"{values.min():.3f}",
            f"{memory[name]:.0f}",
        ]
        if "bound" in seconds and name != "bound":
            middle, low, high = ratio(seconds, name, "bound")
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        else:
            cells.append("")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sampling_lines():
    cached, uncached = sampling(1, 32, 512)
    return [
        "## Sampling a 32×32 map of 512 codes, dim 256, 4 layers",
        "",
        f"One map: {cached:.2f} s with cached keys and values in one "
        f"compiled loop; {uncached:.1f} s by a forward pass for each code "
        f"(1024 times the mean of 5): {uncached / cached:.0f} times.",
    ]


def prior_lines():
    return [
        "## Priors: PixelAtt (attention) and PixelCNN (convolution)",
        "",
        "512 codes, dim 128, 4 layers; median of 5, XLA.",
        "",
        "| prior | maps | batch | parameters | training step, s | "
        "sampling the batch, s |",
        "|---|---|---|---|---|---|",
        *priors(),
    ]


def report(options):
    """The page of all sections measured so far."""
    path = options.state
    state = json.loads(path.read_text("utf-8")) if path.exists() else {}
    measures = {
        "small": lambda: contest_lines("small", options),
        "large": lambda: contest_lines("large", options),
        "sampling": sampling_lines,
        "priors": prior_lines,
    }
    for section in options.sections:
        state[section] = measures[section]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(state), encoding="utf-8")
    lines = [
        "# Benchmark: vector quantization",
        "",
        environment(["keras", "tensorflow", "jax", "numpy"]),
        "",
        "A step: nearest codes, averaged codebook, gradient of loss and "
        "output.",
        "",
    ]
    for section in SECTIONS:
        if section in state:
            lines += [*state[section], ""]
    return "\n".join([*lines, "Regenerate: `make bench-quantization`.", ""])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", choices=CONTENDERS)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument(
        "--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS)
    )
    parser.add_argument(
        "--state",
        type=pathlib.Path,
        default="results/bench_quantization.json",
        help="of sections that were measured; the page shows them all",
    )
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sonnet", help="a folder that has dm-sonnet")
    parser.add_argument(
        "--torch", help="a Python that has vector-quantize-pytorch"
    )
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    options = parser.parse_args()
    if options.worker:
        return serve(lambda: prepare(options))
    text = report(options)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
