"""Keras 2's interface between a layer and Keras, on Keras 3.

The classes of this file are the base classes that bert4keras finds in
`keras.layers` while it is being imported. The differences between the two
versions of Keras are handled here; bert4keras's own code is not edited.
"""

import contextvars
import functools
import inspect
import types

import keras
import numpy as np
import tensorflow as tf

from blogkeras.backend import dropout, get_keras_mask, set_keras_mask
from blogkeras.bert4keras.names import get_initializer

# The bridged layer whose `build` or `call` is running, if any. Layers that
# bert4keras creates in these (Dense, Dropout, ...) find their owner by it.
_at_work = contextvars.ContextVar("bridged layer at work", default=None)


# Whether a layer's `call` is running only to find out the shape of its output.
_inferring = contextvars.ContextVar("inferring an output", default=False)


def is_inferring():
    """Tells whether a bridged layer's `call` runs for the output's shape."""
    return _inferring.get()


def layer_at_work():
    """Returns the bridged layer whose `build` or `call` is running."""
    return _at_work.get()


def inner_dtype(owner):
    """Returns the dtype policy for a layer made inside of `owner`."""
    if owner is None:
        return None
    return owner.dtype_policy if owner.half_precision else owner.variable_dtype


class _Traced(keras.Operation):
    """A function whose outputs can be inferred from symbolic inputs."""

    def __init__(self, function):
        super().__init__()
        self.call = function


def is_symbolic(*structures):
    """Tells whether there is a symbolic tensor among the arguments."""
    return any(
        isinstance(x, keras.KerasTensor) for x in keras.tree.flatten(structures)
    )


def cast_with_mask(x, dtype):
    """`x` as `dtype`, with its mask, which is found at the tensor."""
    mask, x = get_keras_mask(x), keras.ops.cast(x, dtype)
    if mask is not None:
        set_keras_mask(x, mask)
    return x


def _cast(structure, dtype):
    """Casts the floating point tensors of a nested structure."""

    def cast(x):
        kind = keras.backend.standardize_dtype(getattr(x, "dtype", "bool"))
        if not keras.backend.is_float_dtype(kind) or kind == dtype:
            return x
        return cast_with_mask(x, dtype)

    return keras.tree.map_structure(cast, structure)


def _none_if_no_mask(mask):
    """Keras 2 says `None`, Keras 3 says `[None, None]`."""
    if isinstance(mask, (list, tuple)) and all(m is None for m in mask):
        return None
    return mask


def _without_mask(inputs, outputs):
    """Copies the outputs that have a mask or are inputs.

    In Keras 3 an output keeps a mask that it already has, from the layer's
    input or from a layer inside, and `compute_mask` is not called. Keras 2.3.1
    always calls it, and copies inputs that are returned unchanged:
    https://github.com/keras-team/keras/blob/2.3.1/keras/engine/base_layer.py#L487-L500
    """
    given = {id(x) for x in keras.tree.flatten(inputs)}

    def copy(x):
        if not tf.is_tensor(x) or isinstance(x, keras.KerasTensor):
            return x
        if id(x) in given or get_keras_mask(x) is not None:
            return tf.identity(x)
        return x

    return keras.tree.map_structure(copy, outputs)


