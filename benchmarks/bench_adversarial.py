"""FGM and gradient penalty against plain steps and the blog's recipe.

    make bench-adversarial

A bert4keras classifier, trained step by step in turn by every contender. The
peer is the recipe of the blog (post 7234) re-expressed for tf_keras in graph
mode, which runs the same bert4keras: the gradient of the embedding comes out as
an array, the perturbation is added to the weights, the step is made, and the
perturbation is taken away again.
"""

import argparse
import pathlib

import numpy as np
from interleaved import Worker, environment, measure, ratio, serve

TABLE = pathlib.Path(__file__).parent.parent / "docs/benchmarks/adversarial.md"
LEGACY = {"TF_KERAS": "1", "TF_USE_LEGACY_KERAS": "1"}

# name: (label, environment)
CONTENDERS = {
    "plain": ("plain, XLA", {}),
    "fgm": ("FGM, matrix, XLA", {}),
    "fgm-output": ("FGM, output, XLA", {}),
    "penalty": ("gradient penalty, XLA", {}),
    "plain-graph": ("plain, no XLA", {}),
    "fgm-graph": ("FGM, matrix, no XLA", {}),
    "legacy": ("plain, tf_keras", LEGACY),
    "legacy-recipe": ("the blog's FGM recipe, tf_keras", LEGACY),
    "plain-mixed": ("plain, XLA, lengths 32-128 in buckets", {}),
    "fgm-mixed": ("FGM, XLA, lengths 32-128 in buckets", {}),
    "legacy-mixed": ("plain, tf_keras, the same batches", LEGACY),
}
# label, contender, base, target ("<=" or ">=", number) or None
RATIOS = [
    ("FGM / plain, XLA", "fgm", "plain", ("<=", 1.70)),
    ("FGM at the output / plain, XLA", "fgm-output", "plain", None),
    ("gradient penalty / plain, XLA", "penalty", "plain", None),
    ("FGM / plain, no XLA", "fgm-graph", "plain-graph", None),
    ("blog's recipe / plain, tf_keras", "legacy-recipe", "legacy", None),
    ("blog's recipe / FGM, XLA", "legacy-recipe", "fgm", (">=", 1.3)),
    ("plain tf_keras / plain, XLA", "legacy", "plain", (">=", 1.5)),
    ("mixed lengths: FGM / plain, XLA", "fgm-mixed", "plain-mixed", None),
    (
        "mixed lengths: tf_keras / plain, XLA",
        "legacy-mixed",
        "plain-mixed",
        None,
    ),
]


def batches(name, options):
    """Endless batches; of four bucketed lengths for the mixed contenders."""
    rng = np.random.default_rng(0)
    lengths = [32, 64, 96, 128] if "mixed" in name else [options.length]
    made = []
    for length in lengths:
        tokens = rng.integers(
            1, options.vocabulary, (options.batch, length)
        ).astype("int32")
        tokens[::2, length * 3 // 4 :] = 0
        labels = rng.integers(0, 2, (options.batch,))
        made.append(([tokens, np.zeros_like(tokens)], labels))
    while True:
        yield from made


def classifier(keras, options):
    from bert4keras.models import build_transformer_model

    bert = build_transformer_model(
        model="bert",
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 32, 1),
        intermediate_size=4 * options.hidden,
        hidden_act="gelu",
        max_position=512,
        dropout_rate=0.1,
        segment_vocab_size=2,
    )
    pooled = keras.layers.GlobalAveragePooling1D()(bert.output)
    outputs = keras.layers.Dense(2, activation="softmax")(pooled)
    return keras.models.Model(bert.inputs, outputs)


def keras_3(name, options):
    import keras

    import blogkeras
    import blogkeras.bert4keras  # noqa: F401

    model = classifier(keras, options)
    model.compile(
        keras.optimizers.Adam(2e-5),
        "sparse_categorical_crossentropy",
        jit_compile="graph" not in name,
    )
    kind = name.split("-")[0]
    if kind == "fgm":
        site = "output" if "output" in name else "matrix"
        method = blogkeras.FGM(0.5, site=site)
        blogkeras.adversarial_training(model, "Embedding-Token", method=method)
    elif kind == "penalty":
        method = blogkeras.GradientPenalty(1.0)
        blogkeras.adversarial_training(model, "Embedding-Token", method=method)
    return stepper(model.train_on_batch, name, options)


def tf_keras(name, options):
    import tensorflow as tf
    from bert4keras.backend import keras

    model = classifier(keras, options)
    optimizer = keras.optimizers.Adam(2e-5)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    if name != "legacy-recipe":
        return stepper(model.train_on_batch, name, options)
    table = model.get_layer("Embedding-Token").embeddings
    loss = keras.losses.SparseCategoricalCrossentropy()

    @tf.function
    def slope(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return tf.convert_to_tensor(tape.gradient(value, table))

    def step(x, y):
        g = slope(x, y).numpy()
        delta = 0.5 * g / (np.sqrt((g**2).sum()) + 1e-8)
        table.assign(table.numpy() + delta)
        model.train_on_batch(x, y)
        table.assign(table.numpy() - delta)

    return stepper(step, name, options)


def stepper(train, name, options):
    """One timed step: a batch, or one batch of every length."""
    stream = batches(name, options)
    count = 4 if "mixed" in name else 1

    def step():
        for _ in range(count):
            train(*next(stream))

    step()
    return step


def report(seconds, options, packages):
    lines = [
        "# Benchmark: adversarial training",
        "",
        f"bert4keras BERT, {options.layers} layers × {options.hidden}, "
        f"vocabulary {options.vocabulary}, batch {options.batch} × "
        f"{options.length}, Adam, dropout 0.1; {options.rounds} rounds of "
        "interleaved steps after warm-up.",
        "",
        environment(packages),
        "",
        "| contender | seconds per step, median | minimum |",
        "|---|---|---|",
    ]
    for name, values in seconds.items():
        count = 4 if "mixed" in name else 1
        lines.append(
            f"| {CONTENDERS[name][0]} | {np.median(values) / count:.3f} | "
            f"{values.min() / count:.3f} |"
        )
    lines += [
        "",
        "| ratio | median | 95 % interval | target |",
        "|---|---|---|---|",
    ]
    for label, name, base, target in RATIOS:
        if name in seconds and base in seconds:
            middle, low, high = ratio(seconds, name, base)
            row = (
                label,
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{target[0]} {target[1]:.2f}" if target else "",
            )
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", "Regenerate: `make bench-adversarial`.", ""]
    return "\n".join(lines)


def contest(names, arguments, rounds):
    """Seconds per step of contenders that take turns."""
    workers = []
    for name in names:
        print("starting", name, flush=True)
        workers.append(Worker(__file__, name, arguments, CONTENDERS[name][1]))
    seconds = measure(
        workers,
        rounds,
        progress=lambda i, n: print(f"round {i} of {n}", flush=True),
    )
    for worker in workers:
        worker.close()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=CONTENDERS)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=21128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    options = parser.parse_args()
    if options.worker:
        make = tf_keras if "legacy" in options.worker else keras_3
        return serve(lambda: make(options.worker, options))
    sizes = [
        f"--{name}={getattr(options, name)}"
        for name in ("layers", "hidden", "vocabulary", "batch", "length")
    ]
    seconds = {}
    for mixed in (False, True):  # all at once would fill 24 GiB
        names = [n for n in options.only if ("mixed" in n) == mixed]
        seconds.update(contest(names, sizes, options.rounds))
    text = report(
        seconds,
        options,
        ["keras", "tensorflow", "tf_keras", "bert4keras", "numpy"],
    )
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
