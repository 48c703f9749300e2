"""Compression by module replacement as a Keras model."""

from typing import Any

import keras
from keras import tree

from blogkeras.arguments import check_boolean, check_integer
from blogkeras.graph import (
    Cut,
    Segment,
    Untracked,
    as_list,
    copied,
    freeze,
    thaw,
    thawed,
)
from blogkeras.models import CompositeModel, symbolic_inputs
from blogkeras.theseus.modules import (
    chain,
    check_modules,
    deserialized,
    output_shape,
    with_masks,
)
from blogkeras.theseus.replacement import ModuleReplacement
from blogkeras.theseus.schedules import serialized_rate


@keras.saving.register_keras_serializable(package="blogkeras")
class Theseus(CompositeModel):
    """Compresses a model by replacing its modules at random in training.

    The predecessor, trained and frozen, is given as n modules, the smaller
    successor likewise. In training each predecessor module is replaced by its
    successor with the probability `replacement_rate` (see `ModuleReplacement`),
    and the task's own loss trains the successors:

        x → stem → module 1 → … → module n → head → prediction

    In inference (`predict`, `evaluate`, validation) all modules are successors.
    `detach()` then gives the successor as a plain Keras model. The three phases
    (train the predecessor, replace, fine-tune the detached successor) are
    ordinary `compile` and `fit` calls. A saved and loaded model continues at
    the same step of the schedule and of the random draws.

    A module is a layer, a model, or a list of them called one after another. It
    may return a list of tensors, which the next module takes. `cut_model` makes
    such modules from a functional model; `bert_of_theseus` does all of it for
    transformers.

    Args:
        predecessor_modules: List of modules, built. Their layers are frozen
            (`trainable = False`), here and again by `compile`.
        successor_modules: List of as many modules, smaller, whose inputs and
            outputs have the shapes of the predecessor's.
        head: Layer, model or list of layers after the modules, shared by
            predecessor and successor; `None` for none.
        replacement_rate: Float in [0, 1] or a schedule, the probability that
            the *successor* runs; see `ModuleReplacement`. It may be set again
            before `compile`: a compiled step contains a float as a constant.
        stem: Layers before the modules, shared too: an embedding that is not
            replaced.
        mode: String, see `ModuleReplacement`.
        train_shared: Boolean. Whether stem and head learn, too; else they are
            frozen until `detach`.
        predecessor_dropout: Boolean, see `ModuleReplacement`.
        seed: Integer or `None`.

    Raises:
        ValueError: if the lists differ in length or are empty, if a module of
            the predecessor is not built, if modules share layers that only one
            of them may train, and on arguments out of range.

    Example:

    >>> big = [[keras.layers.Dense(16, "relu") for _ in range(2)] for _ in "ab"]
    >>> predecessor = keras.Sequential(
    ...     [keras.Input((8,)), *big[0], *big[1], keras.layers.Dense(3)]
    ... )  # compile and fit it
    >>> small = [keras.layers.Dense(16, "relu") for _ in "ab"]
    >>> theseus = Theseus(big, small, head=predecessor.layers[-1])
    >>> theseus.compile("adam", "mse")
    >>> x, y = np.random.rand(32, 8), np.random.rand(32, 3)
    >>> history = theseus.fit(x, y, verbose=0)
    >>> successor = theseus.detach()

    Reference:
        [Xu et al., 2020](https://arxiv.org/abs/2002.02925);
        [blog post](https://kexue.fm/archives/7575)

    Departs from the post: `replacement_rate` is the successor's probability,
    where the post's ε = 1 is the predecessor; see `ModuleReplacement` for more.
    """

    def __init__(
        self,
        predecessor_modules: Any,
        successor_modules: Any,
        head: Any = None,
        replacement_rate: Any = 0.5,
        *,
        stem: Any = None,
        mode: str = "batch",
        train_shared: bool = False,
        predecessor_dropout: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        # No casts here: each layer in the modules casts its own inputs.
        super().__init__(**{"autocast": False, **kwargs})
        train_shared = check_boolean("train_shared", train_shared)
        check_modules(
            predecessor_modules, successor_modules, stem, head, train_shared
        )
        self.predecessor_modules = list(predecessor_modules)
        self.successor_modules = list(successor_modules)
        self.head, self.stem = head, stem
        self.mode = mode
        self.train_shared = train_shared
        self.predecessor_dropout = predecessor_dropout
        self.seed = seed = None if seed is None else check_integer("seed", seed)
        self.supports_masking = True
        self.replacements = [
            ModuleReplacement(
                predecessor,
                successor,
                replacement_rate,
                mode,
                predecessor_dropout,
                None if seed is None else seed + i,
                name=f"module_{i}",
                dtype=self.dtype_policy,
            )
            for i, (predecessor, successor) in enumerate(
                zip(predecessor_modules, successor_modules, strict=True)
            )
        ]
        self._check_names()
        self._freeze()
        known = self._symbolic_inputs()
        if known is not None:
            self.build(tree.map_structure(lambda x: tuple(x.shape), known))

    @property
    def replacement_rate(self):
        return self.replacements[0].replacement_rate

    @replacement_rate.setter
    def replacement_rate(self, rate):
        for module in self.replacements:
            module.replacement_rate = rate

    # The roles of the modules decide which weights are trained, not the flags
    # `trainable` of the layers: other models may share these layers, and
    # `detach` changes the flags between two training steps.
    @property
    def trainable_variables(self):
        return self._learning(super().trainable_variables)

    @property
    def non_trainable_variables(self):
        return _without(self.variables, self.trainable_variables)

    @property
    def trainable_weights(self):
        return self._learning(super().trainable_weights)

    @property
    def non_trainable_weights(self):
        return _without(self.weights, self.trainable_weights)

    def _learning(self, variables):
        layers = [y for s in self.successor_modules for y in as_list(s)]
        if self.train_shared:
            layers += self._shared()
        ours = {id(v) for layer in layers for v in layer.variables}
        return [v for v in variables if id(v) in ours]

    @property
    def output_names(self):
        """The last layer's names, by which Keras finds losses in a dict."""
        last = self._successor()[-1]
        if isinstance(last, Segment):
            last = last.cut.model
        return getattr(last, "output_names", None)

    def build(self, input_shape):
        # Keras would wrap a list or dict, and use the wrapper as inputs.
        self._input_shape = Untracked(input_shape)
        shape = input_shape
        for layer in self._layers_in_order():
            if not layer.built:
                layer.build(shape)
            shape = output_shape(layer, shape)

    def compile(self, *args, **kwargs):
        # Freeze again: other models may share these layers and have changed
        # them.
        self._freeze()
        super().compile(*args, **kwargs)

    def call(self, inputs, training=False, mask=None):
        inputs = with_masks(inputs, mask)
        return chain(self._layers_in_order(), inputs, bool(training))

    def compute_mask(self, inputs, previous_mask=None):
        return None  # masks were set by the layers inside

    def detach(self, inputs=None, copy=False):
        """The successor as a plain Keras model, ready for its own training.

        It consists of stem, successor modules and head. Layers and weights are
        this model's own, not copies; stem and head become as trainable as they
        were when given. This model may be trained further. If stem or head
        contain BatchNormalization, `compile` it again before that: otherwise
        their statistics would be updated.

        Stem and head are the predecessor's, too. To train what is detached
        changes them there: measure the predecessor before, or take a copy.

        Take a copy for changes of the layers themselves (`quantize`,
        `enable_lora`) if this model is to be trained further: it cannot be
        trained with other weights.

        Args:
            inputs: `keras.Input`, or a structure of them, where this model does
                not begin with a functional one and its inputs differ from
                floating tensors of the shapes that it has been built for.
            copy: Boolean. Whether the model gets layers and weights of its own.
                This model then stays as it is.

        Returns:
            A functional `keras.Model`.
        """
        copy = check_boolean("copy", copy)
        if inputs is None:
            inputs = self._fresh_inputs()
        x = inputs
        for layer in self._successor():
            # Call the layers of a segment, so that they, and not the segment,
            # are the layers of the new model.
            x = layer.call(x) if isinstance(layer, Segment) else layer(x)
        model = keras.Model(inputs, x)
        if copy:
            return copied(model)
        thaw(self._shared())
        return model

    def _layers_in_order(self):
        return [
            *_optional(self.stem),
            *self.replacements,
            *_optional(self.head),
        ]

    def _shared(self):
        return [*_optional(self.stem), *_optional(self.head)]

    def _predecessor(self):
        return [x for m in self.predecessor_modules for x in as_list(m)]

    def _successor(self):
        return [
            *_optional(self.stem),
            *(y for s in self.successor_modules for y in as_list(s)),
            *_optional(self.head),
        ]

    def _check_names(self):
        """Raises at equal names, with which `detach` would fail later."""
        found = {}
        for layer in self._successor():
            operations = [layer]
            if isinstance(layer, Segment):
                operations = [node.operation for node in layer.nodes.value]
            for x in operations:
                if found.setdefault(x.name, x) is not x:
                    raise ValueError(
                        "Expected different names of all layers in stem, "
                        "successor modules and head: they become one model. "
                        f"Give one of them `name=...`. Received: {x.name!r} "
                        "twice"
                    )

    def _freeze(self):
        if self.train_shared:
            thaw(self._shared())
        else:
            freeze(self._shared())
        freeze(self._predecessor())

    def _first(self):
        stem = _optional(self.stem)
        return (stem or as_list(self.successor_modules[0]))[0]

    def _symbolic_inputs(self):
        """Those of the first layer, if it has any."""
        first = self._first()
        if isinstance(first, Segment):
            return first.cut.crossing[first.index]
        return symbolic_inputs(first)

    def _fresh_inputs(self):
        known = self._symbolic_inputs()
        if known is not None:
            return tree.map_structure(
                lambda x: keras.Input(
                    batch_shape=x.shape, dtype=x.dtype, name=x.name
                ),
                known,
            )
        if not self.built:
            raise ValueError(
                "The shape of the inputs is not known yet: call `fit`, `build` "
                "or the model first, or give `inputs`. Received: inputs=None"
            )
        shapes = self._input_shape.value
        if isinstance(shapes, dict):
            return {
                name: keras.Input(shape[1:], name=name)
                for name, shape in shapes.items()
            }
        return tree.map_shape_structure(
            lambda shape: keras.Input(shape[1:]), shapes
        )

    def get_config(self):
        cuts = []
        # Save the flags as they were given, so that `detach` of a loaded model
        # can restore them.
        with thawed([*self._shared(), *self._predecessor()]):
            parts = {
                name: _packed(getattr(self, name), cuts)
                for name in (
                    "predecessor_modules",
                    "successor_modules",
                    "head",
                    "stem",
                )
            }
        return {
            **super().get_config(),
            **parts,
            "cuts": [cut.get_config() for cut in cuts],
            "replacement_rate": serialized_rate(self.replacement_rate),
            "mode": self.mode,
            "train_shared": self.train_shared,
            "predecessor_dropout": self.predecessor_dropout,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        cuts = [Cut.from_config(c) for c in config.pop("cuts")]
        for name in (
            "predecessor_modules",
            "successor_modules",
            "head",
            "stem",
        ):
            config[name] = _unpacked(config[name], cuts)
        config["replacement_rate"] = deserialized(config["replacement_rate"])
        return cls(**config)


def _without(variables, others):
    others = {id(v) for v in others}
    return [v for v in variables if id(v) not in others]


def _optional(layers):
    return [] if layers is None else as_list(layers)


def _packed(layers, cuts):
    """A configuration that stores a model with several segments once."""
    if layers is None:
        return None
    if isinstance(layers, (list, tuple)):
        return [_packed(x, cuts) for x in layers]
    if isinstance(layers, Segment):
        if layers.cut not in cuts:
            cuts.append(layers.cut)
        return {"cut": cuts.index(layers.cut), "segment": layers.index}
    return keras.saving.serialize_keras_object(layers)


def _unpacked(config, cuts):
    if isinstance(config, (list, tuple)):
        return [_unpacked(x, cuts) for x in config]
    if config is None or "cut" not in config:
        return deserialized(config)
    return cuts[config["cut"]].segments[config["segment"]]