def _working(method):
    """Marks the layer as the running one during `build`."""

    @functools.wraps(method)
    def build(self, *args, **kwargs):
        token = _at_work.set(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            _at_work.reset(token)

    return build


def _calling(method):
    """Marks the layer as the running one during `call`.

    Under a half-precision policy a layer computes in its variables' dtype,
    unless it is one of the few dominated by matrix products.
    """

    @functools.wraps(method)
    def call(self, inputs, *args, **kwargs):
        if "mask" in kwargs:
            kwargs["mask"] = _none_if_no_mask(kwargs["mask"])
        if layer_at_work() is self:  # super().call(...)
            return method(self, inputs, *args, **kwargs)
        mixed = self.compute_dtype != self.variable_dtype
        mixed = mixed and not self.half_precision
        given = inputs
        if mixed:
            inputs = _cast(inputs, self.variable_dtype)
        token = _at_work.set(self)
        try:
            outputs = method(self, inputs, *args, **kwargs)
        finally:
            _at_work.reset(token)
        if mixed:
            outputs = _cast(outputs, self.compute_dtype)
        return _without_mask(given, outputs)

    return call


def _masking(method):
    """Gives `compute_mask` the arguments that Keras 2 gave.

    Keras 3 calls it with symbolic tensors, too. The functions of
    `keras.backend` take them, other TensorFlow functions refuse.
    """

    @functools.wraps(method)
    def compute_mask(self, inputs, mask=None):
        mask = _none_if_no_mask(mask)
        try:
            return method(self, inputs, mask)
        except (TypeError, ValueError):
            if not is_symbolic(inputs, mask):
                raise
            compute = _Traced(functools.partial(method, self))
            return compute.compute_output_spec(inputs, mask)

    return compute_mask


_ADAPTERS = {"build": _working, "call": _calling, "compute_mask": _masking}


class Variable(keras.Variable):
    """A variable whose arithmetic with NumPy's arrays keeps its own dtype.

    In Keras 2 a float64 array takes the dtype of the weight that it is
    multiplied with; a variable of Keras 3 becomes float64 itself.
    """

    # `array * variable` calls this class's method, not NumPy's.
    __array_priority__ = 200


def _keeping_dtype(name):
    operator = getattr(keras.Variable, name)

    @functools.wraps(operator)
    def method(self, other):
        if isinstance(other, (np.ndarray, np.generic)):
            if keras.backend.is_float_dtype(other.dtype.name):
                other = keras.ops.convert_to_tensor(other, self.value.dtype)
        return operator(self, other)

    return method


for _operator in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _name in (f"__{_operator}__", f"__r{_operator}__"):
        setattr(Variable, _name, _keeping_dtype(_name))


class Bridged:
    """Mixin of every layer that bert4keras sees or defines."""

    # Whether `call` computes in the policy's compute dtype (matrix products)
    # or in that of the variables (norms, positions, losses).
    half_precision = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, adapter in _ADAPTERS.items():
            if name in vars(cls):
                setattr(cls, name, adapter(vars(cls)[name]))

    def __init__(self, *args, **kwargs):
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = inner_dtype(layer_at_work())
        super().__init__(*args, **kwargs)
        self.autocast = self.half_precision

    def __call__(self, *args, **kwargs):
        # Keras 3 would treat `None`s in `**kwargs` as a second tensor argument,
        # and not pass the mask of the first.
        known = self.call_signature_parameters
        kwargs = {
            k: v for k, v in kwargs.items() if v is not None or k in known
        }
        if "mask" in known:
            # Otherwise Keras 3 makes the mask of the tensor an input of the
            # model's node.
            kwargs.setdefault("mask", None)
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name, value):
        # Keras 3 trains only variables of its own class, and silently ignores
        # others.
        if isinstance(value, tf.Variable):
            value = as_variable(value)
        elif isinstance(value, (list, tuple)) and any(
            isinstance(x, tf.Variable) for x in value
        ):
            value = [as_variable(x) for x in value]
        super().__setattr__(name, value)

    def add_weight(self, *args, **kwargs):
        """Adds a weight, from the arguments of Keras 2 or of Keras 3."""
        names = ("shape", "initializer")
        if args and (args[0] is None or isinstance(args[0], str)):
            names = ("name", "shape", "dtype", "initializer", "regularizer")
            names += ("trainable", "constraint")
        kwargs.update(zip(names, args, strict=False))
        if kwargs.get("name"):
            kwargs["name"] = kwargs["name"].replace("/", "_")
        # Weights are read in half precision only by layers that compute in it.
        kwargs.setdefault("autocast", self.half_precision)
        variable = super().add_weight(**kwargs)
        if type(variable) is keras.Variable:
            # Keras creates the variable, of another class.
            variable.__class__ = Variable
        return variable

    def add_metric(self, value, name=None, aggregation="mean"):
        """Shows the mean of `value` over the batches as a metric."""
        metric = mean_metric(self, name, aggregation)
        if not is_inferring():
            metric.update_state(keras.ops.mean(value))

    def add_update(self, updates, inputs=None):
        """Refuses the symbolic updates of Keras 2, unless there are none."""
        if updates:
            raise ValueError(
                "Keras 3 has no symbolic updates. Assign to the variable in "
                "`call`: K.update(variable, value) does so at once. "
                f"Received: updates={updates}"
            )

    @property
    def _trainable_weights(self):
        """Keras 2's list of the layer's own variables that are trained."""
        return self._trainable_variables

    @_trainable_weights.setter
    def _trainable_weights(self, variables):
        self._replace(self._trainable_variables, variables, trainable=True)

    @property
    def _non_trainable_weights(self):
        """Keras 2's list of the layer's own variables that are not trained."""
        return self._non_trainable_variables

    @_non_trainable_weights.setter
    def _non_trainable_weights(self, variables):
        self._replace(self._non_trainable_variables, variables, trainable=False)

    @property
    def trainable_weights(self):
        """The variables that are trained; may be set in `build`."""
        return super().trainable_weights

    @trainable_weights.setter
    def trainable_weights(self, variables):
        self._trainable_weights = variables

    def _replace(self, old, new, trainable):
        """Tracks the variables `new` instead of `old`."""
        new = [as_variable(v) for v in new]
        for v in new:
            if not isinstance(v, keras.Variable):
                raise ValueError(
                    "Expected variables, from K.variable or self.add_weight. "
                    f"Received: {v!r}"
                )
        for v in {id(v): v for v in [*old, *new]}.values():
            self._untrack_variable(v)
        for v in new:
            v.trainable = trainable
            self._track_variable(v)

    def compute_output_spec(self, *args, **kwargs):
        # Keras 3 would trust `compute_output_shape` and never trace `call`:
        # layers made in `build` would stay without weights.
        token = _inferring.set(True)
        try:
            return keras.Operation.compute_output_spec(self, *args, **kwargs)
        finally:
            _inferring.reset(token)

    def get_input_at(self, node_index):
        """The input(s) of one of several calls of a shared layer."""
        tensors = self._inbound_nodes[node_index].input_tensors
        return tensors[0] if len(tensors) == 1 else list(tensors)

    def get_output_at(self, node_index):
        """The output(s) of one of several calls of a shared layer."""
        tensors = self._inbound_nodes[node_index].outputs
        return tensors[0] if len(tensors) == 1 else list(tensors)

    @property
    def input_shape(self):
        """The static shape(s) of the input(s)."""
        return _shapes(self.get_input_at(0))

    @property
    def output_shape(self):
        """The static shape(s) of the output(s)."""
        return _shapes(self.get_output_at(0))

    def get_input_shape_at(self, node_index):
        """The static shape(s) of the input(s) of one of several calls."""
        return _shapes(self.get_input_at(node_index))

    def get_output_shape_at(self, node_index):
        """The static shape(s) of the output(s) of one of several calls."""
        return _shapes(self.get_output_at(node_index))


