"""Loss and metrics of a model under attacks of several strengths."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from blogkeras import report, training
from blogkeras.adversarial.attack_run import AttackRun, Mean, Tally
from blogkeras.adversarial.base import check_bounds, check_name
from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_verbose,
)
from blogkeras.typing import Tensor

ATTACKS = ("fgm", "pgd")
NORMS = {"l2": "L2 norm", "linf": "maximum norm"}


@dataclasses.dataclass(frozen=True)
class Robustness(report.Rows):
    """The loss and metrics that `evaluate_robustness` measured.

    Attributes:
        rows: One dict for each strength: `"epsilon"`, `"relative_epsilon"`
            (epsilon / `mean_norm`), `"loss"` and the model's metrics, as
            `evaluate` names them.
        attack: `"fgm"` or `"pgd"`.
        mean_norm: Mean L2 norm of the vectors that were perturbed: of the
            embedded tokens without padding; of whole samples where a floating
            input is perturbed.
        unmoved: Share of the samples that no attack could move because their
            gradient is exactly zero or not finite. If it is not small, the rows
            overestimate the robustness. The gradient of a saturated softmax
            vanishes: evaluate a model that returns logits instead.
        norm: `"l2"` or `"linf"`: of what epsilon is the size.

    Example:

    >>> rows = [
    ...     {"epsilon": 0.0, "accuracy": 0.9},
    ...     {"epsilon": 1.0, "accuracy": 0.5},
    ... ]
    >>> result = Robustness(rows, attack="fgm", mean_norm=2.0, unmoved=0.0)
    >>> result.column("accuracy")
    [0.9, 0.5]

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    attack: str
    mean_norm: float
    unmoved: float
    norm: str = "l2"

    def table(self, title=None):
        """Prints the rows (needs rich)."""
        self.print_rows(title or f"Under attack ({self.attack})")

    def plot(self, path, metric=None):
        """Draws a metric over epsilon into a file (needs matplotlib).

        Args:
            path: Ends in `.png` or `.svg`.
            metric: Its name; the first one after the loss by default.

        Returns:
            `path`.
        """
        if metric is None:
            names = list(self.rows[0])
            metric = names[min(3, len(names) - 1)]
        return report.line_figure(
            path,
            self.column("epsilon"),
            {metric: self.column(metric)},
            f"epsilon: {NORMS[self.norm]} of each sample's perturbation",
            metric,
            title=f"Under attack ({self.attack})",
        )


