"""What the rooms give and cost on one CUDA card: the same numbers, how fast.

    python benchmarks/gpu.py [--seconds 480] [--page docs/benchmarks/gpu.md]

JAX backend. Every train step and every heavy function runs once on the CPU and
once on the card, from the same seeds and data, at small sizes, and the two are
compared: where we promise full precision as they are, everything else with
float32 products asked for (`jax.default_matmul_precision("highest")`). Then
medians of compiled times at the card's own settings, in float32 and bfloat16.
It starts nothing that may not end before `--seconds` are over; the page names
what there was no time for.

It needs JAX with CUDA, NumPy, SciPy, h5py, ml-dtypes, rich and matplotlib. For
a machine without a network, take the rest along as wheels:

    pip download -d wheels --no-deps keras absl-py namex optree pot
    pip wheel -w wheels --no-deps .
    pip install --no-index --find-links wheels --no-deps \
        keras absl-py namex optree pot blogkeras      # on that machine

Without a card the same run is a rehearsal: two devices of the CPU, small sizes
throughout, and the page is printed, not written.
"""

import argparse
import os
import pathlib
import random
import statistics
import time
from typing import NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
# Room on the card for both what is compared and what is timed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import keras
import numpy as np
from harness import page
from keras import layers, ops

import blogkeras

# The two devices of the rehearsal; cards are counted apart.
jax.config.update("jax_num_cpu_devices", 2)

PAGE = page.ROOT / "docs/benchmarks/gpu.md"
# The largest difference, relative to the largest number of an array. "exact":
# sums of some hundred products, in another order. "float32": a train step or a
# chain, through which such differences are carried on.
TOLERANCE = {"exact": 2e-5, "float32": 1e-3}
# name: (for the comparison and a rehearsal, for the times on a card)
SIZES = {
    "rows": (512, 65536),
    "codes": (64, 4096),
    "dim": (32, 64),
    "batch": (8, 64),
    "length": (32, 128),
    "width": (32, 512),
    "blocks": (1, 4),
    "vocabulary": (500, 21128),
    "words": (12, 32),
    "image": (16, 64),
    "chains": (64, 4096),
    "nvae": ("digits", "mnist"),
}
SMALL, LARGE = ({k: v[i] for k, v in SIZES.items()} for i in (0, 1))


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def integers(high, shape, low=0):
    rng = np.random.default_rng(0)
    return rng.integers(low, high, shape).astype("int32")


# Models with the data of a step: functions of the sizes


