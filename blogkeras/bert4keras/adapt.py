"""The few parts of bert4keras that are replaced after its import, and why."""

import contextlib
import functools
import importlib

import keras

from blogkeras.bert4keras.data import Batches
from blogkeras.bert4keras.models import model_at_work
from blogkeras.bert4keras.optimizers import OPTIMIZERS, Optimizer
from blogkeras.bert4keras.weights import save_checkpoint


def adapt(bert4keras):
    """Adapts the imported modules of `bert4keras`."""
    backend, layers = bert4keras.backend, bert4keras.layers
    models, optimizers = bert4keras.models, bert4keras.optimizers
    snippets = bert4keras.snippets
    data_generator = snippets.DataGenerator
    # Layers of matrix products. All others compute in float32 under mixed
    # precision: norms, positions, masks with -inf and losses.
    for cls in (
        layers.MultiHeadAttention,
        layers.GatedAttentionUnit,
        layers.FeedForward,
        layers.GlobalPointer,
        layers.EfficientGlobalPointer,
        layers.Embedding,
    ):
        cls.half_precision = True
    # It needs the sessions of TensorFlow 1.
    models.Transformer.save_weights_as_checkpoint = save_checkpoint
    # The nodes of Keras 3 have another attribute for their parents.
    backend.search_layer = search_layer
    # It would create a new variable at each access to its learning rate.
    optimizers.AdaFactorBase.learning_rate = _fixed_learning_rate(
        optimizers.AdaFactorBase.learning_rate
    )
    # It needs the sessions of TensorFlow 1.
    optimizers.AdaFactorV1 = optimizers.AdaFactor
    # In Keras 2.3.1 bert4keras's Adam is Keras's, which scripts extend.
    for name, function in list(vars(optimizers).items()):
        if name.startswith("extend_with_"):
            extend = _of_bert4keras(function, optimizers.Adam)
            setattr(optimizers, name, extend)
    # It keeps a graph and a session of TensorFlow 1.
    snippets.WebServing.__init__ = _serving
    # Keras 3 takes neither lists nor Nones from a generator, and fixes the
    # lengths of all batches if the first two happen to be equally long.
    data_generator.forfit = _for_keras_3(data_generator.forfit)
    data_generator.fortest = _for_keras_3(data_generator.fortest, True)
    # Keras 3 takes no dictionary of one target.
    data_generator.to_dataset = _one_target(data_generator.to_dataset)


def search_layer(inputs, name, exclude_from=None):
    """Finds the layer `name` among those that a tensor comes from.

    Args:
        inputs: A symbolic tensor, or a layer (then of its first call). In the
            loss function of a bridged model any tensor: the search is through
            the model.
        name: String. The name of the layer.
        exclude_from: Set of layers not to look at, or None.

    Returns:
        The layer, or None if there is none of that name.
    """
    if not isinstance(inputs, (keras.Operation, keras.KerasTensor)):
        model = model_at_work()
        if model is not None:
            return _first_found(model.outputs, name, exclude_from)
        raise ValueError(
            "Expected a layer or a symbolic tensor. A loss of Keras 3 sees "
            "numbers only: take the layer by `model.get_layer(name)`, or Model "
            "from bert4keras: `from bert4keras.backend import keras`. "
            f"Received: inputs={inputs}"
        )
    seen = set() if exclude_from is None else exclude_from
    if isinstance(inputs, keras.Operation):
        layer = inputs
    else:
        layer = inputs._keras_history.operation
    if layer.name == name:
        return layer
    if layer in seen:
        return None
    seen.add(layer)
    for inner in getattr(layer, "layers", []):
        if inner.name == name:
            return inner
    parents = [node.operation for node in layer._inbound_nodes[0].parent_nodes]
    return _first_found(parents, name, seen)


def _first_found(starts, name, seen):
    found = (search_layer(start, name, seen) for start in starts)
    return next((layer for layer in found if layer is not None), None)


def _fixed_learning_rate(relative):
    """Returns AdaFactor's learning rate: a number, or a relative step."""

    def get(self):
        rate = self._learning_rate
        return relative.fget(self) if rate is None else rate

    def set(self, value):
        raise ValueError(
            "The learning rate of bert4keras's AdaFactor is fixed when it is "
            "made. Use extend_with_piecewise_linear_lr(AdaFactor), or "
            "keras.optimizers.Adafactor with a schedule. "
            f"Received: learning_rate={value}"
        )

    return property(get, set)


def _of_bert4keras(extend, adam):
    """Lets `extend` take Keras's Adam, for which bert4keras's stands in."""

    class KerasAdam(adam):
        """bert4keras's Adam with the arguments of Keras 2.3.1's."""

        def __init__(self, *args, **kwargs):
            if "lr" in kwargs:
                kwargs["learning_rate"] = kwargs.pop("lr")
            if len(args) < 4 and kwargs.get("epsilon") is None:
                kwargs["epsilon"] = keras.config.epsilon()
            super().__init__(*args, **kwargs)

    @functools.wraps(extend)
    def wrapped(BaseOptimizer, name=None):  # noqa: N803
        base = BaseOptimizer
        if base in (OPTIMIZERS["Adam"], keras.optimizers.Adam):
            base = KerasAdam
        if not issubclass(base, Optimizer):
            raise ValueError(
                "Expected an optimizer of bert4keras, or Keras's Adam: the "
                "extensions change single steps of an update, as bert4keras's "
                "optimizers are written (Adam, Lion, AdaFactor). "
                f"Received: BaseOptimizer={base}"
            )
        return extend(base, name)

    return wrapped


class _Anywhere:
    """Replaces the graph that a server's threads must enter."""

    as_default = staticmethod(contextlib.nullcontext)


def _serving(self, host="0.0.0.0", port=8000, server="paste"):
    """Sets up bottle; a model of Keras 3 may be called in any thread."""
    self.host, self.port, self.server = host, port, server
    self.bottle = importlib.import_module("bottle")
    self.graph, self.sess = _Anywhere, None
    self.set_session = lambda session: None


def _for_keras_3(method, inputs_only=False):
    """Lets the iterator that `method` returns be data of any Keras 3 model."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        return Batches(method(*args, **kwargs), inputs_only)

    return wrapped


def _one_target(to_dataset):
    @functools.wraps(to_dataset)
    def wrapped(*args, **kwargs):
        dataset = to_dataset(*args, **kwargs)
        spec = dataset.element_spec
        one = isinstance(spec, tuple) and len(spec) > 1
        if one and isinstance(spec[1], dict) and len(spec[1]) == 1:
            (name,) = spec[1]
            return dataset.map(lambda x, y, *rest: (x, y[name], *rest))
        return dataset

    return wrapped
