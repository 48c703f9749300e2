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
    mask by its name (`"padding_mask"`, `"attention_mask"`).

    Args:
        name: String, the name of the input that is 1 at real positions and 0 at
            padding, or `None`.
    """

    def __init__(self, name=None):
        self.name = name
        self._sources = None  # for each tensor, a `MaskSource` or an index
        self._names = None  # of the inputs that they were found for
        self._step = threading.local()  # a thread for each replica

    @property
    def needs_pass(self):
        """Whether a mask can only be read while the model runs."""
        return any(map(_is_seen_in_a_pass, self._sources or ()))

    def inputs(self, objective):
        """The indices of the inputs that are masks, and their names."""
        found = {}
        for index, leaf in enumerate(
            describe(objective.model, objective.data[0])
        ):
            for name in leaf.names:
                if name == self.name or (
                    self.name is None and _NAME.match(name)
                ):
                    found.setdefault(index, name)
        return found

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
        names = [x.names for x in describe(objective.model, objective.data[0])]
        if self._sources is None or names != self._names:
            self._names = names
            self._sources = self._find(
                objective, weights, tensors, carried, inputs_of
            )
            if self.needs_pass:
                with self.watch(objective) as watch:
                    objective(weights, perturb=watch({}))
        flat = tree.flatten(objective.data[0])
        found = []
        for mask, source in zip(carried, self._sources, strict=True):
            if source is None:
                found.append(mask)
            elif isinstance(source, int):
                found.append(mask_of_positions(flat[source]))
            else:
                found.append(self._step.seen.get(_key(source)))
        return [None if m is None else ops.cast(m, "bool") for m in found]

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
        if self.name is not None:
            if not names:
                leaves = describe(objective.model, objective.data[0])
                raise ValueError(
                    "Expected `padding_mask` to be the name of an input of "
                    "shape (batch, positions), the first axes of what is "
                    f"perturbed, {tuple(tensor.shape)}. Received: "
                    f"padding_mask={self.name!r}; inputs "
                    f"{[leaf.names for leaf in leaves]}"
                )
            return next(iter(names))
        for source in () if survey is None or not leaves else survey.masks:
            if leaves <= source.leaves and _fits(source.shape, tensor):
                return source
        if len(names) > 1:
            # "encoder_token_ids" goes with "encoder_padding_mask".
            described = describe(objective.model, objective.data[0])
            own = [name for i in leaves for name in described[i].names]
            names = {
                index: name
                for index, name in names.items()
                if any(other.startswith(_prefix(name)) for other in own)
                and _prefix(name)
            }
        return next(iter(names)) if len(names) == 1 else None


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
