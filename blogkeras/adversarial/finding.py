"""Finds the site of a model: by a name, or the token embedding."""

import keras
from keras import tree

from blogkeras import training
from blogkeras.adversarial.sites import (
    InputSite,
    MatrixSite,
    OutputSite,
    Site,
)
from blogkeras.adversarial.survey import (
    Survey,
    describe,
    is_embedding,
    named_layers,
    survey_step,
)

# The value for unknown sizes while a model is traced. The result does not
# depend on it. It is small because some models have only a few positions.
_SIZE = 8


def find_site(model, name=None, kind="matrix", padding_mask=None):
    """Finds where a model is to be perturbed.

    Args:
        model: A `keras.Model`.
        name: The name of a layer or its path `"outer/inner"`, or the name of a
            floating input. `None` finds the token embedding: the largest
            vocabulary in which values of the model's inputs are looked up;
            without embeddings, the floating inputs.
        kind: `"matrix"` or `"output"`.
        padding_mask: Name of the input that is 1 at real positions and 0 at
            padding. `None` finds one.

    Returns:
        A `Site`. That of a model which cannot be traced ahead, such as a
        subclassed one, is found in the first step.

    Raises:
        ValueError: If the name fits nothing or several layers, if two
            embeddings are equally large, or if nothing can be perturbed. The
            message lists the candidates.
    """
    x = _symbolic_input(model)
    finder = _Finder(model, name, kind, padding_mask)
    if x is None:
        return DeferredSite(finder)
    if name is not None:
        return finder.named(x)
    if not finder.embeddings():
        return finder.choose((), x)
    try:
        # The model runs as in `predict`; nothing is assigned.
        with keras.StatelessScope():
            survey = Survey(model, x, _forward(model))
    except Exception:
        # Not every model can be traced with these sizes; then the first step of
        # `fit` finds the site.
        return DeferredSite(finder)
    return finder.choose([layer for layer, _ in survey.look_ups], x)


class DeferredSite(Site):
    """A site that is found in the first training step."""

    is_input = True  # perhaps

    def __init__(self, finder):
        self._finder = finder
        self._site = None

    def origin(self, objective, weights):
        if self._site is None:
            self._site = self._find(objective, weights)
            self.shared, self.batched = self._site.shared, self._site.batched
            self.is_input = self._site.is_input
        return self._site.origin(objective, weights)

    def _find(self, objective, weights):
        x, finder = objective.data[0], self._finder
        if finder.name is not None:
            return finder.named(x)
        if not finder.embeddings():
            return finder.choose((), x)
        try:
            survey = survey_step(objective, weights)
        except Exception as error:
            raise ValueError(
                "Expected `embedding_name`: the model cannot be traced to see "
                f"which embedding looks up its inputs ({error}). Received: "
                f"embedding_name=None; {finder.listing(x)}"
            ) from error
        return finder.choose([layer for layer, _ in survey.look_ups], x)

    def describe(self, model):
        if self._site is not None:
            return self._site.describe(model)
        name = self._finder.name
        if name is not None:
            return f"{name!r}, which is looked for in the first step"
        return "what the first step finds: the token embedding or the inputs"

    @property
    def place(self):
        return None if self._site is None else self._site.place

    def at(self, objective, weights, point, data=None):
        return self._site.at(objective, weights, point, data)

    def mask(self, tensors):
        return self._site.mask(tensors)

    def padding(self, shape):
        return self._site.padding(shape)

    def merge(self, objective, gradients, point_gradients):
        return self._site.merge(objective, gradients, point_gradients)


