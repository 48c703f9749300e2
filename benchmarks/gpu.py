"""What the rooms give and cost on one CUDA card: the same numbers, how fast.

    python benchmarks/gpu.py [--seconds 480] [--page docs/benchmarks/gpu.md]

JAX backend. Every train step and every heavy function runs once on the CPU and
once on the card, from the same weights and data, and the two are compared:
within a few units of float32 where we ask for full precision, within what TF32
rounds where Keras multiplies at the card's default. Then medians of compiled
times, in float32 and bfloat16. It ends by itself before `--seconds` are over
and writes the page in any case: what there was no time for is named there.

The machine needs JAX with CUDA, NumPy, SciPy, h5py, ml-dtypes, rich and
matplotlib; no network. What else is needed travels as wheels, under 64 MiB:

    pip download -d wheels --no-deps keras absl-py namex optree pot
    pip wheel -w wheels --no-deps .
    pip install --no-index --find-links wheels --no-deps \
        keras absl-py namex optree pot blogkeras      # on the machine

Without a card the same run is a rehearsal: both sides are then the CPU, the
sizes are small (`--size small`) and the page is printed, not written.
"""

import argparse
import os
import pathlib
import statistics
import time

os.environ["KERAS_BACKEND"] = "jax"
# Room on the card for both what is compared and what is timed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import keras
import numpy as np
from harness import page
from keras import layers, ops

import blogkeras

PAGE = page.ROOT / "docs/benchmarks/gpu.md"
# Relative to the largest number of a result. "exact": products that we ask
# full precision of, some hundred of them added in another order. "default":
# a card rounds the factors of a float32 product to TF32, 10 bits.
TOLERANCE = {"exact": 2e-5, "default": 2e-2}
SIZES = {
    "small": {
        "rows": 512,
        "codes": 64,
        "dim": 32,
        "batch": 8,
        "length": 32,
        "width": 32,
        "words": 12,
        "image": 16,
    },
    "large": {
        "rows": 65536,
        "codes": 4096,
        "dim": 64,
        "batch": 64,
        "length": 128,
        "width": 512,
        "words": 32,
        "image": 64,
    },
}


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# Models


def block(size, name):
    """A small pre-norm transformer block, built."""
    shape = (None, size["length"], size["width"])
    inputs = keras.Input(shape[1:])
    h = layers.LayerNormalization(epsilon=1e-5)(inputs)
    h = layers.MultiHeadAttention(4, size["width"] // 4)(h, h)
    x = layers.Add()([inputs, h])
    h = layers.LayerNormalization(epsilon=1e-5)(x)
    h = layers.Dense(4 * size["width"], activation="gelu")(h)
    h = layers.Dense(size["width"])(h)
    return keras.Model(inputs, layers.Add()([x, h]), name=name)


def texts(size):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 5000, (size["batch"], size["length"])).astype("int32")
    return x, rng.integers(0, 2, size["batch"])


def classifier(size, num_blocks=2):
    tokens = keras.Input((size["length"],), dtype="int32")
    h = layers.Embedding(5000, size["width"], name="tokens")(tokens)
    for index in range(num_blocks):
        h = block(size, f"block_{index}")(h)
    h = layers.GlobalAveragePooling1D()(h)
    outputs = layers.Dense(2, activation="softmax", dtype="float32")(h)
    model = keras.Model(tokens, outputs)
    model.compile(
        keras.optimizers.SGD(0.1),
        "sparse_categorical_crossentropy",
        jit_compile=True,
    )
    return model


def trained_by(method):
    def make(size):
        model = classifier(size)
        if method is not None:
            blogkeras.adversarial_training(model, method=method)
        return model, *texts(size)

    return make


def virtual(size):
    model = classifier(size)
    blogkeras.virtual_adversarial_training(model)
    return model, *texts(size)


def theseus(size):
    shape = (None, size["length"], size["width"])
    old = [[block(size, f"old_{i}_{j}") for j in range(4)] for i in range(3)]
    new = [block(size, f"new_{i}") for i in range(3)]
    head = layers.Dense(2, activation="softmax", dtype="float32")
    head.build(shape)
    model = blogkeras.Theseus(old, new, head, replacement_rate=0.5, seed=0)
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    x = normal((size["batch"], *shape[1:]))
    return model, x, np.random.default_rng(1).integers(0, 2, x.shape[:2])


def vqvae(size):
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
    quantizer = blogkeras.VectorQuantizer(size["codes"], ema_decay=0.99)
    model = blogkeras.VQVAE(encoder, quantizer, decoder)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=True)
    return model, normal((size["batch"], side, side, 3)), None


