"""Learning rates that decay from the last layer to the first."""

import keras

from blogkeras.arguments import check_number
from blogkeras.graph import Untracked, calls, calls_of_blocks
from blogkeras.optimizers import SkipNonFinite, copied_optimizer


def layerwise_optimizer(model, optimizer, decay=0.8, boundaries=None):
    """An optimizer whose learning rate decays from the head to the embedding.

        rate of a layer = rate · decay ** depth

    The depth is 0 for layers after the blocks of a transformer, 1 for the last
    block, L for the first, and L + 1 for layers outside of the blocks that the
    blocks depend on: embeddings, relative positions. The paper fine-tunes
    ELECTRA in this way.

    Args:
        model: A functional model, built, with the blocks of a transformer.
        optimizer: A `keras.optimizers.Optimizer`, which is copied for each
            depth, with weight decay and what is excluded from it. It clips
            gradients by `clipnorm` or `clipvalue`; `global_clipnorm` would
            clip each depth by itself, and is refused. A `SkipNonFinite` is put
            around the result, so that it drops the step of all depths.
        decay: Float above 0, at most 1.
        boundaries: The tensors or layers before the first block and after each,
            as for `cut_model`. `None` finds the blocks by the names that
            bert4keras and KerasHub give them.

    Returns:
        A `keras.optimizers.MultiOptimizer`, for `compile`, inside of a
        `SkipNonFinite` if one was given. It has no learning rate of its own:
        let a schedule change the rate, not a callback. A file of the model has
        the depth of each of its variables.

    Raises:
        ImportError: where Keras has no `MultiOptimizer` (it came after 3.12;
            3.15 has it).
        ValueError: if nothing is to be trained, the optimizer cannot be copied
            for a part of the variables, or no blocks are found; give
            `boundaries` then.

    Example:

    >>> def transformer(blocks):
    ...     inputs = keras.Input((8,), dtype="int32")
    ...     x = layers.Embedding(20, 8, name="embedding")(inputs)
    ...     for i in range(blocks):
    ...         x = layers.Dense(8, name=f"transformer_layer_{i}")(x)
    ...     return keras.Model(inputs, x)
    >>> model = transformer(3)
    >>> optimizer = layerwise_optimizer(model, keras.optimizers.AdamW(1e-4))
    >>> model.compile(optimizer, "mse")

    Reference:
        [Clark et al., 2020](https://arxiv.org/abs/2003.10555), appendix
    """
    decay = check_number("decay", decay, above=0, maximum=1)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Expected `optimizer` to be a Keras optimizer. Received: "
            f"optimizer={optimizer!r}"
        )
    if isinstance(optimizer, SkipNonFinite):
        inner = layerwise_optimizer(
            model, optimizer.inner_optimizer, decay, boundaries
        )
        return SkipNonFinite(inner, optimizer.name)
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        raise ImportError(
            "Expected a Keras with `keras.optimizers.MultiOptimizer`, such as "
            f"3.15. Received: Keras {keras.__version__}"
        )
    if optimizer.global_clipnorm is not None:
        raise ValueError(
            "Expected an optimizer without `global_clipnorm`, since each depth "
            "has an optimizer that would clip by its own gradients; take "
            "`clipnorm`. Received: "
            f"global_clipnorm={optimizer.global_clipnorm}"
        )
    if optimizer.loss_scale_factor is not None:
        raise ValueError(
            "Expected an optimizer without `loss_scale_factor`, which Keras's "
            "`MultiOptimizer` does not take on. Received: loss_scale_factor="
            f"{optimizer.loss_scale_factor}"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Expected the optimizer without a loss scale: under the policy "
            "'mixed_float16' `compile` puts one around the result. Received: "
            f"optimizer={optimizer!r}; give its `inner_optimizer`"
        )
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "Expected one optimizer, which is copied for each depth. "
            f"Received: optimizer={optimizer!r}"
        )
    depths = _depths(model, boundaries)
    variables = model.trainable_variables
    if not variables:
        raise ValueError(
            "Expected a model with variables to train. Received: "
            f"{model.name!r}, of which everything is frozen"
        )
    depths = [depths.get(id(v), 0) for v in variables]
    levels = sorted(set(depths))
    return LayerwiseOptimizer(
        [_scaled(optimizer, decay**depth) for depth in levels],
        [levels.index(depth) for depth in depths],
        variables,
    )


