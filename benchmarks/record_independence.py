"""Level and power of the tests of independence, and of feature selection.

    python benchmarks/record_independence.py --peer PYTHON
    python benchmarks/record_independence.py --report

PYTHON is that of an environment with hyppo 0.5.2, causal-learn 0.1.4.8 and
pyHSICLasso 1.4.2 (`pip install` takes them together; without it their rows are
left out). Each row of `docs/results/independence.csv` is a method on a hundred
draws of a case: how many of them it rejects at 5 %, or the share of the right
features among as many as it selects, and the CPU seconds. All methods see the
same draws. Rows that stand there are not done again; `--only QUESTION ...`,
`--runs N` and `--minutes M` do a part. `--report` writes
`docs/results/independence.md`.

    pair         two variables, n = 100: independent, with 1 and with 10
                 features; y = 0.4 x² + ε; y = sin(4π x) + 0.8 ε; two uniforms
                 turned by π/8
    joint        three variables, n = 100: independent; one pair dependent; all
                 dependent, but no pair
    conditional  x and y given z, n = 200: functions of z with noise, with 1 and
                 with 3 features in z; the same and y + 0.3 x
    selection    100 features, n = 100: −2 sin(2 x₁) + x₂² + x₃ + e^(−x₄) + ε
                 (additive); x₁ e^(2 x₂) + x₃² + ε (product); three classes by
                 x₁ and |x₂|
"""

import json
import pathlib
import sys
import time

import numpy as np
from harness import command_line, page
from harness.contest import ONE_THREAD, ask
from harness.recording import Recording, group

ROWS = page.ROOT / "docs/results/independence.csv"
KEY = ["question", "case", "method", "part"]
COLUMNS = [*KEY, "draws", "value", "cpu_seconds"]
LEVEL, DRAWS, PERMUTATIONS = 0.05, 100, 199
CASES = {
    "pair": ["null 1", "null 10", "quadratic", "sine", "rotated"],
    "joint": ["null", "one pair", "no pair"],
    "conditional": ["null 1", "null 3", "dependent 1", "dependent 3"],
    "selection": ["additive", "product", "classes"],
}
# Names of peers begin with their library's.
METHODS = {
    "pair": [
        *("ours, gamma", "ours, permutations", "hyppo Hsic, χ²"),
        "causal-learn KCI, gamma",
    ],
    "joint": [
        *("ours, permutations", "ours, standard form, permutations"),
        "hyppo dHsic, permutations",
    ],
    "conditional": [
        *("ours, gamma", "ours, spectral", "causal-learn KCI, gamma"),
    ],
    "selection": [
        "ours",
        "ours, blocks of 20",
        "pyHSICLasso",
        "mutual information",
    ],
}
PARTS = {"pair": 3, "joint": 1, "conditional": 2, "selection": 1}


def draw(question, case, rng, n=None):
    """One sample of a case."""
    n = n or (200 if question == "conditional" else 100)
    if question == "selection":
        x, noise = rng.normal(size=(n, 100)), rng.normal(size=n)
        if case == "additive":
            y = -2 * np.sin(2 * x[:, 0]) + x[:, 1] ** 2 + x[:, 2]
            return x, y + np.exp(-x[:, 3]) + noise, 4
        if case == "product":
            return x, x[:, 0] * np.exp(2 * x[:, 1]) + x[:, 2] ** 2 + noise, 3
        return x, (x[:, 0] > 0).astype(int) + (np.abs(x[:, 1]) > 1), 2
    if question == "joint":
        x, y, z = rng.normal(size=(3, n, 1))
        if case == "one pair":
            y = y + 0.4 * x
        if case == "no pair":
            z = np.where(rng.random((n, 1)) < 0.7, np.sign(x * y) * abs(z), z)
        return x, y, z
    if question == "conditional":
        z = rng.normal(size=(n, int(case[-1])))
        x = np.sin(2 * z.mean(1, keepdims=True)) + 0.5 * rng.normal(size=(n, 1))
        y = z.mean(1, keepdims=True) ** 2 + 0.5 * rng.normal(size=(n, 1))
        return x, y + 0.3 * x if case.startswith("dependent") else y, z
    if case.startswith("null"):
        return rng.normal(size=(2, n, int(case[5:])))
    if case == "rotated":
        u, v = rng.uniform(-1, 1, (2, n, 1))
        c, s = np.cos(np.pi / 8), np.sin(np.pi / 8)
        return c * u - s * v, s * u + c * v
    x, noise = rng.normal(size=(2, n, 1))
    if case == "sine":
        x = rng.uniform(-1, 1, (n, 1))
        return x, np.sin(4 * np.pi * x) + 0.8 * noise
    return x, 0.4 * x**2 + noise


