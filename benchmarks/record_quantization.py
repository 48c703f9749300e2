"""Records what the codebooks of post 6760 are worth, seed by seed.

    python benchmarks/record_quantization.py --data FILE.npz ... [--task NAME]

Trains one configuration after the other and appends a row for each run to
`docs/results/quantization.csv`; runs that stand there are not done again, so an
interrupted recording goes on where it stopped. With several `--steps` a run has
a row at each. `--report` writes the means over seeds to
`docs/results/quantization.md`.

Tasks, by the files in `--data` (not part of this repository): .npz files with
`x`, pictures of uint8, or `jpeg` and `offsets`, the bytes of JPEG files.

    cifar   Sonnet's example: 512 codes of 64, batch 32, Adam(3e-4), pictures in
            [-½, ½], reconstruction divided by the variance of the data.
            "Sonnet" is the example itself, on Sonnet's own modules; it needs
            dm-sonnet. Also the gradients of posts 10489 (rotation) and 11328
            (DiVeQ), frozen codes times a trained map, post 10519 (SimVQ), and
            quantizers of other kinds with as many codes. These have latent
            vectors of their own size: 3 or 4 levels of FSQ (post 9826), 9 or
            12 bits of LFQ and BSQ.
    wide    the same with 4096 codes
    mnist   the keras.io example: 128 codes of 16, batch 128, gradient codebook,
            pictures in [-½, ½]
    mnist-512, mnist-4096
            the same with the codebooks of cifar and wide
    prior   PixelAtt against PixelCNN on the codes of the `mnist` network
            (averages, k-means, restarts; 1000 steps, seed 0): nine tenths of
            the maps to train on, one tenth to test; batch 128, Adam(1e-3).
            Rows go to `docs/results/quantization_prior.csv`. On JAX, which
            tells how much memory and how many operations a compiled gradient
            needs: of such a batch, and of 16 maps of 32×32.

`nmse` (mean square error / variance of the data) and `perplexity` are the means
of the last 100 steps; `usage` is the share of codes used in these steps. Both
are of whole codes: all stages, levels or bits of a vector are one code.
"""

import io
import itertools
import pathlib

import numpy as np
from harness import command_line, page
from harness.recording import Recording, group

ROWS = page.ROOT / "docs/results/quantization.csv"
TITLES = {
    "cifar": "CIFAR-10, Sonnet's example",
    "wide": "CIFAR-10, 4096 codes",
    "mnist": "MNIST, the keras.io example",
    "mnist-512": "MNIST, the keras.io example with 512 codes",
    "mnist-4096": "MNIST, the keras.io example with 4096 codes",
}
CODES = {"cifar": 512, "wide": 4096, "mnist": 128}
CODES |= {"mnist-512": 512, "mnist-4096": 4096}
# On the whole of the data; here it may be a part of them.
PUBLISHED = {
    "cifar": "Published for Sonnet's example: NMSE .105, perplexity 71.8 at "
    "step 1000; .056, 326.3 at step 10000.",
    "mnist": "Published for the keras.io example (means of epochs): NMSE .0486 "
    "after 9380 steps, .0444 after 14070.",
}
COLUMNS = ["task", "method", "seed", "steps", "nmse", "perplexity", "usage"]
LAST = 100  # steps that are averaged

PRIOR_COLUMNS = [
    *("architecture", "dim", "layers", "seed", "steps"),
    *("train_nats", "test_nats", "parameters"),
    *("step_mib", "step_gflop", "large_mib", "large_gflop"),
]
# Both architectures, and a PixelCNN with the parameters of the PixelAtt.
PRIORS = [
    ("attention", 128, 4),
    ("convolution", 128, 4),
    ("convolution", 96, 4),
]