def evaluate_robustness(
    model: keras.layers.Layer,
    x: Tensor,
    y: Tensor | None = None,
    epsilons: Sequence[float] = (0.0, 0.1, 0.3, 1.0),
    attack: Any = "fgm",
    embedding_name: str | None = None,
    *,
    relative: bool = False,
    steps: int = 5,
    batch_size: int | None = None,
    sample_weight: Tensor | None = None,
    verbose: str | int = "auto",
    max_batches: int | None = None,
    callbacks: Any = None,
    padding_mask: Any = None,
    norm: str = "l2",
    bounds: Any = None,
) -> Robustness:
    """Evaluates a compiled model on inputs perturbed to raise its loss.

    Each sample is moved by a perturbation of its own, of norm at most ε over
    all its positions and features (padding is left alone), at the output of the
    embedding or at a floating input:

        fgm:  Δ = ε u(0)
        pgd:  Δ₀ = 0,  Δₖ₊₁ = P(Δₖ + α u(Δₖ)),  α = ε min(1, 2.5 / steps)

    u(Δ) is the sample's gradient of the loss at Δ, divided by its L2 norm, and
    P scales a Δ that is longer than ε to the norm ε. With the maximum norm u is
    the gradient's sign, and P clips each coordinate. Attack and evaluation run
    the model as `predict` does (no dropout, moving averages in
    BatchNormalization), so the results do not depend on the batch size, and
    those at ε = 0 are those of `evaluate`.

    The model's variables keep their values, also after an error. The call runs
    as the model was compiled (`run_eagerly`, `jit_compile`), with as many
    shapes as `evaluate`: two, or one where the batch size divides the number of
    samples.

    Args:
        model: A compiled `keras.Model`, trained in any way.
        x: What `evaluate` takes: arrays, a `tf.data.Dataset`, a `PyDataset`,
            a generator, texts for a model that preprocesses them.
        y: The targets likewise; `None` if the model's losses need none.
        epsilons: Numbers ≥ 0, the strengths.
        attack: `"fgm"` (one step) or `"pgd"` (`steps` steps).
        embedding_name: What to perturb: the name or path of a layer, whose
            output is perturbed, or the name of a floating input. `None` finds
            the token embedding, or else takes the floating inputs.
        relative: Boolean. Whether `epsilons` are multiples of the mean norm of
            an embedded token (`mean_norm` of the result), which makes models
            comparable whose embeddings differ in scale.
        steps: Integer ≥ 1, the steps of `"pgd"`.
        batch_size: Integer ≥ 1. `None`: 32, or what a dataset has.
        sample_weight: `(n,)`, weights of the samples in loss and metrics, or
            `None`.
        verbose: `"auto"`, 0, 1 or 2, as for `evaluate`.
        max_batches: Integer ≥ 1, or `None`: after how many batches to stop
            (`steps` of `evaluate`); needed where a dataset does not end.
        callbacks: List of Keras callbacks, as for `evaluate`.
        padding_mask: The name of the input that is 1 at real positions and 0 at
            padding. `None` finds a mask of the model.
        norm: `"l2"`, or `"linf"` for the maximum norm, as is used for images.
        bounds: `(low, high)`, the range of a floating input, such as (0, 1) of
            images: a perturbed value does not leave it. `None`: no bounds.

    Returns:
        A `Robustness`: `rows`, `table()`, `plot(path)`.

    Raises:
        ValueError: for a model that is not compiled or has nothing to perturb,
            on arguments out of range, on `bounds` where no input is perturbed,
            and on `relative` with the maximum norm.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile(loss=loss, metrics=["accuracy"])
    >>> x = np.random.default_rng(0).normal(size=(64, 2))
    >>> result = evaluate_robustness(
    ...     model, x, x[:, 0] > 0, epsilons=(0, 0.5, 1), verbose=0
    ... )
    >>> clean, _, attacked = result.column("loss")
    >>> clean < attacked
    True

    Reference:
        [Miyato et al., 2017](https://arxiv.org/abs/1605.07725) (fgm);
        [Madry et al., 2018](https://arxiv.org/abs/1706.06083) (pgd, in the
        maximum norm); [blog post 7234](https://kexue.fm/archives/7234)
    """
    _check_compiled(model)
    epsilons = _epsilons(epsilons)
    check_choice("attack", attack, ATTACKS)
    check_name("embedding_name", embedding_name)
    check_name("padding_mask", padding_mask)
    relative = check_boolean("relative", relative)
    check_choice("norm", norm, NORMS)
    bounds = check_bounds("bounds", bounds)
    if relative and norm != "l2":
        raise ValueError(
            "Expected norm='l2' with relative=True, since the vectors are "
            f"measured in it. Received: norm={norm!r}, relative=True"
        )
    steps = check_integer("steps", steps, minimum=1)
    data = {
        "x": x,
        "y": y,
        "sample_weight": sample_weight,
        "batch_size": _count("batch_size", batch_size),
        "steps": _count("max_batches", max_batches),
    }
    if relative and hasattr(x, "__next__"):
        raise ValueError(
            "With relative=True the data is read twice: first to measure the "
            "norms. Give something that can be read again, such as arrays or a "
            f"dataset. Received: x={x!r}"
        )
    _check_lengths(x, y, sample_weight)
    run = AttackRun(model, embedding_name, padding_mask, norm, bounds)
    scale = 1.0
    if relative:
        lengths = Mean()

        def measure(mapping, batch):
            lengths.add(*run.measure(mapping, batch)[2])
            return {"mean_norm": lengths.result()}

        training.evaluate_with(model, measure, verbose=0, **data)
        scale = lengths.result()
    tally = Tally(
        run,
        [epsilon * scale for epsilon in epsilons],
        steps if attack == "pgd" else 1,
    )
    training.evaluate_with(
        model,
        tally.add,
        verbose=check_verbose(verbose),
        callbacks=callbacks,
        **data,
    )
    return Robustness(
        tally.rows(),
        attack,
        tally.mean_norm.result(),
        tally.unmoved.result(),
        norm,
    )


def _check_compiled(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected `model` to be a compiled `keras.Model`. "
            f"Received: model={model!r}"
        )
    if not model.compiled:
        raise ValueError(
            "The model has no loss to attack yet. Call `compile` first. "
            f"Received: model {model.name!r}, not compiled"
        )


def _count(name, value):
    return None if value is None else check_integer(name, value, minimum=1)


def _check_lengths(*data):
    """Raises for arrays of unequal lengths; `evaluate` checks the rest."""
    shapes = [a.shape for a in tree.flatten(data) if isinstance(a, np.ndarray)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            "Expected inputs, targets and weights of the same number of "
            f"samples, at least one. Received: arrays of shapes {shapes}"
        )


def _epsilons(values):
    try:
        epsilons = [
            check_number("epsilons", value, minimum=0)
            for value in np.ravel(np.asarray(values)).tolist()
        ]
    except (TypeError, ValueError):
        epsilons = []
    if not epsilons:
        raise ValueError(
            "Expected `epsilons` to be finite numbers of at least 0, at least "
            f"one. Received: epsilons={values!r}"
        )
    return epsilons
