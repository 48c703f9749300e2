"""The compiled functions of `evaluate_robustness`, and their sums."""

import inspect
import math

import keras
from keras import ops, tree

from blogkeras import backend, training
from blogkeras.adversarial.base import check_bounded
from blogkeras.adversarial.finding import find_site
from blogkeras.adversarial.norms import (
    at_least_float32,
    bounded,
    per_sample,
    sample_norms,
    scaled,
    shifted,
)


class AttackRun:
    """Attacks batches of a model; its functions are pure in the model's state.

    Args:
        model: A compiled `keras.Model`.
        name: What to perturb, or `None`.
        padding_mask: The name of the input that marks padding, or `None`.
        norm: `"l2"` or `"linf"`, the norm of a sample's perturbation.
        bounds: `(low, high)` of a floating input, or `None`.
    """

    def __init__(
        self, model, name=None, padding_mask=None, norm="l2", bounds=None
    ):
        self.model = model
        self._norm = norm
        self._bounds = bounds
        self._where = (name, "output", padding_mask)
        self.site = None
        self._variables = None

    def measure(self, mapping, batch):
        """`(origin, mask, (sum of norms, count))` at the site."""
        self._prepare(mapping, batch)
        return self._measure(self._state(mapping), _tensors(batch))

    def ascend(self, mapping, batch, origin, mask, point, epsilon, rate):
        """`(point, still)`: a step within the unit ball, see `_ascend`."""
        return self._ascend(
            self._state(mapping),
            _tensors(batch),
            origin,
            mask,
            point,
            _scalar(epsilon),
            _scalar(rate),
        )

    def evaluate(self, mapping, batch, metrics, origin, point, epsilon):
        """`(loss, metrics)` at origin + epsilon · point."""
        return self._evaluate(
            self._state(mapping),
            _tensors(batch),
            metrics,
            origin,
            point,
            _scalar(epsilon),
        )

    def _prepare(self, mapping, batch):
        """Runs once, at the first batch: before it a model may not be built."""
        if self.site is not None:
            return
        if backend.BACKEND == "tensorflow":
            _build(self.model, batch)  # on JAX `evaluate` has done it
        self._variables = [
            *self.model.variables,
            *self.model.metrics_variables,
        ]
        self.site = find_site(self.model, *self._where)
        check_bounded(self._bounds, self.site)
        self._measure = self._jit(self._measure)
        self._ascend = self._jit(self._ascend)
        self._evaluate = self._jit(self._evaluate)

    def _jit(self, fn):
        if self.model.run_eagerly:
            return fn
        return backend.jit(fn, xla=self.model.jit_compile)

    def _state(self, mapping):
        values = {id(variable): value for variable, value in mapping}
        return [
            values[id(v)] if id(v) in values else ops.convert_to_tensor(v)
            for v in self._variables
        ]

    def _mapping(self, state):
        return [*zip(self._variables, state, strict=True)]

    def _measure(self, state, batch):
        objective = _Inference(self.model, batch, self._mapping(state))
        origin = self.site.origin(objective, [])
        check_bounded(self._bounds, self.site)  # known from here on
        size = _length(batch)
        for x in origin:
            if len(x.shape) == 0 or (
                x.shape[0] is not None and x.shape[0] != size
            ):
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
        """The values at the site, and whether they are a layer's output."""
        _, kwargs = self.site.at(objective, [], origin)
        if "perturb" not in kwargs:
            return origin, False
        # At an `OutputSite` the values are offsets with origin zero: run the
        # model to get the outputs.
        ((layer, add),) = kwargs["perturb"].items()
        values = []

        def record(output, *args, **kwargs):
            moved = add(output, *args, **kwargs)
            values.extend(
                after
                for before, after in zip(
                    tree.flatten(output), tree.flatten(moved), strict=True
                )
                if after is not before
            )
            return moved

        objective([], perturb={layer: record})
        return values, True

    def _ascend(self, state, batch, origin, mask, point, epsilon, rate):
        """Moves `point` by `rate` uphill, and back into the unit ball."""
        objective = _Inference(self.model, batch, self._mapping(state))
        size = _length(batch)

        def at(point):
            _, kwargs = self.site.at(objective, [], point)
            # Of the sum over the batch the gradients are larger, and keep more
            # digits in half precision.
            loss, _ = objective([], **kwargs)
            return loss * ops.cast(size, loss.dtype), None

        start = self._moved(origin, point, epsilon)
        if self._bounds is not None:
            point = _offsets(origin, start, point, epsilon)
        _, gradients = backend.value_and_grad(at, start)
        gradients = [
            at_least_float32(backend.dense(g)) * m
            for g, m in zip(gradients, mask, strict=True)
        ]
        norm = sample_norms(gradients)
        usable = ops.logical_and(norm > 0, ops.isfinite(norm))
        still = ops.cast(ops.logical_not(usable), "float32")
        norm = ops.where(usable, norm, ops.ones_like(norm))
        point = [
            p
            + ops.where(
                per_sample(usable, g),
                ops.cast(rate, g.dtype) * self._direction(g, norm),
                ops.zeros_like(g),
            )
            for p, g in zip(point, gradients, strict=True)
        ]
        return self._within_ball(point), ops.sum(still)

    def _direction(self, gradient, norm):
        """The direction of steepest ascent, of norm 1."""
        if self._norm == "linf":
            return ops.sign(gradient)
        return gradient / per_sample(norm, gradient)

    def _within_ball(self, point):
        """The nearest points of norm at most 1."""
        if self._norm == "linf":
            return [ops.clip(p, -1.0, 1.0) for p in point]
        length = ops.maximum(sample_norms(point), 1.0)
        return [p / per_sample(length, p) for p in point]

    def _moved(self, origin, point, epsilon):
        moved = shifted(origin, scaled(epsilon, point))
        return bounded(moved, origin, self._bounds)

    def _evaluate(self, state, batch, metrics, origin, point, epsilon):
        mapping = [
            *self._mapping(state),
            *zip(self.model.metrics_variables, metrics, strict=True),
        ]
        objective = _Inference(self.model, batch, mapping)
        moved = self._moved(origin, point, epsilon)
        _, kwargs = self.site.at(objective, [], moved)
        loss, evaluation = objective([], **kwargs)
        return loss, evaluation.updates

    def initial_metrics(self, mapping):
        """The metrics' variables as after `reset_metrics`."""
        with backend.RecordingScope([*mapping]) as scope:
            self.model.reset_metrics()
            return [_current(scope, v) for v in self.model.metrics_variables]

    def metric_results(self, values):
        """The metrics without the loss, as `evaluate` returns them."""
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
            training.perturbed(perturb or {}, model),
        ):
            loss, y_pred = _forward(model, x, y, sample_weight)
            updates = [_current(scope, v) for v in model.metrics_variables]
        self._scopes.append(scope)
        return loss, training.Evaluation(loss, y_pred, updates, {})


