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
Options: gradient estimators and other quantizers, beside those of
vector-quantize-pytorch that compute the same. (`--options NAME ...` measures
some of them alone, for another `--page`: the section has those rows only.)
"""

import argparse
import os
import time

import numpy as np
from harness import command_line, page, statistics
from harness.contest import JAX, compete, peak, serve

PAGE = page.ROOT / "docs/benchmarks/quantization.md"
SIZES = {
    "small": (65_536, 64, 1024),
    "large": (16_384, 256, 8192),
    "trial": (8192, 16, 64),  # of the benchmark itself, when asked for
    "options": (16_384, 64, 1024),
}
CONTENDERS = {
    "bound": "bound: blocks of the product alone, JAX",
    "jax": "blogkeras, JAX",
    "xla": "blogkeras, TensorFlow, XLA",
    "graph": "blogkeras, TensorFlow, no XLA",
    "sonnet": "Sonnet 2, tf.function",
    "sonnet-xla": "Sonnet 2, XLA",
    "torch": "vector-quantize-pytorch",
}
# Name: title, our layer, the peer's (None: it has no such one), each as a class
# and its arguments. Codebooks are moved by a gradient where the title does not
# say that they are averaged, as theirs with the cosine have to be.
_LEARNED = {"learnable_codebook": True, "ema_update": False}
_STRAIGHT = {"rotation_trick": False}  # theirs is the rotation unless told
_DIVEQ = {"directional_reparam": True, "threshold_ema_dead_code": 2}
_STAGES = {"num_quantizers": 4, "num_codes": 256}
_THEIR_STAGES = {"num_quantizers": 4, "codebook_size": 256, **_STRAIGHT}
# The sizes of vectors that are not those of "options".
DIMS = {"lfq": 10, "bsq": 10, "fsq": 4, "residual-fsq": 4}
OPTIONS = {
    "averaged": (
        "averaged codebook",
        ("VectorQuantizer", {"num_codes": 1024, "ema_decay": 0.99}),
        ("VectorQuantize", {"codebook_size": 1024, "decay": 0.99, **_STRAIGHT}),
    ),
    "straight": (
        "straight-through",
        ("VectorQuantizer", {"num_codes": 1024}),
        ("VectorQuantize", {"codebook_size": 1024, **_LEARNED, **_STRAIGHT}),
    ),
    "rotation": (
        "rotation trick",
        ("VectorQuantizer", {"num_codes": 1024, "gradient": "rotation"}),
        (
            "VectorQuantize",
            {"codebook_size": 1024, "rotation_trick": True, **_LEARNED},
        ),
    ),
    "diveq": (
        "DiVeQ",
        ("VectorQuantizer", {"num_codes": 1024, "gradient": "diveq"}),
        ("VectorQuantize", {"codebook_size": 1024, **_LEARNED, **_DIVEQ}),
    ),
    "diveq-detach": (
        "DiVeQ-detach",
        ("VectorQuantizer", {"num_codes": 1024, "gradient": "diveq-detach"}),
        (
            "VectorQuantize",
            {
                "codebook_size": 1024,
                "directional_reparam_variance": 0.0,
                **_LEARNED,
                **_DIVEQ,
            },
        ),
    ),
    "simvq": (
        "SimVQ",
        (
            "VectorQuantizer",
            {"num_codes": 1024, "codebook_transform": "linear"},
        ),
        ("SimVQ", {"codebook_size": 1024}),
    ),
    "simvq-diagonal": (
        "SimVQ, diagonal",
        (
            "VectorQuantizer",
            {"num_codes": 1024, "codebook_transform": "diagonal"},
        ),
        None,
    ),
    "residual": (
        "residual, 4 stages of 256",
        ("ResidualVectorQuantizer", _STAGES),
        ("ResidualVQ", {**_THEIR_STAGES, **_LEARNED}),
    ),
    "residual-cosine": (
        "residual, 4 stages of 256, averaged, cosine",
        (
            "ResidualVectorQuantizer",
            {**_STAGES, "ema_decay": 0.99, "metric": "cosine"},
        ),
        ("ResidualVQ", {**_THEIR_STAGES, "use_cosine_sim": True}),
    ),
    "residual-shared": (
        "residual, 4 stages of one averaged codebook of 256",
        (
            "ResidualVectorQuantizer",
            {**_STAGES, "ema_decay": 0.99, "shared_codebook": True},
        ),
        ("ResidualVQ", {**_THEIR_STAGES, "shared_codebook": True}),
    ),
    "grouped": (
        "2 groups of 4 stages of 256",
        (
            "GroupedQuantizer",
            {"quantizer": ("ResidualVectorQuantizer", _STAGES), "groups": 2},
        ),
        ("GroupedResidualVQ", {**_THEIR_STAGES, **_LEARNED, "groups": 2}),
    ),
    "lfq": (
        "look-up free, 10 bits, with entropy loss",
        ("LookupFreeQuantizer", {"num_bits": 10}),
        ("LFQ", {"codebook_size": 1024, "entropy_loss_weight": 0.1}),
    ),
    "bsq": (
        "look-up free on the sphere (BSQ), 10 bits, with entropy loss",
        ("LookupFreeQuantizer", {"num_bits": 10, "spherical": True}),
        (
            "LFQ",
            {
                "codebook_size": 1024,
                "entropy_loss_weight": 0.1,
                "spherical": True,
            },
        ),
    ),
    "fsq": (
        "finite scalars, 8 × 5 × 5 × 5",
        ("FiniteScalarQuantizer", {"levels": [8, 5, 5, 5]}),
        ("FSQ", {"levels": [8, 5, 5, 5]}),
    ),
    "residual-fsq": (
        "finite scalars, 4 stages of 8 × 5 × 5 × 5, symmetric",
        (
            "ResidualFiniteScalarQuantizer",
            {"num_quantizers": 4, "levels": [8, 5, 5, 5], "symmetric": True},
        ),
        ("ResidualFSQ", {"num_quantizers": 4, "levels": [8, 5, 5, 5]}),
    ),
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
    from blogkeras import VectorQuantizer

    z, e = data(options)
    layer = VectorQuantizer(len(e), ema_decay=0.99)
    layer.build(z.shape)
    layer.embeddings.assign(e)
    return step_of(layer, z, options.worker == "xla")


def step_of(layer, z, jit_compile):
    """A step of our layer: its state, the gradient of vectors and weights."""
    import keras
    from keras import ops

    z = ops.convert_to_tensor(z)
    if keras.backend.backend() == "jax":
        import jax

        def objective(trainable, z, state):
            quantized, state, losses = layer.stateless_call(
                trainable, state, z, training=True, return_losses=True
            )
            return sum(losses) + ops.sum(ops.square(quantized)), state

        slope = jax.value_and_grad(objective, (0, 1), has_aux=True)
        step = jax.jit(slope)
        trainable = [v.value for v in layer.trainable_variables]
        state = [v.value for v in layer.non_trainable_variables]

        def run():
            nonlocal state
            answer = step(trainable, z, state)
            state = jax.block_until_ready(answer)[0][1]

        return run
    import tensorflow as tf

    weights = [v.value for v in layer.trainable_variables]

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            quantized = layer(z, training=True)
            loss = sum(layer.losses) + tf.reduce_sum(quantized**2)
        return loss, tape.gradient(loss, [z, *weights])

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
    return torch_step_of(layer, z)


def torch_step_of(layer, z):
    import torch

    z = torch.tensor(z[None], requires_grad=True)

    def step():
        layer.zero_grad()
        z.grad = None
        answer = layer(z)
        # Rounding has no loss.
        loss = answer[2].sum() if len(answer) > 2 else 0
        (loss + answer[0].square().sum()).backward()

    return step


def option(options):
    """A step of an option's layer, ours or the peer's."""
    name = options.option
    _, (kind, arguments), theirs = OPTIONS[name]
    z, _ = data(options)
    z = z[:, : DIMS.get(name, z.shape[1])]
    if options.worker == "torch":
        import vector_quantize_pytorch

        kind, arguments = theirs
        if "levels" not in arguments:
            arguments = {**arguments, "dim": z.shape[1]}
        layer = getattr(vector_quantize_pytorch, kind)(**arguments)
        return torch_step_of(layer, z)
    layer = our_layer(kind, arguments)
    layer.build(z.shape)
    return step_of(layer, z, True)


def our_layer(kind, arguments):
    import blogkeras

    if "quantizer" in arguments:  # of groups
        part = our_layer(*arguments["quantizer"])
        arguments = {**arguments, "quantizer": part}
    return getattr(blogkeras, kind)(**arguments)


def prepare(options):
    """A step, warmed up, and the memory that it took."""
    if options.option:
        return option(options)
    kind = options.worker.split("-")[0]
    make = {"bound": bound, "sonnet": sonnet, "torch": torch}.get(kind, ours)
    step = make(options)
    before = peak()
    step()
    step()
    return step, {"MiB": peak() - before}


def sampling(num, size, codes):
    """Seconds for code maps with a cache, and by the post's loop."""
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
            prior.build()
            cells = [architecture, f"{size} × {size}", batch]
            cells.append(prior.count_params())
            for step in steps.values():
                step()
                seconds = []
                for _ in range(5):
                    start = time.perf_counter()
                    step()
                    seconds.append(time.perf_counter() - start)
                cells.append(f"{np.median(seconds):.3f}")
            rows.append(cells)
    return rows


