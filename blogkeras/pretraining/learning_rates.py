"""Learning rates that decay from the last layer to the first."""

import re

import keras

from blogkeras.arguments import check_number
from blogkeras.graph import calls, calls_of_blocks
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
        let a schedule change the rate, not a callback.

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
