"""The train step of each backend, which trains by a hook.

`make_step(hook)` returns the pure step that Keras's trainer compiles, and
`keep_state(model, train_function)` the compiled one with the care that it needs
when it is interrupted.
"""

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.training.objective import Objective
from blogkeras.training.parts import find_parts

if backend.BACKEND == "tensorflow":

    def make_step(hook):
        """A pure train step `(model, ..., data)` that trains by a hook."""

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
            objective.check_gradients(weights, gradients)
            for variable, value in evaluation.updates:
                variable.assign(value)
            # Each replica's loss is its share of the sum; report the mean.
            model._loss_tracker.update_state(
                evaluation.loss * backend.num_replicas(),
                sample_weight=_batch_size(x),
            )
            parts, tracker = _parts(objective, evaluation), find_parts(model)
            if parts and tracker is not None:
                tracker.update_state(
                    {k: v * backend.num_replicas() for k, v in parts.items()},
                    sample_weight=_batch_size(x),
                )
            if variables:
                # As Keras does: some optimizers override it.
                optimizer.apply_gradients(
                    zip(gradients, variables, strict=True)
                )
            logs = model.compute_metrics(x, y, evaluation.y_pred, sample_weight)
            if parts and tracker is not None:
                logs = tracker.add_to(logs, parts)
            return logs

        return train_step

    def keep_state(model, train_function):
        """The step itself, which assigns variables inside."""
        return train_function

    def fill_variables(model, state):
        """Nothing: variables have their values all the time."""

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
        # An optimizer around another one says nothing of how that one does it.
        inner = getattr(optimizer, "inner_optimizer", None)
        steps = optimizer.gradient_accumulation_steps or getattr(
            inner, "gradient_accumulation_steps", None
        )
        if steps:
            raise ValueError(
                "Keras cannot accumulate gradients under a TensorFlow "
                "distribution strategy. Remove `gradient_accumulation_steps`. "
                f"Received: gradient_accumulation_steps={steps}"
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "Keras's loss scaling looks at the first replica only, so an "
                "overflow in another one destroys the weights. Use the policy "
                '"mixed_bfloat16", or one replica. Received: '
                "LossScaleOptimizer under a distribution strategy"
            )

elif backend.BACKEND == "jax":

    def make_step(hook):
        """A pure train step `(model, ..., data)` that trains by a hook."""

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
            parts, tracker = _parts(objective, evaluation), find_parts(model)
            if parts and tracker is not None:
                variables = model.metrics_variables
                with keras.StatelessScope(
                    [*zip(variables, metrics, strict=True)]
                ) as scope:
                    tracker.update_state(parts, sample_weight=_batch_size(x))
                    logs = tracker.add_to(logs, parts)
                metrics = [
                    value
                    if (new := scope.get_current_value(v)) is None
                    else new
                    for v, value in zip(variables, metrics, strict=True)
                ]
            return logs, (weights, non_trainable, optimizer_state, metrics)

        return train_step

    def keep_state(model, train_function):
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

    def fill_variables(model, state):
        """Gives the variables the values of a step's state, within `fit`."""
        variables = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        for part, values in zip(variables, state, strict=True):
            for variable, value in zip(part, values, strict=True):
                variable.assign(value)


def _parts(objective, evaluation):
    return {**objective.parts, **evaluation.parts}


def _batch_size(x):
    return ops.shape(next(t for t in tree.flatten(x) if t is not None))[0]
