"""Markdown pages of results."""

import math
import os
import pathlib
import platform
from importlib import metadata

ROOT = pathlib.Path(__file__).parent.parent.parent


def environment(packages):
    """A line that says what was measured on what."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}"
    )


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


def replace_section(path, heading, lines):
    """Puts a section in the place of the one with the same heading.

    Args:
        path: The page; made where it is missing.
        heading: Its line, such as `"## Sampling"`. The section ends before the
            next heading of its level or of a higher one.
        lines: What stands below the heading.
    """
    path = pathlib.Path(path)
    old = path.read_text("utf-8").splitlines() if path.exists() else []
    level = len(heading) - len(heading.lstrip("#"))
    start = old.index(heading) if heading in old else len(old)
    end = start + 1
    while end < len(old):
        hashes = len(old[end]) - len(old[end].lstrip("#"))
        if 0 < hashes <= level and old[end][hashes : hashes + 1] == " ":
            break
        end += 1
    before = old[:start]
    if before and before[-1]:
        before.append("")
    after = old[end:]
    write(path, [*before, heading, "", *lines, "", *after])
