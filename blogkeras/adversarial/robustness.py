"""How a model fares under attack: loss and metrics at several strengths."""

import dataclasses
import inspect
import math

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend, report, training
from blogkeras.adversarial import sites
from blogkeras.adversarial.methods import at_least_float32, whole

ATTACKS = ("fgm", "pgd")


@dataclasses.dataclass(frozen=True)
class Robustness(report.Rows):
    """What `evaluate_robustness` found.

    Attributes:
        rows: One dict for each strength: `"epsilon"`, `"relative_epsilon"`
            (epsilon / `mean_norm`), `"loss"` and the model's metrics, as
            `evaluate` names them.
        attack: `"fgm"` or `"pgd"`.
        mean_norm: Mean L2 norm of the vectors that were perturbed: of the
            embedded tokens without padding; of whole samples where a floating
            input is perturbed.
        unmoved: Share of the samples that no attack could move because their
            gradient is exactly zero or not finite. If it is not small, the
            rows say little: a saturated softmax hides the gradient, attack
            logits instead.
    """

    attack: str
    mean_norm: float
    unmoved: float

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
            "epsilon: L2 norm of each sample's perturbation",
            metric,
            title=f"Under attack ({self.attack})",
        )


def evaluate_robustness(
    model,
    x,
    y=None,
    epsilons=(0.0, 0.1, 0.3, 1.0),
    attack="fgm",
    embedding_name=None,
    *,
    relative=False,
    steps=5,
    batch_size=32,
    sample_weight=None,
    verbose="auto",
):
    """Evaluates a compiled model where its loss is made worse.

    Each sample is moved by a perturbation of its own, of L2 norm at most ε over
    all its positions and features (padding is left alone), at the output of the
    embedding or at a floating input:

        fgm:  Δ = ε u(0)
        pgd:  Δ₀ = 0,  Δₖ₊₁ = P(Δₖ + α u(Δₖ)),  α = ε min(1, 2.5 / steps)

    u(Δ) is the sample's gradient of the loss at Δ, divided by its L2 norm, and
    P scales what is longer than ε back to ε. Attack and evaluation see the
    model as `predict` does (no dropout, moving statistics), so that the figures
    do not depend on the batch size, and those at ε = 0 are `evaluate`'s.

    Nothing of the model is assigned, however the call ends. It runs compiled
    with XLA, unless the model was compiled with `run_eagerly=True`, and sees as
    many shapes as `evaluate`: two, or one where the batch size divides the
    number of samples.

    Args:
        model: A compiled `keras.Model`, trained in any way.
        x: The inputs: an array, or a list, tuple or dict of arrays.
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
        batch_size: Integer ≥ 1.
        sample_weight: Weights as for `evaluate`.
        verbose: 0 for silence; a progress bar otherwise.

    Returns:
        A `Robustness`: `rows`, `table()`, `plot(path)`.

    Example:

    >>> result = evaluate_robustness(model, x, y, epsilons=(0, 0.5, 1))
    >>> result.table()
    >>> result.column("accuracy")

    Reference:
        [Miyato et al., 2017](https://arxiv.org/abs/1605.07725) (fgm);
        [Madry et al., 2018](https://arxiv.org/abs/1706.06083) (pgd, there in
        the maximum norm); [blog post 7234](https://kexue.fm/archives/7234)
    """
    epsilons = _epsilons(epsilons)
    if attack not in ATTACKS:
        raise ValueError(
            f"Expected `attack` to be one of {', '.join(map(repr, ATTACKS))}. "
            f"Received: attack={attack!r}"
        )
    steps = whole("steps", steps, minimum=1) if attack == "pgd" else 1
    if not model.compiled:
        raise ValueError(
            "The model has no loss to attack yet. Call `compile` first. "
            f"Received: model {model.name!r}, not compiled"
        )
    data = tree.map_structure(_array, (x, y, sample_weight))
    batches = _batches(data, whole("batch_size", batch_size, minimum=1))
    run = _Run(model, embedding_name, batches[0])
    work = len(batches) * len(epsilons)
    progress = keras.utils.Progbar(
        work, verbose=1 if verbose == "auto" else verbose, unit_name="batch"
    )

    mean_norm = _Mean()
    if relative:
        for batch in batches:
            mean_norm.add(*run.measure(batch)[2])
    scale = mean_norm.result() if relative else 1.0
    losses = [_Mean() for _ in epsilons]
    metrics = [run.initial_metrics() for _ in epsilons]
    unmoved = _Mean()
    for batch in batches:
        origin, mask, norms = run.measure(batch)
        if not relative:
            mean_norm.add(*norms)
        size = _length(batch)
        rate = min(1.0, 2.5 / steps)
        zero = [ops.zeros_like(m) for m in mask]
        # In units of epsilon, the first step is the same for all.
        first, still = run.ascend(batch, origin, mask, zero, 0.0, rate)
        unmoved.add(still, size)
        for index, epsilon in enumerate(epsilons):
            point = first
            for _ in range(steps - 1):
                point, _ = run.ascend(
                    batch, origin, mask, point, epsilon * scale, rate
                )
            loss, metrics[index] = run.evaluate(
                batch, metrics[index], origin, point, epsilon * scale
            )
            losses[index].add(float(loss) * size, size)
            progress.add(1)

    mean_norm = mean_norm.result()
    rows = [
        {
            "epsilon": epsilon * scale,
            "relative_epsilon": epsilon * scale / mean_norm
            if mean_norm
            else math.nan,
            "loss": loss.result(),
            **run.metric_results(values),
        }
        for epsilon, loss, values in zip(epsilons, losses, metrics, strict=True)
    ]
    return Robustness(rows, attack, mean_norm, unmoved.result())


