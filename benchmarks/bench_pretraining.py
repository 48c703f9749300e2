"""A training step of ELECTRA, beside its peers.

    make bench-pretraining

    python benchmarks/bench_pretraining.py --piece TensorFlow [--tf-models ...]

Two BERTs of 4 layers, 256 and 64 wide, embeddings of 128, vocabulary 21128,
batches of 32 × 64 tokens, Adam, dropout 0.1. In turn, step by step:

- ours on TensorFlow, with XLA and without, and on JAX: masks are chosen in the
  step;
- ours with the generator's head on all positions (what the gathering saves);
- the drawing of the tokens alone, which is a part of our step;
- tf-models-official's `ElectraPretrainer` (tf_keras, `jit_compile=True`), masks
  chosen beforehand, outside of the measured time;
- transformers' ElectraForMaskedLM and ElectraForPreTraining (PyTorch) in the
  obvious joint loop, likewise.

The peers run in environments of their own; one whose Python is not given is
left out, and the page says so. The contest has pieces of some minutes each,
which may be run one by one; each writes its own section of the page.
"""

import argparse
import pathlib
import subprocess

import numpy as np
from harness.contest import compete, serve

TABLE = pathlib.Path(__file__).parent.parent / "docs/benchmarks/pretraining.md"
CONTENDERS = {
    "ours": "ElectraPretrainer, TensorFlow with XLA",
    "ours-graph": "ElectraPretrainer, TensorFlow without XLA",
    "ours-jax": "ElectraPretrainer, JAX",
    "ours-all": "ElectraPretrainer, TensorFlow with XLA, head on all positions",
    "drawing": "drawing the tokens, a part of ours",
    "tf-models": "tf-models-official's ElectraPretrainer",
    "transformers": "transformers' two models, PyTorch",
}
PIECES = {
    "TensorFlow": ["ours", "ours-graph", "drawing", "tf-models"],
    "Other frameworks": ["ours", "ours-jax", "transformers"],
    "Masked positions and all": ["ours", "ours-all"],
}
PACKAGES = {
    "tf-models": ["tf-models-official", "tf_keras", "tensorflow"],
    "transformers": ["transformers", "torch"],
}
# label, contender, base, target
RATIOS = [
    ("tf-models / ours, XLA", "tf-models", "ours", "≥ 1.0"),
    ("tf-models / ours, no XLA", "tf-models", "ours-graph", "recorded"),
    ("transformers / ours, XLA", "transformers", "ours", "recorded"),
    ("JAX / TensorFlow with XLA", "ours-jax", "ours", "recorded"),
    ("transformers / ours, JAX", "transformers", "ours-jax", "recorded"),
    ("all positions / K positions", "ours-all", "ours", "recorded"),
    ("drawing / ours, XLA", "drawing", "ours", "≤ 0.05"),
    ("drawing / ours, no XLA", "drawing", "ours-graph", "≤ 0.05"),
]
MASK, CLS, SEP = 4, 2, 3


def tokens(options):
    rng = np.random.default_rng(0)
    shape = options.batch, options.length
    # Frequencies like those of words, longest rank last.
    p = 1 / (10 + np.arange(options.vocabulary - 10))
    ids = 5 + rng.choice(len(p), shape, p=p / p.sum())
    ids[:, 0], ids[:, -1] = CLS, SEP
    return ids.astype("int32")


def masked(ids, options):
    """What the peers are given: positions, the tokens there, masked tokens."""
    rng = np.random.default_rng(1)
    places = max(1, int(0.155 * options.length))
    positions = np.stack(
        [
            1 + rng.permutation(options.length - 2)[:places]
            for _ in range(options.batch)
        ]
    ).astype("int32")
    targets = np.take_along_axis(ids, positions, 1)
    hidden = ids.copy()
    np.put_along_axis(hidden, positions, MASK, 1)
    return positions, targets, hidden