def result_of(question, method, permutations=PERMUTATIONS, bandwidth=None):
    """Function of a sample that returns the statistic and p.

    `bandwidth` is that of the standard form under `joint`; of `None` it is a
    median, for which hyppo has another rule.
    """
    if method.startswith("hyppo Hsic"):
        from hyppo.independence import Hsic

        return lambda x, y: Hsic().test(x, y)[:2]
    if method.startswith("hyppo dHsic"):
        from hyppo.d_variate import dHsic

        fixed = {"gamma": 1 / (2 * bandwidth**2)} if bandwidth else {}
        return lambda *v: dHsic(**fixed).test(*v, reps=permutations)[:2]
    if method.startswith("causal-learn"):
        from causallearn.utils.KCI.KCI import KCI_CInd, KCI_UInd

        kind = KCI_UInd if question == "pair" else KCI_CInd

        def run(*variables):
            copies = [a.copy() for a in variables]
            p_value, statistic = kind().compute_pvalue(*copies)
            return statistic / len(copies[0]), p_value

        return run
    import blogkeras as b

    permuted = {"num_permutations": permutations, "seed": 0}
    if question == "joint":
        kernel = None
        if "standard" in method:
            kernel = b.GaussianKernel(bandwidth, form="standard")
        return lambda *v: b.dhsic_test(v, [kernel] * 3, **permuted)[:2]
    if question == "conditional":
        null = method.removeprefix("ours, ")
        return lambda *v: b.kci_test(*v, null=null, seed=0)[:2]
    if method.endswith("gamma"):
        permuted = {}
    null = method.removeprefix("ours, ").rstrip("s")
    return lambda *v: b.hsic_test(*v, null=null, **permuted)[:2]


def selected(method, x, y, wanted):
    """Indices of the features that a method takes."""
    classes = y.dtype.kind == "i"
    if method == "pyHSICLasso":
        from pyHSICLasso import HSICLasso

        lasso = HSICLasso()
        lasso.input(x.copy(), (y + classes).astype(float))
        fit = lasso.classification if classes else lasso.regression
        fit(wanted, B=0, M=1, n_jobs=1)
        return lasso.get_index()
    if method == "mutual information":
        from sklearn import feature_selection as selection

        kind = "classif" if classes else "regression"
        information = getattr(selection, f"mutual_info_{kind}")
        return np.argsort(-information(x, y, random_state=0))[:wanted]
    import blogkeras as b

    size = 20 if "blocks" in method else None
    target = "classification" if classes else "regression"
    lasso = b.HSICLasso(wanted, target=target, block_size=size, seed=0)
    return lasso.fit(x, y).get_support(indices=True)


def work(question, case, method, part):
    """`[draws, rejected or found, CPU seconds]` of one row."""
    rng = np.random.default_rng(int(part))
    samples = [draw(question, case, rng) for _ in range(DRAWS)]
    test = None if question == "selection" else result_of(question, method)

    def run(sample):
        if test is not None:
            return float(test(*sample)[1] <= LEVEL)
        x, y, wanted = sample
        right = set(map(int, selected(method, x, y, wanted)))
        return len(right & set(range(wanted))) / wanted

    run(samples[0])  # compiles
    start = time.process_time()
    value = sum(map(run, samples))
    return [DRAWS, value, time.process_time() - start]


def cell(rows):
    """The share, with the interval of Wilson."""
    from scipy.stats import binomtest

    if not rows:
        return ""
    draws = sum(int(row["draws"]) for row in rows)
    value = sum(float(row["value"]) for row in rows)
    if rows[0]["question"] == "selection":
        return f"{value / draws:.3f}"
    test = binomtest(round(value), draws)
    low, high = test.proportion_ci(method="wilson")
    return f"{value / draws:.3f} ({low:.3f} to {high:.3f})"


def report(record, path):
    lines = [
        "# Level and power, and feature selection",
        "",
        "Shares of the draws that are called dependent at 5 %, with 95 % "
        "intervals (Wilson); under `selection`, of the right features among as "
        "many as are selected. 199 permutations. The last column is CPU time "
        "on one core, which others used too. The cases are in "
        f"`benchmarks/{pathlib.Path(__file__).name}`.",
    ]
    for question, rows in group(record.rows(), "question").items():
        found = []
        for method in METHODS[question]:
            cases = group([r for r in rows if r["method"] == method], "case")
            if not cases:
                continue
            own = [row for some in cases.values() for row in some]
            seconds = sum(float(row["cpu_seconds"]) for row in own)
            draws = sum(int(row["draws"]) for row in own)
            cells = [cell(cases.get(case)) for case in CASES[question]]
            found.append([method, *cells, f"{1000 * seconds / draws:.3g}"])
        columns = [question, *CASES[question], "ms each"]
        lines += ["", f"{DRAWS * PARTS[question]} draws of each case:", ""]
        lines += page.table(columns, found)
    lines += [
        "",
        page.environment(["keras", "tensorflow", "numpy", "scikit-learn"])
        + "; peers: hyppo 0.5.2, causal-learn 0.1.4.8, pyHSICLasso 1.4.2",
        "",
        f"Regenerate: `python benchmarks/{pathlib.Path(__file__).name}`.",
    ]
    page.write(path, lines)
    print("\n".join(lines))


def main():
    if sys.argv[1:2] == ["--work"]:
        return print(json.dumps(work(*sys.argv[2:])))
    parser = command_line.recording(__doc__, ROWS, METHODS, seeds=None)
    parser.add_argument("--peer", help="a Python with the other libraries")
    options = parser.parse_args()
    record = Recording(options.rows, COLUMNS, KEY)
    if options.report:
        return report(record, options.rows.with_suffix(".md"))
    runs = [
        (question, case, method, part)
        for question in options.only or METHODS
        for method in METHODS[question]
        for case in CASES[question]
        for part in range(PARTS[question])
        if options.peer or method.startswith(("ours", "mutual"))
    ]
    for run in record.todo(runs, options):
        if run[2].startswith(("ours", "mutual")):
            found = work(*run)
        else:
            found = ask(
                __file__,
                "--work",
                *map(str, run),
                environment=ONE_THREAD,
                python=options.peer,
            )
        draws, value, seconds = found
        record.append(*run, draws, f"{value:g}", f"{seconds:.2f}")


if __name__ == "__main__":
    main()