class _Run:
    """The compiled functions of one evaluation, pure in the model's state."""

    def __init__(self, model, name, batch):
        _build(model, batch)
        self.model = model
        self.site = sites.find_site(model, name, "output")
        self.variables = model.variables
        self.state = [ops.convert_to_tensor(v) for v in self.variables]
        self._measure = self._jit(self._measure)
        self._ascend = self._jit(self._ascend)
        self._evaluate = self._jit(self._evaluate)

    def _jit(self, fn):
        if self.model.run_eagerly:
            return fn
        return backend.jit(fn)

    def measure(self, batch):
        """`(origin, mask, (sum of norms, count))` at the site."""
        return self._measure(self.state, _tensors(batch))

    def ascend(self, batch, origin, mask, point, epsilon, rate):
        """`(point, still)`: a step within the unit ball, see `_ascend`."""
        return self._ascend(
            self.state,
            _tensors(batch),
            origin,
            mask,
            point,
            _scalar(epsilon),
            _scalar(rate),
        )

    def evaluate(self, batch, metrics, origin, point, epsilon):
        """`(loss, metrics)` at origin + epsilon · point."""
        return self._evaluate(
            self.state,
            _tensors(batch),
            metrics,
            origin,
            point,
            _scalar(epsilon),
        )

    def _measure(self, state, batch):
        objective = _Inference(self.model, batch, self._mapping(state))
        origin = self.site.origin(objective, [])
        size = _length(batch)
        for x in origin:
            if len(x.shape) == 0 or x.shape[0] != size:
                raise ValueError(
                    "Each sample has its own perturbation, so the first axis "
                    "of what is perturbed must be the batch. Name another "
                    "layer as `embedding_name`. Received: an output of shape "
                    f"{tuple(x.shape)} for a batch of {size}"
                )
        mask = self.site.mask(
            [ops.ones_like(at_least_float32(x)) for x in origin]
        )
        values, is_output = self._values(objective, origin)
        norms = counts = 0.0
        for value, m in zip(values, mask, strict=True):
            axis = -1 if is_output else tuple(range(1, len(value.shape)))
            squares = ops.sum(ops.square(at_least_float32(value) * m), axis)
            norms += ops.sum(ops.sqrt(squares))
            counts += ops.sum(ops.max(m, axis))
        return origin, mask, (norms, counts)

    def _values(self, objective, origin):
        """What stands at the site, and whether it is a layer's output."""
        _, kwargs = self.site.at(objective, [], origin)
        if "perturb" not in kwargs:
            return origin, False
        # The origin of an output is an offset of zero.
        ((layer, add),) = kwargs["perturb"].items()
        values = []

        def record(output, *args, **kwargs):
            value = add(output, *args, **kwargs)
            if value is not output:
                values.append(value)
            return value

        objective([], perturb={layer: record})
        return values, True

    def _ascend(self, state, batch, origin, mask, point, epsilon, rate):
        """Moves `point` by `rate` uphill, and back into the unit ball."""
        objective = _Inference(self.model, batch, self._mapping(state))
        size = _length(batch)

        def at(point):
            _, kwargs = self.site.at(objective, [], point)
            # The sum over the batch: small numbers keep more of their digits.
            return objective([], **kwargs)[0] * size, None

        start = _moved(origin, point, epsilon)
        _, gradients = backend.value_and_grad(at, start)
        gradients = [
            at_least_float32(backend.dense(g)) * m
            for g, m in zip(gradients, mask, strict=True)
        ]
        norm = _sample_norms(gradients)
        usable = ops.logical_and(norm > 0, ops.isfinite(norm))
        still = ops.cast(ops.logical_not(usable), "float32")
        norm = ops.where(usable, norm, ops.ones_like(norm))
        point = [
            p + rate * ops.where(_like(usable, g), g / _like(norm, g), 0.0)
            for p, g in zip(point, gradients, strict=True)
        ]
        length = ops.maximum(_sample_norms(point), 1.0)
        return [p / _like(length, p) for p in point], ops.sum(still)

    def _evaluate(self, state, batch, metrics, origin, point, epsilon):
        mapping = [
            *self._mapping(state),
            *zip(self.model.metrics_variables, metrics, strict=True),
        ]
        objective = _Inference(self.model, batch, mapping)
        _, kwargs = self.site.at(objective, [], _moved(origin, point, epsilon))
        loss, evaluation = objective([], **kwargs)
        return loss, evaluation.updates

    def _mapping(self, state):
        return [*zip(self.variables, state, strict=True)]

    def initial_metrics(self):
        """The metrics' variables as after `reset_metrics`."""
        with backend.RecordingScope([]) as scope:
            self.model.reset_metrics()
            return [_current(scope, v) for v in self.model.metrics_variables]

    def metric_results(self, values):
        """The metrics but the loss, as `evaluate` returns them."""
        mapping = zip(self.model.metrics_variables, values, strict=True)
        with backend.RecordingScope([*mapping]):
            logs = self.model.get_metrics_result()
        return {
            name: tree.map_structure(_number, value)
            for name, value in logs.items()
            if name != "loss"
        }