def read(paths):
    """Pictures in [-½, ½], `(n, height, width, channels)`, float32."""
    parts = []
    for path in paths:
        file = np.load(path)
        if "x" in file:
            x = file["x"]
        else:
            from PIL import Image

            jpeg, offsets = file["jpeg"].tobytes(), file["offsets"]
            x = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(jpeg[a:b])))
                    for a, b in itertools.pairwise(offsets)
                ]
            )
        parts.append(x.reshape(*x.shape[:3], -1))
    return np.concatenate(parts).astype("float32") / 255 - 0.5


def batches(x, seed, size):
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size]]


def methods(task):
    """name: kind of quantizer, its arguments, and whether it starts by k-means.

    "Sonnet" has none.
    """
    average = {"commitment_cost": 0.25, "ema_decay": 0.99}
    restart = {**average, "restart_threshold": 0.1}
    equal = {"commitment_cost": 1.0}
    if task == "mnist":
        return {
            "gradient": ("vectors", {}, False),
            "gradient, k-means": ("vectors", {}, True),
            "gradient, γ = β": ("vectors", equal, False),
            "average, k-means, restarts": ("vectors", restart, True),
        }
    rotation = {"gradient": "rotation"}
    detach = {"gradient": "diveq-detach"}
    linear = {"codebook_transform": "linear"}
    cosine = {"metric": "cosine", "codebook_dim": 8}
    sonnet = {"Sonnet": (None, None, False)} if task == "cifar" else {}
    return {
        **sonnet,
        "average": ("vectors", average, False),
        "average, k-means, restarts": ("vectors", restart, True),
        "gradient": ("vectors", {}, False),
        "gradient, γ = β": ("vectors", equal, False),
        # Posts 10489, 10519 and 11328.
        "rotation": ("vectors", rotation, False),
        "rotation, k-means": ("vectors", rotation, True),
        "rotation, k-means, γ = β": ("vectors", {**rotation, **equal}, True),
        "DiVeQ": ("vectors", {"gradient": "diveq"}, False),
        "DiVeQ-detach": ("vectors", detach, False),
        "SimVQ": ("vectors", linear, False),
        "SimVQ, diagonal": (
            "vectors",
            {"codebook_transform": "diagonal"},
            False,
        ),
        "DiVeQ-detach, SimVQ": ("vectors", {**detach, **linear}, False),
        # Other kinds.
        "cosine in 8 dimensions, k-means": ("vectors", cosine, True),
        "residual, average, k-means, restarts": ("residual", restart, True),
        "FSQ": ("levels", {}, False),
        "LFQ": ("bits", {}, False),
        "BSQ": ("bits", {"spherical": True}, False),
    }


def make_quantizer(task, kind, arguments):
    """A quantizer of as many codes as the task has, and the size of a vector.

    The size is `None` where it is that of the example.
    """
    import keras

    import blogkeras

    codes = CODES[task]
    if kind == "bits":
        bits = codes.bit_length() - 1
        return blogkeras.LookupFreeQuantizer(bits, **arguments), bits
    if kind == "levels":
        levels = {512: [8, 8, 8], 4096: [8, 8, 8, 8]}[codes]
        quantizer = blogkeras.FiniteScalarQuantizer(levels, **arguments)
        return quantizer, len(levels)
    initializer = keras.initializers.VarianceScaling(1, "fan_out", "uniform")
    arguments = {
        "embeddings_initializer": (
            "uniform" if task.startswith("mnist") else initializer
        ),
        **arguments,
    }
    if kind == "residual":
        stages = {512: (3, 8), 4096: (2, 64)}[codes]
        return blogkeras.ResidualVectorQuantizer(*stages, **arguments), None
    return blogkeras.VectorQuantizer(codes, **arguments), None


def keras_io_autoencoder(dim=16):
    import keras
    from keras import layers

    encoder = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, 2, padding="same", activation="relu"),
            layers.Conv2D(64, 3, 2, padding="same", activation="relu"),
            layers.Conv2D(dim, 1, padding="same"),
        ]
    )
    decoder = keras.Sequential(
        [
            keras.Input((7, 7, dim)),
            layers.Conv2DTranspose(64, 3, 2, "same", activation="relu"),
            layers.Conv2DTranspose(32, 3, 2, "same", activation="relu"),
            layers.Conv2DTranspose(1, 3, padding="same"),
        ]
    )
    return encoder, decoder