def block(size, name):
    """A small pre-norm transformer block."""
    shape = (size["length"], size["width"])
    inputs = keras.Input(shape)
    h = layers.LayerNormalization(epsilon=1e-5)(inputs)
    h = layers.MultiHeadAttention(4, size["width"] // 4)(h, h)
    x = layers.Add()([inputs, h])
    h = layers.LayerNormalization(epsilon=1e-5)(x)
    h = layers.Dense(4 * size["width"], activation="gelu")(h)
    h = layers.Dense(size["width"])(h)
    return keras.Model(inputs, layers.Add()([x, h]), name=name)


def encoder(size, name="encoder"):
    tokens = keras.Input((size["length"],), dtype="int32")
    h = layers.Embedding(size["vocabulary"], size["width"])(tokens)
    for index in range(size["blocks"]):
        h = block(size, f"{name}_{index}")(h)
    return keras.Model(tokens, h, name=name)


def compiled(model, rate=0.1, **options):
    model.compile(keras.optimizers.SGD(rate), jit_compile=True, **options)
    return model


def trained_by(method=None):
    def make(size):
        body = encoder(size)
        h = layers.GlobalAveragePooling1D()(body.output)
        if method == "rdrop":  # it compares two dropout masks
            h = layers.Dropout(0.1)(h)
        outputs = layers.Dense(2, activation="softmax", dtype="float32")(h)
        model = keras.Model(body.input, outputs)
        compiled(model, loss="sparse_categorical_crossentropy")
        if method == "virtual":
            blogkeras.virtual_adversarial_training(model)
        elif method is not None:
            blogkeras.adversarial_training(model, method=method)
        shape = size["batch"], size["length"]
        tokens = integers(size["vocabulary"], shape, low=1)
        return model, tokens, integers(2, shape[:1])

    return make


def electra(size):
    model = blogkeras.ElectraPretrainer(
        encoder(size, "generator"),
        encoder(size, "discriminator"),
        mask_token=4,
        special_tokens=[1, 2, 3],
        seed=0,
    )
    shape = size["batch"], size["length"]
    return compiled(model), integers(size["vocabulary"], shape, low=5), None


def theseus(size):
    shape = (None, size["length"], size["width"])
    old = [[block(size, f"old_{i}_{j}") for j in range(4)] for i in range(3)]
    new = [block(size, f"new_{i}") for i in range(3)]
    head = layers.Dense(2, activation="softmax", dtype="float32")
    head.build(shape)
    model = blogkeras.Theseus(old, new, head, replacement_rate=0.5, seed=0)
    x = normal((size["batch"], *shape[1:]))
    compiled(model, loss="sparse_categorical_crossentropy")
    return model, x, integers(2, x.shape[:2])


def vqvae(size, quantizer=None):
    """`quantizer` makes one of the number of codes and the dimension."""
    side, dim = size["image"], size["dim"]
    encoder = keras.Sequential(
        [
            keras.Input((side, side, 3)),
            layers.Conv2D(dim, 4, 2, "same", activation="relu"),
            layers.Conv2D(dim, 4, 2, "same"),
        ]
    )
    decoder = keras.Sequential(
        [
            keras.Input((side // 4, side // 4, dim)),
            layers.Conv2DTranspose(dim, 4, 2, "same", activation="relu"),
            layers.Conv2DTranspose(3, 4, 2, "same"),
        ]
    )
    if quantizer is None:
        codes = blogkeras.VectorQuantizer(size["codes"], ema_decay=0.99)
    else:
        codes = quantizer(size["codes"], dim)
    model = blogkeras.VQVAE(encoder, codes, decoder)
    return compiled(model), normal((size["batch"], side, side, 3)), None


def bottleneck(size):
    parts = [layers.Dense(64, activation="relu") for _ in range(2)]
    model = blogkeras.HSICBottleneck(parts, 10)
    rows = 2 * size["batch"]
    return compiled(model), normal((rows, size["dim"])), integers(10, rows)


def code_prior(size):
    model = blogkeras.CodePrior(64, (8, 8), dim=64, num_layers=2, num_heads=4)
    return compiled(model), integers(64, (size["batch"], 8, 8)), None


def estimator(size):
    network = blogkeras.mlp_log_density((2,), units=(64, 64, 64, 64))
    model = blogkeras.DenoisingDensityEstimator(network, 0.1, seed=0)
    return compiled(model, 1e-2), normal((size["chains"], 2)), None


def nvae(size):
    model = blogkeras.NVAE.from_preset(size["nvae"], seed=0)
    shape = size["batch"], *model.config.input_shape
    x = np.random.default_rng(0).random(shape).astype("float32")
    return compiled(model, 1e-4), x, None


# Functions with their arrays: functions of the sizes


def nearest(size):
    """Distances to the chosen codes: of two equally near, either is right."""
    from blogkeras.quantization.nearest import nearest_codes

    def distances(z, codes):
        z, codes = ops.cast(z, "float32"), ops.cast(codes, "float32")
        chosen = ops.take(codes, nearest_codes(z, codes), axis=0)
        return ops.sum(ops.square(z - chosen), axis=1)

    z, codes = normal((size["rows"], size["dim"])), (size["codes"], size["dim"])
    return distances, z, normal(codes, 1)


def product(size):
    _, z, codes = nearest(size)
    return (lambda z, codes: ops.matmul(z, ops.transpose(codes))), z, codes


def dependence(size):
    x = normal((size["rows"] // 16, 10))
    y = (np.sin(x) + 0.5 * normal(x.shape, 1)).astype("float32")
    return (lambda x, y: (blogkeras.hsic(x, y), blogkeras.cka(x, y))), x, y


def sinkhorn(size):
    shape = (size["batch"], size["words"], size["words"])
    mass = np.full(shape[:2], 1 / shape[1], "float32")

    def distance(p, q, D):
        return blogkeras.sinkhorn(p, q, D, regularization=0.02).distance

    return distance, mass, mass, np.abs(normal(shape))


def word_distances(name):
    def make(size):
        shape = (size["batch"], size["words"], size["dim"])
        function = getattr(blogkeras, name)
        return (
            lambda x, y: function(x, y, solver="sinkhorn"),
            normal(shape),
            normal(shape, 1),
        )

    return make


def chains(sampler, **options):
    def make(size):
        model, _, _ = estimator(size)
        model.build((None, 2))
        run = getattr(blogkeras, sampler)

        def sample(x):
            return run(model, x, 100, 0.01, seed=0, **options).x

        return sample, normal((size["chains"], 2))

    return make


# Cases


def step(make):
    """One train step of a compiled model, and its weights."""

    def program(size):
        model, x, y = make(size)
        if not model.built:
            model.build(x.shape)

        def call():
            jax.block_until_ready(model.train_on_batch(x, y))

        return call, model.get_weights

    return program


def function(make, jit=True):
    """A function of arrays, and its values.

    It is compiled, and the arrays are of the dtype that is set. With
    `jit=False` it compiles what it needs by itself, from arrays of float32.
    """

    def program(size):
        fn, *arrays = make(size)
        if jit:
            dtype = keras.config.dtype_policy().compute_dtype
            arrays = [ops.cast(a, dtype) for a in arrays]
            fn = jax.jit(fn)
        values = []

        def call():
            values[:] = jax.tree.leaves(jax.block_until_ready(fn(*arrays)))

        return call, lambda: values

    return program


class Case(NamedTuple):
    """What is compared, timed or both.

    Attributes:
        program: Function of the sizes that returns a call and a function of
            its results.
        precision: Key of `TOLERANCE`; None: it is not compared.
        timed: Whether it is.
        base: Name of what its time is divided by.
        patience: Seconds that it may take to compile on a card.
    """

    program: object
    precision: str | None = "float32"
    timed: bool = False
    base: str | None = None
    patience: float = 30.0


CASES = {
    "nearest codes": Case(function(nearest), "exact", True, "product"),
    "product": Case(function(product), None, True),
    "HSIC and CKA": Case(function(dependence), "exact", True),
    "Sinkhorn": Case(function(sinkhorn), "exact", True),
    "WMD, Sinkhorn": Case(
        function(word_distances("word_mover_distance"), jit=False), "exact"
    ),
    "WRD, Sinkhorn": Case(
        function(word_distances("word_rotator_distance"), jit=False), "exact"
    ),
    "plain step": Case(step(trained_by()), timed=True),
    "FGM": Case(step(trained_by("fgm")), timed=True, base="plain step"),
    "FGSM": Case(step(trained_by("fgsm"))),
    "PGD": Case(step(trained_by("pgd"))),
    "FreeLB": Case(step(trained_by("freelb"))),
    "gradient penalty": Case(
        step(trained_by("gradient_penalty")), timed=True, base="plain step"
    ),
    "virtual adversarial training": Case(step(trained_by("virtual"))),
    "Theseus": Case(step(theseus), timed=True),
    "VQVAE": Case(step(vqvae), timed=True),
    "CodePrior": Case(step(code_prior)),
    "HSICBottleneck": Case(step(bottleneck)),
    "ELECTRA": Case(step(electra), timed=True, patience=60.0),
    "DenoisingDensityEstimator": Case(step(estimator), timed=True),
    "Langevin, 100 steps": Case(
        function(chains("langevin"), jit=False), timed=True
    ),
    "MALA, 100 steps": Case(function(chains("mala"), jit=False), timed=True),
    "HMC, 100 steps": Case(
        function(chains("hmc", num_leapfrog=3), jit=False), timed=True
    ),
    "NVAE": Case(step(nvae), timed=True, patience=120.0),
}


def prepared(case, size, device, policy="float32"):
    """The call of a case on a device, and its results."""
    keras.utils.clear_session()
    # Keras draws its seeds from here. `keras.utils.set_random_seed` would
    # import TensorFlow where it is installed.
    random.seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        with jax.default_device(device):
            return case.program(size)
    finally:
        keras.config.set_dtype_policy("float32")


def results(case, device):
    """The results of one call, at small sizes."""
    exact = case.precision == "exact"
    asked = jax.default_matmul_precision("default" if exact else "highest")
    with jax.default_device(device), asked:
        call, values = prepared(case, SMALL, device)
        call()
        return [np.asarray(v, "float64") for v in values()]


def difference(a, b):
    """The largest difference, in units of the largest number of each array."""
    return max(
        float(np.abs(x - y).max(initial=0)) / max(np.abs(y).max(initial=0), 1)
        for x, y in zip(a, b, strict=True)
    )


def median_seconds(call, least=5, seconds=2.0):
    """The median of repeated calls, after two that compile and warm up."""
    call()
    call()
    taken = []
    begin = time.perf_counter()
    while len(taken) < least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        if len(taken) == 200:
            break
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--only", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    cpu, card = jax.devices("cpu")[0], jax.devices()[0]
    on_card = card.platform == "gpu"
    if not on_card:
        card = jax.devices("cpu")[1]
    size = LARGE if on_card else SMALL
    cases = {name: CASES[name] for name in options.only}
    timed = [
        (name, dtype)
        for name, case in cases.items()
        for dtype in ("float32", "bfloat16")
        if case.timed
    ]

    def left(share=0.0):
        """Seconds before the end, or before that share of them is left."""
        return end - share * options.seconds - time.perf_counter()

    compared, seconds = {}, {}
    for name, case in cases.items():
        if case.precision and left(0.4) > min(case.patience, 30):
            values = [results(case, device) for device in (card, cpu)]
            compared[name] = difference(*values)
            print(name, f"{compared[name]:.1e}", f"{left():.0f} s left")
    for name, dtype in timed:
        if left() > CASES[name].patience:
            policy = {"float32": dtype, "bfloat16": "mixed_bfloat16"}[dtype]
            with jax.default_device(card):
                call, _ = prepared(cases[name], size, card, policy)
                seconds[name, dtype] = median_seconds(call)
            ms = 1000 * seconds[name, dtype]
            print(name, dtype, f"{ms:.3f} ms", f"{left():.0f} s left")
    lines = report(card, size, cases, compared, timed, seconds)
    print("\n".join(lines))
    if on_card:
        page.write(options.page, lines)
    else:
        print("A rehearsal: no card was found, and no page is written.")
    wrong = [
        name
        for name, value in compared.items()
        if not value <= TOLERANCE[CASES[name].precision]
    ]
    if wrong:
        raise SystemExit(f"The card differs from the CPU: {', '.join(wrong)}")


def report(card, size, cases, compared, timed, seconds):
    late = "no time left"
    differences = [
        (
            name,
            case.precision,
            f"{compared[name]:.1e}" if name in compared else late,
        )
        for name, case in cases.items()
        if case.precision
    ]
    rows = []
    for name, dtype in timed:
        value, base = seconds.get((name, dtype)), cases[name].base
        other = seconds.get((base, dtype))
        ratio = f"{value / other:.2f} × {base}" if value and other else ""
        shown = f"{1000 * value:.3f}" if value else late
        rows.append((name, dtype, shown, ratio))
    return [
        "# On one card",
        "",
        f"{card.device_kind}; {page.environment(['keras', 'jax', 'numpy'])}. "
        "JAX backend, everything compiled. Written by `benchmarks/gpu.py`.",
        "",
        "## The same numbers as on the CPU",
        "",
        "The largest difference of any number, relative to the largest of its "
        "array, after one call or one step. Allowed: "
        + ", ".join(f"{k} {v:g}" for k, v in TOLERANCE.items())
        + ". `exact`: we promise full precision; `float32`: asked for by "
        "`jax.default_matmul_precision`.",
        "",
        *page.table(["what", "precision", "difference"], differences),
        "",
        "## Medians of compiled times",
        "",
        f"Sizes: {', '.join(f'{k} {v}' for k, v in size.items())}. Products "
        "at the card's default precision.",
        "",
        *page.table(["what", "dtype", "ms", "ratio"], rows),
    ]


if __name__ == "__main__":
    main()