def bottleneck(size):
    parts = [layers.Dense(64, activation="relu") for _ in range(2)]
    model = blogkeras.HSICBottleneck(parts, 10)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=True)
    rows = 2 * size["batch"]
    labels = np.random.default_rng(1).integers(0, 10, rows)
    return model, normal((rows, size["dim"])), labels


def code_prior(size):
    model = blogkeras.CodePrior(64, (8, 8), dim=64, num_layers=2, num_heads=4)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=True)
    rng = np.random.default_rng(0)
    return model, rng.integers(0, 64, (size["batch"], 8, 8)), None


MODELS = {
    "plain step": trained_by(None),
    "FGM": trained_by("fgm"),
    "FGSM": trained_by("fgsm"),
    "PGD": trained_by("pgd"),
    "FreeLB": trained_by("freelb"),
    "gradient penalty": trained_by("gradient_penalty"),
    "virtual adversarial training": virtual,
    "Theseus": theseus,
    "VQVAE": vqvae,
    "CodePrior": code_prior,
    "HSICBottleneck": bottleneck,
}


# Functions


def nearest_codes(size):
    """Distances to the chosen codes: of two equally near, either is right."""
    z = normal((size["rows"], size["dim"]))
    codes = normal((size["codes"], size["dim"]), 1)
    quantizer = blogkeras.VectorQuantizer(size["codes"])
    quantizer.build((None, size["dim"]))
    quantizer.embeddings.assign(codes)
    chosen = ops.convert_to_numpy(quantizer.encode(z))
    return ((z - codes[chosen]) ** 2).sum(1)


