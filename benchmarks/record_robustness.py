"""Records README's figure, accuracy under attack (post 7234), seed by seed.

    python benchmarks/record_robustness.py [--seeds 5] [--minutes 60]

Runs `examples/task_sentiment_adversarial_training.py` as it is, for each seed
both trainings, and appends their accuracies to `docs/results/robustness.csv`;
seeds that stand there are not run again. `--report` writes
`docs/results/robustness.md` and the figure: means, and the difference of the
same seed, with 95 % intervals of Student's t. About 6 minutes a seed on one
core.
"""

import argparse
import pathlib
import sys
import time

from harness import page
from harness.recording import Recording
from harness.statistics import mean_interval

ROOT = pathlib.Path(__file__).parent.parent
RECORD = Recording(
    ROOT / "docs/results/robustness.csv",
    ["seed", "method", "attack", "accuracy"],
    key=["seed"],
)
PAGE = ROOT / "docs/results/robustness.md"
FIGURE = ROOT / "docs/sentiment_adversarial_training.png"
METHODS = ("plain", "FGM")


def record(seeds, minutes):
    sys.path.insert(0, str(ROOT / "examples"))
    import task_sentiment_adversarial_training as demo

    start = time.monotonic()
    for (seed,) in RECORD.missing((seed,) for seed in range(seeds)):
        if time.monotonic() - start > 60 * minutes:
            break
        results, _ = demo.compare(demo.arguments(["--seed", str(seed)]))
        rows = [
            (seed, method, attack, f"{accuracy:.4f}")
            for method, result in zip(METHODS, results.values(), strict=True)
            for attack, accuracy in zip(
                demo.ATTACKS, result.column("accuracy"), strict=True
            )
        ]
        for row in rows:
            RECORD.append(*row)


def scores():
    """`{attack: {method: accuracies by seed}}`, in %."""
    found = {}
    for row in sorted(RECORD.rows(), key=lambda row: int(row["seed"])):
        methods = found.setdefault(float(row["attack"]), {})
        methods.setdefault(row["method"], []).append(
            100 * float(row["accuracy"])
        )
    return found


def report():
    """Writes the page and the figure."""
    found = scores()
    count = len(found[0.0]["plain"])
    rows = []
    for attack, methods in found.items():
        difference = [b - a for a, b in zip(*methods.values(), strict=True)]
        rows.append(
            [
                f"{attack:g}" if attack else "clean",
                *(page.interval(*mean_interval(methods[m])) for m in METHODS),
                page.interval(*mean_interval(difference), sign=True),
            ]
        )
    columns = ["attack / token norm", "plain, %", "FGM, %", "difference"]
    lines = [
        "# Accuracy under attack (post 7234)",
        "",
        "The reviews of `examples/task_sentiment_adversarial_training.py`, its "
        "defaults: a transformer of 2 layers × 128 from scratch, 2016 reviews "
        "to test, FGM of strength 0.3. Every review is attacked by its own "
        f"gradient. {count} seeds; means and 95 % intervals of Student's t, "
        "the difference by pairs of the same seed.",
        "",
        *page.table(columns, rows),
        "",
        page.environment(["keras", "tensorflow", "numpy"]),
        "",
        "Regenerate: `python benchmarks/record_robustness.py --seeds "
        f"{count}`, then with `--report`.",
    ]
    page.write(PAGE, lines)
    draw(found)


def draw(found):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    attacks = list(found)
    for method, marker in zip(METHODS, "os", strict=True):
        middle, low, high = zip(
            *(mean_interval(found[a][method]) for a in attacks), strict=True
        )
        axes.plot(attacks, middle, marker=marker, linewidth=2, label=method)
        axes.fill_between(attacks, low, high, alpha=0.25)
    axes.set_xlabel("norm of the attack / mean norm of a token vector")
    axes.set_ylabel("accuracy, %; bands: 95 % over seeds")
    axes.set_title("Chinese reviews, attacked at the embedding")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(FIGURE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        return report()
    record(options.seeds, options.minutes)


if __name__ == "__main__":
    main()
