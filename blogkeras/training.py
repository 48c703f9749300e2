"""The only module that replaces a train step, in place, on one model.

A method that takes gradients at more than one point (adversarial training, a
gradient penalty, virtual adversarial training, two networks in turn) is written
once, for every backend, as a pure *hook*:

    hook(objective, weights) -> (evaluation, gradients)

`objective` is the batch's loss as a function of the weights, and of whatever
else the hook changes: values of variables, outputs of layers, the batch itself.
Each call of it gives an `evaluation`. The one that the hook returns is
*committed*: its loss and predictions are reported, and its state updates
(BatchNormalization, seeds, metrics) are assigned. The other evaluations change
nothing. `gradients` go to the optimizer, one for each of
`model.trainable_variables`. The hook may compute them in any way, so two
networks with two losses are one hook.

Plain training is the hook

    lambda objective, weights: objective.value_and_grad(objective, weights)

and gives the weights of Keras's own `fit` to the bit.
"""

import contextlib
import functools
import inspect
import threading
import types
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.state import StepSeed


class Evaluation(NamedTuple):
    """The results of one evaluation of the objective.

    Attributes:
        loss: Scalar, as `compute_loss` gave it.
        y_pred: The model's outputs.
        updates: The new state; opaque, for `install` to commit.
    """

    loss: Any
    y_pred: Any
    updates: Any


class Objective:
    """The loss of one batch as a pure function. Made by the train step.

    Attributes:
        model: The model in training.
        data: `(x, y, sample_weight)` of the batch.
        iterations: Scalar integer tensor, the optimizer's update count.
    """

    def __init__(self, model, data, state, iterations, loss_scale):
        self.model = model
        self.data = keras.utils.unpack_x_y_sample_weight(data)
        self.iterations = iterations
        self._state = state
        self._loss_scale = loss_scale
        self._scopes = []

    def __call__(self, weights, values=(), perturb=None, data=None):
        """Evaluates the model and its loss; changes nothing.

        All evaluations of a step start from the same state, so they share
        their dropout masks.

        Args:
            weights: Values for `model.trainable_variables`.
            values: Pairs `(variable, value)` that come before `weights` and
                before the current values: any variable, trainable or not.
            perturb: Dict `{layer: fn}`: the output of each call of the layer
                becomes `fn(output, *args, **kwargs)`, with the arguments of the
                call.
            data: `(x, y, sample_weight)` in place of the batch.

        Returns:
            `(loss, evaluation)`, as `value_and_grad` wants them.
        """
        model = self.model
        x, y, sample_weight = self.data if data is None else data
        mapping = [
            *self._state,
            # Regularizers read their variable from the scope: map them all.
            *zip(model.trainable_variables, weights, strict=True),
            *values,
        ]
        with (
            backend.RecordingScope(mapping) as scope,
            perturbed(perturb or {}),
        ):
            # Keras's JAX trainer runs `call`, its TensorFlow trainer
            # `__call__`; in half precision the two differ.
            forward = model.call if backend.BACKEND == "jax" else model
            y_pred = forward(x, **_training_argument(model.call))
            self._require_loss()
            loss = model.compute_loss(
                x=x,
                y=y,
                y_pred=y_pred,
                sample_weight=sample_weight,
                **_training_argument(model.compute_loss),
            )
        # Keras recognizes a layer's `add_loss` tensors by `id`. Keep them
        # alive: a deleted tensor's `id` may be given to one of the next
        # evaluation.
        self._scopes.append(scope)
        if backend.BACKEND == "tensorflow":
            updates = list(scope.assigned.values())
        else:
            # An update is what the model assigned. A variable that it did not
            # assign keeps the value of the state, not one given by `values`.
            updates = [
                scope.assigned.get(id(v), (v, value))[1]
                for v, value in self._state
            ]
        return loss, Evaluation(loss, y_pred, updates)

    def value_and_grad(self, fn, args):
        """Gradient of an objective, safe under loss scaling.

        Args:
            fn: `fn(args)` returns `(loss, evaluation)`.
            args: Nested structure of tensors.

        Returns:
            `(evaluation, gradients)`. Under a `LossScaleOptimizer` the
            gradients are the scaled ones that the optimizer expects; `unscale`
            gives the true ones.
        """

        def scaled(args):
            loss, evaluation = fn(args)
            return loss * ops.cast(self._loss_scale, loss.dtype), evaluation

        (_, evaluation), gradients = backend.value_and_grad(
            scaled, args, unconnected="none"
        )
        return evaluation, gradients

    def unscale(self, gradient):
        """Divides a gradient from `value_and_grad` by the loss scale."""
        return gradient / ops.cast(self._loss_scale, gradient.dtype)

    def seed(self, seed):
        """A seed for `keras.random` that changes with every update.

        It needs no variable in the model: draws are numbered from the
        optimizer's update count, so a resumed run goes on with the same ones.
        The micro-batches of an accumulated update share them.

        Args:
            seed: Integer.
        """
        return StepSeed(seed, self.iterations)

    def value(self, weights, variable):
        """The value of a variable, trainable or not, in this step."""
        index = self.index(variable)
        if index is not None:
            return weights[index]
        for candidate, value in self._state:
            if candidate is variable:
                return value
        return ops.convert_to_tensor(variable)

    def _require_loss(self):
        model = self.model
        computes_own = type(model).compute_loss is not keras.Model.compute_loss
        if model.loss is None and not computes_own and not model.losses:
            raise ValueError(
                "The model has no loss to train on. Pass `loss=` to `compile`, "
                "or call `add_loss` in a layer. Received: loss=None for model "
                f"{model.name!r}"
            )

    def index(self, variable):
        """The place of a variable in `weights`; `None` if it is frozen."""
        for index, candidate in enumerate(self.model.trainable_variables):
            if candidate is variable:
                return index
        return None


