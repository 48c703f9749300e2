"""Runs the table of properties: a few cases of each, or a thousand a name."""

import math

import keras
import pytest
from kit import JAX
from property_table import COUNTS, TABLE, THOUSAND

import blogkeras

MODULES = ("transport", "hsic", "layers", "models")
for module in MODULES:
    pytest.register_assert_rewrite(f"properties_of_{module}")
    __import__(f"properties_of_{module}")

# Names without a property, and why.
WITHOUT = {"AdversarialMethod": "abstract: its subclasses have theirs"}
if not hasattr(keras.optimizers, "MultiOptimizer"):
    for name in ("DenoisingGenerator", "layerwise_optimizer"):
        WITHOUT[name] = "needs a Keras with MultiOptimizer"


def pairs():
    """Each property with the names that it is tried on in `make test`.

    On JAX each new shape of each operation is compiled: there it is one for
    each name at most.
    """
    seen = set()
    for name, properties in TABLE.items():
        properties = [p for p in properties if p.short]
        if JAX:
            properties = [p for p in properties if not p.slow_on_jax][:1]
        for a_property in properties:
            if a_property.shared and a_property in seen:
                continue
            seen.add(a_property)
            label = f"{name}-{a_property.check.__name__}"
            yield pytest.param(name, a_property, id=label)


@pytest.mark.parametrize(("name", "a_property"), list(pairs()))
def test_holds(name, a_property):
    calls = 1 if JAX else a_property.short
    a_property.run(getattr(blogkeras, name), calls)


SHARED = {}


@pytest.mark.verify
@pytest.mark.parametrize("name", TABLE)
def test_holds_in_a_thousand_cases(name):
    cases, properties = 0, TABLE[name]
    for done, a_property in enumerate(properties):
        # What one property lacks, the next ones make up for.
        share = (THOUSAND - cases) / (len(properties) - done)
        calls = math.ceil(share / a_property.cases)
        if SHARED.get(a_property, 0) >= calls * a_property.cases:
            cases += SHARED[a_property]
            continue
        finished = a_property.run(getattr(blogkeras, name), calls)
        cases += finished
        if a_property.shared:
            SHARED[a_property] = finished
    assert cases >= THOUSAND
    COUNTS[name] = cases


def test_every_public_function_and_layer_has_its_property():
    assert set(TABLE) | set(WITHOUT) == set(blogkeras.__all__)
    assert not set(TABLE) & set(WITHOUT)
