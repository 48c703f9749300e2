"""HSIC on two columns of numbers: the post's experiment, and shapes.

First the experiment of the post: independent normals, and y = x + 0.1 ε. Then
eight shapes, two of them of independent columns, with the p-values of HSIC and
of Pearson's correlation. `--figure PATH` draws them.

Blog: HSIC简介：一个有意思的判断相关性的思路, https://kexue.fm/archives/6910
"""

import argparse

import numpy as np
from scipy import stats

from blogkeras import GaussianKernel, hsic, hsic_test, report
from blogkeras.extras import require


def make_shapes(size, rng):
    """Pairs of columns by name."""
    x, noise = rng.normal(size=(2, size))
    u, v = rng.uniform(-1, 1, (2, size))
    angle = np.pi * u
    corner = np.sign(rng.normal(size=(2, size)))
    cos, sin = np.cos(np.pi / 8), np.sin(np.pi / 8)
    return {
        "independent": (x, noise),
        "linear": (x, 0.4 * x + noise),
        "quadratic": (x, 0.5 * x**2 + noise),
        "sine": (u, np.sin(4 * u) + 0.6 * noise),
        "circle": (
            np.cos(angle) + 0.2 * x,
            np.sin(angle) + 0.2 * noise,
        ),
        "turned square": (cos * u - sin * v, sin * u + cos * v),
        "spread": (u, noise * (0.2 + np.abs(u))),
        "four clouds (independent)": (
            corner[0] + 0.3 * x,
            corner[1] + 0.3 * noise,
        ),
    }


def draw(shapes, found, path):
    figure = require("matplotlib.figure").Figure(
        figsize=(9.6, 5.4), dpi=110, layout="constrained"
    )
    for axes, (name, (x, y)) in zip(
        figure.subplots(2, 4).flat, shapes.items(), strict=True
    ):
        axes.scatter(x, y, s=5, linewidths=0)
        p_hsic, p_pearson = found[name]
        axes.set_title(
            f"{name}\nHSIC: p = {p_hsic:.2g}\nPearson: p = {p_pearson:.2g}",
            fontsize=9,
        )
        axes.set_xticks([])
        axes.set_yticks([])
    return report.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", help="where to draw the shapes")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 1000))
    kernel = GaussianKernel(1.0, form="blog")
    for name, y in (("independent", noise), ("y = x + 0.1 ε", x + 0.1 * noise)):
        value = hsic(x, y, kernel, kernel, estimator="blog")
        print(f"{name}: HSIC {float(value):.4f}")
    shapes = make_shapes(200, rng)
    found = {
        name: (hsic_test(x, y).p_value, stats.pearsonr(x, y).pvalue)
        for name, (x, y) in shapes.items()
    }
    report.print_table(
        ["shape", "p of HSIC", "p of Pearson"],
        [[name, *values] for name, values in found.items()],
    )
    if args.figure:
        print("Figure:", draw(shapes, found, args.figure))


if __name__ == "__main__":
    main()
