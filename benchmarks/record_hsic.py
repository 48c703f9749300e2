"""Records the HSIC bottleneck on MNIST, epoch by epoch and seed by seed.

    python benchmarks/record_hsic.py --data DIR [--only KIND ...] [--seeds 3]

Appends a row for each epoch to `docs/results/hsic_bottleneck.csv`; runs that
stand there are not done again. `--table` prints the last epochs and draws the
curves to `docs/hsic_bottleneck.png`.

    unformatted        HSICBottleneck, 5 × 256 + 10 units, the units themselves
    format             HSICBottleneck, 5 × 256 units and a softmax layer
    back-propagation   the same network and optimizer, cross-entropy
    script             the algorithm of the paper's script (hsic-solve, its
                       settings: 6 × 256 + 10 units, σ = 100, λ = 50, SGD of
                       5e-4, weight decay 1e-3, data in their order), in the
                       same framework, units matched with the labels of the
                       test data as there
    script with sigma 5  the same with σ = 5, as in its other experiments

DIR holds mnist_train*.npz and mnist_test.npz (arrays x and y).
"""

import argparse
import csv
import math
import pathlib
import time

ROOT = pathlib.Path(__file__).parent.parent
ROWS = ROOT / "docs/results/hsic_bottleneck.csv"
FIGURE = ROOT / "docs/hsic_bottleneck.png"
COLUMNS = ["kind", "seed", "epoch", "accuracy", "cpu_seconds"]
KINDS = [
    "unformatted",
    "format",
    "back-propagation",
    "script",
    "script with sigma 5",
]
EPOCHS, BATCH_SIZE, WIDTH, CLASSES = 5, 512, 256, 10
RATE = 3e-3


def read(folder):
    import numpy as np

    folder = pathlib.Path(folder)
    parts = [np.load(p) for p in sorted(folder.glob("mnist_train*.npz"))]
    x, y = (np.concatenate([part[key] for part in parts]) for key in "xy")
    test = np.load(folder / "mnist_test.npz")
    whole = len(x) // BATCH_SIZE * BATCH_SIZE
    return [
        (x.reshape(-1, 784).astype("float32") / 255, y.astype("int32"))
        for x, y in ((x[:whole], y[:whole]), (test["x"], test["y"]))
    ]


def block(units, **dense):
    import keras
    from keras import layers

    return keras.Sequential(
        [
            layers.Dense(units, **dense),
            layers.BatchNormalization(
                center=False, scale=False, momentum=0.9, epsilon=1e-5
            ),
            layers.ReLU(),
        ]
    )


def run(kind, seed, train, test):
    """Yields the test accuracy after each epoch, with the CPU time of it."""
    import keras

    import blogkeras

    keras.utils.set_random_seed(seed)
    if kind.startswith("script"):
        yield from run_script(train, test, 100.0 if kind == "script" else 5.0)
        return
    blocks = [block(WIDTH) for _ in range(5)]
    if kind == "back-propagation":
        head = keras.layers.Dense(CLASSES, activation="softmax")
        model = keras.Sequential([*blocks, head])
    else:
        last = [block(CLASSES)] if kind == "unformatted" else []
        model = blogkeras.HSICBottleneck([*blocks, *last], CLASSES, kind)
    steps = EPOCHS * len(train[0]) // BATCH_SIZE
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(RATE, steps)
        ),
        "sparse_categorical_crossentropy"
        if kind == "back-propagation"
        else None,
        metrics=["accuracy"],
        jit_compile=False,
    )
    for _ in range(EPOCHS):
        start = time.process_time()
        model.fit(*train, batch_size=BATCH_SIZE, verbose=0)
        seconds = time.process_time() - start
        scores = model.predict(test[0], batch_size=1000, verbose=0)
        yield (scores.argmax(1) == test[1]).mean(), seconds