def contest(size, options):
    peers = {"sonnet": options.sonnet, "torch": options.torch}
    names = [n for n in options.only if peers.get(n.split("-")[0], True)]
    settings = {"bound": JAX, "jax": JAX}
    for name in ("sonnet", "sonnet-xla"):
        settings[name] = {"PYTHONPATH": options.sonnet}
    facts = {}
    seconds = compete(
        __file__,
        names,
        ["--size", size],
        rounds=options.rounds,
        warm_up=1,
        facts=facts,
        environment=settings,
        python={"torch": options.torch},
    )
    rows = []
    for name, values in seconds.items():
        times = ""
        if "bound" in seconds and name != "bound":
            times = page.interval(*statistics.ratio(seconds, name, "bound"))
        cells = [CONTENDERS[name], f"{np.median(values):.3f}"]
        cells += [f"{values.min():.3f}", f"{facts[name]['MiB']:.0f}", times]
        rows.append(cells)
    return [
        f"{options.rounds} rounds of interleaved steps; threads: "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')}.",
        "",
        *page.table(
            [
                *("contender", "seconds, median", "minimum"),
                *("peak memory, MiB", "times the bound (95 %)"),
            ],
            rows,
        ),
    ]


def option_lines(options):
    rows = []
    for name in options.options:
        title, _, theirs = OPTIONS[name]
        names = ["jax", "xla"]
        if options.torch and theirs:
            names.append("torch")
        seconds = compete(
            __file__,
            names,
            ["--size", "options", "--option", name],
            rounds=options.rounds,
            warm_up=1,
            environment={"jax": JAX},
            python={"torch": options.torch},
        )
        milliseconds = {k: 1000 * np.median(v) for k, v in seconds.items()}
        row = [title, *(f"{value:.1f}" for value in milliseconds.values())]
        if "torch" in seconds:
            ratios = (statistics.ratio(seconds, "torch", k) for k in names[:2])
            row += [page.interval(*ratio) for ratio in ratios]
        rows.append(row + [""] * (6 - len(row)))
    return [
        "A step as above, in milliseconds, with the gradient of the codebook "
        f"where it is learned; {options.rounds} rounds. Vectors of 10 for the "
        "look-up free ones, of 4 for finite scalars. A peer that has no such "
        "option has no number.",
        "",
        *page.table(
            [
                *("option", "JAX", "TensorFlow, XLA", "PyTorch"),
                *("PyTorch / JAX (95 %)", "PyTorch / TensorFlow (95 %)"),
            ],
            rows,
        ),
    ]


