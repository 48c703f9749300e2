"""Optimizers around an optimizer."""

import keras
from keras import ops

from blogkeras import backend


@keras.saving.register_keras_serializable(package="blogkeras")
class SkipNonFinite(keras.optimizers.Optimizer):
    """Drops a training step whose gradients are not finite.

    One NaN or infinity in one gradient would spread to all weights and to the
    optimizer's moments. Here such a step changes neither: weights, moments and
    the count of iterations stay as they were, and `skipped` counts one more.
    With finite gradients the step is that of the optimizer inside.

    On several replicas, a NaN on one of them drops the step of all. If the
    count goes on growing, the training is unstable: take a smaller learning
    rate, or set `global_clipnorm` in the optimizer inside.

    A `LossScaleOptimizer` belongs around it, where `compile` puts one under
    `"mixed_float16"`. It drops such a step itself, to lower its scale, and
    `skipped` does not count that. `SwapEMAWeights` finds the averages of the
    optimizer inside, there and in a `MultiOptimizer`, too.

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, or its name; no
            `LossScaleOptimizer`.
        name: String.

    Attributes:
        skipped: Variable, int32: how many steps were dropped. It is saved.

    Raises:
        ValueError: if `inner_optimizer` is none or a `LossScaleOptimizer`, and
            on clipping, weight decay and the like, which are arguments of the
            optimizer inside.

    Example:

    >>> optimizer = SkipNonFinite(keras.optimizers.SGD(1.0))
    >>> weight = keras.Variable([1.0])
    >>> optimizer.apply([ops.convert_to_tensor([float("nan")])], [weight])
    >>> int(optimizer.skipped), float(weight[0])
    (1, 1.0)

    Reference:
        [Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), who skip
        such steps under loss scaling
    """

    def __init__(self, inner_optimizer, name="skip_non_finite", **kwargs):
        if kwargs:
            raise ValueError(
                "Expected clipping, weight decay and the like as arguments of "
                f"the optimizer inside. Received: {', '.join(kwargs)}"
            )
        if isinstance(inner_optimizer, str):
            inner_optimizer = keras.optimizers.get(inner_optimizer)
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "Expected a Keras optimizer or its name. Received: "
                f"inner_optimizer={inner_optimizer!r}"
            )
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            # Its scale would be put back with the rest of the state.
            raise ValueError(
                "Expected the optimizer inside of the `LossScaleOptimizer`: "
                "LossScaleOptimizer(SkipNonFinite(...)), which `compile` makes "
                "by itself under 'mixed_float16'. Received: "
                f"inner_optimizer={inner_optimizer!r}"
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.skipped = self.add_variable(
            (),
            "zeros",
            "int32",
            aggregation="only_first_replica",
            name="skipped",
        )

    def build(self, variables):
        if self.built:
            return
        self.inner_optimizer.build(variables)
        super().build(variables)
        # `SwapEMAWeights` looks for them here where this optimizer is itself
        # inside of a `LossScaleOptimizer` or `MultiOptimizer`. Not before
        # `build`, which would make averages of its own.
        self.use_ema = self.inner_optimizer.use_ema
        if self.use_ema:
            self._model_variables_moving_average = (
                self.inner_optimizer._model_variables_moving_average
            )

    def apply(self, grads, trainable_variables=None):
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        finite = self._all_finite(grads)
        state = [*variables, *self.inner_optimizer.variables]
        # Copies: on TensorFlow the tensor of a variable would follow the
        # assignments of the step.
        before = [ops.copy(v) for v in state]
        self.inner_optimizer.apply(grads, variables)
        for variable, old in zip(state, before, strict=True):
            new = ops.convert_to_tensor(variable)
            variable.assign(ops.where(finite, new, old))
        self.skipped.assign_add(ops.cast(ops.logical_not(finite), "int32"))

    def _all_finite(self, grads):
        """Whether all gradients of all replicas are finite, one boolean."""
        bad = ops.zeros((), "float32")
        for gradient in grads:
            if gradient is not None:
                # TensorFlow's gradient of a lookup holds its rows in `values`.
                rows = getattr(gradient, "values", gradient)
                broken = ops.logical_not(ops.all(ops.isfinite(rows)))
                bad = ops.maximum(bad, ops.cast(broken, "float32"))
        return backend.all_reduce_sum(bad) == 0

    # The rest is what the optimizer inside has.

    @property
    def variables(self):
        return [*self._variables, *self.inner_optimizer.variables]

    def set_weights(self, weights):
        number = len(self._variables)
        for variable, weight in zip(self._variables, weights, strict=False):
            variable.assign(weight)
        self.inner_optimizer.set_weights(weights[number:])

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects
        )
        return cls(**{**config, "inner_optimizer": inner})


def copied_optimizer(optimizer, **changes):
    """A new optimizer with the arguments of another one.

    It excludes the same from weight decay, too. The optimizer inside of a
    `SkipNonFinite` is copied in the same way.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
        **changes: Other arguments, such as `learning_rate`.
    """
    if isinstance(optimizer, SkipNonFinite):
        inner = copied_optimizer(optimizer.inner_optimizer, **changes)
        return SkipNonFinite(inner, optimizer.name)
    copy = optimizer.from_config({**optimizer.get_config(), **changes})
    # Keras leaves these out of the configuration.
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(optimizer, name):
            setattr(copy, name, getattr(optimizer, name))
    return copy
