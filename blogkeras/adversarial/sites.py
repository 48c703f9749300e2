"""Where a model is perturbed: embedding matrix, layer output, float input."""

import threading

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.adversarial.padding import Padding
from blogkeras.adversarial.survey import (
    describe,
    first_argument,
    is_embedding,
    is_float,
    is_look_up,
    named_layers,
    try_survey_step,
)


class Site:
    """A place in a model whose values an adversarial method perturbs.

    Its values in the present step are the *origin*, a list of tensors. A
    *point* is a list of tensors of the same shapes. The loss at a point is the
    model's loss with the values of the point in place of the origin.
    """

    def origin(self, objective, weights):
        """The unperturbed values, a list of floating tensors."""
        raise NotImplementedError

    def at(self, objective, weights, point, data=None):
        """Arguments that evaluate the objective at `point`, once.

        Args:
            objective: A `training.Objective`.
            weights: List of tensors.
            point: List of tensors of the shapes of the origin.
            data: `(x, y, sample_weight)` in place of the batch, where another
                site has perturbed inputs already.

        Returns:
            `(weights, kwargs)` for `objective(weights, **kwargs)`.
        """
        raise NotImplementedError

    def mask(self, tensors):
        """Zero where nothing may be perturbed (padding), else unchanged."""
        return tensors

    def padding(self, shape):
        """The masks of positions in this step that an output may have.

        Args:
            shape: The shape of the output without its last axis.

        Returns:
            Dict, as `Padding.of_output` gives it. The mask is known where there
            is one alone.
        """
        return {}

    def merge(self, objective, gradients, point_gradients):
        """Gradients of the weights, where those at the point are some of them.

        Args:
            objective: A `training.Objective`.
            gradients: Gradients of the weights given to `at`.
            point_gradients: Gradients of the point given to `at`.
        """
        return gradients

    def groups(self, tensors):
        """Groups of `(site, tensors)`: those of one group share their norms."""
        return [[(self, tensors)]]

    def describe(self, model):
        """The place in words."""
        return "nothing"

    @property
    def place(self):
        """What tells the place from others, and its name; `None`: unknown."""
        return None

    # True where the replicas' gradients are to be added, since all replicas
    # share the matrix. False where each replica has samples of its own.
    shared = False
    # Whether the first axis of each tensor is the batch.
    batched = True
    # Whether the values are those of the model's inputs. A site that is found
    # in the first step may be one, until then.
    is_input = False


class OutputSite(Site):
    """The outputs of a layer: each position has a perturbation of its own.

    The values are offsets, with origin zero, one tensor for each call of the
    layer, or several where the layer has several floating outputs. Of an
    embedding only look-ups count: calls whose output has one dimension more
    than their input. A softmax with the same matrix is not perturbed.

    Args:
        layer: The layer.
        padding_mask: String, the name of the input that marks padding.
    """

    def __init__(self, layer, padding_mask=None):
        self.layer = layer
        self._padding = Padding(padding_mask)
        self._step = threading.local()  # a thread for each replica

    def origin(self, objective, weights):
        offsets, outputs = [], []

        def record(output, *args, **kwargs):
            for x in self._perturbed(output, args, kwargs):
                offsets.append(ops.zeros_like(ops.stop_gradient(x)))
                outputs.append(x)
            return output

        # Only shapes and masks are used here; the compiler removes the rest.
        with self._padding.watch(objective) as watch:
            objective(weights, perturb=watch({self.layer: record}))
        if not offsets:
            raise ValueError(
                "The layer to perturb takes no part in the model's forward "
                f"pass. Received: layer {self.layer.name!r}"
            )
        self._step.masks = self._padding.masks(
            objective,
            weights,
            outputs,
            [backend.get_keras_mask(x) for x in outputs],
            lambda survey: survey.inputs_of(self.layer),
        )
        return offsets

    def at(self, objective, weights, point, data=None):
        offsets = iter(point)

        def add(output, *args, **kwargs):
            moved = {
                id(x): x + ops.cast(next(offsets), x.dtype)
                for x in self._perturbed(output, args, kwargs)
            }
            return tree.map_structure(lambda x: moved.get(id(x), x), output)

        return weights, {"perturb": {self.layer: add}}

    def mask(self, tensors):
        return masked(tensors, self._step.masks)

    def padding(self, shape):
        return self._padding.of_output(shape)

    @property
    def place(self):
        return id(self.layer), self.layer.name

    def describe(self, model):
        return f"the outputs of layer {path_of(self.layer, model)!r}"

    def _perturbed(self, output, args, kwargs):
        """The tensors of an output that are perturbed."""
        if is_embedding(self.layer):
            first = first_argument(args, kwargs)
            return [output] if is_look_up(output, first) else []
        # An LSTM with `return_state` returns one of its tensors twice.
        floats = {id(x): x for x in tree.flatten(output) if is_float(x)}
        return list(floats.values())