def blogkeras_step(task, kind, arguments, k_means, x, seed):
    """A function of a batch: `(nmse, perplexity, counts)`.

    Quantizers that count levels, bits or the codes of stages leave out the last
    two, unless it is called with `counting=True`.
    """
    import keras

    from blogkeras import VQVAE
    from blogkeras.quantization import sonnet_autoencoder

    keras.utils.set_random_seed(seed)
    mnist = task.startswith("mnist")
    quantizer, dim = make_quantizer(task, kind, arguments)
    networks = keras_io_autoencoder if mnist else sonnet_autoencoder
    encoder, decoder = networks(**({"dim": dim} if dim else {}))
    model = VQVAE(encoder, quantizer, decoder)
    model.compile(
        keras.optimizers.Adam(1e-3 if mnist else 3e-4),
        loss_weights=[1 / x.var()],
        metrics=["mse"],
        jit_compile=keras.backend.backend() == "jax",
    )
    model.build((None, *x.shape[1:]))
    if k_means:
        model.adapt(x[:1024])

    def step(batch, counting):
        counts = None
        if kind != "vectors" and counting:
            codes = model.encode(batch, batch_size=len(batch))
            if kind == "residual":
                sizes = quantizer.alphabets
                codes = np.ravel_multi_index(np.moveaxis(codes, -1, 0), sizes)
            counts = np.bincount(codes.reshape(-1), minlength=CODES[task])
        model.reset_metrics()
        logs = model.train_on_batch(batch, return_dict=True)
        nmse = logs["mse"] / x.var()
        if kind == "vectors":
            counts = keras.ops.convert_to_numpy(quantizer.batch_counts)
            return nmse, logs["perplexity"], counts
        if counts is None:
            return nmse, None, None
        shares = counts[counts > 0] / counts.sum()
        return nmse, np.exp(-np.sum(shares * np.log(shares))), counts

    return step


def sonnet_step(x, seed):
    """Sonnet's example, on Sonnet's modules."""
    import sonnet as snt
    import tensorflow as tf

    tf.random.set_seed(seed)

    class Residual(snt.Module):
        def __init__(self):
            super().__init__()
            self.wide = [snt.Conv2D(32, 3) for _ in range(2)]
            self.narrow = [snt.Conv2D(128, 1) for _ in range(2)]

        def __call__(self, h):
            for wide, narrow in zip(self.wide, self.narrow, strict=True):
                h += narrow(tf.nn.relu(wide(tf.nn.relu(h))))
            return tf.nn.relu(h)

    encoder = snt.Sequential(
        [
            snt.Conv2D(64, 4, 2),
            tf.nn.relu,
            snt.Conv2D(128, 4, 2),
            tf.nn.relu,
            snt.Conv2D(128, 3),
            tf.nn.relu,
            Residual(),
            snt.Conv2D(64, 1),
        ]
    )
    decoder = snt.Sequential(
        [
            snt.Conv2D(128, 3),
            Residual(),
            snt.Conv2DTranspose(64, 4, None, 2),
            tf.nn.relu,
            snt.Conv2DTranspose(x.shape[-1], 4, None, 2),
        ]
    )
    quantizer = snt.nets.VectorQuantizerEMA(64, 512, 0.25, 0.99)
    optimizer = snt.optimizers.Adam(3e-4)
    variance = float(x.var())

    @tf.function(autograph=False)
    def train(batch):
        with tf.GradientTape() as tape:
            out = quantizer(encoder(batch), is_training=True)
            error = decoder(out["quantize"]) - batch
            nmse = tf.reduce_mean(error**2) / variance
            loss = nmse + out["loss"]
        weights = encoder.trainable_variables + decoder.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)
        counts = tf.reduce_sum(out["encodings"], axis=0)
        return nmse, out["perplexity"], counts

    return lambda batch, counting: [
        value.numpy() for value in train(tf.constant(batch))
    ]