def _shapes(tensors):
    if isinstance(tensors, list):
        return [tuple(x.shape) for x in tensors]
    return tuple(tensors.shape)


def as_variable(value):
    """A variable of Keras that shares the value of one of TensorFlow.

    For the same variable of TensorFlow it is always the same one.
    """
    if not isinstance(value, tf.Variable):
        return value
    if not hasattr(value, "_as_keras_variable"):
        value._as_keras_variable = Variable(
            value,
            dtype=value.dtype.name,
            trainable=value.trainable,
            name=value.name.partition(":")[0].replace("/", "_"),
        )
    return value._as_keras_variable


def mean_metric(owner, name, aggregation="mean"):
    """Returns the metric `name` of a layer or model, made at its first use."""
    if aggregation != "mean":
        raise ValueError(
            "Expected `aggregation` to be 'mean'. "
            f"Received: aggregation={aggregation!r}"
        )
    if not isinstance(name, str):
        raise ValueError(
            "Expected `name` to be the name of the metric. "
            f"Received: name={name!r}"
        )
    for metric in owner._metrics:
        if metric.name == name:
            return metric
    with tf.init_scope():
        metric = keras.metrics.Mean(name=name)
    # The list itself: a layer that has been built takes no new attributes.
    owner._metrics.append(metric)
    return metric


