"""Names of Keras 2.3.1 that Keras 3 has removed or moved."""

import importlib
import inspect
import math
import types

import keras
import tensorflow as tf

# Modules of Keras 2.3.1 whose names are in another module now.
MOVED = {
    "engine.base_layer": "engine",
    "engine.input_layer": "engine",
    "engine.network": "engine",
    "engine.saving": "engine",
    "engine.sequential": "engine",
    "engine.topology": "engine",
    "engine.training": "engine",
    "backend.tensorflow_backend": "backend",
    "callbacks.callbacks": "callbacks",
    "layers.advanced_activations": "layers",
    "layers.convolutional": "layers",
    "layers.convolutional_recurrent": "layers",
    "layers.core": "layers",
    "layers.cudnn_recurrent": "layers",
    "layers.embeddings": "layers",
    "layers.local": "layers",
    "layers.merge": "layers",
    "layers.noise": "layers",
    "layers.normalization": "layers",
    "layers.pooling": "layers",
    "layers.recurrent": "layers",
    "layers.wrappers": "layers",
    "objectives": "losses",
    "utils.conv_utils": "utils",
    "utils.data_utils": "utils",
    "utils.generic_utils": "utils",
    "utils.io_utils": "utils",
    "utils.layer_utils": "utils",
    "utils.losses_utils": "losses",
    "utils.multi_gpu_utils": "utils",
    "utils.np_utils": "utils",
    "utils.training_utils": "utils",
    "utils.vis_utils": "utils",
}

_LOCAL = "its kernels differ from place to place, and Keras 3 has no such layer"
_KERAS_1 = "Keras 1 had it, and Keras 2 kept it for old files only"
_INNER = "it is a part of Keras 2's own machinery"
_QUEUE = "the generators of Keras 3 are fed by tf.data"

# Names of Keras 2.3.1 that are refused, and why.
REFUSED = {
    "layers": {
        "LocallyConnected1D": _LOCAL,
        "LocallyConnected2D": _LOCAL,
        "ConvLSTM2DCell": "use ConvLSTM2D",
        "ConvRecurrent2D": _KERAS_1,
        "Recurrent": _KERAS_1,
        "Highway": _KERAS_1,
        "MaxoutDense": _KERAS_1,
        "AtrousConvolution1D": "use Conv1D(dilation_rate=)",
        "AtrousConvolution2D": "use Conv2D(dilation_rate=)",
    },
    "models": {
        "model_from_yaml": "Keras 3 reads no YAML: use model.to_json()",
        "model_from_config": "use keras.Model.from_config",
        **dict.fromkeys(
            (
                "allow_read_from_gcs",
                "allow_write_to_gcs",
                "load_attributes_from_hdf5_group",
                "load_weights_from_hdf5_group",
                "load_weights_from_hdf5_group_by_name",
                "pickle_model",
                "preprocess_weights_for_loading",
                "save_attributes_to_hdf5_group",
                "save_weights_to_hdf5_group",
                "unpickle_model",
            ),
            _INNER,
        ),
    },
    "optimizers": {
        "TFOptimizer": "it wraps an optimizer of TensorFlow 1",
        "clip_norm": "use clipnorm= of the optimizer",
    },
    "losses": {
        "LossFunctionWrapper": "derive from keras.losses.Loss",
        "is_categorical_crossentropy": _INNER,
    },
    "metrics": {
        "BaseMeanIoU": _INNER,
        "Reduce": "derive from keras.metrics.Metric",
        "SensitivitySpecificityBase": _INNER,
        "clone_metric": "use type(metric).from_config(metric.get_config())",
        "clone_metrics": "use type(metric).from_config(metric.get_config())",
    },
    "callbacks": {"BaseLogger": "Keras 3 averages metrics itself"},
    "utils": {
        "GeneratorEnqueuer": _QUEUE,
        "OrderedEnqueuer": _QUEUE,
        "SequenceEnqueuer": _QUEUE,
        "H5Dict": "use h5py",
        "HDF5Matrix": "use h5py, and give the dataset as an array",
        "convert_all_kernels_in_model": "it was for Theano",
        "print_summary": "use model.summary()",
        "func_dump": "use keras.saving.serialize_keras_object",
        "func_load": "use keras.saving.deserialize_keras_object",
        **dict.fromkeys(
            (
                "add_edge",
                "check_for_unexpected_keys",
                "convert_dense_weights_data_format",
                "get_index",
                "getargspec",
                "init_pool",
                "init_pool_generator",
                "is_model",
                "is_wrapped_model",
                "metrics_utils",
                "next_sample",
                "object_list_uid",
                "slice_arrays",
                "transpose_shape",
                "validate_file",
            ),
            _INNER,
        ),
    },
    "engine": {
        "Network": "use keras.Model",
        "Node": _INNER,
        "disable_tracking": _INNER,
    },
    "preprocessing.image": {
        "DataFrameIterator": "use ImageDataGenerator",
    },
    "applications": dict.fromkeys(
        ("backend", "layers", "models", "utils"), _INNER
    ),
    "wrappers.scikit_learn": {
        "BaseWrapper": _INNER,
        "KerasClassifier": "use keras.wrappers.SKLearnClassifier",
        "KerasRegressor": "use keras.wrappers.SKLearnRegressor",
    },
}


