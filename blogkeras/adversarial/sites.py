"""Where a model is perturbed: embedding matrix, layer output, float input."""

import keras
from keras import ops, tree

from blogkeras import training


class Site:
    """A place whose values an adversarial method may move.

    The values there in the present step are its *origin*, a list of tensors; a
    *point* is a list of the same shapes, and the loss at a point is that of the
    model with its values in place of the origin's.
    """

    def origin(self, objective, weights):
        """The unperturbed values, a list of floating tensors."""
        raise NotImplementedError

    def at(self, objective, weights, point):
        """Moves the model to `point`.

        Returns:
            `(weights, kwargs)` for `objective(weights, **kwargs)`.
        """
        raise NotImplementedError

    def mask(self, gradients):
        """Removes what must not be perturbed (padding) from gradients."""
        return gradients

    def merge(self, objective, gradients, point_gradients):
        """Gradients of the weights, where those at the point are some of them.

        Args:
            objective: A `training.Objective`.
            gradients: Gradients of the weights given to `at`.
            point_gradients: Gradients of the point given to `at`.
        """
        return gradients

    # Whether each replica holds its share of one quantity (the gradient of the
    # shared matrix), and not values of its own (its samples).
    shared = False
    # Whether the first axis of each tensor is the batch.
    batched = True


class Matrix(Site):
    """The embedding matrix: one perturbation per vocabulary entry."""

    shared = True
    batched = False

    def __init__(self, layer):
        self.layer = layer

    def _variable(self):
        # With LoRA the effective matrix is this variable plus the low-rank
        # product: moving either moves the sum.
        for variable in self.layer.variables:
            if variable.name == "embeddings":
                return variable
        raise ValueError(
            "The embedding layer has no weight named 'embeddings' to perturb; "
            'use site="output". Received: layer '
            f"{self.layer.name!r} with weights "
            f"{[v.name for v in self.layer.variables]}"
        )

    def origin(self, objective, weights):
        return [objective.value(weights, self._variable())]

    def at(self, objective, weights, point):
        variable = self._variable()
        index = objective.index(variable)
        if index is None:
            return weights, {"values": [(variable, point[0])]}
        # In the weights, not added inside the loss: so the embedding's gradient
        # stays as sparse as the optimizer of plain Keras would see it.
        return [*weights[:index], point[0], *weights[index + 1 :]], {}

    def merge(self, objective, gradients, point_gradients):
        index = objective.index(self._variable())
        if index is None:
            return gradients
        return [
            *gradients[:index],
            point_gradients[0],
            *gradients[index + 1 :],
        ]


class Output(Site):
    """The outputs of a layer: each position has a perturbation of its own.

    The values are offsets, with origin zero, one tensor per call of the layer.
    Of an embedding only look-ups count: the calls that give one dimension more
    than they take. The tied softmax of the same layer is left clean.
    """

    def __init__(self, layer):
        self.layer = layer
        self.is_embedding = isinstance(layer, keras.layers.Embedding)
        self._masks = []

    def _is_look_up(self, output, inputs):
        return not self.is_embedding or len(output.shape) > len(inputs.shape)

    def origin(self, objective, weights):
        offsets, self._masks = [], []

        def record(output, inputs=None, *args, **kwargs):
            if self._is_look_up(output, inputs):
                offsets.append(ops.zeros_like(ops.stop_gradient(output)))
                self._masks.append(
                    self.layer.compute_mask(inputs, None)
                    if self.is_embedding
                    else None
                )
            return output

        # Only the shapes are of use here; the compiler drops the rest.
        objective(weights, perturb={self.layer: record})
        if not offsets:
            raise ValueError(
                "The layer to perturb takes no part in the model's forward "
                f"pass. Received: layer {self.layer.name!r}"
            )
        return offsets

    def at(self, objective, weights, point):
        offsets = iter(point)

        def add(output, inputs=None, *args, **kwargs):
            if self._is_look_up(output, inputs):
                return output + ops.cast(next(offsets), output.dtype)
            return output

        return weights, {"perturb": {self.layer: add}}

    def mask(self, gradients):
        return [
            g if mask is None else g * ops.cast(mask, g.dtype)[..., None]
            for g, mask in zip(gradients, self._masks, strict=True)
        ]


