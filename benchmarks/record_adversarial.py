"""Records what each method of post 7234 and 7466 is worth, seed by seed.

    python benchmarks/record_adversarial.py --data DIR [--task NAME] [--seeds 5]

Trains a small transformer (2 layers × 64, a vocabulary of characters, less than
a million parameters) on one of three tasks and appends a row for each run to
`docs/results/adversarial.csv`; runs that stand there are not done again, so an
interrupted recording goes on where it stopped. Every method has the same seeds,
data, steps and learning rates. `--report` writes `docs/results/adversarial.md`
and its figure: means, and differences to plain training seed by seed with 95 %
intervals.

Tasks, by the files in DIR (not part of this repository):

    sentiment   sentiment.zip, the blog's reviews: lines text<TAB>0/1. Texts of
                valid and test are removed from train, and repeated ones.
    iflytek     fewclue_{train_few_all,dev_few_all,test_public}.json.gz, the
                FewCLUE split of IFLYTEK, 119 classes
    few         sentiment with 200 labels, all other texts unlabelled

`valid` is the best epoch on the validation set, `test` the test accuracy then.
"""

import gzip
import json
import pathlib
import zipfile

import numpy as np
from harness import command_line, page
from harness.recording import Recording, group
from harness.statistics import mean_interval

ROWS = page.ROOT / "docs/results/adversarial.csv"
FIGURE = ROWS.with_suffix(".png")
COLUMNS = ["task", "method", "seed", "valid", "test"]
EPOCHS = {"sentiment": 3, "iflytek": 12, "few": 20}
STEPS = {"few": 30}  # per epoch; all others: the whole training set
LENGTH = 64
TITLES = {
    "sentiment": "Sentiment, all labels",
    "iflytek": "IFLYTEK, 119 classes",
    "few": "Sentiment, 200 labels",
}
PUBLISHED = {
    "sentiment": "Published, for a pre-trained BERT on the whole set as it was "
    "(with texts of train in test): 94.90/94.78 plain, 95.34/94.99 FGM, "
    "95.34/94.64 PGD, 95.07/94.81 penalty on valid/test, single runs "
    "([bert4torch](https://github.com/Tongjilibo/bert4torch)).",
    "iflytek": "Published, for a pre-trained BERT on the full IFLYTEK: 60.29 "
    "plain, 62.46 FGM, 62.31 gradient penalty "
    "([post 7234](https://kexue.fm/archives/7234)).",
    "few": "Published, for a pre-trained BERT and 200 labels: 89.34 plain, "
    "90.37 VAT ([post 7466](https://kexue.fm/archives/7466)).",
}
LABELLED = 200
INTRODUCTION = """\
Each run trains a transformer of 2 layers × 64 on characters, less than a
million parameters, from scratch. All methods have the same seeds, data,
batches, steps and learning rates; the epoch is chosen on the validation set. A
step of a method costs more time than a plain one, see
[the benchmark](../benchmarks/adversarial.md). Each difference is to plain
training of the same seed, with the 95 % interval of Student's t.

Strengths: FGM 0.3, PGD 0.3 in 3 steps, FGSM 0.001, FreeLB 0.1 in 3 steps,
penalty 1.0 squared and 0.3 of the norm, VAT 1.0 with ξ = 10 and one iteration,
noise 1.0, the same for all tasks. FGM's is the demo's. FGSM and FreeLB had
0.003 and 0.3 at first, given up after seed 0, where FGSM reached 81.1 and 40.3
on the first two tasks, and FreeLB 50.3, chance, and 43.9.

Written by `python benchmarks/record_adversarial.py --report` from
[adversarial.csv](adversarial.csv)."""


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
        "FGSM": b.FGSM(0.001),
        "PGD": b.PGD(0.3, steps=3),
        "FreeLB": b.FreeLB(0.1, steps=3),
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


def arrays(pairs, vocabulary):
    x = np.zeros((len(pairs), LENGTH), "int32")
    for row, (text, _) in zip(x, pairs, strict=True):
        ids = [vocabulary.get(c, 1) for c in text.lower()[: LENGTH - 1]]
        row[: len(ids) + 1] = [2, *ids]
    return x, np.array([label for _, label in pairs])


def classifier(words, classes):
    import keras
    from bert4keras.layers import GlobalAveragePooling1D
    from bert4keras.models import build_transformer_model

    bert = build_transformer_model(
        model="bert",
        vocab_size=words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_act="gelu",
        max_position=LENGTH,
        segment_vocab_size=2,
        dropout_rate=0.1,
    )
    mean = GlobalAveragePooling1D()(bert.output)
    outputs = keras.layers.Dense(classes, activation="softmax")(mean)
    return keras.Model(bert.inputs, outputs)


