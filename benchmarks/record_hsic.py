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

import itertools
import math
import pathlib
import time

import numpy as np
from harness import command_line, page
from harness.recording import Recording, group

ROWS = page.ROOT / "docs/results/hsic_bottleneck.csv"
FIGURE = page.ROOT / "docs/hsic_bottleneck.png"
SETTINGS = ["rate", "bandwidth", "label_weight"]
COLUMNS = ["kind", "seed", *SETTINGS, "epoch", "accuracy", "cpu_seconds"]
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
        jit_compile=keras.backend.backend() == "jax",
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
        yield accuracy_of_script(last, test[1]), seconds


def accuracy_of_script(last, labels):
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


def judged(search, kind):
    """Accuracy on the pictures held out, by settings."""
    kind = "unformatted" if kind == "format" else kind
    return {
        settings_of(row): float(row["accuracy"])
        for row in search.rows()
        if row["kind"] == kind and int(row["epoch"]) == EPOCHS
    }


def report(record, search):
    """Prints the settings tried and the accuracies; draws the figure."""
    from blogkeras import report

    tried = [
        [kind, *(f"{v:g}" if v else "" for v in settings), f"{100 * score:.2f}"]
        for kind in KINDS
        if kind != "format"
        for settings, score in judged(search, kind).items()
    ]
    columns = ["trained by", "rate", "σ", "λ", "held out, %"]
    print("\n".join([*page.table(columns, tried), ""]))
    rows, curves, by_kind = [], {}, group(record.rows(), "kind")
    for kind in KINDS:
        if kind in by_kind:
            values = [100 * float(row["accuracy"]) for row in by_kind[kind]]
            values = np.reshape(values, (-1, EPOCHS))
            curves[kind] = values.mean(0)
            seconds = [float(row["cpu_seconds"]) for row in by_kind[kind]]
            ends = f"{values[:, -1].min():.2f}, {values[:, -1].max():.2f}"
            cells = [kind, len(values), *(f"{v:.2f}" for v in curves[kind])]
            rows.append([*cells, ends, f"{np.median(seconds):.1f}"])
    epochs = [f"epoch {e + 1}" for e in range(EPOCHS)]
    columns = ["trained by", "seeds", *epochs, "lowest, highest"]
    print("\n".join(page.table([*columns, "CPU s per epoch"], rows)))
    report.line_figure(
        FIGURE,
        list(range(1, EPOCHS + 1)),
        curves,
        "epoch",
        "test accuracy, %",
        "MNIST, dense network",
    )


def main():
    parser = command_line.recording(__doc__, ROWS, KINDS)
    parser.add_argument("--data", help="folder of the digits")
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args()
    path = options.rows
    record, search = (
        Recording(path.with_stem(path.stem + end), COLUMNS, COLUMNS[:5])
        for end in ("", "_search")
    )
    if options.report:
        return report(record, search)
    train, test = read(options.data)
    runs = []
    for kind in options.only or KINDS:
        if options.search:
            tried = [] if kind == "format" else grid(kind)
            runs += [(kind, 0, settings) for settings in tried]
            continue
        found = judged(search, kind)
        if len(found) < len(grid(kind)):
            parser.error(f"--search first: {kind} is not finished")
        best = max(found, key=found.get)
        runs += [(kind, seed, best) for seed in range(options.seeds)]
    if options.search:
        record = search
        test = [part[-HELD_OUT:] for part in train]
        train = [part[:-HELD_OUT] for part in train]
    runs = [(*key, *(f"{v:g}" for v in settings)) for *key, settings in runs]
    for kind, seed, *numbers in record.todo(runs, options):
        settings = [float(v) for v in numbers]
        epochs = run(kind, seed, settings, train, test)
        record.extend(
            (kind, seed, *numbers, i, f"{accuracy:.4f}", f"{seconds:.1f}")
            for i, (accuracy, seconds) in enumerate(epochs, 1)
        )


if __name__ == "__main__":
    main()
