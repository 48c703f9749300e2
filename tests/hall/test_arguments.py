"""Checks of arguments: what passes, what does not, one wording."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import JAX, TENSORFLOW

from blogkeras import arguments

NOT_A_NUMBER = (True, "4", None, [4], np.array([4]), float("nan"), object())


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4)])
def test_integers_pass(value):
    checked = arguments.check_integer("n", value, 1, 4)
    assert checked == 4
    assert type(checked) is int


@pytest.mark.parametrize(
    "value", [*NOT_A_NUMBER, 4.0, 4.5, 0, 5, -1, np.True_, np.float32(4)]
)
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match=r"Expected `n` .* Received: n="):
        arguments.check_integer("n", value, 1, 4)


@pytest.mark.parametrize(
    "value", [[2, 3], (2, 3), range(2, 4), np.array([2, 3]), (np.int8(2), 3)]
)
def test_sizes_pass(value):
    checked = arguments.check_sizes("n", value, length=2)
    assert checked == (2, 3)
    assert {*map(type, checked)} == {int}
    if TENSORFLOW:
        shape = ops.zeros((2, 3)).shape
        assert arguments.check_sizes("n", shape) == (2, 3)


@pytest.mark.parametrize(
    "value",
    [
        *NOT_A_NUMBER,
        4,
        "44",
        b"44",
        [],
        (),
        np.zeros(()),
        [[1]],
        [1, 2.0],
        [1, None],
        [1, 0],
        [1, True],
        {1: 2},
        {1, 2},
        np.ones((2, 2), int),
        [1, 2, 3],
    ],
)
def test_what_are_no_sizes(value):
    with pytest.raises(ValueError, match=r"Expected `n` .* Received: n="):
        arguments.check_sizes("n", value, length=2)


@pytest.mark.parametrize("value", [4, "44", [], [[1]], [1, 2.0], np.ones(())])
def test_what_are_no_sizes_of_any_number(value):
    with pytest.raises(ValueError, match=r"Expected `n` .* Received: n="):
        arguments.check_sizes("n", value)


@pytest.mark.parametrize("value", [4, 4.0, np.float32(4), np.int8(4)])
def test_numbers_pass(value):
    checked = arguments.check_number("x", value, minimum=0, below=5)
    assert checked == 4
    assert type(checked) is float


@pytest.mark.parametrize(
    "value", [*NOT_A_NUMBER, float("inf"), -0.5, 5, np.True_, 1j]
)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"at least 0 and below 5. Received"):
        arguments.check_number("x", value, minimum=0, below=5)
    with pytest.raises(ValueError, match="above 0"):
        arguments.check_number("x", 0, above=0)


@pytest.mark.parametrize("value", ["b", 1, np.array(["a"]), ["a"], True])
def test_choices(value):
    assert arguments.check_choice("mode", "a", ("a", None)) == "a"
    assert arguments.check_choice("mode", None, ("a", None)) is None
    with pytest.raises(ValueError, match=r"'a', None. Received: mode="):
        arguments.check_choice("mode", value, ("a", None))


def test_booleans_and_layers():
    assert arguments.check_boolean("flag", np.True_) is True
    for value in (1, "True", None):
        with pytest.raises(ValueError, match=r"True or False. Received: flag="):
            arguments.check_boolean("flag", value)
    layer = keras.layers.Dense(1)
    assert arguments.check_layer("layer", layer) is layer
    for value in ("dense", keras.layers.Dense, None):
        with pytest.raises(ValueError, match=r"Keras layer or model. Received"):
            arguments.check_layer("layer", value)


def test_finite_values():
    arguments.check_finite("x", np.array([1, 2]))
    arguments.check_finite("x", ops.ones(3, "bfloat16"))
    for value in ([1.0, np.nan], ops.convert_to_tensor([np.inf])):
        with pytest.raises(
            ValueError, match=r"finite numbers in `x`. Received"
        ):
            arguments.check_finite("x", value)


def test_arrays_of_integers():
    arguments.check_integers("ids", np.array([0, 4], "uint8"), 0, 4)
    arguments.check_integers("ids", [[0, 1], [2, 3]])
    arguments.check_integers("ids", np.zeros((0,), "int32"), 0, 4)
    for value in ([1.0], [True], np.array(["a"])):
        with pytest.raises(ValueError, match="Expected integers in `ids`"):
            arguments.check_integers("ids", value)
    with pytest.raises(ValueError, match=r"at most 4. Received: ids from 0 to"):
        arguments.check_integers("ids", [0, 5], 0, 4)


def test_traced_values_are_not_looked_at():
    def fn(x):
        arguments.check_integers("ids", x, 0, 1)
        return x

    symbol = keras.KerasTensor((3,), "int32")
    assert fn(symbol) is symbol
    if JAX:
        import jax

        assert jax.jit(fn)(np.array([5])) == 5
    else:
        import tensorflow as tf

        assert tf.function(fn)(tf.constant([5])) == 5


def test_verbose_and_seeds():
    seen = [arguments.check_verbose(v) for v in ("auto", 0, 1, 2, True)]
    assert seen == [1, 0, 1, 2, 1]
    for value in ("loud", 3, -1, None, 1.0):
        with pytest.raises(ValueError, match="Received: verbose="):
            arguments.check_verbose(value)
    generator = keras.random.SeedGenerator(1)
    for value in (None, 3, generator):
        assert arguments.check_seed("seed", value) is value
    for value in (1.5, "1", True):
        with pytest.raises(ValueError, match="Received: seed="):
            arguments.check_seed("seed", value)


def test_paths(tmp_path):
    assert arguments.check_path("path", tmp_path) == str(tmp_path)
    assert arguments.check_path("path", "index.npz") == "index.npz"
    for value in (None, 3, "", b"x", ["x"]):
        with pytest.raises(ValueError, match=r"`path` to be a path.*path="):
            arguments.check_path("path", value)


def test_old_names_warn_where_they_are_used():
    @arguments.renamed_argument("width", "size")
    def double(size):
        return 2 * size

    with pytest.warns(DeprecationWarning, match="`width`.*`size`") as record:
        assert double(width=3) == 6
    assert record[0].filename == __file__
    with (
        pytest.warns(DeprecationWarning, match="width"),
        pytest.raises(ValueError, match="both"),
    ):
        double(width=3, size=4)
    assert double(3) == double(size=3) == 6
    names = {"usual": "standard"}
    assert arguments.renamed_value("form", "blog", names) == "blog"
    with pytest.warns(DeprecationWarning, match="form='standard'") as record:
        assert arguments.renamed_value("form", "usual", names) == "standard"
    assert record[0].filename == __file__