class Input(Site):
    """The model's floating inputs (images, spectra, measurements)."""

    def __init__(self, index=None):
        self.index = index  # the only one to perturb, or all

    def _is_perturbed(self, index, x):
        if self.index is not None:
            return index == self.index
        return _is_float(x)

    def origin(self, objective, weights):
        # `train_on_batch` hands NumPy's float64 through to the step.
        return [
            ops.cast(x, keras.config.floatx()) if x.dtype == "float64" else x
            for index, x in enumerate(tree.flatten(objective.data[0]))
            if self._is_perturbed(index, x)
        ]

    def at(self, objective, weights, point):
        x, y, sample_weight = objective.data
        values = iter(point)
        flat = [
            next(values) if self._is_perturbed(index, t) else t
            for index, t in enumerate(tree.flatten(x))
        ]
        return weights, {
            "data": (tree.pack_sequence_as(x, flat), y, sample_weight)
        }


class Deferred(Site):
    """A site that only the first training step can tell."""

    def __init__(self, name, kind):
        self.name = name
        self.kind = kind
        self._site = None

    def origin(self, objective, weights):
        if self._site is None:
            self._site = self._find(objective, weights)
            self.shared, self.batched = self._site.shared, self._site.batched
        return self._site.origin(objective, weights)

    def _find(self, objective, weights):
        model, x = objective.model, objective.data[0]
        if self.name is not None:
            return _named(model, self.name, self.kind, x)
        reached = _reached(
            model, x, lambda perturb: objective(weights, perturb=perturb)
        )
        return _choose(model, self.kind, reached, x)

    def at(self, objective, weights, point):
        return self._site.at(objective, weights, point)

    def mask(self, gradients):
        return self._site.mask(gradients)

    def merge(self, objective, gradients, point_gradients):
        return self._site.merge(objective, gradients, point_gradients)


def find_site(model, name=None, kind="matrix"):
    """Finds where a model is to be perturbed.

    Args:
        model: A `keras.Model`.
        name: The name of a layer or its path `"outer/inner"`, or the name of a
            floating input. `None` finds the token embedding: the largest
            vocabulary that is reached from an input of the model; without
            embeddings, the floating inputs.
        kind: `"matrix"` or `"output"`.

    Returns:
        A `Site`. That of a model which cannot be traced ahead, such as a
        subclassed one, is found in the first step.

    Raises:
        ValueError: If the name fits nothing or several layers, if two
            embeddings are equally large, or if nothing can be perturbed. The
            message lists the candidates.
    """
    x = _symbolic_input(model)
    if x is None:
        return Deferred(name, kind)
    if name is not None:
        return _named(model, name, kind, x)
    run = _SymbolicRun(model)
    try:
        run.compute_output_spec(x)
    except Exception:
        # Not every model can be traced with unknown sizes; `fit` will tell.
        return Deferred(name, kind)
    return _choose(model, kind, run.reached, x)


def _symbolic_input(model):
    """Symbolic inputs like the model's own, `None` if it does not have any."""
    if not model.built:
        return None
    if isinstance(model, keras.Sequential):
        x = model.inputs[0]
    else:
        x = getattr(model, "input", None)
    if x is None:
        return None
    return tree.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), x)


class _SymbolicRun(keras.layers.Layer):
    """Traces a model once to see which embeddings it reaches."""

    def __init__(self, model):
        super().__init__(name="symbolic_run")
        self._model = lambda: model  # not a sublayer
        self.reached = []

    def call(self, x):
        model = self._model()

        def run(perturb):
            with training.perturbed(perturb):
                model(x)

        self.reached = [*_reached(model, x, run)]
        return x


