"""bert4keras on Keras 3 against itself on tf_keras and against KerasHub.

    make bench-bert4keras
    python benchmarks/bench_bert4keras.py --layers 12 --hidden 768

The same BERT classifier, trained and applied step by step in turn by every
contender: bert4keras through the bridge, the same bert4keras on tf_keras, for
which it was written, and KerasHub's BertBackbone. One contender does nothing
but the large matrix products of a train step, the bound for all of them. Each
size has its own part of the table. Where memory is short for all contenders at
once, `--only bridge legacy products --record` measures some.
"""

import numpy as np
from harness import command_line, page
from harness.bert import SIZES, batch, bert, labels
from harness.contest import LEGACY, compete, serve

PAGE = page.ROOT / "docs/benchmarks/bert4keras.md"
CONTENDERS = {
    "bridge": "training, Keras 3, XLA",
    "bridge-graph": "training, Keras 3, no XLA",
    "legacy": "training, tf_keras",
    "legacy-xla": "training, tf_keras, XLA",
    "hub": "training, KerasHub, XLA",
    "bridge-predict": "prediction, Keras 3, XLA",
    "legacy-predict": "prediction, tf_keras",
    "hub-predict": "prediction, KerasHub, XLA",
    "products": "training's matrix products alone",
}
# label, contender, base
RATIOS = [
    ("tf_keras / Keras 3 with XLA", "legacy", "bridge"),
    ("tf_keras / Keras 3, both without XLA", "legacy", "bridge-graph"),
    ("tf_keras / Keras 3, both with XLA", "legacy-xla", "bridge"),
    ("KerasHub / bert4keras, both with XLA", "hub", "bridge"),
    ("tf_keras / its matrix products", "legacy", "products"),
    ("Keras 3 with XLA / its matrix products", "bridge", "products"),
    ("prediction: tf_keras / Keras 3", "legacy-predict", "bridge-predict"),
    ("prediction: KerasHub / bert4keras", "hub-predict", "bridge-predict"),
]


def bert4keras_classifier(keras, options):
    body = bert(options, attention_dropout_rate=0.1)
    first = keras.layers.Lambda(lambda x: x[:, 0])(body.output)
    outputs = keras.layers.Dense(2, activation="softmax")(first)
    return keras.models.Model(body.inputs, outputs)


def hub_classifier(keras, options):
    import keras_hub

    body = keras_hub.models.BertBackbone(
        vocabulary_size=options.vocabulary,
        num_layers=options.layers,
        num_heads=max(options.hidden // 32, 1),
        hidden_dim=options.hidden,
        intermediate_dim=4 * options.hidden,
        dropout=0.1,
        max_sequence_length=512,
    )
    first = body.output["sequence_output"][:, 0]
    outputs = keras.layers.Dense(2, activation="softmax")(first)
    return keras.Model(body.input, outputs)


def matrix_products(options):
    """Returns a step of nothing but a train step's large matrix products.

    Through oneDNN, by TensorFlow outside of any graph: on the machines tried
    its kernels are the fastest, ahead of XLA's and NumPy's.
    """
    from keras import ops

    hidden, inner = options.hidden, 4 * options.hidden
    heads = max(hidden // 32, 1)
    rng = np.random.default_rng(0)

    def random(*shape):
        return ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))

    rows = options.batch * options.length
    x, h = random(rows, hidden), random(rows, inner)
    square = random(hidden, hidden)
    wide, narrow = random(hidden, inner), random(inner, hidden)
    per_head = (options.batch, heads, options.length)
    q, k = (
        random(*per_head, hidden // heads),
        random(*per_head, hidden // heads),
    )
    k = ops.swapaxes(k, -1, -2)
    scores = random(*per_head, options.length)

    def step():
        # Each product forward has two of its size backward.
        for _ in range(3 * options.layers):
            for _ in range(4):  # query, key, value, output
                ops.matmul(x, square)
            ops.matmul(q, k)
            ops.matmul(scores, q)
            ops.matmul(x, wide)
            last = ops.matmul(h, narrow)
        ops.convert_to_numpy(last)

    return step


def prepare(name, options):
    """Returns the step of a contender."""
    if name == "products":
        return matrix_products(options)
    kind, _, mode = name.partition("-")
    if kind == "legacy":
        from bert4keras.backend import keras

        model = bert4keras_classifier(keras, options)
    elif kind == "bridge":
        import blogkeras.bert4keras  # noqa: F401

        # isort: split
        from bert4keras.backend import keras

        model = bert4keras_classifier(keras, options)
    else:
        import keras

        model = hub_classifier(keras, options)
    xla = mode == "xla" if kind == "legacy" else mode != "graph"
    model.compile(
        keras.optimizers.Adam(2e-5),
        "sparse_categorical_crossentropy",
        jit_compile=xla,
    )
    x, y = batch(options), labels(options)
    if kind == "hub":
        x = {
            "token_ids": x[0],
            "segment_ids": x[1],
            "padding_mask": x[0] > 0,
        }
    if mode == "predict":
        return lambda: model.predict_on_batch(x)
    return lambda: model.train_on_batch(x, y)


def main():
    parser = command_line.benchmark(__doc__, CONTENDERS, PAGE, 20, **SIZES)
    parser.add_argument(
        "--record", action="store_true", help="write the page with --only, too"
    )
    options = parser.parse_args()
    if options.worker:
        return serve(lambda: prepare(options.worker, options))
    seconds = compete(
        __file__,
        options.only,
        rounds=options.rounds,
        environment={n: LEGACY for n in CONTENDERS if n.startswith("legacy")},
    )
    title = (
        f"{options.layers} layers × {options.hidden}, batch {options.batch} × "
        f"{options.length}"
    )
    lines = [
        f"Vocabulary {options.vocabulary}, Adam, dropout 0.1; {options.rounds} "
        "rounds of interleaved steps.",
        "",
        page.environment(["keras", "tensorflow", "tf_keras", "keras-hub"]),
        "",
        *page.times(seconds, CONTENDERS),
        "",
        *page.ratios(seconds, RATIOS, None),
    ]
    if options.record or options.only == list(CONTENDERS):
        head = [
            "# Benchmark: bert4keras on Keras 3",
            "",
            "Regenerate: `make bench-bert4keras`, for other sizes with "
            "`--layers`, `--hidden`, `--batch` and `--length`.",
        ]
        page.update(options.page, head, {title: lines})


if __name__ == "__main__":
    main()