class Module(types.ModuleType):
    """A module whose errors say why a name of Keras 2 is missing."""

    def __getattr__(self, name):
        if not name.startswith("__"):
            part = self.__name__.partition(".")[2]
            reason = REFUSED.get(part, {}).get(name)
            if reason:
                raise AttributeError(
                    f"`{self.__name__}.{name}` of Keras 2 has no counterpart "
                    f"on Keras 3: {reason}."
                )
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}"
        )


def add(root):
    """Adds the names of Keras 2.3.1 to the modules of `root`.

    Returns:
        The modules that are new, by their names.
    """
    _add_aliases(root)
    engine = Module("keras.engine")
    for name in ("Input", "InputLayer", "InputSpec", "Layer"):
        setattr(engine, name, getattr(root.layers, name))
    engine.Model, engine.Sequential = root.Model, root.Sequential
    engine.get_source_inputs = keras.utils.get_source_inputs
    engine.load_model = root.models.load_model
    engine.save_model = root.models.save_model
    engine.model_from_json = root.models.model_from_json
    root.engine = engine
    root.objectives = root.losses
    interfaces = _Interfaces("keras.legacy.interfaces")
    root.legacy.interfaces = interfaces
    modules = {"keras.engine": engine, "keras.legacy.interfaces": interfaces}
    scikit_learn = Module("keras.wrappers.scikit_learn")
    root.wrappers.scikit_learn = scikit_learn
    modules["keras.wrappers.scikit_learn"] = scikit_learn
    for part in ("text", "sequence", "image"):
        name = f"keras._tf_keras.keras.preprocessing.{part}"
        module = Module(f"keras.preprocessing.{part}")
        module.__dict__.update(vars(importlib.import_module(name)))
        module.__name__ = f"keras.preprocessing.{part}"
        setattr(root.preprocessing, part, module)
        modules[f"keras.preprocessing.{part}"] = module
    for old, new in MOVED.items():
        module = getattr(root, new)
        modules[f"keras.{old}"] = module
        parent, _, name = old.rpartition(".")
        if parent:
            setattr(getattr(root, parent), name, module)
    return modules


