"""One module that is replaced at random by its successor."""

import dataclasses
from typing import Any

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_integer,
)
from blogkeras.backend import get_keras_mask, set_keras_mask
from blogkeras.graph import Untracked, as_list, freeze, freeze_inside
from blogkeras.state import NumberedDraws
from blogkeras.theseus.modules import (
    chain,
    check_modules,
    deserialized,
    flat_shapes,
    output_shape,
    serialized,
    with_masks,
)
from blogkeras.theseus.schedules import check_rate, serialized_rate

MODES = ("batch", "sample", "mixing", "annealing")


@keras.saving.register_keras_serializable(package="blogkeras")
class ModuleReplacement(keras.layers.Layer):
    """Runs a frozen module or, in its place, the successor that is trained.

    With the predecessor's output x_p, the successor's x_s, and ε = 1 for the
    predecessor:

        x = ε x_p + (1 - ε) x_s

    The replacement rate r is the probability, or the mean weight, of the
    successor. In training, `mode` determines ε:

    - `"batch"`: 0 with probability r, else 1; one draw per batch. Only the
      chosen branch is computed, all other modes compute both.
    - `"sample"`: the same with one draw per sample.
    - `"mixing"`: any number in [0, 1], 1 - u^((1-r)/r) with u ~ U(0, 1), which
      has mean 1 - r and is uniform at r = ½; one draw per batch.
    - `"annealing"`: 1 - r, no randomness. Give r a schedule.

    In inference the successor runs alone.

    Both branches take the same inputs and return the same shapes: one tensor or
    a list of tensors. Inputs that both branches return unchanged are not mixed.
    Outputs that are not floating, and masks, are the predecessor's where ε = 1,
    else the successor's. With `"sample"`, an output without an axis of samples
    (a table of positions) is the successor's; its length must not be the batch
    size, by which it is recognized. Losses that a branch's layers give to
    `add_loss` count if the branch runs.

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

    Raises:
        ValueError: on an unknown mode, a rate out of [0, 1], a predecessor that
            is not built, and, when it is built, on branches whose outputs
            differ in shape.

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
        predecessor: Any,
        successor: Any,
        replacement_rate: Any = 0.5,
        mode: str = "batch",
        predecessor_dropout: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        # No casts here: each layer in the branches casts its own inputs.
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        self.mode = check_choice("mode", mode, MODES)
        self.predecessor_dropout = check_boolean(
            "predecessor_dropout", predecessor_dropout
        )
        self.seed = None if seed is None else check_integer("seed", seed)
        check_modules([predecessor], [successor])
        for layer in as_list(predecessor):
            if not layer.built:
                raise ValueError(
                    f"Module {self.name!r}: expected a predecessor that is "
                    "built: train it, or load its weights, before. "
                    f"Received: predecessor layer {layer.name!r}, not built"
                )
        self.predecessor = predecessor
        self.successor = successor
        self.replacement_rate = replacement_rate
        self.supports_masking = True
        freeze_inside(self)
        freeze(as_list(predecessor))
        self.draws = NumberedDraws(self, self.seed)
        self._plans = Untracked({})

    @property
    def iterations(self):
        """The weight that counts the training steps."""
        return self.draws.iterations

    @property
    def metrics(self):
        # Of the layers inside, without those of a module's own training: they
        # have the names of those of the training around it.
        return [
            metric
            for layer in self._flatten_layers(include_self=False)
            if not isinstance(layer, keras.Model)
            for metric in layer._metrics
        ]

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
        self._replacement_rate = check_rate("replacement_rate", rate)

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
        seed = self.draws.next_step()
        if self.mode == "batch":
            chosen = backend.uniform((), seed=seed) < rate
            return self._choose(chosen, inputs, masks)
        return self._mix(rate, seed, inputs, masks)

    def _run(self, name, inputs, masks):
        """The outputs of a branch in training."""
        # Keras's attention layers remove the masks from their inputs, which
        # both branches share; put them back before each branch.
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

    def _choose(self, chosen, inputs, masks):
        """Runs one branch: the successor where `chosen` is true."""
        signature = tuple(
            (len(x.shape), str(x.dtype), mask is None)
            for x, mask in zip(tree.flatten(inputs), masks, strict=True)
        )
        if signature in self._plans.value and backend.is_concrete(chosen):
            plan = self._plans.value[signature]
            return self._run_chosen(bool(chosen), inputs, masks, plan)
        seen = {}

        def branch(name):
            outputs = seen[name] = self._run(name, inputs, masks)
            # `cond` traces each branch once to see what it assigns, and then
            # again to run it. The plan needs both branches.
            if len(seen) < 2:
                return []
            return self._made_by(outputs, self._plan(**seen))

        made, loss = backend.cond(
            chosen,
            lambda: branch("successor"),
            lambda: branch("predecessor"),
            [*as_list(self.successor), *as_list(self.predecessor)],
        )
        self.add_loss(loss)
        plan = self._plans.value[signature] = self._plan(**seen)
        return self._joined(inputs, made, plan)

    def _run_chosen(self, successor, inputs, masks, plan):
        """Runs the chosen branch where the choice is known, without a graph.

        `plan` is from an earlier call, which compared both branches.
        """
        names = ["successor", "predecessor"]
        name, other = names if successor else names[::-1]
        found = {}

        def branch():
            outputs = self._run(name, inputs, masks)
            made = found["made"] = self._made_by(outputs, plan)
            return [x for x, _ in made]

        tensors, loss = backend.run_branch(
            branch, as_list(getattr(self, name)), as_list(getattr(self, other))
        )
        self.add_loss(loss)
        made = [
            (x, kept)
            for x, (_, kept) in zip(tensors, found["made"], strict=True)
        ]
        return self._joined(inputs, made, plan)

    def _mix(self, rate, seed, inputs, masks):
        """Runs both branches and mixes their outputs."""
        old, new = (
            self._run(name, inputs, masks)
            for name in ("predecessor", "successor")
        )
        size = ops.shape(new.tensors[0])[0]
        weight = self._weight(rate, seed, size)
        plan = self._plan(old, new)
        made = [
            (
                _mixed(ops.cast(old.tensors[i], dtype), x, weight, size),
                [_mixed(old.masks[i], new.masks[i], weight, size)]
                if new.masks[i] is not None
                else [],
            )
            for i, dtype in plan.made.items()
            for x in [new.tensors[i]]
        ]
        return self._joined(inputs, made, plan)

    def _weight(self, rate, seed, size):
        """The successor's weight: a scalar, or booleans, one per sample."""
        if self.mode == "annealing":
            return rate
        if self.mode == "sample":
            # All replicas draw the same numbers, and each takes those of its
            # samples.
            shape = backend.num_replicas(), size
            draws = backend.uniform(shape, seed=seed)
            return draws[backend.replica()] < rate
        power = (1 - rate) / ops.maximum(rate, 1e-30)
        return backend.uniform((), seed=seed) ** power

    def _plan(self, predecessor, successor):
        """Which outputs are computed, and which are unchanged inputs.

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
        made = {
            i: x.dtype
            for i, x in enumerate(new.tensors)
            if new.sources[i] is None or new.sources[i] != old.sources[i]
        }
        sources = [
            None if i in made else source
            for i, source in enumerate(new.sources)
        ]
        structure = tree.map_structure(lambda _: 0, new.structure)
        return _Plan(structure, made, sources)

    def _made_by(self, outputs, plan):
        """A branch's computed outputs: pairs of tensor and list of its mask."""
        return [
            (
                ops.cast(outputs.tensors[i], dtype),
                [m for m in outputs.masks[i : i + 1] if m is not None],
            )
            for i, dtype in plan.made.items()
        ]

    def _joined(self, inputs, made, plan):
        """Puts computed outputs and unchanged inputs in order."""
        flat = tree.flatten(inputs)
        outputs = [None if i is None else flat[i] for i in plan.sources]
        for i, (x, masks) in zip(plan.made, made, strict=True):
            for mask in masks:
                set_keras_mask(x, mask)
            outputs[i] = x
        return tree.pack_sequence_as(plan.structure, outputs)

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
        # Masks were set by the layers of the branches.
        return None

    def compute_output_shape(self, input_shape):
        shape = input_shape
        for layer in as_list(self.successor):
            shape = output_shape(layer, shape)
        return shape

    def compute_output_spec(self, *args, **kwargs):
        # Dtypes cannot be derived from shapes alone.
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
    """The flat outputs of a branch, and which of them are inputs."""

    structure: Any
    tensors: list
    masks: list
    sources: list  # the index of the input that is returned unchanged, or None


@dataclasses.dataclass
class _Plan:
    """How a module's outputs are combined from those of its branches."""

    structure: Any
    made: dict  # the indices of computed outputs, with their dtypes
    sources: list  # for the others, the index of the unchanged input


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
    # An output without an axis of samples cannot be chosen by sample.
    chosen = ops.logical_or(chosen, ops.not_equal(rows, size))
    shape = [-1] + [1] * (len(new.shape) - 1)
    return ops.where(ops.reshape(chosen, shape), new, old)
