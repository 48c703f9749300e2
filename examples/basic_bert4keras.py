"""An old bert4keras script on Keras 3: one line is new.

A small BERT learns to tell whether a sentence praises or complains. Everything
below the first import is written as for Keras 2; the model is a genuine Keras 3
model, trains under XLA, and is saved and loaded without custom objects.

Install: pip install -e . (in a clone)
         pip install --no-deps bert4keras==0.11.5
"""

import blogkeras.bert4keras  # noqa: F401  (the new line, before the others)

# isort: split
import os
import tempfile

import numpy as np
from bert4keras.backend import keras
from bert4keras.models import build_transformer_model
from bert4keras.snippets import DataGenerator, sequence_padding
from bert4keras.tokenizers import Tokenizer

PRAISE, COMPLAINT, FILLER = "好美棒香甜", "坏丑差臭苦", "这家店的菜味道很"
MAXLEN = 16

tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PRAISE, *COMPLAINT, *FILLER]
tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)})


def make_data(size, rng):
    """Returns sentences of filler with one telling word, and labels."""
    data = []
    for _ in range(size):
        label = int(rng.integers(2))
        word = rng.choice(list(PRAISE if label else COMPLAINT))
        filler = rng.choice(list(FILLER), rng.integers(4, 12)).tolist()
        filler.insert(int(rng.integers(len(filler))), word)
        data.append(("".join(filler), label))
    return data


class Batches(DataGenerator):
    """Pads to one length: a step compiled by XLA should see few shapes."""

    def __iter__(self, random=False):
        token_ids, segment_ids, labels = [], [], []
        for is_end, (text, label) in self.sample(random):
            ids, segments = tokenizer.encode(text, maxlen=MAXLEN)
            token_ids.append(ids)
            segment_ids.append(segments)
            labels.append([label])
            if len(labels) == self.batch_size or is_end:
                yield (
                    [
                        sequence_padding(token_ids, MAXLEN),
                        sequence_padding(segment_ids, MAXLEN),
                    ],
                    np.array(labels),
                )
                token_ids, segment_ids, labels = [], [], []


def main():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    train, test = make_data(512, rng), make_data(128, rng)

    bert = build_transformer_model(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_act="gelu",
        max_position=MAXLEN,
        dropout_rate=0.1,
    )
    first = keras.layers.Lambda(lambda x: x[:, 0])(bert.output)
    output = keras.layers.Dense(2, activation="softmax")(first)
    model = keras.models.Model(bert.input, output)
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=True,
    )
    batches = Batches(train, batch_size=32)
    model.fit(
        batches.forfit(),  # shuffles by itself
        steps_per_epoch=len(batches),
        epochs=4,
        shuffle=False,
        verbose=2,
    )

    x, y = next(iter(Batches(test, batch_size=len(test))))
    accuracy = np.mean(model.predict(x, verbose=0).argmax(1) == y[:, 0])
    print(f"Accuracy on new sentences: {accuracy:.2f}")

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bert.keras")
        bert.save(path)
        loaded = keras.models.load_model(path)
    error = np.abs(loaded.predict(x, verbose=0) - bert.predict(x, verbose=0))
    print(f"Loaded without custom objects, difference: {error.max():.0e}")
    return accuracy


if __name__ == "__main__":
    main()
