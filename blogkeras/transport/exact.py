"""Exact transport: POT's network simplex, in NumPy float64."""

import functools

import numpy as np

from blogkeras.extras import require

_MAX_ITERATIONS = 10_000_000
_OPTIMAL = 1  # POT's result code


@functools.cache
def simplex():
    """The solver of one problem: `(p, q, D) -> (plan, value, f, g)`.

    `ot.emd2` spends some 60 µs in Python for each pair, several times what a
    sentence takes to solve. Its compiled core has no public name. Where that
    does not exist or has another result, `ot.emd2` itself is used.
    """
    ot = require("ot")

    def public(p, q, cost):
        check_native(p, q, cost)
        value, log = ot.emd2(
            p, q, cost, numItermax=_MAX_ITERATIONS, log=True, return_matrix=True
        )
        _check(log["warning"] is None, log["warning"])
        return log["G"], value, log["u"], log["v"]

    try:
        emd_c = require("ot.lp.emd_wrap").emd_c
    except (ImportError, AttributeError):
        return public

    def private(p, q, cost):
        check_native(p, q, cost)
        plan, value, f, g, code = emd_c(p, q, cost, _MAX_ITERATIONS, 1)
        _check(code == _OPTIMAL, f"result code {code}")
        return plan, value, f, g

    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    try:
        plan, value, _, _ = private(p, q, 1 - np.eye(2))
    except (RuntimeError, TypeError, ValueError):
        return public
    expected = np.array([[0.5, 0.25], [0, 0.25]])
    same = np.allclose(plan, expected) and abs(value - 0.25) < 1e-12
    return private if same else public


def check_native(p, q, cost):
    """Raises a `ValueError` on arrays that POT's compiled core cannot take.

    The core does not check lengths: it reads as many numbers of `p` and `q` as
    `cost` has rows and columns, beyond their ends. With NaN it may never
    return.
    """
    arrays = (p, q, cost)
    readable = all(
        isinstance(a, np.ndarray)
        and a.dtype == np.float64
        and a.flags.c_contiguous
        and a.size
        for a in arrays
    )
    if (
        not readable
        or (p.ndim, q.ndim) != (1, 1)
        or cost.shape != (len(p), len(q))
    ):
        raise ValueError(
            "Expected a problem p (m,), q (n,), cost (m, n), not empty, in "
            "contiguous float64. Received: "
            f"{[(np.shape(a), getattr(a, 'dtype', type(a))) for a in arrays]}"
        )
    # Comparisons with NaN are false.
    if not (
        p.min() >= 0
        and q.min() >= 0
        and abs(p.sum() - q.sum()) < 1e-6
        and cost.min() > -np.inf
        and cost.max() < np.inf
    ):
        raise ValueError(
            "Expected nonnegative masses of one sum and finite costs. "
            f"Received: p from {p.min()} to {p.max()}, q from {q.min()} to "
            f"{q.max()}, sums {p.sum()} and {q.sum()}, costs from "
            f"{cost.min()} to {cost.max()}"
        )


def _check(optimal, received):
    if not optimal:
        raise RuntimeError(
            "POT's network simplex found no optimum. Check that the costs are "
            f"finite. Received: {received}"
        )


def solve(p, q, cost, duals=False):
    """Solves a batch of problems exactly.

    Args:
        p: `(batch, n)`, each row a distribution.
        q: `(batch, m)`, each row a distribution.
        cost: `(batch, n, m)`, finite.
        duals: Boolean. Whether to return the potentials, too.

    Returns:
        `(value, plan)` or `(value, plan, f, g)`, float64. `f[i] + g[j] <=
        cost[i, j]` wherever `p[i]` or `q[j]` is positive.
    """
    p, q, cost = (np.ascontiguousarray(a, "float64") for a in (p, q, cost))
    # The simplex ends only if both sides have the same mass.
    p = p / p.sum(-1, keepdims=True)
    q = q / q.sum(-1, keepdims=True)
    # The simplex has absolute tolerances, so costs are scaled to a size of 1,
    # by powers of two, which costs no digits. The value is linear in the costs.
    largest = np.abs(cost).max(axis=(1, 2), initial=0.0)
    exponent = np.frexp(np.where(largest > 0, largest, 1.0))[1]
    cost = np.ldexp(cost, -exponent[:, None, None])
    solver = simplex()
    value, plan = np.empty(len(p)), np.empty(cost.shape)
    f, g = np.empty(p.shape), np.empty(q.shape)
    if 1 in cost.shape[1:]:
        # With one word on one side there is only one plan.
        np.multiply(p[:, :, None], q[:, None, :], out=plan)
        value = (plan * cost).sum((1, 2))
        f = cost[:, :, 0] if p.shape[1] > 1 else np.zeros_like(p)
        g = cost[:, 0, :] if p.shape[1] == 1 else np.zeros_like(q)
    else:
        for k, problem in enumerate(zip(p, q, cost, strict=True)):
            plan[k], value[k], f[k], g[k] = solver(*problem)
    value = np.ldexp(value, exponent)
    if not duals:
        return value, plan
    # The simplex ignores words without mass; their potentials are the largest
    # that the others admit.
    far = np.inf
    rows, columns = p > 0, q > 0
    g = np.min(np.where(rows[:, :, None], cost - f[:, :, None], far), 1)
    f = np.min(np.where(columns[:, None, :], cost - g[:, None, :], far), 2)
    f, g = (np.ldexp(a, exponent[:, None]) for a in (f, g))
    return value, plan, f, g
