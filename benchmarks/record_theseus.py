"""Records what module replacement is worth with pre-trained weights.

    python benchmarks/record_theseus.py --data DIR --weights DIR [--seeds 5]

all-MiniLM-L6-v2 (6 layers × 384, Hugging Face layout: `config.json`,
`model.safetensors`, `vocab.txt`), fine-tuned on SST-2 and compressed to 3 and 2
layers. Appends a row for each run to `docs/results/theseus.csv`; runs that
stand there are not done again, so an interrupted recording goes on where it
stopped. The routes of one seed share training texts, initial classifier and
batches; all small models have the same number of epochs:

    full            all 6 layers, the predecessor
    direct-k        the first k pre-trained layers, fine-tuned
    kept-k          the first k layers of the predecessor, fine-tuned further
    distilled-k     the same, learning the predecessor's predictions, too
    theseus-k       the same start; replacement (rate ½), then the successor
                    alone
    mixing-3        real-valued ε, uniform in [0, 1]   (the post's question)
    annealing-3     ε from 1 to 0, no randomness       (the post's question)
    theseus-6       a successor of the same size       (no gain, says the post)

DIR of the data holds `train.tsv.gz`, `dev.tsv.gz` and `test.tsv.gz`, lines
text<TAB>0/1, not part of this repository. No run looks at dev or test while it
trains. `--report` writes `docs/results/theseus.md`: means, paired differences
and the share of the gap between direct-k and full that a route closes, with
95 % bootstrap intervals. Seconds are those of the processor, compilation
included.
"""

import argparse
import csv
import gzip
import json
import pathlib
import time

ROOT = pathlib.Path(__file__).parent.parent
ROWS = ROOT / "docs/results/theseus.csv"
PAGE = ROWS.with_suffix(".md")
COLUMNS = ["texts", "route", "seed", "dev", "test", "seconds"]
# In this order: all seeds of one group, then the next group.
GROUPS = [
    ["full", "direct-3", "kept-3", "theseus-3", "distilled-3"],
    ["direct-2", "kept-2", "theseus-2", "distilled-2"],
    ["mixing-3", "annealing-3", "theseus-6"],
]
ROUTES = [route for group in GROUPS for route in group]
LENGTH, BATCH, RATE = 32, 32, 1e-4
# Six epochs of replacing and two of the successor are the eight of the others.
EPOCHS = {"full": 3, "small": 8, "replacing": 6}


def read(folder):
    parts = {}
    for part in ("train", "dev", "test"):
        path = pathlib.Path(folder) / f"{part}.tsv.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        parts[part] = [line.rsplit("\t", 1) for line in lines]
    return parts