def install(model, hook):
    """Makes `fit` and `train_on_batch` of this very model train by `hook`.

    The model keeps its class. `compile` may come before or after. `save`,
    `load_model`, pickle and `clone_model` ignore the hook: they give a model
    with Keras's own train step. Installing again replaces the hook, also from a
    callback in the middle of `fit`.

    Args:
        model: A `keras.Model` with Keras's own train step.
        hook: Pure function, see the head of this module. It may have an
            attribute `version`: where that has changed, the step is traced
            anew, since a compiled step keeps the numbers it was traced with.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a `keras.Model`, since the training step of `fit` is "
            f"what changes. Received: {model!r}"
        )
    for name in ("train_step", "make_train_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"{type(model).__name__} has a `{name}` of its own, which "
                "would be bypassed. Express it through `compute_loss` or "
                "`add_loss`, or call the method's function inside it. "
                f"Received: {model!r}"
            )
    if keras.config.is_nnx_enabled():
        raise ValueError(
            "Keras's NNX mode takes the train step from the class and would "
            "ignore this one. Unset KERAS_NNX_ENABLED. Received: "
            "keras.config.is_nnx_enabled()=True"
        )

    made_for = None

    def make_train_function(self, force=False):
        nonlocal made_for
        version = getattr(hook, "version", None)
        if self.train_function is None or force or made_for != version:
            made_for = version
            # A new function every time: `jax.jit` caches by function, so the
            # same one would keep the optimizer and loss of the last `compile`.
            self.train_step = types.MethodType(_make_step(hook), self)
            try:
                type(self).make_train_function(self, force=True)
            finally:
                del self.train_step
            self.train_function = _keep_version(
                self, hook, _keep_state(self, self.train_function)
            )

    make_train_function.hook = hook
    model.make_train_function = types.MethodType(make_train_function, model)
    _start_anew(model)


def installed(model):
    """The hook that the model trains by, or `None`."""
    function = model.__dict__.get("make_train_function")
    return getattr(function, "hook", None)


def uninstall(model):
    """Gives the model back its own train step."""
    if installed(model) is not None:
        del model.make_train_function
        _start_anew(model)


def _start_anew(model):
    """Drops the compiled step; inside of `fit` a new one takes its place."""
    if model.train_function is not None:
        if backend.BACKEND == "jax":
            # Within `fit` the variables are empty; this fills them.
            model.jax_state_sync()
        model.train_function = None
        model.make_train_function()


def _keep_version(model, hook, train_function):
    """The step, traced again where the hook's version has changed."""
    if not hasattr(hook, "version"):
        return train_function
    version = hook.version

    def current(*args):
        if hook.version == version:
            return train_function(*args)
        model.make_train_function(force=True)
        return model.train_function(*args)

    return current


