"""Three questions about dependence, on made-up data whose answers are known.

1. Are three variables independent of each other? Any two of them are; all three
   are not (dHSIC).
2. Does one variable act on another only through a third, a chain? The pressure
   of the air decides on the weather, which is a string, and the weather on how
   much ice cream is sold (KCI).
3. On which four of a hundred features does a target depend? HSIC Lasso looks at
   all of them together, mutual information at each alone. Both select in a
   pipeline of scikit-learn, before the same regression.

`--figure PATH` draws the data of the first two and the features selected.

Blog: HSIC简介：一个有意思的判断相关性的思路, https://kexue.fm/archives/6910
"""

import argparse
import functools
import itertools

import numpy as np

from blogkeras import HSICLasso, dhsic_test, hsic_test, kci_test, report
from blogkeras.extras import require

WEATHER = np.array(["rain", "clouds", "sun"])
WANTED, FEATURES = 4, 100


def make_triple(size, rng):
    """The sign of z is that of x y; x alone, or y alone, says nothing of it."""
    x, y, z = rng.normal(size=(3, size))
    return {"x": x, "y": y, "z": np.sign(x * y) * np.abs(z)}


def make_chain(size, rng):
    """pressure → weather → sales."""
    pressure = rng.normal(size=size)
    code = np.digitize(pressure + 0.7 * rng.normal(size=size), [-0.6, 0.6])
    return pressure, WEATHER[code], 1.5 * code + rng.normal(size=size)


def make_features(size, rng):
    """y = −2 sin(2a) + b² + c + e^(−d) + ε, with a to d the first features."""
    x = rng.normal(size=(size, FEATURES))
    a, b, c, d = x[:, :WANTED].T
    noise = rng.normal(size=size)
    return x, -2 * np.sin(2 * a) + b**2 + c + np.exp(-d) + noise


def triple_rows(triple):
    rows = [
        [f"{a}, {b}", hsic_test(triple[a], triple[b]).p_value]
        for a, b in itertools.combinations(triple, 2)
    ]
    together = dhsic_test([*triple.values()], num_permutations=999, seed=0)
    return [*rows, ["x, y, z together", together.p_value]]


def chain_rows(pressure, weather, sales):
    return [
        ["pressure, sales", hsic_test(pressure, sales).p_value],
        [
            "pressure, sales given weather",
            kci_test(pressure, sales, weather).p_value,
        ],
        [
            "weather, sales given pressure",
            kci_test(weather, sales, pressure).p_value,
        ],
    ]


def select(draws, rng):
    """How often features are selected, and what a regression on them is worth.

    Returns:
        Dicts by selector: counts of the features, and means of R².
    """
    selection = require("sklearn.feature_selection")
    make_pipeline = require("sklearn.pipeline").make_pipeline
    regression = require("sklearn.svm").SVR()
    information = functools.partial(
        selection.mutual_info_regression, random_state=0
    )
    selectors = {
        "HSIC Lasso": HSICLasso(WANTED),
        "mutual information": selection.SelectKBest(information, k=WANTED),
        "all features": selection.SelectKBest(information, k="all"),
    }
    counts = {name: np.zeros(FEATURES, int) for name in selectors}
    fits = dict.fromkeys(selectors, 0.0)
    for _ in range(draws):
        x, y = make_features(200, rng)
        for name, selector in selectors.items():
            pipeline = make_pipeline(selector, regression)
            pipeline.fit(x[:100], y[:100])
            counts[name] += pipeline[0].get_support()
            fits[name] += pipeline.score(x[100:], y[100:]) / draws
    return counts, fits


def draw(triple, chain, counts, path):
    figure = require("matplotlib.figure").Figure(
        figsize=(11, 3.8), dpi=80, layout="constrained"
    )
    left, middle, right = figure.subplots(1, 3)
    for label, those in (
        ("z > 0", triple["z"] > 0),
        ("z < 0", triple["z"] < 0),
    ):
        left.scatter(triple["x"][those], triple["y"][those], s=7, label=label)
    left.set(xlabel="x", ylabel="y", title="dependent only together")
    pressure, weather, sales = chain
    for name in WEATHER:
        those = weather == name
        middle.scatter(pressure[those], sales[those], s=7, label=name)
    middle.set(
        xlabel="pressure", ylabel="sales", title="dependent by the weather"
    )
    for shift, name in ((-0.2, "HSIC Lasso"), (0.2, "mutual information")):
        right.bar(np.arange(12) + shift, counts[name][:12], 0.4, label=name)
    right.set_xticks(range(WANTED), ["a", "b", "c", "d"])
    right.set(
        xlabel="the first 12 of 100 features",
        ylabel="times selected",
        title="y = −2 sin(2a) + b² + c + exp(−d) + ε",
    )
    for axes in (left, middle, right):
        axes.legend(fontsize=9)
    return report.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=20, help="for selection")
    parser.add_argument("--figure", help="where to draw them")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    triple = make_triple(200, rng)
    chain = make_chain(400, rng)
    columns = ["independent?", "p"]
    report.print_table(columns, triple_rows(triple))
    report.print_table(columns, chain_rows(*chain))
    counts, fits = select(args.draws, rng)
    report.print_table(
        ["features by", "of a, b, c, d", "of the others", "R², held out"],
        [
            [
                name,
                float(counts[name][:WANTED].sum() / args.draws),
                float(counts[name][WANTED:].sum() / args.draws),
                fits[name],
            ]
            for name in counts
        ],
    )
    if args.figure:
        print("Figure:", draw(triple, chain, counts, args.figure))


if __name__ == "__main__":
    main()
