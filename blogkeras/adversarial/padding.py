"""Finds padding where the tensors of a site have no Keras mask."""

import contextlib
import re
import threading

from keras import ops, tree

from blogkeras import backend
from blogkeras.adversarial.survey import (
    describe,
    mask_arguments,
    mask_of_positions,
    try_survey_step,
)
from blogkeras.arguments import shapes_agree

# Names of inputs that are 1 at real positions and 0 at padding.
_NAME = re.compile(
    r"^(?:(.*?)[-_ ])?(?:padding|pad|attention|input|tokens?|sequence)[-_ ]?"
    r"mask$|^mask$",
    re.IGNORECASE,
)


class Padding:
    """Finds the mask of the positions at a site.

    In this order: the Keras mask of the tensor itself; the input that is named;
    a mask that the model gives to a layer together with a tensor that depends
    on the same input (`MultiHeadAttention(attention_mask=...)`,
    `LSTM(mask=...)`, the mask behind a `Masking` layer); an input that is a
    mask by its name (`"padding_mask"`, `"attention_mask"`) and, where the name
    says of which inputs (`"encoder_padding_mask"`), of the right one.

    Args:
        name: String, the name of the input that is 1 at real positions and 0 at
            padding, or `None`.
    """

    def __init__(self, name=None):
        self.name = name
        self._sources = None  # for each tensor, a `MaskSource` or an index
        self._partial = None  # for each, whether it is of some inputs alone
        self._present = None  # the inputs that they were found for
        self._step = threading.local()  # a thread for each replica

    @property
    def needs_pass(self):
        """Whether a mask can only be read while the model runs."""
        return any(map(_is_seen_in_a_pass, self._sources or ()))

    def inputs(self, objective):
        """The indices of the inputs that are masks, and their names."""
        found = {}
        flat = tree.flatten(objective.data[0])
        for index, leaf in enumerate(
            describe(objective.model, objective.data[0])
        ):
            for name in leaf.names:
                if flat[index] is not None and (
                    name == self.name
                    or (self.name is None and _NAME.match(name))
                ):
                    found.setdefault(index, name)
        return found

    def of_output(self, shape):
        """The masks that an output of the model may have, by their sources.

        Of a model with two sequences, a source and a target, the padding of one
        is not that of the other, though they may have one length.

        Args:
            shape: The shape of the output without its last axis.

        Returns:
            Dict. A value is `None` where a tensor of the site that has the
            positions of the output has no mask, or one that may be that of
            another input.
        """
        return {
            key: mask
            for key, mask, positions in getattr(self._step, "found", ())
            if shapes_agree(positions, shape)
        }

    @contextlib.contextmanager
    def watch(self, objective):
        """Records the masks of the pass inside, for `masks` to read.

        Yields a function that extends the dict `perturb` of an objective.
        """
        seen, outputs = {}, {}
        self._step.seen = seen
        sources = [s for s in self._sources or () if _is_seen_in_a_pass(s)]

        def watching(perturb):
            calls = {}

            def watcher(layer, then):
                def fn(output, *args, **kwargs):
                    number = calls[layer] = calls.get(layer, -1) + 1
                    if then is not None:
                        output = then(output, *args, **kwargs)
                    for source in sources:
                        if (source.layer, source.number) != (layer, number):
                            continue
                        if source.argument is None:
                            outputs[_key(source)] = tree.flatten(output)[0]
                        else:
                            found = dict(mask_arguments(layer, args, kwargs))
                            seen[_key(source)] = mask_of_positions(
                                found[source.argument]
                            )
                    return output

                return fn

            return {
                **perturb,
                **{
                    source.layer: watcher(
                        source.layer, perturb.get(source.layer)
                    )
                    for source in sources
                },
            }

        yield watching
        for key, output in outputs.items():
            seen[key] = backend.get_keras_mask(output)

    def masks(self, objective, weights, tensors, carried, inputs_of):
        """A boolean mask of the first axes of each tensor, or `None`.

        Args:
            objective: A `training.Objective`.
            weights: List of tensors.
            tensors: The tensors of the site.
            carried: The Keras mask of each of them, or `None`.
            inputs_of: Function of a `Survey` that returns for each tensor the
                set of inputs that it depends on.
        """
        flat = tree.flatten(objective.data[0])
        present = [
            None if value is None else leaf.names
            for value, leaf in zip(
                flat,
                describe(objective.model, objective.data[0]),
                strict=True,
            )
        ]
        if self._sources is None or present != self._present:
            self._present = present
            self._sources = self._find(
                objective, weights, tensors, carried, inputs_of
            )
            if self.needs_pass:
                with self.watch(objective) as watch:
                    objective(weights, perturb=watch({}))
            self._partial = [
                isinstance(source, int) and self._is_partial(objective, source)
                for source in self._sources
            ]
        found = []
        self._step.found = []
        for tensor, mask, source, partial in zip(
            tensors, carried, self._sources, self._partial, strict=True
        ):
            key = None if mask is None else id(mask)
            if isinstance(source, int):
                key, mask = source, mask_of_positions(flat[source])
            elif source is not None:
                key = _key(source)
                mask = self._step.seen.get(key)
            if mask is not None:
                mask = ops.cast(mask, "bool")
            found.append(mask)
            positions = tuple(tensor.shape)[:-1]
            if mask is not None:
                positions = tuple(mask.shape)
            self._step.found.append((key, None if partial else mask, positions))
        return found

    def _find(self, objective, weights, tensors, carried, inputs_of):
        """The source of each mask that the tensor itself does not have."""
        if all(m is not None for m in carried) and self.name is None:
            return [None] * len(tensors)
        survey, inputs = None, []
        if self.name is None:
            survey = try_survey_step(objective, weights)
        if survey is not None:
            inputs = inputs_of(survey)
        if len(inputs) != len(tensors):
            inputs = [set()] * len(tensors)
        return [
            None
            if mask is not None and self.name is None
            else self._source(objective, survey, tensor, leaves)
            for tensor, mask, leaves in zip(
                tensors, carried, inputs, strict=True
            )
        ]

    def _source(self, objective, survey, tensor, leaves):
        flat = tree.flatten(objective.data[0])
        names = {
            index: name
            for index, name in self.inputs(objective).items()
            if _fits(flat[index].shape, tensor)
        }
        described = describe(objective.model, objective.data[0])
        if self.name is not None:
            if not names:
                raise ValueError(
                    "Expected `padding_mask` to be the name of an input of "
                    "shape (batch, positions), the first axes of what is "
                    f"perturbed, {tuple(tensor.shape)}. Received: "
                    f"padding_mask={self.name!r}; inputs "
                    f"{[leaf.names for leaf in described]}"
                )
            return next(iter(names))
        for source in () if survey is None or not leaves else survey.masks:
            if leaves <= source.leaves and _fits(source.shape, tensor):
                return source
        if leaves and len(names) == 1:
            (index,) = names
            fits = leaves & self._owners(objective, index)
            return index if fits else None
        if len(names) > 1:
            # "encoder_token_ids" goes with "encoder_padding_mask".
            own = [name for i in leaves for name in described[i].names]
            names = {
                index: name
                for index, name in names.items()
                if any(other.startswith(_prefix(name)) for other in own)
                and _prefix(name)
            }
        return next(iter(names)) if len(names) == 1 else None

    def _is_partial(self, objective, index):
        """Whether a mask is, by its name, that of some sequences alone."""
        sequences = self._sequences(objective, index)
        return self._owners(objective, index) != sequences

    def _owners(self, objective, index):
        """The inputs that have the padding of a mask; all, if none is named."""
        described = describe(objective.model, objective.data[0])
        prefixes = {
            _prefix(name)
            for name in described[index].names
            if _NAME.match(name)
        } - {""}
        sequences = self._sequences(objective, index)
        owners = {
            i
            for i in sequences
            for name in described[i].names
            if any(map(name.startswith, prefixes))
        }
        return owners or sequences

    def _sequences(self, objective, index):
        """The inputs with the positions of a mask that are no masks."""
        described = describe(objective.model, objective.data[0])
        flat = tree.flatten(objective.data[0])
        shape = tuple(flat[index].shape)
        return {
            i
            for i, value in enumerate(flat)
            if value is not None
            and shapes_agree(tuple(value.shape)[: len(shape)], shape)
            and not any(map(_NAME.match, described[i].names))
        }


def _fits(shape, tensor):
    """Whether a mask has the first axes of a tensor, as far as known."""
    if not 2 <= len(shape) < len(tensor.shape):
        return False
    return all(
        a is None or b is None or a == b
        for a, b in zip(shape, tensor.shape[: len(shape)], strict=True)
    )


def _key(source):
    return id(source.layer), source.number, source.argument


def _prefix(name):
    return _NAME.match(name)[1] or ""


def _is_seen_in_a_pass(source):
    return source is not None and not isinstance(source, int)