def evaluate_with(model, visit, **data):
    """Hands the batches that `model.evaluate` would see to a function.

    So the function works on everything that `evaluate` takes: arrays,
    `tf.data`, `PyDataset`, raw texts of a model that preprocesses. The model's
    variables have their old values afterwards, also after an error.

    Args:
        model: A compiled `keras.Model` with Keras's own test step.
        visit: Function `(mapping, batch) -> logs`. `mapping` is a list of pairs
            `(variable, value)`: on JAX the variables are empty meanwhile.
            `batch` is `(x, y, sample_weight)`; `logs` is a dict of numbers, for
            the progress bar.
        data: Arguments of `evaluate`.

    Raises:
        ValueError: If the model has a test step of its own.
    """
    for name in ("test_step", "make_test_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"{type(model).__name__} has a `{name}` of its own, which "
                "would be bypassed. Express it through `compute_loss` or "
                f"`compute_metrics`. Received: {model!r}"
            )
    saved = [(v, ops.copy(v.value)) for v in model.metrics_variables]
    if backend.BACKEND == "jax":
        saved += [(v, v.value) for v in model.variables]
    test_function = model.test_function

    def visit_all(mapping, iterator):
        logs = None
        for _, data in zip(
            range(model.steps_per_execution), iterator, strict=False
        ):
            batch = keras.utils.unpack_x_y_sample_weight(
                backend.whole_batch(data)
            )
            logs = visit(mapping, batch)
        if logs is None:
            raise StopIteration
        return logs

    if backend.BACKEND == "jax":

        def function(state, iterator):
            variables = (
                model.trainable_variables,
                model.non_trainable_variables,
                model.metrics_variables,
            )
            mapping = [
                pair
                for part, values in zip(variables, state, strict=True)
                for pair in zip(part, values, strict=True)
            ]
            return visit_all(mapping, iterator), state

    else:

        def function(iterator):
            return visit_all(
                [(v, backend.read(v)) for v in model.variables],
                iterator,
            )

    model.make_test_function = lambda force=False: None
    model.test_function = function
    try:
        model.evaluate(**data)
    finally:
        del model.make_test_function
        model.test_function = test_function
        if backend.BACKEND == "jax":
            model._jax_state = None
        for variable, value in saved:
            variable.assign(value)


def step_memory(model, x, y):
    """The peak memory of a training step of a model, in bytes.

    On TensorFlow a step is run to measure it, which trains the model.

    Args:
        model: A compiled `keras.Model`, built, its optimizer too.
        x: One batch of inputs.
        y: Its targets.

    Returns:
        Number of bytes, weights and batch included. NaN on TensorFlow without a
        GPU, where it cannot be measured.
    """
    hook, step = installed(model), model.train_step
    if hook is not None:
        step = functools.partial(_make_step(hook), model)
    return backend.step_memory(model, step, x, y)


