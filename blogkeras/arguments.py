"""Checks of arguments, with one wording for every room.

Each function returns the value in its plain Python type, or raises a
`ValueError` that says what was expected and what was received. A check stands
at the earliest place: in `__init__`, or at the head of a function.

Inside a traced function tensors have no values, so there these are not checked.
"""

import functools
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import keras
import numpy as np
from keras import ops

from blogkeras import backend

Function = TypeVar("Function", bound=Callable[..., Any])


def check_integer(name, value, minimum=None, maximum=None):
    """An integer within bounds, both included, as `int`.

    NumPy's integers are accepted; booleans, floats (4.0 too) and strings are
    refused.

    Raises:
        ValueError: for everything else.

    Example:

    >>> check_integer("num_codes", 512, minimum=1)
    512
    """
    value_is_integer = isinstance(value, numbers.Integral) and not isinstance(
        value, bool
    )
    if (
        not value_is_integer
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
    ):
        bounds = _bounds(minimum, maximum)
        raise ValueError(
            f"Expected `{name}` to be an integer{bounds}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def check_sizes(name, value, minimum=1, length=None):
    """Integers in order, such as a list, a range or a shape, as a tuple.

    Args:
        name: String. The argument's name, for the message.
        value: The argument, at least one integer.
        minimum: Least value allowed of each.
        length: How many there must be, if that is known.

    Raises:
        ValueError: for everything else.

    Example:

    >>> check_sizes("input_shape", [28, 28, 1], length=3)
    (28, 28, 1)
    """
    try:
        # A shape of TensorFlow is no tuple, but can be read like one.
        items = tuple(value)
    except (TypeError, ValueError):
        items = ()
    unordered = isinstance(value, (str, bytes, dict, set, frozenset))
    right_length = len(items) == length if length else bool(items)
    if unordered or not right_length:
        wanted = (
            f"tuple of {length} integers" if length else "tuple of integers"
        )
        raise ValueError(
            f"Expected `{name}` to be a {wanted}. Received: {name}={value!r}"
        )
    return tuple(check_integer(name, item, minimum) for item in items)


def check_number(
    name, value, minimum=None, maximum=None, above=None, below=None
):
    """A finite number within bounds, as `float`.

    Args:
        name: String. The argument's name, for the message.
        value: The argument. Integers, floats and NumPy scalars are accepted;
            booleans, strings, NaN and infinities are refused.
        minimum: Least value allowed, if any.
        maximum: Greatest value allowed, if any.
        above: Bound that the value must exceed, if any.
        below: Bound that the value must stay under, if any.

    Raises:
        ValueError: for everything else.

    Example:

    >>> check_number("temperature", 0.5, above=0)
    0.5
    """
    value_is_number = isinstance(value, numbers.Real) and not isinstance(
        value, (bool, np.bool_)
    )
    if (
        not value_is_number
        or not math.isfinite(value)
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        bounds = _bounds(minimum, maximum, above, below)
        raise ValueError(
            f"Expected `{name}` to be a finite number{bounds}. "
            f"Received: {name}={value!r}"
        )
    return float(value)


def check_boolean(name, value):
    """`True` or `False` (NumPy's too), as `bool`.

    Raises:
        ValueError: for everything else, 0, 1 and strings included.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"Expected `{name}` to be True or False. Received: {name}={value!r}"
        )
    return bool(value)


def check_choice(name, value, choices):
    """One of several names.

    Args:
        name: String. The argument's name, for the message.
        value: The argument.
        choices: Sequence of the values allowed, strings or `None`.

    Raises:
        ValueError: where `value` is none of them.
    """
    # Only strings and None are compared: an array has no single truth value.
    comparable = value is None or isinstance(value, str)
    if not comparable or value not in tuple(choices):
        raise ValueError(
            f"Expected `{name}` to be one of "
            f"{', '.join(map(repr, choices))}. Received: {name}={value!r}"
        )
    return value


def check_layer(name, value):
    """A `keras.layers.Layer`; every `keras.Model` is one.

    Raises:
        ValueError: for everything else, such as the layer's name or class.
    """
    if not isinstance(value, keras.layers.Layer):
        raise ValueError(
            f"Expected `{name}` to be a Keras layer or model. "
            f"Received: {name}={value!r}"
        )
    return value


def check_path(name, value):
    """A path of the file system, as `str`: a string or a `pathlib.Path`.

    Raises:
        ValueError: for everything else, the empty string included.
    """
    path = value
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
    if not isinstance(path, str) or not path:
        raise ValueError(
            f"Expected `{name}` to be a path. Received: {name}={value!r}"
        )
    return path


def check_finite(name, values):
    """Raises a `ValueError` where known values hold NaN or an infinity."""
    if not backend.is_concrete(values):
        return
    # JAX shows its memory to NumPy, where Keras's conversion would copy it.
    is_jax = backend.BACKEND == "jax"
    values = np.asarray(values) if is_jax else as_numpy(values)
    if values.dtype.kind in "iub":
        return
    if values.dtype.kind != "f":  # bfloat16, which NumPy does not know
        values = values.astype("float64")
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"Expected finite numbers in `{name}`. Received: "
            f"{values[~finite].ravel()[:3]} among {values.size} values"
        )


def check_integers(name, values, minimum=0, maximum=None):
    """Raises a `ValueError` unless known values are integers within bounds.

    Floats, whole ones too, and booleans are refused: where numbers name codes
    or tokens, a float is a mistake.

    Args:
        name: String. The argument's name, for the message.
        values: Array or tensor.
        minimum: Least value allowed.
        maximum: Greatest value allowed, if any.
    """
    if ops.is_tensor(values) or isinstance(values, keras.KerasTensor):
        dtype = keras.backend.standardize_dtype(values.dtype)
        # Under a strategy of TensorFlow, Keras builds a model from the mean of
        # the replicas' batches, which is of floats for integers too.
        builds = backend.num_replicas() > 1 and not backend.is_concrete(values)
        are_integers = "int" in dtype or builds
    else:
        values = np.asarray(values)
        dtype = values.dtype
        are_integers = dtype.kind in "iu" or not values.size
    if not are_integers:
        raise ValueError(
            f"Expected integers in `{name}`. Received: {name} of dtype {dtype}"
        )
    if not backend.is_concrete(values):
        return
    values = as_numpy(values)
    low, high = (values.min(), values.max()) if values.size else (minimum,) * 2
    if low < minimum or (maximum is not None and high > maximum):
        raise ValueError(
            f"Expected `{name}` to hold integers{_bounds(minimum, maximum)}. "
            f"Received: {name} from {low} to {high}"
        )


def check_sample_weight(weight, rows=None, what="row"):
    """Sample weights as a NumPy array, one finite number ≥ 0 for each row.

    Args:
        weight: Array, tensor, list or `None`, which stays `None`.
        rows: Integer. How many rows there are, if that is known.
        what: String. What a row is, for the message.

    Raises:
        ValueError: for everything else.
    """
    if weight is None:
        return None
    array = as_numpy(as_numbers(weight, "sample_weight"))
    shape = array.shape
    if not 1 <= len(shape) <= 2 or shape[1:] not in ((), (1,)):
        raise ValueError(
            f"Expected one weight for each {what}. Received: "
            f"sample_weight.shape={shape}"
        )
    if rows is not None and len(array) != rows:
        raise ValueError(
            f"Expected one weight for each {what}. Received: "
            f"sample_weight.shape={shape} and {rows} of them"
        )
    check_finite("sample_weight", array)
    if array.size and array.min() < 0:
        raise ValueError(
            "Expected `sample_weight` of at least 0. Received: "
            f"sample_weight from {array.min()}"
        )
    return array


def check_no_class_weight(value, what="row"):
    """Raises a `ValueError` where `fit` is given class weights."""
    if value is not None:
        raise ValueError(
            f"Expected no `class_weight`: a {what} has no class here. Give "
            f"`sample_weight`, one number for each {what}. Received: "
            f"class_weight={value!r}"
        )


def row_weights(weight, what="row"):
    """Sample weights in a training step, as a float32 tensor `(rows,)`.

    Args:
        weight: Tensor `(rows,)` or `(rows, 1)`.
        what: String. What a row is, for the message.

    Raises:
        ValueError: if a row has several.
    """
    shape = tuple(weight.shape)
    if not shape or any(size not in (None, 1) for size in shape[1:]):
        raise ValueError(
            f"Expected one weight for each {what}. Received: "
            f"sample_weight of shape {shape}"
        )
    return ops.cast(ops.reshape(weight, (-1,)), "float32")


def shapes_agree(shape, other):
    """Whether two shapes are equal where the sizes of both are known."""
    return len(shape) == len(other) and not any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(shape, other, strict=True)
    )


def check_verbose(value):
    """Keras's `verbose`: `"auto"`, 0, 1 or 2; `"auto"` is 1."""
    if isinstance(value, str) and value == "auto":
        return 1
    if isinstance(value, (bool, np.bool_)):
        return int(value)
    if isinstance(value, numbers.Integral) and value in (0, 1, 2):
        return int(value)
    raise ValueError(
        "Expected `verbose` to be 'auto', 0, 1 or 2. "
        f"Received: verbose={value!r}"
    )


def check_seed(name, value):
    """A seed as Keras takes it: integer, `None` or a `SeedGenerator`.

    Raises:
        ValueError: for everything else.
    """
    if value is None or isinstance(value, keras.random.SeedGenerator):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise ValueError(
        f"Expected `{name}` to be an integer, None or a "
        f"`keras.random.SeedGenerator`. Received: {name}={value!r}"
    )


def as_numbers(values, name=None):
    """`values` if they are a tensor, else a NumPy array of them.

    Args:
        values: Array, tensor or (nested) list of numbers.
        name: String. The argument's name, for the message.
    """
    if ops.is_tensor(values) or isinstance(values, keras.KerasTensor):
        return values
    try:
        array = np.asarray(values)
        is_numeric = array.dtype.kind in "biuf" or "float" in str(array.dtype)
    except ValueError:  # rows of different lengths
        is_numeric = False
    if not is_numeric:
        raise ValueError(
            f"Expected numbers{f' in `{name}`' if name else ''}: an array, a "
            f"tensor or a list. Received: {str(values)[:60]!r} of type "
            f"{type(values).__name__}"
        )
    return array


def as_numpy(values):
    """A NumPy array of a tensor, a list or an array (which is not copied)."""
    if isinstance(values, np.ndarray):
        return values
    if ops.is_tensor(values):
        return ops.convert_to_numpy(values)
    return np.asarray(values)


def renamed_value(name, value, names):
    """`value`; in place of an old name the new one, with a warning.

    Args:
        name: String. The argument's name.
        value: The argument.
        names: Dict `{old value: new value}`.
    """
    if isinstance(value, str) and value in names:
        new = names[value]
        _warn_renamed(f"{name}={value!r}", f"{name}={new!r}")
        return new
    return value


def renamed_argument(old: str, new: str) -> Callable[[Function], Function]:
    """A decorator: the function takes the argument `new` as `old`, too."""

    def decorate(fn: Function) -> Function:
        @functools.wraps(fn)
        def with_old_name(*args, **kwargs):
            if old in kwargs:
                _warn_renamed(f"`{old}`", f"`{new}`")
                if new in kwargs:
                    raise ValueError(
                        f"Expected `{new}` alone, of which `{old}` is the old "
                        "name. Received: both"
                    )
                kwargs[new] = kwargs.pop(old)
            return fn(*args, **kwargs)

        return cast(Function, with_old_name)

    return decorate


def as_in_keras(method: Function) -> Function:
    """A decorator of a method that replaces one of `keras.Model`.

    Keras's own takes its arguments by their places, too. The method gets all of
    them by name.
    """
    signature = inspect.signature(getattr(keras.Model, method.__name__))

    @functools.wraps(method)
    def by_name(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        return method(**given.pop("kwargs", {}), **given)

    vars(by_name)["__signature__"] = signature
    return cast(Function, by_name)


def _warn_renamed(old, new):
    """Warns at the line outside of blogkeras that uses the old name."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").startswith("blogkeras"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{old} is now called {new}; the old name will be removed.",
        DeprecationWarning,
        stacklevel=level,
    )


def _bounds(minimum=None, maximum=None, above=None, below=None):
    parts = [
        f"at least {minimum}" if minimum is not None else "",
        f"above {above}" if above is not None else "",
        f"at most {maximum}" if maximum is not None else "",
        f"below {below}" if below is not None else "",
    ]
    text = " and ".join(part for part in parts if part)
    return f" of {text}" if text.startswith("at") else f" {text}".rstrip()