class _Inference:
    """A `training.Objective` of the model as `predict` and `evaluate` see it.

    The updates of an evaluation are the new values of the metrics' variables.
    """

    def __init__(self, model, data, mapping):
        self.model = model
        self.data = data
        self._mapping = mapping
        self._scopes = []  # see `training.Objective`

    def __call__(self, weights, values=(), perturb=None, data=None):
        model = self.model
        x, y, sample_weight = self.data if data is None else data
        with (
            backend.RecordingScope([*self._mapping, *values]) as scope,
            training.perturbed(perturb or {}),
        ):
            loss, y_pred = _forward(model, x, y, sample_weight)
            updates = [_current(scope, v) for v in model.metrics_variables]
        self._scopes.append(scope)
        return loss, training.Evaluation(loss, y_pred, updates)


class _Build(keras.layers.Layer):
    """Runs a model symbolically, which makes the metrics' variables."""

    def __init__(self, model):
        super().__init__(name="build")
        self._model = lambda: model  # not a sublayer

    def call(self, x, y=None, sample_weight=None):
        return _forward(self._model(), x, y, sample_weight)[1]


def _build(model, batch):
    # Of the tensors: JAX has no int64.
    x, y, sample_weight = tree.map_structure(
        lambda t: (
            None
            if t is None
            else keras.KerasTensor(
                t.shape, keras.backend.standardize_dtype(t.dtype)
            )
        ),
        _tensors(batch),
    )
    _Build(model).compute_output_spec(x, y=y, sample_weight=sample_weight)


