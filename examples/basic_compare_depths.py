"""How deep a network is worth its time: one compressed to several depths.

Handwritten digits (those of scikit-learn, 8 × 8) and a network of four
convolutional blocks, trained. One call compresses it to two blocks and to one,
by BERT-of-Theseus, by distillation of its predictions and hidden states, and by
direct training of its first blocks, and measures all of them. `--output PATH`
draws the accuracy over the time of a batch and over the time of training, a
line for each method, and behind them the Pareto frontier: the models that no
other one beats in both.

One seed and small data: the order of the methods is no verdict.

Blog: BERT-of-Theseus：基于模块替换的模型压缩方法,
https://kexue.fm/archives/7575
"""

import argparse

import keras
from keras import layers

from blogkeras import Theseus, bert_of_theseus, compare_depths
from blogkeras.extras import require

LOSS = "sparse_categorical_crossentropy"


def encoder(blocks):
    """The names of the layers say which of them are the blocks."""
    images = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, 2, "same", activation="relu", name="stem")(images)
    for i in range(blocks):
        name = f"encoder_block_{i}"
        x = layers.Conv2D(16, 3, 1, "same", activation="relu", name=name)(x)
    return keras.Model(images, x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--output", help="where to draw quality over time")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    train_x, train_y = images[:1280], labels[:1280]
    test_x, test_y = images[1280:], labels[1280:]

    def train(model):
        model.compile(
            keras.optimizers.Adam(3e-3),
            LOSS,
            metrics=["accuracy"],
            # XLA is slower than TensorFlow's own convolutions on a CPU.
            jit_compile=keras.backend.backend() == "jax",
        )
        # While parts are replaced, half as long; what is detached is then
        # trained as long as the others.
        half = isinstance(model, Theseus)
        model.fit(
            train_x,
            train_y,
            batch_size=64,
            epochs=(args.epochs + 1) // 2 if half else args.epochs,
            verbose=0,
        )

    predecessor = encoder(4)
    head = [layers.GlobalAveragePooling2D(), layers.Dense(10, "softmax")]
    pool, dense = head
    model = keras.Model(predecessor.input, dense(pool(predecessor.output)))
    train(model)

    def route(method, **options):
        """A function from a smaller encoder to the model to train."""
        return lambda successor: bert_of_theseus(
            predecessor, successor, head, method=method, **options
        )

    report = compare_depths(
        predecessor,
        head,
        args.depths,
        train,
        test_x,
        test_y,
        loss=LOSS,
        metrics=["accuracy"],
        methods={
            "Theseus": route("theseus"),
            "distillation": route(
                "distillation", hidden="blocks", hidden_loss="cosine"
            ),
            "direct": route("direct"),
        },
        batch_size=256,
        verbose=0,
    )
    report.table("Digits: four blocks, and fewer")
    print("Pareto frontier:", "; ".join(report.frontier()))
    if args.output:
        print("Figure:", report.plot(args.output))


if __name__ == "__main__":
    main()