if backend.BACKEND == "tensorflow":

    def _make_step(hook):
        def train_step(model, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            optimizer = model.optimizer
            _refuse_what_keras_cannot(optimizer)
            _build(model, x)
            objective = Objective(
                model,
                data,
                # Variables that are not mapped are read where they are: under
                # a distribution strategy each replica has its own.
                state=[],
                iterations=ops.convert_to_tensor(optimizer.iterations),
                loss_scale=optimizer.scale_loss(ops.ones(())),
            )
            variables = model.trainable_variables
            weights = [backend.read(v) for v in variables]
            evaluation, gradients = hook(objective, weights)
            for variable, value in evaluation.updates:
                variable.assign(value)
            # Each replica's loss is its share of the sum; report the mean.
            model._loss_tracker.update_state(
                evaluation.loss * backend.num_replicas(),
                sample_weight=_batch_size(x),
            )
            if variables:
                optimizer.apply(gradients, variables)
            return model.compute_metrics(x, y, evaluation.y_pred, sample_weight)

        return train_step

    def _keep_state(model, train_function):
        return train_function  # variables are assigned inside the step

    def _build(model, x):
        # `fit` on TensorFlow builds layers and optimizer inside the step, but
        # the weights are needed before it. `model.built` is not enough: a
        # subclassed model can be built with layers that are not.
        if model.optimizer.built:
            return
        model(
            tree.map_structure(
                lambda t: (
                    None
                    if t is None
                    else keras.KerasTensor(
                        t.shape, keras.backend.standardize_dtype(t.dtype)
                    )
                ),
                x,
            )
        )
        model.optimizer.build(model.trainable_variables)

    def _refuse_what_keras_cannot(optimizer):
        """Raises for two kinds of optimizers that fail in Keras's own `fit`."""
        if backend.num_replicas() == 1:
            return
        if optimizer.gradient_accumulation_steps:
            raise ValueError(
                "Keras cannot accumulate gradients under a TensorFlow "
                "distribution strategy. Remove `gradient_accumulation_steps`. "
                "Received: gradient_accumulation_steps="
                f"{optimizer.gradient_accumulation_steps}"
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "Keras's loss scaling looks at the first replica only, so an "
                "overflow in another one destroys the weights. Use the policy "
                '"mixed_bfloat16", or one replica. Received: '
                "LossScaleOptimizer under a distribution strategy"
            )

elif backend.BACKEND == "jax":

    def _make_step(hook):
        def train_step(model, state, data):
            weights, non_trainable, optimizer_state, metrics = state
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            optimizer = model.optimizer
            with keras.StatelessScope(
                [*zip(optimizer.variables, optimizer_state, strict=True)]
            ):
                loss_scale = optimizer.scale_loss(ops.ones(()))
                iterations = ops.convert_to_tensor(optimizer.iterations)
            objective = Objective(
                model,
                data,
                state=[
                    *zip(
                        model.non_trainable_variables,
                        non_trainable,
                        strict=True,
                    ),
                    *zip(model.metrics_variables, metrics, strict=True),
                ],
                iterations=iterations,
                loss_scale=loss_scale,
            )
            evaluation, gradients = hook(objective, weights)
            count = len(non_trainable)
            non_trainable = evaluation.updates[:count]
            metrics = evaluation.updates[count:]
            if weights:
                weights, optimizer_state = optimizer.stateless_apply(
                    optimizer_state, gradients, weights
                )
            logs, metrics = model._update_metrics_variables(
                metrics,
                evaluation.loss,
                x,
                y,
                evaluation.y_pred,
                sample_weight,
            )
            return logs, (weights, non_trainable, optimizer_state, metrics)

        return train_step

    def _keep_state(model, train_function):
        """Keeps the weights when a step is interrupted.

        Keras's JAX trainer takes the values out of the variables while `fit`
        runs and puts back those in `_jax_state`, which it sets after the step:
        an exception in the first step would lose every weight.
        """

        def keep(state):
            values = tree.flatten(state)
            if not any(value.is_deleted() for value in values):
                trainable, non_trainable, optimizer, metrics = state
                model._jax_state = {
                    "trainable_variables": trainable,
                    "non_trainable_variables": non_trainable,
                    "optimizer_variables": optimizer,
                    "metrics_variables": metrics,
                }

        def kept(state, iterator):
            try:
                logs, new_state = train_function(state, iterator)
                keep(new_state)
                return logs, new_state
            except BaseException:
                keep(state)
                raise

        return kept


def _batch_size(x):
    return ops.shape(next(t for t in tree.flatten(x) if t is not None))[0]


def _training_argument(fn):
    parameters = inspect.signature(fn).parameters.values()
    accepts = any(
        p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters
    )
    return {"training": True} if accepts else {}


# `tf.distribute` runs each replica in a thread of its own and may switch
# between threads where replicas exchange values, as in a synchronized
# BatchNormalization.
_local = threading.local()


class _StandIn:
    """Stands in for `layer.call` while the objective is evaluated."""

    def __init__(self, layer, method):
        self.layer = layer
        self.call = getattr(layer, method)
        self.users = 0

    def __call__(self, *args, **kwargs):
        output = self.call(*args, **kwargs)
        fn = getattr(_local, "perturb", {}).get(id(self.layer))
        if fn is None:
            return output
        new = fn(output, *args, **kwargs)
        # Some layers set the mask of their output in `call`.
        for before, after in zip(
            tree.flatten(output), tree.flatten(new), strict=True
        ):
            mask = backend.get_keras_mask(before)
            if mask is not None and after is not before:
                backend.set_keras_mask(after, mask)
        return new


@contextlib.contextmanager
def perturbed(perturb):
    """Within, and in this thread, layers' outputs pass through functions.

    Args:
        perturb: Dict `{layer: fn}`, as in `Objective.__call__`.
    """
    before = getattr(_local, "perturb", {})
    _local.perturb = {id(layer): fn for layer, fn in perturb.items()}
    methods = {layer: _called_method(layer) for layer in perturb}
    for layer, method in methods.items():
        stand_in = layer.__dict__.get(method)
        if not isinstance(stand_in, _StandIn):
            stand_in = _StandIn(layer, method)
            object.__setattr__(layer, method, stand_in)
        stand_in.users += 1
    try:
        yield
    finally:
        _local.perturb = before
        for layer, method in methods.items():
            stand_in = layer.__dict__[method]
            stand_in.users -= 1
            if not stand_in.users:
                object.__delattr__(layer, method)


def _called_method(layer):
    """The name of the method that Keras calls; quantized, it is another."""
    is_quantized = getattr(layer, "quantization_mode", None) is not None
    return "quantized_call" if is_quantized else "call"
