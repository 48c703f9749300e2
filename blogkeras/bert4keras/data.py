"""Converts data in the forms of Keras 2 to those of Keras 3.

Keras 2 took lists where Keras 3 needs tuples of arrays, `None` for missing
targets, and Python generators whose batches differ in length.
"""

import collections.abc

import keras
import numpy as np
import tensorflow as tf

# This class is not public. Keras uses an object of it without changes. In a
# generator whose first two batches happen to be equally long it would fix the
# lengths of all batches.
from keras.src.trainers.data_adapters.data_adapter import DataAdapter


def as_arrays(data):
    """Turns the inputs or the targets of one batch into arrays.

    Args:
        data: An array, a list of numbers, a list of arrays or of lists (one
            for each input or output of the model), a dictionary, or `None`.

    Returns:
        An array, or a tuple or dictionary of several arrays. `None`s are left
        out, and a single array is returned without a tuple.
    """
    if isinstance(data, dict):
        arrays = {name: _as_array(x) for name, x in data.items()}
        return arrays if len(arrays) != 1 else next(iter(arrays.values()))
    if not isinstance(data, (list, tuple)):
        return _as_array(data)
    if data and all(np.isscalar(x) for x in data):
        return np.array(data)
    arrays = tuple(_as_array(x) for x in data if x is not None)
    if not arrays:
        return None
    return arrays if len(arrays) != 1 else arrays[0]


def as_batch(item, inputs_only=False):
    """Turns what a generator yields into the tuple that Keras 3 expects.

    Args:
        item: `(x, y)`, `(x, y, sample_weight)`, `(x,)` or lists of the same.
        inputs_only: Whether the item is a batch for `predict`. There a list
            holds inputs, and only of a tuple the first entry is taken.

    Returns:
        A tuple of `x` and, where there are any, `y` and `sample_weight`.

    Raises:
        ValueError: on another number of entries, and where `x` is missing.
    """
    if inputs_only:
        entries = item[:1] if isinstance(item, tuple) else (item,)
    else:
        entries = item if isinstance(item, (list, tuple)) else (item,)
    if len(entries) > 3:
        raise ValueError(
            "Expected a generator to yield (x,), (x, y) or "
            f"(x, y, sample_weight). Received: {len(entries)} entries"
        )
    parts = [as_arrays(entry) for entry in entries]
    if not parts or parts[0] is None:
        raise ValueError(
            "Expected a generator to yield inputs, the first entry of a batch. "
            f"Received: {item!r}"
        )
    while parts[-1] is None:
        parts.pop()
    return tuple(parts)


def last_rows(entries, share):
    """The rows that `validation_split` takes of arrays, as Keras counts."""
    rows = len(keras.tree.flatten(entries)[0])
    start = int(rows * (1.0 - share))
    return tuple(
        None
        if entry is None
        else keras.tree.map_structure(lambda x: x[start:], entry)
        for entry in entries
    )


def validation_arrays(held_out):
    """Keras 2's list of validation data: inputs, targets and weights.

    Args:
        held_out: Tuple of `x`, `y` and maybe `sample_weight`, as arrays or
            structures of them; else there is no such list.

    Returns:
        The arrays, of at least two axes but for the weights, which are ones if
        there are none; or `None`.
    """
    if not isinstance(held_out, tuple):
        return None
    x, y, weights = (*held_out, None, None)[:3]
    x, y = ([np.asarray(a) for a in _in_order(part)] for part in (x, y))
    weights = _in_order(weights)
    if not weights:
        weights = [np.ones(len(target), "float32") for target in y]
    columns = [a[:, None] if a.ndim == 1 else a for a in (*x, *y)]
    return [*columns, *(np.asarray(w) for w in weights)]


def _in_order(part):
    """The arrays of an entry of a batch as a list."""
    if part is None:
        return []
    if isinstance(part, dict):
        return list(part.values())
    return list(part) if isinstance(part, (list, tuple)) else [part]


def is_iterator(data):
    """Tells whether `data` are batches of a generator or of a `Sequence`."""
    return isinstance(data, (collections.abc.Iterator, Sequence))


