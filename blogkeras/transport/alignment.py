"""A picture of a transport plan."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from blogkeras import report
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_finite,
    check_number,
)
from blogkeras.extras import require
from blogkeras.typing import Tensor


def plot_alignment(
    plan: Tensor,
    x_words: Sequence[str],
    y_words: Sequence[str],
    path: Any = None,
    minimum: float = 0.01,
) -> Any:
    """Draws which word goes where, as ribbons between two rows of words.

    The width of a word's bar is its mass, the width of a ribbon the mass that
    moves along it.

    Args:
        plan: `(n, m)`, nonnegative, as from `transport_plan`.
        x_words: Sequence of n strings, the upper row.
        y_words: Sequence of m strings, the lower row.
        path: Where to write the figure (`.png`, `.svg`, `.pdf`), if anywhere.
            Words in scripts that matplotlib's fonts lack need a font that has
            them, as `matplotlib.rcParams["font.family"]`.
        minimum: Float. Share of the mass below which a ribbon is left out.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if the words are not as many as the plan has rows and
            columns, or the plan has no mass, a negative or an infinite one.
        ImportError: without matplotlib.

    Example:

    >>> x, y = np.eye(3)[:2], np.eye(3)[1:]
    >>> figure = plot_alignment(
    ...     transport_plan(x, y), ["a", "cat"], ["cat", "sat"], "alignment.png"
    ... )

    Reference:
        [Yokoi et al., 2020](https://arxiv.org/abs/2004.15003), figure 4;
        [blog post](https://kexue.fm/archives/7388)
    """
    minimum = check_number("minimum", minimum, 0)
    plan = as_numpy(as_numbers(plan, "plan")).astype("float64")
    for name, words in (("x_words", x_words), ("y_words", y_words)):
        if not hasattr(words, "__len__"):
            raise ValueError(
                f"Expected `{name}` to be a list of words. Received: "
                f"{name}={words!r}"
            )
    check_finite("plan", plan)
    if plan.shape != (len(x_words), len(y_words)) or not plan.any():
        raise ValueError(
            "Expected a plan (n, m) with mass, for n and m words. Received: "
            f"plan.shape={plan.shape}, {len(x_words)} and {len(y_words)} words"
        )
    if plan.min() < 0:
        raise ValueError(
            "Expected nonnegative masses in `plan`. Received: "
            f"{plan.min():g} among them"
        )
    plan = plan / plan.max()  # its sum might overflow otherwise
    plan = plan / plan.sum()
    figure = require("matplotlib.figure").Figure(
        figsize=(max(4.0, 0.9 * max(plan.shape)), 3.2),
        dpi=150,
        layout="constrained",
    )
    axes = figure.add_subplot()
    gap = 0.6 / max(plan.shape)
    left_x, left_y = (_lefts(plan.sum(a), gap) for a in (1, 0))
    _row(axes, left_x, plan.sum(1), x_words, 1.0, "bottom")
    _row(axes, left_y, plan.sum(0), y_words, 0.0, "top")
    colors = [f"C{i % 10}" for i in range(len(x_words))]
    height = np.linspace(0, 1, 30)
    bend = height**2 * (3 - 2 * height)  # leaves and arrives upright
    for i, j in zip(*np.nonzero(plan), strict=True):
        mass = plan[i, j]
        start, end = left_y[j], left_x[i]
        left_x[i] += mass
        left_y[j] += mass
        if mass >= minimum:
            path_left = start + bend * (end - start)
            axes.fill_betweenx(
                height,
                path_left,
                path_left + mass,
                color=colors[i],
                alpha=0.45,
                linewidth=0,
            )
    axes.set_axis_off()
    axes.set_ylim(-0.25, 1.25)
    if path is not None:
        report.save_figure(figure, path)
    return figure


def _lefts(masses, gap):
    """Left ends of bars, the row centred at 0.5."""
    total = masses.sum() + gap * (len(masses) - 1)
    return 0.5 - total / 2 + np.cumsum(masses + gap) - (masses + gap)


def _row(axes, lefts, masses, words, y, side):
    for left, mass, word in zip(lefts, masses, words, strict=True):
        axes.plot([left, left + mass], [y, y], color="black", linewidth=3)
        axes.annotate(
            word,
            (left + mass / 2, y),
            (0, 6 if side == "bottom" else -6),
            textcoords="offset points",
            ha="center",
            va=side,
            fontsize=12,
        )
