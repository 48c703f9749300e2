"""One module that is replaced at random by its successor, and how often."""

import dataclasses
import math
import numbers
from typing import Any

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.backend import get_keras_mask, set_keras_mask
from blogkeras.graph import as_list, freeze

MODES = ("batch", "sample", "mixing", "annealing")


@keras.saving.register_keras_serializable(package="blogkeras")
class LinearReplacement(keras.optimizers.schedules.LearningRateSchedule):
    """A replacement rate that grows in a straight line up to 1.

        rate(t) = min(1, slope · t + start)

    Args:
        slope: Float ≥ 0, the growth per training step.
        start: Float in [0, 1], the rate of the first step.

    Example:

    >>> LinearReplacement(slope=0.0006, start=0.3)(500)  # 0.6

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925), curriculum
        replacement
    """

    def __init__(self, slope, start=0.0):
        super().__init__()
        if not 0 <= slope < math.inf:
            raise ValueError(
                "Expected `slope` to be finite and ≥ 0: the successor takes "
                f"over. Received: slope={slope}"
            )
        self.slope = slope
        self.start = checked_rate(start, "start")

    def __call__(self, step):
        step = ops.cast(step, "float32")
        return ops.minimum(1.0, self.slope * step + self.start)

    def get_config(self):
        return {"slope": self.slope, "start": self.start}


@keras.saving.register_keras_serializable(package="blogkeras")
class CosineReplacement(keras.optimizers.schedules.LearningRateSchedule):
    """A replacement rate that grows along half a cosine wave up to 1.

        rate(t) = 1 - (1 - start) (1 + cos(π min(1, t / steps))) / 2

    Args:
        steps: Integer ≥ 1, the training steps until the rate is 1.
        start: Float in [0, 1], the rate of the first step.

    Example:

    >>> CosineReplacement(steps=1000, start=0.5)(500)  # 0.75
    """

    def __init__(self, steps, start=0.0):
        super().__init__()
        if not steps >= 1:
            raise ValueError(
                f"Expected `steps` to be at least 1. Received: steps={steps}"
            )
        self.steps = steps
        self.start = checked_rate(start, "start")

    def __call__(self, step):
        part = ops.minimum(1.0, ops.cast(step, "float32") / self.steps)
        return 1 - (1 - self.start) * (1 + ops.cos(math.pi * part)) / 2

    def get_config(self):
        return {"steps": self.steps, "start": self.start}


