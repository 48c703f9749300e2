"""Records what each method of post 7234 and 7466 is worth, seed by seed.

    python benchmarks/record_adversarial.py --data DIR [--task NAME] [--seeds 5]

Trains the demo's kind of transformer (2 layers × 128, a vocabulary of
characters, at most 2 M parameters) on one of three tasks and appends a row for
each run to `docs/results/adversarial.csv`; runs that stand there are not done
again, so an interrupted recording goes on where it stopped. Every method has
the same seeds, data, steps and learning rates. `--table` prints means and
paired differences to plain training, with 95 % bootstrap intervals.

Tasks, by the files in DIR (not part of this repository):

    sentiment   sentiment.zip, the blog's reviews: lines text<TAB>0/1. Texts of
                valid and test are removed from train, and repeated ones.
    iflytek     fewclue_{train_few_all,dev_few_all,test_public}.json.gz, the
                FewCLUE split of IFLYTEK, 119 classes
    few         sentiment with 200 labels, all other texts unlabelled

`valid` is the best epoch on the validation set, `test` the test accuracy then.
"""

import argparse
import csv
import gzip
import json
import pathlib
import time
import zipfile

ROWS = pathlib.Path(__file__).parent.parent / "docs/results/adversarial.csv"
COLUMNS = ["task", "method", "seed", "valid", "test", "seconds"]
EPOCHS = {"sentiment": 4, "iflytek": 20, "few": 30}
STEPS = {"few": 30}  # per epoch; all others: the whole training set
LENGTH = {"sentiment": 64, "iflytek": 128, "few": 64}
LABELLED = 200


def methods(task):
    import blogkeras as b

    vat = b.VirtualAdversarialTraining
    if task == "few":
        return {
            "plain": None,
            "noise": vat(1.0, iters=0),
            "VAT": vat(1.0, xi=10.0, iters=1),
            "FGM": b.FGM(0.3),
        }
    return {
        "plain": None,
        "FGM": b.FGM(0.3),
        "FGSM": b.FGSM(0.003),
        "PGD": b.PGD(0.3, steps=3),
        "FreeLB": b.FreeLB(0.3, steps=3),
        "GP squared": b.GradientPenalty(1.0, "squared"),
        "GP norm": b.GradientPenalty(0.3, "norm"),
    }


def read(task, folder):
    """Three lists of pairs (text, label): train, valid, test."""
    folder = pathlib.Path(folder)
    if task == "iflytek":
        splits = []
        for part in ("train_few_all", "dev_few_all", "test_public"):
            path = folder / f"fewclue_{part}.json.gz"
            with gzip.open(path, "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
            splits.append([(r["sentence"], int(r["label"])) for r in rows])
        return splits
    archive = zipfile.ZipFile(folder / "sentiment.zip")
    splits, seen = [], set()
    for part in ("test", "valid", "train"):
        text = archive.read(f"sentiment/sentiment.{part}.data").decode("utf-8")
        pairs = {}
        for line in text.strip("\n").split("\n"):
            sentence, label = line.rsplit("\t", 1)
            if sentence not in seen:
                pairs[sentence] = int(label)
        seen.update(pairs)
        splits.append(list(pairs.items()))
    return splits[::-1]


def arrays(pairs, vocabulary, length):
    import numpy as np

    x = np.zeros((len(pairs), length), "int32")
    for row, (text, _) in zip(x, pairs, strict=True):
        ids = [vocabulary.get(c, 1) for c in text.lower()[: length - 1]]
        row[: len(ids) + 1] = [2, *ids]
    return x, np.array([label for _, label in pairs])


def classifier(words, classes, length):
    import keras
    from bert4keras.layers import GlobalAveragePooling1D
    from bert4keras.models import build_transformer_model

    bert = build_transformer_model(
        model="bert",
        vocab_size=words,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_act="gelu",
        max_position=length,
        segment_vocab_size=2,
        dropout_rate=0.1,
    )
    mean = GlobalAveragePooling1D()(bert.output)
    outputs = keras.layers.Dense(classes, activation="softmax")(mean)
    return keras.Model(bert.inputs, outputs)


def run(task, method, seed, splits):
    """One training: (valid, test, seconds)."""
    import keras
    import numpy as np

    import blogkeras

    (x, y), valid, test = splits
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    weight = np.ones(len(y), "float32")
    if task == "few":
        labelled = rng.permutation(len(y))[:LABELLED]
        weight[:] = 0
        weight[labelled] = 1
    words = 1 + max(int(part[0].max()) for part in splits)
    model = classifier(words, int(y.max()) + 1, x.shape[1])
    epochs = EPOCHS[task]
    steps = STEPS.get(task, len(y) // 32)
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                0.0,
                decay_steps=epochs * steps,
                warmup_target=1e-3,
                warmup_steps=epochs * steps // 10,
            )
        ),
        keras.losses.SparseCategoricalCrossentropy(
            reduction="mean_with_sample_weight"
        ),
        metrics=["accuracy"],
        jit_compile=True,
    )
    if method is not None:
        blogkeras.adversarial_training(model, "Embedding-Token", method=method)
    start, best = time.perf_counter(), (-1.0, -1.0)
    for _ in range(epochs):
        rows = epoch_rows(rng, weight, steps, task)
        model.fit(
            inputs(x[rows]),
            y[rows],
            sample_weight=weight[rows],
            batch_size=32,
            shuffle=False,
            verbose=0,
        )
        found = [accuracy(model, part) for part in (valid, test)]
        best = max(best, tuple(found), key=lambda pair: pair[0])
    return *best, time.perf_counter() - start


