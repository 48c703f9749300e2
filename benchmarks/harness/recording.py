"""Rows of a CSV file, from which an interrupted recording goes on."""

import csv
import io
import os
import pathlib


class Recording:
    """A table of runs that stands in a file; each run adds a row.

    A row appears complete or not at all, and nothing that stands in the file
    is written again.

    Args:
        path: The CSV file; it is made with the first row.
        columns: Names of the columns. A file with other columns is refused.
        key: Names of the columns that say which run it was.

    Example:

    >>> rows = Recording("docs/results/x.csv", ["method", "seed", "loss"],
    ...                  key=["method", "seed"])
    >>> for method, seed in rows.missing([("a", 0), ("b", 0)]):
    ...     rows.append(method, seed, "0.25")
    """

    def __init__(self, path, columns, key):
        self.path = pathlib.Path(path)
        self.columns = list(columns)
        self.key = list(key)
        if unknown := set(self.key) - set(self.columns):
            raise ValueError(
                f"Expected a key of columns. Received: {sorted(unknown)} "
                f"beside {self.columns}"
            )
        self.rows()

    def rows(self):
        """The rows so far, dicts of strings."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if rows and list(reader.fieldnames) != self.columns:
            raise ValueError(
                f"Expected the columns {self.columns} in {self.path}. "
                f"Received: {reader.fieldnames}"
            )
        return rows

    def missing(self, runs):
        """Those of `runs`, tuples in the order of the key, without a row."""
        done = {tuple(row[k] for k in self.key) for row in self.rows()}
        return [run for run in runs if tuple(map(str, run)) not in done]

    def append(self, *row):
        """Adds a run: a value for each column, "" where there is none."""
        self.extend([row])

    def extend(self, rows):
        """Adds several rows at once: all of them, or none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.path.exists() or not self.path.stat().st_size:
            writer.writerow(self.columns)
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Expected a value for each of {self.columns}. Received: "
                    f"{row}"
                )
            writer.writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One call: an interrupt leaves whole rows.
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
