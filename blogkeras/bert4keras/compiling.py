"""What `compile` of Keras 2 did with losses and metrics.

A function of the user's own got targets in the dtype and of the rank that it
was written for, and a list of metrics counted for each output.
"""

import functools

import keras

from blogkeras.bert4keras.layers import cast_with_mask


def as_losses(losses):
    """Lets loss functions see targets `(n,)` as `(n, 1)`.

    Args:
        losses: A loss, as `compile` takes it, or lists or a dictionary of them.
    """
    return _map(losses, lambda loss: _seeing(loss, _as_column))


def as_metrics(metrics, num_outputs=1, weighted=False):
    """Lets metric functions see floats, and targets `(n,)` as `(n, 1)`.

    Args:
        metrics: Metrics, as `compile` takes them.
        num_outputs: Integer. A flat list of metrics counts for each of so many
            outputs.
        weighted: Whether these are metrics with weights of rows.
    """
    flat = isinstance(metrics, (list, tuple)) and not any(
        metric is None or isinstance(metric, (list, tuple, dict))
        for metric in metrics
    )
    if flat and num_outputs > 1:
        metrics = [[_copy(m) for m in metrics] for _ in range(num_outputs)]
    return _map(metrics, lambda metric: _seeing(metric, _as_floats, weighted))


def _map(items, change):
    # Keras's own `tree` would sort a dictionary.
    if isinstance(items, dict):
        return {key: _map(item, change) for key, item in items.items()}
    if isinstance(items, (list, tuple)):
        changed = [_map(item, change) for item in items]
        return tuple(changed) if isinstance(items, tuple) else changed
    return change(items)


def _copy(metric):
    if isinstance(metric, keras.metrics.Metric):
        return type(metric).from_config(metric.get_config())
    return metric


def _seeing(function, prepare, rows=False):
    """`function` of `prepare(y_true, y_pred)`; Keras's own stay as they are.

    Under `rows` a single number counts as the value of each row: Keras 3 cannot
    weigh it.
    """
    module = getattr(function, "__module__", None) or ""
    known = (type, keras.metrics.Metric, keras.losses.Loss)
    if not callable(function) or isinstance(function, known):
        return function
    if module.startswith("keras."):
        return function

    @functools.wraps(function)
    def wrapped(y_true, y_pred, *args, **kwargs):
        y_true, y_pred = prepare(y_true, y_pred)
        value = function(y_true, y_pred, *args, **kwargs)
        if rows and not len(keras.ops.shape(value)):
            shape = keras.ops.shape(y_pred)
            value = keras.ops.broadcast_to(
                value, shape[: max(len(shape) - 1, 1)]
            )
        return value

    if not hasattr(function, "__name__"):
        wrapped.__name__ = type(function).__name__
    return wrapped


def _as_column(y_true, y_pred):
    if len(y_true.shape) == 1 and len(y_pred.shape) > 1:
        y_true = keras.ops.expand_dims(y_true, -1)
    return y_true, y_pred


def _as_floats(y_true, y_pred):
    y_true, y_pred = _as_column(y_true, y_pred)
    return _as_float(y_true), _as_float(y_pred)


def _as_float(x):
    # In half precision the numbers of many classes would be the same.
    dtype = keras.config.floatx()
    if keras.backend.standardize_dtype(x.dtype) == dtype:
        return x
    return cast_with_mask(x, dtype)
