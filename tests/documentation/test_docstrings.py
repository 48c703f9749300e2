"""Public names say what they do, and name each of their arguments.

Ruff cannot ask it: methods that override Keras's need no text of ours, and
arguments of one meaning may share an entry of "Args:".
"""

import inspect
import re

import keras
import pytest

import blogkeras

PUBLIC = {name: getattr(blogkeras, name) for name in blogkeras.__all__}
CLASSES = {n: value for n, value in PUBLIC.items() if inspect.isclass(value)}
KERAS = (
    keras.Model,
    keras.layers.Layer,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.callbacks.Callback,
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
    keras.utils.PyDataset,
)


def own_methods(cls):
    """`(name, function, docstring)` of public methods that Keras has not."""
    for base in cls.__mro__:
        if not base.__module__.startswith("blogkeras"):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(getattr(value, "__func__", value))
            if (
                not name.startswith("_")
                and inspect.isfunction(function)
                and not any(hasattr(keras_class, name) for keras_class in KERAS)
            ):
                yield f"{base.__name__}.{name}", function, docstring(cls, name)


def docstring(cls, name):
    """The method's, or that of the method it overrides."""
    docs = (getattr(getattr(c, name, None), "__doc__", "") for c in cls.__mro__)
    return next(filter(None, docs), "")


def methods():
    rows = {
        name: row for cls in CLASSES.values() for name, *row in own_methods(cls)
    }
    return [pytest.param(*row, id=name) for name, row in sorted(rows.items())]


def names_of(function):
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name
        for p in parameters
        if p.name not in ("self", "cls")
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def unnamed(text, names):
    """The arguments that no entry of "Args:" is about."""
    entries = re.findall(r"^ *((?:\*{0,2}\w+,\s+)*\*{0,2}\w+):", text, re.M)
    found = {
        name.strip("* \n") for entry in entries for name in entry.split(",")
    }
    return [name for name in names if name not in found]


@pytest.mark.parametrize(("function", "text"), methods())
def test_methods(function, text):
    assert text
    if "Args:" in text:
        assert unnamed(text, names_of(function)) == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_arguments(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text
    if inspect.isclass(value) and value.__init__ is object.__init__:
        return
    if callable(value):
        assert unnamed(text, names_of(value)) == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_name_is_documented_by_itself(name):
    """An example, what it returns, and where it comes from."""
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    if inspect.ismodule(value):
        return
    assert "\n>>> " in text
    assert re.search(r"^Reference:\n +\[", text, re.M)
    assert re.search(r"\]\(https?://", text)
    if inspect.isfunction(value):
        assert "\nReturns:\n" in text
    assert not re.search(r"\b[Ss]ee there\b|\b[Aa]s there\b", text)


def test_the_check_itself():
    text = "One.\n\nArgs:\n    a, b: Two.\n    **kwargs: Rest.\n"
    assert unnamed(text, ["a", "b", "kwargs", "c"]) == ["c"]