def dependence(size):
    x = normal((size["rows"] // 32, 10))
    y = np.sin(x) + 0.5 * normal(x.shape, 1)
    return np.array([float(blogkeras.hsic(x, y)), float(blogkeras.cka(x, y))])


def transport(size):
    shape = (size["batch"], size["words"], size["dim"])
    x, y = normal(shape), normal(shape, 1)
    return ops.convert_to_numpy(
        blogkeras.word_mover_distance(x, y, solver="sinkhorn")
    )


def rotation(size):
    shape = (size["batch"], size["words"], size["dim"])
    x, y = normal(shape), normal(shape, 1)
    return ops.convert_to_numpy(
        blogkeras.word_rotator_distance(x, y, solver="sinkhorn")
    )


FUNCTIONS = {
    "nearest codes": nearest_codes,
    "HSIC and CKA": dependence,
    "WMD, Sinkhorn": transport,
    "WRD, Sinkhorn": rotation,
}


# On two devices


def weights_after_a_step(make, size, device, start=None):
    """The weights after one step, and those before it."""
    with jax.default_device(device):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model, x, y = make(size)
        if not model.built:
            model.build(x.shape)
        if start is not None:
            model.set_weights(start)
        start = model.get_weights()
        model.train_on_batch(x, y)
        return [np.asarray(w, "float64") for w in model.get_weights()], start


def difference(a, b):
    """The largest difference, in units of the largest number of each array."""
    return max(
        float(np.abs(x - y).max(initial=0)) / max(np.abs(y).max(initial=0), 1)
        for x, y in zip(a, b, strict=True)
    )


def compare(size, card, cpu, has_time):
    """Rows (name, tolerance, difference) or (name, tolerance, reason)."""
    for name, function in FUNCTIONS.items():
        if not has_time():
            yield name, "exact", "no time left"
            continue
        with jax.default_device(cpu):
            expected = np.asarray(function(size), "float64")
        with jax.default_device(card):
            result = np.asarray(function(size), "float64")
        yield name, "exact", difference([result], [expected])
    for name, make in MODELS.items():
        if not has_time():
            yield f"{name}, one step", "default", "no time left"
            continue
        expected, start = weights_after_a_step(make, size, cpu)
        result, _ = weights_after_a_step(make, size, card, start)
        yield f"{name}, one step", "default", difference(result, expected)


# Times


def median_seconds(step, least=5, seconds=2.0):
    """The median of repeated calls, after two that compile and warm up."""
    step()
    step()
    taken = []
    begin = time.perf_counter()
    while len(taken) < least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
        if len(taken) == 200:
            break
    return statistics.median(taken)


def step_of(make, size, policy):
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
    try:
        model, x, y = make(size)
        if not model.built:
            model.build(x.shape)
    finally:
        keras.config.set_dtype_policy("float32")
    return lambda: jax.block_until_ready(model.train_on_batch(x, y))


def compiled(function, *arrays):
    arrays = [jax.device_put(a) for a in arrays]
    run = jax.jit(function)
    return lambda: jax.block_until_ready(run(*arrays))


def nearest_or_product(size, kind, dtype):
    from blogkeras.quantization.nearest import nearest_codes

    z = ops.cast(normal((size["rows"], size["dim"])), dtype)
    codes = ops.cast(normal((size["codes"], size["dim"]), 1), dtype)
    if kind == "product":
        return compiled(lambda z, codes: ops.matmul(z, codes.T), z, codes)
    return compiled(
        lambda z, codes: nearest_codes(
            ops.cast(z, "float32"), ops.cast(codes, "float32")
        ),
        z,
        codes,
    )


def times(size):
    """Functions that make a step, by name and dtype."""
    for dtype in ("float32", "bfloat16"):
        policy = "float32" if dtype == "float32" else "mixed_bfloat16"
        for name in (
            "plain step",
            "FGM",
            "gradient penalty",
            "Theseus",
            "VQVAE",
        ):
            yield (
                (name, dtype),
                lambda name=name, policy=policy: step_of(
                    MODELS[name], size, policy
                ),
            )
        for kind in ("product", "nearest codes"):
            yield (
                (kind, dtype),
                lambda kind=kind, dtype=dtype: nearest_or_product(
                    size, kind, dtype
                ),
            )
    rows = size["rows"] // 16
    x, y = normal((rows, 10)), normal((rows, 10), 1)
    yield (
        (f"HSIC, n = {rows}", "float32"),
        lambda: compiled(blogkeras.hsic, x, y),
    )
    shape = (size["batch"], size["words"], size["words"])
    cost = np.abs(normal(shape))
    mass = np.full(shape[:2], 1 / shape[1], "float32")
    yield (
        ("Sinkhorn", "float32"),
        lambda: compiled(
            lambda p, q, D: blogkeras.sinkhorn(p, q, D).distance,
            mass,
            mass,
            cost,
        ),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    options = parser.parse_args()
    begin = time.perf_counter()

    def has_time(share=1.0):
        return time.perf_counter() - begin < share * options.seconds

    card, cpu = jax.devices()[0], jax.devices("cpu")[0]
    on_card = card.platform == "gpu"
    size = SIZES[options.size or ("large" if on_card else "small")]
    compared = []
    # What is compared is small in any case: the CPU has to do it, too.
    for row in compare(SIZES["small"], card, cpu, lambda: has_time(0.6)):
        print(*row, flush=True)
        compared.append(row)
    seconds = {}
    for key, make in times(size):
        if not has_time(0.9):
            print("no time left for", *key, flush=True)
            continue
        seconds[key] = median_seconds(make())
        print(*key, f"{1000 * seconds[key]:.3f} ms", flush=True)
    lines = report(card, size, compared, seconds)
    if on_card:
        page.write(options.page, lines)
    print("\n".join(lines))
    wrong = [
        name
        for name, kind, value in compared
        if not isinstance(value, str) and not value <= TOLERANCE[kind]
    ]
    if wrong:
        raise SystemExit(f"The card differs from the CPU: {', '.join(wrong)}")


def report(card, size, compared, seconds):
    lines = [
        "# On one card",
        "",
        f"{card.device_kind}; {page.environment(['keras', 'jax', 'numpy'])}. "
        "JAX backend, everything compiled.",
        "",
        "## The same numbers as on the CPU",
        "",
        "The largest difference of any number, relative to the largest of its "
        "array. Allowed: "
        + ", ".join(f"{k} {v:g}" for k, v in TOLERANCE.items())
        + " (`default`: Keras multiplies float32 at the card's default, TF32).",
        "",
        *page.table(
            ["what", "precision", "difference"],
            [
                (name, kind, v if isinstance(v, str) else f"{v:.1e}")
                for name, kind, v in compared
            ],
        ),
        "",
        "## Medians of compiled times",
        "",
        f"Sizes: {', '.join(f'{k} {v}' for k, v in size.items())}.",
        "",
    ]
    bases = {"nearest codes": "product"}
    bases |= {k: "plain step" for k in ("FGM", "gradient penalty")}
    rows = []
    for (name, dtype), value in seconds.items():
        base = seconds.get((bases.get(name), dtype))
        rows.append(
            (
                name,
                dtype,
                f"{1000 * value:.3f}",
                f"{value / base:.2f} × {bases[name]}" if base else "",
            )
        )
    return [*lines, *page.table(["what", "dtype", "ms", "ratio"], rows)]


if __name__ == "__main__":
    main()