def epoch_rows(rng, weight, steps, task):
    """Whole batches; of the few labels, half of each batch is labelled."""
    import numpy as np

    if task != "few":
        return rng.permutation(len(weight))[: 32 * steps]
    labelled, rest = np.flatnonzero(weight), np.flatnonzero(weight == 0)
    batches = [
        np.concatenate([rng.choice(labelled, 16), rng.choice(rest, 16)])
        for _ in range(steps)
    ]
    return np.concatenate(batches)


def inputs(x):
    import numpy as np

    return [x, np.zeros_like(x)]


def accuracy(model, part):
    x, y = part
    return model.evaluate(
        inputs(x), y, batch_size=256, verbose=0, return_dict=True
    )["accuracy"]


def recorded():
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(row):
    """One whole line, so that an interrupt leaves no half of one."""
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    if not ROWS.exists():
        ROWS.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(",".join(map(str, row)) + "\n")


def table():
    """Means, and paired differences to plain training."""
    import numpy as np

    rng = np.random.default_rng(0)
    scores = {}
    for row in recorded():
        key = row["task"], row["method"]
        scores.setdefault(key, {})[row["seed"]] = float(row["test"])
    print("| task | method | seeds | test | difference to plain | 95 % |")
    print("|---|---|---|---|---|---|")
    for (task, method), found in scores.items():
        values = 100 * np.array(list(found.values()))
        cells = [task, method, len(values), f"{values.mean():.2f}"]
        base = scores.get((task, "plain"), {})
        seeds = sorted(set(found) & set(base))
        if method != "plain" and len(seeds) > 1:
            d = 100 * np.array([found[s] - base[s] for s in seeds])
            means = d[rng.integers(0, len(d), (5000, len(d)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            cells += [f"{d.mean():+.2f}", f"{low:+.2f} to {high:+.2f}"]
        else:
            cells += ["", ""]
        print("| " + " | ".join(map(str, cells)) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of the task's files")
    parser.add_argument("--task", choices=list(EPOCHS), default="sentiment")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table()
    import keras

    import blogkeras.bert4keras  # noqa: F401

    length = LENGTH[args.task]
    pairs = read(args.task, args.data)
    letters = sorted({c for text, _ in pairs[0] for c in text.lower()})
    vocabulary = {c: i + 3 for i, c in enumerate(letters)}
    splits = [arrays(part, vocabulary, length) for part in pairs]
    print("rows:", [len(part[1]) for part in splits])
    done = {(r["task"], r["method"], r["seed"]) for r in recorded()}
    todo = [
        (name, method, seed)
        for seed in range(args.seeds)
        for name, method in methods(args.task).items()
        if (args.task, name, str(seed)) not in done
        and (not args.only or name in args.only)
    ]
    progress = keras.utils.Progbar(len(todo), unit_name="run")
    progress.update(0)
    for name, method, seed in todo:
        valid, test, seconds = run(args.task, method, seed, splits)
        append(
            [
                args.task,
                name,
                seed,
                f"{valid:.4f}",
                f"{test:.4f}",
                f"{seconds:.0f}",
            ]
        )
        progress.add(1)


if __name__ == "__main__":
    main()
