"""Every argument of Theseus and its parts, fed wrong types and values."""

import math

import pytest
from keras import layers
from kit import slow_on_tensorflow
from theseus_parts import dense

from blogkeras.theseus import (
    CosineReplacement,
    LinearReplacement,
    ModuleReplacement,
    Theseus,
)


def bad_arguments():
    """Every argument of the public classes, with wrong types and values."""
    numbers = [None, "0.5", True, math.nan, math.inf, -0.1, 1.5, [0.5]]
    integers = [None, "4", True, 4.0, math.nan, -1, 0, [4]]
    flags = [None, "yes", 0, 1, 0.5]
    layer = [None, "dense", layers.Dense, [], [None], 3]
    seeds = ["1", 1.0, math.nan, [1]]

    def module(**kwargs):
        pair = {"predecessor": dense(), "successor": dense()}
        return ModuleReplacement(**{**pair, **kwargs})

    def theseus(**kwargs):
        lists = {
            "predecessor_modules": [dense()],
            "successor_modules": [dense()],
        }
        return Theseus(**{**lists, **kwargs})

    for make, table in (
        (LinearReplacement, {"slope": [*numbers[:6], [0.5]]}),
        (lambda start: LinearReplacement(0.1, start), {"start": numbers}),
        (CosineReplacement, {"steps": integers}),
        (lambda start: CosineReplacement(10, start), {"start": numbers}),
        (
            module,
            {
                "predecessor": [*layer, layers.Dense(3)],
                "successor": layer,
                "replacement_rate": numbers,
                "mode": ["token", None, True, 0],
                "predecessor_dropout": flags,
                "seed": seeds,
            },
        ),
        (
            theseus,
            {
                "predecessor_modules": [None, "a", dense(), [], [None], ["a"]],
                "successor_modules": [None, "a", dense(), [], [None], ["a"]],
                "head": ["dense", layers.Dense, [None], 3],
                "stem": ["dense", layers.Dense, [None], 3],
                "replacement_rate": numbers,
                "mode": ["token", None, True, 0],
                "train_shared": flags,
                "predecessor_dropout": flags,
                "seed": seeds,
            },
        ),
    ):
        for name, values in table.items():
            for wrong in values:
                yield pytest.param(
                    make, name, wrong, id=f"{make.__name__}-{name}-{wrong!r}"
                )


@slow_on_tensorflow
@pytest.mark.parametrize(("make", "name", "wrong"), list(bad_arguments()))
def test_bad_arguments(make, name, wrong):
    with pytest.raises(ValueError, match=r"(?s)xpected .*Received: "):
        make(**{name: wrong})
