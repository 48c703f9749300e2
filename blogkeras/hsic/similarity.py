"""CKA of the layers of two models."""

import collections
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from blogkeras import backend, training
from blogkeras.arguments import as_numpy, check_integer, check_verbose
from blogkeras.hsic.kernels import LinearKernel, as_kernel
from blogkeras.hsic.tiles import prepare_all

LINEAR = LinearKernel()


class LayerSimilarity(NamedTuple):
    """The result of `compare_layers`.

    Attributes:
        matrix: NumPy array `(layers of a, layers of b)` of debiased CKA.
        layers_a: Names, one for each row.
        layers_b: Names, one for each column.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    >>> similarity = compare_layers(model, model, np.random.rand(16, 3))
    >>> similarity.matrix.shape
    (1, 1)

    Reference:
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414)
    """

    matrix: Any
    layers_a: list
    layers_b: list


def compare_layers(
    model_a: keras.layers.Layer,
    model_b: keras.layers.Layer,
    data: Any,
    *,
    kernel: Any = LINEAR,
    batch_size: int = 256,
    path: Any = None,
    verbose: str | int = 0,
) -> LayerSimilarity:
    """CKA of every layer of one model with every layer of another.

    The debiased CKA of minibatches, as in `CKA`, for all pairs of layers at
    once: each batch's kernel matrices are centered once, and all their inner
    products are one matrix product. Layers with several outputs are left out,
    and in subclassed models what has no row for each sample.

    Args:
        model_a: A built model. Of a Sequential or functional one, all layers
            are compared; of a subclassed one, the layers that it owns
            (`model.layers`) each time they are called, in this order: the
            second call of a layer is named `"name (call 2)"`.
        model_b: Likewise; may be the same one.
        data: Array, tensor or table, or list or dict of these, for the models'
            inputs; or an iterable of batches `x`, `(x, y)` or
            `(x, y, sample_weight)` such as a `tf.data.Dataset`.
        kernel: Kernel of all layers; linear by default, `None` is a Gaussian of
            median bandwidth.
        batch_size: Integer ≥ 4, for arrays.
        path: Where to write a heat map, if anywhere; the ending is the format.
        verbose: 1 shows a progress bar.

    Returns:
        `LayerSimilarity`, a named tuple `(matrix, layers_a, layers_b)`: the
        matrix `(layers of a, layers of b)` in NumPy, and the layers' names.

    Raises:
        ValueError: for models that are not built, on data of other shapes, and
            without a batch of 4 samples.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)]
    ... )
    >>> similarity = compare_layers(model, model, np.random.rand(64, 3))
    >>> similarity.matrix.diagonal().round(3)
    array([1., 1.])

    Reference:
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414);
        [Nguyen et al., 2021](https://arxiv.org/abs/2010.15327)
    """
    as_kernel(kernel)
    batch_size = check_integer("batch_size", batch_size, minimum=4)
    verbose = check_verbose(verbose)
    same = model_a is model_b
    taps_a = _taps(model_a, "model_a")
    taps_b = taps_a if same else _taps(model_b, "model_b")
    # Zeros; the layers' names are known after the first batch.
    cross = own_a = own_b = np.zeros(())
    used = 0
    batches, count = _batches(data, batch_size)
    progress = keras.utils.Progbar(count, verbose=verbose, unit_name="batch")
    for batch in batches:
        a = _centered(taps_a.predict(batch), kernel)
        if a is not None:
            b = a
            if not same:
                b = _centered(taps_b.predict(batch), kernel)
            cross = cross + a @ b.T
            own_a = own_a + np.sum(a * a, axis=1)
            own_b = own_b + np.sum(b * b, axis=1)
            used += 1
        progress.add(1)
    if not used:
        raise ValueError(
            "Expected at least one batch of 4 or more samples. Received: none"
        )
    norm = np.sqrt(own_a[:, None] * own_b)
    matrix = np.divide(cross, norm, out=np.zeros_like(cross), where=norm > 0)
    if path is not None:
        from blogkeras import report

        report.heat_map(
            path,
            matrix,
            taps_a.names,
            taps_b.names,
            ylabel=model_a.name,
            xlabel=model_b.name,
            title="CKA",
        )
    return LayerSimilarity(matrix, taps_a.names, taps_b.names)