def ours(options, everywhere=False, xla=True):
    import keras
    from keras import layers, ops

    from blogkeras import ElectraPretrainer, TokenMasking

    def transformer(dim, name):
        ids = keras.Input((options.length,), dtype="int32", name="token_ids")
        places = ops.cumsum(ops.ones_like(ids), axis=1) - 1
        h = layers.Embedding(options.vocabulary, 128, name="table")(ids)
        h = h + layers.Embedding(512, 128)(places)
        h = layers.Dropout(0.1)(layers.LayerNormalization(epsilon=1e-12)(h))
        h = layers.Dense(dim)(h)
        mask = ops.not_equal(ids, 0)[:, None, :]
        heads = max(dim // 64, 1)
        for _ in range(options.layers):
            a = layers.MultiHeadAttention(heads, dim // heads, dropout=0.1)
            a = layers.Dropout(0.1)(a(h, h, attention_mask=mask))
            h = layers.LayerNormalization(epsilon=1e-12)(h + a)
            f = layers.Dense(dim)(layers.Dense(4 * dim, "gelu")(h))
            h = layers.LayerNormalization(epsilon=1e-12)(
                h + layers.Dropout(0.1)(f)
            )
        return keras.Model(ids, h, name=name)

    model = ElectraPretrainer(
        transformer(options.hidden // 4, "generator"),
        transformer(options.hidden, "discriminator"),
        masking=TokenMasking(
            options.vocabulary,
            MASK,
            [CLS, SEP],
            mask_token_rate=0.85,
            random_token_rate=0.0,
            num_positions=options.length if everywhere else None,
        ),
    )
    model.compile(keras.optimizers.Adam(5e-4), jit_compile=xla)
    ids = tokens(options)
    return lambda: model.train_on_batch(ids)


def drawing(options):
    """Draws as many tokens as a step does, from logits of its size."""
    import keras
    from keras import ops

    from blogkeras import backend
    from blogkeras.pretraining.drawing import draw_tokens

    targets = masked(tokens(options), options)[1]
    logits = keras.random.normal((*targets.shape, options.vocabulary), seed=0)
    draw = backend.jit(lambda x, y: draw_tokens(x, y, seed=0))
    targets = ops.convert_to_tensor(targets)
    return lambda: ops.convert_to_numpy(draw(logits, targets))


def tf_models(options):
    import tensorflow as tf
    import tf_keras
    from official.nlp.modeling import models, networks

    def transformer(dim, table=None):
        return networks.BertEncoder(
            vocab_size=options.vocabulary,
            hidden_size=dim,
            num_layers=options.layers,
            num_attention_heads=max(dim // 64, 1),
            intermediate_size=4 * dim,
            embedding_width=128,
            embedding_layer=table,
            dropout_rate=0.1,
            attention_dropout_rate=0.1,
            type_vocab_size=2,
            dict_outputs=True,
        )

    generator = transformer(options.hidden // 4)
    discriminator = transformer(options.hidden, generator.get_embedding_layer())
    ids = tokens(options)
    positions, targets, hidden = masked(ids, options)
    model = models.ElectraPretrainer(
        generator,
        discriminator,
        vocab_size=options.vocabulary,
        num_classes=2,
        num_token_predictions=positions.shape[1],
        mlm_activation="gelu",
    )
    optimizer = tf_keras.optimizers.Adam(5e-4)
    inputs = {
        "input_word_ids": hidden,
        "input_mask": np.ones_like(ids),
        "input_type_ids": np.zeros_like(ids),
        "masked_lm_positions": positions,
        "masked_lm_ids": targets,
    }
    inputs = {k: tf.constant(v) for k, v in inputs.items()}
    means = [tf_keras.metrics.Mean() for _ in range(4)]

    def train(inputs):
        with tf.GradientTape() as tape:
            out = model(inputs, training=True)
            generator_loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(
                    inputs["masked_lm_ids"], out["lm_outputs"]
                )
            )
            label = tf.cast(out["disc_label"], tf.float32)
            losses = tf.nn.sigmoid_cross_entropy_with_logits(
                label, out["disc_logits"]
            )
            loss = generator_loss + 50 * tf.reduce_mean(losses)
        variables = model.trainable_variables
        optimizer.apply_gradients(
            (g, v)
            for g, v in zip(
                tape.gradient(loss, variables), variables, strict=True
            )
            if g is not None
        )
        # The metrics of its own task.
        best = tf.argmax(out["lm_outputs"], -1, output_type=tf.int32)
        told = tf.cast(out["disc_logits"] > 0, tf.float32)
        for metric, value in zip(
            means,
            (
                tf.cast(best == inputs["masked_lm_ids"], tf.float32),
                generator_loss,
                tf.cast(told == label, tf.float32),
                tf.reduce_mean(losses),
            ),
            strict=True,
        ):
            metric.update_state(value)
        return loss

    model(inputs)
    optimizer.build(model.trainable_variables)
    step = tf.function(train, jit_compile=True)
    return lambda: step(inputs).numpy()


def transformers(options):
    import torch
    from transformers import (
        ElectraConfig,
        ElectraForMaskedLM,
        ElectraForPreTraining,
    )

    def config(dim):
        return ElectraConfig(
            vocab_size=options.vocabulary,
            embedding_size=128,
            hidden_size=dim,
            num_hidden_layers=options.layers,
            num_attention_heads=max(dim // 64, 1),
            intermediate_size=4 * dim,
            pad_token_id=0,
        )

    generator = ElectraForMaskedLM(config(options.hidden // 4))
    discriminator = ElectraForPreTraining(config(options.hidden))
    discriminator.electra.embeddings.word_embeddings.weight = (
        generator.electra.embeddings.word_embeddings.weight
    )
    parameters = {
        id(p): p for m in (generator, discriminator) for p in m.parameters()
    }
    optimizer = torch.optim.Adam(parameters.values(), 5e-4)
    ids = tokens(options)
    positions, _, hidden = masked(ids, options)
    ids, hidden = torch.tensor(ids).long(), torch.tensor(hidden).long()
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen.scatter_(1, torch.tensor(positions).long(), True)
    labels = torch.where(chosen, ids, torch.tensor(-100))

    def step():
        optimizer.zero_grad()
        out = generator(input_ids=hidden, labels=labels)
        with torch.no_grad():
            drawn = torch.distributions.Categorical(
                logits=out.logits[chosen]
            ).sample()
        corrupted = ids.clone()
        corrupted[chosen] = drawn
        told = discriminator(
            input_ids=corrupted, labels=(corrupted != ids).float()
        )
        loss = out.loss + 50 * told.loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def prepare(name, options):
    step = {
        "ours": ours,
        "ours-graph": lambda o: ours(o, xla=False),
        "ours-jax": ours,
        "ours-all": lambda o: ours(o, everywhere=True),
        "drawing": drawing,
        "tf-models": tf_models,
        "transformers": transformers,
    }[name](options)
    step()
    return step


def versions(python, packages):
    """The versions of a peer's packages, asked of its Python."""
    code = (
        "from importlib.metadata import version\n"
        f"print(', '.join(f'{{p}} {{version(p)}}' for p in {packages}))"
    )
    return subprocess.check_output([python, "-c", code], text=True).strip()


def report(seconds, options, left_out, pythons):
    from harness.page import environment, interval, table
    from harness.statistics import ratio

    ratios = [
        (label, interval(*ratio(seconds, name, base)), target)
        for label, name, base, target in RATIOS
        if name in seconds and base in seconds
    ]
    lines = [
        f"{options.layers} layers × {options.hidden} and "
        f"{options.hidden // 4}, embeddings of 128, vocabulary "
        f"{options.vocabulary}, batch {options.batch} × {options.length}, "
        f"Adam, dropout 0.1; {options.rounds} rounds of interleaved steps "
        "after warm-up. Ours chooses the masks within the step and reports "
        "all metrics of the released code, AUC included; the peers are given "
        "their masks.",
        "",
        "; ".join(
            [environment(["keras", "tensorflow", "jax", "numpy"])]
            + [
                f"{CONTENDERS[n]}: {versions(pythons[n], PACKAGES[n])}"
                for n in seconds
                if n in PACKAGES
            ]
        ),
        "",
        *table(
            ["contender", "seconds per step, median", "minimum"],
            [
                (CONTENDERS[n], f"{np.median(s):.3f}", f"{s.min():.3f}")
                for n, s in seconds.items()
            ],
        ),
        "",
        *table(["median ratio", "with 95 % interval", "target"], ratios),
        "",
    ]
    if left_out:
        names = ", ".join(CONTENDERS[n] for n in left_out)
        lines += [f"Left out, since not installed: {names}."]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=CONTENDERS)
    parser.add_argument("--piece", nargs="*", default=list(PIECES))
    parser.add_argument("--tf-models", help="a Python that has it")
    parser.add_argument("--transformers", help="a Python that has it")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=21128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    options = parser.parse_args()
    if options.worker:
        return serve(lambda: prepare(options.worker, options))
    for piece in options.piece:
        contest(piece, options)
    return None


def contest(piece, options):
    """Measures the contenders of a piece, and writes its section."""
    from harness.page import replace_section, write

    pythons = {
        "tf-models": options.tf_models,
        "transformers": options.transformers,
    }
    everyone = PIECES[piece]
    left_out = [n for n in everyone if n in pythons and not pythons[n]]
    names = [n for n in everyone if n not in left_out]
    sizes = [
        f"--{name}={getattr(options, name)}"
        for name in ("hidden", "layers", "vocabulary", "batch", "length")
    ]
    seconds = compete(
        __file__,
        names,
        sizes,
        rounds=options.rounds,
        python={n: p for n, p in pythons.items() if p and n in names},
        environment={
            "ours": {"KERAS_BACKEND": "tensorflow"},
            "ours-graph": {"KERAS_BACKEND": "tensorflow"},
            "ours-all": {"KERAS_BACKEND": "tensorflow"},
            "drawing": {"KERAS_BACKEND": "tensorflow"},
            "ours-jax": {"KERAS_BACKEND": "jax"},
            "tf-models": {"TF_USE_LEGACY_KERAS": "1"},
        },
    )
    lines = report(seconds, options, left_out, pythons)
    if not options.table.exists():
        write(
            options.table,
            [
                "# Benchmark: ELECTRA (post 7846)",
                "",
                "Regenerate: `make bench-pretraining`.",
            ],
        )
    replace_section(options.table, f"## {piece}", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