class Source:
    """Texts as numbers, and the pre-trained transformer."""

    def __init__(self, data, weights):
        import numpy as np
        from bert4keras.tokenizers import Tokenizer, load_vocab

        from blogkeras.bert4keras import read_safetensors

        folder = pathlib.Path(weights)
        self.checkpoint = read_safetensors(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        tokenizer = Tokenizer(
            load_vocab(str(folder / "vocab.txt")), do_lower_case=True
        )
        ids = {
            part: [tokenizer.encode(t, maxlen=LENGTH)[0] for t, _ in pairs]
            for part, pairs in read(data).items()
        }
        # Rows of the embedding that no text uses cost time and change nothing.
        used = sorted({i for rows in ids.values() for row in rows for i in row})
        used = [0, *(i for i in used if i)]
        number = {old: new for new, old in enumerate(used)}
        self.arrays = {}
        for part, pairs in read(data).items():
            x = np.zeros((len(pairs), LENGTH), "int32")
            for row, text in zip(x, ids[part], strict=True):
                row[: len(text)] = [number[i] for i in text]
            y = np.array([int(label) for _, label in pairs])
            self.arrays[part] = x, y
        self.options = {
            "vocab_size": config["vocab_size"],
            "keep_tokens": used,
            "hidden_size": config["hidden_size"],
            "num_attention_heads": config["num_attention_heads"],
            "intermediate_size": config["intermediate_size"],
            "hidden_act": "gelu",
            "max_position": config["max_position_embeddings"],
            "segment_vocab_size": config["type_vocab_size"],
            "dropout_rate": 0.1,
        }

    def transformer(self, layers, prefix):
        from bert4keras.models import build_transformer_model

        bert = build_transformer_model(
            num_hidden_layers=layers,
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

    def __init__(self, source, texts, seed, cache):
        import numpy as np

        self.source, self.seed = source, seed
        self.cache = pathlib.Path(cache) / f"full-{texts}-{seed}.npz"
        x, y = source.arrays["train"]
        rows = np.random.default_rng(seed).permutation(len(x))[:texts]
        self.x, self.y = x[rows], y[rows]

    def fit(self, model, epochs):
        import keras
        import numpy as np

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
        )

    def run(self, route):
        """One training: (dev, test, seconds)."""
        import keras

        from blogkeras import LinearReplacement, bert_of_theseus, keep_blocks

        kind, _, layers = route.partition("-")
        keras.utils.set_random_seed(self.seed)
        full = self.source.transformer(6, "Predecessor-")
        head = classifier()
        start = time.process_time()
        if kind == "full":
            model = self.whole(full, head)
            self.fit(model, EPOCHS["full"])
            self.save(model)
        elif kind == "direct":
            small = keep_blocks(full, int(layers))
            model = bert_of_theseus(full, small, head, method="direct")
            self.fit(model, EPOCHS["small"])
        else:
            self.load(self.whole(full, head))
            small = keep_blocks(full, int(layers))
            options = {"seed": self.seed}
            if kind == "distilled":
                options = {"method": "distillation"}
            elif kind == "kept":
                options = {"method": "direct"}
            elif kind != "theseus":
                options["mode"] = kind
            if kind == "annealing":
                steps = EPOCHS["replacing"] * (len(self.x) // BATCH)
                options["replacement_rate"] = LinearReplacement(1 / steps)
            model = bert_of_theseus(full, small, head, **options)
            if kind in ("distilled", "kept"):
                self.fit(model, EPOCHS["small"])
            else:
                self.fit(model, EPOCHS["replacing"])
                model = model.detach()
                self.fit(model, EPOCHS["small"] - EPOCHS["replacing"])
        seconds = time.process_time() - start
        return *(self.accuracy(model, p) for p in ("dev", "test")), seconds

    def whole(self, bert, head):
        import keras

        mean, dense = head
        return keras.Model(bert.model.inputs, dense(mean(bert.output)))

    def accuracy(self, model, part):
        import numpy as np

        x, y = self.source.arrays[part]
        found = model.predict([x, np.zeros_like(x)], batch_size=256, verbose=0)
        return float(np.mean(found.argmax(1) == y))

    def save(self, model):
        import numpy as np

        self.cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(self.cache, *model.get_weights())

    def load(self, model):
        import numpy as np

        if not self.cache.exists():
            raise SystemExit(
                f"{self.cache} is missing: remove the rows of the route 'full' "
                "from the table, so that the predecessors are trained again."
            )
        model.set_weights([*np.load(self.cache).values()])


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


def report():
    """Writes the page: means, differences to direct-k, share of the gap."""
    import numpy as np

    rng = np.random.default_rng(0)
    scores, seconds = {}, {}
    for row in recorded():
        key = row["texts"], row["route"]
        # Dev and test together: 2693 texts that no training has seen.
        both = (872 * float(row["dev"]) + 1821 * float(row["test"])) / 2693
        scores.setdefault(key, {})[row["seed"]] = 100 * both
        seconds.setdefault(key, {})[row["seed"]] = float(row["seconds"])
    lines = [
        "# BERT-of-Theseus with pre-trained weights",
        "",
        "all-MiniLM-L6-v2 (6 layers) on SST-2, accuracy on the 2693 sentences "
        "of dev and test, in points. Routes are described in "
        "`benchmarks/record_theseus.py`, which writes this page with "
        "`--report`: `direct` starts from the pre-trained model's first k "
        "layers, all other small models from those of the predecessor "
        "(`full`). Differences to `direct` with the same k and seed. Seconds "
        "of the processor, compilation and the predecessor's training "
        "included.",
        "",
        "| texts | route | seeds | accuracy | to direct | 95 % | gap closed | "
        "95 % | training, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (texts, route), found in scores.items():
        kind, _, layers = route.partition("-")
        cells = [texts, route, len(found)]
        cells.append(f"{np.mean(list(found.values())):.2f}")
        own = seconds[texts, route]
        base = scores.get((texts, f"direct-{layers}"), {})
        full = scores.get((texts, "full"), {})
        seeds = sorted(set(found) & set(base) & set(full))
        if kind not in ("full", "direct") and len(seeds) > 1:
            d = np.array([found[s] - base[s] for s in seeds])
            gap = np.array([full[s] - base[s] for s in seeds])
            picks = rng.integers(0, len(d), (5000, len(d)))
            low, high = np.quantile(d[picks].mean(1), [0.025, 0.975])
            cells += [f"{d.mean():+.2f}", f"{low:+.2f} to {high:+.2f}"]
            shares = d[picks].mean(1) / gap[picks].mean(1)
            low, high = np.quantile(shares, [0.025, 0.975])
            share = d.mean() / gap.mean()
            cells += [f"{share:.0%}", f"{low:.0%} to {high:.0%}"]
        else:
            cells += [""] * 4
        if kind not in ("full", "direct"):  # the predecessor's training counts
            before = seconds.get((texts, "full"), {})
            own = {s: t + before.get(s, np.nan) for s, t in own.items()}
        cells.append(f"{np.mean(list(own.values())):.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of train, dev and test")
    parser.add_argument("--weights", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, default=1024, help="to train on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=ROUTES, metavar="ROUTE")
    parser.add_argument(
        "--cache", default="results/theseus", help="for trained predecessors"
    )
    parser.add_argument(
        "--runs", type=int, default=10**9, help="stop after so many"
    )
    parser.add_argument("--report", action="store_true", help="write the page")
    args = parser.parse_args()
    if args.report:
        return report()
    import keras

    import blogkeras.bert4keras  # noqa: F401

    done = {(r["texts"], r["route"], r["seed"]) for r in recorded()}
    todo = [
        (route, seed)
        for group in GROUPS
        for seed in range(args.seeds)
        for route in group
        if route in args.only
        and (str(args.texts), route, str(seed)) not in done
    ][: args.runs]
    if not todo:
        return print("Nothing is left to do.")
    source = Source(args.data, args.weights)
    progress = keras.utils.Progbar(len(todo), unit_name="run")
    progress.update(0)
    for route, seed in todo:
        keras.backend.clear_session()
        runs = Runs(source, args.texts, seed, args.cache)
        dev, test, seconds = runs.run(route)
        append(
            [
                args.texts,
                route,
                seed,
                f"{dev:.4f}",
                f"{test:.4f}",
                f"{seconds:.0f}",
            ]
        )
        progress.add(1)


if __name__ == "__main__":
    main()