def _forward(model, x, y, sample_weight):
    # As Keras's own test steps do: they differ in half precision.
    call = model.call if backend.BACKEND == "jax" else model
    y_pred = call(x, **_inference(model.call))
    loss = model.compute_loss(
        x=x,
        y=y,
        y_pred=y_pred,
        sample_weight=sample_weight,
        **_inference(model.compute_loss),
    )
    model.compute_metrics(x, y, y_pred, sample_weight)
    return loss, y_pred


def _inference(fn):
    parameters = inspect.signature(fn).parameters.values()
    accepts = any(
        p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters
    )
    return {"training": False} if accepts else {}


def _moved(origin, point, epsilon):
    return [
        x + ops.cast(epsilon * p, x.dtype)
        for x, p in zip(origin, point, strict=True)
    ]


def _sample_norms(tensors):
    """One norm for each sample, over all the tensors: `(batch,)`."""
    return ops.sqrt(
        sum(
            ops.sum(ops.square(x), axis=tuple(range(1, len(x.shape))))
            for x in tensors
        )
    )


def _like(values, x):
    """One value for each sample, broadcastable to `x`."""
    return ops.reshape(values, (-1,) + (1,) * (len(x.shape) - 1))


class _Mean:
    def __init__(self):
        self.total = self.count = 0.0

    def add(self, total, count):
        self.total += float(total)
        self.count += float(count)

    def result(self):
        return self.total / self.count if self.count else math.nan


def _current(scope, variable):
    value = scope.get_current_value(variable)
    return ops.convert_to_tensor(variable if value is None else value)


def _number(value):
    value = ops.convert_to_numpy(value)
    return float(value) if value.ndim == 0 else value


def _scalar(value):
    return ops.convert_to_tensor(value, "float32")


def _tensors(batch):
    return tree.map_structure(
        lambda a: None if a is None else ops.convert_to_tensor(a), batch
    )


def _array(a):
    """NumPy, floats in Keras's precision, as `evaluate` takes them."""
    if a is None:
        return None
    a = ops.convert_to_numpy(a)
    is_float = np.issubdtype(a.dtype, np.floating)
    return a.astype(keras.config.floatx()) if is_float else a


def _leaves(data):
    return [a for a in tree.flatten(data) if a is not None]


def _length(data):
    return _leaves(data)[0].shape[0]


def _batches(data, batch_size):
    lengths = {len(a) if a.ndim else 0 for a in _leaves(data)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "Expected inputs, targets and weights of the same number of "
            "samples, at least one. Received: arrays of shapes "
            f"{[a.shape for a in _leaves(data)]}"
        )
    (length,) = lengths
    return [
        tree.map_structure(
            lambda a, i=i: None if a is None else a[i : i + batch_size], data
        )
        for i in range(0, length, batch_size)
    ]


def _epsilons(values):
    try:
        epsilons = [float(v) for v in np.ravel(np.asarray(values, "float64"))]
    except (TypeError, ValueError):
        epsilons = []
    if not epsilons or not all(0 <= e < math.inf for e in epsilons):
        raise ValueError(
            "Expected `epsilons` to be finite numbers of at least 0, at least "
            f"one. Received: epsilons={values!r}"
        )
    return epsilons
