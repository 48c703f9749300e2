"""Wrong values for each argument of each public name.

The table has the kind of each argument, and the kind its wrong values. Each
must raise a `ValueError` that says what was expected and received, in the call
that takes the argument (for layers: at the latest in the first call on data).
"""

import inspect
import re

import arguments_of_measures  # noqa: F401
import arguments_of_models  # noqa: F401
import arguments_of_training  # noqa: F401
import pytest
from kit import TENSORFLOW
from wrong_values import TABLE

import blogkeras

# Arguments are checked in Python, so one backend is enough.
pytestmark = pytest.mark.skipif(not TENSORFLOW, reason="the same on JAX")
# Arguments that are tested elsewhere, and why not here.
ELSEWHERE = {
    "DenoisingGenerator": "takes trained models: tests/denoising",
    "HSICTest": "made by hsic_test only",
    "LayerSimilarity": "made by compare_layers only",
    "LogPartition": "made by log_partition only",
    "SinkhornSolution": "made by sinkhorn only",
    "QuadraticHead": "has no arguments",
    "Samples": "made by samplers only",
    "SearchResult": "made by TransportIndex only",
    "Segment": "made by cut_model only",
    "layerwise_optimizer": "takes a transformer: tests/pretraining",
    "toy_densities": "a module: tests/denoising",
    "AdversarialMethod": "abstract",
    "CompressionReport": "made by compression_report only",
    "Robustness": "made by evaluate_robustness only",
    "SkipNonFinite": "tests/hall/test_optimizers.py",
    "bert_of_theseus": "takes transformers: tests/theseus",
    "straight_through": "a formula of two tensors, which Keras checks",
}


def cases():
    for name, (_, _, kinds) in TABLE.items():
        for argument, kind in kinds.items():
            for wrong in kind.wrong if kind else ():
                label = re.sub(r"\s+", " ", repr(wrong))[:30]
                yield pytest.param(
                    name, argument, wrong, id=f"{name}-{argument}-{label}"
                )


@pytest.mark.parametrize("name", TABLE)
def test_what_is_right_passes(name):
    TABLE[name][1]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument", "wrong"), list(cases()))
def test_what_is_wrong_is_refused(name, argument, wrong):
    with pytest.raises(ValueError, match=r"(?si)expected.*Received"):
        TABLE[name][1](**{argument: wrong})


def test_every_argument_stands_in_the_table():
    assert set(TABLE) | set(ELSEWHERE) == set(blogkeras.__all__)
    for name, (target, _, kinds) in TABLE.items():
        names = set(inspect.signature(target).parameters)
        assert names == set(kinds), name


def test_public_signatures_are_annotated():
    """mypy looks at what is annotated: `make lint`."""
    for name, (target, _, _) in TABLE.items():
        parameters = inspect.signature(target).parameters.values()
        missing = [p.name for p in parameters if p.annotation is p.empty]
        assert not missing, (name, missing)
        if inspect.isfunction(target):
            assert "return" in inspect.get_annotations(target), name