# `layerwise_optimizer` says so where Keras has none.
_MultiOptimizer = getattr(
    keras.optimizers, "MultiOptimizer", keras.optimizers.Optimizer
)


@keras.saving.register_keras_serializable(package="blogkeras")
class LayerwiseOptimizer(_MultiOptimizer):  # type: ignore[valid-type]
    """An optimizer for each depth: what `layerwise_optimizer` returns.

    Args:
        optimizers: List of `keras.optimizers.Optimizer`s.
        numbers: List of integers, for each variable the number of its
            optimizer. A file has these: the paths of variables, by which
            Keras's `OptimizerMap` goes, change when a model is loaded.
        variables: List of as many variables. Where it is built for none of
            them, as it is in a loaded model, it goes by their order.
        name: String.
    """

    def __init__(self, optimizers, numbers, variables=None, name=None):
        choice = _Choice(optimizers)
        super().__init__(choice, name=name)
        self.choice = choice
        self.numbers = list(numbers)
        self.known = Untracked(list(variables or []))

    def build(self, var_list):
        if self.built:
            return
        known = dict(zip(map(id, self.known.value), self.numbers, strict=False))
        if any(id(v) in known for v in var_list):
            # Some may have been frozen since. Those that are trained along, of
            # a model around the model, have the first optimizer.
            self.numbers = [known.get(id(v), 0) for v in var_list]
        if len(var_list) != len(self.numbers):
            raise ValueError(
                f"Expected the {len(self.numbers)} variables that the "
                "optimizer was made for; make it anew by "
                "`layerwise_optimizer`. "
                f"Received: {len(var_list)} variables"
            )
        places = zip(var_list, self.numbers, strict=True)
        self.choice.places = {id(v): number for v, number in places}
        super().build(var_list)

    def get_config(self):
        return {
            "optimizers": [
                keras.saving.serialize_keras_object(optimizer)
                for optimizer in self.choice.values()
            ],
            "numbers": self.numbers,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizers = [
            keras.saving.deserialize_keras_object(optimizer, custom_objects)
            for optimizer in config["optimizers"]
        ]
        return cls(optimizers, config["numbers"], name=config["name"])


class _Choice:
    """Which optimizer a variable has, in place of Keras's `OptimizerMap`."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        self.places = {}

    def values(self):
        return self.optimizers

    def __call__(self, variable):
        return self.optimizers[self.places[id(variable)]]


@keras.saving.register_keras_serializable(package="blogkeras")
class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning-rate schedule times a factor."""

    def __init__(self, schedule, factor):
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step):
        return self.factor * self.schedule(step)

    def get_config(self):
        schedule = keras.saving.serialize_keras_object(self.schedule)
        return {"schedule": schedule, "factor": self.factor}

    @classmethod
    def from_config(cls, config):
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(schedule, config["factor"])


def _scaled(optimizer, factor):
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = ScaledSchedule(rate, factor)
    elif callable(rate):
        raise ValueError(
            "Expected a learning rate that is a number or a Keras schedule, "
            f"which can be saved. Received: {rate!r}"
        )
    else:
        rate = float(optimizer.learning_rate) * factor
    return copied_optimizer(optimizer, learning_rate=rate)


def _depths(model, boundaries):
    """The depth of each variable by its id, without those of depth 0."""
    model, blocks = calls_of_blocks(model, boundaries)
    count, depths = len(blocks), {}
    needed = [x for block in blocks for c in block for x in c.input_tensors]
    for call in _before(model, needed):
        _set_depth(depths, call, count + 1)
    # A layer that several blocks use has the depth of its last use.
    for i, block in enumerate(blocks):
        for call in block:
            _set_depth(depths, call, count - i)
    return depths


def _set_depth(depths, call, depth):
    variables = getattr(call.operation, "variables", ())
    depths.update((id(v), depth) for v in variables)


def _before(model, tensors):
    """The calls that tensors are computed by."""
    makers = {id(x): call for call in calls(model) for x in call.outputs}
    waiting, found = list(tensors), set()
    while waiting:
        call = makers.get(id(waiting.pop()))
        if call is not None and call not in found:
            found.add(call)
            waiting += call.input_tensors
    return found