def _add_aliases(root):
    layers, losses, metrics = root.layers, root.losses, root.metrics
    for new, olds in {
        "LSTM": ["CuDNNLSTM"],
        "Conv1D": ["Convolution1D"],
        "Conv2D": ["Convolution2D"],
        "Conv3D": ["Convolution3D"],
        "Conv2DTranspose": ["Deconvolution2D", "Deconv2D"],
        "Conv3DTranspose": ["Deconvolution3D", "Deconv3D"],
        "SeparableConv1D": ["SeparableConvolution1D"],
        "SeparableConv2D": ["SeparableConvolution2D"],
    }.items():
        for old in olds:
            setattr(layers, old, getattr(layers, new))
    for dims in ("1D", "2D", "3D"):
        for kind, short in (("Max", "Max"), ("Average", "Avg")):
            for prefix in ("", "Global"):
                cls = getattr(layers, f"{prefix}{kind}Pooling{dims}")
                setattr(layers, f"{prefix}{short}Pool{dims}", cls)
    initializers = root.initializers
    for old, new in {
        "normal": "random_normal",
        "uniform": "random_uniform",
        "zero": "zeros",
        "one": "ones",
    }.items():
        setattr(initializers, old, getattr(initializers, new))
    for old, new in {
        "maxnorm": "max_norm",
        "nonneg": "non_neg",
        "unitnorm": "unit_norm",
    }.items():
        setattr(root.constraints, old, getattr(root.constraints, new))
    for name in ("SGD", "RMSprop", "Adagrad", "Adadelta", "Adam"):
        setattr(root.optimizers, name.lower(), getattr(root.optimizers, name))
    for name in ("Adamax", "Nadam"):
        setattr(root.optimizers, name.lower(), getattr(root.optimizers, name))
    losses.huber_loss = losses.huber
    losses.cosine_proximity = losses.cosine = losses.cosine_similarity
    for name in (
        "binary_accuracy",
        "categorical_accuracy",
        "sparse_categorical_accuracy",
        "top_k_categorical_accuracy",
        "sparse_top_k_categorical_accuracy",
    ):
        setattr(metrics, name, getattr(keras.metrics, name))
    metrics.accuracy = _accuracy
    for name in ("cosine_similarity", "cosine_proximity", "cosine"):
        setattr(metrics, name, _cosine_metric)
    root.models.Input, root.models.InputLayer = layers.Input, layers.InputLayer
    utils = root.utils
    utils.multi_gpu_model = multi_gpu_model
    for function in (
        count_params,
        has_arg,
        is_all_none,
        to_list,
        unpack_singleton,
    ):
        setattr(utils, function.__name__, function)


def _accuracy(y_true, y_pred):
    """1 where two tensors are equal, else 0."""
    return keras.ops.cast(keras.ops.equal(y_true, y_pred), "float32")


def _cosine_metric(y_true, y_pred, axis=-1):
    """The cosine of the angle; the loss of this name has a minus sign."""
    return -keras.losses.cosine_similarity(y_true, y_pred, axis)


def count_params(weights):
    """The number of entries of several variables."""
    return sum(math.prod(w.shape) for w in weights)


def has_arg(fn, name, accept_all=False):
    """Tells whether a function takes an argument of this name."""
    parameters = inspect.signature(fn).parameters
    if name in parameters:
        kind = parameters[name].kind
        return kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)
    return accept_all and any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


def is_all_none(iterable_or_element):
    """Whether all entries are `None`."""
    return all(x is None for x in to_list(iterable_or_element))


def to_list(x, allow_tuple=False):
    """`x` if it is a list, else a list of it."""
    if isinstance(x, list):
        return x
    return list(x) if allow_tuple and isinstance(x, tuple) else [x]


def unpack_singleton(x):
    """The entry of a list or tuple with one entry; else `x`."""
    return x[0] if len(x) == 1 else x


def multi_gpu_model(model, gpus=None, cpu_merge=True, cpu_relocation=False):
    """Splits each batch over several GPUs.

    Args:
        model: A model.
        gpus: Integer or list of integers: how many, or which. All if None.
        cpu_merge, cpu_relocation: Ignored.

    Returns:
        A model that shares the weights of `model`.
    """
    from bert4keras.models import data_parallel

    found = [d.name for d in tf.config.list_logical_devices("GPU")]
    numbers = range(len(found) if gpus is None else gpus)
    if isinstance(gpus, (list, tuple)):
        numbers = gpus
    if len(numbers) < 2 or max(numbers) >= len(found):
        raise ValueError(
            "Expected at least two GPUs that are there. "
            f"Received: gpus={gpus}, found {found}"
        )
    return data_parallel(model, devices=[found[i] for i in numbers])


class _Interfaces(types.ModuleType):
    """Keras 2's decorators for arguments of Keras 1: they change nothing."""

    def __getattr__(self, name):
        if name.startswith("legacy_"):
            return lambda function: function
        raise AttributeError(name)