def run(task, method, seed, splits, place="Embedding-Token"):
    """One training: the accuracies (valid, test)."""
    import keras

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
    model = classifier(words, int(y.max()) + 1)
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
        blogkeras.adversarial_training(model, place, method=method)
    best = -1.0, -1.0
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
        found = accuracy(model, valid)
        if found > best[0]:
            best = found, accuracy(model, test)
    return best


def epoch_rows(rng, weight, steps, task):
    """Whole batches; of the few labels, half of each batch is labelled."""
    if task != "few":
        return rng.permutation(len(weight))[: 32 * steps]
    labelled, rest = np.flatnonzero(weight), np.flatnonzero(weight == 0)
    batches = [
        np.concatenate([rng.choice(labelled, 16), rng.choice(rest, 16)])
        for _ in range(steps)
    ]
    return np.concatenate(batches)


def inputs(x):
    return [x, np.zeros_like(x)]


def accuracy(model, part):
    x, y = part
    return model.evaluate(
        inputs(x), y, batch_size=256, verbose=0, return_dict=True
    )["accuracy"]


def scores(rows):
    """Test accuracies and differences to plain training of the same seed.

    `{task: {method: (accuracies, differences)}}`, in points.
    """
    found = {}
    for task, of_task in group(rows, "task").items():
        by_method = {
            method: {row["seed"]: 100 * float(row["test"]) for row in of_method}
            for method, of_method in group(of_task, "method").items()
        }
        plain = by_method["plain"]
        found[task] = {
            method: (
                np.array([*by_seed.values()]),
                np.array(
                    [by_seed[s] - plain[s] for s in by_seed if s in plain]
                ),
            )
            for method, by_seed in by_method.items()
        }
    return found


def report(rows, path):
    """Writes the page and the figure."""
    found = scores(rows)
    lines = [
        "# What each method is worth (posts 7234 and 7466)",
        "",
        INTRODUCTION,
        "",
    ]
    for task, by_method in found.items():
        cells = []
        for method, (accuracies, d) in by_method.items():
            more = "", ""
            if method != "plain" and len(d) > 1:
                more = page.interval_cells(*mean_interval(d), sign=True)
            mean = f"{accuracies.mean():.2f}"
            cells.append([method, len(accuracies), mean, *more])
        columns = ["method", "seeds", "test, %", "difference to plain", "95 %"]
        table = page.table(columns, cells)
        lines += [f"## {TITLES[task]}", "", *table, "", PUBLISHED[task], ""]
    lines += [f"![Differences to plain training]({FIGURE.name})"]
    page.write(path.with_suffix(".md"), lines)
    figure(found, path.with_suffix(".png"))


def figure(found, path):
    """Differences to plain training, a panel for each task."""
    from matplotlib.figure import Figure

    from blogkeras.report import save_figure

    drawing = Figure(figsize=(9.6, 3.6), dpi=110, layout="constrained")
    for axes, (task, by_method) in zip(
        drawing.subplots(1, len(found), squeeze=False)[0],
        found.items(),
        strict=True,
    ):
        rows = {m: d for m, (_, d) in by_method.items() if m != "plain"}
        for place, (_, d) in enumerate(rows.items()):
            axes.plot(d, [place] * len(d), "o", color="0.7", markersize=4)
            if len(d) > 1:
                mean, low, _ = mean_interval(d)
                axes.errorbar(mean, place, xerr=mean - low, fmt="s", color="C0")
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_title(TITLES[task], fontsize=11)
        axes.set_xlabel("points of accuracy over plain")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    save_figure(drawing, path)


def main():
    parser = command_line.recording(__doc__, ROWS, seeds=5)
    add = parser.add_argument
    add("--data", help="folder of the task's files")
    add("--task", choices=list(EPOCHS), default="sentiment")
    add("--texts", type=int, help="so many of each part, for a trial")
    options = parser.parse_args()
    record = Recording(options.rows, COLUMNS, key=COLUMNS[:3])
    if options.report:
        return report(record.rows(), options.rows)
    import blogkeras.bert4keras  # noqa: F401

    pairs = [part[: options.texts] for part in read(options.task, options.data)]
    letters = sorted({c for text, _ in pairs[0] for c in text.lower()})
    vocabulary = {c: i + 3 for i, c in enumerate(letters)}
    splits = [arrays(part, vocabulary) for part in pairs]
    print("rows:", [len(part[1]) for part in splits])
    chosen = methods(options.task)
    runs = [
        (options.task, name, seed)
        for seed in range(options.seeds)
        for name in options.only or chosen
    ]
    for task, name, seed in record.todo(runs, options):
        valid, test = run(task, chosen[name], seed, splits)
        record.append(task, name, seed, f"{valid:.4f}", f"{test:.4f}")


if __name__ == "__main__":
    main()