def run(task, method, seed, milestones, x):
    """One training: `(steps, values of the row)` at each milestone."""
    import keras

    if method == "Sonnet":
        step = sonnet_step(x, seed)
    else:
        step = blogkeras_step(task, *methods(task)[method], x, seed)
    stream = batches(x, seed, 128 if task.startswith("mnist") else 32)
    progress = keras.utils.Progbar(max(milestones))
    last = []
    for count in range(1, max(milestones) + 1):
        counting = any(0 <= stop - count < LAST for stop in milestones)
        last = [*last[1 - LAST :], step(next(stream), counting)]
        if count in milestones:
            nmse, perplexity, counts = zip(*last, strict=True)
            yield (
                count,
                f"{np.mean(nmse):.4f}",
                f"{np.mean(perplexity):.1f}",
                f"{np.mean(np.sum(counts, axis=0) > 0):.4f}",
            )
        progress.update(count)


def prior_maps(x, folder):
    """Code maps of the pictures, made once, `(n, 7, 7)`."""
    import keras

    from blogkeras import VQVAE, VectorQuantizer

    path = pathlib.Path(folder) / "maps.npy"
    if path.exists():
        return np.load(path)
    keras.utils.set_random_seed(0)
    encoder, decoder = keras_io_autoencoder()
    quantizer = VectorQuantizer(128, ema_decay=0.99, restart_threshold=0.1)
    model = VQVAE(encoder, quantizer, decoder)
    model.compile(
        keras.optimizers.Adam(1e-3),
        loss_weights=[1 / x.var()],
        metrics=["mse"],
        jit_compile=keras.backend.backend() == "jax",
    )
    model.adapt(x[:1024])
    stream = batches(x, 0, 128)
    progress = keras.utils.Progbar(1000)
    for count in range(1000):
        logs = model.train_on_batch(next(stream), return_dict=True)
        progress.update(count + 1)
    print("NMSE", logs["mse"] / x.var(), "perplexity", logs["perplexity"])
    maps = model.encode(x)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, maps)
    return maps


def step_cost(prior, size):
    """MiB beside weights and data, and GFLOP, of the compiled gradient."""
    import jax
    import keras

    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(values, codes):
        with keras.StatelessScope(
            list(zip(prior.trainable_variables, values, strict=True))
        ):
            return entropy(codes, prior(codes))

    values = [v.value for v in prior.trainable_variables]
    codes = np.zeros((size, *prior.code_shape), "int32")
    compiled = jax.jit(jax.grad(loss)).lower(values, codes).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return (
        f"{memory / 2**20:.1f}",
        f"{compiled.cost_analysis()['flops'] / 1e9:.2f}",
    )


