"""What a compression costs and what it is worth: one row for each model."""

import dataclasses
import math
import os
import re
import tempfile
import time
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What `compression_report` found.

    Attributes:
        rows: One dict for each model: `"model"`, `"parameters"`, `"megabytes"`
            (a file of the weights alone), `"gflops"` and
            `"milliseconds"` (both for one batch), the loss and the metrics as
            `evaluate` names them, and `"training seconds"` if given.
        batch_size: Integer, the samples in that batch.
    """

    rows: list[dict[str, Any]]
    batch_size: int

    def column(self, name):
        """One quantity of all models, a list: `column("parameters")`."""
        if name not in self.rows[0]:
            raise ValueError(
                f"Expected one of {list(self.rows[0])}. Received: name={name!r}"
            )
        return [row[name] for row in self.rows]

    def table(self, title=None):
        """Prints the rows (needs rich)."""
        from blogkeras import report

        report.print_table(
            list(self.rows[0]),
            [list(row.values()) for row in self.rows],
            title or f"Compression (batches of {self.batch_size})",
        )

    def plot(self, path, metric=None):
        """Draws a metric over the latency into a file (needs matplotlib).

        And, side by side with it, over the training time where that is known.

        Args:
            path: Ends in `.png` or `.svg`.
            metric: Its name; the last one of `evaluate` by default.

        Returns:
            `path`.
        """
        from matplotlib.figure import Figure

        from blogkeras import report

        if metric is None:
            names = [n for n in self.rows[0] if n != "training seconds"]
            metric = names[-1]
        self.column(metric)  # or a ValueError
        costs = {
            "milliseconds": f"milliseconds per batch of {self.batch_size}",
            "training seconds": "seconds of training, all phases",
        }
        costs = {k: v for k, v in costs.items() if k in self.rows[0]}
        figure = Figure(
            figsize=(1 + 3.9 * len(costs), 4.4), dpi=150, layout="constrained"
        )
        panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, (cost, label) in zip(panels, costs.items(), strict=True):
            for row, marker in zip(self.rows, "osD^vP*X" * 9, strict=False):
                axes.scatter(
                    row[cost],
                    row[metric],
                    s=80,
                    marker=marker,
                    label=f"{row['model']}: {row['parameters']:,} parameters",
                )
            axes.set_xlabel(label, fontsize=12)
            axes.set_xlim(0, 1.1 * np.nanmax(self.column(cost)))
            axes.tick_params(labelsize=11)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(metric, fontsize=12)
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(costs),
            fontsize=11,
            frameon=False,
        )
        return report.save_figure(figure, path)


def compression_report(
    models,
    x,
    y,
    *,
    training_seconds=None,
    batch_size=32,
    rounds=20,
    verbose="auto",
):
    """Measures models of several sizes on the same data.

    Parameters, file size, floating-point operations, latency and metrics. The
    operations are those of the matrix products and convolutions, two for each
    multiplication, of one batch (loops count once). The latency is the median
    over `rounds`, in which the models take turns, each compiled with XLA.

    Compression costs training time, the predecessor's included: give the total
    of each route as `training_seconds`.

    Args:
        models: Dict from names to compiled models.
        x: Inputs: an array, or a list, tuple or dict of arrays (no data set:
            its first `batch_size` samples are those of the latency).
        y: Targets.
        training_seconds: Dict from some of the names to seconds, if known.
        batch_size: Integer ≥ 1.
        rounds: Integer ≥ 1.
        verbose: 0 for silence; a progress bar otherwise.

    Returns:
        A `CompressionReport`: `rows`, `table()`, `plot(path)`.

    Example:

    >>> report = compression_report(
    ...     {"12 layers": predecessor, "3 layers": theseus.detach()}, x, y
    ... )
    >>> report.table()
    """
    if not isinstance(models, dict) or not models:
        raise ValueError(
            "Expected a dict from names to models, of at least one. "
            f"Received: models={models}"
        )
    if batch_size < 1 or rounds < 1:
        raise ValueError(
            "Expected `batch_size` and `rounds` to be at least 1. "
            f"Received: batch_size={batch_size}, rounds={rounds}"
        )
    for name, model in models.items():
        if not model.compiled or not model.built:
            raise ValueError(
                "Expected models that are built and compiled, with the metrics "
                f"to report. Received: {name!r}"
            )
    unknown = set(training_seconds or ()) - set(models)
    if unknown:
        raise ValueError(
            f"Expected names of models, {list(models)}, in "
            f"`training_seconds`. Received: {sorted(unknown)}"
        )
    progress = keras.utils.Progbar(
        len(models) + rounds, verbose=1 if verbose == "auto" else verbose
    )
    batch = tree.map_structure(
        lambda a: ops.convert_to_tensor(np.asarray(a)[:batch_size]), x
    )
    # First of all: `evaluate` may move the variables.
    found = {
        name: model.evaluate(
            x, y, batch_size=batch_size, verbose=0, return_dict=True
        )
        for name, model in models.items()
    }
    if len({tuple(sorted(values)) for values in found.values()}) > 1:
        names = {name: list(values) for name, values in found.items()}
        raise ValueError(
            "Expected models compiled with the same metrics, a column for "
            f"each. Received: {names}"
        )
    rows, runs = [], {}
    for name, model in models.items():
        run, state = _inference(model)
        runs[name] = backend.jit(run), state
        row = {
            "model": name,
            "parameters": model.count_params(),
            "megabytes": _megabytes(model),
            "gflops": matmul_flops(backend.hlo_text(run, state, batch)) / 1e9,
            "milliseconds": 0.0,
            **dict(sorted(found[name].items(), key=lambda x: x[0] != "loss")),
        }
        if training_seconds:
            row["training seconds"] = training_seconds.get(name, float("nan"))
        rows.append(row)
        _timed(*runs[name], batch)
        progress.add(1)
    times = {name: [] for name in models}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(*run, batch))
        progress.add(1)
    for row in rows:
        row["milliseconds"] = 1e3 * float(np.median(times[row["model"]]))
    return CompressionReport(rows, len(tree.flatten(batch)[0]))


def _inference(model):
    """A pure function of the model's state and inputs, and the state."""
    variables = model.variables

    def run(state, inputs):
        mapping = [*zip(variables, state, strict=True)]
        with keras.StatelessScope(mapping):
            return model(inputs, training=False)

    return run, [ops.convert_to_tensor(v) for v in variables]


