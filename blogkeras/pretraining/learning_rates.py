"""Learning rates that decay from the last layer to the first."""

import re

import keras

from blogkeras.arguments import check_number
from blogkeras.graph import calls, find_blocks


def layerwise_optimizer(model, optimizer, decay=0.8):
    """An optimizer whose learning rate decays from the head to the embedding.

        rate of a layer = rate · decay ** depth

    The depth is 0 for layers after the blocks of a transformer, 1 for the last
    block, L for the first, and L + 1 for layers before it. The paper fine-tunes
    ELECTRA in this way.

    Args:
        model: A functional model, built, with the blocks of a transformer.
        optimizer: A `keras.optimizers.Optimizer`, which is copied for each
            depth, with weight decay and what is excluded from it. It clips
            gradients by `clipnorm` or `clipvalue`; `global_clipnorm` would
            clip each depth by itself, and is refused.
        decay: Float above 0, at most 1.

    Returns:
        A `keras.optimizers.MultiOptimizer`, for `compile`.

    Raises:
        ImportError: where Keras has no `MultiOptimizer` (it came after 3.12;
            3.15 has it).
        ValueError: if nothing is to be trained, or the optimizer cannot be
            copied for a part of the variables.

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
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Expected the optimizer without a loss scale: under the policy "
            "'mixed_float16' `compile` puts one around the result. Received: "
            f"optimizer={optimizer!r}; give its `inner_optimizer`"
        )
    depths = _depths(model)
    paths = {}
    for variable in model.trainable_variables:
        depth = depths.get(id(variable), 0)
        if paths.setdefault(variable.path, depth) != depth:
            raise ValueError(
                "Expected layers of different depth to have different names: "
                "Keras tells variables by their paths. Received: "
                f"{variable.path!r} at the depths {paths[variable.path]} and "
                f"{depth}"
            )
    if not paths:
        raise ValueError(
            "Expected a model with variables to train. Received: "
            f"{model.name!r}, of which everything is frozen"
        )
    optimizers = {}
    for depth in sorted(set(paths.values())):
        # One pattern for each depth, so that each optimizer is saved once.
        pattern = "|".join(
            re.escape(path) for path, at in paths.items() if at == depth
        )
        optimizers[pattern] = _scaled(optimizer, decay**depth)
    default = next(iter(optimizers.values()))
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(default, optimizers)
    )


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
    config = optimizer.get_config()
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
    copy = type(optimizer).from_config({**config, "learning_rate": rate})
    # Keras leaves these out of the configuration.
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(optimizer, name):
            setattr(copy, name, getattr(optimizer, name))
    return copy


def _depths(model):
    """The depth of each variable by its id, without those of depth 0."""
    model, blocks = find_blocks(model)
    depths = {}
    for layer in _before(model, blocks[0].input):
        depths.update((id(v), len(blocks) + 1) for v in layer.variables)
    # A block that is used several times has the depth of its last use.
    for i, block in enumerate(blocks):
        for layer in block.layers:
            depths.update((id(v), len(blocks) - i) for v in layer.variables)
    return depths


def _before(model, tensor):
    """The layers that a tensor is computed by."""
    makers = {id(x): call for call in calls(model) for x in call.outputs}
    waiting, found = [tensor], {}
    while waiting:
        call = makers.get(id(waiting.pop()))
        if call is not None and call not in found:
            found[call] = call.operation
            waiting += call.input_tensors
    return [x for x in found.values() if isinstance(x, keras.Layer)]
