"""The loss of a method as a function, for training loops of your own."""

from typing import Any, NamedTuple

import keras
from keras import ops

from blogkeras import backend
from blogkeras.adversarial.base import Hook
from blogkeras.outputs import as_loss
from blogkeras.training import Objective


class LossResult(NamedTuple):
    """What a method's loss is made of.

    Attributes:
        loss: Scalar, to be differentiated. Its gradient is that of the method,
            of first order.
        y_pred: The model's outputs, those that metrics are of. Constants.
        parts: Dict of scalars, the parts of the loss as in the logs of `fit`.
    """

    loss: Any
    y_pred: Any
    parts: Any


class LossFunction:
    """The loss of a method on a batch. Made by `adversarial_loss`."""

    def __init__(self, model, loss, hook):
        self.model = model
        self._given, self._loss = loss, _as_loss(loss)
        self._hook = hook

    @backend.as_written
    def __call__(self, x, y=None, sample_weight=None, step=0):
        """The loss, a `LossResult`; state of the model is assigned."""
        model = self.model
        # Under a gradient tape, reading a variable makes the tape watch it.
        before = [backend.read(v) for v in model.non_trainable_variables]
        result, after = self.stateless(
            [backend.read(v) for v in model.trainable_variables],
            before,
            x,
            y,
            sample_weight,
            step,
        )
        for variable, old, new in zip(
            model.non_trainable_variables, before, after, strict=True
        ):
            if new is not old:
                variable.assign(new)
        return result

    @backend.as_written
    def stateless(
        self,
        trainable_variables,
        non_trainable_variables,
        x,
        y=None,
        sample_weight=None,
        step=0,
    ):
        """As `stateless_call` of Keras: values come in, and new ones go out.

        Returns:
            `(result, non_trainable_variables)`, a `LossResult` and new values.
        """
        model = self.model
        state = [
            *zip(
                model.non_trainable_variables,
                non_trainable_variables,
                strict=True,
            )
        ]
        objective = Objective(
            model,
            (x, y, sample_weight),
            state=state,
            iterations=ops.convert_to_tensor(step),
            loss_scale=ops.ones(()),
            loss=self._loss,
            given_loss=self._given,
        )
        weights = [ops.convert_to_tensor(w) for w in trainable_variables]
        evaluation, gradients = self._hook(
            objective, [ops.stop_gradient(w) for w in weights]
        )
        objective.check_gradients(weights, gradients)
        new = {id(v): value for v, value in objective.after(evaluation)}
        loss = backend.with_gradients(evaluation.loss, weights, gradients)
        result = LossResult(
            loss,
            keras.tree.map_structure(ops.stop_gradient, evaluation.y_pred),
            {**objective.parts, **evaluation.parts},
        )
        return result, [new.get(id(v), value) for v, value in state]


def _as_loss(loss):
    if loss is None:
        return None
    try:
        return as_loss(loss)
    except ValueError as error:
        raise ValueError(
            "Expected `loss` to be the loss of one output, a name, a function "
            "or a `keras.losses.Loss`; for several outputs compile the model "
            f"with their losses, and leave it out. Received: loss={loss!r}"
        ) from error


def make_loss_function(model, loss, method, names, masks, joint_norm):
    """A `LossFunction`, with the checks of `adversarial_loss`."""
    if not model.built:
        raise ValueError(
            "Expected a model that is built, so that its weights are there to "
            "be trained: call it on a batch first. Received: model "
            f"{model.name!r}, built=False"
        )
    outputs = getattr(model, "outputs", None) or [None]
    if loss is not None and len(outputs) > 1:
        raise ValueError(
            "Expected no `loss` for a model of several outputs: compile it "
            f"with their losses. Received: loss={loss!r} for the outputs "
            f"{model.output_names}"
        )
    if loss is None and not model.compiled:
        raise ValueError(
            "Expected `loss`, since the model is not compiled with one. "
            "Received: loss=None"
        )
    hook = Hook(method, model, names, masks, joint_norm)
    return LossFunction(model, loss, hook)
