"""Tables and figures that the rooms, examples and benchmarks share.

rich and matplotlib are imported when they are first used; `import blogkeras`
needs neither.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from blogkeras.extras import require
from blogkeras.files import replace_file


@dataclasses.dataclass(frozen=True)
class Rows:
    """What was measured: one dict for each case, all with the same keys.

    Attributes:
        rows: The dicts.
    """

    rows: list[dict[str, Any]]

    def column(self, name):
        """One quantity of all cases, a list."""
        if name not in self.rows[0]:
            raise ValueError(
                f"Expected one of {list(self.rows[0])}. Received: name={name!r}"
            )
        return [row[name] for row in self.rows]

    def print_rows(self, title=None):
        """Prints the rows as a table (needs rich)."""
        print_table(
            list(self.rows[0]), [list(row.values()) for row in self.rows], title
        )


def print_table(columns, rows, title=None):
    """Prints a table, numbers to the right, never cut off.

    Args:
        columns: The headings, strings.
        rows: Sequence of rows; floats are shown with four digits, everything
            else as `str` shows it.
        title: String above the table, if any.
    """
    console, table = require("rich.console"), require("rich.table")
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                "Expected one cell for each column in every row. Received: "
                f"columns={list(columns)}, row={row}"
            )
    grid = table.Table(title=title)
    for index, name in enumerate(columns):
        numbers = all(isinstance(row[index], (int, float)) for row in rows)
        grid.add_column(
            name, justify="right" if numbers else "left", no_wrap=True
        )
    for row in rows:
        grid.add_row(*map(_cell, row))
    out = console.Console()
    wide = out.options.update(max_width=10_000)
    out.width = max(out.width, out.measure(grid, options=wide).maximum)
    out.print(grid)


def line_figure(path, x, lines, xlabel, ylabel, title=None):
    """Draws lines over a common x and writes them to a file.

    The file appears complete or not at all; matplotlib's global state is not
    touched.

    Args:
        path: Where to write; the ending (`.png`, `.svg`, `.pdf`) is the format.
        x: Sequence of numbers.
        lines: Dict `{label: ys}`, each as long as `x`.
        xlabel: String.
        ylabel: String.
        title: String, if any.

    Returns:
        `path`, as a string.
    """
    for label, ys in lines.items():
        if len(ys) != len(x):
            raise ValueError(
                "Expected as many values in each line as in `x`. Received: "
                f"{len(x)} and, for {label!r}, {len(ys)}"
            )
    # A bare Figure has no window and no entry in pyplot's list.
    figure = require("matplotlib.figure").Figure(
        figsize=(6.4, 4.0), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot()
    for (label, ys), marker in zip(
        lines.items(), _cycle("osD^vP*X"), strict=False
    ):
        axes.plot(x, ys, marker=marker, markersize=6, linewidth=2, label=label)
    axes.set_xlabel(xlabel, fontsize=12)
    axes.set_ylabel(ylabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        axes.set_title(title, fontsize=12)
    if len(lines) > 1:
        axes.legend(fontsize=11, frameon=False)
    return save_figure(figure, path)


def heat_map(path, matrix, rows, columns, xlabel=None, ylabel=None, title=None):
    """Draws a matrix as colors with its numbers and writes it to a file.

    Args:
        path: Where to write; the ending (`.png`, `.svg`, `.pdf`) is the format.
        matrix: Array `(len(rows), len(columns))`.
        rows: Names, from top to bottom.
        columns: Names, from left to right.
        xlabel: String, if any.
        ylabel: String, if any.
        title: String, if any.

    Returns:
        `path`, as a string.
    """
    if (len(rows), len(columns)) != tuple(matrix.shape):
        raise ValueError(
            "Expected one name for each row and column. Received: "
            f"{len(rows)} and {len(columns)} for shape {tuple(matrix.shape)}"
        )
    size = [max(4.0, 1.5 + 0.6 * len(names)) for names in (columns, rows)]
    figure = require("matplotlib.figure").Figure(
        figsize=size, dpi=120, layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(xlabel or "")
    axes.set_ylabel(ylabel or "")
    if title:
        axes.set_title(title, fontsize=12)
    if matrix.size <= 400:
        middle = (matrix.max() + matrix.min()) / 2
        for i, line in enumerate(matrix):
            for j, value in enumerate(line):
                axes.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if value > middle else "white",
                )
    figure.colorbar(image, shrink=0.8)
    return save_figure(figure, path)


def picture_rows(path, rows):
    """A figure of small pictures in rows with names.

    Args:
        path: Where to write; the ending decides on the format.
        rows: Dict `{name: pictures}` of arrays `(columns, height, width,
            channels)` with 1 (grey) or 3 channels (red, green, blue), all of
            one shape. Values below 0 are shown as 0, values above 1 as 1.

    Returns:
        `path`, as a string.
    """
    shapes = {name: np.shape(pictures) for name, pictures in rows.items()}
    if len(set(shapes.values())) != 1 or any(
        len(shape) != 4 or shape[-1] not in (1, 3) for shape in shapes.values()
    ):
        raise ValueError(
            "Expected rows of pictures (columns, height, width, 1 or 3), all "
            f"of one shape. Received: {shapes}"
        )
    pictures = np.clip(np.stack(list(rows.values())), 0, 1)
    gap = [[0, 0], [0, 0], [1, 1], [1, 1], [0, 0]]
    pictures = np.pad(pictures, gap, constant_values=0.5)
    count, columns, height, _, channels = pictures.shape
    picture = pictures.transpose(0, 2, 1, 3, 4).reshape(
        count * height, -1, channels
    )
    margin, size = 0.3 + 0.075 * max(map(len, rows)), 0.6
    width = margin + columns * size
    figure = require("matplotlib.figure").Figure(
        figsize=(width, count * size), dpi=100
    )
    axes = figure.add_axes((margin / width, 0, 1 - margin / width, 1))
    axes.imshow(
        picture.squeeze(axis=-1) if channels == 1 else picture,
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    axes.set_xticks([])
    axes.set_yticks((np.arange(count) + 0.5) * height - 0.5, list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save_figure(figure, path)


def save_figure(figure, path):
    """Writes a matplotlib figure; the file appears complete or not at all.

    Args:
        figure: A `matplotlib.figure.Figure`.
        path: Where to write; missing folders are made.

    Returns:
        `path`, as a string.
    """
    path = os.fspath(path)
    ending = os.path.splitext(path)[1]
    if not ending:
        raise ValueError(
            "Expected a path that ends in the format of the figure, such as "
            f"'.png' or '.svg'. Received: path={path!r}"
        )
    with replace_file(path) as part:
        figure.savefig(part, format=ending[1:])
    return path


def _cycle(symbols):
    while True:
        yield from symbols


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