class Batches(DataAdapter):
    """Batches of a Python iterator, as an iterator and as data of Keras 3.

    `next` gives what the iterator gives: NumPy arrays. `fit`, `evaluate` and
    `predict` of any model of Keras 3 take it, and batches may have any lengths.

    Args:
        items: Iterator of batches, as Keras 2 took them.
        inputs_only: Whether the batches are inputs for `predict`.
        model: The model that they are for, if it is known: what sizes do not
            vary.
    """

    def __init__(self, items, inputs_only=False, model=None):
        self._items = iter(items)
        self._inputs_only = inputs_only
        # Not the model itself, which keeps these batches while it trains.
        self._inputs = getattr(model, "inputs", None) or []
        self._outputs = getattr(model, "outputs", None) or []
        self._pending = []  # read from the iterator, not yet returned

    def __iter__(self):
        return self

    def __next__(self):
        return self._pending.pop() if self._pending else next(self._items)

    def _batches(self):
        for item in self:
            yield as_batch(item, self._inputs_only)

    def get_tf_dataset(self):
        try:
            first = next(self)
        except StopIteration:
            raise ValueError(
                "Expected a generator of at least one batch. "
                "Received: a generator at its end"
            ) from None
        self._pending.append(first)
        first = as_batch(first, self._inputs_only)
        x, *others = first
        signature = (
            _specs(x, self._inputs, _input_size),
            *(_specs(y, self._outputs, _target_size) for y in others),
        )
        return tf.data.Dataset.from_generator(
            self._batches, output_signature=signature
        ).prefetch(tf.data.AUTOTUNE)

    num_batches = None
    batch_size = None
    has_partial_batch = None
    partial_batch_size = None


class Sequence:
    """Keras 2's `keras.utils.Sequence`: batches by their number.

    A subclass defines `__len__` and `__getitem__`, and `on_epoch_end` if it
    likes. It need not call any method of this class.
    """

    def on_epoch_end(self):
        """Is called after each pass through the batches."""

    def __iter__(self):
        for index in range(len(self)):
            yield self[index]


def endless(sequence, shuffle=False):
    """Yields the batches of a `Sequence` over and over."""
    while True:
        count = len(sequence)
        order = np.random.permutation(count) if shuffle else range(count)
        for index in order:
            yield sequence[int(index)]
        sequence.on_epoch_end()


def _as_array(x):
    # Lists, numbers, frames and series of pandas become arrays.
    listed = isinstance(x, (list, tuple)) or np.isscalar(x)
    return np.asarray(x) if listed or hasattr(x, "iloc") else x


def _specs(arrays, tensors, size):
    """What is known of all batches, by the first one and the model.

    Args:
        arrays: One entry of the first batch.
        tensors: The inputs or the outputs of the model, if they are known.
        size: Function of the size of an axis, the axis, the number of axes and
            the model's shape or `None`. Returns the size, or `None` if it may
            vary.
    """
    if isinstance(arrays, dict):
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        return {
            name: _spec(array, shapes.get(name), size)
            for name, array in arrays.items()
        }
    flat = keras.tree.flatten(arrays)
    shapes = [tensor.shape for tensor in tensors]
    if len(shapes) != len(flat):
        shapes = [None] * len(flat)
    specs = [_spec(*pair, size) for pair in zip(flat, shapes, strict=True)]
    return keras.tree.pack_sequence_as(arrays, specs)


def _spec(array, shape, size):
    array = np.asarray(array)
    sizes = [
        size(n, axis, array.ndim, shape)
        for axis, n in enumerate(array.shape)
        if axis
    ]
    dtype = "float32" if array.dtype == "float64" else array.dtype
    batch = [None] if array.ndim else []
    return tf.TensorSpec([*batch, *sizes], dtype)


def _input_size(size, axis, ndim, shape):
    """Layers such as convolutions need the sizes that the model's input has."""
    known = shape is not None and len(shape) == ndim and shape[axis] == size
    return size if known else None


def _target_size(size, axis, ndim, shape):
    """Losses and metrics look whether the last axis has the size 1."""
    if size != 1:
        return None
    if shape is None:
        return 1 if (ndim, axis) == (2, 1) else None
    # Beside an output of several classes it holds the number of the class.
    return 1 if axis >= len(shape) or shape[axis] is not None else None