class _Finder:
    """A search for a site in one model."""

    def __init__(self, model, name, kind, padding_mask):
        self.model = model
        self.name = name
        self.kind = kind
        self.padding_mask = padding_mask

    def choose(self, reached, x):
        """The site of the largest vocabulary among the layers reached."""
        candidates = {
            path: layer
            for path, layer in self.embeddings().items()
            if any(layer is other for other in reached)
        }
        if not candidates:
            leaves = describe(self.model, x)
            if any(leaf.is_float for leaf in leaves):
                return self._input_site(None, leaves)
            raise ValueError(
                "Nothing to perturb: the model's inputs are integers and no "
                "embedding layer looks them up. Name the layer whose output is "
                "to be perturbed (of images the one that makes floating "
                'numbers of them, such as Rescaling), with site="output". '
                f"Received: embedding_name=None; {self.listing(x)}"
            )
        largest = max(layer.input_dim for layer in candidates.values())
        best = [
            path
            for path, layer in candidates.items()
            if layer.input_dim == largest
        ]
        if len(best) > 1:
            raise ValueError(
                f"{len(best)} embedding layers have the largest vocabulary: "
                f"{best}. Name the one to perturb as `embedding_name`. "
                f"Received: embedding_name=None; {self.listing(x)}"
            )
        return self._site(candidates[best[0]])

    def named(self, x):
        """The site of the layer or input with the name."""
        name = self.name
        found = {
            path: layer
            for path, layer in named_layers(self.model)
            if name in (path, layer.name)
        }
        leaves = describe(self.model, x)
        inputs = [leaf for leaf in leaves if name in leaf.names]
        if inputs and all(
            isinstance(layer, keras.layers.InputLayer)
            for layer in found.values()
        ):
            return self._named_input(inputs, x)
        if len(found) != 1:
            problem = (
                f"several layers have this name: {list(found)}; give the path"
                if found
                else "the model has no such layer"
            )
            raise ValueError(
                "Expected the name of one layer to perturb, but "
                f"{problem}. Received: embedding_name={name!r}; "
                f"{self.listing(x)}"
            )
        (layer,) = found.values()
        if isinstance(layer, keras.layers.InputLayer):
            return self._named_input(inputs, x)
        if self.kind == "matrix" and not is_embedding(layer):
            raise ValueError(
                "Expected an embedding layer, since its matrix is to be "
                "perturbed; to perturb the output of another layer use "
                'method=FGM(site="output"). Received: '
                f"embedding_name={name!r}, a {type(layer).__name__}; "
                f"{self.listing(x)}"
            )
        return self._site(layer)

    def _named_input(self, inputs, x):
        if not any(leaf.is_float for leaf in inputs):
            raise ValueError(
                "Expected a floating input of the model: integers cannot be "
                f"perturbed. Received: embedding_name={self.name!r}; "
                f"{self.listing(x)}"
            )
        return self._input_site(self.name, inputs)

    def _input_site(self, name, leaves):
        site = InputSite(name, self.padding_mask)
        site.check_dense(leaves)
        return site

    def _site(self, layer):
        if self.kind == "output":
            return OutputSite(layer, self.padding_mask)
        if self.padding_mask is not None:
            raise ValueError(
                "Expected no `padding_mask`: the embedding matrix has no "
                'positions to mask; use site="output". Received: '
                f'site="matrix", padding_mask={self.padding_mask!r}'
            )
        site = MatrixSite(layer)
        if layer.built:
            site.variable()  # one of floating numbers
        return site

    def embeddings(self):
        return {
            path: layer
            for path, layer in named_layers(self.model)
            if is_embedding(layer)
        }

    def listing(self, x):
        """The candidates and the inputs, for messages."""
        found = {path: e.input_dim for path, e in self.embeddings().items()}
        inputs = [f"{t.dtype}" for t in tree.flatten(x) if t is not None]
        return (
            f"embedding layers and their vocabularies: {found or 'none'}, "
            f"inputs of dtype {inputs}"
        )


def _symbolic_input(model):
    """Symbolic inputs like the model's own, `None` if it does not have any."""
    if not model.built:
        return None
    if isinstance(model, keras.Sequential):
        x = model.inputs[0] if model.inputs else None
    else:
        x = getattr(model, "input", None)
    if x is None:
        return None
    return tree.map_structure(
        lambda t: keras.KerasTensor(
            [_SIZE if size is None else size for size in t.shape], t.dtype
        ),
        x,
    )


def _forward(model):
    def run(x, perturb, values):
        with training.perturbed(perturb):
            model(x)

    return run
