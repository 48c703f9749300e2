"""Measures models of several sizes on the same data."""

import os
import tempfile
import time
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import (
    check_boolean,
    check_integer,
    check_number,
    check_verbose,
)
from blogkeras.compression.operations import count_operations
from blogkeras.compression.record import CompressionReport
from blogkeras.state import snapshot
from blogkeras.training import step_memory
from blogkeras.typing import Tensor


def compression_report(
    models: Any,
    x: Tensor,
    y: Tensor,
    *,
    training_seconds: Any = None,
    batch_size: int = 32,
    rounds: int = 20,
    verbose: str | int = "auto",
    training_step: bool = False,
) -> CompressionReport:
    """Measures models of several sizes on the same data.

    Parameters, file size, floating-point operations, latency and metrics. The
    operations are those of the matrix products and convolutions, two for each
    multiplication, of one batch; of a branch those of the larger side, of a
    loop those of all its iterations (where their number depends on the data the
    figure is a lower bound, marked `≥`). The latency is the median over
    `rounds`, in which the models take turns, each compiled with XLA.

    Compression costs training time, the predecessor's included: give the total
    of each route as `training_seconds`.

    Args:
        models: Dict from names to compiled models.
        x: Inputs: an array, or a list, tuple or dict of arrays (no data set:
            its first `batch_size` samples are those of the latency).
        y: Targets: an array, or a structure of arrays.
        training_seconds: Dict from some of the names to seconds, if known.
        batch_size: Integer ≥ 1.
        rounds: Integer ≥ 1.
        verbose: `"auto"`, 0, 1 or 2; 0 for silence.
        training_step: Boolean. Whether to measure a step of training, too:
            `"step milliseconds"`, the median time of a step on one batch as
            `fit` would run it, and `"step megabytes"`, its peak memory (as the
            compiler says on JAX, as the allocator says on TensorFlow with a
            GPU; NaN on TensorFlow without a GPU, where it cannot be measured).
            The models and their optimizers are afterwards as before.

    Returns:
        A `CompressionReport`: `rows`, `table()`, `plot(path)`.

    Raises:
        ValueError: for models that are not built and compiled or that have
            other metrics than the rest.

    Example:

    >>> def model(depth):
    ...     hidden = [layers.Dense(8, "relu") for _ in range(depth)]
    ...     model = keras.Sequential(
    ...         [keras.Input((4,)), *hidden, layers.Dense(1)]
    ...     )
    ...     model.compile(loss="mse")
    ...     return model
    >>> x, y = np.random.rand(16, 4), np.random.rand(16, 1)
    >>> models = {"4 layers": model(4), "2 layers": model(2)}
    >>> report = compression_report(models, x, y, batch_size=8, verbose=0)
    >>> report.column("parameters")
    [265, 121]

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925), who report
        parameters and speed beside the metrics
    """
    batch_size = check_integer("batch_size", batch_size, minimum=1)
    rounds = check_integer("rounds", rounds, minimum=1)
    training_step = check_boolean("training_step", training_step)
    _check_models(models)
    training_seconds = _checked_seconds(training_seconds, models)
    progress = keras.utils.Progbar(
        len(models) + rounds, verbose=check_verbose(verbose)
    )
    batch, targets = tree.map_structure(
        lambda a: ops.convert_to_tensor(np.asarray(a)[:batch_size]), (x, y)
    )
    # This comes first: `evaluate` may replace the variables' values.
    metrics = _metrics(models, x, y, batch_size)
    rows, runs, bounds = [], {}, []
    for name, model in models.items():
        run, state = _inference(model)
        operations = count_operations(backend.hlo_text(run, state, batch))
        bounds += [] if operations.exact else [name]
        runs[name] = backend.jit(run), state
        row = {
            "model": name,
            "parameters": model.count_params(),
            "megabytes": _megabytes(model),
            "gflops": operations.count / 1e9,
            "milliseconds": 0.0,
        }
        if training_step:
            row |= {"step milliseconds": 0.0, "step megabytes": 0.0}
        row |= dict(sorted(metrics[name].items(), key=lambda x: x[0] != "loss"))
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
    if training_step:
        steps = _training_steps(models, batch, targets, rounds)
        for row in rows:
            row |= steps[row["model"]]
    size = len(tree.flatten(batch)[0])
    return CompressionReport(rows, size, tuple(bounds))


def _check_models(models):
    if not isinstance(models, dict) or not models:
        raise ValueError(
            "Expected a dict from names to models, of at least one. "
            f"Received: models={models!r}"
        )
    for name, model in models.items():
        is_model = isinstance(model, keras.Model)
        if not is_model or not model.compiled or not model.built:
            raise ValueError(
                "Expected models that are built and compiled, with the metrics "
                f"to report. Received: {name!r}: {model!r}"
            )


def _checked_seconds(seconds, models):
    seconds = {} if seconds is None else seconds
    if not isinstance(seconds, dict) or not set(seconds) <= set(models):
        raise ValueError(
            "Expected `training_seconds` to be a dict from names of models, "
            f"{list(models)}, to seconds. "
            f"Received: training_seconds={seconds!r}"
        )
    return {
        name: check_number("training_seconds", value, minimum=0)
        for name, value in seconds.items()
    }


def _metrics(models, x, y, batch_size):
    """What `evaluate` says of each model."""
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
    return found


def _training_steps(models, x, y, rounds):
    """Time and memory of one step of each model; its state is restored."""
    for model in models.values():
        model.optimizer.build(model.trainable_variables)
    variables = {
        name: [
            *model.variables,
            *model.optimizer.variables,
            *model.metrics_variables,
        ]
        for name, model in models.items()
    }
    saved = {name: snapshot(values) for name, values in variables.items()}
    try:
        memory = {
            name: step_memory(model, x, y) for name, model in models.items()
        }
        times = {name: [] for name in models}
        for _ in range(rounds + 1):  # the first one compiles
            for name, model in models.items():
                start = time.perf_counter()
                model.train_on_batch(x, y)
                times[name].append(time.perf_counter() - start)
    finally:
        for name, values in variables.items():
            for variable, value in zip(values, saved[name], strict=True):
                variable.assign(value)
    return {
        name: {
            "step milliseconds": 1e3 * float(np.median(times[name][1:])),
            "step megabytes": memory[name] / 1e6,
        }
        for name in models
    }


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
