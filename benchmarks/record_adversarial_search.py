"""Records what each method is worth at a strength that validation has chosen.

    python benchmarks/record_adversarial_search.py --data DIR [--task NAME]

The tasks, the model and the data are those of `record_adversarial.py`. Every
method has the same search: `TRIES` strengths, each a factor of about three from
the next, with `--search-seeds` seeds of its own; the strength of the best mean
accuracy on the validation set is taken. Then `--seeds` other seeds are trained
with it, and plainly. Each run appends a row to
`docs/results/adversarial_search.csv`; runs that stand there are not done again.
Where the best strength stands at an end, `--strengths` tries others beyond it.
The minutes that are left are printed after each run. `--report` writes
`docs/results/adversarial_search.md`.

Plain training has no strength, and so no search.
"""

import time

import numpy as np
import record_adversarial as base
from harness import command_line, page
from harness.recording import Recording, group
from harness.statistics import mean_interval

ROWS = page.ROOT / "docs/results/adversarial_search.csv"
COLUMNS = [
    *("task", "phase", "method", "strength", "seed"),
    *("valid", "test", "minutes"),
]
TASKS = ("iflytek", "sentiment")
TRIES = 5
FIRST_SEARCH_SEED = 1000  # searches and results share no seed
# The middle of the first strengths of each method.
MIDDLES = {
    "FGM": 0.3,
    "PGD": 0.3,
    "FreeLB": 0.1,
    "GP squared": 1.0,
    "VAT": 1.0,
    "TRADES": 0.1,
    "SMART": 0.1,
    "R-Drop": 1.0,
    "AWP": 0.005,
    "AWP + FGM": 0.005,
}
INTRODUCTION = """\
Each run trains a transformer of 2 layers × 64 on characters from scratch, as in
[adversarial.md](adversarial.md): the same seeds, data, batches, steps and
learning rates for all methods; the epoch is chosen on the validation set. The
strength of each method was chosen by the same search: {tries} strengths, each
3.2 times the one before, and more where the best one stood at an end, by the
mean accuracy on the validation set; {seeds} of a strength, with other seeds
than the results. Each difference is to plain training of the same seed, with
the 95 % interval of Student's t. A strength at an end of all that were tried
has a star: a better one may lie beyond.

Strengths are FGM's, PGD's (3 steps) and FreeLB's (3 steps) ε, the weight of the
squared penalty, VAT's ε, the radius of TRADES (weight 1, one step) and SMART
(one step) per token, R-Drop's α, and AWP's ε, once with FGM 0.3.

Written by `python benchmarks/record_adversarial_search.py --report` from
[adversarial_search.csv](adversarial_search.csv)."""


def strengths(name):
    """The strengths that a method is tried with, from small to large."""
    steps = np.arange(TRIES) - TRIES // 2
    return [float(f"{MIDDLES[name] * 10 ** (k / 2):.2g}") for k in steps]


def make(name, strength):
    """A method of a strength; `None` is plain training."""
    import blogkeras as b

    if name == "plain":
        return None
    return {
        "FGM": lambda: b.FGM(strength),
        "PGD": lambda: b.PGD(strength, steps=3),
        "FreeLB": lambda: b.FreeLB(strength, steps=3),
        "GP squared": lambda: b.GradientPenalty(strength),
        "VAT": lambda: b.VirtualAdversarialTraining(strength),
        "TRADES": lambda: b.TRADES(
            strength, weight=1.0, steps=1, norm_scope="token"
        ),
        "SMART": lambda: b.SMART(strength, norm_scope="token"),
        "R-Drop": lambda: b.RDrop(strength),
        "AWP": lambda: b.AdversarialWeightPerturbation(strength),
        "AWP + FGM": lambda: b.AdversarialWeightPerturbation(
            strength, attack=b.FGM(0.3)
        ),
    }[name]()


def searched(task, names, seeds, given=None):
    """The runs of the search, `(task, phase, method, strength, seed)`."""
    return [
        (task, "search", name, strength, FIRST_SEARCH_SEED + seed)
        for seed in range(seeds)
        for name in names
        if name != "plain"
        for strength in given or strengths(name)
    ]


def tried(rows, task, name):
    """`{strength: accuracies on validation}` of the search."""
    tries = group(
        [
            row
            for row in rows
            if (row["task"], row["phase"], row["method"])
            == (task, "search", name)
        ],
        "strength",
    )
    return {
        float(strength): [float(row["valid"]) for row in of_strength]
        for strength, of_strength in tries.items()
    }


