"""The rows of a compression report: columns, a table, a figure."""

import dataclasses
import re

import numpy as np

from blogkeras import report
from blogkeras.arguments import check_choice
from blogkeras.extras import require

# What is drawn on the horizontal axis of a panel, where it is known.
_COSTS = {
    "milliseconds": "milliseconds per batch of {batch_size}",
    "training seconds": "seconds of training",
}

# Keras's losses and metrics by their names and short names; all others of its
# metrics are better the greater they are.
_LESS_IS_BETTER = re.compile(
    "loss|error|mse|msle|mae|mape|perplexity|divergence|kld|entropy|bce|hinge"
    "|poisson|log_?cosh|huber|false_",
    re.IGNORECASE,
)

# An accuracy on a few thousand samples is uncertain by about 0.01. An axis that
# is stretched to smaller differences would show noise as if it were a result.
_LEAST_SPAN = 0.05


def _limits(values):
    """The vertical axis: all values, and a part that says how much they differ.

    Where all values are between 0 and 1, as accuracies are, it spans at least
    `_LEAST_SPAN`.
    """
    low, high = np.nanmin(values), np.nanmax(values)
    shares = 0 <= low and high <= 1
    span = max(high - low, _LEAST_SPAN if shares else 0) or 1.0
    middle = (low + high) / 2
    return middle - 0.55 * span, middle + 0.55 * span


@dataclasses.dataclass(frozen=True)
class CompressionReport(report.Rows):
    """The rows that `compression_report` measured.

    Attributes:
        rows: One dict for each model: `"model"`, `"parameters"`, `"megabytes"`
            (a file of the weights alone), `"gflops"` and `"milliseconds"` (both
            of one batch), those of a training step if asked for, the loss and
            the metrics as `evaluate` names them, and `"training seconds"` if
            given.
        batch_size: Integer, the samples in that batch.
        lower_bounds: Tuple of the names of the models whose `"gflops"` are a
            lower bound, as they have a loop whose length depends on the data.

    Example:

    >>> rows = [
    ...     {"model": "large", "milliseconds": 9.0, "accuracy": 0.93},
    ...     {"model": "small", "milliseconds": 3.0, "accuracy": 0.91},
    ... ]
    >>> CompressionReport(rows, batch_size=32).column("accuracy")
    [0.93, 0.91]

    Reference:
        [blog post](https://kexue.fm/archives/7575)
    """

    batch_size: int
    lower_bounds: tuple = ()

    def table(self, title=None):
        """Prints the rows (needs rich). `≥` stands before lower bounds."""
        shown = dataclasses.replace(
            self,
            rows=[
                {**row, "gflops": f"≥ {row['gflops']:.4g}"}
                if row["model"] in self.lower_bounds
                else row
                for row in self.rows
            ],
        )
        shown.print_rows(title or f"Compression (batches of {self.batch_size})")

    def frontier(self, metric=None, cost="milliseconds", mode="auto"):
        """The models of the Pareto frontier, from the cheapest on.

        Those that no other one beats: each model that costs as much or less is
        worse. Models whose metric or cost is not a number are left out.

        Args:
            metric: Its name; the last one of `evaluate` by default.
            cost: Name of a column, of which less is better.
            mode: `"max"` if more of the metric is better, `"min"` if less is;
                `"auto"` is `"min"` for names that contain `loss`, `error`,
                `mse`, `msle`, `mae`, `mape`, `perplexity`, `divergence`, `kld`,
                `entropy`, `bce`, `hinge`, `poisson`, `logcosh`, `huber` or
                `false_`, else `"max"`.

        Returns:
            List of names.

        Example:

        >>> rows = [
        ...     {"model": "12", "milliseconds": 9.0, "accuracy": 0.93},
        ...     {"model": "6", "milliseconds": 5.0, "accuracy": 0.90},
        ...     {"model": "3", "milliseconds": 3.0, "accuracy": 0.91},
        ... ]
        >>> CompressionReport(rows, batch_size=32).frontier()
        ['3', '12']
        """
        check_choice("mode", mode, ("auto", "min", "max"))
        metric = self._metric(metric)
        if mode == "auto":
            mode = "min" if _LESS_IS_BETTER.search(metric) else "max"
        sign = -1 if mode == "min" else 1
        costs = np.asarray(self.column(cost), float)
        gains = sign * np.asarray(self.column(metric), float)
        known = np.flatnonzero(np.isfinite(costs) & np.isfinite(gains))
        names, best = [], -np.inf
        # Of equal costs the better one comes first.
        for i in known[np.lexsort((-gains[known], costs[known]))]:
            if gains[i] > best:
                best = gains[i]
                names.append(self.rows[i]["model"])
        return names

    def plot(self, path, metric=None):
        """Draws a metric over the latency into a file (needs matplotlib).

        Where the training time is known, a second panel draws the metric over
        that. The rows of `compare_depths` are drawn as a line for each method,
        with the numbers of blocks, and the Pareto frontier behind them.

        Args:
            path: Ends in `.png` or `.svg`.
            metric: Its name; the last one of `evaluate` by default.

        Returns:
            `path`.
        """
        metric = self._metric(metric)
        self.column(metric)  # or a ValueError
        costs = {k: v for k, v in _COSTS.items() if k in self.rows[0]}
        figure = require("matplotlib.figure").Figure(
            figsize=(1 + 3.9 * len(costs), 4.4), dpi=150, layout="constrained"
        )
        panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, (cost, label) in zip(panels, costs.items(), strict=True):
            if "method" in self.rows[0]:
                self._draw_methods(axes, cost, metric)
            else:
                self._draw_models(axes, cost, metric)
            axes.set_xlabel(
                label.format(batch_size=self.batch_size), fontsize=12
            )
            axes.set_xlim(0, 1.1 * np.nanmax(self.column(cost)))
            axes.tick_params(labelsize=11)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(metric, fontsize=12)
        panels[0].set_ylim(*_limits(self.column(metric)))
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(costs),
            fontsize=11,
            frameon=False,
        )
        return report.save_figure(figure, path)

    def _metric(self, name):
        names = [n for n in self.rows[0] if n != "training seconds"]
        return names[-1] if name is None else name

    def _draw_models(self, axes, cost, metric):
        for row, marker in zip(self.rows, "osD^vP*X" * 9, strict=False):
            axes.scatter(
                row[cost],
                row[metric],
                s=80,
                marker=marker,
                label=f"{row['model']}: {row['parameters']:,} parameters",
            )

    def _draw_methods(self, axes, cost, metric):
        """A line for each method, over the frontier of all models."""
        frontier = self.frontier(metric, cost)
        points = [
            (row[cost], row[metric])
            for name in frontier
            for row in self.rows
            if row["model"] == name
        ]
        axes.step(
            *zip(*points, strict=True),
            where="post",
            color="lightgray",
            linewidth=6,
            label="Pareto frontier",
        )
        methods = dict.fromkeys(self.column("method"))
        for method, marker in zip(methods, "osD^vP*X" * 9, strict=False):
            rows = [row for row in self.rows if row["method"] == method]
            rows = sorted(rows, key=lambda row: row["blocks"])
            axes.plot(
                [row[cost] for row in rows],
                [row[metric] for row in rows],
                marker=marker,
                markersize=8,
                label=method,
            )
            for row in rows:
                if np.isfinite([row[cost], row[metric]]).all():
                    axes.annotate(
                        f"{row['blocks']}",
                        (row[cost], row[metric]),
                        xytext=(6, 5),
                        textcoords="offset points",
                        fontsize=10,
                    )
