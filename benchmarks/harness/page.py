"""Markdown pages of results."""

import math
import os
import pathlib
import platform
import subprocess
from importlib import metadata

import numpy as np

from harness import statistics

ROOT = pathlib.Path(__file__).parent.parent.parent


def environment(packages):
    """A line that says what was measured on what."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}"
    )


def versions(python, packages):
    """The packages of another Python, as `environment` writes them."""
    code = (
        "import sys; from importlib.metadata import version as v;"
        "print(', '.join(f'{p} {v(p)}' for p in sys.argv[1:]))"
    )
    return subprocess.run(
        [python, "-c", code, *packages],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def table(columns, rows):
    """Lines of a Markdown table; cells are shown by `str`."""
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"Expected one cell for each of {list(columns)}. "
                f"Received: {row}"
            )
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]


def interval(middle, low, high, digits=2, sign=False, scale=1):
    """`1.56 (1.50 to 1.61)`; one value has no interval."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    middle, low, high = (scale * x for x in (middle, low, high))
    if math.isnan(low):
        return form.format(middle)
    if math.isinf(low):
        return f"{form.format(middle)} (without bounds)"
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def write(path, lines):
    """Writes a page; missing folders are made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def update(path, head, sections):
    """Writes the head of a page and some of its sections; others stay.

    The sections are printed, too.

    Args:
        path: The page; made where it is missing.
        head: Lines above the first section.
        sections: `{title: lines}`. A section of a title that the page has is
            replaced where it stands, a new one comes last.
    """
    path = pathlib.Path(path)
    old = path.read_text("utf-8") if path.exists() else ""
    parts = {}
    for part in ("\n" + old).split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        parts[title] = body.strip().split("\n")
    lines = [*head, ""]
    for title, body in (parts | sections).items():
        lines += [f"## {title}", "", *body, ""]
    write(path, lines)
    for title, body in sections.items():
        print("\n".join([f"## {title}", "", *body]))


def put(path, mark, lines):
    """Puts lines between the marks of this name, which the page has."""
    path = pathlib.Path(path)
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = path.read_text("utf-8").partition(start)
    after = rest.partition(end)[2]
    lines = [before + start, "", *lines, "", end + after]
    write(path, lines)
    print("\n".join(lines[2:-2]))


def times(seconds, labels, count=1):
    """A table of the contenders' seconds per step.

    Args:
        seconds: `{name: array of length rounds}`, from `contest`.
        labels: `{name: label}`.
        count: Integer. Number of steps that were timed as one.
    """
    return table(
        ["contender", "seconds per step, median", "minimum"],
        [
            (
                labels[name],
                f"{np.median(values) / count:.3f}",
                f"{values.min() / count:.3f}",
            )
            for name, values in seconds.items()
        ],
    )


def ratios(seconds, rows, last="target"):
    """A table of ratios, see `statistics.ratio`.

    Args:
        seconds: `{name: array of length rounds}`, from `contest`.
        rows: Tuples (label, contender, base, last cell); those whose
            contenders were not measured are left out.
        last: Title of the last column. None where the rows have no such cell.
    """
    columns = ["ratio", "median", "95 % interval", last]
    return table(
        columns[: 4 if last else 3],
        [
            (
                label,
                *interval_cells(*statistics.ratio(seconds, name, base)),
                *end,
            )
            for label, name, base, *end in rows
            if name in seconds and base in seconds
        ],
    )


def interval_cells(middle, low, high, digits=2, sign=False):
    """Two cells: a number, and its interval, which one value does not have."""
    form = f"{'+' if sign else ''}.{digits}f"
    bounds = "" if math.isnan(low) else f"{low:{form}} to {high:{form}}"
    return f"{middle:{form}}", bounds


def deviation(values, digits):
    """A cell: the mean and, of several values, the standard deviation.

    Values may be strings, as rows of a recording have them.
    """
    values = np.asarray(values, "float64")
    cell = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        cell += f" ± {values.std(ddof=1):.{digits}f}"
    return cell
