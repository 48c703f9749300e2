"""Module replacement: one branch or both, and what the small models save.

    make bench-theseus

A bert4keras BERT of 12 layers is replaced by one of 3. A step of `Theseus` runs
the chosen branches only; the recipe of the blog (post 7575) runs both and
multiplies one by zero, which is re-expressed here on the same models. Then
inference with 12, 6 and 3 layers. All compiled with XLA, step by step in turn.

The cost of a step with one branch depends on the draw, so the ratios are those
of means over all rounds, with 95 % bootstrap intervals.
"""

import argparse
import pathlib

import numpy as np
from harness.contest import Worker, measure, serve
from harness.page import environment
from harness.statistics import ratio

TABLE = pathlib.Path(__file__).parent.parent / "docs/benchmarks/theseus.md"

CONTENDERS = {
    "one": "training step 12 → 3, the chosen branch",
    "both": "training step 12 → 3, both branches, one times zero (the post)",
    "infer-12": "inference, 12 layers",
    "infer-6": "inference, 6 layers",
    "infer-3": "inference, 3 layers",
}
# label, contender, base, target
RATIOS = [
    ("one branch / both", "one", "both", "<= 0.60"),
    ("12 layers / 6, inference", "infer-12", "infer-6", ">= 1.85"),
    ("12 layers / 3, inference", "infer-12", "infer-3", ">= 3.30"),
]


def transformer(layers, prefix, options):
    import blogkeras.bert4keras  # noqa: F401

    # isort: split
    from bert4keras.models import build_transformer_model

    return build_transformer_model(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(options.hidden // 64, 1),
        intermediate_size=4 * options.hidden,
        hidden_act="gelu",
        max_position=512,
        segment_vocab_size=2,
        dropout_rate=0.1,
        prefix=prefix,
        return_keras_model=False,
    )


def both_branches(old, new, head):
    """The post's recipe: one draw per module and batch, both branches run."""
    import keras
    from keras import ops

    from blogkeras import Theseus, bert_of_theseus

    class RandomChoice(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_masking = True
            self.seed_generator = keras.random.SeedGenerator()

        def call(self, inputs, training=False):
            x_p, x_s = inputs
            if not training:
                return x_s
            draw = keras.random.uniform((), seed=self.seed_generator) < 0.5
            e = ops.cast(draw, x_p.dtype)
            return x_p * e + x_s * (1 - e)

        def compute_mask(self, inputs, previous_mask=None):
            return previous_mask[0]

    theseus = bert_of_theseus(old, new, None)
    if not isinstance(theseus, Theseus):
        raise TypeError(theseus)
    x = inputs = [
        keras.Input((None,), dtype="int32", name=f"input_{i}") for i in range(2)
    ]
    for p, s in zip(
        theseus.predecessor_modules, theseus.successor_modules, strict=True
    ):
        x = RandomChoice()([p.call(x), s.call(x)])
    return keras.Model(inputs, head(x))


def prepare(name, options):
    import keras

    from blogkeras import backend, bert_of_theseus

    rng = np.random.default_rng(0)
    tokens = rng.integers(
        1, options.vocabulary, (options.batch, options.length)
    ).astype("int32")
    tokens[::2, options.length * 3 // 4 :] = 0
    x = [tokens, np.zeros_like(tokens)]
    y = rng.integers(0, 2, tokens.shape)
    head = keras.layers.Dense(2, activation="softmax")
    if name.startswith("infer"):
        model = transformer(int(name[6:]), "", options).model
        run = backend.jit(lambda *x: model(list(x), training=False))
        x = [keras.ops.convert_to_tensor(a) for a in x]

        def step():
            keras.ops.convert_to_numpy(run(*x))

    else:
        old = transformer(12, "Predecessor-", options)
        new = transformer(3, "Successor-", options)
        if name == "one":
            model = bert_of_theseus(old, new, head)
        else:
            model = both_branches(old, new, head)
        model.compile(
            keras.optimizers.Adam(2e-5),
            "sparse_categorical_crossentropy",
            jit_compile=True,
        )

        def step():
            model.train_on_batch(x, y)

    step()
    return step


def report(seconds, options):
    lines = [
        "# Benchmark: BERT-of-Theseus",
        "",
        f"bert4keras BERT × {options.hidden}, vocabulary {options.vocabulary}, "
        f"batch {options.batch} × {options.length}, Adam, dropout 0.1, rate ½, "
        f"XLA; {options.rounds} rounds of interleaved steps after warm-up.",
        "",
        environment(["keras", "tensorflow", "bert4keras", "numpy"]),
        "",
        "| contender | seconds per step, mean | minimum |",
        "|---|---|---|",
        *(
            f"| {CONTENDERS[name]} | {values.mean():.3f} | {values.min():.3f} |"
            for name, values in seconds.items()
        ),
        "",
        "| median ratio | | 95 % interval | target |",
        "|---|---|---|---|",
    ]
    for label, name, base, target in RATIOS:
        if name in seconds and base in seconds:
            middle, low, high = ratio(seconds, name, base)
            lines.append(
                f"| {label} | {middle:.2f} | {low:.2f} to {high:.2f} | "
                f"{target} |"
            )
    lines += [
        "",
        "In operations the first is 0.5: 7.5 layers of 15 on average.",
        "",
        "Regenerate: `make bench-theseus`.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=CONTENDERS)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    options = parser.parse_args()
    if options.worker:
        return serve(lambda: prepare(options.worker, options))
    sizes = [
        f"--{name}={getattr(options, name)}"
        for name in ("hidden", "vocabulary", "batch", "length")
    ]
    workers = []
    for name in options.only:
        print("starting", name, flush=True)
        workers.append(Worker(__file__, name, sizes))
    seconds = measure(
        workers,
        options.rounds,
        progress=lambda i, n: print(f"round {i} of {n}", flush=True),
    )
    for worker in workers:
        worker.close()
    text = report(seconds, options)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
