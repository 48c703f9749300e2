"""Kinds of arguments, and the values that are wrong for each kind."""

import functools

import keras
import numpy as np
import toy
from keras import layers

import blogkeras

X = toy.DENSE[:8]
Y = toy.TARGETS[:8]
VECTORS = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
NAN, INF = float("nan"), float("inf")


class Kind:
    """The wrong values of a kind of argument; `hint` is its annotation."""

    def __init__(self, *wrong, none=False, more=(), hint="Any"):
        self.hint = hint if hint == "Any" or not none else f"{hint} | None"
        self.wrong = [*wrong, *more] + ([] if none else [None])


def integer(minimum=None, none=False, more=()):
    below = [] if minimum is None else [minimum - 1]
    return Kind(
        4.0,
        4.5,
        True,
        "4",
        NAN,
        INF,
        [4],
        *below,
        none=none,
        more=more,
        hint="int",
    )


def number(minimum=None, above=None, maximum=None, none=False, more=()):
    outside = [-1.0] if minimum == 0 or above == 0 else []
    outside += [] if above is None else [above]
    outside += [] if maximum is None else [maximum + 0.5]
    return Kind(
        True,
        "4",
        NAN,
        INF,
        -INF,
        [1.0],
        *outside,
        none=none,
        more=more,
        hint="float",
    )


def boolean():
    return Kind("True", 1, 0.0, "no", hint="bool")


def choice(none=False):
    return Kind("bogus", 1, True, ["bogus"], none=none, hint="str")


def layer(none=False):
    return Kind("dense", 3, layers.Dense, none=none, hint="keras.layers.Layer")


def kernel(none=True):
    return Kind("gaussian", 3, blogkeras.LinearKernel, none=none)


def array(*more, none=False):
    """Numbers of at least one axis, finite."""
    strings = np.array(["a", "b"])
    return Kind("text", strings, NAN, none=none, more=more, hint="Tensor")


def seed():
    return Kind(1.5, "1", True, [1], none=True, hint="int")


def verbose():
    return Kind("loud", 3, -1, 1.5, hint="str | int")


FREE = None  # Everything is allowed, or Keras checks it.
# {name: (function that calls it with changes, {argument: kind})}
TABLE = {}


def row(target, valid, kinds, use=None):
    """Adds a name, with arguments that are right, to the table.

    `use` is a call on data, where some wrong arguments are found.
    """

    def call(**changes):
        arguments = {k: v() if callable(v) else v for k, v in valid.items()}
        result = target(**{**arguments, **changes})
        return use(result) if use else result

    TABLE[target.__name__] = (target, call, kinds)


def on_data(x=X):
    return lambda result: result(x)


@functools.cache
def sequential(units=3):
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(units, activation="softmax")]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@functools.cache
def texts():
    return toy.compiled(toy.classifier())


@functools.cache
def stack():
    """Two equal blocks with the names of a transformer's."""
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(toy.VOCABULARY, 4)(tokens)
    for index in range(2):
        h = layers.Dense(4, name=f"transformer_layer_{index}")(h)
    return keras.Model(tokens, h)
