"""The loss of one output, as `compile` makes it of what it is given."""

import keras
from keras import ops


class FunctionLoss(keras.losses.Loss):
    """The mean of a function of targets and outputs.

    As in `compile`, an axis of size 1 is added or dropped at the end where
    either has one axis more: `(n,)` and `(n, 1)` broadcast to `(n, n)`.

    Args:
        fn: `fn(y_true, y_pred)` gives one number for each row or position.
    """

    def __init__(self, fn):
        super().__init__(name="loss")
        self.fn = fn

    def call(self, y_true, y_pred):
        return self.fn(*_same_rank(y_true, y_pred))


class Crossentropy(keras.losses.Loss):
    """The crossentropy that fits the shapes of target and output."""

    def __init__(self):
        super().__init__(name="loss")

    def call(self, y_true, y_pred):
        classes = y_pred.shape[-1]
        if classes == 1:
            fn = keras.losses.binary_crossentropy
        elif len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] == 1:
            fn = keras.losses.sparse_categorical_crossentropy
        else:
            fn = keras.losses.categorical_crossentropy
        return fn(*_same_rank(y_true, y_pred))


def as_loss(loss):
    """The `keras.losses.Loss` that `compile` makes of the loss of one output.

    Args:
        loss: A name (`"crossentropy"` and `"ce"` too), a function, a
            `keras.losses.Loss` or its class.

    Returns:
        A `keras.losses.Loss`; one that is given is returned as it is.

    Raises:
        ValueError: for everything else.
    """
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        return Crossentropy()
    found = keras.losses.get(loss) if not isinstance(loss, dict) else None
    if found is None:
        raise ValueError(
            "Expected the loss of one output: a name, a function or a "
            f"`keras.losses.Loss`. Received: loss={loss!r}"
        )
    return (
        found if isinstance(found, keras.losses.Loss) else FunctionLoss(found)
    )


def _same_rank(first, second):
    """Two tensors, one with an axis of size 1 more or less at the end."""
    if len(first.shape) > len(second.shape):
        return _same_rank(second, first)[::-1]
    more = len(second.shape) - len(first.shape)
    if more != 1 or second.shape[-1] != 1:
        return first, second
    if len(first.shape) == 1:
        return ops.expand_dims(first, -1), second
    return first, ops.squeeze(second, -1)
