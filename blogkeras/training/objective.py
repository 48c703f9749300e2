"""The loss of a batch as a pure function of weights, values and outputs."""

import inspect
import weakref
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.state import StepSeed
from blogkeras.training.perturbation import perturbed


class Evaluation(NamedTuple):
    """The results of one evaluation of the objective.

    Attributes:
        loss: Scalar, as `compute_loss` gave it.
        y_pred: The model's outputs.
        updates: The new state; opaque, for `install` to commit.
        parts: Dict of scalars by name, parts of the loss for the logs. The
            hook names all that there may be in its attribute `parts`.
    """

    loss: Any
    y_pred: Any
    updates: Any
    parts: Any


class Objective:
    """The loss of one batch as a pure function. Made by the train step.

    Attributes:
        model: The model in training.
        data: `(x, y, sample_weight)` of the batch.
        iterations: Scalar integer tensor, the optimizer's update count.
        parts: Dict, to which a hook may add losses of passes outside of any
            gradient, for the logs. Those inside of one are `Evaluation.parts`.
    """

    def __init__(
        self,
        model,
        data,
        state,
        iterations,
        loss_scale,
        loss=None,
        given_loss=None,
    ):
        self.model = model
        # In place of the compiled one: a `keras.losses.Loss`, and what it was
        # made of, from which the meaning of the outputs can be read.
        self._loss = loss
        self.given_loss = given_loss
        self.data = keras.utils.unpack_x_y_sample_weight(data)
        self.iterations = iterations
        self._state = state
        self._loss_scale = loss_scale
        self._scopes = []
        self.parts = {}

    def __call__(self, weights, values=(), perturb=None, data=None):
        """Evaluates the model and its loss; changes nothing.

        All evaluations of a step start from the same state, so they share
        their dropout masks.

        Args:
            weights: Values for `model.trainable_variables`; `None`: their own.
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
        mapping = [*self._state, *values]
        if weights is not None:
            # Regularizers read their variable from the scope: map them all.
            pairs = zip(model.trainable_variables, weights, strict=True)
            mapping = [*self._state, *pairs, *values]
        with (
            backend.RecordingScope(mapping) as scope,
            perturbed(perturb or {}, model),
        ):
            if weights is None:
                # Regularizers find no variable that is not in the scope. Layers
                # still read the variables themselves.
                own = {id(v): v.value for v in model.trainable_variables}
                scope.state_mapping = {**own, **scope.state_mapping}
            # Keras's JAX trainer runs `call`, its TensorFlow trainer
            # `__call__`; in half precision the two differ.
            forward = model.call if backend.BACKEND == "jax" else model
            y_pred = forward(x, **_training_argument(model.call))
            loss = self._loss_of(x, y, y_pred, sample_weight)
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
        return loss, Evaluation(loss, y_pred, updates, {})

    def after(self, evaluation):
        """The state that an evaluation leaves, for one that follows on it.

        Args:
            evaluation: The `Evaluation`.

        Returns:
            Pairs `(variable, value)`, for the argument `values`. The second
            evaluation then draws other dropout masks.
        """
        if backend.BACKEND == "tensorflow":
            return evaluation.updates
        return [
            (variable, value)
            for (variable, _), value in zip(
                self._state, evaluation.updates, strict=True
            )
        ]

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

    def check_gradients(self, weights, gradients):
        """Raises where weights have a gradient in plain training alone.

        Weights are passed as values. What computes a gradient of its own from
        the variables that it reads, as `tf.recompute_grad` does, sees none.

        Args:
            weights: List of tensors.
            gradients: List of their gradients, `None` where there is none.
        """
        model = self.model
        if (
            all(gradient is not None for gradient in gradients)
            or backend.BACKEND == "jax"
            or backend.num_replicas() > 1
            or model in _checked
        ):
            return
        variables, lost = model.trainable_variables, []

        def look():
            _, passed = self.value_and_grad(self, weights)
            read = backend.gradients_of_variables(
                lambda: self(None)[0], variables
            )
            lost[:] = [
                variable.path
                for variable, own, other in zip(
                    variables, passed, read, strict=True
                )
                if own is None and other is not None
            ]

        if backend.is_concrete(weights):
            look()  # not every model that runs eagerly can be traced
        else:
            backend.trace(look)
        if lost:
            raise ValueError(
                "Expected weights whose gradients pass through the layers. On "
                "TensorFlow they do not pass through `keras.remat`, a "
                "`keras.RematScope`, `tf.recompute_grad` and "
                "`tf.custom_gradient` where these read variables. Leave them "
                "out, or compute again with `backend.remat` of blogkeras. "
                f"Received: no gradient for {', '.join(lost)}"
            )
        _checked.add(model)

    def value(self, weights, variable):
        """The value of a variable, trainable or not, in this step."""
        index = self.index(variable)
        if index is not None:
            return weights[index]
        for candidate, value in self._state:
            if candidate is variable:
                return value
        return ops.convert_to_tensor(variable)

    def _loss_of(self, x, y, y_pred, sample_weight):
        model = self.model
        if self._loss is not None:
            y, y_pred, sample_weight = map(_only, (y, y_pred, sample_weight))
            # Keras's losses are each replica's share of the mean.
            loss = self._loss(y, y_pred, sample_weight=sample_weight)
            for added in model.losses:
                added = ops.sum(ops.cast(added, loss.dtype))
                loss += added / backend.num_replicas()
            return loss
        self._require_loss()
        # By position, as Keras does: an override may name them otherwise.
        return model.compute_loss(
            x,
            y,
            y_pred,
            sample_weight,
            **_training_argument(model.compute_loss),
        )

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


# Models in which weights without a gradient have none in `fit` of Keras.
_checked = weakref.WeakSet()


def _only(value):
    """The one tensor, which may be in a list or dict."""
    flat = tree.flatten(value)
    if len(flat) != 1:
        raise ValueError(
            "Expected one output with one target, since `loss` is that of one: "
            "compile a model of several outputs with their losses, and give "
            "labels as an array or tensor, not as a list of numbers. Received: "
            f"{len(flat)} tensors"
        )
    return flat[0]


def _training_argument(fn):
    parameters = inspect.signature(fn).parameters.values()
    accepts = any(
        p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters
    )
    return {"training": True} if accepts else {}
