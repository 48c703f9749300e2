"""State of layers and models that is not trained.

It is saved, resumed and the same on every replica.
"""

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import as_numpy, check_seed

# 2³² divided by the golden ratio and by the square root of 3. Their small
# multiples are far from each other and from 0 modulo 2³².
_GOLDEN = 0x9E3779B9
_STREAM = 0x93CD3A2D


class StepSeed(keras.random.SeedGenerator):
    """The seeds of one training step; holds no variable.

    The k-th draw of step t has the seed (seed + k c, t) modulo 2³², where c is
    2³² divided by the golden ratio. So draws depend on two numbers that are
    saved, and a resumed run goes on with the draws of one that was never
    stopped. With c = 1 the second draw of seed 0 would be the first of seed 1.

    Args:
        seed: Integer, or a scalar integer tensor.
        step: Scalar integer tensor.
    """

    def __init__(self, seed, step):
        # Not the parent's constructor: it would make a variable.
        self._draws = 0
        self._seed = seed
        self._step = step

    def next(self, ordered=True):
        seed, shift = self._seed, self._draws * _GOLDEN
        self._draws += 1
        if isinstance(seed, int):
            seed = (seed + shift) % 2**32
        else:
            seed = seed + _wrapped(shift)
        return ops.stack(
            [ops.cast(seed, "uint32"), ops.cast(self._step, "uint32")]
        )


class NumberedDraws:
    """Numbers the random draws of a layer or model by a saved count.

    Keras does not save the state of a `SeedGenerator` in a `.keras` file, so
    after `load_model` the noise would start anew. Here the seed and the count
    of steps are two weights of the owner.

    Args:
        owner: Layer or model that gets the weights `draw_seed` and
            `iterations`, scalars of int32.
        seed: Integer, `None` or a `keras.random.SeedGenerator`, whose first
            seed is taken.
        prefix: String put before the names of the weights; needed where an
            owner numbers two kinds of draws.

    Attributes:
        seed: The weight `draw_seed`.
        iterations: The weight `iterations`: how many steps have drawn.

    Example:

    >>> class Noise(keras.layers.Layer):
    ...     def __init__(self, seed=None, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.draws = NumberedDraws(self, seed)
    ...
    ...     def call(self, x, training=False):
    ...         if not training:
    ...             return x
    ...         seed = self.draws.next_step()
    ...         return x + keras.random.normal(keras.ops.shape(x), seed=seed)
    """

    def __init__(self, owner, seed=None, prefix=""):
        if seed is None:
            # A new one, which `keras.utils.set_random_seed` decides.
            seed = keras.random.SeedGenerator()
        if isinstance(seed, keras.random.SeedGenerator):
            seed = ops.convert_to_numpy(seed.state.value)[0]
        # Each replica counts for itself: they count alike.
        self.seed, self.iterations = (
            owner.add_weight(
                (),
                keras.initializers.Constant(start),
                "int32",
                trainable=False,
                name=prefix + name,
            )
            for name, start in (
                ("draw_seed", int(seed) % 2**31),
                ("iterations", 0),
            )
        )

    def next_step(self):
        """The seeds of this step, a `StepSeed`; counts the step."""
        seed = StepSeed(
            ops.convert_to_tensor(self.seed.value),
            # A copy: on TensorFlow the variable's own tensor would follow the
            # assignment below.
            ops.copy(self.iterations.value),
        )
        self.iterations.assign_add(1)
        return seed

    def evaluation(self, numbers):
        """The seeds of a batch that is not trained on, a `StepSeed`.

        They depend on the batch alone, so evaluating twice gives the same
        result, and nothing is counted.

        Args:
            numbers: Integer tensor that is known of each batch: its tokens.
        """
        total = ops.sum(ops.cast(numbers, "int32"))
        return StepSeed(
            ops.convert_to_tensor(self.seed.value),
            backend.all_reduce_sum(total),
        )


def stream_seed(seed, number):
    """A seed whose draws are apart from those of other streams and seeds.

    Args:
        seed: Scalar int32 tensor.
        number: Integer, or a scalar int32 tensor. 0 gives the seed itself.

    Returns:
        Scalar int32 tensor.
    """
    if isinstance(number, int):
        return seed + _wrapped(number * _STREAM)
    return seed + number * _wrapped(_STREAM)


def _wrapped(number):
    """The integer of int32 with the same last 32 bits: int32 wraps around."""
    number %= 2**32
    return number - 2**32 * (number >= 2**31)


def draw_rows(draw, shape, seed):
    """Random numbers for the rows of a batch that replicas may share.

    All replicas draw the numbers of the whole batch and each takes its own
    rows, so two replicas see the noise that one would see.

    Args:
        draw: `keras.random.normal`, `keras.random.uniform` or the like.
        shape: `(rows, ...)`; the number of rows may be a tensor.
        seed: As for `keras.random`.

    Returns:
        Tensor of that shape.

    Example:

    >>> draw_rows(keras.random.normal, (4, 2), seed=0).shape
    (4, 2)
    """
    replicas = backend.num_replicas()
    if replicas == 1:
        return draw(shape, seed=seed)
    return draw((replicas, *shape), seed=seed)[backend.replica()]


def snapshot(variables):
    """NumPy copies of the values of variables, in their own dtypes."""
    return [np.array(ops.convert_to_numpy(v.value)) for v in variables]


def separate(model):
    """Gives each variable of a model an array of its own.

    At the end of `fit` Keras hands the moving averages of an optimizer to the
    weights. On JAX both then have the same array, and `fit` and `evaluate` give
    the arrays of weights away: the next `fit` would be refused, and a model
    that was evaluated, or is a part of another one that was trained, could not
    be saved.
    """
    found = {id(v): v for v in model.variables}
    for part in model._flatten_layers():
        optimizer = getattr(part, "optimizer", None)
        if isinstance(optimizer, keras.optimizers.Optimizer):
            found |= {id(v): v for v in optimizer.variables}
    taken = set()
    for variable in found.values():
        if id(variable.value) in taken:
            variable.assign(ops.copy(variable.value))
        taken.add(id(variable.value))


def base_seed(seed):
    """A scalar of int32 from what Keras takes as a seed."""
    seed = check_seed("seed", seed)
    if seed is None:
        # A new one, which `keras.utils.set_random_seed` decides.
        seed = keras.random.SeedGenerator()
    if isinstance(seed, keras.random.SeedGenerator):
        seed = int(as_numpy(seed.next()).astype("int64").sum())
    return ops.convert_to_tensor(seed % 2**31, "int32")
