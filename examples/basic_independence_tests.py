"""Three questions about dependence, on made-up data whose answers are known.

1. Are three variables independent of each other? Any two of them are; all three
   are not (dHSIC).
2. Does one variable act on another only through a third, a chain? The pressure
   of the air decides on the weather, which is a string, and the weather on how
   much ice cream is sold (KCI).
3. Which features does a target depend on? HSIC Lasso leaves out features that
   say the same again; mutual information looks at each feature alone. Both
   select in a pipeline of scikit-learn, before the same regression.

`--figure PATH` draws the data of the first two, and what the selectors say.

Blog: HSIC简介：一个有意思的判断相关性的思路, https://kexue.fm/archives/6910
"""

import argparse
import functools
import itertools

import numpy as np

from blogkeras import HSICLasso, dhsic_test, hsic_test, kci_test, report
from blogkeras.extras import require

WEATHER = np.array(["rain", "clouds", "sun"])
WANTED = ("a", "b", "c")
FEATURES = [*WANTED, "b, noisy", "b, noisier", *(f"e{i}" for i in range(1, 16))]


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
    """y = 1.5 sin(2a) + b² + c + ε; two more features are b with noise."""
    x = rng.normal(size=(size, len(FEATURES)))
    x[:, 3:5] = x[:, [1]] + [0.4, 0.5] * x[:, 3:5]
    y = 1.5 * np.sin(2 * x[:, 0]) + x[:, 1] ** 2 + x[:, 2]
    return x, y + 0.3 * rng.normal(size=size)


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


def select(x, y):
    """Fitted selectors, and what a regression on their features is worth."""
    selection = require("sklearn.feature_selection")
    information = functools.partial(
        selection.mutual_info_regression, random_state=0
    )
    count = len(WANTED)
    train, test = np.split(np.arange(len(x)), 2)
    selectors, rows = {}, []
    for name, selector in (
        ("HSIC Lasso", HSICLasso(count)),
        ("mutual information", selection.SelectKBest(information, k=count)),
        ("all features", "passthrough"),
    ):
        pipeline = require("sklearn.pipeline").make_pipeline(
            selector, require("sklearn.svm").SVR()
        )
        pipeline.fit(x[train], y[train])
        names = ["all"]
        if selector != "passthrough":
            names = selector.get_feature_names_out(FEATURES)
            selectors[name] = selector
        rows.append([name, "; ".join(names), pipeline.score(x[test], y[test])])
    return selectors, rows


def draw(triple, chain, selectors, path):
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
    scores = {
        "HSIC Lasso": selectors["HSIC Lasso"].coef_,
        "mutual information": selectors["mutual information"].scores_,
    }
    places = np.arange(len(FEATURES))
    for shift, (name, values) in zip((-0.2, 0.2), scores.items(), strict=True):
        right.bar(places + shift, values / values.max(), 0.4, label=name)
    right.set_xticks(places, FEATURES, rotation=90)
    right.set(
        ylabel="share of the largest", title="y = 1.5 sin(2a) + b² + c + ε"
    )
    for axes in (left, middle, right):
        axes.legend(fontsize=9)
    return report.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", help="where to draw them")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    triple = make_triple(200, rng)
    chain = make_chain(400, rng)
    x, y = make_features(400, rng)
    columns = ["independent?", "p"]
    report.print_table(columns, triple_rows(triple))
    report.print_table(columns, chain_rows(*chain))
    selectors, rows = select(x, y)
    report.print_table(["selected by", "features", "R², held out"], rows)
    if args.figure:
        print("Figure:", draw(triple, chain, selectors, args.figure))


if __name__ == "__main__":
    main()