def _timed(run, state, batch):
    start = time.perf_counter()
    for output in tree.flatten(run(state, batch)):
        ops.convert_to_numpy(output)
    return time.perf_counter() - start


def _megabytes(model):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.npz")
        np.savez(path, *model.get_weights())
        return os.path.getsize(path) / 1e6


_LINE = re.compile(
    r"(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\((.*)"
)
_CALLED = re.compile(r"(?:to_apply|body|calls)=%?([\w.\-]+)")
_HEADING = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")


def matmul_flops(text):
    """Operations of the matrix products and convolutions in a program of XLA.

    Args:
        text: The program as `backend.hlo_text` gives it.
    """
    own, called, entry, name = {}, {}, None, None
    for line in map(str.strip, text.splitlines()):
        heading = _HEADING.match(line)
        if heading and " = " not in line and not line.startswith("HloModule"):
            name, shapes = heading[2], {}
            own[name], called[name] = 0, []
            entry = name if heading[1] else entry
        elif name is not None:
            called[name] += _CALLED.findall(line)
            if match := _LINE.match(line):
                shape = [int(n) for n in match[2].split(",") if n]
                shapes[match[1]] = shape
                own[name] += _flops(match[3], match[4], shape, shapes)

    def total(name):
        return own[name] + sum(map(total, called[name]))

    return total(entry)


def _flops(operation, rest, shape, shapes):
    if operation not in ("dot", "convolution"):
        return 0
    operands = rest[: rest.index(")")]
    names = re.findall(r"%([\w.\-]+)", operands) or operands.split(", ")
    left, right = (shapes[name] for name in names)
    if operation == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
        summed = math.prod(left[int(i)] for i in axes.split(",") if i)
    else:
        kernel = re.search(r"dim_labels=\w+_(\w+)->", rest)[1]
        summed = math.prod(right) // right[kernel.index("o")]
        # A transposed convolution has zeros between the numbers of its input.
        if dilation := re.search(r"lhs_dilate=([\dx]+)", rest):
            summed /= math.prod(map(int, dilation[1].split("x")))
    return 2 * math.prod(shape) * summed