@keras.saving.register_keras_serializable(package="blogkeras")
class ModuleReplacement(keras.layers.Layer):
    """Runs a frozen module or, in its place, the successor that is to learn.

    With the predecessor's output x_p, the successor's x_s, and ε = 1 for the
    predecessor:

        x = ε x_p + (1 - ε) x_s

    The replacement rate r is the probability, or the mean weight, of the
    successor. In training, `mode` says what ε is:

    - `"batch"`: 0 with probability r, else 1; one draw per batch. Only the
      chosen branch is computed, all other modes compute both.
    - `"sample"`: the same with one draw per sample.
    - `"mixing"`: any number in [0, 1], 1 - u^((1-r)/r) with u ~ U(0, 1), which
      has mean 1 - r and is uniform at r = ½; one draw per batch.
    - `"annealing"`: 1 - r, no randomness. Give r a schedule.

    In inference the successor runs alone.

    Both branches take the same inputs and return the same shapes: one tensor or
    a list of tensors. Tensors that both hand on untouched are not mixed; those
    that are not floating are the predecessor's where ε = 1, else the
    successor's. With `"sample"`, an output whose first axis is not the batch (a
    table of positions) is the successor's; it is told by its length, which must
    not be that of the batch, the first output's. Masks go through the branches
    and are chosen as what is not floating. What a branch's layers give to
    `add_loss` counts if the branch runs.

    The predecessor's layers are frozen by this class: `trainable = False`, and
    they run as in inference, without dropout, unless `predecessor_dropout`.

    Args:
        predecessor: A built layer or model, or a list of them, called one after
            another.
        successor: Likewise; need not be built.
        replacement_rate: Float in [0, 1], or a schedule: `LinearReplacement`,
            `CosineReplacement`, any other
            `keras.optimizers.schedules.LearningRateSchedule` or function from
            the number of the training step to a rate, which is clipped to
            [0, 1]. Steps are counted by the weight `iterations`, of which the
            draws are functions, too: both go on after saving and loading.
        mode: String, see above.
        predecessor_dropout: Boolean. Whether the predecessor runs as in
            training; BatchNormalization stays in inference, as it is frozen.
        seed: Integer or `None`.

    Input shape:  what both branches take.
    Output shape: what both branches return.

    Example:

    >>> predecessor = keras.layers.Dense(8)
    >>> predecessor.build((None, 4))
    >>> layer = ModuleReplacement(predecessor, keras.layers.Dense(8))
    >>> tuple(layer(keras.ops.zeros((2, 4)), training=True).shape)
    (2, 8)

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925);
        [blog post](https://kexue.fm/archives/7575), eq. 1

    Departs from the post: only the chosen branch runs (`"batch"`), the post
    runs both and multiplies one by zero; the rate need not be ½; the
    predecessor runs without dropout. `"mixing"` and `"annealing"` are the
    questions that the post leaves open.
    """

    def __init__(
        self,
        predecessor,
        successor,
        replacement_rate=0.5,
        mode="batch",
        predecessor_dropout=False,
        seed=None,
        **kwargs,
    ):
        # The branches cast by themselves, each of their layers what it takes.
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        if mode not in MODES:
            raise ValueError(
                f"Expected `mode` to be one of {', '.join(map(repr, MODES))}. "
                f"Received: mode={mode!r}"
            )
        check_modules([predecessor], [successor])
        for layer in as_list(predecessor):
            if not layer.built:
                raise ValueError(
                    f"Module {self.name!r}: the predecessor has no weights "
                    "yet. Train it, or load its weights, before. "
                    f"Received: predecessor layer {layer.name!r}, not built"
                )
        self.predecessor = predecessor
        self.successor = successor
        self.replacement_rate = replacement_rate
        self.mode = mode
        self.predecessor_dropout = predecessor_dropout
        self.seed = seed
        self.supports_masking = True
        freeze(as_list(predecessor))
        self.seed_generator = keras.random.SeedGenerator(seed)
        # Keras saves no seeds: a draw is a function of two weights.
        state = ops.convert_to_numpy(self.seed_generator.state.value)
        self.draw_seed = self.add_weight(
            (),
            keras.initializers.Constant(int(state[0]) % 2**31),
            "int32",
            trainable=False,
            name="draw_seed",
        )
        # Each replica counts for itself: to wait here for one another would mix
        # up what their layers give to `add_loss`.
        self.iterations = self.add_weight(
            (),
            "zeros",
            "int32",
            trainable=False,
            name="iterations",
        )

    def build(self, input_shape):
        shapes = []
        for branch in (self.predecessor, self.successor):
            shape = input_shape
            for layer in as_list(branch):
                if not layer.built:
                    layer.build(shape)
                shape = output_shape(layer, shape)
            shapes.append(shape)
        self._check(*map(flat_shapes, shapes))

    @property
    def replacement_rate(self):
        return self._replacement_rate

    @replacement_rate.setter
    def replacement_rate(self, rate):
        if not callable(rate):
            checked_rate(rate, "replacement_rate")
        self._replacement_rate = rate

    def rate(self):
        """The replacement rate of the next training step, a float32 scalar."""
        rate = self.replacement_rate
        if callable(rate):
            step = ops.cast(self.iterations.value, "float32")
            rate = ops.clip(ops.cast(rate(step), "float32"), 0.0, 1.0)
        return ops.convert_to_tensor(rate, "float32")

    def call(self, inputs, training=False, mask=None):
        inputs = with_masks(inputs, mask)
        if not training:
            return chain(as_list(self.successor), inputs, training=False)
        masks = [get_keras_mask(x) for x in tree.flatten(inputs)]
        rate = self.rate()
        state = self.seed_generator.state
        state.assign(
            ops.cast(
                ops.stack([self.draw_seed.value, self.iterations.value]),
                state.dtype,
            )
        )
        self.iterations.assign_add(1)
        if self.mode == "batch":
            return self._choose(rate, inputs, masks)
        return self._mix(rate, inputs, masks)

    def _run(self, name, inputs, masks):
        """What a branch returns in training."""
        # Keras's attention takes the masks off its inputs: off those of the
        # other branch, too.
        for x, mask in zip(tree.flatten(inputs), masks, strict=True):
            set_keras_mask(x, mask)
        training = name == "successor" or self.predecessor_dropout
        outputs = chain(as_list(getattr(self, name)), inputs, training=training)
        tensors, passed = tree.flatten(outputs), tree.flatten(inputs)
        return _Outputs(
            outputs,
            tensors,
            [get_keras_mask(x) for x in tensors],
            [_position(x, passed) for x in tensors],
        )

    def _choose(self, rate, inputs, masks):
        """One branch runs."""
        seen = {}

        def branch(name):
            outputs = seen[name] = self._run(name, inputs, masks)
            # `cond` runs each branch once to look what it assigns, then both.
            if len(seen) < 2:
                return []
            made = self._made(**seen)
            return [
                (
                    ops.cast(outputs.tensors[i], like.dtype),
                    [m for m in outputs.masks[i : i + 1] if m is not None],
                )
                for i, like in made.items()
            ]

        made, loss = backend.cond(
            keras.random.uniform((), seed=self.seed_generator) < rate,
            lambda: branch("successor"),
            lambda: branch("predecessor"),
            [*as_list(self.successor), *as_list(self.predecessor)],
        )
        self.add_loss(loss)
        return self._joined(inputs, made, **seen)

    def _mix(self, rate, inputs, masks):
        """Both branches run."""
        old, new = (
            self._run(name, inputs, masks)
            for name in ("predecessor", "successor")
        )
        size = ops.shape(new.tensors[0])[0]
        weight = self._weight(rate, size)
        made = [
            (
                _mixed(
                    ops.cast(old.tensors[i], like.dtype), like, weight, size
                ),
                [_mixed(old.masks[i], new.masks[i], weight, size)]
                if new.masks[i] is not None
                else [],
            )
            for i, like in self._made(old, new).items()
        ]
        return self._joined(inputs, made, old, new)

    def _weight(self, rate, size):
        """The successor's weight: a scalar, or booleans, one per sample."""
        if self.mode == "annealing":
            return rate
        seed = self.seed_generator
        if self.mode == "sample":
            # All replicas draw alike; each takes its own samples' share.
            shape = backend.num_replicas(), size
            draws = keras.random.uniform(shape, seed=seed)
            return draws[backend.replica()] < rate
        power = (1 - rate) / ops.maximum(rate, 1e-30)
        return keras.random.uniform((), seed=seed) ** power

    def _made(self, predecessor, successor):
        """The successor's outputs that were not inputs, by their number.

        Raises a ValueError where the branches do not fit together.
        """
        old, new = predecessor, successor
        if len(old.tensors) != len(new.tensors):
            raise ValueError(
                f"Module {self.name!r}: expected as many outputs of the "
                "predecessor as of the successor; cut both at corresponding "
                f"places. Received: {len(old.tensors)} and {len(new.tensors)}"
            )
        self._check(*([x.shape for x in o.tensors] for o in (old, new)))
        for i, masks in enumerate(zip(old.masks, new.masks, strict=True)):
            if (masks[0] is None) != (masks[1] is None):
                raise ValueError(
                    f"Module {self.name!r}: expected a mask at both outputs "
                    f"{i} or at none; one of the branches drops it. Received: "
                    f"predecessor's mask {masks[0]}, successor's {masks[1]}"
                )
        return {
            i: x
            for i, x in enumerate(new.tensors)
            if new.sources[i] is None or new.sources[i] != old.sources[i]
        }

    def _joined(self, inputs, made, predecessor, successor):
        """Puts what was made and what was handed on in order."""
        flat = tree.flatten(inputs)
        outputs = [
            x if i is None else flat[i]
            for x, i in zip(successor.tensors, successor.sources, strict=True)
        ]
        numbers = self._made(predecessor, successor)
        for i, (x, masks) in zip(numbers, made, strict=True):
            for mask in masks:
                set_keras_mask(x, mask)
            outputs[i] = x
        return tree.pack_sequence_as(successor.structure, outputs)

    def _check(self, old, new):
        """Compares two lists of shapes; unknown sizes fit all."""
        fits = len(old) == len(new) and all(
            len(a) == len(b)
            and all(
                m is None or n is None or m == n
                for m, n in zip(a, b, strict=True)
            )
            for a, b in zip(old, new, strict=True)
        )
        if not fits:
            raise ValueError(
                f"Module {self.name!r}: expected the predecessor and the "
                "successor to return the same shapes, so that one can stand "
                "for the other; a projection in the successor may help. "
                f"Received: predecessor {[*map(tuple, old)]}, "
                f"successor {[*map(tuple, new)]}"
            )

    def compute_mask(self, inputs, previous_mask=None):
        # The branches' layers have set the masks that there are.
        return None

    def compute_output_shape(self, input_shape):
        shape = input_shape
        for layer in as_list(self.successor):
            shape = output_shape(layer, shape)
        return shape

    def compute_output_spec(self, *args, **kwargs):
        # Shapes alone would not tell the dtypes.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def get_config(self):
        return {
            **super().get_config(),
            "predecessor": serialized(self.predecessor),
            "successor": serialized(self.successor),
            "replacement_rate": serialized_rate(self.replacement_rate),
            "mode": self.mode,
            "predecessor_dropout": self.predecessor_dropout,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("predecessor", "successor", "replacement_rate"):
            config[name] = deserialized(config[name])
        return cls(**config)


@dataclasses.dataclass
class _Outputs:
    """What a branch returned: the flat tensors, and where they come from."""

    structure: Any
    tensors: list
    masks: list
    sources: list  # the number of the input that was handed on, or None


def check_modules(
    predecessor_modules, successor_modules, stem=None, head=None, shared=False
):
    """Raises a ValueError that names the module where something is wrong.

    Args:
        stem, head: Layers before and after the modules, or `None`.
        shared: Boolean. Whether they learn, too.
    """
    both = predecessor_modules, successor_modules
    old, new = (len(m) if isinstance(m, (list, tuple)) else m for m in both)
    if old != new or not isinstance(old, int) or not old:
        raise ValueError(
            "Expected a list of predecessor modules and one of as many "
            "successor modules, at least one; a list inside of the list is one "
            f"module. Received: {old} and {new}"
        )
    roles = [
        *((f"Module {i} of the predecessor", m) for i, m in enumerate(both[0])),
        ("The stem", [] if stem is None else stem),
        ("The head", [] if head is None else head),
        *((f"Module {i} of the successor", m) for i, m in enumerate(both[1])),
    ]
    places, frozen = {}, {}
    for role, module in roles:
        if not as_list(module) and role.startswith("Module"):
            raise ValueError(
                f"{role}: expected at least one layer. To leave a module of "
                "the predecessor without a successor, make it one with its "
                "neighbour. Received: []"
            )
        for layer in as_list(module):
            if not isinstance(layer, keras.Layer):
                raise ValueError(
                    f"{role}: expected a Keras layer, a model or a list of "
                    f"them. Received: {layer!r}"
                )
            if isinstance(layer, keras.layers.InputLayer):
                raise ValueError(
                    f"{role}: expected layers that compute; leave the input "
                    "layer out, or make modules by `cut_model`. Received: "
                    f"{layer.name!r}"
                )
            if places.setdefault(id(layer), role) != role:
                raise ValueError(
                    f"{role}: expected each module to stand in one place only; "
                    f"make a copy. Received: {layer.name!r}, also in: "
                    f"{places[id(layer)]}"
                )
            for variable in layer.variables:
                if not role.endswith("successor"):
                    if role.endswith("predecessor") or not shared:
                        frozen.setdefault(id(variable), role)
                elif id(variable) in frozen:
                    raise ValueError(
                        f"{role}: expected weights of its own, as those of the "
                        "others are frozen; make a copy. Received: "
                        f"{variable.path!r}, also in: {frozen[id(variable)]}"
                    )


def chain(layers, x, training):
    """Calls layers one after another."""
    # Explicitly: what one layer is told, Keras would tell all that follow.
    for layer in layers:
        x = layer(x, training=training)
    return x


def checked_rate(rate, name):
    if not isinstance(rate, numbers.Real) or not 0 <= rate <= 1:
        raise ValueError(
            f"Expected `{name}` to be a probability in [0, 1]. "
            f"Received: {name}={rate!r}"
        )
    return rate


def output_shape(layer, shape):
    """The layer's output shape, also where it does not tell by itself."""
    try:
        return layer.compute_output_shape(shape)
    except NotImplementedError:
        inputs = tree.map_shape_structure(keras.KerasTensor, shape)
        outputs = layer.compute_output_spec(inputs)
        return tree.map_structure(lambda x: tuple(x.shape), outputs)


def flat_shapes(shapes):
    """A shape or a structure of shapes as a list of shapes."""
    found = []
    tree.map_shape_structure(found.append, shapes)
    return found


def serialized(layers):
    return tree.map_structure(keras.saving.serialize_keras_object, layers)


def serialized_rate(rate):
    return keras.saving.serialize_keras_object(rate) if callable(rate) else rate


def deserialized(config):
    if isinstance(config, (list, tuple)):
        return [*map(deserialized, config)]
    if isinstance(config, dict):
        return keras.saving.deserialize_keras_object(config)
    return config


def _position(x, tensors):
    return next((i for i, t in enumerate(tensors) if t is x), None)


def _mixed(old, new, weight, size):
    """(1 - weight) · old + weight · new."""
    floating = keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(new.dtype)
    )
    if keras.backend.standardize_dtype(weight.dtype) != "bool":
        if floating:
            weight = ops.cast(weight, new.dtype)
            return (1 - weight) * old + weight * new
        return ops.where(weight > 0, new, old)
    if len(new.shape) == 0:
        return new
    rows = ops.shape(new)[0]
    chosen = ops.take(weight, ops.minimum(ops.arange(rows), size - 1))
    # What has no axis of samples cannot be chosen by sample.
    chosen = ops.logical_or(chosen, ops.not_equal(rows, size))
    shape = [-1] + [1] * (len(new.shape) - 1)
    return ops.where(ops.reshape(chosen, shape), new, old)


def with_masks(inputs, masks):
    """The inputs with the masks that came as an argument.

    On copies: the tensors are the caller's, who may call again without them.
    """
    flat = tree.flatten(inputs)
    given = [None] if masks is None else tree.flatten(masks)
    for i, mask in enumerate(given):
        if mask is not None and get_keras_mask(flat[i]) is not mask:
            flat[i] = ops.copy(flat[i])
            set_keras_mask(flat[i], mask)
    return tree.pack_sequence_as(inputs, flat)
