"""Records the HSIC bottleneck on MNIST, epoch by epoch and seed by seed.

    python benchmarks/record_hsic.py --data DIR --search
    python benchmarks/record_hsic.py --data DIR [--seeds 3]
    python benchmarks/record_hsic.py --table

First the settings: each kind is tried with the same six (back-propagation: with
three), one seed each, trained without the last 5,120 training pictures and
judged by them after the last epoch (`docs/results/hsic_bottleneck_search.csv`).
Then the record: with the best of them on all training pictures, a row for each
epoch in `docs/results/hsic_bottleneck.csv`. Runs that stand in these files are
not done again; `--only KIND ...` and `--runs N` do a part. `--table` prints the
results and draws the curves to `docs/hsic_bottleneck.png`.

    unformatted        HSICBottleneck, 5 × 256 + 10 units, the units themselves
    format             HSICBottleneck, 5 × 256 units and a softmax layer; the
                       settings of unformatted
    back-propagation   the same network and optimizer, cross-entropy
    script             the algorithm of the paper's script for the unformatted
                       network, in the same framework: 6 × 256 + 10 units, SGD
                       without decay of the rate, weight decay 1e-3, pictures
                       in their order, units matched with the labels of the
                       very pictures that are judged

Ours and back-propagation use Adam with cosine decay. The script's own settings
for MNIST, rate 1e-3, σ = 6, λ = 200, are among the six; its network there has
6 × 1024 units and its batches 256 pictures.

DIR holds mnist_train*.npz and mnist_test.npz (arrays x and y).
"""

import argparse
import itertools
import math
import pathlib
import time

from harness.recording import Recording

ROOT = pathlib.Path(__file__).parent.parent
FIGURE = ROOT / "docs/hsic_bottleneck.png"
SETTINGS = ["rate", "bandwidth", "label_weight"]
RECORD, SEARCH = (
    Recording(
        ROOT / f"docs/results/{name}.csv",
        ["kind", "seed", *SETTINGS, "epoch", "accuracy", "cpu_seconds"],
        key=["kind", "seed", *SETTINGS, "epoch"],
    )
    for name in ("hsic_bottleneck", "hsic_bottleneck_search")
)
KINDS = ["unformatted", "format", "back-propagation", "script"]
EPOCHS, BATCH_SIZE, WIDTH, CLASSES = 5, 512, 256, 10
RATES = [1e-3, 3e-3, 1e-2]
OBJECTIVES = [(5.0, 50.0), (6.0, 200.0)]  # σ, λ
HELD_OUT = 10 * BATCH_SIZE


def grid(kind):
    """What is tried: `(rate, bandwidth, label_weight)`."""
    objectives = [(0.0, 0.0)] if kind == "back-propagation" else OBJECTIVES
    return [(rate, *pair) for pair in objectives for rate in RATES]


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


def run(kind, seed, settings, train, test):
    """Yields the accuracy after each epoch, with the CPU time of it."""
    import keras

    import blogkeras

    rate, bandwidth, label_weight = settings
    keras.utils.set_random_seed(seed)
    if kind == "script":
        yield from run_script(train, test, *settings)
        return
    blocks = [block(WIDTH) for _ in range(5)]
    if kind == "back-propagation":
        head = keras.layers.Dense(CLASSES, activation="softmax")
        model = keras.Sequential([*blocks, head])
    else:
        last = [block(CLASSES)] if kind == "unformatted" else []
        model = blogkeras.HSICBottleneck(
            [*blocks, *last],
            CLASSES,
            kind,
            bandwidth=bandwidth,
            label_weight=label_weight,
        )
    steps = EPOCHS * len(train[0]) // BATCH_SIZE
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(rate, steps)
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


def run_script(train, test, rate, sigma, label_weight):
    """Layer after layer: forward, both nHSIC, gradient, update; and again."""
    import keras
    import numpy as np
    import tensorflow as tf

    def uniform(fan_in):
        bound = 1 / math.sqrt(fan_in)
        return keras.initializers.RandomUniform(-bound, bound)

    sizes = [784, *[WIDTH] * 6, CLASSES]
    blocks = []
    for inputs, units in itertools.pairwise(sizes):
        blocks.append(
            block(
                units,
                kernel_initializer=uniform(inputs),
                bias_initializer=uniform(inputs),
            )
        )
        blocks[-1].build((None, inputs))
    ridge = 1e-5 * BATCH_SIZE * tf.eye(BATCH_SIZE)

    def resolvent(x):
        norms = tf.reduce_sum(x * x, 1)[:, None]
        product = tf.matmul(x, x, transpose_b=True)
        d = tf.abs(norms - 2 * product + tf.transpose(norms))
        k = tf.exp(-d / (2 * sigma**2 * x.shape[1]))
        k -= tf.reduce_mean(k, 1, keepdims=True)
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


def settings_of(row):
    return tuple(float(row[name]) for name in SETTINGS)


def judged(kind):
    """Accuracy on the pictures held out, by settings."""
    kind = "unformatted" if kind == "format" else kind
    return {
        settings_of(row): float(row["accuracy"])
        for row in SEARCH.rows()
        if row["kind"] == kind and int(row["epoch"]) == EPOCHS
    }


def table():
    """Settings tried; mean accuracy over the seeds; and the figure."""
    import numpy as np

    from blogkeras import report

    print("| trained by | rate | σ | λ | held out, % |")
    print("|---" * 5 + "|")
    for kind in KINDS:
        if kind == "format":
            continue
        for settings, accuracy in judged(kind).items():
            cells = [kind, *(f"{v:g}" if v else "" for v in settings)]
            print("| " + " | ".join([*cells, f"{100 * accuracy:.2f}"]) + " |")
    curves = {}
    epochs = [f"epoch {e + 1}" for e in range(EPOCHS)]
    titles = ["trained by", "seeds", *epochs, "lowest, highest"]
    print("\n| " + " | ".join([*titles, "CPU s per epoch"]) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for kind in KINDS:
        rows = [row for row in RECORD.rows() if row["kind"] == kind]
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
    parser.add_argument("--runs", type=int, help="do so many at most")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table()
    train, test = read(args.data)
    record, runs = RECORD, []
    if args.search:
        record = SEARCH
        test = [part[-HELD_OUT:] for part in train]
        train = [part[:-HELD_OUT] for part in train]
        runs = [
            (kind, 0, settings)
            for kind in args.only
            for settings in ([] if kind == "format" else grid(kind))
        ]
    else:
        for kind in args.only:
            found = judged(kind)
            if len(found) < len(grid(kind)):
                parser.error(f"--search first: {kind} is not finished")
            best = max(found, key=found.get)
            runs += [(kind, seed, best) for seed in range(args.seeds)]
    done = {
        (row["kind"], int(row["seed"]), settings_of(row))
        for row in record.rows()
    }
    runs = [one for one in runs if one not in done][: args.runs]
    for kind, seed, settings in runs:
        rows = []
        for epoch, (accuracy, seconds) in enumerate(
            run(kind, seed, settings, train, test), 1
        ):
            numbers = [f"{v:g}" for v in settings]
            rows.append(
                [
                    *(kind, seed, *numbers, epoch),
                    *(f"{accuracy:.4f}", f"{seconds:.1f}"),
                ]
            )
            print(*rows[-1], flush=True)
        record.extend(rows)


if __name__ == "__main__":
    main()