def sampling_lines(options):
    cached, uncached = sampling(1, 32, 512)
    return [
        f"One map: {cached:.2f} s with cached keys and values in one "
        f"compiled loop; {uncached:.1f} s by a forward pass for each code "
        f"(1024 times the mean of 5): {uncached / cached:.0f} times.",
    ]


def prior_lines(options):
    return [
        "512 codes, dim 128, 4 layers; median of 5, XLA.",
        "",
        *page.table(
            [
                *("prior", "maps", "batch", "parameters"),
                *("training step, s", "sampling the batch, s"),
            ],
            priors(),
        ),
    ]


def main():
    sections = {
        size: (
            f"{n} vectors of {dim}, {k} codes",
            lambda options, size=size: contest(size, options),
        )
        for size, (n, dim, k) in SIZES.items()
        if size != "options"
    }
    sections["options"] = ("Options, 16384 vectors of 64", option_lines)
    sections["sampling"] = (
        "Sampling a 32×32 map of 512 codes, dim 256, 4 layers",
        sampling_lines,
    )
    sections["priors"] = (
        "Priors: PixelAtt (attention) and PixelCNN (convolution)",
        prior_lines,
    )
    parser = command_line.benchmark(__doc__, CONTENDERS, PAGE)
    add = parser.add_argument
    add("--size", choices=SIZES, help=argparse.SUPPRESS)
    add("--option", choices=OPTIONS, help=argparse.SUPPRESS)
    recorded = [name for name in sections if name != "trial"]
    add("--options", nargs="*", choices=OPTIONS, default=[*OPTIONS])
    add("--sections", nargs="*", choices=sections, default=recorded)
    add("--sonnet", help="a folder that has dm-sonnet")
    add("--torch", help="a Python that has vector-quantize-pytorch")
    options = parser.parse_args()
    if options.worker:
        return serve(lambda: prepare(options))
    head = [
        "# Benchmark: vector quantization (posts 6760 and 9826)",
        "",
        page.environment(["keras", "tensorflow", "jax", "numpy"]),
        "",
        "A step: nearest codes, averaged codebook, gradient of loss and "
        "output.",
        "",
        "Regenerate: `make bench-quantization`.",
    ]
    for name in options.sections:
        title, measure = sections[name]
        page.update(options.page, head, {title: measure(options)})


if __name__ == "__main__":
    main()