class Tally:
    """Sums up the batches of an evaluation at several strengths.

    Args:
        run: An `AttackRun`.
        epsilons: List of floats.
        steps: Integer, steps of the attack.
    """

    def __init__(self, run, epsilons, steps):
        self._run = run
        self._epsilons = epsilons
        self._steps = steps
        self._losses = [Mean() for _ in epsilons]
        self._metrics = None
        self.mean_norm = Mean()
        self.unmoved = Mean()

    def add(self, mapping, batch):
        """Attacks one batch; returns the losses so far, by strength."""
        run = self._run
        origin, mask, norms = run.measure(mapping, batch)
        if self._metrics is None:
            initial = run.initial_metrics(mapping)
            self._metrics = [initial for _ in self._epsilons]
        self.mean_norm.add(*norms)
        size = _length(batch)
        rate = min(1.0, 2.5 / self._steps)
        zero = [ops.zeros_like(m) for m in mask]
        # Points are offsets divided by epsilon. So the first step, from the
        # origin, is the same for every epsilon and is computed once.
        first, still = run.ascend(mapping, batch, origin, mask, zero, 0.0, rate)
        self.unmoved.add(still, size)
        for index, epsilon in enumerate(self._epsilons):
            point = first
            for _ in range(self._steps - 1):
                point, _ = run.ascend(
                    mapping, batch, origin, mask, point, epsilon, rate
                )
            loss, self._metrics[index] = run.evaluate(
                mapping, batch, self._metrics[index], origin, point, epsilon
            )
            self._losses[index].add(float(loss) * size, size)
        return {
            f"loss at {epsilon:.3g}": loss.result()
            for epsilon, loss in zip(self._epsilons, self._losses, strict=True)
        }

    def rows(self):
        """The rows of a `Robustness`."""
        mean_norm = self.mean_norm.result()
        return [
            {
                "epsilon": epsilon,
                "relative_epsilon": epsilon / mean_norm
                if mean_norm
                else math.nan,
                "loss": loss.result(),
                **self._run.metric_results(values),
            }
            for epsilon, loss, values in zip(
                self._epsilons, self._losses, self._metrics, strict=True
            )
        ]


class Mean:
    """A running mean, from sums and counts."""

    def __init__(self):
        self.total = self.count = 0.0

    def add(self, total, count):
        self.total += float(total)
        self.count += float(count)

    def result(self):
        return self.total / self.count if self.count else math.nan


class _Build(keras.layers.Layer):
    """Runs a model symbolically, which makes the metrics' variables."""

    def __init__(self, model):
        super().__init__(name="build")
        self._model = lambda: model  # not a sublayer

    def call(self, x, y=None, sample_weight=None):
        with backend.RecordingScope([]):  # collects what `add_loss` is given
            return _forward(self._model(), x, y, sample_weight)[1]


def _build(model, batch):
    # Take shapes and dtypes from the tensors: JAX has no int64.
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
        x,
        y,
        y_pred,
        sample_weight,
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


def _offsets(origin, moved, point, epsilon):
    """The offsets of `moved` divided by epsilon; `point` where it is 0."""
    return [
        ops.where(
            ops.cast(epsilon, p.dtype) > 0,
            (ops.cast(m, p.dtype) - ops.cast(x, p.dtype))
            / ops.maximum(ops.cast(epsilon, p.dtype), 1e-30),
            p,
        )
        for x, m, p in zip(origin, moved, point, strict=True)
    ]


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


def _length(data):
    return next(a for a in tree.flatten(data) if a is not None).shape[0]
