"""Module replacement: one branch or both, and what the small models save.

    make bench-theseus

A bert4keras BERT of 12 layers is replaced by one of 3. A step of `Theseus` runs
the chosen branches only; the recipe of the blog (post 7575) runs both and
multiplies one by zero, which is re-expressed here on the same models. Then the
other roads to 3 layers: their training alone, distillation of the predictions,
and what hidden states add to it. Then inference with 12, 6 and 3 layers. All
compiled with XLA, step by step in turn.

The cost of a step with one branch depends on the draw of its round.
"""

import numpy as np
from harness import command_line, page
from harness.bert import SIZES, batch, bert
from harness.contest import compete, serve

PAGE = page.ROOT / "docs/benchmarks/theseus.md"

CONTENDERS = {
    "one": "training step 12 → 3, the chosen branch",
    "both": "training step 12 → 3, both branches, one times zero (the post)",
    "direct": "training step of the 3 layers alone",
    "predictions": "training step, distillation of the predictions",
    "mse": "training step, distillation, hidden states by their distance",
    "relation": "training step, distillation, hidden states by relations",
    "infer-12": "inference, 12 layers",
    "infer-6": "inference, 6 layers",
    "infer-3": "inference, 3 layers",
}
# The method of `bert_of_theseus` and its arguments. The relations are of
# as many heads as the transformers have at the default size.
ROADS = {
    "one": ("theseus", {}),
    "direct": ("direct", {}),
    "predictions": ("distillation", {}),
    "mse": ("distillation", {"hidden": "blocks"}),
    "relation": (
        "distillation",
        {"hidden": "blocks", "hidden_loss": "relation", "hidden_heads": 4},
    ),
}
# label, contender, base, target
RATIOS = [
    ("one branch / both", "one", "both", "<= 0.60"),
    ("one branch / distillation", "one", "predictions", ""),
    ("distillation / 3 layers alone", "predictions", "direct", ""),
    ("hidden states, distance / predictions", "mse", "predictions", ""),
    ("hidden states, relations / predictions", "relation", "predictions", ""),
    ("12 layers / 6, inference", "infer-12", "infer-6", ">= 1.85"),
    ("12 layers / 3, inference", "infer-12", "infer-3", ">= 3.30"),
]


def transformer(share, prefix, options):
    """A BERT of this share of the layers."""
    import blogkeras.bert4keras  # noqa: F401

    return bert(
        options,
        num_hidden_layers=round(share * options.layers),
        num_attention_heads=max(options.hidden // 64, 1),
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

    x = batch(options)
    y = np.random.default_rng(1).integers(0, 2, x[0].shape)
    head = keras.layers.Dense(2, activation="softmax")
    if name.startswith("infer"):
        model = transformer(int(name[6:]) / 12, "", options).model
        run = backend.jit(lambda *x: model(list(x), training=False))
        x = [keras.ops.convert_to_tensor(a) for a in x]

        def step():
            keras.ops.convert_to_numpy(run(*x))

    else:
        old = transformer(1, "Predecessor-", options)
        new = transformer(1 / 4, "Successor-", options)
        if name == "both":
            model = both_branches(old, new, head)
        else:
            method, arguments = ROADS[name]
            model = bert_of_theseus(old, new, head, method=method, **arguments)
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
    return [
        "# Benchmark: BERT-of-Theseus (post 7575)",
        "",
        f"bert4keras BERT × {options.hidden}, vocabulary {options.vocabulary}, "
        f"batch {options.batch} × {options.length}, Adam, dropout 0.1, rate ½, "
        f"XLA; {options.rounds} rounds of interleaved steps after warm-up.",
        "",
        page.environment(["keras", "tensorflow", "bert4keras", "numpy"]),
        "",
        *page.times(seconds, CONTENDERS),
        "",
        *page.ratios(seconds, RATIOS),
        "",
        "In operations the first is 0.5: 7.5 layers of 15 on average.",
        "",
        "Regenerate: `make bench-theseus`.",
    ]


def main():
    sizes = {**SIZES, "layers": 12, "hidden": 256, "vocabulary": 5000}
    parser = command_line.benchmark(__doc__, CONTENDERS, PAGE, 30, **sizes)
    options = parser.parse_args()
    if options.worker:
        return serve(lambda: prepare(options.worker, options))
    seconds = compete(__file__, options.only, rounds=options.rounds)
    lines = report(seconds, options)
    page.write(options.page, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
