"""The table of properties: what holds for each public name, on drawn input.

A property is a function of the public object and of drawn values that asserts
what mathematics or the documentation promises. `properties_of_*.py` fill the
table, room by room; `test_properties.py` runs it: a few cases of each property
in `make test`, at least a thousand cases of each name in `make verify`.
"""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import configuration

# Hypothesis stores what it reads from source files: not in the repository.
configuration.set_hypothesis_home_dir(
    tempfile.gettempdir() + "/blogkeras-hypothesis"
)
THOUSAND = 1000
# {name: list of its properties}
TABLE: dict[str, list["Property"]] = {}
# {name: number of cases}, of the names whose thousand cases have run.
COUNTS: dict[str, int] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """What holds for a public name.

    Attributes:
        check: Function of the public object and of the drawn values, by name.
        drawn: `{argument: hypothesis strategy}`.
        cases: How many cases one call is: the rows of a batch, where the rows
            are independent of each other.
        short: How many calls there are in `make test`; 0 where they would take
            longer than they are worth.
        slow_on_jax: Whether it runs in `make verify` only on JAX, where each
            operation is compiled for each shape.
        shared: Whether the check makes the object by itself, such as a record
            that a function returns. Then it runs once for all of its names.
    """

    check: Callable
    drawn: dict[str, Any]
    cases: int
    short: int
    slow_on_jax: bool
    shared: bool

    def run(self, target, calls):
        """Checks it for `calls` drawn values; returns the number of cases."""
        finished = 0

        @hypothesis.settings(
            max_examples=calls,
            derandomize=True,
            database=None,
            deadline=None,
            print_blob=False,
            report_multiple_bugs=False,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(**self.drawn)
        def case(**drawn):
            nonlocal finished
            self.check(target, **drawn)
            finished += self.cases

        case()
        return finished


def holds_for(*names, cases=1, short=2, slow_on_jax=False):
    """A decorator: the property holds for these public names.

    The arguments of the function, but the first, are strategies by their
    defaults. The first one is the public object; it is called `_` where the
    function does not use it.
    """

    def decorate(check):
        first, *rest = inspect.signature(check).parameters.values()
        drawn = {p.name: p.default for p in rest}
        shared = first.name == "_"
        a_property = Property(check, drawn, cases, short, slow_on_jax, shared)
        for name in names:
            TABLE.setdefault(name, []).append(a_property)
        return check

    return decorate
