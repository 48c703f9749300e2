"""Runs the table of properties: a few cases of each, or a thousand a name."""

import math

import pytest
from property_table import COUNTS, TABLE, THOUSAND

import blogkeras

MODULES = ("transport", "hsic")
for module in MODULES:
    pytest.register_assert_rewrite(f"properties_of_{module}")
    __import__(f"properties_of_{module}")

PAIRS = [
    pytest.param(name, a_property, id=f"{name}-{a_property.check.__name__}")
    for name, properties in TABLE.items()
    for a_property in properties
]


@pytest.mark.parametrize(("name", "a_property"), PAIRS)
def test_holds(name, a_property):
    a_property.run(getattr(blogkeras, name), a_property.short)


@pytest.mark.verify
@pytest.mark.parametrize("name", TABLE)
def test_holds_in_a_thousand_cases(name):
    cases, properties = 0, TABLE[name]
    for done, a_property in enumerate(properties):
        # What one property lacks, the next ones make up for.
        share = (THOUSAND - cases) / (len(properties) - done)
        calls = math.ceil(share / a_property.cases)
        cases += a_property.run(getattr(blogkeras, name), calls)
    assert cases >= THOUSAND
    COUNTS[name] = cases
