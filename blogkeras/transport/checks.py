"""Raises for input that is not a transport problem.

Inside a traced function tensors have no values, so there these are not checked.
"""

import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_finite,
    check_integer,
    check_number,
)

_MASS_ERROR = 1e-4  # float32 weights of a long text sum to 1 within this
# Those of half precision within four units in the last place.
_HALF_ERRORS = {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}


def check_settings(regularization, tolerance, max_iterations=1):
    """The settings of Sinkhorn's iteration, as plain numbers."""
    return (
        regularization
        if regularization is None
        else check_number("regularization", regularization, above=0),
        check_number("tolerance", tolerance, above=0),
        check_integer("max_iterations", max_iterations, minimum=1),
    )


def check_problem(p, q, D):
    """Raises unless p `(..., m)`, q `(..., n)` and D `(..., m, n)` fit."""
    shapes = [tuple(a.shape) for a in (p, q, D)]
    lead = shapes[2][:-2]
    fits = shapes[0] == shapes[2][:-1]
    fits = fits and shapes[1] == (*lead, *shapes[2][-1:])
    if len(shapes[2]) < 2 or not fits:
        raise ValueError(
            "Expected p (..., m), q (..., n) and D (..., m, n) with the same "
            f"leading axes. Received: p.shape={shapes[0]}, "
            f"q.shape={shapes[1]}, D.shape={shapes[2]}"
        )
    if 0 in shapes[2][-2:]:
        raise ValueError(
            "Expected at least one place on each side. Received: "
            f"D.shape={shapes[2]}"
        )
    check_mass("p", p)
    check_mass("q", q)


def check_own_costs(p, q, own_costs, arrays):
    """The costs within each side, `(..., m, m)` and `(..., n, n)`.

    Args:
        p: `(..., m)`.
        q: `(..., n)`.
        own_costs: Pair of arrays.
        arrays: Function that makes arrays of them.
    """
    if not isinstance(own_costs, (list, tuple)) or len(own_costs) != 2:
        raise ValueError(
            "Expected `own_costs` to be a pair, the costs within each side. "
            f"Received: own_costs={own_costs!r}"
        )
    own_costs = [arrays(D) for D in own_costs]
    for mass, D in zip((p, q), own_costs, strict=True):
        if tuple(D.shape) != (*mass.shape, mass.shape[-1]):
            raise ValueError(
                "Expected `own_costs` (..., m, m) and (..., n, n) for p "
                "(..., m) and q (..., n). Received: shapes "
                f"{[tuple(D.shape) for D in own_costs]} for p.shape="
                f"{tuple(p.shape)}, q.shape={tuple(q.shape)}"
            )
        check_finite("own_costs", D)
        if backend.is_concrete(D):
            values = as_numpy(D)
            largest = np.abs(values).max(initial=0)
            if not np.allclose(
                values, np.swapaxes(values, -1, -2), 1e-5, 1e-5 * largest
            ):
                raise ValueError(
                    "Expected `own_costs` to be symmetric. Received: "
                    f"own_costs={D!r}"
                )
    return tuple(own_costs)


def check_shape(name, z, x):
    """Raises a ValueError unless `z` has one entry for each word of `x`."""
    if tuple(z.shape) != tuple(x.shape[:-1]):
        raise ValueError(
            f"Expected the {name} of shape {tuple(x.shape[:-1])}, one for each "
            f"word. Received: {tuple(z.shape)}"
        )


def check_words(name, x, mask=None):
    """Raises on NaN and infinities in vectors that are not masked."""
    if mask is not None and backend.is_concrete(x):
        if backend.is_concrete(mask):
            x = np.where(as_numpy(mask)[..., None], as_numpy(x), 0)
    check_finite(name, x)


def mass_error(p):
    """How far the sum of weights may be from 1, by the dtype they came in."""
    dtype = str(getattr(p, "dtype", ""))
    found = (e for name, e in _HALF_ERRORS.items() if name in dtype)
    return next(found, _MASS_ERROR)


def widened(p):
    """Weights of half precision in float32, divided by a sum of nearly 1."""
    error = mass_error(p)
    if error == _MASS_ERROR:
        return p
    p = as_numbers(p)
    xp = np if isinstance(p, np.ndarray) else ops
    p = p.astype("float32") if xp is np else ops.cast(p, "float32")
    total = xp.sum(p, axis=-1, keepdims=True)
    near = xp.abs(total - 1) <= error
    return p / xp.where(near, total, xp.ones_like(total))


def check_mass(name, p, mask=None, normalized=True, error=_MASS_ERROR):
    """Raises on weights that are not a distribution.

    The weights of an empty sequence may all be zero.

    Args:
        name: String, for the message.
        p: `(..., n)`.
        mask: `(..., n)`, boolean, or `None`.
        normalized: Boolean. Whether the sum is to be 1.
        error: Float. How far it may be from that.
    """
    if not backend.is_concrete(p):
        return
    p = np.asarray(as_numpy(p), "float64")
    if mask is not None:
        p = np.where(as_numpy(mask), p, 0)
    check_finite(name, p)
    if p.size and p.min() < 0:
        raise ValueError(
            f"Expected nonnegative numbers in `{name}`. Received: {p.min()}"
        )
    if not normalized:
        return
    total = np.atleast_1d(p.sum(-1))
    wrong = np.abs(total - 1) > error
    if name not in "pq":
        wrong &= total != 0
    if wrong.any():
        raise ValueError(
            f"Expected `{name}` of sum 1: divide by the sum. Received: sums "
            f"such as {total[wrong][0]:g}"
        )
