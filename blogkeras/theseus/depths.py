"""One transformer compressed to several depths: quality over cost."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import tree

from blogkeras.arguments import (
    check_choice,
    check_integer,
    check_sizes,
    check_verbose,
)
from blogkeras.compression import CompressionReport, compression_report
from blogkeras.graph import find_blocks, keep_blocks
from blogkeras.theseus.bert import METHODS, bert_of_theseus
from blogkeras.theseus.distillation import Distillation
from blogkeras.theseus.model import Theseus


def compare_depths(
    predecessor: Any,
    classifier: Any,
    depths: Sequence[int],
    train: Callable[[keras.Model], Any],
    x: Any,
    y: Any,
    *,
    loss: Any,
    metrics: Any = None,
    methods: Any = "theseus",
    successor: Callable[[int], Any] | None = None,
    models: dict[str, keras.Model] | None = None,
    batch_size: int = 32,
    rounds: int = 20,
    verbose: str | int = "auto",
) -> CompressionReport:
    """Compresses a transformer to several depths and measures all models.

    For each depth and method a successor is made, trained by your `train`,
    detached and kept in `models`. In the end all are measured by
    `compression_report`, the predecessor beside them: `plot(path)` draws a line
    for each method and the Pareto frontier, `frontier()` names the models that
    no other one beats in quality and time.

    Args:
        predecessor: The large transformer, trained: an object of bert4keras or
            a functional model. It will be frozen.
        classifier: Model or layer, or a list of them, trained with the
            predecessor, from its output to the prediction; `None` where the
            transformers include their heads.
        depths: Integers ≥ 1, the successors' numbers of blocks.
        train: Function of a model, which compiles and fits it. For
            `"theseus"` it is called twice: with a `Theseus`, and with the
            detached successor, for its own training (look at the model's class
            where the two should differ).
        x: Inputs to measure on, as for `compression_report`.
        y: Targets.
        loss: The loss that `evaluate` reports, as for `compile`.
        metrics: List of further metrics, as for `compile`.
        methods: A name or a list of names: `"theseus"`, `"distillation"`,
            `"direct"`, as for `bert_of_theseus`; or a dict from names to
            functions that make the model to train of a successor, for other
            settings of theirs.
        successor: Function from a depth to a transformer of so many blocks.
            Defaults to `keep_blocks(predecessor, depth)`, the first blocks.
        models: Dict that takes the finished models by name, as they come. After
            an interrupt give it again: what it has is not trained anew (and its
            training time is not known, NaN).
        batch_size: Integer ≥ 1, for `evaluate` and the latency.
        rounds: Integer ≥ 1, the latency's.
        verbose: `"auto"`, 0, 1 or 2; but for 0 each model's name is said before
            its training.

    Returns:
        A `CompressionReport`, whose rows have two columns more, `"method"` and
        `"blocks"`, and the models' names such as `"theseus, 3 blocks"`; the
        models stand in `models`, compiled for `evaluate`. `"training seconds"`
        are those of `train` alone: the predecessor's come on top.

    Raises:
        ValueError: for depths that are not positive, given twice or greater
            than the predecessor's, unknown methods, a model in `models` that is
            none of these, and where `keep_blocks` and `bert_of_theseus` raise
            it.

    Example:

    >>> def transformer(blocks):
    ...     inputs = keras.Input((8,))
    ...     x = layers.Dense(8, name="embedding")(inputs)
    ...     for i in range(blocks):
    ...         x = layers.Dense(8, "relu", name=f"transformer_layer_{i}")(x)
    ...     return keras.Model(inputs, x)
    >>> x, y = np.random.rand(32, 8), np.random.randint(0, 3, 32)
    >>> def train(model):
    ...     model.compile("adam", "sparse_categorical_crossentropy")
    ...     model.fit(x, y, verbose=0)
    >>> report = compare_depths(
    ...     transformer(4), layers.Dense(3, "softmax"), [2, 1], train, x, y,
    ...     loss="sparse_categorical_crossentropy", metrics=["accuracy"],
    ...     methods=["theseus", "direct"], verbose=0,
    ... )
    >>> report.column("blocks")
    [4, 2, 1, 2, 1]

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925);
        [blog post](https://kexue.fm/archives/7575)
    """
    depths = _checked_depths(depths)
    for name, value in {"train": train, "successor": successor}.items():
        if not callable(value) and (name, value) != ("successor", None):
            raise ValueError(
                f"Expected `{name}` to be a function. "
                f"Received: {name}={value!r}"
            )
    quiet = check_verbose(verbose) == 0
    batch_size = check_integer("batch_size", batch_size, minimum=1)
    rounds = check_integer("rounds", rounds, minimum=1)
    make = successor or (lambda depth: keep_blocks(predecessor, depth))
    routes = _routes(methods, predecessor, classifier)
    names = {
        (method, depth): f"{method}, {_blocks(depth)}"
        for method in routes
        for depth in depths
    }
    blocks = _depth(predecessor)
    if max(depths) > blocks:
        raise ValueError(
            f"Expected `depths` of at most the predecessor's {blocks} blocks. "
            f"Received: depths={depths}"
        )
    models = {} if models is None else models
    unknown = set(models) - set(names.values()) - {"predecessor"}
    if unknown:
        raise ValueError(
            "Expected `models` to have models of an earlier call with the same "
            f"depths and methods, {['predecessor', *names.values()]}. "
            f"Received: {sorted(unknown)}"
        )
    # A copy, so that the predecessor is not compiled anew.
    models["predecessor"] = large = bert_of_theseus(
        predecessor, predecessor, classifier, method="direct"
    )
    # Data and metrics that do not fit are found before hours of training.
    large.compile(loss=loss, metrics=metrics)
    large.test_on_batch(*tree.map_structure(lambda a: a[:batch_size], (x, y)))
    seconds = {}
    for (method, depth), name in names.items():
        if name in models:
            continue
        if not quiet:
            print(f"Training: {name}")
        start = time.perf_counter()
        models[name] = _trained(routes[method](make(depth)), train)
        seconds[name] = time.perf_counter() - start
    models = {name: models[name] for name in ["predecessor", *names.values()]}
    for model in models.values():
        if model is not large:
            model.compile(loss=loss, metrics=metrics)
    report = compression_report(
        models,
        x,
        y,
        training_seconds=seconds,
        batch_size=batch_size,
        rounds=rounds,
        verbose=verbose,
    )
    keys = [("predecessor", blocks), *names]
    rows = [
        {"model": row["model"], "method": method, "blocks": depth, **row}
        for row, (method, depth) in zip(report.rows, keys, strict=True)
    ]
    return dataclasses.replace(report, rows=rows)


def _checked_depths(depths):
    numbers = check_sizes("depths", depths)
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            "Expected `depths` to be different integers. "
            f"Received: depths={depths!r}"
        )
    return numbers


def _routes(methods, predecessor, classifier):
    """Dict from names to functions from a successor to the model to train."""
    if isinstance(methods, dict):
        if not methods or not all(map(callable, methods.values())):
            raise ValueError(
                "Expected `methods` to be a dict from names to functions, at "
                f"least one. Received: methods={methods!r}"
            )
        return methods
    names = [methods] if isinstance(methods, str) else methods
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(
            f"Expected `methods` to be one of {METHODS}, a list of them or a "
            f"dict of functions. Received: methods={methods!r}"
        )

    def route(name):
        return lambda successor: bert_of_theseus(
            predecessor, successor, classifier, method=name
        )

    return {
        check_choice("methods", name, METHODS): route(name) for name in names
    }


def _trained(model, train):
    """The plain model that remains after all phases of the training."""
    train(model)
    if isinstance(model, Theseus):
        # The head is the predecessor's. The next depth needs it as it was.
        model = model.detach(copy=True)
        train(model)
    elif isinstance(model, Distillation):
        model = model.detach()
    return model


def _blocks(count):
    return f"{count} block" + "s" * (count != 1)


def _depth(model):
    """The number of blocks; NaN where they are not found."""
    try:
        return len(find_blocks(model)[1])
    except ValueError:
        return float("nan")