def _reached(model, x, run):
    """The embeddings that look up something of the batch `x`."""
    batch_size = _first_dimension(x)
    reached = []

    def note(layer):
        def fn(output, inputs=None, *args, **kwargs):
            # Positions, counted off inside the model, have no batch axis.
            is_look_up = len(output.shape) > len(inputs.shape) > 0
            if is_look_up and inputs.shape[0] == batch_size:
                reached.append(layer)
            return output

        return fn

    run({layer: note(layer) for layer in _embeddings(model).values()})
    return reached


def _choose(model, kind, reached, x):
    candidates = {
        path: layer
        for path, layer in _embeddings(model).items()
        if any(layer is other for other in reached)
    }
    if not candidates:
        if any(_is_float(t) for t in tree.flatten(x)):
            return Input()
        raise ValueError(
            "Nothing to perturb: the model's inputs are integers and no "
            "embedding layer looks them up. Name a layer whose output is to be "
            'perturbed, with method=FGM(site="output"). Received: '
            f"embedding_name=None; {_list(model, x)}"
        )
    largest = max(layer.input_dim for layer in candidates.values())
    best = [
        path for path, layer in candidates.items() if layer.input_dim == largest
    ]
    if len(best) > 1:
        raise ValueError(
            f"{len(best)} embedding layers have the largest vocabulary: "
            f"{best}. Name the one to perturb as `embedding_name`. Received: "
            f"embedding_name=None; {_list(model, x)}"
        )
    layer = candidates[best[0]]
    return Matrix(layer) if kind == "matrix" else Output(layer)


def _named(model, name, kind, x):
    found = {
        path: layer
        for path, layer in _layers(model)
        if name in (path, layer.name)
    }
    if len(found) != 1:
        problem = (
            f"several layers have this name: {list(found)}; give the path"
            if found
            else "the model has no such layer"
        )
        raise ValueError(
            f"Expected the name of one layer to perturb, but {problem}. "
            f"Received: embedding_name={name!r}; {_list(model, x)}"
        )
    (layer,) = found.values()
    if isinstance(layer, keras.layers.InputLayer):
        return _named_input(model, layer, name, x)
    if kind == "output":
        return Output(layer)
    if isinstance(layer, keras.layers.Embedding):
        return Matrix(layer)
    raise ValueError(
        "Expected an embedding layer, since its matrix is to be perturbed; to "
        'perturb the output of another layer use method=FGM(site="output"). '
        f"Received: embedding_name={name!r}, a {type(layer).__name__}; "
        f"{_list(model, x)}"
    )


def _named_input(model, layer, name, x):
    inputs = getattr(model, "inputs", None) or []
    for index, tensor in enumerate(inputs):
        if tensor is layer.output and _is_float(tensor):
            return Input(index)
    raise ValueError(
        "Expected a floating input of the model: integers cannot be "
        f"perturbed. Received: embedding_name={name!r}; {_list(model, x)}"
    )


def _list(model, x):
    found = {path: e.input_dim for path, e in _embeddings(model).items()}
    inputs = [f"{t.dtype}" for t in tree.flatten(x) if t is not None]
    return (
        f"embedding layers and their vocabularies: {found or 'none'}, "
        f"inputs of dtype {inputs}"
    )


def _embeddings(model):
    return {
        path: layer
        for path, layer in _layers(model)
        if isinstance(layer, keras.layers.Embedding)
    }


def _layers(parent, prefix="", seen=None):
    """Pairs `(path, layer)` of all layers inside, each once."""
    seen = set() if seen is None else seen
    children = parent._flatten_layers(include_self=False, recursive=False)
    for layer in children:
        if id(layer) not in seen:
            seen.add(id(layer))
            path = prefix + layer.name
            yield path, layer
            yield from _layers(layer, path + "/", seen)


def _first_dimension(x):
    return next(t for t in tree.flatten(x) if t is not None).shape[0]


def _is_float(x):
    return x is not None and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(x.dtype)
    )