def run_script(train, test, sigma, label_weight=50.0, rate=5e-4):
    """Layer after layer: forward, both nHSIC, gradient, update; and again."""
    import keras
    import numpy as np
    import tensorflow as tf

    def uniform(fan_in):
        bound = 1 / math.sqrt(fan_in)
        return keras.initializers.RandomUniform(-bound, bound)

    sizes = [784, *[WIDTH] * 6, CLASSES]
    blocks = []
    for inputs, units in zip(sizes, sizes[1:], strict=False):
        blocks.append(
            block(
                units,
                kernel_initializer=uniform(inputs),
                bias_initializer=uniform(inputs),
            )
        )
        blocks[-1].build((None, inputs))
    center = tf.eye(BATCH_SIZE) - 1 / BATCH_SIZE
    ridge = 1e-5 * BATCH_SIZE * tf.eye(BATCH_SIZE)

    def resolvent(x):
        norms = tf.reduce_sum(x * x, 1)[:, None]
        product = tf.matmul(x, x, transpose_b=True)
        d = tf.abs(norms - 2 * product + tf.transpose(norms))
        k = tf.matmul(tf.exp(-d / (2 * sigma**2 * x.shape[1])), center)
        return tf.matmul(k, tf.linalg.inv(k + ridge))

    def forward(x, training):
        hidden = []
        for layer in blocks:
            x = layer(x, training=training)
            hidden.append(x)
        return hidden

    @tf.function
    def step(x, y):
        x = tf.ensure_shape(x, (BATCH_SIZE, 784))
        # The same numbers for every layer: made once, which is only kinder.
        of_x, of_y = tf.transpose(resolvent(x)), tf.transpose(resolvent(y))
        for i, layer in enumerate(blocks):
            weights = [v.value for v in layer.trainable_variables]
            with tf.GradientTape() as tape:
                of_z = resolvent(forward(x, True)[i])
                loss = tf.reduce_sum(of_z * (of_x - label_weight * of_y))
            for w, g in zip(weights, tape.gradient(loss, weights), strict=True):
                w.assign_sub(rate * (g + 1e-3 * w))

    for _ in range(EPOCHS):
        start = time.process_time()
        for i in range(0, len(train[0]), BATCH_SIZE):
            x, y = (part[i : i + BATCH_SIZE] for part in train)
            step(tf.constant(x), tf.one_hot(y, CLASSES))
        seconds = time.process_time() - start
        last = forward(tf.constant(test[0]), False)[-1].numpy()
        yield accuracy_of_script(last, test[1], np), seconds


def accuracy_of_script(last, labels, np):
    """Mean over the classes; each takes the unit of its largest mean."""
    taken, found = [], []
    for label in range(CLASSES):
        of_class = last[labels == label]
        mean = of_class.mean(0)
        mean[taken] = -1
        taken.append(int(mean.argmax()))
        found.append((of_class.argmax(1) == taken[-1]).mean())
    return np.mean(found)


def recorded():
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(rows):
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    if not ROWS.exists():
        ROWS.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    with ROWS.open("a", encoding="utf-8") as file:
        file.write("".join(",".join(map(str, row)) + "\n" for row in rows))


def table():
    """Mean accuracy over the seeds after each epoch; and the figure."""
    import numpy as np

    from blogkeras import report

    curves = {}
    print(
        "| trained by | seeds | "
        + " | ".join(f"epoch {e + 1}" for e in range(EPOCHS))
        + " | lowest, highest | CPU s per epoch |"
    )
    print("|---" * (EPOCHS + 4) + "|")
    for kind in KINDS:
        rows = [row for row in recorded() if row["kind"] == kind]
        if not rows:
            continue
        values = np.array([100 * float(row["accuracy"]) for row in rows])
        values = values.reshape(-1, EPOCHS)
        seconds = np.median([float(row["cpu_seconds"]) for row in rows])
        curves[kind] = values.mean(0)
        cells = [kind, len(values)]
        cells += [f"{v:.2f}" for v in values.mean(0)]
        last = values[:, -1]
        cells += [f"{last.min():.2f}, {last.max():.2f}", f"{seconds:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    report.line_figure(
        FIGURE,
        list(range(1, EPOCHS + 1)),
        curves,
        "epoch",
        "test accuracy, %",
        "MNIST, dense network",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of the digits")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table()
    train, test = read(args.data)
    done = {(row["kind"], row["seed"]) for row in recorded()}
    for kind in args.only:
        for seed in range(args.seeds):
            if (kind, str(seed)) in done:
                continue
            rows = []
            for epoch, (accuracy, seconds) in enumerate(
                run(kind, seed, train, test), 1
            ):
                rows.append(
                    [kind, seed, epoch, f"{accuracy:.4f}", f"{seconds:.1f}"]
                )
                print(*rows[-1], flush=True)
            append(rows)


if __name__ == "__main__":
    main()