def chosen(rows, task, name):
    """The strength of the best mean on validation; of equal ones the least."""
    if name == "plain":
        return 0.0
    tries = tried(rows, task, name)
    return max(sorted(tries), key=lambda strength: np.mean(tries[strength]))


def report(rows, path):
    """Writes the page."""
    seeds = {row["seed"] for row in rows if row["phase"] == "search"}
    seeds = "one run" if len(seeds) == 1 else f"{len(seeds)} runs"
    lines = [
        "# What each method is worth, with searched strengths",
        "",
        INTRODUCTION.format(tries=TRIES, seeds=seeds),
        "",
    ]
    for task, of_task in group(rows, "task").items():
        results = group(
            [row for row in of_task if row["phase"] == "result"], "method"
        )
        by_seed = {
            name: {row["seed"]: 100 * float(row["test"]) for row in of_method}
            for name, of_method in results.items()
        }
        cells = []
        for name, accuracies in by_seed.items():
            plain = by_seed.get("plain", {})
            d = [accuracies[s] - plain[s] for s in accuracies if s in plain]
            more, strength = ("", ""), ""
            if name != "plain":
                strength = chosen(rows, task, name)
                tries = tried(rows, task, name)
                ends = min(tries), max(tries)
                strength = f"{strength:g}{'*' * (strength in ends)}"
                if len(d) > 1:
                    more = page.interval_cells(*mean_interval(d), sign=True)
            cells.append(
                [
                    name,
                    strength,
                    len(accuracies),
                    f"{np.mean([*accuracies.values()]):.2f}",
                    *more,
                ]
            )
        columns = [
            *("method", "strength", "seeds", "test, %"),
            *("difference to plain", "95 %"),
        ]
        lines += [
            f"## {base.TITLES[task]}",
            "",
            *page.table(columns, cells),
            "",
        ]
    page.write(path.with_suffix(".md"), lines)


def main():
    parser = command_line.recording(
        __doc__, ROWS, only=["plain", *MIDDLES], seeds=5
    )
    add = parser.add_argument
    add("--data", help="folder of the task's files")
    add("--task", choices=TASKS, default=TASKS[0])
    add("--search-seeds", type=int, default=2)
    add("--strengths", type=float, nargs="*", help="of the search, instead")
    add("--texts", type=int, help="so many of each part, for a trial")
    options = parser.parse_args()
    record = Recording(options.rows, COLUMNS, key=COLUMNS[:5])
    if options.report:
        return report(record.rows(), options.rows)
    import blogkeras.bert4keras  # noqa: F401

    pairs = [
        part[: options.texts] for part in base.read(options.task, options.data)
    ]
    letters = sorted({c for text, _ in pairs[0] for c in text.lower()})
    vocabulary = {c: i + 3 for i, c in enumerate(letters)}
    splits = [base.arrays(part, vocabulary) for part in pairs]
    names = options.only or ["plain", *MIDDLES]
    search = searched(
        options.task, names, options.search_seeds, options.strengths
    )
    left = len(record.missing(search)) + options.seeds * len(names)
    print(
        f"rows: {[len(part[1]) for part in splits]}; runs: {len(search)} of "
        f"the search, then {options.seeds} seeds of each of {len(names)}"
    )
    durations = []

    def train(run):
        nonlocal left
        task, phase, name, strength, seed = run
        start = time.monotonic()
        place = None if name in ("R-Drop", "AWP") else "Embedding-Token"
        valid, test = base.run(task, make(name, strength), seed, splits, place)
        durations.append((time.monotonic() - start) / 60)
        left -= 1
        record.append(
            *(task, phase, name, strength, seed),
            *(f"{valid:.4f}", f"{test:.4f}", f"{durations[-1]:.2f}"),
        )
        print(
            f"{durations[-1]:.1f} minutes; at most "
            f"{left * np.mean(durations):.0f} are left",
            flush=True,
        )

    for run in record.todo(search, options):
        train(run)
    if record.missing(search):
        return None
    rows = record.rows()
    results = [
        (options.task, "result", name, chosen(rows, options.task, name), seed)
        for seed in range(options.seeds)
        for name in names
    ]
    left = len(record.missing(results))
    for run in record.todo(results, options):
        train(run)
    return None


if __name__ == "__main__":
    main()