class Layer(Bridged, keras.layers.Layer):
    """`keras.layers.Layer` of Keras 2, on Keras 3."""

    def build(self, input_shape=None):
        # Seeds for the `Dropout` that `call` creates, see `Dropout`.
        if getattr(self, "attention_dropout", None):
            self.seed_generator = keras.random.SeedGenerator()
        self.built = True

    def add_loss(self, loss, inputs=None):
        """Adds a loss; Keras 2's argument `inputs` is ignored."""
        super().add_loss(loss)


class Embedding(Bridged, keras.layers.Embedding):
    """`Embedding` whose `call` may be overridden with more arguments."""

    def __init__(self, input_dim, output_dim, *args, **kwargs):
        if "embeddings_initializer" in kwargs:
            kwargs["embeddings_initializer"] = get_initializer(
                kwargs["embeddings_initializer"]
            )
        super().__init__(input_dim, output_dim, *args, **kwargs)

    # The value that `call` has set `embeddings` to, while it runs.
    _in_place = None

    @property
    def embeddings(self):
        """The table. `call` may set it, to a tensor made from the table."""
        if self._in_place is not None:
            return self._in_place
        return super().embeddings

    @embeddings.setter
    def embeddings(self, value):
        object.__setattr__(self, "_in_place", value)

    def __call__(self, *args, **kwargs):
        try:
            return super().__call__(*args, **kwargs)
        finally:
            object.__setattr__(self, "_in_place", None)


class GlobalAveragePooling1D(Bridged, keras.layers.GlobalAveragePooling1D):
    """`GlobalAveragePooling1D` that bert4keras derives its own from."""


class GlobalMaxPooling1D(Bridged, keras.layers.GlobalMaxPooling1D):
    """`GlobalMaxPooling1D` that bert4keras derives its own from."""


class Lambda(Bridged, keras.layers.Lambda):
    """`Lambda` that drops masks without a warning, as Keras 2's does.

    A function nested in one of bert4keras's own is saved by its name and is
    found again in the installed package, so that no code is stored in the file.
    """

    call = keras.layers.Lambda.call

    def __init__(self, function, *args, **kwargs):
        super().__init__(function, *args, **kwargs)
        self.supports_masking = True

    def get_config(self):
        config = super().get_config()
        if _nested_function(self.function.__qualname__) is not None:
            config["function"] = self.function.__qualname__
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None, safe_mode=None):
        function = config["function"]
        if not isinstance(function, str):
            return super().from_config(config, custom_objects, safe_mode)
        return cls(**{**config, "function": _nested_function(function)})


def _nested_function(qualname):
    """Finds `Class.method.<locals>.name` in bert4keras; None if it is not."""
    import bert4keras.models
    import bert4keras.snippets

    path, _, name = qualname.rpartition(".<locals>.")
    for module in (bert4keras.models, bert4keras.snippets):
        function = module
        for part in path.split("."):
            function = getattr(function, part, None)
        code = getattr(inspect.unwrap(function), "__code__", None)
        for constant in code.co_consts if code else ():
            if isinstance(constant, types.CodeType) and (
                constant.co_name == name and not constant.co_freevars
            ):
                return types.FunctionType(constant, function.__globals__, name)
    return None


class Dropout(Bridged, keras.layers.Dropout):
    """`Dropout` that may also be made inside of another layer's `call`.

    There it uses its owner's seeds, since no variable can be created in `call`.
    """

    half_precision = True

    def __init__(self, rate, noise_shape=None, seed=None, **kwargs):
        generator = getattr(layer_at_work(), "seed_generator", None)
        own = generator is None
        super().__init__(rate if own else 0, noise_shape, seed, **kwargs)
        self.rate = rate
        self._seeds = lambda: self.seed_generator if own else generator

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        return dropout(inputs, self.rate, self.noise_shape, self._seeds())
