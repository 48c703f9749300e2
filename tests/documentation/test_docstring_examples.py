"""Every example in the docstring of a public name runs and prints what it says.

A reader sees the example alone, so each runs in a namespace of its own that has
`keras`, `np`, `ops` and the public names, and nothing of another example.
"""

import contextlib
import doctest
import inspect
import io

import keras
import numpy as np
import pytest
from kit import JAX, slow_on_jax

import blogkeras

# What takes more than two seconds here, on either backend.
SLOW = {
    "AnnealedScoreMatching",
    "CodePrior",
    "CodebookUsage",
    "DenoisingDensityEstimator",
    "DenoisingGenerator",
    "HSICBottleneck",
    "NVAE",
    "ResidualVectorQuantizer",
    "SinkhornSolution",
    "VQVAE",
    "WordRotatorDistance",
    "block_hsic",
    "compare_depths",
    "fourier_hsic",
}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def documented():
    """`(name, docstring)` of public names and of their own public methods."""
    names = {name: getattr(blogkeras, name) for name in blogkeras.__all__}
    if not JAX:
        import blogkeras.bert4keras as room

        names |= {name: getattr(room, name) for name in room.__all__}
    for name, value in names.items():
        yield name, inspect.getdoc(value)
        members = vars(value) if inspect.isclass(value) else {}
        for member, function in members.items():
            function = getattr(function, "__func__", function)
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", inspect.getdoc(function)


EXAMPLES = {
    name: example
    for name, text in documented()
    for example in [doctest.DocTestParser().get_examples(text or "", name)]
    if example
}


# Keras's own `fit` of int64 inputs, under JAX 0.12.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
@slow_on_jax
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.verify if n in SLOW else ())
        for n in sorted(EXAMPLES)
    ],
)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    namespace = {n: getattr(blogkeras, n) for n in blogkeras.__all__}
    if "." not in name and name not in namespace:
        namespace[name] = getattr(blogkeras.bert4keras, name)
    namespace |= {
        "keras": keras,
        "layers": keras.layers,
        "ops": keras.ops,
        "np": np,
        "__name__": "__main__",
    }
    test = doctest.DocTest(EXAMPLES[name], namespace, name, None, 0, None)
    report = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write)
    assert not report.getvalue(), report.getvalue()


@pytest.mark.skipif(JAX, reason="once is enough")
def test_no_example_is_skipped():
    for name, examples in EXAMPLES.items():
        for example in examples:
            assert doctest.SKIP not in example.options, name