def run_prior(architecture, dim, num_layers, seed, steps, maps):
    """One training: the values of a row after the steps."""
    import keras

    from blogkeras import CodePrior

    keras.utils.set_random_seed(seed)
    order = np.random.default_rng(0).permutation(len(maps))
    test, train = np.split(maps[order], [len(maps) // 10])
    prior = CodePrior(
        128, maps.shape[1:], architecture, dim=dim, num_layers=num_layers
    )
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    prior.compile(keras.optimizers.Adam(schedule), jit_compile=True)
    stream = batches(train, seed, 128)
    progress = keras.utils.Progbar(steps)
    for count in range(steps):
        logs = prior.train_on_batch(next(stream), return_dict=True)
        if steps - count > LAST:
            prior.reset_metrics()
        progress.update(count + 1)
    large = CodePrior(128, (32, 32), architecture, None, dim, num_layers)
    large.build()
    whole = len(test) // 128 * 128
    found = prior.evaluate(
        test[:whole], batch_size=128, verbose=0, return_dict=True
    )
    return (
        f"{logs['nats']:.3f}",
        f"{found['nats']:.3f}",
        prior.count_params(),
        *step_cost(prior, 128),
        *step_cost(large, 16),
    )


def record_priors(record, options):
    steps = max(options.steps)
    runs = [
        (*prior, seed, steps)
        for seed in range(options.seeds)
        for prior in PRIORS
    ]
    maps = None
    for *prior, seed, _ in record.todo(runs, options):
        if maps is None:
            maps = prior_maps(read(options.data), options.cache)
        values = run_prior(*prior, seed, steps, maps)
        record.append(*prior, seed, steps, *values)


def record_codebooks(record, options):
    task, x = options.task, None
    runs = [
        (task, method, seed, steps)
        for seed in range(options.seeds)
        for method in options.only or methods(task)
        for steps in sorted(options.steps, reverse=True)
    ]
    for _, method, seed, _ in record.todo(runs, options):
        # A training passes the milestones before it, too.
        left = record.missing([(task, method, seed, n) for n in options.steps])
        if x is None:
            x = read(options.data)
            print("pictures:", x.shape, "variance:", round(float(x.var()), 5))
        milestones = [steps for *_, steps in left]
        for steps, *values in run(task, method, seed, milestones, x):
            record.append(task, method, seed, steps, *values)


def report(record, priors, path):
    """Writes the page: means and standard deviations over seeds."""
    lines = ["# What the codebooks are worth (post 6760)", ""]
    lines += [" ".join(__doc__.split("\n\n")[-1].split()), ""]
    columns = ["codebook", "steps", "seeds", "NMSE", "perplexity", "codes used"]
    for task, of_task in group(record.rows(), "task").items():
        cells = [
            [
                *(method, steps, len(rows)),
                *(
                    page.deviation([row[name] for row in rows], digits)
                    for name, digits in zip(COLUMNS[4:], (4, 1, 4), strict=True)
                ),
            ]
            for (method, steps), rows in sorted(
                group(of_task, "method", "steps").items(),
                key=lambda item: int(item[0][1]),
            )
        ]
        lines += [f"## {TITLES[task]}", "", *page.table(columns, cells), ""]
        lines += [PUBLISHED[task], ""] if task in PUBLISHED else []
    groups = group(priors.rows(), "architecture", "dim", "layers", "steps")
    if groups:
        lines += [
            "## Priors: PixelAtt (attention) and PixelCNN (convolution)",
            "",
            "Nats per map, 7 × 7 codes of MNIST. Memory and operations are "
            "those of a compiled gradient: of 128 such maps, and of 16 maps of "
            "32 × 32.",
            "",
            *page.table(
                [
                    *("prior", "dim", "layers", "steps", "seeds"),
                    *("train", "test", "parameters"),
                    *("MiB", "GFLOP", "MiB, 32 × 32", "GFLOP, 32 × 32"),
                ],
                [
                    [
                        *key,
                        len(rows),
                        page.deviation([r["train_nats"] for r in rows], 2),
                        page.deviation([r["test_nats"] for r in rows], 2),
                        *(rows[0][name] for name in PRIOR_COLUMNS[-5:]),
                    ]
                    for key, rows in groups.items()
                ],
            ),
        ]
    page.write(path, lines)


def main():
    parser = command_line.recording(__doc__, ROWS)
    add = parser.add_argument
    add("--data", nargs="*", help=".npz files of the task")
    add("--task", choices=[*TITLES, "prior"], default="cifar")
    add("--cache", default="results/quantization", help="for maps of prior")
    add("--steps", type=int, nargs="+", default=[1000])
    options = parser.parse_args()
    path = options.rows
    record = Recording(path, COLUMNS, key=COLUMNS[:4])
    priors = Recording(
        path.with_stem(f"{path.stem}_prior"), PRIOR_COLUMNS, PRIOR_COLUMNS[:5]
    )
    if options.report:
        return report(record, priors, path.with_suffix(".md"))
    if options.task == "prior":
        return record_priors(priors, options)
    return record_codebooks(record, options)


if __name__ == "__main__":
    main()
