"""Rows of a file, from which an interrupted recording goes on."""

import csv
import io
import json
import os
import pathlib
import time


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

    def todo(self, runs, options):
        """Yields runs without a row, and prints which.

        Args:
            runs: Tuples in the order of the key.
            options: Those of `command_line.recording`: ends after `runs` runs,
                and starts none after `minutes`.
        """
        runs = self.missing(runs)
        start, done = time.monotonic(), 0
        for count, run in enumerate(runs, 1):
            minutes = (time.monotonic() - start) / 60
            if done == options.runs or minutes > options.minutes:
                return
            if self.missing([run]):  # not recorded by one of those before
                print(f"run {count} of {len(runs)}:", *run, flush=True)
                yield run
                done += 1
        print("Everything asked for is recorded.")

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


def group(rows, *names):
    """Rows by the values of some columns: `{(value, ...): rows}`.

    Of a single column the keys are its values.
    """
    groups = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return groups


class Measurements:
    """What was measured so far, in lines `kind;key;JSON` of a file.

    A page is written from all of them, so that each can be measured anew by
    itself.

    Example:

    >>> state = Measurements("docs/results/x.csv")
    >>> state.save("seconds", "small", {"ours": [0.1, 0.2]})
    >>> state.of("seconds")
    {'small': {'ours': [0.1, 0.2]}}
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)

    def _all(self):
        if not self.path.exists():
            return {}
        lines = self.path.read_text("utf-8").splitlines()
        split = (line.split(";", 2) for line in lines)
        return {(kind, key): json.loads(value) for kind, key, value in split}

    def of(self, kind):
        """`{key: value}` of a kind."""
        return {k: v for (other, k), v in self._all().items() if other == kind}

    def save(self, kind, key, value):
        """Adds a value, or puts it in the place of an older one."""
        values = self._all() | {(kind, key): value}
        lines = [f"{k};{n};{json.dumps(v)}\n" for (k, n), v in values.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(self.path)