class _FunctionalTaps:
    """The outputs of all layers of a Sequential or functional model."""

    def __init__(self, model):
        layers = [
            layer
            for layer in model.layers
            if not isinstance(layer, keras.layers.InputLayer)
            and isinstance(layer.output, keras.KerasTensor)
        ]
        sequential = isinstance(model, keras.Sequential)
        inputs = model.inputs[0] if sequential else model.input
        self.names = [layer.name for layer in layers]
        outputs = [layer.output for layer in layers]
        self.predict = keras.Model(inputs, outputs).predict_on_batch


class _RecordedTaps:
    """The outputs of the layers of any model, recorded while it is called.

    A subclassed model has no graph that could be cut open. Each layer it owns
    passes its output through a function for the time of the call.
    """

    def __init__(self, model):
        self.model = model
        self.names = None  # they are known after a batch
        self.program = backend.jit_layer(self._record, model, model.jit_compile)

    def _record(self, batch):
        names, outputs = [], []
        rows = keras.tree.flatten(batch)[0].shape[0]
        calls = collections.Counter()

        def recorder(layer):
            def record(output, *args, **kwargs):
                calls[layer.name] += 1
                if ops.is_tensor(output) and output.shape[:1] == (rows,):
                    number = calls[layer.name]
                    more = f" (call {number})" if number > 1 else ""
                    names.append(layer.name + more)
                    outputs.append(output)
                return output

            return record

        layers = {layer: recorder(layer) for layer in self.model.layers}
        with training.perturbed(layers):
            self.model(batch, training=False)
        if self.names not in (None, names):
            raise ValueError(
                "Expected a model that calls the same layers in each batch. "
                f"Received: calls of {self.names}, then of {names}"
            )
        self.names = names
        return outputs

    def predict(self, batch):
        batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
        return [ops.convert_to_numpy(x) for x in self.program(batch)]


def _taps(model, name):
    """What gives the outputs of a model's layers."""
    try:
        return _FunctionalTaps(model)
    except (AttributeError, ValueError, TypeError):
        # No graph, or one in which a layer is called more than once.
        is_model = isinstance(model, keras.Model)
        if is_model and model.built and model.layers:
            return _RecordedTaps(model)
    raise ValueError(
        f"Expected `{name}` to be a built model with layers; build it by "
        f"calling it on data. Received: {model!r}"
    )


def _batches(data, batch_size):
    arrays = data.values() if isinstance(data, dict) else data
    arrays = list(arrays) if isinstance(data, (dict, list, tuple)) else [data]
    # Tensors and tables, too: as iterables they give rows or names.
    if arrays and all(hasattr(a, "__array__") for a in arrays):
        data = keras.tree.map_structure(as_numpy, data)

        def part(start):
            stop = start + batch_size
            return keras.tree.map_structure(lambda a: a[start:stop], data)

        rows = len(keras.tree.flatten(data)[0])
        starts = range(0, rows, batch_size)
        return map(part, starts), len(starts)
    return (keras.utils.unpack_x_y_sample_weight(b)[0] for b in data), None


def _centered(outputs, kernel):
    """U-centered kernel matrices, `(layers, n²)`; ⟨a, b⟩ / n(n−3) is HSIC."""
    rows = []
    for output in keras.tree.flatten(outputs):
        features = np.reshape(output, (len(output), -1))
        n = len(features)
        if n < 4:
            return None
        (gram,), _ = prepare_all([("x", features, kernel)], None, "biased")
        matrix = ops.convert_to_numpy(gram.matrix()).astype("float64")
        matrix = np.ldexp(matrix, gram.exponent)
        np.fill_diagonal(matrix, 0)
        sums = matrix.sum(axis=1) / (n - 2)
        matrix += sums.sum() / (n - 1) - sums - sums[:, None]
        np.fill_diagonal(matrix, 0)
        rows.append(matrix.ravel() / math.sqrt(n * (n - 3)))
    return np.stack(rows)