class MatrixSite(Site):
    """The embedding matrix: one perturbation for each vocabulary entry.

    Entries that are not in the batch have no gradient, so where the matrix is
    only looked up in, its perturbation is that of the tokens of the batch: the
    values are offsets `(tokens, dim)` with origin zero, one row for each
    distinct token (and unused rows), which every occurrence of the token adds
    to its look-up. Time and memory then do not grow with the vocabulary.

    Where the matrix has another use (a tied softmax, a regularizer, a second
    layer), and on several replicas, the values are the matrix itself.
    """

    shared = True
    batched = False

    def __init__(self, layer):
        self.layer = layer
        self._only_looked_up = None
        self._step = threading.local()

    def variable(self):
        """The matrix, a variable of floating numbers."""
        # With LoRA the effective matrix is this variable plus the low-rank
        # product: moving either moves the sum.
        for variable in self.layer.variables:
            if variable.name == "embeddings" and is_float(variable):
                return variable
        raise ValueError(
            "Expected an embedding layer with a weight 'embeddings' of "
            'floating numbers, to perturb its rows; use site="output" for a '
            "quantized one. Received: layer "
            f"{self.layer.name!r} with weights "
            f"{[(v.name, v.dtype) for v in self.layer.variables]}"
        )

    @property
    def place(self):
        return id(self.layer), self.layer.name

    def describe(self, model):
        matrix = f"the embedding matrix of layer {path_of(self.layer, model)!r}"
        if not self.layer.built:
            return matrix
        rows, columns = self.variable().shape
        return f"{matrix}, {rows} x {columns}"

    def origin(self, objective, weights):
        variable = self.variable()
        if not self._is_only_looked_up(objective, weights, variable):
            return [objective.value(weights, variable)]
        ids = []

        def record(output, *args, **kwargs):
            if is_look_up(output, first_argument(args, kwargs)):
                tokens = first_argument(args, kwargs)
                ids.append(ops.cast(ops.reshape(tokens, (-1,)), "int32"))
            return output

        objective(weights, perturb={self.layer: record})
        if not ids:
            raise ValueError(
                "The layer to perturb takes no part in the model's forward "
                f"pass. Received: layer {self.layer.name!r}"
            )
        self._step.rows = rows_of_tokens(ops.concatenate(ids))
        shape = (ops.shape(self._step.rows)[0], variable.shape[-1])
        return [ops.zeros(shape, dtype=variable.dtype)]

    def at(self, objective, weights, point, data=None):
        if self._only_looked_up:
            return weights, {"perturb": {self.layer: self._add(point[0])}}
        variable = self.variable()
        index = objective.index(variable)
        if index is None:
            return weights, {"values": [(variable, point[0])]}
        # The point replaces the weight and is not added inside the loss. So the
        # embedding's gradient stays sparse, as in Keras's own train step.
        return [*weights[:index], point[0], *weights[index + 1 :]], {}

    def merge(self, objective, gradients, point_gradients):
        index = objective.index(self.variable())
        if index is None or self._only_looked_up:
            return gradients
        return [
            *gradients[:index],
            point_gradients[0],
            *gradients[index + 1 :],
        ]

    def _add(self, offsets):
        start = 0

        def add(output, *args, **kwargs):
            nonlocal start
            tokens = first_argument(args, kwargs)
            if not is_look_up(output, tokens):
                return output
            size = ops.size(tokens)
            rows = ops.reshape(
                self._step.rows[start : start + size], ops.shape(tokens)
            )
            start = start + size
            delta = ops.take(offsets, rows, axis=0)
            return output + ops.cast(delta, output.dtype)

        return add

    def _is_only_looked_up(self, objective, weights, variable):
        if self._only_looked_up is None:
            self._only_looked_up = backend.num_replicas() == 1 and not (
                self._is_used_elsewhere(objective, weights, variable)
            )
        return self._only_looked_up

    def _is_used_elsewhere(self, objective, weights, variable):
        survey = try_survey_step(objective, weights, [(self.layer, variable)])
        return survey is None or bool(survey.matrices_used)


class InputSite(Site):
    """The model's floating inputs (images, spectra, measurements).

    The values are those that the model casts its inputs to: bytes of an image
    become the floating numbers of the model's `Input`.

    Args:
        index: The only input to perturb, of `tree.flatten(x)`, or its name.
            `None`: all floating inputs, but not those that are masks by name.
        padding_mask: String, the name of the input that marks padding.
    """

    is_input = True

    def __init__(self, index=None, padding_mask=None):
        self.index = index
        self._padding = Padding(padding_mask)
        self._step = threading.local()  # a thread for each replica

    @property
    def place(self):
        return "input", self.index

    def check_dense(self, leaves):
        """Raises where a `Leaf` that is perturbed is sparse."""
        sparse = [
            leaf.names
            for number, leaf in enumerate(leaves)
            if leaf.is_sparse
            and leaf.is_float
            and (self.index in (None, number) or self.index in leaf.names)
        ]
        if sparse:
            raise ValueError(
                "Expected dense inputs: a sparse one cannot be perturbed. Give "
                "it dense, or name the layer behind it as `embedding_name`, "
                'with site="output", or a dense input. '
                f"Received: sparse inputs {sparse}"
            )

    def describe(self, model):
        if self.index is None:
            return "all floating inputs that are not masks"
        return f"the input {self.index!r}"

    def _indices(self, objective):
        leaves = describe(objective.model, objective.data[0])
        if isinstance(self.index, int):
            return [self.index]
        if self.index is not None:
            return [i for i, x in enumerate(leaves) if self.index in x.names]
        found = [i for i, x in enumerate(leaves) if x.is_float]
        masks = self._padding.inputs(objective)
        return [i for i in found if i not in masks] or found

    def origin(self, objective, weights):
        x = objective.data[0]
        leaves, flat = describe(objective.model, x), tree.flatten(x)
        self.check_dense(leaves)
        indices = self._indices(objective)
        if not indices:
            raise ValueError(
                "Nothing to perturb: the inputs are integers, and the model "
                "does not say to which floating numbers it casts them. Give "
                "floating inputs, or name the layer that casts them, with "
                'site="output". Received: inputs of dtype '
                f"{[str(t.dtype) for t in flat if t is not None]}"
            )
        origin = []
        for index in indices:
            dtype = leaves[index].dtype or str(
                keras.backend.standardize_dtype(flat[index].dtype)
            )
            if leaves[index].dtype is None and dtype == "float64":
                # `train_on_batch` passes NumPy's float64 on to the step.
                dtype = keras.config.floatx()
            origin.append(ops.cast(flat[index], dtype))
        self._step.masks = self._find_masks(objective, weights, origin, indices)
        return origin

    def _find_masks(self, objective, weights, origin, indices):
        if all(len(x.shape) < 3 for x in origin):
            return [None] * len(origin)  # no positions
        with self._padding.watch(objective) as watch:
            if self._padding.needs_pass:
                objective(weights, perturb=watch({}))
        return self._padding.masks(
            objective,
            weights,
            origin,
            [None] * len(origin),
            lambda survey: [{index} for index in indices],
        )

    def at(self, objective, weights, point, data=None):
        x, y, sample_weight = objective.data if data is None else data
        # `train_on_batch` passes arrays; Keras takes all tensors or all arrays.
        flat = [
            ops.convert_to_tensor(t) if isinstance(t, np.ndarray) else t
            for t in tree.flatten(x)
        ]
        for index, value in zip(self._indices(objective), point, strict=True):
            flat[index] = value
        return weights, {
            "data": (tree.pack_sequence_as(x, flat), y, sample_weight)
        }

    def mask(self, tensors):
        return masked(tensors, self._step.masks)

    def padding(self, shape):
        return self._padding.of_output(shape)


def path_of(layer, model):
    """The path of a layer in a model, by which it can be named."""
    paths = (p for p, other in named_layers(model) if other is layer)
    return next(paths, layer.name)


def masked(tensors, masks):
    """Zero where the mask of a tensor's first axes is false."""
    found = []
    for x, mask in zip(tensors, masks, strict=True):
        if mask is not None:
            for _ in range(len(x.shape) - len(mask.shape)):
                mask = ops.expand_dims(mask, -1)
            x = ops.where(mask, x, ops.zeros_like(x))
        found.append(x)
    return found


def rows_of_tokens(tokens):
    """A row number for each token: equal tokens have the same row."""
    order = ops.argsort(tokens)
    tokens = ops.take(tokens, order, axis=0)
    is_new = ops.cast(tokens[1:] != tokens[:-1], "int32")
    numbers = ops.concatenate([ops.zeros((1,), "int32"), ops.cumsum(is_new)])
    return ops.take(numbers, ops.argsort(order), axis=0)
